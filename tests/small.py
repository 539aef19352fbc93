"""Small things that several tests use: a model, data, a folder, a command line, child processes."""
import contextlib
import dataclasses
import io
import json
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
from unittest import mock

import common
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import datasets

ROOT = Path(__file__).resolve().parents[1]


def folder_with_mnist():
    """The folder with the real MNIST, or None: data/, or a folder beside the project."""
    for folder in (ROOT / "data", ROOT.parent / "shared" / "mnist"):
        if (folder / "MNIST").exists():
            return folder
    return None


REAL_MNIST = folder_with_mnist()

# What a picture file starts with.
PNG = b"\x89PNG"


# ------------------------------------------------------------------------- other processes

def child_context():
    """How child processes are started.

    A fork server imports the slow packages once, so that each child starts in milliseconds.
    Windows has none; there a child starts from the beginning.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "matplotlib.figure", "torchvision.utils", "report", "MNIST_CVAE_Relu"])
    return context


CHILDREN = child_context()


def as_command(script, argv, folder, out, err, draws_pictures=True):
    """Do in a child process what `python script argv` does in a folder.

    The child uses one thread. Its output goes to the files out and err. The pictures of runs and
    grids take most of the time of a short command, and can be left out.
    """
    if not draws_pictures:
        import pictures
        pictures.draw_run = lambda *args: None
        pictures.draw_grid = lambda *args: None
    for path, descriptor in ((out, 1), (err, 2)):
        with open(path, "a", encoding="utf-8") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = [script, *map(str, argv)]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def start_command(script, argv, folder, out, err, draws_pictures=True):
    """Start `as_command` in a child process, which is returned."""
    arguments = (script, argv, folder, out, err, draws_pictures)
    process = CHILDREN.Process(target=as_command, args=arguments)
    process.start()
    return process


def as_one_of_two(rank, port, script, argv, folder, out, err):
    """`as_command` without pictures, as one of torchrun's two processes."""
    os.environ.update({
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    })
    as_command(script, argv, folder, out, err, draws_pictures=False)


def free_port():
    """The number of a port at which no program of this computer listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_processes(test, script, argv, folder, name):
    """Start a script as torchrun does with two processes. They are killed when the test ends.

    Returns (the processes, their output files, their error files); the files lie in `folder`.
    """
    port = free_port()
    outs = [folder / f"{name}.{rank}.out" for rank in (0, 1)]
    errs = [folder / f"{name}.{rank}.err" for rank in (0, 1)]
    pair = []
    for rank in (0, 1):
        process = CHILDREN.Process(
            target=as_one_of_two,
            args=(rank, port, script, argv, folder, outs[rank], errs[rank]))
        process.start()
        test.addCleanup(process.kill)
        pair.append(process)
    return pair, outs, errs


def exit_statuses(processes, seconds=120):
    """Wait for processes to end, and return their exit statuses."""
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes]


def call(main, *argv):
    """Run a script's main in this process. Returns (exit status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(word) for word in argv])
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


# --------------------------------------------------------------------------------- a model

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
        self.W1 = nn.Linear(f.width, f.d_1, bias=False)
        self.U1 = nn.Linear(f.d_1, f.width, bias=False)
        self.W2 = nn.Linear(f.d_1, 2, bias=False)
        self.U2 = nn.Linear(2, f.d_1, bias=False)
        self.log_sigma_2 = nn.Parameter(torch.full((2,), -0.5))

    def forward(self, x, f, sample_shape=()):
        q_1 = Normal(self.W1(x), f.sigma_1)
        z_1 = q_1.rsample(sample_shape)
        q_2 = Normal(self.W2(z_1), self.log_sigma_2.exp())
        z_2 = q_2.rsample()
        p_1 = Normal(self.U2(z_2), f.eta_dec)
        p_2 = Normal(torch.zeros_like(f.eta_enc), f.eta_enc)

        log_px_z = common.log_normal(x, self.U1(z_1), f.eta_dec)
        terms = {
            "log_px_z": log_px_z,
            "kl_1": -q_1.entropy() - p_1.log_prob(z_1),
            "kl_2": kl_divergence(q_2, p_2),
        }
        if not self.training:
            log_ratio_1 = (p_1.log_prob(z_1) - q_1.log_prob(z_1)).sum(-1)
            log_ratio_2 = (p_2.log_prob(z_2) - q_2.log_prob(z_2)).sum(-1)
            terms["log_w"] = log_px_z + log_ratio_1 + log_ratio_2
            terms["unit_kl_1"] = kl_divergence(q_1, p_1)
            terms["mean_1"] = q_1.mean / f.eta_dec
            terms["mean_2"] = q_2.mean / f.eta_enc
        return terms

    def loss(self, terms, f):
        weighted_kl_1 = f.beta_1 * terms["kl_1"].sum(-1)
        weighted_kl_2 = f.beta_2 * terms["kl_2"].sum(-1)
        return -terms["log_px_z"] + weighted_kl_1 + weighted_kl_2

    def exact_log_px(self, x, f):
        """log p(x), (B,): x ~ N(0, U1 (eta_enc^2 U2 U2' + eta_dec^2 I) U1' + eta_dec^2 I)."""
        U1, U2 = self.U1.weight.detach().double(), self.U2.weight.detach().double()
        level_1 = f.eta_enc**2 * U2 @ U2.T + f.eta_dec**2 * torch.eye(f.d_1, dtype=torch.float64)
        noise = f.eta_dec**2 * torch.eye(f.width, dtype=torch.float64)
        covariance = U1 @ level_1 @ U1.T + noise
        mean = torch.zeros(f.width, dtype=torch.float64)
        return MultivariateNormal(mean, covariance).log_prob(x.double())


