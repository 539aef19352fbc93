"""MNIST_HVAE_DVP: the maps to pseudoinputs, the diffusion model's bound, and the terms of the ELBO.

The bound is checked against exact densities.
"""
import contextlib
import dataclasses
import functools
import inspect
import io
import math
import types
import unittest
from unittest import mock

import common
import numpy as np
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import datasets
import deep
import MNIST_HVAE_DCT as dct
import MNIST_HVAE_DVP as dvp
import MNIST_HVAE_Ladder as ladder
import processes
import report
import training
from tests import small
from tests.test_ladder import mean_over_squares, posterior_mean

D = torch.float64
GAMMA_0, GAMMA_1 = -6.0, 7.0
ALPHA_1_SQUARED = 1 / (1 + math.exp(GAMMA_1))
SIGMA_1_SQUARED = 1 / (1 + math.exp(-GAMMA_1))

# A setting that trains in no time.
TINY = {"dataset": "digits", "latents": "2,1", "num_ch": 4, "context_size": 3, "device": "cpu"}


def grey_images(n, dataset="digits", seed=3):
    """Images of a data set's shape, (n, c_x, H, H): drawn digits, or noise for cifar10."""
    if dataset == "cifar10":
        random = torch.Generator().manual_seed(seed)
        return torch.rand(n, 3, 32, 32, generator=random, dtype=D)
    images, _ = datasets.draw_digits(n, seed)
    return torch.from_numpy(images).view(n, 1, 28, 28).to(D) / 255


def build(n=4, train=True, spread=0.3, **flags):
    """A small float64 model with weights far from their start, its setting, and n images for it."""
    f = dvp.Flags(**(TINY | {"num_steps": 4} | flags))
    x = mean_over_squares(grey_images(64, f.dataset), deep.image_shape(f)[1])
    model = training.build(dvp.DVPVAE, f, datasets.Data(f.dataset, (x,), (x,)))
    model.context.fit(x)
    with torch.no_grad():
        for part in (model.encoder, model.latents, model.z_to_x):
            small.moved(part, spread)
        small.moved(model.r, 0.1)
        for latent in model.latents:
            for head in (latent.s_to_p, latent.s_to_q):
                # The means and variances of priors and posteriors depend more on the state, but
                # not so much that all log-variances are clamped.
                head.block[-1].weight.mul_(3)
                head.linear.weight.mul_(0.3)
    x = x[:n] if f.dataset == "cifar10" else x[:n].round()
    return model.train(train), common.on_device(f, x), x


def make_context(kind, k, train=None):
    """A Context with pseudoinputs of k x k, measured on training images if there are any."""
    f = dvp.Flags(dataset="digits", context=kind, context_size=k, device="cpu")
    context = dvp.Context(f).to(D)
    if train is not None:
        context.fit(train)
    return context


def names_without_gradient(model):
    """The parameters that a backward pass has not reached."""
    names = []
    for name, p in model.named_parameters():
        if p.grad is None or not p.grad.any():
            names.append(name)
    return names


def sum_of_squares(x):
    """The sum of squares of each image, (B,)."""
    return x.square().sum((1, 2, 3))


