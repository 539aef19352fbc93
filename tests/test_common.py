"""Tests of common.py, in its order: start, flags, refusals, device, densities, `run`; and noise."""
import contextlib
import errno
import importlib
import io
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

import common
import torch
from torch.distributions import Independent, Normal

import datasets
import files
import MNIST_CVAE_Relu
import MNIST_HVAE_Relu
import MNIST_VAE_Linear_nonlearnable_sigma
import predict_collapse
import processes
from tests import small
from tests.small import ROOT, call


def parse(*argv):
    """The settings of MNIST_HVAE_Relu.py that a command line stands for."""
    with tempfile.TemporaryDirectory() as folder, mock.patch("sys.stderr"):
        return common.parse_flags(MNIST_HVAE_Relu.Flags, [*argv, "--out_dir", folder])


def programs():
    """The names of all programs of the project."""
    names = []
    for path in sorted(ROOT.glob("*.py")):
        if "common.run(main)" in path.read_text(encoding="utf-8"):
            names.append(path.stem)
    return names


class Start(small.InFolder):
    """What importing common does, before the slow imports and during them."""

    def python(self, *words, **environment):
        """Run Python in a new process, in the project's folder."""
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            encoding="latin-1",
            timeout=120,
        )

    def test_an_old_python_is_refused_in_one_line(self):
        """Torch is not imported for that: a torch of an old Python may fail in many ways."""
        program = """if True:
            import sys
            sys.modules["torch"] = None         # makes its import fail
            sys.modules["numpy"] = None
            sys.version_info = (3, 9, 18)
            import common
        """
        ended = self.python("-c", program)
        self.assertEqual(ended.returncode, 1)
        self.assertEqual(ended.stdout, "")
        self.assertEqual(
            ended.stderr, "This program needs Python 3.10 or later; this is Python 3.9\n")

    def test_a_new_python_is_not_refused(self):
        program = """if True:
            import sys
            sys.modules["torch"] = None
            sys.version_info = (3, 10, 0)
            import common
        """
        ended = self.python("-c", program)
        self.assertNotIn("This program needs", ended.stderr)
        self.assertIn("torch", ended.stderr)

    def test_ctrl_c_during_imports_is_one_line(self):
        (self.folder / "torch.py").write_text("raise KeyboardInterrupt\n", encoding="utf-8")
        ended = self.python("MNIST_CVAE_Relu.py", PYTHONPATH=str(self.folder))
        self.assertEqual(ended.stdout, "")
        self.assertEqual(ended.stderr, "interrupted\n")
        # Python itself makes the interrupt the cause of the end: SIGINT, or Windows's status.
        self.assertIn(ended.returncode, (-signal.SIGINT, 0xC000013A))

    def test_other_errors_during_imports_keep_their_traceback(self):
        (self.folder / "torch.py").write_text("raise ValueError('odd')\n", encoding="utf-8")
        ended = self.python("MNIST_CVAE_Relu.py", PYTHONPATH=str(self.folder))
        self.assertEqual(ended.returncode, 1)
        self.assertIn("Traceback", ended.stderr)
        self.assertIn("ValueError: odd", ended.stderr)

    def test_output_in_an_encoding_that_lacks_characters(self):
        """The help of this script contains a delta, which latin-1 lacks. It becomes an escape."""
        self.assertIn("\u03b4", importlib.import_module("MNIST_VAE_Delta").__doc__.split("\n\n")[0])
        ended = self.python("MNIST_VAE_Delta.py", "--help", PYTHONIOENCODING="latin-1")
        self.assertEqual(ended.returncode, 0, ended.stderr)
        self.assertIn(r"\u03b4", ended.stdout)
        self.assertEqual(ended.stderr, "")

    @unittest.skipIf(os.name == "nt", "Windows has no sh")
    def test_no_stdout_and_no_stderr_from_the_beginning(self):
        """Python then sets sys.stdout and sys.stderr to None."""
        command = '"$0" MNIST_VAE_Delta.py --help >&- 2>&-'
        ended = subprocess.run(["sh", "-c", command, sys.executable], cwd=ROOT, timeout=120)
        self.assertEqual(ended.returncode, 0)


