"""MNIST_HVAE_DVP: the maps to pseudoinputs, the diffusion model's bound against exact densities, and the terms of the ELBO."""
import contextlib
import functools
import inspect
import io
import math
import tempfile
import types
import unittest
from unittest import mock

import numpy as np
import torch
from torch.distributions import Normal, kl_divergence

import common
import datasets
import deep
import report
import training
import MNIST_HVAE_DCT as dct
import MNIST_HVAE_DVP as dvp
import MNIST_HVAE_Ladder as ladder

D = torch.float64
GAMMA_0, GAMMA_1 = -6.0, 7.0


def images(n, dataset="digits", seed=3):
    """Grey images of a data set's shape, (n, c_x, H, H): drawn digits, or noise where there are three colours."""
    if dataset == "cifar10":
        return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=D)
    return torch.from_numpy(datasets.draw_digits(n, seed)[0]).view(n, 1, 28, 28).to(D) / 255


def moved(module, spread):
    """A module with weights far from their start."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p += spread * torch.randn(p.shape, generator=random, dtype=p.dtype)
    return module


def built(n=4, train=True, spread=0.3, **flags):
    """A small model in float64 with weights far from their start, its flags and n images as it sees them."""
    f = dvp.Flags(**dict(dict(dataset="digits", latents="2,1", num_ch=4, context_size=3, num_steps=4, device="cpu"), **flags))
    x = images(64, f.dataset)
    model = training.build(dvp.DVPVAE, f, datasets.Data(f.dataset, (x,), (x,)))
    model.context.fit(x)
    with torch.no_grad():
        for part in (model.encoder, model.latents, model.z_to_x):
            moved(part, spread)
        moved(model.r, 0.1)
        for latent in model.latents:                      # means and variances of priors and posteriors
            for last in (latent.s_to_p.block[-1], latent.s_to_q.block[-1]):
                last.weight.mul_(3)
            for head in (latent.s_to_p, latent.s_to_q):   # not so far that all log-variances are clamped
                head.linear.weight.mul_(0.3)
    return model.train(train), common.on_device(f, x), x[:n].round() if f.dataset != "cifar10" else x[:n]


def context(kind, k, train=None):
    f = dvp.Flags(dataset="digits", context=kind, context_size=k, device="cpu")
    made = dvp.Context(f).to(D)
    if train is not None:
        made.fit(train)
    return made


class Contexts(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.x = images(200)

    def test_dct_is_its_defining_sum(self):
        """c_a c_b sum_ij x_ij cos(pi a (2i + 1) / 2H) cos(pi b (2j + 1) / 2H), c_0^2 = 1/H, else 2/H."""
        x, made = self.x[:3], context("dct", 7)
        y = made(x) * 0.5                                 # the extent before training
        for a, b in ((0, 0), (0, 3), (1, 0), (6, 6), (4, 5)):
            c = math.sqrt((1 if a else 0.5) * (1 if b else 0.5)) * 2 / 28
            by_hand = sum(c * x[:, 0, i, j] * math.cos(math.pi * a * (2 * i + 1) / 56) * math.cos(math.pi * b * (2 * j + 1) / 56)
                          for i in range(28) for j in range(28))
            torch.testing.assert_close(y[:, 0, a, b], by_hand, rtol=0, atol=2e-6)

    def test_dct_of_all_frequencies_keeps_all(self):
        """Parseval, and the inverse; of the corner alone, the image is the projection: nearer, and the same corner again."""
        whole = context("dct", 28, self.x)
        y = whole(self.x) * whole.extent.view(28, 28)
        torch.testing.assert_close(y.square().sum((1, 2, 3)), self.x.square().sum((1, 2, 3)), rtol=1e-5, atol=0)
        torch.testing.assert_close(whole.image(whole(self.x)), self.x, rtol=0, atol=1e-5)
        corner = context("dct", 7, self.x)
        low = corner.image(corner(self.x))
        lost, kept = (self.x - low).square().sum((1, 2, 3)), low.square().sum((1, 2, 3))
        torch.testing.assert_close(kept, y[:, :, :7, :7].square().sum((1, 2, 3)), rtol=1e-5, atol=0)
        torch.testing.assert_close(lost + kept, self.x.square().sum((1, 2, 3)), rtol=1e-5, atol=0)

    def test_downsampling_is_the_mean_of_squares(self):
        made = context("downsample", 7, self.x)
        means = torch.stack([self.x[:, 0, i:i + 4, j:j + 4].mean((1, 2)) for i in range(0, 28, 4) for j in range(0, 28, 4)], 1)
        torch.testing.assert_close(made(self.x).flatten(1), 2 * means - 1, rtol=0, atol=1e-5)
        torch.testing.assert_close(made.image(made(self.x))[:, 0, 8:12, 12:16],
                                   means[:, 2 * 7 + 3].view(-1, 1, 1).expand(-1, 4, 4), rtol=0, atol=1e-5)

    def test_linear_keeps_what_no_other_linear_map_can(self):
        """Eckart & Young: what is lost is the sum of the smaller squared singular values of the training images."""
        def lost(made):
            return (self.x - made.image(made(self.x))).square().sum()

        made = context("linear", 4, self.x)
        singular_values = torch.linalg.svdvals(self.x.flatten(1))
        torch.testing.assert_close(lost(made), singular_values[16:].square().sum(), rtol=1e-5, atol=0)
        for other in ("dct", "downsample"):
            self.assertLess(lost(made), 0.9 * lost(context(other, 4, self.x)))

    def test_what_a_gaussian_of_the_training_set_gives(self):
        """log N(u; mean, covariance + exp(GAMMA_0) I) of the training set's f(x), by a density from torch."""
        made = context("dct", 3, self.x)
        u = made(self.x)
        covariance = torch.from_numpy(np.cov(u.flatten(1).numpy().T)) + math.exp(GAMMA_0) * torch.eye(9, dtype=D)
        expected = torch.distributions.MultivariateNormal(u.mean(0).flatten(), covariance).log_prob(u.flatten(1))
        torch.testing.assert_close(made.log_gaussian(u), expected, rtol=1e-4, atol=1e-3)

    def test_scale_and_inverse(self):
        """Within [-1, 1] on the training set, dct and linear up to its ends; f(image of u) = u, at odd sizes too."""
        random = torch.Generator().manual_seed(0)
        for kind, k in (("dct", 7), ("downsample", 7), ("linear", 7), ("dct", 1), ("downsample", 5), ("linear", 3)):
            made = context(kind, k, self.x)
            u = made(self.x)
            most = u.abs().amax(0)
            self.assertLessEqual(most.max().item(), 1 + 1e-6)
            if kind != "downsample":
                torch.testing.assert_close(most, torch.ones_like(most))
            torch.testing.assert_close(made.mean, u.mean(0))
            torch.testing.assert_close(made.std, u.std(0).clamp(min=math.exp(-3)))
            u = 2 * torch.rand(5, 1, k, k, generator=random, dtype=D) - 1
            self.assertEqual(tuple(made.image(u).shape), (5, 1, 28, 28))
            torch.testing.assert_close(made(made.image(u)), u, rtol=0, atol=1e-5)


