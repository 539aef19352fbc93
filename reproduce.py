"""The tables and figures of the published experiments, each made by its name from the scripts beside this one.

    python reproduce.py                                   # lists them
    python reproduce.py table_cvae figure_cvae_beta
    python reproduce.py --all --seed 1,2,3
    torchrun --nproc_per_node=4 reproduce.py --all        # commands dealt over four processes

Each lands in results/: <name>.md and <name>.csv, and <name>.png where there is something to see; README.md there shows them all,
each with what comments.md says of it. Dang et al. (2024, arXiv 2306.05023); both objectives where theirs counts the reconstruction
twice. What is finished is not trained again: after a kill, the same command.
"""
import contextlib
import csv
import datetime
import importlib
import io
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import common
import datasets
import files
import pictures
import report
import theory


@dataclass
class Flags:
    before_flags = "[name of a table or figure] ... "
    all: bool = common.flag(False, "make all of them")
    num_epochs: int = common.flag(0, "passes over the training set; 0 for each script's own", low=0)
    seed: int = common.flag(0, "seed, or a list of them for mean ± std", low=0)
    device: str = common.flag("auto", "auto, cpu, cuda, cuda:1, ...")
    data_dir: str = common.flag("data", "where data sets lie, or are put")
    out_dir: str = common.flag("runs", "where the scripts' runs go")
    results_dir: str = common.flag("results", "where tables and figures go")


@dataclass
class Experiment:
    """What it asks, the command lines it stands for, by which function of pictures.py it is drawn (None: it is not), and by which
    one below its table ends with sentences. rows says whether the table has a row for each setting; the .csv has."""
    asks: str
    commands: list
    draw: object = None
    says: object = None
    rows: bool = True


# ------------------------------------------------------------------------------------------- what a table ends with

# The paper's directions of effect: as this flag grows (of corr_type: from Identical to Random), this metric ... Of two-level
# models z2 is what collapses.
DIRECTIONS = {"beta": {"kl": "falls"}, "eta_dec": {"kl": "falls", "kl_2": "falls"}, "corr_type": {"kl": "rises"},
              "beta_1": {"kl_2": "rises"}, "beta_2": {"kl_2": "falls"}}


def directions(runs):
    """In how many steps from a setting to the next along one flag the paper's direction of effect holds."""
    for run in runs:
        means, values = {}, files.varying(run.settings, [run.data] * len(run.settings))
        for f, result in zip(run.settings, run.results):
            if result.get("metrics"):
                means.setdefault(tuple(getattr(f, flag) for flag in values), []).append(result["metrics"])
        for i, (flag, of) in enumerate(values.items()):
            for metric, way in DIRECTIONS.get(flag, {}).items():
                steps = []
                for key, here in means.items():
                    place = of.index(key[i]) + 1
                    there = means.get((*key[:i], *of[place:place + 1], *key[i + 1:]))
                    if there and metric in here[0]:
                        step = np.mean([m[metric] for m in there]) - np.mean([m[metric] for m in here])
                        steps.append(step * {"rises": 1, "falls": -1}[way] > -0.005)          # equal as it is printed
                if steps:
                    yield (f"Direction: along {flag}, {metric} {way} or stays in {sum(steps)} of {len(steps)} steps "
                           f"(`{run.command}`).")


def learnable_and_fixed(runs):
    """How many units a learnable Sigma keeps, and how many a fixed one."""
    for learnable, fixed in zip(runs[0::2], runs[1::2]):
        kept = [" / ".join(str(result["metrics"]["AU_kl"]) for result in run.results if result["metrics"])
                for run in (learnable, fixed)]
        yield f"Direction: {learnable.script} keeps {kept[0]} active units, {fixed.script} {kept[1]}."


def predictions(runs):
    """Of each script, how the closed form's predictions compare with all that was trained."""
    for script, results in pictures.by_script(runs).items():
        if "theory" not in results[0]:
            if theory.can_be_ranked(results):
                yield f"{script}: {len(results)} settings; rank correlation of predicted and trained {theory.correlations_in_words(results)}"
            else:
                pairs = [pair for result in results for pair in theory.beside_linear(result) if pair[0].startswith("kl")]
                yield f"{script}: " + ", ".join(
                    f"{kl} predicted {predicted:.2f}, trained {trained:.2f}" for kl, predicted, trained in pairs)
            continue
        wrong, far = 0, 0.0
        for result in results:
            distances = list(misplaced(result))
            wrong, far = wrong + bool(distances), max([far, *distances])
        yield f"{script}: every unit is active or collapsed as predicted in {len(results) - wrong} of {len(results)} settings" + (
            f", in {wrong} but for one whose threshold is within {far:.1%} of beta" if wrong else "")


