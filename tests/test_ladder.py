"""MNIST_HVAE_Ladder: the terms of its ELBO, checked against the equations and by Monte Carlo.

It also checks what the deep models share: `deep.LogisticMixture` and the sizes of the models.
"""
import contextlib
import io
import math
import unittest
from unittest import mock

import common
import torch
from torch.nn import functional as F

import datasets
import deep
import MNIST_HVAE_DCT as dct
import MNIST_HVAE_DVP as dvp
import MNIST_HVAE_Ladder as ladder
import processes
import report
import training
from tests import small


def posterior_draw(l, p, q):
    """For `top_down`: a draw of the posterior."""
    return deep.draw(q)


def posterior_mean(l, p, q):
    """For `top_down`: the mean of the posterior."""
    return q.mean


def model_and_images(n, moved=0.0, Model=ladder.LadderVAE, Flags=ladder.Flags, **flags):
    """A float64 model of these flags, its setting, and n images as its data set has them.

    Random weights are added to the model's initial ones, `moved` times standard normal numbers.
    """
    f = Flags(device="cpu", **flags)
    shape = deep.image_shape(f)
    random = torch.Generator().manual_seed(1)
    if f.dataset == "cifar10":
        x = torch.randint(256, (n, *shape), generator=random).double() / 255
    else:
        x = torch.randint(2, (n, *shape), generator=random).double()

    model = training.build(Model, f, datasets.Data("digits", (x,), (x,)))
    with torch.no_grad():
        for p in model.parameters():
            p += moved * torch.randn(p.shape, generator=random)
    return model, common.on_device(f, x), x


def silu(h):
    return h / (1 + torch.exp(-h))


def mean_over_squares(h, side):
    """h (B, c, H, H) averaged over squares, (B, c, side, side)."""
    return h.unflatten(-1, (side, -1)).unflatten(-3, (side, -1)).mean((-1, -3))


def repeated(h, side):
    """h (B, c, n, n) with each number repeated in a square, (B, c, side, side)."""
    times = side // h.shape[-1]
    return h.repeat_interleave(times, -1).repeat_interleave(times, -2)


def bilinear(h, side):
    """h (B, c, n, n) interpolated to (B, c, side, side), between the centres of pixels."""
    n = h.shape[-1]
    positions = ((torch.arange(side) + 0.5) * n / side - 0.5).clamp(0, n - 1)
    weight = (1 - (positions[:, None] - torch.arange(n)).abs()).clamp(min=0).to(h.dtype)
    return weight @ h @ weight.T


class Weights:
    """A model's layers by the names of their weights, written out."""

    def __init__(self, model):
        self.weights = dict(model.named_parameters())

    def conv(self, name, h, padding=0):
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(h, weight, self.weights[f"{name}.bias"], padding=padding)

    def block(self, name, h):
        """A Bottleneck, times its gate if it has one."""
        h = self.conv(f"{name}.0", h)
        for i, padding in ((2, 1), (4, 1), (6, 0)):
            h = self.conv(f"{name}.{i}", silu(h), padding)
        return h * self.weights.get(f"{name}.gate", 1)

    def head(self, name, h):
        """A Head, with its linear path if it has one."""
        out = self.block(f"{name}.block", h)
        if f"{name}.linear.weight" in self.weights:
            out = out + self.conv(f"{name}.linear", h)
        return out

    def features(self, x):
        """The encoder's features by side.

        Each scale halves the side after three blocks, except where the side is odd.
        """
        e = self.conv("encoder.x_to_e", x)
        features = {}
        while f"encoder.scales.{len(features)}.0.0.weight" in self.weights:
            for k in range(3):
                e = e + self.block(f"encoder.scales.{len(features)}.{k}", silu(e))
            if e.shape[-1] % 2 == 0:
                even_rows = e[..., ::2, ::2] + e[..., ::2, 1::2]
                odd_rows = e[..., 1::2, ::2] + e[..., 1::2, 1::2]
                e = (even_rows + odd_rows) / 4
            features[e.shape[-1]] = e
        return features


def level_by_hand(level, p_mean, p_log_var, q_mean, q_log_var, eps):
    """The latent z of one level, its log p(z) - log q(z) (B,), and the level's terms.

    z is the posterior's mean plus its std times eps.
    """
    z = q_mean + torch.exp(q_log_var / 2) * eps
    p_var = torch.exp(p_log_var)
    q_var = torch.exp(q_log_var)
    kl = (p_log_var - q_log_var + (q_var + (q_mean - p_mean) ** 2) / p_var - 1) / 2
    log_q = -((z - q_mean) ** 2) / q_var - q_log_var
    log_p = -((z - p_mean) ** 2) / p_var - p_log_var
    terms = {
        f"kl_{level}": kl.flatten(1),
        f"mean_{level}": ((q_mean - p_mean) * torch.exp(-p_log_var / 2)).flatten(1),
    }
    return z, (log_p - log_q).flatten(1).sum(1) / 2, terms


