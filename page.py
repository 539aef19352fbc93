"""The page of results, results/README.md, and the definition of a result.

The page is made from the .csv files and from comments.md alone. Each result has its question, its
answer, one picture, a table with its numbers, a comment, and the commands that made it. A table at
the top of the page sums all of them up.
"""
import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import answers
import files
import measurements

# The sections of the page, in their order.
LINEAR = "Theorems and linear models"
HVAES = "Hierarchical VAEs"
CVAES = "Conditional VAEs, single digits, correlation"
VARIANCE = "Learnable encoder variance"
PREDICTION = "Prediction and training"
BEYOND = "Beyond the paper: remedies and deep models"
SECTIONS = (LINEAR, HVAES, CVAES, VARIANCE, PREDICTION, BEYOND)

# A table with more settings than this shows only some of them, at equal distances.
MOST_SETTINGS = 15

# The columns of a table on the page, as far as the rows have them. The .csv file has all columns.
COLUMNS = (
    "log_px", "exact_log_px", "elbo", measurements.RISE_AT_THE_END, "kl", "kl_1", "kl_2", "AU_kl",
    "AU_kl_1", "AU_kl_2", "headroom", "headroom_any", "headroom_2", "headroom_any_2", "rho",
    "rho_any", "cause", "cause_2", "linear kl", "linear kl_1", "linear kl_2", "linear AU",
    "linear AU_2", "active predicted -> trained", "gap", "verdict", "max error", "kl from the top",
    "AU_kl from the top", "headroom from the top", "headroom_any from the top",
    "cause from the top", "rate_auxiliary", "elbo_auxiliary", "context_baseline", "parameters",
)

# Columns whose numbers need another format than two decimals, and columns with another heading.
DECIMALS = {
    "headroom": 3,
    "headroom_any": 3,
    "headroom_2": 3,
    "headroom_any_2": 3,
    "rho": 3,
    "rho_any": 3,
    "headroom from the top": 3,
    "headroom_any from the top": 3,
}
HEADINGS = {
    measurements.RISE_AT_THE_END: "rise of the test ELBO in the last ten epochs",
    "headroom_any": "headroom, any encoder",
    "headroom_any_2": "headroom_2, any encoder",
    "headroom_any from the top": "headroom from the top, any encoder",
    "rho": "ρ1",
    "rho_any": "ρ1, any encoder",
    "AU": "active by mean",
    "AU_kl": "active",
    "AU_kl_1": "active_1",
    "AU_kl_2": "active_2",
    "AU_kl from the top": "active from the top",
    "linear AU": "linear active",
    "linear AU_2": "linear active_2",
}


@dataclass
class RepeatedSweep:
    """A sweep of another result on MNIST, repeated on another data set.

    line      its command line
    original  the command line on MNIST
    result    the name of the result that has the original
    """

    line: str
    original: str
    result: str


@dataclass
class Experiment:
    """One table or figure.

    section     one of SECTIONS
    question    what it answers
    commands    the command lines of the scripts whose results it shows
    answer      the function of answers.py that gives the answer; None where the comparison with the
                authors' released code is the answer
    picture     the function of figures.py that draws it; None for a table without a picture
    arrays      the function of figures.py that collects what the picture shows beyond the rows;
                None if the rows are enough
    tables      the function that gives the tables as Markdown paragraphs; None for `setting_tables`
    repeated    the RepeatedSweep of each command, if its table shows their originals, too
    numbers_in  the name of another result whose table has the numbers of this one; "" for none
    is_sweep    whether the summary counts its steps, correlations and causes of collapse
    collected   whether its rows are those that other results have of the same commands, so that it
                has no .csv file of its own
    """

    section: str
    question: str
    commands: list
    answer: object
    picture: object = None
    arrays: object = None
    tables: object = None
    repeated: tuple = ()
    numbers_in: str = ""
    is_sweep: bool = True
    collected: bool = False

    def tables_of(self, commands, commands_by_name):
        """The tables of this result as Markdown paragraphs.

        commands_by_name has the measurements.Command list of each result on the page.
        """
        if self.numbers_in in commands_by_name:
            return [f"The numbers are in [{self.numbers_in}](#{self.numbers_in})."]
        if self.repeated:
            return repeated_tables(commands, self.repeated, commands_by_name)
        return (self.tables or setting_tables)(commands)


# ------------------------------------------------------------------------------------------- tables

