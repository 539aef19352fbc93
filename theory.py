"""Closed forms of posterior collapse: the global optima of a linear VAE, CVAE and two-level HVAE.

Source: Dang, Tran, Nguyen, Ho, "Beyond Vanilla Variational Autoencoders: Detecting Posterior
Collapse in Conditional and Hierarchical Variational Autoencoders", ICLR 2024, arXiv 2306.05023,
theorems 1, 2, 3 and 5. The theorems give singular values. From these follow the KL terms, the
optimal losses and the thresholds of collapse, which this file adds.

In this order: the spectra of data; quantities of one unit; the loss of one unit; the VAE (theorem
1); the CVAE (theorem 2); the two-level HVAE (theorems 3 and 5). Everything is computed in float64.

The objective
-------------
Each model minimises the exact negative beta-ELBO, in nats per example. With z the latent variable
of a level, it is

    L = E[-log p(x|z)] + sum over the levels of beta KL

The expectation is over the data and the encoder. The CVAE has -log p(y|x,z) in place of
-log p(x|z). With the data's dimension D and the decoder's standard deviation eta_dec,

    -log p(x|z) = ||x - mean of p(x|z)||^2 / (2 eta_dec^2) + (D/2) log(2 pi eta_dec^2)

Notation
--------
    (a)+        max(a, 0)
    beta        weight of a KL term
    eta_enc     std of the prior of the (top) latent variable
    eta_dec     std of the decoder; in the HVAE also of p(z1|z2)
    c           eta_dec / eta_enc
    A           E[x x^T] over the training rows, not centred. A = P Phi P^T, Phi the variances.
    theta_i     a mode of the data, the largest first. In the VAE and HVAE it is a standard
                deviation, the square root of the i-th eigenvalue of A. In the CVAE it is a
                variance, the i-th eigenvalue of E, see `moment_given_x`.

Unit i of the model belongs to mode i. If there are more units than modes, the theta_i of the
others are 0. "The std of a mode" is the root mean square of the data along it.

What a closed form returns
--------------------------
An `Optimum`: a dict {name: float64 tensor} that also has the loss of each unit as a function. The
settings (beta, eta_enc, ...) may be numbers, or tensors (...,) of many settings, and then all
shapes begin with (...,). The names of the HVAE, except theta and loss, end in their level, _1 or
_2. A level has d units.

    theta        (..., d)  modes of the data, see above; in the HVAE those of z1's units
    lambda       (..., d)  singular values of the encoder on whitened data, which are the stds of
                           the modes of E[z|x]; for z2 those of E[z2|z1] over z1. Units of z.
    omega        (..., d)  singular values of the decoder, in units of its output per unit of z; in
                           the HVAE those of U2, as omega_2
    sigma        (..., d)  stds of q(z|x), in units of z
    kl           (..., d)  the KL term of the ELBO, in nats
    information  (..., d)  log(1 + lambda^2 / sigma^2) / 2, the nats of information that z has of
                           its input. It is 0 if and only if the unit's mean has collapsed.
    collapse     (..., d)  the least beta (in the HVAE the least beta_2) at which the unit has
                           collapsed: 0 if it always has, inf if it never does
    loss         (...,)    L at the optimum, in nats per example

The tests compare every formula with minimisation by brute force; the matrix_*.py scripts do so
for settings of one's own.
"""
import functools
import math

import torch

# A unit is active if its information, or its mean KL over the data, exceeds this, in nats.
ACTIVE = 0.01

# Rows of data that `second_moment` adds up at a time.
CHUNK_ROWS = 512


# --- Spectra of data ---


def second_moment(*columns):
    """E[v v^T] over the rows of the data, not centred: (d, d), float64, on the CPU.

    columns: tensors (n, d_1), (n, d_2), ..., whose rows together form v, with d = d_1 + d_2 + ...
    """
    total = 0
    for chunk in zip(*(column.split(CHUNK_ROWS) for column in columns)):
        v = torch.cat(chunk, dim=1).double()
        total = total + v.T @ v
    return total.cpu() / len(columns[0])


# The cache knows a moment by its identity. All settings of a grid share one moment.
@functools.lru_cache(maxsize=4)
def modes(moment):
    """The modes of a second moment A = P Phi P^T, (d, d): the diagonal of Phi, and P.

    Returns variances (d,), the largest first, and directions (d, d), one per column. Variances
    below d machine epsilons of the largest one are rounding errors, and become 0.
    """
    variance, directions = torch.linalg.eigh(moment)
    if not len(variance):
        return variance, directions
    variance = variance.flip(0)
    directions = directions.flip(1)
    rounding = len(variance) * torch.finfo(variance.dtype).eps * variance[0]
    return torch.where(variance > rounding, variance, 0), directions


def spectrum(moment):
    """The variances of the modes of a second moment (d, d): (d,), the largest first."""
    return modes(moment)[0]


