"""Each script from its command line: a short training on few images, its files, its table, Ctrl-C."""
import ast
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import datasets
import pictures
import MNIST_HVAE_Relu
from tests import small
from tests.small import ROOT

# script: (flags that make it small, its metrics, its pictures)
OF_LEVEL = ["AU", "AU_kl", "active_share"]
ONE_LEVEL = ["elbo", "reconstruction", "kl", *OF_LEVEL]
TWO_LEVELS = ["elbo", "reconstruction", "kl_1", "kl_2"] + [f"{m}_{level}" for level in (1, 2) for m in OF_LEVEL]
EXACT = ["log_px", "exact_log_px"]
CONDITIONAL = {"reconstructions.png", "collapse.png", "training.png"}
PICTURES = CONDITIONAL | {"samples.png"}
HEADROOM = {"headroom.png"}
SCRIPTS = {
    "MNIST_HVAE_Relu.py": (["--d_hidden", "32"], ["log_px", *TWO_LEVELS, "headroom_2"], HEADROOM | PICTURES),
    "MNIST_VAE_Linear_learnable_sigma.py": ([], EXACT + ONE_LEVEL + ["headroom"], HEADROOM | PICTURES),
    "MNIST_VAE_Linear_nonlearnable_sigma.py": (["--sigma", "2/1/0.5", "--d_1", "3"], EXACT + ONE_LEVEL, PICTURES),
    "MNIST_CVAE_Linear.py": (["--dim_z", "8"], EXACT + ONE_LEVEL + ["headroom"], HEADROOM | CONDITIONAL),
    "MNIST_CVAE_Linear_single_digit.py": (["--d_hidden", "8", "--digit", "3"], EXACT + ONE_LEVEL + ["headroom"], HEADROOM | CONDITIONAL),
    "MNIST_HVAE_Linear_learnable_sigma_2.py": (["--d_1", "4"], EXACT + TWO_LEVELS + ["headroom_2"], HEADROOM | PICTURES),
    "MNIST_HVAE_Linear_nonlearnable_sigma_2.py": (["--d_2", "4"], EXACT + TWO_LEVELS, PICTURES),
    "MNIST_VAE_Relu_learnable_sigma.py": ([], ["log_px", *ONE_LEVEL, "headroom"], HEADROOM | PICTURES),
    "MNIST_VAE_Relu_nonlearnable_sigma.py": (["--c", "2"], ["log_px", *ONE_LEVEL], PICTURES),
    "MNIST_CVAE_Relu.py": (["--dropout", "0.2"], ["log_px", *ONE_LEVEL, "headroom"], HEADROOM | CONDITIONAL),
    "MNIST_CVAE_Relu_single_digit.py": (["--digit", "3"], ["log_px", *ONE_LEVEL, "headroom"], HEADROOM | CONDITIONAL),
    "MNIST_CVAE_CNN_single_digit.py": (["--digit", "3"], ["log_px", *ONE_LEVEL, "headroom"], HEADROOM | CONDITIONAL),
    "MNIST_HVAE_CNN.py": (["--released_objective"], ["log_px", *TWO_LEVELS, "headroom_2"], HEADROOM | PICTURES),
    "Synthetic_CVAE_Relu_correlation.py": (
        ["--dim_x", "8", "--dim_y", "8", "--num_draws", "20"],
        [name + split for split in ("", "_train") for name in ["log_px", *ONE_LEVEL]] + ["headroom"],
        HEADROOM | {"collapse.png", "training.png"}),
}
MODULES = ("common", "files", "theory", "datasets", "training", "pictures", "report", "deep")       # lower ones first
SYNTHETIC = "Synthetic_CVAE_Relu_correlation.py"


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and content.rstrip().endswith(b"IEND\xaeB`\x82"), path
    return tuple(int.from_bytes(content[k:k + 4], "big") for k in (16, 20))


