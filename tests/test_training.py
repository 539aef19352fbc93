"""training.fit: its numbers, and what it does about finished, diverged and interrupted runs.

The numbers are those of a plain loop, for one setting or many side by side, and the same each time.
"""
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import shutil
import signal
import threading
import unittest
from pathlib import Path
from unittest import mock

import common
import torch

import datasets
import files
import MNIST_HVAE_Ladder
import MNIST_HVAE_Relu
import Synthetic_CVAE_Relu_correlation
import training
from tests import small


def flags(Flags=small.Flags, **values):
    defaults = {"batch_size": 32, "num_epochs": 2, "num_samples": 0, "device": "cpu"}
    return Flags(**(defaults | values))


def relu_flags(**values):
    """Flags of a small nonlinear HVAE."""
    return flags(MNIST_HVAE_Relu.Flags, **({"d_hidden": 20, "d_1": 4, "d_2": 3} | values))


def train(Model, group, data):
    """training.train_group without its output: a list of TrainedRun."""
    with mock.patch("sys.stderr"):
        return training.train_group(Model, group, data)


def states(runs):
    """The weights of trained runs, a list of state_dicts."""
    return [run.model.state_dict() for run in runs]


def saved_weights(f, data):
    """The weights in a run's model.pt, a state_dict."""
    return torch.load(files.run_dir(f, data) / "model.pt", weights_only=True)


def saved_record(f, data):
    """The content of a run's training.json, except the seconds, which the clock decides."""
    record = files.read_matching(f, data, "training.json")
    del record["seconds"]
    return record


