"""The small helpers that every script uses. Scripts import this module before torch and numpy.

There are two reasons for this order. Under an old version of Python, importing torch or another
module of this project would fail with a confusing error, so this module checks the version first.
And importing torch takes seconds. This module makes Ctrl-C during that time print one line instead
of a traceback.

The parts of this file are in the order in which a script meets them: the start of the program,
flags, the command line, the device, random numbers, the objective's scalars, densities, the terms
of a model, progress and tables, and `run`. Data, files, theory, training and evaluation have
modules of their own.
"""
import sys

if sys.version_info < (3, 10):
    sys.exit(
        "This program needs Python 3.10 or later; "
        f"this is Python {sys.version_info[0]}.{sys.version_info[1]}"
    )

import os

# --- The start of the program ---

# Whether `run` is inside a script's main. It then handles Ctrl-C itself.
_main_is_running = False
_previous_excepthook = sys.excepthook


def _excepthook(kind, error, traceback):
    """Print one line for Ctrl-C outside `run`, as during imports. Leave all else to Python."""
    if issubclass(kind, KeyboardInterrupt) and not _main_is_running:
        print("interrupted", file=sys.stderr)
    else:
        _previous_excepthook(kind, error, traceback)


def _prepare_output():
    """Let stdout and stderr accept any text.

    Characters that an encoding lacks are printed as escapes. A stream that is closed or missing is
    replaced by the null device.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


sys.excepthook = _excepthook
_prepare_output()

import contextlib
import dataclasses
import datetime
import decimal
import difflib
import errno
import inspect
import itertools
import math
import optparse
import re
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

import processes

# Validating the arguments of a distribution makes the host wait for the GPU at each density. It
# also fails under torch.vmap, which trains many settings side by side.
torch.distributions.Distribution.set_default_validate_args(False)

# glibc, the C library of most Linux systems, takes large blocks of memory from the system, which
# clears them each time. Once it has freed such a block, it keeps later blocks of up to that size
# and reuses them. Hence this tensor, which is freed at once, makes later tensors cheaper.
torch.empty(31 * 2**20, dtype=torch.uint8)


# --- Flags ---

# The largest value of a whole number whose flag states no upper limit.
MAX_WHOLE = 10**9

# The largest number of settings that one command line may stand for.
MAX_SETTINGS = 10_000


def flag(
    default,
    help,
    low=None,
    above=None,
    high=None,
    choices=None,
    scalar=False,
    vector=False,
    evaluation=False,
    single=False,
    metavar=None,
    word=None,
):
    """A field of a flags class.

    default:       its value if the command line does not set it; it also fixes the flag's type
    help:          its line in --help
    low, high:     the smallest and the largest value allowed
    above:         a number that the value must exceed
    choices:       the texts allowed
    scalar:        whether this is a scalar of the objective; settings that differ in such scalars
                   only are trained side by side, as one batched model
    vector:        whether several numbers joined by "/", one per unit, are allowed, too; the value
                   is then that text
    evaluation:    whether this flag affects the evaluation only; runs that differ in such flags
                   only share their training
    single:        whether a command line gives only one value, either because the flag does not
                   change the result of a setting, or because all settings share one pass over the
                   data
    metavar:       the word for the value in --help, such as FILE
    word:          a word that is allowed in place of a number, such as learned
    """
    if type(default) is int and high is None:
        high = MAX_WHOLE
    metadata = {
        "help": help,
        "low": low,
        "above": above,
        "high": high,
        "choices": choices,
        "scalar": scalar,
        "vector": vector,
        "evaluation": evaluation,
        "single": single,
        "metavar": metavar,
        "word": word,
    }
    return dataclasses.field(default=default, metadata=metadata)


def scalar(default, help, **limits):
    """A `flag` for a scalar of the objective, such as beta, eta or sigma."""
    return flag(default, help, scalar=True, **limits)


class BaseFlags:
    """The base of all flags classes. The class attributes without a type are no flags.

    positional:    words of the usage line before the flags, as in "[name of a table or figure]"
    epilog:        the last paragraph of --help
    data_flags:    the flags that choose data although the flag of this name in other scripts does
                   not change a result, see files.LOCATION_FLAGS
    """

    positional = ""
    data_flags = ()
    epilog = (
        "A value may be a list such as 0.1,0.5,1.0 or a range first:last:step such as 0.1:5.0:0.1, "
        "which includes its last value. Every combination is trained."
    )

    @classmethod
    def expand(cls, argv):
        """The words of a command line as a new list. Subclasses replace presets by their flags."""
        return list(argv)


@dataclasses.dataclass
class RunFlags(BaseFlags):
    """The flags of every experiment."""

    seed: int = flag(0, "seed of all random numbers", low=0)
    device: str = flag(
        "auto",
        "device that computes: cpu, cuda, cuda:1 and so on; auto chooses CUDA if there is a GPU, "
        "and the CPU otherwise",
        metavar="DEVICE",
    )
    out_dir: str = flag("runs", "folder for the results", metavar="FOLDER")


@dataclasses.dataclass
class MatrixFlags(RunFlags):
    """The flags of the scripts that check a theorem on synthetic data."""

    device: str = flag(
        "cpu",
        "device that computes: auto, cpu, cuda, cuda:1 and so on; the matrices are so small that "
        "a GPU is no faster",
        metavar="DEVICE",
    )
    num_samples: int = flag(1000, "number of rows of the synthetic data", low=1)


@dataclasses.dataclass
class FitFlags(RunFlags):
    """The flags of every experiment that trains a model."""

    batch_size: int = flag(128, "number of examples per training step", low=1)
    num_epochs: int = flag(100, "number of passes over the training set", low=1)
    lr: float = flag(1e-3, "learning rate of Adam", above=0)
    lr_schedule: str = flag(
        "constant",
        "how the learning rate changes: constant keeps it, cosine lowers it to 0",
        choices=("constant", "cosine"),
    )
    grad_clip: float = flag(
        0.1, "largest norm of a gradient; larger gradients are scaled down to it", above=0
    )
    matmul: str = flag(
        "float32",
        "precision of matrix products and, on CUDA, of convolutions; where the hardware supports "
        "it, tf32 is faster on CUDA and bf16 is faster on a CPU",
        choices=("float32", "tf32", "bf16"),
    )
    checkpoint_seconds: float = flag(
        60.0, "seconds of training between two checkpoints", low=0, single=True
    )
    overwrite: bool = flag(False, "train finished runs again", single=True)
    columns: str = flag(
        "main",
        "columns of the table on screen; result.json always has all of them",
        choices=("main", "all"),
        single=True,
    )


@dataclasses.dataclass
class TrainFlags(FitFlags):
    """The flags of every experiment that trains on images."""

    num_samples: int = flag(
        1000,
        "number of draws per test example that estimate the log-likelihood; 0 skips it",
        low=0,
        evaluation=True,
    )
    dataset: str = flag(
        "auto",
        "data set of images; auto chooses mnist if it is on disk or can be downloaded, and the "
        "embedded digits otherwise",
        choices=("auto", "mnist", "fashion", "digits"),
    )
    data_dir: str = flag("data", "folder that holds the data sets", metavar="FOLDER")


@dataclasses.dataclass
class LinearFlags(TrainFlags):
    """The flags of the experiments with linear models, which should reach a predicted optimum.

    Hence the learning rate falls to 0, and the gradient clip is never active: clipping noisy
    gradients would bias the point that training reaches.
    """

    lr: float = flag(3e-3, "learning rate of Adam", above=0)
    lr_schedule: str = flag(
        "cosine",
        "how the learning rate changes: constant keeps it, cosine lowers it to 0",
        choices=("constant", "cosine"),
    )
    grad_clip: float = flag(
        100.0, "largest norm of a gradient; larger gradients are scaled down to it", above=0
    )


@dataclasses.dataclass
class RemedyFlags(BaseFlags):
    """The flags of remedies against collapse from the literature, all off by default."""

    beta_warmup: float = flag(
        0.0,
        "number of epochs over which every beta rises from 0 to its value (Bowman et al. 2016, "
        "Sonderby et al. 2016); 0 for no warm-up",
        low=0,
    )
    beta_cycles: int = flag(
        1,
        "number of cycles, in each of which every beta rises anew (Fu et al. 2019); if "
        "--beta_warmup is 0, the rise takes the first half of a cycle",
        low=1,
    )
    free_bits: float = scalar(
        0.0,
        "mean KL, in nats, that each unit has free of cost (Kingma et al. 2016); z1 of an HVAE "
        "has none",
        low=0,
    )


def _class_of(flags):
    """The flags class, given it or one of its instances."""
    return flags if isinstance(flags, type) else type(flags)


def script_name(flags):
    """The name, without ".py", of the script that defines a flags class, or its instance."""
    return Path(inspect.getfile(_class_of(flags))).stem


def stop(flags, message):
    """End the program with one line on stderr and exit status 2, before it trains anything."""
    print(f"{script_name(flags)}.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def inherited_flags(flags):
    """The fields that a flags class, or its instance, has in common with its bases: {name: field}.

    A field that the class only gives another default counts as inherited.
    """
    names = set()
    for base in _class_of(flags).__mro__[1:]:
        names.update(getattr(base, "__dataclass_fields__", ()))
    return {field.name: field for field in dataclasses.fields(flags) if field.name in names}


def own_flags(flags):
    """The fields that only this flags class, or its instance, has: {name: field}."""
    inherited = inherited_flags(flags)
    return {field.name: field for field in dataclasses.fields(flags) if field.name not in inherited}


def all_flags(flags):
    """All fields of a flags class, or its instance, its own ones first: {name: field}."""
    return own_flags(flags) | inherited_flags(flags)


# --- The command line ---


def parse_flags(Flags, argv=None):
    """The settings that a command line stands for: one instance of `Flags` per combination.

    Each value may be a list such as 0.1,0.5,1.0 or a range such as 0.1:5.0:0.1. In the order of
    the settings, the script's own flags vary more slowly than the inherited ones.

    If anything is wrong with argv (by default sys.argv[1:]), with the device or with the output
    folder, the program ends here. It prints one line that names the flag, with exit status 2.
    """
    argv = Flags.expand(sys.argv[1:] if argv is None else argv)
    parser = _build_parser(Flags)
    settings = _read_settings(parser, Flags, argv)

    _check_out_dir(parser, settings[0].out_dir)
    select_device(settings[0])
    return settings


def settings_of(Flags, argv):
    """The settings of a command line as in `parse_flags`, without a look at folder and device."""
    return _read_settings(_build_parser(Flags), Flags, Flags.expand(argv))


def _read_settings(parser, Flags, argv):
    """The settings of a command line whose presets are expanded."""
    fields = all_flags(Flags)
    words = _check_words(parser, fields, argv)
    options, rest = parser.parse_args(words)
    if rest and Flags.positional:
        parser.error(f"{rest[0]!r} follows no flag; names come before all flags")
    if rest:
        parser.error(f"{rest[0]!r} follows no flag; write --flag value")
    return _combine(parser, Flags, _read_values(parser, fields, options))


def _build_parser(Flags):
    """The parser of a script's command line, with the text of its --help."""
    parser = optparse.OptionParser(
        prog=f"{script_name(Flags)}.py",
        usage=" ".join(["%prog", *Flags.positional.split(), "[--flag value] ..."]),
        description=(inspect.getmodule(Flags).__doc__ or "").strip().split("\n\n")[0],
        epilog=Flags.epilog,
    )

    def error(message):
        # optparse itself would print the usage, too.
        parser.exit(2, f"{parser.prog}: error: {message}\n")

    parser.error = error
    own = own_flags(Flags)
    inherited = inherited_flags(Flags)
    _add_options(parser, "This experiment" if inherited else "Flags", own)
    if inherited:
        _add_options(parser, "Every experiment", inherited)
    return parser


