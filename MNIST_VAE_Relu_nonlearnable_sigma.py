"""ReLU VAE on MNIST: what does a fixed encoder variance change, compared with a learnable one?

    python MNIST_VAE_Relu_nonlearnable_sigma.py --eta_dec 1.0 --c 1.0 --beta 1.0 --sigma 0.5
    python MNIST_VAE_Relu_nonlearnable_sigma.py --beta 0.1,0.5,1.0,2.0

How it is trained: Adam minimises the negative beta-ELBO in batches of 128 images for 100 epochs,
with one draw of z per image. The learning rate is 1e-4 throughout. Each setting's gradient is
clipped to a norm of 0.1. The training step is the first function of training.py.

What the theory says: theorem 1 of Dang et al. (2024, arXiv 2306.05023) covers only the linear VAE,
MNIST_VAE_Linear_nonlearnable_sigma.py. Let theta_i be the square root of the i-th largest
eigenvalue of E[x x^T]. The mean of q(z_i|x) of a linear VAE is 0 for all images if and only if

    theta_i <= sqrt(beta) sigma eta_dec / eta_enc

The script prints this prediction, computed from the same images, next to the trained nonlinear
VAE. The KL of a unit whose mean is constant is still positive, unless sigma = eta_enc. The column
AU therefore shows that such a unit is idle, and AU_kl does not.

MNIST_VAE_Relu_learnable_sigma.py is the counterpart with a learnable encoder variance.
"""
from dataclasses import dataclass

import common
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

import datasets
import report
import theory
import training


@dataclass
class Flags(common.RemedyFlags, common.TrainFlags):
    beta: float = common.scalar(1.0, "weight of KL(q(z|x) || p(z)) in the loss", low=0)
    eta_dec: float = common.scalar(1.0, "standard deviation of the decoder p(x|z)", above=0)
    c: float = common.scalar(
        1.0,
        "ratio eta_dec / eta_enc, where eta_enc is the standard deviation of the prior p(z)",
        above=0,
    )
    sigma: float = common.scalar(0.5, "standard deviation of the encoder q(z|x)", above=0)
    d_1: int = common.flag(16, "number of units of z", low=1)
    d_hidden: int = common.flag(256, "number of units in each hidden layer", low=1)
    lr: float = common.flag(1e-4, "learning rate of Adam", above=0)
    released_objective: bool = common.flag(
        False, "count the reconstruction twice in the loss, as the authors' released code does"
    )


def reconstruction_weight(f):
    """The weight of -log p(x|z) in the loss: 1, or 2 with --released_objective."""
    return 2 if f.released_objective else 1


class VAE(nn.Module):
    """A VAE whose encoder f and decoder g are MLPs with one hidden ReLU layer:

        q(z|x) = N(f(x), sigma^2 I)
        p(z)   = N(0, eta_enc^2 I)
        p(x|z) = N(g(z), eta_dec^2 I)

    The output of f passes through a ReLU, too, as in the published model. The encoder variance is
    fixed.

    The argument f of the methods is a setting, not the encoder self.f. It is an instance of Flags
    whose scalars, such as f.beta, are 0-d tensors, except in __init__ and linear_optimum.
    """

    def __init__(self, f):
        super().__init__()
        self.f = nn.Sequential(
            nn.Linear(784, f.d_hidden), nn.ReLU(), nn.Linear(f.d_hidden, f.d_1), nn.ReLU()
        )
        self.g = nn.Sequential(nn.Linear(f.d_1, f.d_hidden), nn.ReLU(), nn.Linear(f.d_hidden, 784))

    def q_z(self, x, f):
        """q(z|x) of the shape (B, d_1), for images x (B, 784)."""
        return Normal(self.f(x), f.sigma)

    def p_z(self, f):
        """The prior p(z) of one unit, a scalar."""
        return Normal(torch.zeros_like(f.eta_dec), f.eta_dec / f.c)

    def forward(self, x, f, sample_shape=()):
        """The terms of the ELBO for images x (B, 784), in nats. Their shapes are in report.py."""
        q_z = self.q_z(x, f)
        p_z = self.p_z(f)
        z = q_z.rsample(sample_shape)

        log_px_z = common.log_normal_affine(x, self.g[-1], self.g[:-1](z), f.eta_dec)
        terms = {"log_px_z": log_px_z, "kl": kl_divergence(q_z, p_z)}

        # Only the evaluation needs the importance weights p(x, z) / q(z|x).
        if not self.training:
            terms["log_w"] = log_px_z + (p_z.log_prob(z) - q_z.log_prob(z)).sum(-1)
            terms["mean"] = q_z.mean / p_z.stddev
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO per example, -log p(x|z) + beta KL, in nats, (B,).

        The flags --released_objective and --free_bits change the first and the second term.
        """
        reconstruction = -terms["log_px_z"] * reconstruction_weight(f)
        return reconstruction + f.beta * common.free_bits(terms["kl"], f.free_bits).sum(-1)

    # What the report measures, compares with the theory and draws (see report.py).

    @staticmethod
    def linear_optimum(f, data):
        """Theorem 1: the units of the linear VAE at its optimum on the same data."""
        # Without the KL no optimum is finite.
        if f.beta == 0:
            return None
        return theory.vae_optimum_fixed_sigma(
            theta=theory.spectrum(data.moment).sqrt(),
            sigma=torch.full((f.d_1,), f.sigma),
            # Counting the reconstruction twice has the same optimum as halving beta.
            beta=f.beta / reconstruction_weight(f),
            eta_enc=f.eta_dec / f.c,
            eta_dec=f.eta_dec,
        )

    def reconstructions(self, x, f):
        """Images (B, 784) for a picture. They come from the mean of q(z|x), not from draws."""
        return {"test images": x, "reconstructed": self.g(self.q_z(x, f).mean)}

    def samples(self, n, f):
        """The decoder means (n, 784) of n draws from the prior, for a picture."""
        return self.g(self.p_z(f).sample((n, f.d_1)))


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    data = datasets.load_mnist(settings)
    runs = training.fit(VAE, settings, data)
    return report.report(runs, counterpart="MNIST_VAE_Relu_learnable_sigma")


if __name__ == "__main__":
    common.run(main)
