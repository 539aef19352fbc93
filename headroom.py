"""Why did latent units collapse: because of the objective, or because of training?

A unit is collapsed if its mean KL is at most 0.01 nats. Its posterior then equals its prior, and
the decoder learns nothing from it. Collapse has two possible causes, with different remedies.
Either no use of the unit would lower the loss, or training did not find the use that would. To
decide between them, this module computes how far the loss of a trained model would fall if its
collapsed units were used in the best linear way. The model may have any encoder and any decoder.

Take one latent level with a learnable posterior q(z|u) and a Gaussian
p(t|z) = N(mean(z), std^2 I). These are its terms:

  u       the input of the level's encoder, with a constant 1 appended
  t       the target, which the latent units describe
  r       the residual, t - E_q(z|u)[mean(z)]: the part of t that the trained model leaves
          unexplained
  T       the second moment of the best linear prediction of r from u:
          T = C A^+ C^T, where C = E[r u^T] and A = E[u u^T] over the training examples
  tau_i   the eigenvalues of T in descending order, the variance that an i-th further linear
          unit could explain
  level   the variance above which a linear unit gains more than its KL costs:
          level = beta std^2 / weight
  G_k     the headroom of k units, in nats of the negative beta-ELBO per example:

          G_k = beta / 2 sum (tau_i / level - 1 - ln(tau_i / level)),

          summed over those i <= k for which tau_i > level

Here the loss of the level is weight (-log p(t|z)) + beta KL, and std is eta_dec. The encoder of a
VAE reads x, and its target is x. The encoder of a CVAE reads x and y, and its target is y. Both
have weight 1, or 2 with --released_objective. The encoder of level 2 in a two-level HVAE reads a
draw of z1, and its target is the same draw. Its KL has the weight beta_2, and -log p(z1|z2) has
the weight beta_1, so that its level is beta_2 eta_dec^2 / beta_1.

Let k be the number of collapsed units. Then G_k is exactly the gain of k further units whose
encoder means are linear in u, whose stds are learnable, and whose linear decoder is added to
mean(z), at the best choice of all three. The rest of the model does not change. The formula is
the reverse water-filling of T. Theorem 2 of Dang et al. (2024, arXiv 2306.05023) does the same
with its matrix E.

  G_k <= 0.01 nats    The objective collapsed the units. No linear use of them gains more.
  G_k >  0.01 nats    Training collapsed the units, or the networks cannot express their use.

G_k is a lower bound, because nonlinear units may gain more.

The file has three parts. The first is the theory, for moments C and A from any source. The second
is the measurement on a trained model. The third has two quantities that point to the cause if it
was training: the number of dead ReLU units, and how far the loss still fell at the end.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import common
import numpy as np
import torch
from torch import nn

import theory

# The mean of p(t|z) is averaged over this number of draws of z per example.
DRAWS = 8


# ----------------------------------------------------------------------------------- the theory

def pay_level(beta, weight, std):
    """The variance above which a linear unit gains more than its KL costs: beta std^2 / weight.

    beta is the weight of the KL in the loss, weight that of -log p(t|z), and std the std of
    p(t|z). Where weight is 0, no unit ever gains anything, and the level is infinite.
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
    """G_k for k = count: the gain of k further linear units, in nats per example.

    tau (D,) are the eigenvalues of T in descending order, float64. For the other arguments see
    `pay_level`. A result of 0 means that no further linear unit lowers the loss.
    """
    level = pay_level(beta, weight, std)
    tau = tau[:count]
    tau = tau[tau > level]
    if not len(tau):
        return 0.0

    # This form of the formula also holds for beta = 0, where the level is 0.
    gains = tau - level - torch.xlogy(level, tau / level)
    return (weight / (2 * std**2) * gains.sum()).item()


def idle_units(cross, moment, count, beta, weight, std, ridge=0):
    """The units whose gain is G_k: at most `count` units, those whose tau is above the level.

    cross (D, p) and moment (p, p) are C and A, float64. A ridge is added to the variances of u.
    The units then rely less on directions in which u hardly varies, and do better on other rows.

    Returns (encoder (k, p), sigma (k,), decoder (D, k)), float64. In stds of the prior, q(z|u) is
    N(encoder u, diag sigma^2). The mean of p(t|z) gains the term decoder z.
    """
    level = pay_level(beta, weight, std)
    white = theory.whitening(moment, ridge)
    explained = cross @ white
    tau, directions = theory.modes(explained @ explained.T)

    above = (tau > level) & (torch.arange(len(tau)) < count)
    tau = tau[above]
    directions = directions[:, above]

    # The share of its mode's variance that a unit leaves unexplained.
    noise_share = level / tau
    scale = (1 - noise_share).sqrt() / tau.sqrt()
    encoder = scale[:, None] * directions.T @ explained @ white.T
    return encoder, noise_share.sqrt(), directions * (tau - level).sqrt()


