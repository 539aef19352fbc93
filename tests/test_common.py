"""Flags: what a command line means, and what is refused; densities; the noise of many processes; how a script ends."""
import contextlib
import errno
import io
import math
import os
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch
from torch.distributions import Independent, Normal

import common
import datasets
import files
import MNIST_HVAE_Relu
import MNIST_VAE_Linear_nonlearnable_sigma
from tests.small import call


def settings_of(*argv):
    with tempfile.TemporaryDirectory() as folder, mock.patch("sys.stderr"):
        return common.parse_flags(MNIST_HVAE_Relu.Flags, [*argv, "--out_dir", folder])


class Values(unittest.TestCase):
    def test_defaults_are_the_published_ones(self):
        [f] = settings_of()
        self.assertEqual((f.d_1, f.d_2, f.d_hidden, f.eta_enc, f.eta_dec, f.sigma_1, f.beta_1, f.beta_2, f.lr,
                          f.grad_clip, f.num_epochs, f.batch_size),
                         (16, 16, 256, 0.5, 0.5, 0.5, 1.0, 1.0, 1e-3, 0.1, 100, 128))

    def test_list_and_range(self):
        self.assertEqual([f.beta_1 for f in settings_of("--beta_1", "0.1,0.5,1.0")], [0.1, 0.5, 1.0])
        betas = [f.beta_1 for f in settings_of("--beta_1=0.1:5.0:0.1")]
        self.assertEqual(len(betas), 50)
        self.assertEqual((betas[2], betas[-1]), (0.3, 5.0))        # exactly, where 0.1 + 0.1 + 0.1 is not 0.3
        self.assertEqual([f.seed for f in settings_of("--seed", "0:3")], [0, 1, 2, 3])
        self.assertEqual([f.beta_1 for f in settings_of("--beta_1", "0:1:0.4")], [0, 0.4, 0.8])
        self.assertEqual([f.beta_1 for f in settings_of("--beta_1", "2,0.5:1:0.5,2")], [2, 0.5, 1])

    def test_lists_multiply(self):
        grid = [(f.beta_1, f.beta_2, f.seed) for f in settings_of("--seed", "1,2", "--beta_2", "3,4", "--beta_1", "5,6")]
        self.assertEqual(grid, [(a, b, s) for a in (5, 6) for b in (3, 4) for s in (1, 2)])

    def test_booleans(self):
        self.assertTrue(settings_of("--released_objective", "--beta_1", "2")[0].released_objective)
        self.assertFalse(settings_of("--beta_1", "2")[0].released_objective)
        both = settings_of("--released_objective", "false,true")
        self.assertEqual([f.released_objective for f in both], [False, True])

    def test_one_number_a_unit(self):
        with tempfile.TemporaryDirectory() as folder, mock.patch("sys.stderr"):
            settings = common.parse_flags(MNIST_VAE_Linear_nonlearnable_sigma.Flags, [
                "--sigma", "8/4/2/1/.5,0.3,1:2:0.5", "--out_dir", folder])
        self.assertEqual([f.sigma for f in settings], ["8.0/4.0/2.0/1.0/0.5", 0.3, 1.0, 1.5, 2.0])
        self.assertEqual([common.numbers(f.sigma) for f in settings[:2]], [[8, 4, 2, 1, 0.5], [0.3]])
        scalars = common.scalars_of(settings[:2], torch.zeros(1, dtype=torch.float64))
        self.assertEqual(scalars["sigma"].tolist(), [[8, 4, 2, 1, 0.5], [0.3] * 5])
        self.assertEqual(tuple(common.scalars_of(settings[1:], torch.zeros(1))["sigma"].shape), (4,))

    def test_a_path_may_hold_commas_and_colons(self):
        self.assertEqual(settings_of("--data_dir", "a,b:c")[0].data_dir, "a,b:c")

    def test_help_names_every_flag_with_default(self):
        status, out, _ = call(MNIST_HVAE_Relu.main, "--help")
        self.assertEqual(status, 0)
        for name in files.what(MNIST_HVAE_Relu.Flags(), datasets.Data("mnist", (), (), None, None)):
            self.assertIn(f"--{name}=VALUE", out)
        self.assertIn("default 0.5", out)


