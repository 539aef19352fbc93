"""Predict which latent units would collapse on your data, and which beta keeps a given number of
them active. Nothing is trained: the predictions are closed forms.

    python predict_collapse.py --x features.npy --eta_dec 0.5 --active 12
    python predict_collapse.py --model cvae --x inputs.npy --y targets.npy --beta 0.5,1,2
    python predict_collapse.py --model hvae --dataset mnist --eta_enc 0.5 --eta_dec 0.5
    python predict_collapse.py --x u.npy --residual r.npy --eta_dec 0.5 --beta 1.0 --collapsed 9

The predictions describe a linear VAE, CVAE or two-level HVAE at its optimum (Dang et al. 2024,
arXiv 2306.05023, theorems 1, 2, 3 and 5). They depend on the data only through second moments. The
data are the rows of an .npy, .npz, .csv or .pt file, or of a data set of images.

With --residual the script does a post-mortem instead. It decides whether the objective or training
collapsed the units of a VAE that you have trained, which need not be linear. See headroom.py.

The file has four parts: the data, the prediction, its report, and the post-mortem.
"""
import csv
import dataclasses
import math
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import common
import numpy as np
import torch

import datasets
import files
import headroom
import pictures
import theory
import verify

# Limits of the stds. The square of a number between them is neither 0 nor infinite in float64.
# Numbers in a file have the same upper limit.
SMALLEST = 1e-100
LARGEST = 1e100

# The upper limit of sigma, which is rounded to float32.
LARGEST_SIGMA = 1e38

# The largest number of units. Units beyond the columns of the data are always collapsed.
MAX_UNITS = 10_000

# The number of rows that are read at a time.
CHUNK = 4096

# The flag that collapses the units of each model one after another.
SWEPT_FLAGS = {"vae": "beta", "cvae": "beta", "hvae": "beta_2"}

# The scalars of the objective.
SCALARS = ("beta", "beta_1", "beta_2", "eta_enc", "eta_dec", "sigma", "sigma_1", "sigma_2")

