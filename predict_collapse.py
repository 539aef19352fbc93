"""Predict which latent units would collapse on your data, and which beta keeps a given number of
them active. After training, say why units of your VAE collapsed, and what to change. Nothing is
trained here: the answers are closed forms.

    python predict_collapse.py --x features.npy --eta_dec 0.5 --active 12
    python predict_collapse.py --x table.csv --drop id --loss mse_mean --kl_weight 0.01,0.1,1
    python predict_collapse.py --x images/ --scale --loss bce_sum
    python predict_collapse.py --x features.npy --eta_dec learned --d_1 16
    python predict_collapse.py --model cvae --x inputs.npy --y targets.npy --beta 0.5,1,2
    python predict_collapse.py --model hvae --dataset mnist --eta_enc 0.5 --eta_dec 0.5
    python predict_collapse.py --dataset mnist --likelihood bernoulli --beta 1,4,10
    python predict_collapse.py --x u.npy --residual r.npy --mean mu.npy --log_var logvar.npy \
        --loss mse_mean
    python predict_collapse.py --x u.npy --residual r.npy --likelihood bernoulli --fisher h.npy \
        --beta 1 --collapsed 9

The data are the rows of a file (.npy, .npz, .csv, .tsv or .pt), a folder of images, or a data set
of images. Predictions depend on the data only through their first and second moments, except for
the loss of a collapsed Poisson model.

The loss is given either in the terms of the theory (--likelihood, --eta_dec, --beta) or as PyTorch
spells it (--loss, --kl_weight, --kl_reduction). losses.py translates the latter.

With a Gaussian decoder, the predictions describe a linear VAE, CVAE or two-level HVAE at its
optimum (Dang et al. 2024, arXiv 2306.05023, theorems 1, 2, 3 and 5). A VAE may also learn eta_dec.
By default they describe models with biases for files, and models without biases, like those of the
linear scripts, for --dataset. --center true or --center false chooses.

With a Bernoulli, categorical or Poisson decoder, the predictions describe a VAE with any encoder
and any decoder whose logits or log rates have a bias for each column. They say from which beta on
its collapse is stable, and how many nats --d_1 units gain at least below it.

With --residual the script does a post-mortem instead. It decides whether the objective or training
collapsed the units of a VAE that you have trained, which need not be linear, and names a remedy.

This file has the flags, the checks of flags that do not go together, and main. arrays.py reads the
data, losses.py translates losses, linear_prediction.py predicts for Gaussian decoders, stability.py
for other decoders, and post_mortem.py does the post-mortem. The theory is in theory.py and
headroom.py.
"""
from dataclasses import dataclass

import common

import arrays
import headroom
import linear_prediction
import losses
import post_mortem
import stability
from linear_prediction import learns_eta_dec

# The limits of a std. The square of a number between them is neither 0 nor infinite in float64.
# Numbers in a file have the same upper limit.
SMALLEST = 1e-100
LARGEST = arrays.LARGEST

# The upper limit of sigma, which is rounded to float32.
LARGEST_SIGMA = 1e38

# The largest number of units. Units beyond the columns of the data are always collapsed.
MAX_UNITS = 10_000