def _add_options(parser, title, fields):
    """Add flags to a parser, under a title of their own in --help."""
    group = parser.add_option_group(title)
    for name, field in fields.items():
        group.add_option(f"--{name}", dest=name, metavar=_metavar(field), help=_help(field))


def _metavar(field):
    """The word for a flag's value in --help."""
    if field.metadata["metavar"]:
        return field.metadata["metavar"]
    if field.metadata["choices"]:
        return "|".join(field.metadata["choices"])
    return {int: "NUMBER", float: "NUMBER", bool: "true|false", str: "TEXT"}[type(field.default)]


def _help(field):
    """A flag's line of --help: its meaning, the numbers that it allows, and its default."""
    details = []
    if type(field.default) in (int, float):
        details.append(_allowed(field, state_max_whole=False))
    if type(field.default) is bool:
        details.append(f"default {str(field.default).lower()}")
    elif field.default != "":
        details.append(f"default {field.default}")

    if not details:
        return field.metadata["help"]
    return f"{field.metadata['help']} ({'; '.join(details)})"


def _allowed(field, state_max_whole=True):
    """The values that a flag allows, in words. MAX_WHOLE may be left out as an upper limit."""
    if field.metadata["choices"]:
        return "one of " + ", ".join(field.metadata["choices"])

    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    bounds = _bounds(field, state_max_whole)
    words = f"{kinds[type(field.default)]} {bounds}".strip()
    if field.metadata["vector"]:
        words += ", or one such number per unit, joined by /"
    if field.metadata["word"]:
        words += f", or {field.metadata['word']}"
    return words


