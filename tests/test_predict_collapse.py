"""predict_collapse.py: its predictions on arrays from files, and the flags that it refuses.

The predictions are compared with numpy, with the scripts and with brute force.
"""
import dataclasses
import json
import math
import re
import unittest
from unittest import mock

import numpy as np
import torch

import arrays
import datasets
import linear_prediction
import MNIST_CVAE_Linear
import MNIST_HVAE_Linear_learnable_sigma_2
import MNIST_HVAE_Linear_nonlearnable_sigma_2
import MNIST_VAE_Linear_learnable_sigma
import MNIST_VAE_Linear_nonlearnable_sigma
import predict_collapse
import stability
import verify
from tests import small
from tests.small import PNG


def newest(folder, name):
    """The file of this name, in any folder of a folder, that was written last."""
    return max(folder.rglob(name), key=lambda path: path.stat().st_mtime_ns)


def write_empty_picture(path, **options):
    """Takes the place of pictures.save_figure, which needs most of the time of a prediction."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PNG)


class Case(small.InFolder):
    """Tests that call predict_collapse.py on files in a folder.

    The pictures are empty, except in `Pictures`.
    """

    draws_pictures = False

    def setUp(self):
        super().setUp()
        if not self.draws_pictures:
            patch = mock.patch("pictures.save_figure", write_empty_picture)
            patch.start()
            self.addCleanup(patch.stop)
        random = np.random.default_rng(0)
        shared = random.standard_normal((300, 5)) @ random.standard_normal((5, 6))
        self.x = shared + 0.3 * random.standard_normal((300, 6)) + 0.5
        self.y = self.x[:, :3] @ random.standard_normal((3, 4)) + random.standard_normal((300, 4))

    def save(self, name, array):
        """Write an array to an .npy file. Returns its path."""
        np.save(self.folder / name, array)
        return self.folder / name

    def write(self, name, text, encoding="utf-8"):
        """Write a text file. Returns its path."""
        path = self.folder / name
        path.write_bytes(text.encode(encoding))
        return path

    def call(self, *argv):
        """(exit status, stdout, stderr) of predict_collapse.py."""
        return small.call(predict_collapse.main, "--out_dir", self.folder / "runs", *argv)

    def predict(self, *argv):
        """(contents of prediction.json, stdout, stderr)."""
        status, out, err = self.call(*argv)
        self.assertEqual(status, 0, err)
        path = newest(self.folder / "runs", "prediction.json")
        self.assertTrue((path.parent / "trade_off.png").read_bytes().startswith(PNG))
        return json.loads(path.read_text(encoding="utf-8")), out, err

    def refuse(self, argv, *words):
        """Check that the program ends with one error line on stderr that holds these words.

        Nothing is printed on stdout, and the exit status is 2. Returns the line.
        """
        line, _ = self.refusal(argv, words)
        return line

    def refuse_in_one_line(self, argv, *words):
        """`refuse`, where stderr holds nothing but the line, not even the progress of reading."""
        line, err = self.refusal(argv, words)
        self.assertEqual(err, line + "\n")

    def refusal(self, argv, words):
        """Check what `refuse` promises. Returns (the line, all of stderr)."""
        status, out, err = self.call(*argv)
        self.assertEqual((status, out), (2, ""), err)
        lines = [line for line in err.strip().split("\n") if "error" in line]
        self.assertEqual(len(lines), 1, err)
        self.assertNotIn("Traceback", err)
        for word in words:
            self.assertIn(word, lines[0])
        return lines[0], err


# -------------------------------------------------------------------------------- the predictions

class Predictions(Case):
    def test_vae_by_hand(self):
        """Theorem 1 from numpy's singular values. --center true subtracts the means first."""
        x = self.save("x.npy", self.x)
        for center, rows in (("false", self.x), ("true", self.x - self.x.mean(0))):
            theta = np.linalg.svd(rows / 300**0.5, compute_uv=False)
            saved, out, _ = self.predict(
                "--x", x, "--eta_dec", 0.7, "--beta", 1.5, "--center", center)
            predicted = saved["predicted"]
            np.testing.assert_allclose(predicted["theta"], theta, rtol=1e-9)
            np.testing.assert_allclose(predicted["collapse"], theta**2 / 0.49, rtol=1e-9)
            kl = np.maximum(np.log(theta / (1.5**0.5 * 0.7)), 0)
            np.testing.assert_allclose(predicted["kl"], kl, atol=1e-9)

            active = (kl > 0).sum()
            self.assertTrue(0 < active < 6)
            lines = out.strip().split("\n")
            self.assertEqual(
                lines[0],
                f"At beta 1.5, {active} of 6 units stay active; all collapse from beta "
                f"{theta[0]**2 / 0.49:.4g} on.",
            )
            kind = {"true": "with biases", "false": "without biases"}[center]
            self.assertTrue(
                lines[1].startswith(f"This is the optimum of a linear VAE {kind} (--center"), out)
            self.assertTrue(lines[1].endswith(f"on {x} (300 rows)."), out)
            self.assertIn("beta = 1.5, eta_enc = 1, eta_dec = 0.7 and a learnable sigma", out)
            for i in range(2):
                share = theta[i]**2 / (theta**2).sum()
                row = rf"\n +{i + 1} +{theta[i]:.4f} +{share:.2%} +{kl[i]:.4f} +active"
                self.assertRegex(out, row)

    def test_cvae_by_hand(self):
        """Theorem 2 from least squares, and the share of y that x explains."""
        x = self.save("x.npy", self.x)
        y = self.save("y.npy", self.y)
        cases = (
            ("false", self.x, self.y, "second moment"),
            ("auto", self.x - self.x.mean(0), self.y - self.y.mean(0), "variance"),
        )
        for center, inputs, targets, name in cases:
            left = targets - inputs @ np.linalg.lstsq(inputs, targets, rcond=None)[0]
            theta = np.linalg.svd(left / 300**0.5, compute_uv=False)**2
            saved, out, _ = self.predict(
                "--model", "cvae", "--x", x, "--y", y, "--eta_dec", 0.9, "--center", center)
            kl = np.maximum(np.log(theta / 0.81), 0) / 2
            np.testing.assert_allclose(saved["predicted"]["kl"], kl, atol=1e-9)
            explained = 1 - (left**2).sum() / (targets**2).sum()
            self.assertIn(f"of x explains {explained:.1%} of the {name} of y.", out)
            self.assertRegex(out, rf"\n +1 +{theta[0]:.4f} +{theta[0] / theta.sum():.2%}")

    def test_cvae_whose_x_determines_y(self):
        """Nothing is left for the units. One column of targets may be a plain vector."""
        x = self.save("x.npy", self.x)
        for determined in (self.x @ np.ones((6, 3)), self.x[:, 0]):
            y = self.save("determined.npy", determined)
            saved, out, _ = self.predict("--model", "cvae", "--x", x, "--y", y)
            self.assertEqual(set(saved["predicted"]["kl"]), {0.0})
            self.assertIn("x explains 100.0% of the variance of y", out)

    def test_rounding_errors_are_no_modes_of_a_cvae(self):
        """y has 12 columns. x determines 11 directions of them, and noise is in one."""
        random = np.random.default_rng(4)
        x = random.standard_normal((500, 20))
        y = 100 * x @ random.standard_normal((20, 12))
        noise = 1e-3 * random.standard_normal(500)
        y += np.outer(noise, np.ones(12))
        saved, out, _ = self.predict(
            "--model", "cvae", "--x", self.save("x.npy", x), "--y", self.save("y.npy", y))
        self.assertEqual(len(saved["predicted"]["collapse"]), 1)
        with_constant = np.concatenate([x, np.ones((500, 1))], 1)
        left = noise - with_constant @ np.linalg.lstsq(with_constant, noise, rcond=None)[0]
        # The rest is what is left of a sum of the large numbers' squares.
        self.assertAlmostEqual(saved["predicted"]["collapse"][0] / (12 * (left**2).mean()), 1, 3)

    def test_like_the_scripts(self):
        """The linear scripts predict the same units for images."""
        small.write_mnist(self.folder / "data")
        hvae_flags = {"beta_1": 0.7, "beta_2": 1.2, "sigma_1": 0.6, "d_1": 4, "d_2": 3}
        cases = (
            (MNIST_VAE_Linear_learnable_sigma.VAE, "vae", {"beta": 0.7, "d_1": 4}),
            (
                MNIST_VAE_Linear_nonlearnable_sigma.VAE,
                "vae",
                {"beta": 0.7, "d_1": 4, "sigma": 0.6},
            ),
            (MNIST_CVAE_Linear.CVAE, "cvae", {"beta": 0.7, "d_1": 4}),
            (MNIST_HVAE_Linear_learnable_sigma_2.HVAE, "hvae", hvae_flags),
            (
                MNIST_HVAE_Linear_nonlearnable_sigma_2.HVAE,
                "hvae",
                {**hvae_flags, "sigma_2": 0.5},
            ),
        )
        for Model, model, flags in cases:
            with self.subTest(script=Model.__module__):
                self.check_like_script(Model, model, flags)

    def check_like_script(self, Model, model, flags):
        """Compare a prediction with the `predicted` of a script's model."""
        flags = {**flags, "eta_enc": 1.3, "eta_dec": 0.8}
        argv = ["--model", model, "--dataset", "mnist", "--data_dir", self.folder / "data"]
        for name, value in flags.items():
            argv += [f"--{name}", value]
        saved, _, _ = self.predict(*argv)

        f = predict_collapse.Flags(
            dataset="mnist", data_dir=str(self.folder / "data"), **flags)
        # The scripts have other names for these flags.
        f.c = f.eta_dec / f.eta_enc
        f.dim_z = f.d_1
        # A learnable sigma starts at 1.
        f.sigma = f.sigma or 1.0
        load = datasets.load_mnist_quarters if model == "cvae" else datasets.load_mnist
        [data] = load([f])

        compared = 0
        for name, values in verify.per_unit(Model.predicted(f, data)).items():
            # A CVAE's theta is a standard deviation in one of them, a variance in the other.
            if name not in saved["predicted"] or (name == "theta" and model == "cvae"):
                continue
            np.testing.assert_allclose(
                self.with_infinity(saved["predicted"][name]),
                self.with_infinity(values),
                rtol=1e-6,
                atol=1e-9,
                err_msg=name,
            )
            compared += 1
        self.assertGreater(compared, 3)

    def with_infinity(self, values):
        """Values per unit as an array. None, which a file has for infinity, becomes infinity."""
        return np.array([math.inf if value is None else value for value in values])

    def test_recommended_beta_gives_the_wanted_units(self):
        variances = torch.tensor([9.0, 5.0, 5.0, 2.0, 0.5, 0.0], dtype=torch.float64)
        cases = (
            {},
            {"sigma": 0.4},
            {"model": "cvae"},
            {"model": "hvae"},
            {"model": "hvae", "sigma_2": 0.6},
            {"model": "hvae", "d_2": 3},
        )
        for flags in cases:
            f = predict_collapse.Flags(eta_dec=0.7, eta_enc=1.2, **flags)
            predicted = linear_prediction.optimum(f, variances, 1.0)
            level = "_2" if f.model == "hvae" else ""
            collapse = predicted[f"collapse{level}"]
            for wanted in range(1, 1 + len(collapse)):
                with self.subTest(flags=flags, wanted=wanted):
                    self.check_recommendation(f, variances, collapse, wanted)

    def check_recommendation(self, f, variances, collapse, wanted):
        betas = linear_prediction.recommended_betas(collapse, wanted)
        if wanted == 2:
            # The second and the third unit have the same theta.
            self.assertIsNone(betas)
            return
        low, high = betas
        high = min(high, 1e6)
        inside = [low * (1 + 1e-9) + 1e-9, (low + high) / 2, high * (1 - 1e-9)]
        inside = torch.tensor(inside, dtype=torch.float64)
        active = linear_prediction.trade_off(f, variances, inside)["active"].tolist()
        self.assertEqual(active, [wanted] * 3)

    def test_recommendation_in_words(self):
        """An interval of beta, or the reason why there is none.

        The collapse betas are made up. Where two are equal, their units collapse together.
        """
        collapse = torch.tensor([math.inf, 8.0, 5.0, 5.0, 2.0, 0.0], dtype=torch.float64)
        sentences = {
            1: "Exactly 1 unit is active for beta >= 8.",
            2: "Exactly 2 units are active for 5 <= beta < 8.",
            3: "No beta keeps exactly 3 units active, because modes with equal theta collapse "
            "together.",
            4: "Exactly 4 units are active for 2 <= beta < 5.",
            5: "Exactly 5 units are active for beta < 2.",
            6: "No beta keeps exactly 6 units active, because at most 5 can be active.",
        }
        for active, sentence in sentences.items():
            f = predict_collapse.Flags(active=active)
            self.assertEqual(linear_prediction.recommendation(f, collapse), sentence)

        f = predict_collapse.Flags(model="hvae", active=1)
        never = torch.tensor([math.inf, math.inf, 3.0], dtype=torch.float64)
        self.assertEqual(
            linear_prediction.recommendation(f, never),
            "No beta_2 keeps exactly 1 unit of z2 active, because 2 units never collapse.",
        )
        f.active = 2
        self.assertEqual(
            linear_prediction.recommendation(f, never[:2]),
            "Exactly 2 units of z2 are active for every beta_2.",
        )

    def test_answer_in_words(self):
        """The first line. The advice holds: with it, the wanted units are active."""
        x = self.save("x.npy", self.x)
        variances = np.linalg.svd((self.x - self.x.mean(0)) / 300**0.5, compute_uv=False)**2
        _, out, _ = self.predict("--x", x, "--eta_dec", 0.7, "--beta", 30, "--active", 3)
        first_line = out.strip().split("\n")[0]
        pattern = (
            r"At beta 30, 0 of 6 units stay active; all collapse from beta (\S+) on\. "
            r"To keep 3 active, use beta <= (\S+), or eta_dec <= (\S+)\."
        )
        self.assertRegex(first_line, f"^{pattern}$")
        last, beta, eta_dec = map(float, re.match(pattern, first_line).groups())
        self.assertAlmostEqual(last / (variances[0] / 0.49), 1, delta=1e-3)
        for number, largest in (
            (beta, variances[2] / 0.49), (eta_dec, (variances[2] / 30)**0.5)
        ):
            self.assertTrue(0.98 * largest < number < largest)
        for flags in (["--beta", beta, "--eta_dec", 0.7], ["--beta", 30, "--eta_dec", eta_dec]):
            _, out, _ = self.predict("--x", x, *flags)
            self.assertIn(", 3 of 6 units stay active; ", out)

        # An HVAE has two levels, and its eta_dec stands in two places.
        _, out, _ = self.predict("--x", x, "--model", "hvae", "--active", 2)
        self.assertRegex(
            out,
            r"^\nAt beta_2 1, \d of 6 units of z1 and \d of 6 units of z2 stay active; all of z2 "
            r"collapse from beta_2 \S+ on\. To keep 2 of z2 active, use beta_2 <= [\d.]+\.\n",
        )

    def test_advice_in_words(self):
        """Made-up betas at which units collapse."""
        collapse = torch.tensor([math.inf, 8.0, 2.0, 0.0], dtype=torch.float64)
        sentences = {
            1: "Every beta keeps 1 active.",
            2: "To keep 2 active, use beta <= 7.999, or eta_dec <= 1.414.",
            3: "To keep 3 active, use beta <= 1.999, or eta_dec <= 0.7071.",
            4: "At most 3 can be active.",
        }
        for active, sentence in sentences.items():
            f = predict_collapse.Flags(active=active, beta=4.0)
            self.assertEqual(linear_prediction.advice_in_words(f, collapse), sentence)
        self.assertEqual(
            linear_prediction.collapse_in_words(f, collapse), "1 never collapses.")

    def test_rounded_below(self):
        for limit, rounded in (
            (0.41378, 0.4137), (38.0, 37.99), (1e-7, 9.999e-8), (123456.0, 123400.0),
        ):
            self.assertEqual(linear_prediction.rounded_below(limit), rounded)

    def test_trade_off_by_hand(self):
        """The distortion is that of the optimal maps themselves.

        Each mode with a unit adds (theta - omega lambda)^2 + (omega sigma)^2. In an HVAE it adds
        theta^2 sigma_1^2 / m, where m = lambda_1^2 + sigma_1^2, for the best U1. A mode without a
        unit adds all its variance.
        """
        variances = torch.tensor([9.0, 5.0, 2.0, 0.5], dtype=torch.float64)
        theta = variances.sqrt()[:3]
        beta = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
        cases = ({}, {"sigma": 0.4}, {"model": "hvae"}, {"model": "hvae", "sigma_2": 0.6})
        for flags in cases:
            f = predict_collapse.Flags(eta_dec=0.7, eta_enc=1.2, d_1=3, **flags)
            predicted = linear_prediction.optimum(f, variances, beta)
            table = linear_prediction.trade_off(f, variances, beta)
            if f.model == "hvae":
                m = predicted["lambda_1"]**2 + f.sigma_1**2
                error = theta**2 * f.sigma_1**2 / m
            else:
                omega = predicted["omega"]
                bias = theta - omega * predicted["lambda"]
                error = bias**2 + (omega * predicted["sigma"])**2
            np.testing.assert_allclose(table["distortion"], error.sum(1) + 0.5, rtol=1e-9)

            rate = 0
            for name, values in predicted.items():
                if name.startswith("kl"):
                    rate = rate + values.sum(1)
            np.testing.assert_allclose(table["rate"], rate, rtol=1e-12)

    def test_printed_recommendation_and_range(self):
        x = self.save("x.npy", self.x)
        betas = [0.5, 1.0, 2.0, 400000.0]
        saved, out, _ = self.predict("--x", x, "--active", 3, "--beta", "0.5,1,2,400000")
        collapse = saved["predicted"]["collapse"]
        self.assertIn(
            f"Exactly 3 units are active for {collapse[3]:.6g} <= beta < {collapse[2]:.6g}.", out)
        self.assertEqual(saved["trade_off"]["beta"], betas)

        rows = out.strip().split("\n")[-4:]
        for row, beta in zip(rows, betas):
            active = sum(threshold > beta for threshold in collapse)
            self.assertEqual(row.split()[1], str(active))
        # No unit is active at the largest beta, so that the rate is 0.
        self.assertEqual(rows[-1].split()[1:3], ["0", "0.0000"])

    def test_constant_columns(self):
        columns = [self.x, np.full((300, 1), 4.0), np.zeros((300, 2))]
        constant = np.concatenate(columns, axis=1)
        path = self.save("constant.npy", constant)
        saved, _, err = self.predict("--x", path, "--center", "false")
        self.assertIn("warning: 1 of 9 columns is constant; ", err)
        self.assertIn("warning: 2 of 9 columns are 0 in every row", err)
        theta = np.linalg.svd(constant / 300**0.5, compute_uv=False)[:7]
        np.testing.assert_allclose(saved["predicted"]["theta"], theta, rtol=1e-9)

        # A model with biases describes the constants with them.
        saved, _, err = self.predict("--x", path)
        self.assertIn("warning: 1 of 9 columns is constant\n", err)
        self.assertEqual(len(saved["predicted"]["theta"]), 6)

    def test_few_rows(self):
        saved, _, err = self.predict("--x", self.save("few.npy", self.x[:4]))
        self.assertIn("warning: there are fewer rows (4) than columns (6)", err)
        theta = np.linalg.svd((self.x[:4] - self.x[:4].mean(0)) / 2, compute_uv=False)[:3]
        np.testing.assert_allclose(saved["predicted"]["theta"], theta, rtol=1e-9)

    def test_default_center(self):
        """Files are centred, and data sets are not, unless --center says otherwise."""
        small.write_mnist(self.folder / "data")
        x = self.save("x.npy", self.x)
        images = ["--dataset", "mnist", "--data_dir", self.folder / "data"]
        for argv, default, words in ((["--x", x], "true", "with"), (images, "false", "without")):
            by_default, out, _ = self.predict(*argv)
            self.assertIn(f"linear VAE {words} biases (--center {default})", out)
            chosen, _, _ = self.predict(*argv, "--center", default)
            self.assertEqual(by_default["predicted"], chosen["predicted"])
            other = {"true": "false", "false": "true"}[default]
            changed, _, _ = self.predict(*argv, "--center", other)
            self.assertNotEqual(by_default["predicted"], changed["predicted"])

    def test_chosen_columns_have_folders_of_their_own(self):
        x = self.save("x.npy", self.x)
        thetas = []
        for columns in ("0,1", "2,3"):
            saved, _, _ = self.predict("--x", x, "--columns", columns)
            thetas.append(saved["predicted"]["theta"])
            self.assertEqual(saved["settings"]["columns"], columns)
        self.assertNotEqual(*thetas)
        self.assertEqual(len(list((self.folder / "runs").rglob("prediction.json"))), 2)

    def test_large_means(self):
        """A column of times has a variance, although its square has too few digits for it."""
        random = np.random.default_rng(1)
        times = 1.6e9 + 20 * random.standard_normal((400, 1))
        other = random.standard_normal((400, 2))
        x = self.save("times.npy", np.concatenate([other, times, np.full((400, 1), 1.7e9)], 1))
        for model in ("vae", "hvae"):
            saved, _, err = self.predict("--x", x, "--model", model)
            self.assertIn("warning: 1 of 4 columns is constant", err)
            rows = np.concatenate([other, times - 1.6e9], 1)
            rows -= rows.mean(0)
            theta = np.linalg.svd(rows / 20, compute_uv=False)
            np.testing.assert_allclose(saved["predicted"]["theta"], theta, rtol=1e-7)

        # A unit that varies far less than another column is no constant, either.
        x = self.save("small.npy", np.concatenate([1e-3 * other, 1e6 * times], 1))
        _, _, err = self.predict("--x", x)
        self.assertNotIn("constant", err)

    def test_fewer_rows_than_columns(self):
        """40 rows of 20,000 columns: the modes by numpy, with and without biases, and of a CVAE."""
        random = np.random.default_rng(1)
        rows = random.standard_normal((40, 20_000)) + 1
        x = self.save("wide.npy", rows)
        for center, kept in (("true", 39), ("false", 40)):
            saved, out, err = self.predict("--x", x, "--center", center, "--beta", 200)
            centred = rows - rows.mean(0) if center == "true" else rows
            theta = np.linalg.svd(centred / 40**0.5, compute_uv=False)[:kept]
            np.testing.assert_allclose(saved["predicted"]["theta"], theta, rtol=1e-9)
            self.assertIn(f"of {kept} units stay active", out)
            self.assertIn("there are fewer rows (40) than columns (20,000)", err)
            # The loss of theorem 1 counts all columns.
            active = theta[theta**2 > 200]
            loss = 10_000 * math.log(2 * math.pi) + (theta[theta**2 <= 200]**2).sum() / 2
            loss += 100 * (1 + np.log(active**2 / 200)).sum()
            self.assertAlmostEqual(saved["optimal_loss"] / loss, 1, places=9)

        y = rows[:, :100] + 3 * random.standard_normal((40, 100))
        few = rows[:, 50:55]
        saved, _, _ = self.predict(
            "--model", "cvae", "--x", self.save("few.npy", few), "--y", self.save("y.npy", y))
        with_constant = np.concatenate([few, np.ones((40, 1))], 1)
        left = y - with_constant @ np.linalg.lstsq(with_constant, y, rcond=None)[0]
        theta = np.linalg.svd(left / 40**0.5, compute_uv=False)[:34]**2
        np.testing.assert_allclose(saved["predicted"]["theta"][:34], theta**0.5, rtol=1e-6)

    def test_rows_of_zeros(self):
        x = self.save("zeros.npy", np.zeros((20, 3)))
        for model in ("vae", "hvae"):
            _, out, _ = self.predict("--x", x, "--model", model)
            self.assertRegex(out, "At beta(_2)? 1, 0 of 1 unit.* stays? active; all.* ")

    def test_more_units_than_modes(self):
        x = self.save("x.npy", self.x)
        saved, _, _ = self.predict("--x", x, "--d_1", 9, "--active", 2)
        self.assertEqual(saved["predicted"]["kl"][6:], [0.0] * 3)

    def test_help(self):
        """The help says what a list does here, where nothing is trained."""
        status, out, err = self.call("--help")
        self.assertEqual((status, err), (0, ""))
        for field in dataclasses.fields(predict_collapse.Flags):
            self.assertIn(f"--{field.name}", out)
        words = " ".join(out.split())
        self.assertIn("Every combination is reported", words)
        self.assertNotIn("combination is trained", words)
        self.assertNotIn("side by side", words)
        for sentence in words.split(". "):
            if "trained" in sentence:
                # These are the only two meanings of the word in the help.
                self.assertRegex(sentence, "Nothing is trained|trained model")


