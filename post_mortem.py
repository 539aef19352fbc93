"""The post-mortem of a trained VAE or CVAE from files: did the objective collapse its units?

predict_collapse.py calls this module if --residual is given. The model is the user's own, and only
some arrays of it are known. In the words of headroom.py, which has the theory and the verdict, they
are

    --x                  u, the inputs of the encoder; the constant 1 is appended here
    --y                  the rest of u, for the encoder of a CVAE
    --residual           r, the targets minus the mean reconstructions
    --fisher             the diagonal of H, for a Bernoulli or a Poisson decoder
    --mean, --log_var    the posterior of each row, from which the collapsed units are counted

headroom.post_mortem does the same in a training loop, without files.

In this module, `f` is a setting of predict_collapse.py. First come the flags, then the moments of
the arrays, and then the report.
"""
import dataclasses
import sys
from dataclasses import dataclass

import common
import numpy as np
import torch

import arrays
import files
import headroom
import losses
import own_model
import pictures

# Flags that have no meaning for a decoder that is not Gaussian. A prior of another std than 1 is
# the same as other weights of the decoder.
GAUSSIAN_FLAGS = ("eta_dec", "eta_enc", "sigma", "sigma_1", "sigma_2", "beta_1", "beta_2", "d_2")


# --- Flags that do not go together ---


def check_flags(settings):
    """End the program if flags of a post-mortem do not go together."""
    f = settings[0]
    refuse_flags(settings, ("dataset", "center", "sigma", "active", "scale"), "--residual")
    if not f.x:
        common.stop(f, "--residual: also wants --x, a file with the inputs of the encoder")
    _check_model(settings)
    _check_units(settings)
    decoder = losses.decoder_flag(f)
    if f.likelihood == "gaussian":
        refuse_flags(settings, ("fisher",), f"{decoder}, whose information is known")
        if any(g.eta_dec == "learned" for g in settings):
            common.stop(f, "--eta_dec: got learned, wants the number that the model has learned")
        return

    if f.likelihood == "categorical":
        common.stop(
            f,
            f"--residual: cannot be combined with {decoder}; headroom.post_mortem, which is for a "
            "training loop, has a post-mortem of categories",
        )
    # The KL that --mean and --log_var give does depend on the prior.
    names = [name for name in GAUSSIAN_FLAGS if not (name == "eta_enc" and f.mean)]
    refuse_flags(settings, names, f"{decoder}, which has no such number")
    if not f.fisher:
        common.stop(
            f,
            f"--residual: also wants --fisher for {decoder}, a file with the Fisher information of "
            "each column",
        )


def refuse_flags(settings, names, reason):
    """End the program if one of the named flags is not at its default.

    reason is the flag that it cannot be combined with.
    """
    defaults = type(settings[0])
    for name in names:
        if any(getattr(g, name) != getattr(defaults, name) for g in settings):
            common.stop(settings[0], f"--{name}: cannot be combined with {reason}")


def _check_model(settings):
    """End the program if the encoder is not that of one VAE or of one CVAE."""
    f = settings[0]
    for g in settings:
        if g.model == "hvae":
            common.stop(
                f,
                "--model: cannot be combined with --residual if it is hvae; wants vae, and the "
                "files of one level",
            )
        if g.model != f.model:
            common.stop(f, "--model: wants one value for --residual, vae or cvae")
    if f.y and f.model == "vae":
        common.stop(
            f,
            "--y: cannot be combined with --residual and --model vae; wants --model cvae, whose "
            "encoder reads x and y",
        )
    if f.model == "cvae" and not f.y:
        common.stop(
            f, "--y: got no file, wants one with the targets, which the encoder of a CVAE reads"
        )


def _check_units(settings):
    """End the program if the collapsed units are neither given nor to be counted, or both."""
    f = settings[0]
    for name, other in (("mean", "log_var"), ("log_var", "mean")):
        if getattr(f, name) and not getattr(f, other):
            common.stop(f, f"--{name}: also wants --{other}, a file of the same shape")
    if f.mean:
        refuse_flags(
            settings, ("collapsed",), "--mean and --log_var, from which the units are counted"
        )
        return

    for g in settings:
        if not g.collapsed:
            common.stop(
                f,
                "--residual: also wants --mean and --log_var, files with the posterior, or "
                "--collapsed, a whole number of at least 1",
            )
        if g.d_1 and g.collapsed > g.d_1:
            common.stop(
                f, f"--collapsed: got {g.collapsed}, wants at most {g.d_1}, the number in --d_1"
            )


