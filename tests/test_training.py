"""fit: the same numbers as a plain loop, alone or in a grid, or twice; what is finished, diverged or interrupted."""
import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

import MNIST_HVAE_Ladder
import Synthetic_CVAE_Relu_correlation
import common
import datasets
import files
import training
import MNIST_HVAE_Relu
from tests import small


def flags(Flags=small.Flags, **values):
    return Flags(**{"batch_size": 32, "num_epochs": 2, "num_samples": 0, "device": "cpu"} | values)


def train(Model, group, data):
    with mock.patch("sys.stderr"):
        return training.train_group(Model, group, data)


def states(trained):
    return [model.state_dict() for model, _ in trained]


class SameNumbers(unittest.TestCase):
    def assert_close(self, a, b, tolerance):
        for name in a:
            self.assertLessEqual((a[name] - b[name]).abs().max().item(), tolerance, name)

    grid = [dict(beta_1=0.1, eta_dec=0.5), dict(beta_1=2.0, eta_dec=0.9), dict(beta_2=3.0, sigma_1=0.2)]

    def relu(self, **values):
        return flags(MNIST_HVAE_Relu.Flags, d_hidden=20, d_1=4, d_2=3, **values)

    def test_like_a_plain_loop(self):
        data = small.digit_data(100)                          # 100 = 3 x 32 + 4: the last batch is a small one
        ends = []
        for schedule in ("constant", "cosine"):
            f = self.relu(beta_1=0.3, beta_2=2.0, eta_dec=0.8, lr_schedule=schedule)
            [(model, training)] = train(MNIST_HVAE_Relu.HVAE, [f], data)
            ends.append(model.state_dict())
            self.assert_close(ends[-1], small.plain_train(MNIST_HVAE_Relu.HVAE, f, data).state_dict(), 1e-12)
            self.assertEqual([len(curve) for curve in training["curves"].values()], [2] * 4)
        self.assertFalse(torch.allclose(ends[0]["z1_to_x.2.weight"], ends[1]["z1_to_x.2.weight"], atol=1e-6))

    def test_remedies_like_a_plain_loop(self):
        """Beta rises from 0, once or in cycles, and free bits cost nothing: alone and in a grid. After the warm-up the loss is the
        plain one."""
        data = small.digit_data(100)
        cases = ((dict(beta_warmup=1.5), lambda epochs: min(1, epochs / 1.5)),
                 (dict(beta_cycles=2), lambda epochs: min(1, epochs % 2 / 1)),
                 (dict(beta_cycles=2, beta_warmup=0.5), lambda epochs: min(1, epochs % 2 / 0.5)),
                 (dict(free_bits=0.3), lambda epochs: 1))
        off = small.plain_train(MNIST_HVAE_Relu.HVAE, self.relu(num_epochs=4), data).state_dict()
        for flags, share in cases:
            fs = [self.relu(num_epochs=4, beta_1=beta_1, **flags) for beta_1 in (0.5, 2.0)]
            [(alone, of_training)] = train(MNIST_HVAE_Relu.HVAE, fs[:1], data)
            expected = [small.plain_train(MNIST_HVAE_Relu.HVAE, f, data, share).state_dict() for f in fs]
            self.assert_close(alone.state_dict(), expected[0], 1e-12)
            for state, wanted in zip(states(train(MNIST_HVAE_Relu.HVAE, fs, data)), expected):
                self.assert_close(state, wanted, 1e-10)
            self.assertFalse(torch.allclose(off["z2_to_z1.2.weight"], expected[0]["z2_to_z1.2.weight"], atol=1e-6))
            if "beta_warmup" in flags and "beta_cycles" not in flags:
                last = {name: curve[-1] for name, curve in of_training["curves"].items()}
                self.assertAlmostEqual(last["loss"], last["reconstruction"] + 0.5 * last["kl_1"] + last["kl_2"], places=9)

    def test_a_warm_up_that_does_not_fit(self):
        data = small.digit_data(40)
        f = self.relu(num_epochs=10, beta_cycles=4, beta_warmup=3.0)
        with contextlib.redirect_stderr(io.StringIO()) as err, self.assertRaises(SystemExit) as end:
            training.fit(MNIST_HVAE_Relu.HVAE, [f], [data])
        self.assertEqual(end.exception.code, 2)
        self.assertIn("--beta_warmup: got 3, wants at most --num_epochs / --beta_cycles = 2.5", err.getvalue())

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
        [x], f = data.train, flags(beta_1=3.0, lr=1e-30)
        [(_, training)] = train(Still, [f], data)
        expected = {"reconstruction": -x[:, 0].mean().item(), "kl_1": x[:, 1:3].abs().sum(1).mean().item()}
        expected["loss"] = expected["reconstruction"] + 3 * expected["kl_1"]
        for name, value in expected.items():
            for found in training["curves"][name]:
                self.assertAlmostEqual(found, value, places=9)

    def test_row_of_a_grid_like_alone_float64(self):
        """Eight steps of Adam, for a nonlinear model, clipped or not, and a linear one."""
        for Model, data, settings in (
                (MNIST_HVAE_Relu.HVAE, small.digit_data(128), [self.relu(**values) for values in self.grid]),
                (MNIST_HVAE_Relu.HVAE, small.digit_data(128), [self.relu(grad_clip=1e6, **v) for v in self.grid]),
                (small.LinearHVAE, small.gaussian_data(128), [flags(**values) for values in self.grid])):
            together = train(Model, settings, data)
            for f, in_grid in zip(settings, together):
                [alone] = train(Model, [f], data)
                self.assert_close(in_grid[0].state_dict(), alone[0].state_dict(), 1e-9)
                for name, curve in alone[1]["curves"].items():
                    for a, b in zip(curve, in_grid[1]["curves"][name], strict=True):
                        self.assertAlmostEqual(a, b, delta=1e-9 * max(1, abs(a)))
        # The settings do differ: this is no comparison of equals.
        self.assertGreater((together[0][0].W1.weight - together[1][0].W1.weight).abs().max(), 1e-4)

    def test_row_of_a_grid_like_alone_float32(self):
        """One step at the published sizes."""
        data = small.digit_data(128, dtype=torch.float32)
        settings = [flags(MNIST_HVAE_Relu.Flags, batch_size=128, num_epochs=1, **values) for values in self.grid]
        for f, in_grid in zip(settings, states(train(MNIST_HVAE_Relu.HVAE, settings, data))):
            self.assert_close(in_grid, states(train(MNIST_HVAE_Relu.HVAE, [f], data))[0], 1e-4)

    def test_side_by_side_or_one_after_another(self):
        data, settings = small.gaussian_data(), [flags(**values) for values in self.grid]
        found = []
        for side_by_side in (True, False):
            with tempfile.TemporaryDirectory() as folder, mock.patch("sys.stderr"), \
                    mock.patch("training.train_group", wraps=training.train_group) as spy:
                placed = [dataclasses.replace(f, out_dir=folder) for f in settings]
                found.append(training.fit(small.LinearHVAE, placed, [data] * 3, side_by_side=side_by_side))
            self.assertEqual(spy.call_count, 1 if side_by_side else 3)
        for a, b in zip(*found):
            self.assert_close(a.state_dict(), b.state_dict(), 1e-9)

    def test_twice_the_same(self):
        data, f = small.digit_data(dtype=torch.float32), flags(MNIST_HVAE_Relu.Flags)
        once, again = (train(MNIST_HVAE_Relu.HVAE, [f], data)[0] for _ in range(2))
        self.assertEqual(once[1]["curves"], again[1]["curves"])
        for name, value in once[0].state_dict().items():
            self.assertTrue(torch.equal(value, again[0].state_dict()[name]), name)
        other = train(MNIST_HVAE_Relu.HVAE, [dataclasses.replace(f, seed=1)], data)[0]
        self.assertNotEqual(once[1]["curves"], other[1]["curves"])

    def test_random_numbers_of_others_are_left_alone(self):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        train(small.LinearHVAE, [flags()], small.gaussian_data())
        self.assertTrue(torch.equal(torch.rand(3), expected))


