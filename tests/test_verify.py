"""verify.py: the verdicts of the matrix scripts, what the loss determines, and the verdicts and
notes of a comparison.
"""
import dataclasses
import json
import math
import unittest
from unittest import mock

import torch

import matrix_CVAE
import matrix_HVAE_learnable_sigma_1_2
import matrix_HVAE_learnable_sigma_2
import matrix_HVAE_nonlearnable_sigma_2
import matrix_VAE
import theory
import verify
from tests import small, test_theory

MATRIX_SCRIPTS = (
    matrix_VAE,
    matrix_CVAE,
    matrix_HVAE_learnable_sigma_2,
    matrix_HVAE_nonlearnable_sigma_2,
    matrix_HVAE_learnable_sigma_1_2,
)

# The closed forms as they are, for tests that put broken ones in their place.
vae_optimum = theory.vae_optimum
cvae_optimum = theory.cvae_optimum
vae_optimum_fixed_sigma = theory.vae_optimum_fixed_sigma
hvae_optimum = theory.hvae_optimum
hvae_optimum_fixed_sigma_2 = theory.hvae_optimum_fixed_sigma_2


# Broken closed forms. The first three mistakes are those of the authors' released code.


def sigma_without_root(theta, d_1, beta, eta_enc, eta_dec):
    """sigma_i with beta eta_dec^2 in place of sqrt(beta) eta_dec."""
    optimum = vae_optimum(theta, d_1, beta, eta_enc, eta_dec)
    active_sigma = beta * eta_enc * eta_dec**2 / optimum["theta"]
    optimum["sigma"] = torch.where(optimum["kl"] > 0, active_sigma, eta_enc)
    return optimum


def sigma_with_wrong_branch(theta, dim_z, beta, eta_enc, eta_dec):
    """The CVAE's sigma_i with the branch theta_i >= sqrt(beta) eta_dec."""
    optimum = cvae_optimum(theta, dim_z, beta, eta_enc, eta_dec)
    active_sigma = beta**0.5 * eta_enc * eta_dec / optimum["theta"].sqrt()
    is_active = optimum["theta"] >= beta**0.5 * eta_dec
    optimum["sigma"] = torch.where(is_active, active_sigma, eta_enc)
    return optimum


def c_upside_down(theta, dim_z, beta, eta_enc, eta_dec):
    """omega_i with eta_enc / eta_dec in place of c = eta_dec / eta_enc."""
    optimum = cvae_optimum(theta, dim_z, beta, eta_enc, eta_dec)
    optimum["omega"] = optimum["omega"] * eta_enc / eta_dec
    return optimum


def variance_taken_for_std(theta, dim_z, beta, eta_enc, eta_dec):
    """The CVAE with theta_i in place of its root."""
    return vae_optimum(theta, dim_z, beta, eta_enc, eta_dec)


def sigma_not_sorted(theta, sigma, beta, eta_enc, eta_dec):
    """lambda_i of a fixed sigma whose values stay in the order of the command line."""
    optimum = vae_optimum_fixed_sigma(theta, sigma, beta, eta_enc, eta_dec)
    k = beta**0.5 * eta_dec / eta_enc
    gain = (theta[:len(sigma)] - k * sigma).clamp(min=0)
    optimum["lambda"] = (sigma * gain / k).sqrt()
    return optimum


def lambda_a_little_off(*args, **flags):
    optimum = vae_optimum_fixed_sigma(*args, **flags)
    optimum["lambda"] = optimum["lambda"] + 1e-5
    return optimum


def b_without_beta_1(theta, d_1, d_2, sigma_1, beta_1, beta_2, eta_enc, eta_dec):
    """Theorem 3 for beta_1 = 1 at every beta_1."""
    return hvae_optimum(theta, d_1, d_2, sigma_1, 1.0, beta_2, eta_enc, eta_dec)


def first_branch_wrong(theta, d_1, d_2, sigma_1, sigma_2, beta_1, beta_2, eta_enc, eta_dec):
    """Theorem 5 with beta_1 beta_2 in place of beta_2."""
    return hvae_optimum_fixed_sigma_2(
        theta, d_1, d_2, sigma_1, sigma_2, beta_1, beta_2 * beta_1, eta_enc, eta_dec
    )


def loss_a_little_off(*args, **flags):
    optimum = hvae_optimum_fixed_sigma_2(*args, **flags)
    optimum["loss"] = optimum["loss"] + 1e-5
    return optimum


def prior_too_wide(theta, d_1, beta, eta_enc, eta_dec):
    return vae_optimum(theta, d_1, beta, 1.1 * eta_enc, eta_dec)


