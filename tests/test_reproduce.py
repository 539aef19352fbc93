"""reproduce.py: its tables are what the scripts left, its pictures are there, and what is finished is not made twice."""
import contextlib
import csv
import io
import json
import re
import tempfile
import time
import unittest
from unittest import mock

import numpy as np

import reproduce
from tests import small
from tests.small import ROOT


class Made(small.InFolder):
    def setUp(self):
        super().setUp()
        small.write_mnist(self.folder / "data")

    def call(self, *argv):
        return small.call(reproduce.main, *argv, "--data_dir", self.folder / "data", "--out_dir", self.folder / "runs",
                          "--results_dir", self.folder / "results", "--device", "cpu", "--num_epochs", 1)

    def left(self):
        return {path.name for path in (self.folder / "results").iterdir()}

    def test_a_table_and_a_figure_of_the_same_runs(self):
        """Every row of the table is its result.json, exact and released objective; the figure trains nothing anew."""
        (self.folder / "results").mkdir()
        (self.folder / "results" / "comments.md").write_text(
            "# All\n\nWhat it is.\n\n## more\n\nAt the end.\n\n## figure_cvae_beta\n\nWhat it shows.\n\n## figure_hvae_eta\n\nNot made.\n")
        with mock.patch("pictures.draw_run"):                   # each run's own pictures take most of the time
            status, _, err = self.call("table_cvae", "figure_cvae_beta", "--seed", "1,2")
        self.assertEqual(status, 0, err)
        self.assertEqual(self.left(), {"table_cvae.md", "table_cvae.csv", "figure_cvae_beta.md", "figure_cvae_beta.csv",
                                       "figure_cvae_beta.png", "comments.md", "README.md"})
        commands = re.findall(r"^command (\d) of 6, \d:\d\d:\d\d, about \d+:\d\d:\d\d left: python (.*)$", err, flags=re.M)
        self.assertEqual(commands, [(str(i), command) for i, command in enumerate(
            [command for name in ("table_cvae", "figure_cvae_beta") for command in reproduce.EXPERIMENTS[name].commands], 1)])
        self.assertEqual(err.count("training 4 settings: epoch 1/1"), 8)      # of exact and released, two sweeps, two seeds
        results = [json.loads(path.read_text()) for path in (self.folder / "runs" / "MNIST_CVAE_Relu").glob("*/result.json")]
        by_settings = {json.dumps(r["settings"], sort_keys=True): r["metrics"] for r in results}
        with open(self.folder / "results" / "table_cvae.csv") as file:
            rows = list(csv.DictReader(file))
        self.assertEqual(len(rows), 32)
        names = list(results[0]["settings"])
        for row in rows:
            settings = {name: type(results[0]["settings"][name])(row[name] == "True" if row[name] in ("True", "False") else row[name])
                        for name in names}
            metrics = by_settings[json.dumps(settings, sort_keys=True)]
            for name, value in metrics.items():
                self.assertEqual(float(row[name]), value)                     # full precision
        text = (self.folder / "results" / "table_cvae.md").read_text()
        self.assertIn("mnist; cpu; python ", text)
        self.assertIn("epochs 1; seed 1, 2; ", text)
        elbos = [float(row["elbo"]) for row in rows if row["command"].endswith("2.0") and row["beta"] == "0.5"]
        self.assertEqual(len(elbos), 2)
        self.assertIn(f"| {np.mean(elbos):.2f} ± {np.std(elbos, ddof=1):.2f} |", text)
        self.assertRegex(text, r"\nRank correlation of .*: kl -?\d\.\d\d(, AU -?\d\.\d\d)?.* \(`MNIST_CVAE_Relu.py --eta_enc 1.0 --eta_dec 1.0 ")
        self.assertNotIn("nan", text)
        # README.md has what there is of each, in the order of EXPERIMENTS, and comments.md's words where they belong.
        parts = re.split("^## ", (self.folder / "results" / "README.md").read_text(), flags=re.M)
        self.assertEqual([part.partition("\n")[0] for part in parts], ["# All", "figure_cvae_beta", "table_cvae", "more"])
        self.assertEqual([words in part for part, words in zip(parts, ("What it is.", "What it shows.", "Direction: along ", "At the end."))],
                         [True] * 4)
        self.assertIn("![Does a heavier KL collapse more units of a CVAE?](figure_cvae_beta.png)", parts[1])
        self.assertIn("| beta = 0.5 | ", parts[1])            # two tables of four rows are shown, four of them are not
        self.assertNotIn("| beta = 0.5 | ", parts[2])
        for name, part in zip(("figure_cvae_beta", "table_cvae"), parts[1:]):
            self.assertIn(f"Table: [.md]({name}.md), [.csv]({name}.csv)", part)
            self.assertRegex(part, r"; epochs 1; seed 1, 2; 0 min; 2\d\d\d-\d\d-\d\d; nats per test example")
            self.assertIn("Collapse: of ", part)
        picture = (self.folder / "results" / "figure_cvae_beta.png").read_bytes()
        self.assertTrue(picture.startswith(b"\x89PNG"))
        # The picture is of the first seed, and says so.
        self.assertIn("*The picture is of seed 1.*", parts[1])
        self.assertNotIn("The picture is of", parts[2])
        for seed in ("1", "2"):
            self.assertEqual(self.call("figure_cvae_beta", "--seed", seed)[0], 0)
            self.assertEqual((self.folder / "results" / "figure_cvae_beta.png").read_bytes() == picture, seed == "1")
            self.assertNotIn("The picture is of", (self.folder / "results" / "figure_cvae_beta.md").read_text())
        # Again: all is there.
        status, _, err = self.call("table_cvae", "--seed", "1,2")
        self.assertEqual((status, err.count("training")), (0, 0))

    def test_one_of_each_way_to_draw(self):
        with mock.patch.dict(reproduce.EXPERIMENTS["figure_single_digit"].__dict__, commands=[
                f"MNIST_CVAE_{kind}_single_digit.py --digit 0:2 --num_samples 0" for kind in ("Linear", "Relu")]), \
                mock.patch.dict(reproduce.EXPERIMENTS["figure_cvae_linear"].__dict__, commands=[
                    "MNIST_CVAE_Linear.py --beta 0.5,1 --dim_z 4 --num_samples 0"]), \
                mock.patch.dict(reproduce.EXPERIMENTS["figure_hvae_samples"].__dict__, commands=[
                    "MNIST_HVAE_Relu.py --beta_1 0.1,1 --beta_2 1,2 --num_samples 0 --d_hidden 8"]), \
                mock.patch.dict(reproduce.EXPERIMENTS["table_theorems"].__dict__, commands=[
                    "matrix_VAE.py --d_0 3 --d_1 2", "MNIST_VAE_Linear_learnable_sigma.py"]), \
                mock.patch.dict(reproduce.EXPERIMENTS["table_correlation"].__dict__, commands=[
                    "Synthetic_CVAE_Relu_correlation.py --dim_x 4 --dim_y 4 --corr_type Identical,Random --num_draws 0"]), \
                mock.patch.dict(reproduce.EXPERIMENTS["figure_prediction"].__dict__, commands=[
                    "MNIST_CVAE_Linear.py --beta 0.5,1 --dim_z 4 --num_samples 0", "MNIST_HVAE_Relu.py --d_hidden 8 --num_samples 0",
                    "MNIST_CVAE_Relu_single_digit.py --digit 0:2 --num_samples 0"]):
            names = ["figure_single_digit", "figure_cvae_linear", "figure_hvae_samples", "table_theorems", "table_correlation",
                     "figure_vae_sigma", "figure_prediction"]
            with mock.patch("pictures.draw_run"):               # of each run; reproduce.py draws none of them
                status, _, err = self.call(*names)
        self.assertEqual(status, 0, err)
        self.assertEqual({name for name in self.left() if name.endswith(".png")},
                         {f"{name}.png" for name in names if name.startswith("figure")})
        self.assertEqual(len(self.left()), 2 * 7 + 5 + 1)
        theorems = (self.folder / "results" / "table_theorems.md").read_text()
        self.assertRegex(theorems, r"\| script \| .*verdict \|\n\|---\|---\|---\|---\|\n\| matrix_VAE \| \d\.\de-\d\d \| .*VERIFIED \|\n\n")
        self.assertIn("wants 0 to 0.05", theorems)            # one epoch on 256 images does not arrive
        prediction = (self.folder / "results" / "figure_prediction.md").read_text()
        self.assertRegex(prediction, r"MNIST_CVAE_Linear: every unit is active or collapsed as predicted in \d of 2 settings")
        self.assertRegex(prediction, r"MNIST_CVAE_Relu_single_digit: 3 settings; rank correlation of predicted and trained (none|\w+ -?[01]\.\d\d)")
        self.assertRegex(prediction, r"MNIST_HVAE_Relu: kl_1 predicted -?\d+\.\d\d, trained -?\d+\.\d\d, kl_2 predicted ")
        self.assertNotIn("| setting |", prediction)
        status, out, _ = self.call()                          # the list says how long they took, here and as committed
        self.assertRegex(out, r"4 of 4 settings finished, which took 0 min; \S+figure_vae_sigma: 4 settings in 0 min on cpu\n")
        self.assertIn("| corr_type = Identical | ", (self.folder / "results" / "table_correlation.md").read_text())

    def test_of_deep_models(self):
        small_delta = "--num_ch 4 --dim_z 2 --num_layers 2 --d_hidden 8 --auxiliary_epochs 1 --num_samples 0 --num_test 20"
        with mock.patch.dict(reproduce.EXPERIMENTS["figure_delta"].__dict__, commands=[
                f"MNIST_VAE_Delta.py --prior standard {small_delta}", f"MNIST_VAE_Delta.py --delta 2,5 {small_delta}"]), \
                mock.patch.dict(reproduce.EXPERIMENTS["table_deep"].__dict__, commands=[
                    f"{script}.py --latents 1,2 --num_ch 4 --num_samples 0 --num_test 20"
                    for script in ("MNIST_HVAE_Ladder", "MNIST_HVAE_DCT")]), mock.patch("pictures.draw_run"):
            status, _, err = self.call("figure_delta", "table_deep")
        self.assertEqual(status, 0, err)
        self.assertTrue((self.folder / "results" / "figure_delta.png").read_bytes().startswith(b"\x89PNG"))
        text = (self.folder / "results" / "figure_delta.md").read_text()
        self.assertRegex(text, r"Prior standard: a KL of \d+\.\d\d nats; against the auxiliary prior \d+\.\d\d\.\n")
        self.assertRegex(text, r"Prior ar1: a KL of \d+\.\d\d nats, at least δ = 5; against the auxiliary prior ")
        [run] = (self.folder / "runs" / "MNIST_HVAE_Ladder").glob("latents*")
        result = json.loads((run / "result.json").read_text())
        by_level = ", ".join(f"{result['metrics'][f'kl_{level}']:.2f}" for level in (3, 2, 1))
        text = (self.folder / "results" / "table_deep.md").read_text()
        self.assertIn(f"| {by_level} | ", text)
        self.assertRegex(text, r"\nMNIST_HVAE_DCT beside MNIST_HVAE_Ladder: ELBO .* nats, of which reconstruction .*, context -\d")
        self.assertEqual(text.count("| kl from the top |"), 1)        # models of the same columns are rows of one table
        self.assertTrue((self.folder / "results" / "table_deep.png").read_bytes().startswith(b"\x89PNG"))

    def test_remedies(self):
        """Each row from its results; the objective is the plain one, whatever was trained."""
        remedied = (("MNIST_CVAE_Relu.py --beta 1.0,2.0", "--start_std", 8), ("MNIST_HVAE_Relu.py --beta_1 0.25 --d_hidden 8", "--start_std", 8))
        commands = [f"{command} {flags.format(start=start, quarter=epochs // 4)} --num_epochs {epochs} --num_samples 0"
                    for command, start, epochs in remedied for _, flags in reproduce.REMEDIES]
        with mock.patch.dict(reproduce.EXPERIMENTS["table_remedies"].__dict__, commands=commands), \
                mock.patch("reproduce.REMEDIED", remedied), mock.patch("pictures.draw_run"), mock.patch("pictures.draw_grid"):
            status, _, err = self.call("table_remedies", "--seed", "1,2")
        self.assertEqual(status, 0, err)
        text = (self.folder / "results" / "table_remedies.md").read_text()
        rows = {tuple(row.split(" | ")[:3]): row.strip(" |").split(" | ")[3:] for row in text.replace("\n| ", "\n").splitlines() if " | " in row}
        self.assertEqual(len(rows), 2 + 5 * 3)
        results = [json.loads(path.read_text()) for path in (self.folder / "runs").glob("*/*/result.json")]
        plain = [of["metrics"]["reconstruction"] + 0.25 * of["metrics"]["kl_1"] + of["metrics"]["kl_2"] for of in results
                 if of["settings"].get("beta_1") == 0.25 and of["settings"]["free_bits"] == 0.1]
        free = rows["MNIST_HVAE_Relu", "beta_1 = 0.25, beta_2 = 1.0", "free bits"]
        self.assertEqual(len(plain), 2)
        self.assertEqual(free[1], f"{np.mean(plain):.3f} ± {np.std(plain, ddof=1):.3f}")
        warm = [of for of in results if of["settings"].get("beta") == 2 and of["settings"]["beta_warmup"]]
        plain = [of["curves"]["reconstruction"][-1] + 2 * of["curves"]["kl"][-1] for of in warm]
        self.assertEqual({of["settings"]["beta_warmup"] for of in warm}, {0.25})      # a quarter of --num_epochs 1
        row = rows["MNIST_CVAE_Relu", "beta = 2.0", "warm-up"]
        self.assertEqual(row[0], f"{np.mean(plain):.3f} ± {np.std(plain, ddof=1):.3f}")
        self.assertEqual(row[4], "{:.3f} ± {:.3f}".format(*(of([r["metrics"]["headroom"] for r in warm], **ddof) for of, ddof in (
            (np.mean, {}), (np.std, {"ddof": 1})))))
        cases = [int(of) for of in re.findall(r" nats in \d+ of (\d+) cases", text)]
        self.assertEqual(sum(cases), 3 * 2 * 4)               # settings, seeds, remedies
        self.assertIn("Collapse: of 30 levels ", text)

    def test_a_diverged_setting_says_so(self):
        with mock.patch.dict(reproduce.EXPERIMENTS["table_vae_sigma"].__dict__, commands=[
                "MNIST_HVAE_Relu.py --lr 1e6,0.001 --d_hidden 8 --num_samples 0 --batch_size 8"]), mock.patch("pictures.draw_run"):
            status, _, err = self.call("table_vae_sigma")
        self.assertEqual(status, 1)
        text = (self.folder / "results" / "table_vae_sigma.md").read_text()
        self.assertIn("| lr = 1000000.0 | diverged | diverged |", text)
        self.assertRegex(text, r"\| lr = 0.001 \| -\d+\.\d\d \|")

    def test_the_list(self):
        status, out, _ = self.call()
        self.assertEqual(status, 0)
        for name, experiment in reproduce.EXPERIMENTS.items():
            self.assertIn(f"{name}: {experiment.asks}\n    0 of ", out)
            for command in experiment.commands:
                self.assertIn(f"    python {command}\n", out)
        self.assertFalse((self.folder / "results").exists())

    def test_what_there_is_not(self):
        for argv, words in ((["table_nothing"], "'table_nothing': no such table or figure, wants some of figure_cvae_beta, "),
                            (["table_cvae", "--device", "cpu", "--out_dirr", "x"], "--out_dirr: no such flag")):
            with contextlib.redirect_stderr(io.StringIO()) as err, self.assertRaises(SystemExit) as end:
                reproduce.main([*argv, "--results_dir", str(self.folder / "results")])
            self.assertEqual(end.exception.code, 2)
            self.assertIn(words, err.getvalue())


