"""The deep models: going on after a kill, many processes, and what deep.py holds: schedule, average, measurements."""
import contextlib
import dataclasses
import io
import json
import os
import signal
import time
import unittest
from unittest import mock

import numpy as np
import torch
from torch.distributions import Normal

import common
import datasets
import deep
import files
import pictures
import training
import MNIST_HVAE_DCT
import MNIST_HVAE_DVP
import MNIST_HVAE_Ladder
import MNIST_VAE_Delta
from tests import small

SMALL = {MNIST_HVAE_Ladder: "--latents 1,2 --num_ch 4", MNIST_HVAE_DCT: "--latents 1,1 --num_ch 4 --diffusion_ch 2",
         MNIST_HVAE_DVP: "--latents 1,1 --num_ch 4 --diffusion_ch 2",
         MNIST_VAE_Delta: "--num_ch 4 --dim_z 2 --num_layers 2 --d_hidden 8 --auxiliary_epochs 2"}
PHASES = {MNIST_VAE_Delta: ["", "auxiliary"]}


class OfScripts(small.InFolder):
    def argv(self, script, out_dir, **flags):
        flags = {"data_dir": self.folder / "data", "out_dir": self.folder / out_dir, "device": "cpu", "num_samples": 0,
                 "num_test": 20, "lr": 0.01} | flags
        return [*SMALL[script].split(), *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]

    def left(self, script, out_dir):
        """(training.json but for seconds, weights) of the one run that is there."""
        [folder] = (self.folder / out_dir / script.__name__).glob("*/")
        trained = json.loads((folder / "training.json").read_text())
        return {name: of for name, of in trained.items() if name != "seconds"}, torch.load(folder / "model.pt", weights_only=True)


class CommandLine(OfScripts):
    def test_settings_that_measure_different_things(self):
        """A prior with a context on top and one without, with a log-likelihood and without: "-" for what a setting does not have."""
        small.write_mnist(self.folder / "data")
        argv = self.argv(MNIST_HVAE_DVP, "runs", num_epochs=1, batch_size=128, latents="2,1", prior="vamp,diffusion", pseudoinputs=5)
        with mock.patch.object(pictures, "draw_run"):     # those of grids are drawn
            self.assertEqual(small.call(MNIST_HVAE_DVP.main, *argv)[0], 0)
            status, out, err = small.call(MNIST_HVAE_DVP.main, *argv, "--num_samples", "0,2")
        self.assertEqual(status, 0, err)
        _, names, *rows = out.strip().split("\n")[:6]
        self.assertEqual(names.split()[2:4], ["log_px", "elbo"])
        rows = [dict(zip(names.split(), row.split())) for row in rows]
        self.assertEqual([(row["prior"], row["num_samples"]) for row in rows], [
            ("vamp", "0"), ("vamp", "2"), ("diffusion", "0"), ("diffusion", "2")])
        self.assertEqual([row["log_px"] == "-" for row in rows], [True, False, True, False])
        self.assertEqual([row["context_baseline"] == "-" for row in rows], [True, True, True, False])     # beside a log-likelihood
        levels = [row.split()[:3] for row in out.strip().split("\n")[8:]]
        self.assertEqual(levels, [[*row, str(level)] for row, top in (
            (["vamp", "0"], 3), (["vamp", "2"], 3), (["diffusion", "0"], 4), (["diffusion", "2"], 4)) for level in range(top, 0, -1)])
        [sheets] = [folder for folder in (self.folder / "runs").rglob("grids/*") if "num_samples=0+2" in folder.name]
        self.assertEqual({path.name for path in sheets.glob("*.png")} - {"metrics.png"}, {f"reconstructions_{k}.png" for k in range(6)})

    def test_each_script_leaves_complete_results(self):
        """Files, the table of totals, the table level by level; the same command again shows them and trains nothing."""
        small.write_mnist(self.folder / "data")
        for script in SMALL:
            with self.subTest(script=script.__name__), mock.patch.object(deep, "ATTACK_STEPS", 3):
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
                drawn = {"collapse.png", "reconstructions.png", "samples.png", "training.png"}
                drawn |= {"compression.png", "attack.png"} if further else set()
                self.assertEqual({path.name for path in run.glob("*.png")}, drawn)
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
                    self.assertEqual([row["radius"] for row in attack["rows"]], list(deep.RADII))
                status, again, err = small.call(script.main, *argv)
                self.assertEqual((status, again), (0, out))
                self.assertIn("already trained", err)
                self.assertNotIn("training: epoch", err)
                steps = ["--num_steps", 3] if script is MNIST_HVAE_DVP else []
                with mock.patch("pictures.draw_run"):
                    status, fewer, err = small.call(script.main, *argv[:-2 if further else None], "--num_test", 10, "--num_samples", 3, *steps)
                self.assertEqual(status, 0, err)              # of the same weights, evaluated anew
                self.assertIn("already trained", err)
                self.assertIn("256 training and 10 test examples", fewer)


