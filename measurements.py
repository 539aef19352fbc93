"""What the .csv files in results/ say: measured settings, and statistics of them.

reproduce.py writes one .csv per result, with a row for each setting and seed. figures.py draws
pictures and page.py writes the page from these rows alone, so that both can be made anew without
the runs.
"""
import csv
from dataclasses import dataclass

import common
import numpy as np

import theory
import verify

# What the paper says of each flag: as the flag grows, a metric falls or rises. The flag corr_type
# grows from Identical to Random. In two-level models it is z2 that collapses.
DIRECTIONS = {
    "beta": {"kl": "falls"},
    "eta_dec": {"kl": "falls", "kl_2": "falls"},
    "corr_type": {"kl": "rises"},
    "beta_1": {"kl_2": "rises"},
    "beta_2": {"kl_2": "falls"},
}

# A metric that changes by less than this, in nats, counts as unchanged.
SMALLEST_CHANGE = 0.005

# The columns of a row that do not determine its result.
DESCRIPTIONS = ("command", "device", "torch", "seconds")

# By how much the ELBO of the test images changes over the last epochs of a training: the number of
# these epochs, and the column that has the change.
LAST_EPOCHS = 10
RISE_AT_THE_END = "test_elbo, last ten epochs"


@dataclass
class Command:
    """The measured settings of one command line.

    line   the command line, such as "MNIST_CVAE_Relu.py --beta 0.1,0.5"
    flags  the flags that differ between its settings, except for the seed: {name: values in order}
    rows   a row for each setting and seed: {column: value}. Cells without a value are left out.
    num_epochs
           the epochs that the command line stands for; None if they are unknown, or if it trains
           nothing. The rows have others where reproduce.py was given --num_epochs.
    """

    line: str
    flags: dict
    rows: list
    num_epochs: int | None = None

    @property
    def script(self):
        """The name of the script, without .py."""
        return self.line.split()[0].removesuffix(".py")

    @property
    def is_released(self):
        """Whether it trains the objective of the authors' released code."""
        return "--released_objective" in self.line.split()

    def all_settings(self):
        """{values of the flags: [row per seed]}, in the order of the flags' values.

        Raises KeyError or ValueError if a row has no such setting.
        """
        settings = {}
        for row in self.rows:
            values = tuple(row[name] for name in self.flags)
            settings.setdefault(values, []).append(row)

        def order(values):
            return [options.index(value) for options, value in zip(self.flags.values(), values)]

        return {values: settings[values] for values in sorted(settings, key=order)}

    def by_setting(self):
        """`all_settings` without the rows of seeds that diverged."""
        settings = {}
        for values, rows in self.all_settings().items():
            finished = finished_rows(rows)
            if finished:
                settings[values] = finished
        return settings

    def label(self, values):
        """A setting as text, such as "beta = 0.1"; "" if the command has a single setting."""
        parts = [f"{name} = {value}" for name, value in zip(self.flags, values)]
        return ", ".join(parts)

    def written_flags(self):
        """The flags with a value on the command line: {name: text}."""
        words = self.line.split()
        flags = {}
        for word, following in zip(words, words[1:]):
            if word.startswith("--") and not following.startswith("--"):
                flags[word.removeprefix("--")] = following
        return flags


def finished_rows(rows):
    """The rows that have results."""
    return [row for row in rows if is_finished(row)]


def is_finished(row):
    """Whether a row has results. The row of a setting that diverged has none."""
    return "elbo" in row or "max error" in row


def own_flags(command, commands):
    """What distinguishes a command from others of its script: a list such as ["prior = vamp"].

    These are the flags on its command line that the others do not share. A command with varying
    flags is known by them, so that its list is empty.
    """
    if command.flags:
        return []
    others = [other for other in commands if other.script == command.script and other != command]
    parts = []
    for flag, value in command.written_flags().items():
        if any(other.written_flags().get(flag) != value for other in others):
            parts.append(f"{flag} = {value}")
    return parts


# --------------------------------------------------------------------------------- reading the rows

