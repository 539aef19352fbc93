"""losses.py: what the losses of PyTorch amount to.

The losses are computed by torch.nn.functional, and the negative beta-ELBO by torch.distributions.
"""
import re
import unittest

import numpy as np
import torch
from torch.distributions import Bernoulli, Categorical, Normal
from torch.nn import functional

import datasets
import losses
import predict_collapse
from tests import small
from tests.test_predict_collapse import Case

ROWS = 50
COLUMNS = 12
CATEGORIES = 3
UNITS = 4


def loss_of_pytorch(name, x, output, variance):
    """A reconstruction loss as people write it: a mean over rows, and "mean" or "sum" of columns.

    x (ROWS, COLUMNS) are the data. output is what the decoder returns: means, probabilities, or the
    logits (ROWS, CATEGORIES, COLUMNS) of categories.
    """
    reduction = "sum" if name.endswith("sum") else "mean"
    functions = {
        "mse": lambda: functional.mse_loss(output, x, reduction=reduction),
        "bce": lambda: functional.binary_cross_entropy(output, x, reduction=reduction),
        "ce": lambda: functional.cross_entropy(output, x, reduction=reduction),
        "gaussian_nll": lambda: functional.gaussian_nll_loss(
            output, x, variance.expand_as(x), reduction=reduction
        ),
    }
    kind = name.removesuffix("_mean").removesuffix("_sum")
    loss = functions[kind]()
    return loss / ROWS if reduction == "sum" else loss


class Translation(unittest.TestCase):
    def test_flags(self):
        self.assertEqual(
            set(losses.LOSSES),
            {"mse_mean", "mse_sum", "bce_mean", "bce_sum", "ce_mean", "ce_sum", "gaussian_nll",
             "gaussian_nll_sum"},
        )

    def test_same_minimum(self):
        """The negative beta-ELBO is the loss times one number, plus one number, for any model."""
        for name in losses.LOSSES:
            for reduction in ("sum", "mean"):
                with self.subTest(loss=name, kl_reduction=reduction):
                    self.check_same_minimum(name, reduction)

    def check_same_minimum(self, name, reduction):
        f = predict_collapse.Flags(loss=name, kl_weight=0.3, kl_reduction=reduction)
        f = losses.with_beta(losses.with_likelihood(f), COLUMNS, UNITS)

        random = torch.Generator().manual_seed(0)
        ours = []
        theirs = []
        for _ in range(6):
            kl = torch.rand(ROWS, UNITS, generator=random, dtype=torch.float64)
            reconstruction, loss = self.random_model(name, f, random)
            ours.append((reconstruction + f.beta * kl.sum(1)).mean())
            mean_kl = kl.sum(1).mean() if reduction == "sum" else kl.mean()
            theirs.append(loss + 0.3 * mean_kl)

        # The differences from the first model have one ratio.
        ratios = torch.stack(ours)[1:] - ours[0]
        ratios = ratios / (torch.stack(theirs)[1:] - theirs[0])
        torch.testing.assert_close(ratios, ratios[:1].expand(5), rtol=1e-9, atol=0)
        self.assertGreater(ratios[0].item(), 0)

    def random_model(self, name, f, random):
        """(-log p(x|z) of each row (ROWS,), PyTorch's loss) for random data and a random model."""
        # The data are the same for all models.
        data = torch.Generator().manual_seed(1)
        shape = (ROWS, COLUMNS)
        output = torch.randn(*shape, generator=random, dtype=torch.float64)
        variance = torch.rand(1, generator=random, dtype=torch.float64) + 0.5
        if name.startswith("ce"):
            x = torch.randint(0, CATEGORIES, shape, generator=data)
            output = torch.randn(ROWS, CATEGORIES, COLUMNS, generator=random, dtype=torch.float64)
            density = Categorical(logits=output.transpose(1, 2))
        elif name.startswith("bce"):
            x = torch.randint(0, 2, shape, generator=data).double()
            output = output.sigmoid()
            density = Bernoulli(output)
        else:
            x = torch.randn(*shape, generator=data, dtype=torch.float64)
            std = variance.sqrt() if f.eta_dec == "learned" else f.eta_dec
            density = Normal(output, std)
        return -density.log_prob(x).sum(1), loss_of_pytorch(name, x, output, variance)

    def test_likelihoods(self):
        for name, likelihood in (
            ("mse_mean", "gaussian"), ("bce_sum", "bernoulli"), ("ce_mean", "categorical"),
            ("gaussian_nll", "gaussian"),
        ):
            f = losses.with_likelihood(predict_collapse.Flags(loss=name))
            self.assertEqual(f.likelihood, likelihood)
        self.assertEqual(f.eta_dec, "learned")
        # The number that a trained model has learned is kept.
        f = predict_collapse.Flags(loss="gaussian_nll", residual="r.npy", eta_dec=0.3)
        self.assertEqual(losses.with_likelihood(f).eta_dec, 0.3)