def log_bernoulli(x, logits):
    """log p(x) of binary images, (B,)."""
    return (x * logits - torch.log1p(torch.exp(logits))).flatten(1).sum(1)


def by_hand(model, x, noise, context=None):
    """The terms of a binary model's ELBO, by the equations of the model's docstring.

    They are computed from its weights. noise has one tensor per learned level, from the top. The
    result is a dict like that of `forward` in evaluation mode. If there is a context, images like
    x, each prior reads it beside s, averaged over squares. The start of s reads it, too.
    """
    weights = Weights(model)
    L = len(noise)
    features = weights.features(x)

    # 1. The state at its start.
    side = noise[0].shape[-1]
    s = torch.ones_like(features[side])
    if context is not None:
        s = s + weights.conv(f"context_to_s.{side}", mean_over_squares(context, side))

    # 2. The levels, the top one first.
    total = 0
    log_ratio = 0
    terms = {}
    for i, eps in enumerate(noise):
        level = L - i
        side = eps.shape[-1]
        s = repeated(s, side)
        read = s
        if context is not None:
            read = torch.cat([s, mean_over_squares(context, side)], dim=1)
        out = weights.head(f"latents.{i}.s_to_p", read)
        p_mean, p_log_var, h = out[:, :1], out[:, 1:2].clamp(-10, 1), out[:, 2:]
        out = weights.head(f"latents.{i}.s_to_q", (features[side] + s) / math.sqrt(2))
        q_mean, q_log_var = out[:, :1], out[:, 1:].clamp(-10, 1)

        z, level_log_ratio, level_terms = level_by_hand(
            level, p_mean=p_mean, p_log_var=p_log_var, q_mean=q_mean, q_log_var=q_log_var, eps=eps)
        terms |= level_terms
        log_ratio = log_ratio + level_log_ratio
        total = total + bilinear(z, x.shape[-1]) / math.sqrt(L)
        if level > 1:
            s = s + h + weights.conv(f"latents.{i}.z_to_s", z)
            s = s + weights.block(f"latents.{i}.s_to_s", s)

    # 3. The pixels.
    first, last = ("z_to_x.0", "z_to_x.2") if context is None else ("last_block", "to_x.1")
    logits = weights.conv(last, silu(weights.conv(first, total)), padding=1)
    log_px_z = log_bernoulli(x, logits)
    return terms | {"log_px_z": log_px_z, "log_w": log_px_z + log_ratio}


def standard_errors(draws, value=0.0):
    """The largest distance of the mean of draws (S, ...) from value (...), in standard errors."""
    return ((draws.mean(0) - value).abs() / draws.std(0) * len(draws) ** 0.5).max().item()


