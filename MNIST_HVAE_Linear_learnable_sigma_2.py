"""Linear HVAE on MNIST with a learnable q(z2|z1): which units do beta_1 and beta_2 collapse?

    CUDA_VISIBLE_DEVICES=0 python MNIST_HVAE_Linear_learnable_sigma_2.py --beta_1 1.0 --beta_2 1.0
    python MNIST_HVAE_Linear_learnable_sigma_2.py --beta_2 0.1:7.0:0.1

The second command trains one model for each value of beta_2. Each value is called a setting.

The model: an image x is encoded to a latent vector z1, and z1 to a second latent vector z2. The
components of z1 and z2 are called units. The class HVAE below defines the distributions with their
standard deviations sigma_1, sigma_2, eta_enc and eta_dec. The loss is the negative beta-ELBO,

    E_q[-log p(x|z1) + beta_1 (log q(z1|x) - log p(z1|z2)) + beta_2 KL(q(z2|z1) || p(z2))]

where E_q is the expectation over q(z1|x) and q(z2|z1). A unit collapses if its posterior is the
same for every value of the encoder's input. It then carries no information.

How it is trained: Adam minimises the loss in batches of 128 images for 50 epochs. The learning
rate starts at 1e-2 and falls to 0 along a cosine. Each setting's gradient is clipped to a norm of
100. The training step is the first function of training.py.

What the theory says: theorem 3 of Dang et al. (2024, arXiv 2306.05023) gives the optimum in closed
form. Let theta_i be the square root of the i-th largest eigenvalue of E[x x^T], where E is the mean
over the training images. Let z1 and z2 have the same number of units. Unit i of z1 collapses if and
only if

    theta_i <= sqrt(beta_1) sigma_1   and   theta_i <= sqrt(beta_2) eta_dec

Unit i of z2 collapses if and only if

    max(sigma_1^2, sigma_1 theta_i / sqrt(beta_1)) <= (beta_2 / beta_1) eta_dec^2

The script prints the trained units next to the predicted ones.

MNIST_HVAE_Linear_nonlearnable_sigma_2.py fixes the variance of q(z2|z1).
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
    beta_1: float = common.scalar(
        1.0, "weight of E_q[log q(z1|x) - log p(z1|z2)] in the loss", above=0
    )
    beta_2: float = common.scalar(2.0, "weight of KL(q(z2|z1) || p(z2)) in the loss", above=0)
    eta_enc: float = common.scalar(0.5, "standard deviation of the prior p(z2)", above=0)
    eta_dec: float = common.scalar(
        0.5, "standard deviation of the decoders p(x|z1) and p(z1|z2)", above=0
    )
    sigma_1: float = common.scalar(0.5, "standard deviation of the encoder q(z1|x)", above=0)
    d_1: int = common.flag(10, "number of units of z1", low=1)
    d_2: int = common.flag(10, "number of units of z2", low=1)
    num_epochs: int = common.flag(50, "number of passes over the training set", low=1)
    lr: float = common.flag(1e-2, "learning rate of Adam", above=0)


class HVAE(nn.Module):
    """A Markovian hierarchical VAE, x -> z1 -> z2 and back, whose maps are all linear:

        q(z1|x)  = N(W1 x, sigma_1^2 I)
        q(z2|z1) = N(W2 z1, diag sigma_2^2)
        p(z2)    = N(0, eta_enc^2 I)
        p(z1|z2) = N(U2 z2, eta_dec^2 I)
        p(x|z1)  = N(U1 z1, eta_dec^2 I)

    All images share sigma_2, which is learned.

    The methods take the setting f as an argument, so that settings can be trained as a batch. It is
    an instance of Flags whose scalars, such as f.beta_1, are 0-d tensors, except in __init__ and
    predicted.
    """

    def __init__(self, f):
        super().__init__()
        # The maps before the units of z1 are scaled.
        self.unscaled_W1 = nn.Linear(784, f.d_1, bias=False)
        self.unscaled_W2 = nn.Linear(f.d_1, f.d_2, bias=False)
        self.unscaled_U2 = nn.Linear(f.d_2, f.d_1, bias=False)
        self.unscaled_U1 = nn.Linear(f.d_1, 784, bias=False)
        # The logarithm of the scale of each unit of z1.
        self.log_scale_1 = nn.Parameter(torch.zeros(f.d_1))
        # The logarithm of sigma_2 / eta_enc. At 0, sigma_2 is the std of the prior p(z2).
        self.log_sigma_2 = nn.Parameter(torch.zeros(f.d_2))

    # The four maps. Each unit of z1 has a learned scale, its element of s = exp(log_scale_1):
    #
    #     W1 = s unscaled W1,   W2 = unscaled W2 / s,   U2 = s unscaled U2,   U1 = unscaled U1 / s
    #
    # With any s the maps can be any matrices, so that s adds nothing to the model. It helps
    # training: the best scale of z1 grows as beta_2 falls, and the loss rises steeply unless all
    # four maps change together. A change of s changes them together.

    @property
    def scale_1(self):
        """s as a column, (d_1, 1)."""
        return self.log_scale_1.exp()[:, None]

    @property
    def W1(self):
        """The encoder of z1, (d_1, 784)."""
        return self.scale_1 * self.unscaled_W1.weight

    @property
    def W2(self):
        """The encoder of z2, (d_2, d_1)."""
        return self.unscaled_W2.weight / self.scale_1.T

    @property
    def U2(self):
        """The decoder of z1, (d_1, d_2)."""
        return self.scale_1 * self.unscaled_U2.weight

    @property
    def U1(self):
        """The decoder of x, (784, d_1)."""
        return self.unscaled_U1.weight / self.scale_1.T

    def sigma_2(self, f):
        return f.eta_enc * self.log_sigma_2.exp()

    def q_z1(self, x, f):
        """q(z1|x) of the shape (..., d_1), for images x (..., 784)."""
        return Normal(x @ self.W1.T, f.sigma_1)

    def q_z2(self, z1, f):
        """q(z2|z1) of the shape (..., d_2), for z1 (..., d_1)."""
        return Normal(z1 @ self.W2.T, self.sigma_2(f))

    def p_z1(self, z2, f):
        """p(z1|z2) of the shape (..., d_1), for z2 (..., d_2)."""
        return Normal(z2 @ self.U2.T, f.eta_dec)

    def p_z2(self, f):
        """The prior p(z2) of one unit, a scalar."""
        return Normal(torch.zeros_like(f.eta_enc), f.eta_enc)

    def forward(self, x, f, sample_shape=()):
        """The terms of the ELBO for images x (B, 784), in nats. Their shapes are in report.py.

        All maps are linear and all distributions Gaussian. The expectations over z1 and z2
        therefore have a closed form, and training needs no draws. B is the number of images.
        """
        q_z1 = self.q_z1(x, f)
        terms = {
            "log_px_z": self.expected_log_px(x, q_z1, f),
            "kl_1": self.expected_kl_1(q_z1, f),
            "kl_2": self.expected_kl_2(q_z1, f),
        }

        # The evaluation also needs draws, for the importance weights p(x, z1, z2) / q(z1, z2|x).
        # The means are in standard deviations of the prior.
        if not self.training:
            z1 = q_z1.sample(sample_shape)
            q_z2 = self.q_z2(z1, f)
            z2 = q_z2.sample()
            p_z1 = self.p_z1(z2, f)
            p_z2 = self.p_z2(f)
            terms["log_w"] = (
                common.log_normal_linear(x, self.U1, z1, f.eta_dec)
                + (p_z1.log_prob(z1) - q_z1.log_prob(z1)).sum(-1)
                + (p_z2.log_prob(z2) - q_z2.log_prob(z2)).sum(-1)
            )
            terms["unit_kl_1"] = self.divergence_of_z1(q_z1, f)
            terms["mean_1"] = q_z1.mean / f.eta_dec
            terms["mean_2"] = self.q_z2(q_z1.mean, f).mean / f.eta_enc
        return terms

    def expected_log_px(self, x, q_z1, f):
        """E[log p(x|z1)] over q(z1|x), in nats, (B,).

        The noise of z1 only adds to the squared error:

            E ||x - U1 z1||^2 = ||x - U1 E[z1]||^2 + sigma_1^2 ||U1||^2
        """
        U1 = self.U1
        log_px_at_mean = common.log_normal_linear(x, U1, q_z1.mean, f.eta_dec)
        return log_px_at_mean - f.sigma_1**2 * (U1**2).sum() / (2 * f.eta_dec**2)

    def expected_kl_1(self, q_z1, f):
        """E[log q(z1|x) - log p(z1|z2)] over q(z1, z2|x), in nats per unit, (B, d_1).

        p(z1|z2) is evaluated at a z2 that was drawn given this very z1. The result is therefore no
        KL divergence and can be negative. Insert z2 = W2 z1 + sigma_2 noise into log p(z1|z2):

            z1 - U2 z2 = R z1 - U2 (sigma_2 noise)   with   R = I - U2 W2

        The noise of z1 and z2 only adds its variance to the square of the mean R E[z1].
        """
        R = self.remainder_matrix()
        U2 = self.U2
        noise_variance = f.sigma_1**2 * (R**2).sum(1) + (U2**2) @ self.sigma_2(f)**2

        mean = q_z1.mean @ R.T
        log_p_at_mean = Normal(mean, f.eta_dec).log_prob(torch.zeros_like(mean))
        return -q_z1.entropy() - log_p_at_mean + noise_variance / (2 * f.eta_dec**2)

    def remainder_matrix(self):
        """R = I - U2 W2, (d_1, d_1). R z1 is z1 minus its expected reconstruction from z2."""
        U2, W2 = self.U2, self.W2
        return torch.eye(len(U2), dtype=U2.dtype, device=U2.device) - U2 @ W2

    def expected_kl_2(self, q_z1, f):
        """E[KL(q(z2|z1) || p(z2))] over q(z1|x), in nats per unit, (B, d_2).

        The noise of z1 only adds to the square of the mean W2 z1 of q(z2|z1).
        """
        kl_at_mean = kl_divergence(self.q_z2(q_z1.mean, f), self.p_z2(f))
        W2 = self.W2
        return kl_at_mean + f.sigma_1**2 * (W2**2).sum(1) / (2 * f.eta_enc**2)

    def divergence_of_z1(self, q_z1, f):
        """E[KL(q(z1|x) || p(z1|z2'))] in nats per unit, (B, d_1).

        z2' is drawn given another draw of z1. The result is therefore a KL divergence and never
        negative. Unlike `expected_kl_1`, it shows which units of z1 have collapsed.

        The KL does not change if U2 E[z2'] is subtracted from z1 and from the prior's mean U2 z2'.
        What remains of the prior's mean is noise, which only adds its variance.
        """
        U2, W2 = self.U2, self.W2
        noise_variance = f.sigma_1**2 * ((U2 @ W2)**2).sum(1) + (U2**2) @ self.sigma_2(f)**2

        shifted_q_z1 = Normal(q_z1.mean @ self.remainder_matrix().T, f.sigma_1)
        shifted_prior = Normal(torch.zeros_like(f.eta_dec), f.eta_dec)
        return kl_divergence(shifted_q_z1, shifted_prior) + noise_variance / (2 * f.eta_dec**2)

    def loss(self, terms, f):
        """The negative beta-ELBO of each image, in nats, (B,).

            -log p(x|z1) + beta_1 KL_1 + beta_2 KL_2

        KL_1 and KL_2 are sums over the units.
        """
        kl_1 = terms["kl_1"].sum(-1)
        kl_2 = terms["kl_2"].sum(-1)
        return -terms["log_px_z"] + f.beta_1 * kl_1 + f.beta_2 * kl_2

    # What report.py measures, compares with the theory and draws. Its docstring describes each
    # method.

    def residuals(self, x, f, draws=None):
        """Describe z1 minus its expected reconstruction U2 W2 z1 from z2, for headroom.py.

        headroom.py asks whether one more unit of z2 would lower the loss. The target is one draw of
        z1. The expectation over z2 is exact, so that the argument draws is not used.
        """
        z1 = self.q_z1(x, f).sample()
        residual = headroom.Residual(
            encoder_input=(z1,),
            mean_parts=[(None, z1 @ self.W2.T @ self.U2.T)],
            beta=f.beta_2,
            weight=f.beta_1,
            std=f.eta_dec,
        )
        return {"_2": residual}

    @staticmethod
    def predicted(f, data):
        """Theorem 3: the units of both levels at the optimum and the optimal loss."""
        return theory.hvae_optimum(
            theta=theory.spectrum(data.moment).sqrt(),
            d_1=f.d_1,
            d_2=f.d_2,
            sigma_1=f.sigma_1,
            beta_1=f.beta_1,
            beta_2=f.beta_2,
            eta_enc=f.eta_enc,
            eta_dec=f.eta_dec,
        )

    def units(self, f, data):
        """The quantities of `predicted`, measured on this model's weights.

        The caller has converted the model and f to float64.
        """
        # V1 is the encoder of z1 for x in coordinates whose second moment is I.
        return verify.hvae_units(
            V1=self.W1 @ theory.root(data.moment),
            W2=self.W2,
            U2=self.U2,
            sigma_1=f.sigma_1,
            sigma_2=self.sigma_2(f),
            eta_enc=f.eta_enc,
            eta_dec=f.eta_dec,
        )

    def exact_log_px(self, x, f):
        """log p(x) in nats, (B,). x is Gaussian with mean 0 and covariance

            U1 (eta_enc^2 U2 U2^T + eta_dec^2 I) U1^T + eta_dec^2 I

        The matrix in parentheses, the covariance of z1, is z1_factor z1_factor^T.
        """
        U1, U2 = self.U1, self.U2
        identity = torch.eye(len(U2), dtype=U2.dtype, device=U2.device)
        z1_factor = torch.cat([f.eta_enc * U2, f.eta_dec * identity], dim=1)
        return common.log_normal_low_rank(x, U1 @ z1_factor, f.eta_dec)

    def reconstructions(self, x, f):
        """Images (B, 784) for a picture. The means of a linear model do not depend on f."""
        z1 = x @ self.W1.T
        z2 = z1 @ self.W2.T
        return {
            "test images": x,
            "reconstructed through z1": z1 @ self.U1.T,
            "reconstructed through z2": z2 @ self.U2.T @ self.U1.T,
        }

    def samples(self, n, f):
        """The decoder means (n, 784) of n draws from the prior, for a picture."""
        z2 = self.p_z2(f).sample((n, f.d_2))
        return self.p_z1(z2, f).sample() @ self.U1.T


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    data = datasets.load_mnist(settings)
    runs = training.fit(HVAE, settings, data)
    return report.report(runs)


if __name__ == "__main__":
    common.run(main)
