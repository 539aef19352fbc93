"""The closed forms against brute force, the checks of the theorems, and spectra of awkward data."""
import json
import math
import unittest
from unittest import mock

import torch
from torch.distributions import Normal

import theory
import matrix_CVAE
import matrix_HVAE_learnable_sigma_1_2
import matrix_HVAE_learnable_sigma_2
import matrix_HVAE_nonlearnable_sigma_2
import matrix_VAE
from tests import small


def draw(random, *shape):
    return 0.5 * torch.randn(shape, dtype=torch.float64, generator=random)


class ExactLosses(unittest.TestCase):
    """The matrix scripts' losses are the expectations they claim to be: sampled with torch.distributions."""
    ROWS, DRAWS = 50, 4000

    def setUp(self):
        self.random = torch.Generator().manual_seed(0)
        torch.manual_seed(0)

    def parameters(self, problem):
        return problem.start(lambda *shape: draw(self.random, *shape))

    def assert_mean(self, samples, expected):
        """samples (draws, rows): their mean is the expected value within four standard errors, and precise."""
        of_draws = samples.mean(1)
        error = of_draws.std() / len(of_draws)**0.5
        self.assertLess(error.item(), 0.02 * abs(expected))
        self.assertLess(abs(of_draws.mean().item() - expected), 4 * error.item())

    def data(self, *widths):
        return [draw(self.random, self.ROWS, width) * 3 for width in widths]

    def test_vae(self):
        for learnable in (True, False):
            f = matrix_VAE.Flags(beta=0.7, eta_enc=1.3, eta_dec=0.6, sigma="0.5/0.8/1.1", d_0=4, d_1=3,
                                 learnable_sigma=learnable)
            vae, [x] = matrix_VAE.VAE(f), self.data(4)
            vae.A, p = theory.second_moment(x), self.parameters(vae)
            q = Normal(x @ p["W"].T, p["log_sigma"].exp() if learnable else torch.tensor([0.5, 0.8, 1.1]).double())
            z = q.sample((self.DRAWS,))
            losses = -Normal(z @ p["U"].T, 0.6).log_prob(x).sum(-1) + 0.7 * (
                q.log_prob(z) - Normal(0, 1.3).log_prob(z)).sum(-1)
            self.assert_mean(losses, vae.loss(p).item())

    def test_cvae(self):
        f = matrix_CVAE.Flags(beta=0.7, eta_enc=1.3, eta_dec=0.6, dim_x=2, dim_y=4, dim_z=3)
        cvae, [x, y] = matrix_CVAE.CVAE(f), self.data(2, 4)
        cvae.moment, p = theory.second_moment(x, y), self.parameters(cvae)
        q = Normal(x @ p["W1"].T + y @ p["W2"].T, p["log_sigma"].exp())
        z = q.sample((self.DRAWS,))
        losses = -Normal(z @ p["U1"].T + x @ p["U2"].T, 0.6).log_prob(y).sum(-1) + 0.7 * (
            q.log_prob(z) - Normal(0, 1.3).log_prob(z)).sum(-1)
        self.assert_mean(losses, cvae.loss(p).item())

    def test_hvae(self):
        same = dict(beta_1=0.7, beta_2=1.6, eta_enc=1.3, eta_dec=0.6, d_0=4, d_1=3)
        for script, more in ((matrix_HVAE_learnable_sigma_2, dict(sigma_1=0.8, d_2=2)),
                             (matrix_HVAE_nonlearnable_sigma_2, dict(sigma_1=0.8, sigma_2=0.9, d_2=2)),
                             (matrix_HVAE_learnable_sigma_1_2, {})):
            hvae, [x] = script.HVAE(script.Flags(**same, **more)), self.data(4)
            hvae.A, p = theory.second_moment(x), self.parameters(hvae)
            q_1 = Normal(x @ p["W1"].T, p["log_sigma_1"].exp() if "log_sigma_1" in p else 0.8)
            z_1 = q_1.sample((self.DRAWS,))
            q_2 = Normal(z_1 @ p["W2"].T, p["log_sigma_2"].exp() if "log_sigma_2" in p else 0.9)
            z_2 = q_2.sample()
            losses = (-Normal(z_1 @ p["U1"].T, 0.6).log_prob(x).sum(-1)
                      + 0.7 * (q_1.log_prob(z_1) - Normal(z_2 @ p["U2"].T, 0.6).log_prob(z_1)).sum(-1)
                      + 1.6 * (q_2.log_prob(z_2) - Normal(0, 1.3).log_prob(z_2)).sum(-1))
            self.assert_mean(losses, hvae.loss(p).item())


