"""theory.py: the closed forms against minimisation by brute force, the losses of single units
against the exact losses of whole models, and spectra of awkward data.
"""
import math
import unittest

import torch
from torch.distributions import Normal

import matrix_CVAE
import matrix_HVAE_learnable_sigma_1_2
import matrix_HVAE_learnable_sigma_2
import matrix_HVAE_nonlearnable_sigma_2
import matrix_VAE
import theory
import verify


def draw(random, *shape):
    """Random float64 numbers with std 0.5."""
    return 0.5 * torch.randn(shape, dtype=torch.float64, generator=random)


class ExactLosses(unittest.TestCase):
    """The exact losses of the matrix scripts are the means of sampled losses.

    The samples come from torch.distributions, which shares no code with the scripts.
    """

    ROWS = 50
    DRAWS = 4000

    def setUp(self):
        self.random = torch.Generator().manual_seed(0)
        torch.manual_seed(0)

    def parameters(self, problem):
        return problem.start(lambda *shape: draw(self.random, *shape))

    def data(self, width):
        return draw(self.random, self.ROWS, width) * 3

    def assert_mean(self, samples, expected):
        """Check the mean of samples (draws, rows): precise, and within four standard errors."""
        means = samples.mean(1)
        standard_error = means.std() / len(means)**0.5
        self.assertLess(standard_error.item(), 0.02 * abs(expected))
        self.assertLess(abs(means.mean().item() - expected), 4 * standard_error.item())

    def test_vae(self):
        fixed_sigma = torch.tensor([0.5, 0.8, 1.1], dtype=torch.float64)
        for learnable in (True, False):
            f = matrix_VAE.Flags(
                beta=0.7,
                eta_enc=1.3,
                eta_dec=0.6,
                sigma="0.5/0.8/1.1",
                d_0=4,
                d_1=3,
                learnable_sigma=learnable,
            )
            vae = matrix_VAE.VAE(f)
            x = self.data(4)
            vae.A = theory.second_moment(x)
            p = self.parameters(vae)

            sigma = p["log_sigma"].exp() if learnable else fixed_sigma
            q = Normal(x @ p["W"].T, sigma)
            z = q.sample((self.DRAWS,))
            log_px = Normal(z @ p["U"].T, 0.6).log_prob(x).sum(-1)
            kl = (q.log_prob(z) - Normal(0, 1.3).log_prob(z)).sum(-1)
            self.assert_mean(-log_px + 0.7 * kl, vae.loss(p).item())

    def test_cvae(self):
        f = matrix_CVAE.Flags(beta=0.7, eta_enc=1.3, eta_dec=0.6, dim_x=2, dim_y=4, dim_z=3)
        cvae = matrix_CVAE.CVAE(f)
        x = self.data(2)
        y = self.data(4)
        cvae.moment = theory.second_moment(x, y)
        p = self.parameters(cvae)

        q = Normal(x @ p["W1"].T + y @ p["W2"].T, p["log_sigma"].exp())
        z = q.sample((self.DRAWS,))
        log_py = Normal(z @ p["U1"].T + x @ p["U2"].T, 0.6).log_prob(y).sum(-1)
        kl = (q.log_prob(z) - Normal(0, 1.3).log_prob(z)).sum(-1)
        self.assert_mean(-log_py + 0.7 * kl, cvae.loss(p).item())

    def test_hvae(self):
        shared = dict(beta_1=0.7, beta_2=1.6, eta_enc=1.3, eta_dec=0.6, d_0=4, d_1=3)
        scripts = (
            (matrix_HVAE_learnable_sigma_2, dict(sigma_1=0.8, d_2=2)),
            (matrix_HVAE_nonlearnable_sigma_2, dict(sigma_1=0.8, sigma_2=0.9, d_2=2)),
            (matrix_HVAE_learnable_sigma_1_2, {}),
        )
        for script, own in scripts:
            hvae = script.HVAE(script.Flags(**shared, **own))
            x = self.data(4)
            hvae.A = theory.second_moment(x)
            p = self.parameters(hvae)

            sigma_1 = p["log_sigma_1"].exp() if "log_sigma_1" in p else 0.8
            sigma_2 = p["log_sigma_2"].exp() if "log_sigma_2" in p else 0.9
            q_1 = Normal(x @ p["W1"].T, sigma_1)
            z_1 = q_1.sample((self.DRAWS,))
            q_2 = Normal(z_1 @ p["W2"].T, sigma_2)
            z_2 = q_2.sample()
            log_px = Normal(z_1 @ p["U1"].T, 0.6).log_prob(x).sum(-1)
            p_1 = Normal(z_2 @ p["U2"].T, 0.6)
            kl_1 = (q_1.log_prob(z_1) - p_1.log_prob(z_1)).sum(-1)
            kl_2 = (q_2.log_prob(z_2) - Normal(0, 1.3).log_prob(z_2)).sum(-1)
            with self.subTest(script=script.__name__):
                self.assert_mean(-log_px + 0.7 * kl_1 + 1.6 * kl_2, hvae.loss(p).item())


