"""What a trained model is worth: first its evaluation, then `report`, which leaves its result, then the tables.

A model, as `training.fit` and `report` want it, is an nn.Module built from one setting f, an instance of its script's flags.
In its methods the scalars of f (beta, eta, sigma: `common.scalar`) are 0-d tensors on the device. With a batch of B examples
and S = sample_shape draws:

    forward(*batch, f, sample_shape=())    the terms of the ELBO, in nats, per example, a dict of
        log_px_z (S, B)      log p(x|z) at a draw of z
        kl*      (S, B, d)   per latent unit: the ELBO's KL term of this level ("kl", or "kl_1", "kl_2", ...)
      and in eval mode also
        log_w*   (S, B)      log p(x, z) - log q(z|x), the log importance weight; of several names those of independent
                             draws: the product of their means is p(x)
        mean*    (S, B, d)   E_q[z|x] of each level, in standard deviations of its prior
        unit_kl* (S, B, d)   the level's KL where the ELBO's term is no divergence (may be left out otherwise)
      a term that does not depend on the draw may lack S; further terms (S, B) become metrics, the mean over examples, or, of
      an error* that is the standard error of an example's term, that of the mean
    loss(terms, f)                         (B,): what training minimises, the negative beta-ELBO

What a model may have besides:

    given(*batch, f)                       further arguments of forward, {name: value}, which all draws of a batch share where a
                                           log-likelihood is asked for
    reconstructions(*batch, f)             {caption: images (B, 784) or (B, C, H, W)}, for pictures
    samples(n, f)                          images from the prior, n of them, or {caption: images}, for pictures
    linear_optimum(f, data)                the closed form of its linear twin on the same data, one of theory.py's (static, f's
                                           scalars are numbers); None where no optimum is finite
    predicted(f, data)                     of a linear model: the closed form of this very one (static, f's scalars are numbers),
    units(f, data)                         the same quantities of the model as it is, in float64,
    exact_log_px(*batch, f)                and log p(x), (B,)
    unexplained(*batch, f, draws)          of each level with a learnable posterior and a Gaussian target t, for its headroom, by so
                                           many draws of z where there is no closed form: {level: {
        reads    what the level's encoder reads, a tuple of (B, ...), t the last of them
        mean     the mean of p(t|z), expected over q(z|reads): a list of (layer, hidden (B, h)) that add up to it, the layers
                 nn.Linear, or None for hidden as it is
        beta, weight, std                  the KL's weight in the loss, that of -log p(t|z), and the std of p(t|z) }}
    widest_layer                           numbers per example, where a layer is wider than the data
    dimensions                             of an image whose p(x|z) is a mass in bits per dimension: its numbers
    elbo_draws                             draws per example where no log-likelihood is asked for

The shortest script is MNIST_VAE_Relu_nonlearnable_sigma.py: copy it to begin another.
"""
import copy
import functools
import math
import sys
import time

import numpy as np
import torch
from torch import nn

import common
import files
import pictures
import theory

MANY_LEVELS = 2                                           # more have a table of their own
ELBO_DRAWS = 16                                           # draws per example where no log-likelihood is asked for
HEADROOM_DRAWS = 8                                        # draws per example of what a model leaves unexplained
CHUNK_BYTES = {"cpu": 2**23, "cuda": 2**30}               # of the widest layer: a cache, or a busy GPU