class Values(unittest.TestCase):
    def test_defaults_are_the_published_ones(self):
        [f] = parse()
        self.assertEqual((f.d_1, f.d_2, f.d_hidden), (16, 16, 256))
        self.assertEqual((f.eta_enc, f.eta_dec, f.sigma_1), (0.5, 0.5, 0.5))
        self.assertEqual((f.beta_1, f.beta_2), (1.0, 1.0))
        self.assertEqual((f.lr, f.grad_clip, f.num_epochs, f.batch_size), (1e-3, 0.1, 100, 128))

    def test_list_and_range(self):
        def betas(text):
            return [f.beta_1 for f in parse("--beta_1", text)]

        self.assertEqual(betas("0.1,0.5,1.0"), [0.1, 0.5, 1.0])
        self.assertEqual(betas("0:1:0.4"), [0, 0.4, 0.8])
        self.assertEqual(betas("2,0.5:1:0.5,2"), [2, 0.5, 1])
        self.assertEqual([f.seed for f in parse("--seed", "0:3")], [0, 1, 2, 3])

        fifty = [f.beta_1 for f in parse("--beta_1=0.1:5.0:0.1")]
        self.assertEqual(len(fifty), 50)
        # These are exact, although 0.1 + 0.1 + 0.1 is not 0.3.
        self.assertEqual((fifty[2], fifty[-1]), (0.3, 5.0))

    def test_lists_multiply(self):
        settings = parse("--seed", "1,2", "--beta_2", "3,4", "--beta_1", "5,6")
        expected = []
        for beta_1 in (5, 6):
            for beta_2 in (3, 4):
                for seed in (1, 2):
                    expected.append((beta_1, beta_2, seed))
        self.assertEqual([(f.beta_1, f.beta_2, f.seed) for f in settings], expected)

    def test_booleans(self):
        self.assertTrue(parse("--released_objective", "--beta_1", "2")[0].released_objective)
        self.assertFalse(parse("--beta_1", "2")[0].released_objective)
        both = parse("--released_objective", "false,true")
        self.assertEqual([f.released_objective for f in both], [False, True])

    def test_one_number_a_unit(self):
        argv = ["--sigma", "8/4/2/1/.5,0.3,1:2:0.5"]
        with tempfile.TemporaryDirectory() as folder, mock.patch("sys.stderr"):
            settings = common.parse_flags(
                MNIST_VAE_Linear_nonlearnable_sigma.Flags, [*argv, "--out_dir", folder])
        self.assertEqual([f.sigma for f in settings], ["8.0/4.0/2.0/1.0/0.5", 0.3, 1.0, 1.5, 2.0])

        vectors = [common.vector_values(f.sigma) for f in settings[:2]]
        self.assertEqual(vectors, [[8, 4, 2, 1, 0.5], [0.3]])

        like = torch.zeros(1, dtype=torch.float64)
        scalars = common.objective_scalars(settings[:2], like)
        self.assertEqual(scalars["sigma"].tolist(), [[8, 4, 2, 1, 0.5], [0.3] * 5])
        scalars = common.objective_scalars(settings[1:], torch.zeros(1))
        self.assertEqual(tuple(scalars["sigma"].shape), (4,))

    def test_a_word_in_place_of_a_number(self):
        """--eta_dec of predict_collapse.py takes the word learned, too."""
        def settings(*argv):
            with tempfile.TemporaryDirectory() as folder, mock.patch("sys.stderr"):
                return common.parse_flags(predict_collapse.Flags, [*argv, "--out_dir", folder])

        def values(text):
            return [f.eta_dec for f in settings("--eta_dec", text)]

        self.assertEqual(values("learned"), ["learned"])
        self.assertEqual(values("0.5,learned"), [0.5, "learned"])
        self.assertEqual(values("learned,1:2:0.5,learned"), ["learned", 1, 1.5, 2])
        self.assertEqual(settings("--eta_dec=learned")[0].eta_dec, "learned")

        grid = settings("--eta_dec", "0.5,learned", "--beta", "1,2")
        self.assertEqual(
            [(f.beta, f.eta_dec) for f in grid],
            [(1, 0.5), (1, "learned"), (2, 0.5), (2, "learned")],
        )
        [f] = settings("--eta_dec", "learned")
        self.assertEqual(files.spell(files.changed_settings(f, None)), "eta_dec=learned")

    def test_a_path_may_hold_commas_and_colons(self):
        self.assertEqual(parse("--data_dir", "a,b:c")[0].data_dir, "a,b:c")