def markdown_table(rows):
    """Rows of texts as a Markdown table. The first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def setting_tables(commands):
    """The tables of the exact objective, with a row per setting, then the folded released one."""
    paragraphs = tables_of_commands(answers.exact(commands))
    released = [command for command in commands if command.is_released]
    if released:
        paragraphs.append("<details><summary>With the released objective</summary>")
        paragraphs += tables_of_commands(released)
        paragraphs.append("</details>")
    return paragraphs


def sigma_tables(commands):
    """The table of the models with a learnable and with a fixed encoder variance.

    It also has the number of active units by the variance of their means, since a unit with a fixed
    variance has a KL even if it ignores x.
    """
    shown = [command for command in commands if command.rows]
    columns = [*columns_of(measurements.finished_rows(all_rows(shown))), "AU"]
    return [markdown_table(table_rows(shown, columns))]


def tables_of_commands(commands):
    """One table for the trained models, and one for the checks of theorems by brute force."""
    paragraphs = []
    for is_check in (True, False):
        shown = []
        for command in commands:
            if command.rows and command.script.startswith("matrix") == is_check:
                shown.append(command)
        if not shown:
            continue
        columns = columns_of(measurements.finished_rows(all_rows(shown)))
        paragraphs.append(markdown_table(table_rows(shown, columns)))
        if any(len(command.all_settings()) > MOST_SETTINGS for command in shown):
            paragraphs.append(
                "The table shows some of the settings. The .csv file has all of them."
            )
    return paragraphs


def columns_of(rows):
    """The COLUMNS that some rows have."""
    names = set()
    for row in rows:
        names.update(row)
    # A linear model has the number of its active units beside the predicted one in one column.
    if all("active predicted -> trained" in row for row in rows):
        names = {name for name in names if not name.startswith(("AU", "linear AU"))}
    return [name for name in COLUMNS if name in names] or ["result"]


def table_rows(commands, columns):
    """The rows of a table: its head, then one per setting, with the mean over the seeds."""
    several_scripts = len({command.script for command in commands}) > 1
    first = "script" if several_scripts else "setting"
    table = [[first, *(HEADINGS.get(name, name) for name in columns)]]
    for command in commands:
        settings = labelled_settings(command, commands)
        step = math.ceil(len(settings) / MOST_SETTINGS)
        for label, rows in settings[::step]:
            table.append(table_row(label, columns, rows))
    return table


def labelled_settings(command, commands):
    """The settings of one of the commands in a table: a list of (first cell, [row per seed]).

    If the settings in the table have different numbers of seeds, a cell has the number where it is
    not the largest one.
    """
    name = command_name(command, commands)
    most_seeds = max(measurements.seed_counts(commands))
    settings = []
    for values, rows in command.all_settings().items():
        label = row_label(command, values, name)
        seeds = measurements.number_of_seeds(rows)
        if seeds < most_seeds:
            label += f" ({measurements.plural(seeds, 'seed')})"
        settings.append((label, rows))
    return settings


def table_row(label, columns, rows):
    """The row of one setting, with its seeds in rows. Seeds that diverged are counted."""
    finished = measurements.finished_rows(rows)
    if not finished:
        return [label, "diverged", *["-"] * (len(columns) - 1)]
    if len(finished) < len(rows):
        label += f" ({len(finished)} of {len(rows)} seeds, the others diverged)"
    return [label, *(cell(name, finished) for name in columns)]


def command_name(command, commands):
    """What distinguishes a command from the others in a table, except for its varying flags.

    It is the script if there are several. If other commands of the script are there, and this one
    varies no flag, it is followed by the flags that they do not share.
    """
    parts = []
    if len({other.script for other in commands}) > 1:
        parts.append(command.script)
    return ", ".join([*parts, *measurements.own_flags(command, commands)])


def row_label(command, values, name):
    """The first cell of a row: what distinguishes the command, and its varying flags."""
    parts = [part for part in (name, command.label(values)) if part]
    return ", ".join(parts) or command.script


def cell(column, rows):
    """The text of a cell: the values of one column over the seeds, or "-" without a value."""
    values = [row[column] for row in rows if column in row]
    if not values:
        return "-"
    if column in ("max error", "gap"):
        return f"{max(values):.0e}"
    if column == "verdict":
        agreeing = sum(value in ("as predicted", "VERIFIED") for value in values)
        if agreeing == len(values):
            return values[0]
        return f"differs in {len(values) - agreeing} of {measurements.plural(len(values), 'seed')}"
    if column.endswith("from the top"):
        levels = zip(*(measurements.values_of_levels(value) for value in values))
        return ", ".join(seeds_cell(column, level_values) for level_values in levels)
    return seeds_cell(column, values)


def seeds_cell(column, values):
    """The text of one value of a column over the seeds. Different texts are all in it."""
    if any(isinstance(value, str) for value in values):
        return " / ".join(dict.fromkeys(str(value) for value in values))
    return measurements.format_seeds(values, DECIMALS.get(column, 2))


def beta_tables(commands):
    """The KL of z2 and its active units over beta_1 (down) and beta_2 (across), in one table."""
    [command] = commands
    settings = command.by_setting()
    betas_1, betas_2 = command.flags.values()
    rows = [["β1 \\ β2", *(str(beta_2) for beta_2 in betas_2)]]
    for beta_1 in betas_1:
        cells = []
        for beta_2 in betas_2:
            seed_rows = settings.get((beta_1, beta_2))
            if seed_rows is None:
                cells.append("-")
            else:
                cells.append(f"{cell('kl_2', seed_rows)} ({cell('AU_kl_2', seed_rows)})")
        rows.append([f"**{beta_1}**", *cells])
    caption = "KL of z2 in nats, and in parentheses the number of its 16 units that are active."
    return [caption, markdown_table(rows)]


def remedy_tables(commands):
    """The test objective and the active units of each setting, with one column per remedy."""
    cases = answers.remedy_cases(commands)
    names = [remedy.name for remedy in answers.REMEDIES]
    objectives = [["script", "setting", "headroom without a remedy", *names]]
    units = [["script", "setting", *names]]
    for (script, setting), by_remedy in cases.items():
        without_remedy = by_remedy.get(answers.NO_REMEDY, {}).values()
        nats = [answers.headroom_of_row(row) for row in without_remedy]
        objective_cells = []
        unit_cells = []
        for name in names:
            seed_rows = by_remedy.get(name, {}).values()
            values = [answers.plain_objective(row) for row in seed_rows]
            active = [row["AU_kl"] if "AU_kl" in row else row["AU_kl_2"] for row in seed_rows]
            objective_cells.append(measurements.format_seeds(values) if values else "-")
            unit_cells.append(measurements.format_seeds(active) if active else "-")
        headroom = measurements.format_seeds(nats, 3) if nats else "-"
        objectives.append([script, setting, headroom, *objective_cells])
        units.append([script, setting, *unit_cells])
    return [
        "The negative β-ELBO on the test images, in nats (lower is better):",
        markdown_table(objectives),
        "Active units of z, or of z2 in the HVAE:",
        markdown_table(units),
    ]


def no_tables(commands):
    """No table of its own, for a result whose numbers are beside the released code's."""
    return []


