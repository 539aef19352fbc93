"""MNIST_VAE_Delta: δ, the KL and both priors in closed form, and what each pixel and latent sees.

Sampling, scoring and the terms must agree.
"""
import contextlib
import decimal
import io
import itertools
import math
import unittest
from decimal import Decimal
from unittest import mock

import common
import numpy as np
import torch
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

import datasets
import deep
import files
import headroom
import MNIST_VAE_Delta as delta_vae
import report
import training
from tests import small

# The number of rows of an image, and of latents.
N = 28
D = torch.float64


def build(images=4, dtype=D, spread=0.3, **flags):
    """A small model with weights far from their start, its setting, and binary images for it.

    The model is in evaluation mode, the images are (B, 1, 28, 28).
    """
    tiny = {"dim_z": 2, "num_ch": 3, "num_layers": 2, "d_hidden": 6, "device": "cpu"}
    f = delta_vae.Flags(**(tiny | flags))
    random = torch.Generator().manual_seed(1)
    x = (torch.rand(images, 1, N, N, generator=random) < 0.3).to(dtype)
    data = datasets.Data("random", (x,), (x,))
    model = training.build(delta_vae.DeltaVAE, f, data).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += spread * torch.randn(p.shape, generator=random, dtype=dtype)
    return model, common.on_device(f, x), x


def ar1(delta, d, n):
    """The AR(1) prior of a δ: α, the variances of p(z_t|z_{t-1}) (n, 1), and a covariance (n, n).

    The covariance is that of one unit's sequence.
    """
    alpha, log_variance = delta_vae.ar1_of_rate(delta, d, n)
    prior_var = torch.full((n, 1), math.exp(log_variance), dtype=D)
    prior_var[0] = 1
    steps = torch.arange(n)
    covariance = alpha ** (steps[:, None] - steps).abs().double()
    return alpha, prior_var, covariance


def closest_variance(alpha, prior_var):
    """The variances (n, 1) of the posterior that reaches δ.

    They are (1 - α²) / (1 + α²), at both ends 1 - α².
    """
    variance = prior_var[-1].expand(len(prior_var), 1) / (1 + alpha**2)
    variance[[0, -1]] = prior_var[-1]
    return variance


def over_time(mean, covariance):
    """Normals over time, mean (..., n, d): each unit has this covariance, alone."""
    return MultivariateNormal(mean.transpose(-1, -2), covariance)


def diagonal_over_time(mean, std):
    """As `over_time`, of independent steps with the std (..., n, d)."""
    return over_time(mean, torch.diag_embed(std.transpose(-1, -2).square()))