class BruteForce(unittest.TestCase):
    """Each closed form against the exact loss minimised from random starts, at random settings."""

    def check(self, Problem, f, starts=3):
        problem, random = Problem(f), torch.Generator().manual_seed(5)
        (found, loss), *_ = theory.minimise(problem.loss, [
            problem.start(lambda *shape: draw(random, *shape)) for _ in range(starts)])
        predicted = problem.predicted()
        beside = theory.compare(predicted, problem.units(found), loss)
        self.assertGreaterEqual(len(beside["errors"]), 5)
        for name, error in beside["errors"].items():
            self.assertLess(error, 1e-6, (name, f))
        self.assertLess(abs(beside["gap"]), 1e-9, f)
        return predicted

    def test_vae(self):
        active = set()
        for seed, beta, eta_enc, eta_dec, d_1 in ((0, 0.6, 1.3, 0.8, 4), (1, 2.0, 0.5, 1.1, 3), (2, 1.0, 1.0, 1.0, 7)):
            predicted = self.check(matrix_VAE.VAE, matrix_VAE.Flags(
                seed=seed, beta=beta, eta_enc=eta_enc, eta_dec=eta_dec, d_0=5, d_1=d_1))
            active.add((predicted["kl"] > 0).sum().item())
        self.assertGreater(len(active), 1)

    def test_vae_fixed(self):
        for seed, sigma, d_1 in ((0, "2/0.5/1/0.3", 4), (1, 0.8, 3), (2, "0.5/0.5/1.5", 3), (3, "0.4/3/0.2/1/1/0.7", 6)):
            f = matrix_VAE.Flags(seed=seed, beta=1.4, eta_enc=1.2, eta_dec=0.8, d_0=5, d_1=d_1, sigma=sigma,
                                 learnable_sigma=False)
            predicted = self.check(matrix_VAE.VAE, f)
            # A dead mean is no collapse.
            dead = predicted["lambda"] == 0
            self.assertTrue((predicted["kl"][dead] > 0).all())

    def test_cvae(self):
        for seed, beta, eta_enc, eta_dec, dim_z in ((0, 0.6, 1.3, 0.8, 4), (1, 2.0, 0.5, 1.1, 2), (2, 0.5, 2.0, 0.6, 6)):
            self.check(matrix_CVAE.CVAE, matrix_CVAE.Flags(
                seed=seed, beta=beta, eta_enc=eta_enc, eta_dec=eta_dec, dim_x=3, dim_y=4, dim_z=dim_z))

    def test_hvae(self):
        """sigma_1^2 above and below b; beta_1 below 1; eta_enc and eta_dec apart; d_1 and d_2 apart."""
        below = set()
        for seed, sigma_1, beta_1, beta_2, eta_enc, eta_dec, d_1, d_2 in (
                (0, 1.5, 1.0, 1.0, 1.0, 0.8, 4, 4), (1, 0.6, 0.5, 2.0, 1.4, 0.9, 4, 4), (2, 0.9, 2.0, 0.7, 0.6, 1.2, 3, 5),
                (3, 0.7, 0.6, 0.9, 1.2, 0.7, 5, 2)):
            f = matrix_HVAE_learnable_sigma_2.Flags(seed=seed, sigma_1=sigma_1, beta_1=beta_1, beta_2=beta_2, eta_enc=eta_enc,
                                                    eta_dec=eta_dec, d_0=5, d_1=d_1, d_2=d_2)
            self.check(matrix_HVAE_learnable_sigma_2.HVAE, f)
            below.add(sigma_1**2 < beta_2 / beta_1 * eta_dec**2)
        self.assertEqual(below, {True, False})

    def test_hvae_fixed(self):
        below = set()
        for seed, sigma_1, sigma_2, beta_1, beta_2, eta_enc, eta_dec, d_1, d_2 in (
                (0, 1.5, 0.7, 1.0, 1.0, 1.0, 0.8, 4, 4), (1, 0.6, 1.2, 0.5, 2.0, 1.4, 0.9, 4, 4),
                (2, 0.9, 0.5, 0.3, 0.7, 0.6, 1.2, 3, 5), (3, 0.7, 1.6, 0.6, 0.9, 1.2, 0.7, 5, 2)):
            f = matrix_HVAE_nonlearnable_sigma_2.Flags(
                seed=seed, sigma_1=sigma_1, sigma_2=sigma_2, beta_1=beta_1, beta_2=beta_2, eta_enc=eta_enc, eta_dec=eta_dec,
                d_0=5, d_1=d_1, d_2=d_2)
            self.check(matrix_HVAE_nonlearnable_sigma_2.HVAE, f)
            below.add(sigma_1**2 < beta_2 / beta_1 * (eta_dec / eta_enc * sigma_2)**2)
        self.assertEqual(below, {True, False})

    def test_both_learnable(self):
        for seed in (0, 1):
            f = matrix_HVAE_learnable_sigma_1_2.Flags(seed=seed, beta_1=0.8, beta_2=1.1, eta_enc=1.4, eta_dec=0.7, d_0=4, d_1=3)
            predicted = self.check(matrix_HVAE_learnable_sigma_1_2.HVAE, f)
            self.assertTrue((predicted["kl_2"] == 0).all())
            self.assertTrue((predicted["kl_1"] > 0).any())


