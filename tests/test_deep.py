"""The scripts of the deep models, and `deep`.

The scripts leave complete results, go on after a kill, and train by many processes. `deep` has the
schedule, the average of the weights, the curve of --test_curve, and the measurements of --evaluate.
"""
import contextlib
import dataclasses
import io
import itertools
import json
import os
import signal
import time
import unittest
from unittest import mock

import common
import numpy as np
import torch
from torch.distributions import Normal

import datasets
import deep
import files
import MNIST_HVAE_DCT
import MNIST_HVAE_DVP
import MNIST_HVAE_Ladder
import MNIST_VAE_Delta
import pictures
import processes
import report
import training
from tests import small
from tests.small import read_json

# The flags with which each script trains in no time.
SMALL = {
    MNIST_HVAE_Ladder: "--latents 1,2 --num_ch 4",
    MNIST_HVAE_DCT: "--side 14 --latents 2 --num_ch 4 --diffusion_ch 2 --context_size 3",
    MNIST_HVAE_DVP: "--side 14 --latents 2 --num_ch 4 --diffusion_ch 2 --context_size 3",
    MNIST_VAE_Delta: "--num_ch 4 --dim_z 2 --num_layers 2 --d_hidden 8 --auxiliary_epochs 2",
}

# The scripts with a hierarchy of latent maps, which have --side, --num_train and --test_curve.
HIERARCHIES = [script for script in SMALL if script is not MNIST_VAE_Delta]

# Cases of these scripts on images of 14x14: the name of the case, the script, and its flags.
CURVES = (
    ("ladder", MNIST_HVAE_Ladder, {"latents": "2"}),
    ("dct", MNIST_HVAE_DCT, {"latents": "1", "context_size": 3}),
    ("dvp", MNIST_HVAE_DVP, {"latents": "1", "context_size": 3}),
    ("vamp", MNIST_HVAE_DVP, {"latents": "2", "prior": "vamp", "pseudoinputs": 5}),
)


# No model has a headroom while this is in force.
WITHOUT_HEADROOM = mock.patch("headroom.measure", return_value={})


class WithScripts(small.InFolder):
    """Tests that run scripts on a few drawn digits, and look at the files that they leave."""

    def argv(self, script, out_dir, **flags):
        """A command line of a script. `flags` overrule the ones below."""
        defaults = {
            "data_dir": self.folder / "data",
            "out_dir": self.folder / out_dir,
            "device": "cpu",
            "num_samples": 0,
            "num_test": 20,
            "lr": 0.01,
        }
        words = SMALL[script].split()
        for name, value in (defaults | flags).items():
            words += [f"--{name}", str(value)]
        return words

    def run_folder(self, script, out_dir):
        """The folder of the only run of a script."""
        [folder] = (self.folder / out_dir / script.__name__).glob("*/")
        return folder

    def trained(self, script, out_dir):
        """The contents of the only run's training.json, except seconds, and its weights."""
        folder = self.run_folder(script, out_dir)
        record = read_json(folder / "training.json")
        del record["seconds"]
        return record, torch.load(folder / "model.pt", weights_only=True)

    def assert_equal_weights(self, weights, expected):
        self.assertEqual(weights.keys(), expected.keys())
        for name, value in expected.items():
            self.assertTrue(torch.equal(weights[name], value), name)