class Clipping(unittest.TestCase):
    def test_per_setting(self):
        """A setting with a huge gradient does not shrink its neighbour's."""
        stacked = [torch.zeros(3, 4, 5, requires_grad=True), torch.zeros(3, 7, requires_grad=True)]
        for p in stacked:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
            p.grad[1] *= 1e6
            p.grad[2] *= 1e-3
        expected = []
        for g in range(3):
            alone = [torch.zeros_like(p[g], requires_grad=True) for p in stacked]
            for p, of in zip(alone, stacked):
                p.grad = of.grad[g].clone()
            torch.nn.utils.clip_grad_norm_(alone, 0.5)
            expected.append([p.grad for p in alone])
        training.clip(stacked, 0.5, 3)
        for g in range(3):
            norm = math.sqrt(sum(p.grad[g].square().sum().item() for p in stacked))
            self.assertAlmostEqual(norm, 0.5, places=4) if g < 2 else self.assertLess(norm, 0.01)
            for p, of in zip(stacked, expected[g]):
                torch.testing.assert_close(p.grad[g], of, rtol=1e-6, atol=0)


class Divergence(unittest.TestCase):
    def test_reported_and_the_others_finish(self):
        """lr 1e3 with the model's bounded means: the loss explodes without ever being nan."""
        with tempfile.TemporaryDirectory() as folder:
            small.write_mnist(f"{folder}/data")
            argv = ["--data_dir", f"{folder}/data", "--out_dir", f"{folder}/runs", "--num_epochs", 2, "--num_samples", 0,
                    "--lr", "0.001,1000", "--d_hidden", 16]
            status, out, _ = small.call(MNIST_HVAE_Relu.main, *argv)
            self.assertEqual(status, 1)
            self.assertRegex(out, r"lr=1000.0,seed=0 diverged in epoch [12]; the last finite loss was \d+\.\d+\n")
            self.assertRegex(out, r"\n *0.001 +-\d+\.\d\d ")          # the other setting's row, with numbers
            runs = {path.parent.name: json.loads(path.read_text())
                    for path in Path(folder, "runs/MNIST_HVAE_Relu").glob("*/result.json")}
            [good] = [run for run in runs.values() if run["settings"]["lr"] == 0.001]
            [bad] = [run for run in runs.values() if run["settings"]["lr"] == 1000]
            self.assertIsNone(good["diverged"])
            self.assertTrue(math.isfinite(good["metrics"]["elbo"]))
            self.assertIsNone(bad["metrics"])
            self.assertEqual(small.call(MNIST_HVAE_Relu.main, *argv)[0], 1)       # and so it stays when shown again

    def test_within_a_batched_group(self):
        """A level-2 weight so large that float32 overflows takes only its own setting along."""
        data = small.digit_data(dtype=torch.float32)
        settings = [flags(MNIST_HVAE_Relu.Flags, d_hidden=16, beta_2=beta) for beta in (1.0, 1e38, 2.0)]
        trained = train(MNIST_HVAE_Relu.HVAE, settings, data)
        self.assertIsNone(trained[1][0])
        self.assertEqual(trained[1][1]["diverged"]["epoch"], 1)
        for k in (0, 2):
            self.assertIsNone(trained[k][1]["diverged"])
            [alone] = train(MNIST_HVAE_Relu.HVAE, [settings[k]], data)
            for name, value in trained[k][0].state_dict().items():
                torch.testing.assert_close(value, alone[0].state_dict()[name], rtol=0, atol=1e-4)


