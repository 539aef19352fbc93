"""ReLU CVAE on MNIST: how beta and eta_dec collapse the units that tell what a quarter of the image leaves open.

    CUDA_VISIBLE_DEVICES=0 python MNIST_CVAE_Relu.py --eta_enc 1.0 --eta_dec 1.0 --beta 0.1
    python MNIST_CVAE_Relu.py --eta_enc 1.0 --eta_dec 1.0 --beta 0.1,0.5,1.0,2.0
    python MNIST_CVAE_Relu.py --beta 1.0 --eta_dec 0.25,0.5,1.0,2.0

The nonlinear CVAE of Dang et al. (2024, arXiv 2306.05023), each map an MLP with one ReLU layer. Theorem 2 is about its
linear twin, MNIST_CVAE_Linear.py; what it predicts from the same images is printed beside what was trained.
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
    beta: float = common.scalar(1.0, "weight of KL(q(z|x,y) || p(z|x))", low=0)
    eta_enc: float = common.scalar(1.0, "std of the prior p(z|x)", above=0)
    eta_dec: float = common.scalar(0.5, "std of p(y|x,z)", above=0)
    start_std: float = common.scalar(0.1, "std of q(z|x,y) that training starts from, as a share of the prior's", low=0.01, high=10,
                                     before=1.0)
    dim_z: int = common.flag(16, "units of z", low=1)
    d_hidden: int = common.flag(16, "units of each hidden layer", low=1)
    dropout: float = common.flag(0.0, "share of the pixels of x that training drops", low=0, high=1)
    grad_clip: float = common.flag(0.01, "largest gradient norm of a setting", above=0)
    released_objective: bool = common.flag(False, "count the reconstruction twice, as the authors' released code does")


class CVAE(nn.Module):
    """x is the lower left quarter of the image (196 pixels), y the other three (588), each f and g an MLP:

        q(z|x,y) = N(f_x(x) + f_y(y), diag s(x, y)^2)   p(z|x)   = N(0, eta_enc^2 I)
                                                        p(y|x,z) = N(g_x(x) + g_z(z), eta_dec^2 I)
    """

    def __init__(self, f):
        super().__init__()

        def mlp(d_in, d_out):
            return nn.Sequential(nn.Linear(d_in, f.d_hidden), nn.ReLU(), nn.Linear(f.d_hidden, d_out))

        self.f_x, self.f_y = mlp(196, 2 * f.dim_z), mlp(588, 2 * f.dim_z)      # mean and std
        self.g_x, self.g_z = mlp(196, 588), mlp(f.dim_z, 588)

    def q_z(self, x, y, f):
        mean, raw_std = (self.f_x(x) + self.f_y(y)).chunk(2, dim=-1)
        return Normal(mean, common.std_head(raw_std, f.eta_enc, f.start_std))

    def p_z(self, f):
        return Normal(torch.zeros_like(f.eta_enc), f.eta_enc)

    def y_mean(self, x, z):
        return self.g_x(x) + self.g_z(z)

    def forward(self, x, y, f, sample_shape=()):
        """x (B, 196), y (B, 588). Terms of the ELBO at draws of z, in nats; shapes as report.py says."""
        x = nn.functional.dropout(x, f.dropout, self.training)
        q_z, p_z = self.q_z(x, y, f), self.p_z(f)
        z = q_z.rsample(sample_shape)                                    # (S, B, dim_z)
        log_py_z = common.log_normal_affine(y - self.g_x(x), self.g_z[-1], self.g_z[:-1](z), f.eta_dec)
        terms = {"log_px_z": log_py_z, "kl": kl_divergence(q_z, p_z)}
        if not self.training:
            terms["log_w"] = log_py_z + (p_z.log_prob(z) - q_z.log_prob(z)).sum(-1)
            terms["mean"] = q_z.mean / f.eta_enc
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO, -log p(y|x,z) + beta KL, in nats, (B,)."""
        reconstruction = -terms["log_px_z"] * (2 if f.released_objective else 1)
        return reconstruction + f.beta * common.free_bits(terms["kl"], f.free_bits).sum(-1)

    def unexplained(self, x, y, f, draws):
        """For headroom: what z is inferred from, and the mean of y expected over z; see report.py."""
        x = nn.functional.dropout(x, f.dropout)
        z = self.q_z(x, y, f).sample((draws,))
        return {"": dict(reads=(x, y), mean=[(self.g_x[-1], self.g_x[:-1](x)), (self.g_z[-1], self.g_z[:-1](z).mean(0))],
                         beta=f.beta, weight=2 if f.released_objective else 1, std=f.eta_dec)}

    @staticmethod
    def linear_optimum(f, data):
        """Theorem 2: the units of the linear CVAE at its optimum on the same data."""
        if f.beta == 0:                                                  # no optimum is finite
            return None
        beta = f.beta / 2 if f.released_objective else f.beta            # a reconstruction counted twice halves beta
        E = theory.residual(data.moment, 196)
        return theory.cvae_optimum(theory.spectrum(E), f.dim_z, beta, f.eta_enc, f.eta_dec)

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
