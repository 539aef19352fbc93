"""Everything that is drawn. First how a picture is made and saved, then those of one run, of a grid, of reproduce.py's
experiments. Without a display; matplotlib and torchvision are imported where they draw, so that a script starts fast.
"""
import dataclasses
import itertools
import math
import re
import sys
import textwrap

import numpy as np
import torch

import common
import files
import theory

EPSILON = np.geomspace(1e-4, 1e2, 241)                    # of collapse curves, in nats


def save_figure(path, columns, rows, width, height, caption, draw):
    """A picture of rows x columns axes of so many inches each, drawn by draw(axes), without a display. The caption's lines
    break between flags, too."""
    from matplotlib.figure import Figure
    lines = textwrap.wrap(re.sub(r",(?=\w+=)", ", ", caption), int(13 * columns * width))     # characters of 8 points to an inch
    figure = Figure(figsize=(columns * width, rows * height + 0.15 * len(lines)), layout="constrained")
    draw(figure.subplots(rows, columns, squeeze=False))
    figure.supxlabel("\n".join(lines), fontsize=8)
    files.write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def draw_run(folder, model, f, data, result, examples):
    """The pictures of one run: collapse.png, training.png, headroom.png of a model that has one and, of images,
    reconstructions.png and samples.png."""
    caption = f"{files.caption_of([f], [data])} seed={f.seed}"
    draw_collapse(folder / "collapse.png", {"": examples}, caption)
    if result.get("headroom"):
        panels = {f"{z}: {theory.verdict(of['units'], of['collapsed'], of['headroom'])}": of for z, of in result["headroom"].items()}
        draw_panels(folder / "headroom.png", panels, 4.6, 3.6, caption, plot_headroom)

    def draw_curve(ax, name, curve):
        ax.plot(range(1, len(curve) + 1), curve)
        ax.set(title=name, xlabel="epoch", ylabel="nats per training example")
    draw_panels(folder / "training.png", result["curves"], 3.4, 3, caption, draw_curve)

    if hasattr(model, "reconstructions"):
        with common.seeded(f.seed, "evaluation", data.test[0].device):            # some are drawn
            images = reconstructions(model, f, data, 100)
        draw_panels(folder / "reconstructions.png", images, 4.2, 4.7, caption, show_images)
    if hasattr(model, "samples"):
        with torch.no_grad(), common.seeded(f.seed, "samples", data.test[0].device):
            images = model.samples(100, common.on_device(f, data.test[0]))
        images = images if isinstance(images, dict) else {"samples from the prior": images}
        draw_panels(folder / "samples.png", images, 4.2, 4.7, caption, show_images)


def draw_panels(path, panels, width, height, caption, draw):
    """A picture of panels {title: what is in it}, each drawn by draw(ax, title, what), at most five in a row."""
    columns = min(5, len(panels))

    def draw_all(axes):
        for ax, (title, what) in itertools.zip_longest(axes.flat, panels.items(), fillvalue=(None, None)):
            draw(ax, title, what) if title is not None else ax.axis("off")
    save_figure(path, columns, math.ceil(len(panels) / columns), width, height, caption, draw_all)