class Finished(small.InFolder):
    def setUp(self):
        super().setUp()
        self.data = [small.gaussian_data()] * 2
        self.settings = [flags(beta_1=beta, out_dir=str(self.folder)) for beta in (0.5, 1.0)]

    def fit(self, settings):
        with mock.patch("sys.stderr"), mock.patch("training.train_group", wraps=training.train_group) as spy:
            models = training.fit(small.LinearHVAE, settings, self.data[:len(settings)])
        return models, [len(call.args[1]) for call in spy.call_args_list]

    def test_not_trained_again(self):
        [first], trained = self.fit(self.settings[:1])
        self.assertEqual(trained, [1])
        models, trained = self.fit(self.settings)
        self.assertEqual(trained, [1])                        # only the new one
        for name, value in first.state_dict().items():
            self.assertTrue(torch.equal(value, models[0].state_dict()[name]))
        self.assertEqual(self.fit(self.settings)[1], [])

    def test_overwrite(self):
        self.fit(self.settings)
        self.assertEqual(self.fit([dataclasses.replace(f, overwrite=True) for f in self.settings])[1], [2])

    def test_another_setting_or_broken_file_is_not_finished(self):
        [f] = self.settings[:1]
        self.fit([f])
        self.assertEqual(self.fit([dataclasses.replace(f, num_epochs=3)])[1], [1])
        training = files.run_dir(f, self.data[0]) / "training.json"
        text = training.read_text()
        for broken in (text[:-20], "", text.replace('"d_1": 3', '"d_1": 4')):
            training.write_text(broken)
            self.assertEqual(self.fit([f])[1], [1])

    def test_a_model_that_cannot_be_read_is_trained_again(self):
        [f] = self.settings[:1]
        self.fit([f])
        model = files.run_dir(f, self.data[0]) / "model.pt"
        whole = model.read_bytes()
        for content in (whole[:-200], b"", b"no model at all", None):
            model.unlink() if content is None else model.write_bytes(content)
            [again], trained = self.fit([f])
            self.assertEqual(trained, [1])
            self.assertIsNotNone(again)
        self.assertEqual(self.fit([f])[1], [])

    def test_overwriting_leaves_nothing_of_the_old_run(self):
        [f] = self.settings[:1]
        self.fit([f])
        folder = files.run_dir(f, self.data[0])
        for name in ("result.json", "units.npz", "collapse.png"):
            (folder / name).write_text("old")
        self.fit([dataclasses.replace(f, overwrite=True)])
        self.assertEqual({path.name for path in folder.iterdir()}, {"model.pt", "training.json"})

    def test_interrupted_in_the_second_group(self):
        """Ctrl-C: what was finished stays."""
        settings = [self.settings[0], dataclasses.replace(self.settings[0], seed=1)]
        real = training.train_group

        def interrupted(Model, group, data, *more):
            if group[0].seed == 1:
                raise KeyboardInterrupt
            return real(Model, group, data, *more)

        with mock.patch("sys.stderr"), mock.patch("training.train_group", interrupted), self.assertRaises(KeyboardInterrupt):
            training.fit(small.LinearHVAE, settings, self.data)
        self.assertEqual(self.fit(settings)[1], [1])


