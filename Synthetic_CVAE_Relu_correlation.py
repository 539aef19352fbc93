"""ReLU CVAE on synthetic data: the more x tells about y, the more units of z collapse.

    CUDA_VISIBLE_DEVICES=0 python Synthetic_CVAE_Relu_correlation.py --corr_type Gaussian_noise_1_8
    python Synthetic_CVAE_Relu_correlation.py --corr_type Identical,Gaussian_noise_1_2,Gaussian_noise_1_4,Gaussian_noise_1_8,Random

The CVAE of Dang et al. (2024, arXiv 2306.05023) on y ~ N(0, I) and x = rho y + sqrt(1 - rho^2) noise. Evaluated on fresh
rows, and (_train) on those that it was trained on. What theorem 2 predicts of a linear CVAE from the same rows, through
what x leaves of y, E, is printed beside what was trained.
"""
import functools
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

import common
import datasets
import report
import theory
import training

RHO = {"Identical": 1.0, "Gaussian_noise_1_2": 1 / 2, "Gaussian_noise_1_4": 1 / 4, "Gaussian_noise_1_8": 1 / 8, "Random": 0.0}


@dataclass
class Flags(common.RemedyFlags, common.FitFlags):
    corr_type: str = common.flag("Identical", "how x and y are correlated", choices=tuple(RHO))
    beta: float = common.scalar(1.0, "weight of KL(q(z|x,y) || p(z|x))", low=0)
    eta_enc: float = common.scalar(1.0, "std of the prior p(z|x)", above=0)
    eta_dec: float = common.scalar(0.5, "std of p(y|x,z)", above=0)
    start_std: float = common.scalar(1.0, "std of q(z|x,y) that training starts from, as a share of the prior's", low=0.01, high=10)
    dim_x: int = common.flag(128, "dimension of x, that of y", low=1)
    dim_y: int = common.flag(128, "dimension of y", low=1)
    dim_z: int = common.flag(128, "units of z", low=1)
    d_hidden: int = common.flag(128, "units of each hidden layer", low=1)
    num_samples: int = common.flag(1000, "rows to train on, and fresh rows", low=2)
    num_draws: int = common.flag(1000, "draws per row for the log-likelihood; 0 leaves it out", low=0, evaluation=True)
    batch_size: int = common.flag(16, "rows per gradient step", low=1)
    num_epochs: int = common.flag(1000, "passes over the training rows", low=1)
    grad_clip: float = common.flag(0.01, "largest gradient norm of a setting", above=0)
    released_objective: bool = common.flag(False, "count the reconstruction twice, as the authors' released code does")


def correlated(settings):
    """The data of each setting: rows x (n, dim_x) and y (n, dim_y), those to train on and fresh ones as test."""
    device = common.device_of(settings[0])

    @functools.cache                                      # settings of one kind share their rows
    def data_of(corr_type, n, dim, seed):
        rho, random = RHO[corr_type], common.generator(seed, "data")

        def rows():
            y, noise = torch.randn(2, n, dim, generator=random).to(device)
            return rho * y + (1 - rho**2)**0.5 * noise, y
        return datasets.Data("synthetic", rows(), rows(), also_train=True)

    return [data_of(f.corr_type, f.num_samples, f.dim_y, f.seed) for f in settings]


class CVAE(nn.Module):
    """Each f and g is an MLP:

        q(z|x,y) = N(f_x(x) + f_y(y), diag s(x, y)^2)   p(z|x)   = N(0, eta_enc^2 I)
                                                        p(y|x,z) = N(g_x(x) + g_z(z), eta_dec^2 I)
    """

    def __init__(self, f):
        super().__init__()

        def mlp(d_in, d_out):
            return nn.Sequential(nn.Linear(d_in, f.d_hidden), nn.ReLU(), nn.Linear(f.d_hidden, d_out))

        self.f_x, self.f_y = mlp(f.dim_x, 2 * f.dim_z), mlp(f.dim_y, 2 * f.dim_z)      # mean and std
        self.g_x, self.g_z = mlp(f.dim_x, f.dim_y), mlp(f.dim_z, f.dim_y)

    def q_z(self, x, y, f):
        mean, raw_std = (self.f_x(x) + self.f_y(y)).chunk(2, dim=-1)
        return Normal(mean, common.std_head(raw_std, f.eta_enc, f.start_std))

    def p_z(self, f):
        return Normal(torch.zeros_like(f.eta_enc), f.eta_enc)

    def forward(self, x, y, f, sample_shape=()):
        """x (B, dim_x), y (B, dim_y). Terms of the ELBO at draws of z, in nats; shapes as report.py says."""
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
        z = self.q_z(x, y, f).sample((draws,))
        return {"": dict(reads=(x, y), mean=[(self.g_x[-1], self.g_x[:-1](x)), (self.g_z[-1], self.g_z[:-1](z).mean(0))],
                         beta=f.beta, weight=2 if f.released_objective else 1, std=f.eta_dec)}

    @staticmethod
    def linear_optimum(f, data):
        """Theorem 2: the units of the linear CVAE at its optimum on the same rows."""
        if f.beta == 0:                                                  # no optimum is finite
            return None
        beta = f.beta / 2 if f.released_objective else f.beta            # a reconstruction counted twice halves beta
        E = theory.residual(data.moment, f.dim_x)
        return theory.cvae_optimum(theory.spectrum(E), f.dim_z, beta, f.eta_enc, f.eta_dec)


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    for f in settings:
        if f.dim_x != f.dim_y:
            common.stop(f, f"--dim_x: got {f.dim_x}, wants --dim_y = {f.dim_y}: x is y with noise")
    data = correlated(settings)
    models = training.fit(CVAE, settings, data)
    return report.report(models, settings, data)


if __name__ == "__main__":
    common.run(main)
