"""Headroom, verdicts and dead units.

The headroom is compared with brute force, with models at their known optimum, and with what its
units change in a model's own loss.
"""
import dataclasses
import json
import math
import unittest
from unittest import mock

import common
import numpy as np
import torch
from torch.distributions import Normal, kl_divergence

import headroom
import MNIST_CVAE_Linear
import MNIST_CVAE_Relu
import MNIST_HVAE_CNN
import MNIST_HVAE_Linear_learnable_sigma_2
import MNIST_HVAE_Relu
import MNIST_VAE_Linear_learnable_sigma
import MNIST_VAE_Relu_learnable_sigma
import MNIST_VAE_Relu_nonlearnable_sigma
import report
import Synthetic_CVAE_Relu_correlation
import theory
import training
import verify
from tests import small
from tests.test_nonlinear import SCRIPTS


# ------------------------------------------------------------------------------------- the theory

def regression_rows(seed, n=40, p=5, D=4):
    """(r (n, D), u (n, p)), float64. r is partly linear in u, whose last column is 1."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    columns = draw(n, p - 1) @ draw(p - 1, p - 1) + 0.5
    u = torch.cat([columns, torch.ones(n, 1, dtype=torch.float64)], dim=1)
    r = 0.6 * u @ draw(p, D) + 0.7 * draw(n, D)
    return r, u


def moments_of_rows(r, u):
    """C (D, p) and A (p, p)."""
    return r.T @ u / len(u), u.T @ u / len(u)


def loss_with_units(units, r, u, beta, weight, std):
    """The part of a negative beta-ELBO that linear units change, from the rows themselves.

    units: {"encoder" (k, p), "log_sigma" (k,), "decoder" (D, k)}. The std of the prior is 1.
    """
    mean = u @ units["encoder"].T
    sigma = units["log_sigma"].exp()
    left = r - mean @ units["decoder"].T
    error = (left**2).sum(1).mean() + (units["decoder"]**2 @ sigma**2).sum()
    kl = kl_divergence(Normal(mean, sigma), Normal(0.0, 1.0))
    return weight * error / (2 * std**2) + beta * kl.sum(1).mean()


def loss_without_units(r, weight, std):
    """The same part of the loss when there are no units, as a number."""
    return (weight * (r**2).sum(1).mean() / (2 * std**2)).item()


def random_units(k, p=5, D=4):
    """Four starts for brute force, each as `loss_with_units` takes it."""
    random = torch.Generator().manual_seed(9)

    def draw(*shape):
        return 0.5 * torch.randn(shape, generator=random, dtype=torch.float64)

    starts = []
    for _ in range(4):
        starts.append({"encoder": draw(k, p), "decoder": draw(D, k), "log_sigma": draw(k)})
    return starts


class BruteForce(unittest.TestCase):
    # (number of units, beta, weight, std). The units of the last case gain nothing.
    CASES = (
        (1, 1, 1, 1.0),
        (1, 4, 2, 0.7),
        (2, 1, 1, 1.0),
        (2, 6, 1, 0.5),
        (3, 0.3, 0.5, 0.8),
        (3, 2, 1, 1.5),
        (3, 50, 1, 1.0),
    )

    def test_headroom_is_the_gain_of_further_units(self):
        """Brute force over encoder, std and decoder of k units gains as much, and no more."""
        gaining = 0
        for seed, (k, beta, weight, std) in enumerate(self.CASES):
            r, u = regression_rows(seed)
            tau = theory.spectrum(headroom.linear_part(*moments_of_rows(r, u)))
            gain = headroom.gain_of_units(tau, k, beta, weight, std)

            def loss(units):
                return loss_with_units(units, r, u, beta, weight, std)

            _, least = verify.minimise(loss, random_units(k))[0]
            without = loss_without_units(r, weight, std)
            with self.subTest(k=k, beta=beta, weight=weight, std=std):
                self.assertAlmostEqual(gain, without - least, delta=1e-9 * without)
            if gain > 0.01:
                gaining += 1
        self.assertEqual(gaining, 6)

    def test_units_with_any_encoder(self):
        """With a mean of its own for each row, k units gain the headroom of F, and no more.

        Each row has a column of its own in u, so that a linear encoder is a table of the means.
        """
        n = 24
        own_columns = torch.eye(n, dtype=torch.float64)
        for seed, (k, beta, weight, std) in enumerate(self.CASES):
            r, u = regression_rows(seed, n)
            tau = theory.spectrum(r.T @ r / n)
            gain = headroom.gain_of_units(tau, k, beta, weight, std)

            def loss(units):
                return loss_with_units(units, r, own_columns, beta, weight, std)

            _, least = verify.minimise(loss, random_units(k, p=n)[:2])[0]
            without = loss_without_units(r, weight, std)
            with self.subTest(k=k, beta=beta, weight=weight, std=std):
                self.assertAlmostEqual(gain, without - least, delta=1e-9 * without)

            linear_tau = theory.spectrum(headroom.linear_part(*moments_of_rows(r, u)))
            linear_gain = headroom.gain_of_units(linear_tau, k, beta, weight, std)
            if beta < 50:
                self.assertGreater(gain, linear_gain + 0.01)
            else:
                self.assertEqual((gain, linear_gain), (0, 0))

    def test_idle_units_gain_it(self):
        """The units gain G_k on their own rows. Their gain on other rows is the rows' own."""
        for seed, (k, *objective) in enumerate(self.CASES):
            beta, weight, std = objective
            r, u = regression_rows(seed)
            moments = moments_of_rows(r, u)
            tau = theory.spectrum(headroom.linear_part(*moments))
            gain = headroom.gain_of_units(tau, k, *objective)
            units = headroom.best_units(*moments, k, *objective)
            self.assertAlmostEqual(
                headroom.gain_on_rows(units, *moments, *objective), gain, places=10)

            other_r, other_u = regression_rows(seed + 100)
            encoder, sigma, decoder = units
            named = {"encoder": encoder, "log_sigma": sigma.log(), "decoder": decoder}
            loss = loss_with_units(named, other_r, other_u, *objective).item()
            gain_by_rows = loss_without_units(other_r, weight, std) - loss
            other_moments = moments_of_rows(other_r, other_u)
            self.assertAlmostEqual(
                headroom.gain_on_rows(units, *other_moments, *objective), gain_by_rows, places=10)

    def test_columns_without_information(self):
        """A constant and a repeated column of u change nothing, thanks to the pseudo-inverse."""
        r, u = regression_rows(0)
        tau = theory.spectrum(headroom.linear_part(*moments_of_rows(r, u)))
        wider = torch.cat([u, u[:, :1], torch.zeros_like(u[:, :1]), 3 * u[:, -1:]], dim=1)
        wider_tau = theory.spectrum(headroom.linear_part(*moments_of_rows(r, wider)))
        self.assertLess((wider_tau - tau).abs().max(), 1e-9 * tau[0])

    def test_weights_of_zero(self):
        """With beta = 0 units gain all of tau. With weight 0 they gain nothing."""
        tau = torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)
        self.assertAlmostEqual(
            headroom.gain_of_units(tau, 3, beta=0, weight=1, std=0.5), 5 / (2 * 0.25))
        self.assertEqual(headroom.gain_of_units(tau, 3, beta=1, weight=0, std=0.5), 0)
        self.assertEqual(headroom.gain_of_units(tau, 3, beta=0, weight=0, std=0.5), 0)
        self.assertEqual(headroom.gain_of_units(tau, 0, beta=1, weight=1, std=1), 0)
        self.assertEqual(headroom.gain_threshold(beta=2, weight=0, std=1), math.inf)


