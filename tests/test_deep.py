"""What the deep models share: loaders, noise and training of many processes, going on, schedule, average, measurements."""
import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import types
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.distributions import Normal

import common
import MNIST_HVAE_DCT
import MNIST_HVAE_DVP
import MNIST_HVAE_Ladder
import MNIST_VAE_Delta
from tests import small

SMALL = {MNIST_HVAE_Ladder: "--latents 1,2 --num_ch 4", MNIST_HVAE_DCT: "--latents 1,1 --num_ch 4",
         MNIST_HVAE_DVP: "--latents 1,1 --num_ch 4", MNIST_VAE_Delta: "--num_ch 4 --dim_z 2 --num_layers 2 --d_hidden 8 --auxiliary_epochs 2"}
PHASES = {MNIST_VAE_Delta: ["", "auxiliary"]}


class InFolder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(common.unlock)
        self.folder = Path(folder.name)

    def argv(self, script, out_dir, **flags):
        flags = {"data_dir": self.folder / "data", "out_dir": self.folder / out_dir, "device": "cpu", "num_samples": 0,
                 "num_test": 20, "lr": 0.01} | flags
        return [*SMALL[script].split(), *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]

    def left(self, script, out_dir):
        """(training.json but for seconds, weights) of the one run that is there."""
        [folder] = (self.folder / out_dir / script.__name__).glob("*/")
        training = json.loads((folder / "training.json").read_text())
        return {name: of for name, of in training.items() if name != "seconds"}, torch.load(folder / "model.pt", weights_only=True)


class CommandLine(InFolder):
    def test_each_script_leaves_complete_results(self):
        """Files, the table of totals, the table level by level; the same command again shows them and trains nothing."""
        small.write_mnist(self.folder / "data")
        for script in SMALL:
            with self.subTest(script=script.__name__):
                further = ["--evaluate", "compression,attack"] if script is not MNIST_VAE_Delta else []
                argv = [*self.argv(script, "runs", num_epochs=1, num_samples=3, batch_size=128), *further]
                status, out, err = small.call(script.main, *argv)
                self.assertEqual(status, 0, err)
                [run] = (self.folder / "runs" / script.__name__).glob("*/")
                result = json.loads((run / "result.json").read_text())
                metrics = result["metrics"]
                self.assertTrue(np.isfinite(list(metrics.values())).all())
                levels = common.levels(metrics)
                totals = ["log_px", "elbo", "reconstruction", "kl", "AU", "AU_kl", "active_share"]
                self.assertLessEqual(set(totals), set(metrics))
                pictures = {"collapse.png", "reconstructions.png", "samples.png", "training.png"}
                pictures |= {"compression.png", "attack.png"} if further else set()
                self.assertEqual({path.name for path in run.glob("*.png")}, pictures)
                with np.load(run / "units.npz") as units:
                    per_level = {name: units[name] for name in units if name.startswith("unit_kl")}
                self.assertEqual({of.shape[0] for of in per_level.values()}, {20})
                for name, of in per_level.items():            # the ELBO's terms are these, unit by unit
                    self.assertAlmostEqual(of.sum(1).mean(), metrics[name.removeprefix("unit_")], places=3)
                self.assertAlmostEqual(metrics["elbo"], -metrics["reconstruction"] - metrics["kl"], places=3)
                table = out.strip().split("\n\n")
                names, values = (line.split() for line in table[0].split("\n")[1:3])
                self.assertEqual(len(names), len(values))
                self.assertAlmostEqual(float(values[names.index("elbo")]), metrics["elbo"], delta=0.006)
                self.assertIn("256 training and 20 test examples, cpu, nats per test example, seed 0", table[0])
                if len(levels) > 1:
                    rows = [line.split() for line in table[1].split("\n")]
                    self.assertEqual(rows[0], ["level", "kl", "AU", "AU_kl", "active_share"])
                    self.assertEqual([int(row[0]) for row in rows[1:]], list(range(len(levels) - 1, 0, -1)))
                    for row in rows[1:]:
                        self.assertAlmostEqual(float(row[1]), metrics[f"kl_{row[0]}"], delta=0.006)
                    self.assertAlmostEqual(sum(metrics[f"kl{level}"] for level in levels if level), metrics["kl"], places=4)
                    self.assertEqual(sum(metrics[f"AU_kl{level}"] for level in levels if level), metrics["AU_kl"])
                if further:
                    compression, attack = (json.loads((run / f"{name}.json").read_text()) for name in ("compression", "attack"))
                    self.assertEqual(len(compression["bits"]), len(levels))           # with none of the levels, with all
                    self.assertEqual([row["radius"] for row in attack["rows"]], list(common.RADII))
                status, again, err = small.call(script.main, *argv)
                self.assertEqual((status, again), (0, out))
                self.assertIn("already trained", err)
                self.assertNotIn("training: epoch", err)
                steps = ["--num_steps", 3] if script is MNIST_HVAE_DVP else []
                status, fewer, err = small.call(script.main, *argv, "--num_test", 10, "--num_samples", 3, *steps)
                self.assertEqual(status, 0, err)              # of the same weights, evaluated anew
                self.assertIn("already trained", err)
                self.assertIn("256 training and 10 test examples", fewer)


