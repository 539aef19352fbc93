"""Each script from its command line: a short training on few images, its files and its table.

Then what a command makes of Ctrl-C, of settings that diverge, of files that are missing or in the
way, and of another process that runs the same command at the same time.
"""
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import common
import numpy as np
import torch

import datasets
import files
import pictures
import MNIST_CVAE_Relu
import MNIST_HVAE_Relu
import Synthetic_CVAE_Relu_correlation
from tests import small
from tests.small import PNG, ROOT, read_json
from tests.test_structure import MODULES

UNIT_METRICS = ["AU", "AU_kl", "active_share"]
ONE_LEVEL = ["elbo", "reconstruction", "kl", *UNIT_METRICS]
TWO_LEVELS = ["elbo", "reconstruction", "kl_1", "kl_2"]
TWO_LEVELS += [f"{metric}_1" for metric in UNIT_METRICS]
TWO_LEVELS += [f"{metric}_2" for metric in UNIT_METRICS]
EXACT = ["log_px", "exact_log_px"]
SAMPLED = ["log_px", *ONE_LEVEL]

CONDITIONAL = {"reconstructions.png", "collapse.png", "training.png"}
PICTURES = CONDITIONAL | {"samples.png"}
HEADROOM = {"headroom.png"}

# A decoder that is not Gaussian also has the largest eigenvalues rho.
HEADROOM_1 = ["headroom", "headroom_any"]
HEADROOM_2 = ["headroom_2", "headroom_any_2"]
COLLAPSED = ["collapse_threshold", "collapsed_loss", "collapsed_headroom"]

# {script: (flags that make it small, its metrics, its pictures)}
SCRIPTS = {
    "MNIST_HVAE_Relu.py": (
        ["--d_hidden", "32"], ["log_px", *TWO_LEVELS, *HEADROOM_2], HEADROOM | PICTURES
    ),
    "MNIST_VAE_Linear_learnable_sigma.py": (
        [], EXACT + ONE_LEVEL + HEADROOM_1, HEADROOM | PICTURES
    ),
    "MNIST_VAE_Linear_nonlearnable_sigma.py": (
        ["--sigma", "2/1/0.5", "--d_1", "3"], EXACT + ONE_LEVEL, PICTURES
    ),
    "MNIST_CVAE_Linear.py": (
        ["--dim_z", "8"], EXACT + ONE_LEVEL + HEADROOM_1, HEADROOM | CONDITIONAL
    ),
    "MNIST_CVAE_Linear_single_digit.py": (
        ["--d_hidden", "8", "--digit", "3"],
        EXACT + ONE_LEVEL + HEADROOM_1,
        HEADROOM | CONDITIONAL,
    ),
    "MNIST_HVAE_Linear_learnable_sigma_2.py": (
        ["--d_1", "4"], EXACT + TWO_LEVELS + HEADROOM_2, HEADROOM | PICTURES
    ),
    "MNIST_HVAE_Linear_nonlearnable_sigma_2.py": (["--d_2", "4"], EXACT + TWO_LEVELS, PICTURES),
    "MNIST_VAE_Relu_learnable_sigma.py": ([], SAMPLED + HEADROOM_1, HEADROOM | PICTURES),
    "MNIST_VAE_Relu_nonlearnable_sigma.py": (["--c", "2"], SAMPLED, PICTURES),
    "MNIST_VAE_Bernoulli.py": (
        ["--d_hidden", "32"],
        [*SAMPLED, *COLLAPSED, *HEADROOM_1, "rho", "rho_any"],
        HEADROOM | PICTURES,
    ),
    "MNIST_CVAE_Relu.py": (["--dropout", "0.2"], SAMPLED + HEADROOM_1, HEADROOM | CONDITIONAL),
    "MNIST_CVAE_Relu_single_digit.py": (
        ["--digit", "3"], SAMPLED + HEADROOM_1, HEADROOM | CONDITIONAL
    ),
    "MNIST_CVAE_CNN_single_digit.py": (
        ["--digit", "3"], SAMPLED + HEADROOM_1, HEADROOM | CONDITIONAL
    ),
    "MNIST_HVAE_CNN.py": (
        ["--released_objective"], ["log_px", *TWO_LEVELS, *HEADROOM_2], HEADROOM | PICTURES
    ),
    "Synthetic_CVAE_Relu_correlation.py": (
        ["--dim_x", "8", "--dim_y", "8", "--num_draws", "20"],
        [*SAMPLED, *(f"{name}_train" for name in SAMPLED), *HEADROOM_1],
        HEADROOM | {"collapse.png", "training.png"},
    ),
}
SYNTHETIC = "Synthetic_CVAE_Relu_correlation.py"
BERNOULLI = "MNIST_VAE_Bernoulli.py"

# The scripts that the tests of the deep models try.
DEEP = {"MNIST_HVAE_Ladder.py", "MNIST_HVAE_DCT.py", "MNIST_HVAE_DVP.py", "MNIST_VAE_Delta.py"}

