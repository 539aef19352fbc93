"""What a linear VAE, CVAE and two-level HVAE converge to (Dang et al. 2024, arXiv 2306.05023, theorems 1, 2, 3 and 5; the optimal
losses and the collapse thresholds follow from them), and how far a trained one is from it.

In this order: the spectra of data; the closed forms; the same quantities of a model as it is; headroom, what more units would
gain on top of any trained model; both side by side, and where they differ; `verify`, which checks a closed form by brute
force. All in float64; moments are not centred. The closed forms take settings as numbers or as tensors (...,) of many and give
{name: (..., d)}, per unit in the order of theta:
  theta        what the theorem calls so: of each mode of the data, its root for VAE and HVAE, its variance for CVAE
  lambda       singular values of the encoder on whitened data: the std of E[z|x] (of E[z2|z1])
  omega        singular values of the decoder
  sigma        std of q(z|x)
  kl           the ELBO's KL term, in nats
  information  log(1 + lambda^2 / sigma^2) / 2, what z tells of its input, in nats: 0 if and only if it is collapsed
  collapse     the beta (HVAE: beta_2) from which on it is collapsed; inf for never
and "loss" (...,), the least negative beta-ELBO, in nats per example. Two-level names end in their level, _1 or _2.
"""
import copy
import functools
import math
import sys
import time

import numpy as np
import torch

import common
import files

ACTIVE = 0.01                                             # nats of information that make a unit active


def second_moment(*columns):
    """E[v v^T] over rows, float64 (d, d), of v = the columns (n, d_1), (n, d_2), ... joined, d = d_1 + d_2 + ..."""
    moment = 0
    for rows in zip(*(column.split(512) for column in columns)):
        v = torch.cat(rows, dim=1).double()
        moment = moment + v.T @ v
    return moment.cpu() / len(columns[0])


@functools.lru_cache(maxsize=4)                           # by identity: a grid asks for the same moment again and again
def modes(moment):
    """The modes of a second moment (d, d): variances (d,) in descending order, and directions (d, d) in columns.

    Variances below d machine epsilons of the largest are rounding and set to 0.
    """
    variance, directions = torch.linalg.eigh(moment)
    variance, directions = variance.flip(0), directions.flip(1)
    rounding = len(variance) * torch.finfo(variance.dtype).eps * variance[0]
    return torch.where(variance > rounding, variance, 0), directions


def spectrum(moment):
    """The variances of the modes of a second moment (d, d): (d,), in descending order."""
    return modes(moment)[0]


def root(moment):
    """A root R (d, d) of a second moment, R R^T = E[v v^T]: the singular values of W R are those of W P Phi^(1/2)."""
    variance, directions = modes(moment)
    return directions * variance.sqrt()


def whitening(moment, ridge=0):
    """W (d, d) with E[W^T v (W^T v)^T] = 1 on the modes that vary, 0 on the others: W W^T is the pseudo-inverse of a moment, with a
    ridge added to the variances."""
    variance, directions = modes(moment)
    return torch.where(variance > 0, (variance + ridge).rsqrt(), 0) * directions


@functools.lru_cache(maxsize=4)
def residual(moment, dim_x):
    """E = B - C A^+ C^T, what is left of y's second moment once x has explained what it can: (d_y, d_y).

    moment is that of (x, y) joined, with blocks A of x, (dim_x, dim_x), B of y and C = E[y x^T]. Source: theorem 2.
    """
    A, B, C = moment[:dim_x, :dim_x], moment[dim_x:, dim_x:], moment[dim_x:, :dim_x]
    explained = C @ whitening(A)                          # E[y x~^T], x~ the whitened x
    left = B - explained @ explained.T
    # What is left of a variance that x explains wholly is rounding.
    return left if left.trace() > len(moment) * torch.finfo(left.dtype).eps * B.trace() else torch.zeros_like(left)


def _per_unit(*settings):
    """Settings as float64 tensors with an axis for units: (...,) becomes (..., 1)."""
    return [torch.as_tensor(value, dtype=torch.float64).unsqueeze(-1) for value in settings]


