"""The small helpers that every experiment script shares, in the order in which a script calls them: flags, device and
random numbers, data, fit, evaluation, files, table, pictures. No model lives here.

A script's model is an `nn.Module` built from one setting f (an instance of the script's flags), with

    forward(*batch, f, sample_shape=())    the terms of the ELBO, in nats, per example (batch size B, draws S):
        log_px_z (S, B)     log p(x|z) at a draw of z
        kl*      (S, B, d)  per latent unit: the ELBO's KL term of this level ("kl", or "kl_1", "kl_2", ...)
      and in eval mode also
        log_w    (S, B)     log p(x, z) - log q(z|x), the log importance weight
        mean*    (S, B, d)  E_q[z|x] of each level, in standard deviations of its prior
        unit_kl* (S, B, d)  the level's KL where the ELBO's term is no divergence (may be left out otherwise)
      where S = sample_shape; a term other than log_w that does not depend on the draw may lack it
    reconstructions(*batch, f)             {caption: images (B, 784)}     (optional, for pictures)
    samples(n, f)                          images (n, 784) from the prior (optional, for pictures)

Within `fit` and `report`, the scalars of the objective in f (beta, eta, sigma, ...) are 0-d tensors on the device.
"""
import contextlib
import dataclasses
import decimal
import difflib
import functools
import hashlib
import inspect
import itertools
import json
import math
import optparse
import os
import pickle
import platform
import shutil
import socket
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# Validation would make the host wait for the GPU at every density, and fails under vmap.
torch.distributions.Distribution.set_default_validate_args(False)


# ---------------------------------------------------------------------------------------------------------------- flags

def flag(default, help, low=None, above=None, high=None, choices=None, scalar=False):
    """A field of a flags dataclass: its default (which fixes its type), its line of --help and its allowed range.

    low and high are inclusive bounds, above an exclusive one. scalar marks a scalar of the objective: settings that
    differ in nothing else are trained side by side as one batched model.
    """
    return dataclasses.field(default=default, metadata=dict(
        help=help, low=low, above=above, high=high, choices=choices, scalar=scalar))


scalar = functools.partial(flag, scalar=True)             # beta, eta, sigma, ...


@dataclass
class TrainFlags:
    """The flags of every experiment that trains on images."""
    batch_size: int = flag(128, "examples per gradient step", low=1)
    num_epochs: int = flag(100, "passes over the training set", low=1)
    lr: float = flag(1e-3, "Adam's learning rate", above=0)
    grad_clip: float = flag(0.1, "largest gradient norm of a setting", above=0)
    seed: int = flag(0, "seed of initial weights, batches, noise and evaluation", low=0)
    num_samples: int = flag(1000, "draws per example for the log-likelihood; 0 leaves it out", low=0)
    dataset: str = flag("auto", "auto is mnist if on disk or to be fetched, else the embedded digits",
                        choices=("auto", "mnist", "fashion", "digits"))
    data_dir: str = flag("data", "where data sets lie, or are put")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...; auto is CUDA where there is one")
    out_dir: str = flag("runs", "where results go")
    overwrite: bool = flag(False, "train again what is finished")


WHERE_FLAGS = ("device", "data_dir", "out_dir", "overwrite")   # how and where, not what: they do not name a run
MAX_SETTINGS = 10_000                                     # of one command line


def script_name(flags):
    """The stem of the script that defines these flags (a flags class, or one of its instances)."""
    return Path(inspect.getfile(flags if isinstance(flags, type) else type(flags))).stem


