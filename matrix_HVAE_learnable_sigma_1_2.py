"""A linear HVAE with both encoder variances learnable, a case that the paper leaves open. Does z2
collapse?

    python matrix_HVAE_learnable_sigma_1_2.py --beta_2 0.5,1,2

Dang et al. (2024, arXiv 2306.05023, theorem 3) keep Sigma1, the variance of q(z1|x), fixed. Here it
is learnable, too. Let m be the variance of a mode of z1, and minimise the loss over everything
else. The loss is then (beta_2 - beta_1) log(m) / 2 + const for m above
b = beta_2 eta_dec^2 / beta_1. Three cases follow:

    beta_2 > beta_1    Every unit of z2 collapses, and z1 is the z of a VAE (theorem 1) whose prior
                       has the std eta_dec. The script prints VERIFIED.
    beta_2 = beta_1    The least loss is the same, and every m >= b attains it. The units are not
                       unique, so only the loss is compared. The script prints VERIFIED.
    beta_2 < beta_1    The loss falls without bound as m grows. The script follows it for a while,
                       and prints UNBOUNDED.

So a learnable encoder variance of z1 collapses the top level.

The loss depends only on the weights and on the second moment of the data, so nothing is sampled.
L-BFGS minimises it in float64 from 8 random starts, and Newton's method continues from the best
minimum (see verify.minimise). The errors should then be at most 1e-6.
"""
import math
from dataclasses import dataclass

import common
import torch

import processes
import theory
import verify

# The largest error of the loss for beta_2 < beta_1. At a large sigma_1 the minimum is too narrow
# for verify.TOLERANCE.
UNBOUNDED_TOLERANCE = 1e-3


@dataclass
class Flags(common.MatrixFlags):
    beta_1: float = common.flag(
        1.0, "weight of E_q[log q(z1|x) - log p(z1|z2)] in the loss", above=0
    )
    beta_2: float = common.flag(2.0, "weight of KL(q(z2|z1) || p(z2)) in the loss", above=0)
    eta_enc: float = common.flag(1.0, "standard deviation of the prior p(z2)", above=0)
    eta_dec: float = common.flag(
        1.0, "standard deviation of the decoders p(x|z1) and p(z1|z2)", above=0
    )
    d_0: int = common.flag(6, "number of columns of x", low=1, high=1_000)
    d_1: int = common.flag(5, "number of units of z1, and of z2", low=1, high=1_000)


