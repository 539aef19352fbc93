"""ReLU HVAE on MNIST: how do beta_1, beta_2 and eta_dec collapse the units of each latent level?

    CUDA_VISIBLE_DEVICES=0 python MNIST_HVAE_Relu.py --beta_1 1.0
    python MNIST_HVAE_Relu.py --beta_1 0.1,0.5,1.0,2.0

The model: an image x is encoded to a latent vector z1, and z1 to a second latent vector z2. Their
components are called units. The class HVAE below defines the distributions. The loss is the
negative beta-ELBO,

    E_q[-log p(x|z1) + beta_1 (log q(z1|x) - log p(z1|z2)) + beta_2 KL(q(z2|z1) || p(z2))]

where E_q is the expectation over q(z1|x) and q(z2|z1). A unit collapses if its posterior is the
same for every value of the encoder's input. It then carries no information.

How it is trained: Adam minimises the loss in batches of 128 images for 100 epochs, with one draw of
z1 and z2 per image. The learning rate is 1e-3 throughout. A setting is a combination of the flags'
values. Each setting's gradient is clipped to a norm of 0.1. The training step is the first function
of training.py.

What the theory says: theorem 3 of Dang et al. (2024, arXiv 2306.05023) covers only the linear
HVAE. MNIST_HVAE_Linear_learnable_sigma_2.py states when its units collapse. This script prints the
prediction, computed from the same images, next to the trained nonlinear HVAE.
"""
from dataclasses import dataclass

import common
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

import datasets
import headroom
import report
import theory
import training


@dataclass
class Flags(common.RemedyFlags, common.TrainFlags):
    beta_1: float = common.scalar(
        1.0, "weight of E_q[log q(z1|x) - log p(z1|z2)] in the loss", low=0
    )
    beta_2: float = common.scalar(1.0, "weight of KL(q(z2|z1) || p(z2)) in the loss", low=0)
    eta_enc: float = common.scalar(0.5, "standard deviation of the prior p(z2)", above=0)
    eta_dec: float = common.scalar(
        0.5, "standard deviation of the decoders p(x|z1) and p(z1|z2)", above=0
    )
    sigma_1: float = common.scalar(0.5, "standard deviation of the encoder q(z1|x)", above=0)
    start_std: float = common.scalar(
        1.0,
        "initial standard deviation of the encoder q(z2|z1), divided by the prior's",
        low=0.01,
        high=10,
    )
    d_1: int = common.flag(16, "number of units of z1", low=1)
    d_2: int = common.flag(16, "number of units of z2", low=1)
    d_hidden: int = common.flag(256, "number of units in each hidden layer", low=1)
    released_objective: bool = common.flag(
        False, "count the reconstruction twice in the loss, as the authors' released code does"
    )


def reconstruction_weight(f):
    """The weight of -log p(x|z1) in the loss: 1, or 2 with --released_objective."""
    return 2 if f.released_objective else 1