class BruteForce(unittest.TestCase):
    """Each closed form against the exact loss minimised from random starts."""

    def check(self, Problem, f, starts=2):
        """Minimise the loss of a setting and compare the result with the closed form, returned."""
        problem = Problem(f)
        random = torch.Generator().manual_seed(5)
        random_starts = []
        for _ in range(starts):
            random_starts.append(problem.start(lambda *shape: draw(random, *shape)))
        parameters, loss = verify.minimise(problem.loss, random_starts)[0]

        predicted = problem.predicted()
        comparison = verify.compare(predicted, problem.units(parameters), loss)
        self.assertGreaterEqual(len(comparison.errors), 5)
        for name, error in comparison.errors.items():
            self.assertLess(error, 1e-6, (name, f))
        self.assertLess(abs(comparison.gap), 1e-9, f)
        return predicted

    def test_vae(self):
        active_counts = set()
        for seed, beta, eta_enc, eta_dec, d_1 in (
            (0, 0.6, 1.3, 0.8, 4),
            (1, 2.0, 0.5, 1.1, 3),
            (2, 1.0, 1.0, 1.0, 7),
        ):
            f = matrix_VAE.Flags(
                seed=seed, beta=beta, eta_enc=eta_enc, eta_dec=eta_dec, d_0=5, d_1=d_1
            )
            predicted = self.check(matrix_VAE.VAE, f)
            active_counts.add((predicted["kl"] > 0).sum().item())
        self.assertGreater(len(active_counts), 1)

    def test_vae_with_fixed_sigma(self):
        for seed, sigma, d_1 in (
            (0, "2/0.5/1/0.3", 4),
            (1, 0.8, 3),
            (2, "0.5/0.5/1.5", 3),
            (3, "0.4/3/0.2/1/1/0.7", 6),
        ):
            f = matrix_VAE.Flags(
                seed=seed,
                beta=1.4,
                eta_enc=1.2,
                eta_dec=0.8,
                d_0=5,
                d_1=d_1,
                sigma=sigma,
                learnable_sigma=False,
            )
            predicted = self.check(matrix_VAE.VAE, f)
            # A dead mean is no collapse: its KL is above 0.
            dead = predicted["lambda"] == 0
            self.assertTrue((predicted["kl"][dead] > 0).all())

    def test_cvae(self):
        for seed, beta, eta_enc, eta_dec, dim_z in (
            (0, 0.6, 1.3, 0.8, 4),
            (1, 2.0, 0.5, 1.1, 2),
            (2, 0.5, 2.0, 0.6, 6),
        ):
            f = matrix_CVAE.Flags(
                seed=seed,
                beta=beta,
                eta_enc=eta_enc,
                eta_dec=eta_dec,
                dim_x=3,
                dim_y=4,
                dim_z=dim_z,
            )
            self.check(matrix_CVAE.CVAE, f)

    def test_hvae(self):
        """The settings include both signs of sigma_1^2 - b, beta_1 below 1, and d_1 unlike d_2."""
        sigma_1_is_small = set()
        for seed, sigma_1, beta_1, beta_2, eta_enc, eta_dec, d_1, d_2 in (
            (0, 1.5, 1.0, 1.0, 1.0, 0.8, 4, 4),
            (1, 0.6, 0.5, 2.0, 1.4, 0.9, 4, 4),
            (2, 0.9, 2.0, 0.7, 0.6, 1.2, 3, 5),
            (3, 0.7, 0.6, 0.9, 1.2, 0.7, 5, 2),
        ):
            f = matrix_HVAE_learnable_sigma_2.Flags(
                seed=seed,
                sigma_1=sigma_1,
                beta_1=beta_1,
                beta_2=beta_2,
                eta_enc=eta_enc,
                eta_dec=eta_dec,
                d_0=5,
                d_1=d_1,
                d_2=d_2,
            )
            self.check(matrix_HVAE_learnable_sigma_2.HVAE, f)
            sigma_1_is_small.add(sigma_1**2 < beta_2 / beta_1 * eta_dec**2)
        self.assertEqual(sigma_1_is_small, {True, False})

    def test_hvae_with_fixed_sigma_2(self):
        sigma_1_is_small = set()
        for seed, sigma_1, sigma_2, beta_1, beta_2, eta_enc, eta_dec, d_1, d_2 in (
            (0, 1.5, 0.7, 1.0, 1.0, 1.0, 0.8, 4, 4),
            (1, 0.6, 1.2, 0.5, 2.0, 1.4, 0.9, 4, 4),
            (2, 0.9, 0.5, 0.3, 0.7, 0.6, 1.2, 3, 5),
            (3, 0.7, 1.6, 0.6, 0.9, 1.2, 0.7, 5, 2),
        ):
            f = matrix_HVAE_nonlearnable_sigma_2.Flags(
                seed=seed,
                sigma_1=sigma_1,
                sigma_2=sigma_2,
                beta_1=beta_1,
                beta_2=beta_2,
                eta_enc=eta_enc,
                eta_dec=eta_dec,
                d_0=5,
                d_1=d_1,
                d_2=d_2,
            )
            self.check(matrix_HVAE_nonlearnable_sigma_2.HVAE, f)
            m_0 = beta_2 / beta_1 * (eta_dec / eta_enc * sigma_2)**2
            sigma_1_is_small.add(sigma_1**2 < m_0)
        self.assertEqual(sigma_1_is_small, {True, False})

    def test_hvae_with_both_sigmas_learnable(self):
        for seed in (0, 1):
            f = matrix_HVAE_learnable_sigma_1_2.Flags(
                seed=seed, beta_1=0.8, beta_2=1.1, eta_enc=1.4, eta_dec=0.7, d_0=4, d_1=3
            )
            predicted = self.check(matrix_HVAE_learnable_sigma_1_2.HVAE, f)
            self.assertTrue((predicted["kl_2"] == 0).all())
            self.assertTrue((predicted["kl_1"] > 0).any())


