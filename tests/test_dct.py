"""MNIST_HVAE_DCT: the transform against its defining sum, the diffusion's bound against exact values, the rest as the ladder."""
import functools
import inspect
import math
import types
import unittest
from unittest import mock

import torch
from torch.nn import functional as F

import common
import datasets
import deep
import report
import training
import MNIST_HVAE_DCT as dct
import MNIST_HVAE_Ladder as ladder
from tests.test_ladder import by_hand, model_and_images, standard_errors
from tests import small


def moved(module, by):
    """The module in float64, with random weights added, small enough that it stays a smooth map."""
    random, module = torch.Generator().manual_seed(1), module.double()
    with torch.no_grad():
        for p in module.parameters():
            p += by * torch.randn(p.shape, generator=random, dtype=p.dtype)
    return module


def some_model(n, by=0.0, **flags):
    """As `model_and_images`, with the context scaled so that all its levels occur."""
    model, f, x = model_and_images(n, by, dct.DCTVAE, dct.Flags, **flags)
    model.dct.fit(x)
    return model, f, x


class Transform(unittest.TestCase):
    def setUp(self):
        self.x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def test_is_the_sum_that_defines_it(self):
        y = dct.DCT(3, 8, 5, 2).double().transform(self.x)
        self.assertEqual(tuple(y.shape), (2, 3, 5, 5))
        for u in range(5):
            for v in range(5):
                expected = 0
                for i in range(8):
                    for j in range(8):
                        a_u, a_v = (math.sqrt((2 if w else 1) / 8) for w in (u, v))
                        expected = expected + (a_u * math.cos(math.pi * u * (2 * i + 1) / 16) * a_v
                                               * math.cos(math.pi * v * (2 * j + 1) / 16) * self.x[:, :, i, j])
                torch.testing.assert_close(y[:, :, u, v], expected, rtol=0, atol=1e-6)

    def test_inverse_and_parseval(self):
        whole = dct.DCT(3, 8, 8, 2).double()
        y = whole.transform(self.x)
        torch.testing.assert_close(y.square().sum((-2, -1)), self.x.square().sum((-2, -1)), rtol=1e-6, atol=0)
        torch.testing.assert_close(whole.image(y), self.x, rtol=0, atol=1e-6)
        corner = dct.DCT(3, 8, 3, 2).double()
        low = corner.image(y[..., :3, :3])                # the inverse of y with zeros for all else
        expected = torch.zeros_like(y)
        expected[..., :3, :3] = y[..., :3, :3]
        torch.testing.assert_close(low, whole.image(expected), rtol=0, atol=1e-6)
        torch.testing.assert_close(corner.transform(low), y[..., :3, :3], rtol=0, atol=1e-6)

    def test_quantises_to_the_nearest_of_the_levels(self):
        y = torch.linspace(-1.2, 1.2, 1001, dtype=torch.float64)
        for bits in (1, 2, 5):
            levels = torch.arange(-2**(bits - 1), 2**(bits - 1), dtype=torch.float64) / 2**(bits - 1)
            c = dct.DCT(1, 8, 1, bits).quantise(y)
            self.assertTrue(torch.equal(c.unique(), levels))
            torch.testing.assert_close((c - y).abs(), (levels - y[:, None]).abs().amin(1))
            self.assertTrue(torch.equal(dct.DCT(1, 8, 1, bits).quantise(c), c))

    def test_the_context_is_in_units_of_the_largest_training_coefficient(self):
        of = dct.DCT(3, 8, 4, 5).double()
        train = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        of.fit(train)
        y = of.transform(train) / of.largest
        torch.testing.assert_close(y.abs().amax(0), torch.ones(3, 4, 4, dtype=torch.float64))
        c = of(train)
        self.assertLess((c - y).abs()[y < 1 - 1 / 16].max().item(), 1 / 32 + 1e-6)
        # what an image of it is: within half a step of each coefficient
        error = (of.transform(of.image(c)) - of.transform(train)).abs() / of.largest
        self.assertLess(error[y < 1 - 1 / 16].max().item(), 1 / 32 + 1e-6)
        of.fit(torch.zeros(2, 3, 8, 8, dtype=torch.float64))                   # a coefficient that is always 0
        self.assertTrue(of(train).isfinite().all())

    def test_what_independent_coefficients_give(self):
        """The shares of the training set's levels, one example more of each: counted one by one."""
        of, train = dct.DCT(1, 8, 2, 2).double(), torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        of.fit(train)
        c, expected = of(train).flatten(1).tolist(), [0.0] * 30
        for i in range(30):
            for k in range(4):
                expected[i] += math.log((sum(c[j][k] == c[i][k] for j in range(30)) + 1) / 34)
        torch.testing.assert_close(of.log_independent(of(train)), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
        self.assertAlmostEqual(of.log_shares.exp().sum(0).sub(1).abs().max().item(), 0, places=6)

    def test_autocast_leaves_it_exact(self):
        of, x = dct.DCT(3, 8, 4, 8), self.x.float()
        expected = of(x), of.image(of(x))
        with torch.autocast("cpu", torch.bfloat16):
            for found, exact in zip((of(x), of.image(of(x))), expected):
                self.assertTrue(torch.equal(found, exact))


class BinnedNormal(unittest.TestCase):
    def test_sums_to_one_over_the_levels(self):
        for bits in (1, 2, 5):
            step = 2.0**(1 - bits)
            levels = torch.arange(-2**(bits - 1), 2**(bits - 1), dtype=torch.float64) * step
            for std in (0.01, 0.1, 1.0, 30.0):
                for mean in (-4.0, -1.0, -0.3, 0.0, 0.26, 0.9, 3.0):
                    log_p = self.log_p(levels, mean, std, step)
                    self.assertAlmostEqual(log_p.exp().sum().item(), 1, places=12)

    @staticmethod
    def log_p(c, mean, std, step):
        p = moved(dct.Diffusion(1, 1, step, 2), 0)
        with torch.no_grad():
            p.log_s.fill_(math.log(std) - 0.35)
            return p.log_p_first(c.view(-1, 1, 1, 1), torch.full_like(c, mean).view(-1, 1, 1, 1), torch.tensor(0.7)).flatten()

    def test_is_the_mass_of_each_bin(self):
        """By sums of the density over fine points."""
        step, mean, std = 0.5, -0.1, 0.4
        fine = (torch.arange(40_000, dtype=torch.float64) + 0.5) * 4e-4 - 8
        density = torch.exp(-(fine - mean)**2 / (2 * std**2)) / (std * math.sqrt(2 * math.pi)) * 4e-4
        nearest = ((fine / step).round() * step).clamp(-1, 0.5)
        levels = torch.tensor([-1, -0.5, 0, 0.5], dtype=torch.float64)
        expected = torch.stack([density[nearest == level].sum() for level in levels])
        torch.testing.assert_close(self.log_p(levels, mean, std, step).exp(), expected, rtol=1e-3, atol=0)

    def test_stays_finite_far_out_in_float32(self):
        step, c = 2 / 32, torch.tensor([-1.0, -0.5, 0.0, 1 - 2 / 32])
        for mean in (-3.0, -1.0, 0.0, 3.0):
            at, log_std = torch.full((4,), mean, requires_grad=True), torch.tensor(math.log(0.02), requires_grad=True)
            log_p = dct.log_binned_normal(c, at, log_std.exp(), step, c < -0.99, c > 0.9)
            exact = dct.log_binned_normal(c.double(), at.detach().double(), torch.tensor(0.02).double(), step, c < -0.99, c > 0.9)
            torch.testing.assert_close(log_p.detach().double(), exact, rtol=1e-4, atol=1e-4)
            log_p.sum().backward()
            self.assertTrue(at.grad.isfinite().all() and log_std.grad.isfinite())


LEVELS = torch.tensor([-1, -0.5, 0, 0.5], dtype=torch.float64)
SHARES = torch.tensor([0.1, 0.15, 0.6, 0.15], dtype=torch.float64)       # of one coefficient, in some data set


class OneCoefficient(unittest.TestCase):
    """p(c) of one coefficient of 4 levels, where everything can be summed."""

    def setUp(self):
        self.p = moved(dct.Diffusion(1, 1, 0.5, 3), 0.2).eval()
        with torch.no_grad():
            self.p.log_s.fill_(math.log(0.5))
        self.beta = torch.linspace(self.p.BETA_1, self.p.BETA_T, self.p.T, dtype=torch.float64)
        self.A = torch.stack([(1 - self.beta[:t]).prod() for t in range(self.p.T + 1)])    # A_0 = 1

    def all_levels(self, draws):
        """(4 draws, 1, 1, 1): each level so many times."""
        return LEVELS.repeat_interleave(draws).view(-1, 1, 1, 1)

    def exact_bound(self, clean):
        """The bound for each level, (4,), by sums over fine points of c_t, from the densities of the chain alone: the KL of a
        step between q(c_{t-1}|c_t, c), the normalised product of q(c_t|c_{t-1}) and q(c_{t-1}|c), and the same with `clean`, its
        variance times exp v."""
        A, beta = self.A, self.beta
        bound = (A[-1] * LEVELS**2 + (1 - A[-1]) - 1 - (1 - A[-1]).log()) / 2
        eps = torch.linspace(-7, 7, 2001, dtype=torch.float64)
        weight = torch.exp(-eps**2 / 2) / torch.exp(-eps**2 / 2).sum()
        for t in range(1, self.p.T + 1):
            c_t = A[t].sqrt() * LEVELS[:, None] + (1 - A[t]).sqrt() * eps                  # (4, points)
            at, v = clean(c_t, t)
            if t > 1:
                precision = (1 - beta[t - 1]) / beta[t - 1] + 1 / (1 - A[t - 1])

                def mean(c):
                    return ((1 - beta[t - 1]).sqrt() / beta[t - 1] * c_t + A[t - 1].sqrt() / (1 - A[t - 1]) * c) / precision

                q, p = (torch.distributions.Normal(mean(of), std) for of, std in (
                    (LEVELS[:, None], precision**-0.5), (at, (torch.exp(v) / precision).sqrt())))
                loss = torch.distributions.kl_divergence(q, p)
            else:
                std = self.p.log_s.exp().flatten() * torch.exp(v / 2)
                edge = torch.tensor([-0.75, -0.25, 0.25], dtype=torch.float64)
                below = torch.special.ndtr((edge - at[..., None]) / std[..., None])
                below = torch.cat([torch.zeros_like(below[..., :1]), below, torch.ones_like(below[..., :1])], -1)
                loss = -torch.stack([row.diff()[:, i] for i, row in enumerate(below)]).log()
            bound = bound + (loss * weight).sum(-1)
        return bound

    def optimum(self, c_t, t):
        """E[c|c_t] under SHARES, any shape."""
        log_q = -(c_t[..., None] - self.A[t].sqrt() * LEVELS)**2 / (2 * (1 - self.A[t]))
        return ((log_q + SHARES.log()).softmax(-1) * LEVELS).sum(-1)

    def optimum_clean(self, c_t, t):
        """What Diffusion.clean would return of the optimum."""
        clean = sum(torch.where(t.view(-1, 1, 1, 1) == step, self.optimum(c_t, 1 + step), 0) for step in range(self.p.T))
        return clean, torch.zeros_like(clean)

    @torch.no_grad()
    def test_bound_is_the_exact_one(self):
        """Of the optimum and of a random network: by the mean over trajectories, and by training's estimate."""
        torch.manual_seed(2)
        network = self.p.clean

        def at_step(clean, c_t, t):
            rows = c_t.reshape(-1, 1, 1, 1)
            return [of.view(c_t.shape) for of in clean(rows, torch.full_like(rows[:, 0, 0, 0], t - 1))]

        for clean in (self.optimum_clean, network):
            with mock.patch.object(self.p, "clean", clean):
                exact = self.exact_bound(functools.partial(at_step, clean))
                c, draws = self.all_levels(4000), 4000
                bound, log_ratio = self.p.bound(c)
                self.assertLess(standard_errors(bound.view(4, draws).T, exact), 4)
                self.assertLess(standard_errors(log_ratio.view(4, draws).T, -exact), 4)
                self.assertLess(standard_errors(self.p.loss(c).view(4, draws).T, exact), 4)
                self.assertLess((bound.view(4, draws).std(1) / draws**0.5 / exact).max().item(), 0.05)
            entropy = -(SHARES * SHARES.log()).sum()
            self.assertGreater((SHARES * exact).sum(), entropy)
        self.assertGreater(at_step(network, torch.linspace(-1, 1, 9, dtype=torch.float64), 3)[1].abs().max().item(), 0.05)

    @torch.no_grad()
    def test_weights_average_to_a_distribution_and_samples_follow_it(self):
        """p(c) = E_q[p(c, c_1, ..., c_T) / q(c_1, ..., c_T|c)] sums to one over the levels, for whatever network, and is the
        distribution of what is sampled."""
        torch.manual_seed(3)
        draws = 10_000
        _, log_ratio = self.p.bound(self.all_levels(draws))
        ratio = log_ratio.view(4, draws).exp()
        probability, error = ratio.mean(1), ratio.std(1) / draws**0.5
        self.assertLess(abs(probability.sum() - 1) / error.square().sum().sqrt(), 4)
        self.assertLess(error.max().item(), 0.02)
        samples = dct.DCT(1, 8, 1, 2).quantise(self.p.sample(draws)).flatten()
        for level, p, p_error in zip(LEVELS, probability, error):
            share = (samples == level).double()
            self.assertLess(abs(share.mean() - p) / (share.var() / draws + p_error**2).sqrt(), 4)
        self.assertGreater(probability.min().item(), 0.01)

    def test_bins_wider_than_the_levels_are_apart_are_no_masses(self):
        """Bins 2/3 wide around levels 1/2 apart, as the released likelihood has them, sum to as much as 1.9; these to one."""
        for mean, std, theirs in ((-0.25, 0.05, 1.9), (0.3, 0.3, 1.2)):
            upper, lower = (torch.special.ndtr((LEVELS + half - mean) / std) for half in (1 / 3, -1 / 3))
            upper[-1], lower[0] = 1, 0
            self.assertGreater((upper - lower).sum().item(), theirs)
            self.assertAlmostEqual(BinnedNormal.log_p(LEVELS, mean, std, 0.5).exp().sum().item(), 1, places=12)

    def test_the_steps_lead_to_noise(self):
        """q(c_T|c) is close to N(0, I), even of the largest coefficient."""
        self.assertLess(self.p.last(torch.tensor(-1.0)).max().item(), 0.05)


class Context(unittest.TestCase):
    @torch.no_grad()
    def test_training_estimates_the_bound_of_evaluation(self):
        """Per coefficient, of a random network that mixes several."""
        torch.manual_seed(4)
        p, draws = moved(dct.Diffusion(2, 2, 0.5, 4), 0.2).eval(), 8000
        c = LEVELS[torch.randint(4, (1, 2, 2, 2))].expand(draws, -1, -1, -1)
        by_steps, at_random = p.bound(c)[0], p.loss(c)
        error = (by_steps.var(0) / draws + at_random.var(0) / draws).sqrt()
        self.assertLess(((by_steps.mean(0) - at_random.mean(0)).abs() / error).max().item(), 4)
        self.assertLess((error / by_steps.mean(0)).max().item(), 0.05)
        self.assertGreater(by_steps.mean(0).min().item(), 0)

    def test_each_row_has_its_own_step(self):
        """Two rows at different steps of the training loss do not change each other's network output."""
        p, c = moved(dct.Diffusion(1, 3, 0.5, 4), 0.2), torch.zeros(2, 1, 3, 3, dtype=torch.float64)
        p.eval()                                          # no dropout
        for k in (0, 1):                                  # clean value, log of the variance's factor
            both = p.clean(c, torch.tensor([0, 5]))[k]
            self.assertGreater((both[0] - both[1]).abs().max().item(), 1e-3)
            torch.testing.assert_close(both, torch.cat([p.clean(c[i:i + 1], torch.tensor([t]))[k] for i, t in ((0, 0), (1, 5))]))

    def test_a_fixed_variance_is_that_of_q(self):
        p, c = moved(dct.Diffusion(1, 3, 0.5, 4, learned=False), 0.2), torch.zeros(2, 1, 3, 3, dtype=torch.float64)
        self.assertEqual(p.clean(c, torch.tensor([0, 5]))[1].abs().max().item(), 0)

    @torch.no_grad()
    def test_dropout_is_of_training_alone(self):
        p, c = moved(dct.Diffusion(1, 3, 0.5, 4), 0.2), torch.ones(1, 1, 3, 3, dtype=torch.float64)
        found = [[p.train(mode).clean(c, torch.tensor([2]))[0] for _ in range(2)] for mode in (True, False)]
        self.assertEqual([torch.equal(*of) for of in found], [False, True])

    @torch.no_grad()
    def test_terms_are_those_of_the_equations(self):
        """Of both decoders, at given noise."""
        for decoder, hand in (("state", self.state_by_hand), ("aggregate", lambda model, x, noise: by_hand(
                model, x, noise, model.dct.image(model.dct(x))))):
            model, f, x = some_model(3, by=0.3, latents="2,1", num_ch=4, context_size=3, decoder=decoder)
            random = torch.Generator().manual_seed(2)
            noise = [torch.randn(3, 1, side, side, generator=random, dtype=x.dtype) for side in deep.sides_of_latents(f)]
            steps = [torch.randn(3, 1, 3, 3, generator=random, dtype=x.dtype) for _ in range(model.p_c.T)]
            with mock.patch.object(common, "normal_like", side_effect=noise + steps):
                terms = model.eval()(x, f)
            c = model.dct(x)
            with mock.patch.object(common, "normal_like", side_effect=steps):
                bound, log_p_c = model.p_c.bound(c)
            expected = hand(model, x, noise) | {"log_w_c": log_p_c, "kl_4": bound.flatten(1), "mean_4": c.flatten(1),
                                                "context_baseline": -model.dct.log_independent(c)}
            self.assertEqual(set(terms), set(expected))
            for name in expected:
                torch.testing.assert_close(terms[name], expected[name], rtol=1e-9, atol=1e-9,
                                           msg=lambda text: f"{decoder}, {name}: {text}")
            self.assertGreater(len(c.unique()), 2)

    @staticmethod
    def state_by_hand(model, x, noise):
        """The terms of a binary model with --decoder state, by the equations of the model's docstring, from its weights."""
        weights, L = dict(model.named_parameters()), len(noise)

        def conv(name, h, padding=0):
            return F.conv2d(h, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)

        def silu(h):
            return h / (1 + torch.exp(-h))

        def block(name, h):
            h = conv(f"{name}.0", h)
            for i, padding in ((2, 1), (4, 1), (6, 0)):
                h = conv(f"{name}.{i}", silu(h), padding)
            return h * weights.get(f"{name}.gate", 1)

        def head(name, h):
            return block(f"{name}.block", h) + conv(f"{name}.linear", h)

        def pooled(h, side):
            return h.unflatten(-1, (side, -1)).unflatten(-3, (side, -1)).mean((-1, -3))

        e, features, image = conv("encoder.x_to_e", x), {}, model.dct.image(model.dct(x))
        for k, side in enumerate((14, 7)):                # one block a latent of the scale
            for i in range(sum(eps.shape[-1] == side for eps in noise)):
                e = e + block(f"encoder.scales.{k}.{i}", silu(e))
            e = features[side] = pooled(e, side)
        s, log_ratio, terms = torch.ones_like(features[7]), 0, {}
        for i, eps in enumerate(noise):
            level, side = L - i, eps.shape[-1]
            if i == 0 or side != s.shape[-1]:
                s = s.repeat_interleave(side // s.shape[-1], -1).repeat_interleave(side // s.shape[-1], -2)
                s = s + conv(f"context_to_s.{side}", pooled(image, side))
            out = head(f"latents.{i}.s_to_p", s)
            p_mean, p_log_var, h = out[:, :1], out[:, 1:2].clamp(-10, 1), out[:, 2:]
            out = head(f"latents.{i}.s_to_q", (features[side] + s) / math.sqrt(2))
            q_mean, q_log_var = out[:, :1], -torch.log1p(torch.exp(out[:, 1:])).clamp(max=5)
            z = q_mean + torch.exp(q_log_var / 2) * eps
            kl = (p_log_var - q_log_var + (torch.exp(q_log_var) + (q_mean - p_mean)**2) / torch.exp(p_log_var) - 1) / 2
            log_ratio = log_ratio + (eps**2 + q_log_var - (z - p_mean)**2 / torch.exp(p_log_var) - p_log_var).flatten(1).sum(1) / 2
            terms |= {f"kl_{level}": kl.flatten(1), f"mean_{level}": ((q_mean - p_mean) * torch.exp(-p_log_var / 2)).flatten(1)}
            s = s + h + conv(f"latents.{i}.z_to_s", z)
        s = s.repeat_interleave(2, -1).repeat_interleave(2, -2)
        logits = conv("to_x.1", silu(s + block("last_block", s)), padding=1)
        log_px_z = (x * logits - torch.log1p(torch.exp(logits))).flatten(1).sum(1)
        return terms | {"log_px_z": log_px_z, "log_w": log_px_z + log_ratio}

    @torch.no_grad()
    def test_mean_of_log_w_is_the_elbo(self):
        """Of the weights of z and those of the context's steps, each by itself."""
        model, f, x = some_model(2, by=0.3, latents="1,1", num_ch=3, context_size=2)
        torch.manual_seed(5)
        terms = model.eval()(x, f, sample_shape=(1000,))
        of_z = terms["log_w"] - terms["log_px_z"] + sum(terms[f"kl_{l}"].sum(-1) for l in (1, 2))
        for difference in (of_z, terms["log_w_c"] + terms["kl_3"].sum(-1)):
            self.assertLess(standard_errors(difference), 4)
            self.assertGreater(difference.std().item(), 0.5)

    @torch.no_grad()
    def test_log_px_is_the_contexts_and_what_is_given_it(self):
        """log p(c) + log p(x|c) of a model whose latents tell nothing: exact in x, and for c a sum over its four values."""
        model, f, x = some_model(3, latents="0,1", num_ch=2, context_size=1)
        for p in model.latents.parameters():
            p.zero_()                                     # q(z|x) and p(z) alike, and s knows nothing of z
        one = OneCoefficient()
        one.setUp()
        model.p_c.clean = one.optimum_clean               # of which the weights vary little
        model.latents[0].s_to_q.block[-1].bias[1] = math.log(math.e - 1)     # -softplus = -1, where p's log-variance is
        model.latents[0].s_to_p.block[-1].bias[1] = -1.0
        data = datasets.Data("digits", (x,), (x,))
        settings = dct.Flags(latents="0,1", num_ch=2, context_size=1, device="cpu", num_samples=300)
        metrics, examples = report.evaluate(model.eval(), settings, data)
        torch.manual_seed(6)
        ratio = model.p_c.bound(LEVELS.repeat_interleave(1000).view(-1, 1, 1, 1))[1].view(4, -1).exp()
        p_c, relative_error = ratio.mean(1), (ratio.std(1) / ratio.mean(1)).max() / 300**0.5
        self.assertLess(abs(p_c.sum() - 1) / (ratio.var(1).sum() / 1000).sqrt(), 4)
        c = model.dct(x)
        _, found = model.top_down(c, None, lambda l, p, q: p.mean)
        expected = p_c[(c.flatten() * 2 + 2).long()].log() + model.p_x(found).log_prob(x).flatten(1).sum(1)
        torch.testing.assert_close(torch.tensor(examples["log_px"]), expected, rtol=0,
                                   atol=5 * relative_error.item())
        self.assertLess(relative_error.item(), 0.1)
        self.assertGreater(metrics["log_px"] - metrics["elbo"], 0.02)

    def test_learned_levels_start_at_the_prior(self):
        """Of the aggregate's decoder without the linear path; the published posterior's variance starts at a half, the prior's at 1."""
        for decoder, kl in (("aggregate", 0.0), ("state", (math.log(2) + 0.5 - 1) / 2)):
            model, f, x = some_model(2, latents="1,1", num_ch=4, linear_path=False, decoder=decoder)
            terms = model(x, f)
            for l in (1, 2):
                torch.testing.assert_close(terms[f"kl_{l}"], torch.full_like(terms[f"kl_{l}"], kl), rtol=0, atol=1e-12)
            self.assertGreater(terms["kl_3"].min().item(), 0)

    def test_sampling_and_inference_agree_on_shapes(self):
        for latents, num_ch, dataset, k, bits, decoder in (
                ("1", 1, "mnist", 1, 1, "state"), ("0,2", 2, "mnist", 28, 3, "aggregate"), ("2,1", 3, "auto", 7, 0, "state"),
                ("1,0,1", 2, "cifar10", 3, 0, "state"), ("1,0,1", 2, "cifar10", 3, 0, "aggregate")):
            with self.subTest(latents=latents, num_ch=num_ch, dataset=dataset, context_size=k, bits=bits, decoder=decoder):
                model, f, x = some_model(2, latents=latents, num_ch=num_ch, dataset=dataset, context_size=k, bits=bits,
                                         decoder=decoder, diffusion_ch=4)
                sides, c_x = deep.sides_of_latents(f), x.shape[1]
                L = len(sides)
                self.assertEqual((model.learned_levels, model.levels), (L, L + 1))
                self.assertEqual(model.dct.step, 2.0**(1 - (bits or {"cifar10": 5}.get(dataset, 2))))
                c_z = 8 if dataset == "cifar10" else 1
                units = {f"kl_{L - i}": c_z * side**2 for i, side in enumerate(sides)} | {f"kl_{L + 1}": c_x * k * k}
                small.terms_in_shape(self, model, x, f, units, ("log_w", "log_w_c", "context_baseline"),
                                     (f"mean_{L + 1}", "context_baseline"))
                images = [*model.samples(2, f).values(), *(model.reconstruct(x, f, keep) for keep in range(L + 2)),
                          *model.reconstructions(x, f).values()]
                self.assertEqual({tuple(of.shape) for of in images}, {tuple(x.shape)})
                self.assertEqual(len(model.top_posterior(x, f, L)), L)

    @torch.no_grad()
    def test_levels_kept(self):
        """keep = 1 keeps the context alone, all of it and nothing else; keep = 0 nothing of x."""
        model, f, x = some_model(2, by=0.5, latents="1,1", num_ch=3, context_size=4)
        model.eval()
        images = [model.reconstruct(x, f, keep) for keep in range(4)]
        torch.testing.assert_close(images[0][0], images[0][1])
        for a, b in zip(images, images[1:]):
            self.assertGreater((a - b).abs().max().item(), 1e-3)
        c = model.dct(x)
        self.assertGreater((c[0] - c[1]).abs().max().item(), 0)
        with mock.patch.object(common, "normal_like", torch.zeros_like):
            with mock.patch.object(model.p_c, "sample", lambda n: c):
                samples = model.samples(2, f)
            torch.testing.assert_close(samples["contexts"], model.dct.image(c))
            torch.testing.assert_close(samples["what comes of them"], images[1])
            shown = model.reconstructions(x, f)
            for (caption, of), expected in zip(shown.items(), (x, model.dct.image(c), images[3], images[2], images[1])):
                torch.testing.assert_close(of, expected, msg=caption)
            self.assertEqual(len(shown), 5)

    def test_top_posterior_has_a_gradient_in_x(self):
        model, f, x = some_model(2, by=0.5, latents="1,2", num_ch=3)
        x.requires_grad_()
        posteriors = model.top_posterior(x, f, 2)
        self.assertEqual([tuple(q.mean.shape) for q in posteriors], [(2, 1, 7, 7), (2, 1, 14, 14)])
        gradient, = torch.autograd.grad(sum(q.mean.square().sum() for q in posteriors), x)
        self.assertGreater(gradient.abs().amax((1, 2, 3)).min().item(), 1e-4)

    def test_training_measures_the_context_and_averages_it_along(self):
        f = dct.Flags(latents="1,1", num_ch=2, ema=0.5, num_epochs=1, warmup_epochs=0.0, device="cpu")
        images = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(6))
        data, losses = datasets.Data("digits", (images,), (images,)), []
        loop = types.SimpleNamespace(steps=2, replayed=lambda step: step, batches=lambda **parts: iter(torch.arange(8).split(4)),
                                     record=lambda means: losses.append(means["loss"].item()))
        start = training.build(dct.DCTVAE, f, data)
        model = dct.train(training.build(dct.DCTVAE, f, data), common.on_device(f, images), data, loop)
        largest = (model.dct.basis @ images @ model.dct.basis.T).abs().amax(0)
        torch.testing.assert_close(model.state_dict()["dct.largest"], largest)
        self.assertEqual(len(losses), 2)
        changed = {name for (name, a), b in zip(start.named_parameters(), model.parameters()) if not torch.equal(a, b)}
        self.assertLessEqual({"to_x.1.weight", "p_c.log_s", "latents.0.s_to_q.block.6.weight"}, changed)


class Twins(unittest.TestCase):
    def test_what_is_the_ladders_is_spelt_alike(self):
        self.assertEqual(*(inspect.getsource(module.Head) for module in (ladder, dct)))


if __name__ == "__main__":
    unittest.main()