# --------------------------------------------------------------------------------- linear models

def optimal_vae(f, data):
    """A linear VAE with the weights of its closed form, and that closed form."""
    model = training.build(MNIST_VAE_Linear_learnable_sigma.VAE, f, data).eval()
    units = model.predicted(f, data)
    _, P = theory.modes(data.moment)
    P = P[:, :f.d_1]
    with torch.no_grad():
        model.W.weight.copy_((units["lambda"] / units["theta"])[:, None] * P.T)
        model.U.weight.copy_(P * units["omega"])
        model.log_scale.copy_((units["sigma"] / float(f.sigma)).log())
    return model, units


def optimal_cvae(f, data):
    """A linear CVAE with the weights of its closed form, and that closed form."""
    model = training.build(MNIST_CVAE_Linear.CVAE, f, data).eval()
    units = model.predicted(f, data)
    _, P = theory.modes(theory.moment_given_x(data.moment, 196))
    P = P[:, :f.dim_z]

    # The best linear prediction of y from x.
    moment_of_x = data.moment[:196, :196]
    prediction = data.moment[196:, :196] @ torch.linalg.pinv(moment_of_x, hermitian=True)

    W2 = (units["lambda"] / units["theta"].sqrt())[:, None] * P.T
    with torch.no_grad():
        model.W2.weight.copy_(W2)
        model.W1.weight.copy_(-W2 @ prediction)
        model.U1.weight.copy_(P * units["omega"])
        model.U2.weight.copy_(prediction)
        model.log_sigma.copy_((units["sigma"] / f.eta_enc).log())
    return model, units


def optimal_hvae(f, data):
    """A linear two-level HVAE with the weights of its closed form, and that closed form."""
    model = training.build(MNIST_HVAE_Linear_learnable_sigma_2.HVAE, f, data).eval()
    units = model.predicted(f, data)
    _, P = theory.modes(data.moment)
    P = P[:, :f.d_1]
    variance_1 = units["lambda_1"]**2 + f.sigma_1**2
    with torch.no_grad():
        # Any scale of the units of z1 leads to the same maps.
        model.log_scale_1.copy_(torch.linspace(-1, 1, f.d_1))
        s = model.scale_1
        W1 = (units["lambda_1"] / units["theta"])[:, None] * P.T
        U1 = P * units["theta"] * units["lambda_1"] / variance_1
        W2 = torch.diag(units["lambda_2"] / variance_1.sqrt())
        U2 = torch.diag(units["omega_2"])
        model.unscaled_W1.weight.copy_(W1 / s)
        model.unscaled_U1.weight.copy_(U1 * s.T)
        model.unscaled_W2.weight.copy_(W2 * s.T)
        model.unscaled_U2.weight.copy_(U2 / s)
        model.log_sigma_2.copy_((units["sigma_2"] / f.eta_enc).log())
    return model, units


def exact_loss(model, f, data):
    """The loss over all training rows in float64. In training mode a linear model draws nothing."""
    def loss_of_rows(model, batch, f):
        model.train()
        return model.loss(model(*batch, f), f)

    return verify.in_float64(model, f, data.train, loss_of_rows).mean().item()


def moments_and_objective(model, f, data, level=""):
    """A level's ResidualMoments over all training rows, and its (beta, weight, std)."""
    moments = headroom.residual_moments(model, f, data)[level]
    [part] = moments.parts
    residual = moments.residual
    return part, (float(residual.beta), float(residual.weight), float(residual.std))


def headroom_of(model, f, data, collapsed, level=""):
    """(tau, G_k for k = collapsed, the variance from which on units pay) of a level."""
    part, objective = moments_and_objective(model, f, data, level)
    tau = theory.spectrum(headroom.linear_part(part.cross, part.moment))
    gain = headroom.gain_of_units(tau, collapsed, *objective)
    return tau, gain, headroom.gain_threshold(*objective)


def measured_level(model, f, data, units, collapsed):
    """The LevelHeadroom that `headroom.measure` finds for a model with one level."""
    [level] = headroom.residual_moments(model, f, data)
    metrics = {f"AU_kl{level}": units - collapsed}
    examples = {f"unit_kl{level}": np.ones((1, units))}
    [measured] = headroom.measure(model, f, data, metrics, examples).values()
    return measured


