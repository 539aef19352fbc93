"""Headroom and instability under decoders that are not Gaussian, compared with brute force.

Brute force adds units to decoders whose natural parameters are fixed, and minimises the exact
expected loss over their encoder, stds and decoder. For Bernoulli variables and for categories the
expectation over z is a Gauss-Hermite quadrature. For Poisson variables it has a closed form.
"""
import functools
import itertools
import unittest
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import datasets
import headroom
import theory
import verify
from tests import small

# The numbers of categories of the two variables of a categorical decoder.
SIZES = (3, 4)
COLUMNS = {"bernoulli": 5, "poisson": 4, "categorical": sum(SIZES)}


def make_draw(seed):
    """A function draw(*shape) of float64 tensors from N(0, 1)."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    return draw


# ------------------------------------------------------------------------------------- the rows

def draw_statistics(likelihood, parameters, seed):
    """The statistics s(t) (n, D) of random targets with these natural parameters (n, D)."""
    random = torch.Generator().manual_seed(seed)
    means = means_of(likelihood, parameters)
    if likelihood == "bernoulli":
        return torch.bernoulli(means, generator=random)
    if likelihood == "poisson":
        return torch.poisson(means, generator=random)
    columns = []
    for p in means.split(SIZES, dim=-1):
        category = torch.multinomial(p, 1, generator=random)[:, 0]
        columns.append(torch.nn.functional.one_hot(category, p.shape[-1]).double())
    return torch.cat(columns, dim=1)


def means_of(likelihood, parameters):
    """psi'(a) for natural parameters a (..., D). Each variable has its own columns."""
    if likelihood != "categorical":
        return headroom.expected_statistics(likelihood, parameters)
    columns = []
    for logits in parameters.split(SIZES, dim=-1):
        columns.append(headroom.expected_statistics(likelihood, logits))
    return torch.cat(columns, dim=-1)


def log_partition(likelihood, parameters):
    """A(a) (...,) for natural parameters a (..., D)."""
    if likelihood == "bernoulli":
        return torch.nn.functional.softplus(parameters).sum(-1)
    if likelihood == "poisson":
        return parameters.exp().sum(-1)
    return sum(logits.logsumexp(-1) for logits in parameters.split(SIZES, dim=-1))


def collapsed_parameters(likelihood, statistics):
    """The natural parameters (D,) of a decoder that gives each column its mean."""
    mean = statistics.mean(0)
    return mean.logit() if likelihood == "bernoulli" else mean.log()


@dataclass
class Rows:
    """Data, and a decoder with fixed natural parameters.

    likelihood: one of headroom.LIKELIHOODS.
    statistics: s(t), (n, D).
    parameters: the natural parameters (n, S, D) at S draws of the units that are already active.
    inputs: what the encoder of further units reads, (n, p), with a last column of ones.
    """
    likelihood: str
    statistics: torch.Tensor
    parameters: torch.Tensor
    inputs: torch.Tensor

    def second_moments(self):
        """T and F, each (D, D)."""
        means = means_of(self.likelihood, self.parameters)
        r = self.statistics - means.mean(1)
        n = len(r)
        T = headroom.linear_part(r.T @ self.inputs / n, self.inputs.T @ self.inputs / n)
        return T, r.T @ r / n

    def fisher(self):
        """H as `mean_fisher` returns it."""
        means = means_of(self.likelihood, self.parameters)
        sizes = SIZES if self.likelihood == "categorical" else ()
        return headroom.mean_fisher(self.likelihood, means, sizes)

    def for_any_encoder(self):
        """The same rows, each with a column of its own in the inputs.

        A linear encoder is then a table with a mean for each row, and T is F.
        """
        own_columns = torch.eye(len(self.statistics), dtype=torch.float64)
        return Rows(self.likelihood, self.statistics, self.parameters, own_columns)

    def loss_without_units(self):
        """E[-log p(t)] of the decoder without further units, up to a constant, as a number."""
        partition = log_partition(self.likelihood, self.parameters).mean(1)
        linear = (self.statistics * self.parameters.mean(1)).sum(1)
        return (partition - linear).mean().item()


def random_rows(likelihood, seed, n, varies=False):
    """Rows whose columns depend on two random latent variables.

    If varies is True, the natural parameters vary with further inputs and with two draws of an
    active unit. Otherwise they are those of a decoder that gives each column its mean.
    """
    draw = make_draw(seed)
    D = COLUMNS[likelihood]
    scale = 0.5 if likelihood == "poisson" else 1.0
    latent = scale * (draw(n, 2) @ draw(2, D) + 0.5 * draw(D))
    statistics = draw_statistics(likelihood, latent, seed)
    parameters = collapsed_parameters(likelihood, statistics).expand(n, 1, D)
    columns = [statistics]
    if varies:
        more = draw(n, 2)
        columns.append(more)
        parameters = parameters + scale * (0.6 * more @ draw(2, D))[:, None]
        parameters = parameters + scale * 0.5 * draw(n, 2, 1) * draw(D)
    columns.append(torch.ones(n, 1, dtype=torch.float64))
    return Rows(likelihood, statistics, parameters, torch.cat(columns, dim=1))


# -------------------------------------------------------------------------------- brute force