# (script, its flags, the name of the closed form, the broken one)
BROKEN_FORMS = (
    (matrix_VAE, ("--eta_dec", 0.8), "vae_optimum", sigma_without_root),
    (matrix_CVAE, ("--eta_dec", 0.5), "cvae_optimum", sigma_with_wrong_branch),
    (matrix_CVAE, ("--eta_dec", 0.5), "cvae_optimum", c_upside_down),
    (matrix_CVAE, (), "cvae_optimum", variance_taken_for_std),
    (
        matrix_VAE,
        ("--learnable_sigma", "false", "--sigma", "1.5/0.5/1", "--d_1", 3),
        "vae_optimum_fixed_sigma",
        sigma_not_sorted,
    ),
    (
        matrix_VAE,
        ("--learnable_sigma", "false"),
        "vae_optimum_fixed_sigma",
        lambda_a_little_off,
    ),
    (matrix_HVAE_learnable_sigma_2, ("--beta_1", 0.5), "hvae_optimum", b_without_beta_1),
    (
        matrix_HVAE_nonlearnable_sigma_2,
        ("--beta_1", 0.5),
        "hvae_optimum_fixed_sigma_2",
        first_branch_wrong,
    ),
    (
        matrix_HVAE_nonlearnable_sigma_2,
        (),
        "hvae_optimum_fixed_sigma_2",
        loss_a_little_off,
    ),
    (matrix_HVAE_learnable_sigma_1_2, (), "vae_optimum", prior_too_wide),
)


class MatrixScripts(small.InFolder):
    """Runs matrix scripts, and checks their last line and their exit status."""

    def run_script(self, script, *argv, starts=2):
        """Run a matrix script with few random starts: (exit status, stdout, stderr)."""
        with mock.patch.object(verify, "STARTS", starts):
            return small.call(script.main, "--out_dir", self.folder, *argv)

    def assert_verified(self, out, status):
        verdict = out.strip().split("\n")[-1]
        self.assertRegex(verdict, r"^VERIFIED: the largest error is \d\.\de-\d\d$")
        self.assertLessEqual(float(verdict.split()[-1]), 1e-6)
        self.assertEqual(status, 0)

    def assert_failed(self, out, status, words="the largest error is .* 1e-06 is allowed$"):
        self.assertRegex(out.strip().split("\n")[-1], f"^FAILED: {words}")
        self.assertEqual(status, 1)


