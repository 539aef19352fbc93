"""The small helpers that every script uses, in the order in which a script meets them: flags and their parsing, the setting as
a model sees it, device and random numbers, densities, progress, rows of a table, `run`. Nothing here knows data, files, theory,
training or evaluation: those have modules of their own.
"""
import contextlib
import dataclasses
import datetime
import decimal
import difflib
import errno
import functools
import inspect
import itertools
import math
import optparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

# Validation would make the host wait for the GPU at every density, and fails under vmap.
torch.distributions.Distribution.set_default_validate_args(False)
# Once glibc has freed a block this large, it keeps smaller ones instead of fetching them cleared from the system each time.
torch.empty(31 * 2**20, dtype=torch.uint8)

MAX_WHOLE = 10**9                                         # of a whole number without a limit of its own


def flag(default, help, low=None, above=None, high=None, choices=None, scalar=False, vector=False, evaluation=False, before=None):
    """A field of a flags dataclass: its default (which fixes its type), its line of --help and its allowed range.

    low and high are inclusive bounds, above an exclusive one. scalar marks a scalar of the objective: settings that differ in
    nothing else are trained side by side as one batched model. A vector may also be several numbers joined by "/", one a unit, and
    is then that text. evaluation marks what training does not know: runs that differ in nothing else share it. before is what
    runs did before there was the flag, where its default is not that.
    """
    if type(default) is int and high is None:
        high = MAX_WHOLE
    return dataclasses.field(default=default, metadata=dict(
        help=help, low=low, above=above, high=high, choices=choices, scalar=scalar, vector=vector, evaluation=evaluation, before=before))


scalar = functools.partial(flag, scalar=True)             # beta, eta, sigma, ...


@dataclasses.dataclass
class RunFlags:
    """The flags of every experiment."""
    seed: int = flag(0, "seed of all random numbers", low=0)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...; auto is CUDA where there is one")
    out_dir: str = flag("runs", "where results go")


@dataclasses.dataclass
class MatrixFlags(RunFlags):
    """The flags of the checks of a theorem on synthetic data."""
    device: str = flag("cpu", "auto, cpu, cuda, ...; matrices this small gain nothing from a GPU")
    num_samples: int = flag(1000, "rows of data", low=1)


@dataclasses.dataclass
class FitFlags(RunFlags):
    """The flags of every experiment that trains."""
    batch_size: int = flag(128, "examples per gradient step", low=1)
    num_epochs: int = flag(100, "passes over the training set", low=1)
    lr: float = flag(1e-3, "Adam's learning rate", above=0)
    lr_schedule: str = flag("constant", "cosine lets the learning rate fall to 0", choices=("constant", "cosine"))
    grad_clip: float = flag(0.1, "largest gradient norm of a setting", above=0)
    matmul: str = flag("float32", "precision of matrix products, on CUDA of convolutions, too: tf32 (CUDA) or bf16 (CPU) where it has them",
                       choices=("float32", "tf32", "bf16"))
    checkpoint_seconds: float = flag(60.0, "seconds of training between checkpoints", low=0)
    overwrite: bool = flag(False, "train again what is finished")


@dataclasses.dataclass
class TrainFlags(FitFlags):
    """The flags of every experiment that trains on images."""
    num_samples: int = flag(1000, "draws per example for the log-likelihood; 0 leaves it out", low=0, evaluation=True)
    dataset: str = flag("auto", "auto is mnist if on disk or to be fetched, else the embedded digits",
                        choices=("auto", "mnist", "fashion", "digits"))
    data_dir: str = flag("data", "where data sets lie, or are put")


@dataclasses.dataclass
class LinearFlags(TrainFlags):
    """The flags of the experiments with linear models, which are to arrive at a predicted optimum: the learning rate falls
    to 0, and a clip that noisy gradients never reach does not bias where they lead."""
    lr: float = flag(3e-3, "Adam's learning rate", above=0)
    lr_schedule: str = flag("cosine", "cosine lets the learning rate fall to 0", choices=("constant", "cosine"))
    grad_clip: float = flag(100.0, "largest gradient norm of a setting", above=0)


@dataclasses.dataclass
class RemedyFlags:
    """The flags of what is said to help against collapse, beside those above; all off."""
    beta_warmup: float = flag(0.0, "epochs over which every beta rises from 0 (Bowman et al. 2016, Sonderby et al. 2016)", low=0)
    beta_cycles: int = flag(1, "how often they rise, for half of each cycle if --beta_warmup is 0 (Fu et al. 2019)", low=1)
    free_bits: float = scalar(0.0, "nats of mean KL that cost a unit nothing, but for an HVAE's z1 (Kingma et al. 2016)", low=0)


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
    fields = {field.name: field for field in dataclasses.fields(cls)}
    return tuple({name: field for name, field in fields.items() if (name in inherited) == of} for of in (False, True))


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


