"""headroom.post_mortem: the post-mortem of a model in its own training loop, and its words.

The figures are compared with numpy, with the scripts of this project, and with the theory of
collapsed models. `headroom.examine` and the answers are tested with made-up moments.
"""
import math
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import common
import numpy as np
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, MultivariateNormal, Normal
from torch.utils.data import DataLoader, TensorDataset

import headroom
import MNIST_CVAE_Relu
import MNIST_VAE_Bernoulli
import MNIST_VAE_Linear_learnable_sigma
import MNIST_VAE_Relu_learnable_sigma
import own_model
import pictures
import report
import training
from tests import small
from tests.test_post_mortem import encoder_input, held_out_gain

# A log variance at which a draw of z differs from its mean by rounding errors only.
ALMOST_NO_NOISE = -80.0


def collapsed_encoder(x, *conditions):
    """The mean and the log variance of two units that equal the prior N(0, 1)."""
    return torch.zeros(len(x), 2, dtype=torch.float64), torch.zeros(len(x), 2, dtype=torch.float64)


def constant_decoder(mean):
    """A decoder whose output (D,) does not depend on z."""
    def decode(z, *conditions):
        return mean.expand(len(z), *mean.shape)

    return decode


def random_rows(seed, n=301):
    """x (n, 5), float64, whose columns are correlated and have large means."""
    random = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 2, generator=random, dtype=torch.float64)
    maps = torch.randn(2, 5, generator=random, dtype=torch.float64)
    noise = torch.randn(n, 5, generator=random, dtype=torch.float64)
    return shared @ maps + 0.5 * noise + torch.arange(5) - 2


def category_codes():
    """Correlated codes 0, 1 and 2, (301, 5)."""
    x = random_rows(6)
    x = x - x.mean(0)
    return (x > 0).long() + (x > 0.7).long()


def halves_of(count):
    """The places of the rows in each half, two arrays."""
    return [places.numpy() for places in own_model.HalfSums().split(count)]


# ------------------------------------------------------------------------------------ the figures

class Halves(unittest.TestCase):
    def test_one_row_of_each_pair_of_neighbours(self):
        """Batches of any size, also of odd ones, give the halves of one large batch."""
        for sizes in ([57], [1] * 57, [3, 7, 1, 1, 2, 5, 9, 29], [8, 16, 33]):
            sums = own_model.HalfSums()
            halves = np.full(57, -1)
            start = 0
            for size in sizes:
                for half, places in enumerate(sums.split(size)):
                    halves[start + places.numpy()] = half
                start += size
            self.assertEqual(set(halves[:56:2] + halves[1:56:2]), {1})
            self.assertIn(halves[56], (0, 1))
            # By chance, either row of a pair may be in the first half.
            self.assertEqual(set(halves[:56:2]), {0, 1})