def gain_on_rows(units, cross, moment, beta, weight, std):
    """The gain of units on rows with these moments, in nats per example; it may be negative.

    The gain is the fall of the squared error's part of the loss, minus the cost of the KL. units
    are a result of `idle_units`, perhaps from other rows. cross (D, p) and moment (p, p) are C
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
        units = idle_units(
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


def verdict(units, collapsed, nats):
    """Whether the objective or training collapsed the units of a level, in words.

    units is the number of all units of the level, or None if unknown. collapsed is the number of
    collapsed ones, and nats is their headroom.
    """
    words = collapse_in_words(units, collapsed)
    if not collapsed:
        return words
    if nats > theory.ACTIVE:
        pronoun = "it" if collapsed == 1 else "them"
        return (
            f"{words} because of training: reviving {pronoun} would lower the loss by at least "
            f"{nats:.2g} nats"
        )
    return f"{words} because of the objective"


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
    """The residual r of one level, for a batch of B examples.

    A model's method `residuals(*batch, f, draws)` returns {level suffix: Residual}, with one entry
    for each level that has a learnable posterior and a Gaussian target. The suffix is "" in a
    one-level model and "_2" for level 2. draws is the number of draws of z per example where the
    expectation over z has no closed form.

    encoder_input: the input of the level's encoder without the constant 1, a tuple of tensors
        (B, ...). The last one is the target.
    mean_parts: the parts whose sum is the mean of p(t|z), expected over q(z|u). This is a list of
        (layer, hidden (B, h)). A part is layer(hidden) for an nn.Linear, or hidden itself if layer
        is None. Because of this split, u is multiplied with the narrow hidden, not with the wide
        mean.
    beta: the weight of the KL in the loss. Like weight and std, a number or a 0-d tensor.
    weight: the weight of -log p(t|z) in the loss.
    std: the std of p(t|z).
    """
    encoder_input: tuple
    mean_parts: list
    beta: float
    weight: float
    std: float


class ResidualMoments(NamedTuple):
    """The moments of one level over all training rows, and the constants of its loss.

    cross: C = E[r u^T], (D, p), float64, on the CPU.
    moment: A = E[u u^T], (p, p), float64, on the CPU.
    beta: the weight of the KL in the loss.
    weight: the weight of -log p(t|z) in the loss.
    std: the std of p(t|z).
    """
    cross: torch.Tensor
    moment: torch.Tensor
    beta: float
    weight: float
    std: float


@dataclass
class LevelHeadroom:
    """The headroom of one level of a trained model.

    units: the number of latent units.
    collapsed: the number of collapsed units.
    headroom: G_k for k = collapsed, in nats per training example.
    level: the variance above which a linear unit gains more than its KL costs. None is infinity.
    tau: the largest eigenvalues of T in descending order, at most one per unit.
    theta: for each active unit, the variance that a linear unit of the same KL would describe, in
        descending order.
    """
    units: int
    collapsed: int
    headroom: float
    level: float | None
    tau: list
    theta: list

    def verdict(self):
        """Whether the objective or training collapsed the units, in words."""
        return verdict(self.units, self.collapsed, self.headroom)


def measure(model, f, data, metrics, examples):
    """The headroom of each level with a learnable posterior and a Gaussian target.

    f is the model's setting, and data is a datasets.Data. metrics and examples are the results of
    report.evaluate, which determine the collapsed units. Returns {"z": LevelHeadroom} for a
    one-level model, and {"z2": LevelHeadroom} for a two-level one.
    """
    with common.seeded(f.seed, "evaluation", data.train[0].device):
        moments_of_levels = residual_moments(model, f, data)

    headrooms = {}
    for level, moments in moments_of_levels.items():
        name = "z" + level.removeprefix("_")
        kl = examples[f"unit_kl{level}"].mean(0)
        headrooms[name] = _level_headroom(moments, kl, metrics[f"AU_kl{level}"])
    return headrooms


def _level_headroom(moments, kl, active):
    """A LevelHeadroom from ResidualMoments, the mean KL of each unit (d,) and the active units."""
    cross, moment, *weights = moments
    tau = theory.spectrum(linear_part(cross, moment))[:len(kl)]
    level = pay_level(*weights)
    collapsed = len(kl) - active

    theta = []
    if level < math.inf:
        active_kl = np.sort(kl)[::-1][:active]
        # A model that has nearly diverged can have KLs whose exponential exceeds float64.
        with np.errstate(over="ignore"):
            theta = np.nan_to_num(level * np.exp(2 * active_kl)).tolist()

    return LevelHeadroom(
        units=len(kl),
        collapsed=collapsed,
        headroom=gain_of_units(tau, collapsed, *weights),
        level=level if level < math.inf else None,
        tau=tau.tolist(),
        theta=theta,
    )


@torch.no_grad()
def residual_moments(model, f, data):
    """C and A of each level, over all training rows: {level suffix: ResidualMoments}.

    The draws of z come from the default generator. The sums over chunks are in float64. The
    products within a chunk of a few thousand rows are in the data's precision, but on CUDA they
    are in float64, too.
    """
    x = data.train[0]
    # The objective's scalars are 0-d: in float64 they do not change the precision of the data.
    f = common.on_device(f, x[:0].double())
    width = max(getattr(model, "widest_layer", 0), *(t[0].numel() for t in data.train))
    chunk = max(1, 2**26 // (width * x.element_size() * DRAWS))

    # Add up the products with u, chunk by chunk.
    sums = {}
    residuals = {}
    for start in range(0, len(x), chunk):
        batch = [t[start:start + chunk] for t in data.train]
        for level, residual in model.residuals(*batch, f, DRAWS).items():
            products = _products_with_input(residual, batch)
            if level not in sums:
                sums[level] = [0] * len(products)
            for i, product in enumerate(products):
                sums[level][i] = sums[level][i] + product.double()
            # The layers, the weights and the std are the same for all chunks.
            residuals[level] = residual

    # Put C together from them.
    moments = {}
    for level, residual in residuals.items():
        products = [total.cpu() / len(x) for total in sums[level]]
        if len(products) > len(residual.mean_parts):
            moment = products.pop()
        else:
            moment = data.moment_with_one
        moments[level] = ResidualMoments(
            cross=_cross_moment(residual, products, moment),
            moment=moment,
            beta=float(residual.beta),
            weight=float(residual.weight),
            std=float(residual.std),
        )
    return moments


def _products_with_input(residual, batch):
    """hidden^T u of each of the residual's mean_parts, summed over a batch: a list of (h, p).

    A last entry is u^T u (p, p), unless the encoder reads the data, whose moment is known.
    """
    inputs = residual.encoder_input
    one = torch.ones_like(batch[0][:, :1])
    u = torch.cat([*inputs, one], dim=1)
    if u.is_cuda:
        # CUDA may round products in float32 to TF32.
        u = u.double()

    products = []
    for _, hidden in residual.mean_parts:
        products.append(hidden.to(u.dtype).T @ u)

    reads_data = len(inputs) == len(batch) and all(a is b for a, b in zip(inputs, batch))
    if not reads_data:
        products.append(u.T @ u)
    return products


def _cross_moment(residual, products, moment):
    """C = E[r u^T] = E[t u^T] - E[mean u^T], (D, p).

    products are E[hidden u^T] (h, p) for each of the residual's mean_parts. The target is the last
    input of the encoder. So E[t u^T] is in the rows of moment just before the last one, and that
    one belongs to the constant 1.
    """
    dim_t = residual.encoder_input[-1].shape[1]
    cross = moment[-1 - dim_t:-1]
    for (layer, _), product in zip(residual.mean_parts, products):
        if layer is not None:
            product = layer.weight.double().cpu() @ product
            if layer.bias is not None:
                product = product + layer.bias.double().cpu()[:, None] * moment[-1]
        cross = cross - product
    return cross


# ------------------------------------------------------------------------- what points to the cause

@torch.no_grad()
def dead_units(model, f, data):
    """The hidden ReLU units that fire for no test example: {network: [dead units, all units]}.

    A network is a direct child of the model. A channel of a convolution counts as one unit.
    """
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