def _first(values, d):
    """The first d values, (..., d), with zeros where there are fewer."""
    return torch.nn.functional.pad(values[..., :d], (0, max(0, d - values.shape[-1])))


def _gaussian(squared_error, dim, eta_dec):
    """-log N of mean squared error (...,) in dim dimensions with std eta_dec, in nats."""
    return squared_error / (2 * eta_dec**2) + dim / 2 * (2 * math.pi * eta_dec**2).log()


def vae_optimum(theta, d_1, beta, eta_enc, eta_dec):
    """The linear VAE at its optimum, Sigma = diag(sigma_i^2) learnable (theorem 1).

    theta (D,): the roots of the spectrum of E[x x^T]. Per unit, (..., d_1): see above.
    """
    beta, eta_enc, eta_dec = _per_unit(beta, eta_enc, eta_dec)
    variance, level = _first(theta, d_1)**2, beta * eta_dec**2
    above = torch.maximum(variance, level)                # reverse water-filling: modes below the level collapse
    kl = (above / level).log() / 2
    error = (theta**2).sum(-1) - (above - level).sum(-1)
    return {"theta": _first(theta, d_1), "lambda": eta_enc * ((above - level) / above).sqrt(),
            "omega": (above - level).sqrt() / eta_enc, "sigma": eta_enc * (level / above).sqrt(), "kl": kl,
            "information": kl, "collapse": variance / eta_dec**2,
            "loss": _gaussian(error, theta.shape[-1], eta_dec[..., 0]) + (beta * kl).sum(-1)}


def cvae_optimum(theta, dim_z, beta, eta_enc, eta_dec):
    """The linear CVAE at its optimum, Sigma = diag(sigma_i^2) learnable (theorem 2): the VAE of what x leaves of y.

    theta (D,): the spectrum of E, see `residual`. Per unit, (..., dim_z): see above.
    """
    return vae_optimum(theta.sqrt(), dim_z, beta, eta_enc, eta_dec) | {"theta": _first(theta, dim_z)}


def vae_optimum_fixed_sigma(theta, sigma, beta, eta_enc, eta_dec):
    """The linear VAE at its optimum, Sigma = diag(sigma_i^2) fixed (theorem 1): sigma (..., d_1), the smallest on the
    largest mode. Where the mean is dead (lambda = 0) the kl is not 0, unless sigma_i = eta_enc."""
    beta, eta_enc, eta_dec = _per_unit(beta, eta_enc, eta_dec)
    sigma = sigma.double().sort(dim=-1).values
    d_1 = sigma.shape[-1]
    first, k = _first(theta, d_1), beta.sqrt() * eta_dec / eta_enc
    gain = (first - k * sigma).clamp(min=0)
    lambda_ = (sigma * gain / k).sqrt()
    dead_kl = _kl(0, sigma, eta_enc)
    error = (theta**2).sum(-1) - (gain**2).sum(-1)        # with the beta-weighted KL of the means in it
    return {"theta": first, "lambda": lambda_, "omega": (k * gain / sigma).sqrt(), "sigma": sigma.expand_as(gain),
            "kl": _kl(lambda_, sigma, eta_enc), "information": _information(lambda_, sigma),
            "collapse": (first * eta_enc / (eta_dec * sigma))**2,
            "loss": _gaussian(error, theta.shape[-1], eta_dec[..., 0]) + (beta * dead_kl).sum(-1)}


