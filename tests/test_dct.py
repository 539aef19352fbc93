"""MNIST_HVAE_DCT: the transform against its defining sum, the diffusion's bound against exact values, the rest as the ladder."""
import inspect
import math
import types
import unittest
from unittest import mock

import torch

import common
import datasets
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
            p.log_s.fill_(math.log(std))
            return p.log_p_first(c.view(-1, 1, 1, 1), torch.full_like(c, mean).view(-1, 1, 1, 1)).flatten()

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
        self.p = moved(dct.Diffusion(1, 1, 0.5, 3), 0.3)
        with torch.no_grad():
            self.p.log_s.fill_(math.log(0.5))
        self.beta = torch.linspace(self.p.BETA_1, self.p.BETA_T, self.p.T, dtype=torch.float64)
        self.A = torch.stack([(1 - self.beta[:t]).prod() for t in range(self.p.T + 1)])    # A_0 = 1

    def all_levels(self, draws):
        """(4 draws, 1, 1, 1): each level so many times."""
        return LEVELS.repeat_interleave(draws).view(-1, 1, 1, 1)

    def exact_bound(self, clean):
        """The bound for each level, (4,), by sums over fine points of c_t, from the densities of the chain alone: the KL of a
        step between q(c_{t-1}|c_t, c), the normalised product of q(c_t|c_{t-1}) and q(c_{t-1}|c), and the same with `clean`."""
        A, beta = self.A, self.beta
        bound = (A[-1] * LEVELS**2 + (1 - A[-1]) - 1 - (1 - A[-1]).log()) / 2
        eps = torch.linspace(-7, 7, 2001, dtype=torch.float64)
        weight = torch.exp(-eps**2 / 2) / torch.exp(-eps**2 / 2).sum()
        for t in range(1, self.p.T + 1):
            c_t = A[t].sqrt() * LEVELS[:, None] + (1 - A[t]).sqrt() * eps                  # (4, points)
            at = clean(c_t, t)
            if t > 1:
                precision = (1 - beta[t - 1]) / beta[t - 1] + 1 / (1 - A[t - 1])

                def mean(c):
                    return ((1 - beta[t - 1]).sqrt() / beta[t - 1] * c_t + A[t - 1].sqrt() / (1 - A[t - 1]) * c) / precision

                loss = precision * (mean(LEVELS[:, None]) - mean(at))**2 / 2
            else:
                std = self.p.log_s.exp().flatten()
                edge = torch.tensor([-0.75, -0.25, 0.25], dtype=torch.float64)
                below = torch.special.ndtr((edge - at[..., None]) / std)
                below = torch.cat([torch.zeros_like(below[..., :1]), below, torch.ones_like(below[..., :1])], -1)
                loss = -torch.stack([row.diff()[:, i] for i, row in enumerate(below)]).log()
            bound = bound + (loss * weight).sum(-1)
        return bound

    def optimum(self, c_t, t):
        """E[c|c_t] under SHARES, any shape."""
        log_q = -(c_t[..., None] - self.A[t].sqrt() * LEVELS)**2 / (2 * (1 - self.A[t]))
        return ((log_q + SHARES.log()).softmax(-1) * LEVELS).sum(-1)

    @torch.no_grad()
    def test_bound_is_the_exact_one(self):
        """Of the optimum and of a random network: by the mean over trajectories, and by training's estimate."""
        torch.manual_seed(2)
        network = self.p.clean

        def optimum(c_t, t):
            t = t if isinstance(t, torch.Tensor) else torch.full((len(c_t),), t)
            return torch.stack([self.optimum(of, 1 + int(step)) for of, step in zip(c_t, t)]) if len(c_t) < 10 else sum(
                torch.where(t.view(-1, 1, 1, 1) == step, self.optimum(c_t, 1 + step), 0) for step in range(self.p.T))

        for clean in (optimum, network):
            with mock.patch.object(self.p, "clean", clean):
                exact = self.exact_bound(lambda c_t, t: clean(c_t.reshape(-1, 1, 1, 1), t - 1).view(c_t.shape))
                c, draws = self.all_levels(4000), 4000
                bound, log_ratio = self.p.bound(c)
                self.assertLess(standard_errors(bound.view(4, draws).T, exact), 4)
                self.assertLess(standard_errors(log_ratio.view(4, draws).T, -exact), 4)
                self.assertLess(standard_errors(self.p.loss(c).view(4, draws).T, exact), 4)
                self.assertLess((bound.view(4, draws).std(1) / draws**0.5 / exact).max().item(), 0.05)
            entropy = -(SHARES * SHARES.log()).sum()
            self.assertGreater((SHARES * exact).sum(), entropy)

    @torch.no_grad()
    def test_weights_average_to_a_distribution_and_samples_follow_it(self):
        """p(c) = E_q[p(c, c_1, ..., c_T) / q(c_1, ..., c_T|c)] sums to one over the levels, for whatever network, and is the
        distribution of what is sampled."""
        torch.manual_seed(3)
        draws = 40_000
        _, log_ratio = self.p.bound(self.all_levels(draws))
        ratio = log_ratio.view(4, draws).exp()
        probability, error = ratio.mean(1), ratio.std(1) / draws**0.5
        self.assertLess(abs(probability.sum() - 1) / error.square().sum().sqrt(), 4)
        self.assertLess(error.max().item(), 0.01)
        samples = dct.DCT(1, 8, 1, 2).quantise(self.p.sample(draws)).flatten()
        for level, p, p_error in zip(LEVELS, probability, error):
            share = (samples == level).double()
            self.assertLess(abs(share.mean() - p) / (share.var() / draws + p_error**2).sqrt(), 4)
        self.assertGreater(probability.min().item(), 0.01)

    def test_the_steps_lead_to_noise(self):
        """q(c_T|c) is close to N(0, I), even of the largest coefficient."""
        self.assertLess(self.p.last(torch.tensor(-1.0)).max().item(), 0.05)