# The files of a run besides its pictures.
RUN_FILES = ("model.pt", "training.json", "units.npz", "result.json")


def is_main(metric):
    """Whether a metric is in the table that a script prints by default."""
    hidden = ("reconstruction", "AU_kl", "active_share", "error_", "collapsed_")
    return not metric.startswith(hidden) and not metric.endswith("_train")


def png_size(path):
    """The width and height of a whole PNG file."""
    content = path.read_bytes()
    assert content.startswith(PNG), path
    assert content.rstrip().endswith(b"IEND\xaeB`\x82"), path
    return tuple(int.from_bytes(content[k:k + 4], "big") for k in (16, 20))


def load_weights(folder):
    """The weights in a run's model.pt, {name: tensor}."""
    return torch.load(folder / "model.pt", weights_only=True)


def load_units(folder):
    """The arrays in a run's units.npz, {name: array}."""
    with np.load(folder / "units.npz") as arrays:
        return {name: arrays[name] for name in arrays}


# --------------------------------------------------------------------------------- command lines

@dataclass
class EndedCommand:
    """One script's command that has ended."""

    script: str
    argv: list
    status: int
    out: str
    err: str


class CommandLine(small.WithMnist):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # The images are those that small.write_mnist draws: {one digit only: (training, test)}.
        labels = [datasets.draw_digits(n, seed)[1] for n, seed in ((256, 5), (64, 6))]
        cls.counts = {False: [256, 64], True: [int((part == 3).sum()) for part in labels]}

    def start(self, script, *argv, **options):
        """Start a script in a new Python, on the test's data."""
        argv = [sys.executable, str(ROOT / script), *argv, "--data_dir", str(self.folder / "data")]
        return subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            **options,
        )

    def run_in_child(self, name, script, argv, draws_pictures=True):
        """Run a script in a child process until it ends. Its output goes to files of that name."""
        out = self.folder / f"{name}.out"
        err = self.folder / f"{name}.err"
        process = small.start_command(script, argv, self.folder, out, err, draws_pictures)
        [status] = small.exit_statuses([process])
        return EndedCommand(
            script, argv, status, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")
        )

    def test_every_script_is_tried(self):
        names = {path.name for path in ROOT.glob("*.py")}
        others = {f"{name}.py" for name in (*MODULES, "predict_collapse", "reproduce")}
        others |= {path.name for path in ROOT.glob("matrix_*.py")}
        self.assertEqual(names - set(SCRIPTS) - DEEP, others)

    def test_each_script_leaves_complete_results(self):
        def run(script):
            return self.run_in_child(script, script, self.small_command(script))

        # Each command takes one thread.
        with ThreadPoolExecutor(2) as pool:
            commands = list(pool.map(run, SCRIPTS))
        for command in commands:
            with self.subTest(script=command.script):
                self.assertEqual(command.status, 0, command.err)
                [folder] = (self.folder / "runs" / Path(command.script).stem).glob("*")
                result = read_json(folder / "result.json")
                self.check_result(command, result)
                self.check_files(command, folder)
                self.check_tables(command, result)
                self.check_progress(command)
                self.check_same_command_again(command)

    def small_command(self, script):
        """The flags with which a script ends soon."""
        rows = "256" if script == SYNTHETIC else "20"
        argv = [*SCRIPTS[script][0], "--num_epochs", "1", "--num_samples", rows, "--device", "cpu"]
        argv += ["--out_dir", self.folder / "runs"]
        if script != SYNTHETIC:
            argv += ["--data_dir", self.folder / "data"]
        return argv

    def example_counts(self, script):
        """The numbers of training and test examples."""
        return (256, 256) if script == SYNTHETIC else self.counts["digit" in script]

    def data_set(self, script):
        return "synthetic" if script == SYNTHETIC else "mnist"

    def check_result(self, command, result):
        _, metrics, _ = SCRIPTS[command.script]
        expected = {
            "script", "settings", "dataset", "device", "versions", "seconds", "metrics"
        }
        self.assertLessEqual(expected, set(result))
        self.assertEqual(result["script"], Path(command.script).stem)
        self.assertEqual(result["dataset"], self.data_set(command.script))
        self.assertEqual(result["device"], "cpu")
        self.assertEqual(list(result["metrics"]), metrics)
        self.assertTrue(np.isfinite(list(result["metrics"].values())).all())
        self.assertEqual(set(result["versions"]), {"python", "torch", "numpy"})

    def check_files(self, command, folder):
        _, _, expected_pictures = SCRIPTS[command.script]
        _, n_test = self.example_counts(command.script)
        for name, values in load_units(folder).items():
            self.assertEqual(len(values), n_test)
            if name.startswith("unit_kl"):
                self.assertTrue((values >= 0).all())
        for name, weight in load_weights(folder).items():
            self.assertTrue(weight.isfinite().all(), name)

        self.assertEqual({path.name for path in folder.glob("*.png")}, expected_pictures)
        for path in folder.glob("*.png"):
            self.assertGreater(min(png_size(path)), 300)
        hidden = [path for path in folder.iterdir() if path.name.startswith(".")]
        self.assertEqual(hidden, [])

    def check_tables(self, command, result):
        """stdout holds a caption, the main metrics' names and a row, and then the theory.

        The script with Bernoulli pixels prints its threshold before them.
        """
        _, metrics, _ = SCRIPTS[command.script]
        lines = command.out.strip().split("\n")
        if command.script == BERNOULLI:
            *threshold, blank = lines[:4]
            lines = lines[4:]
            self.assertEqual(blank, "")
            self.assertIn(f"{result['metrics']['collapse_threshold']:.2f} on.", threshold[0])
        caption, names, row, more, *theory = lines

        # 1. The caption.
        n_train, n_test = self.example_counts(command.script)
        self.assertIn(f" on {self.data_set(command.script)} ", caption)
        counts = f": {n_train} training and {n_test} test examples"
        self.assertIn(f"{counts}, cpu, nats per test example, seed 0", caption)

        # 2. The metrics.
        main_metrics = names.split()
        self.assertEqual(main_metrics, [name for name in metrics if is_main(name)])
        self.assertLessEqual(len(main_metrics), 9)
        self.assertEqual(more, "more columns: --columns all")
        cells = row.split()
        self.assertEqual(len(cells), len(main_metrics))
        elbo = float(cells[main_metrics.index("elbo")])
        self.assertAlmostEqual(elbo, result["metrics"]["elbo"], delta=0.006)

        # 3. The theory.
        self.assertEqual("exact_log_px" in metrics, "theory" in result)
        if "theory" in result:
            self.assertGreater(result["theory"]["gap"], -1e-6)
            self.assertIn(f"{result['theory']['optimal_loss']:.4f}", "\n".join(theory))
            self.assertRegex(theory[-1], "^(DIFFERS |The model reached the predicted optimum.)")
        elif command.script != BERNOULLI:
            self.check_table_of_linear_twin(theory, result)

    def check_table_of_linear_twin(self, lines, result):
        """Each cell is a pair: the linear twin's value and the trained model's value."""
        header = lines[-2].split()
        pairs = re.findall(r"(\S+) -> (\S+)", lines[-1])
        levels = ("_1", "_2") if "kl_1" in result["metrics"] else ("",)
        expected = []
        for level in levels:
            expected += [f"kl{level}", f"AU{level}"]
        self.assertEqual(header, expected)
        self.assertEqual(len(pairs), len(header))
        for name, (predicted, trained) in zip(header, pairs):
            self.assertAlmostEqual(float(trained), result["metrics"][name], delta=0.006)
            if name.startswith("kl"):
                kl = sum(result["linear"][name])
                self.assertAlmostEqual(float(predicted), kl, delta=0.006)

    def check_progress(self, command):
        # In a pipe there is no cursor control.
        self.assertNotIn("\r", command.err)
        self.assertRegex(command.err, r"training: epoch 1/1, loss -?\d+\.\d\d, 100%")

    def check_same_command_again(self, command):
        """It shows the same tables without training."""
        script = importlib.import_module(Path(command.script).stem)
        status, out, err = small.call(script.main, *command.argv)
        self.assertEqual((status, out), (0, command.out))
        self.assertIn("already trained", err)
        self.assertNotIn("training: epoch", err)

        # With --columns all, it shows all metrics.
        status, out, err = small.call(script.main, *command.argv, "--columns", "all")
        self.assertEqual(status, 0, err)
        first_line = 5 if command.script == BERNOULLI else 1
        names = out.strip().split("\n")[first_line].split()
        self.assertEqual(names, SCRIPTS[command.script][1])
        self.assertIn("already trained", err)

    def test_same_command_twice_same_numbers(self):
        """In another folder the same command trains and evaluates anew, with the same numbers."""
        argv = ["--num_epochs", 2, "--num_samples", 20, "--beta_1", "0.5,1", "--device", "cpu"]
        argv += ["--data_dir", "data"]
        tables = []
        numbers = []
        for out_dir in ("once", "again"):
            command = self.run_in_child(
                out_dir, "MNIST_HVAE_Relu.py", [*argv, "--out_dir", out_dir], draws_pictures=False
            )
            self.assertIn("training 2 settings: epoch 2/2", command.err)
            tables.append(command.out)
            results = []
            for path in sorted((self.folder / out_dir).rglob("result.json")):
                result = read_json(path)
                results.append((result["metrics"], result["curves"]))
            numbers.append(results)
        self.assertEqual(len(numbers[0]), 2)
        self.assertEqual(numbers[0], numbers[1])
        self.assertEqual(tables[0], tables[1])

    def test_interrupted(self):
        """Ctrl-C leaves one line, no traceback, exit status 130, and nothing half-written."""
        process = self.start(
            "MNIST_HVAE_Relu.py",
            *("--num_epochs", "100000"),
            *("--out_dir", "interrupted"),
            *("--seed", "7"),
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self.addCleanup(process.kill)
        # 1. Read until it trains. The reading ends if the process does.
        err = ""
        while "training: epoch" not in err:
            line = process.stderr.readline()
            self.assertTrue(line, err)
            err += line
        time.sleep(0.5)

        # 2. Ctrl-C.
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        self.assertEqual(process.returncode, 130)
        self.assertEqual(out, "")
        self.assertNotIn("Traceback", err)
        self.assertRegex(err.strip().split("\n")[-1], "^interrupted")

        # 3. Only the checkpoint is left, and folders.
        left = []
        for path in (self.folder / "interrupted").rglob("*"):
            if path.is_file():
                left.append((path.parent.name, path.suffix))
        self.assertEqual(left, [("checkpoints", ".pt")])

    def test_errors_reach_the_shell(self):
        process = self.start("MNIST_HVAE_Relu.py", "--eta_dec", "0")
        out, err = process.communicate(timeout=60)
        self.assertEqual((process.returncode, out, err.count("\n")), (2, "", 1))
        self.assertIn("--eta_dec", err)

    def test_two_processes_with_the_same_command(self):
        """Both end well and print the same table. The files are those of an undisturbed run."""
        # 1. Two processes that start at the same moment.
        argv = ["--num_epochs", 2, "--num_samples", 20, "--device", "cpu", "--data_dir", "data"]
        pair = []
        outs = []
        errs = []
        for number in (0, 1):
            outs.append(self.folder / f"pair.{number}.out")
            errs.append(self.folder / f"pair.{number}.err")
            process = small.start_command(
                "MNIST_CVAE_Relu.py",
                [*argv, "--out_dir", "pair"],
                self.folder,
                outs[number],
                errs[number],
            )
            self.addCleanup(process.kill)
            pair.append(process)
        statuses = small.exit_statuses(pair)
        outputs = [path.read_text(encoding="utf-8") for path in outs]
        messages = [path.read_text(encoding="utf-8") for path in errs]
        self.assertEqual(statuses, [0, 0], messages)
        self.assertEqual(outputs[0], outputs[1])

        # 2. A third command finds the run.
        third = self.run_in_child("third", "MNIST_CVAE_Relu.py", [*argv, "--out_dir", "pair"])
        self.assertEqual((third.status, third.out), (0, outputs[0]), third.err)
        self.assertIn("already trained", third.err)
        self.assertNotIn("training: epoch", third.err)

        # 3. The same command without company.
        alone = self.run_in_child("alone", "MNIST_CVAE_Relu.py", [*argv, "--out_dir", "alone"])
        self.assertEqual((alone.status, alone.out), (0, outputs[0]), alone.err)
        check_equal_runs(self, *self.run_folders("pair", "alone"))

    def run_folders(self, *out_dirs):
        """The only run of MNIST_CVAE_Relu in each of these folders."""
        folders = []
        for out_dir in out_dirs:
            [path] = (self.folder / out_dir / "MNIST_CVAE_Relu").glob("*/result.json")
            folders.append(path.parent)
        return folders


def check_equal_runs(test, folder, other):
    """Check that two folders hold whole files of one run, with the same numbers, and no more."""
    names = {path.name for path in folder.iterdir()}
    test.assertEqual(names, {path.name for path in other.iterdir()})
    test.assertLessEqual(set(RUN_FILES), names)
    torch.testing.assert_close(load_weights(folder), load_weights(other), rtol=0, atol=0)
    for key in ("metrics", "curves", "settings"):
        test.assertEqual(
            read_json(folder / "result.json")[key], read_json(other / "result.json")[key]
        )
    np.testing.assert_equal(load_units(folder), load_units(other))
    for path in folder.glob("*.png"):
        test.assertEqual(png_size(path), png_size(other / path.name))


# ------------------------------------------------------------------------------------ robustness

class Small(small.InFolder):
    """Commands in this process, on 300 training images, without pictures of single runs."""

    def setUp(self):
        super().setUp()
        small.write_mnist(self.folder / "data", n_train=300)

    def run_script(self, script, *argv, out_dir="runs"):
        """Run a script for an epoch. Returns (exit status, stdout, stderr)."""
        with mock.patch("pictures.draw_run"):
            return small.call(
                script.main,
                *("--data_dir", self.folder / "data"),
                *("--out_dir", self.folder / out_dir),
                *("--d_hidden", 16),
                *("--num_epochs", 1),
                *("--num_samples", 20),
                *("--device", "cpu"),
                *argv,
            )

    def run_folder(self, script=MNIST_CVAE_Relu, out_dir="runs"):
        """The folder of the only run of a script."""
        [folder] = (self.folder / out_dir / script.__name__).iterdir()
        return folder


class Divergence(Small):
    """A setting whose weights or metrics leave the range of numbers."""

    def table(self, out):
        """The rows of the table of metrics, in cells."""
        lines = out.strip().split("\n\n")[0].split("\n")
        return [line.split() for line in lines[1:]]

    def check_only_setting(self, script, *argv):
        """Check a command whose only setting diverges. Returns its stderr."""
        status, out, err = self.run_script(script, *argv)
        self.assertEqual(status, 1, err)
        _, row, note, advice = self.table(out)
        self.assertEqual(row, ["diverged"])
        self.assertEqual(note[:5], ["seed=0", "diverged", "in", "epoch", note[4]])
        self.assertEqual(advice[-2], "--lr")
        self.check_words(out)
        self.check_result(self.run_folder(script))

        # The same command again shows the same, and trains nothing.
        status, again, err_again = self.run_script(script, *argv)
        self.assertEqual((status, again), (1, out))
        self.assertNotIn("training: epoch", err_again)
        return err

    def check_words(self, out):
        """Neither a number that is none, nor a verdict on what collapsed."""
        self.assertNotRegex(out, r"\b(nan|inf)\b")
        self.assertNotIn("collapsed", out)
        self.assertNotIn("linear", out)

    def check_result(self, folder):
        result = read_json(folder / "result.json")
        self.assertIsNone(result["metrics"])
        self.assertEqual(result["diverged"]["epoch"], 1)
        self.assertFalse({"theory", "linear", "headroom"} & set(result))

    def test_the_last_step(self):
        """The only step makes the weights so large that no metric is a number."""
        for script in (MNIST_CVAE_Relu, MNIST_HVAE_Relu):
            with self.subTest(script=script.__name__):
                self.check_only_setting(script, "--lr", "1e25", "--batch_size", 1000)

    def test_an_estimate_that_is_not_finite(self):
        """The ELBO is finite, and log_px is not."""
        err = self.check_only_setting(MNIST_HVAE_Relu, "--eta_enc", "1e30")
        [line] = [line for line in err.split("\n") if "not finite" in line]
        self.assertIn("log_px", line)
        self.assertNotIn("elbo", line)

    def test_a_cvae_whose_prior_is_too_wide(self):
        self.check_only_setting(MNIST_CVAE_Relu, "--eta_enc", "1e30")

    def check_grid(self, flag, healthy, diverging):
        """Check a grid of two settings, one of which diverges. Returns stdout."""
        values = f"{healthy},{diverging}"
        status, out, err = self.run_script(
            MNIST_HVAE_Relu, f"--{flag}", values, "--batch_size", 1000
        )
        self.assertEqual(status, 1, err)
        self.assertIn("training 2 settings", err)
        names, finished, diverged, note, advice, more = self.table(out)
        self.assertEqual(advice[-2], "--lr")
        self.assertEqual(more, ["more", "columns:", "--columns", "all"])
        self.assertNotRegex(out, r"\b(nan|inf)\b")

        # 1. The healthy setting has all its metrics and its verdict.
        self.assertEqual(names[:3], [flag, "log_px", "elbo"])
        self.assertEqual(len(finished), len(names))
        for cell in finished:
            self.assertTrue(np.isfinite(float(cell)))
        verdicts = [line for line in out.split("\n") if "collapsed" in line]
        self.assertEqual([line.split(": ")[0] for line in verdicts], [f"{flag}={finished[0]}"])

        # 2. The other one has none.
        self.assertEqual(diverged[1], "diverged")
        self.assertEqual(set(diverged[2:]), {"-"})
        self.assertEqual(note[:2], [f"{flag}={diverged[0]},seed=0", "diverged"])

        # 3. Their files.
        results = {}
        for path in (self.folder / "runs" / "MNIST_HVAE_Relu").glob("*/result.json"):
            results[str(read_json(path)["settings"][flag])] = path.parent
        self.assertEqual(set(results), {finished[0], diverged[0]})
        self.check_result(results[diverged[0]])
        for name in RUN_FILES:
            self.assertTrue((results[finished[0]] / name).exists(), name)
        return out

    def test_a_loss_that_is_not_finite_in_a_grid(self):
        out = self.check_grid("beta_1", "1", "1e38")
        # No loss was finite, so none is named.
        self.assertRegex(out, "(?m)^beta_1=1e.38,seed=0 diverged in epoch 1$")

    def test_an_estimate_that_is_not_finite_in_a_grid(self):
        self.check_grid("eta_enc", "1", "1e30")


class Files(Small):
    """Files of a run that are missing or broken, and other things in its place."""

    def setUp(self):
        super().setUp()
        status, self.out, err = self.run_script(MNIST_CVAE_Relu)
        self.assertEqual(status, 0, err)

    def test_units_are_made_again(self):
        """They are evaluated from the saved model, which is not trained again."""
        path = self.run_folder() / "units.npz"
        whole = path.read_bytes()
        units = load_units(self.run_folder())
        broken = {"missing": None, "empty": b"", "junk": b"junk", "cut": whole[:len(whole) // 2]}
        for case, content in broken.items():
            with self.subTest(case=case):
                path.unlink()
                if content is not None:
                    path.write_bytes(content)
                status, out, err = self.run_script(MNIST_CVAE_Relu)
                self.assertEqual((status, out), (0, self.out), err)
                self.assertIn("already trained", err)
                self.assertNotIn("training: epoch", err)
                self.assertEqual(len(re.findall(r"(?m)^.*units\.npz.*$", err)), 1, err)
                np.testing.assert_equal(load_units(self.run_folder()), units)

    def test_units_of_another_run(self):
        """Whole files with other arrays are not this run's."""
        path = self.run_folder() / "units.npz"
        units = load_units(self.run_folder())
        fewer_images = {name: values[:3] for name, values in units.items()}
        other_names = {"unit_kl_1": units["unit_kl"], "log_px": units["log_px"]}
        for case, arrays in (("images", fewer_images), ("names", other_names)):
            with self.subTest(case=case):
                np.savez_compressed(path, **arrays)
                status, out, err = self.run_script(MNIST_CVAE_Relu)
                self.assertEqual((status, out), (0, self.out), err)
                self.assertNotIn("training: epoch", err)
                np.testing.assert_equal(load_units(self.run_folder()), units)

    def test_a_folder_inside_the_run(self):
        """It stays with its contents, even where its name is that of a picture."""
        for name in ("notes", "mine.png", "collapse.png"):
            (self.run_folder() / name).mkdir()
            (self.run_folder() / name / "text").write_text("mine", encoding="utf-8")
        for flags in ((), ("--overwrite",)):
            with self.subTest(flags=flags):
                status, out, err = self.run_script(MNIST_CVAE_Relu, *flags)
                self.assertEqual((status, out), (0, self.out), err)
                for name in ("notes", "mine.png", "collapse.png"):
                    text = (self.run_folder() / name / "text").read_text(encoding="utf-8")
                    self.assertEqual(text, "mine")
        for name in RUN_FILES:
            self.assertTrue((self.run_folder() / name).is_file(), name)

    def test_a_file_in_the_place_of_the_run(self):
        """It is refused in one line, before any training, and stays."""
        folder = self.run_folder()
        shutil.rmtree(folder)
        folder.write_text("mine", encoding="utf-8")
        status, out, err = self.run_script(MNIST_CVAE_Relu)
        self.assertEqual((status, out), (2, ""), err)
        refusal = err.strip().split("\n")[-1]
        self.assertIn(str(folder), refusal)
        self.assertIn("--out_dir", refusal)
        self.assertNotIn("Traceback", err)
        self.assertNotIn("training: epoch", err)
        self.assertEqual(folder.read_text(encoding="utf-8"), "mine")


class AnotherProcess(small.InFolder):
    """Another process that does the same command at a chosen moment.

    test_two_processes_with_the_same_command has real processes, which meet by chance.
    """

    def run_script(self, *argv, out_dir="runs"):
        """Run the script with the smallest models. Returns (exit status, stdout, stderr)."""
        with mock.patch("pictures.draw_run"):
            return small.call(
                Synthetic_CVAE_Relu_correlation.main,
                *("--out_dir", self.folder / out_dir),
                *("--dim_x", 4),
                *("--dim_y", 4),
                *("--dim_z", 3),
                *("--d_hidden", 5),
                *("--num_samples", 40),
                *("--num_epochs", 2),
                *("--device", "cpu"),
                *argv,
            )

    def run_folder(self, out_dir="runs"):
        """The folder of the only run."""
        [folder] = (self.folder / out_dir / "Synthetic_CVAE_Relu_correlation").iterdir()
        return folder

    def overwrite(self):
        """Do all that another process with --overwrite does."""
        status, _, err = self.run_script("--overwrite")
        self.assertEqual(status, 0, err)

    def begin_to_overwrite(self):
        """Do the first thing that another process with --overwrite does: it removes all files."""
        for name in RUN_FILES:
            (self.run_folder() / name).unlink(missing_ok=True)

    def run_disturbed(self, case, moment, disturb):
        """Run a command, and call disturb() at a moment of it.

        Moments are counted from 0: before each file that the command reads or writes. None is no
        moment. Returns (exit status, stdout, stderr, the number of moments).
        """
        if case == "new":
            shutil.rmtree(self.folder / "runs", ignore_errors=True)
        flags = ("--overwrite",) if case == "overwritten" else ()
        moments = []
        write = files.write
        read_json = files.read_json

        def count_moment():
            moments.append(len(moments))
            if moments[-1] == moment:
                with mock.patch("files.write", write), mock.patch("files.read_json", read_json):
                    disturb()

        def counted_write(path, save):
            count_moment()
            return write(path, save)

        def counted_read(path):
            count_moment()
            return read_json(path)

        with mock.patch("files.write", counted_write):
            with mock.patch("files.read_json", counted_read):
                status, out, err = self.run_script(*flags)
        return status, out, err, len(moments)

    def check_all_moments(self, disturb):
        """Disturb a command at each moment. It ends well, and the next one finds whole files."""
        status, expected, err = self.run_script(out_dir="alone")
        self.assertEqual(status, 0, err)
        alone = self.run_folder(out_dir="alone")

        # A run that is not there yet, one that is made again, and one that is only shown.
        for case in ("new", "overwritten", "shown"):
            *_, count = self.run_disturbed(case, None, disturb)
            # The run's own four files, unless it is only shown.
            self.assertGreaterEqual(count, 2 if case == "shown" else len(RUN_FILES))
            for moment in range(count):
                with self.subTest(case=case, moment=moment):
                    status, out, err, _ = self.run_disturbed(case, moment, disturb)
                    self.assertEqual((status, out), (0, expected), err)
                    if disturb == self.begin_to_overwrite:
                        status, out, err = self.run_script()
                        self.assertEqual((status, out), (0, expected), err)
                    check_equal_runs(self, self.run_folder(), alone)

    def test_another_process_that_has_done_all(self):
        self.check_all_moments(self.overwrite)

    def test_another_process_that_has_just_begun(self):
        self.check_all_moments(self.begin_to_overwrite)


# ----------------------------------------------------------------------------------------- grids

class Grids(small.InFolder):
    def setUp(self):
        super().setUp()
        small.write_mnist(self.folder / "data")

    def run_grid(self, *argv):
        """Run a grid. Returns (the names of the columns, the rows in cells, stderr).

        The pictures of single runs would take most of the time, and are left out.
        """
        with mock.patch("pictures.draw_run"):
            status, out, err = small.call(
                MNIST_HVAE_Relu.main,
                *("--data_dir", self.folder / "data"),
                *("--out_dir", self.folder / "runs"),
                *("--d_hidden", 16),
                *("--num_epochs", 1),
                *("--num_samples", 0),
                *("--device", "cpu"),
                *argv,
            )
        self.assertEqual(status, 0, err)
        table = out.strip().split("\n\n")[0]
        # The last line says that there are more columns.
        names, *rows = [line.split() for line in table.split("\n")[1:-1]]
        return names, rows, err

    def metrics(self):
        """{(beta_1, beta_2, seed): the metrics of the run}."""
        metrics = {}
        for path in (self.folder / "runs" / "MNIST_HVAE_Relu").glob("*/result.json"):
            result = read_json(path)
            settings = result["settings"]
            key = (settings["beta_1"], settings["beta_2"], settings["seed"])
            metrics[key] = result["metrics"]
        return metrics

    def pictures(self):
        """The names of the pictures of all grids."""
        folder = self.folder / "runs" / "MNIST_HVAE_Relu" / "grids"
        return {path.name for path in folder.rglob("*.png")}

    def test_one_flag(self):
        names, rows, err = self.run_grid("--beta_1", "0.1,0.5,2")
        self.assertIn("training 3 settings", err)
        self.assertEqual(names[0], "beta_1")
        self.assertEqual([row[0] for row in rows], ["0.1", "0.5", "2.0"])
        metrics = self.metrics()
        for row in rows:
            elbo = metrics[float(row[0]), 1.0, 0]["elbo"]
            self.assertAlmostEqual(float(row[1]), elbo, delta=0.006)
        self.assertEqual(self.pictures(), {"collapse.png", "linear.png"})

    def test_two_flags(self):
        names, rows, _ = self.run_grid("--beta_1", "0.1,2", "--beta_2", "1,3,5")
        self.assertEqual(names[:2], ["beta_1", "beta_2"])
        expected = [("0.1", "1.0"), ("0.1", "3.0"), ("0.1", "5.0")]
        expected += [("2.0", "1.0"), ("2.0", "3.0"), ("2.0", "5.0")]
        self.assertEqual([tuple(row[:2]) for row in rows], expected)
        expected = {"metrics.png", "linear.png"}
        expected |= {f"reconstructions_{k}.png" for k in range(1, 3)}
        self.assertEqual(self.pictures(), expected)
        # The sheet has three columns and two rows.
        [sheet] = (self.folder / "runs").rglob("reconstructions_2.png")
        width, height = png_size(sheet)
        self.assertGreater(width, height)

    def test_seeds(self):
        """A row is mean ± sample standard deviation over seeds. Pictures show the first seed.

        The grids of two flags do not take each other's place.
        """
        with mock.patch("pictures.save_figure", wraps=pictures.save_figure) as save_figure:
            names, rows, _ = self.run_grid("--beta_1", "0.1,2", "--seed", "1,2,3")
        captions = [call.kwargs["caption"] for call in save_figure.call_args_list]
        self.assertEqual([caption.split()[-1] for caption in captions], ["seed=1"] * 2)

        self.assertEqual((names[0], len(rows)), ("beta_1", 2))
        metrics = self.metrics()
        for row in rows:
            elbos = [metrics[float(row[0]), 1.0, seed]["elbo"] for seed in (1, 2, 3)]
            deviation = np.std(elbos, ddof=1)
            self.assertEqual(row[1:4], [f"{np.mean(elbos):.2f}", "±", f"{deviation:.2f}"])
            self.assertGreater(deviation, 0)

        self.run_grid("--beta_1", "0.1,2", "--eta_dec", "0.6")
        self.assertEqual(len(list((self.folder / "runs").rglob("grids/*/collapse.png"))), 2)


# ------------------------------------------------------------------------------------ objectives

class Objectives(unittest.TestCase):
    """The loss of each script beside the negative beta-ELBO by hand, for two examples."""

    RECONSTRUCTIONS = (3, 5)
    # The KL of two examples and two units: 3 and 0.5 nats over the units, 0.75 and 1 on average.
    KL = torch.tensor([[1.0, 2.0], [0.5, 0.0]])

    def case(self, script):
        """A setting of a script, KL terms, and their weighted sum for each example."""
        if hasattr(script.Flags, "beta_1"):
            f = script.Flags(beta_1=2.0, beta_2=0.5)
            terms = {"kl_1": self.KL, "kl_2": torch.tensor([[4.0], [1.0]])}
            return f, terms, [2 * 3 + 0.5 * 4, 2 * 0.5 + 0.5]
        f = script.Flags(beta=2.0)
        if hasattr(script.Flags, "latents"):
            # A model with any number of levels gives all of them one weight.
            terms = {"kl_1": self.KL, "kl_2": self.KL, "kl_3": torch.ones(2, 1)}
            return f, terms, [2 * (3 + 3 + 1), 2 * (0.5 + 0.5 + 1)]
        return f, {"kl": self.KL}, [2 * 3, 2 * 0.5]

    def loss(self, script, terms, f):
        for value in vars(script).values():
            if isinstance(value, type) and value.__name__.endswith("VAE"):
                log_px_z = -torch.tensor(self.RECONSTRUCTIONS, dtype=torch.float32)
                return value.loss(None, terms | {"log_px_z": log_px_z}, f).tolist()
        raise AssertionError(f"{script.__name__} has no model")

    def expected(self, reconstruction_weight, weighted_kls):
        expected = []
        for reconstruction, kl in zip(self.RECONSTRUCTIONS, weighted_kls):
            expected.append(reconstruction_weight * reconstruction + kl)
        return expected

    def scripts(self):
        for path in sorted([*ROOT.glob("MNIST_*.py"), *ROOT.glob("Synthetic_*.py")]):
            yield importlib.import_module(path.stem)

    def test_loss_is_the_negative_beta_elbo(self):
        for script in self.scripts():
            f, terms, weighted_kls = self.case(script)
            if hasattr(f, "released_objective"):
                f.released_objective = False
            with self.subTest(script=script.__name__):
                self.assertEqual(self.loss(script, terms, f), self.expected(1, weighted_kls))

    def test_released_objective_counts_the_reconstruction_twice(self):
        """The ReLU and CNN scripts have this flag."""
        names = set()
        for script in self.scripts():
            f, terms, weighted_kls = self.case(script)
            if hasattr(f, "released_objective"):
                names.add(script.__name__)
                f.released_objective = True
                with self.subTest(script=script.__name__):
                    self.assertEqual(self.loss(script, terms, f), self.expected(2, weighted_kls))
        expected = {path.stem for path in ROOT.glob("*.py") if re.search("(Relu|CNN)", path.stem)}
        self.assertEqual(names, expected)

    def test_free_bits(self):
        """3 nats are above the mean KL of each unit. z1 of an HVAE has no free bits.

        The scripts that have --released_objective have this flag, and so has the one with Bernoulli
        pixels. The tests of the deep models try theirs.
        """
        names = set()
        for script in self.scripts():
            f, terms, _ = self.case(script)
            is_deep = hasattr(f, "optimizer")
            if not hasattr(f, "free_bits") or is_deep:
                continue
            names.add(script.__name__)
            f.free_bits = 3.0
            weight = 1
            if hasattr(f, "released_objective"):
                f.released_objective = True
                weight = 2
            weighted_kls = [2 * 6, 2 * 6]
            if "kl_1" in terms:
                weighted_kls = [2 * 3 + 0.5 * 3, 2 * 0.5 + 0.5 * 3]
            with self.subTest(script=script.__name__):
                expected = self.expected(weight, weighted_kls)
                self.assertEqual(self.loss(script, terms, f), expected)
        pattern = "(Relu|CNN|Bernoulli)"
        expected = {path.stem for path in ROOT.glob("*.py") if re.search(pattern, path.stem)}
        self.assertEqual(names, expected)


if __name__ == "__main__":
    unittest.main()