class Dealt(small.InFolder):
    def rows(self, results):
        with open(self.folder / results / "table_vae_sigma.csv") as file:
            return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]

    def argv(self, name):
        return ["table_vae_sigma", "--data_dir", self.folder / "data", "--out_dir", self.folder / f"{name}_runs", "--results_dir",
                self.folder / name, "--device", "cpu", "--num_epochs", 2]

    def test_over_two_processes_and_after_a_kill(self):
        """Each command made once, by one of two; process 0 prints and writes all. Alone, killed and again: the same numbers."""
        small.write_mnist(self.folder / "data")
        both, outs, errs = small.two_processes(self, "reproduce.py", self.argv("two"), self.folder, "two")
        self.assertEqual(small.ended(both), [0, 0], [err.read_text() for err in errs])
        first, second = (err.read_text() for err in errs)
        self.assertEqual([err.count("training: epoch 2/2") for err in (first, second)], [2, 2])
        self.assertIn("process 1: command 2 of 2, ", second)
        self.assertIn("command 4 of 4, ", first)
        self.assertEqual([out.read_text().count("nats per test example") for out in outs], [4, 0])

        def start():
            process = small.FORKS.Process(target=small.as_command, args=(
                "reproduce.py", self.argv("killed"), self.folder, self.folder / "out", self.folder / "err"))
            process.start()
            self.addCleanup(process.kill)
            return process

        process, deadline = start(), time.monotonic() + 60
        while "command 3 of 4" not in ((self.folder / "err").read_text() if (self.folder / "err").exists() else ""):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)
        process.kill()
        process.join()
        self.assertFalse((self.folder / "killed").exists())
        process = start()
        process.join(60)
        self.assertEqual(process.exitcode, 0, (self.folder / "err").read_text())
        self.assertEqual((self.folder / "err").read_text().count("already trained"), 2)
        self.assertEqual(len(self.rows("two")), 4)
        self.assertEqual(self.rows("killed"), self.rows("two"))

    def test_hands(self):
        """By hand: the dearest first, each to whom has least to do, and what costs nothing by turns."""
        self.assertEqual(reproduce.deal([1.0, 5.0, 3.0, 3.0], 2), [[1, 0], [2, 3]])
        self.assertEqual(reproduce.deal([0.0] * 4, 2), [[0, 2], [1, 3]])
        self.assertEqual(reproduce.deal([7.0], 3), [[0], [], []])