def bytes_of(value):
    """The bytes that torch.save writes for a value."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class SameNumbers(unittest.TestCase):
    # Settings of a grid: scalars of the objective.
    grid = [
        {"beta_1": 0.1, "eta_dec": 0.5},
        {"beta_1": 2.0, "eta_dec": 0.9},
        {"beta_2": 3.0, "sigma_1": 0.2},
    ]

    def assert_close(self, a, b, tolerance):
        for name in a:
            self.assertLessEqual((a[name] - b[name]).abs().max().item(), tolerance, name)

    def test_like_a_plain_loop(self):
        # 100 = 3 x 32 + 4, so the last batch is a small one.
        data = small.digit_data(100)
        ends = []
        for schedule in ("constant", "cosine"):
            f = relu_flags(beta_1=0.3, beta_2=2.0, eta_dec=0.8, lr_schedule=schedule)
            [run] = train(MNIST_HVAE_Relu.HVAE, [f], data)
            ends.append(run.model.state_dict())
            plain = small.plain_train(MNIST_HVAE_Relu.HVAE, f, data)
            self.assert_close(ends[-1], plain.state_dict(), 1e-12)
            lengths = [len(curve) for curve in run.record.curves.values()]
            self.assertEqual(lengths, [2] * 4)

        # The schedule makes a difference.
        constant, cosine = [end["z1_to_x.2.weight"] for end in ends]
        self.assertFalse(torch.allclose(constant, cosine, atol=1e-6))

    def test_remedies_like_a_plain_loop(self):
        """Beta rises from 0, once or in cycles, and free bits cost nothing: alone and in a grid."""
        data = small.digit_data(100)
        cases = (
            ({"beta_warmup": 1.5}, lambda epochs: min(1, epochs / 1.5)),
            ({"beta_cycles": 2}, lambda epochs: min(1, epochs % 2 / 1)),
            ({"beta_cycles": 2, "beta_warmup": 0.5}, lambda epochs: min(1, epochs % 2 / 0.5)),
            ({"free_bits": 0.3}, lambda epochs: 1),
        )
        without = small.plain_train(MNIST_HVAE_Relu.HVAE, relu_flags(num_epochs=4), data)
        without = without.state_dict()["z2_to_z1.2.weight"]
        for remedy, share in cases:
            settings = [relu_flags(num_epochs=4, beta_1=beta_1, **remedy) for beta_1 in (0.5, 2.0)]
            expected = []
            for f in settings:
                plain = small.plain_train(MNIST_HVAE_Relu.HVAE, f, data, share)
                expected.append(plain.state_dict())

            [alone] = train(MNIST_HVAE_Relu.HVAE, settings[:1], data)
            self.assert_close(alone.model.state_dict(), expected[0], 1e-12)
            in_grid = train(MNIST_HVAE_Relu.HVAE, settings, data)
            for state, wanted in zip(states(in_grid), expected):
                self.assert_close(state, wanted, 1e-10)

            # The remedy makes a difference.
            remedied = expected[0]["z2_to_z1.2.weight"]
            self.assertFalse(torch.allclose(without, remedied, atol=1e-6))

    def test_the_loss_is_the_plain_one_after_the_warm_up(self):
        f = relu_flags(num_epochs=4, beta_1=0.5, beta_warmup=1.5)
        [run] = train(MNIST_HVAE_Relu.HVAE, [f], small.digit_data(100))
        last = {name: curve[-1] for name, curve in run.record.curves.items()}
        plain_loss = last["reconstruction"] + 0.5 * last["kl_1"] + last["kl_2"]
        self.assertAlmostEqual(last["loss"], plain_loss, places=9)

    def test_a_warm_up_that_does_not_fit(self):
        data = small.digit_data(40)
        f = relu_flags(num_epochs=10, beta_cycles=4, beta_warmup=3.0)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            with self.assertRaises(SystemExit) as end:
                training.fit(MNIST_HVAE_Relu.HVAE, [f], [data])
        self.assertEqual(end.exception.code, 2)
        self.assertIn(
            "--beta_warmup: got 3, wants at most --num_epochs / --beta_cycles = 2.5",
            err.getvalue(),
        )

    def test_curves_are_means_over_examples(self):
        """A small last batch counts by its examples."""
        class Still(torch.nn.Module):
            def __init__(self, f):
                super().__init__()
                self.scale = torch.nn.Parameter(torch.ones(()))

            def forward(self, x, f, sample_shape=()):
                return {"log_px_z": self.scale * x[:, 0], "kl_1": self.scale * x[:, 1:3].abs()}

            def loss(self, terms, f):
                return -terms["log_px_z"] + f.beta_1 * terms["kl_1"].sum(-1)

        data = small.gaussian_data(100)
        [x] = data.train
        [run] = train(Still, [flags(beta_1=3.0, lr=1e-30)], data)
        expected = {
            "reconstruction": -x[:, 0].mean().item(),
            "kl_1": x[:, 1:3].abs().sum(1).mean().item(),
        }
        expected["loss"] = expected["reconstruction"] + 3 * expected["kl_1"]
        for name, value in expected.items():
            for mean in run.record.curves[name]:
                self.assertAlmostEqual(mean, value, places=9)

    def test_row_of_a_grid_like_alone_float64(self):
        """Eight steps of Adam, for a nonlinear model, clipped or not, and a linear one."""
        clipped = [relu_flags(**values) for values in self.grid]
        unclipped = [relu_flags(grad_clip=1e6, **values) for values in self.grid]
        linear = [flags(**values) for values in self.grid]
        cases = (
            (MNIST_HVAE_Relu.HVAE, small.digit_data(128), clipped),
            (MNIST_HVAE_Relu.HVAE, small.digit_data(128), unclipped),
            (small.LinearHVAE, small.gaussian_data(128), linear),
        )
        for Model, data, settings in cases:
            grid_runs = train(Model, settings, data)
            for f, in_grid in zip(settings, grid_runs):
                [alone] = train(Model, [f], data)
                self.assert_close(in_grid.model.state_dict(), alone.model.state_dict(), 1e-9)
                for name, curve in alone.record.curves.items():
                    for a, b in zip(curve, in_grid.record.curves[name], strict=True):
                        self.assertAlmostEqual(a, b, delta=1e-9 * max(1, abs(a)))

        # The settings do differ: this is no comparison of equals.
        difference = grid_runs[0].model.W1.weight - grid_runs[1].model.W1.weight
        self.assertGreater(difference.abs().max(), 1e-4)

    def test_row_of_a_grid_like_alone_float32(self):
        """One step at the published sizes."""
        data = small.digit_data(128, dtype=torch.float32)
        settings = []
        for values in self.grid:
            f = flags(MNIST_HVAE_Relu.Flags, batch_size=128, num_epochs=1, **values)
            settings.append(f)
        in_grid = states(train(MNIST_HVAE_Relu.HVAE, settings, data))
        for f, state in zip(settings, in_grid):
            [alone] = states(train(MNIST_HVAE_Relu.HVAE, [f], data))
            self.assert_close(state, alone, 1e-4)

    def test_random_numbers_of_others_are_left_alone(self):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        train(small.LinearHVAE, [flags()], small.gaussian_data())
        self.assertTrue(torch.equal(torch.rand(3), expected))

    def test_twice_the_same(self):
        data = small.digit_data(dtype=torch.float32)
        f = flags(MNIST_HVAE_Relu.Flags)
        [once] = train(MNIST_HVAE_Relu.HVAE, [f], data)
        [again] = train(MNIST_HVAE_Relu.HVAE, [f], data)
        self.assertEqual(once.record.curves, again.record.curves)
        for name, value in once.model.state_dict().items():
            self.assertTrue(torch.equal(value, again.model.state_dict()[name]), name)

        [other] = train(MNIST_HVAE_Relu.HVAE, [dataclasses.replace(f, seed=1)], data)
        self.assertNotEqual(once.record.curves, other.record.curves)


class SideBySide(small.InFolder):
    def test_side_by_side_or_one_after_another(self):
        data = small.gaussian_data()
        fitted = []
        for side_by_side in (True, False):
            out_dir = str(self.folder / str(side_by_side))
            settings = [flags(out_dir=out_dir, **values) for values in SameNumbers.grid]
            train_group = mock.patch("training.train_group", wraps=training.train_group)
            with mock.patch("sys.stderr"), train_group as spy:
                runs = training.fit(
                    small.LinearHVAE, settings, [data] * 3, side_by_side=side_by_side
                )
            self.assertEqual(spy.call_count, 1 if side_by_side else 3)
            for run, f in zip(runs, settings, strict=True):
                self.assertIs(run.f, f)
                self.assertIs(run.data, data)
                self.assertEqual(run.record.side_by_side, 3 if side_by_side else 1)
            fitted.append(states(runs))

        for together, alone in zip(*fitted):
            for name, value in together.items():
                torch.testing.assert_close(value, alone[name], rtol=0, atol=1e-9)


class Clipping(unittest.TestCase):
    def test_per_setting(self):
        """A setting with a huge gradient does not shrink its neighbour's."""
        # 1. Three settings: a usual gradient, a huge one and a tiny one.
        stacked = [torch.zeros(3, 4, 5, requires_grad=True), torch.zeros(3, 7, requires_grad=True)]
        for parameter in stacked:
            random = torch.Generator().manual_seed(parameter.numel())
            parameter.grad = torch.randn(parameter.shape, generator=random)
            parameter.grad[1] *= 1e6
            parameter.grad[2] *= 1e-3

        # 2. Each clipped by itself.
        expected = []
        for g in range(3):
            alone = [torch.zeros_like(parameter[g], requires_grad=True) for parameter in stacked]
            for parameter, stacked_parameter in zip(alone, stacked):
                parameter.grad = stacked_parameter.grad[g].clone()
            torch.nn.utils.clip_grad_norm_(alone, 0.5)
            expected.append([parameter.grad for parameter in alone])

        # 3. All clipped at once.
        training.clip_each(stacked, 0.5)
        for g in range(3):
            squares = [parameter.grad[g].square().sum().item() for parameter in stacked]
            norm = math.sqrt(sum(squares))
            if g < 2:
                self.assertAlmostEqual(norm, 0.5, places=4)
            else:
                self.assertLess(norm, 0.01)
            for parameter, gradient in zip(stacked, expected[g]):
                torch.testing.assert_close(parameter.grad[g], gradient, rtol=1e-6, atol=0)


class LateNan(small.LinearHVAE):
    """A model whose gradient is nan in one training step if beta_1 > 2. Its losses are finite."""

    # The number of calls so far, and the one with the gradient that is nan.
    calls = 0
    harmful_call = 2

    def forward(self, x, f, sample_shape=()):
        LateNan.calls += 1
        terms = super().forward(x, f, sample_shape)
        if LateNan.calls == self.harmful_call:
            # sqrt(0) - 0, or sqrt(1) - 1: the value is 0, but sqrt has an infinite slope at 0.
            switch = torch.where(f.beta_1 > 2, 0.0, 1.0)
            zero = (self.log_sigma_2.sum() * 0 + switch).sqrt() - switch
            terms["log_px_z"] = terms["log_px_z"] + zero
        return terms


