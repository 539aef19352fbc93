"""tests/benchmark.py: each command at its smallest size, and the plain loop of deep scripts."""
import contextlib
import dataclasses
import re
import sys
import unittest
from unittest import mock

import training
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests import benchmark, small

# Flags that make the deep scripts as small as possible.
DEEP = {
    "side": 14,
    "latents": "2",
    "num_ch": 4,
    "num_layers": 2,
    "d_hidden": 8,
    "batch_size": 8,
    "num_epochs": 1,
    "auxiliary_epochs": 1,
    "num_samples": 2,
}

# The sizes of the benchmark in these tests.
SIZES = {
    "TURNS": 1,
    "EXAMPLES": 64,
    "IMAGES": {"cpu": 2, "cuda": 2},
    "EPOCHS": 1,
    "MNIST": (300, 64),
    "DEEP": DEEP,
}


def has_own_loop(script):
    """Whether the script at this path has its own training loop, so that it is a deep one."""
    return "\ndef train(" in script.read_text(encoding="utf-8")


class Commands(small.InFolder):
    def setUp(self):
        super().setUp()
        patches = contextlib.ExitStack()
        self.addCleanup(patches.close)
        for name, value in SIZES.items():
            patches.enter_context(mock.patch.object(benchmark, name, value))

    def printed(self, *argv, scripts=None):
        """The lines that a command prints on stdout. It measures these scripts, or all."""
        chosen = benchmark.SCRIPTS
        if scripts is not None:
            chosen = [path for path in chosen if path.name in scripts]
        with mock.patch.object(benchmark, "SCRIPTS", chosen):
            status, out, err = small.call(benchmark.main, *argv)
        self.assertEqual(status, None, err)
        return out.strip().split("\n")

    def assert_positive(self, words):
        """Each word is a positive number. Neither infinity nor nan passes."""
        for word in words:
            self.assertTrue(0 < float(word) < 1e6, word)

    def test_every_script_that_trains_is_measured(self):
        scripts_that_train = set()
        for path in small.ROOT.glob("*_*.py"):
            if " = training.fit(" in path.read_text(encoding="utf-8"):
                scripts_that_train.add(path)
        self.assertEqual(set(benchmark.SCRIPTS), scripts_that_train)
        self.assertEqual(len(scripts_that_train), 19)

    def test_ratios(self):
        first, names, *rows, imports, loading, step = self.printed()
        self.assertIn("64 examples, of a deep script 8; medians of 1 turns", first)
        self.assertEqual(names.split(), ["fit", "ms", "plain", "usual", "grid", "eval"])

        scripts = [row.split()[0] for row in rows]
        self.assertEqual(scripts, [path.name for path in benchmark.SCRIPTS])
        for row in rows:
            script, fit, plain, usual, grid, products = row.split()
            self.assert_positive([fit, plain, products])
            is_deep = has_own_loop(small.ROOT / script)
            is_slow_on_cpu = "CNN" in script and not torch.cuda.is_available()
            for cell, is_left_out in ((usual, is_deep), (grid, is_deep or is_slow_on_cpu)):
                self.assertEqual(cell == "-", is_left_out, row)
                if not is_left_out:
                    self.assert_positive([cell])

        self.assert_positive(re.search(r"imports\): (\S+) s$", imports).groups())
        self.assertRegex(loading, r"to the device: \d+\.\d s$")
        milliseconds = re.search(r"first step: (\d+) ms, again (\d+) ms$", step)
        self.assert_positive(milliseconds.groups())

    def test_scripts(self):
        """A deep script, which has flags that make it small, and one that draws its own data."""
        small.write_mnist(self.folder, n_train=64, n_test=16)
        first, ladder, synthetic = self.printed(
            "scripts",
            "--data_dir",
            self.folder,
            scripts=("MNIST_HVAE_Ladder.py", "Synthetic_CVAE_Relu_correlation.py"),
        )
        self.assertRegex(first, r"^\d+ threads, torch ")
        ladder_flags = (
            "--num_epochs=1 --side=14 --latents=2 --num_ch=4 --d_hidden=8 --batch_size=8 "
            f"--num_samples=0 --data_dir {self.folder}"
        )
        for row, flags in ((ladder, ladder_flags), (synthetic, "--num_epochs=1 --num_draws=0")):
            match = re.fullmatch(r"\S+\.py +(\S+) s per epoch, +(\S+) GiB, (.*)", row)
            self.assertEqual(match[3], flags)
            self.assert_positive([match[1], match[2]])

    def test_a_script_that_fails(self):
        python = self.folder / "python"
        python.write_text("#!/bin/sh\necho what is wrong >&2\nexit 1\n", encoding="utf-8")
        python.chmod(0o755)
        with mock.patch.object(sys, "executable", str(python)):
            status, out, _ = small.call(benchmark.main, "scripts")
        self.assertEqual(status, "what is wrong\n")
        self.assertNotIn("GiB", out)

    def test_whole(self):
        small.write_mnist(self.folder)
        flags = ["--data_dir", self.folder, "--num_epochs", "1", "--num_samples", "400"]
        with mock.patch.object(benchmark, "MNIST", (300, 10_000)):
            names, script, plain, usual = self.printed("whole", *flags)
        header = "seconds start to table training evaluation the rest log p(x)"
        self.assertEqual(names.split(), header.split())

        *script_seconds, script_log_px = script.split()[1:]
        *plain_seconds, plain_log_px = plain.split()[3:]
        usual_seconds = usual.split()[-4:-2]
        self.assertEqual([len(script_seconds), len(plain_seconds)], [4, 4])
        self.assert_positive([*script_seconds, *plain_seconds, *usual_seconds])
        # It is the same model, but with other draws.
        self.assertAlmostEqual(float(script_log_px), float(plain_log_px), delta=0.3)

    def test_growth(self):
        """Each size has a process of its own. The exponents are those of the largest three."""
        sizes = {
            "rows": (100, 200),
            "settings": (1, 2),
            "d_hidden": (8, 16),
            "draws": (1, 10, 100, 1000),
        }
        with mock.patch.object(benchmark, "GROWTH", sizes), self.growth_files():
            _, names, *rows = self.printed("growth")
        self.assertEqual(names.split(), ["what", "size", "seconds", "GiB"])

        table = [row.split() for row in rows[:10]]
        wanted = []
        for quantity, sizes_of_quantity in sizes.items():
            wanted += [[quantity, f"{size:,}"] for size in sizes_of_quantity]
        self.assertEqual([row[:2] for row in table], wanted)
        for row in table:
            self.assert_positive(row[2:])

        exponents = rows[10:]
        self.assertEqual(len(exponents), 8)
        match = re.fullmatch(r"seconds over draws: exponent (-?\d\.\d\d)", exponents[-2])
        seconds = [float(row[2]) for row in table[-3:]]
        expected = np.polyfit(np.log([10, 100, 1000]), np.log(seconds), 1)[0]
        # The times are printed in tenths of a millisecond.
        self.assertAlmostEqual(float(match[1]), expected, delta=0.1)

        # The numbers are saved, and the picture can be drawn again from them.
        lines = self.growth_csv.read_text(encoding="utf-8").splitlines()
        saved = [line.split(",") for line in lines]
        self.assertEqual(saved[0], ["what", "size", "seconds", "GiB"])
        for saved_row, row in zip(saved[1:], table, strict=True):
            self.assertEqual(saved_row[:2], [row[0], row[1].replace(",", "")])
            self.assertAlmostEqual(float(saved_row[2]), float(row[2]), delta=0.0001)
            self.assertAlmostEqual(float(saved_row[3]), float(row[3]), delta=0.001)
        picture = self.growth_png.read_bytes()
        self.assertTrue(picture.startswith(small.PNG))
        self.growth_png.unlink()
        with self.growth_files():
            self.printed("growth-picture")
        self.assertEqual(self.growth_png.read_bytes(), picture)

    @contextlib.contextmanager
    def growth_files(self):
        """Within this context, `growth` writes its files into the folder of the test."""
        self.growth_png = self.folder / "growth.png"
        self.growth_csv = self.folder / "data" / "growth.csv"
        with mock.patch.object(benchmark, "GROWTH_PNG", self.growth_png), \
                mock.patch.object(benchmark, "GROWTH_CSV", self.growth_csv):
            yield

    def test_growth_that_was_not_measured_cannot_be_drawn(self):
        with self.growth_files():
            status, out, _ = small.call(benchmark.main, "growth-picture")
        expected = (
            f"{self.growth_csv} does not exist; python -m tests.benchmark growth makes it"
        )
        self.assertEqual((status, out), (expected, ""))

    def test_the_axes_of_growth_have_plain_numbers(self):
        """Below are the measured sizes. Two decades of seconds have 1, 2 and 5 in each."""
        curve = benchmark.GrowthCurve("rows", "seconds", (1_000, 30_000), (0.015, 1.5))
        figure = Figure()
        ax = figure.subplots()
        benchmark.plot_growth(ax, curve)
        FigureCanvasAgg(figure).draw()
        labels = [label.get_text() for label in ax.get_xticklabels()]
        self.assertEqual(labels, ["1k", "30k"])
        shown = []
        for tick in ax.yaxis.get_major_ticks():
            if 0.015 <= tick.get_loc() <= 1.5:
                shown.append(tick.label1.get_text())
        self.assertEqual(shown, ["0.02", "0.05", "0.1", "0.2", "0.5", "1"])
        self.assertEqual(ax.get_ylabel(), "time of an epoch (s)")
        self.assertEqual(benchmark.short_number(1024), "1024")

    def test_cuda_on_any_device(self):
        with mock.patch.object(benchmark, "MNIST", (32, 8)), \
                mock.patch.object(benchmark, "STEPS", (1, 2)), \
                mock.patch.object(benchmark, "ON_CUDA", DEEP):
            status, out, err = small.call(lambda argv: benchmark.on_cuda("cpu"))
        self.assertEqual(status, None, err)
        self.check_cuda(out.strip().split("\n"))

    @unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
    def test_cuda(self):
        self.check_cuda(self.printed("cuda"))

    def check_cuda(self, lines):
        first, names, *rows, float32, tf32, bf16, apart = lines
        self.assertIn("an epoch of ", first)
        self.assertEqual(names.split(), "precision captured, s launched, s launching".split())

        # Two precisions of the main job and of its grid, the usual way, three of each deep model.
        self.assertEqual(len(rows), 2 * 2 + 1 + 4 * 3)
        for row in rows:
            # The difference of such short times may be less than nothing.
            self.assertLess(abs(float(row.split()[-2])), 1e6)

        for precision, line in (("float32", float32), ("tf32", tf32), ("bf16", bf16)):
            match = re.search(rf"draws, {precision}: -\d+\.\d+ nats, ([\d,]+) draws/s$", line)
            self.assert_positive([match[1].replace(",", "")])
        self.assertRegex(apart, r"^apart \d+\.\d{4} nats, (as|NOT as) they should: within 0.05$")

    @unittest.skipIf(torch.cuda.is_available(), "needs a machine without a GPU")
    def test_cuda_without_a_gpu(self):
        status, out, err = small.call(benchmark.main, "cuda")
        self.assertEqual((status, out), (2, ""))
        self.assertRegex(err, r"^.*--device: got 'cuda'.*\n$")

    def test_no_such_command(self):
        status, out, _ = small.call(benchmark.main, "speed")
        self.assertEqual(
            status,
            "python -m tests.benchmark speed: wants one of "
            "ratios, scripts, whole, plain, growth, growth-picture, cuda",
        )
        self.assertEqual(out, "")


