"""Headroom against brute force, against models at their known optimum, and against what its units do to a model's own loss; the
verdicts; dead units."""
import dataclasses
import json
import math
import unittest
from unittest import mock

import torch

import common
import report
import theory
import training
import MNIST_CVAE_Linear
import MNIST_CVAE_Relu
import MNIST_HVAE_CNN
import MNIST_HVAE_Linear_learnable_sigma_2
import MNIST_HVAE_Relu
import MNIST_VAE_Linear_learnable_sigma
import MNIST_VAE_Relu_learnable_sigma
import Synthetic_CVAE_Relu_correlation
from tests import small
from tests.test_nonlinear import SCRIPTS


def rows(seed, n=40, p=5, D=4):
    """(r (n, D), u (n, p), a 1 at its end): r partly linear in u."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)
    u = torch.cat([draw(n, p - 1) @ draw(p - 1, p - 1) + 0.5, torch.ones(n, 1, dtype=torch.float64)], dim=1)
    return 0.6 * u @ draw(p, D) + 0.7 * draw(n, D), u


def moments_of(r, u):
    return r.T @ u / len(u), u.T @ u / len(u)


def cost(p, r, u, beta, weight, std):
    """The part of a negative beta-ELBO that k linear units, the prior's std 1, have a say in, from the rows themselves."""
    mean, sigma = u @ p["encoder"].T, p["log_sigma"].exp()
    error = ((r - mean @ p["decoder"].T)**2).sum(1).mean() + (p["decoder"]**2 @ sigma**2).sum()
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, sigma), torch.distributions.Normal(0.0, 1.0))
    return weight * error / (2 * std**2) + beta * kl.sum(1).mean()


class BruteForce(unittest.TestCase):
    def test_is_what_more_units_gain(self):
        """Minimised over encoder, std and decoder of k units by brute force; and by the units that are said to gain it."""
        paid = 0
        for seed, (k, beta, weight, std) in enumerate(
                [(1, 1, 1, 1.0), (1, 4, 2, 0.7), (2, 1, 1, 1.0), (2, 6, 1, 0.5), (3, 0.3, 0.5, 0.8), (3, 2, 1, 1.5), (3, 50, 1, 1.0)]):
            r, u = rows(seed)
            cross, moment = moments_of(r, u)
            weights, random = (beta, weight, std), torch.Generator().manual_seed(9)

            def draw(*shape):
                return 0.5 * torch.randn(shape, generator=random, dtype=torch.float64)
            starts = [{"encoder": draw(k, 5), "decoder": draw(4, k), "log_sigma": draw(k)} for _ in range(4)]
            least = theory.minimise(lambda p: cost(p, r, u, *weights), starts)[0][1]
            without = (weight * (r**2).sum(1).mean() / (2 * std**2)).item()
            tau = theory.spectrum(theory.linear_part(cross, moment))
            said = theory.headroom(tau, k, *weights)
            self.assertAlmostEqual(said, without - least, delta=1e-9 * without, msg=(k, weights))
            encoder, sigma, decoder = units = theory.idle_units(cross, moment, k, *weights)
            self.assertAlmostEqual(theory.gain(units, cross, moment, *weights), said, places=10)
            fresh, fresh_u = rows(seed + 100)             # the same units on other rows
            p = {"encoder": encoder, "log_sigma": sigma.log(), "decoder": decoder}
            gained = (weight * (fresh**2).sum(1).mean() / (2 * std**2)).item() - cost(p, fresh, fresh_u, *weights).item()
            self.assertAlmostEqual(theory.gain(units, *moments_of(fresh, fresh_u), *weights), gained, places=10)
            paid += said > 0.01
        self.assertEqual(paid, 6)                         # all but the one with a beta of 50

    def test_columns_that_say_nothing_new(self):
        """A constant and a repeated column of u change nothing: the pseudo-inverse leaves them out."""
        r, u = rows(0)
        tau = theory.spectrum(theory.linear_part(*moments_of(r, u)))
        more = torch.cat([u, u[:, :1], torch.zeros_like(u[:, :1]), 3 * u[:, -1:]], dim=1)
        self.assertLess((theory.spectrum(theory.linear_part(*moments_of(r, more))) - tau).abs().max(), 1e-9 * tau[0])

    def test_weights_of_zero(self):
        """Where the KL costs nothing whatever is linear pays in full; where the target counts nothing, nothing does."""
        tau = torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)
        self.assertAlmostEqual(theory.headroom(tau, 3, 0, 1, 0.5), 5 / (2 * 0.25))
        self.assertEqual(theory.headroom(tau, 3, 1, 0, 0.5), 0)
        self.assertEqual(theory.headroom(tau, 3, 0, 0, 0.5), 0)
        self.assertEqual(theory.headroom(tau, 0, 1, 1, 0.5), 0)
        self.assertEqual(theory.level_of(2, 0, 1), math.inf)


