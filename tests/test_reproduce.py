"""reproduce.py: what its files hold, that it makes nothing twice, and --page without any runs."""
import contextlib
import csv
import io
import json
import re
import shutil
import tempfile
import time
import unittest
from unittest import mock

import measurements
import numpy as np

import datasets
import files
import headroom
import page
import report
import reproduce
from MNIST_HVAE_DCT import DCTVAE
from MNIST_HVAE_DVP import DVPVAE
from MNIST_HVAE_Ladder import LadderVAE
from tests import small
from tests.small import PNG, ROOT

# The classes of the deep models that figure_deep_curves compares.
DEEP_MODELS = {
    "MNIST_HVAE_Ladder": LadderVAE,
    "MNIST_HVAE_DCT": DCTVAE,
    "MNIST_HVAE_DVP": DVPVAE,
}


def result_with(metrics):
    """A made-up result of a setting with these metrics, or of a diverged one for None."""
    return report.RunResult(
        script="",
        settings={},
        dataset="mnist",
        device="cpu",
        versions={},
        seconds={},
        diverged=None,
        side_by_side=1,
        curves={},
        metrics=metrics,
    )


@contextlib.contextmanager
def experiments_with(**commands):
    """Within this context, the experiments of these names have these commands."""
    with contextlib.ExitStack() as patches:
        for name, commands_of_name in commands.items():
            experiment = reproduce.EXPERIMENTS[name]
            patches.enter_context(mock.patch.object(experiment, "commands", commands_of_name))
        yield


def level_with(collapsed, nats, nats_any, likelihood="bernoulli"):
    """A made-up headroom of a level with 8 units, whose largest rho are 1.5 and 2.5."""
    return headroom.LevelHeadroom(
        units=8,
        collapsed=collapsed,
        headroom=nats,
        headroom_any=nats_any,
        level=1.0,
        tau=[1.5, 0.5],
        tau_any=[2.5, 0.5],
        theta=[],
        likelihood=likelihood,
    )


def deep_result(levels, headrooms):
    """A made-up result with this number of levels. headrooms is {"z1": LevelHeadroom}."""
    metrics = {"elbo": -1.0}
    for level in range(1, levels + 1):
        metrics |= {
            f"kl_{level}": level / 4, f"AU_{level}": 8, f"AU_kl_{level}": level,
            f"active_share_{level}": 0.5,
        }
    for latent, level in headrooms.items():
        metrics.update(report.headroom_metrics(latent, level))
    result = result_with(metrics)
    result.headroom = headrooms
    result.parameters = 123
    return result


def without_runs():
    """Within this context, it is an error to read a run or to make one."""
    return mock.patch("reproduce.Run", side_effect=AssertionError("no runs are needed"))