def parse_flags(Flags, argv=None):
    """The settings of a command line: one `Flags` per combination of the listed values (0.1,0.5,1.0, or 0.1:5.0:0.1, the last one
    included), the script's own flags first. Whatever is wrong with argv (default: sys.argv[1:]), with the device or with the
    output folder ends the program here: status 2, one line, the flag named."""
    argv = getattr(Flags, "expanded", list)(sys.argv[1:] if argv is None else argv)
    own, shared = own_and_shared(Flags)
    fields = own | shared
    parser = optparse.OptionParser(
        prog=f"{script_name(Flags)}.py", usage=f"%prog {getattr(Flags, 'before_flags', '')}[--flag value] ...",
        description=(inspect.getmodule(Flags).__doc__ or "").strip().split("\n\n")[0],
        epilog="A value may be a list 0.1,0.5,1.0 or a range 0.1:5.0:0.1 (first:last:step, the last one included): every "
               "combination is trained.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")       # one line, no usage
    groups = [parser.add_option_group(title) for title in (("This experiment", "Every experiment") if shared else ("Flags",))]
    for name, field in fields.items():
        groups[name in shared].add_option(f"--{name}", dest=name, metavar="VALUE", help=(
            f"{field.metadata['help']} ({_wanted(field).removesuffix(f' and at most {MAX_WHOLE}')}; default {field.default})"))

    for i, word in enumerate(argv):
        name = word[2:].partition("=")[0]
        if word.startswith("--") and name not in fields and name != "help":
            parser.error(f"--{name}: no such flag; the nearest is --{difflib.get_close_matches(name, fields, 1, 0)[0]}")
        if word == f"--{name}" != "--help" and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            if not isinstance(fields[name].default, bool):
                parser.error(f"--{name}: got no value, wants {_wanted(fields[name])}")
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


def device_of(f):
    """The torch.device that --device stands for, of torchrun's processes one each; from then on CUDA's current one, with its
    precision as --matmul says. Ends the program if there is none, or if processes would share one."""
    local, on_this_machine = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.device_count()
    if f.device == "auto" and not cuda:
        return torch.device("cpu")
    try:
        device = torch.device("cuda" if f.device == "auto" else f.device)
        shared = 1 if device.index is not None else cuda
        if device.type == "cuda" and cuda and on_this_machine > shared:
            stop(f, f"--device: {on_this_machine} processes for {shared} GPU(s), wants one each, or --device cpu")
        if device == torch.device("cuda"):
            device = torch.device("cuda", local)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        there = ["auto", "cpu"] + [f"cuda:{i}" for i in range(cuda)]
        stop(f, f"--device: got {f.device!r}, there is {', '.join(there)} here")
    if device.type == "cuda":                             # before any stream is made: a stream is its device's
        torch.cuda.set_device(device)
        use_precision(f)
    return device


def device_name(device):
    """What a device is called: "cpu", or "cuda (NVIDIA H200)"."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def use_precision(f):
    """Let matrix products, and CUDA's convolutions, be rounded, or not, as --matmul says."""
    precision = {"tf32": "high", "bf16": "medium"}.get(getattr(f, "matmul", None), "highest")
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"


def processes():
    """(number of this process, how many there are): (0, 1) unless torchrun started several."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def share(settings):
    """The places of the settings that this process is to train: dealt out, first to first, over all processes."""
    return range(processes()[0], len(settings), processes()[1])


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
    """Give the default generators to one purpose, and put them back after: layers' initial weights, torch.distributions and
    dropout take no generator, they draw from the default one."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(_seed_of(seed, purpose))
        yield


_noise_of = (0, 1)                                        # whose rows of the noise are drawn


@contextlib.contextmanager
def noise_of(rank, world):
    """Within, `normal_like` and `uniform_like` draw the noise of this many processes that train one model, and give process
    `rank` its rows, so that together they do what one does with a batch as large as all of theirs."""
    global _noise_of
    _noise_of = rank, world
    try:
        yield
    finally:
        _noise_of = 0, 1


def normal_like(x):
    """Standard normal noise like x (B, ...), see `noise_of`."""
    return _rows_of_noise(torch.randn, x)


def uniform_like(x):
    """Uniform noise in [0, 1) like x (B, ...), see `noise_of`."""
    return _rows_of_noise(torch.rand, x)


