"""The answer of each of reproduce.py's results in a sentence or two, computed from its rows.

A function takes the measurements.Command list of a result and returns its answer. Details may
follow as a list in Markdown, after a blank line. The words depend on what was measured, so that a
result which turns out otherwise is not described as expected.
"""
from dataclasses import dataclass

import numpy as np

import measurements
import theory


def exact(commands):
    """The commands that train the exact objective."""
    return [command for command in commands if not command.is_released]


def yes_or_no(agreeing, total):
    """The first word of an answer: how many of the cases agree with the expectation."""
    if agreeing == total:
        return "Yes."
    return "Mostly." if agreeing > total / 2 else "No."


def with_details(answer, details):
    """An answer, and below it the details, a list of texts, as a list in Markdown.

    The summary of the page shows the part above the blank line alone.
    """
    if not details:
        return answer
    return answer + "\n\n" + "\n".join(f"- {detail}" for detail in details)


# ------------------------------------------------------------------------------------- small models

# How an answer names the flags that are varied.
SYMBOLS = {
    "beta": "β",
    "beta_1": "β1",
    "beta_2": "β2",
    "eta_dec": "η_dec",
}


def symbol(flag):
    """The name of a flag in a sentence."""
    return SYMBOLS.get(flag, flag)


def directions(commands):
    """In how many steps along each flag the KL changes in the paper's direction."""
    steps = [step for command in exact(commands) for step in measurements.steps_of(command)]
    sentences = []
    for step in steps:
        latent = "" if step.metric == "kl" else f" of z{step.metric[-1]}"
        growing = f"Along {symbol(step.flag)}"
        if step.flag == "corr_type":
            growing = "As the correlation of x and y falls from 1 to 0,"
        unchanged = f" and stays in {step.unchanged}" if step.unchanged else ""
        sentences.append(
            f"{growing} the KL{latent} {step.direction} in {step.agreeing} of "
            f"{measurements.plural(step.total, 'step')}{unchanged}."
        )
    if not steps:
        return "There are too few settings for a step."
    agreeing = sum(step.agreeing for step in steps)
    total = sum(step.total for step in steps)
    return " ".join([yes_or_no(agreeing, total), *sentences])


def levels_in_use(commands):
    """How many units each level keeps, from the first value of the one flag to the last one."""
    [command] = exact(commands)
    [flag] = command.flags
    settings = command.by_setting()
    if not settings:
        return "All settings diverged."
    values = [value for (value,) in settings]
    first_row = next(iter(settings.values()))[0]

    sentences = []
    for level in measurements.levels_of_row(first_row):
        latent = f"z{level[1:]}"
        units = measurements.number_of_units(first_row, level)
        active = [measurements.seed_mean(rows, f"AU_kl{level}") for rows in settings.values()]
        if len(set(active)) == 1:
            sentences.append(
                f"{latent} keeps {active[0]:.3g} of {units} units at every {symbol(flag)}."
            )
        else:
            sentences.append(
                f"{latent} keeps {active[0]:.3g} of {units} units at {symbol(flag)} = {values[0]} "
                f"and {active[-1]:.3g} at {symbol(flag)} = {values[-1]}."
            )
    return " ".join(sentences)


def where_z2_is_empty(commands):
    """At which ratios of beta_2 to beta_1 all units of z2 are collapsed."""
    [command] = commands
    empty = []
    in_use = []
    for (beta_1, beta_2), rows in command.by_setting().items():
        active = measurements.seed_mean(rows, "AU_kl_2")
        if active == 0:
            empty.append(beta_2 / beta_1)
        else:
            in_use.append(beta_2 / beta_1)

    if not empty and not in_use:
        return "All settings diverged."
    counts = f"All units of z2 are collapsed in {len(empty)} of {len(empty) + len(in_use)} settings"
    if not empty or not in_use:
        return f"{counts}."
    if min(empty) > max(in_use):
        return (
            f"{counts}. In this grid, these are exactly the ones with β2 / β1 ≥ {min(empty):g}. "
            f"The others have β2 / β1 ≤ {max(in_use):g}."
        )
    return (
        f"{counts}. With β2 / β1 < {min(empty):g} some unit is always in use. With β2 / β1 > "
        f"{max(in_use):g} none is."
    )


