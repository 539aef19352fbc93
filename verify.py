"""Compare models with the closed forms of theory.py.

The file has these parts, in this order:

    Trained and predicted     `Comparison`, the record of a model and its closed form
    What the loss determines  what an error of a singular value costs, and how curved the loss is
    Units of a linear model   its singular values, stds and KL terms, measured on its weights
    A trained linear model    its comparison with its own closed form
    The linear twin           the comparison of any other model with the closed form of its twin
    A table of units          what the scripts print about each unit
    Minimisation              L-BFGS and Newton's method
    The check of a theorem    `verify`, which the matrix scripts call
"""
import copy
import dataclasses
import math
import sys
import time
from dataclasses import dataclass

import common
import numpy as np
import torch

import files
import processes
import theory

# Random starts from which `verify` minimises a loss.
STARTS = 8

# A trained model may differ from its closed form by this much. The first is an error of a singular
# value, as a share of the largest predicted one. The second is the gap of the loss, in nats.
ALLOWED_ERROR = 0.02
ALLOWED_GAP = 0.05

# A larger error of a singular value does not count if it costs at most this, in nats, because the
# loss then hardly determines the value. In a unit far from its threshold, an error of 2 % of omega
# costs about 0.02^2 beta = 4e-4 beta nats, and half of that in an HVAE. So for beta >= 1/4, or
# beta_2 >= 1/2, it counts there.
ALLOWED_COST = 1e-4

# Such an error counts nevertheless if the gap of the loss is above this, in nats.
ALLOWED_GAP_IF_FLAT = theory.ACTIVE

# Units whose beta differs from their threshold by this share are at it, or near it.
AT_THRESHOLD = 1e-6
NEAR_THRESHOLD = 0.1

# The largest error with which `verify` calls a theorem verified: of any singular value or std in
# its own unit, of any KL term, information or loss in nats.
TOLERANCE = 1e-6

# Sums of a loss have rounding errors of about this share of it.
ROUNDING = 32 * torch.finfo(torch.float64).eps

# Predicted numbers above this have rounding errors larger than TOLERANCE.
MAX_PREDICTED = TOLERANCE / torch.finfo(torch.float64).eps

# Above this information, in nats, lambda^2 / sigma^2 exceeds MAX_PREDICTED. The second moment of z
# is lambda^2 + sigma^2. Rounding then removes sigma^2 from this sum.
MAX_INFORMATION = math.log(MAX_PREDICTED) / 2

# A loss above this, in nats, has rounding errors larger than 1 nat.
MAX_LOSS = 1 / torch.finfo(torch.float64).eps

# The largest number of parameters that `verify` minimises over. `newton` needs their Hessian, and
# with this many it takes 2 GB.
MAX_PARAMETERS = 5_000

# The largest amount of data of a setting, in numbers of 8 bytes. Drawing it takes three times this.
MAX_DATA = 50_000_000

# Newton's method takes a curvature below this share of the largest one for 0, as it is along
# rotations of the units. It first uses the larger share. Steps along nearly flat directions would
# be too long until it is near the minimum. Then it uses the smaller one, because the curvature is
# small near a threshold of collapse, too. Rounding errors of a Hessian are still smaller.
FLAT_CURVATURES = (1e-9, 1e-12)

# The sentence above the tables of the matrix scripts.
PAIRS = (
    'In a pair "theorem -> brute force", the theorem gives the first value, and the minimisation '
    "finds the second."
)

# Rows of a split that `in_float64` passes to a model at a time.
CHUNK_ROWS = 2048


# --- Trained and predicted ---


@dataclass
class Limits:
    """When an error of a singular value counts as a difference from the closed form.

    An error up to `error`, in the unit of the singular value, does not count. A larger one does
    not count either if two things hold: it costs at most `cost` nats, and the loss is at most `gap`
    nats from the optimal loss.
    """

    error: float
    cost: float
    gap: float


@dataclass
class Deviation:
    """A singular value whose error is above the limit.

    name:      the quantity, such as "omega_2"
    unit:      the number of the unit, from 1
    error:     |trained - predicted|
    cost:      the nats by which this error alone raises the loss: the least loss of the unit with
               this singular value, minus its loss at the optimum. None if the units of the closed
               form depend on each other.
    curvature: the second derivative of this least loss at the predicted value, in nats per squared
               unit of the singular value; None where the cost is None
    to_threshold: |beta / threshold - 1|, where the threshold is the beta at which the unit
               collapses; None if the unit collapses at every beta, or at none
    """

    name: str
    unit: int
    error: float
    cost: float | None
    curvature: float | None
    to_threshold: float | None

    @property
    def level(self):
        """The suffix of the level, "", "_1" or "_2"."""
        return self.name.removeprefix("lambda").removeprefix("omega")

    def place(self):
        """Whether the unit is "at" its threshold, "near" it, or "far" from it."""
        if self.to_threshold is None or self.to_threshold > NEAR_THRESHOLD:
            return "far"
        return "near" if self.to_threshold > AT_THRESHOLD else "at"