def _rows_of_noise(draw, x):
    rank, world = _noise_of
    return draw(world * len(x), *x.shape[1:], dtype=x.dtype, device=x.device)[rank * len(x):][:len(x)]


def binarise(x):
    """A draw of binary pixels whose means are x, in [0, 1]."""
    return (uniform_like(x) < x).to(x.dtype)


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


def std_head(raw, prior_std, start=torch.ones(()), floor=1e-3):
    """A positive standard deviation from a network's free output: a softplus, floored, that is `start` (a 0-d tensor) of the
    prior's at raw = 0, where training starts."""
    softplus = torch.nn.functional.softplus(raw + (start * math.log(2)).expm1().log())
    return prior_std * (softplus / math.log(2)).clamp(min=floor)


def free_bits(kl, nats):
    """kl (B, d), a unit's replaced by `nats` (a 0-d tensor) where its mean over the batch is less: their mean is that of max(mean
    KL, nats): the free bits of Kingma et al. (2016, arXiv 1606.04934). 0 leaves all as they are."""
    return torch.where((kl.mean(0) > nats) | (nats == 0), kl, nats)


def levels(terms):
    """The latent levels among a model's terms: [""] of a one-level model, ["_1", "_2"] of a two-level one."""
    return [name[2:] for name in terms if name == "kl" or name.startswith("kl_")]


class Progress:
    """On a terminal one line that renews itself, elsewhere a line now and then, both on stderr."""

    def __init__(self, what, total, unit, before=0):
        """before of total were done earlier."""
        rank, world = processes()
        self.what = what if world == 1 else f"process {rank}: {what}"
        self.total, self.unit, self.before, self.start, self.shown = total, unit, before, time.monotonic(), -math.inf
        self.terminal = sys.stderr.isatty() and world == 1

    def update(self, done, note="", end=False):
        """done of total units are done; note is whatever else there is to say."""
        now = time.monotonic()
        if not end and now - self.shown < (0.2 if self.terminal else 30):
            return
        self.shown, seconds = now, max(now - self.start, 1e-9)
        rate = (done - self.before) / seconds
        so_far, left = (datetime.timedelta(seconds=round(of)) for of in (seconds, (self.total - done) / rate if rate else 0))
        line = (f"{self.what}: {note}{done / self.total:.0%}, {rate:,.0f} {self.unit}/s, {so_far}"
                + (f", {left} left" if rate and not end else ""))
        if self.terminal:                                 # a line that wraps could not be taken back
            line = f"\r\033[K{line[:shutil.get_terminal_size().columns - 1]}"
        print(line, end="" if self.terminal and not end else "\n", file=sys.stderr, flush=True)


def means(loss, terms):
    """A batch's means of its loss (B,) and of a model's terms, {name: 0-d}: loss, reconstruction and each level's KL, in nats."""
    return {"loss": loss.mean(), "reconstruction": -terms["log_px_z"].mean()} | {
        f"kl{level}": terms[f"kl{level}"].sum(-1).mean() for level in levels(terms)}


def cell(value):
    """A metric's text: a count as it is, a number with two decimals."""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def print_rows(rows):
    """Rows of text in columns, each as wide as its widest cell, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip())


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM; args[0] is its number."""


def run(main):
    """Run a script's main and exit with its status; Ctrl-C, SIGTERM and a full disk end with one line, a closed stdout with none."""
    def terminated(number, frame):
        raise Interrupted(number)

    signal.signal(signal.SIGTERM, terminated)
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)     # a second one changes nothing
        print("\ninterrupted; what was finished stays, and the same command goes on from there", file=sys.stderr)
        status = 128 + next(iter(interrupt.args), signal.SIGINT)
    except (MemoryError, RuntimeError) as wrong:
        if processes()[1] > 1 and re.search("[Cc]onnection (closed|reset)", str(wrong)):
            what = "another process has ended; what was finished stays, and the same command goes on from there"
        elif isinstance(wrong, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(wrong):
            what = "not enough memory for these sizes, or for so many settings side by side"
        else:
            raise
        print(f"\n{what}", file=sys.stderr)
        status = 1
    except BrokenPipeError:                               # whoever read along, as head does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except OSError as wrong:
        if wrong.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"\n{wrong.strerror}: {wrong.filename or 'a result'} could not be written; what is whole stays, and the same "
              "command goes on from there when there is room", file=sys.stderr)
        status = 1
    if processes()[1] > 1:                                # torch.distributed's threads may abort a process torn down around them
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