def diagonal(values, rows, columns):
    """A matrix with these values on its diagonal, as many as fit, and zeros elsewhere."""
    matrix = torch.zeros(rows, columns, dtype=torch.float64)
    count = min(len(values), rows, columns)
    matrix[range(count), range(count)] = values[:count]
    return matrix


def aligned(problem, units):
    """Parameters of a matrix script's problem whose singular vectors are those of the optimum.

    units: {name: (d,)}, the quantities that theory.Optimum.coordinates names, and sigma
    """
    if isinstance(problem, matrix_CVAE.CVAE):
        return aligned_cvae(problem, units)
    whitening = theory.whitening(problem.A)
    directions = theory.modes(problem.A)[1]
    if isinstance(problem, matrix_VAE.VAE):
        d_0, d_1 = problem.f.d_0, problem.f.d_1
        return {
            "W": diagonal(units["lambda"], d_1, d_0) @ whitening.T,
            "U": directions @ diagonal(units["omega"], d_0, d_1),
            "log_sigma": units["sigma"].log(),
        }

    # The HVAE. U1 is the best decoder of the means lambda_1i with noise of the std sigma_1.
    d_0, d_1, d_2 = problem.f.d_0, problem.f.d_1, problem.f.d_2
    m = units["lambda_1"]**2 + problem.f.sigma_1**2
    theta = problem.predicted()["theta"]
    return {
        "W1": diagonal(units["lambda_1"], d_1, d_0) @ whitening.T,
        "U1": directions @ diagonal(theta * units["lambda_1"] / m, d_0, d_1),
        "W2": diagonal(units["lambda_2"][:d_1] / m.sqrt()[:d_2], d_2, d_1),
        "U2": diagonal(units["omega_2"], d_1, d_2),
        "log_sigma_2": units["sigma_2"].log(),
    }


