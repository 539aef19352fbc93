"""DCT-VAE on MNIST: does a context computed from x, which cannot collapse, help a ladder VAE?

    CUDA_VISIBLE_DEVICES=0 python MNIST_HVAE_DCT.py
    CUDA_VISIBLE_DEVICES=0 python MNIST_HVAE_DCT.py --dataset cifar10 --bits 5 --latents 2,2,2

The context is the top latent of the model of Kuzina & Tomczak (2023, arXiv 2302.09976). It is the
corner of low frequencies of the image's discrete cosine transform, scaled and quantised. Its
posterior is a point mass, so that its KL is -log p(c). A diffusion model is that prior p(c).

Below the context lies a ladder VAE. It has levels of latents, and a state that goes through them
from the top down. With `--decoder state`, the published one, the context is added to the state at
each new scale, and the decoder reads the last state. With `--decoder aggregate` the context is
added to the state at its start only, and each prior reads the context. The rest is then the model
of MNIST_HVAE_Ladder.py.

How it is trained: AdamW minimises the negative beta-ELBO in batches of 128 images for 600 epochs,
with one draw of the latents and one step of the diffusion model per image. The learning rate is
1e-3 throughout and the weight decay is 1e-2. Gradients are clipped to a norm of 543. The last
weights are evaluated, not an average. `train` below makes the steps. The loop around them is
`training.Training`, which also writes checkpoints.
"""
import math
from dataclasses import dataclass

import common
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn import functional as F

import datasets
import deep
import processes
import report
import training