class Verdicts(MatrixScripts):
    def test_defaults_and_the_printed_tables(self):
        for script in MATRIX_SCRIPTS:
            status, out, _ = self.run_script(script)
            self.assert_verified(out, status)
            self.assertIn(" active\n", out)
            self.assertIn(" collapsed\n", out)

            [path] = (self.folder / script.__name__).glob("*/result.json")
            # nan and Infinity are no JSON.
            result = json.loads(path.read_text(encoding="utf-8"), parse_constant=self.fail)
            self.assertEqual(result["script"], script.__name__)
            self.assertEqual(result["dataset"], "synthetic")
            self.assertLess(abs(result["theory"]["gap"]), 1e-9)
            theory_of_run = result["theory"]
            losses = f"{theory_of_run['optimal_loss']:.6f} -> {theory_of_run['loss']:.6f}"
            self.assertIn(losses, out)
            self.assertIn('In a pair "theorem -> brute force", ', out)
            for name, predicted in result["theory"]["predicted"].items():
                if name.startswith(("lambda", "omega", "sigma")):
                    for value in predicted:
                        self.assertIn(f"{value:.4f}", out, name)

    def test_grids_and_seeds(self):
        status, out, _ = self.run_script(
            matrix_VAE, "--seed", "0:1", "--beta", "0.5,2", "--learnable_sigma", "true,false",
            "--d_0", 3, "--d_1", 2)
        self.assert_verified(out, status)

        head, *rows = [line.split() for line in out.strip().split("\n")[2:-1]]
        self.assertEqual(head[:3], ["beta", "learnable_sigma", "seed"])
        self.assertEqual(head[3:], "active units optimal loss largest error".split())
        expected = []
        for beta in ("0.5", "2.0"):
            for learnable in ("True", "False"):
                for seed in ("0", "1"):
                    expected.append([beta, learnable, seed])
        self.assertEqual([row[:3] for row in rows], expected)
        results = list((self.folder / "matrix_VAE").glob("*/result.json"))
        self.assertEqual(len(results), 8)

    def test_awkward_data(self):
        """Fewer rows than dimensions, and more units than the data has modes."""
        for script, argv in (
            (matrix_VAE, ("--d_1", 5)),
            (matrix_CVAE, ("--dim_x", 2, "--dim_y", 4, "--dim_z", 5)),
            (matrix_HVAE_learnable_sigma_2, ("--d_1", 4)),
            (matrix_HVAE_nonlearnable_sigma_2, ("--d_2", 6)),
        ):
            status, out, _ = self.run_script(script, "--num_samples", 3, *argv)
            self.assert_verified(out, status)
            self.assertIn("the data has no more modes", out)

    def test_a_broken_closed_form_fails(self):
        for script, argv, name, broken in BROKEN_FORMS:
            with self.subTest(broken.__name__), mock.patch.object(theory, name, broken):
                status, out, _ = self.run_script(script, *argv, starts=1)
                self.assert_failed(out, status)

    def test_a_closed_form_of_nan_is_refused(self):
        def omega_nan(*args, **flags):
            optimum = vae_optimum(*args, **flags)
            optimum["omega"] = optimum["omega"] * math.nan
            return optimum

        with mock.patch.object(theory, "vae_optimum", omega_nan):
            status, out, err = self.run_script(matrix_VAE)
        self.assertEqual((status, out), (2, ""))
        self.assertIn("not finite", err)

    def test_an_optimiser_that_stops_early_fails(self):
        def stop_at_once(loss, starts, **options):
            return [(starts[0], loss(starts[0]).item())]

        with mock.patch.object(verify, "minimise", stop_at_once):
            status, out, _ = self.run_script(matrix_VAE)
        self.assert_failed(out, status)

    def test_an_optimiser_that_ends_at_nan_fails(self):
        """No units and no result are shown for it, and the verdict is FAILED."""
        def end_at_nan(loss, starts, **options):
            parameters = {name: value * math.nan for name, value in starts[0].items()}
            return [(parameters, math.nan)]

        with mock.patch.object(verify, "minimise", end_at_nan):
            status, out, _ = self.run_script(matrix_VAE)
        self.assert_failed(out, status, "not every minimum is finite$")
        self.assertIn("numbers that are not finite", out)
        self.assertEqual(list(self.folder.rglob("result.json")), [])

    def test_unbounded_and_flat(self):
        """With beta_2 below beta_1 the loss has no bound; with equal ones the optimum is flat."""
        status, out, _ = self.run_script(
            matrix_HVAE_learnable_sigma_1_2, "--beta_2", "0.5,1", "--d_0", 3, "--d_1", 2)
        self.assertEqual(status, 0)
        self.assertIn("VERIFIED", out)
        self.assertIn("Where beta_2 = beta_1, only the loss is compared.", out)
        self.assertRegex(
            out.strip().split("\n")[-1],
            r"^UNBOUNDED: the largest error is \S+; with a learnable Sigma1, the minimisation was "
            r"stopped at the loss -?\d+\.\d{6}$")

        # Each row has sigma_1, the pair "optimal loss -> least loss", and the error.
        table = out.split("holds Sigma1 at sigma_1^2 I")[1].split("\n")[4:-2]
        losses = [float(line.split()[3]) for line in table]
        self.assertEqual(len(losses), 3)
        # The last step down is (beta_2 - beta_1) d_1 log 2.
        self.assertAlmostEqual(losses[-1] - losses[-2], -0.5 * 2 * math.log(2), delta=1e-3)

    def test_refused(self):
        """Exit status 2 and one line that names the flag, before anything is printed."""
        for script, argv, flag in (
            (matrix_VAE, ("--beta", 0), "--beta"),
            (matrix_VAE, ("--sigma", "1/2"), "--sigma"),
            (matrix_VAE, ("--sigma", "1/-2/1/1/1"), "--sigma"),
            (matrix_VAE, ("--num_samples", 0), "--num_samples"),
            (matrix_VAE, ("--d_1", 0), "--d_1"),
            (matrix_VAE, ("--sigma", "1/"), "--sigma"),
            (matrix_VAE, ("--eta_dec", 1e-200), "--eta_dec"),
            (matrix_VAE, ("--sigma", 1e-200, "--learnable_sigma", "false"), "--sigma"),
            (matrix_VAE, ("--d_1", 10**9), "--d_1"),
            (matrix_VAE, ("--num_samples", 10**9), "--num_samples"),
            (matrix_CVAE, ("--eta_enc", 1e200), "--eta_enc"),
            (matrix_CVAE, ("--dim_z", 5000), "--dim_z"),
            (matrix_HVAE_learnable_sigma_2, ("--eta_dec", 1e-200), "--eta_dec"),
            (matrix_HVAE_nonlearnable_sigma_2, ("--sigma_2", 1e-200), "--sigma_2"),
            (matrix_HVAE_learnable_sigma_1_2, ("--eta_dec", 1e-200), "--eta_dec"),
        ):
            with self.subTest(script=script.__name__, argv=argv):
                status, out, err = self.run_script(script, *argv)
                self.assertEqual((status, out, err.count("\n")), (2, "", 1), err)
                self.assertIn("error: --", err)
                self.assertIn(flag, err)


