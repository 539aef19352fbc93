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
    linear_optimum(f, data)                the closed form of its linear twin on the same data (optional, static)
    widest_layer                           numbers per example, where a layer is wider than the data (optional)
    reconstructions(*batch, f)             {caption: images (B, 784)}     (optional, for pictures)
    samples(n, f)                          images (n, 784) from the prior, or {caption: images}   (optional, for pictures)
Images may also be (B, C, H, W). A deep model is one setting's: it draws all noise by `normal_like` and `uniform_like`, may
have elbo_draws (draws per example where no log-likelihood is asked for) and further terms (S, B), reported as metrics.

Within `fit` and `report`, the scalars of the objective in f (beta, eta, sigma, ...) are 0-d tensors on the device.
"""
import contextlib
import copy
import dataclasses
import datetime
import decimal
import difflib
import errno
import fcntl
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import optparse
import os
import pickle
import platform
import re
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
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

MAX_WHOLE = 10**9                                         # of a whole number without a limit of its own


def flag(default, help, low=None, above=None, high=None, choices=None, scalar=False, vector=False, evaluation=False):
    """A field of a flags dataclass: its default (which fixes its type), its line of --help and its allowed range.

    low and high are inclusive bounds, above an exclusive one. scalar marks a scalar of the objective: settings that
    differ in nothing else are trained side by side as one batched model. A vector may also be several numbers joined
    by "/", one a unit, and is then that text. evaluation marks what training does not know: runs that differ in nothing
    else share it.
    """
    if type(default) is int and high is None:
        high = MAX_WHOLE
    return dataclasses.field(default=default, metadata=dict(
        help=help, low=low, above=above, high=high, choices=choices, scalar=scalar, vector=vector,
        evaluation=evaluation))


scalar = functools.partial(flag, scalar=True)             # beta, eta, sigma, ...


@dataclass
class RunFlags:
    """The flags of every experiment."""
    seed: int = flag(0, "seed of all random numbers", low=0)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...; auto is CUDA where there is one")
    out_dir: str = flag("runs", "where results go")


@dataclass
class MatrixFlags(RunFlags):
    """The flags of the checks of a theorem on synthetic data."""
    device: str = flag("cpu", "auto, cpu, cuda, ...; matrices this small gain nothing from a GPU")
    num_samples: int = flag(1000, "rows of data", low=1)


@dataclass
class FitFlags(RunFlags):
    """The flags of every experiment that trains."""
    batch_size: int = flag(128, "examples per gradient step", low=1)
    num_epochs: int = flag(100, "passes over the training set", low=1)
    lr: float = flag(1e-3, "Adam's learning rate", above=0)
    lr_schedule: str = flag("constant", "cosine lets the learning rate fall to 0", choices=("constant", "cosine"))
    grad_clip: float = flag(0.1, "largest gradient norm of a setting", above=0)
    matmul: str = flag("float32", "precision of matrix products and convolutions on CUDA", choices=("float32", "tf32"))
    checkpoint_seconds: float = flag(60.0, "seconds of training between checkpoints", low=0)
    overwrite: bool = flag(False, "train again what is finished")


@dataclass
class TrainFlags(FitFlags):
    """The flags of every experiment that trains on images."""
    num_samples: int = flag(1000, "draws per example for the log-likelihood; 0 leaves it out", low=0, evaluation=True)
    dataset: str = flag("auto", "auto is mnist if on disk or to be fetched, else the embedded digits",
                        choices=("auto", "mnist", "fashion", "digits"))
    data_dir: str = flag("data", "where data sets lie, or are put")


@dataclass
class LinearFlags(TrainFlags):
    """The flags of the experiments with linear models, which are to arrive at a predicted optimum: the learning rate falls
    to 0, and a clip that noisy gradients never reach does not bias where they lead."""
    lr: float = flag(3e-3, "Adam's learning rate", above=0)
    lr_schedule: str = flag("cosine", "cosine lets the learning rate fall to 0", choices=("constant", "cosine"))
    grad_clip: float = flag(100.0, "largest gradient norm of a setting", above=0)


@dataclass
class DeepFlags(TrainFlags):
    """The flags of the experiments with deep models, each trained by all of torchrun's processes together."""
    beta: float = scalar(1.0, "weight of all KLs", low=0)
    batch_size: int = flag(250, "examples per gradient step and process", low=1)
    num_epochs: int = flag(300, "passes over the training set", low=1)
    lr: float = flag(0.01, "Adamax's learning rate", above=0)
    lr_end: float = flag(1e-5, "the learning rate that a cosine ends at", low=0)
    lr_schedule: str = flag("cosine", "after the warm-up", choices=("constant", "cosine"))
    warmup_epochs: float = flag(2.0, "epochs in which the learning rate rises from 0", low=0)
    weight_decay: float = flag(1e-6, "Adamax's weight decay", low=0)
    grad_clip: float = flag(5.0, "largest gradient norm", above=0)
    ema: float = flag(0.999, "weight of the past in the average of the weights that is evaluated", low=0, high=0.999999)
    autocast: str = flag("none", "precision of the networks in training", choices=("none", "bf16"))
    num_test: int = flag(0, "test examples, the first ones; 0 for all", low=0, evaluation=True)
    dataset: str = flag("auto", "auto is mnist if on disk or to be fetched, else the embedded digits",
                        choices=("auto", "mnist", "fashion", "digits", "omniglot", "cifar10"))


# How and where, not what: they do not name a run.
WHERE_FLAGS = ("device", "data_dir", "out_dir", "checkpoint_seconds", "overwrite", "evaluate")
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
    return f"{words} {' and '.join(bounds)}".strip() + (", or one a unit, joined by /" if meta["vector"] else "")


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
            elif field.metadata["vector"] and "/" in part:
                values.append("/".join(str(float(_number(field, number))) for number in part.split("/")))
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
    device_of(settings[0])
    return settings


# ------------------------------------------------------------------------------------------- device and random numbers

def device_of(f):
    """The torch.device that --device stands for, of torchrun's processes one each. Ends the program if there is none."""
    local, cuda = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if f.device == "auto" and not cuda:
        return torch.device("cpu")
    try:
        device = torch.device("cuda" if f.device == "auto" else f.device)
        if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", local % max(1, cuda))
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


def use_precision(f):
    """Let CUDA round matrix products and convolutions to TF32, or not, as --matmul says."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = f.matmul == "tf32"


def processes():
    """(number of this process, how many there are): (0, 1) unless torchrun started several."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def meet():
    """Wait until all processes that torchrun started are here."""
    if processes()[1] > 1:
        if not torch.distributed.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=365))
        torch.distributed.all_reduce(torch.zeros(1))      # by gloo on any machine: a barrier's backend would be its GPUs'


PURPOSES = ("init", "batches", "noise", "evaluation", "samples", "data")


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


_noise_of = (0, 1)                                        # whose rows of the noise are drawn: see `Training`


def normal_like(x):
    """Standard normal noise like x (B, ...). Where several processes train one model, each takes its rows of the noise that
    one process would draw for all, so that they do what one does with a batch as large as theirs together."""
    return _rows_of_noise(torch.randn, x)


def uniform_like(x):
    """Uniform noise in [0, 1), as `normal_like`."""
    return _rows_of_noise(torch.rand, x)


def _rows_of_noise(draw, x):
    rank, world = _noise_of
    return draw(world * len(x), *x.shape[1:], dtype=x.dtype, device=x.device)[rank * len(x):][:len(x)]


def binarise(x):
    """A draw of binary pixels whose means are x, in [0, 1]."""
    return (uniform_like(x) < x).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------------- data

@dataclass
class Data:
    """One data set, whole, on the device. train and test hold what a model's forward takes, as a tuple of tensors with
    one row per example (for a VAE one tensor (n, 784) in [0, 1]); labels are (n,), 0 to 9, of images. also_train asks for
    the metrics on train, too."""
    name: str
    train: tuple
    test: tuple
    train_labels: torch.Tensor = None
    test_labels: torch.Tensor = None
    also_train: bool = False

    @functools.cached_property
    def moment(self):
        """The second moment of the training rows, all columns of train joined: (d, d), see `second_moment`."""
        return second_moment(*self.train)


def load_mnist(settings):
    """The data of each setting: a list of `Data`, shared where the settings share --dataset.

    Images are float32 in [0, 1], flattened to 784 (cifar10's to 3072). Ends the program if --dataset is neither on disk
    nor to be fetched, or if a file is corrupt.
    """
    loaded = {}
    if processes()[0] > 0:
        meet()                                            # the first process may have to fetch or draw what all read
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
                        "put its files there, or take --dataset digits")
            read = {"digits": lambda: digits(f.data_dir), "omniglot": lambda: _read_omniglot(f),
                    "cifar10": lambda: _read_cifar10(f)}
            arrays = read.get(name, lambda: _read_mnist(f, name))()
            device = device_of(f)
            images = [torch.from_numpy(a).to(device).float().div_(255).flatten(1) for a in arrays[0::2]]
            labels = [torch.from_numpy(a).to(device).long() for a in arrays[1::2]]
            loaded[f.dataset] = Data(name, (images[0],), (images[1],), labels[0], labels[1])
    if processes()[0] == 0:
        meet()
    return [loaded[f.dataset] for f in settings]


def load_images(settings):
    """The data of each setting as images (n, 1, 28, 28), or (n, 3, 32, 32) of cifar10, float32 in [0, 1]; the test images cut
    to --num_test and, but for cifar10, binarised once, by the seed. Shared where settings share these flags."""
    @functools.cache
    def load(name, seed, num_test):
        d, shape = whole[name], (-1, *image_shape(name))
        rows = slice(num_test or None)
        test = d.test[0][rows].view(shape)
        if name != "cifar10":
            random = torch.rand(test.shape, generator=generator(seed, "data"))
            test = (random.to(test.device) < test).float()
        return Data(d.name, (d.train[0].view(shape),), (test,), d.train_labels, d.test_labels[rows])

    whole = {f.dataset: d for f, d in zip(settings, load_mnist(settings))}
    return [load(f.dataset, f.seed, f.num_test) for f in settings]


def image_shape(dataset):
    """(C, H, W) of a data set's images."""
    return (3, 32, 32) if dataset == "cifar10" else (1, 28, 28)


def load_mnist_quarters(settings):
    """The data of each setting as a CVAE has it, the images of one class only where the setting has a --digit.

    x is the lower left quarter of an image, y the other three: see `quarters`. Shared where settings share both flags.
    """
    @functools.cache
    def load(name, digit):
        d = whole[name]
        train, test = (slice(None) if digit is None else labels == digit for labels in (d.train_labels, d.test_labels))
        return Data(d.name, quarters(d.train[0][train]), quarters(d.test[0][test]), d.train_labels[train], d.test_labels[test])

    whole = {f.dataset: d for f, d in zip(settings, load_mnist(settings))}
    return [load(f.dataset, getattr(f, "digit", None)) for f in settings]


def quarters(images):
    """(x, y) of images (n, 784): x (n, 196) the lower left quarter, y (n, 588) the upper left, upper right and lower
    right ones."""
    upper, lower = images.view(-1, 28, 28).split(14, dim=1)
    upper_left, upper_right, lower_left, lower_right = (
        quarter.flatten(1) for half in (upper, lower) for quarter in half.split(14, dim=2))
    return lower_left, torch.cat([upper_left, upper_right, lower_right], dim=1)


def whole_images(x, y):
    """Images (n, 784) from their quarters x (n, 196) and y (n, 588): undoes `quarters`."""
    upper_left, upper_right, lower_left, lower_right = (
        quarter.unflatten(1, (14, 14)) for quarter in (*y[:, :392].split(196, dim=1), x, y[:, 392:]))
    return torch.cat([torch.cat([upper_left, upper_right], 2), torch.cat([lower_left, lower_right], 2)], 1).flatten(1)


MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def _torchvision_class(name):
    import torchvision                                    # slow to import, and not every script needs it
    of = torchvision.datasets
    return {"mnist": of.MNIST, "fashion": of.FashionMNIST, "omniglot": of.Omniglot, "cifar10": of.CIFAR10}[name]


def _on_disk_or_fetched(name, data_dir):
    """Whether the data set is in data_dir, after an attempt to unpack or to fetch it if it is not."""
    from torchvision.datasets.utils import check_integrity
    dataset = _torchvision_class(name)
    if name == "omniglot":
        folder, packed = Path(data_dir, dataset.folder), False
        there = all((folder / part).is_dir() for part in dataset.zips_md5)
        urls = [f"{dataset.download_url_prefix}/images_background.zip"]
    elif name == "cifar10":
        there = Path(data_dir, dataset.base_folder).is_dir()
        packed = check_integrity(str(Path(data_dir, dataset.filename)), dataset.tgz_md5)
        urls = [dataset.url]
    else:
        raw = Path(data_dir, dataset.__name__, "raw")
        there = all((raw / file).exists() for file in MNIST_FILES)
        packed = all(check_integrity(str(raw / file), md5) for file, md5 in dataset.resources)
        urls = [f"{mirror}{MNIST_FILES[0]}.gz" for mirror in dataset.mirrors]
    if there:
        return True
    if not packed and not _any_answers(urls):
        return False
    print(f"{'unpacking' if packed else 'fetching'} {name} in {data_dir}", file=sys.stderr)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            for split in (True, False):                   # background and evaluation of omniglot, train and test otherwise
                dataset(data_dir, split, download=True)
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
    raw = Path(f.data_dir, _torchvision_class(name).__name__, "raw")
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


