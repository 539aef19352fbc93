"""Linear VAE on MNIST with a learnable encoder variance: does it collapse units that a fixed one keeps?

    CUDA_VISIBLE_DEVICES=0 python MNIST_VAE_Linear_learnable_sigma.py --eta_dec 1.0 --c 1.0 --beta 1.0 --sigma 1.0
    python MNIST_VAE_Linear_learnable_sigma.py --beta 0.5:8.0:0.5

Theorem 1 of Dang et al. (2024, arXiv 2306.05023) says which units collapse: unit i as soon as sqrt(beta) eta_dec reaches
theta_i, the root of the i-th eigenvalue of E[x x^T]. The trained model is printed beside that. The fixed counterpart is
MNIST_VAE_Linear_nonlearnable_sigma.py.
"""
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

import common
import datasets
import report
import theory
import training


@dataclass
class Flags(common.LinearFlags):
    beta: float = common.scalar(1.0, "weight of KL(q(z|x) || p(z))", above=0)
    eta_dec: float = common.scalar(1.0, "std of p(x|z)", above=0)
    c: float = common.scalar(1.0, "eta_dec / eta_enc, eta_enc the std of the prior p(z)", above=0)
    sigma: float = common.scalar(1.0, "std of q(z|x) to start from", above=0, vector=True)
    d_1: int = common.flag(5, "units of z", low=1)


class VAE(nn.Module):
    """q(z|x) = N(W x, diag sigma^2),  p(z) = N(0, eta_enc^2 I),  p(x|z) = N(U z, eta_dec^2 I)."""

    def __init__(self, f):
        super().__init__()
        self.W = nn.Linear(784, f.d_1, bias=False)
        self.U = nn.Linear(f.d_1, 784, bias=False)
        self.log_scale = nn.Parameter(torch.zeros(f.d_1))        # of sigma over --sigma, where it starts

    def q_z(self, x, f):
        return Normal(self.W(x), f.sigma * self.log_scale.exp())

    def p_z(self, f):
        return Normal(torch.zeros_like(f.eta_dec), f.eta_dec / f.c)

    def forward(self, x, f, sample_shape=()):
        """x (B, 784). Terms of the ELBO, in nats, the noise of z integrated out; shapes as report.py says."""
        q_z, p_z, U = self.q_z(x, f), self.p_z(f), self.U.weight
        # E||x - U z||^2 = ||x - U E[z]||^2 + sum_i sigma_i^2 ||U_i||^2
        of_noise = (q_z.stddev**2 * (U**2).sum(0)).sum(-1)
        terms = {"log_px_z": common.log_normal_linear(x, U, q_z.mean, f.eta_dec) - of_noise / (2 * f.eta_dec**2),
                 "kl": kl_divergence(q_z, p_z)}
        if not self.training:
            z = q_z.sample(sample_shape)                         # (S, B, d_1)
            log_px_z = common.log_normal_linear(x, U, z, f.eta_dec)
            terms["log_w"] = log_px_z + (p_z.log_prob(z) - q_z.log_prob(z)).sum(-1)
            terms["mean"] = q_z.mean / p_z.stddev
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO, -log p(x|z) + beta KL, in nats, (B,)."""
        return -terms["log_px_z"] + f.beta * terms["kl"].sum(-1)

    def unexplained(self, x, f, draws):
        """For headroom: what z is inferred from, and the mean of x expected over z; see report.py."""
        return {"": dict(reads=(x,), mean=[(self.U, self.W(x))], beta=f.beta, weight=1, std=f.eta_dec)}

    def exact_log_px(self, x, f):
        """log p(x), (B,): x ~ N(0, eta_enc^2 U U^T + eta_dec^2 I)."""
        return common.log_normal_low_rank(x, f.eta_dec / f.c * self.U.weight, f.eta_dec)

    @staticmethod
    def predicted(f, data):
        """Theorem 1: the units at the optimum, and the optimal loss."""
        return theory.vae_optimum(theory.spectrum(data.moment).sqrt(), f.d_1, f.beta, f.eta_dec / f.c, f.eta_dec)

    def units(self, f, data):
        """The same quantities of this model, in float64."""
        sigma = f.sigma * self.log_scale.exp()
        return theory.vae_units(self.U.weight, self.W.weight @ theory.root(data.moment), sigma, f.eta_dec / f.c)

    def reconstructions(self, x, f):
        return {"test images": x, "reconstructed": self.U(self.W(x))}

    def samples(self, n, f):
        return self.U(self.p_z(f).sample((n, f.d_1)))


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    for f in settings:
        if len(common.numbers(f.sigma)) not in (1, f.d_1):
            common.stop(f, f"--sigma: got {f.sigma!r}, wants one number or --d_1 = {f.d_1} of them")
    data = datasets.load_mnist(settings)
    models = training.fit(VAE, settings, data)
    return report.report(models, settings, data, counterpart="MNIST_VAE_Linear_nonlearnable_sigma")


if __name__ == "__main__":
    common.run(main)