class Contexts(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.x = grey_images(200)

    def test_dct_is_its_defining_sum(self):
        """c_a c_b sum_ij x_ij cos(pi a (2i + 1) / 2H) cos(pi b (2j + 1) / 2H).

        c_0^2 = 1/H, else c_a^2 = 2/H.
        """
        x = self.x[:3]
        # Before training, the extent is 1/2.
        y = make_context("dct", 7)(x) * 0.5

        def factor(a, i):
            return math.sqrt((2 if a else 1) / 28) * math.cos(math.pi * a * (2 * i + 1) / 56)

        for a, b in ((0, 0), (0, 3), (1, 0), (6, 6), (4, 5)):
            expected = 0
            for i in range(28):
                for j in range(28):
                    expected = expected + factor(a, i) * factor(b, j) * x[:, 0, i, j]
            torch.testing.assert_close(y[:, 0, a, b], expected, rtol=0, atol=2e-6)

    def test_dct_of_all_frequencies_keeps_all(self):
        """Parseval's theorem, and the inverse."""
        whole = make_context("dct", 28, self.x)
        y = whole(self.x) * whole.extent.view(28, 28)
        torch.testing.assert_close(sum_of_squares(y), sum_of_squares(self.x), rtol=1e-5, atol=0)
        torch.testing.assert_close(whole.image(whole(self.x)), self.x, rtol=0, atol=1e-5)

    def test_dct_of_low_frequencies_is_a_projection(self):
        """What the image of the corner keeps and what it loses add up to the whole."""
        whole = make_context("dct", 28, self.x)
        y = whole(self.x) * whole.extent.view(28, 28)
        corner = make_context("dct", 7, self.x)
        low = corner.image(corner(self.x))
        lost = sum_of_squares(self.x - low)
        kept = sum_of_squares(low)
        torch.testing.assert_close(kept, sum_of_squares(y[:, :, :7, :7]), rtol=1e-5, atol=0)
        torch.testing.assert_close(lost + kept, sum_of_squares(self.x), rtol=1e-5, atol=0)

    def test_downsampling_is_the_mean_of_squares(self):
        context = make_context("downsample", 7, self.x)
        means = []
        for i in range(0, 28, 4):
            for j in range(0, 28, 4):
                means.append(self.x[:, 0, i : i + 4, j : j + 4].mean((1, 2)))
        means = torch.stack(means, 1)
        u = context(self.x)
        torch.testing.assert_close(u.flatten(1), 2 * means - 1, rtol=0, atol=1e-5)
        # The square in row 2 and column 3.
        square = context.image(u)[:, 0, 8:12, 12:16]
        expected = means[:, 2 * 7 + 3].view(-1, 1, 1).expand(-1, 4, 4)
        torch.testing.assert_close(square, expected, rtol=0, atol=1e-5)

    def test_linear_keeps_what_no_other_linear_map_can(self):
        """Eckart & Young: the loss is a sum of squared singular values of the training images.

        They are the smaller ones.
        """

        def lost(context):
            return (self.x - context.image(context(self.x))).square().sum()

        linear = make_context("linear", 4, self.x)
        singular_values = torch.linalg.svdvals(self.x.flatten(1))
        expected = singular_values[16:].square().sum()
        torch.testing.assert_close(lost(linear), expected, rtol=1e-5, atol=0)
        for other in ("dct", "downsample"):
            self.assertLess(lost(linear), 0.9 * lost(make_context(other, 4, self.x)))

    def test_log_density_of_a_gaussian_with_the_moments_of_the_training_set(self):
        """It is log N(u; mean, covariance + exp(GAMMA_0) I), by a density from torch."""
        context = make_context("dct", 3, self.x)
        u = context(self.x)
        covariance = torch.from_numpy(np.cov(u.flatten(1).numpy().T))
        covariance = covariance + math.exp(GAMMA_0) * torch.eye(9, dtype=D)
        gaussian = MultivariateNormal(u.mean(0).flatten(), covariance)
        expected = gaussian.log_prob(u.flatten(1))
        torch.testing.assert_close(context.log_gaussian(u), expected, rtol=1e-4, atol=1e-3)

    def test_scale_and_inverse(self):
        """f(x) is within [-1, 1] on the training set, and f(image of u) = u.

        dct and linear reach the ends of [-1, 1]. Some sizes do not divide the image's side.
        """
        random = torch.Generator().manual_seed(0)
        cases = (
            ("dct", 7),
            ("downsample", 7),
            ("linear", 7),
            ("dct", 1),
            ("downsample", 5),
            ("linear", 3),
        )
        for kind, k in cases:
            context = make_context(kind, k, self.x)
            u = context(self.x)
            largest = u.abs().amax(0)
            self.assertLessEqual(largest.max().item(), 1 + 1e-6)
            if kind != "downsample":
                torch.testing.assert_close(largest, torch.ones_like(largest))
            torch.testing.assert_close(context.mean, u.mean(0))
            torch.testing.assert_close(context.std, u.std(0).clamp(min=math.exp(-3)))

            u = 2 * torch.rand(5, 1, k, k, generator=random, dtype=D) - 1
            self.assertEqual(tuple(context.image(u).shape), (5, 1, 28, 28))
            torch.testing.assert_close(context(context.image(u)), u, rtol=0, atol=1e-5)


def standardised_noise(n, count, shape, seed=0):
    """`count` noises (n, *shape) whose moments over the n rows are exact.

    Their means, variances and covariances are 0, 1 and 0. So the mean over rows of what is
    quadratic in them is its expectation.
    """
    random = torch.Generator().manual_seed(seed)
    columns = count * math.prod(shape)
    noise = torch.randn(n, columns, generator=random, dtype=D)
    rows = torch.cat([torch.ones(n, 1, dtype=D), noise], 1)
    noise = torch.linalg.qr(rows).Q[:, 1:] * math.sqrt(n)
    return list(noise.T.reshape(count, *shape, n).movedim(-1, 1))


class Optimum(dvp.Diffusion):
    """The best eps^ if u ~ N(m, s^2 I):

    E[eps|z_t] = sigma_t (z_t - alpha_t m) / (alpha_t^2 s^2 + sigma_t^2)
    """

    def __init__(self, m, s):
        super().__init__(1, 2)
        self.m = m
        self.s = s
        self.double()

    def epsilon(self, z, t):
        alpha, sigma = self.alpha_sigma(t)
        return sigma * (z - alpha * self.m) / (alpha**2 * self.s**2 + sigma**2)

    def entropy(self):
        """The entropy of N(m, s^2)."""
        return math.log(2 * math.pi * math.e * self.s**2) / 2

    def excess(self):
        """What the bound exceeds the entropy of N(m, s^2) by, for T to infinity.

        It is E KL(q(u|z_0) || p(u|z_0)), since the variance of p(u|z_0) is not the posterior's,
        plus KL(q(z_1) || p(z_1)).
        """
        mean = torch.tensor(math.sqrt(ALPHA_1_SQUARED) * self.m, dtype=D)
        std = torch.tensor(math.sqrt(ALPHA_1_SQUARED * self.s**2 + SIGMA_1_SQUARED), dtype=D)
        standard = Normal(torch.zeros((), dtype=D), torch.ones((), dtype=D))
        kl_1 = kl_divergence(Normal(mean, std), standard).item()
        return math.log1p(math.exp(GAMMA_0) / self.s**2) / 2 + kl_1


class Bound(unittest.TestCase):
    """The bound on E[-log r(u)] per coefficient, if u is Gaussian and eps^ the optimum.

    Then E[|eps - eps^|^2] = s^2 / (s^2 + exp gamma), and the terms of every t are known.
    """

    def test_training_estimate_is_the_limit(self):
        """The mean of `loss` is over t, by Gauss-Legendre, and over noise and u.

        Noise and u are all pairs of signs, so that the means of squares are exact.
        """
        nodes, weights = np.polynomial.legendre.leggauss(64)
        t = (torch.tensor(nodes, dtype=D) + 1) / 2
        weights = torch.tensor(weights, dtype=D) / 2
        times = t.repeat_interleave(4).view(-1, 1, 1, 1)
        u = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=D).repeat(64).view(-1, 1, 1, 1)
        noise = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=D).repeat(64).view(-1, 1, 1, 1)

        for optimum in (Optimum(0.0, 1.0), Optimum(0.3, 0.2), Optimum(-0.5, 2.0)):
            with mock.patch.object(processes, "uniform_like", side_effect=[times]):
                with mock.patch.object(processes, "normal_like", side_effect=[noise]):
                    loss = optimum.loss(optimum.m + optimum.s * u)
            mean = (loss.view(64, 4).mean(1) * weights).sum().item()
            self.assertAlmostEqual(mean, optimum.entropy() + optimum.excess(), places=8)

    @torch.no_grad()
    def test_bound_over_stratified_times(self):
        """`bound` has the mean of `loss` over independent times and noises, for a network.

        Its spread is no larger, and the standard error that it gives is no less than its spread.
        """
        torch.manual_seed(0)
        r = small.moved(dvp.Diffusion(1, 2).double(), 0.3).eval()
        u = 2 * torch.rand(2, 1, 3, 3, dtype=D) - 1
        loss = r.loss(u.repeat(50_000, 1, 1, 1)).unflatten(0, (50_000, 2))
        bounds = []
        errors = []
        for _ in range(60):
            bound, error = r.bound(u, 40)
            bounds.append(bound)
            errors.append(error)
        bounds = torch.stack(bounds)
        mean_error = torch.stack(errors).mean(0)

        variance = bounds.var(0) / 60 + loss.var(0) / len(loss)
        difference = (bounds.mean(0) - loss.mean(0)).abs()
        self.assertLess((difference / variance.sqrt()).max().item(), 4)
        independent = loss.flatten(2).sum(2).std(0) / math.sqrt(40)
        torch.testing.assert_close(mean_error, independent, rtol=0.15, atol=0)
        spread = bounds.flatten(2).sum(2).std(0)
        self.assertTrue((spread < 1.1 * mean_error).all())

    @torch.no_grad()
    def test_bound_does_not_depend_on_the_parts_it_is_computed_in(self):
        torch.manual_seed(0)
        r = small.moved(dvp.Diffusion(1, 2).double(), 0.3).eval()
        u = 2 * torch.rand(2, 1, 3, 3, dtype=D) - 1

        def constant_like(like):
            return torch.full_like(like, 0.3)

        results = []
        for rows in (2, 2**14):
            with contextlib.ExitStack() as patches:
                patches.enter_context(mock.patch.object(dvp, "ROWS_AT_ONCE", rows))
                patches.enter_context(mock.patch.object(processes, "normal_like", torch.ones_like))
                patches.enter_context(mock.patch.object(processes, "uniform_like", constant_like))
                results.append(r.bound(u, 7))
        (bound, error), (same_bound, same_error) = results
        torch.testing.assert_close(bound, same_bound)
        torch.testing.assert_close(error, same_error)

    def marginal_variance(self, T):
        """The variance of u by ancestral sampling, where eps^ = sigma_t z_t as at the start.

        Everything is linear in z there.
        """

        def alpha_sigma(i):
            gamma = GAMMA_0 + 13 * i / T
            return 1 / math.sqrt(1 + math.exp(gamma)), 1 / math.sqrt(1 + math.exp(-gamma))

        variance = 1.0
        for i in range(T, 0, -1):
            alpha, sigma = alpha_sigma(i)
            alpha_s, sigma_s = alpha_sigma(i - 1)
            ratio = alpha / alpha_s
            var_ts = sigma**2 - ratio**2 * sigma_s**2
            slope = ratio * sigma_s**2 / sigma**2
            slope = slope + alpha_s * var_ts / sigma**2 * (1 - sigma**2) / alpha
            variance = slope**2 * variance + var_ts * sigma_s**2 / sigma**2
        alpha, sigma = alpha_sigma(0)
        return (variance + sigma**2) / alpha**2

    @torch.no_grad()
    def test_samples_of_a_linear_network(self):
        r = dvp.Diffusion(1, c=2).double()
        for T in (3, 25):
            noises = standardised_noise(T + 4, T + 2, (1, 1, 1))
            with mock.patch.object(processes, "normal_like", side_effect=noises):
                sampled = r.sample(torch.zeros(T + 4, 1, 1, 1, dtype=D), T)
            variance = sampled.square().mean().item()
            self.assertAlmostEqual(variance, self.marginal_variance(T), places=9)