def _bounds(field, state_max_whole):
    """The limits of a number in words, such as "from 0 to 9". They may be empty."""
    low, above, high = (field.metadata[name] for name in ("low", "above", "high"))
    if high == MAX_WHOLE and not state_max_whole:
        high = None

    if low is not None and high is not None:
        return f"from {low} to {high}"
    bounds = []
    if low is not None:
        bounds.append(f"of at least {low}")
    if above is not None:
        bounds.append(f"above {above}")
    if high is not None:
        bounds.append(f"of at most {high}" if above is None else f"at most {high}")
    return " and ".join(bounds)


def _check_words(parser, fields, argv):
    """Check that each flag exists and has a value. Returns the words of the command line.

    optparse would accept an abbreviated flag, and take a flag for the value of the one before it.
    A true-or-false flag without a value means true.
    """
    words = []
    for i, word in enumerate(argv):
        name = word[2:].partition("=")[0]
        if not word.startswith("--") or name == "help":
            words.append(word)
            continue

        if name not in fields:
            nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0)[0]
            parser.error(f"--{name}: no such flag; the nearest is --{nearest}")
        no_value_follows = i + 1 == len(argv) or argv[i + 1].startswith("--")
        if no_value_follows and "=" not in word:
            if type(fields[name].default) is not bool:
                parser.error(f"--{name}: got no value, wants {_allowed(fields[name])}")
            word += "=true"
        words.append(word)
    return words