def prediction_tables(commands):
    """The rank correlation of each script that has one, with both objectives together."""
    table = [["script", "settings", "rank correlation of predicted and trained KL"]]
    for script, script_commands in measurements.by_script(commands).items():
        correlations = measurements.rank_correlations(script_commands)
        if not correlations:
            continue
        parts = []
        for metric, value in correlations.items():
            latent = "" if metric == "kl" else f"z{metric[-1]} "
            parts.append(f"{latent}{value:.2f}")
        settings = len(measurements.distinct_settings(script_commands))
        table.append([script, str(settings), ", ".join(parts)])
    return [markdown_table(table)] if len(table) > 1 else []


def repeated_tables(commands, repeated, commands_by_name):
    """The table of sweeps that are repeated on another data set, beside the same sweeps on MNIST.

    repeated has the RepeatedSweep of each command. An original that is not on the page has "-".
    """
    statistics = {
        "steps": steps_cell,
        "rank correlation": correlation_cell,
        "levels collapsed": causes_cell,
        "as predicted": agreement_cell,
    }
    dataset = different_values(all_rows(commands), "dataset")
    head = ["script and flag"]
    for name in statistics:
        head += [f"{name}, {dataset}", f"{name}, mnist"]
    table = [[*head, "result on mnist"]]

    sweeps = {sweep.line: sweep for sweep in repeated}
    for command in commands:
        if not command.rows:
            continue
        sweep = sweeps[command.line]
        originals = []
        for original in commands_by_name.get(sweep.result, []):
            if original.line == sweep.original and original.rows:
                originals.append(original)

        cells = [", ".join([command.script, *command.flags, epochs_in_words([command])])]
        for statistic in statistics.values():
            cells += [statistic([command]), statistic(originals)]
        link = "-"
        if originals:
            link = (
                f"[{sweep.result}](#{sweep.result}), {seeds_in_words(originals)}, "
                f"{epochs_in_words(originals)}"
            )
        table.append([*cells, link])

    caption = (
        "*Steps*: those in the paper's direction. *Levels collapsed*: by the objective / by "
        "training. *As predicted*: trained linear models that pass every check of the closed form. "
        "The [summary](#summary) explains the numbers."
    )
    return [markdown_table(table), caption]


