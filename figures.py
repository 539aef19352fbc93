"""The pictures of reproduce.py's results.

The functions that take a path and runs each draw the picture of one result. A run is a
reproduce.Run: one command line, with the results of its settings.
"""
import files
import pictures
import theory
import verify


def units_by_level(run):
    """The mean KL of each unit in the first setting of a run, a list of (d,) with level 1 first."""
    units = run.units(0)
    levels = sum(name.startswith("unit_kl_") for name in units)
    return [units[f"unit_kl_{level}"].mean(0) for level in range(1, 1 + levels)]


def by_script(runs):
    """The results that have a closed form, {script: [RunResult]}, each setting once."""
    scripts = {}
    for run in runs:
        for result in run.results:
            if verify.closed_form(result):
                results = scripts.setdefault(run.script, {})
                results[str(result.settings)] = result
    return {script: list(results.values()) for script, results in scripts.items()}


def collapse_curves(path, runs):
    """Draw collapse curves, with one row of panels per command and one panel per level."""
    first_units = first_setting_units(runs)
    names = [name for name in first_units if name.startswith("unit_kl")]

    def draw(axes):
        for row, run in zip(axes, runs):
            units = units_by_label(run)
            for ax, name in zip(row, names):
                pictures.plot_collapse(ax, units, name)
                latent = f", z{name[-1]}" if len(names) > 1 else ""
                ax.set(title=run.objective_name() + latent)

    pictures.save_figure(
        path, columns=len(names), rows=len(runs), width=4.6, height=3.6, caption="", draw=draw
    )


def first_setting_units(runs):
    """The values per test example of the first setting that did not diverge."""
    for run in runs:
        for units in units_by_label(run).values():
            return units
    return {}


def units_by_label(run):
    """The values per test example of each setting with the first seed, {label: examples}.

    Settings that diverged are left out.
    """
    units = {}
    for i, flags in zip(run.first_seed_indices(), run.setting_labels()):
        label = ", ".join(f"{name} = {value}" for name, value in flags.items())
        if run.results[i].metrics is not None:
            units[label or run.script] = run.units(i)
    return units


def beside(path, runs):
    """Draw the collapse curves of several commands in one picture, one curve per command."""
    units = {run.script: run.units(0) for run in runs if run.results[0].metrics is not None}
    pictures.draw_collapse(path, units, "")


def of_the_grid(name):
    """A function that copies the picture of this name that the script drew of its grid."""
    def copy(path, runs):
        picture = (runs[0].grid_dir() / name).read_bytes()
        files.write(path, lambda file: file.write(picture))
    return copy


def per_digit(path, runs):
    """Draw KL and active units for each digit, predicted and trained, one row per script."""
    def draw(axes):
        for (left, right), run in zip(axes, runs):
            plot_digits(left, run, "kl", "KL (nats)")
            plot_digits(right, run, "AU", "active units")

    pictures.save_figure(path, columns=2, rows=len(runs), width=4.6, height=3.0, caption="", draw=draw)


def plot_digits(ax, run, metric, ylabel):
    """Plot a metric over the digits: predicted for the linear model, and trained."""
    results = [result for result in run.results if verify.closed_form(result)]
    correlation = verify.rank_correlations(results).get(metric)
    digits = [result.settings["digit"] for result in results]
    points = pictures.predicted_and_trained(results, metric)
    ax.plot(
        digits,
        points[:, 0],
        "_",
        color="0.3",
        markersize=14,
        label="predicted of the linear model",
    )
    ax.plot(digits, points[:, 1], "o", color="C0", label=pictures.with_rank("trained", correlation))
    ax.set(
        xlabel="digit",
        ylabel=ylabel,
        xticks=sorted(set(digits)),
        ylim=(0, None),
        title=run.script,
    )
    ax.locator_params(axis="y", integer=True)
    ax.legend(fontsize=7)