class Tables(WithScripts):
    def test_settings_that_measure_different_things(self):
        """Where a setting does not have a number, its table has "-".

        One prior has a context on top and the other has none. Each comes with and without a
        log-likelihood.
        """
        small.write_mnist(self.folder / "data")
        argv = self.argv(
            MNIST_HVAE_DVP,
            "runs",
            num_epochs=1,
            batch_size=128,
            latents="3",
            prior="vamp,diffusion",
            pseudoinputs=5,
        )
        with mock.patch.object(pictures, "draw_run"):
            status, _, err = small.call(MNIST_HVAE_DVP.main, *argv)
            self.assertEqual(status, 0, err)
            status, out, err = small.call(MNIST_HVAE_DVP.main, *argv, "--num_samples", "0,2")
        self.assertEqual(status, 0, err)
        totals, levels, verdicts = out.strip().split("\n\n")

        # 1. The table of totals.
        lines = totals.split("\n")
        names = lines[1].split()
        self.assertEqual(names[2:4], ["log_px", "elbo"])
        rows = [dict(zip(names, line.split())) for line in lines[2:]]
        settings = [("vamp", "0"), ("vamp", "2"), ("diffusion", "0"), ("diffusion", "2")]
        self.assertEqual([(row["prior"], row["num_samples"]) for row in rows], settings)
        has_no_log_px = [row["log_px"] == "-" for row in rows]
        self.assertEqual(has_no_log_px, [True, False, True, False])
        # The baseline appears beside a log-likelihood only.
        has_no_baseline = [row["context_baseline"] == "-" for row in rows]
        self.assertEqual(has_no_baseline, [True, True, True, False])

        # 2. The table level by level.
        expected = []
        for prior, num_samples in settings:
            top = 4 if prior == "diffusion" else 3
            for level in range(top, 0, -1):
                expected.append([prior, num_samples, str(level)])
        head, *lines, last_line = levels.split("\n")
        self.assertEqual([line.split()[:3] for line in lines], expected)
        self.assertEqual(last_line, "more columns: --columns all")
        # The context of the diffusion prior has no headroom.
        position = head.split().index("headroom")
        without = [line.split()[:3] for line in lines if line.split()[position] == "-"]
        self.assertEqual(without, [["diffusion", "0", "4"], ["diffusion", "2", "4"]])

        # 3. The verdicts, level by level, from level 1 on.
        expected = []
        for prior, num_samples in settings:
            for level in (1, 2, 3):
                expected.append(f"prior={prior},num_samples={num_samples}: z{level}: ")
        lines = verdicts.split("\n")
        self.assertEqual(len(lines), len(expected))
        for line, start in zip(lines, expected):
            self.assertTrue(line.startswith(start), line)

        # 4. The pictures of the grid.
        folders = []
        for folder in (self.folder / "runs").rglob("grids/*"):
            if "num_samples=0+2" in folder.name:
                folders.append(folder)
        [grid] = folders
        names = {path.name for path in grid.glob("*.png")} - {"metrics.png"}
        self.assertEqual(names, {f"reconstructions_{k}.png" for k in range(1, 6)})

    def test_each_script_leaves_complete_results(self):
        """Each leaves files, a table of totals and a table level by level.

        The same command again shows them and trains nothing. With fewer test images the same
        weights are evaluated again.
        """
        small.write_mnist(self.folder / "data")
        for script in SMALL:
            with self.subTest(script=script.__name__):
                self.check_script(script)

    def check_script(self, script):
        measurements = () if script is MNIST_VAE_Delta else ("compression", "attack")
        argv = self.argv(script, "runs", num_epochs=1, num_samples=3, batch_size=128)
        measuring_argv = argv
        if measurements:
            measuring_argv = [*argv, "--evaluate", ",".join(measurements)]

        # 1. The command.
        with mock.patch.object(deep, "ATTACK_STEPS", 3):
            status, out, err = small.call(script.main, *measuring_argv)
        self.assertEqual(status, 0, err)
        folder = self.run_folder(script, "runs")
        metrics = read_json(folder / "result.json")["metrics"]
        self.check_files(folder, metrics, measurements)
        self.check_metrics(metrics)
        levels = self.learned_levels(script)
        self.check_headroom(metrics, levels)
        tables = out.strip().split("\n\n")
        self.check_totals(tables[0], metrics)
        if len(common.levels(metrics)) > 1:
            self.check_levels(tables[1], metrics)
        [verdicts] = [table for table in tables if " collapsed" in table]
        starts = [line.split(": ")[0] for line in verdicts.split("\n")]
        self.assertEqual(starts, [f"z{level.removeprefix('_')}" for level in levels])

        # 2. The command again.
        status, out_again, err = small.call(script.main, *measuring_argv)
        self.assertEqual((status, out_again), (0, out))
        self.assertIn("already trained", err)
        self.assertNotIn("training: epoch", err)

        # 3. The command with fewer test images, and fewer steps of sampling.
        fewer = ["--num_test", 10, "--num_samples", 3]
        if script is MNIST_HVAE_DVP:
            fewer += ["--num_steps", 3]
        with mock.patch.object(pictures, "draw_run"), WITHOUT_HEADROOM:
            status, out, err = small.call(script.main, *argv, *fewer)
        self.assertEqual(status, 0, err)
        self.assertIn("already trained", err)
        self.assertIn("256 training and 10 test examples", out)

    def check_files(self, folder, metrics, measurements):
        # 1. The pictures.
        expected = {"collapse.png", "reconstructions.png", "samples.png", "training.png"}
        expected |= {"headroom.png"} | {f"{name}.png" for name in measurements}
        self.assertEqual({path.name for path in folder.glob("*.png")}, expected)

        # 2. The KLs of the units, which are the ELBO's terms.
        with np.load(folder / "units.npz") as arrays:
            unit_kls = {name: arrays[name] for name in arrays if name.startswith("unit_kl")}
        self.assertTrue(unit_kls)
        for name, unit_kl in unit_kls.items():
            self.assertEqual(unit_kl.shape[0], 20)
            kl = metrics[name.removeprefix("unit_")]
            self.assertAlmostEqual(unit_kl.sum(1).mean(), kl, places=3)

        # 3. The measurements: with no level, with one more each time, and with all.
        if measurements:
            compression = read_json(folder / "compression.json")
            self.assertEqual(len(compression["bits"]), len(common.levels(metrics)))
            attack = read_json(folder / "attack.json")
            self.assertEqual([row["radius"] for row in attack["rows"]], list(deep.RADII))

    def check_metrics(self, metrics):
        self.assertTrue(np.isfinite(list(metrics.values())).all())
        totals = {"log_px", "elbo", "reconstruction", "kl", "AU", "AU_kl", "active_share"}
        self.assertLessEqual(totals, set(metrics))
        elbo = -metrics["reconstruction"] - metrics["kl"]
        self.assertAlmostEqual(metrics["elbo"], elbo, places=3)

        suffixes = [level for level in common.levels(metrics) if level]
        if suffixes:
            kl = sum(metrics[f"kl{level}"] for level in suffixes)
            self.assertAlmostEqual(kl, metrics["kl"], places=4)
            active_units = sum(metrics[f"AU_kl{level}"] for level in suffixes)
            self.assertEqual(active_units, metrics["AU_kl"])

    def learned_levels(self, script):
        """The suffixes of the levels that have a headroom. A context has none."""
        if script is MNIST_VAE_Delta:
            return [""]
        words = SMALL[script].split()
        latents = words[words.index("--latents") + 1]
        count = sum(int(number) for number in latents.split(","))
        return [f"_{level}" for level in range(1, 1 + count)]

    def check_headroom(self, metrics, levels):
        """All levels have the same eigenvalues, since the residual is the same."""
        expected = []
        for level in levels:
            names = ("headroom", "headroom_any", "rho", "rho_any")
            expected += [f"{name}{level}" for name in names]
        shown = [name for name in metrics if name.startswith(("headroom", "rho"))]
        self.assertEqual(shown, expected)
        for name in ("rho", "rho_any"):
            self.assertEqual(len({metrics[f"{name}{level}"] for level in levels}), 1)

    def check_totals(self, table, metrics):
        lines = table.split("\n")
        names = lines[1].split()
        values = lines[2].split()
        self.assertEqual(len(names), len(values))
        elbo = float(values[names.index("elbo")])
        self.assertAlmostEqual(elbo, metrics["elbo"], delta=0.006)
        caption = "256 training and 20 test examples, cpu, nats per test example, seed 0"
        self.assertIn(caption, table)

    def check_levels(self, table, metrics):
        *lines, last_line = table.split("\n")
        self.assertEqual(last_line, "more columns: --columns all")
        names, *rows = [line.split() for line in lines]
        headroom = ["headroom", "headroom_any", "rho", "rho_any"]
        self.assertEqual(names, ["level", "kl", "AU", *headroom])
        # The levels of the metrics include "kl", the total.
        top = len(common.levels(metrics)) - 1
        self.assertEqual([int(row[0]) for row in rows], list(range(top, 0, -1)))
        for row in rows:
            self.assertAlmostEqual(float(row[1]), metrics[f"kl_{row[0]}"], delta=0.006)


