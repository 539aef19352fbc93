"""Theorem 1 on synthetic data: does a linear VAE, its exact expected loss minimised, end where the closed form says?

    python matrix_VAE.py
    python matrix_VAE.py --learnable_sigma true,false --seed 0:9 --beta 0.5,1,2

With a learnable Sigma, Dang et al. (2024, arXiv 2306.05023, theorem 1) say that unit i collapses if theta_i, the i-th
singular value of the data, is at most sqrt(beta) eta_dec; with a fixed one its mean dies at sqrt(beta) sigma_i eta_dec / eta_enc.
"""
import math
from dataclasses import dataclass

import torch

import common
import theory


@dataclass
class Flags(common.MatrixFlags):
    beta: float = common.flag(1.0, "weight of KL(q(z|x) || p(z))", above=0)
    eta_enc: float = common.flag(1.0, "std of the prior p(z)", above=0)
    eta_dec: float = common.flag(1.0, "std of p(x|z)", above=0)
    learnable_sigma: bool = common.flag(True, "learn Sigma = diag sigma_i^2, or hold it fixed")
    sigma: float = common.flag(1.0, "std of q(z|x) if fixed", above=0, vector=True)
    d_0: int = common.flag(6, "dimension of x", low=1)
    d_1: int = common.flag(5, "units of z", low=1)


class VAE:
    """q(z|x) = N(W x, diag sigma^2),  p(z) = N(0, eta_enc^2 I),  p(x|z) = N(U z, eta_dec^2 I)."""

    def __init__(self, f):
        self.f, random = f, common.generator(f.seed, "data")
        scales = torch.logspace(math.log10(3), math.log10(0.3), f.d_0, dtype=torch.float64)   # of theta, about
        mix = torch.linalg.qr(torch.randn(f.d_0, f.d_0, dtype=torch.float64, generator=random)).Q
        x = torch.randn(f.num_samples, f.d_0, dtype=torch.float64, generator=random) * scales @ mix
        self.A = theory.second_moment(x)                                     # E[x x^T]
        self.fixed_sigma = torch.tensor(common.numbers(f.sigma), dtype=torch.float64).expand(f.d_1)

    def start(self, draw):
        start = {"W": draw(self.f.d_1, self.f.d_0), "U": draw(self.f.d_0, self.f.d_1)}
        return start | ({"log_sigma": draw(self.f.d_1)} if self.f.learnable_sigma else {})

    def sigma(self, p):
        return p["log_sigma"].exp() if self.f.learnable_sigma else self.fixed_sigma

    def loss(self, p):
        """The expected negative beta-ELBO, exact, in nats: a 0-d tensor."""
        f, W, U, sigma = self.f, p["W"], p["U"], self.sigma(p)
        unexplained = torch.eye(f.d_0, dtype=U.dtype) - U @ W
        squared_error = (unexplained @ self.A * unexplained).sum() + (U**2 @ sigma**2).sum()     # E||x - U z||^2
        reconstruction = squared_error / (2 * f.eta_dec**2) + f.d_0 / 2 * math.log(2 * math.pi * f.eta_dec**2)
        z_square = (W @ self.A * W).sum(1) + sigma**2                                            # E[z_i^2]
        kl = (z_square / f.eta_enc**2 - 1) / 2 - (sigma / f.eta_enc).log()
        return reconstruction + f.beta * kl.sum()

    def predicted(self):
        f, theta = self.f, theory.spectrum(self.A).sqrt()
        if f.learnable_sigma:
            return theory.vae_optimum(theta, f.d_1, f.beta, f.eta_enc, f.eta_dec)
        return theory.vae_optimum_fixed_sigma(theta, self.fixed_sigma, f.beta, f.eta_enc, f.eta_dec)

    def units(self, p):
        return theory.vae_units(p["U"], p["W"] @ theory.root(self.A), self.sigma(p), self.f.eta_enc)


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    for f in settings:
        if len(common.numbers(f.sigma)) not in (1, f.d_1):
            common.stop(f, f"--sigma: got {f.sigma!r}, wants one number or --d_1 = {f.d_1} of them")
    return theory.verify(VAE, settings)


if __name__ == "__main__":
    common.run(main)