def misplaced(result):
    """Of each unit that is active where collapse is predicted, or the other way round: how far beta (HVAE: beta_2) is from
    its threshold, as a share of beta."""
    predicted, trained, settings = result["theory"]["predicted"], result["theory"]["trained"], result["settings"]
    beta = settings["beta" if "beta" in settings else "beta_2"]
    for level in theory.levels_of(predicted):
        for is_to_be, is_now, at in zip(*(of[f"{name}{level}"] for of, name in (
                (predicted, "information"), (trained, "information"), (predicted, "collapse")))):
            if (is_to_be > 0) != (is_now > theory.ACTIVE):
                yield np.inf if at is None else abs(at / beta - 1)


def above_delta(runs):
    """Whether each rate is at least what the AR(1) prior makes certain, and what it is with a prior that fits the posterior."""
    for run in runs:
        for f, result in zip(run.settings, run.results):
            if result["metrics"]:
                kl, delta, fitted = (result["metrics"][name] for name in ("kl", "smallest_rate", "rate_auxiliary"))
                bound = f", {'at least' if kl >= delta else 'BELOW'} δ = {delta:g}" if delta else ""
                yield f"Prior {f.prior}: a KL of {kl:.2f} nats{bound}; against the auxiliary prior {fitted:.2f}."


def levels_in_use(runs):
    """Of each model, which levels carry information and how many units."""
    for run in runs:
        if not run.results[0]["metrics"]:
            continue
        active = [int((kl > theory.ACTIVE).sum()) for kl in pictures.units_by_level(run)]
        collapsed = [str(level) for level, count in enumerate(active, 1) if not count]
        yield (f"{run.script}: {sum(active)} of {sum(map(len, pictures.units_by_level(run)))} units carry more than {theory.ACTIVE} nats; "
               + (f"of {len(active)} levels collapsed: {', '.join(collapsed)}." if collapsed else f"each of {len(active)} levels has some."))


def beside_the_first(runs):
    """Of each model after the first, seeds' means: how far its log p(x) and ELBO are above the first one's, and by which terms."""
    finished = [(run.script, [result["metrics"] for result in run.results if result["metrics"]]) for run in runs]
    means = [(script, {name: np.mean([of[name] for of in seeds]) for name in seeds[0]}) for script, seeds in finished if seeds]
    for script, here in means[1:]:
        first, there = means[0]
        top = max(filter(None, common.levels(here)), key=lambda level: int(level[1:]))
        context = here[f"kl{top}"] if "context_baseline" in here else 0.0
        terms = {"reconstruction": there["reconstruction"] - here["reconstruction"],
                 "learned latents": there["kl"] - (here["kl"] - context)} | ({"context": -context} if context else {})
        log_px = f"log p(x) {here['log_px'] - there['log_px']:+.2f} nats, " if "log_px" in here else ""
        yield (f"{script} beside {first}: {log_px}ELBO {here['elbo'] - there['elbo']:+.2f} nats, of which "
               + ", ".join(f"{name} {nats:+.2f}" for name, nats in terms.items()) + ".")


def of_deep_models(runs):
    yield from levels_in_use(runs)
    yield from beside_the_first(runs)


def collapsed_by(runs):
    """How many levels with a headroom have collapsed units, by the objective or by training, over all settings and seeds."""
    levels = [of for run in runs for result in run.results for of in (result.get("headroom") or {}).values()]
    by_training = [of["headroom"] for of in levels if of["headroom"] > theory.ACTIVE]
    collapsed = sum(of["collapsed"] > 0 for of in levels)
    if levels:
        yield (f"Collapse: of {len(levels)} levels {collapsed} have collapsed units: {collapsed - len(by_training)} by the objective, "
               f"{len(by_training)} by training"
               + (f", whose headroom is {min(by_training):.2g} to {max(by_training):.2g} nats." if by_training else "."))


def objective(settings, terms):
    """The plain objective, the negative beta-ELBO, at a setting's betas, from the means of the ELBO's terms: in nats."""
    return terms["reconstruction"] * (2 if settings["released_objective"] else 1) + sum(
        settings[f"beta{level}"] * terms[f"kl{level}"] for level in common.levels(terms))