class TestCurve(WithScripts):
    """--test_curve, on images of 14x14."""

    def setUp(self):
        super().setUp()
        small.write_mnist(self.folder / "data")

    def train(self, script, out_dir, **flags):
        """Train a script for two epochs. Returns its record, as in `trained`, and its weights."""
        defaults = {"side": 14, "num_epochs": 2, "batch_size": 32, "num_test": 60}
        argv = self.argv(script, out_dir, **(defaults | flags))
        with mock.patch.object(pictures, "draw_run"), WITHOUT_HEADROOM:
            status, _, err = small.call(script.main, *argv)
        self.assertEqual(status, 0, err)
        return self.trained(script, out_dir)

    def saved_model(self, script, out_dir):
        """The model that a run left, in evaluation mode, its setting and its test images."""
        folder = self.run_folder(script, out_dir)
        settings = read_json(folder / "result.json")["settings"]
        f = script.Flags(**settings, device="cpu", data_dir=str(self.folder / "data"))
        [data] = datasets.load_images([f])
        class_names = {MNIST_HVAE_Ladder: "LadderVAE", MNIST_HVAE_DCT: "DCTVAE"}
        Model = getattr(script, class_names.get(script, "model_of"))
        model = Model(f).eval()
        model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
        return model, f, data.test[0]

    @torch.no_grad()
    def elbo_of_saved_model(self, script, out_dir):
        """The mean over the test images by the definition of `report`, at the draws of the curve.

        The draws have the seed of the evaluation, and the images come in batches.
        """
        model, f, images = self.saved_model(script, out_dir)
        total = 0
        with common.seeded(f.seed, "evaluation", images.device):
            for x in images.split(f.batch_size):
                terms = model(x, common.on_device(f, x), sample_shape=(1,))
                terms = {name: value[0].double() for name, value in terms.items()}
                total += len(x) * report.elbo_metrics(terms)["elbo"]
        return total / len(images)

    def test_changes_nothing_else_and_ends_at_the_saved_model(self):
        """Weights and all other curves are equal bit by bit with and without --test_curve."""
        for name, script, flags in CURVES:
            with self.subTest(name):
                record, weights = self.train(script, f"{name}_without", **flags)
                record_with, weights_with = self.train(
                    script, f"{name}_with", test_curve=True, **flags)
                self.assert_equal_weights(weights_with, weights)
                curve = record_with["curves"].pop("test_elbo")
                self.assertEqual(record_with["curves"], record["curves"])

                self.assertEqual(len(curve), 2)
                self.assertNotEqual(curve[0], curve[1])
                expected = self.elbo_of_saved_model(script, f"{name}_with")
                self.assertAlmostEqual(curve[-1], expected, delta=1e-5 * abs(expected))

    def test_networks_compute_in_float32(self):
        """This holds with --autocast bf16, too, where training rounds to three digits."""
        for name, script, flags in (CURVES[0], CURVES[3]):
            with self.subTest(name):
                record, _ = self.train(script, name, test_curve=True, autocast="bf16", **flags)
                expected = self.elbo_of_saved_model(script, name)
                last = record["curves"]["test_elbo"][-1]
                self.assertAlmostEqual(last, expected, delta=1e-5 * abs(expected))

    def test_each_value_is_that_of_a_training_that_ends_there(self):
        flags = {"latents": "2", "test_curve": True, "lr_schedule": "constant", "warmup_epochs": 0}
        curves = {}
        for num_epochs in (1, 2, 3):
            out_dir = f"epochs_{num_epochs}"
            record, _ = self.train(MNIST_HVAE_Ladder, out_dir, num_epochs=num_epochs, **flags)
            curves[num_epochs] = record["curves"]["test_elbo"]
        self.assertEqual(curves[1], curves[3][:1])
        self.assertEqual(curves[2], curves[3][:2])
        # Training raises it.
        self.assertEqual(curves[3], sorted(curves[3]))

    def test_weights_that_are_not_finite(self):
        """The last step of the first epoch spoils the weights, which no loss of the epoch shows.

        The setting has diverged in this epoch, and its curves end before it.
        """
        update = deep.WeightAverage.update
        steps = itertools.count(1)

        def spoil_the_eighth(average, model):
            update(average, model)
            if next(steps) == 8:
                with torch.no_grad():
                    for p in (*model.parameters(), *average.module.parameters()):
                        p.fill_(float("nan"))

        argv = self.argv(
            MNIST_HVAE_Ladder,
            "runs",
            side=14,
            latents="2",
            num_epochs=3,
            batch_size=32,
            test_curve=True,
        )
        with mock.patch.object(deep.WeightAverage, "update", spoil_the_eighth):
            status, out, err = small.call(MNIST_HVAE_Ladder.main, *argv)
        self.assertEqual(status, 1, err)
        self.assertIn("diverged in epoch 1; the last finite loss was", out)
        record = read_json(self.run_folder(MNIST_HVAE_Ladder, "runs") / "training.json")
        self.assertEqual(record["diverged"]["epoch"], 1)
        self.assertEqual(set(map(len, record["curves"].values())), {0})
        # No more steps were made.
        self.assertEqual(next(steps), 9)

    def test_is_in_the_result_and_stays_in_another_evaluation(self):
        """A finished run keeps the curve of its training, also for fewer test images."""
        flags = {"latents": "2", "test_curve": True}
        record, _ = self.train(MNIST_HVAE_Ladder, "runs", **flags)
        [folder] = (self.folder / "runs" / "MNIST_HVAE_Ladder").glob("*/")
        self.assertEqual(read_json(folder / "result.json")["curves"], record["curves"])

        argv = self.argv(
            MNIST_HVAE_Ladder,
            "runs",
            **flags,
            side=14,
            num_epochs=2,
            batch_size=32,
            num_test=10,
        )
        with mock.patch.object(pictures, "draw_run"), WITHOUT_HEADROOM:
            status, out, err = small.call(MNIST_HVAE_Ladder.main, *argv)
        self.assertEqual(status, 0, err)
        self.assertIn("already trained", err)
        self.assertIn("256 training and 10 test examples", out)
        [again] = (self.folder / "runs" / "MNIST_HVAE_Ladder").glob("*num_test=10,*/")
        self.assertEqual(read_json(again / "result.json")["curves"], record["curves"])

    def test_its_axis_counts_test_examples(self):
        from matplotlib.figure import Figure

        for title, label in (
            ("test_elbo", "nats per test example"),
            ("loss", "nats per training example"),
        ):
            ax = Figure().subplots()
            pictures.plot_training(ax, title, [-3.0, -2.0])
            self.assertEqual((ax.get_title(), ax.get_ylabel()), (title, label))


