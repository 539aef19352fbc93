"""Predict which latent units would collapse on your data, and which beta keeps a given number of
them active. Nothing is trained: the predictions are closed forms.

    python predict_collapse.py --x features.npy --eta_dec 0.5 --active 12
    python predict_collapse.py --x features.npy --eta_dec learned --d_1 16 --center
    python predict_collapse.py --model cvae --x inputs.npy --y targets.npy --beta 0.5,1,2
    python predict_collapse.py --model hvae --dataset mnist --eta_enc 0.5 --eta_dec 0.5
    python predict_collapse.py --dataset mnist --likelihood bernoulli --beta 1,4,10
    python predict_collapse.py --x u.npy --residual r.npy --eta_dec 0.5 --beta 1.0 --collapsed 9
    python predict_collapse.py --x u.npy --residual r.npy --likelihood bernoulli --fisher h.npy \
        --beta 1 --collapsed 9

The data are the rows of an .npy, .npz, .csv or .pt file, or of a data set of images. Every
prediction depends on the data only through their first and second moments.

With a Gaussian decoder, the predictions describe a linear VAE, CVAE or two-level HVAE at its
optimum (Dang et al. 2024, arXiv 2306.05023, theorems 1, 2, 3 and 5). A VAE may also learn eta_dec.
Without --center they describe models without biases, and with it models with biases.

With a Bernoulli, categorical or Poisson decoder (--likelihood), the predictions describe a VAE with
any encoder and any decoder whose logits or log rates have biases. They say from which beta on its
collapse is stable, and how many nats --d_1 units gain at least below it. See headroom.py.

With --residual the script does a post-mortem instead. It decides whether the objective or training
collapsed the units of a VAE that you have trained, which need not be linear. See headroom.py.

This file has the flags, the prediction for Gaussian decoders and its report, the prediction for
other decoders and its report, the checks of flags that do not go together, and main. arrays.py
reads the data, and post_mortem.py does the post-mortem.
"""
import dataclasses
import math
import sys
from dataclasses import dataclass

import common
import numpy as np
import torch

import arrays
import files
import headroom
import pictures
import post_mortem
import theory
import verify

# The limits of a std. The square of a number between them is neither 0 nor infinite in float64.
# Numbers in a file have the same upper limit.
SMALLEST = 1e-100
LARGEST = arrays.LARGEST

# The upper limit of sigma, which is rounded to float32.
LARGEST_SIGMA = 1e38

# The largest number of units. Units beyond the columns of the data are always collapsed.
MAX_UNITS = 10_000

# The names of the decoders that are not Gaussian, as they are printed.
DECODERS = {"bernoulli": "Bernoulli", "categorical": "categorical", "poisson": "Poisson"}