class Help(unittest.TestCase):
    def help_of(self, name):
        """The help of a program, without breaks of lines."""
        main = importlib.import_module(name).main
        with mock.patch.dict(os.environ, COLUMNS="10000"):
            status, out, err = call(main, "--help")
        self.assertEqual((status, err), (0, ""))
        return " ".join(out.split())

    def test_help_names_every_flag_with_default(self):
        text = self.help_of("MNIST_HVAE_Relu")
        data = datasets.Data("mnist", (), (), None, None)
        for name in files.run_settings(MNIST_HVAE_Relu.Flags(), data):
            self.assertRegex(text, f"--{name}=[A-Za-z]")
        self.assertIn(
            "standard deviation of the prior p(z2) (a number above 0; default 0.5)", text)
        self.assertIn(
            "divided by the prior's (a number from 0.01 to 10; default 1.0)", text)
        self.assertIn(
            "number of units of z1 (a whole number of at least 1; default 16)", text)

    def test_every_program_explains_the_values_of_its_flags(self):
        self.assertGreater(len(programs()), 20)
        for name in programs():
            with self.subTest(program=name):
                text = self.help_of(name)
                self.assertIn(f"Usage: {name}.py ", text)
                self.assertNotIn("VALUE", text)
                # A text whose default is empty has no parenthesis.
                self.assertNotRegex(text, r"default \)|default;|\(text|\(\)|\(;|None")

                flags = importlib.import_module(name).Flags
                for flag, field in common.all_flags(flags).items():
                    if field.metadata["choices"]:
                        self.assertIn(f"--{flag}={'|'.join(field.metadata['choices'])} ", text)
                    else:
                        self.assertRegex(text, rf"--{flag}=(NUMBER|true\|false|[A-Z]+) ")

    def test_a_program_that_trains_nothing_does_not_say_that_it_does(self):
        self.assertIn("Every combination is trained", self.help_of("MNIST_CVAE_Relu"))
        text = self.help_of("predict_collapse")
        self.assertNotRegex(text, "combination is trained|combination .* trained")
        self.assertIn(predict_collapse.Flags.epilog, text)