class Smaller(WithScripts):
    """--side and --num_train, from the command line to the tables."""

    def setUp(self):
        super().setUp()
        small.write_mnist(self.folder / "data")

    def test_results_are_complete(self):
        """Both measurements of --evaluate are made, and all pictures of one script are drawn."""
        cases = [(name, script, flags | {"side": 14}) for name, script, flags in CURVES]
        cases.append(("odd", MNIST_HVAE_Ladder, {"latents": "2", "side": 7}))
        for name, script, flags in cases:
            with self.subTest(name):
                argv = self.argv(
                    script,
                    name,
                    **flags,
                    num_train=100,
                    num_epochs=1,
                    num_samples=2,
                    batch_size=50,
                    evaluate="compression,attack",
                )
                with contextlib.ExitStack() as patches:
                    patches.enter_context(mock.patch.object(deep, "ATTACK_STEPS", 2))
                    if name != "dct":
                        patches.enter_context(mock.patch.object(pictures, "save_figure"))
                    status, out, err = small.call(script.main, *argv)
                self.assertEqual(status, 0, err)
                self.assertIn("100 training and 20 test examples", out)
                self.check_run(self.run_folder(script, name), drawn=name == "dct")

    def check_run(self, folder, drawn):
        metrics = read_json(folder / "result.json")["metrics"]
        self.assertTrue(np.isfinite(list(metrics.values())).all())
        # There is a headroom, though the model has fewer training images than it may use.
        self.assertIn("headroom_1", metrics)

        # All latent maps have 7x7 numbers.
        with np.load(folder / "units.npz") as arrays:
            self.assertEqual(arrays["unit_kl_1"].shape, (20, 49))

        # There are two levels, of which none, the top one or both are sent.
        self.assertEqual(len(read_json(folder / "compression.json")["bits"]), 3)
        self.assertEqual(len(read_json(folder / "attack.json")["rows"]), len(deep.RADII))
        expected = set()
        if drawn:
            expected = {"collapse", "reconstructions", "samples", "training", "headroom"}
            expected |= {"compression", "attack"}
        self.assertEqual({path.stem for path in folder.glob("*.png")}, expected)

    def test_number_of_training_examples(self):
        """A number above the size of the data set takes all. A batch needs enough of them."""
        flags = {"side": 14, "latents": "1", "num_epochs": 1}
        with mock.patch.object(pictures, "draw_run"), WITHOUT_HEADROOM:
            for num_train, count in ((0, 256), (2, 2), (255, 255), (257, 256)):
                argv = self.argv(
                    MNIST_HVAE_Ladder,
                    f"runs_{num_train}",
                    num_train=num_train,
                    batch_size=min(count, 100),
                    **flags,
                )
                status, out, err = small.call(MNIST_HVAE_Ladder.main, *argv)
                self.assertEqual(status, 0, err)
                self.assertIn(f"{count} training and 20 test examples", out)

        argv = self.argv(MNIST_HVAE_Ladder, "x", num_train=99, batch_size=100, **flags)
        status, _, err = small.call(MNIST_HVAE_Ladder.main, *argv)
        self.assertEqual(status, 2)
        self.assertIn("--batch_size: got 100 for each of 1 process(es), wants at most 99", err)

    def test_grid_of_sides(self):
        """A contact sheet has the images of all sides."""
        argv = self.argv(
            MNIST_HVAE_Ladder,
            "runs",
            side="7,14",
            beta="0.5,1",
            latents="1",
            num_epochs=1,
            batch_size=128,
        )
        with mock.patch.object(pictures, "draw_run"), WITHOUT_HEADROOM:
            with mock.patch.object(pictures, "save_figure"):
                status, out, err = small.call(MNIST_HVAE_Ladder.main, *argv)
        self.assertEqual(status, 0, err)
        settings = [line.split()[:2] for line in out.strip().split("\n")[1:6]]
        expected = [["beta", "side"], ["0.5", "7"], ["0.5", "14"], ["1.0", "7"], ["1.0", "14"]]
        self.assertEqual(settings, expected)

        # The sheet has a row for each beta and a column for each side. Images of 7x7 are in the
        # corners of their tiles.
        [path] = self.folder.rglob("reconstructions.npz")
        with np.load(path) as arrays:
            sheet = arrays["images_1"]
        self.assertEqual(sheet.shape[:2] + sheet.shape[3:], (2, 2, 1, 14, 14))
        self.assertFalse(sheet[:, 0, :, :, :, 7:].any())
        self.assertTrue(sheet[:, 0, :, :, :7, :7].all())
        self.assertTrue(sheet[:, 1].all())


class Kills:
    """In place of Checkpoint.write: now and then an InterruptedError follows the write.

    intervals are the numbers of checkpoints until each kill.
    """

    def __init__(self, intervals):
        self.write = training.Checkpoint.write
        self.intervals = list(reversed(intervals))
        self.to_go = self.intervals.pop()
        # The phases of training that have left a checkpoint.
        self.phases = set()

    def __call__(self, checkpoint, state):
        self.write(checkpoint, state)
        self.phases.add(list(state)[-1])
        self.to_go -= 1
        if self.to_go == 0:
            if self.intervals:
                self.to_go = self.intervals.pop()
            raise InterruptedError