def standardised_noise(n, count, shape, seed=0):
    """`count` noises (n, *shape), whose means, variances and covariances over the n rows are exactly 0, 1 and 0: the mean over
    rows of what is quadratic in them is its expectation."""
    random = torch.Generator().manual_seed(seed)
    columns = count * math.prod(shape)
    rows = torch.cat([torch.ones(n, 1, dtype=D), torch.randn(n, columns, generator=random, dtype=D)], 1)
    noise = torch.linalg.qr(rows).Q[:, 1:] * math.sqrt(n)
    return list(noise.T.reshape(count, *shape, n).movedim(-1, 1))


def with_noise(noises, work):
    """work() where the draws of common.normal_like are these, one after another."""
    with mock.patch.object(common, "normal_like", side_effect=noises):
        return work()


class Optimum(dvp.Diffusion):
    """With the best eps^ if u ~ N(m, s^2 I): E[eps|z_t] = sigma_t (z_t - alpha_t m) / (alpha_t^2 s^2 + sigma_t^2)."""

    def __init__(self, m, s):
        super().__init__(1, 2)
        self.m, self.s = m, s
        self.double()

    def epsilon(self, z, t):
        alpha, sigma = self.alpha_sigma(t)
        return sigma * (z - alpha * self.m) / (alpha**2 * self.s**2 + sigma**2)

    def floor(self):
        """What the bound exceeds the entropy of N(m, s^2) by for T to infinity: that of p(u|z_0), whose variance is not the
        posterior's, E KL(q(u|z_0) || p(u|z_0)), and KL(q(z_1) || p(z_1))."""
        a, v = 1 / (1 + math.exp(GAMMA_1)), 1 / (1 + math.exp(-GAMMA_1))
        q = Normal(torch.tensor(math.sqrt(a) * self.m, dtype=D), torch.tensor(math.sqrt(a * self.s**2 + v), dtype=D))
        return (math.log1p(math.exp(GAMMA_0) / self.s**2) / 2
                + kl_divergence(q, Normal(torch.zeros((), dtype=D), torch.ones((), dtype=D))).item())

    def entropy(self):
        return math.log(2 * math.pi * math.e * self.s**2) / 2