# The ridges that the post-mortem tries, as shares of the total variance of u. The ridge with the
# largest gain counts, since each gain is measured on rows that were not used for the fit.
RIDGES = (0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


@dataclass
class Flags(common.BaseFlags):
    epilog = (
        "The value of a flag that takes a number may be a list such as 0.1,0.5,1.0 or a range "
        "first:last:step such as 0.1:5.0:0.1, which includes its last value. Every combination is "
        "reported."
    )

    # This is no flag: all arithmetic is in float64 on the CPU.
    device = "cpu"

    x: str = common.flag(
        "",
        "file (.npy, .npz, .csv or .pt) with one example per row; examples of more than one "
        "dimension are flattened",
        metavar="FILE",
    )
    y: str = common.flag(
        "", "file with the targets of a CVAE, one row for each row of --x", metavar="FILE"
    )
    dataset: str = common.flag(
        "none",
        "data set whose training images replace --x; for a CVAE, x is a quarter of each image and "
        "y the rest",
        choices=("none", "mnist", "fashion", "digits"),
    )
    data_dir: str = common.flag("data", "folder that holds the data sets", metavar="FOLDER")
    center: bool = common.flag(
        False, "subtract the mean of each column, which a model with biases would learn"
    )
    model: str = common.flag("vae", "kind of linear model", choices=("vae", "cvae", "hvae"))
    beta: float = common.flag(
        1.0, "weight of the KL in the loss of a VAE or CVAE", above=0, high=LARGEST
    )
    beta_1: float = common.flag(
        1.0, "weight of KL(q(z1|x) || p(z1|z2)) in the loss of an HVAE", above=0, high=LARGEST
    )
    beta_2: float = common.flag(
        1.0, "weight of KL(q(z2|z1) || p(z2)) in the loss of an HVAE", above=0, high=LARGEST
    )
    eta_enc: float = common.flag(
        1.0, "standard deviation of the prior p(z), in an HVAE p(z2)", above=SMALLEST, high=LARGEST
    )
    eta_dec: float = common.flag(
        1.0,
        "standard deviation of the decoder, in an HVAE of p(x|z1) and p(z1|z2)",
        above=SMALLEST,
        high=LARGEST,
    )
    sigma: float = common.flag(
        0.0,
        "standard deviation of the encoder of a VAE or CVAE if it is fixed; 0 means that it is "
        "learnable",
        low=0,
        high=LARGEST_SIGMA,
    )
    sigma_1: float = common.flag(
        0.5,
        "standard deviation of the encoder q(z1|x) of an HVAE, which is fixed",
        above=SMALLEST,
        high=LARGEST,
    )
    sigma_2: float = common.flag(
        0.0,
        "standard deviation of the encoder q(z2|z1) of an HVAE if it is fixed; 0 means that it is "
        "learnable",
        low=0,
        high=LARGEST,
    )
    d_1: int = common.flag(
        0,
        "number of units of z, in an HVAE of z1; 0 means one unit for each mode of the data",
        low=0,
        high=MAX_UNITS,
    )
    d_2: int = common.flag(
        0, "number of units of z2 of an HVAE; 0 means as many as z1 has", low=0, high=MAX_UNITS
    )
    residual: str = common.flag(
        "",
        "file with the targets of a trained model minus its reconstructions, one row for each row "
        "of --x; --x then has the inputs of its encoder",
        metavar="FILE",
    )
    collapsed: int = common.flag(
        0,
        "number of collapsed units of the trained model; only with --residual",
        low=0,
        high=MAX_UNITS,
    )
    active: int = common.flag(
        0,
        "number of active units for which beta is recommended, in an HVAE of z2 and beta_2; 0 asks "
        "for no recommendation",
        low=0,
    )
    out_dir: str = common.flag("runs", "folder for the results", metavar="FOLDER")


# ------------------------------------------------------------------------------------- the data

@dataclass
class Rows:
    """The rows of a file or of a data set, to be read chunk by chunk.

    flag: the flag that names the file, for messages.
    count: the number of rows.
    columns: the number of columns, once each row is flattened.
    read: read(start, stop) gives the rows from start up to stop, an array (rows, ...).
    place: place(row, column), which count from 0, describes the place of a number in words.
    """
    flag: str
    count: int
    columns: int
    read: Callable
    place: Callable


def open_rows(f, flags):
    """A list of Rows: the data set of --dataset, or the file of each of the flags.

    Ends the program if a file holds no array of numbers, or if their numbers of rows differ.
    """
    if f.dataset != "none":
        return open_data_set(f)

    sources = [open_file(f, flag) for flag in flags]
    count = sources[0].count
    for source in sources:
        if source.count != count:
            common.stop(
                f,
                f"--{source.flag}: got {source.count:,} rows, wants {count:,} rows like --x",
            )
    if count < 2:
        common.stop(f, "--x: got one row, wants at least 2 rows")
    return sources


def open_data_set(f):
    """A list of Rows: the training images of --dataset, for a CVAE their x and their y."""
    if f.model == "cvae":
        [data] = datasets.load_mnist_quarters([f])
    else:
        [data] = datasets.load_mnist([f])

    sources = []
    for flag, images in zip(("x", "y"), data.train):
        sources.append(rows_of_array(flag, images.cpu().numpy()))
    return sources


def open_file(f, flag):
    """Rows of the file that a flag names. Ends the program if it holds no array of numbers."""
    path = getattr(f, flag)
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        common.stop(
            f, f"--{flag}: got {path!r}, wants a file whose name ends in {', '.join(READERS)}"
        )
    if os.path.exists(path) and not os.path.isfile(path):
        common.stop(
            f, f"--{flag}: got {path!r}, wants a regular file, not a folder, device or pipe"
        )

    try:
        with warnings.catch_warnings():
            # numpy and torch warn of some files that are refused here, such as sparse tensors.
            warnings.simplefilter("ignore")
            return READERS[suffix](flag, path)
    except MemoryError:
        raise
    except Exception as error:
        # numpy and torch raise many kinds of errors for broken files.
        reason = getattr(error, "strerror", None) or str(error) or "the file is empty"
        common.stop(
            f, f"--{flag}: {path!r} cannot be read as an array: {reason.splitlines()[0]}"
        )


def read_npy(flag, path):
    """Rows of an .npy file. At most one chunk of it is in memory at any time."""
    array = np.load(path, mmap_mode="r")
    if not isinstance(array, np.ndarray):
        raise ValueError("it is not in the format .npy")
    rows = rows_of_array(flag, array)

    def read(start, stop):
        # A memory map keeps the pages that were read, so each chunk gets its own map.
        return np.load(path, mmap_mode="r")[start:stop]

    return dataclasses.replace(rows, read=read)


def read_npz(flag, path):
    """Rows of the only array of an .npz file."""
    arrays = np.load(path)
    if isinstance(arrays, np.ndarray):
        raise ValueError("it is not in the format .npz")
    with arrays:
        names = arrays.files
        if len(names) != 1:
            raise ValueError(
                f"it contains {len(names)} arrays ({', '.join(names)}), wants exactly one"
            )
        return rows_of_array(flag, arrays[names[0]])


def read_pt(flag, path):
    """Rows of the tensor of a .pt file."""
    tensor = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    if not torch.is_tensor(tensor):
        raise ValueError(f"it contains a {type(tensor).__name__}, wants a tensor")
    if tensor.dtype == torch.bfloat16:
        # numpy has no bfloat16.
        tensor = tensor.float()
    return rows_of_array(flag, tensor.detach().numpy())


def read_csv(flag, path):
    """Rows of a .csv file. A first line without any number holds the names of the columns.

    Blank lines and lines that begin with # are skipped.
    """
    names = []
    numbers = []
    lines = []
    # Spreadsheets begin a file with a byte order mark, which the encoding utf-8-sig drops.
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        for cells in reader:
            is_blank = len(cells) <= 1 and not "".join(cells).strip()
            if is_blank or cells[0].lstrip().startswith("#"):
                continue
            if not names and not numbers and not any(is_number(cell) for cell in cells):
                names = cells
                continue
            if numbers and len(cells) != len(numbers[0]):
                raise ValueError(
                    f"line {reader.line_num:,} has {len(cells)} cells, wants {len(numbers[0])} as "
                    f"in line {lines[0]:,}"
                )
            numbers.append(parse_cells(cells, reader.line_num, names))
            lines.append(reader.line_num)

    if not numbers:
        raise ValueError("it contains no rows of numbers")

    def place(row, column):
        return csv_place(lines[row], column, names)

    return dataclasses.replace(rows_of_array(flag, np.stack(numbers)), place=place)


def parse_cells(cells, line, names):
    """The numbers (columns,) in a line of a .csv file. Raises ValueError that names a bad cell."""
    numbers = []
    for column, cell in enumerate(cells):
        try:
            numbers.append(float(cell))
        except ValueError:
            place = csv_place(line, column, names)
            raise ValueError(f"{place} is {cell[:40]!r}, wants a number") from None
    return np.array(numbers)


def is_number(text):
    """Whether a text is a number. "nan" and "inf" are numbers here."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def csv_place(line, column, names):
    """The place of a cell, in words. column counts from 0, and names may be empty."""
    name = f" ({names[column].strip()[:40]!r})" if column < len(names) else ""
    return f"line {line:,}, column {column + 1:,}{name}"


# The function that reads each kind of file.
READERS = {".npy": read_npy, ".npz": read_npz, ".csv": read_csv, ".pt": read_pt}


def rows_of_array(flag, array):
    """Rows of an array (rows, ...). Raises ValueError if it holds no rows of numbers."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"its values have the type {array.dtype}, wants real numbers")
    # The targets of a CVAE may be a vector: one number for each row of --x.
    least_dimensions = 2 if flag == "x" else 1
    if array.ndim < least_dimensions or not array.size:
        raise ValueError(f"its shape is {array.shape}, wants one row of numbers per example")

    def read(start, stop):
        return array[start:stop]

    def place(row, column):
        return f"row {row:,} (counted from 0)"

    return Rows(flag=flag, count=len(array), columns=array[0].size, read=read, place=place)


def chunks(f, sources):
    """The rows of all sources, chunk by chunk: a list with an array (rows, columns) per source.

    Arrays are float64. Ends the program if a number is not finite, or if its square is not.
    """
    count = sources[0].count
    progress = common.Progress("reading", count, "rows")
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        parts = []
        for source in sources:
            rows = source.read(start, start + CHUNK).reshape(size, -1).astype(np.float64)
            check_numbers(f, source, rows, start)
            parts.append(rows)
        yield parts
        progress.update(start + size)
    progress.update(count, end=True)


def check_numbers(f, source, rows, start):
    """End the program if one of the rows (rows, columns) from start on holds a bad number."""
    is_bad = ~(np.abs(rows) <= LARGEST)
    if not is_bad.any():
        return
    row, column = np.argwhere(is_bad)[0]
    value = rows[row, column]
    if np.isfinite(value):
        wanted = f"numbers up to {LARGEST:g}, so that their squares can be summed"
    else:
        wanted = "finite numbers"
    common.stop(
        f,
        f"--{source.flag}: a number in {source.place(start + row, column)} is {value:.3g}, wants "
        f"{wanted}",
    )


@dataclass
class Moment:
    """The second moment of the data.

    matrix: E[v v^T] (d, d), float64. v is a row of x, or of x and y joined for a CVAE. With
        --center it is the covariance.
    count: the number of rows.
    dim_x: the number of columns of x.
    """
    matrix: torch.Tensor
    count: int
    dim_x: int


def measure_moment(f):
    """The Moment of the data, in one pass over the rows. Warns of columns without information."""
    sources = open_rows(f, ("x", "y") if f.model == "cvae" else ("x",))
    matrix = 0
    mean = 0
    for parts in chunks(f, sources):
        rows = np.concatenate(parts, axis=1)
        # numpy computes only half of a symmetric product.
        matrix = matrix + rows.T @ rows
        mean = mean + rows.sum(0)

    count = sources[0].count
    matrix = matrix / count
    mean = mean / count
    if f.center:
        matrix = matrix - np.outer(mean, mean)
    warn_of_data(f, matrix, mean, count)
    return Moment(matrix=torch.from_numpy(matrix), count=count, dim_x=sources[0].columns)


def warn_of_data(f, matrix, mean, count):
    """Warn of constant columns, and of fewer rows than columns."""
    columns = len(mean)
    variance = np.diag(matrix)
    if not f.center:
        variance = variance - mean**2
    is_constant = variance <= 1e-12 * np.maximum(mean**2, variance.max())

    zeros = (is_constant & (mean == 0)).sum()
    if zeros:
        verb = "is" if zeros == 1 else "are"
        warn(f"{zeros} of {columns} columns {verb} 0 in every row")

    constants = (is_constant & (mean != 0)).sum()
    if constants:
        verb = "is" if constants == 1 else "are"
        remedy = "" if f.center else "; a unit describes the constants, unless you give --center"
        warn(f"{constants} of {columns} columns {verb} constant{remedy}")

    if count < columns:
        warn(
            f"there are fewer rows ({count:,}) than columns ({columns:,}), so there are at most "
            f"{count:,} modes, and they describe new rows less well than these"
        )


def warn(message):
    """Print a warning on stderr."""
    print(f"warning: {message}", file=sys.stderr)


# ------------------------------------------------------------------------------- the prediction

@dataclass
class Modes:
    """The modes that the latent units can describe.

    variances: (D,), float64, in descending order. For a CVAE these are the variances of the part
        of y that x does not explain linearly.
    count: the number of rows of the data.
    explained: for a CVAE, a sentence on how much of y is explained by x; else "".
    """
    variances: torch.Tensor
    count: int
    explained: str


@dataclass
class Prediction:
    """The prediction for settings that differ in the swept beta only. See SWEPT_FLAGS.

    f: the first of the settings.
    modes: the Modes of the data.
    predicted: the closed form for f, {name: (units,)}. See theory.py.
    collapse: the betas at which the units of the swept beta's level collapse, (units,).
    table: the `trade_off` to print, {column: (m,)}. The first column is the beta. The m betas are
        those of the settings. If there is only one setting, they are betas around `collapse`.
    curve: the `trade_off` to draw, with the same columns, at the `curve_betas`.
    point: the `trade_off` of f, with the same columns and m = 1.
    """
    f: Flags
    modes: Modes
    predicted: dict
    collapse: torch.Tensor
    table: dict
    curve: dict
    point: dict


def predict(settings):
    """The Prediction for each group of settings that differ in the swept beta only.

    Ends the program if a result is not finite, or if --active exceeds the number of units.
    """
    groups = {}
    modes_of_data = {}
    for f in settings:
        data = (f.model, f.dataset, f.center)
        if data not in modes_of_data:
            modes_of_data[data] = measure_modes(f)

        other_flags = []
        for field in dataclasses.fields(f):
            if field.name != SWEPT_FLAGS[f.model]:
                other_flags.append(getattr(f, field.name))
        groups.setdefault(tuple(other_flags), []).append(f)

    predictions = []
    for group in groups.values():
        f = group[0]
        predictions.append(predict_group(group, modes_of_data[f.model, f.dataset, f.center]))
    return predictions


def measure_modes(f):
    """The Modes of the data of --x and --y, or of --dataset."""
    moment = measure_moment(f)
    if f.model != "cvae":
        return Modes(variances=theory.spectrum(moment.matrix), count=moment.count, explained="")

    variances = theory.spectrum(theory.moment_given_x(moment.matrix, moment.dim_x))
    variance_of_y = moment.matrix[moment.dim_x:, moment.dim_x:].trace()
    explained = "y is 0 in every row, so the units have nothing to describe."
    if variance_of_y > 0:
        share = 1 - variances.sum() / variance_of_y
        explained = (
            f"A linear map of x explains {share:.1%} of the {share_name(f)} of y. The units can "
            "describe the rest."
        )
    return Modes(variances=variances, count=moment.count, explained=explained)


def predict_group(group, modes):
    """The Prediction for a group of settings that differ in the swept beta only."""
    f = group[0]
    swept = SWEPT_FLAGS[f.model]
    predicted = optimum(f, modes.variances, getattr(f, swept))
    check_finite(group, predicted)

    collapse = predicted[f"collapse{swept_level(f)}"]
    if f.active > len(collapse):
        common.stop(
            f, f"--active: got {f.active}, wants at most {len(collapse)}, the number of units"
        )

    betas_to_draw = curve_betas(collapse)
    betas_to_print = [getattr(g, swept) for g in group]
    if len(group) == 1:
        betas_to_print = [float(f"{beta:.3g}") for beta in betas_to_draw[::33].tolist()]

    return Prediction(
        f=f,
        modes=modes,
        predicted=predicted,
        collapse=collapse,
        table=finite_trade_off(group, modes, betas_to_print),
        curve=finite_trade_off(group, modes, betas_to_draw),
        point=finite_trade_off(group, modes, [getattr(f, swept)]),
    )


def finite_trade_off(group, modes, betas):
    """The `trade_off` of a group at betas (m,) as a table, {column: (m,)}, with the betas first.

    Ends the program if a number in it is not finite.
    """
    f = group[0]
    betas = torch.as_tensor(betas, dtype=torch.float64)
    table = {SWEPT_FLAGS[f.model]: betas, **trade_off(f, modes.variances, betas)}
    check_finite(group, table)
    return table


def check_finite(settings, results):
    """End the program if one of the results, {name: numbers}, is infinite or not a number.

    The message names the flags of the settings that are not at their default. Only the betas at
    which units collapse may be infinite: such a unit never collapses.
    """
    for name, numbers in results.items():
        numbers = torch.as_tensor(numbers, dtype=torch.float64)
        is_wrong = numbers.isnan() if name.startswith("collapse") else ~numbers.isfinite()
        if is_wrong.any():
            flags = ", ".join(changed_scalars(settings)) or "--x"
            common.stop(
                settings[0],
                f"{flags}: {name} is not finite for these values, wants less extreme values",
            )


def changed_scalars(settings):
    """The flags for scalars of the objective that are not at their default in all settings."""
    flags = []
    for name in SCALARS:
        if any(getattr(f, name) != getattr(Flags, name) for f in settings):
            flags.append(f"--{name}")
    return flags


def swept_level(f):
    """The suffix of the level whose units the swept beta collapses."""
    return "_2" if f.model == "hvae" else ""


def optimum(f, variances, beta):
    """The closed form of --model for modes with these variances (D,). See theory.py.

    beta takes the place of f's swept beta. It is a number or a tensor (...,). For a CVAE the
    result is that of a VAE of the part of y that x does not explain (theorem 2).
    """
    theta = variances.sqrt()
    d_1 = f.d_1 or max(1, int((variances > 0).sum()))
    if f.model == "hvae":
        d_2 = f.d_2 or d_1
        arguments = {
            "theta": theta,
            "d_1": d_1,
            "d_2": d_2,
            "sigma_1": f.sigma_1,
            "beta_1": f.beta_1,
            "beta_2": beta,
            "eta_enc": f.eta_enc,
            "eta_dec": f.eta_dec,
        }
        if f.sigma_2:
            return theory.hvae_optimum_fixed_sigma_2(sigma_2=f.sigma_2, **arguments)
        return theory.hvae_optimum(**arguments)

    if f.sigma:
        # Like the scripts with a fixed sigma, this rounds it to float32.
        sigma = torch.full((d_1,), f.sigma)
        return theory.vae_optimum_fixed_sigma(
            theta, sigma, beta, eta_enc=f.eta_enc, eta_dec=f.eta_dec
        )
    return theory.vae_optimum(theta, d_1, beta, eta_enc=f.eta_enc, eta_dec=f.eta_dec)


def trade_off(f, variances, beta):
    """The rate-distortion trade-off over beta (m,), which takes the place of f's swept beta.

    Returns, each (m,):
      active      the number of active units of the level that beta acts on
      rate        the sum of the KL terms, in nats per row
      distortion  the mean squared error
      loss        the least negative beta-ELBO L*, in nats per row

    L* = distortion / (2 eta_dec^2) + D/2 log(2 pi eta_dec^2) + the KL terms, each times its beta.
    """
    predicted = optimum(f, variances, beta)
    loss = predicted["loss"]
    if f.model == "hvae":
        kl_1 = predicted["kl_1"].sum(-1)
        kl_2 = predicted["kl_2"].sum(-1)
        rate = kl_1 + kl_2
        weighted_rate = f.beta_1 * kl_1 + beta * kl_2
    else:
        rate = predicted["kl"].sum(-1)
        weighted_rate = beta * rate

    constant = len(variances) / 2 * math.log(2 * math.pi * f.eta_dec**2)
    return {
        "active": (predicted[f"information{swept_level(f)}"] > 0).sum(-1),
        "rate": rate,
        "distortion": (loss - constant - weighted_rate) * 2 * f.eta_dec**2,
        "loss": loss,
    }


def recommended_betas(collapse, active):
    """(low, high): exactly `active` units are active if low <= beta < high, or None if never.

    collapse (d,) are the betas at which the units collapse.
    """
    ends = sorted([math.inf, *collapse.tolist(), 0.0], reverse=True)
    high = ends[active]
    low = ends[active + 1] if active < len(collapse) else 0.0
    return (low, high) if low < high else None


def curve_betas(collapse):
    """400 betas around those at which units collapse (d,), evenly on a log scale: (400,).

    They span four decades, and a little more, at most.
    """
    # A beta outside these limits is a rounding error of 0 or of infinity.
    ends = [beta for beta in collapse.tolist() if 1e-300 < beta < 1e300]
    ends = [beta for beta in ends if beta >= 1e-4 * max(ends)]
    if not ends:
        ends = [1.0]
    low = math.log10(min(ends) / 3)
    high = math.log10(max(ends) * 3)
    return torch.logspace(low, high, 400, dtype=torch.float64)


# ------------------------------------------------------------------------ the prediction's report

def report_prediction(prediction):
    """Print, draw and save a prediction."""
    f = prediction.f
    print_answer(prediction)
    for level in theory.levels_of(prediction.predicted):
        print_units(prediction, level)
    print_trade_off(prediction)

    folder = files.run_dir(f, None)
    draw_trade_off(folder / "trade_off.png", prediction)
    save_prediction(folder / "prediction.json", prediction)
    print(f"files: {folder}", file=sys.stderr)


def print_answer(prediction):
    """Print how many units are active, and for which betas --active of them are, in words."""
    f = prediction.f
    counts = []
    for level in theory.levels_of(prediction.predicted):
        information = prediction.predicted[f"information{level}"]
        active = int((information > 0).sum())
        counts.append(f"{active} of {len(information)} units{of_level(level)}")

    print(
        f"\nThe optimal linear {f.model.upper()} on {data_name(f)} "
        f"({prediction.modes.count:,} rows) keeps {' and '.join(counts)} active."
    )
    print(f"Its objective has {objective_in_words(f)}.")
    if prediction.modes.explained:
        print(prediction.modes.explained)
    if f.active:
        print(recommendation(f, prediction.collapse))


def data_name(f):
    """The data set or the file of x."""
    return f.dataset if f.dataset != "none" else f.x


def share_name(f):
    """The name of the matrix whose eigenvalues are the variances of the modes."""
    return "variance" if f.center else "second moment"


def objective_in_words(f):
    """The scalars of the objective, as in "beta = 1, eta_enc = 1, eta_dec = 1 and ..."."""
    if f.model == "hvae":
        names = ["beta_1", "beta_2", "eta_enc", "eta_dec", "sigma_1"]
        last_name = "sigma_2"
    else:
        names = ["beta", "eta_enc", "eta_dec"]
        last_name = "sigma"

    scalars = ", ".join(f"{name} = {getattr(f, name):g}" for name in names)
    std = getattr(f, last_name)
    last = f"a fixed {last_name} = {std:g}" if std else f"a learnable {last_name}"
    return f"{scalars} and {last}"


def recommendation(f, collapse):
    """A sentence on the values of the swept beta that keep exactly --active units active.

    collapse (d,) are the betas at which the units collapse.
    """
    swept = SWEPT_FLAGS[f.model]
    noun = "unit" if f.active == 1 else "units"
    units = f"{f.active} {noun}{of_level(swept_level(f))}"
    betas = recommended_betas(collapse, f.active)
    if betas is not None:
        verb = "is" if f.active == 1 else "are"
        return f"Exactly {units} {verb} active for {interval_in_words(swept, *betas)}."

    most = int((collapse > 0).sum())
    least = int(collapse.isinf().sum())
    if f.active > most:
        reason = f"at most {most} can be active"
    elif f.active < least:
        reason = f"{least} units never collapse"
    else:
        reason = "modes with equal theta collapse together"
    return f"No {swept} keeps exactly {units} active, because {reason}."


def interval_in_words(name, low, high):
    """The numbers from low (included) to high (excluded), as in "0.5 <= beta < 2"."""
    if low == 0 and high == math.inf:
        return f"every {name}"
    if low == 0:
        return f"{name} < {high:.6g}"
    if high == math.inf:
        return f"{name} >= {low:.6g}"
    return f"{low:.6g} <= {name} < {high:.6g}"


def print_units(prediction, level):
    """Print one row for each active unit of a level, and for the first three collapsed ones."""
    f = prediction.f
    predicted = prediction.predicted
    information = predicted[f"information{level}"]
    units = len(information)
    active = int((information > 0).sum())

    # Units without a mode of their own have theta = 0.
    theta = pad(predicted["theta"], units)
    if f.model == "cvae":
        # `optimum` returns roots, but theorem 2 calls the variances themselves theta.
        theta = theta**2
    variances = prediction.modes.variances
    total = variances.sum().clamp(min=torch.finfo(torch.float64).tiny)
    shares = pad(variances / total, units)

    swept = SWEPT_FLAGS[f.model]
    share = f"share of {share_name(f)}"
    table = [["unit", "theta", share, f"kl{level}", "state", f"collapses at {swept}"]]
    shown = min(units, active + 3)
    for i in range(shown):
        collapse = predicted[f"collapse{level}"][i].item()
        table.append([
            str(i + 1),
            f"{theta[i]:.4f}",
            f"{shares[i]:.2%}",
            f"{predicted[f'kl{level}'][i]:.4f}",
            "active" if information[i] > 0 else "collapsed",
            "never" if collapse == math.inf else f"{collapse:.6g}",
        ])
    print(f"\nUnits{of_level(level) or ' of z'}, with their KL in nats per row")
    common.print_table(table)
    if shown < units:
        print(f"The other {units - shown} units are collapsed, too.")


def pad(values, count):
    """values (n,) with zeros at its end, so that there are at least count of them."""
    return torch.nn.functional.pad(values, (0, max(0, count - len(values))))


def of_level(level):
    """The words after "units" that name a level of an HVAE."""
    return f" of z{level.removeprefix('_')}" if level else ""


def print_trade_off(prediction):
    """Print the `trade_off` of a prediction, with one row per beta."""
    f = prediction.f
    columns = prediction.table
    table = [list(columns)]
    for row in zip(*(values.tolist() for values in columns.values())):
        beta, active, *others = row
        table.append([f"{beta:g}", str(active), *(f"{value:.4f}" for value in others)])

    level = swept_level(f)
    count = f" The column active counts units{of_level(level)}." if level else ""
    print(
        f"\nTrade-off over {SWEPT_FLAGS[f.model]}.{count} Rate and loss are in nats per row, and "
        "distortion is the squared error per row."
    )
    common.print_table(table)


def save_prediction(path, prediction):
    """Write prediction.json."""
    predicted = prediction.predicted
    result = files.description(prediction.f, None)
    result["dataset"] = data_name(prediction.f)
    result["rows"] = prediction.modes.count
    result["predicted"] = verify.per_unit(predicted)
    result["optimal_loss"] = predicted["loss"].item()
    result["trade_off"] = {name: values.tolist() for name, values in prediction.table.items()}
    files.write_json(path, result)


def draw_trade_off(path, prediction):
    """Draw the rate-distortion curve and, below it, the number of active units over beta."""
    f = prediction.f
    curve = prediction.curve
    point = prediction.point
    swept = SWEPT_FLAGS[f.model]
    label = f"{swept} = {getattr(f, swept):g}"

    def draw(axes):
        upper, lower = axes[:, 0]
        upper.plot(curve["rate"], curve["distortion"], color="0.3")
        upper.plot(point["rate"], point["distortion"], "o", color="C3", label=label)
        upper.set(xlabel="rate: KL (nats per row)", ylabel="distortion: mean squared error")

        lower.step(curve[swept], curve["active"], where="mid", color="0.3")
        lower.plot(point[swept], point["active"], "o", color="C3", label=label)
        units = f"active units{of_level(swept_level(f))}"
        lower.set(xscale="log", xlabel=swept, ylabel=units)
        lower.locator_params(axis="y", integer=True)
        for ax in (upper, lower):
            ax.legend(fontsize=7)

    pictures.save_figure(
        path,
        columns=1,
        rows=2,
        width=5.2,
        height=3.2,
        caption=files.spell(files.changed_settings(f, None)),
        draw=draw,
    )


# ------------------------------------------------------------------------------- the post-mortem

@dataclass
class PostMortem:
    """The headroom of a trained model, from its residuals. See headroom.py.

    f: the setting.
    count: the number of rows.
    level: the threshold, a variance. A linear unit with a larger tau gains more than its KL costs.
    tau: (D,), the eigenvalues of T in descending order.
    gain: the headroom G_k on all rows, in nats per row.
    held_out: the gain on one half of the rows of units that were found on the other half.
    verdict: whether the objective or training collapsed the units, in words.
    """
    f: Flags
    count: int
    level: float
    tau: torch.Tensor
    gain: float
    held_out: float
    verdict: str


def examine(settings):
    """The PostMortem of each setting. Ends the program if a result is not finite."""
    count, moments = measure_halves(settings[0])
    return [examine_one(f, count, moments) for f in settings]


def measure_halves(f):
    """The moments of the even and of the odd rows, in one pass over the rows.

    Returns (number of rows, [(C, A) of the even rows, (C, A) of the odd rows]), float64.
    C = E[r u^T] is (D, p) and A = E[u u^T] is (p, p). u is a row of --x with a 1 at its end, and r
    is the row of --residual.
    """
    sources = open_rows(f, ("x", "residual"))
    cross = [0, 0]
    moment = [0, 0]
    for u, r in chunks(f, sources):
        u = np.concatenate([u, np.ones_like(u[:, :1])], axis=1)
        # CHUNK is even, so a chunk begins with an even row.
        for half in (0, 1):
            half_u = u[half::2]
            half_r = r[half::2]
            cross[half] = cross[half] + half_r.T @ half_u
            moment[half] = moment[half] + half_u.T @ half_u

    moments = []
    for half, size in enumerate(half_sizes(sources[0].count)):
        moments.append((
            torch.from_numpy(cross[half] / size),
            torch.from_numpy(moment[half] / size),
        ))
    return sources[0].count, moments


def half_sizes(count):
    """The number of even rows and the number of odd rows, among count rows."""
    return (count + 1) // 2, count // 2


def examine_one(f, count, moments):
    """The PostMortem of one setting, from the moments of the halves of count rows."""
    objective = {"beta": f.beta, "weight": 1, "std": f.eta_dec}
    (even_cross, even_moment), (odd_cross, odd_moment) = moments
    even_count, odd_count = half_sizes(count)
    even_share = even_count / count
    odd_share = odd_count / count
    cross = even_share * even_cross + odd_share * odd_cross
    moment = even_share * even_moment + odd_share * odd_moment

    level = headroom.pay_level(**objective)
    tau = theory.spectrum(headroom.linear_part(cross, moment))
    gain = headroom.gain_of_units(tau, f.collapsed, **objective)
    held_out_gains = []
    for ridge in RIDGES:
        held_out_gains.append(headroom.held_out_gain(moments, ridge, f.collapsed, **objective))
    check_finite(
        [f],
        {"level": level, "tau": tau, "headroom": gain, "held-out headroom": held_out_gains},
    )

    held_out = max(held_out_gains)
    verdict = headroom.verdict(None, f.collapsed, gain)
    if (gain > theory.ACTIVE) != (held_out > theory.ACTIVE):
        verdict = (
            f"{headroom.collapse_in_words(None, f.collapsed)}: there are too few rows to decide "
            "whether because of the objective or of training"
        )
    return PostMortem(
        f=f,
        count=count,
        level=level,
        tau=tau,
        gain=gain,
        held_out=held_out,
        verdict=verdict,
    )


def report_post_mortem(post_mortem):
    """Print, draw and save whether the objective or training collapsed the units."""
    f = post_mortem.f
    print(f"\nWith beta = {f.beta:g} and eta_dec = {f.eta_dec:g}, {post_mortem.verdict}.")
    print(
        f"The headroom is {post_mortem.gain:.4f} nats per row, from the {post_mortem.count:,} rows "
        f"of {f.x} and {f.residual}."
    )
    print(
        f"The held-out headroom is {post_mortem.held_out:.4f} nats per row. Its units are fitted "
        "on one half of the rows and measured on the other half."
    )
    print_linear_units(post_mortem)

    folder = files.run_dir(f, None)
    draw_post_mortem(folder / "headroom.png", post_mortem)
    save_post_mortem(folder / "headroom.json", post_mortem)
    print(f"files: {folder}", file=sys.stderr)


def print_linear_units(post_mortem):
    """Print one row for each linear unit that would lower the loss, and for the next three."""
    f = post_mortem.f
    tau = post_mortem.tau
    level = post_mortem.level
    table = [["unit", "tau", "tau / threshold", "gain (nats)"]]
    gaining = int((tau[:f.collapsed] > level).sum())
    for i in range(min(f.collapsed, len(tau), gaining + 3)):
        gain = headroom.gain_of_units(tau[i:i + 1], 1, beta=f.beta, weight=1, std=f.eta_dec)
        table.append([str(i + 1), f"{tau[i]:.4f}", f"{tau[i] / level:.4f}", f"{gain:.4f}"])

    print(
        "\nLinear units in place of the collapsed ones. A unit lowers the loss if its tau exceeds "
        f"the threshold beta eta_dec^2 = {level:g}."
    )
    common.print_table(table)


def level_headroom(post_mortem):
    """The post-mortem as a headroom.LevelHeadroom. Only the collapsed units are known."""
    f = post_mortem.f
    return headroom.LevelHeadroom(
        units=f.collapsed,
        collapsed=f.collapsed,
        headroom=post_mortem.gain,
        level=post_mortem.level,
        tau=post_mortem.tau[:f.collapsed].tolist(),
        theta=[],
    )


def draw_post_mortem(path, post_mortem):
    """Draw the variance that each collapsed unit could describe, beside the threshold."""
    pictures.draw_panels(
        path,
        {post_mortem.verdict: level_headroom(post_mortem)},
        width=5.2,
        height=4.2,
        caption=files.spell(files.changed_settings(post_mortem.f, None)),
        draw=pictures.plot_headroom,
    )


def save_post_mortem(path, post_mortem):
    """Write headroom.json."""
    result = files.description(post_mortem.f, None)
    result["dataset"] = post_mortem.f.x
    result["rows"] = post_mortem.count
    result.update(dataclasses.asdict(level_headroom(post_mortem)))
    result["held_out"] = post_mortem.held_out
    result["verdict"] = post_mortem.verdict
    files.write_json(path, result)


# ------------------------------------------------------------------------------ the command line

def check_prediction_flags(settings):
    """End the program if flags of a prediction do not go together."""
    f = settings[0]
    if any(g.collapsed for g in settings):
        common.stop(
            f, "--collapsed: also wants --residual, a file with the residuals of a trained model"
        )
    if f.dataset == "none" and not f.x:
        common.stop(
            f, "--x: got no file, wants one with an example per row; or give --dataset for images"
        )
    if f.dataset != "none" and f.x:
        common.stop(f, f"--x: cannot be combined with --dataset {f.dataset}")
    if f.model == "cvae" and not f.y and f.dataset == "none":
        common.stop(f, "--y: got no file, wants one with the targets for --model cvae")
    if f.model != "cvae" and f.y and f.dataset == "none":
        common.stop(f, f"--y: cannot be combined with --model {f.model}, which has no targets")


def check_post_mortem_flags(settings):
    """End the program if flags of a post-mortem do not go together."""
    f = settings[0]
    for name in ("y", "dataset", "model", "center", "sigma", "active"):
        if any(getattr(g, name) != getattr(Flags, name) for g in settings):
            common.stop(f, f"--{name}: cannot be combined with --residual")
    if not f.x or not all(g.collapsed for g in settings):
        common.stop(
            f,
            "--residual: also wants --x, a file with the inputs of the encoder, and --collapsed, a "
            "whole number of at least 1",
        )


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    if settings[0].residual:
        check_post_mortem_flags(settings)
        post_mortems = examine(settings)
        for post_mortem in post_mortems:
            report_post_mortem(post_mortem)
    else:
        check_prediction_flags(settings)
        predictions = predict(settings)
        for prediction in predictions:
            report_prediction(prediction)
    return 0


if __name__ == "__main__":
    common.run(main)