class Killed(WithScripts):
    def test_goes_on_to_the_same_numbers(self):
        """Each script is killed right after a checkpoint, at several steps and in every phase.

        Curves and weights are equal bit by bit.
        """
        small.write_mnist(self.folder / "data")
        # Only the training matters here. Pictures and headrooms would take most of the time.
        with mock.patch.object(pictures, "draw_run"), WITHOUT_HEADROOM:
            for script in SMALL:
                with self.subTest(script=script.__name__):
                    phases = {"", "auxiliary"} if script is MNIST_VAE_Delta else {""}
                    self.check_script(script, phases, intervals=(1, 4, 2, 3))

    def test_curve_of_the_test_images(self):
        """It is the same after three kills.

        They follow the last step of the first epoch, a step within the second one, and the last
        step of the training.
        """
        small.write_mnist(self.folder / "data")
        with mock.patch.object(pictures, "draw_run"), WITHOUT_HEADROOM:
            for name, script, flags in CURVES:
                with self.subTest(name):
                    flags = {"side": 14, "test_curve": True} | flags
                    curves = self.check_script(
                        script, {""}, intervals=(4, 2, 2), folder=name, **flags)
                    self.assertEqual(len(curves["test_elbo"]), 2)

    def check_script(self, script, phases, intervals, folder="", **flags):
        """Check one script with two epochs of four steps in each phase. Returns its curves.

        Each step writes a checkpoint. intervals are those of `Kills`.
        """
        flags = flags | {
            "num_epochs": 2,
            "batch_size": 64,
            "checkpoint_seconds": 0,
            "beta_warmup": 1.5,
        }

        # 1. An undisturbed run.
        undisturbed = f"{folder}undisturbed"
        status, _, err = small.call(script.main, *self.argv(script, undisturbed, **flags))
        self.assertEqual(status, 0, err)
        record, weights = self.trained(script, undisturbed)

        # 2. A run that is killed until it ends.
        kills = Kills(intervals)
        steps = 8 * len(phases)
        # Kills that would follow the last step do not happen.
        expected_kills = sum(step <= steps for step in itertools.accumulate(intervals))
        killed = f"{folder}killed"
        argv = self.argv(script, killed, **flags)
        count = 0
        status = None

        def write(checkpoint, state):
            kills(checkpoint, state)

        with mock.patch.object(training.Checkpoint, "write", write):
            while status is None:
                try:
                    status, _, err = small.call(script.main, *argv)
                except InterruptedError:
                    count += 1
        self.assertEqual((status, count), (0, expected_kills), err)
        self.assertIn("resuming after ", err)
        self.assertEqual(kills.phases, phases)

        # 3. Both are the same.
        record_again, weights_again = self.trained(script, killed)
        self.assertEqual(record_again, record)
        self.assert_equal_weights(weights_again, weights)
        checkpoints = self.folder / killed / script.__name__ / "checkpoints"
        self.assertFalse(checkpoints.exists())
        return record["curves"]

    def test_more_rows_than_there_are(self):
        small.write_mnist(self.folder / "data")
        argv = self.argv(MNIST_HVAE_Ladder, "x", batch_size=257)
        status, _, err = small.call(MNIST_HVAE_Ladder.main, *argv)
        self.assertEqual(status, 2)
        message = (
            "--batch_size: got 257 for each of 1 process(es), wants at most 256 in all")
        self.assertIn(message, err)


class ManyProcesses(WithScripts):
    def test_two_are_one_with_the_doubled_batch(self):
        """Two processes have the curves of one process with batches twice as large.

        Each script makes five steps. All run in one program, so that the processes start once.
        """
        # There are more test images than one process or two take in a step.
        small.write_mnist(self.folder / "data", n_train=64, n_test=80)
        flags = {}
        for script in SMALL:
            flags[script] = {"num_epochs": 5}
            if script in HIERARCHIES:
                flags[script] |= {"test_curve": True, "num_test": 80}

        # 1. Two processes.
        commands = {}
        for script in SMALL:
            commands[script.__name__] = self.argv(script, "two", batch_size=32, **flags[script])
        program = self.folder / "all_scripts.py"
        code = (
            "import importlib\n"
            "import common\n"
            "import headroom\n"
            "headroom.measure = lambda *args, **kwargs: {}\n"
            f"commands = {commands!r}\n"
            "def main():\n"
            "    statuses = []\n"
            "    for name, argv in commands.items():\n"
            "        statuses.append(importlib.import_module(name).main(argv))\n"
            "    return max(statuses)\n"
            "common.run(main)\n"
        )
        program.write_text(code, encoding="utf-8")
        pair, _, errs = small.two_processes(self, program, [], self.folder, "two")
        statuses = small.exit_statuses(pair, 300)
        self.assertEqual(statuses, [0, 0], [err.read_text(encoding="utf-8") for err in errs])

        # 2. One process.
        for script in SMALL:
            argv = self.argv(script, "one", batch_size=64, **flags[script])
            with mock.patch.object(pictures, "draw_run"), WITHOUT_HEADROOM:
                status, _, err = small.call(script.main, *argv)
            self.assertEqual(status, 0, err)

        # 3. Their curves.
        for script in SMALL:
            one = self.trained(script, "one")[0]["curves"]
            two = self.trained(script, "two")[0]["curves"]
            self.assertEqual(one.keys(), two.keys())
            self.assertEqual("test_elbo" in one, script in HIERARCHIES)
            self.assertEqual(len(one["loss"]), 5)
            for name, curve in one.items():
                np.testing.assert_allclose(
                    two[name],
                    curve,
                    rtol=1e-4,
                    atol=1e-4,
                    err_msg=f"{script.__name__} {name}",
                )