def of_remedy(result):
    """{column: value} of a setting that was trained with a remedy, or without one."""
    [(z, of)], metrics = result["headroom"].items(), result["metrics"]
    return {"objective, training": objective(result["settings"], {name: curve[-1] for name, curve in result["curves"].items()}),
            "test": objective(result["settings"], metrics), "KL": metrics["kl_2" if z == "z2" else "kl"],
            "active units": float(of["units"] - of["collapsed"]), "headroom": of["headroom"],
            "dead ReLU units": float(sum(dead for dead, _ in result["dead_units"].values()))}


def remedies(runs):
    """A table of settings and remedies, and where those that act on training alone lowered the plain objective."""
    cases = {}                                            # {(script, setting): {remedy: {seed: its columns}}}
    for run, remedy in zip(runs, [remedy for _ in REMEDIED for remedy, _ in REMEDIES]):
        for f, result in zip(run.settings, run.results):
            setting = ", ".join(f"{name} = {value}" for name, value in result["settings"].items() if name in ("beta", "beta_1", "beta_2"))
            if result["metrics"]:
                cases.setdefault((run.script, setting), {}).setdefault(remedy, {})[f.seed] = of_remedy(result)
    rows = [(*case, remedy, *(cell(column, [of[column] for of in of_seeds.values()]) for column in next(iter(of_seeds.values()))))
            for case, of_remedies in cases.items() for remedy, of_seeds in of_remedies.items()]
    head = ("script", "setting", "remedy", "objective, training", "test", "KL", "active units", "headroom", "dead ReLU units")
    yield "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))

    changes = {}                                          # of the plain training objective: {(acts on training, idle): [...]}
    for of_remedies in cases.values():
        without = of_remedies.pop("none", {})
        for remedy, of_seeds in of_remedies.items():
            for seed in set(of_seeds) & set(without):
                changes.setdefault((remedy != "free bits", without[seed]["headroom"] > theory.ACTIVE), []).append(
                    of_seeds[seed]["objective, training"] - without[seed]["objective, training"])
    for (acts_on_training, idle), of in sorted(changes.items(), reverse=True):
        what = "a remedy that acts on training alone" if acts_on_training else "free bits"
        yield (f"Where headroom was {'above' if idle else 'at most'} {theory.ACTIVE} nats without a remedy, {what} lowered the plain "
               f"objective of the training images by more than {theory.ACTIVE} nats in {sum(change < -theory.ACTIVE for change in of)} of "
               f"{len(of)} cases (a setting, a seed and a remedy each), and changed it by {np.mean(of):+.3f} nats on average.")


# ----------------------------------------------------------------------------------------------------------- experiments

def both(command):
    """With the exact objective, and with the one of the authors' released code."""
    return [command, f"{command} --released_objective"]


CVAE_BETA = "MNIST_CVAE_Relu.py --eta_enc 1.0 --eta_dec 1.0 --beta 0.1,0.5,1.0,2.0"
CVAE_ETA = "MNIST_CVAE_Relu.py --eta_enc 1.0 --beta 1.0 --eta_dec 0.25,0.5,1.0,2.0"
VAES = [f"MNIST_VAE_{kind}_{sigma}_sigma.py --eta_dec 1.0 --c 1.0 --beta 1.0 --sigma {value}"
        for kind, value in (("Linear", 1.0), ("Relu", 0.5)) for sigma in ("learnable", "nonlearnable")]
CVAE_LINEAR = "MNIST_CVAE_Linear.py --beta 0.1:5.0:0.1"
HVAE_LINEAR = "MNIST_HVAE_Linear_learnable_sigma_2.py --beta_2 0.1:7.0:0.1"
CORRELATIONS = "Identical,Gaussian_noise_1_2,Gaussian_noise_1_4,Gaussian_noise_1_8,Random"

