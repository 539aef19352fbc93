"""What only the deep models have: their flags and what those say of latents, the density of coloured pixels; schedule, optimiser,
average of the weights, precision and processes, in the order in which a script's loop uses them; then the two further
measurements of --evaluate, compression and attack. The loop itself is training.py's `Training`, its body each script's own.
"""
import copy
import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

import common
import datasets
import files
import pictures


@dataclass
class DeepFlags(common.RemedyFlags, common.TrainFlags):
    """The flags of the experiments with deep models, each trained by all of torchrun's processes together."""
    beta: float = common.scalar(1.0, "weight of all KLs", low=0)
    batch_size: int = common.flag(250, "examples per gradient step and process", low=1)
    num_epochs: int = common.flag(300, "passes over the training set", low=1)
    optimizer: str = common.flag("adamax", "optimiser of the weights", choices=("adamax", "adamw"))
    lr: float = common.flag(0.01, "the optimiser's learning rate", above=0)
    lr_end: float = common.flag(1e-5, "the learning rate that a cosine ends at", low=0)
    lr_schedule: str = common.flag("cosine", "after the warm-up", choices=("constant", "cosine"))
    warmup_epochs: float = common.flag(2.0, "epochs in which the learning rate rises from 0", low=0)
    weight_decay: float = common.flag(1e-6, "the optimiser's weight decay", low=0)
    grad_clip: float = common.flag(5.0, "largest gradient norm", above=0)
    ema: float = common.flag(0.999, "weight of the past in the average of the weights that is evaluated", low=0, high=0.999999)
    autocast: str = common.flag("none", "precision of the networks in training", choices=("none", "bf16"))
    temperature: float = common.flag(1.0, "times the std of every prior, in pictures of samples", low=0, evaluation=True)
    num_test: int = common.flag(0, "test examples, the first ones; 0 for all", low=0, evaluation=True)
    dataset: str = common.flag("auto", "auto is mnist if on disk or to be fetched, else the embedded digits",
                               choices=("auto", "mnist", "fashion", "digits", "omniglot", "cifar10"))

    @classmethod
    def expanded(cls, argv):
        """The words of a command line, --preset small replaced by the flags that it stands for, which all others overrule."""
        for words in (["--preset", "small"], ["--preset=small"]):
            for i in range(len(argv)):
                if argv[i:i + len(words)] == words:
                    argv = [*cls.small.split(), *argv[:i], *argv[i + len(words):]]
        return list(argv)

    def __post_init__(self):
        """Ends the program where a preset is listed beside another, or --evaluate asks for what there is not."""
        if self.preset != "published":
            common.stop(self, "--preset: got a list, wants published or small")
        for word in getattr(self, "evaluate", "").split(","):
            if word and word not in FURTHER:
                common.stop(self, f"--evaluate: got {word!r}, wants some of {', '.join(FURTHER)}, joined by commas")


def finest_side(f):
    """The side of the largest latent maps that there can be."""
    side = datasets.image_shape(f.dataset)[1]
    return side if f.dataset == "cifar10" else side // 2


def sides_of_latents(f):
    """The side of each latent map, from the top level down: seven, four times, then fourteen, four times, for 4,4 and 28x28
    images. Ends the program where --latents asks for none, or for what is not there."""
    side, finest = datasets.image_shape(f.dataset)[1], finest_side(f)
    scales = (finest & -finest).bit_length()              # how often a side halves, and once more
    counts = f.latents.split(",")
    if not re.fullmatch(r"[0-9]{1,2}(,[0-9]{1,2})*", f.latents) or len(counts) > scales or not any(map(int, counts)):
        common.stop(f, f"--latents: got {f.latents!r}, wants one number for each scale, coarsest first, as 4,4: for images of "
                       f"{side}x{side} at most {scales} numbers joined by commas, each 0 to 99, not all 0")
    return [finest >> k for k, count in zip(range(len(counts) - 1, -1, -1), counts) for _ in range(int(count))]