def root(moment):
    """R = P Phi^(1/2), (d, d), a root of the second moment: R R^T = E[v v^T].

    The lambda_i of the theorems are the singular values of W R, where W is the encoder.
    """
    variance, directions = modes(moment)
    return directions * variance.sqrt()


def whitening(moment, ridge=0):
    """W = P (Phi + ridge I)^(-1/2), (d, d), with columns of 0 for modes without variance.

    Without a ridge, W W^T is the pseudo-inverse of the moment, and W^T v is the whitened v.
    """
    variance, directions = modes(moment)
    return torch.where(variance > 0, (variance + ridge).rsqrt(), 0) * directions


@functools.lru_cache(maxsize=4)
def moment_given_x(moment, dim_x):
    """E = B - C A^+ C^T, (d_y, d_y): the second moment of y - y', in units of y squared.

    Here y' is the best linear prediction of y from x. Source: theorem 2. A = E[x x^T],
    (dim_x, dim_x); B = E[y y^T], (d_y, d_y); C = E[y x^T], (d_y, dim_x); A^+ is the pseudo-inverse.

    moment: the second moment of x and y joined, with the blocks [[A, C^T], [C, B]].
    """
    A = moment[:dim_x, :dim_x]
    B = moment[dim_x:, dim_x:]
    C = moment[dim_x:, :dim_x]
    # With W W^T = A^+, this is E[y (W^T x)^T], where W^T x is the whitened x.
    explained = C @ whitening(A)
    E = B - explained @ explained.T

    # Where x explains all of y, what is left is rounding errors.
    rounding = len(moment) * torch.finfo(E.dtype).eps * B.trace()
    return E if E.trace() > rounding else torch.zeros_like(E)


# --- Quantities of one unit ---


def expected_kl(lambda_, sigma, eta):
    """E[KL(N(mean, sigma^2) || N(0, eta^2))], in nats, where lambda_ is the std of the mean.

    KL = ((lambda^2 + sigma^2) / eta^2 - 1) / 2 - log(sigma / eta)

    All arguments have the same unit, and shapes that broadcast to the result's.
    """
    return ((lambda_**2 + sigma**2) / eta**2 - 1) / 2 - (sigma / eta).log()


def information(lambda_, sigma):
    """log(1 + lambda^2 / sigma^2) / 2, in nats.

    It is the information that z ~ N(mean, sigma^2) has of its input, where the mean is Gaussian
    with std lambda_.
    """
    return (1 + (lambda_ / sigma)**2).log() / 2


def levels_of(predicted):
    """The suffixes of the levels in a closed form's result: [""], or ["_1", "_2"]."""
    levels = []
    for name in predicted:
        if name.startswith("information"):
            levels.append(name.removeprefix("information"))
    return sorted(levels)


def _reconstruction(squared_error, dim, eta_dec):
    """E[-log p(x|z)] in nats, (...,), from E||x - mean of p(x|z)||^2, (...,).

    dim: the dimension of x; eta_dec: (...,), the std of p(x|z).
    """
    return squared_error / (2 * eta_dec**2) + dim / 2 * (2 * math.pi * eta_dec**2).log()


def _per_unit(*settings):
    """Settings as float64 tensors with an axis for the units: (...,) becomes (..., 1)."""
    return [torch.as_tensor(value, dtype=torch.float64).unsqueeze(-1) for value in settings]


def _leading(values, d):
    """The first d of the values (..., D) on the last axis: (..., d). Zeros follow if d > D."""
    return torch.nn.functional.pad(values[..., :d], (0, max(0, d - values.shape[-1])))


# --- The loss of one unit ---

# At the optimum each unit describes one mode of the data. If all weights have the singular vectors
# of the optimum, the loss is a sum over the units, plus a constant. The term of a unit depends on
# few numbers of this unit: on singular values and stds. Its second derivatives show how well the
# loss determines a singular value. Those of the whole loss do not show it, because a rotation of
# the units can leave the loss as it is.


class Optimum(dict):
    """What a closed form returns: its quantities, {name: tensor}, and the loss of each unit.

    unit_loss:   a function that gives the loss of each mode and its units, (..., d), in nats. Its
                 argument is {name: (..., d)} with the quantities on which the loss depends. d is
                 the number of units, in the HVAE of z1. None if the units depend on each other.
    coordinates: the names of these quantities, a tuple: all singular values, and sigma where it is
                 learnable
    beta:        the weight of which "collapse" gives the threshold, (..., 1)
    """

    def __init__(self, quantities, unit_loss, coordinates, beta):
        super().__init__(quantities)
        self.unit_loss = unit_loss
        self.coordinates = coordinates
        self.beta = beta