class Correlated(dvp.Diffusion):
    """The best eps^ if u ~ N(m, C): sigma_t (alpha_t^2 C + sigma_t^2 I)^-1 (z_t - alpha_t m).

    m and C are mean and covariance of the u (n, c_u, k, k) that it is given.
    """

    def __init__(self, u):
        super().__init__(1, 2)
        rows = u.flatten(1)
        self.shape = u.shape[1:]
        self.m = rows.mean(0)
        self.eigenvalues, self.axes = torch.linalg.eigh(torch.cov(rows.T))
        self.double()

    def epsilon(self, z, t):
        alpha, sigma = self.alpha_sigma(t.flatten(1))
        coordinates = (z.flatten(1) - alpha * self.m) @ self.axes
        variance = alpha**2 * self.eigenvalues + sigma**2
        return (sigma * coordinates / variance @ self.axes.T).view(z.shape)

    def draw(self, n):
        noise = torch.randn(n, len(self.m), dtype=D) * self.eigenvalues.sqrt()
        return (self.m + noise @ self.axes.T).view(n, *self.shape)

    def log_density(self, u):
        """log r(u) = log N(u; m, C + 2 exp(GAMMA_0) I).

        z_0 / alpha_0 has the variance exp(GAMMA_0), and so has u about it.
        """
        coordinates = (u.flatten(1) - self.m) @ self.axes
        std = (self.eigenvalues + 2 * math.exp(GAMMA_0)).sqrt()
        return Normal(torch.zeros_like(self.m), std).log_prob(coordinates).sum(1)


class GaussianPseudoinputs(unittest.TestCase):
    """Pseudoinputs are Gaussian, with mean and covariance of digits', and eps^ is exact."""

    @classmethod
    def setUpClass(cls):
        torch.manual_seed(3)
        images = grey_images(400)
        cls.r = Correlated(make_context("dct", 5, images)(images))
        cls.u = cls.r.draw(300)

    def test_bound(self):
        """E[bound] - E[-log r(u)] has a closed form.

        It is E[-log p(u|z_0)] + I(u; z_0) - E[-log r(u)], plus KL(q(z_1) || p(z_1)).
        """
        with torch.no_grad():
            bound, _ = self.r.bound(self.u, 100)
        slack = bound.flatten(1).sum(1) + self.r.log_density(self.u)
        error = slack.std().item() / len(slack) ** 0.5

        variances = self.r.eigenvalues
        noise = math.exp(GAMMA_0)
        var_r = variances + 2 * noise
        var_q = ALPHA_1_SQUARED * variances + SIGMA_1_SQUARED
        mean_q = self.r.axes.T @ self.r.m
        at_0 = 1 + ((variances + noise) / var_r).log() - variances / var_r
        at_1 = var_q + ALPHA_1_SQUARED * mean_q**2 - 1 - var_q.log()
        expected = (at_0 + at_1).sum() / 2
        self.assertLess(abs(slack.mean() - expected).item(), 4 * error)
        self.assertLess(error, 0.1 * expected.item())

    @torch.no_grad()
    def test_a_noisy_bound_within_the_logarithm_overstates_the_density(self):
        """The released program takes the log of the mean of exp(-bound).

        Each bound is at one time and noise. The result is above log r(u), by nats. The bound
        itself is not.
        """
        u = self.u[:40]
        losses = self.r.loss(u.repeat(1000, 1, 1, 1)).flatten(1).sum(1).view(1000, 40)
        log_mean_exp = (-losses).logsumexp(0) - math.log(1000)
        exact = self.r.log_density(u)
        self.assertGreater((log_mean_exp - exact).mean().item(), 5)
        self.assertLess((-losses.mean(0) - exact).mean().item(), 1)