def order_of_digits(commands):
    """How well the closed form orders the digits of each script by their KL."""
    parts = []
    for command in commands:
        correlations = measurements.rank_correlations([command])
        if correlations:
            parts.append(f"{correlations['kl']:.2f} ({command.script})")
    if not parts:
        return "There are too few digits for a rank correlation."
    return (
        "The order of the digits by their KL is predicted with a rank correlation of "
        f"{measurements.join_words(parts)}."
    )


def learnable_and_fixed(commands):
    """How many units stay active with a learnable encoder variance, and with a fixed one.

    The commands are pairs: a learnable variance, then a fixed one. The units are counted by their
    KL, and by the variance of their posterior means. A unit with a fixed variance has a KL even if
    it ignores x, unless the variance is the prior's.
    """
    pairs = finished_pairs(commands)
    if not pairs:
        return "No pair of models is finished."
    by_kl = sum(is_smaller_with_each_seed(*pair, "AU_kl") for pair in pairs)
    by_mean = sum(is_smaller_with_each_seed(*pair, "AU") for pair in pairs)
    answer = (
        f"In {by_kl} of {measurements.plural(len(pairs), 'pair')} of models, a learnable variance "
        "leaves fewer units active with each seed, counted by their KL. Counted by their posterior "
        f"means, it does so in {by_mean}."
    )

    details = []
    for learnable, fixed in pairs:
        kind = "ReLU" if "Relu" in learnable.script else "linear"
        row = learnable.rows[0]
        by_kl = [active_units(command, "AU_kl") for command in (learnable, fixed)]
        by_mean = [active_units(command, "AU") for command in (learnable, fixed)]
        details.append(
            f"The {kind} model with β = {row['beta']:g}: by their KL, {by_kl[0]} of {row['d_1']} "
            f"units are active with a learnable variance, and {by_kl[1]} with a fixed one. By "
            f"their posterior means, {by_mean[0]} and {by_mean[1]} are."
        )
    return with_details(answer, details)


def finished_pairs(commands):
    """The pairs of a command and the next one, without those in which one has no results."""
    pairs = []
    for first, second in zip(commands[0::2], commands[1::2]):
        if first.by_setting() and second.by_setting():
            pairs.append((first, second))
    return pairs


def active_units(command, metric):
    """The number of active units of a command's one setting as text, over its seeds."""
    rows = measurements.finished_rows(command.rows)
    return measurements.format_seeds([row[metric] for row in rows])


def is_smaller_with_each_seed(command, other, metric):
    """Whether a metric of a command is smaller than that of another one with each shared seed.

    Without a shared seed it is not.
    """
    rows, other_rows = measurements.rows_by_seed(command), measurements.rows_by_seed(other)
    seeds = measurements.shared_seeds([command, other])
    return bool(seeds) and all(rows[seed][metric] < other_rows[seed][metric] for seed in seeds)


def prediction(commands):
    """How well the closed form orders the KLs of the nonlinear models, script by script."""
    correlations = []
    for script, script_commands in measurements.by_script(commands).items():
        if "Linear" not in script:
            correlations += measurements.rank_correlations(script_commands).values()
    if not correlations:
        return "There are too few settings for a rank correlation."
    return (
        "It orders the KLs of the nonlinear models with rank correlations of "
        f"{min(correlations):.2f} to {max(correlations):.2f}."
    )