@dataclass
class Comparison:
    """The comparison of a linear model with its closed form.

    predicted:     {name: list with a number per unit} of the closed form, see theory.py. None
                   means that the unit never collapses.
    trained:       the same quantities of the model, where it has them, see `compare`
    errors:        {name: the largest |trained - predicted| of a unit}, for each name in trained
    optimal_loss:  the least loss by the closed form, in nats per row
    loss:          the model's loss on the rows of the closed form, in nats per row
    gap:           loss - optimal_loss
    importance_sampling: None, or a dict about p(x) by importance sampling on the test split.
                   "mean_ratio" is the mean of the sampled p(x) / the exact p(x), whose expectation
                   is 1. "standard_error" is the standard error of this mean. "rounding" is the
                   part of the ratio that rounding can cause.
    limits:        when an error of a singular value counts: a Limits. None, like the deviations, in
                   files of earlier versions.
    deviations:    the singular values whose errors are above limits.error, a list of Deviation

    dataclasses.asdict gives a dict that JSON can hold, and Comparison(**dict) reads it back.
    """

    predicted: dict
    trained: dict
    errors: dict
    optimal_loss: float
    loss: float
    gap: float
    importance_sampling: dict | None = None
    limits: Limits | None = None
    deviations: list | None = None

    def __post_init__(self):
        # Files have dicts in place of the classes.
        if isinstance(self.limits, dict):
            self.limits = Limits(**self.limits)
        if self.deviations is not None:
            self.deviations = [
                Deviation(**deviation) if isinstance(deviation, dict) else deviation
                for deviation in self.deviations
            ]

    def active_units(self, which="predicted"):
        """The number of active units of each level, {"_1": 5, "_2": 3}; {"": 5} for one level.

        which: "predicted" or "trained"
        """
        units = {"predicted": self.predicted, "trained": self.trained}[which]
        counts = {}
        for level in theory.levels_of(self.predicted):
            informations = units[f"information{level}"]
            counts[level] = sum(information > theory.ACTIVE for information in informations)
        return counts

    def singular_value_error(self):
        """The largest error of a singular value, as a share of the largest predicted one.

        Singular values are the lambda and omega of all levels. If all predicted ones are 0, this
        is the largest error itself.
        """
        names = singular_values_of(self.errors)
        return max(self.errors[name] for name in names) / self._scale()

    def _scale(self):
        """The largest predicted singular value; 1 if all are 0."""
        names = singular_values_of(self.errors)
        return max(max(self.predicted[name]) for name in names) or 1.0

    def flat_deviations(self):
        """The deviations that do not count, because the loss does not determine these values."""
        return [deviation for deviation in self.deviations or [] if not self._counts(deviation)]

    def _counts(self, deviation):
        """Whether a deviation is a difference between the model and the closed form."""
        is_cheap = deviation.cost is not None and deviation.cost <= self.limits.cost
        return not (is_cheap and abs(self.gap) <= self.limits.gap)

    def determined_error(self):
        """The largest error of any quantity, without the singular values of `flat_deviations`."""
        flat = {(deviation.name, deviation.unit) for deviation in self.flat_deviations()}
        largest = 0.0
        for name in self.errors:
            pairs = zip(self.predicted[name], self.trained[name])
            for unit, (predicted, trained) in enumerate(pairs, 1):
                if (name, unit) not in flat:
                    largest = max(largest, abs(trained - predicted))
        return largest

    def disagreements(self):
        """Sentences about how the model differs from the closed form; [] for a trained optimum."""
        sentences = []
        error = self._largest_error_that_counts()
        if error > ALLOWED_ERROR:
            sentences.append(
                f"the largest error of a singular value is {error:.1%} of the largest predicted "
                f"one, and at most {ALLOWED_ERROR:.0%} is allowed"
            )
        if not self.gap > -1e-6:
            sentences.append(
                f"the loss is {-self.gap:.2g} nats below the optimal loss, which no model can reach"
            )
        elif not self.gap < ALLOWED_GAP:
            sentences.append(
                f"the loss is {self.gap:.3f} nats above the optimal loss, and at most "
                f"{ALLOWED_GAP} nats are allowed"
            )
        for level in theory.levels_of(self.predicted):
            sentences.extend(self._wrong_units_in_words(level))
        if self._sampling_is_off():
            sentences.append(
                f"the sampled p(x) is {self.importance_sampling['mean_ratio']:.4f} times the exact "
                "p(x), more than three standard errors away from 1: q is narrower than the true "
                "posterior, and the draws are too few"
            )
        return sentences

    def _largest_error_that_counts(self):
        """The largest error of a singular value that counts, as a share of the largest one."""
        if self.deviations is None:
            return self.singular_value_error()
        errors = [deviation.error for deviation in self.deviations if self._counts(deviation)]
        return max(errors, default=0.0) / self._scale()

    def _wrong_units_in_words(self, level):
        """At most two sentences: which units are active although predicted to be collapsed.

        The other sentence has the units that are collapsed although predicted to be active.
        """
        states = {"active": [], "collapsed": []}
        for unit in self._wrong_units(level):
            is_active = self.trained[f"information{level}"][unit - 1] > theory.ACTIVE
            states["active" if is_active else "collapsed"].append(unit)

        sentences = []
        for state, predicted in (("collapsed", "active"), ("active", "collapsed")):
            units = states[state]
            if units:
                verb = "is" if len(units) == 1 else "are"
                sentences.append(
                    f"{_units_in_words(units, level)} {verb} {state}, but predicted to be "
                    f"{predicted}"
                )
        return sentences

    def _wrong_units(self, level):
        """The numbers, from 1, of the units that are active and should not be, or the reverse.

        Units near their threshold do not count: a small error changes whether they are active.
        """
        wrong = []
        predicted = self.predicted[f"information{level}"]
        trained = self.trained[f"information{level}"]
        for i in range(len(predicted)):
            at_threshold = 0 < predicted[i] < 2 * theory.ACTIVE
            differs = (predicted[i] > theory.ACTIVE) != (trained[i] > theory.ACTIVE)
            if differs and not at_threshold:
                wrong.append(i + 1)
        return wrong

    def _sampling_is_off(self):
        """Whether importance sampling is further from the exact p(x) than chance and rounding."""
        sampling = self.importance_sampling
        if sampling is None:
            return False
        allowed = 3 * sampling["standard_error"] + sampling["rounding"]
        return abs(sampling["mean_ratio"] - 1) > allowed

    def flat_units_in_words(self):
        """Sentences about the errors that do not count, see `flat_deviations`; [] without any.

        A sentence has the units of one level that are at, near, or far from their thresholds.
        """
        groups = {}
        for deviation in self.flat_deviations():
            groups.setdefault((deviation.level, deviation.place()), []).append(deviation)

        sentences = []
        for (level, place), deviations in groups.items():
            numbers = sorted({deviation.unit for deviation in deviations})
            units = _units_in_words(numbers, level)
            if place == "far":
                beginning = f"the loss hardly depends on the singular values of {units}"
            else:
                verb, their = ("is", "its") if len(numbers) == 1 else ("are", "their")
                beginning = (
                    f"{units} {verb} {place} the threshold of collapse, so the loss hardly depends "
                    f"on {their} singular values"
                )
            error = max(deviation.error for deviation in deviations)
            cost = max(deviation.cost for deviation in deviations)
            curvature = min(deviation.curvature for deviation in deviations) * self._scale()**2
            sentences.append(
                f"{beginning}: errors of up to {error:.2g} ({100 * error / self._scale():.2g}% of "
                f"the largest one) cost at most {cost:.2g} nats (curvature {curvature:.2g} nats), "
                "so they do not count"
            )
        return sentences

    def notes(self):
        """Sentences about parts of the predicted optimum that are not unique, or surprising.

        The last ones are about errors that do not count, see `flat_units_in_words`.
        """
        sentences = []
        theta = self.predicted["theta"]
        for i in range(len(theta) - 1):
            if theta[i] > 0 and theta[i] - theta[i + 1] < 1e-9 * theta[0]:
                sentences.append(
                    f"units {i + 1} and {i + 2} have the same theta, so each may describe any "
                    "mixture of their two modes"
                )
        if theta[-1] == 0:
            sentences.append(
                f"theta is 0 from unit {theta.index(0.0) + 1} on, because the data has no more "
                "modes"
            )
        if "lambda_1" in self.predicted:
            pairs = zip(self.predicted["lambda_1"], self.predicted["omega_2"])
            if any(lambda_1 == 0 < omega_2 for lambda_1, omega_2 in pairs):
                sentences.append(
                    "where lambda_1 = 0 < omega_2, z2 describes only the noise of z1"
                )
        return sentences + self.flat_units_in_words()