class Refused(unittest.TestCase):
    """Exit status 2, and one line that names the flag, its value and the values allowed.

    Nothing is trained.
    """

    def refuse(self, argv, *parts, script=MNIST_HVAE_Relu):
        with mock.patch("training.train_group", side_effect=AssertionError("trained")):
            status, out, err = call(script.main, *argv)
        self.assertEqual(status, 2, err)
        self.assertEqual(out, "")
        self.assertEqual(err.count("\n"), 1, err)
        for part in (f"{script.__name__}.py: error: ", *parts):
            self.assertIn(part, err)

    def test_unknown_flag(self):
        self.refuse(["--beta1", "2"], "--beta1", "nearest is --beta_1")
        self.refuse(["--eta_decc=2"], "--eta_decc", "nearest is --eta_dec")
        # An abbreviation is no flag either.
        self.refuse(["--beta", "2"], "--beta:", "nearest is --beta_")

    def test_not_a_number(self):
        for value in ("many", "", "1,,2", "1:2:x", "1:2:3:4", "0.1;0.5"):
            self.refuse(["--beta_1", value], "--beta_1", "a number of at least 0")
        self.refuse(["--d_1", "1.5"], "--d_1: got '1.5', wants a whole number from 1 to 1000000000")
        self.refuse(["--overwrite", "maybe"], "--overwrite", "'maybe'", "true or false")

    def test_not_finite(self):
        for value in ("nan", "inf", "-inf", "1e999", "0:inf", "0:1:nan"):
            self.refuse(["--beta_1", value], "--beta_1", value)

    def test_out_of_range(self):
        for flag in ("eta_enc", "eta_dec", "sigma_1", "lr", "grad_clip"):
            for value in ("0", "-1", "0.5,0", "1e-999"):
                part = value.split(",")[-1]
                self.refuse([f"--{flag}", value], f"--{flag}", part, "above 0")
        for flag in ("beta_1", "beta_2"):
            self.refuse([f"--{flag}", "-0.1"], f"--{flag}", "-0.1", "at least 0")
        for flag in ("d_1", "d_2", "d_hidden", "batch_size", "num_epochs"):
            self.refuse([f"--{flag}", "0"], f"--{flag}", "'0'", "a whole number from 1 to ")
        for flag in ("num_samples", "seed"):
            self.refuse([f"--{flag}=-1"], f"--{flag}", "'-1'", "a whole number from 0 to ")

    def test_upper_bound_and_choices(self):
        """Flags of other scripts: a digit, a type of correlation."""
        digit = common.flag(1, "which digit", low=0, high=9)
        digit.name = "digit"
        self.assertEqual(common._parse_values(digit, "0:9"), list(range(10)))
        for value in ("10", "-1", "5:10"):
            with self.assertRaises(ValueError):
                common._parse_values(digit, value)
        self.assertEqual(common._allowed(digit), "a whole number from 0 to 9")
        share = common.flag(0.5, "a share", above=0, high=1)
        self.assertEqual(common._allowed(share), "a number above 0 and at most 1")
        self.assertEqual(common._allowed(common.flag(0.5, "x", high=1)), "a number of at most 1")
        sigma = common.flag(1.0, "stds", above=0, vector=True)
        self.assertEqual(
            common._allowed(sigma),
            "a number above 0, or one such number per unit, joined by /",
        )

        kind = common.flag("Identical", "correlation", choices=("Identical", "Random"))
        self.assertEqual(common._parse_values(kind, "Random,Identical"), ["Random", "Identical"])
        with self.assertRaisesRegex(ValueError, "Randon"):
            common._parse_values(kind, "Identical,Randon")
        self.refuse(
            ["--dataset", "mnits"], "--dataset", "'mnits'", "auto, mnist, fashion, digits")

    def test_a_wrong_word(self):
        """The message names the word that a flag allows. Other flags allow no word."""
        number = "a number above 1e-100 and at most 1e+100"
        for value, part in (
            ("learnt", "learnt"),
            ("Learned", "Learned"),
            ("0.5,learn", "learn"),
            ("learned,0", "0"),
            ("learned:1", "learned:1"),
            ("learned/1", "learned/1"),
        ):
            self.refuse(
                ["--eta_dec", value],
                f"--eta_dec: got '{part}', wants ",
                f"{number}, or learned\n",
                script=predict_collapse,
            )
        self.refuse(
            ["--eta_dec"],
            f"--eta_dec: got no value, wants {number}, or learned\n",
            script=predict_collapse,
        )
        self.refuse(
            ["--eta_enc", "learned"],
            f"--eta_enc: got 'learned', wants {number}\n",
            script=predict_collapse,
        )
        self.refuse(["--eta_dec", "learned"], "--eta_dec: got 'learned', wants a number above 0\n")

    def test_empty_range(self):
        for value in ("5:1:1", "1:2:0", "1:2:-1", "0:1:1e-9"):
            self.refuse(
                ["--beta_1", value],
                f"--beta_1: got '{value}', wants first:last:step with first <= last and step > 0, "
                "each value a number of at least 0",
            )
        # Whole numbers need a whole step.
        for value in ("16:64:7.5", "16:64:0.5"):
            self.refuse(
                ["--d_1", value],
                f"--d_1: got '{value}', wants first:last:step with first <= last and step > 0, "
                "each value a whole number",
            )
        # A text with a colon is no range.
        self.refuse(["--dataset", "a:b"], "--dataset: got 'a:b', wants one of auto, mnist, ")

    def test_too_many_settings(self):
        argv = ["--beta_1", "0:1000", "--beta_2", "0:1000"]
        self.refuse(
            argv, "--beta_1: the lists and ranges give 1,002,001 settings, wants at most 10,000")

    def test_value_without_a_flag_and_flag_without_a_value(self):
        self.refuse(["0.5"], "'0.5' follows no flag")
        no_number = "--beta_1: got no value, wants a number of at least 0"
        self.refuse(["--beta_1"], no_number)
        self.refuse(["--beta_1", "--num_epochs", "1"], no_number)
        self.refuse(["--out_dir", "--overwrite"], "--out_dir: got no value, wants a text")

    def test_out_dir_that_cannot_be_written(self):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "file")
            file.touch()
            self.refuse(["--out_dir", file], "--out_dir", str(file))
            self.refuse(["--out_dir", file / "below"], "--out_dir", str(file))
        self.refuse(["--out_dir", "a\0b"], "--out_dir", "null")

    def test_device_unknown_or_absent(self):
        with tempfile.TemporaryDirectory() as folder:
            for device in ("gpu", "cuda:99", "meta", "cpu:x"):
                argv = ["--device", device, "--out_dir", folder]
                self.refuse(argv, f"--device: got '{device}', wants one of auto, cpu")

    def test_a_device_without_free_memory(self):
        """The device is there, so a list of devices would mislead."""
        full = mock.patch("torch.zeros", side_effect=torch.OutOfMemoryError("CUDA out of memory"))
        with tempfile.TemporaryDirectory() as folder, full:
            self.refuse(
                ["--device", "cpu", "--out_dir", folder],
                "--device: got 'cpu', which has no free memory",
            )

    def test_the_gpu_of_macos(self):
        """The line says that it is not supported, even where the computer has one."""
        with tempfile.TemporaryDirectory() as folder:
            for device in ("mps", "mps:0"):
                argv = ["--device", device, "--out_dir", folder]
                self.refuse(argv, f"--device: got '{device}'", "not supported", "--device cpu")


