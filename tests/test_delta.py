"""MNIST_VAE_Delta: the bound δ, the KL and both priors in closed form, what each pixel and each latent may see, and that
sampling, scoring and the terms agree."""
import decimal
import itertools
import math
import tempfile
import unittest
from decimal import Decimal
from pathlib import Path
from unittest import mock

import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import common
import datasets
import deep
import files
import training
import MNIST_VAE_Delta as script
from tests import small

N = 28


def build(images=4, dtype=torch.float64, spread=0.3, **flags):
    """(model in eval mode with weights far from their start, f as its forward sees it, binary images (B, 1, 28, 28))."""
    f = script.Flags(**dict(dim_z=2, num_ch=3, num_layers=2, d_hidden=6, device="cpu") | flags)
    random = torch.Generator().manual_seed(1)
    x = (torch.rand(images, 1, N, N, generator=random) < 0.3).to(dtype)
    data = datasets.Data("random", (x,), (x,))
    model = training.build(script.DeltaVAE, f, data).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += spread * torch.randn(p.shape, generator=random, dtype=dtype)
    return model, common.on_device(f, x), x


def ar1(delta, d, n):
    """(α, variances of p(z_t|z_{t-1}) (n, 1), covariance (n, n) of a unit's sequence)."""
    alpha, log_variance = script.ar1_of_rate(delta, d, n)
    prior_var = torch.full((n, 1), math.exp(log_variance), dtype=torch.float64)
    prior_var[0] = 1
    steps = torch.arange(n)
    return alpha, prior_var, alpha ** (steps[:, None] - steps).abs().double()


def over_time(mean, covariance):
    """N(mean, covariance over time) of each unit, independent of the others: mean (..., n, d)."""
    return MultivariateNormal(mean.transpose(-1, -2), covariance)


