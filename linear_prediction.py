"""The prediction for Gaussian decoders: the optimum of a linear VAE, CVAE or two-level HVAE.

predict_collapse.py calls this module. Its predictions are the closed forms of theory.py, for the
second moment of the user's data. In this module, `f` is a setting of predict_collapse.py. First
come the moment of the data, then the prediction, and then the report: the answer in words, tables,
a picture and a file.
"""
import dataclasses
import decimal
import math
import sys
from dataclasses import dataclass

import common
import numpy as np
import torch

import arrays
import files
import losses
import pictures
import theory
import verify

# The flag that collapses the units of each model one after another.
SWEPT_FLAGS = {"vae": "beta", "cvae": "beta", "hvae": "beta_2"}


def learns_eta_dec(f):
    """Whether the standard deviation of the decoder is learned with the model."""
    return f.eta_dec == "learned"


def is_centered(f):
    """Whether the mean of each column is subtracted, which a model with biases learns.

    By default files are centred. Data sets of images are not, because the linear scripts have no
    biases.
    """
    if f.center == "auto":
        return f.dataset == "none"
    return f.center == "true"


# --- The moment of the data ---


@dataclass
class Moment:
    """The second moment of the data.

    matrix: E[v v^T] (d, d), float64, or the covariance if the data are centred. v is a row of x, or
        of x and y joined for a CVAE. If there are fewer rows than columns, v has coordinates of x
        and of y in the spaces of their rows, which keep all eigenvalues except zeros.
    count: the number of rows.
    dim_x: the number of the first entries of v, which belong to x.
    columns: the number of columns that the decoder describes: those of x, or of y for a CVAE.
    """
    matrix: torch.Tensor
    count: int
    dim_x: int
    columns: int


def measure_moment(f):
    """The Moment of the data, in one pass over the rows. Warns of columns without information."""
    sources = arrays.open_rows(f, ("x", "y") if f.model == "cvae" else ("x",))
    for source in sources:
        arrays.check_size(f, source)
    if any(source.columns > source.count for source in sources):
        matrix, dim_x = _moment_of_wide_rows(f, sources)
    else:
        matrix = _moment_of_chunks(f, sources)
        dim_x = sources[0].columns
    return Moment(
        matrix=torch.from_numpy(matrix),
        count=sources[0].count,
        dim_x=dim_x,
        columns=sources[-1].columns,
    )


def _moment_of_chunks(f, sources):
    """The `matrix` of a Moment, in one pass over the rows."""
    first = None
    matrix = 0
    mean = 0
    for parts in arrays.chunks(f, sources):
        # Joining two arrays copies them, and this takes time.
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        if first is None:
            first = rows[0].copy()
        # A column may vary little around a large number, such as a time. The squares of its
        # differences from the first row keep the digits that its own squares would lose.
        rows = rows - first
        # numpy computes only half of a symmetric product.
        matrix = matrix + rows.T @ rows
        mean = mean + rows.sum(0)

    count = sources[0].count
    mean = mean / count
    matrix = matrix / count - np.outer(mean, mean)
    warn_of_data(f, np.diag(matrix), first + mean, count)
    if is_centered(f):
        return matrix
    return matrix + np.outer(first + mean, first + mean)


def _moment_of_wide_rows(f, sources):
    """(`matrix`, `dim_x`) of a Moment, if there are fewer rows than columns."""
    parts = arrays.read_all(f, sources)
    rows = np.concatenate(parts, axis=1)
    mean = rows.mean(0)
    centered = rows - mean
    # The mean of a column of equal numbers may have a rounding error.
    centered[:, (rows == rows[0]).all(0)] = 0
    warn_of_data(f, (centered**2).mean(0), mean, len(rows))

    dim_x = parts[0].shape[1]
    if is_centered(f):
        rows = centered
    coordinates = [arrays.row_coordinates(rows[:, :dim_x])]
    if len(parts) > 1:
        coordinates.append(arrays.row_coordinates(rows[:, dim_x:]))
    joined = np.concatenate(coordinates, axis=1)
    return joined.T @ joined / len(rows), coordinates[0].shape[1]


def warn_of_data(f, variance, mean, count):
    """Warn of constant columns, and of fewer rows than columns.

    variance and mean (columns,) are those of each column.
    """
    columns = len(mean)
    is_constant = variance <= (1e-12 * mean)**2

    zeros = (is_constant & (mean == 0)).sum()
    if zeros:
        verb = "is" if zeros == 1 else "are"
        arrays.warn(f"{zeros} of {columns} columns {verb} 0 in every row")

    constants = (is_constant & (mean != 0)).sum()
    if constants:
        verb = "is" if constants == 1 else "are"
        remedy = "" if is_centered(f) else (
            "; a unit describes the constants, unless you give --center true"
        )
        arrays.warn(f"{constants} of {columns} columns {verb} constant{remedy}")

    warn_of_few_rows(count, columns)