def aligned_cvae(problem, units):
    """`aligned` for a CVAE: z describes what is left of y after its linear prediction from x."""
    dim_x, dim_y, dim_z = problem.f.dim_x, problem.f.dim_y, problem.f.dim_z
    E = theory.moment_given_x(problem.moment, dim_x)
    predict_y = problem.moment[dim_x:, :dim_x] @ torch.linalg.pinv(problem.moment[:dim_x, :dim_x])
    W2 = diagonal(units["lambda"], dim_z, dim_y) @ theory.whitening(E).T
    return {
        "W1": -W2 @ predict_y,
        "W2": W2,
        "U1": theory.modes(E)[1] @ diagonal(units["omega"], dim_y, dim_z),
        "U2": predict_y,
        "log_sigma": units["sigma"].log(),
    }


def problems():
    """Problems of the matrix scripts that have thresholds, with active and collapsed units.

    The stds of an encoder that differ by unit are in ascending order, as in the closed form.
    """
    shared = dict(beta_1=0.7, eta_enc=1.3, eta_dec=0.6, sigma_1=0.8)
    learnable = matrix_HVAE_learnable_sigma_2
    fixed = matrix_HVAE_nonlearnable_sigma_2
    vae = dict(beta=1.7, eta_enc=1.3, eta_dec=0.6)
    return [
        matrix_VAE.VAE(matrix_VAE.Flags(**vae, d_0=5, d_1=4)),
        matrix_VAE.VAE(matrix_VAE.Flags(**vae, d_0=4, d_1=4, learnable_sigma=False, sigma=0.8)),
        matrix_VAE.VAE(
            matrix_VAE.Flags(**vae, d_0=4, d_1=3, learnable_sigma=False, sigma="0.4/0.9/2")
        ),
        matrix_CVAE.CVAE(matrix_CVAE.Flags(**vae, dim_x=2, dim_y=4, dim_z=3)),
        learnable.HVAE(learnable.Flags(**shared, beta_2=2.2, d_0=5, d_1=4, d_2=4)),
        learnable.HVAE(learnable.Flags(**shared, beta_2=0.9, d_0=5, d_1=4, d_2=2)),
        learnable.HVAE(learnable.Flags(**shared, beta_2=0.9, d_0=5, d_1=3, d_2=5)),
        fixed.HVAE(fixed.Flags(**shared, beta_2=2.2, sigma_2=0.9, d_0=5, d_1=4, d_2=4)),
        fixed.HVAE(fixed.Flags(**shared, beta_2=0.9, sigma_2=0.9, d_0=5, d_1=4, d_2=2)),
    ]


def loss_of_units(optimum, units):
    """The loss of each unit, (d,), where quantities of z2 may have another length than those of z1.

    units: {name: (d,)}, the quantities that optimum.coordinates names, and perhaps others
    """
    d = len(optimum["theta"])
    padded = {}
    for name in optimum.coordinates:
        missing = max(0, d - len(units[name]))
        padded[name] = torch.nn.functional.pad(units[name][:d], (0, missing), value=1.0)
    return optimum.unit_loss(padded)


