"""Which latent units would collapse on your data, and which beta keeps as many as you want? The closed forms, no training.

    python predict_collapse.py --x features.npy --eta_dec 0.5 --active 12
    python predict_collapse.py --model cvae --x inputs.npy --y targets.npy --beta 0.5,1,2
    python predict_collapse.py --model hvae --dataset mnist --eta_enc 0.5 --eta_dec 0.5
    python predict_collapse.py --x u.npy --residual r.npy --eta_dec 0.5 --beta 1.0 --collapsed 9

Of a linear VAE, CVAE or two-level HVAE at its optimum (Dang et al. 2024, arXiv 2306.05023, theorems 1, 2, 3 and 5). All they
need of the data are its second moments: rows of an .npy, .npz, .csv or .pt file, read once, chunk by chunk. With --residual
instead: did the objective collapse the units of a VAE that you have trained, of whatever kind, or did training?
"""
import dataclasses
import math
import pickle
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import common
import datasets
import files
import pictures
import theory


@dataclass
class Flags:
    device = "cpu"                                        # no flag: numpy's float64
    x: str = common.flag("", "file with an example a row; rows of more than one dimension are flattened")
    y: str = common.flag("", "file with a CVAE's targets, a row for each row of --x")
    dataset: str = common.flag("none", "training images instead of --x; a quarter of them as x, the rest as y, of a CVAE",
                               choices=("none", "mnist", "fashion", "digits"))
    data_dir: str = common.flag("data", "where data sets lie, or are put")
    center: bool = common.flag(False, "subtract the means, as a model with biases could")
    model: str = common.flag("vae", "whose collapse", choices=("vae", "cvae", "hvae"))
    beta: float = common.flag(1.0, "vae, cvae: weight of the KL", above=0)
    beta_1: float = common.flag(1.0, "hvae: weight of z1's KL", above=0)
    beta_2: float = common.flag(1.0, "hvae: weight of z2's KL", above=0)
    eta_enc: float = common.flag(1.0, "std of the prior", above=0)
    eta_dec: float = common.flag(1.0, "std of the decoder", above=0)
    sigma: float = common.flag(0.0, "vae, cvae: std of q, fixed; 0 for a learnable one", low=0)
    sigma_1: float = common.flag(0.5, "hvae: std of q(z1|x), fixed", above=0)
    sigma_2: float = common.flag(0.0, "hvae: std of q(z2|z1), fixed; 0 for a learnable one", low=0)
    d_1: int = common.flag(0, "units of z, of z1 in an hvae; 0 for as many as the data has modes", low=0)
    d_2: int = common.flag(0, "hvae: units of z2; 0 for as many as z1 has", low=0)
    residual: str = common.flag("", "file with what a trained model leaves of its target, a row for each row of --x, which its encoder reads")
    collapsed: int = common.flag(0, "with --residual: how many units of the trained model are collapsed", low=0)
    active: int = common.flag(0, "the number of active units to recommend a beta for (hvae: of z2, beta_2)", low=0)
    out_dir: str = common.flag("runs", "where results go")


SWEPT = {"vae": "beta", "cvae": "beta", "hvae": "beta_2"}    # by which units collapse one after another
CHUNK = 4096                                              # rows at a time
RIDGES = (0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)                # of which the best counts: whatever units gain on other rows is to be had
LARGEST = 1e100                                           # of a number in a file


# ------------------------------------------------------------------------------------------------------------- the data

def opened(f, flag):
    """(rows(start, stop), number of rows) of the file that --x or --y names. Ends the program if it is no array of numbers."""
    path = getattr(f, flag)
    readers = {".npy": _npy, ".npz": _npz, ".csv": _csv, ".pt": _pt}
    read = readers.get(Path(path).suffix.lower())
    if not read:
        common.stop(f, f"--{flag}: got {path!r}, wants a file that ends in {', '.join(readers)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")               # of an empty file, of a sparse tensor: it is said below
            rows, array = read(path)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"of type {array.dtype}, wants numbers")
        if array.ndim < (2 if flag == "x" else 1) or not array.size:
            raise ValueError(f"of shape {array.shape}, wants rows of numbers")
    except (OSError, ValueError, EOFError, RuntimeError, TypeError, AttributeError, pickle.UnpicklingError,
            zipfile.BadZipFile) as wrong:
        common.stop(f, f"--{flag}: {path!r} cannot be read as an array: {str(wrong).splitlines()[0] if str(wrong) else 'empty'}")
    return rows, len(array)