def read_rows(path):
    """The rows of a .csv file, each {column: value} without the empty cells; [] without the file.

    Numbers become int or float, and True and False bool.
    """
    if not path.exists():
        return []
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for texts in csv.DictReader(file):
            rows.append({name: parse(text) for name, text in texts.items() if text})
    return rows


def parse(text):
    """The value of a cell: an int, a float, a bool, or the text itself."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def by_script(commands):
    """The commands of each script: {script: [Command]}."""
    scripts = {}
    for command in commands:
        scripts.setdefault(command.script, []).append(command)
    return scripts


def result_of_row(row):
    """The flags and metrics of a row as text, the same for two rows of one setting and seed."""
    return str(sorted((name, row[name]) for name in row if name not in DESCRIPTIONS))


def distinct_rows(commands):
    """The rows of several commands. A setting and seed that they share counts once."""
    rows = {}
    for command in commands:
        for row in command.rows:
            rows[command.script, result_of_row(row)] = row
    return list(rows.values())


def distinct_settings(commands):
    """The settings of several commands, each a list with a row per seed.

    A setting that several commands share counts once. It has the seeds of all of them.
    """
    settings = []
    setting_of_row = {}
    for command in commands:
        for rows in command.by_setting().values():
            keys = [(command.script, result_of_row(row)) for row in rows]
            known = [setting_of_row[key] for key in keys if key in setting_of_row]
            if known:
                setting = known[0]
            else:
                setting = []
                settings.append(setting)
            for key, row in zip(keys, rows):
                if key not in setting_of_row:
                    setting_of_row[key] = setting
                    setting.append(row)
    return settings


def seed_counts(commands):
    """The different numbers of seeds that the settings of several commands have, in order."""
    counts = set()
    for command in commands:
        for rows in command.all_settings().values():
            counts.add(number_of_seeds(rows))
    return sorted(counts)


def number_of_seeds(rows):
    """The number of different seeds of some rows, those that diverged included."""
    return len({row["seed"] for row in rows})


def seed_mean(rows, column):
    """The mean of a column over the rows of one setting's seeds."""
    return float(np.mean([row[column] for row in rows]))


def seed_deviation(rows, column):
    """The sample standard deviation of a column over one setting's seeds, 0 for a single seed."""
    return deviation([row[column] for row in rows])