class Divergence(small.InFolder):
    def test_reported_and_the_others_finish(self):
        """lr 1e3 with the model's bounded means: the loss explodes without ever being nan."""
        small.write_mnist(self.folder / "data")
        out_dir = self.folder / "runs"
        argv = ["--data_dir", self.folder / "data", "--out_dir", out_dir, "--num_epochs", 2]
        argv += ["--num_samples", 0, "--lr", "0.001,1000", "--d_hidden", 16]
        status, out, _ = small.call(MNIST_HVAE_Relu.main, *argv)
        self.assertEqual(status, 1)
        self.assertRegex(
            out,
            r"lr=1000.0,seed=0 diverged in epoch [12]; the last finite loss was \d+\.\d+\n",
        )
        # The other setting's row, with numbers.
        self.assertRegex(out, r"\n *0.001 +-\d+\.\d\d ")

        results = {}
        for path in (out_dir / "MNIST_HVAE_Relu").glob("*/result.json"):
            result = json.loads(path.read_text(encoding="utf-8"))
            results[result["settings"]["lr"]] = result
        self.assertEqual(set(results), {0.001, 1000})
        self.assertIsNone(results[0.001]["diverged"])
        self.assertTrue(math.isfinite(results[0.001]["metrics"]["elbo"]))
        self.assertIsNone(results[1000]["metrics"])

        # The exit status is the same when the results are shown again.
        self.assertEqual(small.call(MNIST_HVAE_Relu.main, *argv)[0], 1)

    def test_within_a_batched_group(self):
        """A level-2 weight so large that float32 overflows takes only its own setting along."""
        data = small.digit_data(dtype=torch.float32)
        settings = []
        for beta in (1.0, 1e38, 2.0):
            settings.append(flags(MNIST_HVAE_Relu.Flags, d_hidden=16, beta_2=beta))
        runs = train(MNIST_HVAE_Relu.HVAE, settings, data)
        self.assertIsNone(runs[1].model)
        self.assertEqual(runs[1].record.diverged.epoch, 1)
        for k in (0, 2):
            self.assertIsNone(runs[k].record.diverged)
            [alone] = train(MNIST_HVAE_Relu.HVAE, [settings[k]], data)
            for name, value in runs[k].model.state_dict().items():
                expected = alone.model.state_dict()[name]
                torch.testing.assert_close(value, expected, rtol=0, atol=1e-4)

    def fit_late_nan(self, betas, harmful_call):
        """training.fit for LateNan, two epochs of one step each."""
        out_dir = str(self.folder / str(harmful_call))
        settings = [flags(batch_size=128, beta_1=beta, out_dir=out_dir) for beta in betas]
        data = small.gaussian_data(100)
        LateNan.calls = 0
        with mock.patch("sys.stderr"), mock.patch.object(LateNan, "harmful_call", harmful_call):
            return training.fit(LateNan, settings, [data] * len(settings))

    def test_in_the_last_step(self):
        """The weights are not finite, although all losses were. No other setting is affected."""
        for betas in ([3.0], [0.5, 3.0, 1.0]):
            # 1. No call is harmful.
            undisturbed = self.fit_late_nan(betas, harmful_call=None)
            for run in undisturbed:
                self.assertIsNone(run.record.diverged)

            # 2. The last one is.
            runs = self.fit_late_nan(betas, harmful_call=2)
            for run, other in zip(runs, undisturbed, strict=True):
                model_file = files.run_dir(run.f, run.data) / "model.pt"
                if run.f.beta_1 != 3:
                    self.assertIsNone(run.record.diverged)
                    self.assertEqual(run.record.curves, other.record.curves)
                    for name, value in other.model.state_dict().items():
                        torch.testing.assert_close(run.model.state_dict()[name], value)
                    self.assertTrue(model_file.exists())
                    continue
                self.assertIsNone(run.model)
                self.assertFalse(model_file.exists())
                self.assertEqual(run.record.diverged.epoch, 2)
                first_loss, last_loss = other.record.curves["loss"]
                last_finite_loss = run.record.diverged.last_finite_loss
                self.assertAlmostEqual(last_finite_loss, last_loss, places=9)
                self.assertEqual(run.record.curves["loss"], [first_loss])

            # 3. A later command finds it so, and trains nothing.
            with mock.patch("training.train_group") as spy:
                again = self.fit_late_nan(betas, harmful_call=2)
            spy.assert_not_called()
            self.assertEqual([run.record for run in again], [run.record for run in runs])

    def test_no_loss_is_finite(self):
        class AlwaysNan(small.LinearHVAE):
            def loss(self, terms, f):
                return super().loss(terms, f) * math.nan

        f = flags(out_dir=str(self.folder))
        data = small.gaussian_data(100)
        # What an earlier run has left belongs to no run any more.
        folder = files.make_run_dir(f, data)
        for name in ("model.pt", "result.json"):
            (folder / name).write_text("old")
        with mock.patch("sys.stderr"):
            [run] = training.fit(AlwaysNan, [f], [data])
        self.assertIsNone(run.model)
        self.assertEqual([path.name for path in folder.iterdir()], ["training.json"])
        expected = training.Divergence(epoch=1, last_finite_loss=None)
        self.assertEqual(run.record.diverged, expected)

        # training.json holds no nan, which is no JSON.
        saved = files.read_matching(f, data, "training.json")
        self.assertEqual(saved["diverged"], {"epoch": 1, "last_finite_loss": None})


class InFitFolder(small.InFolder):
    """Tests that fit small linear models into a folder."""

    def setUp(self):
        super().setUp()
        self.data = small.gaussian_data()
        self.settings = []
        for beta in (0.5, 1.0):
            self.settings.append(flags(beta_1=beta, out_dir=str(self.folder)))

    def fit(self, settings):
        """training.fit. Returns (runs, the number of settings in each group that it trained)."""
        runs, trained, _ = self.fit_with_messages(settings)
        return runs, trained

    def fit_with_messages(self, settings):
        """`fit`, and what it wrote to stderr."""
        train_group = mock.patch("training.train_group", wraps=training.train_group)
        with contextlib.redirect_stderr(io.StringIO()) as err, train_group as spy:
            runs = training.fit(small.LinearHVAE, settings, [self.data] * len(settings))
        trained = [len(call.args[1]) for call in spy.call_args_list]
        return runs, trained, err.getvalue()

    def folder_of(self, f):
        return files.run_dir(f, self.data)

    def names(self, f):
        """The names of everything in a run's folder."""
        return {path.name for path in self.folder_of(f).iterdir()}


