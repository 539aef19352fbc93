"""The pictures of a script, in three sections.

The first one has the helpers that draw and save a picture. The others have the pictures of one run
and of a grid of runs. A run is one setting of a script's flags, with its trained model and its
results. A function named draw_... saves a picture, and a function named plot_... draws into given
axes. figures.py has the pictures of reproduce.py.

Pictures are drawn without a display. matplotlib and torchvision are imported in the functions that
need them, so that scripts start fast.
"""
import dataclasses
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


# ----------------------------------------------------------------- how a picture is drawn and saved

def save_figure(path, columns, rows, width, height, caption, draw):
    """Draw a picture of rows x columns axes and save it as a PNG file. Raises OSError.

    width and height are those of each of the axes, in inches. draw(axes) draws into the array of
    axes (rows, columns). The caption is written below them.
    """
    from matplotlib.figure import Figure

    # At 8 points, 13 characters fit into an inch. With a space between flags, as in "lr=1, seed=0",
    # lines can break there.
    line_width = int(13 * columns * width)
    spaced_caption = re.sub(r",(?=\w+=)", ", ", caption)
    lines = textwrap.wrap(spaced_caption, line_width)

    figure = Figure(
        figsize=(columns * width, rows * height + 0.15 * len(lines)), layout="constrained"
    )
    draw(figure.subplots(rows, columns, squeeze=False))
    figure.supxlabel("\n".join(lines), fontsize=8)
    files.write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def draw_panels(path, panels, width, height, caption, draw):
    """Draw a picture of several panels, at most five in a row.

    panels is {title: content}. draw(ax, title, content) draws one of them, whose size is width x
    height inches.
    """
    columns = min(5, len(panels))

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