class Context(unittest.TestCase):
    @torch.no_grad()
    def test_training_estimates_the_bound_of_evaluation(self):
        """Per coefficient, of a random network that mixes several."""
        torch.manual_seed(4)
        p, draws = moved(dct.Diffusion(2, 2, 0.5, 4), 0.2), 8000
        c = LEVELS[torch.randint(4, (1, 2, 2, 2))].expand(draws, -1, -1, -1)
        by_steps, at_random = p.bound(c)[0], p.loss(c)
        error = (by_steps.var(0) / draws + at_random.var(0) / draws).sqrt()
        self.assertLess(((by_steps.mean(0) - at_random.mean(0)).abs() / error).max().item(), 4)
        self.assertLess((error / by_steps.mean(0)).max().item(), 0.05)
        self.assertGreater(by_steps.mean(0).min().item(), 0)

    def test_each_row_has_its_own_step(self):
        """Two rows at different steps of the training loss do not change each other's network output."""
        p, c = moved(dct.Diffusion(1, 3, 0.5, 4), 0.2), torch.zeros(2, 1, 3, 3, dtype=torch.float64)
        both = p.clean(c, torch.tensor([0, 5]))
        self.assertGreater((both[0] - both[1]).abs().max().item(), 1e-3)
        torch.testing.assert_close(both, torch.cat([p.clean(c[:1], 0), p.clean(c[1:], 5)]))

    @torch.no_grad()
    def test_terms_are_those_of_the_equations(self):
        model, f, x = some_model(3, by=0.5, latents="2,1", num_ch=4, context_size=3)
        random = torch.Generator().manual_seed(2)
        noise = [torch.randn(3, 1, side, side, generator=random, dtype=x.dtype) for side in dct.sides_of_latents(f)]
        steps = [torch.randn(3, 1, 3, 3, generator=random, dtype=x.dtype) for _ in range(model.p_c.T)]
        with mock.patch.object(common, "normal_like", side_effect=noise + steps):
            terms = model.eval()(x, f)
        c = model.dct(x)
        with mock.patch.object(common, "normal_like", side_effect=steps):
            bound, log_p_c = model.p_c.bound(c)
        hand = by_hand(model, x, noise, model.dct.image(c))
        hand |= {"log_w": hand["log_w"] + log_p_c, "kl_4": bound.flatten(1), "mean_4": c.flatten(1)}
        self.assertEqual(set(terms), set(hand))
        for name in hand:
            torch.testing.assert_close(terms[name], hand[name], rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")
        self.assertGreater(len(c.unique()), 2)

    @torch.no_grad()
    def test_mean_of_log_w_is_the_elbo(self):
        model, f, x = some_model(2, by=0.3, latents="1,1", num_ch=3, context_size=2)
        torch.manual_seed(5)
        terms = model.eval()(x, f, sample_shape=(1000,))
        difference = terms["log_w"] - terms["log_px_z"] + sum(terms[f"kl{level}"].sum(-1) for level in common.levels(terms))
        self.assertLess(standard_errors(difference), 4)
        self.assertGreater(difference.std().item(), 0.5)

    def test_learned_levels_start_at_the_prior(self):
        model, f, x = some_model(2, latents="1,1", num_ch=4)
        terms = model(x, f)
        self.assertEqual(max(terms[f"kl_{l}"].abs().max().item() for l in (1, 2)), 0)
        self.assertGreater(terms["kl_3"].min().item(), 0)

    def test_sampling_and_inference_agree_on_shapes(self):
        for latents, num_ch, dataset, k, bits in (("1", 1, "mnist", 1, 1), ("0,2", 2, "mnist", 28, 3), ("2,1", 3, "auto", 7, 0),
                                                  ("1,0,1", 2, "cifar10", 3, 0)):
            with self.subTest(latents=latents, num_ch=num_ch, dataset=dataset, context_size=k, bits=bits):
                model, f, x = some_model(2, latents=latents, num_ch=num_ch, dataset=dataset, context_size=k, bits=bits)
                sides, c_x = dct.sides_of_latents(f), x.shape[1]
                L = len(sides)
                self.assertEqual((model.learned_levels, model.levels), (L, L + 1))
                self.assertEqual(model.dct.step, 2.0**(1 - (bits or {"cifar10": 5}.get(dataset, 2))))
                units = {f"kl_{L - i}": c_x * side**2 for i, side in enumerate(sides)} | {f"kl_{L + 1}": c_x * k * k}
                terms = small.terms_in_shape(self, model, x, f, units)
                if dataset == "cifar10":
                    elbo = terms["log_px_z"] - sum(terms[name].sum(-1) for name in units)
                    torch.testing.assert_close(terms["bits_per_dim"], -elbo / math.log(2) / 3072)
                images = [*model.samples(2, f).values(), *(model.reconstruct(x, f, keep) for keep in range(L + 2)),
                          *model.reconstructions(x, f).values()]
                self.assertEqual({tuple(of.shape) for of in images}, {tuple(x.shape)})
                self.assertEqual(len(model.top_posterior(x, f, L)), L)

    @torch.no_grad()
    def test_levels_kept(self):
        """keep = 1 keeps the context alone, all of it and nothing else; keep = 0 nothing of x."""
        model, f, x = some_model(2, by=0.5, latents="1,1", num_ch=3, context_size=4)
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
        self.assertLessEqual({"z_to_x.2.weight", "p_c.log_s", "latents.0.s_to_q.7.weight"}, changed)


class Twins(unittest.TestCase):
    def test_what_is_the_ladders_is_spelt_alike(self):
        for name in ("sides_of_latents", "Bottleneck", "Residual", "scaled", "Encoder", "Latent", "normal", "LogisticMixture",
                     "draw"):
            self.assertEqual(*(inspect.getsource(getattr(module, name)) for module in (ladder, dct)), name)


if __name__ == "__main__":
    unittest.main()
