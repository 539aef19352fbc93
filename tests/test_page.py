"""page.py: the tables, the comparison with the released code, and the page, from made-up rows."""
import math
import re
import unittest
from pathlib import Path

import answers
import measurements
import page
from tests import small
from tests.small import ROOT
from tests.test_answers import remedy_commands
from tests.test_measurements import command_with, deep_model, predicted_sweep, sweep


def cells(table):
    """A Markdown table as rows of cells, its head first."""
    lines = table.splitlines()
    rows = []
    for line in [lines[0], *lines[2:]]:
        rows.append([text.strip() for text in line.strip("|").split("|")])
    return rows


def by_first_cell(table):
    """A Markdown table as {first cell of a row: {head of a column: cell}}."""
    head, *rows = cells(table)
    return {row[0]: dict(zip(head, row)) for row in rows}


def anchors_and_links(text):
    """The anchors of the headings of a Markdown text, and the targets of its links and pictures."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return [page.anchor(heading) for heading in headings], re.findall(r"\]\(([^)]+)\)", text)


class MarkdownTable(unittest.TestCase):
    def test_lines(self):
        self.assertEqual(
            page.markdown_table([["a", "b"], ["1", "2"], ["3", "4"]]),
            "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |",
        )


class SettingTables(unittest.TestCase):
    def tables(self, *commands):
        """The tables among the paragraphs of some commands."""
        paragraphs = page.setting_tables(list(commands))
        return [paragraph for paragraph in paragraphs if paragraph.startswith("|")]

    def test_settings_and_seeds(self):
        """Columns of COLUMNS that the rows have, in that order. Seeds become mean ± deviation."""
        rows = []
        for beta, seed, kl, active in (
            (1.0, 1, 4.0, 3), (1.0, 2, 6.0, 3), (2.0, 1, 0.5, 0), (2.0, 2, 0.5, 1),
        ):
            rows.append({
                "beta": beta, "seed": seed, "reconstruction": 1.0, "AU_kl": active, "AU": 9,
                "headroom": 0.0625, "kl": kl, "elbo": -2.0,
            })
        [table] = self.tables(command_with("x.py", {"beta": [1.0, 2.0]}, rows))
        self.assertEqual(cells(table), [
            ["setting", "elbo", "kl", "active", "headroom"],
            ["beta = 1.0", "-2.00", "5.00 ± 1.41", "3", "0.062"],
            ["beta = 2.0", "-2.00", "0.50", "0.5 ± 0.7", "0.062"],
        ])

    def test_released_objective_is_folded(self):
        exact = sweep("kl", [1.25], "x.py")
        released = sweep("kl", [7.75], "x.py --released_objective")
        paragraphs = page.setting_tables([exact, released])
        beginning = next(k for k, text in enumerate(paragraphs) if text.startswith("<details>"))
        self.assertEqual(paragraphs[-1], "</details>")
        outside, inside = "".join(paragraphs[:beginning]), "".join(paragraphs[beginning:-1])
        self.assertIn("1.25", outside)
        self.assertNotIn("7.75", outside)
        self.assertIn("7.75", inside)
        self.assertNotIn("1.25", inside)
        self.assertNotIn("<details>", "".join(page.setting_tables([exact])))

    def test_many_settings(self):
        """Up to MOST_SETTINGS all are shown, beyond it every second one."""
        self.assertEqual(page.MOST_SETTINGS, 15)
        paragraphs = page.setting_tables([sweep("kl", [1.0] * 15)])
        self.assertEqual(len(paragraphs), 1)
        self.assertEqual(len(cells(paragraphs[0])), 16)

        table, sentence = page.setting_tables([sweep("kl", [1.0] * 16)])
        labels = [row[0] for row in cells(table)[1:]]
        self.assertEqual(labels, [f"beta = {k}.0" for k in range(1, 16, 2)])
        self.assertIn("some of the settings", sentence)

    def test_a_shared_setting_has_a_row_in_each_sweep(self):
        both = {"beta": 1.0, "eta_dec": 1.0, "elbo": -1.0}
        by_beta = command_with(
            "x.py --beta 1,2", {"beta": [1.0, 2.0]}, [both, {**both, "beta": 2.0}]
        )
        by_eta = command_with(
            "x.py --eta_dec 1,2", {"eta_dec": [1.0, 2.0]}, [both, {**both, "eta_dec": 2.0}]
        )
        [table] = self.tables(by_beta, by_eta)
        self.assertEqual(
            [row[0] for row in cells(table)[1:]],
            ["beta = 1.0", "beta = 2.0", "eta_dec = 1.0", "eta_dec = 2.0"],
        )

    def test_scripts_with_equal_numbers(self):
        """Equal numbers of two scripts are two results."""
        rows = [{"beta": 1.0, "elbo": -1.0}]
        [table] = self.tables(command_with("x.py", {}, rows), command_with("y.py", {}, rows))
        self.assertEqual(cells(table), [["script", "elbo"], ["x", "-1.00"], ["y", "-1.00"]])

    def test_rows_of_one_script_have_different_labels(self):
        """Two commands without varying flags, which differ in beta."""
        commands = []
        for beta in (1.0, 4.0):
            for script in ("x.py", "y.py"):
                rows = [{"beta": beta, "elbo": -beta}]
                commands.append(command_with(f"{script} --beta {beta}", {}, rows))
        [table] = self.tables(*commands)
        labels = [row[0] for row in cells(table)[1:]]
        self.assertEqual(len(set(labels)), 4, labels)

    def test_linear_models(self):
        """The active units stand beside the predicted ones, so the columns AU are left out."""
        rows = []
        for seed, pair, gap, verdict in (
            (1, "47 -> 47", 0.004, "as predicted"), (2, "47 -> 48", 0.0061, "a value is off"),
        ):
            rows.append({
                "seed": seed, "elbo": -1.0, "AU_kl": 47, "linear AU": 47, "gap": gap,
                "active predicted -> trained": pair, "verdict": verdict,
            })
        [table] = self.tables(command_with("MNIST_CVAE_Linear.py", {}, rows))
        self.assertEqual(cells(table), [
            ["setting", "elbo", "active predicted -> trained", "gap", "verdict"],
            [
                "MNIST_CVAE_Linear", "-1.00", "47 -> 47 / 47 -> 48", "6e-03",
                "differs in 1 of 2 seeds",
            ],
        ])

    def test_checks_of_theorems_have_a_table_of_their_own(self):
        check = command_with("matrix_VAE.py", {}, [
            {"seed": 1, "max error": 3e-9, "gap": 0.0, "verdict": "VERIFIED"},
            {"seed": 2, "max error": 2e-8, "gap": 0.0, "verdict": "VERIFIED"},
        ])
        trained = command_with(
            "MNIST_CVAE_Linear.py", {}, [{"elbo": -1.0, "verdict": "as predicted"}]
        )
        first, second = self.tables(trained, check)
        self.assertEqual(by_first_cell(first)["matrix_VAE"]["max error"], "2e-08")
        self.assertEqual(by_first_cell(first)["matrix_VAE"]["verdict"], "VERIFIED")
        self.assertEqual(by_first_cell(second)["MNIST_CVAE_Linear"]["verdict"], "as predicted")

    def test_headroom_and_causes(self):
        """Headrooms and rho have three decimals. The causes of the seeds stand side by side."""
        rows = []
        for seed, cause in ((1, "objective"), (2, "encoder"), (3, "objective")):
            rows.append({
                "seed": seed, "elbo": -1.0, "headroom": 0.0004, "headroom_any": 0.0625,
                "rho": 1.0131, "rho_any": 1.4424, "cause": cause,
            })
        hvae = {
            "elbo": -1.0, "headroom_2": 0.5, "headroom_any_2": 0.6, "cause_2": "training",
        }
        [table] = self.tables(command_with("x.py", {}, rows), command_with("y.py", {}, [hvae]))
        head, first, second = cells(table)
        self.assertEqual(head, [
            "script", "elbo", "headroom", "headroom, any encoder", "headroom_2",
            "headroom_2, any encoder", "ρ1", "ρ1, any encoder", "cause", "cause_2",
        ])
        self.assertEqual(first[2:], [
            "0.000", "0.062", "-", "-", "1.013", "1.442", "objective / encoder", "-",
        ])
        self.assertEqual(second[2:], ["-", "-", "0.500", "0.600", "-", "-", "-", "training"])

    def test_levels(self):
        """Each level has its mean over the seeds."""
        rows = []
        for kls, active, nats, causes in (
            ("27.91, 0.00", "49, 3", "0.0625", "none"),
            ("28.91, 0.00", "49, 4", "0.0625", "training"),
        ):
            rows.append({
                "elbo": -1.0, "kl from the top": kls, "AU_kl from the top": active,
                # A cell with a single number was read as one.
                "headroom from the top": float(nats), "headroom_any from the top": float(nats),
                "cause from the top": causes,
            })
        [table] = self.tables(command_with("x.py", {}, rows))
        head, row = cells(table)
        self.assertEqual(head[2:], [
            "kl from the top", "active from the top", "headroom from the top",
            "headroom from the top, any encoder", "cause from the top",
        ])
        self.assertEqual(row[2:], [
            "28.41 ± 0.71, 0.00", "49, 3.5 ± 0.7", "0.062", "0.062", "none / training",
        ])

    def test_settings_with_fewer_seeds(self):
        """They say how many they have. Seeds that diverged are counted as such."""
        rows = []
        for beta, seed, kl in ((1.0, 1, 4.0), (1.0, 2, 6.0), (1.0, 3, 5.0), (2.0, 1, 0.5)):
            rows.append({"beta": beta, "seed": seed, "elbo": -2.0, "kl": kl})
        many = command_with("x.py", {"beta": [1.0, 2.0]}, rows)
        two = [{"seed": 1, "elbo": -2.0, "kl": 3.0}, {"seed": 2, "elbo": -2.0, "kl": 5.0}]
        diverged = [*two, {"seed": 3}]
        [table] = self.tables(
            many, command_with("y.py", {}, two), command_with("z.py", {}, diverged)
        )
        self.assertEqual({row[0]: row[2] for row in cells(table)[1:]}, {
            "x, beta = 1.0": "5.00 ± 1.00",
            "x, beta = 2.0 (1 seed)": "0.50",
            "y (2 seeds)": "4.00 ± 1.41",
            "z (2 of 3 seeds, the others diverged)": "4.00 ± 1.41",
        })

    def test_rise_at_the_end(self):
        """It stands beside the ELBO."""
        row = {"elbo": -2.0, measurements.RISE_AT_THE_END: 0.125, "kl": 1.0}
        [table] = self.tables(command_with("x.py", {}, [row]))
        head, values = cells(table)
        self.assertIn("rise of the test ELBO in the last ten epochs", head[2])
        self.assertEqual(values[1:], ["-2.00", "0.12", "1.00"])

    def test_a_value_that_a_row_lacks(self):
        learnable = command_with("x.py", {}, [{"elbo": -1.0, "headroom": 0.5}])
        fixed = command_with("y.py", {}, [{"elbo": -2.0}])
        [table] = self.tables(learnable, fixed)
        self.assertEqual(cells(table)[1:], [["x", "-1.00", "0.500"], ["y", "-2.00", "-"]])

    def test_a_setting_that_diverged(self):
        """It has a row that says so."""
        [table] = self.tables(sweep("kl", [4.0, None]))
        rows = by_first_cell(table)
        self.assertEqual(rows["beta = 1.0"]["kl"], "4.00")
        self.assertIn("diverged", rows["beta = 2.0"].values())

    def test_a_command_that_diverged(self):
        """None of its settings has results."""
        tables = self.tables(sweep("kl", [4.0], "x.py"), sweep("kl", [None], "y.py"))
        self.assertIn("4.00", "".join(tables))


class BetaTables(unittest.TestCase):
    def test_rows_are_beta_1(self):
        rows = []
        for beta_1, beta_2, seed, kl_2, active in (
            (1.0, 1.0, 1, 3.0, 4), (1.0, 1.0, 2, 5.0, 4), (1.0, 2.0, 1, 0.0, 0),
            (4.0, 1.0, 1, 9.5, 16),
        ):
            rows.append({
                "beta_1": beta_1, "beta_2": beta_2, "seed": seed, "elbo": 0.0, "kl_2": kl_2,
                "AU_kl_2": active,
            })
        # The setting with beta_1 = 4 and beta_2 = 2 diverged.
        rows.append({"beta_1": 4.0, "beta_2": 2.0})
        command = command_with("x.py", {"beta_1": [1.0, 4.0], "beta_2": [1.0, 2.0]}, rows)
        caption, table = page.beta_tables([command])
        self.assertIn("KL of z2", caption)
        head, *rows = cells(table)
        self.assertEqual(head[1:], ["1.0", "2.0"])
        self.assertEqual(rows, [
            ["**1.0**", "4.00 ± 1.41 (4)", "0.00 (0)"], ["**4.0**", "9.50 (16)", "-"],
        ])


class RemedyTables(unittest.TestCase):
    def test_objectives_and_units(self):
        """Seeds differ by 1 nat and by one unit, so each deviation is 1/√2."""
        commands = remedy_commands([9.0, 7.0, 8.0, 9.0, 20.0])
        # The second seed with free bits diverged.
        commands[4].rows[1].pop("elbo")
        objectives, units = [
            cells(text) for text in page.remedy_tables(commands) if text.startswith("|")
        ]
        head = ["script", "setting"]
        names = ["none", "start", "warm-up", "cycles", "free bits"]
        self.assertEqual(objectives[0][:2] + objectives[0][3:], head + names)
        self.assertEqual(objectives[1], [
            "MNIST_CVAE_Relu", "beta = 2.0", "0.500", "9.50 ± 0.71", "7.50 ± 0.71", "8.50 ± 0.71",
            "9.50 ± 0.71", "20.00",
        ])
        self.assertEqual(units[0], head + names)
        self.assertEqual(units[1], [
            "MNIST_CVAE_Relu", "beta = 2.0", "1.5 ± 0.7", "2.5 ± 0.7", "3.5 ± 0.7", "4.5 ± 0.7",
            "5",
        ])

    def test_a_hierarchical_model(self):
        """Its units are those of z2. Without a run to compare, there is no headroom."""
        commands = remedy_commands([9.0] * 5)
        for command in commands:
            for row in command.rows:
                row["headroom_2"], row["AU_kl_2"] = row.pop("headroom"), row.pop("AU_kl")
        commands[0].rows = [{"seed": 1, "beta": 2.0}]
        objectives, units = [
            cells(text) for text in page.remedy_tables(commands) if text.startswith("|")
        ]
        self.assertEqual(objectives[1][2:5], ["-", "-", "9.50 ± 0.71"])
        self.assertEqual(units[1][2:4], ["-", "2.5 ± 0.7"])


class PredictionTables(unittest.TestCase):
    def test_scripts(self):
        """Both objectives count together: six settings, of which two have equal ranks."""
        exact = predicted_sweep([(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)], line="x.py")
        released = predicted_sweep(
            [(4.0, 4.0), (5.0, 5.0), (6.0, 6.0)], line="x.py --released_objective"
        )
        few = predicted_sweep([(1.0, 1.0)], line="y.py")
        backwards = predicted_sweep([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)], "kl_2", "z.py")
        [table] = page.prediction_tables([exact, few, released, backwards])
        self.assertEqual(cells(table)[1:], [["x", "6", "1.00"], ["z", "3", "z2 -1.00"]])


class DeepTables(unittest.TestCase):
    def model(self, script, rows):
        """A command with a row per seed, from lists (log_px, reconstruction, KLs from the top)."""
        measured = []
        for seed, (log_px, reconstruction, kls) in enumerate(rows, 1):
            total = sum(measurements.values_of_levels(kls))
            row = {
                "seed": seed, "log_px": log_px, "reconstruction": reconstruction, "kl": total,
                "elbo": -reconstruction - total, "kl from the top": kls,
                "AU_kl from the top": "1, 1, 1",
            }
            if script != "MNIST_HVAE_Ladder.py":
                row["context_baseline"] = 50.0
            measured.append(row)
        return command_with(script, {}, measured)

    def differences(self, *commands):
        table = page.deep_tables(list(commands))[-1]
        return by_first_cell(table)

    def test_terms_add_up(self):
        ladder = self.model("MNIST_HVAE_Ladder.py", [(-90.0, 60.0, "10, 15, 5")])
        dct = self.model("MNIST_HVAE_DCT.py", [(-92.0, 58.0, "20, 12.5, 7.75")])
        rows = self.differences(ladder, dct)
        self.assertEqual(list(rows), ["MNIST_HVAE_DCT"])
        row = rows["MNIST_HVAE_DCT"]
        # log p(x): -92 + 90. ELBO: -98.25 + 90. Reconstruction: 60 - 58. Learned: 30 - 20.25.
        self.assertEqual(
            (row["log_px"], row["elbo"], row["reconstruction"], row["learned latents"],
             row["context"]),
            ("-2.00", "-8.25", "+2.00", "+9.75", "-20.00"),
        )

    def test_seeds(self):
        """Seed by seed log p(x) differs by -2 and -6, and the learned levels by 24 and 21."""
        ladder = self.model(
            "MNIST_HVAE_Ladder.py", [(-90.0, 60.0, "10, 15, 5"), (-88.0, 60.0, "10, 16, 5")]
        )
        dct = self.model(
            "MNIST_HVAE_DCT.py", [(-92.0, 58.0, "10, 4, 2"), (-94.0, 58.0, "14, 8, 2")]
        )
        row = self.differences(ladder, dct)["MNIST_HVAE_DCT"]
        self.assertEqual(
            (row["log_px"], row["reconstruction"], row["learned latents"], row["context"]),
            ("-4.00 ± 2.83", "+2.00", "+22.50 ± 2.12", "-12.00 ± 2.83"),
        )
        *_, caption, _ = page.deep_tables([ladder, dct])
        self.assertIn("seed by seed", caption)

    def test_a_model_with_fewer_seeds(self):
        """Only the seed that both have is compared, and the row says so."""
        ladder = self.model(
            "MNIST_HVAE_Ladder.py", [(-90.0, 60.0, "10, 15, 5"), (-70.0, 50.0, "10, 15, 5")]
        )
        dct = self.model("MNIST_HVAE_DCT.py", [(-92.0, 58.0, "20, 12.5, 7.75")])
        dvp = self.model(
            "MNIST_HVAE_DVP.py", [(-91.0, 59.0, "10, 15, 5"), (-71.0, 49.0, "10, 15, 5")]
        )
        rows = self.differences(ladder, dct, dvp)
        self.assertEqual(list(rows), ["MNIST_HVAE_DCT (only seed 1)", "MNIST_HVAE_DVP"])
        self.assertEqual(rows["MNIST_HVAE_DCT (only seed 1)"]["log_px"], "-2.00")
        settings = page.deep_tables([ladder, dct, dvp])[0]
        self.assertIn("MNIST_HVAE_DCT (1 seed)", by_first_cell(settings))

    def test_no_seed_in_common(self):
        ladder = deep_model("MNIST_HVAE_Ladder.py", {1: (20.0, None, 4.0)}, context=False)
        dct = deep_model("MNIST_HVAE_DCT.py", {2: (20.0, 5.0, 4.0)})
        [(name, row)] = self.differences(ladder, dct).items()
        self.assertIn("no seed in common", name)
        self.assertEqual(set(list(row.values())[1:]), {"-"})

    def test_one_seed(self):
        """The caption does not speak of deviations that are not there."""
        ladder = deep_model("MNIST_HVAE_Ladder.py", {1: (20.0, None, 4.0)}, context=False)
        dct = deep_model("MNIST_HVAE_DCT.py", {1: (20.0, 5.0, 4.0)})
        *_, caption, _ = page.deep_tables([ladder, dct])
        self.assertNotIn("seed", caption)

    def test_models_that_diverged(self):
        ladder = self.model("MNIST_HVAE_Ladder.py", [(-90.0, 60.0, "10, 15, 5")])
        diverged = command_with("MNIST_HVAE_DVP.py", {}, [{"seed": 1}])
        dct = self.model("MNIST_HVAE_DCT.py", [(-92.0, 58.0, "20, 12, 8")])
        self.assertEqual(list(self.differences(ladder, diverged, dct)), ["MNIST_HVAE_DCT"])


class RepeatedTables(unittest.TestCase):
    """Sweeps on Fashion-MNIST beside the same ones on MNIST."""

    REPEATED = (
        page.RepeatedSweep("x.py --beta 1:3 --num_epochs 30", "x.py --beta 1:3", "table_x"),
        page.RepeatedSweep("linear.py --dataset fashion", "linear.py", "figure_linear"),
        page.RepeatedSweep("z.py --dataset fashion", "z.py", "table_z"),
    )

    def sweep(self, line, kls, dataset, epochs, cause="objective"):
        """Three betas with these KLs, predicted to fall from 9 over 5 to 1. Units collapsed."""
        command = predicted_sweep(list(zip((9.0, 5.0, 1.0), kls)), line=line)
        for row in command.rows:
            row |= {
                "dataset": dataset, "num_epochs": epochs, "dim_z": 4, "AU_kl": 3, "headroom": 0.0,
                "headroom_any": 0.0, "cause": cause,
            }
        return command

    def linear(self, line, verdicts, dataset):
        """A linear model with a verdict for each seed."""
        rows = []
        for seed, verdict in enumerate(verdicts, 1):
            rows.append({
                "seed": seed, "elbo": 0.0, "dataset": dataset, "num_epochs": 50, "gap": 0.1,
                "verdict": verdict,
            })
        return command_with(line, {}, rows)

    def rows(self, commands, others):
        table, caption = page.repeated_tables(commands, self.REPEATED, others)
        self.assertIn("(#summary)", caption)
        head, *rows = cells(table)
        self.assertEqual(head, [
            "script and flag", "steps, fashion", "steps, mnist", "rank correlation, fashion",
            "rank correlation, mnist", "levels collapsed, fashion", "levels collapsed, mnist",
            "as predicted, fashion", "as predicted, mnist", "result on mnist",
        ])
        return rows

    def test_beside_the_originals(self):
        fashion = [
            # Spearman's correlation is 1 - 6 * 2 / 24.
            self.sweep("x.py --beta 1:3 --num_epochs 30", (8.0, 1.0, 6.0), "fashion", 30),
            self.linear("linear.py --dataset fashion", ["as predicted", "off"], "fashion"),
        ]
        mnist = {
            "table_x": [
                # Another sweep of the script, and the released objective, which do not count.
                self.sweep("x.py --beta 7", (1.0, 2.0, 3.0), "mnist", 100),
                self.sweep("x.py --beta 1:3 --released_objective", (1.0, 2.0, 3.0), "mnist", 100),
                self.sweep("x.py --beta 1:3", (8.0, 6.0, 1.0), "mnist", 100, cause="training"),
            ],
            "figure_linear": [self.linear("linear.py", ["as predicted"] * 3, "mnist")],
        }
        self.assertEqual(self.rows(fashion, mnist), [
            [
                "x, beta, 30 epochs", "1 of 2", "2 of 2", "0.50", "1.00", "3 / 0 of 3",
                "0 / 3 of 3", "-", "-", "[table_x](#table_x), 1 seed, 100 epochs",
            ],
            [
                "linear, 50 epochs", "-", "-", "-", "-", "-", "-", "1 of 2", "3 of 3",
                "[figure_linear](#figure_linear), 3 seeds, 50 epochs",
            ],
        ])

    def test_without_the_originals(self):
        """The result is not on the page, or it lacks the command. A command without rows."""
        fashion = [
            self.sweep("x.py --beta 1:3 --num_epochs 30", (8.0, 6.0, 1.0), "fashion", 30),
            command_with("linear.py --dataset fashion", {}, []),
            self.linear("z.py --dataset fashion", ["as predicted"], "fashion"),
        ]
        empty = command_with("x.py --beta 1:3", {"beta": [1.0]}, [])
        other_line = self.linear("w.py", ["off"], "mnist")
        for others in ({}, {"table_x": [empty], "table_z": [other_line]}):
            first, second = self.rows(fashion, others)
            self.assertEqual(first[2::2], ["-"] * 4)
            self.assertEqual(first[-1], "-")
            self.assertEqual(second[-3:], ["1 of 1", "-", "-"])

    def test_two_levels(self):
        rows = []
        for beta_2, kl_2 in ((1.0, 9.0), (2.0, 5.0), (3.0, 1.0)):
            rows.append({
                "beta_2": beta_2, "elbo": 0.0, "kl_1": beta_2, "kl_2": kl_2, "linear kl_1": beta_2,
                "linear kl_2": beta_2, "dataset": "fashion", "num_epochs": 30,
            })
        command = command_with(self.REPEATED[0].line, {"beta_2": [1.0, 2.0, 3.0]}, rows)
        [row] = self.rows([command], {})
        self.assertEqual(row[0], "x, beta_2, 30 epochs")
        self.assertEqual((row[1], row[3]), ("2 of 2", "z1 1.00, z2 -1.00"))


class CauseTables(unittest.TestCase):
    def rows(self, *commands):
        """The rows of the table, without its head."""
        table, caption = page.cause_tables(list(commands))
        head, *rows = cells(table)
        self.assertEqual(head, [
            "model", "active from the top", "headroom from the top", "headroom, any encoder", "ρ1",
            "ρ1, any encoder", "cause",
        ])
        self.assertEqual({len(row) for row in rows}, {len(head)})
        self.assertIn("top level first", caption)
        return rows

    def hierarchy(self, line="MNIST_HVAE_DCT.py --preset small", seeds=(1,), context=True):
        """Two learned levels, and a context above them with 49 active units or none."""
        rows = []
        for seed in seeds:
            row = {
                "seed": seed, "elbo": -1.0, "AU_kl": 52, "rho": 2.5, "rho_any": 3.25,
                "AU_kl from the top": "49, 0, 3" if context else "0, 3",
                "headroom from the top": "1.2346, 0.0004",
                "headroom_any from the top": "2.5000, 0.0116",
                "cause from the top": f"training, {'encoder' if seed == 1 else 'none'}",
            }
            rows.append(row | {"context_baseline": 33.0} if context else row)
        return command_with(line, {}, rows)

    def delta(self, line, **columns):
        return command_with(line, {}, [{
            "elbo": -1.0, "AU": 3, "AU_kl": 108, "rho": 1.01, "rho_any": 1.44, "headroom": 0.0,
            "headroom_any": 0.0, "cause": "unstable", **columns,
        }])

    def test_levels_and_one_level(self):
        """The context is left out, so that all cells of a row have the same levels.

        With the AR(1) prior the active units are those whose means vary.
        """
        rows = self.rows(
            self.hierarchy(),
            self.hierarchy("MNIST_HVAE_Ladder.py", context=False),
            self.delta("MNIST_VAE_Delta.py --preset small --prior standard", smallest_rate=0.0),
            self.delta("MNIST_VAE_Delta.py --preset small --delta 5", smallest_rate=5.0),
        )
        levels = [
            "0, 3", "1.235, 0.000", "2.500, 0.012", "2.500", "3.250", "training, encoder"
        ]
        one_level = ["0.000", "0.000", "1.010", "1.440", "unstable"]
        self.assertEqual(rows, [
            ["MNIST_HVAE_DCT", *levels],
            ["MNIST_HVAE_Ladder", *levels],
            ["MNIST_VAE_Delta, prior = standard", "108", *one_level],
            ["MNIST_VAE_Delta, delta = 5", "3", *one_level],
        ])

    def test_seeds(self):
        """Only the level whose cause differs has two of them."""
        [row] = self.rows(self.hierarchy(seeds=(1, 2, 3)))
        self.assertEqual(row[-1], "training, encoder / none")
        self.assertEqual(row[1], "0, 3")

    def test_models_that_diverged(self):
        [diverged, row] = self.rows(
            command_with("MNIST_HVAE_DVP.py", {}, [{"seed": 1}]), self.hierarchy()
        )
        self.assertEqual(diverged, ["MNIST_HVAE_DVP", "diverged", *["-"] * 5])
        self.assertEqual(row[1], "0, 3")
        command = self.hierarchy()
        command.rows.append({"seed": 2})
        [row] = self.rows(command)
        self.assertIn("1 of 2 seeds", row[0])

    def test_a_model_without_a_verdict(self):
        """No theory covers its decoder."""
        command = command_with("x.py", {}, [{"elbo": -1.0, "AU_kl from the top": "5, 3"}])
        self.assertEqual(self.rows(command), [["x", "5, 3", *["-"] * 5]])


class ThresholdTables(unittest.TestCase):
    def command(self, kls, **flags):
        """A command with these KLs over the seeds at each beta, None where a seed diverged."""
        rows = []
        for beta, kls_of_seeds in kls.items():
            for seed, kl in enumerate(kls_of_seeds, 1):
                row = {"beta": beta, "seed": seed, "linear": False, "beta_warmup": 0.0, **flags}
                if kl is not None:
                    row |= {"elbo": -1.0, "kl": kl, "AU_kl": int(kl > 0.01)}
                rows.append(row)
        return command_with("MNIST_VAE_Bernoulli.py", {"beta": list(kls)}, rows)

    def test_columns(self):
        """All betas in their order. A command without one of them has a dash there."""
        caption, table = page.threshold_tables([
            self.command({0.5: [2.0, 3.0], 33.0: [0.0625, 0.0625], 40.0: [0.0, 0.0]}),
            self.command({40.0: [0.0], 24.0: [None], 33.0: [0.05, None]}, beta_warmup=8.0),
            self.command({33.0: [None]}, linear=True),
        ])
        self.assertIn("KL in nats", caption)
        self.assertEqual(cells(table), [
            [
                "β", "ReLU model that starts next to collapse", "ReLU model after a rise of β",
                "linear model that starts next to collapse",
            ],
            ["0.5", "2.500 ± 0.707 (1)", "-", "-"],
            ["24", "-", "diverged", "-"],
            ["33", "0.062 (1)", "0.050 (1)", "diverged"],
            ["40", "0.000 (0)", "0.000 (0)", "-"],
        ])

    def test_a_command_without_rows(self):
        """It was added after the .csv file was written."""
        _, table = page.threshold_tables([self.command({1.0: [2.0]}), self.command({})])
        self.assertEqual(cells(table)[1], ["1", "2.000 (1)"])


class ReleasedValues(small.InFolder):
    def value(self, text):
        return page.ReleasedValue("table_cvae", "beta = 1.0", "kl", text)

    def test_two_standard_deviations_and_rounding(self):
        """The mean of 1, 2 and 3 is 2 and their standard deviation is 1."""
        self.assertEqual(self.value("4.05").decimals, 2)
        self.assertEqual(self.value("-4").decimals, 0)
        for text, differs in (
            ("2.00", False), ("4.00", False), ("0.00", False), ("4.0", False),
            # The number itself is at least 4.05, 4.005 and 4.0005.
            ("4.1", True), ("4.01", True), ("4.001", True),
            # The number itself may be 3.6.
            ("4", False),
            ("-0.01", True),
        ):
            words = self.value(text).difference_in_words([1.0, 2.0, 3.0])
            self.assertEqual(words is not None, differs, text)

    def test_words(self):
        words = self.value("4.5").difference_in_words([1.0, 2.0, 3.0])
        self.assertEqual(words, "kl at beta = 1.0 (4.5 there, 2.0 ± 1.0 here)")

    def test_rounding_alone(self):
        """Three seeds that agree: 0.2344 is printed as 0.234."""
        self.assertIsNone(self.value("0.234").difference_in_words([0.2344] * 3))
        self.assertIsNotNone(self.value("0.235").difference_in_words([0.2344] * 3))

    def test_reading(self):
        (self.folder / "released_code.csv").write_text(
            "result,setting,metric,text\ntable_cvae,beta = 2.0,kl,0.50\n"
            "table_hvae,beta_1 = 1.0,kl_1,1.40\ntable_cvae,beta = 1.0,kl,2.37\n",
            encoding="utf-8",
        )
        values = page.read_released_values(self.folder, "table_cvae")
        self.assertEqual(
            [(value.setting, value.text) for value in values],
            [("beta = 2.0", "0.50"), ("beta = 1.0", "2.37")],
        )
        self.assertEqual(page.read_released_values(self.folder / "none", "table_cvae"), [])

    def test_own_value(self):
        """With η_dec = 1/2, a squared error of 25 gives 25 / (2/4) + 392 ln(π/2)."""
        row = {
            "kl": 3.0, "eta_dec": 0.5,
            "last epoch reconstruction": 50 + 392 * math.log(math.pi / 2),
        }
        self.assertEqual(page.own_value(row, "kl"), 3.0)
        self.assertAlmostEqual(page.own_value(row, page.SQUARED_ERROR), 25 / 0.25)


class Comparison(unittest.TestCase):
    """A sweep over beta = 1 and 2 with the released objective, beside the released code."""

    def command(self, kls, line="x.py --released_objective"):
        """kls has a list of the seeds' KLs for each beta. log_px is minus the KL."""
        rows = []
        for beta, of_seeds in zip((1.0, 2.0), kls):
            for seed, kl in enumerate(of_seeds):
                rows.append({
                    "beta": beta, "seed": seed, "elbo": 0.0, "kl": kl, "log_px": -kl,
                })
        return command_with(line, {"beta": [1.0, 2.0]}, rows)

    def compare(self, command, *triples):
        """Triples are (beta, metric, text)."""
        released = []
        for beta, metric, text in triples:
            released.append(page.ReleasedValue("x", f"beta = {beta}", metric, text))
        exact = self.command([[99.0, 99.0], [99.0, 99.0]], "x.py")
        return page.compare_with_released_code(released, [exact, command])

    def test_within_two_standard_deviations(self):
        comparison = self.compare(
            self.command([[4.0, 6.0], [1.0, 1.0]]),
            (1.0, "kl", "5.1"), (1.0, "log_px", "-4.90"),
            (2.0, "kl", "1.0"), (2.0, "log_px", "-1.00"),
        )
        self.assertEqual(comparison.seed_counts, {2})
        head, *rows = comparison.table
        self.assertEqual(head[0], "setting")
        self.assertEqual(len(head), 5)
        self.assertEqual(rows, [
            ["beta = 1.0", "5.1", "5.0 ± 1.4", "-4.90", "-5.00 ± 1.41"],
            ["beta = 2.0", "1.0", "1.0", "-1.00", "-1.00"],
        ])
        self.assertTrue(comparison.answer.startswith("All 4 numbers"), comparison.answer)
        self.assertIn("2 seeds", comparison.paragraphs()[0])

    def test_otherwise(self):
        comparison = self.compare(
            self.command([[4.0, 6.0], [1.0, 1.0]]), (1.0, "kl", "5.1"), (2.0, "kl", "1.2")
        )
        self.assertTrue(comparison.answer.startswith("1 of 2 numbers"), comparison.answer)
        self.assertIn("kl at beta = 2.0 (1.2 there, 1.0 here)", comparison.answer)
        self.assertNotIn("beta = 1.0", comparison.answer)

    def test_settings_with_different_seeds(self):
        comparison = self.compare(
            self.command([[4.0, 6.0], [1.0]]), (1.0, "kl", "5.1"), (2.0, "kl", "1.2")
        )
        self.assertIn("over 1 to 2 seeds", comparison.paragraphs()[0])

    def test_one_seed(self):
        """A single seed has no standard deviation, so no number counts as different."""
        comparison = self.compare(self.command([[4.0], [1.0]]), (1.0, "kl", "9.0"))
        self.assertEqual(comparison.table[1], ["beta = 1.0", "9.0", "4.0"])
        self.assertIn("too few seeds", comparison.answer)

    def test_settings_that_are_not_there(self):
        """Only settings that we have, too, are shown. Without any there is no comparison."""
        command = self.command([[4.0, 6.0], [1.0, 1.0]])
        comparison = self.compare(command, (1.0, "kl", "5.0"), (3.0, "kl", "1.0"))
        self.assertEqual([row[0] for row in comparison.table[1:]], ["beta = 1.0"])
        self.assertIsNone(self.compare(command, (3.0, "kl", "1.0")))
        self.assertIsNone(self.compare(command))

    def test_a_column_that_is_not_there(self):
        """An older .csv file lacks a metric. The others are compared."""
        comparison = self.compare(
            self.command([[4.0, 6.0], [1.0, 1.0]]), (1.0, "kl", "5.0"), (1.0, "kl_train", "5.0")
        )
        self.assertEqual(comparison.table[1][:3], ["beta = 1.0", "5.0", "5.0 ± 1.4"])


