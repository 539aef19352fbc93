"""The examples: each runs on a few drawn digits, and results/post_mortems.csv has a row for it."""
import contextlib
import csv
import importlib
import io
import sys
import types
import unittest
from unittest import mock

import common
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from examples import __main__ as program
from examples import conditional, convolutional, mlp
from tests import small
from tests.small import ROOT

# Arguments of main with which an example takes a few seconds.
SMALL_SIZES = {
    "mlp": {"num_images": 100, "num_epochs": 1},
    "convolutional": {"num_images": 100, "num_epochs": 1},
    "conditional": {"num_images": 100, "num_epochs": 1},
    "hierarchy": {"num_images": 100, "num_epochs": 1},
    "sequence": {"num_sentences": 100, "num_epochs": 1},
}

# Columns with numbers. The others are texts.
FLOATS = ("loss_before", "loss_after", "kl_before", "kl_after", "loss_control")
COUNTS = ("active_before", "active_after", "active_control", "units")

CAUSES = ("objective", "training", "encoder", "unstable", "undecided", "none")


def make_row(name, **cells):
    """A row of the table in which each column has its own name as its text."""
    row = {column: column for column in program.COLUMNS}
    row["script"] = f"examples/{name}.py"
    return row | cells


class Examples(small.WithMnist):
    """Each example, by its name. A module that is missing fails."""

    def check_example(self, name):
        example = importlib.import_module(f"examples.{name}")
        out = io.StringIO()
        with contextlib.redirect_stdout(out), torch.random.fork_rng(devices=[]):
            row = example.main(str(self.folder / "data"), **SMALL_SIZES[name])

        self.assertEqual(tuple(row), program.COLUMNS)
        for column in FLOATS:
            self.assertIsInstance(row[column], float, column)
        for column in set(program.COLUMNS) - set(FLOATS):
            self.assertIsInstance(row[column], str, column)
            self.assertTrue(row[column], column)
        for column in COUNTS:
            self.assertIn(int(row[column]), range(int(row["units"]) + 1), column)
        self.assertEqual(row["script"], f"examples/{name}.py")
        self.assertIn(row["cause"], CAUSES)
        self.assertIn(row["verdict"].removesuffix("."), out.getvalue())

    def test_mlp(self):
        self.check_example("mlp")

    def test_convolutional(self):
        self.check_example("convolutional")

    def test_conditional(self):
        self.check_example("conditional")

    def test_hierarchy(self):
        self.check_example("hierarchy")

    def test_sequence(self):
        self.check_example("sequence")

    def test_every_example_is_tried(self):
        names = {path.stem for path in ROOT.glob("examples/*.py") if path.stem[0] != "_"}
        self.assertEqual(names, set(program.EXAMPLES))
        self.assertEqual(set(SMALL_SIZES), set(program.EXAMPLES))
        for name in program.EXAMPLES:
            self.assertTrue(hasattr(self, f"test_{name}"), name)


class Losses(unittest.TestCase):
    """The losses that the examples compare, against torch.distributions.

    The first layer of the decoder does not read z, so that the loss does not depend on the draws.
    """

    def setUp(self):
        generators = torch.random.fork_rng(devices=[])
        generators.__enter__()
        self.addCleanup(generators.__exit__, None, None, None)
        torch.manual_seed(1)
        self.x = torch.rand(6, 784)
        self.silence = contextlib.redirect_stdout(io.StringIO())

    def check(self, evaluated, q, log_px):
        """q is the posterior of the six rows, and log_px (6,) their reconstruction terms."""
        loss, kl, active = evaluated
        kl_of_units = kl_divergence(q, Normal(0, 1)).mean(0)
        self.assertAlmostEqual(kl, kl_of_units.sum().item(), places=4)
        self.assertEqual(active, sum(nats > 0.01 for nats in kl_of_units.tolist()))
        wanted = kl_of_units.sum().item() - log_px.mean().item()
        self.assertAlmostEqual(loss / wanted, 1, places=5)

    def test_mlp(self):
        x = self.x.round()
        model = mlp.VAE()
        model.decoder[0].weight.data.zero_()
        with self.silence, torch.no_grad():
            evaluated = mlp.evaluate(model, [x[:4], x[4:]], "cpu")
            mean, log_var = model.encode(x)
            p = model.decode(torch.zeros(6, 16))
        log_px = Bernoulli(p).log_prob(x).sum(1)
        self.check(evaluated, Normal(mean, (log_var / 2).exp()), log_px)

    def test_convolutional(self):
        x = self.x.unflatten(1, (1, 28, 28))
        model = convolutional.VAE()
        model.decoder[0].weight.data.zero_()
        with self.silence, torch.no_grad():
            evaluated = convolutional.evaluate(model, [x[:4], x[4:]], "cpu")
            mean, log_var = model.encode(x)
            reconstruction = model.decode(torch.zeros(6, 16))
        # The comparison leaves the constant of the density out.
        at_mean = Normal(0.0, 1.0).log_prob(torch.tensor(0.0))
        log_px = (Normal(reconstruction, 1).log_prob(x) - at_mean).flatten(1).sum(1)
        self.check(evaluated, Normal(mean, (log_var / 2).exp()), log_px)

    def test_conditional(self):
        y = self.x.round()
        x = torch.eye(10)[:6]
        model = conditional.CVAE()
        model.decoder[0].weight.data[:, :16] = 0
        with self.silence, torch.no_grad():
            batches = [(y[:4], x[:4]), (y[4:], x[4:])]
            evaluated = conditional.evaluate(model, batches, "cpu")
            q = model.encode(y, x)
            p = model.decode(torch.zeros(6, 16), x)
        self.check(evaluated, q, Bernoulli(p).log_prob(y).sum(1))


