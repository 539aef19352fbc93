"""Linear CVAE on MNIST: which units of z collapse, given that x already predicts part of y?

    CUDA_VISIBLE_DEVICES=0 python MNIST_CVAE_Linear.py --beta 1.0
    python MNIST_CVAE_Linear.py --beta 0.1:5.0:0.1

x is the lower left quarter of the image. y consists of the other three quarters.

How it is trained: Adam minimises the negative beta-ELBO in batches of 128 images for 30 epochs. The
learning rate starts at 3e-3 and falls to 0 along a cosine. Each setting's gradient is clipped to a
norm of 100. The training step is the first function of training.py.

What the theory says: theorem 2 of Dang et al. (2024, arXiv 2306.05023) gives the optimum in closed
form. Let theta_i be the i-th largest eigenvalue of the matrix

    E = E[y y^T] - E[y x^T] E[x x^T]^+ E[x y^T]

Here E[...] is the mean over the training images, and ^+ is the pseudoinverse. The matrix E is the
second moment of the part of y that no linear map can predict from x. Unit i collapses if and only
if

    theta_i <= beta eta_dec^2

The script prints the trained units next to the predicted ones.
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
import verify


@dataclass
class Flags(common.LinearFlags):
    beta: float = common.scalar(1.0, "weight of KL(q(z|x,y) || p(z|x)) in the loss", above=0)
    eta_enc: float = common.scalar(1.0, "standard deviation of the prior p(z|x)", above=0)
    eta_dec: float = common.scalar(1.0, "standard deviation of the decoder p(y|x,z)", above=0)
    dim_z: int = common.flag(64, "number of units of z", low=1)
    num_epochs: int = common.flag(30, "number of passes over the training set", low=1)


class CVAE(nn.Module):
    """A CVAE whose maps are all linear. Here x has 196 pixels and y has 588 pixels:

        q(z|x,y) = N(W1 x + W2 y, diag sigma^2)
        p(z|x)   = N(0, eta_enc^2 I)
        p(y|x,z) = N(U1 z + U2 x, eta_dec^2 I)

    All images share sigma, which is learned.

    The methods take the setting f as an argument, so that settings can be trained as a batch. It is
    an instance of Flags whose scalars, such as f.beta, are 0-d tensors, except in __init__ and
    predicted.
    """

    def __init__(self, f):
        super().__init__()
        self.W1 = nn.Linear(196, f.dim_z, bias=False)
        self.W2 = nn.Linear(588, f.dim_z, bias=False)
        self.U1 = nn.Linear(f.dim_z, 588, bias=False)
        self.U2 = nn.Linear(196, 588, bias=False)
        # sigma is eta_enc exp(log_sigma), so that training starts from the prior's std.
        self.log_sigma = nn.Parameter(torch.zeros(f.dim_z))

    def q_z(self, x, y, f):
        """q(z|x,y) of the shape (B, dim_z), for B pairs of x (B, dim_x) and y (B, dim_y)."""
        return Normal(self.W1(x) + self.W2(y), f.eta_enc * self.log_sigma.exp())

    def p_z(self, f):
        """The prior p(z|x) of one unit, a scalar."""
        return Normal(torch.zeros_like(f.eta_enc), f.eta_enc)

    def y_mean(self, x, z):
        return self.U1(z) + self.U2(x)

    def forward(self, x, y, f, sample_shape=()):
        """The terms of the ELBO for x (B, 196) and y (B, 588), in nats. Shapes are in report.py.

        The noise of z is integrated out, so that training needs no draws of z. With r = y - U2 x:

            E ||r - U1 z||^2 = ||r - U1 E[z]||^2 + sum_i sigma_i^2 ||U1_i||^2
        """
        q_z = self.q_z(x, y, f)
        p_z = self.p_z(f)
        U1 = self.U1.weight
        r = y - self.U2(x)

        decoded_noise = (q_z.stddev**2 * (U1**2).sum(0)).sum(-1)
        log_py_at_mean = common.log_normal(r, self.U1(q_z.mean), f.eta_dec)
        terms = {
            "log_px_z": log_py_at_mean - decoded_noise / (2 * f.eta_dec**2),
            "kl": kl_divergence(q_z, p_z),
        }

        # Only the evaluation needs draws of z, for the importance weights p(y, z|x) / q(z|x,y).
        if not self.training:
            z = q_z.sample(sample_shape)
            log_py_z = common.log_normal_linear(r, U1, z, f.eta_dec)
            terms["log_w"] = log_py_z + (p_z.log_prob(z) - q_z.log_prob(z)).sum(-1)
            terms["mean"] = q_z.mean / f.eta_enc
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO per example, -log p(y|x,z) + beta KL, in nats, (B,)."""
        return -terms["log_px_z"] + f.beta * terms["kl"].sum(-1)

    # What the report measures, compares with the theory and draws (see report.py).

    def residuals(self, x, y, f, draws=None):
        """Describe y minus its expected reconstruction, as headroom.py needs it.

        The expectation over z is exact and needs no draws.
        """
        residual = headroom.Residual(
            encoder_input=(x, y),
            mean_parts=[(self.U1, self.q_z(x, y, f).mean), (self.U2, x)],
            beta=f.beta,
            weight=1,
            std=f.eta_dec,
        )
        return {"": residual}

    @staticmethod
    def predicted(f, data):
        """Theorem 2: the units at the optimum and the optimal loss."""
        E = theory.moment_given_x(data.moment, dim_x=196)
        return theory.cvae_optimum(
            theta=theory.spectrum(E),
            dim_z=f.dim_z,
            beta=f.beta,
            eta_enc=f.eta_enc,
            eta_dec=f.eta_dec,
        )

    def units(self, f, data):
        """The quantities of `predicted`, measured on this model's weights in float64."""
        W = torch.cat([self.W1.weight, self.W2.weight], dim=1)
        V = W @ theory.root(data.moment)
        sigma = f.eta_enc * self.log_sigma.exp()
        return verify.vae_units(self.U1.weight, V, sigma, f.eta_enc)

    def exact_log_px(self, x, y, f):
        """log p(y|x) in nats, (B,), from y|x ~ N(U2 x, eta_enc^2 U1 U1^T + eta_dec^2 I)."""
        return common.log_normal_low_rank(y - self.U2(x), f.eta_enc * self.U1.weight, f.eta_dec)

    def reconstructions(self, x, y, f):
        """Images (B, 784) for a picture. z is the mean of q(z|x,y), or the mean 0 of p(z|x)."""
        z = self.q_z(x, y, f).mean
        return {
            "test images": datasets.whole_images(x, y),
            "y from x and z": datasets.whole_images(x, self.y_mean(x, z)),
            "y from x alone (z = 0)": datasets.whole_images(x, self.y_mean(x, 0 * z)),
        }


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    data = datasets.load_mnist_quarters(settings)
    runs = training.fit(CVAE, settings, data)
    return report.report(runs)


if __name__ == "__main__":
    common.run(main)
