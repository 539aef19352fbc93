"""MNIST_HVAE_Relu: its terms against densities written out by hand, by Monte Carlo where they are expectations."""
import math
import unittest

import torch

import common
import training
import MNIST_HVAE_Relu
from tests import small


def log_density(x, mean, std):
    """log N(x; mean, std^2), per element."""
    return -0.5 * ((x - mean) / std)**2 - torch.log(torch.as_tensor(std)) - 0.5 * math.log(2 * math.pi)


class Terms(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        f = MNIST_HVAE_Relu.Flags(d_1=3, d_2=2, d_hidden=12, eta_enc=0.7, eta_dec=0.4, sigma_1=0.3, device="cpu")
        cls.data = small.digit_data(8, 4)
        cls.model, cls.f = training.build(MNIST_HVAE_Relu.HVAE, f, cls.data).eval(), common.on_device(f, cls.data.test[0])
        with torch.no_grad():                             # far from its start, so that no term is near 0
            random = torch.Generator().manual_seed(1)
            for p in cls.model.parameters():
                p += 0.25 * torch.randn(p.shape, generator=random)
        [cls.x] = cls.data.test

    @torch.no_grad()
    def by_hand(self, draws):
        """Draws of z1, z2 and all densities at them, from the weights alone: ReLU layers, tanh means, softplus std."""
        weights = {name: value for name, value in self.model.named_parameters()}
        random = torch.Generator().manual_seed(2)

        def mlp(name, h):
            hidden = torch.clamp(h @ weights[f"{name}.0.weight"].T + weights[f"{name}.0.bias"], min=0)
            return hidden @ weights[f"{name}.2.weight"].T + weights[f"{name}.2.bias"]

        mean_1 = torch.tanh(mlp("x_to_z1", self.x))
        z1 = mean_1 + 0.3 * torch.randn(draws, 4, 3, generator=random, dtype=torch.float64)
        out = mlp("z1_to_z2", z1)
        mean_2 = torch.tanh(out[..., :2])
        std_2 = 0.7 * torch.clamp(torch.log1p(torch.exp(out[..., 2:])) / math.log(2), min=1e-3)
        z2 = mean_2 + std_2 * torch.randn(draws, 4, 2, generator=random, dtype=torch.float64)
        prior_1 = torch.tanh(mlp("z2_to_z1", z2))
        pixels = torch.tanh(mlp("z1_to_x", z1))
        return dict(mean_1=mean_1, mean_2=mean_2, std_2=std_2, z1=z1, prior_1=prior_1,
                    log_q1=log_density(z1, mean_1, 0.3), log_p1=log_density(z1, prior_1, 0.4),
                    log_q2=log_density(z2, mean_2, std_2), log_p2=log_density(z2, 0.0, 0.7),
                    log_px_z=log_density(self.x, pixels, 0.4).sum(-1))

    @torch.no_grad()
    def of_the_model(self, draws):
        torch.manual_seed(3)
        return self.model(self.x, self.f, sample_shape=(draws,))

    def assert_same_mean(self, a, b):
        """Two samples (draws, ...) have the same mean over draws, within four standard errors in every element."""
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        self.assertLess(((a.mean(0) - b.mean(0)).abs() / error).max().item(), 4)
        self.assertLess((error / a.mean(0).abs()).max().item(), 0.05)         # precise enough to tell

    def test_terms_are_the_expectations_they_claim_to_be(self):
        hand, terms = self.by_hand(25_000), self.of_the_model(25_000)
        self.assert_same_mean(hand["log_px_z"], terms["log_px_z"])
        self.assert_same_mean(hand["log_q1"] - hand["log_p1"], terms["kl_1"])
        self.assert_same_mean(hand["log_q2"] - hand["log_p2"], terms["kl_2"])
        elbo = terms["log_px_z"] - terms["kl_1"].sum(-1) - terms["kl_2"].sum(-1)
        by_hand = (hand["log_px_z"] + (hand["log_p1"] - hand["log_q1"]).sum(-1)
                   + (hand["log_p2"] - hand["log_q2"]).sum(-1))
        self.assert_same_mean(by_hand, elbo)
        self.assert_same_mean(by_hand, terms["log_w"])
        # Without log p(x|z), whose spread would hide much.
        self.assert_same_mean(by_hand - hand["log_px_z"], terms["log_w"] - terms["log_px_z"])
        torch.testing.assert_close(terms["mean_1"], hand["mean_1"] / 0.4)
        self.assert_same_mean(hand["mean_2"] / 0.7, terms["mean_2"])

    def test_unit_kl_of_z1_is_over_an_independent_draw(self):
        """KL(q(z1|x) || p(z1|z2')), z2' from another draw of z1: shift z1 by one draw against p(z1|z2)."""
        hand, terms = self.by_hand(25_000), self.of_the_model(25_000)
        log_p1 = log_density(hand["z1"].roll(1, 0), hand["prior_1"], 0.4)
        self.assert_same_mean(hand["log_q1"].roll(1, 0) - log_p1, terms["unit_kl_1"])
        self.assertGreaterEqual(terms["unit_kl_1"].min().item(), 0)
        self.assertGreaterEqual(terms["kl_2"].min().item(), 0)

    def test_kl_of_z1_can_be_negative_and_is_not_clamped(self):
        """Where z2 tells more of the drawn z1 than x does: sigma_1 above eta_dec, and z2 that copies z1."""
        f = MNIST_HVAE_Relu.Flags(d_1=1, d_2=1, d_hidden=2, sigma_1=0.3, eta_dec=0.05, eta_enc=1.0, device="cpu")
        model = training.build(MNIST_HVAE_Relu.HVAE, f, self.data).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
            for net in (model.z1_to_z2, model.z2_to_z1):      # relu(z) - relu(-z) = z
                net[0].weight[:] = torch.tensor([[1.0], [-1.0]])
                net[2].weight[0] = torch.tensor([1.0, -1.0])
            model.z1_to_z2[2].bias[1] = -20.0                 # a posterior of z2 that is all but a point
            terms = model(self.x, common.on_device(f, self.data.test[0]), sample_shape=(500,))
        self.assertLess(terms["kl_1"].mean().item(), -0.5)
        self.assertGreater(terms["unit_kl_1"].mean().item(), 1.0)

    def test_shapes(self):
        f, model = self.f, self.model
        model.train()
        terms = model(self.x, f)
        model.eval()
        self.assertEqual({name: tuple(value.shape) for name, value in terms.items()},
                         {"log_px_z": (4,), "kl_1": (4, 3), "kl_2": (4, 2)})
        terms = self.of_the_model(5)
        for name, shape in dict(log_px_z=(5, 4), log_w=(5, 4), kl_1=(5, 4, 3), kl_2=(5, 4, 2), unit_kl_1=(5, 4, 3),
                                mean_2=(5, 4, 2)).items():
            self.assertEqual(tuple(terms[name].shape), shape)
        with torch.no_grad():
            pictures = model.reconstructions(self.x, f)
            self.assertEqual({tuple(images.shape) for images in pictures.values()}, {(4, 784)})
            self.assertEqual(len(pictures), 3)
            self.assertTrue(torch.equal(pictures["test images"], self.x))
            self.assertEqual(tuple(model.samples(7, f).shape), (7, 784))

    def test_starts_near_the_prior(self):
        """The std of q(z2|z1) starts near eta_enc, whatever that is."""
        for eta_enc in (0.25, 2.0):
            f = MNIST_HVAE_Relu.Flags(eta_enc=eta_enc, device="cpu")
            model, g = training.build(MNIST_HVAE_Relu.HVAE, f, self.data), common.on_device(f, self.data.test[0])
            with torch.no_grad():
                std = model.q_z2(model.q_z1(self.x, g).mean, g).stddev / eta_enc
            self.assertLess((std - 1).abs().max().item(), 0.3)

    def test_gradient_is_that_of_the_loss(self):
        """Finite differences through fit's loss, with the noise held."""
        f = self.f
        names = dict(self.model.named_parameters())
        parameters = [names["x_to_z1.2.bias"], names["z1_to_z2.2.bias"], names["z2_to_z1.2.bias"]]

        def loss(*values):
            torch.manual_seed(0)
            replaced = {name: value for name, value in names.items()}
            replaced |= dict(zip(("x_to_z1.2.bias", "z1_to_z2.2.bias", "z2_to_z1.2.bias"), values))
            return self.model.loss(torch.func.functional_call(self.model, replaced, (self.x, f)), f).mean()

        self.assertTrue(torch.autograd.gradcheck(loss, [p.detach().clone().requires_grad_() for p in parameters]))


if __name__ == "__main__":
    unittest.main()
