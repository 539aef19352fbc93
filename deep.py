"""Functions and classes that only the deep models use, in the order in which a script uses them.

1. Flags: `DeepFlags`, and the sizes of the latent maps that `--latents` asks for.
2. Building a model: initial weights, shapes, and the density of coloured pixels.
3. Training: learning rate, optimiser, average of the weights, mirrored images, precision.
4. After training: the two measurements of `--evaluate`, compression and attack.

The training loop itself is `training.Training`. Each script writes the body of its loop.
"""
import contextlib
import copy
import dataclasses
import math
import re
import sys
from dataclasses import dataclass

import common
import torch
from torch.distributions import kl_divergence
from torch.nn import functional as F

import datasets
import files
import headroom
import pictures
import processes

# --- Flags ---


@dataclass
class DeepFlags(common.RemedyFlags, common.TrainFlags):
    """The flags of the experiments with deep models.

    All processes that torchrun starts train each setting together. A script's own flags class also
    has `preset`, and `small`: the command line that `--preset small` abbreviates.
    """

    beta: float = common.scalar(1.0, "weight of every KL in the loss", low=0)
    batch_size: int = common.flag(250, "number of examples per training step and process", low=1)
    num_epochs: int = common.flag(300, "number of passes over the training set", low=1)
    optimizer: str = common.flag(
        "adamax", "optimiser that trains the weights", choices=("adamax", "adamw")
    )
    lr: float = common.flag(0.01, "learning rate of the optimiser", above=0)
    lr_end: float = common.flag(1e-5, "learning rate at the end of --lr_schedule cosine", low=0)
    lr_schedule: str = common.flag(
        "cosine",
        "how the learning rate changes after the warm-up: constant keeps it, cosine lowers it to "
        "--lr_end",
        choices=("constant", "cosine"),
    )
    warmup_epochs: float = common.flag(
        2.0, "number of epochs over which the learning rate rises from 0", low=0
    )
    weight_decay: float = common.flag(1e-6, "weight decay of the optimiser", low=0)
    grad_clip: float = common.flag(
        5.0, "largest norm of a gradient; larger gradients are scaled down to it", above=0
    )
    ema: float = common.flag(
        0.999,
        "decay of the exponential average of the weights; the averaged model is evaluated",
        low=0,
        high=0.999999,
    )
    autocast: str = common.flag(
        "none",
        "precision of the networks during training; none leaves float32",
        choices=("none", "bf16"),
    )
    temperature: float = common.flag(
        1.0,
        "factor on the standard deviation of every prior, in pictures of samples",
        low=0,
        evaluation=True,
    )
    num_test: int = common.flag(
        0, "number of test examples, taken from the beginning; 0 takes all", low=0, evaluation=True
    )
    dataset: str = common.flag(
        "auto",
        "data set of images; auto chooses mnist if it is on disk or can be downloaded, and the "
        "embedded digits otherwise",
        choices=("auto", "mnist", "fashion", "digits", "omniglot", "cifar10"),
    )

    @classmethod
    def expand(cls, argv):
        """Replace `--preset small` in a command line by the flags that it abbreviates.

        They come first, so that every other flag of the command line overrules them.
        """
        words = []
        for word in argv:
            if word == "small" and words[-1:] == ["--preset"]:
                words[-1] = "--preset=small"
            else:
                words.append(word)
        if "--preset=small" not in words:
            return words
        return cls.small.split() + [word for word in words if word != "--preset=small"]

    def __post_init__(self):
        """End the program if --preset has a list, or if --evaluate names no measurement."""
        # `expand` has replaced --preset small: only a list of presets arrives here.
        if self.preset != "published":
            common.stop(self, "--preset: got a list, wants published or small")

        for name in getattr(self, "evaluate", "").split(","):
            if name and name not in MEASUREMENTS:
                choices = " or ".join(MEASUREMENTS)
                common.stop(
                    self, f"--evaluate: got {name!r}, wants {choices}, or both joined by a comma"
                )