class Checkpoints(small.InFolder):
    def settings(self, count, **values):
        return [MNIST_HVAE_Relu.Flags(d_hidden=8, d_1=3, d_2=2, batch_size=32, num_epochs=3, num_samples=0, device="cpu",
                                      out_dir=str(self.folder), beta_1=0.5 + k, **values) for k in range(count)]

    def fit(self, settings, data, stop_after=None):
        """training.fit, stopped after so many checkpoints, which are written at every step; the models and stderr."""
        written, write = [], training.Checkpoint.write

        def counted(checkpoint, state):
            write(checkpoint, state)
            written.append(checkpoint.path)
            if len(written) == stop_after:
                raise SystemExit

        with mock.patch("training.Checkpoint.write", counted), contextlib.redirect_stderr(io.StringIO()) as err:
            with contextlib.suppress(SystemExit):
                settings = [dataclasses.replace(f, checkpoint_seconds=0.0) for f in settings]
                return training.fit(MNIST_HVAE_Relu.HVAE, settings, [data] * len(settings)), err.getvalue()
        return written[-1], err.getvalue()

    def curves(self, f, data):
        return {name: of for name, of in files.read_result(f, data, "training.json").items() if name != "seconds"}

    def test_same_numbers_from_every_place(self):
        """Stopped in an epoch, before its small last batch, at its end and after all: bit by bit as if not."""
        data = small.digit_data(100, 4, torch.float32)        # four batches an epoch, the last of 4 examples
        for count, flags in ((1, dict(beta_warmup=2.0)), (1, dict(lr_schedule="cosine")), (3, {}), (3, dict(beta_cycles=2, free_bits=0.1))):
            settings = self.settings(count, overwrite=True, **flags)
            expected, _ = self.fit(settings, data)
            curves = [self.curves(f, data) for f in settings]
            for stop_after in (1, 3, 4, 6, 12) + ((13,) if count > 1 else ()):
                self.fit(settings, data, stop_after)
                found, err = self.fit(settings, data)
                self.assertIn("going on after ", err)
                for a, b in zip(expected, found):
                    for name, value in a.state_dict().items():
                        self.assertTrue(torch.equal(value, b.state_dict()[name]), (count, stop_after, name))
                self.assertEqual([self.curves(f, data) for f in settings], curves)
                self.assertFalse((self.folder / "MNIST_HVAE_Relu" / "checkpoints").exists())

    def test_killed_between_the_results_of_a_group(self):
        """The finished ones stay as they are, the others come from the checkpoint of all."""
        data, settings = small.digit_data(100, 4, torch.float32), self.settings(3)
        expected, _ = self.fit(settings, data)
        again, begun = [dataclasses.replace(f, seed=1) for f in settings], []
        real = files.write_json

        def second_fails(path, value):
            begun.append(path)
            if len(begun) == 2:
                raise SystemExit
            real(path, value)

        with mock.patch("files.write_json", second_fails):
            self.fit(again, data)
        undisturbed = [dataclasses.replace(f, out_dir=f"{self.folder}/other") for f in again]
        expected, _ = self.fit(undisturbed, data)
        with mock.patch("training.train_group", wraps=training.train_group) as spy:
            found, err = self.fit(again, data)
        self.assertEqual(len(spy.call_args.args[1]), 3)
        self.assertIn("going on after 3 of 3 epochs", err)
        self.assertEqual(err.count("already trained"), 1)
        for a, b in zip(expected, found):
            for name, value in a.state_dict().items():
                self.assertTrue(torch.equal(value, b.state_dict()[name]))

    def test_refused(self):
        """Truncated, of another version, or of other settings: named, and training starts over."""
        data, [f, other] = small.digit_data(100, 4, torch.float32), self.settings(2)
        path, _ = self.fit([f], data, 5)
        whole = path.read_bytes()
        saved = torch.load(path, weights_only=True)
        elsewhere, _ = self.fit([other], data, 5)

        def of_another(**values):
            buffer = io.BytesIO()
            torch.save(saved | {"of": saved["of"] | values}, buffer)
            return buffer.getvalue()

        for content, says in ((whole[:-300], "it is not whole"), (b"", "it is not whole"), (b"no checkpoint", "it is not whole"),
                              (of_another(torch="1.0"), "it is of another torch"),
                              (of_another(format=0), "it is of another format"),
                              (of_another(device="cuda (NVIDIA H200)"), "it is of another device"),
                              (of_another(script="0"), "it is of another script"),
                              (elsewhere.read_bytes(), "it is of another settings")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            _, err = self.fit([dataclasses.replace(f, overwrite=True)], data)
            self.assertIn(f"checkpoint {path} is refused, training starts over: {says}", err)
            self.assertNotIn("going on", err)
            self.assertFalse(path.exists())

    def test_no_pickle_is_executed(self):
        data, [f] = small.digit_data(100, 4, torch.float32), self.settings(1)
        path, _ = self.fit([f], data, 5)
        harmed = self.folder / "harmed"

        class Harm:
            def __reduce__(self):
                return Path.touch, (harmed,)

        torch.save({"of": Harm(), "state": {}}, path)
        _, err = self.fit([f], data)
        self.assertIn("is refused", err)
        self.assertFalse(harmed.exists())

    def test_another_evaluation_trains_nothing(self):
        """Other draws take over the trained weights, not so anything else; nor are they taken over where they are broken."""
        data, [f] = small.digit_data(100, 4, torch.float32), self.settings(1)
        [model], _ = self.fit([f], data)
        more = dataclasses.replace(f, num_samples=7)
        (again, *_), err = self.fit([more, dataclasses.replace(more, num_samples=8)], data)
        self.assertEqual((err.count("already trained"), err.count("training: ")), (2, 0))
        for name, weights in model.state_dict().items():
            self.assertTrue(torch.equal(again.state_dict()[name], weights), name)
        self.assertEqual(self.curves(more, data) | {"settings": 0}, self.curves(f, data) | {"settings": 0})
        self.assertEqual(files.read_result(more, data, "training.json")["settings"]["num_samples"], 7)
        self.assertTrue((files.run_dir(more, data) / "model.pt").exists())
        for other in (dataclasses.replace(f, seed=1), dataclasses.replace(more, d_2=3), dataclasses.replace(more, lr=2e-3)):
            _, err = self.fit([other], data)
            self.assertNotIn("already trained", err)
        for draws in (0, 7):                                  # a diverged training, too, is not made twice
            [lost], err = self.fit([dataclasses.replace(f, lr=1e6, num_samples=draws)], data)
            self.assertEqual((lost, "already trained" in err), (None, draws == 7))
        broken = dataclasses.replace(f, d_1=4)
        self.fit([broken], data)
        (files.run_dir(broken, data) / "model.pt").write_bytes(b"")
        _, err = self.fit([dataclasses.replace(broken, num_samples=7)], data)
        self.assertIn("training again", err)
        self.assertNotIn("already trained", err)

    def test_where_there_are_no_locks(self):
        """Some network file systems have none: said, and trained all the same."""
        data, [f] = small.digit_data(100, 4, torch.float32), self.settings(1)
        with mock.patch("fcntl.lockf", side_effect=OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))):
            [model], err = self.fit([f], data)
        self.assertIsNotNone(model)
        self.assertIn("warning: no locks in ", err)

    def test_results_of_before_a_flag_was_new(self):
        """A finished run's settings may lack a flag: it counts as at its default, or as at what runs did before it was there."""
        data, [f] = small.digit_data(100, 4, torch.float32), self.settings(1)
        self.fit([f], data)
        path = files.run_dir(f, data) / "training.json"
        training = json.loads(path.read_text())
        del training["settings"]["matmul"]
        path.write_text(json.dumps(training))
        self.assertIsNotNone(files.read_result(f, data, "training.json"))
        self.assertIsNone(files.read_result(dataclasses.replace(f, matmul="tf32"), data, "training.json"))
        since = dataclasses.make_dataclass("Flags", [("start", float, common.flag(0.1, "started from", before=1.0))], bases=(type(f),))
        read = [files.read_result(since(**vars(f), start=start), data, "training.json", files.run_dir(f, data)) for start in (0.1, 1.0)]
        self.assertEqual([result is not None for result in read], [False, True])
        del training["settings"]["d_hidden"]                  # not at its default here
        path.write_text(json.dumps(training))
        self.assertIsNone(files.read_result(f, data, "training.json"))

    def test_rows_are_no_draws(self):
        """Where --num_samples is the number of rows, other rows train anew, other draws do not."""
        argv = ("--dim_x", 3, "--dim_y", 3, "--dim_z", 2, "--num_epochs", 1, "--device", "cpu", "--out_dir", self.folder)
        for flags, trained in (((40, 0), True), ((40, 5), False), ((50, 5), True)):
            status, _, err = small.call(Synthetic_CVAE_Relu_correlation.main, *argv, "--num_samples", flags[0], "--num_draws", flags[1])
            self.assertEqual((status, "training: epoch" in err, "already trained" in err), (0, trained, not trained), err)


