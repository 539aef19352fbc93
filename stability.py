"""The prediction for decoders that are not Gaussian: from which beta on is collapse stable?

predict_collapse.py calls this module. The encoder and the decoder may be any networks, and the
decoder gives each column its mean where all units are collapsed. headroom.py has the theory. In
this module, `f` is a setting of predict_collapse.py. First come the moments of the data, then the
prediction, and then the report.
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
import pictures
import theory
from linear_prediction import (
    beta_in_words, curve_betas, data_name, groups_of, table_betas, warn_of_few_rows
)


# --- The moments of the data ---


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


# --- The prediction ---


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
    is_grey: whether x has numbers between 0 and 1, for a Bernoulli decoder.
    """
    count: int
    columns: int
    constants: int
    rho: torch.Tensor
    held_out: float
    ratios: torch.Tensor | None
    loss: float
    is_grey: bool


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
    f: common.BaseFlags
    betas: list
    instability: Instability
    table: dict
    point: dict


def predict_stability(settings):
    """The StabilityPrediction for each group of settings that differ in beta only.

    Prints what --loss amounts to.
    """
    instability = measure_instability(settings[0])
    columns = instability.columns
    known = [losses.with_beta(f, columns, units=f.d_1) for f in settings]

    predictions = []
    for group in groups_of(known):
        if group[0].loss != "none":
            print(losses.in_words(group, columns, units=group[0].d_1))
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
    if source.columns > arrays.MAX_COLUMNS:
        common.stop(
            f,
            f"--x: got {source.columns:,} columns, wants at most {arrays.MAX_COLUMNS:,} for "
            f"{losses.decoder_flag(f)}; choose columns with --columns, or average neighbouring "
            "pixels",
        )
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
        # The square of a 0 or a 1 is the number itself.
        is_grey=f.likelihood == "bernoulli" and (
            not torch.equal(moments.products.diag(), moments.total)
        ),
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


# --- The report ---


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
    """Print from which beta on collapse is stable, in words. The first line is the answer."""
    f = prediction.f
    instability = prediction.instability
    decoder = headroom.DECODERS[f.likelihood]
    first_rho = instability.rho[0].item()
    [unstable] = prediction.point["unstable"]
    directions = "1 direction" if unstable == 1 else f"{unstable} directions"
    state = f"unstable in {directions}" if unstable else "stable"
    print(
        f"\nAt {beta_in_words(f, f.beta)}, collapse of all units is {state}; it is stable from "
        f"{beta_in_words(f, first_rho)} on."
    )
    print(
        f"This holds for any encoder and for a {decoder} decoder with a bias for each column, on "
        f"{data_name(f)} ({instability.count:,} rows)."
    )
    print(
        "It is a local statement: where collapse is stable, no small step out of it lowers the "
        "loss. A better solution far from collapse is not excluded."
    )
    if unstable:
        print(
            "The number of unstable directions is no count of the units that training would "
            "activate."
        )
    print_held_out(f, instability)
    largest = ", ".join(f"{rho:.4g}" for rho in instability.rho[:5])
    print(f"The largest rho are {largest}.")
    print(f"The loss of the collapsed model is {instability.loss:.2f} nats per row.")
    print_remarks_on_data(f, instability)


def print_held_out(f, instability):
    """Print the held-out rho_1, and what it would be without any structure in the data."""
    expected = ""
    if not instability.is_grey:
        columns = "Poisson columns" if f.likelihood == "poisson" else "columns"
        expected = f" Independent {columns} would have about 1."
    print(
        f"The held-out rho_1 is {instability.held_out:.4g}. Its direction is found on one half of "
        f"the rows and measured on the other half.{expected}"
    )


def print_remarks_on_data(f, instability):
    """Print how many columns are left out, and that images are binarised."""
    if instability.constants:
        verb = "is" if instability.constants == 1 else "are"
        constants = f"{instability.constants} of {instability.columns} columns {verb} constant"
        print(f"{constants} and left out.")
    if instability.is_grey:
        print(
            "Some numbers lie between 0 and 1. The loss is then the binary cross-entropy "
            "-x log p - (1 - x) log(1 - p), which is no likelihood of such numbers."
        )
    if f.dataset != "none" and f.loss == "none":
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