def _read_values(parser, fields, options):
    """The values of each flag, {name: list}, from the texts that optparse has read."""
    values = {}
    for name, field in fields.items():
        text = getattr(options, name)
        if text is None:
            values[name] = [field.default]
            continue
        try:
            values[name] = _parse_values(field, text)
        except ValueError as error:
            part = str(error)
            wanted = _allowed(field)
            if ":" in part and type(field.default) in (int, float):
                wanted = f"first:last:step with first <= last and step > 0, each value {wanted}"
            if isinstance(error, _LongRange):
                wanted += f", and at most {MAX_SETTINGS:,} values"
            parser.error(f"--{name}: got {part!r}, wants {wanted}")
        if field.metadata["single"] and len(values[name]) > 1:
            parser.error(f"--{name}: got {text!r}, wants a single value, {_allowed(field)}")
    return values


class _LongRange(ValueError):
    """A range has more values than a command line may have settings."""


def _parse_values(field, text):
    """All values that a flag's text stands for. Raises ValueError with the part that is wrong."""
    if type(field.default) is str and not field.metadata["choices"]:
        # A text is one value: a path may contain commas and colons.
        return [text]

    values = []
    for part in text.split(","):
        try:
            values.extend(_parse_part(field, part))
        except _LongRange:
            raise _LongRange(part) from None
        except (ValueError, ArithmeticError):
            raise ValueError(part) from None
    # A value that is listed twice counts once.
    return list(dict.fromkeys(values))


def _parse_part(field, part):
    """The values of one part of a list. Raises ValueError or ArithmeticError if it is wrong."""
    if type(field.default) is bool:
        if part.lower() not in ("true", "false"):
            raise ValueError
        return [part.lower() == "true"]
    if type(field.default) is str:
        if part not in field.metadata["choices"]:
            raise ValueError
        return [part]
    if part == field.metadata["word"]:
        return [part]
    if field.metadata["vector"] and "/" in part:
        numbers = [float(_parse_number(field, number)) for number in part.split("/")]
        return ["/".join(str(number) for number in numbers)]
    return _parse_range(field, part)


