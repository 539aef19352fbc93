"""Make the tables and figures of the published experiments, each from the scripts beside this one.

    python reproduce.py                                   # list them
    python reproduce.py table_cvae figure_vae_sigma
    python reproduce.py --all --seed 1,2,3
    python reproduce.py table_cvae --seed 4 --add_seeds   # add a seed to a table
    python reproduce.py --page                            # draw and write all anew, without runs
    torchrun --nproc_per_node=4 reproduce.py --all        # deal the commands over four processes

The experiments are those of Dang et al. (2024, arXiv 2306.05023) and some that go beyond the paper.
A command with --released_objective trains the objective of the authors' released code, which counts
the reconstruction twice.

Each result goes to results/: its numbers to <name>.csv, its picture to <name>.png, and what the
picture shows beyond the numbers to data/<name>.npz. README.md in that folder is the page that shows
all results. page.py writes it from these files and from comments.md, and figures.py draws the
pictures. Finished runs are reused, so that the same command continues after a kill.

A command that ends without an answer, such as one whose data set cannot be fetched, is named. The
other commands are made all the same, and the tables that need this one stay as they are.

The file has these parts: the flags, the list of experiments, the runs, the files of a result, the
progress, and main.
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

import answers
import datasets
import figures
import files
import measurements
import page
import pictures
import processes
import report
import verify


# -------------------------------------------------------------------------------------------- flags

@dataclass
class Flags(common.BaseFlags):
    positional = "[name of a table or figure] ..."
    epilog = (
        "Without a name and without --all, the tables and figures are listed. Only --seed may be a "
        "list such as 1,2,3 or a range such as 1:3. The tables then show the mean ± the standard "
        "deviation over the seeds."
    )

    all: bool = common.flag(False, "make all tables and figures")
    page: bool = common.flag(
        False,
        "draw all pictures and write the page of results from the files in --results_dir, without "
        "training and without runs",
    )
    add_seeds: bool = common.flag(
        False,
        "add the given seeds to those that the tables in --results_dir already have, instead of "
        "replacing the tables",
    )
    num_epochs: int = common.flag(
        0,
        "number of passes over the training set; 0 takes each script's own number",
        low=0,
    )
    seed: int = common.flag(0, "seed, or a list of seeds", low=0)
    device: str = common.flag(
        "auto", "device that computes: auto, cpu, cuda, cuda:1 and so on", metavar="DEVICE"
    )
    data_dir: str = common.flag("data", "folder that holds the data sets", metavar="FOLDER")
    out_dir: str = common.flag("runs", "folder for the runs of the scripts", metavar="FOLDER")
    results_dir: str = common.flag(
        "results",
        "folder for the tables, the pictures and the page of results",
        metavar="FOLDER",
    )


# -------------------------------------------------------------------------------------- experiments

def both_objectives(command):
    """The command with the exact objective, and with the one of the authors' released code."""
    return [command, f"{command} --released_objective"]


CVAE_BETA = "MNIST_CVAE_Relu.py --eta_enc 1.0 --eta_dec 1.0 --beta 0.1,0.5,1.0,2.0"
CVAE_ETA = "MNIST_CVAE_Relu.py --eta_enc 1.0 --beta 1.0 --eta_dec 0.25,0.5,1.0,2.0"
CVAE_LINEAR = "MNIST_CVAE_Linear.py --beta 0.1:4.9:0.2 --num_samples 0"

HVAE_BETA_1 = "MNIST_HVAE_Relu.py --beta_1 0.25,0.5,1.0,2.0,3.0"
HVAE_BETA_2 = "MNIST_HVAE_Relu.py --beta_2 0.25,0.5,1.0,2.0,3.0"
HVAE_ETA = "MNIST_HVAE_Relu.py --eta_dec 0.25,0.5,0.7,1.0,2.0"
HVAE_LINEAR = (
    "MNIST_HVAE_Linear_learnable_sigma_2.py --beta_2 0.1:7.0:0.3 --num_samples 0"
)