class Finished(InFitFolder):
    def test_not_trained_again(self):
        [first], trained = self.fit(self.settings[:1])
        self.assertEqual(trained, [1])
        # Only the new one is trained.
        runs, trained = self.fit(self.settings)
        self.assertEqual(trained, [1])
        for name, value in first.model.state_dict().items():
            self.assertTrue(torch.equal(value, runs[0].model.state_dict()[name]))
        self.assertEqual(runs[0].record, first.record)
        self.assertEqual(self.fit(self.settings)[1], [])

    def test_overwrite(self):
        self.fit(self.settings)
        settings = [dataclasses.replace(f, overwrite=True) for f in self.settings]
        self.assertEqual(self.fit(settings)[1], [2])

    def test_another_setting_or_broken_file_is_not_finished(self):
        f = self.settings[0]
        self.fit([f])
        self.assertEqual(self.fit([dataclasses.replace(f, num_epochs=3)])[1], [1])
        path = self.folder_of(f) / "training.json"
        text = path.read_text(encoding="utf-8")
        for broken in (text[:-20], "", text.replace('"d_1": 3', '"d_1": 4')):
            self.assertNotEqual(broken, text)
            path.write_text(broken, encoding="utf-8")
            self.assertEqual(self.fit([f])[1], [1])

    def test_a_model_that_cannot_be_read_is_trained_again(self):
        f = self.settings[0]
        self.fit([f])
        path = self.folder_of(f) / "model.pt"
        whole = path.read_bytes()
        for content in (whole[:-200], b"", b"no model at all", None):
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
            [again], trained = self.fit([f])
            self.assertEqual(trained, [1])
            self.assertIsNotNone(again.model)
        self.assertEqual(self.fit([f])[1], [])

    def test_overwriting_leaves_nothing_of_the_old_run(self):
        f = self.settings[0]
        self.fit([f])
        for name in ("result.json", "units.npz", "collapse.png"):
            (self.folder_of(f) / name).write_text("old")
        self.fit([dataclasses.replace(f, overwrite=True)])
        self.assertEqual(self.names(f), {"model.pt", "training.json"})

    def test_overwriting_removes_only_what_runs_leave(self):
        """Files that no run makes stay, and so do all folders."""
        # 1. What runs leave, and what they do not.
        f = self.settings[0]
        self.fit([f])
        left = {"model.pt", "training.json", "result.json", "units.npz", "collapse.png"}
        left |= {"compression.json", "attack.json"}
        own = {"notes.txt", "notes.json", "weights.pt", "folder", "folder.png", "attack.json.old"}
        folder = self.folder_of(f)
        for name in left | own:
            if name.startswith("folder"):
                (folder / name).mkdir()
                (folder / name / "inside").write_text("own")
            else:
                (folder / name).write_text("old")

        # 2. What there is when the training begins.
        names_in_training = []
        train_group = training.train_group

        def noted(*args, **kwargs):
            names_in_training.append(self.names(f))
            return train_group(*args, **kwargs)

        with mock.patch("training.train_group", noted), mock.patch("sys.stderr"):
            overwriting = dataclasses.replace(f, overwrite=True)
            training.fit(small.LinearHVAE, [overwriting], [self.data])
        self.assertEqual(names_in_training, [own])

        # 3. And afterwards.
        self.assertEqual(self.names(f), own | {"model.pt", "training.json"})
        self.assertEqual((folder / "notes.txt").read_text(), "old")
        self.assertEqual((folder / "folder" / "inside").read_text(), "own")
        self.assertEqual((folder / "folder.png" / "inside").read_text(), "own")

    def test_interrupted_in_the_second_group(self):
        """Ctrl-C: what was finished stays."""
        settings = [self.settings[0], dataclasses.replace(self.settings[0], seed=1)]
        train_group = training.train_group

        def interrupted(Model, group, data, **kwargs):
            if group[0].seed == 1:
                raise KeyboardInterrupt
            return train_group(Model, group, data, **kwargs)

        with mock.patch("sys.stderr"), mock.patch("training.train_group", interrupted):
            with self.assertRaises(KeyboardInterrupt):
                training.fit(small.LinearHVAE, settings, [self.data] * 2)
        self.assertEqual(self.fit(settings)[1], [1])