def _units_in_words(units, level):
    """Units of a level as text, such as "unit 2 of z" or "units 1, 3-5 of z2"."""
    noun = "unit" if len(units) == 1 else "units"
    return f"{noun} {_ranges_in_words(units)} of z{level.removeprefix('_')}"


def _ranges_in_words(numbers):
    """Ascending whole numbers as text, such as "1, 3-5"."""
    ranges = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(
        str(first) if first == last else f"{first}-{last}" for first, last in ranges
    )


def singular_values_of(names):
    """Those of the names that are singular values: the lambda and omega of all levels."""
    return [name for name in names if name.startswith(("lambda", "omega"))]


def compare(predicted, trained, loss, limits=None):
    """The Comparison of a closed form with a model.

    predicted: {name: (d,)} and "loss", a 0-d tensor: a closed form of theory.py for one setting
    trained:   {name: (d,)}, the same quantities of the model, such as from `vae_units`
    loss:      the model's loss in nats, a number
    limits:    when an error of a singular value counts, a Limits; those of a trained model if None

    Which unit of a model describes which mode is arbitrary. So each quantity's trained values are
    matched with its predicted ones by size: the largest with the largest, and so on.
    """
    matched = {}
    errors = {}
    for name in trained:
        if name not in predicted:
            continue
        order = predicted[name].argsort(descending=True, stable=True)
        matched[name] = torch.empty_like(predicted[name])
        matched[name][order] = trained[name].sort(descending=True).values
        errors[name] = (matched[name] - predicted[name]).abs().max().item()

    optimal_loss = predicted["loss"].item()
    comparison = Comparison(
        predicted=per_unit(predicted),
        trained={name: values.tolist() for name, values in matched.items()},
        errors=errors,
        optimal_loss=optimal_loss,
        loss=loss,
        gap=loss - optimal_loss,
    )

    if limits is None and singular_values_of(errors):
        limits = Limits(
            error=ALLOWED_ERROR * comparison._scale(),
            cost=ALLOWED_COST,
            gap=ALLOWED_GAP_IF_FLAT,
        )
    comparison.limits = limits
    comparison.deviations = deviations_of(predicted, matched, limits)
    return comparison


def per_unit(predicted):
    """A closed form's quantities per unit as lists, {name: [...]}, for JSON.

    None replaces inf, which means that a unit never collapses.
    """
    lists = {}
    for name, values in predicted.items():
        if name != "loss":
            lists[name] = [None if value == math.inf else value for value in values.tolist()]
    return lists


# --- What the loss determines ---

# The loss of a linear model with the singular values s_1, s_2, ... of one map, such as its decoder,
# is at least the optimal loss plus the sum over the units of what their s_i cost. Here the cost of
# s_i is the least loss of unit i with this singular value, minus the least loss of unit i. So an
# error of a singular value shows in the gap of the loss if its cost does.


def deviations_of(predicted, trained, limits):
    """The singular values whose errors are above the limit, a list of Deviation.

    predicted: as in `compare`. Without the loss of a unit, all costs are None.
    trained:   {name: (d,)}, in the order of the units
    limits:    a Limits
    """
    deviations = []
    for name in singular_values_of(trained):
        error = (trained[name] - predicted[name]).abs()
        units = (error > limits.error).nonzero()[:, 0].tolist()
        if not units:
            continue

        costs, curvatures = _costs_and_curvatures(predicted, name, trained[name])
        for unit in units:
            deviation = Deviation(
                name=name,
                unit=unit + 1,
                error=error[unit].item(),
                cost=costs[unit],
                curvature=curvatures[unit],
                to_threshold=None,
            )
            deviation.to_threshold = _distance_to_threshold(predicted, deviation)
            deviations.append(deviation)
    return deviations


def _costs_and_curvatures(predicted, name, trained):
    """What each trained value of a singular value costs, and the curvature at the predicted one.

    Returns two lists with a number per unit. Both numbers are None where the closed form does not
    have the loss of the unit, or where one of them is not finite.
    """
    costs = [None] * len(trained)
    curvatures = [None] * len(trained)
    if name not in getattr(predicted, "coordinates", ()) or predicted.unit_loss is None:
        return costs, curvatures

    names, optimum = _coordinates(predicted)
    held = names.index(name)
    # Units of z2 beyond those of z1 describe no mode.
    count = min(len(trained), optimum.shape[1])
    values = optimum[held].clone()
    values[:count] = trained[:count]

    def loss(point):
        return predicted.unit_loss(dict(zip(names, point)))

    try:
        least = least_unit_loss(loss, optimum, held, values)
        curvature = unit_curvature(loss, optimum, held)
    except torch.linalg.LinAlgError:
        # Numbers so extreme that a Hessian has no eigenvectors.
        return costs, curvatures
    # The prediction of a wrong closed form is no minimum, so the difference can be negative.
    cost = (least - loss(optimum)).abs()

    for unit in range(count):
        if cost[unit].isfinite() and curvature[unit].isfinite():
            costs[unit] = cost[unit].item()
            curvatures[unit] = curvature[unit].item()
    return costs, curvatures


