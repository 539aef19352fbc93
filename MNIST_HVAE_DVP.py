"""DVP-VAE on MNIST: do pseudoinputs with a density of their own keep a deep hierarchy in use?

    CUDA_VISIBLE_DEVICES=0 python MNIST_HVAE_DVP.py
    CUDA_VISIBLE_DEVICES=0 python MNIST_HVAE_DVP.py --context dct,downsample,linear
    python MNIST_HVAE_DVP.py --prior diffusion,vamp --preset small
    torchrun --nproc_per_node=4 MNIST_HVAE_DVP.py --dataset omniglot --autocast bf16

DVP stands for diffusion-based VampPrior. The ELBO of a VAE is largest if its prior is the average
of the posteriors over all images. A VampPrior approximates this average by the posteriors at a few
images u, called pseudoinputs (Tomczak & Welling 2018, arXiv 1705.07120). In the DVP-VAE (Kuzina &
Tomczak 2024, arXiv 2412.01373) each image x has a pseudoinput u = f(x), a small picture of x. The
map f is not trained, so that u cannot collapse. The prior of every level of latents reads u. The
density of u is a diffusion model, trained together with the other networks. The rest is the model
of MNIST_HVAE_Ladder.py.

With `--prior vamp` the model is that ladder VAE under a VampPrior, whose pseudoinputs are trained.

How it is trained: Adamax minimises the negative beta-ELBO in batches of 250 images for 300 epochs,
with one draw of the latents and one time of the diffusion model per image. The learning rate rises
to 0.01 in two epochs and then falls to 1e-5 as a cosine. The weight decay is 1e-6, and gradients
are clipped to a norm of 5. An exponential average of the weights (0.999) is evaluated. `train`
below makes the steps. The loop around them is `training.Training`, which also writes checkpoints.
"""
import math
from dataclasses import dataclass

import common
import torch
from torch import nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Independent,
    MixtureSameFamily,
    Normal,
    kl_divergence,
)
from torch.nn import functional as F

import datasets
import deep
import processes
import report
import theory
import training


@dataclass
class Flags(deep.HierarchyFlags):
    # The flags of --preset small. With them, two CPU cores train a model in minutes. The defaults
    # below are the published setting, for a GPU.
    small = (
        "--latents 2,2 --num_ch 16 --diffusion_ch 6 --batch_size 100 --num_epochs 12 "
        "--warmup_epochs 0.5 --ema 0.99 --num_samples 100 --num_test 1000"
    )

    prior: str = common.flag(
        "diffusion",
        "prior of the top level: diffusion gives the DVP-VAE, vamp a VampPrior whose pseudoinputs "
        "are trained",
        choices=("diffusion", "vamp"),
    )
    pseudoinputs: int = common.flag(
        500, "number of pseudoinputs of --prior vamp", low=1, high=100_000
    )
    context: str = common.flag(
        "dct",
        "map from x to its pseudoinput: dct takes low frequencies, downsample takes means over "
        "squares, linear takes the principal components of the training images",
        choices=("dct", "downsample", "linear"),
    )
    context_size: int = common.flag(
        7, "height and width of a pseudoinput, in pixels or coefficients", low=1, high=28
    )
    num_steps: int = common.flag(
        25,
        "number of steps of the diffusion model for each sample",
        low=1,
        high=10_000,
        evaluation=True,
    )
    diffusion_ch: int = common.flag(
        16, "channels of the diffusion model's network", low=1, high=4096
    )
    latents: str = common.flag(
        "4,4",
        "number of latent maps at each scale, the coarsest scale first; the finest scale has half "
        "the side of the image, or the whole side with cifar10 and where the side is odd; for "
        "images of 28x28, 4,4 means 4 maps of 7x7 and 4 of 14x14",
    )
    d_z: int = common.flag(
        0, "channels of each latent map; 0 stands for 1, and for 3 with cifar10", low=0, high=4096
    )
    num_ch: int = common.flag(32, "channels of the encoder and the decoder", low=1, high=4096)
    d_hidden: int = common.flag(
        0, "channels inside a block; 0 stands for the value of --num_ch", low=0, high=4096
    )
    linear_path: bool = common.flag(
        True, "add a 1x1 convolution beside the block of each prior and posterior"
    )
    preset: str = common.flag(
        "published",
        f"published keeps the defaults; small stands for {small}",
        choices=("published", "small"),
    )
    evaluate: str = common.flag(
        "", "further measurements after training: compression, attack, or both joined by a comma"
    )


class Bottleneck(nn.Sequential):
    """Four convolutions, 1x1, 3x3, 3x3 and 1x1, with SiLU between them.

    They map (B, c_in, H, W) to (B, c_out, H, W), with `hidden` channels in between. The initial
    weights of the last convolution are multiplied by `start`.
    """

    def __init__(self, c_in, c_out, hidden, start=1.0):
        super().__init__(
            nn.Conv2d(c_in, hidden, 1),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.SiLU(),
            deep.scaled(nn.Conv2d(hidden, c_out, 1), start),
        )


class Head(nn.Module):
    """The parameters of a distribution, (B, c_out, H, W), from a state (B, c_in, H, W).

    They are the output of a bottleneck that starts at 0, plus a 1x1 convolution if --linear_path.
    """

    def __init__(self, f, c_in, c_out):
        super().__init__()
        self.block = Bottleneck(c_in, c_out, f.d_hidden or f.num_ch, start=0)
        self.linear = nn.Conv2d(c_in, c_out, 1) if f.linear_path else None

    def forward(self, s):
        if self.linear is None:
            return self.block(s)
        return self.block(s) + self.linear(s)