class LinearModels(unittest.TestCase):
    """Models with the weights of their closed forms. The noise of z is integrated out."""

    def setUp(self):
        torch.manual_seed(0)
        self.images = small.digit_data(60, 6)

    def vae_cases(self):
        """(setting, data, whether units collapse) for a VAE."""
        for beta, some_collapse in ((0.5, False), (2.5, True)):
            f = MNIST_VAE_Linear_learnable_sigma.Flags(
                device="cpu", d_1=8, beta=beta, eta_dec=0.9, c=1.3)
            yield f, self.images, some_collapse

    def cvae_cases(self):
        """(setting, data, whether units collapse) for a CVAE."""
        data = small.as_quarters(small.digit_data(400, 6))
        for beta, some_collapse in ((0.3, False), (1.5, True)):
            f = MNIST_CVAE_Linear.Flags(
                device="cpu", dim_z=8, beta=beta, eta_dec=0.9, eta_enc=1.3)
            yield f, data, some_collapse

    def check_optimum(self, model, units, f, data, variance, some_collapse):
        """At its optimum a model has no headroom. variance (d,) is that of the units' modes."""
        self.assertAlmostEqual(exact_loss(model, f, data), units["loss"].item(), delta=1e-7)
        collapsed = (units["kl"] == 0).sum().item()
        self.assertEqual(collapsed > 0, some_collapse)

        tau, gain, level = headroom_of(model, f, data, collapsed)
        self.assertEqual(gain, 0)
        if collapsed:
            self.assertLessEqual(tau[0].item(), level * (1 + 1e-9))

        # An active unit leaves level^2 / variance of its mode unexplained.
        for left in level**2 / variance[units["kl"] > 0]:
            self.assertLess((tau - left).abs().min(), 1e-9)
        self.check_any_encoder(model, f, data, len(units["kl"]), collapsed)

    def check_any_encoder(self, model, f, data, units, collapsed):
        """The residual of a linear model is linear in u: a richer encoder has no more to use."""
        part, _ = moments_and_objective(model, f, data)
        T = headroom.linear_part(part.cross, part.moment)
        self.assertLess((part.squares - T).abs().max(), 1e-9)
        self.assertIsNone(part.fisher)

        measured = measured_level(model, f, data, units, collapsed)
        self.assertAlmostEqual(measured.headroom_any, measured.headroom, delta=1e-9)
        self.assertEqual(len(measured.tau_any), units)
        for tau, tau_any in zip(measured.tau, measured.tau_any):
            self.assertAlmostEqual(tau, tau_any, delta=1e-9)

    def check_loss_of_a_unit(self, model, units, f, data):
        """The headroom of one collapsed unit is the rise of the loss since it collapsed."""
        rise = exact_loss(model, f, data) - units["loss"].item()
        self.assertGreater(rise, 0.01)
        _, gain, _ = headroom_of(model, f, data, 1)
        self.assertAlmostEqual(gain, rise, delta=1e-7)
        measured = measured_level(model, f, data, len(units["kl"]), 1)
        self.assertAlmostEqual(measured.headroom, rise, delta=1e-7)
        self.assertAlmostEqual(measured.headroom_any, rise, delta=1e-7)

    def test_vae(self):
        for f, data, some_collapse in self.vae_cases():
            model, units = optimal_vae(f, data)
            self.check_optimum(model, units, f, data, units["theta"]**2, some_collapse)
            with torch.no_grad():
                model.W.weight[0] = 0
                model.U.weight[:, 0] = 0
                model.log_scale[0] = math.log(f.eta_dec / f.c / float(f.sigma))
            self.check_loss_of_a_unit(model, units, f, data)

    def test_cvae(self):
        for f, data, some_collapse in self.cvae_cases():
            model, units = optimal_cvae(f, data)
            self.check_optimum(model, units, f, data, units["theta"], some_collapse)
            with torch.no_grad():
                model.W1.weight[0] = 0
                model.W2.weight[0] = 0
                model.U1.weight[:, 0] = 0
                model.log_sigma[0] = 0
            self.check_loss_of_a_unit(model, units, f, data)

    def test_level_2(self):
        """Level 2 of an HVAE describes draws of z1. The draws make the headroom inexact."""
        [x] = self.images.train
        data = dataclasses.replace(self.images, train=(x.repeat(300, 1),))
        f = MNIST_HVAE_Linear_learnable_sigma_2.Flags(
            device="cpu",
            d_1=6,
            d_2=6,
            beta_1=0.7,
            beta_2=2.5,
            eta_dec=0.8,
            eta_enc=1.3,
            sigma_1=0.6,
        )

        # 1. At the optimum there is none.
        model, units = optimal_hvae(f, data)
        self.assertAlmostEqual(exact_loss(model, f, data), units["loss"].item(), delta=1e-7)
        collapsed = (units["kl_2"] == 0).sum().item()
        self.assertIn(collapsed, range(1, 6))
        tau, gain, level = headroom_of(model, f, data, collapsed, "_2")
        self.assertAlmostEqual(level, 2.5 / 0.7 * 0.64)
        self.assertLess(gain, 1e-4)
        self.assertLess(tau[0].item(), 1.05 * level)

        # 2. Without one of the active units it is what this unit gained.
        with torch.no_grad():
            model.unscaled_W2.weight[0] = 0
            model.unscaled_U2.weight[:, 0] = 0
            model.log_sigma_2[0] = 0
        rise = exact_loss(model, f, data) - units["loss"].item()
        _, gain, _ = headroom_of(model, f, data, 1, "_2")
        self.assertGreater(rise, 0.1)
        self.assertAlmostEqual(gain, rise, delta=0.03 * rise)


# ------------------------------------------------------------------------------ nonlinear models