@dataclass
class HierarchyFlags(DeepFlags):
    """The flags that only the scripts with a hierarchy of latent maps have.

    A script's own flags class also has `latents`, see `latent_sides`.
    """

    side: int = common.flag(
        0,
        "height and width of the images, which are then means over squares of pixels; 0 keeps the "
        "size of the data set; the finest scale of --latents has half of this side, or the whole "
        "side if it is odd",
        low=0,
        high=32,
    )
    num_train: int = common.flag(
        0,
        "number of training examples, at least 2, taken from the beginning; 0 takes all, and so "
        "does a number above the size of the data set",
        low=0,
    )
    test_curve: bool = common.flag(
        False,
        "measure the ELBO of the test images after each epoch, for result.json and training.png",
    )

    def __post_init__(self):
        """End the program if --side, --latents, --context_size or --num_train is impossible."""
        super().__post_init__()
        full = datasets.image_shape(self.dataset)[1]
        if self.side and full % self.side != 0:
            common.stop(
                self,
                f"--side: got {self.side}, wants 0 or a number that divides {full}, the side of "
                f"the images of --dataset {self.dataset}",
            )
        latent_sides(self)

        # A VampPrior has no context.
        has_context = hasattr(self, "context_size") and getattr(self, "prior", "") != "vamp"
        side = image_shape(self)[1]
        if has_context and self.context_size > side:
            common.stop(
                self,
                f"--context_size: got {self.context_size}, wants at most {side}, the side of the "
                "images",
            )

        # The headroom needs two halves of the training examples.
        if self.num_train == 1:
            common.stop(self, "--num_train: got 1, wants 0 or a whole number of at least 2")


def image_shape(f):
    """(C, H, W) of the images that a model sees, with the side that --side asks for."""
    channels, side, _ = datasets.image_shape(f.dataset)
    side = f.side or side
    return channels, side, side


def finest_side(f):
    """The side of the largest latent maps that are possible.

    It is half the side of the image, or the whole side for cifar10 and where the side is odd.
    """
    side = image_shape(f)[1]
    return side if f.dataset == "cifar10" or side % 2 == 1 else side // 2


