"""δ-VAE on MNIST: a rate that no encoder can push below δ, where the ordinary VAE with the same strong decoder collapses.

    CUDA_VISIBLE_DEVICES=0 python MNIST_VAE_Delta.py --delta 5.0
    python MNIST_VAE_Delta.py --prior ar1,standard

After Razavi, van den Oord, Poole & Vinyals (2019, arXiv 1901.03416): the prior of a sequence of latents is an AR(1) process,
which no posterior that is independent over time can match. How far they stay apart, at least δ nats, is the user's choice.
The decoder is autoregressive over pixels (gated masked convolutions, van den Oord et al. 2016, arXiv 1606.05328), and can do
without latents: with --prior standard, p(z) = N(0, I), it does. After training, an autoregressive prior is fitted to the
posterior's draws, all else frozen: what the latents cost with a code that fits them is `rate_auxiliary`, in nats. δ, or 0 with
--prior standard, is `smallest_rate`.
"""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributions import Bernoulli, Normal
from torch.nn import functional as F

import common
import datasets
import deep
import report
import training


@dataclass
class Flags(deep.DeepFlags):
    # What two CPU cores can do in minutes; the defaults are for a GPU.
    small = "--num_epochs 4 --warmup_epochs 0.4 --batch_size 100 --ema 0.99 --auxiliary_epochs 2 --num_samples 100 --num_test 500"
    delta: float = common.flag(5.0, "nats below which the rate of the AR(1) prior cannot fall", above=0)
    prior: str = common.flag("ar1", "ar1, or standard for the ordinary VAE, p(z) = N(0, I)", choices=("ar1", "standard"))
    start_std: float = common.flag(1.0, "std of q(z|x) that training starts from, as a share of the one nearest to the AR(1) prior",
                                   low=0.01, high=10)
    dim_z: int = common.flag(4, "latent units of each image row", low=1)
    num_ch: int = common.flag(16, "channels of the decoder's convolutions", low=1)
    num_layers: int = common.flag(5, "gated layers of the decoder; from 5 on a pixel sees all pixels before it", low=1)
    d_hidden: int = common.flag(128, "units of the recurrent layers: encoder, auxiliary prior", low=1)
    auxiliary_epochs: int = common.flag(10, "epochs in which the auxiliary prior is fitted", low=1)
    num_epochs: int = common.flag(50, "passes over the training set", low=1)
    preset: str = common.flag("published", f"small is {small}", choices=("published", "small"))
    dataset: str = common.flag("auto", "auto is mnist if on disk or to be fetched, else the embedded digits",
                               choices=("auto", "mnist", "fashion", "digits", "omniglot"))


MIN_VARIANCE = 1e-8                                       # of p(z_t|z_{t-1}): float32 resolves a residual of its std


def smallest_rate(log_variance, d, n):
    """δ of an AR(1) prior of n latents of d units whose p(z_t|z_{t-1}) has variance 1 - α² = exp(log_variance): the smallest
    KL, in nats, of any posterior that is independent over time, ½ d [(n - 2) log(1 + α²) - log(1 - α²)]."""
    return d / 2 * ((n - 2) * math.log1p(-math.expm1(log_variance)) - log_variance)


def ar1_of_rate(delta, d, n):
    """(α, log(1 - α²)) of the AR(1) prior of n >= 2 latents of d units whose smallest rate is delta > 0 nats; by bisection,
    exact to rounding. The logarithm says what α cannot where it is next to 1."""
    low, high = -2 * delta / d, -2 * delta / d / (n - 1)  # since 0 <= log(1 + α²) <= -log(1 - α²)
    while low < (middle := low + (high - low) / 2) < high:
        low, high = (middle, high) if smallest_rate(middle, d, n) > delta else (low, middle)
    return math.sqrt(-math.expm1(high)), high


def kl_to_ar1(mean, std, alpha, prior_var):
    """E_q[KL(q(z_t) || p(z_t|z_{t-1}))] of q = Π_t N(mean_t, std_t²) from p(z_t|z_{t-1}) = N(α z_{t-1}, prior_var_t), z_0 = 0,
    in nats, for every step and unit: mean and std (..., n, d), prior_var (n, 1); (..., n, d)."""
    change, var = mean - alpha * before(mean), std.square()
    return ((change.square() + var + alpha**2 * before(var)) / prior_var - 1 + prior_var.log() - var.log()) / 2