def _read_omniglot(f):
    """Omniglot in the form of `_read_mnist`: strokes white on black, 105x105 brought to 28x28; the background alphabets for
    training, the evaluation alphabets for the test, so that no character is in both; labels are the characters."""
    from torchvision.transforms.functional import InterpolationMode, resize
    arrays = []
    for background in (True, False):
        try:
            drawn = _torchvision_class("omniglot")(f.data_dir, background, lambda image: 255 - np.array(
                resize(image, [28, 28], InterpolationMode.BILINEAR)))
            images, labels = zip(*drawn)
        except Exception as wrong:                        # torchvision and its image reader raise what they like
            stop(f, f"--data_dir: {Path(f.data_dir, 'omniglot-py')} is truncated or corrupt ({wrong}); remove it to fetch it again")
        arrays += [np.stack(images), np.array(labels)]
    return arrays


def _read_cifar10(f):
    """CIFAR-10 in the form of `_read_mnist`, images (n, 3, 32, 32)."""
    arrays = []
    for train in (True, False):
        try:
            part = _torchvision_class("cifar10")(f.data_dir, train)
        except Exception as wrong:
            stop(f, f"--data_dir: {Path(f.data_dir, 'cifar-10-batches-py')} is truncated or corrupt ({wrong}); "
                    "remove it to fetch it again")
        arrays += [part.data.transpose(0, 3, 1, 2).copy(), np.array(part.targets)]
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


# ------------------------------------------------------------------------------------------ spectra and closed forms
#
# What a linear VAE, CVAE and two-level HVAE converge to (Dang et al. 2024, arXiv 2306.05023, theorems 1, 2, 3 and 5;
# the optimal losses and the collapse thresholds follow from them). All in float64; moments are not centred. The closed
# forms take settings as numbers or as tensors (...,) of many and give {name: (..., d)}, per unit in the order of theta:
#   theta        what the theorem calls so: of each mode of the data, its root for VAE and HVAE, its variance for CVAE
#   lambda       singular values of the encoder on whitened data: the std of E[z|x] (of E[z2|z1])
#   omega        singular values of the decoder
#   sigma        std of q(z|x)
#   kl           the ELBO's KL term, in nats
#   information  log(1 + lambda^2 / sigma^2) / 2, what z tells of its input, in nats: 0 if and only if it is collapsed
#   collapse     the beta (HVAE: beta_2) from which on it is collapsed; inf for never
# and "loss" (...,), the least negative beta-ELBO, in nats per example. Two-level names end in their level, _1 or _2.

def second_moment(*columns):
    """E[v v^T] over rows, float64 (d, d), of v = the columns (n, d_1), (n, d_2), ... joined, d = d_1 + d_2 + ..."""
    moment = 0
    for rows in zip(*(column.split(512) for column in columns)):
        v = torch.cat(rows, dim=1).double()
        moment = moment + v.T @ v
    return moment.cpu() / len(columns[0])


@functools.lru_cache(maxsize=4)                           # by identity: a grid asks for the same moment again and again
def modes(moment):
    """The modes of a second moment (d, d): variances (d,) in descending order, and directions (d, d) in columns.

    Variances below d machine epsilons of the largest are rounding and set to 0.
    """
    variance, directions = torch.linalg.eigh(moment)
    variance, directions = variance.flip(0), directions.flip(1)
    rounding = len(variance) * torch.finfo(variance.dtype).eps * variance[0]
    return torch.where(variance > rounding, variance, 0), directions


def spectrum(moment):
    """The variances of the modes of a second moment (d, d): (d,), in descending order."""
    return modes(moment)[0]


def root(moment):
    """A root R (d, d) of a second moment, R R^T = E[v v^T]: the singular values of W R are those of W P Phi^(1/2)."""
    variance, directions = modes(moment)
    return directions * variance.sqrt()


@functools.lru_cache(maxsize=4)
def residual(moment, dim_x):
    """E = B - C A^+ C^T, what is left of y's second moment once x has explained what it can: (d_y, d_y).

    moment is that of (x, y) joined, with blocks A of x, (dim_x, dim_x), B of y and C = E[y x^T]. Source: theorem 2.
    """
    A, B, C = moment[:dim_x, :dim_x], moment[dim_x:, dim_x:], moment[dim_x:, :dim_x]
    variance, directions = modes(A)
    whitening = torch.where(variance > 0, variance.rsqrt(), 0) * directions
    explained = C @ whitening                             # E[y x~^T], x~ the whitened x
    left = B - explained @ explained.T
    # What is left of a variance that x explains wholly is rounding.
    return left if left.trace() > len(moment) * torch.finfo(left.dtype).eps * B.trace() else torch.zeros_like(left)


def _per_unit(*settings):
    """Settings as float64 tensors with an axis for units: (...,) becomes (..., 1)."""
    return [torch.as_tensor(value, dtype=torch.float64).unsqueeze(-1) for value in settings]


def _first(values, d):
    """The first d values, (..., d), with zeros where there are fewer."""
    return torch.nn.functional.pad(values[..., :d], (0, max(0, d - values.shape[-1])))


def _gaussian(squared_error, dim, eta_dec):
    """-log N of mean squared error (...,) in dim dimensions with std eta_dec, in nats."""
    return squared_error / (2 * eta_dec**2) + dim / 2 * (2 * math.pi * eta_dec**2).log()


def vae_optimum(theta, d_1, beta, eta_enc, eta_dec):
    """The linear VAE at its optimum, Sigma = diag(sigma_i^2) learnable (theorem 1).

    theta (D,): the roots of the spectrum of E[x x^T]. Per unit, (..., d_1): see above.
    """
    beta, eta_enc, eta_dec = _per_unit(beta, eta_enc, eta_dec)
    variance, level = _first(theta, d_1)**2, beta * eta_dec**2
    above = torch.maximum(variance, level)                # reverse water-filling: modes below the level collapse
    kl = (above / level).log() / 2
    error = (theta**2).sum(-1) - (above - level).sum(-1)
    return {"theta": _first(theta, d_1), "lambda": eta_enc * ((above - level) / above).sqrt(),
            "omega": (above - level).sqrt() / eta_enc, "sigma": eta_enc * (level / above).sqrt(), "kl": kl,
            "information": kl, "collapse": variance / eta_dec**2,
            "loss": _gaussian(error, theta.shape[-1], eta_dec[..., 0]) + (beta * kl).sum(-1)}


def cvae_optimum(theta, dim_z, beta, eta_enc, eta_dec):
    """The linear CVAE at its optimum, Sigma = diag(sigma_i^2) learnable (theorem 2): the VAE of what x leaves of y.

    theta (D,): the spectrum of E, see `residual`. Per unit, (..., dim_z): see above.
    """
    return vae_optimum(theta.sqrt(), dim_z, beta, eta_enc, eta_dec) | {"theta": _first(theta, dim_z)}


def vae_optimum_fixed_sigma(theta, sigma, beta, eta_enc, eta_dec):
    """The linear VAE at its optimum, Sigma = diag(sigma_i^2) fixed (theorem 1): sigma (..., d_1), the smallest on the
    largest mode. Where the mean is dead (lambda = 0) the kl is not 0, unless sigma_i = eta_enc."""
    beta, eta_enc, eta_dec = _per_unit(beta, eta_enc, eta_dec)
    sigma = sigma.double().sort(dim=-1).values
    d_1 = sigma.shape[-1]
    first, k = _first(theta, d_1), beta.sqrt() * eta_dec / eta_enc
    gain = (first - k * sigma).clamp(min=0)
    lambda_ = (sigma * gain / k).sqrt()
    dead_kl = _kl(0, sigma, eta_enc)
    error = (theta**2).sum(-1) - (gain**2).sum(-1)        # with the beta-weighted KL of the means in it
    return {"theta": first, "lambda": lambda_, "omega": (k * gain / sigma).sqrt(), "sigma": sigma.expand_as(gain),
            "kl": _kl(lambda_, sigma, eta_enc), "information": _information(lambda_, sigma),
            "collapse": (first * eta_enc / (eta_dec * sigma))**2,
            "loss": _gaussian(error, theta.shape[-1], eta_dec[..., 0]) + (beta * dead_kl).sum(-1)}


def hvae_optimum(theta, d_1, d_2, sigma_1, beta_1, beta_2, eta_enc, eta_dec):
    """The linear two-level HVAE at its optimum, Sigma1 = sigma_1^2 I fixed, Sigma2 = diag learnable (theorem 3).

    theta (D,): the roots of the spectrum of E[x x^T]. Per unit of z1 (..., d_1) and of z2 (..., d_2): see above. omega_2
    are the singular values of U2. Beyond the paper, d_1 and d_2 may differ: z2 describes the largest modes of z1.
    """
    sigma_1, beta_1, beta_2, eta_enc, eta_dec = _per_unit(sigma_1, beta_1, beta_2, eta_enc, eta_dec)
    first, described = _first(theta, d_1), torch.arange(d_1) < d_2
    b, alone = beta_2 / beta_1 * eta_dec**2, sigma_1 * first / beta_1.sqrt()
    with_z2 = (sigma_1 * first / eta_dec)**2 / beta_2
    # m = lambda_1^2 + sigma_1^2, the variance of a mode of z1
    m = torch.where(described & ((sigma_1**2 >= b) | (alone >= b)), with_z2, alone)
    m = torch.maximum(m, sigma_1**2)
    ratio = torch.where(described, (m / b).clamp(min=1), 1)   # of m to what z2 leaves of it
    kl_1 = (m / ratio / eta_dec**2 - 1) / 2 - (sigma_1 / eta_dec).log()
    ratio_2 = 1 + _first(ratio - 1, d_2)
    kl_2 = ratio_2.log() / 2
    lambda_1, loss = _level_1(theta, first, m, sigma_1, eta_dec)
    return {"theta": first, "lambda_1": lambda_1, "kl_1": kl_1, "information_1": _information(lambda_1, sigma_1),
            "lambda_2": eta_enc * (1 - 1 / ratio_2).sqrt(), "omega_2": (b * (ratio_2 - 1)).sqrt() / eta_enc,
            "sigma_2": eta_enc / ratio_2.sqrt(), "kl_2": kl_2, "information_2": kl_2,
            "collapse_1": _collapse_1(first, sigma_1, beta_1, (first / eta_dec)**2 * described),
            "collapse_2": _first(beta_1 / eta_dec**2 * torch.maximum(sigma_1**2, alone) * described, d_2),
            "loss": loss + (beta_1 * kl_1).sum(-1) + (beta_2 * kl_2).sum(-1)}


def hvae_optimum_fixed_sigma_2(theta, d_1, d_2, sigma_1, sigma_2, beta_1, beta_2, eta_enc, eta_dec):
    """The linear two-level HVAE at its optimum, Sigma1 = sigma_1^2 I and Sigma2 = sigma_2^2 I fixed (theorem 5).

    Arguments and result as of `hvae_optimum`. Where the mean of z2 is dead its kl is not 0, unless sigma_2 = eta_enc.
    """
    sigma_1, sigma_2, beta_1, beta_2, eta_enc, eta_dec = _per_unit(sigma_1, sigma_2, beta_1, beta_2, eta_enc, eta_dec)
    first, described = _first(theta, d_1), torch.arange(d_1) < d_2
    c, K = eta_dec / eta_enc, (beta_1 * beta_2).sqrt()
    m_0, alone = beta_2 * (c * sigma_2)**2 / beta_1, sigma_1 * first / beta_1.sqrt()
    with_z2 = (sigma_1**2 * first**2 / (K * c * sigma_2))**(2 / 3)
    m = torch.where(described & ((sigma_1**2 >= m_0) | (alone >= m_0)), with_z2, alone)
    m = torch.maximum(m, sigma_1**2)
    omega = ((K * c * m.sqrt() / sigma_2 - beta_2 * c**2).clamp(min=0) / beta_1).sqrt() * described
    encoder = beta_1 * omega / (beta_1 * omega**2 + beta_2 * c**2)        # singular values of W2
    left = (1 - omega * encoder)**2 * m + (omega * sigma_2)**2            # E (z1 - U2 z2)^2
    kl_1 = (left / eta_dec**2 - 1) / 2 - (sigma_1 / eta_dec).log()
    lambda_2 = _first(encoder * m.sqrt(), d_2)
    kl_2 = _kl(lambda_2, sigma_2, eta_enc)
    lambda_1, loss = _level_1(theta, first, m, sigma_1, eta_dec)
    by_noise = first**4 / (beta_1 * (c * sigma_1 * sigma_2)**2)
    return {"theta": first, "lambda_1": lambda_1, "kl_1": kl_1, "information_1": _information(lambda_1, sigma_1),
            "lambda_2": lambda_2, "omega_2": _first(omega, d_2), "kl_2": kl_2,
            "information_2": _information(lambda_2, sigma_2),
            "collapse_1": _collapse_1(first, sigma_1, beta_1, by_noise * described),
            "collapse_2": _first(beta_1 / (c * sigma_2)**2 * torch.maximum(sigma_1**2, alone) * described, d_2),
            "loss": loss + (beta_1 * kl_1).sum(-1) + (beta_2 * kl_2).sum(-1)}


