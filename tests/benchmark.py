"""How fast it is, measured on this machine. `python -m tests.benchmark` prints ratios, each of works timed in turn in one
process, so that a slow moment of the machine falls on both sides, medians of several turns; for every training script the
milliseconds of an epoch of training, "fit", and

    plain    fit / an epoch of the shortest plain PyTorch loop over the same model, data on the device
    usual    an epoch the usual way, a DataLoader over torchvision's data set and loss.item() each batch / fit
    grid     an epoch of a grid of 4 / of its settings one by one, as the script itself would train them
    eval     evaluation's matrix products and convolutions alone / evaluation

A deep script, one with a loop of its own, is small here (DEEP), sees an eighth of the examples, and has no usual way; of
MNIST_VAE_Delta.py both loops take an epoch of each of its two phases. Nor is there a grid where the script trains its settings
one by one: the deep ones do, and on a CPU those with convolutions.

`python -m tests.benchmark scripts` prints each script's time per epoch and peak memory, with the flags that it was given, `...
whole` what the main job takes from start to table beside plain scripts, with any flags added (--num_epochs 20; `... plain` is one
of those), `... growth` how the main job's time and memory grow, with a picture, and `... cuda` what only a GPU can show.
"""
import collections
import contextlib
import dataclasses
import importlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import common
import datasets
import deep
import pictures
import report
import training
import MNIST_HVAE_Relu
from tests import small

TURNS = 5
EXAMPLES = 6_400                                          # fifty batches: an "epoch" here
IMAGES = {"cpu": 20, "cuda": 1000}                        # that are evaluated
EPOCHS = 3                                                # of a script, and of the grid on a GPU
MNIST = 60_000, 10_000                                    # images to train on, and to test
SCRIPTS = sorted([*small.ROOT.glob("MNIST_*.py"), *small.ROOT.glob("Synthetic_*.py")])
# What makes a deep script one for a small machine, where at its defaults it would take hours; each takes the flags it has.
DEEP = {"latents": "2,2", "num_ch": 8, "diffusion_ch": 8, "batch_size": 100, "num_epochs": 1, "auxiliary_epochs": 1, "num_samples": 100}

ON_CUDA = {"auxiliary_epochs": 1}                         # the same on a GPU, where the defaults do
STEPS = 20, 60                                            # of a deep model there: what the difference takes is a step's time

# Of the main job, each alone: training rows, settings side by side, hidden units, and draws of the log-likelihood of IMAGES images.
GROWTH = {"rows": (1_000, 3_000, 10_000, 30_000, 60_000), "settings": (1, 3, 10, 25, 50), "d_hidden": (64, 128, 256, 512, 1_024),
          "draws": (10, 100, 1_000, 10_000)}
GROWTH_PNG = small.ROOT / "results" / "growth.png"


def quietly():
    return contextlib.redirect_stderr(io.StringIO())


def seconds(work, device):
    """How long work takes, the device's queue included."""
    with quietly():
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def in_turn(works, device):
    """The seconds of each of {name: work} in TURNS turns, after one to warm up: {name: list}."""
    times = {name: [] for name in works}
    for _ in range(TURNS + 1):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return {name: of[1:] for name, of in times.items()}


def deep_flags(module, flags):
    """{flag: value} of these that a deep script's module has, {} of another's."""
    return {name: value for name, value in flags.items() if hasattr(module, "train") and hasattr(module.Flags, name)}