def with_idle_units(terms, level, kl, nats):
    """A model's terms, once idle units are added to one level.

    kl (k,) are the KLs of the units. nats is what they add to -log p(t|z), per example.
    """
    terms = dict(terms)
    n = len(terms[f"kl{level}"])
    terms[f"kl{level}"] = torch.cat([terms[f"kl{level}"], kl.expand(n, len(kl))], dim=1)
    if level:
        # The target is z1, whose log density is a part of the term of level 1.
        terms["kl_1"] = torch.cat([terms["kl_1"], nats.expand(n, 1)], dim=1)
    else:
        terms["log_px_z"] = terms["log_px_z"] - nats
    return terms


class NonlinearModels(unittest.TestCase):
    def cases(self, **other_flags):
        """(script, f, model, data) for each nonlinear Gaussian script whose models have a headroom.

        The models have their initial weights, in float64. There are 300 rows.
        """
        digits = small.digit_data(300, 20)
        for script, (name, flags) in SCRIPTS.items():
            Model = getattr(script, name)
            # Only a Gaussian decoder has eta_dec.
            if not hasattr(Model, "residuals") or "eta_dec" not in flags:
                continue
            known = {field.name for field in dataclasses.fields(script.Flags)}
            flags = dict(flags)
            for flag, value in other_flags.items():
                if flag in known:
                    flags[flag] = value
            f = script.Flags(device="cpu", **flags)
            yield script, f, *self.model_and_data(script, Model, f, digits)

    def model_and_data(self, script, Model, f, digits):
        """The model of a script and its data."""
        if script is Synthetic_CVAE_Relu_correlation:
            [data] = script.correlated([dataclasses.replace(f, num_samples=300)])
            train = tuple(t.double() for t in data.train)
            test = tuple(t.double() for t in data.test)
            data = dataclasses.replace(data, train=train, test=test)
        elif Model.__name__ == "CVAE":
            data = small.as_quarters(digits)
        else:
            data = digits
        return training.build(Model, f, data).eval(), data

    def test_units_lower_the_models_own_loss_by_as_much(self):
        """A model's own loss falls by G_k when the idle units enter its terms.

        This holds for both objectives and for other betas.
        """
        checked = 0
        for released in (False, True):
            for script, f, model, data in self.cases(released_objective=released):
                for level in headroom.residual_moments(model, f, data):
                    with self.subTest(script=script.__name__, released=released):
                        self.check_units(f, model, data, level)
                    checked += 1
        self.assertEqual(checked, 2 * 6)

    def check_units(self, f, model, data, level):
        part, (beta, weight, std) = moments_and_objective(model, f, data, level)
        cross = part.cross
        moment = part.moment
        k = 2
        tau = theory.spectrum(headroom.linear_part(cross, moment))
        self.assertGreater(tau[0], 0)

        # 1. Lower beta, so that two units gain. The weights of the model stay.
        factor = min(1, 0.5 * (tau[1] / headroom.gain_threshold(beta, weight, std)).item())
        name = "beta_2" if level else "beta"
        f = dataclasses.replace(f, **{name: factor * getattr(f, name)})
        objective = {"beta": factor * beta, "weight": weight, "std": std}
        gain = headroom.gain_of_units(tau, k, **objective)
        self.assertGreater(gain, 1e-6)

        # 2. Compute what the units change in the terms of an average example.
        encoder, sigma, decoder = headroom.best_units(cross, moment, k, **objective)
        mean = decoder @ encoder
        error = (
            -2 * (mean * cross).sum()
            + (mean @ moment * mean).sum()
            + (decoder**2 @ sigma**2).sum()
        )
        kl = ((encoder @ moment * encoder).sum(1) + sigma**2 - 1) / 2 - sigma.log()
        nats = error / (2 * std**2)

        # 3. Compare the losses of the model.
        f = common.on_device(f, data.train[0])
        torch.manual_seed(0)
        with torch.no_grad():
            terms = model.train()(*data.train, f)
        more_terms = with_idle_units(terms, level, kl, nats)
        fall = (model.loss(terms, f) - model.loss(more_terms, f)).mean().item()
        self.assertAlmostEqual(fall, gain, delta=1e-9 * max(1, abs(fall)))

    def test_moments_are_those_of_the_residual(self):
        """C and A agree with r and u themselves, for many draws of z.

        The program puts C together from the last layers of the model, chunk by chunk.
        """
        for script, f, model, data in self.cases():
            # The dropout of MNIST_CVAE_Relu would draw a different r.
            if "CNN" in script.__name__ or script is MNIST_CVAE_Relu:
                continue
            with self.subTest(script=script.__name__), torch.no_grad():
                self.check_moments(f, model, data)

    def check_moments(self, f, model, data):
        torch.manual_seed(0)
        with mock.patch("headroom.DRAWS", 250):
            [(level, moments)] = headroom.residual_moments(model, f, data).items()
        self.assertEqual(level, "_2" if hasattr(f, "beta_2") else "")
        [moments] = moments.parts

        z = model.q_z(*data.train, common.on_device(f, data.train[0])).sample((500,))
        if hasattr(model, "g_z"):
            residual = data.train[1] - (model.g_x(data.train[0]) + model.g_z(z))
        else:
            residual = data.train[0] - model.g(z)
        u = torch.cat([*data.train, torch.ones(300, 1, dtype=torch.float64)], dim=1)
        self.assertLess((moments.moment - u.T @ u / 300).abs().max(), 1e-12)

        # 40 of the columns are enough.
        cross_by_draw = torch.einsum("snd,np->sdp", residual[..., :40], u[:, :40]) / 300
        # Both means are over 500 draws.
        error = 2**0.5 * cross_by_draw.std(0) / 500**0.5
        difference = (moments.cross[:40, :40] - cross_by_draw.mean(0)).abs()
        self.assertLess((difference / (error + 1e-12)).max().item(), 6)

    def models_of_each_kind(self):
        """(setting, model, data) for a VAE, a CVAE and a two-level HVAE with random weights."""
        for script, f, model, data in self.cases():
            if script in (MNIST_VAE_Relu_learnable_sigma, Synthetic_CVAE_Relu_correlation):
                yield f, model, data
        f = MNIST_HVAE_Relu.Flags(device="cpu", d_hidden=9, d_1=6, d_2=3, sigma_1=1.6, eta_enc=2.0)
        data = small.digit_data(300, 20)
        yield f, training.build(MNIST_HVAE_Relu.HVAE, f, data).eval(), data

    def residual_of_draws(self, model, inputs, f, draws):
        """The target minus the mean of p(t|z) for each draw of z, (draws, n, D).

        inputs is the encoder's input, whose last tensor is the target.
        """
        if hasattr(model, "q_z2"):
            z2 = model.q_z2(*inputs, f).sample((draws,))
            return inputs[0] - model.p_z1(z2, f).mean
        z = model.q_z(*inputs, f).sample((draws,))
        if hasattr(model, "g_x"):
            return inputs[1] - model.g_x(inputs[0]) - model.g_z(z)
        return inputs[0] - model.g(z)

    def test_second_moment_of_the_residual_has_no_noise_of_draws(self):
        """F agrees with many draws of z. One estimate times itself would be larger.

        The encoder's input is the same for all estimates, also at level 2, where it is drawn.
        """
        for f, model, data in self.models_of_each_kind():
            with self.subTest(model=type(model).__module__), torch.no_grad():
                f = common.on_device(f, data.train[0])
                torch.manual_seed(0)
                [first] = model.residuals(*data.train, f, headroom.DRAWS).values()
                inputs = first.encoder_input
                if hasattr(model, "q_z1"):
                    model.q_z1 = mock.Mock()
                    model.q_z1.return_value.sample.return_value = inputs[0]

                estimates = [first]
                for _ in range(39):
                    [residual] = model.residuals(*data.train, f, headroom.DRAWS).values()
                    estimates.append(residual)
                # 40 of the columns are enough, and all of 1000 draws would need much memory.
                blocks = []
                for _ in range(10):
                    blocks.append(self.residual_of_draws(model, inputs, f, draws=100)[..., :40])
                self.check_second_moment(estimates, torch.cat(blocks))

    def test_second_moment_is_put_together_from_all_rows(self):
        """`residual_moments` has the F of one residual over all rows, for the same draws."""
        for f, model, data in self.models_of_each_kind():
            with self.subTest(model=type(model).__module__):
                torch.manual_seed(0)
                [moments] = headroom.residual_moments(model, f, data).values()
                [part] = moments.parts
                torch.manual_seed(0)
                with torch.no_grad():
                    f = common.on_device(f, data.train[0])
                    [residual] = model.residuals(*data.train, f, headroom.DRAWS).values()
                F = self.second_moment(residual)
                self.assertLess((part.squares[:40, :40] - F).abs().max(), 1e-12)
                self.assertLess((part.squares - part.squares.T).abs().max(), 1e-12)

    def test_a_target_with_several_dimensions(self):
        """A target (n, 1, D) has the moments of a target (n, D)."""
        for f, model, data in self.models_of_each_kind():
            with torch.no_grad():
                f = common.on_device(f, data.train[0])
                [residual] = model.residuals(*data.train, f, headroom.DRAWS).values()
            inputs = [t.unflatten(1, (1, -1)) for t in residual.encoder_input]
            images = dataclasses.replace(residual, encoder_input=tuple(inputs))
            with self.subTest(model=type(model).__module__):
                self.assertTrue(
                    torch.equal(self.second_moment(images), self.second_moment(residual)))

    def check_second_moment(self, estimates, residual):
        """Compare F from estimates of the residual with that of the residual of all draws."""
        draws, n, _ = residual.shape
        mean = residual.mean(0)
        among_same = torch.einsum("snd,sne->de", residual, residual) / draws
        # Only pairs of different draws count.
        wanted = (draws * mean.T @ mean - among_same) / (draws - 1) / n

        ours = []
        naive = []
        for estimate in estimates:
            ours.append(self.second_moment(estimate))
            naive.append(self.second_moment(self.with_equal_halves(estimate)))
        ours = torch.stack(ours)
        naive = torch.stack(naive)

        # 1. F agrees in each entry and in its trace.
        error = ours.std(0) / len(ours)**0.5
        self.assertLess(((ours.mean(0) - wanted) / error).abs().max(), 6)
        difference, error = self.mean_trace(ours - wanted)
        self.assertLess(abs(difference), 5 * error)

        # 2. An estimate is a mean over DRAWS draws. Its noise is in the product with itself.
        excess, error = self.mean_trace(naive - wanted)
        self.assertGreater(excess, 10 * error)
        noise = residual.var(0).sum(-1).mean().item() / headroom.DRAWS
        self.assertAlmostEqual(excess, noise, delta=5 * error)

    def mean_trace(self, matrices):
        """The mean trace of matrices (s, D, D), and its standard error."""
        traces = torch.einsum("sdd->s", matrices)
        return traces.mean().item(), (traces.std() / len(traces)**0.5).item()

    def second_moment(self, residual):
        """F of the first 40 columns, from one residual over all rows."""
        columns = [t.flatten(1) for t in residual.encoder_input]
        u = torch.cat([*columns, torch.ones_like(columns[0][:, :1])], dim=1)
        means = {name: total / len(u) for name, total in residual.products(u).items()}
        _, F, _ = residual.moments(means, u.T @ u / len(u))
        return F[:40, :40]

    def with_equal_halves(self, residual):
        """The residual whose second estimate is the first one."""
        parts = []
        for layer, hidden in residual.mean_parts:
            parts.append((layer, hidden[0] if hidden.ndim == 3 else hidden))
        return dataclasses.replace(residual, mean_parts=parts)

    def test_any_encoder_has_at_least_the_headroom_of_a_linear_one(self):
        """If z has nearly no noise, r is known, and F is at least T up to rounding."""
        larger = 0
        for script, f, model, data in self.cases(beta=0.02, beta_2=0.02, dropout=0.0):
            if hasattr(f, "beta_2"):
                units = f.d_2
                encode = model.q_z2
                model.q_z2 = lambda z1, f, encode=encode: Normal(encode(z1, f).mean, 1e-9)
            else:
                units = getattr(f, "dim_z", None) or f.d_1
                encode = model.q_z
                model.q_z = lambda *batch, encode=encode: Normal(encode(*batch).mean, 1e-9)
            with torch.no_grad():
                # Larger weights make the mean of p(t|z) less linear in u.
                for parameter in model.parameters():
                    parameter.mul_(4)
            measured = measured_level(model, f, data, units, units)
            with self.subTest(script=script.__name__):
                self.assertGreater(measured.headroom, 0.01)
                self.assertGreaterEqual(measured.headroom_any, measured.headroom * (1 - 1e-6))
                for tau, tau_any in zip(measured.tau, measured.tau_any, strict=True):
                    self.assertGreaterEqual(tau_any, tau * (1 - 1e-6))
            if measured.headroom_any > 1.01 * measured.headroom:
                larger += 1
        # Elsewhere u has more columns than there are rows, so that T is F.
        self.assertEqual(larger, 2)

    def test_few_draws_are_enough(self):
        """Two times four draws per example and two times 500 give nearly the same tau.

        The difference is a small part of the level, and falls with the number of rows. For 60,000
        rows it is within 2 %.
        """
        f = MNIST_HVAE_Relu.Flags(device="cpu", d_hidden=30)
        data = small.digit_data(2000, 20)
        model = training.build(MNIST_HVAE_Relu.HVAE, f, data).eval()
        self.assertEqual(headroom.DRAWS, 4)
        tau = []
        for draws in (4, 500):
            torch.manual_seed(0)
            with mock.patch("headroom.DRAWS", draws):
                tau.append(headroom_of(model, f, data, 16, "_2")[0])
        self.assertLess((tau[0] - tau[1]).abs().max(), 0.02 * (60_000 / 2000)**0.5 * 0.25)

    def test_in_single_precision(self):
        f = MNIST_VAE_Relu_learnable_sigma.Flags(device="cpu", d_hidden=30, eta_dec=0.3)
        tau = {}
        tau_any = {}
        for dtype in (torch.float32, torch.float64):
            data = small.digit_data(2000, 20, dtype)
            model = training.build(MNIST_VAE_Relu_learnable_sigma.VAE, f, data).eval()

            def almost_without_noise(x, f, model=model):
                return Normal(model.f(x), 1e-9)

            model.q_z = almost_without_noise
            tau[dtype] = headroom_of(model, f, data, 16)[0]
            tau_any[dtype] = theory.spectrum(moments_and_objective(model, f, data)[0].squares)
        for spectra in (tau, tau_any):
            difference = (spectra[torch.float32] - spectra[torch.float64]).abs().max()
            self.assertLess(difference, 1e-4 * spectra[torch.float64][0])