def _parse_range(field, text):
    """The numbers of first:last:step, of first:last with step 1, or of a single number.

    Decimal arithmetic makes them exact: 0.1:0.5:0.1 contains 0.3, where adding 0.1 repeatedly in
    binary arithmetic gives 0.30000000000000004. Raises ValueError or ArithmeticError.
    """
    parts = text.split(":")
    if len(parts) > 3:
        raise ValueError
    first = _parse_number(field, parts[0])
    last = _parse_number(field, parts[1]) if len(parts) > 1 else first
    step = decimal.Decimal(parts[2]) if len(parts) > 2 else decimal.Decimal(1)
    if not step.is_finite() or step <= 0 or last < first:
        raise ValueError
    kind = type(field.default)
    if kind is int and step != int(step):
        raise ValueError
    if (last - first) / step > MAX_SETTINGS:
        raise _LongRange

    count = int((last - first) / step) + 1
    return [kind(first + i * step) for i in range(count)]


def _parse_number(field, text):
    """The number in a text, exactly. Raises ValueError or ArithmeticError if it is not allowed."""
    value = decimal.Decimal(text)
    if not math.isfinite(float(value)):
        raise ValueError
    if type(field.default) is int and value != int(value):
        raise ValueError

    low, above, high = (field.metadata[name] for name in ("low", "above", "high"))
    if low is not None and value < low:
        raise ValueError
    # As a float, since a tiny positive number rounds to 0 there.
    if above is not None and float(value) <= above:
        raise ValueError
    if high is not None and value > high:
        raise ValueError
    return value


def _combine(parser, Flags, values):
    """One `Flags` instance per combination of the listed values; the last flag varies fastest."""
    count = math.prod(len(choices) for choices in values.values())
    if count > MAX_SETTINGS:
        longest = max(values, key=lambda name: len(values[name]))
        parser.error(
            f"--{longest}: the lists and ranges give {count:,} settings, wants at most "
            f"{MAX_SETTINGS:,}"
        )
    settings = []
    for combination in itertools.product(*values.values()):
        settings.append(Flags(**dict(zip(values, combination))))
    return settings


def _check_out_dir(parser, out_dir):
    """Make the output folder and a file in it, since an error after the training would be late."""
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()
    except (OSError, ValueError) as error:
        # A name with a null character or half of a surrogate pair raises a ValueError.
        reason = getattr(error, "strerror", None) or error
        parser.error(f"--out_dir: got {out_dir!r} ({reason}), wants a folder to write to")


# --- The device ---


def select_device(f):
    """The torch.device that --device stands for.

    Of several processes that torchrun started on this machine, each gets a GPU of its own. The
    device becomes CUDA's current one, and computes with the precision that --matmul asks for. Ends
    the program if there is no such device, or if processes would share one.
    """
    gpus = torch.cuda.device_count()
    if f.device == "auto" and gpus == 0:
        return torch.device("cpu")

    try:
        device = torch.device("cuda" if f.device == "auto" else f.device)
        _check_device_type(f, device, gpus)
        if device == torch.device("cuda"):
            device = torch.device("cuda", processes.local_rank_and_count()[0])
        # An absent device raises here.
        torch.zeros(1, device=device)
    except torch.OutOfMemoryError:
        stop(f, f"--device: got {f.device!r}, which has no free memory; wants another one")
    except (RuntimeError, AssertionError):
        names = ["auto", "cpu"] + [f"cuda:{i}" for i in range(gpus)]
        stop(f, f"--device: got {f.device!r}, wants one of {', '.join(names)} on this computer")

    if device.type == "cuda":
        # CUDA streams belong to the device that is current when they are made.
        torch.cuda.set_device(device)
        set_precision(f)
    return device


def _check_device_type(f, device, gpus):
    """End the program for macOS's GPU, and for more processes than GPUs.

    Raises RuntimeError for other devices that are neither the CPU nor CUDA.
    """
    if device.type == "mps":
        stop(
            f,
            f"--device: got {f.device!r}, but the GPU of macOS is not supported; "
            "give --device cpu or --device auto",
        )
    if device.type not in ("cpu", "cuda"):
        raise RuntimeError

    local_processes = processes.local_rank_and_count()[1]
    usable_gpus = gpus if device.index is None else 1
    if device.type == "cuda" and gpus > 0 and local_processes > usable_gpus:
        stop(
            f,
            f"--device: {local_processes} processes cannot share {usable_gpus} GPU(s); start at "
            "most one process per GPU, or give --device cpu",
        )