def before(z):
    """z_{t-1} of a sequence (..., n, d), 0 before the first."""
    return F.pad(z[..., :-1, :], (0, 0, 1, 0))


class AuxiliaryPrior(nn.Module):
    """p(z_t|z_<t) = N(α z_{t-1} + m(z_<t), diag s(z_<t)²), m and s recurrent, with a bias of each step's own. As it is created
    it is the model's own prior."""

    def __init__(self, d, d_hidden, alpha, prior_var):
        super().__init__()
        self.alpha = alpha
        self.z_to_h = nn.GRU(d, d_hidden, batch_first=True)
        self.h_to_z = nn.Linear(d_hidden, 2 * d, bias=False)
        nn.init.zeros_(self.h_to_z.weight)
        self.of_step = nn.Parameter(torch.zeros(len(prior_var), 2 * d))
        self.register_buffer("prior_std", prior_var.sqrt(), persistent=False)

    def following(self, previous, steps=slice(None), state=None):
        """(p(z_t|z_<t) of these steps, the state after them), of the z_{t-1} before each (B, steps, d)."""
        h, state = self.z_to_h(previous, state)
        shift, raw_std = (self.h_to_z(h) + self.of_step[steps]).chunk(2, dim=-1)
        return Normal(self.alpha * previous + shift, common.std_head(raw_std, self.prior_std[steps])), state

    def forward(self, z):
        """log p(z) in nats of z (B, n, d): (B,)."""
        return self.following(before(z))[0].log_prob(z).sum((-2, -1))

    def sample(self, n, temperature=1.0):
        """n draws (n, 28, d), step by step, the std of each p(z_t|z_<t) times the temperature."""
        z, state = [self.prior_std.new_zeros(n, 1, self.of_step.shape[1] // 2)], None
        for t in range(len(self.of_step)):
            p_z, state = self.following(z[-1], slice(t, t + 1), state)
            z.append(deep.draw(p_z, temperature))
        return torch.cat(z[1:], dim=1)


def gate(h):
    """tanh(a / 2) sigmoid(b) of the two halves of the channels, by one sigmoid."""
    a, b = h.sigmoid().chunk(2, dim=1)
    return (2 * a - 1) * b


class Decoder(nn.Module):
    """p(x|z) = Π_ij Bernoulli(x_ij | pixels above and left of it, z_i), pixel by pixel in reading order.

    A vertical stack reads the rows above, without z, a horizontal one the pixels to the left, z_i, and in each layer the
    vertical one: together all earlier pixels within reach, none of them hidden. As only the horizontal stack reads z, and
    each row of it only its own, the vertical one is computed once for all draws of z, and a row at a time while sampling.
    """

    def __init__(self, dim_z, num_ch, num_layers, width):
        super().__init__()
        C, dilations = num_ch, [2**(l % 5) for l in range(num_layers)]
        self.x_to_v = nn.Conv2d(1, C, (2, 3))
        self.x_to_h = nn.Conv2d(1, C, (1, 2))
        self.z_to_h = nn.Linear(dim_z, C * width)
        self.v_to_v = nn.ModuleList(nn.Conv2d(C, 2 * C, (2, 3), dilation=k) for k in dilations)
        self.v_to_h = nn.ModuleList(nn.Conv2d(C, 2 * C, 1) for k in dilations)
        self.h_to_h = nn.ModuleList(nn.Conv2d(C, 2 * C, (1, 2), dilation=(1, k)) for k in dilations)
        self.h_out = nn.ModuleList(nn.Conv2d(C, C, 1) for k in dilations)
        self.h_to_x = nn.Sequential(nn.SiLU(), nn.Conv2d(C, C, 1), nn.SiLU(), nn.Conv2d(C, 1, 1))

    def vertical(self, x):
        """What the horizontal layers read of the rows above, of images x (B, 1, H, W): a list of (B, 2C, H, W)."""
        v, context = self.x_to_v(F.pad(x, (1, 1, 2, 0))[:, :, :-1]), []      # one row down: row i reads rows before i
        for v_to_v, v_to_h in zip(self.v_to_v, self.v_to_h):
            k = v_to_v.dilation[0]
            v = v + gate(v_to_v(F.pad(v, (k, k, k, 0))))
            context.append(v_to_h(v))
        return context

    def horizontal(self, x, z, context):
        """Logits (S, B, 1, H, W) of x (B, 1, H, W), with z (S, B, H, d) and context as `vertical` gives it: of whole images,
        or of the same rows of all."""
        h = self.x_to_h(F.pad(x, (2, 0))[..., :-1])       # one pixel right
        h = (h + self.z_to_h(z).unflatten(-1, (x.shape[-1], -1)).movedim(-1, 2)).flatten(0, 1)
        for above, h_to_h, h_out in zip(context, self.h_to_h, self.h_out):
            k = h_to_h.dilation[1]
            new = h_to_h(F.pad(h, (k, 0))).unflatten(0, z.shape[:2]) + above
            h = h + h_out(gate(new.flatten(0, 1)))
        return self.h_to_x(h).unflatten(0, z.shape[:2])

    def sample(self, z):
        """Binary images (B, 1, H, W) drawn pixel by pixel at z (B, H, d)."""
        x = z.new_zeros(len(z), 1, z.shape[1], self.z_to_h.out_features // self.x_to_h.out_channels)
        for i in range(x.shape[2]):
            row = slice(i, i + 1)
            context = [above[:, :, row] for above in self.vertical(x[:, :, :i + 1])]
            for j in range(x.shape[3]):
                logits = self.horizontal(x[:, :, row], z[None, :, row], context)
                x[:, :, i, j] = common.binarise(logits[0, :, :, 0, j].sigmoid())
        return x


class DeltaVAE(nn.Module):
    """n = 28 latents of d units, one an image row:

        p(z_1) = N(0, I), p(z_t|z_{t-1}) = N(α z_{t-1}, (1 - α²) I)      α from δ; 0 for the ordinary VAE
        q(z|x) = Π_t N(mean_t, diag std_t²), from rows t..n of x         p(x|z) as `Decoder` says
    """

    n, width = datasets.image_shape("mnist")[1:]
    elbo_draws = 1

    def __init__(self, f):
        super().__init__()
        d, n = f.dim_z, self.n
        self.delta = f.delta if f.prior == "ar1" else 0.0
        self.alpha, log_variance = ar1_of_rate(f.delta, d, n) if f.prior == "ar1" else (0.0, 0.0)
        variance = torch.full((n, 1), math.exp(log_variance), dtype=torch.float64)
        # Of the posterior whose rate is δ, with means 0: (1 - α²) / (1 + α²), at both ends 1 - α².
        closest_var, prior_var = variance / (1 + self.alpha**2), variance.clone()
        closest_var[[0, -1]] = variance[0]
        prior_var[0] = 1
        self.register_buffer("prior_var", prior_var, persistent=False)
        self.register_buffer("closest_std", closest_var.sqrt(), persistent=False)
        self.register_buffer("start_std", torch.tensor(f.start_std), persistent=False)
        self.rows_to_h = nn.GRU(self.width, f.d_hidden, batch_first=True)
        self.h_to_z = nn.Linear(f.d_hidden, 2 * d)
        self.decoder = Decoder(d, f.num_ch, f.num_layers, self.width)
        self.auxiliary = AuxiliaryPrior(d, f.d_hidden, self.alpha, prior_var)
        self.widest_layer = 2 * f.num_ch * n * self.width

    def q_z(self, x):
        with torch.autocast(x.device.type, enabled=False):                # which makes a cuDNN GRU float16
            h, _ = self.rows_to_h(x.squeeze(1).flip(1))   # from the last row up
        mean, raw_std = self.h_to_z(h.flip(1)).to(x.dtype).chunk(2, dim=-1)
        return Normal(mean, common.std_head(raw_std, self.closest_std, self.start_std))

    def p_z(self, z):
        return Normal(self.alpha * before(z), self.prior_var.sqrt())

    def sample_z(self, n, temperature=1.0):
        """n draws of the prior (n, 28, d), the std of each p(z_t|z_{t-1}) times the temperature."""
        noise = common.normal_like(self.prior_var.new_empty(n, self.n, self.h_to_z.out_features // 2))
        z = temperature * self.prior_var.sqrt() * noise
        for t in range(1, self.n):
            z[:, t] += self.alpha * z[:, t - 1]
        return z

    def forward(self, x, f, sample_shape=()):
        """x (B, 1, 28, 28), binary. Terms of the ELBO at draws of z, in nats; shapes as report.py says."""
        q_z = self.q_z(x)
        z = draw(q_z, sample_shape)                       # (S, B, n, d)
        logits = self.decoder.horizontal(x, z.view(-1, *z.shape[-3:]), self.decoder.vertical(x)).to(x.dtype)
        log_px_z = Bernoulli(logits=logits).log_prob(x).sum((-3, -2, -1)).view(z.shape[:-2])
        terms = {"log_px_z": log_px_z, "kl": kl_to_ar1(q_z.mean, q_z.stddev, self.alpha, self.prior_var).flatten(-2)}
        if not self.training:
            log_q_z = q_z.log_prob(z).sum((-2, -1))
            terms["log_w"] = log_px_z + self.p_z(z).log_prob(z).sum((-2, -1)) - log_q_z
            terms["rate_auxiliary"] = log_q_z - self.auxiliary(z.flatten(0, -3)).view(z.shape[:-2])
            terms["elbo_auxiliary"] = log_px_z - terms["rate_auxiliary"]
            terms["smallest_rate"] = torch.full_like(log_px_z, self.delta)
            terms["mean"] = q_z.mean.flatten(-2)          # of both priors z_t ~ N(0, I)
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO, -log p(x|z) + beta KL, in nats, (B,)."""
        return -terms["log_px_z"] + f.beta * common.free_bits(terms["kl"], f.free_bits).sum(-1)

    def reconstructions(self, x, f):
        return {"test images": x, "drawn from p(x|z), z from q(z|x)": self.decoder.sample(draw(self.q_z(x)))}

    def samples(self, n, f):
        return {"z from the model's own prior": self.decoder.sample(self.sample_z(n, f.temperature)),
                "z from the auxiliary prior": self.decoder.sample(self.auxiliary.sample(n, f.temperature))}


def draw(q_z, sample_shape=()):
    """Draws of a Normal, differentiable: (S, B, n, d)."""
    return q_z.mean + q_z.stddev * common.normal_like(q_z.mean.expand(*sample_shape, *q_z.mean.shape))


def train(model, f, data, loop):
    """The ELBO first; then, with all else frozen, the auxiliary prior on draws of the averaged model's posterior. Returns that
    model."""
    optimizer = deep.optimizer(model, f, f.weight_decay)
    schedule, average, parallel = deep.warmup_cosine(optimizer, f, loop.steps), deep.WeightAverage(model, f), deep.parallel(model)
    share = torch.ones_like(data.train[0][0, 0, 0, 0]) if training.beta_share(f, 0) < 1 else None    # of beta, that rises

    def step(rows):
        x = common.binarise(data.train[0].index_select(0, rows))           # afresh at each visit
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

    model = average.module
    auxiliary = model.auxiliary.requires_grad_()
    optimizer_2 = deep.optimizer(auxiliary, f)
    schedule_2 = deep.warmup_cosine(optimizer_2, f, loop.steps // f.num_epochs * f.auxiliary_epochs)
    parallel_2 = deep.parallel(auxiliary)

    def step_2(rows):
        with torch.no_grad():
            q_z = model.q_z(common.binarise(data.train[0].index_select(0, rows)))
            z = draw(q_z)
        rate = (q_z.log_prob(z).sum((-2, -1)) - parallel_2(z)).mean()
        optimizer_2.zero_grad()
        rate.backward()
        nn.utils.clip_grad_norm_(auxiliary.parameters(), f.grad_clip)
        optimizer_2.step()
        loop.record({"loss": rate})

    step_2 = loop.replayed(step_2)
    for rows in loop.batches("auxiliary", f.auxiliary_epochs, model=model, optimizer=optimizer_2, schedule=schedule_2):
        step_2(rows)
        schedule_2.step()
    return model


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    for f in settings:
        largest = smallest_rate(math.log(MIN_VARIANCE), f.dim_z, DeltaVAE.n)
        if f.prior == "ar1" and f.delta > largest:
            common.stop(f, f"--delta: got {f.delta}, wants at most {largest:.1f} of --dim_z {f.dim_z}")
    data = datasets.load_images(settings)
    models = training.fit(DeltaVAE, settings, data, train=train)
    return report.report(models, settings, data)


if __name__ == "__main__":
    common.run(main)