class WrongFiles(InFitFolder):
    """Files of a finished run that are there but wrong: one line, and the run is made again."""

    def setUp(self):
        super().setUp()
        self.f = self.settings[0]
        [self.run_before] = self.fit([self.f])[0]
        self.training_file = self.folder_of(self.f) / "training.json"
        self.model_file = self.folder_of(self.f) / "model.pt"
        self.good = json.loads(self.training_file.read_text(encoding="utf-8"))

    def assert_made_again(self, f, trained, err, lines):
        """Check that a fit trained one run, and named a wrong file in this number of lines."""
        self.assertEqual(trained, [1], err)
        naming = [line for line in err.split("\n") if "cannot" in line or "ignored" in line]
        self.assertEqual(len(naming), lines, err)
        for name, value in self.run_before.model.state_dict().items():
            self.assertTrue(torch.equal(saved_weights(f, self.data)[name], value), name)

    def broken_contents(self):
        """Contents of training.json that name the setting, but are of no use: a list of dicts."""
        contents = []
        for key in ("curves", "diverged", "seconds", "side_by_side", "processes"):
            without = dict(self.good)
            del without[key]
            contents.append(without)
        contents.append(self.good | {"curves": []})
        contents.append(self.good | {"curves": {"loss": 3}})
        contents.append(self.good | {"curves": {"loss": [[1]]}})
        contents.append(self.good | {"curves": {"reconstruction": [1.0, 2.0]}})
        contents.append(self.good | {"diverged": {}})
        contents.append(self.good | {"diverged": {"epoch": 1}})
        contents.append(self.good | {"diverged": [1, 2]})
        contents.append(self.good | {"seconds": "x"})
        contents.append(self.good | {"processes": None})
        return contents

    def test_training_json(self):
        texts = ["null", "[]", "3", '"text"', "", "{", "\udcff"]
        texts += [json.dumps(content) for content in self.broken_contents()]
        for text in texts:
            with self.subTest(text=text):
                self.training_file.write_bytes(text.encode("utf-8", "surrogateescape"))
                _, trained, err = self.fit_with_messages([self.f])
                self.assert_made_again(self.f, trained, err, lines=1)
                self.assertIn(str(self.training_file), err)
                record = json.loads(self.training_file.read_text(encoding="utf-8"))
                self.assertEqual(record | {"seconds": 0}, self.good | {"seconds": 0})

    def test_training_json_of_no_setting(self):
        """It does not claim to be this run's, so nothing is said about it."""
        without_settings = dict(self.good)
        del without_settings["settings"]
        contents = [{}, without_settings]
        for settings in ([], None, 3, "text", {}):
            contents.append(self.good | {"settings": settings})
        for content in contents:
            with self.subTest(content=content):
                self.training_file.write_text(json.dumps(content), encoding="utf-8")
                _, trained, err = self.fit_with_messages([self.f])
                self.assert_made_again(self.f, trained, err, lines=0)

    def test_model_pt(self):
        """Junk, an end that is missing, a list, other names, other shapes, or no file at all."""
        wider = flags(d_1=4, out_dir=str(self.folder))
        self.fit([wider])
        of_other_shapes = (self.folder_of(wider) / "model.pt").read_bytes()
        contents = [
            self.model_file.read_bytes()[:-100],
            b"",
            b"junk" * 50,
            bytes_of([1, 2]),
            bytes_of(None),
            bytes_of(torch.zeros(3)),
            bytes_of({"a": 1}),
            bytes_of({1: torch.zeros(2)}),
            # weights_only refuses such an object.
            bytes_of(Path("x")),
            of_other_shapes,
            None,
        ]
        for content in contents:
            with self.subTest(content=content and content[:20]):
                if content is None:
                    self.model_file.unlink()
                else:
                    self.model_file.write_bytes(content)
                _, trained, err = self.fit_with_messages([self.f])
                self.assert_made_again(self.f, trained, err, lines=1)
                self.assertIn(f"cannot read {self.model_file}, training again: ", err)

    def test_a_neighbours_training_json(self):
        """Another evaluation takes weights over from a neighbour, but not from a broken one."""
        contents = [None, [], 3, {}, self.good | {"settings": []}, *self.broken_contents()]
        more_draws = dataclasses.replace(self.f, num_samples=5)
        for content in contents:
            with self.subTest(content=content):
                self.training_file.write_text(json.dumps(content), encoding="utf-8")
                shutil.rmtree(self.folder_of(more_draws), ignore_errors=True)
                _, trained, err = self.fit_with_messages([more_draws])
                silent = isinstance(content, dict) and not content.get("settings")
                self.assert_made_again(more_draws, trained, err, lines=0 if silent else 1)
                # The neighbour's file stays as it is.
                text = self.training_file.read_text(encoding="utf-8")
                self.assertEqual(json.loads(text), content)

    def test_a_folder_inside_stays(self):
        inside = self.folder_of(self.f) / "mine"
        inside.mkdir()
        (inside / "result.json").write_text("mine")
        for overwrite in (False, True):
            self.fit([dataclasses.replace(self.f, overwrite=overwrite)])
            self.assertEqual((inside / "result.json").read_text(), "mine")

    def test_a_file_in_place_of_the_folder(self):
        """One line, status 2, and the file stays."""
        f = dataclasses.replace(self.f, seed=9)
        self.folder_of(f).write_text("mine")
        with contextlib.redirect_stderr(io.StringIO()) as err, self.assertRaises(SystemExit) as end:
            training.fit(small.LinearHVAE, [self.f, f], [self.data] * 2)
        self.assertEqual(end.exception.code, 2)
        naming = [line for line in err.getvalue().split("\n") if str(self.folder_of(f)) in line]
        self.assertEqual(len(naming), 1, err.getvalue())
        self.assertIn("is a file, wants a folder", naming[0])
        self.assertEqual(self.folder_of(f).read_text(), "mine")

    def test_a_folder_in_place_of_a_file(self):
        """One line, status 2, before any training; the folder stays."""
        for name in ("model.pt", "training.json", "result.json"):
            f = dataclasses.replace(self.f, d_1=5)
            path = self.folder_of(f) / name
            path.mkdir(parents=True)
            train_group = mock.patch("training.train_group")
            with contextlib.redirect_stderr(io.StringIO()) as err, train_group as spy:
                with self.assertRaises(SystemExit) as end:
                    training.fit(small.LinearHVAE, [f], [self.data])
            self.assertEqual(end.exception.code, 2)
            self.assertIn(f"{path} is a folder, wants a file", err.getvalue())
            spy.assert_not_called()
            # rmdir would fail if there were something in it.
            path.rmdir()


class TwoAtOnce(InFitFolder):
    """Another command with the same settings does all its work at one moment of this one."""

    def fit_with_visitor(self, settings, moment):
        """`fit`, and within it another one, before the file operation of this number.

        Returns (what both fits returned, the number of file operations). Each of the two writes a
        checkpoint after every step.
        """
        operations = itertools.count(1)
        done = [0]
        fitted = []
        patches = contextlib.ExitStack()

        def visited(function):
            def wrapped(*args, **kwargs):
                number = next(operations)
                done[0] = max(done[0], number)
                if number == moment:
                    fitted.append(training.fit(small.LinearHVAE, settings, data))
                return function(*args, **kwargs)
            return wrapped

        data = [self.data] * len(settings)
        with patches, mock.patch("sys.stderr"):
            for place, name in ((os, "fsync"), (os, "replace"), (Path, "unlink"), (Path, "rmdir")):
                patches.enter_context(mock.patch.object(place, name, visited(getattr(place, name))))
            fitted.append(training.fit(small.LinearHVAE, settings, data))
        return fitted, done[0]

    def settings_in(self, out_dir):
        settings = []
        for beta in (0.5, 1.0):
            f = flags(
                num_epochs=1,
                batch_size=50,
                beta_1=beta,
                checkpoint_seconds=0.0,
                out_dir=str(self.folder / out_dir),
            )
            settings.append(f)
        return settings

    def left(self, settings):
        """What a fit leaves in its files: [weights], [records]."""
        weights = [saved_weights(f, self.data) for f in settings]
        records = [saved_record(f, self.data) for f in settings]
        return weights, records

    def test_at_any_moment(self):
        self.data = small.gaussian_data(100)
        undisturbed = self.settings_in("undisturbed")
        _, operations = self.fit_with_visitor(undisturbed, moment=None)
        # A checkpoint takes three operations. There is one after each of the two steps, and one
        # at the end. Each of the two results takes three operations or more.
        self.assertGreater(operations, 15)
        expected_weights, expected_records = self.left(undisturbed)

        for moment in range(1, operations + 1):
            with self.subTest(moment=moment):
                settings = self.settings_in(str(moment))
                fitted, _ = self.fit_with_visitor(settings, moment)
                self.assertEqual(len(fitted), 2)
                weights, records = self.left(settings)
                self.assertEqual(records, expected_records)
                for state, expected in zip(weights, expected_weights, strict=True):
                    for name, value in expected.items():
                        self.assertTrue(torch.equal(state[name], value), name)
                # Both have the models in memory.
                for runs in fitted:
                    for run, expected in zip(runs, expected_weights, strict=True):
                        for name, value in expected.items():
                            self.assertTrue(torch.equal(run.model.state_dict()[name], value), name)
                # No checkpoint is left, and no unfinished file.
                names = [path.name for path in (self.folder / str(moment)).rglob("*")]
                self.assertEqual(sorted(set(names)), sorted({
                    "model.pt", "training.json", common.script_name(settings[0]),
                    *(files.run_dir(f, self.data).name for f in settings),
                }))