def vae_unit_loss(theta, lambda_, omega, sigma, beta, eta_enc, eta_dec):
    """The part of the loss of a linear VAE that depends on one unit and its mode, in nats.

    L_i = [(theta_i - omega_i lambda_i)^2 + omega_i^2 sigma_i^2] / (2 eta_dec^2) + beta KL_i

    The bracket is the squared error of mode i: z_i has a mean with the std lambda_i and noise with
    the std sigma_i, and omega_i decodes both. The sum over all units, the terms theta_j^2 /
    (2 eta_dec^2) of the other modes and (D/2) log(2 pi eta_dec^2) is the loss of a model whose
    singular vectors are those of the optimum. For the CVAE, theta is the square root of the theta_i
    of theorem 2, and the weights of x are the best ones.

    All arguments have shapes that broadcast to the result's.
    """
    squared_error = (theta - omega * lambda_)**2 + (omega * sigma)**2
    return squared_error / (2 * eta_dec**2) + beta * expected_kl(lambda_, sigma, eta_enc)


def hvae_unit_loss(
    theta, lambda_1, lambda_2, omega_2, sigma_2, has_z2, sigma_1, beta_1, beta_2, eta_enc, eta_dec
):
    """The part of the loss of a linear two-level HVAE that depends on one mode, in nats.

    With m_i = lambda_1i^2 + sigma_1^2, the variance of mode i of z1:
        L_i  = theta_i^2 sigma_1^2 / (2 eta_dec^2 m_i) + beta_1 KL1_i + beta_2 KL2_i
        KL1_i = ([(sqrt(m_i) - omega_2i lambda_2i)^2 + omega_2i^2 sigma_2i^2] / eta_dec^2 - 1) / 2
                - log(sigma_1 / eta_dec)
        KL2_i = ((lambda_2i^2 + sigma_2i^2) / eta_enc^2 - 1) / 2 - log(sigma_2i / eta_enc)

    The first term belongs to the squared error of mode i of x with the best decoder U1. The bracket
    is the squared error of mode i of z1, as in `vae_unit_loss`.

    has_z2: whether z2 has a unit for the mode. Where it has none, lambda_2i, omega_2i and sigma_2i
            do not matter, and KL2_i is left out.

    All arguments have shapes that broadcast to the result's.
    """
    m = lambda_1**2 + sigma_1**2
    omega_2 = omega_2 * has_z2
    squared_error_1 = (m.sqrt() - omega_2 * lambda_2)**2 + (omega_2 * sigma_2)**2
    kl_1 = (squared_error_1 / eta_dec**2 - 1) / 2 - (sigma_1 / eta_dec).log()
    kl_2 = expected_kl(lambda_2, sigma_2, eta_enc) * has_z2
    return (theta * sigma_1 / eta_dec)**2 / (2 * m) + beta_1 * kl_1 + beta_2 * kl_2


def _hvae_loss_of_units(**settings):
    """The `unit_loss` of an Optimum of the HVAE.

    settings: the arguments of `hvae_unit_loss` that are not coordinates of the units
    """
    def unit_loss(units):
        return hvae_unit_loss(**units, **settings)

    return unit_loss


# --- The VAE: theorem 1 ---


def vae_optimum(theta, d_1, beta, eta_enc, eta_dec):
    """The linear VAE with a learnable encoder variance at its optimum. Source: theorem 1.

    Model:
        q(z|x) = N(W x, Sigma), Sigma = diag(sigma_i^2) learnable
        p(x|z) = N(U z, eta_dec^2 I)
        p(z)   = N(0, eta_enc^2 I)

    Optimum:
        omega_i  = sqrt((theta_i^2 - beta eta_dec^2)+) / eta_enc
        lambda_i = eta_enc sqrt((theta_i^2 - beta eta_dec^2)+) / theta_i
        sigma_i  = sqrt(beta) eta_enc eta_dec / theta_i  if theta_i > sqrt(beta) eta_dec
                   eta_enc                               otherwise
        KL_i     = (log(theta_i / (sqrt(beta) eta_dec)))+
        L*       = [E||x||^2 - sum_i (theta_i^2 - beta eta_dec^2)+] / (2 eta_dec^2)
                   + (D/2) log(2 pi eta_dec^2) + beta sum_i KL_i
        Unit i collapses at beta = theta_i^2 / eta_dec^2.

    This is reverse water-filling with the water level beta eta_dec^2: the squared error of mode i
    is the smaller one of theta_i^2 and the water level.

    theta:   (D,), all modes of x as stds, the largest first, in units of x; for data with second
             moment A it is spectrum(A).sqrt()
    d_1:     the number of units of z
    beta:    the weight of KL(q(z|x) || p(z)), a number or (...,)
    eta_enc: the std of the prior, in units of z, a number or (...,)
    eta_dec: the std of p(x|z), in units of x, a number or (...,)

    Returns theta, lambda, omega, sigma, kl, information and collapse, each (..., d_1), and loss,
    (...,). See the top of this file.
    """
    beta, eta_enc, eta_dec = _per_unit(beta, eta_enc, eta_dec)
    theta_i = _leading(theta, d_1)
    water_level = beta * eta_dec**2

    # With v_i = max(theta_i^2, beta eta_dec^2), (theta_i^2 - beta eta_dec^2)+ is v_i minus the
    # water level. Dividing by v_i rather than by theta_i^2 leaves all numbers finite at theta_i = 0
    # and includes the case of a collapsed unit.
    v = torch.maximum(theta_i**2, water_level)
    above = v - water_level

    omega = above.sqrt() / eta_enc
    lambda_ = eta_enc * (above / v).sqrt()
    sigma = eta_enc * (water_level / v).sqrt()
    kl = (v / water_level).log() / 2

    squared_error = (theta**2).sum(-1) - above.sum(-1)
    reconstruction = _reconstruction(squared_error, theta.shape[-1], eta_dec[..., 0])
    quantities = {
        "theta": theta_i,
        "lambda": lambda_,
        "omega": omega,
        "sigma": sigma,
        "kl": kl,
        # 1 + lambda_i^2 / sigma_i^2 = v_i / (beta eta_dec^2), so the information is the KL.
        "information": kl,
        "collapse": theta_i**2 / eta_dec**2,
        "loss": reconstruction + (beta * kl).sum(-1),
    }

    def unit_loss(units):
        return vae_unit_loss(
            theta=theta_i,
            lambda_=units["lambda"],
            omega=units["omega"],
            sigma=units["sigma"],
            beta=beta,
            eta_enc=eta_enc,
            eta_dec=eta_dec,
        )

    return Optimum(quantities, unit_loss, ("lambda", "omega", "sigma"), beta)