def stop(flags, message):
    """End with exit status 2 and one line on stderr, before anything is trained."""
    print(f"{script_name(flags)}.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def own_and_shared(flags):
    """The fields of a flags class (or instance), {name: field}: first the script's own, then those it inherits."""
    cls = flags if isinstance(flags, type) else type(flags)
    inherited = {name for base in cls.__mro__[1:] for name in getattr(base, "__dataclass_fields__", ())}
    own, shared = {}, {}
    for field in dataclasses.fields(cls):
        (shared if field.name in inherited else own)[field.name] = field
    return own, shared


def _wanted(field):
    """What a flag takes, in words."""
    meta, kind = field.metadata, type(field.default)
    if meta["choices"]:
        return "one of " + ", ".join(meta["choices"])
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    bounds = [f"{word} {meta[key]}" for key, word in (("low", "at least"), ("above", "above"), ("high", "at most"))
              if meta[key] is not None]
    return f"{words} {' and '.join(bounds)}".strip()


def _number(field, text):
    """The value of a numeric flag, exact: 0.1:0.5:0.1 is to hold 0.3, not its neighbour. Raises ValueError or
    ArithmeticError for what is no number or out of range."""
    value, meta = decimal.Decimal(text), field.metadata
    if not math.isfinite(float(value)) or (type(field.default) is int and value != int(value)) \
            or (meta["low"] is not None and value < meta["low"]) \
            or (meta["above"] is not None and float(value) <= meta["above"]) \
            or (meta["high"] is not None and value > meta["high"]):
        raise ValueError
    return value


def _values(field, text):
    """All values that a flag's text stands for: one, a list a,b,c, or an inclusive range first:last:step.

    Raises ValueError, saying which part is wrong.
    """
    kind, choices = type(field.default), field.metadata["choices"]
    if kind is str and not choices:
        return [text]                                     # a path may hold commas and colons
    values = []
    for part in text.split(","):
        try:
            if kind is bool:
                values.append({"true": True, "false": False}[part.lower()])
            elif kind is str:
                values.append({choice: choice for choice in choices}[part])
            else:
                ends = part.split(":")
                first, last, step = {1: [part, part, "1"], 2: [*ends, "1"], 3: ends}[len(ends)]
                first, last, step = _number(field, first), _number(field, last), decimal.Decimal(step)
                if not step.is_finite() or step <= 0 or last < first or (last - first) / step > MAX_SETTINGS:
                    raise ValueError
                values += [kind(first + i * step) for i in range(int((last - first) / step) + 1)]
        except (KeyError, ValueError, ArithmeticError):
            raise ValueError(part) from None
    return list(dict.fromkeys(values))


class _Parser(optparse.OptionParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_flags(Flags, argv=None):
    """The settings of a command line: one `Flags` per combination of the listed values, the script's own flags first.

    Any flag takes one value, a list 0.1,0.5,1.0 or an inclusive range 0.1:5.0:0.1. Whatever is wrong with argv
    (default: sys.argv[1:]), with the device or with the output folder ends the program here: status 2, one line, the
    flag named.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    own, shared = own_and_shared(Flags)
    fields = own | shared
    parser = _Parser(prog=f"{script_name(Flags)}.py", usage="%prog [--flag value] ...",
                     description=(inspect.getmodule(Flags).__doc__ or "").strip().split("\n\n")[0],
                     epilog="A value may be a list 0.1,0.5,1.0 or a range 0.1:5.0:0.1 (first:last:step, the last one "
                            "included): every combination is trained.")
    groups = [parser.add_option_group("This experiment"), parser.add_option_group("Every experiment")]
    for name, field in fields.items():
        groups[name in shared].add_option(f"--{name}", dest=name, metavar="VALUE", help=(
            f"{field.metadata['help']} ({_wanted(field)}; default {field.default})"))

    for i, word in enumerate(argv):
        name = word[2:].partition("=")[0]
        if word.startswith("--") and name not in fields and name != "help":
            parser.error(f"--{name}: no such flag; the nearest is --{difflib.get_close_matches(name, fields, 1, 0)[0]}")
        alone = i + 1 == len(argv) or argv[i + 1].startswith("--")
        if alone and word == f"--{name}" and name in fields and isinstance(fields[name].default, bool):
            argv[i] += "=true"                            # --overwrite alone means true
    options, rest = parser.parse_args(argv)
    if rest:
        parser.error(f"{rest[0]!r}: a value without a flag")

    lists = {}
    for name, field in fields.items():
        text = getattr(options, name)
        try:
            lists[name] = [field.default] if text is None else _values(field, text)
        except ValueError as part:
            kind = "an empty or endless range, wants" if ":" in str(part) else "wants"
            parser.error(f"--{name}: got {str(part)!r}, {kind} {_wanted(field)}")
    count = math.prod(map(len, lists.values()))
    if count > MAX_SETTINGS:
        longest = max(lists, key=lambda name: len(lists[name]))
        parser.error(f"--{longest}: the lists multiply to {count} settings, wants at most {MAX_SETTINGS}")
    settings = [Flags(**dict(zip(lists, values))) for values in itertools.product(*lists.values())]

    out_dir = settings[0].out_dir
    try:                                                  # now rather than after the training
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()
    except OSError as wrong:
        parser.error(f"--out_dir: got {out_dir!r} ({wrong.strerror}), wants a folder that can be written")
    print(f"device: {device_name(device_of(settings[0]))}", file=sys.stderr)
    return settings


# ------------------------------------------------------------------------------------------- device and random numbers

def device_of(f):
    """The torch.device that --device stands for. Ends the program if there is no such device."""
    if f.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(f.device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        there = ["auto", "cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        stop(f, f"--device: got {f.device!r}, there is {', '.join(there)} here")
    return device


def device_name(device):
    """What a device is called: "cpu", or "cuda (NVIDIA H200)"."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


PURPOSES = ("init", "batches", "noise", "evaluation", "samples")


def _seed_of(seed, purpose):
    """Independent seeds for independent purposes, all from --seed."""
    return int(np.random.SeedSequence([seed, PURPOSES.index(purpose)]).generate_state(1)[0])


def generator(seed, purpose, device="cpu"):
    """A torch.Generator of its own for one purpose."""
    return torch.Generator(device).manual_seed(_seed_of(seed, purpose))


@contextlib.contextmanager
def seeded(seed, purpose, device):
    """Give the default generators to one purpose, and put them back after.

    Layers' initial weights, torch.distributions and dropout take no generator, they draw from the default one.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(_seed_of(seed, purpose))
        yield


# ----------------------------------------------------------------------------------------------------------------- data

@dataclass
class Data:
    """One data set, whole, on the device. train and test hold what a model's forward takes, as a tuple of tensors with
    one row per example (for a VAE one tensor (n, 784) in [0, 1]); labels are (n,), 0 to 9."""
    name: str
    train: tuple
    test: tuple
    train_labels: torch.Tensor
    test_labels: torch.Tensor


def load_mnist(settings):
    """The data of each setting: a list of `Data`, shared where the settings share --dataset.

    Images are float32 in [0, 1], flattened to 784. Ends the program if --dataset mnist or fashion is neither on disk
    nor to be fetched, or if a file is corrupt.
    """
    loaded = {}
    for f in settings:
        if f.dataset not in loaded:
            name = f.dataset
            if name == "auto":
                name = "mnist" if _on_disk_or_fetched("mnist", f.data_dir) else "digits"
                if name == "digits":
                    print(f"warning: MNIST is not in {f.data_dir!r} and cannot be fetched; "
                          "training on the embedded digits, which are not MNIST", file=sys.stderr)
            elif name != "digits" and not _on_disk_or_fetched(name, f.data_dir):
                stop(f, f"--dataset: {name} is not in --data_dir {f.data_dir!r} and cannot be fetched; "
                        "put its four files there, or take --dataset digits")
            arrays = digits(f.data_dir) if name == "digits" else _read_mnist(f, name)
            device = device_of(f)
            images = [torch.from_numpy(a).to(device).float().div_(255).flatten(1) for a in arrays[0::2]]
            labels = [torch.from_numpy(a).to(device).long() for a in arrays[1::2]]
            loaded[f.dataset] = Data(name, (images[0],), (images[1],), labels[0], labels[1])
    return [loaded[f.dataset] for f in settings]


MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def _mnist_class(name):
    import torchvision                                    # slow to import, and not every script needs it
    return {"mnist": torchvision.datasets.MNIST, "fashion": torchvision.datasets.FashionMNIST}[name]


def _on_disk_or_fetched(name, data_dir):
    """Whether the data set is in data_dir, after an attempt to unpack or to fetch it if it is not."""
    from torchvision.datasets.utils import check_integrity
    dataset = _mnist_class(name)
    raw = Path(data_dir, dataset.__name__, "raw")
    if all((raw / file).exists() for file in MNIST_FILES):
        return True
    packed = all(check_integrity(str(raw / file), md5) for file, md5 in dataset.resources)
    if not packed and not _any_answers([f"{mirror}{MNIST_FILES[0]}.gz" for mirror in dataset.mirrors]):
        return False
    print(f"{'unpacking' if packed else 'fetching'} {name} in {data_dir}", file=sys.stderr)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            dataset(data_dir, download=True)
    except Exception as wrong:                            # a broken connection has many names
        print(f"that failed: {wrong}", file=sys.stderr)
        return False
    finally:
        socket.setdefaulttimeout(patience)
    return True


def _any_answers(urls, seconds=5):
    """Whether one of the addresses answers within so many seconds, even where looking up its name hangs."""
    answered = threading.Event()

    def ask(url):
        with contextlib.suppress(Exception):
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            answered.set()

    for url in urls:
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    return answered.wait(seconds)


def _read_mnist(f, name):
    """Train images (n, 28, 28), train labels (n,), test images, test labels, uint8; a bad file is named."""
    from torchvision.datasets.mnist import read_image_file, read_label_file
    raw = Path(f.data_dir, _mnist_class(name).__name__, "raw")
    arrays = []
    for file in MNIST_FILES:
        try:
            if "images" in file:
                array = read_image_file(str(raw / file)).numpy()
                whole = array.shape[1:] == (28, 28)
            else:
                array = read_label_file(str(raw / file)).numpy()
                whole = len(array) == len(arrays[-1]) and array.max() <= 9
        except Exception:                                 # torchvision asserts, indexes, reshapes: any failure is one
            whole = False
        if not whole:
            stop(f, f"--data_dir: {raw / file} is truncated or corrupt; remove it to fetch it again")
        arrays.append(array)
    return arrays


# The embedded digits, as strokes: named control points (x right, y down, in a unit box), and curves through some of
# them, so that curves that share a point stay joined when it moves.
_STROKES = [
    (0, "a.50,.08 b.25,.22 c.18,.50 d.27,.80 e.50,.92 f.74,.79 g.82,.50 h.74,.21", "abcdefgha"),
    (1, "a.52,.08 b.51,.50 c.50,.92", "abc"),
    (1, "a.30,.28 b.54,.08 c.52,.50 d.51,.92", "ab bcd"),
    (1, "a.32,.28 b.54,.08 c.52,.50 d.51,.92 e.28,.92 f.74,.91", "ab bcd edf"),
    (2, "a.22,.30 b.36,.11 c.62,.11 d.76,.30 e.60,.56 f.20,.91 g.50,.89 h.82,.90", "abcdef fgh"),
    (2, "a.22,.28 b.40,.09 c.68,.14 d.70,.42 e.44,.78 f.22,.86 g.28,.72 h.50,.84 i.84,.88", "abcdefghi"),
    (3, "a.22,.20 b.44,.08 c.72,.20 d.66,.40 e.42,.48 f.72,.56 g.78,.74 h.52,.92 i.20,.80", "abcde efghi"),
    (3, "a.24,.10 b.74,.10 c.46,.42 d.72,.52 e.78,.74 f.52,.92 g.20,.82", "ab bc cdefg"),
    (4, "a.34,.10 b.20,.56 c.50,.57 d.82,.54 e.66,.10 f.63,.50 g.60,.92", "ab bcd efg"),
    (4, "a.60,.08 b.38,.36 c.16,.64 d.50,.64 e.84,.62 f.62,.40 g.60,.92", "abc cde afg"),
    (5, "a.76,.10 b.34,.11 c.28,.46 d.54,.40 e.78,.60 f.66,.86 g.40,.92 h.20,.80", "ab bc cdefgh"),
    (6, "a.66,.08 b.38,.30 c.22,.64 d.36,.90 e.62,.90 f.76,.70 g.58,.52 h.36,.58 i.24,.72", "abcdefghi"),
    (7, "a.20,.14 b.50,.12 c.80,.12 d.58,.48 e.44,.92", "abc cde"),
    (7, "a.20,.14 b.50,.12 c.80,.12 d.58,.48 e.44,.92 f.36,.52 g.76,.48", "abc cde fdg"),
    (8, "a.74,.20 b.50,.08 c.27,.25 d.50,.47 e.76,.72 f.50,.92 g.24,.73 h.49,.49", "abcdefgha"),
    (9, "a.74,.26 b.50,.08 c.26,.26 d.38,.50 e.62,.47 f.72,.64 g.58,.92", "abcdea afg"),
    (9, "a.74,.24 b.48,.09 c.27,.28 d.40,.50 e.64,.44 f.72,.50 g.68,.92", "abcdea afg"),
]
_POINTS = 112                                             # drawn points per digit


def _stroke_weights(names, curves):
    """(_POINTS, number of control points): each drawn point as a combination of control points. Curves are Catmull-Rom
    splines through their control points, drawn points are spread over all curves by chord length."""
    positions = np.array([[float(c) for c in word[1:].split(",")] for word in names.split()])
    index = {word[0]: i for i, word in enumerate(names.split())}
    segments = []                                         # four control points each: before, from, to, after
    for curve in curves.split():
        path = [index[letter] for letter in curve]
        closed = path[0] == path[-1]
        before = path[-2] if closed else path[0]
        after = path[1] if closed else path[-1]
        padded = [before, *path, after]
        segments += [padded[i:i + 4] for i in range(len(path) - 1)]
    lengths = np.array([np.linalg.norm(positions[c] - positions[b]) for _, b, c, _ in segments])
    ends = np.cumsum(lengths)
    weights = np.zeros((_POINTS, len(positions)))
    for row, along in enumerate((np.arange(_POINTS) + 0.5) / _POINTS * ends[-1]):
        k = int(np.searchsorted(ends, along))
        t = 1 - (ends[k] - along) / lengths[k]
        basis = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -t**2 + t**3)
        np.add.at(weights[row], segments[k], np.array(basis) / 2)
    return positions, weights


def draw_digits(n, seed):
    """n digits as drawn from strokes: images (n, 28, 28) and labels (n,), uint8, the same for the same seed.

    Each is a random template of a random class with moved control points (jitter), turned, slanted, scaled per axis,
    shifted, and inked with a pen of random width and softness.
    """
    random = torch.Generator().manual_seed(seed)
    classes = torch.randint(10, (n,), generator=random)
    uniform = torch.rand(n, 10, generator=random)
    between = lambda i, low, high: low + (high - low) * uniform[:, i]
    images = torch.empty(n, 28, 28, dtype=torch.uint8)
    turn, slant = between(0, -0.22, 0.22), between(1, -0.15, 0.45)
    width, height = between(2, 10.5, 18.5), between(3, 17, 21)
    pen, gain = between(4, 0.65, 1.35), between(5, 1.1, 1.9)
    pixel = torch.arange(28.0)
    for digit in range(10):
        templates = [strokes[1:] for strokes in _STROKES if strokes[0] == digit]
        for version, strokes in enumerate(templates):
            chosen = (classes == digit) & ((uniform[:, 6] * len(templates)).long() == version)
            positions, weights = (torch.tensor(a, dtype=torch.float32) for a in _stroke_weights(*strokes))
            for rows in chosen.nonzero()[:, 0].split(2048):
                column = lambda values: values[rows, None]
                control = positions + 0.028 * torch.randn(len(rows), *positions.shape, generator=random)
                x, y = (weights @ control - 0.5).unbind(-1)                       # (rows, _POINTS)
                x, y = column(width) * x - column(slant) * column(height) * y, column(height) * y
                cos, sin = column(turn.cos()), column(turn.sin())
                x, y = cos * x - sin * y, sin * x + cos * y
                # Centred on its ink as MNIST's digits are, but for half a pixel or so.
                x = x - x.mean(1, keepdim=True) + 13.5 + 1.4 * (column(uniform[:, 7]) - 0.5)
                y = y - y.mean(1, keepdim=True) + 13.5 + 1.4 * (column(uniform[:, 8]) - 0.5)
                # Ink at a pixel: a Gaussian pen moved along the curve. Its kernel is one of x times one of y, so that
                # an image is a matrix product over drawn points. A line's middle gets as much ink as `gain` says.
                spread = 2 * column(pen)[:, :, None] ** 2
                kernel_x = torch.exp(-(pixel - x[:, :, None]) ** 2 / spread)
                kernel_y = torch.exp(-(pixel - y[:, :, None]) ** 2 / spread)
                spacing = ((x.diff(dim=1) ** 2 + y.diff(dim=1) ** 2).sqrt()).median(dim=1).values
                ink = (kernel_y.transpose(1, 2) @ kernel_x) * (
                    spacing * gain[rows] / (pen[rows] * math.sqrt(2 * math.pi)))[:, None, None]
                images[rows] = (ink.clamp(max=1) * 255).round().to(torch.uint8)
    return images.numpy(), classes.to(torch.uint8).numpy()


def digits(data_dir):
    """The embedded data set, 60,000 training and 10,000 test digits by `draw_digits`, in the form of `_read_mnist`.

    Kept in data_dir/digits.npz once drawn; drawn again if that file is not whole; not kept if it cannot be written.
    """
    path = Path(data_dir, "digits.npz")
    names = ("train_images", "train_labels", "test_images", "test_labels")
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with np.load(path) as file:
            return [file[name] for name in names]
    arrays = [*draw_digits(60_000, seed=1), *draw_digits(10_000, seed=2)]
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, lambda file: np.savez(file, **dict(zip(names, arrays))))
    return arrays


# --------------------------------------------------------------------------------------- densities that scripts share

def log_normal(x, mean, std):
    """log N(x; mean, std^2 I) in nats, summed over the last dimension: x and mean (..., d), std a 0-d tensor; (...)."""
    squared_error = torch.linalg.vector_norm(x - mean, dim=-1).square()
    return -squared_error / (2 * std**2) - x.shape[-1] / 2 * (2 * math.pi * std**2).log()


def std_head(raw, prior_std, floor=1e-3):
    """A positive standard deviation from a network's free output: a softplus, floored, that is the prior's at raw = 0,
    so that training starts near the prior."""
    return prior_std * (torch.nn.functional.softplus(raw) / math.log(2)).clamp(min=floor)


def levels(terms):
    """The latent levels among a model's terms: [""] of a one-level model, ["_1", "_2"] of a two-level one."""
    return [name[2:] for name in terms if name == "kl" or name.startswith("kl_")]


def beta_elbo_loss(terms, f):
    """The negative beta-ELBO, -log p(x|z) + sum over levels of beta KL, in nats per example, (B,).

    --released_objective counts the reconstruction twice, as the authors' released code does.
    """
    loss = -terms["log_px_z"] * (2 if getattr(f, "released_objective", False) else 1)
    for level in levels(terms):
        loss = loss + getattr(f, f"beta{level}") * terms[f"kl{level}"].sum(-1)
    return loss


# ------------------------------------------------------------------------------------------------------------------ fit

class Progress:
    """On a terminal one line that renews itself, elsewhere a line now and then, both on stderr."""

    def __init__(self, what, total, unit):
        self.what, self.total, self.unit = what, total, unit
        self.start, self.shown = time.monotonic(), -math.inf
        self.terminal = sys.stderr.isatty()

    def update(self, done, note="", end=False):
        """done of total units are done; note is whatever else there is to say."""
        now = time.monotonic()
        if not end and now - self.shown < (0.2 if self.terminal else 30):
            return
        self.shown, seconds = now, max(now - self.start, 1e-9)
        left = "" if end or not done else f", {_clock(seconds / done * (self.total - done))} left"
        line = (f"{self.what}: {note}{done / self.total:.0%}, {done / seconds:,.0f} {self.unit}/s, "
                f"{_clock(seconds)}{left}")
        if self.terminal:                                 # a line that wraps could not be taken back
            line = f"\r\033[K{line[:shutil.get_terminal_size().columns - 1]}"
        print(line, end="" if self.terminal and not end else "\n", file=sys.stderr, flush=True)


def _clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def scalars_of(group, data):
    """The scalars of the objective of a group of G settings: {flag: (G,) tensor} of the data's device and dtype."""
    like = data.train[0]
    names = [field.name for field in dataclasses.fields(group[0]) if field.metadata["scalar"]]
    return {name: torch.tensor([getattr(f, name) for f in group], dtype=like.dtype, device=like.device)
            for name in names}


def on_device(f, data):
    """The setting as a model's forward sees it: the scalars of its objective are 0-d tensors."""
    return dataclasses.replace(f, **{name: values[0] for name, values in scalars_of([f], data).items()})


def fit(Model, settings, data, side_by_side=True):
    """Train one `Model` per setting on its data; models in the order of the settings, None where training diverged.

    Settings that differ only in scalars of the objective train side by side as one batched model, each from the same
    initial weights, on the same batches and with the same noise as if it were alone. What is finished is read from its
    run's folder instead, unless --overwrite; each run's model.pt and training.json are written when its group ends.
    """
    models, groups = [None] * len(settings), {}
    for i, (f, d) in enumerate(zip(settings, data)):
        finished = None if f.overwrite else read_trained(Model, f, d)
        if finished is None:
            fixed = [getattr(f, field.name) for field in dataclasses.fields(f) if not field.metadata["scalar"]]
            groups.setdefault((*fixed, id(d)) if side_by_side else i, []).append(i)
        else:
            models[i] = finished[0]
            print(f"already trained: {run_dir(f, d)} (--overwrite trains it again)", file=sys.stderr)
    for group in groups.values():
        trained = train(Model, [settings[i] for i in group], data[group[0]])
        for i, (model, training) in zip(group, trained):
            folder, models[i] = run_dir(settings[i], data[i]), model
            # The files of a run that this one takes the place of go first, those that vouch for the others before all.
            for stale in sorted(folder.glob("*"), key=lambda path: path.suffix != ".json"):
                stale.unlink()
            if model is not None:
                write(folder / "model.pt", lambda file: torch.save(model.state_dict(), file))
            write_json(folder / "training.json", describe(settings[i], data[i]) | training)
    return models


def read_trained(Model, f, data):
    """(model, training) of a setting that was trained before, as `train` gives them; None if it is not there, whole."""
    training = read_result(f, data, "training.json")
    if training is None or training["diverged"]:
        return training and (None, training)
    model = build(Model, f, data).eval()
    try:
        model.load_state_dict(torch.load(run_dir(f, data) / "model.pt", weights_only=True, map_location="cpu"))
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as wrong:
        print(f"cannot read {run_dir(f, data) / 'model.pt'}, training again: {wrong}", file=sys.stderr)
        return None
    return model, training


def build(Model, f, data):
    """A model on the data's device, with the initial weights that its seed gives, the same on every device."""
    with seeded(f.seed, "init", torch.device("cpu")):
        return Model(f).to(data.train[0].device, data.train[0].dtype)


EXPLODED = 1e3                                            # times the first batch's loss


def train(Model, group, data):
    """Train a group of G settings that differ only in scalars of the objective, side by side, with Adam.

    Returns one (model, training) per setting. training holds the curves (means over each epoch, in nats per example),
    the seconds of the whole group, and under "diverged" None or, where a batch's loss was not finite or EXPLODED, the
    epoch and the last loss before it, with None for the model.
    """
    first, like, G = group[0], data.train[0], len(group)
    models, scalars = [build(Model, f, data) for f in group], scalars_of(group, data)
    if G > 1:
        parameters, buffers = torch.func.stack_module_state(models)
    else:
        parameters, buffers = dict(models[0].named_parameters()), dict(models[0].named_buffers())
        scalars = {name: values[0] for name, values in scalars.items()}

    def means(parameters, buffers, scalars, *batch):
        """A batch's means of one setting's loss and terms: a dict of 0-d tensors, the loss first."""
        f = dataclasses.replace(first, **scalars)
        terms = torch.func.functional_call(models[0], (parameters, buffers), (*batch, f))
        return {"loss": beta_elbo_loss(terms, f).mean(), "reconstruction": -terms["log_px_z"].mean()} | {
            f"kl{level}": terms[f"kl{level}"].sum(-1).mean() for level in levels(terms)}

    if G > 1:
        means = torch.vmap(means, in_dims=(0, 0, 0) + (None,) * len(data.train), randomness="same")
    optimizer = torch.optim.Adam(parameters.values(), lr=first.lr, fused=True)
    batches, n = generator(first.seed, "batches", like.device), len(like)
    curves, diverged, limit = [], [None] * G, None
    last = torch.full((G,), math.nan, dtype=like.dtype, device=like.device)
    alive = torch.ones(G, dtype=torch.bool, device=like.device)
    progress = Progress(f"training {G} settings" if G > 1 else "training", n * first.num_epochs, "examples")
    with seeded(first.seed, "noise", like.device):
        for epoch in range(1, first.num_epochs + 1):
            sums, done, note = 0, (epoch - 1) * n, _progress_note(epoch, first, curves)
            for rows in torch.randperm(n, generator=batches, device=like.device).split(first.batch_size):
                terms = means(parameters, buffers, scalars, *(t.index_select(0, rows) for t in data.train))
                optimizer.zero_grad()
                terms["loss"].sum().backward()
                clip(parameters.values(), first.grad_clip, G)
                optimizer.step()
                # What is kept stays on the device: the host reads it once an epoch.
                values = torch.stack(list(terms.values())).detach().view(-1, G)
                limit = EXPLODED * (1 + values[0].abs()) if limit is None else limit
                alive = alive & (values[0] < limit)       # false for nan, too
                last = torch.where(alive, values[0], last)
                sums = sums + values * len(rows)
                done += len(rows)
                progress.update(done, note)
            *epoch_means, still_alive, before = torch.cat([sums / n, alive[None], last[None]]).tolist()
            curves.append(epoch_means)
            for g in range(G):
                if not still_alive[g] and not diverged[g]:
                    diverged[g] = {"epoch": epoch, "last_finite_loss": before[g]}
            if all(diverged):
                break
    progress.update(done, _progress_note(epoch, first, curves), end=True)

    results = []
    for g, model in enumerate(models):
        if G > 1:
            model.load_state_dict({name: stacked[g] for name, stacked in (parameters | buffers).items()})
        epochs = diverged[g]["epoch"] - 1 if diverged[g] else epoch
        results.append((None if diverged[g] else model.eval(), {
            "curves": {name: [epoch_means[k][g] for epoch_means in curves[:epochs]] for k, name in enumerate(terms)},
            "diverged": diverged[g], "seconds": time.monotonic() - progress.start, "side_by_side": G}))
    return results


def _progress_note(epoch, f, curves):
    """Which epoch it is, and the losses of the one before: "epoch 12/100, loss 235.32 to 250.01, "."""
    losses = [f"{loss:.2f}" for loss in (min(curves[-1][0]), max(curves[-1][0]))] if curves else []
    return f"epoch {epoch}/{f.num_epochs}, " + (f"loss {' to '.join(dict.fromkeys(losses))}, " if curves else "")


def clip(parameters, max_norm, G):
    """Scale each setting's gradient to a norm of at most max_norm; those of G > 1 settings are stacked, (G, ...)."""
    if G == 1:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    gradients = [p.grad for p in parameters]
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    scale = (max_norm / (norms + 1e-6)).clamp(max=1)      # the rule of clip_grad_norm_
    for g in gradients:
        g.mul_(scale.view(-1, *[1] * (g.ndim - 1)))


# ----------------------------------------------------------------------------------------------------------- evaluation

ELBO_DRAWS = 64                                           # draws per example where no log-likelihood is asked for
CHUNK_BYTES = {"cpu": 2**23, "cuda": 2**27}               # of a layer as wide as the data: a cache, or a busy GPU


@torch.no_grad()
def evaluate(model, f, data):
    """The metrics of a model on the test split, in nats per example, and what they are made of.

    Returns (metrics, examples). metrics: log_px, log p(x) by importance sampling with num_samples draws from q (Burda
    et al. 2016, eq. 8; absent for 0), elbo (at beta 1), reconstruction -E_q[log p(x|z)], and per level kl, AU (units
    with Var_x(E_q[z|x]) > 0.01 of the prior's variance), AU_kl (units with mean KL > 0.01), active_share (share of
    pairs of example and unit with KL > 0.01). examples: numpy arrays, log_px (n,) and unit_kl per level (n, d).
    """
    like, draws = data.test[0], f.num_samples or ELBO_DRAWS
    row = like.element_size() * max(t[0].numel() for t in data.test)
    rows = max(1, CHUNK_BYTES[like.device.type] // row)       # images x draws that are evaluated at a time
    images, f = max(1, rows // draws), on_device(f, data)
    progress, terms = Progress("evaluating", len(like), "test examples"), {}
    with seeded(f.seed, "evaluation", like.device):
        for start in range(0, len(like), images):
            here = slice(start, start + images)
            batch = [t[here] for t in data.test]
            for drawn in range(0, draws, rows):
                S = min(rows, draws - drawn)
                for name, value in model(*batch, f, sample_shape=(S,)).items():
                    if name == "log_w":
                        value = value.logsumexp(0)
                    else:                                 # this part of the mean over draws, which a term may lack
                        drawn_from = value.ndim > (1 if name == "log_px_z" else 2)
                        value = (value.mean(0) if drawn_from else value) * (S / draws)
                    if name not in terms:                 # of all rows at once: many small tensors scatter the memory
                        start_at = -math.inf if name == "log_w" else 0
                        terms[name] = value.new_full((len(like), *value.shape[1:]), start_at)
                    so_far = terms[name][here]
                    so_far.copy_(torch.logaddexp(so_far, value) if name == "log_w" else so_far + value)
            progress.update(start + len(batch[0]))
    progress.update(len(like), end=True)
    terms = {name: value.double().cpu() for name, value in terms.items()}

    metrics, examples = {}, {}
    if f.num_samples:
        log_px = terms["log_w"] - math.log(draws)
        metrics["log_px"], examples["log_px"] = log_px.mean().item(), log_px.numpy().astype("float32")
    kls = {f"kl{level}": terms[f"kl{level}"].sum(1).mean().item() for level in levels(terms)}
    reconstruction = -terms["log_px_z"].mean().item()
    metrics |= {"elbo": -reconstruction - sum(kls.values()), "reconstruction": reconstruction} | kls
    for level in levels(terms):
        unit_kl = terms.get(f"unit_kl{level}", terms[f"kl{level}"])
        metrics[f"AU{level}"] = (terms[f"mean{level}"].var(0) > 0.01).sum().item()
        metrics[f"AU_kl{level}"] = (unit_kl.mean(0) > 0.01).sum().item()
        metrics[f"active_share{level}"] = (unit_kl > 0.01).double().mean().item()
        examples[f"unit_kl{level}"] = unit_kl.numpy().astype("float32")
    return metrics, examples


def collapse_curve(unit_kl, epsilon, delta=0.05):
    """The share of units that are (epsilon, delta)-collapsed, P_x[KL_i < epsilon] >= 1 - delta (Lucas et al. 2019).

    unit_kl (n, d) in nats, epsilon (m,); returns (m,).
    """
    # A unit is collapsed at epsilon if its k-th smallest KL is below it, k the fewest examples that make 1 - delta.
    k = math.ceil(round(len(unit_kl) * (1 - delta), 9))
    return (np.sort(unit_kl, axis=0)[k - 1][:, None] < epsilon).mean(axis=0)


# ---------------------------------------------------------------------------------------------------------------- files

def write(path, save):
    """Let save(file) write a binary file that appears at path whole or not at all; its folder is made."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(beside, "wb") as file:
            save(file)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path, value):
    write(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def what(f, data):
    """The flags that say what is computed, {name: value}, with the data set that was used; not where or on what."""
    own, shared = own_and_shared(f)
    return {name: getattr(f, name) for name in own | shared if name not in WHERE_FLAGS} | {"dataset": data.name}


def run_name(f, data):
    """What names a run: its `changed` flags spelled out; "default" if there are none."""
    return spell(changed(f, data)) or "default"


def changed(f, data):
    """The flags of `what` that are not at their default, where MNIST counts as the default data set."""
    defaults = what(type(f)(), data) | {"dataset": "mnist"}
    return {name: value for name, value in what(f, data).items() if value != defaults[name]}


def spell(flags):
    """{name: value} as a folder's name: "beta_1=0.1,seed=2"; cut, with a digest of the whole, where it is too long."""
    name = ",".join(f"{name}={value}" for name, value in flags.items()).replace("/", "_")
    return name if len(name) <= 200 else f"{name[:180]}~{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def run_dir(f, data):
    """Where a setting's files go: out_dir/<script>/<run>."""
    return Path(f.out_dir, script_name(f), run_name(f, data))


def describe(f, data):
    """What every result file says of its run."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"script": script_name(f), "settings": what(f, data), "dataset": data.name,
            "device": device_name(data.train[0].device), "versions": versions}


def read_result(f, data, name):
    """The contents of a finished run's file, or None if there is none of these very settings."""
    try:
        result = json.loads((run_dir(f, data) / name).read_text())
    except (OSError, ValueError):
        return None
    return result if result.get("settings") == what(f, data) else None


# --------------------------------------------------------------------------------------------------- report: the table

def report(models, settings, data):
    """Evaluate what is not evaluated yet, leave each run's files, draw the grid's pictures and print the table.

    Returns the exit status: 1 if a setting diverged, else 0.
    """
    results = []
    for model, f, d in zip(models, settings, data):
        folder, result = run_dir(f, d), read_result(f, d, "result.json")
        if result is None:
            training = read_result(f, d, "training.json")
            result = describe(f, d) | {name: training[name] for name in ("diverged", "side_by_side", "curves")}
            result |= {"seconds": {"train": training["seconds"]}, "metrics": None}
            if model is not None:
                start = time.monotonic()
                result["metrics"], examples = evaluate(model, f, d)
                result["seconds"]["evaluate"] = time.monotonic() - start
                write(folder / "units.npz", lambda file: np.savez_compressed(file, **examples))
                draw_run(folder, model, f, d, training["curves"], examples)
            write_json(folder / "result.json", result)
        results.append(result)
        print(f"files: {folder}", file=sys.stderr)
    draw_grid(models, settings, data)
    print_table(results, settings, data)
    return int(any(result["diverged"] for result in results))


def varying(settings, data):
    """The flags that differ between settings, but for the seed: {name: its values in order}."""
    rows = [what(f, d) for f, d in zip(settings, data)]
    values = {name: list(dict.fromkeys(row[name] for row in rows)) for name in rows[0] if name != "seed"}
    return {name: of for name, of in values.items() if len(of) > 1}


def caption_of(settings, data):
    """What a table or picture is of: script, data set, and the flags that all settings share."""
    shared = {name: value for name, value in changed(settings[0], data[0]).items()
              if name not in (*varying(settings, data), "seed", "dataset")}
    return f"{script_name(settings[0])} on {', '.join({d.name: None for d in data})} {spell(shared)}".strip()


def print_table(results, settings, data):
    """One row a setting; rows that differ in nothing but the seed are one, mean ± standard deviation."""
    flags, seeds = list(varying(settings, data)), len({f.seed for f in settings})
    metrics = next((list(result["metrics"]) for result in results if result["metrics"]), [])
    rows, notes = {}, []
    for result in results:
        key = tuple(str(result["settings"][name]) for name in flags)
        rows.setdefault(key, []).append(result["metrics"])
        if result["diverged"]:
            of = spell(dict(zip(flags, key)) | {"seed": result["settings"]["seed"]})
            notes.append(f"{of} diverged in epoch {result['diverged']['epoch']}; the last finite loss was "
                         f"{result['diverged']['last_finite_loss']:.6g}")
    table = [flags + (metrics or ["metrics"])]
    for key, repeats in rows.items():
        finished = [m for m in repeats if m]
        cells = [_cell([m[name] for m in finished], len(repeats)) for name in metrics] if finished else ["diverged"]
        table.append([*key, *cells] + ["-"] * (len(table[0]) - len(key) - len(cells)))
    widths = [max(map(len, column)) for column in zip(*table)]
    d = data[0]
    print(f"\n{caption_of(settings, data)}: {len(d.train[0]):,} training and {len(d.test[0]):,} test examples, "
          f"{device_name(d.train[0].device)}, nats per test example, "
          f"{f'seed {settings[0].seed}' if seeds == 1 else f'mean ± std over {seeds} seeds'}")
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip())
    print("".join(f"{note}\n" for note in notes), end="")


def _cell(values, repeats):
    """A metric's text: a count as it is, a number with two decimals; over seeds mean ± standard deviation."""
    if repeats == 1:
        return f"{values[0]:.2f}" if isinstance(values[0], float) else str(values[0])
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}" + (f" ({len(values)} of {repeats})" if len(values) < repeats else "")


# ------------------------------------------------------------------------------------------------------------- pictures

EPSILON = np.geomspace(1e-4, 1e2, 241)                    # of collapse curves, in nats


def save_figure(path, columns, rows, width, height, caption, draw):
    """A picture of rows x columns axes of so many inches each, drawn by draw(axes), without a display."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    draw(figure.subplots(rows, columns, squeeze=False))
    figure.supxlabel(caption, fontsize=8)
    write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def draw_run(folder, model, f, data, curves, examples):
    """The pictures of one run: collapse.png, training.png and, of images, reconstructions.png and samples.png."""
    caption = f"{caption_of([f], [data])} seed={f.seed}"
    draw_collapse(folder / "collapse.png", {"": examples}, caption)

    def draw_curves(axes):
        for ax, (name, curve) in zip(axes[0], curves.items()):
            ax.plot(range(1, len(curve) + 1), curve)
            ax.set(title=name, xlabel="epoch", ylabel="nats per training example")
    save_figure(folder / "training.png", len(curves), 1, 3.4, 3, caption, draw_curves)

    def draw_images(axes):
        for ax, (title, images) in zip(axes[0], panels.items()):
            _show(ax, images, 10, title)
    if hasattr(model, "reconstructions"):
        panels = reconstructions(model, f, data, 100)
        save_figure(folder / "reconstructions.png", len(panels), 1, 4.2, 4.7, caption, draw_images)
    if hasattr(model, "samples"):
        with torch.no_grad(), seeded(f.seed, "samples", data.test[0].device):
            panels = {"samples from the prior": model.samples(100, on_device(f, data))}
        save_figure(folder / "samples.png", 1, 1, 4.2, 4.7, caption, draw_images)


@torch.no_grad()
def reconstructions(model, f, data, count):
    """{caption: images (n, 784)} of count or so test examples, as many of each class, class by class."""
    classes = data.test_labels.unique()
    rows = torch.cat([(data.test_labels == c).nonzero()[:max(1, count // len(classes)), 0] for c in classes])
    return model.reconstructions(*(t[rows] for t in data.test), on_device(f, data))


def _show(ax, images, columns, title, **font):
    """Images (n, 784) as one, in so many columns."""
    from torchvision.utils import make_grid
    tiles = make_grid(images.detach().view(-1, 1, 28, 28).clamp(0, 1).cpu(), columns, padding=1, pad_value=0.4)
    ax.imshow(tiles[0], cmap="gray", vmin=0, vmax=1)
    ax.set_title(title, **font)
    ax.axis("off")


def draw_collapse(path, runs, caption):
    """Collapse curves, a panel a level, a line a run: runs is {label: {"unit_kl" of each level: (n, d)}}."""
    kls = [name for name in next(iter(runs.values())) if name.startswith("unit_kl")]

    def draw(axes):
        from matplotlib import colormaps
        for ax, kl in zip(axes[0], kls):
            for k, (label, run) in enumerate(runs.items()):
                ax.step(EPSILON, 100 * collapse_curve(run[kl], EPSILON), where="post", label=label,
                        color=colormaps["viridis"](0.8 * k / max(1, len(runs) - 1)), linewidth=1.8,
                        linestyle=("-", "--", "-.", ":")[k % 4])
            ax.set(xscale="log", xlabel="ε (nats)", ylabel="collapsed units (%), δ = 0.05", ylim=(-3, 103),
                   title="units of z" + kl.removeprefix("unit_kl").removeprefix("_"))
            if len(runs) > 1:
                ax.legend(fontsize=7)
    save_figure(path, len(kls), 1, 4.6, 3.6, caption, draw)


def draw_grid(models, settings, data):
    """The pictures of a grid: over one flag its collapse curves overlaid; over two a contact sheet of reconstructions
    for each way to reconstruct and a heat map for each metric, rows the first flag, columns the second.

    Of settings that differ only in the seed the first is drawn; diverged settings are left out.
    """
    flags, cells = varying(settings, data), {}
    for model, f, d in zip(models, settings, data):
        if model is not None:
            cells.setdefault(tuple(what(f, d)[name] for name in flags), (model, f, d))
    if len(flags) not in (1, 2) or not cells:
        return
    shared = {name: value for name, value in changed(settings[0], data[0]).items() if name not in flags}
    folder = run_dir(settings[0], data[0]).parent / "grids" / spell(
        {name: "+".join(map(str, values)) for name, values in flags.items()} | shared)
    caption = caption_of(settings, data)
    if len(flags) == 1:
        runs = {f"{name} = {value}": np.load(run_dir(f, d) / "units.npz")
                for name in flags for (value,), (_, f, d) in cells.items()}
        draw_collapse(folder / "collapse.png", runs, caption)
    else:
        draw_sheets(folder, flags, cells, caption)
        draw_heat_maps(folder / "metrics.png", flags, cells, caption)
    print(f"files: {folder}", file=sys.stderr)


def draw_sheets(folder, flags, cells, caption):
    """Contact sheets of 20 examples a setting, reconstructions_<k>.png: 0 the originals, then each reconstruction."""
    (row_flag, row_values), (column_flag, column_values) = flags.items()
    sheets = {cell: list(reconstructions(*cells[cell], 20).items()) for cell in cells
              if hasattr(cells[cell][0], "reconstructions")}
    for k in range(len(next(iter(sheets.values()), []))):
        def draw(axes):
            for (i, row), (j, column) in itertools.product(enumerate(row_values), enumerate(column_values)):
                axes[i][j].axis("off")
                if (row, column) in sheets:
                    title, images = sheets[row, column][k]
                    _show(axes[i][j], images, 5, f"{row_flag} = {row}, {column_flag} = {column}", fontsize=8)
            axes[0][0].figure.suptitle(title, fontsize=9)
        save_figure(folder / f"reconstructions_{k}.png", len(column_values), len(row_values), 1.9, 1.8, caption, draw)


def draw_heat_maps(path, flags, cells, caption):
    """A heat map for every metric, each cell with its number."""
    (row_flag, row_values), (column_flag, column_values) = flags.items()
    metrics = {key: read_result(f, d, "result.json")["metrics"] for key, (_, f, d) in cells.items()}
    names = list(next(iter(metrics.values())))
    columns = min(4, len(names))

    def draw(axes):
        for ax in axes.flat[len(names):]:
            ax.axis("off")
        for ax, name in zip(axes.flat, names):
            values = [[metrics.get((row, column), {}).get(name, math.nan) for column in column_values]
                      for row in row_values]
            ax.imshow(values, cmap="viridis")
            middle = (np.nanmin(values) + np.nanmax(values)) / 2
            for i, j in np.ndindex(len(row_values), len(column_values)):
                ax.text(j, i, _cell([values[i][j]], 1), ha="center", va="center", fontsize=7,
                        color="black" if values[i][j] > middle else "white")
            ax.set(title=name, xlabel=column_flag, ylabel=row_flag, xticks=range(len(column_values)),
                   yticks=range(len(row_values)), xticklabels=column_values, yticklabels=row_values)
    save_figure(path, columns, math.ceil(len(names) / columns), 3.4, 3.2, caption, draw)


# ----------------------------------------------------------------------------------------------------------------- main

def run(main):
    """Run a script's main and exit with its status; Ctrl-C ends with one line."""
    try:
        status = main()
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished stays, and the same command goes on from there", file=sys.stderr)
        status = 130
    sys.exit(status)