def device_name(device):
    """The name of a device: "cpu", or "cuda:0 (NVIDIA H200)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def set_precision(f):
    """Set the precision of matrix products, and of CUDA's convolutions, as --matmul asks for."""
    matmul = getattr(f, "matmul", "float32")
    precision = {"float32": "highest", "tf32": "high", "bf16": "medium"}[matmul]
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"


# --- Random numbers ---

# Each purpose has random numbers of its own. Their order fixes the seeds: append, never insert.
PURPOSES = ("init", "batches", "noise", "evaluation", "samples", "data")


def _derived_seed(seed, purpose):
    """The seed for one purpose. Different purposes have independent seeds, all from --seed."""
    return int(np.random.SeedSequence([seed, PURPOSES.index(purpose)]).generate_state(1)[0])


def generator(seed, purpose, device="cpu"):
    """A new torch.Generator for one purpose."""
    return torch.Generator(device).manual_seed(_derived_seed(seed, purpose))


@contextlib.contextmanager
def seeded(seed, purpose, device):
    """Within this context, the default generators serve one purpose. They are restored after it.

    Initial weights, torch.distributions and dropout draw from the default generators, since they
    take no other.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(_derived_seed(seed, purpose))
        yield


def binarise(x):
    """Draw binary pixels whose means are x, in [0, 1]."""
    return (processes.uniform_like(x) < x).to(x.dtype)


# --- The objective's scalars ---


def vector_values(value):
    """The numbers in the value of a vector flag: a list of one number, or of one per unit."""
    return [float(number) for number in str(value).split("/")]


def objective_scalars(group, like):
    """The objective's scalars of a group of G settings: {flag: (G,) tensor}.

    A vector flag's tensor is (G, d) if one of the settings gives d numbers. The tensors have the
    device and dtype of the tensor `like`.
    """
    scalars = {}
    for field in dataclasses.fields(group[0]):
        if not field.metadata["scalar"]:
            continue
        vectors = [vector_values(getattr(f, field.name)) for f in group]
        width = max(len(vector) for vector in vectors)
        # A single number holds for all units.
        vectors = [vector * (width // len(vector)) for vector in vectors]
        values = torch.tensor(vectors, dtype=like.dtype, device=like.device)
        scalars[field.name] = values[:, 0] if width == 1 else values
    return scalars


def on_device(f, like):
    """The setting as a model's methods take it: the objective's scalars are 0-d tensors.

    The tensor of a vector flag is (d,) if the setting gives d numbers. All tensors have the device
    and dtype of the tensor `like`.
    """
    scalars = {name: values[0] for name, values in objective_scalars([f], like).items()}
    return dataclasses.replace(f, **scalars)


# --- Densities ---


def log_normal(x, mean, std):
    """log N(x; mean, std^2 I) in nats, summed over the last dimension.

    x and mean: (..., d); std: a 0-d tensor. Returns (...).
    """
    squared_error = torch.linalg.vector_norm(x - mean, dim=-1).square()
    return -squared_error / (2 * std**2) - x.shape[-1] / 2 * (2 * math.pi * std**2).log()


def log_normal_linear(x, U, z, std):
    """log N(x; U z, std^2 I) in nats.

    The square ||x - U z||^2 is expanded, so that no tensor has both the draws and the width d of
    the data. x: (B, d); U: (d, k); z: (..., B, k); std: a 0-d tensor. Returns (..., B).
    """
    squared_error = (x**2).sum(-1) - 2 * (z * (x @ U)).sum(-1) + (z @ (U.T @ U) * z).sum(-1)
    return -squared_error / (2 * std**2) - x.shape[-1] / 2 * (2 * math.pi * std**2).log()


def log_normal_affine(x, layer, h, std):
    """log N(x; layer(h), std^2 I) in nats, where layer is an nn.Linear.

    The square is expanded where that needs less arithmetic, namely if there are many draws and d
    exceeds k. x: (B, d); h: (..., B, k); std: a 0-d tensor. Returns (..., B).
    """
    d, k = layer.weight.shape
    if h.shape[:-1].numel() * (d - k) < 4 * d * k:
        return log_normal(x, layer(h), std)
    return log_normal_linear(x - layer.bias, layer.weight, h, std)


def log_normal_low_rank(x, factor, std):
    """log N(x; 0, factor factor^T + std^2 I) in nats.

    x: (B, d); factor: (d, k); std: a 0-d tensor. Returns (B,).
    """
    normal = torch.distributions.LowRankMultivariateNormal(
        torch.zeros_like(x[0]), factor, (std**2).expand(len(factor))
    )
    return normal.log_prob(x)


def std_head(raw, prior_std, start=torch.ones(()), floor=1e-3):
    """A positive standard deviation from a network's output: a softplus with a floor.

    raw: (..., d), the output. prior_std: the prior's standard deviation. Both prior_std and start
    broadcast to (..., d), which is the shape of the result. At raw = 0, where training starts, the
    result is `start` times prior_std. It is never below `floor` times prior_std.
    """
    softplus = torch.nn.functional.softplus(raw + (start * math.log(2)).expm1().log())
    return prior_std * (softplus / math.log(2)).clamp(min=floor)


# --- The terms of a model ---


def free_bits(kl, nats):
    """The KL per example and unit, kl (B, d), with free bits: the first `nats` cost nothing.

    Where a unit's mean over the batch is at most `nats` (a 0-d tensor), `nats` replaces its KL. So
    the mean of the result is max(mean of kl, nats), as in Kingma et al. (2016, arXiv 1606.04934).
    With nats = 0, kl stays as it is.
    """
    return torch.where((kl.mean(0) > nats) | (nats == 0), kl, nats)


def levels(names):
    """The suffixes of the latent levels among the names of a model's terms or metrics.

    They are [""] for {"kl"} and ["_1", "_2"] for {"kl_1", "kl_2"}, in the order of the names.
    """
    return [name[len("kl"):] for name in names if re.fullmatch("kl(_[0-9]+)?", name)]


def batch_means(loss, terms):
    """The means over a batch that training records, in nats: {name: 0-d tensor}.

    They are the loss, given as (B,), and from a model's terms the reconstruction and each level's
    KL, summed over its units.
    """
    means = {"loss": loss.mean(), "reconstruction": -terms["log_px_z"].mean()}
    for level in levels(terms):
        means[f"kl{level}"] = terms[f"kl{level}"].sum(-1).mean()
    return means


# --- Progress and tables ---


class Progress:
    """A line about progress on stderr.

    On a terminal each line replaces the one before. Elsewhere a line is printed every 30 seconds.
    """

    def __init__(self, label, total, unit, already_done=0):
        """total is the amount of work in units such as examples.

        already_done is the part of it that an earlier command did.
        """
        rank, count = processes.rank_and_count()
        self.label = label if count == 1 else f"process {rank}: {label}"
        self.total = total
        self.unit = unit
        self.already_done = already_done
        self.start = time.monotonic()
        self.last_shown = -math.inf
        self.on_terminal = sys.stderr.isatty() and count == 1

    def update(self, done, note="", end=False):
        """Show that `done` of all units are done. A note precedes it, and `end` ends the line."""
        now = time.monotonic()
        interval = 0.2 if self.on_terminal else 30
        if not end and now - self.last_shown < interval:
            return
        self.last_shown = now
        line = self._line(done, note, end, seconds=max(now - self.start, 1e-9))
        if not self.on_terminal:
            print(line, file=sys.stderr, flush=True)
            return
        # A line that wraps could not be replaced by the next one.
        line = line[:shutil.get_terminal_size().columns - 1]
        print(f"\r\033[K{line}", end="\n" if end else "", file=sys.stderr, flush=True)

    def _line(self, done, note, end, seconds):
        rate = (done - self.already_done) / seconds
        elapsed = datetime.timedelta(seconds=round(seconds))
        line = (
            f"{self.label}: {note}{done / self.total:.0%}, {rate:,.0f} {self.unit}/s, "
            f"elapsed {elapsed}"
        )
        if rate and not end:
            left = datetime.timedelta(seconds=round((self.total - done) / rate))
            line += f", remaining {left}"
        return line


def format_metric(value, number_format="{:.2f}"):
    """A metric as text: a number with two decimals, a count or a text as it is."""
    return number_format.format(value) if isinstance(value, float) else str(value)


def format_repeats(values, number_format="{:.2f}"):
    """The values of several seeds as "mean ± standard deviation"; a single one alone.

    A single count is printed without decimals.
    """
    if len(values) > 1:
        mean = number_format.format(np.mean(values))
        deviation = number_format.format(np.std(values, ddof=1))
        return f"{mean} ± {deviation}"
    if isinstance(values[0], float):
        return number_format.format(values[0])
    return str(values[0])


def format_pair(first, second):
    """Two texts that belong together, such as "5 -> 5" for a predicted and a trained value."""
    return f"{first} -> {second}"


def print_table(rows):
    """Print rows of texts in columns, aligned to the right."""
    widths = [max(len(text) for text in column) for column in zip(*rows)]
    for row in rows:
        line = "  ".join(text.rjust(width) for text, width in zip(row, widths))
        print(line.rstrip())


# --- Running a script ---

# The exit status of a program whose output nobody reads, as shells report it: 128 + SIGPIPE.
CLOSED_OUTPUT_STATUS = 141

# Errors of the system that mean that a file could not be written for lack of space.
FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Errors of the system that mean that a folder is where a file should be, or the other way round.
WRONG_KIND_ERRORS = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST)


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM; args[0] is the number of the signal."""