def vae_optimum_fixed_sigma(theta, sigma, beta, eta_enc, eta_dec):
    """The linear VAE with a fixed diagonal encoder variance at its optimum. Source: theorem 1.

    Model:
        q(z|x) = N(W x, Sigma), Sigma = diag(sigma_i^2) fixed
        p(x|z) = N(U z, eta_dec^2 I)
        p(z)   = N(0, eta_enc^2 I)

    Optimum, with k = sqrt(beta) eta_dec / eta_enc and the smallest sigma_i for the largest theta_i:
        omega_i  = sqrt(k (theta_i - k sigma_i)+ / sigma_i)
        lambda_i = sqrt(sigma_i (theta_i - k sigma_i)+ / k)
        KL_i     = ((lambda_i^2 + sigma_i^2) / eta_enc^2 - 1) / 2 - log(sigma_i / eta_enc)
        L*       = [E||x||^2 - sum_i (theta_i - k sigma_i)+^2] / (2 eta_dec^2)
                   + (D/2) log(2 pi eta_dec^2) + beta sum_i (KL_i at lambda_i = 0)
        The mean of unit i dies at beta = (theta_i eta_enc / (eta_dec sigma_i))^2.

    A unit whose mean is dead (lambda_i = 0) still has a KL, unless sigma_i = eta_enc. So a dead
    mean is no posterior collapse here.

    theta:   (D,), all modes of x as stds, the largest first, in units of x
    sigma:   (..., d_1), the stds of q(z|x) in any order, in units of z; d_1 is the number of units
    beta:    the weight of KL(q(z|x) || p(z)), a number or (...,)
    eta_enc: the std of the prior, in units of z, a number or (...,)
    eta_dec: the std of p(x|z), in units of x, a number or (...,)

    Returns theta, lambda, omega, sigma, kl, information and collapse, each (..., d_1), and loss,
    (...,). See the top of this file. sigma is in ascending order.
    """
    beta, eta_enc, eta_dec = _per_unit(beta, eta_enc, eta_dec)
    sigma = sigma.double().sort(dim=-1).values
    theta_i = _leading(theta, sigma.shape[-1])
    k = beta.sqrt() * eta_dec / eta_enc

    gain = (theta_i - k * sigma).clamp(min=0)
    omega = (k * gain / sigma).sqrt()
    lambda_ = (sigma * gain / k).sqrt()

    # The sum over gain^2 includes the part of beta KL_i that lambda_i^2 causes.
    squared_error = (theta**2).sum(-1) - (gain**2).sum(-1)
    reconstruction = _reconstruction(squared_error, theta.shape[-1], eta_dec[..., 0])
    kl_of_dead_mean = expected_kl(0, sigma, eta_enc)
    quantities = {
        "theta": theta_i,
        "lambda": lambda_,
        "omega": omega,
        "sigma": sigma.expand_as(gain),
        "kl": expected_kl(lambda_, sigma, eta_enc),
        "information": information(lambda_, sigma),
        "collapse": (theta_i * eta_enc / (eta_dec * sigma))**2,
        "loss": reconstruction + (beta * kl_of_dead_mean).sum(-1),
    }

    def unit_loss(units):
        return vae_unit_loss(
            theta=theta_i,
            lambda_=units["lambda"],
            omega=units["omega"],
            sigma=sigma,
            beta=beta,
            eta_enc=eta_enc,
            eta_dec=eta_dec,
        )

    return Optimum(quantities, unit_loss, ("lambda", "omega"), beta)


