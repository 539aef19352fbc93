"""δ-VAE on MNIST: can a rate of at least δ keep the latents in use under a strong decoder?

    CUDA_VISIBLE_DEVICES=0 python MNIST_VAE_Delta.py --delta 5.0
    CUDA_VISIBLE_DEVICES=0 python MNIST_VAE_Delta.py --prior ar1,standard

The model comes from Razavi, van den Oord, Poole & Vinyals (2019, arXiv 1901.03416). The prior of a
sequence of latents is an AR(1) process. No posterior that is independent over time can match it.
The rate, which is the KL between posterior and prior, is at least δ nats, and the user chooses δ.

The decoder is autoregressive over pixels (gated masked convolutions, van den Oord et al. 2016,
arXiv 1606.05328). It can do without latents, and does so with `--prior standard`, where p(z) is
N(0, I).

How it is trained: Adamax minimises the negative beta-ELBO in batches of 250 images for 50 epochs,
with one draw of the latents per image. The learning rate rises to 0.01 in two epochs and then falls
to 1e-5 as a cosine. The weight decay is 1e-6, and gradients are clipped to a norm of 5. An
exponential average of the weights (0.999) is evaluated.

In ten further epochs an auxiliary prior, which is autoregressive, is fitted to the posterior.
Everything else is then frozen. The learning rate follows the same curve within these epochs, and
there is no weight decay. `train` below makes the steps of both parts. The loop around them is
`training.Training`, which also writes checkpoints.

The metric `rate_auxiliary` is the KL from the auxiliary prior, in nats. It is the rate of a code
that suits the latents. The metric `smallest_rate` is δ, or 0 with --prior standard.
"""
import math
from dataclasses import dataclass

import common
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal
from torch.nn import functional as F

import datasets
import deep
import headroom
import processes
import report
import training


@dataclass
class Flags(deep.DeepFlags):
    # The flags of --preset small. With them, two CPU cores train a model in minutes. The defaults
    # below are for a GPU.
    small = (
        "--num_epochs 4 --warmup_epochs 0.4 --batch_size 100 --ema 0.99 --auxiliary_epochs 2 "
        "--num_samples 100 --num_test 500"
    )

    delta: float = common.flag(
        5.0, "smallest KL, in nats, that the AR(1) prior allows", above=0
    )
    prior: str = common.flag(
        "ar1",
        "prior of z: ar1 gives the delta-VAE, standard gives the ordinary VAE with p(z) = N(0, I)",
        choices=("ar1", "standard"),
    )
    start_std: float = common.flag(
        1.0,
        "initial standard deviation of q(z|x), divided by the one that is nearest to the AR(1) "
        "prior",
        low=0.01,
        high=10,
    )
    dim_z: int = common.flag(4, "number of units of z for each row of the image", low=1)
    num_ch: int = common.flag(16, "channels of the decoder's convolutions", low=1)
    num_layers: int = common.flag(
        5,
        "number of gated layers of the decoder; with 5 or more, each pixel sees all pixels before "
        "it",
        low=1,
    )
    d_hidden: int = common.flag(
        128, "number of units in the recurrent layers of the encoder and the auxiliary prior", low=1
    )
    auxiliary_epochs: int = common.flag(
        10, "number of epochs in which the auxiliary prior is fitted after training", low=1
    )
    num_epochs: int = common.flag(50, "number of passes over the training set", low=1)
    preset: str = common.flag(
        "published",
        f"published keeps the defaults; small stands for {small}",
        choices=("published", "small"),
    )
    dataset: str = common.flag(
        "auto",
        "data set of images; auto chooses mnist if it is on disk or can be downloaded, and the "
        "embedded digits otherwise",
        choices=("auto", "mnist", "fashion", "digits", "omniglot"),
    )


# Lower limit for the variance of p(z_t|z_{t-1}). float32 resolves a residual of its std.
MIN_VARIANCE = 1e-8


def smallest_rate(log_variance, d, n):
    """δ of an AR(1) prior: the smallest KL of any posterior that is independent over time, in nats.

    The prior has n latents of d units, and p(z_t|z_{t-1}) has variance 1 - α² = exp(log_variance):

        δ = ½ d [(n - 2) log(1 + α²) - log(1 - α²)]
    """
    alpha_squared = -math.expm1(log_variance)
    return d / 2 * ((n - 2) * math.log1p(alpha_squared) - log_variance)


