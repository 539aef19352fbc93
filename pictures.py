"""The pictures of a script, in three sections.

The first one has the helpers that draw and save a picture. The others have the pictures of one run
and of a grid of runs. A run is one setting of a script's flags, with its trained model and its
results. A function named draw_... saves a picture, and a function named plot_... draws into given
axes. figures.py has the pictures of reproduce.py.

Pictures are drawn without a display. matplotlib and torchvision are imported in the functions that
need them, so that scripts start fast.
"""
import dataclasses
import itertools
import math
import re
import sys
import textwrap
from dataclasses import dataclass

import common
import numpy as np
import torch

import files
import theory
import verify

# The thresholds of collapse curves, in nats (see `collapse_curve`).
EPSILON = np.geomspace(1e-4, 1e2, 241)

# The largest number of runs that a legend lists, and of points that have a label each.
MAX_LABELS = 12

# The number of images in each cell of a contact sheet, and of those side by side.
SHEET_IMAGES = 20
SHEET_COLUMNS = 5

# The number of shades between black and white in the arrays of a contact sheet. More shades cannot
# be told apart in a picture, and make its file twice as large.
SHADES = 64


# ----------------------------------------------------------------- how a picture is drawn and saved

def save_figure(path, columns, rows, width, height, caption, draw, height_ratios=None):
    """Draw a picture of rows x columns axes and save it as a PNG file. Raises OSError.

    width and height are those of each of the axes, in inches. With height_ratios, a row is its
    ratio times as high. draw(axes) draws into the array of axes (rows, columns). The caption is
    written below them.
    """
    from matplotlib.figure import Figure

    # At 8 points, 13 characters fit into an inch. With a space between flags, as in "lr=1, seed=0",
    # lines can break there.
    line_width = int(13 * columns * width)
    spaced_caption = re.sub(r",(?=\w+=)", ", ", caption)
    lines = textwrap.wrap(spaced_caption, line_width)

    ratios = height_ratios or [1] * rows
    figure = Figure(
        figsize=(columns * width, sum(ratios) * height + 0.15 * len(lines)), layout="constrained"
    )
    draw(figure.subplots(rows, columns, squeeze=False, height_ratios=ratios))
    figure.supxlabel("\n".join(lines), fontsize=8)
    files.write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def draw_panels(path, panels, width, height, caption, draw):
    """Draw a picture of several panels, at most five in a row, in rows of nearly equal length.

    panels is {title: content}. draw(ax, title, content) draws one of them, whose size is width x
    height inches.
    """
    columns = panel_columns(len(panels))

    def draw_all(axes):
        for ax, (title, content) in zip(axes.flat, panels.items()):
            draw(ax, title, content)
        for ax in axes.flat[len(panels):]:
            ax.axis("off")

    save_figure(
        path,
        columns=columns,
        rows=math.ceil(len(panels) / columns),
        width=width,
        height=height,
        caption=caption,
        draw=draw_all,
    )


def panel_columns(count):
    """The number of panels in a row of `draw_panels`: 5 of 5, but 3 of 6."""
    rows = math.ceil(count / 5)
    return math.ceil(count / rows)


def show_images(ax, title, images, columns=10, **font):
    """Show images (n, 784) or (n, C, H, W) as tiles in this number of columns."""
    from torchvision.utils import make_grid

    images = images.detach()
    if images.ndim == 2:
        images = images.view(-1, 1, 28, 28)
    tiles = make_grid(images.float().clamp(0, 1).cpu(), columns, padding=1, pad_value=0.4)
    ax.imshow(tiles.permute(1, 2, 0).numpy(), vmin=0, vmax=1)
    ax.set_title(title, **font)
    ax.axis("off")


