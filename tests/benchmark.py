"""Measure on this machine how fast the project is.

    python -m tests.benchmark
        compares training and evaluation with other ways to do the same work

    python -m tests.benchmark scripts [flags]
        each script's seconds per epoch and peak memory

    python -m tests.benchmark whole [flags]
        the main job, MNIST_HVAE_Relu.py, from start to table, beside plain scripts

    python -m tests.benchmark growth
        how time and memory of the main job grow: results/data/growth.csv and results/growth.png

    python -m tests.benchmark growth-picture
        draws results/growth.png again from results/data/growth.csv

    python -m tests.benchmark cuda
        what only a GPU can show

The flags are those of the scripts, such as --data_dir and --num_epochs. `whole` also starts
`python -m tests.benchmark plain [flags]`, which is the main job in plain loops.

The first command prints a row for each training script. The column "fit ms" is the time of one
epoch of training in milliseconds. The other columns are ratios of two times:

    plain   fit / an epoch of the shortest plain PyTorch loop over the same model, with the data on
            the device
    usual   an epoch the usual way / fit. The usual way is a DataLoader over torchvision's data set,
            with loss.item() for each batch.
    grid    an epoch of a grid of four settings / the same settings one by one
    eval    the matrix products and convolutions of the evaluation alone / the evaluation

The two works of a ratio take turns in one process, so that a slow moment of the machine affects
both. The ratios are medians over several turns.

A deep script has its own training loop. Its model is made small here (see DEEP), it sees an eighth
of the examples, and it has no column "usual". Both loops of MNIST_VAE_Delta.py take one epoch of
each of its two phases. There is no column "grid" where a script trains its settings one by one: the
deep scripts do so, and on a CPU those with convolutions.
"""
import collections
import contextlib
import csv
import dataclasses
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import common
import numpy as np
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import datasets
import deep
import files
import pictures
import report
import training
import MNIST_HVAE_Relu
from tests import small

# The number of turns that the medians are taken over.
TURNS = 5

# The number of examples in one epoch: fifty batches.
EXAMPLES = 6_400

# The number of images that are evaluated, by device type.
IMAGES = {"cpu": 20, "cuda": 1000}

# Epochs of each script in `scripts`, and repetitions of a measurement in `growth` and `cuda`.
EPOCHS = 3

# The numbers of MNIST's training and test images.
MNIST = (60_000, 10_000)

# All scripts that train.
SCRIPTS = sorted([*small.ROOT.glob("MNIST_*.py"), *small.ROOT.glob("Synthetic_*.py")])

# Flags that make a deep script small. At its defaults it would take hours on a CPU. Each script
# takes those flags that it has.
DEEP = {
    "latents": "2,2",
    "num_ch": 8,
    "diffusion_ch": 8,
    "batch_size": 100,
    "num_epochs": 1,
    "auxiliary_epochs": 1,
    "num_samples": 100,
}

# The same on a GPU, where the defaults are fast enough.
ON_CUDA = {"auxiliary_epochs": 1}

# A deep model takes these two numbers of steps on a GPU. The difference of the two times is the
# time of the further steps, without what comes before the first step.
STEPS = (20, 60)

# The sizes in `growth`, where one thing grows at a time: the number of training images, of settings
# side by side, of hidden units, and of draws for the log-likelihood of IMAGES images.
GROWTH = {
    "rows": (1_000, 3_000, 10_000, 30_000, 60_000),
    "settings": (1, 3, 10, 25, 50),
    "d_hidden": (64, 128, 256, 512, 1_024),
    "draws": (10, 100, 1_000, 10_000),
}
GROWTH_PNG = small.ROOT / "results" / "growth.png"
GROWTH_CSV = small.ROOT / "results" / "data" / "growth.csv"

# What the sizes in `growth` count.
GROWTH_LABELS = {
    "rows": "training images",
    "settings": "settings side by side",
    "d_hidden": "hidden units",
    "draws": "draws of z per image",
}


# ------------------------------------------------------------------------------------------ timing

def quietly():
    """A context manager within which nothing is printed on stderr."""
    return contextlib.redirect_stderr(io.StringIO())


def timed(work, device):
    """Call work(). Returns (its result, its seconds). The seconds include the device's queue."""
    with quietly():
        wait_for(device)
        start = time.perf_counter()
        result = work()
        wait_for(device)
        return result, time.perf_counter() - start


def seconds(work, device):
    """The seconds that work() takes, as in `timed`."""
    _, duration = timed(work, device)
    return duration