def ar1_of_rate(delta, d, n):
    """α and log(1 - α²) of the AR(1) prior whose smallest rate is delta > 0 nats.

    The prior has n >= 2 latents of d units. Bisection finds the logarithm exactly up to rounding.
    It is returned, too, since α alone is not accurate enough next to 1.
    """
    # Brackets of log(1 - α²), since 0 <= log(1 + α²) <= -log(1 - α²).
    low = -2 * delta / d
    high = -2 * delta / d / (n - 1)

    middle = low + (high - low) / 2
    while low < middle < high:
        if smallest_rate(middle, d, n) > delta:
            low = middle
        else:
            high = middle
        middle = low + (high - low) / 2
    return math.sqrt(-math.expm1(high)), high


def kl_to_ar1(mean, std, alpha, prior_var):
    """E_q[KL(q(z_t) || p(z_t|z_{t-1}))] in nats for every step and unit, (..., n, d).

    q = Π_t N(mean_t, std_t²) with mean and std (..., n, d). p(z_t|z_{t-1}) = N(α z_{t-1},
    prior_var_t) with prior_var (n, 1) and z_0 = 0.
    """
    change = mean - alpha * before(mean)
    var = std.square()
    squares = change.square() + var + alpha**2 * before(var)
    return (squares / prior_var - 1 + prior_var.log() - var.log()) / 2


def before(z):
    """z_{t-1} for each t of a sequence (..., n, d), where z_0 is 0."""
    return F.pad(z[..., :-1, :], (0, 0, 1, 0))


