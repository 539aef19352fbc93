"""The pictures of reproduce.py's results.

A function that takes (path, commands, arrays) draws the picture of one result into a PNG file.
commands is a list of measurements.Command: the rows of the result's .csv file. arrays is
{name: array}, the content of results/data/<name>.npz, for the pictures that show more than the
rows say. So a picture can be drawn again without the runs.

A function named ..._arrays takes the finished runs, each a reproduce.Run, and returns the arrays.
matplotlib is imported in the functions that need it, so that programs start fast.
"""
import math

import numpy as np

import answers
import measurements
import pictures
import theory

# The colours of the levels of a model, and of predicted values.
LEVEL_COLORS = {"": "C0", "_1": "C2", "_2": "C0"}
PREDICTED_COLOR = "0.45"

# How a picture names flags and values that do not explain themselves.
FLAG_LABELS = {
    "beta": "β",
    "beta_1": "β1",
    "beta_2": "β2",
    "eta_dec": "η_dec",
    "corr_type": "ρ in x = ρ y + noise",
}
VALUE_LABELS = {
    "Identical": "1",
    "Gaussian_noise_1_2": "1/2",
    "Gaussian_noise_1_4": "1/4",
    "Gaussian_noise_1_8": "1/8",
    "Random": "0",
}


# ------------------------------------------------------------------------- KL and units over a flag

def over_flags(path, commands, arrays):
    """Draw KL and active units over each flag, predicted and trained, one column per command.

    Only the commands with the exact objective are shown. A single command has its two panels side
    by side.
    """
    shown = [
        command for command in commands if not command.is_released and command.by_setting()
    ]
    if not shown:
        return
    side_by_side = len(shown) == 1

    def draw(axes):
        rows = axes.reshape(2, len(shown))
        for kl_axes, unit_axes, command in zip(*rows, shown):
            plot_over_flag(kl_axes, command, "kl", "KL (nats)")
            plot_over_flag(unit_axes, command, "AU_kl", "active units")
            unit_axes.locator_params(axis="y", integer=True)
        for row in rows:
            share_y(row)
        handles, labels = axes[0][0].get_legend_handles_labels()
        axes[0][0].figure.legend(
            handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8
        )

    pictures.save_figure(
        path,
        columns=2 if side_by_side else len(shown),
        rows=1 if side_by_side else 2,
        width=4.4 if side_by_side else 3.6,
        height=3.0 if side_by_side else 2.6,
        caption="",
        draw=draw,
    )


def share_y(axes):
    """Give several axes one scale, from the lowest to the highest of their y limits."""
    lowest = min(ax.get_ylim()[0] for ax in axes)
    highest = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set(ylim=(lowest, highest))


def plot_over_flag(ax, command, metric, ylabel):
    """Plot a metric of each level over the one flag of a command."""
    settings = command.by_setting()
    [flag] = command.flags
    values = [value for (value,) in settings]
    is_numeric = all(isinstance(value, (int, float)) for value in values)
    x = values if is_numeric else list(range(len(values)))

    first_rows = next(iter(settings.values()))
    for level in measurements.levels_of_row(first_rows[0]):
        plot_level(ax, x, list(settings.values()), metric=metric, level=level)

    if is_numeric:
        ax.set(xscale="log")
    ax.set(xlabel=FLAG_LABELS.get(flag, flag), ylabel=ylabel)
    ax.set_xticks(x, [VALUE_LABELS.get(value, str(value)) for value in values], fontsize=8)
    ax.minorticks_off()


def plot_level(ax, x, settings, metric, level):
    """Plot a metric of one level over x, with a list of rows per setting.

    Dots with bars are trained: the mean and the standard deviation over the seeds. The dashed line
    is the prediction for the linear twin.
    """
    name = f"{metric}{level}"
    latent = pictures.latent_name(level)
    color = LEVEL_COLORS[level]

    # The same units are predicted active for AU and AU_kl.
    predicted_name = f"linear {name.replace('AU_kl', 'AU')}"
    if predicted_name in settings[0][0]:
        predicted = [measurements.seed_mean(rows, predicted_name) for rows in settings]
        ax.plot(x, predicted, "--", color=color, linewidth=1, label=f"{latent}, linear theory")

    means = [measurements.seed_mean(rows, name) for rows in settings]
    deviations = [measurements.seed_deviation(rows, name) for rows in settings]
    ax.errorbar(
        x,
        means,
        deviations,
        fmt="o-",
        color=color,
        markersize=4,
        linewidth=1,
        capsize=2,
        label=f"{latent}, trained",
    )