@unittest.skipIf(os.name == "nt", "Windows has no SIGTERM that a process can handle")
class Stopped(WithScripts):
    def test_processes_agree_to_stop(self):
        """SIGTERM reaches two processes 20 ms or 2 s apart, in either order.

        Both end with one line and leave a checkpoint. From the last checkpoint both go on to the
        numbers of an undisturbed run.
        """
        small.write_mnist(self.folder / "data")
        self.write_slow_program()

        # 1. An undisturbed run.
        pair, logs = self.start("undisturbed", 0)
        self.check_statuses(pair, logs, [0, 0])

        # 2. Four runs that are stopped. All except the first go on from a checkpoint.
        resumed = 0
        cases = ((0, 0.02), (1, 0.02), (0, 2.0), (1, 2.0))
        for number, (first, seconds) in enumerate(cases):
            pair, logs = self.start("stopped", number)
            self.wait_for_training(logs)
            os.kill(pair[first].pid, signal.SIGTERM)
            time.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pair[1 - first].pid, signal.SIGTERM)

            texts = self.check_statuses(pair, logs, [128 + signal.SIGTERM] * 2)
            for text in texts:
                self.assertEqual(text.count("interrupted; finished work is kept"), 1, text)
                self.assertNotIn("Traceback", text)
            checkpoints = list((self.folder / "stopped").rglob("checkpoints/*.pt"))
            self.assertEqual(len(checkpoints), 1)
            resumed += "resuming after " in texts[0]
        self.assertEqual(resumed, 3)

        # 3. The run that ends.
        pair, logs = self.start("stopped", 4)
        self.check_statuses(pair, logs, [0, 0])
        record, weights = self.trained(MNIST_HVAE_Ladder, "undisturbed")
        record_again, weights_again = self.trained(MNIST_HVAE_Ladder, "stopped")
        self.assertEqual(record_again, record)
        self.assert_equal_weights(weights_again, weights)

    def write_slow_program(self):
        """Write a program that trains a Ladder VAE and sleeps for 30 ms after each step.

        So the training of a small model is long enough to be stopped four times.
        """
        self.program = self.folder / "slow_ladder.py"
        self.program.write_text(
            "import time\n"
            "import common\n"
            "import headroom\n"
            "import MNIST_HVAE_Ladder\n"
            "import training\n"
            "headroom.measure = lambda *args, **kwargs: {}\n"
            "record = training.Training.record\n"
            "def record_slowly(loop, means):\n"
            "    record(loop, means)\n"
            "    time.sleep(0.03)\n"
            "training.Training.record = record_slowly\n"
            "common.run(MNIST_HVAE_Ladder.main)\n",
            encoding="utf-8",
        )

    def start(self, out_dir, number):
        """Start two processes. Returns them and their error files."""
        argv = self.argv(
            MNIST_HVAE_Ladder,
            out_dir,
            side=7,
            latents="1",
            num_epochs=20,
            batch_size=24,
            checkpoint_seconds=1000,
            test_curve=True,
        )
        pair, _, logs = small.two_processes(
            self, self.program, argv, self.folder, f"{out_dir}{number}")
        return pair, logs

    def wait_for_training(self, logs):
        """Wait, at most a minute, until both processes train."""
        deadline = time.monotonic() + 60
        for log in logs:
            while time.monotonic() < deadline:
                if log.exists() and "training: epoch" in log.read_text(encoding="utf-8"):
                    break
                time.sleep(0.01)

    def check_statuses(self, pair, logs, expected):
        """Wait until both processes end. Returns what they wrote to stderr."""
        statuses = small.exit_statuses(pair)
        texts = [log.read_text(encoding="utf-8") for log in logs]
        self.assertEqual(statuses, expected, texts)
        return texts


class Steps(unittest.TestCase):
    def setUp(self):
        self.optimizer = torch.optim.Adamax([torch.nn.Parameter(torch.zeros(1))], lr=0.01)

    def test_schedule(self):
        """The learning rate rises along a line over the warm-up, then falls as a cosine."""
        f = MNIST_HVAE_Ladder.Flags(num_epochs=10, warmup_epochs=2.0, lr=0.01, lr_end=1e-4)
        schedule = deep.warmup_cosine(self.optimizer, f, 1000)
        rates = []
        for _ in range(1000):
            rates.append(self.optimizer.param_groups[0]["lr"])
            self.optimizer.step()
            schedule.step()
        np.testing.assert_allclose(np.diff(rates[:200]), 0.01 / 201)
        progress = np.arange(800) / 800
        expected = 1e-4 + (0.01 - 1e-4) * (1 + np.cos(np.pi * progress)) / 2
        np.testing.assert_allclose(rates[200:], expected)

    def test_constant_rate_after_the_warm_up(self):
        f = MNIST_HVAE_Ladder.Flags(lr_schedule="constant")
        [factor] = deep.warmup_cosine(self.optimizer, f, 1000).lr_lambdas
        self.assertEqual([factor(50), factor(999)], [1.0, 1.0])

    def test_what_a_captured_step_changes_lies_on_the_device(self):
        """The learning rate and the optimiser's count of steps do, after a checkpoint, too.

        So no step makes the host wait for the GPU.
        """
        parameter = mock.Mock(is_cuda=True, device="cpu")
        model = mock.Mock(parameters=lambda: iter([parameter]))
        for name, class_name in (("adamax", "Adamax"), ("adamw", "AdamW")):
            f = MNIST_HVAE_Ladder.Flags(lr=0.01, optimizer=name)
            with mock.patch.object(torch.optim, class_name) as Optimizer:
                deep.make_optimizer(model, f, 0.5)
            arguments = Optimizer.call_args.kwargs
            self.assertTrue(arguments["capturable"])
            self.assertTrue(torch.is_tensor(arguments["lr"]))
            self.assertEqual(arguments["weight_decay"], 0.5)

    def test_weight_average(self):
        f = MNIST_HVAE_Ladder.Flags(ema=0.9)
        model = torch.nn.Linear(1, 1, bias=False).double()
        average = deep.WeightAverage(model, f)
        expected = None
        for value in (3.0, -1.0, 5.0, 2.0):
            with torch.no_grad():
                model.weight.fill_(value)
            average.update(model)
            expected = value if expected is None else 0.9 * expected + 0.1 * value
        self.assertAlmostEqual(average.module.weight.item(), expected, places=12)
        self.assertFalse(average.module.weight.requires_grad)

    def test_random_flip(self):
        """About half of the images are mirrored left to right. The others stay as they are."""
        torch.manual_seed(0)
        x = torch.rand(400, 3, 4, 4)
        flipped = deep.random_flip(x)
        is_same = (flipped == x).flatten(1).all(1)
        mirrored = x[~is_same][..., [3, 2, 1, 0]]
        self.assertTrue(torch.equal(flipped[~is_same], mirrored))
        count = is_same.sum().item()
        self.assertGreater(min(count, 400 - count), 150)


class Presets(unittest.TestCase):
    def test_preset(self):
        """It abbreviates the flags that --help shows. All others overrule them, anywhere."""
        for script in SMALL:
            with self.subTest(script=script.__name__):
                self.check_preset(script)

    def check_preset(self, script):
        words = script.Flags.small.split()
        names = [word.removeprefix("--") for word in words[::2]]
        preset = dict(zip(names, words[1::2]))
        expected = preset | {"num_epochs": "3"}
        for argv in (
            ["--preset", "small", "--num_epochs", "3"],
            ["--num_epochs", "3", "--preset=small"],
        ):
            [f] = common.parse_flags(script.Flags, argv)
            self.assertEqual((f.num_epochs, f.preset), (3, "published"))
            for name, value in expected.items():
                self.assertEqual(str(getattr(f, name)), value, name)
            self.assertEqual(files.changed_settings(f, None).keys(), set(expected))
        self.assertEqual(common.parse_flags(script.Flags, []), [script.Flags()])

        if script in HIERARCHIES:
            argv = ["--side", "14", "--latents", "4", "--num_train", "10", "--context_size", "4"]
            if script is MNIST_HVAE_Ladder:
                argv = argv[:-2]
            [f] = common.parse_flags(script.Flags, [*argv, "--preset", "small", "--test_curve"])
            self.assertEqual((f.side, f.latents, f.num_train, f.test_curve), (14, "4", 10, True))
            self.assertEqual(f.num_epochs, int(preset["num_epochs"]))
            # The scales of the preset are those of larger images.
            status, _, err = small.call(script.main, "--side", 14, "--preset", "small")
            self.assertEqual((status, err.count("\n")), (2, 1))
            self.assertIn("--latents: got '2,2', wants", err)

        for wrong in ("large", "small,published"):
            status, out, err = small.call(script.main, "--preset", wrong)
            self.assertEqual((status, out, err.count("\n")), (2, "", 1))
            self.assertIn("--preset: got ", err)