class HVAE:
    """A linear two-level HVAE with learnable variances.

    q(z1|x)  = N(W1 x, diag(sigma_1^2))   q(z2|z1) = N(W2 z1, diag(sigma_2^2))
    p(x|z1)  = N(U1 z1, eta_dec^2 I)      p(z1|z2) = N(U2 z2, eta_dec^2 I)
    p(z2)    = N(0, eta_enc^2 I)

    The parameters are W1 (d_1, d_0), W2 (d_1, d_1), U2 (d_1, d_1), U1 (d_0, d_1), log_sigma_1
    (d_1,) and log_sigma_2 (d_1,).
    """

    data_flags = ("d_0",)

    def __init__(self, f):
        self.f = f
        random = common.generator(f.seed, "data")
        # The stds of the data's modes: the theta_i are near them.
        stds = torch.logspace(math.log10(4), math.log10(0.4), f.d_0, dtype=torch.float64)
        normal = torch.randn(f.d_0, f.d_0, dtype=torch.float64, generator=random)
        rotation = torch.linalg.qr(normal).Q
        x = torch.randn(f.num_samples, f.d_0, dtype=torch.float64, generator=random)
        self.A = theory.second_moment(x * stds @ rotation)  # E[x x^T]

    def start(self, draw):
        """Random parameters, {name: tensor}. draw(*shape) gives a tensor of normal numbers."""
        f = self.f
        return {
            "W1": draw(f.d_1, f.d_0),
            "W2": draw(f.d_1, f.d_1),
            "U2": draw(f.d_1, f.d_1),
            "U1": draw(f.d_0, f.d_1),
            "log_sigma_1": draw(f.d_1),
            "log_sigma_2": draw(f.d_1),
        }

    def z1_moment(self, p):
        """E[z1 z1^T], (d_1, d_1)."""
        return p["W1"] @ self.A @ p["W1"].T + torch.diag((2 * p["log_sigma_1"]).exp())

    def loss(self, p):
        """The exact expected negative beta-ELBO in nats, a 0-d tensor.

        L = E||x - U1 z1||^2 / (2 eta_dec^2) + (d_0/2) log(2 pi eta_dec^2)
            + beta_1 KL1 + beta_2 KL2
        KL1 = (E||z1 - U2 z2||^2 / eta_dec^2 - d_1) / 2 - sum_i log(sigma_1i / eta_dec)
        KL2 = sum_i (E[z2_i^2] / eta_enc^2 - 1) / 2 - log(sigma_2i / eta_enc)
        """
        f = self.f
        W1 = p["W1"]
        W2 = p["W2"]
        U2 = p["U2"]
        U1 = p["U1"]
        sigma_1 = p["log_sigma_1"].exp()
        sigma_2 = p["log_sigma_2"].exp()
        I_0 = torch.eye(f.d_0, dtype=W1.dtype)
        I_1 = torch.eye(f.d_1, dtype=W1.dtype)

        # x - U1 z1 = (I - U1 W1) x - U1 noise, with the noise of q(z1|x).
        error_map = I_0 - U1 @ W1
        squared_error = (error_map @ self.A * error_map).sum() + (U1**2 @ sigma_1**2).sum()
        constant = f.d_0 / 2 * math.log(2 * math.pi * f.eta_dec**2)
        reconstruction = squared_error / (2 * f.eta_dec**2) + constant

        # z1 - U2 z2 = (I - U2 W2) z1 - U2 noise, with the noise of q(z2|z1).
        z1_moment = self.z1_moment(p)
        error_map = I_1 - U2 @ W2
        squared_error = (error_map @ z1_moment * error_map).sum() + (U2**2 @ sigma_2**2).sum()
        kl_1 = (squared_error / f.eta_dec**2 - f.d_1) / 2 - (sigma_1 / f.eta_dec).log().sum()

        z2_squared = (W2 @ z1_moment * W2).sum(1) + sigma_2**2  # E[z2_i^2], (d_1,)
        kl_2 = ((z2_squared / f.eta_enc**2 - 1) / 2 - (sigma_2 / f.eta_enc).log()).sum()
        return reconstruction + f.beta_1 * kl_1 + f.beta_2 * kl_2

    def predicted(self):
        """The optimum, for beta_2 > beta_1.

        For beta_2 = beta_1, only its loss and theta. For beta_2 < beta_1 there is none, and this is
        the optimum with Sigma1 = eta_dec^2 I held, where `follow_unbounded` begins.
        """
        f = self.f
        if f.beta_2 < f.beta_1:
            return self.theorem_3(sigma_1=f.eta_dec)

        theta = theory.spectrum(self.A).sqrt()
        # z1 is the z of a VAE whose prior has the std eta_dec.
        vae = theory.vae_optimum(
            theta, f.d_1, beta=f.beta_1, eta_enc=f.eta_dec, eta_dec=f.eta_dec
        )
        if f.beta_2 == f.beta_1:
            return {"theta": vae["theta"], "loss": vae["loss"]}

        zeros = torch.zeros(f.d_1, dtype=torch.float64)
        return {
            "theta": vae["theta"],
            "loss": vae["loss"],
            # Whether a unit of z1 collapses does not depend on beta_2.
            "collapse_1": torch.where(vae["kl"] > 0, math.inf, 0),
            "collapse_2": zeros + f.beta_1,
            "lambda_2": zeros,
            "omega_2": zeros,
            "sigma_2": zeros + f.eta_enc,
            "kl_2": zeros,
            "information_2": zeros,
            "lambda_1": vae["lambda"],
            "omega_1": vae["omega"],
            "sigma_1": vae["sigma"],
            "kl_1": vae["kl"],
            "information_1": vae["information"],
        }

    def theorem_3(self, sigma_1):
        """The optimum with Sigma1 = sigma_1^2 I held."""
        f = self.f
        return theory.hvae_optimum(
            theory.spectrum(self.A).sqrt(),
            f.d_1,
            f.d_1,
            sigma_1=sigma_1,
            beta_1=f.beta_1,
            beta_2=f.beta_2,
            eta_enc=f.eta_enc,
            eta_dec=f.eta_dec,
        )

    def units(self, p):
        """The quantities of the optimum at these parameters."""
        f = self.f
        V1 = p["W1"] @ theory.root(self.A)
        V2 = p["W2"] @ torch.linalg.cholesky(self.z1_moment(p))
        z1_units = verify.vae_units(p["U1"], V1, p["log_sigma_1"].exp(), f.eta_dec)
        z2_units = verify.vae_units(p["U2"], V2, p["log_sigma_2"].exp(), f.eta_enc)
        units = {}
        for name, values in z1_units.items():
            units[f"{name}_1"] = values
        for name, values in z2_units.items():
            units[f"{name}_2"] = values
        return units


