"""Evaluation of trained models, the result file of each run, and the tables that a script prints.

`report(runs)` is the last step of every script. It evaluates the models that `training.fit`
returns, writes the files of each run, draws the pictures, and prints the tables. A run is one
setting, a combination of flags, with its trained model.


What a model offers
-------------------
A model is an nn.Module that is built from one setting f, which is an instance of its script's
flags. The shortest script to copy is MNIST_VAE_Relu_nonlearnable_sigma.py.

In the methods below, `batch` is a tuple of tensors with one row per example: (x,) for a VAE, (x, y)
for a CVAE. The scalars of f (beta, eta, sigma: every flag made by `common.scalar`) are 0-d tensors
on the model's device. B is the number of examples, and d is the number of latent units of a level.
sample_shape is (S,) for S draws of the latent variables per example. In training it is (): there is
one draw, and the terms lack the dimension S. Terms are in nats.

Every model has these two methods:

    forward(*batch, f, sample_shape=())
        Returns the terms of the ELBO per example, as a dict:

            log_px_z  (S, B)     log p(x|z) at a draw of z
            kl*       (S, B, d)  the KL term of each latent unit of one level. The name is "kl" for
                                 a model with one level, and "kl_1", "kl_2", ... for several levels.

        In eval mode the dict also has:

            log_w*    (S, B)     the log importance weight, log p(x, z) - log q(z|x). If there are
                                 several names, their draws are independent, and p(x) is the product
                                 of the mean weights of each name.
            mean*     (S, B, d)  E_q[z|x] of each level, in standard deviations of its prior
            unit_kl*  (S, B, d)  the KL divergence of each unit of a level. A model gives it for a
                                 level whose term kl* is not a divergence.

        A term that does not depend on the draw may lack the dimension S. Any further term (S, B)
        becomes a metric, which is its mean over the examples. Its name must not start with "log_w".
        A further term whose name starts with "error" is the standard error of an example's term.
        Its metric is the standard error of the mean over the examples.

    loss(terms, f)
        Returns the negative beta-ELBO (B,), which training minimises.

A model may also have these methods and attributes:

    context_arguments(*batch, f)
        Returns further arguments of forward, {name: value}, which all draws of a batch share. It is
        called only where the log-likelihood is estimated, and by `deep.Compression`.
    reconstructions(*batch, f)
        Returns {caption: images}, each (B, 784) or (B, C, H, W), for pictures.
    samples(n, f)
        Returns n images drawn from the prior, or {caption: images}, for pictures.
    linear_optimum(f, data)
        A static method. Returns the optimum of the model's linear twin on the same data, by
        one of the closed forms of theory.py, or None where no optimum is finite. The scalars of f
        are numbers here.
    predicted(f, data)
        A static method of a linear model. Returns the optimum of this model, by one of the closed
        forms of theory.py. The scalars of f are numbers or tensors of many settings.
    units(f, data)
        Only for a linear model. Returns the quantities of `predicted`, measured on the model's
        weights in float64.
    exact_log_px(*batch, f)
        Only for a linear model. Returns log p(x), (B,).
    residuals(*batch, f, draws)
        Returns {level suffix: residual} with an entry for each level that has a learnable
        posterior. The suffix is "" or "_2", as in "kl_2". The residual is a headroom.Residual for a
        Gaussian target, and a headroom.NaturalResidual for another one. The headroom of the level
        is measured from it. Where an expectation over z has no closed form, it is estimated twice,
        each time by the mean over `draws` draws of z.
    headroom_rows
        The number of training rows from which the headroom is measured, for a model whose rows are
        drawn anew at each visit. Further units are then found on one half of these rows and
        measured on the other half. Other models use all training rows once.
    before_training(f, data)
        A static method. Returns further metrics, {name: number}, that the data determine without
        training. The scalars of f are numbers here.
    widest_layer
        The number of values per example in the widest layer, if that is wider than the data.
    dimensions
        The number of values in an image, if p(x|z) is a probability of discrete values. Adds the
        metric bits_per_dim.
    levels, learned_levels
        The number of levels, and the number of those that are learned, for a model whose top level
        is a context that is computed from x. Titles and captions then name the context.
    elbo_draws
        The number of draws per example where no log-likelihood is estimated.
"""
import dataclasses
import math
import re
import sys
import time
from dataclasses import dataclass

import common
import numpy as np
import torch

import files
import headroom
import pictures
import processes
import theory
import verify

# A model with more levels than this gets one table for all levels together and one per level.
MANY_LEVELS = 2

# Draws of z per example where no log-likelihood is estimated.
ELBO_DRAWS = 16

# Size of the widest layer of one chunk of the evaluation: it fits a CPU's cache or fills a GPU.
CHUNK_BYTES = {"cpu": 2**23, "cuda": 2**30}

# A unit counts for AU if the variance of its mean exceeds this share of its prior's variance.
ACTIVE_VARIANCE = 0.01

# The beginnings and the ends of the names of the metrics that --columns main leaves out.
HIDDEN_BEGINNINGS = ("reconstruction", "AU_kl", "active_share", "error_", "collapsed_")
HIDDEN_ENDS = ("_train",)