def deep_tables(commands):
    """The table of the deep models, then their differences from the first model, term by term."""
    finished = [command for command in commands if measurements.finished_rows(command.rows)]
    if len(finished) < 2:
        return setting_tables(commands)

    first, *others = finished
    names = ["log_px", "elbo", *measurements.ELBO_TERMS]
    table = [["model", *names]]
    for command in others:
        differences = measurements.elbo_differences(command, first)
        label = command.script + pairs_remark(command, first)
        cells = []
        for name in names:
            values = differences.get(name)
            cells.append(measurements.format_change(values) if values else "-")
        table.append([label, *cells])
    caption = (
        f"Difference from {first.script} in nats. The last three columns are the terms of the ELBO "
        "and add up to its difference."
    )
    if measurements.seed_counts(finished) != [1]:
        caption += (
            " Models are compared seed by seed: the numbers are the mean difference ± its standard "
            "deviation."
        )
    return [*setting_tables(commands), caption, markdown_table(table)]


def pairs_remark(command, other):
    """A remark on the seeds with which two models are compared; "" if both have the same seeds."""
    seeds = measurements.shared_seeds([command, other])
    if not seeds:
        return " (no seed in common)"
    return measurements.only_seeds(seeds, [command, other])


# The columns of `cause_tables` with their headings.
CAUSE_COLUMNS = {
    "AU_kl from the top": "active from the top",
    "headroom from the top": "headroom from the top",
    "headroom_any from the top": "headroom, any encoder",
    "rho": "ρ1",
    "rho_any": "ρ1, any encoder",
    "cause from the top": "cause",
}


def cause_tables(commands):
    """The table of what collapsed the units of deep models, whether with one level or with many."""
    table = [["model", *CAUSE_COLUMNS.values()]]
    for command in commands:
        for label, rows in labelled_settings(command, commands):
            table.append(table_row(label, CAUSE_COLUMNS, [row_of_levels(row) for row in rows]))
    caption = (
        "A cell with several numbers has one for each learned level, the top level first. Where no "
        "posterior can match the prior, a unit counts as active if its mean varies. "
        "[docs/metrics.md](../docs/metrics.md#4-headroom) explains the other columns."
    )
    return [markdown_table(table), caption]


def row_of_levels(row):
    """A row whose CAUSE_COLUMNS have a value for each level with a headroom, the top level first.

    A model with a single level has them, too. A context has no headroom, so that its units are left
    out.
    """
    causes = measurements.causes_of_row(row)
    if not causes:
        return row
    if "cause from the top" in row:
        active = str(row["AU_kl from the top"]).split(", ")
        return row | {"AU_kl from the top": ", ".join(active[-len(causes):])}

    # Only a prior that no posterior can match has a smallest rate above 0.
    active = row["AU"] if row.get("smallest_rate") else row["AU_kl"]
    return row | {
        "AU_kl from the top": active,
        "headroom from the top": row["headroom"],
        "headroom_any from the top": row["headroom_any"],
        "cause from the top": row["cause"],
    }


def threshold_tables(commands):
    """The KL and the active units of each kind of MNIST_VAE_Bernoulli.py (across) over beta."""
    head = ["β"]
    columns = []
    for command in commands:
        if command.rows:
            head.append(answers.kind_of_start(command))
            settings = command.all_settings().values()
            columns.append({rows[0]["beta"]: rows for rows in settings})

    table = [head]
    for beta in sorted(set().union(*columns)):
        table.append([f"{beta:g}", *(threshold_cell(column.get(beta)) for column in columns)])
    caption = (
        "KL in nats, and in parentheses the number of active units. Near the threshold the model "
        "uses a single direction of z. If this is spread over several units, none of them may "
        "count as active."
    )
    return [caption, markdown_table(table)]