class CommandLine(small.WithMnist):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        labels = [datasets.draw_digits(n, seed)[1] for n, seed in ((256, 5), (64, 6))]      # as write_mnist draws them
        cls.counts = {False: [256, 64], True: [int((of == 3).sum()) for of in labels]}

    def start(self, script, *argv, **more):
        argv = [sys.executable, str(ROOT / script), *argv]
        if script != SYNTHETIC:
            argv += ["--data_dir", str(self.folder / "data")]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder, **more)

    def test_every_script_is_tried(self):
        of_test_deep = {"MNIST_HVAE_Ladder.py", "MNIST_HVAE_DCT.py", "MNIST_HVAE_DVP.py", "MNIST_VAE_Delta.py"}
        self.assertEqual({path.name for path in ROOT.glob("*.py")} - set(SCRIPTS) - of_test_deep,
                         {f"{name}.py" for name in (*MODULES, "predict_collapse", "reproduce")}
                         | {path.name for path in ROOT.glob("matrix_*.py")})

    def test_each_script_leaves_complete_results(self):
        def argv(script):
            rows = "256" if script == SYNTHETIC else "20"
            return [*SCRIPTS[script][0], "--num_epochs", "1", "--num_samples", rows, "--device", "cpu"]

        where = {script: ["--out_dir", self.folder / "runs"] + (["--data_dir", self.folder / "data"] if script != SYNTHETIC else [])
                 for script in SCRIPTS}

        def run(script):
            out, err = (self.folder / f"{script}.{stream}" for stream in ("out", "err"))
            process = small.FORKS.Process(target=small.as_command, args=(script, argv(script) + where[script], self.folder, out, err))
            process.start()
            process.join(120)
            return out.read_text(), err.read_text(), process.exitcode

        with ThreadPoolExecutor(2) as pool:                   # each is one thread
            runs = dict(zip(SCRIPTS, pool.map(run, SCRIPTS)))
        for script, (_, metrics, drawn) in SCRIPTS.items():
            with self.subTest(script=script):
                out, err, status = runs[script]
                self.assertEqual(status, 0, err)
                data_set = "synthetic" if script == SYNTHETIC else "mnist"
                [run] = (self.folder / "runs" / Path(script).stem).glob("*")
                result = json.loads((run / "result.json").read_text())
                self.assertLessEqual({"script", "settings", "dataset", "device", "versions", "seconds", "metrics"},
                                     set(result))
                self.assertEqual((result["script"], result["dataset"], result["device"]),
                                 (Path(script).stem, data_set, "cpu"))
                self.assertEqual(list(result["metrics"]), metrics)
                self.assertTrue(np.isfinite(list(result["metrics"].values())).all())
                self.assertEqual(set(result["versions"]), {"python", "torch", "numpy"})
                n_train, n_test = (256, 256) if script == SYNTHETIC else self.counts["digit" in script]
                with np.load(run / "units.npz") as units:
                    self.assertTrue(all(len(units[name]) == n_test for name in units))
                    self.assertTrue(all((units[name] >= 0).all() for name in units if name.startswith("unit_kl")))
                state = torch.load(run / "model.pt", weights_only=True)
                self.assertTrue(all(value.isfinite().all() for value in state.values()))
                self.assertEqual({path.name for path in run.glob("*.png")}, drawn)
                self.assertTrue(all(min(png_size(path)) > 300 for path in run.glob("*.png")))
                self.assertEqual([path for path in run.iterdir() if path.name.startswith(".")], [])
                # The table is the last thing printed, on stdout: a caption, the metrics' names, a row; then the theory.
                caption, names, row, *theory = out.strip().split("\n")
                self.assertIn(f" on {data_set} ", caption)
                self.assertIn(f": {n_train} training and {n_test} test examples, cpu, nats per test example, seed 0", caption)
                self.assertEqual(names.split(), metrics)
                self.assertEqual(len(row.split()), len(metrics))
                self.assertAlmostEqual(float(row.split()[metrics.index("elbo")]), result["metrics"]["elbo"], delta=0.006)
                self.assertEqual("exact_log_px" in metrics, "theory" in result)
                if "theory" in result:
                    self.assertGreater(result["theory"]["gap"], -1e-6)
                    self.assertIn(f"{result['theory']['optimal_loss']:.4f}", "\n".join(theory))
                    self.assertRegex(theory[-1], "^(DIFFERS|trained as predicted)")
                else:                                         # what the linear model would do, in its own columns
                    header, values = (line.replace("linear ", "linear_").split() for line in theory[-2:])
                    self.assertEqual(len(values), len(header))
                    for level in ("_1", "_2") if "kl_1" in metrics else ("",):
                        self.assertAlmostEqual(float(values[header.index(f"linear_kl{level}")]),
                                               sum(result["linear"][f"kl{level}"]), delta=0.006)
                        self.assertEqual(values[header.index(f"AU{level}")], str(result["metrics"][f"AU{level}"]))
                # In a pipe there is no cursor control.
                self.assertNotIn("\r", err)
                self.assertRegex(err, r"training: epoch 1/1, loss -?\d+\.\d\d, 100%")
                # Again: shown, not trained, and the same table.
                status, again, err = small.call(importlib.import_module(Path(script).stem).main, *argv(script), *where[script])
                self.assertEqual((status, again), (0, out))
                self.assertIn("already trained", err)
                self.assertNotIn("training: epoch", err)

    def test_same_command_twice_same_numbers(self):
        """Trained and evaluated anew, not shown again."""
        found = []
        for out_dir in ("once", "again"):
            out, err = (self.folder / f"{out_dir}.{stream}" for stream in ("out", "err"))
            process = small.FORKS.Process(target=small.as_command, args=("MNIST_HVAE_Relu.py", [
                "--out_dir", out_dir, "--num_epochs", 2, "--num_samples", 20, "--beta_1", "0.5,1", "--device", "cpu",
                "--data_dir", "data"], self.folder, out, err))
            process.start()
            process.join(120)
            out, err = out.read_text(), err.read_text()
            self.assertIn("training 2 settings: epoch 2/2", err)
            results = [json.loads(path.read_text()) for path in sorted((self.folder / out_dir).rglob("result.json"))]
            found.append((out, [(result["metrics"], result["curves"]) for result in results]))
        self.assertEqual(len(found[0][1]), 2)
        self.assertEqual(found[0], found[1])

    def test_interrupted(self):
        """Ctrl-C: one line, no traceback, exit status 130, nothing half-written."""
        process = self.start("MNIST_HVAE_Relu.py", "--num_epochs", "100000", "--out_dir", "interrupted", "--seed", "7",
                             env=os.environ | {"PYTHONUNBUFFERED": "1"})
        seen = ""
        while "training: epoch" not in seen:              # blocks until it trains; ends if the process does
            line = process.stderr.readline()
            self.assertTrue(line, seen)
            seen += line
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        self.assertEqual(process.returncode, 130)
        self.assertEqual(out, "")
        self.assertNotIn("Traceback", err)
        self.assertRegex(err.strip().split("\n")[-1], "^interrupted")
        # Nothing but where it stands.
        left = [path for path in (self.folder / "interrupted").rglob("*") if path.is_file() and path.name != ".lock"]
        self.assertEqual([(path.parent.name, path.suffix) for path in left], [("checkpoints", ".pt")])

    def test_errors_reach_the_shell(self):
        process = self.start("MNIST_HVAE_Relu.py", "--eta_dec", "0")
        out, err = process.communicate(timeout=60)
        self.assertEqual((process.returncode, out, err.count("\n")), (2, "", 1))
        self.assertIn("--eta_dec", err)


