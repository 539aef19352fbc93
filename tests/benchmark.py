"""How fast it is, measured on this machine. `python -m tests.benchmark` prints ratios, each of works timed in turn in one
process, so that a slow moment of the machine falls on both sides, medians over several turns; for every training script

    plain    an epoch of fit / of the shortest plain PyTorch loop over the same model, data on the device
    usual    an epoch the usual way, a DataLoader over torchvision's data set and loss.item() each batch / of fit
    grid     an epoch of a grid of 4 / of its settings one by one, as the script itself would train them
    eval     evaluation's matrix products and convolutions alone / evaluation

`python -m tests.benchmark scripts` prints each script's time per epoch and peak memory, `... whole` the time of
MNIST_CVAE_Relu.py from start to table beside a straightforward script's, both with any flags given (--data_dir), and
`... cuda` what only a GPU can show.
"""
import collections
import contextlib
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
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import common
import MNIST_CVAE_Relu
import MNIST_HVAE_Relu
import Synthetic_CVAE_Relu_correlation
from tests import small

TURNS = 5
EXAMPLES = 6_400                                          # fifty batches: an "epoch" here
SCRIPTS = sorted([*small.ROOT.glob("MNIST_*.py"), *small.ROOT.glob("Synthetic_*.py")])


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


def medians(works, device, turns=TURNS):
    """The median seconds of each of {name: work}, taken in turn, after one turn to warm up."""
    times = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            elapsed = seconds(work, device)
            if turn:
                times[name].append(elapsed)
    return {name: statistics.median(of) for name, of in times.items()}


def model_of(script):
    """(module, model class, flags at their defaults for one epoch, data of EXAMPLES rows) of a script."""
    module = importlib.import_module(script.stem)
    Model = next(getattr(module, name) for name in ("VAE", "CVAE", "HVAE") if hasattr(module, name))
    f = module.Flags(num_epochs=1)
    device = common.device_of(f)
    if module is Synthetic_CVAE_Relu_correlation:
        with quietly():
            [data] = module.correlated([dataclasses.replace(f, num_samples=EXAMPLES)])
        return module, Model, f, data
    data = small.digit_data(EXAMPLES, 1000, torch.float32)
    data = small.as_quarters(data) if Model.__name__ == "CVAE" else data
    return module, Model, f, dataclasses.replace(data, train=tuple(t.to(device) for t in data.train),
                                                 test=tuple(t.to(device) for t in data.test))


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
            inputs = common.quarters(x.view(-1, 784)) if Model.__name__ == "CVAE" else [x.view(-1, 784)]
        loss = common.beta_elbo_loss(model(*inputs, g), g).mean()
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
          f"{EXAMPLES:,} examples; medians of {TURNS} turns; ms of fit, ratios as `--help` of this module has them")
    print(f"{'':42} {'fit ms':>7} {'plain':>6} {'usual':>6} {'grid':>6} {'eval':>6}")
    with tempfile.TemporaryDirectory() as folder:
        small.write_mnist(folder, EXAMPLES, 1)
        import torchvision
        mnist = torchvision.datasets.MNIST(folder, transform=torchvision.transforms.ToTensor())
        for script in SCRIPTS:
            module, Model, f, data = model_of(script)
            images = torch.utils.data.TensorDataset(*data.train) if module is Synthetic_CVAE_Relu_correlation else mnist
            flag = "beta_1" if hasattr(f, "beta_1") else "beta"
            grid = [dataclasses.replace(f, **{flag: 0.5 * (k + 1)}) for k in range(4)]
            together = [[g] for g in grid] if "CNN" in script.stem and device.type == "cpu" else [grid]
            few = dataclasses.replace(data, test=tuple(t[:20 if device.type == "cpu" else 1000] for t in data.test))
            model = common.build(Model, f, data).eval()
            with Products() as products, quietly():
                common.evaluate(model, f, few)
            train = medians({
                "fit": lambda: common.train(Model, [f], data), "plain": lambda: small.plain_train(Model, f, data),
                "usual": lambda: usual_way(Model, f, images)}, device)
            many = medians({
                "grid": lambda: [common.train(Model, group, data) for group in together],
                "one by one": lambda: [common.train(Model, [g], data) for g in grid]}, device, 3)
            evaluation = medians({"products": products.again, "all": lambda: common.evaluate(model, f, few)}, device)
            print(f"{script.name:42} {1e3 * train['fit']:7.0f} {train['fit'] / train['plain']:6.2f} "
                  f"{train['usual'] / train['fit']:6.2f} {many['grid'] / many['one by one']:6.2f} "
                  f"{evaluation['products'] / evaluation['all']:6.2f}", flush=True)
    fixed_costs(device)


