"""Which latent units would collapse on your data, and which beta keeps as many as you want? The closed forms, no training.

    python predict_collapse.py --x features.npy --eta_dec 0.5 --active 12
    python predict_collapse.py --model cvae --x inputs.npy --y targets.npy --beta 0.5,1,2
    python predict_collapse.py --model hvae --dataset mnist --eta_enc 0.5 --eta_dec 0.5

Of a linear VAE, CVAE or two-level HVAE at its optimum (Dang et al. 2024, arXiv 2306.05023, theorems 1, 2, 3 and 5). All they
need of the data are its second moments: rows of an .npy, .npz, .csv or .pt file, read once, chunk by chunk.
"""
import dataclasses
import math
import pickle
import sys
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
    active: int = common.flag(0, "the number of active units to recommend a beta for (hvae: of z2, beta_2)", low=0)
    out_dir: str = common.flag("runs", "where results go")


SWEPT = {"vae": "beta", "cvae": "beta", "hvae": "beta_2"}    # by which units collapse one after another
CHUNK = 4096                                              # rows at a time


# ------------------------------------------------------------------------------------------------------------- the data

def opened(f, flag):
    """(rows(start, stop), number of rows) of the file that --x or --y names. Ends the program if it is no array of numbers."""
    path = getattr(f, flag)
    readers = {".npy": _npy, ".npz": _npz, ".csv": _csv, ".pt": _pt}
    read = readers.get(Path(path).suffix.lower())
    if not read:
        common.stop(f, f"--{flag}: got {path!r}, wants a file that ends in {', '.join(readers)}")
    try:
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
    array = torch.load(path, weights_only=True, map_location="cpu", mmap=True).numpy()
    return lambda start, stop: array[start:stop], array


def moments(f):
    """(second moment (d, d) of x, or of x and y joined, float64; number of rows; columns of x). One pass over the rows."""
    if f.dataset != "none":
        [data] = (datasets.load_mnist_quarters if f.model == "cvae" else datasets.load_mnist)([f])
        files = [((lambda start, stop, t=t: t[start:stop].cpu().numpy()), len(t)) for t in data.train]
    else:
        files = [opened(f, flag) for flag in (("x", "y") if f.model == "cvae" else ("x",))]
    n = files[0][1]
    if len(files) == 2 and files[1][1] != n:
        common.stop(f, f"--y: {files[1][1]:,} rows, wants as many as --x: {n:,}")
    if n < 2:
        common.stop(f, "--x: one row, wants at least 2")
    moment, total, progress = 0, 0, common.Progress("reading", n, "rows")
    for start in range(0, n, CHUNK):
        parts = [rows(start, start + CHUNK).reshape(min(CHUNK, n - start), -1) for rows, _ in files]
        for flag, part in zip("xy", parts):
            if not np.isfinite(part).all():
                row = start + int(np.argmax(~np.isfinite(part).all(1)))
                common.stop(f, f"--{flag}: row {row:,} (from 0) holds {part[row - start][~np.isfinite(part[row - start])][0]}, "
                               "wants finite numbers")
        chunk = np.concatenate(parts, axis=1, dtype=np.float64)
        moment, total = moment + chunk.T @ chunk, total + chunk.sum(0)      # numpy computes half of a symmetric product
        progress.update(min(n, start + CHUNK))
    progress.update(n, end=True)
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


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    f = settings[0]
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