class Densities(unittest.TestCase):
    def test_log_normal(self):
        random = torch.Generator().manual_seed(0)
        x = torch.rand(5, 784, generator=random).double()
        mean = torch.randn(3, 5, 784, generator=random).double()
        std = torch.tensor(0.37).double()
        expected = Independent(Normal(mean, std), 1).log_prob(x)
        torch.testing.assert_close(common.log_normal(x, mean, std), expected)

    def test_log_normal_in_float32(self):
        """Within 1e-4 nats of float64, at MNIST's size and the smallest published std."""
        random = torch.Generator().manual_seed(0)
        x = torch.rand(5, 784, generator=random)
        mean = torch.rand(9, 5, 784, generator=random)
        std = torch.tensor(0.25)
        exact = Independent(Normal(mean.double(), std.double()), 1).log_prob(x.double())
        error = (common.log_normal(x, mean, std) - exact).abs().max().item()
        self.assertLess(error, 1e-6 * exact.abs().max().item())

    def test_std_head(self):
        prior = torch.tensor(0.5)
        raw = torch.tensor([-1e4, -3.0, 0.0, 2.0, 1e4])
        std = common.std_head(raw, prior)
        self.assertAlmostEqual(std[2].item(), 0.5, places=6)
        self.assertTrue((std > 0).all())
        self.assertTrue((std.diff() > 0).all())
        softplus = math.log1p(math.exp(-3))
        self.assertAlmostEqual(std[1].item(), 0.5 * softplus / math.log(2), places=6)

        # `start` fixes the value where raw is 0. The rest is the same softplus, shifted.
        for start in (0.01, 0.1, 1.0, 10.0):
            std = common.std_head(raw, prior, torch.tensor(start))
            self.assertAlmostEqual(std[2].item(), 0.5 * start, places=6)
            shift = math.log(math.expm1(start * math.log(2)))
            softplus = math.log1p(math.exp(2 + shift))
            self.assertAlmostEqual(std[3].item(), 0.5 * softplus / math.log(2), places=5)


