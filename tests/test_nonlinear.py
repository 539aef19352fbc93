"""The ReLU, CNN and Bernoulli scripts: their models beside densities by hand, and twins."""
import contextlib
import dataclasses
import inspect
import io
import math
import tempfile
import unittest
from types import SimpleNamespace
from unittest import mock

import common
import numpy as np
import torch

import datasets
import headroom
import report
import theory
import training
import verify
import MNIST_CVAE_CNN_single_digit
import MNIST_CVAE_Relu
import MNIST_CVAE_Relu_single_digit
import MNIST_HVAE_CNN
import MNIST_HVAE_Relu
import MNIST_VAE_Bernoulli
import MNIST_VAE_Relu_learnable_sigma
import MNIST_VAE_Relu_nonlearnable_sigma
import Synthetic_CVAE_Relu_correlation
from tests import small

# {script: (its model, flags that are not at their default and unlike each other)}
SCRIPTS = {
    MNIST_CVAE_Relu: (
        "CVAE",
        dict(beta=0.7, eta_dec=3.0, eta_enc=1.3, start_std=0.8, dim_z=3, d_hidden=9, dropout=0.3),
    ),
    MNIST_CVAE_Relu_single_digit: (
        "CVAE", dict(beta=0.7, eta_dec=3.0, eta_enc=1.3, start_std=1.0, dim_z=3, d_hidden=9)
    ),
    MNIST_CVAE_CNN_single_digit: (
        "CVAE", dict(beta=0.7, eta_dec=3.0, eta_enc=1.3, start_std=0.8, dim_z=3)
    ),
    MNIST_VAE_Relu_learnable_sigma: (
        "VAE", dict(beta=0.7, eta_dec=3.0, c=2.0, sigma=0.6, d_1=3, d_hidden=9)
    ),
    MNIST_VAE_Relu_nonlearnable_sigma: (
        "VAE", dict(beta=0.7, eta_dec=3.0, c=2.0, sigma=0.6, d_1=3, d_hidden=9)
    ),
    MNIST_VAE_Bernoulli: ("VAE", dict(beta=0.7, start_std=0.8, d_1=3, d_hidden=9)),
    MNIST_HVAE_CNN: (
        "HVAE",
        dict(
            beta_1=0.7,
            beta_2=1.2,
            eta_dec=3.0,
            eta_enc=1.3,
            sigma_1=1.6,
            d_1=3,
            d_2=4,
            d_hidden=9,
        ),
    ),
    Synthetic_CVAE_Relu_correlation: (
        "CVAE",
        dict(
            beta=0.7,
            eta_dec=0.8,
            eta_enc=1.3,
            start_std=0.8,
            dim_x=5,
            dim_y=5,
            dim_z=3,
            d_hidden=9,
        ),
    ),
}
CNNS = [MNIST_CVAE_CNN_single_digit, MNIST_HVAE_CNN]


# ------------------------------------------------------------------------------- data, by hand

def correlated(**flags):
    """The synthetic data of one setting, in float64."""
    f = Synthetic_CVAE_Relu_correlation.Flags(device="cpu", **flags)
    [data] = Synthetic_CVAE_Relu_correlation.correlated([f])
    train = tuple(t.double() for t in data.train)
    test = tuple(t.double() for t in data.test)
    return dataclasses.replace(data, train=train, test=test)


def by_hand(layers, h):
    """The output of linear, convolutional and ReLU layers for h, by the definition of each layer.

    All is computed by numpy.
    """
    for layer in layers:
        kind = type(layer).__name__
        if kind == "ReLU":
            h = np.maximum(h, 0)
        elif kind == "Flatten":
            h = h.reshape(len(h), -1)
        elif kind == "Unflatten":
            h = h.reshape(len(h), *layer.unflattened_size)
        else:
            weight, bias = (p.detach().numpy() for p in layer.parameters())
            if kind == "Linear":
                h = h @ weight.T + bias
            elif kind == "Conv2d":
                h = convolution(h, weight) + bias[:, None, None]
            else:
                assert kind == "ConvTranspose2d", kind
                h = transposed_convolution(h, weight) + bias[:, None, None]
    return h