class Killed(OfScripts):
    def test_goes_on_to_the_same_numbers(self):
        """Each script, killed right after a checkpoint, at several steps and in every phase; curves and weights bit by bit."""
        small.write_mnist(self.folder / "data")
        for script in SMALL:
            with self.subTest(script=script.__name__), mock.patch("pictures.draw_run"):
                flags = dict(num_epochs=2, batch_size=64, checkpoint_seconds=0, beta_warmup=1.5)
                status, _, err = small.call(script.main, *self.argv(script, "undisturbed", **flags))
                self.assertEqual(status, 0, err)
                trained, weights = self.left(script, "undisturbed")
                phases, kills, write = set(), [3, 2, 4, 1], training.Checkpoint.write     # steps until the next kill, last first
                ends, to_go = 0, [kills.pop()]

                def killed(checkpoint, state):
                    write(checkpoint, state)
                    phases.add(list(state)[-1])
                    to_go[0] -= 1
                    if to_go[0] == 0:
                        to_go[0] = kills.pop() if kills else -1
                        raise InterruptedError

                with mock.patch("training.Checkpoint.write", killed):
                    while True:
                        try:
                            status, _, err = small.call(script.main, *self.argv(script, "killed", **flags))
                            break
                        except InterruptedError:
                            ends += 1
                            files.unlock()
                self.assertEqual((status, ends), (0, 2 + len(phases)), err)
                self.assertIn("going on after ", err)
                self.assertEqual(phases, set(PHASES.get(script, [""])))
                again, same = self.left(script, "killed")
                self.assertEqual(again, trained)
                self.assertEqual(same.keys(), weights.keys())
                for name in weights:
                    self.assertTrue(torch.equal(same[name], weights[name]), name)
                self.assertFalse((self.folder / "killed" / script.__name__ / "checkpoints").exists())

    def test_more_rows_than_there_are(self):
        small.write_mnist(self.folder / "data")
        status, _, err = small.call(MNIST_HVAE_Ladder.main, *self.argv(MNIST_HVAE_Ladder, "x", batch_size=257))
        self.assertEqual(status, 2)
        self.assertIn("--batch_size: got 257 for 1 process(es), wants at most the 256 training examples", err)


class ManyProcesses(OfScripts):
    def test_two_are_one_with_the_doubled_batch(self):
        """Five steps of each script: the curves of two processes, as by torchrun, and of one with batches twice as large."""
        small.write_mnist(self.folder / "data")
        commands = {script.__name__: self.argv(script, "two", num_epochs=5, batch_size=128) for script in SMALL}
        (self.folder / "all.py").write_text(
            "import importlib, common\n"
            f"common.run(lambda: max(importlib.import_module(name).main(argv) for name, argv in {commands!r}.items()))\n")
        both, _, errs = small.two_processes(self, self.folder / "all.py", [], self.folder, "two")
        self.assertEqual(small.ended(both, 300), [0, 0], [err.read_text() for err in errs])
        for script in SMALL:
            with mock.patch("pictures.draw_run"):
                status, _, err = small.call(script.main, *self.argv(script, "one", num_epochs=5, batch_size=256))
            self.assertEqual(status, 0, err)
            one, two = (self.left(script, out_dir)[0]["curves"] for out_dir in ("one", "two"))
            self.assertEqual(one.keys(), two.keys())
            self.assertEqual(len(one["loss"]), 5)
            for name in one:
                np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-4, err_msg=f"{script.__name__} {name}")


