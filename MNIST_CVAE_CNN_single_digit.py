"""Convolutional CVAE on one digit of MNIST: does the linear theory still say how many units each digit keeps?

    CUDA_VISIBLE_DEVICES=0 python MNIST_CVAE_CNN_single_digit.py --digit 1
    python MNIST_CVAE_CNN_single_digit.py --digit 0:9

The CVAE of Dang et al. (2024, arXiv 2306.05023) with convolutions for MLPs, trained on the images of one class. What
theorem 2 predicts of a linear CVAE from the same images is printed beside what was trained.
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
    digit: int = common.flag(1, "the digit to train on", low=0, high=9)
    beta: float = common.scalar(1.0, "weight of KL(q(z|x,y) || p(z|x))", low=0)
    eta_enc: float = common.scalar(0.5, "std of the prior p(z|x)", above=0)
    eta_dec: float = common.scalar(0.5, "std of p(y|x,z)", above=0)
    start_std: float = common.scalar(0.1, "std of q(z|x,y) that training starts from, as a share of the prior's", low=0.01, high=10,
                                     before=1.0)
    dim_z: int = common.flag(16, "units of z", low=1)
    released_objective: bool = common.flag(False, "count the reconstruction twice, as the authors' released code does")


class CVAE(nn.Module):
    """x is the lower left quarter of the image (1x14x14), y the whole image with that quarter blanked (1x28x28):

        q(z|x,y) = N(f_x(x) + f_y(y), diag s(x, y)^2)   p(z|x)   = N(0, eta_enc^2 I)
                                                        p(y|x,z) = N(g_x(x) + g_z(z), eta_dec^2 I)

    f is convolutional, g transposed convolutional, its images cut back to the three quarters of y.
    """

    widest_layer = 32 * 14 * 14

    def __init__(self, f):
        super().__init__()

        def convolutions():                                   # stride 2: 28 -> 14 -> 7, or 14 -> 7 -> 4
            return [nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.ReLU(),
                    nn.Conv2d(32, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()]

        def transposed(d_in):                                 # 7 -> 14 -> 28
            return [nn.Linear(d_in, 16 * 7 * 7), nn.ReLU(), nn.Unflatten(1, (16, 7, 7)),
                    nn.ConvTranspose2d(16, 32, 3, stride=2, padding=1, output_padding=1), nn.ReLU(),
                    nn.ConvTranspose2d(32, 1, 3, stride=2, padding=1, output_padding=1)]

        self.f_x = nn.Sequential(*convolutions(), nn.Linear(16 * 4 * 4, 2 * f.dim_z))      # mean and std
        self.f_y = nn.Sequential(*convolutions(), nn.Linear(16 * 7 * 7, 2 * f.dim_z))
        self.g_x = nn.Sequential(*convolutions(), *transposed(16 * 4 * 4))
        self.g_z = nn.Sequential(*transposed(f.dim_z))

    def q_z(self, x, y, f):
        blanked = datasets.whole_images(torch.zeros_like(x), y)
        mean, raw_std = (self.f_x(x.view(-1, 1, 14, 14)) + self.f_y(blanked.view(-1, 1, 28, 28))).chunk(2, dim=-1)
        return Normal(mean, common.std_head(raw_std, f.eta_enc, f.start_std))

    def p_z(self, f):
        return Normal(torch.zeros_like(f.eta_enc), f.eta_enc)

    def y_mean(self, x, z):
        _, of_x = datasets.quarters(self.g_x(x.view(-1, 1, 14, 14)))
        _, of_z = datasets.quarters(self.g_z(z.flatten(0, -2)))
        return of_x + of_z.view(*z.shape[:-1], 588)

    def forward(self, x, y, f, sample_shape=()):
        """x (B, 196), y (B, 588). Terms of the ELBO at draws of z, in nats; shapes as report.py says."""
        q_z, p_z = self.q_z(x, y, f), self.p_z(f)
        z = q_z.rsample(sample_shape)                                    # (S, B, dim_z)
        log_py_z = common.log_normal(y, self.y_mean(x, z), f.eta_dec)
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
        return {"": dict(reads=(x, y), mean=[(None, self.y_mean(x, z).mean(0))],
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
    # On a CPU the convolutions of stacked settings take longer than those of one setting after another.
    models = training.fit(CVAE, settings, data, side_by_side=data[0].train[0].is_cuda)
    return report.report(models, settings, data)


if __name__ == "__main__":
    common.run(main)
