"""The moments of a VAE that this project did not train, measured in its own training loop.

headroom.post_mortem calls `measure` with the functions of the loop. The words are those of
headroom.py: u is the input of the encoder, r is the residual, and H is the Fisher information.

The rows are read once, batch by batch. Sums over them are kept for two halves of the rows, in
float64. The expectation of the decoder's mean over z is estimated twice. The draws of the two
estimates are independent, so that their noise averages to zero in the product of the two residuals.

All errors are ValueErrors of one sentence, which says what was wrong and what is wanted.
"""
import contextlib
import math

import torch
from torch import nn

# The largest number of columns of u or of r. The arithmetic grows with its cube.
MOST_COLUMNS = 8_000

# A unit is active by its mean if the variance of the mean over the rows exceeds this share of the
# prior's variance (Burda et al. 2016).
ACTIVE_VARIANCE = 0.01

# For each likelihood, what decode must return, and the function that may be missing.
DECODER_MEANS = {
    "bernoulli": ("probabilities from 0 to 1", "torch.sigmoid to the logits"),
    "poisson": ("rates of at least 0", "torch.exp to the log rates"),
    "categorical": (
        "probabilities whose sum over the last dimension is 1",
        "torch.softmax(..., dim=-1) to the logits",
    ),
}


@torch.no_grad()
def measure(encode, decode, loader, likelihood, conditional, draws, device):
    """The sums over all rows of the loader: (HalfSums, PosteriorSums).

    The arguments are those of headroom.post_mortem. The generators of the CPU and of CUDA go on
    afterwards as if nothing had been drawn.
    """
    if torch.is_tensor(loader):
        raise ValueError("loader is a tensor, wants an iterable of batches, such as [x]")
    if isinstance(loader, torch.utils.data.Dataset):
        raise ValueError(
            "loader is a Dataset, whose items are single examples, wants batches, as from "
            "torch.utils.data.DataLoader(dataset, batch_size=128)"
        )
    if draws < 1:
        raise ValueError(f"draws is {draws}, wants at least 1")

    decoder = _Decoder(decode, likelihood, draws)
    sums = HalfSums()
    posterior = PosteriorSums()
    with _own_random_numbers():
        for batch in loader:
            x, conditions = _target_and_conditions(batch, conditional, device)
            mean, log_var = _posterior(encode(x, *conditions), x)
            posterior.add(_as_rows(mean), _as_rows(log_var))

            for half, places in enumerate(sums.split(len(x))):
                if not len(places):
                    continue
                half_x, half_mean, half_log_var, *half_conditions = [
                    t[places.to(t.device)] for t in (x, mean, log_var, *conditions)
                ]
                statistics, residuals, fisher = decoder.residuals(
                    half_x, half_mean, half_log_var, half_conditions
                )
                inputs = [statistics, *(_as_rows(condition) for condition in half_conditions)]
                sums.add(half, inputs, residuals, fisher)

    if posterior.count < 2:
        raise ValueError(f"loader: the number of rows is {posterior.count}, wants at least 2")
    return sums, posterior


@contextlib.contextmanager
def _own_random_numbers():
    """Within this context random numbers have a fixed seed. Afterwards they go on as before."""
    gpus = []
    if torch.cuda.is_initialized():
        gpus = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(0)
        if gpus:
            torch.cuda.manual_seed_all(0)
        yield


# --- What the functions of the loop return ---


def _as_rows(tensor):
    """A tensor (B, ...) as rows (B, columns) in float64, on its device if that has float64."""
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    return tensor.reshape(len(tensor), -1).double()


def _check_finite(name, tensor):
    """Raise ValueError if a tensor that the model returned has a number that is not finite."""
    if not tensor.isfinite().all():
        raise ValueError(
            f"{name} has numbers that are not finite; if training diverged, try a smaller learning "
            "rate first"
        )