class Rate(unittest.TestCase):
    """δ, α, and the KL of a posterior that is independent over time from an AR(1) prior."""

    def test_alpha_solves_delta_to_rounding(self):
        """½ d [(n - 2) log(1 + α²) - log(1 - α²)] = δ, in decimal numbers with digits to spare."""
        deltas = (1e-300, 1e-9, 0.01, 0.5, 5.0, 60.0, 700.0)
        for delta, d, n in itertools.product(deltas, (1, 3, 16), (2, 3, 28, 1000)):
            with self.subTest(delta=delta, d=d, n=n), decimal.localcontext() as digits:
                alpha, log_variance = delta_vae.ar1_of_rate(delta, d, n)
                digits.prec = 40 + max(0, -int(2 * math.log10(delta / d / n))) + int(delta)
                variance = Decimal(log_variance).exp()
                rate = Decimal(d) / 2 * ((n - 2) * (2 - variance).ln() - variance.ln())
                self.assertLess(abs(rate / Decimal(delta) - 1), 1e-14)
                self.assertLess(abs(Decimal(alpha) / (1 - variance).sqrt() - 1), 1e-14)

    def test_no_posterior_is_below_delta(self):
        """Posteriors are tried anywhere, near the one of least rate, and next to it."""
        random = torch.Generator().manual_seed(0)
        for delta, d, n in itertools.product((0.01, 1.0, 5.0, 40.0), (1, 3), (2, 3, 6, 28)):
            alpha, prior_var, _ = ar1(delta, d, n)
            closest_std = closest_variance(alpha, prior_var).sqrt()
            for spread in (2.0, 0.3, 1e-3):
                mean = spread * torch.randn(500, n, d, generator=random, dtype=D)
                log_ratio = spread * torch.randn(500, n, d, generator=random, dtype=D)
                std = closest_std * log_ratio.exp()
                rate = delta_vae.kl_to_ar1(mean, std, alpha, prior_var).sum((1, 2))
                self.assertGreater(rate.min().item(), delta * (1 - 1e-9))

            zeros = torch.zeros(n, d, dtype=D)
            rate = delta_vae.kl_to_ar1(zeros, closest_std.expand(n, d), alpha, prior_var).sum()
            self.assertAlmostEqual(rate.item() / delta, 1, delta=1e-9)

    def test_delta_is_what_minimising_finds(self):
        """The search is over all means and variances, from afar. It ends at the known variances."""
        random = torch.Generator().manual_seed(0)
        for delta, d, n in ((5.0, 2, 5), (0.5, 1, 28), (20.0, 3, 2), (12.0, 1, 3)):
            alpha, prior_var, _ = ar1(delta, d, n)
            mean = torch.randn(n, d, generator=random, dtype=D, requires_grad=True)
            log_std = torch.randn(n, d, generator=random, dtype=D, requires_grad=True)
            optimizer = torch.optim.LBFGS(
                [mean, log_std],
                max_iter=500,
                tolerance_grad=1e-10,
                tolerance_change=0,
                line_search_fn="strong_wolfe",
            )

            def loss():
                optimizer.zero_grad()
                rate = delta_vae.kl_to_ar1(mean, log_std.exp(), alpha, prior_var).sum()
                rate.backward()
                return rate

            optimizer.step(loss)
            self.assertAlmostEqual(loss().item(), delta, delta=1e-8 * delta)
            variance = log_std.detach().exp().square()
            expected = closest_variance(alpha, prior_var).expand(n, d)
            torch.testing.assert_close(variance, expected, rtol=1e-4, atol=0)
            self.assertLess(mean.abs().max().item(), 1e-4)

    def test_kl_is_that_of_the_whole_sequence(self):
        """Its sum is the closed form for Gaussians with any covariance."""
        random = torch.Generator().manual_seed(0)
        for delta, n, d in ((0.1, 2, 1), (5.0, 7, 3), (30.0, 28, 2)):
            alpha, prior_var, covariance = ar1(delta, d, n)
            mean, log_std = torch.randn(2, 9, n, d, generator=random, dtype=D)
            std = log_std.exp()
            q = diagonal_over_time(mean, std)
            p = over_time(torch.zeros_like(mean), covariance)
            exact = kl_divergence(q, p).sum(-1)
            kl = delta_vae.kl_to_ar1(mean, std, alpha, prior_var).sum((1, 2))
            torch.testing.assert_close(kl, exact, rtol=1e-10, atol=1e-10)

    def test_kl_of_each_step_is_its_expectation(self):
        """E_q[log q(z_t) - log p(z_t|z_{t-1})], by Monte Carlo, and never negative."""
        random = torch.Generator().manual_seed(0)
        alpha, prior_var, _ = ar1(1.0, 2, 4)
        mean, log_std = torch.randn(2, 4, 2, generator=random, dtype=D)
        std = (0.5 * log_std).exp()
        z = mean + std * torch.randn(100_000, 4, 2, generator=random, dtype=D)
        previous = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], 1)
        log_p = Normal(alpha * previous, prior_var.sqrt()).log_prob(z)
        log_ratio = Normal(mean, std).log_prob(z) - log_p

        kl = delta_vae.kl_to_ar1(mean, std, alpha, prior_var)
        error = log_ratio.std(0) / len(z) ** 0.5
        self.assertLess(((log_ratio.mean(0) - kl) / error).abs().max().item(), 4)
        self.assertLess(error.max().item(), 0.05)
        self.assertGreater(kl.min().item(), 0)


