"""Small things that several tests use: a linear two-level HVAE, small data, a command line run in this process."""
import contextlib
import dataclasses
import io
import multiprocessing
import os
import runpy
import socket
import struct
import sys
import tempfile
import unittest
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import common
import datasets
import files

ROOT = Path(__file__).resolve().parents[1]
# MNIST, if it is there: fetched by a script, or in a folder beside this one.
REAL_MNIST = next((folder for folder in (ROOT / "data", ROOT.parent / "shared" / "mnist")
                   if (folder / "MNIST").exists()), None)


# A process that has imported what is slow to import and started no thread, to fork from: a child starts in milliseconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "matplotlib.figure", "torchvision.utils", "report", "MNIST_CVAE_Relu"])


def as_command(script, argv, folder, out, err):
    """In a child of FORKS: what `python script argv` does in this folder, with one thread and its output in two files."""
    for path, number in ((out, 1), (err, 2)):
        with open(path, "a") as file:
            os.dup2(file.fileno(), number)
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = [script, *map(str, argv)]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def one_of_two(rank, port, script, argv, folder, out, err):
    """In a child of FORKS: `as_command` as one of torchrun's two processes; pictures of single runs are left out."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    import pictures
    pictures.draw_run = lambda *args: None
    as_command(script, argv, folder, out, err)


def two_processes(test, script, argv, folder, name):
    """Two processes that run a script as torchrun's do, and are killed when the test ends: (processes, their outputs, their errors),
    files in the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outs, errs = ([folder / f"{name}.{rank}.{stream}" for rank in (0, 1)] for stream in ("out", "err"))
    both = [FORKS.Process(target=one_of_two, args=(rank, port, script, argv, folder, outs[rank], errs[rank])) for rank in (0, 1)]
    for process in both:
        process.start()
        test.addCleanup(process.kill)
    return both, outs, errs


def ended(both, seconds=120):
    """The exit statuses of processes, when they have ended."""
    for process in both:
        process.join(seconds)
    return [process.exitcode for process in both]


@dataclass
class Flags(common.TrainFlags):
    beta_1: float = common.scalar(1.0, "weight of level 1", low=0)
    beta_2: float = common.scalar(1.0, "weight of level 2", low=0)
    eta_enc: float = common.scalar(1.0, "std of p(z2)", above=0)
    eta_dec: float = common.scalar(0.7, "std of p(z1|z2) and p(x|z1)", above=0)
    sigma_1: float = common.scalar(0.5, "std of q(z1|x)", above=0)
    d_1: int = common.flag(3, "units of z1", low=1)
    width: int = common.flag(6, "dimension of x", low=1)


class LinearHVAE(nn.Module):
    """A two-level HVAE whose maps are all linear, so that log p(x) is known exactly."""

    def __init__(self, f):
        super().__init__()
        self.W1, self.U1 = nn.Linear(f.width, f.d_1, bias=False), nn.Linear(f.d_1, f.width, bias=False)
        self.W2, self.U2 = nn.Linear(f.d_1, 2, bias=False), nn.Linear(2, f.d_1, bias=False)
        self.log_sigma_2 = nn.Parameter(torch.full((2,), -0.5))

    def forward(self, x, f, sample_shape=()):
        q_1 = Normal(self.W1(x), f.sigma_1)
        z_1 = q_1.rsample(sample_shape)
        q_2 = Normal(self.W2(z_1), self.log_sigma_2.exp())
        z_2 = q_2.rsample()
        p_1, p_2 = Normal(self.U2(z_2), f.eta_dec), Normal(torch.zeros_like(f.eta_enc), f.eta_enc)
        log_px_z = common.log_normal(x, self.U1(z_1), f.eta_dec)
        terms = {"log_px_z": log_px_z, "kl_1": -q_1.entropy() - p_1.log_prob(z_1), "kl_2": kl_divergence(q_2, p_2)}
        if not self.training:
            terms["log_w"] = (log_px_z + (p_1.log_prob(z_1) - q_1.log_prob(z_1)).sum(-1)
                              + (p_2.log_prob(z_2) - q_2.log_prob(z_2)).sum(-1))
            terms["unit_kl_1"] = kl_divergence(q_1, p_1)
            terms["mean_1"], terms["mean_2"] = q_1.mean / f.eta_dec, q_2.mean / f.eta_enc
        return terms

    def loss(self, terms, f):
        return -terms["log_px_z"] + f.beta_1 * terms["kl_1"].sum(-1) + f.beta_2 * terms["kl_2"].sum(-1)

    def exact_log_px(self, x, f):
        """log p(x), (B,): x ~ N(0, U1 (eta_enc^2 U2 U2' + eta_dec^2 I) U1' + eta_dec^2 I)."""
        U1, U2 = self.U1.weight.detach().double(), self.U2.weight.detach().double()
        level_1 = f.eta_enc**2 * U2 @ U2.T + f.eta_dec**2 * torch.eye(f.d_1, dtype=torch.float64)
        covariance = U1 @ level_1 @ U1.T + f.eta_dec**2 * torch.eye(f.width, dtype=torch.float64)
        return MultivariateNormal(torch.zeros(f.width, dtype=torch.float64), covariance).log_prob(x.double())