def _npy(path):
    # Mapped anew for every chunk, so that no more than a chunk of the file is ever in memory.
    return lambda start, stop: np.load(path, mmap_mode="r")[start:stop], np.load(path, mmap_mode="r")


def _npz(path):
    with np.load(path) as arrays:
        if len(arrays.files) != 1:
            raise ValueError(f"it holds {len(arrays.files)} arrays ({', '.join(arrays.files)}), wants one")
        array = arrays[arrays.files[0]]
    return lambda start, stop: array[start:stop], array


def _csv(path):
    try:
        array = np.loadtxt(path, delimiter=",", ndmin=2)
    except ValueError:                                    # a line of names
        array = np.loadtxt(path, delimiter=",", ndmin=2, skiprows=1)
    return lambda start, stop: array[start:stop], array


def _pt(path):
    tensor = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    if not torch.is_tensor(tensor):
        raise ValueError(f"it holds a {type(tensor).__name__}, wants a tensor")
    array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()       # numpy has no bfloat16
    return lambda start, stop: array[start:stop], array


def chunks(f, flags):
    """The rows that f's flags, --x and perhaps another, stand for, float64, chunk by chunk: (number of all rows, number of the first
    one here, [(rows, d) of each flag]). Ends the program if they are not as many, or not finite."""
    if f.dataset != "none":
        [data] = (datasets.load_mnist_quarters if f.model == "cvae" else datasets.load_mnist)([f])
        sources = [((lambda start, stop, t=t: t[start:stop].cpu().numpy()), len(t)) for t in data.train]
    else:
        sources = [opened(f, flag) for flag in flags]
    n = sources[0][1]
    if sources[-1][1] != n:
        common.stop(f, f"--{flags[-1]}: {sources[-1][1]:,} rows, wants as many as --x: {n:,}")
    if n < 2:
        common.stop(f, "--x: one row, wants at least 2")
    progress = common.Progress("reading", n, "rows")
    for start in range(0, n, CHUNK):
        parts = [rows(start, start + CHUNK).reshape(min(CHUNK, n - start), -1).astype(np.float64) for rows, _ in sources]
        for flag, part in zip(flags, parts):
            largest = np.abs(part).max()
            if not largest < np.inf:                      # nan, too
                row = start + int(np.argmax(~np.isfinite(part).all(1)))
                common.stop(f, f"--{flag}: row {row:,} (from 0) holds {part[row - start][~np.isfinite(part[row - start])][0]}, "
                               "wants finite numbers")
            if largest > LARGEST:
                common.stop(f, f"--{flag}: got {largest:.3g}, wants numbers up to {LARGEST:g}, whose squares can be summed")
        yield n, start, parts
        progress.update(min(n, start + CHUNK))
    progress.update(n, end=True)


def moments(f):
    """(second moment (d, d) of x, or of x and y joined, float64; number of rows; columns of x). One pass over the rows."""
    moment, total = 0, 0
    for n, _, parts in chunks(f, ("x", "y") if f.model == "cvae" else ("x",)):
        chunk = np.concatenate(parts, axis=1)
        moment, total = moment + chunk.T @ chunk, total + chunk.sum(0)      # numpy computes half of a symmetric product
    moment, mean = moment / n, total / n
    if f.center:
        moment = moment - np.outer(mean, mean)
    dim_x, variance = parts[0].shape[1], np.diag(moment) - (0 if f.center else mean**2)
    constant = variance <= 1e-12 * np.maximum(mean**2, variance.max())
    for which, words in ((constant & (mean == 0), "0 throughout"),
                         (constant & (mean != 0), "constant" + ("" if f.center else
                          ": a unit describes them, unless --center takes the means away"))):
        if which.any():
            warn(f"{which.sum()} of {len(moment)} columns are {words}")
    if n < len(moment):
        warn(f"{n:,} rows are few for {len(moment):,} columns: there are at most {n:,} modes, and on fresh rows they hold less")
    return torch.from_numpy(moment), n, dim_x