# What the tables of levels show of each level, as far as a model has it.
LEVEL_COLUMNS = (
    "kl", "AU", "AU_kl", "active_share", "headroom", "headroom_any", "rho", "rho_any",
)


# ------------------------------------------------------------------------------ the result of a run

@dataclass
class RunResult:
    """The contents of result.json: one setting and its metrics.

    script: the name of the script, without .py.
    settings: the flags that determine the result, {name: value}.
    dataset: the name of the data set.
    device: the name of the device that computed the result.
    versions: those of python, torch and numpy, {name: text}.
    seconds: the seconds for "train", "evaluate" and "headroom". "train" is the time of the whole
        group of settings that were trained side by side.
    diverged: None, or {"epoch": int, "last_finite_loss": float or None}.
    side_by_side: the number of settings that were trained side by side.
    curves: means over each epoch of the training, {name: list}.
    metrics: {name: number}, in nats per test example. None if the setting diverged.
    parameters: the number of parameters of the model.
    linear: the optimum of the model's linear twin, {name: list per unit}.
    theory: a comparison of a linear model with its closed form.
    headroom: {"z" or "z1", "z2" and so on: headroom.LevelHeadroom}. It is empty for a decoder that
        headroom.py does not cover.
    dead_units: {network: [ReLU units that never fire, all ReLU units]}.
    loss_change: the change of the training loss over the last tenth of the epochs, in nats.

    The fields from `parameters` on are None for a model that does not have them. The file then
    leaves them out.
    """

    script: str
    settings: dict
    dataset: str
    device: str
    versions: dict
    seconds: dict
    diverged: dict | None
    side_by_side: int
    curves: dict
    metrics: dict | None
    parameters: int | None = None
    linear: dict | None = None
    theory: verify.Comparison | None = None
    headroom: dict | None = None
    dead_units: dict | None = None
    loss_change: float | None = None

    @classmethod
    def read(cls, f, data):
        """The result of this very setting, or None if its file is missing or not whole.

        A file that is not whole is reported in one line on stderr.
        """
        saved = files.read_matching(f, data, "result.json")
        if saved is None:
            return None
        try:
            result = cls.from_json(saved)
            result.check()
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            path = files.run_dir(f, data) / "result.json"
            print(
                f"{path} is incomplete, so the run is evaluated again ({error!r})", file=sys.stderr
            )
            return None
        return result

    @classmethod
    def from_json(cls, saved):
        """The result from the dict in its file.

        Raises AttributeError, KeyError or TypeError if it is not whole.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        result = cls(**{name: value for name, value in saved.items() if name in names})

        if result.theory is not None:
            result.theory = verify.Comparison(**result.theory)

        if result.headroom is not None:
            levels = {}
            for level, saved_level in result.headroom.items():
                levels[level] = headroom.LevelHeadroom(**saved_level)
            result.headroom = levels
        return result

    def check(self):
        """Raises an error of Python's own classes if a part that tables rely on is wrong."""
        for field in dataclasses.fields(self):
            if not isinstance(getattr(self, field.name), field.type):
                raise TypeError(f"{field.name} is not of the type {field.type}")

        # A setting that diverged has no metrics.
        if self.metrics is None:
            require(self.diverged, ["epoch", "last_finite_loss"])
            return
        require(self.metrics, ["elbo", "reconstruction"])
        for level in common.levels(self.metrics):
            require(self.metrics, [f"AU{level}", f"AU_kl{level}", f"active_share{level}"])
        wrong = not_finite(self.metrics)
        if wrong:
            raise ValueError(f"these metrics are not finite: {', '.join(wrong)}")
        self.check_tables()

    def check_tables(self):
        """Make the cells that tables show of the optional parts. Fails if a part is wrong."""
        if self.headroom:
            verdicts(self)
        if verify.closed_form(self):
            linear_row(self)
        if self.theory is not None:
            theory_row(self.theory)
            self.theory.disagreements()
            self.theory.notes()
            for level in theory.levels_of(self.theory.predicted):
                verify.unit_rows(self.theory, level)

    def to_json(self):
        """The result as the dict that is written to its file."""
        saved = dataclasses.asdict(self)
        for field in dataclasses.fields(self):
            optional = field.default is None
            if optional and saved[field.name] is None:
                del saved[field.name]
        return saved

    def write(self, f, data):
        """Write the result to result.json in the folder of this setting. Raises OSError."""
        files.write_json(files.run_dir(f, data) / "result.json", self.to_json())


def require(values, names):
    """Raises KeyError if one of these names is missing, TypeError if values is None."""
    for name in names:
        if name not in values:
            raise KeyError(name)


@dataclass
class EvaluatedRun:
    """One setting with its model and its result.

    f: the setting.
    data: its data set, a datasets.Data.
    model: the trained model. None if it diverged, or if another process has it.
    result: the RunResult.
    loaded_examples: the values per test example, if this process has them in memory.
    """

    f: object
    data: object
    model: object
    result: RunResult
    loaded_examples: dict | None = None

    @property
    def examples(self):
        """The values per test example, {name: array}: log_px (n,) and unit_kl* (n, d), in nats.

        None if the setting diverged, or if another process evaluated it and its file is not whole.
        """
        if self.result.metrics is None:
            return None
        if self.loaded_examples is None:
            self.loaded_examples = read_examples(files.run_dir(self.f, self.data))
        return self.loaded_examples