def _coordinates(predicted):
    """The coordinates of the units at a theory.Optimum: their names, and their values (k, d).

    d is the number of modes. Where z2 has fewer units, ones fill the place of the others, whose
    values do not matter.
    """
    names = list(predicted.coordinates)
    d = len(predicted["theta"])
    rows = []
    for name in names:
        values = predicted[name][:d]
        rows.append(torch.nn.functional.pad(values, (0, d - len(values)), value=1.0))
    return names, torch.stack(rows)


def _distance_to_threshold(predicted, deviation):
    """|beta / collapse - 1| of the unit of a deviation; None if it is unknown or not finite."""
    beta = getattr(predicted, "beta", None)
    if beta is None:
        return None
    collapse = predicted[f"collapse{deviation.level}"][deviation.unit - 1].item()
    if not 0 < collapse < math.inf:
        return None
    return abs(beta.item() / collapse - 1)


def least_unit_loss(loss, optimum, held, values, steps=30):
    """The loss of each unit, (d,), minimised over all its coordinates except one, which is held.

    loss:    a function of the coordinates (k, ..., d) of d units that gives their losses (..., d)
    optimum: the coordinates (k, d) at which the minimisation starts
    held:    the index of the coordinate that is held
    values:  (d,), the values at which it is held

    Newton's method runs for all units at once, as `newton` does for the weights of a whole model.
    A result can lie above the minimum, but not below it.
    """
    k, d = optimum.shape
    free = [i for i in range(k) if i != held]
    # The loss is the same for both signs of a collapsed unit's singular values. So its slope at 0
    # is 0, and the minimisation would not leave 0 where another value is better.
    point = torch.where(optimum == 0, 1e-3, optimum)
    point[held] = values

    # The first length leaves a unit where it is.
    lengths = torch.cat([torch.zeros(1), 0.5 ** torch.arange(0.0, 20.0, 2.0)]).double()
    for _ in range(steps):
        gradient, hessian = _unit_derivatives(loss, point)
        step = torch.zeros_like(point)
        step[free] = _unit_newton_step(gradient[:, free], hessian[:, free][:, :, free]).T
        # The coordinates after each length of the step, (k, lengths, d).
        trials = point[:, None] - lengths[:, None] * step[:, None]
        best = loss(trials).nan_to_num(nan=math.inf).argmin(0)
        point = trials[:, best, torch.arange(d)]
        if not best.any():
            break
    return loss(point)


def unit_curvature(loss, optimum, held):
    """The second derivative of the least loss of each unit by one of its coordinates, (d,).

    The other coordinates follow the minimum. With the Hessian H of a unit's loss, the coordinate s
    and the other coordinates r, this is H_ss - H_sr H_rr^+ H_rs. For the singular values of a unit
    at its threshold of collapse it is 0.

    The arguments are those of `least_unit_loss`.
    """
    free = [i for i in range(len(optimum)) if i != held]
    _, hessian = _unit_derivatives(loss, optimum)
    mixed = hessian[:, free, held]
    inverse = torch.linalg.pinv(hessian[:, free][:, :, free], hermitian=True)
    response = (inverse @ mixed[:, :, None])[:, :, 0]
    return hessian[:, held, held] - (mixed * response).sum(1)


def _unit_derivatives(loss, point):
    """The gradient (d, k) and the Hessian (d, k, k) of the loss of each of d units.

    loss:  a function of the coordinates (k, d), whose results are the losses (d,)
    point: the coordinates (k, d)
    """
    def total(point):
        return loss(point).sum()

    gradient_of = torch.func.grad(total)

    def derivative(point, i):
        return gradient_of(point)[i].sum()

    # No unit's loss depends on another unit, so derivatives of sums over the units are enough.
    rows = [torch.func.grad(derivative)(point, i) for i in range(len(point))]
    return gradient_of(point).T, torch.stack(rows).permute(2, 0, 1)


def _unit_newton_step(gradient, hessian):
    """The steps (d, k) to subtract, from the gradients (d, k) and the Hessians (d, k, k).

    0 where these are not finite. See `_newton_step`, which does the same for one minimisation.
    """
    finite = gradient.isfinite().all(1) & hessian.isfinite().all(2).all(1)
    gradient = torch.where(finite[:, None], gradient, 0)
    hessian = torch.where(finite[:, None, None], hessian, 0)
    curvature, directions = torch.linalg.eigh(hessian)
    curvature = curvature.abs()
    curved = curvature > FLAT_CURVATURES[-1] * curvature.amax(1, keepdim=True)
    along = (directions.mT @ gradient[:, :, None])[:, :, 0]
    return (directions @ torch.where(curved, along / curvature, 0)[:, :, None])[:, :, 0]


# --- Units of a linear model ---


def vae_units(U, V, sigma, eta_enc):
    """The quantities of `theory.vae_optimum`, measured on a linear VAE or CVAE, in float64.

    U:       the decoder, (D, d)
    V:       the encoder on whitened data, (d, D): W R, where R is `theory.root` of the moment
    sigma:   the stds of q(z|x), (d,)
    eta_enc: the std of the prior

    Returns lambda, omega, sigma, kl and information, each (d,), in any order of the units.
    """
    d = len(sigma)
    # A rotation of units that share a sigma changes nothing, so their singular directions are
    # taken for units.
    lambda_of_unit = torch.empty_like(sigma)
    for value in sigma.unique():
        same_sigma = sigma == value
        lambda_of_unit[same_sigma] = _singular_values(V[same_sigma], int(same_sigma.sum()))

    return {
        "lambda": _singular_values(V, d),
        "omega": _singular_values(U, d),
        "sigma": sigma,
        "kl": theory.expected_kl(lambda_of_unit, sigma, eta_enc),
        "information": theory.information(lambda_of_unit, sigma),
    }