class DeadUnits(unittest.TestCase):
    def test_counted(self):
        data = small.digit_data(20, 30)
        f = MNIST_HVAE_Relu.Flags(device="cpu", d_hidden=12)
        model = training.build(MNIST_HVAE_Relu.HVAE, f, data).eval()
        with torch.no_grad():
            for layers in (model.x_to_z1, model.z1_to_z2, model.z2_to_z1, model.z1_to_x):
                layers[0].weight.mul_(0.01)
                layers[0].bias.fill_(1.0)
            model.z2_to_z1[0].bias[[1, 5, 6]] = -1.0
        wanted = {
            "x_to_z1": [0, 12],
            "z1_to_z2": [0, 12],
            "z2_to_z1": [3, 12],
            "z1_to_x": [0, 12],
        }
        self.assertEqual(headroom.dead_units(model, f, data), wanted)
        # The hooks are gone.
        self.assertEqual(model.z2_to_z1[1]._forward_hooks, {})

    def test_one_example_keeps_a_unit_alive(self):
        """A unit that fires for one test example is alive, in whichever batch the example is."""
        data = small.digit_data(2, 1200)
        f = MNIST_VAE_Relu_learnable_sigma.Flags(device="cpu", d_hidden=5, d_1=2)
        model = training.build(MNIST_VAE_Relu_learnable_sigma.VAE, f, data).eval()
        [x] = data.test
        x[:, 0] = torch.arange(1200) == 1150
        x[:, 1] = torch.arange(1200) == 50
        with torch.no_grad():
            model.f[0].weight[:] = 0
            model.f[0].weight[0, 0] = 2
            model.f[0].weight[1, 1] = 2
            model.f[0].bias[:] = -1.0
            model.f[2].bias[:] = 5.0
            model.g[0].weight[:] = 0
            model.g[0].bias[:] = 1.0
        self.assertEqual(headroom.dead_units(model, f, data), {"f": [3, 7], "g": [0, 5]})

    def test_channels_of_convolutions(self):
        """All channels fire, except two of one layer and one of another."""
        data = small.digit_data(20, 30)
        f = MNIST_HVAE_CNN.Flags(device="cpu", d_hidden=12)
        model = training.build(MNIST_HVAE_CNN.HVAE, f, data).eval()
        with torch.no_grad():
            for layer in (model.x_to_z1[0], model.x_to_z1[2]):
                layer.weight.mul_(0.01)
                layer.bias.fill_(1.0)
            model.x_to_z1[0].bias[[3, 9]] = -1.0
            model.x_to_z1[2].bias[5] = -1.0
        counts = headroom.dead_units(model, f, data)
        totals = {network: total for network, (_, total) in counts.items()}
        wanted_totals = {
            "x_to_z1": 64 + 32,
            "z1_to_z2": 12,
            "z2_to_z1": 12,
            "z1_to_x": 32 * 7 * 7 + 64,
        }
        self.assertEqual(totals, wanted_totals)
        self.assertEqual(counts["x_to_z1"], [3, 96])