HVAE_BETA_1 = "MNIST_HVAE_Relu.py --beta_1 0.25,0.5,1.0,2.0,3.0"
HVAE_BETA_2 = "MNIST_HVAE_Relu.py --beta_2 0.25,0.5,1.0,2.0,3.0"
HVAE_ETA = "MNIST_HVAE_Relu.py --eta_dec 0.25,0.5,0.7,1.0,2.0"
DIGITS = [f"MNIST_CVAE_{kind}_single_digit.py --digit 0:9" for kind in ("Linear", "Relu", "CNN")]
CORRELATION = f"Synthetic_CVAE_Relu_correlation.py --corr_type {CORRELATIONS}"
LINEAR = ["MNIST_CVAE_Linear.py", "MNIST_HVAE_Linear_learnable_sigma_2.py --beta_1 1.0 --beta_2 1.0",
          "MNIST_HVAE_Linear_nonlearnable_sigma_2.py"]

# A name and flags each, the first without; they act on training, but for the last one, which is another objective. {start} is how
# a script sets the std that q starts from, as a share of the prior's.
REMEDIES = (("none", "{start} 1.0"), ("start", "{start} 0.1"), ("warm-up", "{start} 1.0 --beta_warmup {quarter}"),
            ("cycles", "{start} 1.0 --beta_cycles 4"), ("free bits", "{start} 1.0 --free_bits 0.1"))
REMEDIED = (("MNIST_CVAE_Relu.py --eta_enc 1.0 --eta_dec 1.0 --beta 1.0,2.0", "--start_std", 100),
            ("MNIST_HVAE_Relu.py --beta_1 1.0 --beta_2 1,2", "--start_std", 30), ("MNIST_HVAE_Relu.py --beta_1 0.25", "--start_std", 30),
            ("MNIST_VAE_Relu_learnable_sigma.py", "--sigma", 50))

# Of about one size, 88,000 to 104,000 parameters.
DEEP = ["MNIST_HVAE_Ladder.py --preset small", "MNIST_HVAE_DCT.py --preset small", "MNIST_HVAE_DVP.py --preset small"]
ABLATED = ["MNIST_HVAE_Ladder.py --preset small --grad_clip 5,2717", "MNIST_HVAE_Ladder.py --preset small --linear_path true,false",
           "MNIST_HVAE_Ladder.py --preset small --num_ch 32 --d_hidden 16",
           "MNIST_HVAE_DCT.py --preset small --decoder state --grad_clip 5,543", "MNIST_HVAE_DCT.py --preset small --decoder state,aggregate",
           "MNIST_HVAE_DCT.py --preset small --decoder state --grad_clip 5 --step_variance learned,fixed"]

OF_ALL_SEEDS = pictures.per_digit, pictures.against_prediction      # these pictures show; all others the first