@dataclass
class Flags(deep.HierarchyFlags):
    # The flags of --preset small. With them, two CPU cores train a model in minutes. The defaults
    # below are the published setting, for a GPU.
    small = (
        "--latents 2,2 --num_ch 16 --diffusion_ch 8 --decoder aggregate --batch_size 100 "
        "--num_epochs 12 --num_samples 100 --num_test 1000"
    )

    batch_size: int = common.flag(128, "number of examples per training step and process", low=1)
    num_epochs: int = common.flag(600, "number of passes over the training set", low=1)
    optimizer: str = common.flag(
        "adamw", "optimiser that trains the weights", choices=("adamax", "adamw")
    )
    lr: float = common.flag(1e-3, "learning rate of the optimiser", above=0)
    lr_schedule: str = common.flag(
        "constant",
        "how the learning rate changes after the warm-up: constant keeps it, cosine lowers it to "
        "--lr_end",
        choices=("constant", "cosine"),
    )
    warmup_epochs: float = common.flag(
        0.0, "number of epochs over which the learning rate rises from 0", low=0
    )
    weight_decay: float = common.flag(1e-2, "weight decay of the optimiser", low=0)
    grad_clip: float = common.flag(
        543.0, "largest norm of a gradient; larger gradients are scaled down to it", above=0
    )
    ema: float = common.flag(
        0.0,
        "decay of the exponential average of the weights; the averaged model is evaluated",
        low=0,
        high=0.999999,
    )
    context_size: int = common.flag(
        7, "number of frequencies of the context along each axis", low=1, high=28
    )
    bits: int = common.flag(
        0,
        "bits of each coefficient of the context; 0 stands for 2, and for 5 with cifar10",
        low=0,
        high=12,
    )
    step_variance: str = common.flag(
        "learned",
        "variance of each reverse step of the diffusion model: learned, or fixed to its smallest "
        "value",
        choices=("learned", "fixed"),
    )
    diffusion_ch: int = common.flag(
        32, "channels of the diffusion model's network", low=1, high=4096
    )
    decoder: str = common.flag(
        "state",
        "input of the decoder p(x|z): state is the last state of the top-down pass, aggregate is "
        "the sum of all latents",
        choices=("state", "aggregate"),
    )
    latents: str = common.flag(
        "3,4",
        "number of latent maps at each scale, the coarsest scale first; the finest scale has half "
        "the side of the image, or the whole side with cifar10 and where the side is odd; for "
        "images of 28x28, 3,4 means 3 maps of 7x7 and 4 of 14x14",
    )
    d_z: int = common.flag(
        0, "channels of each latent map; 0 stands for 1, and for 8 with cifar10", low=0, high=4096
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
    weights of the last convolution are multiplied by `start`. With `gate` the output is multiplied
    by a learned factor that starts at 0 (ReZero: Bachlechner et al. 2021, arXiv 2003.04887).
    """

    def __init__(self, c_in, c_out, hidden, start=1.0, gate=False):
        super().__init__(
            nn.Conv2d(c_in, hidden, 1),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.SiLU(),
            deep.scaled(nn.Conv2d(hidden, c_out, 1), start),
        )
        self.gate = nn.Parameter(torch.zeros(())) if gate else None

    def forward(self, h):
        if self.gate is None:
            return super().forward(h)
        return self.gate * super().forward(h)


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

    The scales go from the finest possible one down to the coarsest that has latents. With --decoder
    state each scale has one gated residual block per latent. With --decoder aggregate it has three
    residual blocks without a gate. The mean over squares leads to the scale's side.
    """

    def __init__(self, f, sides):
        super().__init__()
        c = f.num_ch
        self.sides = [deep.finest_side(f)]
        while self.sides[-1] > min(sides):
            self.sides.append(self.sides[-1] // 2)

        self.x_to_e = nn.Conv2d(deep.image_shape(f)[0], c, 1)
        self.scales = nn.ModuleList()
        for side in self.sides:
            gate = f.decoder == "state"
            count = max(1, sides.count(side)) if f.decoder == "state" else 3
            blocks = [Bottleneck(c, c, f.d_hidden or c, gate=gate) for _ in range(count)]
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
    """One level: p(z_l|z_>l, c), q(z_l|z_>l, c, x), and how z_l changes the state s.

    z_l is (B, c_z, side, side), s is (B, c, side, side). L is the number of levels without the
    context. With --decoder aggregate the prior also reads the context, a block follows each latent,
    and level 1 leaves no state behind.
    """

    def __init__(self, f, side, c_z, L, level):
        super().__init__()
        c = f.num_ch
        self.side = side
        self.reads_context = f.decoder == "aggregate"
        self.bounded_posterior = f.decoder == "state"
        leaves_state = f.decoder == "state" or level > 1

        # The prior's head gives mean, log-variance and h.
        self.parts = [c_z, c_z, c if leaves_state else 0]
        c_prior = c + deep.image_shape(f)[0] if self.reads_context else c
        self.s_to_p = Head(f, c_prior, sum(self.parts))
        self.s_to_q = Head(f, c, 2 * c_z)

        self.z_to_s = None
        self.s_to_s = None
        if leaves_state:
            self.z_to_s = deep.scaled(nn.Conv2d(c_z, c, 1), L**-0.5)
        if leaves_state and f.decoder == "aggregate":
            self.s_to_s = Bottleneck(c, c, f.d_hidden or c, start=L**-0.5)

    def p(self, s, context):
        """p(z_l|z_>l, c), and h, the prior's own update of the state.

        context is the context's image, (B, c_x, side, side).
        """
        read = torch.cat([s, context], dim=1) if self.reads_context else s
        mean, log_var, h = self.s_to_p(read).to(s.dtype).split(self.parts, dim=1)
        return normal(mean, log_var.clamp(-10, 1)), h

    def q(self, s, e):
        """q(z_l|z_>l, c, x), where e is the encoder's feature of this scale.

        The log-variance is in [-5, 0] with --decoder state, else in [-10, 1].
        """
        mean, raw = self.s_to_q((e + s) / math.sqrt(2)).to(s.dtype).chunk(2, dim=1)
        if self.bounded_posterior:
            return normal(mean, -F.softplus(raw).clamp(max=5))
        return normal(mean, raw.clamp(-10, 1))

    def update(self, s, h, z):
        """The state that the next level, or the decoder, reads."""
        s = s + h + self.z_to_s(z)
        if self.s_to_s is None:
            return s
        return s + self.s_to_s(s)


def normal(mean, log_var):
    """N(mean, exp(log_var))."""
    return Normal(mean, (log_var / 2).exp())


class DCT(nn.Module):
    """The context of an image, and the image of a context. The transform of x (c_x, H, H) is

        y_uv = sum_ij a_u a_v x_ij cos(pi u (2i + 1) / 2H) cos(pi v (2j + 1) / 2H),   u, v < k

    for each colour, with a_0^2 = 1/H and a_u^2 = 2/H for u > 0. The context c (c_x, k, k) is
    y / largest, rounded to the nearest of the 2^bits levels {-1, ..., 1 - step}. They are the
    multiples of step = 2^(1 - bits).

    The image of c is the inverse transform of c * largest, in which higher frequencies are 0.
    """

    def __init__(self, c_x, side, k, bits):
        super().__init__()
        self.step = 2.0 ** (1 - bits)
        i = torch.arange(side, dtype=torch.float64)
        u = torch.arange(k)[:, None]
        a = ((2 - (u == 0).double()) / side).sqrt()
        basis = a * (math.pi / (2 * side) * u * (2 * i + 1)).cos()  # (k, H), orthonormal rows
        levels = torch.arange(-1, 1, self.step)

        self.register_buffer("basis", basis.float(), persistent=False)
        self.register_buffer("largest", torch.ones(c_x, k, k))
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("log_shares", torch.zeros(len(levels), c_x, k, k))

    def fit(self, images):
        """Measure, on training images (n, c_x, H, H) in [0, 1], what the context depends on.

        That is the largest magnitude of each coefficient. A binary draw of an image can go a little
        beyond it and is then clamped. The share of images at each level is measured, too, as if one
        more image were at each level, so that no share is 0.
        """
        self.largest.copy_(self.transform(images).abs().amax(0).clamp(min=1e-6))
        c = self(images)
        for level, log_share in zip(self.levels, self.log_shares):
            count = (c == level).sum(0) + 1
            log_share.copy_((count / (len(c) + len(self.levels))).log())

    def log_independent(self, c):
        """log p(c) in nats, (B,), if all coefficients of c (B, c_x, k, k) were independent.

        A useful model of p(c) gives more.
        """
        log_p = 0
        for level, log_share in zip(self.levels, self.log_shares):
            log_p = log_p + torch.where(c == level, log_share, 0)
        return log_p.flatten(1).sum(1)

    def transform(self, x):
        """The coefficients y (B, c_x, k, k) of x (B, c_x, H, H)."""
        return self.basis @ x @ self.basis.T

    def forward(self, x):
        """The context (B, c_x, k, k) of x (B, c_x, H, H) in [0, 1]."""
        with torch.autocast(x.device.type, enabled=False):
            return self.quantise(self.transform(x) / self.largest)

    def quantise(self, y):
        """The level nearest to each number of y."""
        return ((y / self.step).round() * self.step).clamp(-1, 1 - self.step)

    def image(self, c):
        """The image (B, c_x, H, H) of a context (B, c_x, k, k)."""
        with torch.autocast(c.device.type, enabled=False):
            return self.basis.T @ (c * self.largest) @ self.basis


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


class Diffusion(nn.Module):
    """p(c) of contexts c (N, c_x, k, k), a diffusion model (Ho et al. 2020, arXiv 2006.11239):

        q(c_t|c) = N(sqrt(A_t) c, (1 - A_t) I),   A_t = prod_{i <= t} (1 - beta_i)
        p(c_T) = N(0, I)
        p(c_{t-1}|c_t) = N(m, exp(v(c_t, t)) S),   t > 1
        p(c|c_1): the mass of N(c^(c_1, 1), exp(v(c_1, 1)) s^2) in the bin around c

    beta is linear in t = 1, ..., T. m and S are mean and variance of q(c_{t-1}|c_t, c) at
    c = c^(c_t, t). The bins are `step` wide; the outer ones extend to infinity. s is learned.

    One UNet gives both c^, the clean value, and v, the logarithm of a factor of the variance (after
    Nichol & Dhariwal 2021, arXiv 2102.09672). With --step_variance fixed, v is 0. The bound is

        -log p(c) <= KL(q(c_T|c) || p(c_T)) + sum_{t > 1} E[KL_t] + E[-log p(c|c_1)]
        KL_t = KL(q(c_{t-1}|c_t, c) || p(c_{t-1}|c_t)) = (exp(-v) (1 + a^2) - 1 + v) / 2

    Here a = sqrt(R_{t-1} - R_t) (c^ - c), with R_t = A_t / (1 - A_t), is the distance of the means
    in standard deviations of q.
    """

    T = 7
    BLOCKS = 3

    # With a smaller beta_1 the T steps are too far apart for their Gaussians. With a larger one,
    # p(c|c_1) has to describe too much, although its coefficients are independent.
    BETA_1 = 0.1
    BETA_T = 0.6

    def __init__(self, c_x, k, step, c, learned=True):
        super().__init__()
        self.step = step
        self.learned = learned

        beta = torch.linspace(self.BETA_1, self.BETA_T, self.T, dtype=torch.float64)
        A = (1 - beta).cumprod(0)
        A_before = torch.cat([torch.ones_like(A[:1]), A[:-1]])  # A_{t-1}

        # R_{t-1} - R_t. The first step has a different likelihood and does not use it.
        drop = A_before / (1 - A_before) - A / (1 - A)
        drop[0] = 0

        # q(c_{t-1}|c_t, c) = N(clean_weight c + noisy_weight c_t, std^2)
        clean_weight = A_before.sqrt() * beta / (1 - A)
        noisy_weight = (1 - beta).sqrt() * (1 - A_before) / (1 - A)
        std = ((1 - A_before) / (1 - A) * beta).sqrt()

        self.register_steps("signal", A.sqrt())
        self.register_steps("noise", (1 - A).sqrt())
        self.register_steps("drop", drop)
        self.register_steps("clean_weight", clean_weight)
        self.register_steps("noisy_weight", noisy_weight)
        self.register_steps("std", std)
        self.log_s = nn.Parameter(torch.full((c_x, k, k), math.log(0.25)))
        self.network = UNet(c_x, 2 * c_x if learned else c_x, c, self.BLOCKS)

    def register_steps(self, name, values):
        """Keep one number per step, (T,), as a buffer (T, 1, 1, 1)."""
        self.register_buffer(name, values.float().view(-1, 1, 1, 1), persistent=False)

    def clean(self, c_t, t):
        """c^(c_t, t) and v(c_t, t), like c_t (N, c_x, k, k). t (N,) counts from 0."""
        out = self.network(c_t, t.to(c_t.dtype) / self.T).to(c_t.dtype)
        if not self.learned:
            return out, torch.zeros_like(out)
        clean, raw = out.chunk(2, dim=1)
        return clean, 5 * (raw / 5).tanh()

    def log_p_first(self, c, mean, v):
        """log p(c|c_1) per coefficient, like c, from mean = c^(c_1, 1) and v(c_1, 1)."""
        std = (self.log_s + v / 2).exp()
        lowest = c < self.step / 2 - 1
        highest = c > 1 - 1.5 * self.step
        return log_binned_normal(c, mean, std, width=self.step, lowest=lowest, highest=highest)

    def last(self, c):
        """KL(q(c_T|c) || p(c_T)) per coefficient, like c."""
        A = self.signal[-1] ** 2
        return (A * c**2 - A - torch.log1p(-A)) / 2

    def loss(self, c):
        """The bound on -log p(c) in nats per coefficient, like c.

        Its sum over t is estimated by one random t for each row.
        """
        t = (processes.uniform_like(c[:, 0, 0, 0]) * self.T).long()
        c_t = self.signal[t] * c + self.noise[t] * processes.normal_like(c)
        clean, v = self.clean(c_t, t)
        kl = ((-v).exp() * (1 + self.drop[t] * (c - clean) ** 2) - 1 + v) / 2
        first = -self.log_p_first(c, clean, v)
        return self.last(c) + self.T * torch.where(t.view(-1, 1, 1, 1) > 0, kl, first)

    def bound(self, c):
        """The bound on -log p(c) along one trajectory c_T, ..., c_1 drawn from q given c.

        Returns the bound in nats per coefficient, like c, and (N,) the log-ratio
        log p(c, c_1, ..., c_T) - log q(c_1, ..., c_T|c). The mean of the log-ratio over
        trajectories is minus the bound. The mean of its exponential is p(c).
        """
        # 1. Step T.
        eps = processes.normal_like(c)
        c_t = self.signal[-1] * c + self.noise[-1] * eps
        bound = self.last(c)
        log_ratio = (eps**2 - c_t**2) / 2 + self.noise[-1].log()

        # 2. Steps T - 1, ..., 1.
        for t in range(self.T - 1, 0, -1):
            eps = processes.normal_like(c)
            clean, v = self.clean(c_t, step_of_rows(c, t))
            # The distance of the means of p and q, in standard deviations of q.
            a = self.drop[t].sqrt() * (clean - c)
            bound = bound + ((-v).exp() * (1 + a**2) - 1 + v) / 2
            log_ratio = log_ratio + (eps**2 - (-v).exp() * (eps - a) ** 2 - v) / 2
            c_t = self.clean_weight[t] * c + self.noisy_weight[t] * c_t + self.std[t] * eps

        # 3. From c_1 to c.
        clean, v = self.clean(c_t, step_of_rows(c, 0))
        first = self.log_p_first(c, clean, v)
        return bound - first, (log_ratio + first).flatten(1).sum(1)

    def sample(self, n, noise=processes.normal_like):
        """(n, c_x, k, k), whose nearest levels are n draws of p(c).

        noise=torch.zeros_like takes the mean of each step instead.
        """
        c_t = noise(self.log_s.expand(n, -1, -1, -1))
        for t in range(self.T - 1, 0, -1):
            clean, v = self.clean(c_t, step_of_rows(c_t, t))
            mean = self.clean_weight[t] * clean + self.noisy_weight[t] * c_t
            c_t = mean + self.std[t] * (v / 2).exp() * noise(c_t)
        clean, v = self.clean(c_t, step_of_rows(c_t, 0))
        return clean + (self.log_s + v / 2).exp() * noise(c_t)


def step_of_rows(c, t):
    """The step t for each row of c, (N,)."""
    return torch.full_like(c[:, 0, 0, 0], t)


def log_binned_normal(c, mean, std, width, lowest, highest):
    """The log of the mass of N(mean, std^2) in the bin of this width around c. All are (...).

    The bin has no lower end where `lowest`, and no upper end where `highest`.
    """
    # 1. Reflect each bin about the mean, where needed, so that it is in the lower tail. In the
    #    upper tail the mass would be a difference of numbers near 1, and rounding would remain.
    side = torch.where(c > mean, -1, 1)
    open_below = torch.where(side > 0, lowest, highest)
    open_above = torch.where(side > 0, highest, lowest)

    # 2. The logarithms of the normal distribution function at both ends.
    lower = torch.special.log_ndtr((side * (c - mean) - width / 2) / std)
    upper = torch.special.log_ndtr((side * (c - mean) + width / 2) / std)
    upper = torch.where(open_above, 0, upper)

    # 3. log(exp(upper) - exp(lower)). The first torch.where keeps gradients finite where there is
    #    no lower end.
    difference = torch.where(open_below, -1, lower - upper)
    return torch.where(open_below, upper, upper + torch.log(-torch.expm1(difference)))


class DCTVAE(nn.Module):
    """A ladder VAE under a context c, which is level L + 1:

        p(x, z, c) = p(x|z_1..z_L) prod_l p(z_l|z_>l, c) p(c)
        q(z, c|x)  = [c = DCT(x)] prod_l q(z_l|z_>l, c, x)

    Level 1 is next to the image, level L is the top learned level, and z_>l are the latents above
    level l. p(c) is a Diffusion. p and q go from the top down and share a state s, which starts as
    ones:

        s <- upsample(s) + conv(image of c)                 at each new scale
        p(z_l|z_>l, c), h = prior block(s)
        q(z_l|z_>l, c, x) = posterior block((e + s) / sqrt 2)
        s <- s + h + conv z_l

    The image of c is pooled to the side of level l. e is the encoder's feature of that side. The
    last state, upsampled, gives the pixels:

        p(x|z) = Bernoulli(conv silu (s + block(s)))

    For cifar10, LogisticMixture takes the place of Bernoulli. With --decoder aggregate the image of
    c is added to s at the start only, and

        p(z_l|z_>l, c), h = prior block([s, image of c])
        s <- block(s + h + conv z_l)
        p(x|z) = Bernoulli(conv silu conv sum_l upsample(z_l) / sqrt L)
    """

    elbo_draws = 1
    headroom_rows = deep.HEADROOM_ROWS

    def __init__(self, f):
        super().__init__()
        # 1. Sizes.
        self.c_x, self.side, _ = deep.image_shape(f)
        c_x = self.c_x
        c = f.num_ch
        c_z = f.d_z or 1
        c_out = c_x
        bits = f.bits or 2
        sides = deep.latent_sides(f)
        L = len(sides)
        self.learned_levels = L
        self.levels = L + 1
        self.widest_layer = c * self.side**2
        self.dimensions = 0
        if f.dataset == "cifar10":
            c_z = f.d_z or 8
            bits = f.bits or 5
            self.dimensions = c_x * self.side**2
            c_out = deep.LogisticMixture.K * deep.LogisticMixture.n(c_x)

        # 2. The context, its prior, and its way into the state.
        self.reads_state = f.decoder == "state"
        self.dct = DCT(c_x, self.side, f.context_size, bits)
        learned = f.step_variance == "learned"
        self.p_c = Diffusion(
            c_x, f.context_size, step=self.dct.step, c=f.diffusion_ch, learned=learned
        )
        scales = sorted(set(sides)) if self.reads_state else sides[:1]
        self.context_to_s = nn.ModuleDict()
        for side in scales:
            self.context_to_s[str(side)] = nn.Conv2d(c_x, c, 1)

        # 3. Encoder, latents and decoder.
        self.encoder = Encoder(f, sides)
        s_start = torch.ones(1, c, sides[0], sides[0])
        self.register_buffer("s_start", s_start, persistent=False)
        self.latents = nn.ModuleList()
        for l, side in zip(range(L, 0, -1), sides):
            self.latents.append(Latent(f, side=side, c_z=c_z, L=L, level=l))
        if self.reads_state:
            self.last_block = Bottleneck(c, c, f.d_hidden or c, gate=True)
        else:
            self.last_block = nn.Conv2d(c_z, c, 1)
        self.to_x = nn.Sequential(nn.SiLU(), nn.Conv2d(c, c_out, 3, padding=1))

    def top_down(self, c, features, choose):
        """All latents below contexts c (n, c_x, k, k), and what p(x|z) reads.

        The first is a list of p(z_l|z_>l, c), q(z_l|z_>l, c, x) and z_l for l = L, ..., 1, each
        (n, c_z, side, side). z_l is choose(l, p, q), such as a draw of q. features are the result
        of the encoder. If they are None, q is None. The second is the argument of `p_x`: the last
        state, or all latents.
        """
        image = self.dct.image(c)
        s = self.s_start.expand(len(c), -1, -1, -1)
        drawn = []
        for l, latent in zip(range(self.learned_levels, 0, -1), self.latents):
            # 1. The state at this scale, with the context where it enters.
            context = F.avg_pool2d(image, self.side // latent.side)
            is_new_scale = not drawn or latent.side != s.shape[-1]
            s = F.interpolate(s, size=latent.side)
            if is_new_scale and str(latent.side) in self.context_to_s:
                s = s + self.context_to_s[str(latent.side)](context)

            # 2. The latent.
            p, h = latent.p(s, context)
            q = latent.q(s, features[latent.side]) if features else None
            z = choose(l, p, q)
            drawn.append((p, q, z))

            # 3. The next state.
            if latent.z_to_s is not None:
                s = latent.update(s, h, z)

        if self.reads_state:
            return drawn, s
        return drawn, [z for p, q, z in drawn]

    def p_x(self, decoder_input, shape=(-1,)):
        """p(x|z) from the second result of `top_down`.

        Its pixels are (*shape, c_x, H, W), where n is the product of shape.
        """
        if self.reads_state:
            s = F.interpolate(decoder_input, size=self.side)
            s = s + self.last_block(s)
        else:
            total = 0
            for z in decoder_input:
                total = total + F.interpolate(z, size=self.side, mode="bilinear")
            s = self.last_block(total / math.sqrt(self.learned_levels))
        out = self.to_x(s).to(self.s_start.dtype).unflatten(0, shape)
        if self.dimensions:
            return deep.LogisticMixture(out, self.c_x)
        return Bernoulli(logits=out)

    def draw_posterior(self, c, x, sample_shape):
        """A draw of all latents from q(z|c, x), the top level first, and what p(x|z) reads.

        c (n, c_x, k, k) has the context of each draw. The results are those of `top_down`.
        """
        features = {}
        for side, e in self.encoder(x).items():
            features[side] = deep.repeat_examples(e, sample_shape)
        return self.top_down(c, features, lambda l, p, q: deep.draw(q))

    def forward(self, x, f, sample_shape=()):
        """The terms of the ELBO for x (B, c_x, H, W), in nats. Shapes are in report.py.

        The KL of the context is the diffusion model's bound on -log p(c). In the evaluation log_w
        and log_w_c have draws of their own, since log p(x) = log p(c) + log p(x|c).
        """
        shape = (*sample_shape, len(x))

        # 1. A draw of all latents from the posterior.
        c = self.dct(x)
        repeated_c = deep.repeat_examples(c, sample_shape)
        drawn, decoder_input = self.draw_posterior(repeated_c, x, sample_shape)

        # 2. The reconstruction, the bound on -log p(c), and the KL of each level.
        log_px_z = self.p_x(decoder_input, shape).log_prob(x).flatten(len(shape)).sum(-1)
        if self.training:
            bound = self.p_c.loss(c)
        else:
            bound, log_ratio_c = self.p_c.bound(repeated_c)
        terms = {"log_px_z": log_px_z}
        for l, (p, q, z) in enumerate(reversed(drawn), start=1):
            terms[f"kl_{l}"] = deep.per_unit(kl_divergence(q, p), shape)
        terms[f"kl_{self.levels}"] = deep.per_unit(bound, shape)
        if self.training:
            return terms

        # 3. For the evaluation: importance weights of z and of the context's steps, the means in
        #    units of the prior, and the code length of a context with independent coefficients.
        log_ratio = 0
        for p, q, z in drawn:
            log_ratio = log_ratio + deep.per_unit(p.log_prob(z) - q.log_prob(z), shape).sum(-1)
        terms["log_w"] = log_px_z + log_ratio
        terms["log_w_c"] = log_ratio_c.unflatten(0, shape)
        for l, (p, q, z) in enumerate(reversed(drawn), start=1):
            terms[f"mean_{l}"] = deep.per_unit((q.mean - p.mean) / p.stddev, shape)
        terms[f"mean_{self.levels}"] = c.flatten(1)
        terms["context_baseline"] = -self.dct.log_independent(c)
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO per image, -log p(x|z) + beta sum_l KL_l, in nats, (B,).

        The first --free_bits nats of each learned unit's KL cost nothing. The context has no free
        bits, since it is not learned.
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

        See deep.level_residuals. Each of the two estimates has one draw of the latents.
        """
        # headroom.py has no theory for the mixture of logistics of cifar10.
        if self.dimensions:
            return {}
        x = common.binarise(x)
        c = deep.repeat_examples(self.dct(x), (2,))
        _, decoder_input = self.draw_posterior(c, x, (2,))
        return deep.level_residuals(self, x, self.p_x(decoder_input, (2, len(x))).logits, f)

    # What the pictures and the measurements of --evaluate use.

    def top_posterior(self, x, f, levels):
        """q(z_l|z_>l, c, x) of the top learned levels, every latent above at its posterior mean.

        A list of Normals, differentiable in x (B, c_x, H, W). The context, which is quantised,
        counts as constant.
        """
        drawn, _ = self.top_down(self.dct(x), self.encoder(x), lambda l, p, q: q.mean)
        return [q for p, q, z in drawn[:levels]]

    def reconstruct(self, x, f, keep, below=lambda p: p.mean):
        """Means of p(x|z), (B, c_x, H, W).

        The top `keep` levels are the context and the means of q. The levels below are below(p), the
        means of p by default. With keep = 0 the context is where the means of all steps of p(c)
        lead.
        """
        if keep:
            c = self.dct(x)
        else:
            c = self.dct.quantise(self.p_c.sample(len(x), torch.zeros_like))

        def choose(l, p, q):
            return q.mean if l > self.levels - keep else below(p)

        _, decoder_input = self.top_down(c, self.encoder(x), choose)
        return self.p_x(decoder_input).mean

    def reconstructions(self, x, f):
        """{title: images}: x, contexts, then reconstructions with more and more levels drawn.

        The prior draws a third of the learned levels, two thirds, and at last all of them.
        """
        L = self.learned_levels
        panels = {
            "test images": x,
            "contexts of the test images": self.dct.image(self.dct(x)),
            "reconstructed through all levels": self.reconstruct(x, f, self.levels),
        }
        for l in sorted({math.ceil(L * third / 3) for third in (1, 2, 3)}):
            panels[deep.drawn_levels(l)] = self.reconstruct(x, f, self.levels - l, deep.draw)
        return panels

    def samples(self, n, f):
        """{title: images}: n draws of the context from p(c), and the mean of p(x|z) for each.

        The latents z below the context are drawn from their priors, too.
        """
        c = self.dct.quantise(self.p_c.sample(n))
        _, decoder_input = self.top_down(c, None, lambda l, p, q: deep.draw(p, f.temperature))
        return {
            "contexts drawn from their prior": self.dct.image(c),
            "images decoded from these contexts": self.p_x(decoder_input).mean,
        }


def train(model, f, data, loop):
    """Minimise -log p(x|z) + beta sum_l KL_l over --num_epochs.

    loop is a training.Training. Returns the model with the average of the weights, which is
    evaluated.
    """
    images = data.train[0]
    model.dct.fit(images)
    optimizer = deep.make_optimizer(model, f, f.weight_decay)
    schedule = deep.warmup_cosine(optimizer, f, loop.steps)
    average = deep.WeightAverage(model, f)
    parallel = processes.data_parallel(model)

    # The factor of beta in its warm-up. It is a tensor, which a captured CUDA graph reads anew.
    share = None
    if training.beta_share(f, 0) < 1:
        share = torch.ones_like(images[0, 0, 0, 0])

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

    # What --test_curve measures after each epoch.
    def test():
        return {"test_elbo": deep.test_elbo(average.module, f, data)}

    replayed_step = loop.replayed(step)
    parts = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    for rows in loop.batches(test=test if f.test_curve else None, **parts):
        if share is not None:
            share.fill_(training.beta_share(f, loop.epochs_done))
        replayed_step(rows)
        schedule.step()
    return average.module


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    data = datasets.load_images(settings)
    runs = training.fit(DCTVAE, settings, data, train=train)
    status = report.report(runs)
    deep.evaluate_further(runs)
    return status


if __name__ == "__main__":
    common.run(main)