def hvae_units(V1, W2, U2, sigma_1, sigma_2, eta_enc, eta_dec):
    """The quantities of `theory.hvae_optimum`, measured on a linear two-level HVAE, in float64.

    V1:      the encoder of z1 on whitened data, (d_1, D): W1 R
    W2, U2:  the encoder of z2, (d_2, d_1), and the decoder of z1, (d_1, d_2)
    sigma_1: the std of q(z1|x), a number
    sigma_2: the stds of q(z2|z1), (d_2,)
    eta_enc, eta_dec: the stds of p(z2) and of p(z1|z2)

    Returns lambda_1, kl_1 and information_1, each (d_1,), and lambda_2, omega_2, sigma_2, kl_2 and
    information_2, each (d_2,), in any order of the units.
    """
    d_1, d_2 = U2.shape
    identity = torch.eye(d_1, dtype=V1.dtype)
    z1_moment = V1 @ V1.T + sigma_1**2 * identity

    # The second moment of z1 - U2 z2, with z2 = W2 z1 + noise. KL1 is
    # (E||z1 - U2 z2||^2 / eta_dec^2 - d_1) / 2 - d_1 log(sigma_1 / eta_dec).
    error_map = identity - U2 @ W2
    error_moment = error_map @ z1_moment @ error_map.T + U2 * sigma_2**2 @ U2.T
    errors = torch.linalg.eigvalsh(error_moment)
    kl_1 = (errors / eta_dec**2 - 1) / 2 - math.log(sigma_1 / eta_dec)

    lambda_1 = _singular_values(V1, d_1)
    units = {
        "lambda_1": lambda_1,
        "kl_1": kl_1,
        "information_1": theory.information(lambda_1, sigma_1),
    }
    # z2 is the latent variable of a VAE of z1.
    level_2 = vae_units(U2, W2 @ torch.linalg.cholesky(z1_moment), sigma_2, eta_enc)
    for name, values in level_2.items():
        units[f"{name}_2"] = values
    return units


def _singular_values(matrix, d):
    """The d largest singular values of a matrix, the largest first; 0 where it has fewer."""
    values = torch.linalg.svdvals(matrix)[:d]
    return torch.nn.functional.pad(values, (0, d - len(values)))


# --- A trained linear model ---


@torch.no_grad()
def in_float64(model, f, split, work):
    """work(model, batch, f) over all rows of a split in float64: its results (B, ...), joined.

    model: a module, which is copied; the copy is passed to work
    split: the rows, a tuple of tensors (n, ...); batch is a list of their parts (B, ...)

    Returns (n, ...), on the CPU.
    """
    model = copy.deepcopy(model).double()
    f = common.on_device(f, split[0][:0].double())
    results = []
    for batch in zip(*(rows.split(CHUNK_ROWS) for rows in split)):
        results.append(work(model, [rows.double() for rows in batch], f).cpu())
    return torch.cat(results)


@torch.no_grad()
def check_model(model, f, data, examples):
    """The Comparison of a trained linear model with its closed form.

    model.predicted(f, data) gives the closed form, and model.units(f, data) the same quantities of
    the model. The loss is the exact mean over all training rows.

    examples: those of `report.evaluate`. If they include log-likelihoods by importance sampling,
    these are compared with the exact ones.
    """
    # 1. The loss. A model in training mode computes the terms of the ELBO only.
    model = copy.deepcopy(model).train()

    def loss_of_rows(model, batch, f):
        return model.loss(model(*batch, f), f)

    loss = in_float64(model, f, data.train, loss_of_rows).mean().item()

    # 2. The units.
    trained = model.cpu().double().units(common.on_device(f, data.moment[:0]), data)
    comparison = compare(model.predicted(f, data), trained, loss)

    # 3. Importance sampling. It has the precision of the data, not float64.
    if "log_px" in examples:
        ratio = np.exp(examples["log_px"] - examples["exact_log_px"])
        eps = torch.finfo(data.test[0].dtype).eps
        comparison.importance_sampling = {
            "mean_ratio": float(ratio.mean()),
            "standard_error": float(ratio.std() / len(ratio)**0.5),
            "rounding": float(eps * np.abs(examples["exact_log_px"]).mean()),
        }
    return comparison


# --- The linear twin ---

# In this section, a `result` is a report.RunResult.


def closed_form(result):
    """The closed form of a result's model, or else of its linear twin: {name: [per unit]}.

    None if neither has one, or if the run diverged.
    """
    if not result.metrics:
        return None
    if result.theory is not None:
        return result.theory.predicted
    return result.linear


def linear_pairs(result):
    """A list of (metric, predicted by the closed form, trained) for a result that has one.

    The metrics are kl, AU and AU_kl of each level. Units with an information above theory.ACTIVE
    are predicted to be active.
    """
    predicted = closed_form(result)
    pairs = []
    for level in theory.levels_of(predicted):
        informations = predicted[f"information{level}"]
        active = sum(information > theory.ACTIVE for information in informations)
        kl = sum(predicted[f"kl{level}"])
        pairs.append((f"kl{level}", kl, result.metrics[f"kl{level}"]))
        pairs.append((f"AU{level}", active, result.metrics[f"AU{level}"]))
        pairs.append((f"AU_kl{level}", active, result.metrics[f"AU_kl{level}"]))
    return pairs


def can_be_ranked(results):
    """Whether the results have at least three settings, apart from the seed.

    A rank correlation of fewer settings has no meaning.
    """
    settings = {str(result.settings | {"seed": None}) for result in results}
    return len(settings) > 2