@dataclass
class ModelCase:
    """The model of a script, away from its start.

    script:   the imported script
    model:    its model
    f:        the setting
    scalars:  the setting with its scalars on the device
    data:     the data of the setting
    """

    script: object
    model: nn.Module
    f: object
    scalars: object
    data: datasets.Data


def moved(module, spread):
    """The module with random weights added, `spread` times standard normal ones."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p += spread * torch.randn(p.shape, generator=random, dtype=p.dtype)
    return module


def check_shapes_of_terms(test, model, x, f, units, log_ws=("log_w",), shared=()):
    """Check the terms of a model with many levels on two images, in training and in evaluation.

    units is {"kl_1": d_1, ...}, level 1 first. Evaluation takes three draws of each image; the
    terms named in `shared` are the same for all draws and have no axis for them. In training,
    every parameter must get a gradient. Returns the terms of the evaluation.
    """
    terms = model.train()(x, f)
    wanted = {"log_px_z": (2,)}
    for name, d in units.items():
        wanted[name] = (2, d)
    test.assertEqual({name: tuple(value.shape) for name, value in terms.items()}, wanted)
    levels_in_order = [f"kl_{level}" for level in range(1, len(units) + 1)]
    test.assertEqual(list(terms), ["log_px_z", *levels_in_order])
    model.loss(terms, f).mean().backward()
    test.assertEqual([name for name, p in model.named_parameters() if p.grad is None], [])

    terms = model.eval()(x, f, sample_shape=(3,))
    wanted = {name: (3, 2) for name in ("log_px_z", *log_ws)}
    for name, d in units.items():
        wanted[name] = (3, 2, d)
        wanted[name.replace("kl", "mean")] = (3, 2, d)
    for name in shared:
        wanted[name] = wanted[name][1:]
    test.assertEqual({name: tuple(value.shape) for name, value in terms.items()}, wanted)
    return terms


def check_level_residuals(test, model, x, f, levels, probabilities, readers=("encoder",)):
    """Check `residuals` of a model with binary pixels on grey images x (B, c, H, W).

    levels has the suffixes of the levels that have a headroom. probabilities(x, S) are S draws of
    the probabilities of the pixels of binary x, (S, B, ...), computed in another way. readers names
    the parts of the model that read the images.
    """
    model.eval()
    d = x[0].numel()
    torch.manual_seed(0)

    # 1. Grey images are binarised, and the model reads what the residual is about.
    read = []
    hooks = []
    for name in readers:
        part = getattr(model, name)
        hooks.append(part.register_forward_pre_hook(lambda part, args: read.append(args[0])))
    residuals = model.residuals(x, f, 4)
    for hook in hooks:
        hook.remove()
    test.assertEqual(list(residuals), levels)
    residual = residuals[levels[0]]
    [binary] = residual.encoder_input
    test.assertEqual(set(binary.unique().tolist()), {0.0, 1.0})
    test.assertEqual(len(read), len(readers))
    for images in read:
        # Some parts read each image once for each draw.
        for part in images.flatten(1).split(len(x)):
            test.assertTrue(torch.equal(part, binary))

    # 2. All levels share one residual of a binary variable.
    for other in residuals.values():
        test.assertIs(other, residual)
    test.assertEqual((residual.likelihood, residual.counts_means), ("bernoulli", False))
    test.assertEqual((float(residual.beta), float(residual.weight)), (float(f.beta), 1))
    test.assertEqual(tuple(residual.residual.shape), (2, len(x), d))
    p = binary - residual.residual
    test.assertTrue(((p >= 0) & (p <= 1)).all())
    torch.testing.assert_close(residual.fisher, (p * (1 - p)).mean(0))

    # 3. For binary images, the mean of each estimate is that of other draws.
    x = binary.view_as(x)
    draws = []
    for _ in range(150):
        residual = model.residuals(x, f, 4)[levels[0]]
        test.assertTrue(torch.equal(residual.encoder_input[0], binary))
        draws.append(binary - residual.residual)
    draws = torch.stack(draws)
    expected = probabilities(x, 1000).flatten(2)
    variance = expected.var(0)
    error = (variance / len(draws) + variance / len(expected)).sqrt()
    for estimate in (0, 1):
        difference = draws[:, estimate].mean(0) - expected.mean(0)
        test.assertLess((difference / error).abs().max().item(), 5.5)
    test.assertLess(error.max().item(), 0.03)

    # 4. The two estimates have draws of their own.
    check_independent(test, draws.numpy())


def check_independent(test, residuals):
    """Check that two estimates of a residual come from independent draws.

    residuals (calls, 2, B, D) has both estimates of several calls. Around the mean over the calls
    their products are 0 on average. The squares of one estimate are not.
    """
    n = len(residuals)
    deviations = residuals - residuals.mean(0)
    first, second = deviations[:, 0].reshape(n, -1), deviations[:, 1].reshape(n, -1)
    products = (first * second).sum(1)
    squares = (first**2).sum(1)
    error = products.std() / n**0.5
    test.assertLess(abs(products.mean()), 4 * error)
    test.assertGreater(squares.mean(), 10 * error)


# ------------------------------------------------------------------------ folders and data

class InFolder(unittest.TestCase):
    """A test with a folder of its own."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)


