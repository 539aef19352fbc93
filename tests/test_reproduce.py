"""reproduce.py: its tables hold the scripts' results, and it makes nothing twice."""
import contextlib
import csv
import json
import re
import tempfile
import time
import unittest
from unittest import mock

import headroom
import numpy as np

import report
import reproduce
import verify
from tests import small
from tests.small import ROOT

# What a picture file starts with.
PNG = b"\x89PNG"


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


def minutes(rows):
    """The seconds of a table's rows as minutes, as the pages show them."""
    seconds = sum(float(row["seconds"]) for row in rows)
    return f"{seconds / 60:.0f} min"


@contextlib.contextmanager
def experiments_with(**commands):
    """Within this context, the experiments of these names have these commands."""
    with contextlib.ExitStack() as patches:
        for name, commands_of_name in commands.items():
            experiment = reproduce.EXPERIMENTS[name]
            patches.enter_context(mock.patch.object(experiment, "commands", commands_of_name))
        yield


class Reproduced(small.InFolder):
    """Tests that call reproduce.py on a few drawn digits, for one epoch."""

    def setUp(self):
        super().setUp()
        small.write_mnist(self.folder / "data")
        self.runs = self.folder / "runs"
        self.results = self.folder / "results"

    def call(self, *argv):
        """Returns (exit status, stdout, stderr).

        The pictures of single runs take most of a script's time, so they are left out.
        """
        with mock.patch("pictures.draw_run"):
            return small.call(
                reproduce.main,
                *argv,
                "--data_dir", self.folder / "data",
                "--out_dir", self.runs,
                "--results_dir", self.results,
                "--device", "cpu",
                "--num_epochs", 1,
            )

    def written(self):
        """The names of the files in the folder of results."""
        return {path.name for path in self.results.iterdir()}

    def text(self, name):
        return (self.results / name).read_text(encoding="utf-8")

    def rows(self, name):
        """The rows of an experiment's table with all digits."""
        with open(self.results / f"{name}.csv", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def saved_results(self, pattern):
        """The contents of the result.json files that match a pattern in the folder of runs."""
        return [
            json.loads(path.read_text(encoding="utf-8")) for path in self.runs.glob(pattern)
        ]


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
        self.results.mkdir()
        (self.results / "comments.md").write_text(COMMENTS, encoding="utf-8")
        status, _, err = self.call("table_cvae", "figure_cvae_beta", "--seed", "1,2")
        self.assertEqual(status, 0, err)
        self.assertEqual(self.written(), {
            "table_cvae.md", "table_cvae.csv",
            "figure_cvae_beta.md", "figure_cvae_beta.csv", "figure_cvae_beta.png",
            "comments.md", "README.md",
        })

        self.check_progress(err)
        self.check_rows()
        self.check_table()
        self.check_page()
        self.check_seed_of_the_picture()

        # Again: everything is there.
        status, _, err = self.call("table_cvae", "--seed", "1,2")
        self.assertEqual((status, err.count("training")), (0, 0))

    def check_progress(self, err):
        """A line for each command. The figure trains nothing that the table has trained."""
        wanted = []
        for name in ("table_cvae", "figure_cvae_beta"):
            for command in reproduce.EXPERIMENTS[name].commands:
                wanted.append((str(len(wanted) + 1), command))
        line = r"^command (\d) of 6, \d:\d\d:\d\d, about \d+:\d\d:\d\d left: python (.*)$"
        self.assertEqual(re.findall(line, err, flags=re.M), wanted)
        # The exact and the released objective, in two sweeps, with two seeds.
        self.assertEqual(err.count("training 4 settings: epoch 1/1"), 8)

    def check_rows(self):
        """Each row of the table is a result.json, in full precision."""
        results = self.saved_results("MNIST_CVAE_Relu/*/result.json")
        names = list(results[0]["settings"])
        by_settings = {}
        for result in results:
            by_settings[tuple(str(result["settings"][name]) for name in names)] = result

        rows = self.rows("table_cvae")
        self.assertEqual(len(rows), 32)
        for row in rows:
            result = by_settings[tuple(row[name] for name in names)]
            for name, value in result["metrics"].items():
                self.assertEqual(float(row[name]), value)
            # A setting counts with its share of the training side by side.
            seconds = dict(result["seconds"])
            share = seconds.pop("train") / result["side_by_side"]
            self.assertAlmostEqual(float(row["seconds"]), share + sum(seconds.values()))

    def check_table(self):
        text = self.text("table_cvae.md")
        self.assertIn("mnist; cpu; python ", text)
        self.assertIn("epochs 1; seed 1, 2; ", text)

        elbos = []
        for row in self.rows("table_cvae"):
            if row["command"].endswith("2.0") and row["beta"] == "0.5":
                elbos.append(float(row["elbo"]))
        self.assertEqual(len(elbos), 2)
        self.assertIn(f"| {np.mean(elbos):.2f} ± {np.std(elbos, ddof=1):.2f} |", text)

        self.assertRegex(
            text,
            r"\nRank correlation of .*: kl -?\d\.\d\d(, AU -?\d\.\d\d)?.* "
            r"\(`MNIST_CVAE_Relu.py --eta_enc 1.0 --eta_dec 1.0 ",
        )
        self.assertNotIn("nan", text)

    def check_page(self):
        """README.md has the results in the order of EXPERIMENTS, and the comments among them."""
        parts = re.split("^## ", self.text("README.md"), flags=re.M)
        headings = [part.partition("\n")[0] for part in parts]
        self.assertEqual(headings, ["# All", "figure_cvae_beta", "table_cvae", "more"])
        introduction, figure, table, more = parts
        self.assertIn("What it is.", introduction)
        self.assertIn("What it shows.", figure)
        self.assertIn("Direction: along ", table)
        self.assertIn("At the end.", more)

        question = "Does a heavier KL collapse more units of a CVAE?"
        self.assertIn(f"![{question}](figure_cvae_beta.png)", figure)
        # Two tables of four rows are shown. Four of them are not.
        self.assertIn("| beta = 0.5 | ", figure)
        self.assertNotIn("| beta = 0.5 | ", table)

        for name, part in (("figure_cvae_beta", figure), ("table_cvae", table)):
            self.assertIn(f"Table: [.md]({name}.md), [.csv]({name}.csv)", part)
            self.assertRegex(
                part,
                rf"; epochs 1; seed 1, 2; {minutes(self.rows(name))}; 2\d\d\d-\d\d-\d\d; "
                "nats per test example",
            )
            self.assertIn("Collapse: of ", part)

        self.assertIn("*The picture is of seed 1.*", figure)
        self.assertNotIn("The picture is of", table)

    def check_seed_of_the_picture(self):
        """The picture of two seeds is that of the first one alone."""
        path = self.results / "figure_cvae_beta.png"
        picture = path.read_bytes()
        self.assertTrue(picture.startswith(PNG))
        for seed in ("1", "2"):
            status, _, err = self.call("figure_cvae_beta", "--seed", seed)
            self.assertEqual(status, 0, err)
            self.assertEqual(path.read_bytes() == picture, seed == "1")
            self.assertNotIn("The picture is of", self.text("figure_cvae_beta.md"))


class Made(Reproduced):
    def test_one_of_each_way_to_draw(self):
        experiments = experiments_with(
            figure_single_digit=[
                "MNIST_CVAE_Linear_single_digit.py --digit 0:2 --num_samples 0",
                "MNIST_CVAE_Relu_single_digit.py --digit 0:2 --num_samples 0",
            ],
            figure_cvae_linear=["MNIST_CVAE_Linear.py --beta 0.5,1 --dim_z 4 --num_samples 0"],
            figure_hvae_samples=[
                "MNIST_HVAE_Relu.py --beta_1 0.1,1 --beta_2 1,2 --num_samples 0 --d_hidden 8",
            ],
            table_theorems=[
                "matrix_VAE.py --d_0 3 --d_1 2",
                "MNIST_VAE_Linear_learnable_sigma.py",
            ],
            table_correlation=[
                "Synthetic_CVAE_Relu_correlation.py --dim_x 4 --dim_y 4 "
                "--corr_type Identical,Random --num_draws 0",
            ],
            figure_prediction=[
                "MNIST_CVAE_Linear.py --beta 0.5,1 --dim_z 4 --num_samples 0",
                "MNIST_HVAE_Relu.py --d_hidden 8 --num_samples 0",
                "MNIST_CVAE_Relu_single_digit.py --digit 0:2 --num_samples 0",
            ],
        )
        names = [
            "figure_single_digit", "figure_cvae_linear", "figure_hvae_samples", "table_theorems",
            "table_correlation", "figure_vae_sigma", "figure_prediction",
        ]
        with experiments:
            status, _, err = self.call(*names)
            self.assertEqual(status, 0, err)
            self.check_files(names)
            self.check_sentences()
            self.check_list()

    def check_files(self, names):
        """Two files and a page for all, and a picture for each figure."""
        figures = {f"{name}.png" for name in names if name.startswith("figure")}
        tables = {f"{name}.{kind}" for name in names for kind in ("md", "csv")}
        self.assertEqual(len(figures), 5)
        self.assertEqual(self.written(), {*figures, *tables, "README.md"})

    def check_sentences(self):
        theorems = self.text("table_theorems.md")
        self.assertRegex(
            theorems,
            r"\| script \| .*verdict \|\n\|---\|---\|---\|---\|\n"
            r"\| matrix_VAE \| \d\.\de-\d\d \| .*VERIFIED \|\n\n",
        )
        # One epoch on 256 images does not arrive at the optimum.
        self.assertIn("wants 0 to 0.05", theorems)

        prediction = self.text("figure_prediction.md")
        for line in (
            r"MNIST_CVAE_Linear: every unit is active or collapsed as predicted in \d of 2 "
            r"settings",
            r"MNIST_CVAE_Relu_single_digit: 3 settings; rank correlation of predicted and trained "
            r"(none|\w+ -?[01]\.\d\d)",
            r"MNIST_HVAE_Relu: kl_1 predicted -?\d+\.\d\d, trained -?\d+\.\d\d, kl_2 predicted ",
        ):
            self.assertRegex(prediction, line)
        self.assertNotIn("| setting |", prediction)
        self.assertIn("| corr_type = Identical | ", self.text("table_correlation.md"))

    def check_list(self):
        """The list says how long the runs took, by their results and by the table."""
        status, out, _ = self.call()
        self.assertEqual(status, 0)
        took = minutes(self.rows("figure_vae_sigma"))
        self.assertRegex(
            out,
            rf"4 of 4 settings finished, which took {took}; "
            rf"\S+figure_vae_sigma: 4 settings in {took} on cpu\n",
        )

    def test_deep_models(self):
        delta_flags = (
            "--num_ch 4 --dim_z 2 --num_layers 2 --d_hidden 8 --auxiliary_epochs 1 "
            "--num_samples 0 --num_test 20"
        )
        ladder_flags = "--latents 1,2 --num_ch 4 --num_samples 0 --num_test 20"
        experiments = experiments_with(
            figure_delta=[
                f"MNIST_VAE_Delta.py --prior standard {delta_flags}",
                f"MNIST_VAE_Delta.py --delta 2,5 {delta_flags}",
            ],
            table_deep=[
                f"MNIST_HVAE_Ladder.py {ladder_flags}",
                f"MNIST_HVAE_DCT.py {ladder_flags}",
            ],
        )
        with experiments:
            status, _, err = self.call("figure_delta", "table_deep")
        self.assertEqual(status, 0, err)

        # 1. The figure of the delta-VAE.
        self.assertTrue((self.results / "figure_delta.png").read_bytes().startswith(PNG))
        text = self.text("figure_delta.md")
        for line in (
            r"Prior standard: a KL of \d+\.\d\d nats; against the auxiliary prior \d+\.\d\d\.\n",
            r"Prior ar1: a KL of \d+\.\d\d nats, at least δ = 5; against the auxiliary prior ",
        ):
            self.assertRegex(text, line)

        # 2. The table of the deep models, with the KL of each level from the top.
        [result] = self.saved_results("MNIST_HVAE_Ladder/latents*/result.json")
        kls = [f"{result['metrics'][f'kl_{level}']:.2f}" for level in (3, 2, 1)]
        text = self.text("table_deep.md")
        self.assertIn(f"| {', '.join(kls)} | ", text)
        self.assertRegex(
            text,
            r"\nMNIST_HVAE_DCT beside MNIST_HVAE_Ladder: ELBO .* nats, of which reconstruction .*, "
            r"context -\d",
        )
        # Models with the same columns are rows of one table.
        self.assertEqual(text.count("| kl from the top |"), 1)
        self.assertTrue((self.results / "table_deep.png").read_bytes().startswith(PNG))

    def test_a_diverged_setting_says_so(self):
        command = (
            "MNIST_HVAE_Relu.py --lr 1e6,0.001 --d_hidden 8 --num_samples 0 --batch_size 8"
        )
        with experiments_with(table_vae_sigma=[command]):
            status, _, err = self.call("table_vae_sigma")
        self.assertEqual(status, 1, err)
        text = self.text("table_vae_sigma.md")
        self.assertIn("| lr = 1000000.0 | diverged | diverged |", text)
        self.assertRegex(text, r"\| lr = 0.001 \| -\d+\.\d\d \|")

    def test_the_list(self):
        status, out, _ = self.call()
        self.assertEqual(status, 0)
        for name, experiment in reproduce.EXPERIMENTS.items():
            self.assertIn(f"{name}: {experiment.question}\n    0 of ", out)
            for command in experiment.commands:
                self.assertIn(f"    python {command}\n", out)
        self.assertFalse(self.results.exists())


class Remedies(Reproduced):
    def test_rows(self):
        """Each row agrees with its results. The objective is the plain one for all remedies."""
        models = [
            reproduce.RemediedModel("MNIST_CVAE_Relu.py --beta 1.0,2.0", "--start_std", 8),
            reproduce.RemediedModel(
                "MNIST_HVAE_Relu.py --beta_1 0.25 --d_hidden 8", "--start_std", 8),
        ]
        with experiments_with(table_remedies=reproduce.remedy_commands(models)), \
                mock.patch("pictures.draw_grid"):
            status, _, err = self.call("table_remedies", "--seed", "1,2")
        self.assertEqual(status, 0, err)

        rows = self.rows_of_remedies()
        # A header, the line below it, and three settings with five remedies each.
        self.assertEqual(len(rows), 2 + 3 * 5)
        results = self.saved_results("*/*/result.json")
        free_bits = rows["MNIST_HVAE_Relu", "beta_1 = 0.25, beta_2 = 1.0", "free bits"]
        self.check_free_bits(free_bits, results)
        warm_up = rows["MNIST_CVAE_Relu", "beta = 2.0", "warm-up"]
        self.check_warm_up(warm_up, results)

        text = self.text("table_remedies.md")
        cases = [int(number) for number in re.findall(r" nats in \d+ of (\d+) cases", text)]
        # Three settings, two seeds, four remedies.
        self.assertEqual(sum(cases), 3 * 2 * 4)
        self.assertIn("Collapse: of 30 levels ", text)

    def rows_of_remedies(self):
        """The rows of the table in Markdown: {(script, setting, remedy): the other cells}."""
        rows = {}
        for line in self.text("table_remedies.md").splitlines():
            if line.startswith("|"):
                cells = [cell.strip() for cell in line.strip("|").split("|")]
                rows[tuple(cells[:3])] = cells[3:]
        return rows

    def check_free_bits(self, row, results):
        """The plain objective of the test images: reconstruction + 0.25 kl_1 + 1 kl_2."""
        objectives = []
        for result in results:
            settings = result["settings"]
            if settings.get("beta_1") == 0.25 and settings["free_bits"] == 0.1:
                metrics = result["metrics"]
                kls = 0.25 * metrics["kl_1"] + metrics["kl_2"]
                objectives.append(metrics["reconstruction"] + kls)
        self.assertEqual(len(objectives), 2)
        self.assertEqual(row[1], self.mean_and_deviation(objectives))

    def check_warm_up(self, row, results):
        """The plain objective of the training images at the whole beta, and the headroom."""
        objectives = []
        headrooms = []
        for result in results:
            settings = result["settings"]
            if settings.get("beta") == 2 and settings["beta_warmup"]:
                # A quarter of --num_epochs 1.
                self.assertEqual(settings["beta_warmup"], 0.25)
                curves = result["curves"]
                objectives.append(curves["reconstruction"][-1] + 2 * curves["kl"][-1])
                headrooms.append(result["metrics"]["headroom"])
        self.assertEqual(len(objectives), 2)
        self.assertEqual(row[0], self.mean_and_deviation(objectives))
        self.assertEqual(row[4], self.mean_and_deviation(headrooms))

    def mean_and_deviation(self, values):
        return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


class Refused(Reproduced):
    """What is refused in one line, before anything is trained."""

    def check_refused(self, argv, message):
        status, out, err = self.call(*argv)
        self.assertEqual((status, out), (2, ""))
        self.assertIn(message, err)
        self.assertEqual(err.count("\n"), 1, err)
        if self.runs.exists():
            self.assertEqual(list(self.runs.iterdir()), [])

    def test_no_such_experiment(self):
        self.check_refused(
            ["table_nothing"],
            "'table_nothing': no such table or figure, wants some of figure_cvae_beta, ",
        )

    def test_no_such_flag(self):
        self.check_refused(["table_cvae", "--out_dirr", "x"], "--out_dirr: no such flag")

    def test_a_list_of_another_flag(self):
        self.check_refused(["table_cvae", "--all", "true,false"], "only --seed may be a list")

    def test_results_dir_is_a_file(self):
        self.results.write_text("a file", encoding="utf-8")
        self.check_refused(["table_cvae"], f"--results_dir: got {str(self.results)!r}, wants ")
        self.assertEqual(self.text(""), "a file")

    def test_results_dir_is_in_a_file(self):
        file = self.results
        file.write_text("a file", encoding="utf-8")
        self.results = file / "results"
        self.check_refused(["table_cvae"], f"--results_dir: got {str(self.results)!r}, wants ")


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
        with experiments_with(table_theorems=self.COMMANDS):
            status, _, err = self.call("table_theorems")
            self.assertEqual(status, 0, err)
            results = self.saved_without_seconds()
            self.assertEqual(len(results), 2)

            for content in ("null", "[]", "{}", "not json"):
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
        """A broken .csv tells nothing about the time, and a broken .md is left out of the page."""
        self.results.mkdir()
        (self.results / "table_cvae.csv").write_bytes(b"command,device,seconds\n\xff")
        (self.results / "table_hvae.csv").write_text("command\nx.py\n", encoding="utf-8")
        (self.results / "table_cvae.md").write_text("half of it", encoding="utf-8")
        with experiments_with(table_theorems=self.COMMANDS[:1]):
            status, _, err = self.call("table_theorems")
        self.assertEqual(status, 0, err)
        self.assertEqual(err.count("table_cvae.md is not whole"), 1)
        page = self.text("README.md")
        self.assertIn("## table_theorems", page)
        self.assertNotIn("half of it", page)


class Dealt(small.InFolder):
    """Several processes share the commands."""

    def rows(self, name):
        """The rows of the table in a folder of results, without the times."""
        with open(self.folder / name / "table_vae_sigma.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            del row["seconds"]
        return rows

    def argv(self, name):
        """Arguments for results in a folder of this name, and runs of its own."""
        return [
            "table_vae_sigma",
            "--data_dir", self.folder / "data",
            "--out_dir", self.folder / f"{name}_runs",
            "--results_dir", self.folder / name,
            "--device", "cpu",
            "--num_epochs", 2,
        ]

    def start(self):
        """Start reproduce.py in one process. Its messages are added to the file "err"."""
        process = small.start_command(
            "reproduce.py", self.argv("killed"), self.folder, self.folder / "out", self.err)
        self.addCleanup(process.kill)
        return process

    def messages(self):
        return self.err.read_text(encoding="utf-8") if self.err.exists() else ""

    def test_over_two_processes_and_after_a_kill(self):
        """Two processes, and one that is killed and started again, get the same numbers."""
        small.write_mnist(self.folder / "data")
        self.err = self.folder / "err"
        self.check_two_processes()
        self.check_killed()
        self.assertEqual(len(self.rows("two")), 4)
        self.assertEqual(self.rows("killed"), self.rows("two"))

    def check_two_processes(self):
        """Each command is made by one of the two. Process 0 prints and writes everything."""
        both, outs, errs = small.two_processes(
            self, "reproduce.py", self.argv("two"), self.folder, "two")
        statuses = small.exit_statuses(both, seconds=300)
        first, second = [err.read_text(encoding="utf-8") for err in errs]
        self.assertEqual(statuses, [0, 0], first + second)

        trainings = [err.count("training: epoch 2/2") for err in (first, second)]
        self.assertEqual(trainings, [2, 2])
        self.assertIn("process 1: command 2 of 2, ", second)
        self.assertIn("command 4 of 4, ", first)
        tables = [
            out.read_text(encoding="utf-8").count("nats per test example") for out in outs
        ]
        self.assertEqual(tables, [4, 0])

    def check_killed(self):
        # 1. It is killed in the third of four commands.
        process = self.start()
        deadline = time.monotonic() + 300
        while "command 3 of 4" not in self.messages():
            self.assertLess(time.monotonic(), deadline, self.messages())
            time.sleep(0.01)
        process.kill()
        process.join()
        self.assertFalse((self.folder / "killed").exists())

        # 2. Started again, it trains the other two.
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


class Commands(unittest.TestCase):
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


def run_with(command, *metrics):
    """A run of this command with made-up results that have these metrics, None for diverged."""
    run = reproduce.Run(command, reproduce.Flags(out_dir=tempfile.gettempdir()), [0])
    run.results = [result_with(metrics_of_result) for metrics_of_result in metrics]
    return run


class Sentences(unittest.TestCase):
    """The sentences under a table, from made-up results."""

    def directions(self, command, *metrics):
        return list(reproduce.directions([run_with(command, *metrics)]))

    def test_directions(self):
        command = "MNIST_CVAE_Relu.py --beta 0.5,1,2,4"
        # It falls, then grows by less than is printed, then by more.
        self.assertEqual(
            self.directions(command, {"kl": 4.0}, {"kl": 3.0}, {"kl": 3.004}, {"kl": 3.2}),
            [f"Direction: along beta, kl falls or stays in 2 of 3 steps (`{command}`)."],
        )
        # There is no step to or from a setting that diverged.
        self.assertEqual(
            self.directions(command, {"kl": 4.0}, None, {"kl": 5.0}, {"kl": 1.0}),
            [f"Direction: along beta, kl falls or stays in 1 of 1 steps (`{command}`)."],
        )
        # The paper says nothing about this flag.
        command = "MNIST_CVAE_Relu.py --d_hidden 8,16"
        self.assertEqual(self.directions(command, {"kl": 4.0}, {"kl": 3.0}), [])

    def test_directions_in_a_grid(self):
        command = "MNIST_HVAE_Relu.py --beta_1 1,2,4 --beta_2 1,2"
        # A row for each beta_1, a column for each beta_2.
        kl_2 = [
            5.0, 3.0,
            6.0, 7.0,
            4.0, 8.0,
        ]
        self.assertEqual(self.directions(command, *({"kl_2": kl} for kl in kl_2)), [
            f"Direction: along beta_1, kl_2 rises or stays in 3 of 4 steps (`{command}`).",
            f"Direction: along beta_2, kl_2 falls or stays in 1 of 3 steps (`{command}`).",
        ])

    def test_levels_in_use(self):
        """A unit counts by its mean over the test images. A level without any is collapsed."""
        ladder = run_with("MNIST_HVAE_Ladder.py", {"kl": 3.0})
        ladder.units = lambda i: {
            "log_px": np.zeros(2),
            "unit_kl_1": np.array([[0.0, 0.018, 3.0], [0.018, 0.004, 3.0]]),
            "unit_kl_2": np.array([[0.0, 0.0], [0.0, 0.01]]),
        }
        dct = run_with("MNIST_HVAE_DCT.py", {"kl": 2.1})
        dct.units = lambda i: {
            "unit_kl_1": np.array([[2.0, 0.001]]),
            "unit_kl_2": np.array([[0.1]]),
        }
        diverged = run_with("MNIST_HVAE_DVP.py", None)
        self.assertEqual(list(reproduce.levels_in_use([ladder, dct, diverged])), [
            "MNIST_HVAE_Ladder: 2 of 5 units carry more than 0.01 nats; of 2 levels collapsed: 2.",
            "MNIST_HVAE_DCT: 2 of 3 units carry more than 0.01 nats; each of 2 levels has some.",
        ])

    def test_comparisons_with_the_first(self):
        """The differences of the terms add up to that of the ELBO.

        The first model has no context, the last one has. There are two seeds, and seeds and a model
        that diverged.
        """
        ladder = run_with(
            "MNIST_HVAE_Ladder.py",
            {
                "log_px": -90.0, "elbo": -95.0, "reconstruction": 60.0,
                "kl_1": 25.0, "kl_2": 10.0, "kl": 35.0,
            },
            {
                "log_px": -92.0, "elbo": -97.0, "reconstruction": 62.0,
                "kl_1": 25.0, "kl_2": 10.0, "kl": 35.0,
            },
        )
        dct_metrics = {
            "log_px": -92.0, "elbo": -97.5, "reconstruction": 58.0,
            "kl_1": 20.0, "kl_2": 4.0, "kl_3": 15.5, "context_baseline": 20.0, "kl": 39.5,
        }
        dct = run_with("MNIST_HVAE_DCT.py", dct_metrics, None, dct_metrics)
        diverged = run_with("MNIST_HVAE_DVP.py", None)
        self.assertEqual(list(reproduce.comparisons_with_the_first([ladder, diverged, dct])), [
            "MNIST_HVAE_DCT beside MNIST_HVAE_Ladder: log p(x) -1.00 nats, ELBO -1.50 nats, "
            "of which reconstruction +3.00, learned latents +11.00, context -15.50."
        ])

    def test_causes_of_collapse(self):
        run = run_with("MNIST_CVAE_Relu.py --beta 0.5,1,2,4", *[{}] * 5)
        # Of each level the number of collapsed units and the headroom. The last has no headroom.
        levels = [(0, 0.0), (3, 0.0099), (16, 0.5), (2, 0.02)]
        for result, (collapsed, nats) in zip(run.results, levels):
            level = headroom.LevelHeadroom(
                units=16, collapsed=collapsed, headroom=nats, level=None, tau=[], theta=[])
            result.headroom = {"z": level}
        self.assertEqual(list(reproduce.causes_of_collapse([run])), [
            "Collapse: of 4 levels 3 have collapsed units: 1 by the objective, 2 by training, "
            "whose headroom is 0.02 to 0.5 nats."
        ])
        without_headroom = run_with("MNIST_CVAE_Relu.py", {})
        self.assertEqual(list(reproduce.causes_of_collapse([without_headroom])), [])

    def test_distances_of_misplaced_units(self):
        """Units that are active where a collapse is predicted, or the other way round.

        The distance is from beta to the unit's threshold.
        """
        result = result_with({})
        result.settings = {"beta": 2.0}
        result.theory = verify.Comparison(
            predicted={"information": [0.5, 0.004, 0.0, 0.0], "collapse": [9.0, 2.02, 1.9, 1.0]},
            trained={"information": [0.4, 0.003, 0.02, 0.0]},
            errors={},
            optimal_loss=0,
            loss=0,
            gap=0,
        )
        distances = reproduce.distances_of_misplaced_units(result)
        self.assertEqual([round(distance, 9) for distance in distances], [0.01, 0.05])


if __name__ == "__main__":
    unittest.main()