def _target_and_conditions(batch, conditional, device):
    """x (B, ...) and a list of the conditions of a batch, moved to the device."""
    tensors = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    if not conditional:
        tensors = tensors[:1]
    if not tensors or not all(torch.is_tensor(t) and t.ndim for t in tensors):
        raise ValueError(
            f"a batch of loader is a {type(batch).__name__}, wants a tensor, or a tuple or list of "
            "tensors that begins with x"
        )
    for t in tensors:
        if len(t) != len(tensors[0]):
            raise ValueError(
                f"a condition has {len(t)} rows, wants {len(tensors[0])} rows like x in its batch"
            )
        if not t.isfinite().all():
            raise ValueError("a batch of loader has numbers that are not finite, wants finite data")
    if device is not None:
        tensors = [t.to(device) for t in tensors]
    return tensors[0], tensors[1:]


def _posterior(encoded, x):
    """The mean and the log variance of q(z|x), each (B, ...), from what encode returned."""
    wanted = "(mean, log_var) or a torch.distributions.Normal"
    if isinstance(encoded, torch.distributions.Independent):
        encoded = encoded.base_dist
    if isinstance(encoded, torch.distributions.Normal):
        encoded = (encoded.mean, 2 * encoded.stddev.log())
    is_pair = isinstance(encoded, (tuple, list)) and len(encoded) == 2
    if not is_pair or not all(torch.is_tensor(t) for t in encoded):
        raise ValueError(f"encode returned a {type(encoded).__name__}, wants {wanted}")

    mean, log_var = encoded
    is_fitting = mean.ndim > 0 and len(mean) == len(x)
    try:
        log_var = log_var.expand_as(mean)
    except RuntimeError:
        is_fitting = False
    if not is_fitting:
        raise ValueError(
            f"encode returned a mean of the shape {tuple(mean.shape)} and a log variance of the "
            f"shape {tuple(log_var.shape)}, wants a row for each of the {len(x)} rows of x in both"
        )
    _check_finite("the mean that encode returned", mean)
    _check_finite("the log variance that encode returned", log_var)
    return mean, log_var


def _check_shape(decoded, x, likelihood):
    """Raise ValueError if what decode returned is no tensor, or has no shape that fits x."""
    if not torch.is_tensor(decoded):
        raise ValueError(f"decode returned a {type(decoded).__name__}, wants a tensor")
    categories = 1
    if likelihood == "categorical" and decoded.ndim:
        categories = decoded.shape[-1]
        if decoded.shape == x.shape:
            raise ValueError(
                f"decode returned a tensor of the shape {tuple(decoded.shape)} like x, wants x to "
                "have the codes of the categories, without their dimension, and not one-hot vectors"
            )
    elif decoded.ndim == x.ndim and decoded.numel() == x.numel() and decoded.shape != x.shape:
        raise ValueError(
            f"decode returned a tensor of the shape {tuple(decoded.shape)}, wants the order of the "
            f"dimensions of x, whose shape is {tuple(x.shape)}"
        )
    if not decoded.ndim or len(decoded) != len(x) or decoded.numel() != x.numel() * categories:
        wanted = f"one number for each number of x, whose shape is {tuple(x.shape)}"
        if likelihood == "categorical":
            shape = ", ".join(str(size) for size in x.shape)
            wanted = f"({shape}, K) with the probabilities of the K categories of each code in x"
        raise ValueError(
            f"decode returned a tensor of the shape {tuple(decoded.shape)}, wants {wanted}"
        )


def _decoder_mean(decoded, x, likelihood):
    """What decode returned as rows (B, D), or as (B, L, K) for categories, float64."""
    _check_shape(decoded, x, likelihood)
    _check_finite("what decode returned", decoded)
    p = _as_rows(decoded)
    if likelihood == "gaussian":
        return p

    is_wrong = p.min() < 0
    if likelihood == "bernoulli":
        is_wrong |= p.max() > 1
    if likelihood == "categorical":
        p = p.reshape(len(p), -1, decoded.shape[-1])
        total = p.sum(-1, keepdim=True)
        is_wrong |= (total - 1).abs().max() > 0.01
        # Float32 has sums of 1 with an error, which H would count as a direction of its own.
        p = p / total
    if is_wrong:
        wanted, function = DECODER_MEANS[likelihood]
        raise ValueError(
            f"decode returned other numbers than {wanted}, which the likelihood {likelihood} "
            f"wants; apply {function}"
        )
    return p