class Grids(small.InFolder):
    def setUp(self):
        super().setUp()
        small.write_mnist(self.folder / "data")

    def run_grid(self, *argv):
        with mock.patch("pictures.draw_run"):                 # those of each setting take most of the time
            status, out, err = small.call(
                MNIST_HVAE_Relu.main, "--data_dir", self.folder / "data", "--out_dir", self.folder / "runs",
                "--d_hidden", 16, "--num_epochs", 1, "--num_samples", 0, "--device", "cpu", *argv)
        self.assertEqual(status, 0, err)
        table = out.strip().split("\n\n")[0]
        return [line.split() for line in table.split("\n")[1:]], err

    def results(self):
        paths = (self.folder / "runs" / "MNIST_HVAE_Relu").glob("*/result.json")
        return {(r["settings"]["beta_1"], r["settings"]["beta_2"], r["settings"]["seed"]): r["metrics"]
                for r in (json.loads(path.read_text()) for path in paths)}

    def pictures(self):
        return {path.name for path in (self.folder / "runs" / "MNIST_HVAE_Relu" / "grids").rglob("*.png")}

    def test_one_flag(self):
        (names, *rows), err = self.run_grid("--beta_1", "0.1,0.5,2")
        self.assertIn("training 3 settings", err)
        self.assertEqual(names[0], "beta_1")
        self.assertEqual([row[0] for row in rows], ["0.1", "0.5", "2.0"])
        for row in rows:
            self.assertAlmostEqual(float(row[1]), self.results()[float(row[0]), 1.0, 0]["elbo"], delta=0.006)
        self.assertEqual(self.pictures(), {"collapse.png", "linear.png"})

    def test_two_flags(self):
        (names, *rows), _ = self.run_grid("--beta_1", "0.1,2", "--beta_2", "1,3,5")
        self.assertEqual(names[:2], ["beta_1", "beta_2"])
        self.assertEqual([tuple(row[:2]) for row in rows],
                         [(a, b) for a in ("0.1", "2.0") for b in ("1.0", "3.0", "5.0")])
        self.assertEqual(self.pictures(), {"metrics.png", "linear.png"} | {f"reconstructions_{k}.png" for k in range(3)})
        [sheet] = (self.folder / "runs").rglob("reconstructions_2.png")
        width, height = png_size(sheet)
        self.assertGreater(width, height)                     # three columns, two rows

    def test_seeds(self):
        """A row is mean ± sample standard deviation over seeds, pictures are of the first one; two flags' grids do not take each other's
        place."""
        with mock.patch("pictures.save_figure", wraps=pictures.save_figure) as save:
            (names, *rows), _ = self.run_grid("--beta_1", "0.1,2", "--seed", "1,2,3")
        self.assertEqual([call.args[5].split()[-1] for call in save.call_args_list], ["seed=1"] * 2)
        self.assertEqual((names[0], len(rows)), ("beta_1", 2))
        for row in rows:
            elbos = [self.results()[float(row[0]), 1.0, seed]["elbo"] for seed in (1, 2, 3)]
            self.assertEqual(row[1:4], [f"{np.mean(elbos):.2f}", "±", f"{np.std(elbos, ddof=1):.2f}"])
            self.assertGreater(np.std(elbos), 0)
        self.run_grid("--beta_1", "0.1,2", "--eta_dec", "0.6")
        self.assertEqual(len(list((self.folder / "runs").rglob("grids/*/collapse.png"))), 2)


