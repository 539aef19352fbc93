"""Ladder VAE on MNIST: how deep a hierarchy of latents stays in use when inference goes top-down?

    CUDA_VISIBLE_DEVICES=0 python MNIST_HVAE_Ladder.py
    torchrun --nproc_per_node=4 MNIST_HVAE_Ladder.py --dataset omniglot --autocast bf16

How it is trained: Adamax minimises the negative beta-ELBO in batches of 250 images for 300 epochs,
with one draw of the latents per image. The learning rate rises to 0.01 in two epochs and then falls
to 1e-5 as a cosine. The weight decay is 1e-6, and gradients are clipped to a norm of 5. An
exponential average of the weights (0.999) is evaluated. `train` below makes the steps. The loop
around them is `training.Training`, which also writes checkpoints.

Posterior and prior share one top-down pass (Sonderby et al. 2016, arXiv 1602.02282; Child 2021,
arXiv 2011.10650). The pixels see the sum of all latents instead of the decoder's state, so that
every level has to carry information (Kuzina & Tomczak 2024, arXiv 2412.01373).

This is the baseline of MNIST_HVAE_DCT.py and MNIST_HVAE_DVP.py.
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
        "--latents 2,2 --num_ch 16 --batch_size 100 --num_epochs 12 --warmup_epochs 0.5 --ema 0.99 "
        "--num_samples 100 --num_test 1000"
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


class LadderVAE(nn.Module):
    """A ladder VAE. Level L is the top, level 1 is next to the pixels:

        p(x, z) = p(x|z_1..z_L) p(z_L) prod_{l < L} p(z_l|z_>l)
        q(z|x)  = q(z_L|x) prod_{l < L} q(z_l|z_>l, x)

    z_>l are the latents above level l. p and q go from the top down and share a state s, which
    starts as ones:

        p(z_l|z_>l), h = prior block(s)
        q(z_l|z_>l, x) = posterior block((e + s) / sqrt 2)
        s <- block(s + h + conv z_l)

    e is the encoder's feature of the side of level l. All latents together give the pixels:

        p(x|z) = Bernoulli(conv silu conv sum_l upsample(z_l) / sqrt L)

    For cifar10, LogisticMixture takes the place of Bernoulli.
    """

    elbo_draws = 1
    headroom_rows = deep.HEADROOM_ROWS

    def __init__(self, f):
        super().__init__()
        # 1. Sizes.
        self.c_x, self.side, _ = deep.image_shape(f)
        c = f.num_ch
        c_z = f.d_z or self.c_x
        c_out = self.c_x
        sides = deep.latent_sides(f)
        L = len(sides)
        self.levels = L
        self.learned_levels = L
        self.widest_layer = c * self.side**2
        self.dimensions = 0
        if f.dataset == "cifar10":
            self.dimensions = self.c_x * self.side**2
            c_out = deep.LogisticMixture.K * deep.LogisticMixture.n(self.c_x)

        # 2. Networks.
        self.encoder = Encoder(f, sides)
        s_start = torch.ones(1, c, sides[0], sides[0])
        self.register_buffer("s_start", s_start, persistent=False)
        self.latents = nn.ModuleList()
        for l, side in zip(range(L, 0, -1), sides):
            self.latents.append(Latent(f, side=side, c_z=c_z, c_prior=c, L=L, level=l))
        self.z_to_x = nn.Sequential(
            nn.Conv2d(c_z, c, 1), nn.SiLU(), nn.Conv2d(c, c_out, 3, padding=1)
        )

    def top_down(self, n, features, choose):
        """Yield p(z_l|z_>l), q(z_l|z_>l, x) and z_l for l = L, ..., 1, each (n, c_z, side, side).

        z_l is choose(l, p, q), such as a draw of q. features are the result of the encoder. If they
        are None, q is None.
        """
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
        """A draw of all latents from q(z|x), level 1 first: a list of (p, q, z)."""
        features = {}
        for side, e in self.encoder(x).items():
            features[side] = deep.repeat_examples(e, sample_shape)
        n = math.prod((*sample_shape, len(x)))
        drawn = list(self.top_down(n, features, lambda l, p, q: deep.draw(q)))
        drawn.reverse()
        return drawn

    def forward(self, x, f, sample_shape=()):
        """The terms of the ELBO for x (B, c_x, H, W), in nats. Shapes are in report.py."""
        shape = (*sample_shape, len(x))

        # 1. The reconstruction, and the KL of each level.
        drawn = self.draw_posterior(x, sample_shape)
        zs = [z for p, q, z in drawn]
        log_px_z = self.p_x(zs, shape).log_prob(x).flatten(len(shape)).sum(-1)
        terms = {"log_px_z": log_px_z}
        for l, (p, q, z) in enumerate(drawn, start=1):
            terms[f"kl_{l}"] = deep.per_unit(kl_divergence(q, p), shape)
        if self.training:
            return terms

        # 2. For the evaluation: the importance weight, and the means in units of the prior.
        log_ratio = 0
        for p, q, z in drawn:
            log_ratio = log_ratio + deep.per_unit(p.log_prob(z) - q.log_prob(z), shape).sum(-1)
        terms["log_w"] = log_px_z + log_ratio
        for l, (p, q, z) in enumerate(drawn, start=1):
            terms[f"mean_{l}"] = deep.per_unit((q.mean - p.mean) / p.stddev, shape)
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO per image, -log p(x|z) + beta sum_l KL_l, in nats, (B,).

        The first --free_bits nats of each unit's KL cost nothing.
        """
        loss = -terms["log_px_z"]
        for level in common.levels(terms):
            loss = loss + f.beta * common.free_bits(terms[f"kl{level}"], f.free_bits).sum(-1)
        return loss

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
        default.
        """

        def choose(l, p, q):
            return q.mean if l > self.levels - keep else below(p)

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
        """Means of p(x|z), (n, c_x, H, W), at n draws of all latents from their priors."""
        latents = self.top_down(n, None, lambda l, p, q: deep.draw(p, f.temperature))
        return self.p_x([z for p, q, z in latents]).mean


def train(model, f, data, loop):
    """Minimise -log p(x|z) + beta sum_l KL_l over --num_epochs.

    loop is a training.Training. Returns the model with the average of the weights, which is
    evaluated.
    """
    images = data.train[0]
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
    runs = training.fit(LadderVAE, settings, data, train=train)
    status = report.report(runs)
    deep.evaluate_further(runs)
    return status


if __name__ == "__main__":
    common.run(main)
