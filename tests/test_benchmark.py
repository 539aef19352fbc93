"""tests/benchmark.py: every mode once at its smallest, and that a deep script's plain loop is an equal to compare with."""
import contextlib
import dataclasses
import re
import sys
import unittest
from unittest import mock

import numpy as np
import torch

import training
from tests import benchmark, small

DEEP = {"latents": "1,1", "num_ch": 4, "num_layers": 2, "d_hidden": 8, "batch_size": 8, "num_epochs": 1, "auxiliary_epochs": 1,
        "num_samples": 2}


class Modes(small.InFolder):
    def setUp(self):
        super().setUp()
        patches = contextlib.ExitStack()
        self.addCleanup(patches.close)
        for name, value in dict(TURNS=1, EXAMPLES=64, IMAGES={"cpu": 2, "cuda": 2}, EPOCHS=1, MNIST=(300, 64), DEEP=DEEP).items():
            patches.enter_context(mock.patch.object(benchmark, name, value))

    def printed(self, *argv, scripts=None):
        """The lines that a mode prints on stdout."""
        chosen = [path for path in benchmark.SCRIPTS if path.name in scripts] if scripts else benchmark.SCRIPTS
        with mock.patch.object(benchmark, "SCRIPTS", chosen):
            status, out, err = small.call(benchmark.main, *argv)
        self.assertEqual(status, None, err)
        return out.strip().split("\n")

    def assert_positive(self, words):
        for word in words:
            self.assertTrue(0 < float(word) < 1e6, word)  # neither is nan

    def test_every_script_that_trains_is_measured(self):
        trains = {path for path in small.ROOT.glob("*_*.py") if " = training.fit(" in path.read_text()}
        self.assertEqual(set(benchmark.SCRIPTS), trains)
        self.assertEqual(len(trains), 18)

    def test_ratios(self):
        first, names, *rows, imports, loading, step = self.printed()
        self.assertIn("64 examples, of a deep script 8; medians of 1 turns", first)
        self.assertEqual(names.split(), ["fit", "ms", "plain", "usual", "grid", "eval"])
        self.assertEqual([row.split()[0] for row in rows], [path.name for path in benchmark.SCRIPTS])
        for row in rows:
            script, fit, plain, usual, grid, products = row.split()
            self.assert_positive((fit, plain, products))
            deep = "\ndef train(" in (small.ROOT / script).read_text()
            one_by_one = deep or "CNN" in script and not torch.cuda.is_available()
            for cell, left_out in ((usual, deep), (grid, one_by_one)):
                self.assertEqual(cell == "-", left_out, row)
                self.assert_positive([] if left_out else [cell])
        self.assert_positive(re.search(r"imports\): (\S+) s$", imports).groups())
        self.assertRegex(loading, r"to the device: \d+\.\d s$")
        self.assert_positive(re.search(r"first step: (\d+) ms, again (\d+) ms$", step).groups())

    def test_scripts(self):
        """One that makes its own data, and a deep one, which has flags that make it small."""
        small.write_mnist(self.folder)
        first, ladder, synthetic = self.printed("scripts", "--data_dir", self.folder, scripts=(
            "MNIST_HVAE_Ladder.py", "Synthetic_CVAE_Relu_correlation.py"))
        self.assertRegex(first, r"^\d+ threads, torch ")
        for row, flags in ((ladder, "--num_epochs=1 --latents=1,1 --num_ch=4 --d_hidden=8 --batch_size=8 --num_samples=0 "
                                    f"--data_dir {self.folder}"),
                           (synthetic, "--num_epochs=1 --num_draws=0")):
            found = re.fullmatch(r"\S+\.py +(\S+) s per epoch, +(\S+) GiB, (.*)", row)
            self.assertEqual(found[3], flags)
            self.assert_positive(found.groups()[:2])

    def test_a_script_that_fails(self):
        python = self.folder / "python"
        python.write_text("#!/bin/sh\necho what is wrong >&2\nexit 1\n")
        python.chmod(0o755)
        with mock.patch.object(sys, "executable", str(python)):
            status, out, _ = small.call(benchmark.main, "scripts")
        self.assertEqual(status, "what is wrong\n")
        self.assertNotIn("GiB", out)

    def test_whole(self):
        small.write_mnist(self.folder)
        with mock.patch.object(benchmark, "MNIST", (300, 10_000)):
            names, ours, plain, usual = self.printed("whole", "--data_dir", self.folder, "--num_epochs", "1", "--num_samples", "1000")
        self.assertEqual(names.split(), ["seconds", *"start to table".split(), "training", "evaluation", *"the rest".split(), "log", "p(x)"])
        *of_ours, log_px = ours.split()[1:]
        *of_plain, log_px_plain = plain.split()[3:]
        self.assert_positive([*of_ours, *of_plain, *usual.split()[-4:-2]])
        self.assertAlmostEqual(float(log_px), float(log_px_plain), delta=0.3)   # the same model, other draws

    def test_growth(self):
        """Each size in a process of its own, and exponents of the largest three."""
        sizes = {"rows": (100, 200), "settings": (1, 2), "d_hidden": (8, 16), "draws": (1, 10, 100, 1000)}
        with mock.patch.object(benchmark, "GROWTH", sizes), mock.patch.object(benchmark, "GROWTH_PNG", self.folder / "growth.png"):
            first, names, *rows = self.printed("growth")
        self.assertEqual(names.split(), ["what", "size", "seconds", "GiB"])
        table, exponents = [row.split() for row in rows[:10]], rows[10:]
        self.assertEqual([row[:2] for row in table], [[what, f"{size:,}"] for what, of in sizes.items() for size in of])
        for row in table:
            self.assert_positive(row[2:])
        self.assertEqual(len(exponents), 8)
        found = float(re.fullmatch(r"seconds over draws: exponent (-?\d\.\d\d)", exponents[-2])[1])
        expected = np.polyfit(np.log([10, 100, 1000]), np.log([float(row[2]) for row in table[-3:]]), 1)[0]
        self.assertAlmostEqual(found, expected, delta=0.1)    # of times that are printed in tenths of a millisecond
        self.assertTrue((self.folder / "growth.png").read_bytes().startswith(b"\x89PNG"))

    def test_cuda_on_any_device(self):
        with mock.patch.object(benchmark, "MNIST", (32, 8)), mock.patch.object(benchmark, "STEPS", (1, 2)), \
                mock.patch.object(benchmark, "ON_CUDA", DEEP):
            status, out, err = small.call(lambda argv: benchmark.on_cuda("cpu"))
        self.assertEqual(status, None, err)
        self.assert_cuda(out.strip().split("\n"))

    @unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
    def test_cuda(self):
        self.assert_cuda(self.printed("cuda"))

    def assert_cuda(self, lines):
        first, names, *rows, float32, tf32, bf16, apart = lines
        self.assertIn("an epoch of ", first)
        self.assertEqual(names.split(), ["precision", "captured,", "s", "launched,", "s", "launching"])
        self.assertEqual(len(rows), 2 * 2 + 1 + 4 * 3)
        for row in rows:
            self.assert_number(row.split()[-2])
        for precision, line in zip(("float32", "tf32", "bf16"), (float32, tf32, bf16)):
            self.assert_positive([re.search(rf"draws, {precision}: -\d+\.\d+ nats, ([\d,]+) draws/s$", line)[1].replace(",", "")])
        self.assertRegex(apart, r"^apart \d+\.\d{4} nats, (as|NOT as) they should: within 0.05$")

    def assert_number(self, word):
        self.assertTrue(abs(float(word)) < 1e6, word)         # so few steps may take less than nothing

    @unittest.skipIf(torch.cuda.is_available(), "needs a machine without a GPU")
    def test_cuda_without_a_gpu(self):
        status, out, err = small.call(benchmark.main, "cuda")
        self.assertEqual((status, out), (2, ""))
        self.assertRegex(err, r"^.*--device: got 'cuda'.*\n$")

    def test_no_such_mode(self):
        status, out, _ = small.call(benchmark.main, "speed")
        self.assertEqual((status, out), ("python -m tests.benchmark speed: wants one of ratios, scripts, whole, plain, growth, cuda", ""))


class PlainDeep(unittest.TestCase):
    def test_trains_what_the_script_trains(self):
        """In double precision, three batches of one epoch, and a model that did move."""
        deep_ones = [path for path in benchmark.SCRIPTS if "\ndef train(" in path.read_text()]
        self.assertEqual(len(deep_ones), 4)
        for script in deep_ones:
            with self.subTest(script=script.name), mock.patch.object(benchmark, "DEEP", DEEP), \
                    mock.patch.object(benchmark, "EXAMPLES", 8 * 24), benchmark.quietly():
                module, Model, f, data = benchmark.model_of(script)
                data = dataclasses.replace(data, train=(data.train[0].double(),))
                [(model, _)] = training.train_group(Model, [f], data, train=module.train)
                plain = benchmark.plain_deep(Model, f, data).state_dict()
                for name, value in model.state_dict().items():
                    self.assertTrue(torch.allclose(value, plain[name], rtol=0, atol=1e-9), name)
                start = training.build(Model, f, data).state_dict()
                self.assertGreater(sum(not torch.equal(value, start[name]) for name, value in plain.items()), len(plain) // 2)


if __name__ == "__main__":
    unittest.main()
