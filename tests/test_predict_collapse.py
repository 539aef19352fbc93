"""predict_collapse.py: the closed forms on arrays from files, against numpy and the scripts; and what is no such array."""
import json
import math
import unittest
import warnings
from unittest import mock

import numpy as np
import torch

import datasets
import report
import theory
import training
import MNIST_CVAE_Linear
import MNIST_HVAE_Linear_learnable_sigma_2
import MNIST_HVAE_Linear_nonlearnable_sigma_2
import MNIST_VAE_Linear_learnable_sigma
import MNIST_VAE_Linear_nonlearnable_sigma
import predict_collapse
from tests import small


class Case(small.InFolder):
    def setUp(self):
        super().setUp()
        random = np.random.default_rng(0)
        self.x = random.standard_normal((300, 5)) @ random.standard_normal((5, 6)) + 0.3 * random.standard_normal((300, 6)) + 0.5
        self.y = self.x[:, :3] @ random.standard_normal((3, 4)) + random.standard_normal((300, 4))

    def save(self, name, array):
        np.save(self.folder / name, array)
        return self.folder / name

    def call(self, *argv):
        return small.call(predict_collapse.main, "--out_dir", self.folder / "runs", *argv)

    def predict(self, *argv):
        """(what prediction.json says, stdout, stderr)."""
        status, out, err = self.call(*argv)
        self.assertEqual(status, 0, err)
        path = max((self.folder / "runs").rglob("prediction.json"), key=lambda path: path.stat().st_mtime_ns)
        self.assertTrue((path.parent / "trade_off.png").read_bytes().startswith(b"\x89PNG"))
        return json.loads(path.read_text()), out, err