class Losses(unittest.TestCase):
    def test_loss_with_beta_and_free_bits(self):
        """The loss is -log p(x|z) + beta sum_l sum_i KL_li.

        If the mean of KL_li over the batch is below --free_bits, these take its place. The KL of
        a context counts as it is, since nothing is learned about it.
        """
        torch.manual_seed(0)
        tiny = {"latents": "1,1", "num_ch": 2}
        cases = (
            (MNIST_HVAE_Ladder, "LadderVAE", tiny, ["kl_1", "kl_2"], None),
            (MNIST_HVAE_DCT, "DCTVAE", tiny, ["kl_1", "kl_2", "kl_3"], "kl_3"),
            (MNIST_HVAE_DVP, "DVPVAE", tiny, ["kl_1", "kl_2", "kl_3"], "kl_3"),
            (MNIST_VAE_Delta, "DeltaVAE", {}, ["kl"], None),
        )
        for script, class_name, flags, names, context in cases:
            f = script.Flags(beta=0.7, free_bits=0.4, device="cpu", **flags)
            model = getattr(script, class_name)(f)
            terms = {"log_px_z": torch.randn(5)}
            for name in names:
                terms[name] = torch.rand(5, 4)

            expected = -terms["log_px_z"].mean()
            for name in names:
                unit_kls = terms[name].mean(0)
                if name != context:
                    unit_kls = unit_kls.clamp(min=0.4)
                expected = expected + 0.7 * unit_kls.sum()
            loss = model.loss(terms, common.on_device(f, torch.zeros(1))).mean()
            self.assertAlmostEqual(loss.item(), expected.item(), places=5)


class Temperature(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)

    @torch.no_grad()
    def test_temperature_scales_the_std_of_each_prior(self):
        """Samples at temperature 0 are the priors' means.

        At 2, with half the noise, they are as at 1.
        """
        # Each script with its model, and the part of it that draws the context.
        cases = (
            (MNIST_HVAE_Ladder, "LadderVAE", None),
            (MNIST_HVAE_DCT, "DCTVAE", "p_c"),
            (MNIST_HVAE_DVP, "DVPVAE", "r"),
        )
        for script, class_name, prior_of_context in cases:
            flags = {"latents": "1,1", "num_ch": 2, "device": "cpu"}
            if prior_of_context is not None:
                flags["diffusion_ch"] = 2
            f = script.Flags(**flags)
            model = getattr(script, class_name)(f).eval()
            if prior_of_context is not None:
                getattr(model, prior_of_context).sample = lambda *args: torch.zeros(2, 1, 7, 7)

            def samples(temperature, noise_scale):
                noise = []
                for side in (7, 14):
                    random = torch.Generator().manual_seed(side)
                    noise.append(noise_scale * torch.randn(2, 1, side, side, generator=random))
                warm = dataclasses.replace(f, temperature=temperature)
                with mock.patch.object(processes, "normal_like", side_effect=noise):
                    images = model.samples(2, warm)
                return list(images.values())[-1] if isinstance(images, dict) else images

            with self.subTest(script=script.__name__):
                torch.testing.assert_close(samples(2.0, 0.5), samples(1.0, 1.0))
                torch.testing.assert_close(samples(0.0, 3.0), samples(1.0, 0.0))
                change = (samples(1.0, 1.0) - samples(0.0, 1.0)).abs().max().item()
                self.assertGreater(change, 1e-4)

    def delta_vae(self):
        f = MNIST_VAE_Delta.Flags(d_hidden=4, num_ch=2, device="cpu")
        model = MNIST_VAE_Delta.DeltaVAE(f).float().eval()
        with torch.no_grad():
            model.auxiliary.of_step.normal_()
        return model

    def seeded(self, sample, temperature):
        """sample(3, temperature), always from the same seed."""
        torch.manual_seed(0)
        return sample(3, temperature)

    @torch.no_grad()
    def test_temperature_of_the_ar1_prior(self):
        """At 0 it gives its mean, which is 0. At 2 its draws are twice as far as at 1."""
        model = self.delta_vae()
        cold = self.seeded(model.sample_z, 0.0)
        self.assertFalse(cold.any())
        hot = self.seeded(model.sample_z, 2.0)
        torch.testing.assert_close(hot, 2 * self.seeded(model.sample_z, 1.0))

    @torch.no_grad()
    def test_temperature_of_the_auxiliary_prior(self):
        """At 0 all draws are alike, and begin at the mean of p(z_1)."""
        model = self.delta_vae()
        cold = self.seeded(model.auxiliary.sample, 0.0)
        warm = self.seeded(model.auxiliary.sample, 1.0)
        hot = self.seeded(model.auxiliary.sample, 2.0)
        torch.testing.assert_close(cold[1:], cold[:2])
        torch.testing.assert_close(cold[0, 0], model.auxiliary.of_step[0, :4])
        first_steps = warm[:, 0] - cold[:, 0]
        torch.testing.assert_close(hot[:, 0] - cold[:, 0], 2 * first_steps)

    @torch.no_grad()
    def test_samples_of_the_delta_vae_use_the_temperature(self):
        """Both priors, at temperature 0 and at 1: whether the latents of several draws differ."""
        model = self.delta_vae()
        latents = []
        with mock.patch.object(model.decoder, "sample", latents.append):
            for temperature in (0.0, 1.0):
                f = MNIST_VAE_Delta.Flags(temperature=temperature, device="cpu")
                model.samples(3, f)
        differ = [bool((z - z[:1]).any()) for z in latents]
        self.assertEqual(differ, [False, False, True, True])