class Signals(InFitFolder):
    def test_in_the_middle(self):
        """A checkpoint is written first."""
        f = dataclasses.replace(self.settings[0], num_epochs=50)
        for number in (signal.SIGINT, signal.SIGTERM):
            build = training.build

            def build_and_raise(*args):
                signal.raise_signal(number)
                return build(*args)

            with mock.patch("training.build", build_and_raise), mock.patch("sys.stderr"):
                with self.assertRaises(common.Interrupted) as interrupted:
                    training.fit(small.LinearHVAE, [f], [self.data])
            self.assertEqual(interrupted.exception.args, (number,))
            self.assertFalse((self.folder_of(f) / "training.json").exists())
            [checkpoint] = (self.folder_of(f).parent / "checkpoints").iterdir()
            self.assertTrue(checkpoint.is_file())
        _, _, err = self.fit_with_messages([f])
        self.assertIn("resuming after 0 of 50 epochs", err)

    def test_after_the_last_step(self):
        """The results are written before the signal takes effect."""
        leave = training.leave
        left = []

        def raise_and_leave(*args):
            signal.raise_signal(signal.SIGINT)
            leave(*args)
            left.append(args[0].f)

        with mock.patch("training.leave", raise_and_leave), mock.patch("sys.stderr"):
            with self.assertRaises(KeyboardInterrupt):
                training.fit(small.LinearHVAE, self.settings, [self.data] * 2)
        self.assertEqual(left, self.settings)
        self.assertEqual(self.fit(self.settings)[1], [])

    def test_the_handlers_are_put_back(self):
        received = []

        def note(number, frame):
            received.append(number)

        previous = signal.signal(signal.SIGTERM, note)
        self.addCleanup(signal.signal, signal.SIGTERM, previous)
        with training.deferred_signals() as deferred:
            signal.raise_signal(signal.SIGTERM)
            self.assertEqual((deferred, received), ([signal.SIGTERM], []))
        self.assertEqual(received, [signal.SIGTERM])

        # An exception of the body goes before the signal.
        with self.assertRaises(ZeroDivisionError):
            with training.deferred_signals():
                signal.raise_signal(signal.SIGTERM)
                raise ZeroDivisionError
        self.assertEqual(received, [signal.SIGTERM])
        self.assertIs(signal.getsignal(signal.SIGTERM), note)

    def test_in_another_thread(self):
        """Python sets handlers in its main thread only, and training goes on without them."""
        fitted = []
        thread = threading.Thread(target=lambda: fitted.append(self.fit(self.settings)))
        thread.start()
        thread.join(60)
        [(runs, trained)] = fitted
        self.assertEqual(trained, [2])
        self.assertIsNotNone(runs[1].model)


class InCheckpointFolder(small.InFolder):
    """Tests that stop a training after a number of checkpoints and let it go on."""

    def setUp(self):
        super().setUp()
        # Four batches an epoch, the last of 4 examples.
        self.data = small.digit_data(100, 4, torch.float32)

    def settings(self, count, **values):
        settings = []
        for k in range(count):
            f = relu_flags(
                d_hidden=8, d_1=3, d_2=2, num_epochs=3, out_dir=str(self.folder), beta_1=0.5 + k
            )
            settings.append(dataclasses.replace(f, **values))
        return settings

    def fit(self, settings, stop_after=None):
        """training.fit with a checkpoint after every step, stopped after this number of them.

        Returns (the TrainedRuns, stderr), or (the checkpoint's path, stderr) if it was stopped.
        """
        paths = []
        write = training.Checkpoint.write

        def counted(checkpoint, state):
            write(checkpoint, state)
            paths.append(checkpoint.path)
            if len(paths) == stop_after:
                raise SystemExit

        settings = [dataclasses.replace(f, checkpoint_seconds=0.0) for f in settings]
        data = [self.data] * len(settings)
        with mock.patch("training.Checkpoint.write", counted):
            with contextlib.redirect_stderr(io.StringIO()) as err:
                with contextlib.suppress(SystemExit):
                    runs = training.fit(MNIST_HVAE_Relu.HVAE, settings, data)
                    return runs, err.getvalue()
        return paths[-1], err.getvalue()

    def assert_same_weights(self, expected, runs, message=None):
        """Check that two lists of TrainedRun have equal weights, bit by bit."""
        for a, b in zip(expected, runs, strict=True):
            for name, value in a.model.state_dict().items():
                self.assertTrue(torch.equal(value, b.model.state_dict()[name]), (message, name))


