"""The post-mortem of a trained VAE: did the objective collapse its units, or did training?

predict_collapse.py calls this module if --residual is given. The model is the user's own, and only
two or three arrays of it are known. In the words of headroom.py, which has the theory, they are

    --x         u, the inputs of the encoder, without the 1 at their end
    --residual  r, the targets minus the mean reconstructions
    --fisher    the diagonal of H, for a Bernoulli or a Poisson decoder

In this module, `f` is a setting of predict_collapse.py. First come the moments of the arrays, then
the figures and the verdict, and then the report.

Each figure is computed twice. The first one is that of all rows. It is too large if the rows are
few, because any regression explains a part of its own rows by chance. The held-out figure has its
units from one half of the rows, and is measured on the other half. It is the mean over both ways to
choose the halves. If the two lead to different verdicts, there are too few rows for a verdict.
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
import pictures
import theory

# The ridges that the held-out headroom tries, as shares of the total variance of u. The ridge with
# the largest gain counts, since each gain is measured on rows that were not used for the fit.
RIDGES = (0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


@dataclass
class PostMortem:
    """The headroom of a trained model, from its residuals. See headroom.py.

    Each pair below belongs to units with a linear encoder and to units with any encoder.

    f: the setting.
    count: the number of rows.
    level: the threshold. A unit with a larger eigenvalue lowers the loss.
    eigenvalues: a pair of tensors (D,) in descending order. For a Gaussian decoder they are tau,
        the variances that further units could describe. For another decoder they are rho.
    gains: the pair of headrooms on all rows, in nats per row. For another decoder than a Gaussian
        one they are lower bounds, which are 0 for a Poisson decoder.
    held_out_gains: the gains on one half of the rows of units that were found on the other half.
    held_out_rho: the rho_1 on one half of the rows, in a direction that was found on the other
        half. None for a Gaussian decoder.
    idle_columns: the number of columns without information.
    verdict: whether the objective or training collapsed the units, in words.
    """
    f: common.BaseFlags
    count: int
    level: float
    eigenvalues: tuple
    gains: tuple
    held_out_gains: tuple
    held_out_rho: tuple | None
    idle_columns: int
    verdict: str


def examine(settings):
    """The PostMortem of each setting. Ends the program if a result is not finite."""
    count, halves = _measure_halves(settings[0])
    return [_examine_setting(f, count, halves) for f in settings]


# --- The moments of the arrays ---


def _measure_halves(f):
    """The moments of each half of the rows, in one pass over the rows.

    Returns (number of rows, [ResidualMoments of one half, ResidualMoments of the other]). See
    headroom.py. u is a row of --x with a 1 at its end, and r is the row of --residual.
    """
    sources = arrays.open_rows(f, ("x", "residual"))
    mean_fisher = None
    if f.fisher:
        rows_of_fisher, mean_fisher = _open_fisher(
            f, count=sources[0].count, columns=sources[1].columns
        )
        if rows_of_fisher is not None:
            sources.append(rows_of_fisher)

    random = np.random.default_rng(0)
    sums = [{}, {}]
    for u, r, *information in arrays.chunks(f, sources):
        u = np.concatenate([u, np.ones_like(u[:, :1])], axis=1)
        for half, places in enumerate(arrays.halves_of(len(u), random)):
            half_u = u[places]
            half_r = r[places]
            products = {
                "cross": half_r.T @ half_u,
                "moment": half_u.T @ half_u,
                "squares": half_r.T @ half_r,
            }
            if information:
                products["fisher"] = information[0][places].sum(0)
            for name, product in products.items():
                sums[half][name] = sums[half].get(name, 0) + product

    halves = []
    for half, size in enumerate(arrays.half_sizes(sources[0].count)):
        means = {name: torch.from_numpy(total / size) for name, total in sums[half].items()}
        means.setdefault("fisher", mean_fisher)
        halves.append(headroom.ResidualMoments(**means))
    return sources[0].count, halves


def _open_fisher(f, count, columns):
    """The file of --fisher, either row by row or as means over all rows.

    Returns (Rows, None) if it has `count` rows of `columns` numbers, and (None, H) if it has the
    means (columns,), float64. Ends the program if it has neither shape.
    """
    source = arrays.open_file(f, "fisher")
    shape = (source.count, source.columns)
    if shape == (count, columns):
        return source, None
    if shape not in ((1, columns), (columns, 1)):
        common.stop(
            f,
            f"--fisher: got {source.count:,} rows of {source.columns:,} numbers, wants one row of "
            f"{columns:,} numbers like --residual, or {count:,} such rows like --x",
        )
    numbers = source.read(0, source.count).reshape(shape).astype(np.float64)
    arrays.check_numbers(f, source, numbers, 0)
    return None, torch.from_numpy(numbers.reshape(-1))


def _join_halves(halves, count):
    """The ResidualMoments of all rows, from those of the two halves of `count` rows."""
    shares = [size / count for size in arrays.half_sizes(count)]
    means = {}
    for name in headroom.ResidualMoments._fields:
        parts = [getattr(half, name) for half in halves]
        means[name] = None
        if parts[0] is not None:
            means[name] = sum(share * part for share, part in zip(shares, parts))
    return headroom.ResidualMoments(**means)


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


# --- The figures and the verdict ---


def _examine_setting(f, count, halves):
    """The PostMortem of one setting, from the moments of the halves of `count` rows."""
    moments = _join_halves(halves, count)
    parts = (headroom.linear_part(moments.cross, moments.moment), moments.squares)

    # 1. The eigenvalues. The first ones say whether the collapse with another decoder is stable.
    held_out_rho = None
    unstable = ("", "")
    if f.likelihood == "gaussian":
        level = headroom.gain_threshold(beta=f.beta, weight=1, std=f.eta_dec)
        eigenvalues = tuple(theory.spectrum(part) for part in parts)
    else:
        _check_fisher(f, moments)
        level = f.beta
        eigenvalues = tuple(headroom.instability_ratios(part, moments.fisher) for part in parts)
        held_out_rho = _held_out_rho(halves, moments.fisher)
        largest = [rho[0].item() for rho in eigenvalues]
        unstable = (
            headroom.instability(*largest, level), headroom.instability(*held_out_rho, level)
        )

    # 2. The gains.
    gains, held_out_gains = _gains_of_units(f, parts, halves)
    figures = {
        "level": level,
        "tau": torch.cat(eigenvalues),
        "headroom": gains,
        "held-out headroom": held_out_gains,
    }
    arrays.check_finite([f], figures)

    return PostMortem(
        f=f,
        count=count,
        level=level,
        eigenvalues=eigenvalues,
        gains=gains,
        held_out_gains=held_out_gains,
        held_out_rho=held_out_rho,
        idle_columns=0 if moments.fisher is None else int((moments.fisher == 0).sum()),
        verdict=_verdict(f, gains, held_out_gains, unstable),
    )


def _held_out_rho(halves, fisher):
    """The `held_out_rho` of a PostMortem. fisher (D,) is the diagonal of H of all rows."""
    rhos = []
    for pairs in headroom.held_out_parts(halves):
        ratios = headroom.mean_ratios(pairs, fisher)
        rhos.append(ratios[0].item() if len(ratios) else 0.0)
    return tuple(rhos)


def _gains_of_units(f, parts, halves):
    """(gains, held_out_gains) of a PostMortem. parts are T and F."""
    if f.likelihood == "poisson":
        return (0.0, 0.0), (0.0, 0.0)

    # A decoder whose curvature is at most B gains at least as much as a Gaussian one whose variance
    # is 1 / B, and whose residual is r / B.
    scale = 1
    std = f.eta_dec
    if f.likelihood != "gaussian":
        scale = 1 / headroom.CURVATURE_BOUNDS[f.likelihood]
        std = scale**0.5
    objective = {"beta": f.beta, "weight": 1, "std": std}
    gains = []
    for part in parts:
        tau = theory.spectrum(scale**2 * part)
        gains.append(headroom.gain_of_units(tau, f.collapsed, **objective))

    regressions = [(scale * half.cross, half.moment) for half in halves]
    linear_gains = []
    for ridge in RIDGES:
        linear_gains.append(headroom.held_out_gain(regressions, ridge, f.collapsed, **objective))

    # A unit with any encoder can read r itself. The regression of r on r is exact.
    products = [scale**2 * half.squares for half in halves]
    identities = [(product, product) for product in products]
    any_gain = headroom.held_out_gain(identities, 0, f.collapsed, **objective)
    return tuple(gains), (max(linear_gains), any_gain)


def _verdict(f, gains, held_out_gains, unstable):
    """Whether the objective or training collapsed the units, or that there are too few rows.

    gains and held_out_gains are those of a PostMortem. unstable is a pair of results of
    headroom.instability, on all rows and on held-out rows.
    """
    cause = headroom.cause_of_collapse(*gains, unstable[0])
    held_out_cause = headroom.cause_of_collapse(*held_out_gains, unstable[1])
    if cause == held_out_cause:
        return headroom.verdict(
            None,
            f.collapsed,
            nats=gains[0],
            nats_any=gains[1],
            unstable=unstable[0],
            likelihood=f.likelihood,
        )

    words = headroom.collapse_in_words(None, f.collapsed)
    only_any_encoder = "training" not in (cause, held_out_cause)
    if f.likelihood == "gaussian" and only_any_encoder:
        pronoun = "it" if f.collapsed == 1 else "them"
        return (
            f"{words}: with a linear encoder, reviving {pronoun} would not lower the loss; there "
            "are too few rows to decide whether it would with a richer encoder"
        )
    return (
        f"{words}: there are too few rows to decide whether because of the objective or of training"
    )


# --- The report ---


def report(post_mortem):
    """Print, draw and save whether the objective or training collapsed the units."""
    if post_mortem.f.likelihood == "gaussian":
        _print_gaussian(post_mortem)
    else:
        _print_other_decoder(post_mortem)

    folder = files.run_dir(post_mortem.f, None)
    _draw(folder / "headroom.png", post_mortem)
    _save(folder / "headroom.json", post_mortem)
    print(f"files: {folder}", file=sys.stderr)


def _print_gaussian(post_mortem):
    """Print the verdict on a model with a Gaussian decoder, and the figures behind it."""
    f = post_mortem.f
    gain, any_gain = post_mortem.gains
    held_out, any_held_out = post_mortem.held_out_gains
    print(f"\nWith beta = {f.beta:g} and eta_dec = {f.eta_dec:g}, {post_mortem.verdict}.")
    print(
        f"The headroom is {gain:.4f} nats per row, from the {post_mortem.count:,} rows of {f.x} "
        f"and {f.residual}."
    )
    print(
        f"The held-out headroom is {held_out:.4f} nats per row. Its units are fitted on one half "
        "of the rows and measured on the other half."
    )
    print(
        f"With any encoder the headroom is {any_gain:.4f} nats per row, and held out it is "
        f"{any_held_out:.4f}. Both are too large unless each residual is a mean over many draws."
    )
    _print_further_units(post_mortem)


def _print_further_units(post_mortem):
    """Print one row for each unit that would lower the loss, and for the next three."""
    f = post_mortem.f
    level = post_mortem.level
    tau, any_tau = post_mortem.eigenvalues
    table = [
        ["unit", "tau", "tau / threshold", "gain (nats)", "tau, any encoder", "gain, any encoder"]
    ]
    gaining = int((any_tau[:f.collapsed] > level).sum())
    for i in range(min(f.collapsed, len(tau), gaining + 3)):
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

    print(
        "\nFurther units in place of the collapsed ones. A unit lowers the loss if its tau exceeds "
        f"the threshold beta eta_dec^2 = {level:g}."
    )
    common.print_table(table)


def _print_other_decoder(post_mortem):
    """Print the verdict on a model with another decoder, and the figures behind it."""
    f = post_mortem.f
    decoder = f.likelihood.capitalize()
    print(f"\nWith beta = {f.beta:g} and a {decoder} decoder, {post_mortem.verdict}.")
    if post_mortem.idle_columns == 1:
        print("1 column has no information and is left out.")
    elif post_mortem.idle_columns:
        print(f"{post_mortem.idle_columns} columns have no information and are left out.")

    table = [["", "linear encoder", "any encoder"]]
    first_rhos = [values[0].item() for values in post_mortem.eigenvalues]
    rows = {"rho_1": first_rhos, "rho_1, held out": post_mortem.held_out_rho}
    if f.likelihood != "poisson":
        rows["guaranteed gain (nats)"] = post_mortem.gains
        rows["guaranteed gain, held out"] = post_mortem.held_out_gains
    for name, values in rows.items():
        table.append([name, *(f"{value:.4f}" for value in values)])

    print(
        f"\nFrom the {post_mortem.count:,} rows of {f.x} and {f.residual}. Collapse is unstable if "
        "rho_1 exceeds beta. Held-out figures have directions from one half of the rows and are "
        "measured on the other half."
    )
    common.print_table(table)
    if f.likelihood == "poisson":
        print("A Poisson decoder has no guaranteed gain.")


def _level_headroom(post_mortem):
    """The post-mortem as a headroom.LevelHeadroom. Only the collapsed units are known."""
    f = post_mortem.f
    gain, any_gain = post_mortem.gains
    tau, any_tau = post_mortem.eigenvalues
    return headroom.LevelHeadroom(
        units=f.collapsed,
        collapsed=f.collapsed,
        headroom=gain,
        headroom_any=any_gain,
        level=post_mortem.level,
        tau=tau[:f.collapsed].tolist(),
        tau_any=any_tau[:f.collapsed].tolist(),
        theta=[],
        likelihood=f.likelihood,
    )


def _draw(path, post_mortem):
    """Draw what each collapsed unit could describe, beside the threshold."""
    pictures.draw_panels(
        path,
        {post_mortem.verdict: _level_headroom(post_mortem)},
        width=5.2,
        height=4.2,
        caption=files.spell(files.changed_settings(post_mortem.f, None)),
        draw=pictures.plot_headroom,
    )


def _save(path, post_mortem):
    """Write headroom.json."""
    result = files.description(post_mortem.f, None)
    result["dataset"] = post_mortem.f.x
    result["rows"] = post_mortem.count
    result.update(dataclasses.asdict(_level_headroom(post_mortem)))
    result["held_out"], result["held_out_any"] = post_mortem.held_out_gains
    if post_mortem.held_out_rho:
        result["held_out_rho_1"], result["held_out_rho_1_any"] = post_mortem.held_out_rho
    result["verdict"] = post_mortem.verdict
    files.write_json(path, result)