class Bound(unittest.TestCase):
    """The bound on E[-log r(u)] per coefficient if u is Gaussian and eps^ the optimum: then E[|eps - eps^|^2] is
    s^2 / (s^2 + exp gamma), and the terms of every t are known."""
    optima = (Optimum(0.0, 1.0), Optimum(0.3, 0.2), Optimum(-0.5, 2.0))

    def test_training_estimate_is_the_limit(self):
        """The mean of `loss` over t (Gauss-Legendre) and over noise and u (exact for squares)."""
        nodes, weights = (torch.tensor(values, dtype=D) for values in np.polynomial.legendre.leggauss(64))
        t, signs = (nodes + 1) / 2, torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=D)
        for optimum in self.optima:
            u, noise = (column.repeat(64).view(-1, 1, 1, 1) for column in signs.T)
            with mock.patch.object(common, "uniform_like", side_effect=[t.repeat_interleave(4).view(-1, 1, 1, 1)]):
                loss = with_noise([noise], lambda: optimum.loss(optimum.m + optimum.s * u))
            mean = (loss.view(64, 4).mean(1) * weights / 2).sum().item()
            self.assertAlmostEqual(mean, optimum.entropy() + optimum.floor(), places=8)

    @torch.no_grad()
    def test_bound_over_stratified_times(self):
        """Of a network: the mean of `loss` over independent times and noises, and with a smaller spread, which the standard error
        that it gives is no less than; in whatever parts it is computed."""
        torch.manual_seed(0)
        r = moved(dvp.Diffusion(1, 2).double(), 0.3).eval()
        u = 2 * torch.rand(2, 1, 3, 3, dtype=D) - 1
        loss = r.loss(u.repeat(50_000, 1, 1, 1)).unflatten(0, (50_000, 2))
        bounds, errors = zip(*(r.bound(u, 40) for _ in range(60)))
        bounds, error = torch.stack(bounds), (loss.var(0) / len(loss)).sqrt()
        self.assertLess(((bounds.mean(0) - loss.mean(0)).abs() / (bounds.var(0) / 60 + error**2).sqrt()).max().item(), 4)
        spread, independent = bounds.flatten(2).sum(2).std(0), loss.flatten(2).sum(2).std(0) / math.sqrt(40)
        given = torch.stack(errors).mean(0)
        torch.testing.assert_close(given, independent, rtol=0.15, atol=0)
        self.assertTrue((spread < 1.1 * given).all())
        found = []
        for rows in (2, 2**14):
            torch.manual_seed(1)
            with mock.patch.object(dvp, "ROWS_AT_ONCE", rows), mock.patch.object(common, "normal_like", torch.ones_like), \
                    mock.patch.object(common, "uniform_like", lambda like: torch.full_like(like, 0.3)):
                found.append(r.bound(u, 7))
        for a, b in zip(*found):
            torch.testing.assert_close(a, b)

    def marginal_variance(self, T):
        """That of u by ancestral sampling where eps^ = sigma_t z_t, the network's start: all is linear in z."""
        def alpha_sigma(i):
            gamma = GAMMA_0 + 13 * i / T
            return 1 / math.sqrt(1 + math.exp(gamma)), 1 / math.sqrt(1 + math.exp(-gamma))

        variance = 1.0
        for i in range(T, 0, -1):
            (alpha, sigma), (alpha_s, sigma_s) = alpha_sigma(i), alpha_sigma(i - 1)
            var_ts = sigma**2 - (alpha / alpha_s)**2 * sigma_s**2
            slope = alpha / alpha_s * sigma_s**2 / sigma**2 + alpha_s * var_ts / sigma**2 * (1 - sigma**2) / alpha
            variance = slope**2 * variance + var_ts * sigma_s**2 / sigma**2
        alpha, sigma = alpha_sigma(0)
        return (variance + sigma**2) / alpha**2

    @torch.no_grad()
    def test_samples_of_a_linear_network(self):
        r = dvp.Diffusion(1, c=2).double()
        for T in (3, 25):
            sampled = with_noise(standardised_noise(T + 4, T + 2, (1, 1, 1)), lambda: r.sample(
                torch.zeros(T + 4, 1, 1, 1, dtype=D), T))
            self.assertAlmostEqual(sampled.square().mean().item(), self.marginal_variance(T), places=9)