class PlainDeepTrain(unittest.TestCase):
    def test_it_trains_what_the_script_trains(self):
        """In double precision, over the three batches of one epoch."""
        deep_scripts = [path for path in benchmark.SCRIPTS if has_own_loop(path)]
        self.assertEqual(len(deep_scripts), 4)
        for script in deep_scripts:
            with self.subTest(script=script.name), \
                    mock.patch.object(benchmark, "DEEP", DEEP), \
                    mock.patch.object(benchmark, "EXAMPLES", 8 * 24), \
                    benchmark.quietly():
                self.check_script(script)

    def check_script(self, script):
        case = benchmark.make_case(script)
        train = (case.data.train[0].double(),)
        case.data = dataclasses.replace(case.data, train=train)

        # 1. Both loops end with the same weights.
        trained = case.fit().model.state_dict()
        plain = benchmark.plain_deep_train(case.Model, case.f, case.data).state_dict()
        self.assertEqual(list(plain), list(trained))
        for name, value in trained.items():
            self.assertTrue(torch.allclose(value, plain[name], rtol=0, atol=1e-9), name)

        # 2. Most weights have moved.
        start = training.build(case.Model, case.f, case.data).state_dict()
        moved = [name for name, value in plain.items() if not torch.equal(value, start[name])]
        self.assertGreater(len(moved), len(plain) // 2)


if __name__ == "__main__":
    unittest.main()