def optimal_vae(f, data):
    model = training.build(MNIST_VAE_Linear_learnable_sigma.VAE, f, data).eval()
    units, (_, P) = model.predicted(f, data), theory.modes(data.moment)
    with torch.no_grad():
        model.W.weight.copy_((units["lambda"] / units["theta"])[:, None] * P[:, :f.d_1].T)
        model.U.weight.copy_(P[:, :f.d_1] * units["omega"])
        model.log_scale.copy_((units["sigma"] / float(f.sigma)).log())
    return model, units


def optimal_cvae(f, data):
    model = training.build(MNIST_CVAE_Linear.CVAE, f, data).eval()
    units = model.predicted(f, data)
    variance, P = theory.modes(theory.residual(data.moment, 196))
    of_x = data.moment[196:, :196] @ torch.linalg.pinv(data.moment[:196, :196], hermitian=True)      # y's mean, from x
    W2 = (units["lambda"] / units["theta"].sqrt())[:, None] * P[:, :f.dim_z].T
    with torch.no_grad():
        model.W2.weight.copy_(W2)
        model.W1.weight.copy_(-W2 @ of_x)
        model.U1.weight.copy_(P[:, :f.dim_z] * units["omega"])
        model.U2.weight.copy_(of_x)
        model.log_sigma.copy_((units["sigma"] / f.eta_enc).log())
    return model, units


def optimal_hvae(f, data):
    model = training.build(MNIST_HVAE_Linear_learnable_sigma_2.HVAE, f, data).eval()
    units, (_, P) = model.predicted(f, data), theory.modes(data.moment)
    m = units["lambda_1"]**2 + f.sigma_1**2
    with torch.no_grad():
        model.W1.weight.copy_((units["lambda_1"] / units["theta"])[:, None] * P[:, :f.d_1].T)
        model.U1.weight.copy_(P[:, :f.d_1] * units["theta"] * units["lambda_1"] / m)
        model.W2.weight.copy_(torch.diag(units["lambda_2"] / m.sqrt()))
        model.U2.weight.copy_(torch.diag(units["omega_2"]))
        model.log_sigma_2.copy_((units["sigma_2"] / f.eta_enc).log())
    return model, units


def exact_loss(model, f, data):
    return report.in_double(model, f, data.train, lambda double, batch, f: double.loss(double.train()(*batch, f), f)).mean().item()


def headroom_of(model, f, data, collapsed, level=""):
    """(tau, G) of a level."""
    cross, moment, *weights = report.unexplained(model, f, data)[level]
    tau = theory.spectrum(theory.linear_part(cross, moment))
    return tau, theory.headroom(tau, collapsed, *weights), theory.level_of(*weights)


