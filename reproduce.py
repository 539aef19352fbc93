"""Make the tables and figures of the published experiments, each from the scripts beside this one.

    python reproduce.py                                   # list them
    python reproduce.py table_cvae figure_cvae_beta
    python reproduce.py --all --seed 1,2,3
    torchrun --nproc_per_node=4 reproduce.py --all        # deal the commands over four processes

The experiments are those of Dang et al. (2024, arXiv 2306.05023) and some that go beyond the paper.
Where the authors' released code counts the reconstruction twice, both objectives are trained.

Each result goes to results/, as <name>.md and <name>.csv, and as <name>.png if it has a picture.
README.md in that folder is the page that shows all results, each with its part of comments.md.
Finished runs are reused, so that the same command goes on after a kill.

The file has these parts: the flags, the list of experiments, the sentences under a table, the runs,
the tables, the page, the progress, and main.
"""
import contextlib
import csv
import datetime
import importlib
import io
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np

import datasets
import figures
import files
import pictures
import processes
import report
import theory
import verify


# -------------------------------------------------------------------------------------------- flags

@dataclass
class Flags(common.BaseFlags):
    positional = "[name of a table or figure] ..."
    epilog = (
        "Without a name and without --all, the tables and figures are listed. Only --seed may be a "
        "list such as 1,2,3 or a range such as 1:3. The tables then show mean ± standard deviation "
        "over the seeds."
    )

    all: bool = common.flag(False, "make all tables and figures")
    num_epochs: int = common.flag(
        0,
        "passes over the training set; 0 for each script's own number",
        low=0,
    )
    seed: int = common.flag(0, "seed, or a list of seeds", low=0)
    device: str = common.flag("auto", "auto, cpu, cuda, cuda:1, ...", metavar="DEVICE")
    data_dir: str = common.flag("data", "folder of the data sets", metavar="FOLDER")
    out_dir: str = common.flag("runs", "folder for the runs of the scripts", metavar="FOLDER")
    results_dir: str = common.flag(
        "results",
        "folder for the tables and figures",
        metavar="FOLDER",
    )


# -------------------------------------------------------------------------------------- experiments

@dataclass
class Experiment:
    """One table or figure.

    question     what it answers
    commands     the command lines of the scripts whose results it shows
    picture      the function of pictures.py that draws it; None for a table
    sentences    the function that yields the sentences under its table; None for `directions`
    shows_table  whether the .md has a table with a row per setting; the .csv always has these rows
    """

    question: str
    commands: list
    picture: object = None
    sentences: object = None
    shows_table: bool = True


def both_objectives(command):
    """The command with the exact objective, and with the one of the authors' released code."""
    return [command, f"{command} --released_objective"]


CVAE_BETA = "MNIST_CVAE_Relu.py --eta_enc 1.0 --eta_dec 1.0 --beta 0.1,0.5,1.0,2.0"
CVAE_ETA = "MNIST_CVAE_Relu.py --eta_enc 1.0 --beta 1.0 --eta_dec 0.25,0.5,1.0,2.0"
CVAE_LINEAR = "MNIST_CVAE_Linear.py --beta 0.1:5.0:0.1"

HVAE_BETA_1 = "MNIST_HVAE_Relu.py --beta_1 0.25,0.5,1.0,2.0,3.0"
HVAE_BETA_2 = "MNIST_HVAE_Relu.py --beta_2 0.25,0.5,1.0,2.0,3.0"
HVAE_ETA = "MNIST_HVAE_Relu.py --eta_dec 0.25,0.5,0.7,1.0,2.0"
HVAE_LINEAR = "MNIST_HVAE_Linear_learnable_sigma_2.py --beta_2 0.1:7.0:0.1"

# A learnable and a fixed encoder variance, in turn.
VAES = [
    "MNIST_VAE_Linear_learnable_sigma.py --eta_dec 1.0 --c 1.0 --beta 1.0 --sigma 1.0",
    "MNIST_VAE_Linear_nonlearnable_sigma.py --eta_dec 1.0 --c 1.0 --beta 1.0 --sigma 1.0",
    "MNIST_VAE_Relu_learnable_sigma.py --eta_dec 1.0 --c 1.0 --beta 1.0 --sigma 0.5",
    "MNIST_VAE_Relu_nonlearnable_sigma.py --eta_dec 1.0 --c 1.0 --beta 1.0 --sigma 0.5",
]

LINEAR = [
    "MNIST_CVAE_Linear.py",
    "MNIST_HVAE_Linear_learnable_sigma_2.py --beta_1 1.0 --beta_2 1.0",
    "MNIST_HVAE_Linear_nonlearnable_sigma_2.py",
]

DIGITS = [
    "MNIST_CVAE_Linear_single_digit.py --digit 0:9",
    "MNIST_CVAE_Relu_single_digit.py --digit 0:9",
    "MNIST_CVAE_CNN_single_digit.py --digit 0:9",
]

CORRELATION = (
    "Synthetic_CVAE_Relu_correlation.py --corr_type "
    "Identical,Gaussian_noise_1_2,Gaussian_noise_1_4,Gaussian_noise_1_8,Random"
)

# Three models of about the same size, 88,000 to 104,000 parameters.
DEEP = [
    "MNIST_HVAE_Ladder.py --preset small",
    "MNIST_HVAE_DCT.py --preset small",
    "MNIST_HVAE_DVP.py --preset small",
]

ABLATIONS = [
    "MNIST_HVAE_Ladder.py --preset small --grad_clip 5,2717",
    "MNIST_HVAE_Ladder.py --preset small --linear_path true,false",
    "MNIST_HVAE_Ladder.py --preset small --num_ch 32 --d_hidden 16",
    "MNIST_HVAE_DCT.py --preset small --decoder state --grad_clip 5,543",
    "MNIST_HVAE_DCT.py --preset small --decoder state,aggregate",
    "MNIST_HVAE_DCT.py --preset small --decoder state --grad_clip 5 --step_variance learned,fixed",
]


@dataclass
class Remedy:
    """A remedy against collapse.

    name               its name in the table
    flags              its flags; {start} is the model's start_flag, {quarter} a quarter of the
                       epochs
    changes_objective  whether it minimises another objective instead of acting on training alone
    """

    name: str
    flags: str
    changes_objective: bool = False


NO_REMEDY = "none"