EXPERIMENTS = {
    "figure_cvae_beta": Experiment("Does a heavier KL collapse more units of a CVAE?", both(CVAE_BETA), pictures.collapse_curves),
    "figure_cvae_eta": Experiment("Does a noisier decoder collapse more units of a CVAE?", both(CVAE_ETA), pictures.collapse_curves),
    "table_cvae": Experiment("What do beta and eta_dec do to a CVAE's log-likelihood, KL and active units?",
                             both(CVAE_BETA) + both(CVAE_ETA)),
    "figure_single_digit": Experiment(
        "Does the linear theory say, from a digit's images alone, how much z tells of it?",
        DIGITS[:2], pictures.per_digit),
    "figure_single_digit_cnn": Experiment("The same with convolutions.", DIGITS[2:], pictures.per_digit),
    "figure_hvae_beta_1": Experiment("What does beta_1 collapse, at which level?",
                                     both("MNIST_HVAE_Relu.py --beta_1 0.1,0.5,1.0,2.0"), pictures.collapse_curves),
    "figure_hvae_beta_2": Experiment("What does beta_2 collapse, at which level?",
                                     both("MNIST_HVAE_Relu.py --beta_2 0.1,0.5,1.0,2.0"), pictures.collapse_curves),
    "figure_hvae_eta": Experiment("What does eta_dec collapse, at which level?",
                                  both("MNIST_HVAE_Relu.py --eta_dec 0.25,0.5,1.0,2.0"), pictures.collapse_curves),
    "table_hvae": Experiment("What do beta_1, beta_2 and eta_dec do to an HVAE's log-likelihood, KLs and active units?",
                             both(HVAE_BETA_1) + both(HVAE_BETA_2) + both(HVAE_ETA)),
    "figure_hvae_samples": Experiment(
        "Where over beta_1 and beta_2 does z2 still tell one digit from another?",
        ["MNIST_HVAE_Relu.py --beta_1 0.1,1,2,4,6 --beta_2 0.1,1,2,4,6 --num_samples 0"], pictures.of_the_grid("reconstructions_2.png")),
    "figure_hvae_cnn_samples": Experiment(
        "The same with convolutions.",
        ["MNIST_HVAE_CNN.py --beta_1 1,2,4,8,16 --beta_2 1,2,4,8,16 --num_samples 0"], pictures.of_the_grid("reconstructions_2.png")),
    "figure_vae_sigma": Experiment("Does a learnable encoder variance collapse units that a fixed one keeps?", VAES, pictures.beside,
                                   learnable_and_fixed),
    "table_vae_sigma": Experiment("What does a learnable encoder variance gain and lose?", VAES, says=learnable_and_fixed),
    "figure_cvae_linear": Experiment("Do fifty linear CVAEs collapse where theorem 2 says?",
                                     [CVAE_LINEAR], pictures.of_the_grid("theory.png")),
    "figure_hvae_linear": Experiment("Do seventy linear HVAEs collapse where theorem 3 says?",
                                     [HVAE_LINEAR], pictures.of_the_grid("theory.png")),
    "table_theorems": Experiment(
        "Are theorems 1, 2, 3 and 5 what brute force finds, and what training reaches?",
        ["matrix_VAE.py --learnable_sigma true,false", "matrix_CVAE.py", "matrix_HVAE_learnable_sigma_2.py",
         "matrix_HVAE_nonlearnable_sigma_2.py", *VAES[:2], *LINEAR]),
    "table_remedies": Experiment(
        "Which remedy helps where training collapsed a level, and which where the objective did?",
        [f"{command} {flags.format(start=start, quarter=epochs // 4)} --num_epochs {epochs} --num_samples 0"
         for command, start, epochs in REMEDIED for _, flags in REMEDIES], says=remedies, rows=False),
    "table_correlation": Experiment("The more x tells about y, the more units collapse?",
                                    both(CORRELATION)),
    "table_deep": Experiment(
        "Ladder VAE, DCT-VAE and DVP-VAE of one size, after as many epochs: which levels stay in use?",
        [f"{command} --evaluate compression,attack" for command in DEEP], pictures.by_level, of_deep_models),
    "table_deep_ablation": Experiment(
        "What is each part of the Ladder and the DCT-VAE as published worth, at few epochs?",
        [f"{command} --num_epochs 4" for command in ABLATED]),
    "figure_delta": Experiment(
        "Does a prior that no posterior can match keep the rate of a VAE with an autoregressive decoder above δ?",
        ["MNIST_VAE_Delta.py --preset small --prior standard", "MNIST_VAE_Delta.py --preset small --delta 2,5,10"],
        pictures.rates, above_delta),
    "figure_prediction": Experiment(
        "How far does the closed form, from the training data alone, tell the KL that is trained?",
        [CVAE_LINEAR, HVAE_LINEAR, *VAES, *LINEAR, *DIGITS, *both(CVAE_BETA), *both(CVAE_ETA), *both(CORRELATION),
         *both(HVAE_BETA_1), *both(HVAE_BETA_2), *both(HVAE_ETA)], pictures.against_prediction, predictions, rows=False),
}


# ------------------------------------------------------------------------------------------------------------------ runs

class Run:
    """One command line of an experiment, with the flags that pass through: what it is to leave, and what it has left."""

    def __init__(self, command, f, seeds):
        script, *self.argv = shlex.split(command)
        self.command, self.script = command, script.removesuffix(".py")
        self.module = importlib.import_module(self.script)
        own, shared = common.own_and_shared(self.module.Flags)
        passed = {"seed": ",".join(map(str, seeds)), "device": f.device, "data_dir": f.data_dir, "out_dir": f.out_dir}
        passed |= {"num_epochs": f.num_epochs} if f.num_epochs else {}
        if f.num_epochs and "--beta_warmup" in self.argv:         # as large a part of them as in REMEDIES
            passed["beta_warmup"] = f.num_epochs / 4
        for name, value in passed.items():
            if name in own | shared and not (name == "device" and self.script.startswith("matrix")):
                self.argv += [f"--{name}", str(value)]
        self.settings = common.parse_flags(self.module.Flags, self.argv)
        self.read()

    def read(self):
        """The results that are there; data sets are told apart by the names of the runs."""
        names = ["mnist", "digits"] if hasattr(self.settings[0], "dataset") else ["synthetic"]
        found = []
        for name in names:
            self.data = None if self.script.startswith("matrix") else datasets.Data(name, None, None)
            found = [files.read_result(f, self.data, "result.json") for f in self.settings]
            if all(found):
                break
        self.results = [result for result in found if result]

    def make(self):
        """Run the script's main; its exit status: 0, or 1 if a setting diverged or a theorem failed."""
        status = self.module.main(self.argv)
        self.read()
        return status

    def rows(self):
        """The flags in which the settings differ, of each but for its seed."""
        flags = files.varying(self.settings, [self.data] * len(self.settings))
        return [{name: getattr(self.settings[i], name) for name in flags} for i in self.of_first_seed()]

    def of_first_seed(self):
        return [i for i, f in enumerate(self.settings) if f.seed == self.settings[0].seed]

    def units(self, i):
        return np.load(files.run_dir(self.settings[i], self.data) / "units.npz")

    def grid(self):
        return pictures.grid_dir(self.settings, [self.data] * len(self.settings))

    def words(self):
        return "objective counted as released" if getattr(self.settings[0], "released_objective", False) else "exact objective"