class Rate(unittest.TestCase):
    """δ, α, and the KL of a posterior that is independent over time from an AR(1) prior."""

    def test_alpha_solves_delta_to_rounding(self):
        """½ d [(n - 2) log(1 + α²) - log(1 - α²)] = δ, in decimal numbers with digits to spare."""
        for delta, d, n in itertools.product((1e-300, 1e-9, 0.01, 0.5, 5.0, 60.0, 700.0), (1, 3, 16), (2, 3, 28, 1000)):
            with self.subTest(delta=delta, d=d, n=n), decimal.localcontext() as digits:
                alpha, log_variance = script.ar1_of_rate(delta, d, n)
                digits.prec = 40 + max(0, -int(2 * math.log10(delta / d / n))) + int(delta)
                variance = Decimal(log_variance).exp()
                solved = Decimal(d) / 2 * ((n - 2) * (2 - variance).ln() - variance.ln())
                self.assertLess(abs(solved / Decimal(delta) - 1), 1e-14)
                self.assertLess(abs(Decimal(alpha) / (1 - variance).sqrt() - 1), 1e-14)

    def test_no_posterior_is_below_delta(self):
        random = torch.Generator().manual_seed(0)
        for delta, d, n in itertools.product((0.01, 1.0, 5.0, 40.0), (1, 3), (2, 3, 6, 28)):
            alpha, prior_var, _ = ar1(delta, d, n)

            def noise():
                return torch.randn(500, n, d, generator=random, dtype=torch.float64)

            inside = torch.ones(n, 1, dtype=torch.float64) / (1 + alpha**2)
            inside[[0, -1]] = 1
            closest = (prior_var[-1] * inside).sqrt()
            for spread in (2.0, 0.3, 1e-3):               # anywhere, near the least rate, and next to it
                rate = script.kl_to_ar1(spread * noise(), closest * (spread * noise()).exp(), alpha, prior_var).sum((1, 2))
                self.assertGreater(rate.min().item(), delta * (1 - 1e-9))
            rate = script.kl_to_ar1(torch.zeros(n, d, dtype=torch.float64), closest.expand(n, d), alpha, prior_var).sum()
            self.assertAlmostEqual(rate.item() / delta, 1, delta=1e-9)

    def test_delta_is_what_minimising_finds(self):
        """Over all means and variances, from afar; and at the variances that are said to reach it."""
        random = torch.Generator().manual_seed(0)
        for delta, d, n in ((5.0, 2, 5), (0.5, 1, 28), (20.0, 3, 2), (12.0, 1, 3)):
            alpha, prior_var, _ = ar1(delta, d, n)
            mean, log_std = (torch.randn(n, d, generator=random, dtype=torch.float64, requires_grad=True) for _ in range(2))
            optimizer = torch.optim.LBFGS([mean, log_std], max_iter=500, tolerance_grad=1e-10, tolerance_change=0,
                                          line_search_fn="strong_wolfe")

            def loss():
                optimizer.zero_grad()
                rate = script.kl_to_ar1(mean, log_std.exp(), alpha, prior_var).sum()
                rate.backward()
                return rate

            optimizer.step(loss)
            self.assertAlmostEqual(loss().item(), delta, delta=1e-8 * delta)
            expected = prior_var[-1].expand(n, d) / (1 + alpha**2)
            expected[[0, -1]] = prior_var[-1]
            torch.testing.assert_close(log_std.detach().exp().square(), expected, rtol=1e-4, atol=0)
            self.assertLess(mean.abs().max().item(), 1e-4)

    def test_kl_is_that_of_the_whole_sequence(self):
        """Its sum, against the closed form for Gaussians with any covariance."""
        random = torch.Generator().manual_seed(0)
        for delta, n, d in ((0.1, 2, 1), (5.0, 7, 3), (30.0, 28, 2)):
            alpha, prior_var, covariance = ar1(delta, d, n)
            mean, std = torch.randn(2, 9, n, d, generator=random, dtype=torch.float64)
            std = std.exp()
            exact = kl_divergence(over_time(mean, torch.diag_embed(std.transpose(1, 2).square())),
                                  over_time(torch.zeros_like(mean), covariance)).sum(-1)
            torch.testing.assert_close(script.kl_to_ar1(mean, std, alpha, prior_var).sum((1, 2)), exact, rtol=1e-10, atol=1e-10)

    def test_kl_of_each_step_is_its_expectation(self):
        """E_q[log q(z_t) - log p(z_t|z_{t-1})], by Monte Carlo, and never negative."""
        random = torch.Generator().manual_seed(0)
        alpha, prior_var, _ = ar1(1.0, 2, 4)
        mean, std = torch.randn(2, 4, 2, generator=random, dtype=torch.float64)
        std = (0.5 * std).exp()
        z = mean + std * torch.randn(100_000, 4, 2, generator=random, dtype=torch.float64)
        previous = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], 1)
        log_ratio = Normal(mean, std).log_prob(z) - Normal(alpha * previous, prior_var.sqrt()).log_prob(z)
        kl, error = script.kl_to_ar1(mean, std, alpha, prior_var), log_ratio.std(0) / len(z)**0.5
        self.assertLess(((log_ratio.mean(0) - kl) / error).abs().max().item(), 4)
        self.assertLess(error.max().item(), 0.05)
        self.assertGreater(kl.min().item(), 0)


