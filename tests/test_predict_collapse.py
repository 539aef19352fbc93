"""predict_collapse.py: its closed forms on arrays from files, and what it refuses to read.

The closed forms are compared with numpy and with the scripts.
"""
import dataclasses
import json
import math
import os
import threading
import unittest
import warnings
from unittest import mock

import common
import numpy as np
import torch

import datasets
import headroom
import MNIST_CVAE_Linear
import MNIST_HVAE_Linear_learnable_sigma_2
import MNIST_HVAE_Linear_nonlearnable_sigma_2
import MNIST_VAE_Linear_learnable_sigma
import MNIST_VAE_Linear_nonlearnable_sigma
import predict_collapse
import theory
import training
import verify
from tests import small

PNG = b"\x89PNG"


def newest(folder, name):
    """The file of this name, in any folder of a folder, that was written last."""
    return max(folder.rglob(name), key=lambda path: path.stat().st_mtime_ns)


class Case(small.InFolder):
    def setUp(self):
        super().setUp()
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
        """Check that the program ends with one line on stderr that holds these words.

        Nothing is printed on stdout, and the exit status is 2. Returns the line.
        """
        status, out, err = self.call(*argv)
        self.assertEqual((status, out), (2, ""), err)
        lines = [line for line in err.strip().split("\n") if "error" in line]
        self.assertEqual(len(lines), 1, err)
        self.assertNotIn("Traceback", err)
        for word in words:
            self.assertIn(word, lines[0])
        return lines[0]

    def refuse_in_one_line(self, argv, *words):
        """`refuse`, where stderr holds nothing but the line, not even the progress of reading."""
        line = self.refuse(argv, *words)
        _, _, err = self.call(*argv)
        self.assertEqual(err, line + "\n")


# -------------------------------------------------------------------------------- the predictions