def vae_optimum_learned_eta_dec(theta, d_1, beta, eta_enc):
    """The linear VAE with a learnable encoder variance and a learnable eta_dec at its optimum.

    Source: at beta = 1 this is probabilistic PCA (Tipping & Bishop 1999, equation 8; Lucas et al.
    2019, arXiv 1911.02469). Other values of beta are derived here from theorem 1.

    Model: that of `vae_optimum`, where eta_dec is learned together with U, W and Sigma.

    Optimum, where S_a is the sum of theta_j^2 over all j > a, D is the number of columns of x, and
    a is the number of active units:
        eta_dec^2 = S_a / (D - a beta), the squared error over D
        L*        = (D/2) (1 + log(2 pi eta_dec^2)) + beta sum_i KL_i
        Unit i collapses at beta = D / (i + S_i / theta_i^2).
    The other results are those of `vae_optimum` with this eta_dec.

    There is one such a. For a given eta_dec, the number of active units is that of theorem 1, and
    the derivative of the loss is 0 if a units are active and eta_dec^2 is the value above. Both
    hold if and only if beta is below the value at which unit a collapses, but not below that of
    unit a + 1. These values fall with i. Besides, the derivative of the loss with respect to
    log(eta_dec), D - sum_(i <= d_1) min(beta, theta_i^2 / eta_dec^2) - S_(d_1) / eta_dec^2, rises
    with eta_dec. So the loss has no second local minimum over eta_dec.

    The loss has no lower bound if the units can describe all of the data (S_a = 0 for some
    a <= d_1) and a beta < D for the least such a. It then falls without end as eta_dec goes to 0.

    theta:   (D,), all modes of x as stds, the largest first, in units of x. A model without biases
             has the modes of E[x x^T]. A model with biases has those of the covariance.
    d_1:     the number of units of z
    beta:    the weight of KL(q(z|x) || p(z)), a number or (...,)
    eta_enc: the std of the prior, in units of z, a number or (...,)

    Returns theta, lambda, omega, sigma, kl, information and collapse, each (..., d_1), and loss and
    eta_dec, (...,). See the top of this file. Where the loss has no lower bound, it is -inf,
    eta_dec is 0, and everything else except theta and collapse is nan.
    """
    beta, eta_enc = _per_unit(beta, eta_enc)
    dim = theta.shape[-1]
    theta_i = _leading(theta, d_1)

    # S_a for a = 0 to D, and then for each of the units.
    rest = (theta**2).flip(-1).cumsum(-1).flip(-1)
    rest = torch.cat([rest, torch.zeros_like(rest[:1])])
    rank = torch.arange(1, d_1 + 1)
    rest_i = rest[rank.clamp(max=dim)]
    # A unit without a mode of its own is always collapsed. Its quotient would be 0 / 0.
    collapse = torch.where(theta_i > 0, dim / (rank + rest_i / theta_i**2), 0)

    active = (beta < collapse).sum(-1)
    eta_dec = (rest[active] / (dim - active * beta[..., 0])).sqrt()
    bounded = eta_dec > 0
    optimum = vae_optimum(
        theta,
        d_1,
        beta=beta[..., 0],
        eta_enc=eta_enc[..., 0],
        eta_dec=torch.where(bounded, eta_dec, math.nan),
    )
    optimum["collapse"] = collapse.expand_as(optimum["kl"])
    # The loss of `vae_optimum` has large rounding errors where eta_dec is far below theta_1.
    reconstruction = dim / 2 * (1 + (2 * math.pi * eta_dec**2).log())
    loss = reconstruction + (beta * optimum["kl"]).sum(-1)
    optimum["loss"] = torch.where(bounded, loss, -math.inf)
    optimum["eta_dec"] = eta_dec
    # A learned eta_dec changes with each unit, so the units depend on each other.
    optimum.unit_loss = None
    return optimum


# --- The CVAE: theorem 2 ---


def cvae_optimum(theta, dim_z, beta, eta_enc, eta_dec):
    """The linear CVAE with a learnable encoder variance at its optimum. Source: theorem 2.

    Model:
        q(z|x,y) = N(W1 x + W2 y, Sigma), Sigma = diag(sigma_i^2) learnable
        p(y|x,z) = N(U1 z + U2 x, eta_dec^2 I)
        p(z|x)   = N(0, eta_enc^2 I)

    Optimum, where theta_i are variances, the eigenvalues of E (see `moment_given_x`), and omega_i
    are the singular values of U1:
        omega_i  = sqrt((theta_i - beta eta_dec^2)+) / eta_enc
        lambda_i = eta_enc sqrt((theta_i - beta eta_dec^2)+ / theta_i)
        sigma_i  = sqrt(beta) eta_enc eta_dec / sqrt(theta_i)  if theta_i > beta eta_dec^2
                   eta_enc                                     otherwise
        KL_i     = (log(theta_i / (beta eta_dec^2)))+ / 2
        L*       = [tr E - sum_i (theta_i - beta eta_dec^2)+] / (2 eta_dec^2)
                   + (d_y/2) log(2 pi eta_dec^2) + beta sum_i KL_i
        Unit i collapses at beta = theta_i / eta_dec^2.

    The better x predicts y, the smaller is E, and the more units collapse. For y = x it is 0.

    theta:   (d_y,), the spectrum of E, the largest variance first, in units of y squared
    dim_z:   the number of units of z
    beta:    the weight of KL(q(z|x,y) || p(z|x)), a number or (...,)
    eta_enc: the std of the prior, in units of z, a number or (...,)
    eta_dec: the std of p(y|x,z), in units of y, a number or (...,)

    Returns theta, lambda, omega, sigma, kl, information and collapse, each (..., dim_z), and loss,
    (...,). See the top of this file.
    """
    # The equations are those of theorem 1 for modes with the stds sqrt(theta_i).
    optimum = vae_optimum(theta.sqrt(), dim_z, beta=beta, eta_enc=eta_enc, eta_dec=eta_dec)
    optimum["theta"] = _leading(theta, dim_z)
    return optimum