class Stopped(OfScripts):
    def test_processes_agree_to_stop(self):
        """SIGTERM reaches two processes 20 ms or 2 s apart, in either order: both end with one line, a checkpoint is left, and from the
        last of them both go on to the very numbers of an undisturbed run."""
        small.write_mnist(self.folder / "data")

        def start(out_dir, number):
            argv = self.argv(MNIST_HVAE_Ladder, out_dir, num_epochs=20, batch_size=24, checkpoint_seconds=1000)
            both, _, logs = small.two_processes(self, "MNIST_HVAE_Ladder.py", argv, self.folder, f"{out_dir}{number}")
            return both, logs

        def end(both, logs):
            return small.ended(both), [log.read_text() for log in logs]

        status, log = end(*start("undisturbed", 0))
        self.assertEqual(status, [0, 0], log)
        going_on = 0
        for number, (first, seconds) in enumerate([(0, 0.02), (1, 0.02), (0, 2.0), (1, 2.0)]):
            both, logs = start("stopped", number)
            deadline = time.monotonic() + 60
            while not all(log.exists() and "training: epoch" in log.read_text() for log in logs) and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(both[first].pid, signal.SIGTERM)
            time.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(both[1 - first].pid, signal.SIGTERM)
            status, log = end(both, logs)
            self.assertEqual(status, [128 + signal.SIGTERM] * 2, log)
            for of in log:
                self.assertEqual(of.count("interrupted; what was finished stays"), 1, of)
                self.assertNotIn("Traceback", of)
            self.assertEqual(len(list((self.folder / "stopped").rglob("checkpoints/*.pt"))), 1)
            going_on += "going on after " in log[0]
        self.assertEqual(going_on, 3)
        status, log = end(*start("stopped", 4))
        self.assertEqual(status, [0, 0], log)
        (again, same), (trained, weights) = (self.left(MNIST_HVAE_Ladder, out_dir) for out_dir in ("stopped", "undisturbed"))
        self.assertEqual(again, trained)
        for name in weights:
            self.assertTrue(torch.equal(same[name], weights[name]), name)


class Steps(unittest.TestCase):
    def test_schedule(self):
        """A line up over the warm-up, then a cosine from lr down to lr_end."""
        f = MNIST_HVAE_Ladder.Flags(num_epochs=10, warmup_epochs=2.0, lr=0.01, lr_end=1e-4)
        optimizer = torch.optim.Adamax([torch.nn.Parameter(torch.zeros(1))], lr=f.lr)
        schedule, rates = deep.warmup_cosine(optimizer, f, 1000), []
        for _ in range(1000):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        np.testing.assert_allclose(np.diff(rates[:200]), 0.01 / 201)
        after = np.arange(800) / 800
        np.testing.assert_allclose(rates[200:], 1e-4 + (0.01 - 1e-4) * (1 + np.cos(np.pi * after)) / 2)
        constant = deep.warmup_cosine(optimizer, MNIST_HVAE_Ladder.Flags(lr_schedule="constant"), 1000).lr_lambdas[0]
        self.assertEqual([constant(step) for step in (50, 999)], [1.0, 1.0])

    def test_what_a_captured_step_changes_lies_on_the_device(self):
        """The learning rate and the optimiser's count of steps: after a checkpoint, too, no step asks the host for them."""
        parameter = mock.Mock(is_cuda=True, device="cpu")
        for name, kind in (("adamax", "Adamax"), ("adamw", "AdamW")):
            asked = {}
            with mock.patch(f"torch.optim.{kind}", lambda parameters, **of: asked.update(of)):
                deep.optimizer(mock.Mock(parameters=lambda: iter([parameter])), MNIST_HVAE_Ladder.Flags(lr=0.01, optimizer=name), 0.5)
            self.assertTrue(asked["capturable"] and torch.is_tensor(asked["lr"]))
            self.assertEqual(asked["weight_decay"], 0.5)

    def test_weight_average(self):
        f, model = MNIST_HVAE_Ladder.Flags(ema=0.9), torch.nn.Linear(1, 1, bias=False).double()
        average, expected = deep.WeightAverage(model, f), None
        for value in (3.0, -1.0, 5.0, 2.0):
            with torch.no_grad():
                model.weight.fill_(value)
            average.update(model)
            expected = value if expected is None else 0.9 * expected + 0.1 * value
        self.assertAlmostEqual(average.module.weight.item(), expected, places=12)
        self.assertFalse(average.module.weight.requires_grad)