def wait_for(device):
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_in_turns(works, device):
    """Let each of {name: work} take TURNS turns, after one turn to warm up.

    Returns {name: list of seconds}.
    """
    times = {name: [] for name in works}
    for _ in range(TURNS + 1):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return {name: durations[1:] for name, durations in times.items()}


def peak_memory():
    """The peak memory of this process so far, in GiB."""
    # Windows lacks this module.
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ------------------------------------------------------------------------------------ what is timed

@dataclass
class Case:
    """A script at the size at which it is measured.

    module  the imported script
    Model   the class of its model
    f       one setting for one epoch
    data    its data on the device
    """

    module: object
    Model: type
    f: object
    data: datasets.Data

    @property
    def train(self):
        """The training loop of a deep script, None for other scripts."""
        return getattr(self.module, "train", None)

    @property
    def draws_own_data(self):
        """Whether the script draws its data itself instead of reading images."""
        return hasattr(self.module, "correlated")

    def fit(self):
        """Train the setting as the script does. Returns the training.TrainedRun."""
        [run] = training.train_group(self.Model, [self.f], self.data, train=self.train)
        return run


def make_case(script, deep_flags=None):
    """The `Case` of a script, given its path.

    The flags are at their defaults. A deep script takes deep_flags, or DEEP if there are none.
    """
    module = importlib.import_module(script.stem)
    [Model] = [value for name, value in vars(module).items() if name.endswith("VAE")]
    flags = known_deep_flags(module, DEEP if deep_flags is None else deep_flags)
    f = module.Flags(**{"num_epochs": 1, **flags})

    device = common.select_device(f)
    data = make_data(module, Model, f, test_images=IMAGES[device.type])
    train = tuple(tensor.to(device) for tensor in data.train)
    test = tuple(tensor[:IMAGES[device.type]].to(device) for tensor in data.test)
    return Case(module, Model, f, dataclasses.replace(data, train=train, test=test))


def known_deep_flags(module, flags):
    """Those of {flag: value} that a deep script has. Another script takes none of them."""
    if not hasattr(module, "train"):
        return {}
    return {name: value for name, value in flags.items() if hasattr(module.Flags, name)}


def make_data(module, Model, f, test_images):
    """The data of one script: drawn digits in the form that its model reads, or its own data."""
    if hasattr(module, "correlated"):
        [data] = module.correlated([dataclasses.replace(f, num_samples=EXAMPLES)])
        return data

    if hasattr(module, "train"):
        data = small.digit_data(EXAMPLES // 8, test_images, torch.float32)
        train = as_images(f, data.train[0])
        # The pixels of the test images are binary.
        test = as_images(f, data.test[0]).round()
        return dataclasses.replace(data, train=(train,), test=(test,))

    data = small.digit_data(EXAMPLES, test_images, torch.float32)
    return small.as_quarters(data) if Model.__name__ == "CVAE" else data


def as_images(f, digits):
    """Drawn digits (n, 784) as a deep script with the setting f reads them: (n, 1, H, H).

    If the script has the flag --side, H is the side that it asks for.
    """
    images = digits.view(-1, 1, 28, 28)
    if not hasattr(f, "side"):
        return images
    side = deep.image_shape(f)[1]
    return F.avg_pool2d(images, 28 // side)


# ---------------------------------------------------------------------------- loops to compare with

def plain_deep_train(Model, f, data):
    """The shortest plain PyTorch loop that trains what a deep script trains in one epoch.

    The data lies on the device. Returns the model with the average of the weights.
    """
    images = data.train[0]
    with common.seeded(f.seed, "init", torch.device("cpu")):
        model = Model(f).to(images.device, images.dtype)
    for part in model.children():
        # The context of a DCT-VAE or a DVP-VAE measures the images.
        if hasattr(part, "fit"):
            part.fit(images)

    scalars = common.on_device(f, images)
    average = deep.WeightAverage(model, f)
    order = common.generator(f.seed, "batches", images.device)

    def negative_elbo(x):
        return model.loss(model(x, scalars), scalars).mean()

    def auxiliary_rate(x):
        """The loss of the auxiliary prior of a delta-VAE."""
        with torch.no_grad():
            q_z = average.module.q_z(x)
            z = q_z.sample()
        return (q_z.log_prob(z).sum((-2, -1)) - average.module.auxiliary(z)).mean()

    with common.seeded(f.seed, "noise", images.device):
        for _ in plain_deep_steps(model, f, images, order, negative_elbo, f.weight_decay):
            average.update(model)
        if hasattr(model, "auxiliary"):
            auxiliary = average.module.auxiliary.requires_grad_()
            for _ in plain_deep_steps(auxiliary, f, images, order, auxiliary_rate):
                pass
    return average.module


def plain_deep_steps(trained, f, images, order, loss_of, weight_decay=0.0):
    """Train the module `trained` for one epoch on binary draws of the images.

    order is the generator that shuffles the images, and loss_of(x) the loss of a batch. Yields
    after each step.
    """
    Optimizer = {"adamax": torch.optim.Adamax, "adamw": torch.optim.AdamW}[f.optimizer]
    optimizer = Optimizer(trained.parameters(), lr=f.lr, weight_decay=weight_decay)
    schedule = deep.warmup_cosine(optimizer, f, len(images) // f.batch_size)
    shuffled = torch.randperm(len(images), generator=order, device=images.device)
    for rows in shuffled.split(f.batch_size):
        loss = loss_of(common.binarise(images[rows]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), f.grad_clip)
        optimizer.step()
        schedule.step()
        yield


def usual_train(Model, f, examples):
    """Train for one epoch as most scripts do. Returns the model.

    A DataLoader collects single examples, and the loss is read after each batch. examples is a
    TensorDataset of what the model reads, or torchvision's MNIST.
    """
    loader = torch.utils.data.DataLoader(examples, batch_size=f.batch_size, shuffle=True)
    device = common.select_device(f)
    model = Model(f).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=f.lr)
    scalars = common.on_device(f, torch.zeros(0, device=device))

    total = 0.0
    for batch in loader:
        if isinstance(examples, torch.utils.data.TensorDataset):
            inputs = [tensor.to(device) for tensor in batch]
        else:
            images = batch[0].to(device).view(-1, 784)
            inputs = datasets.quarters(images) if Model.__name__ == "CVAE" else [images]
        loss = model.loss(model(*inputs, scalars), scalars).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), f.grad_clip)
        optimizer.step()
        total += loss.item()
    return model