class Predictions(Case):
    def test_vae_by_hand(self):
        """Theorem 1 from numpy's singular values; --center takes the means away first."""
        x = self.save("x.npy", self.x)
        for center, rows in ((False, self.x), (True, self.x - self.x.mean(0))):
            theta = np.linalg.svd(rows / 300**0.5, compute_uv=False)
            found, out, _ = self.predict("--x", x, "--eta_dec", 0.7, "--beta", 1.5, "--center", str(center).lower())
            predicted = found["predicted"]
            np.testing.assert_allclose(predicted["theta"], theta, rtol=1e-9)
            np.testing.assert_allclose(predicted["collapse"], theta**2 / 0.49, rtol=1e-9)
            kl = np.maximum(np.log(theta / (1.5**0.5 * 0.7)), 0)
            np.testing.assert_allclose(predicted["kl"], kl, atol=1e-9)
            self.assertTrue(0 < (kl > 0).sum() < 6)
            self.assertIn(f"{(kl > 0).sum()} of 6 units active", out)
            for i in range(2):                                # the printed rows
                self.assertRegex(out, rf"\n +{i + 1} +{theta[i]:.4f} +{theta[i]**2 / (theta**2).sum():.2%} +{kl[i]:.4f} +active")

    def test_cvae_by_hand(self):
        """Theorem 2 from least squares, and how much of y x explains."""
        left = self.y - self.x @ np.linalg.lstsq(self.x, self.y, rcond=None)[0]
        theta = np.linalg.svd(left / 300**0.5, compute_uv=False)**2
        argv = ["--model", "cvae", "--x", self.save("x.npy", self.x), "--y", self.save("y.npy", self.y)]
        found, out, _ = self.predict(*argv, "--eta_dec", 0.9)
        np.testing.assert_allclose(found["predicted"]["kl"], np.maximum(np.log(theta / 0.81), 0) / 2, atol=1e-9)
        self.assertIn(f"x explains {1 - (left**2).sum() / (self.y**2).sum():.1%} of y", out)
        self.assertRegex(out, rf"\n +1 +{theta[0]:.4f} +{theta[0] / theta.sum():.2%}")
        # y that x determines leaves nothing; one column of targets may be a plain vector.
        for y in (self.x @ np.ones((6, 3)), self.x[:, 0]):
            found, out, _ = self.predict("--model", "cvae", "--x", self.folder / "x.npy", "--y", self.save("of_x.npy", y))
            self.assertEqual(set(found["predicted"]["kl"]), {0.0})
            self.assertIn("x explains 100.0% of y", out)

    def test_like_the_scripts(self):
        """The same units as the linear scripts predict, of images."""
        small.write_mnist(self.folder / "data")
        argv = ["--dataset", "mnist", "--data_dir", self.folder / "data"]
        etas = {"eta_enc": 1.3, "eta_dec": 0.8}
        for script, model, flags in (
                (MNIST_VAE_Linear_learnable_sigma.VAE, "vae", dict(beta=0.7, d_1=4)),
                (MNIST_VAE_Linear_nonlearnable_sigma.VAE, "vae", dict(beta=0.7, d_1=4, sigma=0.6)),
                (MNIST_CVAE_Linear.CVAE, "cvae", dict(beta=0.7, d_1=4)),
                (MNIST_HVAE_Linear_learnable_sigma_2.HVAE, "hvae", dict(beta_1=0.7, beta_2=1.2, sigma_1=0.6, d_1=4, d_2=3)),
                (MNIST_HVAE_Linear_nonlearnable_sigma_2.HVAE, "hvae",
                 dict(beta_1=0.7, beta_2=1.2, sigma_1=0.6, sigma_2=0.5, d_1=4, d_2=3))):
            with self.subTest(script=script.__module__):
                found, _, _ = self.predict("--model", model, *argv, *(
                    word for name, value in (flags | etas).items() for word in (f"--{name}", value)))
                load = datasets.load_mnist_quarters if model == "cvae" else datasets.load_mnist
                f = predict_collapse.Flags(dataset="mnist", data_dir=str(self.folder / "data"), **flags | etas)
                f.c, f.dim_z = f.eta_dec / f.eta_enc, f.d_1       # as those scripts call them
                f.sigma = f.sigma or 1.0                          # where a learnable one starts
                expected = theory.per_unit(script.predicted(f, load([f])[0]))
                for name, values in expected.items():
                    if name in found["predicted"] and not (name == "theta" and model == "cvae"):
                        np.testing.assert_allclose(*(np.array([math.inf if v is None else v for v in of])
                                                     for of in (found["predicted"][name], values)), rtol=1e-6, atol=1e-9)

    def test_every_format(self):
        """The same prediction from every kind of file, number and order in memory, and however long a chunk is."""
        x = self.x.astype(np.float32)
        expected = self.predict("--x", self.save("x.npy", x))[0]["predicted"]
        np.savez(self.folder / "x.npz", x)
        np.savetxt(self.folder / "x.csv", x, delimiter=",", fmt="%.9g")
        np.savetxt(self.folder / "named.csv", x, delimiter=",", fmt="%.9g", header="a,b,c,d,e,f", comments="")
        torch.save(torch.from_numpy(x), self.folder / "x.pt")
        torch.save(torch.from_numpy(x).requires_grad_(), self.folder / "grad.pt")
        self.save("fortran.npy", np.asfortranarray(x))
        self.save("double.npy", x.astype(np.float64))
        self.save("deep.npy", x.reshape(300, 2, 3))
        for name in ("x.npz", "x.csv", "named.csv", "x.pt", "grad.pt", "fortran.npy", "double.npy", "deep.npy", "x.npy"):
            with mock.patch("predict_collapse.CHUNK", 7 if name == "x.npy" else 4096):
                found = self.predict("--x", self.folder / name)[0]["predicted"]
            for key, values in expected.items():
                np.testing.assert_allclose(found[key], values, rtol=1e-7, atol=1e-9, err_msg=f"{name} {key}")
        whole = self.predict("--x", self.save("int.npy", np.round(10 * x).astype(np.int16)))[0]["predicted"]
        torch.save(torch.from_numpy(np.round(10 * x)).bfloat16(), self.folder / "half.pt")      # exact: whole numbers of few bits
        self.assertEqual(self.predict("--x", self.folder / "half.pt")[0]["predicted"], whole)
        theta = np.linalg.svd(np.round(10 * x) / 300**0.5, compute_uv=False)
        np.testing.assert_allclose(whole["theta"], theta, rtol=1e-7)

    def test_recommended_beta_gives_the_wanted_units(self):
        variances = torch.tensor([9.0, 5.0, 5.0, 2.0, 0.5, 0.0], dtype=torch.float64)
        for flags in (dict(), dict(sigma=0.4), dict(model="cvae"), dict(model="hvae"), dict(model="hvae", sigma_2=0.6),
                      dict(model="hvae", d_2=3)):
            f = predict_collapse.Flags(eta_dec=0.7, eta_enc=1.2, **flags)
            predicted = predict_collapse.optimum(f, variances, 1.0)
            top = "_2" if f.model == "hvae" else ""
            collapse = predicted[f"collapse{top}"]
            for wanted in range(1, 1 + len(collapse)):
                found = predict_collapse.recommended(collapse, wanted)
                if found is None:
                    self.assertEqual(wanted, 2)               # the second and third have the same theta
                    continue
                low, high = found
                inside = torch.tensor([low * (1 + 1e-9) + 1e-9, (low + min(high, 1e6)) / 2, min(high, 1e6) * (1 - 1e-9)],
                                      dtype=torch.float64)
                active = predict_collapse.trade_off(f, variances, inside)["active"].tolist()
                self.assertEqual(active, [wanted] * 3, (flags, wanted))

    def test_trade_off_by_hand(self):
        """The distortion of the optimal maps themselves: per mode (theta - omega lambda)^2 + (omega sigma)^2; of an HVAE
        theta^2 sigma_1^2 / m, m = lambda_1^2 + sigma_1^2 (the best U1); modes without a unit whole."""
        variances = torch.tensor([9.0, 5.0, 2.0, 0.5], dtype=torch.float64)
        theta, beta = variances.sqrt(), torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
        for flags in (dict(d_1=3), dict(d_1=3, sigma=0.4), dict(model="hvae", d_1=3), dict(model="hvae", d_1=3, sigma_2=0.6)):
            f = predict_collapse.Flags(eta_dec=0.7, eta_enc=1.2, **flags)
            predicted, found = (of(f, variances, beta) for of in (predict_collapse.optimum, predict_collapse.trade_off))
            if f.model == "hvae":
                m = predicted["lambda_1"]**2 + f.sigma_1**2
                error = theta[:3]**2 * f.sigma_1**2 / m
            else:
                error = (theta[:3] - predicted["omega"] * predicted["lambda"])**2 + (predicted["omega"] * predicted["sigma"])**2
            np.testing.assert_allclose(found["distortion"], error.sum(1) + 0.5, rtol=1e-9)
            kls = [name for name in predicted if name.startswith("kl")]
            np.testing.assert_allclose(found["rate"], sum(predicted[kl].sum(1) for kl in kls), rtol=1e-12)

    def test_what_is_printed_of_a_recommendation_and_a_range(self):
        x = self.save("x.npy", self.x)
        found, out, _ = self.predict("--x", x, "--active", 3, "--beta", "0.5,1,2,400000")
        collapse = found["predicted"]["collapse"]
        self.assertIn(f"for 3 active units: beta from {collapse[3]:.6g} on and below {collapse[2]:.6g}", out)
        self.assertEqual(found["trade_off"]["beta"], [0.5, 1.0, 2.0, 400000.0])
        rows = out.strip().split("\n")[-4:]
        self.assertEqual([row.split()[1] for row in rows], [str(sum(c > b for c in collapse)) for b in (0.5, 1, 2, 4e5)])
        self.assertEqual(rows[-1].split()[1:3], ["0", "0.0000"])