class Pictures(Case):
    """The pictures of all kinds of predictions are drawn."""

    draws_pictures = True

    def check_picture(self, name, *argv):
        status, _, err = self.call(*argv)
        self.assertEqual(status, 0, err)
        picture = newest(self.folder / "runs", name).read_bytes()
        self.assertTrue(picture.startswith(PNG))
        # An empty picture has fewer bytes.
        self.assertGreater(len(picture), 5_000)

    def test_every_kind(self):
        x = self.save("x.npy", self.x)
        y = self.save("y.npy", self.y)
        binary = self.save("binary.npy", self.x > 0.5)
        for argv in (
            ["--x", x],
            ["--x", x, "--model", "hvae"],
            ["--x", x, "--model", "cvae", "--y", y],
            ["--x", x, "--eta_dec", "learned", "--d_1", 3],
        ):
            self.check_picture("trade_off.png", *argv)
        self.check_picture(
            "stability.png", "--x", binary, "--likelihood", "bernoulli", "--beta", "0.5,1")
        self.check_picture("headroom.png", "--x", x, "--residual", y, "--collapsed", 2)


# ------------------------------------------------------------------------------- a learned eta_dec

class LearnedEtaDec(Case):
    """--eta_dec learned."""

    def test_by_hand(self):
        """Probabilistic PCA at beta = 1, and the equation for another beta."""
        x = self.save("x.npy", self.x)
        for center, rows in (("false", self.x), ("true", self.x - self.x.mean(0))):
            variances = np.linalg.svd(rows / 300**0.5, compute_uv=False)**2
            for beta in (1.0, 0.3):
                saved, out, _ = self.predict(
                    "--x", x, "--eta_dec", "learned", "--d_1", 4, "--beta", beta,
                    "--center", center)
                active = (np.array(saved["predicted"]["kl"]) > 0).sum()
                self.assertEqual(active, 4)
                variance = variances[4:].sum() / (6 - 4 * beta)
                self.assertAlmostEqual(saved["learned_eta_dec"], variance**0.5, places=9)
                kl = np.log(variances[:4] / (beta * variance)) / 2
                np.testing.assert_allclose(saved["predicted"]["kl"], kl, rtol=1e-9)
                loss = 3 * (1 + math.log(2 * math.pi * variance)) + beta * kl.sum()
                self.assertAlmostEqual(saved["optimal_loss"], loss, places=9)
                self.assertIn(f"The learned eta_dec is {variance**0.5:.4g}, ", out)
                self.assertIn(f"variance of {variance:.4g}.", out)
                self.assertIn(
                    f"beta = {beta:g}, eta_enc = 1, a learned eta_dec and a learnable sigma", out)

    def test_like_a_fixed_eta_dec(self):
        """With the learned eta_dec as a fixed one, the prediction is the same."""
        x = self.save("x.npy", self.x)
        argv = ["--x", x, "--d_1", 5, "--beta", 1.7]
        learned, _, _ = self.predict(*argv, "--eta_dec", "learned")
        fixed, _, _ = self.predict(*argv, "--eta_dec", repr(learned["learned_eta_dec"]))
        self.assertAlmostEqual(learned["optimal_loss"], fixed["optimal_loss"], places=9)
        for name in ("theta", "kl", "omega"):
            np.testing.assert_allclose(
                learned["predicted"][name], fixed["predicted"][name], rtol=1e-9)
        # Any other eta_dec has a larger loss.
        for factor in (0.9, 1.1):
            other, _, _ = self.predict(*argv, "--eta_dec", factor * learned["learned_eta_dec"])
            self.assertGreater(other["optimal_loss"], learned["optimal_loss"] + 1e-3)

    def test_recommendation_and_lists(self):
        """A recommended beta keeps the wanted units, and the word may be in a list or after =."""
        x = self.save("x.npy", self.x)
        argv = ["--x", x, "--d_1", 5]
        saved, out, _ = self.predict(*argv, "--eta_dec=learned", "--active", 3)
        collapse = saved["predicted"]["collapse"]
        self.assertIn(
            f"Exactly 3 units are active for {collapse[3]:.6g} <= beta < {collapse[2]:.6g}.", out)
        for beta, active in ((collapse[2] * 0.999, 3), (collapse[2] * 1.001, 2)):
            saved, _, _ = self.predict(*argv, "--eta_dec", "learned", "--beta", beta)
            self.assertEqual(sum(kl > 0 for kl in saved["predicted"]["kl"]), active)

        status, out, _ = self.call(*argv, "--eta_dec", "0.5,learned")
        self.assertEqual(status, 0)
        self.assertEqual(out.count("The learned eta_dec is"), 1)
        self.assertIn("eta_dec = 0.5 and a learnable sigma", out)
        # Each value is in the name of its folder.
        names = [path.parent.name for path in (self.folder / "runs").rglob("prediction.json")]
        for value in ("0.5", "learned"):
            endings = [name for name in names if name.endswith(f",eta_dec={value},d_1=5")]
            self.assertTrue(endings, names)
        # The trade-off of the learned one has a column for it.
        columns = [line for line in out.split("\n") if "distortion" in line and "beta " in line]
        self.assertEqual([line.split()[-1] for line in columns], ["loss", "eta_dec"])

    def test_no_lower_bound(self):
        """Six units describe six columns, so that beta must be at least 1."""
        x = self.save("x.npy", self.x)
        self.refuse(
            ["--x", x, "--eta_dec", "learned", "--beta", "2,0.9"],
            "--eta_dec: got learned, but at beta = 0.9 the loss has no lower bound",
            "6 units describe the data completely",
            "--beta of at least 1 or --d_1 of at most 5",
        )
        # What the message names is enough.
        self.predict("--x", x, "--eta_dec", "learned", "--beta", 1)
        self.predict("--x", x, "--eta_dec", "learned", "--beta", 0.9, "--d_1", 5)

        wide = self.save("wide.npy", np.concatenate([self.x, self.x[:, :1]], 1))
        self.refuse(["--x", wide, "--eta_dec", "learned"], "--beta of at least 1.167 ")
        self.predict("--x", wide, "--eta_dec", "learned", "--beta", 1.167)
        zeros = self.save("zeros.npy", np.zeros((20, 3)))
        self.refuse(["--x", zeros, "--eta_dec", "learned"], "--eta_dec", "0 in every row")

    def test_wrong_flags(self):
        x = self.save("x.npy", self.x)
        y = self.save("y.npy", self.y)
        learned = ["--x", x, "--eta_dec", "learned"]
        self.refuse_in_one_line(
            [*learned, "--model", "hvae"], "--eta_dec: got learned, wants a number")
        self.refuse_in_one_line(
            [*learned, "--model", "cvae", "--y", y], "--eta_dec: got learned, wants a number")
        self.refuse_in_one_line([*learned, "--sigma", "0.5"], "--sigma")
        self.refuse_in_one_line(
            [*learned, "--residual", y, "--collapsed", 1], "--eta_dec: got learned, wants the")
        self.refuse_in_one_line(["--x", x, "--eta_dec", "learnt"], "--eta_dec: got 'learnt'")