class Shapes(unittest.TestCase):
    def test_shapes_at_odd_settings(self):
        cases = (
            {"latents": "0,1", "context_size": 1, "context": "downsample"},
            {"latents": "3", "context_size": 5},
            {
                "latents": "1,1",
                "num_ch": 1,
                "context": "linear",
                "context_size": 2,
                "num_steps": 1,
            },
            {
                "latents": "1,1,0,1",
                "dataset": "cifar10",
                "context_size": 7,
                "context": "downsample",
            },
            {"latents": "1,1", "d_z": 2, "d_hidden": 3},
            {"latents": "2", "side": 14, "context_size": 14},
            {"latents": "1", "side": 14, "context": "linear"},
            # An odd side is not halved, and a pseudoinput's side need not divide the image's.
            {"latents": "2", "side": 7, "context": "downsample"},
            {"latents": "1", "side": 1, "context_size": 1},
            {"latents": "1,1", "side": 16, "dataset": "cifar10"},
        )
        for flags in cases:
            with self.subTest(**flags):
                model, f, x = build(3, **flags)
                L = len(deep.latent_sides(f))
                self.assertEqual((model.levels, model.learned_levels), (L + 1, L))
                self.check_terms(model, f, x)
                self.check_images(model.eval(), f, x)

    def check_terms(self, model, f, x):
        sides = deep.latent_sides(f)
        L = len(sides)
        c_x = x.shape[1]
        units = {}
        for l in range(1, L + 1):
            units[f"_{l}"] = (f.d_z or c_x) * sides[L - l] ** 2
        units[f"_{L + 1}"] = c_x * f.context_size**2

        # 1. In training.
        expected = {"log_px_z": (3,)}
        for level, d in units.items():
            expected[f"kl{level}"] = (3, d)
        self.check_shapes(model.train()(x, f), expected)

        # 2. In evaluation. All draws share the mean of q(u|x).
        expected = {"log_px_z": (2, 3), "log_w": (2, 3)}
        for level, d in units.items():
            expected[f"kl{level}"] = (2, 3, d)
            expected[f"mean{level}"] = (2, 3, d)
        d_u = units[f"_{L + 1}"]
        expected[f"mean_{L + 1}"] = (3, d_u)
        with torch.no_grad():
            self.check_shapes(model.eval()(x, f, sample_shape=(2,)), expected)

        # 3. In evaluation with one u for all draws.
        expected |= {
            "log_w_u": (3,),
            "error_context": (3,),
            "context_baseline": (3,),
            f"kl_{L + 1}": (3, d_u),
        }
        few_pairs = functools.partial(model.r.bound, pairs=3)
        with torch.no_grad(), mock.patch.object(model.r, "bound", few_pairs):
            terms = model(x, f, sample_shape=(2,), **model.context_arguments(x, f))
        self.check_shapes(terms, expected)
        for name, value in terms.items():
            self.assertTrue(value.isfinite().all(), name)

    def check_shapes(self, terms, expected):
        shapes = {name: tuple(value.shape) for name, value in terms.items()}
        self.assertEqual(shapes, expected)

    @torch.no_grad()
    def check_images(self, model, f, x):
        samples = model.samples(5, f)
        self.assertEqual([len(batch) for batch in samples.values()], [5, 5])
        for panels in (samples, model.reconstructions(x, f)):
            for batch in panels.values():
                self.assertEqual(batch.shape[1:], x.shape[1:])
        sides = deep.latent_sides(f)
        shapes = [q.mean.shape for q in model.top_posterior(x, f, len(sides))]
        c_z = f.d_z or x.shape[1]
        self.assertEqual(shapes, [(3, c_z, side, side) for side in sides])

    def test_a_pseudoinput_larger_than_the_image_ends_the_program(self):
        """A VampPrior has no pseudoinputs of this size, so that it takes any --context_size."""
        words = ("--side", 4, "--latents", 1)
        status, out, err = small.call(dvp.main, *words)
        self.assertEqual((status, out, err.count("\n")), (2, "", 1))
        self.assertIn("--context_size: got 7, wants at most 4, the side of the images", err)
        words = [str(word) for word in (*words, "--prior", "vamp", "--device", "cpu")]
        [f] = common.parse_flags(dvp.Flags, words)
        self.assertEqual((f.side, f.context_size), (4, 7))