class ByHand(unittest.TestCase):
    def test_gaussian(self):
        """A linear model almost without noise, where numpy knows the residual."""
        x = random_rows(0)
        encoder = nn.Linear(5, 3).double()
        decoder = nn.Linear(3, 5).double()
        with torch.no_grad():
            encoder.weight[1:] *= 1e-3
            encoder.bias[1:] = 0
        log_var = torch.tensor([ALMOST_NO_NOISE, -0.02, 0.03], dtype=torch.float64)

        # Of the two collapsed units the decoder does not read the noise.
        with torch.no_grad():
            decoder.weight[:, 1:] = 0
        beta, eta_dec = 0.6, 0.7
        result = headroom.post_mortem(
            lambda x: (encoder(x), log_var.expand(len(x), 3)),
            decoder, x.split(17), beta=beta, eta_dec=eta_dec,
        )

        # 1. The units.
        mean = encoder(x).detach().numpy()
        variance = log_var.exp().numpy()
        kl = ((mean**2 + variance - 1 - log_var.numpy()) / 2).mean(0)
        np.testing.assert_allclose(result.kl, kl, rtol=1e-9)
        self.assertEqual((kl <= 0.01).sum(), 2)
        self.assertEqual((result.units, result.collapsed, result.count), (3, 2, 301))
        self.assertEqual(result.active, (mean.var(0, ddof=1) > 0.01).sum())

        # 2. All rows.
        r = (x - decoder(encoder(x))).detach().numpy()
        u = encoder_input(x.numpy())
        fitted = u @ np.linalg.lstsq(u, r, rcond=None)[0]
        level = beta * eta_dec**2
        for matrix, eigenvalues, gain in zip((fitted, r), result.eigenvalues, result.gains):
            tau = np.linalg.svd(matrix / 301**0.5, compute_uv=False)**2
            np.testing.assert_allclose(eigenvalues, tau, atol=1e-9)
            ratio = np.maximum(tau[:2] / level, 1)
            self.assertGreater(ratio[1], 1)
            self.assertAlmostEqual(gain, beta / 2 * (ratio - 1 - np.log(ratio)).sum(), places=9)
        self.assertAlmostEqual(result.level, level)

        # 3. Held-out rows.
        ridges = (0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
        halves = halves_of(301)
        objective = {"k": 2, "beta": beta, "eta_dec": eta_dec}
        gains = [held_out_gain(u, r, halves, ridge, **objective) for ridge in ridges]
        self.assertAlmostEqual(result.held_out_gains[0], max(gains), places=8)
        any_gain = held_out_gain(r, r, halves, 0, **objective)
        self.assertAlmostEqual(result.held_out_gains[1], any_gain, places=8)
        self.assertEqual(result.cause, "training")

    def test_large_means(self):
        """The mean of a column changes nothing, although its square has no digits for the rest."""
        x = random_rows(1)
        taus = []
        for shift in (0, 1e8):
            shifted = x + torch.tensor([0, 0, shift, 0, 0])
            result = headroom.post_mortem(
                collapsed_encoder, constant_decoder(shifted.mean(0)), shifted.split(50))
            taus.append(result.eigenvalues[0].numpy())
        np.testing.assert_allclose(taus[1], taus[0], rtol=1e-5)

    def test_noise_of_draws_is_not_counted(self):
        """The decoder's output has the variance 9 in each column, over one draw."""
        x = random_rows(2, n=3000)
        mean = x.mean(0)
        result = headroom.post_mortem(
            lambda x: collapsed_encoder(x), lambda z: mean + 3 * z[:, :1].expand(len(z), 5),
            x.split(100), draws=1)
        exact = ((x - mean)**2).sum(1).mean().item()
        total = result.eigenvalues[1].sum().item()
        # The square of one estimate would have 45 more.
        self.assertLess(abs(total - exact), 5)

    def test_bernoulli(self):
        """rho of collapsed units are the eigenvalues of the correlation matrix of x."""
        x = (random_rows(3) > 0).double()
        p = x.mean(0)
        result = headroom.post_mortem(
            collapsed_encoder, constant_decoder(p), x.split(40), beta=0.5, likelihood="bernoulli")
        rho = np.linalg.eigvalsh(np.corrcoef(x.numpy().T))[::-1]
        for eigenvalues in result.eigenvalues:
            np.testing.assert_allclose(eigenvalues, rho, rtol=1e-9)

        # The gains of a Gaussian decoder of variance 4 with the residual 4 r.
        tau = np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True))[::-1]
        ratio = np.maximum(4 * tau[:2] / 0.5, 1)
        gain = 0.5 / 2 * (ratio - 1 - np.log(ratio)).sum()
        self.assertGreater(gain, 0.01)
        np.testing.assert_allclose(result.gains, gain, rtol=1e-9)
        self.assertEqual((result.level, result.eta_dec), (0.5, None))
        self.assertEqual(result.collapsed, 2)

    def test_grey_pixels(self):
        """The binary cross-entropy is also used for targets between 0 and 1."""
        x = random_rows(3).sigmoid()
        p = x.mean(0)
        result = headroom.post_mortem(
            collapsed_encoder, constant_decoder(p), x.split(40), likelihood="bernoulli")
        h = (p * (1 - p)).numpy()
        rho = np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True) / np.sqrt(np.outer(h, h)))[::-1]
        np.testing.assert_allclose(result.eigenvalues[1], rho, rtol=1e-9)

    def test_information_is_a_mean_over_draws(self):
        """p is 0.9 or 0.5 with the same probability. H is the mean of p (1 - p), which is 0.17."""
        x = (random_rows(3, n=4000) > 0).double()

        def decode(z):
            return torch.where(z[:, :1] > 0, 0.9, 0.5).expand(len(z), 5)

        result = headroom.post_mortem(
            collapsed_encoder, decode, x.split(400), likelihood="bernoulli", draws=4)
        r = x.numpy() - 0.7
        wanted = np.linalg.eigvalsh(r.T @ r / len(r) / 0.17)[-1]
        self.assertAlmostEqual(result.eigenvalues[1][0].item() / wanted, 1, delta=0.02)

    def test_poisson(self):
        """rho of collapsed units are the eigenvalues of the scaled covariance of the counts."""
        random = np.random.default_rng(5)
        rates = np.array([1.0, 4.0, 0.5]) * np.exp(0.5 * random.standard_normal((300, 1)))
        x = random.poisson(rates)
        mean = x.mean(0)
        result = headroom.post_mortem(
            collapsed_encoder, constant_decoder(torch.from_numpy(mean)),
            torch.from_numpy(x).split(40), likelihood="poisson", beta=20)
        rho = np.linalg.eigvalsh(np.cov(x.T, bias=True) / np.sqrt(np.outer(mean, mean)))[::-1]
        for eigenvalues in result.eigenvalues:
            np.testing.assert_allclose(eigenvalues, rho, rtol=1e-9)
        self.assertEqual((result.gains, result.held_out_gains), ((0, 0), (0, 0)))
        self.assertEqual(result.cause, "objective")

    def test_categories(self):
        """rho of collapsed units are those of multiple correspondence analysis.

        They are the eigenvalues of D^(-1/2) Cov D^(-1/2) for the indicators of the categories,
        where D has their means. In low precision, the sum of probabilities is not exactly 1.
        """
        codes = category_codes()
        indicators = np.eye(3)[codes.numpy()].reshape(301, 15)
        mean = indicators.mean(0)
        scaled = np.cov(indicators.T, bias=True) / np.sqrt(np.outer(mean, mean))
        rho = np.linalg.eigvalsh(scaled)[::-1][:10]
        self.assertGreater(rho[-1], 1e-3)

        p = torch.from_numpy(mean).reshape(5, 3)
        for dtype, accuracy in ((torch.float64, 1e-9), (torch.bfloat16, 0.02)):
            result = headroom.post_mortem(
                collapsed_encoder, constant_decoder(p.to(dtype)), codes.split(40),
                likelihood="categorical")
            for eigenvalues in result.eigenvalues:
                np.testing.assert_allclose(eigenvalues[:10], rho, rtol=accuracy)
                self.assertLess(eigenvalues[10:].abs().max().item(), 1e-9)

        # Boehning's bound of the curvature is 1/2 on the residuals.
        tau = np.linalg.eigvalsh(np.cov(indicators.T, bias=True))[::-1]
        ratio = np.maximum(2 * tau[:2], 1)
        gain = (ratio - 1 - np.log(ratio)).sum() / 2
        self.assertGreater(gain, 0.01)
        np.testing.assert_allclose(result.gains, gain, rtol=0.02)

    def test_categories_whose_probabilities_vary(self):
        """H has a block E[diag(p) - p p^T] for each variable, by numpy."""
        codes = category_codes()
        weights = torch.randn(5, 15, generator=torch.Generator().manual_seed(1)).double()

        def encode(x):
            return 0.3 * x.double(), torch.full((len(x), 5), ALMOST_NO_NOISE)

        def decode(z):
            return (z @ weights).reshape(len(z), 5, 3).softmax(-1)

        result = headroom.post_mortem(encode, decode, codes.split(40), likelihood="categorical")
        p = decode(0.3 * codes.double()).numpy()
        r = (np.eye(3)[codes.numpy()] - p).reshape(301, 15)
        H = np.zeros((15, 15))
        for i in range(5):
            block = slice(3 * i, 3 * i + 3)
            H[block, block] = np.diag(p[:, i].mean(0)) - p[:, i].T @ p[:, i] / 301
        product = np.linalg.pinv(H, rcond=1e-10, hermitian=True) @ (r.T @ r / 301)
        rho = np.sort(np.linalg.eigvals(product).real)[::-1]
        np.testing.assert_allclose(result.eigenvalues[1][:10], rho[:10], rtol=1e-6)

        # The first direction of one half, on the other half. H is that of all rows.
        variances, directions = np.linalg.eigh(H)
        whitening = directions[:, 5:] / np.sqrt(variances[5:])
        ratios = []
        halves = halves_of(301)
        for half, other in (halves, halves[::-1]):
            _, _, axes = np.linalg.svd(r[half] @ whitening)
            ratios.append(((r[other] @ whitening @ axes[0])**2).mean())
        self.assertAlmostEqual(result.held_out_rho[1], sum(ratios) / 2, places=6)

    def test_conditions(self):
        """The encoder of a CVAE reads the target and the conditions, and so does its decoder."""
        x = random_rows(7)
        condition = random_rows(8)[:, :2]
        label = torch.arange(301) % 3
        calls = []

        def encode(x, condition, label):
            calls.append((condition.shape[1], label.ndim))
            return collapsed_encoder(x)

        def decode(z, condition, label):
            return 3 * condition.sum(1, keepdim=True) + label[:, None] + torch.zeros(5)

        loader = DataLoader(TensorDataset(x, condition, label), 30)
        result = headroom.post_mortem(encode, decode, loader, conditional=True)
        self.assertEqual(set(calls), {(2, 1)})
        r = x - 3 * condition.sum(1, keepdim=True) - label[:, None]
        tau = np.linalg.svd(r.numpy() / 301**0.5, compute_uv=False)**2
        for eigenvalues in result.eigenvalues:
            np.testing.assert_allclose(eigenvalues, tau, rtol=1e-9)

        # A VAE that ignores them cannot predict the residual from x alone.
        batches = zip(x.split(30), r.split(30))
        result = headroom.post_mortem(
            collapsed_encoder, constant_decoder(torch.zeros(5)), batches)
        self.assertGreater(abs(result.eigenvalues[0][0] - tau[0]), 0.01)