@functools.cache
def quadrature(k, points):
    """Nodes (points^k, k) and weights (points^k,) of expectations over N(0, I)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    grid = list(itertools.product(nodes, repeat=k))
    products = np.prod(list(itertools.product(weights / weights.sum(), repeat=k)), axis=1)
    return torch.tensor(grid), torch.tensor(products)


def mean_kl(units, rows):
    """The mean KL of each unit, (k,)."""
    q_z = Normal(rows.inputs @ units["encoder"].T, units["log_sigma"].exp())
    return kl_divergence(q_z, Normal(0.0, 1.0)).mean(0)


def loss_with_units(units, rows, beta, points=14):
    """The exact loss with k further units, up to the constant of `loss_without_units`.

    units: {"encoder" (k, p), "log_sigma" (k,), "decoder" (D, k)}. The std of the prior is 1.
    """
    mean = rows.inputs @ units["encoder"].T
    sigma = units["log_sigma"].exp()
    decoder = units["decoder"]
    if rows.likelihood == "poisson":
        shift = mean @ decoder.T + decoder**2 @ sigma**2 / 2
        partition = log_partition("poisson", rows.parameters + shift[:, None]).mean(1)
    else:
        nodes, weights = quadrature(len(sigma), points)
        shift = (mean[:, None] + sigma * nodes) @ decoder.T
        parameters = rows.parameters[:, :, None] + shift[:, None]
        partition = log_partition(rows.likelihood, parameters).mean(1) @ weights
    linear = (rows.statistics * (rows.parameters.mean(1) + mean @ decoder.T)).sum(1)
    return (partition - linear).mean() + beta * mean_kl(units, rows).sum()


def random_units(rows, k, scales):
    """A random start for brute force for each of the scales."""
    draw = make_draw(9)
    starts = []
    for scale in scales:
        starts.append({
            "encoder": scale * draw(k, rows.inputs.shape[1]),
            "log_sigma": scale * draw(k),
            "decoder": scale * draw(rows.statistics.shape[1], k),
        })
    return starts


def best_units(rows, k, beta, scales=(0.5, 0.5, 0.01)):
    """(the gain of the best units that brute force finds, the units).

    L-BFGS is enough here. The Newton steps of verify.minimise would take most of the time.
    """
    points = 14 if k == 1 else 9

    def loss(units):
        return loss_with_units(units, rows, beta, points)

    minima = [verify._lbfgs(loss, start, blocks=40) for start in random_units(rows, k, scales)]
    units, least = min(minima, key=lambda minimum: minimum[1])
    return rows.loss_without_units() - least, units


class Thresholds(unittest.TestCase):
    """Whether a unit is active 3 % below and 3 % above rho_1, by brute force.

    Below rho_1, a start next to collapse must lead away from it. Above rho_1, none of three starts
    may do so. Stability is local, but for these rows collapse also has the least loss above rho_1.
    `StableIsLocal` has an example where it does not.
    """

    def check_both_sides(self, rows):
        T, _ = rows.second_moments()
        threshold = headroom.instability_ratios(T, rows.fisher())[0].item()

        gain, units = best_units(rows, 1, beta=0.97 * threshold, scales=(0.01,))
        self.assertGreater(gain, 1e-4)
        self.assertGreater(mean_kl(units, rows).item(), 1e-4)

        gain, units = best_units(rows, 1, beta=1.03 * threshold)
        self.assertAlmostEqual(gain, 0, delta=1e-6)
        self.assertLess(mean_kl(units, rows).item(), 1e-6)

    def check_likelihood(self, likelihood):
        for seed, varies in itertools.product(range(2), (False, True)):
            with self.subTest(seed=seed, varies=varies, encoder="linear"):
                self.check_both_sides(random_rows(likelihood, seed, n=100, varies=varies))
            with self.subTest(seed=seed, varies=varies, encoder="any"):
                rows = random_rows(likelihood, seed + 10, n=40, varies=varies)
                T, F = rows.second_moments()
                rows = rows.for_any_encoder()
                any_T, _ = rows.second_moments()
                self.assertLess((any_T - F).abs().max(), 1e-12)
                if varies:
                    self.assertGreater((F - T).trace(), 1e-3)
                self.check_both_sides(rows)

    def test_bernoulli(self):
        self.check_likelihood("bernoulli")

    def test_poisson(self):
        self.check_likelihood("poisson")

    def test_categories(self):
        self.check_likelihood("categorical")


class StableIsLocal(unittest.TestCase):
    def test_active_units_may_be_better_than_stable_collapse(self):
        """Above rho_1 collapse is stable here, and yet an active unit has a lower loss.

        The decoder is certain of a 0 for one row whose pixel is 1. For the other rows it gives 0
        and 1 the same probability. A large step is needed to correct it.
        """
        statistics = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0, 1], dtype=torch.float64)[:, None]
        is_first = torch.zeros_like(statistics)
        is_first[0] = 1
        inputs = torch.cat([is_first, torch.ones_like(is_first)], dim=1)
        rows = Rows("bernoulli", statistics, -6 * is_first[:, None], inputs)

        T, _ = rows.second_moments()
        threshold = headroom.instability_ratios(T, rows.fisher())[0].item()
        # T has the first row alone, and H the information of the nine logits.
        p = 1 / (1 + np.exp(6))
        self.assertAlmostEqual(threshold, (1 - p)**2 / (p * (1 - p) + 8 / 4))

        beta = 1.1 * threshold
        gain, units = best_units(rows, 1, beta, scales=(1e-3, 1e-2))
        self.assertAlmostEqual(gain, 0, delta=1e-9)
        gain, units = best_units(rows, 1, beta, scales=(0.5, 1, 2, 2))
        gain_by_finer_quadrature = (
            rows.loss_without_units() - loss_with_units(units, rows, beta, points=60).item())
        self.assertGreater(gain_by_finer_quadrature, 0.05)
        self.assertGreater(mean_kl(units, rows).item(), 0.2)


# -------------------------------------------------------------------------- the guaranteed gain

class GuaranteedGain(unittest.TestCase):
    """The bounds are never above the gain of brute force, and not far below it."""

    def gains(self, rows, k, fractions):
        """(beta, the gain of brute force, T) for betas that are these fractions of rho_1."""
        T, _ = rows.second_moments()
        threshold = headroom.instability_ratios(T, rows.fisher())[0].item()
        for fraction in fractions:
            beta = fraction * threshold
            _, units = best_units(rows, k, beta, scales=(0.5, 1))
            # The minimum of a coarse quadrature may be below that of the exact loss.
            loss = loss_with_units(units, rows, beta, points=40 if k == 1 else 24).item()
            yield beta, rows.loss_without_units() - loss, T

    def bound_shares(self, rows, k, fractions):
        """Boehning's bound as a share of the gain of brute force, for each beta."""
        for beta, gain, T in self.gains(rows, k, fractions):
            ratios = headroom.curvature_ratios(T, rows.likelihood)
            yield headroom.gain_of_ratios(ratios, k, beta) / gain

    def check_shares(self, shares, at_least):
        """No share is above 1, and the largest is no small one."""
        self.assertLessEqual(max(shares), 1)
        self.assertGreater(max(shares), at_least)

    def test_one_unit(self):
        """The bound for categories is lower, because it holds for any probabilities."""
        for likelihood, at_least in (("bernoulli", 0.6), ("categorical", 0.35)):
            shares = []
            for seed, varies in itertools.product(range(2), (False, True)):
                rows = random_rows(likelihood, seed, n=100, varies=varies)
                shares.extend(self.bound_shares(rows, 1, (0.1, 0.3, 0.6)))
            with self.subTest(likelihood=likelihood):
                self.check_shares(shares, at_least)

    def test_one_unit_with_any_encoder(self):
        for likelihood, at_least in (("bernoulli", 0.5), ("categorical", 0.25)):
            shares = []
            for varies in (False, True):
                rows = random_rows(likelihood, 3, n=40, varies=varies).for_any_encoder()
                shares.extend(self.bound_shares(rows, 1, (0.1, 0.4)))
            with self.subTest(likelihood=likelihood):
                self.check_shares(shares, at_least)

    def test_two_units(self):
        """Both units gain something here."""
        shares = []
        for varies in (False, True):
            rows = random_rows("bernoulli", 1, n=40, varies=varies)
            for beta, gain, T in self.gains(rows, 2, (0.1, 0.25)):
                ratios = headroom.curvature_ratios(T, "bernoulli")
                bound = headroom.gain_of_ratios(ratios, 2, beta)
                self.assertGreater(bound, headroom.gain_of_ratios(ratios, 1, beta))
                shares.append(bound / gain)
        self.check_shares(shares, at_least=0.5)

    def test_the_tighter_bound_of_collapsed_logits(self):
        """Jaakkola and Jordan's bound is at least Boehning's, and never above the gain."""
        larger = 0
        shares = []
        for seed in range(3):
            rows = random_rows("bernoulli", seed, n=100)
            # Shift the logits, so that their probabilities are far from 1/2 and from the data's.
            rows.parameters = rows.parameters + torch.linspace(-1.5, 1.5, 5, dtype=torch.float64)
            curvature = headroom.collapsed_curvature(rows.parameters[0, 0])
            for beta, gain, T in self.gains(rows, 1, (0.1, 0.4)):
                boehning = headroom.gain_of_ratios(
                    headroom.curvature_ratios(T, "bernoulli"), 1, beta)
                ratios = theory.spectrum(headroom.whitened(T, curvature))
                bound = headroom.gain_of_ratios(ratios, 1, beta)
                self.assertGreaterEqual(bound, boehning)
                larger += bound > 1.05 * boehning
                shares.append(bound / gain)
        self.assertGreater(larger, 3)
        self.check_shares(shares, at_least=0.8)

    def test_none_for_counts(self):
        """The curvature of a Poisson decoder has no bound."""
        self.assertIsNone(
            headroom.curvature_ratios(torch.eye(3, dtype=torch.float64), "poisson"))


