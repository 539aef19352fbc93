"""verify.py: the verdicts of the matrix scripts, and the notes of a comparison."""
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
from tests import small

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


class Verdicts(small.InFolder):
    def run_script(self, script, *argv):
        """Run a matrix script with two random starts: (exit status, stdout, stderr)."""
        with mock.patch.object(verify, "STARTS", 2):
            return small.call(script.main, "--out_dir", self.folder, *argv)

    def assert_verified(self, out, status):
        verdict = out.strip().split("\n")[-1]
        self.assertRegex(verdict, r"^VERIFIED: the largest error is \d\.\de-\d\d$")
        self.assertLessEqual(float(verdict.split()[-1]), 1e-6)
        self.assertEqual(status, 0)

    def assert_failed(self, out, status, words="the largest error is .* 1e-06 is allowed$"):
        self.assertRegex(out.strip().split("\n")[-1], f"^FAILED: {words}")
        self.assertEqual(status, 1)

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
                status, out, _ = self.run_script(script, *argv)
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