def read_examples(folder):
    """The arrays of a run's units.npz, {name: (n, ...)}, or None if it is missing or not whole."""
    try:
        with open(folder / "units.npz", "rb") as file, np.load(file) as arrays:
            examples = {name: arrays[name] for name in arrays.files}
    except Exception:  # A broken archive raises exceptions of a dozen classes.
        return None

    levels = [name for name in examples if name.startswith("unit_kl")]
    if not levels or any(examples[name].ndim != 2 for name in levels):
        return None
    return examples


# --------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(model, f, data, split="test"):
    """The metrics of a model on a split of the data ("test" or "train"), in nats per example.

    Returns (metrics, examples). metrics is {name: number}:

        log_px          log p(x) by importance sampling with --num_samples draws from q (Burda et
                        al. 2016, arXiv 1509.00519, eq. 8); left out for --num_samples 0
        exact_log_px    log p(x) of a linear model
        elbo            the ELBO at beta = 1, also if training had another beta
        reconstruction  -E_q[log p(x|z)]
        kl*             KL term of each level
        AU*             units with Var_x(E_q[z|x]) > 0.01 times the prior's variance (Burda et al.)
        AU_kl*          units with a mean KL above 0.01 nats
        active_share*   share of the pairs of an example and a unit whose KL exceeds 0.01 nats

    examples is {name: array}: log_px and exact_log_px (n,), and unit_kl* of each level (n, d).
    """
    common.set_precision(f)
    inputs = getattr(data, split)

    # A script whose --num_samples counts rows of data has --num_draws for the draws of z.
    num_draws = getattr(f, "num_draws", f.num_samples)
    draws = num_draws or getattr(model, "elbo_draws", ELBO_DRAWS)
    with common.seeded(f.seed, "evaluation", inputs[0].device):
        terms = sample_terms(model, f, inputs, draws, with_context=num_draws > 0)

    metrics = {}
    examples = {}

    # 1. The log-likelihood, estimated and exact.
    if num_draws:
        examples["log_px"] = estimated_log_px(terms, draws)
    if hasattr(model, "exact_log_px"):
        examples["exact_log_px"] = verify.in_float64(
            model, f, inputs, lambda model, batch, f: model.exact_log_px(*batch, f)
        )
    for name, log_px in examples.items():
        metrics[name] = log_px.mean().item()

    # 2. The ELBO and the other terms.
    metrics.update(elbo_metrics(terms))
    metrics.update(further_metrics(terms))
    if getattr(model, "dimensions", 0):
        # Where log p(x) is not estimated, the ELBO takes its place.
        log_px = metrics.get("log_px", metrics["elbo"])
        metrics["bits_per_dim"] = -log_px / (model.dimensions * math.log(2))

    # 3. The units of each level, and of all levels together where there are many.
    levels = common.levels(terms)
    if len(levels) > MANY_LEVELS:
        metrics["kl"] = sum(metrics[f"kl{level}"] for level in levels)
        terms.update(join_levels(terms, levels))
        levels = [*levels, ""]
    for level in levels:
        metrics.update(unit_metrics(terms, level))
        examples[f"unit_kl{level}"] = unit_kl(terms, level).float()

    return metrics, {name: values.numpy() for name, values in examples.items()}