class Model(unittest.TestCase):
    @torch.no_grad()
    def test_an_encoder_without_information_has_the_rate_delta(self):
        """Its means are 0 and its std is the initial one, for each x. It holds in float32, too."""
        cases = (("ar1", 5.0, D), ("ar1", 30.0, torch.float32), ("standard", 5.0, D))
        for prior, delta, dtype in cases:
            model, f, x = build(prior=prior, delta=delta, dtype=dtype)
            model.h_to_z.weight.zero_()
            model.h_to_z.bias.zero_()
            terms = model(x, f, (2,))
            expected = torch.full((4,), delta if prior == "ar1" else 0.0, dtype=dtype)
            torch.testing.assert_close(terms["kl"].sum(-1), expected)
            torch.testing.assert_close(terms["smallest_rate"], expected.expand(2, 4))

    @torch.no_grad()
    def test_recurrent_layers_are_left_out_of_autocast(self):
        """cuDNN's would compute in float16, for any type of autocast."""
        model, f, x = build()
        model = model.float()
        types = []

        def note_type(gru, inputs, output):
            types.append(output[0].dtype)

        model.rows_to_h.register_forward_hook(note_type)
        with torch.autocast("cpu", torch.bfloat16):
            model.q_z(x.float())
        self.assertEqual(types, [torch.float32])

    @torch.no_grad()
    def test_start_std(self):
        """Where the last layer gives 0, q's std is that share of the one nearest to the prior."""
        for start in (0.1, 1.0):
            model, f, x = build(start_std=start)
            model.h_to_z.weight.zero_()
            model.h_to_z.bias.zero_()
            std = model.q_z(x).stddev
            expected = (start * model.closest_std).expand_as(std).to(x.dtype)
            torch.testing.assert_close(std, expected)

    @torch.no_grad()
    def test_terms_at_given_z(self):
        """Each is compared with densities of the whole sequence.

        log p(x|z) is compared with the decoder's probabilities, pixel by pixel.
        """
        for prior, delta in (("ar1", 5.0), ("standard", 5.0)):
            model, f, x = build(prior=prior, delta=delta)
            z = torch.randn(3, 4, N, 2, generator=torch.Generator().manual_seed(2), dtype=D)
            with mock.patch.object(delta_vae, "draw", lambda q_z, sample_shape: z):
                terms = model(x, f, (3,))

            # 1. The densities of z.
            covariance = torch.eye(N, dtype=D)
            if prior == "ar1":
                _, _, covariance = ar1(delta, 2, N)
            q_z = model.q_z(x)
            sequences = z.transpose(-1, -2)
            p = over_time(torch.zeros_like(z), covariance)
            log_p_z = p.log_prob(sequences).sum(-1)
            q = diagonal_over_time(q_z.mean, q_z.stddev)
            log_q_z = q.log_prob(sequences).sum(-1)
            log_auxiliary = torch.stack([model.auxiliary(draw) for draw in z])

            # 2. The pixels.
            context = model.decoder.vertical(x)
            logits = [model.decoder.horizontal(x, draw[None], context)[0] for draw in z]
            probability = torch.stack(logits).sigmoid()
            log_pixels = x * probability.log() + (1 - x) * (1 - probability).log()
            log_px_z = log_pixels.sum((2, 3, 4))

            torch.testing.assert_close(terms["log_px_z"], log_px_z)
            torch.testing.assert_close(terms["log_w"], log_px_z + log_p_z - log_q_z)
            torch.testing.assert_close(terms["rate_auxiliary"], log_q_z - log_auxiliary)
            elbo_auxiliary = terms["log_px_z"] - log_q_z + log_auxiliary
            torch.testing.assert_close(terms["elbo_auxiliary"], elbo_auxiliary)
            torch.testing.assert_close(terms["mean"].view(4, N, 2), q_z.mean)

    @torch.no_grad()
    def test_log_w_is_the_elbo_on_average(self):
        """E_q[log_w] = E_q[log p(x|z)] - KL: the closed form and the densities of drawn z agree."""
        for prior in ("ar1", "standard"):
            model, f, x = build(images=2, num_ch=1, num_layers=1, prior=prior)
            torch.manual_seed(0)
            terms = model(x, f, (3000,))
            kl = terms["kl"].sum(-1)
            gap = terms["log_w"] - terms["log_px_z"] + kl
            error = gap.std(0) / len(gap) ** 0.5
            self.assertLess((gap.mean(0).abs() / error).max().item(), 4)
            self.assertLess(error.max().item(), 0.02 * kl.min().item())

    @torch.no_grad()
    def test_prior_draws_have_its_covariance(self):
        """Each unit has the covariance over time, the mean is 0, and the units are independent."""
        model, f, _ = build(delta=20.0)
        torch.manual_seed(0)
        z = model.sample_z(10_000)
        _, _, covariance = ar1(20.0, 2, N)
        products = z[:, :, None] * z[:, None]  # (draws, n, n, d)
        error = products.std(0) / len(z) ** 0.5
        difference = products.mean(0) - covariance[..., None]
        self.assertLess((difference / error).abs().max().item(), 5)
        self.assertLess((z.mean(0).abs() * len(z) ** 0.5).max().item(), 4.5)
        between_units = (z[..., 0, None] * z[:, None, :, 1]).mean(0)
        self.assertLess(between_units.abs().max().item() * len(z) ** 0.5, 5)

    @torch.no_grad()
    def test_float32_resolves_the_least_variance(self):
        """At the largest δ that is accepted, the densities of p(z_t|z_{t-1}) are those of float64.

        The errors are small beside √28, the spread of a log-density.
        """
        largest = delta_vae.smallest_rate(math.log(delta_vae.MIN_VARIANCE), 2, N)
        delta = largest * (1 - 1e-9)
        _, prior_var, _ = ar1(delta, 2, N)
        tolerance = 1e-4 * delta_vae.MIN_VARIANCE
        self.assertAlmostEqual(prior_var[1].item(), delta_vae.MIN_VARIANCE, delta=tolerance)

        single, _, _ = build(delta=delta, dtype=torch.float32)
        double, _, _ = build(delta=delta)
        torch.manual_seed(0)
        z = double.sample_z(1000).float()
        exact = double.p_z(z.double()).log_prob(z.double()).sum((1, 2))
        error = single.p_z(z).log_prob(z).sum((1, 2)) - exact
        self.assertLess(error.std().item(), 0.1)

    def test_shapes_of_odd_settings(self):
        for flags in (
            {"dim_z": 1, "num_ch": 1, "num_layers": 1, "d_hidden": 1},
            {"dim_z": 5, "num_ch": 7, "num_layers": 7, "d_hidden": 3},
        ):
            model, f, x = build(images=3, prior="ar1", delta=1.0, **flags)
            units = N * flags["dim_z"]
            terms = model.train()(x, f)
            self.check_shapes(terms, {"log_px_z": (3,), "kl": (3, units)})
            with torch.no_grad():
                terms = model.eval()(x, f, (2,))
            expected = {
                "log_px_z": (2, 3),
                "kl": (3, units),
                "log_w": (2, 3),
                "rate_auxiliary": (2, 3),
                "elbo_auxiliary": (2, 3),
                "smallest_rate": (2, 3),
                "mean": (3, units),
            }
            self.check_shapes(terms, expected)

    def check_shapes(self, terms, expected):
        self.assertEqual({name: tuple(value.shape) for name, value in terms.items()}, expected)

    @torch.no_grad()
    def test_pictures(self):
        """They are binary images, the test images first."""
        model, f, x = build(images=3, dim_z=1, num_ch=1, num_layers=1, d_hidden=1)
        panels = [*model.reconstructions(x, f).values(), *model.samples(3, f).values()]
        self.assertEqual([tuple(batch.shape) for batch in panels], 4 * [(3, 1, N, N)])
        self.assertTrue(torch.equal(panels[0], x))
        self.assertLessEqual(set(torch.stack(panels).unique().tolist()), {0.0, 1.0})