# -------------------------------------------------------------------------- decoders not Gaussian

class OneUnit:
    """A VAE with one latent unit, a linear encoder and a linear decoder of natural parameters.

    The expectation over z is exact up to Gauss-Hermite quadrature.
    """

    def __init__(self, likelihood, x):
        self.likelihood = likelihood
        self.x = torch.from_numpy(x).double()
        self.sizes = []
        self.s = self.x
        if likelihood == "categorical":
            parts = []
            for column in self.x.T:
                parts.append((column[:, None] == column.unique()).double())
            self.sizes = [part.shape[1] for part in parts]
            self.s = torch.cat(parts, 1)
        nodes, weights = np.polynomial.hermite_e.hermegauss(24)
        self.nodes = torch.from_numpy(nodes)[:, None]
        self.weights = torch.from_numpy(weights / weights.sum())[:, None]

    def loss(self, p, beta):
        """The negative beta-ELBO in nats per row."""
        mean = self.s @ p["encoder"] + p["offset"]
        std = p["log_std"].exp()
        z = mean + std * self.nodes
        a = p["bias"] + z[..., None] * p["decoder"]
        if self.likelihood == "bernoulli":
            log_partition = torch.nn.functional.softplus(a).sum(-1)
        elif self.likelihood == "poisson":
            log_partition = a.exp().sum(-1) + torch.lgamma(self.x + 1).sum(-1)
        else:
            log_partition = sum(part.logsumexp(-1) for part in a.split(self.sizes, -1))
        reconstruction = (self.weights * (log_partition - (self.s * a).sum(-1))).sum(0).mean()
        kl = ((mean**2).mean() + std**2 - 1) / 2 - p["log_std"]
        return reconstruction + beta * kl

    def start(self, scale):
        """Parameters at the collapsed optimum, plus random weights of this scale."""
        random = torch.Generator().manual_seed(0)
        mean = self.s.mean(0)
        zero = torch.zeros((), dtype=torch.float64)
        p = {
            "bias": mean.logit() if self.likelihood == "bernoulli" else mean.log(),
            "offset": zero,
            "log_std": zero.clone(),
        }
        for name in ("encoder", "decoder"):
            p[name] = scale * torch.randn(len(mean), dtype=torch.float64, generator=random)
        return p

    def collapsed_loss(self):
        return self.loss(self.start(0), 1).item()

    def gain(self, beta):
        """How far L-BFGS lowers the loss below that of the collapsed model."""
        p = {name: value.requires_grad_() for name, value in self.start(0.05).items()}
        optimizer = torch.optim.LBFGS(
            p.values(),
            max_iter=400,
            tolerance_grad=1e-9,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure():
            optimizer.zero_grad()
            loss = self.loss(p, beta)
            loss.backward()
            return loss

        optimizer.step(closure)
        return self.collapsed_loss() - self.loss(p, beta).item()


class OtherDecoders(Case):
    """--likelihood bernoulli, categorical and poisson, before training."""

    def setUp(self):
        super().setUp()
        random = np.random.default_rng(2)
        z = random.standard_normal((301, 2))
        logits = z @ random.standard_normal((2, 6)) * 1.5 + random.standard_normal(6)
        self.binary = (random.random((301, 6)) < 1 / (1 + np.exp(-logits))).astype(np.uint8)
        self.counts = random.poisson(np.exp(0.5 * logits))
        # Codes with gaps, of 3, 2, 4 and 3 categories.
        columns = []
        for codes in ((3, 7, 10), (0, 1), (0, 5, 6, 100), (1, 2, 4)):
            place = np.clip(np.round(z[:, 0] + random.standard_normal(301)), 0, len(codes) - 1)
            columns.append(np.array(codes)[place.astype(int)])
        self.codes = np.stack(columns, 1)

    def predict_stability(self, *argv):
        """(contents of prediction.json, stdout, stderr)."""
        status, out, err = self.call(*argv)
        self.assertEqual(status, 0, err)
        path = newest(self.folder / "runs", "prediction.json")
        self.assertTrue((path.parent / "stability.png").read_bytes().startswith(PNG))
        return json.loads(path.read_text(encoding="utf-8")), out, err

    def ratio_of_other_half(self, s, fisher):
        """The held-out rho_1 of statistics s (n, D). fisher(mean) is H (D, D)."""
        halves = arrays.halves_of(len(s), np.random.default_rng(0))
        ratios = []
        for half, other in (halves, halves[::-1]):
            covariance = np.cov(s[half].T, bias=True)
            information = fisher(s[half].mean(0))
            # The eigenvectors of H^+ Cov are the directions of decoder weights.
            sizes, directions = np.linalg.eig(np.linalg.pinv(information) @ covariance)
            w = directions[:, sizes.real.argmax()].real
            information = fisher(s[other].mean(0))
            ratios.append(w @ np.cov(s[other].T, bias=True) @ w / (w @ information @ w))
        return sum(ratios) / 2

    def gain(self, ratios, units, beta):
        """G_k by its formula."""
        ratio = np.maximum(np.sort(ratios)[::-1][:units] / beta, 1)
        return beta / 2 * (ratio - 1 - np.log(ratio)).sum()

    def test_bernoulli(self):
        """rho are the eigenvalues of the correlation matrix. Constant columns are left out."""
        constant = np.ones((301, 1), dtype=np.uint8)
        x = np.concatenate([self.binary[:, :4], constant, 0 * constant, self.binary[:, 4:]], 1)
        path = self.save("x.npy", x)
        with mock.patch("arrays.CHUNK", 38):
            saved, out, _ = self.predict_stability(
                "--x", path, "--likelihood", "bernoulli", "--beta", 1.1, "--d_1", 2)

        # 1. rho, and the loss of independent columns.
        rho = np.linalg.eigvalsh(np.corrcoef(self.binary.T))[::-1]
        np.testing.assert_allclose(saved["rho"], rho, rtol=1e-9)
        p = self.binary.mean(0)
        entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)).sum()
        self.assertAlmostEqual(saved["collapsed_loss"], entropy, places=9)
        self.assertEqual((saved["constant_columns"], saved["columns"]), (2, 8))

        # 2. The held-out rho_1.
        held_out = self.ratio_of_other_half(self.binary, lambda p: np.diag(p * (1 - p)))
        self.assertAlmostEqual(saved["held_out_rho_1"], held_out, places=9)
        self.assertGreater(held_out, 1.5)

        # 3. The bound of Jaakkola and Jordan, which is above that of Boehning.
        logit = np.log(p / (1 - p))
        bound = np.tanh(logit / 2) / (2 * logit)
        covariance = np.cov(self.binary.T, bias=True)
        ratios = np.linalg.eigvalsh(covariance / np.sqrt(np.outer(bound, bound)))
        self.assertAlmostEqual(saved["guaranteed_gain"], self.gain(ratios, 2, 1.1), places=9)
        boehning = self.gain(4 * np.linalg.eigvalsh(covariance), 2, 1.1)
        self.assertGreater(saved["guaranteed_gain"], boehning)

        # 4. In words, and in the table.
        unstable = (rho > 1.1).sum()
        self.assertTrue(1 < unstable < 6)
        self.assertEqual(saved["unstable_directions"], unstable)
        words = " ".join(out.split())
        for sentence in (
            f"At beta 1.1, collapse of all units is unstable in {unstable} directions; it is "
            f"stable from beta {rho[0]:.4g} on.",
            "This holds for any encoder and for a Bernoulli decoder with a bias for each column, "
            f"on {path} (301 rows).",
            "A better solution far from collapse is not excluded.",
            "no count of the units that training would activate.",
            f"The held-out rho_1 is {held_out:.4g}.",
            "2 of 8 columns are constant and left out.",
            f"The loss of the collapsed model is {entropy:.2f} nats per row.",
        ):
            self.assertIn(sentence, words)
        self.assertNotIn("impossible", words)
        self.assertEqual(words.find("At beta 1.1, "), 0)
        table = saved["over_beta"]
        for beta, unstable, gain in zip(table["beta"], table["unstable"], table["gain"]):
            self.assertEqual(unstable, (rho > beta).sum())
            self.assertAlmostEqual(gain, self.gain(ratios, 2, beta), places=9)
            self.assertRegex(out, rf"\n *{beta:g} +{unstable} +{gain:.4f}\n")

    def test_poisson(self):
        x = np.concatenate([self.counts, np.full((301, 1), 2), np.zeros((301, 1))], 1)
        saved, out, _ = self.predict_stability(
            "--x", self.save("x.npy", x), "--likelihood", "poisson", "--beta", 0.8)
        rate = self.counts.mean(0)
        covariance = np.cov(self.counts.T, bias=True)
        rho = np.linalg.eigvalsh(covariance / np.sqrt(np.outer(rate, rate)))[::-1]
        np.testing.assert_allclose(saved["rho"][:6], rho, rtol=1e-9)
        self.assertAlmostEqual(max(map(abs, saved["rho"][6:])), 0)
        self.assertEqual(saved["constant_columns"], 2)
        held_out = self.ratio_of_other_half(self.counts, np.diag)
        self.assertAlmostEqual(saved["held_out_rho_1"], held_out, places=9)

        loss = 0
        for column in x.T:
            rate = column.mean()
            for count in column:
                log_rate = math.log(rate) if rate else 0
                loss -= (count * log_rate - rate - math.lgamma(count + 1)) / 301
        self.assertAlmostEqual(saved["collapsed_loss"], loss, places=9)

        self.assertIsNone(saved["guaranteed_gain"])
        self.assertEqual(set(saved["over_beta"]), {"beta", "unstable"})
        self.assertIn("A Poisson decoder has no guaranteed gain.", out)

    def test_categorical(self):
        """rho are the eigenvalues of multiple correspondence analysis, per column once."""
        x = np.concatenate([self.codes, np.full((301, 1), 9)], 1)
        with mock.patch("arrays.CHUNK", 38):
            saved, out, _ = self.predict_stability(
                "--x", self.save("x.npy", x), "--likelihood", "categorical", "--beta", 1.2,
                "--d_1", 3)

        sizes = []
        parts = []
        for column in self.codes.T:
            codes = sorted(set(column.tolist()))
            sizes.append(len(codes))
            parts.append(np.stack([column == code for code in codes], 1).astype(float))
        self.assertEqual(sizes, [3, 2, 4, 3])
        s = np.concatenate(parts, 1)

        # 1. Multiple correspondence analysis: the indicator matrix, centred and weighted.
        p = s.mean(0)
        singular_values = np.linalg.svd((s - p) / np.sqrt(p * 301), compute_uv=False)
        rho = singular_values[:8]**2
        np.testing.assert_allclose(saved["rho"][:8], rho, rtol=1e-9)
        self.assertAlmostEqual(max(map(abs, saved["rho"][8:])), 0)
        self.assertEqual((saved["constant_columns"], saved["columns"]), (1, 5))

        # 2. The held-out rho_1, the loss and Boehning's bound.
        def fisher(p):
            information = np.diag(p)
            for start, size in zip(np.cumsum([0, *sizes]), sizes):
                block = slice(start, start + size)
                information[block, block] -= np.outer(p[block], p[block])
            return information

        held_out = self.ratio_of_other_half(s, fisher)
        self.assertAlmostEqual(saved["held_out_rho_1"], held_out, places=9)
        self.assertAlmostEqual(saved["collapsed_loss"], -(p * np.log(p)).sum(), places=9)
        ratios = 2 * np.linalg.eigvalsh(np.cov(s.T, bias=True))
        gain = self.gain(ratios, 3, 1.2)
        self.assertGreater(gain, 0)
        self.assertAlmostEqual(saved["guaranteed_gain"], gain, places=9)
        self.assertIn("for a categorical decoder", out)
        self.assertIn("1 of 5 columns is constant", out)

    def test_brute_force(self):
        """A unit gains something just below rho_1, nothing just above it, and more than the bound.

        The unit has a linear encoder. Its exact expected loss is minimised from a start near
        collapse.
        """
        # Grey pixels, for which the loss is a binary cross-entropy.
        grey = 0.7 * self.binary + 0.3 * np.random.default_rng(0).random(self.binary.shape)
        for likelihood, x in (
            ("bernoulli", self.binary),
            ("bernoulli", grey),
            ("poisson", self.counts),
            ("categorical", self.codes),
        ):
            argv = ["--x", self.save("x.npy", x), "--likelihood", likelihood, "--d_1", 1]
            rho = self.predict_stability(*argv)[0]["rho"][0]
            unit = OneUnit(likelihood, x)
            with self.subTest(likelihood=likelihood):
                self.assertGreater(unit.gain(0.95 * rho), 1e-4)
                self.assertLess(abs(unit.gain(1.03 * rho)), 1e-9)

                saved, _, _ = self.predict_stability(*argv, "--beta", 0.3 * rho)
                self.assertAlmostEqual(saved["collapsed_loss"], unit.collapsed_loss(), places=9)
                if likelihood != "poisson":
                    self.assertGreater(saved["guaranteed_gain"], 0.1)
                    self.assertGreater(unit.gain(0.3 * rho), saved["guaranteed_gain"])

    def test_two_categories_are_a_bernoulli_variable(self):
        x = self.save("x.npy", self.binary)
        bernoulli, _, _ = self.predict_stability("--x", x, "--likelihood", "bernoulli")
        categorical, _, _ = self.predict_stability("--x", x, "--likelihood", "categorical")
        np.testing.assert_allclose(categorical["rho"][:6], bernoulli["rho"], rtol=1e-9)
        for name in ("held_out_rho_1", "collapsed_loss"):
            self.assertAlmostEqual(categorical[name], bernoulli[name], places=9)

    def test_noise_apart_from_structure(self):
        """Independent columns have a rho_1 above 1 by chance, but not on held-out rows."""
        random = np.random.default_rng(3)
        samples = {
            "bernoulli": random.random((400, 60)) < random.random(60),
            "poisson": random.poisson(3 * random.random((1, 60)), (400, 60)),
            "categorical": random.integers(0, 3, (400, 30)),
        }
        for likelihood, x in samples.items():
            saved, _, _ = self.predict_stability(
                "--x", self.save("noise.npy", x), "--likelihood", likelihood)
            self.assertGreater(saved["rho"][0], 1.5)
            self.assertLess(abs(saved["held_out_rho_1"] - 1), 0.15)

    def test_lists(self):
        """A list of betas is one report with a row for each, and each --d_1 is a report."""
        x = self.save("x.npy", self.binary)
        status, out, _ = self.call(
            "--x", x, "--likelihood", "bernoulli", "--beta", "0.5,1,100", "--d_1", "1,6")
        self.assertEqual(status, 0)
        self.assertEqual(out.count("At beta 0.5, "), 2)
        self.assertIn("1 unit gains at least", out)
        self.assertIn("6 units gain at least", out)
        self.assertEqual(len(list((self.folder / "runs").rglob("prediction.json"))), 2)
        last_row = out.strip().split("\n")[-1]
        self.assertEqual(last_row.split(), ["100", "0", "0.0000"])

    def test_images_are_binarised(self):
        """A data set of images gives what a file of its binarised pixels gives."""
        small.write_mnist(self.folder / "data")
        saved, out, _ = self.predict_stability(
            "--dataset", "mnist", "--data_dir", self.folder / "data", "--likelihood", "bernoulli")
        self.assertIn("The images are binarised: a pixel above 0.5 counts as 1", out)
        f = predict_collapse.Flags(dataset="mnist", data_dir=str(self.folder / "data"))
        [data] = datasets.load_mnist([f])
        pixels = self.save("pixels.npy", data.train[0].numpy() > 0.5)
        other, out, _ = self.predict_stability("--x", pixels, "--likelihood", "bernoulli")
        self.assertNotIn("binarised", out)
        self.assertEqual(saved["rho"], other["rho"])
        self.assertGreater(saved["rho"][0], 2)

    def test_few_rows(self):
        """Rows of one half may all be the same in a column."""
        rare = np.zeros((300, 3))
        rare[7, 0] = rare[7, 1] = rare[20, 2] = 1
        x = self.save("x.npy", rare)
        for likelihood in ("bernoulli", "categorical", "poisson"):
            saved, _, _ = self.predict_stability("--x", x, "--likelihood", likelihood)
            self.assertAlmostEqual(saved["rho"][0], 2, places=1)
            self.assertEqual(saved["held_out_rho_1"], 0)
        _, _, err = self.predict_stability(
            "--x", self.save("few.npy", self.binary[:4]), "--likelihood", "bernoulli")
        self.assertIn("warning: there are fewer rows (4) than columns (6)", err)

    def test_constant_columns_for_any_number_of_rows(self):
        """A mean of 1 has no rounding error, which would look like a column with information."""
        for count in range(3, 120, 4):
            x = np.ones((count, 2))
            x[::2, 0] = 0
            path = str(self.save("x.npy", x))
            f = predict_collapse.Flags(x=path, likelihood="bernoulli")
            instability = stability.measure_instability(f)
            self.assertEqual((instability.constants, len(instability.rho)), (1, 1))
            self.assertAlmostEqual(instability.rho.item(), 1)

    def test_constant_data(self):
        x = self.save("x.npy", np.ones((9, 3)))
        for likelihood in ("bernoulli", "categorical", "poisson"):
            self.refuse(["--x", x, "--likelihood", likelihood], "--x: all columns are constant")

    def test_wrong_flags(self):
        x = self.save("x.npy", self.binary)
        y = self.save("y.npy", self.y)
        argv = ["--x", x, "--likelihood", "bernoulli"]
        for flag, value in (
            ("--eta_dec", "0.5"),
            ("--eta_dec", "learned"),
            ("--eta_enc", "0.5"),
            ("--sigma", "0,1"),
            ("--active", 3),
            ("--center", "true"),
            ("--beta_1", 2),
        ):
            self.refuse_in_one_line(
                [*argv, flag, value], f"{flag}: cannot be combined with --likelihood bernoulli")
        for model in ("cvae", "hvae", "vae,hvae"):
            self.refuse_in_one_line(
                [*argv, "--model", model], "--model: got", "wants vae for --likelihood bernoulli")
        self.refuse_in_one_line([*argv, "--y", y], "--y: cannot be combined with --model vae")
        self.refuse_in_one_line(
            ["--x", x, "--likelihood", "binary"], "--likelihood: got 'binary', wants one of")
        self.refuse_in_one_line(
            ["--x", x, "--likelihood", "bernoulli,poisson"], "--likelihood", "single value")
        self.refuse_in_one_line([*argv, "--fisher", y], "--fisher: also wants --residual")
        for likelihood in ("poisson", "categorical"):
            self.refuse_in_one_line(
                ["--dataset", "digits", "--likelihood", likelihood],
                f"--dataset: cannot be combined with --likelihood {likelihood}",
            )
        self.refuse([*argv, "--beta", "1e-320"], "--beta", "not finite")