def sample_terms(model, f, inputs, draws, with_context):
    """A model's terms for each example, averaged over draws of z: {name: (n, ...)}.

    They are float64 and on the CPU. inputs is a split of the data, a tuple of tensors (n, ...). The
    examples go through the model in chunks. Where a chunk does not fit into memory, this chunk and
    all later ones are halved.
    """
    like = inputs[0]
    scalars = common.on_device(f, like)
    sizes = [tensor[0].numel() for tensor in inputs]
    width = max([getattr(model, "widest_layer", 0), *sizes])

    # A chunk has at most max_examples examples. The model takes at most max_pairs pairs of an
    # example and a draw at a time.
    max_pairs = max(1, CHUNK_BYTES[like.device.type] // (width * like.element_size()))
    max_examples = max(1, max_pairs // draws)

    progress = common.Progress("evaluating", len(like), "examples")
    terms = {}
    start = 0
    while start < len(like):
        batch = [tensor[start:start + max_examples] for tensor in inputs]
        means = chunk_terms(
            model, batch, scalars, draws=draws, max_pairs=max_pairs, with_context=with_context
        )
        if means is None:
            torch.cuda.empty_cache()
            max_examples = max(1, max_examples // 2)
            max_pairs = max_pairs // 2
            print(
                "not enough memory, so the evaluation continues with "
                f"{min(max_examples * draws, max_pairs):,} draws at a time",
                file=sys.stderr,
            )
            continue

        for name, value in means.items():
            # Memory for all examples is taken at once, since many small tensors would scatter it.
            if name not in terms:
                terms[name] = value.new_empty((len(like), *value.shape[1:]))
            terms[name][start:start + len(value)] = value
        start += len(batch[0])
        progress.update(start)
    progress.update(len(like), end=True)

    return {name: value.double().cpu() for name, value in terms.items()}


def chunk_terms(model, batch, f, draws, max_pairs, with_context):
    """A model's terms for one chunk as in `mean_over_draws`, or None if memory is too small.

    The exception would keep the chunk's tensors alive. After this function they are free, and the
    caller can try a smaller chunk.
    """
    try:
        context = {}
        if with_context and hasattr(model, "context_arguments"):
            context = model.context_arguments(*batch, f)
        return mean_over_draws(
            model, batch, f, draws=draws, max_pairs=max_pairs, context=context
        )
    except torch.OutOfMemoryError:
        # No chunk is smaller than this.
        if max_pairs == 1:
            raise
        return None


def mean_over_draws(model, batch, f, draws, max_pairs, context):
    """A model's terms for a batch, averaged over draws of z: {name: (B, ...)}.

    For log_w* it is the log of the sum over the draws of exp(log_w). At most max_pairs draws are
    taken at a time. context is passed to the model's forward.
    """
    means = {}
    for first_draw in range(0, draws, max_pairs):
        S = min(max_pairs, draws - first_draw)
        terms = model(*batch, f, sample_shape=(S,), **context)
        for name, value in terms.items():
            if name.startswith("log_w"):
                # 1. A weight that does not depend on the draw still counts S times.
                log_sum = value.expand(S, -1).logsumexp(0)
                means[name] = torch.logaddexp(means[name], log_sum) if name in means else log_sum
            else:
                # 2. Other terms: the mean over these draws, weighted by their share of all draws.
                has_draws = value.ndim > (2 if has_units(name) else 1)
                mean = value.mean(0) if has_draws else value
                part = mean * (S / draws)
                means[name] = means[name] + part if name in means else part
    return means


def has_units(name):
    """Whether a term of a model has a number for each unit of a level: kl*, unit_kl* and mean*."""
    return re.fullmatch(r"(kl|unit_kl|mean)(_\d+)?", name) is not None


def estimated_log_px(terms, draws):
    """log p(x) of each example by importance sampling, (n,), from log_w* summed over the draws."""
    log_px = 0
    for name, log_sum in terms.items():
        if name.startswith("log_w"):
            log_px = log_px + (log_sum - math.log(draws))
    return log_px


def elbo_metrics(terms):
    """The ELBO at beta = 1, the reconstruction term, and the KL term of each level, in nats."""
    kls = {}
    for level in common.levels(terms):
        kls[f"kl{level}"] = terms[f"kl{level}"].sum(1).mean().item()
    reconstruction = -terms["log_px_z"].mean().item()
    elbo = -reconstruction - sum(kls.values())
    return {"elbo": elbo, "reconstruction": reconstruction, **kls}


def further_metrics(terms):
    """The mean over examples of each term that only this model has, or its standard error."""
    metrics = {}
    for name, value in terms.items():
        # The errors of different examples are independent.
        if name.startswith("error"):
            metrics[name] = value.square().sum().sqrt().item() / len(value)
        elif name != "log_px_z" and not name.startswith("log_w") and not has_units(name):
            metrics[name] = value.mean().item()
    return metrics


def join_levels(terms, levels):
    """The terms of the units of all levels together, as those of a level whose suffix is ""."""
    return {
        "unit_kl": torch.cat([unit_kl(terms, level) for level in levels], 1),
        "mean": torch.cat([terms[f"mean{level}"] for level in levels], 1),
        "kl": torch.cat([terms[f"kl{level}"] for level in levels], 1),
    }


def unit_kl(terms, level):
    """The KL divergence of each example and unit of a level, (n, d), in nats."""
    return terms.get(f"unit_kl{level}", terms[f"kl{level}"])


def unit_metrics(terms, level):
    """AU, AU_kl and active_share of a level, see `evaluate`."""
    mean = terms[f"mean{level}"]
    kl = unit_kl(terms, level)

    # One example has no variance, so none of its units counts.
    active = 0
    if len(mean) > 1:
        active = (mean.var(0) > ACTIVE_VARIANCE).sum().item()
    return {
        f"AU{level}": active,
        f"AU_kl{level}": (kl.mean(0) > theory.ACTIVE).sum().item(),
        f"active_share{level}": (kl > theory.ACTIVE).double().mean().item(),
    }


def not_finite(metrics):
    """The names of the metrics that are nan or infinite."""
    return [name for name, value in metrics.items() if not math.isfinite(value)]


# ------------------------------------------------------------------------------------------- report

def report(runs, counterpart=None):
    """Evaluate the runs that have no result yet, write their files, draw pictures, print tables.

    runs is the list that training.fit returns. Each process evaluates its share of it. The first
    process then prints all results. counterpart is the name of a script to compare with: where it
    has a run with the same flags, both collapse curves are drawn in one picture.

    Returns the exit status of the first process: 1 if a setting diverged or if the result of
    another process is missing, else 0. The other processes return 0.
    """
    own_runs = {}
    for i in processes.own_indices(len(runs)):
        run = evaluated_run(runs[i])
        own_runs[i] = run
        print(f"files: {files.run_dir(run.f, run.data)}", file=sys.stderr)
        if counterpart:
            draw_beside_counterpart(run, counterpart)

    processes.barrier()
    rank, _ = processes.rank_and_count()
    if rank > 0:
        return 0

    status = 0
    evaluated_runs = []
    for i, run in enumerate(runs):
        evaluated = own_runs[i] if i in own_runs else run_of_another_process(run)
        if evaluated is None:
            status = 1
        else:
            evaluated_runs.append(evaluated)
    if not evaluated_runs:
        return status

    pictures.draw_grid(evaluated_runs)
    print_metrics(evaluated_runs)
    print_verdicts(evaluated_runs)
    print_theory(evaluated_runs)
    print_linear(evaluated_runs)
    if any(run.result.diverged for run in evaluated_runs):
        status = 1
    return status


def evaluated_run(run):
    """A TrainedRun as an EvaluatedRun: read from its files, or evaluated if they are not whole."""
    evaluated = read_run(run)
    if evaluated is not None:
        return evaluated

    result = unevaluated_result(run)
    examples = None
    if run.model is not None:
        examples = measure(run, result)
    evaluated = EvaluatedRun(run.f, run.data, run.model, result, loaded_examples=examples)

    # result.json is written last: where it exists, the other files are complete.
    folder = files.run_dir(run.f, run.data)
    if result.metrics is not None:
        files.write(folder / "units.npz", lambda file: np.savez_compressed(file, **examples))
        pictures.draw_run(evaluated, folder)
    result.write(run.f, run.data)
    return evaluated


def read_run(run):
    """A TrainedRun with the result that is in its folder, or None if its files are not whole."""
    result = RunResult.read(run.f, run.data)
    if result is None:
        return None
    if result.metrics is None:
        return EvaluatedRun(run.f, run.data, None, result)

    folder = files.run_dir(run.f, run.data)
    if not has_all_parts(result, run):
        print(
            f"{folder / 'result.json'} lacks a part, so the run is evaluated again",
            file=sys.stderr,
        )
        return None
    examples = read_examples(folder)
    if not are_examples_of(examples, result, run.data):
        print(
            f"{folder / 'units.npz'} is missing or incomplete, so the run is evaluated again",
            file=sys.stderr,
        )
        return None
    return EvaluatedRun(run.f, run.data, run.model, result, loaded_examples=examples)


def has_all_parts(result, run):
    """Whether a result has every part that its model offers."""
    model = run.model
    if model is None or result.parameters is None:
        return False
    if hasattr(model, "predicted") and result.theory is None:
        return False
    if hasattr(model, "residuals") and (result.headroom is None or result.dead_units is None):
        return False

    # A linear twin without a finite optimum has no closed form.
    if hasattr(model, "linear_optimum") and not result.linear:
        return model.linear_optimum(run.f, run.data) is None
    return True


def are_examples_of(examples, result, data):
    """Whether the arrays of a units.npz are those that belong to this result and data set."""
    if examples is None:
        return False
    names = {f"unit_kl{level}" for level in common.levels(result.metrics)}
    names.update({"log_px", "exact_log_px"} & set(result.metrics))
    if set(examples) != names:
        return False
    return all(len(values) == len(data.test[0]) for values in examples.values())


def unevaluated_result(run):
    """The RunResult of a TrainedRun, with its training but without metrics."""
    diverged = None
    if run.record.diverged is not None:
        diverged = dataclasses.asdict(run.record.diverged)
    return RunResult(
        **files.description(run.f, run.data),
        seconds={"train": run.record.seconds},
        diverged=diverged,
        side_by_side=run.record.side_by_side,
        curves=run.record.curves,
        metrics=None,
    )


def measure(run, result):
    """Evaluate a trained model and fill in its result. Returns the values per test example.

    Where a metric is not finite, the result counts as diverged. None is then returned.
    """
    model, f, data = run.model, run.f, run.data
    result.parameters = sum(parameter.numel() for parameter in model.parameters())

    # 1. The metrics.
    start = time.monotonic()
    metrics, examples = evaluate(model, f, data)
    if data.also_train:
        train_metrics, _ = evaluate(model, f, data, "train")
        for name, value in train_metrics.items():
            metrics[f"{name}_train"] = value
    if not_finite(metrics):
        mark_as_diverged(run, result, metrics)
        return None

    # 2. The closed form of its linear twin, or of the model itself.
    if hasattr(model, "before_training"):
        metrics.update(model.before_training(f, data))
    if hasattr(model, "linear_optimum"):
        optimum = model.linear_optimum(f, data)
        if optimum is not None:
            result.linear = verify.per_unit(optimum)
    if hasattr(model, "predicted"):
        result.theory = verify.check_model(model, f, data, examples)
    result.seconds["evaluate"] = time.monotonic() - start

    # 3. Why units collapsed.
    if hasattr(model, "residuals"):
        start = time.monotonic()
        result.headroom = headroom.measure(model, f, data, metrics=metrics, examples=examples)
        for latent, level in result.headroom.items():
            metrics.update(headroom_metrics(latent, level))
        result.dead_units = headroom.dead_units(model, f, data)
        result.loss_change = headroom.last_change(result.curves["loss"])
        result.seconds["headroom"] = time.monotonic() - start
        if not_finite(metrics):
            mark_as_diverged(run, result, metrics)
            return None

    result.metrics = metrics
    return examples


def headroom_metrics(latent, level):
    """The metrics of one level's headroom, {name: number}. The latent is "z", "z1", "z2" and so on.

    The names end in "_2" for the latent "z2". headroom and headroom_any are the gains with a linear
    encoder and with any encoder. rho and rho_any are the largest eigenvalues of a decoder that is
    not Gaussian.
    """
    number = latent.removeprefix("z")
    ending = f"_{number}" if number else ""
    metrics = {
        f"headroom{ending}": level.headroom,
        f"headroom_any{ending}": level.headroom_any,
    }
    if level.likelihood != "gaussian":
        metrics[f"rho{ending}"] = level.tau[0] if level.tau else 0.0
        metrics[f"rho_any{ending}"] = level.tau_any[0] if level.tau_any else 0.0
    return metrics


def mark_as_diverged(run, result, metrics):
    """Let a result count as diverged in the last epoch, since these metrics are not finite."""
    losses = result.curves.get("loss", [])
    last_loss = losses[-1] if losses and math.isfinite(losses[-1]) else None
    result.diverged = {"epoch": run.f.num_epochs, "last_finite_loss": last_loss}
    result.linear = None
    result.theory = None
    result.headroom = None
    result.dead_units = None
    result.loss_change = None
    folder = files.run_dir(run.f, run.data)
    names = ", ".join(not_finite(metrics))
    print(
        f"{folder} counts as diverged, because these metrics are not finite: {names}",
        file=sys.stderr,
    )


def run_of_another_process(run):
    """The EvaluatedRun that another process has written, or None if its file is not whole."""
    result = RunResult.read(run.f, run.data)
    if result is None:
        folder = files.run_dir(run.f, run.data)
        print(f"{folder} has no result. The same command makes it again.", file=sys.stderr)
        return None
    return EvaluatedRun(run.f, run.data, run.model, result)


def draw_beside_counterpart(run, counterpart):
    """Draw the collapse curves of a run and of the counterpart's run with the same flags."""
    folder = files.run_dir(run.f, run.data)
    counterpart_folder = folder.parents[1] / counterpart / folder.name
    if run.examples is None:
        return
    counterpart_examples = read_examples(counterpart_folder)
    if counterpart_examples is None:
        if (counterpart_folder / "units.npz").exists():
            path = counterpart_folder / "units.npz"
            print(f"{path} is incomplete, so it is not drawn", file=sys.stderr)
        return
    # The caption is "<script> on <data set> <flags>". This picture has two scripts.
    _, _, flags = files.caption([run.f], [run.data]).partition(" on ")
    pictures.draw_collapse(
        folder / "collapse_beside.png",
        {folder.parent.name: run.examples, counterpart: counterpart_examples},
        f"{flags} seed={run.f.seed}",
    )


# ------------------------------------------------------------------------------------------- tables

def settings_and_data(runs):
    """The settings of evaluated runs, and their data sets."""
    return [run.f for run in runs], [run.data for run in runs]


def varying_flags(runs, with_seed=False):
    """The names of the flags that differ between runs. The seed is added only if asked for."""
    names = list(files.varying_flags(*settings_and_data(runs)))
    if with_seed and len({run.f.seed for run in runs}) > 1:
        names.append("seed")
    return names


def flag_values(result, flags):
    """The values of these flags in a result, as text: {name: value}."""
    return {name: str(result.settings[name]) for name in flags}


def print_metrics(runs):
    """Print the metrics with one row per setting, then a note for each setting that diverged.

    Rows that differ only in the seed form one row, with mean ± standard deviation. A model with
    many levels gets a second table with one row per setting and level. If --columns hides columns,
    a line under the tables says so.
    """
    flags = varying_flags(runs)
    results = [run.result for run in runs]
    by_setting = metrics_by_setting(results, flags)
    names = metric_names(results)
    shown = shown_columns(names, runs[0].f.columns)

    # Metrics of levels with rows of their own are not in the first table.
    levels = levels_with_rows(names)
    shared_names = []
    for name in shown:
        if not any(name.endswith(level) for level in levels):
            shared_names.append(name)

    print(f"\n{table_caption(runs)}")
    common.print_table(metrics_table(by_setting, flags, shared_names))
    diverged = [result for result in results if result.diverged]
    for result in diverged:
        print(divergence_note(result, flags))
    if diverged:
        smallest = min(result.settings["lr"] for result in diverged)
        print(
            f"Where a setting diverged, first try a smaller step, such as --lr {smallest / 10:g}."
        )
    if levels:
        kinds = []
        for kind in shown_columns(LEVEL_COLUMNS, runs[0].f.columns):
            if any(f"{kind}{level}" in names for level in levels):
                kinds.append(kind)
        print()
        common.print_table(levels_table(by_setting, flags, levels, kinds))
    if len(shown) < len(names):
        print("more columns: --columns all")


def shown_columns(names, columns):
    """The names of the metrics that a table has, for a value of --columns: "main" or "all"."""
    if columns == "all":
        return list(names)
    shown = []
    for name in names:
        if not (name.startswith(HIDDEN_BEGINNINGS) or name.endswith(HIDDEN_ENDS)):
            shown.append(name)
    return shown


def levels_with_rows(names):
    """The suffixes of the levels that have rows of their own, the top level first.

    A model with many levels has such rows for each of its levels. Other models have none.
    """
    # The suffix "" stands for all levels together.
    levels = [level for level in common.levels(names) if level]
    levels.reverse()
    return levels if len(levels) > MANY_LEVELS else []


def metrics_by_setting(results, flags):
    """The metrics of each setting, in a list over its seeds: {values of the flags: list}.

    A seed that diverged has None in place of its metrics.
    """
    by_setting = {}
    for result in results:
        values = tuple(flag_values(result, flags).values())
        by_setting.setdefault(values, []).append(result.metrics)
    return by_setting


def metric_names(results):
    """The names of all metrics, in the order of the results that have the most of them."""
    names = {}
    finished = [result.metrics for result in results if result.metrics]
    for metrics in sorted(finished, key=len, reverse=True):
        for name in metrics:
            names[name] = None
    return list(names)


def table_caption(runs):
    """The line above the metrics: script, data set, shared flags, number of examples, seeds."""
    settings, data = settings_and_data(runs)
    train = count_range([len(d.train[0]) for d in data])
    test = count_range([len(d.test[0]) for d in data])
    device = common.device_name(data[0].train[0].device)

    seeds = {f.seed for f in settings}
    seed = f"seed {settings[0].seed}"
    if len(seeds) > 1:
        seed = f"mean ± std over {len(seeds)} seeds"
    return (
        f"{files.caption(settings, data)}: {train} training and {test} test examples, {device}, "
        f"nats per test example, {seed}"
    )


def count_range(counts):
    """The smallest and the largest count as text, such as "5,421 to 6,742", or the only one."""
    ends = sorted({min(counts), max(counts)})
    return " to ".join(f"{count:,}" for count in ends)


def metrics_table(by_setting, flags, names):
    """The rows of the table of metrics."""
    # There are no names if all settings diverged.
    head = [*flags, *(names or ["metrics"])]
    table = [head]
    for values, repeats in by_setting.items():
        if any(repeats):
            cells = [metric_cell(repeats, name) for name in names]
        else:
            cells = ["diverged"]
        padding = ["-"] * (len(head) - len(values) - len(cells))
        table.append([*values, *cells, *padding])
    return table


def levels_table(by_setting, flags, levels, kinds):
    """The rows of the table of levels, the top level first. kinds are some of LEVEL_COLUMNS."""
    table = [[*flags, "level", *kinds]]
    for values, repeats in by_setting.items():
        for level in levels:
            cells = [metric_cell(repeats, f"{kind}{level}") for kind in kinds]
            # Settings may differ in the number of levels.
            if cells[0] != "-":
                table.append([*values, level[1:], *cells])
    return table


def metric_cell(repeats, name):
    """A metric of one setting's seeds as text: mean ± standard deviation, or "-" if there is none.

    repeats are the metrics for each seed, None for a seed that diverged.
    """
    values = [metrics[name] for metrics in repeats if metrics and name in metrics]
    if not values:
        return "-"
    # Two decimals would not show on which side of 0.01 nats a headroom is.
    number_format = "{:.3f}" if name.startswith("headroom") else "{:.2f}"
    if len(repeats) == 1:
        return common.format_metric(values[0], number_format)
    # The mean of a count is printed with decimals, too, even if only one seed has finished.
    text = common.format_repeats([float(value) for value in values], number_format)
    if len(values) < len(repeats):
        text += f" ({len(values)} of {len(repeats)})"
    return text


def divergence_note(result, flags):
    """The line about a setting that diverged. A last loss is named only where one was finite."""
    seed = {"seed": result.settings["seed"]}
    note = f"{files.spell(flag_values(result, flags) | seed)} diverged"
    note += f" in epoch {result.diverged['epoch']}"
    last_loss = result.diverged.get("last_finite_loss")
    if last_loss is not None and math.isfinite(last_loss):
        note += f"; the last finite loss was {last_loss:.6g}"
    return note


def print_verdicts(runs):
    """Print for each setting and level whether the objective or training collapsed its units.

    A decoder without a theory, whose headroom is empty, gets one line for all its settings.
    """
    flags = varying_flags(runs, with_seed=True)
    lines = []
    for run in runs:
        label = files.spell(flag_values(run.result, flags))
        for verdict in verdicts(run.result) if run.result.headroom else []:
            lines.append(labelled(label, verdict))
    if any(run.result.headroom == {} for run in runs):
        lines.append(
            "There is no verdict on collapsed units, since no theory covers this decoder."
        )
    if lines:
        print()
    for line in lines:
        print(line)


def labelled(label, text):
    """A line of text after the label of its setting. A single setting has the label ""."""
    return f"{label}: {text}" if label else text


def verdicts(result):
    """A sentence for each level that has a headroom: how many units collapsed, and why.

    Where training is the cause, the sentence also says what points to it: ReLU units that never
    fire, and a loss that still fell at the end.
    """
    dead = dead_units_in_words(result.dead_units or {})
    fall = -(result.loss_change or 0)

    sentences = []
    for latent, level in result.headroom.items():
        sentence = f"{latent}: {level.verdict()}"
        if level.headroom > theory.ACTIVE:
            if dead:
                sentence += f"; {dead} never fire"
            if fall > theory.ACTIVE:
                sentence += (
                    f"; the loss still fell by {fall:.2g} nats in the last tenth of the epochs"
                )
        sentences.append(sentence)
    return sentences


def dead_units_in_words(dead_units):
    """The ReLU units that never fire: "13 of 16 hidden units of f_y and 2 of 16 of g_z", or ""."""
    parts = []
    for network, (dead, total) in dead_units.items():
        if dead:
            hidden_units = "" if parts else " hidden units"
            parts.append(f"{dead} of {total}{hidden_units} of {network}")
    *first_parts, last_part = parts or [""]
    return f"{', '.join(first_parts)} and {last_part}" if first_parts else last_part


def print_theory(runs):
    """Print how each trained linear model compares with its closed form, and where they differ."""
    compared = [run.result for run in runs if run.result.theory is not None]
    if not compared:
        return
    print(
        '\nIn a pair "predicted -> trained", the closed form predicts the first value, and the '
        "trained model has the second."
    )

    # 1. A single setting: the units of each level.
    if len(runs) == 1:
        verify.print_units(compared[0].theory)
        for note in compared[0].theory.notes():
            print(note)
        print()

    # 2. One row per setting.
    flags = varying_flags(runs, with_seed=True)
    rows = []
    flat = []
    differences = []
    for result in compared:
        values = flag_values(result, flags)
        rows.append(values | theory_row(result.theory))
        label = files.spell(values)
        # Those of a single setting are among the notes above.
        if len(runs) > 1:
            for sentence in result.theory.flat_units_in_words():
                flat.append(labelled(label, sentence))
        for disagreement in result.theory.disagreements():
            differences.append(labelled(label, disagreement))

    print(
        "The loss is in nats per training example. The error of singular values is the largest "
        "one,\nrelative to the largest predicted singular value."
    )
    # Settings without importance sampling lack the last column, so the longest row has all of them.
    columns = list(max(rows, key=len))
    table = [columns]
    for row in rows:
        table.append([row.get(name, "-") for name in columns])
    common.print_table(table)

    # 3. Errors that do not count, and where the models differ.
    for sentence in flat:
        print(sentence)
    for difference in differences:
        print(f"DIFFERS {difference}")
    if not differences:
        models = "The model" if len(compared) == 1 else f"All {len(compared)} models"
        print(f"{models} reached the predicted optimum.")


def theory_row(comparison):
    """The cells of one row of the theory's table, {column: text}."""
    row = verify.active_units_row(comparison)
    row["optimal loss"] = common.format_pair(
        f"{comparison.optimal_loss:.4f}", f"{comparison.loss:.4f}"
    )
    row["gap"] = f"{comparison.gap:.4f}"
    row["error of singular values"] = f"{comparison.singular_value_error():.2%}"

    sampling = comparison.importance_sampling
    if sampling is not None:
        ratio, error = sampling["mean_ratio"], sampling["standard_error"]
        row["sampled / exact p"] = f"{ratio:.6f} ± {error:.0e}"
    return row


def print_linear(runs):
    """Print the linear twin's values and the trained values of each setting, in pairs.

    Where there are enough settings, a rank correlation measures whether both order them alike.
    """
    results = [run.result for run in runs if verify.closed_form(run.result) is not None]
    if results and results[0].linear is not None:
        flags = varying_flags(runs, with_seed=True)
        rows = [flag_values(result, flags) | linear_row(result) for result in results]
        print(
            '\nIn a pair "linear twin -> trained", the closed form of the linear twin predicts the '
            "first value from the training data,\nand the trained model has the second."
        )
        table = [list(rows[0])]
        for row in rows:
            table.append(list(row.values()))
        common.print_table(table)

    if verify.can_be_ranked(results):
        # The tables have no AU_kl, either.
        correlations = verify.rank_correlations_in_words(results, left_out=("AU_kl",))
        print(
            "Spearman's rank correlation between predicted and trained values over "
            f"{len(results)} settings: {correlations}"
        )


def linear_row(result):
    """The cells of one row of the linear twin's table, {column: text}."""
    row = {}
    for metric, predicted, trained in verify.linear_pairs(result):
        # The same units are predicted active for AU and AU_kl, so one of them is enough.
        if not metric.startswith("AU_kl"):
            row[metric] = common.format_pair(
                common.format_metric(predicted), common.format_metric(trained)
            )
    return row