def hvae_optimum(theta, d_1, d_2, sigma_1, beta_1, beta_2, eta_enc, eta_dec):
    """The linear two-level HVAE at its optimum, Sigma1 = sigma_1^2 I fixed, Sigma2 = diag learnable (theorem 3).

    theta (D,): the roots of the spectrum of E[x x^T]. Per unit of z1 (..., d_1) and of z2 (..., d_2): see above. omega_2
    are the singular values of U2. Beyond the paper, d_1 and d_2 may differ: z2 describes the largest modes of z1.
    """
    sigma_1, beta_1, beta_2, eta_enc, eta_dec = _per_unit(sigma_1, beta_1, beta_2, eta_enc, eta_dec)
    first, described = _first(theta, d_1), torch.arange(d_1) < d_2
    b, alone = beta_2 / beta_1 * eta_dec**2, sigma_1 * first / beta_1.sqrt()
    with_z2 = (sigma_1 * first / eta_dec)**2 / beta_2
    # m = lambda_1^2 + sigma_1^2, the variance of a mode of z1
    m = torch.where(described & ((sigma_1**2 >= b) | (alone >= b)), with_z2, alone)
    m = torch.maximum(m, sigma_1**2)
    ratio = torch.where(described, (m / b).clamp(min=1), 1)   # of m to what z2 leaves of it
    kl_1 = (m / ratio / eta_dec**2 - 1) / 2 - (sigma_1 / eta_dec).log()
    ratio_2 = 1 + _first(ratio - 1, d_2)
    kl_2 = ratio_2.log() / 2
    lambda_1, loss = _level_1(theta, first, m, sigma_1, eta_dec)
    return {"theta": first, "lambda_1": lambda_1, "kl_1": kl_1, "information_1": _information(lambda_1, sigma_1),
            "lambda_2": eta_enc * (1 - 1 / ratio_2).sqrt(), "omega_2": (b * (ratio_2 - 1)).sqrt() / eta_enc,
            "sigma_2": eta_enc / ratio_2.sqrt(), "kl_2": kl_2, "information_2": kl_2,
            "collapse_1": _collapse_1(first, sigma_1, beta_1, (first / eta_dec)**2 * described),
            "collapse_2": _first(beta_1 / eta_dec**2 * torch.maximum(sigma_1**2, alone) * described, d_2),
            "loss": loss + (beta_1 * kl_1).sum(-1) + (beta_2 * kl_2).sum(-1)}


def hvae_optimum_fixed_sigma_2(theta, d_1, d_2, sigma_1, sigma_2, beta_1, beta_2, eta_enc, eta_dec):
    """The linear two-level HVAE at its optimum, Sigma1 = sigma_1^2 I and Sigma2 = sigma_2^2 I fixed (theorem 5).

    Arguments and result as of `hvae_optimum`. Where the mean of z2 is dead its kl is not 0, unless sigma_2 = eta_enc.
    """
    sigma_1, sigma_2, beta_1, beta_2, eta_enc, eta_dec = _per_unit(sigma_1, sigma_2, beta_1, beta_2, eta_enc, eta_dec)
    first, described = _first(theta, d_1), torch.arange(d_1) < d_2
    c, K = eta_dec / eta_enc, (beta_1 * beta_2).sqrt()
    m_0, alone = beta_2 * (c * sigma_2)**2 / beta_1, sigma_1 * first / beta_1.sqrt()
    with_z2 = (sigma_1**2 * first**2 / (K * c * sigma_2))**(2 / 3)
    m = torch.where(described & ((sigma_1**2 >= m_0) | (alone >= m_0)), with_z2, alone)
    m = torch.maximum(m, sigma_1**2)
    omega = ((K * c * m.sqrt() / sigma_2 - beta_2 * c**2).clamp(min=0) / beta_1).sqrt() * described
    encoder = beta_1 * omega / (beta_1 * omega**2 + beta_2 * c**2)        # singular values of W2
    left = (1 - omega * encoder)**2 * m + (omega * sigma_2)**2            # E (z1 - U2 z2)^2
    kl_1 = (left / eta_dec**2 - 1) / 2 - (sigma_1 / eta_dec).log()
    lambda_2 = _first(encoder * m.sqrt(), d_2)
    kl_2 = _kl(lambda_2, sigma_2, eta_enc)
    lambda_1, loss = _level_1(theta, first, m, sigma_1, eta_dec)
    by_noise = first**4 / (beta_1 * (c * sigma_1 * sigma_2)**2)
    return {"theta": first, "lambda_1": lambda_1, "kl_1": kl_1, "information_1": _information(lambda_1, sigma_1),
            "lambda_2": lambda_2, "omega_2": _first(omega, d_2), "kl_2": kl_2,
            "information_2": _information(lambda_2, sigma_2),
            "collapse_1": _collapse_1(first, sigma_1, beta_1, by_noise * described),
            "collapse_2": _first(beta_1 / (c * sigma_2)**2 * torch.maximum(sigma_1**2, alone) * described, d_2),
            "loss": loss + (beta_1 * kl_1).sum(-1) + (beta_2 * kl_2).sum(-1)}