class UnitLosses(unittest.TestCase):
    """The loss of one unit against the exact loss of the whole model, and at the optimum."""

    def random_units(self, optimum, random):
        """The optimum with random values for the quantities on which the losses depend."""
        units = {"sigma_2": torch.ones(5, dtype=torch.float64)} | optimum
        for name in optimum.coordinates:
            values = (optimum[name] + 0.3) * draw(random, len(optimum[name])).exp()
            # Units of z2 beyond those of z1 have no mode, and keep their values.
            has_mode = torch.arange(len(values)) < len(optimum["theta"])
            units[name] = torch.where(has_mode, values, optimum[name])
        return units

    def constant(self, problem):
        """What the loss has beside the units: squared error of other modes, and log(2 pi) terms."""
        f = problem.f
        if isinstance(problem, matrix_CVAE.CVAE):
            variances = theory.spectrum(theory.moment_given_x(problem.moment, f.dim_x))
        else:
            variances = theory.spectrum(problem.A)
        others = variances[len(problem.predicted()["theta"]):]
        squared_error = others.sum().item() / (2 * f.eta_dec**2)
        return squared_error + len(variances) / 2 * math.log(2 * math.pi * f.eta_dec**2)

    def test_sum_over_the_units(self):
        """With the singular vectors of the optimum, the loss is a sum over the units."""
        random = torch.Generator().manual_seed(0)
        for problem in problems():
            optimum = problem.predicted()
            with self.subTest(type(problem).__module__, f=problem.f):
                for _ in range(3):
                    units = self.random_units(optimum, random)
                    exact = problem.loss(aligned(problem, units)).item()
                    of_units = loss_of_units(optimum, units).sum().item()
                    self.assertAlmostEqual(exact, of_units + self.constant(problem), places=9)

    def test_the_optimum_is_a_minimum(self):
        """There the gradient is 0, and no direction curves down."""
        for problem in problems():
            optimum = problem.predicted()
            names = optimum.coordinates
            units = [optimum[name] for name in names]

            def loss(*values):
                return loss_of_units(optimum, dict(zip(names, values))).sum()

            arguments = tuple(range(len(names)))
            gradient_of = torch.func.grad(loss, arguments)
            gradients = gradient_of(*units)
            blocks = torch.func.jacrev(gradient_of, arguments)(*units)
            hessian = torch.cat([torch.cat(row, dim=1) for row in blocks])
            with self.subTest(type(problem).__module__, f=problem.f):
                self.assertLess(torch.cat(gradients).abs().max().item(), 1e-12)
                curvatures = torch.linalg.eigvalsh(hessian)
                self.assertGreater(curvatures.min().item(), -1e-12)
                # Units without a mode of their own have no loss. No other unit is flat.
                without_mode = sum(max(0, len(values) - len(optimum["theta"])) for values in units)
                self.assertEqual((curvatures < 1e-3).sum().item(), without_mode)

    def test_many_settings_at_once(self):
        beta = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
        together = theory.vae_optimum(THETA, 4, beta, 0.7, 0.9)
        losses = loss_of_units_of_settings(together)
        self.assertEqual(losses.shape, (3, 4))
        for k in range(3):
            alone = theory.vae_optimum(THETA, 4, beta[k].item(), 0.7, 0.9)
            torch.testing.assert_close(losses[k], loss_of_units(alone, alone))

    def test_a_learned_eta_dec_has_none(self):
        optimum = theory.vae_optimum_learned_eta_dec(THETA, 3, 1.0, 1.0)
        self.assertIsNone(optimum.unit_loss)


def loss_of_units_of_settings(optimum):
    """The loss of each unit at an optimum of many settings, (settings, d)."""
    return optimum.unit_loss({name: optimum[name] for name in optimum.coordinates})


class LearnedVAE(matrix_VAE.VAE):
    """The linear VAE whose eta_dec is learned, too. The data have the given modes."""

    def __init__(self, f, theta):
        super().__init__(f)
        random = torch.Generator().manual_seed(f.seed)
        rotation = torch.linalg.qr(draw(random, f.d_0, f.d_0)).Q
        self.A = rotation * theta**2 @ rotation.T
        self.theta = theta

    def start(self, draw):
        return {**super().start(draw), "log_eta_dec": draw()}

    def loss(self, p):
        """The exact loss of `matrix_VAE.VAE`, with all terms of eta_dec as a function of it."""
        f = self.f
        eta_dec = p["log_eta_dec"].exp()
        sigma = self.sigma(p)
        error_map = torch.eye(f.d_0, dtype=torch.float64) - p["U"] @ p["W"]
        squared_error = (error_map @ self.A * error_map).sum() + (p["U"]**2 @ sigma**2).sum()
        reconstruction = squared_error / (2 * eta_dec**2)
        reconstruction = reconstruction + f.d_0 / 2 * (2 * math.pi * eta_dec**2).log()
        z_squared = (p["W"] @ self.A * p["W"]).sum(1) + sigma**2
        kl = (z_squared / f.eta_enc**2 - 1) / 2 - (sigma / f.eta_enc).log()
        return reconstruction + f.beta * kl.sum()

    def predicted(self):
        f = self.f
        return theory.vae_optimum_learned_eta_dec(self.theta, f.d_1, f.beta, f.eta_enc)