class Flags(Case):
    """--loss, --kl_weight and --kl_reduction of predict_collapse.py."""

    def test_like_the_terms_of_the_theory(self):
        """The same predictions as with the likelihood, eta_dec and beta of the loss."""
        x = self.save("x.npy", self.x)
        for argv, terms, line in (
            (
                ["--loss", "mse_mean", "--kl_weight", 0.1],
                ["--beta", 0.3],
                "The loss mse_mean with KL weight 0.1 amounts to a Gaussian decoder with eta_dec = "
                "1 and beta = 0.3 (a mean over 6 columns with weight 1 is their sum with weight 6; "
                "the squared error is twice the loss of a decoder with eta_dec = 1).",
            ),
            (
                ["--loss", "mse_sum"],
                ["--eta_dec", 0.5**0.5],
                "The loss mse_sum with KL weight 1 amounts to a Gaussian decoder with eta_dec = "
                "0.7071 and beta = 1.",
            ),
            (
                ["--loss", "mse_sum", "--kl_reduction", "mean", "--d_1", 5],
                ["--eta_dec", 0.5**0.5, "--beta", 1 / 5, "--d_1", 5],
                "beta = 0.2 (a KL averaged over 5 units is their sum with weight 1/5).",
            ),
            (
                ["--loss", "gaussian_nll_sum", "--kl_weight", 0.5, "--d_1", 5],
                ["--eta_dec", "learned", "--beta", 0.5, "--d_1", 5],
                "to a Gaussian decoder with a learned eta_dec and beta = 0.5.",
            ),
        ):
            with self.subTest(argv=argv):
                saved, out, _ = self.predict("--x", x, *argv)
                first_line = out.split("\n")[0]
                self.assertIn(line, first_line)
                expected, _, _ = self.predict("--x", x, *terms)
                for name in ("predicted", "optimal_loss"):
                    self.assertEqual(saved[name], expected[name])

    def test_answer_in_their_terms(self):
        """The advice on the KL weight keeps the wanted units."""
        x = self.save("x.npy", self.x)
        argv = ["--x", x, "--loss", "mse_mean", "--kl_weight"]
        _, out, _ = self.predict(*argv, 9, "--active", 3)
        match = re.search(r"beta <= \S+ \(KL weight <= (\S+)\)\.", out)
        self.assertIn("At beta 27 (KL weight 9), ", out)
        _, out, _ = self.predict(*argv, match.group(1))
        self.assertIn(", 3 of 6 units stay active; ", out)
        _, out, _ = self.predict(*argv, 1.02 * float(match.group(1)))
        self.assertIn(", 2 of 6 units stay active; ", out)

    def test_lists(self):
        """A list of weights is one report with a row for each."""
        x = self.save("x.npy", self.x)
        _, out, _ = self.predict("--x", x, "--loss", "mse_mean", "--kl_weight", "0.1,1,2")
        self.assertIn("with KL weight 0.1, 1, 2 amounts to", out)
        self.assertIn("beta = 0.3, 3, 6 (", out)
        self.assertEqual(out.count("stay active"), 1)
        self.assertEqual([row.split()[0] for row in out.split("\n")[-4:-1]], ["0.3", "3", "6"])

    def test_other_decoders(self):
        """The mean over 6 columns multiplies the weight by 6."""
        x = self.save("binary.npy", (self.x > 0.5).astype(float))
        argv = ["--x", x, "--loss", "bce_mean", "--kl_weight", "0.25"]
        status, out, err = self.call(*argv)
        self.assertEqual(status, 0, err)
        self.assertIn("to a Bernoulli decoder and beta = 1.5 (a mean over 6 columns", out)
        _, expected, _ = self.call("--x", x, "--likelihood", "bernoulli", "--beta", 1.5)
        self.assertIn("At beta 1.5 (KL weight 0.25), collapse", out)
        # The tables are the same.
        table = expected.index("\nUnstable directions over beta")
        self.assertTrue(out.endswith(expected[table:]))

    def test_grey_pixels(self):
        """The images of a data set stay grey. rho has p (1 - p) in place of the variances."""
        small.write_mnist(self.folder / "data")
        images = ["--dataset", "mnist", "--data_dir", self.folder / "data"]
        status, out, err = self.call(*images, "--loss", "bce_sum")
        self.assertEqual(status, 0, err)
        [data] = datasets.load_mnist(
            [predict_collapse.Flags(dataset="mnist", data_dir=str(self.folder / "data"))])
        x = data.train[0].double().numpy()
        self.assertTrue(((x > 0) & (x < 1)).any())
        x = x[:, x.std(0) > 0]
        p = x.mean(0)
        scale = 1 / np.sqrt(p * (1 - p))
        rho = np.linalg.eigvalsh(scale[:, None] * np.cov(x.T, bias=True) * scale)
        self.assertIn(f"it is stable from beta {rho[-1]:.4g} (KL weight {rho[-1]:.4g}) on.", out)
        self.assertIn("Some numbers lie between 0 and 1.", out)
        self.assertNotIn("binarised", out)

    def test_post_mortem(self):
        """A mean over 4 columns with weight w is beta = 2 w for eta_dec = 1."""
        argv = [
            "--x", self.save("u.npy", self.x), "--residual", self.save("r.npy", self.y),
            "--collapsed", 2,
        ]
        status, out, err = self.call(*argv, "--loss", "mse_mean", "--kl_weight", 3)
        self.assertEqual(status, 0, err)
        first, _, rest = out.partition("\n")
        self.assertIn("weight 3 amounts to a Gaussian decoder with eta_dec = 1 and beta = 6", first)
        _, expected, _ = self.call(*argv, "--beta", 6)
        # The loss that PyTorch prints is a mean over 4 columns of twice the theory's.
        line = "The KL weight of mse_mean is 0.5 times beta. 1 nat is 0.5 of this loss.\n"
        self.assertIn(line, rest)
        self.assertEqual(rest.replace(line, ""), expected)

    def test_post_mortem_of_several_numbers_of_units(self):
        """A KL that is a mean over k units divides beta by k, for each k of a list."""
        status, out, err = self.call(
            "--x", self.save("u.npy", self.x), "--residual", self.save("r.npy", self.y),
            "--collapsed", 2, "--loss", "mse_sum", "--kl_reduction", "mean", "--d_1", "4,8")
        self.assertEqual(status, 0, err)
        for beta, units in (("0.25", 4), ("0.125", 8)):
            self.assertIn(f"beta = {beta} (a KL averaged over {units} units", out)
            self.assertRegex(out, rf"With beta = {beta} and eta_dec = .*, 2 of {units} units")

    def test_wrong_flags(self):
        x = self.save("x.npy", self.x)
        y = self.save("y.npy", self.y)
        argv = ["--x", x, "--loss", "mse_mean"]
        for flag, value in (("--beta", 2), ("--eta_dec", 2), ("--likelihood", "poisson")):
            self.refuse_in_one_line(
                [*argv, flag, value], f"{flag}: cannot be combined with --loss mse_mean")
        self.refuse_in_one_line([*argv, "--beta", 2], "give --kl_weight instead")
        self.refuse_in_one_line([*argv, "--model", "hvae"], "--loss: cannot be combined")
        self.refuse_in_one_line(
            [*argv, "--kl_reduction", "mean"], "--kl_reduction: got mean, also wants --d_1")
        for flag, value in (("--kl_weight", 2), ("--kl_reduction", "mean")):
            self.refuse_in_one_line(["--x", x, flag, value], f"{flag}: also wants --loss")
        for loss in ("gaussian_nll", "bce_sum", "ce_mean"):
            self.refuse_in_one_line(
                ["--x", x, "--y", y, "--model", "cvae", "--loss", loss],
                f"--loss: got {loss}, wants mse_mean or mse_sum for --model cvae")
        self.refuse_in_one_line(
            ["--x", x, "--loss", "bce_sum", "--center", "true"],
            "--center: cannot be combined with --loss bce_sum, only with a Gaussian decoder")
        residual = ["--x", x, "--residual", y, "--collapsed", 1, "--loss", "gaussian_nll"]
        self.refuse_in_one_line(
            residual, "--loss: gaussian_nll with --residual also wants --eta_dec")
        status, out, err = self.call(*residual, "--eta_dec", 0.4)
        self.assertEqual(status, 0, err)
        self.assertIn("With beta = 4 and eta_dec = 0.4, 1 unit collapsed", out)
        self.refuse_in_one_line(
            ["--x", x, "--loss", "mse"], "--loss: got 'mse', wants one of", "mse_mean")


if __name__ == "__main__":
    unittest.main()