def order_of_collapse(commands):
    """How often the KL changes in the paper's direction, and how well its order is predicted."""
    sentences = []
    steps = [step for command in commands for step in measurements.steps_of(command)]
    if steps:
        agreeing = sum(step.agreeing for step in steps)
        unchanged = sum(step.unchanged for step in steps)
        total = measurements.plural(sum(step.total for step in steps), "step")
        remainder = f" and stays in {unchanged}" if unchanged else ""
        sentences.append(
            f"The KL changes in the paper's direction in {agreeing} of {total}{remainder}."
        )

    correlations = []
    for command in commands:
        correlations += measurements.rank_correlations([command]).values()
    if correlations:
        lowest, highest = f"{min(correlations):.2f}", f"{max(correlations):.2f}"
        values = f"is {lowest}" if lowest == highest else f"is {lowest} to {highest}"
        sentences.append(
            f"Within a sweep, the rank correlation of predicted and trained KL {values}."
        )
    return " ".join(sentences) or "There are too few settings for an order."


# ------------------------------------------------------------------------------------ linear models

def trained_as_predicted(commands):
    """How many trained linear models pass every check of their closed form."""
    agreeing, total = models_as_predicted(commands)
    return f"{yes_or_no(agreeing, total)} {models_in_words(commands)}"


def models_as_predicted(commands):
    """The number of models that pass every check of their closed form, and of all models."""
    rows = measurements.distinct_rows(commands)
    agreeing = [row for row in rows if row.get("verdict") == "as predicted"]
    return len(agreeing), len(rows)


def models_in_words(commands):
    """How many models pass every check, and how far the losses are from the optimum."""
    rows = measurements.distinct_rows(commands)
    agreeing, total = models_as_predicted(commands)
    sentences = [f"{agreeing} of {total} trained models pass every check of the closed form."]
    gaps = [row["gap"] for row in rows if "gap" in row]
    if gaps:
        sentences.append(f"The losses are at most {max(gaps):.1g} nats above the optimal ones.")
    diverged = total - len(measurements.finished_rows(rows))
    if diverged:
        sentences.append(f"{measurements.plural(diverged, 'model')} diverged.")
    return " ".join(sentences)


def theorems(commands):
    """How far brute force is from the theorems, and how many trained models agree with them."""
    brute_force = [command for command in commands if command.script.startswith("matrix")]
    trained = [command for command in commands if not command.script.startswith("matrix")]
    checks = measurements.distinct_rows(brute_force)
    verified = sum(row["verdict"] == "VERIFIED" for row in checks)
    agreeing, models = models_as_predicted(trained)

    sentences = [yes_or_no(verified + agreeing, len(checks) + models)]
    if checks:
        largest = max(row["max error"] for row in checks)
        sentences.append(
            f"Brute force agrees with the theorems in {verified} of "
            f"{measurements.plural(len(checks), 'run')}, with a largest error of {largest:.0e}."
        )
    if models:
        sentences.append(models_in_words(trained))
    return " ".join(sentences)


# ----------------------------------------------------------------------------------------- remedies

@dataclass
class Remedy:
    """A remedy against collapse.

    name   its name in the table
    flags  its flags; {start} is the model's start_flag, {quarter} about a quarter of the epochs
    """

    name: str
    flags: str


NO_REMEDY = "none"

REMEDIES = (
    Remedy(NO_REMEDY, "{start} 1.0"),
    Remedy("start", "{start} 0.1"),
    Remedy("warm-up", "{start} 1.0 --beta_warmup {quarter}"),
    Remedy("cycles", "{start} 1.0 --beta_cycles 4"),
    Remedy("free bits", "{start} 1.0 --free_bits 0.1"),
)


def remedy_cases(commands):
    """The rows of all settings: {(script, setting): {name of the remedy: {seed: row}}}.

    The commands are in the order of REMEDIES, model by model.
    """
    cases = {}
    for i, command in enumerate(commands):
        remedy = REMEDIES[i % len(REMEDIES)]
        for row in command.rows:
            if not measurements.is_finished(row):
                continue
            betas = []
            for name in ("beta", "beta_1", "beta_2"):
                if name in row:
                    betas.append(f"{name} = {row[name]}")
            case = cases.setdefault((command.script, ", ".join(betas)), {})
            case.setdefault(remedy.name, {})[row["seed"]] = row
    return cases