class Predictions(Case):
    def test_vae_by_hand(self):
        """Theorem 1 from numpy's singular values. --center subtracts the means first."""
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
            first_line = out.strip().split("\n")[0]
            self.assertEqual(
                first_line,
                f"The optimal linear VAE on {x} (300 rows) keeps {active} of 6 units active.",
            )
            self.assertIn("beta = 1.5, eta_enc = 1, eta_dec = 0.7 and a learnable sigma", out)
            for i in range(2):
                share = theta[i]**2 / (theta**2).sum()
                row = rf"\n +{i + 1} +{theta[i]:.4f} +{share:.2%} +{kl[i]:.4f} +active"
                self.assertRegex(out, row)

    def test_cvae_by_hand(self):
        """Theorem 2 from least squares, and the share of y that x explains."""
        left = self.y - self.x @ np.linalg.lstsq(self.x, self.y, rcond=None)[0]
        theta = np.linalg.svd(left / 300**0.5, compute_uv=False)**2
        x = self.save("x.npy", self.x)
        y = self.save("y.npy", self.y)
        saved, out, _ = self.predict("--model", "cvae", "--x", x, "--y", y, "--eta_dec", 0.9)
        kl = np.maximum(np.log(theta / 0.81), 0) / 2
        np.testing.assert_allclose(saved["predicted"]["kl"], kl, atol=1e-9)
        explained = 1 - (left**2).sum() / (self.y**2).sum()
        self.assertIn(f"of x explains {explained:.1%} of the second moment of y.", out)
        self.assertRegex(out, rf"\n +1 +{theta[0]:.4f} +{theta[0] / theta.sum():.2%}")

    def test_cvae_whose_x_determines_y(self):
        """Nothing is left for the units. One column of targets may be a plain vector."""
        x = self.save("x.npy", self.x)
        for determined in (self.x @ np.ones((6, 3)), self.x[:, 0]):
            y = self.save("determined.npy", determined)
            saved, out, _ = self.predict("--model", "cvae", "--x", x, "--y", y)
            self.assertEqual(set(saved["predicted"]["kl"]), {0.0})
            self.assertIn("x explains 100.0% of the second moment of y", out)

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
            predicted = predict_collapse.optimum(f, variances, 1.0)
            level = "_2" if f.model == "hvae" else ""
            collapse = predicted[f"collapse{level}"]
            for wanted in range(1, 1 + len(collapse)):
                with self.subTest(flags=flags, wanted=wanted):
                    self.check_recommendation(f, variances, collapse, wanted)

    def check_recommendation(self, f, variances, collapse, wanted):
        betas = predict_collapse.recommended_betas(collapse, wanted)
        if wanted == 2:
            # The second and the third unit have the same theta.
            self.assertIsNone(betas)
            return
        low, high = betas
        high = min(high, 1e6)
        inside = [low * (1 + 1e-9) + 1e-9, (low + high) / 2, high * (1 - 1e-9)]
        inside = torch.tensor(inside, dtype=torch.float64)
        active = predict_collapse.trade_off(f, variances, inside)["active"].tolist()
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
            self.assertEqual(predict_collapse.recommendation(f, collapse), sentence)

        f = predict_collapse.Flags(model="hvae", active=1)
        never = torch.tensor([math.inf, math.inf, 3.0], dtype=torch.float64)
        self.assertEqual(
            predict_collapse.recommendation(f, never),
            "No beta_2 keeps exactly 1 unit of z2 active, because 2 units never collapse.",
        )
        f.active = 2
        self.assertEqual(
            predict_collapse.recommendation(f, never[:2]),
            "Exactly 2 units of z2 are active for every beta_2.",
        )

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
            predicted = predict_collapse.optimum(f, variances, beta)
            table = predict_collapse.trade_off(f, variances, beta)
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
        saved, _, err = self.predict("--x", self.save("constant.npy", constant))
        self.assertIn("warning: 1 of 9 columns is constant; ", err)
        self.assertIn("warning: 2 of 9 columns are 0 in every row", err)
        theta = np.linalg.svd(constant / 300**0.5, compute_uv=False)[:7]
        np.testing.assert_allclose(saved["predicted"]["theta"], theta, rtol=1e-9)

    def test_few_rows(self):
        saved, _, err = self.predict("--x", self.save("few.npy", self.x[:4]))
        self.assertIn("warning: there are fewer rows (4) than columns (6)", err)
        theta = np.linalg.svd(self.x[:4] / 2, compute_uv=False)
        np.testing.assert_allclose(saved["predicted"]["theta"], theta, rtol=1e-9)

    def test_rows_of_zeros(self):
        x = self.save("zeros.npy", np.zeros((20, 3)))
        for model in ("vae", "hvae"):
            _, out, _ = self.predict("--x", x, "--model", model)
            self.assertRegex(out, "keeps 0 of 1 units.* active")

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


# ---------------------------------------------------------------------------------- kinds of files

