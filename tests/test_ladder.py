"""MNIST_HVAE_Ladder: its terms against the equations written out by hand, by Monte Carlo where they are expectations."""
import math
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
import MNIST_HVAE_DVP as dvp
import MNIST_HVAE_Ladder as ladder
from tests import small


def model_and_images(n, moved=0.0, Model=ladder.LadderVAE, Flags=ladder.Flags, **flags):
    """A float64 model of these flags with random weights added, its setting, and n images as its data set has them."""
    f = Flags(device="cpu", **flags)
    shape, random = datasets.image_shape(f.dataset), torch.Generator().manual_seed(1)
    x = torch.randint(256 if f.dataset == "cifar10" else 2, (n, *shape), generator=random).double()
    x = x / 255 if f.dataset == "cifar10" else x
    model = training.build(Model, f, datasets.Data("digits", (x,), (x,)))
    with torch.no_grad():
        for p in model.parameters():
            p += moved * torch.randn(p.shape, generator=random)
    return model, common.on_device(f, x), x


def by_hand(model, x, noise, context=None):
    """The terms of a binary model's ELBO from its weights, by the equations of the model's docstring. noise: one tensor a
    learned level, from the top. A dict as forward's in evaluation mode. Beside s each prior reads the context, images like x
    averaged over squares, if there is one, and so does the start of s."""
    weights, L = dict(model.named_parameters()), len(noise)

    def conv(name, h, padding=0):
        return F.conv2d(h, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)

    def silu(h):
        return h / (1 + torch.exp(-h))

    def block(name, h):
        h = conv(f"{name}.0", h)
        for i, padding in ((2, 1), (4, 1), (6, 0)):
            h = conv(f"{name}.{i}", silu(h), padding)
        return h

    def head(name, h):
        return block(f"{name}.block", h) + (conv(f"{name}.linear", h) if f"{name}.linear.weight" in weights else 0)

    def upsample(h, side):
        return h.repeat_interleave(side // h.shape[-1], -1).repeat_interleave(side // h.shape[-1], -2)

    def bilinear(h):                                      # to 28x28, between the centres of pixels
        n = h.shape[-1]
        at = ((torch.arange(28) + 0.5) * n / 28 - 0.5).clamp(0, n - 1)
        weight = (1 - (at[:, None] - torch.arange(n)).abs()).clamp(min=0).to(h.dtype)
        return weight @ h @ weight.T

    e, features = conv("encoder.x_to_e", x), {}
    while f"encoder.scales.{len(features)}.0.0.weight" in weights:
        for k in range(3):
            e = e + block(f"encoder.scales.{len(features)}.{k}", silu(e))
        e = (e[..., ::2, ::2] + e[..., 1::2, ::2] + e[..., ::2, 1::2] + e[..., 1::2, 1::2]) / 4
        features[len(features)] = e
    features = {e.shape[-1]: e for e in features.values()}

    def beside(s, side):
        return s if context is None else torch.cat([s, pooled(side)], dim=1)

    def pooled(side):
        return context.unflatten(-1, (side, -1)).unflatten(-3, (side, -1)).mean((-1, -3))

    s, total, log_ratio, terms = torch.ones_like(features[noise[0].shape[-1]]), 0, 0, {}
    s = s if context is None else s + conv(f"context_to_s.{s.shape[-1]}", pooled(s.shape[-1]))
    for i, eps in enumerate(noise):
        level, side = L - i, eps.shape[-1]
        s = upsample(s, side)
        out = head(f"latents.{i}.s_to_p", beside(s, side))
        p_mean, p_log_var, h = out[:, :1], out[:, 1:2].clamp(-10, 1), out[:, 2:]
        out = head(f"latents.{i}.s_to_q", (features[side] + s) / math.sqrt(2))
        q_mean, q_log_var = out[:, :1], out[:, 1:].clamp(-10, 1)
        z = q_mean + torch.exp(q_log_var / 2) * eps
        total = total + bilinear(z) / math.sqrt(L)
        kl = (p_log_var - q_log_var + (torch.exp(q_log_var) + (q_mean - p_mean)**2) / torch.exp(p_log_var) - 1) / 2
        log_ratio = log_ratio + ((z - q_mean)**2 / torch.exp(q_log_var) + q_log_var
                                 - (z - p_mean)**2 / torch.exp(p_log_var) - p_log_var).flatten(1).sum(1) / 2
        terms |= {f"kl_{level}": kl.flatten(1), f"mean_{level}": ((q_mean - p_mean) * torch.exp(-p_log_var / 2)).flatten(1)}
        if level > 1:
            s = s + h + conv(f"latents.{i}.z_to_s", z)
            s = s + block(f"latents.{i}.s_to_s", s)
    first, last = ("z_to_x.0", "z_to_x.2") if context is None else ("last_block", "to_x.1")
    logits = conv(last, silu(conv(first, total)), padding=1)
    log_px_z = (x * logits - torch.log1p(torch.exp(logits))).flatten(1).sum(1)
    return terms | {"log_px_z": log_px_z, "log_w": log_px_z + log_ratio}


def standard_errors(draws, value=0.0):
    """How many standard errors the mean of draws (S, ...) is off value (...), at most."""
    return ((draws.mean(0) - value).abs() / draws.std(0) * len(draws)**0.5).max().item()


class Terms(unittest.TestCase):
    @torch.no_grad()
    def test_terms_are_those_of_the_equations(self):
        for latents, num_ch, d_hidden, linear_path in (("2,1", 4, 0, True), ("0,2", 3, 5, False), ("3,0", 2, 3, True)):
            model, f, x = model_and_images(3, moved=0.5, latents=latents, num_ch=num_ch, d_hidden=d_hidden, linear_path=linear_path)
            random = torch.Generator().manual_seed(2)
            noise = [torch.randn(3, 1, side, side, generator=random, dtype=x.dtype) for side in deep.sides_of_latents(f)]
            with mock.patch.object(common, "normal_like", side_effect=noise):
                terms = model.eval()(x, f)
            hand = by_hand(model, x, noise)
            self.assertEqual(set(terms), set(hand))
            for name in hand:
                torch.testing.assert_close(terms[name], hand[name], rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")
            self.assertGreater(min(hand[f"kl_{l}"].mean().item() for l in range(1, model.levels + 1)), 0.02)

    @torch.no_grad()
    def test_each_kl_is_the_mean_of_its_log_ratio(self):
        """E_q[log q(z_l|z_>l, x) - log p(z_l|z_>l)] over draws of z_l at the same z_>l, with densities written out."""
        model, f, x = model_and_images(1, moved=0.5, latents="1,1", num_ch=3)
        features = {side: e.expand(1000, -1, -1, -1) for side, e in model.encoder(x).items()}
        torch.manual_seed(3)
        for level in (1, 2):
            z_above = torch.randn(1, 1, 7, 7, dtype=x.dtype).expand(1000, -1, -1, -1)
            drawn = list(model.top_down(1000, features, lambda l, p, q: z_above if l > level else deep.draw(q)))
            p, q, z = drawn[2 - level]
            log_ratio = ((z - p.mean)**2 / p.stddev**2 - (z - q.mean)**2 / q.stddev**2) / 2 + (p.stddev / q.stddev).log()
            kl = torch.distributions.kl_divergence(q, p)
            torch.testing.assert_close(kl, kl[:1].expand_as(kl))
            self.assertGreater(kl.max().item(), 0.1)
            self.assertLess(standard_errors(log_ratio, kl[0]), 5)        # of up to 196: the largest is expected at 3

    @torch.no_grad()
    def test_mean_of_log_w_is_the_elbo(self):
        model, f, x = model_and_images(2, moved=0.5, latents="1,2", num_ch=3)
        torch.manual_seed(4)
        terms = model.eval()(x, f, sample_shape=(400,))
        elbo = terms["log_px_z"] - sum(terms[f"kl_{l}"].sum(-1) for l in (1, 2, 3))
        difference = terms["log_w"] - elbo                # at the same draws: without most of the noise
        self.assertLess(standard_errors(difference), 4)
        self.assertGreater(difference.std().item(), 0.5)

    @torch.no_grad()
    def test_draws_are_independent_and_the_images_stay_in_order(self):
        model, f, x = model_and_images(3, moved=0.5, latents="1,1", num_ch=2)
        torch.manual_seed(5)
        terms = model.eval()(x, f, sample_shape=(200,))
        self.assertGreater(terms["log_px_z"].std(0).min().item(), 1e-3)
        for i in range(3):                                # that of each image alone
            alone = model(x[i:i + 1], f, sample_shape=(200,))
            for name in ("log_px_z", "log_w"):
                error = (terms[name][:, i].var() / 200 + alone[name].var() / 200).sqrt()
                self.assertLess(abs(terms[name][:, i].mean() - alone[name].mean()) / error, 4)
            torch.testing.assert_close(terms["mean_2"][:, i], alone["mean_2"][:, 0])

    def test_starts_at_the_prior(self):
        """The last convolutions of both blocks start at zero: without the linear path prior and posterior are N(0, I), and every
        KL is 0; with it they are linear in what they read."""
        model, f, x = model_and_images(2, latents="2,2", num_ch=4, linear_path=False)
        drawn = list(model.top_down(2, model.encoder(x), lambda l, p, q: deep.draw(q)))
        for p, q, _ in drawn:
            for value, at_start in ((p.mean, 0), (p.stddev, 1), (q.mean, 0), (q.stddev, 1)):
                self.assertTrue(torch.equal(value, torch.full_like(value, at_start)))
        self.assertEqual(max(value.abs().max().item() for name, value in model(x, f).items() if name.startswith("kl")), 0)
        model, f, x = model_and_images(2, latents="2,2", num_ch=4)
        for latent in model.latents:
            for head, channels in ((latent.s_to_p, 4), (latent.s_to_q, 4)):
                s = torch.randn(1, channels, latent.side, latent.side, dtype=x.dtype)
                torch.testing.assert_close(head(s), torch.einsum("oc,bchw->bohw", head.linear.weight[:, :, 0, 0], s)
                                           + head.linear.bias.view(-1, 1, 1))

    def test_blocks_that_z_enters_start_smaller(self):
        """By sqrt(1 / L): the same seed gives the top level the same weights at L = 2 and at L = 8, but for that."""
        [two, _, _], [eight, _, _] = (model_and_images(1, latents=latents, num_ch=4) for latents in ("1,1", "4,4"))
        for name, ratio in (("z_to_s.weight", 2), ("z_to_s.bias", 2), ("s_to_s.6.weight", 2), ("s_to_s.0.weight", 1),
                            ("s_to_q.block.2.weight", 1)):
            a, b = (model.latents[0].get_parameter(name) for model in (two, eight))
            torch.testing.assert_close(a, ratio * b)
            self.assertGreater(a.abs().max().item(), 0)

    def test_log_variances_are_clamped(self):
        model, f, x = model_and_images(1, latents="1,1", num_ch=2, linear_path=False)
        for raw, std in ((50.0, math.exp(0.5)), (-50.0, math.exp(-5))):
            with torch.no_grad():
                for latent in model.latents:
                    latent.s_to_p.block[-1].bias[1] = latent.s_to_q.block[-1].bias[1] = raw
            for p, q, _ in model.top_down(1, model.encoder(x), lambda l, p, q: q.mean):
                torch.testing.assert_close(p.stddev, torch.full_like(p.stddev, std))
                torch.testing.assert_close(q.stddev, torch.full_like(q.stddev, std))

    def test_every_latent_reaches_the_pixels_without_the_state(self):
        """With the way from z into the state cut, log p(x|z) still has a gradient in the posterior's mean of each level."""
        model, f, x = model_and_images(2, moved=0.5, latents="2,2", num_ch=3)
        with torch.no_grad():
            for latent in model.latents[:-1]:
                latent.z_to_s.weight.zero_()
        torch.manual_seed(6)
        model(x, f)["log_px_z"].sum().backward()
        for latent in model.latents:
            self.assertGreater(latent.s_to_q.block[-1].bias.grad[0].abs().item(), 1e-3)

    def test_the_pixels_do_not_see_the_state(self):
        """With z held, log p(x|z) has no gradient in anything but the two convolutions from the sum of latents."""
        model, f, x = model_and_images(2, moved=0.5, latents="1,2", num_ch=3)
        with mock.patch.object(deep, "draw", lambda q: torch.ones_like(q.mean)):
            model(x, f)["log_px_z"].sum().backward()
        reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        self.assertEqual(reached, {"z_to_x"})

    def test_autocast_leaves_likelihood_and_kls_in_float32(self):
        f = ladder.Flags(latents="1,1", num_ch=4, device="cpu")
        model, x = ladder.LadderVAE(f), torch.ones(2, 1, 28, 28)
        seen = []
        model.encoder.register_forward_hook(lambda module, args, out: seen.extend(e.dtype for e in out.values()))
        with torch.autocast("cpu", torch.bfloat16):
            terms = model(x, common.on_device(f, x))
            drawn = model.top_down(2, model.encoder(x), lambda l, p, q: deep.draw(q))
            values = [value for p, q, z in drawn for value in (p.mean, p.stddev, q.mean, q.stddev, z)]
        self.assertEqual(set(seen), {torch.bfloat16})
        self.assertEqual({value.dtype for value in (*terms.values(), *values)}, {torch.float32})


class Settings(unittest.TestCase):
    def test_sampling_and_inference_agree_on_shapes(self):
        for latents, num_ch, dataset, sides in (
                ("1", 1, "mnist", [14]), ("0,3", 2, "mnist", [14] * 3), ("2,3", 3, "mnist", [7] * 2 + [14] * 3),
                ("2,0", 5, "auto", [7] * 2), ("1,0,2", 2, "cifar10", [8, 32, 32])):
            with self.subTest(latents=latents, num_ch=num_ch, dataset=dataset):
                model, f, x = model_and_images(2, latents=latents, num_ch=num_ch, dataset=dataset)
                self.assertEqual(deep.sides_of_latents(f), sides)
                L, c_x = len(sides), x.shape[1]
                units = {f"kl_{L - i}": c_x * side**2 for i, side in enumerate(sides)}
                small.terms_in_shape(self, model, x, f, units)
                zs = [[], []]
                for k, features in enumerate((None, model.encoder(x))):
                    zs[k] = [tuple(z.shape) for p, q, z in model.top_down(2, features, lambda l, p, q: deep.draw(q or p))]
                self.assertEqual(zs, [[(2, c_x, side, side) for side in sides]] * 2)
                images = [model.samples(2, f), *(model.reconstruct(x, f, keep) for keep in range(L + 1)),
                          *model.reconstructions(x, f).values()]
                self.assertEqual({tuple(of.shape) for of in images}, {tuple(x.shape)})
                self.assertTrue(all(0 <= of.min() and of.max() <= 1 for of in images))

    def test_wrong_latents_end_the_program(self):
        for text, more in (("0", ()), ("0,0", ()), ("", ()), ("four", ()), ("-1", ()), ("4,", ()), ("1.5", ()), ("100", ()),
                           ("1,2,3", ()), ("1,1,1,1,1,1,1", ("--dataset", "cifar10")), ("4:5", ())):
            status, out, err = small.call(ladder.main, f"--latents={text}", *more)
            self.assertEqual((status, out, err.count("\n")), (2, "", 1), text)
            self.assertIn(f"--latents: got {text!r}, wants", err)

    def test_deepest_latents(self):
        self.assertEqual(deep.sides_of_latents(ladder.Flags(latents="1,0,0,0,0,1", dataset="cifar10")), [1, 32])


class Reconstructions(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.model, cls.f, cls.x = model_and_images(2, moved=0.5, latents="1,2", num_ch=3)

    @torch.no_grad()
    def test_levels_kept_are_the_posteriors_means_and_the_others_the_priors(self):
        model, f, x = self.model, self.f, self.x
        images = [model.reconstruct(x, f, keep) for keep in range(4)]
        with mock.patch.object(common, "normal_like", torch.zeros_like):      # draws that are the means
            torch.testing.assert_close(model.samples(2, f), images[0])
            torch.testing.assert_close(images[0][0], images[0][1])       # nothing of x in it
            shown = model.reconstructions(x, f)
            for (caption, of), expected in zip(shown.items(), (x, images[3], images[2], images[1])):
                torch.testing.assert_close(of, expected, msg=caption)
            self.assertEqual(len(shown), 4)
        zs = []                                           # of the top two levels from q, then one from p
        for i, (p, q, _) in enumerate(model.top_down(2, model.encoder(x), lambda l, p, q: q.mean)):
            zs.append(q.mean if i < 2 else p.mean)
        torch.testing.assert_close(model.p_x(zs).mean, images[2])
        for a, b in zip(images, images[1:]):
            self.assertGreater((a - b).abs().max().item(), 1e-3)

    def test_top_posterior(self):
        model, f, x = self.model, self.f, self.x.clone().requires_grad_()
        for count in (1, 2, 3):
            posteriors = model.top_posterior(x, f, count)
            self.assertEqual([tuple(q.mean.shape) for q in posteriors], [(2, 1, 7, 7), (2, 1, 14, 14), (2, 1, 14, 14)][:count])
        expected = [q for _, q, _ in model.top_down(2, model.encoder(x), lambda l, p, q: q.mean)]
        for q, of in zip(posteriors, expected):
            torch.testing.assert_close(q.mean, of.mean)
            torch.testing.assert_close(q.stddev, of.stddev)
            gradient, = torch.autograd.grad(q.mean.square().sum() + q.stddev.sum(), x, retain_graph=True)
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
    def parameters(self, n, c_x, seed, log_scale):
        random = torch.Generator().manual_seed(seed)
        K = deep.LogisticMixture.K
        parameters = torch.randn(n, K * deep.LogisticMixture.n(c_x), 1, 1, generator=random, dtype=torch.float64)
        parameters[:, K * (1 + c_x):K * (1 + 2 * c_x)] += log_scale
        return parameters

    def test_sums_to_one(self):
        """Over the 256 values of one colour, and the 65,536 of two, at scales from far below a bin to far above the range."""
        values = torch.arange(256.0, dtype=torch.float64) / 255
        for log_scale in (-9, -5, -2, 0, 3, 8):
            p = deep.LogisticMixture(self.parameters(4, 1, 1, log_scale), 1)
            log_px = p.log_prob(values.view(256, 1, 1, 1, 1).expand(-1, 4, -1, -1, -1))
            torch.testing.assert_close(log_px.exp().sum(0), torch.ones(4, 1, 1, dtype=torch.float64), rtol=1e-10, atol=0)
        pairs = torch.cartesian_prod(values, values).view(-1, 1, 2, 1, 1)
        total = deep.LogisticMixture(self.parameters(1, 2, 2, -2), 2).log_prob(pairs).exp().sum()
        self.assertAlmostEqual(total.item(), 1, places=10)

    def test_against_the_difference_of_sigmoids(self):
        parameters = self.parameters(1, 3, 3, -2)
        p = deep.LogisticMixture(parameters, 3)
        weights, free, scales = p.log_weights[0, :, 0, 0].exp(), p.means[0, :, :, 0, 0], p.scales[0, :, :, 0, 0]
        slopes = torch.tanh(parameters[0, -30:, 0, 0]).view(10, 3)       # green on red, blue on red, blue on green
        for x in ((0, 0, 0), (255, 255, 255), (0, 128, 255), (17, 200, 90)):
            expected = 0
            for k in range(10):
                mass, (red, green) = 1.0, (2 * x[0] / 255 - 1, 2 * x[1] / 255 - 1)
                means = (free[k, 0], free[k, 1] + slopes[k, 0] * red, free[k, 2] + slopes[k, 1] * red + slopes[k, 2] * green)
                for c in range(3):
                    low = 0 if x[c] == 0 else 1 / (1 + math.exp(-((2 * x[c] - 1) / 255 - 1 - means[c]) / scales[k, c]))
                    high = 1 if x[c] == 255 else 1 / (1 + math.exp(-((2 * x[c] + 1) / 255 - 1 - means[c]) / scales[k, c]))
                    mass *= high - low
                expected += weights[k].item() * float(mass)
            # as images come: multiples of 1/255 in float32
            found = p.log_prob((torch.tensor(x, dtype=torch.uint8).float() / 255).double().view(1, 3, 1, 1))
            self.assertAlmostEqual(found.item(), math.log(expected), places=5)

    def test_narrowest_scale(self):
        """A log-scale counts as it is down to -7, below as -7 (Salimans et al. 2017)."""
        parameters = self.parameters(1, 1, 6, 0)
        for log_scale, counts_as in ((-6.9, -6.9), (-7.1, -7.0)):
            parameters[:, 20:] = log_scale
            scales = deep.LogisticMixture(parameters, 1).scales
            torch.testing.assert_close(scales, torch.full_like(scales, math.exp(counts_as)), rtol=1e-12, atol=0)

    def test_mean(self):
        """Of narrow logistics within the range, up to the bins' width."""
        values = torch.arange(256.0, dtype=torch.float64) / 255
        parameters = self.parameters(4, 1, 4, 0)
        parameters[:, 10:20] *= 0.2
        parameters[:, 20:] = -5.0
        p = deep.LogisticMixture(parameters, 1)
        expected = (p.log_prob(values.view(256, 1, 1, 1, 1).expand(-1, 4, -1, -1, -1)).exp() * values.view(-1, 1, 1, 1)).sum(0)
        torch.testing.assert_close(p.mean[:, 0], expected, rtol=0, atol=1e-3)

    def test_gradients_stay_finite(self):
        """Where x is far out of every logistic's reach, in float32."""
        for log_scale in (-20.0, 20.0):
            parameters = self.parameters(2, 3, 5, log_scale).float().requires_grad_()
            x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(-1, 3, -1, -1)
            p = deep.LogisticMixture(parameters, 3)
            self.assertGreaterEqual(p.scales.min().item(), math.exp(-7.001))
            p.log_prob(x).sum().backward()
            self.assertTrue(parameters.grad.isfinite().all())

    def test_mean_of_colours_that_depend_on_each_other(self):
        """Over the 65,536 values of two colours, of narrow logistics within the range."""
        values = torch.arange(256.0, dtype=torch.float64) / 255
        parameters = self.parameters(1, 2, 7, 0)
        parameters[:, 10:30] *= 0.1
        parameters[:, 30:50] = -5.0
        p = deep.LogisticMixture(parameters, 2)
        pairs = torch.cartesian_prod(values, values).view(-1, 1, 2, 1, 1)
        expected = (p.log_prob(pairs).exp().unsqueeze(2) * pairs).sum(0)
        torch.testing.assert_close(p.mean, expected, rtol=0, atol=1e-3)
        self.assertGreater(p.slopes.abs().min().item(), 0.01)

    @torch.no_grad()
    def test_bits_per_dim(self):
        """Of log p(x), over 3 x 32 x 32 numbers; of the ELBO where no log p(x) is asked for."""
        model, f, x = model_and_images(2, moved=0.1, latents="1", num_ch=3, dataset="cifar10")
        data = datasets.Data("cifar10", (x.float(),), (x.float(),))
        for draws, of in ((3, "log_px"), (0, "elbo")):
            f = ladder.Flags(latents="1", num_ch=3, dataset="cifar10", device="cpu", num_samples=draws)
            metrics, _ = report.evaluate(model.float().eval(), f, data)
            self.assertAlmostEqual(metrics["bits_per_dim"], -metrics[of] / math.log(2) / 3072, places=9)
            self.assertGreater(metrics["bits_per_dim"], 4)


class Sizes(unittest.TestCase):
    def test_parameters_are_as_many_as_published(self):
        """Of the authors' released configurations for MNIST: 600,673, 696,439 and 648,579."""
        for Model, Flags, published in ((ladder.LadderVAE, ladder.Flags, 600_673), (dct.DCTVAE, dct.Flags, 696_439),
                                        (dvp.DVPVAE, dvp.Flags, 648_579)):
            found = sum(p.numel() for p in Model(Flags()).parameters())
            self.assertLess(abs(found / published - 1), 0.03, Model.__name__)


if __name__ == "__main__":
    unittest.main()