class Batches(unittest.TestCase):
    def test_many_settings_at_once(self):
        theta = torch.tensor([3.0, 2.0, 1.2, 0.6, 0.1], dtype=torch.float64)
        b_1, b_2, s = (torch.tensor(values, dtype=torch.float64) for values in (
            [0.3, 1.0, 2.0], [2.0, 0.4, 1.0], [0.5, 1.0, 1.5]))
        forms = {
            "vae": lambda a, b, c: theory.vae_optimum(theta, 4, a, b, c),
            "cvae": lambda a, b, c: theory.cvae_optimum(theta, 7, a, b, c),
            "fixed": lambda a, b, c: theory.vae_optimum_fixed_sigma(theta, torch.tensor([2.0, 0.5, 1.0]), a, b, c),
            "hvae": lambda a, b, c: theory.hvae_optimum(theta, 4, 3, c, a, b, 0.7, 0.9),
            "hvae fixed": lambda a, b, c: theory.hvae_optimum_fixed_sigma_2(theta, 4, 6, c, 0.8, a, b, 0.7, c)}
        for name, form in forms.items():
            together = form(b_1, b_2, s)
            self.assertEqual(together["loss"].shape, (3,))
            for k in range(3):
                alone = form(b_1[k].item(), b_2[k].item(), s[k].item())
                for key, values in alone.items():
                    of_all = together[key].expand(3, *values.shape)
                    torch.testing.assert_close(of_all[k], values, rtol=0, atol=1e-14, msg=f"{name} {key}")

    def test_collapse_thresholds(self):
        """A unit has information just below its threshold and none just above it; never means never."""
        theta = torch.tensor([3.0, 2.0, 1.2, 0.6, 0.1], dtype=torch.float64)
        forms = [("", lambda beta: theory.vae_optimum(theta, 6, beta, 0.7, 0.9)),
                 ("", lambda beta: theory.cvae_optimum(theta, 4, beta, 0.7, 0.9)),
                 ("", lambda beta: theory.vae_optimum_fixed_sigma(theta, torch.tensor([2.0, 0.5, 1.0, 0.2]), beta, 0.7, 0.9))]
        for sigma_1, beta_1, d_2 in ((0.5, 1.0, 5), (1.5, 0.4, 5), (1.1, 2.0, 3)):
            for level in ("_1", "_2"):
                forms.append((level, lambda beta, a=(sigma_1, beta_1), d_2=d_2: theory.hvae_optimum(
                    theta, 4, d_2, a[0], a[1], beta, 0.7, 0.9)))
                forms.append((level, lambda beta, a=(sigma_1, beta_1), d_2=d_2: theory.hvae_optimum_fixed_sigma_2(
                    theta, 4, d_2, a[0], 0.6, a[1], beta, 0.7, 0.9)))
        seen = set()
        for level, form in forms:
            collapse = form(1.0)[f"collapse{level}"]
            for i, at in enumerate(collapse.tolist()):
                if at == 0:
                    self.assertEqual(form(1e-6)[f"information{level}"][i], 0)
                    seen.add("from 0")
                elif at == math.inf:
                    self.assertGreater(form(1e6)[f"information{level}"][i], 0)
                    seen.add("never")
                else:
                    self.assertGreater(form(at * (1 - 1e-6))[f"information{level}"][i], 0)
                    self.assertEqual(form(at * (1 + 1e-6))[f"information{level}"][i], 0)
                    seen.add("at")
        self.assertEqual(seen, {"from 0", "never", "at"})