def legend_outside(ax):
    """Add a legend at the right of the axes, where it covers no curve."""
    ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def set_log_axis(ax, name, values):
    """Make the axis "x" or "y" logarithmic, and label it with plain numbers such as 0.2, 0.5 and 1.

    values are the positive numbers that it shows. The fewer decades they span, the more numbers per
    decade are labelled.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    decades = math.log10(max(values) / min(values))
    digits = (1,)
    if decades < 3:
        digits = (1, 2, 5)
    if decades < 0.5:
        digits = range(1, 10)
    ax.set(**{f"{name}scale": "log"})
    axis = {"x": ax.xaxis, "y": ax.yaxis}[name]
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def latent_name(level):
    """The name of the latent variable of a level: "z" for "", "z1" for "_1"."""
    return "z" + level.removeprefix("_")


def context_level(model):
    """The suffix of the level that is not learned but computed from x, such as "_5", or None.

    Such a level is the context of MNIST_HVAE_DCT.py and MNIST_HVAE_DVP.py. It is the top level.
    """
    levels = getattr(model, "levels", None)
    learned_levels = getattr(model, "learned_levels", levels)
    return f"_{levels}" if learned_levels != levels else None


def first_value(dictionary):
    """The first value of a dict."""
    return next(iter(dictionary.values()))


# -------------------------------------------------------------------------- the pictures of one run

def draw_run(run, folder):
    """Draw the pictures of one report.EvaluatedRun into a folder. Raises OSError.

    They are collapse.png and training.png, headroom.png if the run has a headroom, and for models
    of images reconstructions.png and samples.png.
    """
    f, data, model = run.f, run.data, run.model
    caption = f"{files.caption([f], [data])} seed={f.seed}"
    device = data.test[0].device

    context = context_level(model)
    draw_collapse(folder / "collapse.png", {"": run.examples}, caption, context=context)
    if run.result.headroom:
        draw_headroom(folder / "headroom.png", run.result.headroom, caption)
    curves = {}
    for name, curve in run.result.curves.items():
        curves[f"{name} (context)" if name == f"kl{context}" else name] = curve
    draw_panels(
        folder / "training.png",
        curves,
        width=3.4,
        height=3,
        caption=caption,
        draw=plot_training,
    )

    if hasattr(model, "reconstructions"):
        images = reconstructions(model, f, data, 100)
        draw_images(folder / "reconstructions.png", images, caption)

    if hasattr(model, "samples"):
        with torch.no_grad(), common.seeded(f.seed, "samples", device):
            images = model.samples(100, common.on_device(f, data.test[0]))
        if not isinstance(images, dict):
            images = {"samples from the prior": images}
        draw_images(folder / "samples.png", images, caption)


def draw_images(path, images, caption):
    """Draw one panel of tiles for each {title: images}."""
    draw_panels(path, images, width=4.2, height=4.7, caption=caption, draw=show_images)


@torch.no_grad()
def reconstructions(model, f, data, count):
    """A model's reconstructions of about `count` test examples, {caption: images}.

    There is the same number of examples from each class, and the classes come one after another.
    """
    common.set_precision(f)
    like = data.test[0]
    classes = data.test_labels.unique()[:count]
    count_per_class = max(1, count // len(classes))
    indices_by_class = []
    for label in classes:
        indices = (data.test_labels == label).nonzero()[:, 0]
        indices_by_class.append(indices[:count_per_class])
    chosen = torch.cat(indices_by_class)
    batch = [tensor[chosen] for tensor in data.test]
    # Some models draw their reconstructions at random.
    with common.seeded(f.seed, "evaluation", like.device):
        return model.reconstructions(*batch, common.on_device(f, like))


def plot_training(ax, title, curve):
    """Plot a curve of the training, a list with one value per epoch."""
    # A line through one point would not be visible.
    ax.plot(range(1, len(curve) + 1), curve, marker="o" if len(curve) == 1 else None)
    split = "test" if title.startswith("test") else "training"
    ax.set(title=title, xlabel="epoch", ylabel=f"nats per {split} example")
    if len(curve) == 1:
        ax.set(xticks=[1])
    else:
        ax.locator_params(axis="x", integer=True)


def draw_collapse(path, runs, caption, context=None):
    """Draw collapse curves, with one panel per level and one curve per run that has the level.

    runs is {label: examples}, where examples has "unit_kl" (n, d) of each level, in nats. context
    is the suffix of a level that is the context, see `context_level`. A level of `uniform_levels`
    has no panel but a sentence in the caption, unless no panel would be left.
    """
    panels = {}
    for name in level_entries(runs):
        panels[panel_title(name, runs, context)] = name

    uniform = uniform_levels(runs)
    if len(uniform) < len(panels):
        panels = {title: name for title, name in panels.items() if name not in uniform}
        caption = "; ".join([caption, *uniform.values()] if caption else uniform.values())

    columns = panel_columns(len(panels))
    last_of_first_row = list(panels)[columns - 1]
    # The legend takes a part of the width.
    width = 4.6 if len(runs) == 1 else 4.6 + 1.4 / columns

    def draw(ax, title, name):
        plot_collapse(ax, runs, name, legend=title == last_of_first_row)
        ax.set(title=title)

    draw_panels(path, panels, width=width, height=3.6, caption=caption, draw=draw)


def level_entries(runs):
    """The entries "unit_kl..." of all levels that some of the runs {label: examples} have."""
    names = []
    for examples in runs.values():
        for name in examples:
            if name.startswith("unit_kl") and name not in names:
                names.append(name)
    return names


def panel_title(name, runs, context):
    """The title of the panel of an entry such as "unit_kl_2"."""
    level = name.removeprefix("unit_kl")
    if level == context:
        return "units of the context"
    if level == "" and len(level_entries(runs)) > 1:
        return "units of all levels"
    return f"units of {latent_name(level)}"


def uniform_levels(runs):
    """The levels in which all runs agree that no unit collapses, or that all do: a dict.

    It is {entry such as "unit_kl_1": sentence}. A unit collapses if its KL is below 0.01 nats for
    95 % of the examples. Collapse curves of such a level show no more than the sentence.
    """
    sentences = {}
    for name in level_entries(runs):
        latent = latent_name(name.removeprefix("unit_kl"))
        shares = set()
        for examples in runs.values():
            if name in examples:
                shares.update(collapse_curve(examples[name], np.array([theory.ACTIVE])))
        if shares == {0}:
            sentences[name] = f"no unit of {latent} collapses (ε = {theory.ACTIVE} nats)"
        if shares == {1}:
            sentences[name] = f"all units of {latent} collapse (ε = {theory.ACTIVE} nats)"
    return sentences


def plot_collapse(ax, runs, name, legend=True):
    """Plot the collapse curves of one level, one curve per run, with a legend beside the axes.

    runs is {label: examples}, and name is the level's entry of the examples, such as "unit_kl_2".
    The colours follow the order of the runs. With many runs, the legend lists only some of them.
    legend=False leaves it out, for panels that share the legend of another one.
    """
    from matplotlib import colormaps

    label_every = math.ceil(len(runs) / MAX_LABELS)
    # Later curves are thinner, so that equal curves can be seen beside each other.
    widths = np.linspace(2.8, 1.4, len(runs)) if 1 < len(runs) <= MAX_LABELS else [1.8] * len(runs)
    for k, (label, examples) in enumerate(runs.items()):
        # A run without this level still has its colour in a legend that panels share.
        kl = examples.get(name)
        ax.step(
            EPSILON,
            100 * collapse_curve(kl, EPSILON) if kl is not None else np.full(len(EPSILON), np.nan),
            where="post",
            label=label if k % label_every == 0 else None,
            color=colormaps["viridis"](0.9 * k / max(1, len(runs) - 1)),
            linewidth=widths[k],
        )
    ax.set(xscale="log", xlabel="ε (nats)", ylabel="collapsed units (%), δ = 0.05", ylim=(-3, 103))
    if legend and len(runs) > 1:
        legend_outside(ax)


def collapse_curve(unit_kl, epsilon, delta=0.05):
    """The share of units that are (epsilon, delta)-collapsed (Lucas et al. 2019, arXiv 1911.02469).

    A unit is collapsed if P_x[KL_i < epsilon] >= 1 - delta. unit_kl (n, d) is in nats, and epsilon
    is (m,). Returns (m,).
    """
    return (kl_of_most_examples(unit_kl, delta)[:, None] < epsilon).mean(axis=0)


def kl_of_most_examples(unit_kl, delta=0.05):
    """The KL of each unit that a share of 1 - delta of the examples does not exceed.

    A unit is (epsilon, delta)-collapsed if this KL is below epsilon. unit_kl is (n, d), in nats.
    Returns (d,).
    """
    # The smallest number of examples whose share is at least 1 - delta. Rounding removes the error
    # of 1 - delta.
    count = math.ceil(round(len(unit_kl) * (1 - delta), 9))
    return np.sort(unit_kl, axis=0)[count - 1]


def draw_headroom(path, levels, caption):
    """Draw the headroom of each level, {latent: headroom.LevelHeadroom}, with its verdict."""
    panels = {}
    for latent, level in levels.items():
        panels[f"{latent}: {level.verdict()}"] = level
    draw_panels(path, panels, width=4.6, height=4.2, caption=caption, draw=plot_headroom)


def plot_headroom(ax, title, measured):
    """Plot what the units of a level describe, and what further units could describe.

    measured is a headroom.LevelHeadroom. The dashed line is the threshold above which a unit lowers
    the loss: it gains more than its KL costs. For a Gaussian decoder the points are variances. For
    another one they are the eigenvalues rho_i.
    """
    quantity = "variance" if measured.likelihood == "gaussian" else "eigenvalue ρ"
    active = len(measured.theta)
    if active:
        units = range(1, 1 + active)
        ax.plot(units, measured.theta, "o", label="variance described by active units")
    for encoder, tau, marker, color in (
        ("a linear", measured.tau, "x", "C1"), ("any", measured.tau_any, "+", "C2")
    ):
        further_units = range(1 + active, 1 + active + len(tau))
        label = f"{quantity} of further units with {encoder} encoder"
        # A log axis cannot show 0.
        ax.plot(further_units, np.maximum(tau, 1e-300), marker, color=color, label=label)
    ax.set(yscale="log", xlabel="unit", ylabel=quantity)
    threshold = measured.level
    if threshold:
        ax.axhline(
            threshold,
            color="0.5",
            linestyle="--",
            linewidth=1,
            label="threshold: a unit above it lowers the loss",
        )
        # Just before a model diverges, the KL of a unit can make its theta infinite.
        variances = np.array([threshold, *measured.theta, *measured.tau, *measured.tau_any])
        shown = variances[np.isfinite(variances) & (variances >= threshold / 100)]
        set_log_axis(ax, "y", shown)
        ax.set(ylim=(shown.min() / 2, 2 * shown.max()))
    ax.axvline(measured.units + 0.5, color="0.8", linewidth=1, label="number of units")
    ax.locator_params(axis="x", integer=True)
    ax.set_title(textwrap.fill(title, 60), fontsize=9)
    ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False)


# --------------------------------------------------------------------------- the pictures of a grid

def grid_dir(settings, data):
    """The folder of a grid's pictures: out_dir/<script>/grids/<its flags>."""
    varying = files.varying_flags(settings, data)
    flags = {}
    for name, values in varying.items():
        flags[name] = "+".join(map(str, values))
    for name, value in files.changed_settings(settings[0], data[0]).items():
        if name not in varying:
            flags[name] = value
    return files.run_dir(settings[0], data[0]).parent / "grids" / files.spell(flags)