class Objectives(unittest.TestCase):
    def test_loss_is_the_negative_beta_elbo(self):
        """Of every script, by hand; --released_objective counts the reconstruction twice."""
        log_px_z, released_by, with_free_bits = torch.tensor([-3.0, -5.0]), set(), set()
        for path in [*ROOT.glob("MNIST_*.py"), *ROOT.glob("Synthetic_*.py")]:
            script = importlib.import_module(path.stem)
            Model = next(of for of in vars(script).values() if isinstance(of, type) and of.__name__.endswith("VAE"))
            kl = torch.tensor([[1.0, 2.0], [0.5, 0.0]])
            if hasattr(script.Flags, "beta_1"):
                f = script.Flags(beta_1=2.0, beta_2=0.5)
                terms, weighted = {"kl_1": kl, "kl_2": torch.tensor([[4.0], [1.0]])}, [2 * 3 + 0.5 * 4, 2 * 0.5 + 0.5]
            elif hasattr(script.Flags, "latents"):            # any number of levels, all of one weight
                f = script.Flags(beta=2.0)
                terms, weighted = {"kl_1": kl, "kl_2": kl, "kl_3": torch.ones(2, 1)}, [2 * (3 + 3 + 1), 2 * (0.5 + 0.5 + 1)]
            else:
                f, terms, weighted = script.Flags(beta=2.0), {"kl": kl}, [2 * 3, 2 * 0.5]
            for released in (False, True) if hasattr(f, "released_objective") else (False,):
                f.released_objective = released
                released_by |= {path.stem} if released else set()
                expected = [(2 if released else 1) * of + kls for of, kls in zip((3, 5), weighted)]
                with self.subTest(script=path.stem, released=released):
                    self.assertEqual(Model.loss(None, terms | {"log_px_z": log_px_z}, f).tolist(), expected)
            if hasattr(f, "free_bits") and not hasattr(f, "optimizer"):           # of the deep ones test_deep.py says it
                # 3 nats are above each unit's mean; z1 has none
                f.free_bits, with_free_bits = 3.0, with_free_bits | {path.stem}
                weighted = [2 * 3 + 0.5 * 3, 2 * 0.5 + 0.5 * 3] if "kl_1" in terms else [2 * 6, 2 * 6]
                expected = [2 * of + kls for of, kls in zip((3, 5), weighted)]
                self.assertEqual(Model.loss(None, terms | {"log_px_z": log_px_z}, f).tolist(), expected, path.stem)
        self.assertEqual(with_free_bits, released_by)
        self.assertEqual(released_by, {path.stem for path in ROOT.glob("*.py") if re.search("(Relu|CNN)", path.stem)})