@dataclass
class Flags(common.BaseFlags):
    epilog = (
        "The value of a flag that takes a number may be a list such as 0.1,0.5,1.0 or a range "
        "first:last:step such as 0.1:5.0:0.1, which includes its last value. Every combination is "
        "reported."
    )

    # These are no flags: all arithmetic is in float64 on the CPU, and --columns chooses data.
    device = "cpu"
    data_flags = ("columns",)

    x: str = common.flag(
        "",
        "file (.npy, .npz, .csv, .tsv or .pt) with one example per row, or folder of images; "
        "FILE:NAME chooses an array of an .npz or .pt file; examples of more than one dimension "
        "are flattened",
        metavar="FILE",
    )
    y: str = common.flag(
        "", "file with the targets of a CVAE, one row for each row of --x", metavar="FILE"
    )
    dataset: str = common.flag(
        "none",
        "data set whose training images replace --x; for a CVAE, x is a quarter of each image and "
        "y the rest; --likelihood bernoulli makes the pixels binary; --loss bce_sum and bce_mean "
        "do not",
        choices=("none", "mnist", "fashion", "digits"),
    )
    data_dir: str = common.flag("data", "folder that holds the data sets", metavar="FOLDER")
    columns: str = common.flag(
        "",
        "columns of --x to use, such as age,size or 0,3,4: names from the first line of a text "
        "file, or numbers that count from 0",
        metavar="NAMES",
    )
    drop: str = common.flag(
        "", "columns of --x to leave out, such as id, named as for --columns", metavar="NAMES"
    )
    missing: str = common.flag(
        "refuse",
        "what to do with rows that have a missing cell: refuse the file, or drop the rows",
        choices=("refuse", "drop"),
        single=True,
    )
    scale: bool = common.flag(
        False, "divide the numbers of --x and --y by 255, for pixels from 0 to 255", single=True
    )
    center: str = common.flag(
        "auto",
        "whether to subtract the mean of each column, which a model with biases learns; auto means "
        "true for files, and false for --dataset, because the linear scripts of this project have "
        "no biases; only for a Gaussian decoder",
        choices=("auto", "true", "false"),
    )
    model: str = common.flag("vae", "kind of linear model", choices=("vae", "cvae", "hvae"))
    likelihood: str = common.flag(
        "gaussian",
        "kind of decoder of a VAE; apart from gaussian, it wants columns of numbers from 0 to 1 "
        "(bernoulli), of category codes (categorical) or of counts (poisson)",
        choices=headroom.LIKELIHOODS,
        single=True,
    )
    loss: str = common.flag(
        "none",
        "the reconstruction loss of a VAE as PyTorch names it, with the reduction over the "
        "columns; it replaces --likelihood, --eta_dec and --beta, except that --residual with "
        "gaussian_nll also wants the learned --eta_dec; a CVAE before training takes only mse_mean "
        "and mse_sum",
        choices=("none", *losses.LOSSES),
        single=True,
    )
    kl_weight: float = common.flag(
        1.0, "weight of the KL beside --loss", above=0, high=LARGEST
    )
    kl_reduction: str = common.flag(
        "sum",
        "whether the KL beside --loss is the sum over the units, or the mean over --d_1 units",
        choices=("sum", "mean"),
        single=True,
    )
    beta: float = common.flag(
        1.0, "weight of the KL in the loss of a VAE or CVAE", above=0, high=LARGEST
    )
    beta_1: float = common.flag(
        1.0,
        "weight of E_q[log q(z1|x) - log p(z1|z2)] in the loss of an HVAE",
        above=0,
        high=LARGEST,
    )
    beta_2: float = common.flag(
        1.0, "weight of KL(q(z2|z1) || p(z2)) in the loss of an HVAE", above=0, high=LARGEST
    )
    eta_enc: float = common.flag(
        1.0, "standard deviation of the prior p(z), in an HVAE p(z2)", above=SMALLEST, high=LARGEST
    )
    eta_dec: float = common.flag(
        1.0,
        "standard deviation of a Gaussian decoder, in an HVAE of p(x|z1) and p(z1|z2); learned "
        "means that a VAE learns it together with its weights",
        above=SMALLEST,
        high=LARGEST,
        word="learned",
    )
    sigma: float = common.flag(
        0.0,
        "standard deviation of the encoder of a VAE or CVAE if it is fixed; 0 means that it is "
        "learnable",
        low=0,
        high=LARGEST_SIGMA,
    )
    sigma_1: float = common.flag(
        0.5,
        "standard deviation of the encoder q(z1|x) of an HVAE, which is fixed",
        above=SMALLEST,
        high=LARGEST,
    )
    sigma_2: float = common.flag(
        0.0,
        "standard deviation of the encoder q(z2|z1) of an HVAE if it is fixed; 0 means that it is "
        "learnable",
        low=0,
        high=LARGEST,
    )
    d_1: int = common.flag(
        0,
        "number of units of z, in an HVAE of z1; 0 means one unit for each mode of the data",
        low=0,
        high=MAX_UNITS,
    )
    d_2: int = common.flag(
        0, "number of units of z2 of an HVAE; 0 means as many as z1 has", low=0, high=MAX_UNITS
    )
    residual: str = common.flag(
        "",
        "file with the targets of a trained model minus its reconstructions, one row for each row "
        "of --x, which then has the inputs of its encoder; a reconstruction is the decoder's mean "
        "(for bernoulli the probability of a 1, for poisson the rate), averaged over many draws of "
        "z",
        metavar="FILE",
    )
    fisher: str = common.flag(
        "",
        "file with the Fisher information of each column under a trained model, for --residual "
        "with another --likelihood than gaussian; p (1 - p) for bernoulli and the rate for "
        "poisson, either the means over all rows, or one row for each row of --x",
        metavar="FILE",
    )
    mean: str = common.flag(
        "",
        "file with the means of the posterior q(z|x) of a trained model, one row for each row of "
        "--x; with --log_var, the collapsed units are counted",
        metavar="FILE",
    )
    log_var: str = common.flag(
        "",
        "file with the logarithms of the variances of q(z|x), with the shape of --mean",
        metavar="FILE",
    )
    collapsed: int = common.flag(
        0,
        "number of collapsed units of the trained model, for --residual without --mean and "
        "--log_var",
        low=0,
        high=MAX_UNITS,
    )
    active: int = common.flag(
        0,
        "number of units to keep active, for which beta is recommended; in an HVAE these are units "
        "of z2, and beta_2 is recommended; 0 asks for no recommendation",
        low=0,
    )
    out_dir: str = common.flag("runs", "folder for the results", metavar="FOLDER")