class LikeTheScripts(unittest.TestCase):
    """The same headroom as headroom.measure finds for models of this project.

    Both are means over many draws of z. The tolerance is a share of the largest eigenvalue.
    """

    def setUp(self):
        torch.manual_seed(0)

    def check_same(self, model, f, data, encode, decode, batches, tolerance, **options):
        """Compare all figures. Returns the PostMortem."""
        # Only the held-out headroom, which is not compared, needs several ridges.
        with mock.patch("headroom.RIDGES", (1e-5,)):
            result = headroom.post_mortem(
                encode, decode, batches, beta=f.beta, draws=60, **options)
        ours = result.level_headroom()
        self.assertGreater(ours.collapsed, 0)
        metrics = {"AU_kl": ours.units - ours.collapsed}
        with mock.patch("headroom.DRAWS", 60):
            [theirs] = headroom.measure(
                model, f, data, metrics, {"unit_kl": np.array([result.kl])}).values()

        scale = theirs.tau_any[0]
        np.testing.assert_allclose(ours.tau, theirs.tau, atol=tolerance * scale)
        np.testing.assert_allclose(ours.tau_any, theirs.tau_any, atol=tolerance * scale)
        for name in ("units", "collapsed", "likelihood"):
            self.assertEqual(getattr(ours, name), getattr(theirs, name))
        self.assertAlmostEqual(ours.level, theirs.level)
        for name in ("headroom", "headroom_any"):
            wanted = getattr(theirs, name)
            self.assertAlmostEqual(getattr(ours, name), wanted, delta=10 * tolerance * wanted)
        np.testing.assert_allclose(ours.theta, theirs.theta, rtol=1e-5)
        self.assertGreater(ours.headroom_any, 0.01)
        return result

    def collapse(self, layers, units):
        """Let the last of the units (rows of layers) ignore their input, without a bias."""
        with torch.no_grad():
            for layer in layers:
                layer.weight[units:] = 0
                if layer.bias is not None:
                    layer.bias[units:] = 0

    def test_linear(self):
        f = MNIST_VAE_Linear_learnable_sigma.Flags(device="cpu", d_1=4, eta_dec=0.5, c=0.5)
        data = small.digit_data(300, 20)
        model = training.build(MNIST_VAE_Linear_learnable_sigma.VAE, f, data).eval()
        self.collapse([model.W], 2)
        std = torch.tensor([1e-3, 1e-3, 1.0, 1.0])
        with torch.no_grad():
            model.log_scale.copy_((std / f.sigma).log())
            # The decoder does not read the noise of the collapsed units.
            model.U.weight[:, 2:] = 0
        self.check_same(
            model, f, data, lambda x: Normal(model.W(x), std), model.U, data.train[0].split(300),
            tolerance=1e-4, eta_dec=0.5)

    def test_relu(self):
        f = MNIST_VAE_Relu_learnable_sigma.Flags(device="cpu", d_hidden=30, d_1=6, eta_dec=0.5)
        data = small.digit_data(900, 20)
        model = training.build(MNIST_VAE_Relu_learnable_sigma.VAE, f, data).eval()
        self.collapse([model.f[2]], 4)
        # eta_enc is eta_dec / c, which is 0.5. That is --sigma, too.
        self.check_same(
            model, f, data, lambda x: (model.f(x), torch.tensor(0.25).log()), model.g,
            data.train[0].split(300), tolerance=0.01, eta_dec=0.5, eta_enc=0.5)

    def test_bernoulli(self):
        f = MNIST_VAE_Bernoulli.Flags(device="cpu", d_hidden=30, d_1=6, start_std=1.0)
        data = small.digit_data(900, 20)
        data.train = ((data.train[0] > 0.5).float(),)
        model = training.build(MNIST_VAE_Bernoulli.VAE, f, data).eval()
        self.collapse([model.f[2]], 0)
        scalars = common.on_device(f, torch.zeros(1))
        result = self.check_same(
            model, f, data, lambda x: model.q_z(x, scalars), lambda z: model.g(z).sigmoid(),
            data.train[0].split(300), tolerance=0.01, likelihood="bernoulli")
        self.assertEqual(result.collapsed, 6)

    def test_cvae(self):
        """The loader begins with the target, which is y. The condition is x."""
        f = MNIST_CVAE_Relu.Flags(device="cpu", eta_dec=0.5, start_std=1.0)
        data = small.as_quarters(small.digit_data(900, 20))
        model = training.build(MNIST_CVAE_Relu.CVAE, f, data).eval()
        self.collapse([model.f_x[2], model.f_y[2]], 0)
        scalars = common.on_device(f, torch.zeros(1))
        x, y = data.train
        self.check_same(
            model, f, data, lambda y, x: model.q_z(x, y, scalars),
            lambda z, x: model.y_mean(x, z), DataLoader(TensorDataset(y, x), 300),
            tolerance=0.01, eta_dec=0.5, eta_enc=f.eta_enc, conditional=True)