@dataclass
class Grid:
    """The runs of a grid over one or two flags.

    flags: the flags that differ between the settings, {name: its values}. With two flags, each
        value of the first one is a row of a picture, and each value of the second one a column.
    cells: {tuple of the flags' values: report.EvaluatedRun}. Settings that diverged are left out.
        Among settings that differ only in the seed, it has the first one.
    model: any model of the script, for its closed form.
    caption: the caption of all pictures.
    """

    flags: dict
    cells: dict
    model: object
    caption: str

    @property
    def results(self):
        """{values of the flags: report.RunResult}"""
        return {values: run.result for values, run in self.cells.items()}

    @property
    def comparisons(self):
        """{values of the flags: verify.Comparison} of linear models."""
        return {values: run.result.theory for values, run in self.cells.items()}

    def are_linear_models(self):
        """Whether the models are linear, so that a closed form predicts their units."""
        return all(comparison is not None for comparison in self.comparisons.values())

    def is_dense(self):
        """Whether the closed form can also be computed between the settings.

        It can if all flags are scalars of the objective and all their values are numbers. A flag
        that may be a vector is no such scalar, because the closed forms take no tensor of vectors.
        """
        run = first_value(self.cells)
        fields = {field.name: field for field in dataclasses.fields(run.f)}
        for name, values in self.flags.items():
            is_scalar = fields[name].metadata["scalar"] and not fields[name].metadata["vector"]
            is_number = all(isinstance(value, float) for value in values)
            if not (is_scalar and is_number):
                return False
        return True

    def predicted(self, **flags):
        """The closed form for the first run's setting with other values of these flags."""
        run = first_value(self.cells)
        return self.model.predicted(dataclasses.replace(run.f, **flags), run.data)