def deviation(values):
    """The sample standard deviation of the values of several seeds, 0 for a single seed."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


# ---------------------------------------------------------------------------- the paper's direction

@dataclass
class Steps:
    """How often a metric changes along a flag as the paper says.

    flag, metric  the flag that grows, and the metric that should change
    direction     "falls" or "rises"
    agreeing      the number of steps in which the metric changes in this direction
    unchanged     the number of steps in which it changes by less than SMALLEST_CHANGE
    total         all steps. A step leads from one setting to the next one, all other flags equal.
    """

    flag: str
    metric: str
    direction: str
    agreeing: int
    unchanged: int
    total: int


def steps_of(command):
    """The Steps of one command, one for each flag and metric of DIRECTIONS."""
    settings = command.by_setting()
    steps = []
    for position, flag in enumerate(command.flags):
        for metric, direction in DIRECTIONS.get(flag, {}).items():
            sign = 1 if direction == "rises" else -1
            growths = growths_along(command, position, metric, settings)
            if growths:
                changes = np.array(growths)
                steps.append(Steps(
                    flag=flag,
                    metric=metric,
                    direction=direction,
                    agreeing=int((sign * changes >= SMALLEST_CHANGE).sum()),
                    unchanged=int((abs(changes) < SMALLEST_CHANGE).sum()),
                    total=len(growths),
                ))
    return steps


def growths_along(command, position, metric, settings):
    """By how much the seeds' mean of a metric grows in each step along the flag at a position.

    settings is the result of `Command.by_setting`. There is no step to or from a setting that
    diverged.
    """
    options = list(command.flags.values())[position]
    growths = []
    for values, rows in settings.items():
        place = options.index(values[position]) + 1
        if place == len(options) or metric not in rows[0]:
            continue
        next_values = (*values[:position], options[place], *values[position + 1:])
        if next_values in settings:
            next_mean = seed_mean(settings[next_values], metric)
            growths.append(next_mean - seed_mean(rows, metric))
    return growths


# -------------------------------------------------------------------------- prediction and training

def predicted_and_trained(commands, metric):
    """The closed form's prediction of a metric and the trained value, an array (settings, 2).

    The trained value is the mean over a setting's seeds. A setting that several commands share
    counts once. Settings without a prediction are left out.
    """
    points = []
    for rows in distinct_settings(commands):
        if f"linear {metric}" in rows[0]:
            points.append((seed_mean(rows, f"linear {metric}"), seed_mean(rows, metric)))
    return np.array(points).reshape(-1, 2)


def rank_correlations(commands):
    """Spearman's rank correlation of predicted and trained KLs over the settings: {metric: number}.

    A metric with fewer than three settings, or with values that are all equal, is left out.
    """
    correlations = {}
    for metric in ("kl", "kl_1", "kl_2"):
        points = predicted_and_trained(commands, metric)
        if len(points) > 2:
            correlation = verify.rank_correlation(points[:, 0], points[:, 1])
            if correlation is not None:
                correlations[metric] = correlation
    return correlations


# ------------------------------------------------------------------------------- causes of collapse

@dataclass
class Causes:
    """What collapsed the units of the levels that have a headroom.

    headroom.cause_of_collapse says what the causes mean.

    levels        the number of levels, over all settings and seeds
    by_objective  those with collapsed units because of the objective
    by_training   those with collapsed units because of training
    other         the other levels with collapsed units. Only a richer encoder could use them, or
                  their collapse is unstable and the gain without it is not known.
    """

    levels: int = 0
    by_objective: int = 0
    by_training: int = 0
    other: int = 0

    @property
    def collapsed(self):
        """The number of levels with collapsed units."""
        return self.by_objective + self.by_training + self.other


def causes_of_collapse(commands):
    """The Causes of collapse in several commands."""
    causes = Causes()
    for row in distinct_rows(commands):
        for cause in causes_of_row(row).values():
            causes.levels += 1
            if cause == "training":
                causes.by_training += 1
            elif cause == "objective":
                causes.by_objective += 1
            elif cause != "none":
                causes.other += 1
    return causes


def causes_of_row(row):
    """The cause of collapse in each level with a headroom, {suffix: cause}, the top level first.

    The suffix is "" in a one-level model and "_2" for level 2. A cause is a result of
    headroom.cause_of_collapse, or "none" if no unit of the level collapsed.

    A row that an earlier version of the programs wrote has no causes. They then follow from the
    headroom with a linear encoder.
    """
    if "cause from the top" in row:
        from_the_top = values_of_levels(row["cause from the top"])
        numbers = range(len(from_the_top), 0, -1)
        return {f"_{number}": cause for number, cause in zip(numbers, from_the_top)}

    causes = {}
    for suffix in ("_2", "_1", ""):
        if f"headroom{suffix}" not in row:
            continue
        if f"cause{suffix}" in row:
            causes[suffix] = row[f"cause{suffix}"]
        elif row[f"headroom{suffix}"] > theory.ACTIVE:
            causes[suffix] = "training"
        elif row[f"AU_kl{suffix}"] < number_of_units(row, suffix):
            causes[suffix] = "objective"
        else:
            causes[suffix] = "none"
    return causes


def number_of_units(row, suffix):
    """The number of latent units of a level of a small model: "" for z, "_1" and "_2" in an HVAE.

    A one-level model has the flag dim_z or d_1. The levels of an HVAE have d_1 and d_2.
    """
    if suffix:
        return row[f"d{suffix}"]
    return row["dim_z"] if "dim_z" in row else row["d_1"]


# -------------------------------------------------------------------------------------- deep models

def rise_at_the_end(curve):
    """By how much a curve with one value per epoch rises over the LAST_EPOCHS.

    None if it has too few epochs.
    """
    if len(curve) <= LAST_EPOCHS:
        return None
    return curve[-1] - curve[-1 - LAST_EPOCHS]


# The three terms of a deep model's ELBO.
ELBO_TERMS = ("reconstruction", "learned latents", "context")


def elbo_terms(row):
    """log p(x), the ELBO and its terms in a row of a deep model: {name: nats}.

    All are higher for a better model. The ELBO is the sum of the ELBO_TERMS. A context is the top
    level. A model without one has the term 0. Without draws there is no log p(x).
    """
    context = 0.0
    if "context_baseline" in row:
        context = values_of_levels(row["kl from the top"])[0]
    terms = {"log_px": row["log_px"]} if "log_px" in row else {}
    return terms | {
        "elbo": row["elbo"],
        "reconstruction": -row["reconstruction"],
        "learned latents": -(row["kl"] - context),
        "context": -context,
    }


def rows_by_seed(command):
    """The results of a command with a single setting: {seed: row}, without those that diverged."""
    return {row["seed"]: row for row in finished_rows(command.rows)}


def shared_seeds(commands):
    """The seeds with which every one of these commands, each a single setting, has a result."""
    seeds = [set(rows_by_seed(command)) for command in commands]
    return sorted(set.intersection(*seeds))


def elbo_differences(command, other):
    """How much higher the `elbo_terms` of a deep model are than those of another one.

    Returns {name: [difference per seed]} for the `shared_seeds`. A name that one of the models
    lacks is left out, and without a shared seed all are.
    """
    differences = {}
    own_rows, other_rows = rows_by_seed(command), rows_by_seed(other)
    for seed in shared_seeds([command, other]):
        own_terms, other_terms = elbo_terms(own_rows[seed]), elbo_terms(other_rows[seed])
        for name in own_terms:
            if name in other_terms:
                difference = own_terms[name] - other_terms[name]
                differences.setdefault(name, []).append(difference)
    return differences


def only_seeds(seeds, commands):
    """A remark such as " (only seed 1)" if some of the commands have further seeds, else ""."""
    for command in commands:
        if set(rows_by_seed(command)) - set(seeds):
            return f" (only {seeds_as_text(seeds)})"
    return ""


# ---------------------------------------------------------------------------------- text of numbers

def format_seeds(values, decimals=2):
    """The values of one number over the seeds as text: mean ± sample standard deviation.

    Values that are equal as they are printed have no standard deviation. Equal counts are printed
    as the count.
    """
    if all(isinstance(value, int) for value in values):
        if len(set(values)) == 1:
            return str(values[0])
        decimals = 1
    # Adding 0 turns "-0.00" into "0.00".
    mean = f"{round(float(np.mean(values)), decimals) + 0.0:.{decimals}f}"
    spread = f"{deviation(values):.{decimals}f}"
    return f"{mean} ± {spread}" if float(spread) > 0 else mean


def format_change(values, decimals=2):
    """The changes of one number over the seeds, as `format_seeds` with a sign, such as "+1.20"."""
    text = format_seeds([float(value) for value in values], decimals)
    return text if text.startswith("-") else f"+{text}"


def join_words(words):
    """Words as a list in a sentence: "a, b and c"."""
    words = list(words)
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def plural(count, noun):
    """A count with its noun, such as "1 setting" or "3 settings"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def seeds_as_text(seeds):
    """A list of seeds as text, such as "seed 1" or "seeds 1 and 2"."""
    noun = "seed" if len(seeds) == 1 else "seeds"
    return f"{noun} {join_words(str(seed) for seed in seeds)}"


def levels_of_row(row):
    """The suffixes of the levels of a row's model, as `common.levels` gives them."""
    return common.levels([name for name in row if name.startswith("kl")])


def values_of_levels(cell):
    """The values in a cell that holds one per level, such as "27.91, 0.01" or "none, training"."""
    return [parse(text) for text in str(cell).split(", ")]


def mean_of_levels(rows, column):
    """The mean over the seeds of a column that holds one number per level, (levels,)."""
    return np.mean([values_of_levels(row[column]) for row in rows], axis=0)