class Table(small.InFolder):
    """The program that runs the examples, with examples that only return a row."""

    def run_program(self, *words, **rows):
        """Run the program with these words.

        rows is {example: the row that it returns, or the error that it raises}.
        """
        self.folders = []

        def make_example(row):
            def main(folder):
                self.folders.append(folder)
                if isinstance(row, Exception):
                    raise row
                return row

            return types.SimpleNamespace(main=main)

        modules = {f"examples.{name}": make_example(row) for name, row in rows.items()}
        with mock.patch.dict(sys.modules, modules), contextlib.redirect_stdout(io.StringIO()):
            program.main(words, self.folder / "table.csv")

    def read(self):
        with open(self.folder / "table.csv", newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def test_all_examples_run(self):
        rows = {name: make_row(name) for name in program.EXAMPLES}
        self.run_program(**rows)
        self.assertEqual(self.read(), list(rows.values()))
        self.assertEqual(self.folders, ["data"] * 5)

    def test_one_row_is_made_anew(self):
        rows = {name: make_row(name, loss_after=1.0) for name in program.EXAMPLES}
        self.run_program(str(self.folder), "sequence", "mlp", **rows)
        self.assertEqual(self.folders, [str(self.folder)] * 2)
        scripts = [row["script"] for row in self.read()]
        self.assertEqual(scripts, ["examples/mlp.py", "examples/sequence.py"])

        self.run_program("mlp", mlp=make_row("mlp", loss_after=2 / 3, cause='a, "b"'))
        first, second = self.read()
        self.assertEqual(first["loss_after"], "0.6667")
        self.assertEqual(first["cause"], 'a, "b"')
        self.assertEqual(second["loss_after"], "1.0000")

    def test_finished_rows_are_kept_after_an_error(self):
        with self.assertRaises(ValueError):
            error = ValueError("the loss diverged")
            self.run_program("mlp", "sequence", mlp=make_row("mlp"), sequence=error)
        self.assertEqual(self.read(), [make_row("mlp")])

    def test_wrong_words(self):
        for words in (["mpl"], [str(self.folder), "."]):
            with self.assertRaises(SystemExit) as end:
                self.run_program(*words)
            self.assertTrue(str(end.exception).startswith("got "), words)
        self.assertFalse((self.folder / "table.csv").exists())


class Results(unittest.TestCase):
    def test_each_example_has_a_row(self):
        with open(program.TABLE, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        scripts = [f"examples/{name}.py" for name in program.EXAMPLES]
        self.assertEqual([row["script"] for row in rows], scripts)
        for row in rows:
            self.assertEqual(tuple(row), program.COLUMNS)
            for column in FLOATS:
                self.assertRegex(row[column], r"^\d+\.\d{4}$")
            for column in COUNTS:
                self.assertIn(int(row[column]), range(int(row["units"]) + 1))
            self.assertIn(row["cause"], CAUSES)
            self.assertTrue(all(row.values()), row["script"])

    def test_the_page_has_these_numbers(self):
        with open(program.TABLE, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        lines = (ROOT / "results" / "README.md").read_text(encoding="utf-8").splitlines()
        for row in rows:
            [line] = [line for line in lines if f"](../{row['script']})" in line]
            before = f"{float(row['loss_before']):.2f}"
            for loss, active in (
                (row["loss_after"], row["active_after"]),
                (row["loss_control"], row["active_control"]),
            ):
                cells = (
                    f"| {before} → {float(loss):.2f} "
                    f"| {row['active_before']} → {active} of {row['units']} |"
                )
                self.assertIn(cells, line)
            self.assertIn(f"| {row['cause']} |", line)

    def test_all_causes_were_right(self):
        """README and the page say that each remedy activated all units, and each control none."""
        with open(program.TABLE, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                self.assertEqual(row["active_before"], "0")
                self.assertEqual(row["active_after"], row["units"])
                self.assertEqual(row["active_control"], "0")


if __name__ == "__main__":
    unittest.main()