def warn_of_few_rows(count, columns):
    """Warn of fewer rows than columns."""
    if count < columns:
        arrays.warn(
            f"there are fewer rows ({count:,}) than columns ({columns:,}), so there are at most "
            f"{count:,} modes, and they describe new rows less well than these"
        )


# --- The prediction for Gaussian decoders ---


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
    f: common.BaseFlags
    modes: Modes
    predicted: dict
    collapse: torch.Tensor
    table: dict
    curve: dict
    point: dict


def predict(settings):
    """The Prediction for each group of settings that differ in the swept beta only.

    Prints what --loss amounts to. Ends the program if a result is not finite, or if --active
    exceeds the number of units.
    """
    # 1. The data, which settings may share.
    modes_of_data = {}
    for f in settings:
        data = (f.model, f.center)
        if data not in modes_of_data:
            modes_of_data[data] = measure_modes(f)

    # 2. The beta of --loss needs the number of columns.
    known = []
    for f in settings:
        columns = len(modes_of_data[f.model, f.center].variances)
        known.append(losses.with_beta(f, columns, units=f.d_1))

    # 3. The predictions.
    predictions = []
    for group in groups_of(known):
        f = group[0]
        modes = modes_of_data[f.model, f.center]
        if f.loss != "none":
            print(losses.in_words(group, len(modes.variances), units=f.d_1))
        predictions.append(predict_group(group, modes))
    return predictions


def groups_of(settings):
    """The settings as a list of lists. Those in one list differ in the swept beta only."""
    groups = {}
    for f in settings:
        other_flags = []
        for field in dataclasses.fields(f):
            # The weight beside --loss determines beta.
            if field.name not in (SWEPT_FLAGS[f.model], "kl_weight"):
                other_flags.append(getattr(f, field.name))
        groups.setdefault(tuple(other_flags), []).append(f)
    return list(groups.values())


def measure_modes(f):
    """The Modes of the data of --x and --y, or of --dataset."""
    moment = measure_moment(f)
    if f.model != "cvae":
        variances = theory.spectrum(moment.matrix)
        return Modes(
            variances=pad(variances, moment.columns)[:moment.columns],
            count=moment.count,
            explained="",
        )

    variances = theory.spectrum(theory.moment_given_x(moment.matrix, moment.dim_x))
    moment_of_y = moment.matrix[moment.dim_x:, moment.dim_x:]
    # What x explains completely leaves rounding errors, which are no modes.
    rounding = len(moment.matrix) * torch.finfo(torch.float64).eps * moment_of_y.trace()
    variances = torch.where(variances > rounding, variances, 0)

    explained = "y is 0 in every row, so the units have nothing to describe."
    if moment_of_y.trace() > 0:
        share = 1 - variances.sum() / moment_of_y.trace()
        explained = (
            f"A linear map of x explains {share:.1%} of the {share_name(f)} of y. The units can "
            "describe the rest."
        )
    return Modes(
        variances=pad(variances, moment.columns)[:moment.columns],
        count=moment.count,
        explained=explained,
    )


def predict_group(group, modes):
    """The Prediction for a group of settings that differ in the swept beta only."""
    f = group[0]
    swept = SWEPT_FLAGS[f.model]
    check_bounded(group, modes.variances)
    predicted = optimum(f, modes.variances, getattr(f, swept))
    arrays.check_finite(group, predicted)

    collapse = predicted[f"collapse{swept_level(f)}"]
    if f.active > len(collapse):
        common.stop(
            f, f"--active: got {f.active}, wants at most {len(collapse)}, the number of units"
        )

    betas_to_draw = curve_betas(collapse)
    has_bound = optimum(f, modes.variances, betas_to_draw)["loss"] != -math.inf
    betas_to_draw = betas_to_draw[has_bound]
    betas_to_print = [getattr(g, swept) for g in group]
    if len(group) == 1:
        betas_to_print = table_betas(betas_to_draw)

    return Prediction(
        f=f,
        modes=modes,
        predicted=predicted,
        collapse=collapse,
        table=finite_trade_off(group, modes, betas_to_print),
        curve=finite_trade_off(group, modes, betas_to_draw),
        point=finite_trade_off(group, modes, [getattr(f, swept)]),
    )