# --- The moments of the arrays ---


@dataclass
class Measurement:
    """What one pass over the rows has measured.

    sizes: the number of rows of each half.
    halves: [headroom.ResidualMoments of one half, ResidualMoments of the other].
    posterior: the own_model.PosteriorSums of --mean and --log_var, or None without them.
    columns: the number of columns of --residual.
    """
    sizes: tuple
    halves: list
    posterior: own_model.PosteriorSums | None
    columns: int


def _measure(f):
    """The Measurement of the rows. Warns if --residual looks like the reconstructions."""
    flags = ["x", "y"] if f.model == "cvae" else ["x"]
    flags.append("residual")
    if f.mean:
        flags += ["mean", "log_var"]
    mean_fisher = _read_mean_fisher(f) if f.fisher else None
    if f.fisher and mean_fisher is None:
        flags.append("fisher")
    sources = {source.flag: source for source in arrays.open_rows(f, flags)}
    _check_sizes(f, sources)

    # 1. One pass over the rows.
    random = np.random.default_rng(0)
    sums = [{}, {}]
    posterior = own_model.PosteriorSums() if f.mean else None
    total = 0
    for rows in _chunks(f, sources):
        total = total + rows["total"]
        if posterior:
            posterior.add(*(torch.from_numpy(rows[flag]) for flag in ("mean", "log_var")))
        for half, places in enumerate(arrays.halves_of(len(rows["x"]), random)):
            for name, product in _products(rows, places).items():
                sums[half][name] = sums[half].get(name, 0) + product

    # 2. The means of the products.
    sizes = arrays.half_sizes(sources["x"].count)
    halves = []
    for half, size in enumerate(sizes):
        means = {name: torch.from_numpy(product / size) for name, product in sums[half].items()}
        means.setdefault("fisher", mean_fisher)
        halves.append(headroom.ResidualMoments(**means))
    _warn_of_reconstructions(total, headroom.join_halves(halves, sizes), sum(sizes))
    columns = sources["residual"].columns
    return Measurement(sizes=sizes, halves=halves, posterior=posterior, columns=columns)


def _chunks(f, sources):
    """The rows chunk by chunk: {name: array (rows, columns)}. sources is {flag: arrays.Rows}.

    The names are the flags and, in addition, "u" and "total". u is the input of the encoder with a
    1 at its end. total (D,) is the sum of the residuals over the rows.

    The first u is subtracted from u. A linear encoder has a constant anyway, and sums of squares
    keep more digits. Rows of u with more columns than there are rows are replaced by their
    `arrays.row_coordinates`, which have the same inner products and eigenvalues. So are those of
    the residual of a Gaussian decoder. All rows are then one chunk.
    """
    inputs = [flag for flag in ("x", "y") if flag in sources]
    count = sources["x"].count
    is_wide = count < sum(sources[flag].columns for flag in inputs)
    if f.likelihood == "gaussian":
        is_wide |= count < sources["residual"].columns
    ordered = list(sources.values())
    chunks = [arrays.read_all(f, ordered)] if is_wide else arrays.chunks(f, ordered)

    first = None
    for chunk in chunks:
        rows = dict(zip(sources, chunk))
        u = np.concatenate([rows[flag] for flag in inputs], axis=1)
        if first is None:
            first = u[:1].copy()
        u = u - first
        rows["total"] = rows["residual"].sum(0)
        if is_wide:
            u = arrays.row_coordinates(u)
        if is_wide and f.likelihood == "gaussian":
            rows["residual"] = arrays.row_coordinates(rows["residual"])
        rows["u"] = np.concatenate([u, np.ones_like(u[:, :1])], axis=1)
        yield rows


def _products(rows, places):
    """The sums of products over the rows at some places of a chunk, for ResidualMoments."""
    u = rows["u"][places]
    r = rows["residual"][places]
    products = {"cross": r.T @ u, "moment": u.T @ u, "squares": r.T @ r}
    if "fisher" in rows:
        products["fisher"] = rows["fisher"][places].sum(0)
    return products