class Curvature(unittest.TestCase):
    def test_bound_of_collapsed_logits(self):
        """log(1 + e^(a + d)) is at most its parabola for all d, and equal to it at d = -2 a."""
        d = torch.linspace(-60, 60, 24001, dtype=torch.float64)
        for a in (0.0, 1e-6, 0.9e-4, 1.1e-4, 0.3, -1.7, 4.0, -12.0, 25.0):
            logit = torch.tensor([a], dtype=torch.float64)
            bound = headroom.collapsed_curvature(logit)
            self.assertLessEqual(bound.item(), 0.25)

            def room(d, logit=logit, bound=bound):
                """The parabola minus log(1 + e^(a + d))."""
                softplus = torch.nn.functional.softplus
                parabola = softplus(logit) + logit.sigmoid() * d + bound * d**2 / 2
                return parabola - softplus(logit + d)

            with self.subTest(a=a):
                self.assertGreater(room(d).min().item(), -1e-10)
                self.assertLess(room(-2 * logit).abs().item(), 1e-10)
                # A bound that is 1 % smaller does not hold. Next to 0, rounding would hide it.
                if abs(a) > 0.1:
                    self.assertLess(room(-2 * logit, bound=0.99 * bound).item(), -1e-5)

    def test_bound_next_to_0_is_continuous(self):
        """The series and the quotient agree where one takes over from the other."""
        a = torch.tensor([0.99999e-4, 1.00001e-4], dtype=torch.float64)
        below, above = headroom.collapsed_curvature(a)
        self.assertLess((below - above).abs().item(), 1e-12)
        self.assertAlmostEqual(0.25 - below.item(), 1e-8 / 48, delta=1e-12)

    def test_bounds_of_boehning(self):
        """B - A'' has no negative eigenvalue on residuals, and B is the least such number."""
        draw = make_draw(0)
        largest = 0
        for K in (2, 3, 4):
            logits = 4 * draw(300, K)
            # Two likely categories out of K come close to the bound.
            logits[0] = torch.tensor([0.0, 0, -40, -40][:K])
            for p in logits.softmax(-1):
                curvature = torch.linalg.eigvalsh(p.diag() - torch.outer(p, p))
                largest = max(largest, curvature.max().item())
        self.assertAlmostEqual(largest, headroom.CURVATURE_BOUNDS["categorical"], places=9)
        p = torch.linspace(0, 1, 1001, dtype=torch.float64)
        self.assertAlmostEqual(
            (p * (1 - p)).max().item(), headroom.CURVATURE_BOUNDS["bernoulli"])