class Killed(InFolder):
    def test_goes_on_to_the_same_numbers(self):
        """Each script, killed right after a checkpoint, at several steps and in every phase; curves and weights bit by bit."""
        small.write_mnist(self.folder / "data")
        for script in SMALL:
            with self.subTest(script=script.__name__), mock.patch("common.draw_run"):
                flags = dict(num_epochs=2, batch_size=64, checkpoint_seconds=0)
                status, _, err = small.call(script.main, *self.argv(script, "undisturbed", **flags))
                self.assertEqual(status, 0, err)
                training, weights = self.left(script, "undisturbed")
                phases, kills, write = set(), [3, 2, 4, 1], common.Checkpoint.write     # steps until the next kill, last first
                ends, to_go = 0, [kills.pop()]

                def killed(checkpoint, state):
                    write(checkpoint, state)
                    phases.add(list(state)[-1])
                    to_go[0] -= 1
                    if to_go[0] == 0:
                        to_go[0] = kills.pop() if kills else -1
                        raise InterruptedError

                with mock.patch("common.Checkpoint.write", killed):
                    while True:
                        try:
                            status, _, err = small.call(script.main, *self.argv(script, "killed", **flags))
                            break
                        except InterruptedError:
                            ends += 1
                            common.unlock()
                self.assertEqual((status, ends), (0, 2 + len(phases)), err)
                self.assertIn("going on in epoch", err)
                self.assertEqual(phases, set(PHASES.get(script, [""])))
                again, same = self.left(script, "killed")
                self.assertEqual(again, training)
                self.assertEqual(same.keys(), weights.keys())
                for name in weights:
                    self.assertTrue(torch.equal(same[name], weights[name]), name)
                self.assertFalse((self.folder / "killed" / script.__name__ / "checkpoints").exists())

    def test_of_another_number_of_processes(self):
        """Their steps are other ones: the checkpoint is refused."""
        f = MNIST_HVAE_Ladder.Flags(num_epochs=1, out_dir=str(self.folder), device="cpu", batch_size=8)
        images = torch.rand(32, 1, 28, 28)
        data = common.Data("digits", (images,), (images,))
        common.Checkpoint([f], data, processes=2).write({"": {}})
        with contextlib.redirect_stderr(io.StringIO()) as err:
            self.assertEqual(common.Training(f, data).phases, {})
        self.assertIn("it is of another processes", err.getvalue())

    def test_more_rows_than_there_are(self):
        small.write_mnist(self.folder / "data")
        status, _, err = small.call(MNIST_HVAE_Ladder.main, *self.argv(MNIST_HVAE_Ladder, "x", batch_size=257))
        self.assertEqual(status, 2)
        self.assertIn("--batch_size: got 257 for 1 process(es), wants at most the 256 training examples", err)


