"""Theorem 2 on synthetic data: does a linear CVAE, its exact expected loss minimised, end where the closed form says?

    python matrix_CVAE.py
    python matrix_CVAE.py --seed 0:9 --beta 0.5,1,2

Dang et al. (2024, arXiv 2306.05023, theorem 2): unit i collapses if theta_i, the i-th eigenvalue of what x leaves
unexplained of y, is at most beta eta_dec^2.
"""
import math
from dataclasses import dataclass

import torch

import common
import theory


@dataclass
class Flags(common.MatrixFlags):
    beta: float = common.flag(1.0, "weight of KL(q(z|x,y) || p(z|x))", above=0)
    eta_enc: float = common.flag(1.0, "std of the prior p(z|x)", above=0)
    eta_dec: float = common.flag(1.0, "std of p(y|x,z)", above=0)
    dim_x: int = common.flag(5, "dimension of x", low=1)
    dim_y: int = common.flag(5, "dimension of y", low=1)
    dim_z: int = common.flag(5, "units of z", low=1)
    seed: int = common.flag(2, "seed of all random numbers", low=0)


class CVAE:
    """q(z|x,y) = N(W1 x + W2 y, diag sigma^2),  p(z|x) = N(0, eta_enc^2 I),  p(y|x,z) = N(U1 z + U2 x, eta_dec^2 I)."""

    def __init__(self, f):
        self.f, random = f, common.generator(f.seed, "data")

        def normal(*shape):
            return torch.randn(shape, dtype=torch.float64, generator=random)

        x = normal(f.num_samples, f.dim_x)
        scales = torch.logspace(math.log10(3), math.log10(0.3), f.dim_y, dtype=torch.float64)     # of root theta, about
        mix = torch.linalg.qr(normal(f.dim_y, f.dim_y)).Q
        y = x @ normal(f.dim_x, f.dim_y) + normal(f.num_samples, f.dim_y) * scales @ mix
        self.moment = theory.second_moment(x, y)                             # E[(x, y) (x, y)^T]

    def start(self, draw):
        f = self.f
        return {"W1": draw(f.dim_z, f.dim_x), "W2": draw(f.dim_z, f.dim_y), "U1": draw(f.dim_y, f.dim_z),
                "U2": draw(f.dim_y, f.dim_x), "log_sigma": draw(f.dim_z)}

    def loss(self, p):
        """The expected negative beta-ELBO, exact, in nats: a 0-d tensor."""
        f, U1, U2, sigma = self.f, p["U1"], p["U2"], p["log_sigma"].exp()
        W = torch.cat([p["W1"], p["W2"]], dim=1)
        # y - U1 W (x, y) - U2 x, as one map of (x, y)
        unexplained = torch.cat([-U2, torch.eye(f.dim_y, dtype=U1.dtype)], dim=1) - U1 @ W
        squared_error = (unexplained @ self.moment * unexplained).sum() + (U1**2 @ sigma**2).sum()
        reconstruction = squared_error / (2 * f.eta_dec**2) + f.dim_y / 2 * math.log(2 * math.pi * f.eta_dec**2)
        z_square = (W @ self.moment * W).sum(1) + sigma**2                                       # E[z_i^2]
        kl = (z_square / f.eta_enc**2 - 1) / 2 - (sigma / f.eta_enc).log()
        return reconstruction + f.beta * kl.sum()

    def predicted(self):
        f = self.f
        theta = theory.spectrum(theory.residual(self.moment, f.dim_x))
        return theory.cvae_optimum(theta, f.dim_z, f.beta, f.eta_enc, f.eta_dec)

    def units(self, p):
        W = torch.cat([p["W1"], p["W2"]], dim=1)
        return theory.vae_units(p["U1"], W @ theory.root(self.moment), p["log_sigma"].exp(), self.f.eta_enc)


def main(argv=None):
    return theory.verify(CVAE, common.parse_flags(Flags, argv))


if __name__ == "__main__":
    common.run(main)