@torch.no_grad()
def evaluate(model, f, data, split="test"):
    """The metrics of a model on the test split (or on "train"), in nats per example, and what they are made of.

    Returns (metrics, examples). metrics: log_px, log p(x) by importance sampling with num_samples draws from q (Burda
    et al. 2016, eq. 8; absent for 0), elbo (at beta 1), reconstruction -E_q[log p(x|z)], and per level kl, AU (units
    with Var_x(E_q[z|x]) > 0.01 of the prior's variance), AU_kl (units with mean KL > 0.01), active_share (share of
    pairs of example and unit with KL > 0.01). examples: numpy arrays, log_px (n,) and unit_kl per level (n, d).
    """
    common.use_precision(f)
    split = getattr(data, split)
    like, asked = split[0], getattr(f, "num_draws", f.num_samples)    # where num_samples are rows, draws have their own
    draws = asked or getattr(model, "elbo_draws", ELBO_DRAWS)
    width = max(getattr(model, "widest_layer", 0), *(t[0].numel() for t in split))
    rows = max(1, CHUNK_BYTES[like.device.type] // (width * like.element_size()))      # images x draws at a time
    images, scalars = max(1, rows // draws), common.on_device(f, like)
    progress, terms, start = common.Progress("evaluating", len(like), "examples"), {}, 0
    with common.seeded(f.seed, "evaluation", like.device):
        while start < len(like):
            batch, too_large = [t[start:start + images] for t in split], False
            try:
                given = model.given(*batch, scalars) if asked and hasattr(model, "given") else {}
                means = mean_terms(functools.partial(model, **given), batch, scalars, draws, rows)
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                too_large = True                          # its tensors are free once the exception is
            if too_large:
                torch.cuda.empty_cache()
                images, rows = max(1, images // 2), rows // 2
                print(f"not enough memory: evaluated in halves from here on, {min(images * draws, rows):,} draws at a time", file=sys.stderr)
                continue
            for name, value in means.items():
                if name not in terms:                     # of all rows at once: many small tensors scatter the memory
                    terms[name] = value.new_empty((len(like), *value.shape[1:]))
                terms[name][start:start + len(value)] = value
            start += len(batch[0])
            progress.update(start)
    progress.update(len(like), end=True)
    terms = {name: value.double().cpu() for name, value in terms.items()}

    metrics, examples = {}, {}
    if asked:
        log_px = sum(value - math.log(draws) for name, value in terms.items() if name.startswith("log_w"))
        metrics["log_px"], examples["log_px"] = log_px.mean().item(), log_px.numpy()
    if hasattr(model, "exact_log_px"):
        exact = in_double(model, f, split, lambda double, batch, f: double.exact_log_px(*batch, f))
        metrics["exact_log_px"], examples["exact_log_px"] = exact.mean().item(), exact.numpy()
    kls = {f"kl{level}": terms[f"kl{level}"].sum(1).mean().item() for level in common.levels(terms)}
    reconstruction = -terms["log_px_z"].mean().item()
    metrics |= {"elbo": -reconstruction - sum(kls.values()), "reconstruction": reconstruction} | kls
    for name, value in terms.items():
        if name.startswith("error"):
            metrics[name] = value.square().sum().sqrt().item() / len(value)
        elif name != "log_px_z" and not name.startswith(("log_w", "kl", "unit_kl", "mean")):
            metrics[name] = value.mean().item()
    if getattr(model, "dimensions", 0):
        metrics["bits_per_dim"] = -metrics.get("log_px", metrics["elbo"]) / (model.dimensions * math.log(2))
    if len(kls) > MANY_LEVELS:                            # all units together, as a level without a name
        metrics["kl"] = sum(kls.values())
        terms["unit_kl"] = torch.cat([terms.get(f"unit_kl{level}", terms[f"kl{level}"]) for level in common.levels(terms)], 1)
        terms |= {name: torch.cat([terms[f"{name}{level}"] for level in common.levels(terms)], 1) for name in ("mean", "kl")}
    for level in common.levels(terms):
        unit_kl = terms.get(f"unit_kl{level}", terms[f"kl{level}"])
        metrics[f"AU{level}"] = (terms[f"mean{level}"].var(0) > 0.01).sum().item()
        metrics[f"AU_kl{level}"] = (unit_kl.mean(0) > 0.01).sum().item()
        metrics[f"active_share{level}"] = (unit_kl > 0.01).double().mean().item()
        examples[f"unit_kl{level}"] = unit_kl.numpy().astype("float32")
    return metrics, examples


def mean_terms(model, batch, f, draws, rows):
    """A model's terms of a batch, the mean over so many draws of each, {name: (B, ...)}; of log_w* the log of the sum of their
    exponentials. At most `rows` draws at a time."""
    means = {}
    for drawn in range(0, draws, rows):
        S = min(rows, draws - drawn)
        for name, value in model(*batch, f, sample_shape=(S,)).items():
            if name.startswith("log_w"):
                value = value.expand(S, -1).logsumexp(0)
                means[name] = torch.logaddexp(means[name], value) if name in means else value
            else:                                         # this part of the mean over draws, which a term may lack
                drawn_from = value.ndim > (2 if name.startswith(("kl", "unit_kl", "mean")) else 1)
                value = (value.mean(0) if drawn_from else value) * (S / draws)
                means[name] = means[name] + value if name in means else value
    return means


@torch.no_grad()
def in_double(model, f, split, work):
    """work(model, batch, f) over all rows of a split, batch by batch, in float64: its (B, ...) joined, on the CPU."""
    double = copy.deepcopy(model).double()
    f = common.on_device(f, split[0][:0].double())
    return torch.cat([work(double, [t.double() for t in batch], f).cpu() for batch in zip(*(t.split(2048) for t in split))])


@torch.no_grad()
def check(model, f, data, examples):
    """`compare` a trained linear model with its closed form: `predicted(f, data)` gives that, `units(f, data)` the same of
    the model; the loss is the exact mean over the training rows. examples are those of `evaluate`: if it sampled,
    "importance_sampling" has the mean over test examples of (estimated p(x)) / (exact p(x)), which is 1 in expectation,
    its standard error, and what rounding may add: log p(x) is sampled in data's precision."""
    model = copy.deepcopy(model).train()
    loss = in_double(model, f, data.train, lambda double, batch, f: double.loss(double(*batch, f), f)).mean().item()
    units = model.cpu().double().units(common.on_device(f, data.moment[:0]), data)
    beside = theory.compare(model.predicted(f, data), units, loss)
    if "log_px" in examples:
        ratio = np.exp(examples["log_px"] - examples["exact_log_px"])
        rounding = torch.finfo(data.test[0].dtype).eps * np.abs(examples["exact_log_px"]).mean()
        beside["importance_sampling"] = {"mean_ratio": ratio.mean(), "standard_error": ratio.std() / len(ratio)**0.5,
                                         "rounding": rounding}
    return beside


@torch.no_grad()
def unexplained(model, f, data):
    """What a trained model leaves of its Gaussian targets, from all training rows: {level: (cross (D, p), moment (p, p), beta,
    weight, std)}, the arguments of `theory.headroom`. Sums are in float64, products of a few thousand rows in data's precision."""
    like, sums, found = data.train[0], {}, {}
    f = common.on_device(f, like[:0].double())            # 0-d: they leave the precision of what they meet
    width = max(getattr(model, "widest_layer", 0), *(t[0].numel() for t in data.train))
    rows = max(1, 2**26 // (width * like.element_size() * HEADROOM_DRAWS))         # examples at a time
    for start in range(0, len(like), rows):
        batch = [t[start:start + rows] for t in data.train]
        for level, of in model.unexplained(*batch, f, HEADROOM_DRAWS).items():
            u = torch.cat([*of["reads"], torch.ones_like(like[:len(batch[0]), :1])], dim=1)
            if like.is_cuda:                              # where float32 may be rounded to TF32
                u, of["mean"] = u.double(), [(layer, hidden.double()) for layer, hidden in of["mean"]]
            moments = [hidden.T @ u for _, hidden in of["mean"]]
            of_data = len(of["reads"]) == len(batch) and all(a is b for a, b in zip(of["reads"], batch))
            moments += [] if of_data else [u.T @ u]       # else it is known
            so_far = sums.setdefault(level, [0] * len(moments))
            sums[level] = [total + moment.double() for total, moment in zip(so_far, moments)]
            found[level] = of                             # but for hidden it is the same for all batches
    for level, of in found.items():
        hidden = [total.cpu() / len(like) for total in sums[level]]
        moment = data.moment_with_one if len(hidden) == len(of["mean"]) else hidden.pop()
        cross = moment[-1 - of["reads"][-1].shape[1]:-1]  # E[t u^T]
        for (layer, _), by_u in zip(of["mean"], hidden):
            if layer is not None:
                by_u = layer.weight.double().cpu() @ by_u
                if layer.bias is not None:
                    by_u = by_u + layer.bias.double().cpu()[:, None] * moment[-1]
            cross = cross - by_u
        found[level] = (cross, moment, *(float(of[name]) for name in ("beta", "weight", "std")))
    return found


def headroom(model, f, data, metrics, examples):
    """Of each level with a learnable posterior and a Gaussian target {"z" or "z2": {"units", "collapsed", "headroom" (nats),
    "level", "tau", "theta"}}; theta, of the active units, is the variance that a linear unit of their KL describes."""
    found = {}
    with common.seeded(f.seed, "evaluation", data.train[0].device):
        for level, (cross, moment, *weights) in unexplained(model, f, data).items():
            kl, active = examples[f"unit_kl{level}"].mean(0), metrics[f"AU_kl{level}"]
            tau, at = theory.spectrum(theory.linear_part(cross, moment))[:len(kl)], theory.level_of(*weights)
            found[f"z{level.removeprefix('_')}"] = {
                "units": len(kl), "collapsed": len(kl) - active, "headroom": theory.headroom(tau, len(kl) - active, *weights),
                "level": at if at < math.inf else None, "tau": tau.tolist(),
                "theta": (at * np.exp(2 * np.sort(kl)[::-1][:active])).tolist() if at < math.inf else []}
    return found


@torch.no_grad()
def dead_units(model, f, data):
    """{network: [hidden units that fire for no test example, hidden units]} of each of a model's networks with ReLUs; a channel
    of a convolution is a unit."""
    fires, of_networks = {}, {}

    def note(name):
        def hook(relu, inputs, output):
            unit = 1 if output.ndim == 4 else output.ndim - 1
            fired = (output > 0).transpose(0, unit).flatten(1).any(1)
            fires[name] = fires.get(name, False) | fired
        return hook
    hooks = [layer.register_forward_hook(note(name)) for name, layer in model.named_modules() if isinstance(layer, nn.ReLU)]
    with common.seeded(f.seed, "evaluation", data.test[0].device):
        for batch in zip(*(t.split(1000) for t in data.test)) if hooks else ():
            model(*batch, common.on_device(f, batch[0]))
    for hook in hooks:
        hook.remove()
    for name, fired in fires.items():
        of_network = of_networks.setdefault(name.split(".")[0], [0, 0])
        of_network[0] += (~fired).sum().item()
        of_network[1] += len(fired)
    return of_networks


def last_change(curve):
    """The change of a curve over the last tenth of its epochs, one at least; None if there are no earlier ones."""
    tenth = max(1, len(curve) // 10)
    return curve[-1] - curve[-1 - tenth] if len(curve) > tenth else None


def report(models, settings, data, counterpart=None):
    """Evaluate what is not evaluated yet, leave each run's files, draw the grid's pictures and print the table.

    counterpart is the script to compare with: where it has a run of the same flags, the collapse curves of both are drawn
    on one picture. Returns the exit status: 1 if a setting diverged, else 0.
    """
    for i in common.share(settings):
        model, f, d = models[i], settings[i], data[i]
        folder, result = files.run_dir(f, d), files.read_result(f, d, "result.json")
        if result is None:
            trained = files.read_result(f, d, "training.json")
            result = files.describe(f, d) | {name: trained[name] for name in ("diverged", "side_by_side", "curves")}
            result |= {"seconds": {"train": trained["seconds"]}, "metrics": None}
            if model is not None:
                start = time.monotonic()
                result["parameters"] = sum(p.numel() for p in model.parameters())
                result["metrics"], examples = evaluate(model, f, d)
                if d.also_train:
                    result["metrics"] |= {f"{name}_train": value for name, value in evaluate(model, f, d, "train")[0].items()}
                if hasattr(model, "linear_optimum"):
                    optimum = model.linear_optimum(f, d)
                    result["linear"] = optimum and theory.per_unit(optimum)
                if hasattr(model, "predicted"):
                    result["theory"] = check(model, f, d, examples)
                result["seconds"]["evaluate"] = time.monotonic() - start
                if hasattr(model, "unexplained"):
                    start = time.monotonic()
                    result["headroom"] = headroom(model, f, d, result["metrics"], examples)
                    for z, found in result["headroom"].items():
                        result["metrics"]["headroom" + (f"_{z[1:]}" if z[1:] else "")] = found["headroom"]
                    result["dead_units"] = dead_units(model, f, d)
                    result["loss_change"] = last_change(trained["curves"]["loss"])
                    result["seconds"]["headroom"] = time.monotonic() - start
                files.write(folder / "units.npz", lambda file: np.savez_compressed(file, **examples))
                pictures.draw_run(folder, model, f, d, result, examples)
            files.write_json(folder / "result.json", result)
        print(f"files: {folder}", file=sys.stderr)
        both = [folder, folder.parents[1] / (counterpart or "") / folder.name]
        if counterpart and all((of / "units.npz").exists() for of in both):
            pictures.draw_collapse(folder / "collapse_beside.png", {of.parent.name: np.load(of / "units.npz") for of in both},
                                   files.caption_of([f], [d]).partition(" on ")[2] + f" seed={f.seed}")
    files.unlock()
    common.meet()                                         # the first process shows what all have done
    if common.processes()[0] > 0:
        return 0
    results = [files.read_result(f, d, "result.json") for f, d in zip(settings, data)]
    pictures.draw_grid(models, settings, data)
    print_table(results, settings, data)
    print_verdicts(results, settings, data)
    print_theory(results, settings, data)
    print_linear(results, settings, data)
    return int(any(result["diverged"] for result in results))


def print_table(results, settings, data):
    """One row a setting; rows that differ in nothing but the seed are one, mean ± standard deviation."""
    flags, seeds = list(files.varying(settings, data)), len({f.seed for f in settings})
    of_each = sorted([result["metrics"] or {} for result in results], key=len, reverse=True)    # in the order of those that have most
    measured = dict.fromkeys(name for of in of_each for name in of)
    by_level = [name for name in common.levels(measured)[::-1] if name]     # the top first
    by_level = by_level if len(by_level) > MANY_LEVELS else []
    metrics = [name for name in measured if not any(name.endswith(level) for level in by_level)]
    rows, notes = {}, []
    for result in results:
        key = tuple(str(result["settings"][name]) for name in flags)
        rows.setdefault(key, []).append(result["metrics"])
        if result["diverged"]:
            of = files.spell(dict(zip(flags, key)) | {"seed": result["settings"]["seed"]})
            notes.append(f"{of} diverged in epoch {result['diverged']['epoch']}; the last finite loss was "
                         f"{result['diverged']['last_finite_loss']:.6g}")
    table = [flags + (metrics or ["metrics"])]
    for key, repeats in rows.items():
        finished = [m for m in repeats if m]
        cells = [_cell([m.get(name) for m in finished], len(repeats)) for name in metrics] if finished else ["diverged"]
        table.append([*key, *cells] + ["-"] * (len(table[0]) - len(key) - len(cells)))
    train, test = (" to ".join(f"{n:,}" for n in sorted({min(counts), max(counts)})) for counts in zip(
        *((len(d.train[0]), len(d.test[0])) for d in data)))
    print(f"\n{files.caption_of(settings, data)}: {train} training and {test} test examples, "
          f"{common.device_name(data[0].train[0].device)}, nats per test example, "
          f"{f'seed {settings[0].seed}' if seeds == 1 else f'mean ± std over {seeds} seeds'}")
    common.print_rows(table)
    print("".join(f"{note}\n" for note in notes), end="")
    if by_level:
        kinds = ("kl", "AU", "AU_kl", "active_share")
        table = [flags + ["level", *kinds]]
        for key, repeats in rows.items():
            finished = [m for m in repeats if m]
            for level in [level for level in by_level if finished and f"kl{level}" in finished[0]]:
                table.append([*key, level[1:], *(_cell([m[name + level] for m in finished], len(repeats)) for name in kinds)])
        print()
        common.print_rows(table)


def verdicts(result):
    """Of each level that has a `headroom`: what collapsed it, in words, and what points to the cause if it was training."""
    dead = [f"{dead} of {units}{' hidden units' if i == 0 else ''} of {network}" for i, (network, (dead, units)) in enumerate(
        (network, of) for network, of in result["dead_units"].items() if of[0])]
    for z, of in result["headroom"].items():
        said = f"{z}: {theory.verdict(of['units'], of['collapsed'], of['headroom'])}"
        if of["headroom"] > theory.ACTIVE:
            said += f"; {', '.join(dead)} are dead" if dead else ""
            fell = -(result["loss_change"] or 0)
            said += f"; the loss still fell by {fell:.2g} nats in the last tenth of the epochs" if fell > theory.ACTIVE else ""
        yield said


def print_verdicts(results, settings, data):
    """A line a setting and level: whether the objective or training collapsed its units."""
    flags = list(files.varying(settings, data)) + (["seed"] if len({f.seed for f in settings}) > 1 else [])
    lines = [(files.spell({name: str(result["settings"][name]) for name in flags}), said)
             for result in results if result.get("headroom") for said in verdicts(result)]
    print("".join(f"\n{of + ': ' if of else ''}{said}" for of, said in lines) + "\n" * bool(lines), end="")


def _cell(values, repeats):
    """A metric's text, "-" if there is none; over seeds mean ± standard deviation."""
    if values[0] is None:
        return "-"
    if repeats == 1:
        return common.cell(values[0])
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}" + (f" ({len(values)} of {repeats})" if len(values) < repeats else "")


def print_theory(results, settings, data):
    """What the closed form predicts of each setting beside what was trained, if there is one, and where they differ."""
    results = [result for result in results if result.get("theory")]
    if not results:
        return
    if len(settings) == 1:
        theory.print_units(results[0]["theory"], "trained")
        print("".join(f"{note}\n" for note in theory.notes(results[0]["theory"])), end="")
    flags, rows, differ = list(files.varying(settings, data)) + (["seed"] if len({f.seed for f in settings}) > 1 else []), [], []
    for result in results:
        beside, key = result["theory"], {name: str(result["settings"][name]) for name in flags}
        of = theory.active_units(beside, "trained")
        row = key | {f"active{level}": f"{count} ({of[level]})" for level, count in theory.active_units(beside).items()}
        row |= {"singular values": f"{theory.singular_value_error(beside):.2%}", "optimal loss": f"{beside['optimal_loss']:.4f}",
                "trained": f"{beside['loss']:.4f}", "gap": f"{beside['gap']:.4f}"}
        if "importance_sampling" in beside:
            row["sampled / exact p"] = "{mean_ratio:.6f} ± {standard_error:.0e}".format(**beside["importance_sampling"])
        rows.append(row)
        differ += [f"{files.spell(key) + ': ' if key else ''}{what}" for what in theory.disagreements(beside)]
    print("\npredicted (trained): active units; largest error of a singular value over the largest predicted one; nats per "
          "training example")
    columns = max(rows, key=len)                          # without draws nothing is sampled
    common.print_rows([list(columns), *([row.get(name, "-") for name in columns] for row in rows)])
    print("\n".join(f"DIFFERS {line}" for line in differ) or "trained as predicted")


def print_linear(results, settings, data):
    """What the closed form of the linear twin predicts of each setting beside what was trained, and, where there are
    settings enough, how far the two order them alike."""
    results = [result for result in results if theory.closed_form(result)]
    flags = list(files.varying(settings, data)) + (["seed"] if len({f.seed for f in settings}) > 1 else [])
    rows = []
    for result in results if results and "linear" in results[0] else []:
        row = {name: str(result["settings"][name]) for name in flags}
        for metric, predicted, trained in theory.beside_linear(result):
            word = metric.replace("AU_kl", "AU")          # the same units are predicted active for both
            row |= {f"linear {word}": common.cell(predicted), metric: common.cell(trained)}
        rows.append(row)
    if rows:
        print("\nlinear: what the closed form of the linear model predicts from the same training data, beside what was trained")
        common.print_rows([list(rows[0]), *(list(row.values()) for row in rows)])
    if theory.can_be_ranked(results):
        print(f"rank correlation of predicted and trained over {len(results)} settings: {theory.correlations_in_words(results)}")