class ManyProcesses(InFolder):
    def test_two_are_one_with_the_doubled_batch(self):
        """Ten steps of each script: the curves of two processes, by torchrun, and of one with batches twice as large."""
        small.write_mnist(self.folder / "data")
        commands = {script.__name__: self.argv(script, "two", num_epochs=10, batch_size=128) for script in SMALL}
        (self.folder / "all.py").write_text(
            f"import sys, importlib; sys.path.insert(0, {str(small.ROOT)!r})\nimport common\ncommon.draw_run = print\n"
            + f"common.run(lambda: max(importlib.import_module(name).main(argv) for name, argv in {commands!r}.items()))\n")
        ended = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                                str(self.folder / "all.py")], capture_output=True, text=True, timeout=300,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
        self.assertEqual(ended.returncode, 0, ended.stderr)
        for script in SMALL:
            with mock.patch("common.draw_run"):
                status, _, err = small.call(script.main, *self.argv(script, "one", num_epochs=10, batch_size=256))
            self.assertEqual(status, 0, err)
            one, two = (self.left(script, out_dir)[0]["curves"] for out_dir in ("one", "two"))
            self.assertEqual(one.keys(), two.keys())
            self.assertEqual(len(one["loss"]), 10)
            for name in one:
                np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-4, err_msg=f"{script.__name__} {name}")

    def test_rows_of_the_noise(self):
        """Each of three processes draws its rows of what one draws for all."""
        x, training = torch.zeros(4, 2, 3), types.SimpleNamespace(world=3)
        for draw, all_of in ((common.normal_like, torch.randn), (common.uniform_like, torch.rand)):
            torch.manual_seed(1)
            whole = all_of(12, 2, 3)
            for training.rank in range(3):
                torch.manual_seed(1)
                with common.Training.noise_of_all(training):
                    self.assertTrue(torch.equal(draw(x), whole[4 * training.rank:4 * training.rank + 4]))
            torch.manual_seed(1)
            alone = draw(x)                                   # outside of the training
            torch.manual_seed(1)
            self.assertTrue(torch.equal(alone, all_of(4, 2, 3)))


class Steps(unittest.TestCase):
    def test_schedule(self):
        """A line up over the warm-up, then a cosine from lr down to lr_end."""
        f = MNIST_HVAE_Ladder.Flags(num_epochs=10, warmup_epochs=2.0, lr=0.01, lr_end=1e-4)
        optimizer = torch.optim.Adamax([torch.nn.Parameter(torch.zeros(1))], lr=f.lr)
        schedule, rates = common.warmup_cosine(optimizer, f, 1000), []
        for _ in range(1000):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        np.testing.assert_allclose(np.diff(rates[:200]), 0.01 / 201)
        after = np.arange(800) / 800
        np.testing.assert_allclose(rates[200:], 1e-4 + (0.01 - 1e-4) * (1 + np.cos(np.pi * after)) / 2)
        constant = common.warmup_cosine(optimizer, MNIST_HVAE_Ladder.Flags(lr_schedule="constant"), 1000).lr_lambdas[0]
        self.assertEqual([constant(step) for step in (50, 999)], [1.0, 1.0])

    def test_weight_average(self):
        f, model = MNIST_HVAE_Ladder.Flags(ema=0.9), torch.nn.Linear(1, 1, bias=False).double()
        average, expected = common.weight_average(model, f), None
        for value in (3.0, -1.0, 5.0, 2.0):
            with torch.no_grad():
                model.weight.fill_(value)
            average.update_parameters(model)
            expected = value if expected is None else 0.9 * expected + 0.1 * value
        self.assertAlmostEqual(average.module.weight.item(), expected, places=12)
        self.assertFalse(average.module.weight.requires_grad)

    def test_divergence(self):
        """A loss that is not finite ends the training; its epoch and the last finite loss are told."""
        with tempfile.TemporaryDirectory() as folder:
            f = MNIST_HVAE_Ladder.Flags(num_epochs=5, out_dir=folder, device="cpu", batch_size=8)
            images = torch.rand(16, 1, 28, 28)
            training = common.Training(f, common.Data("digits", (images,), (images,)))
            losses = iter([3.0, 1.0, 2.5, float("nan"), 1.0, 1.0])
            with contextlib.redirect_stderr(io.StringIO()):
                for _ in training.batches():
                    training.record(torch.tensor(next(losses)))
        self.assertEqual(training.diverged, {"epoch": 2, "last_finite_loss": 2.5})
        self.assertEqual(training.summary()["curves"], {"loss": [2.0]})


