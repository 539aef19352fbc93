"""ReLU MHVAE on MNIST: how beta_1, beta_2 and eta_dec collapse the units of each latent level.

    CUDA_VISIBLE_DEVICES=0 python MNIST_HVAE_Relu.py --beta_1 1.0
    python MNIST_HVAE_Relu.py --beta_1 0.1,0.5,1.0,2.0

The two-level Markovian hierarchical VAE of Dang et al. (2024, arXiv 2306.05023), each map an MLP with one ReLU layer.
Level 1 has a fixed encoder variance, level 2 a learned one.
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
    beta_1: float = common.scalar(1.0, "weight of KL(q(z1|x) || p(z1|z2))", low=0)
    beta_2: float = common.scalar(1.0, "weight of KL(q(z2|z1) || p(z2))", low=0)
    eta_enc: float = common.scalar(0.5, "std of the prior p(z2)", above=0)
    eta_dec: float = common.scalar(0.5, "std of p(z1|z2) and of p(x|z1)", above=0)
    sigma_1: float = common.scalar(0.5, "std of q(z1|x)", above=0)
    start_std: float = common.scalar(1.0, "std of q(z2|z1) that training starts from, as a share of the prior's", low=0.01, high=10)
    d_1: int = common.flag(16, "units of z1", low=1)
    d_2: int = common.flag(16, "units of z2", low=1)
    d_hidden: int = common.flag(256, "units of each hidden layer", low=1)
    released_objective: bool = common.flag(False, "count the reconstruction twice, as the authors' released code does")


class HVAE(nn.Module):
    """x -> h -> z1 -> h -> z2 and back:

        q(z1|x)  = N(tanh f1(x),  sigma_1^2 I)         p(z2)    = N(0, eta_enc^2 I)
        q(z2|z1) = N(tanh f2(z1), diag s(z1)^2)        p(z1|z2) = N(tanh g2(z2), eta_dec^2 I)
                                                       p(x|z1)  = N(tanh g1(z1), eta_dec^2 I)
    """

    def __init__(self, f):
        super().__init__()

        def mlp(d_in, d_out):
            return nn.Sequential(nn.Linear(d_in, f.d_hidden), nn.ReLU(), nn.Linear(f.d_hidden, d_out))

        self.x_to_z1 = mlp(784, f.d_1)
        self.z1_to_z2 = mlp(f.d_1, 2 * f.d_2)      # mean and std
        self.z2_to_z1 = mlp(f.d_2, f.d_1)
        self.z1_to_x = mlp(f.d_1, 784)

    def q_z1(self, x, f):
        return Normal(self.x_to_z1(x).tanh(), f.sigma_1)

    def q_z2(self, z1, f):
        mean, raw_std = self.z1_to_z2(z1).chunk(2, dim=-1)
        return Normal(mean.tanh(), common.std_head(raw_std, f.eta_enc, f.start_std))

    def p_z1(self, z2, f):
        return Normal(self.z2_to_z1(z2).tanh(), f.eta_dec)

    def p_z2(self, f):
        return Normal(torch.zeros_like(f.eta_enc), f.eta_enc)

    def x_mean(self, z1):
        return self.z1_to_x(z1).tanh_()            # in place: (S, B, 784) is large

    def forward(self, x, f, sample_shape=()):
        """x (B, 784). Terms of the ELBO at draws of z1 and z2, in nats; shapes as report.py says."""
        q_z1 = self.q_z1(x, f)
        z1 = q_z1.rsample(sample_shape)                                  # (S, B, d_1)
        q_z2 = self.q_z2(z1, f)
        z2 = q_z2.rsample()                                              # (S, B, d_2)
        p_z1, p_z2 = self.p_z1(z2, f), self.p_z2(f)
        log_px_z = common.log_normal(x, self.x_mean(z1), f.eta_dec)
        log_p_z1 = p_z1.log_prob(z1)
        # E[log q(z1|x) - log p(z1|z2)] with z2 inferred from this z1: no divergence, it can be negative.
        kl_1 = -q_z1.entropy() - log_p_z1
        kl_2 = kl_divergence(q_z2, p_z2)
        terms = {"log_px_z": log_px_z, "kl_1": kl_1, "kl_2": kl_2}
        if not self.training:
            terms["log_w"] = (log_px_z + (log_p_z1 - q_z1.log_prob(z1)).sum(-1)
                              + (p_z2.log_prob(z2) - q_z2.log_prob(z2)).sum(-1))
            # z2 comes from one draw of z1; over a fresh one, KL(q(z1|x) || p(z1|z2)) is a divergence.
            terms["unit_kl_1"] = kl_divergence(q_z1, p_z1)
            terms["mean_1"], terms["mean_2"] = q_z1.mean / f.eta_dec, q_z2.mean / f.eta_enc
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO, -log p(x|z1) + beta_1 KL_1 + beta_2 KL_2, in nats, (B,)."""
        reconstruction = -terms["log_px_z"] * (2 if f.released_objective else 1)
        kl_2 = common.free_bits(terms["kl_2"], f.free_bits)
        return reconstruction + f.beta_1 * terms["kl_1"].sum(-1) + f.beta_2 * kl_2.sum(-1)

    def unexplained(self, x, f, draws):
        """For headroom: the z1 that z2 is inferred from, and its mean expected over z2; see report.py."""
        z1 = self.q_z1(x, f).sample()
        z2 = self.q_z2(z1, f).sample((draws,))
        return {"_2": dict(reads=(z1,), mean=[(None, self.p_z1(z2, f).mean.mean(0))],
                           beta=f.beta_2, weight=f.beta_1, std=f.eta_dec)}

    @staticmethod
    def linear_optimum(f, data):
        """Theorem 3: the units of the linear HVAE at its optimum on the same data."""
        if f.beta_1 == 0 or f.beta_2 == 0:                               # no optimum is finite
            return None
        weight = 2 if f.released_objective else 1                        # of the reconstruction, as halving both betas
        theta = theory.spectrum(data.moment).sqrt()
        return theory.hvae_optimum(theta, f.d_1, f.d_2, f.sigma_1, f.beta_1 / weight, f.beta_2 / weight, f.eta_enc, f.eta_dec)

    def reconstructions(self, x, f):
        z1 = self.q_z1(x, f).mean
        z2 = self.q_z2(z1, f).mean
        return {"test images": x, "reconstructed through z1": self.x_mean(z1),
                "reconstructed through z2": self.x_mean(self.p_z1(z2, f).mean)}

    def samples(self, n, f):
        z2 = self.p_z2(f).sample((n, f.d_2))
        return self.x_mean(self.p_z1(z2, f).sample())


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    data = datasets.load_mnist(settings)
    models = training.fit(HVAE, settings, data)
    return report.report(models, settings, data)


if __name__ == "__main__":
    common.run(main)