def model_of(script, deep=None):
    """(module, model class, flags for one epoch, else at their defaults, or, if deep, at those of `deep`, DEEP if not told otherwise;
    data) of a script."""
    module = importlib.import_module(script.stem)
    [Model] = [of for name, of in vars(module).items() if name.endswith("VAE")]
    f = module.Flags(**{"num_epochs": 1} | deep_flags(module, DEEP if deep is None else deep))
    device = common.device_of(f)
    n_test = IMAGES[device.type]
    if hasattr(module, "correlated"):
        [data] = module.correlated([dataclasses.replace(f, num_samples=EXAMPLES)])
    elif hasattr(module, "train"):
        data = small.digit_data(EXAMPLES // 8, n_test, torch.float32)
        train, test = (t[0].view(-1, *datasets.image_shape(f.dataset)) for t in (data.train, data.test))
        data = dataclasses.replace(data, train=(train,), test=(test.round(),))
    else:
        data = small.digit_data(EXAMPLES, n_test, torch.float32)
        data = small.as_quarters(data) if Model.__name__ == "CVAE" else data
    return module, Model, f, dataclasses.replace(data, train=tuple(t.to(device) for t in data.train),
                                                 test=tuple(t[:n_test].to(device) for t in data.test))


def plain_deep(Model, f, data):
    """The shortest plain PyTorch loop that trains what a deep script's own loop trains, over one epoch: data on the device."""
    x = data.train[0]
    with common.seeded(f.seed, "init", torch.device("cpu")):
        model = Model(f).to(x.device, x.dtype)
    for part in model.children():
        if hasattr(part, "fit"):                          # a context
            part.fit(x)
    g, average, order = common.on_device(f, x), deep.WeightAverage(model, f), common.generator(f.seed, "batches", x.device)

    def steps(trained, weight_decay, loss_of):
        kind = {"adamax": torch.optim.Adamax, "adamw": torch.optim.AdamW}[f.optimizer]
        optimizer = kind(trained.parameters(), lr=f.lr, weight_decay=weight_decay)
        schedule = deep.warmup_cosine(optimizer, f, len(x) // f.batch_size)
        for rows in torch.randperm(len(x), generator=order, device=x.device).split(f.batch_size):
            loss = loss_of(common.binarise(x[rows]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.parameters(), f.grad_clip)
            optimizer.step()
            schedule.step()
            yield

    def rate(x):
        """What the auxiliary prior of a DeltaVAE minimises."""
        with torch.no_grad():
            q_z = average.module.q_z(x)
            z = q_z.sample()
        return (q_z.log_prob(z).sum((-2, -1)) - average.module.auxiliary(z)).mean()

    with common.seeded(f.seed, "noise", x.device):
        for _ in steps(model, f.weight_decay, lambda x: model.loss(model(x, g), g).mean()):
            average.update(model)
        if hasattr(model, "auxiliary"):
            for _ in steps(average.module.auxiliary.requires_grad_(), 0, rate):
                pass
    return average.module


def usual_way(Model, f, images):
    """An epoch as most scripts have it: a DataLoader over single examples, and a loss that is read each batch."""
    loader = torch.utils.data.DataLoader(images, batch_size=f.batch_size, shuffle=True)
    device = common.device_of(f)
    model = Model(f).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=f.lr)
    g, total = common.on_device(f, torch.zeros(0, device=device)), 0.0
    for batch in loader:
        x = batch[0].to(device)
        if isinstance(images, torch.utils.data.TensorDataset):
            inputs = [t.to(device) for t in batch]
        else:
            inputs = datasets.quarters(x.view(-1, 784)) if Model.__name__ == "CVAE" else [x.view(-1, 784)]
        loss = model.loss(model(*inputs, g), g).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), f.grad_clip)
        optimizer.step()
        total += loss.item()
    return model


