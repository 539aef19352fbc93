"""DVP-VAE on MNIST: whether pseudoinputs with a density of their own, a diffusion model's, keep a deep hierarchy in use.

    CUDA_VISIBLE_DEVICES=0 python MNIST_HVAE_DVP.py
    python MNIST_HVAE_DVP.py --context dct,downsample,linear
    python MNIST_HVAE_DVP.py --prior diffusion,vamp --preset small
    torchrun --nproc_per_node=4 MNIST_HVAE_DVP.py --dataset omniglot --autocast bf16

The best prior is the average posterior, which a VampPrior approximates by posteriors at pseudoinputs u (Tomczak & Welling 2018,
arXiv 1705.07120). Here u = f(x) is a small picture of x, untrained, so that it cannot collapse; every level's prior reads it,
and a variational diffusion model is its density (Kuzina & Tomczak 2024, arXiv 2412.01373). The rest is MNIST_HVAE_Ladder.py.
"""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, MixtureSameFamily, Normal, kl_divergence
from torch.nn import functional as F

import common
import datasets
import deep
import report
import theory
import training


@dataclass
class Flags(deep.DeepFlags):
    # What two CPU cores can do in minutes; the defaults are the published setting, for a GPU.
    small = ("--latents 2,2 --num_ch 16 --diffusion_ch 6 --batch_size 100 --num_epochs 12 --warmup_epochs 0.5 --ema 0.99 "
             "--num_samples 100 --num_test 1000")
    prior: str = common.flag("diffusion", "diffusion, or vamp for the VampPrior that it amortises, pseudoinputs that are trained",
                             choices=("diffusion", "vamp"))
    pseudoinputs: int = common.flag(500, "pseudoinputs of --prior vamp", low=1, high=100_000)
    context: str = common.flag("dct", "the map f of x to its pseudoinput: low frequencies, means over squares, or the principal "
                                      "components of the training images", choices=("dct", "downsample", "linear"))
    context_size: int = common.flag(7, "a pseudoinput is so many numbers high and wide", low=1, high=28)
    num_steps: int = common.flag(25, "steps of the diffusion model in sampling", low=1, high=10_000, evaluation=True)
    diffusion_ch: int = common.flag(16, "channels of the diffusion model's network", low=1, high=4096)
    latents: str = common.flag("4,4", "latents of each scale, the coarsest first, the last at half the image's side, of cifar10 at "
                                      "the whole: 4,4 is 4 of 7x7 and 4 of 14x14")
    d_z: int = common.flag(0, "channels of a latent; 0 is 1, of cifar10 3", low=0, high=4096)
    num_ch: int = common.flag(32, "channels of encoder and decoder", low=1, high=4096)
    d_hidden: int = common.flag(0, "channels within a block; 0 is as many as --num_ch", low=0, high=4096)
    linear_path: bool = common.flag(True, "a 1x1 convolution beside the block of each prior and posterior", before=False)
    preset: str = common.flag("published", f"small is {small}", choices=("published", "small"))
    evaluate: str = common.flag("", "further measurements: compression, attack or both, joined by a comma")

    def __post_init__(self):
        super().__post_init__()
        deep.sides_of_latents(self)                       # now rather than when a model is built


class Bottleneck(nn.Sequential):
    """1x1, 3x3, 3x3 and 1x1 convolutions, SiLU between them, `hidden` channels: (B, c_in, H, W) to (B, c_out, H, W). start scales
    the initial weights of the last one."""

    def __init__(self, c_in, c_out, hidden, start=1.0):
        super().__init__(nn.Conv2d(c_in, hidden, 1), nn.SiLU(), nn.Conv2d(hidden, hidden, 3, padding=1), nn.SiLU(),
                         nn.Conv2d(hidden, hidden, 3, padding=1), nn.SiLU(), deep.scaled(nn.Conv2d(hidden, c_out, 1), start))


class Head(nn.Module):
    """What a state says of a distribution: a 1x1 convolution, if --linear_path, plus a bottleneck that starts at 0."""

    def __init__(self, f, c_in, c_out):
        super().__init__()
        self.block = Bottleneck(c_in, c_out, f.d_hidden or f.num_ch, start=0)
        self.linear = nn.Conv2d(c_in, c_out, 1) if f.linear_path else None

    def forward(self, s):
        return self.block(s) if self.linear is None else self.block(s) + self.linear(s)