class Terms(unittest.TestCase):
    @torch.no_grad()
    def test_priors_read_the_mean_over_squares_of_the_image_of_u(self):
        """It has the side of the level, at several sides of the images."""
        cases = (("1,1", 28), ("1", 14), ("1", 7))
        for latents, side_of_image in cases:
            flags = {"latents": latents, "side": side_of_image}
            model, f, x = build(2, train=False, **flags)
            image = model.context.image(model.context(x))
            read = []

            def note(part, args):
                read.append(args[0])

            hooks = [latent.s_to_p.register_forward_pre_hook(note) for latent in model.latents]
            list(model.top_down(model.context(x), None, lambda l, p, q: p.mean))
            for hook in hooks:
                hook.remove()
            sides = deep.latent_sides(f)
            self.assertEqual([s.shape[-1] for s in read], sides)
            for side, s in zip(sides, read):
                torch.testing.assert_close(s[:, f.num_ch:], mean_over_squares(image, side))

    @torch.no_grad()
    def test_variance_of_the_pseudoinput(self):
        """Its log-variances are in [-12, -5] for any weights, and -entropy is in the KL."""
        model, f, x = build()
        model.raw_v.copy_(torch.linspace(-300, 300, 9).view(1, 3, 3))
        v = 2 * model.q_u(x).stddev.log()
        self.assertGreaterEqual(v.min().item(), -12 - 1e-9)
        self.assertLessEqual(v.max().item(), -5 + 1e-9)
        self.assertLess(v[0, 0, 0, 0].item(), -11.9)
        self.assertGreater(v[0, 0, 2, 2].item(), -5.1)
        torch.testing.assert_close(model.q_u(x).mean, model.context(x))
        with mock.patch.object(model.r, "loss", torch.zeros_like):
            kl = model(x, f)["kl_4"]
        entropy = (math.log(2 * math.pi * math.e) + v.flatten(1)) / 2
        torch.testing.assert_close(kl, -entropy)

    @torch.no_grad()
    def test_kls_are_those_of_draws(self):
        """KL_l is E[log q(z_l|...) - log p(z_l|...)], with the densities written out.

        The mean is over draws of everything above level l.
        """
        n = 600
        model, f, x = build(1, train=False)
        torch.manual_seed(0)
        terms = model(x, f, sample_shape=(n,))

        # 1. Draws of u, then of all latents.
        features = {}
        for side, e in model.encoder(x).items():
            features[side] = e.expand(n, -1, -1, -1)
        v = -12 + 7 / (1 + (-model.raw_v).exp())
        u = model.context(x) + (v / 2).exp() * torch.randn(n, 1, 3, 3, dtype=D)

        def choose(l, p, q):
            return q.mean + q.stddev * torch.randn_like(q.mean)

        drawn = list(model.top_down(u, features, choose))

        # 2. The log-ratios. Constants of both densities cancel.
        def log_density(normal, z):
            log_terms = -(((z - normal.mean) / normal.stddev) ** 2) / 2 - normal.stddev.log()
            return log_terms.flatten(1).sum(1)

        for l, (p, q, z) in zip((3, 2, 1), drawn):
            log_ratio = log_density(q, z) - log_density(p, z)
            kl = terms[f"kl_{l}"].sum(-1).flatten()
            error = ((log_ratio.var() + kl.var()) / n).sqrt().item()
            self.assertLess(abs(log_ratio.mean() - kl.mean()).item(), 4 * error)
            self.assertLess(error, 0.1 * kl.mean().item())

    @torch.no_grad()
    def test_log_w_has_the_mean_of_the_elbo(self):
        """E[log_w] = E[log p(x|z)] - sum of the learned levels' KLs.

        Each example is within four standard errors of the difference. They are small enough to
        show an error in one level's KL.
        """
        model, f, x = build(3, train=False, spread=0.15)
        torch.manual_seed(0)
        terms = model(x, f, sample_shape=(600,))
        difference = terms["log_w"] - terms["log_px_z"]
        for l in (1, 2, 3):
            difference = difference + terms[f"kl_{l}"].sum(-1)
        error = difference.std(0) / math.sqrt(len(difference))
        self.assertLess((difference.mean(0).abs() / error).max().item(), 4)
        for l in (1, 2, 3):
            kl = terms[f"kl_{l}"].sum(-1).mean(0)
            self.assertLess(error.max().item(), 0.2 * kl.abs().min().item())

    @torch.no_grad()
    def test_log_px_is_a_bound_in_u_and_an_estimate_given_it(self):
        """log p(x|u) is estimated by weights, all at one u, and KL(q(u|x) || r(u)) is subtracted.

        The metric error_context is the standard error that the KL's times bring.
        """
        # 1. The evaluation, in chunks of 16 draws of one image.
        model, f, x = build(3, train=False)
        model = model.float()
        data = datasets.Data("digits", (x.float(),), (x.float(),))
        settings = dvp.Flags(**TINY, num_samples=50)
        calls = []
        forward = model.forward

        def noted(*args, **arguments):
            terms = forward(*args, **arguments)
            calls.append((arguments["u"], terms))
            return terms

        chunk_bytes = 4 * 4 * 28**2 * 16
        with mock.patch.object(model, "forward", noted):
            with mock.patch.dict(report.CHUNK_BYTES, cpu=chunk_bytes):
                metrics, examples = report.evaluate(model, settings, data)
        # Three images, each with 16 + 16 + 16 + 2 draws.
        self.assertEqual(len(calls), 12)

        # 2. The estimate of each image.
        errors = []
        for i in range(3):
            chunks = calls[4 * i : 4 * i + 4]
            first_u, first_terms = chunks[0]
            for u, _ in chunks:
                self.assertTrue(torch.equal(u, first_u))
            log_w = torch.cat([terms["log_w"][:, 0] for _, terms in chunks])
            expected = log_w.logsumexp(0) - math.log(50) - first_terms["kl_4"].sum()
            self.assertAlmostEqual(examples["log_px"][i], expected.item(), delta=1e-3)
            errors.append(first_terms["error_context"])

        # 3. The standard error of the mean over images.
        expected = torch.stack(errors).square().sum().sqrt().item() / 3
        self.assertAlmostEqual(metrics["error_context"], expected, places=4)
        self.assertGreater(metrics["error_context"], 0)

    @torch.no_grad()
    def test_every_prior_reads_the_pseudoinput(self):
        """Each level reads it directly: no state carries anything of u down, since h is 0."""
        model, f, x = build()
        for latent in model.latents:
            for layer in (latent.s_to_p.block[-1], latent.s_to_p.linear):
                layer.weight[2:] = 0
                layer.bias[2:] = 0

        def priors(u):
            latents = model.top_down(u, None, lambda l, p, q: torch.zeros_like(p.mean))
            return [p for p, _, _ in latents]

        u = model.context(x)
        for p, same, other in zip(priors(u), priors(u), priors(u + 0.5)):
            self.assertTrue(torch.equal(p.mean, same.mean))
            mean_change = (p.mean - other.mean).abs().amax((1, 2, 3))
            std_change = (p.stddev - other.stddev).abs().amax((1, 2, 3))
            self.assertGreater(mean_change.min().item(), 1e-4)
            self.assertGreater(std_change.min().item(), 1e-4)

    @torch.no_grad()
    def test_units_of_the_means(self):
        """The training set's f(x) is in its standard deviations: mean 0 and variance 1."""
        model, f, _ = build(train=False)
        mean = model(grey_images(64), f)["mean_4"]
        torch.testing.assert_close(mean.mean(0), torch.zeros(9, dtype=D))
        torch.testing.assert_close(mean.std(0), torch.ones(9, dtype=D))

    @torch.no_grad()
    def test_reconstructions_keep_the_top_levels(self):
        model, f, x = build(train=False)
        images = [model.reconstruct(x, f, keep) for keep in range(model.levels + 1)]

        # 1. With keep = 0 everything comes from the prior, and nothing of x is left.
        for image in images[0]:
            torch.testing.assert_close(image, images[0][0])

        # 2. Each level changes the image. With all of them it is that of the posterior's means.
        for fewer, more in zip(images, images[1:]):
            self.assertGreater((fewer - more).abs().max().item(), 1e-4)
        zs = [q.mean for q in model.top_posterior(x, f, 3)]
        torch.testing.assert_close(images[-1], model.p_x(zs).mean)

        # 3. With keep = 1 the pseudoinput alone decides. Another image has the same one.
        other = model.context.image(model.context(x))
        torch.testing.assert_close(model.reconstruct(other, f, 1), images[1])
        difference = (model.reconstruct(other, f, 2) - images[2]).abs().max().item()
        self.assertGreater(difference, 1e-4)

    def test_attack_has_a_gradient(self):
        model, f, x = build(train=False)
        x = x.clone().requires_grad_()
        for q in model.top_posterior(x, f, 2):
            total = q.mean.sum() + q.stddev.sum()
            (gradient,) = torch.autograd.grad(total, x, retain_graph=True)
            self.assertTrue((gradient.flatten(1).norm(dim=1) > 0).all())