def rates(path, runs):
    """Draw the KL of each delta-VAE, during training and on the test images, beside its delta.

    The KL of the standard prior has no lower limit. The other priors keep it above delta.
    """
    results = {}
    for run in runs:
        for i in run.first_seed_indices():
            f = run.settings[i]
            label = "standard" if f.prior == "standard" else f"δ = {f.delta:g}"
            if run.results[i].metrics is not None:
                results[label] = run.results[i]

    def draw(axes):
        left, right = axes[0]
        for k, (label, result) in enumerate(results.items()):
            plot_rate_curve(left, k, label, result)
            plot_rate_bars(right, k, result)
        left.set(xlabel="epoch", ylabel="KL (nats per training example)", ylim=(0, None))
        right.set(
            ylabel="rate (nats per test example)",
            xticks=range(len(results)),
            xticklabels=list(results),
        )
        left.locator_params(axis="x", integer=True)
        left.legend(fontsize=7)
        right.legend(fontsize=7)

    pictures.save_figure(path, columns=2, rows=1, width=4.8, height=3.6, caption="", draw=draw)


def plot_rate_curve(ax, k, label, result):
    """Plot the KL of the k-th delta-VAE over its training, and its delta as a dashed line."""
    curve = result.curves["kl"]
    epochs = range(1, len(curve) + 1)
    ax.plot(epochs, curve, f"C{k}", marker="os^Dvx"[k % 6], markersize=4, label=label)
    ax.axhline(result.metrics["smallest_rate"], color=f"C{k}", linestyle="--", linewidth=1)


def plot_rate_bars(ax, k, result):
    """Plot the test KL of the k-th delta-VAE, its rate with the auxiliary prior, and its delta."""
    # The bars of all models share the legend of the first one.
    own_prior = auxiliary_prior = delta_label = None
    if k == 0:
        own_prior = "against the model's own prior"
        auxiliary_prior = "against the auxiliary prior"
        delta_label = "δ"
    metrics = result.metrics
    delta = metrics["smallest_rate"]
    ax.bar(k - 0.2, metrics["kl"], 0.4, color="C0", label=own_prior)
    ax.bar(k + 0.2, metrics["rate_auxiliary"], 0.4, color="C1", hatch="//", label=auxiliary_prior)
    ax.plot([k - 0.45, k + 0.45], [delta, delta], "k--", linewidth=1, label=delta_label)


def by_level(path, runs):
    """Draw the KL of each level and the share of its units that are active, one bar per model."""
    units = {}
    for run in runs:
        if run.results[0].metrics is not None:
            units[run.script] = units_by_level(run)
    levels = range(1, 1 + max(map(len, units.values()), default=0))

    def draw(axes):
        left, right = axes[0]
        for k, (script, kls) in enumerate(units.items()):
            offset = 0.8 * ((k + 0.5) / len(units) - 0.5)
            x = [level + offset for level in levels[:len(kls)]]
            style = {
                "width": 0.8 / len(units),
                "color": f"C{k}",
                "hatch": ("", "//", "..")[k % 3],
                "label": script,
            }
            left.bar(x, [kl.sum() for kl in kls], **style)
            right.bar(x, [(kl > theory.ACTIVE).mean() for kl in kls], **style)
        left.set(ylabel="KL (nats per test example)")
        right.set(ylabel="share of units with a KL above 0.01 nats")
        for ax in (left, right):
            ax.set(xlabel="level, 1 next to the image", xticks=levels, ylim=(0, None))
        left.legend(fontsize=7)

    pictures.save_figure(path, columns=2, rows=1, width=4.8, height=3.6, caption="", draw=draw)


def against_prediction(path, runs):
    """Draw the trained KL over the predicted one, one panel per script and level.

    Scripts with too few settings for a rank correlation are left out.
    """
    panels = {}
    for script, results in by_script(runs).items():
        if verify.can_be_ranked(results):
            for level in theory.levels_of(verify.closed_form(results[0])):
                latent = f", {pictures.latent_name(level)}" if level else ""
                panels[f"{script}{latent}"] = pictures.predicted_and_trained(results, f"kl{level}")

    def draw(ax, title, points):
        ax.plot(points[:, 0], points[:, 1], "o", markersize=4)
        predicted = points[0, 0]
        ax.axline((predicted, predicted), slope=1, color="0.7", linewidth=0.8, zorder=0)
        ax.set(xlabel="predicted KL (nats)", ylabel="trained KL (nats)")
        ax.set_title(title, fontsize=8)

    pictures.draw_panels(path, panels, width=3.4, height=3.0, caption="", draw=draw)