def cases_at_thresholds():
    """(script, its class, flags at which a unit is at its threshold, the unit, its level).

    Flags that are left out, such as eta_dec, are 1 by default. Unit i of a VAE or CVAE has its
    threshold where beta is the variance of mode i. In the HVAEs, all units of z2 whose units of z1
    have collapsed have theirs where (beta_2 / beta_1) eta_dec^2 is sigma_1^2.
    """
    vae = dict(d_0=3, d_1=3)
    cvae = dict(dim_x=2, dim_y=3, dim_z=3)
    hvae = dict(d_0=3, d_1=3, d_2=3)
    A = matrix_VAE.VAE(matrix_VAE.Flags(**vae)).A
    beta_of_vae = theory.spectrum(A)[1].item()
    moment = matrix_CVAE.CVAE(matrix_CVAE.Flags(**cvae)).moment
    beta_of_cvae = theory.spectrum(theory.moment_given_x(moment, 2))[1].item()
    fixed = dict(learnable_sigma=False)
    learnable = matrix_HVAE_learnable_sigma_2
    nonlearnable = matrix_HVAE_nonlearnable_sigma_2
    return (
        (matrix_VAE, matrix_VAE.VAE, vae | dict(beta=beta_of_vae), 2, ""),
        (matrix_VAE, matrix_VAE.VAE, vae | fixed | dict(beta=beta_of_vae), 2, ""),
        (matrix_CVAE, matrix_CVAE.CVAE, cvae | dict(beta=beta_of_cvae), 2, ""),
        (learnable, learnable.HVAE, hvae | dict(beta_2=1.0), 3, "_2"),
        (learnable, learnable.HVAE, hvae | dict(beta_1=0.5, beta_2=2.0, sigma_1=2.0), 2, "_2"),
        (nonlearnable, nonlearnable.HVAE, hvae | dict(beta_2=1.0), 3, "_2"),
    )


AT_THRESHOLDS = cases_at_thresholds()