# The flag that collapses the units of each model one after another.
SWEPT_FLAGS = {"vae": "beta", "cvae": "beta", "hvae": "beta_2"}


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
    likelihood: str = common.flag(
        "gaussian",
        "kind of decoder of a VAE; apart from gaussian, it wants columns of 0 and 1 (bernoulli), "
        "of category codes (categorical) or of counts (poisson)",
        choices=headroom.LIKELIHOODS,
        single=True,
    )
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
        "standard deviation of a Gaussian decoder, in an HVAE of p(x|z1) and p(z1|z2); learned "
        "means that a VAE learns it together with its weights",
        above=SMALLEST,
        high=LARGEST,
        word="learned",
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
        "of --x; --x then has the inputs of its encoder, and each reconstruction is a mean over "
        "many draws of z: of the decoder's mean, of the probability of a 1 (bernoulli) or of the "
        "rate (poisson)",
        metavar="FILE",
    )
    fisher: str = common.flag(
        "",
        "file with the Fisher information of each column under a trained model, for --residual "
        "with another --likelihood than gaussian; p (1 - p) for bernoulli and the rate for "
        "poisson, either the means over all rows, or one row for each row of --x",
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


def learns_eta_dec(f):
    """Whether the standard deviation of the decoder is learned with the model."""
    return f.eta_dec == "learned"


# --- The moment of the data ---


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
    sources = arrays.open_rows(f, ("x", "y") if f.model == "cvae" else ("x",))
    matrix = 0
    mean = 0
    for parts in arrays.chunks(f, sources):
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

    warn_of_few_rows(count, columns)


def warn_of_few_rows(count, columns):
    """Warn of fewer rows than columns."""
    if count < columns:
        warn(
            f"there are fewer rows ({count:,}) than columns ({columns:,}), so there are at most "
            f"{count:,} modes, and they describe new rows less well than these"
        )


def warn(message):
    """Print a warning on stderr."""
    print(f"warning: {message}", file=sys.stderr)


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
    modes_of_data = {}
    for f in settings:
        data = (f.model, f.dataset, f.center)
        if data not in modes_of_data:
            modes_of_data[data] = measure_modes(f)

    predictions = []
    for group in groups_of(settings):
        f = group[0]
        predictions.append(predict_group(group, modes_of_data[f.model, f.dataset, f.center]))
    return predictions


def groups_of(settings):
    """The settings as a list of lists. Those in one list differ in the swept beta only."""
    groups = {}
    for f in settings:
        other_flags = []
        for field in dataclasses.fields(f):
            if field.name != SWEPT_FLAGS[f.model]:
                other_flags.append(getattr(f, field.name))
        groups.setdefault(tuple(other_flags), []).append(f)
    return list(groups.values())


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
      distortion  the mean squared error
      loss        the least negative beta-ELBO L*, in nats per row
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
    if learns_eta_dec(f):
        eta_dec = prediction.predicted["eta_dec"]
        print(f"The learned eta_dec is {eta_dec:.4g}, which is a variance of {eta_dec**2:.4g}.")
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


# --- The prediction for other decoders ---


@dataclass
class Moments:
    """The moments of the sufficient statistics s of some rows.

    s is a row of x. For a categorical decoder it has an indicator, 0 or 1, for each category of
    each column. The sums of whole numbers are exact in float64, so that a constant column has a
    variance of exactly 0.

    count: the number of rows.
    total: the sum of s over the rows, (D,), float64.
    products: the sum of s s^T over the rows, (D, D), float64.
    likelihood: the kind of decoder.
    sizes: the number of categories of each column, for a categorical decoder.
    """
    count: int
    total: torch.Tensor
    products: torch.Tensor
    likelihood: str
    sizes: list

    @property
    def mean(self):
        """E[s], (D,)."""
        return self.total / self.count

    def covariance(self):
        """The covariance of s, which is T and F where all units are collapsed, (D, D)."""
        return self.products / self.count - torch.outer(self.mean, self.mean)

    def fisher(self):
        """The mean Fisher information H of a decoder that gives each column its mean.

        It is the diagonal (D,) of a matrix. For categories it is the diagonal of their
        probabilities p, which replaces H = diag(p) - p p^T. The two matrices give the same rho,
        except for zeros: if Cov w = rho diag(p) w and rho > 0, then p^T w is 0 for the categories
        of each column, because their indicators add up to a constant. Hence diag(p) w = H w.
        """
        if self.likelihood == "categorical":
            return self.mean
        return headroom.mean_fisher(self.likelihood, self.mean[None])

    def information(self, weights):
        """w^T H w for decoder weights w (D,) of one unit."""
        fisher = headroom.mean_fisher(self.likelihood, self.mean[None], self.sizes)
        if fisher.ndim == 1:
            return fisher @ weights**2
        return weights @ fisher @ weights


@dataclass
class Instability:
    """How unstable the collapse of all units is, for a decoder that is not Gaussian.

    The encoder and the decoder are arbitrary, and the decoder gives each column its mean.

    count: the number of rows.
    columns: the number of columns.
    constants: the number of constant columns, which nothing can describe.
    rho: the eigenvalues of H^(-1/2) Cov H^(-1/2) in descending order. The number of them above
        beta is the number of unstable directions.
    held_out: the rho of a direction that is the first one on one half of the rows, on the other
        half. It is the mean over both ways to choose the halves.
    ratios: the eigenvalues of B^(-1/2) Cov B^(-1/2) for `headroom.gain_of_ratios`, where the
        curvature of the decoder is at most B. None for a Poisson decoder.
    loss: the loss of the collapsed model, in nats per row.
    """
    count: int
    columns: int
    constants: int
    rho: torch.Tensor
    held_out: float
    ratios: torch.Tensor | None
    loss: float


@dataclass
class StabilityPrediction:
    """The prediction for settings that differ in beta only.

    f: the first of the settings.
    betas: the betas of the settings.
    instability: the Instability.
    table: the `gain_over_beta` to print, {column: list}. If there is only one setting, it has betas
        around rho.
    point: the `gain_over_beta` of f.
    """
    f: Flags
    betas: list
    instability: Instability
    table: dict
    point: dict


def predict_stability(settings):
    """The StabilityPrediction for each group of settings that differ in beta only."""
    instability = measure_instability(settings[0])
    predictions = []
    for group in groups_of(settings):
        betas = [f.beta for f in group]
        betas_to_print = betas
        if len(group) == 1:
            betas_to_print = table_betas(curve_betas(instability.rho))
        table = gain_over_beta(group[0], instability, betas_to_print)
        point = gain_over_beta(group[0], instability, betas[:1])
        arrays.check_finite(group, table)
        arrays.check_finite(group, point)
        predictions.append(
            StabilityPrediction(
                f=group[0], betas=betas, instability=instability, table=table, point=point
            )
        )
    return predictions


def measure_instability(f):
    """The Instability of the data of --x or of --dataset.

    Ends the program if all columns are constant.
    """
    [source] = arrays.open_rows(f, ("x",))
    codes = arrays.find_categories(f, source) if f.likelihood == "categorical" else None
    halves, log_factorials = measure_statistics(f, source, codes)
    moments = dataclasses.replace(
        halves[0],
        count=source.count,
        total=halves[0].total + halves[1].total,
        products=halves[0].products + halves[1].products,
    )

    covariance = moments.covariance()
    # Only the sums of counts above 10^7 or so are rounded.
    is_constant = covariance.diag() <= 1e-12 * moments.mean**2
    if is_constant.all():
        common.stop(f, "--x: all columns are constant, wants at least one column that varies")
    warn_of_few_rows(source.count, len(moments.mean))

    return Instability(
        count=source.count,
        columns=source.columns,
        constants=int(is_constant.sum()),
        rho=headroom.instability_ratios(covariance, moments.fisher()),
        held_out=held_out_rho_1(halves),
        ratios=gain_ratios(moments),
        loss=collapsed_loss(moments, log_factorials / source.count),
    )


def measure_statistics(f, source, codes):
    """The Moments of each half of the rows, in one pass over the rows.

    codes are the categories of each column, or None if the columns are no categories. Returns
    ([Moments of one half, Moments of the other], the sum of ln x! over all numbers). Only a Poisson
    decoder needs the latter, and it is 0 for others.
    """
    random = np.random.default_rng(0)
    totals = [0, 0]
    products = [0, 0]
    log_factorials = 0.0
    for [rows] in arrays.chunks(f, [source]):
        if codes:
            rows = arrays.indicators(rows, codes)
        if f.likelihood == "poisson":
            log_factorials += torch.lgamma(torch.from_numpy(rows + 1)).sum().item()
        for half, places in enumerate(arrays.halves_of(len(rows), random)):
            part = rows[places]
            totals[half] = totals[half] + part.sum(0)
            products[half] = products[half] + part.T @ part

    halves = []
    for half, size in enumerate(arrays.half_sizes(source.count)):
        halves.append(
            Moments(
                count=size,
                total=torch.from_numpy(totals[half]),
                products=torch.from_numpy(products[half]),
                likelihood=f.likelihood,
                sizes=[len(column) for column in codes or []],
            )
        )
    return halves, log_factorials


def first_weights(covariance, fisher):
    """The decoder weights (D,) of the unit with the largest rho.

    covariance is (D, D), and fisher is the diagonal of H (D,). If no rho is above 0, the weights
    are 0.
    """
    weights = torch.zeros_like(fisher)
    is_informative = fisher > 0
    if not (covariance.diag()[is_informative] > 0).any():
        return weights
    _, directions = theory.modes(headroom.whitened(covariance, fisher))
    weights[is_informative] = directions[:, 0] * fisher[is_informative].rsqrt()
    return weights


def held_out_rho_1(halves):
    """The `held_out` of an Instability, from the Moments of both halves."""
    total = 0.0
    for half, other in (halves, halves[::-1]):
        weights = first_weights(half.covariance(), half.fisher())
        information = other.information(weights)
        # The columns of the direction may all be constant in the other half.
        if information > 0:
            total += (weights @ other.covariance() @ weights / information).item()
    return total / 2


def gain_ratios(moments):
    """The `ratios` of an Instability.

    The bound of a Bernoulli decoder is that of Jaakkola and Jordan (2000) at the logits of the
    columns' means. For categories it is that of Boehning (1992).
    """
    if moments.likelihood == "bernoulli":
        bound = headroom.collapsed_curvature(moments.mean.logit())
        return headroom.instability_ratios(moments.covariance(), bound)
    return headroom.curvature_ratios(moments.covariance(), moments.likelihood)


def collapsed_loss(moments, log_factorials):
    """The least loss of a collapsed model, in nats per row: -log p(x) of independent columns.

    log_factorials is the mean of ln x! summed over the columns, for a Poisson decoder.
    """
    mean = moments.mean
    entropy = torch.special.entr(mean).sum()
    if moments.likelihood == "bernoulli":
        entropy = entropy + torch.special.entr(1 - mean).sum()
    if moments.likelihood == "poisson":
        entropy = entropy + mean.sum() + log_factorials
    return entropy.item()


def gain_over_beta(f, instability, betas):
    """What a small step out of collapse and --d_1 units gain at each of the betas.

    Returns {column: list}:
      beta        the betas
      unstable    the number of directions in which a small step out of collapse lowers the loss
      gain        what the units gain at least, in nats per row; not for a Poisson decoder
    """
    rho = instability.rho
    table = {"beta": betas, "unstable": [int((rho > beta).sum()) for beta in betas]}
    if instability.ratios is not None:
        units = f.d_1 or len(rho)
        table["gain"] = [
            headroom.gain_of_ratios(instability.ratios, units, beta) for beta in betas
        ]
    return table


# --- The report on other decoders ---


def report_stability(prediction):
    """Print, draw and save a prediction for a decoder that is not Gaussian."""
    f = prediction.f
    print_stability(prediction)
    print_gain_over_beta(prediction)

    folder = files.run_dir(f, None)
    draw_stability(folder / "stability.png", prediction)
    save_stability(folder / "prediction.json", prediction)
    print(f"files: {folder}", file=sys.stderr)


def print_stability(prediction):
    """Print from which beta on collapse is stable, in words."""
    f = prediction.f
    instability = prediction.instability
    decoder = DECODERS[f.likelihood]
    print(
        f"\nWith a {decoder} decoder on {data_name(f)} ({instability.count:,} rows), collapse of "
        f"all units is stable from beta = {instability.rho[0]:.4g} on."
    )
    print(
        "This is a local statement: from there on no small step out of collapse lowers the loss. A "
        "better solution far from collapse is not excluded."
    )

    [unstable] = prediction.point["unstable"]
    directions = "1 direction is" if unstable == 1 else f"{unstable} directions are"
    print(
        f"At beta = {f.beta:g}, {directions} unstable. This does not count the units that training "
        "would activate."
    )
    independent = "Poisson columns" if f.likelihood == "poisson" else "columns"
    print(
        f"The held-out rho_1 is {instability.held_out:.4g}. Its direction is found on one half of "
        f"the rows and measured on the other half. Independent {independent} would have about 1."
    )
    largest = ", ".join(f"{rho:.4g}" for rho in instability.rho[:5])
    print(f"The largest rho are {largest}.")
    print(f"The loss of the collapsed model is {instability.loss:.2f} nats per row.")
    print_remarks_on_data(f, instability)


def print_remarks_on_data(f, instability):
    """Print how many columns are left out, and that images are binarised."""
    if instability.constants:
        verb = "is" if instability.constants == 1 else "are"
        constants = f"{instability.constants} of {instability.columns} columns {verb} constant"
        print(f"{constants} and left out.")
    if f.dataset != "none":
        print("The images are binarised: a pixel above 0.5 counts as 1, and any other pixel as 0.")


def print_gain_over_beta(prediction):
    """Print the `gain_over_beta` of a prediction, with one row per beta."""
    f = prediction.f
    columns = prediction.table
    names = {"beta": "beta", "unstable": "unstable directions", "gain": "guaranteed gain"}
    table = [[names[name] for name in columns]]
    for i, beta in enumerate(columns["beta"]):
        row = [f"{beta:g}", str(columns["unstable"][i])]
        if "gain" in columns:
            row.append(f"{columns['gain'][i]:.4f}")
        table.append(row)

    if "gain" in columns:
        count = f.d_1 or len(prediction.instability.rho)
        units = "1 unit gains" if count == 1 else f"{count} units gain"
        guarantee = f"{units} at least the guaranteed gain, in nats per row."
    else:
        guarantee = "A Poisson decoder has no guaranteed gain."
    print(f"\nUnstable directions over beta. {guarantee}")
    common.print_table(table)


def draw_stability(path, prediction):
    """Draw rho over its rank, beside the betas."""
    rho = prediction.instability.rho
    # A log axis cannot show 0, and rho far below the first ones are of no interest.
    rho = rho[rho > 1e-3 * rho[0]].numpy()
    held_out = prediction.instability.held_out

    def draw(axes):
        [[ax]] = axes
        ax.plot(range(1, 1 + len(rho)), rho, ".-", color="0.3", label="rho")
        if held_out > 0:
            ax.plot(1, held_out, "kx", label="rho_1 on held-out rows")
        # More lines than this could not be told apart.
        for i, beta in enumerate(prediction.betas[:10]):
            ax.axhline(beta, color=f"C{i}", linestyle="--", linewidth=1, label=f"beta = {beta:g}")
        shown = [beta for beta in (*rho, held_out, *prediction.betas[:10]) if beta > 0]
        pictures.set_log_axis(ax, "x", [1, len(rho) + 1])
        pictures.set_log_axis(ax, "y", [min(shown) / 2, 2 * max(shown)])
        ax.set(xlabel="rank", ylabel="rho", title="A direction is unstable if its rho exceeds beta")
        ax.title.set_fontsize(9)
        ax.legend(fontsize=7)

    pictures.save_figure(
        path,
        columns=1,
        rows=1,
        width=5.2,
        height=4.2,
        caption=files.spell(files.changed_settings(prediction.f, None)),
        draw=draw,
    )


def save_stability(path, prediction):
    """Write prediction.json."""
    instability = prediction.instability
    result = files.description(prediction.f, None)
    result["dataset"] = data_name(prediction.f)
    result["rows"] = instability.count
    result["columns"] = instability.columns
    result["constant_columns"] = instability.constants
    result["rho"] = instability.rho.tolist()
    result["held_out_rho_1"] = instability.held_out
    result["collapsed_loss"] = instability.loss
    result["unstable_directions"] = prediction.point["unstable"][0]
    result["guaranteed_gain"] = prediction.point.get("gain", [None])[0]
    result["over_beta"] = prediction.table
    files.write_json(path, result)


# --- Flags that do not go together, and main ---

# Flags that have no meaning for a decoder that is not Gaussian. A prior of another std than 1 is
# the same as other weights of the decoder.
GAUSSIAN_FLAGS = ("eta_dec", "eta_enc", "sigma", "sigma_1", "sigma_2", "beta_1", "beta_2", "d_2")


def refuse_flags(settings, names, reason):
    """End the program if one of the named flags is not at its default.

    reason is the flag that it cannot be combined with.
    """
    for name in names:
        if any(getattr(g, name) != getattr(Flags, name) for g in settings):
            common.stop(settings[0], f"--{name}: cannot be combined with {reason}")


def check_prediction_flags(settings):
    """End the program if flags of a prediction do not go together."""
    f = settings[0]
    for name in ("collapsed", "fisher"):
        if any(getattr(g, name) for g in settings):
            common.stop(
                f, f"--{name}: also wants --residual, a file with the residuals of a trained model"
            )
    if f.dataset == "none" and not f.x:
        common.stop(
            f, "--x: got no file, wants one with an example per row; or give --dataset for images"
        )
    if f.dataset != "none" and f.x:
        common.stop(f, f"--x: cannot be combined with --dataset {f.dataset}")
    if f.likelihood != "gaussian":
        check_likelihood_flags(settings)
    if f.model == "cvae" and not f.y and f.dataset == "none":
        common.stop(f, "--y: got no file, wants one with the targets for --model cvae")
    if f.model != "cvae" and f.y and f.dataset == "none":
        common.stop(f, f"--y: cannot be combined with --model {f.model}, which has no targets")
    if any(learns_eta_dec(g) for g in settings):
        check_learned_eta_dec(settings)


def check_likelihood_flags(settings):
    """End the program if flags of a prediction do not go with a decoder that is not Gaussian."""
    f = settings[0]
    other_models = [g.model for g in settings if g.model != "vae"]
    if other_models:
        common.stop(
            f, f"--model: got {other_models[0]}, wants vae for --likelihood {f.likelihood}"
        )
    refuse_flags(settings, GAUSSIAN_FLAGS, f"--likelihood {f.likelihood}, which has no such number")
    refuse_flags(
        settings, ("active", "center"), f"--likelihood {f.likelihood}, only with gaussian"
    )
    if f.dataset != "none" and f.likelihood != "bernoulli":
        common.stop(
            f,
            f"--dataset: cannot be combined with --likelihood {f.likelihood}; images are for "
            "gaussian or bernoulli",
        )


def check_learned_eta_dec(settings):
    """End the program if other flags do not go with a learned eta_dec."""
    for g in settings:
        if g.model != "vae":
            common.stop(g, f"--eta_dec: got learned, wants a number for --model {g.model}")
        if g.sigma:
            common.stop(g, "--sigma: cannot be combined with --eta_dec learned")


def check_post_mortem_flags(settings):
    """End the program if flags of a post-mortem do not go together."""
    f = settings[0]
    refuse_flags(
        settings, ("y", "dataset", "model", "center", "sigma", "active"), "--residual"
    )
    if not f.x or not all(g.collapsed for g in settings):
        common.stop(
            f,
            "--residual: also wants --x, a file with the inputs of the encoder, and --collapsed, a "
            "whole number of at least 1",
        )
    if f.likelihood == "gaussian":
        refuse_flags(settings, ("fisher",), "--likelihood gaussian, whose information is known")
        if any(learns_eta_dec(g) for g in settings):
            common.stop(f, "--eta_dec: got learned, wants the number that the model has learned")
        return

    if f.likelihood == "categorical":
        common.stop(
            f,
            "--likelihood: got categorical, wants gaussian, bernoulli or poisson for --residual; "
            "categories would want all probabilities of each row",
        )
    refuse_flags(settings, GAUSSIAN_FLAGS, f"--likelihood {f.likelihood}, which has no such number")
    if not f.fisher:
        common.stop(
            f,
            f"--residual: also wants --fisher for --likelihood {f.likelihood}, a file with the "
            "Fisher information of each column",
        )


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    if settings[0].residual:
        check_post_mortem_flags(settings)
        for result in post_mortem.examine(settings):
            post_mortem.report(result)
        return 0

    check_prediction_flags(settings)
    if settings[0].likelihood == "gaussian":
        for prediction in predict(settings):
            report_prediction(prediction)
    else:
        for prediction in predict_stability(settings):
            report_stability(prediction)
    return 0


if __name__ == "__main__":
    common.run(main)