# --- The two-level HVAE: theorems 3 and 5 ---


def hvae_optimum(theta, d_1, d_2, sigma_1, beta_1, beta_2, eta_enc, eta_dec):
    """The linear two-level HVAE with a learnable variance of q(z2|z1) at its optimum.

    Source: theorem 3.

    Model:
        q(z1|x)  = N(W1 x, sigma_1^2 I), fixed      q(z2|z1) = N(W2 z1, diag(sigma_2i^2)), learnable
        p(x|z1)  = N(U1 z1, eta_dec^2 I)
        p(z1|z2) = N(U2 z2, eta_dec^2 I)            p(z2)    = N(0, eta_enc^2 I)

    Optimum: let b = (beta_2 / beta_1) eta_dec^2, and let m_i = lambda_1i^2 + sigma_1^2 be the
    variance of mode i of z1.
        m_i       = max(sigma_1^2, sigma_1^2 theta_i^2 / (beta_2 eta_dec^2))
                        if sigma_1^2 >= b or sigma_1 theta_i / sqrt(beta_1) >= b
                    max(sigma_1^2, sigma_1 theta_i / sqrt(beta_1))   otherwise
        lambda_1i = sqrt(m_i - sigma_1^2)
        omega_2i  = sqrt((m_i - b)+) / eta_enc, the singular values of U2
        lambda_2i = eta_enc sqrt((m_i - b)+ / m_i)
        sigma_2i  = eta_enc sqrt(min(m_i, b) / m_i)
        KL1_i     = (min(m_i, b) / eta_dec^2 - 1) / 2 - log(sigma_1 / eta_dec)
        KL2_i     = (log(m_i / b))+ / 2
        L*        = [E||x||^2 - sum_i theta_i^2 (1 - sigma_1^2 / m_i)] / (2 eta_dec^2)
                    + (D/2) log(2 pi eta_dec^2) + sum_i (beta_1 KL1_i + beta_2 KL2_i)
        Unit i of z1 collapses at beta_2 = theta_i^2 / eta_dec^2 if theta_i <= sigma_1 sqrt(beta_1),
        and never otherwise.
        Unit i of z2 collapses at
        beta_2 = (beta_1 / eta_dec^2) max(sigma_1^2, sigma_1 theta_i / sqrt(beta_1)).

    KL1_i is the ELBO's term E[log q(z1|x) - log p(z1|z2)]. It is no divergence, since z2 depends
    on the draw of z1, and if b < sigma_1^2 it can be negative. Where lambda_1i = 0 < omega_2i, z2
    describes only the noise of z1.

    The theorem has d_1 = d_2. Beyond it, d_1 and d_2 may differ: z2 then describes the largest
    modes of z1, and the second case holds for the others.

    theta:   (D,), all modes of x as stds, the largest first, in units of x
    d_1:     the number of units of z1
    d_2:     the number of units of z2
    sigma_1: the std of q(z1|x), in units of z1, a number or (...,)
    beta_1:  the weight of the KL term of z1, a number or (...,)
    beta_2:  the weight of KL(q(z2|z1) || p(z2)), a number or (...,)
    eta_enc: the std of p(z2), in units of z2, a number or (...,)
    eta_dec: the std of p(x|z1) and of p(z1|z2), in units of x, a number or (...,)

    Returns theta, lambda_1, kl_1, information_1 and collapse_1, each (..., d_1); lambda_2,
    omega_2, sigma_2, kl_2, information_2 and collapse_2, each (..., d_2); and loss, (...,). See the
    top of this file.
    """
    sigma_1, beta_1, beta_2, eta_enc, eta_dec = _per_unit(
        sigma_1, beta_1, beta_2, eta_enc, eta_dec
    )
    theta_i = _leading(theta, d_1)
    # Whether z2 has a unit for mode i of z1.
    has_z2 = torch.arange(d_1) < d_2

    # Level 1: m_i, the variance of mode i of z1, where z2 describes it and where it does not.
    b = beta_2 / beta_1 * eta_dec**2
    m_without_z2 = sigma_1 * theta_i / beta_1.sqrt()
    m_with_z2 = (sigma_1 * theta_i / eta_dec)**2 / beta_2
    described = has_z2 & ((sigma_1**2 >= b) | (m_without_z2 >= b))
    m = torch.maximum(torch.where(described, m_with_z2, m_without_z2), sigma_1**2)
    lambda_1 = (m - sigma_1**2).sqrt()

    # Level 2 in terms of r_i = max(m_i / b, 1), which is 1 for a collapsed unit. Then
    # min(m_i, b) = m_i / r_i, and (m_i - b)+ = b (r_i - 1).
    r = torch.where(has_z2, (m / b).clamp(min=1), 1)
    kl_1 = (m / r / eta_dec**2 - 1) / 2 - (sigma_1 / eta_dec).log()
    r_2 = 1 + _leading(r - 1, d_2)
    omega_2 = (b * (r_2 - 1)).sqrt() / eta_enc
    lambda_2 = eta_enc * (1 - 1 / r_2).sqrt()
    sigma_2 = eta_enc / r_2.sqrt()
    kl_2 = r_2.log() / 2

    collapse_1 = (theta_i / eta_dec)**2 * has_z2
    collapse_1 = torch.where(theta_i > sigma_1 * beta_1.sqrt(), math.inf, collapse_1)
    collapse_2 = beta_1 / eta_dec**2 * torch.maximum(sigma_1**2, m_without_z2) * has_z2

    squared_error = (theta**2).sum(-1) - (theta_i**2 * (1 - sigma_1**2 / m)).sum(-1)
    reconstruction = _reconstruction(squared_error, theta.shape[-1], eta_dec[..., 0])
    quantities = {
        "theta": theta_i,
        "lambda_1": lambda_1,
        "kl_1": kl_1,
        "information_1": information(lambda_1, sigma_1),
        "lambda_2": lambda_2,
        "omega_2": omega_2,
        "sigma_2": sigma_2,
        "kl_2": kl_2,
        # As in the VAE, the information of z2 is its KL.
        "information_2": kl_2,
        "collapse_1": collapse_1,
        "collapse_2": _leading(collapse_2, d_2),
        "loss": reconstruction + (beta_1 * kl_1).sum(-1) + (beta_2 * kl_2).sum(-1),
    }

    unit_loss = _hvae_loss_of_units(
        theta=theta_i,
        has_z2=has_z2,
        sigma_1=sigma_1,
        beta_1=beta_1,
        beta_2=beta_2,
        eta_enc=eta_enc,
        eta_dec=eta_dec,
    )
    return Optimum(quantities, unit_loss, ("lambda_1", "lambda_2", "omega_2", "sigma_2"), beta_2)


