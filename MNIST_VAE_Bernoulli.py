"""VAE with Bernoulli pixels on MNIST: from which beta on is collapse stable?

    CUDA_VISIBLE_DEVICES=0 python MNIST_VAE_Bernoulli.py --beta 1.0
    python MNIST_VAE_Bernoulli.py --beta 1,10,30,40 --linear true

This is the VAE of most tutorials: binary images, one hidden ReLU layer in the encoder and one in
the decoder, and the binary cross-entropy as the reconstruction term. With `--linear true` encoder
and decoder have no hidden layer.

How it is trained: Adam minimises the negative beta-ELBO in batches of 128 images for 30 epochs,
with one draw of z per image. The learning rate is 1e-3 throughout. Each setting's gradient is
clipped to a norm of 100, which hardly ever happens. The training step is the first function of
training.py.

What the theory says: let rho_1 be the largest eigenvalue of the correlation matrix of the pixels.
Suppose that all units are collapsed and that the decoder gives each pixel its mean. An arbitrarily
small change of the weights can then lower the loss if rho_1 > beta, and cannot if rho_1 < beta. So
collapse is stable from beta = rho_1 on. This holds for any encoder and for any decoder with biases,
also with `--linear true`. headroom.py derives it, for `--free_bits 0`.

The statement is local. For beta above rho_1, a model with active units may still exist. So train
twice: `--start_std 1` starts next to collapse, and `--beta_warmup 20` lets beta rise from 0, so
that units are active at first.

The script prints rho_1 before training. Afterwards it prints a verdict on the collapsed units. It
says whether the objective or training is the cause, or that their collapse is unstable (see
headroom.py).
"""
from dataclasses import dataclass

import common
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

import datasets
import headroom
import processes
import report
import theory
import training


@dataclass
class Flags(common.RemedyFlags, common.TrainFlags):
    beta: float = common.scalar(1.0, "weight of KL(q(z|x) || p(z)) in the loss", low=0)
    start_std: float = common.scalar(
        0.1,
        "initial standard deviation of the encoder q(z|x), divided by the prior's",
        low=0.01,
        high=10,
    )
    linear: bool = common.flag(False, "leave out the hidden layers of encoder and decoder")
    binarise: str = common.flag(
        "threshold",
        "how images become binary: threshold makes pixels above 0.5 white, sample draws each pixel "
        "once with its grey value as the probability of white",
        choices=("threshold", "sample"),
    )
    d_1: int = common.flag(16, "number of units of z", low=1)
    d_hidden: int = common.flag(256, "number of units in each hidden layer", low=1)
    num_epochs: int = common.flag(30, "number of passes over the training set", low=1)
    grad_clip: float = common.flag(
        100.0, "largest norm of a gradient; larger gradients are scaled down to it", above=0
    )