class Correlated(dvp.Diffusion):
    """With the best eps^ if u ~ N(m, C): sigma_t (alpha_t^2 C + sigma_t^2 I)^-1 (z_t - alpha_t m)."""

    def __init__(self, u):
        super().__init__(1, 2)
        rows, self.shape = u.flatten(1), u.shape[1:]
        self.m = rows.mean(0)
        self.eigenvalues, self.axes = torch.linalg.eigh(torch.cov(rows.T))
        self.double()

    def epsilon(self, z, t):
        alpha, sigma = (of.flatten(1) for of in self.alpha_sigma(t))
        along = (z.flatten(1) - alpha * self.m) @ self.axes
        return (sigma * along / (alpha**2 * self.eigenvalues + sigma**2) @ self.axes.T).view(z.shape)

    def draw(self, n):
        noise = torch.randn(n, len(self.m), dtype=D)
        return (self.m + noise * self.eigenvalues.sqrt() @ self.axes.T).view(n, *self.shape)

    def log_density(self, u):
        """log r(u), N(u; m, C + 2 exp(GAMMA_0) I): z_0 / alpha_0 has the noise exp(GAMMA_0), and so has u about it."""
        along = (u.flatten(1) - self.m) @ self.axes
        return Normal(torch.zeros_like(self.m), (self.eigenvalues + 2 * math.exp(GAMMA_0)).sqrt()).log_prob(along).sum(1)


class TestBed(unittest.TestCase):
    """Pseudoinputs that are Gaussian, with the mean and covariance of digits', and the exact noise prediction."""

    @classmethod
    def setUpClass(cls):
        torch.manual_seed(3)
        cls.r = Correlated(context("dct", 5, images(400))(images(400)))
        cls.u = cls.r.draw(300)

    def test_bound(self):
        """E[bound] - E[-log r(u)]: E[-log p(u|z_0)] + I(u; z_0) - E[-log r(u)], in closed form, and KL(q(z_1) || p(z_1))."""
        with torch.no_grad():
            bound, _ = self.r.bound(self.u, 100)
        slack, variances, noise = bound.flatten(1).sum(1) + self.r.log_density(self.u), self.r.eigenvalues, math.exp(GAMMA_0)
        a, v = 1 / (1 + math.exp(GAMMA_1)), 1 / (1 + math.exp(-GAMMA_1))
        q = a * variances + v
        expected = (1 + ((variances + noise) / (variances + 2 * noise)).log() - variances / (variances + 2 * noise)
                    + q + a * (self.r.axes.T @ self.r.m)**2 - 1 - q.log()).sum() / 2
        self.assertLess(abs(slack.mean() - expected).item(), 4 * slack.std().item() / len(slack)**0.5)
        self.assertLess(slack.std().item() / len(slack)**0.5, 0.1 * expected.item())

    @torch.no_grad()
    def test_a_noisy_bound_within_the_logarithm_overstates_the_density(self):
        """As the released program's evaluation has it: the log of the mean of exp(-bound), each at one time and noise, is above
        log r(u), by nats; the bound itself is not."""
        losses = self.r.loss(self.u[:40].repeat(1000, 1, 1, 1)).flatten(1).sum(1).view(1000, 40)
        log_mean_exp = (-losses).logsumexp(0) - math.log(1000)
        exact = self.r.log_density(self.u[:40])
        self.assertGreater((log_mean_exp - exact).mean().item(), 5)
        self.assertLess((-losses.mean(0) - exact).mean().item(), 1)


