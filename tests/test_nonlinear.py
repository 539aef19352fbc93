"""The ReLU and CNN scripts: their models against densities and convolutions by hand, and what they share and may not."""
import contextlib
import dataclasses
import inspect
import io
import math
import tempfile
import unittest

import numpy as np
import torch

import common
import datasets
import report
import theory
import training
import MNIST_CVAE_CNN_single_digit
import MNIST_CVAE_Relu
import MNIST_CVAE_Relu_single_digit
import MNIST_HVAE_CNN
import MNIST_HVAE_Relu
import MNIST_VAE_Relu_learnable_sigma
import MNIST_VAE_Relu_nonlearnable_sigma
import Synthetic_CVAE_Relu_correlation
from tests import small

# script: (its model, flags that are not at their default and unlike each other)
SCRIPTS = {
    MNIST_CVAE_Relu: ("CVAE", dict(beta=0.7, eta_dec=3.0, eta_enc=1.3, start_std=0.8, dim_z=3, d_hidden=9, dropout=0.3)),
    MNIST_CVAE_Relu_single_digit: ("CVAE", dict(beta=0.7, eta_dec=3.0, eta_enc=1.3, start_std=1.0, dim_z=3, d_hidden=9)),
    MNIST_CVAE_CNN_single_digit: ("CVAE", dict(beta=0.7, eta_dec=3.0, eta_enc=1.3, start_std=0.8, dim_z=3)),
    MNIST_VAE_Relu_learnable_sigma: ("VAE", dict(beta=0.7, eta_dec=3.0, c=2.0, sigma=0.6, d_1=3, d_hidden=9)),
    MNIST_VAE_Relu_nonlearnable_sigma: ("VAE", dict(beta=0.7, eta_dec=3.0, c=2.0, sigma=0.6, d_1=3, d_hidden=9)),
    MNIST_HVAE_CNN: ("HVAE", dict(beta_1=0.7, beta_2=1.2, eta_dec=3.0, eta_enc=1.3, sigma_1=1.6, d_1=3, d_2=4, d_hidden=9)),
    Synthetic_CVAE_Relu_correlation: ("CVAE", dict(beta=0.7, eta_dec=0.8, eta_enc=1.3, start_std=0.8, dim_x=5, dim_y=5, dim_z=3,
                                              d_hidden=9)),
}
CNNS = [MNIST_CVAE_CNN_single_digit, MNIST_HVAE_CNN]


def correlated(**flags):
    """The synthetic data of one setting, in float64."""
    [data] = Synthetic_CVAE_Relu_correlation.correlated([Synthetic_CVAE_Relu_correlation.Flags(device="cpu", **flags)])
    return dataclasses.replace(data, train=tuple(t.double() for t in data.train), test=tuple(t.double() for t in data.test))


