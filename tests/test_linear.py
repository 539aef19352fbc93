"""The linear MNIST scripts: terms beside sampling and exact values, losses beside closed forms."""
import dataclasses
import json
import math
import tempfile
import unittest
from unittest import mock

import common
import numpy as np
import torch
from torch.distributions import MultivariateNormal, kl_divergence

import datasets
import report
import theory
import training
import verify
import MNIST_CVAE_Linear
import MNIST_CVAE_Linear_single_digit
import MNIST_HVAE_Linear_learnable_sigma_2
import MNIST_HVAE_Linear_nonlearnable_sigma_2
import MNIST_VAE_Linear_learnable_sigma
import MNIST_VAE_Linear_nonlearnable_sigma
from tests import small

# {script: (its model, flags that are not at their default and unlike each other)}
SCRIPTS = {
    MNIST_VAE_Linear_learnable_sigma: (
        "VAE", dict(beta=0.7, eta_dec=0.8, c=1.3, sigma="0.5/0.6/0.7", d_1=3)
    ),
    MNIST_VAE_Linear_nonlearnable_sigma: (
        "VAE", dict(beta=0.7, eta_dec=0.8, c=1.3, sigma="0.5/0.2/0.7", d_1=3)
    ),
    MNIST_CVAE_Linear: ("CVAE", dict(beta=0.7, eta_dec=0.8, eta_enc=1.3, dim_z=3)),
    MNIST_CVAE_Linear_single_digit: (
        "CVAE", dict(beta=0.7, eta_dec=0.8, eta_enc=1.3, dim_z=3, d_hidden=196)
    ),
    MNIST_HVAE_Linear_learnable_sigma_2: (
        "HVAE",
        dict(beta_1=0.7, beta_2=1.2, eta_dec=0.8, eta_enc=1.3, sigma_1=0.6, d_1=3, d_2=4),
    ),
    MNIST_HVAE_Linear_nonlearnable_sigma_2: (
        "HVAE",
        dict(
            beta_1=0.7, beta_2=1.2, eta_dec=0.8, eta_enc=1.3, sigma_1=0.6, sigma_2=0.5, d_1=3, d_2=4
        ),
    ),
}

# The names of a closed form's quantities that a linear VAE has, too.
VAE_UNITS = ("lambda", "omega", "sigma", "kl", "information")


def kl_terms(terms):
    """The sum of all KL terms, (..., B)."""
    return sum(terms[f"kl{level}"].sum(-1) for level in common.levels(terms))