# -------------------------------------------------------------------------------------- in words

def result_with(nats=0.5, nats_any=0.0, **changed):
    """A report.RunResult whose level z2 has a headroom. All else that matters may be changed.

    nats is the headroom with a linear encoder. With any encoder it is nats_any, if that is more.
    """
    level = headroom.LevelHeadroom(
        units=16,
        collapsed=9,
        headroom=nats,
        headroom_any=max(nats, nats_any),
        level=0.25,
        tau=[1.0],
        tau_any=[1.0],
        theta=[],
    )
    result = report.RunResult(
        script="MNIST_CVAE_Relu",
        settings={},
        dataset="digits",
        device="cpu",
        versions={},
        seconds={},
        diverged=None,
        side_by_side=1,
        curves={},
        metrics={},
        headroom={"z2": level},
        dead_units={"f_x": [0, 16], "f_y": [13, 16], "g_z": [16, 16]},
        loss_change=-0.2,
    )
    return dataclasses.replace(result, **changed)


class Verdicts(unittest.TestCase):
    def test_causes(self):
        """A headroom of more than 0.01 nats counts. That of a linear encoder comes first."""
        self.assertEqual(headroom.cause_of_collapse(0.0101, 0.0101), "training")
        self.assertEqual(headroom.cause_of_collapse(0.5, 0.7, unstable="linear"), "training")
        self.assertEqual(headroom.cause_of_collapse(0.01, 0.0101), "encoder")
        self.assertEqual(headroom.cause_of_collapse(0, 0.3, unstable="linear"), "encoder")
        self.assertEqual(headroom.cause_of_collapse(0.01, 0.01, unstable="linear"), "unstable")
        self.assertEqual(headroom.cause_of_collapse(0.01, 0.01, unstable="any"), "encoder")
        self.assertEqual(headroom.cause_of_collapse(0.01, 0.01), "objective")

    def test_instability(self):
        """rho_1 of T and of F are compared with the threshold, at which collapse is stable."""
        self.assertEqual(headroom.instability(1.01, 1.2, threshold=1), "linear")
        self.assertEqual(headroom.instability(1.0, 1.01, threshold=1), "any")
        self.assertEqual(headroom.instability(1.0, 1.0, threshold=1), "")

    def test_words_for_another_decoder(self):
        """The gain is a lower bound there, and only small steps are judged."""
        words = headroom.verdict(4, 3, 0.0, 0.0432, likelihood="bernoulli")
        self.assertIn("reviving them would lower the loss by at least 0.043 nats", words)
        words = headroom.verdict(4, 3, 0.0, 0.0, unstable="any", likelihood="bernoulli")
        self.assertIn("with a linear encoder, no small step", words)
        self.assertIn("with a richer encoder one would", words)
        words = headroom.verdict(4, 3, 0.0, 0.0, likelihood="bernoulli")
        self.assertIn("because of the objective: no small step", words)

    def test_words(self):
        self.assertEqual(headroom.verdict(16, 0, 0, 0), "no unit collapsed")
        self.assertEqual(headroom.verdict(16, 0, 0.5, 0.5, unstable="linear"), "no unit collapsed")
        self.assertEqual(
            headroom.verdict(16, 9, 0.0099, 0.0099),
            "9 of 16 units collapsed because of the objective")
        self.assertEqual(
            headroom.verdict(16, 16, 0.0621, 0.9),
            "16 of 16 units collapsed because of training: reviving them would lower the loss by "
            "at least 0.062 nats")

    def test_words_for_one_unit_and_for_an_unknown_number(self):
        self.assertEqual(
            headroom.verdict(16, 1, 0.5, 0.5),
            "1 of 16 units collapsed because of training: reviving it would lower the loss by at "
            "least 0.5 nats")
        self.assertEqual(
            headroom.verdict(1, 1, 0, 0), "1 of 1 unit collapsed because of the objective")
        self.assertEqual(
            headroom.verdict(None, 1, 0, 0), "1 unit collapsed because of the objective")
        self.assertEqual(headroom.collapse_in_words(None, 3), "3 units collapsed")

    def test_words_for_a_richer_encoder(self):
        """The words say that a linear encoder is not enough, and name the number of nats."""
        for collapsed, counted, pronoun in ((1, "1 of 4 units", "it"), (3, "3 of 4 units", "them")):
            words = headroom.verdict(4, collapsed, 0.004, 0.0432)
            self.assertTrue(words.startswith(f"{counted} collapsed: "), words)
            self.assertIn(f"with a linear encoder, reviving {pronoun} would not", words)
            self.assertIn("with a richer encoder it would", words)
            self.assertTrue(words.endswith(" 0.043 nats"), words)

    def test_words_for_an_unstable_collapse(self):
        """No number of nats is known, and neither training nor the objective is blamed."""
        for collapsed, counted in ((1, "1 of 4 units"), (3, "3 of 4 units")):
            words = headroom.verdict(
                4, collapsed, 0.004, 0.01, unstable="linear", likelihood="bernoulli"
            )
            self.assertTrue(words.startswith(f"{counted} collapsed, but this is unstable"), words)
            for absent in ("nats", "because", "training", "objective"):
                self.assertNotIn(absent, words)

    def test_instability_of_a_level(self):
        """A level is unstable if rho_1 of F exceeds the level and the decoder is not Gaussian."""
        [level] = result_with(nats=0.0).headroom.values()
        natural = dataclasses.replace(level, likelihood="bernoulli", tau=[0.2], tau_any=[0.3])
        self.assertEqual(natural.instability(), "any")
        self.assertEqual(natural.cause(), "encoder")
        natural = dataclasses.replace(natural, tau=[0.3])
        self.assertEqual(natural.instability(), "linear")
        self.assertEqual(natural.cause(), "unstable")
        self.assertIn("unstable", natural.verdict())
        self.assertEqual(dataclasses.replace(natural, collapsed=0).cause(), "none")
        stable = "9 of 16 units collapsed because of the objective"
        for changed in (
            {"likelihood": "gaussian"},
            {"level": 0.3},
            {"level": None},
            {"tau_any": []},
        ):
            with self.subTest(**changed):
                verdict = dataclasses.replace(natural, **changed).verdict()
                self.assertTrue(verdict.startswith(stable), verdict)
                is_local = "no small step" in verdict
                self.assertEqual(is_local, "likelihood" not in changed)

    def test_words_of_a_level(self):
        [level] = result_with().headroom.values()
        self.assertEqual(level.verdict(), headroom.verdict(16, 9, 0.5, 0.5))
        [level] = result_with(nats=0.0, nats_any=0.2).headroom.values()
        self.assertEqual(level.verdict(), headroom.verdict(16, 9, 0.0, 0.2))

    def test_what_points_to_the_cause(self):
        cause = (
            "z2: 9 of 16 units collapsed because of training: reviving them would lower the loss "
            "by at least 0.5 nats"
        )
        [sentence] = report.verdicts(result_with())
        self.assertEqual(
            sentence,
            f"{cause}; 13 of 16 hidden units of f_y and 16 of 16 of g_z never fire; the loss "
            "still fell by 0.2 nats in the last tenth of the epochs")

        sentences = list(report.verdicts(result_with(nats=0.0)))
        self.assertEqual(sentences, ["z2: 9 of 16 units collapsed because of the objective"])

        [sentence] = report.verdicts(result_with(dead_units={"g_z": [0, 16]}, loss_change=None))
        self.assertEqual(sentence, cause)

    def test_dead_units(self):
        networks = {"f_x": [0, 16], "f_y": [13, 16], "g_x": [1, 16], "g_z": [16, 16]}
        self.assertEqual(
            report.dead_units_in_words(networks),
            "13 of 16 hidden units of f_y, 1 of 16 of g_x and 16 of 16 of g_z")
        self.assertEqual(
            report.dead_units_in_words({"f_y": [13, 16]}), "13 of 16 hidden units of f_y")
        self.assertEqual(report.dead_units_in_words({"f_y": [0, 16]}), "")

    def test_last_tenth(self):
        self.assertIsNone(headroom.last_change([3.0]))
        self.assertEqual(headroom.last_change([3.0, 2.0]), -1.0)
        self.assertEqual(headroom.last_change([100.0 - i for i in range(50)]), -5.0)