def _level_1(theta, first, m, sigma_1, eta_dec):
    """lambda_1 and the reconstruction's part of the loss, from m, the variances of z1's modes."""
    error = (theta**2).sum(-1) - (first**2 * (1 - sigma_1**2 / m)).sum(-1)
    return (m - sigma_1**2).sqrt(), _gaussian(error, theta.shape[-1], eta_dec[..., 0])


def _collapse_1(first, sigma_1, beta_1, with_z2):
    """The beta_2 from which on lambda_1 = 0: never where the mode is strong enough for z1 alone, with_z2 otherwise."""
    return torch.where(first > sigma_1 * beta_1.sqrt(), math.inf, with_z2)


def _kl(lambda_, sigma, eta):
    """E KL(N(mean, sigma^2) || N(0, eta^2)) in nats, lambda_ the root mean square of the mean."""
    return ((lambda_**2 + sigma**2) / eta**2 - 1) / 2 - (sigma / eta).log()


def _information(lambda_, sigma):
    return (1 + (lambda_ / sigma)**2).log() / 2


def vae_units(U, V, sigma, eta_enc):
    """What `vae_optimum` predicts, of a linear VAE or CVAE as it is: U (D, d_1) its decoder, V = W R (d_1, D) its encoder
    on whitened data, sigma (d_1,). All float64."""
    # Units that share a sigma may be turned into each other without changing anything: take their singular directions.
    of_unit = torch.empty_like(sigma)
    for value in sigma.unique():
        tied = sigma == value
        of_unit[tied] = _singular_values(V[tied], int(tied.sum()))
    return {"lambda": _singular_values(V, len(sigma)), "omega": _singular_values(U, len(sigma)), "sigma": sigma,
            "kl": _kl(of_unit, sigma, eta_enc), "information": _information(of_unit, sigma)}


def hvae_units(V1, W2, U2, sigma_1, sigma_2, eta_enc, eta_dec):
    """What `hvae_optimum` predicts, of a linear two-level HVAE as it is: V1 = W1 R (d_1, D), W2 (d_2, d_1), U2 (d_1, d_2),
    sigma_1 a number, sigma_2 (d_2,). All float64."""
    d_1, d_2 = U2.shape
    z1_moment = V1 @ V1.T + sigma_1**2 * torch.eye(d_1, dtype=V1.dtype)
    unexplained = torch.eye(d_1, dtype=V1.dtype) - U2 @ W2
    z1_left = unexplained @ z1_moment @ unexplained.T + U2 * sigma_2**2 @ U2.T     # E[(z1 - U2 z2)(z1 - U2 z2)^T]
    kl_1 = (torch.linalg.eigvalsh(z1_left) / eta_dec**2 - 1) / 2 - math.log(sigma_1 / eta_dec)
    lambda_1 = _singular_values(V1, d_1)
    level_2 = vae_units(U2, W2 @ torch.linalg.cholesky(z1_moment), sigma_2, eta_enc)
    return {"lambda_1": lambda_1, "kl_1": kl_1, "information_1": _information(lambda_1, sigma_1)} | {
        f"{name}_2": values for name, values in level_2.items()}


def _singular_values(matrix, d):
    """The d largest singular values of a matrix in descending order, 0 where it has fewer."""
    return _first(torch.linalg.svdvals(matrix), d)


