"""Theorem 3 on synthetic data: does the least exact expected loss of a linear HVAE with a
learnable variance of q(z2|z1) agree with the closed form?

    python matrix_HVAE_learnable_sigma_2.py
    python matrix_HVAE_learnable_sigma_2.py --seed 0:9 --beta_1 0.5,1 --sigma_1 0.5,1,2

Dang et al. (2024, arXiv 2306.05023, theorem 3): the ratio beta_2 / beta_1 decides which modes of
z1 the level z2 encodes. z1 and z2 together describe the strong modes of the data. z1 alone
describes the weaker modes, and no unit describes the weakest ones.

The loss depends only on the weights and on the second moment of the data, so nothing is sampled.
L-BFGS minimises it in float64 from 8 random starts, and Newton's method continues from the best
minimum (see verify.minimise). The errors should then be at most 1e-6.
"""
import math
from dataclasses import dataclass

import common
import torch

import theory
import verify


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
    sigma_1: float = common.flag(1.0, "standard deviation of the encoder q(z1|x)", above=0)
    d_0: int = common.flag(6, "number of columns of x", low=1, high=1_000)
    d_1: int = common.flag(5, "number of units of z1", low=1, high=1_000)
    d_2: int = common.flag(5, "number of units of z2", low=1, high=1_000)


class HVAE:
    """The linear two-level HVAE of theorem 3.

    q(z1|x)  = N(W1 x, sigma_1^2 I)       q(z2|z1) = N(W2 z1, diag(sigma_2^2))
    p(x|z1)  = N(U1 z1, eta_dec^2 I)      p(z1|z2) = N(U2 z2, eta_dec^2 I)
    p(z2)    = N(0, eta_enc^2 I)

    The parameters are W1 (d_1, d_0), W2 (d_2, d_1), U2 (d_1, d_2), U1 (d_0, d_1) and log_sigma_2
    (d_2,).
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
            "W2": draw(f.d_2, f.d_1),
            "U2": draw(f.d_1, f.d_2),
            "U1": draw(f.d_0, f.d_1),
            "log_sigma_2": draw(f.d_2),
        }

    def loss(self, p):
        """The exact expected negative beta-ELBO in nats, a 0-d tensor.

        L = E||x - U1 z1||^2 / (2 eta_dec^2) + (d_0/2) log(2 pi eta_dec^2)
            + beta_1 KL1 + beta_2 KL2
        KL1 = (E||z1 - U2 z2||^2 / eta_dec^2 - d_1) / 2 - d_1 log(sigma_1 / eta_dec)
        KL2 = sum_i (E[z2_i^2] / eta_enc^2 - 1) / 2 - log(sigma_2i / eta_enc)
        """
        f = self.f
        W1 = p["W1"]
        W2 = p["W2"]
        U2 = p["U2"]
        U1 = p["U1"]
        sigma_2 = p["log_sigma_2"].exp()
        I_0 = torch.eye(f.d_0, dtype=W1.dtype)
        I_1 = torch.eye(f.d_1, dtype=W1.dtype)

        # x - U1 z1 = (I - U1 W1) x - U1 noise, with the noise of q(z1|x).
        error_map = I_0 - U1 @ W1
        squared_error = (error_map @ self.A * error_map).sum() + f.sigma_1**2 * (U1**2).sum()
        constant = f.d_0 / 2 * math.log(2 * math.pi * f.eta_dec**2)
        reconstruction = squared_error / (2 * f.eta_dec**2) + constant

        # z1 - U2 z2 = (I - U2 W2) z1 - U2 noise, with the noise of q(z2|z1).
        z1_moment = W1 @ self.A @ W1.T + f.sigma_1**2 * I_1  # E[z1 z1^T]
        error_map = I_1 - U2 @ W2
        squared_error = (error_map @ z1_moment * error_map).sum() + (U2**2 @ sigma_2**2).sum()
        kl_1 = (squared_error / f.eta_dec**2 - f.d_1) / 2 - f.d_1 * math.log(f.sigma_1 / f.eta_dec)

        z2_squared = (W2 @ z1_moment * W2).sum(1) + sigma_2**2  # E[z2_i^2], (d_2,)
        kl_2 = ((z2_squared / f.eta_enc**2 - 1) / 2 - (sigma_2 / f.eta_enc).log()).sum()
        return reconstruction + f.beta_1 * kl_1 + f.beta_2 * kl_2

    def predicted(self):
        """The closed form of theorem 3."""
        f = self.f
        return theory.hvae_optimum(
            theory.spectrum(self.A).sqrt(),
            f.d_1,
            f.d_2,
            sigma_1=f.sigma_1,
            beta_1=f.beta_1,
            beta_2=f.beta_2,
            eta_enc=f.eta_enc,
            eta_dec=f.eta_dec,
        )

    def units(self, p):
        """The quantities of the closed form at these parameters."""
        f = self.f
        return verify.hvae_units(
            V1=p["W1"] @ theory.root(self.A),
            W2=p["W2"],
            U2=p["U2"],
            sigma_1=f.sigma_1,
            sigma_2=p["log_sigma_2"].exp(),
            eta_enc=f.eta_enc,
            eta_dec=f.eta_dec,
        )


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    return verify.verify(HVAE, settings)


if __name__ == "__main__":
    common.run(main)