class Products(TorchDispatchMode):
    """Counts the matrix products and convolutions that run within this context, by their shapes.

    `repeat` then runs the same number of each again.
    """

    KINDS = ("mm", "addmm", "bmm", "baddbmm", "convolution")

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()
        # For each key in counts the function and its arguments.
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.KINDS:
            shapes = []
            for value in args:
                is_tensor = torch.is_tensor(value)
                shapes.append((value.shape, value.stride()) if is_tensor else str(value))
            key = (function, *shapes)
            self.counts[key] += 1
            self.calls.setdefault(key, (function, args))
        return function(*args, **(kwargs or {}))

    @torch.no_grad()
    def repeat(self):
        for key, count in self.counts.items():
            function, args = self.calls[key]
            for _ in range(count):
                function(*args)


# ------------------------------------------------------------------------------------------- ratios

# The ratio in each column: the names of two works.
RATIOS = (
    ("fit", "plain"),
    ("usual", "fit"),
    ("grid", "one by one"),
    ("products", "evaluation"),
)


def ratios():
    """Print a row of ratios for each script, then what each run costs once."""
    device = common.select_device(MNIST_HVAE_Relu.Flags())
    print(
        f"{common.device_name(device)}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}; an epoch of {EXAMPLES:,} examples, of a deep script "
        f"{EXAMPLES // 8:,}; medians of {TURNS} turns; tests/benchmark.py explains the columns"
    )
    print(f"{'':42} {'fit ms':>7} {'plain':>6} {'usual':>6} {'grid':>6} {'eval':>6}")

    with tempfile.TemporaryDirectory() as folder:
        small.write_mnist(folder, EXAMPLES, 1)
        mnist = torchvision_mnist(folder)
        for script in SCRIPTS:
            works = works_to_compare(make_case(script), mnist, device)
            times = seconds_in_turns(works, device)
            row = f"{script.name:42} {1e3 * statistics.median(times['fit']):7.0f}"
            for numerator, denominator in RATIOS:
                row += f" {median_ratio(times, numerator, denominator):>6}"
            print(row, flush=True)
    print_fixed_costs(device)


def torchvision_mnist(folder):
    """The MNIST in this folder as torchvision's data set of single training images."""
    import torchvision

    to_tensor = torchvision.transforms.ToTensor()
    return torchvision.datasets.MNIST(folder, transform=to_tensor)