def _level_1(theta, first, m, sigma_1, eta_dec):
    """lambda_1 and the reconstruction's part of the loss, from m, the variances of z1's modes."""
    error = (theta**2).sum(-1) - (first**2 * (1 - sigma_1**2 / m)).sum(-1)
    return (m - sigma_1**2).sqrt(), _gaussian(error, theta.shape[-1], eta_dec[..., 0])


def _collapse_1(first, sigma_1, beta_1, with_z2):
    """The beta_2 from which on lambda_1 = 0: never where the mode is strong enough for z1 alone, with_z2 otherwise."""
    return torch.where(first > sigma_1 * beta_1.sqrt(), math.inf, with_z2)


def _kl(lambda_, sigma, eta):
    """E KL(N(mean, sigma^2) || N(0, eta^2)) in nats, lambda_ the root mean square of the mean."""
    return ((lambda_**2 + sigma**2) / eta**2 - 1) / 2 - (sigma / eta).log()


def _information(lambda_, sigma):
    return (1 + (lambda_ / sigma)**2).log() / 2


def vae_units(U, V, sigma, eta_enc):
    """What `vae_optimum` predicts, of a linear VAE or CVAE as it is: U (D, d_1) its decoder, V = W R (d_1, D) its encoder
    on whitened data, sigma (d_1,). All float64."""
    # Units that share a sigma may be turned into each other without changing anything: take their singular directions.
    of_unit = torch.empty_like(sigma)
    for value in sigma.unique():
        tied = sigma == value
        of_unit[tied] = _singular_values(V[tied], int(tied.sum()))
    return {"lambda": _singular_values(V, len(sigma)), "omega": _singular_values(U, len(sigma)), "sigma": sigma,
            "kl": _kl(of_unit, sigma, eta_enc), "information": _information(of_unit, sigma)}


def hvae_units(V1, W2, U2, sigma_1, sigma_2, eta_enc, eta_dec):
    """What `hvae_optimum` predicts, of a linear two-level HVAE as it is: V1 = W1 R (d_1, D), W2 (d_2, d_1), U2 (d_1, d_2),
    sigma_1 a number, sigma_2 (d_2,). All float64."""
    d_1, d_2 = U2.shape
    z1_moment = V1 @ V1.T + sigma_1**2 * torch.eye(d_1, dtype=V1.dtype)
    unexplained = torch.eye(d_1, dtype=V1.dtype) - U2 @ W2
    z1_left = unexplained @ z1_moment @ unexplained.T + U2 * sigma_2**2 @ U2.T     # E[(z1 - U2 z2)(z1 - U2 z2)^T]
    kl_1 = (torch.linalg.eigvalsh(z1_left) / eta_dec**2 - 1) / 2 - math.log(sigma_1 / eta_dec)
    lambda_1 = _singular_values(V1, d_1)
    level_2 = vae_units(U2, W2 @ torch.linalg.cholesky(z1_moment), sigma_2, eta_enc)
    return {"lambda_1": lambda_1, "kl_1": kl_1, "information_1": _information(lambda_1, sigma_1)} | {
        f"{name}_2": values for name, values in level_2.items()}


def _singular_values(matrix, d):
    """The d largest singular values of a matrix in descending order, 0 where it has fewer."""
    return _first(torch.linalg.svdvals(matrix), d)


def compare(predicted, trained, loss):
    """What a closed form predicts beside what a model is, as lists: {"predicted", "trained", "errors", "optimal_loss",
    "loss", "gap"}; None for a collapse that never comes. The trained values of each kind stand in the order of the
    predicted, largest at largest: which unit of a model describes which mode is its own affair."""
    ordered = {}
    for name in trained:
        if name in predicted:
            ranks = predicted[name].argsort(descending=True, stable=True)
            ordered[name] = torch.empty_like(predicted[name])
            ordered[name][ranks] = trained[name].sort(descending=True).values
    errors = {name: (ordered[name] - predicted[name]).abs().max().item() for name in ordered}
    optimal = predicted["loss"].item()
    return {"predicted": per_unit(predicted),
            "trained": {name: values.tolist() for name, values in ordered.items()}, "errors": errors,
            "optimal_loss": optimal, "loss": loss, "gap": loss - optimal}


def per_unit(predicted):
    """What a closed form says of each unit, as lists: {name: [...]}, with None for a collapse that never comes."""
    return {name: [None if value == math.inf else value for value in values.tolist()]
            for name, values in predicted.items() if name != "loss"}