def latent_sides(f):
    """The side of each latent map, from the top level down.

    For `--latents 4,4` and images of 28x28 it is seven, four times, then fourteen, four times.
    The program ends if --latents asks for no latent, or for a scale that does not exist.
    """
    # 1. All scales, the finest first. A side can be halved while it is even.
    scales = [finest_side(f)]
    while scales[-1] % 2 == 0:
        scales.append(scales[-1] // 2)

    # 2. The number of latents at each scale, the coarsest first.
    counts = []
    if re.fullmatch("[0-9]{1,2}(,[0-9]{1,2})*", f.latents):
        counts = [int(count) for count in f.latents.split(",")]
    if len(counts) > len(scales) or sum(counts) == 0:
        side = image_shape(f)[1]
        allowed = "one number" if len(scales) == 1 else f"at most {len(scales)} numbers"
        example = "4" if len(scales) == 1 else "4,4"
        common.stop(
            f,
            f"--latents: got {f.latents!r}, wants one number per scale, joined by commas, such as "
            f"{example}; images of {side}x{side} allow {allowed}, each from 0 to 99 and not all 0",
        )

    # 3. One side per latent.
    sides = []
    for side, count in zip(reversed(scales[: len(counts)]), counts):
        sides += [side] * count
    return sides


# --- Building a model ---


def scaled(layer, start):
    """The layer, its initial weights and biases multiplied by `start`."""
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(start)
    return layer


def repeat_examples(values, sample_shape):
    """Repeat each example once per draw: (B, ...) to (S B, ...), where S is sample_shape's product.

    sample_shape is () for one draw, or (S,).
    """
    return values.expand(*sample_shape, *values.shape).flatten(0, len(sample_shape))


def per_unit(values, shape):
    """The values of one latent map as units: (S B, c, side, side) to (S, B, d). shape is (S, B)."""
    return values.flatten(1).unflatten(0, shape)


def draw(normal, temperature=1.0):
    """A differentiable draw of a Normal whose std is multiplied by the temperature."""
    return normal.mean + temperature * normal.stddev * processes.normal_like(normal.mean)


# The number of training images from which the headroom of a deep model is measured. One pass
# through such a model is expensive.
HEADROOM_ROWS = 20_000


def level_residuals(model, x, logits, f):
    """{level suffix: residual} of the learned levels of a hierarchy, as headroom.py needs them.

    x is binary (B, c_x, H, W), drawn anew as in training. logits (2, B, c_x, H, W) are those of
    p(x|z) at two draws of all latents.

    All levels share one residual. A further unit of any level reads x and adds its contribution to
    the logits of the pixels. That is a wider class of models than the decoder, in which an upper
    level reaches the pixels only through the levels below. The verdict is about this class.
    """
    residual = headroom.bernoulli_residual(
        x, logits[:, None], encoder_input=(x.flatten(1),), beta=f.beta
    )
    return {f"_{level}": residual for level in range(1, model.learned_levels + 1)}


class LogisticMixture:
    """A mixture of discretised logistics at each pixel (Salimans et al. 2017, arXiv 1701.05517):

        p(x) = sum_k w_k prod_c P(x_c; mean_kc, scale_kc)

    x_c in {0, 1/255, ..., 1} is colour c. P is the mass of a logistic in the bin of width 1/255
    around x_c; an outer bin extends to infinity. The mean of each colour depends linearly on the
    colours before it.

    `parameters` (..., K n(c_x), H, W) holds the logits of the weights w_k, then the means, then the
    log-scales, then the slopes before their tanh. There is one slope for each pair of a colour and
    an earlier one. Means, scales and slopes are in units in which x runs from -1 to 1.
    """

    K = 10

    @staticmethod
    def n(c_x):
        """The number of parameters of each component, for c_x colours."""
        pairs = c_x * (c_x - 1) // 2
        return 1 + 2 * c_x + pairs

    def __init__(self, parameters, c_x):
        K = self.K
        pairs = c_x * (c_x - 1) // 2
        sizes = [K, K * c_x, K * c_x, K * pairs]
        logits, means, log_scales, raw_slopes = parameters.split(sizes, dim=-3)
        self.log_weights = logits.log_softmax(-3)  # (..., K, H, W)
        self.means = means.unflatten(-3, (K, c_x))  # (..., K, c_x, H, W)
        self.scales = log_scales.unflatten(-3, (K, c_x)).clamp(min=-7).exp()
        self.slopes = None
        if pairs:
            self.slopes = raw_slopes.unflatten(-3, (K, pairs)).tanh()  # (..., K, pairs, H, W)

    def slopes_by_pair(self):
        """One (..., K, H, W) per pair, in the order (1, 0), (2, 0), (2, 1) of colours from 0."""
        return () if self.slopes is None else self.slopes.unbind(-3)

    def means_given(self, y):
        """The mean of each colour, (..., K, c_x, H, W), given the earlier colours of y.

        y (..., 1, c_x, H, W) is in [-1, 1].
        """
        slopes = iter(self.slopes_by_pair())
        means = []
        for c, mean in enumerate(self.means.unbind(-3)):
            for earlier in range(c):
                mean = mean + next(slopes) * y[..., earlier, :, :]
            means.append(mean)
        return torch.stack(torch.broadcast_tensors(*means), -3)

    def clamped_means(self):
        """The mean of each colour, given the means of the earlier ones, all within [-1, 1]."""
        slopes = iter(self.slopes_by_pair())
        means = []
        for c, mean in enumerate(self.means.unbind(-3)):
            for earlier in range(c):
                mean = mean + next(slopes) * means[earlier]
            means.append(mean.clamp(-1, 1))
        return torch.stack(torch.broadcast_tensors(*means), -3)

    def log_prob(self, x):
        """log p(x) of each pixel in nats, (..., H, W), for x (..., c_x, H, W) in [0, 1]."""
        x = x.unsqueeze(-4)
        means = self.means_given(2 * x - 1)

        # The edges of the bin around x, as arguments of the logistic function.
        upper = (2 * x - 1 - means + 1 / 255) / self.scales
        lower = (2 * x - 1 - means - 1 / 255) / self.scales

        # log(sigmoid(upper) - sigmoid(lower))
        #     = log sigmoid(upper) + log sigmoid(-lower) + log(1 - exp(lower - upper)).
        # An outer bin has only one edge, so that one sigmoid remains.
        log_difference = (-torch.expm1(-2 / 255 / self.scales)).log()
        is_highest = x > 1 - 0.5 / 255
        is_lowest = x < 0.5 / 255
        is_outer = (x - 0.5).abs() > 0.5 - 0.5 / 255
        log_below_upper = torch.where(is_highest, 0, F.logsigmoid(upper))
        log_above_lower = torch.where(is_lowest, 0, F.logsigmoid(-lower))
        log_difference = torch.where(is_outer, 0, log_difference)

        log_mass = (log_below_upper + log_above_lower + log_difference).sum(-3)
        return (self.log_weights + log_mass).logsumexp(-3)

    @property
    def mean(self):
        """The mean of the continuous logistics, (..., c_x, H, W), in [0, 1]."""
        weights = self.log_weights.exp().unsqueeze(-3)
        return ((weights * self.clamped_means()).sum(-4) + 1) / 2


# --- Training ---


def warmup_cosine(optimizer, f, steps):
    """A schedule of the learning rate over `steps` steps.

    The rate rises from 0 to --lr over --warmup_epochs. Then it stays, or falls to --lr_end as a
    cosine, as --lr_schedule says.
    """
    warmup_steps = f.warmup_epochs * steps / f.num_epochs

    def factor(step):
        # 1. Warm-up: a straight line.
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)

        # 2. A constant rate.
        if f.lr_schedule == "constant":
            return 1.0

        # 3. Half a cosine from 1 to lr_end / lr.
        end = f.lr_end / f.lr
        progress = (step - warmup_steps) / max(1.0, steps - warmup_steps)
        return end + (1 - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def make_optimizer(model, f, weight_decay=0.0):
    """The optimiser of a model's weights that --optimizer names, at the learning rate --lr.

    On CUDA its learning rate and its count of steps are tensors on the device, since a captured
    graph of the training step can change nothing but memory of the device.
    """
    parameters = list(model.parameters())
    on_cuda = parameters[0].is_cuda
    lr = torch.tensor(f.lr, device=parameters[0].device) if on_cuda else f.lr
    Optimizer = torch.optim.Adamax if f.optimizer == "adamax" else torch.optim.AdamW
    return Optimizer(parameters, lr=lr, weight_decay=weight_decay, capturable=on_cuda)


class WeightAverage:
    """The exponential average of a model's weights; `update` follows each training step.

    `module` is a copy of the model with the averaged weights: it is evaluated. No method makes the
    host wait for the GPU.
    """

    def __init__(self, model, f):
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.begun = False
        self.weight_of_new = 1 - f.ema

    @torch.no_grad()
    def update(self, model):
        """Move the average towards the model's weights. The first update copies them."""
        averages = list(self.module.parameters())
        weights = list(model.parameters())
        torch._foreach_lerp_(averages, weights, self.weight_of_new if self.begun else 1.0)
        self.begun = True

    def state_dict(self):
        return {"module": self.module.state_dict(), "begun": self.begun}

    def load_state_dict(self, state):
        self.module.load_state_dict(state["module"])
        self.begun = state["begun"]


@torch.no_grad()
def test_elbo(model, f, data):
    """The ELBO (beta = 1) of all test images at one draw of the latents, in nats per image.

    The draws are the same after each epoch, and training continues with its own random numbers.
    Each of several processes measures all images, in batches of the size that they train together.
    The networks compute in float32, as in the evaluation after training.
    """
    _, process_count = processes.rank_and_count()
    images = data.test[0]
    total = 0
    model.eval()
    with common.seeded(f.seed, "evaluation", images.device), processes.noise_rows(0, 1):
        for x in images.split(process_count * f.batch_size):
            terms = model(x, f)
            elbo = terms["log_px_z"]
            for level in common.levels(terms):
                elbo = elbo - terms[f"kl{level}"].sum(-1)
            total = total + elbo.sum(dtype=torch.float64)
    model.train()
    return total.item() / len(images)


def drawn_levels(count):
    """The title of reconstructions whose lowest `count` levels are drawn from their priors."""
    levels = "level 1" if count == 1 else f"levels 1 to {count}"
    return f"{levels} drawn from the prior"


def random_flip(x):
    """Images (B, c_x, H, W), each of them mirrored left to right with probability 1/2."""
    mirrored = processes.uniform_like(x[:, :1, :1, :1]) < 0.5
    return torch.where(mirrored, x.flip(-1), x)


def autocast(f):
    """A context manager within which the networks compute in the precision of --autocast."""
    on_cuda = torch.cuda.is_available() and f.device != "cpu"
    device_type = "cuda" if on_cuda else "cpu"
    return torch.autocast(device_type, torch.bfloat16, enabled=f.autocast == "bf16")


# --- After training: compression and attack ---

# Both measurements use the first test images.
FURTHER_EXAMPLES = 200

# Radii of the attack, in pixel values, and the number of its gradient steps.
RADII = (0.0, 0.02, 0.05, 0.1, 0.2)
ATTACK_STEPS = 30


def evaluate_further(runs):
    """Make the measurements that --evaluate asks for, and print them.

    runs are the `training.TrainedRun`s that `training.fit` returns. The first process does this for
    all. A run without a model has diverged and is left out. Each measurement leaves a .json and a
    .png file in the run's folder. If the .json file is already there, it is printed and nothing is
    measured.
    """
    rank, _ = processes.rank_and_count()
    if rank > 0:
        return
    for run in runs:
        if run.model is None:
            continue
        common.set_precision(run.f)
        for name in run.f.evaluate.split(","):
            if not name:
                continue
            result = read_measurement(name, run.f, run.data)
            if result is None:
                result = measure(name, run)
            if result is not None:
                print(f"\n{caption(result, run.f, run.data)}: ", end="")
                result.show()


def measure(name, run):
    """Make one measurement of a run, draw its picture and write its file.

    Returns None, and writes nothing, if one of its numbers is not finite.
    """
    f = run.f
    data = run.data
    folder = files.run_dir(f, data)
    x = data.test[0][:FURTHER_EXAMPLES]

    with common.seeded(f.seed, "evaluation", x.device):
        result, images = MEASUREMENTS[name].measure(run.model, common.on_device(f, x), x)
    if not result.is_whole():
        print(f"{folder}: {name} is left out, because its result is not finite", file=sys.stderr)
        return None

    words = caption(result, f, data)
    if pictures.context_level(run.model):
        words += "; the top level is the context"
    result.draw(images, folder / f"{name}.png", words)
    # The .json file comes last: where it is, the picture is, too.
    content = files.description(f, data) | dataclasses.asdict(result)
    files.write_json(folder / f"{name}.json", content)
    return result


def read_measurement(name, f, data):
    """The measurement that an earlier command left in a run's folder, or None.

    One line on stderr reports a file that is there but cannot be used.
    """
    Measurement = MEASUREMENTS[name]
    path = files.run_dir(f, data) / f"{name}.json"
    if files.read_json(path) is None:
        return None

    content = files.read_matching(f, data, path.name)
    if content is not None:
        values = {}
        for field in dataclasses.fields(Measurement):
            values[field.name] = content.get(field.name)
        result = Measurement(**values)
        if result.is_whole():
            return result
    print(
        f"cannot use {path}, measuring again: it is incomplete, or from different settings",
        file=sys.stderr,
    )
    return None


def caption(result, f, data):
    """The run and the number of images that a measurement belongs to."""
    return f"{files.caption([f], [data])} seed={f.seed}, {result.images} test images"


def are_numbers(values):
    """Whether values is a list of finite numbers."""
    if not isinstance(values, list):
        return False
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)


