"""Evaluation and report.

The importance-sampling estimator is compared with exact log-likelihoods, the metrics with their
definitions. Result files that are wrong, and metrics that are not finite, must not stop a report.
"""
import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
import unittest
import warnings
from unittest import mock

import common
import numpy as np
import torch
from torch import nn

import datasets
import files
import headroom
import MNIST_HVAE_Relu
import MNIST_VAE_Linear_learnable_sigma as linear_script
import MNIST_VAE_Relu_learnable_sigma as vae_script
import pictures
import report
import training
from tests import small


def evaluate(model, f, data):
    """report.evaluate without its output."""
    with mock.patch("sys.stderr"):
        return report.evaluate(model.eval(), f, data)


def fit(Model, settings, data):
    """training.fit without its output."""
    with mock.patch("sys.stderr"):
        return training.fit(Model, settings, [data] * len(settings))


def print_report(runs):
    """report.report without pictures. Returns (exit status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with mock.patch("pictures.draw_run"), mock.patch("pictures.draw_grid"):
            status = report.report(runs)
    return status, out.getvalue(), err.getvalue()


def without_progress(err):
    """The lines of a report's stderr that are neither about progress nor names of folders."""
    lines = []
    for line in err.splitlines():
        if not line.startswith(("evaluating", "files: ")):
            lines.append(line)
    return lines


# --------------------------------------------------------------------------------------- evaluation

class NotEnoughMemory(unittest.TestCase):
    def test_halves_where_there_is_not_enough(self):
        """From the chunk that is too large on, the numbers are those of halved chunks."""
        data = small.gaussian_data(64, 40)
        f = small.Flags(device="cpu", num_samples=30)
        model = training.build(small.LinearHVAE, f, data).eval()
        forward = model.forward
        limit = 2**20

        def limited(x, f, sample_shape):
            if len(x) * sample_shape[0] > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(x, f, sample_shape=sample_shape)

        model.forward = limited

        # One example has 6 numbers in float64.
        row_bytes = 6 * 8
        # The first three cases take the images in chunks, and some also the draws.
        for chunk, limit in ((300, 150), (300, 100), (24, 12), (1000, 600)):
            fitting = chunk
            while fitting > limit:
                fitting //= 2
            halvings = round(math.log2(chunk / fitting))

            with contextlib.redirect_stderr(io.StringIO()) as err:
                with mock.patch.dict(report.CHUNK_BYTES, cpu=chunk * row_bytes):
                    halved, _ = report.evaluate(model, f, data)
            messages = err.getvalue().count("not enough memory, so the evaluation continues with ")
            self.assertEqual(messages, halvings)

            with mock.patch.dict(report.CHUNK_BYTES, cpu=fitting * row_bytes):
                self.assertEqual(evaluate(model, f, data)[0], halved)

        # A single draw that does not fit is an error.
        limit = 0
        with self.assertRaises(torch.OutOfMemoryError):
            evaluate(model, f, data)