class Residuals(unittest.TestCase):
    """What headroom.py needs: pixels minus their probabilities given the true pixels before."""

    @torch.no_grad()
    def test_residuals_at_given_z(self):
        """Grey images are binarised once. The probabilities are computed draw by draw."""
        for prior in ("ar1", "standard"):
            model, f, x = build(prior=prior, beta=0.7)
            z = torch.randn(2, 4, N, 2, generator=torch.Generator().manual_seed(2), dtype=D)
            shapes = []

            def given(q_z, sample_shape):
                shapes.append((q_z.mean.shape, sample_shape))
                return z

            torch.manual_seed(3)
            with mock.patch.object(delta_vae, "draw", given):
                residuals = model.residuals((x + 0.5) / 2, f, 4)
            self.assertEqual(shapes, [((4, N, 2), (2,))])
            self.assertEqual(list(residuals), [""])
            residual = residuals[""]
            [binary] = residual.encoder_input
            self.assertEqual(set(binary.unique().tolist()), {0.0, 1.0})

            images = binary.view(4, 1, N, N)
            self.assertFalse(torch.equal(images, x))
            context = model.decoder.vertical(images)
            logits = [model.decoder.horizontal(images, draw[None], context)[0] for draw in z]
            p = torch.stack(logits).flatten(2).sigmoid()
            torch.testing.assert_close(residual.residual, binary - p)
            torch.testing.assert_close(residual.fisher, (p * (1 - p)).mean(0))
            self.assertEqual(residual.likelihood, "bernoulli")
            self.assertEqual((float(residual.beta), float(residual.weight)), (f.beta.item(), 1))

    @torch.no_grad()
    def test_posterior_reads_the_binary_images(self):
        """The recurrent layer reads them from the last row up."""
        model, f, x = build()
        read = []
        model.rows_to_h.register_forward_pre_hook(lambda gru, inputs: read.append(inputs[0]))
        [binary] = model.residuals((x + 0.5) / 2, f, 4)[""].encoder_input
        self.assertTrue(torch.equal(read[0], binary.view(4, N, N).flip(1)))

    @torch.no_grad()
    def test_mean_of_many_calls(self):
        """Both estimates have the mean of other draws of z, and draws of their own."""
        model, f, x = build(images=2, num_layers=1, prior="standard")
        torch.manual_seed(0)
        draws = torch.stack([model.residuals(x, f, 4)[""].residual for _ in range(300)])
        z = model.q_z(x).sample((2000,))
        context = model.decoder.vertical(x)
        p = model.decoder.horizontal(x, z, context).sigmoid().flatten(2)
        expected = x.flatten(1) - p
        error = (expected.var(0) / 300 + expected.var(0) / 2000).sqrt()
        for estimate in (0, 1):
            difference = draws[:, estimate].mean(0) - expected.mean(0)
            self.assertLess((difference.abs() / error).max().item(), 5)
        self.assertLess(error.max().item(), 0.03)
        small.check_independent(self, draws.numpy())

    def test_factor_of_the_prior(self):
        """It is the largest eigenvalue of S^(-1) R S^(-1), with R_ts = alpha^|t-s|, by numpy."""
        for delta, dim_z in ((0.5, 2), (5.0, 2), (30.0, 3)):
            model, f, x = build(images=1, delta=delta, dim_z=dim_z)
            residual = model.residuals(x, f, 4)[""]
            alpha, prior_var, _ = ar1(delta, dim_z, N)
            steps = np.arange(N)
            covariance = alpha ** np.abs(steps[:, None] - steps)
            std = closest_variance(alpha, prior_var).sqrt().squeeze(1).numpy()
            expected = np.linalg.eigvalsh(covariance / std[:, None] / std)[-1]
            self.assertAlmostEqual(residual.sequence_factor / expected, 1, places=6)
            self.assertGreater(expected, 1)
            self.assertEqual((residual.counts_means, residual.sequence_length), (True, N))

        model, f, x = build(images=1, prior="standard")
        residual = model.residuals(x, f, 4)[""]
        self.assertEqual(residual.sequence_factor, 1)
        self.assertEqual((residual.counts_means, residual.sequence_length), (False, 1))

    def test_factor_is_how_cheap_the_best_means_are(self):
        """Means S v cost at least |v|^2 / (2 factor) nats above delta, for any v.

        The eigenvector of the factor costs exactly this.
        """
        model, f, x = build(images=1, delta=5.0)
        factor = model.residuals(x, f, 4)[""].sequence_factor
        alpha, prior_var, covariance = ar1(5.0, 2, N)
        std = closest_variance(alpha, prior_var).sqrt()
        _, vectors = torch.linalg.eigh(covariance / std / std.T)
        random = torch.randn(500, N, generator=torch.Generator().manual_seed(1), dtype=D)

        def cost(v):
            """What the means S v of one unit cost in nats, (n,), times 2 / |v|^2."""
            means = std * v[..., None]
            kl = delta_vae.kl_to_ar1(means, std.expand_as(means), alpha, prior_var)
            least = delta_vae.kl_to_ar1(0 * means, std.expand_as(means), alpha, prior_var)
            return 2 * (kl - least).sum((1, 2)) / v.square().sum(1)

        self.assertAlmostEqual(cost(vectors.T[-1:]).item() * factor, 1, places=6)
        self.assertGreater(cost(random).min().item() * factor, 1)

    @torch.no_grad()
    def test_collapsed_sequences(self):
        """An AR(1) prior allows no KL of 0, so that units whose mean does not vary are counted.

        Where z does not reach the pixels, the prior multiplies every rho by its factor.
        """
        levels = {}
        factors = {}
        for prior in ("ar1", "standard"):
            model, f, x = build(
                images=1000, prior=prior, num_ch=1, num_layers=1, dtype=torch.float32)
            for weight in (*model.h_to_z.parameters(), model.decoder.z_to_h.weight):
                weight.zero_()
            data = datasets.Data("random", (x,), (x[:20],))
            setting = delta_vae.Flags(prior=prior, num_samples=0, device="cpu")
            with mock.patch("sys.stderr"):
                metrics, examples = report.evaluate(model, setting, data)
            level = headroom.measure(model, setting, data, metrics, examples)["z"]
            self.assertEqual((level.units, level.collapsed), (2 * N, 2 * N))
            self.assertEqual(level.theta, [])
            levels[prior] = level
            factors[prior] = model.residuals(x[:1], f, 4)[""].sequence_factor
            # By their KL, all units of the AR(1) prior would be active.
            self.assertEqual(metrics["AU_kl"], 2 * N if prior == "ar1" else 0)

        self.assertGreater(factors["ar1"], 1)
        for name in ("tau", "tau_any"):
            with_prior = np.array(getattr(levels["ar1"], name))
            without = np.array(getattr(levels["standard"], name))
            np.testing.assert_allclose(with_prior, factors["ar1"] * without, rtol=1e-4)