# ---------------------------------------------------------------------------------- collapse curves

def collapse_arrays(runs):
    """The arrays of `collapse_curves`: the first seed of the command with the exact objective.

    A unit is collapsed at a threshold if at least 95 % of the test examples have a smaller KL. So
    one number per unit is enough: the KL that 95 % of the examples do not exceed. Returns
    {"unit_kl" or "unit_kl_<level>": (settings, d)} in nats, and "labels" (settings,). None if no
    setting has left its arrays, or if a setting is unfinished.
    """
    [run] = [run for run in runs if not run.is_released]
    if len(run.results) < len(run.settings):
        return None
    labels = []
    quantiles = {}
    for i, flags in zip(run.first_seed_indices(), run.setting_labels()):
        units = run.units(i) if run.results[i].metrics else None
        if units is None:
            continue
        labels.append(", ".join(f"{name} = {value}" for name, value in flags.items()))
        for name, unit_kl in units.items():
            if name.startswith("unit_kl"):
                quantiles.setdefault(name, []).append(pictures.kl_of_most_examples(unit_kl))
    if not labels:
        return None
    arrays = {name: np.array(rows, dtype=np.float32) for name, rows in quantiles.items()}
    return {"labels": np.array(labels), **arrays}


def collapse_curves(path, commands, arrays):
    """Draw collapse curves, one panel per level.

    A level whose units are all in use in every setting has no panel.
    """
    names = [name for name in arrays if name != "labels"]
    if not names:
        return
    shown = [name for name in names if (arrays[name] <= theory.ACTIVE).any()] or names[:1]

    def draw(axes):
        for [ax], name in zip(axes, shown):
            # One made-up example has each unit's KL, so that it has the curve of all examples.
            examples = {}
            for label, quantiles in zip(arrays["labels"], arrays[name]):
                examples[str(label)] = {name: quantiles[None]}
            pictures.plot_collapse(ax, examples, name)
            ax.set(title=f"units of {pictures.latent_name(name.removeprefix('unit_kl'))}")

    pictures.save_figure(
        path, columns=1, rows=len(shown), width=6.6, height=3.4, caption="", draw=draw
    )


# ------------------------------------------------------------------------ arrays that a grid leaves

def grid_arrays(name):
    """A function that reads the arrays which a script leaves beside the pictures of its grid.

    It returns None where the script has left none.
    """
    def read(runs):
        path = runs[0].grid_dir() / name
        if not path.exists():
            return None
        with np.load(path) as arrays:
            return {key: arrays[key] for key in arrays.files}
    return read


def unit_curves(path, commands, arrays):
    """Draw the units of a grid of linear models, predicted and trained."""
    pictures.draw_unit_curves(path, arrays, "")


def contact_sheet(path, commands, arrays):
    """Draw the contact sheet of a grid of hierarchical VAEs, reconstructed from z2."""
    pictures.draw_sheet(path, arrays, "", kind=2)


# ------------------------------------------------------------------------ one value per digit, bars

def per_digit(path, commands, arrays):
    """Draw KL and active units for each digit, predicted and trained, one row per script.

    All rows have the same scale. The seeds of a digit stand side by side.
    """
    def draw(axes):
        for (left, right), command in zip(axes, commands):
            plot_digits(left, command, commands, "kl")
            plot_digits(right, command, commands, "AU_kl")
            left.set(ylabel="KL (nats)", title=command.script)
            right.set(ylabel="active units", title=command.script)
        for column in (0, 1):
            axes[0][column].set(ylim=(0, None))
            share_y(axes[:, column])
        axes[0][0].legend(fontsize=7)

    pictures.save_figure(
        path, columns=2, rows=len(commands), width=4.6, height=2.6, caption="", draw=draw
    )