class Models(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.images = small.digit_data(60, 6)
        cls.quarters = small.as_quarters(cls.images)

    def cases(self, shift=0.05, scale=1.0, rows=60, **other_flags):
        """Yield a ModelCase for each script, with other_flags where the script has them.

        Each weight is multiplied by `scale`, and moved by a random number of the std `shift`.
        """
        for script, (name, flags) in SCRIPTS.items():
            flags = dict(flags)
            for field in dataclasses.fields(script.Flags):
                if field.name in other_flags:
                    flags[field.name] = other_flags[field.name]
            f = script.Flags(device="cpu", **flags)

            data = self.quarters if name == "CVAE" else self.images
            data = dataclasses.replace(data, train=tuple(t[:rows] for t in data.train))
            model = training.build(getattr(script, name), f, data).eval()
            random = torch.Generator().manual_seed(4)
            with torch.no_grad():
                for p in model.parameters():
                    noise = torch.randn(p.shape, generator=random, dtype=p.dtype)
                    p.mul_(scale).add_(shift * noise)
            yield small.ModelCase(script, model, f, common.on_device(f, data.test[0]), data)

    @torch.no_grad()
    def test_terms_are_integrals_of_the_noise(self):
        """E[log w] = E[log p(x|z)] - sum of KLs. Training sees the terms that evaluation sees."""
        for case in self.cases():
            test, scalars = case.data.test, case.scalars
            torch.manual_seed(1)
            terms = case.model(*test, scalars, sample_shape=(4000,))
            elbo = terms["log_px_z"] - kl_terms(terms)
            log_w = terms["log_w"]
            error = log_w.std(0) / len(log_w)**0.5
            self.assertLess(((log_w.mean(0) - elbo).abs() / error).max().item(), 4)
            self.assertLess((error / elbo.abs()).max().item(), 0.01)

            case.model.train()
            training_terms = case.model(*test, scalars)
            only_evaluation = {"log_w", "unit_kl_1", "mean", "mean_1", "mean_2"}
            self.assertEqual(set(training_terms), set(terms) - only_evaluation)
            for name, value in training_terms.items():
                torch.testing.assert_close(value, terms[name], rtol=0, atol=1e-12)

    @torch.no_grad()
    def test_exact_log_likelihood(self):
        """exact_log_px beside importance sampling with many draws."""
        # Here q is as wide as the posterior.
        widths = dict(sigma=0.7, sigma_1=0.8, sigma_2=1.3, start_std=1.0)
        for case in self.cases(0.0, 0.1, **widths):
            test, scalars = case.data.test, case.scalars
            exact = case.model.exact_log_px(*test, scalars)
            torch.manual_seed(1)
            parts = []
            for _ in range(4):
                parts.append(case.model(*test, scalars, sample_shape=(20_000,))["log_w"])
            # Sampled p(x) over exact p(x). Its expectation is 1.
            ratio = (torch.cat(parts) - exact).exp()
            error = ratio.std(0) / len(ratio)**0.5
            self.assertLess(error.max().item(), 0.05)
            self.assertLess(((ratio.mean(0) - 1).abs() / error).max().item(), 4)

    @torch.no_grad()
    def test_exact_log_likelihood_of_a_full_covariance(self):
        for case in self.cases():
            mean, covariance = self.mean_and_covariance(case)
            y = case.data.test[-1]
            noise = 0.8**2 * torch.eye(y.shape[1], dtype=torch.float64)
            full = MultivariateNormal(mean, covariance + noise)
            exact = case.model.exact_log_px(*case.data.test, case.scalars)
            torch.testing.assert_close(exact, full.log_prob(y), rtol=1e-9, atol=0)

    def mean_and_covariance(self, case):
        """The mean of p(x), or of p(y|x), and the covariance that z adds to that of the noise."""
        script, model = case.script, case.model
        x, y = case.data.test[0], case.data.test[-1]
        if "CVAE" in script.__name__:
            if hasattr(model, "U1"):
                U = model.U1.weight
                mean = x @ model.U2.weight.T
            else:
                U = model.g_z[1].weight @ model.g_z[0].weight
                mean = model.g_x(x)
            return mean, 1.3**2 * U @ U.T
        if "HVAE" in script.__name__:
            U1, U2 = model.U1, model.U2
            z1_covariance = 1.3**2 * U2 @ U2.T + 0.8**2 * torch.eye(3, dtype=torch.float64)
            return torch.zeros_like(y), U1 @ z1_covariance @ U1.T
        U = model.U.weight
        return torch.zeros_like(y), (0.8 / 1.3)**2 * U @ U.T

    @torch.no_grad()
    def test_divergence_of_z1_is_over_an_independent_draw(self):
        """unit_kl_1 = E KL(q(z1|x) || p(z1|z2')), z2' inferred from another draw of z1."""
        for case in self.cases():
            if "HVAE" not in case.script.__name__:
                continue
            model, scalars = case.model, case.scalars
            torch.manual_seed(1)
            q_z1 = model.q_z1(case.data.test[0], scalars)
            z2 = model.q_z2(q_z1.sample((20_000,)), scalars).sample()
            sampled = kl_divergence(q_z1, model.p_z1(z2, scalars))
            error = sampled.std(0) / len(sampled)**0.5
            unit_kl = model(*case.data.test, scalars, sample_shape=(2,))["unit_kl_1"]
            self.assertLess(((sampled.mean(0) - unit_kl).abs() / error).max().item(), 4)
            self.assertLess((error / unit_kl).max().item(), 0.05)

    def test_never_below_the_optimal_loss(self):
        """From a random model down to the optimum, the gap to L* is never negative, and vanishes.

        The minimiser is L-BFGS on the model's own forward over all training rows.
        """
        for case in self.cases(0.01, rows=12, d_hidden=20):
            gaps, comparison = self.gaps_of_a_minimisation(case)
            self.assertGreater(min(gaps), -1e-9)
            self.assertGreater(gaps[0], 1)
            self.assertLess(gaps[-1], 1e-3, case.script.__name__)
            self.assertLess(comparison.singular_value_error(), 0.01)
            self.assertEqual(comparison.disagreements(), [])
            for name in ("kl", "kl_1", "kl_2"):
                if name in comparison.errors:
                    self.assertLess(comparison.errors[name], 0.02, name)

    def gaps_of_a_minimisation(self, case):
        """The gaps to the optimal loss from start to end, and the Comparison at the end."""
        model = case.model.train()
        # The scale of z1 leaves the maps free, so that it need not change. A line search along an
        # exponential would end far from the optimum.
        parameters = []
        for name, parameter in model.named_parameters():
            if name != "log_scale_1":
                parameters.append(parameter)
        optimizer = torch.optim.LBFGS(
            parameters,
            max_iter=100,
            history_size=12,
            tolerance_change=0,
            tolerance_grad=1e-9,
            line_search_fn="strong_wolfe",
        )

        def closure():
            optimizer.zero_grad()
            terms = model(*case.data.train, case.scalars)
            loss = model.loss(terms, case.scalars).mean()
            loss.backward()
            return loss

        gaps = []
        for _ in range(200):
            gaps.append(verify.check_model(model, case.f, case.data, {}).gap)
            optimizer.step(closure)
            stands_still = len(gaps) > 1 and gaps[-2] - gaps[-1] < 1e-8
            # The error of singular values falls as the root of the gap. Here it is about 0.2 %.
            if gaps[-1] < 1e-4 or stands_still:
                break
        comparison = verify.check_model(model, case.f, case.data, {})
        gaps.append(comparison.gap)
        return gaps, comparison

    def test_units_are_the_models(self):
        """The KL per unit from second moments is the mean of forward's over the training rows.

        The order of the units may differ.
        """
        for case in self.cases():
            comparison = verify.check_model(case.model, case.f, case.data, {})
            with torch.no_grad():
                terms = case.model.train()(*case.data.train, case.scalars)
            fixed_sigma = "nonlearnable" in case.script.__name__
            for level in common.levels(terms):
                from_rows = terms[f"kl{level}"].mean(0)
                from_moments = torch.tensor(
                    comparison.trained[f"kl{level}"], dtype=torch.float64
                )
                torch.testing.assert_close(
                    from_rows.sum(), from_moments.sum(), rtol=1e-9, atol=1e-9
                )
                if level == "" or (level == "_2" and not fixed_sigma):
                    torch.testing.assert_close(
                        from_rows.sort().values, from_moments.sort().values, rtol=1e-6, atol=1e-6
                    )
            loss = case.model.loss(terms, case.scalars).mean().item()
            self.assertAlmostEqual(comparison.loss, loss, delta=1e-9 * abs(loss))

    @torch.no_grad()
    def test_pictures(self):
        for case in self.cases():
            panels = case.model.reconstructions(*case.data.test, case.scalars)
            self.assertEqual({tuple(images.shape) for images in panels.values()}, {(6, 784)})
            self.assertTrue(torch.equal(panels["test images"], self.images.test[0]))
            if hasattr(case.model, "samples"):
                self.assertEqual(tuple(case.model.samples(7, case.scalars).shape), (7, 784))


class Quarters(unittest.TestCase):
    def test_which_is_which_and_back(self):
        """x is the lower left, y is the upper left, the upper right and the lower right."""
        images = torch.arange(3 * 784.0).view(3, 784)
        x, y = datasets.quarters(images)
        grid = images.view(3, 28, 28)
        self.assertEqual((tuple(x.shape), tuple(y.shape)), ((3, 196), (3, 588)))
        self.assertTrue(torch.equal(x.view(3, 14, 14), grid[:, 14:, :14]))

        parts = (grid[:, :14, :14], grid[:, :14, 14:], grid[:, 14:, 14:])
        for k, part in enumerate(parts):
            part_of_y = y[:, 196 * k:196 * (k + 1)].view(3, 14, 14)
            self.assertTrue(torch.equal(part_of_y, part))
        self.assertTrue(torch.equal(datasets.whole_images(x, y), images))

    def test_one_digit(self):
        with tempfile.TemporaryDirectory() as folder:
            small.write_mnist(folder)
            settings = []
            for digit in (3, 8, 3):
                settings.append(
                    MNIST_CVAE_Linear_single_digit.Flags(
                        data_dir=folder, dataset="mnist", digit=digit, device="cpu"
                    )
                )
            three, eight, again = datasets.load_mnist_quarters(settings)
            [whole] = datasets.load_mnist(settings[:1])
        self.assertIs(three, again)
        for data, digit in ((three, 3), (eight, 8)):
            self.assertTrue((data.train_labels == digit).all())
            self.assertTrue((data.test_labels == digit).all())
            rows = whole.train_labels == digit
            self.assertEqual(len(data.train[0]), int(rows.sum()))
            images = datasets.whole_images(*data.train)
            self.assertTrue(torch.equal(images, whole.train[0][rows]))


class Agreement(unittest.TestCase):
    """The sentences about how a trained model differs from the closed form."""

    def comparison(self, **changes):
        """The Comparison of an optimum with itself, after changes {name: (unit, value)}."""
        theta = torch.tensor([3.0, 2.0, 1.005, 0.5], dtype=torch.float64)
        optimum = theory.vae_optimum(theta, 4, 1.0, 1.0, 1.0)
        trained = {name: optimum[name].clone() for name in VAE_UNITS}
        for name, (unit, value) in changes.items():
            trained[name][unit] = value
        return verify.compare(optimum, trained, optimum["loss"].item() + 0.01)

    def test_agrees(self):
        comparison = self.comparison()
        self.assertEqual(comparison.disagreements(), [])
        # Unit 3 is within 2 % of its threshold, so it does not matter whether it is active.
        self.assertGreater(comparison.predicted["information"][2], 0)
        changed = self.comparison(information=(2, 0.02))
        self.assertEqual(changed.disagreements(), [])

    def test_differs(self):
        # The largest omega is sqrt(theta^2 - 1) = sqrt(8).
        [sentence] = self.comparison(omega=(0, 3.0)).disagreements()
        error = (3 - 8**0.5) / 8**0.5
        self.assertEqual(
            sentence,
            f"the largest error of a singular value is {error:.1%} of the largest predicted one, "
            "and at most 2% is allowed")
        for gap, words in (
            (0.06, "the loss is 0.060 nats above the optimal loss, and at most 0.05 nats"),
            (-1e-3, "the loss is 0.001 nats below the optimal loss, which no model can reach"),
        ):
            [sentence] = dataclasses.replace(self.comparison(), gap=gap).disagreements()
            self.assertIn(words, sentence)
        sampling = {"mean_ratio": 1.01, "standard_error": 0.003, "rounding": 1e-4}
        comparison = dataclasses.replace(self.comparison(), importance_sampling=sampling)
        [sentence] = comparison.disagreements()
        self.assertIn("standard errors", sentence)

    def test_units_that_differ(self):
        """theta is 3, 2, 1.005 and 0.5, so that the units 1, 2 and 3 are predicted to be active.

        Unit 3 is so near its threshold that it does not count.
        """
        [sentence] = self.comparison(information=(1, 0.001)).disagreements()
        self.assertEqual(sentence, "unit 2 of z is collapsed, but predicted to be active")
        comparison = self.comparison()
        comparison.trained["information"][3] = 0.02
        [sentence] = comparison.disagreements()
        self.assertEqual(sentence, "unit 4 of z is active, but predicted to be collapsed")

        theta = torch.tensor([4.0, 3.0, 2.5, 2.0, 0.9, 0.5], dtype=torch.float64)
        optimum = theory.vae_optimum(theta, 6, 1.0, 1.0, 1.0)
        comparison = verify.compare(
            optimum, {name: optimum[name] for name in VAE_UNITS}, optimum["loss"].item())
        comparison.trained["information"] = [0.0, 1.0, 0.0, 0.0, 1.0, 1.0]
        self.assertEqual(comparison.disagreements(), [
            "units 1, 3-4 of z are collapsed, but predicted to be active",
            "units 5-6 of z are active, but predicted to be collapsed",
        ])

    def test_state_of_a_unit(self):
        """A unit is predicted to be active above 0 nats. A trained one is active above 0.01."""
        self.assertEqual(verify.state_of_unit(0.5, 0.4), "active")
        self.assertEqual(verify.state_of_unit(0.0, 0.01), "collapsed")
        self.assertEqual(verify.state_of_unit(0.5, 0.01), "active -> collapsed")
        self.assertEqual(verify.state_of_unit(0.0, 0.011), "collapsed -> active")
        self.assertEqual(verify.state_of_unit(0.005, 0.0), "active")
        self.assertEqual(verify.state_of_unit(0.005, 0.5), "active")

    def test_tables(self):
        """With beta = eta_enc = eta_dec = 1 and theta = 2, 1/2, by theorem 1:

        lambda^2 = 1 - 1/theta^2 = 3/4, omega^2 = theta^2 - 1 = 3, sigma = 1/theta = 1/2,
        KL = log theta = 0.6931. Unit 1 collapses at beta = 4, and unit 2 at beta = 1/4.
        """
        theta = torch.tensor([2.0, 0.5], dtype=torch.float64)
        optimum = theory.vae_optimum(theta, 2, 1.0, 1.0, 1.0)
        trained = {
            "lambda": torch.tensor([0.86, 0.0]),
            "omega": torch.tensor([1.72, 0.0]),
            "sigma": torch.tensor([0.51, 0.9]),
            "kl": torch.tensor([0.69, 0.02]),
            "information": torch.tensor([0.6, 0.02]),
        }
        trained = {name: values.double() for name, values in trained.items()}
        comparison = verify.compare(optimum, trained, optimum["loss"].item() + 0.25)
        comparison.optimal_loss, comparison.loss = 3.0, 3.25

        head, first, second = verify.unit_rows(comparison, "")
        names = ["unit", "theta", "lambda", "omega", "sigma", "kl", "collapses at", "state"]
        self.assertEqual(head, names)
        self.assertEqual(first, [
            "1", "2.0000", "0.8660 -> 0.8600", "1.7321 -> 1.7200", "0.5000 -> 0.5100",
            "0.6931 -> 0.6900", "4", "active",
        ])
        self.assertEqual(second, [
            "2", "0.5000", "0.0000 -> 0.0000", "0.0000 -> 0.0000", "1.0000 -> 0.9000",
            "0.0000 -> 0.0200", "0.25", "collapsed -> active",
        ])

        # The error of omega is 1.7321 - 1.72 = 0.0121, which is 0.70 % of 1.7321.
        self.assertEqual(report.theory_row(comparison), {
            "active units": "1 -> 2",
            "optimal loss": "3.0000 -> 3.2500",
            "gap": "0.2500",
            "error of singular values": "0.70%",
        })

    def test_ratio_of_sampled_to_exact(self):
        data = small.digit_data(60, 40)
        f = MNIST_VAE_Linear_nonlearnable_sigma.Flags(d_1=2, num_samples=50, device="cpu")
        model = training.build(MNIST_VAE_Linear_nonlearnable_sigma.VAE, f, data).eval()
        metrics, examples = report.evaluate(model, f, data)
        ratio = np.exp(examples["log_px"] - examples["exact_log_px"])

        sampling = verify.check_model(model, f, data, examples).importance_sampling
        self.assertAlmostEqual(sampling["mean_ratio"], ratio.mean(), delta=1e-12)
        self.assertAlmostEqual(sampling["standard_error"], ratio.std() / math.sqrt(40), delta=1e-12)
        # The model computes in float64.
        self.assertLess(sampling["rounding"], 1e-9)
        exact = examples["exact_log_px"].mean()
        self.assertAlmostEqual(metrics["exact_log_px"], exact, delta=1e-9)

    def test_order_of_units_does_not_matter(self):
        theta = torch.tensor([3.0, 2.0, 1.5], dtype=torch.float64)
        optimum = theory.vae_optimum(theta, 3, 1.0, 1.0, 1.0)
        trained = {name: optimum[name].flip(0) for name in VAE_UNITS}
        comparison = verify.compare(optimum, trained, 0.0)
        self.assertEqual(set(comparison.errors.values()), {0.0})
        self.assertEqual(comparison.trained["sigma"], optimum["sigma"].tolist())


def table_per_setting(out):
    """The lines below the head of the table that compares each setting with its closed form."""
    _, below = out.split("relative to the largest predicted singular value.\n")
    return below.split("\n")[1:]


class CommandLines(small.InFolder):
    def setUp(self):
        super().setUp()
        small.write_mnist(self.folder / "data")

    def run_script(self, script, *argv):
        """Run a script for two epochs. Returns its output, without pictures of single runs."""
        with mock.patch("pictures.draw_run"):
            status, out, err = small.call(
                script.main,
                *("--data_dir", self.folder / "data"),
                *("--out_dir", self.folder / "runs"),
                *("--num_epochs", 2),
                *("--num_samples", 20),
                *("--device", "cpu"),
                *argv,
            )
        self.assertEqual(status, 0, err)
        return out

    def grid_pictures(self, script):
        """The names of the pictures of a script's grids."""
        folder = self.folder / "runs" / script.__name__ / "grids"
        return {path.name for path in folder.rglob("*.png")}

    def results(self, script, out_dir="runs"):
        """{name of the run: the contents of its result.json}."""
        results = {}
        for path in (self.folder / out_dir / script.__name__).glob("*/result.json"):
            results[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))
        return results

    def test_over_one_flag(self):
        out = self.run_script(MNIST_CVAE_Linear, "--beta", "0.5:2:0.5", "--dim_z", 4)
        pictures = self.grid_pictures(MNIST_CVAE_Linear)
        self.assertEqual(pictures, {"collapse.png", "theory.png"})

        rows = table_per_setting(out)[:4]
        self.assertEqual([row.split()[0] for row in rows], ["0.5", "1.0", "1.5", "2.0"])
        gaps = {}
        for result in self.results(MNIST_CVAE_Linear).values():
            gaps[result["settings"]["beta"]] = result["theory"]["gap"]
        for row in rows:
            self.assertIn(f"{gaps[float(row.split()[0])]:.4f}", row)

        # Two epochs on 256 images do not reach the optimum.
        self.assertIn("DIFFERS beta=0.5: ", out)
        self.assertNotIn("reached the predicted optimum", out)

    def test_errors_that_do_not_count(self):
        """Each setting of a grid has its own sentences. A single setting has them once."""
        sentence = "unit 1 of z is near the threshold"
        with mock.patch.object(
            verify.Comparison, "flat_units_in_words", lambda comparison: [sentence]
        ):
            out = self.run_script(MNIST_CVAE_Linear, "--beta", "0.5,2", "--dim_z", 2)
            alone = self.run_script(MNIST_CVAE_Linear, "--beta", "0.5", "--dim_z", 2)
        for beta in ("0.5", "2.0"):
            self.assertEqual(out.count(f"\nbeta={beta}: {sentence}\n"), 1)
        self.assertEqual(alone.count(sentence), 1)

    def test_without_draws_in_one_setting(self):
        """That setting has no importance sampling. The estimate of the other one stays."""
        out = self.run_script(MNIST_CVAE_Linear, "--num_samples", "0,20", "--dim_z", 2)
        rows = table_per_setting(out)[:2]
        self.assertEqual([row.endswith("-") for row in rows], [True, False])
        self.assertRegex(rows[1], r" \d\.\d{6} ± \S+$")

    def test_map_over_two_flags(self):
        script = MNIST_HVAE_Linear_learnable_sigma_2
        grid = ("--beta_1", "0.5,2", "--beta_2", "0.5,2")
        self.run_script(script, *grid, "--d_1", 2, "--d_2", 2)
        self.assertIn("theory.png", self.grid_pictures(script))

    def test_over_digits(self):
        script = MNIST_CVAE_Linear_single_digit
        out = self.run_script(script, "--digit", "0:2", "--dim_z", 3)

        # The images are those that small.write_mnist draws.
        counts = []
        for n, seed in ((256, 5), (64, 6)):
            _, labels = datasets.draw_digits(n, seed)
            by_digit = [int((labels == digit).sum()) for digit in range(3)]
            counts.append(f"{min(by_digit)} to {max(by_digit)}")
        self.assertIn(f": {counts[0]} training and {counts[1]} test examples", out)
        expected = {"collapse.png", "theory.png", "linear.png"}
        self.assertEqual(self.grid_pictures(script), expected)

    def test_units_beside_each_other(self):
        out = self.run_script(MNIST_HVAE_Linear_nonlearnable_sigma_2, "--d_1", 3, "--d_2", 2)
        tables = out.split("unit")[1:]
        self.assertIn("lambda_1", tables[0])
        self.assertIn("lambda_2", tables[1])
        self.assertEqual(len(tables[0].strip().split("\n")), 4)

    def test_counterparts_on_one_picture(self):
        runs = self.folder / "runs"
        picture = "num_epochs=2,num_samples=20/collapse_beside.png"
        beside = runs / "MNIST_VAE_Linear_nonlearnable_sigma" / picture
        self.run_script(MNIST_VAE_Linear_nonlearnable_sigma)
        self.assertFalse(beside.exists())
        self.run_script(MNIST_VAE_Linear_learnable_sigma)
        self.run_script(MNIST_VAE_Linear_nonlearnable_sigma)
        self.assertTrue(beside.exists())
        self.assertTrue((runs / "MNIST_VAE_Linear_learnable_sigma" / picture).exists())

    def test_vector_of_sigmas(self):
        """The published run's flags, and a number beside a vector in one grid.

        Each row of the grid is as if it were alone.
        """
        script = MNIST_VAE_Linear_nonlearnable_sigma
        self.run_script(script, "--eta_dec", 10, "--c", 2, "--sigma", "8/4/2/1/0.5,2")
        for sigma in ("8/4/2/1/0.5", "2"):
            out_dir = ("--out_dir", self.folder / "alone")
            self.run_script(script, "--eta_dec", 10, "--c", 2, "--sigma", sigma, *out_dir)
        together = self.results(script)
        alone = self.results(script, "alone")
        self.assertEqual(set(together), set(alone))
        self.assertEqual(len(alone), 2)
        for name in alone:
            elbo = alone[name]["metrics"]["elbo"]
            self.assertAlmostEqual(together[name]["metrics"]["elbo"], elbo, delta=1e-2)
            predicted = alone[name]["theory"]["predicted"]
            self.assertEqual(together[name]["theory"]["predicted"], predicted)

    def test_wrong_number_of_sigmas(self):
        for script in (MNIST_VAE_Linear_learnable_sigma, MNIST_VAE_Linear_nonlearnable_sigma):
            status, out, err = small.call(script.main, "--sigma", "1/2", "--out_dir", self.folder)
            self.assertEqual((status, out), (2, ""))
            self.assertIn("--sigma: got '1.0/2.0', wants one number or --d_1 = 5 of them", err)


if __name__ == "__main__":
    unittest.main()