class FlagsOfAll(unittest.TestCase):
    def test_preset(self):
        """It stands for the flags that --help says, which all others overrule, wherever they stand."""
        for script in SMALL:
            Flags = script.Flags
            small_ones = dict(zip(*[iter(word.removeprefix("--") for word in Flags.small.split())] * 2))
            for argv in (["--preset", "small", "--num_epochs", "3"], ["--num_epochs", "3", "--preset=small"]):
                [f] = common.parse_flags(Flags, argv)
                self.assertEqual((f.num_epochs, f.preset), (3, "published"))
                for name, value in small_ones.items():
                    self.assertEqual(str(getattr(f, name)), value if name != "num_epochs" else "3", name)
            self.assertEqual(files.changed(f, None).keys(), set(small_ones) - {"preset"} | {"num_epochs"})
            self.assertEqual(common.parse_flags(Flags, []), [Flags()])
            for wrong in ("large", "small,published"):
                status, out, err = small.call(script.main, "--preset", wrong)
                self.assertEqual((status, out, err.count("\n")), (2, "", 1))
                self.assertIn("--preset: got ", err)

    def test_loss_with_beta_and_free_bits(self):
        """-log p(x|z) + beta sum_l sum_i of a unit's KL, or of --free_bits where its mean over the batch is less; the context's KL,
        which nothing is learned of, counts as it is."""
        torch.manual_seed(0)
        for script, Model, units in ((MNIST_HVAE_Ladder, "LadderVAE", 2), (MNIST_HVAE_DCT, "DCTVAE", 3), (MNIST_HVAE_DVP, "DVPVAE", 3),
                                     (MNIST_VAE_Delta, "DeltaVAE", 0)):
            f = script.Flags(**dict(zip(("latents", "num_ch"), ("1,1", 2))) if units else {}, beta=0.7, free_bits=0.4, device="cpu")
            model, g = getattr(script, Model)(f), common.on_device(f, torch.zeros(1))
            names = [f"kl_{l}" for l in range(1, units + 1)] or ["kl"]
            terms = {"log_px_z": torch.randn(5)} | {name: torch.rand(5, 4) for name in names}
            expected = -terms["log_px_z"].mean()
            for name in names:
                means = terms[name].mean(0)
                expected += 0.7 * (means if name == "kl_3" else means.clamp(min=0.4)).sum()
            self.assertAlmostEqual(model.loss(terms, g).mean().item(), expected.item(), places=5)

    def test_temperature_is_the_samples_alone(self):
        """Samples at temperature 0 are the priors' means; at 2, with half the noise, those at 1."""
        for script, Model in ((MNIST_HVAE_Ladder, "LadderVAE"), (MNIST_HVAE_DCT, "DCTVAE"), (MNIST_HVAE_DVP, "DVPVAE")):
            f = {t: script.Flags(latents="1,1", num_ch=2, device="cpu", temperature=t, **(
                {} if script is MNIST_HVAE_Ladder else {"diffusion_ch": 2})) for t in (0.0, 1.0, 2.0)}
            model = getattr(script, Model)(f[1.0]).eval()
            context = {} if script is MNIST_HVAE_Ladder else {"p_c": "p_c", "r": "r"}
            part = next((getattr(model, name) for name in context if hasattr(model, name)), None)
            drawn = torch.zeros(2, 1, 7, 7)
            with mock.patch.object(part, "sample", lambda *of: drawn) if part is not None else contextlib.nullcontext(), torch.no_grad():
                def samples(t, times):
                    noise = [times * torch.randn(2, 1, side, side, generator=torch.Generator().manual_seed(side)) for side in (7, 14)]
                    with mock.patch.object(common, "normal_like", side_effect=noise):
                        images = model.samples(2, f[t])
                    return images["what comes of them"] if isinstance(images, dict) else images
                torch.testing.assert_close(samples(2.0, 0.5), samples(1.0, 1.0))
                torch.testing.assert_close(samples(0.0, 3.0), samples(1.0, 0.0))
                self.assertGreater((samples(1.0, 1.0) - samples(0.0, 1.0)).abs().max().item(), 1e-4)

    @torch.no_grad()
    def test_temperature_of_the_delta_vaes_priors(self):
        """At 0 the mean of the AR(1) prior, 0, and what the auxiliary prior's means lead to; at 2 draws of the former twice as far."""
        model = MNIST_VAE_Delta.DeltaVAE(MNIST_VAE_Delta.Flags(d_hidden=4, num_ch=2, device="cpu")).float().eval()
        model.auxiliary.of_step.normal_()
        z, auxiliary = ({t: (torch.manual_seed(0), sample(3, t))[1] for t in (0.0, 1.0, 2.0)}
                        for sample in (model.sample_z, model.auxiliary.sample))
        self.assertFalse(z[0.0].any())
        torch.testing.assert_close(z[2.0], 2 * z[1.0])
        torch.testing.assert_close(auxiliary[0.0][1:], auxiliary[0.0][:2])        # all the same, and p(z_1)'s mean
        torch.testing.assert_close(auxiliary[0.0][0, 0], model.auxiliary.of_step[0, :4])
        torch.testing.assert_close(auxiliary[2.0][:, 0] - auxiliary[0.0][:, 0], 2 * (auxiliary[1.0][:, 0] - auxiliary[0.0][:, 0]))
        drawn = []
        with mock.patch.object(model.decoder, "sample", drawn.append):
            for temperature in (0.0, 1.0):
                model.samples(3, MNIST_VAE_Delta.Flags(temperature=temperature, device="cpu"))
        self.assertEqual([bool((z - z[:1]).any()) for z in drawn], [False, False, True, True])

    def test_flips(self):
        """About half of the images are mirrored, left to right, the others as they were."""
        x = torch.rand(400, 3, 4, 4)
        flipped = deep.flipped(x)
        same = (flipped == x).flatten(1).all(1)
        self.assertTrue(torch.equal(flipped[~same], x[~same][..., [3, 2, 1, 0]]))
        self.assertGreater(min(same.sum().item(), 400 - same.sum().item()), 150)


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


class Further(OfScripts):
    def setUp(self):
        super().setUp()
        self.f = MNIST_HVAE_Ladder.Flags(out_dir=str(self.folder), device="cpu")
        self.x = 0.3 + 0.4 * torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(1))     # no ball leaves [0, 1]
        self.data, self.model = datasets.Data("digits", (self.x,), (self.x,)), LinearTop()

    def measure(self, what):
        """What a run leaves; again, what is there is shown without a model."""
        f, printed = dataclasses.replace(self.f, evaluate=what), []
        for model in (self.model, object()):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                deep.evaluate_further([model], [f], [self.data])
            printed.append(out.getvalue())
        self.assertEqual(printed[0], printed[1])
        self.assertIn("seed=0, 6 test images: ", printed[0])
        folder = files.run_dir(self.f, self.data)
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