def make_grid(evaluated_runs):
    """The Grid of report.EvaluatedRuns, or None if there is nothing to draw.

    That is so if the runs do not differ in one or two flags, if all of them diverged, or if this
    process has none of the models.
    """
    settings = [run.f for run in evaluated_runs]
    data = [run.data for run in evaluated_runs]
    flags = files.varying_flags(settings, data)

    cells = {}
    model = None
    for run in evaluated_runs:
        if run.result.metrics is not None:
            values_of_run = files.run_settings(run.f, run.data)
            cells.setdefault(tuple(values_of_run[name] for name in flags), run)
        if model is None:
            model = run.model
    if len(flags) not in (1, 2) or not cells or model is None:
        return None

    seeds = ",".join(dict.fromkeys(str(run.f.seed) for run in cells.values()))
    caption = f"{files.caption(settings, data)} seed={seeds}"
    return Grid(flags=flags, cells=cells, model=model, caption=caption)


def draw_grid(evaluated_runs):
    """Draw the pictures of a grid of report.EvaluatedRuns over one or two flags. Raises OSError.

    theory.png    linear models: the trained units beside the closed form
    linear.png    trained KLs and active units over those that a closed form predicts

    A grid over one flag also has:

    collapse.png  the collapse curves of all settings
    theory.npz    the arrays that theory.png shows, see `unit_curves`

    A grid over two flags also has:

    reconstructions_<k>.png    each kind of reconstruction, with the test images above them
    reconstructions.npz        the arrays that they show, see `sheet_arrays`
    metrics.png                a heat map for each metric
    """
    grid = make_grid(evaluated_runs)
    if grid is None:
        return
    settings = [run.f for run in evaluated_runs]
    data = [run.data for run in evaluated_runs]
    folder = grid_dir(settings, data)

    # 1. The trained values beside those that a closed form predicts.
    one_flag = len(grid.flags) == 1
    has_theory = grid.are_linear_models()
    if has_theory and one_flag:
        arrays = unit_curves(grid)
        draw_unit_curves(folder / "theory.png", arrays, grid.caption)
        write_arrays(folder / "theory.npz", arrays)
    elif has_theory and grid.is_dense():
        draw_active_map(folder / "theory.png", grid)

    # Where theory.png has predictions between the settings, linear.png adds nothing.
    has_closed_form = any(verify.closed_form(result) for result in grid.results.values())
    if has_closed_form and not (has_theory and grid.is_dense()):
        draw_beside_linear(folder / "linear.png", grid)

    # 2. The settings beside each other.
    if one_flag:
        draw_collapse_over(folder / "collapse.png", grid)
    else:
        arrays = sheet_arrays(grid)
        for kind in sheet_kinds(arrays):
            draw_sheet(folder / f"reconstructions_{kind}.png", arrays, grid.caption, kind)
        if arrays:
            write_arrays(folder / "reconstructions.npz", arrays)
        draw_heat_maps(folder / "metrics.png", grid)
    print(f"files: {folder}", file=sys.stderr)


def draw_collapse_over(path, grid):
    """Draw the collapse curves of a grid over one flag in one picture."""
    [flag_name] = grid.flags
    examples = {}
    for (value,), run in grid.cells.items():
        # The file of another process may not be whole.
        if run.examples is not None:
            examples[f"{flag_name} = {value}"] = run.examples

    # The level of the context, where all models agree on it.
    contexts = {context_level(run.model) for run in grid.cells.values() if run.model is not None}
    context = contexts.pop() if len(contexts) == 1 else None
    draw_collapse(path, examples, grid.caption, context=context)


def write_arrays(path, arrays):
    """Write {name: array} to a compressed .npz file. Raises OSError."""
    files.write(path, lambda file: np.savez_compressed(file, **arrays))


def unit_curves(grid):
    """All that theory.png shows of linear models over one flag: {name: array}.

    flag                    the name of the flag, text
    levels                  the suffixes of the levels, texts: "", or "_1" and "_2"
    x                       (m,), the values of the flag at which the closed form is computed
    trained_x               (n,), the values of the trained settings
    dense                   whether x also has values between the trained settings
    predicted<level>        (m, d), the predicted information of each unit, in nats
    trained<level>          (n, d), the trained information of each unit, in nats
    collapse<level>         the values of the flag at which a unit is predicted to collapse, within
                            the range of the settings; empty where the closed form has none

    Values that are not numbers are texts.
    """
    [(flag_name, values)] = grid.flags.items()
    comparisons = list(grid.comparisons.values())
    levels = theory.levels_of(comparisons[0].predicted)
    dense = grid.is_dense()
    trained_x = flag_array([value for (value,) in grid.cells])
    x = dense_values(values) if dense else trained_x

    arrays = {
        "flag": np.array(flag_name),
        "levels": np.array(levels),
        "x": x,
        "trained_x": trained_x,
        "dense": np.array(dense),
    }
    predicted = grid.predicted(**{flag_name: torch.tensor(x)}) if dense else None
    for level in levels:
        name = f"information{level}"
        if dense:
            arrays[f"predicted{level}"] = predicted[name].numpy()
        else:
            arrays[f"predicted{level}"] = stack_units([c.predicted[name] for c in comparisons])
        arrays[f"trained{level}"] = stack_units([c.trained[name] for c in comparisons])

        # The closed form gives the betas at which units collapse, None for never.
        inside = []
        if dense and flag_name in ("beta", "beta_2"):
            for threshold in comparisons[0].predicted[f"collapse{level}"]:
                if threshold is not None and min(values) < threshold < max(values):
                    inside.append(threshold)
        arrays[f"collapse{level}"] = np.array(inside)
    return arrays