# Headroom. What a trained model, linear or not, leaves of a level's Gaussian target t, r = t - E_{z ~ q(z|u)}[mean of p(t|z)],
# may still be linear in what the level's encoder reads, u (with a 1 at its end). Units that describe it would be those of a
# linear VAE of the part of r that is linear in u, whose second moment is T = C A^+ C^T; C = E[r u^T], A = E[u u^T]: reverse
# water-filling of T, as in theorem 2 of E. weight is that of -log p(t|z) in the loss, std is p(t|z)'s, beta the KL's weight.

def level_of(beta, weight, std):
    """The variance that a mode needs if a unit is to pay for its KL: beta std^2 / weight."""
    return beta * std**2 / weight if weight else math.inf


def linear_part(cross, moment):
    """T (D, D), the second moment of that part of r which is linear in u: cross (D, p) is C, moment (p, p) is A. Its `spectrum`
    are the tau of `headroom`."""
    explained = cross @ whitening(moment)
    return explained @ explained.T


def headroom(tau, count, beta, weight, std):
    """G_k, in nats of the negative beta-ELBO per example: what k = count more units would gain, if their encoder's means were
    linear in u, their stds learnable, and their decoder linear, added to the mean of this very model. tau (D,) descending.
    Where it is 0 the objective does not want them."""
    level = level_of(beta, weight, std)
    paying = tau[:count][tau[:count] > level]
    return (weight / (2 * std**2) * (paying - level - torch.xlogy(level, paying / level)).sum()).item() if len(paying) else 0.0


def idle_units(cross, moment, count, beta, weight, std, ridge=0):
    """The units that gain the `headroom`, k of them at most: encoder (k, p) and std (k,) in stds of the prior, decoder (D, k).
    With a ridge on the variances of u they rely less on its weak modes, for the sake of other rows."""
    level, white = level_of(beta, weight, std), whitening(moment, ridge)
    explained = cross @ white
    tau, directions = modes(explained @ explained.T)
    paying = (tau > level) & (torch.arange(len(tau)) < count)
    tau, directions = tau[paying], directions[:, paying]
    share = level / tau                                   # of a mode that the unit leaves
    encoder = ((1 - share).sqrt() / tau.sqrt())[:, None] * directions.T @ explained @ white.T
    return encoder, share.sqrt(), directions * (tau - level).sqrt()


def gain(units, cross, moment, beta, weight, std):
    """What units such as those of `idle_units` gain, in nats per example, on rows with these moments, which need not be those
    that they were found on: the fall of the squared error, less the KL."""
    encoder, sigma, decoder = units
    mean = decoder @ encoder                              # of r, from u
    error = -2 * (mean * cross).sum() + (mean @ moment * mean).sum() + (decoder**2 @ sigma**2).sum()
    kl = ((encoder @ moment * encoder).sum(1) + sigma**2 - 1) / 2 - sigma.log()
    return (-weight * error / (2 * std**2) - beta * kl.sum()).item()


def verdict(units, collapsed, nats):
    """What collapsed so many of a level's units (None if not known), whose `headroom` is so many nats: the objective or
    training, in words."""
    if not collapsed:
        return f"none of {units} units collapsed"
    return f"{collapsed}{f' of {units}' if units else ''} unit{'' if (units or collapsed) == 1 else 's'} collapsed, " + (
        f"by training: idle units would pay at least {nats:.2g} nats" if nats > ACTIVE else "by the objective")


def compare(predicted, trained, loss):
    """What a closed form predicts beside what a model is, as lists: {"predicted", "trained", "errors", "optimal_loss",
    "loss", "gap"}; None for a collapse that never comes. The trained values of each kind stand in the order of the
    predicted, largest at largest: which unit of a model describes which mode is its own affair."""
    ordered = {}
    for name in trained:
        if name in predicted:
            ranks = predicted[name].argsort(descending=True, stable=True)
            ordered[name] = torch.empty_like(predicted[name])
            ordered[name][ranks] = trained[name].sort(descending=True).values
    errors = {name: (ordered[name] - predicted[name]).abs().max().item() for name in ordered}
    optimal, lists = predicted["loss"].item(), {name: values.tolist() for name, values in ordered.items()}
    return {"predicted": per_unit(predicted), "trained": lists, "errors": errors, "optimal_loss": optimal, "loss": loss,
            "gap": loss - optimal}


