"""Linear MHVAE on MNIST, the variance of q(z2|z1) learnable: which units of which level do beta_1 and beta_2 collapse?

    CUDA_VISIBLE_DEVICES=0 python MNIST_HVAE_Linear_learnable_sigma_2.py --beta_1 1.0 --beta_2 1.0
    python MNIST_HVAE_Linear_learnable_sigma_2.py --beta_2 0.1:7.0:0.1

Theorem 3 of Dang et al. (2024, arXiv 2306.05023) says which, from theta_i, the roots of the eigenvalues of E[x x^T]. The
trained model is printed beside that.
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
    beta_1: float = common.scalar(1.0, "weight of KL(q(z1|x) || p(z1|z2))", above=0)
    beta_2: float = common.scalar(2.0, "weight of KL(q(z2|z1) || p(z2))", above=0)
    eta_enc: float = common.scalar(0.5, "std of the prior p(z2)", above=0)
    eta_dec: float = common.scalar(0.5, "std of p(z1|z2) and of p(x|z1)", above=0)
    sigma_1: float = common.scalar(0.5, "std of q(z1|x)", above=0)
    d_1: int = common.flag(10, "units of z1", low=1)
    d_2: int = common.flag(10, "units of z2", low=1)


class HVAE(nn.Module):
    """Markovian, x -> z1 -> z2 and back:

        q(z1|x)  = N(W1 x,  sigma_1^2 I)                p(z2)    = N(0, eta_enc^2 I)
        q(z2|z1) = N(W2 z1, diag sigma_2^2)             p(z1|z2) = N(U2 z2, eta_dec^2 I)
                                                        p(x|z1)  = N(U1 z1, eta_dec^2 I)
    """

    def __init__(self, f):
        super().__init__()
        self.W1 = nn.Linear(784, f.d_1, bias=False)
        self.W2 = nn.Linear(f.d_1, f.d_2, bias=False)
        self.U2 = nn.Linear(f.d_2, f.d_1, bias=False)
        self.U1 = nn.Linear(f.d_1, 784, bias=False)
        self.log_sigma_2 = nn.Parameter(torch.zeros(f.d_2))      # of sigma_2 / eta_enc: starts at the prior

    def sigma_2(self, f):
        return f.eta_enc * self.log_sigma_2.exp()

    def q_z1(self, x, f):
        return Normal(self.W1(x), f.sigma_1)

    def q_z2(self, z1, f):
        return Normal(self.W2(z1), self.sigma_2(f))

    def p_z1(self, z2, f):
        return Normal(self.U2(z2), f.eta_dec)

    def p_z2(self, f):
        return Normal(torch.zeros_like(f.eta_enc), f.eta_enc)

    def forward(self, x, f, sample_shape=()):
        """x (B, 784). Terms of the ELBO, in nats, the noise of z1 and z2 integrated out; shapes as report.py says."""
        q_z1, p_z2, sigma_2 = self.q_z1(x, f), self.p_z2(f), self.sigma_2(f)
        W2, U2, U1 = self.W2.weight, self.U2.weight, self.U1.weight
        # E||x - U1 z1||^2 = ||x - U1 E[z1]||^2 + sigma_1^2 ||U1||^2
        expected = (common.log_normal_linear(x, U1, q_z1.mean, f.eta_dec)
                    - f.sigma_1**2 * (U1**2).sum() / (2 * f.eta_dec**2))
        # With z2 inferred from z1: z1 - U2 z2 = (I - U2 W2) z1 - U2 noise, and E[log q(z1|x) - log p(z1|z2)] of it.
        left = torch.eye(len(U2), dtype=x.dtype, device=x.device) - U2 @ W2
        of_noise = f.sigma_1**2 * (left**2).sum(1) + (U2**2) @ sigma_2**2
        left_mean = q_z1.mean @ left.T
        prior_of_mean = Normal(left_mean, f.eta_dec)
        kl_1 = -q_z1.entropy() - prior_of_mean.log_prob(torch.zeros_like(left_mean)) + of_noise / (2 * f.eta_dec**2)
        # E over z1 of KL(q(z2|z1) || p(z2)): that at the mean of z1, and what the noise of z1 adds to W2 z1.
        kl_2 = kl_divergence(self.q_z2(q_z1.mean, f), p_z2) + f.sigma_1**2 * (W2**2).sum(1) / (2 * f.eta_enc**2)
        terms = {"log_px_z": expected, "kl_1": kl_1, "kl_2": kl_2}
        if not self.training:
            z1 = q_z1.sample(sample_shape)                       # (S, B, d_1)
            q_z2 = self.q_z2(z1, f)
            z2 = q_z2.sample()                                   # (S, B, d_2)
            terms["log_w"] = (common.log_normal_linear(x, U1, z1, f.eta_dec)
                              + (self.p_z1(z2, f).log_prob(z1) - q_z1.log_prob(z1)).sum(-1)
                              + (p_z2.log_prob(z2) - q_z2.log_prob(z2)).sum(-1))
            # With z2' inferred from an independent draw of z1: E[KL(q(z1|x) || p(z1|z2'))], a divergence.
            prior_noise = f.sigma_1**2 * ((U2 @ W2)**2).sum(1) + (U2**2) @ sigma_2**2
            to_prior = kl_divergence(Normal(left_mean, f.sigma_1), Normal(torch.zeros_like(f.eta_dec), f.eta_dec))
            terms["unit_kl_1"] = to_prior + prior_noise / (2 * f.eta_dec**2)
            terms["mean_1"], terms["mean_2"] = q_z1.mean / f.eta_dec, self.W2(q_z1.mean) / f.eta_enc
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO, -log p(x|z1) + beta_1 KL_1 + beta_2 KL_2, in nats, (B,)."""
        return -terms["log_px_z"] + f.beta_1 * terms["kl_1"].sum(-1) + f.beta_2 * terms["kl_2"].sum(-1)

    def unexplained(self, x, f, draws):
        """For headroom: the z1 that z2 is inferred from, and its mean expected over z2; see report.py."""
        z1 = self.q_z1(x, f).sample()
        return {"_2": dict(reads=(z1,), mean=[(self.U2, self.W2(z1))], beta=f.beta_2, weight=f.beta_1, std=f.eta_dec)}

    def exact_log_px(self, x, f):
        """log p(x), (B,): x ~ N(0, U1 (eta_enc^2 U2 U2^T + eta_dec^2 I) U1^T + eta_dec^2 I)."""
        U1, U2 = self.U1.weight, self.U2.weight
        return common.log_normal_low_rank(x, U1 @ torch.cat([f.eta_enc * U2, f.eta_dec * torch.eye(
            len(U2), dtype=U2.dtype, device=U2.device)], dim=1), f.eta_dec)

    @staticmethod
    def predicted(f, data):
        """Theorem 3: the units of both levels at the optimum, and the optimal loss."""
        return theory.hvae_optimum(
            theory.spectrum(data.moment).sqrt(), f.d_1, f.d_2, f.sigma_1, f.beta_1, f.beta_2, f.eta_enc, f.eta_dec)

    def units(self, f, data):
        """The same quantities of this model, in float64."""
        return theory.hvae_units(self.W1.weight @ theory.root(data.moment), self.W2.weight, self.U2.weight,
                                 f.sigma_1, self.sigma_2(f), f.eta_enc, f.eta_dec)

    def reconstructions(self, x, f):
        z1 = self.W1(x)
        return {"test images": x, "reconstructed through z1": self.U1(z1),
                "reconstructed through z2": self.U1(self.U2(self.W2(z1)))}

    def samples(self, n, f):
        return self.U1(self.p_z1(self.p_z2(f).sample((n, f.d_2)), f).sample())


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    data = datasets.load_mnist(settings)
    models = training.fit(HVAE, settings, data)
    return report.report(models, settings, data)


if __name__ == "__main__":
    common.run(main)