@dataclass
class Compression:
    """Rate and distortion when only the top k levels are sent, for k = 0, 1, ..., all levels.

    The levels below the top k are the means of their priors. `images` is the number of test
    images. For each k, `bits` is the KL of the top k levels in bits per image, and `squared_error`
    the mean squared error of a pixel.
    """

    images: int
    bits: list
    squared_error: list

    @classmethod
    @torch.no_grad()
    def measure(cls, model, scalars, x):
        """Measure it on images x (B, c_x, H, W), at one draw of the latents.

        Returns the result, and a list of x and its reconstruction with each k.
        """
        # 1. Bits per image of each level, added up from the top level down.
        context = {}
        if hasattr(model, "context_arguments"):
            context = model.context_arguments(x, scalars)
        terms = model(x, scalars, sample_shape=(1,), **context)
        bits = [0.0]
        for level in reversed(common.levels(terms)):
            nats = terms[f"kl{level}"].flatten(0, -2).sum(1).mean().item()
            bits.append(bits[-1] + nats / math.log(2))

        # 2. The error of each reconstruction.
        images = [x]
        squared_error = []
        for k in range(len(bits)):
            reconstruction = model.reconstruct(x, scalars, k)
            images.append(reconstruction)
            squared_error.append((x - reconstruction).square().mean().item())
        return cls(len(x), bits, squared_error), images

    def is_whole(self):
        """Whether all numbers are there and finite."""
        if not (are_numbers([self.images]) and are_numbers(self.bits)):
            return False
        return are_numbers(self.squared_error) and 0 < len(self.bits) == len(self.squared_error)

    def draw(self, images, path, caption):
        """The curve of rate and distortion beside a dozen reconstructions with each k."""

        def draw_panels(axes):
            curve, tiles = axes[0]
            curve.plot(self.bits, self.squared_error, "o-")
            for point, label in self.point_labels().items():
                curve.annotate(label, point, xytext=(4, 4), textcoords="offset points", fontsize=8)
            curve.set(
                xlabel="KL of the top k levels (bits per image); labels: k",
                ylabel="mean squared error per pixel",
                ylim=(0, None),
            )
            self.show_rows(tiles, images)

        pictures.save_figure(
            path,
            columns=2,
            rows=1,
            width=5.0,
            height=4.4,
            caption=caption,
            draw=draw_panels,
        )

    def show_rows(self, ax, images):
        """The first dozen of each of the images, one row of tiles per k and one for the tests."""
        dozens = [batch[:12] for batch in images]
        title = "reconstructed from the top k levels"
        pictures.show_images(ax, title, torch.cat(dozens), len(dozens[0]), fontsize=8)

        labels = ["test images", *(f"k = {k}" for k in range(len(self.bits)))]
        top, bottom = sorted(ax.get_ylim())
        height = (bottom - top) / len(labels)
        ax.axis("on")
        ax.set_xticks([])
        ax.set_yticks([top + height * (i + 0.5) for i in range(len(labels))], labels, fontsize=8)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)

    def point_labels(self):
        """{point: "0, 1"}: several k share a point, since a collapsed level does not move it."""
        labels = {}
        for k, (bits, error) in enumerate(zip(self.bits, self.squared_error)):
            point = (round(bits), round(error, 3))
            labels[point] = f"{labels[point]}, {k}" if point in labels else str(k)
        return labels

    def show(self):
        """Print the rate and the distortion for each k as a table."""
        print("KL (bits per image) and squared error per pixel if only the top levels are sent")
        rows = [["top levels", "KL (bits)", "squared error"]]
        for k, (bits, error) in enumerate(zip(self.bits, self.squared_error)):
            rows.append([str(k), f"{bits:.2f}", f"{error:.4f}"])
        common.print_table(rows)