# --- The residuals of a batch ---


class _Decoder:
    """The user's decoder, and the draws of z at which it is evaluated.

    Its random numbers are its own, so that those of the loader do not change them.
    """

    def __init__(self, decode, likelihood, draws):
        self.decode = decode
        self.likelihood = likelihood
        self.draws = draws
        self.generator = None

    def residuals(self, x, mean, log_var, conditions):
        """Returns s(x) (B, D), two estimates of the residual (2, B, D), and the sum of psi''.

        The sum over the rows is that of the diagonals (D,). For L variables with K categories each,
        it is that of the blocks (L, K, K), and D is L K. It is None for a Gaussian decoder.
        """
        if self.generator is None:
            self.generator = torch.Generator(mean.device).manual_seed(0)
        std = (log_var / 2).exp()
        totals = [0, 0]
        information = 0
        for estimate in range(2):
            for _ in range(self.draws):
                noise = torch.randn(
                    mean.shape, generator=self.generator, dtype=mean.dtype, device=mean.device
                )
                decoded = self.decode(mean + std * noise, *conditions)
                p = _decoder_mean(decoded, x, self.likelihood)
                totals[estimate] = totals[estimate] + p
                information = information + _information(p, self.likelihood)

        statistics = _statistics(x, p, self.likelihood)
        residuals = torch.stack([statistics - total / self.draws for total in totals]).flatten(2)
        fisher = None if self.likelihood == "gaussian" else information / (2 * self.draws)
        return statistics.flatten(1), residuals, fisher


def _information(p, likelihood):
    """The sum over the rows of psi'', as in `_Decoder.residuals`, and 0 for a Gaussian decoder."""
    if likelihood == "gaussian":
        return 0
    if likelihood == "poisson":
        return p.sum(0)
    variances = (p * (1 - p)).sum(0)
    if likelihood == "bernoulli":
        return variances
    by_variable = p.transpose(0, 1)
    blocks = -by_variable.mT @ by_variable
    # The difference of p and p^2 would lose the digits of a p next to 1.
    blocks.diagonal(dim1=1, dim2=2).copy_(variances)
    return blocks


def _statistics(x, p, likelihood):
    """s(x) in the shape of p, float64, on its device."""
    rows = _as_rows(x).to(p.device)
    if likelihood == "categorical":
        categories = p.shape[-1]
        if not ((rows >= 0) & (rows < categories) & (rows == rows.floor())).all():
            raise ValueError(
                f"x has other numbers than the codes 0 to {categories - 1} of the {categories} "
                "categories that decode returned"
            )
        return nn.functional.one_hot(rows.long(), categories).double()
    if likelihood == "bernoulli" and not ((rows >= 0) & (rows <= 1)).all():
        raise ValueError("x has numbers outside [0, 1], wants none for the likelihood bernoulli")
    if likelihood == "poisson" and not (rows >= 0).all():
        raise ValueError("x has negative numbers, wants counts for the likelihood poisson")
    return rows


# --- Sums over the rows ---