class Vamp(unittest.TestCase):
    """--prior vamp: the mixture of posteriors at trained pseudoinputs."""

    def setUp(self):
        f = dvp.Flags(
            dataset="digits",
            prior="vamp",
            pseudoinputs=5,
            latents="1,1",
            num_ch=4,
            device="cpu",
        )
        x = grey_images(64)
        model = training.build(dvp.model_of, f, datasets.Data("digits", (x,), (x,)))
        for part in (model.encoder, model.latents, model.z_to_x):
            small.moved(part, 0.2)
        model.begin_at(x)
        self.f = f
        self.model = model
        self.x = x
        self.scalars = common.on_device(f, x)

    def mixture_by_hand(self):
        """p(z_2) from its pseudoinputs, one by one.

        Returns its mean and std (49,), and a function from z (n, 1, 7, 7) to log p(z) (n,).
        """
        means = []
        variances = []
        self.model.train()
        for u in self.model.pseudoinputs():
            features = self.model.encoder(u[None])
            _, q, _ = next(self.model.top_down(1, features, posterior_mean))
            means.append(q.mean.flatten())
            variances.append(q.stddev.flatten() ** 2)
        means = torch.stack(means)
        variances = torch.stack(variances)
        mean = means.mean(0)
        std = (variances.mean(0) + (means - mean).square().mean(0)).sqrt()

        def log_prob(z):
            squares = (z.flatten(1)[:, None] - means) ** 2 / variances
            log_terms = squares + (2 * math.pi * variances).log()
            return (-log_terms.sum(2) / 2).exp().mean(1).log()

        return mean, std, log_prob

    def test_begins_at_training_images(self):
        expected = self.x[[0, 12, 25, 38, 51]].clamp(0.02, 0.98)
        torch.testing.assert_close(self.model.pseudoinputs(), expected)

    @torch.no_grad()
    def test_images_of_another_side(self):
        """The pseudoinputs have the side of the images, the top latents that of their scale."""
        for side, top in ((14, 7), (7, 7)):
            f = dataclasses.replace(self.f, latents="2", side=side)
            x = mean_over_squares(self.x, side)
            model = training.build(dvp.model_of, f, datasets.Data("digits", (x,), (x,)))
            model.begin_at(x)
            self.assertEqual(tuple(model.pseudoinputs().shape), (5, 1, side, side))
            model = model.settle().eval()
            self.assertEqual(tuple(model.top_mean.shape), (5, 1, top, top))
            terms = model(x[:2].round(), self.scalars, sample_shape=(3,))
            self.assertEqual(tuple(terms["kl_1"].shape), (3, 2, top**2))
            for batch in model.samples(4, f).values():
                self.assertEqual(tuple(batch.shape[1:]), (1, side, side))

    @torch.no_grad()
    def test_density_moments_and_draws(self):
        mean, std, log_prob = self.mixture_by_hand()
        p = self.model.train().top_prior()
        z = torch.randn(7, 1, 7, 7, dtype=D)
        torch.testing.assert_close(p.log_prob(z), log_prob(z))
        torch.testing.assert_close(p.mean.flatten(), mean)
        torch.testing.assert_close(p.stddev.flatten(), std)

        torch.manual_seed(0)
        drawn = p.draw(20_000, 1.0).flatten(1)
        errors = (drawn.mean(0) - mean).abs() / std * 20_000**0.5
        self.assertLess(errors.max().item(), 5)
        torch.testing.assert_close(drawn.std(0), std, rtol=0.05, atol=0)

        # At temperature 0 each draw is the mean of a component, and every component occurs.
        distance = (p.draw(200, 0.0).unsqueeze(1) - p.each.mean).flatten(2).norm(dim=2)
        self.assertEqual(distance.min(1).values.max().item(), 0)
        self.assertEqual(set(distance.argmin(1).tolist()), set(range(5)))

    @torch.no_grad()
    def test_terms(self):
        """The terms of the evaluation, after `settle`.

        They are the top level's term at each draw, log_w, and the KL of each unit to a Gaussian
        with the mixture's moments.
        """
        mean, std, log_prob = self.mixture_by_hand()
        model = self.model.settle().eval()
        x = self.x[:2].round()

        # 1. The terms, and the draws that they are computed at.
        draws = []
        draw = deep.draw

        def noted(q):
            z = draw(q)
            draws.append((q, z))
            return z

        with mock.patch.object(deep, "draw", noted):
            terms = model(x, self.scalars, sample_shape=(3,))
        (q, z), (q_1, z_1) = draws

        # 2. The top level.
        log_q = q.log_prob(z).flatten(1).sum(1)
        kl = (log_q - log_prob(z)).view(3, 2, 1)
        torch.testing.assert_close(terms["kl_2"], kl)
        matched = Normal(mean.view(1, 7, 7), std.view(1, 7, 7))
        unit_kl = kl_divergence(q, matched).flatten(1).view(3, 2, 49)
        torch.testing.assert_close(terms["unit_kl_2"], unit_kl)

        # 3. The importance weight.
        latents = list(model.top_down(6, None, lambda l, p, q: z if l == 2 else z_1))
        p_1, _, _ = latents[1]
        log_ratio_1 = (p_1.log_prob(z_1) - q_1.log_prob(z_1)).flatten(1).sum(1).view(3, 2)
        expected = terms["log_px_z"] + log_ratio_1 - kl[..., 0]
        torch.testing.assert_close(terms["log_w"], expected)

        # 4. All shapes.
        shapes = {name: tuple(value.shape) for name, value in terms.items()}
        units = {
            "log_px_z": (),
            "log_w": (),
            "kl_1": (196,),
            "mean_1": (196,),
            "kl_2": (1,),
            "unit_kl_2": (49,),
            "mean_2": (49,),
        }
        self.assertEqual(shapes, {name: (3, 2, *shape) for name, shape in units.items()})

    def test_everything_is_trained(self):
        terms = self.model.train()(self.x[:4].round(), self.scalars)
        self.model.loss(terms, self.scalars).mean().backward()
        self.assertEqual(names_without_gradient(self.model), [])

    def test_top_level_has_the_free_bits_of_all_its_units(self):
        """Its term is one number for 49 units. So 49 x 0.4 = 19.6 nats of its mean are free."""
        self.assertEqual(self.model.top_units, 49)
        f = common.on_device(dvp.Flags(prior="vamp", beta=0.7, free_bits=0.4), self.x)
        below = torch.full((4, 196), 1.0, dtype=D)

        def loss(top_mean):
            """The loss less the part of level 1, over beta. The batch has this mean at the top."""
            top = top_mean + torch.tensor([[-2.0], [-1.0], [1.0], [2.0]], dtype=D)
            terms = {"log_px_z": torch.zeros(4, dtype=D), "kl_1": below, "kl_2": top}
            return self.model.loss(terms, f).mean().item() / 0.7 - 196

        self.assertAlmostEqual(loss(30.0), 30, places=5)
        self.assertAlmostEqual(loss(20.0), 20, places=5)
        # Its mean is below the free nats, though far above those of one unit.
        self.assertAlmostEqual(loss(19.0), 19.6, places=5)
        self.assertAlmostEqual(loss(-5.0), 19.6, places=5)

    def test_free_bits_stop_the_gradient_of_the_top_level(self):
        """Below them, the encoder gets the gradient of the reconstruction and of level 1 only."""
        f = common.on_device(dvp.Flags(prior="vamp", free_bits=0.4), self.x)
        for top_mean, slope in ((30.0, 0.25), (10.0, 0.0)):
            top = torch.full((4, 1), top_mean, dtype=D, requires_grad=True)
            terms = {
                "log_px_z": torch.zeros(4, dtype=D),
                "kl_1": torch.ones(4, 196, dtype=D),
                "kl_2": top,
            }
            self.model.loss(terms, f).mean().backward()
            torch.testing.assert_close(top.grad, torch.full_like(top, slope))

    def test_training(self):
        """It begins at training images, moves them, and stores their prior for the evaluation."""
        f = dvp.Flags(
            dataset="digits",
            prior="vamp",
            pseudoinputs=5,
            latents="1",
            num_ch=2,
            ema=0.5,
            num_epochs=1,
            warmup_epochs=0.0,
            device="cpu",
        )
        x = self.x[:8].float()
        loop = types.SimpleNamespace(
            steps=2,
            replayed=lambda step: step,
            record=lambda means: None,
            batches=lambda **parts: iter(torch.arange(8).split(4)),
        )
        data = datasets.Data("digits", (x,), (x,))
        model = training.build(dvp.model_of, f, data)
        average = dvp.train(model, common.on_device(f, x), data, loop)

        p = average.train().top_prior()
        torch.testing.assert_close(average.top_mean, p.each.mean)
        torch.testing.assert_close(average.top_std, p.each.stddev)
        start = x[[0, 1, 3, 4, 6]].clamp(0.02, 0.98)
        change = (average.pseudoinputs() - start).abs().max().item()
        self.assertGreater(change, 0)
        self.assertLess(change, 0.1)

    @torch.no_grad()
    def test_pictures(self):
        model = self.model.settle().eval()
        x = self.x[:3].round()
        for panels in (model.samples(4, self.f), model.reconstructions(x, self.scalars)):
            for batch in panels.values():
                self.assertEqual(batch.shape[1:], x.shape[1:])
        images = [model.reconstruct(x, self.scalars, keep) for keep in range(3)]
        torch.testing.assert_close(images[0][0], images[0][1])
        for fewer, more in zip(images, images[1:]):
            self.assertGreater((fewer - more).abs().max().item(), 1e-4)