class Encoder(nn.Module):
    """The feature e of each scale, {side: (B, c, side, side)}, from images x (B, c_x, H, W).

    The scales go from the finest possible one down to the coarsest that has latents. Each has three
    residual blocks, then the mean over squares leads to the scale's side.
    """

    def __init__(self, f, sides):
        super().__init__()
        c = f.num_ch
        self.sides = [deep.finest_side(f)]
        while self.sides[-1] > min(sides):
            self.sides.append(self.sides[-1] // 2)

        self.x_to_e = nn.Conv2d(deep.image_shape(f)[0], c, 1)
        self.scales = nn.ModuleList()
        for _ in self.sides:
            blocks = [Bottleneck(c, c, f.d_hidden or c) for _ in range(3)]
            self.scales.append(nn.ModuleList(blocks))

    def forward(self, x):
        e = self.x_to_e(x)
        features = {}
        for side, blocks in zip(self.sides, self.scales):
            for block in blocks:
                e = e + block(F.silu(e))
            e = F.avg_pool2d(e, e.shape[-1] // side)
            features[side] = e
        return features


class Latent(nn.Module):
    """One level: p(z_l|z_>l), q(z_l|z_>l, x), and how z_l changes the state s.

    z_l is (B, c_z, side, side), s is (B, c, side, side). The prior reads `c_prior` channels. L is
    the number of levels. Level 1 leaves no state behind, since nothing would read it.
    """

    def __init__(self, f, side, c_z, c_prior, L, level):
        super().__init__()
        c = f.num_ch
        self.side = side
        # The prior's head gives mean, log-variance and h.
        self.parts = [c_z, c_z, c if level > 1 else 0]
        self.s_to_p = Head(f, c_prior, sum(self.parts))
        self.s_to_q = Head(f, c, 2 * c_z)
        if level > 1:
            self.z_to_s = deep.scaled(nn.Conv2d(c_z, c, 1), L**-0.5)
            self.s_to_s = Bottleneck(c, c, f.d_hidden or c, start=L**-0.5)

    def p(self, s):
        """p(z_l|z_>l), and h, the prior's own update of the state."""
        mean, log_var, h = self.s_to_p(s).to(s.dtype).split(self.parts, dim=1)
        return normal(mean, log_var), h

    def q(self, s, e):
        """q(z_l|z_>l, x), where e is the encoder's feature of this scale."""
        mean, log_var = self.s_to_q((e + s) / math.sqrt(2)).to(s.dtype).chunk(2, dim=1)
        return normal(mean, log_var)

    def update(self, s, h, z):
        """The state that the next level reads."""
        s = s + h + self.z_to_s(z)
        return s + self.s_to_s(s)


def normal(mean, log_var):
    """N(mean, exp(log_var)), where the log-variance is clamped to [-10, 1]."""
    return Normal(mean, (log_var.clamp(-10, 1) / 2).exp())


class Context(nn.Module):
    """The map from images x (B, c_x, H, H) in [0, 1] to their pseudoinputs u (B, c_x, k, k).

    It is fixed in training. For each channel, with a matrix A (k^2, H^2),

        u = (A x - centre) / extent
        the image of u = A^+ (centre + extent u)

    --context chooses A. dct: the k x k lowest frequencies of the orthonormal discrete cosine
    transform. downsample: the means over a grid of k x k squares. linear: the first k^2 principal
    components of the training images, not centred. No other linear map to k^2 numbers keeps more of
    the images.

    u is in [-1, 1] for the training images, since `extent` is the largest magnitude of each number
    of A x (1/2 for downsample). It can be a little beyond for their binary draws.

    Elsewhere in this file the map is written f(x). The argument f of a method is the setting.
    """

    def __init__(self, f):
        super().__init__()
        c_x, side, _ = deep.image_shape(f)
        k = f.context_size
        self.kind = f.context
        self.k = k
        self.side = side
        self.centre = 0.5 if f.context == "downsample" else 0.0

        # 1. The map along one axis, (k, H).
        if f.context == "dct":
            frequency = torch.arange(k)[:, None]
            pixel = torch.arange(side, dtype=torch.float64)
            scale = torch.where(frequency > 0, math.sqrt(2 / side), math.sqrt(1 / side))
            one_axis = scale * (math.pi / side * frequency * (pixel + 0.5)).cos()
        else:
            one_axis = F.adaptive_avg_pool1d(torch.eye(side, dtype=torch.float64), k).T

        # 2. The map along both axes. With --context linear `fit` replaces it.
        A = torch.kron(one_axis, one_axis)
        self.register_buffer("A", A.float())
        self.register_buffer("A_inverse", torch.linalg.pinv(A).float())

        # 3. What `fit` measures: the extent, and the moments of the training images' u.
        self.register_buffer("extent", torch.full((c_x, k**2), 0.5))
        self.register_buffer("mean", torch.zeros(c_x, k, k))
        self.register_buffer("std", torch.ones(c_x, k, k))
        self.register_buffer("covariance", torch.eye(c_x * k**2))

    def fit(self, images):
        """Measure on training images (n, c_x, H, H) in [0, 1] what the map depends on.

        The mean, the covariance and the std of their u are measured, too. The std is at least that
        of p(u|z_0), the last step of the class Diffusion: the density r(u) is never narrower.
        """
        if self.kind == "linear":
            pixels = images.flatten(0, 1).flatten(1)
            _, directions = theory.modes(theory.second_moment(pixels))
            self.A.copy_(directions[:, : self.k**2].T)
            self.A_inverse.copy_(directions[:, : self.k**2])
        if self.kind != "downsample":
            coefficients = images.flatten(2) @ self.A.T
            self.extent.copy_(coefficients.abs().amax(0).clamp(min=1e-3))

        u = self(images)
        self.mean.copy_(u.mean(0))
        self.covariance.copy_(torch.cov(u.flatten(1).T.double()))
        self.std.copy_(u.std(0).clamp(min=math.exp(Diffusion.GAMMA_0 / 2)))

    def log_gaussian(self, u):
        """The log-density in nats, (B,), of u (B, c_x, k, k) under a Gaussian in place of r(u).

        The Gaussian has the mean of the training images' u. Its covariance is theirs plus the
        variance of p(u|z_0). A diffusion model is useful if its log r(u) exceeds this one.
        """
        variances, axes = torch.linalg.eigh(self.covariance.double())
        variances = variances.clamp(min=0) + math.exp(Diffusion.GAMMA_0)
        coordinates = (u - self.mean).flatten(1).double() @ axes
        log_terms = coordinates**2 / variances + (2 * math.pi * variances).log()
        return -(log_terms.sum(1) / 2).to(u.dtype)

    def forward(self, x):
        """f(x), (B, c_x, k, k), of x (B, c_x, H, H)."""
        with torch.autocast(x.device.type, enabled=False):
            u = (x.flatten(2) @ self.A.T - self.centre) / self.extent
            return u.unflatten(2, (self.k, self.k))

    def image(self, u):
        """The image (B, c_x, H, H) of u (B, c_x, k, k)."""
        with torch.autocast(u.device.type, enabled=False):
            x = (self.centre + self.extent * u.flatten(2)) @ self.A_inverse.T
            return x.unflatten(2, (self.side, self.side))


class UNet(nn.Module):
    """A network from h (N, c_in, k, k) and times t (N,) in [0, 1] to (N, c_out, k, k).

    All its blocks work on one scale. A block on the way out also reads the output of the block
    opposite to it on the way in. Attention lies between both ways. The output starts at 0.
    """

    def __init__(self, c_in, c_out, c, blocks):
        super().__init__()
        half = max(1, c // 2)
        frequencies = 1000 * 10 ** (-4 * torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Sequential(
            nn.Linear(2 * half, 4 * c), nn.SiLU(), nn.Linear(4 * c, 4 * c), nn.SiLU()
        )
        self.first = nn.Conv2d(c_in, c, 3, padding=1)
        self.way_in = nn.ModuleList([UNetBlock(c) for _ in range(blocks)])
        self.middle = nn.ModuleList([UNetBlock(c) for _ in range(2)])
        self.way_out = nn.ModuleList([UNetBlock(c) for _ in range(blocks)])
        self.attention = Attention(c)
        self.last = nn.Sequential(
            group_norm(c), nn.SiLU(), deep.scaled(nn.Conv2d(c, c_out, 3, padding=1), 0)
        )

    def forward(self, h, t):
        angles = t[:, None] * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))

        h = self.first(h)
        skips = []
        for block in self.way_in:
            h = block(h, time)
            skips.append(h)

        h = self.middle[0](h, time)
        h = self.attention(h)
        h = self.middle[1](h, time)

        for block in self.way_out:
            h = block(h + skips.pop(), time)
        return self.last(h)


class UNetBlock(nn.Module):
    """h (N, c, k, k) plus two 3x3 convolutions of it, each after a group norm and SiLU.

    The embedding of the time, (N, 4 c), scales and shifts the input of the second convolution,
    which starts at 0.
    """

    def __init__(self, c):
        super().__init__()
        self.norm_1 = group_norm(c)
        self.conv_1 = nn.Conv2d(c, c, 3, padding=1)
        self.norm_2 = group_norm(c)
        self.conv_2 = deep.scaled(nn.Conv2d(c, c, 3, padding=1), 0)
        self.time = nn.Linear(4 * c, 2 * c)

    def forward(self, h, time):
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        inner = self.conv_1(F.silu(self.norm_1(h)))
        inner = F.silu(self.norm_2(inner) * (1 + scale) + shift)
        if self.training:
            # Dropout with probability 0.1. Several processes each draw their own rows of its noise.
            inner = inner * (processes.uniform_like(inner.float()) >= 0.1) / 0.9
        return h + self.conv_2(inner)


class Attention(nn.Module):
    """h (N, c, k, k) plus scaled dot-product attention between all its k k places.

    It has two heads, or one if c is odd, and starts at 0.
    """

    def __init__(self, c):
        super().__init__()
        self.heads = math.gcd(2, c)
        self.norm = group_norm(c)
        self.to_qkv = nn.Conv2d(c, 3 * c, 1)
        self.to_h = deep.scaled(nn.Conv2d(c, c, 1), 0)

    def forward(self, h):
        qkv = self.to_qkv(self.norm(h)).flatten(2)
        q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)  # (N, heads, c / heads, k k)
        weights = (q.transpose(-1, -2) @ k / math.sqrt(q.shape[-2])).softmax(-1)
        return h + self.to_h((v @ weights.transpose(-1, -2)).reshape(h.shape))


def group_norm(c):
    """A group norm of c channels in eight groups, or in fewer where c is no multiple of eight."""
    return nn.GroupNorm(math.gcd(8, c), c)


# The evaluation gives at most this number of rows to the diffusion model's network at a time. This
# limits its memory.
ROWS_AT_ONCE = 2**14


class Diffusion(nn.Module):
    """The density r(u) of pseudoinputs u (N, c_u, k, k).

    It is a variational diffusion model (Kingma et al. 2021, arXiv 2107.00630). z_t is u with noise,
    where t = 0 is almost u and t = 1 is almost pure noise. In this class alpha, sigma, gamma and
    eps belong to the diffusion model, and T is its number of steps in sampling:

        q(z_t|u) = N(alpha_t u, sigma_t^2 I),   t in [0, 1]
        alpha_t^2 = sigmoid(-gamma(t)),   sigma_t^2 = sigmoid(gamma(t)),   gamma linear in t
        p(z_1) = N(0, I)
        p(z_s|z_t) = q(z_s|z_t, u) at u = (z_t - sigma_t eps^) / alpha_t,   s = t - 1/T
        p(u|z_0) = N(z_0 / alpha_0, sigma_0^2 / alpha_0^2 I)

    Let eps be the noise in z_t = alpha_t u + sigma_t eps. Its prediction is

        eps^(z_t, t) = sigma_t z_t + UNet(z_t, t)

    which starts at sigma_t z_t, the optimum if u ~ N(0, I). As T goes to infinity, the bound is

        -log r(u) <= KL(q(z_1|u) || p(z_1)) + E[-log p(u|z_0)]
                     + (gamma(1) - gamma(0)) / 2 E_{t, eps} |eps - eps^(z_t, t)|^2

    A sample takes T steps, each from a time t to s = t - 1/T. In a step u stays at its prediction,
    and the noise eps_t becomes

        eps_s = rho eps_t + sqrt(1 - rho^2) xi,   rho = exp((gamma(s) - gamma(t)) / 2)

    where xi is standard normal.
    """

    # gamma(0) and gamma(1).
    GAMMA_0 = -6.0
    GAMMA_1 = 7.0
    # Blocks of the network on each way.
    BLOCKS = 2

    def __init__(self, c_u, c):
        super().__init__()
        self.network = UNet(c_u, c_u, c, self.BLOCKS)

    def alpha_sigma(self, t):
        """alpha_t and sigma_t, like t."""
        gamma = self.GAMMA_0 + (self.GAMMA_1 - self.GAMMA_0) * t
        return gamma.neg().sigmoid().sqrt(), gamma.sigmoid().sqrt()

    def epsilon(self, z, t):
        """The predicted noise eps^(z_t, t), like z (N, c_u, k, k), at times t (N, 1, 1, 1)."""
        _, sigma = self.alpha_sigma(t)
        return sigma * z + self.network(z, t.flatten()).to(z.dtype)

    def ends(self, u):
        """KL(q(z_1|u) || p(z_1)) + E_q[-log p(u|z_0)] in nats per coefficient, like u."""
        alpha, sigma = self.alpha_sigma(time_of_rows(u, 1.0))
        kl = (alpha**2 * u**2 + sigma**2 - 1 - 2 * sigma.log()) / 2
        # The second term is the entropy of p(u|z_0), whose variance is exp(gamma(0)).
        return kl + (math.log(2 * math.pi * math.e) + self.GAMMA_0) / 2

    def loss(self, u, t=None):
        """The bound on -log r(u) in nats per coefficient, like u.

        The expectation over t and eps is estimated by one draw for each row. The times
        (N, 1, 1, 1) may be given.
        """
        if t is None:
            t = processes.uniform_like(u[:, :1, :1, :1])
        noise = processes.normal_like(u)
        alpha, sigma = self.alpha_sigma(t)
        error = noise - self.epsilon(alpha * u + sigma * noise, t)
        return self.ends(u) + (self.GAMMA_1 - self.GAMMA_0) / 2 * error**2

    def bound(self, u, pairs=1000):
        """The mean of `loss` over `pairs` pairs of time and noise, and its standard error.

        The times are stratified: [0, 1] has one part for each pair, and the pair's time is random
        within it. The mean is in nats per coefficient, like u. The standard error (N,) is that of
        the mean's sum over the coefficients. It ignores the stratification, so it is too large
        rather than too small.
        """
        at_once = max(1, ROWS_AT_ONCE // len(u))
        total = 0
        squares = 0
        for first in range(0, pairs, at_once):
            # 1. One random time within each of these parts.
            part = torch.arange(first, min(first + at_once, pairs), device=u.device)
            like = u[:, :1, :1, :1].expand(len(part), -1, -1, -1, -1)
            t = (part.view(-1, 1, 1, 1, 1) + processes.uniform_like(like)) / pairs

            # 2. The loss at each time, (len(part), N, c_u, k, k).
            losses = self.loss(u.repeat(len(part), 1, 1, 1), t.flatten(0, 1))
            losses = losses.unflatten(0, (len(part), len(u)))
            total = total + losses.sum(0)
            squares = squares + losses.flatten(2).sum(2).square().sum(0)

        mean = total / pairs
        variance = squares / pairs - mean.flatten(1).sum(1) ** 2
        return mean, (variance.clamp(min=0) / pairs).sqrt()

    def sample(self, like, T):
        """Draws of u in the shape of `like`, by T steps from z_1 to z_0.

        The names of time t have no suffix. Those of the next time s end in _s.
        """
        rho = math.exp((self.GAMMA_0 - self.GAMMA_1) / 2 / T)
        z = processes.normal_like(like)
        for i in range(T, 0, -1):
            t = time_of_rows(z, i / T)
            s = time_of_rows(z, (i - 1) / T)
            alpha, sigma = self.alpha_sigma(t)
            alpha_s, sigma_s = self.alpha_sigma(s)
            noise = self.epsilon(z, t)
            u = (z - sigma * noise) / alpha
            noise_s = rho * noise + math.sqrt(1 - rho**2) * processes.normal_like(z)
            z = alpha_s * u + sigma_s * noise_s

        alpha_0, sigma_0 = self.alpha_sigma(time_of_rows(z, 0.0))
        return (z + sigma_0 * processes.normal_like(z)) / alpha_0


def time_of_rows(u, t):
    """The time t for each row of u, (N, 1, 1, 1)."""
    return torch.full_like(u[:, :1, :1, :1], t)


class DVPVAE(nn.Module):
    """A ladder VAE whose priors read a pseudoinput u. u counts as level L + 1:

        p(x, z, u) = p(x|z_1..z_L) prod_l p(z_l|z_>l, u) r(u)
        q(z, u|x)  = q(u|x) prod_l q(z_l|z_>l, u, x),   q(u|x) = N(f(x), diag exp v)

    Level 1 is next to the image, level L is the top learned level, and z_>l are the latents above
    level l. f(x) is the map of Context, and r(u) is a Diffusion. The log-variances v are learned,
    one for each number of u, within [-12, -5]. p and q go from the top down and share a state s,
    which starts as ones:

        p(z_l|z_>l, u), h = prior block([s, image of u])
        q(z_l|z_>l, u, x) = posterior block((e + s) / sqrt 2)
        s <- block(s + h + conv z_l)

    The image of u is pooled to the side of level l. e is the encoder's feature of that side. All
    latents together give the pixels:

        p(x|z) = Bernoulli(conv silu conv sum_l upsample(z_l) / sqrt L)

    For cifar10, LogisticMixture takes the place of Bernoulli.
    """

    elbo_draws = 1
    headroom_rows = deep.HEADROOM_ROWS

    def __init__(self, f):
        super().__init__()
        # 1. Sizes.
        self.c_x, self.side, _ = deep.image_shape(f)
        c_x = self.c_x
        c = f.num_ch
        c_z = f.d_z or c_x
        c_out = c_x
        k = f.context_size
        sides = deep.latent_sides(f)
        L = len(sides)
        self.learned_levels = L
        self.levels = L + 1
        self.widest_layer = c * self.side**2
        self.dimensions = 0
        if f.dataset == "cifar10":
            self.dimensions = c_x * self.side**2
            c_out = deep.LogisticMixture.K * deep.LogisticMixture.n(c_x)

        # 2. The pseudoinput: f(x), r(u), and v before its sigmoid.
        self.context = Context(f)
        self.r = Diffusion(c_x, f.diffusion_ch)
        self.raw_v = nn.Parameter(torch.zeros(c_x, k, k))

        # 3. Encoder, latents and decoder.
        self.encoder = Encoder(f, sides)
        s_start = torch.ones(1, c, sides[0], sides[0])
        self.register_buffer("s_start", s_start, persistent=False)
        self.latents = nn.ModuleList()
        for l, side in zip(range(L, 0, -1), sides):
            self.latents.append(Latent(f, side=side, c_z=c_z, c_prior=c + c_x, L=L, level=l))
        self.z_to_x = nn.Sequential(
            nn.Conv2d(c_z, c, 1), nn.SiLU(), nn.Conv2d(c, c_out, 3, padding=1)
        )

    def q_u(self, x):
        """q(u|x), (B, c_x, k, k)."""
        v = -12 + 7 * self.raw_v.sigmoid()
        return Normal(self.context(x), (v / 2).exp())

    def top_down(self, u, features, choose):
        """Yield p(z_l|z_>l, u), q(z_l|z_>l, u, x) and z_l for l = L, ..., 1.

        Each is (n, c_z, side, side), u is (n, c_x, k, k). z_l is choose(l, p, q), such as a draw of
        q. features are the result of the encoder. If they are None, q is None.
        """
        s = self.s_start.expand(len(u), -1, -1, -1)
        image = self.context.image(u)
        for l, latent in zip(range(self.learned_levels, 0, -1), self.latents):
            s = F.interpolate(s, size=latent.side)
            pooled = F.avg_pool2d(image, self.side // latent.side)
            p, h = latent.p(torch.cat([s, pooled], dim=1))
            q = latent.q(s, features[latent.side]) if features else None
            z = choose(l, p, q)
            yield p, q, z
            if l > 1:
                s = latent.update(s, h, z)

    def p_x(self, zs, shape=(-1,)):
        """p(x|z) of all latents, a list of (n, c_z, side, side).

        Its pixels are (*shape, c_x, H, W), where n is the product of shape.
        """
        total = 0
        for z in zs:
            total = total + F.interpolate(z, size=self.side, mode="bilinear")
        total = total / math.sqrt(self.learned_levels)
        out = self.z_to_x(total).to(total.dtype).unflatten(0, shape)
        if self.dimensions:
            return deep.LogisticMixture(out, self.c_x)
        return Bernoulli(logits=out)

    def context_arguments(self, x, f):
        """Arguments of `forward` that all draws of z share: one draw of u, and terms of its KL.

        log p(x) is reported as the lower bound E_{q(u|x)}[log p(x|u)] - KL(q(u|x) || r(u)). Only
        log p(x|u) is estimated by importance weights. One draw of u is enough, since q(u|x) is
        narrow.

        kl_u (B, d) is the KL in nats, by the diffusion model's bound. error (B,) is the standard
        error of the sum of kl_u. gaussian (B,) is the KL if r(u) were Gaussian.
        """
        q_u = self.q_u(x)
        u = deep.draw(q_u)
        bound, error = self.r.bound(u)
        entropy = q_u.entropy()
        return {
            "u": u,
            "kl_u": (bound - entropy).flatten(1),
            "error": error,
            "gaussian": -self.context.log_gaussian(u) - entropy.flatten(1).sum(1),
        }

    def forward(self, x, f, sample_shape=(), u=None, kl_u=None, error=None, gaussian=None):
        """The terms of the ELBO for x (B, c_x, H, W), in nats. Shapes are in report.py.

        The KL of u is the diffusion model's bound on it, which can be negative at one draw.
        u, kl_u, error and gaussian come from `context_arguments`. With them log_w is the weight of
        p(x|u) alone.
        """
        shape = (*sample_shape, len(x))

        # 1. A draw of u, or the one that is given.
        if u is None:
            drawn_u, kl_top = self.draw_u(x, sample_shape)
        else:
            drawn_u = deep.repeat_examples(u, sample_shape)
            kl_top = kl_u

        # 2. The reconstruction, and the KL of each level.
        drawn = self.draw_posterior(drawn_u, x, sample_shape)
        zs = [z for p, q, z in drawn]
        log_px_z = self.p_x(zs, shape).log_prob(x).flatten(len(shape)).sum(-1)
        terms = {"log_px_z": log_px_z}
        for l, (p, q, z) in enumerate(drawn, start=1):
            terms[f"kl_{l}"] = deep.per_unit(kl_divergence(q, p), shape)
        terms[f"kl_{self.levels}"] = kl_top

        # 3. What only the evaluation needs.
        if not self.training:
            terms.update(self.evaluation_terms(x, drawn, log_px_z, shape))
            if u is not None:
                terms["log_w_u"] = -kl_u.sum(-1)
                terms["error_context"] = error
                terms["context_baseline"] = gaussian
        return terms

    def draw_posterior(self, u, x, sample_shape):
        """A draw of all latents from q(z|u, x), level 1 first: a list of (p, q, z).

        u is (n, c_x, k, k), where n is the number of draws of all examples together.
        """
        features = {}
        for side, e in self.encoder(x).items():
            features[side] = deep.repeat_examples(e, sample_shape)
        drawn = list(self.top_down(u, features, lambda l, p, q: deep.draw(q)))
        drawn.reverse()
        return drawn

    def draw_u(self, x, sample_shape):
        """A draw of q(u|x), (n, c_x, k, k), and the bound on its KL, (*sample_shape, B, d)."""
        q_u = self.q_u(x)
        mean = deep.repeat_examples(q_u.mean, sample_shape)
        std = deep.repeat_examples(q_u.stddev, sample_shape)
        q_u = Normal(mean, std)
        u = deep.draw(q_u)
        kl = self.r.loss(u) - q_u.entropy()
        return u, deep.per_unit(kl, (*sample_shape, len(x)))

    def evaluation_terms(self, x, drawn, log_px_z, shape):
        """The importance weight, and the mean of each level in standard deviations of its prior.

        drawn is the list of (p, q, z), level 1 first.
        """
        log_ratio = 0
        for p, q, z in drawn:
            log_ratio = log_ratio + deep.per_unit(p.log_prob(z) - q.log_prob(z), shape).sum(-1)
        terms = {"log_w": log_px_z + log_ratio}
        for l, (p, q, z) in enumerate(drawn, start=1):
            terms[f"mean_{l}"] = deep.per_unit((q.mean - p.mean) / p.stddev, shape)
        mean_u = (self.context(x) - self.context.mean) / self.context.std
        terms[f"mean_{self.levels}"] = mean_u.flatten(1)
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO per image, -log p(x|z) + beta sum_l KL_l, in nats, (B,).

        The first --free_bits nats of each learned unit's KL cost nothing. The units of u have no
        free bits, since the map to u is not learned.
        """
        *learned, context = common.levels(terms)
        context_kl = terms[f"kl{context}"].sum(-1)
        learned_kl = 0
        for level in learned:
            learned_kl = learned_kl + common.free_bits(terms[f"kl{level}"], f.free_bits).sum(-1)
        return -terms["log_px_z"] + f.beta * (context_kl + learned_kl)

    # What the report measures (see report.py).

    def residuals(self, x, f, draws):
        """Describe binary pixels minus their expected probabilities, as headroom.py needs it.

        See deep.level_residuals. Each of the two estimates has one draw of u and the latents.
        """
        # headroom.py has no theory for the mixture of logistics of cifar10.
        if self.dimensions:
            return {}
        x = common.binarise(x)
        u = deep.draw(self.q_u(deep.repeat_examples(x, (2,))))
        zs = [z for p, q, z in self.draw_posterior(u, x, (2,))]
        return deep.level_residuals(self, x, self.p_x(zs, (2, len(x))).logits, f)

    # What the pictures and the measurements of --evaluate use.

    def top_posterior(self, x, f, levels):
        """q(z_l|z_>l, u, x) of the top learned levels, u and every latent above at its mean.

        A list of Normals, differentiable in x (B, c_x, H, W).
        """
        posteriors = []
        latents = self.top_down(self.context(x), self.encoder(x), lambda l, p, q: q.mean)
        for p, q, z in latents:
            posteriors.append(q)
            if len(posteriors) == levels:
                break
        return posteriors

    def reconstruct(self, x, f, keep, below=lambda p: p.mean):
        """Means of p(x|z), (B, c_x, H, W).

        The top `keep` levels, the first of which is u, are the means of q. The levels below are
        below(p), the means of p by default. With keep = 0, u is the mean over the training set.
        """
        u = self.context(x) if keep else self.context.mean.expand(len(x), -1, -1, -1)

        def choose(l, p, q):
            return q.mean if l > self.levels - keep else below(p)

        latents = self.top_down(u, self.encoder(x), choose)
        return self.p_x([z for p, q, z in latents]).mean

    def reconstructions(self, x, f):
        """{title: images}: x, pseudoinputs, then reconstructions with more and more levels drawn.

        First the lowest third of the learned levels is drawn from the prior, then two thirds, and
        at last all of them.
        """
        L = self.learned_levels
        panels = {
            "test images": x,
            "pseudoinputs of the test images": self.context.image(self.context(x)),
            "reconstructed through all levels": self.reconstruct(x, f, self.levels),
        }
        # The number of levels that are drawn. With fewer than three levels, some are equal.
        counts = {math.ceil(L * thirds / 3) for thirds in (1, 2, 3)}
        for l in sorted(counts):
            panels[deep.drawn_levels(l)] = self.reconstruct(x, f, self.levels - l, deep.draw)
        return panels

    def samples(self, n, f):
        """{title: images}: n draws of u from r(u), and the mean of p(x|z) for each.

        The latents z are drawn from their priors given u, too.
        """
        u = self.r.sample(self.context.mean.expand(n, -1, -1, -1), f.num_steps)
        latents = self.top_down(u, None, lambda l, p, q: deep.draw(p, f.temperature))
        images = self.p_x([z for p, q, z in latents]).mean
        return {
            "pseudoinputs drawn from their prior": self.context.image(u),
            "images decoded from these pseudoinputs": images,
        }


class VampPrior(MixtureSameFamily):
    """p(z) = 1/K sum_k N(mean_k, std_k^2), a mixture for z (n, c_z, side, side).

    mean and std are (K, c_z, side, side). `each` is one Normal of that shape, which holds the K
    components.
    """

    def __init__(self, mean, std):
        equal_weights = Categorical(logits=torch.zeros_like(mean[:, 0, 0, 0]))
        super().__init__(equal_weights, Independent(Normal(mean, std), 3))
        self.each = self.component_distribution.base_dist

    def draw(self, n, temperature):
        """n draws (n, c_z, side, side), the std of each Normal multiplied by the temperature."""
        # A random component for each draw.
        uniform = processes.uniform_like(self.each.mean[:1, 0, 0, 0].expand(n))
        k = (uniform * len(self.each.mean)).long()
        return deep.draw(Normal(self.each.mean[k], self.each.stddev[k]), temperature)


class VampLadder(nn.Module):
    """The ladder VAE of MNIST_HVAE_Ladder.py under a VampPrior (Tomczak & Welling 2018):

        p(x, z) = p(x|z_1..z_L) p(z_L) prod_{l < L} p(z_l|z_>l)
        p(z_L)  = 1/K sum_k q(z_L|u_k),   with trained images u_k

    The KL of level L has no closed form. Its term of the ELBO is log q(z_L|x) - log p(z_L) at a
    draw, one number for all units of the level together.
    """

    elbo_draws = 1
    headroom_rows = deep.HEADROOM_ROWS

    def __init__(self, f):
        super().__init__()
        # 1. Sizes.
        self.c_x, self.side, _ = deep.image_shape(f)
        c_x = self.c_x
        c = f.num_ch
        c_z = f.d_z or c_x
        c_out = c_x
        sides = deep.latent_sides(f)
        top = sides[0]
        L = len(sides)
        K = f.pseudoinputs
        self.levels = L
        self.learned_levels = L
        self.top_units = c_z * top**2
        self.widest_layer = max(c * self.side**2, K * self.top_units)
        self.dimensions = 0
        if f.dataset == "cifar10":
            self.dimensions = c_x * self.side**2
            c_out = deep.LogisticMixture.K * deep.LogisticMixture.n(c_x)

        # 2. Pseudoinputs before their sigmoid, and mean and std of q(z_L|u_k) after training.
        self.raw_u = nn.Parameter(torch.zeros(K, c_x, self.side, self.side))
        self.register_buffer("top_mean", torch.ones(K, c_z, top, top))
        self.register_buffer("top_std", torch.ones(K, c_z, top, top))

        # 3. Encoder, latents and decoder.
        self.encoder = Encoder(f, sides)
        self.register_buffer("s_start", torch.ones(1, c, top, top), persistent=False)
        self.latents = nn.ModuleList()
        for l, side in zip(range(L, 0, -1), sides):
            self.latents.append(Latent(f, side=side, c_z=c_z, c_prior=c, L=L, level=l))
        self.z_to_x = nn.Sequential(
            nn.Conv2d(c_z, c, 1), nn.SiLU(), nn.Conv2d(c, c_out, 3, padding=1)
        )

    def begin_at(self, images):
        """Initialise the pseudoinputs with images that are evenly spaced in the training set."""
        K = len(self.raw_u)
        rows = torch.arange(K, device=images.device) * len(images) // K
        with torch.no_grad():
            self.raw_u.copy_(images[rows].clamp(0.02, 0.98).logit())

    def pseudoinputs(self):
        """u_k (K, c_x, H, H), within [0, 1]."""
        return self.raw_u.sigmoid()

    def top_prior(self):
        """p(z_L): in training mode from the pseudoinputs, else from what `settle` stored."""
        if not self.training:
            return VampPrior(self.top_mean, self.top_std)
        latent = self.latents[0]
        features = self.encoder(self.pseudoinputs())
        q = latent.q(self.s_start, features[latent.side])
        return VampPrior(q.mean, q.stddev)

    @torch.no_grad()
    def settle(self):
        """Store the trained prior for the evaluation. Returns the model, in training mode."""
        p = self.train().top_prior()
        self.top_mean.copy_(p.each.mean)
        self.top_std.copy_(p.each.stddev)
        return self

    def top_down(self, n, features, choose):
        """Yield p(z_l|z_>l), q(z_l|z_>l, x) and z_l for l = L, ..., 1, each (n, c_z, side, side).

        z_l is choose(l, p, q), such as a draw of q. For level L p is a VampPrior. features are the
        result of the encoder. If they are None, q is None.
        """
        s = self.s_start.expand(n, -1, -1, -1)
        for l, latent in zip(range(self.levels, 0, -1), self.latents):
            s = F.interpolate(s, size=latent.side)
            p, h = latent.p(s)
            if l == self.levels:
                p = self.top_prior()
            q = latent.q(s, features[latent.side]) if features else None
            z = choose(l, p, q)
            yield p, q, z
            if l > 1:
                s = latent.update(s, h, z)

    def p_x(self, zs, shape=(-1,)):
        """p(x|z) of all latents, a list of (n, c_z, side, side).

        Its pixels are (*shape, c_x, H, W), where n is the product of shape.
        """
        total = 0
        for z in zs:
            total = total + F.interpolate(z, size=self.side, mode="bilinear")
        total = total / math.sqrt(self.levels)
        out = self.z_to_x(total).to(total.dtype).unflatten(0, shape)
        if self.dimensions:
            return deep.LogisticMixture(out, self.c_x)
        return Bernoulli(logits=out)

    def draw_posterior(self, x, sample_shape):
        """A draw of all latents from q(z|x), the top level first: a list of (p, q, z)."""
        features = {}
        for side, e in self.encoder(x).items():
            features[side] = deep.repeat_examples(e, sample_shape)
        n = math.prod((*sample_shape, len(x)))
        return list(self.top_down(n, features, lambda l, p, q: deep.draw(q)))

    def forward(self, x, f, sample_shape=()):
        """The terms of the ELBO for x (B, c_x, H, W), in nats. Shapes are in report.py.

        kl_L of the top level is (S, B, 1), all its units together. Its unit_kl_L (S, B, d) is the
        KL to a Gaussian with the prior's means and variances.
        """
        shape = (*sample_shape, len(x))

        # 1. The reconstruction, and the KL of each level.
        drawn = self.draw_posterior(x, sample_shape)
        top_p, top_q, top_z = drawn[0]
        below = drawn[1:]
        zs = [z for p, q, z in drawn]
        log_px_z = self.p_x(zs, shape).log_prob(x).flatten(len(shape)).sum(-1)
        top_kl = top_q.log_prob(top_z).flatten(1).sum(1) - top_p.log_prob(top_z)
        top_kl = deep.per_unit(top_kl[:, None], shape)
        terms = {"log_px_z": log_px_z}
        for l, (p, q, z) in enumerate(reversed(below), start=1):
            terms[f"kl_{l}"] = deep.per_unit(kl_divergence(q, p), shape)
        terms[f"kl_{self.levels}"] = top_kl

        # 2. What only the evaluation needs.
        if not self.training:
            terms.update(self.evaluation_terms(drawn, log_px_z, top_kl, shape))
        return terms

    def evaluation_terms(self, drawn, log_px_z, top_kl, shape):
        """The importance weight, the KL of the top level's units, and the mean of each level.

        The means are in standard deviations of the prior. drawn is the list of (p, q, z), the top
        level first.
        """
        top_p, top_q, _ = drawn[0]
        log_ratio = 0
        for p, q, z in drawn[1:]:
            log_ratio = log_ratio + deep.per_unit(p.log_prob(z) - q.log_prob(z), shape).sum(-1)
        terms = {"log_w": log_px_z + log_ratio - top_kl.squeeze(-1)}

        # The Gaussian with the means and variances of the VampPrior.
        matched = Normal(top_p.mean, top_p.stddev)
        terms[f"unit_kl_{self.levels}"] = deep.per_unit(kl_divergence(top_q, matched), shape)
        for l, (p, q, z) in enumerate(reversed(drawn), start=1):
            terms[f"mean_{l}"] = deep.per_unit((q.mean - p.mean) / p.stddev, shape)
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO per image, -log p(x|z) + beta sum_l KL_l, in nats, (B,).

        The first --free_bits nats of each unit's KL cost nothing. The term of the top level,
        (B, 1), belongs to all its units together, so it has the free bits of all of them.
        """
        *below, top = common.levels(terms)
        top_bits = f.free_bits * self.top_units
        top_kl = common.free_bits(terms[f"kl{top}"], top_bits).sum(-1)
        kl_below = 0
        for level in below:
            kl_below = kl_below + common.free_bits(terms[f"kl{level}"], f.free_bits).sum(-1)
        return -terms["log_px_z"] + f.beta * (top_kl + kl_below)

    # What the report measures (see report.py).

    def residuals(self, x, f, draws):
        """Describe binary pixels minus their expected probabilities, as headroom.py needs it.

        See deep.level_residuals. Each of the two estimates has one draw of the latents.
        """
        # headroom.py has no theory for the mixture of logistics of cifar10.
        if self.dimensions:
            return {}
        x = common.binarise(x)
        zs = [z for p, q, z in self.draw_posterior(x, (2,))]
        return deep.level_residuals(self, x, self.p_x(zs, (2, len(x))).logits, f)

    # What the pictures and the measurements of --evaluate use.

    def top_posterior(self, x, f, levels):
        """q(z_l|z_>l, x) of the top levels, where every latent above is at its posterior mean.

        A list of Normals, differentiable in x (B, c_x, H, W).
        """
        posteriors = []
        for p, q, z in self.top_down(len(x), self.encoder(x), lambda l, p, q: q.mean):
            posteriors.append(q)
            if len(posteriors) == levels:
                break
        return posteriors

    def reconstruct(self, x, f, keep, below=lambda p: p.mean):
        """Means of p(x|z), (B, c_x, H, W).

        The top `keep` levels are the means of q. The levels below are below(p), the means of p by
        default. The top level, where it is not kept, is always the mean of p.
        """

        def choose(l, p, q):
            if l > self.levels - keep:
                return q.mean
            if l == self.levels:
                return p.mean.expand_as(q.mean)
            return below(p)

        latents = self.top_down(len(x), self.encoder(x), choose)
        return self.p_x([z for p, q, z in latents]).mean

    def reconstructions(self, x, f):
        """{title: images}: x, then reconstructions with more and more levels from the prior."""
        L = self.levels
        panels = {"test images": x, "reconstructed through all levels": self.reconstruct(x, f, L)}
        quarter = math.ceil(L / 4)
        for l in range(quarter, L, quarter):
            panels[deep.drawn_levels(l)] = self.reconstruct(x, f, L - l, deep.draw)
        return panels

    def samples(self, n, f):
        """{title: images}: pseudoinputs, and means of p(x|z) at n draws of all latents."""

        def choose(l, p, q):
            if l == self.levels:
                return p.draw(n, f.temperature)
            return deep.draw(p, f.temperature)

        images = self.p_x([z for p, q, z in self.top_down(n, None, choose)]).mean
        return {
            "trained pseudoinputs": self.pseudoinputs()[:n],
            "images decoded from draws of all latents": images,
        }


def model_of(f):
    """The model that --prior asks for."""
    return VampLadder(f) if f.prior == "vamp" else DVPVAE(f)


def train(model, f, data, loop):
    """Minimise -log p(x|z) + beta sum_l KL_l over --num_epochs. The KL of u is a bound on it.

    loop is a training.Training. Returns the model with the average of the weights, which is
    evaluated.
    """
    # 1. What the model takes from the training images.
    images = data.train[0]
    if f.prior == "vamp":
        model.begin_at(images)
    else:
        model.context.fit(images)

    # 2. The optimiser, and the objects that follow it.
    optimizer = deep.make_optimizer(model, f, f.weight_decay)
    schedule = deep.warmup_cosine(optimizer, f, loop.steps)
    average = deep.WeightAverage(model, f)
    parallel = processes.data_parallel(model)

    # 3. The factor of beta in its warm-up. It is a tensor, which a captured CUDA graph reads anew.
    share = None
    if training.beta_share(f, 0) < 1:
        share = torch.ones_like(images[0, 0, 0, 0])

    # 4. The step, which CUDA captures.
    def step(rows):
        x = images.index_select(0, rows)
        if f.dataset == "cifar10":
            x = deep.random_flip(x)
        else:
            # Binary pixels are drawn anew at each visit of an image.
            x = common.binarise(x)

        with deep.autocast(f):
            terms = parallel(x, f)
        loss = model.loss(terms, training.with_beta_share(f, share))
        means = common.batch_means(loss, terms)

        optimizer.zero_grad()
        means["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), f.grad_clip)
        optimizer.step()
        average.update(model)
        loop.record(means)

    replayed_step = loop.replayed(step)

    # 5. What --test_curve measures after each epoch.
    def test():
        averaged = average.module.settle() if f.prior == "vamp" else average.module
        return {"test_elbo": deep.test_elbo(averaged, f, data)}

    # 6. The loop.
    parts = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    for rows in loop.batches(test=test if f.test_curve else None, **parts):
        if share is not None:
            share.fill_(training.beta_share(f, loop.epochs_done))
        replayed_step(rows)
        schedule.step()

    if f.prior == "vamp":
        return average.module.settle()
    return average.module


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    data = datasets.load_images(settings)
    runs = training.fit(model_of, settings, data, train=train)
    status = report.report(runs)
    deep.evaluate_further(runs)
    return status


if __name__ == "__main__":
    common.run(main)