class Together(small.InFolder):
    """One setting by all processes: the loop of the deep scripts."""

    def test_of_another_number_of_processes(self):
        """Their steps are other ones: the checkpoint is refused."""
        f = MNIST_HVAE_Ladder.Flags(num_epochs=1, out_dir=str(self.folder), device="cpu", batch_size=8)
        images = torch.rand(32, 1, 28, 28)
        data = datasets.Data("digits", (images,), (images,))
        training.Checkpoint([f], data, processes=2).write({"": {}})
        with contextlib.redirect_stderr(io.StringIO()) as err:
            self.assertIsNone(training.Checkpoint([f], data).state)
        self.assertIn("it is of another processes", err.getvalue())

    def test_models_are_built_before_the_noise_begins(self):
        """Building reseeds CUDA's generator: within the noise's seeds it would draw what a layer's initial weights are drawn from."""
        begun, seeded = [], common.seeded

        def noted(seed, purpose, device):
            begun.append(purpose)
            return seeded(seed, purpose, device)

        images = torch.rand(16, 1, 28, 28)
        data = datasets.Data("digits", (images,), (images,))
        f = MNIST_HVAE_Ladder.Flags(num_epochs=1, device="cpu", batch_size=8, latents="1,1", num_ch=4)
        with mock.patch("common.seeded", noted):
            train(MNIST_HVAE_Relu.HVAE, [self.small], small.digit_data(40))
            with mock.patch("sys.stderr"):
                training.train_group(MNIST_HVAE_Ladder.LadderVAE, [f], data, train=MNIST_HVAE_Ladder.train)
        self.assertEqual(begun, ["init", "noise"] * 2)

    small = flags(MNIST_HVAE_Relu.Flags, d_hidden=8, d_1=3, d_2=2)

    def test_divergence(self):
        """A loss that is not finite ends the training; its epoch and the last finite loss are told."""
        with tempfile.TemporaryDirectory() as folder:
            f = MNIST_HVAE_Ladder.Flags(num_epochs=5, out_dir=folder, device="cpu", batch_size=8)
            images = torch.rand(16, 1, 28, 28)
            loop = training.Training([f], datasets.Data("digits", (images,), (images,)), together=True)
            losses = iter([3.0, 1.0, 2.5, float("nan"), 1.0, 1.0])
            with contextlib.redirect_stderr(io.StringIO()):
                for _ in loop.batches():
                    loop.record({"loss": torch.tensor(next(losses))})
        self.assertEqual(loop.diverged, [{"epoch": 2, "last_finite_loss": 2.5}])
        self.assertEqual(loop.results()[0]["curves"], {"loss": [2.0]})