class Spectra(unittest.TestCase):
    def setUp(self):
        self.random = torch.Generator().manual_seed(1)

    def normal(self, *shape):
        return torch.randn(shape, dtype=torch.float64, generator=self.random)

    def test_second_moment(self):
        x, y = self.normal(1300, 3), self.normal(1300, 2)
        v = torch.cat([x, y], 1)
        torch.testing.assert_close(theory.second_moment(x, y), torch.einsum("ni,nj->ij", v, v) / 1300, rtol=0, atol=1e-13)
        self.assertEqual(theory.second_moment(x.float()).dtype, torch.float64)

    def test_root(self):
        moment = theory.second_moment(self.normal(40, 6) @ self.normal(6, 6))
        R = theory.root(moment)
        torch.testing.assert_close(R @ R.T, moment)
        self.assertTrue((theory.spectrum(moment).diff() <= 0).all())

    def test_residual_is_that_of_least_squares(self):
        """Also where x is singular: a pixel that is always 0, one that repeats another, fewer rows than columns."""
        for rows in (200, 4):
            x = self.normal(rows, 6)
            x[:, 2], x[:, 4] = 0, 3 * x[:, 1]
            y = self.normal(rows, 5) + x @ self.normal(6, 5)
            explained = x @ (torch.linalg.pinv(x) @ y)
            E = theory.residual(theory.second_moment(x, y), 6)
            torch.testing.assert_close(E, theory.second_moment(y - explained), rtol=0, atol=1e-12)
            self.assertTrue((theory.spectrum(E) >= 0).all())

    def test_what_x_tells_wholly_collapses(self):
        x = self.normal(300, 4)
        E = theory.residual(theory.second_moment(x, x @ self.normal(4, 3)), 4)
        self.assertTrue((theory.cvae_optimum(theory.spectrum(E), 3, 1e-9, 1.0, 1.0)["kl"] == 0).all())

    def test_awkward_data(self):
        """Zeros, a constant feature, fewer rows than columns, more units than modes: finite and right, everywhere."""
        constant = self.normal(50, 4)
        constant[:, 2] = 7.0
        for x in (torch.zeros(9, 4, dtype=torch.float64), constant, self.normal(2, 4)):
            theta = theory.spectrum(theory.second_moment(x)).sqrt()
            singular = torch.nn.functional.pad(torch.linalg.svdvals(x / len(x)**0.5), (0, max(0, 4 - len(x))))
            torch.testing.assert_close(theta, singular, rtol=0, atol=1e-7)
            for optimum in (theory.vae_optimum(theta, 6, 0.5, 1.0, 0.5),
                            theory.vae_optimum_fixed_sigma(theta, torch.full((6,), 0.3), 0.5, 1.0, 0.5),
                            theory.hvae_optimum(theta, 6, 5, 0.5, 0.5, 2.0, 1.0, 0.5),
                            theory.hvae_optimum_fixed_sigma_2(theta, 5, 6, 0.5, 0.5, 0.5, 2.0, 1.0, 0.5)):
                for name, values in optimum.items():
                    self.assertFalse(values.isnan().any(), name)
            rank = int((singular > 1e-7).sum())
            self.assertTrue((theory.vae_optimum(theta, 6, 1e-9, 1.0, 1.0)["kl"][rank:] == 0).all())