class ExponentialFamilies(unittest.TestCase):
    def test_derivatives_of_the_log_partition_function(self):
        """Its gradient is the mean of the statistics, and its mean Hessian is H."""
        for likelihood, D in COLUMNS.items():
            parameters = 1.5 * make_draw(D)(6, 3, D)
            means = means_of(likelihood, parameters)

            def partition(a, likelihood=likelihood):
                return log_partition(likelihood, a)

            flat = parameters.flatten(0, 1)
            gradient = torch.func.vmap(torch.func.grad(partition))(flat)
            hessian_of = torch.func.jacrev(torch.func.grad(partition))
            hessian = torch.func.vmap(hessian_of)(flat).mean(0)
            fisher = headroom.mean_fisher(
                likelihood, means, SIZES if likelihood == "categorical" else ())
            if likelihood != "categorical":
                self.assertEqual(fisher.shape, (D,))
                fisher = fisher.diag()
            with self.subTest(likelihood=likelihood):
                self.assertLess((means.flatten(0, 1) - gradient).abs().max(), 1e-12)
                self.assertLess((fisher - hessian).abs().max(), 1e-12)

    def test_unknown_likelihoods(self):
        for call in (headroom.expected_statistics, headroom.mean_fisher):
            with self.assertRaisesRegex(ValueError, "'cauchy'.*bernoulli, categorical, poisson"):
                call("cauchy", torch.zeros(2, 2))


# ----------------------------------------------------------------------------- before training

def initial_ratios(likelihood, statistics):
    """rho before training, from the data alone: the decoder gives each column its mean."""
    mean = statistics.mean(0, keepdim=True)
    fisher = headroom.mean_fisher(likelihood, mean, SIZES if likelihood == "categorical" else ())
    r = statistics - mean
    return headroom.instability_ratios(r.T @ r / len(r), fisher)


class BeforeTraining(unittest.TestCase):
    def test_binary_data(self):
        """rho are the eigenvalues of the correlation matrix."""
        x = random_rows("bernoulli", 0, n=200).statistics
        wanted = np.linalg.eigvalsh(np.corrcoef(x.numpy().T))[::-1]
        np.testing.assert_allclose(initial_ratios("bernoulli", x), wanted, atol=1e-12)

    def test_counts(self):
        """rho are the eigenvalues of the covariance divided by the roots of the means."""
        x = random_rows("poisson", 0, n=200).statistics.numpy()
        covariance = np.cov(x.T, bias=True)
        wanted = np.linalg.eigvals(covariance / x.mean(0)).real
        rho = initial_ratios("poisson", torch.from_numpy(x))
        np.testing.assert_allclose(rho, sorted(wanted, reverse=True), atol=1e-12)

    def test_independent_counts(self):
        """All rho of independent Poisson variables are 1, up to sampling."""
        rates = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64).expand(100_000, 3)
        x = torch.poisson(rates, generator=torch.Generator().manual_seed(0))
        for rho in initial_ratios("poisson", x):
            self.assertAlmostEqual(rho.item(), 1, delta=0.03)

    def test_categories(self):
        """rho are the inertias of multiple correspondence analysis times the number of variables.

        The analysis is the singular value decomposition of the standardised indicator matrix.
        """
        Z = random_rows("categorical", 0, n=200).statistics.numpy()
        P = Z / Z.sum()
        row_masses = P.sum(1)
        column_masses = P.sum(0)
        expected = np.outer(row_masses, column_masses)
        singular_values = np.linalg.svd((P - expected) / expected**0.5, compute_uv=False)
        wanted = len(SIZES) * singular_values**2
        rho = initial_ratios("categorical", torch.from_numpy(Z))
        np.testing.assert_allclose(rho, wanted, atol=1e-12)

    def test_two_variables(self):
        """rho are 1 plus and minus the singular values of the standardised contingency table."""
        Z = random_rows("categorical", 1, n=200).statistics.numpy()
        table = Z[:, :3].T @ Z[:, 3:] / len(Z)
        expected = np.outer(table.sum(1), table.sum(0))
        correlations = np.linalg.svd((table - expected) / expected**0.5, compute_uv=False)[:2]
        wanted = sorted([*(1 + correlations), 1, *(1 - correlations), 0, 0], reverse=True)
        rho = initial_ratios("categorical", torch.from_numpy(Z))
        np.testing.assert_allclose(rho, wanted, atol=1e-12)

    def test_constant_columns(self):
        """They have no information and are left out."""
        for likelihood in ("bernoulli", "poisson"):
            x = random_rows(likelihood, 2, n=200).statistics
            zeros = torch.zeros_like(x[:, :1])
            wider = torch.cat([zeros, x[:, :2], zeros, x[:, 2:]], dim=1)
            np.testing.assert_allclose(
                initial_ratios(likelihood, wider), initial_ratios(likelihood, x), atol=1e-12)
        x = random_rows("bernoulli", 2, n=200).statistics
        wider = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        self.assertEqual(len(initial_ratios("bernoulli", wider)), 5)

        # A category that never occurs keeps its column, with a ratio of 0.
        Z = random_rows("categorical", 2, n=200).statistics
        Z[Z[:, 1] == 1, 0] = 1
        Z[:, 1] = 0
        fisher = headroom.mean_fisher("categorical", Z.mean(0, keepdim=True), SIZES)
        self.assertEqual(fisher[1].abs().sum(), 0)
        with_it = initial_ratios("categorical", Z)
        self.assertEqual(((with_it > 1e-9).sum(), len(with_it)), (1 + 3, 7))

    def test_independent_columns(self):
        """Sampling lifts rho_1 to about (1 + sqrt(d/n))^2."""
        n, d = 1500, 150
        x = torch.bernoulli(
            torch.full((n, d), 0.3, dtype=torch.float64),
            generator=torch.Generator().manual_seed(0))
        rho = initial_ratios("bernoulli", x)
        self.assertAlmostEqual(rho[0].item(), (1 + (d / n)**0.5)**2, delta=0.05)

    def test_no_column_has_information(self):
        """Then there is no rho at all."""
        zeros = torch.zeros(10, 3, dtype=torch.float64)
        self.assertEqual(len(initial_ratios("bernoulli", zeros)), 0)