def convolution(h, weight):
    """A convolution 3x3 of stride 2 with a frame of one pixel, without its bias."""
    n, _, rows, columns = h.shape
    framed = np.pad(h, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((n, len(weight), (rows + 1) // 2, (columns + 1) // 2))
    for i, j in np.ndindex(out.shape[2:]):
        patch = framed[:, :, 2 * i:2 * i + 3, 2 * j:2 * j + 3]
        out[:, :, i, j] = np.einsum("ncab,ocab->no", patch, weight)
    return out


def transposed_convolution(h, weight):
    """The transpose of `convolution`, onto twice as many rows and columns."""
    n, _, rows, columns = h.shape
    out = np.zeros((n, weight.shape[1], 2 * rows + 2, 2 * columns + 2))
    for i, j in np.ndindex(rows, columns):
        patch = np.einsum("nc,coab->noab", h[:, :, i, j], weight)
        out[:, :, 2 * i:2 * i + 3, 2 * j:2 * j + 3] += patch
    return out[:, :, 1:-1, 1:-1]


def three_quarters(images):
    """y of images (n, 1, 28, 28): upper left, upper right, lower right."""
    parts = images[:, 0, :14, :14], images[:, 0, :14, 14:], images[:, 0, 14:, 14:]
    return np.concatenate([part.reshape(len(images), 196) for part in parts], axis=1)


def as_binary(data, share=0.5):
    """Images whose pixels are 1.0 where they exceed this grey value, and 0.0 elsewhere."""
    def binary(tensors):
        return tuple((t > share).to(t.dtype) for t in tensors)

    return dataclasses.replace(data, train=binary(data.train), test=binary(data.test))


def log_normal(x, mean, std):
    """log N(x; mean, std^2), summed over the last axis."""
    log_densities = -((x - mean) / std)**2 / 2 - np.log(std) - math.log(2 * math.pi) / 2
    return log_densities.sum(-1)


def log_bernoulli(x, logits):
    """log p(x) of binary x, summed over the last axis, from the probability of each pixel."""
    p = 1 / (1 + np.exp(-logits))
    return np.log(np.where(x == 1, p, 1 - p)).sum(-1)


# ----------------------------------------------------------------------------------- the models

class Cases(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.images = small.digit_data(60, 6)
        cls.quarters = small.as_quarters(cls.images)
        cls.binary = as_binary(cls.images)

    def data_of(self, script):
        """The images as a script reads them. The synthetic data are not among them."""
        if script is MNIST_VAE_Bernoulli:
            return self.binary
        name, _ = SCRIPTS[script]
        return self.quarters if name == "CVAE" else self.images

    def cases(self, scripts=SCRIPTS, **other_flags):
        """Yield a ModelCase for each script, with other_flags where the script has them."""
        for script in scripts:
            name, flags = SCRIPTS[script]
            flags = dict(flags)
            fields = [field.name for field in dataclasses.fields(script.Flags)]
            for flag, value in other_flags.items():
                if flag in fields:
                    flags[flag] = value
            f = script.Flags(device="cpu", **flags)

            data = self.data_of(script)
            if "corr_type" in fields:
                data = correlated(num_samples=6, dim_x=5, dim_y=5, corr_type="Gaussian_noise_1_2")
            model = training.build(getattr(script, name), f, data).eval()
            random = torch.Generator().manual_seed(4)
            with torch.no_grad():
                for p in model.parameters():
                    noise = torch.randn(p.shape, generator=random, dtype=p.dtype)
                    p += 0.3 * p.std(correction=0) * noise
            yield small.ModelCase(script, model, f, common.on_device(f, data.test[0]), data)


class Models(Cases):
    @torch.no_grad()
    def test_shapes_and_ranges(self):
        for case in self.cases():
            with self.subTest(script=case.script.__name__):
                self.check_training_terms(case)
                terms = self.check_evaluation_terms(case)
                self.check_ranges(case, terms)
                self.check_pictures(case)

    def units(self, case):
        """The number of units of each level."""
        if case.script is MNIST_HVAE_CNN:
            return {"_1": case.f.d_1, "_2": case.f.d_2}
        if hasattr(case.f, "dim_z"):
            return {"": case.f.dim_z}
        return {"": case.f.d_1}

    def check_training_terms(self, case):
        terms = case.model.train()(*case.data.test, case.scalars)
        shapes = {name: tuple(value.shape) for name, value in terms.items()}
        expected = {"log_px_z": (6,)}
        for level, d in self.units(case).items():
            expected[f"kl{level}"] = (6, d)
        self.assertEqual(shapes, expected)

    def check_evaluation_terms(self, case):
        """Check the shapes of the terms with five draws, which are returned."""
        terms = case.model.eval()(*case.data.test, case.scalars, sample_shape=(5,))
        for name in ("log_px_z", "log_w"):
            self.assertEqual(tuple(terms[name].shape), (5, 6))
        for level, d in self.units(case).items():
            self.assertEqual(tuple(terms[f"kl{level}"].shape[-2:]), (6, d))
            self.assertEqual(tuple(terms[f"mean{level}"].shape[-2:]), (6, d))
        return terms

    def check_ranges(self, case, terms):
        f, script = case.f, case.script
        for name, value in terms.items():
            self.assertTrue(value.isfinite().all(), name)
        for level in self.units(case):
            unit_kl = terms.get(f"unit_kl{level}", terms[f"kl{level}"])
            self.assertGreaterEqual(unit_kl.min().item(), 0)

        # The density of a Gaussian with the std eta_dec is largest at its mean. The probability of
        # binary pixels is at most 1.
        largest = 0
        if hasattr(f, "eta_dec"):
            largest = -case.data.test[-1].shape[1] * math.log(f.eta_dec * math.sqrt(2 * math.pi))
        self.assertLess(terms["log_px_z"].max().item(), largest)

        # The means of the HVAE come from a tanh, those of the VAEs from a ReLU.
        if script is MNIST_HVAE_CNN:
            self.assertLess(terms["mean_1"].abs().max().item(), 1 / f.eta_dec)
            self.assertLess(terms["mean_2"].abs().max().item(), 1 / f.eta_enc)
        if "VAE_Relu" in script.__name__ and "CVAE" not in script.__name__:
            self.assertGreaterEqual(terms["mean"].min().item(), 0)

    def check_pictures(self, case):
        if not hasattr(case.model, "reconstructions"):
            return
        panels = case.model.reconstructions(*case.data.test, case.scalars)
        self.assertEqual({tuple(panel.shape) for panel in panels.values()}, {(6, 784)})
        images = self.binary if case.script is MNIST_VAE_Bernoulli else self.images
        torch.testing.assert_close(panels["test images"], images.test[0], rtol=0, atol=0)
        if hasattr(case.model, "samples"):
            self.assertEqual(tuple(case.model.samples(7, case.scalars).shape), (7, 784))

    @torch.no_grad()
    def test_mean_log_weight_is_the_elbo(self):
        """E_q[log w] = E_q[log p(x|z)] - KL, with the KLs in closed form."""
        for case in self.cases():
            with self.subTest(script=case.script.__name__):
                torch.manual_seed(1)
                terms = case.model(*case.data.test, case.scalars, sample_shape=(1000,))
                kls = sum(terms[f"kl{level}"].sum(-1) for level in common.levels(terms))
                differences = terms["log_w"] - terms["log_px_z"] + kls
                error = differences.std(0) / len(differences)**0.5
                self.assertLess((differences.mean(0).abs() / error).max().item(), 4)
                self.assertLess(error.max().item(), 0.1)

    @torch.no_grad()
    def test_starts_near_the_prior(self):
        """The std of q starts near --start_std times the prior's, or at --sigma if it is fixed."""
        for script, (name, flags) in SCRIPTS.items():
            with self.subTest(script=script.__name__):
                f = script.Flags(device="cpu", **flags)
                data = self.data_of(script)
                if script is Synthetic_CVAE_Relu_correlation:
                    data = correlated(num_samples=6, dim_x=5, dim_y=5)
                model = training.build(getattr(script, name), f, data)
                scalars = common.on_device(f, data.test[0])

                if name == "HVAE":
                    start = 1.3
                    z1 = model.q_z1(*data.test, scalars).mean
                    std = model.q_z2(z1, scalars).stddev
                else:
                    start = f.sigma if hasattr(f, "sigma") else f.start_std
                    if name == "CVAE":
                        start = 1.3 * f.start_std
                    std = model.q_z(*data.test, scalars).stddev
                difference = (std.log() - math.log(start)).abs().mean().item()
                self.assertLess(difference, 0.3)

    @torch.no_grad()
    def test_log_likelihood_against_quadrature(self):
        """With one latent unit, evaluate's log p(x) is an integral over z of densities by hand.

        The same holds for log p(y|x).
        """
        scripts = [script for script in SCRIPTS if script is not MNIST_HVAE_CNN]
        flags = dict(dim_z=1, d_1=1, eta_dec=1.5, num_samples=4000, num_draws=4000)
        for case in self.cases(scripts, **flags):
            with self.subTest(script=case.script.__name__):
                # 1. The integral for three examples, and evaluate's estimate.
                three_examples = tuple(t[:3] for t in case.data.test)
                case.data = dataclasses.replace(case.data, test=three_examples)
                exact = self.log_px_by_quadrature(case)
                with contextlib.redirect_stderr(io.StringIO()):
                    _, examples = report.evaluate(case.model, case.f, case.data)

                # 2. The standard error of the estimate, which is the logarithm of a mean.
                torch.manual_seed(1)
                terms = case.model(*case.data.test, case.scalars, sample_shape=(4000,))
                log_w = terms["log_w"].numpy()
                weights = np.exp(log_w - log_w.max(0))
                error = weights.std(0) / weights.mean(0) / len(weights)**0.5
                self.assertLess(error.max(), 0.05)
                self.assertLess((np.abs(examples["log_px"] - exact) / error).max(), 4)

    def log_px_by_quadrature(self, case):
        """log p(x), or log p(y|x), of each test example. z has one unit, and eta_dec is 1.5."""
        model, f = case.model, case.f
        eta_dec = 1.5
        eta_enc = 1
        if hasattr(f, "eta_dec"):
            eta_enc = eta_dec / f.c if hasattr(f, "c") else f.eta_enc
        z = np.linspace(-9 * eta_enc, 9 * eta_enc, 1001)

        # 1. What z and x add to the mean of p(x|z), or of p(y|x,z).
        *x, y = (t.numpy() for t in case.data.test)
        from_z = by_hand(model.g if hasattr(model, "g") else model.g_z, z[:, None])
        from_x = np.zeros_like(y)
        if case.script in CNNS:
            from_z = three_quarters(from_z)
            from_x = three_quarters(by_hand(model.g_x, x[0].reshape(-1, 1, 14, 14)))
        elif x:
            from_x = by_hand(model.g_x, x[0])

        # 2. The integral over z.
        log_prior = log_normal(z[:, None], 0, eta_enc)
        log_joint = []
        for i, row in enumerate(y):
            if case.script is MNIST_VAE_Bernoulli:
                log_likelihood = log_bernoulli(row, from_z)
            else:
                log_likelihood = log_normal(row, from_z + from_x[i], eta_dec)
            log_joint.append(log_likelihood + log_prior)
        log_joint = np.stack(log_joint)
        largest = log_joint.max(1, keepdims=True)
        integral = np.exp(log_joint - largest).sum(1) * (z[1] - z[0])
        return np.log(integral) + largest[:, 0]

    @torch.no_grad()
    def test_dropout_is_of_x_in_training_only(self):
        [case] = self.cases([MNIST_CVAE_Relu], dropout=1.0)
        x, y = case.data.test
        model = case.model

        def kl(x, y):
            return model(x, y, case.scalars)["kl"]

        model.train()
        torch.testing.assert_close(kl(x, y), kl(0 * x, y))
        self.assertGreater((kl(x, y) - kl(x, 0 * y)).abs().max().item(), 1e-3)
        model.eval()
        self.assertGreater((kl(x, y) - kl(0 * x, y)).abs().max().item(), 1e-3)


class Convolutions(Cases):
    @torch.no_grad()
    def test_networks_of_the_hvae(self):
        [case] = self.cases([MNIST_HVAE_CNN])
        model = case.model
        [x] = case.data.test

        images = x.numpy().reshape(-1, 1, 28, 28)
        expected = np.tanh(by_hand(model.x_to_z1, images))
        np.testing.assert_allclose(model.q_z1(x, case.scalars).mean, expected, atol=1e-12)

        z1 = torch.randn(2, 3, case.f.d_1, dtype=torch.float64)
        images = model.z1_to_x(z1.flatten(0, 1))
        self.assertEqual(tuple(images.shape), (6, 1, 28, 28))
        expected = np.tanh(by_hand(model.z1_to_x, z1.numpy().reshape(6, -1)))
        np.testing.assert_allclose(model.x_mean(z1), expected.reshape(2, 3, 784), atol=1e-12)

    @torch.no_grad()
    def test_encoder_of_the_cvae_sees_y_as_an_image_with_x_blanked(self):
        [case] = self.cases([MNIST_CVAE_CNN_single_digit])
        model = case.model
        x, y = case.data.test
        images = self.images.test[0].view(-1, 1, 28, 28)
        corner = images[:, :, 14:, :14]
        blanked = images.clone()
        blanked[:, :, 14:, :14] = 0

        raw = by_hand(model.f_x, corner.numpy()) + by_hand(model.f_y, blanked.numpy())
        q_z = model.q_z(x, y, case.scalars)
        np.testing.assert_allclose(q_z.mean, raw[:, :3], atol=1e-12)
        # With this shift, raw = 0 gives 0.8 of the prior's std.
        shift = math.log(math.expm1(0.8 * math.log(2)))
        softplus = np.log1p(np.exp(raw[:, 3:] + shift))
        expected = 1.3 * np.maximum(softplus / math.log(2), 1e-3)
        np.testing.assert_allclose(q_z.stddev, expected, atol=1e-12)

    @torch.no_grad()
    def test_decoder_of_the_cvae_gives_the_right_quarters(self):
        [case] = self.cases([MNIST_CVAE_CNN_single_digit])
        model = case.model
        x, y = case.data.test
        z = torch.randn(2, 6, case.f.dim_z, dtype=torch.float64)
        from_x = model.g_x(x.view(-1, 1, 14, 14))
        from_z = model.g_z(z.flatten(0, 1))
        self.assertEqual(tuple(from_x.shape), (6, 1, 28, 28))
        self.assertEqual(tuple(from_z.shape), (12, 1, 28, 28))

        whole = from_x.view(6, 28, 28) + from_z.view(2, 6, 28, 28)
        y_mean = model.y_mean(x, z)
        for draw in range(2):
            corner = whole[draw, :, 14:, :14].flatten(1)
            images = datasets.whole_images(corner, y_mean[draw])
            torch.testing.assert_close(images, whole[draw].flatten(1))

    def test_chunks_are_as_small_as_the_widest_layer_asks(self):
        """widest_layer is the largest output of a layer per example."""
        for case in self.cases(CNNS):
            with self.subTest(script=case.script.__name__):
                widths = []

                def note_width(module, inputs, out):
                    widths.append(out[0].numel() if torch.is_tensor(out) else 0)

                for module in case.model.modules():
                    module.register_forward_hook(note_width)
                case.model(*case.data.test, case.scalars)
                self.assertEqual(case.model.widest_layer, max(widths))


# ---------------------------------------------------------------------------------------- twins

class Twins(unittest.TestCase):
    def own_methods(self, cls):
        """The source of each method that a class defines itself, by name."""
        sources = {}
        for name, method in inspect.getmembers(cls, inspect.isfunction):
            if method.__module__ == cls.__module__:
                sources[name] = inspect.getsource(method)
        return sources

    def test_equal_classes(self):
        source = inspect.getsource(MNIST_CVAE_Relu.CVAE)
        self.assertEqual(source, inspect.getsource(MNIST_CVAE_Relu_single_digit.CVAE))

    def test_equal_except_for_one_thing(self):
        """Each pair differs in the methods named and in no other."""
        CVAE = MNIST_CVAE_Relu.CVAE
        pairs = (
            (
                MNIST_VAE_Relu_learnable_sigma.VAE,
                MNIST_VAE_Relu_nonlearnable_sigma.VAE,
                {"__init__", "q_z", "linear_optimum", "residuals"},
            ),
            (
                MNIST_HVAE_Relu.HVAE,
                MNIST_HVAE_CNN.HVAE,
                {"__init__", "q_z1", "x_mean"},
            ),
            (
                CVAE,
                MNIST_CVAE_CNN_single_digit.CVAE,
                {"__init__", "q_z", "y_mean", "forward", "residuals"},
            ),
            (
                CVAE,
                Synthetic_CVAE_Relu_correlation.CVAE,
                {
                    "__init__", "forward", "linear_optimum", "reconstructions", "residuals",
                    "y_mean",
                },
            ),
        )
        for one, other, expected in pairs:
            methods = self.own_methods(one)
            other_methods = self.own_methods(other)
            different = set()
            for name in set(methods) | set(other_methods):
                if methods.get(name) != other_methods.get(name):
                    different.add(name)
            with self.subTest(model=f"{other.__module__}.{other.__name__}"):
                self.assertEqual(different, expected)

    def test_the_same_flags(self):
        """The flags of twins have the same types, ranges and help. Defaults may differ."""
        def flags(script):
            fields = dataclasses.fields(script.Flags)
            return {field.name: (field.type, dict(field.metadata)) for field in fields}

        flags_of_all_digits = flags(MNIST_CVAE_Relu)
        flags_of_one_digit = flags(MNIST_CVAE_Relu_single_digit)
        _, metadata = flags_of_one_digit.pop("digit")
        self.assertEqual(metadata["high"], 9)
        self.assertEqual(flags_of_all_digits, flags_of_one_digit)


class Training(unittest.TestCase):
    def test_row_of_a_grid_like_alone(self):
        """With dropout or convolutions, too, each setting trains as if it were alone."""
        images = small.digit_data(40, 4)
        quarters = small.as_quarters(images)
        cases = (
            (MNIST_CVAE_Relu, quarters, "beta"),
            (MNIST_HVAE_CNN, images, "beta_1"),
            (MNIST_CVAE_CNN_single_digit, quarters, "beta"),
            (MNIST_VAE_Bernoulli, as_binary(images), "beta"),
        )
        for script, data, flag in cases:
            with self.subTest(script=script.__name__):
                with contextlib.redirect_stderr(io.StringIO()):
                    self.check_grid(script, data, flag)

    def check_grid(self, script, data, flag):
        """Train two values of a flag side by side, and then each of them alone."""
        name, flags = SCRIPTS[script]
        Model = getattr(script, name)
        group = []
        for value in (0.3, 2.0):
            changes = {flag: value}
            if "eta_dec" in flags:
                changes["eta_dec"] = 0.5
            f = script.Flags(device="cpu", num_epochs=3, batch_size=16, **flags | changes)
            group.append(f)

        together = training.train_group(Model, group, data)
        for f, run in zip(group, together):
            [alone] = training.train_group(Model, [f], data)
            weights = run.model.state_dict()
            for key, value in alone.model.state_dict().items():
                torch.testing.assert_close(weights[key], value, rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(
                run.record.curves["loss"], alone.record.curves["loss"], rtol=1e-9
            )
        losses = [run.record.curves["loss"] for run in together]
        self.assertNotEqual(losses[0], losses[1])


# ----------------------------------------------------------------------------- the linear twins

class LinearTwin(unittest.TestCase):
    """The closed form of the linear model beside a nonlinear one."""

    def test_of_a_cvae_from_its_data_by_hand(self):
        """Theorem 2, with E by least squares.

        The KL of unit i is log(theta_i / (beta eta_dec^2)) / 2 where that is positive.
        """
        images = small.digit_data(300, 6)
        # With noise the data have full rank.
        noise = torch.randn(300, 784, generator=torch.Generator().manual_seed(5))
        images.train[0].add_(0.02 * noise)
        data = small.as_quarters(images)
        x, y = (t.numpy() for t in data.train)
        residual = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
        theta = np.sort(np.linalg.eigvalsh(residual.T @ residual / len(y)))[::-1]

        scripts = (MNIST_CVAE_Relu, MNIST_CVAE_Relu_single_digit, MNIST_CVAE_CNN_single_digit)
        for script in scripts:
            for released, level in ((False, 0.7 * 0.6**2), (True, 0.7 / 2 * 0.6**2)):
                f = script.Flags(
                    beta=0.7, eta_dec=0.6, eta_enc=1.3, dim_z=12, released_objective=released
                )
                kl = script.CVAE.linear_optimum(f, data)["kl"]
                expected = np.maximum(np.log(theta[:12] / level), 0) / 2
                np.testing.assert_allclose(kl, expected, atol=1e-9)
                # Some units are active, and some are not.
                if not released:
                    self.assertTrue(0 < np.count_nonzero(kl) < 12)

    def test_of_a_vae_and_an_hvae(self):
        """Each closed form gets the right flags.

        tests/test_theory.py compares their optimal losses with brute force over the modes.
        """
        data = small.digit_data(100, 4)
        theta = theory.spectrum(theory.second_moment(*data.train)).sqrt()

        # 1. The VAEs.
        flags = dict(beta=0.7, eta_dec=0.6, c=2.0, sigma=0.4, d_1=5)
        script = MNIST_VAE_Relu_learnable_sigma
        optimum = script.VAE.linear_optimum(script.Flags(**flags), data)
        expected = (theta[:5] / (0.7**0.5 * 0.6)).log().clamp(min=0)
        np.testing.assert_allclose(optimum["kl"], expected, rtol=1e-9)

        script = MNIST_VAE_Relu_nonlearnable_sigma
        optimum = script.VAE.linear_optimum(script.Flags(**flags), data)
        k = 0.7**0.5 * 2  # sqrt(beta) eta_dec / eta_enc
        expected = (0.4 * (theta[:5] - k * 0.4).clamp(min=0) / k).sqrt()
        np.testing.assert_allclose(optimum["lambda"], expected, rtol=1e-6)

        # 2. The HVAEs. sigma_1^2 = 0.8^2 is larger than the level of z2.
        for script in (MNIST_HVAE_Relu, MNIST_HVAE_CNN):
            f = script.Flags(
                beta_1=0.7, beta_2=1.2, eta_dec=0.6, eta_enc=1.3, sigma_1=0.8, d_1=5, d_2=4
            )
            optimum = script.HVAE.linear_optimum(f, data)
            moment = (0.8**2 * theta[:4]**2 / (1.2 * 0.6**2)).clamp(min=0.8**2)
            level = 1.2 / 0.7 * 0.6**2
            expected = (moment / level).log().clamp(min=0) / 2
            np.testing.assert_allclose(optimum["kl_2"], expected, rtol=1e-9)
            self.assertEqual((len(optimum["kl_1"]), len(optimum["kl_2"])), (5, 4))

    def test_without_weight_there_is_none(self):
        data = small.as_quarters(small.digit_data(30, 4))
        f = MNIST_CVAE_Relu.Flags(beta=0.0)
        self.assertIsNone(MNIST_CVAE_Relu.CVAE.linear_optimum(f, data))

    def results(self, kls, AUs):
        """Results of several settings, each with a pair (predicted, trained) of KLs and of AUs.

        Units that are predicted to be active carry 1 nat.
        """
        results = []
        for k, ((linear_kl, kl), (active, AU)) in enumerate(zip(kls, AUs)):
            result = SimpleNamespace(
                settings={"beta": k, "seed": 0},
                metrics={"kl": kl, "AU": AU, "AU_kl": AU},
                linear={
                    "kl": [linear_kl / 2, linear_kl / 2],
                    "information": [1.0] * active + [0.005] * 2,
                },
                theory=None,
            )
            results.append(result)
        return results

    def test_rank_correlation(self):
        """Spearman's correlation is Pearson's of the ranks. Ties have their mean rank.

        The KLs' ranks are 1, 2.5, 2.5, 4 and 1, 3, 2, 4, so theirs is 4.5 / sqrt(4.5 * 5).
        """
        kls = [(1, 10), (2, 30), (2, 20), (7, 31)]
        AUs = [(1, 4), (2, 3), (3, 2), (4, 1)]
        correlations = verify.rank_correlations(self.results(kls, AUs))
        self.assertAlmostEqual(correlations["kl"], 4.5 / math.sqrt(4.5 * 5), places=12)
        self.assertAlmostEqual(correlations["AU"], -1, places=12)

    def test_rank_correlation_of_a_constant_is_left_out(self):
        """The KLs' ranks are 1, 2, 3 and 2, 1, 3, with the differences 1, 1, 0: 1 - 6 * 2 / 24."""
        results = self.results([(1, 2), (2, 1), (3, 3)], [(5, 4), (5, 3), (5, 2)])
        self.assertEqual(list(verify.rank_correlations(results)), ["kl"])
        self.assertEqual(verify.rank_correlations_in_words(results), "kl 0.50")
        constant = self.results([(1, 0), (2, 0), (3, 0)], [(1, 0), (1, 0), (2, 0)])
        self.assertEqual(verify.rank_correlations_in_words(constant), "none")

    def test_rank_correlations_in_words(self):
        results = self.results([(1, 1), (2, 2), (3, 3)], [(1, 3), (2, 2), (3, 1)])
        words = verify.rank_correlations_in_words(results)
        self.assertEqual(words, "kl 1.00, AU -1.00, AU_kl -1.00")
        words = verify.rank_correlations_in_words(results, left_out=("AU_kl",))
        self.assertEqual(words, "kl 1.00, AU -1.00")

    def test_table_of_the_linear_twin(self):
        [result] = self.results([(3, 2.5)], [(2, 4)])
        self.assertEqual(report.linear_row(result), {"kl": "3.00 -> 2.50", "AU": "2 -> 4"})

    def test_two_settings_or_seeds_of_one_are_not_ranked(self):
        results = self.results([(1, 1), (2, 2), (3, 3)], [(1, 1), (2, 2), (3, 3)])
        self.assertEqual(set(verify.rank_correlations(results)), {"kl", "AU", "AU_kl"})
        self.assertEqual(verify.rank_correlations(results[:2]), {})
        for seed, result in enumerate(results):
            result.settings = {"beta": 1.0, "seed": seed}
        self.assertEqual(verify.rank_correlations(results), {})


# ------------------------------------------------------------------------------- Bernoulli pixels

def correlations(x):
    """The eigenvalues of the correlation matrix of the binary pixels that vary, largest first."""
    pixels = x.numpy()
    varying = pixels[:, pixels.std(0) > 0]
    return np.linalg.eigvalsh(np.corrcoef(varying.T))[::-1]


class BernoulliPixels(unittest.TestCase):
    """What the data alone say about a collapsed VAE with binary pixels, and what a model says."""

    @classmethod
    def setUpClass(cls):
        # The number of images is odd, so that no pixel has the mean 1/2.
        cls.data = as_binary(small.digit_data(301, 20))
        [cls.x] = cls.data.train

    def model_and_scalars(self, f):
        """A model away from its start, in float64, and its setting on the device."""
        model = training.build(MNIST_VAE_Bernoulli.VAE, f, self.data).eval()
        random = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for p in model.parameters():
                p += p.std(correction=0) * torch.randn(p.shape, generator=random, dtype=p.dtype)
        return model, common.on_device(f, self.x)

    def collapsed_model(self, f):
        """A model whose posterior is the prior, and whose decoder gives each pixel its mean."""
        model = training.build(MNIST_VAE_Bernoulli.VAE, f, self.data).eval()
        with torch.no_grad():
            for network in (model.f, model.g):
                last_layer = network if f.linear else network[-1]
                last_layer.weight.zero_()
                last_layer.bias.zero_()
            # A logit of 40 is nearly certain, and finite.
            last_layer.bias.copy_(self.x.mean(0).logit().clamp(-40, 40))
        return model

    def test_before_training(self):
        """Each number is computed from the images by numpy."""
        pixels = self.x.numpy()
        mean = pixels.mean(0)
        varies = (mean > 0) & (mean < 1)
        # Some pixels are the same in all images.
        self.assertLess(varies.sum(), 784)
        mean = mean[varies]
        entropy = -(mean * np.log(mean) + (1 - mean) * np.log(1 - mean)).sum()

        # The bound of Jaakkola & Jordan (2000, eq. 8), twice lambda(a), at the logits a.
        logits = np.log(mean / (1 - mean))
        bound = np.tanh(logits / 2) / (2 * logits)
        scaled = (pixels[:, varies] - mean) / np.sqrt(bound)
        ratios = np.linalg.eigvalsh(scaled.T @ scaled / len(pixels))[::-1]

        for beta, d_1 in ((0.3, 5), (1.0, 16), (4.0, 2)):
            f = MNIST_VAE_Bernoulli.Flags(beta=beta, d_1=d_1, device="cpu")
            metrics = MNIST_VAE_Bernoulli.VAE.before_training(f, self.data)
            shares = ratios[:d_1] / beta
            shares = shares[shares > 1]
            self.assertGreater(len(shares), 0)
            expected = {
                "collapse_threshold": correlations(self.x)[0],
                "collapsed_loss": entropy,
                "collapsed_headroom": beta / 2 * (shares - 1 - np.log(shares)).sum(),
            }
            self.assertEqual(list(metrics), list(expected))
            for name, value in expected.items():
                self.assertAlmostEqual(metrics[name] / value, 1, places=9, msg=name)

    def test_collapsed_headroom_falls_with_beta_and_ends_at_the_threshold(self):
        def headroom_at(beta, d_1=16):
            f = MNIST_VAE_Bernoulli.Flags(beta=beta, d_1=d_1, device="cpu")
            return MNIST_VAE_Bernoulli.VAE.before_training(f, self.data)["collapsed_headroom"]

        rho = correlations(self.x)[0]
        nats = [headroom_at(beta) for beta in (0.0, 0.1, 0.5, 1.0, 2.0, 4.0)]
        for larger, smaller in zip(nats, nats[1:]):
            self.assertGreater(larger, smaller)
        self.assertGreater(nats[-1], 0)
        self.assertEqual([headroom_at(rho), headroom_at(2 * rho)], [0, 0])
        self.assertGreater(headroom_at(1.0, d_1=16), headroom_at(1.0, d_1=15))

    @torch.no_grad()
    def test_a_collapsed_model_has_what_the_data_predict(self):
        """Its loss, and rho_1 of T and of F, are those computed from the data before training."""
        for linear in (False, True):
            f = MNIST_VAE_Bernoulli.Flags(
                start_std=1.0, d_1=3, d_hidden=9, linear=linear, device="cpu"
            )
            predicted = MNIST_VAE_Bernoulli.VAE.before_training(f, self.data)
            model = self.collapsed_model(f)
            scalars = common.on_device(f, self.x)
            terms = model(self.x, scalars)
            self.assertLess(terms["kl"].abs().max().item(), 1e-12)
            loss = model.loss(terms, scalars).mean().item()
            self.assertAlmostEqual(loss, predicted["collapsed_loss"], places=9)

            moments = headroom.residual_moments(model, f, self.data)[""]
            for rho in moments.ratios[0]:
                self.assertAlmostEqual(rho[0].item(), predicted["collapse_threshold"], places=6)
                np.testing.assert_allclose(rho[:20], correlations(self.x)[:20], rtol=1e-6)

    @torch.no_grad()
    def test_cause_of_a_collapsed_model(self):
        """It is the objective from beta = rho_1 on. Far below, it is training."""
        rho = correlations(self.x)[0]
        causes = []
        for beta in (0.1 * rho, 0.99 * rho, 1.01 * rho):
            f = MNIST_VAE_Bernoulli.Flags(
                start_std=1.0, beta=beta, d_1=3, num_samples=0, device="cpu"
            )
            model = self.collapsed_model(f)
            with contextlib.redirect_stderr(io.StringIO()):
                metrics, examples = report.evaluate(model, f, self.data)
            level = headroom.measure(model, f, self.data, metrics, examples)["z"]
            self.assertEqual((level.units, level.collapsed), (3, 3))
            causes.append(level.cause())
        self.assertEqual(causes, ["training", "unstable", "objective"])

    @torch.no_grad()
    def test_residuals_are_those_of_the_expected_probabilities(self):
        """With one unit, E[sigmoid] and E[p (1 - p)] are integrals over z, by quadrature."""
        f = MNIST_VAE_Bernoulli.Flags(start_std=0.8, d_1=1, d_hidden=9, device="cpu")
        model, scalars = self.model_and_scalars(f)
        x = self.x[:3]

        # 1. The integrals.
        q_z = model.q_z(x, scalars)
        steps = np.linspace(-9, 9, 601)
        weights = np.exp(-steps**2 / 2) / math.sqrt(2 * math.pi) * (steps[1] - steps[0])
        z = q_z.mean.numpy() + q_z.stddev.numpy() * steps
        p = 1 / (1 + np.exp(-by_hand(model.g, z[..., None])))
        probability = np.einsum("s,bsd->bd", weights, p)
        fisher = np.einsum("s,bsd->bd", weights, p * (1 - p))

        # 2. The means over many calls.
        torch.manual_seed(1)
        residuals = []
        fishers = []
        for _ in range(400):
            residual = model.residuals(x, scalars, 4)[""]
            self.assertEqual(tuple(residual.residual.shape), (2, 3, 784))
            self.assertEqual(tuple(residual.fisher.shape), (3, 784))
            residuals.append(residual.residual.numpy())
            fishers.append(residual.fisher.numpy())
        self.assertEqual((residual.likelihood, residual.counts_means), ("bernoulli", False))
        self.assertIs(residual.encoder_input[0], x)
        self.assertEqual((float(residual.beta), float(residual.weight)), (1, 1))

        # 3. The comparison. Pixels move with one unit, so that their errors are alike.
        for draws, expected in (
            (np.stack(residuals)[:, 0], x.numpy() - probability),
            (np.stack(residuals)[:, 1], x.numpy() - probability),
            (np.stack(fishers), fisher),
        ):
            error = draws.std(0) / len(draws)**0.5
            self.assertLess((np.abs(draws.mean(0) - expected) / error).max(), 5)
            self.assertLess(error.max(), 0.01)
        small.check_independent(self, np.stack(residuals))

    def test_without_hidden_layers_no_unit_can_be_dead(self):
        counts = []
        for linear in (False, True):
            f = MNIST_VAE_Bernoulli.Flags(d_1=3, d_hidden=9, linear=linear, device="cpu")
            model, _ = self.model_and_scalars(f)
            if not linear:
                with torch.no_grad():
                    # Two hidden units of the encoder never fire.
                    model.f[0].weight[:2] = 0
                    model.f[0].bias[:2] = -1
                    model.g[0].weight[:] = 0
                    model.g[0].bias[:] = 1
            counts.append(headroom.dead_units(model, f, self.data))
        self.assertEqual(counts[1], {})
        self.assertEqual(counts[0]["g"], [0, 9])
        self.assertGreaterEqual(counts[0]["f"][0], 2)

    def test_linear_networks(self):
        """With --linear true they are one matrix each."""
        f = MNIST_VAE_Bernoulli.Flags(d_1=3, linear=True, device="cpu")
        model, scalars = self.model_and_scalars(f)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        expected = {
            "f.weight": (6, 784), "f.bias": (6,), "g.weight": (784, 3), "g.bias": (784,)
        }
        self.assertEqual(shapes, expected)
        x = self.x[:4]
        mean = x.numpy() @ model.f.weight.detach().numpy().T[:, :3]
        mean = mean + model.f.bias.detach().numpy()[:3]
        logits = by_hand([model.g], mean)
        panels = model.reconstructions(x, scalars)
        reconstructed = panels["reconstructed"].detach().numpy()
        np.testing.assert_allclose(reconstructed, 1 / (1 + np.exp(-logits)), rtol=1e-9)


class BernoulliCommandLine(small.WithMnist):
    def run_script(self, *argv):
        return small.call(
            MNIST_VAE_Bernoulli.main,
            *("--data_dir", self.folder / "data"),
            *("--out_dir", self.folder / "runs"),
            *("--num_epochs", 1),
            *("--num_samples", 0),
            *("--device", "cpu"),
            *argv,
        )

    def images(self, binarise="threshold", seed=0):
        """The binary training images of a setting."""
        f = MNIST_VAE_Bernoulli.Flags(
            data_dir=str(self.folder / "data"), binarise=binarise, seed=seed, device="cpu"
        )
        with contextlib.redirect_stderr(io.StringIO()):
            [data] = datasets.load_binary_mnist([f])
        return data.train[0].double()

    def test_prints_the_threshold_once_per_data_set(self):
        """A grid of beta has one data set. With --binarise sample each seed has its own one."""
        with mock.patch("pictures.draw_run"), mock.patch("pictures.draw_grid"):
            status, out, err = self.run_script("--linear", "true", "--beta", "1,40")
            self.assertEqual(status, 0, err)
            rho = correlations(self.images())
            self.assertEqual(out.count("collapse is stable from beta"), 1)
            self.assertIn(f"rho_1 = {rho[0]:.2f}: ", out)
            self.assertIn(f"lead out of collapse is {(rho > 1).sum()} at beta = 1", out)

            # The finished runs are shown, not evaluated again.
            with mock.patch("report.evaluate") as evaluate:
                status, out_again, err = self.run_script("--linear", "true", "--beta", "1,40")
            self.assertEqual((status, out_again), (0, out), err)
            evaluate.assert_not_called()

            seeds = ("--linear", "true", "--binarise", "sample", "--seed", "1,2")
            status, out, err = self.run_script(*seeds)
        self.assertEqual(status, 0, err)
        for seed in (1, 2):
            rho = correlations(self.images("sample", seed))
            self.assertIn(f"rho_1 = {rho[0]:.2f}: ", out)

    def test_the_second_of_two_processes_prints_no_threshold(self):
        f = MNIST_VAE_Bernoulli.Flags(data_dir=str(self.folder / "data"), device="cpu")
        [data] = datasets.load_binary_mnist([f])
        printed = []
        for rank in (0, 1):
            with mock.patch("processes.rank_and_count", return_value=(rank, 2)):
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    MNIST_VAE_Bernoulli.print_threshold([f], [data])
            printed.append(out.getvalue())
        self.assertIn("rho_1", printed[0])
        self.assertEqual(printed[1], "")

    def test_wrong_flags(self):
        cases = (
            (["--binarise", "half"], "--binarise: got 'half', wants one of threshold, sample"),
            (["--beta", "-1"], "--beta: got '-1', wants a number"),
        )
        for argv, message in cases:
            status, out, err = self.run_script(*argv)
            self.assertEqual((status, out, err.count("\n")), (2, "", 1))
            self.assertIn(message, err)


# --------------------------------------------------------------------------- the synthetic data

class Synthetic(unittest.TestCase):
    def test_correlation(self):
        """y ~ N(0, I), x = rho y + sqrt(1 - rho^2) noise.

        Second moments are I, I and rho I, within 4.5 standard errors.
        """
        n = 4000
        identity = torch.eye(20)
        rhos = {
            "Identical": 1,
            "Gaussian_noise_1_2": 1 / 2,
            "Gaussian_noise_1_4": 1 / 4,
            "Gaussian_noise_1_8": 1 / 8,
            "Random": 0,
        }
        for corr_type, rho in rhos.items():
            data = correlated(corr_type=corr_type, num_samples=n, dim_x=20, dim_y=20)
            for x, y in (data.train, data.test):
                self.assertEqual((tuple(x.shape), tuple(y.shape)), ((n, 20), (n, 20)))
                moments = ((x.T @ x / n, 1), (y.T @ y / n, 1), (y.T @ x / n, rho))
                for moment, expected in moments:
                    error = (moment - expected * identity).abs().max().item()
                    self.assertLess(error, 4.5 * (2 / n)**0.5)
            # The test examples are fresh draws.
            between = (data.train[1].T @ data.test[1] / n).abs().max().item()
            self.assertLess(between, 4.5 / n**0.5)
            self.assertEqual(torch.equal(*data.train), rho == 1)

    def test_shared_where_settings_share_it(self):
        settings = []
        for flags in ({}, {"beta": 2.0}, {"corr_type": "Random"}, {"seed": 1}):
            settings.append(Synthetic_CVAE_Relu_correlation.Flags(device="cpu", **flags))
        a, b, other, seed = Synthetic_CVAE_Relu_correlation.correlated(settings)
        self.assertIs(a, b)
        # All correlations have the same y.
        self.assertTrue(torch.equal(a.train[1], other.train[1]))
        self.assertFalse(torch.equal(a.train[1], seed.train[1]))

    def test_identical_is_predicted_to_collapse(self):
        """With x = y nothing is left to describe: E = 0. The less x says, the more information."""
        script = Synthetic_CVAE_Relu_correlation
        kls = []
        for corr_type in script.RHO:
            f = script.Flags(corr_type=corr_type, dim_x=20, dim_y=20, dim_z=20)
            data = correlated(corr_type=corr_type, dim_x=20, dim_y=20)
            kls.append(script.CVAE.linear_optimum(f, data)["kl"].sum().item())
        self.assertEqual(kls[0], 0)
        self.assertEqual(kls, sorted(kls))

        # Except for sampling, E is (1 - rho^2) I.
        rhos = (1 / 2, 1 / 4, 1 / 8, 0)
        self.assertEqual(len(kls), 1 + len(rhos))
        for kl, rho in zip(kls[1:], rhos):
            self.assertAlmostEqual(kl / 20, math.log((1 - rho**2) / 0.25) / 2, delta=0.03)

    def test_from_its_command_line(self):
        with tempfile.TemporaryDirectory() as folder:
            argv = [
                *("--dim_x", 4),
                *("--dim_y", 4),
                *("--dim_z", 3),
                *("--d_hidden", 5),
                *("--num_samples", 40),
                *("--num_epochs", 2),
                *("--device", "cpu"),
                *("--out_dir", folder),
            ]
            self.check_a_grid_of_correlations(argv)
            self.check_seeds(argv)
            self.check_wrong_flags(argv)

    def run_script(self, *argv):
        return small.call(Synthetic_CVAE_Relu_correlation.main, *argv)

    def check_a_grid_of_correlations(self, argv):
        corr_types = ("--corr_type", "Identical,Random,Gaussian_noise_1_2")
        status, out, err = self.run_script(*argv, "--num_draws", "0", *corr_types)
        self.assertEqual(status, 0, err)
        self.assertNotIn("log_px", out)
        self.assertIn("40 training and 40 test examples", out)
        names = out.strip().split("\n")[1].split()
        self.assertEqual(names[0], "corr_type")
        self.assertEqual(names[1:], ["elbo", "kl", "AU", "headroom", "headroom_any"])
        self.assertIn(
            "Spearman's rank correlation between predicted and trained values over 3 settings: kl ",
            out)

        # All columns.
        all_columns = ("--columns", "all")
        status, out, err = self.run_script(*argv, "--num_draws", "0", *corr_types, *all_columns)
        self.assertEqual(status, 0, err)
        names = out.strip().split("\n")[1].split()
        expected = ["elbo", "reconstruction", "kl", "AU", "AU_kl", "active_share"]
        self.assertEqual(names[1:7], expected)
        expected = [f"{name}_train" for name in expected] + ["headroom", "headroom_any"]
        self.assertEqual(names[7:], expected)

    def check_seeds(self, argv):
        """The seeds of one setting cannot be ranked."""
        status, out, err = self.run_script(*argv, "--num_draws", "0", "--seed", "0,1,2")
        self.assertEqual(status, 0, err)
        self.assertIn('"linear twin -> trained"', out)
        self.assertNotIn("rank correlation", out)

    def check_wrong_flags(self, argv):
        status, out, err = self.run_script(*argv, "--dim_x", "3")
        self.assertEqual((status, out), (2, ""))
        self.assertIn("--dim_x: got 3, wants --dim_y = 4", err)
        status, out, err = self.run_script(*argv, "--corr_type", "Gaussian_noise_1_3")
        self.assertEqual(status, 2)
        self.assertIn("--corr_type: got 'Gaussian_noise_1_3', wants one of Identical, ", err)


if __name__ == "__main__":
    unittest.main()
