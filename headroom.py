"""Why did latent units collapse: because of the objective, or because of training?

A unit is collapsed if its mean KL is at most 0.01 nats. Its posterior then nearly equals its prior,
and it carries almost no information. Collapse has two possible causes, with different remedies.
Either no use of the unit would lower the loss, or training did not find the use that would. To
decide between them, this module computes how far the loss of a trained model would fall if its
collapsed units were used again, each with a decoder that is linear in the unit. The rest of the
model, with any encoder and decoder, stays as it is.

Take one level of latent units with a learnable posterior q(z|u). The loss of the level is

    weight (-log p(t|z)) + beta KL(q(z|u) || p(z))

These are its terms:

  u       the input of the level's encoder, with a constant 1 appended
  t       the target, which the latent units describe
  r       the residual, the part of t that the trained model leaves unexplained
  T       the second moment of the best linear prediction of r from u:
          T = C A^+ C^T, where C = E[r u^T] and A = E[u u^T] over the training examples
  F       the second moment of r itself: F = E[r r^T]

T describes the part of r that a further unit with a linear encoder can explain. F describes it for
any encoder. F - T is positive semidefinite. Where u does not determine r, F is an upper bound.

The encoder of a VAE reads x, and its target is x. The encoder of a CVAE reads x and y, and its
target is y. Both have weight 1, or 2 with --released_objective. The encoder of level 2 in a
two-level HVAE reads a draw of z1, and its target is the same draw. Its KL has the weight beta_2,
and -log p(z1|z2) has the weight beta_1.


A Gaussian decoder
------------------
Let p(t|z) be N(mean(z), std^2 I), where std is eta_dec. The residual is r = t - E_q(z|u)[mean(z)].

  tau_i   the eigenvalues of T or of F in descending order, the variance that an i-th further unit
          could explain
  tau_0   the threshold, the variance above which a unit gains more than its KL costs:
          tau_0 = beta std^2 / weight
  G_k     the headroom of k units, in nats of the negative beta-ELBO per example:

          G_k = beta / 2 sum (tau_i / tau_0 - 1 - ln(tau_i / tau_0)),

          summed over those i <= k for which tau_i > tau_0

Let k be the number of collapsed units. With the eigenvalues of T, G_k is exactly the gain of k
further units, at the best choice of their weights. Their encoder means are linear in u. Their stds
are learnable. Their linear decoder is added to mean(z). With the eigenvalues of F, G_k is exactly
the gain of k further units with any encoder means. Units with a nonlinear decoder may gain more.
The formula is the reverse water-filling of rate-distortion theory, applied to T or F. Theorem 2 of
Dang et al. (2024, arXiv 2306.05023) does the same with its matrix E.


Any other decoder of an exponential family
------------------------------------------
The natural parameters a of the decoder are the logits of Bernoulli variables or of categories, or
the log rates of Poisson variables. Let psi(a) be the log-partition function. Let s(t) be the
sufficient statistic, which is t itself, or one-hot for categories.

  r       s(t) - E_q(z|u)[psi'(a)], such as x - p for binary pixels
  H       the mean Fisher information E[psi''(a)], such as that of p (1 - p) for binary pixels
  rho_i   the eigenvalues of H^(-1/2) M H^(-1/2) in descending order, where M is T or F

Starting a unit with a linear encoder lowers the loss if rho_1 of T exceeds beta / weight. Starting
one with any encoder does if rho_1 of F does. Collapse is then unstable: an arbitrarily small step
out of it lowers the loss. If beta / weight exceeds rho_1, collapse is stable. This is a local
statement. A solution with active units far from collapse is not excluded.

The reason is the gain of a unit with small decoder weights w and the mean m(u), to second order:
weight (E[w^T r m] - w^T H w / 2) - beta E[m^2] / 2. The best m is weight w^T r / beta.

Let all units be collapsed, and let the decoder give each column its mean. For binary columns and
for categories, H is then the covariance within each column, so that rho_1 of F is at least 1. For
counts, rho_1 of F is at least the largest ratio of a column's variance to its mean. Active units
lower rho_1.

If the curvature psi'' is bounded above, the gain is bounded below. Let B be a matrix with
psi'' <= B. Then k further units gain at least G_k of the eigenvalues of B^(-1/2) T B^(-1/2), with
the threshold beta / weight. For Bernoulli variables B is 1/4, and for categories it acts as 1/2 on
r (Boehning 1992). Where the logits do not depend on z or x, a smaller B is allowed (Jaakkola &
Jordan 2000). A Poisson decoder has no such bound.


The verdict
-----------
The first line that holds decides. The limit of 0.01 nats is a convention.

A Gaussian decoder:
  G_k of T > 0.01 nats   Training collapsed the units, or the networks cannot express their use.
  G_k of F > 0.01 nats   Units with a richer encoder than a linear one would lower the loss.
                         Training did not find them, or the model's own encoder is not rich enough.
  otherwise              The objective collapsed the units.

Another decoder, where beta stands for beta / weight:
  G_k of T > 0.01 nats   Training collapsed the units, as above. They gain at least G_k.
  G_k of F > 0.01 nats   Units with a richer encoder gain at least G_k of F.
  rho_1 of T > beta      Collapse is unstable. Training could leave it, but no gain is guaranteed.
  rho_1 of F > beta      A small step would lower the loss, but only with a richer encoder.
  otherwise              The objective collapsed the units: no small step lowers the loss.


The post-mortem
---------------
`measure` applies this theory to the models of this project. `post_mortem` applies it to any other
VAE or CVAE, with the functions of its training loop:

    from headroom import post_mortem
    print(post_mortem(model.encode, model.decode, loader, beta=1.0, eta_dec=0.5))

It judges twice: with all rows, and with units that are found on one half of the rows and measured
on the other half. If the two lead to different causes, there are too few rows for a verdict.

The file has seven parts. The first is the theory of Gaussian decoders, for moments C and A from any
source. The second is the theory of other decoders. The third is the verdict. The fourth is the
measurement on a trained model of this project. The fifth has two quantities that point to the cause
if it was training: the number of dead ReLU units, and how far the loss still fell at the end. The
sixth makes a post-mortem of a model from its moments, and post_mortem.py reads these from files.
The seventh measures the moments in a training loop.
"""
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import own_model
import theory

# The mean of p(t|z) is estimated twice, each time over this number of draws of z per example.
DRAWS = 4

# The ridge, as a share of the total variance of u, where units are measured on other rows than
# those on which they were found.
HELD_OUT_RIDGE = 1e-5

# The least information of a column, summed over the rows, where rho is estimated from half of the
# rows. For a rare binary pixel it is about the number of rows in which it is white.
LEAST_INFORMATION = 100