def run(main):
    """Run a script's main, and end the program with the exit status that it returns.

    Ctrl-C, SIGTERM, too little memory and a full disk end it with one line on stderr; a closed
    output ends it without one.
    """
    global _main_is_running
    _prepare_output()
    with _sigterm_interrupts():
        _main_is_running = True
        try:
            status = _status_of(main)
        finally:
            _main_is_running = False
    _discard_broken_output()
    processes.leave(status)


@contextlib.contextmanager
def _sigterm_interrupts():
    """Within this context, SIGTERM raises Interrupted.

    Python lets only its main thread handle signals. In other threads nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number, frame):
        raise Interrupted(number)

    previous_handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        # It is None if the program that embeds Python set it, and then Python cannot restore it.
        if previous_handler is not None:
            signal.signal(signal.SIGTERM, previous_handler)


def _status_of(main):
    """Call main. Returns its exit status, or the one for the error that ended it."""
    try:
        try:
            status = main()
        except SystemExit:
            # Output that cannot be written should be noticed here, not when Python shuts down.
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as interrupt:
        _ignore_sigterm()
        sequel = "and the same command continues from there"
        if "--overwrite" in sys.argv:
            sequel = "but the same command trains it again, because of --overwrite"
        _print_last_line(f"interrupted; finished work is kept, {sequel}")
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    except (MemoryError, RuntimeError) as error:
        message = _explain(error)
        if message is None:
            raise
        _print_last_line(message)
        return 1
    except OSError as error:
        if _is_closed_output(error):
            return CLOSED_OUTPUT_STATUS
        if error.errno in WRONG_KIND_ERRORS and error.filename is not None:
            _print_last_line(
                f"cannot write the results: {error.filename} is in the way ({error.strerror})"
            )
            return 2
        if error.errno not in FULL_DISK_ERRORS:
            raise
        _print_last_line(
            f"{error.strerror}: {error.filename or 'a result'} could not be written; finished "
            "work is kept, and the same command continues from there once there is space"
        )
        return 1


def _ignore_sigterm():
    """Let no second SIGTERM disturb the end of the program."""
    # Outside its main thread Python refuses this, but there SIGTERM raises nothing either.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _explain(error):
    """One line about a MemoryError or RuntimeError that is no fault of the program, else None."""
    if processes.lost_connection(error):
        return (
            "another process has ended; finished work is kept, and the same command continues "
            "from there"
        )
    no_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    # The CPU's allocator raises a plain RuntimeError.
    if no_memory or "can't allocate memory" in str(error):
        return "not enough memory; choose smaller sizes, or fewer settings in one command"
    return None


def _is_closed_output(error):
    """Whether this OSError means that stdout or stderr is closed, as by `| head`."""
    if error.filename is not None:
        return False
    if isinstance(error, BrokenPipeError):
        return True
    # Windows reports a closed pipe as an invalid argument.
    return error.errno == errno.EBADF or (os.name == "nt" and error.errno == errno.EINVAL)


def _print_last_line(message):
    """Print on stderr, below a line of progress, unless stderr is closed."""
    with contextlib.suppress(OSError, ValueError):
        print(f"\n{message}", file=sys.stderr, flush=True)


def _discard_broken_output():
    """Send output that cannot be written to the null device.

    Python flushes stdout and stderr once more when it ends, and would report an error there.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                null_device = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null_device, stream.fileno())