class Thresholds(MatrixScripts):
    """The verdicts of the matrix scripts at thresholds of collapse, and next to them."""

    def argv(self, flags):
        """Flags as arguments. All digits of a threshold matter."""
        arguments = []
        for name, value in flags.items():
            arguments += [f"--{name}", repr(value)]
        return arguments

    def run_at(self, script, Problem, flags, changes):
        """Run a script whose minimisation ends at the closed form with changed singular values.

        changes: {name: (unit, number to add)}
        """
        problem = Problem(script.Flags(**flags))
        units = {"sigma_2": torch.ones(5, dtype=torch.float64)} | problem.predicted()
        for name, (unit, number) in changes.items():
            units[name] = units[name].clone()
            units[name][unit - 1] += number
        parameters = test_theory.aligned(problem, units)

        def minimise(loss, starts, **options):
            return [(parameters, loss(parameters).item())]

        with mock.patch.object(verify, "minimise", minimise):
            return self.run_script(script, *self.argv(flags))

    def along_the_valley(self, Problem, script, flags, unit, level, lambda_):
        """Changes to lambda and omega of a unit at its threshold, with the best omega for lambda.

        That is omega = s lambda / (lambda^2 + 1), where z has the std 1 and describes a mode with
        the std s. For z2 it is a mode of z1, whose std is sigma_1.
        """
        f = script.Flags(**flags)
        if level == "_2":
            std = f.sigma_1
        else:
            std = f.beta**0.5 * f.eta_dec
        omega = std * lambda_ / (lambda_**2 + 1)
        return {f"lambda{level}": (unit, lambda_), f"omega{level}": (unit, omega)}

    def test_minimisation_at_a_threshold(self):
        """The verdict is VERIFIED, whether or not rounding errors hide the singular values."""
        for script, _, flags, _, _ in AT_THRESHOLDS:
            with self.subTest(script=script.__name__, flags=flags):
                status, out, _ = self.run_script(script, *self.argv(flags), starts=1)
                self.assert_verified(out, status)

    def test_minimisation_next_to_a_threshold(self):
        """1e-6 below and above it, the loss determines the singular values."""
        for case, share in ((0, 1 - 1e-6), (1, 1 + 1e-6), (3, 1 - 1e-6), (3, 1 + 1e-6)):
            script, _, flags, _, _ = AT_THRESHOLDS[case]
            beta = "beta_2" if "beta_2" in flags else "beta"
            near = flags | {beta: flags[beta] * share}
            with self.subTest(script=script.__name__, flags=near):
                status, out, _ = self.run_script(script, *self.argv(near), starts=1)
                self.assert_verified(out, status)
                self.assertNotIn("do not count", out)

    def test_an_error_that_rounding_hides(self):
        """An error of 1e-4 costs about 1e-16 nats. It does not count, and a sentence says so."""
        for script, Problem, flags, unit, level in AT_THRESHOLDS:
            changes = self.along_the_valley(Problem, script, flags, unit, level, 1e-4)
            with self.subTest(script=script.__name__, flags=flags):
                status, out, _ = self.run_at(script, Problem, flags, changes)
                self.assert_verified(out, status)
                self.assertIn(
                    f"\nunit {unit} of z{level[1:]} is at the threshold of collapse, so the loss "
                    "hardly depends on its singular values: errors of up to 0.000",
                    out,
                )
                self.assertIn("Errors that do not count change the loss by less than its ", out)

                [path] = (self.folder / script.__name__).glob("*/result.json")
                result = json.loads(path.read_text(encoding="utf-8"), parse_constant=self.fail)
                path.unlink()
                self.assertLessEqual(result["max_error"], 1e-6)
                self.assertGreater(result["theory"]["errors"][f"omega{level}"], 0.9e-4)
                comparison = verify.Comparison(**result["theory"])
                named = [(deviation.name, deviation.unit) for deviation in comparison.deviations]
                self.assertEqual(named, [(f"lambda{level}", unit), (f"omega{level}", unit)])
                for deviation in comparison.deviations:
                    self.assertLess(deviation.cost, 2e-15)
                    self.assertLess(deviation.curvature, 1e-12)

    def test_a_grid_names_the_setting(self):
        """In a table of many settings, each sentence begins with its setting."""
        argv = ("--beta_2", "1.0,2.0", "--d_0", 2, "--d_1", 2, "--d_2", 2)
        deviations = []
        for name in ("lambda_2", "omega_2"):
            deviation = verify.Deviation(
                name=name, unit=2, error=1e-4, cost=1e-16, curvature=0.0, to_threshold=0.0
            )
            deviations.append(deviation)

        def two_deviations(predicted, trained, limits):
            return deviations

        with mock.patch.object(verify, "deviations_of", two_deviations):
            status, out, _ = self.run_script(matrix_HVAE_learnable_sigma_2, *argv, starts=1)
        self.assert_verified(out, status)
        for beta_2 in (1.0, 2.0):
            self.assertIn(f"\nbeta_2={beta_2},seed=0: unit 2 of z2 is at the threshold", out)

    def test_an_error_that_rounding_does_not_hide(self):
        """FAILED: a larger error, an error away from the threshold, and a loss that is too large.

        The last one has the singular value lambda at a good place but not omega.
        """
        for script, Problem, flags, unit, level in AT_THRESHOLDS:
            larger = self.along_the_valley(Problem, script, flags, unit, level, 1e-2)
            first_level = "_1" if level else ""
            for changes in (
                larger,
                {f"lambda{first_level}": (1, 3e-6)},
                {f"omega{level}": (1, -3e-6)},
                {f"lambda{level}": (unit, 1e-5)},
            ):
                with self.subTest(script=script.__name__, flags=flags, changes=changes):
                    status, out, _ = self.run_at(script, Problem, flags, changes)
                    self.assert_failed(out, status)