# ------------------------------------------------------------------------------------ sequences

def ar1_prior(n, alpha):
    """(R (n, n), the stds (n,) of the factorised posterior with the smallest KL at the mean 0).

    The KL is half the trace of R^(-1) S^2 minus log det S^2, up to a constant.
    """
    t = torch.arange(n, dtype=torch.float64)
    R = alpha**(t[:, None] - t).abs()
    return R, torch.linalg.inv(R).diagonal().rsqrt()


def loss_with_sequences(sequences, r, u, beta, prior):
    """The loss with k sequences of n units and a Gaussian decoder with std 1 that reads all z_t.

    sequences: {"encoder" (k, n, p), "decoder" (D, k, n)}. prior is a result of `ar1_prior`.
    """
    _, std = prior
    mean = torch.einsum("knp,ip->ikn", sequences["encoder"], u)
    left = r - torch.einsum("dkn,ikn->id", sequences["decoder"], mean)
    noise = (sequences["decoder"]**2 * std**2).sum()
    kl = kl_of_sequences(mean, prior)
    return ((left**2).sum(1).mean() + noise) / 2 + beta * kl.sum(1).mean()


def kl_of_sequences(mean, prior):
    """KL(N(mean, S^2) || N(0, R)) for means (..., n), written out, which is faster than torch's."""
    R, std = prior
    precision = torch.linalg.inv(R)
    variance = std**2
    at_mean_0 = precision.diagonal() @ variance - len(R) + R.logdet() - variance.log().sum()
    return (torch.einsum("...n,nm,...m->...", mean, precision, mean) + at_mean_0) / 2


def best_sequences(r, u, k, beta, prior):
    """The gain over collapse of the best sequences that brute force finds."""
    draw = make_draw(5)
    n = len(prior[0])
    starts = []
    for _ in range(3):
        starts.append({
            "encoder": 0.5 * draw(k, n, u.shape[1]), "decoder": 0.5 * draw(r.shape[1], k, n)})

    def loss(sequences):
        return loss_with_sequences(sequences, r, u, beta, prior)

    zero = {name: torch.zeros_like(value) for name, value in starts[0].items()}
    least = min(verify._lbfgs(loss, start, blocks=40)[1] for start in starts)
    return loss(zero).item() - least


class Sequences(unittest.TestCase):
    PRIORS = ((3, 0.5), (4, 0.9), (3, -0.7))

    def test_stds_have_the_smallest_kl(self):
        """A change of any std raises the KL at the mean 0, which is not 0 itself."""
        for n, alpha in self.PRIORS:
            R, std = ar1_prior(n, alpha)
            p_z = MultivariateNormal(torch.zeros(n, dtype=torch.float64), R)

            def kl(log_std, p_z=p_z, n=n):
                q_z = MultivariateNormal(
                    torch.zeros(n, dtype=torch.float64), (2 * log_std).exp().diag())
                return kl_divergence(q_z, p_z)

            self.assertLess(torch.func.grad(kl)(std.log()).abs().max(), 1e-12)
            self.assertGreater(kl(std.log()), 0.1)

    def test_kl(self):
        """The KL that is written out is that of torch."""
        for n, alpha in self.PRIORS:
            R, std = ar1_prior(n, alpha)
            mean = make_draw(6)(5, 2, n)
            q_z = MultivariateNormal(mean, scale_tril=std.diag())
            p_z = MultivariateNormal(torch.zeros(n, dtype=torch.float64), R)
            torch.testing.assert_close(kl_of_sequences(mean, (R, std)), kl_divergence(q_z, p_z))

    def test_factor(self):
        """It is the largest variance that a decoder of noise 1 reads under the prior."""
        for n, alpha in self.PRIORS:
            R, std = ar1_prior(n, alpha)
            wanted = np.linalg.eigvals((R / std**2).numpy()).real.max()
            self.assertAlmostEqual(headroom.sequence_factor(R, std), wanted, places=12)
            self.assertGreater(wanted, 1.2)
        eye = torch.eye(4, dtype=torch.float64)
        self.assertAlmostEqual(headroom.sequence_factor(eye, torch.ones(4)), 1, places=12)

    def test_gain_of_a_sequence(self):
        """It is exact where T has one mode, with linear means and with means of each row."""
        draw = make_draw(3)
        signal = draw(60, 1)
        u = torch.cat([signal, torch.ones_like(signal)], dim=1)
        cases = (
            # (residual, inputs): one column, three columns of which T has one mode, own means.
            (1.5 * signal + 0.3 + draw(60, 1), u),
            (signal @ torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64), u[:, :1]),
            (draw(16, 1), torch.eye(16, dtype=torch.float64)),
        )
        for (n, alpha), (r, inputs) in itertools.product(self.PRIORS, cases):
            prior = ar1_prior(n, alpha)
            factor = headroom.sequence_factor(*prior)
            T = headroom.linear_part(r.T @ inputs / len(r), inputs.T @ inputs / len(r))
            ratios = theory.spectrum(T)
            for share in (0.3, 1.03):
                beta = share * factor * ratios[0].item()
                bound = headroom.gain_of_sequences(ratios, 1, beta, 1, factor)
                gain = best_sequences(r, inputs, 1, beta, prior)
                with self.subTest(n=n, alpha=alpha, columns=r.shape[1], share=share):
                    self.assertAlmostEqual(bound, gain, delta=1e-7)
                    self.assertEqual(bound > 1e-4, share < 1)

    def test_gain_of_several_sequences(self):
        """It is a lower bound where T has several modes: a sequence may use more than one."""
        draw = make_draw(4)
        u = draw(80, 3)
        r = u @ draw(3, 3) + 0.5 * draw(80, 3)
        ratios = theory.spectrum(headroom.linear_part(r.T @ u / 80, u.T @ u / 80))
        prior = ar1_prior(3, 0.5)
        factor = headroom.sequence_factor(*prior)
        beta = 0.1 * factor * ratios[1].item()
        bounds = []
        gains = []
        for k in (1, 2):
            bounds.append(headroom.gain_of_sequences(ratios, k, beta, 1, factor))
            gains.append(best_sequences(r, u, k, beta, prior))
            self.assertLessEqual(bounds[-1], gains[-1] + 1e-9)
            self.assertGreater(bounds[-1], 0.5 * gains[-1])
        self.assertGreater(bounds[1], bounds[0] + 0.1)
        # One sequence of three units uses two of the modes.
        self.assertGreater(gains[0], bounds[0] + 0.1)

    def test_independent_units(self):
        """For R = I the std 1 stays, and the gain is below that of units with a learnable std."""
        ratios = torch.tensor([6.0, 3.0, 0.5], dtype=torch.float64)
        gain = headroom.gain_of_sequences(ratios, 3, beta=1, weight=0.5, factor=1)
        # Two of the three exceed beta / weight.
        self.assertAlmostEqual(gain, ((3**0.5 - 1)**2 + (1.5**0.5 - 1)**2) / 2)
        self.assertLess(gain, headroom.gain_of_ratios(ratios, 3, beta=1, weight=0.5))

    def test_weight_of_zero(self):
        ratios = torch.tensor([6.0, 3.0, 0.5], dtype=torch.float64)
        self.assertEqual(headroom.gain_of_sequences(ratios, 3, beta=1, weight=0, factor=2), 0)