class LearnedEtaDec(unittest.TestCase):
    """The VAE whose eta_dec is learned."""

    # The beta of each problem with 7 columns and 4 units. With beta = 2, D <= 4 beta.
    BETAS = (0.4, 0.7, 1.0, 1.3, 1.6, 2.0)

    def random_theta(self, random, dim=7):
        return torch.randn(dim, dtype=torch.float64, generator=random).exp().sort().values.flip(0)

    def test_brute_force(self):
        """L-BFGS over all parameters ends nowhere below the closed form, and reaches it."""
        random = torch.Generator().manual_seed(3)
        active_counts = set()
        for seed, beta in enumerate(self.BETAS):
            f = matrix_VAE.Flags(seed=seed, beta=beta, eta_enc=1.3, d_0=7, d_1=4)
            problem = LearnedVAE(f, self.random_theta(random))
            starts = []
            for _ in range(2):
                starts.append(problem.start(lambda *shape: draw(random, *shape)))
            minima = verify.minimise(problem.loss, starts)

            predicted = problem.predicted()
            for _, loss in minima:
                self.assertGreater(loss, predicted["loss"].item() - 1e-9)
            parameters, loss = minima[0]
            self.assertAlmostEqual(loss, predicted["loss"].item(), places=8)
            eta_dec = parameters["log_eta_dec"].exp().item()
            self.assertAlmostEqual(eta_dec, predicted.pop("eta_dec").item(), places=6)
            comparison = verify.compare(predicted, problem.units(parameters), loss)
            for name, error in comparison.errors.items():
                self.assertLess(error, 1e-6, (name, f))
            active_counts.add((predicted["kl"] > 0).sum().item())
        self.assertGreater(len(active_counts), 2)

    def test_no_other_eta_dec_is_better(self):
        """For each eta_dec, theorem 1 has the least loss. Over eta_dec it has one minimum."""
        random = torch.Generator().manual_seed(4)
        eta_dec = torch.logspace(-3, 2, 4001, dtype=torch.float64)
        for case in range(60):
            theta = self.random_theta(random)**(1 + case % 3)
            d_1 = 1 + case % 6
            beta = 0.1 + 4 * torch.rand((), dtype=torch.float64, generator=random)
            losses = theory.vae_optimum(theta, d_1, beta, 1.0, eta_dec)["loss"]
            optimum = theory.vae_optimum_learned_eta_dec(theta, d_1, beta, 1.0)

            least = losses.argmin()
            self.assertTrue((losses[:least + 1].diff() < 0).all())
            self.assertTrue((losses[least:].diff() > 0).all())
            self.assertLess(optimum["loss"], losses[least])
            self.assertLess(losses[least] - optimum["loss"], 1e-3)
            self.assertLess((optimum["eta_dec"] / eta_dec[least]).log().abs(), 0.003)
            fixed = theory.vae_optimum(theta, d_1, beta, 1.0, optimum["eta_dec"])
            self.assertAlmostEqual(optimum["loss"].item(), fixed["loss"].item(), places=5)

    def test_probabilistic_pca(self):
        """At beta = 1 the loss is the negative log-likelihood of probabilistic PCA."""
        random = torch.Generator().manual_seed(5)
        theta = self.random_theta(random)
        optimum = theory.vae_optimum_learned_eta_dec(theta, 3, 1.0, 1.0)
        variance = (theta[3:]**2).mean()
        self.assertAlmostEqual(optimum["eta_dec"].item()**2, variance.item(), places=12)
        # The covariance of x in the model, in the basis of the modes.
        model = torch.cat([theta[:3]**2, variance.expand(4)])
        likelihood = Normal(0, model.sqrt()).log_prob(torch.zeros(7, dtype=torch.float64)).sum()
        likelihood = likelihood - (theta**2 / model).sum() / 2
        self.assertAlmostEqual(optimum["loss"].item(), -likelihood.item(), places=10)

    def test_data_that_the_units_describe_completely(self):
        """The loss has no lower bound where beta < D / rank, and has one elsewhere."""
        theta = torch.tensor([3.0, 2.0, 1.0, 0, 0, 0], dtype=torch.float64)
        eta_dec = torch.logspace(-1, -3, 5, dtype=torch.float64)
        for d_1, beta, bounded in (
            (3, 1.9, False), (5, 1.9, False), (3, 2.0, True), (5, 2.1, True), (2, 1.9, True),
            (9, 0.3, False),
        ):
            optimum = theory.vae_optimum_learned_eta_dec(theta, d_1, beta, 1.0)
            losses = theory.vae_optimum(theta, d_1, beta, 1.0, eta_dec)["loss"]
            with self.subTest(d_1=d_1, beta=beta):
                self.assertEqual(optimum["eta_dec"] > 0, bounded)
                self.assertEqual(optimum["loss"] > -math.inf, bounded)
                # The loss falls with each smaller eta_dec, or not at all.
                self.assertEqual((losses.diff() < -0.1).all(), not bounded)
                if bounded:
                    self.assertLess(optimum["loss"], losses.min() + 1e-7)

        zeros = torch.zeros(4, dtype=torch.float64)
        optimum = theory.vae_optimum_learned_eta_dec(zeros, 2, 1.0, 1.0)
        self.assertEqual(optimum["loss"], -math.inf)
        self.assertEqual(optimum["collapse"].tolist(), [0, 0])