def _check_sizes(f, sources):
    """End the program if the arrays are too large, or if --log_var does not fit --mean."""
    for flag in ("x", "y", "residual"):
        if flag in sources:
            arrays.check_size(f, sources[flag])
    columns = sources["residual"].columns
    if f.likelihood != "gaussian" and columns > arrays.MAX_COLUMNS:
        common.stop(
            f,
            f"--residual: got {columns:,} columns, wants at most {arrays.MAX_COLUMNS:,} for "
            f"{losses.decoder_flag(f)}; average neighbouring pixels",
        )
    if "y" in sources:
        joined = sources["x"].columns + sources["y"].columns
        if min(sources["x"].count, joined) > arrays.MAX_COLUMNS:
            common.stop(
                f,
                f"--y: got {joined:,} columns together with --x, wants at most "
                f"{arrays.MAX_COLUMNS:,}; average neighbouring pixels",
            )
    if f.mean and sources["mean"].columns != sources["log_var"].columns:
        common.stop(
            f,
            f"--log_var: got {sources['log_var'].columns:,} columns, wants "
            f"{sources['mean'].columns:,} columns like --mean",
        )


def _warn_of_reconstructions(total, moments, count):
    """Warn if the residuals have so large a mean that they may be the reconstructions.

    total (D,) is the sum of the residuals over the rows, and moments are those of all rows.
    """
    square = moments.squares.trace().item()
    share = ((total / count)**2).sum() / square if square > 0 else 0
    if share > 0.5:
        arrays.warn(
            f"the squared mean of --residual is {share:.0%} of its mean square; a residual is the "
            "target minus the reconstruction; is this the reconstruction itself?"
        )


def _warn_of_many_collapsed(settings, columns):
    """Warn if --collapsed exceeds the number of columns of --residual and cannot be checked.

    More units than columns are possible, but such a number may also be a typing error. With --d_1,
    `_check_units` has compared the two numbers.
    """
    unchecked = [f.collapsed for f in settings if not f.d_1]
    largest = max(unchecked, default=0)
    if largest > columns:
        noun = "column" if columns == 1 else "columns"
        arrays.warn(
            f"--collapsed is {largest:,}, but --residual has {columns:,} {noun}, so at most "
            f"{columns:,} of these units can lower the loss; with --d_1, the number of all units, "
            "--collapsed is checked"
        )


def _read_mean_fisher(f):
    """H (columns of --residual,), float64, if --fisher has means over the rows, otherwise None.

    Ends the program unless it has means, or a row for each row of --residual.
    """
    residual = arrays.open_file(f, "residual")
    source = arrays.open_file(f, "fisher")
    count, columns = residual.count, residual.columns
    shape = (source.count, source.columns)
    if shape == (count, columns):
        return None
    # The means may have the shape of an image, whose first dimension is not that of rows.
    if source.count * source.columns != columns:
        common.stop(
            f,
            f"--fisher: got {source.count:,} rows of {source.columns:,} numbers, wants one row of "
            f"{columns:,} numbers like --residual, or {count:,} such rows like --x",
        )
    numbers = source.read(0, source.count).reshape(shape).astype(np.float64)
    arrays.check_numbers(f, source, numbers, 0)
    return torch.from_numpy(numbers.reshape(-1))


def _check_fisher(f, moments):
    """End the program if the information cannot belong to the residuals."""
    if not (moments.fisher > 0).any():
        common.stop(f, "--fisher: all numbers are 0, wants a column with information")
    is_wrong = (moments.fisher == 0) & (moments.squares.diag() > 0)
    if is_wrong.any():
        column = int(is_wrong.nonzero()[0])
        common.stop(
            f,
            f"--fisher: column {column:,} (counted from 0) is 0 in every row, wants information "
            "wherever --residual is not 0",
        )


# --- The result of a setting ---


@dataclass
class Examined:
    """A setting, its headroom.PostMortem, and the number of columns of --residual."""
    f: common.BaseFlags
    result: headroom.PostMortem
    columns: int


def examine(settings):
    """The result of each setting: a list of Examined. Ends the program if one is not finite."""
    measurement = _measure(settings[0])
    _warn_of_many_collapsed(settings, measurement.columns)
    return [Examined(f, _examine_setting(f, measurement), measurement.columns) for f in settings]


def _examine_setting(f, measurement):
    """The headroom.PostMortem of one setting."""
    unit_arguments = {"collapsed": f.collapsed, "units": f.d_1 or None}
    if measurement.posterior:
        unit_arguments = _count_units(f, measurement.posterior)
    if f.likelihood != "gaussian":
        _check_fisher(f, headroom.join_halves(measurement.halves, measurement.sizes))
    try:
        return headroom.examine(
            measurement.halves,
            measurement.sizes,
            beta=f.beta,
            likelihood=f.likelihood,
            eta_dec=f.eta_dec,
            **unit_arguments,
        )
    except ValueError as error:
        common.stop(f, f"--residual: {error}")