class Encoder(nn.Module):
    """x (B, c_x, H, W) to the features e of each scale, {side: (B, c, side, side)}, from the finest side that there can be down."""

    def __init__(self, f, sides):
        super().__init__()
        c, finest = f.num_ch, deep.finest_side(f)
        self.sides = [finest >> k for k in range((finest // min(sides)).bit_length())]
        self.x_to_e = nn.Conv2d(datasets.image_shape(f.dataset)[0], c, 1)
        self.scales = nn.ModuleList(nn.ModuleList(Bottleneck(c, c, f.d_hidden or c) for _ in range(3)) for _ in self.sides)

    def forward(self, x):
        e, features = self.x_to_e(x), {}
        for side, blocks in zip(self.sides, self.scales):
            for block in blocks:
                e = e + block(F.silu(e))
            e = features[side] = F.avg_pool2d(e, e.shape[-1] // side)
        return features


class Latent(nn.Module):
    """One level: p(z_l|z_>l) and q(z_l|z_>l, x), z_l (B, c_z, side, side), and what becomes of the state s (B, c, side, side).
    The prior reads c_prior channels. Level 1 leaves no state behind: nothing would read it."""

    def __init__(self, f, side, c_z, c_prior, L, level):
        super().__init__()
        c = f.num_ch
        self.side, self.parts = side, [c_z, c_z, c if level > 1 else 0]
        self.s_to_p, self.s_to_q = Head(f, c_prior, sum(self.parts)), Head(f, c, 2 * c_z)
        if level > 1:
            self.z_to_s = deep.scaled(nn.Conv2d(c_z, c, 1), L**-0.5)
            self.s_to_s = Bottleneck(c, c, f.d_hidden or c, start=L**-0.5)

    def p(self, s):
        """p(z_l|z_>l), and h, the prior's own update of the state."""
        mean, log_var, h = self.s_to_p(s).to(s.dtype).split(self.parts, dim=1)
        return normal(mean, log_var), h

    def q(self, s, e):
        """q(z_l|z_>l, x)."""
        return normal(*self.s_to_q((e + s) / math.sqrt(2)).to(s.dtype).chunk(2, dim=1))

    def update(self, s, h, z):
        s = s + h + self.z_to_s(z)
        return s + self.s_to_s(s)


def normal(mean, log_var):
    return Normal(mean, (log_var.clamp(-10, 1) / 2).exp())


class Context(nn.Module):
    """f: x (B, c_x, H, H) in [0, 1] -> f(x) (B, c_x, k, k), in [-1, 1] on the training set, a map fixed before training:

        f(x) = (A x - centre) / extent  of each channel,  A (k^2, H^2),  the image of u:  A^+ (centre + extent u)

    dct: the k x k lowest frequencies of the orthonormal 2-D discrete cosine transform, extent the largest magnitude of each.
    downsample: means over k x k squares. linear: the k^2 principal components of the training images about 0, of all linear
    maps the one that keeps most of them; extent as in dct. Binarised pixels can reach a little beyond [-1, 1].
    """

    def __init__(self, f):
        super().__init__()
        c_x, side, _ = datasets.image_shape(f.dataset)
        self.kind, self.k, self.side = f.context, f.context_size, side
        if f.context == "dct":                            # sqrt(2/H) cos(pi a (i + 1/2) / H), over sqrt 2 at a = 0
            a, i = torch.arange(self.k)[:, None], torch.arange(side, dtype=torch.float64)
            along = torch.where(a > 0, math.sqrt(2 / side), math.sqrt(1 / side)) * (math.pi / side * a * (i + 0.5)).cos()
        else:
            along = F.adaptive_avg_pool1d(torch.eye(side, dtype=torch.float64), self.k).T
        A = torch.kron(along, along)
        self.register_buffer("A", A.float())
        self.register_buffer("A_inverse", torch.linalg.pinv(A).float())
        self.register_buffer("extent", torch.full((c_x, self.k**2), 0.5))
        self.register_buffer("mean", torch.zeros(c_x, self.k, self.k))
        self.register_buffer("std", torch.ones(c_x, self.k, self.k))
        self.register_buffer("covariance", torch.eye(c_x * self.k**2))
        self.centre = 0.5 if f.context == "downsample" else 0.0

    def fit(self, images):
        """Measure on the training images what the map needs, and mean, covariance and std of their f(x), which are about those of
        r(u); that is no narrower than its p(u|z_0)."""
        if self.kind == "linear":
            _, directions = theory.modes(theory.second_moment(images.flatten(0, 1).flatten(1)))
            self.A.copy_(directions[:, :self.k**2].T)
            self.A_inverse.copy_(directions[:, :self.k**2])
        if self.kind != "downsample":
            self.extent.copy_((images.flatten(2) @ self.A.T).abs().amax(0).clamp(min=1e-3))
        u = self(images)
        self.mean.copy_(u.mean(0))
        self.covariance.copy_(torch.cov(u.flatten(1).T.double()))
        self.std.copy_(u.std(0).clamp(min=math.exp(Diffusion.GAMMA_0 / 2)))

    def log_gaussian(self, u):
        """log r(u) of u (B, c_x, k, k), (B,), if it were a Gaussian: what r(u) is to be better than."""
        variances, axes = torch.linalg.eigh(self.covariance.double())
        variances = variances.clamp(min=0) + math.exp(Diffusion.GAMMA_0)
        along = (u - self.mean).flatten(1).double() @ axes
        return -((along**2 / variances + (2 * math.pi * variances).log()).sum(1) / 2).to(u.dtype)

    def forward(self, x):
        """f(x), (B, c_x, k, k), of x (B, c_x, H, H)."""
        with torch.autocast(x.device.type, enabled=False):
            return ((x.flatten(2) @ self.A.T - self.centre) / self.extent).unflatten(2, (self.k, self.k))

    def image(self, u):
        """The image (B, c_x, H, H) of u (B, c_x, k, k)."""
        with torch.autocast(u.device.type, enabled=False):
            return ((self.centre + self.extent * u.flatten(2)) @ self.A_inverse.T).unflatten(2, (self.side, self.side))


class UNet(nn.Module):
    """h (N, c_in, k, k) and times t (N,) in [0, 1] to (N, c_out, k, k), 0 at the start: blocks on the way in and as many on the way
    out, each told what the one opposite had found, attention between them, all on one scale."""

    def __init__(self, c_in, c_out, c, blocks):
        super().__init__()
        half = max(1, c // 2)
        self.register_buffer("frequencies", 1000 * 10**(-4 * torch.arange(half) / half), persistent=False)
        self.time = nn.Sequential(nn.Linear(2 * half, 4 * c), nn.SiLU(), nn.Linear(4 * c, 4 * c), nn.SiLU())
        self.first = nn.Conv2d(c_in, c, 3, padding=1)
        self.way_in, self.middle, self.way_out = (nn.ModuleList(UNetBlock(c) for _ in range(n)) for n in (blocks, 2, blocks))
        self.attention = Attention(c)
        self.last = nn.Sequential(group_norm(c), nn.SiLU(), deep.scaled(nn.Conv2d(c, c_out, 3, padding=1), 0))

    def forward(self, h, t):
        angles = t[:, None] * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        h, found = self.first(h), []
        for block in self.way_in:
            h = block(h, time)
            found.append(h)
        h = self.middle[1](self.attention(self.middle[0](h, time)), time)
        for block in self.way_out:
            h = block(h + found.pop(), time)
        return self.last(h)


class UNetBlock(nn.Module):
    """h plus two 3x3 convolutions of it, normed by groups, the second as the time (N, 4 c) scales and shifts it; 0 at the start."""

    def __init__(self, c):
        super().__init__()
        self.norm_1, self.conv_1 = group_norm(c), nn.Conv2d(c, c, 3, padding=1)
        self.norm_2, self.conv_2 = group_norm(c), deep.scaled(nn.Conv2d(c, c, 3, padding=1), 0)
        self.time = nn.Linear(4 * c, 2 * c)

    def forward(self, h, time):
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        inner = F.silu(self.norm_2(self.conv_1(F.silu(self.norm_1(h)))) * (1 + scale) + shift)
        if self.training:                                 # dropout of a tenth
            inner = inner * (common.uniform_like(inner.float()) >= 0.1) / 0.9
        return h + self.conv_2(inner)


class Attention(nn.Module):
    """h (N, c, k, k) plus what each place finds at all others: two heads of scaled dot products; 0 at the start."""

    def __init__(self, c):
        super().__init__()
        self.heads = math.gcd(2, c)
        self.norm, self.to_qkv, self.to_h = group_norm(c), nn.Conv2d(c, 3 * c, 1), deep.scaled(nn.Conv2d(c, c, 1), 0)

    def forward(self, h):
        q, k, v = self.to_qkv(self.norm(h)).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)         # (N, heads, c', k k)
        weights = (q.transpose(-1, -2) @ k / math.sqrt(q.shape[-2])).softmax(-1)
        return h + self.to_h((v @ weights.transpose(-1, -2)).reshape(h.shape))


def group_norm(c):
    return nn.GroupNorm(math.gcd(8, c), c)


class Diffusion(nn.Module):
    """r(u), u (N, c_u, k, k), a variational diffusion model (Kingma et al. 2021, arXiv 2107.00630):

        q(z_t|u) = N(alpha_t u, sigma_t^2),  alpha_t^2 = sigmoid(-gamma(t)),  sigma_t^2 = sigmoid(gamma(t)),  t in [0, 1]
        p(z_1) = N(0, I),  p(u|z_0) = N(z_0 / alpha_0, sigma_0^2 / alpha_0^2)
        p(z_s|z_t) = q(z_s|z_t, u) at u = (z_t - sigma_t eps^) / alpha_t,  s = t - 1/T
        eps^(z_t, t) = sigma_t z_t + UNet(z_t, t), which starts at sigma_t z_t, the optimum if u ~ N(0, I)

    With z_t = alpha_t u + sigma_t eps_t, q is an autoregression in the noise: eps_s = rho eps_t + sqrt(1 - rho^2) eta with
    rho = exp((gamma(s) - gamma(t)) / 2). For T to infinity
        -log r(u) <= KL(q(z_1|u) || p(z_1)) + E[-log p(u|z_0)] + (gamma(1) - gamma(0)) / 2 E_t,eps |eps - eps^(z_t, t)|^2.
    """

    GAMMA_0, GAMMA_1, BLOCKS = -6.0, 7.0, 2

    def __init__(self, c_u, c):
        super().__init__()
        self.network = UNet(c_u, c_u, c, self.BLOCKS)

    def alpha_sigma(self, t):
        gamma = self.GAMMA_0 + (self.GAMMA_1 - self.GAMMA_0) * t
        return gamma.neg().sigmoid().sqrt(), gamma.sigmoid().sqrt()

    def epsilon(self, z, t):
        """eps^(z_t, t), like z (N, c_u, k, k); t (N, 1, 1, 1)."""
        return self.alpha_sigma(t)[1] * z + self.network(z, t.flatten()).to(z.dtype)

    def ends(self, u):
        """KL(q(z_1|u) || p(z_1)) + E_q[-log p(u|z_0)], in nats per coefficient, like u."""
        alpha, sigma = self.alpha_sigma(everywhere(u, 1.0))
        return (alpha**2 * u**2 + sigma**2 - 1 - 2 * sigma.log()) / 2 + (math.log(2 * math.pi * math.e) + self.GAMMA_0) / 2

    def loss(self, u, t=None):
        """The bound at one noise and one time of each row, t (N, 1, 1, 1), random by default, in nats per coefficient, like u."""
        t, noise = common.uniform_like(u[:, :1, :1, :1]) if t is None else t, common.normal_like(u)
        alpha, sigma = self.alpha_sigma(t)
        error = noise - self.epsilon(alpha * u + sigma * noise, t)
        return self.ends(u) + (self.GAMMA_1 - self.GAMMA_0) / 2 * error**2

    def bound(self, u, pairs=1000):
        """The mean of `loss` over pairs of time and noise, the times one of each of as many equal parts of [0, 1]: in nats per
        coefficient, like u; and the standard error of its sum, (N,), as if the times were independent, so rather too large."""
        at_once, total, squares = max(1, ROWS_AT_ONCE // len(u)), 0, 0
        for first in range(0, pairs, at_once):
            part = torch.arange(first, min(first + at_once, pairs), device=u.device).view(-1, 1, 1, 1, 1)
            t = (part + common.uniform_like(u[:, :1, :1, :1].expand(len(part), -1, -1, -1, -1))) / pairs
            losses = self.loss(u.repeat(len(part), 1, 1, 1), t.flatten(0, 1)).unflatten(0, (len(part), len(u)))
            total, squares = total + losses.sum(0), squares + losses.flatten(2).sum(2).square().sum(0)
        mean = total / pairs
        variance = squares / pairs - mean.flatten(1).sum(1)**2
        return mean, (variance.clamp(min=0) / pairs).sqrt()

    def sample(self, like, T):
        """Draws of u, like `like`, by T steps from z_1 to z_0."""
        rho = math.exp((self.GAMMA_0 - self.GAMMA_1) / 2 / T)
        z = common.normal_like(like)
        for i in range(T, 0, -1):
            t, s = everywhere(z, i / T), everywhere(z, (i - 1) / T)
            (alpha, sigma), (alpha_s, sigma_s) = self.alpha_sigma(t), self.alpha_sigma(s)
            noise = self.epsilon(z, t)
            u = (z - sigma * noise) / alpha
            z = alpha_s * u + sigma_s * (rho * noise + math.sqrt(1 - rho**2) * common.normal_like(z))
        return (z + sigma_s * common.normal_like(z)) / alpha_s


def everywhere(u, t):
    """The time t of each row of u, (N, 1, 1, 1)."""
    return torch.full_like(u[:, :1, :1, :1], t)


ROWS_AT_ONCE = 2**14                                      # of the diffusion model's network, where it is evaluated


class DVPVAE(nn.Module):
    """p(x, z, u) = p(x|z_1..z_L) prod_l p(z_l|z_>l, u) r(u),  q(z, u|x) = q(u|x) prod_l q(z_l|z_>l, u, x), from the top:

        q(u|x) = N(f(x), exp v)                                           v learned, one a coefficient, in [-12, -5]
        p(z_l|z_>l, u), h = prior block([s, image of u])                  s = 1 at the start; the image pooled to this scale
        q(z_l|z_>l, u, x) = posterior block((e + s) / sqrt 2)             e the encoder's feature of this scale
        s <- block(s + h + conv z_l)
        p(x|z) = Bernoulli(conv silu conv sum_l upsample(z_l) / sqrt L),  cifar10: LogisticMixture(the same)

    u is level L + 1.
    """

    elbo_draws = 1

    def __init__(self, f):
        super().__init__()
        self.c_x, self.side, _ = datasets.image_shape(f.dataset)
        c_z, sides = f.d_z or self.c_x, deep.sides_of_latents(f)
        L = self.learned_levels = len(sides)
        self.levels, self.widest_layer = L + 1, f.num_ch * self.side**2
        self.dimensions = self.c_x * self.side**2 if f.dataset == "cifar10" else 0
        c_out = deep.LogisticMixture.K * deep.LogisticMixture.n(self.c_x) if self.dimensions else self.c_x
        self.context, self.r = Context(f), Diffusion(self.c_x, f.diffusion_ch)
        self.raw_v = nn.Parameter(torch.zeros(self.c_x, f.context_size, f.context_size))
        self.encoder = Encoder(f, sides)
        self.register_buffer("s_start", torch.ones(1, f.num_ch, sides[0], sides[0]), persistent=False)
        self.latents = nn.ModuleList(Latent(f, sides[L - l], c_z, f.num_ch + self.c_x, L, l) for l in range(L, 0, -1))
        self.z_to_x = nn.Sequential(nn.Conv2d(c_z, f.num_ch, 1), nn.SiLU(), nn.Conv2d(f.num_ch, c_out, 3, padding=1))

    def q_u(self, x):
        """q(u|x), (B, c_x, k, k)."""
        v = -12 + 7 * self.raw_v.sigmoid()
        return Normal(self.context(x), (v / 2).exp())

    def top_down(self, u, features, choose):
        """Yields p(z_l|z_>l, u), q(z_l|z_>l, u, x) and z_l = choose(l, p, q), each (n, c_z, side, side), for l = L, ..., 1; u
        (n, c_x, k, k). Without features q is None."""
        s, picture = self.s_start.expand(len(u), -1, -1, -1), self.context.image(u)
        for l, latent in zip(range(self.learned_levels, 0, -1), self.latents):
            s = F.interpolate(s, size=latent.side)
            p, h = latent.p(torch.cat([s, F.avg_pool2d(picture, self.side // latent.side)], dim=1))
            q = latent.q(s, features[latent.side]) if features else None
            z = choose(l, p, q)
            yield p, q, z
            if l > 1:
                s = latent.update(s, h, z)

    def p_x(self, zs, shape=(-1,)):
        """p(x|z) of all latents, each (n, c_z, side, side), n = shape's product; its pixels are (*shape, c_x, H, W)."""
        total = sum(F.interpolate(z, size=self.side, mode="bilinear") for z in zs) / math.sqrt(self.learned_levels)
        out = self.z_to_x(total).to(total.dtype).unflatten(0, shape)
        return deep.LogisticMixture(out, self.c_x) if self.dimensions else Bernoulli(logits=out)

    def given(self, x, f):
        """A draw of u that all draws of z share: log p(x) >= E_q(u|x)[log p(x|u)] - KL(q(u|x) || r(u)), where only log p(x|u) is
        estimated by weights. q(u|x) is narrow."""
        q_u = self.q_u(x)
        u = deep.draw(q_u)
        bound, error = self.r.bound(u)
        return {"u": u, "kl_u": (bound - q_u.entropy()).flatten(1), "error": error,
                "gaussian": -self.context.log_gaussian(u) - q_u.entropy().flatten(1).sum(1)}

    def forward(self, x, f, sample_shape=(), u=None, kl_u=None, error=None, gaussian=None):
        """x (B, c_x, H, W). Terms of the ELBO at a draw of u and all latents, in nats; shapes as report.py says. The KL of u is
        the diffusion model's bound on it, which at one draw can be negative. With u (B, c_x, k, k), its KL kl_u (B, d), the
        standard error of that and the KL if r(u) were Gaussian, (B,), from `given`, log_w is of p(x|u) alone."""
        shape = (*sample_shape, len(x))

        def repeated(e):                                  # (B, ...) -> (S B, ...)
            return e.expand(*sample_shape, *e.shape).flatten(0, len(sample_shape))

        def units(values):                                # (S B, c_z, side, side) -> (S, B, d)
            return values.flatten(1).unflatten(0, shape)

        q_u = self.q_u(x)
        if u is None:
            q_u = Normal(repeated(q_u.mean), repeated(q_u.stddev))
            u_drawn = deep.draw(q_u)
            kl_of_u = units(self.r.loss(u_drawn) - q_u.entropy())
        else:
            u_drawn, kl_of_u = repeated(u), kl_u
        features = {side: repeated(e) for side, e in self.encoder(x).items()}
        drawn = list(self.top_down(u_drawn, features, lambda l, p, q: deep.draw(q)))[::-1]      # level 1 first
        log_px_z = self.p_x([z for _, _, z in drawn], shape).log_prob(x).flatten(len(shape)).sum(-1)
        terms = {"log_px_z": log_px_z} | {f"kl_{l}": units(kl_divergence(q, p)) for l, (p, q, _) in enumerate(drawn, 1)}
        terms[f"kl_{self.levels}"] = kl_of_u
        if not self.training:
            terms["log_w"] = log_px_z + sum(units(p.log_prob(z) - q.log_prob(z)).sum(-1) for p, q, z in drawn)
            terms |= {f"mean_{l}": units((q.mean - p.mean) / p.stddev) for l, (p, q, _) in enumerate(drawn, 1)}
            terms[f"mean_{self.levels}"] = ((self.context(x) - self.context.mean) / self.context.std).flatten(1)
        if u is not None:
            terms |= {"log_w_u": -kl_u.sum(-1), "error_context": error, "context_baseline": gaussian}
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO, -log p(x|z) + beta sum_l KL_l, in nats, (B,); --free_bits of every learned level cost nothing."""
        *learned, context = (terms[f"kl{level}"] for level in common.levels(terms))
        return -terms["log_px_z"] + f.beta * (context.sum(-1) + sum(common.free_bits(kl, f.free_bits).sum(-1) for kl in learned))

    def top_posterior(self, x, f, levels):
        """q(z_l|z_>l, u, x) of the top learned levels, u and z_>l the means of theirs: a list of Normal, differentiable in x
        (B, c_x, H, W)."""
        means_down = self.top_down(self.context(x), self.encoder(x), lambda l, p, q: q.mean)
        return [q for _, (_, q, _) in zip(range(levels), means_down)]

    def reconstruct(self, x, f, keep, below=lambda p: p.mean):
        """Means of p(x|z), (B, c_x, H, W): the top `keep` levels, u the first, are the means of q, those below of p, or what
        below(p) is; for the mean of r(u) stands that of the training set's pseudoinputs."""
        u = self.context(x) if keep else self.context.mean.expand(len(x), -1, -1, -1)
        means_down = self.top_down(u, self.encoder(x), lambda l, p, q: q.mean if l > self.levels - keep else below(p))
        return self.p_x([z for _, _, z in means_down]).mean

    def reconstructions(self, x, f):
        L = self.levels
        panels = {"test images": x, "pseudoinputs": self.context.image(self.context(x)),
                  "reconstructed through all levels": self.reconstruct(x, f, L)}
        for l in sorted({math.ceil((L - 1) * third / 3) for third in (1, 2, 3)}):          # at last only u is kept
            panels[f"levels {l} down drawn from the prior"] = self.reconstruct(x, f, L - l, deep.draw)
        return panels

    def samples(self, n, f):
        u = self.r.sample(self.context.mean.expand(n, -1, -1, -1), f.num_steps)
        images = self.p_x([z for _, _, z in self.top_down(u, None, lambda l, p, q: deep.draw(p, f.temperature))]).mean
        return {"pseudoinputs": self.context.image(u), "what comes of them": images}


class VampPrior(MixtureSameFamily):
    """p(z) = 1/K sum_k N(mean_k, std_k^2), z (n, c_z, side, side), of mean and std (K, c_z, side, side)."""

    def __init__(self, mean, std):
        super().__init__(Categorical(logits=torch.zeros_like(mean[:, 0, 0, 0])), Independent(Normal(mean, std), 3))
        self.each = self.component_distribution.base_dist

    def draw(self, n, temperature):
        """n draws (n, c_z, side, side), the std of each Normal times the temperature."""
        k = (common.uniform_like(self.each.mean[:1, 0, 0, 0].expand(n)) * len(self.each.mean)).long()
        return deep.draw(Normal(self.each.mean[k], self.each.stddev[k]), temperature)


class VampLadder(nn.Module):
    """The ladder VAE of MNIST_HVAE_Ladder.py with a VampPrior (Tomczak & Welling 2018) at its top:

        p(x, z) = p(x|z_1..z_L) p(z_L) prod_{l < L} p(z_l|z_>l),  p(z_L) = 1/K sum_k q(z_L|u_k),  u_k trained images

    Its KL has no closed form: the ELBO's term of level L is log q(z_L|x) - log p(z_L) at a draw, of all its units together.
    """

    elbo_draws = 1

    def __init__(self, f):
        super().__init__()
        self.c_x, self.side, _ = datasets.image_shape(f.dataset)
        c_z, sides = f.d_z or self.c_x, deep.sides_of_latents(f)
        L = self.levels = self.learned_levels = len(sides)
        self.widest_layer = max(f.num_ch * self.side**2, f.pseudoinputs * c_z * sides[0]**2)
        self.dimensions = self.c_x * self.side**2 if f.dataset == "cifar10" else 0
        c_out = deep.LogisticMixture.K * deep.LogisticMixture.n(self.c_x) if self.dimensions else self.c_x
        self.raw_u = nn.Parameter(torch.zeros(f.pseudoinputs, self.c_x, self.side, self.side))
        self.encoder = Encoder(f, sides)
        self.register_buffer("s_start", torch.ones(1, f.num_ch, sides[0], sides[0]), persistent=False)
        for name in ("top_mean", "top_std"):              # of q(z_L|u_k), as training leaves them
            self.register_buffer(name, torch.ones(f.pseudoinputs, c_z, sides[0], sides[0]))
        self.latents = nn.ModuleList(Latent(f, sides[L - l], c_z, f.num_ch, L, l) for l in range(L, 0, -1))
        self.z_to_x = nn.Sequential(nn.Conv2d(c_z, f.num_ch, 1), nn.SiLU(), nn.Conv2d(f.num_ch, c_out, 3, padding=1))

    p_x, loss = DVPVAE.p_x, DVPVAE.loss

    def begin_at(self, images):
        """Let the pseudoinputs begin as images, evenly spaced in the training set."""
        rows = torch.arange(len(self.raw_u), device=images.device) * len(images) // len(self.raw_u)
        with torch.no_grad():
            self.raw_u.copy_(images[rows].clamp(0.02, 0.98).logit())

    def pseudoinputs(self):
        """u_k (K, c_x, H, H), within [0, 1]."""
        return self.raw_u.sigmoid()

    def top_prior(self):
        if not self.training:
            return VampPrior(self.top_mean, self.top_std)
        latent = self.latents[0]
        q = latent.q(self.s_start, self.encoder(self.pseudoinputs())[latent.side])
        return VampPrior(q.mean, q.stddev)

    @torch.no_grad()
    def settle(self):
        """Keep what the prior has become, for evaluation."""
        p = self.train().top_prior()
        self.top_mean.copy_(p.each.mean)
        self.top_std.copy_(p.each.stddev)
        return self

    def top_down(self, n, features, choose):
        """Yields p(z_l|z_>l), q(z_l|z_>l, x) and z_l = choose(l, p, q), each (n, c_z, side, side), for l = L, ..., 1; of level L p is
        a VampPrior. Without features q is None."""
        s = self.s_start.expand(n, -1, -1, -1)
        for l, latent in zip(range(self.levels, 0, -1), self.latents):
            s = F.interpolate(s, size=latent.side)
            p, h = latent.p(s)
            p = self.top_prior() if l == self.levels else p
            q = latent.q(s, features[latent.side]) if features else None
            z = choose(l, p, q)
            yield p, q, z
            if l > 1:
                s = latent.update(s, h, z)

    def forward(self, x, f, sample_shape=()):
        """x (B, c_x, H, W). Terms of the ELBO at a draw of all latents, in nats; shapes as report.py says, but that the top level's
        kl is of all units. Its units' are those to a Gaussian with the prior's means and variances."""
        shape = (*sample_shape, len(x))

        def units(values):                                # (S B, c_z, side, side) -> (S, B, d)
            return values.flatten(1).unflatten(0, shape)

        features = {side: e.expand(*sample_shape, *e.shape).flatten(0, len(sample_shape)) for side, e in self.encoder(x).items()}
        (p, q, z), *below = self.top_down(math.prod(shape), features, lambda l, p, q: deep.draw(q))
        log_px_z = self.p_x([z, *(z for _, _, z in below)], shape).log_prob(x).flatten(len(shape)).sum(-1)
        log_ratio = q.log_prob(z).flatten(1).sum(1) - p.log_prob(z)
        levels = list(enumerate(below[::-1], 1))          # level 1 first
        terms = {"log_px_z": log_px_z} | {f"kl_{l}": units(kl_divergence(q, p)) for l, (p, q, _) in levels}
        terms[f"kl_{self.levels}"] = units(log_ratio[:, None])
        if not self.training:
            of_all = sum(units(p.log_prob(z) - q.log_prob(z)).sum(-1) for p, q, z in below)
            terms["log_w"] = log_px_z + of_all - units(log_ratio[:, None]).squeeze(-1)
            terms[f"unit_kl_{self.levels}"] = units(kl_divergence(q, Normal(p.mean, p.stddev)))
            terms |= {f"mean_{l}": units((q.mean - p.mean) / p.stddev) for l, (p, q, _) in [*levels, (self.levels, (p, q, z))]}
        return terms

    def top_posterior(self, x, f, levels):
        """q(z_l|z_>l, x) of the top levels, z_>l the means of theirs: a list of Normal, differentiable in x (B, c_x, H, W)."""
        means_down = self.top_down(len(x), self.encoder(x), lambda l, p, q: q.mean)
        return [q for _, (_, q, _) in zip(range(levels), means_down)]

    def reconstruct(self, x, f, keep, below=lambda p: p.mean):
        """Means of p(x|z), (B, c_x, H, W): the top `keep` levels are the means of q, those below of p, or what below(p) is."""
        means_down = self.top_down(len(x), self.encoder(x), lambda l, p, q: q.mean if l > self.levels - keep else (
            p.mean.expand_as(q.mean) if l == self.levels else below(p)))
        return self.p_x([z for _, _, z in means_down]).mean

    def reconstructions(self, x, f):
        L = self.levels
        panels = {"test images": x, "reconstructed through all levels": self.reconstruct(x, f, L)}
        for l in range(math.ceil(L / 4), L, math.ceil(L / 4)):
            panels[f"levels {l} down drawn from the prior"] = self.reconstruct(x, f, L - l, deep.draw)
        return panels

    def samples(self, n, f):
        drawn = self.top_down(n, None, lambda l, p, q: p.draw(n, f.temperature) if l == self.levels else deep.draw(p, f.temperature))
        return {"pseudoinputs": self.pseudoinputs()[:n], "what is drawn": self.p_x([z for _, _, z in drawn]).mean}


def model_of(f):
    return VampLadder(f) if f.prior == "vamp" else DVPVAE(f)


def train(model, f, data, loop):
    """Minimise -log p(x|z) + beta (sum_l KL_l + the bound on KL(q(u|x) || r(u))) over --num_epochs. Returns the average of the
    weights, which is evaluated."""
    if f.prior == "vamp":
        model.begin_at(data.train[0])
    else:
        model.context.fit(data.train[0])
    optimizer = deep.optimizer(model, f, f.weight_decay)
    schedule, average, parallel = deep.warmup_cosine(optimizer, f, loop.steps), deep.WeightAverage(model, f), deep.parallel(model)
    share = torch.ones_like(data.train[0][0, 0, 0, 0]) if training.beta_share(f, 0) < 1 else None    # of beta, that rises

    def step(rows):
        x = data.train[0].index_select(0, rows)
        x = deep.flipped(x) if f.dataset == "cifar10" else common.binarise(x)              # afresh at each visit
        with deep.autocast(f):
            terms = parallel(x, f)
        means = common.means(model.loss(terms, training.weighted(f, share)), terms)
        optimizer.zero_grad()
        means["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), f.grad_clip)
        optimizer.step()
        average.update(model)
        loop.record(means)

    step = loop.replayed(step)
    for rows in loop.batches(model=model, average=average, optimizer=optimizer, schedule=schedule):
        if share is not None:
            share.fill_(training.beta_share(f, loop.epochs_done))
        step(rows)
        schedule.step()
    return average.module.settle() if f.prior == "vamp" else average.module


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    data = datasets.load_images(settings)
    models = training.fit(model_of, settings, data, train=train)
    status = report.report(models, settings, data)
    deep.evaluate_further(models, settings, data)
    return status


if __name__ == "__main__":
    common.run(main)