def threshold_cell(rows):
    """The KL and the active units of one setting with a row per seed, or None for no setting."""
    if rows is None:
        return "-"
    finished = measurements.finished_rows(rows)
    if not finished:
        return "diverged"
    kl = measurements.format_seeds([row["kl"] for row in finished], 3)
    return f"{kl} ({cell('AU_kl', finished)})"


# ---------------------------------------------------------------- beside the authors' released code

@dataclass
class ReleasedValue:
    """A number that the authors' released code prints.

    result, setting, metric  the name of the result, the label of the setting, the column of ours
    text                     the number as it is printed
    """

    result: str
    setting: str
    metric: str
    text: str

    @property
    def decimals(self):
        """The number of decimals that the released code's number is printed with."""
        return len(self.text.partition(".")[2])

    def difference_in_words(self, values):
        """How it differs from our values over the seeds; None within two standard deviations.

        The number is rounded, so half a unit of its last digit does not count as a difference.
        """
        rounding = 0.5 * 10**-self.decimals
        difference = abs(float(self.text) - np.mean(values))
        if difference <= 2 * np.std(values, ddof=1) + rounding:
            return None
        ours = measurements.format_seeds(values, self.decimals)
        return f"{self.metric} at {self.setting} ({self.text} there, {ours} here)"


def read_released_values(folder, name):
    """The ReleasedValues of one result, in the order of the file released_code.csv."""
    path = Path(folder, "released_code.csv")
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        values = [ReleasedValue(**row) for row in csv.DictReader(file)]
    return [value for value in values if value.result == name]


# At most this number of differences is described in words.
MOST_DIFFERENCES = 3

# The decoder's squared error, which the released code prints in place of the reconstruction.
SQUARED_ERROR = "squared error / η_dec²"


def own_value(row, metric):
    """Our value of a metric of the released code. The squared error is that of the last epoch.

    -E[log p(x given z)] = squared error / (2 η_dec²) + 784/2 ln(2 π η_dec²)

    None if the row lacks it.
    """
    if metric != SQUARED_ERROR:
        return row.get(metric)
    if "last epoch reconstruction" not in row:
        return None
    constant = 784 / 2 * math.log(2 * math.pi * row["eta_dec"] ** 2)
    return 2 * (row["last epoch reconstruction"] - constant)


@dataclass
class ReleasedComparison:
    """The released code's numbers beside ours.

    table        the rows of the table, its head first
    seed_counts  the different numbers of seeds that our settings have
    differences  for each number None, or in words how it differs from ours
    """

    table: list
    seed_counts: set
    differences: list

    @property
    def answer(self):
        """How many numbers are within two standard deviations of ours, and which are not."""
        outside = [words for words in self.differences if words]
        total = len(self.differences)
        if not total:
            return "There are too few seeds for a comparison."
        if not outside:
            return (
                f"All {total} numbers of the released code are within two standard deviations of "
                "ours, up to rounding."
            )
        within = (
            f"{total - len(outside)} of {total} numbers of the released code are within two "
            "standard deviations of ours, up to rounding."
        )
        if len(outside) > MOST_DIFFERENCES:
            return f"{within}\n\nA star marks the others."
        beginning = "The other is" if len(outside) == 1 else "The others are"
        return f"{within}\n\n{beginning} {measurements.join_words(outside)}."

    def paragraphs(self):
        """The table in Markdown, with a caption."""
        caption = (
            "Beside the authors' released code, which was run with one seed. Ours is trained with "
            f"`--released_objective`, over {counts_in_words(self.seed_counts)}."
        )
        return [caption, markdown_table(self.table)]


def compare_with_released_code(released, commands):
    """The ReleasedComparison of a result, or None if there is nothing to compare.

    released are its ReleasedValues. Ours are those of the commands with the released objective.
    """
    ours = {}
    for command in commands:
        if command.is_released:
            for values, rows in command.by_setting().items():
                # A trial with other epochs or on drawn digits is no comparison.
                rows = [
                    row for row in rows
                    if not has_other_epochs(command, row) and row.get("dataset") != "digits"
                ]
                if rows:
                    ours[command.label(values)] = rows
    by_setting = {}
    for value in released:
        if value.setting in ours:
            by_setting.setdefault(value.setting, []).append(value)
    if not by_setting:
        return None

    head = ["setting"]
    for value in next(iter(by_setting.values())):
        head += [f"{value.metric}, released code", f"{value.metric}, here"]
    comparison = ReleasedComparison(table=[head], seed_counts=set(), differences=[])
    for setting, values in by_setting.items():
        cells = [setting]
        for value in values:
            numbers = [own_value(row, value.metric) for row in ours[setting]]
            if None in numbers:
                cells += [value.text, "-"]
                continue
            words = value.difference_in_words(numbers) if len(numbers) > 1 else None
            star = " *" if words else ""
            cells += [value.text + star, measurements.format_seeds(numbers, value.decimals)]
            comparison.seed_counts.add(len(numbers))
            if len(numbers) > 1:
                comparison.differences.append(words)
        comparison.table.append(cells)
    return comparison