def seconds(result):
    """What a result took; of settings that trained side by side its share."""
    return sum(of / (result.get("side_by_side", 1) if name == "train" else 1) for name, of in result["seconds"].items())


def minutes(seconds):
    return f"{sum(seconds) / 60:.0f} min"


def measured(result):
    """{column: value} of one result: its metrics, or how it compares with a theorem."""
    metrics = dict(result["metrics"] or {}) if "metrics" in result else {}
    levels = [level for level in common.levels(metrics)[::-1] if level]
    if len(levels) > report.MANY_LEVELS:                  # a column for all of a kind, the top level first
        for kind in ("kl", "AU", "AU_kl", "active_share"):
            of = [metrics.pop(f"{kind}{level}") for level in levels]
            if kind in ("kl", "AU_kl"):
                metrics[f"{kind} from the top"] = ", ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in of)
        metrics |= {name: metrics.pop(name, "") for name in ("context_baseline", "error_context")}          # of those with a context
        metrics["parameters"] = result["parameters"]
    if "max_error" in result:
        metrics |= {"max error": result["max_error"], "gap": result["theory"]["gap"],
                    "verdict": "VERIFIED" if result["max_error"] <= theory.TOLERANCE else "FAILED"}
    elif "theory" in result:
        active = theory.active_units(result["theory"]), theory.active_units(result["theory"], "trained")
        metrics |= {"active predicted (trained)": ", ".join(f"{a} ({b})" for a, b in zip(*(of.values() for of in active))),
                    "singular values off": theory.singular_value_error(result["theory"]), "gap": result["theory"]["gap"],
                    "verdict": "; ".join(theory.disagreements(result["theory"])) or "as predicted"}
    elif result.get("linear") and result["metrics"]:
        for metric, predicted, _ in theory.beside_linear(result):
            if not metric.startswith("AU_kl"):
                metrics[f"linear {metric}"] = predicted
    return metrics


def cell(column, values):
    """Of seeds' values mean ± standard deviation; a text as it is, if they agree, and of a prediction the first: it has no seed."""
    if isinstance(values[0], str):
        return " / ".join(dict.fromkeys(values))
    number = {"max error": "{:.1e}", "gap": "{:.1e}", "singular values off": "{:.2%}", "headroom": "{:.3f}", "headroom_2": "{:.3f}",
              "objective, training": "{:.3f}", "test": "{:.3f}"}.get(column, "{:.2f}")
    if len(values) == 1 or column.startswith("linear "):
        return number.format(values[0]) if isinstance(values[0], float) else str(values[0])
    return f"{number.format(np.mean(values))} ± {number.format(np.std(values, ddof=1))}"