class ExactDecoder(unittest.TestCase):
    """Images that an autoregressive decoder has drawn itself, so that it is exactly right.

    The residual of a pixel then has the mean 0 given all pixels before it. So the residuals of
    different pixels are not correlated, and E[r_i^2] is the Fisher information H_i: every
    eigenvalue of H^(-1/2) F H^(-1/2) is 1.
    """

    SIDE = 5
    IMAGES = 8000

    @classmethod
    @torch.no_grad()
    def setUpClass(cls):
        patch = mock.patch.multiple(delta_vae.DeltaVAE, n=cls.SIDE, width=cls.SIDE)
        patch.start()
        cls.addClassCleanup(patch.stop)
        model = cls.build_model()
        torch.manual_seed(2)
        cls.x = model.decoder.sample(torch.zeros(cls.IMAGES, cls.SIDE, 1, dtype=D))
        cls.data = datasets.Data("drawn", (cls.x,), (cls.x,))

    @classmethod
    def build_model(cls):
        """A small model whose decoder is far from its start and ignores z."""
        cls.f = delta_vae.Flags(
            prior="standard", dim_z=1, num_ch=4, num_layers=2, d_hidden=2, device="cpu")
        x = torch.zeros(1, 1, cls.SIDE, cls.SIDE, dtype=D)
        data = datasets.Data("random", (x,), (x,))
        model = training.build(delta_vae.DeltaVAE, cls.f, data).eval()
        random = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for p in model.decoder.parameters():
                p += torch.randn(p.shape, generator=random, dtype=D)
            model.decoder.h_to_x[-1].weight.mul_(2)
            model.decoder.z_to_h.weight.zero_()
        return model

    def setUp(self):
        self.model = self.build_model()

    def scores(self):
        """How far F and H of the model are apart, in standard errors.

        Returns (the largest distance of E[r_i r_j] from 0, that of E[r_i^2] from H_i).
        """
        residual = self.model.residuals(self.x, self.f, 1)[""]
        r, other = residual.residual
        self.assertTrue(torch.equal(r, other))
        n = len(r)
        covariance = r.T @ r / n
        error = ((r**2).T @ r**2 / n - covariance**2).sqrt() / n**0.5
        pairs = torch.ones_like(covariance).triu(1).bool()
        off_diagonal = (covariance / error)[pairs].abs().max().item()
        excess = r**2 - residual.fisher
        diagonal = (excess.mean(0) / excess.std(0)).abs().max().item() * n**0.5
        return off_diagonal, diagonal

    @torch.no_grad()
    def test_residuals_of_different_pixels_are_not_correlated(self):
        # Pixels depend on each other, and no pixel is nearly certain.
        correlation = np.corrcoef(self.x.flatten(1).numpy().T) - np.eye(self.SIDE**2)
        self.assertGreater(np.abs(correlation).max(), 0.1)
        self.assertGreater(self.x.mean(0).min().item(), 0.02)
        self.assertLess(self.x.mean(0).max().item(), 0.98)

        off_diagonal, diagonal = self.scores()
        # 300 pairs: the largest distance is expected at 3.
        self.assertLess(off_diagonal, 5)
        self.assertLess(diagonal, 5)

    @torch.no_grad()
    def test_every_rho_of_f_is_1(self):
        """T is smaller, since the residual is not linear in the pixels."""
        moments = headroom.residual_moments(self.model, self.f, self.data)[""]
        linear, any_encoder = moments.ratios[0]
        self.assertEqual(len(any_encoder), self.SIDE**2)
        np.testing.assert_allclose(any_encoder, 1, atol=0.1)
        self.assertLess(linear.mean().item(), any_encoder.mean().item() - 0.01)

    @torch.no_grad()
    def test_a_wrong_decoder_is_noticed(self):
        """It reads no row above. Then residuals are correlated, and rho_1 of F exceeds 1."""
        for layer in self.model.decoder.v_to_h:
            layer.weight.zero_()
        off_diagonal, _ = self.scores()
        self.assertGreater(off_diagonal, 10)
        moments = headroom.residual_moments(self.model, self.f, self.data)[""]
        self.assertGreater(moments.ratios[0][1][0].item(), 1.2)