class Reports(small.WithMnist):
    """What a script writes and prints of the headroom."""

    def run_script(self, script, *argv):
        """Run a script on the drawn digits. Returns its stdout."""
        status, out, err = small.call(
            script.main,
            *argv,
            "--data_dir", self.folder / "data",
            "--out_dir", self.folder / "runs",
            "--device", "cpu",
            "--num_samples", 2,
        )
        self.assertEqual(status, 0, err)
        return out

    def test_a_level_collapsed_by_the_objective(self):
        """With a beta far above every threshold, all units collapse and the headroom is 0."""
        out = self.run_script(
            MNIST_CVAE_Relu,
            "--num_epochs", 20,
            "--batch_size", 16,
            "--lr", 0.01,
            "--beta", "1e-6,1000",
            "--start_std", 1,
        )
        folder = self.folder / "runs" / "MNIST_CVAE_Relu"
        flags = "beta=1000.0,start_std=1.0,batch_size=16,num_epochs=20,lr=0.01,num_samples=2"
        result = json.loads((folder / flags / "result.json").read_text(encoding="utf-8"))

        self.assertIn("headroom", out.splitlines()[2].split())
        verdict = "z: 16 of 16 units collapsed because of the objective"
        self.assertIn(f"\nbeta=1000.0: {verdict}\n", out)
        self.assertEqual(result["metrics"]["headroom"], 0)
        z = result["headroom"]["z"]
        self.assertEqual((z["units"], z["collapsed"]), (16, 16))
        self.assertEqual((len(z["tau"]), len(z["tau_any"]), z["theta"]), (16, 16, []))
        self.assertEqual((z["headroom_any"], z["likelihood"]), (0, "gaussian"))
        self.assertEqual(z["level"], 1000 * 0.25)
        self.assertEqual(set(result["dead_units"]), {"f_x", "f_y", "g_x", "g_z"})
        losses = result["curves"]["loss"]
        self.assertAlmostEqual(result["loss_change"], losses[-1] - losses[-3])
        run_folders = list(folder.glob("beta*"))
        self.assertEqual(len(run_folders), 2)
        for run_folder in run_folders:
            self.assertGreater((run_folder / "headroom.png").stat().st_size, 5000)

    def test_theta_of_a_linear_model(self):
        """theta is the variance that a linear unit of the same KL describes: level exp(2 KL)."""
        out = self.run_script(
            MNIST_VAE_Linear_learnable_sigma, "--num_epochs", 2, "--d_1", 3, "--beta", 2)
        script_folder = self.folder / "runs" / "MNIST_VAE_Linear_learnable_sigma"
        [path] = script_folder.glob("*/result.json")
        result = json.loads(path.read_text(encoding="utf-8"))
        with np.load(path.parent / "units.npz") as arrays:
            kls = sorted(arrays["unit_kl"].mean(0), reverse=True)

        wanted = [2 * math.exp(2 * kl) for kl in kls if kl > 0.01]
        self.assertGreater(len(wanted), 0)
        for theta, wanted_theta in zip(result["headroom"]["z"]["theta"], wanted, strict=True):
            self.assertAlmostEqual(theta, wanted_theta, places=4)
        self.assertIn("\nz: ", out)

    def test_none_without_a_learnable_posterior(self):
        out = self.run_script(MNIST_VAE_Relu_nonlearnable_sigma, "--num_epochs", 1)
        self.assertNotIn("headroom", out)
        self.assertNotIn("collapsed", out)


if __name__ == "__main__":
    unittest.main()