class WhatTheLossDetermines(unittest.TestCase):
    """The cost of a singular value, and the curvature of the loss, against exact losses."""

    def setUp(self):
        self.random = torch.Generator().manual_seed(0)

    def cost(self, optimum, name, values):
        """The sum of what the values (d,) of a singular value cost, in nats."""
        names, coordinates = verify._coordinates(optimum)
        held = names.index(name)
        at = coordinates[held].clone()
        count = min(len(at), len(values))
        at[:count] = values[:count]

        def loss(point):
            return optimum.unit_loss(dict(zip(names, point)))

        least = verify.least_unit_loss(loss, coordinates, held, at)
        return (least - loss(coordinates)).sum().item()

    def gap_with_held_singular_values(self, problem, weight, values):
        """The least loss of all weights of which one has these singular values, minus L*.

        This weight is A S B with rotations A and B. For an encoder it acts on whitened data.
        """
        def whole(p):
            p = dict(p)
            A = p.pop("A")
            B = p.pop("B")
            rotations = [torch.matrix_exp(matrix - matrix.T) for matrix in (A, B)]
            S = test_theory.diagonal(values, len(A), len(B))
            matrix = rotations[0] @ S @ rotations[1]
            if weight.startswith("W"):
                matrix = matrix @ torch.linalg.inv(theory.root(problem.A))
            return p | {weight: matrix}

        least = math.inf
        for _ in range(2):
            start = problem.start(lambda *shape: test_theory.draw(self.random, *shape))
            rows, columns = start.pop(weight).shape
            start["A"] = test_theory.draw(self.random, rows, rows)
            start["B"] = test_theory.draw(self.random, columns, columns)
            _, loss = verify._lbfgs(lambda p: problem.loss(whole(p)), start, blocks=10)
            least = min(least, loss)
        return least - problem.predicted()["loss"].item()

    def test_cost_by_brute_force(self):
        """The least loss with held singular values exceeds L* by the sum of their costs."""
        vae = matrix_VAE.VAE(matrix_VAE.Flags(beta=0.7, eta_enc=1.3, eta_dec=0.8, d_0=3, d_1=3))
        fixed_vae = matrix_VAE.VAE(
            matrix_VAE.Flags(beta=0.7, eta_dec=0.8, d_0=3, d_1=2, learnable_sigma=False, sigma=0.6)
        )
        cvae = matrix_CVAE.CVAE(matrix_CVAE.Flags(beta=0.7, dim_x=1, dim_y=3, dim_z=2))
        shared = dict(beta_1=0.7, eta_enc=1.4, eta_dec=0.7, sigma_1=0.8, d_0=3, d_1=3)
        flags = matrix_HVAE_learnable_sigma_2.Flags(**shared, beta_2=1.3, d_2=3)
        hvae = matrix_HVAE_learnable_sigma_2.HVAE(flags)
        flags = matrix_HVAE_nonlearnable_sigma_2.Flags(**shared, beta_2=1.3, sigma_2=0.6, d_2=2)
        fixed_hvae = matrix_HVAE_nonlearnable_sigma_2.HVAE(flags)
        for problem, weight, name, increase in (
            (vae, "U", "omega", 0.1),
            (vae, "W", "lambda", 0.1),
            (fixed_vae, "U", "omega", 0.1),
            (cvae, "U1", "omega", 0.1),
            # z1 has so much variance then that a collapsed unit of z2 becomes active.
            (hvae, "W1", "lambda_1", 1.0),
            (fixed_hvae, "U2", "omega_2", 0.1),
        ):
            optimum = problem.predicted()
            factors = (0.5 * test_theory.draw(self.random, len(optimum[name]))).exp()
            values = ((optimum[name] + increase) * factors).sort(descending=True).values
            with self.subTest(type(problem).__module__, name=name):
                cost = self.cost(optimum, name, values)
                gap = self.gap_with_held_singular_values(problem, weight, values)
                self.assertGreater(cost, 1e-3)
                self.assertAlmostEqual(gap, cost, places=7)

    def test_the_gap_is_at_least_the_cost(self):
        """For random weights, which share no singular vector with the optimum."""
        for problem in test_theory.problems():
            optimum = problem.predicted()
            parameters = problem.start(lambda *shape: test_theory.draw(self.random, *shape))
            loss = problem.loss(parameters).item()
            trained = verify.compare(optimum, problem.units(parameters), loss).trained
            for name in verify.singular_values_of(optimum.coordinates):
                values = torch.tensor(trained[name], dtype=torch.float64)
                with self.subTest(type(problem).__module__, name=name):
                    cost = self.cost(optimum, name, values)
                    self.assertGreater(cost, 0)
                    self.assertGreater(loss - optimum["loss"].item(), cost)

    def test_curvature_by_finite_differences(self):
        """The curvature from differences of the exact loss of a whole model, a unit at a time."""
        step = 1e-3
        for problem in test_theory.problems():
            optimum = problem.predicted()
            names = list(optimum.coordinates)
            d = len(optimum["theta"])
            if any(len(optimum[name]) != d for name in names):
                continue

            def exact(unit, shifts):
                units = {"sigma_2": torch.ones(5, dtype=torch.float64)} | optimum
                for name, shift in zip(names, shifts):
                    units[name] = units[name].clone()
                    units[name][unit] += shift
                return problem.loss(test_theory.aligned(problem, units)).item()

            for unit in range(d):
                hessian = self.finite_differences(lambda shifts: exact(unit, shifts), names, step)
                for i, name in enumerate(names):
                    # The inverse of the Hessian has 1 / curvature on its diagonal.
                    expected = 1 / torch.linalg.inv(hessian)[i, i].item()
                    curvature = self.curvature(optimum, name)[unit]
                    with self.subTest(type(problem).__module__, unit=unit, name=name):
                        self.assertAlmostEqual(curvature / expected, 1, delta=1e-3)

    def finite_differences(self, function, names, step):
        """The Hessian of a function of as many numbers as names, at 0."""
        k = len(names)
        shifts = step * torch.eye(k, dtype=torch.float64)
        hessian = torch.empty(k, k, dtype=torch.float64)
        for i in range(k):
            for j in range(k):
                corners = [
                    sign_i * sign_j * function(sign_i * shifts[i] + sign_j * shifts[j])
                    for sign_i in (1, -1) for sign_j in (1, -1)
                ]
                hessian[i, j] = sum(corners) / (4 * step**2)
        return hessian

    def curvature(self, optimum, name):
        """verify.unit_curvature as a list."""
        names, coordinates = verify._coordinates(optimum)

        def loss(point):
            return optimum.unit_loss(dict(zip(names, point)))

        return verify.unit_curvature(loss, coordinates, names.index(name)).tolist()

    def test_curvature_and_cost_of_omega_by_hand(self):
        """With the best lambda and sigma for omega, and u = omega^2 + beta c^2, theorem 1's loss is

            theta^2 beta c^2 / (2 eta_dec^2 u) + beta log(u) / 2 + const

        Its second derivative at the minimum u = theta^2 / eta_enc^2 is 2 beta omega^2 / u^2.
        """
        beta, eta_enc, eta_dec = 1.7, 1.3, 0.6
        theta = torch.tensor([3.0, 1.2, 0.8], dtype=torch.float64)
        optimum = theory.vae_optimum(theta, 3, beta, eta_enc, eta_dec)
        omega = optimum["omega"]
        self.assertTrue((omega > 0).all())
        u = (theta / eta_enc)**2
        expected = 2 * beta * omega**2 / u**2
        curvature = torch.tensor(self.curvature(optimum, "omega"), dtype=torch.float64)
        torch.testing.assert_close(curvature, expected)

        def least(omega):
            c_squared = (eta_dec / eta_enc)**2
            u = omega**2 + beta * c_squared
            squared_error = theta**2 * beta * c_squared / u
            return squared_error / (2 * eta_dec**2) + beta * u.log() / 2

        changed = omega * torch.tensor([1.1, 0.3, 2.0], dtype=torch.float64)
        expected = (least(changed) - least(omega)).sum().item()
        self.assertAlmostEqual(self.cost(optimum, "omega", changed), expected, places=10)

    def test_curvature_at_a_threshold(self):
        """It is 0 for lambda and omega of the unit there, and above 0 for all other units."""
        for script, Problem, flags, unit, level in AT_THRESHOLDS:
            optimum = Problem(script.Flags(**flags)).predicted()
            at_threshold = (optimum[f"collapse{level}"] / optimum.beta - 1).abs() < 1e-12
            self.assertTrue(at_threshold[unit - 1])
            for name in (f"lambda{level}", f"omega{level}"):
                for is_flat, curvature in zip(at_threshold, self.curvature(optimum, name)):
                    with self.subTest(script=script.__name__, flags=flags, name=name):
                        if is_flat:
                            self.assertLess(abs(curvature), 1e-12)
                        else:
                            self.assertGreater(curvature, 1e-2)