class Terms(unittest.TestCase):
    @torch.no_grad()
    def test_terms_are_those_of_the_equations(self):
        cases = (
            {"latents": "2,1", "num_ch": 4},
            {"latents": "0,2", "num_ch": 3, "d_hidden": 5, "linear_path": False},
            {"latents": "3,0", "num_ch": 2, "d_hidden": 3},
            {"latents": "2", "num_ch": 3, "side": 14},
            {"latents": "2", "num_ch": 3, "side": 7},
            {"latents": "1,1", "num_ch": 3, "side": 4},
        )
        for flags in cases:
            model, f, x = model_and_images(3, moved=0.5, **flags)
            random = torch.Generator().manual_seed(2)
            noise = []
            for side in deep.latent_sides(f):
                noise.append(torch.randn(3, 1, side, side, generator=random, dtype=x.dtype))
            with mock.patch.object(processes, "normal_like", side_effect=noise):
                terms = model.eval()(x, f)

            expected = by_hand(model, x, noise)
            self.assertEqual(set(terms), set(expected))
            for name, value in expected.items():
                with self.subTest(**flags, term=name):
                    torch.testing.assert_close(terms[name], value, rtol=1e-9, atol=1e-9)
            for l in range(1, model.levels + 1):
                self.assertGreater(expected[f"kl_{l}"].mean().item(), 0.02)

    @torch.no_grad()
    def test_elbo_of_the_test_images_is_that_of_the_equations(self):
        """deep.test_elbo is the mean over all images, of which the last batch has fewer."""
        model, f, x = model_and_images(
            5, moved=0.1, latents="2", num_ch=3, side=14, batch_size=3, seed=4)
        torch.manual_seed(8)
        state = torch.get_rng_state()
        elbo = deep.test_elbo(model, f, datasets.Data("digits", (x[:1],), (x,)))
        # The random numbers of the training are where they were, and so is the model's mode.
        self.assertTrue(torch.equal(torch.get_rng_state(), state))
        self.assertTrue(model.training)

        elbos = []
        with common.seeded(4, "evaluation", x.device):
            for batch in (x[:3], x[3:]):
                noise = []
                for side in deep.latent_sides(f):
                    noise.append(torch.randn(len(batch), 1, side, side, dtype=x.dtype))
                terms = by_hand(model, batch, noise)
                kl = terms["kl_1"].sum(1) + terms["kl_2"].sum(1)
                elbos.append(terms["log_px_z"] - kl)
        elbos = torch.cat(elbos)
        self.assertAlmostEqual(elbo, elbos.mean().item(), places=9)
        self.assertGreater(elbos.std().item(), 0.1)

    @torch.no_grad()
    def test_each_kl_is_the_mean_of_its_log_ratio(self):
        """KL_l is E_q[log q(z_l|z_>l, x) - log p(z_l|z_>l)], with the densities written out.

        The mean is over draws of z_l at the same z_>l.
        """
        model, f, x = model_and_images(1, moved=0.5, latents="1,1", num_ch=3)
        features = {}
        for side, e in model.encoder(x).items():
            features[side] = e.expand(1000, -1, -1, -1)
        torch.manual_seed(3)
        for level in (1, 2):
            z_above = torch.randn(1, 1, 7, 7, dtype=x.dtype).expand(1000, -1, -1, -1)

            def choose(l, p, q):
                return z_above if l > level else deep.draw(q)

            p, q, z = list(model.top_down(1000, features, choose))[2 - level]
            squares = (z - p.mean) ** 2 / p.stddev**2 - (z - q.mean) ** 2 / q.stddev**2
            log_ratio = squares / 2 + (p.stddev / q.stddev).log()
            kl = torch.distributions.kl_divergence(q, p)
            torch.testing.assert_close(kl, kl[:1].expand_as(kl))
            self.assertGreater(kl.max().item(), 0.1)
            # Up to 196 units are compared: the largest distance is expected at 3.
            self.assertLess(standard_errors(log_ratio, kl[0]), 5)

    @torch.no_grad()
    def test_mean_of_log_w_is_the_elbo(self):
        """They are compared at the same draws, which removes most of the noise."""
        model, f, x = model_and_images(2, moved=0.5, latents="1,2", num_ch=3)
        torch.manual_seed(4)
        terms = model.eval()(x, f, sample_shape=(400,))
        elbo = terms["log_px_z"]
        for l in (1, 2, 3):
            elbo = elbo - terms[f"kl_{l}"].sum(-1)
        difference = terms["log_w"] - elbo
        self.assertLess(standard_errors(difference), 4)
        self.assertGreater(difference.std().item(), 0.5)

    @torch.no_grad()
    def test_draws_are_independent_and_the_images_stay_in_order(self):
        """Each image has the terms that it has alone."""
        model, f, x = model_and_images(3, moved=0.5, latents="1,1", num_ch=2)
        torch.manual_seed(5)
        terms = model.eval()(x, f, sample_shape=(200,))
        self.assertGreater(terms["log_px_z"].std(0).min().item(), 1e-3)
        for i in range(3):
            alone = model(x[i : i + 1], f, sample_shape=(200,))
            for name in ("log_px_z", "log_w"):
                together = terms[name][:, i]
                error = (together.var() / 200 + alone[name].var() / 200).sqrt()
                self.assertLess(abs(together.mean() - alone[name].mean()) / error, 4)
            torch.testing.assert_close(terms["mean_2"][:, i], alone["mean_2"][:, 0])

    def test_starts_at_the_prior(self):
        """The last convolutions of both blocks start at zero.

        So without the linear path prior and posterior are N(0, I), and every KL is 0.
        """
        model, f, x = model_and_images(2, latents="2,2", num_ch=4, linear_path=False)
        for p, q, _ in model.top_down(2, model.encoder(x), posterior_draw):
            for normal in (p, q):
                self.assertTrue(torch.equal(normal.mean, torch.zeros_like(normal.mean)))
                self.assertTrue(torch.equal(normal.stddev, torch.ones_like(normal.stddev)))
        terms = model(x, f)
        for l in range(1, 5):
            self.assertEqual(terms[f"kl_{l}"].abs().max().item(), 0)

    def test_starts_linear_with_the_linear_path(self):
        """Prior and posterior are linear in the state that they read."""
        model, f, x = model_and_images(2, latents="2,2", num_ch=4)
        for latent in model.latents:
            for head in (latent.s_to_p, latent.s_to_q):
                s = torch.randn(1, 4, latent.side, latent.side, dtype=x.dtype)
                weight = head.linear.weight[:, :, 0, 0]
                expected = torch.einsum("oc,bchw->bohw", weight, s)
                expected = expected + head.linear.bias.view(-1, 1, 1)
                torch.testing.assert_close(head(s), expected)

    def test_blocks_that_z_enters_start_smaller(self):
        """They are smaller by sqrt(1 / L).

        Except for that, the same seed gives the top level the same weights at L = 2 and at L = 8.
        """
        two, _, _ = model_and_images(1, latents="1,1", num_ch=4)
        eight, _, _ = model_and_images(1, latents="4,4", num_ch=4)
        ratios = {
            "z_to_s.weight": 2,
            "z_to_s.bias": 2,
            "s_to_s.6.weight": 2,
            "s_to_s.0.weight": 1,
            "s_to_q.block.2.weight": 1,
        }
        for name, ratio in ratios.items():
            larger = two.latents[0].get_parameter(name)
            smaller = eight.latents[0].get_parameter(name)
            torch.testing.assert_close(larger, ratio * smaller)
            self.assertGreater(larger.abs().max().item(), 0)

    def test_log_variances_are_clamped(self):
        model, f, x = model_and_images(1, latents="1,1", num_ch=2, linear_path=False)
        for raw, std in ((50.0, math.exp(0.5)), (-50.0, math.exp(-5))):
            with torch.no_grad():
                for latent in model.latents:
                    latent.s_to_p.block[-1].bias[1] = raw
                    latent.s_to_q.block[-1].bias[1] = raw
            for p, q, _ in model.top_down(1, model.encoder(x), posterior_mean):
                torch.testing.assert_close(p.stddev, torch.full_like(p.stddev, std))
                torch.testing.assert_close(q.stddev, torch.full_like(q.stddev, std))

    def test_every_latent_reaches_the_pixels_without_the_state(self):
        """log p(x|z) has a gradient in the posterior's mean of each level.

        The way from z into the state is cut.
        """
        model, f, x = model_and_images(2, moved=0.5, latents="2,2", num_ch=3)
        with torch.no_grad():
            for latent in model.latents[:-1]:
                latent.z_to_s.weight.zero_()
        torch.manual_seed(6)
        model(x, f)["log_px_z"].sum().backward()
        for latent in model.latents:
            self.assertGreater(latent.s_to_q.block[-1].bias.grad[0].abs().item(), 1e-3)

    def test_the_pixels_do_not_see_the_state(self):
        """At fixed z, log p(x|z) depends only on the two convolutions of the sum of latents."""
        model, f, x = model_and_images(2, moved=0.5, latents="1,2", num_ch=3)
        with mock.patch.object(deep, "draw", lambda q: torch.ones_like(q.mean)):
            model(x, f)["log_px_z"].sum().backward()
        reached = set()
        for name, p in model.named_parameters():
            if p.grad is not None and p.grad.abs().sum() > 0:
                reached.add(name.split(".")[0])
        self.assertEqual(reached, {"z_to_x"})

    def test_autocast_leaves_likelihood_and_kls_in_float32(self):
        f = ladder.Flags(latents="1,1", num_ch=4, device="cpu")
        model = ladder.LadderVAE(f)
        x = torch.ones(2, 1, 28, 28)
        feature_types = set()

        def note_types(module, args, features):
            feature_types.update(e.dtype for e in features.values())

        model.encoder.register_forward_hook(note_types)
        with torch.autocast("cpu", torch.bfloat16):
            terms = model(x, common.on_device(f, x))
            drawn = list(model.top_down(2, model.encoder(x), posterior_draw))
        values = list(terms.values())
        for p, q, z in drawn:
            values += [p.mean, p.stddev, q.mean, q.stddev, z]
        self.assertEqual(feature_types, {torch.bfloat16})
        self.assertEqual({value.dtype for value in values}, {torch.float32})