class Products(TorchDispatchMode):
    """Counts the matrix products and convolutions that run, by their shapes; `again` runs as many of the same."""
    KINDS = ("mm", "addmm", "bmm", "baddbmm", "convolution")

    def __init__(self):
        super().__init__()
        self.counts, self.calls = collections.Counter(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.KINDS:
            key = function, *((a.shape, a.stride()) if torch.is_tensor(a) else str(a) for a in args)
            self.counts[key] += 1
            self.calls.setdefault(key, (function, args))
        return function(*args, **(kwargs or {}))

    @torch.no_grad()
    def again(self):
        for key, count in self.counts.items():
            function, args = self.calls[key]
            for _ in range(count):
                function(*args)


def ratios():
    device = common.device_of(MNIST_HVAE_Relu.Flags())
    print(f"{common.device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}; an epoch of "
          f"{EXAMPLES:,} examples, of a deep script {EXAMPLES // 8:,}; medians of {TURNS} turns; what is what says tests/benchmark.py")
    print(f"{'':42} {'fit ms':>7} {'plain':>6} {'usual':>6} {'grid':>6} {'eval':>6}")
    with tempfile.TemporaryDirectory() as folder:
        small.write_mnist(folder, EXAMPLES, 1)
        import torchvision
        mnist = torchvision.datasets.MNIST(folder, transform=torchvision.transforms.ToTensor())
        for script in SCRIPTS:
            module, Model, f, data = model_of(script)
            model = training.build(Model, f, data).eval()
            with Products() as products, quietly():
                report.evaluate(model, f, data)
            works = {"products": products.again, "evaluation": lambda: report.evaluate(model, f, data)}
            if hasattr(module, "train"):
                works |= {"plain": lambda: plain_deep(Model, f, data),
                          "fit": lambda: training.train_group(Model, [f], data, train=module.train)}
            else:
                images = torch.utils.data.TensorDataset(*data.train) if hasattr(module, "correlated") else mnist
                works |= {"plain": lambda: small.plain_train(Model, f, data),
                          "fit": lambda: training.train_group(Model, [f], data), "usual": lambda: usual_way(Model, f, images)}
                if device.type == "cuda" or "CNN" not in script.stem:
                    flag = "beta_1" if hasattr(f, "beta_1") else "beta"
                    grid = [dataclasses.replace(f, **{flag: 0.5 * (k + 1)}) for k in range(4)]
                    works |= {"grid": lambda: training.train_group(Model, grid, data),
                              "one by one": lambda: [training.train_group(Model, [g], data) for g in grid]}
            times = in_turn(works, device)
            row = f"{script.name:42} {1e3 * statistics.median(times['fit']):7.0f}"
            for one, other in (("fit", "plain"), ("usual", "fit"), ("grid", "one by one"), ("products", "evaluation")):
                of_turns = [a / b for a, b in zip(times.get(one, []), times.get(other, []))]
                row += f" {statistics.median(of_turns):6.2f}" if of_turns else f" {'-':>6}"
            print(row, flush=True)
    fixed_costs(device)


def fixed_costs(device):
    """What a run pays once."""
    start = time.perf_counter()
    subprocess.run([sys.executable, str(small.ROOT / "MNIST_HVAE_Relu.py"), "--help"], stdout=subprocess.DEVNULL, check=True)
    print(f"start to --help (imports): {time.perf_counter() - start:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        small.write_mnist(folder, *MNIST)
        f = MNIST_HVAE_Relu.Flags(data_dir=folder, num_epochs=1, dataset="mnist")
        print(f"MNIST from disk to the device: {seconds(lambda: datasets.load_mnist([f]), device):.1f} s")
    _, Model, f, data = model_of(small.ROOT / "MNIST_HVAE_Relu.py")
    one_batch = dataclasses.replace(data, train=tuple(t[:f.batch_size] for t in data.train))
    steps = [seconds(lambda: training.train_group(Model, [f], one_batch), device) for _ in range(3)]
    print(f"building a model, and its first step: {1e3 * steps[0]:.0f} ms, again {1e3 * steps[-1]:.0f} ms")


def of_scripts(argv):
    """Each training script from its command line, at its defaults or DEEP: seconds per epoch, and peak memory of the process, its
    evaluation without a log-likelihood included."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; mean of all epochs, the first included")
    for path in SCRIPTS:
        with tempfile.TemporaryDirectory() as folder:
            module = importlib.import_module(path.stem)
            no_draws, data = ("num_draws", []) if hasattr(module, "correlated") else ("num_samples", argv)
            flags = {"num_epochs": EPOCHS} | deep_flags(module, DEEP) | {no_draws: 0}
            words = [f"--{name}={value}" for name, value in flags.items()] + data
            with subprocess.Popen([sys.executable, str(path), "--out_dir", folder, *words], stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, text=True) as process:
                error = process.stderr.read()
                _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(error)
            [training] = Path(folder).rglob("training.json")
            per_epoch = json.loads(training.read_text())["seconds"] / flags["num_epochs"]
            print(f"{path.name:42} {per_epoch:8.2f} s per epoch, {usage.ru_maxrss / 2**20:5.2f} GiB, {' '.join(words)}", flush=True)


@torch.no_grad()
def plain_evaluation(model, g, images, draws):
    """(log p(x), KLs, AU, AU_kl) of images, as a short script computes them: so many draws of ten images at a time."""
    log_px, kls, means = [], [], []
    for x in images.split(10):
        terms = model(x, g, sample_shape=(draws,))
        log_px.append(terms["log_w"].logsumexp(0) - torch.tensor(float(draws)).log())
        kls.append(torch.stack([terms["unit_kl_1"].mean(0), terms["kl_2"].mean(0)]))
        means.append(torch.stack([terms["mean_1"].expand(len(x), -1), terms["mean_2"].mean(0)]))
    kl = torch.cat(kls, 1).mean(1)
    return (torch.cat(log_px).mean().item(), kl.sum(-1).tolist(), (torch.cat(means, 1).var(1) > 0.01).sum(-1).tolist(),
            (kl > 0.01).sum(-1).tolist())


def plain(argv):
    """What MNIST_HVAE_Relu.py trains and measures, in the shortest plain loops; prints the seconds of both, and log p(x)."""
    [f] = common.parse_flags(MNIST_HVAE_Relu.Flags, argv)
    [data], models, found = datasets.load_mnist([f]), [], []
    x = data.test[0]
    training = seconds(lambda: models.append(small.plain_train(MNIST_HVAE_Relu.HVAE, f, data).eval()), x.device)
    evaluation = seconds(lambda: found.extend(plain_evaluation(models[0], common.on_device(f, x), x, f.num_samples)), x.device)
    print(training, evaluation, found[0])


def whole(argv):
    """The main job from start to table; the same in plain loops, in a process of its own; and a straightforward script, of which an
    epoch over a sixth of the images and the log-likelihood of 50 images, one by one, are measured and scaled up."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--out_dir", folder, *argv]
        [f], models = common.parse_flags(MNIST_HVAE_Relu.Flags, words), []
        device = common.device_of(f)

        def timed(*command):
            start = time.perf_counter()
            out = subprocess.run([sys.executable, *command, *words], cwd=small.ROOT, check=True, stdout=subprocess.PIPE,
                                 stderr=subprocess.DEVNULL, text=True).stdout
            return out, time.perf_counter() - start

        _, ours = timed("MNIST_HVAE_Relu.py")
        [result] = [json.loads(path.read_text()) for path in Path(folder).rglob("result.json")]
        out, plainly = timed("-m", "tests.benchmark", "plain")
        small.write_mnist(folder, MNIST[0] // 6, 1)
        import torchvision
        images = torchvision.datasets.MNIST(folder, transform=torchvision.transforms.ToTensor())
        training = seconds(lambda: models.append(usual_way(MNIST_HVAE_Relu.HVAE, f, images).eval()), device) * 6 * f.num_epochs
        one_by_one, g = torch.stack([images[k][0].view(784) for k in range(50)]).to(device), common.on_device(f, torch.zeros(0, device=device))
        evaluation = MNIST[1] / 50 * seconds(
            lambda: [plain_evaluation(models[0], g, x, f.num_samples) for x in one_by_one.split(1)], device)
    rows = [["seconds", "start to table", "training", "evaluation", "the rest", "log p(x)"]]
    for name, took, *of, log_px in (
            ("MNIST_HVAE_Relu.py", ours, result["seconds"]["train"], result["seconds"]["evaluate"], result["metrics"]["log_px"]),
            ("in plain loops", plainly, *map(float, out.split())),
            ("a DataLoader's, image by image", None, training, evaluation, None)):
        rest = [f"{took:.2f}", *(f"{part:.2f}" for part in of), f"{took - sum(of):.2f}", f"{log_px:.2f}"] if took else [
            "-", *(f"{part:.2f}" for part in of), "-", "-"]
        rows.append([name, *rest])
    common.print_rows(rows)


def grown(what, value, rows, times):
    """In a process of its own: the seconds of an epoch of MNIST_HVAE_Relu.py, or of evaluating its draws, where one thing is of this
    size, the least of so many times; and the process's peak memory above what it began with, in GiB, on a GPU the GPU's."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    flags = {"d_hidden": {"d_hidden": value}, "draws": {"num_samples": value}}.get(what, {})
    f = MNIST_HVAE_Relu.Flags(num_epochs=1, **flags)
    device = common.device_of(f)
    x = torch.rand(value if what == "rows" else rows, 784, device=device)
    data = datasets.Data("random", (x,), (x[:IMAGES[device.type]],))
    if what == "draws":
        model = training.build(MNIST_HVAE_Relu.HVAE, f, data).eval()
        work = lambda: report.evaluate(model, f, data)
    else:
        settings = [dataclasses.replace(f, beta_1=0.1 * (k + 1)) for k in range(value if what == "settings" else 1)]
        work = lambda: training.train_group(MNIST_HVAE_Relu.HVAE, settings, data)
    took = min(seconds(work, device) for _ in range(times))
    if device.type == "cuda":
        return took, torch.cuda.max_memory_allocated() / 2**30
    return took, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def growth():
    """A table and a picture, on logarithmic axes, of time and memory over what grows; the exponents are of the largest three sizes,
    where fixed costs no longer hide it."""
    print(f"{common.device_name(common.device_of(MNIST_HVAE_Relu.Flags()))}, torch {torch.__version__}; {EXAMPLES:,} rows but where they "
          f"grow; the least of {EPOCHS} times; a process each")
    rows, panels = [["what", "size", "seconds", "GiB"]], []
    for what, sizes in GROWTH.items():
        with small.FORKS.Pool(1, maxtasksperchild=1) as pool:
            found = pool.starmap(grown, [(what, size, EXAMPLES, EPOCHS) for size in sizes], chunksize=1)
        rows += [[what, f"{size:,}", f"{took:.4f}", f"{peak:.3f}"] for size, (took, peak) in zip(sizes, found)]
        for name, of in zip(("seconds", "GiB"), zip(*found)):
            exponent = np.polyfit(np.log(sizes[-3:]), np.log(of[-3:]), 1)[0]
            panels.append((what, name, sizes, of, exponent))
    common.print_rows(rows)
    for what, name, _, _, exponent in panels:
        print(f"{name} over {what}: exponent {exponent:.2f}")

    def draw(axes):
        for ax, (what, name, sizes, of, exponent) in zip(axes.T.flat, panels):
            ax.loglog(sizes, of, "o-", label=f"exponent {exponent:.2f}")
            ax.set_yticks(of, [f"{value:.2g}" for value in of])
            ax.set_yticks([], minor=True)
            ax.set(xlabel=what, ylabel=f"{name} of an evaluation" if what == "draws" else f"{name} of an epoch")
            ax.legend(fontsize=7)
    pictures.save_figure(GROWTH_PNG, len(GROWTH), 2, 3.2, 2.6, "", draw)


def of_steps(Model, f, data, module, count):
    """The seconds of so many training steps of one setting, and of what comes before the first."""
    rows = slice(count * f.batch_size)
    few = dataclasses.replace(data, train=tuple(t[rows] for t in data.train))
    return seconds(lambda: training.train_group(Model, [f], few, train=getattr(module, "train", None)), data.train[0].device)


def on_cuda(device="cuda"):
    """What only a GPU can show, as one table: an epoch of MNIST's size of the main job, alone, as a 5x5 grid and the usual way, and of
    each deep model at its defaults, from STEPS; captured as a graph and launched step by step; in three precisions. Then the
    evaluation of the main job: its speed, and the log p(x) of one model in the three precisions."""
    f = MNIST_HVAE_Relu.Flags(num_epochs=1, device=device)
    device = common.device_of(f)
    print(f"{common.device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads; an epoch of {MNIST[0]:,} images", flush=True)
    images = small.digit_data(max(MNIST[0], STEPS[1] * 300), MNIST[1], torch.float32)
    data = dataclasses.replace(images, train=(images.train[0][:MNIST[0]].to(device),), test=(images.test[0].to(device),))
    values, rows = (0.1, 1.0, 2.0, 4.0, 6.0), [["", "precision", "captured, s", "launched, s", "launching"]]
    sheet = [dataclasses.replace(f, beta_1=a, beta_2=b) for a in values for b in values]

    def add(name, precision, work):
        """A row: the seconds that work() says, with captured steps and without."""
        found = []
        for eager in (training.Replayed.EAGER, sys.maxsize):
            with mock.patch.object(training.Replayed, "EAGER", eager):
                found.append(work())
        rows.append([name, precision, f"{found[0]:.3f}", f"{found[1]:.3f}", f"{1 - found[0] / found[1]:.0%}"])
        print(f"{name}, {precision}: done", file=sys.stderr, flush=True)

    for precision in ("float32", "tf32"):
        for name, group in (("MNIST_HVAE_Relu", [f]), ("MNIST_HVAE_Relu, 5x5 grid", sheet)):
            group = [dataclasses.replace(g, matmul=precision) for g in group]
            add(name, precision, lambda: statistics.median(
                seconds(lambda: training.train_group(MNIST_HVAE_Relu.HVAE, group, data), device) for _ in range(EPOCHS)))
    usual = seconds(lambda: usual_way(MNIST_HVAE_Relu.HVAE, f, torch.utils.data.TensorDataset(images.train[0][:MNIST[0]])), device)
    rows.append(["MNIST_HVAE_Relu, a DataLoader's loop", "float32", "-", f"{usual:.3f}", "-"])
    for script in (path for path in SCRIPTS if "\ndef train(" in path.read_text()):
        module, Model, g, few = model_of(script, ON_CUDA)
        x = images.train[0][:STEPS[1] * g.batch_size].view(-1, *datasets.image_shape(g.dataset)).to(device)
        few, epoch = dataclasses.replace(few, train=(x,)), MNIST[0] // g.batch_size
        for precision, flags in (("float32", {}), ("tf32", {"matmul": "tf32"}), ("bf16", {"autocast": "bf16"})):
            g = dataclasses.replace(g, device=f.device, num_epochs=1, **{"matmul": "float32", "autocast": "none"} | flags)
            add(script.stem, precision, lambda: epoch / (STEPS[1] - STEPS[0]) * (
                of_steps(Model, g, few, module, STEPS[1]) - of_steps(Model, g, few, module, STEPS[0])))
    common.print_rows(rows)

    with quietly():
        [(model, _)] = training.train_group(MNIST_HVAE_Relu.HVAE, [f], data)
    log_px = {}
    for precision in ("float32", "tf32", "bf16"):
        g, cast = dataclasses.replace(f, matmul="tf32" if precision == "tf32" else "float32"), torch.autocast(
            device.type, torch.bfloat16, enabled=precision == "bf16")
        with cast, quietly():
            start = time.perf_counter()
            log_px[precision] = report.evaluate(model, g, data)[0]["log_px"]
            took = time.perf_counter() - start
        print(f"log p(x) of {MNIST[1]:,} images at {g.num_samples:,} draws, {precision}: {log_px[precision]:.4f} nats, "
              f"{MNIST[1] * g.num_samples / took:,.0f} draws/s")
    apart = max(log_px.values()) - min(log_px.values())
    print(f"apart {apart:.4f} nats, {'as' if apart < 0.05 else 'NOT as'} they should: within 0.05")


def main(argv=None):
    what, *argv = (sys.argv[1:] if argv is None else argv) or ["ratios"]
    works = {"ratios": ratios, "scripts": lambda: of_scripts(argv), "whole": lambda: whole(argv), "plain": lambda: plain(argv),
             "growth": growth, "cuda": on_cuda}
    if what not in works:
        sys.exit(f"python -m tests.benchmark {what}: wants one of {', '.join(works)}")
    works[what]()


if __name__ == "__main__":
    main()