# -------------------------------------------------------------- the moments of a trained model

class TrainedModel:
    """A model whose residuals a function makes from a batch and the number of draws.

    With headroom_rows, the moments are those of two halves of that number of rows.
    """

    def __init__(self, residuals, headroom_rows=None):
        self.make_residuals = residuals
        self.calls = 0
        if headroom_rows:
            self.headroom_rows = headroom_rows

    def residuals(self, *batch):
        self.calls += 1
        *tensors, _, draws = batch
        return self.make_residuals(*tensors, draws)


def bernoulli_level(inputs, x, draws, **others):
    """The residual of binary x whose logits are all 0, so that H is 1/4."""
    logits = torch.zeros(2, draws, *x.shape, dtype=x.dtype)
    others = {"beta": 1.0, **others}
    return {"": headroom.bernoulli_residual(x, logits, encoder_input=(inputs,), **others)}


def level_moments(residuals, tensors, headroom_rows=None):
    """{level suffix: LevelMoments} of a TrainedModel on rows of these tensors."""
    data = datasets.Data("rows", tensors, tensors)
    model = TrainedModel(residuals, headroom_rows)
    return headroom.residual_moments(model, small.Flags(device="cpu"), data)


class Halves(unittest.TestCase):
    """Ratios from all rows beside ratios of directions from one half, measured on the other."""

    def ratios_of(self, inputs, x):
        """(rho of T, rho of F) of all rows, and of halves."""
        pairs = []
        for headroom_rows in (None, len(x)):
            [moments] = level_moments(bernoulli_level, (inputs, x), headroom_rows).values()
            self.assertEqual(len(moments.parts), 2 if headroom_rows else 1)
            rhos, bounds = moments.ratios
            for rho, bound in zip(rhos, bounds):
                # At logits of 0 Boehning's bound is H.
                self.assertLess((rho - bound).abs().max(), 1e-9)
            pairs.append(rhos)
        return pairs

    def test_noise(self):
        """Noise lifts the ratios of all rows, but not those of halves."""
        held_out_T = []
        held_out_F = []
        for seed in range(5):
            draw = make_draw(seed)
            inputs = draw(900, 50)
            x = (draw(900, 40) > 0).double()
            (T, F), (half_T, half_F) = self.ratios_of(inputs, x)
            # A regression on 51 columns explains about 51/900 of the noise, and more along the
            # best direction.
            self.assertGreater(T[0].item(), 0.1)
            self.assertGreater(F[0].item(), 1.3)
            self.assertLess(half_T[0].item(), 0.3 * T[0].item())
            held_out_T.append(half_T[0].item())
            held_out_F.append(half_F[0].item())
        self.assertLess(np.mean(held_out_T), 0.02)
        self.assertAlmostEqual(np.mean(held_out_F), 1, delta=0.1)

    def test_structure(self):
        """Where there is one strong direction, all rows and halves agree."""
        draw = make_draw(0)
        inputs = draw(4000, 5)
        x = (3 * inputs[:, :1] + draw(4000, 8) > 0).double()
        (T, F), (half_T, half_F) = self.ratios_of(inputs, x)
        self.assertGreater(T[0].item(), 3)
        self.assertAlmostEqual(half_T[0].item() / T[0].item(), 1, delta=0.02)
        self.assertAlmostEqual(half_F[0].item() / F[0].item(), 1, delta=0.02)

    def test_columns_with_little_information(self):
        """In halves of 1000 rows a pixel needs p (1 - p) >= 0.1 to count. Else it is left out."""
        draw = make_draw(2)
        inputs = draw(2000, 2)
        x = (draw(2000, 4) > 0).double()

        def residuals(inputs, x, draws, probability):
            logits = torch.zeros(2, draws, *x.shape, dtype=x.dtype)
            logits[..., 0] = np.log(probability / (1 - probability))
            return {"": headroom.bernoulli_residual(
                x, logits, encoder_input=(inputs,), beta=1.0)}

        # p (1 - p) is 0.1009 and 0.0993.
        for probability, columns in ((0.114, 4), (0.112, 3)):
            for headroom_rows, wanted in ((None, 4), (2000, columns)):
                [moments] = level_moments(
                    lambda *batch, p=probability: residuals(*batch, p),
                    (inputs, x),
                    headroom_rows,
                ).values()
                rhos, bounds = moments.ratios
                self.assertEqual([len(rho) for rho in rhos], [wanted] * 2)
                # The bound needs no estimate of H.
                self.assertEqual([len(bound) for bound in bounds], [4] * 2)

    def test_few_rows(self):
        """If no column has enough information, all columns count."""
        draw = make_draw(2)
        x = (draw(60, 4) > 0).double()
        [moments] = level_moments(bernoulli_level, (draw(60, 2), x), headroom_rows=60).values()
        rhos, _ = moments.ratios
        self.assertEqual([len(rho) for rho in rhos], [4, 4])

    def test_moments_of_the_halves(self):
        """Each half has the moments of its own rows. Rows beyond headroom_rows are not used."""
        draw = make_draw(1)
        inputs = draw(90, 3)
        x = (draw(90, 4) > 0).double()
        torch.manual_seed(5)
        [moments] = level_moments(bernoulli_level, (inputs, x), headroom_rows=60).values()
        self.check_halves(moments, inputs, x, 30)

    def test_moments_of_the_halves_if_the_encoder_reads_the_data(self):
        """The known moment of all rows is not that of a half."""
        def residuals(x, draws):
            return bernoulli_level(x, x, draws)

        x = (make_draw(1)(90, 4) > 0).double()
        torch.manual_seed(5)
        [moments] = level_moments(residuals, (x,), headroom_rows=60).values()
        self.check_halves(moments, x, x, 30)

    def check_halves(self, moments, inputs, x, half):
        """The halves are chosen at random, here with the seed 5."""
        self.assertEqual(len(moments.parts), 2)
        torch.manual_seed(5)
        order = torch.randperm(len(x))
        for part, rows in zip(moments.parts, (order[:half], order[half:2 * half])):
            u = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)[rows]
            r = x[rows] - 0.5
            self.assertLess((part.moment - u.T @ u / half).abs().max(), 1e-12)
            self.assertLess((part.cross - r.T @ u / half).abs().max(), 1e-12)
            self.assertLess((part.squares - r.T @ r / half).abs().max(), 1e-12)
            self.assertLess((part.fisher - 0.25).abs().max(), 1e-12)