class Documents(unittest.TestCase):
    def test_modules_import_only_what_lies_below(self):
        """The order of MODULES, wherever in a file an import stands; a script may import all of them, but no other script."""
        for path in ROOT.glob("*.py"):
            below = MODULES[:MODULES.index(path.stem)] if path.stem in MODULES else MODULES
            if path.stem == "reproduce":                      # which runs the scripts by their names
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                for name in node.names if isinstance(node, ast.Import) else ():
                    if (ROOT / f"{name.name}.py").exists():
                        self.assertIn(name.name, below, path)
                if isinstance(node, ast.ImportFrom):
                    self.assertFalse((ROOT / f"{node.module}.py").exists(), path)

    def test_what_is_slow_to_import_is_imported_where_it_is_used(self):
        for name in MODULES:
            for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
                names = [of.name for of in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
                self.assertFalse({"matplotlib", "torchvision"} & {str(of).split(".")[0] for of in names}, name)

    def test_rooms_are_not_too_large(self):
        lines = {name: len((ROOT / name).read_text().splitlines()) for name in [*(f"{of}.py" for of in MODULES), "README.md"]}
        self.assertLess(lines["common.py"], 500)
        self.assertLessEqual(lines["README.md"], 220)
        self.assertLessEqual(max(lines.values()), 600)

    def test_only_the_allowed_packages_are_imported(self):
        allowed = {"torch", "torchvision", "numpy", "matplotlib", "common", "tests"} | set(sys.stdlib_module_names)
        scripts = {path.stem for path in ROOT.glob("*.py")}
        for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [name.name for name in node.names] if isinstance(node, ast.Import) else \
                    [node.module] if isinstance(node, ast.ImportFrom) else []
                for module in modules:
                    self.assertIn(module.split(".")[0], (allowed | scripts) - {"argparse"}, path)


if __name__ == "__main__":
    unittest.main()