# A learnable and a fixed encoder variance, in turn.
VAES = [
    "MNIST_VAE_Linear_learnable_sigma.py --eta_dec 1.0 --c 1.0 --beta 1.0 --sigma 1.0",
    "MNIST_VAE_Linear_nonlearnable_sigma.py --eta_dec 1.0 --c 1.0 --beta 1.0 --sigma 1.0",
    "MNIST_VAE_Relu_learnable_sigma.py --eta_dec 1.0 --c 1.0 --beta 1.0 --sigma 0.5",
    "MNIST_VAE_Relu_nonlearnable_sigma.py --eta_dec 1.0 --c 1.0 --beta 1.0 --sigma 0.5",
    "MNIST_VAE_Linear_learnable_sigma.py --eta_dec 1.0 --c 1.0 --beta 4.0 --sigma 0.5 "
    "--num_epochs 50",
    "MNIST_VAE_Linear_nonlearnable_sigma.py --eta_dec 1.0 --c 1.0 --beta 4.0 --sigma 0.5 "
    "--num_epochs 50",
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

# Three models of 22,000 to 23,000 parameters on few and small images, so that training converges on
# two CPU cores. They have four levels of 7 x 7 units. The context of the DCT-VAE and the DVP-VAE
# has 4 x 4 numbers. The DCT-VAE is trained like the other two. Its own preset is for many more
# steps.
SMALL_IMAGES = (
    "--side 14 --latents 4 --num_ch 8 --num_train 10000 --num_epochs 100 --num_test 2000 "
    "--test_curve true"
)
DEEP_SMALL = [
    f"MNIST_HVAE_Ladder.py --preset small {SMALL_IMAGES} --d_hidden 9",
    f"MNIST_HVAE_DVP.py --preset small {SMALL_IMAGES} --diffusion_ch 4 --context_size 4",
    f"MNIST_HVAE_DCT.py --preset small {SMALL_IMAGES} --diffusion_ch 4 --context_size 4 "
    "--optimizer adamax --lr 0.01 --lr_schedule cosine --warmup_epochs 0.5 --ema 0.99 "
    "--grad_clip 5 --weight_decay 1e-6",
]

# The same models and a further one after few epochs, and the VAEs with an autoregressive decoder.
DEEP_WHY = [
    "MNIST_HVAE_Ladder.py --preset small --num_epochs 4 --num_samples 0",
    "MNIST_HVAE_DCT.py --preset small --num_epochs 2 --num_samples 0",
    "MNIST_HVAE_DVP.py --preset small --num_epochs 4 --num_samples 0",
    "MNIST_HVAE_DVP.py --preset small --prior vamp --num_epochs 2 --num_samples 0",
    "MNIST_VAE_Delta.py --preset small --prior standard --num_samples 0",
    "MNIST_VAE_Delta.py --preset small --delta 5 --num_samples 0",
]


def on_fashion(line, original, result):
    """The sweep of a command line on Fashion-MNIST, as page.RepeatedSweep describes it."""
    return page.RepeatedSweep(f"{line} --dataset fashion --num_samples 0", original, result)


# Sweeps on MNIST that are repeated on Fashion-MNIST. Some have fewer epochs there, or fewer
# settings.
FASHION = (
    on_fashion(CVAE_BETA, CVAE_BETA, "table_cvae"),
    on_fashion(CVAE_ETA, CVAE_ETA, "table_cvae"),
    on_fashion(f"{HVAE_BETA_1} --num_epochs 30", HVAE_BETA_1, "table_hvae"),
    on_fashion(f"{HVAE_BETA_2} --num_epochs 30", HVAE_BETA_2, "table_hvae"),
    on_fashion(f"{HVAE_ETA} --num_epochs 30", HVAE_ETA, "table_hvae"),
    on_fashion(DIGITS[1], DIGITS[1], "figure_single_digit"),
    on_fashion("MNIST_CVAE_Linear.py --beta 0.5,1,2,4,8", CVAE_LINEAR, "figure_cvae_linear"),
    on_fashion(
        "MNIST_HVAE_Linear_learnable_sigma_2.py --beta_2 0.5,1,2,4,8",
        HVAE_LINEAR,
        "figure_hvae_linear",
    ),
    on_fashion("MNIST_VAE_Relu_learnable_sigma.py --num_epochs 50", VAES[2], "figure_vae_sigma"),
)

# A VAE with Bernoulli pixels, trained from a start next to collapse and after a rise of beta. The
# linear one needs larger steps, since only the biases of its decoder can make a pixel black.
BERNOULLI = []
for architecture in ("--linear false", "--linear true --lr 0.01 --lr_schedule cosine"):
    BERNOULLI += [
        f"MNIST_VAE_Bernoulli.py {architecture} --start_std 1 "
        "--beta 0.5,1,2,4,8,16,24,30,32,33,34,35,40,60 --num_epochs 12 --num_samples 0",
        f"MNIST_VAE_Bernoulli.py {architecture} --beta_warmup 8 "
        "--beta 24,30,32,33,34,35,40 --num_epochs 12 --num_samples 0",
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
class RemediedModel:
    """A model that is trained with each of answers.REMEDIES.

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
    """The command lines of models with all remedies. Those of the first model come first."""
    commands = []
    for model in models:
        for remedy in answers.REMEDIES:
            flags = remedy.flags.format(start=model.start_flag, quarter=model.num_epochs // 4)
            commands.append(
                f"{model.command} {flags} --num_epochs {model.num_epochs} --num_samples 0"
            )
    return commands


# The experiments in the order of the page. page.Experiment says what each field is.
EXPERIMENTS = {
    # Theorems and linear models.
    "table_theorems": page.Experiment(
        section=page.LINEAR,
        question="Do brute force and training reach what theorems 1, 2, 3 and 5 predict?",
        commands=[
            "matrix_VAE.py --learnable_sigma true,false",
            "matrix_CVAE.py",
            "matrix_HVAE_learnable_sigma_2.py",
            "matrix_HVAE_nonlearnable_sigma_2.py",
            *VAES[:2],
            *LINEAR,
        ],
        answer=answers.theorems,
    ),
    "figure_cvae_linear": page.Experiment(
        section=page.LINEAR,
        question="Do linear CVAEs collapse where theorem 2 predicts?",
        commands=[CVAE_LINEAR],
        answer=answers.trained_as_predicted,
        picture=figures.unit_curves,
        arrays=figures.grid_arrays("theory.npz"),
    ),
    "figure_hvae_linear": page.Experiment(
        section=page.LINEAR,
        question="Do linear HVAEs collapse where theorem 3 predicts?",
        commands=[HVAE_LINEAR],
        answer=answers.trained_as_predicted,
        picture=figures.unit_curves,
        arrays=figures.grid_arrays("theory.npz"),
    ),

    # Hierarchical VAEs.
    "table_hvae": page.Experiment(
        section=page.HVAES,
        question="Do β1, β2 and η_dec change the KL of z2 of a ReLU HVAE as the paper says?",
        commands=[
            HVAE_BETA_1,
            HVAE_BETA_2,
            HVAE_ETA,
        ],
        answer=answers.directions,
        picture=figures.over_flags,
    ),
    "table_hvae_released": page.Experiment(
        section=page.HVAES,
        question="Does the HVAE with the released objective end where the authors' code ends?",
        commands=[
            "MNIST_HVAE_Relu.py --beta_1 1.0,2.0 --released_objective --num_samples 0",
            "MNIST_HVAE_Relu.py --beta_2 1.0,2.0 --released_objective --num_samples 0",
        ],
        answer=None,
        tables=page.no_tables,
    ),
    "figure_hvae_beta_1": page.Experiment(
        section=page.HVAES,
        question="Which level does β1 collapse?",
        commands=[HVAE_BETA_1],
        answer=answers.levels_in_use,
        picture=figures.collapse_curves,
        arrays=figures.collapse_arrays,
        numbers_in="table_hvae",
    ),
    "figure_hvae_beta_2": page.Experiment(
        section=page.HVAES,
        question="Which level does β2 collapse?",
        commands=[HVAE_BETA_2],
        answer=answers.levels_in_use,
        picture=figures.collapse_curves,
        arrays=figures.collapse_arrays,
        numbers_in="table_hvae",
    ),
    "figure_hvae_eta": page.Experiment(
        section=page.HVAES,
        question="Which level does η_dec collapse?",
        commands=[HVAE_ETA],
        answer=answers.levels_in_use,
        picture=figures.collapse_curves,
        arrays=figures.collapse_arrays,
        numbers_in="table_hvae",
    ),
    "figure_hvae_samples": page.Experiment(
        section=page.HVAES,
        question="For which β1 and β2 does z2 of a ReLU HVAE distinguish the digits?",
        commands=["MNIST_HVAE_Relu.py --beta_1 0.1,1,2,4,6 --beta_2 0.1,1,2,4,6 --num_samples 0"],
        answer=answers.where_z2_is_empty,
        picture=figures.contact_sheet,
        arrays=figures.grid_arrays("reconstructions.npz"),
        tables=page.beta_tables,
    ),
    "figure_hvae_cnn_samples": page.Experiment(
        section=page.HVAES,
        question="For which β1 and β2 does z2 of a convolutional HVAE distinguish the digits?",
        commands=["MNIST_HVAE_CNN.py --beta_1 1,2,4,8,16 --beta_2 1,2,4,8,16 --num_samples 0"],
        answer=answers.where_z2_is_empty,
        picture=figures.contact_sheet,
        arrays=figures.grid_arrays("reconstructions.npz"),
        tables=page.beta_tables,
    ),

    # Conditional VAEs.
    "table_cvae": page.Experiment(
        section=page.CVAES,
        question="Do a larger β and a larger η_dec collapse more of a ReLU CVAE?",
        commands=both_objectives(CVAE_BETA) + both_objectives(CVAE_ETA),
        answer=answers.directions,
        picture=figures.over_flags,
    ),
    "figure_cvae_beta": page.Experiment(
        section=page.CVAES,
        question="How strongly are the units of the CVAE collapsed at each β?",
        commands=both_objectives(CVAE_BETA),
        answer=answers.levels_in_use,
        picture=figures.collapse_curves,
        arrays=figures.collapse_arrays,
        numbers_in="table_cvae",
    ),
    "figure_cvae_eta": page.Experiment(
        section=page.CVAES,
        question="How strongly are they collapsed at each η_dec?",
        commands=both_objectives(CVAE_ETA),
        answer=answers.levels_in_use,
        picture=figures.collapse_curves,
        arrays=figures.collapse_arrays,
        numbers_in="table_cvae",
    ),
    "figure_single_digit": page.Experiment(
        section=page.CVAES,
        question="Does the linear theory predict, from the images of one digit, how much z of a "
        "CVAE says about it?",
        commands=DIGITS[:2],
        answer=answers.order_of_digits,
        picture=figures.per_digit,
    ),
    "figure_single_digit_cnn": page.Experiment(
        section=page.CVAES,
        question="Does it predict this for a convolutional CVAE, too?",
        commands=DIGITS[2:],
        answer=answers.order_of_digits,
        picture=figures.per_digit,
    ),
    "table_correlation": page.Experiment(
        section=page.CVAES,
        question="Does the KL of a CVAE fall the better x predicts y?",
        commands=both_objectives(CORRELATION),
        answer=answers.directions,
        picture=figures.over_flags,
    ),

    # Learnable encoder variance.
    "figure_vae_sigma": page.Experiment(
        section=page.VARIANCE,
        question="Does a learnable encoder variance collapse units that a fixed one keeps?",
        commands=VAES,
        answer=answers.learnable_and_fixed,
        picture=figures.sigma_bars,
        tables=page.sigma_tables,
    ),

    # Prediction and training.
    "figure_prediction": page.Experiment(
        section=page.PREDICTION,
        question="Does the closed form predict the trained KL of nonlinear models, from the "
        "training data alone?",
        commands=[
            CVAE_LINEAR,
            HVAE_LINEAR,
            *VAES[:4],
            *LINEAR,
            *DIGITS,
            *both_objectives(CVAE_BETA),
            *both_objectives(CVAE_ETA),
            *both_objectives(CORRELATION),
            HVAE_BETA_1,
            HVAE_BETA_2,
            HVAE_ETA,
        ],
        answer=answers.prediction,
        picture=figures.against_prediction,
        tables=page.prediction_tables,
        is_sweep=False,
        collected=True,
    ),
    "table_fashion": page.Experiment(
        section=page.PREDICTION,
        question="Does the theory's order of collapse hold on Fashion-MNIST, too?",
        commands=[sweep.line for sweep in FASHION],
        answer=answers.order_of_collapse,
        repeated=FASHION,
    ),

    # Beyond the paper.
    "table_remedies": page.Experiment(
        section=page.BEYOND,
        question="Which remedy helps where training collapsed units, and which where the objective "
        "did?",
        commands=remedy_commands(REMEDIED_MODELS),
        answer=answers.remedies,
        tables=page.remedy_tables,
        is_sweep=False,
    ),
    "table_deep": page.Experiment(
        section=page.BEYOND,
        question="Which levels of a Ladder VAE, a DCT-VAE and a DVP-VAE of one size stay in use?",
        commands=[f"{command} --evaluate compression,attack" for command in DEEP],
        answer=answers.deep_models,
        picture=figures.level_bars,
        tables=page.deep_tables,
    ),
    "figure_deep_curves": page.Experiment(
        section=page.BEYOND,
        question="Which of a Ladder VAE, a DCT-VAE and a DVP-VAE of one size is best after 100 "
        "epochs, when the ELBO of the test images stands still?",
        commands=DEEP_SMALL,
        answer=answers.converged_models,
        picture=figures.test_curves,
        arrays=figures.test_curve_arrays,
        tables=page.deep_tables,
    ),
    "table_deep_ablation": page.Experiment(
        section=page.BEYOND,
        question="How much is each published part of the Ladder VAE and the DCT-VAE worth, after "
        "few epochs?",
        commands=[f"{command} --num_epochs 4" for command in ABLATIONS],
        answer=answers.ablation,
    ),
    "figure_bernoulli": page.Experiment(
        section=page.BEYOND,
        question="Does a VAE with Bernoulli pixels collapse at the β that the correlations of the "
        "pixels predict?",
        commands=BERNOULLI,
        answer=answers.collapse_ranges,
        picture=figures.around_threshold,
        tables=page.threshold_tables,
    ),
    "table_deep_why": page.Experiment(
        section=page.BEYOND,
        question="Did the objective or training collapse the levels of the deep models?",
        commands=DEEP_WHY,
        answer=answers.deep_causes,
        tables=page.cause_tables,
    ),
    "figure_delta": page.Experiment(
        section=page.BEYOND,
        question="Does a prior that no posterior can match keep the KL of a VAE with an "
        "autoregressive decoder above δ?",
        commands=[
            "MNIST_VAE_Delta.py --preset small --prior standard",
            "MNIST_VAE_Delta.py --preset small --delta 2,5,10",
        ],
        answer=answers.rates_above_delta,
        picture=figures.delta_bars,
    ),
}


# --------------------------------------------------------------------------------------------- runs

@dataclass
class TheoremResult:
    """What the tables need from the result.json of a matrix script, which checks a theorem.

    settings    the flags that determine the result, {name: value}
    dataset     "synthetic"
    device      name of the device on which the result was computed
    versions    of python, torch and numpy
    seconds     {"minimise": seconds}
    max_error   largest difference between the minimum that was found and the theorem
    theory      the minimum that was found compared with the theorem

    Where code treats all results alike, this class has the attributes of a report.RunResult, too.
    A matrix script trains no network, so it has no metrics.
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
            print(f"{path} is incomplete, so the check is made again ({error!r})", file=sys.stderr)
            return None


class Run:
    """One command line of an experiment, with the flags of this program that it takes.

    command   the command line as the experiment has it
    script    the script's name, without .py
    module    the imported script
    argv      the arguments of the script's main
    settings  the settings that the command line stands for
    data      for each setting a datasets.Data with the name of its data set, or None for a matrix
              script
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
        # Whether the script ended without an answer, as without its data set.
        self.is_refused = False
        self.read()

    @property
    def is_released(self):
        """Whether it trains the objective of the authors' released code."""
        return "--released_objective" in self.argv

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
            # A warm-up takes about the same share of the epochs as in answers.REMEDIES.
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

        With --dataset auto, which is the default, the scripts themselves choose between MNIST and
        the embedded digits. So the results are read from the runs on that data set with more
        finished settings.
        """
        if self.checks_theorem:
            self.data = [None] * len(self.settings)
            results = [TheoremResult.read(f) for f in self.settings]
            self.results = [result for result in results if result is not None]
            return

        self.data = data_of_settings(self.settings, "mnist")
        self.results = self._finished(self.data)
        if getattr(self.settings[0], "dataset", "") != "auto":
            return
        digits = data_of_settings(self.settings, "digits")
        on_digits = self._finished(digits)
        if len(on_digits) > len(self.results):
            self.data = digits
            self.results = on_digits

    def _finished(self, data):
        """The results of the finished settings, where data has the data set of each setting."""
        results = []
        for f, data_of_setting in zip(self.settings, data):
            result = report.RunResult.read(f, data_of_setting)
            if result is not None:
                results.append(result)
        return results

    def make(self):
        """Run the script's main, which skips finished settings, and read the results.

        Returns the script's exit status: 0, or 1 if a setting diverged or a theorem failed.
        """
        status = self.module.main(self.argv)
        self.read()
        return status

    def varying_flags(self):
        """The flags that differ between the settings, except for the seed: {name: values}."""
        return files.varying_flags(self.settings, self.data)

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
        return report.read_examples(files.run_dir(self.settings[i], self.data[i]))

    def grid_dir(self):
        """The folder of the pictures that the script itself draws of its grid."""
        return pictures.grid_dir(self.settings, self.data)


def data_of_settings(settings, auto):
    """For each setting of a script a datasets.Data that has only the name of its data set.

    auto is the data set that --dataset auto stands for. A script without that flag draws its data.
    """
    data = []
    for f in settings:
        name = getattr(f, "dataset", "synthetic")
        data.append(datasets.Data(auto if name == "auto" else name, None, None))
    return data


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


# --------------------------------------------------------------------------- the files of a result

def result_columns(result):
    """The values of one result in its .csv row, {column: number or text}; {} if it diverged."""
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
    for latent, level in (result.headroom or {}).items():
        number = latent.removeprefix("z")
        columns[f"cause_{number}" if number else "cause"] = level.cause()
    levels = [level for level in common.levels(columns) if level]
    if len(levels) > report.MANY_LEVELS:
        columns = join_levels(columns, levels)
        columns["parameters"] = result.parameters
        if result.headroom:
            columns["units from the top"] = units_from_the_top(result.headroom)
    if result.theory is not None:
        columns |= comparison_columns(result.theory)
    if verify.closed_form(result):
        for metric, predicted, _ in verify.linear_pairs(result):
            # The same units are predicted active for AU and AU_kl.
            if not metric.startswith("AU_kl"):
                columns[f"linear {metric}"] = predicted
    for name, curve in result.curves.items():
        columns[f"last epoch {name}"] = curve[-1]
    rise = measurements.rise_at_the_end(result.curves.get("test_elbo", []))
    if rise is not None:
        columns[measurements.RISE_AT_THE_END] = rise
    return columns


def join_levels(columns, levels):
    """The columns of a model with many levels: one for all KLs, one for all active units and so on.

    The other columns of single levels are left out. Every model has the columns about a context, so
    that models with and without one can share a table. A context has no headroom. The levels share
    one residual, so that rho is the same for all of them.
    """
    joined = dict(columns)
    from_the_top = levels[::-1]
    for kind in ("kl", "AU", "AU_kl", "active_share"):
        values = [joined.pop(f"{kind}{level}") for level in from_the_top]
        if kind in ("kl", "AU_kl"):
            texts = [common.format_metric(value) for value in values]
            joined[f"{kind} from the top"] = ", ".join(texts)

    learned = [level for level in from_the_top if f"headroom{level}" in joined]
    for kind in ("headroom", "headroom_any", "cause"):
        texts = []
        for level in learned:
            value = joined.pop(f"{kind}{level}")
            texts.append(value if kind == "cause" else f"{value:.4f}")
        if texts:
            joined[f"{kind} from the top"] = ", ".join(texts)
    for kind in ("rho", "rho_any"):
        values = [joined.pop(f"{kind}{level}") for level in learned]
        if values:
            joined[kind] = values[0]

    for name in ("context_baseline", "error_context"):
        joined[name] = joined.pop(name, "")
    return joined


def units_from_the_top(headrooms):
    """The numbers of units of the levels that have a headroom, as text, the top level first.

    headrooms is {"z1": headroom.LevelHeadroom, ...}. A context is not among them.
    """
    units = {}
    for latent, level in headrooms.items():
        units[int(latent.removeprefix("z"))] = level.units
    return ", ".join(str(units[number]) for number in sorted(units, reverse=True))


def comparison_columns(comparison):
    """How a trained linear model compares with its closed form, {column: number or text}."""
    predicted = comparison.active_units()
    trained = comparison.active_units("trained")
    active = [f"{predicted[level]} -> {trained[level]}" for level in predicted]
    return {
        "active predicted -> trained": ", ".join(active),
        "singular values off": comparison.singular_value_error(),
        "gap": comparison.gap,
        "verdict": "; ".join(comparison.disagreements()) or "as predicted",
    }


def csv_text(runs, earlier_rows=()):
    """The .csv of an experiment: a row per setting and seed, with all digits of each number.

    earlier_rows are the rows of other seeds, {column: text}. They come first for each command.
    """
    rows = []
    for run in runs:
        rows.extend(row for row in earlier_rows if row["command"] == run.command)
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


def rows_of_other_seeds(path, runs):
    """The rows of a .csv file with the commands of these runs and none of their seeds.

    Each is {column: text}. Returns [] without the file.
    """
    if not path.exists():
        return []
    commands = {run.command for run in runs}
    seeds = {str(f.seed) for run in runs for f in run.settings}
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["command"] in commands and row["seed"] not in seeds]


def measured_command(line, rows):
    """The measurements.Command of a command line with these rows."""
    script, *argv = shlex.split(line)
    module = importlib.import_module(script.removesuffix(".py"))
    settings = common.settings_of(module.Flags, argv)
    flags = files.varying_flags(settings, data_of_settings(settings, "mnist"))
    return measurements.Command(line, flags, rows, getattr(settings[0], "num_epochs", None))


# Columns that every row of a .csv file has.
COMMON_COLUMNS = ("command", "dataset", "device", "torch", "seconds", "seed")


def read_all_commands(f):
    """The results in --results_dir: {name: the measurements.Command of each of its commands}."""
    # 1. The results that have rows of their own.
    with_rows = {}
    for name, experiment in EXPERIMENTS.items():
        if not experiment.collected:
            commands = read_commands(f, name)
            if commands is not None:
                with_rows[name] = commands

    # 2. All results, in the order of the page.
    commands_by_name = {}
    for name, experiment in EXPERIMENTS.items():
        if name in with_rows:
            commands_by_name[name] = with_rows[name]
        elif experiment.collected:
            commands = collect_commands(experiment, with_rows)
            if any(command.rows for command in commands):
                commands_by_name[name] = commands
    return commands_by_name


def collect_commands(experiment, commands_by_name):
    """The measurements.Command of each command of a collected result, from the other results.

    If several results have a command, its rows are those of the first one. A command that no result
    has gets no rows.
    """
    commands = []
    for line in experiment.commands:
        matching = []
        for other_commands in commands_by_name.values():
            matching += [command for command in other_commands if command.line == line]
        with_rows = [command for command in matching if command.rows]
        if with_rows:
            commands.append(with_rows[0])
        else:
            commands.append(measured_command(line, []))
    return commands


def with_sources(names):
    """The names of results to make, with each collected one preceded by those that have its rows.

    Each name appears once.
    """
    all_names = []
    for name in names:
        if EXPERIMENTS[name].collected:
            for line in EXPERIMENTS[name].commands:
                all_names.append(first_with_command(line))
        all_names.append(name)
    return list(dict.fromkeys(all_names))


def first_with_command(line):
    """The name of the first result with this command that has rows of its own."""
    for name, experiment in EXPERIMENTS.items():
        if line in experiment.commands and not experiment.collected:
            return name
    raise ValueError(f"no result has rows of its own for the command {line!r}")


def read_commands(f, name):
    """The measurements.Command of each command of a result, from its .csv file.

    None without the file. A file that cannot be read is named on stderr, and then counts as absent.
    """
    path = Path(f.results_dir, f"{name}.csv")
    try:
        rows = measurements.read_rows(path)
        for row in rows:
            for column in COMMON_COLUMNS:
                if column not in row:
                    raise KeyError(f"a row has no {column}")
        commands = []
        for line in EXPERIMENTS[name].commands:
            command_rows = [row for row in rows if row["command"] == line]
            commands.append(measured_command(line, command_rows))
            # Fails if a row is of a setting that the command does not have.
            commands[-1].all_settings()
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        print(f"{path} cannot be read, so the page leaves it out ({error!r})", file=sys.stderr)
        return None
    return commands if any(command.rows for command in commands) else None


def read_arrays(f, name):
    """The content of data/<name>.npz, {name: array}. None if the file is missing or broken.

    A broken file is named on stderr.
    """
    path = Path(f.results_dir, "data", f"{name}.npz")
    if not path.exists():
        return None
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except Exception as error:  # A broken archive raises exceptions of a dozen classes.
        print(f"{path} cannot be read, so its picture is not drawn ({error})", file=sys.stderr)
        return None


def draw_picture(f, name, commands):
    """Draw the picture of a result from its files. Returns whether it has what it needs."""
    experiment = EXPERIMENTS[name]
    if experiment.picture is None:
        return True
    arrays = read_arrays(f, name) if experiment.arrays else {}
    if arrays is None:
        return False
    try:
        experiment.picture(Path(f.results_dir, f"{name}.png"), commands, arrays)
    except (KeyError, IndexError, ValueError) as error:
        source = f"the rows of {name}"
        if experiment.arrays:
            source = Path(f.results_dir, "data", f"{name}.npz")
        print(
            f"{name}: the picture is not drawn, because figures.{experiment.picture.__name__} "
            f"cannot show {source} ({error!r})",
            file=sys.stderr,
        )
    return True


def write_page(f, names_to_draw):
    """Draw the pictures of these results, and write the page, all from the files in a folder."""
    commands_by_name = read_all_commands(f)
    without_arrays = []
    for name, commands in commands_by_name.items():
        if name in names_to_draw and not draw_picture(f, name, commands):
            without_arrays.append(name)
    page.write_page(f.results_dir, EXPERIMENTS, commands_by_name)

    if without_arrays:
        names = ", ".join(without_arrays)
        folder = Path(f.results_dir, "data")
        print(f"not drawn, because {folder} has no arrays for them: {names}", file=sys.stderr)


def write_result(f, name, runs):
    """Write the files of an experiment whose runs are finished, and the page."""
    experiment = EXPERIMENTS[name]
    path = Path(f.results_dir, f"{name}.csv")
    earlier_rows = rows_of_other_seeds(path, runs) if f.add_seeds else []
    # Pictures that show a single seed show the one that the table already had.
    earlier_arrays = (read_arrays(f, name) or {}) if earlier_rows else {}

    # An old picture would not show the new numbers.
    Path(f.results_dir, f"{name}.png").unlink(missing_ok=True)
    files.write_text(path, csv_text(runs, earlier_rows))

    # Old arrays are there until the new ones replace them. After a kill in between, the same
    # command finds the arrays of the earlier seeds again.
    arrays = (experiment.arrays(runs) or {}) if experiment.arrays else {}
    arrays |= earlier_arrays
    arrays_path = Path(f.results_dir, "data", f"{name}.npz")
    if arrays:
        files.write(arrays_path, lambda file: np.savez_compressed(file, **arrays))
    else:
        arrays_path.unlink(missing_ok=True)
    write_page(f, [name, *collected_from(experiment)])
    print(f"written: {Path(f.results_dir, name)}.csv", file=sys.stderr)


def collected_from(experiment):
    """The names of the collected results that may show rows of this experiment."""
    names = []
    for name, other in EXPERIMENTS.items():
        if other.collected and set(other.commands) & set(experiment.commands):
            names.append(name)
    return names


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

    A command that is in no table counts with a mean: that of 60 seconds and of the times of all
    commands in the tables.
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
            f"elapsed {datetime.timedelta(seconds=round(elapsed))}, "
            f"remaining about {datetime.timedelta(seconds=round(left))}: python {run.command}",
            file=sys.stderr,
            flush=True,
        )
        # The script of one command must not wait for the processes that make other commands.
        with processes.alone():
            try:
                return run.make()
            except SystemExit as end:
                # Such as a data set that cannot be fetched. The other commands can be made.
                run.is_refused = True
                print(f"not made: python {run.command}", file=sys.stderr)
                return end.code if isinstance(end.code, int) else 1


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
                f"got {name!r}, wants names of tables and figures: {', '.join(EXPERIMENTS)}",
            )
    if f.page and (names or f.all):
        common.stop(f, "--page takes no names and no --all, since it writes the whole page")
    if f.all:
        names = list(EXPERIMENTS)
    if names or f.page:
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


def warn_of_smaller_tables(f, runs_by_name):
    """Warn of the tables in --results_dir that this command replaces with less.

    That is a table with more seeds or more epochs than the new one has. runs_by_name has the runs
    of each result.
    """
    for name, runs in runs_by_name.items():
        path = Path(f.results_dir, f"{name}.csv")
        try:
            rows = measurements.read_rows(path) if path.exists() else []
            old = {
                "seeds": len({row["seed"] for row in rows}),
                "epochs": max((row.get("num_epochs", 0) for row in rows), default=0),
            }
        except (OSError, KeyError, TypeError, ValueError, csv.Error):
            continue  # A table that cannot be read is named when the page is written.
        settings = [setting for run in runs for setting in run.settings]
        new = {
            "seeds": len({setting.seed for setting in settings}),
            "epochs": max(getattr(setting, "num_epochs", 0) for setting in settings),
        }
        for noun, count in new.items():
            if count < old[noun]:
                print(
                    f"warning: {path} has {old[noun]} {noun}, and this command replaces it with a "
                    f"table of {count}; --results_dir with another folder keeps it",
                    file=sys.stderr,
                )


def check_earlier_tables(f, runs_by_name):
    """End the program if --add_seeds cannot read a table to which it would add rows."""
    for name, runs in runs_by_name.items():
        path = Path(f.results_dir, f"{name}.csv")
        try:
            rows = rows_of_other_seeds(path, runs)
            for run in runs:
                check_same_epochs(f, path, run, rows)
        except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
            common.stop(
                f,
                f"--add_seeds: {path} cannot be read ({error!r}), wants a table of results; "
                "without --add_seeds it is replaced",
            )


def check_same_epochs(f, path, run, rows):
    """End the program if the earlier rows of a run's command have other epochs than the run.

    rows are a result of `rows_of_other_seeds` for the table at the path.
    """
    own = getattr(run.settings[0], "num_epochs", None)
    for row in rows:
        epochs = row.get("num_epochs")
        if row["command"] == run.command and own is not None and epochs != str(own):
            common.stop(
                f,
                f"--num_epochs: {path} has {epochs} epochs for python {run.command}, and this "
                f"command has {own}; --add_seeds wants the same number",
            )


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


def main(argv=None):
    f, seeds, names = parse_command_line(argv)
    if f.page:
        write_page(f, EXPERIMENTS)
        print(f"written: {Path(f.results_dir, 'README.md')}", file=sys.stderr)
        return 0
    if not names:
        print_list(f, seeds)
        return 0

    # 1. What there is to do.
    runs_by_name = {}
    for name in with_sources(names):
        # The page with a collected result is written when the results that have its rows are made.
        if not EXPERIMENTS[name].collected:
            runs_by_name[name] = [Run(command, f, seeds) for command in EXPERIMENTS[name].commands]
    if f.add_seeds:
        check_earlier_tables(f, runs_by_name)
    else:
        warn_of_smaller_tables(f, runs_by_name)
    # Several results may need the same command.
    all_runs = list({run.command: run for runs in runs_by_name.values() for run in runs}.values())
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
    progress = CommandProgress(costs)
    made = {}
    for name, runs in runs_by_name.items():
        for run in runs:
            if run.command in made:
                run.is_refused = made[run.command].is_refused
                run.read()
                continue
            made[run.command] = run
            status = max(status, progress.make(run))
        if any(run.is_refused for run in runs):
            print(f"not written: {Path(f.results_dir, name)}.csv", file=sys.stderr)
            continue
        write_result(f, name, runs)
    return status


if __name__ == "__main__":
    common.run(main)