class Files(Case):
    def theta(self, path):
        """The theta that the program predicts for the rows of a file."""
        return self.predict("--x", path)[0]["predicted"]["theta"]

    def check_same(self, path, expected):
        """Check that the prediction for a file is the expected one, {name: list}."""
        predicted = self.predict("--x", path)[0]["predicted"]
        self.assertEqual(set(predicted), set(expected))
        for name, values in expected.items():
            np.testing.assert_allclose(
                predicted[name], values, rtol=1e-7, atol=1e-9, err_msg=f"{path.name} {name}")

    def test_every_format(self):
        """The prediction is the same for each kind of file, type of number and order in memory."""
        x = self.x.astype(np.float32)
        expected = self.predict("--x", self.save("x.npy", x))[0]["predicted"]
        np.savez(self.folder / "x.npz", x)
        np.savetxt(self.folder / "x.csv", x, delimiter=",", fmt="%.9g")
        np.savetxt(
            self.folder / "named.csv",
            x,
            delimiter=",",
            fmt="%.9g",
            header="a,b,c,d,e,f",
            comments="",
        )
        torch.save(torch.from_numpy(x), self.folder / "x.pt")
        torch.save(torch.from_numpy(x).requires_grad_(), self.folder / "grad.pt")
        self.save("fortran.npy", np.asfortranarray(x))
        self.save("double.npy", x.astype(np.float64))
        self.save("deep.npy", x.reshape(300, 2, 3))

        text_files = ["x.csv", "named.csv"]
        binary_files = ["x.npz", "x.pt", "grad.pt", "fortran.npy", "double.npy", "deep.npy"]
        for name in text_files + binary_files:
            self.check_same(self.folder / name, expected)

    def test_any_length_of_a_chunk(self):
        x = self.save("x.npy", self.x)
        expected = self.predict("--x", x)[0]["predicted"]
        with mock.patch("predict_collapse.CHUNK", 7):
            self.check_same(x, expected)

    def test_whole_numbers_and_bfloat16(self):
        whole = np.round(10 * self.x)
        x = self.save("int.npy", whole.astype(np.int16))
        expected = self.predict("--x", x)[0]["predicted"]
        theta = np.linalg.svd(whole / 300**0.5, compute_uv=False)
        np.testing.assert_allclose(expected["theta"], theta, rtol=1e-7)

        # These numbers have few bits, so that bfloat16 holds them exactly.
        torch.save(torch.from_numpy(whole).bfloat16(), self.folder / "half.pt")
        half = self.predict("--x", self.folder / "half.pt")[0]["predicted"]
        self.assertEqual(half, expected)

    def test_no_array(self):
        self.write("text.npy", "no array")
        self.write("empty.npy", "")
        self.write("text.csv", "a,b\nc,d\n1,2\n")
        self.write("text.pt", "no tensor")
        self.write("text.npz", "no archive")
        self.write("empty.csv", "")
        torch.save({"x": torch.ones(3, 2)}, self.folder / "dict.pt")
        torch.save(torch.eye(3).to_sparse(), self.folder / "sparse.pt")
        np.savez(self.folder / "two.npz", a=self.x, b=self.y)
        objects = np.array([{}, 1], dtype=object)
        np.save(self.folder / "objects.npy", objects, allow_pickle=True)
        self.save("words.npy", np.array([["a", "b"]] * 3))
        self.save("complex.npy", self.x * 1j)
        self.save("none.npy", self.x[:0])
        self.save("vector.npy", self.x[:, 0])
        names = [path.name for path in sorted(self.folder.iterdir())]
        self.assertEqual(len(names), 14)
        for name in [*names, "absent.npy"]:
            with self.subTest(name), warnings.catch_warnings():
                warnings.simplefilter("error")
                self.refuse(
                    ["--x", self.folder / name], "--x", name, "cannot be read as an array")

        self.refuse(
            ["--x", self.folder / "x.txt"],
            "--x",
            "wants a file whose name ends in .npy, .npz, .csv, .pt",
        )

    def test_no_file(self):
        """A folder and an absent file are refused in one line."""
        for suffix in (".npy", ".npz", ".csv", ".pt"):
            (self.folder / f"folder{suffix}").mkdir()
            self.refuse_in_one_line(
                ["--x", self.folder / f"folder{suffix}"], "--x", f"folder{suffix}", "regular file")
            self.refuse_in_one_line(
                ["--x", self.folder / f"absent{suffix}"], "--x", f"absent{suffix}")
        self.refuse_in_one_line(["--x", self.folder], "--x", "wants a file whose name ends in")

    @unittest.skipUnless(os.path.exists("/dev/null"), "there is no /dev/null")
    def test_a_device(self):
        self.refuse_in_one_line(["--x", "/dev/null"], "--x", "/dev/null", "wants a file")
        for suffix in (".npy", ".npz", ".csv", ".pt"):
            link = self.folder / f"device{suffix}"
            link.symlink_to("/dev/null")
            self.refuse_in_one_line(["--x", link], "--x", link.name, "regular file")

    @unittest.skipUnless(hasattr(os, "mkfifo"), "there are no FIFOs")
    def test_a_fifo(self):
        """Opening a FIFO would wait for a writer for ever."""
        x = self.save("x.npy", self.x)
        for suffix in (".npy", ".npz", ".csv", ".pt"):
            fifo = self.folder / f"fifo{suffix}"
            os.mkfifo(fifo)
            self.refuse_fifo(["--x", fifo], fifo)
        for flags in (["--model", "cvae", "--y"], ["--collapsed", 1, "--residual"]):
            self.refuse_fifo(["--x", x, *flags, self.folder / "fifo.npy"], self.folder / "fifo.npy")

    def refuse_fifo(self, argv, fifo):
        """Check that the program refuses a FIFO, in a thread that cannot hang the test."""
        results = []

        def run():
            results.append(self.call(*argv))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(30)
        if thread.is_alive():
            # The end of a writer lets the reader go on.
            os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
            thread.join(30)
            self.fail(f"{fifo.name} was opened")
        [(status, out, err)] = results
        self.assertEqual((status, out), (2, ""))
        self.assertEqual(len(err.splitlines()), 1, err)
        self.assertIn(fifo.name, err)
        self.assertIn("wants a regular file", err)

    def test_rows_that_do_not_fit(self):
        x = self.save("x.npy", self.x)
        short_y = self.save("y.npy", self.y[:-1])
        self.refuse(
            ["--model", "cvae", "--x", x, "--y", short_y],
            "--y: got 299 rows, wants 300 rows like --x",
        )
        self.refuse(["--x", self.save("one.npy", self.x[:1])], "--x", "at least 2")
        short_r = self.save("r.npy", self.y[1:])
        self.refuse(
            ["--x", x, "--collapsed", 1, "--residual", short_r], "--residual", "299 rows", "300")

    def test_bad_numbers(self):
        for value in (math.nan, math.inf, -math.inf):
            broken = self.x.copy()
            broken[217, 3] = value
            with mock.patch("predict_collapse.CHUNK", 50):
                self.refuse(
                    ["--x", self.save("broken.npy", broken)], "--x", "row 217 ", str(value))
        self.refuse(["--x", self.save("vast.npy", self.x * 1e200)], "--x", "up to 1e+100")

        # The message names the first bad number, also where numbers of both kinds are bad.
        both = self.x.copy()
        both[[3, 5], 0] = 1e101, math.nan
        self.refuse(["--x", self.save("both.npy", both)], "--x", "row 3 ", "1e+101", "up to 1e+100")