def works_to_compare(case, mnist, device):
    """The works that the ratios of one script are made of: {name: function without arguments}."""
    model = training.build(case.Model, case.f, case.data).eval()

    def evaluation():
        report.evaluate(model, case.f, case.data)

    with Products() as products, quietly():
        evaluation()
    works = {"products": products.repeat, "evaluation": evaluation}

    if case.train is not None:
        works["plain"] = lambda: plain_deep_train(case.Model, case.f, case.data)
        works["fit"] = case.fit
        return works

    examples = mnist
    if case.draws_own_data:
        examples = torch.utils.data.TensorDataset(*case.data.train)
    works["plain"] = lambda: small.plain_train(case.Model, case.f, case.data)
    works["fit"] = case.fit
    works["usual"] = lambda: usual_train(case.Model, case.f, examples)

    # On a CPU, models with convolutions are not trained side by side.
    if device.type == "cuda" or "CNN" not in case.module.__name__:
        works.update(grid_works(case))
    return works


def grid_works(case):
    """Train four settings with different betas side by side, and one by one."""
    beta = "beta_1" if hasattr(case.f, "beta_1") else "beta"
    grid = [dataclasses.replace(case.f, **{beta: value}) for value in (0.5, 1.0, 1.5, 2.0)]

    def one_by_one():
        for f in grid:
            training.train_group(case.Model, [f], case.data)

    return {
        "grid": lambda: training.train_group(case.Model, grid, case.data),
        "one by one": one_by_one,
    }


def median_ratio(times, numerator, denominator):
    """The median over the turns of the ratio of two works' times, as text.

    times is {name: list of seconds}. The text is "-" if one of the works is not among them.
    """
    if numerator not in times or denominator not in times:
        return "-"
    ratio_by_turn = [a / b for a, b in zip(times[numerator], times[denominator])]
    return f"{statistics.median(ratio_by_turn):.2f}"


def print_fixed_costs(device):
    """Print what each run costs once, no matter how many epochs it has."""
    # 1. Imports.
    command = [sys.executable, str(small.ROOT / "MNIST_HVAE_Relu.py"), "--help"]
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    print(f"start to --help (imports): {time.perf_counter() - start:.1f} s")

    # 2. The data.
    with tempfile.TemporaryDirectory() as folder:
        small.write_mnist(folder, *MNIST)
        f = MNIST_HVAE_Relu.Flags(data_dir=folder, num_epochs=1, dataset="mnist")
        loading = seconds(lambda: datasets.load_mnist([f]), device)
    print(f"MNIST from disk to the device: {loading:.1f} s")

    # 3. The first step.
    case = make_case(small.ROOT / "MNIST_HVAE_Relu.py")
    first_rows = tuple(tensor[:case.f.batch_size] for tensor in case.data.train)
    case.data = dataclasses.replace(case.data, train=first_rows)
    steps = [seconds(case.fit, device) for _ in range(3)]
    print(
        f"building a model, and its first step: {1e3 * steps[0]:.0f} ms, "
        f"again {1e3 * steps[-1]:.0f} ms"
    )


# ------------------------------------------------------------------------------------------ scripts

def time_scripts(argv):
    """Start each script from its command line, and print its seconds per epoch and peak memory.

    The flags are at their defaults, or those of DEEP. argv has further flags for the scripts that
    read data. There is no log-likelihood, but the peak memory includes the rest of the evaluation.
    """
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; mean of all epochs, the "
        "first included"
    )
    for path in SCRIPTS:
        module = importlib.import_module(path.stem)
        flags = {"num_epochs": EPOCHS, **known_deep_flags(module, DEEP)}
        draws_own_data = hasattr(module, "correlated")
        flags["num_draws" if draws_own_data else "num_samples"] = 0
        words = [f"--{name}={value}" for name, value in flags.items()]
        if not draws_own_data:
            words += argv

        with tempfile.TemporaryDirectory() as folder:
            memory = run_script(path, ["--out_dir", folder, *words])
            [record] = Path(folder).rglob("training.json")
            total = json.loads(record.read_text(encoding="utf-8"))["seconds"]
        print(
            f"{path.name:42} {total / flags['num_epochs']:8.2f} s per epoch, "
            f"{memory:5.2f} GiB, {' '.join(words)}",
            flush=True,
        )