class Residuals(small.InFolder):
    """What headroom.py needs, and what it does not have for cifar10."""

    @torch.no_grad()
    def test_residuals_of_all_levels(self):
        model, f, x = model_and_images(2, moved=0.2, latents="1,2", num_ch=3, beta=0.7)

        def probabilities(x, S):
            features = {}
            for side, e in model.encoder(x).items():
                features[side] = e.repeat(S, 1, 1, 1)
            drawn = model.top_down(S * len(x), features, lambda l, p, q: q.sample())
            return model.p_x([z for p, q, z in drawn], (S, len(x))).mean

        grey = (x + 0.5) / 2
        levels = ["_1", "_2", "_3"]
        small.check_level_residuals(self, model, grey, f, levels, probabilities)

    @torch.no_grad()
    def test_order_of_the_draws_in_forward(self):
        """Features come first, then one draw for each level from the top down."""
        model, f, x = model_and_images(3, moved=0.5, latents="1,2", num_ch=3)
        torch.manual_seed(5)
        terms = model.eval()(x, f, (4,))
        torch.manual_seed(5)
        features = {}
        for side, e in model.encoder(x).items():
            features[side] = deep.repeat_examples(e, (4,))
        drawn = list(model.top_down(12, features, posterior_draw))
        drawn.reverse()
        log_px_z = model.p_x([z for p, q, z in drawn], (4, 3)).log_prob(x).flatten(2).sum(-1)
        self.assertTrue(torch.equal(terms["log_px_z"], log_px_z))
        for level, (p, q, z) in enumerate(drawn, start=1):
            kl = torch.distributions.kl_divergence(q, p).flatten(1).unflatten(0, (4, 3))
            self.assertTrue(torch.equal(terms[f"kl_{level}"], kl))

    def test_cifar10_has_no_verdict(self):
        """One line says so for all settings. A finished run is not evaluated again."""
        x = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        data = datasets.Data("cifar10", (x,), (x[:4],))
        settings = []
        for seed in (0, 1):
            f = ladder.Flags(
                dataset="cifar10",
                latents="1,1",
                num_ch=2,
                batch_size=6,
                num_epochs=1,
                num_samples=0,
                seed=seed,
                device="cpu",
                out_dir=str(self.folder),
            )
            settings.append(f)
        with mock.patch("sys.stderr"):
            runs = training.fit(ladder.LadderVAE, settings, [data, data], train=ladder.train)
        self.assertEqual(runs[0].model.residuals(x, settings[0], 4), {})

        outputs = []
        for evaluations in (2, 0):
            with mock.patch("report.evaluate", wraps=report.evaluate) as evaluate:
                outputs.append(self.printed(runs))
            self.assertEqual(evaluate.call_count, evaluations)
        self.assertEqual(outputs[0], outputs[1])
        lines = [line for line in outputs[0].splitlines() if "verdict" in line]
        self.assertEqual(len(lines), 1, outputs[0])
        self.assertIn("no theory covers this decoder", lines[0])
        self.assertNotIn("headroom", outputs[0])

        for f in settings:
            result = report.RunResult.read(f, data)
            self.assertEqual(result.headroom, {})
            self.assertEqual([name for name in result.metrics if "headroom" in name], [])

    def printed(self, runs):
        """What report.report prints. No picture of the runs is drawn."""
        with contextlib.redirect_stdout(io.StringIO()) as out, mock.patch("sys.stderr"):
            with mock.patch("pictures.draw_run"), mock.patch("pictures.draw_grid"):
                self.assertEqual(report.report(runs), 0)
        return out.getvalue()


