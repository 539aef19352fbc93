"""Ladder VAE on MNIST: how deep a hierarchy of latents stays in use when inference goes top-down.

    CUDA_VISIBLE_DEVICES=0 python MNIST_HVAE_Ladder.py
    torchrun --nproc_per_node=4 MNIST_HVAE_Ladder.py --dataset omniglot --autocast bf16

Posterior and prior share one top-down pass (Sønderby et al. 2016, arXiv 1602.02282; Child 2021, arXiv 2011.10650). The pixels
see the sum of all latents and not the decoder's state, so that every level must carry information (Kuzina & Tomczak 2024,
arXiv 2412.01373). The baseline of MNIST_HVAE_DCT.py and MNIST_HVAE_DVP.py.
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
    small = "--latents 2,2 --num_ch 16 --batch_size 100 --num_epochs 12 --warmup_epochs 0.5 --ema 0.99 --num_samples 100 --num_test 1000"
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


class LadderVAE(nn.Module):
    """p(x, z) = p(x|z_1..z_L) p(z_L) prod_l p(z_l|z_>l),  q(z|x) = q(z_L|x) prod_l q(z_l|z_>l, x), from the top:

        p(z_l|z_>l), h = prior block(s)                                   s = 1 at the start
        q(z_l|z_>l, x) = posterior block((e + s) / sqrt 2)                e the encoder's feature of this scale
        s <- block(s + h + conv z_l)
        p(x|z) = Bernoulli(conv silu conv sum_l upsample(z_l) / sqrt L),  cifar10: LogisticMixture(the same)
    """

    elbo_draws = 1

    def __init__(self, f):
        super().__init__()
        self.c_x, self.side, _ = datasets.image_shape(f.dataset)
        c_z, sides = f.d_z or self.c_x, deep.sides_of_latents(f)
        L = self.levels = self.learned_levels = len(sides)
        self.dimensions, self.widest_layer = (self.c_x * self.side**2 if f.dataset == "cifar10" else 0), f.num_ch * self.side**2
        c_out = deep.LogisticMixture.K * deep.LogisticMixture.n(self.c_x) if self.dimensions else self.c_x
        self.encoder = Encoder(f, sides)
        self.register_buffer("s_start", torch.ones(1, f.num_ch, sides[0], sides[0]), persistent=False)
        self.latents = nn.ModuleList(Latent(f, sides[L - l], c_z, f.num_ch, L, l) for l in range(L, 0, -1))
        self.z_to_x = nn.Sequential(nn.Conv2d(c_z, f.num_ch, 1), nn.SiLU(), nn.Conv2d(f.num_ch, c_out, 3, padding=1))

    def top_down(self, n, features, choose):
        """Yields p(z_l|z_>l), q(z_l|z_>l, x) and z_l = choose(l, p, q), each (n, c_z, side, side), for l = L, ..., 1. Without
        features q is None."""
        s = self.s_start.expand(n, -1, -1, -1)
        for l, latent in zip(range(self.levels, 0, -1), self.latents):
            s = F.interpolate(s, size=latent.side)
            p, h = latent.p(s)
            q = latent.q(s, features[latent.side]) if features else None
            z = choose(l, p, q)
            yield p, q, z
            if l > 1:
                s = latent.update(s, h, z)

    def p_x(self, zs, shape=(-1,)):
        """p(x|z) of all latents, each (n, c_z, side, side), n = shape's product; its pixels are (*shape, c_x, H, W)."""
        total = sum(F.interpolate(z, size=self.side, mode="bilinear") for z in zs) / math.sqrt(self.levels)
        out = self.z_to_x(total).to(total.dtype).unflatten(0, shape)
        return deep.LogisticMixture(out, self.c_x) if self.dimensions else Bernoulli(logits=out)

    def forward(self, x, f, sample_shape=()):
        """x (B, c_x, H, W). Terms of the ELBO at a draw of all latents, in nats; shapes as report.py says."""
        shape = (*sample_shape, len(x))
        features = {side: e.expand(*sample_shape, *e.shape).flatten(0, len(sample_shape))
                    for side, e in self.encoder(x).items()}
        drawn = list(self.top_down(math.prod(shape), features, lambda l, p, q: deep.draw(q)))[::-1]     # level 1 first
        log_px_z = self.p_x([z for _, _, z in drawn], shape).log_prob(x).flatten(len(shape)).sum(-1)

        def units(values):                                # (S B, c_z, side, side) -> (S, B, d)
            return values.flatten(1).unflatten(0, shape)

        terms = {"log_px_z": log_px_z} | {f"kl_{l}": units(kl_divergence(q, p)) for l, (p, q, _) in enumerate(drawn, 1)}
        if not self.training:
            terms["log_w"] = log_px_z + sum(units(p.log_prob(z) - q.log_prob(z)).sum(-1) for p, q, z in drawn)
            terms |= {f"mean_{l}": units((q.mean - p.mean) / p.stddev) for l, (p, q, _) in enumerate(drawn, 1)}
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO, -log p(x|z) + beta sum_l KL_l, in nats, (B,); --free_bits of a unit's KL cost nothing."""
        loss = -terms["log_px_z"]
        for level in common.levels(terms):
            loss = loss + f.beta * common.free_bits(terms[f"kl{level}"], f.free_bits).sum(-1)
        return loss

    def top_posterior(self, x, f, levels):
        """q(z_l|z_>l, x) of the top levels, z_>l the means of theirs: a list of Normal, differentiable in x (B, c_x, H, W)."""
        means_down = self.top_down(len(x), self.encoder(x), lambda l, p, q: q.mean)
        return [q for _, (_, q, _) in zip(range(levels), means_down)]

    def reconstruct(self, x, f, keep, below=lambda p: p.mean):
        """Means of p(x|z), (B, c_x, H, W): the top `keep` levels are the means of q, those below of p, or what below(p) is."""
        means_down = self.top_down(len(x), self.encoder(x), lambda l, p, q: q.mean if l > self.levels - keep else below(p))
        return self.p_x([z for _, _, z in means_down]).mean

    def reconstructions(self, x, f):
        L = self.levels
        panels = {"test images": x, "reconstructed through all levels": self.reconstruct(x, f, L)}
        for l in range(math.ceil(L / 4), L, math.ceil(L / 4)):
            panels[f"levels {l} down drawn from the prior"] = self.reconstruct(x, f, L - l, deep.draw)
        return panels

    def samples(self, n, f):
        return self.p_x([z for _, _, z in self.top_down(n, None, lambda l, p, q: deep.draw(p, f.temperature))]).mean


def train(model, f, data, loop):
    """Minimise -log p(x|z) + beta sum_l KL_l over --num_epochs. Returns the average of the weights, which is evaluated."""
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
    models = training.fit(LadderVAE, settings, data, train=train)
    status = report.report(models, settings, data)
    deep.evaluate_further(models, settings, data)
    return status


if __name__ == "__main__":
    common.run(main)