def run_script(path, argv):
    """Run a script in a process of its own. Returns the peak memory of the process in GiB.

    Ends this program with what the script wrote on stderr if it fails.
    """
    command = [sys.executable, str(path), *argv]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        messages = process.stderr.read()
        # This is the one way to learn the memory of a single child. Windows lacks it.
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(messages)
    return usage.ru_maxrss / 2**20


# -------------------------------------------------------------------------------------------- whole

@torch.no_grad()
def plain_evaluation(model, scalars, images, draws):
    """Evaluate a two-level model as a short script does, with ten images at a time.

    Returns (log p(x), KL of each level, AU of each level, AU_kl of each level). draws is the number
    of draws of the latents per image.
    """
    log_px = []
    kls = []
    means = []
    for x in images.split(10):
        terms = model(x, scalars, sample_shape=(draws,))
        log_px.append(terms["log_w"].logsumexp(0) - torch.tensor(float(draws)).log())
        kls.append(torch.stack([terms["unit_kl_1"].mean(0), terms["kl_2"].mean(0)]))
        mean_1 = terms["mean_1"].expand(len(x), -1)
        means.append(torch.stack([mean_1, terms["mean_2"].mean(0)]))

    kl = torch.cat(kls, 1).mean(1)
    active_by_variance = (torch.cat(means, 1).var(1) > 0.01).sum(-1)
    active_by_kl = (kl > 0.01).sum(-1)
    return (
        torch.cat(log_px).mean().item(),
        kl.sum(-1).tolist(),
        active_by_variance.tolist(),
        active_by_kl.tolist(),
    )


def run_plain(argv):
    """Train and evaluate what MNIST_HVAE_Relu.py does, in the shortest plain loops.

    Prints the seconds of the training, those of the evaluation, and log p(x).
    """
    [f] = common.parse_flags(MNIST_HVAE_Relu.Flags, argv)
    [data] = datasets.load_mnist([f])
    x = data.test[0]
    scalars = common.on_device(f, x)

    def train():
        return small.plain_train(MNIST_HVAE_Relu.HVAE, f, data).eval()

    model, training_seconds = timed(train, x.device)
    (log_px, *_), evaluation_seconds = timed(
        lambda: plain_evaluation(model, scalars, x, f.num_samples), x.device
    )
    print(training_seconds, evaluation_seconds, log_px)


@dataclass
class JobTimes:
    """The seconds of the main job, done in one way.

    name        the way
    total       the seconds from start to table, None if the job was not done as a whole
    training    the seconds of the training
    evaluation  the seconds of the evaluation
    log_px      the mean log p(x) of the test images in nats, None as for total
    """

    name: str
    total: object
    training: float
    evaluation: float
    log_px: object

    def cells(self):
        """The row of the table."""
        parts = [f"{self.training:.2f}", f"{self.evaluation:.2f}"]
        if self.total is None:
            return [self.name, "-", *parts, "-", "-"]
        rest = self.total - (self.training + self.evaluation)
        return [self.name, f"{self.total:.2f}", *parts, f"{rest:.2f}", f"{self.log_px:.2f}"]