def minimise(loss, starts, blocks=40):
    """Minimise loss({name: tensor}) over float64 parameters: L-BFGS from each start, in at most so many blocks of 50 steps,
    until a block gains less than 1e-9 of the loss; then Newton steps from the best.
    A list of ({name: tensor}, the loss there), the least first."""
    found = []
    for start in starts:
        parameters = {name: value.clone().requires_grad_() for name, value in start.items()}
        optimizer = torch.optim.LBFGS(parameters.values(), max_iter=50, history_size=30, tolerance_change=0,
                                      tolerance_grad=1e-9, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            value = loss(parameters)
            value.backward()
            return value

        before = math.inf
        for _ in range(blocks):
            optimizer.step(closure)
            now = loss(parameters).item()
            if not before - now > 1e-9 * abs(now):
                break
            before = now
        found.append(({name: value.detach() for name, value in parameters.items()}, now))
    found.sort(key=lambda one: one[1])
    return [newton(loss, found[0][0]), *found[1:]]


def newton(loss, parameters, steps=40):
    """Newton steps down to the nearest minimum: a line search on the loss ends where rounding hides its differences, at
    half the digits. Directions in which the loss is flat stay as they are. ({name: tensor}, the loss there)."""
    names, shapes = list(parameters), [value.shape for value in parameters.values()]

    def unflatten(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}

    def of_flat(flat):
        return loss(unflatten(flat))

    flat = torch.cat([value.flatten() for value in parameters.values()])
    value = of_flat(flat)
    for _ in range(steps):
        gradient = torch.func.grad(of_flat)(flat)
        curvature, directions = torch.linalg.eigh(torch.func.jacrev(torch.func.grad(of_flat))(flat))
        curvature = curvature.abs()                       # downhill where the loss curves down, too
        curved = curvature > 1e-9 * curvature.max()
        step = directions @ torch.where(curved, directions.T @ gradient / curvature, 0)
        lengths = 0.5 ** torch.arange(10.0, dtype=flat.dtype, device=flat.device)
        after = torch.stack([of_flat(flat - length * step) for length in lengths])
        if not after.min() <= value + 1e-14 * value.abs():
            break
        flat, value = flat - lengths[after.argmin()] * step, after.min()
        if step.abs().max() < 1e-12 * flat.abs().max():
            break
    return unflatten(flat), value.item()


# --------------------------------------------------------------------------------------- densities that scripts share

def log_normal(x, mean, std):
    """log N(x; mean, std^2 I) in nats, summed over the last dimension: x and mean (..., d), std a 0-d tensor; (...)."""
    squared_error = torch.linalg.vector_norm(x - mean, dim=-1).square()
    return -squared_error / (2 * std**2) - x.shape[-1] / 2 * (2 * math.pi * std**2).log()


def log_normal_linear(x, U, z, std):
    """log N(x; U z, std^2 I) in nats, the square expanded so that no draw is as wide as the data: x (B, d), U (d, k),
    z (..., B, k), std a 0-d tensor; (..., B)."""
    squared_error = (x**2).sum(-1) - 2 * (z * (x @ U)).sum(-1) + (z @ (U.T @ U) * z).sum(-1)
    return -squared_error / (2 * std**2) - x.shape[-1] / 2 * (2 * math.pi * std**2).log()


def log_normal_affine(x, layer, h, std):
    """log N(x; layer(h), std^2 I) in nats, layer an nn.Linear: x (B, d), h (..., B, k), std a 0-d tensor; (..., B). The
    square is expanded where that takes less arithmetic: where there are many draws, and d is larger than k."""
    d, k = layer.weight.shape
    if h.shape[:-1].numel() * (d - k) < 4 * d * k:
        return log_normal(x, layer(h), std)
    return log_normal_linear(x - layer.bias, layer.weight, h, std)


def log_normal_low_rank(x, factor, std):
    """log N(x; 0, factor factor^T + std^2 I) in nats: x (B, d), factor (d, k), std a 0-d tensor; (B,)."""
    return torch.distributions.LowRankMultivariateNormal(
        torch.zeros_like(x[0]), factor, (std**2).expand(len(factor))).log_prob(x)


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
        beta = getattr(f, f"beta{level}" if hasattr(f, f"beta{level}") else "beta")
        loss = loss + beta * terms[f"kl{level}"].sum(-1)
    return loss


# ------------------------------------------------------------------------------------------------------------------ fit

class Progress:
    """On a terminal one line that renews itself, elsewhere a line now and then, both on stderr."""

    def __init__(self, what, total, unit, before=0):
        """before of total were done earlier."""
        rank, world = processes()
        self.what = what if world == 1 else f"process {rank}: {what}"
        self.total, self.unit, self.before = total, unit, before
        self.start, self.shown = time.monotonic(), -math.inf
        self.terminal = sys.stderr.isatty() and world == 1

    def update(self, done, note="", end=False):
        """done of total units are done; note is whatever else there is to say."""
        now = time.monotonic()
        if not end and now - self.shown < (0.2 if self.terminal else 30):
            return
        self.shown, seconds = now, max(now - self.start, 1e-9)
        rate = (done - self.before) / seconds
        left = "" if end or not rate else f", {_clock((self.total - done) / rate)} left"
        line = (f"{self.what}: {note}{done / self.total:.0%}, {rate:,.0f} {self.unit}/s, "
                f"{_clock(seconds)}{left}")
        if self.terminal:                                 # a line that wraps could not be taken back
            line = f"\r\033[K{line[:shutil.get_terminal_size().columns - 1]}"
        print(line, end="" if self.terminal and not end else "\n", file=sys.stderr, flush=True)


def _clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def scalars_of(group, like):
    """The scalars of the objective of a group of G settings: {flag: (G,) tensor} of like's device and dtype; a
    vector's is (G, d) where one of the settings gives d numbers."""
    scalars = {}
    for name in [field.name for field in dataclasses.fields(group[0]) if field.metadata["scalar"]]:
        rows = [numbers(getattr(f, name)) for f in group]
        width = max(map(len, rows))
        values = torch.tensor([row * (width // len(row)) for row in rows], dtype=like.dtype, device=like.device)
        scalars[name] = values[:, 0] if width == 1 else values
    return scalars


def numbers(value):
    """The numbers that a vector flag's value stands for: a list of one, or of one a unit."""
    return [float(number) for number in str(value).split("/")]


def on_device(f, like):
    """The setting as a model's forward sees it: the scalars of its objective are 0-d tensors, of like's device and dtype."""
    return dataclasses.replace(f, **{name: values[0] for name, values in scalars_of([f], like).items()})


def fit(Model, settings, data, side_by_side=True):
    """Train one `Model` per setting on its data; models in the order of the settings, None where training diverged.

    Settings that differ only in scalars of the objective train side by side as one batched model, each from the same
    initial weights, on the same batches and with the same noise as if it were alone. What is finished is read from its
    run's folder instead, unless --overwrite; each run's model.pt and training.json are written when its group ends, and
    until then a checkpoint. Of several processes each trains its share; None stands for the others' models.
    """
    print(f"device: {device_name(device_of(settings[0]))}", file=sys.stderr)
    models, groups = [None] * len(settings), {}
    for i in share(settings):
        f, d = settings[i], data[i]
        fixed = [getattr(f, field.name) for field in dataclasses.fields(f) if not field.metadata["scalar"]]
        groups.setdefault((*fixed, id(d)) if side_by_side else i, []).append(i)
    lock([run_dir(settings[i], data[i]) for group in groups.values() for i in group])
    for group in groups.values():
        unfinished = []
        for i in group:
            finished = None if settings[i].overwrite else read_trained(Model, settings[i], data[i])
            if finished is None:
                unfinished.append(i)
            else:
                models[i] = finished[0]
                take_over(*finished, settings[i], data[i])
        if not unfinished:                                # but a process may have died before this
            Checkpoint([settings[i] for i in group], data[group[0]]).remove()
            continue
        # A process that died while it wrote its results left the checkpoint of the whole group.
        for members in dict.fromkeys((tuple(group), tuple(unfinished))):
            checkpoint = Checkpoint([settings[i] for i in members], data[members[0]])
            if checkpoint.state:
                break
        trained = train(Model, [settings[i] for i in members], data[members[0]], checkpoint)
        for i, (model, training) in zip(members, trained):
            if i not in unfinished:
                continue
            models[i] = model
            leave(model, training, settings[i], data[i])
        checkpoint.remove()
    return models


def leave(model, training, f, data):
    """Write a trained model (None for one that diverged) and what its training was. The files of a run that this one takes
    the place of go first, those that vouch for the others before all."""
    folder = run_dir(f, data)
    for stale in sorted(folder.glob("*"), key=lambda path: path.suffix != ".json"):
        stale.unlink()
    if model is not None:
        write(folder / "model.pt", lambda file: torch.save(model.state_dict(), file))
    write_json(folder / "training.json", describe(f, data) | training)


def share(settings):
    """The places of the settings that this process is to train: dealt out, first to first, over all processes."""
    rank, world = processes()
    return range(rank, len(settings), world)


def read_trained(Model, f, data):
    """(model, training, folder) of a setting that was trained before, the first two as `train` gives them: by its run, whose
    files are in the folder, or by one that differs from it only in its evaluation. None if there is none, whole."""
    own = run_dir(f, data)
    for folder in (None, *sorted(other for other in own.parent.glob("*/") if other != own)):
        training, path = read_result(f, data, "training.json", folder), (folder or own) / "model.pt"
        if training is None:
            continue
        if training["diverged"]:
            return None, training, path.parent
        model = build(Model, f, data).eval()
        try:
            model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
            return model, training, path.parent
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as wrong:
            print(f"cannot read {path}, training again: {wrong}", file=sys.stderr)


def take_over(model, training, folder, f, data):
    """Say that a setting was trained before, and leave its files where its run is to have them."""
    print(f"already trained: {folder} (--overwrite trains it again)", file=sys.stderr)
    if folder != run_dir(f, data):
        leave(model, training | {"settings": what(f, data)}, f, data)


def build(Model, f, data):
    """A model on the data's device, with the initial weights that its seed gives, the same on every device."""
    with seeded(f.seed, "init", torch.device("cpu")):
        # channels_last lets convolutions run faster on a CPU; other weights it leaves as they are.
        return Model(f).to(data.train[0].device, data.train[0].dtype, memory_format=torch.channels_last)


EXPLODED = 1e3                                            # times the first batch's loss


def train(Model, group, data, checkpoint=None):
    """Train a group of G settings that differ only in scalars of the objective, side by side, with Adam.

    Returns one (model, training) per setting. training holds the curves (means over each epoch, in nats per example),
    the seconds of the whole group, and under "diverged" None or, where a batch's loss was not finite or EXPLODED, the
    epoch and the last loss before it, with None for the model. With a `Checkpoint` it goes on from where that stands, and
    ends with the very numbers of an undisturbed run. Raises Interrupted, the checkpoint written, on SIGINT and SIGTERM.
    """
    first, like, G = group[0], data.train[0], len(group)
    models = [build(Model, f, data) for f in group]

    def means(terms, f):
        """A batch's means of one setting's loss and terms: a dict of 0-d tensors, the loss first."""
        return {"loss": beta_elbo_loss(terms, f).mean(), "reconstruction": -terms["log_px_z"].mean()} | {
            f"kl{level}": terms[f"kl{level}"].sum(-1).mean() for level in levels(terms)}

    if G > 1:
        def of_one(parameters, buffers, scalars, *batch):
            f = dataclasses.replace(first, **scalars)
            return means(torch.func.functional_call(models[0], (parameters, buffers), (*batch, f)), f)

        (parameters, buffers), scalars = torch.func.stack_module_state(models), scalars_of(group, like)
        of_each = torch.vmap(of_one, in_dims=(0, 0, 0) + (None,) * len(data.train), randomness="same")
        forward = functools.partial(of_each, parameters, buffers, scalars)
    else:
        parameters, buffers = dict(models[0].named_parameters()), dict(models[0].named_buffers())
        f = on_device(first, like)

        def forward(*batch):
            return means(models[0](*batch, f), f)
    use_precision(first)
    n, batches = len(like), generator(first.seed, "batches", like.device)
    optimizer, schedule = adam(parameters.values(), first, n)
    epoch, done, curves, diverged, before = 1, 0, [], [None] * G, 0.0
    # Kept on the device, the host reads it once an epoch: sums over examples of each term, the last loss of each setting
    # that was in order, whether all were, and the loss from which on it is not.
    tally, names = {}, []

    def step(rows):
        terms = forward(*(t.index_select(0, rows) for t in data.train))
        optimizer.zero_grad()
        terms["loss"].sum().backward()
        clip(parameters.values(), first.grad_clip, G)
        optimizer.step()
        values = torch.stack(list(terms.values())).detach().view(-1, G)
        if not tally:
            names.extend(terms)
            tally.update(sums=torch.zeros_like(values), last=torch.full_like(values[0], math.nan),
                         alive=torch.ones_like(values[0], dtype=torch.bool), limit=EXPLODED * (1 + values[0].abs()))
        tally["sums"].add_(values, alpha=len(rows))
        tally["alive"].logical_and_(values[0] < tally["limit"])              # false for nan, too
        tally["last"].copy_(torch.where(tally["alive"], values[0], tally["last"]))

    def state():
        """All that training depends on from here on."""
        return {"epoch": epoch, "done": done, "curves": curves, "diverged": diverged, "order": order, "tally": tally,
                "seconds": before + time.monotonic() - start, "noise": random_states(like.device),
                "parameters": {name: value.detach() for name, value in (parameters | buffers).items()},
                "optimizer": optimizer.state_dict(), "schedule": schedule and schedule.state_dict(), "names": names}

    with seeded(first.seed, "noise", like.device), held_signals() as came:
        if checkpoint and checkpoint.state:
            saved = checkpoint.state
            epoch, done, curves, diverged, before = (saved[k] for k in ("epoch", "done", "curves", "diverged", "seconds"))
            for name, value in (parameters | buffers).items():
                value.data.copy_(saved["parameters"][name])
            optimizer.load_state_dict(saved["optimizer"])
            if schedule:
                schedule.load_state_dict(saved["schedule"])
            names.extend(saved["names"])
            tally.update({name: value.to(like.device) for name, value in saved["tally"].items()})
            batches.set_state(saved["order"].cpu())
            random_states(like.device, saved["noise"])
            print(f"going on in epoch {epoch} of {first.num_epochs}, from {checkpoint.path}", file=sys.stderr)
        order, start, replayed = batches.get_state(), time.monotonic(), Replayed(step, first.batch_size, like.device)
        progress = Progress(f"training {G} settings" if G > 1 else "training", n * first.num_epochs, "examples",
                            (epoch - 1) * n + min(n, done * first.batch_size))
        for epoch in range(epoch, first.num_epochs + 1):
            order, note = batches.get_state(), _progress_note(epoch, first.num_epochs, curves)
            rows = torch.randperm(n, generator=batches, device=like.device).split(first.batch_size)
            for done in range(done + 1, len(rows) + 1):
                replayed(rows[done - 1])
                if schedule:
                    schedule.step()
                progress.update((epoch - 1) * n + min(n, done * first.batch_size), note)
                if checkpoint and (came or checkpoint.due(first.checkpoint_seconds)):
                    checkpoint.write(state())
                if came:
                    raise Interrupted(came[0])
            *epoch_means, still_alive, last = torch.cat([tally["sums"] / n, tally["alive"][None], tally["last"][None]]).tolist()
            curves.append(epoch_means)
            for g in range(G):
                if not still_alive[g] and not diverged[g]:
                    diverged[g] = {"epoch": epoch, "last_finite_loss": last[g]}
            if all(diverged):
                break
            tally["sums"].zero_()
            done = 0
        epoch, done = first.num_epochs + 1, 0
        if checkpoint and G > 1:                          # stands until the last of the group is written
            checkpoint.write(state())
    progress.update(len(curves) * n, _progress_note(len(curves), first.num_epochs, curves), end=True)

    results = []
    for g, model in enumerate(models):
        if G > 1:
            model.load_state_dict({name: stacked[g] for name, stacked in (parameters | buffers).items()})
        kept = curves[:diverged[g]["epoch"] - 1] if diverged[g] else curves
        results.append((None if diverged[g] else model.eval(), {
            "curves": {name: [epoch_means[k][g] for epoch_means in kept] for k, name in enumerate(names)},
            "diverged": diverged[g], "seconds": before + time.monotonic() - start, "side_by_side": G}))
    return results


def adam(parameters, f, n):
    """Adam as --lr says, and what lets its learning rate fall over the steps of all epochs (None for a constant one)."""
    parameters = list(parameters)
    cuda = parameters[0].is_cuda                          # where a step is to be captured, the rate is to lie on the device
    lr = torch.tensor(f.lr, device=parameters[0].device) if cuda else f.lr
    optimizer, steps = torch.optim.Adam(parameters, lr=lr, fused=True, capturable=cuda), f.num_epochs * math.ceil(n / f.batch_size)
    if f.lr_schedule == "constant":
        return optimizer, None
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)


class Replayed:
    """step(rows), on CUDA captured once as a graph for batches of `size` row numbers, and replayed: the host then launches
    one thing a batch instead of hundreds. Other batches, and devices without graphs, take the step as it is."""
    EAGER = 3                                             # steps before the capture, so that all memory is there

    def __init__(self, step, size, device):
        self.step, self.graph, self.taken = step, None, 0
        self.rows = torch.empty(size, dtype=torch.long, device=device)
        self.capturable = device.type == "cuda"

    def __call__(self, rows):
        if not self.capturable or len(rows) != len(self.rows):
            return self.step(rows)
        self.rows.copy_(rows)
        if self.taken < self.EAGER:
            self.taken += 1
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                self.step(self.rows)
            torch.cuda.current_stream().wait_stream(beside)
            return
        if not self.graph:
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.step(self.rows)
                self.graph = graph
            except RuntimeError as wrong:
                print(f"the training step cannot be captured as a CUDA graph, it is launched anew each time: {wrong}",
                      file=sys.stderr)
                self.capturable = False
                return self.step(rows)
        self.graph.replay()


def random_states(device, restored=None):
    """The states of the default generators, the CPU's and CUDA's; restored puts earlier ones back."""
    if restored:
        torch.set_rng_state(restored[0].cpu())
        if device.type == "cuda":
            torch.cuda.set_rng_state(restored[1].cpu(), device)
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


# ------------------------------------------------------------------------------- fit of deep models, by many processes

def fit_together(Model, settings, data, train):
    """Train one `Model` per setting on its data, one after another, each by all of torchrun's processes together; models in
    the order of the settings, None where training diverged. What is finished is read from its run's folder instead.

    train(model, f, data, training) is the script's own loop over the batches of a `Training`; it returns the model to
    evaluate. Files and checkpoints are as of `fit`; the first process writes them.
    """
    print(f"device: {device_name(device_of(settings[0]))}", file=sys.stderr)
    models, first = [], processes()[0] == 0
    if first:
        lock([run_dir(f, d) for f, d in zip(settings, data)])
    meet()
    for f, d in zip(settings, data):
        finished, training = None if f.overwrite else read_trained(Model, f, d), Training(f, d)
        meet()                                            # all have looked before the first process changes anything
        if finished:
            models.append(finished[0])
            if first:
                take_over(*finished, f, d)
        else:
            like = d.train[0]
            use_precision(f)
            with seeded(f.seed, "noise", like.device), held_signals() as training.came, training.noise_of_all():
                model = train(build(Model, f, d), on_device(f, like), d, training)
            models.append(None if training.diverged else model.eval())
            if first:
                leave(models[-1], training.summary(), f, d)
        if first:
            training.checkpoint.remove()
        meet()
    return models


class Training:
    """The training of one setting: its batches, its curves, and going on from where a killed run stood."""

    def __init__(self, f, data):
        (self.rank, self.world), self.f, self.images = processes(), f, data.train[0]
        self.rows = self.world * f.batch_size             # of all processes, a step
        if self.rows > len(self.images):
            stop(f, f"--batch_size: got {f.batch_size} for {self.world} process(es), wants at most the "
                    f"{len(self.images):,} training examples in all")
        self.steps = len(self.images) // self.rows * f.num_epochs
        self.checkpoint, self.order = Checkpoint([f], data, processes=self.world), generator(f.seed, "batches", self.images.device)
        self.phases, self.diverged, self.came = self.checkpoint.state or {}, None, []

    def batches(self, phase="", epochs=None, **parts):
        """The batches of all epochs (of --num_epochs if not told otherwise), this process's rows of each; an incomplete last
        one is left out. parts, whatever has a state_dict, go on from the checkpoint, and so do the random numbers. A
        further phase of the training has a name. Raises Interrupted, the checkpoint written, on SIGINT and SIGTERM."""
        f, device, epochs = self.f, self.images.device, epochs or self.f.num_epochs
        now = self.phases.setdefault(phase, {"epoch": 1, "done": 0, "curves": [], "seconds": 0.0, "names": []})
        self.now, self.tally = now, {name: value.to(device) for name, value in now.get("tally", {}).items()}
        if "parts" in now:
            for name, part in parts.items():
                part.load_state_dict(now["parts"][name])
            self.order.set_state(now["order"].cpu())
            random_states(device, now["noise"])
            if now["epoch"] <= epochs:
                print(f"going on in epoch {now['epoch']} of {epochs}, from {self.checkpoint.path}", file=sys.stderr)
        began, start, n = now["seconds"], time.monotonic(), len(self.images) // self.rows * self.rows

        def keep(order):
            now.update(parts={name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}, tally=self.tally,
                       order=order, noise=random_states(device), seconds=began + time.monotonic() - start)

        progress = Progress(f"training {phase}".strip(), n * epochs, "examples", (now["epoch"] - 1) * n + now["done"] * self.rows)
        while now["epoch"] <= epochs and not self.diverged:
            order, note = self.order.get_state(), _progress_note(now["epoch"], epochs, [[[c[0]]] for c in now["curves"]])
            shuffled = torch.randperm(len(self.images), generator=self.order, device=device)[:n].view(-1, self.world, f.batch_size)
            while now["done"] < len(shuffled):
                yield self.images.index_select(0, shuffled[now["done"], self.rank])
                now["done"] += 1
                progress.update((now["epoch"] - 1) * n + now["done"] * self.rows, note)
                if self.came or (self.rank == 0 and self.checkpoint.due(f.checkpoint_seconds)):
                    keep(order)
                    if self.rank == 0:
                        self.checkpoint.write(self.phases)
                if self.came:
                    raise Interrupted(self.came[0])
            self._end_epoch()
        keep(self.order.get_state())
        progress.update(n * epochs, end=True)

    def record(self, loss, terms=None):
        """Note the means of a batch, on the device: its loss (0-d), and of a model's terms the reconstruction and each KL."""
        values = {"loss": loss}
        if terms:
            values |= {"reconstruction": -terms["log_px_z"].mean()} | {
                f"kl{level}": terms[f"kl{level}"].sum(-1).mean() for level in levels(terms)}
        means = torch.stack(list(values.values())).detach().float()
        if not self.tally:
            self.now["names"] = list(values)
            self.tally.update(sums=torch.zeros_like(means), dead=torch.zeros_like(means[:1]), last=means[:1],
                              limit=EXPLODED * (1 + means[:1].abs()))
        alive = means[:1] < self.tally["limit"]           # false for nan, too
        self.tally["sums"] += means
        self.tally["dead"] += ~alive
        self.tally["last"] = torch.where(alive & (self.tally["dead"] == 0), means[:1], self.tally["last"])

    def _end_epoch(self):
        """Means over the epoch and over all processes; none where a loss was not finite or EXPLODED."""
        whole = torch.cat([self.tally["sums"] / self.now["done"], self.tally["dead"], self.tally["last"]])
        if self.world > 1:
            torch.distributed.all_reduce(whole)
            whole /= self.world
        *means, dead, last = whole.tolist()
        if dead:
            self.diverged = {"epoch": self.now["epoch"], "last_finite_loss": last}
        else:
            self.now["curves"].append(means)
        self.tally["sums"].zero_()
        self.now.update(epoch=self.now["epoch"] + 1, done=0)

    @contextlib.contextmanager
    def noise_of_all(self):
        """Within, `normal_like` and `uniform_like` give this process its rows."""
        global _noise_of
        _noise_of = self.rank, self.world
        try:
            yield
        finally:
            _noise_of = 0, 1

    def summary(self):
        """What training.json says: curves by name, None or where it diverged, seconds."""
        return {"curves": {f"{phase} {name}".strip(): [means[k] for means in of["curves"]]
                           for phase, of in self.phases.items() for k, name in enumerate(of["names"])},
                "diverged": self.diverged, "seconds": sum(of["seconds"] for of in self.phases.values()), "side_by_side": 1,
                "processes": self.world}


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


def weight_average(model, f):
    """The exponential average of a model's weights, to be updated after each step; its `module` is what is evaluated."""
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(f.ema))
    return average.requires_grad_(False)


def parallel(model):
    """The model, of torchrun's processes each with the mean of all their gradients."""
    # static_graph: which parameters a step uses is the same in all steps.
    return torch.nn.parallel.DistributedDataParallel(model, static_graph=True) if processes()[1] > 1 else model


def autocast(f):
    """The precision of the networks in training, as --autocast says."""
    cuda = torch.cuda.is_available() and f.device != "cpu"
    return torch.autocast("cuda" if cuda else "cpu", torch.bfloat16, enabled=f.autocast == "bf16")


# ------------------------------------------------------------------------------------- checkpoints, signals and locks

CHECKPOINT_FORMAT = 1


class Checkpoint:
    """Where the training of a group of settings stands, in a file that is whole or absent. `state` is what was written, None
    if there is no file, or one that is not whole, not of these settings, or not of this format, torch, device or script: the
    file is then refused by name."""

    def __init__(self, group, data, **also):
        device = data.train[0].device
        script = Path(inspect.getfile(type(group[0]))).read_bytes()
        self.of = also | {"format": CHECKPOINT_FORMAT, "torch": str(torch.__version__), "device": device_name(device).replace(
            str(device), device.type), "script": hashlib.sha256(script).hexdigest(), "settings": [what(f, data) for f in group]}
        digest = hashlib.sha256(json.dumps(self.of["settings"]).encode()).hexdigest()[:16]
        self.path = run_dir(group[0], data).parent / "checkpoints" / f"{digest}.pt"
        self.state, self.written = self._read(device), time.monotonic()

    def _read(self, device):
        try:
            saved = torch.load(self.path, weights_only=True, map_location=device)
            differ = [name for name in self.of if saved["of"].get(name) != self.of[name]]
            if not differ:
                return saved["state"]
            wrong = "it is of another " + " and ".join(differ)
        except FileNotFoundError:
            return None
        except Exception as error:                        # a broken file has many names
            wrong = f"it is not whole ({type(error).__name__})"
        print(f"checkpoint {self.path} is refused, training starts over: {wrong}", file=sys.stderr)

    def due(self, seconds):
        return time.monotonic() - self.written >= seconds

    def write(self, state):
        write(self.path, lambda file: torch.save({"of": self.of, "state": state}, file))
        self.written = time.monotonic()

    def remove(self):
        self.path.unlink(missing_ok=True)
        remove_unfinished(self.path)
        with contextlib.suppress(OSError):                # others may have theirs there
            self.path.parent.rmdir()


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM; args[0] is its number."""


@contextlib.contextmanager
def held_signals():
    """Let SIGINT and SIGTERM wait: yields the list of those that came, which the body is to look at between steps."""
    came, numbers = [], (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    handlers = [signal.signal(number, lambda number, frame: came.append(number)) for number in numbers]
    try:
        yield came
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)


_lock_files = {}                                          # of this process: closing one gives up all its locks


def lock(folders):
    """Keep other processes from the runs of these folders until `unlock`, after they are done with theirs.

    Each run is a byte, by its name's digest, of out_dir/.lock: one open file, however many runs; locked in one order, so
    that no two processes wait for each other.
    """
    for folder in sorted(folders):
        path = folder.parents[1] / ".lock"
        if path not in _lock_files:
            path.parent.mkdir(parents=True, exist_ok=True)
            _lock_files[path] = open(path, "ab")
        byte = int.from_bytes(hashlib.sha256(str(folder).encode()).digest()[:7], "big")
        try:
            fcntl.lockf(_lock_files[path], fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError as wrong:
            if wrong.errno not in (errno.EACCES, errno.EAGAIN):
                print(f"warning: no locks in {path.parent} ({wrong.strerror}): start no second process with the same runs",
                      file=sys.stderr)
                return
            print(f"waiting for another process that is at {folder}", file=sys.stderr)
            fcntl.lockf(_lock_files[path], fcntl.LOCK_EX, 1, byte)


def unlock():
    while _lock_files:
        _lock_files.popitem()[1].close()


def _progress_note(epoch, epochs, curves):
    """Which epoch it is, and the losses of the one before: "epoch 12/100, loss 235.32 to 250.01, "."""
    losses = [f"{loss:.2f}" for loss in (min(curves[-1][0]), max(curves[-1][0]))] if curves else []
    return f"epoch {epoch}/{epochs}, " + (f"loss {' to '.join(dict.fromkeys(losses))}, " if curves else "")


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

MANY_LEVELS = 2                                           # more have a table of their own
ELBO_DRAWS = 64                                           # draws per example where no log-likelihood is asked for
CHUNK_BYTES = {"cpu": 2**23, "cuda": 2**27}               # of the widest layer: a cache, or a busy GPU


@torch.no_grad()
def evaluate(model, f, data, split="test"):
    """The metrics of a model on the test split (or on "train"), in nats per example, and what they are made of.

    Returns (metrics, examples). metrics: log_px, log p(x) by importance sampling with num_samples draws from q (Burda
    et al. 2016, eq. 8; absent for 0), elbo (at beta 1), reconstruction -E_q[log p(x|z)], and per level kl, AU (units
    with Var_x(E_q[z|x]) > 0.01 of the prior's variance), AU_kl (units with mean KL > 0.01), active_share (share of
    pairs of example and unit with KL > 0.01). examples: numpy arrays, log_px (n,) and unit_kl per level (n, d).
    """
    use_precision(f)
    split = getattr(data, split)
    like, asked = split[0], getattr(f, "num_draws", f.num_samples)    # where num_samples are rows, draws have their own
    draws, width = asked or getattr(model, "elbo_draws", ELBO_DRAWS), max(getattr(model, "widest_layer", 0), *(t[0].numel() for t in split))
    rows = max(1, CHUNK_BYTES[like.device.type] // (width * like.element_size()))      # images x draws at a time
    images, scalars = max(1, rows // draws), on_device(f, like)
    progress, terms = Progress("evaluating", len(like), "examples"), {}
    with seeded(f.seed, "evaluation", like.device):
        for start in range(0, len(like), images):
            here = slice(start, start + images)
            batch = [t[here] for t in split]
            for drawn in range(0, draws, rows):
                S = min(rows, draws - drawn)
                for name, value in model(*batch, scalars, sample_shape=(S,)).items():
                    if name == "log_w":
                        value = value.logsumexp(0)
                    else:                                 # this part of the mean over draws, which a term may lack
                        drawn_from = value.ndim > (2 if name.startswith(("kl", "unit_kl", "mean")) else 1)
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
    if asked:
        log_px = terms["log_w"] - math.log(draws)
        metrics["log_px"], examples["log_px"] = log_px.mean().item(), log_px.numpy()
    if hasattr(model, "exact_log_px"):
        exact = in_double(model, f, split, lambda double, batch, f: double.exact_log_px(*batch, f))
        metrics["exact_log_px"], examples["exact_log_px"] = exact.mean().item(), exact.numpy()
    kls = {f"kl{level}": terms[f"kl{level}"].sum(1).mean().item() for level in levels(terms)}
    reconstruction = -terms["log_px_z"].mean().item()
    metrics |= {"elbo": -reconstruction - sum(kls.values()), "reconstruction": reconstruction} | kls
    metrics |= {name: value.mean().item() for name, value in terms.items()
                if name not in ("log_w", "log_px_z") and not name.startswith(("kl", "unit_kl", "mean"))}
    if len(kls) > MANY_LEVELS:                            # all units together, as a level without a name
        metrics["kl"] = sum(kls.values())
        terms |= {name: torch.cat([terms[f"{name}{level}"] for level in levels(terms)], 1) for name in ("mean", "kl")}
    for level in levels(terms):
        unit_kl = terms.get(f"unit_kl{level}", terms[f"kl{level}"])
        metrics[f"AU{level}"] = (terms[f"mean{level}"].var(0) > 0.01).sum().item()
        metrics[f"AU_kl{level}"] = (unit_kl.mean(0) > 0.01).sum().item()
        metrics[f"active_share{level}"] = (unit_kl > 0.01).double().mean().item()
        examples[f"unit_kl{level}"] = unit_kl.numpy().astype("float32")
    return metrics, examples


@torch.no_grad()
def in_double(model, f, split, work):
    """work(model, batch, f) over all rows of a split, batch by batch, in float64: its (B, ...) joined, on the CPU."""
    double = copy.deepcopy(model).double()
    f = on_device(f, split[0][:0].double())
    return torch.cat([work(double, [t.double() for t in batch], f).cpu()
                      for batch in zip(*(t.split(2048) for t in split))])


@torch.no_grad()
def check(model, f, data, examples):
    """`compare` a trained linear model with its closed form: `predicted(f, data)` gives that, `units(f, data)` the same of
    the model; the loss is the exact mean over the training rows. examples are those of `evaluate`: if it sampled,
    "importance_sampling" has the mean over test examples of (estimated p(x)) / (exact p(x)), which is 1 in expectation,
    its standard error, and what rounding may add: log p(x) is sampled in data's precision."""
    model = copy.deepcopy(model).train()
    loss = in_double(model, f, data.train, lambda double, batch, f: beta_elbo_loss(double(*batch, f), f)).mean().item()
    units = model.cpu().double().units(on_device(f, data.moment[:0]), data)
    theory = compare(model.predicted(f, data), units, loss)
    if "log_px" in examples:
        ratio = np.exp(examples["log_px"] - examples["exact_log_px"])
        rounding = torch.finfo(data.test[0].dtype).eps * np.abs(examples["exact_log_px"]).mean()
        theory["importance_sampling"] = {"mean_ratio": ratio.mean(), "standard_error": ratio.std() / len(ratio)**0.5,
                                         "rounding": rounding}
    return theory


def linear_prediction(model, f, data):
    """What the closed form of a model's linear twin, `linear_optimum(f, data)`, says of each unit, as lists: {name: [...]}.
    None where a weight is 0: no optimum is finite there."""
    weights = {field.name: getattr(f, field.name) for field in dataclasses.fields(f) if field.name.startswith("beta")}
    if not all(weights.values()):
        return None
    if getattr(f, "released_objective", False):           # 2 reconstruction + beta KL: twice the exact one at beta / 2
        f = dataclasses.replace(f, **{name: beta / 2 for name, beta in weights.items()})
    return per_unit(model.linear_optimum(f, data))


def collapse_curve(unit_kl, epsilon, delta=0.05):
    """The share of units that are (epsilon, delta)-collapsed, P_x[KL_i < epsilon] >= 1 - delta (Lucas et al. 2019).

    unit_kl (n, d) in nats, epsilon (m,); returns (m,).
    """
    # A unit is collapsed at epsilon if its k-th smallest KL is below it, k the fewest examples that make 1 - delta.
    k = math.ceil(round(len(unit_kl) * (1 - delta), 9))
    return (np.sort(unit_kl, axis=0)[k - 1][:, None] < epsilon).mean(axis=0)


# ---------------------------------------------------------------------------------------------------------------- files

def write(path, save):
    """Let save(file) write a binary file that appears at path whole or not at all; its folder is made. Raises OSError."""
    path, content = Path(path), io.BytesIO()
    save(content)                                         # torch.save itself would hide that a disk is full
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def remove_unfinished(path):
    """Remove what a process that was killed while it wrote this file left beside it."""
    for beside in path.parent.glob(f".{path.name}.*"):
        beside.unlink(missing_ok=True)


def write_json(path, value):
    write(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def what(f, data):
    """The flags that say what is computed, {name: value}, with the data set that was used (data may be None for a script
    that makes its own); not where or on what."""
    own, shared = own_and_shared(f)
    flags = {name: getattr(f, name) for name in own | shared if name not in WHERE_FLAGS}
    return flags | ({"dataset": data.name} if data and "dataset" in flags else {})


def run_name(f, data):
    """What names a run: its `changed` flags spelled out; "default" if there are none."""
    return spell(changed(f, data)) or "default"


def changed(f, data):
    """The flags of `what` that are not at their default, where MNIST counts as the default data set."""
    defaults = what(type(f)(), data) | ({"dataset": "mnist"} if data else {})
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
    return {"script": script_name(f), "settings": what(f, data), "dataset": data.name if data else "synthetic",
            "device": device_name(device_of(f)), "versions": versions}


def read_result(f, data, name, folder=None):
    """The contents of a finished run's file, or None if there is none of these very settings. In the folder of another run
    flags of the evaluation may differ."""
    try:
        result = json.loads(((folder or run_dir(f, data)) / name).read_text())
    except (OSError, ValueError):
        return None
    settings, wanted = result.get("settings"), what(f, data)
    if not settings:
        return None
    settings = what(type(f)(), data) | settings           # those of an earlier version may lack a flag that is new
    if folder:
        settings |= {field.name: wanted[field.name] for field in dataclasses.fields(f) if field.metadata["evaluation"]}
    return result if settings == wanted else None


# --------------------------------------------------------------------------------------------------- report: the table

def report(models, settings, data, counterpart=None):
    """Evaluate what is not evaluated yet, leave each run's files, draw the grid's pictures and print the table.

    counterpart is the script to compare with: where it has a run of the same flags, the collapse curves of both are drawn
    on one picture. Returns the exit status: 1 if a setting diverged, else 0.
    """
    for i in share(settings):
        model, f, d = models[i], settings[i], data[i]
        folder, result = run_dir(f, d), read_result(f, d, "result.json")
        if result is None:
            training = read_result(f, d, "training.json")
            result = describe(f, d) | {name: training[name] for name in ("diverged", "side_by_side", "curves")}
            result |= {"seconds": {"train": training["seconds"]}, "metrics": None}
            if model is not None:
                start = time.monotonic()
                result["parameters"] = sum(p.numel() for p in model.parameters())
                result["metrics"], examples = evaluate(model, f, d)
                if d.also_train:
                    result["metrics"] |= {f"{name}_train": value for name, value in evaluate(model, f, d, "train")[0].items()}
                if hasattr(model, "linear_optimum"):
                    result["linear"] = linear_prediction(model, f, d)
                if hasattr(model, "predicted"):
                    result["theory"] = check(model, f, d, examples)
                result["seconds"]["evaluate"] = time.monotonic() - start
                write(folder / "units.npz", lambda file: np.savez_compressed(file, **examples))
                draw_run(folder, model, f, d, training["curves"], examples)
            write_json(folder / "result.json", result)
        print(f"files: {folder}", file=sys.stderr)
        of_both = {script: Path(f.out_dir, script, folder.name, "units.npz") for script in (folder.parent.name, counterpart)
                   if script}
        if counterpart and all(path.exists() for path in of_both.values()):
            draw_collapse(folder / "collapse_beside.png", {script: np.load(path) for script, path in of_both.items()},
                          caption_of([f], [d]).partition(" on ")[2] + f" seed={f.seed}")
    unlock()
    meet()                                                # the first process shows what all have done
    if processes()[0] > 0:
        return 0
    results = [read_result(f, d, "result.json") for f, d in zip(settings, data)]
    draw_grid(models, settings, data)
    print_table(results, settings, data)
    print_theory(results, settings, data)
    print_linear(results, settings, data)
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
    measured = next((result["metrics"] for result in results if result["metrics"]), {})
    by_level = [name for name in levels(measured)[::-1] if name]     # the top first
    by_level = by_level if len(by_level) > MANY_LEVELS else []
    metrics = [name for name in measured if not any(name.endswith(level) for level in by_level)]
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
    train, test = (" to ".join(f"{n:,}" for n in sorted({min(counts), max(counts)})) for counts in zip(
        *((len(d.train[0]), len(d.test[0])) for d in data)))
    print(f"\n{caption_of(settings, data)}: {train} training and {test} test examples, "
          f"{device_name(data[0].train[0].device)}, nats per test example, "
          f"{f'seed {settings[0].seed}' if seeds == 1 else f'mean ± std over {seeds} seeds'}")
    print_rows(table)
    print("".join(f"{note}\n" for note in notes), end="")
    if by_level:
        kinds = ("kl", "AU", "AU_kl", "active_share")
        table = [flags + ["level", *kinds]]
        for key, repeats in rows.items():
            finished = [m for m in repeats if m]
            for level in by_level if finished else []:
                table.append([*key, level[1:], *(_cell([m[name + level] for m in finished], len(repeats)) for name in kinds)])
        print()
        print_rows(table)


def print_rows(rows):
    """Rows of text in columns, each as wide as its widest cell, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip())


def _cell(values, repeats):
    """A metric's text: a count as it is, a number with two decimals; over seeds mean ± standard deviation."""
    if repeats == 1:
        return f"{values[0]:.2f}" if isinstance(values[0], float) else str(values[0])
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}" + (f" ({len(values)} of {repeats})" if len(values) < repeats else "")


# ------------------------------------------------------------------------------- trained (or found) beside predicted

def print_units(theory, found):
    """A table a level: each unit's theta, what the closed form predicts and what was found ("trained"), its state."""
    predicted, of_model = theory["predicted"], theory["trained"]
    for level in theory_levels(theory["predicted"]):
        names = [name for name in ("lambda", "omega", "sigma", "kl") if f"{name}{level}" in of_model]
        theta = predicted["theta"] + [0.0] * len(predicted[f"kl{level}"])
        rows = [["unit", "theta", *(word for name in names for word in (f"{name}{level}", found)), "collapses at", "state"]]
        for i, information in enumerate(predicted[f"information{level}"]):
            numbers = [values[f"{name}{level}"][i] for name in names for values in (predicted, of_model)]
            state = "active" if information > 0 else "collapsed"
            if (of_model[f"information{level}"][i] > ACTIVE) != (information > ACTIVE):
                state += f" but {found} is not"
            at = predicted[f"collapse{level}"][i]
            rows.append([str(i + 1), *(f"{value:.4f}" for value in (theta[i], *numbers)),
                         "never" if at is None else f"{at:.4g}", state])
        print()
        print_rows(rows)


ACTIVE = 0.01                                             # nats of information that make a unit active


def theory_levels(predicted):
    """The levels of a closed form's units: [""], or ["_1", "_2"]."""
    return sorted(name.removeprefix("information") for name in predicted if name.startswith("information"))


def active_units(theory, of="predicted"):
    """How many units of each level are active, of those predicted or of those trained: {"_1": 5, "_2": 3}."""
    return {level: sum(value > ACTIVE for value in theory[of][f"information{level}"]) for level in theory_levels(theory["predicted"])}


def print_theory(results, settings, data):
    """What the closed form predicts of each setting beside what was trained, if there is one, and where they differ."""
    results = [result for result in results if result.get("theory")]
    if not results:
        return
    if len(settings) == 1:
        print_units(results[0]["theory"], "trained")
        print("".join(f"{note}\n" for note in notes(results[0]["theory"])), end="")
    flags, rows, differ = list(varying(settings, data)), [], []
    seeds = ["seed"] if len({f.seed for f in settings}) > 1 else []
    for result in results:
        theory, key = result["theory"], {name: str(result["settings"][name]) for name in flags + seeds}
        of = active_units(theory, "trained")
        row = key | {f"active{level}": f"{count} ({of[level]})" for level, count in active_units(theory).items()}
        row |= {"singular values": f"{singular_value_error(theory):.2%}", "optimal loss": f"{theory['optimal_loss']:.4f}",
                "trained": f"{theory['loss']:.4f}", "gap": f"{theory['gap']:.4f}"}
        if "importance_sampling" in theory:
            row["sampled / exact p"] = "{mean_ratio:.6f} ± {standard_error:.0e}".format(**theory["importance_sampling"])
        rows.append(row)
        differ += [f"{spell(key) + ': ' if key else ''}{what}" for what in disagreements(theory)]
    print("\npredicted (trained): active units; largest error of a singular value over the largest predicted one; nats per "
          "training example")
    print_rows([list(rows[0]), *(list(row.values()) for row in rows)])
    print("\n".join(f"DIFFERS {line}" for line in differ) or "trained as predicted")


def print_linear(results, settings, data):
    """What the closed form of the linear twin predicts of each setting beside what was trained, and, where there are
    settings enough, how far the two order them alike."""
    results = [result for result in results if closed_form(result)]
    flags = list(varying(settings, data)) + (["seed"] if len({f.seed for f in settings}) > 1 else [])
    rows = []
    for result in results if results and "linear" in results[0] else []:
        row = {name: str(result["settings"][name]) for name in flags}
        for metric, predicted, trained in beside_linear(result):
            word = metric.replace("AU_kl", "AU")          # the same units are predicted active for both
            row |= {f"linear {word}": _cell([predicted], 1), metric: _cell([trained], 1)}
        rows.append(row)
    if rows:
        print("\nlinear: what the closed form of the linear model predicts from the same training data, beside what was trained")
        print_rows([list(rows[0]), *(list(row.values()) for row in rows)])
    if len(results) > 2:
        print(f"rank correlation of predicted and trained over {len(results)} settings: "
              + ", ".join(f"{metric} {correlation:.2f}" for metric, correlation in linear_correlations(results).items()))


def closed_form(result):
    """What a closed form says of the units of a result's model, or of its linear twin, as lists; None if none does."""
    if not result["metrics"]:
        return None
    return result["theory"]["predicted"] if "theory" in result else result.get("linear")


def beside_linear(result):
    """[(metric, what the closed form predicts, what was trained)], of each level kl, AU and AU_kl. Predicted active is
    what has more than ACTIVE nats of information."""
    predicted, metrics = closed_form(result), result["metrics"]
    for level in theory_levels(predicted):
        active = sum(information > ACTIVE for information in predicted[f"information{level}"])
        yield f"kl{level}", sum(predicted[f"kl{level}"]), metrics[f"kl{level}"]
        yield f"AU{level}", active, metrics[f"AU{level}"]
        yield f"AU_kl{level}", active, metrics[f"AU_kl{level}"]


def linear_correlations(results):
    """{metric: Spearman's rank correlation of predicted and trained over results}, nan where one of them is constant."""
    correlations = {}
    for triples in zip(*map(beside_linear, results)):
        ranks = []
        for values in (np.round([triple[k] for triple in triples], 2) for k in (1, 2)):        # as they are printed
            below, same = values[:, None] > values, values[:, None] == values
            ranks.append(below.sum(1) + same.sum(1) / 2)  # ties share their mean rank
        constant = any(np.ptp(of) == 0 for of in ranks)
        correlations[triples[0][0]] = math.nan if constant else np.corrcoef(*ranks)[0, 1]
    return correlations


def singular_value_error(theory):
    """The largest |trained - predicted| singular value, lambda or omega of any level, over the largest predicted one."""
    names = [name for name in theory["errors"] if name.startswith(("lambda", "omega"))]
    largest, error = max(max(theory["predicted"][name]) for name in names), max(theory["errors"][name] for name in names)
    return error / largest if largest else error


def disagreements(theory):
    """In which ways a trained model is not what the closed form predicts, in words."""
    if singular_value_error(theory) > 0.02:
        yield f"a singular value is off by {singular_value_error(theory):.1%} of the largest, wants at most 2 %"
    if not -1e-6 < theory["gap"] < 0.05:
        yield f"the loss is {theory['gap']:.3f} nats above the optimal one, wants 0 to 0.05"
    for level in theory_levels(theory["predicted"]):
        pairs = zip(theory["predicted"][f"information{level}"], theory["trained"][f"information{level}"])
        wrong = [i + 1 for i, (predicted, trained) in enumerate(pairs)       # units near their threshold aside
                 if (predicted > ACTIVE) != (trained > ACTIVE) and not 0 < predicted < 2 * ACTIVE]
        if wrong:
            yield f"units {', '.join(map(str, wrong))} of z{level.removeprefix('_')} are not as active as predicted"
    sampling = theory.get("importance_sampling")
    if sampling and abs(sampling["mean_ratio"] - 1) > 3 * sampling["standard_error"] + sampling["rounding"]:
        yield (f"sampled p(x) is {sampling['mean_ratio']:.4f} of the exact one, more than three standard errors off: too few "
               "draws for a q that is narrower than the posterior")


STARTS, TOLERANCE = 8, 1e-6                               # of the checks of theorems


def verify(Problem, settings):
    """Check a theorem on synthetic data, setting by setting: minimise the exact expected loss from several random starts,
    print what was found beside what is predicted, and VERIFIED or FAILED. Returns the exit status, 0 or 1.

    Problem(f) has start(draw), random parameters {name: float64 tensor} where draw(*shape) draws; loss(parameters),
    0-d; predicted(), one of the closed forms; units(parameters), the same quantities of these.
    """
    if processes()[0] > 0:
        return 0                                          # one process is enough
    print(f"device: {device_name(device_of(settings[0]))}", file=sys.stderr)
    rows, worst, flags = [], 0.0, varying(settings, [None] * len(settings))
    for f in settings:
        began, problem, there = time.monotonic(), Problem(f), device_of(f)
        random, moved = generator(f.seed, "init"), copy.copy(problem)
        for name, value in vars(problem).items():
            setattr(moved, name, value.to(there) if torch.is_tensor(value) else value)
        with there:
            found = minimise(moved.loss, [problem.start(lambda *shape: 0.5 * torch.randn(
                shape, dtype=torch.float64, generator=random, device="cpu").to(there)) for _ in range(STARTS)])
        parameters = {name: value.cpu() for name, value in found[0][0].items()}
        theory = compare(problem.predicted(), problem.units(parameters), found[0][1])
        error = float(np.max([*theory["errors"].values(), abs(theory["gap"])]))        # nan if one of them is
        worst = float(np.max([worst, error]))
        write_json(run_dir(f, None) / "result.json", describe(f, None) | {
            "seconds": {"minimise": time.monotonic() - began}, "max_error": error, "theory": theory})
        row = {name: str(getattr(f, name)) for name in (*flags, "seed")}
        for level in theory_levels(theory["predicted"]):
            active = [information > 0 for information in theory["predicted"][f"information{level}"]]
            row |= {f"active{level}": str(sum(active)), f"collapsed{level}": str(len(active) - sum(active))}
        rows.append(row | {"optimal loss": f"{theory['optimal_loss']:.6f}", "found": f"{theory['loss']:.6f}",
                           "max error": f"{error:.1e}"})
        if len(settings) > 1:
            print(f"{len(rows)} of {len(settings)} settings", file=sys.stderr)
    shared = {name: value for name, value in changed(f, None).items() if name not in (*flags, "seed")}
    print(f"{script_name(f)} {spell(shared)}: {f.num_samples:,} rows, nats per row")
    if len(settings) == 1:
        print_units(theory, "found")
        for note in notes(theory):
            print(note)
        print(f"\n{sum(loss - found[0][1] < 1e-6 for _, loss in found)} of {STARTS} random starts end at the least loss")
    columns = max(rows, key=len)
    print_rows([list(columns), *([row.get(name, "-") for name in columns] for row in rows)])
    print(f"{'VERIFIED' if worst <= TOLERANCE else 'FAILED'} max error {worst:.1e}")
    return int(not worst <= TOLERANCE)


def notes(theory):
    """What of the predicted optimum is not unique, or surprises, in sentences."""
    predicted, theta = theory["predicted"], theory["predicted"]["theta"]
    said = [f"units {i + 1} and {i + 2} have the same theta: each may describe any mixture of their modes"
            for i in range(len(theta) - 1) if theta[i] > 0 and theta[i] - theta[i + 1] < 1e-9 * theta[0]]
    if theta[-1] == 0:
        said.append(f"theta is 0 from unit {theta.index(0.0) + 1} on: the data has no more modes")
    if "lambda_1" in predicted and any(a == 0 < b for a, b in zip(predicted["lambda_1"], predicted["omega_2"])):
        said.append("where lambda_1 = 0 < omega_2, z2 describes nothing but the noise of z1")
    return said


# ------------------------------------------------------------------------------------------------------------- pictures

EPSILON = np.geomspace(1e-4, 1e2, 241)                    # of collapse curves, in nats


def save_figure(path, columns, rows, width, height, caption, draw):
    """A picture of rows x columns axes of so many inches each, drawn by draw(axes), without a display. The caption's lines
    break between flags, too."""
    from matplotlib.figure import Figure
    lines = textwrap.wrap(re.sub(r",(?=\w+=)", ", ", caption), int(13 * columns * width))     # characters of 8 points to an inch
    figure = Figure(figsize=(columns * width, rows * height + 0.15 * len(lines)), layout="constrained")
    draw(figure.subplots(rows, columns, squeeze=False))
    figure.supxlabel("\n".join(lines), fontsize=8)
    write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def draw_run(folder, model, f, data, curves, examples):
    """The pictures of one run: collapse.png, training.png and, of images, reconstructions.png and samples.png."""
    caption = f"{caption_of([f], [data])} seed={f.seed}"
    draw_collapse(folder / "collapse.png", {"": examples}, caption)

    def draw_curve(ax, name, curve):
        ax.plot(range(1, len(curve) + 1), curve)
        ax.set(title=name, xlabel="epoch", ylabel="nats per training example")
    draw_panels(folder / "training.png", curves, 3.4, 3, caption, draw_curve)

    def draw_images(ax, title, images):
        _show(ax, images, 10, title)
    if hasattr(model, "reconstructions"):
        with seeded(f.seed, "evaluation", data.test[0].device):            # some are drawn
            images = reconstructions(model, f, data, 100)
        draw_panels(folder / "reconstructions.png", images, 4.2, 4.7, caption, draw_images)
    if hasattr(model, "samples"):
        with torch.no_grad(), seeded(f.seed, "samples", data.test[0].device):
            images = model.samples(100, on_device(f, data.test[0]))
        images = images if isinstance(images, dict) else {"samples from the prior": images}
        draw_panels(folder / "samples.png", images, 4.2, 4.7, caption, draw_images)


def draw_panels(path, panels, width, height, caption, draw):
    """A picture of panels {title: what is in it}, each drawn by draw(ax, title, what), at most five in a row."""
    columns = min(5, len(panels))

    def draw_all(axes):
        for ax, (title, what) in itertools.zip_longest(axes.flat, panels.items(), fillvalue=(None, None)):
            draw(ax, title, what) if title is not None else ax.axis("off")
    save_figure(path, columns, math.ceil(len(panels) / columns), width, height, caption, draw_all)


@torch.no_grad()
def reconstructions(model, f, data, count):
    """{caption: images (n, 784)} of count or so test examples, as many of each class, class by class."""
    classes = data.test_labels.unique()[:count]
    rows = torch.cat([(data.test_labels == c).nonzero()[:max(1, count // len(classes)), 0] for c in classes])
    return model.reconstructions(*(t[rows] for t in data.test), on_device(f, data.test[0]))


def _show(ax, images, columns, title, **font):
    """Images (n, 784) or (n, C, H, W) as one, in so many columns."""
    from torchvision.utils import make_grid
    images = images.detach().view(-1, 1, 28, 28) if images.ndim == 2 else images.detach()
    tiles = make_grid(images.float().clamp(0, 1).cpu(), columns, padding=1, pad_value=0.4)
    ax.imshow(tiles.permute(1, 2, 0).numpy(), vmin=0, vmax=1)
    ax.set_title(title, **font)
    ax.axis("off")


def draw_collapse(path, runs, caption):
    """Collapse curves, a panel a level, a line a run: runs is {label: {"unit_kl" of each level: (n, d)}}."""
    kls = [name for name in next(iter(runs.values())) if name.startswith("unit_kl")]

    def draw(ax, title, kl):
        plot_collapse(ax, runs, kl)
        ax.set(title=title)
    draw_panels(path, {"units of z" + kl.removeprefix("unit_kl").removeprefix("_"): kl for kl in kls}, 4.6, 3.6, caption, draw)


def plot_collapse(ax, runs, kl):
    """The collapse curves of one level, a line a run, on axes: runs is {label: {kl: (n, d)}}."""
    from matplotlib import colormaps
    every = math.ceil(len(runs) / 12)                     # run has its label: a legend must not be taller than its axes
    for k, (label, run) in enumerate(runs.items()):
        ax.step(EPSILON, 100 * collapse_curve(run[kl], EPSILON), where="post", label=label if k % every == 0 else None,
                color=colormaps["viridis"](0.8 * k / max(1, len(runs) - 1)), linewidth=1.8,
                linestyle=("-", "--", "-.", ":")[k % 4])
    ax.set(xscale="log", xlabel="ε (nats)", ylabel="collapsed units (%), δ = 0.05", ylim=(-3, 103))
    if len(runs) > 1:
        ax.legend(fontsize=7)


def grid_dir(settings, data):
    """Where the pictures of a grid go: out_dir/<script>/grids/<its flags>."""
    flags = varying(settings, data)
    shared = {name: value for name, value in changed(settings[0], data[0]).items() if name not in flags}
    return run_dir(settings[0], data[0]).parent / "grids" / spell(
        {name: "+".join(map(str, values)) for name, values in flags.items()} | shared)


def draw_grid(models, settings, data):
    """The pictures of a grid: over one flag its collapse curves overlaid; over two a contact sheet of reconstructions
    for each way to reconstruct and a heat map for each metric, rows the first flag, columns the second; and what was
    trained on or against what a closed form predicts.

    Of settings that differ only in the seed the first is drawn; diverged settings are left out.
    """
    flags, cells = varying(settings, data), {}
    for model, f, d in zip(models, settings, data):
        if model is not None:
            cells.setdefault(tuple(what(f, d)[name] for name in flags), (model, f, d))
    if len(flags) not in (1, 2) or not cells:
        return
    folder = grid_dir(settings, data)
    caption = caption_of(settings, data)
    scalars = [field.name for field in dataclasses.fields(settings[0]) if field.metadata["scalar"]]
    dense = all(name in scalars and all(isinstance(value, float) for value in flags[name]) for name in flags)
    exact = all(hasattr(model, "predicted") for model, _, _ in cells.values())
    if exact:
        if len(flags) == 1:
            draw_units_over(folder / "theory.png", flags, cells, dense, caption)
        elif dense:
            draw_active_map(folder / "theory.png", flags, cells, caption)
    results = {key: read_result(f, d, "result.json") for key, (_, f, d) in cells.items()}
    predicted = {key: result for key, result in results.items() if closed_form(result)}
    if predicted and not (exact and dense):               # where theory.png has no line between the settings
        draw_beside_linear(folder / "linear.png", flags, predicted, caption)
    if len(flags) == 1:
        runs = {f"{name} = {value}": np.load(run_dir(f, d) / "units.npz")
                for name in flags for (value,), (_, f, d) in cells.items()}
        draw_collapse(folder / "collapse.png", runs, caption)
    else:
        draw_sheets(folder, flags, cells, caption)
        draw_heat_maps(folder / "metrics.png", flags, cells, caption)
    print(f"files: {folder}", file=sys.stderr)


def draw_units_over(path, flags, cells, dense, caption):
    """Over one flag, a row a level: each unit's information, predicted as a line and trained as dots, and how many units
    are active, predicted as a staircase and trained as dots."""
    [(flag_name, values)] = flags.items()
    theories = {value: read_result(f, d, "result.json")["theory"] for (value,), (_, f, d) in cells.items()}
    levels, (model, f, d) = theory_levels(next(iter(theories.values()))["predicted"]), next(iter(cells.values()))

    def information(of, level):                           # 0 for units that a setting does not have
        rows = [torch.tensor(theory[of][f"information{level}"]) for theory in theories.values()]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    if dense:                                             # between the trained values, too
        x = torch.linspace(min(values), max(values), 600, dtype=torch.float64)
        predicted = model.predicted(dataclasses.replace(f, **{flag_name: x}), d)
    else:
        x, predicted = list(theories), {f"information{level}": information("predicted", level) for level in levels}

    def draw(axes):
        from matplotlib import colormaps
        for row, level in zip(axes, levels):
            lines = predicted[f"information{level}"]
            trained = information("trained", level)
            for i in range(lines.shape[1]):
                color = colormaps["viridis"](0.9 * i / max(1, lines.shape[1] - 1))
                row[0].plot(x, lines[:, i], color=color, linewidth=1, label="predicted" if i == 0 else None,
                            linestyle="-" if dense else ":")
                row[0].plot(list(theories), trained[:, i], ".", color=color, markersize=4,
                            label="trained" if i == 0 else None)
            if dense and flag_name in ("beta", "beta_2"):
                collapse = [at for at in theories[values[0]]["predicted"][f"collapse{level}"]
                            if at is not None and min(values) < at < max(values)]
                row[0].plot(collapse, [0] * len(collapse), "|", color="red", markersize=9,
                            label="predicted collapse" if collapse else None)
            row[1].step(x, (lines > 0).sum(1), where="mid", color="0.5", label="predicted")
            row[1].plot(list(theories), (trained > ACTIVE).sum(1), ".", color="C3", markersize=5, label="trained")
            unit = "z" + level.removeprefix("_")
            row[0].set(xlabel=flag_name, ylabel=f"information of each unit of {unit} (nats)")
            row[1].set(xlabel=flag_name, ylabel=f"active units of {unit}", ylim=(-0.5, lines.shape[1] + 0.5))
            row[0].legend(fontsize=7)
            row[1].legend(fontsize=7)
    save_figure(path, 2, len(levels), 4.8, 3.4, caption, draw)


def draw_beside_linear(path, flags, results, caption):
    """What the closed form of the linear model predicts, across, and what was trained, up: a row a level, KL and active
    units, a point a setting, with their rank correlation over settings."""
    correlations = linear_correlations(list(results.values()))

    def draw(axes):
        for row, level in zip(axes, theory_levels(closed_form(next(iter(results.values()))))):
            for ax, title, metrics in zip(row, ("KL (nats)", "active units"), ([f"kl{level}"], [f"AU{level}", f"AU_kl{level}"])):
                for metric, marker, side in zip(metrics, "ox", ("left", "right")):
                    points = np.array([(predicted, trained) for result in results.values()
                                       for name, predicted, trained in beside_linear(result) if name == metric])
                    ax.plot(*points.T, marker, label=f"{metric}, rank correlation {correlations[metric]:.2f}")
                    for point in np.unique(points, axis=0):
                        here = [", ".join(map(str, key)) for key, of in zip(results, points) if (of == point).all()]
                        ax.annotate("; ".join(here), point, xytext=(5, 5) if side == "left" else (-5, 5), ha=side,
                                    textcoords="offset points", fontsize=7)
                ax.margins(0.1)
                ax.axline((points[0, 0],) * 2, slope=1, color="0.7", linewidth=0.8, zorder=0)      # as predicted
                ax.set(xlabel="predicted of the linear model", ylabel="trained", title=f"z{level.removeprefix('_')}: {title}")
                ax.legend(fontsize=7, title=f"a point a {', '.join(flags)}", title_fontsize=7)
    save_figure(path, 2, len(correlations) // 3, 4.8, 3.8, caption, draw)


def draw_active_map(path, flags, cells, caption):
    """Over two scalar flags, a panel a level: how many units are predicted active as a map, trained ones as numbers on it."""
    (row_flag, row_values), (column_flag, column_values) = flags.items()
    theories = {key: read_result(f, d, "result.json")["theory"] for key, (_, f, d) in cells.items()}
    levels, (model, f, d) = theory_levels(next(iter(theories.values()))["predicted"]), next(iter(cells.values()))
    rows, columns = (np.geomspace(min(values) / 1.3, max(values) * 1.3, 200) for values in (row_values, column_values))
    grid = dict(zip((row_flag, column_flag), torch.tensor(np.meshgrid(rows, columns, indexing="ij")).flatten(1)))
    predicted = model.predicted(dataclasses.replace(f, **grid), d)

    def draw(axes):
        for ax, level in zip(axes[0], levels):
            active = (predicted[f"information{level}"] > 0).sum(1).view(200, 200)
            total = predicted[f"information{level}"].shape[1]
            shown = ax.pcolormesh(columns, rows, active, cmap="viridis", vmin=0, vmax=total, shading="nearest",
                                  rasterized=True)
            for (row, column), theory in theories.items():
                trained, of = active_units(theory, "trained")[level], active_units(theory)[level]
                ax.text(column, row, trained, ha="center", va="center", fontsize=8,
                        color="black" if of > total / 2 else "white", weight="normal" if trained == of else "bold")
            ax.set(xscale="log", yscale="log", xlabel=column_flag, ylabel=row_flag)
            ax.minorticks_off()
            ax.set(xticks=column_values, yticks=row_values, xticklabels=column_values, yticklabels=row_values,
                   title=f"active units of z{level.removeprefix('_')}: predicted, and trained (numbers)")
            ax.figure.colorbar(shown, ax=ax)
    save_figure(path, len(levels), 1, 5.0, 4.0, caption, draw)


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


# ------------------------------------------------------------------------------------ deep models, further measurements

FURTHER = ("compression", "attack")
FURTHER_EXAMPLES = 200                                    # the first test examples
RADII = (0.0, 0.02, 0.05, 0.1, 0.2)                       # of the attack, in pixel values
ATTACK_STEPS = 30


def evaluate_flag():
    """The flag of a script whose model has `reconstruct` and `top_posterior`."""
    return flag("", "further measurements: compression, attack or both, joined by a comma")


def evaluate_further(models, settings, data):
    """What --evaluate asks for: compression.json and .png, attack.json and .png in each run's folder."""
    asked = [word for word in settings[0].evaluate.split(",") if word]
    for model, f, d in zip(models, settings, data):
        for word in asked if processes()[0] == 0 and model is not None else []:
            with seeded(f.seed, "evaluation", d.test[0].device):
                {"compression": compression, "attack": attack}[word](model, on_device(f, d.test[0]), f, d)


def check_further(settings):
    """Ends the program where --evaluate asks for what there is not."""
    for word in settings[0].evaluate.split(","):
        if word and word not in FURTHER:
            stop(settings[0], f"--evaluate: got {word!r}, wants some of {', '.join(FURTHER)}, joined by commas")


@torch.no_grad()
def compression(model, scalars, f, data):
    """Rate and distortion when only the top k levels are sent and the levels below are the means of their priors: bits of KL
    an image, and the mean squared error of a pixel, for k = 0 to all levels. One draw of the latents, FURTHER_EXAMPLES images."""
    x = data.test[0][:FURTHER_EXAMPLES]
    terms = model(x, scalars, sample_shape=(1,))
    kls = [terms[f"kl{level}"].flatten(0, -2).sum(1).mean().item() / math.log(2) for level in levels(terms)[::-1]]     # top first
    images = [model.reconstruct(x, scalars, keep) for keep in range(len(kls) + 1)]
    result = {"bits": np.cumsum([0.0, *kls]).tolist(), "squared_error": [(x - of).square().mean().item() for of in images]}
    write_json(run_dir(f, data) / "compression.json", describe(f, data) | result)
    caption = f"{caption_of([f], [data])} seed={f.seed}, {len(x)} test images"

    def draw(axes):
        axes[0][0].plot(result["bits"], result["squared_error"], "o-")
        labels = {}                                       # one for all that a collapsed level leaves where they were
        for k, (bits, error) in enumerate(zip(result["bits"], result["squared_error"])):
            labels.setdefault((round(bits), round(error, 3)), []).append(str(k))
        for point, ks in labels.items():
            axes[0][0].annotate(", ".join(ks), point, xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes[0][0].set(xlabel="KL of the top k levels (bits per image)", ylabel="mean squared error per pixel", ylim=(0, None))
        _show(axes[0][1], torch.cat([x[:12], *(of[:12] for of in images)]), 12,
              f"test images, then with the top 0 to {len(kls)} levels", fontsize=8)
    save_figure(run_dir(f, data) / "compression.png", 2, 1, 5.0, 4.4, caption, draw)
    print(f"\n{caption}: top levels kept, bits of KL, squared error per pixel")
    print_rows([["levels", "bits", "squared error"], *([str(k), f"{bits:.2f}", f"{error:.4f}"] for k, (bits, error) in enumerate(
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
    write_json(run_dir(f, data) / "attack.json", describe(f, data) | {"levels": count, "rows": rows})
    caption = f"{caption_of([f], [data])} seed={f.seed}, {len(x)} test images, the top {count} learned levels"

    def draw(axes):
        for ax, name, label in zip(axes[0], ("symmetric_kl", "distance"), (
                "symmetric KL of the top latents (nats)", "L2 distance of the reconstructions")):
            for which, word, style in ((name, "attack", "o-"), (f"{name}_random", "random", "s--")):
                ax.plot(RADII, [row[which] for row in rows], style, label=word)
            ax.set(xlabel="radius of the L∞ ball (pixel values)", xticks=RADII, ylabel=label, ylim=(0, None))
            ax.legend(fontsize=7)
        for ax, (title, images) in zip(axes[1:].flat, shown.items()):
            _show(ax, images[:50], 10, title, fontsize=8)
    save_figure(run_dir(f, data) / "attack.png", 2, 3, 4.4, 3.0, caption, draw)
    print(f"\n{caption}: mean symmetric KL (nats) and L2 distance of the reconstructions, attacked and moved at random")
    print_rows([list(rows[0]), *([f"{value:.4g}" for value in row.values()] for row in rows)])


# ----------------------------------------------------------------------------------------------------------------- main

def run(main):
    """Run a script's main and exit with its status; Ctrl-C, SIGTERM and a full disk end with one line."""
    def terminated(number, frame):
        raise Interrupted(number)

    signal.signal(signal.SIGTERM, terminated)
    try:
        status = main()
    except KeyboardInterrupt as interrupt:
        print("\ninterrupted; what was finished stays, and the same command goes on from there", file=sys.stderr)
        status = 128 + next(iter(interrupt.args), signal.SIGINT)
    except (MemoryError, RuntimeError) as wrong:
        if not isinstance(wrong, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(wrong):
            raise
        print("\nnot enough memory for these sizes, or for so many settings side by side", file=sys.stderr)
        status = 1
    except OSError as wrong:
        if wrong.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"\n{wrong.strerror}: {wrong.filename or 'a result'} could not be written; what is whole stays, and the same "
              "command goes on from there when there is room", file=sys.stderr)
        status = 1
    if processes()[1] > 1:                                # torch.distributed's threads may abort a process torn down around them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