def by_hand(layers, h):
    """What a network of linear, convolutional and ReLU layers makes of h, from the definition of each layer, by numpy."""
    for layer in layers:
        weight, bias = (p.detach().numpy() for p in layer.parameters()) if list(layer.parameters()) else (None, None)
        kind = type(layer).__name__
        if kind == "Linear":
            h = h @ weight.T + bias
        elif kind == "ReLU":
            h = np.maximum(h, 0)
        elif kind == "Flatten":
            h = h.reshape(len(h), -1)
        elif kind == "Unflatten":
            h = h.reshape(len(h), *layer.unflattened_size)
        else:                                             # 3x3, stride 2, a frame of one pixel
            n, _, rows, columns = h.shape
            if kind == "Conv2d":
                framed = np.pad(h, ((0, 0), (0, 0), (1, 1), (1, 1)))
                out = np.zeros((n, len(weight), (rows + 1) // 2, (columns + 1) // 2))
                for i, j in np.ndindex(out.shape[2:]):
                    out[:, :, i, j] = np.einsum("ncab,ocab->no", framed[:, :, 2 * i:2 * i + 3, 2 * j:2 * j + 3], weight)
            else:
                assert kind == "ConvTranspose2d", kind
                out = np.zeros((n, weight.shape[1], 2 * rows + 2, 2 * columns + 2))
                for i, j in np.ndindex(rows, columns):
                    out[:, :, 2 * i:2 * i + 3, 2 * j:2 * j + 3] += np.einsum("nc,coab->noab", h[:, :, i, j], weight)
                out = out[:, :, 1:-1, 1:-1]
            h = out + bias[:, None, None]
    return h


def three_quarters(images):
    """y of images (n, 1, 28, 28): upper left, upper right, lower right."""
    parts = images[:, 0, :14, :14], images[:, 0, :14, 14:], images[:, 0, 14:, 14:]
    return np.concatenate([part.reshape(len(images), 196) for part in parts], axis=1)


def log_normal(x, mean, std):
    """Summed over the last axis."""
    return (-((x - mean) / std)**2 / 2 - np.log(std) - math.log(2 * math.pi) / 2 + 0 * x).sum(-1)


class Cases(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.images = small.digit_data(60, 6)
        cls.quarters = small.as_quarters(cls.images)

    def cases(self, scripts=SCRIPTS, **other):
        """(script, model away from its start, f, f as forward sees it, data), with other flags where a script has them."""
        for script in scripts:
            name, flags = SCRIPTS[script]
            fields = [field.name for field in dataclasses.fields(script.Flags)]
            f = script.Flags(device="cpu", **flags | {flag: value for flag, value in other.items() if flag in fields})
            data = self.quarters if name == "CVAE" else self.images
            if "corr_type" in fields:
                data = correlated(num_samples=6, dim_x=5, dim_y=5, corr_type="Gaussian_noise_1_2")
            model = training.build(getattr(script, name), f, data).eval()
            random = torch.Generator().manual_seed(4)
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.3 * p.std(correction=0) * torch.randn(p.shape, generator=random, dtype=p.dtype)
            yield script, model, f, common.on_device(f, data.test[0]), data


class Models(Cases):
    @torch.no_grad()
    def test_shapes_and_ranges(self):
        for script, model, f, g, data in self.cases():
            with self.subTest(script=script.__name__):
                levels = {"_1": f.d_1, "_2": f.d_2} if script is MNIST_HVAE_CNN else {"": getattr(f, "dim_z", None) or f.d_1}
                terms = model.train()(*data.test, g)
                self.assertEqual({name: tuple(value.shape) for name, value in terms.items()},
                                 {"log_px_z": (6,)} | {f"kl{level}": (6, d) for level, d in levels.items()})
                terms = model.eval()(*data.test, g, sample_shape=(5,))
                for name in ("log_px_z", "log_w"):
                    self.assertEqual(tuple(terms[name].shape), (5, 6))
                for level, d in levels.items():
                    self.assertEqual(tuple(terms[f"kl{level}"].shape[-2:]), (6, d))
                    self.assertEqual(tuple(terms[f"mean{level}"].shape[-2:]), (6, d))
                    self.assertGreaterEqual(terms.get(f"unit_kl{level}", terms[f"kl{level}"]).min().item(), 0)
                self.assertTrue(all(value.isfinite().all() for value in terms.values()))
                # No density of a Gaussian with std eta_dec is above that of its mean.
                top = -data.test[-1].shape[1] * math.log(f.eta_dec * math.sqrt(2 * math.pi))
                self.assertLess(terms["log_px_z"].max().item(), top)
                if script is MNIST_HVAE_CNN:                          # tanh: means within the prior's unit
                    self.assertLess(terms["mean_1"].abs().max().item(), 1 / f.eta_dec)
                    self.assertLess(terms["mean_2"].abs().max().item(), 1 / f.eta_enc)
                if "VAE_Relu" in script.__name__ and "CVAE" not in script.__name__:
                    self.assertGreaterEqual(terms["mean"].min().item(), 0)        # a ReLU
                if not hasattr(model, "reconstructions"):
                    continue
                panels = model.reconstructions(*data.test, g)
                self.assertEqual({tuple(panel.shape) for panel in panels.values()}, {(6, 784)})
                torch.testing.assert_close(panels["test images"], self.images.test[0], rtol=0, atol=0)
                if hasattr(model, "samples"):
                    self.assertEqual(tuple(model.samples(7, g).shape), (7, 784))

    @torch.no_grad()
    def test_mean_log_weight_is_the_elbo(self):
        """E_q[log w] = E_q[log p(x|z)] - KL, with the KLs in closed form."""
        for script, model, f, g, data in self.cases():
            with self.subTest(script=script.__name__):
                torch.manual_seed(1)
                terms = model(*data.test, g, sample_shape=(1000,))
                differences = terms["log_w"] - terms["log_px_z"] + sum(
                    terms[f"kl{level}"].sum(-1) for level in common.levels(terms))
                error = differences.std(0) / len(differences)**0.5
                self.assertLess((differences.mean(0).abs() / error).max().item(), 4)
                self.assertLess(error.max().item(), 0.1)

    def test_starts_near_the_prior(self):
        """The std of q starts near --start_std of the prior's where the network makes it, at --sigma where it does not."""
        for script, (name, flags) in SCRIPTS.items():
            with self.subTest(script=script.__name__), torch.no_grad():
                f = script.Flags(device="cpu", **flags)
                data = {"CVAE": self.quarters}.get(name, self.images)
                if script is Synthetic_CVAE_Relu_correlation:
                    data = correlated(num_samples=6, dim_x=5, dim_y=5)
                model, g = training.build(getattr(script, name), f, data), common.on_device(f, data.test[0])
                q, start = (model.q_z2(model.q_z1(*data.test, g).mean, g), 1.3) if name == "HVAE" else \
                    (model.q_z(*data.test, g), 1.3 * f.start_std if name == "CVAE" else 0.6)
                self.assertLess((q.stddev.log() - math.log(start)).abs().mean().item(), 0.3)

    @torch.no_grad()
    def test_log_likelihood_against_quadrature(self):
        """One latent unit: log p(x), or log p(y|x), as an integral over z of densities by hand, against evaluate's."""
        eta_dec = 1.5
        for script, model, f, g, data in self.cases([script for script in SCRIPTS if script is not MNIST_HVAE_CNN],
                                                    dim_z=1, d_1=1, eta_dec=eta_dec, num_samples=4000, num_draws=4000):
            with self.subTest(script=script.__name__):
                data = dataclasses.replace(data, test=tuple(t[:3] for t in data.test))
                eta_enc = eta_dec / f.c if hasattr(f, "c") else f.eta_enc
                z = np.linspace(-9 * eta_enc, 9 * eta_enc, 1001)
                *x, y = (t.numpy() for t in data.test)
                of_z = by_hand(model.g if hasattr(model, "g") else model.g_z, z[:, None])
                of_x = by_hand(model.g_x, x[0].reshape(-1, 1, 14, 14) if script in CNNS else x[0]) if x else 0
                if script in CNNS:
                    of_x, of_z = three_quarters(of_x), three_quarters(of_z)
                log_prior = log_normal(z[:, None], 0, eta_enc)
                joint = np.stack([log_normal(row, of_z + (of_x[i] if x else 0), eta_dec) + log_prior
                                  for i, row in enumerate(y)])
                top = joint.max(1, keepdims=True)
                exact = np.log(np.exp(joint - top).sum(1) * (z[1] - z[0])) + top[:, 0]
                with contextlib.redirect_stderr(io.StringIO()):
                    _, examples = report.evaluate(model, f, data)
                torch.manual_seed(1)
                log_w = model(*data.test, g, sample_shape=(4000,))["log_w"].numpy()
                weights = np.exp(log_w - log_w.max(0))
                error = weights.std(0) / weights.mean(0) / len(weights)**0.5      # of the estimate's logarithm
                self.assertLess(error.max(), 0.05)
                self.assertLess((np.abs(examples["log_px"] - exact) / error).max(), 4)

    @torch.no_grad()
    def test_dropout_is_of_x_in_training_only(self):
        [(_, model, f, g, data)] = self.cases([MNIST_CVAE_Relu], dropout=1.0)
        x, y = data.test
        kl = lambda x, y: model(x, y, g)["kl"]
        model.train()
        torch.testing.assert_close(kl(x, y), kl(0 * x, y))
        self.assertGreater((kl(x, y) - kl(x, 0 * y)).abs().max().item(), 1e-3)
        model.eval()
        self.assertGreater((kl(x, y) - kl(0 * x, y)).abs().max().item(), 1e-3)


class Convolutions(Cases):
    @torch.no_grad()
    def test_networks_of_the_hvae(self):
        [(_, model, f, g, data)] = self.cases([MNIST_HVAE_CNN])
        [x] = data.test
        np.testing.assert_allclose(model.q_z1(x, g).mean, np.tanh(by_hand(model.x_to_z1, x.numpy().reshape(-1, 1, 28, 28))),
                                   atol=1e-12)
        z1 = torch.randn(2, 3, f.d_1, dtype=torch.float64)
        images = model.z1_to_x(z1.flatten(0, 1))
        self.assertEqual(tuple(images.shape), (6, 1, 28, 28))
        of_hand = np.tanh(by_hand(model.z1_to_x, z1.numpy().reshape(6, -1)))
        np.testing.assert_allclose(model.x_mean(z1), of_hand.reshape(2, 3, 784), atol=1e-12)

    @torch.no_grad()
    def test_encoder_of_the_cvae_sees_y_as_an_image_with_x_blanked(self):
        [(_, model, f, g, data)] = self.cases([MNIST_CVAE_CNN_single_digit])
        x, y = data.test
        blanked = self.images.test[0].clone().view(-1, 1, 28, 28)
        blanked[:, :, 14:, :14] = 0
        corner = self.images.test[0].view(-1, 1, 28, 28)[:, :, 14:, :14]
        raw = by_hand(model.f_x, corner.numpy()) + by_hand(model.f_y, blanked.numpy())
        q_z = model.q_z(x, y, g)
        np.testing.assert_allclose(q_z.mean, raw[:, :3], atol=1e-12)
        start = math.log(math.expm1(0.8 * math.log(2)))       # so that raw = 0 gives 0.8 of the prior's std
        np.testing.assert_allclose(q_z.stddev, 1.3 * np.maximum(np.log1p(np.exp(raw[:, 3:] + start)) / math.log(2), 1e-3), atol=1e-12)

    @torch.no_grad()
    def test_decoder_of_the_cvae_gives_the_right_quarters(self):
        [(_, model, f, g, data)] = self.cases([MNIST_CVAE_CNN_single_digit])
        x, y = data.test
        z = torch.randn(2, 6, f.dim_z, dtype=torch.float64)
        of_x, of_z = model.g_x(x.view(-1, 1, 14, 14)), model.g_z(z.flatten(0, 1))
        self.assertEqual([tuple(of.shape) for of in (of_x, of_z)], [(6, 1, 28, 28), (12, 1, 28, 28)])
        whole = of_x.view(6, 28, 28) + of_z.view(2, 6, 28, 28)
        for draw in range(2):
            put_together = datasets.whole_images(whole[draw, :, 14:, :14].flatten(1), model.y_mean(x, z)[draw])
            torch.testing.assert_close(put_together, whole[draw].flatten(1))

    def test_chunks_are_as_small_as_the_widest_layer_asks(self):
        """widest_layer is the largest output of a layer per example."""
        for script, model, f, g, data in self.cases(CNNS):
            with self.subTest(script=script.__name__):
                widths = []
                for module in model.modules():
                    module.register_forward_hook(lambda _, inputs, out: widths.append(
                        out[0].numel() if torch.is_tensor(out) else 0))
                model(*data.test, g)
                self.assertEqual(model.widest_layer, max(widths))


class Twins(unittest.TestCase):
    def source(self, thing):
        return inspect.getsource(thing)

    def test_equal_classes(self):
        self.assertEqual(self.source(MNIST_CVAE_Relu.CVAE), self.source(MNIST_CVAE_Relu_single_digit.CVAE))

    def test_equal_but_for_one_thing(self):
        """Each pair differs in the methods named and in no other."""
        for one, other, differ in (
                (MNIST_VAE_Relu_learnable_sigma.VAE, MNIST_VAE_Relu_nonlearnable_sigma.VAE,
                 {"__init__", "q_z", "linear_optimum", "unexplained"}),
                (MNIST_HVAE_Relu.HVAE, MNIST_HVAE_CNN.HVAE, {"__init__", "q_z1", "x_mean"}),
                (MNIST_CVAE_Relu.CVAE, MNIST_CVAE_CNN_single_digit.CVAE, {"__init__", "q_z", "y_mean", "forward", "unexplained"}),
                (MNIST_CVAE_Relu.CVAE, Synthetic_CVAE_Relu_correlation.CVAE,
                 {"__init__", "forward", "linear_optimum", "reconstructions", "unexplained", "y_mean"})):
            sources = [{name: self.source(method) for name, method in inspect.getmembers(cls, inspect.isfunction)
                        if method.__module__ == cls.__module__} for cls in (one, other)]
            names = set(sources[0]) | set(sources[1])
            self.assertEqual({name for name in names if sources[0].get(name) != sources[1].get(name)}, differ)

    def test_the_same_flags(self):
        """Of twins the flags, their ranges and their help are the same; defaults are the scripts' own."""
        def flags(script):
            return {field.name: (field.type, dict(field.metadata)) for field in dataclasses.fields(script.Flags)}
        one, other = flags(MNIST_CVAE_Relu), flags(MNIST_CVAE_Relu_single_digit)
        self.assertEqual(other.pop("digit")[1]["high"], 9)
        self.assertEqual(one, other)


class Training(unittest.TestCase):
    def test_row_of_a_grid_like_alone(self):
        """With dropout, and of convolutions, as a batched model: as if each setting were alone."""
        images = small.digit_data(40, 4)
        cases = [(MNIST_CVAE_Relu, small.as_quarters(images), "beta"), (MNIST_HVAE_CNN, images, "beta_1"),
                 (MNIST_CVAE_CNN_single_digit, small.as_quarters(images), "beta")]
        for script, data, flag in cases:
            with self.subTest(script=script.__name__), contextlib.redirect_stderr(io.StringIO()):
                name, flags = SCRIPTS[script]
                group = [script.Flags(device="cpu", num_epochs=3, batch_size=16, **flags | {flag: value, "eta_dec": 0.5})
                         for value in (0.3, 2.0)]
                together = training.train_group(getattr(script, name), group, data)
                for f, (model, trained) in zip(group, together):
                    [(alone, curves)] = training.train_group(getattr(script, name), [f], data)
                    for key, value in alone.state_dict().items():
                        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-9, atol=1e-11)
                    np.testing.assert_allclose(trained["curves"]["loss"], curves["curves"]["loss"], rtol=1e-9)
                self.assertNotEqual(*(trained["curves"]["loss"] for _, trained in together))


class LinearTwin(unittest.TestCase):
    """What the closed form of the linear model says beside a nonlinear one."""

    def test_of_a_cvae_from_its_data_by_hand(self):
        """Theorem 2 from E by least squares: the KL of unit i is log(theta_i / (beta eta_dec^2)) / 2 where that is positive."""
        images = small.digit_data(300, 6)
        images.train[0].add_(0.02 * torch.randn(300, 784, generator=torch.Generator().manual_seed(5)))    # of full rank
        data = small.as_quarters(images)
        x, y = (t.numpy() for t in data.train)
        left = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
        theta = np.sort(np.linalg.eigvalsh(left.T @ left / len(y)))[::-1]
        for script in (MNIST_CVAE_Relu, MNIST_CVAE_Relu_single_digit, MNIST_CVAE_CNN_single_digit):
            for released, level in ((False, 0.7 * 0.6**2), (True, 0.7 / 2 * 0.6**2)):
                f = script.Flags(beta=0.7, eta_dec=0.6, eta_enc=1.3, dim_z=12, released_objective=released)
                predicted = script.CVAE.linear_optimum(f, data)
                np.testing.assert_allclose(predicted["kl"], np.maximum(np.log(theta[:12] / level), 0) / 2, atol=1e-9)
                self.assertTrue(0 < np.count_nonzero(predicted["kl"]) < 12 or released)

    def test_of_a_vae_and_an_hvae(self):
        """Their optimal loss is that of brute force over the modes (tests/test_theory.py); here that each gets its own flags."""
        data = small.digit_data(100, 4)
        theta = theory.spectrum(theory.second_moment(*data.train)).sqrt()
        flags = dict(beta=0.7, eta_dec=0.6, c=2.0, sigma=0.4, d_1=5)
        found = MNIST_VAE_Relu_learnable_sigma.VAE.linear_optimum(MNIST_VAE_Relu_learnable_sigma.Flags(**flags), data)
        np.testing.assert_allclose(found["kl"], (theta[:5] / (0.7**0.5 * 0.6)).log().clamp(min=0), rtol=1e-9)
        found = MNIST_VAE_Relu_nonlearnable_sigma.VAE.linear_optimum(MNIST_VAE_Relu_nonlearnable_sigma.Flags(**flags), data)
        k = 0.7**0.5 * 2                                  # sqrt(beta) eta_dec / eta_enc
        lambda_ = (0.4 * (theta[:5] - k * 0.4).clamp(min=0) / k).sqrt()
        np.testing.assert_allclose(found["lambda"], lambda_, rtol=1e-6)
        for script in (MNIST_HVAE_Relu, MNIST_HVAE_CNN):
            f = script.Flags(beta_1=0.7, beta_2=1.2, eta_dec=0.6, eta_enc=1.3, sigma_1=0.8, d_1=5, d_2=4)
            found = script.HVAE.linear_optimum(f, data)
            m, b = (0.8**2 * theta[:4]**2 / (1.2 * 0.6**2)).clamp(min=0.8**2), 1.2 / 0.7 * 0.6**2      # 0.8^2 > b
            np.testing.assert_allclose(found["kl_2"], (m / b).log().clamp(min=0) / 2, rtol=1e-9)
            self.assertEqual((len(found["kl_1"]), len(found["kl_2"])), (5, 4))

    def test_of_no_weight(self):
        data = small.as_quarters(small.digit_data(30, 4))
        self.assertIsNone(MNIST_CVAE_Relu.CVAE.linear_optimum(MNIST_CVAE_Relu.Flags(beta=0.0), data))

    def results(self, kls, AUs):
        """Results of as many settings, each (predicted, trained); predicted active units carry 1 nat."""
        return [{"settings": {"beta": k, "seed": 0}, "metrics": {"kl": kl, "AU": AU, "AU_kl": AU},
                 "linear": {"kl": [of_linear / 2, of_linear / 2], "information": [1.0] * active + [0.005] * 2}}
                for k, ((of_linear, kl), (active, AU)) in enumerate(zip(kls, AUs))]

    def test_rank_correlation(self):
        """Spearman's: Pearson's of ranks, ties at their mean rank. Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: 4.5 / sqrt(4.5 * 5)."""
        found = theory.linear_correlations(self.results([(1, 10), (2, 30), (2, 20), (7, 31)], [(1, 4), (2, 3), (3, 2), (4, 1)]))
        self.assertAlmostEqual(found["kl"], 4.5 / math.sqrt(4.5 * 5), places=12)
        self.assertAlmostEqual(found["AU"], -1, places=12)

    def test_rank_correlation_of_a_constant_is_left_out(self):
        """KLs' ranks 1, 2, 3 and 2, 1, 3, of differences 1, 1, 0: 1 - 6 * 2 / 24."""
        results = self.results([(1, 2), (2, 1), (3, 3)], [(5, 4), (5, 3), (5, 2)])
        self.assertEqual(list(theory.linear_correlations(results)), ["kl"])
        self.assertEqual(theory.correlations_in_words(results), "kl 0.50")
        self.assertEqual(theory.correlations_in_words(self.results([(1, 0), (2, 0), (3, 0)], [(1, 0), (1, 0), (2, 0)])), "none")

    def test_two_settings_or_seeds_of_one_are_not_ranked(self):
        results = self.results([(1, 1), (2, 2), (3, 3)], [(1, 1), (2, 2), (3, 3)])
        self.assertEqual(set(theory.linear_correlations(results)), {"kl", "AU", "AU_kl"})
        self.assertEqual(theory.linear_correlations(results[:2]), {})
        for seed, result in enumerate(results):
            result["settings"] = {"beta": 1.0, "seed": seed}
        self.assertEqual(theory.linear_correlations(results), {})


class Synthetic(unittest.TestCase):
    def test_correlation(self):
        """y ~ N(0, I), x = rho y + sqrt(1 - rho^2) noise: second moments I, I and rho I, within four standard errors."""
        n = 4000
        for corr_type, rho in (("Identical", 1), ("Gaussian_noise_1_2", 1 / 2), ("Gaussian_noise_1_4", 1 / 4),
                               ("Gaussian_noise_1_8", 1 / 8), ("Random", 0)):
            data = correlated(corr_type=corr_type, num_samples=n, dim_x=20, dim_y=20)
            for x, y in (data.train, data.test):
                self.assertEqual((tuple(x.shape), tuple(y.shape)), ((n, 20), (n, 20)))
                for moment, expected in ((x.T @ x / n, 1), (y.T @ y / n, 1), (y.T @ x / n, rho)):
                    self.assertLess((moment - expected * torch.eye(20)).abs().max().item(), 4.5 * (2 / n)**0.5)
            self.assertLess((data.train[1].T @ data.test[1] / n).abs().max().item(), 4.5 / n**0.5)     # fresh
            self.assertTrue(torch.equal(*data.train) == (rho == 1))

    def test_shared_where_settings_share_it(self):
        Flags = Synthetic_CVAE_Relu_correlation.Flags
        a, b, other, seed = Synthetic_CVAE_Relu_correlation.correlated(
            [Flags(device="cpu", **flags) for flags in ({}, {"beta": 2.0}, {"corr_type": "Random"}, {"seed": 1})])
        self.assertIs(a, b)
        self.assertTrue(torch.equal(a.train[1], other.train[1]))          # the same y, for every correlation
        self.assertFalse(torch.equal(a.train[1], seed.train[1]))

    def test_identical_is_predicted_to_collapse(self):
        """x = y leaves nothing: E = 0. The less x tells, the more information."""
        kls = []
        for corr_type in Synthetic_CVAE_Relu_correlation.RHO:
            f = Synthetic_CVAE_Relu_correlation.Flags(corr_type=corr_type, dim_x=20, dim_y=20, dim_z=20)
            predicted = Synthetic_CVAE_Relu_correlation.CVAE.linear_optimum(f, correlated(
                corr_type=corr_type, dim_x=20, dim_y=20))
            kls.append(predicted["kl"].sum().item())
        self.assertEqual(kls[0], 0)
        self.assertEqual(kls, sorted(kls))
        # E is (1 - rho^2) I but for sampling, so that each unit carries log((1 - rho^2) / eta_dec^2) / 2.
        for kl, rho in list(zip(kls, (1, 1 / 2, 1 / 4, 1 / 8, 0)))[1:]:
            self.assertAlmostEqual(kl / 20, math.log((1 - rho**2) / 0.25) / 2, delta=0.03)

    def test_from_its_command_line(self):
        with tempfile.TemporaryDirectory() as folder:
            argv = ["--dim_x", 4, "--dim_y", 4, "--dim_z", 3, "--d_hidden", 5, "--num_samples", 40, "--num_epochs", 2,
                    "--device", "cpu", "--out_dir", folder]
            status, out, err = small.call(Synthetic_CVAE_Relu_correlation.main, *argv, "--num_draws", "0",
                                          "--corr_type", "Identical,Random,Gaussian_noise_1_2")
            self.assertEqual(status, 0, err)
            self.assertNotIn("log_px", out)
            self.assertIn("40 training and 40 test examples", out)
            names = out.strip().split("\n")[1].split()
            self.assertEqual(names[0], "corr_type")
            self.assertEqual(names[1:7], ["elbo", "reconstruction", "kl", "AU", "AU_kl", "active_share"])
            self.assertEqual([name + "_train" for name in names[1:7]] + ["headroom"], names[7:])
            self.assertIn("rank correlation of predicted and trained over 3 settings: kl ", out)
            status, out, err = small.call(Synthetic_CVAE_Relu_correlation.main, *argv, "--num_draws", "0", "--seed", "0,1,2")
            self.assertEqual(status, 0, err)
            self.assertIn("linear kl", out)
            self.assertNotIn("rank correlation", out)     # of one setting there is nothing to rank
            status, out, err = small.call(Synthetic_CVAE_Relu_correlation.main, *argv, "--dim_x", "3")
            self.assertEqual((status, out), (2, ""))
            self.assertIn("--dim_x: got 3, wants --dim_y = 4", err)
            status, out, err = small.call(Synthetic_CVAE_Relu_correlation.main, *argv, "--corr_type", "Gaussian_noise_1_3")
            self.assertEqual(status, 2)
            self.assertIn("--corr_type: got 'Gaussian_noise_1_3', wants one of Identical, ", err)


if __name__ == "__main__":
    unittest.main()