class Sets(InFolder):
    def load(self, dataset, **flags):
        """The data, or what was said on stderr."""
        f = MNIST_HVAE_Ladder.Flags(dataset=dataset, data_dir=str(self.folder), device="cpu", **flags)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                return common.load_images([f])[0]
            except SystemExit as end:
                self.assertEqual(end.code, 2)
                return err.getvalue()

    def write_omniglot(self):
        """Two alphabets for training, one for the test, of two characters and three drawings each, in torchvision's folders, and
        what patches its checksums with those of these files."""
        from torchvision.transforms.functional import to_pil_image
        random = torch.Generator().manual_seed(1)
        for part, alphabets in (("images_background", "AB"), ("images_evaluation", "C")):
            for alphabet in alphabets:
                for character in (1, 2):
                    folder = self.folder / "omniglot-py" / part / alphabet / f"character0{character}"
                    folder.mkdir(parents=True)
                    for k in range(3):
                        ink = torch.ones(1, 105, 105)
                        row, column = torch.randint(5, 95, (2,), generator=random).tolist()
                        ink[:, row:row + 8, column:column + 4] = 0            # black on white
                        to_pil_image(ink).convert("1").save(folder / f"000{character}_0{k}.png")
        sums = {}
        for part in ("images_background", "images_evaluation"):
            path = shutil.make_archive(str(self.folder / "omniglot-py" / part), "zip", self.folder / "omniglot-py", part)
            sums[part] = hashlib.md5(Path(path).read_bytes()).hexdigest()
        from torchvision.datasets import Omniglot
        return mock.patch.object(Omniglot, "zips_md5", sums)

    def test_omniglot(self):
        patch = self.write_omniglot()
        with patch:
            data = self.load("omniglot", seed=3)
        self.assertEqual((data.train[0].shape, data.test[0].shape), ((12, 1, 28, 28), (6, 1, 28, 28)))
        ink = data.train[0].sum(dim=(1, 2, 3)) * (105 / 28) ** 2              # white on black, and area is kept
        torch.testing.assert_close(ink, torch.full_like(ink, 8 * 4.0), rtol=0.05, atol=0)
        self.assertEqual(data.train_labels.tolist(), [k // 3 for k in range(12)])
        self.assertEqual(data.test_labels.tolist(), [0, 0, 0, 1, 1, 1])
        broken = next((self.folder / "omniglot-py").rglob("*.png"))
        broken.write_bytes(b"no picture")
        with patch:
            self.assertIn("omniglot-py is truncated or corrupt", self.load("omniglot"))

    def write_cifar10(self):
        """Files of a few images each in the format of CIFAR-10, and what patches torchvision's checksums with theirs."""
        folder, random, files = self.folder / "cifar-10-batches-py", np.random.default_rng(2), {}
        folder.mkdir()
        for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
            files[name] = {"data": random.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": random.integers(0, 10, 4).tolist()}
        contents = files | {"batches.meta": {"label_names": list("abcdefghij")}}
        sums = {}
        for name, content in contents.items():
            (folder / name).write_bytes(pickle.dumps(content))
            sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
        pairs = [[name, of] for name, of in sums.items()]
        from torchvision.datasets import CIFAR10
        patch = mock.patch.multiple(CIFAR10, train_list=pairs[:5], test_list=pairs[5:6],
                                    meta=CIFAR10.meta | {"md5": sums["batches.meta"]})
        return files, patch

    def test_cifar10(self):
        files, patch = self.write_cifar10()
        with patch:
            data = self.load("cifar10", num_test=3)
        self.assertEqual((data.train[0].shape, data.test[0].shape), ((20, 3, 32, 32), (3, 3, 32, 32)))
        for k, name in enumerate(list(files)[:5]):
            of_file = torch.from_numpy(files[name]["data"]).view(4, 3, 32, 32) / 255
            torch.testing.assert_close(data.train[0][4 * k:4 * k + 4], of_file)
            self.assertEqual(data.train_labels[4 * k:4 * k + 4].tolist(), files[name]["labels"])
        torch.testing.assert_close(data.test[0], torch.from_numpy(files["test_batch"]["data"][:3]).view(3, 3, 32, 32) / 255)
        (self.folder / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"cut")
        with patch:
            self.assertIn("cifar-10-batches-py is truncated or corrupt", self.load("cifar10"))

    def test_neither_on_disk_nor_to_be_fetched(self):
        for name in ("omniglot", "cifar10"):
            with mock.patch("common._any_answers", return_value=False):
                self.assertRegex(self.load(name), f"--dataset: {name} is not in --data_dir .* and cannot be fetched")

    def test_binary_test_images(self):
        """Binarised once, by the seed: each pixel is on as often as it is grey, over seeds; the training images stay grey."""
        small.write_mnist(self.folder)
        settings = [MNIST_HVAE_Ladder.Flags(dataset="mnist", data_dir=str(self.folder), device="cpu", seed=seed, num_test=50)
                    for seed in [*range(400), 0]]
        whole = common.load_mnist(settings[:1])[0]
        data = common.load_images(settings)
        self.assertIs(data[0], data[-1])
        draws = torch.stack([d.test[0] for d in data[:400]])
        self.assertEqual(draws.unique().tolist(), [0.0, 1.0])
        grey = whole.test[0][:50].view(50, 1, 28, 28)
        error = (draws.mean(0) - grey) / (grey * (1 - grey) / 400).sqrt().clamp(min=1e-3)
        self.assertLess(error.abs().max(), 5)
        self.assertAlmostEqual(error[(grey > 0.1) & (grey < 0.9)].std().item(), 1, delta=0.1)
        torch.testing.assert_close(data[0].train[0].flatten(1), whole.train[0])


class LinearTop(torch.nn.Module):
    """One latent, q(z|x) = N(w x, 1), p(z) = N(0, 1), that is decoded to the pixels' mean beside z."""
    levels = learned_levels = 1

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(784, generator=torch.Generator().manual_seed(4)) / 28)

    def forward(self, x, f, sample_shape=()):
        mean = (x.flatten(1) @ self.w)[:, None].expand(*sample_shape, -1, -1)
        return {"kl_1": mean**2 / 2, "log_px_z": mean[..., 0]}

    def top_posterior(self, x, f, levels):
        return [Normal((x.flatten(1) @ self.w)[:, None], torch.ones(len(x), 1))]

    def reconstruct(self, x, f, keep):
        return (x.flatten(1) @ self.w * (keep > 0)).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)


class Further(InFolder):
    def setUp(self):
        super().setUp()
        self.f = MNIST_HVAE_Ladder.Flags(out_dir=str(self.folder), device="cpu")
        self.x = 0.3 + 0.4 * torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(1))     # no ball leaves [0, 1]
        self.data, self.model = common.Data("digits", (self.x,), (self.x,)), LinearTop()

    def measure(self, what):
        with contextlib.redirect_stdout(io.StringIO()):
            getattr(common, what)(self.model, self.f, self.f, self.data)
        folder = common.run_dir(self.f, self.data)
        self.assertTrue((folder / f"{what}.png").read_bytes().startswith(b"\x89PNG"))
        return json.loads((folder / f"{what}.json").read_text())

    def test_attack_finds_the_corner(self):
        """The symmetric KL is (w (x' - x))^2, largest in the corner radius sign(w): (radius |w|_1)^2, and each of the 784
        pixels of the reconstruction moves by its root."""
        found = self.measure("attack")
        norm = self.model.w.detach().abs().sum().item()
        for row in found["rows"]:
            self.assertAlmostEqual(row["symmetric_kl"], (row["radius"] * norm)**2, delta=1e-3 * (row["radius"] * norm)**2)
            self.assertAlmostEqual(row["distance"], 28 * row["radius"] * norm, delta=1e-3 * 28 * norm)
            if row["radius"]:
                self.assertLess(row["symmetric_kl_random"], 0.1 * row["symmetric_kl"])
        self.assertTrue(self.model.w.requires_grad)

    def test_compression(self):
        found = self.measure("compression")
        z = self.x.flatten(1) @ self.model.w.detach()
        np.testing.assert_allclose(found["bits"], [0, (z**2 / 2).mean() / np.log(2)], rtol=1e-5)
        np.testing.assert_allclose(found["squared_error"], [(self.x**2).mean(), (self.x - z.view(-1, 1, 1, 1)).square().mean()],
                                   rtol=1e-5)

    def test_a_word_that_is_none(self):
        status, _, err = small.call(MNIST_HVAE_Ladder.main, "--evaluate", "compression,attak", "--out_dir", self.folder)
        self.assertEqual(status, 2)
        self.assertIn("--evaluate: got 'attak', wants some of compression, attack", err)


if __name__ == "__main__":
    unittest.main()