def latent_name(level):
    """The name of the latent variable of a level: "z" for "", "z1" for "_1"."""
    return "z" + level.removeprefix("_")


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

    draw_collapse(folder / "collapse.png", {"": run.examples}, caption)
    if run.result.headroom:
        draw_headroom(folder / "headroom.png", run.result.headroom, caption)
    draw_panels(
        folder / "training.png",
        run.result.curves,
        width=3.4,
        height=3,
        caption=caption,
        draw=plot_training,
    )

    if hasattr(model, "reconstructions"):
        # Some models draw their reconstructions at random.
        with common.seeded(f.seed, "evaluation", device):
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
    classes = data.test_labels.unique()[:count]
    count_per_class = max(1, count // len(classes))
    indices_by_class = []
    for label in classes:
        indices = (data.test_labels == label).nonzero()[:, 0]
        indices_by_class.append(indices[:count_per_class])
    chosen = torch.cat(indices_by_class)
    batch = [tensor[chosen] for tensor in data.test]
    return model.reconstructions(*batch, common.on_device(f, data.test[0]))


def plot_training(ax, title, curve):
    """Plot a curve of the training, a list with one value per epoch."""
    ax.plot(range(1, len(curve) + 1), curve)
    ax.set(title=title, xlabel="epoch", ylabel="nats per training example")


def draw_collapse(path, runs, caption):
    """Draw collapse curves, with one panel per level and one curve per run that has the level.

    runs is {label: examples}, where examples has "unit_kl" (n, d) of each level, in nats.
    """
    panels = {}
    for examples in runs.values():
        for name in examples:
            if name.startswith("unit_kl"):
                level = name.removeprefix("unit_kl")
                panels[f"units of {latent_name(level)}"] = name

    def draw(ax, title, name):
        plot_collapse(ax, runs, name)
        ax.set(title=title)

    draw_panels(path, panels, width=4.6, height=3.6, caption=caption, draw=draw)


def plot_collapse(ax, runs, name):
    """Plot the collapse curves of one level, one curve per run.

    runs is {label: examples}, and name is the level's entry of the examples, such as "unit_kl_2".
    """
    from matplotlib import colormaps

    # Only every n-th run has a label, since a legend must not be taller than its axes.
    label_every = math.ceil(len(runs) / 12)
    for k, (label, examples) in enumerate(runs.items()):
        if name not in examples:
            continue
        ax.step(
            EPSILON,
            100 * collapse_curve(examples[name], EPSILON),
            where="post",
            label=label if k % label_every == 0 else None,
            color=colormaps["viridis"](0.8 * k / max(1, len(runs) - 1)),
            linewidth=1.8,
            linestyle=("-", "--", "-.", ":")[k % 4],
        )
    ax.set(xscale="log", xlabel="ε (nats)", ylabel="collapsed units (%), δ = 0.05", ylim=(-3, 103))
    if len(runs) > 1:
        # The handles are long enough to show the line styles.
        ax.legend(fontsize=7, handlelength=4)


def collapse_curve(unit_kl, epsilon, delta=0.05):
    """The share of units that are (epsilon, delta)-collapsed (Lucas et al. 2019, arXiv 1911.02469).

    A unit is collapsed if P_x[KL_i < epsilon] >= 1 - delta. unit_kl (n, d) is in nats, and epsilon
    is (m,). Returns (m,).
    """
    # Let k be the smallest number of examples whose share is at least 1 - delta. A unit is
    # collapsed if its k-th smallest KL is below epsilon. Rounding removes the error of 1 - delta.
    k = math.ceil(round(len(unit_kl) * (1 - delta), 9))
    kth_smallest = np.sort(unit_kl, axis=0)[k - 1]
    return (kth_smallest[:, None] < epsilon).mean(axis=0)


def draw_headroom(path, levels, caption):
    """Draw the headroom of each level, {latent: headroom.LevelHeadroom}, with its verdict."""
    panels = {}
    for latent, level in levels.items():
        panels[f"{latent}: {level.verdict()}"] = level
    draw_panels(path, panels, width=4.6, height=3.6, caption=caption, draw=plot_headroom)


def plot_headroom(ax, title, measured):
    """Plot the variance that the units of a level describe, and that further units could describe.

    measured is a headroom.LevelHeadroom. The dashed line is the variance above which a unit lowers
    the loss: it gains more than its KL costs.
    """
    active = len(measured.theta)
    if active:
        units = range(1, 1 + active)
        ax.plot(units, measured.theta, "o", label="active units: θ², by their KL")
    further_units = range(1 + active, 1 + active + len(measured.tau))
    ax.plot(
        further_units,
        # A log axis cannot show 0.
        np.maximum(measured.tau, 1e-300),
        "x",
        color="C1",
        label="what is left: τ, of more units",
    )
    threshold = measured.level
    if threshold:
        ax.axhline(
            threshold,
            color="0.5",
            linestyle="--",
            linewidth=1,
            label="level: above it a unit pays",
        )
        # Just before a model diverges, the KL of a unit can make its theta infinite.
        variances = [threshold, *measured.theta, *measured.tau]
        largest = max(variance for variance in variances if math.isfinite(variance))
        ax.set(ylim=(threshold / 100, 2 * largest))
    ax.axvline(measured.units + 0.5, color="0.8", linewidth=1, label="the model's units")
    ax.set(yscale="log", xlabel="unit", ylabel="variance")
    # "... collapsed by training: idle units would ..." is too wide for one line.
    ax.set_title(title.replace(": idle", ":\nidle"), fontsize=9)
    ax.legend(fontsize=7)


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

        It can if all flags are numbers. A flag that may be a vector does not count as a number,
        because the closed forms take no tensor of vectors.
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

    A grid over two flags also has:

    reconstructions_<k>.png    the test images, and each kind of reconstruction
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
        draw_units_over(folder / "theory.png", grid)
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
        draw_sheets(folder, grid)
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
    draw_collapse(path, examples, grid.caption)


def draw_units_over(path, grid):
    """Draw the units of a linear model over one flag, predicted and trained, one row per level.

    On the left is the information of each unit, predicted as a line and trained as dots. On the
    right is the number of active units, predicted as a staircase and trained as dots.
    """
    [(flag_name, values)] = grid.flags.items()
    comparisons = list(grid.comparisons.values())
    levels = theory.levels_of(comparisons[0].predicted)
    dense = grid.is_dense()
    x, predicted = predicted_information(grid, levels)
    trained_x = [value for (value,) in grid.cells]

    def draw(axes):
        for (left, right), level in zip(axes, levels):
            name = f"information{level}"
            latent = latent_name(level)
            lines = predicted[name]
            dots = stack_units([comparison.trained[name] for comparison in comparisons])

            plot_information(left, (x, lines), (trained_x, dots), "-" if dense else ":")
            # The closed form gives the betas at which units collapse.
            if dense and flag_name in ("beta", "beta_2"):
                thresholds = comparisons[0].predicted[f"collapse{level}"]
                plot_thresholds(left, thresholds, min(values), max(values))
            left.set(xlabel=flag_name, ylabel=f"information of each unit of {latent} (nats)")
            left.legend(fontsize=7)

            plot_active_counts(right, (x, lines), (trained_x, dots))
            right.set(xlabel=flag_name, ylabel=f"active units of {latent}")
            right.legend(fontsize=7)

    save_figure(
        path, columns=2, rows=len(levels), width=4.8, height=3.4, caption=grid.caption, draw=draw
    )


def predicted_information(grid, levels):
    """The predicted information of each unit over one flag: the flag's values x, and a dict.

    The dict has "information" (len(x), d) of each level, in nats. In a dense grid x has 600 values,
    else only those of the trained settings.
    """
    [(flag_name, values)] = grid.flags.items()
    if grid.is_dense():
        x = torch.linspace(min(values), max(values), 600, dtype=torch.float64)
        return x, grid.predicted(**{flag_name: x})

    x = [value for (value,) in grid.cells]
    predicted = {}
    for level in levels:
        name = f"information{level}"
        rows = [comparison.predicted[name] for comparison in grid.comparisons.values()]
        predicted[name] = stack_units(rows)
    return x, predicted


def stack_units(rows):
    """Lists of values per unit as a tensor (settings, units), 0 for units that a setting lacks."""
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)


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
    ax.set(ylim=(-0.5, lines.shape[1] + 0.5))


