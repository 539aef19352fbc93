"""MNIST_HVAE_Relu: its terms beside densities that are written out by hand.

Terms that are expectations are compared with a Monte Carlo mean of those densities.
"""
import math
import unittest

import common
import torch

import training
import MNIST_HVAE_Relu
from tests import small

# Draws of z1 and z2 in a Monte Carlo mean.
DRAWS = 25_000


def log_density(x, mean, std):
    """log N(x; mean, std^2), per element."""
    log_std = torch.log(torch.as_tensor(std))
    return -0.5 * ((x - mean) / std)**2 - log_std - 0.5 * math.log(2 * math.pi)


class Terms(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        f = MNIST_HVAE_Relu.Flags(
            d_1=3, d_2=2, d_hidden=12, eta_enc=0.7, eta_dec=0.4, sigma_1=0.3, device="cpu"
        )
        cls.data = small.digit_data(8, 4)
        cls.model = training.build(MNIST_HVAE_Relu.HVAE, f, cls.data).eval()
        cls.f = common.on_device(f, cls.data.test[0])
        [cls.x] = cls.data.test

        # Far from its start no term is near 0.
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in cls.model.parameters():
                p += 0.25 * torch.randn(p.shape, generator=random)
        cls.hand = cls.by_hand()
        cls.terms = cls.model_terms(DRAWS)

    @classmethod
    @torch.no_grad()
    def by_hand(cls):
        """DRAWS of z1 and z2, and all densities at them, from the weights alone.

        The networks have ReLU layers, their means are a tanh, and the std is a softplus.
        """
        weights = dict(cls.model.named_parameters())
        random = torch.Generator().manual_seed(2)

        def mlp(name, h):
            raw = h @ weights[f"{name}.0.weight"].T + weights[f"{name}.0.bias"]
            hidden = torch.clamp(raw, min=0)
            return hidden @ weights[f"{name}.2.weight"].T + weights[f"{name}.2.bias"]

        mean_1 = torch.tanh(mlp("x_to_z1", cls.x))
        z1 = mean_1 + 0.3 * torch.randn(DRAWS, 4, 3, generator=random, dtype=torch.float64)
        out = mlp("z1_to_z2", z1)
        mean_2 = torch.tanh(out[..., :2])
        softplus = torch.log1p(torch.exp(out[..., 2:]))
        std_2 = 0.7 * torch.clamp(softplus / math.log(2), min=1e-3)
        z2 = mean_2 + std_2 * torch.randn(DRAWS, 4, 2, generator=random, dtype=torch.float64)
        prior_1 = torch.tanh(mlp("z2_to_z1", z2))
        pixels = torch.tanh(mlp("z1_to_x", z1))
        return {
            "mean_1": mean_1,
            "mean_2": mean_2,
            "std_2": std_2,
            "z1": z1,
            "prior_1": prior_1,
            "log_q1": log_density(z1, mean_1, 0.3),
            "log_p1": log_density(z1, prior_1, 0.4),
            "log_q2": log_density(z2, mean_2, std_2),
            "log_p2": log_density(z2, 0.0, 0.7),
            "log_px_z": log_density(cls.x, pixels, 0.4).sum(-1),
        }

    @classmethod
    @torch.no_grad()
    def model_terms(cls, draws):
        torch.manual_seed(3)
        return cls.model(cls.x, cls.f, sample_shape=(draws,))

    def assert_same_mean(self, a, b):
        """Two samples (draws, ...) have the same mean over draws, in every element.

        They may differ by four standard errors, which must be small enough to notice an error.
        """
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        self.assertLess(((a.mean(0) - b.mean(0)).abs() / error).max().item(), 4)
        self.assertLess((error / a.mean(0).abs()).max().item(), 0.05)

    def test_terms_are_the_expectations_they_claim_to_be(self):
        hand, terms = self.hand, self.terms

        # 1. The terms of the ELBO.
        self.assert_same_mean(hand["log_px_z"], terms["log_px_z"])
        self.assert_same_mean(hand["log_q1"] - hand["log_p1"], terms["kl_1"])
        self.assert_same_mean(hand["log_q2"] - hand["log_p2"], terms["kl_2"])

        # 2. The ELBO and the log importance weight.
        elbo = terms["log_px_z"] - terms["kl_1"].sum(-1) - terms["kl_2"].sum(-1)
        elbo_by_hand = (
            hand["log_px_z"]
            + (hand["log_p1"] - hand["log_q1"]).sum(-1)
            + (hand["log_p2"] - hand["log_q2"]).sum(-1)
        )
        self.assert_same_mean(elbo_by_hand, elbo)
        self.assert_same_mean(elbo_by_hand, terms["log_w"])
        # Once more without log p(x|z), whose spread would hide much.
        kls_by_hand = elbo_by_hand - hand["log_px_z"]
        self.assert_same_mean(kls_by_hand, terms["log_w"] - terms["log_px_z"])

        # 3. The means, in standard deviations of the priors.
        torch.testing.assert_close(terms["mean_1"], hand["mean_1"] / 0.4)
        self.assert_same_mean(hand["mean_2"] / 0.7, terms["mean_2"])

    def test_unit_kl_of_z1_is_over_an_independent_draw(self):
        """unit_kl_1 is KL(q(z1|x) || p(z1|z2')), where z2' comes from another draw of z1.

        The z1 of each draw is compared with the p(z1|z2) of the next one.
        """
        hand, terms = self.hand, self.terms
        log_p1 = log_density(hand["z1"].roll(1, 0), hand["prior_1"], 0.4)
        self.assert_same_mean(hand["log_q1"].roll(1, 0) - log_p1, terms["unit_kl_1"])
        self.assertGreaterEqual(terms["unit_kl_1"].min().item(), 0)
        self.assertGreaterEqual(terms["kl_2"].min().item(), 0)

    def test_kl_of_z1_can_be_negative_and_is_not_clamped(self):
        """It is negative where z2 says more about the drawn z1 than x does.

        Here sigma_1 is larger than eta_dec, and z2 copies z1.
        """
        f = MNIST_HVAE_Relu.Flags(
            d_1=1, d_2=1, d_hidden=2, sigma_1=0.3, eta_dec=0.05, eta_enc=1.0, device="cpu"
        )
        model = training.build(MNIST_HVAE_Relu.HVAE, f, self.data).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
            # Two hidden units pass z on: relu(z) - relu(-z) = z.
            for net in (model.z1_to_z2, model.z2_to_z1):
                net[0].weight[:] = torch.tensor([[1.0], [-1.0]])
                net[2].weight[0] = torch.tensor([1.0, -1.0])
            # The posterior of z2 is nearly a point.
            model.z1_to_z2[2].bias[1] = -20.0
            scalars = common.on_device(f, self.data.test[0])
            terms = model(self.x, scalars, sample_shape=(500,))
        self.assertLess(terms["kl_1"].mean().item(), -0.5)
        self.assertGreater(terms["unit_kl_1"].mean().item(), 1.0)

    def test_shapes(self):
        # 1. In training.
        self.model.train()
        terms = self.model(self.x, self.f)
        self.model.eval()
        shapes = {name: tuple(value.shape) for name, value in terms.items()}
        self.assertEqual(shapes, {"log_px_z": (4,), "kl_1": (4, 3), "kl_2": (4, 2)})

        # 2. In the evaluation.
        terms = self.model_terms(5)
        expected = {
            "log_px_z": (5, 4),
            "log_w": (5, 4),
            "kl_1": (5, 4, 3),
            "kl_2": (5, 4, 2),
            "unit_kl_1": (5, 4, 3),
            "mean_2": (5, 4, 2),
        }
        for name, shape in expected.items():
            self.assertEqual(tuple(terms[name].shape), shape)

        # 3. Images.
        with torch.no_grad():
            panels = self.model.reconstructions(self.x, self.f)
            self.assertEqual({tuple(images.shape) for images in panels.values()}, {(4, 784)})
            self.assertEqual(len(panels), 3)
            self.assertTrue(torch.equal(panels["test images"], self.x))
            self.assertEqual(tuple(self.model.samples(7, self.f).shape), (7, 784))

    def test_starts_near_the_prior(self):
        """The std of q(z2|z1) starts near eta_enc, for a small and for a large one."""
        for eta_enc in (0.25, 2.0):
            f = MNIST_HVAE_Relu.Flags(eta_enc=eta_enc, device="cpu")
            model = training.build(MNIST_HVAE_Relu.HVAE, f, self.data)
            scalars = common.on_device(f, self.data.test[0])
            with torch.no_grad():
                z1 = model.q_z1(self.x, scalars).mean
                std = model.q_z2(z1, scalars).stddev / eta_enc
            self.assertLess((std - 1).abs().max().item(), 0.3)

    def test_gradient_is_that_of_the_loss(self):
        """Finite differences of the loss that training minimises, with the same noise each time."""
        weights = dict(self.model.named_parameters())
        names = ("x_to_z1.2.bias", "z1_to_z2.2.bias", "z2_to_z1.2.bias")

        def loss(*values):
            torch.manual_seed(0)
            replaced = weights | dict(zip(names, values))
            arguments = (self.x, self.f)
            terms = torch.func.functional_call(self.model, replaced, arguments)
            return self.model.loss(terms, self.f).mean()

        values = [weights[name].detach().clone().requires_grad_() for name in names]
        self.assertTrue(torch.autograd.gradcheck(loss, values))


if __name__ == "__main__":
    unittest.main()
