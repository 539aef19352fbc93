"""DCT-VAE on MNIST: a context on top of a ladder VAE that is computed from x, so that it cannot collapse.

    CUDA_VISIBLE_DEVICES=0 python MNIST_HVAE_DCT.py
    python MNIST_HVAE_DCT.py --dataset cifar10 --bits 5 --latents 2,2,2

Kuzina & Tomczak (2023, arXiv 2302.09976): the top latent is the corner of low frequencies of the image's discrete cosine
transform, scaled and quantised. Its posterior is a point mass, its KL therefore -log p of what it is, under a diffusion model.
Below it a ladder VAE, into whose state the context goes at each new scale and whose decoder reads that state; with --decoder
aggregate the one of MNIST_HVAE_Ladder.py, which it gives the start of the state and a part of what each prior reads.
"""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn import functional as F

import common
import datasets
import deep
import report
import training


@dataclass
class Flags(deep.DeepFlags):
    # What two CPU cores can do in minutes; the defaults are the published setting, for a GPU.
    small = ("--latents 2,2 --num_ch 16 --diffusion_ch 8 --decoder aggregate --batch_size 100 --num_epochs 12 --num_samples 100 "
             "--num_test 1000")
    batch_size: int = common.flag(128, "examples per gradient step and process", low=1)
    num_epochs: int = common.flag(600, "passes over the training set", low=1)
    optimizer: str = common.flag("adamw", "optimiser of the weights", choices=("adamax", "adamw"))
    lr: float = common.flag(1e-3, "the optimiser's learning rate", above=0)
    lr_schedule: str = common.flag("constant", "after the warm-up", choices=("constant", "cosine"))
    warmup_epochs: float = common.flag(0.0, "epochs in which the learning rate rises from 0", low=0)
    weight_decay: float = common.flag(1e-2, "the optimiser's weight decay", low=0)
    grad_clip: float = common.flag(543.0, "largest gradient norm", above=0)
    ema: float = common.flag(0.0, "weight of the past in the average of the weights that is evaluated", low=0, high=0.999999)
    context_size: int = common.flag(7, "frequencies of the context along each axis", low=1, high=28)
    bits: int = common.flag(0, "bits of each coefficient of the context; 0 is 2, of cifar10 5", low=0, high=12)
    step_variance: str = common.flag("learned", "variance of each step of the diffusion model, or fixed to the least",
                                     choices=("learned", "fixed"))
    diffusion_ch: int = common.flag(32, "channels of the diffusion model's network", low=1, high=4096)
    decoder: str = common.flag("state", "what p(x|z) reads: the state that all latents went into, or the latents' aggregate",
                               choices=("state", "aggregate"), before="aggregate")
    latents: str = common.flag("3,4", "latents of each scale, the coarsest first, the last at half the image's side, of cifar10 at "
                                      "the whole: 3,4 is 3 of 7x7 and 4 of 14x14")
    d_z: int = common.flag(0, "channels of a latent; 0 is 1, of cifar10 8", low=0, high=4096)
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
    the initial weights of the last one; a gate, a learned factor, starts at 0 (ReZero: Bachlechner et al. 2021, arXiv 2003.04887)."""

    def __init__(self, c_in, c_out, hidden, start=1.0, gate=False):
        super().__init__(nn.Conv2d(c_in, hidden, 1), nn.SiLU(), nn.Conv2d(hidden, hidden, 3, padding=1), nn.SiLU(),
                         nn.Conv2d(hidden, hidden, 3, padding=1), nn.SiLU(), deep.scaled(nn.Conv2d(hidden, c_out, 1), start))
        self.gate = nn.Parameter(torch.zeros(())) if gate else None

    def forward(self, h):
        return super().forward(h) if self.gate is None else self.gate * super().forward(h)


class Head(nn.Module):
    """What a state says of a distribution: a 1x1 convolution, if --linear_path, plus a bottleneck that starts at 0."""

    def __init__(self, f, c_in, c_out):
        super().__init__()
        self.block = Bottleneck(c_in, c_out, f.d_hidden or f.num_ch, start=0)
        self.linear = nn.Conv2d(c_in, c_out, 1) if f.linear_path else None

    def forward(self, s):
        return self.block(s) if self.linear is None else self.block(s) + self.linear(s)


class Encoder(nn.Module):
    """x (B, c_x, H, W) to the features e of each scale, {side: (B, c, side, side)}, from the finest side that there can be down:
    of the published decoder by a gated block a latent, of the aggregate's by three."""

    def __init__(self, f, sides):
        super().__init__()
        c, own, finest = f.num_ch, f.decoder == "state", deep.finest_side(f)
        self.sides = [finest >> k for k in range((finest // min(sides)).bit_length())]
        self.x_to_e = nn.Conv2d(datasets.image_shape(f.dataset)[0], c, 1)
        self.scales = nn.ModuleList(nn.ModuleList(Bottleneck(c, c, f.d_hidden or c, gate=own)
                                                  for _ in range(max(1, sides.count(side)) if own else 3)) for side in self.sides)

    def forward(self, x):
        e, features = self.x_to_e(x), {}
        for side, blocks in zip(self.sides, self.scales):
            for block in blocks:
                e = e + block(F.silu(e))
            e = features[side] = F.avg_pool2d(e, e.shape[-1] // side)
        return features


class Latent(nn.Module):
    """One level: p(z_l|z_>l, c) and q(z_l|z_>l, c, x), z_l (B, c_z, side, side), and what becomes of the state s (B, c, side, side).
    The aggregate's decoder reads the context in each prior, has a block after each latent, and no state after the last."""

    def __init__(self, f, side, c_z, L, level):
        super().__init__()
        c, self.own = f.num_ch, f.decoder == "state"
        leaves_state = self.own or level > 1
        self.side, self.parts = side, [c_z, c_z, c if leaves_state else 0]
        self.s_to_p = Head(f, c if self.own else c + datasets.image_shape(f.dataset)[0], sum(self.parts))
        self.s_to_q = Head(f, c, 2 * c_z)
        self.z_to_s = deep.scaled(nn.Conv2d(c_z, c, 1), L**-0.5) if leaves_state else None
        self.s_to_s = Bottleneck(c, c, f.d_hidden or c, start=L**-0.5) if leaves_state and not self.own else None

    def p(self, s, context):
        """p(z_l|z_>l, c), and h, the prior's own update of the state."""
        mean, log_var, h = self.s_to_p(s if self.own else torch.cat([s, context], dim=1)).to(s.dtype).split(self.parts, dim=1)
        return normal(mean, log_var.clamp(-10, 1)), h

    def q(self, s, e):
        """q(z_l|z_>l, c, x)."""
        mean, raw = self.s_to_q((e + s) / math.sqrt(2)).to(s.dtype).chunk(2, dim=1)
        return normal(mean, -F.softplus(raw).clamp(max=5) if self.own else raw.clamp(-10, 1))

    def update(self, s, h, z):
        s = s + h + self.z_to_s(z)
        return s if self.own else s + self.s_to_s(s)


def normal(mean, log_var):
    return Normal(mean, (log_var / 2).exp())


class DCT(nn.Module):
    """The context of images, c (B, c_x, k, k) in {-1, ..., 1 - step}, step = 2^(1 - bits), and the image that a context is:

        y_uv = sum_ij a_u a_v x_ij cos(pi u (2 i + 1) / 2 H) cos(pi v (2 j + 1) / 2 H),  u, v < k,  a_0^2 = 1/H, else 2/H
        c = y / largest, to the nearest of the 2^bits multiples of step

    and back: the multiples of step that c is, times largest, are y, whose inverse transform takes higher frequencies for 0.
    """

    def __init__(self, c_x, side, k, bits):
        super().__init__()
        self.step = 2.0**(1 - bits)
        i, u = torch.arange(side, dtype=torch.float64), torch.arange(k)[:, None]
        basis = ((2 - (u == 0).double()) / side).sqrt() * (math.pi / (2 * side) * u * (2 * i + 1)).cos()
        self.register_buffer("basis", basis.float(), persistent=False)                     # (k, H), orthonormal rows
        self.register_buffer("largest", torch.ones(c_x, k, k))
        self.register_buffer("levels", torch.arange(-1, 1, self.step), persistent=False)
        self.register_buffer("log_shares", torch.zeros(len(self.levels), c_x, k, k))

    def fit(self, images):
        """Measure on the training images (as they are, not binarised: binary draws of them go a little beyond, and are clamped) the
        largest magnitude of each coefficient, and how often it is at each level, once more than it is."""
        self.largest.copy_(self.transform(images).abs().amax(0).clamp(min=1e-6))
        c = self(images)
        for level, log_share in zip(self.levels, self.log_shares):
            log_share.copy_((((c == level).sum(0) + 1) / (len(c) + len(self.levels))).log())

    def log_independent(self, c):
        """log p(c) of contexts (B, c_x, k, k), (B,), if all coefficients were independent: what p(c) is to be better than."""
        return sum(torch.where(c == level, of, 0) for level, of in zip(self.levels, self.log_shares)).flatten(1).sum(1)

    def transform(self, x):
        return self.basis @ x @ self.basis.T

    def forward(self, x):
        """x (B, c_x, H, H) in [0, 1] to its context (B, c_x, k, k)."""
        with torch.autocast(x.device.type, enabled=False):
            return self.quantise(self.transform(x) / self.largest)

    def quantise(self, y):
        return ((y / self.step).round() * self.step).clamp(-1, 1 - self.step)

    def image(self, c):
        """A context (B, c_x, k, k) to its image (B, c_x, H, H)."""
        with torch.autocast(c.device.type, enabled=False):
            return self.basis.T @ (c * self.largest) @ self.basis


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
    """p(c) of contexts c (N, c_x, k, k), multiples of `step`, by a diffusion model (Ho et al. 2020, arXiv 2006.11239):

        q(c_t|c) = N(sqrt(A_t) c, (1 - A_t) I),  A_t = prod_{i <= t} (1 - beta_i),  beta linear in t = 1, ..., T
        p(c_T) = N(0, I)
        p(c_{t-1}|c_t) = N(mean of q(c_{t-1}|c_t, c) at c = c^(c_t, t), exp(v(c_t, t)) times its variance),  t > 1
        p(c|c_1): the mass that N(c^(c_1, 1), exp(v(c_1, 1)) s^2), s learned, has in the bin of width step around c, tails in
        the outer bins

        -log p(c) <= KL(q(c_T|c) || p(c_T)) + sum_{t > 1} E KL(q(c_{t-1}|c_t, c) || p(c_{t-1}|c_t)) + E[-log p(c|c_1)]

    c^ and v are two outputs of a UNet, the clean value and, if --step_variance learned, the log of a variance's factor (after Nichol
    & Dhariwal 2021, arXiv 2102.09672), else 0. With R_t = A_t / (1 - A_t) and a = sqrt(R_{t-1} - R_t) (c^ - c), how many
    standard deviations of q the means are apart, the KL of step t is (exp(-v) (1 + a^2) - 1 + v) / 2.
    """

    # A smaller beta_1 leaves the T steps too far apart for their Gaussians, a larger one leaves too much to p(c|c_1), which knows
    # no dependence between coefficients.
    T, BETA_1, BETA_T, BLOCKS = 7, 0.1, 0.6, 3

    def __init__(self, c_x, k, step, c, learned=True):
        super().__init__()
        self.step, self.learned, T = step, learned, self.T
        beta = torch.linspace(self.BETA_1, self.BETA_T, T, dtype=torch.float64)
        A = (1 - beta).cumprod(0)
        before = torch.cat([torch.ones_like(A[:1]), A[:-1]])                               # A_{t-1}
        drop = before / (1 - before) - A / (1 - A)        # R_{t-1} - R_t
        drop[0] = 0                                       # the first step has another likelihood
        # q(c_{t-1}|c_t, c) = N(of_clean c + of_noisy c_t, std^2)
        for name, value in dict(signal=A.sqrt(), noise=(1 - A).sqrt(), drop=drop, of_clean=before.sqrt() * beta / (1 - A),
                                of_noisy=(1 - beta).sqrt() * (1 - before) / (1 - A),
                                std=((1 - before) / (1 - A) * beta).sqrt()).items():
            self.register_buffer(name, value.float().view(T, 1, 1, 1), persistent=False)
        self.log_s = nn.Parameter(torch.full((c_x, k, k), math.log(0.25)))
        self.network = UNet(c_x, 2 * c_x if learned else c_x, c, self.BLOCKS)

    def clean(self, c_t, t):
        """c^(c_t, t) and v(c_t, t), like c_t (N, c_x, k, k); t (N,) counts from 0."""
        out = self.network(c_t, t.to(c_t.dtype) / self.T).to(c_t.dtype)
        if not self.learned:
            return out, torch.zeros_like(out)
        clean, raw = out.chunk(2, dim=1)
        return clean, 5 * (raw / 5).tanh()

    def log_p_first(self, c, mean, v):
        """log p(c|c_1), per coefficient, like c, from mean = c^(c_1, 1) and v(c_1, 1)."""
        std = (self.log_s + v / 2).exp()
        return log_binned_normal(c, mean, std, self.step, c < self.step / 2 - 1, c > 1 - 1.5 * self.step)

    def last(self, c):
        """KL(q(c_T|c) || p(c_T)), per coefficient, like c."""
        A = self.signal[-1]**2
        return (A * c**2 - A - torch.log1p(-A)) / 2

    def loss(self, c):
        """The bound on -log p(c), in nats per coefficient, like c, its sum over t estimated by one random t of each row."""
        t = (common.uniform_like(c[:, 0, 0, 0]) * self.T).long()
        c_t = self.signal[t] * c + self.noise[t] * common.normal_like(c)
        clean, v = self.clean(c_t, t)
        kl = ((-v).exp() * (1 + self.drop[t] * (c - clean)**2) - 1 + v) / 2
        return self.last(c) + self.T * torch.where(t.view(-1, 1, 1, 1) > 0, kl, -self.log_p_first(c, clean, v))

    def bound(self, c):
        """At one trajectory c_T, ..., c_1 drawn from q given c: the bound on -log p(c), in nats per coefficient, like c, and
        log p(c, c_1, ..., c_T) - log q(c_1, ..., c_T|c), (N,). The mean of the latter is -bound, the mean of its exponential
        p(c)."""
        eps = common.normal_like(c)
        c_t = self.signal[-1] * c + self.noise[-1] * eps
        bound, log_ratio = self.last(c), (eps**2 - c_t**2) / 2 + self.noise[-1].log()
        for t in range(self.T - 1, 0, -1):
            eps, (clean, v) = common.normal_like(c), self.clean(c_t, all_of(c, t))
            apart = self.drop[t].sqrt() * (clean - c)     # of the means of p and q, in standard deviations of q
            bound = bound + ((-v).exp() * (1 + apart**2) - 1 + v) / 2
            log_ratio = log_ratio + (eps**2 - (-v).exp() * (eps - apart)**2 - v) / 2
            c_t = self.of_clean[t] * c + self.of_noisy[t] * c_t + self.std[t] * eps
        first = self.log_p_first(c, *self.clean(c_t, all_of(c, 0)))
        return bound - first, (log_ratio + first).flatten(1).sum(1)

    def sample(self, n, noise=common.normal_like):
        """(n, c_x, k, k), whose nearest levels are n draws of p(c). noise=torch.zeros_like gives the means of all steps."""
        c_t = noise(self.log_s.expand(n, -1, -1, -1))
        for t in range(self.T - 1, 0, -1):
            clean, v = self.clean(c_t, all_of(c_t, t))
            c_t = self.of_clean[t] * clean + self.of_noisy[t] * c_t + self.std[t] * (v / 2).exp() * noise(c_t)
        clean, v = self.clean(c_t, all_of(c_t, 0))
        return clean + (self.log_s + v / 2).exp() * noise(c_t)


def all_of(c, t):
    """The step t of each row of c, (N,)."""
    return torch.full_like(c[:, 0, 0, 0], t)


def log_binned_normal(c, mean, std, width, lowest, highest):
    """log of the mass that N(mean, std^2) has in the bin of this width around c, without a lower end where `lowest`, without
    an upper end where `highest`: all (...)."""
    # By symmetry from the side where the bin is in the lower tail: differences of masses near 1 would be rounding.
    side = torch.where(c > mean, -1, 1)
    ends = ((side * (c - mean) + half) / std for half in (-width / 2, width / 2))
    lower, upper = (torch.special.log_ndtr(end) for end in ends)
    open_below, open_above = torch.where(side > 0, lowest, highest), torch.where(side > 0, highest, lowest)
    upper = torch.where(open_above, 0, upper)
    return torch.where(open_below, upper, upper + torch.log(-torch.expm1(torch.where(open_below, -1, lower - upper))))


class DCTVAE(nn.Module):
    """p(x, z, c) = p(x|z_1..z_L) prod_l p(z_l|z_>l, c) p(c),  q(z, c|x) = [c = DCT(x)] prod_l q(z_l|z_>l, c, x), from the top:

        p(c)                                                              Diffusion; c is level L + 1
        s <- upsample(s) + conv(image of c)                               at each new scale; s = 1 at the start; the image
        p(z_l|z_>l, c), h = prior block(s)                                pooled to this scale, as e, the encoder's feature
        q(z_l|z_>l, c, x) = posterior block((e + s) / sqrt 2)
        s <- s + h + conv z_l
        p(x|z) = Bernoulli(conv silu (s + block(s))) of the upsampled s,  cifar10: LogisticMixture(the same)

    With --decoder aggregate, as of MNIST_HVAE_DVP.py:

        p(z_l|z_>l, c), h = prior block([s, image of c])                  the image is added to s at the start alone
        s <- block(s + h + conv z_l)
        p(x|z) = Bernoulli(conv silu conv sum_l upsample(z_l) / sqrt L)
    """

    elbo_draws = 1

    def __init__(self, f):
        super().__init__()
        self.c_x, self.side, _ = datasets.image_shape(f.dataset)
        c_x, c, sides, self.own = self.c_x, f.num_ch, deep.sides_of_latents(f), f.decoder == "state"
        c_z = f.d_z or (8 if f.dataset == "cifar10" else 1)
        L = self.learned_levels = len(sides)
        self.levels, self.widest_layer = L + 1, c * self.side**2
        self.dimensions = c_x * self.side**2 if f.dataset == "cifar10" else 0
        c_out = deep.LogisticMixture.K * deep.LogisticMixture.n(c_x) if self.dimensions else c_x
        self.dct = DCT(c_x, self.side, f.context_size, f.bits or (5 if f.dataset == "cifar10" else 2))
        self.p_c = Diffusion(c_x, f.context_size, self.dct.step, f.diffusion_ch, f.step_variance == "learned")
        scales = sorted(set(sides)) if self.own else sides[:1]
        self.context_to_s = nn.ModuleDict({str(side): nn.Conv2d(c_x, c, 1) for side in scales})
        self.encoder = Encoder(f, sides)
        self.register_buffer("s_start", torch.ones(1, c, sides[0], sides[0]), persistent=False)
        self.latents = nn.ModuleList(Latent(f, sides[L - l], c_z, L, l) for l in range(L, 0, -1))
        self.last_block = Bottleneck(c, c, f.d_hidden or c, gate=True) if self.own else nn.Conv2d(c_z, c, 1)
        self.to_x = nn.Sequential(nn.SiLU(), nn.Conv2d(c, c_out, 3, padding=1))

    def top_down(self, c, features, choose):
        """[(p(z_l|z_>l, c), q(z_l|z_>l, c, x), z_l = choose(l, p, q)) for l = L, ..., 1], each (n, c_z, side, side), of contexts
        c (n, c_x, k, k), and what p(x|z) reads: the last state or the sum of latents. Without features q is None."""
        image, s, drawn = self.dct.image(c), self.s_start.expand(len(c), -1, -1, -1), []
        for l, latent in zip(range(self.learned_levels, 0, -1), self.latents):
            context = F.avg_pool2d(image, self.side // latent.side)
            new_scale = not drawn or latent.side != s.shape[-1]
            s = F.interpolate(s, size=latent.side)
            if new_scale and str(latent.side) in self.context_to_s:
                s = s + self.context_to_s[str(latent.side)](context)
            p, h = latent.p(s, context)
            q = latent.q(s, features[latent.side]) if features else None
            z = choose(l, p, q)
            drawn.append((p, q, z))
            if latent.z_to_s is not None:
                s = latent.update(s, h, z)
        return drawn, s if self.own else [z for _, _, z in drawn]

    def p_x(self, found, shape=(-1,)):
        """p(x|z), n = shape's product of them, of the second of what top_down returns; its pixels are (*shape, c_x, H, W)."""
        if self.own:
            s = F.interpolate(found, size=self.side)
            s = s + self.last_block(s)
        else:
            s = self.last_block(sum(F.interpolate(z, size=self.side, mode="bilinear") for z in found) / math.sqrt(self.learned_levels))
        out = self.to_x(s).to(self.s_start.dtype).unflatten(0, shape)
        return deep.LogisticMixture(out, self.c_x) if self.dimensions else Bernoulli(logits=out)

    def forward(self, x, f, sample_shape=()):
        """x (B, c_x, H, W). Terms of the ELBO at a draw of all latents, in nats; shapes as report.py says. The KL of the context
        is the diffusion model's bound on -log p(c); its steps are latents too where log_w weights a draw."""
        shape = (*sample_shape, len(x))

        def repeated(e):                                  # (B, ...) -> (S B, ...)
            return e.expand(*sample_shape, *e.shape).flatten(0, len(sample_shape))

        def units(values):                                # (S B, c_z, side, side) -> (S, B, d)
            return values.flatten(1).unflatten(0, shape)

        c, features = self.dct(x), {side: repeated(e) for side, e in self.encoder(x).items()}
        drawn, found = self.top_down(repeated(c), features, lambda l, p, q: deep.draw(q))
        log_px_z = self.p_x(found, shape).log_prob(x).flatten(len(shape)).sum(-1)
        bound, log_p_c = (self.p_c.loss(c), None) if self.training else self.p_c.bound(repeated(c))
        levels = list(enumerate(drawn[::-1], 1))          # level 1 first
        terms = {"log_px_z": log_px_z} | {f"kl_{l}": units(kl_divergence(q, p)) for l, (p, q, _) in levels}
        terms[f"kl_{self.levels}"] = units(bound)
        if not self.training:                             # log p(c) + log p(x|c), each by draws of its own
            terms["log_w"] = log_px_z + sum(units(p.log_prob(z) - q.log_prob(z)).sum(-1) for p, q, z in drawn)
            terms["log_w_c"] = log_p_c.unflatten(0, shape)
            terms |= {f"mean_{l}": units((q.mean - p.mean) / p.stddev) for l, (p, q, _) in levels}
            terms[f"mean_{self.levels}"] = c.flatten(1)
            terms["context_baseline"] = -self.dct.log_independent(c)
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO, -log p(x|z) + beta sum_l KL_l, in nats, (B,); --free_bits of every learned level cost nothing."""
        *learned, context = (terms[f"kl{level}"] for level in common.levels(terms))
        return -terms["log_px_z"] + f.beta * (context.sum(-1) + sum(common.free_bits(kl, f.free_bits).sum(-1) for kl in learned))

    def top_posterior(self, x, f, levels):
        """q(z_l|z_>l, c, x) of the top learned levels, z_>l the means of theirs: a list of Normal, differentiable in
        x (B, c_x, H, W) but for the context, which is quantised."""
        drawn, _ = self.top_down(self.dct(x), self.encoder(x), lambda l, p, q: q.mean)
        return [q for _, q, _ in drawn[:levels]]

    def reconstruct(self, x, f, keep, below=lambda p: p.mean):
        """Means of p(x|z), (B, c_x, H, W): the top `keep` levels are the context and the means of q, those below the means of
        p, or what below(p) is. Without the context, keep = 0, it is what the means of all steps of p(c) lead to."""
        c = self.dct(x) if keep else self.dct.quantise(self.p_c.sample(len(x), torch.zeros_like))
        _, found = self.top_down(c, self.encoder(x), lambda l, p, q: q.mean if l > self.levels - keep else below(p))
        return self.p_x(found).mean

    def reconstructions(self, x, f):
        L = self.levels
        panels = {"test images": x, "contexts": self.dct.image(self.dct(x)),
                  "reconstructed through all levels": self.reconstruct(x, f, L)}
        for l in sorted({math.ceil((L - 1) * third / 3) for third in (1, 2, 3)}):          # at last only the context is kept
            panels[f"levels {l} down drawn from the prior"] = self.reconstruct(x, f, L - l, deep.draw)
        return panels

    def samples(self, n, f):
        c = self.dct.quantise(self.p_c.sample(n))
        _, found = self.top_down(c, None, lambda l, p, q: deep.draw(p, f.temperature))
        return {"contexts": self.dct.image(c), "what comes of them": self.p_x(found).mean}


def train(model, f, data, loop):
    """Minimise -log p(x|z) + beta sum_l KL_l over --num_epochs. Returns the average of the weights, which is evaluated."""
    model.dct.fit(data.train[0])
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
    return average.module


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    data = datasets.load_images(settings)
    models = training.fit(DCTVAE, settings, data, train=train)
    status = report.report(models, settings, data)
    deep.evaluate_further(models, settings, data)
    return status


if __name__ == "__main__":
    common.run(main)