def hvae_optimum_fixed_sigma_2(
    theta, d_1, d_2, sigma_1, sigma_2, beta_1, beta_2, eta_enc, eta_dec
):
    """The linear two-level HVAE with both encoder variances fixed at its optimum.

    Source: theorem 5.

    Model:
        q(z1|x)  = N(W1 x, sigma_1^2 I), fixed      q(z2|z1) = N(W2 z1, sigma_2^2 I), fixed
        p(x|z1)  = N(U1 z1, eta_dec^2 I)
        p(z1|z2) = N(U2 z2, eta_dec^2 I)            p(z2)    = N(0, eta_enc^2 I)

    Optimum: let c = eta_dec / eta_enc, K = sqrt(beta_1 beta_2) and
    m_0 = beta_2 c^2 sigma_2^2 / beta_1, and let m_i = lambda_1i^2 + sigma_1^2 be the variance of
    mode i of z1.
        m_i       = max(sigma_1^2, (sigma_1^2 theta_i^2 / (K c sigma_2))^(2/3))
                        if sigma_1^2 >= m_0 or sigma_1 theta_i / sqrt(beta_1) >= m_0
                    max(sigma_1^2, sigma_1 theta_i / sqrt(beta_1))   otherwise
        lambda_1i = sqrt(m_i - sigma_1^2)
        omega_2i  = sqrt((K c sqrt(m_i) / sigma_2 - beta_2 c^2)+ / beta_1), singular values of U2
        w_2i      = beta_1 omega_2i / (beta_1 omega_2i^2 + beta_2 c^2), singular values of W2
        lambda_2i = w_2i sqrt(m_i)
        KL1_i     = ([(1 - omega_2i w_2i)^2 m_i + omega_2i^2 sigma_2^2] / eta_dec^2 - 1) / 2
                    - log(sigma_1 / eta_dec), where [...] is E(z1 - U2 z2)^2 along mode i
        KL2_i     = ((lambda_2i^2 + sigma_2^2) / eta_enc^2 - 1) / 2 - log(sigma_2 / eta_enc)
        L*        = [E||x||^2 - sum_i theta_i^2 (1 - sigma_1^2 / m_i)] / (2 eta_dec^2)
                    + (D/2) log(2 pi eta_dec^2) + sum_i (beta_1 KL1_i + beta_2 KL2_i)
        Unit i of z1 collapses at beta_2 = theta_i^4 / (beta_1 (c sigma_1 sigma_2)^2) if
        theta_i <= sigma_1 sqrt(beta_1), and never otherwise.
        The mean of unit i of z2 dies at
        beta_2 = beta_1 / (c sigma_2)^2 max(sigma_1^2, sigma_1 theta_i / sqrt(beta_1)).

    KL1_i is the ELBO's term E[log q(z1|x) - log p(z1|z2)], which can be negative. A unit of z2
    whose mean is dead (lambda_2i = 0) still has a KL, unless sigma_2 = eta_enc.

    The theorem has d_1 = d_2. Beyond it, d_1 and d_2 may differ: z2 then describes the largest
    modes of z1, and the second case holds for the others, with omega_2i = 0.

    theta:   (D,), all modes of x as stds, the largest first, in units of x
    d_1:     the number of units of z1
    d_2:     the number of units of z2
    sigma_1: the std of q(z1|x), in units of z1, a number or (...,)
    sigma_2: the std of q(z2|z1), in units of z2, a number or (...,)
    beta_1:  the weight of the KL term of z1, a number or (...,)
    beta_2:  the weight of KL(q(z2|z1) || p(z2)), a number or (...,)
    eta_enc: the std of p(z2), in units of z2, a number or (...,)
    eta_dec: the std of p(x|z1) and of p(z1|z2), in units of x, a number or (...,)

    Returns theta, lambda_1, kl_1, information_1 and collapse_1, each (..., d_1); lambda_2,
    omega_2, kl_2, information_2 and collapse_2, each (..., d_2); and loss, (...,). See the top of
    this file.
    """
    sigma_1, sigma_2, beta_1, beta_2, eta_enc, eta_dec = _per_unit(
        sigma_1, sigma_2, beta_1, beta_2, eta_enc, eta_dec
    )
    theta_i = _leading(theta, d_1)
    # Whether z2 has a unit for mode i of z1.
    has_z2 = torch.arange(d_1) < d_2
    c = eta_dec / eta_enc
    K = (beta_1 * beta_2).sqrt()

    # Level 1: m_i, the variance of mode i of z1, where z2 describes it and where it does not.
    m_0 = beta_2 * (c * sigma_2)**2 / beta_1
    m_without_z2 = sigma_1 * theta_i / beta_1.sqrt()
    m_with_z2 = (sigma_1**2 * theta_i**2 / (K * c * sigma_2))**(2 / 3)
    described = has_z2 & ((sigma_1**2 >= m_0) | (m_without_z2 >= m_0))
    m = torch.maximum(torch.where(described, m_with_z2, m_without_z2), sigma_1**2)
    lambda_1 = (m - sigma_1**2).sqrt()

    # Level 2: the decoder U2, the encoder W2, and the KL terms of both levels.
    omega_2 = ((K * c * m.sqrt() / sigma_2 - beta_2 * c**2).clamp(min=0) / beta_1).sqrt() * has_z2
    w_2 = beta_1 * omega_2 / (beta_1 * omega_2**2 + beta_2 * c**2)
    squared_error_1 = (1 - omega_2 * w_2)**2 * m + (omega_2 * sigma_2)**2
    kl_1 = (squared_error_1 / eta_dec**2 - 1) / 2 - (sigma_1 / eta_dec).log()
    lambda_2 = _leading(w_2 * m.sqrt(), d_2)
    kl_2 = expected_kl(lambda_2, sigma_2, eta_enc)

    collapse_1 = theta_i**4 / (beta_1 * (c * sigma_1 * sigma_2)**2) * has_z2
    collapse_1 = torch.where(theta_i > sigma_1 * beta_1.sqrt(), math.inf, collapse_1)
    collapse_2 = beta_1 / (c * sigma_2)**2 * torch.maximum(sigma_1**2, m_without_z2) * has_z2

    squared_error = (theta**2).sum(-1) - (theta_i**2 * (1 - sigma_1**2 / m)).sum(-1)
    reconstruction = _reconstruction(squared_error, theta.shape[-1], eta_dec[..., 0])
    quantities = {
        "theta": theta_i,
        "lambda_1": lambda_1,
        "kl_1": kl_1,
        "information_1": information(lambda_1, sigma_1),
        "lambda_2": lambda_2,
        "omega_2": _leading(omega_2, d_2),
        "kl_2": kl_2,
        "information_2": information(lambda_2, sigma_2),
        "collapse_1": collapse_1,
        "collapse_2": _leading(collapse_2, d_2),
        "loss": reconstruction + (beta_1 * kl_1).sum(-1) + (beta_2 * kl_2).sum(-1),
    }

    unit_loss = _hvae_loss_of_units(
        theta=theta_i,
        sigma_2=sigma_2,
        has_z2=has_z2,
        sigma_1=sigma_1,
        beta_1=beta_1,
        beta_2=beta_2,
        eta_enc=eta_enc,
        eta_dec=eta_dec,
    )
    return Optimum(quantities, unit_loss, ("lambda_1", "lambda_2", "omega_2"), beta_2)