def plot_digits(ax, command, commands, metric):
    """Plot a metric over the digits for each seed, and the prediction for the linear model."""
    predictions = {}
    for row in measurements.distinct_rows(commands):
        name = f"linear {metric.replace('AU_kl', 'AU')}"
        if name in row:
            predictions[row["digit"]] = row[name]

    label = "linear theory"
    for digit, value in predictions.items():
        ax.plot(
            [digit - 0.35, digit + 0.35], [value, value], color=PREDICTED_COLOR, label=label
        )
        label = None
    label = "trained, one dot per seed"
    for (digit,), rows in command.by_setting().items():
        offsets = 0.2 * (np.arange(len(rows)) - (len(rows) - 1) / 2)
        ax.plot(digit + offsets, [row[metric] for row in rows], ".", color="C0", label=label)
        label = None
    ax.set(xlabel="digit", xticks=sorted(predictions or [0]))
    ax.locator_params(axis="y", integer=True)


def sigma_bars(path, commands, arrays):
    """Draw active units, by KL and by mean, and KL with a learnable and a fixed encoder variance.

    The commands are pairs: a learnable variance, then a fixed one.
    """
    pairs = answers.finished_pairs(commands)
    if not pairs:
        return

    def draw(axes):
        [[left, middle, right]] = axes
        for ax, metric, ylabel in (
            (left, "AU_kl", "units with a KL above 0.01 nats"),
            (middle, "AU", "units whose posterior mean varies"),
            (right, "kl", "KL (nats)"),
        ):
            for position, (learnable, fixed) in enumerate(pairs):
                # The first pair gives the legend.
                labels = ("learnable", "fixed") if position == 0 else (None, None)
                plot_bar(ax, learnable, metric, x=position - 0.2, color="C0", label=labels[0])
                plot_bar(ax, fixed, metric, x=position + 0.2, color="C1", label=labels[1])
            ax.set(ylabel=ylabel)
            ax.set_xticks(range(len(pairs)), [pair_name(pair[0]) for pair in pairs], fontsize=8)
        left.legend(fontsize=8, title="encoder variance", title_fontsize=8)

    pictures.save_figure(path, columns=3, rows=1, width=3.4, height=3.2, caption="", draw=draw)


def plot_bar(ax, command, metric, x, color, label):
    """Plot the mean of a metric over the seeds of a command, and its standard deviation.

    label is the text in the legend, or None.
    """
    rows = measurements.finished_rows(command.rows)
    ax.bar(
        x,
        measurements.seed_mean(rows, metric),
        0.36,
        yerr=measurements.seed_deviation(rows, metric),
        capsize=3,
        color=color,
        label=label,
    )


def pair_name(command):
    """The name of a pair of commands with a learnable and a fixed encoder variance."""
    kind = "ReLU" if "Relu" in command.script else "linear"
    row = command.rows[0]
    return f"{kind}, β = {row['beta']:g},\n{row['d_1']} units"


def delta_bars(path, commands, arrays):
    """Draw the test KL of each delta-VAE, its rate against the auxiliary prior, and its delta."""
    settings = measurements.distinct_settings(commands)
    if not settings:
        return
    rows = [seed_rows[0] for seed_rows in settings]

    def draw(axes):
        [[ax]] = axes
        x = np.arange(len(rows))
        own = [measurements.seed_mean(seed_rows, "kl") for seed_rows in settings]
        auxiliary = [measurements.seed_mean(seed_rows, "rate_auxiliary") for seed_rows in settings]
        ax.bar(x - 0.2, own, 0.4, color="C0", label="KL from the model's own prior")
        ax.bar(x + 0.2, auxiliary, 0.4, color="C1", label="rate against the fitted prior")
        for k, row in enumerate(rows):
            delta = row["smallest_rate"]
            label = "δ, the guaranteed KL" if k == 0 else None
            ax.plot([k - 0.45, k + 0.45], [delta, delta], "k--", linewidth=1, label=label)
        labels = []
        for row in rows:
            is_standard = row["prior"] == "standard"
            labels.append("standard prior" if is_standard else f"δ = {row['delta']:g}")
        ax.set(ylabel="nats per test example")
        ax.set_xticks(x, labels)
        ax.legend(fontsize=8)

    pictures.save_figure(path, columns=1, rows=1, width=6.0, height=3.4, caption="", draw=draw)