def headroom_of_row(row):
    """The headroom of the one level of a row that has one, in nats."""
    return row["headroom"] if "headroom" in row else row["headroom_2"]


def plain_objective(row):
    """The negative beta-ELBO on the test images at a row's betas, without a remedy, in nats."""
    reconstructions = 2 if row.get("released_objective", False) else 1
    kls = [row[f"beta{level}"] * row[f"kl{level}"] for level in measurements.levels_of_row(row)]
    return row["reconstruction"] * reconstructions + sum(kls)


def remedies(commands):
    """By how much each remedy changes the objective, where training collapsed units and elsewhere.

    A run is a setting with a seed.
    """
    cases = remedy_cases(commands)
    sentences = []
    for has_headroom, place in ((True, "Where training had collapsed units"), (False, "Elsewhere")):
        parts = []
        for remedy in REMEDIES:
            changes = objective_changes(cases, has_headroom, remedy.name)
            if changes:
                parts.append(f"{remedy.name} {np.mean(changes):+.2f}")
        if parts:
            sentences.append(
                f"{place}, the objective changes on average by these nats: "
                f"{measurements.join_words(parts)}."
            )
    return " ".join(sentences) or "No remedy can be compared yet."


def objective_changes(cases, has_headroom, name):
    """The changes of the plain test objective by the remedy of this name, in nats.

    The list has a number per setting and seed. A seed is left out where the setting has no finished
    run without a remedy, or where the headroom of that run is not as has_headroom asks.
    """
    changes = []
    for by_remedy in cases.values():
        without_remedy = by_remedy.get(NO_REMEDY, {})
        for seed, row in by_remedy.get(name, {}).items():
            before = without_remedy.get(seed)
            if name == NO_REMEDY or before is None:
                continue
            if (headroom_of_row(before) > theory.ACTIVE) == has_headroom:
                changes.append(plain_objective(row) - plain_objective(before))
    return changes


# -------------------------------------------------------------------------------------- deep models

def learned_levels(row):
    """The active units of each learned level of a deep model, the top level first.

    A context, which is the top level of the models that have one, is not learned.
    """
    counts = measurements.values_of_levels(row["AU_kl from the top"])
    return counts[1:] if "context_baseline" in row else counts


def deep_models(commands):
    """How many learned levels each deep model keeps in use, and which has the best log p(x)."""
    parts = []
    for command in commands:
        rows = measurements.finished_rows(command.rows)
        if not rows:
            continue
        counts = [learned_levels(row) for row in rows]
        in_use = [sum(count > 0 for count in level_counts) for level_counts in counts]
        parts.append(f"{command.script} {measurements.format_seeds(in_use)} of {len(counts[0])}")
    if not parts:
        return "All models diverged."
    sentences = [f"Learned levels in use: {measurements.join_words(parts)}."]
    best = best_model(commands)
    if best is not None:
        sentences.append(best_sentence(best))
        measured = models_with_log_px(commands)
        seeds = measurements.shared_seeds(measured)
        if measurements.only_seeds(seeds, measured):
            sentences.append(f"Only {measurements.seeds_as_text(seeds)} can be compared.")
    return " ".join(sentences)


def models_with_log_px(commands):
    """The commands of deep models that have a log p(x)."""
    measured = []
    for command in commands:
        rows = measurements.finished_rows(command.rows)
        if rows and all("log_px" in row for row in rows):
            measured.append(command)
    return measured


def best_model(commands):
    """The command of the deep model with the highest log p(x).

    Models are compared by the mean over the seeds that all of them have. None without a log p(x),
    and if the models have no seed in common.
    """
    measured = models_with_log_px(commands)
    seeds = measurements.shared_seeds(measured) if measured else []
    if not seeds:
        return None

    means = []
    for command in measured:
        rows = measurements.rows_by_seed(command)
        means.append(np.mean([rows[seed]["log_px"] for seed in seeds]))
    return measured[int(np.argmax(means))]