# --------------------------------------------------------------------- the functions and the loader

class Forms(unittest.TestCase):
    """The same model in other words gives the same numbers."""

    def setUp(self):
        self.x = random_rows(0)
        torch.manual_seed(0)
        self.encoder = nn.Linear(5, 4).double()
        self.decoder = nn.Linear(4, 5).double()
        self.log_var = torch.linspace(-1, 0.5, 4).double()

    def encode(self, x):
        return self.encoder(x), self.log_var.expand(len(x), 4)

    def numbers(self, encode, decode, loader, **options):
        """All figures of a post-mortem, as a list."""
        result = headroom.post_mortem(encode, decode, loader, draws=2, **options)
        eigenvalues = torch.cat(result.eigenvalues).tolist()
        return [*eigenvalues, *result.gains, *result.held_out_gains, *result.kl, result.active]

    def check_same(self, encode, decode, loader, **options):
        plain = self.numbers(self.encode, self.decoder, self.x.split(43))
        np.testing.assert_allclose(
            self.numbers(encode, decode, loader, **options), plain, rtol=1e-9, atol=1e-12)

    def test_posteriors(self):
        batches = self.x.split(43)

        def normal(x):
            mean, log_var = self.encode(x)
            return Normal(mean, (log_var / 2).exp())

        self.check_same(normal, self.decoder, batches)
        self.check_same(lambda x: Independent(normal(x), 1), self.decoder, batches)
        self.check_same(lambda x: list(self.encode(x)), self.decoder, batches)
        # All rows may share the log variance.
        self.check_same(lambda x: (self.encoder(x), self.log_var), self.decoder, batches)

    def test_shapes(self):
        """z may be an image, and the decoder may flatten what it describes."""
        images = self.x.reshape(301, 1, 5)

        def encode(x):
            mean, log_var = self.encode(x.flatten(1))
            return mean.reshape(-1, 2, 2), log_var.reshape(-1, 2, 2)

        def decode(z):
            self.assertEqual(z.shape[1:], (2, 2))
            return self.decoder(z.flatten(1))

        self.check_same(encode, decode, images.split(43))

    def test_loaders(self):
        """Labels are ignored. A loader is read once, so that a generator is enough."""
        labels = torch.arange(301) % 10
        rows = TensorDataset(self.x, labels)
        self.check_same(self.encode, self.decoder, DataLoader(rows, 43))
        self.check_same(self.encode, self.decoder, ([x, "label"] for x in self.x.split(43)))
        self.check_same(self.encode, self.decoder, [self.x.split(43)[i:i + 1] for i in range(7)])
        self.check_same(self.encode, self.decoder, self.x.split(43), device="cpu")
        self.check_same(self.encode, self.decoder, self.x.split(43), device=torch.device("cpu"))

    def test_parameters_and_random_numbers_stay_as_they_are(self):
        """No gradients are left, and the generators go on as if nothing had been drawn."""
        loader = DataLoader(TensorDataset(self.x), 43, shuffle=True)
        torch.manual_seed(5)
        first = self.numbers(self.encode, self.decoder, loader)
        after = torch.rand(3)
        torch.manual_seed(5)
        self.assertTrue(torch.equal(torch.rand(3), after))
        # The draws and the order of the rows have a fixed seed.
        self.assertEqual(self.numbers(self.encode, self.decoder, loader), first)
        self.assertTrue(torch.is_grad_enabled())
        self.assertIsNone(self.encoder.weight.grad)

    def test_prior(self):
        """The KL is that against N(0, eta_enc^2)."""
        result = headroom.post_mortem(self.encode, self.decoder, self.x.split(43), eta_enc=0.7)
        mean, log_var = self.encode(self.x)
        q_z = Normal(mean, (log_var / 2).exp())
        kl = torch.distributions.kl_divergence(q_z, Normal(0.0, 0.7)).mean(0)
        torch.testing.assert_close(torch.tensor(result.kl, dtype=torch.float64), kl.detach())
        self.assertEqual(result.active, (mean.var(0) > 0.01 * 0.49).sum())

    def test_variance_of_few_means(self):
        """The variance of 0 and 0.145 is 0.0105 for n - 1, and 0.0053 for n."""
        for mean, active in ((0.145, 1), (0.141, 0)):
            sums = own_model.PosteriorSums()
            for row in (0.0, mean):
                row = torch.tensor([[row]], dtype=torch.float64)
                sums.add(row, 0 * row)
            self.assertEqual(sums.active(1.0), active)