def fixed_costs(device):
    """What a run pays once."""
    start = time.perf_counter()
    subprocess.run([sys.executable, str(small.ROOT / "MNIST_HVAE_Relu.py"), "--help"], stdout=subprocess.DEVNULL, check=True)
    print(f"start to --help (imports): {time.perf_counter() - start:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        small.write_mnist(folder, 60_000, 10_000)
        f = MNIST_HVAE_Relu.Flags(data_dir=folder, num_epochs=1, dataset="mnist")
        print(f"MNIST from disk to the device: {seconds(lambda: common.load_mnist([f]), device):.1f} s")
    _, Model, f, data = model_of(small.ROOT / "MNIST_HVAE_Relu.py")
    one_batch = dataclasses.replace(data, train=tuple(t[:f.batch_size] for t in data.train))
    steps = [seconds(lambda: common.train(Model, [f], one_batch), device) for _ in range(3)]
    print(f"building a model, and its first step: {1e3 * steps[0]:.0f} ms, again {1e3 * steps[-1]:.0f} ms")


def of_scripts(argv, epochs=3):
    """Each training script at its defaults, from its command line: seconds per epoch, and peak memory of the process, its
    evaluation without a log-likelihood included."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; mean of {epochs} epochs, the first included")
    for path in SCRIPTS:
        with tempfile.TemporaryDirectory() as folder:
            no_draws, data = ("--num_draws", []) if path.stem.startswith("Synthetic") else ("--num_samples", argv)
            process = subprocess.Popen([sys.executable, str(path), "--num_epochs", str(epochs), no_draws, "0",
                                        "--out_dir", folder, *data], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            error = process.stderr.read()
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(error.decode())
            [training] = Path(folder).rglob("training.json")
            per_epoch = json.loads(training.read_text())["seconds"] / epochs
            print(f"{path.name:45} {per_epoch:8.2f} s per epoch, {usage.ru_maxrss / 2**20:5.2f} GiB", flush=True)


def whole(argv):
    """MNIST_CVAE_Relu.py, 100 epochs and 1000 draws for 10,000 test images, from start to table; and a straightforward
    script, of which an epoch over a sixth of the images and the log-likelihood of 50 images are measured and scaled up."""
    device = common.device_of(MNIST_CVAE_Relu.Flags())
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, str(small.ROOT / "MNIST_CVAE_Relu.py"), "--out_dir", folder, *argv],
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        ours = time.perf_counter() - start
        small.write_mnist(folder, 10_000, 1)
        import torchvision
        images = torchvision.datasets.MNIST(folder, transform=torchvision.transforms.ToTensor())
        f, models = MNIST_CVAE_Relu.Flags(), []
        training = seconds(lambda: models.append(usual_way(MNIST_CVAE_Relu.CVAE, f, images)), device) * 6 * 100

        @torch.no_grad()
        def one_by_one():
            g = common.on_device(f, torch.zeros(0, device=device))
            for k in range(50):
                x, y = common.quarters(images[k][0].to(device).view(1, 784))
                log_w = models[0].eval()(x, y, g, sample_shape=(1000,))["log_w"]
                (log_w.logsumexp(0) - torch.tensor(1000.0).log()).item()

        evaluation = seconds(one_by_one, device) / 50 * 10_000
    print(f"MNIST_CVAE_Relu.py from start to table: {ours:.0f} s; a straightforward script, scaled up: training {training:.0f} s, "
          f"log-likelihood {evaluation:.0f} s; {(training + evaluation) / ours:.1f} times as long")


def on_cuda():
    """What only a GPU can show: the main job's epoch alone and as a 5x5 grid of 60,000, captured and launched step by step."""
    f, device = MNIST_HVAE_Relu.Flags(num_epochs=5), torch.device("cuda")
    data = small.digit_data(60_000, 10, torch.float32)
    data = dataclasses.replace(data, train=(data.train[0].to(device),), test=(data.test[0].to(device),))
    values = (0.1, 1.0, 2.0, 4.0, 6.0)
    sheet = [dataclasses.replace(f, beta_1=a, beta_2=b) for a in values for b in values]
    for name, group in (("one setting", [f]), ("5x5 grid", sheet)):
        of = {}
        for captured in (True, False):
            eager = common.Replayed.EAGER
            common.Replayed.EAGER = eager if captured else sys.maxsize
            of[captured] = medians({name: lambda: common.train(MNIST_HVAE_Relu.HVAE, group, data)}, device, 3)[name] / 5
            common.Replayed.EAGER = eager
        print(f"{name}: {1e3 * of[True]:.0f} ms an epoch captured, {1e3 * of[False]:.0f} ms launched step by step: "
              f"{1 - of[True] / of[False]:.0%} of that is launching")


def main():
    what, *argv = sys.argv[1:] or ["ratios"]
    works = {"ratios": ratios, "scripts": lambda: of_scripts(argv), "whole": lambda: whole(argv), "cuda": on_cuda}
    if what not in works:
        sys.exit(f"python -m tests.benchmark {what}: wants one of {', '.join(works)}")
    works[what]()


if __name__ == "__main__":
    sys.exit(main())