class Commands(unittest.TestCase):
    def test_every_command_is_a_scripts(self):
        """Each parses, and passed-through flags arrive."""
        f = reproduce.Flags(num_epochs=3, out_dir=tempfile.gettempdir())
        for experiment in reproduce.EXPERIMENTS.values():
            for command in experiment.commands:
                self.assertTrue((ROOT / command.split()[0]).exists())
                run = reproduce.Run(command, f, [4, 5])
                self.assertEqual({of.seed for of in run.settings}, {4, 5})
                self.assertEqual({getattr(of, "num_epochs", 3) for of in run.settings}, {3})


class Sentences(unittest.TestCase):
    """What a table ends with, of made-up results."""

    def run_of(self, command, metrics):
        run = reproduce.Run(command, reproduce.Flags(out_dir=tempfile.gettempdir()), [0])
        run.results = [{"metrics": of} for of in metrics]
        return run

    def test_directions(self):
        said = lambda *run: list(reproduce.directions([self.run_of(*run)]))
        beta = "MNIST_CVAE_Relu.py --beta 0.5,1,2,4"
        self.assertEqual(said(beta, [{"kl": 4.0}, {"kl": 3.0}, {"kl": 3.004}, {"kl": 3.2}]),     # up by less than is printed, then by more
                         [f"Direction: along beta, kl falls or stays in 2 of 3 steps (`{beta}`)."])
        self.assertEqual(said("MNIST_CVAE_Relu.py --d_hidden 8,16", [{"kl": 4.0}, {"kl": 3.0}]), [])
        self.assertEqual(said(beta, [{"kl": 4.0}, None, {"kl": 5.0}, {"kl": 1.0}]),              # beside a diverged one no step
                         [f"Direction: along beta, kl falls or stays in 1 of 1 steps (`{beta}`)."])
        grid = "MNIST_HVAE_Relu.py --beta_1 1,2,4 --beta_2 1,2"
        kl_2 = [5.0, 3.0,
                6.0, 7.0,
                4.0, 8.0]                                     # rows beta_1, columns beta_2
        self.assertEqual(said(grid, [{"kl_2": kl} for kl in kl_2]), [
            f"Direction: along beta_1, kl_2 rises or stays in 3 of 4 steps (`{grid}`).",
            f"Direction: along beta_2, kl_2 falls or stays in 1 of 3 steps (`{grid}`)."])

    def test_levels_in_use(self):
        """Units are counted by their mean over the test images; a level without any is collapsed."""
        ladder, dct = (reproduce.Run(f"MNIST_HVAE_{kind}.py", reproduce.Flags(out_dir=tempfile.gettempdir()), [0])
                       for kind in ("Ladder", "DCT"))
        ladder.units = lambda i: {"log_px": np.zeros(2), "unit_kl_1": np.array([[0.0, 0.018, 3.0], [0.018, 0.004, 3.0]]),
                                  "unit_kl_2": np.array([[0.0, 0.0], [0.0, 0.01]])}
        dct.units = lambda i: {"unit_kl_1": np.array([[2.0, 0.001]]), "unit_kl_2": np.array([[0.1]])}
        ladder.results, dct.results = [{"metrics": {"kl": 3.0}}], [{"metrics": {"kl": 2.1}}]
        diverged = self.run_of("MNIST_HVAE_DVP.py", [None])
        self.assertEqual(list(reproduce.levels_in_use([ladder, dct, diverged])), [
            "MNIST_HVAE_Ladder: 2 of 5 units carry more than 0.01 nats; of 2 levels collapsed: 2.",
            "MNIST_HVAE_DCT: 2 of 3 units carry more than 0.01 nats; each of 2 levels has some."])

    def test_beside_the_first(self):
        """A ladder without a context, a model with one, two seeds each: the terms' differences sum to the ELBO's."""
        ladder = self.run_of("MNIST_HVAE_Ladder.py", [
            {"log_px": -90.0 - k, "elbo": -95.0 - k, "reconstruction": 60.0 + k, "kl_1": 25.0, "kl_2": 10.0, "kl": 35.0} for k in (0, 2)])
        dct = self.run_of("MNIST_HVAE_DCT.py", [
            {"log_px": -92.0, "elbo": -97.5, "reconstruction": 58.0, "kl_1": 20.0, "kl_2": 4.0, "kl_3": 15.5, "context_baseline": 20.0, "kl": 39.5},
            None, {"log_px": -92.0, "elbo": -97.5, "reconstruction": 58.0, "kl_1": 20.0, "kl_2": 4.0, "kl_3": 15.5,
                   "context_baseline": 20.0, "kl": 39.5}])
        self.assertEqual(list(reproduce.beside_the_first([ladder, self.run_of("MNIST_HVAE_DVP.py", [None]), dct])), [
            "MNIST_HVAE_DCT beside MNIST_HVAE_Ladder: log p(x) -1.00 nats, ELBO -1.50 nats, of which reconstruction +3.00, learned latents +11.00, "
            "context -15.50."])

    def test_collapsed_by(self):
        run = self.run_of("MNIST_CVAE_Relu.py --beta 0.5,1,2,4", [{}] * 5)
        for result, (collapsed, nats) in zip(run.results, [(0, 0.0), (3, 0.0099), (16, 0.5), (2, 0.02), (0, None)]):
            result |= {"headroom": {"z": {"units": 16, "collapsed": collapsed, "headroom": nats}}} if nats is not None else {}
        self.assertEqual(list(reproduce.collapsed_by([run])), [
            "Collapse: of 4 levels 3 have collapsed units: 1 by the objective, 2 by training, whose headroom is 0.02 to 0.5 nats."])
        self.assertEqual(list(reproduce.collapsed_by([self.run_of("MNIST_CVAE_Relu.py", [{}])])), [])

    def test_misplaced_units(self):
        """Active where collapse is predicted or the other way round, and how far beta is from the threshold."""
        result = {"settings": {"beta": 2.0}, "theory": {
            "predicted": {"information": [0.5, 0.004, 0.0, 0.0], "collapse": [9.0, 2.02, 1.9, 1.0]},
            "trained": {"information": [0.4, 0.003, 0.02, 0.0]}}}
        self.assertEqual([round(distance, 9) for distance in reproduce.misplaced(result)], [0.01, 0.05])


if __name__ == "__main__":
    unittest.main()