def plot_thresholds(ax, thresholds, lowest, highest):
    """Mark the thresholds (None for never) at which units collapse, within a range of beta."""
    inside = []
    for threshold in thresholds:
        if threshold is not None and lowest < threshold < highest:
            inside.append(threshold)
    label = "predicted collapse" if inside else None
    ax.plot(inside, [0] * len(inside), "|", color="red", markersize=9, label=label)


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
    legend has the rank correlation over the settings.
    """
    results = {}
    for key, result in grid.results.items():
        if verify.closed_form(result):
            label = ", ".join(map(str, key))
            results[label] = result
    correlations = verify.rank_correlations(list(results.values()))
    levels = theory.levels_of(verify.closed_form(first_value(results)))

    def plot_metric(ax, metric, marker, side):
        label = with_rank(metric, correlations.get(metric))
        points = predicted_and_trained(results.values(), metric)
        ax.plot(points[:, 0], points[:, 1], marker, label=label)
        label_points(ax, points, list(results), side)

    def finish(ax, metric, title):
        # The diagonal, on which the trained value is the predicted one. Any of its points will do.
        predicted = predicted_and_trained(results.values(), metric)[0, 0]
        ax.margins(0.1)
        ax.axline((predicted, predicted), slope=1, color="0.7", linewidth=0.8, zorder=0)
        ax.set(xlabel="predicted of the linear model", ylabel="trained", title=title)
        ax.legend(fontsize=7, title=f"a point a {', '.join(grid.flags)}", title_fontsize=7)

    def draw(axes):
        for (left, right), level in zip(axes, levels):
            plot_metric(left, f"kl{level}", "o", "left")
            plot_metric(right, f"AU{level}", "o", "left")
            plot_metric(right, f"AU_kl{level}", "x", "right")
            finish(left, f"kl{level}", f"{latent_name(level)}: KL (nats)")
            finish(right, f"AU{level}", f"{latent_name(level)}: active units")

    save_figure(
        path, columns=2, rows=len(levels), width=4.8, height=3.8, caption=grid.caption, draw=draw
    )


def label_points(ax, points, labels, side):
    """Write a label beside each of the points (n, 2). Equal points share a label.

    side is the end of the label that is at the point, "left" or "right".
    """
    for point in np.unique(points, axis=0):
        labels_of_point = []
        for label, other in zip(labels, points):
            if (other == point).all():
                labels_of_point.append(label)
        ax.annotate(
            "; ".join(labels_of_point),
            point,
            xytext=(5, 5) if side == "left" else (-5, 5),
            ha=side,
            textcoords="offset points",
            fontsize=7,
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


def draw_sheets(folder, grid):
    """Draw contact sheets: tables of settings over two flags, with about 20 images in each cell.

    reconstructions_0.png has the test images. Each further sheet has one kind of reconstruction.
    """
    sheets = {}
    for key, run in grid.cells.items():
        if hasattr(run.model, "reconstructions"):
            images = reconstructions(run.model, run.f, run.data, 20)
            sheets[key] = list(images.items())

    kinds = max(map(len, sheets.values()), default=0)
    for k in range(kinds):
        tiles = {key: sheet[k] for key, sheet in sheets.items() if k < len(sheet)}
        draw_sheet(folder / f"reconstructions_{k}.png", grid, tiles)


def draw_sheet(path, grid, tiles):
    """Draw one contact sheet. tiles is {(row value, column value): (title, images)}."""
    (row_flag, row_values), (column_flag, column_values) = grid.flags.items()
    sheet_title, _ = list(tiles.values())[-1]

    def draw(axes):
        for i, row in enumerate(row_values):
            for j, column in enumerate(column_values):
                axes[i][j].axis("off")
                if (row, column) in tiles:
                    _, images = tiles[row, column]
                    title = f"{row_flag} = {row}, {column_flag} = {column}"
                    show_images(axes[i][j], title, images, columns=5, fontsize=8)
        axes[0][0].figure.suptitle(sheet_title, fontsize=9)

    save_figure(
        path,
        columns=len(column_values),
        rows=len(row_values),
        width=1.9,
        height=1.8,
        caption=grid.caption,
        draw=draw,
    )


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
