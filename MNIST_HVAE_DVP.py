"""DVP-VAE on MNIST: whether pseudoinputs with a density of their own, a diffusion model's, keep a deep hierarchy in use.

    CUDA_VISIBLE_DEVICES=0 python MNIST_HVAE_DVP.py
    python MNIST_HVAE_DVP.py --context dct,downsample,linear
    torchrun --nproc_per_node=4 MNIST_HVAE_DVP.py --dataset omniglot --autocast bf16

The best prior is the average posterior, which a VampPrior approximates by posteriors at pseudoinputs u (Tomczak & Welling 2018,
arXiv 1705.07120). Here u = f(x) is a small picture of x, untrained, so that it cannot collapse; every level's prior reads it,
and a variational diffusion model is its density (Kuzina & Tomczak 2024, arXiv 2412.01373). The rest is MNIST_HVAE_Ladder.py.
"""
import math
import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn import functional as F

import common
import datasets
import deep
import report
import theory
import training


@dataclass
class Flags(deep.DeepFlags):
    context: str = common.flag("dct", "the map f of x to its pseudoinput: low frequencies, means over squares, or the principal "
                                      "components of the training images", choices=("dct", "downsample", "linear"))
    context_size: int = common.flag(7, "a pseudoinput is so many numbers high and wide", low=1, high=28)
    num_steps: int = common.flag(25, "steps of the diffusion model in evaluation and sampling; more make its bound tighter",
                                 low=1, high=10_000, evaluation=True)
    latents: str = common.flag("4,4", "latents of each scale, the coarsest first, the last at half the image's side: 4,4 is "
                                      "4 of 7x7 and 4 of 14x14")
    num_ch: int = common.flag(32, "channels of encoder and decoder", low=1, high=4096)
    evaluate: str = common.flag("", "further measurements: compression, attack or both, joined by a comma")

    def __post_init__(self):
        sides_of_latents(self)                            # now rather than when a model is built


def sides_of_latents(f):
    """The side of each latent map, from the top level down: seven, four times, then fourteen, four times, for 4,4 and 28x28
    images. Ends the program where --latents asks for none, or for what is not there."""
    side = datasets.image_shape(f.dataset)[1]
    scales = (side & -side).bit_length() - 1              # how often a side halves
    counts = f.latents.split(",")
    if not re.fullmatch(r"[0-9]{1,2}(,[0-9]{1,2})*", f.latents) or len(counts) > scales or not any(map(int, counts)):
        common.stop(f, f"--latents: got {f.latents!r}, wants one number for each scale, coarsest first, as 4,4: for images of "
                       f"{side}x{side} at most {scales} numbers joined by commas, each 0 to 99, not all 0")
    return [side >> k for k, count in zip(range(len(counts), 0, -1), counts) for _ in range(int(count))]


class Bottleneck(nn.Sequential):
    """1x1, 3x3, 3x3 and 1x1 convolutions, half as many channels between them, SiLU before each: (B, c_in, H, W) to
    (B, c_out, H, W). start scales the initial weights of the last one."""

    def __init__(self, c_in, c_out, start=1.0):
        c = max(1, c_in // 2)
        super().__init__(nn.SiLU(), nn.Conv2d(c_in, c, 1), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1),
                         nn.SiLU(), nn.Conv2d(c, c, 3, padding=1), nn.SiLU(), scaled(nn.Conv2d(c, c_out, 1), start))


class Residual(Bottleneck):
    def forward(self, h):
        return h + super().forward(h)


def scaled(layer, start):
    """The layer, its initial weights times start."""
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(start)
    return layer