def level_bars(path, commands, arrays):
    """Draw the KL and the active units of each level of the deep models, one bar per model.

    The bars are means over the seeds. The models with a context have it at level 5.
    """
    finished = [command for command in commands if measurements.finished_rows(command.rows)]
    if not finished:
        return

    def draw(axes):
        [[left, right]] = axes
        plot_levels(left, finished, "kl from the top")
        plot_levels(right, finished, "AU_kl from the top")
        left.set(ylabel="KL (nats per test example)")
        right.set(ylabel="active units")
        left.legend(fontsize=8)

    pictures.save_figure(path, columns=2, rows=1, width=4.8, height=3.4, caption="", draw=draw)


def plot_levels(ax, commands, column):
    """Plot the values of a column that holds one number per level, one bar per command."""
    most_levels = 0
    has_context = False
    for k, command in enumerate(commands):
        rows = measurements.finished_rows(command.rows)
        # Level 1 is next to the image.
        values = measurements.mean_of_levels(rows, column)[::-1]
        offset = 0.8 * ((k + 0.5) / len(commands) - 0.5)
        positions = np.arange(1, 1 + len(values)) + offset
        ax.bar(positions, values, 0.8 / len(commands), label=command.script)
        most_levels = max(most_levels, len(values))
        has_context = has_context or "context_baseline" in rows[0]

    names = [str(level) for level in range(1, 1 + most_levels)]
    names[0] = "1, next to\nthe image"
    if has_context:
        names[-1] = f"{most_levels}, the\ncontext"
    ax.set(xlabel="level")
    ax.set_xticks(range(1, 1 + most_levels), names)


# ------------------------------------------------------------------------ curves of the deep models

def test_curve_arrays(runs):
    """The arrays of `test_curves`: {"<script> seed <seed>": (epochs,)}, in nats.

    Seeds that diverged or are unfinished are left out. None if no run has such a curve.
    """
    arrays = {}
    for run in runs:
        for result in run.results:
            if result.metrics and "test_elbo" in result.curves:
                seed = result.settings["seed"]
                arrays[f"{run.script} seed {seed}"] = np.array(result.curves["test_elbo"])
    return arrays or None


def test_curves(path, commands, arrays):
    """Draw the ELBO of the test images over the epochs, and where the models' ELBOs differ.

    The left panel has all epochs. It cuts off the values of the first tenth of them, which are far
    below the others. The middle one has the last half of the epochs. The right one has the
    differences of the ELBO and its terms from those of the first model.
    """
    finished = [command for command in commands if measurements.finished_rows(command.rows)]
    if not finished:
        return
    colors = {command.script: f"C{k}" for k, command in enumerate(commands)}

    def draw(axes):
        [[left, middle, right]] = axes
        for ax, first_share in ((left, 0.1), (middle, 0.5)):
            plot_test_curves(ax, arrays, colors)
            fit_y_to_end(ax, first_share)
            ax.set(xlabel="epoch", ylabel="nats")
        middle.set(xlim=(np.mean(left.get_xlim()), left.get_xlim()[1]))
        left.set_title("ELBO of the test images", fontsize=9)
        middle.set_title("ELBO in the last half of the epochs", fontsize=9)
        left.legend(fontsize=8)
        plot_elbo_differences(right, finished, colors)

    pictures.save_figure(path, columns=3, rows=1, width=4.2, height=3.4, caption="", draw=draw)


def plot_test_curves(ax, arrays, colors):
    """Plot the curve of each seed over the epochs, with the colours of the scripts."""
    curves_by_script = {}
    for name, curve in arrays.items():
        script, _, _ = name.partition(" seed ")
        curves_by_script.setdefault(script, []).append(curve)

    most_seeds = max(len(curves) for curves in curves_by_script.values())
    for script, curves in curves_by_script.items():
        label = script
        if len(curves) < most_seeds:
            label += f" ({measurements.plural(len(curves), 'seed')})"
        for curve in curves:
            epochs = np.arange(1, 1 + len(curve))
            ax.plot(epochs, curve, color=colors[script], linewidth=0.8, label=label)
            # The legend has a model once.
            label = None


