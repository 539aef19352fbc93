"""Theorem 2 on synthetic data: does the least exact expected loss of a linear CVAE agree with the
closed form?

    python matrix_CVAE.py
    python matrix_CVAE.py --seed 0:9 --beta 0.5,1,2

Dang et al. (2024, arXiv 2306.05023, theorem 2): subtract from y its best linear prediction from x.
Let theta_i be the i-th largest eigenvalue of the second moment of what remains. Unit i collapses if
theta_i <= beta eta_dec^2.

The loss depends only on the weights and on the second moment of (x, y), so nothing is sampled.
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
    beta: float = common.flag(1.0, "weight of KL(q(z|x,y) || p(z|x)) in the loss", above=0)
    eta_enc: float = common.flag(1.0, "standard deviation of the prior p(z|x)", above=0)
    eta_dec: float = common.flag(1.0, "standard deviation of the decoder p(y|x,z)", above=0)
    dim_x: int = common.flag(5, "number of columns of x", low=1, high=1_000)
    dim_y: int = common.flag(5, "number of columns of y", low=1, high=1_000)
    dim_z: int = common.flag(5, "number of units of z", low=1, high=1_000)
    seed: int = common.flag(2, "seed of all random numbers", low=0)


class CVAE:
    """The linear CVAE of theorem 2.

    q(z|x,y) = N(W1 x + W2 y, diag(sigma^2))
    p(y|x,z) = N(U1 z + U2 x, eta_dec^2 I)
    p(z|x)   = N(0, eta_enc^2 I)

    The parameters are W1 (dim_z, dim_x), W2 (dim_z, dim_y), U1 (dim_y, dim_z), U2 (dim_y, dim_x)
    and log_sigma (dim_z,).
    """

    data_flags = ("dim_x", "dim_y")

    def __init__(self, f):
        self.f = f
        random = common.generator(f.seed, "data")

        def normal(*shape):
            return torch.randn(shape, dtype=torch.float64, generator=random)

        # y is a linear function of x plus noise with these stds. The sqrt(theta_i) are near them.
        x = normal(f.num_samples, f.dim_x)
        stds = torch.logspace(math.log10(3), math.log10(0.3), f.dim_y, dtype=torch.float64)
        rotation = torch.linalg.qr(normal(f.dim_y, f.dim_y)).Q
        prediction = x @ normal(f.dim_x, f.dim_y)
        y = prediction + normal(f.num_samples, f.dim_y) * stds @ rotation
        self.moment = theory.second_moment(x, y)  # E[(x, y) (x, y)^T]

    def start(self, draw):
        """Random parameters, {name: tensor}. draw(*shape) gives a tensor of normal numbers."""
        f = self.f
        return {
            "W1": draw(f.dim_z, f.dim_x),
            "W2": draw(f.dim_z, f.dim_y),
            "U1": draw(f.dim_y, f.dim_z),
            "U2": draw(f.dim_y, f.dim_x),
            "log_sigma": draw(f.dim_z),
        }

    def loss(self, p):
        """The exact expected negative beta-ELBO in nats, a 0-d tensor.

        L = E||y - U1 z - U2 x||^2 / (2 eta_dec^2) + (dim_y/2) log(2 pi eta_dec^2)
            + beta sum_i KL_i
        KL_i = (E[z_i^2] / eta_enc^2 - 1) / 2 - log(sigma_i / eta_enc)
        """
        f = self.f
        W = torch.cat([p["W1"], p["W2"]], dim=1)
        U1 = p["U1"]
        U2 = p["U2"]
        sigma = p["log_sigma"].exp()

        # y - U1 z - U2 x = ([-U2, I] - U1 W) (x, y) - U1 noise, with the noise of q(z|x,y).
        error_map = torch.cat([-U2, torch.eye(f.dim_y, dtype=U1.dtype)], dim=1) - U1 @ W
        squared_error = (error_map @ self.moment * error_map).sum() + (U1**2 @ sigma**2).sum()
        constant = f.dim_y / 2 * math.log(2 * math.pi * f.eta_dec**2)
        reconstruction = squared_error / (2 * f.eta_dec**2) + constant

        z_squared = (W @ self.moment * W).sum(1) + sigma**2  # E[z_i^2], (dim_z,)
        kl = (z_squared / f.eta_enc**2 - 1) / 2 - (sigma / f.eta_enc).log()
        return reconstruction + f.beta * kl.sum()

    def predicted(self):
        """The closed form of theorem 2."""
        f = self.f
        theta = theory.spectrum(theory.moment_given_x(self.moment, f.dim_x))
        return theory.cvae_optimum(
            theta, f.dim_z, beta=f.beta, eta_enc=f.eta_enc, eta_dec=f.eta_dec
        )

    def units(self, p):
        """The quantities of the closed form at these parameters."""
        W = torch.cat([p["W1"], p["W2"]], dim=1)
        V = W @ theory.root(self.moment)
        return verify.vae_units(p["U1"], V, p["log_sigma"].exp(), self.f.eta_enc)


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    return verify.verify(CVAE, settings)


if __name__ == "__main__":
    common.run(main)