def best_sentence(best):
    """log p(x) of the best model over all of its seeds, in words."""
    rows = measurements.finished_rows(best.rows)
    nats = measurements.format_seeds([row["log_px"] for row in rows])
    return f"{best.script} has the highest log p(x), {nats} nats."


def converged_models(commands):
    """Which deep model is best, by how much, with how many units, and in which term of the ELBO.

    The models are compared with the first one that has not diverged.
    """
    finished = [command for command in commands if measurements.finished_rows(command.rows)]
    if not finished:
        return "All models diverged."
    sentences = []
    best = best_model(finished)
    if best is not None:
        sentences += [best_sentence(best), *margin_sentences(best, finished)]
    else:
        sentences.append("There is no log p(x) with the same seed to compare.")
    details = [units_sentence(finished), *rise_sentences(finished)]
    for command in finished[1:]:
        details += term_sentences(command, finished[0])
    return with_details(" ".join(sentences), details)


def margin_sentences(best, commands):
    """By how much log p(x) of the best model is above that of each other one: a list of sentences.

    It is empty without another model.
    """
    parts = []
    for command in commands:
        values = measurements.elbo_differences(best, command).get("log_px")
        if command is best or not values:
            continue
        seeds = measurements.shared_seeds([best, command])
        remark = measurements.only_seeds(seeds, [best, command])
        parts.append(f"{measurements.format_seeds(values)} nats above {command.script}{remark}")
    return [f"It is {measurements.join_words(parts)}."] if parts else []


def units_sentence(commands):
    """The number of active units of each deep model's learned levels, in words."""
    parts = []
    for command in commands:
        rows = measurements.finished_rows(command.rows)
        in_use = measurements.format_seeds([sum(learned_levels(row)) for row in rows])
        total = ""
        if "units from the top" in rows[0]:
            total = f" of {sum(measurements.values_of_levels(rows[0]['units from the top']))}"
        parts.append(f"{command.script} {in_use}{total}")
    return f"Learned units in use: {measurements.join_words(parts)}."


def rise_sentences(commands):
    """By how much the ELBO of the test images still rose at the end: a list of sentences.

    It is empty for models without a curve of that ELBO.
    """
    parts = []
    for command in commands:
        rows = measurements.finished_rows(command.rows)
        values = [
            row[measurements.RISE_AT_THE_END] for row in rows
            if measurements.RISE_AT_THE_END in row
        ]
        if values:
            parts.append(f"{measurements.format_change(values)} ({command.script})")
    if not parts:
        return []
    return [
        "Over the last ten epochs the ELBO of the test images still changes by these nats: "
        f"{measurements.join_words(parts)}."
    ]


def term_sentences(command, first):
    """In which term the ELBO of a deep model differs most from that of the first model.

    It is the term with the largest difference that has the sign of the ELBO's difference. Returns a
    list of sentences, which is empty if the models have no seed in common.
    """
    differences = measurements.elbo_differences(command, first)
    if not differences:
        return []
    total = np.mean(differences["elbo"])
    sign = 1 if total >= 0 else -1
    means = {name: sign * np.mean(differences[name]) for name in measurements.ELBO_TERMS}
    largest = max(means, key=means.get)
    size = measurements.format_seeds([sign * value for value in differences["elbo"]])
    seeds = measurements.shared_seeds([command, first])
    remark = measurements.only_seeds(seeds, [command, first])
    return [
        f"The ELBO of {command.script} is {size} nats {'higher' if sign > 0 else 'lower'} than "
        f"that of {first.script}{remark}, mostly because of the {largest} "
        f"({measurements.format_change(differences[largest])})."
    ]