def flag_array(values):
    """The values of a flag as an array of numbers, or of texts where one is not a number."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return np.array(values, dtype=float)
    return np.array([str(value) for value in values])


def dense_values(values):
    """600 numbers from the smallest to the largest of some values, (600,).

    They are dense enough for an axis of either scale: half of them are evenly spaced, and half of
    them evenly spaced in their logarithm, from the smallest positive value on.
    """
    even = np.linspace(min(values), max(values), 300)
    positive = [value for value in values if value > 0]
    if not positive:
        return even
    return np.sort(np.append(even, np.geomspace(min(positive), max(positive), 300)))


def stack_units(rows):
    """Lists of values per unit as an array (settings, units), 0 for units that a setting lacks."""
    stacked = np.zeros((len(rows), max(map(len, rows))))
    for values, row in zip(stacked, rows):
        values[:len(row)] = row
    return stacked


def draw_unit_curves(path, arrays, caption):
    """Draw the units of linear models over one flag, predicted and trained, one row per level.

    arrays are those of `unit_curves`. On the left is the information of each unit, predicted as a
    line and trained as dots. On the right is the number of active units, predicted as a staircase
    and trained as dots.
    """
    levels = arrays["levels"].tolist()
    flag_name = str(arrays["flag"])
    x = arrays["x"]
    trained_x = arrays["trained_x"]
    is_log = has_log_axis(arrays)

    def draw(axes):
        for (left, right), level in zip(axes, levels):
            latent = latent_name(level)
            predicted = (x, arrays[f"predicted{level}"])
            trained = (trained_x, arrays[f"trained{level}"])

            plot_information(left, predicted, trained, "-" if arrays["dense"] else ":")
            plot_thresholds(left, arrays[f"collapse{level}"])
            left.set(xlabel=flag_name, ylabel=f"information of each unit of {latent} (nats)")

            plot_active_counts(right, predicted, trained)
            units = arrays[f"predicted{level}"].shape[1]
            right.set(xlabel=flag_name, ylabel=f"active units of {latent} (of {units})")
            for ax in (left, right):
                if is_log:
                    set_log_axis(ax, "x", trained_x)
                ax.legend(fontsize=7)

    save_figure(
        path, columns=2, rows=len(levels), width=4.8, height=3.4, caption=caption, draw=draw
    )


def has_log_axis(arrays):
    """Whether a logarithmic axis shows the flag of `unit_curves` better than a linear one.

    It does if the values span a decade or more. There is one exception: if they are evenly spaced
    and half of the units collapse beyond the lowest fifth of their range, a linear axis has more
    space for the collapse.
    """
    trained_x = np.sort(arrays["trained_x"])
    if trained_x.dtype.kind != "f" or trained_x[0] <= 0 or trained_x[-1] < 10 * trained_x[0]:
        return False
    steps = np.diff(trained_x)
    if not np.allclose(steps, steps[0]):
        return True

    counts = 0
    for level in arrays["levels"]:
        counts = counts + (arrays[f"predicted{level}"] > 0).sum(1)
    changes = np.repeat(arrays["x"][1:], np.abs(np.diff(counts)))
    lowest_fifth = trained_x[0] + (trained_x[-1] - trained_x[0]) / 5
    return not len(changes) or np.median(changes) < lowest_fifth


def plot_information(ax, predicted, trained, linestyle):
    """Plot the information of each unit, predicted as a line and trained as dots.

    Both are (x, information (len(x), d)), in nats.
    """
    from matplotlib import colormaps

    x, lines = predicted
    trained_x, dots = trained
    units = lines.shape[1]
    for i in range(units):
        color = colormaps["viridis"](0.9 * i / max(1, units - 1))
        ax.plot(
            x,
            lines[:, i],
            color=color,
            linewidth=1,
            label="predicted" if i == 0 else None,
            linestyle=linestyle,
        )
        ax.plot(
            trained_x,
            dots[:, i],
            ".",
            color=color,
            markersize=4,
            label="trained" if i == 0 else None,
        )


def plot_active_counts(ax, predicted, trained):
    """Plot the number of active units, predicted as a staircase and trained as dots.

    Both are (x, information (len(x), d)), in nats.
    """
    x, lines = predicted
    trained_x, dots = trained
    predicted_count = (lines > 0).sum(1)
    trained_count = (dots > theory.ACTIVE).sum(1)
    ax.step(x, predicted_count, where="mid", color="0.5", label="predicted")
    ax.plot(trained_x, trained_count, ".", color="C3", markersize=5, label="trained")
    ax.set(ylim=(-0.5, max(predicted_count.max(), trained_count.max(), 1) + 0.5))
    ax.locator_params(axis="y", integer=True)


def plot_thresholds(ax, thresholds):
    """Mark the thresholds (k,) at which units are predicted to collapse."""
    if len(thresholds):
        ax.plot(
            thresholds,
            np.zeros(len(thresholds)),
            "|",
            color="red",
            markersize=9,
            label="predicted collapse",
        )


def draw_active_map(path, grid):
    """Draw the number of active units of a linear model over two scalars, one panel per level.

    The colour is the predicted number, also between the settings. The trained number is written at
    each setting, in bold where it differs.
    """
    (row_flag, row_values), (column_flag, column_values) = grid.flags.items()
    levels = theory.levels_of(first_value(grid.comparisons).predicted)

    # 1. The closed form at 200 x 200 points, somewhat beyond the settings on each side.
    rows = np.geomspace(min(row_values) / 1.3, max(row_values) * 1.3, 200)
    columns = np.geomspace(min(column_values) / 1.3, max(column_values) * 1.3, 200)
    row_grid, column_grid = np.meshgrid(rows, columns, indexing="ij")
    scalars = {
        row_flag: torch.tensor(row_grid).flatten(),
        column_flag: torch.tensor(column_grid).flatten(),
    }
    predicted = grid.predicted(**scalars)

    # 2. The panels.
    def draw(axes):
        for ax, level in zip(axes[0], levels):
            information = predicted[f"information{level}"]
            units = information.shape[1]
            colors = ax.pcolormesh(
                columns,
                rows,
                (information > 0).sum(1).view(200, 200),
                cmap="viridis",
                vmin=0,
                vmax=units,
                shading="nearest",
                rasterized=True,
            )
            write_trained_counts(ax, grid.comparisons, level, units)
            ax.set(xscale="log", yscale="log", xlabel=column_flag, ylabel=row_flag)
            ax.minorticks_off()
            ax.set(
                xticks=column_values,
                yticks=row_values,
                xticklabels=column_values,
                yticklabels=row_values,
                title=f"active units of {latent_name(level)}: predicted, and trained (numbers)",
            )
            ax.figure.colorbar(colors, ax=ax)

    save_figure(
        path, columns=len(levels), rows=1, width=5.0, height=4.0, caption=grid.caption, draw=draw
    )


def write_trained_counts(ax, comparisons, level, units):
    """Write the number of trained active units at each setting, in bold where it differs.

    comparisons is {(row value, column value): verify.Comparison}. units is the level's number of
    units, at the bright end of the colour scale.
    """
    for (row, column), comparison in comparisons.items():
        predicted_count = comparison.active_units()[level]
        trained_count = comparison.active_units("trained")[level]
        ax.text(
            column,
            row,
            trained_count,
            ha="center",
            va="center",
            fontsize=8,
            color="black" if predicted_count > units / 2 else "white",
            weight="normal" if trained_count == predicted_count else "bold",
        )


def draw_beside_linear(path, grid):
    """Draw trained values over those that a closed form predicts, one row per level.

    On the left is the KL, on the right is the number of active units. Each setting is a point. The
    titles have the rank correlations over the settings. A panel in which all settings have the same
    point is a sentence instead.
    """
    results = {}
    for key, result in grid.results.items():
        if verify.closed_form(result):
            results[key] = result
    correlations = verify.rank_correlations(list(results.values()))
    levels = theory.levels_of(verify.closed_form(first_value(results)))

    def draw_panel(ax, metrics, title):
        points = {}
        for metric in metrics:
            points[metric] = predicted_and_trained(results.values(), metric)
        ax.set_title(with_rank(title, correlations.get(metrics[0])), fontsize=9)
        if all((values == values[0]).all() for values in points.values()):
            write_equal_values(ax, points)
        else:
            plot_beside_linear(ax, points, list(results), grid.flags)

    def draw(axes):
        for (left, right), level in zip(axes, levels):
            latent = latent_name(level)
            draw_panel(left, [f"kl{level}"], f"{latent}: KL (nats)")
            draw_panel(right, [f"AU{level}", f"AU_kl{level}"], f"{latent}: active units")

    save_figure(
        path, columns=2, rows=len(levels), width=4.8, height=4.2, caption=grid.caption, draw=draw
    )


def write_equal_values(ax, points):
    """Write the predicted and the trained value of metrics that are the same in all settings.

    points is {metric: (settings, 2)}.
    """
    lines = ["The same in all settings:"]
    for metric, values in points.items():
        predicted, trained = values[0]
        lines.append(f"{metric}: predicted {predicted:.4g}, trained {trained:.4g}")
    ax.axis("off")
    ax.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", transform=ax.transAxes)


def plot_beside_linear(ax, points, keys, flags):
    """Plot trained over predicted values of one or two metrics on equal axes.

    points is {metric: (settings, 2)}. keys are the settings' values of the flags {name: values}.
    With few settings over one flag, each point has a label. Else its colour is the value of the
    first flag, and its size that of the second one.
    """
    has_labels = len(flags) == 1 and len(keys) <= MAX_LABELS
    for (metric, values), marker, color in zip(points.items(), "ox", ("C0", "C1")):
        style = {"color": color} if has_labels else flag_style(keys, flags)
        ax.scatter(values[:, 0], values[:, 1], marker=marker, label=metric, **style)

    # 1. Equal axes, with the diagonal on which the trained value is the predicted one.
    every_value = np.concatenate(list(points.values()))
    lowest, highest = every_value.min(), every_value.max()
    margin = 0.08 * (highest - lowest)
    limits = (lowest - margin, highest + margin)
    ax.axline((lowest, lowest), slope=1, color="0.7", linewidth=0.8, zorder=0)
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    ax.set(xlabel="predicted for the linear model", ylabel="trained")

    # 2. Counts are whole numbers.
    is_count = next(iter(points)).startswith("AU")
    for axis in ("x", "y"):
        ax.locator_params(axis=axis, nbins=8, integer=is_count)

    # 3. Which point is which setting.
    if has_labels:
        labels = [str(key[0]) for key in keys]
        label_points(ax, first_value(points), labels, obstacles=every_value)
    else:
        add_color_bar(ax, flags)
    ax.set_title(f"{ax.get_title()}\n{style_in_words(flags, has_labels)}".strip(), fontsize=9)
    if len(points) > 1:
        ax.legend(fontsize=7)


def flag_style(keys, flags):
    """Arguments of matplotlib for points whose colour is the first flag's value: a dict.

    With a second flag, the size of the points grows with its value. Both follow the order of the
    values, which may be texts.
    """
    from matplotlib import colormaps

    first_values, *second_values = flags.values()
    style = {
        "c": [first_values.index(key[0]) for key in keys],
        "cmap": colormaps["viridis"].resampled(len(first_values)),
        "vmin": -0.5,
        "vmax": len(first_values) - 0.5,
    }
    if second_values:
        [values] = second_values
        sizes = np.linspace(12, 90, len(values))
        style["s"] = [sizes[values.index(key[1])] for key in keys]
    return style


def style_in_words(flags, has_labels):
    """How labels or sizes show the values of the flags. A colour bar explains itself."""
    first_name, *second_name = flags
    if has_labels:
        return f"labels: {first_name}"
    if not second_name:
        return ""
    [name] = second_name
    return f"sizes: {name}, from {flags[name][0]} to {flags[name][-1]}"


def add_color_bar(ax, flags):
    """Add a bar with the colours of `flag_style`, with labels at MAX_LABELS values at most."""
    flag_name, values = next(iter(flags.items()))
    ticks = range(0, len(values), math.ceil(len(values) / MAX_LABELS))
    bar = ax.figure.colorbar(ax.collections[0], ax=ax, ticks=ticks, label=flag_name)
    bar.ax.set_yticklabels([str(values[k]) for k in ticks], fontsize=7)


def label_points(ax, points, labels, obstacles):
    """Write a label beside each of the points (n, 2) so that no label covers another or a point.

    Points that touch each other share a label. obstacles (m, 2) are all points of the axes, which
    are square.
    """
    # All lengths here are in points of the font's size: the side of the axes, the radius of a
    # point, the width of a character and the height of a line.
    side, radius, character, line = 235, 4, 4.3, 9
    lowest, highest = ax.get_xlim()
    scale = side / (highest - lowest)

    # Each label is beside its point, as near as space allows. Boxes are (left, low, right, high).
    taken = []
    for x, y in obstacles * scale:
        taken.append((x - radius, y - radius, x + radius, y + radius))
    for point, group in close_points(points, labels, 2 * radius / scale):
        text = "; ".join(group)
        width = character * len(text)
        x, y = point * scale
        boxes = []
        for is_left, lines in itertools.product((False, True), (0, 1, -1, 2, -2, 3, -3)):
            left = x - width - radius - 2 if is_left else x + radius + 2
            middle = y + lines * line
            boxes.append((left, middle - line / 2, left + width, middle + line / 2))
        box = first_free_box(boxes, taken, lowest * scale, highest * scale)
        taken.append(box)
        ax.annotate(
            text,
            point,
            xytext=(box[0] - x, (box[1] + box[3]) / 2 - y),
            textcoords="offset points",
            va="center_baseline",
            fontsize=7,
        )


def first_free_box(boxes, taken, left, right):
    """The first of the boxes between left and right that overlaps none of `taken`.

    If there is no such box, it is the last one.
    """
    for box in boxes:
        is_inside = box[0] > left and box[2] < right
        if is_inside and not any(overlap(box, other) for other in taken):
            return box
    return boxes[-1]


def close_points(points, labels, distance):
    """Points (n, 2) with their labels: a list of (point, list of labels).

    A point whose distance from an earlier one is below `distance` adds its label to that one.
    """
    groups = []
    for point, label in zip(points, labels):
        for first_point, group in groups:
            if np.hypot(*(point - first_point)) < distance:
                group.append(label)
                break
        else:
            groups.append((point, [label]))
    return groups


def overlap(box, other):
    """Whether two boxes (left, low, right, high) overlap."""
    return (
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
    )


def predicted_and_trained(results, metric):
    """The predicted and the trained value of a metric for each result, an array (results, 2)."""
    points = []
    for result in results:
        for name, predicted, trained in verify.linear_pairs(result):
            if name == metric:
                points.append((predicted, trained))
    return np.array(points).reshape(-1, 2)


def with_rank(label, correlation):
    """A label with a rank correlation, if there is one."""
    if correlation is None:
        return label
    return f"{label}, rank correlation {correlation:.2f}"


def sheet_arrays(grid):
    """All that the contact sheets of a grid over two flags show: {name: array}, {} if nothing.

    A contact sheet is a table of settings, one row per value of the first flag and one column per
    value of the second one, with about 20 images of one kind in each cell.

    row_flag, column_flag       the names of the flags, texts
    row_values, column_values   their values, texts
    title_<kind>                the title of a kind of images, text
    images_<kind>               (rows, columns, n, C, H, W), uint8: its images
    shown_<kind>                (rows, columns), whether a setting has them
    originals                   (n, C, H, W), uint8: the test images, where they are the same in all
                                settings. Their title is title_0. Else they are images_0.

    Smaller images, or fewer of them, are filled with black.
    """
    (row_flag, row_values), (column_flag, column_values) = grid.flags.items()
    tiles = {}
    for (row, column), run in grid.cells.items():
        if hasattr(run.model, "reconstructions"):
            images = reconstructions(run.model, run.f, run.data, SHEET_IMAGES)
            cell = row_values.index(row), column_values.index(column)
            tiles[cell] = {title: as_bytes(batch) for title, batch in images.items()}
    if not tiles:
        return {}

    arrays = {
        "row_flag": np.array(row_flag),
        "column_flag": np.array(column_flag),
        "row_values": np.array([str(value) for value in row_values]),
        "column_values": np.array([str(value) for value in column_values]),
    }
    shape = len(row_values), len(column_values)
    for kind, title in enumerate(kinds_of_images(tiles)):
        arrays[f"title_{kind}"] = np.array(title)
        batches = {cell: images[title] for cell, images in tiles.items() if title in images}
        first = first_value(batches)
        if kind == 0 and all(np.array_equal(batch, first) for batch in batches.values()):
            arrays["originals"] = first
        else:
            images, shown = stack_images(batches, shape)
            arrays[f"images_{kind}"] = images
            arrays[f"shown_{kind}"] = shown
    return arrays


def as_bytes(images):
    """Images (n, 784) or (n, C, H, W) with values in [0, 1] as uint8 (n, C, H, W), 0 to 255.

    They are rounded to SHADES values.
    """
    if images.ndim == 2:
        images = images.view(-1, 1, 28, 28)
    images = images.detach().float().nan_to_num().clamp(0, 1)
    shades = (images * (SHADES - 1)).round()
    return (shades * 255 / (SHADES - 1)).round().byte().cpu().numpy()


def kinds_of_images(tiles):
    """The titles of all kinds of images, in order. tiles is {cell: {title: images}}."""
    titles = []
    for images in tiles.values():
        for title in images:
            if title not in titles:
                titles.append(title)
    return titles


def stack_images(batches, shape):
    """Images of cells as one array (rows, columns, n, C, H, W), and which cells have some.

    batches is {(row, column): uint8 (n, C, H, W)}, and shape is (rows, columns).
    """
    largest = np.max([batch.shape for batch in batches.values()], axis=0)
    stacked = np.zeros((*shape, *largest), dtype=np.uint8)
    shown = np.zeros(shape, dtype=bool)
    for cell, batch in batches.items():
        n, _, height, width = batch.shape
        # A grey image fills all colour channels.
        stacked[cell][:n, :, :height, :width] = batch
        shown[cell] = True
    return stacked, shown


def sheet_kinds(arrays):
    """The kinds of images of `sheet_arrays` that have a contact sheet: numbers in order."""
    kinds = []
    for name in arrays:
        if name.startswith("images_"):
            kinds.append(int(name.removeprefix("images_")))
    return sorted(kinds)


def draw_sheet(path, arrays, caption, kind=None):
    """Draw one contact sheet from the arrays of `sheet_arrays`, by default that of the last kind.

    The values of the flags are on the margins. The test images are above the table, where they are
    the same in all settings.
    """
    if kind is None:
        kind = sheet_kinds(arrays)[-1]
    images, shown = arrays[f"images_{kind}"], arrays[f"shown_{kind}"]
    rows, columns = shown.shape
    height_ratios = [1.0] * rows

    # The strip of test images has lines of equal length, and the scale of the images in the cells.
    originals = arrays.get("originals")
    if originals is not None:
        lines = math.ceil(len(originals) / (SHEET_COLUMNS * columns))
        height_ratios.insert(0, 0.21 * lines + 0.15)

    def draw(axes):
        figure = axes[0][0].figure
        figure.suptitle(str(arrays[f"title_{kind}"]), fontsize=10)
        if originals is not None:
            strip = merge_first_row(axes)
            show_bytes(strip, originals, math.ceil(len(originals) / lines))
            strip.set_title(str(arrays["title_0"]), fontsize=8)
            axes = axes[1:]

        for i, j in np.argwhere(shown):
            show_bytes(axes[i][j], images[i, j], SHEET_COLUMNS)
        for ax in axes.flat:
            hide_frame(ax)
        for ax, value in zip(axes[0], arrays["column_values"]):
            ax.set_title(f"{arrays['column_flag']} = {value}", fontsize=8)
        for ax, value in zip(axes[:, 0], arrays["row_values"]):
            ax.set_ylabel(f"{arrays['row_flag']} = {value}", fontsize=8)

    save_figure(
        path,
        columns=columns,
        rows=len(height_ratios),
        width=1.9,
        height=1.6,
        caption=caption,
        draw=draw,
        height_ratios=height_ratios,
    )


def merge_first_row(axes):
    """Replace the first row of axes by axes that take its whole width, and return them."""
    grid_spec = axes[0][0].get_gridspec()
    whole = axes[0][0].figure.add_subplot(grid_spec[0, :])
    for ax in axes[0]:
        ax.remove()
    return whole


def show_bytes(ax, images, columns):
    """Show images (n, C, H, W), uint8, as tiles in this number of columns."""
    show_images(ax, "", torch.from_numpy(images).float() / 255, columns)


def hide_frame(ax):
    """Hide all of the axes except their title and labels."""
    ax.axis("on")
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)


def draw_heat_maps(path, grid):
    """Draw a heat map over two flags for each metric."""
    results = grid.results
    # The names of all metrics, each once: the keys of this dict.
    names = {}
    for result in results.values():
        for name in result.metrics:
            names[name] = None
    columns = min(4, len(names))

    def draw(axes):
        for ax, name in zip(axes.flat, names):
            values = {key: result.metrics.get(name, math.nan) for key, result in results.items()}
            plot_heat_map(ax, name, grid.flags, values)
        for ax in axes.flat[len(names):]:
            ax.axis("off")

    save_figure(
        path,
        columns=columns,
        rows=math.ceil(len(names) / columns),
        width=3.4,
        height=3.2,
        caption=grid.caption,
        draw=draw,
    )


def plot_heat_map(ax, title, flags, values):
    """Plot a metric over two flags, with its number in each cell.

    values is {(row value, column value): number}. A setting that is not in it is an empty cell.
    """
    (row_flag, row_values), (column_flag, column_values) = flags.items()
    table = []
    for row in row_values:
        table.append([values.get((row, column), math.nan) for column in column_values])

    ax.imshow(table, cmap="viridis")
    middle = (np.nanmin(table) + np.nanmax(table)) / 2
    for i in range(len(row_values)):
        for j in range(len(column_values)):
            ax.text(
                j,
                i,
                common.format_metric(table[i][j]),
                ha="center",
                va="center",
                fontsize=7,
                color="black" if table[i][j] > middle else "white",
            )
    ax.set(
        title=title,
        xlabel=column_flag,
        ylabel=row_flag,
        xticks=range(len(column_values)),
        yticks=range(len(row_values)),
        xticklabels=column_values,
        yticklabels=row_values,
    )