class LinearModels(unittest.TestCase):
    """At their optimum, put there by the closed forms; the noise of z integrated out."""

    def setUp(self):
        torch.manual_seed(0)
        self.images = small.digit_data(60, 6)

    def test_nothing_is_left_at_the_optimum(self):
        """And with an active unit's weights set to zero, exactly what that unit is worth."""
        cases = [(optimal_vae, self.images, MNIST_VAE_Linear_learnable_sigma.Flags(
                      device="cpu", d_1=8, beta=beta, eta_dec=0.9, c=1.3)) for beta in (0.5, 2.5)]
        cases += [(optimal_cvae, small.as_quarters(small.digit_data(400, 6)), MNIST_CVAE_Linear.Flags(
                       device="cpu", dim_z=8, beta=beta, eta_dec=0.9, eta_enc=1.3)) for beta in (0.3, 1.5)]
        collapsed = []
        for optimal, data, f in cases:
            model, units = optimal(f, data)
            self.assertAlmostEqual(exact_loss(model, f, data), units["loss"].item(), delta=1e-7)
            collapsed.append(sum(units["kl"] == 0).item())
            tau, nats, level = headroom_of(model, f, data, collapsed[-1])
            self.assertEqual(nats, 0)
            if collapsed[-1]:
                self.assertLessEqual(tau[0].item(), level * (1 + 1e-9))
            # What an active unit leaves of its mode: level^2 / theta^2.
            variance = units["theta"] if optimal is optimal_cvae else units["theta"]**2
            left = level**2 / variance[units["kl"] > 0]
            self.assertTrue(all((tau - value).abs().min() < 1e-9 for value in left))
            with torch.no_grad():
                encoders = (model.W,) if optimal is optimal_vae else (model.W1, model.W2)
                decoder = model.U if optimal is optimal_vae else model.U1
                for layer in encoders:
                    layer.weight[0] = 0
                decoder.weight[:, 0] = 0
                if optimal is optimal_vae:
                    model.log_scale[0] = math.log(f.eta_dec / f.c / float(f.sigma))
                else:
                    model.log_sigma[0] = 0
            worth = exact_loss(model, f, data) - units["loss"].item()
            self.assertGreater(worth, 0.01)
            tau, nats, level = headroom_of(model, f, data, 1)
            self.assertAlmostEqual(nats, worth, delta=1e-7)
        self.assertEqual([count > 0 for count in collapsed], [False, True, False, True])

    def test_level_2(self):
        """Of a two-level model, whose level 2 describes draws of z1: as much, but for those draws."""
        [x] = self.images.train
        data = dataclasses.replace(self.images, train=(x.repeat(300, 1),))
        f = MNIST_HVAE_Linear_learnable_sigma_2.Flags(
            device="cpu", d_1=6, d_2=6, beta_1=0.7, beta_2=2.5, eta_dec=0.8, eta_enc=1.3, sigma_1=0.6)
        model, units = optimal_hvae(f, data)
        self.assertAlmostEqual(exact_loss(model, f, data), units["loss"].item(), delta=1e-7)
        collapsed = sum(units["kl_2"] == 0).item()
        self.assertIn(collapsed, range(1, 6))
        tau, nats, level = headroom_of(model, f, data, collapsed, "_2")
        self.assertAlmostEqual(level, 2.5 / 0.7 * 0.64)
        self.assertLess(nats, 1e-4)
        self.assertLess(tau[0].item(), 1.05 * level)
        with torch.no_grad():
            model.W2.weight[0], model.U2.weight[:, 0], model.log_sigma_2[0] = 0, 0, 0
        worth = exact_loss(model, f, data) - units["loss"].item()
        tau, nats, level = headroom_of(model, f, data, 1, "_2")
        self.assertGreater(worth, 0.1)
        self.assertAlmostEqual(nats, worth, delta=0.03 * worth)