def ablation(commands):
    """Which change of one part moves log p(x) most."""
    changes = {}
    for command in commands:
        settings = command.by_setting()
        if len(settings) == 2:
            (_, first_rows), (second, second_rows) = settings.items()
            before = {row["seed"]: row["log_px"] for row in first_rows}
            values = [
                row["log_px"] - before[row["seed"]] for row in second_rows if row["seed"] in before
            ]
            if values:
                changes[f"{command.script}, {command.label(second)}"] = values
    if not changes:
        return "There are too few settings to compare."
    name = max(changes, key=lambda name: abs(np.mean(changes[name])))
    change = measurements.format_change(changes[name])
    return f"The largest change of log p(x) is {change} nats ({name})."


def rates_above_delta(commands):
    """Whether each KL is at least the delta that the prior guarantees, for each seed."""
    bounded = []
    standard = []
    agreeing = 0
    for rows in measurements.distinct_settings(commands):
        kl = measurements.format_seeds([row["kl"] for row in rows])
        delta = rows[0]["smallest_rate"]
        if delta:
            bounded.append(f"{kl} nats for δ = {rows[0]['delta']:g}")
            agreeing += all(row["kl"] >= delta for row in rows)
        else:
            standard.append(f"{kl} nats")

    sentences = []
    if bounded:
        sentences.append(yes_or_no(agreeing, len(bounded)))
        sentences.append(f"The KL is {measurements.join_words(bounded)}.")
    if standard:
        sentences.append(f"With the standard prior it is {measurements.join_words(standard)}.")
    return " ".join(sentences) or "All models diverged."


# ----------------------------------------------------------------- causes and threshold of collapse

# What `deep_causes` says of each cause, see headroom.cause_of_collapse.
CAUSES_IN_WORDS = {
    "objective": "The objective collapsed units in {places}.",
    "training": "Training collapsed units in {places}.",
    "encoder": "Only a richer encoder could use the collapsed units in {places}.",
    "unstable": "Collapse is unstable in {places}.",
    "none": "All units are active in {places}.",
}


def deep_causes(commands):
    """What collapsed units of each model, with a sentence for each cause."""
    places = {cause: [] for cause in CAUSES_IN_WORDS}
    for command in commands:
        for values, rows in command.by_setting().items():
            parts = [*measurements.own_flags(command, commands), command.label(values)]
            distinction = ", ".join(part for part in parts if part)
            model = f"{command.script} ({distinction})" if distinction else command.script
            for cause, place in places_of_causes(model, rows).items():
                places[cause].append(place)

    sentences = []
    for cause, sentence in CAUSES_IN_WORDS.items():
        if places[cause]:
            sentences.append(sentence.format(places=measurements.join_words(places[cause])))
    return " ".join(sentences) or "No model has a verdict."


def places_of_causes(model, rows):
    """The levels that each cause has in one model: {cause: "levels 4 and 3 of MNIST_HVAE_DCT"}.

    rows has a row per seed. A level with a cause that only some seeds have is followed by their
    number.
    """
    causes_of_seeds = [measurements.causes_of_row(row) for row in rows]
    all_levels = list(causes_of_seeds[0])

    # 1. The numbers of the levels with each cause.
    numbers_by_cause = {}
    for level in all_levels:
        causes = [causes_of_seed[level] for causes_of_seed in causes_of_seeds]
        for cause in dict.fromkeys(causes):
            seeds = causes.count(cause)
            share = "" if seeds == len(rows) else f" ({seeds} of {len(rows)} seeds)"
            numbers_by_cause.setdefault(cause, []).append(level.removeprefix("_") + share)

    # 2. These levels in words. The only level of a one-level model has no number.
    places = {}
    for cause, numbers in numbers_by_cause.items():
        if all_levels == [""]:
            places[cause] = model + numbers[0]
        elif len(numbers) == 1:
            places[cause] = f"level {numbers[0]} of {model}"
        elif [f"_{number}" for number in numbers] == all_levels:
            places[cause] = f"all levels of {model}"
        else:
            places[cause] = f"levels {measurements.join_words(numbers)} of {model}"
    return places