class Verdicts(small.InFolder):
    def run_script(self, script, *argv):
        with mock.patch.object(theory, "STARTS", 2):
            return small.call(script.main, "--out_dir", self.folder, *argv)

    def assert_verified(self, out, status):
        verdict = out.strip().split("\n")[-1]
        self.assertRegex(verdict, r"^VERIFIED max error \d\.\de-\d\d$")
        self.assertLessEqual(float(verdict.split()[-1]), 1e-6)
        self.assertEqual(status, 0)

    def test_defaults_and_what_they_print(self):
        for script in (matrix_VAE, matrix_CVAE, matrix_HVAE_learnable_sigma_2, matrix_HVAE_nonlearnable_sigma_2,
                       matrix_HVAE_learnable_sigma_1_2):
            status, out, _ = self.run_script(script)
            self.assert_verified(out, status)
            self.assertIn(" active\n", out)
            self.assertIn(" collapsed\n", out)
            [path] = (self.folder / script.__name__).glob("*/result.json")
            result = json.loads(path.read_text(), parse_constant=self.fail)     # nan and Infinity are no JSON
            self.assertEqual((result["script"], result["dataset"]), (script.__name__, "synthetic"))
            self.assertLess(abs(result["theory"]["gap"]), 1e-9)
            self.assertIn(f"{result['theory']['optimal_loss']:.6f}", out)
            for name, predicted in result["theory"]["predicted"].items():
                if name.startswith(("lambda", "omega", "sigma")):
                    self.assertTrue(all(f"{value:.4f}" in out for value in predicted), name)

    def test_grids_and_seeds(self):
        status, out, _ = self.run_script(matrix_VAE, "--seed", "0:1", "--beta", "0.5,2", "--learnable_sigma", "true,false",
                                         "--d_0", 3, "--d_1", 2)
        self.assert_verified(out, status)
        names, *rows = [line.split() for line in out.strip().split("\n")[1:-1]]
        self.assertEqual(names[:3], ["beta", "learnable_sigma", "seed"])
        self.assertEqual([tuple(row[:3]) for row in rows], [
            (beta, learnable, seed) for beta in ("0.5", "2.0") for learnable in ("True", "False") for seed in ("0", "1")])
        self.assertEqual(len(list((self.folder / "matrix_VAE").glob("*/result.json"))), 8)

    def test_awkward_data(self):
        """Fewer rows than dimensions, more units than the data has modes."""
        for script, argv in ((matrix_VAE, ("--d_1", 5)), (matrix_CVAE, ("--dim_x", 2, "--dim_y", 4, "--dim_z", 5)),
                             (matrix_HVAE_learnable_sigma_2, ("--d_1", 4)), (matrix_HVAE_nonlearnable_sigma_2, ("--d_2", 6))):
            status, out, _ = self.run_script(script, "--num_samples", 3, *argv)
            self.assert_verified(out, status)
            self.assertIn("the data has no more modes", out)

    def test_a_broken_formula_fails(self):
        """Each theorem with a mistake, the first ones those of the authors' released code."""
        forms = {name: getattr(theory, name) for name in ("vae_optimum", "cvae_optimum", "vae_optimum_fixed_sigma",
                                                          "hvae_optimum", "hvae_optimum_fixed_sigma_2")}

        def changed(name, change):
            return lambda *args: change(forms[name](*args), *args)

        cases = [
            ("beta eta_dec^2 for sqrt(beta) eta_dec", matrix_VAE, ("--eta_dec", 0.8), "vae_optimum",
             lambda o, theta, d, beta, enc, dec: o | {"sigma": torch.where(o["kl"] > 0, beta * enc * dec**2 / o["theta"], enc)}),
            ("the branch of sigma_i", matrix_CVAE, ("--eta_dec", 0.5), "cvae_optimum",
             lambda o, theta, d, beta, enc, dec: o | {"sigma": torch.where(
                 o["theta"] >= beta**0.5 * dec, beta**0.5 * enc * dec / o["theta"].sqrt(), enc)}),
            ("c upside down", matrix_CVAE, ("--eta_dec", 0.5), "cvae_optimum",
             lambda o, theta, d, beta, enc, dec: o | {"omega": o["omega"] * enc / dec}),
            ("theta for its root", matrix_CVAE, (), "cvae_optimum",
             lambda o, theta, d, *rest: forms["vae_optimum"](theta, d, *rest)),
            ("sigma not sorted", matrix_VAE, ("--learnable_sigma", "false", "--sigma", "1.5/0.5/1", "--d_1", 3),
             "vae_optimum_fixed_sigma", lambda o, theta, sigma, beta, enc, dec: o | {"lambda": (
                 sigma * (theta[:3] - sigma * beta**0.5 * dec / enc).clamp(min=0) / (beta**0.5 * dec / enc)).sqrt()}),
            ("a little off", matrix_VAE, ("--learnable_sigma", "false"),
             "vae_optimum_fixed_sigma", lambda o, *args: o | {"lambda": o["lambda"] + 1e-5}),
            ("b without beta_1", matrix_HVAE_learnable_sigma_2, ("--beta_1", 0.5), "hvae_optimum",
             lambda o, theta, d_1, d_2, s, b_1, b_2, *rest: forms["hvae_optimum"](theta, d_1, d_2, s, 1.0, b_2, *rest)),
            ("the first branch", matrix_HVAE_nonlearnable_sigma_2, ("--beta_1", 0.5), "hvae_optimum_fixed_sigma_2",
             lambda o, theta, d_1, d_2, s_1, s_2, b_1, b_2, *rest: forms["hvae_optimum_fixed_sigma_2"](
                 theta, d_1, d_2, s_1, s_2, b_1, b_2 * b_1, *rest)),
            ("the loss alone", matrix_HVAE_nonlearnable_sigma_2, (), "hvae_optimum_fixed_sigma_2",
             lambda o, *args: o | {"loss": o["loss"] + 1e-5}),
            ("nan", matrix_VAE, (), "vae_optimum", lambda o, *args: o | {"omega": o["omega"] * math.nan}),
            ("both learnable", matrix_HVAE_learnable_sigma_1_2, (), "vae_optimum",
             lambda o, theta, d, beta, enc, dec: forms["vae_optimum"](theta, d, beta, 1.1 * enc, dec)),
        ]
        for mistake, script, argv, name, change in cases:
            with self.subTest(mistake), mock.patch.object(theory, name, changed(name, change)):
                status, out, _ = self.run_script(script, *argv)
                self.assertRegex(out.strip().split("\n")[-1], "^FAILED max error ")
                self.assertEqual(status, 1)

    def test_an_optimiser_that_stops_early_fails(self):
        def early(loss, starts, **more):
            return [(starts[0], loss(starts[0]).item())]
        with mock.patch.object(theory, "minimise", early):
            status, out, _ = self.run_script(matrix_VAE)
        self.assertEqual((status, out.strip().split("\n")[-1].split()[0]), (1, "FAILED"))

    def test_unbounded_and_flat(self):
        """beta_2 below beta_1: stopped and said; equal: the loss alone is compared."""
        status, out, _ = self.run_script(matrix_HVAE_learnable_sigma_1_2, "--beta_2", "0.5,1", "--d_0", 3, "--d_1", 2)
        self.assertEqual(status, 0)
        self.assertIn("VERIFIED", out)
        self.assertIn("the optimum is flat", out)
        self.assertRegex(out.strip().split("\n")[-1], "^UNBOUNDED max error .* when stopped$")
        rows = [line.split() for line in out.split("Sigma1 = sigma_1^2 I held")[1].split("\n")[2:-2]]
        losses = [float(row[2]) for row in rows]
        self.assertEqual(len(losses), 3)
        # The last step down: (beta_2 - beta_1) d_1 log 2.
        self.assertAlmostEqual(losses[-1] - losses[-2], -0.5 * 2 * math.log(2), delta=1e-3)

    def test_ties_are_told(self):
        theta = torch.tensor([2.0, 2.0, 0.5], dtype=torch.float64)
        beside = theory.compare(theory.vae_optimum(theta, 3, 1.0, 1.0, 1.0), {}, 0.0)
        self.assertIn("units 1 and 2 have the same theta", theory.notes(beside)[0])
        beside = theory.compare(theory.hvae_optimum(theta, 3, 3, 2.0, 1.0, 1.0, 1.0, 1.0), {}, 0.0)
        self.assertIn("nothing but the noise of z1", theory.notes(beside)[-1])

    def test_refused(self):
        for argv, flag in ((("--beta", 0), "--beta"), (("--sigma", "1/2"), "--sigma"), (("--sigma", "1/-2/1/1/1"), "--sigma"),
                           (("--num_samples", 0), "--num_samples"), (("--d_1", 0), "--d_1"), (("--sigma", "1/"), "--sigma")):
            status, out, err = self.run_script(matrix_VAE, *argv)
            self.assertEqual((status, out), (2, ""), argv)
            self.assertIn(f"error: {flag}: ", err)


if __name__ == "__main__":
    unittest.main()