class Residuals(unittest.TestCase):
    """What headroom.py needs, for both priors. u has no headroom, since its map is not learned."""

    def features(self, model, x, S):
        """The encoder's features of each image, S times."""
        features = {}
        for side, e in model.encoder(x).items():
            features[side] = e.repeat(S, 1, 1, 1)
        return features

    @torch.no_grad()
    def test_residuals_of_the_learned_levels(self):
        model, f, x = build(2, train=False, spread=0.2, beta=0.7)
        # q(u|x) is as wide as it can be, so that its draws matter.
        model.raw_v.fill_(30.0)

        def probabilities(x, S):
            q_u = model.q_u(x)
            u = q_u.sample((S,)).flatten(0, 1)
            features = self.features(model, x, S)
            drawn = model.top_down(u, features, lambda l, p, q: q.sample())
            return model.p_x([z for p, q, z in drawn], (S, len(x))).mean

        levels = ["_1", "_2", "_3"]
        grey = (x + 0.5) / 2
        small.check_level_residuals(
            self, model, grey, f, levels, probabilities, readers=("encoder", "context"))

    @torch.no_grad()
    def test_both_estimates_have_their_own_u(self):
        """Where the latents below u have no noise, the estimates still differ."""
        model, f, x = build(2, train=False, spread=0.2)
        model.raw_v.fill_(30.0)
        draw = deep.draw
        drawn = []

        def draw_u_only(normal):
            is_u = normal.mean.shape[-1] == f.context_size
            drawn.append(is_u)
            return draw(normal) if is_u else normal.mean

        with mock.patch.object(deep, "draw", draw_u_only):
            residual = model.residuals(x, f, 4)["_1"].residual
        # One draw of u comes first, then one for each of three levels.
        self.assertEqual(drawn, [True, False, False, False])
        self.assertGreater((residual[0] - residual[1]).abs().max().item(), 1e-6)

    @torch.no_grad()
    def test_residuals_under_a_vamp_prior(self):
        """The top level is a learned one, too."""
        model, f, x = self.vamp()

        def probabilities(x, S):
            features = self.features(model, x, S)
            drawn = model.top_down(S * len(x), features, lambda l, p, q: q.sample())
            return model.p_x([z for p, q, z in drawn], (S, len(x))).mean

        small.check_level_residuals(self, model, (x + 0.5) / 2, f, ["_1", "_2"], probabilities)

    def vamp(self, **flags):
        """A small model with the VampPrior, its setting, and two images for it."""
        flags = {"prior": "vamp", "pseudoinputs": 5, "latents": "1,1", "beta": 0.7} | flags
        f = dvp.Flags(**(TINY | flags))
        x = grey_images(16, f.dataset)
        model = training.build(dvp.model_of, f, datasets.Data(f.dataset, (x,), (x,)))
        for part in (model.encoder, model.latents, model.z_to_x):
            small.moved(part, 0.2)
        model.begin_at(x)
        return model.settle().eval(), common.on_device(f, x), x[:2].round()

    @torch.no_grad()
    def test_order_of_the_draws_in_forward(self):
        """u comes first, with the times of its KL, then a draw for each level from the top down."""
        model, f, x = build(3, train=False)
        torch.manual_seed(5)
        terms = model(x, f, (4,))
        torch.manual_seed(5)
        u, kl_u = model.draw_u(x, (4,))
        features = {}
        for side, e in model.encoder(x).items():
            features[side] = deep.repeat_examples(e, (4,))
        drawn = list(model.top_down(u, features, lambda l, p, q: deep.draw(q)))
        drawn.reverse()
        self.assertTrue(torch.equal(terms["kl_4"], kl_u))
        self.check_terms(terms, drawn, model, x)

    @torch.no_grad()
    def test_order_of_the_draws_in_forward_under_a_vamp_prior(self):
        model, f, _ = self.vamp()
        x = grey_images(3).round()
        torch.manual_seed(5)
        terms = model(x, f, (4,))
        torch.manual_seed(5)
        features = {}
        for side, e in model.encoder(x).items():
            features[side] = deep.repeat_examples(e, (4,))
        drawn = list(model.top_down(12, features, lambda l, p, q: deep.draw(q)))
        p, q, z = drawn[0]
        kl = q.log_prob(z).flatten(1).sum(1) - p.log_prob(z)
        self.assertTrue(torch.equal(terms["kl_2"], kl.view(4, 3, 1)))
        # The sum over the latents in p(x|z) starts at the top here.
        self.check_terms(terms, [drawn[1]], model, x, zs=[z for p, q, z in drawn])

    def check_terms(self, terms, drawn, model, x, zs=None):
        """Check log p(x|z) and the KLs in closed form at these draws, level 1 first."""
        zs = zs or [z for p, q, z in drawn]
        log_px_z = model.p_x(zs, (4, 3)).log_prob(x).flatten(2).sum(-1)
        self.assertTrue(torch.equal(terms["log_px_z"], log_px_z))
        for level, (p, q, z) in enumerate(drawn, start=1):
            kl = kl_divergence(q, p).flatten(1).unflatten(0, (4, 3))
            self.assertTrue(torch.equal(terms[f"kl_{level}"], kl))

    @torch.no_grad()
    def test_cifar10_has_none(self):
        model, f, x = build(1, train=False, dataset="cifar10", latents="1", num_ch=2)
        self.assertEqual(model.residuals(x, f, 4), {})
        model, f, x = self.vamp(dataset="cifar10", latents="1", num_ch=2)
        self.assertEqual(model.residuals(x, f, 4), {})