class NonlinearModels(unittest.TestCase):
    def cases(self, **other):
        """(script, f, model, data) of each nonlinear script with a headroom, as it starts, in float64, on 300 rows."""
        digits = small.digit_data(300, 20)
        for script, (name, flags) in SCRIPTS.items():
            Model = getattr(script, name)
            fields = [field.name for field in dataclasses.fields(script.Flags)]
            f = script.Flags(device="cpu", **flags | {flag: value for flag, value in other.items() if flag in fields})
            if script is Synthetic_CVAE_Relu_correlation:
                [data] = script.correlated([dataclasses.replace(f, num_samples=300)])
                data = dataclasses.replace(data, train=tuple(t.double() for t in data.train), test=tuple(t.double() for t in data.test))
            else:
                data = small.as_quarters(digits) if name == "CVAE" else digits
            if hasattr(Model, "unexplained"):
                yield script, f, training.build(Model, f, data).eval(), data

    def test_units_lower_the_models_own_loss_by_as_much(self):
        """The units that are said to gain G, put into the terms of the model's own loss: that falls by G, with either objective
        and whatever the betas."""
        scripts = 0
        for released in (False, True):
            for script, f, model, data in self.cases(released_objective=released):
                for level, (cross, moment, *weights) in report.unexplained(model, f, data).items():
                    k, (beta, weight, std) = 2, weights
                    theta = theory.spectrum(theory.linear_part(cross, moment))
                    self.assertGreater(theta[0], 0)
                    # A level low enough that two units pay: the same weights, at a smaller beta.
                    smaller = min(1, 0.5 * (theta[1] / theory.level_of(*weights)).item())
                    names = ("beta_2",) if level else ("beta",)
                    f = dataclasses.replace(f, **{name: smaller * getattr(f, name) for name in names})
                    weights = (smaller * beta, weight, std)
                    said = theory.headroom(theta, k, *weights)
                    encoder, sigma, decoder = theory.idle_units(cross, moment, k, *weights)
                    mean = decoder @ encoder
                    error = -2 * (mean * cross).sum() + (mean @ moment * mean).sum() + (decoder**2 @ sigma**2).sum()
                    kl = ((encoder @ moment * encoder).sum(1) + sigma**2 - 1) / 2 - sigma.log()
                    f = common.on_device(f, data.train[0])
                    torch.manual_seed(0)
                    with torch.no_grad():
                        terms = model.train()(*data.train, f)
                    more = dict(terms)
                    more[f"kl{level}"] = torch.cat([terms[f"kl{level}"], kl.expand(len(data.train[0]), k)], dim=1)
                    nats = error / (2 * std**2)           # of -log p(t|z)
                    if level:                             # t is z1, whose density is in level 1's term
                        more["kl_1"] = torch.cat([terms["kl_1"], nats.expand(len(data.train[0]), 1)], dim=1)
                    else:
                        more["log_px_z"] = terms["log_px_z"] - nats
                    fell = (model.loss(terms, f) - model.loss(more, f)).mean().item()
                    self.assertGreater(said, 1e-6)
                    self.assertAlmostEqual(fell, said, delta=1e-9 * max(1, abs(fell)), msg=(script.__name__, released))
                    scripts += 1
        self.assertEqual(scripts, 2 * 6)

    def test_moments_are_those_of_the_residual(self):
        """C and A put together from the last layers, chunk by chunk: those of r and u themselves, z drawn many times."""
        for script, f, model, data in self.cases():
            if "CNN" in script.__name__ or script is MNIST_CVAE_Relu:        # its dropout draws anew
                continue
            g = common.on_device(f, data.train[0])
            with mock.patch("report.HEADROOM_DRAWS", 500), torch.no_grad():
                torch.manual_seed(0)
                [(level, (cross, moment, *_))] = report.unexplained(model, f, data).items()
                self.assertEqual(level, "_2" if hasattr(f, "beta_2") else "")
                q = model.q_z(*data.train, g)
                z = q.sample((500,))
                if hasattr(model, "g_z"):
                    target, mean = data.train[1], model.g_x(data.train[0]) + model.g_z(z)
                else:
                    target, mean = data.train[0], model.g(z)
            u = torch.cat([*data.train, torch.ones(300, 1, dtype=torch.float64)], dim=1)
            self.assertLess((moment - u.T @ u / 300).abs().max(), 1e-12)
            by_draw = torch.einsum("snd,np->sdp", (target - mean)[..., :40], u[:, :40]) / 300
            error = 2**0.5 * by_draw.std(0) / 500**0.5    # of both
            self.assertLess(((cross[:40, :40] - by_draw.mean(0)).abs() / (error + 1e-12)).max().item(), 6)

    def test_few_draws_are_enough(self):
        """The eight draws of a report against a thousand: what they add to tau is a small part of the level, the smaller the more
        rows: of 60,000 within 2 %."""
        f = MNIST_HVAE_Relu.Flags(device="cpu", d_hidden=30)
        data = small.digit_data(2000, 20)
        model = training.build(MNIST_HVAE_Relu.HVAE, f, data).eval()
        tau = []
        for draws in (8, 1000):
            torch.manual_seed(0)
            with mock.patch("report.HEADROOM_DRAWS", draws):
                tau.append(headroom_of(model, f, data, 16, "_2")[0])
        self.assertLess((tau[0] - tau[1]).abs().max(), 0.02 * (60_000 / 2000)**0.5 * 0.25)

    def test_in_single_precision(self):
        f = MNIST_VAE_Relu_learnable_sigma.Flags(device="cpu", d_hidden=30, eta_dec=0.3)
        tau = {}
        for dtype in (torch.float32, torch.float64):
            data = small.digit_data(2000, 20, dtype)
            model = training.build(MNIST_VAE_Relu_learnable_sigma.VAE, f, data).eval()
            model.q_z = lambda x, f, model=model: torch.distributions.Normal(model.f(x), 1e-9)      # without noise
            tau[dtype] = headroom_of(model, f, data, 16)[0]
        self.assertLess((tau[torch.float32] - tau[torch.float64]).abs().max(), 1e-4 * tau[torch.float64][0])


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
        self.assertEqual(report.dead_units(model, f, data),
                         {"x_to_z1": [0, 12], "z1_to_z2": [0, 12], "z2_to_z1": [3, 12], "z1_to_x": [0, 12]})
        self.assertEqual(model.z2_to_z1[1]._forward_hooks, {})

    def test_of_one_example_is_not_dead(self):
        """A unit that fires for one test example, in a late batch of them, is alive."""
        data = small.digit_data(2, 1200)
        f = MNIST_VAE_Relu_learnable_sigma.Flags(device="cpu", d_hidden=5, d_1=2)
        model = training.build(MNIST_VAE_Relu_learnable_sigma.VAE, f, data).eval()
        [x] = data.test
        x[:, 0] = torch.arange(1200) == 1150
        with torch.no_grad():
            model.f[0].weight[:] = 0
            model.f[0].weight[0, 0], model.f[0].bias[:] = 2, -1.0
            model.f[2].bias[:], model.g[0].weight[:], model.g[0].bias[:] = 5.0, 0, 1.0
        self.assertEqual(report.dead_units(model, f, data), {"f": [4, 7], "g": [0, 5]})

    def test_channels_of_convolutions(self):
        data = small.digit_data(20, 30)
        f = MNIST_HVAE_CNN.Flags(device="cpu", d_hidden=12)
        model = training.build(MNIST_HVAE_CNN.HVAE, f, data).eval()
        with torch.no_grad():                             # all fire, but for two channels of one layer, one of the other
            for layer in (model.x_to_z1[0], model.x_to_z1[2]):
                layer.weight.mul_(0.01)
                layer.bias.fill_(1.0)
            model.x_to_z1[0].bias[[3, 9]], model.x_to_z1[2].bias[5] = -1.0, -1.0
        found = report.dead_units(model, f, data)
        self.assertEqual({name: of for name, (_, of) in found.items()}, {
            "x_to_z1": 64 + 32, "z1_to_z2": 12, "z2_to_z1": 12, "z1_to_x": 32 * 7 * 7 + 64})
        self.assertEqual(found["x_to_z1"], [3, 96])


