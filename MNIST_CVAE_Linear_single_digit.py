"""Deep linear CVAE on one digit of MNIST: does theorem 2 predict how many units each digit keeps?

    CUDA_VISIBLE_DEVICES=0 python MNIST_CVAE_Linear_single_digit.py --digit 0:9

x is the lower left quarter of the image. y consists of the other three quarters.

How it is trained: Adam minimises the negative beta-ELBO in batches of 128 images for 300 epochs.
The learning rate starts at 3e-3 and falls to 0 along a cosine. Each setting's gradient is clipped
to a norm of 100. The training step is the first function of training.py.

What the theory says: theorem 2 of Dang et al. (2024, arXiv 2306.05023) gives the optimum in closed
form. Let theta_i be the i-th largest eigenvalue of the matrix

    E = E[y y^T] - E[y x^T] E[x x^T]^+ E[x y^T]

Here E[...] is the mean over the training images of this digit, and ^+ is the pseudoinverse. Unit i
collapses if and only if

    theta_i <= beta eta_dec^2

The script prints the trained units next to the predicted ones.

The theorem's CVAE has one linear layer per map and an encoder variance that all images share. Two
layers per map and a variance that depends on x and y cannot lower its optimal loss. They reach it
only if --d_hidden does not limit the rank of the map from x to y. The default 196 does not limit
it. The published value 16 does.
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
    digit: int = common.flag(1, "digit whose images are used", low=0, high=9)
    beta: float = common.scalar(1.0, "weight of KL(q(z|x,y) || p(z|x)) in the loss", above=0)
    eta_enc: float = common.scalar(0.5, "standard deviation of the prior p(z|x)", above=0)
    eta_dec: float = common.scalar(0.5, "standard deviation of the decoder p(y|x,z)", above=0)
    start_std: float = common.scalar(
        1.0,
        "initial standard deviation of the encoder q(z|x,y), divided by the prior's",
        low=0.01,
        high=10,
    )
    dim_z: int = common.flag(16, "number of units of z", low=1)
    d_hidden: int = common.flag(196, "number of units between the two layers of each map", low=1)
    num_epochs: int = common.flag(300, "number of passes over the training set", low=1)


class CVAE(nn.Module):
    """A CVAE with two linear layers per map. Here x has 196 pixels and y has 588 pixels:

        q(z|x,y) = N(F_x x + F_y y, diag s(x, y)^2)
        p(z|x)   = N(0, eta_enc^2 I)
        p(y|x,z) = N(G_z z + G_x x, eta_dec^2 I)

    F_x, F_y, G_x and G_z are the matrices of self.f_x, self.f_y, self.g_x and self.g_z.

    The methods take the setting f as an argument, so that settings can be trained as a batch. It is
    an instance of Flags whose scalars, such as f.beta, are 0-d tensors, except in __init__ and
    predicted.
    """

    def __init__(self, f):
        super().__init__()

        def two_layers(d_in, d_out):
            return nn.Sequential(
                nn.Linear(d_in, f.d_hidden, bias=False),
                nn.Linear(f.d_hidden, d_out, bias=False),
            )

        self.f_x = two_layers(196, f.dim_z)
        self.f_y = two_layers(588, f.dim_z)
        self.g_x = two_layers(196, 588)
        self.g_z = two_layers(f.dim_z, 588)
        self.std = nn.Linear(784, f.dim_z)

    def q_z(self, x, y, f):
        """q(z|x,y) of the shape (B, dim_z), for B pairs of x (B, dim_x) and y (B, dim_y)."""
        mean = self.f_x(x) + self.f_y(y)
        raw_std = self.std(torch.cat([x, y], dim=-1))
        return Normal(mean, common.std_head(raw_std, f.eta_enc, f.start_std))

    def p_z(self, f):
        """The prior p(z|x) of one unit, a scalar."""
        return Normal(torch.zeros_like(f.eta_enc), f.eta_enc)

    def y_mean(self, x, z):
        return self.g_z(z) + self.g_x(x)

    def forward(self, x, y, f, sample_shape=()):
        """The terms of the ELBO for x (B, 196) and y (B, 588), in nats. Shapes are in report.py.

        The noise of z is integrated out, so that training needs no draws of z. With r = y - G_x x:

            E ||r - G_z z||^2 = ||r - G_z E[z]||^2 + sum_i s_i^2 ||G_z_i||^2
        """
        q_z = self.q_z(x, y, f)
        p_z = self.p_z(f)
        G_z = product(self.g_z)
        r = y - self.g_x(x)

        decoded_noise = (q_z.stddev**2 * (G_z**2).sum(0)).sum(-1)
        log_py_at_mean = common.log_normal(r, self.g_z(q_z.mean), f.eta_dec)
        terms = {
            "log_px_z": log_py_at_mean - decoded_noise / (2 * f.eta_dec**2),
            "kl": kl_divergence(q_z, p_z),
        }

        # Only the evaluation needs draws of z, for the importance weights p(y, z|x) / q(z|x,y).
        if not self.training:
            z = q_z.sample(sample_shape)
            log_py_z = common.log_normal_linear(r, G_z, z, f.eta_dec)
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
        z = self.q_z(x, y, f).mean
        residual = headroom.Residual(
            encoder_input=(x, y),
            mean_parts=[(self.g_z[1], self.g_z[0](z)), (self.g_x[1], self.g_x[0](x))],
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
        """The quantities of `predicted`, measured on this model's weights in float64.

        The std of q(z|x,y) depends on x and y. sigma is its root mean square over the training set,
        and kl is the mean KL of each unit.
        """
        x, y = data.train
        q_z = self.q_z(x.cpu().double(), y.cpu().double(), f)
        sigma = (q_z.stddev**2).mean(0).sqrt()

        F = torch.cat([product(self.f_x), product(self.f_y)], dim=1)
        V = F @ theory.root(data.moment)
        units = verify.vae_units(product(self.g_z), V, sigma, f.eta_enc)
        units["kl"] = kl_divergence(q_z, self.p_z(f)).mean(0)
        return units

    def exact_log_px(self, x, y, f):
        """log p(y|x) in nats, (B,), from y|x ~ N(G_x x, eta_enc^2 G_z G_z^T + eta_dec^2 I)."""
        factor = f.eta_enc * product(self.g_z)
        return common.log_normal_low_rank(y - self.g_x(x), factor, f.eta_dec)

    def reconstructions(self, x, y, f):
        """Images (B, 784) for a picture. z is the mean of q(z|x,y), or the mean 0 of p(z|x)."""
        z = self.q_z(x, y, f).mean
        return {
            "test images": datasets.whole_images(x, y),
            "y from x and z": datasets.whole_images(x, self.y_mean(x, z)),
            "y from x alone (z = 0)": datasets.whole_images(x, self.y_mean(x, 0 * z)),
        }


def product(layers):
    """The matrix (d_out, d_in) of two linear layers in a row."""
    return layers[1].weight @ layers[0].weight


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    data = datasets.load_mnist_quarters(settings)
    runs = training.fit(CVAE, settings, data)
    return report.report(runs)


if __name__ == "__main__":
    common.run(main)