class TextFiles(Case):
    """Files that end in .csv."""

    # The rows of a file, and their theta by numpy.
    ROWS = np.array([[1.0, 2.0], [3.0, -4.0], [5.0, 7.0], [-2.0, 8.0]])

    def text(self, first="", newline="\n"):
        """The text of a file that holds the rows, after the text `first`."""
        lines = [",".join(f"{number:g}" for number in row) for row in self.ROWS]
        return first + newline.join(lines) + newline

    def check_rows(self, path, rows=ROWS):
        """Check that the program reads these rows from a file."""
        saved, _, _ = self.predict("--x", path)
        self.assertEqual(saved["rows"], len(rows))
        theta = np.linalg.svd(rows / len(rows)**0.5, compute_uv=False)
        np.testing.assert_allclose(saved["predicted"]["theta"], theta, rtol=1e-9)

    def refuse_cell(self, text, *words):
        """Check that the program refuses a file with this text, in one line with these words."""
        path = self.write("x.csv", text)
        self.refuse_in_one_line(["--x", path], "--x", "x.csv", *words)

    def test_a_bad_cell_in_the_first_row(self):
        """The first row is not dropped as a header because one of its cells is no number."""
        self.refuse_cell(
            "1,abc\n3,4\n5,6\n7,8\n", "line 1, column 2", "'abc'", "wants a number")
        self.refuse_cell("x1,2\n3,4\n5,6\n7,8\n", "line 1, column 1", "'x1'", "wants a number")
        # Spreadsheets leave a missing number empty, and some countries write a decimal comma.
        self.refuse_cell("1,\n3,4\n5,6\n", "line 1, column 2", "''")
        self.refuse_cell('1,"2,5"\n3,4\n5,6\n', "line 1, column 2", "'2,5'")

    def test_a_bad_cell_in_the_first_row_after_a_header(self):
        self.refuse_cell(
            "age,size\n1,abc\n3,4\n5,6\n", "line 2, column 2", "'size'", "'abc'", "wants a number")

    def test_a_bad_cell_further_down(self):
        text = self.text()
        self.refuse_cell(text + "8,x\n", "line 5, column 2", "'x'", "wants a number")
        self.refuse_cell(
            "age,size\n" + text + "8,x\n", "line 6, column 2", "'size'", "'x'", "wants a number")

    def test_a_second_line_without_numbers(self):
        """Only one line is a header."""
        self.refuse_cell("age,size\nyears,m\n1,2\n3,4\n", "line 2, column 1", "'age'", "'years'")

    def test_rows_of_different_lengths(self):
        self.refuse_cell("1,2\n3,4\n5,6,7\n", "line 3", "3 cells", "2", "line 1")
        self.refuse_cell("a,b\n1,2\n\n3\n", "line 4", "1 cells", "2", "line 2")

    def test_header(self):
        """A first line without any number is skipped."""
        self.check_rows(self.write("x.csv", self.text("age,size\n")))
        self.check_rows(self.write("x.csv", self.text('"the age, in years","size"\n')))

    def test_first_row_of_numbers_is_kept(self):
        """nan and inf are numbers, and are refused as such, with their column."""
        self.check_rows(self.write("x.csv", self.text()))
        for value in ("nan", "inf", "-inf"):
            line = self.refuse(
                ["--x", self.write("x.csv", f"{value},{value}\n1,2\n3,4\n")],
                "--x", "line 1, column 1", "wants finite numbers")
            self.assertIn(f"is {value}, wants", line)

    def test_blank_lines_and_comments(self):
        first = "# measured in May\n\nage,size\n  \n"
        self.check_rows(self.write("x.csv", self.text(first) + "\n# the end\n\n"))

    def test_rows_are_named_by_lines(self):
        """Where a number is bad, its line in the file is named, and the name of its column."""
        text = "# first\n\nage,size\n1,2\n\n3,4\n# between\n5,nan\n7,8\n"
        path = self.write("x.csv", text)
        self.refuse(
            ["--x", path], "--x", "line 8, column 2", "'size'", "is nan", "finite numbers")
        path = self.write("x.csv", text.replace("nan", "1e200"))
        self.refuse(["--x", path], "--x", "line 8, column 2", "'size'", "1e+200", "up to 1e+100")
        # Chunks do not matter.
        with mock.patch("predict_collapse.CHUNK", 2):
            self.refuse(["--x", path], "--x", "line 8, column 2", "'size'", "1e+200")
        # The same number in a file without a header has no name.
        path = self.write("x.csv", "1,2\n\n3,4\n5,nan\n")
        line = self.refuse(["--x", path], "--x", "line 4, column 2 is nan")
        self.assertNotIn("size", line)

    def test_columns_of_y_and_residual(self):
        """Messages name the flag whose file holds the bad number."""
        x = self.write("x.csv", self.text())
        bad = self.write("bad.csv", "target\n1\n2\n\nnan\n4\n")
        for flags in (["--model", "cvae", "--y"], ["--collapsed", 1, "--residual"]):
            self.refuse(["--x", x, *flags, bad], flags[-1], "line 5, column 1", "'target'", "nan")

    def test_byte_order_mark(self):
        """Spreadsheets begin a file with one. It is not a part of the first number or name."""
        for newline in ("\n", "\r\n"):
            text = self.text(newline=newline)
            self.check_rows(self.write("x.csv", text, encoding="utf-8-sig"))
            self.check_rows(self.write("x.csv", "age,size" + newline + text, "utf-8-sig"))
        path = self.write("x.csv", "age,size\nx,2\n3,4\n", "utf-8-sig")
        self.refuse(["--x", path], "line 2, column 1 ('age') is 'x'")

    def test_accents_in_the_header(self):
        """The file is read as UTF-8, also where the computer's own encoding is another one."""
        header = "Größe,élévation\n"
        self.check_rows(self.write("x.csv", self.text(header)))
        path = self.write("x.csv", header + "1,2\n3,ö\n5,6\n")
        self.refuse(["--x", path], "line 3, column 2 ('élévation') is 'ö'")
        path = self.write("x.csv", header + "1,2\nnan,4\n5,6\n")
        self.refuse(["--x", path], "line 3, column 1 ('Größe') is nan")

        def open_in_ascii(path, *args, encoding="ascii", **options):
            return open(path, *args, encoding=encoding, **options)

        with mock.patch("predict_collapse.open", open_in_ascii, create=True):
            self.check_rows(self.write("x.csv", self.text(header)))

    def test_another_encoding(self):
        """A file that is not UTF-8 is refused in one line, not with a traceback."""
        path = self.write("x.csv", self.text("Größe,Länge\n"), encoding="latin-1")
        self.refuse_in_one_line(["--x", path], "--x", "x.csv", "cannot be read as an array")


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

        beside = ["--x", x, "--residual", y]
        self.refuse(beside, "--residual", "--collapsed", "at least 1")
        self.refuse(["--residual", y, "--collapsed", 2], "--residual", "--x")
        meaningless = (
            ("--y", y),
            ("--model", "vae,hvae"),
            ("--center", "true"),
            ("--sigma", "0,1"),
            ("--active", 3),
            ("--dataset", "digits"),
        )
        for flag, value in meaningless:
            self.refuse(
                [*beside, "--collapsed", 2, flag, value],
                f"{flag}: cannot be combined with --residual",
            )

    def test_extreme_flags(self):
        """They are refused at once, in one line. Nothing is read, printed or written."""
        x = self.save("x.npy", self.x)
        extremes = (
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


# -------------------------------------------------------------------------------- the post-mortem

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
        with mock.patch("predict_collapse.CHUNK", 38):
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
            gains = [
                self.gain_on_other_half(u, half, ridge, k, beta, eta_dec) for half in (0, 1)
            ]
            held_out.append(sum(gains) / 2)
        self.assertAlmostEqual(saved["held_out"], max(held_out), places=8)
        self.assertGreater(saved["held_out"], 0.01)
        self.assertTrue(
            out.startswith(
                "\nWith beta = 0.6 and eta_dec = 0.7, 3 units collapsed because of training: "
                f"reviving them would lower the loss by at least {saved['headroom']:.2g} nats."
            ),
            out,
        )

        # 3. The table. The gain of one unit is its term of the sum.
        self.assertIn("unit tau tau / threshold gain (nats)", " ".join(out.split()))
        term = beta / 2 * (ratio[0] - 1 - np.log(ratio[0]))
        self.assertRegex(out, rf"\n +1 +{tau[0]:.4f} +{ratio[0]:.4f} +{term:.4f}")

    def gain_on_other_half(self, u, half, ridge, k, beta, eta_dec):
        """The gain of k units that are fitted on the even (0) or odd (1) rows, on the others."""
        level = beta * eta_dec**2
        half_u = u[half::2]
        half_r = self.y[half::2]
        other_u = u[1 - half::2]
        left = self.y[1 - half::2]

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

        # 2. The objective.
        saved, out = self.examine("--x", x, "--residual", r, "--eta_dec", 1, "--collapsed", 4)
        self.assertEqual((saved["headroom"], saved["held_out"]), (0, 0))
        self.assertIn("4 units collapsed because of the objective.", out)

        # 3. Both causes, in a list of betas.
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
        [(cross, moment, *objective)] = headroom.residual_moments(model, f, data).values()
        tau = theory.spectrum(headroom.linear_part(cross, moment))
        gain = headroom.gain_of_units(tau, 4, *objective)

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


if __name__ == "__main__":
    unittest.main()
