"""Linear CVAE on MNIST: which units of z collapse once x, a quarter of the image, has told what it can of the rest?

    CUDA_VISIBLE_DEVICES=0 python MNIST_CVAE_Linear.py --beta 1.0
    python MNIST_CVAE_Linear.py --beta 0.1:5.0:0.1

Theorem 2 of Dang et al. (2024, arXiv 2306.05023) says which: unit i as soon as beta eta_dec^2 reaches theta_i, the i-th
eigenvalue of E = E[y y^T] - E[y x^T] E[x x^T]^+ E[x y^T]. The trained model is printed beside that.
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
    beta: float = common.scalar(1.0, "weight of KL(q(z|x,y) || p(z|x))", above=0)
    eta_enc: float = common.scalar(1.0, "std of the prior p(z|x)", above=0)
    eta_dec: float = common.scalar(1.0, "std of p(y|x,z)", above=0)
    dim_z: int = common.flag(64, "units of z", low=1)
    num_epochs: int = common.flag(30, "passes over the training set", low=1)


class CVAE(nn.Module):
    """x is the lower left quarter of the image (196 pixels), y the other three (588):

        q(z|x,y) = N(W1 x + W2 y, diag sigma^2)         p(z|x)   = N(0, eta_enc^2 I)
                                                        p(y|x,z) = N(U1 z + U2 x, eta_dec^2 I)
    """

    def __init__(self, f):
        super().__init__()
        self.W1 = nn.Linear(196, f.dim_z, bias=False)
        self.W2 = nn.Linear(588, f.dim_z, bias=False)
        self.U1 = nn.Linear(f.dim_z, 588, bias=False)
        self.U2 = nn.Linear(196, 588, bias=False)
        self.log_sigma = nn.Parameter(torch.zeros(f.dim_z))      # of sigma / eta_enc: starts at the prior

    def q_z(self, x, y, f):
        return Normal(self.W1(x) + self.W2(y), f.eta_enc * self.log_sigma.exp())

    def p_z(self, f):
        return Normal(torch.zeros_like(f.eta_enc), f.eta_enc)

    def y_mean(self, x, z):
        return self.U1(z) + self.U2(x)

    def forward(self, x, y, f, sample_shape=()):
        """x (B, 196), y (B, 588). Terms of the ELBO, in nats, the noise of z integrated out; shapes as report.py says."""
        q_z, p_z, U1 = self.q_z(x, y, f), self.p_z(f), self.U1.weight
        rest = y - self.U2(x)                                    # what U1 z is to explain
        # E||rest - U1 z||^2 = ||rest - U1 E[z]||^2 + sum_i sigma_i^2 ||U1_i||^2
        of_noise = (q_z.stddev**2 * (U1**2).sum(0)).sum(-1)
        terms = {"log_px_z": common.log_normal(rest, self.U1(q_z.mean), f.eta_dec) - of_noise / (2 * f.eta_dec**2),
                 "kl": kl_divergence(q_z, p_z)}
        if not self.training:
            z = q_z.sample(sample_shape)                         # (S, B, dim_z)
            log_py_z = common.log_normal_linear(rest, U1, z, f.eta_dec)
            terms["log_w"] = log_py_z + (p_z.log_prob(z) - q_z.log_prob(z)).sum(-1)
            terms["mean"] = q_z.mean / f.eta_enc
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO, -log p(y|x,z) + beta KL, in nats, (B,)."""
        return -terms["log_px_z"] + f.beta * terms["kl"].sum(-1)

    def unexplained(self, x, y, f, draws):
        """For headroom: what z is inferred from, and the mean of y expected over z; see report.py."""
        return {"": dict(reads=(x, y), mean=[(self.U1, self.q_z(x, y, f).mean), (self.U2, x)],
                         beta=f.beta, weight=1, std=f.eta_dec)}

    def exact_log_px(self, x, y, f):
        """log p(y|x), (B,): y|x ~ N(U2 x, eta_enc^2 U1 U1^T + eta_dec^2 I)."""
        return common.log_normal_low_rank(y - self.U2(x), f.eta_enc * self.U1.weight, f.eta_dec)

    @staticmethod
    def predicted(f, data):
        """Theorem 2: the units at the optimum, and the optimal loss."""
        E = theory.residual(data.moment, 196)
        return theory.cvae_optimum(theory.spectrum(E), f.dim_z, f.beta, f.eta_enc, f.eta_dec)

    def units(self, f, data):
        """The same quantities of this model, in float64."""
        W = torch.cat([self.W1.weight, self.W2.weight], dim=1)
        return theory.vae_units(self.U1.weight, W @ theory.root(data.moment), f.eta_enc * self.log_sigma.exp(), f.eta_enc)

    def reconstructions(self, x, y, f):
        mean = self.q_z(x, y, f).mean
        return {"test images": datasets.whole_images(x, y),
                "y from x and z": datasets.whole_images(x, self.y_mean(x, mean)),
                "y from x alone (z = 0)": datasets.whole_images(x, self.y_mean(x, 0 * mean))}


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    data = datasets.load_mnist_quarters(settings)
    models = training.fit(CVAE, settings, data)
    return report.report(models, settings, data)


if __name__ == "__main__":
    common.run(main)