class Settings(unittest.TestCase):
    def test_sampling_and_inference_agree_on_shapes(self):
        cases = (
            ("1", 1, "mnist", 0, [14]),
            ("0,3", 2, "mnist", 28, [14] * 3),
            ("2,3", 3, "mnist", 0, [7] * 2 + [14] * 3),
            ("2,0", 5, "auto", 0, [7] * 2),
            ("2", 3, "mnist", 14, [7] * 2),
            # An odd side is not halved.
            ("2", 3, "mnist", 7, [7] * 2),
            ("1,1", 3, "mnist", 4, [1, 2]),
            ("1", 2, "mnist", 2, [1]),
            ("2", 2, "mnist", 1, [1] * 2),
            ("1,0,2", 2, "cifar10", 0, [8, 32, 32]),
            ("1,2", 2, "cifar10", 16, [8, 16, 16]),
        )
        for latents, num_ch, dataset, side, sides in cases:
            flags = {"latents": latents, "num_ch": num_ch, "dataset": dataset, "side": side}
            with self.subTest(**flags):
                model, f, x = model_and_images(2, **flags)
                self.assertEqual(x.shape[-1], side or datasets.image_shape(dataset)[1])
                self.assertEqual(deep.latent_sides(f), sides)
                self.check_shapes(model, f, x, sides)

    def check_shapes(self, model, f, x, sides):
        L = len(sides)
        c_x = x.shape[1]

        # 1. The terms.
        units = {}
        for i, side in enumerate(sides):
            units[f"kl_{L - i}"] = c_x * side**2
        small.check_shapes_of_terms(self, model, x, f, units)

        # 2. The latents, of priors and of posteriors.
        expected = [(2, c_x, side, side) for side in sides]
        from_prior = model.top_down(2, None, lambda l, p, q: deep.draw(p))
        self.assertEqual([tuple(z.shape) for p, q, z in from_prior], expected)
        from_posterior = model.top_down(2, model.encoder(x), posterior_draw)
        self.assertEqual([tuple(z.shape) for p, q, z in from_posterior], expected)

        # 3. The images.
        images = [model.samples(2, f), *model.reconstructions(x, f).values()]
        for keep in range(L + 1):
            images.append(model.reconstruct(x, f, keep))
        for batch in images:
            self.assertEqual(batch.shape, x.shape)
            self.assertGreaterEqual(batch.min(), 0)
            self.assertLessEqual(batch.max(), 1)

    def test_wrong_latents_end_the_program(self):
        cases = [(text, ()) for text in ("0", "0,0", "", "four", "-1", "4,", "1.5", "100", "1,2,3")]
        cases += [("1,1,1,1,1,1,1", ("--dataset", "cifar10")), ("4:5", ())]
        # At 14 and 7 there is one scale, of 7x7. At 4 there are two.
        cases += [("1,1", ("--side", 14)), ("1,1", ("--side", 7)), ("1,1,1", ("--side", 4))]
        for text, more in cases:
            status, out, err = small.call(ladder.main, f"--latents={text}", *more)
            self.assertEqual((status, out, err.count("\n")), (2, "", 1), text)
            self.assertIn(f"--latents: got {text!r}, wants", err)

    def test_the_line_about_wrong_latents_names_latents_that_are_allowed(self):
        cases = (
            (0, "such as 4,4; images of 28x28 allow at most 2 numbers"),
            (14, "such as 4; images of 14x14 allow one number"),
        )
        for side, wanted in cases:
            _, _, err = small.call(ladder.main, "--side", side, "--latents", "1,1,1")
            self.assertIn(wanted, err)

    def test_wrong_sides_end_the_program(self):
        """--side has to divide the side of the data set's images."""
        cases = [(side, ()) for side in (3, 5, 8, 16, 27, 29, 32, 33, -1, 3.5)]
        cases += [(side, ("--dataset", "cifar10")) for side in (3, 7, 14, 28)]
        for side, more in cases:
            status, out, err = small.call(ladder.main, f"--side={side}", "--latents=1", *more)
            self.assertEqual((status, out, err.count("\n")), (2, "", 1), side)
            self.assertRegex(err, f"--side: got '?{side}'?, wants")

    def test_a_side_of_a_list_is_checked_with_the_other_flags(self):
        status, _, err = small.call(ladder.main, "--side", "28,14", "--latents", "1,1")
        self.assertEqual((status, err.count("\n")), (2, 1))
        self.assertIn("--latents: got '1,1', wants", err)

    def test_one_training_example_ends_the_program(self):
        """A headroom needs two."""
        status, _, err = small.call(ladder.main, "--num_train", 1)
        self.assertEqual((status, err.count("\n")), (2, 1))
        self.assertIn("--num_train: got 1, wants 0 or a whole number of at least 2", err)

    def test_deepest_latents(self):
        f = ladder.Flags(latents="1,0,0,0,0,1", dataset="cifar10")
        self.assertEqual(deep.latent_sides(f), [1, 32])