# -------------------------------------------------------------------------- the summary of the page

@dataclass
class Measured:
    """A result with all that the page shows of it.

    name        name of the experiment
    experiment  its Experiment
    commands    its measurements.Command list
    comparison  its ReleasedComparison, or None
    comment     its part of comments.md, or ""
    """

    name: str
    experiment: Experiment
    commands: list
    comparison: ReleasedComparison | None
    comment: str

    @property
    def answer(self):
        """The answer to the question, with its details if it has any."""
        if self.experiment.answer is None:
            return self.comparison.answer if self.comparison else ""
        return self.experiment.answer(self.commands)

    @property
    def short_answer(self):
        """The answer in a sentence or two, without the details below it.

        A comparison with the authors' released code adds its own sentence.
        """
        answers_to_show = [self.answer]
        if self.experiment.answer and self.comparison:
            answers_to_show.append(self.comparison.answer)
        return " ".join(answer.partition("\n\n")[0] for answer in answers_to_show)


def summary_table(results):
    """The table at the top of the page, with a row per Measured that has a table of its own."""
    head = [
        "question",
        "answer",
        "steps in the paper's direction",
        "rank correlation of predicted and trained KL",
        "levels collapsed by the objective / by training",
        "seeds, epochs, data",
    ]
    table = [head]
    shown = results_in_summary(results)
    for section in SECTIONS:
        section_results = [result for result in shown if result.experiment.section == section]
        if section_results:
            table.append([f"**{section}**"] + [""] * (len(head) - 1))
        for result in section_results:
            table.append(summary_row(result))
    return markdown_table(table)


def results_in_summary(results):
    """The Measured that have a row in the summary: those whose numbers are in no other result."""
    names = {result.name for result in results}
    return [result for result in results if result.experiment.numbers_in not in names]


def summary_row(result):
    """The row of one Measured in the summary. Its question is a link to its part of the page."""
    commands = result.commands
    origin = [
        seeds_in_words(commands),
        epochs_in_words(commands),
        different_values(all_rows(commands), "dataset"),
    ]
    return [
        f"[{result.experiment.question}](#{result.name})",
        result.short_answer,
        *statistics_cells(result),
        ", ".join(part for part in origin if part),
    ]


def statistics_cells(result):
    """The steps, the rank correlations and the causes of a result in the summary."""
    if not result.experiment.is_sweep:
        return ["-", "-", "-"]
    commands = result.commands
    return [steps_cell(commands), correlation_cell(commands), causes_cell(commands)]


def steps_cell(commands):
    """How many steps of all commands go the paper's way, such as "11 of 12, 1 unchanged"."""
    steps = [step for command in commands for step in measurements.steps_of(command)]
    if not steps:
        return "-"
    agreeing = sum(step.agreeing for step in steps)
    unchanged = sum(step.unchanged for step in steps)
    cell = f"{agreeing} of {sum(step.total for step in steps)}"
    return f"{cell}, {unchanged} unchanged" if unchanged else cell


def correlation_cell(commands):
    """The range of the rank correlations over the scripts and both objectives, by level."""
    groups = {}
    for command in commands:
        groups.setdefault((command.script, command.is_released), []).append(command)
    by_metric = {}
    for group in groups.values():
        for metric, value in measurements.rank_correlations(group).items():
            by_metric.setdefault(metric, []).append(value)

    parts = []
    for metric, values in by_metric.items():
        latent = "" if metric == "kl" else f"z{metric[-1]} "
        low, high = f"{min(values):.2f}", f"{max(values):.2f}"
        parts.append(latent + (low if low == high else f"{low} to {high}"))
    return ", ".join(parts) or "-"