def fit_y_to_end(ax, first_share):
    """Set the limits of the y axis by the curves without this share of their first epochs."""
    values = []
    for line in ax.get_lines():
        curve = line.get_ydata()
        values.extend(curve[int(first_share * len(curve)):])
    margin = 0.05 * (max(values) - min(values)) or 1.0
    ax.set(ylim=(min(values) - margin, max(values) + margin))


def plot_elbo_differences(ax, commands, colors):
    """Plot how much higher the ELBO and its terms are than those of the first model.

    The bars are means over the seeds that both models have, with the standard deviation.
    """
    first, *others = commands
    names = ("elbo", *measurements.ELBO_TERMS)
    width = 0.8 / max(1, len(others))
    for k, command in enumerate(others):
        differences = measurements.elbo_differences(command, first)
        if not differences:
            continue
        seeds = measurements.shared_seeds([command, first])
        deviations = [measurements.deviation(differences[name]) for name in names]
        ax.bar(
            np.arange(len(names)) + (k + 0.5) * width - 0.4,
            [np.mean(differences[name]) for name in names],
            width,
            yerr=deviations if len(seeds) > 1 else None,
            capsize=3,
            color=colors[command.script],
            label=command.script + measurements.only_seeds(seeds, [command, first]),
        )
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(ylabel="nats")
    ax.set_title(f"difference from {first.script}", fontsize=9)
    labels = [name.replace(" ", "\n") for name in ("ELBO", *measurements.ELBO_TERMS)]
    ax.set_xticks(range(len(names)), labels, fontsize=8)
    if ax.patches:
        ax.legend(fontsize=8)


# ------------------------------------------------------------------------ the threshold of collapse

def around_threshold(path, commands, arrays):
    """Draw KL, active units and gain of MNIST_VAE_Bernoulli.py over beta.

    The dotted line is the predicted beta from which on collapse is stable. The gain is by how much
    the training loss is below that of the collapsed model. It is drawn for the commands that start
    next to collapse, beside the gain that the theory guarantees at the optimum.
    """
    finished = [command for command in commands if command.by_setting()]
    if not finished:
        return
    threshold = measurements.finished_rows(finished[0].rows)[0]["collapse_threshold"]
    betas = {row["beta"] for command in finished for row in command.rows}

    def draw(axes):
        [[kl_axes, unit_axes, gain_axes]] = axes
        for command in finished:
            plot_over_beta(kl_axes, command, "kl")
            plot_over_beta(unit_axes, command, "AU_kl")
        plot_gains(gain_axes, [command for command in finished if not is_raised(command)])

        kl_axes.set(ylabel="KL (nats)")
        unit_axes.set(ylabel="active units")
        gain_axes.set(ylabel="gain over collapse (nats)")
        set_log_y(kl_axes, 1e-4)
        set_log_y(gain_axes, 1e-2)
        for ax in (kl_axes, unit_axes, gain_axes):
            ax.axvline(threshold, color="0.6", linestyle=":", label=f"ρ1 = {threshold:.2f}")
            ax.set(xlabel="β")
            pictures.set_log_axis(ax, "x", [threshold, *betas])
        # The lines of the second panel are those of the first one.
        kl_axes.legend(fontsize=7)
        gain_axes.legend(fontsize=7)

    pictures.save_figure(path, columns=3, rows=1, width=4.0, height=3.4, caption="", draw=draw)


def set_log_y(ax, lowest):
    """Make the y axis logarithmic, from `lowest` on.

    Values may be smaller, also 0 or negative. A line ends where its values stop being positive.
    """
    highest = max([10 * lowest, *(max(line.get_ydata()) for line in ax.get_lines())])
    # A logarithmic axis cannot find its limits where no value is positive.
    ax.set(ylim=(lowest, 2 * highest))
    ax.set_yscale("log", nonpositive="mask")


def is_raised(command):
    """Whether the command trains at a smaller beta first, which then rises."""
    return bool(command.rows[0]["beta_warmup"])