class Verdicts(unittest.TestCase):
    def test_words(self):
        self.assertEqual(theory.verdict(16, 0, 0), "none of 16 units collapsed")
        self.assertEqual(theory.verdict(16, 9, 0.0099), "9 of 16 units collapsed, by the objective")
        self.assertEqual(theory.verdict(16, 16, 0.0621),
                         "16 of 16 units collapsed, by training: idle units would pay at least 0.062 nats")

    def result(self, **of):
        return {"headroom": {"z2": {"units": 16, "collapsed": 9, "headroom": 0.5} | of}, "loss_change": -0.2,
                "dead_units": {"f_x": [0, 16], "f_y": [13, 16], "g_z": [16, 16]}}

    def test_what_points_to_the_cause(self):
        [said] = report.verdicts(self.result())
        self.assertEqual(said, "z2: 9 of 16 units collapsed, by training: idle units would pay at least 0.5 nats; 13 of 16 hidden "
                         "units of f_y, 16 of 16 of g_z are dead; the loss still fell by 0.2 nats in the last tenth of the epochs")
        self.assertEqual(list(report.verdicts(self.result(headroom=0.0))), ["z2: 9 of 16 units collapsed, by the objective"])
        [said] = report.verdicts(self.result() | {"dead_units": {"g_z": [0, 16]}, "loss_change": None})
        self.assertEqual(said, "z2: 9 of 16 units collapsed, by training: idle units would pay at least 0.5 nats")

    def test_last_tenth(self):
        self.assertIsNone(report.last_change([3.0]))
        self.assertEqual(report.last_change([3.0, 2.0]), -1.0)
        self.assertEqual(report.last_change([100.0 - i for i in range(50)]), -5.0)