def causes_cell(commands):
    """How many levels the objective and training collapsed, such as "13 / 35 of 48".

    Levels with another cause have a number of their own: "13 / 33, 2 other, of 48".
    """
    causes = measurements.causes_of_collapse(commands)
    if not causes.levels:
        return "-"
    other = f", {causes.other} other," if causes.other else ""
    return f"{causes.by_objective} / {causes.by_training}{other} of {causes.levels}"


def agreement_cell(commands):
    """How many trained linear models pass every check of the closed form, such as "4 of 5".

    "-" for models without a closed form.
    """
    if not any("verdict" in row for row in all_rows(commands)):
        return "-"
    agreeing, total = answers.models_as_predicted(commands)
    return f"{agreeing} of {total}"


def seeds_in_words(commands):
    """The number of seeds of each setting of a result, such as "3 seeds" or "1 to 3 seeds"."""
    return counts_in_words(measurements.seed_counts(commands))


def counts_in_words(seed_counts):
    """Different numbers of seeds as text, such as "3 seeds" or "1 to 3 seeds"."""
    fewest, most = min(seed_counts, default=0), max(seed_counts, default=0)
    if fewest < most:
        return f"{fewest} to {most} seeds"
    return measurements.plural(most, "seed")


def epochs_in_words(commands):
    """The epochs of a result, such as "100 epochs" or "30 and 100 epochs"; "" for no training."""
    epochs = sorted({row["num_epochs"] for row in all_rows(commands) if "num_epochs" in row})
    if not epochs:
        return ""
    noun = "epoch" if epochs == [1] else "epochs"
    return f"{measurements.join_words(str(number) for number in epochs)} {noun}"


def all_rows(commands):
    """The rows of all commands, one after another."""
    return [row for command in commands for row in command.rows]


# ----------------------------------------------------------------------------------------- the page

def provenance(result):
    """What one Measured was made of, in one line, with the link to its .csv file."""
    commands = result.commands
    rows = all_rows(commands)
    seeds = sorted({row["seed"] for row in rows})
    seeds_text = measurements.seeds_as_text(seeds)
    if len(measurements.seed_counts(commands)) > 1:
        seeds_text += " (some settings have fewer)"
    seconds = sum(row["seconds"] for row in measurements.distinct_rows(commands))
    parts = [
        epochs_in_words(commands),
        seeds_text,
        measurements.plural(round(seconds / 60), "minute"),
        different_values(rows, "device"),
        f"torch {different_values(rows, 'torch')}",
    ]
    source = f"All columns: [{result.name}.csv]({result.name}.csv)."
    if result.experiment.collected:
        source = "The rows are those of the same commands in the other results."
    return (
        f"*Data: {different_values(rows, 'dataset')}. "
        f"{', '.join(part for part in parts if part)}. {source}*"
    )


def different_values(rows, column):
    """The different values of a column as a list in a sentence."""
    return measurements.join_words(dict.fromkeys(str(row[column]) for row in rows))


def command_lines(commands):
    """The command lines as a code block.

    If every command is also run with --released_objective, a sentence says so in place of these
    lines.
    """
    exact = [command.line for command in commands if not command.is_released]
    released = [command.line for command in commands if command.is_released]
    if exact and sorted(f"{line} --released_objective" for line in exact) == sorted(released):
        block = "\n".join(f"    python {line}" for line in exact)
        return f"{block}\n\nEach command is also run with `--released_objective`."
    return "\n".join(f"    python {command.line}" for command in commands)


def result_paragraphs(result, commands_by_name, has_picture):
    """One Measured as Markdown paragraphs. commands_by_name has all results on the page."""
    name, experiment, commands = result.name, result.experiment, result.commands
    paragraphs = [f"### {name}", f"**{experiment.question}** {result.answer}"]
    if has_picture:
        paragraphs.append(f"![{experiment.question}]({name}.png)")
    paragraphs += experiment.tables_of(commands, commands_by_name)
    if result.comparison:
        paragraphs += result.comparison.paragraphs()
        if experiment.answer:
            paragraphs.append(result.comparison.answer)
    measured = [command for command in commands if command.rows]
    return [
        *paragraphs,
        result.comment,
        provenance(result),
        reproducing_line(result),
        command_lines(measured),
    ]