def check_bounded(group, variances):
    """End the program if eta_dec is learned and the loss of a setting has no lower bound."""
    f = group[0]
    rank = int((variances > 0).sum())
    for g in group:
        if not learns_eta_dec(g) or optimum(g, variances, g.beta)["loss"] > -math.inf:
            continue
        if not rank:
            common.stop(f, "--eta_dec: got learned, but the data are 0 in every row")

        # Rounded up, so that this beta is large enough.
        remedies = [f"--beta of at least {math.ceil(1000 * len(variances) / rank) / 1000:g}"]
        if rank > 1:
            remedies.append(f"--d_1 of at most {rank - 1}")
        noun = "unit describes" if rank == 1 else "units describe"
        common.stop(
            f,
            f"--eta_dec: got learned, but at beta = {g.beta:g} the loss has no lower bound and "
            f"eta_dec goes to 0, because {rank} {noun} the data completely; wants "
            f"{' or '.join(remedies)}",
        )


def finite_trade_off(group, modes, betas):
    """The `trade_off` of a group at betas (m,) as a table, {column: (m,)}, with the betas first.

    Ends the program if a number in it is not finite.
    """
    f = group[0]
    betas = torch.as_tensor(betas, dtype=torch.float64)
    table = {SWEPT_FLAGS[f.model]: betas, **trade_off(f, modes.variances, betas)}
    arrays.check_finite(group, table)
    return table


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
    if learns_eta_dec(f):
        return theory.vae_optimum_learned_eta_dec(theta, d_1, beta, eta_enc=f.eta_enc)
    return theory.vae_optimum(theta, d_1, beta, eta_enc=f.eta_enc, eta_dec=f.eta_dec)


def trade_off(f, variances, beta):
    """The rate-distortion trade-off over beta (m,), which takes the place of f's swept beta.

    Returns, each (m,):
      active      the number of active units of the level that beta acts on
      rate        the sum of the KL terms, in nats per row
      distortion  the squared error, summed over the columns and averaged over the rows
      loss        the minimum of the negative beta-ELBO, L*, in nats per row
      eta_dec     the std of the decoder, only if it is learned

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

    if learns_eta_dec(f):
        eta_dec = predicted["eta_dec"]
    else:
        eta_dec = torch.tensor(f.eta_dec, dtype=torch.float64)
    constant = len(variances) / 2 * (2 * math.pi * eta_dec**2).log()
    columns = {
        "active": (predicted[f"information{swept_level(f)}"] > 0).sum(-1),
        "rate": rate,
        "distortion": (loss - constant - weighted_rate) * 2 * eta_dec**2,
        "loss": loss,
    }
    if learns_eta_dec(f):
        columns["eta_dec"] = eta_dec
    return columns


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

    They span five decades at most.
    """
    # A beta outside these limits is a rounding error of 0 or of infinity.
    ends = [beta for beta in collapse.tolist() if 1e-300 < beta < 1e300]
    ends = [beta for beta in ends if beta >= 1e-4 * max(ends)]
    if not ends:
        ends = [1.0]
    low = math.log10(min(ends) / 3)
    high = math.log10(max(ends) * 3)
    return torch.logspace(low, high, 400, dtype=torch.float64)


def table_betas(betas):
    """Some of the `curve_betas` with three digits, which are few enough for a table: a list."""
    return [float(f"{beta:.3g}") for beta in betas[::33].tolist()]


# --- The report on Gaussian decoders ---


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
    """Print how many units stay active, from which beta on all collapse, and the model, in words.

    The first line is the answer. With --active it says how to keep that number of units.
    """
    f = prediction.f
    sentences = [active_units_in_words(prediction), collapse_in_words(f, prediction.collapse)]
    if f.active:
        sentences.append(advice_in_words(f, prediction.collapse))
    print(f"\n{' '.join(sentences)}")

    kind = "with biases (--center true)"
    if not is_centered(f):
        kind = "without biases (--center false), like those of the linear scripts,"
    print(
        f"This is the optimum of a linear {f.model.upper()} {kind} on {data_name(f)} "
        f"({prediction.modes.count:,} rows)."
    )
    print(f"Its objective has {objective_in_words(f)}.")
    if learns_eta_dec(f):
        eta_dec = prediction.predicted["eta_dec"]
        print(f"The learned eta_dec is {eta_dec:.4g}, which is a variance of {eta_dec**2:.4g}.")
    if prediction.modes.explained:
        print(prediction.modes.explained)
    if f.active:
        print(recommendation(f, prediction.collapse))


def beta_in_words(f, beta):
    """The name and a value of the swept beta, and its KL weight beside --loss."""
    words = f"{SWEPT_FLAGS[f.model]} {beta:.4g}"
    if f.loss != "none":
        words += f" (KL weight {beta * f.kl_weight / f.beta:.4g})"
    return words