@unittest.skipUnless(torch.cuda.is_available(), "no CUDA device")
class Cuda(unittest.TestCase):
    def test_grid_like_alone(self):
        data = small.digit_data()
        data = dataclasses.replace(data, train=(data.train[0].cuda(),), test=(data.test[0].cuda(),))
        settings = [flags(MNIST_HVAE_Relu.Flags, d_hidden=20, beta_1=beta) for beta in (0.1, 1.0)]
        for f, in_grid in zip(settings, states(train(MNIST_HVAE_Relu.HVAE, settings, data))):
            [alone] = states(train(MNIST_HVAE_Relu.HVAE, [f], data))
            for name, value in alone.items():
                torch.testing.assert_close(in_grid[name], value, rtol=0, atol=1e-9)

    def test_captured_like_step_by_step(self):
        """A captured step, replayed, gives what the same steps give launched one by one: noise, clipping, schedule and all."""
        data = small.digit_data(300)                          # nine full batches of 32 an epoch and one of 12
        data = dataclasses.replace(data, train=(data.train[0].cuda(),), test=(data.test[0].cuda(),))
        for schedule in ("constant", "cosine"):
            group = [flags(MNIST_HVAE_Relu.Flags, d_hidden=20, beta_1=beta, lr_schedule=schedule) for beta in (0.1, 1.0)]
            captured = train(MNIST_HVAE_Relu.HVAE, group, data)
            with mock.patch("training.Replayed.EAGER", 10**9):
                launched = train(MNIST_HVAE_Relu.HVAE, group, data)
            for (a, of_a), (b, of_b) in zip(captured, launched):
                for name, value in b.state_dict().items():
                    torch.testing.assert_close(a.state_dict()[name], value, rtol=0, atol=1e-9)
                for x, y in zip(of_a["curves"]["loss"], of_b["curves"]["loss"], strict=True):
                    self.assertAlmostEqual(x, y, delta=1e-9 * abs(y))


if __name__ == "__main__":
    unittest.main()