THETA = torch.tensor([3.0, 2.0, 1.2, 0.6, 0.1], dtype=torch.float64)


class ManySettings(unittest.TestCase):
    def test_many_settings_at_once(self):
        """A closed form of three settings at once is that of each alone."""
        beta_1 = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
        beta_2 = torch.tensor([2.0, 0.4, 1.0], dtype=torch.float64)
        sigma_1 = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
        sigmas = torch.tensor([2.0, 0.5, 1.0])

        def vae(a, b, c):
            return theory.vae_optimum(THETA, 4, a, b, c)

        def cvae(a, b, c):
            return theory.cvae_optimum(THETA, 7, a, b, c)

        def vae_fixed(a, b, c):
            return theory.vae_optimum_fixed_sigma(THETA, sigmas, a, b, c)

        def vae_learned(a, b, c):
            return theory.vae_optimum_learned_eta_dec(THETA, 4, a, b)

        def hvae(a, b, c):
            return theory.hvae_optimum(THETA, 4, 3, c, a, b, 0.7, 0.9)

        def hvae_fixed(a, b, c):
            return theory.hvae_optimum_fixed_sigma_2(THETA, 4, 6, c, 0.8, a, b, 0.7, c)

        for form in (vae, cvae, vae_fixed, vae_learned, hvae, hvae_fixed):
            together = form(beta_1, beta_2, sigma_1)
            self.assertEqual(together["loss"].shape, (3,))
            for k in range(3):
                alone = form(beta_1[k].item(), beta_2[k].item(), sigma_1[k].item())
                for name, values in alone.items():
                    row = together[name].expand(3, *values.shape)[k]
                    torch.testing.assert_close(
                        row, values, rtol=0, atol=1e-14, msg=f"{form.__name__} {name}"
                    )

    def forms_over_beta(self):
        """A list of (level, form), where form(beta) is a closed form at this beta or beta_2."""
        sigmas = torch.tensor([2.0, 0.5, 1.0, 0.2])
        forms = [
            ("", lambda beta: theory.vae_optimum(THETA, 6, beta, 0.7, 0.9)),
            ("", lambda beta: theory.vae_optimum_learned_eta_dec(THETA, 4, beta, 0.7)),
            ("", lambda beta: theory.cvae_optimum(THETA, 4, beta, 0.7, 0.9)),
            ("", lambda beta: theory.vae_optimum_fixed_sigma(THETA, sigmas, beta, 0.7, 0.9)),
        ]
        for sigma_1, beta_1, d_2 in ((0.5, 1.0, 5), (1.5, 0.4, 5), (1.1, 2.0, 3)):
            def learnable(beta, sigma_1=sigma_1, beta_1=beta_1, d_2=d_2):
                return theory.hvae_optimum(THETA, 4, d_2, sigma_1, beta_1, beta, 0.7, 0.9)

            def fixed(beta, sigma_1=sigma_1, beta_1=beta_1, d_2=d_2):
                return theory.hvae_optimum_fixed_sigma_2(
                    THETA, 4, d_2, sigma_1, 0.6, beta_1, beta, 0.7, 0.9
                )

            for level in ("_1", "_2"):
                forms.append((level, learnable))
                forms.append((level, fixed))
        return forms

    def test_thresholds_of_collapse(self):
        """A unit has information just below its threshold and none just above it."""
        kinds = set()
        for level, form in self.forms_over_beta():
            thresholds = form(1.0)[f"collapse{level}"].tolist()
            for i, threshold in enumerate(thresholds):
                if threshold == 0:
                    self.assertEqual(form(1e-6)[f"information{level}"][i], 0)
                    kinds.add("always")
                elif threshold == math.inf:
                    self.assertGreater(form(1e6)[f"information{level}"][i], 0)
                    kinds.add("never")
                else:
                    below = form(threshold * (1 - 1e-6))[f"information{level}"][i]
                    above = form(threshold * (1 + 1e-6))[f"information{level}"][i]
                    self.assertGreater(below, 0)
                    self.assertEqual(above, 0)
                    kinds.add("from a threshold on")
        self.assertEqual(kinds, {"always", "never", "from a threshold on"})