class CudaDevice(unittest.TestCase):
    """How a run's device is chosen and prepared where there are GPUs.

    torch.cuda and the first tensor on the device are replaced.
    """

    def setUp(self):
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        self.addCleanup(setattr, matmul, "allow_tf32", matmul.allow_tf32)
        self.addCleanup(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)

    def select(self, gpus, environment=None, **flags):
        """(the device, the devices made current), or the line that ends the program."""
        made_current = []
        f = MNIST_HVAE_Relu.Flags(**flags)
        with (
            mock.patch("torch.cuda.device_count", return_value=gpus),
            mock.patch("torch.cuda.set_device", made_current.append),
            mock.patch("torch.zeros"),
            mock.patch.dict(os.environ, environment or {}),
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            try:
                return common.select_device(f), made_current
            except SystemExit as end:
                self.assertEqual(end.code, 2)
                return err.getvalue()

    def test_is_the_current_one_before_anything_is_made_on_it(self):
        second_of_two = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
        cases = (
            ({}, {}, 0),
            ({"device": "cuda"}, {}, 0),
            ({"device": "cuda:1"}, {}, 1),
            ({}, second_of_two, 1),
        )
        for flags, environment, index in cases:
            with self.subTest(flags=flags, environment=environment):
                device, made_current = self.select(2, environment, **flags)
                self.assertEqual(device, torch.device("cuda", index))
                self.assertEqual(made_current, [device])
        self.assertEqual(self.select(2, device="cpu"), (torch.device("cpu"), []))
        self.assertEqual(self.select(0), (torch.device("cpu"), []))

    def test_precision_holds_wherever_it_is_used(self):
        self.addCleanup(
            torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        for matmul, precision in (("float32", "highest"), ("tf32", "high"), ("bf16", "medium")):
            rounds = matmul != "float32"
            torch.backends.cudnn.allow_tf32 = not rounds
            self.select(1, matmul=matmul)
            self.assertEqual(torch.backends.cudnn.allow_tf32, rounds)
            self.assertEqual(torch.backends.cuda.matmul.allow_tf32, rounds)
            self.assertEqual(torch.get_float32_matmul_precision(), precision)

    def test_more_processes_than_gpus(self):
        two = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        line = "--device: 2 processes cannot share 1 GPU(s); start at most one process per GPU"
        for gpus, flags in ((1, {}), (1, {"device": "cuda"}), (4, {"device": "cuda:1"})):
            self.assertIn(line, self.select(gpus, two, **flags))
        self.assertEqual(self.select(1, two, device="cpu"), (torch.device("cpu"), []))


class Terms(unittest.TestCase):
    def test_mean_with_free_bits_is_the_larger(self):
        kl = torch.tensor([[0.0, 3.0, -0.5], [0.1, 0.2, 0.3]], dtype=torch.float64)
        kl.requires_grad_()
        cases = ((0.0, [0.05, 1.6, -0.1]), (0.04, [0.05, 1.6, 0.04]), (0.5, [0.5, 1.6, 0.5]))
        for nats, mean in cases:
            free = common.free_bits(kl, torch.tensor(nats, dtype=torch.float64))
            torch.testing.assert_close(free.mean(0), torch.tensor(mean, dtype=torch.float64))
        # With half a nat free, only the second unit's KL still has a gradient.
        free.sum().backward()
        self.assertEqual(kl.grad.tolist(), [[0, 1, 0], [0, 1, 0]])

    def test_levels(self):
        self.assertEqual(common.levels({"kl"}), [""])
        # A name that merely begins with "kl" is no level, nor is one with another ending.
        self.assertEqual(common.levels({"kl", "kl_train"}), [""])
        names = ["log_px_z", "kl_1", "kl_2", "kl_10", "unit_kl_1", "kl_1_train", "kls", "kl_"]
        self.assertEqual(common.levels(names), ["_1", "_2", "_10"])
        self.assertEqual(common.levels([]), [])

    def test_batch_means_take_levels_only(self):
        terms = {
            "log_px_z": torch.tensor([-1.0, -3.0]),
            "kl": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
            "kl_train": torch.tensor([7.0, 7.0]),
        }
        means = common.batch_means(torch.tensor([2.0, 4.0]), terms)
        means = {name: value.item() for name, value in means.items()}
        self.assertEqual(means, {"loss": 3.0, "reconstruction": 2.0, "kl": 5.0})


class Run(small.WithMnist):
    def run_main(self, main, stdout=None, stderr=None):
        """common.run(main). Returns its exit status, and what went to stdout and stderr.

        Another stream may take the place of stdout or of stderr. Its text is then empty.
        """
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(stdout or out),
            contextlib.redirect_stderr(stderr or err),
            self.assertRaises(SystemExit) as end,
        ):
            common.run(main)
        return end.exception.code, out.getvalue(), err.getvalue()

    def closed_pipe(self):
        """A stream into a pipe that nobody reads."""
        nobody, descriptor = os.pipe()
        os.close(nobody)
        stream = open(descriptor, "w", encoding="utf-8")
        self.addCleanup(stream.close)
        return stream

    def test_the_status_is_what_main_returns(self):
        for status in (0, 1, None):
            self.assertEqual(self.run_main(lambda: status), (status, "", ""))

    def test_a_full_disk_is_one_line(self):
        for number in (errno.ENOSPC, errno.EDQUOT):
            error = OSError(number, os.strerror(number), "runs/x/model.pt")
            status, out, err = self.run_main(mock.Mock(side_effect=error))
            self.assertEqual((status, out), (1, ""))
            self.assertIn("runs/x/model.pt could not be written", err)
        # Other errors of the system are no full disk.
        with self.assertRaises(OSError):
            common.run(mock.Mock(side_effect=OSError(errno.EACCES, "no")))

    def test_a_file_in_the_place_of_a_folder_is_one_line(self):
        for kind, number in ((NotADirectoryError, errno.ENOTDIR), (FileExistsError, errno.EEXIST)):
            error = kind(number, os.strerror(number), "runs/x")
            status, out, err = self.run_main(mock.Mock(side_effect=error))
            self.assertEqual((status, out), (2, ""))
            self.assertEqual(err.strip().count("\n"), 0)
            self.assertIn("runs/x is in the way", err)

    def test_too_little_memory_is_one_line(self):
        error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        for error in (MemoryError(), torch.OutOfMemoryError(), error):
            status, out, err = self.run_main(mock.Mock(side_effect=error))
            self.assertEqual((status, out), (1, ""))
            self.assertRegex(err, "^\nnot enough memory[^\n]*\n$")
        # Other errors are faults of the program.
        with self.assertRaises(RuntimeError):
            common.run(mock.Mock(side_effect=RuntimeError("shapes")))

    def test_interrupted_with_overwrite(self):
        """The same command would train finished work again, so it does not continue."""
        for words, sequel in (
            (["--beta", "1"], "and the same command continues from there"),
            (["--overwrite"], "but the same command trains it again, because of --overwrite"),
        ):
            with mock.patch("sys.argv", ["script.py", *words]):
                _, _, err = self.run_main(mock.Mock(side_effect=KeyboardInterrupt))
            self.assertIn(f"interrupted; finished work is kept, {sequel}", err)

    def test_sigterm_interrupts_and_its_handler_comes_back(self):
        def handler(number, frame):
            raise AssertionError("the handler of the caller")

        previous = signal.signal(signal.SIGTERM, handler)
        self.addCleanup(signal.signal, signal.SIGTERM, previous)

        status, _, err = self.run_main(lambda: signal.raise_signal(signal.SIGTERM))
        self.assertEqual(status, 128 + signal.SIGTERM)
        self.assertRegex(err, "^\ninterrupted[^\n]*\n$")
        self.assertIs(signal.getsignal(signal.SIGTERM), handler)

        self.assertEqual(self.run_main(lambda: 0)[0], 0)
        self.assertIs(signal.getsignal(signal.SIGTERM), handler)

        with self.assertRaises(ZeroDivisionError):
            common.run(lambda: 1 / 0)
        self.assertIs(signal.getsignal(signal.SIGTERM), handler)

    def test_sigint_interrupts(self):
        status, _, err = self.run_main(lambda: signal.raise_signal(signal.SIGINT))
        self.assertEqual(status, 128 + signal.SIGINT)
        self.assertRegex(err, "^\ninterrupted[^\n]*\n$")

    def test_in_a_thread(self):
        """Python lets no other thread handle signals. A whole training works without."""
        argv = [
            "--num_epochs", "1", "--num_samples", "2", "--d_hidden", "4", "--device", "auto",
            "--data_dir", str(self.folder / "data"), "--out_dir", str(self.folder / "runs"),
        ]
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.getsignal(number) for number in numbers]
        during = []
        statuses = []

        def main():
            during.extend(signal.getsignal(number) for number in numbers)
            with mock.patch("pictures.save_figure"):
                return MNIST_CVAE_Relu.main(argv)

        def in_thread():
            try:
                common.run(main)
            except SystemExit as end:
                statuses.append(end.code)

        with (
            mock.patch("torch.cuda.device_count", return_value=0),
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            thread = threading.Thread(target=in_thread)
            thread.start()
            thread.join()
        self.assertEqual(statuses, [0], err.getvalue())
        self.assertIn("log_px", out.getvalue())
        self.assertIn("device: cpu\n", err.getvalue())
        self.assertEqual(during, before)
        self.assertEqual([signal.getsignal(number) for number in numbers], before)

    def test_an_interrupt_in_a_thread_is_one_line(self):
        statuses = []

        def in_thread():
            try:
                common.run(mock.Mock(side_effect=KeyboardInterrupt))
            except SystemExit as end:
                statuses.append(end.code)

        handler = signal.getsignal(signal.SIGTERM)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            thread = threading.Thread(target=in_thread)
            thread.start()
            thread.join()
        self.assertEqual(statuses, [128 + signal.SIGINT])
        self.assertRegex(err.getvalue(), "^\ninterrupted[^\n]*\n$")
        self.assertIs(signal.getsignal(signal.SIGTERM), handler)

    def test_missing_and_closed_streams(self):
        def main():
            print("to stdout")
            print("to stderr", file=sys.stderr)
            sys.stderr.write("and again\n")
            return 1

        closed = io.StringIO()
        closed.close()
        for stream in (None, closed):
            with mock.patch("sys.stdout", stream), mock.patch("sys.stderr", stream):
                with self.assertRaises(SystemExit) as end:
                    common.run(main)
            self.assertEqual(end.exception.code, 1)

    def test_a_stdout_that_nobody_reads(self):
        """The status that a shell reports for it, no message, and no error when Python ends."""
        stream = self.closed_pipe()
        status, _, err = self.run_main(lambda: print("x" * 10**6), stdout=stream)
        self.assertEqual((status, err), (141, ""))
        stream.flush()

        # Output that is short is written only when it is flushed at the end.
        stream = self.closed_pipe()
        status, _, err = self.run_main(lambda: print("x"), stdout=stream)
        self.assertEqual((status, err), (141, ""))
        stream.flush()

    def test_a_stderr_that_nobody_reads(self):
        """The status stays that of the error, although its line cannot be printed."""
        stream = self.closed_pipe()
        status, out, _ = self.run_main(mock.Mock(side_effect=MemoryError), stderr=stream)
        self.assertEqual((status, out), (1, ""))
        stream.flush()

        stream = self.closed_pipe()
        status, _, _ = self.run_main(lambda: print("x" * 10**6, file=sys.stderr), stderr=stream)
        self.assertEqual(status, 141)
        stream.flush()

    def test_windows_reports_a_closed_pipe_as_an_invalid_argument(self):
        error = OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.assertFalse(common._is_closed_output(error))
        with mock.patch.object(common.os, "name", "nt"):
            self.assertTrue(common._is_closed_output(error))


class InteractiveSession(small.WithMnist):
    """A script's main in a notebook, or in any other session that should go on after it."""

    # The lines that somebody types. A blank line ends a block.
    LINES = """
import signal
import MNIST_CVAE_Relu as m
import training
numbers = (signal.SIGINT, signal.SIGTERM)
handlers = [signal.getsignal(number) for number in numbers]

print("status:", m.main(argv))
print("handlers kept:", [signal.getsignal(number) for number in numbers] == handlers)

try: m.main(["--bet", "1"])
except SystemExit as end: print("refused:", end.code)

print("handlers kept:", [signal.getsignal(number) for number in numbers] == handlers)

record = training.Training.record
def record_and_interrupt(loop, means):
    record(loop, means)
    signal.raise_signal(signal.SIGINT)

training.Training.record = record_and_interrupt
try: m.main(argv + ["--beta", "0.5"])
except KeyboardInterrupt: print("interrupted")

print("handlers kept:", [signal.getsignal(number) for number in numbers] == handlers)
training.Training.record = record
print("status:", m.main(argv + ["--beta", "0.5"]))
print("handlers kept:", [signal.getsignal(number) for number in numbers] == handlers)
print("the session goes on")
"""

    def test_main_leaves_the_session_as_it_was(self):
        """It returns its status. A wrong flag and an interrupt raise what a session expects."""
        argv = [
            "--num_epochs", "1", "--num_samples", "2", "--d_hidden", "4", "--device", "cpu",
            "--data_dir", str(self.folder / "data"), "--out_dir", str(self.folder / "runs"),
        ]
        ended = subprocess.run(
            [sys.executable, "-i", "-q", "-c", f"argv = {argv}"],
            input=self.LINES,
            cwd=ROOT,
            capture_output=True,
            encoding="utf-8",
            timeout=240,
        )
        self.assertEqual(ended.returncode, 0, ended.stderr)
        self.assertNotIn("Traceback", ended.stderr)
        said = ("status:", "handlers kept:", "refused:", "interrupted", "the session goes on")
        answers = [line for line in ended.stdout.split("\n") if line.startswith(said)]
        self.assertEqual(
            answers,
            [
                "status: 0",
                "handlers kept: True",
                "refused: 2",
                "handlers kept: True",
                "interrupted",
                "handlers kept: True",
                "status: 0",
                "handlers kept: True",
                "the session goes on",
            ],
        )
        self.assertIn("--bet: no such flag; the nearest is --beta", ended.stderr)
        # The call after the interrupt continues from the checkpoint.
        self.assertIn("resuming after 0 of 1 epochs", ended.stderr)


class Noise(unittest.TestCase):
    def test_rows_of_the_noise(self):
        """Each of three processes draws its rows of the noise that one draws for all."""
        x = torch.zeros(4, 2, 3)
        pairs = ((processes.normal_like, torch.randn), (processes.uniform_like, torch.rand))
        for draw_like, draw in pairs:
            torch.manual_seed(1)
            whole = draw(12, 2, 3)
            for rank in range(3):
                torch.manual_seed(1)
                with processes.noise_rows(rank, 3):
                    self.assertTrue(torch.equal(draw_like(x), whole[4 * rank:4 * rank + 4]))

            # After that, this process draws for itself alone.
            torch.manual_seed(1)
            alone = draw_like(x)
            torch.manual_seed(1)
            self.assertTrue(torch.equal(alone, draw(4, 2, 3)))


if __name__ == "__main__":
    unittest.main()