class Terms(unittest.TestCase):
    def test_shapes_at_odd_settings(self):
        for flags in (dict(latents="0,1", context_size=1, context="downsample"), dict(latents="3", context_size=5),
                      dict(latents="1,1", num_ch=1, context="linear", context_size=2, num_steps=1),
                      dict(latents="1,1,0,1", dataset="cifar10", context_size=7, context="downsample"),
                      dict(latents="1,1", d_z=2, d_hidden=3)):
            model, f, x = built(3, **flags)
            L, c_x = sum(map(int, f.latents.split(","))), x.shape[1]
            sides = deep.sides_of_latents(f)
            units = {f"_{l}": (f.d_z or c_x) * sides[L - l]**2 for l in range(1, L + 1)} | {f"_{L + 1}": c_x * f.context_size**2}
            self.assertEqual((model.levels, model.learned_levels), (L + 1, L))
            terms = model(x, f)
            self.assertEqual({name: tuple(of.shape) for name, of in terms.items()},
                             {"log_px_z": (3,)} | {f"kl{level}": (3, d) for level, d in units.items()})
            model.eval()
            with torch.no_grad():
                terms = model(x, f, sample_shape=(2,))
                expected = {"log_px_z": (2, 3), "log_w": (2, 3)}
                expected |= {f"{name}{level}": (2, 3, d) for level, d in units.items() for name in ("kl", "mean")}
                expected[f"mean_{L + 1}"] = expected[f"mean_{L + 1}"][1:]
                self.assertEqual({name: tuple(of.shape) for name, of in terms.items()}, expected)
                with mock.patch.object(model.r, "bound", functools.partial(model.r.bound, pairs=3)):
                    terms = model(x, f, sample_shape=(2,), **model.given(x, f))
                expected |= {"log_w_u": (3,), "error_context": (3,), "context_baseline": (3,), f"kl_{L + 1}": (3, expected[f"kl_{L + 1}"][2])}
                self.assertEqual({name: tuple(of.shape) for name, of in terms.items()}, expected)
                self.assertTrue(all(of.isfinite().all() for of in terms.values()))
                for pictures in (model.samples(5, f), model.reconstructions(x, f)):
                    self.assertEqual({of.shape[1:] for of in pictures.values()}, {x.shape[1:]})
                self.assertEqual([len(of) for of in model.samples(5, f).values()], [5, 5])
                shapes = [of.mean.shape for of in model.top_posterior(x, f, L)]
                self.assertEqual(shapes, [(3, f.d_z or c_x, side, side) for side in sides])

    def test_variance_of_the_pseudoinput(self):
        """log-variances in [-12, -5] whatever the weights, and -entropy in the KL."""
        model, f, x = built()
        with torch.no_grad():
            model.raw_v.copy_(torch.linspace(-300, 300, 9).view(1, 3, 3))
            v = 2 * model.q_u(x).stddev.log()
            self.assertGreaterEqual(v.min().item(), -12 - 1e-9)
            self.assertLessEqual(v.max().item(), -5 + 1e-9)
            self.assertLess(v[0, 0, 0, 0].item(), -11.9)
            self.assertGreater(v[0, 0, 2, 2].item(), -5.1)
            torch.testing.assert_close(model.q_u(x).mean, model.context(x))
            with mock.patch.object(model.r, "loss", torch.zeros_like):
                kl = model(x, f)["kl_4"]
        torch.testing.assert_close(kl, -(math.log(2 * math.pi * math.e) + v.flatten(1)) / 2)

    @torch.no_grad()
    def test_kls_are_those_of_draws(self):
        """Of each learned level, E[log q(z_l|...) - log p(z_l|...)], the densities written out, over draws of all above it."""
        model, f, x = built(1, train=False)
        torch.manual_seed(0)
        terms = model(x, f, sample_shape=(600,))
        n = 600
        features = {side: e.expand(n, -1, -1, -1) for side, e in model.encoder(x).items()}
        v = -12 + 7 / (1 + (-model.raw_v).exp())
        u = model.context(x) + (v / 2).exp() * torch.randn(n, 1, 3, 3, dtype=D)
        drawn = list(model.top_down(u, features, lambda l, p, q: q.mean + q.stddev * torch.randn_like(q.mean)))
        for l, (p, q, z) in zip((3, 2, 1), drawn):
            def log_density(of):
                return (-((z - of.mean) / of.stddev)**2 / 2 - of.stddev.log()).flatten(1).sum(1)

            by_hand, kl = log_density(q) - log_density(p), terms[f"kl_{l}"].sum(-1).flatten()
            error = ((by_hand.var() + kl.var()) / n).sqrt().item()
            self.assertLess(abs(by_hand.mean() - kl.mean()).item(), 4 * error)
            self.assertLess(error, 0.1 * kl.mean().item())

    @torch.no_grad()
    def test_log_w_has_the_mean_of_the_elbo(self):
        """E[log_w] = E[log p(x|z)] - sum of the learned levels' KLs, each example within four standard errors of the difference."""
        model, f, x = built(3, train=False, spread=0.15)
        torch.manual_seed(0)
        terms = model(x, f, sample_shape=(600,))
        difference = terms["log_w"] - terms["log_px_z"] + sum(terms[f"kl_{l}"].sum(-1) for l in (1, 2, 3))
        error = difference.std(0) / math.sqrt(len(difference))
        self.assertLess((difference.mean(0).abs() / error).max().item(), 4)
        for l in (1, 2, 3):                               # precise enough to tell
            self.assertLess(error.max().item(), 0.2 * terms[f"kl_{l}"].sum(-1).mean(0).abs().min().item())

    @torch.no_grad()
    def test_log_px_is_a_bound_in_u_and_an_estimate_given_it(self):
        """log p(x|u) by weights, all at one u, less KL(q(u|x) || r(u)); and the standard error that its times bring."""
        model, f, x = built(3, train=False)
        model = model.float()
        data, drawn = datasets.Data("digits", (x.float(),), (x.float(),)), []
        settings = dvp.Flags(dataset="digits", latents="2,1", num_ch=4, context_size=3, device="cpu", num_samples=50)
        forward = model.forward

        def seen(*args, **more):
            drawn.append((more["u"], forward(*args, **more)))
            return drawn[-1][1]
        with mock.patch.object(model, "forward", seen), mock.patch.dict(report.CHUNK_BYTES, cpu=4 * 4 * 28**2 * 16):
            metrics, examples = report.evaluate(model, settings, data)
        self.assertEqual(len(drawn), 12)                  # chunks: of one image, 16 + 16 + 16 + 2 draws
        for i in range(3):
            of_image = drawn[4 * i:4 * i + 4]
            self.assertTrue(all(torch.equal(u, of_image[0][0]) for u, _ in of_image))
            log_w = torch.cat([terms["log_w"][:, 0] for _, terms in of_image])
            expected = log_w.logsumexp(0) - math.log(50) - of_image[0][1]["kl_4"].sum()
            self.assertAlmostEqual(examples["log_px"][i], expected.item(), delta=1e-3)
        errors = torch.stack([drawn[4 * i][1]["error_context"] for i in range(3)])
        self.assertAlmostEqual(metrics["error_context"], errors.square().sum().sqrt().item() / 3, places=4)
        self.assertGreater(metrics["error_context"], 0)

    @torch.no_grad()
    def test_every_prior_reads_the_pseudoinput(self):
        """At each level directly: here no state carries anything of u down."""
        model, f, x = built()
        for latent in model.latents:
            for weight in (*latent.s_to_p.block[-1].parameters(), *latent.s_to_p.linear.parameters()):
                weight[2:] = 0                            # h
        def priors(u):
            return [p for p, _, _ in model.top_down(u, None, lambda l, p, q: torch.zeros_like(p.mean))]

        u = model.context(x)
        for p, same, moved in zip(priors(u), priors(u), priors(u + 0.5)):
            self.assertTrue(torch.equal(p.mean, same.mean))
            self.assertGreater((p.mean - moved.mean).abs().amax((1, 2, 3)).min().item(), 1e-4)
            self.assertGreater((p.stddev - moved.stddev).abs().amax((1, 2, 3)).min().item(), 1e-4)

    def test_units_of_the_means(self):
        """The training set's f(x), in standard deviations of theirs: mean 0 and variance 1."""
        model, f, _ = built(train=False)
        with torch.no_grad():
            mean = model(images(64), f)["mean_4"]
        torch.testing.assert_close(mean.mean(0), torch.zeros(9, dtype=D))
        torch.testing.assert_close(mean.std(0), torch.ones(9, dtype=D))

    @torch.no_grad()
    def test_reconstructions_keep_the_levels_that_they_say(self):
        model, f, x = built(train=False)
        kept = [model.reconstruct(x, f, keep) for keep in range(model.levels + 1)]
        for image in kept[0]:                             # all from the prior: of x nothing
            torch.testing.assert_close(image, kept[0][0])
        for one, two in zip(kept, kept[1:]):
            self.assertGreater((one - two).abs().max().item(), 1e-4)
        zs = [q.mean for q in model.top_posterior(x, f, 3)]
        torch.testing.assert_close(kept[-1], model.p_x(zs).mean)
        other = model.context.image(model.context(x))     # of the same pseudoinput, which alone decides at keep = 1
        torch.testing.assert_close(model.reconstruct(other, f, 1), kept[1])
        self.assertGreater((model.reconstruct(other, f, 2) - kept[2]).abs().max().item(), 1e-4)

    def test_attack_has_a_gradient(self):
        model, f, x = built(train=False)
        x = x.clone().requires_grad_()
        for q in model.top_posterior(x, f, 2):
            gradient, = torch.autograd.grad(q.mean.sum() + q.stddev.sum(), x, retain_graph=True)
            self.assertTrue((gradient.flatten(1).norm(dim=1) > 0).all())