class SummaryCells(unittest.TestCase):
    def test_steps(self):
        """Three of three along beta, one of two along eta_dec."""
        commands = [
            sweep("kl", [4.0, 3.0, 2.0, 1.0]), sweep("kl", [2.0, 3.0, 1.0], flag="eta_dec"),
        ]
        self.assertEqual(page.steps_cell(commands), "4 of 5")
        commands.append(sweep("kl", [2.0, 1.0, 1.0]))
        self.assertEqual(page.steps_cell(commands), "5 of 7, 1 unchanged")
        self.assertEqual(page.steps_cell([sweep("kl", [1.0, 2.0], flag="digit")]), "-")

    def test_correlations(self):
        """Each script and objective has its own."""
        ordered = [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
        swapped = [(1.0, 1.0), (2.0, 3.0), (3.0, 2.0)]
        exact = predicted_sweep(ordered, line="x.py")
        released = predicted_sweep(swapped, line="x.py --released_objective")
        self.assertEqual(page.correlation_cell([exact]), "1.00")
        self.assertEqual(page.correlation_cell([exact, released]), "0.50 to 1.00")
        level_2 = predicted_sweep(ordered, "kl_2", "y.py")
        self.assertEqual(page.correlation_cell([released, level_2]), "0.50, z2 1.00")
        self.assertEqual(page.correlation_cell([sweep("kl", [1.0, 2.0, 3.0])]), "-")

    def test_causes(self):
        rows = []
        for active, headroom in ((16, 0.0), (3, 0.0), (3, 0.5), (0, 0.5)):
            rows.append({
                "elbo": headroom, "kl": active, "dim_z": 16, "AU_kl": active, "headroom": headroom,
            })
        self.assertEqual(page.causes_cell([command_with("x.py", {}, rows)]), "1 / 2 of 4")
        deep = {"elbo": -1.0, "cause from the top": "training, encoder, unstable, none, objective"}
        self.assertEqual(
            page.causes_cell([command_with("x.py", {}, rows), command_with("y.py", {}, [deep])]),
            "2 / 3, 2 other, of 9",
        )
        self.assertEqual(page.causes_cell([sweep("kl", [1.0])]), "-")

    def test_seeds_and_epochs(self):
        def command(*pairs):
            return command_with("x.py", {}, [
                {"seed": seed, "num_epochs": epochs, "elbo": 0.0} for seed, epochs in pairs
            ])

        three = command((1, 100), (2, 100), (3, 30))
        self.assertEqual(page.seeds_in_words([three]), "3 seeds")
        self.assertEqual(page.epochs_in_words([three]), "30 and 100 epochs")
        # One command with three seeds and another one with the third of them.
        third = command_with("y.py", {}, [{"seed": 3, "elbo": 0.0}])
        self.assertEqual(page.seeds_in_words([three, third]), "1 to 3 seeds")
        # Two seeds in all, but one in each setting.
        rows = [{"beta": 1.0, "seed": 1, "elbo": 0.0}, {"beta": 2.0, "seed": 2, "elbo": 0.0}]
        self.assertEqual(
            page.seeds_in_words([command_with("x.py", {"beta": [1.0, 2.0]}, rows)]), "1 seed"
        )
        one = command((7, 1))
        self.assertEqual(page.seeds_in_words([one]), "1 seed")
        self.assertEqual(page.epochs_in_words([one]), "1 epoch")
        theorem = command_with("matrix_VAE.py", {}, [{"max error": 0.0}])
        self.assertEqual(page.epochs_in_words([theorem]), "")

    def test_no_sweep(self):
        experiment = page.Experiment(page.BEYOND, "?", [], answers.directions, is_sweep=False)
        commands = [sweep("kl", [4.0, 3.0])]
        result = page.Measured("x", experiment, commands, None, "")
        self.assertEqual(page.statistics_cells(result), ["-", "-", "-"])
        experiment.is_sweep = True
        self.assertEqual(page.statistics_cells(result), ["1 of 1", "-", "-"])


class Provenance(unittest.TestCase):
    def provenance(self, commands, collected=False):
        """The line of a result of the name table_x."""
        experiment = page.Experiment(
            page.BEYOND, "What?", [], answers.directions, collected=collected
        )
        return page.provenance(page.Measured("table_x", experiment, commands, None, ""))

    def test_line(self):
        """The times of a shared setting count once: 60 + 240 seconds."""
        row = {"num_epochs": 30, "elbo": 0.0, "beta": 1.0}
        commands = [
            command_with("x.py --a", {}, [row]),
            command_with("x.py --b", {}, [
                row, {**row, "beta": 2.0, "seed": 3, "seconds": 240.0, "torch": "2.1"},
            ]),
        ]
        text = self.provenance(commands)
        for words in (
            "mnist", "30 epochs", "seeds 1 and 3", "5 minutes", "cpu", "torch 2.0 and 2.1",
            "(table_x.csv)",
        ):
            self.assertIn(words, text)

    def test_other_data_and_fewer_seeds(self):
        rows = [{"seed": seed, "elbo": 0.0, "dataset": "fashion"} for seed in (1, 2)]
        commands = [command_with("x.py", {}, rows)]
        text = self.provenance(commands)
        self.assertIn("*Data: fashion. ", text)
        self.assertNotIn("fewer", text)
        commands.append(command_with("y.py", {}, rows[:1]))
        self.assertIn("seeds 1 and 2 (some settings have fewer), ", self.provenance(commands))

    def test_collected(self):
        """A result whose rows are those of others has no .csv file."""
        commands = [command_with("x.py", {}, [{"elbo": 0.0}])]
        self.assertNotIn(".csv", self.provenance(commands, collected=True))

    def test_without_training(self):
        """A check of a theorem has no epochs, so the line has no place for them."""
        check = command_with("matrix_VAE.py", {}, [{"max error": 0.0}])
        text = self.provenance([check])
        self.assertIn(" seed 1, ", text)
        self.assertNotIn("-,", text)

    def lines(self, *commands):
        return page.command_lines([command_with(line, {}, []) for line in commands])

    def test_reproducing_line(self):
        """It names the result, and each seed once."""
        rows = [{"seed": seed, "elbo": 0.0} for seed in (1, 3)]
        commands = [command_with("x.py", {}, rows), command_with("y.py", {}, rows[1:])]
        result = page.Measured("table_x", None, commands, None, "")
        line = page.reproducing_line(result)
        self.assertIn("`python reproduce.py table_x --seed 1,3`", line)

    def test_command_lines(self):
        self.assertEqual(self.lines("x.py --a 1", "y.py"), "    python x.py --a 1\n    python y.py")

    def test_both_objectives(self):
        """The line appears once, with a sentence about the other objective."""
        text = self.lines("x.py --a 1", "x.py --a 1 --released_objective")
        self.assertEqual(text.count("python x.py"), 1)
        self.assertIn("also run with `--released_objective`", text)

    def test_only_the_released_objective(self):
        """The command that made the numbers has the flag."""
        text = self.lines("x.py --a 1 --released_objective")
        self.assertIn("    python x.py --a 1 --released_objective", text)
        self.assertNotIn("too", text)

    def test_some_with_both_objectives(self):
        """Linear models are trained with the exact objective only."""
        text = self.lines("linear.py", "x.py", "x.py --released_objective")
        self.assertNotIn("Each command is run with", text)
        self.assertIn("--released_objective", text)


COMMENTS = """# All

What it is.

## figure_b

What the picture shows.

## Summary

Below the table.

## Method: data, seeds

At the end.

## table_c

Not made.
"""


class WholePage(small.InFolder):
    """A page with two results of one section and one of a section before it."""

    def setUp(self):
        super().setUp()
        self.experiments = {
            "table_a": page.Experiment(
                page.CVAES, "Does β collapse it?", ["x.py --beta 1,2"], answers.directions
            ),
            "figure_b": page.Experiment(
                page.CVAES, "How strongly?", ["x.py --beta 1,2"], answers.directions,
                numbers_in="table_a",
            ),
            "table_c": page.Experiment(page.BEYOND, "And then?", ["y.py"], answers.directions),
            "table_d": page.Experiment(
                page.HVAES, "Do two levels?", ["z.py --beta_1 1,2"], answers.directions
            ),
        }
        epochs = {"num_epochs": 5}
        commands = sweep("kl", [4.25, 1.5], "x.py --beta 1,2")
        commands.rows = [epochs | row for row in commands.rows]
        other_seeds = [{**row, "seed": 2} for row in commands.rows]
        with_seeds = measurements.Command(
            commands.line, commands.flags, commands.rows + other_seeds
        )
        self.commands = {
            "table_a": [with_seeds],
            "figure_b": [commands],
            "table_d": [sweep("kl_2", [1.0, 2.0], "z.py --beta_1 1,2", flag="beta_1")],
        }

    def text(self, **commands):
        """The page of the results in self.commands, or of others."""
        page.write_page(self.folder, self.experiments, commands or self.commands)
        return (self.folder / "README.md").read_text(encoding="utf-8")

    def headings(self, text):
        return re.findall(r"^#+ .*$", text, flags=re.M)

    def part(self, text, heading):
        """What stands under a heading."""
        return re.split("^#+ ", text.partition(f"# {heading}\n")[2], flags=re.M)[0]

    def test_headings_and_contents(self):
        """Sections in their order, then results in that of the experiments, then comments."""
        (self.folder / "comments.md").write_text(COMMENTS, encoding="utf-8")
        text = self.text()
        self.assertEqual(self.headings(text), [
            "# All", "## Summary", f"## {page.HVAES}", "### table_d", f"## {page.CVAES}",
            "### table_a", "### figure_b", "## Method: data, seeds",
        ])
        self.assertEqual(
            re.findall(r"^\d\. \[(.*)\]\(", text, flags=re.M),
            ["Summary", page.HVAES, page.CVAES, "Method: data, seeds"],
        )
        self.check_links(text)

    def check_links(self, text):
        """Every anchor exists once, and no file is named that does not exist, except the .csv."""
        anchors, links = anchors_and_links(text)
        self.assertEqual(len(set(anchors)), len(anchors))
        for link in links:
            if link.startswith("#"):
                self.assertIn(link[1:], anchors)
            elif not link.endswith(".csv"):
                self.assertTrue((self.folder / link).exists(), link)

    def test_comments(self):
        (self.folder / "comments.md").write_text(COMMENTS, encoding="utf-8")
        text = self.text()
        self.assertIn("What it is.", self.part(text, "All"))
        self.assertIn("Below the table.", self.part(text, "Summary"))
        self.assertIn("What the picture shows.", self.part(text, "figure_b"))
        self.assertIn("At the end.", self.part(text, "Method: data, seeds"))
        # The comment of a result that is not there would have no numbers beside it.
        self.assertNotIn("Not made.", text)

    def test_without_comments(self):
        text = self.text()
        self.assertTrue(text.startswith("# Results\n"))
        self.check_links(text)

    def test_answers_tables_and_commands(self):
        text = self.text()
        part = self.part(text, "table_a")
        self.assertIn("**Does β collapse it?** Yes. Along β the KL falls in 1 of 1 step.", part)
        self.assertIn("| beta = 1.0 | ", part)
        self.assertIn("4.25", part)
        self.assertIn("    python x.py --beta 1,2\n", part)
        self.assertIn("5 epochs, seeds 1 and 2, ", part)
        self.assertTrue(text.endswith("\n"))
        self.assertNotIn("\n\n\n", text)

    def test_numbers_of_another_result(self):
        """The picture refers to the table, and the summary has one row for both."""
        text = self.text()
        part = self.part(text, "figure_b")
        self.assertIn("[table_a](#table_a)", part)
        self.assertNotIn("| beta = 1.0 | ", part)
        summary = self.part(text, "Summary")
        self.assertIn("(#table_a)", summary)
        self.assertNotIn("(#figure_b)", summary)

    def test_numbers_of_another_result_that_is_not_there(self):
        """Then no link leads nowhere."""
        self.check_links(self.text(figure_b=self.commands["figure_b"]))

    def test_pictures(self):
        """Only those that exist are shown."""
        self.assertNotIn("![", self.text())
        (self.folder / "figure_b.png").write_bytes(b"")
        self.assertEqual(re.findall(r"!\[.*\)", self.text()), ["![How strongly?](figure_b.png)"])

    def test_summary(self):
        summary = self.part(self.text(), "Summary")
        [row] = [line for line in summary.splitlines() if "(#table_a)" in line]
        cells_of_row = [text.strip() for text in row.strip("|").split("|")]
        self.assertEqual(
            cells_of_row[-5:],
            [
                "Yes. Along β the KL falls in 1 of 1 step.", "1 of 1", "-", "-",
                "2 seeds, 5 epochs, mnist",
            ],
        )
        widths = {len(cells_of_line) for cells_of_line in cells(self.table(summary))}
        self.assertEqual(len(widths), 1)

    def table(self, text):
        """The table in a text."""
        return "\n".join(line for line in text.splitlines() if line.startswith("|"))

    def test_results_of_a_single_seed(self):
        [sentence] = re.findall(r"^.*single seed.*$", self.text(), flags=re.M)
        self.assertIn("figure_b and table_d", sentence)
        self.assertNotIn("table_a", sentence)
        self.assertNotIn("single seed", self.text(table_a=self.commands["table_a"]))

    def test_results_with_a_single_seed_in_part(self):
        """Both settings of table_a have two seeds, until one loses a seed."""
        self.commands["table_a"][0].rows.pop()
        text = self.text()
        self.assertIn("rest on a single seed: figure_b and table_d. These results have some", text)
        self.assertIn("some settings with a single seed: table_a.", text)
        self.assertIn("1 to 2 seeds, 5 epochs", self.part(text, "Summary"))
        text = self.text(table_a=self.commands["table_a"])
        self.assertNotIn("rest on", text)
        self.assertIn("some settings with a single seed: table_a.", text)

    def test_results_of_an_earlier_state(self):
        """Their rows have a headroom, but none with any encoder. Those without any do not count.

        figure_b, whose rows are among those of table_a, has no row in the summary.
        """
        self.assertNotIn("earlier state", self.text())
        for row in self.commands["table_a"][0].rows:
            row |= {"headroom": 0.0, "headroom_any": 0.0, "dim_z": 4, "AU_kl": 4}
        self.assertNotIn("earlier state", self.text())
        for row in self.commands["table_d"][0].rows:
            row |= {"headroom_2": 0.0, "d_2": 4, "AU_kl_2": 4}
        [sentence] = re.findall(r"^.*earlier state.*$", self.text(), flags=re.M)
        self.assertIn("programs: table_d. ", sentence)
        del self.commands["table_a"][0].rows[1]["headroom_any"]
        self.assertIn("programs: table_a and table_d. ", self.text())
        # A result that is no sweep may speak of causes, too.
        self.experiments["table_d"].is_sweep = False
        self.assertIn("programs: table_a and table_d. ", self.text())

    def test_a_repeated_sweep(self):
        """The table has the numbers of another result on the page, with a link to it."""
        line = "x.py --beta 1,2 --dataset fashion"
        self.experiments["table_c"] = page.Experiment(
            page.BEYOND, "And elsewhere?", [line], answers.directions,
            repeated=(page.RepeatedSweep(line, "x.py --beta 1,2", "table_a"),),
        )
        fashion = sweep("kl", [1.0, 2.0], line)
        fashion.rows = [{**row, "dataset": "fashion", "num_epochs": 7} for row in fashion.rows]
        text = self.text(**self.commands, table_c=[fashion])
        self.check_links(text)
        part = self.part(text, "table_c")
        self.assertIn("| x, beta, 7 epochs | 0 of 1 | 1 of 1 | ", part)
        self.assertIn("| [table_a](#table_a), 2 seeds, 5 epochs |", part)
        self.assertIn("*Data: fashion. ", part)
        self.assertIn("| 1 seed, 7 epochs, fashion |", self.part(text, "Summary"))
        self.check_links(self.text(table_c=[fashion]))

    def test_released_code(self):
        """Where the comparison is the answer, it is the answer of the summary, too."""
        (self.folder / "released_code.csv").write_text(
            "result,setting,metric,text\ntable_a,beta = 1.0,kl,4.25\n", encoding="utf-8"
        )
        self.experiments["table_a"].answer = None
        self.experiments["table_a"].tables = page.no_tables
        released = self.commands["table_a"][0]
        released.line += " --released_objective"
        text = self.text(table_a=[released])
        self.assertIn("All 1 number", self.part(text, "Summary"))
        self.assertIn("| beta = 1.0 | 4.25 | 4.25 |", self.part(text, "table_a"))

    def test_no_results(self):
        page.write_page(self.folder, self.experiments, {})
        self.check_links((self.folder / "README.md").read_text(encoding="utf-8"))


class Anchors(unittest.TestCase):
    def test_as_on_github(self):
        for heading, anchor in (
            ("Summary", "summary"),
            ("figure_hvae_beta_1", "figure_hvae_beta_1"),
            ("Beyond the paper: remedies and deep models",
             "beyond-the-paper-remedies-and-deep-models"),
            ("3. Columns of the `deep` models", "3-columns-of-the-deep-models"),
            ("A δ-VAE (2019)", "a-δ-vae-2019"),
        ):
            self.assertEqual(page.anchor(heading), anchor)


class CommittedPage(unittest.TestCase):
    """results/README.md as it is committed."""

    @classmethod
    def setUpClass(cls):
        cls.path = ROOT / "results" / "README.md"
        cls.text = cls.path.read_text(encoding="utf-8")
        cls.anchors, cls.links = anchors_and_links(cls.text)

    def test_every_anchor_is_there_once(self):
        self.assertEqual(len(set(self.anchors)), len(self.anchors))

    def test_every_link_leads_somewhere(self):
        self.assertGreater(len(self.links), 50)
        for link in self.links:
            with self.subTest(link=link):
                self.check_link(link)

    def check_link(self, link):
        if "://" in link:
            return
        path, _, anchor = link.partition("#")
        file = Path(self.path.parent, path) if path else self.path
        self.assertTrue(file.exists())
        if anchor:
            anchors, _ = anchors_and_links(file.read_text(encoding="utf-8"))
            self.assertIn(anchor, anchors)

    def test_every_table_and_picture_is_shown(self):
        """No file of a result lies in the folder without a place on the page."""
        for path in sorted(self.path.parent.glob("*.csv")):
            picture = path.with_suffix(".png")
            names = [path.name, picture.name] if picture.exists() else [path.name]
            for name in names:
                if name != "released_code.csv":
                    self.assertTrue(f"({name})" in self.text, name)


if __name__ == "__main__":
    unittest.main()