class Checkpoints(InCheckpointFolder):
    def check_all_places(self, count, **values):
        """Stop in an epoch, before its small last batch, at its end and after all.

        Each time the training goes on to the very numbers of an undisturbed one.
        """
        settings = self.settings(count, overwrite=True, **values)
        expected, _ = self.fit(settings)
        records = [saved_record(f, self.data) for f in settings]
        places = [1, 3, 4, 6, 12]
        if count > 1:
            # A grid writes one more checkpoint, before its results.
            places.append(13)
        for stop_after in places:
            self.fit(settings, stop_after)
            runs, err = self.fit(settings)
            self.assertIn("resuming after ", err)
            self.assert_same_weights(expected, runs, (count, stop_after))
            self.assertEqual([saved_record(f, self.data) for f in settings], records)
            self.assertFalse((self.folder / "MNIST_HVAE_Relu" / "checkpoints").exists())

    def test_same_numbers_from_every_place_alone(self):
        self.check_all_places(1, beta_warmup=2.0)
        self.check_all_places(1, lr_schedule="cosine")

    def test_same_numbers_from_every_place_in_a_grid(self):
        self.check_all_places(3)
        self.check_all_places(3, beta_cycles=2, free_bits=0.1)

    def test_killed_between_the_results_of_a_group(self):
        """The finished ones stay as they are, the others come from the checkpoint of all."""
        # 1. Killed at the second of three results.
        settings = self.settings(3, seed=1)
        write_json = files.write_json
        written = []

        def second_fails(path, value):
            written.append(path)
            if len(written) == 2:
                raise SystemExit
            write_json(path, value)

        with mock.patch("files.write_json", second_fails):
            self.fit(settings)

        # 2. The same command again, beside one that nobody disturbs.
        undisturbed = self.settings(3, seed=1, out_dir=str(self.folder / "other"))
        expected, _ = self.fit(undisturbed)
        with mock.patch("training.train_group", wraps=training.train_group) as spy:
            runs, err = self.fit(settings)
        self.assertEqual(len(spy.call_args.args[1]), 3)
        self.assertIn("resuming after 3 of 3 epochs", err)
        self.assertEqual(err.count("already trained"), 1)
        self.assert_same_weights(expected, runs)

    def test_a_divergence_in_the_last_step_is_known_again(self):
        """The checkpoint after the last step holds the weights that are not finite."""
        f = flags(
            batch_size=128, beta_1=3.0, out_dir=str(self.folder), checkpoint_seconds=0.0
        )
        data = small.gaussian_data(100)
        write = training.Checkpoint.write
        written = []

        def second_ends(checkpoint, state):
            write(checkpoint, state)
            written.append(checkpoint.path)
            if len(written) == 2:
                raise SystemExit

        LateNan.calls = 0
        with contextlib.redirect_stderr(io.StringIO()) as err:
            with mock.patch("training.Checkpoint.write", second_ends):
                with self.assertRaises(SystemExit):
                    training.fit(LateNan, [f], [data])
            [run] = training.fit(LateNan, [f], [data])
        self.assertIn("resuming after ", err.getvalue())
        self.assertIsNone(run.model)
        self.assertEqual(run.record.diverged.epoch, 2)
        self.assertTrue(math.isfinite(run.record.diverged.last_finite_loss))


class RefusedCheckpoints(InCheckpointFolder):
    def test_refused(self):
        """Truncated, of another version, or of other settings: named, and training starts over."""
        f, other = self.settings(2)
        path, _ = self.fit([f], stop_after=5)
        whole = path.read_bytes()
        saved = torch.load(path, weights_only=True)
        path_elsewhere, _ = self.fit([other], stop_after=5)
        identity = saved["identity"]

        def of_another(**values):
            return bytes_of(saved | {"identity": identity | values})

        cases = (
            (whole[:-300], "it is incomplete or corrupt"),
            (b"", "it is incomplete or corrupt"),
            (b"no checkpoint", "it is incomplete or corrupt"),
            (bytes_of([1]), "it is incomplete or corrupt"),
            (bytes_of({}), "it is incomplete or corrupt"),
            (bytes_of({"identity": identity}), "it is incomplete or corrupt"),
            (of_another(torch="1.0"), "it was written with a different version of torch"),
            (of_another(device="cuda (NVIDIA H200)"), "it was written with a different device"),
            (of_another(script="0"), "it was written with a different version of the script"),
            (of_another(processes=2), "it was written with a different number of processes"),
            (path_elsewhere.read_bytes(), "it was written with a different list of settings"),
        )
        for content, reason in cases:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            _, err = self.fit([dataclasses.replace(f, overwrite=True)])
            self.assertIn(
                f"cannot use the checkpoint {path}, training starts over: {reason}", err
            )
            self.assertNotIn("resuming", err)
            self.assertFalse(path.exists())

    def test_no_pickle_is_executed(self):
        [f] = self.settings(1)
        path, _ = self.fit([f], stop_after=5)
        harmed = self.folder / "harmed"

        class Harm:
            def __reduce__(self):
                return Path.touch, (harmed,)

        torch.save({"identity": Harm(), "state": {}}, path)
        _, err = self.fit([f])
        self.assertIn("training starts over", err)
        self.assertFalse(harmed.exists())


class OtherEvaluations(InCheckpointFolder):
    """Other draws take over the trained weights. No other flag does, and no broken file."""

    def test_a_changed_script_is_noticed(self):
        """The weights are kept, and the message says that they are of another version."""
        [f] = self.settings(1)
        self.fit([f])
        _, err = self.fit([f])
        self.assertIn("already trained: ", err)

        with mock.patch("training.script_digest", return_value="of a changed script"):
            _, err = self.fit([f])
        self.assertIn("already trained by another version of ", err)
        self.assertNotIn("training: ", err)

    def test_other_draws_train_nothing(self):
        [f] = self.settings(1)
        [run], _ = self.fit([f])
        more = dataclasses.replace(f, num_samples=7)
        runs, err = self.fit([more, dataclasses.replace(more, num_samples=8)])
        self.assertEqual((err.count("already trained"), err.count("training: ")), (2, 0))
        self.assert_same_weights([run, run], runs)

        record = saved_record(more, self.data)
        self.assertEqual(record["settings"]["num_samples"], 7)
        expected = saved_record(f, self.data)
        del record["settings"]
        del expected["settings"]
        self.assertEqual(record, expected)
        self.assertTrue((files.run_dir(more, self.data) / "model.pt").exists())

        others = (
            dataclasses.replace(f, seed=1),
            dataclasses.replace(more, d_2=3),
            dataclasses.replace(more, lr=2e-3),
        )
        for other in others:
            _, err = self.fit([other])
            self.assertNotIn("already trained", err)

    def test_a_diverged_training_is_not_made_twice(self):
        [f] = self.settings(1, lr=1e6)
        for draws in (0, 7):
            [run], err = self.fit([dataclasses.replace(f, num_samples=draws)])
            self.assertIsNone(run.model)
            self.assertEqual("already trained" in err, draws == 7)

    def test_a_broken_model_is_not_taken_over(self):
        [f] = self.settings(1)
        self.fit([f])
        (files.run_dir(f, self.data) / "model.pt").write_bytes(b"")
        _, err = self.fit([dataclasses.replace(f, num_samples=7)])
        self.assertIn("training again", err)
        self.assertNotIn("already trained", err)

    def test_settings_that_lack_a_flag_are_other_settings(self):
        [f] = self.settings(1)
        self.fit([f])
        path = files.run_dir(f, self.data) / "training.json"
        saved = json.loads(path.read_text(encoding="utf-8"))
        self.assertIsNotNone(files.read_matching(f, self.data, "training.json"))
        self.assertNotEqual(saved["settings"]["d_hidden"], type(f)().d_hidden)
        for name in ("d_hidden", "matmul"):
            settings = dict(saved["settings"])
            del settings[name]
            path.write_text(json.dumps(saved | {"settings": settings}), encoding="utf-8")
            self.assertIsNone(files.read_matching(f, self.data, "training.json"))
            _, err = self.fit([f])
            self.assertNotIn("already trained", err)

    def test_rows_are_no_draws(self):
        """Where --num_samples is the number of rows, other rows train anew, other draws do not."""
        argv = ["--dim_x", 3, "--dim_y", 3, "--dim_z", 2, "--num_epochs", 1, "--device", "cpu"]
        argv += ["--out_dir", self.folder]
        for rows, draws, is_trained in ((40, 0, True), (40, 5, False), (50, 5, True)):
            status, _, err = small.call(
                Synthetic_CVAE_Relu_correlation.main,
                *argv,
                *("--num_samples", rows),
                *("--num_draws", draws),
            )
            self.assertEqual(status, 0, err)
            self.assertEqual("training: epoch" in err, is_trained, err)
            self.assertEqual("already trained" in err, not is_trained, err)