REMEDIES = (
    Remedy(NO_REMEDY, "{start} 1.0"),
    Remedy("start", "{start} 0.1"),
    Remedy("warm-up", "{start} 1.0 --beta_warmup {quarter}"),
    Remedy("cycles", "{start} 1.0 --beta_cycles 4"),
    Remedy("free bits", "{start} 1.0 --free_bits 0.1", changes_objective=True),
)


@dataclass
class RemediedModel:
    """A model that is trained with each of the REMEDIES.

    command     its command line without a remedy
    start_flag  the flag for the std of q at the start of training, as a share of the prior's
    num_epochs  passes over the training set
    """

    command: str
    start_flag: str
    num_epochs: int


REMEDIED_MODELS = (
    RemediedModel(
        "MNIST_CVAE_Relu.py --eta_enc 1.0 --eta_dec 1.0 --beta 1.0,2.0", "--start_std", 100
    ),
    RemediedModel("MNIST_HVAE_Relu.py --beta_1 1.0 --beta_2 1,2", "--start_std", 30),
    RemediedModel("MNIST_HVAE_Relu.py --beta_1 0.25", "--start_std", 30),
    RemediedModel("MNIST_VAE_Relu_learnable_sigma.py", "--sigma", 50),
)


def remedy_commands(models):
    """The command lines of models with all REMEDIES: those of the first model come first."""
    commands = []
    for model in models:
        for remedy in REMEDIES:
            flags = remedy.flags.format(start=model.start_flag, quarter=model.num_epochs // 4)
            commands.append(
                f"{model.command} {flags} --num_epochs {model.num_epochs} --num_samples 0"
            )
    return commands


def list_experiments():
    """All experiments in the order of the page: {name: Experiment}.

    This is a function, because the functions that yield the sentences are defined below.
    """
    return {
        "figure_cvae_beta": Experiment(
            "Does a heavier KL collapse more units of a CVAE?",
            both_objectives(CVAE_BETA),
            picture=figures.collapse_curves,
        ),
        "figure_cvae_eta": Experiment(
            "Does a noisier decoder collapse more units of a CVAE?",
            both_objectives(CVAE_ETA),
            picture=figures.collapse_curves,
        ),
        "table_cvae": Experiment(
            "What do beta and eta_dec do to a CVAE's log-likelihood, KL and active units?",
            both_objectives(CVAE_BETA) + both_objectives(CVAE_ETA),
        ),
        "figure_single_digit": Experiment(
            "Does the linear theory say, from a digit's images alone, how much z tells of it?",
            DIGITS[:2],
            picture=figures.per_digit,
        ),
        "figure_single_digit_cnn": Experiment(
            "The same with convolutions.",
            DIGITS[2:],
            picture=figures.per_digit,
        ),
        "figure_hvae_beta_1": Experiment(
            "What does beta_1 collapse, at which level?",
            both_objectives("MNIST_HVAE_Relu.py --beta_1 0.1,0.5,1.0,2.0"),
            picture=figures.collapse_curves,
        ),
        "figure_hvae_beta_2": Experiment(
            "What does beta_2 collapse, at which level?",
            both_objectives("MNIST_HVAE_Relu.py --beta_2 0.1,0.5,1.0,2.0"),
            picture=figures.collapse_curves,
        ),
        "figure_hvae_eta": Experiment(
            "What does eta_dec collapse, at which level?",
            both_objectives("MNIST_HVAE_Relu.py --eta_dec 0.25,0.5,1.0,2.0"),
            picture=figures.collapse_curves,
        ),
        "table_hvae": Experiment(
            "What do beta_1, beta_2 and eta_dec do to an HVAE's log-likelihood, KLs and active "
            "units?",
            [
                *both_objectives(HVAE_BETA_1),
                *both_objectives(HVAE_BETA_2),
                *both_objectives(HVAE_ETA),
            ],
        ),
        "figure_hvae_samples": Experiment(
            "Where over beta_1 and beta_2 does z2 still tell one digit from another?",
            ["MNIST_HVAE_Relu.py --beta_1 0.1,1,2,4,6 --beta_2 0.1,1,2,4,6 --num_samples 0"],
            picture=figures.of_the_grid("reconstructions_2.png"),
        ),
        "figure_hvae_cnn_samples": Experiment(
            "The same with convolutions.",
            ["MNIST_HVAE_CNN.py --beta_1 1,2,4,8,16 --beta_2 1,2,4,8,16 --num_samples 0"],
            picture=figures.of_the_grid("reconstructions_2.png"),
        ),
        "figure_vae_sigma": Experiment(
            "Does a learnable encoder variance collapse units that a fixed one keeps?",
            VAES,
            picture=figures.beside,
            sentences=learnable_and_fixed,
        ),
        "table_vae_sigma": Experiment(
            "What does a learnable encoder variance gain and lose?",
            VAES,
            sentences=learnable_and_fixed,
        ),
        "figure_cvae_linear": Experiment(
            "Do fifty linear CVAEs collapse where theorem 2 says?",
            [CVAE_LINEAR],
            picture=figures.of_the_grid("theory.png"),
        ),
        "figure_hvae_linear": Experiment(
            "Do seventy linear HVAEs collapse where theorem 3 says?",
            [HVAE_LINEAR],
            picture=figures.of_the_grid("theory.png"),
        ),
        "table_theorems": Experiment(
            "Are theorems 1, 2, 3 and 5 what brute force finds, and what training reaches?",
            [
                "matrix_VAE.py --learnable_sigma true,false",
                "matrix_CVAE.py",
                "matrix_HVAE_learnable_sigma_2.py",
                "matrix_HVAE_nonlearnable_sigma_2.py",
                *VAES[:2],
                *LINEAR,
            ],
        ),
        "table_remedies": Experiment(
            "Which remedy helps where training collapsed a level, and which where the objective "
            "did?",
            remedy_commands(REMEDIED_MODELS),
            sentences=remedies,
            shows_table=False,
        ),
        "table_correlation": Experiment(
            "The more x tells about y, the more units collapse?",
            both_objectives(CORRELATION),
        ),
        "table_deep": Experiment(
            "Ladder VAE, DCT-VAE and DVP-VAE of one size, after as many epochs: which levels stay "
            "in use?",
            [f"{command} --evaluate compression,attack" for command in DEEP],
            picture=figures.by_level,
            sentences=deep_models,
        ),
        "table_deep_ablation": Experiment(
            "What is each part of the Ladder and the DCT-VAE as published worth, at few epochs?",
            [f"{command} --num_epochs 4" for command in ABLATIONS],
        ),
        "figure_delta": Experiment(
            "Does a prior that no posterior can match keep the rate of a VAE with an "
            "autoregressive decoder above δ?",
            [
                "MNIST_VAE_Delta.py --preset small --prior standard",
                "MNIST_VAE_Delta.py --preset small --delta 2,5,10",
            ],
            picture=figures.rates,
            sentences=rates_above_delta,
        ),
        "figure_prediction": Experiment(
            "How far does the closed form, from the training data alone, tell the KL that is "
            "trained?",
            [
                CVAE_LINEAR,
                HVAE_LINEAR,
                *VAES,
                *LINEAR,
                *DIGITS,
                *both_objectives(CVAE_BETA),
                *both_objectives(CVAE_ETA),
                *both_objectives(CORRELATION),
                *both_objectives(HVAE_BETA_1),
                *both_objectives(HVAE_BETA_2),
                *both_objectives(HVAE_ETA),
            ],
            picture=figures.against_prediction,
            sentences=predictions,
            shows_table=False,
        ),
    }


# These pictures show all seeds. All others show the first seed.
PICTURES_OF_ALL_SEEDS = (figures.per_digit, figures.against_prediction)


# --------------------------------------------------------------------- the sentences under a table
#
# Each function takes the runs of an experiment and yields sentences, as Markdown paragraphs.

# What the paper says of each flag: as the flag grows, a metric falls or rises. The flag corr_type
# grows from Identical to Random. In two-level models it is z2 that collapses.
DIRECTIONS = {
    "beta": {"kl": "falls"},
    "eta_dec": {"kl": "falls", "kl_2": "falls"},
    "corr_type": {"kl": "rises"},
    "beta_1": {"kl_2": "rises"},
    "beta_2": {"kl_2": "falls"},
}

# Metrics that differ by less than this are equal as they are printed.
PRINTED_DIFFERENCE = 0.005


def directions(runs):
    """In how many steps along each flag a metric changes in the paper's direction.

    A step leads from one setting to the next, where all other flags are the same.
    """
    for run in runs:
        flags = run.varying_flags()
        metrics = metrics_by_setting(run, flags)
        for flag in flags:
            for metric, direction in DIRECTIONS.get(flag, {}).items():
                growths = growths_along(flag, flags, metric, metrics)
                sign = 1 if direction == "rises" else -1
                agreements = [growth for growth in growths if sign * growth > -PRINTED_DIFFERENCE]
                if growths:
                    yield (
                        f"Direction: along {flag}, {metric} {direction} or stays in "
                        f"{len(agreements)} of {len(growths)} steps (`{run.command}`)."
                    )


def metrics_by_setting(run, flags):
    """The metrics of a run's settings, without those that diverged.

    Returns {values of the flags: list of the metrics for each seed}.
    """
    metrics = {}
    for f, result in zip(run.settings, run.results):
        if result.metrics:
            setting = tuple(getattr(f, flag) for flag in flags)
            metrics.setdefault(setting, []).append(result.metrics)
    return metrics


def growths_along(flag, flags, metric, metrics):
    """By how much the mean of a metric over the seeds grows in each step along a flag.

    flags is {name: values in order}. metrics is the result of `metrics_by_setting`. There is no
    step to or from a setting that diverged.
    """
    position = list(flags).index(flag)
    values = flags[flag]
    growths = []
    for setting, metrics_of_seeds in metrics.items():
        index = values.index(setting[position]) + 1
        if index == len(values) or metric not in metrics_of_seeds[0]:
            continue
        next_setting = (*setting[:position], values[index], *setting[position + 1:])
        if next_setting in metrics:
            next_mean = seed_mean(metrics[next_setting], metric)
            growths.append(next_mean - seed_mean(metrics_of_seeds, metric))
    return growths


def seed_mean(metrics_of_seeds, name):
    """The mean of a metric over seeds, given the metrics {name: value} for each seed."""
    return np.mean([metrics[name] for metrics in metrics_of_seeds])


def learnable_and_fixed(runs):
    """How many units a learnable encoder variance keeps active, and how many a fixed one.

    The runs are pairs: a learnable variance, then a fixed one.
    """
    for learnable, fixed in zip(runs[0::2], runs[1::2]):
        yield (
            f"Direction: {learnable.script} keeps {active_units_of_seeds(learnable)} active units, "
            f"{fixed.script} {active_units_of_seeds(fixed)}."
        )


def active_units_of_seeds(run):
    """The number of active units for each seed, such as "5 / 5 / 4"."""
    counts = [str(result.metrics["AU_kl"]) for result in run.results if result.metrics]
    return " / ".join(counts)


def predictions(runs):
    """How the predictions of the closed form compare with the trained models of each script."""
    for script, results in figures.by_script(runs).items():
        if results[0].theory is not None:
            yield f"{script}: {unit_agreement_in_words(results)}"
        elif verify.can_be_ranked(results):
            yield (
                f"{script}: {len(results)} settings; rank correlation of predicted and trained "
                f"{verify.rank_correlations_in_words(results)}"
            )
        else:
            pairs = []
            for result in results:
                for metric, predicted, trained in verify.linear_pairs(result):
                    if metric.startswith("kl"):
                        pairs.append(f"{metric} predicted {predicted:.2f}, trained {trained:.2f}")
            yield f"{script}: {', '.join(pairs)}"


def unit_agreement_in_words(results):
    """In how many settings of a linear model every unit is active or collapsed as predicted."""
    wrong_settings = 0
    largest_distance = 0.0
    for result in results:
        distances = distances_of_misplaced_units(result)
        if distances:
            wrong_settings += 1
            largest_distance = max(largest_distance, *distances)

    words = (
        "every unit is active or collapsed as predicted in "
        f"{len(results) - wrong_settings} of {len(results)} settings"
    )
    if wrong_settings:
        words += (
            f", in {wrong_settings} but for one whose threshold is within "
            f"{largest_distance:.1%} of beta"
        )
    return words


def distances_of_misplaced_units(result):
    """How far beta is from the threshold of each unit that is not as active as predicted.

    The list has the distance as a share of beta, infinity where no threshold is predicted. In an
    HVAE beta is beta_2.
    """
    predicted = result.theory.predicted
    trained = result.theory.trained
    beta = result.settings["beta" if "beta" in result.settings else "beta_2"]

    distances = []
    for level in theory.levels_of(predicted):
        units = zip(
            predicted[f"information{level}"],
            trained[f"information{level}"],
            predicted[f"collapse{level}"],
        )
        for predicted_information, trained_information, threshold in units:
            if (predicted_information > 0) != (trained_information > theory.ACTIVE):
                distances.append(np.inf if threshold is None else abs(threshold / beta - 1))
    return distances


def rates_above_delta(runs):
    """Whether each KL is at least the δ that the AR(1) prior guarantees.

    The sentence also has the KL against the auxiliary prior, which is fitted to the posterior.
    """
    for run in runs:
        for f, result in zip(run.settings, run.results):
            if not result.metrics:
                continue
            kl = result.metrics["kl"]
            delta = result.metrics["smallest_rate"]
            auxiliary = result.metrics["rate_auxiliary"]
            bound = ""
            if delta:
                bound = f", {'at least' if kl >= delta else 'BELOW'} δ = {delta:g}"
            yield (
                f"Prior {f.prior}: a KL of {kl:.2f} nats{bound}; "
                f"against the auxiliary prior {auxiliary:.2f}."
            )


def deep_models(runs):
    """Which levels the deep models use, and how they compare."""
    yield from levels_in_use(runs)
    yield from comparisons_with_the_first(runs)


def levels_in_use(runs):
    """How many units of each model are active, and which of its levels are collapsed."""
    for run in runs:
        if not run.results[0].metrics:
            continue
        kl_of_levels = figures.units_by_level(run)
        units = sum(len(kl) for kl in kl_of_levels)
        active = [int((kl > theory.ACTIVE).sum()) for kl in kl_of_levels]
        collapsed = [str(level) for level, count in enumerate(active, start=1) if count == 0]

        if collapsed:
            levels = f"of {len(active)} levels collapsed: {', '.join(collapsed)}."
        else:
            levels = f"each of {len(active)} levels has some."
        yield (
            f"{run.script}: {sum(active)} of {units} units carry more than {theory.ACTIVE} nats; "
            f"{levels}"
        )


def comparisons_with_the_first(runs):
    """How far log p(x) and the ELBO of each model are above the first model's, and by which terms.

    All numbers are means over the seeds.
    """
    means = {}
    for run in runs:
        finished = [result.metrics for result in run.results if result.metrics]
        if finished:
            means[run.script] = {name: seed_mean(finished, name) for name in finished[0]}

    for script in list(means)[1:]:
        first_script = next(iter(means))
        first = means[first_script]
        model = means[script]
        log_px = ""
        if "log_px" in model:
            log_px = f"log p(x) {model['log_px'] - first['log_px']:+.2f} nats, "
        terms = []
        for name, nats in elbo_differences(model, first).items():
            terms.append(f"{name} {nats:+.2f}")
        yield (
            f"{script} beside {first_script}: {log_px}"
            f"ELBO {model['elbo'] - first['elbo']:+.2f} nats, of which {', '.join(terms)}."
        )


def elbo_differences(model, first):
    """The difference of two models' ELBOs, term by term, in nats: {name: model minus first}.

    Both arguments are metrics {name: value}. The KL of a context, which is the top level of a model
    that has one, is a term of its own.
    """
    context = 0.0
    if "context_baseline" in model:
        numbers = [int(level[1:]) for level in common.levels(model) if level]
        context = model[f"kl_{max(numbers)}"]

    differences = {
        "reconstruction": first["reconstruction"] - model["reconstruction"],
        "learned latents": first["kl"] - (model["kl"] - context),
    }
    if context:
        differences["context"] = -context
    return differences


def causes_of_collapse(runs):
    """How many levels have collapsed units, because of the objective and because of training.

    The levels are those that have a headroom, of all settings and seeds.
    """
    levels = []
    for run in runs:
        for result in run.results:
            if result.headroom:
                levels.extend(result.headroom.values())
    if not levels:
        return

    collapsed = sum(level.collapsed > 0 for level in levels)
    by_training = [level.headroom for level in levels if level.headroom > theory.ACTIVE]
    sizes = "."
    if by_training:
        sizes = f", whose headroom is {min(by_training):.2g} to {max(by_training):.2g} nats."
    yield (
        f"Collapse: of {len(levels)} levels {collapsed} have collapsed units: "
        f"{collapsed - len(by_training)} by the objective, {len(by_training)} by training{sizes}"
    )


def remedies(runs):
    """A table with a row per setting and remedy, then how the remedies changed the objective.

    The runs are those of `remedy_commands`.
    """
    cases = remedy_cases(runs)
    yield remedy_table(cases)
    yield from remedy_effects(cases)


def remedy_cases(runs):
    """The columns of `remedy_columns` for all settings that did not diverge.

    Returns {(script, setting): {name of the remedy: {seed: columns}}}.
    """
    cases = {}
    for i, run in enumerate(runs):
        remedy = REMEDIES[i % len(REMEDIES)]
        for f, result in zip(run.settings, run.results):
            if not result.metrics:
                continue
            betas = []
            for name, value in result.settings.items():
                if name in ("beta", "beta_1", "beta_2"):
                    betas.append(f"{name} = {value}")
            case = cases.setdefault((run.script, ", ".join(betas)), {})
            case.setdefault(remedy.name, {})[f.seed] = remedy_columns(result)
    return cases


def remedy_columns(result):
    """The numbers of one result in the table of remedies, {column: value}."""
    [(latent, level)] = result.headroom.items()
    last_epoch = {name: curve[-1] for name, curve in result.curves.items()}
    dead = sum(dead for dead, _ in result.dead_units.values())
    return {
        "objective, training": plain_objective(result.settings, last_epoch),
        "test": plain_objective(result.settings, result.metrics),
        "KL": result.metrics["kl_2" if latent == "z2" else "kl"],
        "active units": float(level.units - level.collapsed),
        "headroom": level.headroom,
        "dead ReLU units": float(dead),
    }


def plain_objective(settings, terms):
    """The negative beta-ELBO in nats at a setting's betas, without the changes of a remedy.

    terms has the means of the ELBO's terms, {name: nats}.
    """
    reconstructions = 2 if settings["released_objective"] else 1
    kls = [settings[f"beta{level}"] * terms[f"kl{level}"] for level in common.levels(terms)]
    return terms["reconstruction"] * reconstructions + sum(kls)


def remedy_table(cases):
    """The table of `remedy_cases` in Markdown, with mean ± standard deviation over the seeds."""
    columns = [
        "objective, training",
        "test",
        "KL",
        "active units",
        "headroom",
        "dead ReLU units",
    ]
    header = ["script", "setting", "remedy", *columns]
    rows = [header, ["---"] * len(header)]
    for (script, setting), by_remedy in cases.items():
        for remedy, by_seed in by_remedy.items():
            cells = []
            for column in columns:
                cells.append(format_cell(column, [values[column] for values in by_seed.values()]))
            rows.append([script, setting, remedy, *cells])
    return "\n".join(markdown_row(row) for row in rows)


def remedy_effects(cases):
    """How the remedies changed the plain objective of the training images, on average.

    Remedies that act on training alone are apart from those that change the objective, and settings
    with a headroom are apart from those without one.
    """
    for changes_objective in (False, True):
        for has_headroom in (True, False):
            changes = objective_changes(cases, changes_objective, has_headroom)
            if not changes:
                continue
            remedy = "free bits" if changes_objective else "a remedy that acts on training alone"
            lowered = sum(change < -theory.ACTIVE for change in changes)
            yield (
                f"Where headroom was {'above' if has_headroom else 'at most'} {theory.ACTIVE} nats "
                f"without a remedy, {remedy} lowered the plain objective of the training images by "
                f"more than {theory.ACTIVE} nats in {lowered} of {len(changes)} cases (a setting, "
                f"a seed and a remedy each), and changed it by {np.mean(changes):+.3f} nats on "
                "average."
            )


def objective_changes(cases, changes_objective, has_headroom):
    """The changes of the plain training objective by remedies of one kind, in nats.

    The list has a number per setting, seed and remedy. A seed is left out where the setting has no
    finished run without a remedy, or where the headroom of that run is not as has_headroom asks.
    """
    changes = []
    for by_remedy in cases.values():
        without_remedy = by_remedy.get(NO_REMEDY, {})
        for remedy in REMEDIES:
            if remedy.name == NO_REMEDY or remedy.changes_objective != changes_objective:
                continue
            for seed, columns in by_remedy.get(remedy.name, {}).items():
                if seed not in without_remedy:
                    continue
                before = without_remedy[seed]
                if (before["headroom"] > theory.ACTIVE) == has_headroom:
                    changes.append(columns["objective, training"] - before["objective, training"])
    return changes


EXPERIMENTS = list_experiments()


# --------------------------------------------------------------------------------------------- runs

@dataclass
class TheoremResult:
    """The part that tables need of result.json of a matrix script, which checks a theorem.

    settings    the flags that determine the result, {name: value}
    dataset     "synthetic"
    device      name of the device on which the result was computed
    versions    of python, torch and numpy
    seconds     {"minimise": seconds}
    max_error   largest difference between the minimum that was found and the theorem
    theory      the minimum that was found compared with the theorem

    Where code treats all results alike, this class has the attributes of a report.RunResult, too.
    A matrix script trains no network, so it has no metrics and no headroom.
    """

    settings: dict
    dataset: str
    device: str
    versions: dict
    seconds: dict
    max_error: float
    theory: verify.Comparison

    side_by_side = 1
    metrics = None
    headroom = None

    @classmethod
    def read(cls, f):
        """The result of this very setting, or None if its file is missing or not whole."""
        saved = files.read_matching(f, None, "result.json")
        if saved is None:
            return None
        try:
            return cls(
                settings=saved["settings"],
                dataset=saved["dataset"],
                device=saved["device"],
                versions=saved["versions"],
                seconds=saved["seconds"],
                max_error=saved["max_error"],
                theory=verify.Comparison(**saved["theory"]),
            )
        except (KeyError, TypeError) as error:
            path = files.run_dir(f, None) / "result.json"
            print(f"{path} is not whole: made again ({error!r})", file=sys.stderr)
            return None


class Run:
    """One command line of an experiment, with the flags of this program that it takes.

    command   the command line as the experiment has it
    script    the script's name, without .py
    module    the imported script
    argv      the arguments of the script's main
    settings  the settings that the command line stands for
    data      a datasets.Data with the name of the data set of the results; None for matrix scripts
    results   the results of the finished settings: report.RunResult, TheoremResult for matrix
              scripts
    """

    def __init__(self, command, f, seeds):
        script, *argv = shlex.split(command)
        self.command = command
        self.script = script.removesuffix(".py")
        self.module = importlib.import_module(self.script)
        self.argv = argv + self._passed_flags(argv, f, seeds)
        self.settings = common.parse_flags(self.module.Flags, self.argv)
        self.read()

    @property
    def checks_theorem(self):
        """Whether this is a matrix script, which checks a theorem and trains no network."""
        return self.script.startswith("matrix")

    def _passed_flags(self, argv, f, seeds):
        """The flags of this program that the script has, too, as words of its command line."""
        values = {"seed": ",".join(str(seed) for seed in seeds)}
        # The matrices are too small for a GPU, so their scripts keep their own default device.
        if not self.checks_theorem:
            values["device"] = f.device
        values["data_dir"] = f.data_dir
        values["out_dir"] = f.out_dir
        if f.num_epochs:
            values["num_epochs"] = f.num_epochs
            # A warm-up takes the same share of the epochs as in REMEDIES.
            if "--beta_warmup" in argv:
                values["beta_warmup"] = f.num_epochs / 4

        known = common.all_flags(self.module.Flags)
        words = []
        for name, value in values.items():
            if name in known:
                words += [f"--{name}", str(value)]
        return words

    def read(self):
        """Read the results of the settings that are finished.

        The scripts themselves choose between MNIST and the embedded digits. So the results are read
        from the runs on that data set with more finished settings.
        """
        if self.checks_theorem:
            self.data = None
            results = [TheoremResult.read(f) for f in self.settings]
            self.results = [result for result in results if result is not None]
            return

        names = ["mnist", "digits"] if hasattr(self.settings[0], "dataset") else ["synthetic"]
        self.data = datasets.Data(names[0], None, None)
        self.results = []
        for name in names:
            data = datasets.Data(name, None, None)
            results = [report.RunResult.read(f, data) for f in self.settings]
            finished = [result for result in results if result is not None]
            if len(finished) > len(self.results):
                self.data = data
                self.results = finished

    def make(self):
        """Run the script's main, which skips finished settings, and read the results.

        Returns the script's exit status: 0, or 1 if a setting diverged or a theorem failed.
        """
        status = self.module.main(self.argv)
        self.read()
        return status

    def varying_flags(self):
        """The flags that differ between the settings, except for the seed: {name: values}."""
        return files.varying_flags(self.settings, [self.data] * len(self.settings))

    def setting_label(self, f):
        """The varying flags of a setting as text, such as "beta = 0.1"; "" if there are none."""
        return ", ".join(f"{name} = {getattr(f, name)}" for name in self.varying_flags())

    def setting_labels(self):
        """The varying flags of each setting of the first seed: a list of {name: value}."""
        labels = []
        for i in self.first_seed_indices():
            f = self.settings[i]
            labels.append({name: getattr(f, name) for name in self.varying_flags()})
        return labels

    def first_seed_indices(self):
        """The indices of the settings with the first seed."""
        first_seed = self.settings[0].seed
        return [i for i, f in enumerate(self.settings) if f.seed == first_seed]

    def units(self, i):
        """The values per test example of setting i, {name: array}, see report.evaluate."""
        return report.read_examples(files.run_dir(self.settings[i], self.data))

    def grid_dir(self):
        """The folder of the pictures that the script itself draws of its grid."""
        return pictures.grid_dir(self.settings, [self.data] * len(self.settings))

    def objective_name(self):
        """Which objective is trained, for the title of a picture."""
        if getattr(self.settings[0], "released_objective", False):
            return "objective counted as released"
        return "exact objective"


def seconds_of_work(result):
    """The seconds that a result took.

    Settings that were trained side by side each count for an equal share of the training.
    """
    total = 0
    for name, seconds in result.seconds.items():
        total += seconds / result.side_by_side if name == "train" else seconds
    return total


def in_minutes(seconds):
    """A time as text, such as "45 min"."""
    return f"{seconds / 60:.0f} min"


# ------------------------------------------------------------------------------------------- tables

# The columns whose numbers need another format than two decimals.
NUMBER_FORMATS = {
    "max error": "{:.1e}",
    "gap": "{:.1e}",
    "singular values off": "{:.2%}",
    "headroom": "{:.3f}",
    "headroom_2": "{:.3f}",
    "objective, training": "{:.3f}",
    "test": "{:.3f}",
}


@dataclass
class Table:
    """A table of results, with the command lines that made them.

    commands  the command lines
    header    the name of each column
    rows      the text of each cell, row by row
    notes     sentences directly under the table
    """

    commands: list
    header: list
    rows: list
    notes: list

    def paragraphs(self):
        """The table as Markdown paragraphs: its commands, the table itself, its notes."""
        lines = [markdown_row(self.header), "|" + "---|" * len(self.header)]
        for row in self.rows:
            lines.append(markdown_row(row))
        commands = [f"`{command}`" for command in self.commands]
        return [*commands, "\n".join(lines), *self.notes]


def markdown_row(cells):
    """One row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def make_tables(runs):
    """The tables of an experiment.

    A command with several settings has a table of its own. Commands with one setting each share a
    table while their columns are the same.
    """
    tables = []
    for run in runs:
        table = table_of_run(run)
        previous = tables[-1] if tables else None
        if previous and table.header[0] == "script" and table.header == previous.header:
            previous.commands += table.commands
            previous.rows += table.rows
            previous.notes += table.notes
        else:
            tables.append(table)
    return tables


def table_of_run(run):
    """The table of one run: a row per setting, with mean ± standard deviation over the seeds."""
    by_setting = {}
    for f, result in zip(run.settings, run.results):
        label = run.setting_label(f) or run.script
        values = result_columns(result)
        repeats = by_setting.setdefault(label, [])
        # A seed that diverged has no values.
        if values:
            repeats.append(values)

    columns = ["metrics"]
    for repeats in by_setting.values():
        if repeats:
            columns = list(repeats[0])
            break

    rows = []
    for label, repeats in by_setting.items():
        cells = ["diverged"] * len(columns)
        if repeats:
            cells = []
            for column in columns:
                cells.append(format_cell(column, [values[column] for values in repeats]))
        rows.append([label, *cells])

    first_column = "script" if run.script in by_setting else "setting"
    return Table(
        commands=[run.command],
        header=[first_column, *columns],
        rows=rows,
        notes=rank_correlation_notes(run),
    )


def rank_correlation_notes(run):
    """A sentence with the rank correlation of prediction and training, if it can be computed."""
    results = [result for result in run.results if verify.closed_form(result)]
    if not verify.can_be_ranked(results):
        return []
    return [
        "Rank correlation of what the closed form of the linear model predicts and what was "
        f"trained: {verify.rank_correlations_in_words(results)} (`{run.command}`)."
    ]


def result_columns(result):
    """The values of one result in tables, {column: number or text}; {} if the setting diverged."""
    if isinstance(result, TheoremResult):
        verified = result.max_error <= verify.TOLERANCE
        return {
            "max error": result.max_error,
            "gap": result.theory.gap,
            "verdict": "VERIFIED" if verified else "FAILED",
        }
    if not result.metrics:
        return {}

    columns = dict(result.metrics)
    levels = [level for level in common.levels(columns) if level]
    if len(levels) > report.MANY_LEVELS:
        columns = join_levels(columns, levels)
        columns["parameters"] = result.parameters
    if result.theory is not None:
        columns |= comparison_columns(result.theory)
    elif result.linear:
        for metric, predicted, _ in verify.linear_pairs(result):
            # The same units are predicted active for AU and AU_kl.
            if not metric.startswith("AU_kl"):
                columns[f"linear {metric}"] = predicted
    return columns


def join_levels(columns, levels):
    """The columns of a model with many levels: one for all KLs and one for all active units.

    The other columns of single levels are left out. Every model has the columns about a context, so
    that models with and without one can share a table.
    """
    joined = dict(columns)
    from_the_top = levels[::-1]
    for kind in ("kl", "AU", "AU_kl", "active_share"):
        values = [joined.pop(f"{kind}{level}") for level in from_the_top]
        if kind in ("kl", "AU_kl"):
            texts = [common.format_metric(value) for value in values]
            joined[f"{kind} from the top"] = ", ".join(texts)

    for name in ("context_baseline", "error_context"):
        joined[name] = joined.pop(name, "")
    return joined


def comparison_columns(comparison):
    """How a trained linear model compares with its closed form, {column: number or text}."""
    predicted = comparison.active_units()
    trained = comparison.active_units("trained")
    active = [f"{predicted[level]} ({trained[level]})" for level in predicted]
    return {
        "active predicted (trained)": ", ".join(active),
        "singular values off": comparison.singular_value_error(),
        "gap": comparison.gap,
        "verdict": "; ".join(comparison.disagreements()) or "as predicted",
    }


def format_cell(column, values):
    """The values of several seeds as the text of one cell.

    Numbers become mean ± standard deviation. Different texts are joined by "/".
    """
    if isinstance(values[0], str):
        return " / ".join(dict.fromkeys(values))
    if column.startswith("linear "):
        # The prediction of the linear model does not depend on the seed.
        values = values[:1]
    return common.format_repeats(values, NUMBER_FORMATS.get(column, "{:.2f}"))


def csv_text(runs):
    """The .csv of an experiment: a row per setting and seed, with all digits of each number."""
    rows = []
    for run in runs:
        for result in run.results:
            rows.append({
                "command": run.command,
                "dataset": result.dataset,
                "device": result.device,
                "torch": result.versions["torch"],
                "seconds": seconds_of_work(result),
                **result.settings,
                **result_columns(result),
            })

    # A column that a row lacks stays empty there.
    columns = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ----------------------------------------------------------------------------------------- the page

# README.md shows the tables of a result if they have at most this number of rows together.
MOST_ROWS = 12


@dataclass
class Section:
    """One result as text. <name>.md has all of it, README.md leaves out long tables.

    name        name of the experiment
    question    what it answers
    provenance  data set, device, versions, epochs, seeds, time and date of the results
    paragraphs  the rest in Markdown: the picture, the tables with their commands, the sentences
    """

    name: str
    question: str
    provenance: str
    paragraphs: list

    def markdown(self):
        """The text of <name>.md. `read` relies on the blank lines between its paragraphs."""
        paragraphs = [f"# {self.name}", self.question, self.provenance, *self.paragraphs]
        return "\n\n".join(paragraphs) + "\n"

    @classmethod
    def read(cls, path):
        """The section in <name>.md, or None if the file is missing or not whole."""
        try:
            text = Path(path).read_text(encoding="utf-8")
            heading, question, provenance, *paragraphs = text.strip().split("\n\n")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            print(f"{path} is not whole: left out of the page ({error})", file=sys.stderr)
            return None
        return cls(heading.removeprefix("# "), question, provenance, paragraphs)

    def page_markdown(self):
        """The section as README.md has it."""
        # A table starts with "|". The line of a command starts with a backtick.
        tables = [paragraph for paragraph in self.paragraphs if paragraph.startswith(("|", "`"))]
        rows = sum(paragraph.count("\n| ") for paragraph in tables)
        paragraphs = self.paragraphs
        if rows > MOST_ROWS:
            paragraphs = [paragraph for paragraph in paragraphs if paragraph not in tables]

        links = f"Table: [.md]({self.name}.md), [.csv]({self.name}.csv)"
        introduction = f"*{self.question}* {self.provenance}. {links}"
        return "\n\n".join([f"## {self.name}", introduction, *paragraphs])


def make_section(name, experiment, runs):
    """The section of an experiment whose runs are finished."""
    seeds = {f.seed for run in runs for f in run.settings}
    paragraphs = []
    if experiment.picture:
        paragraphs.append(f"![{experiment.question}]({name}.png)")
        if len(seeds) > 1 and experiment.picture not in PICTURES_OF_ALL_SEEDS:
            paragraphs.append(f"*The picture is of seed {runs[0].settings[0].seed}.*")

    if experiment.shows_table:
        for table in make_tables(runs):
            paragraphs += table.paragraphs()

    sentences = experiment.sentences or directions
    paragraphs += sentences(runs)
    paragraphs += causes_of_collapse(runs)
    return Section(name, experiment.question, provenance(runs), paragraphs)


def provenance(runs):
    """Data sets, device, versions, epochs, seeds, time and date of the results, in one line."""
    results = [result for run in runs for result in run.results]
    settings = [f for run in runs for f in run.settings]

    dataset_names = dict.fromkeys(result.dataset for result in results)
    seeds = sorted({f.seed for f in settings})
    # Matrix scripts have no epochs.
    epochs = sorted({f.num_epochs for f in settings if hasattr(f, "num_epochs")})
    versions = results[0].versions
    parts = [
        ", ".join(dataset_names),
        results[0].device,
        f"python {versions['python']}, torch {versions['torch']}",
        f"epochs {', '.join(str(number) for number in epochs) or '-'}",
        f"seed {', '.join(str(seed) for seed in seeds)}",
        in_minutes(sum(seconds_of_work(result) for result in results)),
        str(datetime.date.today()),
        "nats per test example",
    ]
    return "; ".join(parts)


def write_page(folder, sections):
    """Write README.md of a folder, from the results there and comments.md.

    The page opens with the part of comments.md before its first heading. After each result comes
    the comment under a heading with its name. The other comments close the page.

    sections {name: Section} are those at hand. The others are read from <name>.md.
    """
    introduction, comments = read_comments(Path(folder, "comments.md"))
    paragraphs = [introduction]
    for name in EXPERIMENTS:
        comment = comments.pop(name, "").strip()
        section = sections.get(name) or Section.read(Path(folder, f"{name}.md"))
        if section is not None:
            paragraphs.append(section.page_markdown())
            if comment:
                paragraphs.append(comment)

    for name, comment in comments.items():
        paragraphs.append(f"## {name}\n{comment.rstrip()}")
    files.write_text(Path(folder, "README.md"), "\n\n".join(paragraphs) + "\n")


def read_comments(path):
    """The text before the first "## " heading of comments.md, and that under each heading.

    Returns (introduction, {heading: text}). Without the file the introduction is a title.
    """
    if not path.exists():
        return "# Results", {}
    introduction = []
    comments = {}
    part = introduction
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.startswith("## "):
            part = []
            comments[line.removeprefix("## ")] = part
        else:
            part.append(line)
    texts = {heading: "\n".join(lines) for heading, lines in comments.items()}
    return "\n".join(introduction).strip(), texts


# ----------------------------------------------------------------------------------------- progress

def recorded_times(folder, name):
    """The rows of <name>.csv in a folder, each (command, device, seconds); [] without that file."""
    try:
        with open(Path(folder, f"{name}.csv"), newline="", encoding="utf-8") as file:
            rows = []
            for row in csv.DictReader(file):
                rows.append((row["command"], row["device"], float(row["seconds"])))
            return rows
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        # Without a whole table nothing is known about the time, which is only an estimate.
        return []


def expected_seconds(folder, runs):
    """The seconds that the unfinished settings of each run may take, from the tables in a folder.

    A command that is in no table counts with the mean over all commands.
    """
    seconds_by_command = {}
    for name in EXPERIMENTS:
        for command, _, seconds in recorded_times(folder, name):
            seconds_by_command.setdefault(command, []).append(seconds)
    means = {command: np.mean(seconds) for command, seconds in seconds_by_command.items()}
    default = np.mean([60.0, *means.values()])

    costs = []
    for run in runs:
        unfinished = len(run.settings) - len(run.results)
        costs.append(unfinished * means.get(run.command, default))
    return costs


def deal(costs, count):
    """Deal the runs with these costs over `count` processes: a list of indices for each process.

    The most expensive run comes first. Each goes to the process with the least work so far.
    """
    shares = [[] for _ in range(count)]
    work = [0.0] * count
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = work.index(min(work))
        shares[least].append(i)
        # A finished run costs one second, since its script still looks at it.
        work[least] += costs[i] + 1
    return shares


class CommandProgress:
    """A line on stderr before each command.

    It has the command's number, the time so far, and the time left, given how the commands so far
    compare with their expected costs.
    """

    def __init__(self, costs):
        """costs has the seconds that each command is expected to take, in their order."""
        rank, count = processes.rank_and_count()
        self.prefix = f"process {rank}: " if count > 1 else ""
        self.costs = costs
        self.start = time.monotonic()
        self.done = 0

    def make(self, run):
        """Announce the next run and make it. Returns its exit status."""
        elapsed = time.monotonic() - self.start
        expected = sum(self.costs[:self.done])
        slowness = elapsed / expected if expected else 1.0
        left = sum(self.costs[self.done:]) * slowness
        self.done += 1
        print(
            f"{self.prefix}command {self.done} of {len(self.costs)}, "
            f"{datetime.timedelta(seconds=round(elapsed))}, "
            f"about {datetime.timedelta(seconds=round(left))} left: python {run.command}",
            file=sys.stderr,
            flush=True,
        )
        # The script of one command must not wait for the processes that make other commands.
        with processes.alone():
            return run.make()


# --------------------------------------------------------------------------------------------- main

def parse_command_line(argv):
    """The flags, the seeds, and the names of the experiments to make; no name for the list.

    Ends the program with one line if anything is wrong with them.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    names = []
    while words and not words[0].startswith("-"):
        names.append(words.pop(0))

    settings = common.parse_flags(Flags, words)
    f = settings[0]
    seeds = list(dict.fromkeys(setting.seed for setting in settings))
    if len(seeds) < len(settings):
        common.stop(f, "only --seed may be a list")
    for name in names:
        if name not in EXPERIMENTS:
            common.stop(
                f,
                f"{name!r}: no such table or figure, wants some of {', '.join(EXPERIMENTS)}",
            )
    if f.all:
        names = list(EXPERIMENTS)
    if names:
        check_results_dir(f)
    return f, seeds, names


def check_results_dir(f):
    """End the program with one line if --results_dir cannot be written or made."""
    existing = Path(f.results_dir).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        common.stop(f, f"--results_dir: got {f.results_dir!r}, wants a folder that can be written")


def print_list(f, seeds):
    """Print all experiments, how many of their settings are finished, and their commands.

    The times are those of the finished settings, and those of the table in --results_dir.
    """
    for name, experiment in EXPERIMENTS.items():
        runs = [Run(command, f, seeds) for command in experiment.commands]
        results = [result for run in runs for result in run.results]
        settings = sum(len(run.settings) for run in runs)

        line = f"    {len(results)} of {settings} settings finished"
        if results:
            seconds = sum(seconds_of_work(result) for result in results)
            line += f", which took {in_minutes(seconds)}"
        recorded = recorded_times(f.results_dir, name)
        if recorded:
            seconds = sum(seconds for _, _, seconds in recorded)
            _, device, _ = recorded[0]
            line += (
                f"; {Path(f.results_dir, name)}: {len(recorded)} settings in "
                f"{in_minutes(seconds)} on {device}"
            )

        print(f"{name}: {experiment.question}")
        print(line)
        for command in experiment.commands:
            print(f"    python {command}")


def make_own_share(runs, costs):
    """Make the runs that are dealt to this process, then wait for the other processes."""
    rank, count = processes.rank_and_count()
    own = deal(costs, count)[rank]
    progress = CommandProgress([costs[i] for i in own])
    # Process 0 prints the tables afterwards, when it goes through all runs.
    with contextlib.redirect_stdout(io.StringIO()):
        for i in own:
            progress.make(runs[i])
    processes.barrier()


def write_result(folder, name, runs, sections):
    """Write the files of an experiment whose runs are finished, and the page.

    The section of the experiment is added to sections {name: Section}.
    """
    experiment = EXPERIMENTS[name]
    section = make_section(name, experiment, runs)
    if experiment.picture:
        experiment.picture(Path(folder, f"{name}.png"), runs)
    files.write_text(Path(folder, f"{name}.csv"), csv_text(runs))
    files.write_text(Path(folder, f"{name}.md"), section.markdown())

    sections[name] = section
    write_page(folder, sections)
    print(f"made: {Path(folder, name)}.md", file=sys.stderr)


def main(argv=None):
    f, seeds, names = parse_command_line(argv)
    if not names:
        print_list(f, seeds)
        return 0

    # 1. What there is to do.
    runs_by_name = {}
    for name in names:
        runs_by_name[name] = [Run(command, f, seeds) for command in EXPERIMENTS[name].commands]
    all_runs = [run for runs in runs_by_name.values() for run in runs]
    costs = expected_seconds(f.results_dir, all_runs)

    # 2. Several processes share the runs. Process 0 then finds all of them finished.
    rank, count = processes.rank_and_count()
    if count > 1:
        make_own_share(all_runs, costs)
        if rank > 0:
            return 0
        costs = [0.0] * len(all_runs)

    # 3. The runs that are left, and the files of each experiment.
    status = 0
    sections = {}
    progress = CommandProgress(costs)
    for name, runs in runs_by_name.items():
        for run in runs:
            status = max(status, progress.make(run))
        write_result(f.results_dir, name, runs, sections)
    return status


if __name__ == "__main__":
    common.run(main)
