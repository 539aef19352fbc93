"""The loss of a VAE as PyTorch spells it, in the terms of this project.

People write the loss of a VAE as a reconstruction loss plus a weighted KL, and each of the two may
be a sum or a mean. The theory speaks of a likelihood, of eta_dec and of beta. Two facts connect
them, for D columns and k latent units:

- A mean over the D columns is a sum over them, divided by D. Multiplying the whole loss by D does
  not change its minimum. So the mean with the KL weight w is the sum with the KL weight w D.
- The squared error (x - m)^2 without the factor 1/2 is -log p(x|z) of a Gaussian decoder with
  eta_dec = sqrt(1/2), except for a constant. Half of it belongs to eta_dec = 1. Only beta eta_dec^2
  decides which units collapse. So mse_mean, too, is eta_dec = sqrt(1/2) with beta = w D. The table
  has eta_dec = 1 with half of that beta.

    loss                   likelihood    eta_dec      beta
    mse_mean               gaussian      1            w D / 2
    mse_sum                gaussian      sqrt(1/2)    w
    bce_mean               bernoulli     -            w D
    bce_sum                bernoulli     -            w
    ce_mean                categorical   -            w D
    ce_sum                 categorical   -            w
    gaussian_nll           gaussian      learned      w D
    gaussian_nll_sum       gaussian      learned      w

All losses are means over the rows of a batch. gaussian_nll is torch.nn.functional.gaussian_nll_loss
with its default, a mean over the columns, and one learned variance for all of them. For ce_mean, D
is the number of tokens of an example. If the KL is a mean over the k units, too, beta is divided by
k.

In this module, `f` is a setting of predict_collapse.py.
"""
import dataclasses
import math
from dataclasses import dataclass

import common

import headroom


@dataclass
class Loss:
    """What a reconstruction loss amounts to.

    likelihood: the kind of decoder, one of headroom.LIKELIHOODS.
    eta_dec: the std of a Gaussian decoder, "learned", or None for another decoder.
    is_mean: whether the loss is a mean over the columns.
    beta: the beta for a KL weight of 1, and the nats in one unit of the loss. If is_mean, it is
        multiplied by the number of columns.
    """
    likelihood: str
    eta_dec: float | str | None
    is_mean: bool
    beta: float = 1.0


LOSSES = {
    "mse_mean": Loss("gaussian", eta_dec=1.0, is_mean=True, beta=0.5),
    "mse_sum": Loss("gaussian", eta_dec=math.sqrt(0.5), is_mean=False),
    "bce_mean": Loss("bernoulli", eta_dec=None, is_mean=True),
    "bce_sum": Loss("bernoulli", eta_dec=None, is_mean=False),
    "ce_mean": Loss("categorical", eta_dec=None, is_mean=True),
    "ce_sum": Loss("categorical", eta_dec=None, is_mean=False),
    "gaussian_nll": Loss("gaussian", eta_dec="learned", is_mean=True),
    "gaussian_nll_sum": Loss("gaussian", eta_dec="learned", is_mean=False),
}


def check_flags(settings):
    """End the program if flags contradict --loss, or if they need a --loss that is missing."""
    f = settings[0]
    default = type(f)
    if f.loss == "none":
        for name in ("kl_weight", "kl_reduction"):
            if any(getattr(g, name) != getattr(default, name) for g in settings):
                common.stop(f, f"--{name}: also wants --loss, such as --loss mse_mean")
        return

    replaced = ["likelihood", "beta"]
    # The learned number is an input of a post-mortem.
    if not (f.residual and LOSSES[f.loss].eta_dec == "learned"):
        replaced.append("eta_dec")
    elif any(g.eta_dec == default.eta_dec for g in settings):
        common.stop(
            f, f"--loss: {f.loss} with --residual also wants --eta_dec, the number that was learned"
        )
    for name in replaced:
        if any(getattr(g, name) != getattr(default, name) for g in settings):
            weight = "; give --kl_weight instead" if name == "beta" else ""
            common.stop(
                f, f"--{name}: cannot be combined with --loss {f.loss}, which determines it{weight}"
            )
    if f.kl_reduction == "mean" and not f.mean and not all(g.d_1 for g in settings):
        common.stop(f, "--kl_reduction: got mean, also wants --d_1, the number of units")
    for g in settings:
        if g.model == "hvae":
            common.stop(f, "--loss: cannot be combined with --model hvae, which has two betas")
        is_mse = f.loss.startswith("mse")
        if g.model == "cvae" and not is_mse and not f.residual:
            common.stop(f, f"--loss: got {f.loss}, wants mse_mean or mse_sum for --model cvae")


def with_likelihood(f):
    """The setting with the likelihood and the eta_dec of its --loss."""
    if f.loss == "none":
        return f
    loss = LOSSES[f.loss]
    eta_dec = f.eta_dec
    if loss.eta_dec is not None and not (f.residual and loss.eta_dec == "learned"):
        eta_dec = loss.eta_dec
    return dataclasses.replace(f, likelihood=loss.likelihood, eta_dec=eta_dec)


def with_beta(f, columns, units):
    """The setting with the beta of its --loss.

    columns is the number of columns that the decoder describes. units is the number of latent
    units, or 0 if it is unknown and the KL is a sum over them.
    """
    if f.loss == "none":
        return f
    beta = f.kl_weight * _beta_of_weight_1(f, columns, units)
    # 0.1 * 3 is 0.3 in decimal arithmetic. Binary arithmetic gives 0.30000000000000004.
    return dataclasses.replace(f, beta=float(f"{beta:.14g}"))


def nats_per_unit(f, columns):
    """The nats of -log p(x|z) in one unit of the reconstruction loss of --loss."""
    loss = LOSSES[f.loss]
    return loss.beta * columns if loss.is_mean else loss.beta


def _beta_of_weight_1(f, columns, units):
    """The beta that a KL weight of 1 amounts to."""
    beta = nats_per_unit(f, columns)
    if f.kl_reduction == "mean":
        beta = beta / units
    return beta


def in_words(settings, columns, units):
    """A sentence on what the --loss of settings with a beta amounts to.

    The settings differ in their KL weight. For columns and units see `with_beta`.
    """
    f = settings[0]
    loss = LOSSES[f.loss]
    name = headroom.DECODERS.get(loss.likelihood, "Gaussian")
    decoder = f"a {name} decoder"
    if loss.eta_dec == "learned":
        decoder += " with a learned eta_dec"
    elif loss.eta_dec is not None:
        decoder += f" with eta_dec = {loss.eta_dec:.4g}"

    weights = ", ".join(f"{g.kl_weight:g}" for g in settings)
    betas = ", ".join(f"{g.beta:.6g}" for g in settings)
    reasons = []
    if loss.is_mean:
        reasons.append(
            f"a mean over {columns:,} columns with weight 1 is their sum with weight {columns:,}"
        )
    if loss.beta != 1:
        reasons.append("the squared error is twice the loss of a decoder with eta_dec = 1")
    if f.kl_reduction == "mean":
        reasons.append(f"a KL averaged over {units:,} units is their sum with weight 1/{units:,}")
    reason = f" ({'; '.join(reasons)})" if reasons else ""
    return (
        f"The loss {f.loss} with KL weight {weights} amounts to {decoder} and beta = {betas}"
        f"{reason}."
    )


def decoder_flag(f):
    """The flag that has chosen the decoder, as text: "--likelihood bernoulli" or "--loss bce_sum".

    A --loss determines the likelihood. Without both flags the decoder is --likelihood gaussian.
    """
    return f"--likelihood {f.likelihood}" if f.loss == "none" else f"--loss {f.loss}"