def tables(name, experiment, runs):
    """(markdown, csv) of an experiment's results. Commands of one setting each share a table where their columns are the same."""
    parts, rows = [], []                                  # a part: the commands, what the columns are called, the rows, words
    for run in runs:
        grouped = {}
        for f, result in zip(run.settings, run.results):
            key = tuple(f"{flag} = {getattr(f, flag)}" for flag in files.varying(run.settings, [run.data] * len(run.settings)))
            grouped.setdefault(", ".join(key) or run.script, []).append(measured(result))
            rows.append({"command": run.command, "dataset": result["dataset"], "device": result["device"],
                         "torch": result["versions"]["torch"], "seconds": seconds(result), **result["settings"], **measured(result)})
        finished = {key: [of for of in repeats if of] for key, repeats in grouped.items()}       # but for diverged ones
        columns = list(next((repeats[0] for repeats in finished.values() if repeats), {"metrics": 0}))
        head = ["script" if run.script in grouped else "setting", *columns]
        if head[0] == "setting" or not parts or parts[-1][1] != head:
            parts.append(([], head, [], []))
        commands, _, table, words = parts[-1]
        commands.append(f"`{run.command}`\n")
        table += [[key, *(cell(column, [of[column] for of in repeats]) if repeats else "diverged" for column in columns)]
                  for key, repeats in finished.items()]
        linear = [result for result in run.results if "metrics" in result and theory.closed_form(result)]
        if theory.can_be_ranked(linear):
            words.append("\nRank correlation of what the closed form of the linear model predicts and what was trained: "
                         f"{theory.correlations_in_words(linear)} (`{run.command}`).")
    lines = []
    for commands, head, table, words in parts if experiment.rows else []:
        head, *table = ["| " + " | ".join(row) + " |" for row in (head, *table)]
        lines += ["", *commands, head, "|---" * (head.count(" | ") + 1) + "|", *table, *words]
    lines += [f"\n{sentence}" for says in (experiment.says or directions, collapsed_by) for sentence in says(runs)]
    first, epochs = runs[0].results[0], sorted({getattr(f, "num_epochs", 0) for run in runs for f in run.settings} - {0})
    seeds = sorted({f.seed for run in runs for f in run.settings})
    about = (f"{', '.join(dict.fromkeys(r['dataset'] for run in runs for r in run.results))}; {first['device']}; "
             f"python {first['versions']['python']}, torch {first['versions']['torch']}; epochs {', '.join(map(str, epochs)) or '-'}; "
             f"seed {', '.join(map(str, seeds))}; {minutes(seconds(r) for run in runs for r in run.results)}; {datetime.date.today()}; "
             "nats per test example")
    picture = [f"\n![{experiment.asks}]({name}.png)"] if experiment.draw else []
    if picture and len(seeds) > 1 and experiment.draw not in OF_ALL_SEEDS:
        picture.append(f"\n*The picture is of seed {runs[0].settings[0].seed}.*")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(column for row in rows for column in row)))
    writer.writeheader()
    writer.writerows(rows)
    return "\n".join([f"# {name}\n\n{experiment.asks}\n\n{about}", *picture, *lines]) + "\n", text.getvalue()


def show(f, seeds):
    """The list of experiments, their commands, what is finished of each, and how long it took here, or for those results
    that are in --results_dir."""
    for name, experiment in EXPERIMENTS.items():
        runs = [Run(command, f, seeds) for command in experiment.commands]
        done, wanted = [result for run in runs for result in run.results], sum(len(run.settings) for run in runs)
        print(f"{name}: {experiment.asks}\n    {len(done)} of {wanted} settings finished"
              + (f", which took {minutes(map(seconds, done))}" if done else ""), end="")
        with contextlib.suppress(OSError), open(Path(f.results_dir, f"{name}.csv")) as file:
            rows = list(csv.DictReader(file))
            print(f"; {Path(f.results_dir, name)}: {len(rows)} settings in {minutes(float(row['seconds']) for row in rows)} "
                  f"on {rows[0]['device']}", end="")
        print()
        for command in experiment.commands:
            print(f"    python {command}")


SHORT = 12                                                # rows of tables that README.md shows


def section(markdown, name):
    """A result's part of README.md, of its <name>.md: the tables only where they are short, else where they are."""
    _, asks, about, *parts = markdown.strip().split("\n\n")
    tables = [part for part in parts if part.startswith("|") or part.startswith("`")]
    if sum(part.count("\n| ") for part in tables) > SHORT:
        parts = [part for part in parts if part not in tables]
    where = f"{about}. Table: [.md]({name}.md), [.csv]({name}.csv)"
    return "\n\n".join([f"## {name}", f"*{asks}* {where}", *parts])