class AuxiliaryPrior(nn.Module):
    """p(z_t|z_<t) = N(α z_{t-1} + m(z_<t), diag s(z_<t)²), fitted to the posterior after training.

    m and s come from a recurrent network and a bias for each step. When it is created, it is the
    model's own prior.
    """

    def __init__(self, d, d_hidden, alpha, prior_var):
        super().__init__()
        self.alpha = alpha
        self.z_to_h = nn.GRU(d, d_hidden, batch_first=True)
        self.h_to_z = nn.Linear(d_hidden, 2 * d, bias=False)
        nn.init.zeros_(self.h_to_z.weight)
        self.of_step = nn.Parameter(torch.zeros(len(prior_var), 2 * d))
        self.register_buffer("prior_std", prior_var.sqrt(), persistent=False)

    def following(self, previous, steps=slice(None), state=None):
        """p(z_t|z_<t) of these steps, a Normal (B, steps, d), and the recurrent state after them.

        previous (B, steps, d) holds z_{t-1} for each step. state is the one before the first step.
        """
        h, state = self.z_to_h(previous, state)
        shift, raw_std = (self.h_to_z(h) + self.of_step[steps]).chunk(2, dim=-1)
        std = common.std_head(raw_std, self.prior_std[steps])
        return Normal(self.alpha * previous + shift, std), state

    def forward(self, z):
        """log p(z) in nats, (B,), of z (B, n, d)."""
        p_z, _ = self.following(before(z))
        return p_z.log_prob(z).sum((-2, -1))

    def sample(self, n, temperature=1.0):
        """n draws (n, 28, d), the std of each p(z_t|z_<t) multiplied by the temperature."""
        steps, width = self.of_step.shape
        z_t = self.prior_std.new_zeros(n, 1, width // 2)
        state = None
        z = []
        for t in range(steps):
            p_z, state = self.following(z_t, slice(t, t + 1), state)
            z_t = deep.draw(p_z, temperature)
            z.append(z_t)
        return torch.cat(z, dim=1)


def gate(h):
    """tanh(a / 2) sigmoid(b) of the two halves a, b of the channels, by one sigmoid."""
    a, b = h.sigmoid().chunk(2, dim=1)
    return (2 * a - 1) * b


class Decoder(nn.Module):
    """p(x|z) = Π_ij Bernoulli(x_ij | earlier pixels, z_i), where pixels are in reading order.

    A vertical stack of layers reads the rows above, without z. A horizontal stack reads the pixels
    to the left, z_i, and in each layer the vertical stack. Together they see all earlier pixels
    within reach, without a blind spot.

    Only the horizontal stack reads z, and each of its rows reads only its own z_i. So the vertical
    stack is computed once for all draws of z, and once per row in sampling.
    """

    def __init__(self, dim_z, num_ch, num_layers, width):
        super().__init__()
        C = num_ch
        dilations = [2 ** (l % 5) for l in range(num_layers)]
        self.x_to_v = nn.Conv2d(1, C, (2, 3))
        self.x_to_h = nn.Conv2d(1, C, (1, 2))
        self.z_to_h = nn.Linear(dim_z, C * width)
        self.v_to_v = nn.ModuleList([nn.Conv2d(C, 2 * C, (2, 3), dilation=k) for k in dilations])
        self.v_to_h = nn.ModuleList([nn.Conv2d(C, 2 * C, 1) for _ in dilations])
        self.h_to_h = nn.ModuleList(
            [nn.Conv2d(C, 2 * C, (1, 2), dilation=(1, k)) for k in dilations]
        )
        self.h_out = nn.ModuleList([nn.Conv2d(C, C, 1) for _ in dilations])
        self.h_to_x = nn.Sequential(nn.SiLU(), nn.Conv2d(C, C, 1), nn.SiLU(), nn.Conv2d(C, 1, 1))

    def vertical(self, x):
        """What each horizontal layer reads of the rows above it, a list of (B, 2C, H, W).

        x is (B, 1, H, W).
        """
        # Shifted one row down: row i reads the rows before i.
        v = self.x_to_v(F.pad(x, (1, 1, 2, 0))[:, :, :-1])
        context = []
        for v_to_v, v_to_h in zip(self.v_to_v, self.v_to_h):
            k = v_to_v.dilation[0]
            v = v + gate(v_to_v(F.pad(v, (k, k, k, 0))))
            context.append(v_to_h(v))
        return context

    def horizontal(self, x, z, context):
        """Logits of the pixels, (S, B, 1, H, W), of x (B, 1, H, W) with z (S, B, H, d).

        context is the result of `vertical`. x, z and context cover whole images, or the same
        rows of all images.
        """
        # 1. The pixels to the left, shifted one pixel right, and z.
        h = self.x_to_h(F.pad(x, (2, 0))[..., :-1])
        from_z = self.z_to_h(z).unflatten(-1, (x.shape[-1], -1)).movedim(-1, 2)
        h = (h + from_z).flatten(0, 1)

        # 2. The layers, each with its vertical one.
        for above, h_to_h, h_out in zip(context, self.h_to_h, self.h_out):
            k = h_to_h.dilation[1]
            new = h_to_h(F.pad(h, (k, 0))).unflatten(0, z.shape[:2]) + above
            h = h + h_out(gate(new.flatten(0, 1)))
        return self.h_to_x(h).unflatten(0, z.shape[:2])

    def sample(self, z):
        """Binary images (B, 1, H, W), drawn pixel by pixel, at z (B, H, d)."""
        B, H, _ = z.shape
        W = self.z_to_h.out_features // self.x_to_h.out_channels
        x = z.new_zeros(B, 1, H, W)
        for i in range(H):
            row = slice(i, i + 1)
            context = [above[:, :, row] for above in self.vertical(x[:, :, : i + 1])]
            for j in range(W):
                logits = self.horizontal(x[:, :, row], z[None, :, row], context)
                x[:, :, i, j] = common.binarise(logits[0, :, :, 0, j].sigmoid())
        return x


class DeltaVAE(nn.Module):
    """A VAE with n = 28 latents of d units, one for each image row:

        p(z_1) = N(0, I)
        p(z_t|z_{t-1}) = N(α z_{t-1}, (1 - α²) I)
        q(z|x) = Π_t N(mean_t, diag std_t²),   mean_t and std_t from rows t..n of x

    α follows from δ, and is 0 for the ordinary VAE. p(x|z) is a Decoder.
    """

    n, width = datasets.image_shape("mnist")[1:]
    elbo_draws = 1
    headroom_rows = deep.HEADROOM_ROWS

    def __init__(self, f):
        super().__init__()
        d = f.dim_z
        n = self.n

        # 1. The prior.
        self.delta = 0.0
        self.alpha = 0.0
        log_variance = 0.0
        if f.prior == "ar1":
            self.delta = f.delta
            self.alpha, log_variance = ar1_of_rate(f.delta, d, n)
        variance = torch.full((n, 1), math.exp(log_variance), dtype=torch.float64)
        prior_var = variance.clone()
        prior_var[0] = 1

        # 2. The posterior whose rate is δ. Its means are 0. Its variance is (1 - α²) / (1 + α²), at
        #    both ends 1 - α².
        closest_var = variance / (1 + self.alpha**2)
        closest_var[[0, -1]] = variance[0]

        self.register_buffer("prior_var", prior_var, persistent=False)
        self.register_buffer("closest_std", closest_var.sqrt(), persistent=False)
        self.register_buffer("start_std", torch.tensor(f.start_std), persistent=False)

        # 3. Networks.
        self.rows_to_h = nn.GRU(self.width, f.d_hidden, batch_first=True)
        self.h_to_z = nn.Linear(f.d_hidden, 2 * d)
        self.decoder = Decoder(d, f.num_ch, f.num_layers, self.width)
        self.auxiliary = AuxiliaryPrior(d, f.d_hidden, self.alpha, prior_var)
        self.widest_layer = 2 * f.num_ch * n * self.width

    def q_z(self, x):
        """q(z|x), (B, n, d)."""
        # The GRU reads from the last row up. Autocast would make cuDNN compute it in float16.
        with torch.autocast(x.device.type, enabled=False):
            h, _ = self.rows_to_h(x.squeeze(1).flip(1))
        mean, raw_std = self.h_to_z(h.flip(1)).to(x.dtype).chunk(2, dim=-1)
        return Normal(mean, common.std_head(raw_std, self.closest_std, self.start_std))

    def p_z(self, z):
        """p(z_t|z_{t-1}) for each t of z (..., n, d)."""
        return Normal(self.alpha * before(z), self.prior_var.sqrt())

    def sample_z(self, n, temperature=1.0):
        """n draws of the prior (n, 28, d), each std multiplied by the temperature."""
        d = self.h_to_z.out_features // 2
        noise = processes.normal_like(self.prior_var.new_empty(n, self.n, d))
        z = temperature * self.prior_var.sqrt() * noise
        for t in range(1, self.n):
            z[:, t] += self.alpha * z[:, t - 1]
        return z

    def forward(self, x, f, sample_shape=()):
        """The terms of the ELBO for binary x (B, 1, 28, 28), in nats. Shapes are in report.py."""
        q_z = self.q_z(x)
        z = draw(q_z, sample_shape)  # (S, B, n, d)

        context = self.decoder.vertical(x)
        logits = self.decoder.horizontal(x, z.view(-1, *z.shape[-3:]), context).to(x.dtype)
        log_px_z = Bernoulli(logits=logits).log_prob(x).sum((-3, -2, -1)).view(z.shape[:-2])
        kl = kl_to_ar1(q_z.mean, q_z.stddev, self.alpha, self.prior_var)
        terms = {"log_px_z": log_px_z, "kl": kl.flatten(-2)}
        if self.training:
            return terms

        # For the evaluation: the importance weight, both rates, and the means in units of the
        # prior, whose marginals are N(0, I).
        log_q_z = q_z.log_prob(z).sum((-2, -1))
        log_p_z = self.p_z(z).log_prob(z).sum((-2, -1))
        log_auxiliary = self.auxiliary(z.flatten(0, -3)).view(z.shape[:-2])
        terms["log_w"] = log_px_z + log_p_z - log_q_z
        terms["rate_auxiliary"] = log_q_z - log_auxiliary
        terms["elbo_auxiliary"] = log_px_z - terms["rate_auxiliary"]
        terms["smallest_rate"] = torch.full_like(log_px_z, self.delta)
        terms["mean"] = q_z.mean.flatten(-2)
        return terms

    def loss(self, terms, f):
        """The negative beta-ELBO per image, -log p(x|z) + beta KL, in nats, (B,).

        The first --free_bits nats of each unit's KL cost nothing.
        """
        return -terms["log_px_z"] + f.beta * common.free_bits(terms["kl"], f.free_bits).sum(-1)

    # What the report measures (see report.py).

    def residuals(self, x, f, draws):
        """Describe binary pixels minus their expected probabilities, as headroom.py needs it.

        The probability of a pixel depends on the true pixels before it. A further unit adds its
        contribution to the logits of all pixels. Each of the two estimates has one draw of z.

        No posterior matches the AR(1) prior. With this prior a unit counts as collapsed if its mean
        does not vary, and a further unit is a sequence of one unit per image row.
        """
        x = common.binarise(x)
        z = draw(self.q_z(x), (2,))
        logits = self.decoder.horizontal(x, z, self.decoder.vertical(x))

        prior = {}
        if f.prior == "ar1":
            steps = torch.arange(self.n)
            covariance = self.alpha ** (steps[:, None] - steps).abs().double()
            factor = headroom.sequence_factor(covariance, self.closest_std.squeeze(1).cpu())
            prior = {
                "counts_means": True,
                "sequence_length": self.n,
                "sequence_factor": factor,
            }
        residual = headroom.bernoulli_residual(
            x, logits[:, None], encoder_input=(x.flatten(1),), beta=f.beta, **prior
        )
        return {"": residual}

    # What the pictures use.

    def reconstructions(self, x, f):
        """{title: images}: x, and a draw of p(x|z) at a draw of q(z|x)."""
        drawn = self.decoder.sample(draw(self.q_z(x)))
        return {"test images": x, "draws of p(x|z), with z from q(z|x)": drawn}

    def samples(self, n, f):
        """{title: images}: draws of p(x|z) at n draws of both priors."""
        own = self.decoder.sample(self.sample_z(n, f.temperature))
        auxiliary = self.decoder.sample(self.auxiliary.sample(n, f.temperature))
        return {
            "draws of p(x|z), with z from the model's prior": own,
            "draws of p(x|z), with z from the auxiliary prior": auxiliary,
        }


def draw(q_z, sample_shape=()):
    """Differentiable draws of a Normal (B, n, d): (S, B, n, d)."""
    noise = processes.normal_like(q_z.mean.expand(*sample_shape, *q_z.mean.shape))
    return q_z.mean + q_z.stddev * noise


def train(model, f, data, loop):
    """Minimise -log p(x|z) + beta KL over --num_epochs, then fit the auxiliary prior.

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
        # Binary pixels are drawn anew at each visit of an image.
        x = common.binarise(images.index_select(0, rows))

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
    for rows in loop.batches(model=model, average=average, optimizer=optimizer, schedule=schedule):
        if share is not None:
            share.fill_(training.beta_share(f, loop.epochs_done))
        replayed_step(rows)
        schedule.step()

    fit_auxiliary_prior(average.module, f, images, loop)
    return average.module


def fit_auxiliary_prior(model, f, images, loop):
    """Minimise E_q[log q(z|x) - log p_aux(z)] over --auxiliary_epochs, everything else frozen.

    images (n, 1, 28, 28) are those of training, and loop is a training.Training.
    """
    auxiliary = model.auxiliary.requires_grad_()
    optimizer = deep.make_optimizer(auxiliary, f)
    steps = loop.steps // f.num_epochs * f.auxiliary_epochs
    schedule = deep.warmup_cosine(optimizer, f, steps)
    parallel = processes.data_parallel(auxiliary)

    def step(rows):
        with torch.no_grad():
            q_z = model.q_z(common.binarise(images.index_select(0, rows)))
            z = draw(q_z)
        rate = (q_z.log_prob(z).sum((-2, -1)) - parallel(z)).mean()

        optimizer.zero_grad()
        rate.backward()
        nn.utils.clip_grad_norm_(auxiliary.parameters(), f.grad_clip)
        optimizer.step()
        loop.record({"loss": rate})

    replayed_step = loop.replayed(step)
    batches = loop.batches(
        "auxiliary", f.auxiliary_epochs, model=model, optimizer=optimizer, schedule=schedule
    )
    for rows in batches:
        replayed_step(rows)
        schedule.step()


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    for f in settings:
        largest = smallest_rate(math.log(MIN_VARIANCE), f.dim_z, DeltaVAE.n)
        if f.prior == "ar1" and f.delta > largest:
            common.stop(
                f, f"--delta: got {f.delta}, wants at most {largest:.1f} for --dim_z {f.dim_z}"
            )
    data = datasets.load_images(settings)
    runs = training.fit(DeltaVAE, settings, data, train=train)
    return report.report(runs)


if __name__ == "__main__":
    common.run(main)