def halves(f):
    """(number of rows, [(C, A) of the even rows, (C, A) of the odd ones]): the means of r u^T (D, p) and of u u^T (p, p), u a row of
    --x with a 1 at its end, r one of --residual. One pass over the rows."""
    sums = [[0, 0], [0, 0]]
    for n, start, (u, r) in chunks(f, ("x", "residual")):
        u = np.concatenate([u, np.ones_like(u[:, :1])], axis=1)
        for half in (0, 1):
            of_u, of_r = u[half::2], r[half::2]           # a chunk begins with an even row
            sums[half] = [sums[half][0] + of_r.T @ of_u, sums[half][1] + of_u.T @ of_u]
    rows = (n + 1) // 2, n // 2
    return n, [tuple(torch.from_numpy(total / count) for total in of) for of, count in zip(sums, rows)]


def warn(words):
    print(f"warning: {words}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------- the prediction

def optimum(f, variances, beta):
    """The closed form of --model over beta (of SWEPT), a number or (...,), for modes of these variances (D,)."""
    theta, modes = variances.sqrt(), int((variances > 0).sum())
    d_1 = f.d_1 or max(1, modes)
    if f.model == "hvae":
        d_2, etas = f.d_2 or d_1, (f.eta_enc, f.eta_dec)
        if f.sigma_2:
            return theory.hvae_optimum_fixed_sigma_2(theta, d_1, d_2, f.sigma_1, f.sigma_2, f.beta_1, beta, *etas)
        return theory.hvae_optimum(theta, d_1, d_2, f.sigma_1, f.beta_1, beta, *etas)
    if f.sigma:
        return theory.vae_optimum_fixed_sigma(theta, torch.full((d_1,), f.sigma), beta, f.eta_enc, f.eta_dec)
    return theory.vae_optimum(theta, d_1, beta, f.eta_enc, f.eta_dec)


def trade_off(f, variances, beta):
    """Over beta (m,): {"active": of the level that beta acts on, "rate": sum of the KL terms in nats, "distortion": mean
    squared error, "loss": L* in nats}, each (m,). L* = distortion / (2 eta_dec^2) + D/2 log(2 pi eta_dec^2) + beta rate."""
    predicted = optimum(f, variances, beta)
    rates = {level: predicted[f"kl{level}"].sum(-1) for level in theory.levels_of(predicted)}
    weighted = f.beta_1 * rates["_1"] + beta * rates["_2"] if f.model == "hvae" else beta * rates[""]
    constant = len(variances) / 2 * math.log(2 * math.pi * f.eta_dec**2)
    top = list(rates)[-1]
    return {"active": (predicted[f"information{top}"] > 0).sum(-1), "rate": sum(rates.values()),
            "distortion": (predicted["loss"] - constant - weighted) * 2 * f.eta_dec**2, "loss": predicted["loss"]}


def recommended(collapse, wanted):
    """(low, high): with low <= beta < high exactly `wanted` units are active, by the betas at which units collapse (d,); None
    if no beta does that."""
    ends = sorted([math.inf, *collapse.tolist(), 0.0], reverse=True)
    high, low = ends[wanted], ends[wanted + 1] if wanted < len(collapse) else 0.0
    return (low, high) if low < high else None


def curve_betas(collapse):
    """Betas around those at which units collapse, (400,), evenly on a log scale; over four decades at most."""
    there = [value for value in collapse.tolist() if 0 < value < math.inf] or [1.0]
    there = [value for value in there if value >= 1e-4 * max(there)]
    return torch.logspace(math.log10(min(there) / 3), math.log10(max(there) * 3), 400, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------ the report

def report(group, variances, n, words):
    """Print and draw what is predicted for settings that differ in the swept beta alone."""
    f, swept = group[0], SWEPT[group[0].model]
    predicted = optimum(f, variances, getattr(f, swept))
    levels = theory.levels_of(predicted)
    top, described = levels[-1], "variance" if f.center else "second moment"
    collapse = predicted[f"collapse{top}"]
    if f.active > len(collapse):
        common.stop(f, f"--active: got {f.active}, there are {len(collapse)} units")
    print(f"\n{f.model} on {f.dataset if f.dataset != 'none' else f.x}: {n:,} rows, {swept} = {getattr(f, swept):g}, "
          f"eta_enc {f.eta_enc:g}, eta_dec {f.eta_dec:g}; {words}KL in nats per row")
    shares = variances / variances.sum().clamp(min=torch.finfo(torch.float64).tiny)
    for level in levels:
        print_units(f, predicted, level, shares, described)
    if f.active:
        found = recommended(collapse, f.active)
        print(f"\nfor {f.active} active units: " + (
            f"{swept} from {found[0]:.6g} on and below {found[1]:.6g}" if found else
            f"no {swept} gives just so many, since modes of equal theta collapse together"))
    betas = torch.tensor([getattr(g, swept) for g in group] if len(group) > 1 else [
        float(f"{beta:.3g}") for beta in curve_betas(collapse)[::33]], dtype=torch.float64)
    rows = {swept: betas, **trade_off(f, variances, betas)}
    formats = {swept: "{:g}", "active": "{:d}"}
    print()
    common.print_rows([list(rows), *([formats.get(name, "{:.4f}").format(value) for name, value in zip(rows, row)]
                                     for row in zip(*(values.tolist() for values in rows.values())))])
    folder = files.run_dir(f, None)
    draw(folder / "trade_off.png", f, variances, collapse, predicted, top)
    files.write_json(folder / "prediction.json", files.describe(f, None) | {
        "dataset": f.dataset if f.dataset != "none" else f.x, "rows": n, "predicted": theory.per_unit(predicted),
        "optimal_loss": predicted["loss"].item(), "trade_off": {name: values.tolist() for name, values in rows.items()}})
    print(f"files: {folder}", file=sys.stderr)


def print_units(f, predicted, level, shares, described):
    """A row a unit: the active ones, and the first three that are collapsed."""
    information = predicted[f"information{level}"]
    theta = torch.nn.functional.pad(predicted["theta"], (0, max(0, len(information) - len(predicted["theta"]))))
    if f.model == "cvae":
        theta = theta**2                                  # theorem 2 calls the variance theta
    share = torch.nn.functional.pad(shares, (0, max(0, len(information) - len(shares))))
    active = int((information > 0).sum())
    rows = [["unit", "theta", f"share of {described}", f"kl{level}", "state", f"collapses at {SWEPT[f.model]}"]]
    for i in range(min(len(information), active + 3)):
        at = predicted[f"collapse{level}"][i].item()
        rows.append([str(i + 1), f"{theta[i]:.4f}", f"{share[i]:.2%}", f"{predicted[f'kl{level}'][i]:.4f}",
                     "active" if information[i] > 0 else "collapsed", "never" if at == math.inf else f"{at:.6g}"])
    print()
    common.print_rows(rows)
    more = len(information) - len(rows) + 1
    print((f"and {more} more, all collapsed; " if more else "")
          + f"{active} of {len(information)} units{' of z' + level.removeprefix('_') if level else ''} active")


def draw(path, f, variances, collapse, predicted, top):
    """The rate-distortion curve, and under it how many units are active, over beta."""
    swept, betas = SWEPT[f.model], curve_betas(collapse)
    curve = trade_off(f, variances, betas)
    here = trade_off(f, variances, torch.tensor([getattr(f, swept)], dtype=torch.float64))

    def panels(axes):
        axes[0, 0].plot(curve["rate"], curve["distortion"], color="0.3")
        axes[0, 0].plot(here["rate"], here["distortion"], "o", color="C3", label=f"{swept} = {getattr(f, swept):g}")
        axes[0, 0].set(xlabel="rate: KL (nats per row)", ylabel="distortion: mean squared error")
        axes[1, 0].step(betas, curve["active"], where="mid", color="0.3")
        axes[1, 0].plot([getattr(f, swept)], here["active"], "o", color="C3", label=f"{swept} = {getattr(f, swept):g}")
        axes[1, 0].set(xscale="log", xlabel=swept, ylabel=f"active units{' of z' + top.removeprefix('_') if top else ''}")
        for ax in axes[:, 0]:
            ax.legend(fontsize=7)
    pictures.save_figure(path, 1, 2, 5.2, 3.2, files.spell(files.changed(f, None)), panels)


def gain_on_the_other_half(moments, ridge, count, *weights):
    """What units found on one half of the rows gain on the other, in nats per row; the mean of both ways. A ridge, as a share of all
    variance of u, keeps them from relying on what few rows of their half say: without one a column that is all but 0 in one
    half makes an enormous z of the other's."""
    return sum(theory.gain(theory.idle_units(cross, moment, count, *weights, ridge=ridge * moment.trace()), *other, *weights)
               for (cross, moment), other in (moments, moments[::-1])) / 2


def report_headroom(f, n, moments):
    """Print and draw whether the objective or training collapsed the units of a trained model, from the moments of `halves`."""
    weights, shares = (f.beta, 1, f.eta_dec), ((n + 1) // 2 / n, n // 2 / n)
    cross, moment = (sum(share * of[i] for share, of in zip(shares, moments)) for i in (0, 1))
    tau, level = theory.spectrum(theory.linear_part(cross, moment)), theory.level_of(*weights)
    nats = theory.headroom(tau, f.collapsed, *weights)
    held_out = max(gain_on_the_other_half(moments, ridge, f.collapsed, *weights) for ridge in RIDGES)
    verdict = theory.verdict(None, f.collapsed, nats)
    if (nats > theory.ACTIVE) != (held_out > theory.ACTIVE):
        verdict = verdict.partition(",")[0] + ": too few rows to tell by what"
    print(f"\n{f.x}, {f.residual}: {n:,} rows, beta = {f.beta:g}, eta_dec {f.eta_dec:g}, level {level:g}; nats per row")
    paying = int((tau[:f.collapsed] > level).sum())
    rows = [["idle unit", "tau", "tau / level", "would pay"]]
    for i in range(min(f.collapsed, len(tau), paying + 3)):
        gain = theory.headroom(tau[i:i + 1], 1, *weights)
        rows.append([str(i + 1), f"{tau[i]:.4f}", f"{tau[i] / level:.4f}", f"{gain:.4f}"])
    common.print_rows(rows)
    print(f"headroom {nats:.4f} nats; of units found on one half of the rows, measured on the other: {held_out:.4f}\n{verdict}")
    folder = files.run_dir(f, None)
    found = {"units": f.collapsed, "collapsed": f.collapsed, "headroom": nats, "level": level,
             "tau": tau[:f.collapsed].tolist(), "theta": []}
    pictures.draw_panels(folder / "headroom.png", {verdict: found}, 5.2, 3.6, files.spell(files.changed(f, None)), pictures.plot_headroom)
    files.write_json(folder / "headroom.json", files.describe(f, None) | {
        "dataset": f.x, "rows": n, **found, "held_out": held_out, "verdict": verdict})
    print(f"files: {folder}", file=sys.stderr)


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    f = settings[0]
    if f.residual:
        for name in ("y", "dataset", "model", "center", "sigma", "active"):
            if any(getattr(g, name) != getattr(Flags, name) for g in settings):
                common.stop(f, f"--{name}: has no meaning beside --residual")
        if not f.x or not all(g.collapsed for g in settings):
            common.stop(f, "--residual: wants --x, what the encoder reads, and --collapsed, at least 1")
        n, moments_of_halves = halves(f)
        for f in settings:
            report_headroom(f, n, moments_of_halves)
        return 0
    if any(g.collapsed for g in settings):
        common.stop(f, "--collapsed: wants --residual, what a trained model leaves of its target")
    if (f.dataset == "none") == (not f.x):
        common.stop(f, "--x: wants a file with an example a row, or --dataset for images instead")
    if (f.model == "cvae") != bool(f.y) and f.dataset == "none":
        common.stop(f, "--y: wants a file with targets for --model cvae, and for no other")
    groups, moment_of = {}, {}
    for f in settings:
        data = (f.model, f.dataset, f.center)
        if data not in moment_of:
            moment_of[data] = moments(f)
        others = [getattr(f, field.name) for field in dataclasses.fields(f) if field.name != SWEPT[f.model]]
        groups.setdefault(tuple(others), []).append(f)
    for group in groups.values():
        moment, n, dim_x = moment_of[group[0].model, group[0].dataset, group[0].center]
        variances, words = theory.spectrum(moment), ""
        if group[0].model == "cvae":
            variances, of_y = theory.spectrum(theory.residual(moment, dim_x)), moment[dim_x:, dim_x:].trace()
            words = f"x explains {1 - variances.sum() / of_y:.1%} of y; " if of_y > 0 else "y is 0; "
        report(group, variances, n, words)
    return 0


if __name__ == "__main__":
    common.run(main)