@dataclass
class Attack:
    """How far a small change of an image moves its top latents (after Kuzina et al. 2022).

    The attack searches the L-infinity ball around x, within [0, 1], for the image x' with the
    largest symmetric KL between the posteriors of the top half of the levels at x and at x'.
    `images` is the number of test images, `levels` the number of levels attacked. `rows` has for
    each radius {"radius", "symmetric_kl" (nats), "symmetric_kl_random", "distance",
    "distance_random"}, means over the images. The distance is the L2 distance of the
    reconstructions of x and x'. For comparison, x' is a random corner of the ball in "..._random".
    """

    images: int
    levels: int
    rows: list

    COLUMNS = ("radius", "symmetric_kl", "symmetric_kl_random", "distance", "distance_random")

    @classmethod
    def measure(cls, model, scalars, x):
        """Attack images x (B, c_x, H, W).

        Returns the result, and {title: images}: x, the images with the largest radius, and the
        reconstructions of both.
        """
        levels = max(1, model.learned_levels // 2)
        rows = []
        attacks = []
        with frozen(model):
            posterior = model.top_posterior(x, scalars, levels)
            reconstruction = model.reconstruct(x, scalars, model.levels)

            def divergence(moved):
                return symmetric_kl(posterior, model.top_posterior(moved, scalars, levels))

            def distance(moved):
                difference = model.reconstruct(moved, scalars, model.levels) - reconstruction
                return difference.flatten(1).norm(dim=1).mean().item()

            for radius in RADII:
                corner = (x + radius * (2 * torch.rand_like(x) - 1).sign()).clamp(0, 1)
                attacked, largest = search_ball(divergence, x, radius)
                attacks.append(attacked)
                with torch.no_grad():
                    row = {
                        "radius": radius,
                        "symmetric_kl": largest.mean().item(),
                        "symmetric_kl_random": divergence(corner).mean().item(),
                        "distance": distance(attacked),
                        "distance_random": distance(corner),
                    }
                rows.append(row)

            with torch.no_grad():
                images = {
                    "test images": x,
                    "reconstructions of the test images": reconstruction,
                    f"attacked images (radius {RADII[-1]})": attacks[-1],
                    "reconstructions of the attacked images": model.reconstruct(
                        attacks[-1], scalars, model.levels
                    ),
                }
        return cls(len(x), levels, rows), images

    def is_whole(self):
        """Whether all numbers are there and finite."""
        if not are_numbers([self.images, self.levels]) or not isinstance(self.rows, list):
            return False
        for row in self.rows:
            if not isinstance(row, dict) or list(row) != list(self.COLUMNS):
                return False
            if not are_numbers(list(row.values())):
                return False
        return [row["radius"] for row in self.rows] == list(RADII)

    def draw(self, images, path, caption):
        """Both measures over the radius, above the images and their reconstructions."""
        labels = {
            "symmetric_kl": "symmetric KL of the top latents (nats)",
            "distance": "L2 distance of the reconstructions",
        }

        def draw_panels(axes):
            for ax, (name, label) in zip(axes[0], labels.items()):
                attacked = [row[name] for row in self.rows]
                random = [row[f"{name}_random"] for row in self.rows]
                ax.plot(RADII, attacked, "o-", label="attacked images")
                ax.plot(RADII, random, "s--", label="random corners of the ball")
                ax.set(
                    xlabel="radius of the L∞ ball (pixel values)",
                    xticks=RADII,
                    ylabel=label,
                    ylim=(0, None),
                )
                ax.legend(fontsize=7)
            # Seven rows of ten images fill the axes.
            for ax, (title, batch) in zip(axes[1:].flat, images.items()):
                pictures.show_images(ax, title, batch[:70], fontsize=8)

        pictures.save_figure(
            path,
            columns=2,
            rows=3,
            width=4.4,
            height=3.0,
            caption=f"{caption}, the top {self.levels} learned levels",
            draw=draw_panels,
        )

    def show(self):
        """Print one row per radius as a table."""
        print(
            f"an attack on the top {self.levels} learned levels, compared with a random change of "
            "the same radius: the symmetric KL of the posteriors (nats) and the L2 distance of the "
            "reconstructions"
        )
        rows = [list(self.COLUMNS)]
        for row in self.rows:
            rows.append([f"{value:.4g}" for value in row.values()])
        common.print_table(rows)


@contextlib.contextmanager
def frozen(model):
    """Within this context, no parameter of the model requires a gradient. The attack needs none."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


def symmetric_kl(before, after):
    """The sum of KL(p || q) + KL(q || p) over two lists of Normals, in nats per image, (B,)."""
    total = 0
    for p, q in zip(before, after):
        both = kl_divergence(p, q) + kl_divergence(q, p)
        total = total + both.flatten(1).sum(1)
    return total


def search_ball(divergence, x, radius):
    """Projected gradient ascent on divergence(x'), (B,), in the L-infinity ball around x.

    x and x' are (B, c_x, H, W), in [0, 1]. The search begins at a random point of the ball. Returns
    (x', divergence(x')): for each image the best of all steps.
    """
    moved = (x + radius * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    best = moved
    largest = divergence(moved).detach()
    steps = ATTACK_STEPS if radius > 0 else 0
    for _ in range(steps):
        # 1. A step along the gradient's sign. All steps together are 2.5 radii long.
        moved = moved.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(divergence(moved).sum(), moved)
        moved = (moved + 2.5 * radius / ATTACK_STEPS * gradient.sign()).detach()

        # 2. Back into the ball, and into the range of pixels.
        moved = torch.minimum(torch.maximum(moved, x - radius), x + radius).clamp(0, 1)

        # 3. The best so far.
        current = divergence(moved).detach()
        is_better = (current > largest).view(-1, 1, 1, 1)
        best = torch.where(is_better, moved, best)
        largest = torch.maximum(current, largest)
    return best, largest


MEASUREMENTS = {"compression": Compression, "attack": Attack}
