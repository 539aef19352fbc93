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


def encoder_input(x):
    """u (n, p + 1): rows x (n, p) minus the first one, with a 1 at their end."""
    return np.concatenate([x - x[0], np.ones((len(x), 1))], axis=1)


def held_out_gain(u, r, halves, ridge, k, beta, eta_dec):
    """The gain of k units that are fitted on one half of the rows, on the other half.

    halves are the places of the rows of each half. The gain is the mean over both ways to choose
    the half for the fit.
    """
    gains = []
    for half, other in (halves, halves[::-1]):
        gains.append(gain_on_rows(u, r, half, other, ridge, k, beta, eta_dec))
    return sum(gains) / 2


def gain_on_rows(u, r, half, other, ridge, k, beta, eta_dec):
    """The gain of k units that are fitted on the rows `half`, on the rows `other`."""
    level = beta * eta_dec**2
    half_u = u[half]
    half_r = r[half]
    other_u = u[other]
    left = r[other]

    A = half_u.T @ half_u / len(half_u)
    C = half_r.T @ half_u / len(half_u)
    # Few rows make A singular.
    regression = np.linalg.lstsq(A + ridge * np.trace(A) * np.eye(len(A)), C.T, rcond=None)[0]
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
        u = encoder_input(self.x)
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
        halves = arrays.halves_of(300, np.random.default_rng(0))
        held_out = []
        for ridge in (0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
            held_out.append(held_out_gain(u, self.y, halves, ridge, k, beta, eta_dec))
        self.assertAlmostEqual(saved["held_out"], max(held_out), places=8)
        self.assertGreater(saved["held_out"], 0.01)

        # 3. Units with any encoder, which may read the residual itself.
        any_tau = np.linalg.svd(self.y / 300**0.5, compute_uv=False)**2
        np.testing.assert_allclose(saved["tau_any"], any_tau[:k], rtol=1e-9)
        any_ratio = np.maximum(any_tau[:k] / level, 1)
        any_gain = beta / 2 * (any_ratio - 1 - np.log(any_ratio)).sum()
        self.assertAlmostEqual(saved["headroom_any"], any_gain, places=9)
        self.assertGreater(any_gain, gain + 0.1)
        any_held_out = held_out_gain(self.y, self.y, halves, 0, k, beta, eta_dec)
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
        u1 = encoder_input(u)
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
        halves = arrays.halves_of(301, np.random.default_rng(0))
        ridges = (0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
        gains = [held_out_gain(u1, 4 * r, halves, ridge, k, beta, 2) for ridge in ridges]
        self.assertAlmostEqual(saved["held_out"], max(gains), places=8)
        any_gain = held_out_gain(4 * r, 4 * r, halves, 0, k, beta, 2)
        self.assertAlmostEqual(saved["held_out_any"], any_gain, places=8)

        # 3. The held-out rho_1 of F, with the H of all rows.
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
        for fisher in (h, h[None], np.float32(h), h.reshape(2, 2)):
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
            [*argv[:-1], "categorical", "--fisher", h],
            "--residual: cannot be combined with --likelihood categorical")
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

    def test_large_means(self):
        """A time in seconds has so large a square that a sum of squares has no digits for it."""
        u = self.x.copy()
        r = self.save("r.npy", self.y)
        near_0, _ = self.examine("--x", self.save("u.npy", u), "--residual", r, "--collapsed", 3)
        u[:, 2] += 1.7e9
        far, _ = self.examine("--x", self.save("far.npy", u), "--residual", r, "--collapsed", 3)
        np.testing.assert_allclose(far["tau"], near_0["tau"], rtol=1e-5)
        self.assertAlmostEqual(far["held_out"], near_0["held_out"], places=4)

    def test_fewer_rows_than_columns(self):
        """u, r, or both have more columns than rows, by numpy. One pair has 20,000 columns."""
        random = np.random.default_rng(3)
        wide = random.standard_normal((40, 70))
        narrow = wide[:, :5] @ random.standard_normal((5, 3)) + random.standard_normal((40, 3))
        widest = random.standard_normal((40, 20_000))
        for u, r in ((wide, narrow), (narrow, wide), (widest, widest[:, ::-1])):
            saved, _ = self.examine(
                "--x", self.save("u.npy", u), "--residual", self.save("r.npy", r),
                "--collapsed", 2)
            u1 = encoder_input(u)
            # The columns that explain r are those of u, or all 40 if u is wide.
            fitted = u1 @ np.linalg.lstsq(u1, r, rcond=None)[0] if u is narrow else r
            tau = np.linalg.svd(fitted / 40**0.5, compute_uv=False)**2
            np.testing.assert_allclose(saved["tau"], tau[:2], rtol=1e-8)
            any_tau = np.linalg.svd(r / 40**0.5, compute_uv=False)**2
            np.testing.assert_allclose(saved["tau_any"], any_tau[:2], rtol=1e-8)
            if u is not widest:
                self.check_held_out(saved, u1, r)

    def check_held_out(self, saved, u, r):
        """Check the held-out gains of 2 units, for beta and eta_dec of 1."""
        halves = arrays.halves_of(len(u), np.random.default_rng(0))
        gains = []
        for ridge in (0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
            gains.append(held_out_gain(u, r, halves, ridge, 2, 1, 1))
        self.assertAlmostEqual(saved["held_out"], max(gains), places=7)
        any_gain = held_out_gain(r, r, halves, 0, 2, 1, 1)
        self.assertAlmostEqual(saved["held_out_any"], any_gain, places=7)

    def test_rows_with_missing_numbers(self):
        """--missing drop leaves such a row out of all files, the information included."""
        random = np.random.default_rng(8)
        arrays_of_rows = {
            "x": self.x,
            "residual": self.y / 30,
            "fisher": 0.1 + 0.1 * random.random((300, 4)),
            "mean": random.standard_normal((300, 2)) * [1, 0.01],
            "log_var": np.zeros((300, 2)),
        }
        saved = []
        for is_dropped in (False, True):
            argv = ["--likelihood", "bernoulli", "--missing", "drop"]
            for flag, array in arrays_of_rows.items():
                if is_dropped:
                    array = np.delete(array, 7, axis=0)
                elif flag == "x":
                    array = array.copy()
                    array[7, 2] = np.nan
                argv += [f"--{flag}", self.save(f"{flag}{is_dropped}.npy", array)]
            saved.append(self.examine(*argv)[0])
        for result in saved:
            self.assertEqual((result["rows"], result["collapsed"]), (299, 1))
        for name in ("tau", "tau_any", "held_out_rho_1_any", "kl"):
            np.testing.assert_allclose(saved[0][name], saved[1][name], rtol=1e-9)

    def test_too_many_columns(self):
        u = self.save("u.npy", self.x)
        argv = ["--x", u, "--residual", self.save("r.npy", self.y / 30), "--collapsed", 1]
        with mock.patch("arrays.MAX_COLUMNS", 5):
            self.refuse_in_one_line(argv, "--x: got 300 rows of 6 columns, wants at most 5")
        with mock.patch("arrays.MAX_COLUMNS", 3):
            self.refuse_in_one_line(
                ["--x", self.save("few.npy", self.x[:, :3]), *argv[2:]],
                "--residual: got 300 rows of 4 columns, wants at most 3")
        with mock.patch("arrays.MAX_COLUMNS", 8):
            self.refuse_in_one_line(
                [*argv, "--model", "cvae", "--y", self.save("y.npy", self.y)],
                "--y: got 10 columns together with --x, wants at most 8")

        # Each column of another decoder has an information of its own, also if the rows are few.
        four = self.save("four.npy", self.x[:4])
        with mock.patch("arrays.MAX_COLUMNS", 5):
            self.refuse_in_one_line(
                ["--x", four, "--residual", self.save("six.npy", self.x[:4] / 30),
                 "--likelihood", "bernoulli", "--fisher", self.save("h.npy", np.full(6, 0.2)),
                 "--collapsed", 1],
                "--residual: got 6 columns, wants at most 5 for --likelihood bernoulli")

    def test_cvae(self):
        """The encoder of a CVAE reads x and y. Here r is linear in both, and in neither alone."""
        random = np.random.default_rng(2)
        x = random.standard_normal((400, 3))
        y = random.standard_normal((400, 2)) + 5
        r = x[:, :2] - y
        argv = ["--x", self.save("x.npy", x), "--residual", self.save("r.npy", r),
                "--collapsed", 2, "--eta_dec", 0.5]
        with_y, out = self.examine(*argv, "--model", "cvae", "--y", self.save("y.npy", y))
        tau = np.linalg.svd(r / 20, compute_uv=False)**2
        np.testing.assert_allclose(with_y["tau"], tau, rtol=1e-9)
        np.testing.assert_allclose(with_y["tau_any"], tau, rtol=1e-9)
        self.assertIn("because of training", out)
        alone, _ = self.examine(*argv)
        self.assertLess(alone["tau"][1], 0.8 * tau[1])

        # With many chunks, and for y as a vector.
        with mock.patch("arrays.CHUNK", 38):
            chunks, _ = self.examine(*argv, "--model", "cvae", "--y", self.save("y.npy", y))
        np.testing.assert_allclose(chunks["tau"], tau, rtol=1e-9)
        self.examine(*argv, "--model", "cvae", "--y", self.save("one.npy", y[:, 0]))

    def posterior(self, eta_enc):
        """Means and log variances (300, 4) of units whose mean KL are known, and those KL.

        The mean of the last unit varies, but its KL is small. The unit before it has collapsed to
        the prior. The second unit is active although its mean is constant.
        """
        random = np.random.default_rng(4)
        noise = random.standard_normal((300, 4))
        mean = noise * [1.0, 0.0, 0.06, 0.11] * eta_enc
        log_var = np.full((300, 4), [-2.0, -1.0, 0.0, 0.0]) + 2 * np.log(eta_enc)
        variance = np.exp(log_var)
        kl = ((mean**2 + variance) / eta_enc**2 - 1 - np.log(variance / eta_enc**2)) / 2
        return mean, log_var, kl.mean(0)

    def test_units_are_counted(self):
        """KL and active units by numpy. The prior's std is --eta_enc."""
        argv = ["--x", self.save("u.npy", self.x), "--residual", self.save("r.npy", self.y)]
        for eta_enc in (1.0, 3.0):
            mean, log_var, kl = self.posterior(eta_enc)
            self.assertEqual((kl > 0.01).tolist(), [True, True, False, False])
            posterior = [
                "--mean", self.save("mean.npy", mean), "--log_var", self.save("var.npy", log_var),
                "--eta_enc", eta_enc,
            ]
            with mock.patch("arrays.CHUNK", 38):
                saved, out = self.examine(*argv, *posterior)
            np.testing.assert_allclose(saved["kl"], kl, rtol=1e-9)
            self.assertEqual((saved["units"], saved["collapsed"]), (4, 2))
            # The first and the last mean vary by more than 1 % of the prior's variance.
            self.assertEqual((mean.var(0, ddof=1) > 0.01 * eta_enc**2).sum(), 2)
            self.assertEqual(saved["active"], 2)
            self.assertIn("2 of 4 units collapsed because of training", out)
            self.assertIn(
                f"The KL is {kl.sum():.4f} nats per row in total. By the variance of their means, "
                "2 of 4 units are active.", out)
            self.assertNotIn("not counted", out)

            # The same verdict as from the number of collapsed units.
            given, out = self.examine(*argv, "--collapsed", 2, "--d_1", 4)
            self.assertAlmostEqual(given["headroom"], saved["headroom"], places=9)
            self.assertEqual((given["units"], given["kl"], given["active"]), (4, [], None))
            self.assertIn("2 of 4 units collapsed because of training", out)
            self.assertIn("The number of collapsed units was given, not counted.", out)

            # A linear unit of this KL would describe the variance level exp(2 KL).
            thetas = np.exp(2 * np.sort(kl[:2])[::-1])
            np.testing.assert_allclose(saved["theta"], thetas, rtol=1e-9)

    def test_no_unit_collapsed(self):
        """The answer says so. There is no headroom and no picture."""
        mean, log_var, kl = self.posterior(1.0)
        status, out, err = self.call(
            "--x", self.save("u.npy", self.x), "--residual", self.save("r.npy", self.y),
            "--mean", self.save("mean.npy", mean[:, :2]),
            "--log_var", self.save("var.npy", log_var[:, :2]))
        self.assertEqual(status, 0, err)
        self.assertEqual(
            out,
            "\nWith beta = 1 and eta_dec = 1, no unit collapsed.\nThe mean KL of every unit "
            "exceeds 0.01 nats.\nNothing needs to change.\n"
            f"The KL is {kl[:2].sum():.4f} nats per row in total. By the variance of their means, "
            "1 of 2 units is active.\n")
        path = newest(self.folder / "runs", "headroom.json")
        saved = json.loads(path.read_text(encoding="utf-8"))
        self.assertEqual((saved["cause"], saved["collapsed"]), ("none", 0))
        self.assertFalse((path.parent / "headroom.png").exists())

    def test_eta_enc_of_another_decoder(self):
        """It matters for the KL only."""
        mean, log_var, kl = self.posterior(2.0)
        argv = [
            "--x", self.save("u.npy", self.x), "--residual", self.save("r.npy", self.y / 30),
            "--likelihood", "bernoulli", "--fisher", self.save("h.npy", np.full(4, 0.2)),
            "--eta_enc", 2,
        ]
        self.refuse_in_one_line([*argv, "--collapsed", 1], "--eta_enc: cannot be combined")
        saved, _ = self.examine(
            *argv, "--mean", self.save("mean.npy", mean), "--log_var", self.save("v.npy", log_var))
        np.testing.assert_allclose(saved["kl"], kl, rtol=1e-9)
        self.assertEqual(saved["theta"], [])

    def test_wrong_posteriors(self):
        mean, log_var, _ = self.posterior(1.0)
        argv = ["--x", self.save("u.npy", self.x), "--residual", self.save("r.npy", self.y)]
        mean_file = self.save("mean.npy", mean)
        var_file = self.save("var.npy", log_var)
        both = [*argv, "--mean", mean_file, "--log_var", var_file]
        self.refuse_in_one_line([*argv, "--mean", mean_file], "--mean: also wants --log_var")
        self.refuse_in_one_line([*argv, "--log_var", var_file], "--log_var: also wants --mean")
        self.refuse_in_one_line(
            [*both, "--collapsed", 2], "--collapsed: cannot be combined with --mean")
        self.refuse([*both, "--d_1", 5], "--d_1: got 5, wants 4, the number of columns of --mean")
        self.refuse_in_one_line(
            [*both[:-1], self.save("bad.npy", log_var[:, :3])],
            "--log_var: got 3 columns, wants 4 columns like --mean")
        self.refuse_in_one_line(
            [*both[:-1], self.save("bad.npy", log_var[:299])],
            "--log_var: got 299 rows, wants 300 rows like --x")
        log_var[7, 2] = 1000
        self.refuse(
            [*both[:-1], self.save("bad.npy", log_var)],
            "--log_var: the KL of column 2 (counted from 0) is not finite, wants logarithms")

    def test_number_of_units(self):
        argv = ["--x", self.save("u.npy", self.x), "--residual", self.save("r.npy", self.y)]
        self.refuse_in_one_line(
            [*argv, "--collapsed", 5, "--d_1", 4], "--collapsed: got 5, wants at most 4")
        self.refuse_in_one_line(
            [*argv, "--collapsed", "1,5", "--d_1", 4], "--collapsed: got 5, wants at most 4")
        self.refuse_in_one_line(argv, "--residual: also wants --mean and --log_var", "--collapsed")
        _, out = self.examine(*argv, "--collapsed", 4, "--d_1", 4)
        self.assertIn("4 of 4 units collapsed", out)

    def test_more_collapsed_units_than_columns(self):
        """Only as many units as the residual has columns can lower the loss.

        A larger number is allowed, with a warning if no --d_1 confirms it.
        """
        argv = ["--x", self.save("u.npy", self.x), "--residual", self.save("r.npy", self.y)]
        columns = self.y.shape[1]
        fewest, _ = self.examine(*argv, "--collapsed", columns)
        many, out = self.examine(*argv, "--collapsed", 9999)
        self.assertIn("9999 units collapsed", out)
        for name in ("headroom", "headroom_any", "held_out", "held_out_any", "tau"):
            self.assertEqual(many[name], fewest[name], name)

        for flags, is_warned in (
            ([columns], False),
            ([columns + 1], True),
            ([f"1,{columns + 1}"], True),
            ([9999, "--d_1", 9999], False),
            # The first setting of the list has no --d_1.
            ([columns + 1, "--d_1", f"0,{columns + 1}"], True),
        ):
            with self.subTest(flags=flags):
                status, _, err = self.call(*argv, "--collapsed", *flags)
                self.assertEqual(status, 0, err)
                self.assertEqual(err.count("warning: --collapsed is"), int(is_warned), err)
                self.assertEqual(f"--residual has {columns} columns" in err, is_warned, err)

    def test_messages_name_the_flag_that_chose_the_decoder(self):
        argv = ["--x", self.save("u.npy", self.x), "--residual", self.save("r.npy", self.y / 30),
                "--collapsed", 2]
        h = self.save("h.npy", np.full(4, 0.2))
        self.refuse_in_one_line(
            [*argv, "--loss", "ce_sum"], "--residual: cannot be combined with --loss ce_sum")
        self.refuse_in_one_line(
            [*argv, "--loss", "bce_sum"], "--residual: also wants --fisher for --loss bce_sum")
        self.refuse_in_one_line(
            [*argv, "--loss", "bce_sum", "--fisher", h, "--eta_enc", 2],
            "--eta_enc: cannot be combined with --loss bce_sum")
        self.refuse_in_one_line(
            [*argv, "--loss", "mse_sum", "--fisher", h],
            "--fisher: cannot be combined with --loss mse_sum")

    def test_models_that_are_refused(self):
        argv = ["--x", self.save("u.npy", self.x), "--residual", self.save("r.npy", self.y),
                "--collapsed", 2]
        y = self.save("y.npy", self.y)
        self.refuse_in_one_line([*argv, "--y", y], "--y: ", "wants --model cvae")
        self.refuse_in_one_line([*argv, "--model", "cvae"], "--y: got no file, wants")
        self.refuse_in_one_line([*argv, "--model", "hvae"], "--model: cannot be combined with")
        self.refuse_in_one_line([*argv, "--model", "vae,cvae", "--y", y], "--model: wants one")
        for flag, value in (
            ("--center", "false"), ("--scale", "true"), ("--sigma", 1), ("--active", 2)
        ):
            self.refuse_in_one_line([*argv, flag, value], f"{flag}: cannot be combined with --res")

    def test_reconstructions_as_residuals(self):
        """A warning asks whether --residual has the reconstructions."""
        x = self.save("u.npy", self.x)
        warning = "is this the reconstruction itself?"
        centred = self.x - self.x.mean(0)
        variance = (centred**2).sum(1).mean()
        for share, has_warning in ((0.97, True), (0.55, True), (0.45, False)):
            # A shift of all six columns has this share.
            shift = (variance / 6 * share / (1 - share))**0.5
            status, _, err = self.call(
                "--x", x, "--residual", self.save("r.npy", centred + shift), "--collapsed", 1)
            self.assertEqual(status, 0, err)
            self.assertEqual(warning in err, has_warning)
            if has_warning:
                self.assertIn(
                    f"warning: the squared mean of --residual is {share:.0%} of its mean square",
                    err)

    def test_loss_as_pytorch_names_it(self):
        """The mean squared error over 4 columns with a KL weight is half its sum with beta."""
        argv = ["--x", self.save("u.npy", self.x), "--residual", self.save("r.npy", self.y),
                "--collapsed", 3]
        by_loss, out = self.examine(*argv, "--loss", "mse_mean", "--kl_weight", 0.05)
        by_beta, _ = self.examine(*argv, "--eta_dec", 1, "--beta", 0.05 * 4 / 2)
        self.assertGreater(by_beta["headroom"], 0.01)
        self.assertAlmostEqual(by_loss["headroom"], by_beta["headroom"], places=9)
        self.assertAlmostEqual(by_loss["level"], 0.1)
        self.assertIn("With beta = 0.1 and eta_dec = 1, 3 units collapsed", out)

    def test_answer(self):
        """The verdict, the certainty and the remedy come first, and headroom.json has them, too."""
        argv = ["--x", self.save("u.npy", self.x), "--residual", self.save("r.npy", self.y),
                "--collapsed", 2]
        largest = np.linalg.svd(self.y / 300**0.5, compute_uv=False)[0]**2
        saved, out = self.examine(*argv, "--beta", 2 * largest, "--eta_dec", 3)
        self.assertEqual(saved["cause"], "objective")
        lines = out.split("\n")
        self.assertIn("because of the objective.", lines[1])
        self.assertEqual(lines[2:4], [saved["certainty"], saved["remedy"]])
        self.assertIn("the 300 rows are enough for it", lines[2])
        self.assertIn(f"only if beta is below {largest / 9:.4g}, which is 0.056 times", lines[3])
        self.assertIn(f"if eta_dec is below {0.5**0.5:.4g}.", lines[3])

    def test_extreme_numbers(self):
        """A figure that is not finite gives one line instead of a verdict."""
        self.refuse(
            ["--x", self.save("u.npy", self.x), "--residual", self.save("r.npy", self.y),
             "--collapsed", 1, "--eta_dec", "1e-99", "--beta", "1e-320"],
            "--residual: ", "is not finite for beta = ", "wants less extreme values")


if __name__ == "__main__":
    unittest.main()
