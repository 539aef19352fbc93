r"""ReLU CVAE on synthetic data: do more units of z collapse if x and y are more correlated?

    CUDA_VISIBLE_DEVICES=0 python Synthetic_CVAE_Relu_correlation.py --corr_type Gaussian_noise_1_8
    python Synthetic_CVAE_Relu_correlation.py \
        --corr_type Identical,Gaussian_noise_1_2,Gaussian_noise_1_4,Gaussian_noise_1_8,Random

The data are y ~ N(0, I) and x = rho y + sqrt(1 - rho^2) noise. The flag --corr_type chooses rho.
The metrics are measured on fresh rows. Those that end in _train are measured on the training rows.

How it is trained: Adam minimises the negative beta-ELBO in batches of 16 rows for 1000 epochs, with
one draw of z per row. The learning rate is 1e-3 throughout. Each setting's gradient is clipped to a
norm of 0.01. The training step is the first function of training.py.

What the theory says: theorem 2 of Dang et al. (2024, arXiv 2306.05023) covers only the linear
CVAE. Let theta_i be the i-th largest eigenvalue of the matrix

    E = E[y y^T] - E[y x^T] E[x x^T]^+ E[x y^T]

Here E[...] is the mean over the training rows, and ^+ is the pseudoinverse. The matrix E is close
to (1 - rho^2) I. Unit i of a linear CVAE collapses if and only if

    theta_i <= beta eta_dec^2

where --released_objective halves beta. The script prints this prediction, computed from the same
rows, next to the trained nonlinear CVAE.
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

# The correlation rho of x and y for each value of --corr_type.
RHO = {
    "Identical": 1.0,
    "Gaussian_noise_1_2": 1 / 2,
    "Gaussian_noise_1_4": 1 / 4,
    "Gaussian_noise_1_8": 1 / 8,
    "Random": 0.0,
}


@dataclass
class Flags(common.RemedyFlags, common.FitFlags):
    corr_type: str = common.flag(
        "Identical",
        "correlation rho of x and y: 1 for Identical, 0 for Random, and the fraction in the name "
        "for the others",
        choices=tuple(RHO),
    )
    beta: float = common.scalar(1.0, "weight of KL(q(z|x,y) || p(z|x)) in the loss", low=0)
    eta_enc: float = common.scalar(1.0, "standard deviation of the prior p(z|x)", above=0)
    eta_dec: float = common.scalar(0.5, "standard deviation of the decoder p(y|x,z)", above=0)
    start_std: float = common.scalar(
        1.0,
        "initial standard deviation of the encoder q(z|x,y), divided by the prior's",
        low=0.01,
        high=10,
    )
    dim_x: int = common.flag(128, "number of columns of x, which must equal --dim_y", low=1)
    dim_y: int = common.flag(128, "number of columns of y", low=1)
    dim_z: int = common.flag(128, "number of units of z", low=1)
    d_hidden: int = common.flag(128, "number of units in each hidden layer", low=1)
    num_samples: int = common.flag(1000, "number of training examples, and of test examples", low=2)
    num_draws: int = common.flag(
        1000,
        "number of draws per example that estimate the log-likelihood; 0 skips it",
        low=0,
        evaluation=True,
    )
    batch_size: int = common.flag(16, "number of examples per training step", low=1)
    num_epochs: int = common.flag(1000, "number of passes over the training set", low=1)
    grad_clip: float = common.flag(
        0.01, "largest norm of a gradient; larger gradients are scaled down to it", above=0
    )
    released_objective: bool = common.flag(
        False, "count the reconstruction twice in the loss, as the authors' released code does"
    )


def reconstruction_weight(f):
    """The weight of -log p(y|x,z) in the loss: 1, or 2 with --released_objective."""
    return 2 if f.released_objective else 1


def correlated(settings):
    """The data of each setting, a list of `datasets.Data`. Settings with equal rows share them."""
    device = common.select_device(settings[0])
    distinct = {}
    data = []
    for f in settings:
        key = (f.corr_type, f.num_samples, f.dim_y, f.seed)
        if key not in distinct:
            distinct[key] = draw_data(f, device)
        data.append(distinct[key])
    return data


def draw_data(f, device):
    """Training rows and fresh rows of one setting. Each pair has x (n, dim_x) and y (n, dim_y)."""
    rho = RHO[f.corr_type]
    random = common.generator(f.seed, "data")

    def draw_rows():
        y, noise = torch.randn(2, f.num_samples, f.dim_y, generator=random).to(device)
        x = rho * y + (1 - rho**2) ** 0.5 * noise
        return x, y

    training_rows = draw_rows()
    fresh_rows = draw_rows()
    return datasets.Data("synthetic", training_rows, fresh_rows, also_train=True)


class CVAE(nn.Module):
    """A CVAE whose maps are MLPs with one ReLU layer:

        q(z|x,y) = N(f_x(x) + f_y(y), diag s(x, y)^2)
        p(z|x)   = N(0, eta_enc^2 I)
        p(y|x,z) = N(g_x(x) + g_z(z), eta_dec^2 I)

    The networks f_x and f_y have 2 dim_z outputs each. The second half of their sum gives s(x, y).

    The methods take the setting f as an argument, so that settings can be trained as a batch. It is
    an instance of Flags whose scalars, such as f.beta, are 0-d tensors, except in __init__ and
    linear_optimum.
    """

    def __init__(self, f):
        super().__init__()

        def mlp(d_in, d_out):
            return nn.Sequential(
                nn.Linear(d_in, f.d_hidden), nn.ReLU(), nn.Linear(f.d_hidden, d_out)
            )

        self.f_x = mlp(f.dim_x, 2 * f.dim_z)
        self.f_y = mlp(f.dim_y, 2 * f.dim_z)
        self.g_x = mlp(f.dim_x, f.dim_y)
        self.g_z = mlp(f.dim_z, f.dim_y)

    def q_z(self, x, y, f):
        """q(z|x,y) of the shape (B, dim_z), for B pairs of x (B, dim_x) and y (B, dim_y)."""
        mean, raw_std = (self.f_x(x) + self.f_y(y)).chunk(2, dim=-1)
        return Normal(mean, common.std_head(raw_std, f.eta_enc, f.start_std))

    def p_z(self, f):
        """The prior p(z|x) of one unit, a scalar."""
        return Normal(torch.zeros_like(f.eta_enc), f.eta_enc)

    def forward(self, x, y, f, sample_shape=()):
        """The terms of the ELBO for x (B, dim_x) and y (B, dim_y), in nats. See report.py.

        With r = y - g_x(x), the reconstruction term is log N(r; g_z(z), eta_dec^2 I).
        """
        q_z = self.q_z(x, y, f)
        p_z = self.p_z(f)
        z = q_z.rsample(sample_shape)

        r = y - self.g_x(x)
        log_py_z = common.log_normal_affine(r, self.g_z[-1], self.g_z[:-1](z), f.eta_dec)
        terms = {"log_px_z": log_py_z, "kl": kl_divergence(q_z, p_z)}

        # Only the evaluation needs the importance weights p(y, z|x) / q(z|x,y).
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

    # What the report measures, compares with the theory and draws (see report.py).

    def residuals(self, x, y, f, draws):
        """Describe y minus its expected reconstruction, as headroom.py needs it.

        The expectation over z is estimated twice, each time by the mean over `draws` draws.
        """
        z = self.q_z(x, y, f).sample((2, draws))
        residual = headroom.Residual(
            encoder_input=(x, y),
            mean_parts=[
                (self.g_x[-1], self.g_x[:-1](x)),
                (self.g_z[-1], self.g_z[:-1](z).mean(1)),
            ],
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
        E = theory.moment_given_x(data.moment, dim_x=f.dim_x)
        return theory.cvae_optimum(
            theta=theory.spectrum(E),
            dim_z=f.dim_z,
            # Counting the reconstruction twice has the same optimum as halving beta.
            beta=f.beta / reconstruction_weight(f),
            eta_enc=f.eta_enc,
            eta_dec=f.eta_dec,
        )


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    for f in settings:
        if f.dim_x != f.dim_y:
            wanted = f"--dim_y = {f.dim_y}: x is y with noise"
            common.stop(f, f"--dim_x: got {f.dim_x}, wants {wanted}")
    data = correlated(settings)
    runs = training.fit(CVAE, settings, data)
    return report.report(runs)


if __name__ == "__main__":
    common.run(main)
