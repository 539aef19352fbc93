"""Evaluation: the importance-sampling estimator against exact log-likelihoods, the metrics against their definitions."""
import math
import unittest
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.distributions import Independent, Normal

import common
from tests import small


def evaluate(model, f, data):
    with mock.patch("sys.stderr"):
        return common.evaluate(model.eval(), f, data)


class ImportanceSampling(unittest.TestCase):
    """A linear HVAE, whose log p(x) is known: x ~ N(0, U1 (eta_enc^2 U2 U2' + eta_dec^2 I) U1' + eta_dec^2 I)."""

    @classmethod
    def setUpClass(cls):
        cls.data = small.gaussian_data(2048, 300)
        cls.f = small.Flags(device="cpu", eta_enc=0.8, eta_dec=0.6, num_epochs=20, lr=1e-2, grad_clip=10.0)
        with mock.patch("sys.stderr"):
            [(trained, _)] = common.train(small.LinearHVAE, [cls.f], cls.data)
        # Weights so small that the untrained q is not far from the posterior: else a thousand draws are too few, and
        # the bias of a logarithm's estimate is larger than its standard error.
        untrained = common.build(small.LinearHVAE, cls.f, cls.data).eval()
        with torch.no_grad():
            for p in untrained.parameters():
                p *= 0.1
        cls.models = {"trained": trained, "untrained": untrained}

    def settings(self, **values):
        return common.dataclasses.replace(self.f, **values)

    def standard_error(self, model, draws):
        """Of the mean over test examples of log of a mean of weights, from fresh weights (delta method)."""
        [x] = self.data.test
        torch.manual_seed(0)
        with torch.no_grad():
            log_w = model(x, common.on_device(self.f, self.data.test[0]), sample_shape=(4000,))["log_w"]
        weights = (log_w - log_w.logsumexp(0)).exp() * len(log_w)
        return (weights.var(0) / draws).sum().sqrt().item() / len(x)

    def test_agrees_with_the_exact_value(self):
        [x] = self.data.test
        for name, model in self.models.items():
            exact = model.exact_log_px(x, self.f).mean().item()
            for draws in (1000, 5000):
                found = evaluate(model, self.settings(num_samples=draws), self.data)[0]["log_px"]
                error = self.standard_error(model, draws)
                self.assertLess(error, 0.003)                 # or three of them would show nothing
                self.assertLess(abs(found - exact), 3 * error, f"{name}, {draws} draws")

    def test_bound_rises_with_draws(self):
        """E log (1/K sum w) rises with K towards log p(x) from below (Burda et al. 2016, theorem 1)."""
        [x] = self.data.test
        for model in self.models.values():
            exact = model.exact_log_px(x, self.f).mean().item()
            # As many draws in all for each K, so that the averages are comparably exact.
            found = [np.mean([evaluate(model, self.settings(num_samples=k, seed=s), self.data)[0]["log_px"]
                              for s in range(240 // k)]) for k in (1, 5, 240)]
            error = self.standard_error(model, 240)
            self.assertLess(found[0] + error, found[1])
            self.assertLess(found[1] + error, found[2])
            for bound in found:
                self.assertLess(bound, exact + 3 * error)

    def test_elbo_is_a_bound_and_the_mean_log_weight(self):
        [x] = self.data.test
        torch.manual_seed(1)
        for model in self.models.values():
            metrics, _ = evaluate(model, self.settings(num_samples=2000), self.data)
            with torch.no_grad():
                log_w = model(x, common.on_device(self.f, self.data.test[0]), sample_shape=(2000,))["log_w"].mean(1)
            error = log_w.std().item() / len(log_w)**0.5
            self.assertLess(abs(metrics["elbo"] - log_w.mean().item()), 4 * error * 2**0.5)
            self.assertLess(metrics["elbo"], metrics["log_px"])
            self.assertAlmostEqual(metrics["elbo"], -metrics["reconstruction"] - metrics["kl_1"] - metrics["kl_2"], 9)

    def test_chunks_change_nothing_but_the_draws(self):
        """However many draws and images go at once, the estimate is of the same thing."""
        model, f = self.models["untrained"], self.settings(num_samples=1000)
        x = self.data.test[0][:60]
        data = common.dataclasses.replace(self.data, test=(x,))
        exact = model.exact_log_px(x, self.f).mean().item()
        for room in (48 * 70, 48 * 300, 48 * 7000):           # 70 draws of an image at a time; 300; 7 images' draws
            with mock.patch.dict(common.CHUNK_BYTES, cpu=room):
                found, examples = evaluate(model, f, data)
            self.assertEqual(examples["log_px"].shape, (60,))
            self.assertEqual(examples["unit_kl_2"].shape, (60, 2))
            self.assertLess(abs(found["log_px"] - exact), 3 * self.standard_error(model, 1000) * 5**0.5)

    def test_zero_samples_leave_it_out(self):
        metrics, examples = evaluate(self.models["trained"], self.settings(num_samples=0), self.data)
        self.assertNotIn("log_px", metrics)
        self.assertNotIn("log_px", examples)
        self.assertTrue(math.isfinite(metrics["elbo"]))

    def test_same_numbers_twice_and_whoever_came_before(self):
        model, f = self.models["trained"], self.settings(num_samples=10)
        once = evaluate(model, f, self.data)
        evaluate(self.models["untrained"], f, self.data)
        again = evaluate(model, f, self.data)
        self.assertEqual(once[0], again[0])
        for name in once[1]:
            np.testing.assert_array_equal(once[1][name], again[1][name])


class Metrics(unittest.TestCase):
    """A model without randomness, whose KLs and means are chosen: every metric can be counted by hand."""

    def test_by_hand(self):
        n = 1000
        x = torch.linspace(0, 1, n, dtype=torch.float64)[:, None]
        wave = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0).double()

        class Chosen(nn.Module):
            def forward(self, x, f, sample_shape=()):
                rows = (x[:, 0] * (n - 1)).round().long()
                # Three units: KL 0.5 for all; 0.02 for a tenth of the examples; 0.
                kl = torch.stack([torch.full((n,), 0.5), torch.where(torch.arange(n) < n // 10, 0.02, 0.0),
                                  torch.zeros(n)], dim=1).double()[rows]
                # Their means' standard deviations: 1, 0.099 (variance below 0.01), 0.101 (above).
                mean = (wave[:, None] * torch.tensor([1.0, 0.099, 0.101]))[rows]
                log_px_z = torch.full((*sample_shape, len(x)), -7.0).double()
                return {"log_px_z": log_px_z, "kl": kl, "mean": mean, "log_w": log_px_z}

        data = common.Data("chosen", (x,), (x,), None, None)
        f = small.Flags(num_samples=8)
        metrics, examples = evaluate(Chosen(), f, data)
        expected = dict(log_px=-7, elbo=-7 - 0.502, reconstruction=7, kl=0.502, AU=2, AU_kl=1, active_share=1.1 / 3)
        self.assertEqual(list(metrics), list(expected))
        for name, value in expected.items():
            self.assertAlmostEqual(metrics[name], value, places=6, msg=name)
        self.assertEqual(examples["unit_kl"].shape, (n, 3))

    def test_collapse_curve_by_its_definition(self):
        kl = np.random.default_rng(0).gamma(0.3, 0.2, (400, 12))
        kl[:, 3] = 0
        kl[:, 4] = 0.1                                        # on the grid of epsilons: P[KL < 0.1] is 0
        epsilon = np.array([0, 1e-6, 1e-3, 0.05, 0.1, 0.2, 1, 10])
        for delta in (0.05, 0.5, 0.0025):
            expected = [np.mean([(kl[:, i] < e).mean() >= 1 - delta - 1e-12 for i in range(12)]) for e in epsilon]
            np.testing.assert_allclose(common.collapse_curve(kl, epsilon, delta), expected)
        self.assertEqual(common.collapse_curve(kl, epsilon)[-1], 1)


class Densities(unittest.TestCase):
    def test_log_normal(self):
        random = torch.Generator().manual_seed(0)
        x, mean = torch.rand(5, 784, generator=random).double(), torch.randn(3, 5, 784, generator=random).double()
        std = torch.tensor(0.37).double()
        torch.testing.assert_close(common.log_normal(x, mean, std), Independent(Normal(mean, std), 1).log_prob(x))

    def test_log_normal_in_float32(self):
        """Within 1e-4 nats of float64, at MNIST's size and the smallest published std."""
        random = torch.Generator().manual_seed(0)
        x, mean = torch.rand(5, 784, generator=random), torch.rand(9, 5, 784, generator=random)
        exact = Independent(Normal(mean.double(), torch.tensor(0.25).double()), 1).log_prob(x.double())
        found = common.log_normal(x, mean, torch.tensor(0.25))
        self.assertLess((found - exact).abs().max().item(), 1e-6 * exact.abs().max().item())

    def test_std_head(self):
        prior = torch.tensor(0.5)
        raw = torch.tensor([-1e4, -3.0, 0.0, 2.0, 1e4])
        std = common.std_head(raw, prior)
        self.assertAlmostEqual(std[2].item(), 0.5, places=6)
        self.assertTrue((std > 0).all() and (std.diff() > 0).all())
        self.assertAlmostEqual(std[1].item(), 0.5 * math.log1p(math.exp(-3)) / math.log(2), places=6)


if __name__ == "__main__":
    unittest.main()
