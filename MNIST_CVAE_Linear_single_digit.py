"""Deep linear CVAE on one digit of MNIST: does theorem 2 say how many units each digit keeps?

    CUDA_VISIBLE_DEVICES=0 python MNIST_CVAE_Linear_single_digit.py --digit 0:9

Each map is two linear layers without an activation, and the std of q(z|x,y) depends on x and y. Neither gains anything
over theorem 2 of Dang et al. (2024, arXiv 2306.05023), whose optimal loss is a lower bound here: unit i collapses as soon
as beta eta_dec^2 reaches theta_i, the i-th eigenvalue of E = E[y y^T] - E[y x^T] E[x x^T]^+ E[x y^T] of this digit's
images. It is reached only if --d_hidden does not limit the rank of the map from x to y: 196 does not, 16 (published) does.
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
class Flags(common.LinearFlags):
    digit: int = common.flag(1, "the digit to train on", low=0, high=9)
    beta: float = common.scalar(1.0, "weight of KL(q(z|x,y) || p(z|x))", above=0)
    eta_enc: float = common.scalar(0.5, "std of the prior p(z|x)", above=0)
    eta_dec: float = common.scalar(0.5, "std of p(y|x,z)", above=0)
    start_std: float = common.scalar(1.0, "std of q(z|x,y) that training starts from, as a share of the prior's", low=0.01, high=10)
    dim_z: int = common.flag(16, "units of z", low=1)
    d_hidden: int = common.flag(196, "units between the two layers of a map", low=1)
    num_epochs: int = common.flag(300, "passes over the training set", low=1)


class CVAE(nn.Module):
    """x is the lower left quarter of the image (196 pixels), y the other three (588), f and g two linear layers each:

        q(z|x,y) = N(f_x x + f_y y, diag s(x, y)^2)     p(z|x)   = N(0, eta_enc^2 I)
                                                        p(y|x,z) = N(g_z z + g_x x, eta_dec^2 I)
    """

    def __init__(self, f):
        super().__init__()

        def two_layers(d_in, d_out):
            return nn.Sequential(nn.Linear(d_in, f.d_hidden, bias=False), nn.Linear(f.d_hidden, d_out, bias=False))

        self.f_x, self.f_y = two_layers(196, f.dim_z), two_layers(588, f.dim_z)
        self.g_x, self.g_z = two_layers(196, 588), two_layers(f.dim_z, 588)
        self.std = nn.Linear(784, f.dim_z)

    def q_z(self, x, y, f):
        return Normal(self.f_x(x) + self.f_y(y), common.std_head(self.std(torch.cat([x, y], dim=-1)), f.eta_enc, f.start_std))

    def p_z(self, f):
        return Normal(torch.zeros_like(f.eta_enc), f.eta_enc)

    def y_mean(self, x, z):
        return self.g_z(z) + self.g_x(x)

    def matrix_of(self, layers):
        return layers[1].weight @ layers[0].weight

    def forward(self, x, y, f, sample_shape=()):
        """x (B, 196), y (B, 588). Terms of the ELBO, in nats, the noise of z integrated out; shapes as report.py says."""
        q_z, p_z, G_z = self.q_z(x, y, f), self.p_z(f), self.matrix_of(self.g_z)
        rest = y - self.g_x(x)                                    # what G_z z is to explain
        # E||rest - G_z z||^2 = ||rest - G_z E[z]||^2 + sum_i sigma_i^2 ||G_z_i||^2
        of_noise = (q_z.stddev**2 * (G_z**2).sum(0)).sum(-1)
        terms = {"log_px_z": common.log_normal(rest, self.g_z(q_z.mean), f.eta_dec) - of_noise / (2 * f.eta_dec**2),
                 "kl": kl_divergence(q_z, p_z)}
        if not self.training:
            z = q_z.sample(sample_shape)                         # (S, B, dim_z)
            log_py_z = common.log_normal_linear(rest, G_z, z, f.eta_dec)
            terms["log_w"] = log_py_z + (p_z.log_prob(z) - q_z.log_prob(z)).sum(-1)
            terms["mean"] = q_z.mean / f.eta_enc
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO, -log p(y|x,z) + beta KL, in nats, (B,)."""
        return -terms["log_px_z"] + f.beta * terms["kl"].sum(-1)

    def unexplained(self, x, y, f, draws):
        """For headroom: what z is inferred from, and the mean of y expected over z; see report.py."""
        z = self.q_z(x, y, f).mean
        return {"": dict(reads=(x, y), mean=[(self.g_z[1], self.g_z[0](z)), (self.g_x[1], self.g_x[0](x))],
                         beta=f.beta, weight=1, std=f.eta_dec)}

    def exact_log_px(self, x, y, f):
        """log p(y|x), (B,): y|x ~ N(G_x x, eta_enc^2 G_z G_z^T + eta_dec^2 I)."""
        return common.log_normal_low_rank(y - self.g_x(x), f.eta_enc * self.matrix_of(self.g_z), f.eta_dec)

    @staticmethod
    def predicted(f, data):
        """Theorem 2: the units at the optimum, and the optimal loss."""
        E = theory.residual(data.moment, 196)
        return theory.cvae_optimum(theory.spectrum(E), f.dim_z, f.beta, f.eta_enc, f.eta_dec)

    def units(self, f, data):
        """The same quantities of this model, in float64; sigma is the root mean square over the training rows."""
        F = torch.cat([self.matrix_of(self.f_x), self.matrix_of(self.f_y)], dim=1)
        q_z = self.q_z(*(t.cpu().double() for t in data.train), f)
        sigma = (q_z.stddev**2).mean(0).sqrt()
        units = theory.vae_units(self.matrix_of(self.g_z), F @ theory.root(data.moment), sigma, f.eta_enc)
        return units | {"kl": kl_divergence(q_z, self.p_z(f)).mean(0)}

    def reconstructions(self, x, y, f):
        mean = self.q_z(x, y, f).mean
        return {"test images": datasets.whole_images(x, y),
                "y from x and z": datasets.whole_images(x, self.y_mean(x, mean)),
                "y from x alone (z = 0)": datasets.whole_images(x, self.y_mean(x, 0 * mean))}


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    data = datasets.load_mnist_quarters(settings)
    models = training.fit(CVAE, settings, data)
    return report.report(models, settings, data)


if __name__ == "__main__":
    common.run(main)