class TrainedModels(unittest.TestCase):
    """The verdict about a trained model: which errors of singular values count.

    With beta = eta_enc = eta_dec = 1, unit 2 of the VAE below is near its threshold theta = 1.
    """

    THETA = (3.0, 1.01, 0.5)

    def comparison(self, gap=0.001, optimum=None, **changes):
        """The Comparison of an optimum with itself after changes {name: (unit, value)}."""
        if optimum is None:
            theta = torch.tensor(self.THETA, dtype=torch.float64)
            optimum = theory.vae_optimum(theta, 3, 1.0, 1.0, 1.0)
        trained = {name: optimum[name].clone() for name in ("lambda", "omega", "information")}
        for name, (unit, value) in changes.items():
            trained[name][unit - 1] = value
        return verify.compare(optimum, trained, optimum["loss"].item() + gap)

    def test_an_error_near_a_threshold_does_not_count(self):
        """omega falls from 0.1418 to 0.06, which is 2.9 % of the largest omega, sqrt(8).

        By the equation above, with u = omega^2 + 1, it costs 6.7e-05 nats.
        """
        def least(u):
            return 1.01**2 / (2 * u) + math.log(u) / 2

        comparison = self.comparison(omega=(2, 0.06))
        [deviation] = comparison.deviations
        cost = least(1 + 0.06**2) - least(1.01**2)
        self.assertAlmostEqual(deviation.cost, cost, places=12)
        self.assertLess(cost, 1e-4)
        self.assertEqual((deviation.name, deviation.unit), ("omega", 2))
        self.assertAlmostEqual(deviation.to_threshold, 1 - 1 / 1.01**2, places=12)

        self.assertEqual(comparison.disagreements(), [])
        # The curvature is in shares of sqrt(8): 8 times 2 omega^2 / theta^4 = 2 * 0.0201 / 1.0406.
        self.assertEqual(comparison.notes(), [
            "unit 2 of z is near the threshold of collapse, so the loss hardly depends on its "
            "singular values: errors of up to 0.082 (2.9% of the largest one) cost at most "
            f"{cost:.2g} nats (curvature 0.31 nats), so they do not count"
        ])

    def test_it_counts_where_the_gap_is_large(self):
        self.assertEqual(self.comparison(gap=0.0099, omega=(2, 0.06)).disagreements(), [])
        [sentence] = self.comparison(gap=0.0101, omega=(2, 0.06)).disagreements()
        self.assertIn("the largest error of a singular value is 2.9% of", sentence)

    def test_an_error_of_the_same_size_elsewhere_counts(self):
        """Units 1 and 3 are far from their thresholds. Unit 2 is off, too, and does not count."""
        for unit, value in ((1, 8**0.5 + 0.1), (3, 0.1)):
            comparison = self.comparison(omega=(unit, value))
            comparison.deviations += self.comparison(omega=(2, 0.02)).deviations
            [sentence] = comparison.disagreements()
            self.assertIn(f"is {0.1 / 8**0.5:.1%} of the largest", sentence)

    def test_a_large_error_near_a_threshold_counts(self):
        """An omega of 0.4 in place of 0.14 costs 0.004 nats."""
        [sentence] = self.comparison(omega=(2, 0.4)).disagreements()
        self.assertIn(f"is {(0.4 - 0.0201**0.5) / 8**0.5:.1%} of the largest", sentence)

    def test_wrong_units_count(self):
        """The number of active units is compared as before."""
        [sentence] = self.comparison(information=(1, 0.0)).disagreements()
        self.assertEqual(sentence, "unit 1 of z is collapsed, but predicted to be active")

    def test_a_flat_loss_far_from_thresholds(self):
        """At beta = 0.01, an error of 4 % of the strongest unit costs about 0.01 * 0.04^2 nats.

        To the next order of the equation above, this is 0.01 (log(1.04)^2 - 2 log(1.04)^3 / 3).
        """
        theta = torch.tensor([3.0, 2.0], dtype=torch.float64)
        optimum = theory.vae_optimum(theta, 2, 0.01, 1.0, 1.0)
        omega = optimum["omega"][0].item()
        comparison = self.comparison(optimum=optimum, omega=(1, 1.04 * omega))
        self.assertEqual(comparison.disagreements(), [])
        [note] = comparison.notes()
        self.assertRegex(note, "^the loss hardly depends on the singular values of unit 1 of z: ")
        log = math.log(1.04)
        cost = 0.01 * (log**2 - 2 / 3 * log**3)
        self.assertAlmostEqual(comparison.deviations[0].cost / cost, 1, delta=0.01)

    def test_without_the_loss_of_a_unit(self):
        """Every error above 2 % counts where the closed form has no loss of a unit."""
        theta = torch.tensor(self.THETA, dtype=torch.float64)
        plain = dict(theory.vae_optimum(theta, 3, 1.0, 1.0, 1.0))
        comparison = self.comparison(optimum=plain, omega=(2, 0.06))
        self.assertIsNone(comparison.deviations[0].cost)
        self.assertEqual(len(comparison.disagreements()), 1)

    def test_files(self):
        """A Comparison can be read back. Without the new parts, each error above 2 % counts."""
        comparison = self.comparison(omega=(2, 0.06))
        saved = json.loads(json.dumps(dataclasses.asdict(comparison), allow_nan=False))
        self.assertEqual(verify.Comparison(**saved), comparison)
        self.assertEqual(verify.Comparison(**saved).notes(), comparison.notes())

        del saved["limits"], saved["deviations"]
        earlier = verify.Comparison(**saved)
        self.assertEqual(earlier.notes(), [])
        [sentence] = earlier.disagreements()
        self.assertIn("is 2.9% of the largest predicted one, and at most 2% is allowed", sentence)
        with self.assertRaises(TypeError):
            verify.Comparison(**saved, deviations=[{"name": "omega"}])


class Notes(unittest.TestCase):
    def notes(self, predicted):
        return verify.compare(predicted, {}, 0.0).notes()

    def test_tied_modes(self):
        theta = torch.tensor([2.0, 2.0, 0.5], dtype=torch.float64)
        notes = self.notes(theory.vae_optimum(theta, 3, 1.0, 1.0, 1.0))
        self.assertIn("units 1 and 2 have the same theta", notes[0])

    def test_z2_that_describes_noise(self):
        theta = torch.tensor([2.0, 2.0, 0.5], dtype=torch.float64)
        notes = self.notes(theory.hvae_optimum(theta, 3, 3, 2.0, 1.0, 1.0, 1.0, 1.0))
        self.assertIn("z2 describes only the noise of z1", notes[-1])


if __name__ == "__main__":
    unittest.main()