@torch.no_grad()
def reconstructions(model, f, data, count):
    """{caption: images (n, 784)} of count or so test examples, as many of each class, class by class."""
    common.use_precision(f)
    classes = data.test_labels.unique()[:count]
    rows = torch.cat([(data.test_labels == c).nonzero()[:max(1, count // len(classes)), 0] for c in classes])
    return model.reconstructions(*(t[rows] for t in data.test), common.on_device(f, data.test[0]))


def show_images(ax, title, images, columns=10, **font):
    """Images (n, 784) or (n, C, H, W) as one, in so many columns."""
    from torchvision.utils import make_grid
    images = images.detach().view(-1, 1, 28, 28) if images.ndim == 2 else images.detach()
    tiles = make_grid(images.float().clamp(0, 1).cpu(), columns, padding=1, pad_value=0.4)
    ax.imshow(tiles.permute(1, 2, 0).numpy(), vmin=0, vmax=1)
    ax.set_title(title, **font)
    ax.axis("off")


def draw_collapse(path, runs, caption):
    """Collapse curves, a panel a level, a line a run that has it: runs is {label: {"unit_kl" of each level: (n, d)}}."""
    kls = dict.fromkeys(name for run in runs.values() for name in run if name.startswith("unit_kl"))

    def draw(ax, title, kl):
        plot_collapse(ax, runs, kl)
        ax.set(title=title)
    draw_panels(path, {"units of z" + kl.removeprefix("unit_kl").removeprefix("_"): kl for kl in kls}, 4.6, 3.6, caption, draw)


def plot_collapse(ax, runs, kl):
    """The collapse curves of one level, a line a run, on axes: runs is {label: {kl: (n, d)}}."""
    from matplotlib import colormaps
    every = math.ceil(len(runs) / 12)                     # run has its label: a legend must not be taller than its axes
    for k, (label, run) in enumerate(runs.items()):
        if kl in run:
            ax.step(EPSILON, 100 * collapse_curve(run[kl], EPSILON), where="post", label=label if k % every == 0 else None,
                    color=colormaps["viridis"](0.8 * k / max(1, len(runs) - 1)), linewidth=1.8,
                    linestyle=("-", "--", "-.", ":")[k % 4])
    ax.set(xscale="log", xlabel="ε (nats)", ylabel="collapsed units (%), δ = 0.05", ylim=(-3, 103))
    if len(runs) > 1:
        ax.legend(fontsize=7, handlelength=4)             # long enough to tell the lines apart


def plot_headroom(ax, title, found):
    """What the active units of a level describe, and what more units could, against the level above which a unit pays."""
    active, idle = found["theta"], found["tau"]
    if active:
        ax.plot(range(1, 1 + len(active)), active, "o", label="active units: θ², by their KL")
    ax.plot(range(1 + len(active), 1 + len(active) + len(idle)), np.maximum(idle, 1e-300), "x", color="C1",
            label="what is left: τ, of more units")
    if found["level"]:
        ax.axhline(found["level"], color="0.5", linestyle="--", linewidth=1, label="level: above it a unit pays")
        ax.set(ylim=(found["level"] / 100, 2 * max([found["level"], *active, *idle])))
    ax.axvline(found["units"] + 0.5, color="0.8", linewidth=1, label="the model's units")
    ax.set(yscale="log", xlabel="unit", ylabel="variance")
    ax.set_title(title.replace(": idle", ":\nidle"), fontsize=9)
    ax.legend(fontsize=7)


def collapse_curve(unit_kl, epsilon, delta=0.05):
    """The share of units that are (epsilon, delta)-collapsed, P_x[KL_i < epsilon] >= 1 - delta (Lucas et al. 2019).

    unit_kl (n, d) in nats, epsilon (m,); returns (m,).
    """
    # A unit is collapsed at epsilon if its k-th smallest KL is below it, k the fewest examples that make 1 - delta.
    k = math.ceil(round(len(unit_kl) * (1 - delta), 9))
    return (np.sort(unit_kl, axis=0)[k - 1][:, None] < epsilon).mean(axis=0)


def grid_dir(settings, data):
    """Where the pictures of a grid go: out_dir/<script>/grids/<its flags>."""
    flags = files.varying(settings, data)
    shared = {name: value for name, value in files.changed(settings[0], data[0]).items() if name not in flags}
    return files.run_dir(settings[0], data[0]).parent / "grids" / files.spell(
        {name: "+".join(map(str, values)) for name, values in flags.items()} | shared)


def draw_grid(models, settings, data):
    """The pictures of a grid: over one flag its collapse curves overlaid; over two a contact sheet of reconstructions
    for each way to reconstruct and a heat map for each metric, rows the first flag, columns the second; and what was
    trained on or against what a closed form predicts.

    Of settings that differ only in the seed the first is drawn; diverged settings are left out.
    """
    flags, cells = files.varying(settings, data), {}
    for model, f, d in zip(models, settings, data):
        if model is not None:
            cells.setdefault(tuple(files.what(f, d)[name] for name in flags), (model, f, d))
    if len(flags) not in (1, 2) or not cells:
        return
    folder = grid_dir(settings, data)
    seeds = dict.fromkeys(f.seed for _, f, _ in cells.values())
    caption = f"{files.caption_of(settings, data)} seed={','.join(map(str, seeds))}"
    scalars = [field.name for field in dataclasses.fields(settings[0]) if field.metadata["scalar"]]
    dense = all(name in scalars and all(isinstance(value, float) for value in flags[name]) for name in flags)
    exact = all(hasattr(model, "predicted") for model, _, _ in cells.values())
    if exact:
        if len(flags) == 1:
            draw_units_over(folder / "theory.png", flags, cells, dense, caption)
        elif dense:
            draw_active_map(folder / "theory.png", flags, cells, caption)
    results = {key: files.read_result(f, d, "result.json") for key, (_, f, d) in cells.items()}
    predicted = {key: result for key, result in results.items() if theory.closed_form(result)}
    if predicted and not (exact and dense):               # where theory.png has no line between the settings
        draw_beside_linear(folder / "linear.png", flags, predicted, caption)
    if len(flags) == 1:
        runs = {f"{name} = {value}": np.load(files.run_dir(f, d) / "units.npz")
                for name in flags for (value,), (_, f, d) in cells.items()}
        draw_collapse(folder / "collapse.png", runs, caption)
    else:
        draw_sheets(folder, flags, cells, caption)
        draw_heat_maps(folder / "metrics.png", flags, cells, caption)
    print(f"files: {folder}", file=sys.stderr)


def draw_units_over(path, flags, cells, dense, caption):
    """Over one flag, a row a level: each unit's information, predicted as a line and trained as dots, and how many units
    are active, predicted as a staircase and trained as dots."""
    [(flag_name, values)] = flags.items()
    theories = {value: files.read_result(f, d, "result.json")["theory"] for (value,), (_, f, d) in cells.items()}
    levels, (model, f, d) = theory.levels_of(next(iter(theories.values()))["predicted"]), next(iter(cells.values()))

    def information(of, level):                           # 0 for units that a setting does not have
        rows = [torch.tensor(of_setting[of][f"information{level}"]) for of_setting in theories.values()]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    if dense:                                             # between the trained values, too
        x = torch.linspace(min(values), max(values), 600, dtype=torch.float64)
        predicted = model.predicted(dataclasses.replace(f, **{flag_name: x}), d)
    else:
        x, predicted = list(theories), {f"information{level}": information("predicted", level) for level in levels}

    def draw(axes):
        from matplotlib import colormaps
        for row, level in zip(axes, levels):
            lines = predicted[f"information{level}"]
            trained = information("trained", level)
            for i in range(lines.shape[1]):
                color = colormaps["viridis"](0.9 * i / max(1, lines.shape[1] - 1))
                row[0].plot(x, lines[:, i], color=color, linewidth=1, label="predicted" if i == 0 else None,
                            linestyle="-" if dense else ":")
                row[0].plot(list(theories), trained[:, i], ".", color=color, markersize=4, label="trained" if i == 0 else None)
            if dense and flag_name in ("beta", "beta_2"):
                collapse = [at for at in theories[values[0]]["predicted"][f"collapse{level}"]
                            if at is not None and min(values) < at < max(values)]
                row[0].plot(collapse, [0] * len(collapse), "|", color="red", markersize=9,
                            label="predicted collapse" if collapse else None)
            row[1].step(x, (lines > 0).sum(1), where="mid", color="0.5", label="predicted")
            row[1].plot(list(theories), (trained > theory.ACTIVE).sum(1), ".", color="C3", markersize=5, label="trained")
            unit = "z" + level.removeprefix("_")
            row[0].set(xlabel=flag_name, ylabel=f"information of each unit of {unit} (nats)")
            row[1].set(xlabel=flag_name, ylabel=f"active units of {unit}", ylim=(-0.5, lines.shape[1] + 0.5))
            row[0].legend(fontsize=7)
            row[1].legend(fontsize=7)
    save_figure(path, 2, len(levels), 4.8, 3.4, caption, draw)


def draw_beside_linear(path, flags, results, caption):
    """What the closed form of the linear model predicts, across, and what was trained, up: a row a level, KL and active
    units, a point a setting, with their rank correlation over settings."""
    correlations = theory.linear_correlations(list(results.values()))
    levels = theory.levels_of(theory.closed_form(next(iter(results.values()))))

    def draw(axes):
        for row, level in zip(axes, levels):
            for ax, title, metrics in zip(row, ("KL (nats)", "active units"), ([f"kl{level}"], [f"AU{level}", f"AU_kl{level}"])):
                for metric, marker, side in zip(metrics, "ox", ("left", "right")):
                    points = np.array([(predicted, trained) for result in results.values()
                                       for name, predicted, trained in theory.beside_linear(result) if name == metric])
                    ax.plot(*points.T, marker, label=with_rank(metric, correlations.get(metric)))
                    for point in np.unique(points, axis=0):
                        here = [", ".join(map(str, key)) for key, of in zip(results, points) if (of == point).all()]
                        ax.annotate("; ".join(here), point, xytext=(5, 5) if side == "left" else (-5, 5), ha=side,
                                    textcoords="offset points", fontsize=7)
                ax.margins(0.1)
                ax.axline((points[0, 0],) * 2, slope=1, color="0.7", linewidth=0.8, zorder=0)      # as predicted
                ax.set(xlabel="predicted of the linear model", ylabel="trained", title=f"z{level.removeprefix('_')}: {title}")
                ax.legend(fontsize=7, title=f"a point a {', '.join(flags)}", title_fontsize=7)
    save_figure(path, 2, len(levels), 4.8, 3.8, caption, draw)


def with_rank(label, correlation):
    return label if correlation is None else f"{label}, rank correlation {correlation:.2f}"


def draw_active_map(path, flags, cells, caption):
    """Over two scalar flags, a panel a level: how many units are predicted active as a map, trained ones as numbers on it."""
    (row_flag, row_values), (column_flag, column_values) = flags.items()
    theories = {key: files.read_result(f, d, "result.json")["theory"] for key, (_, f, d) in cells.items()}
    levels, (model, f, d) = theory.levels_of(next(iter(theories.values()))["predicted"]), next(iter(cells.values()))
    rows, columns = (np.geomspace(min(values) / 1.3, max(values) * 1.3, 200) for values in (row_values, column_values))
    grid = dict(zip((row_flag, column_flag), torch.tensor(np.meshgrid(rows, columns, indexing="ij")).flatten(1)))
    predicted = model.predicted(dataclasses.replace(f, **grid), d)

    def draw(axes):
        for ax, level in zip(axes[0], levels):
            active = (predicted[f"information{level}"] > 0).sum(1).view(200, 200)
            total = predicted[f"information{level}"].shape[1]
            shown = ax.pcolormesh(columns, rows, active, cmap="viridis", vmin=0, vmax=total, shading="nearest", rasterized=True)
            for (row, column), beside in theories.items():
                trained, of = theory.active_units(beside, "trained")[level], theory.active_units(beside)[level]
                ax.text(column, row, trained, ha="center", va="center", fontsize=8,
                        color="black" if of > total / 2 else "white", weight="normal" if trained == of else "bold")
            ax.set(xscale="log", yscale="log", xlabel=column_flag, ylabel=row_flag)
            ax.minorticks_off()
            ax.set(xticks=column_values, yticks=row_values, xticklabels=column_values, yticklabels=row_values,
                   title=f"active units of z{level.removeprefix('_')}: predicted, and trained (numbers)")
            ax.figure.colorbar(shown, ax=ax)
    save_figure(path, len(levels), 1, 5.0, 4.0, caption, draw)


def draw_sheets(folder, flags, cells, caption):
    """Contact sheets of 20 examples a setting, reconstructions_<k>.png: 0 the originals, then each reconstruction."""
    (row_flag, row_values), (column_flag, column_values) = flags.items()
    sheets = {cell: list(reconstructions(*cells[cell], 20).items()) for cell in cells
              if hasattr(cells[cell][0], "reconstructions")}
    for k in range(max(map(len, sheets.values()), default=0)):
        def draw(axes):
            for (i, row), (j, column) in itertools.product(enumerate(row_values), enumerate(column_values)):
                axes[i][j].axis("off")
                if k < len(sheets.get((row, column), [])):
                    title, images = sheets[row, column][k]
                    show_images(axes[i][j], f"{row_flag} = {row}, {column_flag} = {column}", images, 5, fontsize=8)
            axes[0][0].figure.suptitle(title, fontsize=9)
        save_figure(folder / f"reconstructions_{k}.png", len(column_values), len(row_values), 1.9, 1.8, caption, draw)


def draw_heat_maps(path, flags, cells, caption):
    """A heat map for every metric, each cell with its number."""
    (row_flag, row_values), (column_flag, column_values) = flags.items()
    metrics = {key: files.read_result(f, d, "result.json")["metrics"] for key, (_, f, d) in cells.items()}
    names = list(dict.fromkeys(name for of in metrics.values() for name in of))
    columns = min(4, len(names))

    def draw(axes):
        for ax in axes.flat[len(names):]:
            ax.axis("off")
        for ax, name in zip(axes.flat, names):
            values = [[metrics.get((row, column), {}).get(name, math.nan) for column in column_values] for row in row_values]
            ax.imshow(values, cmap="viridis")
            middle = (np.nanmin(values) + np.nanmax(values)) / 2
            for i, j in np.ndindex(len(row_values), len(column_values)):
                ax.text(j, i, common.cell(values[i][j]), ha="center", va="center", fontsize=7,
                        color="black" if values[i][j] > middle else "white")
            ax.set(title=name, xlabel=column_flag, ylabel=row_flag, xticks=range(len(column_values)),
                   yticks=range(len(row_values)), xticklabels=column_values, yticklabels=row_values)
    save_figure(path, columns, math.ceil(len(names) / columns), 3.4, 3.2, caption, draw)


# Those of an experiment of reproduce.py, to a path, of its runs: each one command line, with the results of its settings.

def units_by_level(run):
    """The mean KL of every unit of each level, level 1 first: a list of arrays, of the run's first setting."""
    units = run.units(0)
    return [units[f"unit_kl_{level}"].mean(0) for level in range(1, 1 + sum(name.startswith("unit_kl_") for name in units))]


def by_script(runs):
    """{script: the results of its settings with a closed form, each once}."""
    found = {}
    for run in runs:
        for result in run.results:
            if theory.closed_form(result):
                found.setdefault(run.script, {})[str(result["settings"])] = result
    return {script: list(results.values()) for script, results in found.items()}


def collapse_curves(path, runs):
    """A row of panels a command, a panel a level."""
    levels = [name for name in runs[0].units(0) if name.startswith("unit_kl")]

    def draw(axes):
        for row, run in zip(axes, runs):
            labels = [", ".join(f"{name} = {value}" for name, value in of.items()) or run.script for of in run.rows()]
            for ax, kl in zip(row, levels):
                plot_collapse(ax, {label: run.units(i) for i, label in zip(run.of_first_seed(), labels)}, kl)
                ax.set(title=run.words() + (f", z{kl[-1]}" if len(levels) > 1 else ""))
    save_figure(path, len(levels), len(runs), 4.6, 3.6, "", draw)


def beside(path, runs):
    """One panel, a curve a command."""
    draw_collapse(path, {run.script: run.units(0) for run in runs}, "")


def of_the_grid(name):
    """The picture of this name that the script itself draws of its grid."""
    def copy(path, runs):
        files.write(path, lambda file: file.write((runs[0].grid() / name).read_bytes()))
    return copy


def per_digit(path, runs):
    """KL and active units of each digit, predicted of the linear model and trained, a row a script."""
    def draw(axes):
        for row, run in zip(axes, runs):
            correlation = theory.linear_correlations(run.results)
            for ax, metric, label in zip(row, ("kl", "AU"), ("KL (nats)", "active units")):
                digits = [result["settings"]["digit"] for result in run.results]
                pairs = [next(pair[1:] for pair in theory.beside_linear(result) if pair[0] == metric) for result in run.results]
                predicted, trained = zip(*pairs)
                ax.plot(digits, predicted, "_", color="0.3", markersize=14, label="predicted of the linear model")
                ax.plot(digits, trained, "o", color="C0", label=with_rank("trained", correlation.get(metric)))
                ax.set(xlabel="digit", ylabel=label, xticks=sorted(set(digits)), ylim=(0, None), title=run.script)
                ax.locator_params(axis="y", integer=True)
                ax.legend(fontsize=7)
    save_figure(path, 2, len(runs), 4.6, 3.0, "", draw)


def rates(path, runs):
    """The KL of each run over its training, and after it on the test images, beside the delta that it cannot fall below."""
    found = {("standard" if f.prior == "standard" else f"δ = {f.delta:g}"): (f, run.results[i]) for run in runs
             for i, f in enumerate(run.settings) if i in run.of_first_seed() and run.results[i]["metrics"]}

    def draw(axes):
        during, after = axes[0]
        for k, (label, (f, result)) in enumerate(found.items()):
            curve, delta, metrics = result["curves"]["kl"], result["metrics"]["smallest_rate"], result["metrics"]
            during.plot(range(1, len(curve) + 1), curve, f"C{k}", marker="os^Dvx"[k % 6], markersize=4, label=label)
            during.axhline(delta, color=f"C{k}", linestyle="--", linewidth=1)
            against = ("against the model's own prior", "against the auxiliary prior", "δ") if k == 0 else (None,) * 3
            after.bar(k - 0.2, metrics["kl"], 0.4, color="C0", label=against[0])
            after.bar(k + 0.2, metrics["rate_auxiliary"], 0.4, color="C1", hatch="//", label=against[1])
            after.plot([k - 0.45, k + 0.45], [delta, delta], "k--", linewidth=1, label=against[2])
        during.set(xlabel="epoch", ylabel="KL (nats per training example)", ylim=(0, None))
        after.set(ylabel="rate (nats per test example)", xticks=range(len(found)), xticklabels=list(found))
        during.locator_params(axis="x", integer=True)
        during.legend(fontsize=7)
        after.legend(fontsize=7)
    save_figure(path, 2, 1, 4.8, 3.6, "", draw)


def by_level(path, runs):
    """The KL of each level, and the share of its units that are active, a bar a model."""
    units = {run.script: units_by_level(run) for run in runs if run.results[0]["metrics"]}
    levels = range(1, 1 + max(map(len, units.values()), default=0))

    def draw(axes):
        for k, (script, kls) in enumerate(units.items()):
            places = [level + 0.8 * ((k + 0.5) / len(units) - 0.5) for level in levels[:len(kls)]]
            style = {"width": 0.8 / len(units), "color": f"C{k}", "hatch": ("", "//", "..")[k % 3], "label": script}
            axes[0][0].bar(places, [kl.sum() for kl in kls], **style)
            axes[0][1].bar(places, [(kl > theory.ACTIVE).mean() for kl in kls], **style)
        for ax, label in zip(axes[0], ("KL (nats per test example)", "share of units with a KL above 0.01 nats")):
            ax.set(xlabel="level, 1 next to the image", ylabel=label, xticks=levels, ylim=(0, None))
        axes[0][0].legend(fontsize=7)
    save_figure(path, 2, 1, 4.8, 3.6, "", draw)


def against_prediction(path, runs):
    """A panel a script, of those with settings enough, and level: the KL that the closed form predicts, and the trained one."""
    panels = {f"{script}{f', z{level[1:]}' if level else ''}": (results, f"kl{level}") for script, results in by_script(runs).items()
              if theory.can_be_ranked(results) for level in theory.levels_of(theory.closed_form(results[0]))}

    def draw(ax, title, panel):
        results, kl = panel
        points = [pair[1:] for result in results for pair in theory.beside_linear(result) if pair[0] == kl]
        ax.plot(*zip(*points), "o", markersize=4)
        ax.axline((points[0][0],) * 2, slope=1, color="0.7", linewidth=0.8, zorder=0)
        ax.set(xlabel="predicted KL (nats)", ylabel="trained KL (nats)")
        ax.set_title(title, fontsize=8)
    draw_panels(path, panels, 3.4, 3.0, "", draw)
