"""Convolutional CVAE on one digit of MNIST: does linear theory predict how many units it keeps?

    CUDA_VISIBLE_DEVICES=0 python MNIST_CVAE_CNN_single_digit.py --digit 1
    python MNIST_CVAE_CNN_single_digit.py --digit 0:9

The second command trains one model for each digit. Each combination of the flags' values is called
a setting.

The model: a conditional VAE models p(y|x) with a latent vector z, whose components are called
units. Here x is the lower left quarter of an image, and y consists of the other three quarters. The
class CVAE below defines the distributions with their standard deviations eta_enc and eta_dec. The
loss is the negative beta-ELBO,

    E_q[-log p(y|x,z)] + beta KL(q(z|x,y) || p(z|x))

A unit collapses if its posterior equals its prior, so that it carries no information about y.

How it is trained: Adam minimises the loss in batches of 128 images for 100 epochs, with one draw
of z per image. The learning rate is 1e-3 throughout. Each setting's gradient is clipped to a norm
of 0.1. The training step is the first function of training.py.

What the theory says: theorem 2 of Dang et al. (2024, arXiv 2306.05023) covers only the linear
CVAE, MNIST_CVAE_Linear_single_digit.py. Let theta_i be the i-th largest eigenvalue of the matrix

    E = E[y y^T] - E[y x^T] E[x x^T]^+ E[x y^T]

Here E[...] is the mean over the training images, and ^+ is the pseudoinverse. The matrix E is the
second moment of what remains of y when its best linear prediction from x is subtracted. Unit i of a
linear CVAE collapses if and only if

    theta_i <= beta eta_dec^2

where --released_objective halves beta. The script prints this prediction, computed from the same
images, next to the trained nonlinear CVAE.
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
    digit: int = common.flag(1, "digit whose images are used", low=0, high=9)
    beta: float = common.scalar(1.0, "weight of KL(q(z|x,y) || p(z|x)) in the loss", low=0)
    eta_enc: float = common.scalar(0.5, "standard deviation of the prior p(z|x)", above=0)
    eta_dec: float = common.scalar(0.5, "standard deviation of the decoder p(y|x,z)", above=0)
    start_std: float = common.scalar(
        0.1,
        "initial standard deviation of the encoder q(z|x,y), divided by the prior's",
        low=0.01,
        high=10,
    )
    dim_z: int = common.flag(16, "number of units of z", low=1)
    released_objective: bool = common.flag(
        False, "count the reconstruction twice in the loss, as the authors' released code does"
    )


def reconstruction_weight(f):
    """The weight of -log p(y|x,z) in the loss: 1, or 2 with --released_objective."""
    return 2 if f.released_objective else 1


class CVAE(nn.Module):
    """A CVAE whose maps are convolutional networks:

        q(z|x,y) = N(m(x, y), diag s(x, y)^2)
        p(z|x)   = N(0, eta_enc^2 I)
        p(y|x,z) = N(g_x(x) + g_z(z), eta_dec^2 I)

    The sum f_x(x) + f_y(y) of two networks has 2 dim_z numbers. Its first half is the mean m(x, y).
    Its second half gives s(x, y) by common.std_head. The network f_x sees x as an image (1x14x14).
    The network f_y sees y as an image (1x28x28) whose lower left quarter is 0. The networks g_x and
    g_z return images (1x28x28), whose lower left quarter is not used.

    The methods take the setting f as an argument, so that settings can be trained as a batch. It is
    an instance of Flags whose scalars, such as f.beta, are 0-d tensors, except in __init__ and
    linear_optimum.
    """

    # The number of values of one image in the widest layer, which has 32 channels of side 14. From
    # it the evaluation chooses how many images to take at a time.
    widest_layer = 32 * 14 * 14

    def __init__(self, f):
        super().__init__()

        def convolutions():
            # Stride 2 maps images of side 28 to 14 to 7, and images of side 14 to 7 to 4.
            return [
                nn.Conv2d(1, 32, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(32, 16, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Flatten(),
            ]

        def transposed_convolutions(d_in):
            # From a vector to images of side 7, then 14, then 28.
            return [
                nn.Linear(d_in, 16 * 7 * 7),
                nn.ReLU(),
                nn.Unflatten(1, (16, 7, 7)),
                nn.ConvTranspose2d(16, 32, 3, stride=2, padding=1, output_padding=1),
                nn.ReLU(),
                nn.ConvTranspose2d(32, 1, 3, stride=2, padding=1, output_padding=1),
            ]

        self.f_x = nn.Sequential(*convolutions(), nn.Linear(16 * 4 * 4, 2 * f.dim_z))
        self.f_y = nn.Sequential(*convolutions(), nn.Linear(16 * 7 * 7, 2 * f.dim_z))
        self.g_x = nn.Sequential(*convolutions(), *transposed_convolutions(16 * 4 * 4))
        self.g_z = nn.Sequential(*transposed_convolutions(f.dim_z))

    def q_z(self, x, y, f):
        """q(z|x,y) of the shape (B, dim_z), for B pairs of x (B, dim_x) and y (B, dim_y)."""
        x_image = x.view(-1, 1, 14, 14)
        y_image = datasets.whole_images(torch.zeros_like(x), y).view(-1, 1, 28, 28)
        mean, raw_std = (self.f_x(x_image) + self.f_y(y_image)).chunk(2, dim=-1)
        return Normal(mean, common.std_head(raw_std, f.eta_enc, f.start_std))

    def p_z(self, f):
        """The prior p(z|x) of one unit, a scalar."""
        return Normal(torch.zeros_like(f.eta_enc), f.eta_enc)

    def y_mean(self, x, z):
        """The mean of p(y|x,z), (..., B, 588), for x (B, 196) and z (..., B, dim_z)."""
        _, y_from_x = datasets.quarters(self.g_x(x.view(-1, 1, 14, 14)))
        _, y_from_z = datasets.quarters(self.g_z(z.flatten(0, -2)))
        return y_from_x + y_from_z.view(*z.shape[:-1], 588)

    def forward(self, x, y, f, sample_shape=()):
        """The terms of the ELBO for x (B, 196) and y (B, 588), in nats. Shapes are in report.py.

        B is the number of images. log_px_z is the name that report.py has for the log-likelihood of
        the data given z. Here it is log p(y|x,z).
        """
        q_z = self.q_z(x, y, f)
        p_z = self.p_z(f)
        z = q_z.rsample(sample_shape)

        log_py_z = common.log_normal(y, self.y_mean(x, z), f.eta_dec)
        terms = {"log_px_z": log_py_z, "kl": kl_divergence(q_z, p_z)}

        # The evaluation also needs the importance weights p(y, z|x) / q(z|x,y), and the means in
        # standard deviations of the prior.
        if not self.training:
            terms["log_w"] = log_py_z + (p_z.log_prob(z) - q_z.log_prob(z)).sum(-1)
            terms["mean"] = q_z.mean / f.eta_enc
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO per example, -log p(y|x,z) + beta KL, in nats, (B,).

        The flags --released_objective and --free_bits change the first and the second term.
        """
        reconstruction = -terms["log_px_z"] * reconstruction_weight(f)
        return reconstruction + f.beta * common.free_bits(terms["kl"], f.free_bits).sum(-1)

    # What report.py measures, compares with the theory and draws. Its docstring describes each
    # method.

    def residuals(self, x, y, f, draws):
        """Describe y minus its expected reconstruction, for headroom.py.

        headroom.py asks whether one more unit of z would lower the loss. The expectation over z is
        estimated twice, each time by the mean over `draws` draws.
        """
        z = self.q_z(x, y, f).sample((2, draws))
        residual = headroom.Residual(
            encoder_input=(x, y),
            mean_parts=[(None, self.y_mean(x, z).mean(1))],
            beta=f.beta,
            weight=reconstruction_weight(f),
            std=f.eta_dec,
        )
        return {"": residual}

    @staticmethod
    def linear_optimum(f, data):
        """Theorem 2: the units of the linear CVAE at its optimum on the same data."""
        # Without the KL no optimum is finite.
        if f.beta == 0:
            return None
        E = theory.moment_given_x(data.moment, dim_x=196)
        return theory.cvae_optimum(
            theta=theory.spectrum(E),
            dim_z=f.dim_z,
            # Counting the reconstruction twice has the same optimum as halving beta.
            beta=f.beta / reconstruction_weight(f),
            eta_enc=f.eta_enc,
            eta_dec=f.eta_dec,
        )

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
    # On a CPU the convolutions of stacked settings are slower than one setting after another.
    on_gpu = data[0].train[0].is_cuda
    runs = training.fit(CVAE, settings, data, side_by_side=on_gpu)
    return report.report(runs)


if __name__ == "__main__":
    common.run(main)