class Vamp(unittest.TestCase):
    """--prior vamp: the mixture of posteriors at trained pseudoinputs, against torch's own mixture."""

    def setUp(self):
        self.f = dvp.Flags(dataset="digits", prior="vamp", pseudoinputs=5, latents="1,1", num_ch=4, device="cpu")
        x = images(64)
        self.model = training.build(dvp.model_of, self.f, datasets.Data("digits", (x,), (x,)))
        for part in (self.model.encoder, self.model.latents, self.model.z_to_x):
            moved(part, 0.2)
        self.model.begin_at(x)
        self.x, self.g = x, common.on_device(self.f, x)

    def mixture(self):
        """p(z_2) by hand, its components from the pseudoinputs one by one: its mean and std (49,), and log p of z (n, 1, 7, 7)."""
        q = [next(self.model.train().top_down(1, self.model.encoder(u[None]), lambda l, p, q: q.mean))[1] for u in self.model.pseudoinputs()]
        means, variances = torch.cat([of.mean for of in q]).flatten(1), torch.cat([of.stddev for of in q]).flatten(1)**2
        mean = means.mean(0)

        def log_prob(z):
            squares = (z.flatten(1)[:, None] - means)**2 / variances + (2 * math.pi * variances).log()
            return ((-squares.sum(2) / 2).exp().mean(1)).log()
        return mean, (variances.mean(0) + (means - mean).square().mean(0)).sqrt(), log_prob

    def test_begins_at_training_images(self):
        torch.testing.assert_close(self.model.pseudoinputs(), self.x[[0, 12, 25, 38, 51]].clamp(0.02, 0.98))

    @torch.no_grad()
    def test_density_moments_and_draws(self):
        (mean, std, log_prob), p = self.mixture(), self.model.train().top_prior()
        z = torch.randn(7, 1, 7, 7, dtype=D)
        torch.testing.assert_close(p.log_prob(z), log_prob(z))
        torch.testing.assert_close(p.mean.flatten(), mean)
        torch.testing.assert_close(p.stddev.flatten(), std)
        torch.manual_seed(0)
        drawn = p.draw(20_000, 1.0).flatten(1)
        self.assertLess(((drawn.mean(0) - mean).abs() / std * 20_000**0.5).max().item(), 5)
        torch.testing.assert_close(drawn.std(0), std, rtol=0.05, atol=0)
        which = (p.draw(200, 0.0).unsqueeze(1) - p.each.mean).flatten(2).norm(dim=2)
        self.assertEqual(which.min(1).values.max().item(), 0)     # at temperature 0 a component's mean, of each some
        self.assertEqual(set(which.argmin(1).tolist()), set(range(5)))

    @torch.no_grad()
    def test_terms(self):
        """In evaluation, after `settle`: the top level's term at each draw, log_w, and units to a Gaussian of the mixture's moments."""
        (mean, std, log_prob), model = self.mixture(), self.model.settle().eval()
        x, seen = self.x[:2].round(), []
        real = deep.draw
        with mock.patch.object(deep, "draw", lambda q, *more: seen.append((q, real(q, *more))) or seen[-1][1]):
            terms = model(x, self.g, sample_shape=(3,))
        (q, z), (q_1, z_1) = seen
        log_q = q.log_prob(z).flatten(1).sum(1)
        kl = (log_q - log_prob(z)).view(3, 2, 1)
        torch.testing.assert_close(terms["kl_2"], kl)
        p_1 = list(model.top_down(6, None, lambda l, p, q: z if l == 2 else z_1))[1][0]
        of_1 = (p_1.log_prob(z_1) - q_1.log_prob(z_1)).flatten(1).sum(1).view(3, 2)
        torch.testing.assert_close(terms["log_w"], terms["log_px_z"] + of_1 - kl[..., 0])
        matched = Normal(mean.view(1, 7, 7), std.view(1, 7, 7))
        torch.testing.assert_close(terms["unit_kl_2"], kl_divergence(q, matched).flatten(1).view(3, 2, 49))
        self.assertEqual({name: tuple(of.shape[2:]) for name, of in terms.items()}, {
            "log_px_z": (), "log_w": (), "kl_1": (196,), "mean_1": (196,), "kl_2": (1,), "unit_kl_2": (49,), "mean_2": (49,)})

    def test_everything_is_trained(self):
        self.model.train()
        self.model.loss(self.model(self.x[:4].round(), self.g), self.g).mean().backward()
        self.assertEqual([name for name, p in self.model.named_parameters() if p.grad is None or not p.grad.any()], [])

    def test_training(self):
        """Begins at training images, moves them, and leaves the prior that they make for evaluation."""
        f = dvp.Flags(dataset="digits", prior="vamp", pseudoinputs=5, latents="1", num_ch=2, ema=0.5, num_epochs=1, warmup_epochs=0.0,
                      device="cpu")
        x = self.x[:8].float()
        loop = types.SimpleNamespace(steps=2, replayed=lambda step: step, record=lambda means: None,
                                     batches=lambda **parts: iter(torch.arange(8).split(4)))
        data = datasets.Data("digits", (x,), (x,))
        model = dvp.train(training.build(dvp.model_of, f, data), common.on_device(f, x), data, loop)
        p = model.train().top_prior()
        torch.testing.assert_close(model.top_mean, p.each.mean)
        torch.testing.assert_close(model.top_std, p.each.stddev)
        begun = x[[0, 1, 3, 4, 6]].clamp(0.02, 0.98)
        self.assertTrue(0 < (model.pseudoinputs() - begun).abs().max().item() < 0.1)

    @torch.no_grad()
    def test_pictures(self):
        model, x = self.model.settle().eval(), self.x[:3].round()
        for pictures in (model.samples(4, self.f), model.reconstructions(x, self.g)):
            self.assertEqual({of.shape[1:] for of in pictures.values()}, {x.shape[1:]})
        kept = [model.reconstruct(x, self.g, keep) for keep in range(3)]
        torch.testing.assert_close(kept[0][0], kept[0][1])
        for one, two in zip(kept, kept[1:]):
            self.assertGreater((one - two).abs().max().item(), 1e-4)