def per_unit(predicted):
    """What a closed form says of each unit, as lists: {name: [...]}, with None for a collapse that never comes."""
    return {name: [None if value == math.inf else value for value in values.tolist()]
            for name, values in predicted.items() if name != "loss"}


def levels_of(predicted):
    """The levels of a closed form's units: [""], or ["_1", "_2"]."""
    return sorted(name.removeprefix("information") for name in predicted if name.startswith("information"))


def active_units(theory, of="predicted"):
    """How many units of each level are active, of those predicted or of those trained: {"_1": 5, "_2": 3}."""
    return {level: sum(value > ACTIVE for value in theory[of][f"information{level}"]) for level in levels_of(theory["predicted"])}


def singular_value_error(theory):
    """The largest |trained - predicted| singular value, lambda or omega of any level, over the largest predicted one."""
    names = [name for name in theory["errors"] if name.startswith(("lambda", "omega"))]
    largest, error = max(max(theory["predicted"][name]) for name in names), max(theory["errors"][name] for name in names)
    return error / largest if largest else error


def disagreements(theory):
    """In which ways a trained model is not what the closed form predicts, in words."""
    if singular_value_error(theory) > 0.02:
        yield f"a singular value is off by {singular_value_error(theory):.1%} of the largest, wants at most 2 %"
    if not -1e-6 < theory["gap"] < 0.05:
        yield f"the loss is {theory['gap']:.3f} nats above the optimal one, wants 0 to 0.05"
    for level in levels_of(theory["predicted"]):
        pairs = zip(theory["predicted"][f"information{level}"], theory["trained"][f"information{level}"])
        wrong = [i + 1 for i, (predicted, trained) in enumerate(pairs)       # units near their threshold aside
                 if (predicted > ACTIVE) != (trained > ACTIVE) and not 0 < predicted < 2 * ACTIVE]
        if wrong:
            yield f"units {', '.join(map(str, wrong))} of z{level.removeprefix('_')} are not as active as predicted"
    sampling = theory.get("importance_sampling")
    if sampling and abs(sampling["mean_ratio"] - 1) > 3 * sampling["standard_error"] + sampling["rounding"]:
        yield (f"sampled p(x) is {sampling['mean_ratio']:.4f} of the exact one, more than three standard errors off: too few "
               "draws for a q that is narrower than the posterior")


def closed_form(result):
    """What a closed form says of the units of a result's model, or of its linear twin, as lists; None if none does."""
    if not result["metrics"]:
        return None
    return result["theory"]["predicted"] if "theory" in result else result.get("linear")


def beside_linear(result):
    """[(metric, what the closed form predicts, what was trained)], of each level kl, AU and AU_kl. Predicted active is
    what has more than ACTIVE nats of information."""
    predicted, metrics = closed_form(result), result["metrics"]
    for level in levels_of(predicted):
        active = sum(information > ACTIVE for information in predicted[f"information{level}"])
        yield f"kl{level}", sum(predicted[f"kl{level}"]), metrics[f"kl{level}"]
        yield f"AU{level}", active, metrics[f"AU{level}"]
        yield f"AU_kl{level}", active, metrics[f"AU_kl{level}"]


def can_be_ranked(results):
    """Whether results are of three settings or more, seeds aside, so that a rank correlation says something."""
    return len({str(result["settings"] | {"seed": None}) for result in results}) > 2


def linear_correlations(results):
    """{metric: Spearman's rank correlation of predicted and trained over results}, of those metrics that neither is constant in;
    {} where there is nothing to rank."""
    correlations = {}
    for triples in zip(*map(beside_linear, results)) if can_be_ranked(results) else ():
        ranks = []
        for values in (np.round([triple[k] for triple in triples], 2) for k in (1, 2)):        # as they are printed
            below, same = values[:, None] > values, values[:, None] == values
            ranks.append(below.sum(1) + same.sum(1) / 2)  # ties share their mean rank
        if all(np.ptp(of) > 0 for of in ranks):
            correlations[triples[0][0]] = np.corrcoef(*ranks)[0, 1]
    return correlations