class HalfSums:
    """Sums over the rows of each half, from which their moments are made.

    sizes: the number of rows of each half.
    """

    def __init__(self):
        self.sizes = [0, 0]
        self._sums = [{}, {}]
        # u minus the first u keeps more digits. A linear encoder has a constant anyway.
        self._first_input = None
        self._generator = torch.Generator().manual_seed(0)
        self._next_halves = torch.empty(0, dtype=torch.long)

    def split(self, count):
        """The places of the rows of each half among the next `count` rows: two tensors.

        One row of each pair of neighbours is in each half, by chance. Even and odd rows would be no
        fair halves of data that alternate. The two rows of a pair may be in different batches.
        """
        missing = max(0, count - len(self._next_halves))
        pairs = torch.randint(2, ((missing + 1) // 2, 1), generator=self._generator)
        new_halves = torch.cat([pairs, 1 - pairs], dim=1).flatten()
        halves = torch.cat([self._next_halves, new_halves])
        self._next_halves = halves[count:]
        return [(halves[:count] == half).nonzero()[:, 0] for half in (0, 1)]

    def add(self, half, inputs, residuals, fisher):
        """Add rows to a half.

        inputs are the parts of u, each (B, ...), without the constant 1. residuals (2, B, D) and
        fisher are results of `_Decoder.residuals`.
        """
        u = torch.cat([part.to(residuals.device) for part in inputs], dim=1)
        self._check_columns(u, residuals)
        u = torch.cat([u - self._first_input, torch.ones_like(u[:, :1])], dim=1)

        first, second = residuals
        products = {
            "cross": (first + second).T @ u / 2,
            "moment": u.T @ u,
            "squares": first.T @ second,
        }
        if fisher is not None:
            products["fisher"] = fisher
        self.sizes[half] += len(u)
        sums = self._sums[half]
        for name, product in products.items():
            sums[name] = sums.get(name, 0) + product

    def _check_columns(self, u, residuals):
        """Raise ValueError for too many columns, or for another number than before."""
        most = max(u.shape[1], residuals.shape[2])
        if most > MOST_COLUMNS:
            raise ValueError(
                f"x has {most:,} columns (with its categories and conditions), wants at most "
                f"{MOST_COLUMNS:,}; train on smaller images, or join rare categories into groups. "
                f"For a Gaussian decoder and at most {MOST_COLUMNS:,} rows, you may instead save "
                "arrays for predict_collapse.py --residual"
            )
        if self._first_input is None:
            self._first_input = u[:1]
        columns = self._first_input.shape[1]
        if u.shape[1] != columns:
            raise ValueError(
                f"a batch has {u.shape[1]:,} columns, wants {columns:,} columns as in the first one"
            )

    def moments(self):
        """The arguments of headroom.ResidualMoments for each half: a list of two dicts."""
        halves = []
        for sums, size in zip(self._sums, self.sizes):
            moments = {name: total.cpu() / size for name, total in sums.items()}
            moments["squares"] = (moments["squares"] + moments["squares"].T) / 2
            fisher = moments.setdefault("fisher", None)
            if fisher is not None and fisher.ndim == 3:
                moments["fisher"] = torch.block_diag(*fisher)
            halves.append(moments)
        return halves


class PosteriorSums:
    """Sums over rows of the posterior N(mean, exp(log_var)), for the KL of each unit.

    count: the number of rows.
    """

    def __init__(self):
        self.count = 0
        self._sums = {}

    def add(self, mean, log_var):
        """Add rows of means and log variances, (B, d), float64."""
        self.count += len(mean)
        values = {
            "mean": mean,
            "squared_mean": mean**2,
            "variance": log_var.exp(),
            "log_var": log_var,
        }
        for name, numbers in values.items():
            self._sums[name] = self._sums.get(name, 0) + numbers.sum(0)

    def kl(self, eta_enc):
        """The mean KL of each unit against the prior N(0, eta_enc^2), in nats: a list."""
        mean = {name: total / self.count for name, total in self._sums.items()}
        ratio = (mean["squared_mean"] + mean["variance"]) / eta_enc**2
        kl = (ratio - 1 - mean["log_var"]) / 2 + math.log(eta_enc)
        # A KL of 0 may be rounded to a negative number.
        return kl.clamp(min=0).tolist()

    def active(self, eta_enc):
        """The number of units that are active by their mean, see ACTIVE_VARIANCE."""
        mean = self._sums["mean"] / self.count
        variance = self._sums["squared_mean"] / self.count - mean**2
        variance = variance * self.count / (self.count - 1)
        return int((variance > ACTIVE_VARIANCE * eta_enc**2).sum())