def time_whole_job(argv):
    """Print the times of the main job in three ways.

    1. MNIST_HVAE_Relu.py.
    2. The same in plain loops, in a process of its own.
    3. A straightforward script, of which a part is measured and scaled up.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = ["--out_dir", folder, *argv]

        _, total = timed_program(["MNIST_HVAE_Relu.py", *words])
        [result_path] = Path(folder).rglob("result.json")
        result = json.loads(result_path.read_text(encoding="utf-8"))
        script = JobTimes(
            name="MNIST_HVAE_Relu.py",
            total=total,
            training=result["seconds"]["train"],
            evaluation=result["seconds"]["evaluate"],
            log_px=result["metrics"]["log_px"],
        )

        printed, total = timed_program(["-m", "tests.benchmark", "plain", *words])
        plain_training, plain_evaluating, log_px = [float(word) for word in printed.split()]
        plain = JobTimes("in plain loops", total, plain_training, plain_evaluating, log_px)

        [f] = common.parse_flags(MNIST_HVAE_Relu.Flags, words)
        straightforward = time_straightforward_script(f, folder)

    header = ["seconds", "start to table", "training", "evaluation", "the rest", "log p(x)"]
    rows = [times.cells() for times in (script, plain, straightforward)]
    common.print_table([header, *rows])


def timed_program(argv):
    """Run Python with these arguments. Returns (what it printed, its seconds)."""
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, *argv],
        cwd=small.ROOT,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return process.stdout, time.perf_counter() - start


def time_straightforward_script(f, folder):
    """The `JobTimes` of a DataLoader's loop, and of an evaluation image by image.

    An epoch over a sixth of the images and the log-likelihood of 50 images are measured and scaled
    up. The images are written into a folder.
    """
    device = common.select_device(f)
    small.write_mnist(folder, MNIST[0] // 6, 1)
    examples = torchvision_mnist(folder)

    def train():
        return usual_train(MNIST_HVAE_Relu.HVAE, f, examples).eval()

    model, epoch_seconds = timed(train, device)
    images = torch.stack([examples[k][0].view(784) for k in range(50)]).to(device)
    scalars = common.on_device(f, images)

    def evaluate():
        for x in images.split(1):
            plain_evaluation(model, scalars, x, f.num_samples)

    return JobTimes(
        name="a DataLoader's, image by image",
        total=None,
        training=epoch_seconds * 6 * f.num_epochs,
        evaluation=MNIST[1] / 50 * seconds(evaluate, device),
        log_px=None,
    )


# ------------------------------------------------------------------------------------------- growth

@dataclass
class GrowthCurve:
    """How one measure of the main job grows with one quantity.

    quantity  what grows, one of GROWTH
    measure   "seconds" or "GiB"
    sizes     the sizes of the quantity
    values    the measure at each size
    """

    quantity: str
    measure: str
    sizes: tuple
    values: list

    @property
    def exponent(self):
        """The slope on logarithmic axes over the largest three sizes.

        There the fixed costs no longer hide it.
        """
        return np.polyfit(np.log(self.sizes[-3:]), np.log(self.values[-3:]), 1)[0]


def measure_growth(quantity, size, rows, repetitions):
    """Measure the main job with one quantity of this size. Call it in a process of its own.

    The work is an epoch of training on `rows` images, or for "draws" an evaluation. Returns (the
    least seconds of all repetitions, the peak memory above that at the start in GiB). On a GPU the
    memory is the GPU's.
    """
    memory_before = peak_memory()
    flags = {}
    if quantity == "d_hidden":
        flags = {"d_hidden": size}
    elif quantity == "draws":
        flags = {"num_samples": size}
    f = MNIST_HVAE_Relu.Flags(num_epochs=1, **flags)

    device = common.select_device(f)
    x = torch.rand(size if quantity == "rows" else rows, 784, device=device)
    data = datasets.Data("random", (x,), (x[:IMAGES[device.type]],))

    if quantity == "draws":
        model = training.build(MNIST_HVAE_Relu.HVAE, f, data).eval()

        def work():
            report.evaluate(model, f, data)
    else:
        count = size if quantity == "settings" else 1
        settings = [dataclasses.replace(f, beta_1=0.1 * (k + 1)) for k in range(count)]

        def work():
            training.train_group(MNIST_HVAE_Relu.HVAE, settings, data)

    least = min(seconds(work, device) for _ in range(repetitions))
    if device.type == "cuda":
        return least, torch.cuda.max_memory_allocated() / 2**30
    return least, peak_memory() - memory_before


def growth():
    """Print a table of time and memory over each quantity, save it, and draw its picture."""
    device = common.select_device(MNIST_HVAE_Relu.Flags())
    print(
        f"{common.device_name(device)}, torch {torch.__version__}; {EXAMPLES:,} rows but where "
        f"they grow; the least of {EPOCHS} times; a process each"
    )
    measurements = []
    for quantity, sizes in GROWTH.items():
        arguments = [(quantity, size, EXAMPLES, EPOCHS) for size in sizes]
        with small.CHILDREN.Pool(1, maxtasksperchild=1) as pool:
            results = pool.starmap(measure_growth, arguments, chunksize=1)
        for size, (duration, memory) in zip(sizes, results):
            measurements.append((quantity, size, duration, memory))

    table = [["what", "size", "seconds", "GiB"]]
    for quantity, size, duration, memory in measurements:
        table.append([quantity, f"{size:,}", f"{duration:.4f}", f"{memory:.3f}"])
    common.print_table(table)
    for curve in growth_curves(measurements):
        print(f"{curve.measure} over {curve.quantity}: exponent {curve.exponent:.2f}")
    write_growth(GROWTH_CSV, measurements)
    draw_growth()


def growth_curves(measurements):
    """The `GrowthCurve`s of a list of (quantity, size, seconds, GiB): two for each quantity."""
    curves = []
    for quantity in dict.fromkeys(quantity for quantity, *_ in measurements):
        of_quantity = [row[1:] for row in measurements if row[0] == quantity]
        sizes, durations, memories = zip(*of_quantity)
        curves.append(GrowthCurve(quantity, "seconds", sizes, durations))
        curves.append(GrowthCurve(quantity, "GiB", sizes, memories))
    return curves


def write_growth(path, measurements):
    """Write a list of (quantity, size, seconds, GiB) as a .csv file, from which it is drawn."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["what", "size", "seconds", "GiB"])
    for quantity, size, duration, memory in measurements:
        writer.writerow([quantity, size, f"{duration:.6g}", f"{memory:.6g}"])
    files.write_text(path, text.getvalue())