class Refused(unittest.TestCase):
    """Each error is a ValueError of one line that names what was got."""

    def setUp(self):
        self.x = random_rows(0, n=20)

    def refuse(self, words, encode=collapsed_encoder, decode=None, loader=None, **options):
        decode = decode or constant_decoder(torch.full((5,), 0.5))
        loader = [self.x] if loader is None else loader
        with self.assertRaises(ValueError) as caught:
            headroom.post_mortem(encode, decode, loader, **options)
        message = str(caught.exception)
        self.assertIn(words, message)
        self.assertNotIn("\n", message)

    def test_arguments(self):
        self.refuse("likelihood is 'normal', wants one of gaussian, ber", likelihood="normal")
        self.refuse("beta is 0, wants a finite number above 0", beta=0)
        self.refuse("eta_dec is nan, wants a finite number above 0", eta_dec=math.nan)
        self.refuse("eta_enc is -1, wants a finite number above 0", eta_enc=-1)
        self.refuse("draws is 0, wants at least 1", draws=0)
        self.refuse("loader is a tensor, wants an iterable of batches", loader=self.x)
        self.refuse("loader: the number of rows is 0, wants at least 2", loader=[])
        self.refuse("loader: the number of rows is 1, wants at least 2", loader=[self.x[:1]])
        self.refuse("a batch of loader is a dict, wants", loader=[{"x": self.x}])
        self.refuse("a batch of loader is a ndarray, wants", loader=[self.x.numpy()])

    def test_numbers_that_are_not_finite(self):
        bad = self.x.clone()
        bad[3, 2] = math.nan
        self.refuse("a batch of loader has numbers that are not finite", loader=[bad])
        rate = "if training diverged, try a smaller learning rate first"
        infinite = torch.full((20, 2), math.inf)
        for encode in (lambda x: (infinite, 0 * x[:, :2]), lambda x: (x[:, :2], infinite)):
            self.refuse(rate, encode=encode)
        self.refuse(
            "what decode returned has numbers that are not finite",
            decode=lambda z: math.nan * self.x[:len(z)])
        # The KL overflows although each log variance is finite.
        self.refuse("the mean KL of unit 1 (counted from 0) is not finite", encode=lambda x: (
            x[:, :2], torch.tensor([0.0, 1e4], dtype=torch.float64).expand(20, 2)))

    def test_encoders(self):
        self.refuse("encode returned a Tensor, wants (mean, log_var) or", encode=lambda x: x)
        self.refuse("encode returned a tuple, wants", encode=lambda x: (x, x, x))
        covariance = torch.eye(2)
        self.refuse(
            "encode returned a MultivariateNormal, wants",
            encode=lambda x: MultivariateNormal(x[:, :2].float(), covariance))
        self.refuse(
            "encode returned a Bernoulli, wants",
            encode=lambda x: Independent(Bernoulli(x.sigmoid()), 1))
        self.refuse("a mean of the shape (19, 5)", encode=lambda x: (x[1:], x[1:]))
        self.refuse("a log variance of the shape (20, 3)", encode=lambda x: (x, x[:, :3]))

    def test_decoders(self):
        self.refuse("decode returned a tuple, wants a tensor", decode=lambda z: (z, z))
        self.refuse("decode returned a tensor of the shape (10, 4)", decode=lambda z: z[:, [0] * 4])
        self.refuse("decode returned a tensor of the shape ()", decode=lambda z: z.sum())
        binary = [(self.x > 0).double()]
        for likelihood, number, function in (
            ("bernoulli", 1.2, "torch.sigmoid"),
            ("bernoulli", -0.1, "torch.sigmoid"),
            ("poisson", -0.1, "torch.exp"),
        ):
            self.refuse(
                f"which the likelihood {likelihood} wants; apply {function}",
                decode=constant_decoder(torch.full((5,), number)), loader=binary,
                likelihood=likelihood)

        # Logits of categories, probabilities of the wrong dimension, and their shape.
        codes = [(self.x > 0).long()]
        options = {"loader": codes, "likelihood": "categorical"}
        wanted = "apply torch.softmax"
        self.refuse(wanted, decode=constant_decoder(torch.full((5, 2), 0.7)), **options)
        self.refuse(
            wanted, decode=constant_decoder(torch.tensor([[1.2, -0.2]] * 5)), **options)
        self.refuse(
            "wants (10, 5, K) with the probabilities of the K categories",
            decode=constant_decoder(torch.full((4, 2), 0.5)), **options)

        # One-hot vectors in place of codes.
        self.refuse(
            "wants x to have the codes of the categories",
            loader=[nn.functional.one_hot(codes[0], 2)],
            likelihood="categorical",
            decode=constant_decoder(torch.full((5, 2), 0.5)))

    def test_order_of_dimensions(self):
        """Channels first in x and last in what decode returns would pair the wrong pixels."""
        images = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))

        def encode(x):
            return collapsed_encoder(x.flatten(1))

        self.refuse(
            "wants the order of the dimensions of x",
            encode=encode,
            loader=[images],
            decode=constant_decoder(torch.full((4, 4, 3), 0.5)))
        flat = constant_decoder(torch.full((48,), 0.5))
        self.assertEqual(headroom.post_mortem(encode, flat, [images]).count, 10)

    def test_a_dataset_in_place_of_batches(self):
        dataset = torch.utils.data.TensorDataset(self.x)
        self.refuse("loader is a Dataset, whose items are single examples", loader=dataset)

    def test_targets(self):
        half = constant_decoder(torch.full((5, 2), 0.5))
        self.refuse("x has numbers outside [0, 1]", loader=[self.x], likelihood="bernoulli")
        self.refuse("x has negative numbers, wants counts", loader=[self.x], likelihood="poisson")
        for codes in ((self.x > 0).long() + 1, (self.x > 0) * 0.5):
            self.refuse(
                "x has other numbers than the codes 0 to 1 of the 2 categories", decode=half,
                loader=[codes], likelihood="categorical")

    def test_sizes(self):
        wide = torch.zeros(2, 8001)
        self.refuse(
            "x has 8,001 columns (with its categories and conditions), wants at most 8,000",
            decode=lambda z: torch.zeros(len(z), 8001), loader=[wide])
        x = self.x
        self.refuse(
            "x has 8,001 columns", loader=[(x[:2], torch.zeros(2, 7996))], conditional=True)
        self.refuse(
            "a condition has 3 rows, wants 2 rows", loader=[(x[:2], x[:3])], conditional=True)
        self.refuse(
            "a batch has 4 columns, wants 5 columns as in the first one",
            decode=lambda z: torch.zeros(len(z), 5 - (len(z) == 3)), loader=[x[:4], x[:6, :4]])

    def test_certain_decoders(self):
        """A decoder that is certain of a wrong pixel has a residual without information."""
        options = {"loader": [(self.x > 0).double()], "likelihood": "bernoulli"}
        p = torch.tensor([0.5, 0.5, 0.0, 0.5, 0.5])
        self.refuse(
            "column 2 (counted from 0) has no information", decode=constant_decoder(p), **options)
        self.refuse(
            "no column has any information", decode=constant_decoder(torch.zeros(5)), **options)