class Training(unittest.TestCase):
    def test_every_parameter_gets_a_gradient(self):
        model, f, x = built()
        model.loss(model(x, f), f).mean().backward()
        self.assertEqual([name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()], [])

    @torch.no_grad()
    def test_two_processes_draw_what_one_would(self):
        model, f, x = built()

        def terms(rank, world, x):
            torch.manual_seed(0)
            with mock.patch.object(common, "_noise_of", (rank, world)):
                return model(x, f)

        one, halves = terms(0, 1, x), [terms(0, 2, x[:2]), terms(1, 2, x[2:])]
        for name in one:
            torch.testing.assert_close(torch.cat([half[name] for half in halves]), one[name])

    @torch.no_grad()
    def test_bf16_leaves_pseudoinputs_and_terms_in_float32(self):
        model, f, x = built()
        model, x = model.float(), x.float()
        torch.manual_seed(0)
        plain, u = model(x, f), model.context(x)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            terms = model(x, f)
            self.assertTrue(torch.equal(model.context(x), u))
            self.assertEqual(model.encoder(x)[7].dtype, torch.bfloat16)
        self.assertEqual({of.dtype for of in terms.values()}, {torch.float32})
        for name in terms:
            self.assertLess((terms[name] - plain[name]).norm().item(), 0.05 * plain[name].norm().item())

    def test_training_measures_the_context_and_lowers_the_loss(self):
        with tempfile.TemporaryDirectory() as folder:
            f = dvp.Flags(dataset="digits", latents="1", num_ch=4, context_size=3, num_epochs=3, batch_size=16, ema=0.5,
                          warmup_epochs=0.0, device="cpu", out_dir=folder)
            x = images(128).float()
            data = datasets.Data("digits", (x,), (x[:8].round(),))
            model, loop = training.build(dvp.DVPVAE, f, data), training.Training([f], data, together=True)
            with contextlib.redirect_stderr(io.StringIO()):
                average = dvp.train(model, common.on_device(f, x), data, loop)
        expected = context("dct", 3, x.to(D))
        torch.testing.assert_close(average.context.extent.to(D), expected.extent, rtol=1e-5, atol=0)
        torch.testing.assert_close(average.context.std.to(D), expected.std, rtol=1e-4, atol=0)
        losses = loop.results()[0]["curves"]["loss"]
        self.assertLess(losses[-1], 0.9 * losses[0])

    def test_backbone_is_that_of_the_ladder(self):
        for name in ("Bottleneck", "Head", "Encoder", "Latent", "normal"):
            self.assertEqual(inspect.getsource(getattr(dvp, name)), inspect.getsource(getattr(ladder, name)))
        for name in ("UNet", "UNetBlock", "Attention", "group_norm"):
            self.assertEqual(inspect.getsource(getattr(dvp, name)), inspect.getsource(getattr(dct, name)))


if __name__ == "__main__":
    unittest.main()