def reproducing_line(result):
    """The command that makes a Measured with its seeds and epochs, in a sentence."""
    seeds = sorted({row["seed"] for row in all_rows(result.commands)})
    words = f"python reproduce.py {result.name} --seed {','.join(str(seed) for seed in seeds)}"
    other_epochs = set()
    for command in result.commands:
        for row in command.rows:
            if has_other_epochs(command, row):
                other_epochs.add(row["num_epochs"])
    if len(other_epochs) == 1:
        words += f" --num_epochs {other_epochs.pop()}"
    return f"`{words}` runs these commands:"


def has_other_epochs(command, row):
    """Whether a row was trained with other epochs than its command line stands for."""
    return command.num_epochs is not None and row.get("num_epochs") != command.num_epochs


def write_page(folder, experiments, commands_by_name):
    """Write README.md of a folder from the results there and from comments.md.

    experiments {name: Experiment} are in the order of the page. commands_by_name {name: [Command]}
    has the rows of those that have a .csv file. The page opens with the part of comments.md before
    its first heading. The comment "Summary" is below the summary, and comments whose heading is no
    result close the page.
    """
    introduction, comments = read_comments(Path(folder, "comments.md"))
    results = []
    for name, experiment in experiments.items():
        if name in commands_by_name:
            commands = commands_by_name[name]
            released = read_released_values(folder, name)
            comparison = compare_with_released_code(released, commands)
            results.append(
                Measured(
                    name=name,
                    experiment=experiment,
                    commands=commands,
                    comparison=comparison,
                    comment=comments.get(name, ""),
                )
            )

    used = {result.experiment.section for result in results}
    sections = [section for section in SECTIONS if section in used]
    below_summary = comments.pop("Summary", "")
    closing = [heading for heading in comments if heading not in experiments]
    titles = ["Summary", *sections, *closing]
    contents = [f"{i}. [{title}](#{anchor(title)})" for i, title in enumerate(titles, 1)]

    paragraphs = [introduction, "\n".join(contents), "## Summary", summary_table(results)]
    paragraphs += [single_seed_sentence(results), earlier_state_sentence(results), below_summary]
    for section in sections:
        paragraphs.append(f"## {section}")
        for result in results:
            if result.experiment.section == section:
                has_picture = Path(folder, f"{result.name}.png").exists()
                paragraphs += result_paragraphs(result, commands_by_name, has_picture)
    for heading in closing:
        paragraphs += [f"## {heading}", comments[heading]]
    text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    files.write_text(Path(folder, "README.md"), text + "\n")


def single_seed_sentence(results):
    """Which results rest on a single seed, wholly or in some of their settings; "" for none."""
    wholly = []
    partly = []
    for result in results:
        counts = measurements.seed_counts(result.commands)
        if counts == [1]:
            wholly.append(result.name)
        elif counts[0] == 1:
            partly.append(result.name)

    sentences = []
    if wholly:
        names = measurements.join_words(wholly)
        sentences.append(f"These results rest on a single seed: {names}.")
    if partly:
        names = measurements.join_words(partly)
        sentences.append(f"These results have some settings with a single seed: {names}.")
    return " ".join(sentences)


def earlier_state_sentence(results):
    """Which causes of collapse in the summary rest on the headroom with linear encoders alone.

    Earlier versions of the programs had no headroom with any encoder. "" without such results.
    """
    names = []
    for result in results_in_summary(results):
        rows = all_rows(result.commands)
        if any(has_earlier_headroom(row) for row in rows):
            names.append(result.name)
    if not names:
        return ""
    return (
        "These results are of an earlier state of the programs: "
        f"{measurements.join_words(names)}. There the headroom with linear encoders alone decides "
        "about the cause of collapse."
    )


def has_earlier_headroom(row):
    """Whether a row has a headroom with linear encoders, and none with any encoder."""
    with_linear = any(name.startswith("headroom") for name in row)
    with_any = any(name.startswith("headroom_any") for name in row)
    return with_linear and not with_any


def anchor(heading):
    """The anchor of a heading on GitHub: lower case, without punctuation, with hyphens."""
    kept = re.sub(r"[^\w\s-]", "", heading.lower())
    return re.sub(r"\s", "-", kept)


def read_comments(path):
    """The text before the first "## " heading of comments.md, and that under each heading.

    Returns (introduction, {heading: text}). Without the file the introduction is a title.
    """
    if not path.exists():
        return "# Results", {}
    introduction, *parts = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.M)
    comments = {}
    for part in parts:
        heading, _, text = part.partition("\n")
        comments[heading.strip()] = text.strip()
    return introduction.strip(), comments