class Refused(unittest.TestCase):
    """Exit status 2, one line that names the flag, what came and what is allowed; nothing is trained."""

    def refuse(self, argv, *parts):
        with mock.patch("training.train_group", side_effect=AssertionError("trained")):
            status, out, err = call(MNIST_HVAE_Relu.main, *argv)
        self.assertEqual(status, 2, err)
        self.assertEqual(out, "")
        self.assertEqual(err.count("\n"), 1, err)
        for part in ("MNIST_HVAE_Relu.py: error: ", *parts):
            self.assertIn(part, err)

    def test_unknown_flag(self):
        self.refuse(["--beta1", "2"], "--beta1", "nearest is --beta_1")
        self.refuse(["--eta_decc=2"], "--eta_decc", "nearest is --eta_dec")
        self.refuse(["--beta", "2"], "--beta:", "nearest is --beta_")      # no abbreviation either

    def test_not_a_number(self):
        for value in ("many", "", "1,,2", "1:2:x", "1:2:3:4", "0.1;0.5"):
            self.refuse(["--beta_1", value], "--beta_1", "wants a number at least 0")
        self.refuse(["--d_1", "1.5"], "--d_1", "'1.5'", "a whole number at least 1")
        self.refuse(["--overwrite", "maybe"], "--overwrite", "'maybe'", "true or false")

    def test_not_finite(self):
        for value in ("nan", "inf", "-inf", "1e999", "0:inf", "0:1:nan"):
            self.refuse(["--beta_1", value], "--beta_1", value)

    def test_out_of_range(self):
        for flag in ("eta_enc", "eta_dec", "sigma_1", "lr", "grad_clip"):
            for value in ("0", "-1", "0.5,0", "1e-999"):
                self.refuse([f"--{flag}", value], f"--{flag}", value.split(",")[-1], "above 0")
        for flag in ("beta_1", "beta_2"):
            self.refuse([f"--{flag}", "-0.1"], f"--{flag}", "-0.1", "at least 0")
        for flag in ("d_1", "d_2", "d_hidden", "batch_size", "num_epochs"):
            self.refuse([f"--{flag}", "0"], f"--{flag}", "'0'", "at least 1")
        for flag in ("num_samples", "seed"):
            self.refuse([f"--{flag}=-1"], f"--{flag}", "'-1'", "at least 0")

    def test_upper_bound_and_choices(self):
        """Flags that later scripts have: a digit, a correlation type."""
        digit = common.flag(1, "which digit", low=0, high=9)
        digit.name = "digit"
        self.assertEqual(common._values(digit, "0:9"), list(range(10)))
        for value in ("10", "-1", "5:10"):
            with self.assertRaises(ValueError):
                common._values(digit, value)
        self.assertEqual(common._wanted(digit), "a whole number at least 0 and at most 9")
        kind = common.flag("Identical", "correlation", choices=("Identical", "Random"))
        self.assertEqual(common._values(kind, "Random,Identical"), ["Random", "Identical"])
        with self.assertRaisesRegex(ValueError, "Randon"):
            common._values(kind, "Identical,Randon")
        self.refuse(["--dataset", "mnits"], "--dataset", "'mnits'", "auto, mnist, fashion, digits")

    def test_empty_range(self):
        for value in ("5:1:1", "1:2:0", "1:2:-1", "0:1:1e-9"):
            self.refuse(["--beta_1", value], "--beta_1", value, "range")

    def test_too_many_settings(self):
        self.refuse(["--beta_1", "0:1000", "--beta_2", "0:1000"], "--beta_1", "1002001", "10000")

    def test_value_without_a_flag_and_flag_without_a_value(self):
        self.refuse(["0.5"], "'0.5'")
        self.refuse(["--beta_1"], "--beta_1: got no value, wants a number at least 0")
        self.refuse(["--beta_1", "--num_epochs", "1"], "--beta_1: got no value, wants a number at least 0")
        self.refuse(["--out_dir", "--overwrite"], "--out_dir: got no value, wants text")

    def test_out_dir_that_cannot_be_written(self):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "file")
            file.touch()
            self.refuse(["--out_dir", file], "--out_dir", str(file))
            self.refuse(["--out_dir", file / "below"], "--out_dir", str(file))

    def test_device_unknown_or_absent(self):
        with tempfile.TemporaryDirectory() as folder:
            for device in ("gpu", "cuda:99", "meta", "cpu:x"):
                self.refuse(["--device", device, "--out_dir", folder], "--device", device, "auto, cpu")


class Densities(unittest.TestCase):
    def test_log_normal(self):
        random = torch.Generator().manual_seed(0)
        x, mean = torch.rand(5, 784, generator=random).double(), torch.randn(3, 5, 784, generator=random).double()
        std = torch.tensor(0.37).double()
        torch.testing.assert_close(common.log_normal(x, mean, std), Independent(Normal(mean, std), 1).log_prob(x))

    def test_log_normal_in_float32(self):
        """Within 1e-4 nats of float64, at MNIST's size and the smallest published std."""
        random = torch.Generator().manual_seed(0)
        x, mean = torch.rand(5, 784, generator=random), torch.rand(9, 5, 784, generator=random)
        exact = Independent(Normal(mean.double(), torch.tensor(0.25).double()), 1).log_prob(x.double())
        found = common.log_normal(x, mean, torch.tensor(0.25))
        self.assertLess((found - exact).abs().max().item(), 1e-6 * exact.abs().max().item())

    def test_std_head(self):
        prior = torch.tensor(0.5)
        raw = torch.tensor([-1e4, -3.0, 0.0, 2.0, 1e4])
        std = common.std_head(raw, prior)
        self.assertAlmostEqual(std[2].item(), 0.5, places=6)
        self.assertTrue((std > 0).all() and (std.diff() > 0).all())
        self.assertAlmostEqual(std[1].item(), 0.5 * math.log1p(math.exp(-3)) / math.log(2), places=6)
        for start in (0.01, 0.1, 1.0, 10.0):                  # where raw is 0, and from there on the same softplus
            std = common.std_head(raw, prior, torch.tensor(start))
            self.assertAlmostEqual(std[2].item(), 0.5 * start, places=6)
            shift = math.log(math.expm1(start * math.log(2)))
            self.assertAlmostEqual(std[3].item(), 0.5 * math.log1p(math.exp(2 + shift)) / math.log(2), places=5)