class VAE(nn.Module):
    """A VAE whose encoder f and decoder g are MLPs with one hidden ReLU layer, or linear:

        q(z|x) = N(mean(x), diag s(x)^2)
        p(z)   = N(0, I)
        p(x|z) = Bernoulli(sigmoid g(z))

    The first half of the outputs of f is mean(x), and the second half gives the standard deviation
    s(x).

    The argument f of the methods is a setting, not the encoder self.f. It is an instance of Flags
    whose scalars, such as f.beta, are 0-d tensors, except in __init__ and before_training.
    """

    def __init__(self, f):
        super().__init__()

        def network(d_in, d_out):
            if f.linear:
                return nn.Linear(d_in, d_out)
            return nn.Sequential(
                nn.Linear(d_in, f.d_hidden), nn.ReLU(), nn.Linear(f.d_hidden, d_out)
            )

        self.f = network(784, 2 * f.d_1)
        self.g = network(f.d_1, 784)

    def q_z(self, x, f):
        """q(z|x) of the shape (B, d_1), for images x (B, 784)."""
        mean, raw_std = self.f(x).chunk(2, dim=-1)
        return Normal(mean, common.std_head(raw_std, torch.ones_like(f.start_std), f.start_std))

    def p_z(self, f):
        """The prior p(z) of one unit, a scalar."""
        return Normal(torch.zeros_like(f.beta), torch.ones_like(f.beta))

    def forward(self, x, f, sample_shape=()):
        """The terms of the ELBO for binary x (B, 784), in nats. Their shapes are in report.py."""
        q_z = self.q_z(x, f)
        p_z = self.p_z(f)
        z = q_z.rsample(sample_shape)

        log_px_z = Bernoulli(logits=self.g(z)).log_prob(x).sum(-1)
        terms = {"log_px_z": log_px_z, "kl": kl_divergence(q_z, p_z)}

        # Only the evaluation needs the importance weights p(x, z) / q(z|x).
        if not self.training:
            terms["log_w"] = log_px_z + (p_z.log_prob(z) - q_z.log_prob(z)).sum(-1)
            terms["mean"] = q_z.mean
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO per example, -log p(x|z) + beta KL, in nats, (B,).

        The first --free_bits nats of each unit's mean KL cost nothing.
        """
        return -terms["log_px_z"] + f.beta * common.free_bits(terms["kl"], f.free_bits).sum(-1)

    # What the report measures and draws (see report.py).

    def residuals(self, x, f, draws):
        """Describe x minus its expected probabilities, as headroom.py needs it.

        The expectation over z is estimated twice, each time by the mean over `draws` draws.
        """
        z = self.q_z(x, f).sample((2, draws))
        residual = headroom.bernoulli_residual(x, self.g(z), encoder_input=(x,), beta=f.beta)
        return {"": residual}

    @staticmethod
    def before_training(f, data):
        """What the data alone say about the model whose units are all collapsed, {metric: number}.

        collapse_threshold: rho_1, the beta from which on this collapse is stable
        collapsed_loss: its loss in nats, where the decoder gives each pixel its mean
        collapsed_headroom: what d_1 units gain at least, in nats (Jaakkola & Jordan 2000)
        """
        covariance, mean = pixel_moments(data)
        bound = headroom.collapsed_curvature(mean.logit())
        ratios = theory.spectrum(headroom.whitened(covariance, bound))
        return {
            "collapse_threshold": collapsed_ratios(data)[0].item(),
            "collapsed_loss": Bernoulli(probs=mean).entropy().sum().item(),
            "collapsed_headroom": headroom.gain_of_ratios(ratios, f.d_1, f.beta),
        }

    def reconstructions(self, x, f):
        """Means of p(x|z), (B, 784), for a picture, at the mean of q(z|x)."""
        return {"test images": x, "reconstructed": self.g(self.q_z(x, f).mean).sigmoid()}

    def samples(self, n, f):
        """Means of p(x|z), (n, 784), at n draws from the prior, for a picture."""
        return self.g(self.p_z(f).sample((n, f.d_1))).sigmoid()


def pixel_moments(data):
    """The covariance (D, D) and the mean (D,) of the pixels that vary between training images."""
    mean = data.moment_with_one[-1, :-1]
    covariance = data.moment - mean[:, None] * mean
    varies = (mean > 0) & (mean < 1)
    return covariance[varies][:, varies], mean[varies]


def collapsed_ratios(data):
    """rho of the collapsed model in descending order: eigenvalues of the pixels' correlations."""
    covariance, mean = pixel_moments(data)
    return headroom.instability_ratios(covariance, headroom.mean_fisher("bernoulli", mean[None]))


def print_threshold(settings, data):
    """Print for each data set from which beta on collapse is stable.

    Where several processes train together, only the first one prints.
    """
    rank, _ = processes.rank_and_count()
    if rank > 0:
        return
    # Several settings may share one data set.
    distinct = {id(images): images for images in data}
    for images in distinct.values():
        betas = [f.beta for f, own_images in zip(settings, data) if own_images is images]
        rho = collapsed_ratios(images)
        counts = []
        # A beta that several settings share counts once.
        for beta in dict.fromkeys(betas):
            counts.append(f"{(rho > beta).sum()} at beta = {beta:g}")
        print(
            f"With every unit collapsed, rho_1 = {rho[0]:.2f}: collapse is stable from beta = "
            f"{rho[0]:.2f} on.\nThe number of directions that lead out of collapse is "
            f"{', '.join(counts)}.\nTraining may activate more or fewer units."
        )


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    data = datasets.load_binary_mnist(settings)
    print_threshold(settings, data)
    runs = training.fit(VAE, settings, data)
    return report.report(runs)


if __name__ == "__main__":
    common.run(main)