def scaled(layer, start):
    """The layer, its initial weights times start."""
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(start)
    return layer


class LogisticMixture:
    """p(x) = sum_k w_k prod_c P(x_c; mean_kc, scale_kc) at each pixel, P a logistic's mass in the bin of width 1/255 around
    x_c in {0, 1/255, ..., 1}, its tails in the outer bins; each colour's means depend linearly on the colours before it (Salimans
    et al. 2017, arXiv 1701.05517). Of parameters (..., K n(c_x), H, W): logits of the weights, means, log-scales and the tanh of
    what a mean depends on each colour before it with, in units in which x runs from -1 to 1."""

    K = 10

    @staticmethod
    def n(c_x):
        return 1 + 2 * c_x + c_x * (c_x - 1) // 2

    def __init__(self, parameters, c_x):
        K, pairs = self.K, c_x * (c_x - 1) // 2
        logits, means, log_scales, slopes = parameters.split([K, K * c_x, K * c_x, K * pairs], dim=-3)
        self.log_weights = logits.log_softmax(-3)                                          # (..., K, H, W)
        self.means = means.unflatten(-3, (K, c_x))                                         # (..., K, c_x, H, W)
        self.scales = log_scales.unflatten(-3, (K, c_x)).clamp(min=-7).exp()
        self.slopes = slopes.unflatten(-3, (K, pairs)).tanh() if pairs else None

    def means_given(self, y=None):
        """The means of each colour given the ones before it, y (..., 1, c_x, H, W), or given their means within [-1, 1]."""
        means, slopes = [], iter(self.slopes.unbind(-3) if self.slopes is not None else ())
        for c, mean in enumerate(self.means.unbind(-3)):
            for before in range(c):
                mean = mean + next(slopes) * (means[before] if y is None else y[..., before, :, :])
            means.append(mean.clamp(-1, 1) if y is None else mean)
        return torch.stack(torch.broadcast_tensors(*means), -3)

    def log_prob(self, x):
        """log p(x) in nats of each pixel, x (..., c_x, H, W): (..., H, W)."""
        x = x.unsqueeze(-4)
        means = self.means_given(2 * x - 1)
        upper, lower = ((2 * x - 1 - means + edge / 255) / self.scales for edge in (1, -1))
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
        return ((self.log_weights.exp().unsqueeze(-3) * self.means_given()).sum(-4) + 1) / 2


def draw(normal, temperature=1.0):
    """A draw of a Normal, differentiable, its std times the temperature."""
    return normal.mean + temperature * normal.stddev * common.normal_like(normal.mean)


def warmup_cosine(optimizer, f, steps):
    """The learning rate over so many steps: it rises from 0 over --warmup_epochs, and falls to --lr_end as a cosine."""
    warmup = f.warmup_epochs * steps / f.num_epochs

    def factor(step):
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if f.lr_schedule == "constant":
            return 1.0
        end, along = f.lr_end / f.lr, (step - warmup) / max(1.0, steps - warmup)
        return end + (1 - end) * (1 + math.cos(math.pi * min(1.0, along))) / 2
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def optimizer(model, f, weight_decay=0.0):
    """The optimiser of a model's weights; on CUDA with whatever a captured step changes on the device, its learning rate too."""
    parameters = list(model.parameters())
    cuda = parameters[0].is_cuda
    lr = torch.tensor(f.lr, device=parameters[0].device) if cuda else f.lr
    kind = {"adamax": torch.optim.Adamax, "adamw": torch.optim.AdamW}[f.optimizer]
    return kind(parameters, lr=lr, weight_decay=weight_decay, capturable=cuda)


