"""`python -m tests.benchmark` prints how fast fit and evaluate are, as ratios measured side by side in one process, and
`python -m tests.benchmark scripts [--data_dir ...]` each script's time per epoch and peak memory, with any of their flags.

Each ratio is of medians over several turns, taken in turn, so that a slow moment of the machine falls on both sides.
"""
import contextlib
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import common
import MNIST_HVAE_Relu
from tests import small

TURNS = 5
EXAMPLES = 12_800                                         # a hundred batches: an "epoch" here


def seconds(work, device):
    """How long work takes, the device's queue included, with stderr out of the way."""
    with contextlib.redirect_stderr(io.StringIO()):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def compare(title, aim, works, device, turns=TURNS):
    """Time the works in turn, {name: work}; print each median and the ratio of the first to the second."""
    times = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            elapsed = seconds(work, device)
            if turn:                                      # the first turn warms up
                times[name].append(elapsed)
    medians = {name: statistics.median(of) for name, of in times.items()}
    first, second = medians.values()
    print(f"{title}: {first / second:.3f} (aim {aim})   " + ", ".join(
        f"{name} {1e3 * median:,.0f} ms [{1e3 * min(times[name]):,.0f}, {1e3 * max(times[name]):,.0f}]"
        for name, median in medians.items()), flush=True)


def usual_way(f, folder):
    """An epoch as most scripts have it: torchvision's dataset, a DataLoader, one example at a time."""
    import torchvision
    dataset = torchvision.datasets.MNIST(folder, transform=torchvision.transforms.ToTensor())
    loader = torch.utils.data.DataLoader(dataset, batch_size=f.batch_size, shuffle=True)
    device = common.device_of(f)
    model = MNIST_HVAE_Relu.HVAE(f).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=f.lr)
    scalars = {name: torch.tensor(getattr(f, name), device=device)
               for name in ("beta_1", "beta_2", "eta_enc", "eta_dec", "sigma_1")}
    g = dataclasses.replace(f, **scalars)
    total = 0.0
    for images, _ in loader:
        loss = common.beta_elbo_loss(model(images.to(device).view(-1, 784), g), g).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), f.grad_clip)
        optimizer.step()
        total += loss.item()


def bare_products(model, images, draws, room):
    """The matrix products of importance sampling alone: the encoder's once an image, all others once a draw."""
    rows = max(1, room // (4 * 784))
    with torch.no_grad():
        shapes = {name: p.T.contiguous() for name, p in model.named_parameters() if p.ndim == 2}
        once = {name: w for name, w in shapes.items() if name.startswith("x_to_z1")}
        inputs = {name: torch.randn(rows, w.shape[0], device=w.device) for name, w in shapes.items()}
        for start in range(0, images * draws, rows):
            n = min(rows, images * draws - start)
            for name, w in shapes.items():
                torch.mm(inputs[name][:max(1, n // draws) if name in once else n], w)


def of_scripts(argv, epochs=3):
    """Each training script at its defaults, from its command line: seconds per epoch, and peak memory of the process, its
    evaluation without a log-likelihood included."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; mean of {epochs} epochs, the first included")
    for path in sorted([*small.ROOT.glob("MNIST_*.py"), *small.ROOT.glob("Synthetic_*.py")]):
        with tempfile.TemporaryDirectory() as folder:
            no_draws, data = ("--num_draws", []) if path.stem.startswith("Synthetic") else ("--num_samples", argv)
            process = subprocess.Popen([sys.executable, str(path), "--num_epochs", str(epochs), no_draws, "0",
                                        "--out_dir", folder, *data], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            error = process.stderr.read()
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(error.decode())
            [training] = Path(folder).rglob("training.json")
            seconds = json.loads(training.read_text())["seconds"] / epochs
            print(f"{path.name:45} {seconds:8.2f} s per epoch, {usage.ru_maxrss / 2**20:5.2f} GiB", flush=True)


def main():
    if sys.argv[1:2] == ["scripts"]:
        return of_scripts(sys.argv[2:])
    device = common.device_of(MNIST_HVAE_Relu.Flags())
    print(f"{common.device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"medians of {TURNS} turns [min, max]; an epoch here is {EXAMPLES:,} examples")
    f = MNIST_HVAE_Relu.Flags(num_epochs=1)
    data = small.digit_data(EXAMPLES, 10_000, torch.float32)
    data = dataclasses.replace(data, train=(data.train[0].to(device),), test=(data.test[0].to(device),))
    Model = MNIST_HVAE_Relu.HVAE

    compare("epoch of fit / of a plain loop", "at most 1.15", {
        "fit": lambda: common.train(Model, [f], data), "plain": lambda: small.plain_train(Model, f, data)}, device)
    grid = [dataclasses.replace(f, beta_1=0.25 * (k + 1)) for k in range(8)]
    compare("epoch of a grid of 8 / of its settings one by one", "at most 1.05 on a CPU, 0.25 on a GPU", {
        "grid": lambda: common.train(Model, grid, data),
        "one by one": lambda: [common.train(Model, [g], data) for g in grid]}, device, 3)
    with tempfile.TemporaryDirectory() as folder:
        small.write_mnist(folder, EXAMPLES, 1)
        compare("epoch the usual way (DataLoader) / of fit", "at least 1.5", {
            "usual way": lambda: usual_way(f, folder), "fit": lambda: common.train(Model, [f], data)}, device, 3)

    images = 500 if device.type == "cpu" else 10_000
    few = dataclasses.replace(data, test=(data.test[0][:images],))
    model, room = common.build(Model, f, data).eval(), common.CHUNK_BYTES[device.type]
    compare(f"bare matrix products / evaluation of {images:,} images with {f.num_samples} draws", "at least 0.5", {
        "products": lambda: bare_products(model, images, f.num_samples, room),
        "evaluation": lambda: common.evaluate(model, f, few)}, device)
    if device.type == "cuda":
        values = (0.1, 1.0, 2.0, 4.0, 6.0)
        sheet = [dataclasses.replace(f, num_epochs=100, beta_1=a, beta_2=b) for a in values for b in values]
        data = small.digit_data(60_000, 10, torch.float32)
        data = dataclasses.replace(data, train=(data.train[0].to(device),), test=(data.test[0].to(device),))
        print(f"5x5 grid, 100 epochs of 60,000: {seconds(lambda: common.train(Model, sheet, data), device):.0f} s")


if __name__ == "__main__":
    sys.exit(main())