def color_of_model(command):
    """One colour for the linear model of MNIST_VAE_Bernoulli.py, and one for the ReLU model."""
    return "C1" if command.rows[0]["linear"] else "C0"


def plot_over_beta(ax, command, metric):
    """Plot the mean of a metric over the seeds. A model after a rise of beta has a dashed line."""
    betas = []
    means = []
    for rows in command.by_setting().values():
        betas.append(rows[0]["beta"])
        means.append(measurements.seed_mean(rows, metric))
    ax.plot(
        betas,
        means,
        "s--" if is_raised(command) else "o-",
        color=color_of_model(command),
        markerfacecolor="none",
        markersize=5,
        linewidth=1,
        label=answers.kind_of_start(command),
    )


def plot_gains(ax, commands):
    """Plot the gain of trained models over the collapsed one, and the gain that is guaranteed."""
    guaranteed = {}
    for command in commands:
        gains = {}
        for rows in command.by_setting().values():
            row = rows[0]
            loss = measurements.seed_mean(rows, "last epoch loss")
            gains[row["beta"]] = row["collapsed_loss"] - loss
            # It depends on the data and beta alone.
            guaranteed[row["beta"]] = row["collapsed_headroom"]
        model = "linear model" if command.rows[0]["linear"] else "ReLU model"
        ax.plot(
            list(gains),
            list(gains.values()),
            "o-",
            color=color_of_model(command),
            markersize=4,
            linewidth=1,
            label=f"{model}, trained",
        )
    if guaranteed:
        betas = sorted(guaranteed)
        ax.plot(
            betas,
            [guaranteed[beta] for beta in betas],
            "--",
            color=PREDICTED_COLOR,
            linewidth=1,
            label="guaranteed at the optimum",
        )


# -------------------------------------------------------------------------- prediction and training

def against_prediction(path, commands, arrays):
    """Draw the trained KL over the predicted one, one panel per script and level.

    Each point is a setting. Its colour says which flag its command varies, or that it varies none.
    Scripts with fewer than three settings that have a prediction are left out.
    """
    panels = prediction_panels(commands)
    if not panels:
        return
    flags = sorted({flag for points in panels.values() for flag in points})

    def draw(ax, title, points):
        for flag, flag_points in points.items():
            color = f"C{flags.index(flag)}"
            x, y = flag_points.T
            ax.plot(x, y, "o", color=color, markersize=4, label=flag or "none")
        # Both axes have the limits of all predicted and trained values.
        low = min(flag_points.min() for flag_points in points.values())
        high = max(flag_points.max() for flag_points in points.values())
        margin = 0.06 * (high - low)
        limits = (low - margin, high + margin)
        ax.axline((0, 0), slope=1, color="0.7", linewidth=0.8, zorder=0)
        ax.set(xlim=limits, ylim=limits, aspect="equal")
        ax.set(xlabel="predicted KL (nats)", ylabel="trained KL (nats)")
        ax.set_title(title, fontsize=7.5)
        ax.legend(fontsize=7, title="varied flag", title_fontsize=7)

    def draw_all(axes):
        for ax, (title, points) in zip(axes.flat, panels.items()):
            draw(ax, title, points)
        for ax in axes.flat[len(panels):]:
            ax.axis("off")

    columns = 3
    rows = math.ceil(len(panels) / columns)
    pictures.save_figure(
        path, columns=columns, rows=rows, width=3.3, height=3.3, caption="", draw=draw_all
    )


def prediction_panels(commands):
    """The points of each panel: {title: {flag that is varied: array (settings, 2)}}.

    The columns of an array are the predicted and the trained KL, means over the seeds.
    """
    panels = {}
    for script, script_commands in measurements.by_script(commands).items():
        for metric in ("kl", "kl_1", "kl_2"):
            if len(measurements.predicted_and_trained(script_commands, metric)) < 3:
                continue
            latent = metric.removeprefix("kl").replace("_", ", z")
            points = {}
            for command in script_commands:
                own = measurements.predicted_and_trained([command], metric)
                if len(own) == 0:
                    continue
                flag = ", ".join(command.flags)
                points[flag] = np.concatenate([points[flag], own]) if flag in points else own
            panels[f"{script}{latent}"] = points
    return panels