class Together(small.InFolder):
    """One setting by all processes: the loop of the deep scripts."""

    def ladder_flags(self, **values):
        defaults = {"num_epochs": 1, "out_dir": str(self.folder), "device": "cpu", "batch_size": 8}
        return MNIST_HVAE_Ladder.Flags(**(defaults | values))

    def images(self, count):
        """Random images as datasets.Data."""
        images = torch.rand(count, 1, 28, 28)
        return datasets.Data("digits", (images,), (images,))

    def test_of_another_number_of_processes(self):
        """Their steps are other ones: the checkpoint is refused."""
        f = self.ladder_flags()
        data = self.images(32)
        training.Checkpoint([f], data, process_count=2).write({"": {}})
        with contextlib.redirect_stderr(io.StringIO()) as err:
            self.assertIsNone(training.Checkpoint([f], data).state)
        self.assertIn("it was written with a different number of processes", err.getvalue())

    def test_models_are_built_before_the_noise_begins(self):
        """Building reseeds CUDA's generator.

        Within the noise's seeds it would draw what a layer's initial weights are drawn from.
        """
        purposes = []
        seeded = common.seeded

        def noted(seed, purpose, device):
            purposes.append(purpose)
            return seeded(seed, purpose, device)

        f = self.ladder_flags(latents="1,1", num_ch=4)
        images = self.images(16)
        with mock.patch("common.seeded", noted), mock.patch("sys.stderr"):
            training.train_group(
                MNIST_HVAE_Relu.HVAE, [relu_flags(d_hidden=8)], small.digit_data(40)
            )
            training.train_group(
                MNIST_HVAE_Ladder.LadderVAE, [f], images, train=MNIST_HVAE_Ladder.train
            )
        self.assertEqual(purposes, ["init", "noise"] * 2)

    def test_divergence(self):
        """A loss that is not finite ends the training.

        The record holds its epoch and the last finite loss.
        """
        f = self.ladder_flags(num_epochs=5)
        loop = training.Training([f], self.images(16), together=True)
        losses = iter([3.0, 1.0, 2.5, math.nan, 1.0, 1.0])
        with contextlib.redirect_stderr(io.StringIO()):
            for _ in loop.batches():
                loop.record({"loss": torch.tensor(next(losses))})
        divergence = training.Divergence(epoch=2, last_finite_loss=2.5)
        self.assertEqual(loop.diverged, [divergence])
        [record] = loop.records()
        self.assertEqual(record.curves, {"loss": [2.0]})
        self.assertEqual(record.diverged, divergence)

    def test_weights_that_are_not_finite(self):
        """The model counts as diverged in the last epoch, unless it diverged in an earlier one."""
        finite, broken = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        with torch.no_grad():
            broken.bias.fill_(math.inf)
        group = [flags(num_epochs=2, batch_size=8) for _ in range(3)]
        loop = training.Training(group, self.images(8))
        losses = iter([[1.0, 2.0, 3.0], [1.5, 2.5, math.nan]])
        with contextlib.redirect_stderr(io.StringIO()):
            for _ in loop.batches():
                loop.record({"loss": torch.tensor(next(losses))})
        early = training.Divergence(epoch=2, last_finite_loss=3.0)
        self.assertEqual(loop.diverged, [None, None, early])

        loop.check_weights([finite, broken, broken])
        late = training.Divergence(epoch=2, last_finite_loss=2.5)
        self.assertEqual(loop.diverged, [None, late, early])
        curves = [record.curves["loss"] for record in loop.records()]
        self.assertEqual(curves, [[1.0, 1.5], [2.0], [3.0]])


@unittest.skipUnless(torch.cuda.is_available(), "no CUDA device")
class Cuda(unittest.TestCase):
    def on_cuda(self, data):
        return dataclasses.replace(data, train=(data.train[0].cuda(),), test=(data.test[0].cuda(),))

    def test_grid_like_alone(self):
        data = self.on_cuda(small.digit_data())
        settings = [flags(MNIST_HVAE_Relu.Flags, d_hidden=20, beta_1=beta) for beta in (0.1, 1.0)]
        grid_states = states(train(MNIST_HVAE_Relu.HVAE, settings, data))
        for f, in_grid in zip(settings, grid_states):
            [alone] = states(train(MNIST_HVAE_Relu.HVAE, [f], data))
            for name, value in alone.items():
                torch.testing.assert_close(in_grid[name], value, rtol=0, atol=1e-9)

    def test_captured_like_step_by_step(self):
        """A captured step, replayed, gives what the same steps give launched one by one.

        That holds for noise, clipping and the schedule, too.
        """
        # Nine full batches of 32 an epoch and one of 12.
        data = self.on_cuda(small.digit_data(300))
        for schedule in ("constant", "cosine"):
            group = []
            for beta in (0.1, 1.0):
                f = flags(MNIST_HVAE_Relu.Flags, d_hidden=20, beta_1=beta, lr_schedule=schedule)
                group.append(f)
            captured = train(MNIST_HVAE_Relu.HVAE, group, data)
            with mock.patch("training.Replayed.EAGER", 10**9):
                launched = train(MNIST_HVAE_Relu.HVAE, group, data)
            for a, b in zip(captured, launched):
                for name, value in b.model.state_dict().items():
                    weights = a.model.state_dict()[name]
                    torch.testing.assert_close(weights, value, rtol=0, atol=1e-9)
                curves = zip(a.record.curves["loss"], b.record.curves["loss"], strict=True)
                for x, y in curves:
                    self.assertAlmostEqual(x, y, delta=1e-9 * abs(y))


if __name__ == "__main__":
    unittest.main()