class Reproduced(small.InFolder):
    """Tests that call reproduce.py on a few drawn digits, for one epoch.

    The pictures that a script itself draws take most of its time. So those of single runs are left
    out, and those of grids, too, unless grid_pictures is set.
    """

    grid_pictures = False

    def setUp(self):
        super().setUp()
        small.write_mnist(self.folder / "data")
        self.runs = self.folder / "runs"
        self.results = self.folder / "results"

    def call(self, *argv):
        """Returns (exit status, stdout, stderr)."""
        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch("pictures.draw_run"))
            if not self.grid_pictures:
                patches.enter_context(mock.patch("pictures.draw_grid"))
            return small.call(
                reproduce.main,
                *argv,
                "--data_dir", self.folder / "data",
                "--out_dir", self.runs,
                "--results_dir", self.results,
                "--device", "cpu",
                "--num_epochs", 1,
            )

    def made(self, *argv):
        """Call it, and check that it succeeds. Returns stderr."""
        status, _, err = self.call(*argv)
        self.assertEqual(status, 0, err)
        return err

    def written(self):
        """The names of the files in the folder of results, except in data/."""
        return {path.name for path in self.results.iterdir() if path.is_file()}

    def page(self):
        return (self.results / "README.md").read_text(encoding="utf-8")

    def part(self, name):
        """The part of the page about one result."""
        return re.split("^##", self.page().partition(f"### {name}\n")[2], flags=re.M)[0]

    def rows(self, name):
        """The rows of an experiment's .csv file, as texts."""
        with open(self.results / f"{name}.csv", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def saved_results(self, pattern):
        """The contents of the result.json files that match a pattern in the folder of runs."""
        return [
            json.loads(path.read_text(encoding="utf-8")) for path in self.runs.glob(pattern)
        ]

    def pictures(self):
        """{name: content} of the pictures in the folder of results."""
        return {path.name: path.read_bytes() for path in self.results.glob("*.png")}

    def check_page_without_runs(self):
        """--page draws the same pictures and writes the same page, although no run is left."""
        text = self.page()
        pictures = self.pictures()
        shutil.rmtree(self.runs)
        for name in pictures:
            (self.results / name).write_bytes(b"not a picture")
        with without_runs():
            err = self.made("--page")
        self.assertIn("README.md", err)
        self.assertNotIn("cannot be read", err)
        self.assertEqual(self.page(), text)
        self.assertEqual(self.pictures(), pictures)


COMMENTS = """# All

What it is.

## more

At the end.

## figure_cvae_beta

What it shows.

## figure_hvae_eta

Not made.
"""


class TableAndFigure(Reproduced):
    """A table and a figure that share runs, with two seeds."""

    def test_a_table_and_a_figure_of_the_same_runs(self):
        small_model = "MNIST_CVAE_Relu.py --d_hidden 8 --num_samples 10"
        by_beta = reproduce.both_objectives(f"{small_model} --beta 0.5,2.0")
        by_eta = reproduce.both_objectives(f"{small_model} --eta_dec 0.25,2.0")
        with experiments_with(table_cvae=by_beta + by_eta, figure_cvae_beta=by_beta):
            self.check_table_and_figure()

    def check_table_and_figure(self):
        self.results.mkdir()
        (self.results / "comments.md").write_text(COMMENTS, encoding="utf-8")
        err = self.made("table_cvae", "figure_cvae_beta", "--seed", "1,2")
        self.assertEqual(self.written(), {
            "table_cvae.csv", "table_cvae.png", "figure_cvae_beta.csv", "figure_cvae_beta.png",
            "comments.md", "README.md",
        })
        # What the picture shows beyond the rows.
        arrays = [path.name for path in (self.results / "data").iterdir()]
        self.assertEqual(arrays, ["figure_cvae_beta.npz"])

        self.check_progress(err)
        self.check_rows()
        self.check_page()
        self.check_seed_of_the_picture()
        self.check_added_seed()

        # Again: everything is there.
        err = self.made("table_cvae", "--seed", "1,2")
        self.assertEqual(err.count("training"), 0)
        self.check_page_without_runs()

    def check_progress(self, err):
        """A line for each command. The figure trains nothing that the table has trained."""
        wanted = []
        for command in reproduce.EXPERIMENTS["table_cvae"].commands:
            wanted.append((str(len(wanted) + 1), command))
        line = (
            r"^command (\d) of 4, elapsed \d:\d\d:\d\d, "
            r"remaining about \d+:\d\d:\d\d: python (.*)$"
        )
        self.assertEqual(re.findall(line, err, flags=re.M), wanted)
        # The exact and the released objective, in two sweeps, with two seeds.
        finished = re.findall(r"^training 2 settings: epoch 1/1, .*100%", err, flags=re.M)
        self.assertEqual(len(finished), 8)

    def check_rows(self):
        """Each row of the table is a result.json, in full precision."""
        results = self.saved_results("MNIST_CVAE_Relu/*/result.json")
        names = list(results[0]["settings"])
        by_settings = {}
        for result in results:
            by_settings[tuple(str(result["settings"][name]) for name in names)] = result

        rows = self.rows("table_cvae")
        self.assertEqual(len(rows), 16)
        for row in rows:
            result = by_settings[tuple(row[name] for name in names)]
            for name, value in result["metrics"].items():
                self.assertEqual(float(row[name]), value)
            # What the curves of training end with.
            for name, curve in result["curves"].items():
                self.assertEqual(float(row[f"last epoch {name}"]), curve[-1])
            # A setting counts with its share of the training side by side.
            seconds = dict(result["seconds"])
            share = seconds.pop("train") / result["side_by_side"]
            self.assertAlmostEqual(float(row["seconds"]), share + sum(seconds.values()))

    def check_page(self):
        """The page has the results and the comments, with the mean over the seeds."""
        text = self.page()
        headings = re.findall("^##+ (.*)$", text, flags=re.M)
        self.assertLess(headings.index("table_cvae"), headings.index("figure_cvae_beta"))
        self.assertEqual(headings[-1], "more")
        self.assertNotIn("figure_hvae_eta", headings)
        self.assertIn("What it shows.", self.part("figure_cvae_beta"))
        self.assertNotIn("nan", text)

        table = self.part("table_cvae")
        self.assertIn("seeds 1 and 2", table)
        self.assertIn("](table_cvae.png)", table)
        elbos = []
        for row in self.rows("table_cvae"):
            if row["beta"] == "0.5" and row["released_objective"] == "False":
                elbos.append(float(row["elbo"]))
        self.assertEqual(len(elbos), 2)
        self.assertIn(measurements.format_seeds(elbos), table)

    def check_seed_of_the_picture(self):
        """The collapse curves of two seeds are those of the first one alone."""
        path = self.results / "figure_cvae_beta.png"
        picture = path.read_bytes()
        self.assertTrue(picture.startswith(PNG))
        for seed in ("2", "1"):
            self.made("figure_cvae_beta", "--seed", seed)
            self.assertEqual(path.read_bytes() == picture, seed == "1")

    def check_added_seed(self):
        """Seed 2 joins seed 1. The rows are those of both seeds made at once, and none twice."""
        commands = reproduce.EXPERIMENTS["figure_cvae_beta"].commands
        both = [row for row in self.rows("table_cvae") if row["command"] in commands]
        only_first = [row for row in both if row["seed"] == "1"]
        self.assertEqual(self.rows("figure_cvae_beta"), only_first)
        picture = (self.results / "figure_cvae_beta.png").read_bytes()

        # A kill before the new arrays are written loses nothing.
        with mock.patch("numpy.savez_compressed", side_effect=KeyboardInterrupt), \
                self.assertRaises(KeyboardInterrupt):
            self.call("figure_cvae_beta", "--seed", "2", "--add_seeds", "true")

        for _ in range(2):
            self.made("figure_cvae_beta", "--seed", "2", "--add_seeds", "true")
            rows = self.rows("figure_cvae_beta")
            self.assertCountEqual(rows, both)
            # The rows of a command stand together.
            lines = [row["command"] for row in rows]
            self.assertEqual(lines, sorted(lines, key=commands.index))
            # The picture still shows the first seed.
            self.assertEqual((self.results / "figure_cvae_beta.png").read_bytes(), picture)


class Replaced(Reproduced):
    def test_a_table_with_more_seeds_or_epochs(self):
        """A warning, before anything is trained, says what a trial would replace."""
        self.results.mkdir()
        line = "MNIST_VAE_Linear_learnable_sigma.py --num_samples 0"
        table = f"command,seed,num_epochs\n{line},1,1\n{line},2,3\n"
        with experiments_with(figure_vae_sigma=[line]), \
                mock.patch("reproduce.Run.make", return_value=0), \
                mock.patch("reproduce.write_result"):
            (self.results / "figure_vae_sigma.csv").write_text(table, encoding="utf-8")
            err = self.made("figure_vae_sigma", "--seed", "1")
            self.assertIn("has 2 seeds, and this command replaces it with a table of 1", err)
            self.assertIn("has 3 epochs, and this command replaces it with a table of 1", err)
            # Neither where seeds are added, nor where the table is another one.
            (self.results / "figure_vae_sigma.csv").write_text(
                table.replace("2,3", "2,1"), encoding="utf-8")
            err = self.made("figure_vae_sigma", "--seed", "1", "--add_seeds", "true")
            self.assertNotIn("warning", err)
            self.assertNotIn("seeds", self.made("figure_vae_sigma", "--seed", "3,4"))
            (self.results / "figure_vae_sigma.csv").write_bytes(b"\xff")
            self.assertNotIn("warning", self.made("figure_vae_sigma"))
            status, _, err = self.call("figure_vae_sigma", "--add_seeds", "true")
            self.assertEqual((status, err.count("\n")), (2, 1), err)
            self.assertIn("--add_seeds: ", err)


class Made(Reproduced):
    def test_from_the_rows(self):
        """One of each table and picture that need the rows alone."""
        experiments = experiments_with(
            figure_single_digit=[
                "MNIST_CVAE_Linear_single_digit.py --digit 0:2 --num_samples 0",
                "MNIST_CVAE_Relu_single_digit.py --digit 0:2 --num_samples 0",
            ],
            table_theorems=[
                "matrix_VAE.py --d_0 3 --d_1 2",
                "MNIST_VAE_Linear_learnable_sigma.py --num_samples 0",
            ],
            figure_vae_sigma=[
                "MNIST_VAE_Linear_learnable_sigma.py --num_samples 0",
                "MNIST_VAE_Linear_nonlearnable_sigma.py --num_samples 0",
            ],
            table_correlation=[
                "Synthetic_CVAE_Relu_correlation.py --dim_x 4 --dim_y 4 "
                "--corr_type Identical,Random --num_draws 0",
            ],
            figure_prediction=["MNIST_CVAE_Relu_single_digit.py --digit 0:2 --num_samples 0"],
            figure_bernoulli=[
                "MNIST_VAE_Bernoulli.py --linear true --start_std 1 --beta 1,500 --num_samples 0",
                "MNIST_VAE_Bernoulli.py --linear true --beta_warmup 8 --beta 500 --num_samples 0",
            ],
        )
        names = ["table_theorems", "table_correlation", "figure_vae_sigma", "figure_bernoulli"]
        with experiments:
            # The prediction is collected from the digits, which are therefore made.
            self.made(*names, "figure_prediction")
            self.check_files([*names, "figure_single_digit"], collected="figure_prediction")
            self.check_tables()
            self.check_list()
            self.check_page_without_runs()

    def check_files(self, names, collected=""):
        """A .csv for each, a picture for all except the theorems, and one page.

        A collected result has a picture and no .csv.
        """
        pictures = {f"{name}.png" for name in names if name != "table_theorems"}
        if collected:
            pictures.add(f"{collected}.png")
        tables = {f"{name}.csv" for name in names}
        self.assertEqual(self.written(), {*pictures, *tables, "README.md"})
        for picture in self.pictures().values():
            self.assertTrue(picture.startswith(PNG))

    def check_tables(self):
        self.assertRegex(self.part("table_theorems"), r"\| matrix_VAE \|.* VERIFIED \|")
        # One epoch on 256 images does not arrive at the optimum.
        [_, trained] = self.rows("table_theorems")
        self.assertNotEqual(trained["verdict"], "as predicted")
        self.assertIn("| corr_type = Identical | ", self.part("table_correlation"))
        digits = self.part("figure_single_digit")
        self.assertIn("| MNIST_CVAE_Relu_single_digit, digit = 2 | ", digits)
        self.check_prediction()
        self.check_threshold()

    def check_prediction(self):
        """Its rows are those of the ReLU digits."""
        f = reproduce.Flags(results_dir=str(self.results))
        commands = reproduce.read_all_commands(f)
        _, relu = commands["figure_single_digit"]
        [collected] = commands["figure_prediction"]
        self.assertEqual(len(collected.rows), 3)
        self.assertEqual(collected.rows, relu.rows)
        self.assertIn("those of the same commands", self.part("figure_prediction"))

    def check_threshold(self):
        """The table and the answer have the numbers of the rows."""
        text = self.part("figure_bernoulli")
        first, second, raised = self.rows("figure_bernoulli")
        threshold = float(first["collapse_threshold"])
        self.assertIn(f"stable from β = {threshold:.2f} on", text)
        cells = []
        for row in (second, raised):
            cells.append(f"{float(row['kl']):.3f} ({row['AU_kl']})")
        self.assertIn(f"| 500 | {cells[0]} | {cells[1]} |", text)
        self.assertIn(f"| 1 | {float(first['kl']):.3f} ({first['AU_kl']}) | - |", text)

    def test_a_repeated_sweep(self):
        """A sweep on another data set has a row beside the same sweep of another result."""
        small_model = "MNIST_HVAE_Relu.py --d_hidden 8 --beta_2 0.5,2,3 --num_samples 0"
        repeated = (
            page.RepeatedSweep(f"{small_model} --dataset digits", small_model, "table_hvae"),
        )
        experiments = experiments_with(
            table_hvae=[small_model], table_fashion=[repeated[0].line]
        )
        experiment = reproduce.EXPERIMENTS["table_fashion"]
        repeating = mock.patch.object(experiment, "repeated", repeated)
        with experiments, repeating, small.few_digits():
            self.made("table_hvae", "table_fashion")
            for name, dataset in (("table_hvae", "mnist"), ("table_fashion", "digits")):
                rows = self.rows(name)
                self.assertEqual([row["dataset"] for row in rows], [dataset] * 3)
                self.assertIn(f"*Data: {dataset}. ", self.part(name))
            text = self.part("table_fashion")
            steps = r"\d of 2(?:, \d unchanged)? \| "
            self.assertRegex(text, rf"\| MNIST_HVAE_Relu, beta_2, 1 epoch \| {steps}{steps}z1 ")
            self.assertIn("[table_hvae](#table_hvae), 1 seed, 1 epoch |", text)
            _, out, _ = self.call()
            self.assertRegex(out, r"table_fashion: .*\n    3 of 3 settings finished")
            self.check_page_without_runs()

    def test_from_the_arrays_of_a_grid(self):
        """Pictures of what the scripts leave beside the pictures of their grids."""
        self.grid_pictures = True
        experiments = experiments_with(
            figure_cvae_linear=["MNIST_CVAE_Linear.py --beta 0.5,1 --dim_z 4 --num_samples 0"],
            figure_hvae_samples=[
                "MNIST_HVAE_Relu.py --beta_1 0.1,1 --beta_2 1,2 --num_samples 0 --d_hidden 8",
            ],
        )
        names = ["figure_cvae_linear", "figure_hvae_samples"]
        with experiments:
            self.made(*names)
            self.check_files(names)
            arrays = {path.name for path in (self.results / "data").iterdir()}
            self.assertEqual(arrays, {f"{name}.npz" for name in names})
            table = self.part("figure_hvae_samples")
            self.assertRegex(table, r"\| \*\*0.1\*\* \| .* \(\d+\) \|")
            self.check_page_without_runs()

    def check_list(self):
        """The list says how long the runs took, by their results and by the table."""
        status, out, _ = self.call()
        self.assertEqual(status, 0)
        seconds = sum(float(row["seconds"]) for row in self.rows("figure_vae_sigma"))
        took = f"{seconds / 60:.0f} min"
        self.assertRegex(
            out,
            rf"2 of 2 settings finished, which took {took}; "
            rf"\S+figure_vae_sigma: 2 settings in {took} on cpu\n",
        )

    def test_deep_models(self):
        delta_flags = (
            "--num_ch 4 --dim_z 2 --num_layers 2 --d_hidden 8 --auxiliary_epochs 1 "
            "--num_samples 0 --num_test 20"
        )
        ladder_flags = "--side 14 --latents 3 --num_ch 4 --num_samples 0 --num_test 20"
        dct_flags = f"{ladder_flags} --context_size 2 --diffusion_ch 4"
        why = [
            f"MNIST_HVAE_Ladder.py {ladder_flags}",
            f"MNIST_HVAE_DCT.py {dct_flags}",
            f"MNIST_VAE_Delta.py --prior standard {delta_flags}",
        ]
        experiments = experiments_with(
            table_deep_why=why,
            figure_delta=[
                f"MNIST_VAE_Delta.py --prior standard {delta_flags}",
                f"MNIST_VAE_Delta.py --delta 2,5 {delta_flags}",
            ],
            table_deep=[
                f"MNIST_HVAE_Ladder.py {ladder_flags}",
                f"MNIST_HVAE_DCT.py {dct_flags}",
            ],
        )
        with experiments:
            err = self.made("figure_delta", "table_deep", "table_deep_why")
            # A command of several results is made once.
            self.assertIn("command 4 of 4, ", err)
            self.check_deltas()
            self.check_deep_models()
            self.check_causes()
            self.check_page_without_runs()

    def check_deltas(self):
        standard, *bounded = self.rows("figure_delta")
        text = self.part("figure_delta")
        self.assertIn(f"{float(standard['kl']):.2f} nats", text)
        for row in bounded:
            self.assertIn(f"{float(row['kl']):.2f} nats for δ = {float(row['delta']):g}", text)

    def check_deep_models(self):
        """The KL of each level from the top, for models in one table."""
        [result] = self.saved_results("MNIST_HVAE_Ladder/*/result.json")
        kls = [f"{result['metrics'][f'kl_{level}']:.2f}" for level in (3, 2, 1)]
        text = self.part("table_deep")
        self.assertIn(f"| {', '.join(kls)} | ", text)
        self.assertEqual(text.count("| kl from the top |"), 1)
        ladder, dct = self.rows("table_deep")
        difference = float(dct["elbo"]) - float(ladder["elbo"])
        self.assertRegex(text, rf"\| MNIST_HVAE_DCT \| .*{re.escape(f'{difference:+.2f}')} \|")

    def check_causes(self):
        """A row for each model, with as many values as it has learned levels."""
        ladder, dct, delta = self.rows("table_deep_why")
        text = self.part("table_deep_why")
        for row in (ladder, dct):
            # Three levels each. The DCT-VAE has a context, too, which is not learned.
            causes = row["cause from the top"].split(", ")
            self.assertEqual(len(causes), 3)
            active = row["AU_kl from the top"].split(", ")[-3:]
            name = row["command"].split(".py")[0]
            self.assertRegex(text, rf"\| {name} \| {', '.join(active)} \| .*{', '.join(causes)} \|")
        self.assertRegex(text, rf"\| MNIST_VAE_Delta \| {delta['AU_kl']} \| .*{delta['cause']} \|")

    def test_curves_of_deep_models(self):
        """One model has a single seed. Its row, its curve and its differences are of that seed."""
        flags = "--side 14 --latents 3 --num_ch 4 --num_samples 0 --num_test 20 --test_curve true"
        commands = [
            f"MNIST_HVAE_Ladder.py {flags}",
            f"MNIST_HVAE_DCT.py {flags} --context_size 2 --diffusion_ch 4",
        ]
        name = "figure_deep_curves"
        with experiments_with(figure_deep_curves=commands):
            self.made(name, "--seed", "1,2")
            ladder_runs = self.runs / "MNIST_HVAE_Ladder"
            for path in ladder_runs.glob("*seed=1*/result.json"):
                path.unlink()
            [f] = reproduce.common.parse_flags(reproduce.Flags, [
                "--out_dir", str(self.runs), "--results_dir", str(self.results),
                "--num_epochs", "1", "--device", "cpu", "--data_dir", str(self.folder / "data"),
            ])
            runs = [reproduce.Run(command, f, [1, 2]) for command in commands]
            self.assertEqual([len(run.results) for run in runs], [1, 2])
            with contextlib.redirect_stderr(io.StringIO()):
                reproduce.write_result(f, name, runs)
            self.check_curves(runs)
            self.check_page_without_runs()

    def check_curves(self, runs):
        rows = self.rows("figure_deep_curves")
        self.assertEqual([row["seed"] for row in rows], ["2", "1", "2"])
        # One epoch is too few for a rise over the last ten.
        self.assertNotIn(measurements.RISE_AT_THE_END, rows[0])
        self.assertEqual([row["units from the top"] for row in rows], ["49, 49, 49"] * 3)

        with np.load(self.results / "data" / "figure_deep_curves.npz") as arrays:
            for run in runs:
                for result in run.results:
                    curve = arrays[f"{run.script} seed {result.settings['seed']}"]
                    np.testing.assert_array_equal(curve, result.curves["test_elbo"])

        text = self.part("figure_deep_curves")
        self.assertIn("seeds 1 and 2 (some settings have fewer)", text)
        self.assertIn("| MNIST_HVAE_Ladder (1 seed) | ", text)
        difference = float(rows[2]["elbo"]) - float(rows[0]["elbo"])
        self.assertRegex(
            text, rf"\| MNIST_HVAE_DCT \(only seed 2\) \| - \| {re.escape(f'{difference:+.2f}')} \|"
        )

    def test_settings_that_diverged(self):
        """One setting of the first command diverged, and all of the second."""
        flags = "--d_hidden 8 --num_samples 0 --batch_size 8"
        commands = [
            f"MNIST_HVAE_Relu.py --lr 1e6,0.001 {flags}",
            f"MNIST_HVAE_Relu.py --lr 1e6 --beta_1 2 {flags}",
        ]
        with experiments_with(table_deep_ablation=commands):
            status, _, err = self.call("table_deep_ablation")
        self.assertEqual(status, 1, err)
        rows = self.rows("table_deep_ablation")
        self.assertEqual([row["elbo"] == "" for row in rows], [True, False, True])
        text = self.part("table_deep_ablation")
        self.assertRegex(text, r"\| lr = 0.001 \| -\d+\.\d\d ")
        self.assertRegex(text, r"\| lr = 1000000.0 \| .*diverged")

    def test_a_grid_without_its_pictures(self):
        """The disk was full when the script drew its grid. The numbers are written all the same."""
        commands = ["MNIST_CVAE_Linear.py --beta 0.5,1 --dim_z 4 --num_samples 0"]
        with experiments_with(figure_cvae_linear=commands):
            err = self.made("figure_cvae_linear")
        self.assertRegex(err, "not drawn, because .*data has no arrays .*: figure_cvae_linear")
        self.assertEqual(len(self.rows("figure_cvae_linear")), 2)
        self.assertIn("### figure_cvae_linear", self.page())

    def test_the_list(self):
        status, out, _ = self.call()
        self.assertEqual(status, 0)
        for name, experiment in reproduce.EXPERIMENTS.items():
            self.assertIn(f"{name}: {experiment.question}\n    0 of ", out)
            for command in experiment.commands:
                self.assertIn(f"    python {command}\n", out)
        self.assertFalse(self.results.exists())

    def test_all(self):
        """--all makes every command of every experiment."""
        with mock.patch("reproduce.Run.make", return_value=0) as make, \
                mock.patch("reproduce.write_result") as write:
            err = self.made("--all")
        made = [call.args[1] for call in write.call_args_list]
        with_rows = list(reproduce.EXPERIMENTS)
        with_rows.remove("figure_prediction")
        self.assertEqual(made, with_rows)
        commands = set()
        for experiment in reproduce.EXPERIMENTS.values():
            commands.update(experiment.commands)
        # A command that several results need is made once.
        count = len(commands)
        self.assertEqual(make.call_count, count)
        self.assertIn(f"command {count} of {count}, ", err)

    def test_the_status_is_that_of_the_worst_command(self):
        commands = ["matrix_VAE.py", "matrix_CVAE.py", "matrix_VAE.py --d_1 2"]
        with experiments_with(table_theorems=commands), \
                mock.patch("reproduce.Run.make", side_effect=[0, 1, 0]), \
                mock.patch("reproduce.write_result"):
            status, _, _ = self.call("table_theorems")
        self.assertEqual(status, 1)


class Refused(Reproduced):
    """A script ends without an answer, as where its data set cannot be fetched."""

    LINE = "MNIST_CVAE_Linear.py --beta 0.5,1 --dim_z 4 --num_samples 0"

    def test_the_others_are_made(self):
        """Two results share the refused command. Neither replaces its table by an empty one."""
        refused = "MNIST_CVAE_Linear.py --dataset omniglot"
        commands = {
            "figure_cvae_linear": [refused],
            "table_fashion": [refused, self.LINE],
            "table_theorems": [self.LINE],
        }
        self.results.mkdir()
        (self.results / "table_fashion.csv").write_text("old", encoding="utf-8")
        offline = mock.patch("datasets._any_answers", return_value=False)
        with experiments_with(**commands), offline:
            status, _, err = self.call("figure_cvae_linear", "table_fashion", "table_theorems")
        self.assertEqual(status, 2)
        self.assertIn("--dataset: omniglot is not in", err)
        self.assertEqual(err.count(f"not made: python {refused}"), 1)
        self.assertEqual(err.count("not written: "), 2)
        self.assertEqual((self.results / "table_fashion.csv").read_text(encoding="utf-8"), "old")
        self.assertFalse((self.results / "figure_cvae_linear.csv").exists())
        self.assertEqual(len(self.rows("table_theorems")), 2)

    def test_seeds_with_other_epochs(self):
        """Such a mean would mix one epoch and two."""
        with experiments_with(figure_cvae_linear=[self.LINE]):
            self.made("figure_cvae_linear", "--seed", "1")
            text = (self.results / "figure_cvae_linear.csv").read_text(encoding="utf-8")
            path = self.results / "figure_cvae_linear.csv"
            rows = list(csv.DictReader(io.StringIO(text)))
            for row in rows:
                row["num_epochs"] = "2"
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            status, _, err = self.call("figure_cvae_linear", "--seed", "2", "--add_seeds", "true")
        self.assertEqual(status, 2)
        self.assertIn("--num_epochs: ", err)
        self.assertIn("has 2 epochs", err)
        self.assertIn("has 1; --add_seeds wants the same number", err)
        self.assertEqual([row["seed"] for row in self.rows("figure_cvae_linear")], ["1", "1"])

    def test_the_page_names_the_epochs(self):
        """They are named where they are not those of the command itself."""
        with experiments_with(figure_cvae_linear=[self.LINE]):
            self.made("figure_cvae_linear")
            self.assertIn(
                "`python reproduce.py figure_cvae_linear --seed 0 --num_epochs 1` runs",
                self.part("figure_cvae_linear"),
            )
        with experiments_with(figure_cvae_linear=[f"{self.LINE} --num_epochs 1"]):
            self.made("figure_cvae_linear")
            self.assertIn(
                "`python reproduce.py figure_cvae_linear --seed 0` runs",
                self.part("figure_cvae_linear"),
            )


class Remedies(Reproduced):
    def test_rows(self):
        """Each cell agrees with its results. The objective is the plain one for all remedies."""
        models = [
            reproduce.RemediedModel("MNIST_CVAE_Relu.py --beta 2.0 --d_hidden 8", "--start_std", 8),
            reproduce.RemediedModel(
                "MNIST_HVAE_Relu.py --beta_1 0.25 --d_hidden 8", "--start_std", 8),
        ]
        with experiments_with(table_remedies=reproduce.remedy_commands(models)):
            self.made("table_remedies", "--seed", "1,2")

        tables = self.tables_of_remedies()
        for table in tables:
            # A head, the line below it, and two settings.
            self.assertEqual(len(table), 2 + 2)
        results = self.saved_results("*/*/result.json")
        self.check_free_bits(tables, results)
        self.check_warm_up(tables, results)

        self.assertRegex(self.part("table_remedies"), r"start [+-]\d+\.\d\d, warm-up [+-]")

    def tables_of_remedies(self):
        """The tables of objectives and of units: {(script, setting): the other cells}."""
        tables = []
        for paragraph in self.part("table_remedies").split("\n\n"):
            if paragraph.startswith("|"):
                rows = {}
                for line in paragraph.splitlines():
                    cells = [cell.strip() for cell in line.strip("|").split("|")]
                    rows[tuple(cells[:2])] = cells[2:]
                tables.append(rows)
        objectives, units = tables
        return objectives, units

    def check_free_bits(self, tables, results):
        """The plain objective of the test images: reconstruction + 0.25 kl_1 + 1 kl_2."""
        objectives = []
        active = []
        for result in results:
            settings = result["settings"]
            if settings.get("beta_1") == 0.25 and settings["free_bits"] == 0.1:
                metrics = result["metrics"]
                kls = 0.25 * metrics["kl_1"] + metrics["kl_2"]
                objectives.append(metrics["reconstruction"] + kls)
                active.append(metrics["AU_kl_2"])
        self.assertEqual(len(objectives), 2)
        key = ("MNIST_HVAE_Relu", "beta_1 = 0.25, beta_2 = 1.0")
        self.assertEqual(tables[0][key][-1], measurements.format_seeds(objectives))
        self.assertEqual(tables[1][key][-1], measurements.format_seeds(active))

    def check_warm_up(self, tables, results):
        """The plain objective of the test images at the whole beta. The warm-up is the third."""
        objectives = []
        for result in results:
            settings = result["settings"]
            if settings.get("beta") == 2 and settings["beta_warmup"]:
                # A quarter of --num_epochs 1.
                self.assertEqual(settings["beta_warmup"], 0.25)
                metrics = result["metrics"]
                objectives.append(metrics["reconstruction"] + 2 * metrics["kl"])
        self.assertEqual(len(objectives), 2)
        # The headroom stands before the remedies.
        row = tables[0]["MNIST_CVAE_Relu", "beta = 2.0"]
        self.assertEqual(row[1 + 2], measurements.format_seeds(objectives))


class Refused(Reproduced):
    """What is refused in one line, before anything is trained."""

    def check_refused(self, argv, *messages):
        status, out, err = self.call(*argv)
        self.assertEqual((status, out), (2, ""))
        for message in messages:
            self.assertIn(message, err)
        self.assertEqual(err.count("\n"), 1, err)
        if self.runs.exists():
            self.assertEqual(list(self.runs.iterdir()), [])

    def test_no_such_experiment(self):
        self.check_refused(["table_nothing"], "'table_nothing'", "table_theorems")
        # Earlier versions had an experiment of this name.
        self.check_refused(["table_vae_sigma"], "'table_vae_sigma'")

    def test_names_after_the_flags(self):
        self.check_refused(["--seed", "4", "table_cvae"], "'table_cvae'", "before all flags")

    def test_no_such_flag(self):
        self.check_refused(["table_cvae", "--out_dirr", "x"], "--out_dirr: no such flag")

    def test_a_list_of_another_flag(self):
        self.check_refused(["table_cvae", "--all", "true,false"], "only --seed may be a list")

    def test_page_with_names(self):
        self.check_refused(["table_cvae", "--page"], "--page")
        self.check_refused(["--all", "--page"], "--page")
        self.check_refused(["--page", "table_cvae"], "table_cvae")
        self.assertFalse(self.results.exists())

    def test_results_dir_is_a_file(self):
        self.results.write_text("a file", encoding="utf-8")
        for argv in (["table_cvae"], ["--page"]):
            self.check_refused(argv, f"--results_dir: got {str(self.results)!r}, ")
        self.assertEqual(self.results.read_text(encoding="utf-8"), "a file")

    def test_results_dir_is_in_a_file(self):
        file = self.results
        file.write_text("a file", encoding="utf-8")
        self.results = file / "results"
        self.check_refused(["table_cvae"], f"--results_dir: got {str(self.results)!r}, ")


class Page(Reproduced):
    """--page, which needs the files of the results and nothing else."""

    def test_of_the_committed_results(self):
        """It writes the committed page. Pictures whose arrays are not there stay as they are."""
        shutil.copytree(ROOT / "results", self.results)
        pictures = self.pictures()
        (self.results / "README.md").unlink()
        with without_runs(), mock.patch("pictures.save_figure") as save:
            err = self.made("--page")
        # The page, and the pictures whose arrays are not there.
        self.assertIn("not drawn, because", err)
        self.assertEqual(err.count("\n"), 2, err)
        committed_page = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
        self.assertEqual(self.page(), committed_page)
        self.assertNotIn("runs/", self.page())

        wanted = []
        for name, experiment in reproduce.EXPERIMENTS.items():
            # The rows of a collected result are those of other results.
            has_rows = experiment.collected or (self.results / f"{name}.csv").exists()
            has_arrays = (self.results / "data" / f"{name}.npz").exists()
            if has_rows and experiment.picture and (has_arrays or not experiment.arrays):
                wanted.append(f"{name}.png")
        drawn = [call.args[0].name for call in save.call_args_list]
        self.assertEqual(drawn, wanted)
        self.assertEqual(self.pictures(), pictures)

    def test_of_an_empty_folder(self):
        """There is nothing to show, but a page with its title."""
        with without_runs():
            self.made("--page")
        self.assertEqual(self.written(), {"README.md"})
        self.assertTrue(self.page().startswith("# Results\n"))

    def copy(self, *names):
        """Copy the committed .csv files of these results."""
        self.results.mkdir(exist_ok=True)
        for name in names:
            shutil.copy(ROOT / "results" / f"{name}.csv", self.results)

    def test_broken_arrays(self):
        """The file is named, the picture stays, and the page is written."""
        self.copy("figure_cvae_beta", "figure_cvae_linear")
        (self.results / "data").mkdir()
        path = self.results / "data" / "figure_cvae_beta.npz"
        picture = self.results / "figure_cvae_beta.png"
        picture.write_bytes(b"an older picture")

        for content in (b"", b"no archive", b"PK\x03\x04 half of an archive"):
            path.write_bytes(content)
            with self.subTest(content=content):
                self.check_named(path.name)
        # An archive with an object instead of numbers, and one with the arrays of another result.
        np.savez_compressed(path, x=np.array([{}], dtype=object))
        self.check_named(path.name)
        np.savez_compressed(path, x=np.zeros(3))
        self.check_named(path.name)
        self.assertEqual(picture.read_bytes(), b"an older picture")

    def test_broken_tables(self):
        """The file is named, and the other results are on the page."""
        self.copy("table_deep_ablation")
        path = self.results / "table_cvae.csv"
        header = "command,dataset,device,torch,seconds,seed,elbo\n"
        for content in (
            b"command,device\n\xff",
            # No column with the command, and no column with the seed.
            b"x\n1\n",
            b"command,beta,elbo\n\"" + reproduce.CVAE_BETA.encode() + b"\",0.5,-1.0\n",
            # A row with more cells than there are columns.
            header.encode() + b"x.py,mnist,cpu,2.0,1.0,1,-1.0,more,cells\n",
            # A setting that the command does not have.
            b"command,beta,seed,elbo\n\"" + reproduce.CVAE_BETA.encode() + b"\",7.0,1,-1.0\n",
        ):
            path.write_bytes(content)
            with self.subTest(content=content):
                self.check_named(path.name)
                self.assertIn("### table_deep_ablation", self.page())

    def check_named(self, name):
        """--page succeeds, and a single line on stderr names the file."""
        err = self.made("--page")
        self.assertEqual(len([line for line in err.splitlines() if name in line]), 1, err)
        self.assertIn("# Results", self.page())

    def test_a_table_without_rows(self):
        """It has no part of the page."""
        self.copy("figure_delta")
        (self.results / "table_cvae.csv").write_text("command,seed\n", encoding="utf-8")
        with mock.patch("pictures.save_figure"):
            self.made("--page")
        self.assertNotIn("table_cvae", self.page())


class Broken(Reproduced):
    """Files that are there but hold something else."""

    COMMANDS = [
        "matrix_VAE.py --d_0 3 --d_1 2",
        "MNIST_VAE_Linear_nonlearnable_sigma.py --d_1 2 --num_samples 0",
    ]

    def saved_without_seconds(self):
        """{path: result.json of a run, without the times}."""
        results = {}
        for path in self.runs.glob("*/*/result.json"):
            saved = json.loads(path.read_text(encoding="utf-8"))
            del saved["seconds"]
            results[path] = saved
        return results

    def test_results_of_runs(self):
        """They are made again: that of a theorem's check, and that of a trained model."""
        # Two random starts are enough here.
        with experiments_with(table_theorems=self.COMMANDS), mock.patch("verify.STARTS", 2):
            status, _, err = self.call("table_theorems")
            self.assertEqual(status, 0, err)
            results = self.saved_without_seconds()
            self.assertEqual(len(results), 2)

            for content in ("null", "not json"):
                with self.subTest(content=content):
                    for path in results:
                        path.write_text(content, encoding="utf-8")
                    self.check_made_again(results)

    def check_made_again(self, results):
        # 1. The list counts them as not finished.
        status, out, err = self.call()
        self.assertEqual(status, 0, err)
        question = reproduce.EXPERIMENTS["table_theorems"].question
        self.assertIn(f"table_theorems: {question}\n    0 of 2 settings finished", out)

        # 2. They are made again, and equal what they were.
        status, _, err = self.call("table_theorems")
        self.assertEqual(status, 0, err)
        self.assertEqual(self.saved_without_seconds(), results)
        self.assertEqual(len(self.rows("table_theorems")), 2)

    def test_tables(self):
        """A broken .csv gives no estimate of the time, and no part of the page."""
        self.results.mkdir()
        (self.results / "table_cvae.csv").write_bytes(b"command,device,seconds\n\xff")
        (self.results / "table_hvae.csv").write_text("command\nx.py\n", encoding="utf-8")
        with experiments_with(table_theorems=self.COMMANDS[:1]):
            err = self.made("table_theorems")
        self.assertIn("table_cvae.csv", err)
        page = self.page()
        self.assertIn("### table_theorems", page)
        self.assertNotIn("table_cvae", page)
        self.assertNotIn("table_hvae", page)


class Dealt(small.InFolder):
    """Several processes share the commands."""

    def rows(self, name):
        """The rows of the table in a folder of results, without the times."""
        with open(self.folder / name / "figure_vae_sigma.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            del row["seconds"]
        return rows

    def argv(self, name):
        """Arguments for results in a folder of this name, and runs of its own."""
        return [
            "figure_vae_sigma",
            "--data_dir", self.folder / "data",
            "--out_dir", self.folder / f"{name}_runs",
            "--results_dir", self.folder / name,
            "--device", "cpu",
            "--num_epochs", 2,
        ]

    def start(self):
        """Start reproduce.py in one process. Its messages are added to the file "err"."""
        process = small.start_command(
            "reproduce.py",
            self.argv("killed"),
            self.folder,
            self.folder / "out",
            self.err,
            draws_pictures=False,
        )
        self.addCleanup(process.kill)
        return process

    def messages(self):
        return self.err.read_text(encoding="utf-8") if self.err.exists() else ""

    def test_over_two_processes_and_after_a_kill(self):
        """Two processes, and one that is killed and started again, get the same numbers."""
        small.write_mnist(self.folder / "data", n_train=64, n_test=16)
        self.err = self.folder / "err"
        self.check_two_processes()
        self.check_killed()
        self.assertEqual(len(self.rows("two")), 6)
        self.assertEqual(self.rows("killed"), self.rows("two"))

    def check_two_processes(self):
        """Each command is made by one of the two. Process 0 prints and writes everything."""
        both, outs, errs = small.two_processes(
            self, "reproduce.py", self.argv("two"), self.folder, "two")
        statuses = small.exit_statuses(both, seconds=300)
        first, second = [err.read_text(encoding="utf-8") for err in errs]
        self.assertEqual(statuses, [0, 0], first + second)

        for err in (first, second):
            finished = re.findall(r"^training: epoch 2/2, .*100%", err, flags=re.M)
            self.assertEqual(len(finished), 3, err)
        self.assertIn("process 1: command 3 of 3, ", second)
        self.assertIn("command 6 of 6, ", first)
        has_output = [out.stat().st_size > 0 for out in outs]
        self.assertEqual(has_output, [True, False])
        files = {path.name for path in (self.folder / "two").iterdir()}
        self.assertEqual(
            files, {"figure_vae_sigma.csv", "figure_vae_sigma.png", "README.md"}
        )

    def check_killed(self):
        # 1. It is killed in the third of six commands.
        process = self.start()
        deadline = time.monotonic() + 300
        while "command 3 of 6" not in self.messages():
            self.assertLess(time.monotonic(), deadline, self.messages())
            time.sleep(0.01)
        process.kill()
        process.join()
        self.assertFalse((self.folder / "killed").exists())

        # 2. Started again, it trains the other four.
        process = self.start()
        statuses = small.exit_statuses([process], seconds=300)
        self.assertEqual(statuses, [0], self.messages())
        self.assertEqual(self.messages().count("already trained"), 2)

    def test_shares(self):
        """Worked out by hand.

        The most expensive run comes first, and each goes to the process with the least work.
        """
        self.assertEqual(reproduce.deal([1.0, 5.0, 3.0, 3.0], 2), [[1, 0], [2, 3]])
        self.assertEqual(reproduce.deal([0.0] * 4, 2), [[0, 2], [1, 3]])
        self.assertEqual(reproduce.deal([7.0], 3), [[0], [], []])


class Columns(unittest.TestCase):
    """The columns of a .csv row that say why units collapsed."""

    # Training, the objective and no collapse, from the top.
    CAUSES = {
        "z1": level_with(collapsed=0, nats=0.0, nats_any=0.0),
        "z2": level_with(collapsed=3, nats=0.00123, nats_any=0.00987),
        "z3": level_with(collapsed=8, nats=1.23456, nats_any=2.5),
    }

    def columns(self, levels, headrooms):
        return reproduce.result_columns(deep_result(levels, headrooms))

    def check_no_single_levels(self, columns):
        """The columns of single levels are joined or left out."""
        self.assertEqual([name for name in columns if re.search(r"_\d$", name)], [])

    def test_levels_below_a_context(self):
        """The context is level 4. It has a KL and units, but no headroom."""
        columns = self.columns(4, self.CAUSES)
        self.check_no_single_levels(columns)
        self.assertEqual(columns["kl from the top"], "1.00, 0.75, 0.50, 0.25")
        self.assertEqual(columns["AU_kl from the top"], "4, 3, 2, 1")
        self.assertEqual(columns["headroom from the top"], "1.2346, 0.0012, 0.0000")
        self.assertEqual(columns["headroom_any from the top"], "2.5000, 0.0099, 0.0000")
        # The largest rho with any encoder, 2.5, is above 1.
        self.assertEqual(columns["cause from the top"], "training, unstable, none")
        self.assertEqual((columns["rho"], columns["rho_any"]), (1.5, 2.5))
        self.assertEqual(columns["parameters"], 123)

    def test_units_of_the_learned_levels(self):
        """Level 10 is above level 9. The context has no headroom, so it is not among them."""
        levels = {}
        for number in (9, 10, 8, 1, 2, 3, 4, 5, 6, 7):
            levels[f"z{number}"] = level_with(collapsed=0, nats=0.0, nats_any=0.0)
            levels[f"z{number}"].units = 10 * number
        self.assertEqual(
            self.columns(11, levels)["units from the top"],
            "100, 90, 80, 70, 60, 50, 40, 30, 20, 10",
        )

    def test_rise_at_the_end(self):
        """Over ten epochs, and only of the ELBO of the test images."""
        result = deep_result(3, {})
        self.assertNotIn(measurements.RISE_AT_THE_END, reproduce.result_columns(result))
        result.curves = {"loss": [0.0] * 12, "test_elbo": [-50.0, -9.0, *[-7.0] * 9, -6.5]}
        columns = reproduce.result_columns(result)
        self.assertEqual(columns[measurements.RISE_AT_THE_END], 2.5)
        self.assertEqual(columns["last epoch test_elbo"], -6.5)
        result.curves = {"test_elbo": [-1.0] * 10}
        self.assertNotIn(measurements.RISE_AT_THE_END, reproduce.result_columns(result))

    def test_levels_without_a_context(self):
        columns = self.columns(3, self.CAUSES)
        self.assertEqual(columns["AU_kl from the top"], "3, 2, 1")
        self.assertEqual(columns["cause from the top"], "training, unstable, none")

    def test_a_decoder_without_a_theory(self):
        columns = self.columns(3, {})
        self.check_no_single_levels(columns)
        self.assertEqual(columns["AU_kl from the top"], "3, 2, 1")
        for name in columns:
            self.assertNotRegex(name, "headroom|cause|rho")

    def test_two_levels(self):
        """They are few enough for columns of their own. A Gaussian decoder has no rho."""
        level = level_with(collapsed=2, nats=0.0, nats_any=0.5, likelihood="gaussian")
        columns = self.columns(2, {"z2": level})
        self.assertEqual(columns["cause_2"], "encoder")
        self.assertEqual((columns["headroom_2"], columns["headroom_any_2"]), (0.0, 0.5))
        self.assertNotIn("cause_1", columns)
        self.assertNotIn("rho_2", columns)

    def test_one_level(self):
        result = deep_result(0, {"z": level_with(collapsed=8, nats=0.0, nats_any=0.0)})
        result.metrics |= {"kl": 0.0, "AU_kl": 0}
        columns = reproduce.result_columns(result)
        self.assertEqual(columns["cause"], "unstable")
        self.assertEqual((columns["rho"], columns["rho_any"]), (1.5, 2.5))

    def test_a_model_without_a_headroom(self):
        """Its encoder variance is fixed, so that result.headroom is None."""
        columns = reproduce.result_columns(result_with({"elbo": -1.0, "kl": 1.0}))
        self.assertEqual(columns, {"elbo": -1.0, "kl": 1.0})

    def test_read_again(self):
        """What the rows say of the causes is what the results say."""
        columns = self.columns(4, self.CAUSES)
        causes = measurements.causes_of_row(columns)
        self.assertEqual(list(causes), ["_3", "_2", "_1"])
        for latent, level in self.CAUSES.items():
            self.assertEqual(causes[latent.replace("z", "_")], level.cause())


class Costs(small.InFolder):
    def test_expected_seconds(self):
        """Worked out by hand. A command in no table counts with the mean over all."""
        known = "MNIST_CVAE_Relu.py --beta 0.5,1"
        (self.folder / "table_cvae.csv").write_text(
            f'command,device,seconds\n"{known}",cpu,10\n"{known}",cpu,30\n', encoding="utf-8")
        f = reproduce.Flags(out_dir=str(self.folder / "runs"))
        runs = [
            reproduce.Run(known, f, [1, 2]),
            reproduce.Run("MNIST_CVAE_Relu.py --beta 3", f, [1]),
        ]
        # Two settings with two seeds at 20 seconds; one setting at the mean of 60 and 20.
        self.assertEqual(reproduce.expected_seconds(self.folder, runs), [4 * 20, 40])
        # Finished settings cost nothing.
        runs[0].results = [result_with({})] * 3
        self.assertEqual(reproduce.expected_seconds(self.folder, runs), [20, 40])


class DataSets(small.InFolder):
    """The data sets of a command's results."""

    def run_of(self, command):
        return reproduce.Run(command, reproduce.Flags(out_dir=str(self.folder)), [1])

    def save_result(self, f, dataset):
        """Save a result of this setting on a data set."""
        data = datasets.Data(dataset, None, None)
        saved = result_with(None)
        saved.settings = files.run_settings(f, data)
        saved.dataset = dataset
        saved.diverged = {"epoch": 1, "last_finite_loss": 0.0}
        saved.write(f, data)

    def test_auto(self):
        """MNIST, or the embedded digits if more settings are finished there."""
        command = "MNIST_CVAE_Relu.py --beta 1,2,3"
        run = self.run_of(command)
        self.assertEqual([data.name for data in run.data], ["mnist"] * 3)
        self.save_result(run.settings[0], "mnist")
        self.save_result(run.settings[1], "digits")
        self.assertEqual([result.dataset for result in self.run_of(command).results], ["mnist"])
        self.save_result(run.settings[2], "digits")
        run = self.run_of(command)
        self.assertEqual([result.dataset for result in run.results], ["digits"] * 2)
        self.assertEqual([data.name for data in run.data], ["digits"] * 3)

    def test_a_data_set_by_name(self):
        """Results on other data sets do not count."""
        command = "MNIST_CVAE_Relu.py --beta 1,2 --dataset fashion"
        run = self.run_of(command)
        for f in run.settings:
            self.save_result(f, "digits")
        self.save_result(run.settings[1], "fashion")
        run = self.run_of(command)
        self.assertEqual([result.dataset for result in run.results], ["fashion"])
        self.assertEqual([data.name for data in run.data], ["fashion"] * 2)
        self.assertEqual(run.varying_flags(), {"beta": [1.0, 2.0]})
        self.assertIn("dataset=fashion", run.grid_dir().name)

    def test_two_data_sets(self):
        """The data set is one of the varying flags."""
        command = "MNIST_CVAE_Relu.py --dataset mnist,fashion --beta 1,2"
        run = self.run_of(command)
        self.save_result(run.settings[-1], "fashion")
        run = self.run_of(command)
        self.assertEqual([result.settings["dataset"] for result in run.results], ["fashion"])
        flags = {"beta": [1.0, 2.0], "dataset": ["mnist", "fashion"]}
        self.assertEqual(run.varying_flags(), flags)
        self.assertEqual(reproduce.measured_command(command, []).flags, flags)

    def test_scripts_without_a_data_set(self):
        run = self.run_of("Synthetic_CVAE_Relu_correlation.py")
        self.assertEqual([data.name for data in run.data], ["synthetic"])
        self.assertEqual(self.run_of("matrix_VAE.py --learnable_sigma true,false").data, [None] * 2)

    def test_varying_flags(self):
        """A data set that all settings share is none of them."""
        for command, flags in (
            ("MNIST_CVAE_Relu.py --beta 1,2 --dataset fashion", {"beta": [1.0, 2.0]}),
            ("MNIST_CVAE_Relu.py --dataset fashion --seed 1,2", {}),
            ("matrix_VAE.py --learnable_sigma true,false", {"learnable_sigma": [True, False]}),
        ):
            self.assertEqual(reproduce.measured_command(command, []).flags, flags)


class Commands(unittest.TestCase):
    def settings(self, line):
        """The settings of a command line, each {flag: value}."""
        run = reproduce.Run(line, reproduce.Flags(out_dir=tempfile.gettempdir()), [1])
        return [files.run_settings(f, None) for f in run.settings]

    def test_hvae_sweeps_are_shared(self):
        """The pictures need the runs of the table alone, with the exact objective."""
        table = reproduce.EXPERIMENTS["table_hvae"].commands
        self.assertEqual(len(table), 3)
        pictures = []
        for flag in ("beta_1", "beta_2", "eta"):
            experiment = reproduce.EXPERIMENTS[f"figure_hvae_{flag}"]
            self.assertEqual(experiment.numbers_in, "table_hvae")
            pictures += experiment.commands
        self.assertEqual(pictures, table)
        prediction = reproduce.EXPERIMENTS["figure_prediction"].commands
        for line in (*table, *prediction):
            if "HVAE" in line:
                self.assertNotIn("released", line)
        self.assertLessEqual(set(table), set(prediction))

    def test_collected_commands(self):
        """Each command of a collected result is that of another one, which is made before it."""
        collected = [
            name for name, experiment in reproduce.EXPERIMENTS.items() if experiment.collected
        ]
        self.assertEqual(collected, ["figure_prediction"])
        *sources, last = reproduce.with_sources(["figure_prediction"])
        self.assertEqual(last, "figure_prediction")
        commands = set()
        for name in sources:
            self.assertFalse(reproduce.EXPERIMENTS[name].collected)
            commands.update(reproduce.EXPERIMENTS[name].commands)
        self.assertLessEqual(set(reproduce.EXPERIMENTS[last].commands), commands)

    def test_repeated_sweeps(self):
        """They differ from the originals in the data, the epochs and the values of the flag."""
        repeated = reproduce.EXPERIMENTS["table_fashion"].repeated
        self.assertEqual(
            [sweep.line for sweep in repeated],
            reproduce.EXPERIMENTS["table_fashion"].commands,
        )
        for sweep in repeated:
            with self.subTest(line=sweep.line):
                self.assertIn(sweep.original, reproduce.EXPERIMENTS[sweep.result].commands)
                flags = reproduce.measured_command(sweep.line, []).flags
                original_flags = reproduce.measured_command(sweep.original, []).flags
                self.assertEqual(list(flags), list(original_flags))
                self.assertEqual(
                    sweep.line.split(".py")[0], sweep.original.split(".py")[0]
                )
                first, original = self.settings(sweep.line)[0], self.settings(sweep.original)[0]
                self.assertEqual(first["dataset"], "fashion")
                different = {name for name in first if first[name] != original[name]}
                self.assertLessEqual(
                    different, {"dataset", "num_epochs", "num_samples", *flags}
                )

    def test_small_deep_models(self):
        """Models of about one size, trained in one way on the same images."""
        counts = []
        settings = []
        for line in reproduce.DEEP_SMALL:
            run = reproduce.Run(line, reproduce.Flags(out_dir=tempfile.gettempdir()), [1])
            [f] = run.settings
            model = DEEP_MODELS[run.script](f)
            counts.append(sum(weights.numel() for weights in model.parameters()))
            settings.append(files.run_settings(f, None))
        self.assertEqual((round(min(counts), -3), round(max(counts), -3)), (22000, 23000))
        for name in (
            "side", "num_train", "num_test", "latents", "test_curve", "num_epochs", "batch_size",
            "num_samples", "optimizer", "lr", "lr_schedule", "lr_end", "warmup_epochs",
            "weight_decay", "grad_clip", "ema", "beta_warmup",
        ):
            self.assertEqual(len({values[name] for values in settings}), 1, name)

    def test_every_command_is_a_scripts(self):
        """Each of them parses, and the flags that are passed to the script arrive."""
        f = reproduce.Flags(num_epochs=3, out_dir=tempfile.gettempdir())
        for experiment in reproduce.EXPERIMENTS.values():
            for command in experiment.commands:
                self.assertTrue((ROOT / command.split()[0]).exists())
                run = reproduce.Run(command, f, [4, 5])
                self.assertEqual({setting.seed for setting in run.settings}, {4, 5})
                # Matrix scripts have no epochs.
                epochs = {getattr(setting, "num_epochs", 3) for setting in run.settings}
                self.assertEqual(epochs, {3})


if __name__ == "__main__":
    unittest.main()