def read_growth(path):
    """The list of (quantity, size, seconds, GiB) in a .csv file of `write_growth`."""
    measurements = []
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            duration, memory = float(row["seconds"]), float(row["GiB"])
            measurements.append((row["what"], int(row["size"]), duration, memory))
    return measurements


def draw_growth():
    """Draw growth.png from growth.csv: a column for each quantity, a row for each measure."""
    if not GROWTH_CSV.exists():
        sys.exit(f"{GROWTH_CSV} does not exist; python -m tests.benchmark growth makes it")
    curves = growth_curves(read_growth(GROWTH_CSV))

    def draw(axes):
        for ax, curve in zip(axes.T.flat, curves):
            plot_growth(ax, curve)

    pictures.save_figure(
        GROWTH_PNG,
        columns=len(curves) // 2,
        rows=2,
        width=3.2,
        height=2.6,
        caption="",
        draw=draw,
    )


def plot_growth(ax, curve):
    """Plot a `GrowthCurve` on logarithmic axes, with the measured sizes below it."""
    ax.plot(curve.sizes, curve.values, "o-")
    pictures.set_log_axis(ax, "x", curve.sizes)
    pictures.set_log_axis(ax, "y", curve.values)
    ax.set_xticks(curve.sizes, [short_number(size) for size in curve.sizes])
    ax.minorticks_off()

    work = "an evaluation" if curve.quantity == "draws" else "an epoch"
    measure = "memory" if curve.measure == "GiB" else "time"
    unit = "GiB" if curve.measure == "GiB" else "s"
    ax.set(
        xlabel=GROWTH_LABELS[curve.quantity],
        ylabel=f"{measure} of {work} ({unit})",
        title=f"exponent {curve.exponent:.2f}",
    )


def short_number(number):
    """A whole number for a narrow axis: "30k" for 30,000."""
    return f"{number // 1000}k" if number % 1000 == 0 else str(number)


# --------------------------------------------------------------------------------------------- cuda

def on_cuda(device="cuda"):
    """Print what only a GPU can show.

    One table has the seconds of an epoch of MNIST's size: of the main job alone, as a 5x5 grid and
    the usual way, and of each deep model at its defaults. The step is captured as a graph or
    launched each time, in several precisions. Then follows the evaluation of the main job: its
    speed, and the log p(x) of one model in three precisions.
    """
    f = MNIST_HVAE_Relu.Flags(num_epochs=1, device=device)
    device = common.select_device(f)
    print(
        f"{common.device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} "
        f"threads; an epoch of {MNIST[0]:,} images",
        flush=True,
    )

    # A deep model takes STEPS[1] batches of at most 300 images.
    num_train = max(MNIST[0], STEPS[1] * 300)
    images = small.digit_data(num_train, MNIST[1], torch.float32)
    train_images = images.train[0][:MNIST[0]]
    data = dataclasses.replace(
        images, train=(train_images.to(device),), test=(images.test[0].to(device),)
    )

    rows = [["", "precision", "captured, s", "launched, s", "launching"]]
    rows += rows_of_main_job(f, data, device)
    rows.append(row_of_usual_way(f, train_images, device))
    for script in SCRIPTS:
        if hasattr(importlib.import_module(script.stem), "train"):
            rows += rows_of_deep_script(script, f, images.train[0], device)
    common.print_table(rows)

    compare_precisions(f, data, device)


def captured_and_launched(name, precision, measure):
    """A row of the table: the seconds by measure(), with captured steps and without."""
    captured = measure()
    # The step is captured after this number of steps, which training does not reach.
    with mock.patch.object(training.Replayed, "EAGER", sys.maxsize):
        launched = measure()
    print(f"{name}, {precision}: done", file=sys.stderr, flush=True)
    return [
        name, precision, f"{captured:.3f}", f"{launched:.3f}", f"{1 - captured / launched:.0%}"
    ]