class LinearTop(torch.nn.Module):
    """One latent with q(z|x) = N(w x, 1) and p(z) = N(0, 1). Every pixel is decoded to w x."""

    levels = 1
    learned_levels = 1

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(4)
        self.w = torch.nn.Parameter(torch.randn(784, generator=random) / 28)

    def forward(self, x, f, sample_shape=()):
        mean = (x.flatten(1) @ self.w)[:, None].expand(*sample_shape, -1, -1)
        return {"kl_1": mean**2 / 2, "log_px_z": mean[..., 0]}

    def top_posterior(self, x, f, levels):
        return [Normal((x.flatten(1) @ self.w)[:, None], torch.ones(len(x), 1))]

    def reconstruct(self, x, f, keep):
        z = x.flatten(1) @ self.w * (keep > 0)
        return z.view(-1, 1, 1, 1).expand(-1, 1, 28, 28)


class Measurements(small.InFolder):
    """The measurements of --evaluate."""

    def setUp(self):
        super().setUp()
        random = torch.Generator().manual_seed(1)
        # No ball of the attack leaves [0, 1].
        self.x = 0.3 + 0.4 * torch.rand(6, 1, 28, 28, generator=random)
        self.data = datasets.Data("digits", (self.x,), (self.x,))
        self.model = LinearTop()
        self.f = MNIST_HVAE_Ladder.Flags(out_dir=str(self.folder), device="cpu")

    def evaluate(self, name, model):
        """Make a measurement of this model, or show the one that is in the run's folder.

        Returns what is printed to stdout and to stderr, and the path of the .json file.
        """
        f = dataclasses.replace(self.f, evaluate=name)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            deep.evaluate_further([training.TrainedRun(f, self.data, model, None)])
        path = files.run_dir(f, self.data) / f"{name}.json"
        return out.getvalue(), err.getvalue(), path

    def measure(self, name):
        """The .json file of a measurement. A second time it is shown and nothing is measured."""
        out, err, path = self.evaluate(name, self.model)
        # This object can do nothing that a model can.
        out_again, err_again, _ = self.evaluate(name, object())
        self.assertEqual(out_again, out)
        self.assertEqual((err, err_again), ("", ""))
        self.assertIn("seed=0, 6 test images: ", out)
        picture = path.with_suffix(".png").read_bytes()
        self.assertTrue(picture.startswith(small.PNG))
        return read_json(path)

    def test_attack_finds_the_corner(self):
        """The symmetric KL is (w (x' - x))^2.

        It is largest in the corner radius sign(w): (radius |w|_1)^2. Each of the 784 pixels of
        the reconstruction moves by its root.
        """
        attack = self.measure("attack")
        norm = self.model.w.detach().abs().sum().item()
        self.assertEqual(len(attack["rows"]), len(deep.RADII))
        for row in attack["rows"]:
            radius = row["radius"]
            largest = (radius * norm) ** 2
            self.assertAlmostEqual(row["symmetric_kl"], largest, delta=1e-3 * largest)
            distance = 28 * radius * norm
            self.assertAlmostEqual(row["distance"], distance, delta=1e-3 * 28 * norm)
            if radius:
                self.assertLess(row["symmetric_kl_random"], 0.1 * row["symmetric_kl"])
        self.assertTrue(self.model.w.requires_grad)

    def test_compression(self):
        compression = self.measure("compression")
        z = self.x.flatten(1) @ self.model.w.detach()
        bits = [0, (z**2 / 2).mean() / np.log(2)]
        np.testing.assert_allclose(compression["bits"], bits, rtol=1e-5)
        reconstruction = z.view(-1, 1, 1, 1)
        errors = [(self.x**2).mean(), (self.x - reconstruction).square().mean()]
        np.testing.assert_allclose(compression["squared_error"], errors, rtol=1e-5)

    def test_files_that_are_not_whole_are_measured_again(self):
        """One line names the file. Then the file is as before."""
        for name in ("compression", "attack"):
            # The attack takes one step and no picture is drawn, to save time.
            with mock.patch.object(deep, "ATTACK_STEPS", 1):
                with mock.patch.object(pictures, "save_figure"):
                    self.check_wrong_contents(name)

    def check_wrong_contents(self, name):
        out, _, path = self.evaluate(name, self.model)
        whole = read_json(path)
        for wrong in self.wrong_contents(whole):
            with self.subTest(name=name, wrong=wrong):
                path.write_text(wrong, encoding="utf-8")
                out_again, err, _ = self.evaluate(name, self.model)
                self.assertEqual(out_again, out)
                self.assertEqual(err.count("\n"), 1, err)
                self.assertIn(str(path), err)
                self.assertEqual(read_json(path), whole)

    def wrong_contents(self, whole):
        """Contents of a .json file that are no whole measurement of this run."""
        contents = ["", "null", "[]", "3", "{", "{}"]
        # One key is missing, or has another value.
        for field in ("images", "levels", "rows", "bits", "squared_error"):
            if field not in whole:
                continue
            without = {key: value for key, value in whole.items() if key != field}
            contents.append(json.dumps(without))
            for value in (None, [], {}, [None], "x", float("nan"), [float("inf")]):
                contents.append(json.dumps(whole | {field: value}))
        if "rows" in whole:
            # The first row of the attack is not whole.
            first, *others = whole["rows"]
            for row in (1.0, {"radius": 0.0}, first | {"distance": None}):
                contents.append(json.dumps(whole | {"rows": [row, *others]}))
        contents.append(json.dumps(whole | {"settings": []}))
        contents.append(json.dumps(whole | {"settings": whole["settings"] | {"seed": 1}}))
        return contents

    def test_numbers_that_are_not_finite_leave_no_file(self):
        with torch.no_grad():
            self.model.w.fill_(float("nan"))
        for name in ("compression", "attack"):
            with mock.patch.object(deep, "ATTACK_STEPS", 2):
                out, err, path = self.evaluate(name, self.model)
            self.assertEqual((out, err.count("\n")), ("", 1))
            self.assertIn(f"{name} is left out", err)
            self.assertFalse(path.exists())

    def test_wrong_name_ends_the_program(self):
        status, _, err = small.call(
            MNIST_HVAE_Ladder.main, "--evaluate", "compression,attak", "--out_dir", self.folder)
        self.assertEqual(status, 2)
        self.assertIn(
            "--evaluate: got 'attak', wants compression or attack, or both joined by a comma", err)


if __name__ == "__main__":
    unittest.main()