class CudaDevice(unittest.TestCase):
    """How the device of a run is chosen and prepared where there are GPUs: torch.cuda and the first tensor on it replaced."""

    def device_of(self, gpus, environment=None, **flags):
        """(the device, what was asked of torch.cuda), or the line that ends the program."""
        asked = []
        f = MNIST_HVAE_Relu.Flags(**flags)
        with mock.patch("torch.cuda.device_count", return_value=gpus), mock.patch("torch.cuda.set_device", asked.append), \
                mock.patch("torch.zeros"), mock.patch.dict(os.environ, environment or {}), \
                contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                return common.device_of(f), asked
            except SystemExit as end:
                self.assertEqual(end.code, 2)
                return err.getvalue()

    def setUp(self):
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        self.addCleanup(lambda: (setattr(torch.backends.cuda.matmul, "allow_tf32", before[0]),
                                 setattr(torch.backends.cudnn, "allow_tf32", before[1])))

    def test_is_the_current_one_before_anything_is_made_on_it(self):
        for flags, environment, index in (({}, {}, 0), (dict(device="cuda"), {}, 0), (dict(device="cuda:1"), {}, 1),
                                          ({}, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 1)):
            device, asked = self.device_of(2, environment, **flags)
            self.assertEqual((device, asked), (torch.device("cuda", index), [torch.device("cuda", index)]))
        self.assertEqual(self.device_of(2, device="cpu"), (torch.device("cpu"), []))
        self.assertEqual(self.device_of(0), (torch.device("cpu"), []))

    def test_precision_holds_wherever_it_is_used(self):
        self.addCleanup(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        for matmul, precision in (("float32", "highest"), ("tf32", "high"), ("bf16", "medium")):
            rounds = matmul != "float32"
            torch.backends.cudnn.allow_tf32 = not rounds
            self.device_of(1, matmul=matmul)
            self.assertEqual((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32), (rounds,) * 2)
            self.assertEqual(torch.get_float32_matmul_precision(), precision)

    def test_more_processes_than_gpus(self):
        two = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        for gpus, flags in ((1, {}), (1, dict(device="cuda")), (4, dict(device="cuda:1"))):
            self.assertIn("--device: 2 processes for 1 GPU(s), wants one each, or --device cpu", self.device_of(gpus, two, **flags))
        self.assertEqual(self.device_of(1, two, device="cpu"), (torch.device("cpu"), []))


class FreeBits(unittest.TestCase):
    def test_mean_is_the_larger(self):
        kl = torch.tensor([[0.0, 3.0, -0.5], [0.1, 0.2, 0.3]], dtype=torch.float64, requires_grad=True)
        for nats, mean in ((0.0, [0.05, 1.6, -0.1]), (0.04, [0.05, 1.6, 0.04]), (0.5, [0.5, 1.6, 0.5])):
            free = common.free_bits(kl, torch.tensor(nats, dtype=torch.float64))
            torch.testing.assert_close(free.mean(0), torch.tensor(mean, dtype=torch.float64))
        kl.grad = None
        free.sum().backward()
        self.assertEqual(kl.grad.tolist(), [[0, 1, 0], [0, 1, 0]])


class Run(unittest.TestCase):
    def test_a_full_disk_is_one_line(self):
        for number, status in ((errno.ENOSPC, 1), (errno.EDQUOT, 1)):
            with contextlib.redirect_stderr(io.StringIO()) as err, self.assertRaises(SystemExit) as end:
                common.run(mock.Mock(side_effect=OSError(number, os.strerror(number), "runs/x/model.pt")))
            self.assertEqual(end.exception.code, status)
            self.assertIn("runs/x/model.pt could not be written", err.getvalue())
        with self.assertRaises(OSError):                      # others are no full disk
            common.run(mock.Mock(side_effect=OSError(errno.EACCES, "no")))


class Noise(unittest.TestCase):
    def test_rows_of_the_noise(self):
        """Each of three processes draws its rows of what one draws for all."""
        x = torch.zeros(4, 2, 3)
        for draw, all_of in ((common.normal_like, torch.randn), (common.uniform_like, torch.rand)):
            torch.manual_seed(1)
            whole = all_of(12, 2, 3)
            for rank in range(3):
                torch.manual_seed(1)
                with common.noise_of(rank, 3):
                    self.assertTrue(torch.equal(draw(x), whole[4 * rank:4 * rank + 4]))
            torch.manual_seed(1)
            alone = draw(x)                                   # of one process
            torch.manual_seed(1)
            self.assertTrue(torch.equal(alone, all_of(4, 2, 3)))


if __name__ == "__main__":
    unittest.main()