def rows_of_main_job(f, data, device):
    """The main job alone and as a 5x5 grid."""
    values = (0.1, 1.0, 2.0, 4.0, 6.0)
    grid = []
    for beta_1 in values:
        for beta_2 in values:
            grid.append(dataclasses.replace(f, beta_1=beta_1, beta_2=beta_2))

    rows = []
    for precision in ("float32", "tf32"):
        for name, settings in (("MNIST_HVAE_Relu", [f]), ("MNIST_HVAE_Relu, 5x5 grid", grid)):
            group = [dataclasses.replace(setting, matmul=precision) for setting in settings]

            def train():
                training.train_group(MNIST_HVAE_Relu.HVAE, group, data)

            def median_epoch():
                return statistics.median(seconds(train, device) for _ in range(EPOCHS))

            rows.append(captured_and_launched(name, precision, median_epoch))
    return rows


def row_of_usual_way(f, train_images, device):
    """The main job the usual way."""
    examples = torch.utils.data.TensorDataset(train_images)
    epoch = seconds(lambda: usual_train(MNIST_HVAE_Relu.HVAE, f, examples), device)
    return ["MNIST_HVAE_Relu, a DataLoader's loop", "float32", "-", f"{epoch:.3f}", "-"]


def rows_of_deep_script(script, main_f, train_images, device):
    """A deep model in three precisions, on the device of the setting main_f of the main job."""
    case = make_case(script, ON_CUDA)
    defaults = case.f
    images = as_images(defaults, train_images[:STEPS[1] * defaults.batch_size]).to(device)
    steps_per_epoch = MNIST[0] // defaults.batch_size

    def epoch():
        further_seconds = seconds_of_steps(case, images, STEPS[1], device)
        further_seconds -= seconds_of_steps(case, images, STEPS[0], device)
        return steps_per_epoch / (STEPS[1] - STEPS[0]) * further_seconds

    precisions = {
        "float32": {"matmul": "float32", "autocast": "none"},
        "tf32": {"matmul": "tf32", "autocast": "none"},
        "bf16": {"matmul": "float32", "autocast": "bf16"},
    }
    rows = []
    for precision, flags in precisions.items():
        case.f = dataclasses.replace(defaults, device=main_f.device, num_epochs=1, **flags)
        rows.append(captured_and_launched(script.stem, precision, epoch))
    return rows


def seconds_of_steps(case, images, count, device):
    """The seconds of this number of training steps, and of what comes before the first one."""
    rows = images[:count * case.f.batch_size]
    case.data = dataclasses.replace(case.data, train=(rows,))
    return seconds(case.fit, device)


def compare_precisions(f, data, device):
    """Train the main job, and print the log p(x) of the model and its speed in three precisions."""
    with quietly():
        [run] = training.train_group(MNIST_HVAE_Relu.HVAE, [f], data)

    log_px = {}
    for precision in ("float32", "tf32", "bf16"):
        matmul = "tf32" if precision == "tf32" else "float32"
        setting = dataclasses.replace(f, matmul=matmul)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            (metrics, _), duration = timed(
                lambda: report.evaluate(run.model, setting, data), device
            )
        log_px[precision] = metrics["log_px"]
        print(
            f"log p(x) of {MNIST[1]:,} images at {f.num_samples:,} draws, {precision}: "
            f"{log_px[precision]:.4f} nats, {MNIST[1] * f.num_samples / duration:,.0f} draws/s"
        )

    difference = max(log_px.values()) - min(log_px.values())
    verdict = "as" if difference < 0.05 else "NOT as"
    print(f"apart {difference:.4f} nats, {verdict} they should: within 0.05")


# --------------------------------------------------------------------------------------------- main

COMMANDS = {
    "ratios": lambda argv: ratios(),
    "scripts": lambda argv: time_scripts(argv),
    "whole": lambda argv: time_whole_job(argv),
    "plain": lambda argv: run_plain(argv),
    "growth": lambda argv: growth(),
    "growth-picture": lambda argv: draw_growth(),
    "cuda": lambda argv: on_cuda(),
}


def main(argv=None):
    words = list(sys.argv[1:] if argv is None else argv)
    command = words.pop(0) if words else "ratios"
    if command not in COMMANDS:
        wanted = ", ".join(COMMANDS)
        sys.exit(f"python -m tests.benchmark {command}: wants one of {wanted}")
    COMMANDS[command](words)


if __name__ == "__main__":
    main()