def follow_unbounded(f):
    """Follow the loss of a setting with beta_2 < beta_1 as it falls without bound.

    Sigma1 = sigma_1^2 I is held at larger and larger sigma_1. The least loss is then that of
    theorem 3, which bounds the least loss with a learnable Sigma1 from above. At last Sigma1 is
    released. Prints a table and the verdict. Returns whether the loss was as predicted and fell.
    """
    device = common.select_device(f)
    hvae = HVAE(f)
    hvae_on_device = verify.move_problem(hvae, device)
    starts = verify.random_starts(hvae, f, device)

    # 1. Minimise at each sigma_1, and compare with theorem 3.
    rows = [["sigma_1", "optimal loss", "error"]]
    errors = []
    losses = []
    for factor in (1, 2, 4):
        sigma_1 = factor * f.eta_dec
        parameters, loss = minimise_at(sigma_1, hvae_on_device, starts, device)
        optimal_loss = hvae.theorem_3(sigma_1)["loss"].item()
        errors.append(abs(loss - optimal_loss))
        losses.append(loss)
        pair = common.format_pair(f"{optimal_loss:.6f}", f"{loss:.6f}")
        rows.append([f"{sigma_1:g}", pair, f"{errors[-1]:.1e}"])
        starts = [double_z1(parameters)]

    # 2. Release Sigma1. The loss has no minimum, so this stops after a while.
    with device:
        _, released_loss = verify.minimise(hvae_on_device.loss, [parameters], blocks=2)[0]

    # 3. Print the table and the verdict.
    slope = (f.beta_1 - f.beta_2) * f.d_1
    print(
        f"\nThe loss has no minimum for beta_2 = {f.beta_2} < beta_1 = {f.beta_1} (seed {f.seed}). "
        "Each row holds Sigma1 at sigma_1^2 I.\n"
        f"For large sigma_1, the loss falls by {slope:g} nats as log sigma_1 rises by 1.\n"
        f"{verify.PAIRS}"
    )
    common.print_table(rows)
    # The loss falls for large sigma_1. From the first sigma_1 to the second it may rise.
    falls = losses[1] > losses[2] > released_loss
    # The maximum of a tensor, unlike Python's, is nan if one of the errors is.
    max_error = torch.tensor(errors, dtype=torch.float64).max().item()
    verified = max_error <= UNBOUNDED_TOLERANCE and falls
    verdict = "UNBOUNDED" if verified else "FAILED"
    print(
        f"{verdict}: the largest error is {max_error:.1e}; with a learnable Sigma1, the "
        f"minimisation was stopped at the loss {released_loss:.6f}"
    )
    return verified


def minimise_at(sigma_1, hvae, starts, device):
    """Minimise the loss with Sigma1 = sigma_1^2 I held. Returns (parameters, loss)."""
    log_sigma_1 = torch.full(
        (hvae.f.d_1,), math.log(sigma_1), dtype=torch.float64, device=device
    )
    held = {"log_sigma_1": log_sigma_1}
    free_starts = []
    for start in starts:
        free_starts.append({name: start[name] for name in start if name not in held})

    def loss_at_sigma_1(p):
        return hvae.loss(p | held)

    with device:
        parameters, loss = verify.minimise(loss_at_sigma_1, free_starts)[0]
    return parameters | held, loss


def double_z1(parameters):
    """Parameters whose z1 is twice as large: a start that is near the minimum at 2 sigma_1."""
    return {
        "W1": parameters["W1"] * 2.0,
        "W2": parameters["W2"] * 0.5,
        "U2": parameters["U2"] * 2.0,
        "U1": parameters["U1"] * 0.5,
        "log_sigma_2": parameters["log_sigma_2"],
    }


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    # Of several processes, the first one does all.
    if processes.rank_and_count()[0] > 0:
        return 0
    verify.check_flags(HVAE, settings)

    bounded = [f for f in settings if f.beta_2 >= f.beta_1]
    status = verify.verify(HVAE, bounded) if bounded else 0
    if any(f.beta_2 == f.beta_1 for f in bounded):
        print(
            "Where beta_2 = beta_1, only the loss is compared. The optimum is flat there, because "
            "every variance of a mode of z1 from eta_dec^2 on has the same loss."
        )
    for f in settings:
        if f.beta_2 < f.beta_1 and not follow_unbounded(f):
            status = 1
    return status


if __name__ == "__main__":
    common.run(main)