@dataclass
class CollapseRange:
    """Where z of a model collapses as beta grows, over all seeds.

    z counts as collapsed if the KL of all units together is at most 0.01 nats. The units are not
    counted one by one. Near the threshold the model uses a single direction of z, which may be
    spread over several units, each with a smaller KL.

    last_in_use      the largest beta at which z of some seed is in use; None if there is none
    first_collapsed  the smallest beta above last_in_use, where z of every seed is collapsed; None
                     if there is none
    predicted        the beta from which on the theory says that collapse is stable
    """

    last_in_use: float | None
    first_collapsed: float | None
    predicted: float


def z_in_use(command):
    """Whether z is in use at each beta of a command that varies it: {beta: bool}."""
    is_in_use = {}
    for rows in command.by_setting().values():
        is_in_use[rows[0]["beta"]] = any(row["kl"] > theory.ACTIVE for row in rows)
    return is_in_use


def collapse_range(command):
    """The CollapseRange of a command that varies beta, or None if all its settings diverged."""
    is_in_use = z_in_use(command)
    if not is_in_use:
        return None

    last_in_use = max((beta for beta in is_in_use if is_in_use[beta]), default=None)
    above = [beta for beta in is_in_use if last_in_use is None or beta > last_in_use]
    return CollapseRange(
        last_in_use=last_in_use,
        first_collapsed=min(above, default=None),
        predicted=measurements.finished_rows(command.rows)[0]["collapse_threshold"],
    )


def collapse_ranges(commands):
    """Where training collapsed z, beside the predicted threshold."""
    ranges = []
    betas_in_use = []
    kinds_by_range = {}
    for command in commands:
        measured = collapse_range(command)
        if measured is not None:
            ranges.append(measured)
            betas_in_use.append({beta for beta, in_use in z_in_use(command).items() if in_use})
            kind = f"the {kind_of_start(command)}"
            kinds_by_range.setdefault(range_in_words(measured), []).append(kind)
    if not ranges:
        return "All models diverged."

    sentences = [f"Collapse is predicted to be stable from β = {ranges[0].predicted:.2f} on."]
    # The commands need not have the same values of beta.
    shared_betas = set.intersection(*betas_in_use)
    first_collapsed = [measured.first_collapsed for measured in ranges]
    if shared_betas and None not in first_collapsed:
        sentences.append(
            f"Each kind of model still uses z at β = {max(shared_betas):g}, and none does from β = "
            f"{max(first_collapsed):g} on."
        )
    details = []
    for words, kinds in kinds_by_range.items():
        details.append(f"The KL of {measurements.join_words(kinds)} is {words}.")
    return with_details(" ".join(sentences), details)


def kind_of_start(command):
    """The model of MNIST_VAE_Bernoulli.py, and from which side it comes to the threshold."""
    row = command.rows[0]
    model = "linear model" if row["linear"] else "ReLU model"
    start = "after a rise of β" if row["beta_warmup"] else "that starts next to collapse"
    return f"{model} {start}"


def range_in_words(measured):
    """A CollapseRange in words, with the differences from the predicted threshold in percent."""

    def beta_in_words(beta):
        percent = 100 * (beta / measured.predicted - 1)
        side = "above" if percent > 0 else "below"
        return f"β = {beta:g} ({abs(percent):.1f} % {side} the prediction)"

    parts = []
    if measured.last_in_use is not None:
        parts.append(
            f"last above {theory.ACTIVE:g} nats at {beta_in_words(measured.last_in_use)}"
        )
    if measured.first_collapsed is not None:
        smaller = "smaller" if parts else f"at most {theory.ACTIVE:g} nats"
        parts.append(f"{smaller} from {beta_in_words(measured.first_collapsed)} on")
    return measurements.join_words(parts)