# The ridges that the held-out headroom of a post-mortem tries, as shares of the total variance of
# u. The ridge with the largest gain counts, since each gain is measured on rows that were not used
# for the fit. The choice among six ridges makes that gain a little too large.
RIDGES = (0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


# ------------------------------------------------------------------ the theory of Gaussian decoders

def gain_threshold(beta, weight, std):
    """The variance above which a linear unit gains more than its KL costs: beta std^2 / weight.

    beta is the weight of the KL in the loss, weight that of -log p(t|z), and std the std of
    p(t|z). Where weight is 0, no unit ever gains anything, and the threshold is infinite.
    """
    if not weight:
        return math.inf
    return beta * std**2 / weight


def linear_part(cross, moment):
    """T (D, D), the second moment of the best linear prediction of r (D,) from u (p,).

    cross (D, p) is C = E[r u^T], and moment (p, p) is A = E[u u^T], both float64. The
    `theory.spectrum` of T holds the tau of `gain_of_units`.
    """
    explained = cross @ theory.whitening(moment)
    return explained @ explained.T


def gain_of_units(tau, count, beta, weight, std):
    """G_k for k = count: the gain of k further units of a Gaussian decoder, in nats per example.

    tau (D,) are the eigenvalues of T or F in descending order, float64, in squared units of t. For
    the other arguments see `gain_threshold`. A result of 0 means that no further unit lowers the
    loss.
    """
    return gain_of_ratios(tau / std**2, count, beta, weight)


def gain_of_ratios(ratios, count, beta, weight=1):
    """G_k for k = count, in nats per example, for any decoder whose curvature psi'' is at most B.

    ratios (D,) are the eigenvalues of B^(-1/2) M B^(-1/2) in descending order, where M is T or F,
    float64. A further unit gains something if its ratio exceeds beta / weight. For a Gaussian
    decoder the ratios are tau / std^2 and the gain is exact. For another decoder it is a lower
    bound.
    """
    threshold = gain_threshold(beta, weight, 1)
    ratios = ratios[:count]
    ratios = ratios[ratios > threshold]
    if not len(ratios):
        return 0.0

    # This form of the formula also holds for beta = 0, where the threshold is 0.
    gains = ratios - threshold - torch.xlogy(threshold, ratios / threshold)
    return (weight / 2 * gains.sum()).item()


def best_units(cross, moment, count, beta, weight, std, ridge=0):
    """The units whose gain is G_k: at most `count` units, those whose tau is above the threshold.

    cross (D, p) and moment (p, p) are C and A, float64. A ridge is added to the variances of u.
    The units then rely less on directions in which u hardly varies, and do better on other rows.

    Returns (encoder (k, p), sigma (k,), decoder (D, k)), float64. In stds of the prior, q(z|u) is
    N(encoder u, diag sigma^2). The mean of p(t|z) gains the term decoder z.
    """
    threshold = gain_threshold(beta, weight, std)
    white = theory.whitening(moment, ridge)
    explained = cross @ white
    tau, directions = theory.modes(explained @ explained.T)

    above = (tau > threshold) & (torch.arange(len(tau)) < count)
    tau = tau[above]
    directions = directions[:, above]

    # The share of its mode's variance that a unit leaves unexplained.
    noise_share = threshold / tau
    scale = (1 - noise_share).sqrt() / tau.sqrt()
    encoder = scale[:, None] * directions.T @ explained @ white.T
    return encoder, noise_share.sqrt(), directions * (tau - threshold).sqrt()


def gain_on_rows(units, cross, moment, beta, weight, std):
    """The gain of units on rows with these moments, in nats per example; it may be negative.

    The gain is the fall of the squared error's part of the loss, minus the cost of the KL. units
    are a result of `best_units`, perhaps from other rows. cross (D, p) and moment (p, p) are C
    and A of the rows at hand.
    """
    encoder, sigma, decoder = units
    prediction = decoder @ encoder

    # The change of E||r||^2 when prediction u and the noise of z enter the mean of p(t|z).
    error = (
        -2 * (prediction * cross).sum()
        + (prediction @ moment * prediction).sum()
        + (decoder**2 @ sigma**2).sum()
    )
    kl = ((encoder @ moment * encoder).sum(1) + sigma**2 - 1) / 2 - sigma.log()
    return (-weight * error / (2 * std**2) - beta * kl.sum()).item()


def held_out_gain(moments, ridge, count, beta, weight, std):
    """The gain of units, found on one half of the rows, on the other half, in nats per row.

    Few rows make G_k too large: a regression on the p columns of u explains about p/n of the
    variance of n rows by chance. This figure does not have that bias. It is the mean over both
    ways to choose the halves.

    moments are [(C, A) of one half, (C, A) of the other]. The ridge is a share of the total
    variance of u. Without it, a column that is nearly 0 in one half can give the other half an
    enormous z.
    """
    gains = []
    for (cross, moment), other_moments in (moments, moments[::-1]):
        units = best_units(
            cross,
            moment,
            count,
            beta=beta,
            weight=weight,
            std=std,
            ridge=ridge * moment.trace(),
        )
        gains.append(gain_on_rows(units, *other_moments, beta=beta, weight=weight, std=std))
    return sum(gains) / 2


# --------------------------------------------------------------------- the theory of other decoders

# The decoders whose collapse this module explains.
LIKELIHOODS = ("gaussian", "bernoulli", "categorical", "poisson")

# The names of those that are not Gaussian, as they are printed.
DECODERS = {"bernoulli": "Bernoulli", "categorical": "categorical", "poisson": "Poisson"}

# Upper bounds of the curvature psi'' on the residuals (Boehning 1992). A Poisson decoder has none.
CURVATURE_BOUNDS = {"bernoulli": 1 / 4, "categorical": 1 / 2}


def expected_statistics(likelihood, parameters):
    """psi'(a), the mean of the sufficient statistic s(t), for natural parameters a of any shape.

    It is the probability of a 1 for logits of Bernoulli variables, the rate for log rates of
    Poisson variables, and the probabilities of the categories, in the last dimension, for their
    logits.
    """
    if likelihood == "bernoulli":
        return parameters.sigmoid()
    if likelihood == "poisson":
        return parameters.exp()
    if likelihood == "categorical":
        return parameters.softmax(-1)
    raise ValueError(f"the likelihood {likelihood!r} is not one of {', '.join(LIKELIHOODS[1:])}")


def mean_fisher(likelihood, means, sizes=()):
    """The mean Fisher information H = E[psi''(a)] over rows and draws, float64.

    means (..., D) are the means psi'(a) of the statistics. For Bernoulli and Poisson variables H is
    a diagonal matrix and its diagonal (D,) is returned: the mean of p (1 - p), or of the rate.

    For categories the columns of means are the probabilities of all categories of the first
    variable, then those of the second variable, and so on. sizes has the number of categories of
    each variable. H is the matrix (D, D) with a block E[diag(p) - p p^T] for each variable.
    """
    means = means.double().reshape(-1, means.shape[-1])
    if likelihood == "bernoulli":
        return (means * (1 - means)).mean(0)
    if likelihood == "poisson":
        return means.mean(0)
    if likelihood == "categorical":
        blocks = []
        for p in means.split(list(sizes), dim=-1):
            block = -p.T @ p / len(p)
            # The difference of p and p^2 would lose the digits of a p next to 1.
            block.diagonal().copy_((p * (1 - p)).mean(0))
            blocks.append(block)
        return torch.block_diag(*blocks)
    raise ValueError(f"the likelihood {likelihood!r} is not one of {', '.join(LIKELIHOODS[1:])}")


def whitened(part, information):
    """B^(-1/2) M B^(-1/2) for a second moment M (D, D) of the residual, float64.

    information is B: the diagonal (D,) of a matrix, or a matrix (D, D), of which the pseudo-inverse
    is used. Columns without information are left out, so that the result may have fewer rows and
    columns than M. For a diagonal B its rows are the columns of M with information, in their order.
    """
    if information.ndim == 1:
        # A column whose value is certain has no information, and its residual is 0.
        informative = information > 0
        scale = information[informative].rsqrt()
        return scale[:, None] * part[informative][:, informative] * scale
    white = theory.whitening(information)
    return white.T @ part @ white


def instability_ratios(part, fisher):
    """rho, the eigenvalues of H^(-1/2) M H^(-1/2) in descending order, float64.

    part is M (D, D), either T or F in natural units. fisher is H, as `mean_fisher` returns it.
    Collapse is unstable to a unit with a linear encoder (T) or with any encoder (F) if the first of
    them exceeds beta / weight, and stable if it is smaller.

    Before training, at a decoder that gives each column its mean, T and F are the covariance of the
    statistics, and H is `mean_fisher` of their means. For binary data the matrix is then the
    correlation matrix of x. For categories it is that of multiple correspondence analysis, times
    the number of columns.
    """
    return theory.spectrum(whitened(part, fisher))


def curvature_ratios(part, likelihood):
    """The eigenvalues of M / B for `gain_of_ratios`, where the bound B is Boehning's (1992).

    part is M (D, D), either T or F in natural units, float64. Returns None for a Poisson decoder,
    whose curvature has no bound.
    """
    bound = CURVATURE_BOUNDS.get(likelihood)
    return None if bound is None else theory.spectrum(part) / bound


def collapsed_curvature(logits):
    """The curvature bound (D,) of Bernoulli logits (D,) that vary neither with x nor with z.

    It is tanh(a / 2) / (2 a), at most 1/4 (Jaakkola & Jordan 2000). It holds for any change of the
    logits a, so that the eigenvalues of `whitened(T, bound)` give a guaranteed gain.
    """
    logits = logits.double()
    # The limit at 0 is 1/4. Next to 0 the quotient would lose its digits.
    is_small = logits.abs() < 1e-4
    safe = torch.where(is_small, 1.0, logits)
    return torch.where(is_small, 0.25 - logits**2 / 48, (safe / 2).tanh() / (2 * safe))


def gain_of_sequences(ratios, count, beta, weight, factor):
    """The guaranteed gain of `count` further sequences of units under an AR(1) prior, in nats.

    The prior of a sequence z_1..z_n has the covariance R, and the stds of its posterior are those
    of the smallest KL, S = diag(std_t). A decoder that adds up the sequence with the right weights
    sees one unit of noise 1 whose mean y costs y^2 / (2 factor), where factor is the largest
    eigenvalue of S^(-1) R S^(-1) (see `sequence_factor`). With the best such decoder it gains

        beta / (2 factor) sum (sqrt(q_i) - 1)^2,   q_i = factor weight ratio_i / beta,

    summed over those i <= count for which q_i > 1. The gain may be larger, since the stds stay as
    they are here, and since a sequence may describe several modes of T. ratios (D,) are those of
    `gain_of_ratios`.
    """
    # This form of the formula also holds for beta = 0.
    roots = (weight / 2 * ratios[:count]).sqrt() - math.sqrt(beta / (2 * factor))
    return roots.clamp(min=0).square().sum().item()


def sequence_factor(covariance, std):
    """The largest eigenvalue of S^(-1) R S^(-1), by which a prior R multiplies every rho.

    covariance (n, n) is R, and std (n,) is the diagonal of S, see `gain_of_sequences`. It is 1 for
    a prior of independent units, R = I, whose posterior of the smallest KL has the stds 1.
    """
    scale = 1 / std.double()
    return theory.spectrum(scale[:, None] * covariance.double() * scale)[0].item()


# -------------------------------------------------------------------------------------- the verdict

def instability(rho, rho_any, threshold):
    """To which encoder the collapse of units is unstable, for a decoder that is not Gaussian.

    rho and rho_any are rho_1 of T and of F, and threshold is beta / weight. Returns "linear" if a
    unit with a linear encoder has a small step out of collapse that lowers the loss, "any" if only
    one with a richer encoder has, and "" if collapse is stable.
    """
    if rho > threshold:
        return "linear"
    return "any" if rho_any > threshold else ""


def cause_of_collapse(nats, nats_any, unstable=""):
    """What collapsed the units of a level: "training", "encoder", "unstable" or "objective".

    nats is their headroom with a linear encoder and nats_any that with any encoder. unstable is a
    result of `instability`, and "" for a Gaussian decoder. "encoder" means that only units with a
    richer encoder than a linear one would lower the loss. "unstable" means that units with a linear
    encoder would, by an amount that is not known.
    """
    if nats > theory.ACTIVE:
        return "training"
    if nats_any > theory.ACTIVE:
        return "encoder"
    return {"linear": "unstable", "any": "encoder", "": "objective"}[unstable]


def verdict(units, collapsed, nats, nats_any, unstable="", likelihood="gaussian"):
    """Whether the objective or training collapsed the units of a level, in words.

    units is the number of all units of the level, or None if unknown. collapsed is the number of
    collapsed ones. For nats, nats_any and unstable see `cause_of_collapse`. likelihood is one of
    LIKELIHOODS. The gain is exact for a Gaussian decoder, and a lower bound for others.
    """
    words = collapse_in_words(units, collapsed)
    if not collapsed:
        return words
    cause = cause_of_collapse(nats, nats_any, unstable)
    pronoun = "it" if collapsed == 1 else "them"
    if cause == "training":
        return (
            f"{words} because of training: reviving {pronoun} would lower the loss by at least "
            f"{nats:.2g} nats"
        )
    if likelihood == "gaussian":
        if cause == "objective":
            return f"{words} because of the objective"
        return (
            f"{words}: with a linear encoder, reviving {pronoun} would not lower the loss; with a "
            f"richer encoder it would, by at least {nats_any:.2g} nats"
        )

    # Another decoder than a Gaussian one.
    if cause == "objective":
        return (
            f"{words} because of the objective: no small step out of collapse would lower the loss"
        )
    if nats_any > theory.ACTIVE:
        return (
            f"{words}: with a richer encoder than a linear one, reviving {pronoun} would lower the "
            f"loss by at least {nats_any:.2g} nats"
        )
    if cause == "encoder":
        return (
            f"{words}: with a linear encoder, no small step out of collapse would lower the loss; "
            "with a richer encoder one would, by an amount that is not known"
        )
    return (
        f"{words}, but this is unstable: a small step out of collapse would lower the loss, by an "
        "amount that is not known"
    )


def collapse_in_words(units, collapsed):
    """How many units of a level collapsed: "2 of 16 units collapsed", or "no unit collapsed".

    Without a number of all units (None) it is "2 units collapsed".
    """
    if not collapsed:
        return "no unit collapsed"
    total = f" of {units}" if units else ""
    noun = "unit" if (units or collapsed) == 1 else "units"
    return f"{collapsed}{total} {noun} collapsed"


# --------------------------------------------------------------- the measurement on a trained model

@dataclass
class Residual:
    """The residual r of one level with a Gaussian decoder, for a batch of B examples.

    A model's method `residuals(*batch, f, draws)` returns {level suffix: Residual}, with one entry
    for each level that has a learnable posterior. The suffix is "" in a one-level model and "_2"
    for level 2. Where the expectation over z has no closed form, it is estimated twice, each time
    from `draws` draws of z per example.

    encoder_input: the input of the level's encoder without the constant 1, a tuple of tensors
        (B, ...). The last one is the target.
    mean_parts: the parts whose sum is the mean of p(t|z), expected over q(z|u). This is a list of
        (layer, hidden). A part is layer(hidden) for an nn.Linear, or hidden itself if layer is
        None. hidden is (2, B, h), two independent estimates, or (B, h) if it is exact. Because of
        this split, u is multiplied with the narrow hidden, not with the wide mean.
    beta: the weight of the KL in the loss. Like weight and std, a number or a 0-d tensor.
    weight: the weight of -log p(t|z) in the loss.
    std: the std of p(t|z).
    """
    encoder_input: tuple
    mean_parts: list
    beta: float
    weight: float
    std: float

    likelihood = "gaussian"
    counts_means = False
    sequence_length = 1
    sequence_factor = 1.0

    def products(self, u):
        """Sums over the batch from which `moments` makes C and F. u is (B, p).

        The mean is a matrix times h, where h joins all hidden and a 1.
        """
        hidden = []
        for _, part in self.mean_parts:
            hidden.append(part.expand(2, *part.shape[-2:]))
        hidden.append(torch.ones_like(hidden[0][..., :1]))
        first, second = torch.cat(hidden, dim=-1).to(u.dtype)
        return {"hidden_input": (first + second).T @ u / 2, "hidden": first.T @ second}

    def moments(self, means, moment):
        """C (D, p), F (D, D) and None in place of H, from the means of the products and A, float64.

        The target is the last input of the encoder. So E[t u^T] is in the rows of A just before
        the last one, and that one belongs to the constant 1.
        """
        dim_t = self.encoder_input[-1].shape[1:].numel()
        target = slice(-1 - dim_t, -1)
        decoder = self._decoder_matrix(dim_t)

        mean_input = decoder @ means["hidden_input"]
        cross = moment[target] - mean_input

        # F = E[t t^T] - E[t m^T] - E[m t^T] + E[m m'^T], with two estimates m and m' of the mean.
        mean_target = mean_input[:, target]
        mean_mean = decoder @ means["hidden"] @ decoder.T
        squares = moment[target, target] - mean_target - mean_target.T
        squares = squares + (mean_mean + mean_mean.T) / 2
        return cross, squares, None

    def _decoder_matrix(self, dim_t):
        """The matrix (D, h) whose product with all hidden and a 1 is the mean of p(t|z)."""
        columns = []
        bias = torch.zeros(dim_t, 1, dtype=torch.float64)
        for layer, _ in self.mean_parts:
            if layer is None:
                columns.append(torch.eye(dim_t, dtype=torch.float64))
                continue
            columns.append(layer.weight.double().cpu())
            if layer.bias is not None:
                bias = bias + layer.bias.double().cpu()[:, None]
        return torch.cat([*columns, bias], dim=1)


@dataclass
class NaturalResidual:
    """The residual r of one level with a decoder that is not Gaussian, for a batch of B examples.

    It takes the place of a Residual. `bernoulli_residual` makes it from logits.

    encoder_input: the input of the level's encoder without the constant 1, a tuple of tensors
        (B, ...).
    residual: s(t) - E_q(z|u)[psi'(a)], (2, B, D), two estimates from independent draws of z.
    fisher: the mean of psi''(a) over the draws, (B, D), for a likelihood whose H is diagonal.
    likelihood: "bernoulli" or "poisson".
    beta: the weight of the KL in the loss. Like weight, a number or a 0-d tensor.
    weight: the weight of -log p(t|z) in the loss.
    counts_means: whether a unit whose mean does not vary counts as collapsed, instead of one whose
        KL is at most 0.01 nats. It is so where no posterior can match the prior.
    sequence_length: the number of units in each sequence under an AR(1) prior, otherwise 1.
    sequence_factor: see the function of this name.
    """
    encoder_input: tuple
    residual: torch.Tensor
    fisher: torch.Tensor
    likelihood: str
    beta: float
    weight: float = 1.0
    counts_means: bool = False
    sequence_length: int = 1
    sequence_factor: float = 1.0

    def products(self, u):
        """Sums over the batch from which `moments` makes C, F and H. u is (B, p)."""
        first, second = self.residual.to(u.dtype)
        return {
            "cross": (first + second).T @ u / 2,
            "residual": first.T @ second,
            "fisher": self.fisher.double().sum(0),
        }

    def moments(self, means, moment):
        """C (D, p), F (D, D) and the diagonal of H (D,), float64, from the products' means."""
        residual = means["residual"]
        return means["cross"], (residual + residual.T) / 2, means["fisher"]


def bernoulli_residual(x, logits, encoder_input, **others):
    """A NaturalResidual for binary targets x (B, ...) and logits (2, S, B, ...) at draws of z.

    The logits are two sets of S draws. others are further fields of NaturalResidual.
    """
    p = expected_statistics("bernoulli", logits)
    return NaturalResidual(
        encoder_input=encoder_input,
        residual=(x - p.mean(1)).flatten(2),
        fisher=(p * (1 - p)).mean((0, 1)).flatten(1),
        likelihood="bernoulli",
        **others,
    )


class ResidualMoments(NamedTuple):
    """The moments of one level over training rows, float64, on the CPU.

    cross: C = E[r u^T], (D, p).
    moment: A = E[u u^T], (p, p).
    squares: F = E[r r^T], (D, D).
    fisher: H as `mean_fisher` returns it, or None for a Gaussian decoder.
    """
    cross: torch.Tensor
    moment: torch.Tensor
    squares: torch.Tensor
    fisher: torch.Tensor | None


def held_out_parts(halves):
    """What units that are found on one half of the rows explain on the other half.

    halves are [ResidualMoments of one half, ResidualMoments of the other]. Returns two lists of
    pairs (M, M'), one pair for each half, for units with a linear encoder and with any encoder. M
    (D, D) is T or F of the half. M' (D, D) is what units along the directions of M explain of the
    other half: for T with the regression of the first half.
    """
    linear = []
    any_encoder = []
    for half, other in (halves, halves[::-1]):
        any_encoder.append((half.squares, other.squares))
        # The ridge keeps a column that hardly varies in one half from an enormous weight.
        white = theory.whitening(half.moment, HELD_OUT_RIDGE * half.moment.trace())
        regression = half.cross @ white @ white.T
        explained = regression @ other.cross.T
        explained = explained + explained.T - regression @ other.moment @ regression.T
        linear.append((half.cross @ regression.T, explained))
    return linear, any_encoder


def mean_ratios(pairs, information):
    """What M' has along the directions of M, both whitened: the mean over pairs (M, M'), (k,).

    information is B of `whitened`. If M and M' are the same, the result is the eigenvalues of
    B^(-1/2) M B^(-1/2), in descending order.
    """
    total = 0
    for part, other_part in pairs:
        variance, directions = theory.modes(whitened(part, information))
        along = (directions * (whitened(other_part, information) @ directions)).sum(0)
        # A direction without any variance is an arbitrary one.
        total = total + torch.where(variance > 0, along.clamp(min=0), 0.0)
    return total / len(pairs)


@dataclass
class LevelHeadroom:
    """The headroom of one level of a trained model.

    units: the number of latent units.
    collapsed: the number of collapsed units.
    headroom: the gain of k = collapsed further units with linear encoders, in nats per training
        example. It is G_k for a Gaussian decoder, and otherwise a lower bound.
    headroom_any: the same with any encoder.
    level: the threshold. A further unit with a larger eigenvalue gains more than its KL costs. None
        is infinity.
    tau: the largest eigenvalues of T in descending order, at most one per unit. For a decoder that
        is not Gaussian they are rho_i, those of H^(-1/2) T H^(-1/2). If they are measured on other
        rows than those that gave the directions, they keep the order of the latter.
    tau_any: the same with F in place of T.
    theta: for each active unit, the variance that a linear unit of the same KL would describe, in
        descending order.
    likelihood: one of LIKELIHOODS.
    """
    units: int
    collapsed: int
    headroom: float
    headroom_any: float
    level: float | None
    tau: list
    tau_any: list
    theta: list
    likelihood: str = "gaussian"

    def instability(self):
        """To which encoder collapse is unstable, see the function `instability`.

        For a Gaussian decoder the headroom says it, and the result is "".
        """
        if self.likelihood == "gaussian" or self.level is None or not self.tau_any:
            return ""
        return instability(self.tau[0], self.tau_any[0], self.level)

    def cause(self):
        """What collapsed the units, see `cause_of_collapse`, or "none" if no unit collapsed."""
        if not self.collapsed:
            return "none"
        return cause_of_collapse(self.headroom, self.headroom_any, self.instability())

    def verdict(self):
        """Whether the objective or training collapsed the units, in words."""
        return verdict(
            self.units,
            self.collapsed,
            nats=self.headroom,
            nats_any=self.headroom_any,
            unstable=self.instability(),
            likelihood=self.likelihood,
        )


def measure(model, f, data, metrics, examples):
    """The headroom of each level with a learnable posterior: {"z": LevelHeadroom}.

    f is the model's setting, and data is a datasets.Data. metrics and examples are the results of
    report.evaluate, which determine the collapsed units. The name of a level is "z" in a one-level
    model, and "z1", "z2" and so on in others.
    """
    # Importing common changes settings of torch. It is not imported with this module, so that
    # `post_mortem` does not change those of a training loop.
    import common

    with common.seeded(f.seed, "evaluation", data.train[0].device):
        moments_of_levels = residual_moments(model, f, data)

    headrooms = {}
    for suffix, moments in moments_of_levels.items():
        name = "z" + suffix.removeprefix("_")
        kl = examples[f"unit_kl{suffix}"].mean(0)
        counts_means = moments.residual.counts_means
        active = metrics[f"AU{suffix}" if counts_means else f"AU_kl{suffix}"]
        headrooms[name] = _level_headroom(moments, kl, active)
    return headrooms


def _level_headroom(moments, kl, active):
    """A LevelHeadroom from LevelMoments, the mean KL of each unit (d,) and the active units."""
    residual = moments.residual
    collapsed = len(kl) - active
    beta = float(residual.beta)
    weight = float(residual.weight)

    # 1. The eigenvalues and gains with a linear encoder and with any encoder.
    theta = []
    if residual.likelihood == "gaussian":
        std = float(residual.std)
        threshold = gain_threshold(beta, weight, std)
        [(T, _)], [(F, _)] = moments.second_moments
        taus = [theory.spectrum(T), theory.spectrum(F)]
        gains = []
        for tau in taus:
            gains.append(gain_of_units(tau, collapsed, beta=beta, weight=weight, std=std))
        theta = _equivalent_variances(kl, active, threshold)
    else:
        threshold = gain_threshold(beta, weight, 1)
        taus, ratios = moments.ratios
        taus = [residual.sequence_factor * tau for tau in taus]
        # Where the curvature has no bound, no gain is guaranteed.
        gains = [0.0, 0.0]
        if ratios is not None:
            gains = [_natural_gain(residual, ratio, collapsed) for ratio in ratios]

    # 2. A linear encoder is one of any encoders. T keeps some noise of the draws of z, and F does
    # not, so that the second gain may be estimated below the first one.
    gains[1] = max(gains)

    # 3. What the report shows of them.
    return LevelHeadroom(
        units=len(kl),
        collapsed=collapsed,
        headroom=gains[0],
        headroom_any=gains[1],
        level=threshold if threshold < math.inf else None,
        tau=taus[0][:len(kl)].tolist(),
        tau_any=taus[1][:len(kl)].tolist(),
        theta=theta,
        likelihood=residual.likelihood,
    )


def _equivalent_variances(kl, active, threshold):
    """For each active unit the variance that a linear unit of the same KL would describe."""
    if threshold == math.inf:
        return []
    active_kl = np.sort(kl)[::-1][:active]
    # A model that has nearly diverged can have KLs whose exponential exceeds float64.
    with np.errstate(over="ignore"):
        return np.nan_to_num(threshold * np.exp(2 * active_kl)).tolist()


def _natural_gain(residual, ratios, collapsed):
    """The guaranteed gain of the collapsed units. ratios (D,) are those of `gain_of_ratios`."""
    beta = float(residual.beta)
    weight = float(residual.weight)
    if residual.sequence_factor == 1:
        return gain_of_ratios(ratios, collapsed, beta, weight)
    sequences = collapsed // residual.sequence_length
    return gain_of_sequences(
        ratios, sequences, beta=beta, weight=weight, factor=residual.sequence_factor
    )


@dataclass
class LevelMoments:
    """The residual of one level, or of several levels that share it, and its moments.

    residual: the residual of one batch, for the constants of the loss. The constants are the same
        for all batches.
    parts: [ResidualMoments] of all rows, or one ResidualMoments for each half of the rows.
    count: the number of rows of a part.
    """
    residual: Residual | NaturalResidual
    parts: list
    count: int

    @functools.cached_property
    def second_moments(self):
        """[(M, M')] for each half, for T and for F: two lists.

        The directions of further units are those of M, and M' is what they explain. With all rows
        both are T, or F. With halves, M is that of one half and M' is measured on the other one.
        """
        if len(self.parts) == 1:
            [part] = self.parts
            T = linear_part(part.cross, part.moment)
            return [(T, T)], [(part.squares, part.squares)]

        return held_out_parts(self.parts)

    @functools.cached_property
    def ratios(self):
        """[rho of T, rho of F], and two lists for `gain_of_ratios` or None, for natural units.

        With halves, columns with little information are left out of rho, unless all columns have
        little. Few rows do not determine what a unit would gain from them.
        """
        fisher = sum(part.fisher for part in self.parts) / len(self.parts)
        is_known = fisher * self.count >= LEAST_INFORMATION
        if len(self.parts) > 1 and is_known.any():
            fisher = torch.where(is_known, fisher, 0.0)
        bound = CURVATURE_BOUNDS.get(self.residual.likelihood)
        rhos = [mean_ratios(pairs, fisher) for pairs in self.second_moments]
        if bound is None:
            return rhos, None
        bounds = torch.full_like(fisher, bound)
        return rhos, [mean_ratios(pairs, bounds) for pairs in self.second_moments]


@torch.no_grad()
def residual_moments(model, f, data):
    """The moments of each level over the training rows: {level suffix: LevelMoments}.

    The draws of z come from the default generator. The sums over chunks of rows are in float64. The
    products within a chunk are in the data's precision, but on CUDA they are in float64, too.
    """
    import common

    # The objective's scalars are 0-d: in float64 they do not change the precision of the data.
    f = common.on_device(f, data.train[0][:0].double())

    # 1. All rows, or two halves of the rows that the model allows. They are chosen at random, since
    # the rows of a data set may have an order. The first images of MNIST are of other writers.
    halves = [data.train]
    if hasattr(model, "headroom_rows"):
        count = len(data.train[0])
        size = min(count, model.headroom_rows) // 2
        order = torch.randperm(count).to(data.train[0].device)
        halves = []
        for chosen in (order[:size], order[size:2 * size]):
            halves.append([t.index_select(0, chosen) for t in data.train])

    # 2. Levels that share a residual share its moments.
    residuals = {}
    parts = {}
    for rows in halves:
        means_by_level, residuals = _mean_products(model, f, rows, is_whole=rows is data.train)
        for suffix, means in means_by_level.items():
            # Where the encoder reads the data themselves, the moment of all rows is known.
            moment = means["moment"] if "moment" in means else data.moment_with_one
            cross, squares, fisher = residuals[suffix].moments(means, moment)
            parts.setdefault(suffix, []).append(ResidualMoments(cross, moment, squares, fisher))

    moments = {}
    shared = {}
    for suffix, residual in residuals.items():
        if id(residual) not in shared:
            shared[id(residual)] = LevelMoments(residual, parts[suffix], len(halves[0][0]))
        moments[suffix] = shared[id(residual)]
    return moments


def _mean_products(model, f, rows, is_whole):
    """The means over rows of the products of each level, and the residuals of the last chunk.

    is_whole is whether the rows are all training rows. Returns ({level suffix: {name: tensor}},
    {level suffix: residual}). Levels that share a residual appear in the former once, under the
    first level.
    """
    count = len(rows[0])
    width = max(getattr(model, "widest_layer", 0), *(t[0].numel() for t in rows))
    chunk = max(1, 2**25 // (width * rows[0].element_size() * DRAWS))

    sums = {}
    for start in range(0, count, chunk):
        batch = [t[start:start + chunk] for t in rows]
        residuals = model.residuals(*batch, f, DRAWS)
        seen = set()
        for suffix, residual in residuals.items():
            if id(residual) in seen:
                continue
            seen.add(id(residual))
            level_sums = sums.setdefault(suffix, {})
            for name, product in _products(residual, batch, is_whole).items():
                level_sums[name] = level_sums.get(name, 0) + product.double()

    means = {}
    for suffix, level_sums in sums.items():
        means[suffix] = {name: total.cpu() / count for name, total in level_sums.items()}
    return means, residuals


def _products(residual, batch, is_whole):
    """The products of a residual, and u^T u (p, p) unless the data's own moment takes its place.

    It does so if the encoder reads the data themselves, and if all training rows count (is_whole).
    """
    inputs = residual.encoder_input
    columns = [t.flatten(1) for t in inputs]
    u = torch.cat([*columns, torch.ones_like(columns[0][:, :1])], dim=1)
    if u.is_cuda:
        # CUDA may round products in float32 to TF32.
        u = u.double()

    products = residual.products(u)
    reads_data = len(inputs) == len(batch) and all(a is b for a, b in zip(inputs, batch))
    if not (reads_data and is_whole):
        products["moment"] = u.T @ u
    return products


# ------------------------------------------------------------------------- what points to the cause

@torch.no_grad()
def dead_units(model, f, data):
    """The hidden ReLU units that fire for no test example: {network: [dead units, all units]}.

    A network is a direct child of the model. A channel of a convolution counts as one unit.
    """
    import common

    fires = {}

    def make_hook(name):
        def hook(relu, inputs, output):
            unit_dim = 1 if output.ndim == 4 else output.ndim - 1
            fired = (output > 0).transpose(0, unit_dim).flatten(1).any(1)
            if name in fires:
                fired = fires[name] | fired
            fires[name] = fired
        return hook

    # 1. Let every ReLU note which of its units have fired.
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.ReLU):
            hooks.append(layer.register_forward_hook(make_hook(name)))
    if not hooks:
        return {}

    # 2. Show the model all test examples.
    try:
        with common.seeded(f.seed, "evaluation", data.test[0].device):
            for batch in zip(*(t.split(1000) for t in data.test)):
                model(*batch, common.on_device(f, batch[0]))
    finally:
        for hook in hooks:
            hook.remove()

    # 3. Add up the layers of each network.
    counts = {}
    for name, fired in fires.items():
        network = name.split(".")[0]
        dead, units = counts.get(network, [0, 0])
        counts[network] = [dead + (~fired).sum().item(), units + len(fired)]
    return counts


def last_change(curve):
    """The change of a curve over the last tenth of its epochs, at least one epoch.

    curve is a list with a number per epoch. Returns None if it is too short.
    """
    tenth = max(1, len(curve) // 10)
    if len(curve) <= tenth:
        return None
    return curve[-1] - curve[-1 - tenth]


# ------------------------------------------------------------- the post-mortem of any trained model

@dataclass
class PostMortem:
    """Why units of a trained model collapsed, and what to change. `print` shows the answer.

    The first entry of each pair is for units with a linear encoder, and the second for any encoder.

    count: the number of rows that were examined.
    units: the number of latent units, or None if it is unknown.
    collapsed: the number of collapsed units.
    active: the number of units that are active by the variance of their mean, or None if it is
        unknown. See own_model.ACTIVE_VARIANCE. The collapsed units are counted by their KL, so that
        the two numbers need not add up to all units.
    kl: the mean KL of each unit in nats, a list. It is empty if it is unknown.
    beta: the weight of the KL in the loss.
    eta_dec: the std of a Gaussian decoder. None for another decoder.
    likelihood: one of LIKELIHOODS.
    level: the threshold. A unit with a larger eigenvalue lowers the loss.
    eigenvalues: a pair of tensors in descending order. For a Gaussian decoder they are tau, the
        variances that further units could describe. For another decoder they are rho.
    gains: the pair of headrooms on all rows, in nats per row. For another decoder than a Gaussian
        one they are lower bounds, which are 0 for a Poisson decoder.
    held_out_gains: the gains on one half of the rows of units that are found on the other half.
    held_out_rho: the rho_1 on one half of the rows, in a direction that is found on the other half.
        None for a Gaussian decoder.
    idle_columns: the number of columns without information.
    cause: a result of `cause_of_collapse` if all rows and the held-out rows agree, "undecided" if
        they do not, and "none" if no unit collapsed.
    verdict: whether the objective or training collapsed the units, in words.
    certainty: whether the rows are enough for the verdict, in a sentence. If no unit collapsed, it
        says that every mean KL exceeds the limit.
    remedy: what to change, and why, in a few sentences.
    """
    count: int
    units: int | None
    collapsed: int
    active: int | None
    kl: list
    beta: float
    eta_dec: float | None
    likelihood: str
    level: float
    eigenvalues: tuple
    gains: tuple
    held_out_gains: tuple
    held_out_rho: tuple | None
    idle_columns: int
    cause: str = ""
    verdict: str = ""
    certainty: str = ""
    remedy: str = ""

    def answer(self):
        """The verdict, the certainty and the remedy, a line each."""
        if self.likelihood == "gaussian":
            decoder = f"eta_dec = {self.eta_dec:g}"
        else:
            decoder = f"a {DECODERS[self.likelihood]} decoder"
        return (
            f"With beta = {self.beta:g} and {decoder}, {self.verdict}.\n{self.certainty}\n"
            f"{self.remedy}"
        )

    def kl_in_words(self):
        """The KL of all units and the number of active ones, in sentences."""
        if not self.kl:
            return "The number of collapsed units was given, not counted."
        verb = "is" if self.active == 1 else "are"
        total = sum(self.kl)
        nats = f"{total:.4f}" if total < 1e6 else f"{total:.4g}"
        return (
            f"The KL is {nats} nats per row in total. By the variance of their means, "
            f"{self.active} of {self.units} units {verb} active."
        )

    def table(self):
        """The figures as a table: a list of rows of texts. The first row has the headings."""
        first = [values[0].item() for values in self.eigenvalues]
        if self.likelihood == "gaussian":
            rows = {
                "headroom (nats)": self.gains,
                "headroom, held out": self.held_out_gains,
                "tau_1": first,
            }
        else:
            rows = {"rho_1": first, "rho_1, held out": self.held_out_rho}
            if self.likelihood != "poisson":
                rows["guaranteed gain (nats)"] = self.gains
                rows["guaranteed gain, held out"] = self.held_out_gains

        table = [["", "linear encoder", "any encoder"]]
        for name, values in rows.items():
            table.append([name, *(f"{value:.4f}" for value in values)])
        return table

    def threshold_in_words(self):
        """What the first eigenvalue is compared with, and which columns do not count."""
        if self.likelihood == "gaussian":
            return (
                "A unit lowers the loss if its tau exceeds the threshold beta eta_dec^2 = "
                f"{self.level:g}."
            )
        words = f"Collapse is unstable if rho_1 exceeds beta = {self.level:g}."
        if self.likelihood == "poisson":
            words += " A Poisson decoder has no guaranteed gain."
        if self.idle_columns == 1:
            words += f" 1 {self._column_noun()} has no information and is left out."
        elif self.idle_columns:
            noun = {"column": "columns", "category": "categories"}[self._column_noun()]
            words += f" {self.idle_columns} {noun} have no information and are left out."
        return words

    def _column_noun(self):
        """What an entry of the residual belongs to."""
        return "category" if self.likelihood == "categorical" else "column"

    def __str__(self):
        parts = [self.answer(), self.kl_in_words()]
        if self.collapsed:
            table = self.table()
            widths = [max(len(text) for text in column) for column in zip(*table)]
            parts.append("")
            for row in table:
                parts.append("  ".join(text.rjust(width) for text, width in zip(row, widths)))
            parts.append(self.threshold_in_words())
        return "\n".join(parts)

    def level_headroom(self):
        """A LevelHeadroom with the verdict of this post-mortem, for pictures.draw_headroom.

        Where the KL of the units is unknown, it has the collapsed units only.
        """
        units = self.collapsed
        theta = []
        if self.kl:
            units = self.units
            if self.likelihood == "gaussian":
                kl = np.array(self.kl)
                theta = _equivalent_variances(kl, self.units - self.collapsed, self.level)
        tau, tau_any = [values[:units].tolist() for values in self.eigenvalues]
        return _ExaminedLevel(
            self,
            units=units,
            collapsed=self.collapsed,
            headroom=self.gains[0],
            headroom_any=self.gains[1],
            level=self.level,
            tau=tau,
            tau_any=tau_any,
            theta=theta,
            likelihood=self.likelihood,
        )


class _ExaminedLevel(LevelHeadroom):
    """The LevelHeadroom of a PostMortem, whose words it has."""

    def __init__(self, result, **fields):
        super().__init__(**fields)
        self._result = result

    def cause(self):
        return self._result.cause

    def verdict(self):
        return self._result.verdict


def examine(
    halves,
    sizes,
    collapsed,
    beta,
    likelihood="gaussian",
    eta_dec=1.0,
    units=None,
    kl=(),
    active=None,
):
    """The PostMortem of a model, from the moments of two halves of its rows.

    halves are [ResidualMoments of one half, ResidualMoments of the other], and sizes are their
    numbers of rows. The last entry of u is the constant 1. eta_dec is that of a Gaussian decoder.
    For the other arguments see PostMortem. Raises ValueError if a moment or a figure is not finite,
    or if a column has a residual but no information.
    """
    moments = join_halves(halves, sizes)
    _check_moments(moments, kl)
    parts = _parts(moments)
    decoder = {"beta": beta, "likelihood": likelihood, "eta_dec": eta_dec}

    # 1. The eigenvalues. The first ones say whether the collapse with another decoder is stable.
    held_out_rho = None
    unstable = ("", "")
    if likelihood == "gaussian":
        threshold = gain_threshold(beta=beta, weight=1, std=eta_dec)
        eigenvalues = tuple(theory.spectrum(part) for part in parts)
    else:
        eta_dec = None
        threshold = beta
        eigenvalues = tuple(instability_ratios(part, moments.fisher) for part in parts)
        held_out_rho = _held_out_rho(halves, moments.fisher)
        largest = [rho[0].item() for rho in eigenvalues]
        unstable = (instability(*largest, threshold), instability(*held_out_rho, threshold))

    # 2. The gains.
    gains = _gains_on_all_rows(parts, collapsed, **decoder)
    held_out_gains = _gains_on_held_out_rows(halves, collapsed, **decoder)
    result = PostMortem(
        count=sum(sizes),
        units=units,
        collapsed=collapsed,
        active=active,
        kl=list(kl),
        beta=beta,
        eta_dec=eta_dec,
        likelihood=likelihood,
        level=threshold,
        eigenvalues=eigenvalues,
        gains=gains,
        held_out_gains=held_out_gains,
        held_out_rho=held_out_rho,
        idle_columns=0 if moments.fisher is None else int((_diagonal(moments.fisher) == 0).sum()),
    )
    _check_figures(result)

    # 3. The cause, and the words.
    _judge(result, unstable)
    if result.cause not in ("none", "objective") and _mean_decides(moments, result):
        result.remedy = REMEDY_OF_THE_MEAN
    return result


def _parts(moments):
    """T and F of ResidualMoments."""
    return linear_part(moments.cross, moments.moment), moments.squares


def _mean_decides(moments, result):
    """Whether the objective would be the cause if the residual had the mean 0 in each column.

    moments are those of all rows.
    """
    mean = moments.cross[:, -1]
    centred = moments._replace(
        cross=moments.cross - torch.outer(mean, moments.moment[-1]),
        squares=moments.squares - torch.outer(mean, mean),
    )
    parts = _parts(centred)
    gains = _gains_on_all_rows(
        parts,
        result.collapsed,
        beta=result.beta,
        likelihood=result.likelihood,
        eta_dec=result.eta_dec,
    )
    unstable = ""
    if result.likelihood != "gaussian":
        rhos = [instability_ratios(part, moments.fisher)[0].item() for part in parts]
        unstable = instability(*rhos, result.level)
    return cause_of_collapse(*gains, unstable) == "objective"


def join_halves(halves, sizes):
    """The ResidualMoments of all rows, from those of two halves with these numbers of rows."""
    means = {}
    for name in ResidualMoments._fields:
        parts = [getattr(half, name) for half in halves]
        means[name] = None
        if parts[0] is not None:
            means[name] = sum(size * part for size, part in zip(sizes, parts)) / sum(sizes)
    return ResidualMoments(**means)


def _diagonal(fisher):
    """The diagonal (D,) of H, which is given as a diagonal (D,) or as a matrix (D, D)."""
    return fisher if fisher.ndim == 1 else fisher.diag()


def _check_moments(moments, kl):
    """Raise ValueError if there can be no verdict from these moments."""
    names = {"cross": "E[r u^T]", "moment": "E[u u^T]", "squares": "E[r r^T]", "fisher": "H"}
    for name, symbol in names.items():
        values = getattr(moments, name)
        if values is not None and not values.isfinite().all():
            raise ValueError(
                f"the moment {symbol} of the model is not finite, so that there is no verdict; if "
                "training diverged, try a smaller learning rate first"
            )
    for unit, nats in enumerate(kl):
        if not math.isfinite(nats):
            raise ValueError(
                f"the mean KL of unit {unit} (counted from 0) is not finite; if training diverged, "
                "try a smaller learning rate first"
            )
    if moments.fisher is None:
        return

    information = _diagonal(moments.fisher)
    if not (information > 0).any():
        raise ValueError("no column has any information, because the decoder is certain of all")
    is_wrong = (information == 0) & (moments.squares.diag() > 0)
    if is_wrong.any():
        column = int(is_wrong.nonzero()[0])
        raise ValueError(
            f"column {column:,} (counted from 0) has no information in any row, but a residual; "
            "the decoder's means must not round to exactly 0 or 1"
        )


def _check_figures(result):
    """Raise ValueError if a figure of a PostMortem is not finite."""
    figures = {
        "the threshold": [result.level],
        "an eigenvalue": torch.cat(result.eigenvalues).tolist(),
        "the headroom": result.gains,
        "the held-out headroom": result.held_out_gains,
    }
    for name, numbers in figures.items():
        if not all(map(math.isfinite, numbers)):
            objective = f"beta = {result.beta:g}"
            if result.eta_dec is not None:
                objective += f" and eta_dec = {result.eta_dec:g}"
            raise ValueError(f"{name} is not finite for {objective}, wants less extreme values")


def _held_out_rho(halves, fisher):
    """The `held_out_rho` of a PostMortem. fisher is H of all rows."""
    rhos = []
    for pairs in held_out_parts(halves):
        ratios = mean_ratios(pairs, fisher)
        rhos.append(ratios[0].item() if len(ratios) else 0.0)
    return tuple(rhos)


def _gaussian_scale(likelihood, eta_dec):
    """(scale, std) of the Gaussian decoder that guarantees the gain of this one.

    A decoder whose curvature is at most B gains at least as much as a Gaussian one whose variance
    is 1 / B, and whose residual is r / B. The residual is multiplied by the scale.
    """
    if likelihood == "gaussian":
        return 1, eta_dec
    scale = 1 / CURVATURE_BOUNDS[likelihood]
    return scale, scale**0.5


def _gains_on_all_rows(parts, collapsed, beta, likelihood, eta_dec):
    """The `gains` of a PostMortem. parts are T and F."""
    if likelihood == "poisson" or not collapsed:
        return 0.0, 0.0
    scale, std = _gaussian_scale(likelihood, eta_dec)
    gains = []
    for part in parts:
        tau = theory.spectrum(scale**2 * part)
        gains.append(gain_of_units(tau, collapsed, beta=beta, weight=1, std=std))
    # A linear encoder is one of any encoders. T keeps some noise of the draws of z.
    return gains[0], max(gains)


def _gains_on_held_out_rows(halves, collapsed, beta, likelihood, eta_dec):
    """The `held_out_gains` of a PostMortem."""
    if likelihood == "poisson" or not collapsed:
        return 0.0, 0.0
    scale, std = _gaussian_scale(likelihood, eta_dec)
    objective = {"beta": beta, "weight": 1, "std": std}
    regressions = [(scale * half.cross, half.moment) for half in halves]
    linear_gains = []
    for ridge in RIDGES:
        linear_gains.append(held_out_gain(regressions, ridge, collapsed, **objective))
        # A ridge lowers the eigenvalues. If no unit gains anything, none does at a larger ridge.
        if linear_gains[-1] == 0:
            break

    # A unit with any encoder can read r itself. The regression of r on r is exact.
    products = [scale**2 * half.squares for half in halves]
    identities = [(product, product) for product in products]
    any_gain = held_out_gain(identities, 0, collapsed, **objective)
    return max(linear_gains), any_gain


def _judge(result, unstable):
    """Set the cause, the verdict, the certainty and the remedy of a PostMortem.

    unstable is a pair of results of `instability`, on all rows and on the held-out rows.
    """
    causes = (
        cause_of_collapse(*result.gains, unstable[0]),
        cause_of_collapse(*result.held_out_gains, unstable[1]),
    )
    result.cause = causes[0] if causes[0] == causes[1] else "undecided"
    if not result.collapsed:
        result.cause = "none"
    result.verdict = _verdict_of_both(result, causes, unstable[0])
    result.certainty = _certainty(result)
    result.remedy = _remedy(result)


def _verdict_of_both(result, causes, unstable):
    """The verdict of all rows and of the held-out rows, in words.

    causes is a pair of results of `cause_of_collapse`, on all rows and on the held-out rows.
    unstable is a result of `instability` on all rows.
    """
    if result.cause != "undecided":
        return verdict(
            result.units,
            result.collapsed,
            nats=result.gains[0],
            nats_any=result.gains[1],
            unstable=unstable,
            likelihood=result.likelihood,
        )

    words = collapse_in_words(result.units, result.collapsed)
    only_any_encoder = "training" not in causes
    if result.likelihood == "gaussian" and only_any_encoder:
        pronoun = "it" if result.collapsed == 1 else "them"
        return (
            f"{words}: with a linear encoder, reviving {pronoun} would not lower the loss; there "
            "are too few rows to decide whether it would with a richer encoder"
        )
    return (
        f"{words}: there are too few rows to decide whether because of the objective or of training"
    )


def _certainty(result):
    """The `certainty` of a PostMortem."""
    if result.cause == "none":
        return f"The mean KL of every unit exceeds {theory.ACTIVE} nats."
    held_out = "Units found on one half of the rows and measured on the other half"
    if result.cause == "undecided":
        return (
            f"{held_out} lead to another verdict, so the {result.count:,} rows are too few."
        )
    return (
        f"{held_out} lead to the same verdict, so the {result.count:,} rows are enough for it."
    )


# The remedy if only the mean of the residual speaks against the objective.
REMEDY_OF_THE_MEAN = (
    "First mend the mean of the residual, because without it the objective would be the cause. A "
    "bias of the decoder corrects a mean at no cost in KL, so that no unit is needed for it. Check "
    "that the decoder's output has the scale of x, that the residual is the target minus the "
    "reconstruction, and that training has converged."
)

# The order in which to try the remedies of training.
TRAINING_REMEDIES = (
    "a smaller initial std of the encoder (--start_std in the scripts of this project), a warm-up "
    "of beta from 0 (--beta_warmup), more epochs, or another learning rate"
)


def _remedy(result):
    """The `remedy` of a PostMortem."""
    if result.cause == "none" and result.active == 0:
        return (
            "But no unit is active by the variance of its mean, so that the posterior hardly "
            "depends on x. Check that log_var is the logarithm of the variance, and train longer."
        )
    if result.cause == "none":
        return "Nothing needs to change."
    if result.cause == "undecided":
        return "Examine more rows, at best all training rows, before you change anything."
    if result.cause == "training":
        return (
            "Check two lines of your program first. Is beta that of your loss? With a mean over D "
            "columns and a KL of weight w, it is w D, or w D / 2 for mse_loss. Does the gradient "
            "of the reconstruction loss reach the encoder? It does if z is mean + std * noise or a "
            "draw of rsample(), and not with sample(). If both are right, beta need not change, "
            "because the loss would fall at this beta. Count the dead units of ReLU layers, which "
            "fire for no example and get no gradient. If most are dead, start anew with a smaller "
            f"learning rate. Otherwise try in this order: {TRAINING_REMEDIES}. If the units stay "
            "collapsed, your networks may be unable to express them: a further unit has a weight "
            "for each column, which a purely convolutional decoder lacks."
        )
    if result.cause == "encoder":
        return (
            f"Try the remedies of training first: {TRAINING_REMEDIES}. If the units stay "
            "collapsed, make the encoder wider or deeper, because a linear encoder cannot use them."
        )
    if result.cause == "unstable":
        return (
            "Train longer, because a small step lowers the loss. How far it falls is not known in "
            "advance. If the units stay collapsed, the gain is probably small. A smaller beta "
            "raises it, and so does a weaker decoder, if it reads x."
        )
    if result.likelihood == "gaussian":
        return _remedy_of_gaussian_objective(result)
    return _remedy_of_other_objective(result)


def _remedy_of_gaussian_objective(result):
    """The remedy where the objective of a Gaussian decoder collapsed the units."""
    largest = result.eigenvalues[1][0].item()
    if largest <= 0:
        return (
            "Nothing needs to change: the residual is 0, so that the collapsed units have nothing "
            "to describe."
        )
    if largest > result.level:
        return (
            "More training hardly helps these units, because they gain at most "
            f"{theory.ACTIVE} nats. A smaller beta or eta_dec would raise their gain."
        )

    beta = largest / result.eta_dec**2
    eta_dec = (largest / result.beta)**0.5
    # The root mean squared residual per column: about what a decoder would learn as its eta_dec.
    learned = result.eigenvalues[1].mean().item()**0.5
    if learned < eta_dec:
        advice = (
            "If eta_dec is fixed, you may let the decoder learn it: it would become about "
            f"{learned:.4g}, which is low enough."
        )
    else:
        advice = f"A learned eta_dec would be about {learned:.4g}, which is not low enough."
    return (
        "More training of this model hardly revives collapsed units. For it, a collapsed unit with "
        f"any encoder lowers the loss only if beta is below {beta:.4g}, which is "
        f"{beta / result.beta:.2g} times its value, or, at this beta, if eta_dec is below "
        f"{eta_dec:.4g}. {advice}"
    )


def _remedy_of_other_objective(result):
    """The remedy where the objective of another decoder collapsed the units."""
    rho = result.eigenvalues[1][0].item()
    if rho <= 0:
        return (
            "Nothing needs to change: the residual is 0, so that the collapsed units have nothing "
            "to describe."
        )
    return (
        "More training of this model hardly revives collapsed units. For it, a small step out of "
        f"collapse lowers the loss only if beta is below {rho:.4g}, which is rho_1 of any encoder "
        f"and {rho / result.beta:.2g} times the value of beta."
    )


def count_collapsed(kl):
    """The number of collapsed units, from a list of the mean KL of each unit in nats."""
    return sum(nats <= theory.ACTIVE for nats in kl)


# --------------------------------------------------------------- the post-mortem in a training loop

def post_mortem(
    encode,
    decode,
    loader,
    beta=1.0,
    likelihood="gaussian",
    eta_dec=1.0,
    eta_enc=1.0,
    conditional=False,
    draws=8,
    device=None,
):
    """The PostMortem of a VAE or a CVAE, from the functions of its training loop.

    The loss is -log p(x|z) + beta KL(q(z|x) || p(z)), per example. The likelihood is summed over
    the columns of x, and the KL over the units. losses.py says which eta_dec and beta belong to
    other forms of the loss. For example, torch's mse_loss with its mean over D columns and a KL of
    weight w have eta_dec = 1 and beta = w D / 2. The prior p(z) is N(0, eta_enc^2 I).

    Call model.eval() first, so that dropout and batch norm do what they do after training. x is the
    target of the decoder. For a CVAE it is what this project calls y.

    encode: encode(x) returns the mean and the log variance of q(z|x), each (B, ...), or a
        torch.distributions.Normal, which may be inside a torch.distributions.Independent. Units
        of more than one dimension are flattened.
    decode: decode(z) returns the mean of p(x|z): the reconstruction for a Gaussian decoder, the
        probabilities of a 1 for bernoulli, the rates for poisson. z has the shape of the mean. The
        result has as many numbers per example as x has. For categorical it has the probabilities
        (B, ..., K) of K categories.
    loader: an iterable of batches, which is read once. A batch is x (B, ...), or a tuple or list
        that begins with x. What follows, such as labels, is ignored. For categorical x has the
        codes 0 to K - 1.
    likelihood: one of LIKELIHOODS.
    eta_dec: the std of a Gaussian decoder. If the model has learned a variance, it is the root of
        the latter. A variance that differs between examples or columns is not covered.
    conditional: whether what follows x in a batch are conditions, tensors (B, ...). encode then
        takes (x, *conditions), and decode takes (z, *conditions).
    draws: the mean of p(x|z) is estimated twice, each time over this number of draws of z.
    device: where batches are moved to. None leaves them where they are.

    The input u of a linear encoder has the columns of x, or indicators of its categories, and those
    of the conditions. A condition counts as the numbers that it has, so that one-hot vectors are
    better than codes. Each example is in one of two halves, by chance. The draws have a fixed seed,
    and the generators of the CPU and of CUDA are restored afterwards.

    Raises ValueError, which says what to do, for unknown likelihoods, shapes that do not fit,
    numbers that are not allowed or not finite, fewer than 2 rows, or more than 8,000 columns.
    """
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood is {likelihood!r}, wants one of {', '.join(LIKELIHOODS)}")
    beta, eta_dec, eta_enc = float(beta), float(eta_dec), float(eta_enc)
    for name, number in (("beta", beta), ("eta_dec", eta_dec), ("eta_enc", eta_enc)):
        if not 0 < number < math.inf:
            raise ValueError(f"{name} is {number:g}, wants a finite number above 0")

    sums, posterior = own_model.measure(
        encode,
        decode,
        loader,
        likelihood=likelihood,
        conditional=conditional,
        draws=draws,
        device=device,
    )
    kl = posterior.kl(eta_enc)
    return examine(
        [ResidualMoments(**moments) for moments in sums.moments()],
        sums.sizes,
        collapsed=count_collapsed(kl),
        beta=beta,
        likelihood=likelihood,
        eta_dec=eta_dec,
        units=len(kl),
        kl=kl,
        active=posterior.active(eta_enc),
    )
