"""ReLU VAE on MNIST with a fixed encoder variance: what does it gain, and lose, against a learnable one?

    CUDA_VISIBLE_DEVICES=0 python MNIST_VAE_Relu_nonlearnable_sigma.py --eta_dec 1.0 --c 1.0 --beta 1.0 --sigma 0.5
    python MNIST_VAE_Relu_nonlearnable_sigma.py --beta 0.1,0.5,1.0,2.0

The nonlinear VAE of Dang et al. (2024, arXiv 2306.05023). Theorem 1 is about its linear twin; what that predicts from
the same images is printed beside what was trained. A unit whose mean is dead keeps a KL above 0 here, unless sigma =
eta_enc: see AU rather than AU_kl. The learnable counterpart is MNIST_VAE_Relu_learnable_sigma.py.
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
class Flags(common.RemedyFlags, common.TrainFlags):
    beta: float = common.scalar(1.0, "weight of KL(q(z|x) || p(z))", low=0)
    eta_dec: float = common.scalar(1.0, "std of p(x|z)", above=0)
    c: float = common.scalar(1.0, "eta_dec / eta_enc, eta_enc the std of the prior p(z)", above=0)
    sigma: float = common.scalar(0.5, "std of q(z|x)", above=0)
    d_1: int = common.flag(16, "units of z", low=1)
    d_hidden: int = common.flag(256, "units of each hidden layer", low=1)
    lr: float = common.flag(1e-4, "Adam's learning rate", above=0)
    released_objective: bool = common.flag(False, "count the reconstruction twice, as the authors' released code does")


class VAE(nn.Module):
    """q(z|x) = N(relu f(x), sigma^2 I),  p(z) = N(0, eta_enc^2 I),  p(x|z) = N(g(z), eta_dec^2 I)."""

    def __init__(self, f):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(784, f.d_hidden), nn.ReLU(), nn.Linear(f.d_hidden, f.d_1), nn.ReLU())
        self.g = nn.Sequential(nn.Linear(f.d_1, f.d_hidden), nn.ReLU(), nn.Linear(f.d_hidden, 784))

    def q_z(self, x, f):
        return Normal(self.f(x), f.sigma)

    def p_z(self, f):
        return Normal(torch.zeros_like(f.eta_dec), f.eta_dec / f.c)

    def forward(self, x, f, sample_shape=()):
        """x (B, 784). Terms of the ELBO at draws of z, in nats; shapes as report.py says."""
        q_z, p_z = self.q_z(x, f), self.p_z(f)
        z = q_z.rsample(sample_shape)                            # (S, B, d_1)
        log_px_z = common.log_normal_affine(x, self.g[-1], self.g[:-1](z), f.eta_dec)
        terms = {"log_px_z": log_px_z, "kl": kl_divergence(q_z, p_z)}
        if not self.training:
            terms["log_w"] = log_px_z + (p_z.log_prob(z) - q_z.log_prob(z)).sum(-1)
            terms["mean"] = q_z.mean / p_z.stddev
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO, -log p(x|z) + beta KL, in nats, (B,)."""
        reconstruction = -terms["log_px_z"] * (2 if f.released_objective else 1)
        return reconstruction + f.beta * common.free_bits(terms["kl"], f.free_bits).sum(-1)

    @staticmethod
    def linear_optimum(f, data):
        """Theorem 1: the units of the linear VAE at its optimum on the same data."""
        if f.beta == 0:                                                  # no optimum is finite
            return None
        beta = f.beta / 2 if f.released_objective else f.beta            # a reconstruction counted twice halves beta
        theta, sigma = theory.spectrum(data.moment).sqrt(), torch.full((f.d_1,), f.sigma)
        return theory.vae_optimum_fixed_sigma(theta, sigma, beta, f.eta_dec / f.c, f.eta_dec)

    def reconstructions(self, x, f):
        return {"test images": x, "reconstructed": self.g(self.f(x))}

    def samples(self, n, f):
        return self.g(self.p_z(f).sample((n, f.d_1)))


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    data = datasets.load_mnist(settings)
    models = training.fit(VAE, settings, data)
    return report.report(models, settings, data, counterpart="MNIST_VAE_Relu_learnable_sigma")


if __name__ == "__main__":
    common.run(main)