# --------------------------------------------------------------------------------- the answers

def halves_with(tau, other_tau=None, any_tau=None, fisher=None):
    """Two halves whose r has the variances tau (D,) in the first and other_tau in the second.

    r is linear in u = (r, 1), unless any_tau has larger variances, the rest of which is not.
    """
    halves = []
    for linear in (tau, tau if other_tau is None else other_tau):
        variances = torch.tensor(linear, dtype=torch.float64)
        D = len(variances)
        moment = torch.eye(D + 1, dtype=torch.float64)
        moment.diagonal()[:D] = variances
        squares = torch.diag(torch.tensor(any_tau or linear, dtype=torch.float64))
        halves.append(headroom.ResidualMoments(moment[:D].clone(), moment, squares, fisher))
    return halves


def examined(tau, collapsed=2, beta=1.0, sizes=(500, 500), **options):
    """The PostMortem of `halves_with` these variances. Other options go to where they belong."""
    moments = {}
    for name in ("other_tau", "any_tau", "fisher"):
        if name in options:
            moments[name] = options.pop(name)
    return headroom.examine(halves_with(tau, **moments), sizes, collapsed, beta, **options)


QUARTER = torch.full((3,), 0.25, dtype=torch.float64)


class Answers(unittest.TestCase):
    """The cause, the certainty and the remedy from made-up moments."""

    def test_training(self):
        result = examined([4.0, 3.0, 0.5], units=16)
        gain = (4 - 1 - math.log(4) + 3 - 1 - math.log(3)) / 2
        self.assertAlmostEqual(result.gains[0], gain)
        self.assertAlmostEqual(result.held_out_gains[0], gain, places=4)
        self.assertEqual(result.cause, "training")
        self.assertEqual(
            result.verdict,
            "2 of 16 units collapsed because of training: reviving them would lower the loss by at "
            f"least {gain:.2g} nats")
        self.assertEqual(
            result.certainty,
            "Units found on one half of the rows and measured on the other half lead to the same "
            "verdict, so the 1,000 rows are enough for it.")
        remedies = (
            "Is beta that of your loss?", "rsample()", "beta need not change", "dead",
            "initial std", "warm-up of beta", "more epochs",
        )
        places = [result.remedy.index(remedy) for remedy in remedies]
        self.assertEqual(places, sorted(places))

    def test_objective(self):
        """The remedy gives the beta and the eta_dec from which on a unit lowers the loss."""
        result = examined([0.2, 0.1], any_tau=[0.3, 0.1], beta=2.0, eta_dec=0.5)
        self.assertEqual(result.cause, "objective")
        self.assertEqual(result.gains, (0, 0))
        # The threshold is beta eta_dec^2, which must be below 0.3.
        self.assertIn(
            "only if beta is below 1.2, which is 0.6 times its value, or, at this beta, if "
            f"eta_dec is below {0.15**0.5:.4g}", result.remedy)
        self.assertTrue(
            result.remedy.startswith("More training of this model hardly revives collapsed units."),
            result.remedy,
        )
        # A learned eta_dec^2 would be the mean of 0.3 and 0.1, which exceeds 0.15.
        self.assertIn(
            f"A learned eta_dec would be about {0.2**0.5:.4g}, which is not low", result.remedy)
        # Here it would be the mean of 0.3, 0.1 and 0.02.
        learned = examined([0.2, 0.1, 0], any_tau=[0.3, 0.1, 0.02], beta=2.0, eta_dec=0.5)
        self.assertIn(
            f"let the decoder learn it: it would become about {0.14**0.5:.4g}", learned.remedy)

        # They hold: just below them a unit gains something, and just above nothing.
        for factor, gains in ((0.99, True), (1.01, False)):
            for beta, eta_dec in ((1.2 * factor, 0.5), (2.0, 0.15**0.5 * factor)):
                changed = examined(
                    [0.2, 0.1], any_tau=[0.3, 0.1], beta=beta, eta_dec=eta_dec)
                self.assertEqual(changed.gains[1] > 0, gains)

    def test_objective_at_the_threshold(self):
        """A gain of less than 0.01 nats gives no beta that would have to be larger."""
        result = examined([1.05, 0.1])
        self.assertEqual(result.cause, "objective")
        self.assertTrue(0 < result.gains[0] < 0.01)
        self.assertIn("gain at most 0.01 nats", result.remedy)
        self.assertNotIn("below", result.remedy)

        result = examined([0.0, 0.0])
        self.assertEqual(result.cause, "objective")
        self.assertIn("the residual is 0", result.remedy)

    def test_objective_of_another_decoder(self):
        result = examined(
            [0.4, 0.3, 0.2], fisher=QUARTER, beta=4.0, likelihood="bernoulli", eta_dec=9.0)
        self.assertEqual(result.cause, "objective")
        self.assertEqual((result.eta_dec, result.level), (None, 4.0))
        # rho_1 is 0.4 / 0.25.
        self.assertIn(
            "only if beta is below 1.6, which is rho_1 of any encoder and 0.4 times the value",
            result.remedy)
        result = examined([0.0] * 3, fisher=QUARTER, beta=4.0, likelihood="bernoulli")
        self.assertIn("the residual is 0", result.remedy)

    def test_encoder(self):
        result = examined([0.5, 0.4], any_tau=[5.0, 4.0])
        self.assertEqual(result.cause, "encoder")
        self.assertIn("with a richer encoder it would", result.verdict)
        first = result.remedy.index("remedies of training first")
        self.assertLess(first, result.remedy.index("wider or deeper"))

    def test_unstable(self):
        """rho_1 is 1.6, and the bound of the curvature 1/4 is too weak for a gain at beta = 1.5."""
        result = examined([0.4, 0.3, 0.2], fisher=QUARTER, beta=1.5, likelihood="poisson")
        self.assertEqual(result.cause, "unstable")
        self.assertIn("but this is unstable", result.verdict)
        self.assertTrue(result.remedy.startswith("Train longer"), result.remedy)

    def test_undecided(self):
        """The halves have their variances in other directions."""
        result = examined([4.0, 0.0], other_tau=[0.0, 4.0], sizes=(30, 31))
        self.assertGreater(result.gains[0], 0.01)
        self.assertLess(result.held_out_gains[0], 0.01)
        self.assertEqual(result.cause, "undecided")
        self.assertIn("too few rows to decide", result.verdict)
        self.assertTrue(result.certainty.endswith("so the 61 rows are too few."))
        self.assertIn("more rows", result.remedy)

        # Only any encoder is undecided.
        result = examined([0.1, 0.1], any_tau=[0.1, 0.1])
        self.assertEqual(result.cause, "objective")

    def test_none(self):
        result = examined([4.0, 3.0], collapsed=0, units=2, kl=[2.0, 1.0], active=2)
        self.assertEqual((result.cause, result.verdict), ("none", "no unit collapsed"))
        self.assertEqual((result.gains, result.held_out_gains), ((0, 0), (0, 0)))
        self.assertEqual(result.remedy, "Nothing needs to change.")
        self.assertNotIn("linear encoder", str(result))

    def test_none_without_an_active_unit(self):
        """The standard deviations in place of the log variances give a KL to each unit."""
        result = examined([4.0, 3.0], collapsed=0, units=2, kl=[0.4, 1e20], active=0)
        self.assertEqual(result.cause, "none")
        self.assertIn("no unit is active", result.remedy)
        self.assertIn("log_var is the logarithm of the variance", result.remedy)
        self.assertIn("The KL is 1e+20 nats", result.kl_in_words())

    def test_the_mean_of_the_residual(self):
        """Reconstructions that are off by a constant. A unit would only correct their mean."""
        random = torch.Generator().manual_seed(0)
        x = torch.randn(3000, 6, generator=random, dtype=torch.float64)
        offset = 3 * torch.ones(6, dtype=torch.float64)

        def examine(decoded, data, **options):
            return headroom.post_mortem(
                collapsed_encoder, constant_decoder(decoded), [data], **options)

        # 1. Noise has no use for a unit at beta = 2, whatever its mean.
        self.assertEqual(examine(x.mean(0), x, beta=2).cause, "objective")
        result = examine(x.mean(0) + offset, x, beta=2)
        self.assertEqual(result.cause, "training")
        self.assertTrue(result.remedy.startswith("First mend the mean of the residual"))
        bits = (x > 0).double()
        result = examine(torch.full_like(offset, 0.9), bits, beta=4, likelihood="bernoulli")
        self.assertNotEqual(result.cause, "objective")
        self.assertTrue(result.remedy.startswith("First mend the mean of the residual"))

        # 2. Structure remains without the mean, and the usual remedies apply.
        structured = x + 3 * x[:, :1]
        result = examine(structured.mean(0) + offset, structured, beta=2)
        self.assertEqual(result.cause, "training")
        self.assertTrue(result.remedy.startswith("Check two lines of your program first."))

    def test_sizes_of_halves(self):
        """All rows are the mean over both halves, weighted by their numbers of rows."""
        result = examined([4.0, 1.0], other_tau=[1.0, 1.0], sizes=(1, 3))
        np.testing.assert_allclose(result.eigenvalues[1], [(4 + 3 * 1) / 4, 1])
        self.assertEqual(result.count, 4)

    def test_printed(self):
        result = examined(
            [4.0, 3.0, 0.5], any_tau=[5.0, 3.0, 0.5], units=3, kl=[1.5, 0.001, 0.002], active=1)
        lines = str(result).split("\n")
        self.assertEqual(lines[0], f"With beta = 1 and eta_dec = 1, {result.verdict}.")
        self.assertEqual(lines[1:3], [result.certainty, result.remedy])
        self.assertEqual(
            lines[3],
            "The KL is 1.5030 nats per row in total. By the variance of their means, 1 of 3 units "
            "is active.")
        words = " ".join(str(result).split())
        self.assertIn(f"headroom (nats) {result.gains[0]:.4f} {result.gains[1]:.4f}", words)
        self.assertIn("tau_1 4.0000 5.0000", words)
        self.assertIn("threshold beta eta_dec^2 = 1.", words)

        fisher = torch.tensor([0.25, 0.25, 0.0], dtype=torch.float64)
        result = examined(
            [0.4, 0.3, 0.0], fisher=fisher, likelihood="poisson", beta=0.5, collapsed=1)
        words = " ".join(str(result).split())
        self.assertIn("With beta = 0.5 and a Poisson decoder, 1 unit collapsed, but", words)
        self.assertIn("rho_1 1.6000 1.6000", words)
        self.assertIn("1 column has no information and is left out.", words)
        self.assertIn("The number of collapsed units was given, not counted.", words)

    def test_picture(self):
        """The title of the picture has the verdict of both halves."""
        result = examined(
            [4.0, 0.0, 0.0], other_tau=[0.0, 4.0, 0.0], units=3, kl=[1.5, 0.001, 0.002], active=1)
        level = result.level_headroom()
        self.assertEqual((level.cause(), level.verdict()), ("undecided", result.verdict))
        self.assertEqual((level.units, level.collapsed, len(level.tau)), (3, 2, 3))
        self.assertEqual(level.theta, [math.exp(3)])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "headroom.png")
            pictures.draw_headroom(path, {"z": level}, "")
            self.assertTrue(path.read_bytes().startswith(small.PNG))

        # Without the KL, only the collapsed units are known.
        level = examined([4.0, 3.0, 2.0], units=3).level_headroom()
        self.assertEqual((level.units, level.theta, len(level.tau)), (2, [], 2))

    def test_moments_that_are_not_finite(self):
        for place, name in enumerate(("E[r u^T]", "E[u u^T]", "E[r r^T]", "H")):
            halves = halves_with([0.4, 0.3, 0.2], fisher=QUARTER)
            parts = [part.clone() for part in halves[1]]
            parts[place].view(-1)[0] = math.nan
            halves[1] = headroom.ResidualMoments(*parts)
            with self.assertRaises(ValueError) as caught:
                headroom.examine(halves, (10, 10), 1, 1.0, likelihood="bernoulli")
            self.assertIn(f"the moment {name} of the model is not finite", str(caught.exception))
            self.assertIn("smaller learning rate first", str(caught.exception))

    def test_active_units_are_those_of_the_report(self):
        self.assertEqual(own_model.ACTIVE_VARIANCE, report.ACTIVE_VARIANCE)


class ImportedAlone(unittest.TestCase):
    def test_a_training_loop_keeps_its_settings(self):
        """Importing common would switch off the validation of torch.distributions."""
        code = (
            "import sys\n"
            "from headroom import post_mortem\n"
            "import torch\n"
            "assert 'common' not in sys.modules\n"
            "assert torch.distributions.Distribution._validate_args\n"
            "post_mortem(lambda x: (x, 0 * x), lambda z: z, [torch.eye(4)])\n"
            "assert 'common' not in sys.modules\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=small.ROOT, capture_output=True, text=True,
            encoding="utf-8")
        self.assertEqual(done.returncode, 0, done.stderr)


if __name__ == "__main__":
    unittest.main()