# --- Flags that do not go together, and main ---

def check_prediction_flags(settings):
    """End the program if flags of a prediction do not go together."""
    f = settings[0]
    for name in ("collapsed", "fisher", "mean", "log_var"):
        if any(getattr(g, name) for g in settings):
            common.stop(
                f, f"--{name}: also wants --residual, a file with the residuals of a trained model"
            )
    if f.dataset == "none" and not f.x:
        common.stop(
            f, "--x: got no file, wants one with an example per row; or give --dataset for images"
        )
    if f.dataset != "none":
        post_mortem.refuse_flags(
            settings, ("x", "columns", "drop", "missing", "scale"), f"--dataset {f.dataset}"
        )
    if f.likelihood != "gaussian":
        check_likelihood_flags(settings)
    if f.model == "cvae" and not f.y and f.dataset == "none":
        common.stop(f, "--y: got no file, wants one with the targets for --model cvae")
    if f.model != "cvae" and f.y and f.dataset == "none":
        common.stop(f, f"--y: cannot be combined with --model {f.model}, which has no targets")
    if any(learns_eta_dec(g) for g in settings):
        check_learned_eta_dec(settings)


def check_likelihood_flags(settings):
    """End the program if flags of a prediction do not go with a decoder that is not Gaussian."""
    f = settings[0]
    decoder = losses.decoder_flag(f)
    other_models = [g.model for g in settings if g.model != "vae"]
    if other_models:
        common.stop(f, f"--model: got {other_models[0]}, wants vae for {decoder}")
    post_mortem.refuse_flags(
        settings, post_mortem.GAUSSIAN_FLAGS, f"{decoder}, which has no such number"
    )
    post_mortem.refuse_flags(
        settings, ("active", "center"), f"{decoder}, only with a Gaussian decoder"
    )
    if f.likelihood != "bernoulli":
        post_mortem.refuse_flags(settings, ("scale",), decoder)
    if f.dataset != "none" and f.likelihood != "bernoulli":
        common.stop(
            f,
            f"--dataset: cannot be combined with {decoder}; images are for gaussian or bernoulli",
        )


def check_learned_eta_dec(settings):
    """End the program if other flags do not go with a learned eta_dec."""
    for g in settings:
        if g.model != "vae":
            common.stop(g, f"--eta_dec: got learned, wants a number for --model {g.model}")
        if g.sigma:
            common.stop(g, "--sigma: cannot be combined with --eta_dec learned")


def with_beta_of_residual(settings):
    """The settings of a post-mortem with the beta of their --loss, which is printed in words."""
    f = settings[0]
    if f.loss == "none":
        return settings
    columns = arrays.open_file(f, "residual").columns
    counted_units = arrays.open_file(f, "mean").columns if f.mean else 0

    known = []
    for g in settings:
        units = counted_units or g.d_1
        known.append(losses.with_beta(g, columns, units))
        print(losses.in_words(known[-1:], columns, units))
    return known


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    losses.check_flags(settings)
    settings = [losses.with_likelihood(f) for f in settings]
    if settings[0].residual:
        post_mortem.check_flags(settings)
        settings = with_beta_of_residual(settings)
        for result in post_mortem.examine(settings):
            post_mortem.report(result)
        return 0

    check_prediction_flags(settings)
    if settings[0].likelihood == "gaussian":
        for prediction in linear_prediction.predict(settings):
            linear_prediction.report_prediction(prediction)
    else:
        for prediction in stability.predict_stability(settings):
            stability.report_stability(prediction)
    return 0


if __name__ == "__main__":
    common.run(main)