class Model(unittest.TestCase):
    def test_an_encoder_that_says_nothing_pays_delta(self):
        """With means 0 and the std head at rest, for each x; in float32, too."""
        for prior, delta, dtype in (("ar1", 5.0, torch.float64), ("ar1", 30.0, torch.float32), ("standard", 5.0, torch.float64)):
            model, f, x = build(prior=prior, delta=delta, dtype=dtype)
            with torch.no_grad():
                model.h_to_z.weight.zero_()
                model.h_to_z.bias.zero_()
                terms = model(x, f, (2,))
            wanted = torch.full((4,), delta if prior == "ar1" else 0.0, dtype=dtype)
            torch.testing.assert_close(terms["kl"].sum(-1), wanted)
            torch.testing.assert_close(terms["smallest_rate"], wanted.expand(2, 4))

    @torch.no_grad()
    def test_recurrent_layers_are_left_out_of_autocast(self):
        """cuDNN's would be float16, whatever autocast's type."""
        model, f, x = build()
        model, seen = model.float(), []
        model.rows_to_h.register_forward_hook(lambda gru, inputs, output: seen.append(output[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            model.q_z(x.float())
        self.assertEqual(seen, [torch.float32])

    @torch.no_grad()
    def test_start_std(self):
        """Where the last layer gives 0, q's std is that share of the one nearest to the prior."""
        for start in (0.1, 1.0):
            model, f, x = build(start_std=start)
            model.h_to_z.weight.zero_()
            model.h_to_z.bias.zero_()
            torch.testing.assert_close(model.q_z(x).stddev, (start * model.closest_std).expand_as(model.q_z(x).mean).to(x.dtype))

    @torch.no_grad()
    def test_terms_at_given_z(self):
        """Each against densities of the whole sequence; the pixels' against the decoder's probabilities, one by one."""
        for prior, delta in (("ar1", 5.0), ("standard", 5.0)):
            model, f, x = build(prior=prior, delta=delta)
            z = torch.randn(3, 4, N, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
            with mock.patch.object(script, "draw", lambda q_z, sample_shape: z):
                terms = model(x, f, (3,))
            covariance = ar1(delta, 2, N)[2] if prior == "ar1" else torch.eye(N, dtype=torch.float64)
            q_z = model.q_z(x)
            log_p_z = over_time(torch.zeros_like(z), covariance).log_prob(z.transpose(-1, -2)).sum(-1)
            log_q_z = over_time(q_z.mean, torch.diag_embed(q_z.stddev.transpose(1, 2).square())).log_prob(
                z.transpose(-1, -2)).sum(-1)
            p = torch.stack([model.decoder.horizontal(x, z[s, None], model.decoder.vertical(x))[0] for s in range(3)]).sigmoid()
            log_px_z = (x * p.log() + (1 - x) * (1 - p).log()).sum((2, 3, 4))
            torch.testing.assert_close(terms["log_px_z"], log_px_z)
            torch.testing.assert_close(terms["log_w"], log_px_z + log_p_z - log_q_z)
            log_auxiliary = torch.stack([model.auxiliary(z[s]) for s in range(3)])
            torch.testing.assert_close(terms["rate_auxiliary"], log_q_z - log_auxiliary)
            torch.testing.assert_close(terms["elbo_auxiliary"], terms["log_px_z"] - log_q_z + log_auxiliary)
            torch.testing.assert_close(terms["mean"].view(4, N, 2), q_z.mean)

    @torch.no_grad()
    def test_log_w_is_the_elbo_on_average(self):
        """E_q[log_w] = E_q[log p(x|z)] - KL: the closed form and the densities say the same of z as it is drawn."""
        for prior in ("ar1", "standard"):
            model, f, x = build(images=2, num_ch=1, num_layers=1, prior=prior)
            torch.manual_seed(0)
            terms = model(x, f, (3000,))
            gap = terms["log_w"] - terms["log_px_z"] + terms["kl"].sum(-1)
            error = gap.std(0) / len(gap)**0.5
            self.assertLess((gap.mean(0).abs() / error).max().item(), 4)
            self.assertLess(error.max().item(), 0.02 * terms["kl"].sum(-1).min().item())

    @torch.no_grad()
    def test_prior_draws_have_its_covariance(self):
        model, f, _ = build(delta=20.0)
        torch.manual_seed(0)
        z, covariance = model.sample_z(10_000), ar1(20.0, 2, N)[2]
        products = z[:, :, None] * z[:, None]             # (draws, n, n, d)
        error = products.std(0) / len(z)**0.5
        self.assertLess(((products.mean(0) - covariance[..., None]) / error).abs().max().item(), 5)
        self.assertLess((z.mean(0).abs() * len(z)**0.5).max().item(), 4.5)
        self.assertLess((z[..., 0, None] * z[:, None, :, 1]).mean(0).abs().max().item() * len(z)**0.5, 5)

    @torch.no_grad()
    def test_float32_resolves_the_least_variance(self):
        """At the largest δ that is taken, the densities of p(z_t|z_{t-1}) are those of float64 at the same z."""
        largest = script.smallest_rate(math.log(script.MIN_VARIANCE), 2, N)
        alpha, prior_var, _ = ar1(largest * (1 - 1e-9), 2, N)
        self.assertAlmostEqual(prior_var[1].item(), script.MIN_VARIANCE, delta=1e-4 * script.MIN_VARIANCE)
        single, *_ = build(delta=largest * (1 - 1e-9), dtype=torch.float32)
        double, *_ = build(delta=largest * (1 - 1e-9))
        torch.manual_seed(0)
        z = double.sample_z(1000).float()
        exact = double.p_z(z.double()).log_prob(z.double()).sum((1, 2))
        error = single.p_z(z).log_prob(z).sum((1, 2)) - exact
        self.assertLess(error.std().item(), 0.1)          # of a log-density that spreads by √28

    def test_shapes_of_odd_settings(self):
        for flags in (dict(dim_z=1, num_ch=1, num_layers=1, d_hidden=1), dict(dim_z=5, num_ch=7, num_layers=7, d_hidden=3)):
            model, f, x = build(images=3, prior="ar1", delta=1.0, **flags)
            d = flags["dim_z"]
            terms = model.train()(x, f)
            self.assertEqual({name: tuple(value.shape) for name, value in terms.items()}, {"log_px_z": (3,), "kl": (3, N * d)})
            with torch.no_grad():
                terms = model.eval()(x, f, (2,))
            self.assertEqual({name: tuple(value.shape) for name, value in terms.items()}, dict(
                log_px_z=(2, 3), kl=(3, N * d), log_w=(2, 3), rate_auxiliary=(2, 3), elbo_auxiliary=(2, 3), smallest_rate=(2, 3), mean=(3, N * d)))
        model, f, x = build(images=3, dim_z=1, num_ch=1, num_layers=1, d_hidden=1)
        with torch.no_grad():
            pictures = [*model.reconstructions(x, f).values(), *model.samples(3, f).values()]
        self.assertEqual([tuple(images.shape) for images in pictures], 4 * [(3, 1, N, N)])
        self.assertTrue(torch.equal(pictures[0], x))
        self.assertLessEqual(set(torch.stack(pictures).unique().tolist()), {0.0, 1.0})


class Causality(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.model, cls.f, cls.x = build(images=1, num_layers=5)
        cls.z = torch.randn(1, 1, N, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def test_a_pixel_sees_all_earlier_pixels_and_no_other(self):
        """In reading order, those above to the right among them: no blind spot, from five layers on."""
        x, decoder = self.x.clone().requires_grad_(), self.model.decoder
        logits = decoder.horizontal(x, self.z, decoder.vertical(x))[0, 0, 0]
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 27), (9, 20), (14, 3), (27, 0), (27, 27)):
            [gradient] = torch.autograd.grad(logits[i, j], x, retain_graph=True)
            seen = gradient.flatten() != 0
            self.assertEqual(seen.nonzero().flatten().tolist(), list(range(N * i + j)), (i, j))

    def test_fewer_layers_see_all_within_reach(self):
        """A strip to the left and a rectangle above, as wide to the right as to the left."""
        for num_layers in (1, 2, 3):
            model, _, x = build(images=1, num_layers=num_layers)
            x = x.requires_grad_()
            logits = model.decoder.horizontal(x, self.z, model.decoder.vertical(x))[0, 0, 0]
            [gradient] = torch.autograd.grad(logits[14, 9], x)
            reach = 2**num_layers                         # the dilations 1, 2, 4, ... and the first kernels' own 1 and 2
            expected = torch.zeros(N, N, dtype=torch.bool)
            expected[14, 9 - reach - 1:9] = True
            expected[14 - reach - 1:14, 9 - reach:9 + reach + 1] = True
            self.assertTrue(torch.equal(gradient[0, 0] != 0, expected), num_layers)

    def test_a_row_sees_its_own_z(self):
        decoder, z = self.model.decoder, self.z.clone().requires_grad_()
        logits = decoder.horizontal(self.x, z, decoder.vertical(self.x))[0, 0, 0]
        for i, j in ((0, 0), (0, 27), (13, 5), (27, 27)):
            [gradient] = torch.autograd.grad(logits[i, j], z, retain_graph=True)
            self.assertTrue((gradient[0, 0, i] != 0).all())
            self.assertEqual(gradient[0, 0].any(-1).nonzero().flatten().tolist(), [i])

    def test_z_reads_its_row_and_those_below(self):
        x = self.x.clone().requires_grad_()
        q_z = self.model.q_z(x)
        for t, parameter in itertools.product((0, 1, 13, 27), (q_z.mean, q_z.stddev)):
            for unit in parameter[0, t]:
                [gradient] = torch.autograd.grad(unit, x, retain_graph=True)
                self.assertEqual((gradient[0, 0] != 0).any(-1).nonzero().flatten().tolist(), list(range(t, N)))

    def test_the_auxiliary_prior_reads_earlier_steps(self):
        z = self.z[0].clone().requires_grad_()
        p_z, _ = self.model.auxiliary.following(script.before(z))
        for t, parameter in itertools.product((0, 1, 13, 27), (p_z.mean, p_z.stddev)):
            [gradient] = torch.autograd.grad(parameter[0, t].sum(), z, retain_graph=True, materialize_grads=True)
            self.assertEqual((gradient[0] != 0).all(-1).nonzero().flatten().tolist(), list(range(t)))

    @torch.no_grad()
    def test_probabilities_of_all_images_add_up_to_one(self):
        """Of 3x3 pixels: a decoder that sees a pixel before it scores it gives more or less than one."""
        torch.manual_seed(0)
        decoder = script.Decoder(2, 4, 3, 3).double()
        for p in decoder.parameters():
            p += torch.randn_like(p)
        x = torch.tensor(list(itertools.product((0.0, 1.0), repeat=9)), dtype=torch.float64).view(512, 1, 3, 3)
        logits = decoder.horizontal(x, torch.randn(1, 1, 3, 2, dtype=torch.float64).expand(1, 512, 3, 2), decoder.vertical(x))[0]
        log_px = torch.distributions.Bernoulli(logits=logits).log_prob(x).sum((1, 2, 3))
        self.assertAlmostEqual(log_px.exp().sum().item(), 1, delta=1e-12)
        self.assertGreater(log_px.std().item(), 0.5)      # far from uniform


class Sampling(unittest.TestCase):
    @torch.no_grad()
    def test_pixels_are_drawn_with_the_probabilities_that_score_them(self):
        """The uniform numbers of sampling again, against one full pass over the sampled images."""
        model, f, _ = build(num_layers=3)
        z = torch.randn(5, N, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        torch.manual_seed(4)
        x = model.decoder.sample(z)
        torch.manual_seed(4)
        uniform = torch.stack([torch.rand(5, 1, dtype=torch.float64) for _ in range(N * N)], -1).view(5, 1, N, N)
        p = model.decoder.horizontal(x, z[None], model.decoder.vertical(x))[0].sigmoid()
        self.assertTrue(torch.equal(x, (uniform < p).double()))
        self.assertTrue(0.05 < x.mean() < 0.95)

    @torch.no_grad()
    def test_auxiliary_draws_are_of_the_density_that_scores_them(self):
        """Step by step or all at once: standardised, the draws are the noise they came from."""
        model, f, _ = build()
        torch.manual_seed(4)
        z = model.auxiliary.sample(6)
        torch.manual_seed(4)
        noise = torch.cat([torch.randn(6, 1, 2, dtype=torch.float64) for _ in range(N)], 1)
        p_z, _ = model.auxiliary.following(script.before(z))
        torch.testing.assert_close((z - p_z.mean) / p_z.stddev, noise)
        torch.testing.assert_close(model.auxiliary(z), p_z.log_prob(z).sum((1, 2)))


class Auxiliary(unittest.TestCase):
    @torch.no_grad()
    def test_starts_as_the_own_prior(self):
        for prior in ("ar1", "standard"):
            model, f, x = build(spread=0.0, prior=prior)
            terms = model(x, f, (5,))
            torch.testing.assert_close(terms["rate_auxiliary"], terms["log_px_z"] - terms["log_w"])

    @torch.no_grad()
    def test_rate_is_that_of_a_divergence(self):
        """E_q[log q(z|x) - log p_aux(z)] is positive for each x, and 0, draw by draw, where p_aux is the posterior."""
        model, f, x = build(num_ch=1, num_layers=1)
        torch.manual_seed(0)
        rate = model(x, f, (200,))["rate_auxiliary"]
        self.assertGreater((rate.mean(0) * len(rate)**0.5 / rate.std(0)).min().item(), 4)
        model, f, x = build(prior="standard", spread=0.0)
        model.h_to_z.weight.zero_()
        model.h_to_z.bias.copy_(torch.tensor([0.3, -1.0, 0.5, -0.5]))       # of z_t, whatever x: means, raw stds
        model.auxiliary.of_step.copy_(model.h_to_z.bias.expand(N, 4))
        torch.testing.assert_close(model(x, f, (5,))["rate_auxiliary"], torch.zeros(5, 4, dtype=torch.float64))

    def test_training(self):
        """The second phase moves the auxiliary prior alone, and leaves the averaged model to be evaluated."""
        x = datasets.draw_digits(96, seed=3)[0]
        x = torch.from_numpy(x).view(-1, 1, N, N).float() / 255
        data, trained, averages, WeightAverage = datasets.Data("digits", (x,), (x[:8].round(),)), {}, [], deep.WeightAverage

        def noted(*args):
            averages.append(WeightAverage(*args))
            return averages[-1]

        for epochs in (1, 6):
            with tempfile.TemporaryDirectory() as folder:
                f = script.Flags(dim_z=2, num_ch=2, num_layers=1, d_hidden=4, batch_size=24, num_epochs=2, warmup_epochs=0.5,
                                 ema=0.5, delta=8.0, auxiliary_epochs=epochs, device="cpu", out_dir=folder)
                with mock.patch("sys.stderr"), mock.patch.object(deep, "WeightAverage", noted):
                    [model] = training.fit(script.DeltaVAE, [f], [data], train=script.train)
                curves = files.read_result(f, data, "training.json")["curves"]
                files.unlock()
            trained[epochs] = model, curves
        (short, _), (long, curves) = trained.values()
        self.assertIs(long, averages[1].module)
        self.assertTrue(averages[1].begun)
        for name, value in short.state_dict().items():
            self.assertEqual(torch.equal(value, long.state_dict()[name]), not name.startswith("auxiliary"), name)
        self.assertEqual({name: len(curve) for name, curve in curves.items()},
                         {"loss": 2, "reconstruction": 2, "kl": 2, "auxiliary loss": 6})
        self.assertGreaterEqual(min(curves["kl"]), 8 - 1e-4)
        self.assertLess(curves["auxiliary loss"][-1], curves["auxiliary loss"][0])


class CommandLine(unittest.TestCase):
    def test_refuses_what_it_cannot_do(self):
        with tempfile.TemporaryDirectory() as folder:
            for argv, wanted in ((["--delta", "1000"], "--delta: got 1000.0, wants at most 72.9 of --dim_z 4"),
                                 (["--delta", "5,20", "--dim_z", "1"], "--delta: got 20.0, wants at most 18.2 of --dim_z 1"),
                                 (["--delta", "0"], "--delta: got '0', wants a number above 0"),
                                 (["--dataset", "cifar10"], "--dataset: got 'cifar10'"),
                                 (["--prior", "ar2"], "--prior: got 'ar2', wants one of ar1, standard")):
                status, out, err = small.call(script.main, *argv, "--out_dir", folder)
                self.assertEqual((status, out), (2, ""))
                self.assertIn(wanted, err)
                self.assertEqual(len(err.strip().split("\n")), 1)
            self.assertEqual(list(Path(folder).iterdir()), [])


if __name__ == "__main__":
    unittest.main()