# ------------------------------------------------------------------------------------------ flags

class WrongFlags(Case):
    def test_flags_that_do_not_go_together(self):
        x = self.save("x.npy", self.x)
        y = self.save("y.npy", self.y)
        self.refuse([], "--x")
        self.refuse(["--x", x, "--dataset", "digits"], "--x: cannot be combined with --dataset")
        self.refuse(["--model", "cvae", "--x", x], "--y: got no file")
        self.refuse(["--x", x, "--y", y], "--y: cannot be combined with --model vae")
        self.refuse(["--x", x, "--active", 7], "--active: got 7, wants at most 6, ")
        self.refuse(["--x", x, "--collapsed", 2], "--collapsed", "--residual")

        images = ["--dataset", "digits"]
        for flag, value in (
            ("--columns", "0,1"), ("--drop", "0"), ("--missing", "drop"), ("--scale", "true"),
        ):
            self.refuse(
                [*images, flag, value], f"{flag}: cannot be combined with --dataset digits")
        self.refuse(
            ["--x", x, "--likelihood", "poisson", "--scale"],
            "--scale: cannot be combined with --likelihood poisson")
        for flag, value in (("--mean", y), ("--log_var", y), ("--fisher", y)):
            self.refuse(["--x", x, flag, value], f"{flag}: also wants --residual")

    def test_extreme_flags(self):
        """They are refused at once, in one line. Nothing is read, printed or written."""
        x = self.save("x.npy", self.x)
        extremes = (
            ("--eta_dec", "0"),
            ("--eta_dec", "1e-200"),
            ("--eta_dec", "1e200"),
            ("--eta_enc", "1e-200"),
            ("--eta_enc", "1e200"),
            ("--sigma", "1e200"),
            ("--d_1", "1000000000"),
            ("--beta", "1e300"),
            ("--beta", "1,1e300"),
        )
        for flag, value in extremes:
            with self.subTest(flag=flag, value=value):
                self.refuse_in_one_line(["--x", x, flag, value], flag)
        for flag, value in (
            ("--beta_1", "1e300"),
            ("--beta_2", "1e300"),
            ("--sigma_1", "1e-200"),
            ("--sigma_2", "1e200"),
            ("--d_2", "1000000000"),
        ):
            with self.subTest(flag=flag, value=value):
                self.refuse_in_one_line(["--model", "hvae", "--x", x, flag, value], flag)

        residual = ["--x", x, "--residual", self.save("r.npy", self.y), "--collapsed"]
        self.refuse_in_one_line([*residual, 1, "--eta_dec", "1e-200"], "--eta_dec")
        self.refuse_in_one_line([*residual, 1, "--beta", "1e300"], "--beta")
        self.refuse_in_one_line([*residual, "1000000000"], "--collapsed")
        self.assertFalse((self.folder / "runs").exists())

    def test_results_that_are_not_finite(self):
        """Flags that are only too extreme for these data are refused before anything is printed.

        This holds for each setting of a list, not only for the first.
        """
        x = self.save("x.npy", self.x)
        for flags in (
            ["--sigma", "1e-200"],
            ["--sigma", "1,1e-200"],
            ["--eta_dec", "1e-99", "--beta", "1e-320"],
        ):
            with self.subTest(flags=flags):
                line = self.refuse(["--x", x, *flags], flags[-2], "not finite")
                self.assertNotIn("--d_1", line)
        self.assertEqual(list((self.folder / "runs").iterdir()), [])

    def test_the_limits_themselves(self):
        """Numbers just inside the limits give finite results."""
        x = self.save("x.npy", self.x)
        for flags in (
            ["--eta_dec", "1e-99"],
            ["--eta_dec", "1e100"],
            ["--beta", "1e100"],
            ["--d_1", "10000"],
            ["--eta_enc", "1e100"],
        ):
            with self.subTest(flags=flags):
                saved, _, _ = self.predict("--x", x, *flags)
                self.assertTrue(math.isfinite(saved["optimal_loss"]))
                self.assertTrue(np.isfinite(saved["predicted"]["kl"]).all())


if __name__ == "__main__":
    unittest.main()