class ImportanceSampling(unittest.TestCase):
    """Tests with a linear HVAE, whose log p(x) is known exactly."""

    @classmethod
    def setUpClass(cls):
        cls.data = small.gaussian_data(2048, 300)
        cls.f = small.Flags(
            device="cpu", eta_enc=0.8, eta_dec=0.6, num_epochs=20, lr=1e-2, grad_clip=10.0
        )
        with mock.patch("sys.stderr"):
            [trained] = training.train_group(small.LinearHVAE, [cls.f], cls.data)

        # The untrained weights are made so small that q is not far from the posterior. Otherwise a
        # thousand draws are too few: the bias of the logarithm exceeds its standard error.
        untrained = training.build(small.LinearHVAE, cls.f, cls.data).eval()
        with torch.no_grad():
            for parameter in untrained.parameters():
                parameter *= 0.1
        cls.models = {"trained": trained.model, "untrained": untrained}

    def settings(self, **values):
        return dataclasses.replace(self.f, **values)

    def log_weights(self, model, draws, seed):
        """Fresh log importance weights of the test examples, (draws, n)."""
        [x] = self.data.test
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(x, common.on_device(self.f, x), sample_shape=(draws,))["log_w"]

    def standard_error(self, model, draws):
        """The standard error of log p(x), averaged over test examples, by the delta method."""
        log_w = self.log_weights(model, 4000, seed=0)
        weights = (log_w - log_w.logsumexp(0)).exp() * len(log_w)
        return (weights.var(0) / draws).sum().sqrt().item() / weights.shape[1]

    def test_agrees_with_the_exact_value(self):
        [x] = self.data.test
        for name, model in self.models.items():
            exact = model.exact_log_px(x, self.f).mean().item()
            for draws in (1000, 5000):
                metrics, _ = evaluate(model, self.settings(num_samples=draws), self.data)
                error = self.standard_error(model, draws)
                # Three times a larger error would show nothing.
                self.assertLess(error, 0.003)
                difference = abs(metrics["log_px"] - exact)
                self.assertLess(difference, 3 * error, f"{name}, {draws} draws")

    def test_bound_rises_with_draws(self):
        """E log (1/K sum w) rises with K, from below log p(x) (Burda et al. 2016, theorem 1)."""
        [x] = self.data.test
        for model in self.models.values():
            exact = model.exact_log_px(x, self.f).mean().item()

            # Each K has the same total number of draws, so that the means are equally exact.
            bounds = []
            for k in (1, 5, 120):
                repeats = []
                for seed in range(120 // k):
                    f = self.settings(num_samples=k, seed=seed)
                    metrics, _ = evaluate(model, f, self.data)
                    repeats.append(metrics["log_px"])
                bounds.append(np.mean(repeats))

            error = self.standard_error(model, 120)
            self.assertLess(bounds[0] + error, bounds[1])
            self.assertLess(bounds[1] + error, bounds[2])
            for bound in bounds:
                self.assertLess(bound, exact + 3 * error)

    def test_elbo_is_a_bound_and_the_mean_log_weight(self):
        for model in self.models.values():
            metrics, _ = evaluate(model, self.settings(num_samples=2000), self.data)
            log_w = self.log_weights(model, 2000, seed=1).mean(1)
            error = log_w.std().item() / len(log_w)**0.5
            difference = abs(metrics["elbo"] - log_w.mean().item())
            self.assertLess(difference, 4 * error * 2**0.5)
            self.assertLess(metrics["elbo"], metrics["log_px"])
            sum_of_terms = -metrics["reconstruction"] - metrics["kl_1"] - metrics["kl_2"]
            self.assertAlmostEqual(metrics["elbo"], sum_of_terms, 9)

    def test_chunks_change_nothing_but_the_draws(self):
        """The estimate has the same expectation for any number of draws and images at a time."""
        model = self.models["untrained"]
        f = self.settings(num_samples=1000)
        x = self.data.test[0][:60]
        data = dataclasses.replace(self.data, test=(x,))
        exact = model.exact_log_px(x, self.f).mean().item()

        # 70 draws of one image at a time, 300 draws, and all draws of seven images.
        for chunk_bytes in (48 * 70, 48 * 300, 48 * 7000):
            with mock.patch.dict(report.CHUNK_BYTES, cpu=chunk_bytes):
                metrics, examples = evaluate(model, f, data)
            self.assertEqual(examples["log_px"].shape, (60,))
            self.assertEqual(examples["unit_kl_2"].shape, (60, 2))
            allowed = 3 * self.standard_error(model, 1000) * 5**0.5
            self.assertLess(abs(metrics["log_px"] - exact), allowed)

    def test_zero_samples_leave_it_out(self):
        f = self.settings(num_samples=0)
        metrics, examples = evaluate(self.models["trained"], f, self.data)
        self.assertNotIn("log_px", metrics)
        self.assertNotIn("log_px", examples)
        self.assertTrue(math.isfinite(metrics["elbo"]))

    def test_same_numbers_again_after_another_model(self):
        model = self.models["trained"]
        f = self.settings(num_samples=10)
        metrics, examples = evaluate(model, f, self.data)
        evaluate(self.models["untrained"], f, self.data)
        metrics_again, examples_again = evaluate(model, f, self.data)
        self.assertEqual(metrics, metrics_again)
        for name in examples:
            np.testing.assert_array_equal(examples[name], examples_again[name])


class Precision(unittest.TestCase):
    def test_bf16_products_leave_the_estimate_where_it_is(self):
        """log p(x) of MNIST_HVAE_Relu is within 0.05 nats of its value with float32 products.

        This holds for the CPU that runs the test.
        """
        precision_before = torch.get_float32_matmul_precision()
        self.addCleanup(torch.set_float32_matmul_precision, precision_before)
        data = small.digit_data(64, 64, torch.float32)
        f = MNIST_HVAE_Relu.Flags(device="cpu", num_samples=200)
        model = training.build(MNIST_HVAE_Relu.HVAE, f, data)

        forward = model.forward
        precisions = []

        def noting_forward(*args, **kwargs):
            precisions.append(torch.get_float32_matmul_precision())
            return forward(*args, **kwargs)

        model.forward = noting_forward
        log_px = {}
        for matmul in ("bf16", "float32"):
            metrics, _ = evaluate(model, dataclasses.replace(f, matmul=matmul), data)
            log_px[matmul] = metrics["log_px"]
        self.assertAlmostEqual(log_px["bf16"], log_px["float32"], delta=0.05)
        self.assertEqual(list(dict.fromkeys(precisions)), ["medium", "highest"])


class ChosenTerms(nn.Module):
    """A model without randomness, whose KLs (n, d) and means (n, d) are chosen.

    x (n, 1) holds the numbers of the examples, from 0 to 1.
    """

    def __init__(self, kl, mean):
        super().__init__()
        self.kl = kl
        self.mean = mean

    def forward(self, x, f, sample_shape=()):
        rows = (x[:, 0] * (len(self.kl) - 1)).round().long()
        log_px_z = torch.full((*sample_shape, len(x)), -7.0).double()
        return {
            "log_px_z": log_px_z,
            "kl": self.kl[rows],
            "mean": self.mean[rows],
            "log_w": log_px_z,
        }


class Metrics(unittest.TestCase):
    """Metrics that can be counted by hand."""

    def evaluate_chosen(self, kl, mean):
        """The metrics and examples of ChosenTerms."""
        x = torch.linspace(0, 1, len(kl), dtype=torch.float64)[:, None]
        data = datasets.Data("chosen", (x,), (x,), None, None)
        return evaluate(ChosenTerms(kl, mean), small.Flags(num_samples=8), data)

    def test_by_hand(self):
        n = 1000
        number = torch.arange(n)

        # The KLs of three units: 0.5 for all examples; 0.02 for a tenth of them; 0.
        kl = torch.zeros(n, 3, dtype=torch.float64)
        kl[:, 0] = 0.5
        kl[:n // 10, 1] = 0.02

        # The stds of their means: 1; 0.099, whose variance is below 0.01; 0.101, above.
        wave = torch.where(number % 2 == 0, 1.0, -1.0).double()
        mean = wave[:, None] * torch.tensor([1.0, 0.099, 0.101])

        metrics, examples = self.evaluate_chosen(kl, mean)
        expected = {
            "log_px": -7,
            "elbo": -7 - 0.502,
            "reconstruction": 7,
            "kl": 0.502,
            "AU": 2,
            "AU_kl": 1,
            "active_share": 1.1 / 3,
        }
        self.assertEqual(list(metrics), list(expected))
        for name, value in expected.items():
            self.assertAlmostEqual(metrics[name], value, places=6, msg=name)
        self.assertEqual(examples["unit_kl"].shape, (n, 3))

    def test_one_test_example(self):
        """A variance needs two examples. No unit counts as active, and no warning appears."""
        kl = torch.tensor([[0.5, 0.0]], dtype=torch.float64)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            metrics, _ = self.evaluate_chosen(kl, mean=torch.ones(1, 2))
        self.assertEqual([str(warning.message) for warning in caught], [])
        expected = {"log_px": -7, "elbo": -7.5, "kl": 0.5, "AU": 0, "AU_kl": 1, "active_share": 0.5}
        for name, value in expected.items():
            self.assertAlmostEqual(metrics[name], value, places=6, msg=name)


# A further script, written by report.py's docstring alone.
SCRIPT = '''
"""A VAE with a tanh layer: how beta collapses its units."""
from dataclasses import dataclass

import common
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

import datasets
import report
import training


@dataclass
class Flags(common.TrainFlags):
    beta: float = common.scalar(1.0, "weight of the KL", low=0)


class VAE(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.x_to_z, self.z_to_x = nn.Linear(784, 6), nn.Linear(3, 784)

    def forward(self, x, f, sample_shape=()):
        mean, raw_std = self.x_to_z(x).chunk(2, dim=-1)
        one = torch.ones_like(f.beta)
        q_z = Normal(mean.tanh(), common.std_head(raw_std, one))
        p_z = Normal(0 * one, one)
        z = q_z.rsample(sample_shape)
        log_px_z = common.log_normal(x, self.z_to_x(z), one)
        terms = {"log_px_z": log_px_z, "kl": kl_divergence(q_z, p_z)}
        if not self.training:
            terms["log_w"] = log_px_z + (p_z.log_prob(z) - q_z.log_prob(z)).sum(-1)
            terms["mean"] = q_z.mean
            terms["mean_squared_error"] = (x - self.z_to_x(z)).square().mean(-1)
        return terms

    def loss(self, terms, f):
        return -terms["log_px_z"] + f.beta * terms["kl"].sum(-1)


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    data = datasets.load_mnist(settings)
    runs = training.fit(VAE, settings, data)
    return report.report(runs)


if __name__ == "__main__":
    common.run(main)
'''


class Interface(small.InFolder):
    def test_a_model_with_only_what_the_docstring_requires(self):
        """It gets a table, results, curves and weights."""
        path = self.folder / "MNIST_VAE_Tanh.py"
        path.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
        small.write_mnist(self.folder / "data")
        command = [sys.executable, "MNIST_VAE_Tanh.py", "--beta", "0.5,50", "--num_epochs", "20"]
        command += ["--num_samples", "20", "--device", "cpu", "--lr", "0.01"]
        process = subprocess.run(
            command,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"PYTHONPATH": str(small.ROOT), "OMP_NUM_THREADS": "1"},
        )
        self.assertEqual(process.returncode, 0, process.stderr)

        # 1. The table.
        _, head, *lines, more = process.stdout.strip().split("\n")
        names = head.split()
        self.assertEqual(names, ["beta", "log_px", "elbo", "kl", "mean_squared_error", "AU"])
        self.assertEqual(more, "more columns: --columns all")
        rows = [line.split() for line in lines]
        self.assertEqual([row[0] for row in rows], ["0.5", "50.0"])
        light, heavy = [float(row[names.index("kl")]) for row in rows]
        self.assertGreater(light, 10 * heavy)

        # 2. The files.
        run_files = {"result.json", "training.json", "model.pt", "units.npz"}
        picture_files = {"collapse.png", "training.png"}
        for run in ("beta=0.5", "beta=50.0"):
            [folder] = self.folder.glob(f"runs/MNIST_VAE_Tanh/{run},*")
            self.assertEqual({path.name for path in folder.iterdir()}, run_files | picture_files)

            # 3. The further term. With a standard deviation of 1, half of the squared error of a
            # pixel is its reconstruction without the constant.
            metrics = small.read_json(folder / "result.json")["metrics"]
            constant = 784 / 2 * math.log(2 * math.pi)
            error = (metrics["reconstruction"] - constant) * 2 / 784
            self.assertAlmostEqual(metrics["mean_squared_error"], error, places=4)


# ----------------------------------------------------------------------------------- files of a run

class InRunFolder(small.InFolder):
    """Tests with two fitted settings of a linear model, whose results are not yet written."""

    def setUp(self):
        super().setUp()
        self.data = small.gaussian_data(64, 16)
        settings = []
        for beta in (0.5, 1.0):
            settings.append(small.Flags(
                device="cpu",
                beta_1=beta,
                batch_size=32,
                num_epochs=2,
                num_samples=5,
                out_dir=str(self.folder),
            ))
        self.runs = fit(small.LinearHVAE, settings, self.data)
        self.f = settings[0]
        self.run_folder = files.run_dir(self.f, self.data)
        self.result_file = self.run_folder / "result.json"
        self.units_file = self.run_folder / "units.npz"

    def read(self):
        """RunResult.read for the first setting. Returns (result, the lines on stderr)."""
        with contextlib.redirect_stderr(io.StringIO()) as err:
            result = report.RunResult.read(self.f, self.data)
        return result, err.getvalue().splitlines()

    def print_counting(self):
        """print_report. Returns (stdout, stderr, the number of runs that were evaluated)."""
        with mock.patch("report.evaluate", wraps=report.evaluate) as spy:
            status, out, err = print_report(self.runs)
        self.assertEqual(status, 0, err)
        return out, err, spy.call_count

    def saved(self):
        """The contents of the first setting's result.json."""
        return json.loads(self.result_file.read_text(encoding="utf-8"))


class ResultFile(InRunFolder):
    def test_what_is_written_is_read(self):
        print_report(self.runs)
        result, lines = self.read()
        self.assertEqual(lines, [])
        self.assertEqual(result.to_json(), self.saved())
        self.assertEqual(result.settings["beta_1"], 0.5)
        self.assertTrue(math.isfinite(result.metrics["log_px"]))

    def test_no_file(self):
        self.assertEqual(self.read(), (None, []))

    def wrong_contents(self):
        """Contents of a result.json that are of no use, {description: value}."""
        good = self.saved()
        contents = {"null": None, "a list": [], "a text": "text"}

        # 1. Each key that every result has is missing, or of a wrong type.
        keys = ["script", "dataset", "device", "versions", "seconds", "diverged", "side_by_side"]
        for key in [*keys, "curves", "metrics"]:
            without = dict(good)
            del without[key]
            contents[f"without {key}"] = without
            wrong = 3 if key not in ("side_by_side", "parameters") else "3"
            contents[f"{key} is {wrong!r}"] = good | {key: wrong}

        # 2. The metrics lack one, or one is no finite number.
        for name in ("elbo", "reconstruction", "AU_1", "AU_kl_2"):
            without = dict(good["metrics"])
            del without[name]
            contents[f"without the metric {name}"] = good | {"metrics": without}
        for value in (None, "1.0", [1.0], math.nan, math.inf):
            metrics = good["metrics"] | {"elbo": value}
            contents[f"the elbo is {value!r}"] = good | {"metrics": metrics}
        contents["no metrics and not diverged"] = good | {"metrics": None}

        # 3. Optional parts are wrong.
        for value in ([], {"predicted": {}}, 3):
            contents[f"theory is {value}"] = good | {"theory": value}
        for value in ([], {"z": {}}, {"z": None}, 3):
            contents[f"headroom is {value}"] = good | {"headroom": value}
        for key in ("linear", "dead_units", "parameters", "loss_change"):
            contents[f"{key} is a text"] = good | {key: "text"}
        diverged = good | {"metrics": None}
        contents["an empty divergence"] = diverged | {"diverged": {}}
        contents["a divergence without epoch"] = diverged | {"diverged": {"last_finite_loss": 1}}
        return contents

    def test_wrong_contents(self):
        """None, and one line that names the file."""
        print_report(self.runs)
        for description, content in self.wrong_contents().items():
            with self.subTest(description):
                self.result_file.write_text(json.dumps(content), encoding="utf-8")
                result, lines = self.read()
                self.assertIsNone(result)
                self.assertEqual(len(lines), 1, lines)
                self.assertTrue(lines[0].startswith(f"{self.result_file} is "), lines)

    def test_made_again(self):
        """A report evaluates the run again, and the new file is as the first one."""
        out, _, count = self.print_counting()
        self.assertEqual(count, 2)
        good = self.saved()
        without_metrics = dict(good)
        del without_metrics["metrics"]
        for text in ("null", "[]", "", '{"settings": ', json.dumps(without_metrics)):
            self.result_file.write_text(text, encoding="utf-8")
            out_again, err, count = self.print_counting()
            self.assertEqual(count, 1, text)
            self.assertEqual(out_again, out)
            self.assertIn(str(self.result_file), err)
            self.assertEqual(self.saved()["metrics"], good["metrics"])

    def test_another_setting(self):
        """A result of another setting is not read. The setting is part of the file."""
        print_report(self.runs)
        content = self.saved()
        content["settings"]["seed"] = 7
        self.result_file.write_text(json.dumps(content), encoding="utf-8")
        self.assertIsNone(self.read()[0])

    def test_any_part_may_be_damaged(self):
        """Each value is replaced by null, a text, a list or a dict: refused, or of no matter.

        One script has a linear twin and a headroom, the other one is linear itself.
        """
        common_flags = {"num_epochs": 1, "num_samples": 2, "d_1": 2, "batch_size": 32}
        common_flags |= {"device": "cpu", "out_dir": str(self.folder)}
        vae_flags = vae_script.Flags(d_hidden=8, **common_flags)
        linear_flags = linear_script.Flags(**common_flags)
        data = small.digit_data(32, 8, torch.float32)
        self.check_damaged(fit(vae_script.VAE, [vae_flags], data))
        self.check_damaged(fit(linear_script.VAE, [linear_flags], data))

    def check_damaged(self, runs):
        """Check that report.read_run returns None, or a run whose tables can be printed."""
        status, _, err = print_report(runs)
        self.assertEqual(status, 0, err)
        [run] = runs
        path = files.run_dir(run.f, run.data) / "result.json"
        good = json.loads(path.read_text(encoding="utf-8"))
        refused = 0
        for place in places(good):
            for value in (None, "x", [], {}):
                damaged = with_value(good, place, value)
                path.write_text(json.dumps(damaged), encoding="utf-8")
                with self.subTest(place=place, value=value), mock.patch("sys.stderr"):
                    evaluated = report.read_run(run)
                    if evaluated is None:
                        refused += 1
                        continue
                    with mock.patch("report.evaluated_run", lambda run: evaluated):
                        print_report(runs)
        # Every metric is needed, and so is most of the rest.
        self.assertGreater(refused, 4 * len(good["metrics"]))


def places(value, place=()):
    """The paths of all values inside a JSON object. Of a list, only the first element counts."""
    paths = [place] if place else []
    if isinstance(value, dict):
        for key in value:
            paths += places(value[key], (*place, key))
    if isinstance(value, list) and value:
        paths += places(value[0], (*place, 0))
    return paths


def with_value(saved, place, value):
    """A copy of a JSON object with another value at this path."""
    changed = copy.deepcopy(saved)
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    return changed


class UnitsFile(InRunFolder):
    """units.npz is missing or broken, while result.json is whole: the run is evaluated again."""

    def write_arrays(self, **arrays):
        with open(self.units_file, "wb") as file:
            np.savez_compressed(file, **arrays)

    def check_made_again(self, message):
        out, err, count = self.print_counting()
        self.assertEqual(count, 1, message)
        self.assertEqual(out, self.out)
        naming = [line for line in without_progress(err) if str(self.units_file) in line]
        self.assertEqual(len(naming), 1, err)
        arrays = report.read_examples(self.run_folder)
        self.assertEqual(set(arrays), set(self.arrays))
        for name, values in self.arrays.items():
            np.testing.assert_array_equal(arrays[name], values)

    def setUp(self):
        super().setUp()
        self.out, _, count = self.print_counting()
        self.assertEqual(count, 2)
        self.arrays = report.read_examples(self.run_folder)
        self.whole = self.units_file.read_bytes()

    def test_a_whole_one_is_used(self):
        out, _, count = self.print_counting()
        self.assertEqual(count, 0)
        self.assertEqual(out, self.out)

    def test_missing(self):
        self.units_file.unlink()
        self.check_made_again("missing")

    def test_broken(self):
        for content in (b"", b"no arrays", self.whole[:-100], self.whole[:100]):
            self.units_file.write_bytes(content)
            self.check_made_again(content[:20])

        # A single damaged byte inside the compressed numbers.
        damaged = bytearray(self.whole)
        damaged[len(damaged) // 2] ^= 0xFF
        self.units_file.write_bytes(damaged)
        self.check_made_again("one byte")

    def test_other_arrays(self):
        """An archive can be whole and still not belong to the result."""
        without_level = dict(self.arrays)
        del without_level["unit_kl_2"]
        self.write_arrays(**without_level)
        self.check_made_again("a level is missing")

        without_log_px = dict(self.arrays)
        del without_log_px["log_px"]
        self.write_arrays(**without_log_px)
        self.check_made_again("log_px is missing")

        self.write_arrays(**{name: values[:3] for name, values in self.arrays.items()})
        self.check_made_again("too few examples")

        self.write_arrays(**(self.arrays | {"unit_kl_1": np.array(1.0)}))
        self.check_made_again("a number for an array")

        # numpy would have to unpickle this one.
        self.write_arrays(**(self.arrays | {"unit_kl_1": np.array([[{}]] * 16, dtype=object)}))
        self.check_made_again("objects")

        with open(self.units_file, "wb") as file:
            np.save(file, self.arrays["unit_kl_1"])
        self.check_made_again("a single array")


# ----------------------------------------------------------------------------------------- headroom

class OtherDecoder(vae_script.VAE):
    """A VAE that measures what chosen `levels` say, in place of its own residuals."""

    levels = {}

    @staticmethod
    def before_training(f, data):
        return {"collapse_threshold": 3.0 * f.beta}


def level_headroom(**values):
    """A LevelHeadroom of a level with three collapsed units and Bernoulli pixels."""
    defaults = dict(
        units=3,
        collapsed=3,
        headroom=0.0,
        headroom_any=0.0,
        level=1.0,
        tau=[0.5, 0.4, 0.3],
        tau_any=[0.9, 0.8, 0.7],
        theta=[],
        likelihood="bernoulli",
    )
    return headroom.LevelHeadroom(**(defaults | values))


def two_settings(folder, **others):
    """Settings of a small ReLU VAE with beta = 0.5 and 3."""
    settings = []
    for beta in (0.5, 3.0):
        settings.append(vae_script.Flags(
            device="cpu",
            beta=beta,
            batch_size=32,
            d_hidden=8,
            d_1=3,
            out_dir=str(folder),
            **others,
        ))
    return settings


class Headroom(small.InFolder):
    def setUp(self):
        super().setUp()
        self.data = small.digit_data(64, 16, torch.float32)
        self.settings = two_settings(self.folder, num_epochs=1, num_samples=0)

    def report_of(self, levels, settings=None):
        """Fit the settings and report them, where headroom.measure returns these levels.

        Returns (the runs, stdout, the number of evaluated runs).
        """
        runs = fit(OtherDecoder, settings or self.settings, self.data)
        with mock.patch("headroom.measure", return_value=levels):
            with mock.patch("report.evaluate", wraps=report.evaluate) as spy:
                status, out, err = print_report(runs)
        self.assertEqual(status, 0, err)
        return runs, out, spy.call_count

    def test_metrics_of_a_level(self):
        """A decoder that is not Gaussian has rho, too. The ending is the level's number."""
        level = level_headroom(headroom=0.25, headroom_any=0.5)
        expected = {"headroom": 0.25, "headroom_any": 0.5, "rho": 0.5, "rho_any": 0.9}
        self.assertEqual(report.headroom_metrics("z", level), expected)
        self.assertEqual(list(report.headroom_metrics("z", level)), list(expected))
        level.likelihood = "gaussian"
        expected = {"headroom_12": 0.25, "headroom_any_12": 0.5}
        self.assertEqual(report.headroom_metrics("z12", level), expected)

        # No column may have enough information for rho, such as where the rows are few.
        level = level_headroom(tau=[], tau_any=[])
        metrics = report.headroom_metrics("z", level)
        self.assertEqual((metrics["rho"], metrics["rho_any"]), (0, 0))

    def test_metrics_of_a_run(self):
        """They follow those of before_training. The scalars of f are numbers there."""
        level = level_headroom(headroom=0.25, headroom_any=0.5)
        runs, out, _ = self.report_of({"z": level})
        metrics = report.RunResult.read(self.settings[1], self.data).metrics
        expected = ["collapse_threshold", "headroom", "headroom_any", "rho", "rho_any"]
        self.assertEqual(list(metrics)[-5:], expected)
        self.assertEqual([metrics[name] for name in expected], [9.0, 0.25, 0.5, 0.5, 0.9])
        self.assertIn("3 of 3 units collapsed because of training", out)

    def test_a_decoder_without_a_theory(self):
        """One line says so for all settings. A finished run is not evaluated again."""
        _, out, count = self.report_of({})
        self.assertEqual(count, 2)
        self.assertEqual(out.count("There is no verdict on collapsed units, since no theory"), 1)
        self.assertNotIn("headroom", out)
        for f in self.settings:
            self.assertEqual(report.RunResult.read(f, self.data).headroom, {})
        _, out_again, count = self.report_of({})
        self.assertEqual((out_again, count), (out, 0))

    def test_a_result_of_a_version_without_headroom_any(self):
        """A result.json whose levels lack headroom_any is not whole: the run is evaluated again."""
        levels = {"z": level_headroom()}
        _, out, count = self.report_of(levels)
        self.assertEqual(count, 2)
        path = files.run_dir(self.settings[0], self.data) / "result.json"
        whole = json.loads(path.read_text(encoding="utf-8"))
        old = copy.deepcopy(whole)
        for name in ("headroom_any", "tau_any", "likelihood"):
            del old["headroom"]["z"][name]
        path.write_text(json.dumps(old), encoding="utf-8")
        _, out_again, count = self.report_of(levels)
        self.assertEqual((out_again, count), (out, 1))
        again = json.loads(path.read_text(encoding="utf-8"))
        self.assertEqual(again["headroom"], whole["headroom"])

    def test_the_lines_of_all_causes(self):
        """Each cause has its own words. Hints follow only where training is the cause."""
        unstable = [1.1, 0.8, 0.7]
        training = "because of training: reviving them would lower the loss by at least 0.25 nats"
        causes = (
            ("because of the objective", {}),
            (training, {"headroom": 0.25, "headroom_any": 0.5}),
            ("with a richer encoder", {"headroom_any": 0.5}),
            ("with a richer encoder", {"tau_any": unstable}),
            ("this is unstable", {"tau": unstable, "tau_any": unstable}),
        )
        for words, values in causes:
            with self.subTest(words=words, values=values):
                level = level_headroom(**values)
                result = mock.Mock(
                    headroom={"z": level}, dead_units={"f": [2, 8]}, loss_change=-1.0)
                [sentence] = report.verdicts(result)
                self.assertTrue(sentence.startswith("z: 3 of 3 units collapsed"), sentence)
                self.assertIn(words, sentence)
                has_hints = "never fire" in sentence and "the loss still fell" in sentence
                self.assertEqual(has_hints, "training" in words)

    def test_levels_with_rows_of_their_own(self):
        """Their rows have the headroom of each level, and "-" for a level that has none.

        A table of levels without any headroom has no columns for it.
        """
        names = ["kl", "AU"]
        for level in ("_1", "_2", "_3"):
            names += [f"kl{level}", f"AU{level}"]
        metrics = {name: float(k) for k, name in enumerate(names)}
        result = mock.Mock(metrics=metrics, diverged=None, settings={})
        run = mock.Mock(result=result)
        run.f.columns = "main"
        self.assertEqual(self.level_lines([run]), [
            ["level", "kl", "AU"],
            ["3", "6.00", "7.00"],
            ["2", "4.00", "5.00"],
            ["1", "2.00", "3.00"],
        ])

        for number, nats in ((1, 0.5), (2, 0.25)):
            level = level_headroom(headroom=nats, headroom_any=2 * nats)
            metrics.update(report.headroom_metrics(f"z{number}", level))
        names = ["headroom", "headroom_any", "rho", "rho_any"]
        self.assertEqual(self.level_lines([run]), [
            ["level", "kl", "AU", *names],
            ["3", "6.00", "7.00", "-", "-", "-", "-"],
            # A headroom has three decimals, since its limit is 0.01 nats.
            ["2", "4.00", "5.00", "0.250", "0.500", "0.50", "0.90"],
            ["1", "2.00", "3.00", "0.500", "1.000", "0.50", "0.90"],
        ])

    def test_decimals_of_a_headroom(self):
        for nats, text in (([0.0144], "0.014"), ([0.009, 0.013], "0.011 ± 0.003")):
            repeats = [{"headroom_2": value, "kl": value} for value in nats]
            self.assertEqual(report.metric_cell(repeats, "headroom_2"), text)
            self.assertIn("0.01", report.metric_cell(repeats, "kl"))
            self.assertNotIn("0.014", report.metric_cell(repeats, "kl"))

    def level_lines(self, runs):
        """The cells of the table of levels that report.print_metrics prints."""
        with contextlib.redirect_stdout(io.StringIO()) as out:
            with mock.patch("report.varying_flags", return_value=[]):
                with mock.patch("report.table_caption", return_value="caption"):
                    report.print_metrics(runs)
        _, table = out.getvalue().strip().split("\n\n")
        return [line.split() for line in table.split("\n")]


# --------------------------------------------------------------------------------------- columns

class Columns(InRunFolder):
    def test_shown_columns(self):
        names = ["log_px", "exact_log_px", "elbo", "reconstruction", "kl_1", "AU_1", "AU_kl_1"]
        names += ["active_share_1", "headroom", "context_baseline", "error_context", "elbo_train"]
        names += ["rate_auxiliary", "reconstruction_train"]
        main = ["log_px", "exact_log_px", "elbo", "kl_1", "AU_1", "headroom", "context_baseline"]
        self.assertEqual(report.shown_columns(names, "main"), [*main, "rate_auxiliary"])
        self.assertEqual(report.shown_columns(names, "all"), names)
        names = ["headroom_any", "rho", "collapse_threshold", "collapsed_loss"]
        names += ["collapsed_headroom", "rho_any"]
        main = ["headroom_any", "rho", "collapse_threshold", "rho_any"]
        self.assertEqual(report.shown_columns(names, "main"), main)
        main = ["kl", "AU", "headroom", "headroom_any", "rho", "rho_any"]
        self.assertEqual(report.shown_columns(report.LEVEL_COLUMNS, "main"), main)

    def test_a_finished_run_with_either_value(self):
        """Neither the folder of a run nor its numbers depend on --columns."""
        out, _, _ = self.print_counting()
        main = ["log_px", "exact_log_px", "elbo", "kl_1", "kl_2", "AU_1", "AU_2"]
        self.assertEqual(out.split("\n")[2].split(), ["beta_1", *main])
        self.assertEqual(out.count("more columns: --columns all"), 1)

        settings = [dataclasses.replace(run.f, columns="all") for run in self.runs]
        self.assertEqual(files.run_dir(settings[0], self.data), self.run_folder)
        with mock.patch("training.train_group") as train:
            runs = fit(small.LinearHVAE, settings, self.data)
        train.assert_not_called()
        with mock.patch("report.evaluate") as evaluate_again:
            _, out_of_all, _ = print_report(runs)
        evaluate_again.assert_not_called()

        metrics = list(self.saved()["metrics"])
        self.assertIn("reconstruction", metrics)
        self.assertEqual(out_of_all.split("\n")[2].split()[1:], metrics)
        self.assertNotIn("more columns", out_of_all)

    def test_flags_that_take_a_single_value(self):
        """A list would be several settings with one folder."""
        lists = {"columns": "main,all", "overwrite": "true,false", "checkpoint_seconds": "1:3"}
        for flag, value in lists.items():
            argv = [f"--{flag}", value, "--out_dir", self.folder]
            status, out, err = small.call(vae_script.main, *argv)
            self.assertEqual((status, out), (2, ""))
            self.assertIn(f"--{flag}: got '{value}', wants a single value, ", err)


# ---------------------------------------------------------------------------------- not finite

class NanAtBeta3(vae_script.VAE):
    """A VAE whose evaluation goes wrong for beta = 3: this term is nan there, or infinite."""

    term = "log_w"
    value = math.nan

    def forward(self, x, f, sample_shape=()):
        terms = super().forward(x, f, sample_shape)
        if not self.training:
            terms[self.term] = torch.where(f.beta == 3, self.value, terms[self.term])
        return terms


class NotFinite(small.InFolder):
    """Metrics that are not finite: the setting counts as diverged, and the others are shown."""

    def setUp(self):
        super().setUp()
        self.data = small.digit_data(64, 16, torch.float32)
        self.settings = two_settings(self.folder, num_epochs=2, num_samples=4)

    def check_report(self, runs):
        """Check that a report shows beta = 0.5 with its verdict, and that beta = 3 diverged."""
        status, out, err = print_report(runs)
        self.assertEqual(status, 1)
        lines = out.splitlines()

        # 1. The table has one row with numbers and one without.
        # Further tables follow, with rows for beta = 0.5 only.
        good_row, *_ = [line.split() for line in lines if line.lstrip().startswith("0.5 ")]
        for cell in good_row:
            self.assertTrue(math.isfinite(float(cell)), good_row)
        [bad_row] = [line.split() for line in lines if line.lstrip().startswith("3.0 ")]
        self.assertEqual(bad_row[:2], ["3.0", "diverged"])
        self.assertEqual(set(bad_row[2:]), {"-"})

        # 2. One note, in the last epoch.
        [note] = [line for line in lines if " diverged in epoch " in line]
        self.assertTrue(note.startswith("beta=3.0,seed=0 diverged in epoch 2"), note)
        self.assertNotIn("nan", out)
        self.assertNotIn("inf", out)

        # 3. The verdict of the other setting only, and no prediction beside numbers that lack.
        verdicts = [line for line in lines if " collapsed" in line]
        self.assertEqual(len(verdicts), 1, out)
        self.assertTrue(verdicts[0].startswith("beta=0.5: z: "), verdicts)
        return note, err

    def check_files(self):
        """Check the results in the files."""
        good = report.RunResult.read(self.settings[0], self.data)
        self.assertIsNone(good.diverged)
        self.assertTrue(math.isfinite(good.metrics["log_px"]))
        bad = report.RunResult.read(self.settings[1], self.data)
        self.assertIsNone(bad.metrics)
        self.assertEqual(bad.diverged["epoch"], 2)
        for part in (bad.linear, bad.headroom, bad.dead_units, bad.loss_change):
            self.assertIsNone(part)
        folder = files.run_dir(self.settings[1], self.data)
        self.assertNotIn("NaN", (folder / "result.json").read_text(encoding="utf-8"))
        self.assertFalse((folder / "units.npz").exists())

    def test_terms(self):
        """log_px is nan, or the elbo infinite, although the weights are finite."""
        runs = fit(NanAtBeta3, self.settings, self.data)
        for run in runs:
            self.assertIsNotNone(run.model)
        for term, value in (("log_w", math.nan), ("log_px_z", -math.inf), ("kl", math.nan)):
            for f in self.settings:
                (files.run_dir(f, self.data) / "result.json").unlink(missing_ok=True)
            with mock.patch.multiple(NanAtBeta3, term=term, value=value):
                note, err = self.check_report(runs)
            # The training losses were finite, so the note names the last of them.
            self.assertRegex(note, r"; the last finite loss was \d+\.\d+$")
            naming = [line for line in err.splitlines() if "not finite" in line]
            self.assertEqual(len(naming), 1, err)
            self.check_files()

        # A later command reads this from the files.
        with mock.patch("report.evaluate") as spy:
            self.check_report(runs)
        spy.assert_not_called()

    def test_headroom(self):
        """The headroom is a metric, too."""
        runs = fit(vae_script.VAE, self.settings, self.data)
        measure = headroom.measure

        def measure_nan(model, f, data, metrics, examples):
            levels = measure(model, f, data, metrics, examples)
            if f.beta == 3:
                levels["z"].headroom = math.nan
            return levels

        with mock.patch("headroom.measure", measure_nan):
            self.check_report(runs)
        self.check_files()

    def test_an_infinite_elbo_of_the_training_split(self):
        """Scripts that also evaluate the training data have metrics named ..._train."""
        f = self.settings[0]
        [run] = fit(vae_script.VAE, [f], dataclasses.replace(self.data, also_train=True))
        evaluate_split = report.evaluate

        def infinite_train(model, f, data, split="test"):
            metrics, examples = evaluate_split(model, f, data, split)
            if split == "train":
                metrics["elbo"] = -math.inf
            return metrics, examples

        with mock.patch("report.evaluate", infinite_train):
            status, out, _ = print_report([run])
        self.assertEqual(status, 1)
        self.assertIn("seed=0 diverged in epoch 2; the last finite loss was ", out)
        self.assertNotIn("inf,", out)
        self.assertNotIn(" collapsed", out)

    def test_no_finite_loss(self):
        """The note then names no loss. It never says "nan"."""
        class AlwaysNan(vae_script.VAE):
            def loss(self, terms, f):
                return super().loss(terms, f) * math.nan

        [run] = fit(AlwaysNan, self.settings[:1], self.data)
        status, out, _ = print_report([run])
        self.assertEqual(status, 1)
        notes = [line for line in out.splitlines() if "diverged in epoch" in line]
        self.assertEqual(notes, ["seed=0 diverged in epoch 1"])
        self.assertNotIn("nan", out)
        # A smaller step is the first thing to try.
        self.assertEqual(run.f.lr, 1e-4)
        self.assertIn("first try a smaller step, such as --lr 1e-05.\n", out)

        # A curve may end in nan although the weights are finite.
        [run] = fit(NanAtBeta3, self.settings[1:], self.data)
        run.record.curves["loss"] = [1.0, math.nan]
        _, out, _ = print_report([run])
        notes = [line for line in out.splitlines() if "diverged in epoch" in line]
        self.assertEqual(notes, ["seed=0 diverged in epoch 2"])
        result = report.RunResult.read(run.f, run.data)
        self.assertEqual(result.diverged, {"epoch": 2, "last_finite_loss": None})


# ------------------------------------------------------------------------------- several processes

def report_at_once(barrier, beta, data_dir, out_dir, out, err):
    """In a child process: fit, wait until the other process has fitted, and report."""
    fit_runs = training.fit

    def fit_and_wait(*args):
        runs = fit_runs(*args)
        barrier.wait(60)
        return runs

    def draw_collapse_only(run, folder):
        pictures.draw_collapse(folder / "collapse.png", {"": run.examples}, "")

    training.fit = fit_and_wait
    # One picture of each run is enough, and fast.
    pictures.draw_run = draw_collapse_only
    argv = ["--data_dir", data_dir, "--out_dir", out_dir, "--num_epochs", 1, "--num_samples", 3]
    argv += ["--d_hidden", 8, "--d_1", 3, "--device", "cpu", "--beta", beta]
    small.as_command("MNIST_VAE_Relu_learnable_sigma.py", argv, out_dir, out, err)


class AtTheSameTime(InRunFolder):
    def test_another_process_removes_the_files(self):
        """Another process may train the same run anew. Its files then vanish at any moment.

        A report shows what it has evaluated itself, so it does not need them.
        """
        write = files.write

        def write_and_lose(path, save):
            write(path, save)
            path.unlink()

        status, out, _ = print_report(self.runs)
        for run in self.runs:
            shutil.rmtree(files.run_dir(run.f, run.data))
        with mock.patch("files.write", write_and_lose):
            lost = print_report(self.runs)
        self.assertEqual(lost[:2], (status, out))
        self.assertFalse(self.result_file.exists())

    def test_the_grid_needs_no_file(self):
        """The same with the pictures of the grid."""
        write = files.write
        written = []

        def write_and_lose(path, save):
            write(path, save)
            path.unlink()
            written.append(path.name)

        with mock.patch("files.write", write_and_lose), mock.patch("pictures.draw_run"):
            with mock.patch("sys.stderr"), mock.patch("sys.stdout"):
                self.assertEqual(report.report(self.runs), 0)
        run_files = ["units.npz", "result.json"]
        self.assertEqual(written, [*run_files, *run_files, "collapse.png"])

    def test_two_processes_with_one_command(self):
        """Both evaluate, write and draw the same two runs at once. Both print the same table."""
        small.write_mnist(self.folder / "data", 32, 8)
        barrier = small.CHILDREN.Barrier(2)
        outs, errs, children = [], [], []
        for k in (0, 1):
            outs.append(self.folder / f"{k}.out")
            errs.append(self.folder / f"{k}.err")
            arguments = (barrier, "0.5,2", self.folder / "data", self.folder, outs[k], errs[k])
            child = small.CHILDREN.Process(target=report_at_once, args=arguments)
            child.start()
            self.addCleanup(child.kill)
            children.append(child)

        statuses = small.exit_statuses(children)
        messages = [path.read_text(encoding="utf-8") for path in errs]
        self.assertEqual(statuses, [0, 0], messages)
        tables = [path.read_text(encoding="utf-8") for path in outs]
        self.assertEqual(tables[0], tables[1])
        self.assertIn("log_px", tables[0])
        for message in messages:
            self.assertNotIn("Traceback", message)

        # The files are whole, and nothing unfinished is left.
        folders = list((self.folder / vae_script.VAE.__module__).glob("beta=*"))
        self.assertEqual(len(folders), 2)
        for folder in folders:
            self.assertIsNotNone(files.read_json(folder / "result.json"))
            self.assertIsNotNone(report.read_examples(folder))
            self.assertEqual(list(folder.glob(".*")), [])

    def test_the_result_of_another_process(self):
        """One of two processes evaluates the first setting only. It reads the other's result."""
        _, out, _ = print_report(self.runs)
        other = training.TrainedRun(self.runs[1].f, self.data)
        runs = [self.runs[0], other]
        folder = files.run_dir(other.f, self.data)
        with mock.patch("processes.own_indices", lambda count: range(1)):
            # 1. It is there.
            status, out_again, _ = print_report(runs)
            self.assertEqual((status, out_again), (0, out))

            # 2. It is broken, or missing: one line, the other setting, and status 1.
            for content in ("null", "[]", "{}", None):
                if content is None:
                    (folder / "result.json").unlink()
                else:
                    (folder / "result.json").write_text(content, encoding="utf-8")
                status, out_again, err = print_report(runs)
                self.assertEqual(status, 1)
                self.assertIn(f"{folder} has no result. ", err)
                self.assertIn("log_px", out_again)


class Counterpart(InRunFolder):
    def test_a_broken_file_of_the_counterpart(self):
        """The report goes on without the picture beside it, and says so in one line."""
        other = self.run_folder.parents[1] / "other" / self.run_folder.name / "units.npz"
        other.parent.mkdir(parents=True)
        for content in (b"", b"no arrays", None):
            if content is None:
                other.unlink()
            else:
                other.write_bytes(content)
            with contextlib.redirect_stderr(io.StringIO()) as err, mock.patch("sys.stdout"):
                with mock.patch("pictures.draw_run"), mock.patch("pictures.draw_collapse") as draw:
                    self.assertEqual(report.report(self.runs[:1], counterpart="other"), 0)
            draw.assert_not_called()
            naming = [line for line in err.getvalue().splitlines() if str(other) in line]
            self.assertEqual(len(naming), 0 if content is None else 1)


if __name__ == "__main__":
    unittest.main()