class BernoulliResidual(unittest.TestCase):
    def test_residual_of_images(self):
        """r is x minus the mean of p over draws, twice, and H the mean of p (1 - p)."""
        draw = make_draw(0)
        x = (draw(7, 1, 2, 3) > 0).double()
        logits = draw(2, 5, 7, 1, 2, 3)
        residual = headroom.bernoulli_residual(
            x, logits, encoder_input=(x,), beta=0.5, sequence_length=2)
        p = 1 / (1 + torch.exp(-logits))
        for estimate in (0, 1):
            wanted = (x - sum(p[estimate]) / 5).reshape(7, 6)
            self.assertLess((residual.residual[estimate] - wanted).abs().max(), 1e-12)
        fisher = (p * (1 - p)).reshape(10, 7, 6).mean(0)
        self.assertLess((residual.fisher - fisher).abs().max(), 1e-12)
        self.assertEqual(
            (residual.likelihood, residual.beta, residual.weight, residual.sequence_length),
            ("bernoulli", 0.5, 1, 2))

    def test_second_moment_has_no_noise_of_draws(self):
        """F is exact on average. One estimate times itself would be larger."""
        draw = make_draw(1)
        n, D = 500, 3
        x = (draw(n, D) > 0).double()
        mean = draw(n, D)
        nodes, weights = quadrature(1, 40)
        exact_p = (mean[..., None] + 1.5 * nodes[:, 0]).sigmoid() @ weights
        wanted = ((x - exact_p)**2).sum(1).mean().item()

        def residuals(x, draws):
            logits = mean + 1.5 * draw(2, draws, n, D)
            return {"": headroom.bernoulli_residual(x, logits, encoder_input=(x,), beta=1.0)}

        ours = []
        naive = []
        for _ in range(50):
            [moments] = level_moments(residuals, (x,)).values()
            [part] = moments.parts
            ours.append(part.squares.trace().item())
            naive.append((moments.residual.residual[0]**2).sum(1).mean().item())
        error = np.std(ours) / 50**0.5
        self.assertLess(abs(np.mean(ours) - wanted), 5 * error)
        self.assertGreater(np.mean(naive) - wanted, 20 * error)


class SharedResiduals(unittest.TestCase):
    def test_levels_that_share_a_residual_share_its_moments(self):
        def residuals(inputs, x, draws):
            shared = bernoulli_level(inputs, x, draws)[""]
            other = bernoulli_level(inputs[:, :1], x, draws)[""]
            return {"_1": shared, "_2": other, "_3": shared}

        draw = make_draw(2)
        tensors = (draw(40, 2), (draw(40, 3) > 0).double())
        moments = level_moments(residuals, tensors)
        self.assertEqual(list(moments), ["_1", "_2", "_3"])
        self.assertIs(moments["_1"], moments["_3"])
        self.assertIsNot(moments["_1"], moments["_2"])
        self.assertEqual(moments["_1"].parts[0].cross.shape, (3, 3))
        self.assertEqual(moments["_2"].parts[0].cross.shape, (3, 2))

        halves = level_moments(residuals, tensors, headroom_rows=40)
        self.assertIs(halves["_1"], halves["_3"])
        self.assertEqual([len(halves[level].parts) for level in moments], [2, 2, 2])

    def test_chunks(self):
        """The moments of rows in many chunks are those of all rows."""
        draw = make_draw(3)
        tensors = (draw(50, 2), (draw(50, 3) > 0).double())

        def residuals(inputs, x, draws):
            return bernoulli_level(inputs, x, draws)

        [whole] = level_moments(residuals, tensors).values()
        data = datasets.Data("rows", tensors, tensors)
        model = TrainedModel(residuals)
        # A chunk has 2^25 numbers at most, so that a wide layer leaves seven rows.
        model.widest_layer = 2**25 // (8 * headroom.DRAWS * 7)
        [chunks] = headroom.residual_moments(model, small.Flags(device="cpu"), data).values()
        self.assertEqual(model.calls, 8)
        for name in ("cross", "moment", "squares", "fisher"):
            difference = getattr(whole.parts[0], name) - getattr(chunks.parts[0], name)
            self.assertLess(difference.abs().max(), 1e-12)