def _count_units(f, posterior):
    """The arguments of headroom.examine that --mean and --log_var determine."""
    kl = posterior.kl(f.eta_enc)
    if f.d_1 and f.d_1 != len(kl):
        common.stop(f, f"--d_1: got {f.d_1}, wants {len(kl)}, the number of columns of --mean")
    if not np.isfinite(kl).all():
        unit = int(np.flatnonzero(~np.isfinite(kl))[0])
        common.stop(
            f,
            f"--log_var: the KL of column {unit} (counted from 0) is not finite, wants logarithms "
            "of variances",
        )
    return {
        "collapsed": headroom.count_collapsed(kl),
        "units": len(kl),
        "kl": kl,
        "active": posterior.active(f.eta_enc),
    }


# --- The report ---


def report(examined):
    """Print, draw and save whether the objective or training collapsed the units."""
    f = examined.f
    result = examined.result
    print(f"\n{result.answer()}")
    if f.loss != "none":
        nat = 1 / losses.nats_per_unit(f, examined.columns)
        print(
            f"The KL weight of {f.loss} is {f.kl_weight / f.beta:.4g} times beta. 1 nat is "
            f"{nat:.4g} of this loss."
        )
    print(result.kl_in_words())
    folder = files.run_dir(f, None)
    if result.collapsed:
        if f.likelihood == "gaussian":
            _print_gaussian(f, result)
        else:
            _print_other_decoder(f, result)
        _draw(folder / "headroom.png", f, result)
    _save(folder / "headroom.json", f, result)
    print(f"files: {folder}", file=sys.stderr)


def _print_gaussian(f, result):
    """Print the figures behind the verdict on a model with a Gaussian decoder."""
    gain, any_gain = result.gains
    held_out, any_held_out = result.held_out_gains
    print(
        f"The headroom is {gain:.4f} nats per row, from the {result.count:,} rows of {f.x} and "
        f"{f.residual}."
    )
    print(
        f"The held-out headroom is {held_out:.4f} nats per row. Its units are fitted on one half "
        "of the rows and measured on the other half."
    )
    print(
        f"With any encoder the headroom is {any_gain:.4f} nats per row, and held out it is "
        f"{any_held_out:.4f}. Both are too large unless each residual is a mean over many draws."
    )
    _print_further_units(f, result)


def _print_further_units(f, result):
    """Print one row for each unit that would lower the loss, and for the next three."""
    level = result.level
    tau, any_tau = result.eigenvalues
    table = [
        ["unit", "tau", "tau / threshold", "gain (nats)", "tau, any encoder", "gain, any encoder"]
    ]
    gaining = int((any_tau[:result.collapsed] > level).sum())
    for i in range(min(result.collapsed, len(tau), gaining + 3)):
        gains = []
        for values in (tau, any_tau):
            gains.append(
                headroom.gain_of_units(values[i:i + 1], 1, beta=f.beta, weight=1, std=f.eta_dec)
            )
        table.append([
            str(i + 1),
            f"{tau[i]:.4f}",
            f"{tau[i] / level:.4f}",
            f"{gains[0]:.4f}",
            f"{any_tau[i]:.4f}",
            f"{gains[1]:.4f}",
        ])

    print(f"\nFurther units in place of the collapsed ones. {result.threshold_in_words()}")
    common.print_table(table)


def _print_other_decoder(f, result):
    """Print the figures behind the verdict on a model with another decoder."""
    print(
        f"\nFrom the {result.count:,} rows of {f.x} and {f.residual}. Held-out figures have "
        "directions from one half of the rows and are measured on the other half."
    )
    common.print_table(result.table())
    print(result.threshold_in_words())


def _draw(path, f, result):
    """Draw what each collapsed unit could describe, beside the threshold."""
    pictures.draw_panels(
        path,
        {result.verdict: result.level_headroom()},
        width=5.2,
        height=4.2,
        caption=files.spell(files.changed_settings(f, None)),
        draw=pictures.plot_headroom,
    )


def _save(path, f, result):
    """Write headroom.json."""
    saved = files.description(f, None)
    saved["dataset"] = f.x
    saved["rows"] = result.count
    saved.update(dataclasses.asdict(result.level_headroom()))
    saved["units"] = result.units
    saved["kl"] = result.kl
    saved["active"] = result.active
    saved["held_out"], saved["held_out_any"] = result.held_out_gains
    if result.held_out_rho:
        saved["held_out_rho_1"], saved["held_out_rho_1_any"] = result.held_out_rho
    for name in ("cause", "verdict", "certainty", "remedy"):
        saved[name] = getattr(result, name)
    files.write_json(path, saved)
