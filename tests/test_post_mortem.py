"""post_mortem.py: the headroom of a model of the user's own, from files with its residuals.

It is compared with numpy and with the headroom of a script.
"""
import json
import unittest
from unittest import mock

import numpy as np

import arrays
import headroom
import MNIST_VAE_Linear_learnable_sigma
import theory
import training
from tests import small
from tests.test_predict_collapse import PNG, Case, newest


class PostMortems(Case):
    """--residual: the headroom of a model of the user's own."""

    def examine(self, *argv):
        """(contents of headroom.json, stdout)."""
        status, out, err = self.call(*argv)
        self.assertEqual(status, 0, err)
        path = newest(self.folder / "runs", "headroom.json")
        self.assertTrue((path.parent / "headroom.png").read_bytes().startswith(PNG))
        return json.loads(path.read_text(encoding="utf-8")), out

    def test_by_hand(self):
        """The headroom by numpy's regression, and the held-out gain row by row."""
        beta = 0.6
        eta_dec = 0.7
        k = 3
        u = np.concatenate([self.x, np.ones((300, 1))], axis=1)
        with mock.patch("arrays.CHUNK", 38):
            saved, out = self.examine(
                "--x", self.save("u.npy", self.x),
                "--residual", self.save("r.npy", self.y.reshape(300, 2, 2)),
                "--eta_dec", eta_dec,
                "--beta", beta,
                "--collapsed", k,
            )

        # 1. All rows.
        fitted = u @ np.linalg.lstsq(u, self.y, rcond=None)[0]
        tau = np.linalg.svd(fitted / 300**0.5, compute_uv=False)**2
        level = beta * eta_dec**2
        np.testing.assert_allclose(saved["tau"], tau[:k], rtol=1e-9)
        self.assertAlmostEqual(saved["level"], level)
        ratio = np.maximum(tau[:k] / level, 1)
        gain = beta / 2 * (ratio - 1 - np.log(ratio)).sum()
        self.assertAlmostEqual(saved["headroom"], gain, places=9)
        self.assertGreater((ratio > 1).sum(), 1)

        # 2. Units from one half of the rows, on the other half. The best ridge counts.
        held_out = []
        for ridge in (0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
            held_out.append(self.held_out_gain(u, self.y, ridge, k, beta, eta_dec))
        self.assertAlmostEqual(saved["held_out"], max(held_out), places=8)
        self.assertGreater(saved["held_out"], 0.01)

        # 3. Units with any encoder, which may read the residual itself.
        any_tau = np.linalg.svd(self.y / 300**0.5, compute_uv=False)**2
        np.testing.assert_allclose(saved["tau_any"], any_tau[:k], rtol=1e-9)
        any_ratio = np.maximum(any_tau[:k] / level, 1)
        any_gain = beta / 2 * (any_ratio - 1 - np.log(any_ratio)).sum()
        self.assertAlmostEqual(saved["headroom_any"], any_gain, places=9)
        self.assertGreater(any_gain, gain + 0.1)
        any_held_out = self.held_out_gain(self.y, self.y, 0, k, beta, eta_dec)
        self.assertAlmostEqual(saved["held_out_any"], any_held_out, places=8)
        self.assertIn(f"With any encoder the headroom is {any_gain:.4f} nats per row", out)
        self.assertTrue(
            out.startswith(
                "\nWith beta = 0.6 and eta_dec = 0.7, 3 units collapsed because of training: "
                f"reviving them would lower the loss by at least {saved['headroom']:.2g} nats."
            ),
            out,
        )

        # 4. The table. The gain of one unit is its term of the sum.
        self.assertIn(
            "unit tau tau / threshold gain (nats) tau, any encoder gain, any encoder",
            " ".join(out.split()),
        )
        term = beta / 2 * (ratio[0] - 1 - np.log(ratio[0]))
        any_term = beta / 2 * (any_ratio[0] - 1 - np.log(any_ratio[0]))
        self.assertRegex(
            out,
            rf"\n +1 +{tau[0]:.4f} +{ratio[0]:.4f} +{term:.4f} +{any_tau[0]:.4f} +{any_term:.4f}",
        )

    def held_out_gain(self, u, r, ridge, k, beta, eta_dec):
        """The gain of k units that are fitted on one half of the rows, on the other half."""
        halves = arrays.halves_of(len(u), np.random.default_rng(0))
        gains = []
        for half, other in (halves, halves[::-1]):
            gains.append(self.gain_on_rows(u, r, half, other, ridge, k, beta, eta_dec))
        return sum(gains) / 2

    def gain_on_rows(self, u, r, half, other, ridge, k, beta, eta_dec):
        """The gain of k units that are fitted on the rows `half`, on the rows `other`."""
        level = beta * eta_dec**2
        half_u = u[half]
        half_r = r[half]
        other_u = u[other]
        left = r[other]

        A = half_u.T @ half_u / len(half_u)
        C = half_r.T @ half_u / len(half_u)
        regression = np.linalg.solve(A + ridge * np.trace(A) * np.eye(len(A)), C.T)
        sizes, directions = np.linalg.eigh(C @ regression)

        # In stds of its prior, z is z_mean plus noise of the variance noise_share.
        total = 0
        for i in range(len(sizes) - 1, len(sizes) - 1 - k, -1):
            direction = directions[:, i]
            noise_share = min(1, level / sizes[i])
            predicted = other_u @ regression @ direction
            z_mean = (1 - noise_share)**0.5 * predicted / sizes[i]**0.5
            decoder = max(0, sizes[i] - level)**0.5 * direction

            still_left = left - np.outer(z_mean, decoder)
            fall = (left**2).sum(1) - (still_left**2).sum(1) - noise_share * (decoder**2).sum()
            kl = (z_mean**2 + noise_share - 1 - np.log(noise_share)) / 2
            total += (fall / (2 * eta_dec**2) - beta * kl).mean()
            left = still_left
        return total

    def test_verdicts(self):
        random = np.random.default_rng(1)
        u = random.standard_normal((200, 30))
        noise = random.standard_normal((200, 8))
        x = self.save("u.npy", u)

        # 1. 31 columns fit 200 rows of noise by chance.
        r = self.save("noise.npy", noise)
        saved, out = self.examine("--x", x, "--residual", r, "--eta_dec", 0.3, "--collapsed", 4)
        self.assertGreater(saved["headroom"], 0.01)
        self.assertLess(saved["held_out"], 0.01)
        self.assertIn(
            "4 units collapsed: there are too few rows to decide whether because of the objective "
            "or of training",
            out,
        )

        # 2. The objective. Noise of variance 1 has no use even for any encoder.
        saved, out = self.examine("--x", x, "--residual", r, "--eta_dec", 1.5, "--collapsed", 4)
        for figure in ("headroom", "held_out", "headroom_any", "held_out_any"):
            self.assertEqual(saved[figure], 0)
        self.assertIn("4 units collapsed because of the objective.", out)

        # 3. Near the threshold, 200 rows are too few for any encoder, but not for a linear one.
        saved, out = self.examine("--x", x, "--residual", r, "--eta_dec", 1, "--collapsed", 4)
        self.assertEqual((saved["headroom"], saved["held_out"]), (0, 0))
        self.assertGreater(saved["headroom_any"], 0.01)
        self.assertLess(saved["held_out_any"], 0.01)
        self.assertIn(
            "4 units collapsed: with a linear encoder, reviving them would not lower the loss; "
            "there are too few rows to decide whether it would with a richer encoder.",
            out,
        )

        # 4. A residual that no linear map of u explains, but u determines.
        few = random.standard_normal((2000, 4))
        squares = self.save("squares.npy", 2 * (few**2 - 1))
        saved, out = self.examine(
            "--x", self.save("few.npy", few), "--residual", squares, "--eta_dec", 1.8,
            "--collapsed", 2)
        self.assertEqual((saved["headroom"], saved["held_out"]), (0, 0))
        self.assertRegex(out, "2 units collapsed: .* with a richer encoder it would")

        # 5. Both causes, in a list of betas.
        r = self.save("r.npy", noise + 3 * u[:, :8])
        _, out = self.examine("--x", x, "--residual", r, "--collapsed", 1, "--beta", "0.5,50")
        self.assertRegex(
            out,
            r"(?s)With beta = 0.5 and eta_dec = 1, 1 unit collapsed because of training: .*"
            r"With beta = 50 and eta_dec = 1, 1 unit collapsed because of the objective\.")

    def test_rare_columns_are_not_relied_on(self):
        """A column may be tiny in a row of one half, and large in a row of the other.

        A fit on the first half would then give an enormous z to the row of the other half.
        """
        random = np.random.default_rng(1)
        u = random.standard_normal((400, 3))
        noise = random.standard_normal((400, 2))
        rare = np.zeros((400, 1))
        rare[10] = 1e-4
        rare[11] = 1
        x = self.save("u.npy", np.concatenate([u, rare], 1))
        r = self.save("r.npy", noise + 3 * u[:, :2])
        saved, _ = self.examine("--x", x, "--residual", r, "--collapsed", 2)
        without, _ = self.examine(
            "--x", self.save("u.npy", u), "--residual", r, "--collapsed", 2)
        self.assertAlmostEqual(saved["held_out"], without["held_out"], delta=0.02)

    def test_like_a_script(self):
        """A script reports the same headroom for its own model as two arrays give."""
        data = small.digit_data(300, 20)
        f = MNIST_VAE_Linear_learnable_sigma.Flags(device="cpu", d_1=4, eta_dec=0.5)
        model = training.build(MNIST_VAE_Linear_learnable_sigma.VAE, f, data).eval()
        [moments] = headroom.residual_moments(model, f, data).values()
        [part] = moments.parts
        objective = {"beta": 1.0, "weight": 1, "std": 0.5}
        tau = theory.spectrum(headroom.linear_part(part.cross, part.moment))
        gain = headroom.gain_of_units(tau, 4, **objective)
        any_gain = headroom.gain_of_units(theory.spectrum(part.squares), 4, **objective)

        [x] = data.train
        residual = x - model.U(model.W(x)).detach()
        saved, _ = self.examine(
            "--x", self.save("u.npy", x.numpy()),
            "--residual", self.save("r.npy", residual.numpy()),
            "--eta_dec", 0.5,
            "--collapsed", 4,
        )
        self.assertGreater(gain, 0.1)
        self.assertAlmostEqual(saved["headroom"], gain, places=6)
        self.assertAlmostEqual(saved["headroom_any"], any_gain, places=6)

    def test_bernoulli_by_hand(self):
        """rho_1, the bound of Boehning and the held-out figures of a Bernoulli decoder by numpy."""
        random = np.random.default_rng(5)
        u = random.standard_normal((301, 3))
        logits = 4 * u @ random.standard_normal((3, 4)) + np.abs(u[:, :1])
        x = (random.random((301, 4)) < 1 / (1 + np.exp(-logits))).astype(float)
        # The model has learned only a tenth of each logit.
        p = 1 / (1 + np.exp(-logits / 10))
        r = x - p
        h = (p * (1 - p)).mean(0)
        beta = 0.3
        k = 2
        argv = [
            "--x", self.save("u.npy", u), "--residual", self.save("r.npy", r),
            "--likelihood", "bernoulli", "--beta", beta, "--collapsed", k,
        ]
        with mock.patch("arrays.CHUNK", 38):
            saved, out = self.examine(*argv, "--fisher", self.save("h.npy", p * (1 - p)))

        # 1. rho of T and of F.
        u1 = np.concatenate([u, np.ones((301, 1))], 1)
        fitted = u1 @ np.linalg.lstsq(u1, r, rcond=None)[0]
        rho = np.linalg.svd(fitted / np.sqrt(301 * h), compute_uv=False)**2
        any_rho = np.linalg.svd(r / np.sqrt(301 * h), compute_uv=False)**2
        np.testing.assert_allclose(saved["tau"], rho[:k], rtol=1e-9)
        np.testing.assert_allclose(saved["tau_any"], any_rho[:k], rtol=1e-9)
        self.assertEqual((saved["level"], saved["likelihood"]), (beta, "bernoulli"))

        # 2. The guaranteed gains are those of a Gaussian of variance 4 with the residual 4 r.
        for name, matrix in (("headroom", fitted), ("headroom_any", r)):
            tau = np.linalg.svd(matrix / 301**0.5, compute_uv=False)**2
            ratio = np.maximum(4 * tau[:k] / beta, 1)
            gain = beta / 2 * (ratio - 1 - np.log(ratio)).sum()
            self.assertGreater(gain, 0)
            self.assertAlmostEqual(saved[name], gain, places=9)
        ridges = (0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
        gains = [self.held_out_gain(u1, 4 * r, ridge, k, beta, 2) for ridge in ridges]
        self.assertAlmostEqual(saved["held_out"], max(gains), places=8)
        any_gain = self.held_out_gain(4 * r, 4 * r, 0, k, beta, 2)
        self.assertAlmostEqual(saved["held_out_any"], any_gain, places=8)

        # 3. The held-out rho_1 of F, with the H of all rows.
        halves = arrays.halves_of(301, np.random.default_rng(0))
        ratios = []
        for half, other in (halves, halves[::-1]):
            _, _, directions = np.linalg.svd(r[half] / np.sqrt(h))
            ratios.append(((r[other] / np.sqrt(h) @ directions[0])**2).mean())
        self.assertAlmostEqual(saved["held_out_rho_1_any"], sum(ratios) / 2, places=9)
        # That of T has a ridge of 1e-5 against rare columns.
        self.assertAlmostEqual(
            saved["held_out_rho_1"], self.held_out_rho(u1, r, h, halves), delta=1e-4)

        # 4. In words, and the same from the means of the information, as a row or as a vector.
        self.assertTrue(
            out.startswith(f"\nWith beta = 0.3 and a Bernoulli decoder, {saved['verdict']}."), out)
        self.assertRegex(out, rf"\n +rho_1 +{rho[0]:.4f} +{any_rho[0]:.4f}\n")
        for fisher in (h, h[None], np.float32(h)):
            other, _ = self.examine(*argv, "--fisher", self.save("mean.npy", fisher))
            np.testing.assert_allclose(other["tau_any"], saved["tau_any"], rtol=1e-6)

    def held_out_rho(self, u, r, h, halves):
        """The part of r that a regression from one half explains on the other, in one direction."""
        ratios = []
        for half, other in (halves, halves[::-1]):
            regression = np.linalg.lstsq(u[half], r[half], rcond=None)[0]
            _, _, directions = np.linalg.svd(u[half] @ regression / np.sqrt(h))
            target = r[other] / np.sqrt(h) @ directions[0]
            predicted = u[other] @ regression / np.sqrt(h) @ directions[0]
            ratios.append((target**2).mean() - ((target - predicted)**2).mean())
        return sum(ratios) / 2

    def test_verdicts_on_bernoulli(self):
        random = np.random.default_rng(6)
        u = random.standard_normal((2000, 3))
        u_path = self.save("u.npy", u)
        half = self.save("half.npy", np.full(6, 0.25))

        def verdict(logits, beta):
            # The model says 1/2 for each pixel.
            r = (random.random((len(u), 6)) < 1 / (1 + np.exp(-logits))) - 0.5
            saved, _ = self.examine(
                "--x", u_path, "--residual", self.save("r.npy", r), "--fisher", half,
                "--likelihood", "bernoulli", "--collapsed", 3, "--beta", beta)
            return saved["verdict"]

        ones = np.ones((1, 6))
        self.assertIn("because of training", verdict(2 * u[:, :1] * ones, 1))
        self.assertIn("because of the objective", verdict(2 * u[:, :1] * ones, 50))
        self.assertRegex(
            verdict(2 * (u[:, :1]**2 - 1) * ones, 2),
            "with a richer encoder .* would lower the loss by at least",
        )
        # Noise has a rho of about 1. Rows decide at 1.5, but not at 1.
        noise = np.zeros((2000, 6))
        self.assertIn("because of the objective", verdict(noise, 1.5))
        self.assertIn("too few rows to decide", verdict(noise, 1.02))

    def test_poisson(self):
        """rho with the rates as information. There is no guaranteed gain."""
        random = np.random.default_rng(7)
        u = random.standard_normal((800, 2))
        rate = np.array([1.0, 4.0, 0.5])
        x = random.poisson(rate * np.exp(0.5 * u[:, :1]))
        r = x - x.mean(0)
        argv = [
            "--x", self.save("u.npy", u), "--residual", self.save("r.npy", r),
            "--likelihood", "poisson", "--fisher", self.save("h.npy", x.mean(0)), "--collapsed", 1,
        ]
        saved, out = self.examine(*argv)
        any_rho = np.linalg.svd(r / np.sqrt(800 * x.mean(0)), compute_uv=False)**2
        np.testing.assert_allclose(saved["tau_any"], any_rho[:1], rtol=1e-9)
        self.assertEqual((saved["headroom"], saved["headroom_any"], saved["held_out"]), (0, 0, 0))
        self.assertIn("A Poisson decoder has no guaranteed gain.", out)
        self.assertIn("but this is unstable", saved["verdict"])
        saved, _ = self.examine(*argv, "--beta", 20)
        self.assertIn("because of the objective", saved["verdict"])

    def test_a_half_without_residuals(self):
        """One row alone has a residual. The half without it has no direction of its own."""
        r = np.zeros((300, 4))
        r[5] = 0.1, 0.2, 0.3, 0.4
        saved, _ = self.examine(
            "--x", self.save("u.npy", self.x), "--residual", self.save("r.npy", r),
            "--fisher", self.save("h.npy", np.full(4, 0.2)), "--likelihood", "bernoulli",
            "--collapsed", 1)
        self.assertAlmostEqual(saved["tau_any"][0], 0.3 / 300 / 0.2)
        self.assertEqual(saved["held_out_rho_1_any"], 0)

    def test_wrong_files_and_flags(self):
        u = self.save("u.npy", self.x)
        r = self.save("r.npy", self.y / 30)
        h = self.save("h.npy", np.full(4, 0.2))
        argv = ["--x", u, "--residual", r, "--collapsed", 2, "--likelihood", "bernoulli"]
        self.refuse_in_one_line(argv, "--residual: also wants --fisher")
        self.refuse_in_one_line(
            [*argv[:-1], "gaussian", "--fisher", h], "--fisher: cannot be combined")
        self.refuse_in_one_line(
            [*argv[:-1], "categorical", "--fisher", h], "--likelihood: got categorical, wants")
        for flag, value in (("--eta_dec", 0.5), ("--eta_dec", "learned"), ("--eta_enc", 2)):
            self.refuse_in_one_line([*argv, "--fisher", h, flag, value], f"{flag}: cannot be")

        # 1. Shapes that do not fit.
        for shape in ((5,), (1, 3), (299, 4), (4, 4), (300, 5)):
            bad = self.save("bad.npy", np.full(shape, 0.2))
            self.refuse_in_one_line([*argv, "--fisher", bad], "--fisher: got", "4 numbers", "300")

        # 2. Numbers that are not allowed.
        for number, wanted in ((0.3, "numbers from 0 to 0.25"), (-0.1, "numbers from 0 to 0.25")):
            one = np.full(4, 0.2)
            one[2] = number
            rows = np.tile(one, (300, 1))
            for array in (one[None], rows):
                bad = self.save("bad.npy", array)
                self.refuse(
                    [*argv, "--fisher", bad], "--fisher: a number in row 0 and column 2", wanted)
        self.refuse(
            ["--x", u, "--residual", u, "--collapsed", 2, "--likelihood", "bernoulli",
             "--fisher", self.save("six.npy", np.full(6, 0.2))],
            "--residual: a number in row ", "wants numbers from -1 to 1")

        # 3. Information that cannot belong to the residuals.
        zero = self.save("zero.npy", np.array([0.2, 0.2, 0, 0.2]))
        self.refuse([*argv, "--fisher", zero], "--fisher: column 2 (counted from 0) is 0")
        zeros = self.save("zero.npy", np.zeros(4))
        self.refuse([*argv, "--fisher", zeros], "--fisher: all numbers are 0")

        # 4. A column without information and without a residual is left out.
        wide = self.save("wide.npy", np.concatenate([self.y / 30, np.zeros((300, 1))], 1))
        information = self.save("wide_h.npy", np.array([0.2, 0.2, 0.2, 0.2, 0]))
        argv = ["--x", u, "--collapsed", 2, "--likelihood", "bernoulli"]
        narrow, _ = self.examine(*argv, "--residual", r, "--fisher", h)
        saved, out = self.examine(*argv, "--residual", wide, "--fisher", information)
        self.assertIn("1 column has no information and is left out.", out)
        np.testing.assert_allclose(saved["tau_any"], narrow["tau_any"], rtol=1e-9)


if __name__ == "__main__":
    unittest.main()