class Training(small.InFolder):
    def test_every_parameter_gets_a_gradient(self):
        model, f, x = build()
        model.loss(model(x, f), f).mean().backward()
        self.assertEqual(names_without_gradient(model), [])

    @torch.no_grad()
    def test_two_processes_draw_what_one_would(self):
        model, f, x = build()

        def terms_of_process(rank, count, x):
            torch.manual_seed(0)
            with processes.noise_rows(rank, count):
                return model(x, f)

        together = terms_of_process(0, 1, x)
        first = terms_of_process(0, 2, x[:2])
        second = terms_of_process(1, 2, x[2:])
        for name, value in together.items():
            torch.testing.assert_close(torch.cat([first[name], second[name]]), value)

    @torch.no_grad()
    def test_bf16_leaves_pseudoinputs_and_terms_in_float32(self):
        model, f, x = build()
        model = model.float()
        x = x.float()
        torch.manual_seed(0)
        exact = model(x, f)
        u = model.context(x)

        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            terms = model(x, f)
            self.assertTrue(torch.equal(model.context(x), u))
            self.assertEqual(model.encoder(x)[7].dtype, torch.bfloat16)
        for name, value in terms.items():
            self.assertEqual(value.dtype, torch.float32)
            difference = (value - exact[name]).norm().item()
            self.assertLess(difference, 0.05 * exact[name].norm().item())

    def test_training_measures_the_context_and_lowers_the_loss(self):
        f = dvp.Flags(
            dataset="digits",
            latents="1",
            num_ch=4,
            context_size=3,
            num_epochs=3,
            batch_size=16,
            ema=0.5,
            warmup_epochs=0.0,
            device="cpu",
            out_dir=str(self.folder),
        )
        x = grey_images(128).float()
        data = datasets.Data("digits", (x,), (x[:8].round(),))
        model = training.build(dvp.DVPVAE, f, data)
        loop = training.Training([f], data, together=True)
        with contextlib.redirect_stderr(io.StringIO()):
            average = dvp.train(model, common.on_device(f, x), data, loop)

        expected = make_context("dct", 3, x.to(D))
        measured = average.context
        torch.testing.assert_close(measured.extent.to(D), expected.extent, rtol=1e-5, atol=0)
        torch.testing.assert_close(measured.std.to(D), expected.std, rtol=1e-4, atol=0)
        [record] = loop.records()
        losses = record.curves["loss"]
        self.assertLess(losses[-1], 0.9 * losses[0])


class SharedCode(unittest.TestCase):
    def test_backbone_is_that_of_the_ladder(self):
        for name in ("Bottleneck", "Head", "Encoder", "Latent", "normal"):
            source = inspect.getsource(getattr(dvp, name))
            self.assertEqual(source, inspect.getsource(getattr(ladder, name)), name)

    def test_network_of_the_diffusion_model_is_that_of_the_dct_vae(self):
        for name in ("UNet", "UNetBlock", "Attention", "group_norm"):
            source = inspect.getsource(getattr(dvp, name))
            self.assertEqual(source, inspect.getsource(getattr(dct, name)), name)


if __name__ == "__main__":
    unittest.main()