def read_json(path):
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


class WithMnist(unittest.TestCase):
    """Tests that share a folder whose data/ holds a few drawn digits as MNIST."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        write_mnist(cls.folder / "data")


def gaussian_data(n_train=256, n_test=64, width=6, dtype=torch.float64, seed=0):
    """Correlated Gaussian rows as datasets.Data."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=random, dtype=torch.float64) / width**0.5
    splits = []
    for n in (n_train, n_test):
        rows = torch.randn(n, width, generator=random, dtype=torch.float64) @ mix
        splits.append(rows.to(dtype))
    labels = [torch.zeros(n, dtype=torch.long) for n in (n_train, n_test)]
    return datasets.Data("gaussian", (splits[0],), (splits[1],), *labels)


def few_digits():
    """Within this context, the embedded data set of digits has one image in 200.

    Drawing all of them takes seconds.
    """
    draw_digits = datasets.draw_digits
    return mock.patch.object(
        datasets, "draw_digits", lambda n, seed: draw_digits(n // 200, seed))


def digit_data(n_train=256, n_test=64, dtype=torch.float64):
    """Drawn digits as datasets.Data."""
    images, labels = datasets.draw_digits(n_train + n_test, seed=3)
    x = torch.from_numpy(images).flatten(1).to(dtype) / 255
    labels = torch.from_numpy(labels).long()
    return datasets.Data(
        "digits", (x[:n_train],), (x[n_train:],), labels[:n_train], labels[n_train:])


def as_quarters(data):
    """Images as a CVAE has them."""
    train = datasets.quarters(data.train[0])
    test = datasets.quarters(data.test[0])
    return dataclasses.replace(data, train=train, test=test)


def write_mnist(folder, n_train=256, n_test=64):
    """Write MNIST's four files with a few drawn digits where torchvision looks for them."""
    raw = Path(folder, "MNIST", "raw")
    raw.mkdir(parents=True)
    for split, n, seed in (("train", n_train, 5), ("t10k", n_test, 6)):
        images, labels = datasets.draw_digits(n, seed)
        images_header = struct.pack(">4i", 0x803, n, 28, 28)
        labels_header = struct.pack(">2i", 0x801, n)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(images_header + images.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(labels_header + labels.tobytes())
    return raw


# --------------------------------------------------------------- a training loop to compare

def plain_train(Model, f, data, share=lambda epochs: 1.0):
    """The shortest plain PyTorch loop that trains what training.fit trains: one setting.

    The data lies on the device. share(epochs done) is the share of every beta that counts.
    """
    x = data.train[0]
    with common.seeded(f.seed, "init", torch.device("cpu")):
        model = Model(f).to(x.device, x.dtype)
    tensors = common.on_device(f, data.test[0])
    optimizer = torch.optim.Adam(model.parameters(), lr=f.lr)
    steps = f.num_epochs * -(-len(x) // f.batch_size)
    schedule = None
    if f.lr_schedule == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = common.generator(f.seed, "batches", x.device)

    with common.seeded(f.seed, "noise", x.device):
        for epoch in range(f.num_epochs):
            shuffled = torch.randperm(len(x), generator=order, device=x.device)
            for done, rows in enumerate(shuffled.split(f.batch_size)):
                terms = model(*(t[rows] for t in data.train), tensors)
                beta_share = share(epoch + done * f.batch_size / len(x))
                loss = plain_loss(terms, f, tensors, beta_share)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), f.grad_clip)
                optimizer.step()
                if schedule:
                    schedule.step()
    return model


def plain_loss(terms, f, tensors, beta_share):
    """The negative beta-ELBO of a batch, every beta times beta_share. Free bits spare z1."""
    loss = -terms["log_px_z"].mean()
    for beta, kl in (("beta", "kl"), ("beta_1", "kl_1"), ("beta_2", "kl_2")):
        if kl in terms:
            unit_kls = terms[kl].mean(0)
            if kl != "kl_1" and getattr(f, "free_bits", 0):
                unit_kls = unit_kls.clamp(min=f.free_bits)
            loss = loss + beta_share * getattr(tensors, beta) * unit_kls.sum()
    return loss
