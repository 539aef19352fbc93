"""DCT-VAE on MNIST: a context on top of a ladder VAE that is computed from x, so that it cannot collapse.

    CUDA_VISIBLE_DEVICES=0 python MNIST_HVAE_DCT.py
    python MNIST_HVAE_DCT.py --dataset cifar10 --bits 5 --latents 2,2,2

Kuzina & Tomczak (2023, arXiv 2302.09976): the top latent is the corner of low frequencies of the image's discrete cosine
transform, scaled and quantised. Its posterior is a point mass, its KL therefore -log p of what it is, under a diffusion model.
Below it the ladder VAE of MNIST_HVAE_Ladder.py, which it gives the start of the state and a part of what each prior reads.
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
import training


@dataclass
class Flags(deep.DeepFlags):
    context_size: int = common.flag(7, "frequencies of the context along each axis", low=1, high=28)
    bits: int = common.flag(0, "bits of each coefficient of the context; 0 is 2, of cifar10 5", low=0, high=12)
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

    def fit(self, images):
        """Measure the largest magnitude of each coefficient on the training images (as they are, not binarised: binary draws
        of them go a little beyond, and are clamped)."""
        self.largest.copy_(self.transform(images).abs().amax(0).clamp(min=1e-6))

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


class Diffusion(nn.Module):
    """p(c) of contexts c (N, c_x, k, k), multiples of `step`, by a diffusion model (Ho et al. 2020, arXiv 2006.11239):

        q(c_t|c) = N(sqrt(A_t) c, (1 - A_t) I),  A_t = prod_{i <= t} (1 - beta_i),  beta linear in t = 1, ..., T
        p(c_T) = N(0, I)
        p(c_{t-1}|c_t) = q(c_{t-1}|c_t, c = c^(c_t, t)),  t > 1,  c^ a network that predicts the clean value
        p(c|c_1): the mass that N(c^(c_1, 1), s^2), s learned, has in the bin of width step around c, tails in the outer bins

        -log p(c) <= KL(q(c_T|c) || p(c_T)) + sum_{t > 1} E KL(q(c_{t-1}|c_t, c) || p(c_{t-1}|c_t)) + E[-log p(c|c_1)]

    With R_t = A_t / (1 - A_t), the KL of step t is (R_{t-1} - R_t) (c - c^)^2 / 2.
    """

    # A smaller beta_1 leaves the T steps too far apart for their Gaussians, a larger one leaves too much to p(c|c_1), which knows
    # no dependence between coefficients.
    T, BETA_1, BETA_T = 7, 0.1, 0.6

    def __init__(self, c_x, k, step, c):
        super().__init__()
        self.step, T = step, self.T
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
        self.c_to_h = nn.Conv2d(c_x, c, 3, padding=1)
        self.place_and_time = nn.Parameter(0.02 * torch.randn(T, c, k, k))                 # a coefficient's place matters
        self.h_to_c = nn.Sequential(*(Residual(c, c) for _ in range(3)), nn.SiLU(), scaled(nn.Conv2d(c, c_x, 1), 0))

    def clean(self, c_t, t):
        """c^(c_t, t), like c_t (N, c_x, k, k); t (N,), or one number, counts from 0."""
        return self.h_to_c(self.c_to_h(c_t) + self.place_and_time[t]).to(c_t.dtype)

    def log_p_first(self, c, mean):
        """log p(c|c_1), per coefficient, like c, from mean = c^(c_1, 1)."""
        return log_binned_normal(c, mean, self.log_s.exp(), self.step, c < self.step / 2 - 1, c > 1 - 1.5 * self.step)

    def last(self, c):
        """KL(q(c_T|c) || p(c_T)), per coefficient, like c."""
        A = self.signal[-1]**2
        return (A * c**2 - A - torch.log1p(-A)) / 2

    def loss(self, c):
        """The bound on -log p(c), in nats per coefficient, like c, its sum over t estimated by one random t of each row."""
        t = (common.uniform_like(c[:, 0, 0, 0]) * self.T).long()
        c_t = self.signal[t] * c + self.noise[t] * common.normal_like(c)
        clean = self.clean(c_t, t)
        step = torch.where(t.view(-1, 1, 1, 1) > 0, self.drop[t] * (c - clean)**2 / 2, -self.log_p_first(c, clean))
        return self.last(c) + self.T * step

    def bound(self, c):
        """At one trajectory c_T, ..., c_1 drawn from q given c: the bound on -log p(c), in nats per coefficient, like c, and
        log p(c, c_1, ..., c_T) - log q(c_1, ..., c_T|c), (N,). The mean of the latter is -bound, the mean of its exponential
        p(c)."""
        eps = common.normal_like(c)
        c_t = self.signal[-1] * c + self.noise[-1] * eps
        bound, log_ratio = self.last(c), (eps**2 - c_t**2) / 2 + self.noise[-1].log()
        for t in range(self.T - 1, 0, -1):
            eps, clean = common.normal_like(c), self.clean(c_t, t)
            apart = self.drop[t].sqrt() * (clean - c)     # of the means of p and q, in standard deviations
            bound, log_ratio = bound + apart**2 / 2, log_ratio + apart * eps - apart**2 / 2
            c_t = self.of_clean[t] * c + self.of_noisy[t] * c_t + self.std[t] * eps
        first = self.log_p_first(c, self.clean(c_t, 0))
        return bound - first, (log_ratio + first).flatten(1).sum(1)

    def sample(self, n, noise=common.normal_like):
        """(n, c_x, k, k), whose nearest levels are n draws of p(c). noise=torch.zeros_like gives the means of all steps."""
        c_t = noise(self.log_s.expand(n, -1, -1, -1))
        for t in range(self.T - 1, 0, -1):
            c_t = self.of_clean[t] * self.clean(c_t, t) + self.of_noisy[t] * c_t + self.std[t] * noise(c_t)
        return self.clean(c_t, 0) + self.log_s.exp() * noise(c_t)


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
        p(z_l|z_>l, c), h = prior block([s, image of c])                  s = 1 + conv(image of c) at the start; the image
        q(z_l|z_>l, c, x) = posterior block((e + s) / sqrt 2)             pooled to this scale, as e, the encoder's feature
        s <- block(s + h + conv z_l)
        p(x|z) = Bernoulli(conv silu conv sum_l upsample(z_l) / sqrt L),  cifar10: LogisticMixture(the same)
    """

    elbo_draws = 1

    def __init__(self, f):
        super().__init__()
        c_x, side, _ = datasets.image_shape(f.dataset)
        sides = sides_of_latents(f)
        L = self.learned_levels = len(sides)
        self.levels, self.side, self.widest_layer = L + 1, side, f.num_ch * side**2
        c_out = LogisticMixture.K * (1 + 2 * c_x) if f.dataset == "cifar10" else c_x
        self.dct = DCT(c_x, side, f.context_size, f.bits or (5 if f.dataset == "cifar10" else 2))
        self.p_c = Diffusion(c_x, f.context_size, self.dct.step, f.num_ch)
        self.context_to_s = nn.Conv2d(c_x, f.num_ch, 1)
        self.encoder = Encoder(c_x, f.num_ch, side, sides[0])
        self.register_buffer("s_start", torch.ones(1, f.num_ch, sides[0], sides[0]), persistent=False)
        self.latents = nn.ModuleList(Latent(sides[L - l], c_x, f.num_ch, f.num_ch + c_x, L, l) for l in range(L, 0, -1))
        self.z_to_x = nn.Sequential(nn.Conv2d(c_x, f.num_ch, 1), nn.SiLU(), nn.Conv2d(f.num_ch, c_out, 3, padding=1))

    def top_down(self, c, features, choose):
        """Yields p(z_l|z_>l, c), q(z_l|z_>l, c, x) and z_l = choose(l, p, q), each (n, c_z, side, side), for l = L, ..., 1, of
        contexts c (n, c_x, k, k). Without features q is None."""
        image = self.dct.image(c)
        context = {side: F.avg_pool2d(image, self.side // side) for side in {latent.side for latent in self.latents}}
        s = self.s_start + self.context_to_s(context[self.latents[0].side])
        for l, latent in zip(range(self.learned_levels, 0, -1), self.latents):
            s = F.interpolate(s, size=latent.side)
            p, h = latent.p(torch.cat([s, context[latent.side]], dim=1))
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
        """x (B, c_x, H, W). Terms of the ELBO at a draw of all latents, in nats; shapes as report.py says. The KL of the context
        is the diffusion model's bound on -log p(c); its steps are latents too where log_w weights a draw."""
        shape = (*sample_shape, len(x))

        def repeated(e):                                  # (B, ...) -> (S B, ...)
            return e.expand(*sample_shape, *e.shape).flatten(0, len(sample_shape))

        def units(values):                                # (S B, c_z, side, side) -> (S, B, d)
            return values.flatten(1).unflatten(0, shape)

        c, features = repeated(self.dct(x)), {side: repeated(e) for side, e in self.encoder(x).items()}
        drawn = list(self.top_down(c, features, lambda l, p, q: draw(q)))[::-1]            # level 1 first
        log_px_z = self.p_x([z for _, _, z in drawn], shape).log_prob(x).flatten(len(shape)).sum(-1)
        bound, log_p_c = (self.p_c.loss(c), None) if self.training else self.p_c.bound(c)
        terms = {"log_px_z": log_px_z} | {f"kl_{l}": units(kl_divergence(q, p)) for l, (p, q, _) in enumerate(drawn, 1)}
        terms[f"kl_{self.levels}"] = units(bound)
        if not self.training:
            terms["log_w"] = log_px_z + sum(units(p.log_prob(z) - q.log_prob(z)).sum(-1) for p, q, z in drawn)
            terms["log_w"] = terms["log_w"] + log_p_c.unflatten(0, shape)
            terms |= {f"mean_{l}": units((q.mean - p.mean) / p.stddev) for l, (p, q, _) in enumerate(drawn, 1)}
            terms[f"mean_{self.levels}"] = units(c)
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
        """q(z_l|z_>l, c, x) of the top learned levels, z_>l the means of theirs: a list of Normal, differentiable in
        x (B, c_x, H, W) but for the context, which is quantised."""
        means_down = self.top_down(self.dct(x), self.encoder(x), lambda l, p, q: q.mean)
        return [q for _, (_, q, _) in zip(range(levels), means_down)]

    def reconstruct(self, x, f, keep, below=lambda p: p.mean):
        """Means of p(x|z), (B, c_x, H, W): the top `keep` levels are the context and the means of q, those below the means of
        p, or what below(p) is. Without the context, keep = 0, it is what the means of all steps of p(c) lead to."""
        c = self.dct(x) if keep else self.dct.quantise(self.p_c.sample(len(x), torch.zeros_like))
        means_down = self.top_down(c, self.encoder(x), lambda l, p, q: q.mean if l > self.levels - keep else below(p))
        return self.p_x([z for _, _, z in means_down]).mean

    def reconstructions(self, x, f):
        L = self.levels
        panels = {"test images": x, "contexts": self.dct.image(self.dct(x)),
                  "reconstructed through all levels": self.reconstruct(x, f, L)}
        for l in sorted({math.ceil((L - 1) * third / 3) for third in (1, 2, 3)}):          # at last only the context is kept
            panels[f"levels {l} down drawn from the prior"] = self.reconstruct(x, f, L - l, draw)
        return panels

    def samples(self, n, f):
        c = self.dct.quantise(self.p_c.sample(n))
        images = self.p_x([z for _, _, z in self.top_down(c, None, lambda l, p, q: draw(p))]).mean
        return {"contexts": self.dct.image(c), "what comes of them": images}


def draw(normal):
    return normal.mean + normal.stddev * common.normal_like(normal.mean)


def train(model, f, data, loop):
    """Minimise -log p(x|z) + beta sum_l KL_l over --num_epochs. Returns the average of the weights, which is evaluated."""
    model.dct.fit(data.train[0])
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
    models = training.fit(DCTVAE, settings, data, train=train)
    status = report.report(models, settings, data)
    deep.evaluate_further(models, settings, data)
    return status


if __name__ == "__main__":
    common.run(main)