class Reconstructions(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.model, cls.f, cls.x = model_and_images(2, moved=0.5, latents="1,2", num_ch=3)

    @torch.no_grad()
    def test_levels_kept_are_the_posteriors_means_and_the_others_the_priors(self):
        model, f, x = self.model, self.f, self.x
        images = [model.reconstruct(x, f, keep) for keep in range(4)]

        # 1. The pictures show them, where the draws are the means.
        with mock.patch.object(processes, "normal_like", torch.zeros_like):
            torch.testing.assert_close(model.samples(2, f), images[0])
            panels = model.reconstructions(x, f)
        expected = (x, images[3], images[2], images[1])
        self.assertEqual(len(panels), 4)
        for (title, panel), batch in zip(panels.items(), expected):
            torch.testing.assert_close(panel, batch, msg=title)

        # 2. With no level kept, nothing of x is left.
        torch.testing.assert_close(images[0][0], images[0][1])

        # 3. With two levels kept, they come from q and the last one from p.
        zs = []
        for i, (p, q, _) in enumerate(model.top_down(2, model.encoder(x), posterior_mean)):
            zs.append(q.mean if i < 2 else p.mean)
        torch.testing.assert_close(model.p_x(zs).mean, images[2])

        # 4. Each level changes the image.
        for fewer, more in zip(images, images[1:]):
            self.assertGreater((fewer - more).abs().max().item(), 1e-3)

    def test_top_posterior(self):
        model, f = self.model, self.f
        x = self.x.clone().requires_grad_()
        shapes = [(2, 1, 7, 7), (2, 1, 14, 14), (2, 1, 14, 14)]
        for count in (1, 2, 3):
            posteriors = model.top_posterior(x, f, count)
            self.assertEqual([tuple(q.mean.shape) for q in posteriors], shapes[:count])

        posteriors = model.top_posterior(x, f, 3)
        expected = [q for _, q, _ in model.top_down(2, model.encoder(x), posterior_mean)]
        for q, expected_q in zip(posteriors, expected):
            torch.testing.assert_close(q.mean, expected_q.mean)
            torch.testing.assert_close(q.stddev, expected_q.stddev)
            total = q.mean.square().sum() + q.stddev.sum()
            (gradient,) = torch.autograd.grad(total, x, retain_graph=True)
            self.assertGreater(gradient.abs().amax((1, 2, 3)).min().item(), 1e-4)

    @torch.no_grad()
    def test_top_posterior_of_the_highest_level_is_that_of_forward(self):
        model, f, x = self.model, self.f, self.x
        [q] = model.top_posterior(x, f, 1)
        p, _, _ = next(model.top_down(2, None, lambda l, p, q: p.mean))
        expected = ((q.mean - p.mean) / p.stddev).flatten(1)
        torch.testing.assert_close(model.eval()(x, f)["mean_3"], expected)
        model.train()


class Logistics(unittest.TestCase):
    def setUp(self):
        # All values of a colour (256,), and all pairs of two colours (65536, 1, 2, 1, 1).
        self.values = torch.arange(256.0, dtype=torch.float64) / 255
        pairs = torch.cartesian_prod(self.values, self.values)
        self.pairs = pairs.view(-1, 1, 2, 1, 1)

    def parameters(self, n, c_x, seed, log_scale):
        random = torch.Generator().manual_seed(seed)
        K = deep.LogisticMixture.K
        shape = (n, K * deep.LogisticMixture.n(c_x), 1, 1)
        parameters = torch.randn(shape, generator=random, dtype=torch.float64)
        parameters[:, K * (1 + c_x) : K * (1 + 2 * c_x)] += log_scale
        return parameters

    def log_prob_of_all(self, p):
        """log p of each of the 256 values, (256, 4, 1, 1), for four pixels of one colour."""
        return p.log_prob(self.values.view(256, 1, 1, 1, 1).expand(-1, 4, -1, -1, -1))

    def test_sums_to_one(self):
        """The sum is over the 256 values of one colour, then over the 65,536 of two.

        The scales go from far below a bin to far above the range.
        """
        ones = torch.ones(4, 1, 1, dtype=torch.float64)
        for log_scale in (-9, -5, -2, 0, 3, 8):
            p = deep.LogisticMixture(self.parameters(4, 1, 1, log_scale), 1)
            total = self.log_prob_of_all(p).exp().sum(0)
            torch.testing.assert_close(total, ones, rtol=1e-10, atol=0)
        p = deep.LogisticMixture(self.parameters(1, 2, 2, -2), 2)
        self.assertAlmostEqual(p.log_prob(self.pairs).exp().sum().item(), 1, places=10)

    def test_against_the_difference_of_sigmoids(self):
        """The images are multiples of 1/255 in float32, as a data set has them."""
        parameters = self.parameters(1, 3, 3, -2)
        p = deep.LogisticMixture(parameters, 3)
        weights = p.log_weights[0, :, 0, 0].exp()
        free = p.means[0, :, :, 0, 0]
        scales = p.scales[0, :, :, 0, 0]
        # The slopes of green on red, of blue on red and of blue on green.
        slopes = torch.tanh(parameters[0, -30:, 0, 0]).view(10, 3)

        for x in ((0, 0, 0), (255, 255, 255), (0, 128, 255), (17, 200, 90)):
            red, green = 2 * x[0] / 255 - 1, 2 * x[1] / 255 - 1
            expected = 0
            for k in range(10):
                means = (
                    free[k, 0],
                    free[k, 1] + slopes[k, 0] * red,
                    free[k, 2] + slopes[k, 1] * red + slopes[k, 2] * green,
                )
                mass = 1.0
                for c in range(3):
                    mass *= self.mass_of_bin(x[c], means[c], scales[k, c])
                expected += weights[k].item() * float(mass)
            pixel = (torch.tensor(x, dtype=torch.uint8).float() / 255).double()
            log_p = p.log_prob(pixel.view(1, 3, 1, 1)).item()
            self.assertAlmostEqual(log_p, math.log(expected), places=5)

    def mass_of_bin(self, level, mean, scale):
        """The mass of a logistic in the bin of a level from 0 to 255. Outer bins have one edge."""
        below = 0
        up_to = 1
        if level > 0:
            below = 1 / (1 + math.exp(-((2 * level - 1) / 255 - 1 - mean) / scale))
        if level < 255:
            up_to = 1 / (1 + math.exp(-((2 * level + 1) / 255 - 1 - mean) / scale))
        return up_to - below

    def test_narrowest_scale(self):
        """A log-scale counts as it is down to -7, below as -7 (Salimans et al. 2017)."""
        parameters = self.parameters(1, 1, 6, 0)
        for log_scale, effective in ((-6.9, -6.9), (-7.1, -7.0)):
            parameters[:, 20:] = log_scale
            scales = deep.LogisticMixture(parameters, 1).scales
            expected = torch.full_like(scales, math.exp(effective))
            torch.testing.assert_close(scales, expected, rtol=1e-12, atol=0)

    def test_mean(self):
        """It is the mean of narrow logistics within the range, up to the bins' width."""
        parameters = self.parameters(4, 1, 4, 0)
        parameters[:, 10:20] *= 0.2
        parameters[:, 20:] = -5.0
        p = deep.LogisticMixture(parameters, 1)
        probability = self.log_prob_of_all(p).exp()
        expected = (probability * self.values.view(-1, 1, 1, 1)).sum(0)
        torch.testing.assert_close(p.mean[:, 0], expected, rtol=0, atol=1e-3)

    def test_mean_of_colours_that_depend_on_each_other(self):
        """It is the mean over the 65,536 values of two colours, of logistics as narrow."""
        parameters = self.parameters(1, 2, 7, 0)
        parameters[:, 10:30] *= 0.1
        parameters[:, 30:50] = -5.0
        p = deep.LogisticMixture(parameters, 2)
        expected = (p.log_prob(self.pairs).exp().unsqueeze(2) * self.pairs).sum(0)
        torch.testing.assert_close(p.mean, expected, rtol=0, atol=1e-3)
        self.assertGreater(p.slopes.abs().min().item(), 0.01)

    def test_gradients_stay_finite(self):
        """They stay finite where x is far out of every logistic's reach, in float32."""
        for log_scale in (-20.0, 20.0):
            parameters = self.parameters(2, 3, 5, log_scale).float().requires_grad_()
            x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(-1, 3, -1, -1)
            p = deep.LogisticMixture(parameters, 3)
            self.assertGreaterEqual(p.scales.min().item(), math.exp(-7.001))
            p.log_prob(x).sum().backward()
            self.assertTrue(parameters.grad.isfinite().all())

    @torch.no_grad()
    def test_bits_per_dim(self):
        """They are log p(x) over 3 x 32 x 32 numbers, or the ELBO without an estimate of it."""
        model, f, x = model_and_images(2, moved=0.1, latents="1", num_ch=3, dataset="cifar10")
        model = model.float().eval()
        data = datasets.Data("cifar10", (x.float(),), (x.float(),))
        for draws, name in ((3, "log_px"), (0, "elbo")):
            f = ladder.Flags(
                latents="1", num_ch=3, dataset="cifar10", device="cpu", num_samples=draws)
            metrics, _ = report.evaluate(model, f, data)
            expected = -metrics[name] / math.log(2) / 3072
            self.assertAlmostEqual(metrics["bits_per_dim"], expected, places=9)
            self.assertGreater(metrics["bits_per_dim"], 4)


class Sizes(unittest.TestCase):
    def test_parameters_are_as_many_as_published(self):
        """The numbers are those of the authors' released configurations for MNIST."""
        cases = (
            (ladder.LadderVAE, ladder.Flags, 600_673),
            (dct.DCTVAE, dct.Flags, 696_439),
            (dvp.DVPVAE, dvp.Flags, 648_579),
        )
        for Model, Flags, published in cases:
            count = sum(p.numel() for p in Model(Flags()).parameters())
            self.assertLess(abs(count / published - 1), 0.03, Model.__name__)


if __name__ == "__main__":
    unittest.main()