class WeightAverage:
    """The exponential average of a model's weights, to be updated after each step; its `module` is what is evaluated. The host
    waits for nothing."""

    def __init__(self, model, f):
        self.module, self.begun, self.new = copy.deepcopy(model).requires_grad_(False), False, 1 - f.ema

    @torch.no_grad()
    def update(self, model):
        """After the first step it is the model itself."""
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), self.new if self.begun else 1.0)
        self.begun = True

    def state_dict(self):
        return {"module": self.module.state_dict(), "begun": self.begun}

    def load_state_dict(self, state):
        self.module.load_state_dict(state["module"])
        self.begun = state["begun"]


def flipped(x):
    """Images (B, c_x, H, W), each mirrored or not."""
    return torch.where(common.uniform_like(x[:, :1, :1, :1]) < 0.5, x.flip(-1), x)


def parallel(model):
    """The model, of torchrun's processes each with the mean of all their gradients."""
    # static_graph: which parameters a step uses is the same in all steps.
    return torch.nn.parallel.DistributedDataParallel(model, static_graph=True) if common.processes()[1] > 1 else model


def autocast(f):
    """The precision of the networks in training, as --autocast says."""
    cuda = torch.cuda.is_available() and f.device != "cpu"
    return torch.autocast("cuda" if cuda else "cpu", torch.bfloat16, enabled=f.autocast == "bf16")


FURTHER_EXAMPLES = 200                                    # the first test examples
RADII = (0.0, 0.02, 0.05, 0.1, 0.2)                       # of the attack, in pixel values
ATTACK_STEPS = 30


def evaluate_further(models, settings, data):
    """What --evaluate asks for: compression.json and .png, attack.json and .png in each run's folder. What is there is shown."""
    for model, f, d in zip(models, settings, data):
        common.use_precision(f)
        for name in filter(None, f.evaluate.split(",")) if common.processes()[0] == 0 and model is not None else []:
            measure, show = FURTHER[name]
            result = files.read_result(f, d, f"{name}.json")
            if "images" not in (result or {}):            # an earlier version did not count them
                with common.seeded(f.seed, "evaluation", d.test[0].device):
                    result = files.describe(f, d) | measure(model, common.on_device(f, d.test[0]), f, d)
                files.write_json(files.run_dir(f, d) / f"{name}.json", result)
            print(f"\n{caption(result, f, d)}: ", end="")
            show(result)


def caption(result, f, data):
    return f"{files.caption_of([f], [data])} seed={f.seed}, {result['images']} test images"