class InFolder(unittest.TestCase):
    """A test with a folder of its own, and no locks left behind."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(files.unlock)
        self.folder = Path(folder.name)


class WithMnist(unittest.TestCase):
    """Tests that share a folder with few drawn digits in it as MNIST, data/."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        write_mnist(cls.folder / "data")


def terms_in_shape(test, model, x, f, units, log_ws=("log_w",), shared=()):
    """Checks the terms of a model of many levels, units each {"kl_1": d, ...}, level 1 first, in training and, three draws of each of
    two images, in evaluation, whose terms it returns; and that every parameter gets a gradient. Those of `shared` are of all draws."""
    def shapes(terms):
        return {name: tuple(value.shape) for name, value in terms.items()}

    terms = model.train()(x, f)
    test.assertEqual(shapes(terms), {"log_px_z": (2,)} | {name: (2, d) for name, d in units.items()})
    test.assertEqual(list(terms), ["log_px_z", *(f"kl_{l}" for l in range(1, len(units) + 1))])
    model.loss(terms, f).mean().backward()
    test.assertEqual([name for name, p in model.named_parameters() if p.grad is None], [])
    terms = model.eval()(x, f, sample_shape=(3,))
    wanted = {name: (3, 2) for name in ("log_px_z", *log_ws)} | {
        name.replace("kl", of): (3, 2, d) for name, d in units.items() for of in ("kl", "mean")}
    test.assertEqual(shapes(terms), wanted | {name: wanted[name][1:] for name in shared})
    return terms


def gaussian_data(n_train=256, n_test=64, width=6, dtype=torch.float64, seed=0):
    """Correlated Gaussian rows as datasets.Data."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=random, dtype=torch.float64) / width**0.5
    train, test = (torch.randn(n, width, generator=random, dtype=torch.float64) @ mix for n in (n_train, n_test))
    labels = [torch.zeros(n, dtype=torch.long) for n in (n_train, n_test)]
    return datasets.Data("gaussian", (train.to(dtype),), (test.to(dtype),), *labels)


def digit_data(n_train=256, n_test=64, dtype=torch.float64):
    """Drawn digits as datasets.Data."""
    images, labels = datasets.draw_digits(n_train + n_test, seed=3)
    x, labels = torch.from_numpy(images).flatten(1).to(dtype) / 255, torch.from_numpy(labels).long()
    return datasets.Data("digits", (x[:n_train],), (x[n_train:],), labels[:n_train], labels[n_train:])


def as_quarters(data):
    """Images as a CVAE has them."""
    return dataclasses.replace(data, train=datasets.quarters(data.train[0]), test=datasets.quarters(data.test[0]))


def write_mnist(folder, n_train=256, n_test=64):
    """MNIST's four files with few drawn digits, in the format of MNIST, where torchvision looks for them."""
    raw = Path(folder, "MNIST", "raw")
    raw.mkdir(parents=True)
    for split, n, seed in (("train", n_train, 5), ("t10k", n_test, 6)):
        images, labels = datasets.draw_digits(n, seed)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, n, 28, 28) + images.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, n) + labels.tobytes())
    return raw


def call(main, *argv):
    """Run a script's main in this process. Returns (exit status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(word) for word in argv])
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def plain_train(Model, f, data, share=lambda epochs: 1.0):
    """The shortest plain PyTorch loop that trains what training.fit trains: one setting, data on the device. share(epochs done)
    of every beta counts."""
    x = data.train[0]
    with common.seeded(f.seed, "init", torch.device("cpu")):
        model = Model(f).to(x.device, x.dtype)
    g = common.on_device(f, data.test[0])
    optimizer = torch.optim.Adam(model.parameters(), lr=f.lr)
    steps = f.num_epochs * -(-len(x) // f.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if f.lr_schedule == "cosine" else None
    order = common.generator(f.seed, "batches", x.device)
    with common.seeded(f.seed, "noise", x.device):
        for epoch in range(f.num_epochs):
            batches = torch.randperm(len(x), generator=order, device=x.device).split(f.batch_size)
            for done, rows in enumerate(batches):
                terms = model(*(t[rows] for t in data.train), g)
                loss = -terms["log_px_z"].mean()
                for beta, kl in (("beta", "kl"), ("beta_1", "kl_1"), ("beta_2", "kl_2")):
                    if kl in terms:
                        of_units = terms[kl].mean(0)
                        if kl != "kl_1" and getattr(f, "free_bits", 0):
                            of_units = of_units.clamp(min=f.free_bits)
                        loss = loss + share(epoch + done * f.batch_size / len(x)) * getattr(g, beta) * of_units.sum()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), f.grad_clip)
                optimizer.step()
                if schedule:
                    schedule.step()
    return model