class Reports(small.WithMnist):
    """What a script leaves and prints of it."""

    def run_script(self, script, *argv):
        status, out, err = small.call(script.main, *argv, "--data_dir", self.folder / "data", "--out_dir", self.folder / "runs",
                                      "--device", "cpu", "--num_samples", 2)
        self.assertEqual(status, 0, err)
        return out

    def test_a_level_collapsed_by_the_objective(self):
        """A beta far above every threshold: headroom 0; at a tiny one, after an epoch, plenty; beside each other in a grid."""
        out = self.run_script(MNIST_CVAE_Relu, "--num_epochs", 30, "--batch_size", 16, "--lr", 0.01, "--beta", "1e-6,1000", "--start_std", 1)
        folder = self.folder / "runs" / "MNIST_CVAE_Relu"
        result = json.loads((folder / "beta=1000.0,start_std=1.0,batch_size=16,num_epochs=30,lr=0.01,num_samples=2" / "result.json").read_text())
        self.assertIn("headroom", out.splitlines()[2].split())
        self.assertIn("\nbeta=1000.0: z: 16 of 16 units collapsed, by the objective\n", out)
        self.assertEqual(result["metrics"]["headroom"], 0)
        z = result["headroom"]["z"]
        self.assertEqual((z["units"], z["collapsed"], len(z["tau"]), z["theta"]), (16, 16, 16, []))
        self.assertEqual(z["level"], 1000 * 0.25)
        self.assertEqual(set(result["dead_units"]), {"f_x", "f_y", "g_x", "g_z"})
        self.assertAlmostEqual(result["loss_change"], result["curves"]["loss"][-1] - result["curves"]["loss"][-4])
        for of in folder.glob("beta*"):
            self.assertGreater((of / "headroom.png").stat().st_size, 5000)

    def test_theta_of_a_linear_model(self):
        """Beside the picture of tau, theta is the variance that a linear unit of the same KL describes: level exp(2 KL)."""
        out = self.run_script(MNIST_VAE_Linear_learnable_sigma, "--num_epochs", 2, "--d_1", 3, "--beta", 2)
        [path] = (self.folder / "runs" / "MNIST_VAE_Linear_learnable_sigma").glob("*/result.json")
        result = json.loads(path.read_text())
        kl = sorted(report.np.load(path.parent / "units.npz")["unit_kl"].mean(0), reverse=True)
        theta = [2 * math.exp(2 * value) for value in kl if value > 0.01]
        for found, wanted in zip(result["headroom"]["z"]["theta"], theta, strict=True):
            self.assertAlmostEqual(found, wanted, places=4)
        self.assertIn("\nz: ", out)

    def test_none_where_it_has_no_meaning(self):
        import MNIST_VAE_Relu_nonlearnable_sigma
        out = self.run_script(MNIST_VAE_Relu_nonlearnable_sigma, "--num_epochs", 1)
        self.assertNotIn("headroom", out)
        self.assertNotIn("collapsed", out)


if __name__ == "__main__":
    unittest.main()