class Levels(unittest.TestCase):
    """What `headroom.measure` makes of a level whose decoder is not Gaussian."""

    def setUp(self):
        draw = make_draw(0)
        self.inputs = draw(300, 2)
        latent = self.inputs @ (1.5 * draw(2, 6))
        self.x = (latent + draw(300, 6) > 0).double()
        u = torch.cat([self.inputs, torch.ones(300, 1, dtype=torch.float64)], dim=1)
        r = self.x - 0.5
        self.T = theory.spectrum(headroom.linear_part(r.T @ u / 300, u.T @ u / 300))
        self.F = theory.spectrum(r.T @ r / 300)

    def measure(self, units, metrics, likelihood="bernoulli", **others):
        """The LevelHeadroom of one level "_2" of a model."""
        def residuals(inputs, x, draws):
            residual = bernoulli_level(inputs, x, draws, **others)[""]
            residual.likelihood = likelihood
            return {"_2": residual}

        tensors = (self.inputs, self.x)
        data = datasets.Data("rows", tensors, tensors)
        examples = {"unit_kl_2": np.ones((4, units))}
        levels = headroom.measure(
            TrainedModel(residuals), small.Flags(device="cpu"), data, metrics, examples)
        self.assertEqual(list(levels), ["z2"])
        return levels["z2"]

    def test_bernoulli(self):
        level = self.measure(3, {"AU_2": 0, "AU_kl_2": 1}, beta=0.5, weight=2.0)
        self.assertEqual(
            (level.units, level.collapsed, level.likelihood, level.level),
            (3, 2, "bernoulli", 0.25))
        np.testing.assert_allclose(level.tau, 4 * self.T[:3], atol=1e-9)
        np.testing.assert_allclose(level.tau_any, 4 * self.F[:3], atol=1e-9)
        for nats, tau in ((level.headroom, self.T), (level.headroom_any, self.F)):
            # The formula of the docstring, for a Gaussian with variance 4.
            q = 4 * tau[:2].numpy() / 0.25
            self.assertGreater(q.min(), 1)
            self.assertAlmostEqual(nats, 0.5 / 2 * (q - 1 - np.log(q)).sum(), places=9)
        self.assertIn("because of training", level.verdict())
        self.assertEqual(level.theta, [])

    def test_units_whose_means_do_not_vary(self):
        level = self.measure(3, {"AU_2": 0, "AU_kl_2": 1}, counts_means=True)
        self.assertEqual(level.collapsed, 3)
        level = self.measure(3, {"AU_2": 0, "AU_kl_2": 1}, counts_means=False)
        self.assertEqual(level.collapsed, 2)

    def test_stable(self):
        level = self.measure(3, {"AU_kl_2": 0}, beta=4.01 * self.F[0].item())
        self.assertEqual(level.instability(), "")
        self.assertEqual(
            level.verdict(),
            "3 of 3 units collapsed because of the objective: no small step out of collapse would "
            "lower the loss",
        )

    def test_unstable(self):
        """The bound of the gain may be small although rho_1 exceeds beta."""
        beta = 3.99 * self.F[0].item()
        self.assertLess(4 * self.T[0].item(), beta)
        level = self.measure(3, {"AU_kl_2": 0}, beta=beta)
        self.assertEqual((level.instability(), level.cause()), ("any", "encoder"))
        self.assertLess(level.headroom_any, 1e-3)
        self.assertIn("by an amount that is not known", level.verdict())

        # Here a linear encoder is enough.
        level = self.measure(3, {"AU_kl_2": 0}, beta=3.99 * self.T[0].item())
        self.assertEqual(level.instability(), "linear")
        self.assertLess(level.headroom, 1e-3)

    def test_counts(self):
        """Nothing is guaranteed for a Poisson decoder, but instability is exact."""
        level = self.measure(3, {"AU_kl_2": 0}, likelihood="poisson", beta=0.5)
        self.assertEqual((level.headroom, level.headroom_any), (0, 0))
        np.testing.assert_allclose(level.tau, 4 * self.T[:3], atol=1e-9)
        self.assertIn("unstable", level.verdict())

    def test_sequences(self):
        """The factor of the prior multiplies rho, and units gain by whole sequences."""
        level = self.measure(
            6, {"AU_kl_2": 1}, beta=0.5, sequence_length=2, sequence_factor=1.8)
        np.testing.assert_allclose(level.tau_any, 1.8 * 4 * self.F[:6], atol=1e-9)
        for nats, tau in ((level.headroom, self.T), (level.headroom_any, self.F)):
            wanted = headroom.gain_of_sequences(4 * tau, 2, beta=0.5, weight=1, factor=1.8)
            self.assertGreater(wanted, 0.01)
            self.assertAlmostEqual(nats, wanted, places=9)

    def test_beta_of_0(self):
        """Without a KL every level has a headroom, also one of sequences."""
        for factor in (1.0, 1.8):
            level = self.measure(
                6, {"AU_kl_2": 0}, beta=0.0, sequence_length=2, sequence_factor=factor)
            # Without a KL, k units explain all of their modes of a Gaussian with variance 4.
            k = 6 if factor == 1 else 3
            self.assertAlmostEqual(level.headroom_any, 2 * self.F[:k].sum().item(), places=9)


if __name__ == "__main__":
    unittest.main()