class Wrong(Case):
    def refuse(self, argv, *words):
        status, out, err = self.call(*argv)
        self.assertEqual((status, out), (2, ""), err)
        line = [line for line in err.strip().split("\n") if "error" in line]
        self.assertEqual(len(line), 1, err)
        for word in words:
            self.assertIn(word, line[0])

    def test_no_array(self):
        (self.folder / "text.npy").write_text("no array")
        (self.folder / "empty.npy").write_bytes(b"")
        (self.folder / "text.csv").write_text("a,b\nc,d\n1,2\n")
        (self.folder / "text.pt").write_text("no tensor")
        (self.folder / "text.npz").write_text("no archive")
        (self.folder / "empty.csv").write_text("")
        torch.save({"x": torch.ones(3, 2)}, self.folder / "dict.pt")
        torch.save(torch.eye(3).to_sparse(), self.folder / "sparse.pt")
        np.savez(self.folder / "two.npz", a=self.x, b=self.y)
        np.save(self.folder / "objects.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
        self.save("words.npy", np.array([["a", "b"]] * 3))
        self.save("complex.npy", self.x * 1j)
        self.save("none.npy", self.x[:0])
        self.save("vector.npy", self.x[:, 0])
        for name in ("text.npy", "empty.npy", "text.csv", "text.pt", "text.npz", "empty.csv", "dict.pt", "sparse.pt", "two.npz",
                     "objects.npy", "words.npy", "complex.npy", "none.npy", "vector.npy", "absent.npy"):
            with warnings.catch_warnings(action="error"):
                self.refuse(["--x", self.folder / name], "--x", name, "cannot be read as an array")
        self.refuse(["--x", self.folder / "x.txt"], "--x", "wants a file that ends in .npy, .npz, .csv, .pt")

    def test_rows_that_do_not_do(self):
        for value in (math.nan, math.inf):
            broken = self.x.copy()
            broken[217, 3] = value
            with mock.patch("predict_collapse.CHUNK", 50):
                self.refuse(["--x", self.save("broken.npy", broken)], "--x", "row 217 ", str(value))
        x = self.save("x.npy", self.x)
        self.refuse(["--model", "cvae", "--x", x, "--y", self.save("y.npy", self.y[:-1])], "--y", "299 rows", "300")
        self.refuse(["--x", self.save("one.npy", self.x[:1])], "--x", "at least 2")
        self.refuse(["--x", self.save("vast.npy", self.x * 1e200)], "--x", "up to 1e+100")
        self.refuse(["--x", x, "--collapsed", 1, "--residual", self.save("r.npy", self.y[1:])], "--residual", "299 rows", "300")

    def test_flags_that_do_not_go_together(self):
        x, y = self.save("x.npy", self.x), self.save("y.npy", self.y)
        self.refuse([], "--x")
        self.refuse(["--x", x, "--dataset", "digits"], "--x")
        self.refuse(["--model", "cvae", "--x", x], "--y")
        self.refuse(["--x", x, "--y", y], "--y")
        self.refuse(["--x", x, "--active", 7], "--active", "7", "6 units")
        self.refuse(["--x", x, "--collapsed", 2], "--collapsed", "--residual")
        beside = ["--x", x, "--residual", y]
        self.refuse(beside, "--residual", "--collapsed", "at least 1")
        self.refuse(["--residual", y, "--collapsed", 2], "--residual", "--x")
        for flag, value in (("--y", y), ("--model", "vae,hvae"), ("--center", "true"), ("--sigma", "0,1"), ("--active", 3),
                            ("--dataset", "digits")):
            self.refuse([*beside, "--collapsed", 2, flag, value], flag, "no meaning")

    def test_data_that_is_odd_but_has_an_answer(self):
        constant = np.concatenate([self.x, np.full((300, 1), 4.0), np.zeros((300, 2))], axis=1)
        found, out, err = self.predict("--x", self.save("constant.npy", constant))
        self.assertIn("warning: 1 of 9 columns are constant", err)
        self.assertIn("warning: 2 of 9 columns are 0 throughout", err)
        np.testing.assert_allclose(found["predicted"]["theta"], np.linalg.svd(constant / 300**0.5, compute_uv=False)[:7], rtol=1e-9)
        found, out, err = self.predict("--x", self.save("few.npy", self.x[:4]))
        self.assertIn("warning: 4 rows are few for 6 columns", err)
        np.testing.assert_allclose(found["predicted"]["theta"], np.linalg.svd(self.x[:4] / 2, compute_uv=False), rtol=1e-9)
        for model in ("vae", "hvae"):
            found, out, err = self.predict("--x", self.save("zeros.npy", np.zeros((20, 3))), "--model", model)
            self.assertRegex(out, "0 of 1 units.* active")
        more = self.predict("--x", self.save("x.npy", self.x), "--d_1", 9, "--active", 2)[0]["predicted"]
        self.assertEqual(more["kl"][6:], [0.0] * 3)           # more units than modes


class OfATrainedModel(Case):
    """--residual: the headroom of a model of the user's own."""

    def verdict(self, *argv):
        """(what headroom.json says, stdout)."""
        status, out, err = self.call(*argv)
        self.assertEqual(status, 0, err)
        path = max((self.folder / "runs").rglob("headroom.json"), key=lambda path: path.stat().st_mtime_ns)
        self.assertTrue((path.parent / "headroom.png").read_bytes().startswith(b"\x89PNG"))
        return json.loads(path.read_text()), out

    def test_by_hand(self):
        """On all rows by numpy's regression; held out from the rows themselves, row by row."""
        beta, eta, k = 0.6, 0.7, 3
        u, r = np.concatenate([self.x, np.ones((300, 1))], axis=1), self.y.reshape(300, 2, 2)
        with mock.patch("predict_collapse.CHUNK", 38):
            found, out = self.verdict("--x", self.save("u.npy", self.x), "--residual", self.save("r.npy", r), "--eta_dec", eta,
                                      "--beta", beta, "--collapsed", k)
        fitted = u @ np.linalg.lstsq(u, self.y, rcond=None)[0]
        tau, level = np.linalg.svd(fitted / 300**0.5, compute_uv=False)**2, beta * eta**2
        np.testing.assert_allclose(found["tau"], tau[:k], rtol=1e-9)
        self.assertAlmostEqual(found["level"], level)
        above = np.maximum(tau[:k] / level, 1)
        self.assertAlmostEqual(found["headroom"], beta / 2 * (above - 1 - np.log(above)).sum(), places=9)
        self.assertGreater((above > 1).sum(), 1)
        held_out = []
        for ridge in (0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
            gained = 0
            for a in (0, 1):
                of_u, of_r, other = u[a::2], self.y[a::2], self.y[1 - a::2]
                A, C = of_u.T @ of_u / 150, of_r.T @ of_u / 150
                by_u = np.linalg.solve(A + ridge * np.trace(A) * np.eye(7), C.T)
                size, directions = np.linalg.eigh(C @ by_u)
                for i in (3, 2, 1):                       # z = mean + noise of variance share, in stds of the prior
                    share = min(1, level / size[i])
                    z = (1 - share)**0.5 * (u[1 - a::2] @ by_u @ directions[:, i]) / size[i]**0.5
                    decoder = max(0, size[i] - level)**0.5 * directions[:, i]
                    error = (other**2).sum(1) - ((other - np.outer(z, decoder))**2).sum(1) - share * (decoder**2).sum()
                    gained += (error / (2 * eta**2) - beta / 2 * (z**2 + share - 1 - np.log(share))).mean() / 2
                    other = other - np.outer(z, decoder)
            held_out.append(gained)
        self.assertAlmostEqual(found["held_out"], max(held_out), places=8)
        self.assertGreater(found["held_out"], 0.01)
        self.assertIn(f"3 units collapsed, by training: idle units would pay at least {found['headroom']:.2g} nats", out)

    def test_verdicts(self):
        random = np.random.default_rng(1)
        u, noise = random.standard_normal((200, 30)), random.standard_normal((200, 8))
        x, r = self.save("u.npy", u), self.save("noise.npy", noise)
        found, out = self.verdict("--x", x, "--residual", r, "--eta_dec", 0.3, "--collapsed", 4)       # 31 columns fit 200 rows
        self.assertGreater(found["headroom"], 0.01)
        self.assertLess(found["held_out"], 0.01)
        self.assertIn("4 units collapsed: too few rows to tell by what", out)
        found, out = self.verdict("--x", x, "--residual", r, "--eta_dec", 1, "--collapsed", 4)
        self.assertEqual((found["headroom"], found["held_out"]), (0, 0))
        self.assertIn("4 units collapsed, by the objective", out)
        _, out = self.verdict("--x", x, "--residual", self.save("r.npy", noise + 3 * u[:, :8]), "--collapsed", 1, "--beta", "0.5,50")
        self.assertRegex(out, r"(?s)beta = 0.5.*\n1 unit collapsed, by training: .*beta = 50.*\n1 unit collapsed, by the objective")

    def test_rare_columns_are_not_relied_on(self):
        """A column that is tiny in one row and large in one of the other half would make that one's z enormous."""
        random = np.random.default_rng(1)
        u, noise = random.standard_normal((400, 3)), random.standard_normal((400, 2))
        rare = np.zeros((400, 1))
        rare[10], rare[11] = 1e-4, 1
        x, r = self.save("u.npy", np.concatenate([u, rare], 1)), self.save("r.npy", noise + 3 * u[:, :2])
        found, _ = self.verdict("--x", x, "--residual", r, "--collapsed", 2)
        without, _ = self.verdict("--x", self.save("u.npy", u), "--residual", r, "--collapsed", 2)
        self.assertAlmostEqual(found["held_out"], without["held_out"], delta=0.02)

    def test_like_a_script(self):
        """The headroom that a script reports of its own model, from two arrays."""
        data = small.digit_data(300, 20)
        f = MNIST_VAE_Linear_learnable_sigma.Flags(device="cpu", d_1=4, eta_dec=0.5)
        model = training.build(MNIST_VAE_Linear_learnable_sigma.VAE, f, data).eval()
        [(cross, moment, *weights)] = report.unexplained(model, f, data).values()
        of_script = theory.headroom(theory.spectrum(theory.linear_part(cross, moment)), 4, *weights)
        [x] = data.train
        left = x - model.U(model.W(x))
        found, _ = self.verdict("--x", self.save("u.npy", x.numpy()), "--residual", self.save("r.npy", left.detach().numpy()),
                                "--eta_dec", 0.5, "--collapsed", 4)
        self.assertGreater(of_script, 0.1)
        self.assertAlmostEqual(found["headroom"], of_script, places=6)


if __name__ == "__main__":
    unittest.main()