class Encoder(nn.Module):
    """x (B, c_x, H, W) to the features e of each scale, {side: (B, c, side, side)}, sides H/2, H/4, ... down to `coarsest`."""

    def __init__(self, c_x, c, side, coarsest):
        super().__init__()
        self.x_to_e = nn.Conv2d(c_x, c, 1)
        self.scales = nn.ModuleList(nn.Sequential(*(Residual(c, c) for _ in range(3)))
                                    for _ in range((side // coarsest).bit_length() - 1))

    def forward(self, x):
        e, features = self.x_to_e(x), {}
        for blocks in self.scales:
            e = F.avg_pool2d(blocks(e), 2)
            features[e.shape[-1]] = e
        return features


class Latent(nn.Module):
    """One level: p(z_l|z_>l) and q(z_l|z_>l, x), z_l (B, c_z, side, side), and what becomes of the state s (B, c, side, side).
    The prior reads c_prior channels. Level 1 leaves no state behind: nothing would read it."""

    def __init__(self, side, c_z, c, c_prior, L, level):
        super().__init__()
        self.side, self.parts = side, [c_z, c_z, c if level > 1 else 0]
        self.s_to_p = Bottleneck(c_prior, sum(self.parts), start=0)
        self.s_to_q = Bottleneck(c, 2 * c_z, start=0)
        if level > 1:
            self.z_to_s = scaled(nn.Conv2d(c_z, c, 1), L**-0.5)
            self.s_to_s = Residual(c, c, start=L**-0.5)

    def p(self, s):
        """p(z_l|z_>l), and h, the prior's own update of the state."""
        mean, log_var, h = self.s_to_p(s).to(s.dtype).split(self.parts, dim=1)
        return normal(mean, log_var), h

    def q(self, s, e):
        """q(z_l|z_>l, x)."""
        return normal(*self.s_to_q((e + s) / math.sqrt(2)).to(s.dtype).chunk(2, dim=1))

    def update(self, s, h, z):
        return self.s_to_s(s + h + self.z_to_s(z))


def normal(mean, log_var):
    return Normal(mean, (log_var.clamp(-10, 1) / 2).exp())


class LogisticMixture:
    """p(x) = sum_k w_k prod_c P(x_c; mean_kc, scale_kc) at each pixel, P a logistic's mass in the bin of width 1/255 around
    x_c in {0, 1/255, ..., 1}, its tails in the outer bins (Salimans et al. 2017, arXiv 1701.05517, without the dependence of
    one colour on another). Of parameters (..., K (1 + 2 c_x), H, W): logits of the weights, means and log-scales, in units
    in which x runs from -1 to 1."""

    K = 10

    def __init__(self, parameters):
        c_x = (parameters.shape[-3] // self.K - 1) // 2
        logits, means, log_scales = parameters.split([self.K, self.K * c_x, self.K * c_x], dim=-3)
        self.log_weights = logits.log_softmax(-3)                                          # (..., K, H, W)
        self.means = means.unflatten(-3, (self.K, c_x))                                    # (..., K, c_x, H, W)
        self.scales = log_scales.unflatten(-3, (self.K, c_x)).clamp(min=-7).exp()

    def log_prob(self, x):
        """log p(x) in nats of each pixel, x (..., c_x, H, W): (..., H, W)."""
        x = x.unsqueeze(-4)
        upper, lower = ((2 * x - 1 - self.means + edge / 255) / self.scales for edge in (1, -1))
        # log(sigmoid(upper) - sigmoid(lower)) = log sigmoid(upper) + log sigmoid(-lower) + log(1 - exp(lower - upper)),
        # where an outer bin has no outer edge
        inner = (-torch.expm1(-2 / 255 / self.scales)).log()
        log_below = torch.where(x > 1 - 0.5 / 255, 0, F.logsigmoid(upper))
        log_above = torch.where(x < 0.5 / 255, 0, F.logsigmoid(-lower))
        inner = torch.where((x - 0.5).abs() > 0.5 - 0.5 / 255, 0, inner)
        return (self.log_weights + (log_below + log_above + inner).sum(-3)).logsumexp(-3)

    @property
    def mean(self):
        """The mean of the logistics, (..., c_x, H, W), in [0, 1]."""
        return ((self.log_weights.exp().unsqueeze(-3) * self.means.clamp(-1, 1)).sum(-4) + 1) / 2


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
        self.centre = 0.5 if f.context == "downsample" else 0.0

    def fit(self, images):
        """Measure on the training images what the map needs, and mean and std of their f(x), which are about those of r(u);
        that is no narrower than its p(u|z_0)."""
        if self.kind == "linear":
            _, directions = theory.modes(theory.second_moment(images.flatten(0, 1).flatten(1)))
            self.A.copy_(directions[:, :self.k**2].T)
            self.A_inverse.copy_(directions[:, :self.k**2])
        if self.kind != "downsample":
            self.extent.copy_((images.flatten(2) @ self.A.T).abs().amax(0).clamp(min=1e-3))
        u = self(images)
        self.mean.copy_(u.mean(0))
        self.std.copy_(u.std(0).clamp(min=math.exp(Diffusion.GAMMA_0 / 2)))

    def forward(self, x):
        """f(x), (B, c_x, k, k), of x (B, c_x, H, H)."""
        with torch.autocast(x.device.type, enabled=False):
            return ((x.flatten(2) @ self.A.T - self.centre) / self.extent).unflatten(2, (self.k, self.k))

    def image(self, u):
        """The image (B, c_x, H, H) of u (B, c_x, k, k)."""
        with torch.autocast(u.device.type, enabled=False):
            return ((self.centre + self.extent * u.flatten(2)) @ self.A_inverse.T).unflatten(2, (self.side, self.side))


class UNetBlock(nn.Module):
    """A residual block of two 3x3 convolutions that is told the time: h (N, c, k, k), time (N, c_time)."""

    def __init__(self, c, c_time):
        super().__init__()
        self.first, self.second = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.time = nn.Linear(c_time, c)

    def forward(self, h, time):
        inner = self.first(F.silu(h)) + self.time(time)[:, :, None, None]
        return h + self.second(F.silu(inner))


class Diffusion(nn.Module):
    """r(u), u (N, c_u, k, k), a variational diffusion model (Kingma et al. 2021, arXiv 2107.00630):

        q(z_t|u) = N(alpha_t u, sigma_t^2),  alpha_t^2 = sigmoid(-gamma(t)),  sigma_t^2 = sigmoid(gamma(t)),  t in [0, 1]
        p(z_1) = N(0, I),  p(u|z_0) = N(z_0 / alpha_0, sigma_0^2 / alpha_0^2)
        p(z_s|z_t) = q(z_s|z_t, u) at u = (z_t - sigma_t eps^) / alpha_t,  s = t - 1/T
        eps^(z_t, t) = sigma_t z_t + a U-Net of z_t and t, which starts at 0, the optimum if u ~ N(0, I)

    With z_t = alpha_t u + sigma_t eps_t, q is an autoregression in the noise: eps_s = rho eps_t + sqrt(1 - rho^2) eta with
    rho = exp((gamma(s) - gamma(t)) / 2), and KL(q(z_s|z_t, u) || p(z_s|z_t)) = expm1(gamma(t) - gamma(s)) |eps_t - eps^|^2 / 2.
    """

    GAMMA_0, GAMMA_1 = -6.0, 7.0

    def __init__(self, c_u, c=16):
        super().__init__()
        self.register_buffer("frequencies", 1000 * 10**(-4 * torch.arange(c) / c), persistent=False)
        self.time = nn.Sequential(nn.Linear(2 * c, 4 * c), nn.SiLU(), nn.Linear(4 * c, 4 * c), nn.SiLU())
        self.first = nn.Conv2d(c_u, c, 3, padding=1)
        self.down, self.middle_1, self.middle_2, self.up = (UNetBlock(c, 4 * c) for _ in range(4))
        self.last = scaled(nn.Conv2d(c, c_u, 3, padding=1), 0)

    def alpha_sigma(self, t):
        gamma = self.GAMMA_0 + (self.GAMMA_1 - self.GAMMA_0) * t
        return gamma.neg().sigmoid().sqrt(), gamma.sigmoid().sqrt()

    def epsilon(self, z, t):
        """eps^(z_t, t), like z (N, c_u, k, k); t (N, 1, 1, 1)."""
        angles = t.flatten(1) * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        fine = self.down(self.first(z), time)
        coarse = F.avg_pool2d(fine, 2, ceil_mode=True)    # 7x7 to 4x4
        coarse = self.middle_2(self.middle_1(coarse, time), time)
        fine = self.up(fine + F.interpolate(coarse, size=z.shape[-2:]), time)
        return self.alpha_sigma(t)[1] * z + self.last(F.silu(fine))

    def ends(self, u):
        """KL(q(z_1|u) || p(z_1)) + E_q[-log p(u|z_0)], in nats per coefficient, like u."""
        alpha, sigma = self.alpha_sigma(everywhere(u, 1.0))
        return (alpha**2 * u**2 + sigma**2 - 1 - 2 * sigma.log()) / 2 + (math.log(2 * math.pi * math.e) + self.GAMMA_0) / 2

    def loss(self, u):
        """The bound on -log r(u) for T to infinity, in nats per coefficient, like u, at one random t and noise each row."""
        t, noise = common.uniform_like(u[:, :1, :1, :1]), common.normal_like(u)
        alpha, sigma = self.alpha_sigma(t)
        error = noise - self.epsilon(alpha * u + sigma * noise, t)
        return self.ends(u) + (self.GAMMA_1 - self.GAMMA_0) / 2 * error**2

    def bound(self, u, T):
        """Over T steps, at one trajectory z_1, ..., z_0 drawn from q given u: the bound on -log r(u) in nats per coefficient,
        like u, and log r(u, z_0, ..., z_1) - log q(z_0, ..., z_1|u), (N,). The mean of the latter is -bound, and the mean of
        its exponential r(u), the density of what `sample` draws; that of exp(-bound) would be too large."""
        step = (self.GAMMA_1 - self.GAMMA_0) / T
        rho, weight = math.exp(-step / 2), math.expm1(step)
        alpha, sigma = self.alpha_sigma(everywhere(u, 1.0))
        noise = common.normal_like(u)
        bound = self.ends(u)
        log_r = (noise**2 - (alpha * u + sigma * noise)**2) / 2 + sigma.log()              # log p(z_1) - log q(z_1|u)
        for i in range(T, 0, -1):
            t = everywhere(u, i / T)
            alpha, sigma = self.alpha_sigma(t)
            error, eta = noise - self.epsilon(alpha * u + sigma * noise, t), common.normal_like(u)
            kl = weight / 2 * error**2
            bound = bound + kl
            log_r = log_r - kl + math.sqrt(weight) * error * eta                           # log p(z_s|z_t) - log q(z_s|z_t, u)
            noise = rho * noise + math.sqrt(1 - rho**2) * eta
        log_r = log_r - (noise**2 + math.log(2 * math.pi) + self.GAMMA_0) / 2              # log p(u|z_0)
        return bound, log_r.flatten(1).sum(1)

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
        c_x, side, _ = datasets.image_shape(f.dataset)
        sides = sides_of_latents(f)
        L = self.learned_levels = len(sides)
        self.levels, self.side, self.widest_layer = L + 1, side, f.num_ch * side**2
        c_out = LogisticMixture.K * (1 + 2 * c_x) if f.dataset == "cifar10" else c_x
        self.context, self.r = Context(f), Diffusion(c_x)
        self.raw_v = nn.Parameter(torch.zeros(c_x, f.context_size, f.context_size))
        self.encoder = Encoder(c_x, f.num_ch, side, sides[0])
        self.register_buffer("s_start", torch.ones(1, f.num_ch, sides[0], sides[0]), persistent=False)
        self.latents = nn.ModuleList(Latent(sides[L - l], c_x, f.num_ch, f.num_ch + c_x, L, l) for l in range(L, 0, -1))
        self.z_to_x = nn.Sequential(nn.Conv2d(c_x, f.num_ch, 1), nn.SiLU(), nn.Conv2d(f.num_ch, c_out, 3, padding=1))

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
        return Bernoulli(logits=out) if out.shape[-3] == 1 else LogisticMixture(out)

    def forward(self, x, f, sample_shape=()):
        """x (B, c_x, H, W). Terms of the ELBO at a draw of u and all latents, in nats; shapes as report.py says. The KL of u is
        the diffusion model's bound on it, which at one draw can be negative; the model's steps are latents too where log_w
        weights a draw."""
        shape = (*sample_shape, len(x))

        def repeated(e):                                  # (B, ...) -> (S B, ...)
            return e.expand(*sample_shape, *e.shape).flatten(0, len(sample_shape))

        def units(values):                                # (S B, c_z, side, side) -> (S, B, d)
            return values.flatten(1).unflatten(0, shape)

        q_u = self.q_u(x)
        q_u = Normal(repeated(q_u.mean), repeated(q_u.stddev))
        u = draw(q_u)
        features = {side: repeated(e) for side, e in self.encoder(x).items()}
        drawn = list(self.top_down(u, features, lambda l, p, q: draw(q)))[::-1]            # level 1 first
        log_px_z = self.p_x([z for _, _, z in drawn], shape).log_prob(x).flatten(len(shape)).sum(-1)
        bound, log_r = (self.r.loss(u), None) if self.training else self.r.bound(u, f.num_steps)
        terms = {"log_px_z": log_px_z} | {f"kl_{l}": units(kl_divergence(q, p)) for l, (p, q, _) in enumerate(drawn, 1)}
        terms[f"kl_{self.levels}"] = units(bound - q_u.entropy())
        if not self.training:
            terms["log_w"] = log_px_z + sum(units(p.log_prob(z) - q.log_prob(z)).sum(-1) for p, q, z in drawn)
            terms["log_w"] = terms["log_w"] + log_r.unflatten(0, shape) - units(q_u.log_prob(u)).sum(-1)
            terms |= {f"mean_{l}": units((q.mean - p.mean) / p.stddev) for l, (p, q, _) in enumerate(drawn, 1)}
            terms[f"mean_{self.levels}"] = units((q_u.mean - self.context.mean) / self.context.std)
            if f.dataset == "cifar10":                    # the ELBO's, at this draw
                elbo = log_px_z - sum(terms[f"kl{level}"].sum(-1) for level in common.levels(terms))
                terms["bits_per_dim"] = -elbo / (x[0].numel() * math.log(2))
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO, -log p(x|z) + beta sum_l KL_l, in nats, (B,)."""
        loss = -terms["log_px_z"]
        for level in common.levels(terms):
            loss = loss + f.beta * terms[f"kl{level}"].sum(-1)
        return loss

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
            panels[f"levels {l} down drawn from the prior"] = self.reconstruct(x, f, L - l, draw)
        return panels

    def samples(self, n, f):
        u = self.r.sample(self.context.mean.expand(n, -1, -1, -1), f.num_steps)
        images = self.p_x([z for _, _, z in self.top_down(u, None, lambda l, p, q: draw(p))]).mean
        return {"pseudoinputs": self.context.image(u), "what comes of them": images}


def draw(normal):
    return normal.mean + normal.stddev * common.normal_like(normal.mean)


def train(model, f, data, loop):
    """Minimise -log p(x|z) + beta (sum_l KL_l + the bound on KL(q(u|x) || r(u))) over --num_epochs. Returns the average of the
    weights, which is evaluated."""
    model.context.fit(data.train[0])
    optimizer = deep.adamax(model, f, f.weight_decay)
    schedule, average, parallel = deep.warmup_cosine(optimizer, f, loop.steps), deep.WeightAverage(model, f), deep.parallel(model)

    def step(rows):
        x = data.train[0].index_select(0, rows)
        if f.dataset != "cifar10":
            x = common.binarise(x)                        # afresh at each visit
        with deep.autocast(f):
            terms = parallel(x, f)
        means = common.means(model.loss(terms, f), terms)
        optimizer.zero_grad()
        means["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), f.grad_clip)
        optimizer.step()
        average.update(model)
        loop.record(means)

    step = loop.replayed(step)
    for rows in loop.batches(model=model, average=average, optimizer=optimizer, schedule=schedule):
        step(rows)
        schedule.step()
    return average.module


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    deep.check_further(settings)
    data = datasets.load_images(settings)
    models = training.fit(DVPVAE, settings, data, train=train)
    status = report.report(models, settings, data)
    deep.evaluate_further(models, settings, data)
    return status


if __name__ == "__main__":
    common.run(main)
