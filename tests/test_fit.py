"""fit: the same numbers as a plain loop, alone or in a grid, or twice; what is finished, diverged or interrupted."""
import dataclasses
import json
import math
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

import common
import MNIST_HVAE_Relu
from tests import small


def flags(Flags=small.Flags, **values):
    return Flags(**{"batch_size": 32, "num_epochs": 2, "num_samples": 0, "device": "cpu"} | values)


def train(Model, group, data):
    with mock.patch("sys.stderr"):
        return common.train(Model, group, data)


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

    def test_curves_are_means_over_examples(self):
        """A small last batch counts by its examples."""
        class Still(torch.nn.Module):
            def __init__(self, f):
                super().__init__()
                self.scale = torch.nn.Parameter(torch.ones(()))

            def forward(self, x, f, sample_shape=()):
                return {"log_px_z": self.scale * x[:, 0], "kl_1": self.scale * x[:, 1:3].abs()}

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
                    mock.patch("common.train", wraps=common.train) as spy:
                placed = [dataclasses.replace(f, out_dir=folder) for f in settings]
                found.append(common.fit(small.LinearHVAE, placed, [data] * 3, side_by_side=side_by_side))
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

    def test_released_objective_counts_the_reconstruction_twice(self):
        terms = {"log_px_z": torch.tensor([-3.0, -5.0]), "kl_1": torch.tensor([[1.0, 2.0], [0.5, 0.0]]),
                 "kl_2": torch.tensor([[4.0], [1.0]])}
        f = flags(MNIST_HVAE_Relu.Flags, beta_1=2.0, beta_2=0.5)
        self.assertEqual(common.beta_elbo_loss(terms, f).tolist(), [3 + 2 * 3 + 0.5 * 4, 5 + 2 * 0.5 + 0.5])
        f.released_objective = True
        self.assertEqual(common.beta_elbo_loss(terms, f).tolist(), [6 + 2 * 3 + 0.5 * 4, 10 + 2 * 0.5 + 0.5])


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
        common.clip(stacked, 0.5, 3)
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


class Finished(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(common.unlock)
        self.data = [small.gaussian_data()] * 2
        self.settings = [flags(beta_1=beta, out_dir=folder.name) for beta in (0.5, 1.0)]

    def fit(self, settings):
        with mock.patch("sys.stderr"), mock.patch("common.train", wraps=common.train) as spy:
            models = common.fit(small.LinearHVAE, settings, self.data[:len(settings)])
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
        training = common.run_dir(f, self.data[0]) / "training.json"
        text = training.read_text()
        for broken in (text[:-20], "", text.replace('"d_1": 3', '"d_1": 4')):
            training.write_text(broken)
            self.assertEqual(self.fit([f])[1], [1])

    def test_a_model_that_cannot_be_read_is_trained_again(self):
        [f] = self.settings[:1]
        self.fit([f])
        model = common.run_dir(f, self.data[0]) / "model.pt"
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
        folder = common.run_dir(f, self.data[0])
        for name in ("result.json", "units.npz", "collapse.png"):
            (folder / name).write_text("old")
        self.fit([dataclasses.replace(f, overwrite=True)])
        self.assertEqual({path.name for path in folder.iterdir()}, {"model.pt", "training.json"})

    def test_interrupted_in_the_second_group(self):
        """Ctrl-C: what was finished stays."""
        settings = [self.settings[0], dataclasses.replace(self.settings[0], seed=1)]
        real = common.train

        def interrupted(Model, group, data, checkpoint):
            if group[0].seed == 1:
                raise KeyboardInterrupt
            return real(Model, group, data, checkpoint)

        with mock.patch("sys.stderr"), mock.patch("common.train", interrupted), self.assertRaises(KeyboardInterrupt):
            common.fit(small.LinearHVAE, settings, self.data)
        self.assertEqual(self.fit(settings)[1], [1])

    def test_files_are_whole_or_absent(self):
        path = Path(self.settings[0].out_dir, "deep", "file")
        common.write(path, lambda file: file.write(b"first"))

        def breaks(file):
            file.write(b"half")
            raise OSError("disk full")
        with self.assertRaises(OSError):
            common.write(path, breaks)
        with mock.patch("os.replace", side_effect=OSError("killed")), self.assertRaises(OSError):
            common.write(path, lambda file: file.write(b"second"))
        self.assertEqual([p.name for p in path.parent.iterdir()], ["file"])
        self.assertEqual(path.read_bytes(), b"first")

    def test_run_names(self):
        data = self.data[0]
        self.assertEqual(common.run_name(small.Flags(), dataclasses.replace(data, name="mnist")), "default")
        self.assertEqual(common.run_name(small.Flags(beta_1=0.1, seed=2, device="cpu"), data),
                         "beta_1=0.1,seed=2,dataset=gaussian")
        long = {f"flag_{k}": 0.123456789 for k in range(30)}
        self.assertLess(len(common.spell(long)), 256)
        self.assertNotEqual(common.spell(long), common.spell(long | {"flag_29": 1}))


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
            with mock.patch("common.Replayed.EAGER", 10**9):
                launched = train(MNIST_HVAE_Relu.HVAE, group, data)
            for (a, of_a), (b, of_b) in zip(captured, launched):
                for name, value in b.state_dict().items():
                    torch.testing.assert_close(a.state_dict()[name], value, rtol=0, atol=1e-9)
                for x, y in zip(of_a["curves"]["loss"], of_b["curves"]["loss"], strict=True):
                    self.assertAlmostEqual(x, y, delta=1e-9 * abs(y))


if __name__ == "__main__":
    unittest.main()
