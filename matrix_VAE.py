"""Theorem 1 on synthetic data: does the least exact expected loss of a linear VAE agree with the
closed form?

    python matrix_VAE.py
    python matrix_VAE.py --learnable_sigma true,false --seed 0:9 --beta 0.5,1,2

Dang et al. (2024, arXiv 2306.05023, theorem 1): let theta_i be the square root of the i-th largest
eigenvalue of E[x x^T]. If the standard deviation of the encoder is learned, unit i collapses if
theta_i <= sqrt(beta) eta_dec. If it is fixed, and sigma_i is its i-th smallest value, the mean of
unit i is constant if theta_i <= sqrt(beta) sigma_i eta_dec / eta_enc.

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
    beta: float = common.flag(1.0, "weight of KL(q(z|x) || p(z)) in the loss", above=0)
    eta_enc: float = common.flag(1.0, "standard deviation of the prior p(z)", above=0)
    eta_dec: float = common.flag(1.0, "standard deviation of the decoder p(x|z)", above=0)
    learnable_sigma: bool = common.flag(
        True, "whether the standard deviation of the encoder is learned; --sigma fixes it otherwise"
    )
    sigma: float = common.flag(
        1.0, "standard deviation of the encoder q(z|x) if it is fixed", above=0, vector=True
    )
    d_0: int = common.flag(6, "number of columns of x", low=1, high=1_000)
    d_1: int = common.flag(5, "number of units of z", low=1, high=1_000)


class VAE:
    """The linear VAE of theorem 1.

    q(z|x) = N(W x, diag(sigma^2))
    p(x|z) = N(U z, eta_dec^2 I)
    p(z)   = N(0, eta_enc^2 I)

    The parameters are W (d_1, d_0), U (d_0, d_1) and, if --learnable_sigma is true, log_sigma
    (d_1,).
    """

    data_flags = ("d_0",)

    def __init__(self, f):
        self.f = f
        random = common.generator(f.seed, "data")
        # The stds of the data's modes: the theta_i are near them.
        stds = torch.logspace(math.log10(3), math.log10(0.3), f.d_0, dtype=torch.float64)
        normal = torch.randn(f.d_0, f.d_0, dtype=torch.float64, generator=random)
        rotation = torch.linalg.qr(normal).Q
        x = torch.randn(f.num_samples, f.d_0, dtype=torch.float64, generator=random)
        self.A = theory.second_moment(x * stds @ rotation)  # E[x x^T]
        sigma = torch.tensor(common.vector_values(f.sigma), dtype=torch.float64)
        self.fixed_sigma = sigma.expand(f.d_1)

    def start(self, draw):
        """Random parameters, {name: tensor}. draw(*shape) gives a tensor of normal numbers."""
        f = self.f
        parameters = {"W": draw(f.d_1, f.d_0), "U": draw(f.d_0, f.d_1)}
        if f.learnable_sigma:
            parameters["log_sigma"] = draw(f.d_1)
        return parameters

    def sigma(self, p):
        """The stds of q(z|x), (d_1,)."""
        return p["log_sigma"].exp() if self.f.learnable_sigma else self.fixed_sigma

    def loss(self, p):
        """The exact expected negative beta-ELBO in nats, a 0-d tensor.

        L = E||x - U z||^2 / (2 eta_dec^2) + (d_0/2) log(2 pi eta_dec^2) + beta sum_i KL_i
        KL_i = (E[z_i^2] / eta_enc^2 - 1) / 2 - log(sigma_i / eta_enc)
        """
        f = self.f
        W = p["W"]
        U = p["U"]
        sigma = self.sigma(p)

        # x - U z = (I - U W) x - U noise, with the noise of q(z|x).
        error_map = torch.eye(f.d_0, dtype=U.dtype) - U @ W
        squared_error = (error_map @ self.A * error_map).sum() + (U**2 @ sigma**2).sum()
        constant = f.d_0 / 2 * math.log(2 * math.pi * f.eta_dec**2)
        reconstruction = squared_error / (2 * f.eta_dec**2) + constant

        z_squared = (W @ self.A * W).sum(1) + sigma**2  # E[z_i^2], (d_1,)
        kl = (z_squared / f.eta_enc**2 - 1) / 2 - (sigma / f.eta_enc).log()
        return reconstruction + f.beta * kl.sum()

    def predicted(self):
        """The closed form of theorem 1."""
        f = self.f
        theta = theory.spectrum(self.A).sqrt()
        if f.learnable_sigma:
            return theory.vae_optimum(
                theta, f.d_1, beta=f.beta, eta_enc=f.eta_enc, eta_dec=f.eta_dec
            )
        return theory.vae_optimum_fixed_sigma(
            theta, self.fixed_sigma, beta=f.beta, eta_enc=f.eta_enc, eta_dec=f.eta_dec
        )

    def units(self, p):
        """The quantities of the closed form at these parameters."""
        V = p["W"] @ theory.root(self.A)
        return verify.vae_units(p["U"], V, self.sigma(p), self.f.eta_enc)


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    for f in settings:
        if len(common.vector_values(f.sigma)) not in (1, f.d_1):
            common.stop(
                f, f"--sigma: got {f.sigma!r}, wants one number or --d_1 = {f.d_1} of them"
            )
    return verify.verify(VAE, settings)


if __name__ == "__main__":
    common.run(main)