class Spectra(unittest.TestCase):
    def setUp(self):
        self.random = torch.Generator().manual_seed(1)

    def normal(self, *shape):
        return torch.randn(shape, dtype=torch.float64, generator=self.random)

    def test_second_moment(self):
        x = self.normal(1300, 3)
        y = self.normal(1300, 2)
        v = torch.cat([x, y], 1)
        expected = torch.einsum("ni,nj->ij", v, v) / 1300
        torch.testing.assert_close(theory.second_moment(x, y), expected, rtol=0, atol=1e-13)
        self.assertEqual(theory.second_moment(x.float()).dtype, torch.float64)

    def test_root(self):
        moment = theory.second_moment(self.normal(40, 6) @ self.normal(6, 6))
        R = theory.root(moment)
        torch.testing.assert_close(R @ R.T, moment)
        self.assertTrue((theory.spectrum(moment).diff() <= 0).all())

    def test_moment_given_x_is_that_of_least_squares(self):
        """Also for a singular x: a zero column, a repeated column, fewer rows than columns."""
        for rows in (200, 4):
            x = self.normal(rows, 6)
            x[:, 2] = 0
            x[:, 4] = 3 * x[:, 1]
            y = self.normal(rows, 5) + x @ self.normal(6, 5)
            predicted_y = x @ (torch.linalg.pinv(x) @ y)
            E = theory.moment_given_x(theory.second_moment(x, y), 6)
            expected = theory.second_moment(y - predicted_y)
            # The moments of y are about 50, and their rounding errors depend on the processor.
            torch.testing.assert_close(E, expected, rtol=0, atol=1e-11)
            self.assertTrue((theory.spectrum(E) >= 0).all())

    def test_every_unit_collapses_where_x_determines_y(self):
        x = self.normal(300, 4)
        y = x @ self.normal(4, 3)
        E = theory.moment_given_x(theory.second_moment(x, y), 4)
        optimum = theory.cvae_optimum(theory.spectrum(E), 3, 1e-9, 1.0, 1.0)
        self.assertTrue((optimum["kl"] == 0).all())

    def test_awkward_data(self):
        """Zeros, a constant column, few rows, more units than modes: all numbers are right."""
        constant = self.normal(50, 4)
        constant[:, 2] = 7.0
        for x in (torch.zeros(9, 4, dtype=torch.float64), constant, self.normal(2, 4)):
            theta = theory.spectrum(theory.second_moment(x)).sqrt()
            singular_values = torch.linalg.svdvals(x / len(x)**0.5)
            missing = max(0, 4 - len(x))
            singular_values = torch.nn.functional.pad(singular_values, (0, missing))
            torch.testing.assert_close(theta, singular_values, rtol=0, atol=1e-7)

            sigmas = torch.full((6,), 0.3)
            for optimum in (
                theory.vae_optimum(theta, 6, 0.5, 1.0, 0.5),
                theory.vae_optimum_fixed_sigma(theta, sigmas, 0.5, 1.0, 0.5),
                theory.hvae_optimum(theta, 6, 5, 0.5, 0.5, 2.0, 1.0, 0.5),
                theory.hvae_optimum_fixed_sigma_2(theta, 5, 6, 0.5, 0.5, 0.5, 2.0, 1.0, 0.5),
            ):
                for name, values in optimum.items():
                    self.assertFalse(values.isnan().any(), name)

            rank = int((singular_values > 1e-7).sum())
            optimum = theory.vae_optimum(theta, 6, 1e-9, 1.0, 1.0)
            self.assertTrue((optimum["kl"][rank:] == 0).all())


if __name__ == "__main__":
    unittest.main()
