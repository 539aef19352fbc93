"""Linear VAE on MNIST with a fixed encoder variance: which means become 0, and is that collapse?

    python MNIST_VAE_Linear_nonlearnable_sigma.py --eta_dec 1.0 --c 1.0 --beta 1.0 --sigma 1.0
    python MNIST_VAE_Linear_nonlearnable_sigma.py --eta_dec 10 --c 2 --sigma 8/4/2/1/0.5

How it is trained: Adam minimises the negative beta-ELBO in batches of 128 images for 100 epochs.
The learning rate starts at 3e-3 and falls to 0 along a cosine. Each setting's gradient is clipped
to a norm of 100. The training step is the first function of training.py.

What the theory says: theorem 1 of Dang et al. (2024, arXiv 2306.05023) gives the optimum in closed
form. Let theta_i be the square root of the i-th largest eigenvalue of E[x x^T]. The units are
ordered such that sigma_1 is the smallest. The mean of q(z_i|x) is 0 for all images if and only if

    theta_i <= sqrt(beta) sigma_i eta_dec / eta_enc

The KL of such a unit is still positive, unless sigma_i = eta_enc. The script prints the trained
units next to the predicted ones.

MNIST_VAE_Linear_learnable_sigma.py is the counterpart with a learnable encoder variance.
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
import verify


@dataclass
class Flags(common.LinearFlags):
    beta: float = common.scalar(1.0, "weight of KL(q(z|x) || p(z)) in the loss", above=0)
    eta_dec: float = common.scalar(1.0, "standard deviation of the decoder p(x|z)", above=0)
    c: float = common.scalar(
        1.0,
        "ratio eta_dec / eta_enc, where eta_enc is the standard deviation of the prior p(z)",
        above=0,
    )
    sigma: float = common.scalar(
        1.0, "standard deviation of the encoder q(z|x)", above=0, vector=True
    )
    d_1: int = common.flag(5, "number of units of z", low=1)


class VAE(nn.Module):
    """A VAE whose encoder and decoder are linear:

        q(z|x) = N(W x, diag sigma^2)
        p(z)   = N(0, eta_enc^2 I)
        p(x|z) = N(U z, eta_dec^2 I)

    The encoder variance is fixed. --sigma gives one std for all units, or one per unit.

    The methods take the setting f as an argument, so that settings can be trained as a batch. It is
    an instance of Flags whose scalars, such as f.beta, are 0-d tensors, except in __init__ and
    predicted. If --sigma gives one number per unit, f.sigma is (d_1,).
    """

    def __init__(self, f):
        super().__init__()
        self.W = nn.Linear(784, f.d_1, bias=False)
        self.U = nn.Linear(f.d_1, 784, bias=False)

    def q_z(self, x, f):
        """q(z|x) of the shape (B, d_1), for images x (B, 784)."""
        return Normal(self.W(x), f.sigma)

    def p_z(self, f):
        """The prior p(z) of one unit, a scalar."""
        return Normal(torch.zeros_like(f.eta_dec), f.eta_dec / f.c)

    def forward(self, x, f, sample_shape=()):
        """The terms of the ELBO for images x (B, 784), in nats. Their shapes are in report.py.

        The noise of z is integrated out, so that training needs no draws of z:

            E ||x - U z||^2 = ||x - U E[z]||^2 + sum_i sigma_i^2 ||U_i||^2
        """
        q_z = self.q_z(x, f)
        p_z = self.p_z(f)
        U = self.U.weight

        decoded_noise = (q_z.stddev**2 * (U**2).sum(0)).sum(-1)
        log_px_at_mean = common.log_normal_linear(x, U, q_z.mean, f.eta_dec)
        terms = {
            "log_px_z": log_px_at_mean - decoded_noise / (2 * f.eta_dec**2),
            "kl": kl_divergence(q_z, p_z),
        }

        # Only the evaluation needs draws of z, for the importance weights p(x, z) / q(z|x).
        if not self.training:
            z = q_z.sample(sample_shape)
            log_px_z = common.log_normal_linear(x, U, z, f.eta_dec)
            terms["log_w"] = log_px_z + (p_z.log_prob(z) - q_z.log_prob(z)).sum(-1)
            terms["mean"] = q_z.mean / p_z.stddev
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO per example, -log p(x|z) + beta KL, in nats, (B,)."""
        return -terms["log_px_z"] + f.beta * terms["kl"].sum(-1)

    # What the report measures, compares with the theory and draws (see report.py).

    @staticmethod
    def predicted(f, data):
        """Theorem 1: the units at the optimum and the optimal loss."""
        return theory.vae_optimum_fixed_sigma(
            theta=theory.spectrum(data.moment).sqrt(),
            sigma=torch.tensor(common.vector_values(f.sigma)).expand(f.d_1),
            beta=f.beta,
            eta_enc=f.eta_dec / f.c,
            eta_dec=f.eta_dec,
        )

    def units(self, f, data):
        """The quantities of `predicted`, measured on this model's weights in float64."""
        V = self.W.weight @ theory.root(data.moment)
        sigma = f.sigma.expand(f.d_1)
        return verify.vae_units(self.U.weight, V, sigma, f.eta_dec / f.c)

    def exact_log_px(self, x, f):
        """log p(x) in nats, (B,), from x ~ N(0, eta_enc^2 U U^T + eta_dec^2 I)."""
        return common.log_normal_low_rank(x, f.eta_dec / f.c * self.U.weight, f.eta_dec)

    def reconstructions(self, x, f):
        """Images (B, 784) for a picture. The mean of a linear model does not depend on f."""
        return {"test images": x, "reconstructed": self.U(self.W(x))}

    def samples(self, n, f):
        """The decoder means (n, 784) of n draws from the prior, for a picture."""
        return self.U(self.p_z(f).sample((n, f.d_1)))


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    for f in settings:
        if len(common.vector_values(f.sigma)) not in (1, f.d_1):
            wanted = f"one number or --d_1 = {f.d_1} of them"
            common.stop(f, f"--sigma: got {f.sigma!r}, wants {wanted}")
    data = datasets.load_mnist(settings)
    runs = training.fit(VAE, settings, data)
    return report.report(runs, counterpart="MNIST_VAE_Linear_learnable_sigma")


if __name__ == "__main__":
    common.run(main)
