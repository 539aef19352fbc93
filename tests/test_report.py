"""Evaluation: the importance-sampling estimator against exact log-likelihoods, the metrics against their definitions."""
import contextlib
import dataclasses
import io
import math
import os
import subprocess
import sys
import textwrap
import unittest
from unittest import mock

import numpy as np
import torch
from torch import nn

import common
import datasets
import report
import training
import MNIST_HVAE_Relu
from tests import small


def evaluate(model, f, data):
    with mock.patch("sys.stderr"):
        return report.evaluate(model.eval(), f, data)


class Memory(unittest.TestCase):
    def test_halves_where_there_is_not_enough(self):
        """From the chunk on that is too large, with as many draws of each example: the numbers of an evaluation in such chunks."""
        data, f = small.gaussian_data(64, 40), small.Flags(device="cpu", num_samples=30)
        model, limit = training.build(small.LinearHVAE, f, data).eval(), 2**20
        forward = model.forward

        def limited(x, f, sample_shape):
            if len(x) * sample_shape[0] > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(x, f, sample_shape=sample_shape)
        model.forward = limited
        row = 6 * 8                                       # bytes: 1 example of width 6, in float64
        for chunk, limit in ((300, 150), (300, 100), (24, 12), (1000, 600)):          # images by images, and draws by draws
            fits = chunk
            while fits > limit:
                fits //= 2
            with mock.patch.dict(report.CHUNK_BYTES, cpu=chunk * row), contextlib.redirect_stderr(io.StringIO()) as err:
                halved = report.evaluate(model, f, data)[0]
            self.assertEqual(err.getvalue().count("not enough memory: evaluated in halves"), round(math.log2(chunk / fits)))
            with mock.patch.dict(report.CHUNK_BYTES, cpu=fits * row), mock.patch("sys.stderr"):
                self.assertEqual(report.evaluate(model, f, data)[0], halved)
        limit = 0
        with self.assertRaises(torch.OutOfMemoryError):
            evaluate(model, f, data)


class ImportanceSampling(unittest.TestCase):
    """A linear HVAE, whose log p(x) is known: x ~ N(0, U1 (eta_enc^2 U2 U2' + eta_dec^2 I) U1' + eta_dec^2 I)."""

    @classmethod
    def setUpClass(cls):
        cls.data = small.gaussian_data(2048, 300)
        cls.f = small.Flags(device="cpu", eta_enc=0.8, eta_dec=0.6, num_epochs=20, lr=1e-2, grad_clip=10.0)
        with mock.patch("sys.stderr"):
            [(trained, _)] = training.train_group(small.LinearHVAE, [cls.f], cls.data)
        # Weights so small that the untrained q is not far from the posterior: else a thousand draws are too few, and
        # the bias of a logarithm's estimate is larger than its standard error.
        untrained = training.build(small.LinearHVAE, cls.f, cls.data).eval()
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
            with mock.patch.dict(report.CHUNK_BYTES, cpu=room):
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


class Precision(unittest.TestCase):
    def test_bf16_products_leave_the_estimate_where_it_is(self):
        """log p(x) of the main job's model within 0.05 nats of what float32 products give, on this processor."""
        self.addCleanup(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        data, f = small.digit_data(64, 64, torch.float32), MNIST_HVAE_Relu.Flags(device="cpu", num_samples=200)
        model, used, found = training.build(MNIST_HVAE_Relu.HVAE, f, data), [], []
        forward = model.forward
        model.forward = lambda *args, **more: used.append(torch.get_float32_matmul_precision()) or forward(*args, **more)
        for matmul in ("bf16", "float32"):
            found.append(evaluate(model, dataclasses.replace(f, matmul=matmul), data)[0]["log_px"])
        self.assertAlmostEqual(*found, delta=0.05)
        self.assertEqual(list(dict.fromkeys(used)), ["medium", "highest"])


class Interface(small.InFolder):
    def test_a_model_of_nothing_but_what_the_docstring_asks_for(self):
        """A nineteenth script, written from report.py's docstring: a table, a result, curves and weights."""
        (self.folder / "MNIST_VAE_Tanh.py").write_text(textwrap.dedent('''
            """A VAE with a tanh layer: how beta collapses its units."""
            from dataclasses import dataclass

            import torch
            from torch import nn
            from torch.distributions import Normal, kl_divergence

            import common
            import datasets
            import report
            import training


            @dataclass
            class Flags(common.TrainFlags):
                beta: float = common.scalar(1.0, "weight of the KL", low=0)


            class VAE(nn.Module):
                def __init__(self, f):
                    super().__init__()
                    self.x_to_z, self.z_to_x = nn.Linear(784, 6), nn.Linear(3, 784)

                def forward(self, x, f, sample_shape=()):
                    mean, raw_std = self.x_to_z(x).chunk(2, dim=-1)
                    one = torch.ones_like(f.beta)
                    q_z, p_z = Normal(mean.tanh(), common.std_head(raw_std, one)), Normal(0 * one, one)
                    z = q_z.rsample(sample_shape)
                    terms = {"log_px_z": common.log_normal(x, self.z_to_x(z), one), "kl": kl_divergence(q_z, p_z)}
                    if not self.training:
                        terms["log_w"] = terms["log_px_z"] + (p_z.log_prob(z) - q_z.log_prob(z)).sum(-1)
                        terms["mean"] = q_z.mean
                    return terms

                def loss(self, terms, f):
                    return -terms["log_px_z"] + f.beta * terms["kl"].sum(-1)


            def main(argv=None):
                settings = common.parse_flags(Flags, argv)
                data = datasets.load_mnist(settings)
                models = training.fit(VAE, settings, data)
                return report.report(models, settings, data)


            if __name__ == "__main__":
                common.run(main)
            '''))
        small.write_mnist(self.folder / "data")
        ended = subprocess.run([sys.executable, "MNIST_VAE_Tanh.py", "--beta", "0.5,50", "--num_epochs", "20", "--num_samples", "20",
                                "--device", "cpu", "--lr", "0.01"], cwd=self.folder, capture_output=True, text=True, timeout=120,
                               env=os.environ | {"PYTHONPATH": str(small.ROOT), "OMP_NUM_THREADS": "1"})
        self.assertEqual(ended.returncode, 0, ended.stderr)
        names, *rows = (line.split() for line in ended.stdout.strip().split("\n")[1:])
        self.assertEqual(names, ["beta", "log_px", "elbo", "reconstruction", "kl", "AU", "AU_kl", "active_share"])
        self.assertEqual([row[0] for row in rows], ["0.5", "50.0"])
        light, heavy = (float(row[names.index("kl")]) for row in rows)
        self.assertGreater(light, 10 * heavy)
        for run in ("beta=0.5", "beta=50.0"):
            [folder] = self.folder.glob(f"runs/MNIST_VAE_Tanh/{run},*")
            self.assertEqual({path.name for path in folder.iterdir()},
                             {"result.json", "training.json", "model.pt", "units.npz", "collapse.png", "training.png"})


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

        data = datasets.Data("chosen", (x,), (x,), None, None)
        f = small.Flags(num_samples=8)
        metrics, examples = evaluate(Chosen(), f, data)
        expected = dict(log_px=-7, elbo=-7 - 0.502, reconstruction=7, kl=0.502, AU=2, AU_kl=1, active_share=1.1 / 3)
        self.assertEqual(list(metrics), list(expected))
        for name, value in expected.items():
            self.assertAlmostEqual(metrics[name], value, places=6, msg=name)
        self.assertEqual(examples["unit_kl"].shape, (n, 3))


if __name__ == "__main__":
    unittest.main()
