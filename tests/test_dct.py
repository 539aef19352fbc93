"""MNIST_HVAE_DCT: its transform, the diffusion model's bound, and the terms of the ELBO.

They are checked against the defining sum, exact values and the equations.
"""
import functools
import inspect
import math
import types
import unittest
from unittest import mock

import common
import torch
from torch.distributions import Normal, kl_divergence

import datasets
import deep
import MNIST_HVAE_DCT as dct
import MNIST_HVAE_Ladder as ladder
import processes
import report
import training
from tests import small
from tests.test_ladder import (
    Weights,
    by_hand,
    level_by_hand,
    log_bernoulli,
    mean_over_squares,
    model_and_images,
    repeated,
    silu,
    standard_errors,
)


def some_model(n, distance=0.0, **flags):
    """As `model_and_images`, with the context scaled so that all its levels occur."""
    model, f, x = model_and_images(n, distance, dct.DCTVAE, dct.Flags, **flags)
    model.dct.fit(x)
    return model, f, x


class Transform(unittest.TestCase):
    def setUp(self):
        random = torch.Generator().manual_seed(1)
        self.x = torch.rand(2, 3, 8, 8, generator=random, dtype=torch.float64)

    def test_is_the_sum_that_defines_it(self):
        y = dct.DCT(3, 8, 5, 2).double().transform(self.x)
        self.assertEqual(tuple(y.shape), (2, 3, 5, 5))

        def factor(u, i):
            return math.sqrt((2 if u else 1) / 8) * math.cos(math.pi * u * (2 * i + 1) / 16)

        for u in range(5):
            for v in range(5):
                expected = 0
                for i in range(8):
                    for j in range(8):
                        expected = expected + factor(u, i) * factor(v, j) * self.x[:, :, i, j]
                torch.testing.assert_close(y[:, :, u, v], expected, rtol=0, atol=1e-6)

    def test_inverse_and_parseval(self):
        whole = dct.DCT(3, 8, 8, 2).double()
        y = whole.transform(self.x)
        squares = self.x.square().sum((-2, -1))
        torch.testing.assert_close(y.square().sum((-2, -1)), squares, rtol=1e-6, atol=0)
        torch.testing.assert_close(whole.image(y), self.x, rtol=0, atol=1e-6)

    def test_higher_frequencies_of_an_image_are_0(self):
        whole = dct.DCT(3, 8, 8, 2).double()
        corner = dct.DCT(3, 8, 3, 2).double()
        y = whole.transform(self.x)
        low = corner.image(y[..., :3, :3])
        corner_alone = torch.zeros_like(y)
        corner_alone[..., :3, :3] = y[..., :3, :3]
        torch.testing.assert_close(low, whole.image(corner_alone), rtol=0, atol=1e-6)
        torch.testing.assert_close(corner.transform(low), y[..., :3, :3], rtol=0, atol=1e-6)

    def test_quantises_to_the_nearest_of_the_levels(self):
        y = torch.linspace(-1.2, 1.2, 1001, dtype=torch.float64)
        for bits in (1, 2, 5):
            half = 2 ** (bits - 1)
            levels = torch.arange(-half, half, dtype=torch.float64) / half
            c = dct.DCT(1, 8, 1, bits).quantise(y)
            self.assertTrue(torch.equal(c.unique(), levels))
            torch.testing.assert_close((c - y).abs(), (levels - y[:, None]).abs().amin(1))
            self.assertTrue(torch.equal(dct.DCT(1, 8, 1, bits).quantise(c), c))

    def test_the_context_is_in_units_of_the_largest_training_coefficient(self):
        transform = dct.DCT(3, 8, 4, 5).double()
        random = torch.Generator().manual_seed(2)
        train = torch.rand(50, 3, 8, 8, generator=random, dtype=torch.float64)
        transform.fit(train)
        y = transform.transform(train) / transform.largest
        torch.testing.assert_close(y.abs().amax(0), torch.ones(3, 4, 4, dtype=torch.float64))

        # Each coefficient of the context, and of the context's image, is within half a step.
        c = transform(train)
        not_clamped = y < 1 - 1 / 16
        self.assertLess((c - y).abs()[not_clamped].max().item(), 1 / 32 + 1e-6)
        difference = transform.transform(transform.image(c)) - transform.transform(train)
        error = difference.abs() / transform.largest
        self.assertLess(error[not_clamped].max().item(), 1 / 32 + 1e-6)

        # A coefficient may be 0 in all training images.
        transform.fit(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
        self.assertTrue(transform(train).isfinite().all())

    def test_log_probability_of_independent_coefficients(self):
        """The shares of the levels are counted one by one, with one more example at each."""
        transform = dct.DCT(1, 8, 2, 2).double()
        random = torch.Generator().manual_seed(4)
        train = torch.rand(30, 1, 8, 8, generator=random, dtype=torch.float64)
        transform.fit(train)
        contexts = transform(train)
        c = contexts.flatten(1).tolist()
        expected = [0.0] * 30
        for i in range(30):
            for k in range(4):
                count = 0
                for j in range(30):
                    count += c[j][k] == c[i][k]
                expected[i] += math.log((count + 1) / 34)
        expected = torch.tensor(expected, dtype=torch.float64)
        log_p = transform.log_independent(contexts)
        torch.testing.assert_close(log_p, expected, rtol=1e-6, atol=0)
        total = transform.log_shares.exp().sum(0)
        self.assertAlmostEqual((total - 1).abs().max().item(), 0, places=6)

    def test_autocast_leaves_it_exact(self):
        transform = dct.DCT(3, 8, 4, 8)
        x = self.x.float()
        c = transform(x)
        image = transform.image(c)
        with torch.autocast("cpu", torch.bfloat16):
            self.assertTrue(torch.equal(transform(x), c))
            self.assertTrue(torch.equal(transform.image(transform(x)), image))


def log_binned(c, mean, std, step):
    """log p(c|c_1) of the diffusion model, (n,), for levels c (n,), a mean and a std."""
    p = dct.Diffusion(1, 1, step, 2).double()
    means = torch.full_like(c, mean).view(-1, 1, 1, 1)
    with torch.no_grad():
        # The std is exp(log_s + v / 2), with v = 0.7.
        p.log_s.fill_(math.log(std) - 0.35)
        return p.log_p_first(c.view(-1, 1, 1, 1), means, torch.tensor(0.7)).flatten()


class BinnedNormal(unittest.TestCase):
    def test_sums_to_one_over_the_levels(self):
        for bits in (1, 2, 5):
            step = 2.0 ** (1 - bits)
            half = 2 ** (bits - 1)
            levels = torch.arange(-half, half, dtype=torch.float64) * step
            for std in (0.01, 0.1, 1.0, 30.0):
                for mean in (-4.0, -1.0, -0.3, 0.0, 0.26, 0.9, 3.0):
                    total = log_binned(levels, mean, std, step).exp().sum().item()
                    self.assertAlmostEqual(total, 1, places=12)

    def test_is_the_mass_of_each_bin(self):
        """The masses are sums of the density over fine points."""
        step, mean, std = 0.5, -0.1, 0.4
        points = (torch.arange(40_000, dtype=torch.float64) + 0.5) * 4e-4 - 8
        density = torch.exp(-((points - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))
        mass = density * 4e-4
        nearest = ((points / step).round() * step).clamp(-1, 0.5)
        levels = torch.tensor([-1, -0.5, 0, 0.5], dtype=torch.float64)
        expected = torch.stack([mass[nearest == level].sum() for level in levels])
        p = log_binned(levels, mean, std, step).exp()
        torch.testing.assert_close(p, expected, rtol=1e-3, atol=0)

    def test_stays_finite_far_out_in_float32(self):
        step = 2 / 32
        c = torch.tensor([-1.0, -0.5, 0.0, 1 - 2 / 32])
        for mean in (-3.0, -1.0, 0.0, 3.0):
            means = torch.full((4,), mean, requires_grad=True)
            log_std = torch.tensor(math.log(0.02), requires_grad=True)
            log_p = dct.log_binned_normal(c, means, log_std.exp(), step, c < -0.99, c > 0.9)
            exact = dct.log_binned_normal(
                c.double(),
                means.detach().double(),
                torch.tensor(0.02).double(),
                step,
                c < -0.99,
                c > 0.9,
            )
            torch.testing.assert_close(log_p.detach().double(), exact, rtol=1e-4, atol=1e-4)
            log_p.sum().backward()
            self.assertTrue(means.grad.isfinite().all())
            self.assertTrue(log_std.grad.isfinite())


# The levels of one coefficient of two bits, and the share of each in some data set.
LEVELS = torch.tensor([-1, -0.5, 0, 0.5], dtype=torch.float64)
SHARES = torch.tensor([0.1, 0.15, 0.6, 0.15], dtype=torch.float64)


class OneDiffusion:
    """p(c) of one coefficient of four levels, where everything can be summed."""

    def __init__(self):
        torch.manual_seed(1)
        self.p = small.moved(dct.Diffusion(1, 1, 0.5, 3).double(), 0.2).eval()
        with torch.no_grad():
            self.p.log_s.fill_(math.log(0.5))
        self.beta = torch.linspace(self.p.BETA_1, self.p.BETA_T, self.p.T, dtype=torch.float64)
        # A_0 = 1, A_1, ..., A_T
        A = [(1 - self.beta[:t]).prod() for t in range(self.p.T + 1)]
        self.A = torch.stack(A)

    def exact_bound(self, clean):
        """The bound for each level, (4,), from the densities of the chain alone.

        Each expectation over c_t is a sum over fine points. clean(c_t, t) is the network.
        """
        A_T = self.A[-1]
        bound = (A_T * LEVELS**2 + (1 - A_T) - 1 - (1 - A_T).log()) / 2
        eps = torch.linspace(-7, 7, 2001, dtype=torch.float64)
        weight = torch.exp(-(eps**2) / 2) / torch.exp(-(eps**2) / 2).sum()
        for t in range(1, self.p.T + 1):
            c_t = self.A[t].sqrt() * LEVELS[:, None] + (1 - self.A[t]).sqrt() * eps  # (4, points)
            clean_value, v = clean(c_t, t)
            if t > 1:
                loss = self.exact_kl(c_t, t, clean_value, v)
            else:
                loss = self.exact_first_loss(clean_value, v)
            bound = bound + (loss * weight).sum(-1)
        return bound

    def exact_kl(self, c_t, t, clean_value, v):
        """The KL of step t between q(c_{t-1}|c_t, c) and p(c_{t-1}|c_t), (4, points).

        q is the normalised product of q(c_t|c_{t-1}) and q(c_{t-1}|c). p is the same at the clean
        value in place of c, with exp(v) times its variance.
        """
        A_before, beta = self.A[t - 1], self.beta[t - 1]
        precision = (1 - beta) / beta + 1 / (1 - A_before)

        def mean(c):
            weighted = (1 - beta).sqrt() / beta * c_t + A_before.sqrt() / (1 - A_before) * c
            return weighted / precision

        q = Normal(mean(LEVELS[:, None]), precision**-0.5)
        p = Normal(mean(clean_value), (torch.exp(v) / precision).sqrt())
        return kl_divergence(q, p)

    def exact_first_loss(self, clean_value, v):
        """-log p(c|c_1) for each level c at its own points c_1, (4, points)."""
        std = self.p.log_s.exp().flatten() * torch.exp(v / 2)
        edges = torch.tensor([-0.75, -0.25, 0.25], dtype=torch.float64)
        below = torch.special.ndtr((edges - clean_value[..., None]) / std[..., None])
        zeros = torch.zeros_like(below[..., :1])
        below = torch.cat([zeros, below, torch.ones_like(zeros)], dim=-1)
        masses = below.diff()  # (4, points, 4)
        return -torch.stack([masses[i, :, i] for i in range(4)]).log()

    def optimum(self, c_t, t):
        """E[c|c_t] under SHARES, any shape."""
        log_q = -((c_t[..., None] - self.A[t].sqrt() * LEVELS) ** 2) / (2 * (1 - self.A[t]))
        return ((log_q + SHARES.log()).softmax(-1) * LEVELS).sum(-1)

    def optimum_clean(self, c_t, t):
        """In place of Diffusion.clean: the optimum, with v = 0."""
        clean = 0
        for step in range(self.p.T):
            is_step = t.view(-1, 1, 1, 1) == step
            clean = clean + torch.where(is_step, self.optimum(c_t, 1 + step), 0)
        return clean, torch.zeros_like(clean)


def repeated_levels(draws):
    """Each level `draws` times, (4 draws, 1, 1, 1)."""
    return LEVELS.repeat_interleave(draws).view(-1, 1, 1, 1)


class OneCoefficient(unittest.TestCase):
    def setUp(self):
        self.one = OneDiffusion()
        self.p = self.one.p

    @torch.no_grad()
    def test_bound_is_the_exact_one(self):
        """The mean of `bound` over trajectories is exact, and so is training's estimate.

        This holds for the optimum and for a random network.
        """
        torch.manual_seed(2)
        network = self.p.clean

        def clean_at_step(clean, c_t, t):
            rows = c_t.reshape(-1, 1, 1, 1)
            steps = torch.full_like(rows[:, 0, 0, 0], t - 1)
            return [result.view(c_t.shape) for result in clean(rows, steps)]

        draws = 4000
        c = repeated_levels(draws)
        entropy = -(SHARES * SHARES.log()).sum()
        for clean in (self.one.optimum_clean, network):
            with mock.patch.object(self.p, "clean", clean):
                exact = self.one.exact_bound(functools.partial(clean_at_step, clean))
                bound, log_ratio = self.p.bound(c)
                loss = self.p.loss(c)
            self.assertLess(standard_errors(bound.view(4, draws).T, exact), 4)
            self.assertLess(standard_errors(log_ratio.view(4, draws).T, -exact), 4)
            self.assertLess(standard_errors(loss.view(4, draws).T, exact), 4)
            relative_error = bound.view(4, draws).std(1) / draws**0.5 / exact
            self.assertLess(relative_error.max().item(), 0.05)
            self.assertGreater((SHARES * exact).sum(), entropy)

        # The network's variance differs from q's.
        _, v = clean_at_step(network, torch.linspace(-1, 1, 9, dtype=torch.float64), 3)
        self.assertGreater(v.abs().max().item(), 0.05)

    @torch.no_grad()
    def test_weights_average_to_a_distribution_and_samples_follow_it(self):
        """p(c) = E_q[p(c, c_1, ..., c_T) / q(c_1, ..., c_T|c)] sums to one over the levels.

        This holds for any network. The samples have this distribution.
        """
        torch.manual_seed(3)
        draws = 10_000
        _, log_ratio = self.p.bound(repeated_levels(draws))
        ratio = log_ratio.view(4, draws).exp()
        probability = ratio.mean(1)
        error = ratio.std(1) / draws**0.5
        self.assertLess(abs(probability.sum() - 1) / error.square().sum().sqrt(), 4)
        self.assertLess(error.max().item(), 0.02)
        self.assertGreater(probability.min().item(), 0.01)

        samples = dct.DCT(1, 8, 1, 2).quantise(self.p.sample(draws)).flatten()
        for level, p, p_error in zip(LEVELS, probability, error):
            share = (samples == level).double()
            share_error = (share.var() / draws + p_error**2).sqrt()
            self.assertLess(abs(share.mean() - p) / share_error, 4)

    def test_bins_wider_than_the_levels_are_apart_are_no_masses(self):
        """The released likelihood has bins 2/3 wide around levels that are 1/2 apart.

        Its sum over the levels is up to 1.9. The sum of this one is 1.
        """
        for mean, std, released_sum in ((-0.25, 0.05, 1.9), (0.3, 0.3, 1.2)):
            upper = torch.special.ndtr((LEVELS + 1 / 3 - mean) / std)
            lower = torch.special.ndtr((LEVELS - 1 / 3 - mean) / std)
            upper[-1] = 1
            lower[0] = 0
            self.assertGreater((upper - lower).sum().item(), released_sum)
            total = log_binned(LEVELS, mean, std, 0.5).exp().sum().item()
            self.assertAlmostEqual(total, 1, places=12)

    def test_the_steps_lead_to_noise(self):
        """q(c_T|c) is close to N(0, I), even for the largest coefficient."""
        self.assertLess(self.p.last(torch.tensor(-1.0)).max().item(), 0.05)


class Diffusion(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(4)

    @torch.no_grad()
    def test_training_estimates_the_bound_of_evaluation(self):
        """They agree for each coefficient, with a random network that mixes several."""
        p = small.moved(dct.Diffusion(2, 2, 0.5, 4).double(), 0.2).eval()
        draws = 8000
        c = LEVELS[torch.randint(4, (1, 2, 2, 2))].expand(draws, -1, -1, -1)
        bound, _ = p.bound(c)
        loss = p.loss(c)
        error = (bound.var(0) / draws + loss.var(0) / draws).sqrt()
        difference = (bound.mean(0) - loss.mean(0)).abs()
        self.assertLess((difference / error).max().item(), 4)
        self.assertLess((error / bound.mean(0)).max().item(), 0.05)
        self.assertGreater(bound.mean(0).min().item(), 0)

    def test_each_row_has_its_own_step(self):
        """Two rows at different steps do not change each other's output of the network."""
        p = small.moved(dct.Diffusion(1, 3, 0.5, 4).double(), 0.2).eval()
        c = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
        both = p.clean(c, torch.tensor([0, 5]))
        first = p.clean(c[:1], torch.tensor([0]))
        second = p.clean(c[1:], torch.tensor([5]))
        # The clean value, then the logarithm of the variance's factor.
        for k in (0, 1):
            self.assertGreater((both[k][0] - both[k][1]).abs().max().item(), 1e-3)
            torch.testing.assert_close(both[k], torch.cat([first[k], second[k]]))

    def test_a_fixed_variance_is_that_of_q(self):
        p = small.moved(dct.Diffusion(1, 3, 0.5, 4, learned=False).double(), 0.2)
        c = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
        _, v = p.clean(c, torch.tensor([0, 5]))
        self.assertEqual(v.abs().max().item(), 0)

    @torch.no_grad()
    def test_dropout_happens_in_training_only(self):
        p = small.moved(dct.Diffusion(1, 3, 0.5, 4).double(), 0.2)
        c = torch.ones(1, 1, 3, 3, dtype=torch.float64)
        for mode in (True, False):
            p.train(mode)
            first, _ = p.clean(c, torch.tensor([2]))
            second, _ = p.clean(c, torch.tensor([2]))
            self.assertEqual(torch.equal(first, second), not mode)


def state_by_hand(model, x, noise):
    """The terms of a binary model with --decoder state, by the equations of its docstring.

    They are computed from its weights, as in `by_hand`.
    """
    weights = Weights(model)
    L = len(noise)
    image = model.dct.image(model.dct(x))

    # 1. The encoder: one block per latent of the scale. An odd side is not halved.
    e = weights.conv("encoder.x_to_e", x)
    features = {}
    top = noise[0].shape[-1]
    while top not in features:
        k = len(features)
        side = e.shape[-1] // 2 if e.shape[-1] % 2 == 0 else e.shape[-1]
        latents_of_scale = [eps for eps in noise if eps.shape[-1] == side]
        for i in range(len(latents_of_scale)):
            e = e + weights.block(f"encoder.scales.{k}.{i}", silu(e))
        e = mean_over_squares(e, side)
        features[side] = e

    # 2. The levels, the top one first.
    s = torch.ones_like(features[top])
    log_ratio = 0
    terms = {}
    for i, eps in enumerate(noise):
        level = L - i
        side = eps.shape[-1]
        if i == 0 or side != s.shape[-1]:
            s = repeated(s, side)
            s = s + weights.conv(f"context_to_s.{side}", mean_over_squares(image, side))
        out = weights.head(f"latents.{i}.s_to_p", s)
        p_mean, p_log_var, h = out[:, :1], out[:, 1:2].clamp(-10, 1), out[:, 2:]
        out = weights.head(f"latents.{i}.s_to_q", (features[side] + s) / math.sqrt(2))
        q_mean = out[:, :1]
        q_log_var = -torch.log1p(torch.exp(out[:, 1:])).clamp(max=5)

        z, level_log_ratio, level_terms = level_by_hand(
            level, p_mean=p_mean, p_log_var=p_log_var, q_mean=q_mean, q_log_var=q_log_var, eps=eps)
        terms |= level_terms
        log_ratio = log_ratio + level_log_ratio
        s = s + h + weights.conv(f"latents.{i}.z_to_s", z)

    # 3. The pixels.
    s = repeated(s, x.shape[-1])
    logits = weights.conv("to_x.1", silu(s + weights.block("last_block", s)), padding=1)
    log_px_z = log_bernoulli(x, logits)
    return terms | {"log_px_z": log_px_z, "log_w": log_px_z + log_ratio}


def aggregate_by_hand(model, x, noise):
    """The terms of a binary model with --decoder aggregate, which is the ladder's."""
    return by_hand(model, x, noise, model.dct.image(model.dct(x)))


class Context(unittest.TestCase):
    @torch.no_grad()
    def test_terms_are_those_of_the_equations(self):
        """Both decoders are checked, at given noise and at several sides of the images."""
        cases = (
            ("state", state_by_hand, "2,1", 28),
            ("state", state_by_hand, "2", 14),
            ("state", state_by_hand, "2", 7),
            ("aggregate", aggregate_by_hand, "2,1", 28),
            ("aggregate", aggregate_by_hand, "2", 14),
            ("aggregate", aggregate_by_hand, "2", 7),
        )
        for decoder, terms_by_hand, latents, side_of_image in cases:
            flags = {"decoder": decoder, "latents": latents, "side": side_of_image}
            model, f, x = some_model(3, distance=0.3, num_ch=4, context_size=3, **flags)
            self.assertEqual(x.shape[-1], side_of_image)

            # 1. The terms, where the noise of the latents comes first.
            random = torch.Generator().manual_seed(2)
            noise = []
            for side in deep.latent_sides(f):
                noise.append(torch.randn(3, 1, side, side, generator=random, dtype=x.dtype))
            step_noise = []
            for _ in range(model.p_c.T):
                step_noise.append(torch.randn(3, 1, 3, 3, generator=random, dtype=x.dtype))
            with mock.patch.object(processes, "normal_like", side_effect=noise + step_noise):
                terms = model.eval()(x, f)

            # 2. The terms by hand.
            c = model.dct(x)
            self.assertGreater(len(c.unique()), 2)
            with mock.patch.object(processes, "normal_like", side_effect=step_noise):
                bound, log_p_c = model.p_c.bound(c)
            top = len(noise) + 1
            expected = terms_by_hand(model, x, noise) | {
                "log_w_c": log_p_c,
                f"kl_{top}": bound.flatten(1),
                f"mean_{top}": c.flatten(1),
                "context_baseline": -model.dct.log_independent(c),
            }
            self.assertEqual(set(terms), set(expected))
            for name, value in expected.items():
                with self.subTest(**flags, term=name):
                    torch.testing.assert_close(terms[name], value, rtol=1e-9, atol=1e-9)

    @torch.no_grad()
    def test_mean_of_log_w_is_the_elbo(self):
        """This holds for the weights of z, and for those of the context's steps."""
        model, f, x = some_model(2, distance=0.3, latents="1,1", num_ch=3, context_size=2)
        torch.manual_seed(5)
        terms = model.eval()(x, f, sample_shape=(1000,))
        kl_z = terms["kl_1"].sum(-1) + terms["kl_2"].sum(-1)
        difference_z = terms["log_w"] - terms["log_px_z"] + kl_z
        difference_c = terms["log_w_c"] + terms["kl_3"].sum(-1)
        for difference in (difference_z, difference_c):
            self.assertLess(standard_errors(difference), 4)
            self.assertGreater(difference.std().item(), 0.5)

    @torch.no_grad()
    def test_log_px_is_that_of_the_context_and_of_x_given_it(self):
        """log p(x) = log p(c) + log p(x|c), for a model whose latents carry nothing.

        There log p(x|c) is exact, and p(c) is an average for each of its four values.
        """
        model, f, x = some_model(3, latents="0,1", num_ch=2, context_size=1)
        one = OneDiffusion()

        # 1. q(z|x) and p(z) are alike, and the state knows nothing of z. -softplus(raw) is -1, the
        #    log-variance of p. The weights of the context's steps vary little.
        for p in model.latents.parameters():
            p.zero_()
        model.p_c.clean = one.optimum_clean
        model.latents[0].s_to_q.block[-1].bias[1] = math.log(math.e - 1)
        model.latents[0].s_to_p.block[-1].bias[1] = -1.0

        # 2. The estimate of the evaluation.
        data = datasets.Data("digits", (x,), (x,))
        settings = dct.Flags(
            latents="0,1", num_ch=2, context_size=1, device="cpu", num_samples=300)
        metrics, examples = report.evaluate(model.eval(), settings, data)

        # 3. p(c) of the four values.
        torch.manual_seed(6)
        _, log_ratio = model.p_c.bound(repeated_levels(1000))
        ratio = log_ratio.view(4, -1).exp()
        p_c = ratio.mean(1)
        relative_error = (ratio.std(1) / ratio.mean(1)).max() / 300**0.5
        self.assertLess(abs(p_c.sum() - 1) / (ratio.var(1).sum() / 1000).sqrt(), 4)

        # 4. Both together.
        c = model.dct(x)
        _, decoder_input = model.top_down(c, None, lambda l, p, q: p.mean)
        log_px_c = model.p_x(decoder_input).log_prob(x).flatten(1).sum(1)
        expected = p_c[(c.flatten() * 2 + 2).long()].log() + log_px_c
        torch.testing.assert_close(
            torch.tensor(examples["log_px"]), expected, rtol=0, atol=5 * relative_error.item())
        self.assertLess(relative_error.item(), 0.1)
        self.assertGreater(metrics["log_px"] - metrics["elbo"], 0.02)

    def test_learned_levels_start_at_the_prior(self):
        """With --decoder aggregate and without the linear path, every KL starts at 0.

        The published posterior's variance starts at 1/2, that of the prior at 1.
        """
        published_kl = (math.log(2) + 0.5 - 1) / 2
        for decoder, kl in (("aggregate", 0.0), ("state", published_kl)):
            model, f, x = some_model(
                2, latents="1,1", num_ch=4, linear_path=False, decoder=decoder)
            terms = model(x, f)
            for l in (1, 2):
                expected = torch.full_like(terms[f"kl_{l}"], kl)
                torch.testing.assert_close(terms[f"kl_{l}"], expected, rtol=0, atol=1e-12)
            self.assertGreater(terms["kl_3"].min().item(), 0)

    def test_sampling_and_inference_agree_on_shapes(self):
        cases = (
            ("1", 1, "mnist", 0, 1, 1, "state"),
            ("0,2", 2, "mnist", 28, 28, 3, "aggregate"),
            ("2,1", 3, "auto", 0, 7, 0, "state"),
            ("2", 3, "mnist", 14, 14, 0, "state"),
            ("1", 3, "mnist", 14, 4, 0, "aggregate"),
            # An odd side is not halved.
            ("2", 2, "mnist", 7, 7, 0, "state"),
            ("2", 2, "mnist", 7, 2, 0, "aggregate"),
            ("1", 2, "mnist", 1, 1, 0, "state"),
            ("1,0,1", 2, "cifar10", 0, 3, 0, "state"),
            ("1,0,1", 2, "cifar10", 0, 3, 0, "aggregate"),
            ("1,1", 2, "cifar10", 16, 3, 0, "state"),
        )
        for latents, num_ch, dataset, side, context_size, bits, decoder in cases:
            flags = {
                "latents": latents,
                "num_ch": num_ch,
                "dataset": dataset,
                "side": side,
                "context_size": context_size,
                "bits": bits,
                "decoder": decoder,
            }
            with self.subTest(**flags):
                model, f, x = some_model(2, diffusion_ch=4, **flags)
                self.check_shapes(model, f, x)

    def check_shapes(self, model, f, x):
        # 1. The sizes.
        sides = deep.latent_sides(f)
        L = len(sides)
        c_x = x.shape[1]
        c_z = 8 if f.dataset == "cifar10" else 1
        default_bits = 5 if f.dataset == "cifar10" else 2
        self.assertEqual((model.learned_levels, model.levels), (L, L + 1))
        self.assertEqual(model.dct.step, 2.0 ** (1 - (f.bits or default_bits)))

        # 2. The terms.
        units = {}
        for i, side in enumerate(sides):
            units[f"kl_{L - i}"] = c_z * side**2
        units[f"kl_{L + 1}"] = c_x * f.context_size**2
        small.check_shapes_of_terms(
            self,
            model,
            x,
            f,
            units,
            log_ws=("log_w", "log_w_c", "context_baseline"),
            shared=(f"mean_{L + 1}", "context_baseline"),
        )

        # 3. The images.
        images = [*model.samples(2, f).values(), *model.reconstructions(x, f).values()]
        for keep in range(L + 2):
            images.append(model.reconstruct(x, f, keep))
        self.assertEqual({tuple(batch.shape) for batch in images}, {tuple(x.shape)})
        self.assertEqual(len(model.top_posterior(x, f, L)), L)

    def test_a_context_larger_than_the_image_ends_the_program(self):
        for side, context_size in ((4, 5), (14, 15), (1, 2)):
            status, out, err = small.call(
                dct.main, "--side", side, "--latents", 1, "--context_size", context_size)
            self.assertEqual((status, out, err.count("\n")), (2, "", 1))
            self.assertIn(f"--context_size: got {context_size}, wants at most {side}, ", err)

    @torch.no_grad()
    def test_levels_kept(self):
        """keep = 1 keeps the context only, and all of it. keep = 0 keeps nothing of x."""
        model, f, x = some_model(2, distance=0.5, latents="1,1", num_ch=3, context_size=4)
        model.eval()
        c = model.dct(x)
        self.assertGreater((c[0] - c[1]).abs().max().item(), 0)

        # 1. Each level changes the image.
        images = [model.reconstruct(x, f, keep) for keep in range(4)]
        torch.testing.assert_close(images[0][0], images[0][1])
        for fewer, more in zip(images, images[1:]):
            self.assertGreater((fewer - more).abs().max().item(), 1e-3)

        # 2. Samples and reconstructions show them, where the draws are the means.
        with mock.patch.object(processes, "normal_like", torch.zeros_like):
            with mock.patch.object(model.p_c, "sample", lambda n: c):
                samples = model.samples(2, f)
            panels = model.reconstructions(x, f)
        torch.testing.assert_close(samples["contexts drawn from their prior"], model.dct.image(c))
        torch.testing.assert_close(samples["images decoded from these contexts"], images[1])
        expected = (x, model.dct.image(c), images[3], images[2], images[1])
        self.assertEqual(len(panels), 5)
        for (title, panel), batch in zip(panels.items(), expected):
            torch.testing.assert_close(panel, batch, msg=title)

    def test_top_posterior_has_a_gradient_in_x(self):
        model, f, x = some_model(2, distance=0.5, latents="1,2", num_ch=3)
        x.requires_grad_()
        posteriors = model.top_posterior(x, f, 2)
        shapes = [tuple(q.mean.shape) for q in posteriors]
        self.assertEqual(shapes, [(2, 1, 7, 7), (2, 1, 14, 14)])
        total = sum(q.mean.square().sum() for q in posteriors)
        (gradient,) = torch.autograd.grad(total, x)
        self.assertGreater(gradient.abs().amax((1, 2, 3)).min().item(), 1e-4)

    def test_training_measures_the_context_and_keeps_it_in_the_average(self):
        f = dct.Flags(
            latents="1,1", num_ch=2, ema=0.5, num_epochs=1, warmup_epochs=0.0, device="cpu")
        images = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(6))
        data = datasets.Data("digits", (images,), (images,))
        losses = []
        loop = types.SimpleNamespace(
            steps=2,
            replayed=lambda step: step,
            batches=lambda **parts: iter(torch.arange(8).split(4)),
            record=lambda means: losses.append(means["loss"].item()),
        )
        start = training.build(dct.DCTVAE, f, data)
        model = training.build(dct.DCTVAE, f, data)
        average = dct.train(model, common.on_device(f, images), data, loop)

        basis = average.dct.basis
        largest = (basis @ images @ basis.T).abs().amax(0)
        torch.testing.assert_close(average.state_dict()["dct.largest"], largest)
        self.assertEqual(len(losses), 2)
        changed = set()
        for (name, before), after in zip(start.named_parameters(), average.parameters()):
            if not torch.equal(before, after):
                changed.add(name)
        trained = {"to_x.1.weight", "p_c.log_s", "latents.0.s_to_q.block.6.weight"}
        self.assertLessEqual(trained, changed)


class Residuals(unittest.TestCase):
    """What headroom.py needs. The context has no headroom, since nothing is learned about it."""

    @torch.no_grad()
    def test_residuals_of_the_learned_levels(self):
        for decoder in ("state", "aggregate"):
            model, f, x = some_model(
                2, distance=0.2, latents="1,1", num_ch=3, context_size=2, beta=0.7, decoder=decoder)

            def probabilities(x, S):
                features = {}
                for side, e in model.encoder(x).items():
                    features[side] = e.repeat(S, 1, 1, 1)
                contexts = model.dct(x).repeat(S, 1, 1, 1)
                _, decoder_input = model.top_down(contexts, features, lambda l, p, q: q.sample())
                return model.p_x(decoder_input, (S, len(x))).mean

            with self.subTest(decoder=decoder):
                grey = (x + 0.5) / 2
                small.check_level_residuals(
                    self, model, grey, f, ["_1", "_2"], probabilities, readers=("encoder", "dct"))

    @torch.no_grad()
    def test_order_of_the_draws_in_forward(self):
        """Features come first, then a draw for each level from the top down, then the context's."""
        for decoder in ("state", "aggregate"):
            model, f, x = some_model(
                3, distance=0.3, latents="1,1", num_ch=3, context_size=2, decoder=decoder)
            torch.manual_seed(5)
            terms = model.eval()(x, f, (4,))
            torch.manual_seed(5)
            features = {}
            contexts = deep.repeat_examples(model.dct(x), (4,))
            for side, e in model.encoder(x).items():
                features[side] = deep.repeat_examples(e, (4,))
            drawn, decoder_input = model.top_down(contexts, features, lambda l, p, q: deep.draw(q))
            log_px_z = model.p_x(decoder_input, (4, 3)).log_prob(x).flatten(2).sum(-1)
            self.assertTrue(torch.equal(terms["log_px_z"], log_px_z))
            bound, _ = model.p_c.bound(contexts)
            bound = bound.flatten(1).unflatten(0, (4, 3))
            self.assertTrue(torch.equal(terms["kl_3"], bound))
            for level, (p, q, z) in enumerate(reversed(drawn), start=1):
                kl = kl_divergence(q, p).flatten(1).unflatten(0, (4, 3))
                self.assertTrue(torch.equal(terms[f"kl_{level}"], kl))

    def test_cifar10_has_none(self):
        model, f, x = some_model(1, dataset="cifar10", latents="1", num_ch=2, diffusion_ch=2)
        self.assertEqual(model.residuals(x, f, 4), {})


class SharedCode(unittest.TestCase):
    def test_the_ladder_has_the_same_head(self):
        self.assertEqual(inspect.getsource(ladder.Head), inspect.getsource(dct.Head))


if __name__ == "__main__":
    unittest.main()