def correlations_in_words(results):
    """linear_correlations as the end of a sentence."""
    return ", ".join(f"{metric} {value:.2f}" for metric, value in linear_correlations(results).items()) or "none"


def print_units(theory, found):
    """A table a level: each unit's theta, what the closed form predicts and what was found ("trained"), its state."""
    predicted, of_model = theory["predicted"], theory["trained"]
    for level in levels_of(theory["predicted"]):
        names = [name for name in ("lambda", "omega", "sigma", "kl") if f"{name}{level}" in of_model]
        theta = predicted["theta"] + [0.0] * len(predicted[f"kl{level}"])
        rows = [["unit", "theta", *(word for name in names for word in (f"{name}{level}", found)), "collapses at", "state"]]
        for i, information in enumerate(predicted[f"information{level}"]):
            numbers = [values[f"{name}{level}"][i] for name in names for values in (predicted, of_model)]
            state = "active" if information > 0 else "collapsed"
            if (of_model[f"information{level}"][i] > ACTIVE) != (information > ACTIVE):
                state += f" but {found} is not"
            at = predicted[f"collapse{level}"][i]
            at = "never" if at is None else f"{at:.4g}"
            rows.append([str(i + 1), *(f"{value:.4f}" for value in (theta[i], *numbers)), at, state])
        print()
        common.print_rows(rows)