def rank_correlations(results):
    """Spearman's rank correlations of predicted and trained values, {metric: number}.

    Metrics whose predicted or trained values are all equal are left out. Returns {} if the results
    cannot be ranked.
    """
    if not can_be_ranked(results):
        return {}

    predicted = {}
    trained = {}
    for result in results:
        for metric, predicted_value, trained_value in linear_pairs(result):
            predicted.setdefault(metric, []).append(predicted_value)
            trained.setdefault(metric, []).append(trained_value)

    correlations = {}
    for metric in predicted:
        correlation = rank_correlation(predicted[metric], trained[metric])
        if correlation is not None:
            correlations[metric] = correlation
    return correlations


def rank_correlation(predicted, trained):
    """Spearman's rank correlation of two lists of numbers; None if all of one list are equal."""
    predicted_ranks = _ranks(predicted)
    trained_ranks = _ranks(trained)
    if np.ptp(predicted_ranks) == 0 or np.ptp(trained_ranks) == 0:
        return None
    return np.corrcoef(predicted_ranks, trained_ranks)[0, 1]


def _ranks(values):
    """The ranks of values, rounded to two decimals as they are printed. Equal ones share a rank."""
    values = np.round(values, 2)
    smaller = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return smaller + equal / 2


def rank_correlations_in_words(results, left_out=()):
    """`rank_correlations` as the end of a sentence: "kl 0.98, AU 1.00", or "none".

    left_out: the beginnings of the names of metrics that are left out, a tuple
    """
    words = []
    for metric, value in rank_correlations(results).items():
        if not metric.startswith(left_out):
            words.append(f"{metric} {value:.2f}")
    return ", ".join(words) or "none"


# --- A table of units ---


def print_units(comparison):
    """Print a table per level, with pairs "predicted -> trained" of each unit's numbers."""
    for i, level in enumerate(theory.levels_of(comparison.predicted)):
        if i > 0:
            print()
        common.print_table(unit_rows(comparison, level))


def unit_rows(comparison, level):
    """The rows of the table of one level, as texts."""
    predicted = comparison.predicted
    trained = comparison.trained
    names = []
    for name in ("lambda", "omega", "sigma", "kl"):
        if f"{name}{level}" in trained:
            names.append(f"{name}{level}")
    rows = [["unit", "theta", *names, "collapses at", "state"]]

    count = len(predicted[f"information{level}"])
    # Units without a mode have theta 0.
    theta = predicted["theta"] + [0.0] * count
    for i in range(count):
        row = [str(i + 1), f"{theta[i]:.4f}"]
        for name in names:
            pair = common.format_pair(f"{predicted[name][i]:.4f}", f"{trained[name][i]:.4f}")
            row.append(pair)
        collapse = predicted[f"collapse{level}"][i]
        row.append("never" if collapse is None else f"{collapse:.4g}")
        row.append(
            state_of_unit(
                predicted[f"information{level}"][i], trained[f"information{level}"][i]
            )
        )
        rows.append(row)
    return rows


def state_of_unit(predicted, trained):
    """Whether a unit is active or collapsed, from its predicted and its trained information.

    The prediction is exact, so any information above 0 makes it active. A trained unit is active
    above theory.ACTIVE. The result is a pair such as "active -> collapsed" where both differ.
    """
    if not predicted > 0 and trained > theory.ACTIVE:
        return common.format_pair("collapsed", "active")
    # A small predicted information may lie below the limit of the trained unit.
    if predicted > theory.ACTIVE and not trained > theory.ACTIVE:
        return common.format_pair("active", "collapsed")
    return "active" if predicted > 0 else "collapsed"


def active_units_row(comparison):
    """The cells with the predicted and the trained number of active units, {column: text}.

    The columns are "active units" for one level, and "active units of z1", ... for two.
    """
    predicted = comparison.active_units()
    trained = comparison.active_units("trained")
    row = {}
    for level in predicted:
        name = f"active units of z{level[1:]}" if level else "active units"
        row[name] = common.format_pair(predicted[level], trained[level])
    return row


# --- Minimisation ---


def minimise(loss, starts, blocks=40):
    """Minimise a loss by L-BFGS from several starts, then by Newton's method from the best end.

    loss:   a function of the parameters {name: float64 tensor}; it returns a 0-d tensor
    starts: a list of parameters
    blocks: the largest number of blocks of 50 steps of L-BFGS, per start

    Returns a list of (parameters, loss as a number), one per start, the least loss first.
    """
    minima = [_lbfgs(loss, start, blocks) for start in starts]

    def nan_last(minimum):
        _, value = minimum
        return math.inf if math.isnan(value) else value

    minima.sort(key=nan_last)
    parameters, _ = minima[0]
    for flat_curvature in FLAT_CURVATURES:
        parameters, value = newton(loss, parameters, flat_curvature)
    minima[0] = parameters, value
    return minima