class HVAE(nn.Module):
    """A Markovian hierarchical VAE, x -> z1 -> z2 and back, whose maps are MLPs:

        q(z1|x)  = N(tanh x_to_z1(x), sigma_1^2 I)
        q(z2|z1) = N(tanh m(z1), diag s(z1)^2)
        p(z2)    = N(0, eta_enc^2 I)
        p(z1|z2) = N(tanh z2_to_z1(z2), eta_dec^2 I)
        p(x|z1)  = N(tanh z1_to_x(z1), eta_dec^2 I)

    Each MLP has one ReLU layer. The two halves of z1_to_z2's outputs give m(z1) and, by
    common.std_head, s(z1).

    The methods take the setting f as an argument, so that settings can be trained as a batch. It is
    an instance of Flags whose scalars, such as f.beta_1, are 0-d tensors, except in __init__ and
    linear_optimum.
    """

    def __init__(self, f):
        super().__init__()

        def mlp(d_in, d_out):
            return nn.Sequential(
                nn.Linear(d_in, f.d_hidden), nn.ReLU(), nn.Linear(f.d_hidden, d_out)
            )

        self.x_to_z1 = mlp(784, f.d_1)
        self.z1_to_z2 = mlp(f.d_1, 2 * f.d_2)
        self.z2_to_z1 = mlp(f.d_2, f.d_1)
        self.z1_to_x = mlp(f.d_1, 784)

    def q_z1(self, x, f):
        """q(z1|x) of the shape (..., d_1), for images x (..., 784)."""
        return Normal(self.x_to_z1(x).tanh(), f.sigma_1)

    def q_z2(self, z1, f):
        """q(z2|z1) of the shape (..., d_2), for z1 (..., d_1)."""
        mean, raw_std = self.z1_to_z2(z1).chunk(2, dim=-1)
        return Normal(mean.tanh(), common.std_head(raw_std, f.eta_enc, f.start_std))

    def p_z1(self, z2, f):
        """p(z1|z2) of the shape (..., d_1), for z2 (..., d_2)."""
        return Normal(self.z2_to_z1(z2).tanh(), f.eta_dec)

    def p_z2(self, f):
        """The prior p(z2) of one unit, a scalar."""
        return Normal(torch.zeros_like(f.eta_enc), f.eta_enc)

    def x_mean(self, z1):
        """The mean of p(x|z1), (..., 784), for z1 (..., d_1)."""
        # tanh works in place, since many draws of an image need much memory.
        return self.z1_to_x(z1).tanh_()

    def forward(self, x, f, sample_shape=()):
        """The terms of the ELBO for images x (B, 784), in nats. Their shapes are in report.py."""
        q_z1 = self.q_z1(x, f)
        z1 = q_z1.rsample(sample_shape)
        q_z2 = self.q_z2(z1, f)
        z2 = q_z2.rsample()
        p_z1 = self.p_z1(z2, f)
        p_z2 = self.p_z2(f)

        log_px_z = common.log_normal(x, self.x_mean(z1), f.eta_dec)
        log_p_z1 = p_z1.log_prob(z1)
        terms = {
            "log_px_z": log_px_z,
            # z2 is inferred from this z1. The term is therefore no divergence and can be negative.
            "kl_1": -q_z1.entropy() - log_p_z1,
            "kl_2": kl_divergence(q_z2, p_z2),
        }

        # Only the evaluation needs the importance weights p(x, z1, z2) / q(z1, z2|x).
        if not self.training:
            terms["log_w"] = (
                log_px_z
                + (log_p_z1 - q_z1.log_prob(z1)).sum(-1)
                + (p_z2.log_prob(z2) - q_z2.log_prob(z2)).sum(-1)
            )
            # This KL compares p(z1|z2) with all of q(z1|x) rather than with the draw that z2 was
            # inferred from. It is a divergence.
            terms["unit_kl_1"] = kl_divergence(q_z1, p_z1)
            terms["mean_1"] = q_z1.mean / f.eta_dec
            terms["mean_2"] = q_z2.mean / f.eta_enc
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO, -log p(x|z1) + beta_1 KL_1 + beta_2 KL_2, in nats, (B,).

        The flags --released_objective and --free_bits change the first and the last term.
        """
        reconstruction = -terms["log_px_z"] * reconstruction_weight(f)
        kl_1 = terms["kl_1"].sum(-1)
        kl_2 = common.free_bits(terms["kl_2"], f.free_bits).sum(-1)
        return reconstruction + f.beta_1 * kl_1 + f.beta_2 * kl_2

    # What the report measures, compares with the theory and draws (see report.py).

    def residuals(self, x, f, draws):
        """Describe z1 minus its expected reconstruction from z2, as headroom.py needs it.

        One draw of z1 is the target. The expectation over z2 is estimated twice, each time by the
        mean over `draws` draws.
        """
        z1 = self.q_z1(x, f).sample()
        z2 = self.q_z2(z1, f).sample((2, draws))
        residual = headroom.Residual(
            encoder_input=(z1,),
            mean_parts=[(None, self.p_z1(z2, f).mean.mean(1))],
            beta=f.beta_2,
            weight=f.beta_1,
            std=f.eta_dec,
        )
        return {"_2": residual}

    @staticmethod
    def linear_optimum(f, data):
        """Theorem 3: the units of the linear HVAE at its optimum on the same data."""
        # Without one of the KLs no optimum is finite.
        if f.beta_1 == 0 or f.beta_2 == 0:
            return None
        # Counting the reconstruction twice has the same optimum as halving both betas.
        weight = reconstruction_weight(f)
        return theory.hvae_optimum(
            theta=theory.spectrum(data.moment).sqrt(),
            d_1=f.d_1,
            d_2=f.d_2,
            sigma_1=f.sigma_1,
            beta_1=f.beta_1 / weight,
            beta_2=f.beta_2 / weight,
            eta_enc=f.eta_enc,
            eta_dec=f.eta_dec,
        )

    def reconstructions(self, x, f):
        """Images (B, 784) for a picture. They come from the means of z1 and z2, not from draws."""
        z1 = self.q_z1(x, f).mean
        z2 = self.q_z2(z1, f).mean
        return {
            "test images": x,
            "reconstructed through z1": self.x_mean(z1),
            "reconstructed through z2": self.x_mean(self.p_z1(z2, f).mean),
        }

    def samples(self, n, f):
        """The decoder means (n, 784) of n draws from the prior, for a picture."""
        z2 = self.p_z2(f).sample((n, f.d_2))
        return self.x_mean(self.p_z1(z2, f).sample())


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    data = datasets.load_mnist(settings)
    runs = training.fit(HVAE, settings, data)
    return report.report(runs)


if __name__ == "__main__":
    common.run(main)