class Causality(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.model, cls.f, cls.x = build(images=1, num_layers=5)
        random = torch.Generator().manual_seed(3)
        cls.z = torch.randn(1, 1, N, 2, generator=random, dtype=D)

    def logits(self, model, x, z):
        """The logits (28, 28) of one image."""
        return model.decoder.horizontal(x, z, model.decoder.vertical(x))[0, 0, 0]

    def test_a_pixel_sees_all_earlier_pixels_and_no_other(self):
        """They are earlier in reading order. With five layers or more there is no blind spot.

        So a pixel also sees those above and to the right.
        """
        x = self.x.clone().requires_grad_()
        logits = self.logits(self.model, x, self.z)
        pixels = ((0, 0), (0, 1), (1, 0), (1, 27), (9, 20), (14, 3), (27, 0), (27, 27))
        for i, j in pixels:
            (gradient,) = torch.autograd.grad(logits[i, j], x, retain_graph=True)
            visible = gradient.flatten().nonzero().flatten().tolist()
            self.assertEqual(visible, list(range(N * i + j)), (i, j))

    def test_fewer_layers_see_all_within_reach(self):
        """A pixel sees a strip to the left, and a rectangle above as wide to either side.

        The reach comes from the dilations 1, 2, 4, ... and the first kernels' own 1 and 2.
        """
        for num_layers in (1, 2, 3):
            model, _, x = build(images=1, num_layers=num_layers)
            x = x.requires_grad_()
            logits = self.logits(model, x, self.z)
            (gradient,) = torch.autograd.grad(logits[14, 9], x)
            reach = 2**num_layers
            expected = torch.zeros(N, N, dtype=torch.bool)
            expected[14, 9 - reach - 1 : 9] = True
            expected[14 - reach - 1 : 14, 9 - reach : 9 + reach + 1] = True
            self.assertTrue(torch.equal(gradient[0, 0] != 0, expected), num_layers)

    def test_a_row_sees_its_own_z(self):
        z = self.z.clone().requires_grad_()
        logits = self.logits(self.model, self.x, z)
        for i, j in ((0, 0), (0, 27), (13, 5), (27, 27)):
            (gradient,) = torch.autograd.grad(logits[i, j], z, retain_graph=True)
            self.assertTrue((gradient[0, 0, i] != 0).all())
            visible = gradient[0, 0].any(-1).nonzero().flatten().tolist()
            self.assertEqual(visible, [i])

    def test_z_reads_its_row_and_those_below(self):
        x = self.x.clone().requires_grad_()
        q_z = self.model.q_z(x)
        for t, parameter in itertools.product((0, 1, 13, 27), (q_z.mean, q_z.stddev)):
            for unit in parameter[0, t]:
                (gradient,) = torch.autograd.grad(unit, x, retain_graph=True)
                visible = (gradient[0, 0] != 0).any(-1).nonzero().flatten().tolist()
                self.assertEqual(visible, list(range(t, N)))

    def test_the_auxiliary_prior_reads_earlier_steps(self):
        z = self.z[0].clone().requires_grad_()
        p_z, _ = self.model.auxiliary.following(delta_vae.before(z))
        for t, parameter in itertools.product((0, 1, 13, 27), (p_z.mean, p_z.stddev)):
            (gradient,) = torch.autograd.grad(
                parameter[0, t].sum(), z, retain_graph=True, materialize_grads=True)
            visible = (gradient[0] != 0).all(-1).nonzero().flatten().tolist()
            self.assertEqual(visible, list(range(t)))

    @torch.no_grad()
    def test_probabilities_of_all_images_add_up_to_one(self):
        """The sum is over all images of 3x3 pixels.

        It would differ from one if the decoder saw a pixel before it scores it.
        """
        torch.manual_seed(0)
        decoder = delta_vae.Decoder(2, 4, 3, 3).double()
        for p in decoder.parameters():
            p += torch.randn_like(p)
        x = torch.tensor(list(itertools.product((0.0, 1.0), repeat=9)), dtype=D)
        x = x.view(512, 1, 3, 3)
        z = torch.randn(1, 1, 3, 2, dtype=D).expand(1, 512, 3, 2)
        logits = decoder.horizontal(x, z, decoder.vertical(x))[0]
        log_px = Bernoulli(logits=logits).log_prob(x).sum((1, 2, 3))
        self.assertAlmostEqual(log_px.exp().sum().item(), 1, delta=1e-12)
        # The distribution is far from uniform.
        self.assertGreater(log_px.std().item(), 0.5)


class Sampling(unittest.TestCase):
    @torch.no_grad()
    def test_pixels_are_drawn_with_the_probabilities_that_score_them(self):
        """One full pass over the sampled images gives them, at the same uniform numbers."""
        model, f, _ = build(num_layers=3)
        z = torch.randn(5, N, 2, generator=torch.Generator().manual_seed(3), dtype=D)
        torch.manual_seed(4)
        x = model.decoder.sample(z)

        torch.manual_seed(4)
        uniform = [torch.rand(5, 1, dtype=D) for _ in range(N * N)]
        uniform = torch.stack(uniform, -1).view(5, 1, N, N)
        logits = model.decoder.horizontal(x, z[None], model.decoder.vertical(x))[0]
        self.assertTrue(torch.equal(x, (uniform < logits.sigmoid()).double()))
        self.assertGreater(x.mean().item(), 0.05)
        self.assertLess(x.mean().item(), 0.95)

    @torch.no_grad()
    def test_auxiliary_draws_have_the_density_that_scores_them(self):
        """Standardised by one full pass, the draws are the noise that they were made of."""
        model, f, _ = build()
        torch.manual_seed(4)
        z = model.auxiliary.sample(6)

        torch.manual_seed(4)
        noise = torch.cat([torch.randn(6, 1, 2, dtype=D) for _ in range(N)], 1)
        p_z, _ = model.auxiliary.following(delta_vae.before(z))
        torch.testing.assert_close((z - p_z.mean) / p_z.stddev, noise)
        torch.testing.assert_close(model.auxiliary(z), p_z.log_prob(z).sum((1, 2)))


class Auxiliary(small.InFolder):
    @torch.no_grad()
    def test_starts_as_the_own_prior(self):
        for prior in ("ar1", "standard"):
            model, f, x = build(spread=0.0, prior=prior)
            terms = model(x, f, (5,))
            expected = terms["log_px_z"] - terms["log_w"]
            torch.testing.assert_close(terms["rate_auxiliary"], expected)

    @torch.no_grad()
    def test_rate_is_that_of_a_divergence(self):
        """E_q[log q(z|x) - log p_aux(z)] is positive for each x."""
        model, f, x = build(num_ch=1, num_layers=1)
        torch.manual_seed(0)
        rate = model(x, f, (200,))["rate_auxiliary"]
        self.assertGreater((rate.mean(0) * len(rate) ** 0.5 / rate.std(0)).min().item(), 4)

    @torch.no_grad()
    def test_rate_is_0_where_the_auxiliary_prior_is_the_posterior(self):
        """It is 0 at every draw. The means and raw stds of z_t do not depend on x here."""
        model, f, x = build(prior="standard", spread=0.0)
        model.h_to_z.weight.zero_()
        model.h_to_z.bias.copy_(torch.tensor([0.3, -1.0, 0.5, -0.5]))
        model.auxiliary.of_step.copy_(model.h_to_z.bias.expand(N, 4))
        rate = model(x, f, (5,))["rate_auxiliary"]
        torch.testing.assert_close(rate, torch.zeros(5, 4, dtype=D))

    def trained(self, auxiliary_epochs):
        """A TrainedRun with this number of epochs in the second phase, and its WeightAverage."""
        images, _ = datasets.draw_digits(96, seed=3)
        x = torch.from_numpy(images).view(-1, 1, N, N).float() / 255
        data = datasets.Data("digits", (x,), (x[:8].round(),))
        f = delta_vae.Flags(
            dim_z=2,
            num_ch=2,
            num_layers=1,
            d_hidden=4,
            batch_size=24,
            num_epochs=2,
            warmup_epochs=0.5,
            ema=0.5,
            delta=8.0,
            auxiliary_epochs=auxiliary_epochs,
            device="cpu",
            out_dir=str(self.folder),
        )
        averages = []
        WeightAverage = deep.WeightAverage

        def noted(*args):
            averages.append(WeightAverage(*args))
            return averages[-1]

        with contextlib.redirect_stderr(io.StringIO()):
            with mock.patch.object(deep, "WeightAverage", noted):
                [run] = training.fit(
                    delta_vae.DeltaVAE, [f], [data], train=delta_vae.train)
        [average] = averages
        return run, average

    def test_training(self):
        """The second phase moves the auxiliary prior only. The averaged model is evaluated."""
        short, _ = self.trained(auxiliary_epochs=1)
        long, average = self.trained(auxiliary_epochs=6)
        self.assertIs(long.model, average.module)
        self.assertTrue(average.begun)

        # 1. The weights: everything except the auxiliary prior comes from the first phase.
        long_weights = long.model.state_dict()
        for name, value in short.model.state_dict().items():
            is_same = torch.equal(value, long_weights[name])
            self.assertEqual(is_same, not name.startswith("auxiliary"), name)

        # 2. The curves of both phases.
        curves = files.read_matching(long.f, long.data, "training.json")["curves"]
        self.assertEqual(curves, long.record.curves)
        lengths = {name: len(curve) for name, curve in curves.items()}
        expected = {"loss": 2, "reconstruction": 2, "kl": 2, "auxiliary loss": 6}
        self.assertEqual(lengths, expected)
        self.assertGreaterEqual(min(curves["kl"]), 8 - 1e-4)
        self.assertLess(curves["auxiliary loss"][-1], curves["auxiliary loss"][0])


class CommandLine(small.InFolder):
    def test_refuses_what_it_cannot_do(self):
        cases = (
            (["--delta", "1000"], "--delta: got 1000.0, wants at most 72.9 for --dim_z 4"),
            (
                ["--delta", "5,20", "--dim_z", "1"],
                "--delta: got 20.0, wants at most 18.2 for --dim_z 1",
            ),
            (["--delta", "0"], "--delta: got '0', wants a number above 0"),
            (["--dataset", "cifar10"], "--dataset: got 'cifar10'"),
            (["--prior", "ar2"], "--prior: got 'ar2', wants one of ar1, standard"),
        )
        for argv, message in cases:
            status, out, err = small.call(delta_vae.main, *argv, "--out_dir", self.folder)
            self.assertEqual((status, out), (2, ""))
            self.assertIn(message, err)
            self.assertEqual(len(err.strip().split("\n")), 1)
        self.assertEqual(list(self.folder.iterdir()), [])


if __name__ == "__main__":
    unittest.main()
