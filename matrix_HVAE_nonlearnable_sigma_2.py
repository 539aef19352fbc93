"""Theorem 5 on synthetic data: does a linear MHVAE with both Sigmas fixed, its exact expected loss minimised, end where
the closed form says?

    python matrix_HVAE_nonlearnable_sigma_2.py
    python matrix_HVAE_nonlearnable_sigma_2.py --seed 0:9 --beta_1 0.5,1 --sigma_2 0.5,1,2

Dang et al. (2024, arXiv 2306.05023, theorem 5): as with a learnable Sigma2 (matrix_HVAE_learnable_sigma_2.py), but z2
weakens a mode that it describes, and a z2 whose mean is dead still has a KL, unless sigma_2 = eta_enc.
"""
import math
from dataclasses import dataclass

import torch

import common
import theory


@dataclass
class Flags(common.MatrixFlags):
    beta_1: float = common.flag(1.0, "weight of KL(q(z1|x) || p(z1|z2))", above=0)
    beta_2: float = common.flag(2.0, "weight of KL(q(z2|z1) || p(z2))", above=0)
    eta_enc: float = common.flag(1.0, "std of the prior p(z2)", above=0)
    eta_dec: float = common.flag(1.0, "std of p(z1|z2) and of p(x|z1)", above=0)
    sigma_1: float = common.flag(1.0, "std of q(z1|x)", above=0)
    sigma_2: float = common.flag(1.0, "std of q(z2|z1)", above=0)
    d_0: int = common.flag(5, "dimension of x", low=1)
    d_1: int = common.flag(5, "units of z1", low=1)
    d_2: int = common.flag(5, "units of z2", low=1)


class HVAE:
    """q(z1|x) = N(W1 x, sigma_1^2 I),  q(z2|z1) = N(W2 z1, sigma_2^2 I),  p(z2) = N(0, eta_enc^2 I),
    p(z1|z2) = N(U2 z2, eta_dec^2 I),  p(x|z1) = N(U1 z1, eta_dec^2 I)."""

    def __init__(self, f):
        self.f, random = f, common.generator(f.seed, "data")
        scales = torch.logspace(math.log10(4), math.log10(0.4), f.d_0, dtype=torch.float64)   # of theta, about
        mix = torch.linalg.qr(torch.randn(f.d_0, f.d_0, dtype=torch.float64, generator=random)).Q
        x = torch.randn(f.num_samples, f.d_0, dtype=torch.float64, generator=random) * scales @ mix
        self.A = theory.second_moment(x)                                     # E[x x^T]

    def start(self, draw):
        f = self.f
        return {"W1": draw(f.d_1, f.d_0), "W2": draw(f.d_2, f.d_1), "U2": draw(f.d_1, f.d_2), "U1": draw(f.d_0, f.d_1)}

    def loss(self, p):
        """The expected negative beta-ELBO, exact, in nats: a 0-d tensor."""
        f, W1, W2, U2, U1 = self.f, p["W1"], p["W2"], p["U2"], p["U1"]
        identity = torch.eye(max(f.d_0, f.d_1), dtype=W1.dtype)
        unexplained = identity[:f.d_0, :f.d_0] - U1 @ W1                                         # E||x - U1 z1||^2:
        squared_error = (unexplained @ self.A * unexplained).sum() + f.sigma_1**2 * (U1**2).sum()
        reconstruction = squared_error / (2 * f.eta_dec**2) + f.d_0 / 2 * math.log(2 * math.pi * f.eta_dec**2)
        z1_moment = W1 @ self.A @ W1.T + f.sigma_1**2 * identity[:f.d_1, :f.d_1]
        unexplained = identity[:f.d_1, :f.d_1] - U2 @ W2                                         # E||z1 - U2 z2||^2:
        squared_error = (unexplained @ z1_moment * unexplained).sum() + f.sigma_2**2 * (U2**2).sum()
        kl_1 = (squared_error / f.eta_dec**2 - f.d_1) / 2 - f.d_1 * math.log(f.sigma_1 / f.eta_dec)
        z2_square = (W2 @ z1_moment * W2).sum() + f.d_2 * f.sigma_2**2                           # E||z2||^2
        kl_2 = (z2_square / f.eta_enc**2 - f.d_2) / 2 - f.d_2 * math.log(f.sigma_2 / f.eta_enc)
        return reconstruction + f.beta_1 * kl_1 + f.beta_2 * kl_2

    def predicted(self):
        f, theta = self.f, theory.spectrum(self.A).sqrt()
        return theory.hvae_optimum_fixed_sigma_2(
            theta, f.d_1, f.d_2, f.sigma_1, f.sigma_2, f.beta_1, f.beta_2, f.eta_enc, f.eta_dec)

    def units(self, p):
        f = self.f
        sigma_2 = torch.full((f.d_2,), f.sigma_2, dtype=torch.float64)
        return theory.hvae_units(
            p["W1"] @ theory.root(self.A), p["W2"], p["U2"], f.sigma_1, sigma_2, f.eta_enc, f.eta_dec)


def main(argv=None):
    return theory.verify(HVAE, common.parse_flags(Flags, argv))


if __name__ == "__main__":
    common.run(main)