def write_readme(folder):
    """README.md of all results that are in this folder, and of comments.md: what stands there before its first heading comes first,
    what under a result's name below that result, all else at the end."""
    path = Path(folder, "comments.md")
    first, *comments = re.split(r"^## ", path.read_text() if path.exists() else "# Results", flags=re.M)
    comments, parts = {name: text for name, _, text in (part.partition("\n") for part in comments)}, [first.strip()]
    for name in EXPERIMENTS:
        comment = comments.pop(name, "").strip()
        with contextlib.suppress(FileNotFoundError):
            parts += [section(Path(folder, f"{name}.md").read_text(), name), *([comment] if comment else [])]
    parts += [f"## {name}\n{text.rstrip()}" for name, text in comments.items()]
    files.write(Path(folder, "README.md"), lambda file: file.write(("\n\n".join(parts) + "\n").encode()))


def expected(f, runs):
    """The seconds that each run's unfinished settings may take, from the tables in --results_dir; of commands without one the mean."""
    took = {}
    for name in EXPERIMENTS:
        with contextlib.suppress(FileNotFoundError), open(Path(f.results_dir, f"{name}.csv")) as file:
            for row in csv.DictReader(file):
                took.setdefault(row["command"], []).append(float(row["seconds"]))
    took = {command: np.mean(of) for command, of in took.items()}
    usual = np.mean([60.0, *took.values()])
    return [(len(run.settings) - len(run.results)) * took.get(run.command, usual) for run in runs]


def deal(costs, world):
    """The places of the runs of so many costs that each of so many processes makes: the dearest first, each to whom has least to do."""
    hands, sums = [[] for _ in range(world)], [0.0] * world
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        least = sums.index(min(sums))
        hands[least].append(place)
        sums[least] += costs[place] + 1                   # of a finished one: it is looked at
    return hands


@contextlib.contextmanager
def alone():
    """Within, this process is the only one for a script, but for its GPU."""
    kept = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


class Progress:
    """A line on stderr before each of some runs: how many, the time so far, and the time left if all take as they were expected to."""

    def __init__(self, costs):
        rank, world = common.processes()
        self.who, self.costs, self.begun, self.done = f"process {rank}: " if world > 1 else "", costs, time.monotonic(), 0

    def make(self, run):
        spent, before = time.monotonic() - self.begun, sum(self.costs[:self.done])
        left = sum(self.costs[self.done:]) * (spent / before if before else 1.0)
        spent, left = (datetime.timedelta(seconds=round(of)) for of in (spent, left))
        self.done += 1
        print(f"{self.who}command {self.done} of {len(self.costs)}, {spent}, about {left} left: python {run.command}", file=sys.stderr, flush=True)
        with alone():
            return run.make()


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    names = []
    while argv and not argv[0].startswith("-"):
        names.append(argv.pop(0))
    settings = common.parse_flags(Flags, argv)
    f, seeds = settings[0], list(dict.fromkeys(f.seed for f in settings))
    if len(seeds) < len(settings):
        common.stop(f, "only --seed may be a list")
    for name in names:
        if name not in EXPERIMENTS:
            common.stop(f, f"{name!r}: no such table or figure, wants some of {', '.join(EXPERIMENTS)}")
    names = list(EXPERIMENTS) if f.all else names
    if not names:
        show(f, seeds)
        return 0
    made = {name: [Run(command, f, seeds) for command in EXPERIMENTS[name].commands] for name in names}
    runs, (rank, world), status = [run for of in made.values() for run in of], common.processes(), 0
    costs = expected(f, runs)
    if world > 1:                                         # then process 0 finds all of it finished
        hand = deal(costs, world)[rank]
        progress = Progress([costs[place] for place in hand])
        with contextlib.redirect_stdout(io.StringIO()):
            for place in hand:
                progress.make(runs[place])
        common.meet()
        if rank > 0:
            return 0
        costs = [0.0] * len(runs)
    progress = Progress(costs)
    for name, runs in made.items():
        status = max([status, *(progress.make(run) for run in runs)])
        markdown, table = tables(name, EXPERIMENTS[name], runs)
        if EXPERIMENTS[name].draw:
            EXPERIMENTS[name].draw(Path(f.results_dir, f"{name}.png"), runs)
        files.write(Path(f.results_dir, f"{name}.csv"), lambda file: file.write(table.encode()))
        files.write(Path(f.results_dir, f"{name}.md"), lambda file: file.write(markdown.encode()))
        write_readme(f.results_dir)
        print(f"made: {Path(f.results_dir, name)}.md", file=sys.stderr)
    return status


if __name__ == "__main__":
    common.run(main)