def minimise(loss, starts, blocks=40):
    """Minimise loss({name: tensor}) over float64 parameters: L-BFGS from each start, in at most so many blocks of 50 steps,
    until a block gains less than 1e-9 of the loss; then Newton steps from the best.
    A list of ({name: tensor}, the loss there), the least first."""
    found = []
    for start in starts:
        parameters = {name: value.clone().requires_grad_() for name, value in start.items()}
        optimizer = torch.optim.LBFGS(parameters.values(), max_iter=50, history_size=30, tolerance_change=0,
                                      tolerance_grad=1e-9, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            value = loss(parameters)
            value.backward()
            return value

        before = math.inf
        for _ in range(blocks):
            optimizer.step(closure)
            now = loss(parameters).item()
            if not before - now > 1e-9 * abs(now):
                break
            before = now
        found.append(({name: value.detach() for name, value in parameters.items()}, now))
    found.sort(key=lambda one: one[1])
    return [newton(loss, found[0][0]), *found[1:]]


def newton(loss, parameters, steps=40):
    """Newton steps down to the nearest minimum: a line search on the loss ends where rounding hides its differences, at
    half the digits. Directions in which the loss is flat stay as they are. ({name: tensor}, the loss there)."""
    names, shapes = list(parameters), [value.shape for value in parameters.values()]

    def unflatten(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}

    def of_flat(flat):
        return loss(unflatten(flat))

    flat = torch.cat([value.flatten() for value in parameters.values()])
    value = of_flat(flat)
    for _ in range(steps):
        gradient = torch.func.grad(of_flat)(flat)
        curvature, directions = torch.linalg.eigh(torch.func.jacrev(torch.func.grad(of_flat))(flat))
        curvature = curvature.abs()                       # downhill where the loss curves down, too
        curved = curvature > 1e-9 * curvature.max()
        step = directions @ torch.where(curved, directions.T @ gradient / curvature, 0)
        lengths = 0.5 ** torch.arange(10.0, dtype=flat.dtype, device=flat.device)
        after = torch.stack([of_flat(flat - length * step) for length in lengths])
        if not after.min() <= value + 1e-14 * value.abs():
            break
        flat, value = flat - lengths[after.argmin()] * step, after.min()
        if step.abs().max() < 1e-12 * flat.abs().max():
            break
    return unflatten(flat), value.item()


STARTS, TOLERANCE = 8, 1e-6                               # of the checks of theorems


def moved(problem, device):
    """A copy of a problem with its tensors on a device."""
    copied = copy.copy(problem)
    for name, value in vars(problem).items():
        setattr(copied, name, value.to(device) if torch.is_tensor(value) else value)
    return copied


def random_starts(problem, f, device):
    """STARTS random parameters of a problem, on a device, the same on every one."""
    random = common.generator(f.seed, "init")
    return [problem.start(lambda *shape: 0.5 * torch.randn(shape, dtype=torch.float64, generator=random, device="cpu").to(device))
            for _ in range(STARTS)]


def verify(Problem, settings):
    """Check a theorem on synthetic data, setting by setting: minimise the exact expected loss from several random starts,
    print what was found beside what is predicted, and VERIFIED or FAILED. Returns the exit status, 0 or 1.

    Problem(f) has start(draw), random parameters {name: float64 tensor} where draw(*shape) draws; loss(parameters),
    0-d; predicted(), one of the closed forms; units(parameters), the same quantities of these.
    """
    if common.processes()[0] > 0:
        return 0                                          # one process is enough
    print(f"device: {common.device_name(common.device_of(settings[0]))}", file=sys.stderr)
    rows, worst, flags = [], 0.0, files.varying(settings, [None] * len(settings))
    for f in settings:
        began, problem, there = time.monotonic(), Problem(f), common.device_of(f)
        with there:
            found = minimise(moved(problem, there).loss, random_starts(problem, f, there))
        parameters = {name: value.cpu() for name, value in found[0][0].items()}
        theory = compare(problem.predicted(), problem.units(parameters), found[0][1])
        error = float(np.max([*theory["errors"].values(), abs(theory["gap"])]))        # nan if one of them is
        worst = float(np.max([worst, error]))
        files.write_json(files.run_dir(f, None) / "result.json", files.describe(f, None) | {
            "seconds": {"minimise": time.monotonic() - began}, "max_error": error, "theory": theory})
        row = {name: str(getattr(f, name)) for name in (*flags, "seed")}
        for level in levels_of(theory["predicted"]):
            active = [information > 0 for information in theory["predicted"][f"information{level}"]]
            row |= {f"active{level}": str(sum(active)), f"collapsed{level}": str(len(active) - sum(active))}
        rows.append(row | {"optimal loss": f"{theory['optimal_loss']:.6f}", "found": f"{theory['loss']:.6f}",
                           "max error": f"{error:.1e}"})
        if len(settings) > 1:
            print(f"{len(rows)} of {len(settings)} settings", file=sys.stderr)
    shared = {name: value for name, value in files.changed(f, None).items() if name not in (*flags, "seed")}
    print(f"{common.script_name(f)} {files.spell(shared)}: {f.num_samples:,} rows, nats per row")
    if len(settings) == 1:
        print_units(theory, "found")
        for note in notes(theory):
            print(note)
        print(f"\n{sum(loss - found[0][1] < 1e-6 for _, loss in found)} of {STARTS} random starts end at the least loss")
    columns = max(rows, key=len)
    common.print_rows([list(columns), *([row.get(name, "-") for name in columns] for row in rows)])
    print(f"{'VERIFIED' if worst <= TOLERANCE else 'FAILED'} max error {worst:.1e}")
    return int(not worst <= TOLERANCE)


def notes(theory):
    """What of the predicted optimum is not unique, or surprises, in sentences."""
    predicted, theta = theory["predicted"], theory["predicted"]["theta"]
    said = [f"units {i + 1} and {i + 2} have the same theta: each may describe any mixture of their modes"
            for i in range(len(theta) - 1) if theta[i] > 0 and theta[i] - theta[i + 1] < 1e-9 * theta[0]]
    if theta[-1] == 0:
        said.append(f"theta is 0 from unit {theta.index(0.0) + 1} on: the data has no more modes")
    if "lambda_1" in predicted and any(a == 0 < b for a, b in zip(predicted["lambda_1"], predicted["omega_2"])):
        said.append("where lambda_1 = 0 < omega_2, z2 describes nothing but the noise of z1")
    return said