def active_units_in_words(prediction):
    """A sentence on the number of active units, as in "At beta 1, 12 of 32 units stay active;"."""
    f = prediction.f
    counts = []
    verb = "stay"
    levels = theory.levels_of(prediction.predicted)
    for level in levels:
        information = prediction.predicted[f"information{level}"]
        active = int((information > 0).sum())
        noun = "unit" if len(information) == 1 else "units"
        counts.append(f"{active} of {len(information)} {noun}{of_level(level)}")
        if len(levels) == 1 and (active == 1 or len(information) == 1):
            verb = "stays"
    beta = beta_in_words(f, getattr(f, SWEPT_FLAGS[f.model]))
    return f"At {beta}, {' and '.join(counts)} {verb} active;"


def collapse_in_words(f, collapse):
    """The end of a sentence on the beta from which on all units collapse.

    collapse (d,) are the betas at which the units collapse.
    """
    units = of_level(swept_level(f))
    never = int(collapse.isinf().sum())
    if never:
        verb = "collapses" if never == 1 else "collapse"
        return f"{never}{units} never {verb}."
    last = collapse.max().item()
    if last == 0:
        return f"all{units} are collapsed at any {SWEPT_FLAGS[f.model]}."
    return f"all{units} collapse from {beta_in_words(f, last)} on."


def advice_in_words(f, collapse):
    """A sentence on the beta, and the eta_dec, that keep at least --active units active.

    collapse (d,) are the betas at which the units collapse. In a VAE or CVAE only beta eta_dec^2
    decides which units collapse. In an HVAE eta_dec is the std of two distributions, and a learned
    one cannot be chosen.
    """
    units = of_level(swept_level(f))
    limit = sorted(collapse.tolist(), reverse=True)[f.active - 1]
    if limit == 0:
        return f"At most {int((collapse > 0).sum())}{units} can be active."
    if limit == math.inf:
        return f"Every {SWEPT_FLAGS[f.model]} keeps {f.active}{units} active."

    beta = rounded_below(limit)
    words = f"{SWEPT_FLAGS[f.model]} <= {beta:g}"
    if f.loss != "none":
        words += f" (KL weight <= {rounded_below(limit * f.kl_weight / f.beta):g})"
    elif f.model != "hvae" and not learns_eta_dec(f):
        words += f", or eta_dec <= {rounded_below(f.eta_dec * math.sqrt(limit / f.beta)):g}"
    return f"To keep {f.active}{units} active, use {words}."


def rounded_below(limit):
    """The largest number with four digits that is below a positive limit."""
    four_digits = decimal.Context(prec=4)
    return float(four_digits.next_minus(decimal.Decimal(limit)))


def data_name(f):
    """The data set or the file of x."""
    return f.dataset if f.dataset != "none" else f.x


def share_name(f):
    """The name of the matrix whose eigenvalues are the variances of the modes."""
    return "variance" if is_centered(f) else "second moment"


def objective_in_words(f):
    """The scalars of the objective, as in "beta = 1, eta_enc = 1, eta_dec = 1 and ..."."""
    if f.model == "hvae":
        names = ["beta_1", "beta_2", "eta_enc", "eta_dec", "sigma_1"]
        last_name = "sigma_2"
    else:
        names = ["beta", "eta_enc", "eta_dec"]
        last_name = "sigma"

    words = []
    for name in names:
        is_learned = name == "eta_dec" and learns_eta_dec(f)
        words.append("a learned eta_dec" if is_learned else f"{name} = {getattr(f, name):g}")
    scalars = ", ".join(words)
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
    # Data that are 0 in every row have shares of 0, too.
    total = variances.sum().clamp(min=torch.finfo(torch.float64).tiny)
    shares = pad(variances / total, units)

    collapses = f"collapses at {SWEPT_FLAGS[f.model]}"
    table = [["unit", "theta", f"share of {share_name(f)}", f"kl{level}", "state", collapses]]
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
        others = "other unit is" if units - shown == 1 else f"other {units - shown} units are"
        print(f"The {others} collapsed, too.")


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
    per_unit = {name: values for name, values in predicted.items() if name != "eta_dec"}
    result["predicted"] = verify.per_unit(per_unit)
    result["optimal_loss"] = predicted["loss"].item()
    if learns_eta_dec(prediction.f):
        result["learned_eta_dec"] = predicted["eta_dec"].item()
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
        upper.set(xlabel="rate: KL (nats per row)", ylabel="distortion: squared error per row")

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