def _lbfgs(loss, start, blocks):
    """Minimise a loss by L-BFGS until a block of 50 steps gains less than 1e-9 of the loss.

    Returns (parameters, loss as a number).
    """
    parameters = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.LBFGS(
        parameters.values(),
        max_iter=50,
        history_size=30,
        tolerance_change=0,
        tolerance_grad=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = loss(parameters)
        value.backward()
        return value

    value = math.inf
    for _ in range(blocks):
        previous = value
        optimizer.step(closure)
        value = loss(parameters).item()
        # The negation also stops at nan.
        if not previous - value > 1e-9 * abs(value):
            break
    return {name: parameter.detach() for name, parameter in parameters.items()}, value


def newton(loss, parameters, flat_curvature, steps=40):
    """Newton steps to the nearest minimum of a loss.

    flat_curvature: the share of the largest curvature below which a direction counts as flat

    Each step has a line search, which ends when rounding errors hide differences of the loss.
    Directions in which the loss is flat stay as they are. So do parameters at which the derivatives
    are not finite.

    Returns (parameters, loss as a number).
    """
    shapes = {name: value.shape for name, value in parameters.items()}

    def unflatten(flat):
        parts = flat.split([shape.numel() for shape in shapes.values()])
        unflattened = {}
        for (name, shape), part in zip(shapes.items(), parts):
            unflattened[name] = part.view(shape)
        return unflattened

    def flat_loss(flat):
        return loss(unflatten(flat))

    gradient_of = torch.func.grad(flat_loss)
    hessian_of = torch.func.jacrev(gradient_of)

    flat = torch.cat([value.flatten() for value in parameters.values()])
    value = flat_loss(flat)
    lengths = 0.5 ** torch.arange(10.0, dtype=flat.dtype, device=flat.device)
    for _ in range(steps):
        step = _newton_step(gradient_of(flat), hessian_of(flat), flat_curvature)
        if step is None:
            break
        values = torch.stack([flat_loss(flat - length * step) for length in lengths])
        if not values.min() <= value + 1e-14 * value.abs():
            break
        flat = flat - lengths[values.argmin()] * step
        value = values.min()
        if step.abs().max() < 1e-12 * flat.abs().max():
            break
    return unflatten(flat), value.item()


def _newton_step(gradient, hessian, flat_curvature):
    """The step (n,) to subtract, from the gradient (n,) and the Hessian (n, n).

    It is 0 along directions whose curvature is below a share of the largest one, flat_curvature.
    None if these are not finite, or so extreme that the Hessian's eigenvectors are not found.
    """
    if not (gradient.isfinite().all() and hessian.isfinite().all()):
        return None
    try:
        curvature, directions = torch.linalg.eigh(hessian)
    except torch.linalg.LinAlgError:
        return None
    # The absolute value makes the step go down where the loss curves down, too.
    curvature = curvature.abs()
    curved = curvature > flat_curvature * curvature.max()
    return directions @ torch.where(curved, directions.T @ gradient / curvature, 0)


def random_starts(problem, f, device):
    """STARTS random parameters of a problem, see `verify`. They are the same on every device."""
    random = common.generator(f.seed, "init")

    def draw(*shape):
        normal = torch.randn(shape, dtype=torch.float64, generator=random, device="cpu")
        return 0.5 * normal.to(device)

    return [problem.start(draw) for _ in range(STARTS)]


def move_problem(problem, device):
    """A copy of a problem with its tensors on a device."""
    moved = copy.copy(problem)
    for name, value in vars(problem).items():
        if torch.is_tensor(value):
            setattr(moved, name, value.to(device))
    return moved


# --- The check of a theorem ---


@dataclass
class Check:
    """The result of the check of a theorem for one setting.

    f:          the setting
    comparison: the comparison of the closed form with the minimum; None if the least loss or the
                units are not finite
    losses:     the losses at which the random starts ended, the least first
    seconds:    the time that the check took
    """

    f: object
    comparison: Comparison | None
    losses: list
    seconds: float

    def max_error(self):
        """The largest error of any compared quantity, or of the loss; nan if it is not finite.

        Singular values that the loss does not determine, see `Comparison.flat_deviations`, are left
        out.
        """
        if self.comparison is None:
            return math.nan
        return max(self.comparison.determined_error(), abs(self.comparison.gap))


def verify(Problem, settings):
    """Check a theorem on synthetic data, for each of the settings.

    For each setting, minimise the exact expected loss from several random starts. Then print the
    closed form and the minimum in pairs, and finally VERIFIED or FAILED. Each setting leaves a
    result.json. Returns the exit status: 0 if each error is at most TOLERANCE, else 1. At a
    threshold of collapse, rounding errors hide the singular values of a unit. Their errors do not
    count if they change the loss by less than its rounding errors. A sentence then says so.

    Problem(f) is the model of one setting. It has
        data_flags           the flags whose sum is the width of a row of data, a tuple of names
        start(draw)          the parameters {name: float64 tensor} to start from, where draw(*shape)
                             draws a tensor
        loss(parameters)     the exact expected loss in nats, a 0-d tensor
        predicted()          the closed form, a result of theory.py
        units(parameters)    the quantities of the closed form at these parameters

    Ends the program as `check_flags` does.
    """
    # Of several processes, the first one does all.
    if processes.rank_and_count()[0] > 0:
        return 0
    check_flags(Problem, settings)
    device = common.select_device(settings[0])
    print(f"device: {common.device_name(device)}", file=sys.stderr)

    checks = []
    for f in settings:
        check = _check_setting(Problem, f)
        _write_result(check)
        checks.append(check)
        if len(settings) > 1:
            print(f"checked {len(checks)} of {len(settings)} settings", file=sys.stderr)
    return _print_report(checks)


def check_flags(Problem, settings):
    """End the program if a setting cannot be checked: one line that names flags, exit status 2.

    The reasons are sizes that need too much memory, and flags so extreme that the closed form or
    the loss is not finite, or has rounding errors above the tolerance. Problem is that of `verify`.
    """
    for f in settings:
        _check_data_size(Problem, f)
        problem = Problem(f)
        _check_parameter_count(problem, f)
        _check_numbers(problem, f)


def _check_data_size(Problem, f):
    """End the program if the data of a setting would need too much memory."""
    width = sum(getattr(f, name) for name in Problem.data_flags)
    if f.num_samples * width > MAX_DATA:
        names = ", ".join(f"--{name}" for name in ("num_samples", *Problem.data_flags))
        common.stop(
            f,
            f"{names}: got {f.num_samples:,} rows of {width:,} numbers, "
            f"wants at most {MAX_DATA:,} numbers in all",
        )


def _check_parameter_count(problem, f):
    """End the program if the Hessian of a setting would need too much memory."""

    def draw_nothing(*shape):
        return torch.empty(shape, device="meta")

    count = sum(value.numel() for value in problem.start(draw_nothing).values())
    if count > MAX_PARAMETERS:
        common.stop(
            f,
            f"{_spell_own_flags(f, int)}: the model has {count:,} parameters, "
            f"wants at most {MAX_PARAMETERS:,}",
        )


def _check_numbers(problem, f):
    """End the program if the predicted optimum, or the loss at a random start, is too extreme."""
    for name, values in problem.predicted().items():
        if name.startswith("collapse"):
            # Thresholds are not compared. One that is inf means that the unit never collapses.
            continue
        limit = MAX_INFORMATION if name.startswith("information") else MAX_PREDICTED
        # The negation also finds nan.
        if not values.abs().max() <= limit:
            common.stop(
                f,
                f"{_spell_own_flags(f, float)}: the predicted optimum is not finite, or too "
                f"extreme for errors of at most {TOLERANCE:g}; wants values nearer to 1",
            )
    if not abs(_loss_at_random_start(problem, f)) <= MAX_LOSS:
        common.stop(
            f,
            f"{_spell_own_flags(f, float)}: the loss at random weights is not finite, or too "
            "large; wants values nearer to 1",
        )


def _loss_at_random_start(problem, f):
    """The loss at random parameters, in nats; inf or nan if it is not finite."""
    start = random_starts(problem, f, torch.device("cpu"))[0]
    try:
        return problem.loss(start).item()
    except (ArithmeticError, ValueError):
        # Python's numbers raise errors where tensors become inf or nan.
        return math.inf


def _spell_own_flags(f, kind):
    """A script's own flags of one type, int or float, as "--beta 1.0, --eta_dec 1e-200".

    Flags at their default are left out, unless all are.
    """
    spelled = {}
    changed = []
    for name, field in common.own_flags(f).items():
        if type(field.default) is kind:
            spelled[name] = f"--{name} {getattr(f, name)}"
            if getattr(f, name) != field.default:
                changed.append(name)
    return ", ".join(spelled[name] for name in changed or spelled)


def _check_setting(Problem, f):
    """Minimise the loss of one setting and compare the minimum with the closed form: a Check."""
    start_time = time.monotonic()
    problem = Problem(f)
    device = common.select_device(f)
    # Tensors that the loss makes are then on the device, too.
    with device:
        moved = move_problem(problem, device)
        minima = minimise(moved.loss, random_starts(problem, f, device))

    parameters, least_loss = minima[0]
    parameters = {name: value.cpu() for name, value in parameters.items()}
    return Check(
        f=f,
        comparison=_finite_comparison(problem, parameters, least_loss),
        losses=[loss for _, loss in minima],
        seconds=time.monotonic() - start_time,
    )


def _finite_comparison(problem, parameters, loss):
    """The Comparison of a problem's closed form with these parameters; None if it is not finite."""
    rounding = ROUNDING * max(1.0, abs(loss))
    limits = Limits(error=TOLERANCE, cost=rounding, gap=rounding)
    try:
        comparison = compare(problem.predicted(), problem.units(parameters), loss, limits)
    except torch.linalg.LinAlgError:
        # Matrices that are not finite, or extreme, have no singular values or Cholesky factor.
        return None
    numbers = [*comparison.errors.values(), comparison.gap]
    return comparison if all(math.isfinite(number) for number in numbers) else None


def _write_result(check):
    """Write the result.json of a check, or remove an old one if no minimum is finite."""
    if check.comparison is None:
        (files.run_dir(check.f, None) / "result.json").unlink(missing_ok=True)
        return
    result = files.description(check.f, None)
    result["seconds"] = {"minimise": check.seconds}
    result["max_error"] = check.max_error()
    result["theory"] = dataclasses.asdict(check.comparison)
    files.write_json(files.run_dir(check.f, None) / "result.json", result)


def _print_report(checks):
    """Print the results of the checks and the verdict. Returns the exit status."""
    settings = [check.f for check in checks]
    varying = list(files.varying_flags(settings, [None] * len(settings)))
    _print_caption(settings, varying)
    print(PAIRS)

    # 1. The units of a single setting.
    if len(checks) == 1 and checks[0].comparison is not None:
        _print_single(checks[0])

    # 2. A row per setting.
    rows = [_table_row(check, varying) for check in checks]
    columns = list(max(rows, key=len))
    table = [columns]
    for row in rows:
        table.append([row.get(name, "-") for name in columns])
    common.print_table(table)

    # 3. What to know about single settings. Those of a single one are printed with its units.
    for check in checks:
        flags = {name: getattr(check.f, name) for name in (*varying, "seed")}
        if check.comparison is None:
            print(f"{files.spell(flags)}: the minimisation ended at numbers that are not finite")
        elif len(checks) > 1:
            for sentence in check.comparison.flat_units_in_words():
                print(f"{files.spell(flags)}: {sentence}")

    if any(check.comparison and check.comparison.flat_deviations() for check in checks):
        print(
            "Errors that do not count change the loss by less than its rounding errors in float64, "
            f"about {ROUNDING:.0e} of the loss."
        )

    # 4. The verdict.
    # NumPy's maximum, unlike Python's, is nan if one of the errors is.
    max_error = np.max([check.max_error() for check in checks])
    if max_error <= TOLERANCE:
        print(f"VERIFIED: the largest error is {max_error:.1e}")
        return 0
    if math.isnan(max_error):
        print("FAILED: not every minimum is finite")
    else:
        print(f"FAILED: the largest error is {max_error:.1e}, and {TOLERANCE:g} is allowed")
    return 1


def _print_caption(settings, varying):
    """Print the script, the flags that all settings share, and the unit of the losses."""
    f = settings[0]
    shared = {}
    for name, value in files.changed_settings(f, None).items():
        if name not in (*varying, "seed"):
            shared[name] = value
    name = f"{common.script_name(f)} {files.spell(shared)}".strip()
    rows = "" if "num_samples" in varying else f"{f.num_samples:,} rows of data, "
    print(f"{name}: {rows}losses in nats per row")


def _print_single(check):
    """Print the units of a single setting, notes on them, and where the random starts ended."""
    print_units(check.comparison)
    for note in check.comparison.notes():
        print(note)
    least_loss = check.losses[0]
    at_minimum = sum(loss - least_loss < 1e-6 for loss in check.losses)
    print(f"\n{at_minimum} of {len(check.losses)} random starts ended at the least loss")


def _table_row(check, varying):
    """The row of one setting in the table of all, {column: text}."""
    row = {name: str(getattr(check.f, name)) for name in (*varying, "seed")}
    comparison = check.comparison
    if comparison is None:
        return row | {"optimal loss": "not finite"}
    row |= active_units_row(comparison)
    row["optimal loss"] = common.format_pair(
        f"{comparison.optimal_loss:.6f}", f"{comparison.loss:.6f}"
    )
    row["largest error"] = f"{check.max_error():.1e}"
    return row