@torch.no_grad()
def compression(model, scalars, f, data):
    """Rate and distortion when only the top k levels are sent and the levels below are the means of their priors: bits of KL
    an image, and the mean squared error of a pixel, for k = 0 to all levels. One draw of the latents, FURTHER_EXAMPLES images."""
    x = data.test[0][:FURTHER_EXAMPLES]
    given = model.given(x, scalars) if hasattr(model, "given") else {}
    terms = model(x, scalars, sample_shape=(1,), **given)
    kls = [terms[f"kl{level}"].flatten(0, -2).sum(1).mean().item() / math.log(2) for level in common.levels(terms)[::-1]]     # top first
    images = [model.reconstruct(x, scalars, keep) for keep in range(len(kls) + 1)]
    result = {"images": len(x), "bits": np.cumsum([0.0, *kls]).tolist(),
              "squared_error": [(x - of).square().mean().item() for of in images]}

    def draw(axes):
        axes[0][0].plot(result["bits"], result["squared_error"], "o-")
        labels = {}                                       # one for all that a collapsed level leaves where they were
        for k, (bits, error) in enumerate(zip(result["bits"], result["squared_error"])):
            labels.setdefault((round(bits), round(error, 3)), []).append(str(k))
        for point, ks in labels.items():
            axes[0][0].annotate(", ".join(ks), point, xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes[0][0].set(xlabel="KL of the top k levels (bits per image)", ylabel="mean squared error per pixel", ylim=(0, None))
        pictures.show_images(axes[0][1], f"test images, then with the top 0 to {len(kls)} levels",
                             torch.cat([x[:12], *(of[:12] for of in images)]), 12, fontsize=8)
    pictures.save_figure(files.run_dir(f, data) / "compression.png", 2, 1, 5.0, 4.4, caption(result, f, data), draw)
    return result


def show_compression(result):
    print("top levels kept, bits of KL, squared error per pixel")
    common.print_rows([["levels", "bits", "squared error"], *([str(k), f"{bits:.2f}", f"{error:.4f}"] for k, (bits, error) in enumerate(
        zip(result["bits"], result["squared_error"])))])


def attack(model, scalars, f, data):
    """Projected gradient search within an L-infinity ball around x, in [0, 1], for the largest symmetric KL between the
    posteriors of the top half of the levels at x and at the moved x (after Kuzina, Welling and Tomczak 2022). Of
    each radius: that KL in nats, and the distance (L2, per image) between the reconstructions of both, beside the same for
    a random corner of the ball."""
    x = data.test[0][:FURTHER_EXAMPLES]
    count = max(1, model.learned_levels // 2)
    model.requires_grad_(False)
    before = model.top_posterior(x, scalars, count)
    whole = model.reconstruct(x, scalars, model.levels)

    def symmetric_kl(moved):
        return sum((torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)).flatten(1).sum(1)
                   for p, q in zip(before, model.top_posterior(moved, scalars, count)))

    rows, shown = [], {"test images": x, "their reconstructions": whole}
    for radius in RADII:
        corner = (x + radius * (2 * torch.rand_like(x) - 1).sign()).clamp(0, 1)
        moved = (x + radius * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
        best, most = moved, symmetric_kl(moved).detach()
        for _ in range(ATTACK_STEPS if radius else 0):
            moved = moved.detach().requires_grad_()
            gradient, = torch.autograd.grad(symmetric_kl(moved).sum(), moved)
            moved = (moved + 2.5 * radius / ATTACK_STEPS * gradient.sign()).detach()
            moved = torch.minimum(torch.maximum(moved, x - radius), x + radius).clamp(0, 1)
            now = symmetric_kl(moved).detach()
            best = torch.where((now > most).view(-1, 1, 1, 1), moved, best)
            most = torch.maximum(now, most)
        with torch.no_grad():
            after, by_chance = (model.reconstruct(of, scalars, model.levels) for of in (best, corner))
            rows.append({"radius": radius, "symmetric_kl": most.mean().item(),
                         "symmetric_kl_random": symmetric_kl(corner).mean().item(),
                         "distance": (after - whole).flatten(1).norm(dim=1).mean().item(),
                         "distance_random": (by_chance - whole).flatten(1).norm(dim=1).mean().item()})
    shown |= {f"moved by at most {radius}": best, "reconstructions of those": after}
    model.requires_grad_(True)
    result = {"images": len(x), "levels": count, "rows": rows}

    def draw(axes):
        for ax, name, label in zip(axes[0], ("symmetric_kl", "distance"), (
                "symmetric KL of the top latents (nats)", "L2 distance of the reconstructions")):
            for which, word, style in ((name, "attack", "o-"), (f"{name}_random", "random", "s--")):
                ax.plot(RADII, [row[which] for row in rows], style, label=word)
            ax.set(xlabel="radius of the L∞ ball (pixel values)", xticks=RADII, ylabel=label, ylim=(0, None))
            ax.legend(fontsize=7)
        for ax, (title, images) in zip(axes[1:].flat, shown.items()):
            pictures.show_images(ax, title, images[:50], fontsize=8)
    words = f"{caption(result, f, data)}, the top {count} learned levels"
    pictures.save_figure(files.run_dir(f, data) / "attack.png", 2, 3, 4.4, 3.0, words, draw)
    return result


def show_attack(result):
    print(f"mean symmetric KL (nats) of the top {result['levels']} learned levels and L2 distance of the reconstructions, attacked and "
          "moved at random")
    common.print_rows([list(result["rows"][0]), *([f"{value:.4g}" for value in row.values()] for row in result["rows"])])


FURTHER = {"compression": (compression, show_compression), "attack": (attack, show_attack)}
