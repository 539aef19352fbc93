"""The training of all models: one loop, `Training`, with two users. `fit` trains a small script's settings with Adam, those that
differ only in scalars of the objective side by side as one batched model; a deep model's script writes the body of its loop itself,
and all processes train it together.

In this order: `fit`, what it leaves and finds finished; the loop; the small scripts' step; checkpoints and signals. What a model
is to offer stands in report.py; nothing here knows an objective but through its `loss`.
"""
import contextlib
import copy
import dataclasses
import hashlib
import inspect
import json
import math
import pickle
import signal
import sys
import threading
import time
from pathlib import Path

import torch

import common
import files


def fit(Model, settings, data, side_by_side=True, train=None):
    """Train one `Model` per setting on its data; models in the order of the settings, None where training diverged.

    Settings that differ only in scalars of the objective train side by side as one batched model, each from the same
    initial weights, on the same batches and with the same noise as if it were alone; of several processes each trains its
    share, and None stands for the others' models. With a script's own loop, train(model, f, data, loop), which takes the
    batches of a `Training` and returns the model to evaluate, settings are trained one after another, each by all processes.

    What is finished is read from its run's folder instead, unless --overwrite; each run's model.pt and training.json are
    written when its group ends, and until then a checkpoint.
    """
    for f in settings:
        if getattr(f, "beta_warmup", 0) > f.num_epochs / getattr(f, "beta_cycles", 1):
            common.stop(f, f"--beta_warmup: got {f.beta_warmup:g}, wants at most --num_epochs / --beta_cycles = "
                           f"{f.num_epochs / f.beta_cycles:g}")
    print(f"device: {common.device_name(common.device_of(settings[0]))}", file=sys.stderr)
    rank, world = common.processes() if train else (0, 1)
    meet = common.meet if train else lambda: None
    models, groups = [None] * len(settings), {}
    for i in range(len(settings)) if train else common.share(settings):
        f, d = settings[i], data[i]
        fixed = [getattr(f, field.name) for field in dataclasses.fields(f) if not field.metadata["scalar"]]
        groups.setdefault((*fixed, id(d)) if side_by_side and not train else i, []).append(i)
    if rank == 0:
        files.lock([files.run_dir(settings[i], data[i]) for group in groups.values() for i in group])
    meet()
    for group in groups.values():
        finished = {i: read_trained(Model, settings[i], data[i]) for i in group if not settings[i].overwrite}
        unfinished = [i for i in group if not finished.get(i)]
        # A process that died while it wrote its results left the checkpoint of the whole group, perhaps with nothing to do.
        for members in dict.fromkeys((tuple(group), tuple(unfinished or group))):
            checkpoint = Checkpoint([settings[i] for i in members], data[members[0]], world)
            if checkpoint.state:
                break
        meet()                                            # all have looked before the first process changes anything
        for i in [i for i in group if i not in unfinished]:
            models[i], training, folder = finished[i]
            if rank == 0:
                print(f"already trained: {folder} (--overwrite trains it again)", file=sys.stderr)
                if folder != files.run_dir(settings[i], data[i]):
                    leave(models[i], training | {"settings": files.what(settings[i], data[i])}, settings[i], data[i])
        if unfinished:
            trained = train_group(Model, [settings[i] for i in members], data[members[0]], checkpoint, train)
            for i, (model, training) in zip(members, trained):
                if i in unfinished:
                    models[i] = model
                    if rank == 0:
                        leave(model, training, settings[i], data[i])
        if rank == 0:
            checkpoint.remove()
        meet()
    return models


def leave(model, training, f, data):
    """Write a trained model (None for one that diverged) and what its training was. The files of a run that this one takes
    the place of go first, those that vouch for the others before all."""
    folder = files.run_dir(f, data)
    for stale in sorted(folder.glob("*"), key=lambda path: path.suffix != ".json"):
        stale.unlink()
    if model is not None:
        files.write(folder / "model.pt", lambda file: torch.save(model.state_dict(), file))
    files.write_json(folder / "training.json", files.describe(f, data) | training)


def read_trained(Model, f, data):
    """(model, training, folder) of a setting that was trained before, the first two as `train_group` gives them: by its run, whose
    files are in the folder, or by one that differs from it only in its evaluation. None if there is none, whole."""
    own = files.run_dir(f, data)
    for folder in (None, *sorted(other for other in own.parent.glob("*/") if other != own)):
        training, path = files.read_result(f, data, "training.json", folder), (folder or own) / "model.pt"
        if training is None:
            continue
        if training["diverged"]:
            return None, training, path.parent
        model = build(Model, f, data).eval()
        try:
            model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
            return model, training, path.parent
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as wrong:
            print(f"cannot read {path}, training again: {wrong}", file=sys.stderr)


def build(Model, f, data):
    """A model on the data's device, with the initial weights that its seed gives, the same on every device."""
    with common.seeded(f.seed, "init", torch.device("cpu")):
        # channels_last lets convolutions run faster on a CPU; other weights it leaves as they are.
        return Model(f).to(data.train[0].device, data.train[0].dtype, memory_format=torch.channels_last)


def train_group(Model, group, data, checkpoint=None, train=None):
    """Train a group of G settings that differ only in scalars of the objective, side by side, with Adam; or one, by a
    script's own loop.

    Returns one (model, training) per setting. training holds the curves (means over each epoch, in nats per example),
    the seconds of the whole group, and under "diverged" None or, where a batch's loss was not finite or EXPLODED, the
    epoch and the last loss before it, with None for the model. With a `Checkpoint` it goes on from where that stands, and
    ends with the very numbers of an undisturbed run. Raises Interrupted, the checkpoint written, on SIGINT and SIGTERM.
    """
    common.use_precision(group[0])
    loop, models = Training(group, data, checkpoint, together=bool(train)), [build(Model, f, data) for f in group]
    with loop.undisturbed():
        if train:
            models = [train(models[0], common.on_device(group[0], data.train[0]), data, loop)]
        else:
            train_with_adam(models, group, data, loop)
    return [(None if training["diverged"] else model.eval(), training) for model, training in zip(models, loop.results())]


EXPLODED = 1e3                                            # times the first batch's loss
AGREE = 8                                                 # steps after which many processes tell each other of signals


class Training:
    """The training of a group of G settings, or of one setting by all processes together: its batches, their tally, its
    curves, and going on from where a killed run stood.

        for rows in loop.batches(model=model, optimizer=optimizer):
            ... a step on the examples data.train[...][rows], whose means loop.record(means) notes ...
    """

    def __init__(self, group, data, checkpoint=None, together=False):
        self.f, self.G, self.n, self.device = group[0], len(group), len(data.train[0]), data.train[0].device
        self.rank, self.world = common.processes() if together else (0, 1)
        self.rows = self.world * self.f.batch_size        # of all processes, a step
        if together:                                      # an incomplete last batch is left out: all steps are of one size
            if self.rows > self.n:
                common.stop(self.f, f"--batch_size: got {self.f.batch_size} for {self.world} process(es), wants at most the "
                                    f"{self.n:,} training examples in all")
            self.n = self.n // self.rows * self.rows
        self.steps = math.ceil(self.n / self.rows) * self.f.num_epochs
        self.examples, self.order = len(data.train[0]), common.generator(self.f.seed, "batches", self.device)
        self.checkpoint, self.came = checkpoint, []
        self.phases = checkpoint and checkpoint.state or {}

    @contextlib.contextmanager
    def undisturbed(self):
        """Within, the default generators are the noise's, of which this process draws its rows, and SIGINT and SIGTERM wait."""
        with common.seeded(self.f.seed, "noise", self.device), common.noise_of(self.rank, self.world), \
                held_signals() as self.came:
            yield

    def batches(self, phase="", epochs=None, **parts):
        """The numbers of the rows of each batch, (batch size,), over all epochs (--num_epochs if not told otherwise); of
        several processes this one's. parts, whatever has a state_dict, go on from the checkpoint, and so do the random
        numbers. A further phase of the training has a name. Raises Interrupted, the checkpoint written, on SIGINT and SIGTERM."""
        f, n, epochs = self.f, self.n, epochs or self.f.num_epochs
        self.now = now = self.phases.setdefault(
            phase, {"epoch": 1, "done": 0, "names": [], "curves": [], "diverged": [None] * self.G, "tally": {}, "seconds": 0.0})
        if "parts" in now:
            for name, part in parts.items():
                part.load_state_dict(now["parts"][name])
            self.order.set_state(now["order"].cpu())
            random_states(self.device, now["noise"])
            if phase == list(self.phases)[-1]:
                if self.world > 1:                        # of each process its own
                    now["tally"] = {name: value[self.rank].to(self.device) for name, value in now["tally"].items()}
                print(f"going on after {now['epoch'] - 1} of {epochs} epochs, from {self.checkpoint.path}", file=sys.stderr)
        start = time.monotonic() - now["seconds"]

        def keep(order):
            now.update(parts={name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}, order=order,
                       noise=random_states(self.device), seconds=time.monotonic() - start)

        def note(epoch):
            """Which epoch it is, and the losses of the one before: "epoch 12/100, loss 235.32 to 250.01, "."""
            losses = [f"{loss:.2f}" for of in now["curves"][-1:] for loss in (min(of[0]), max(of[0]))]
            return f"epoch {epoch}/{epochs}, " + (f"loss {' to '.join(dict.fromkeys(losses))}, " if losses else "")

        what = " ".join(["training", *[phase] * bool(phase), *[f"{self.G} settings"] * (self.G > 1)])
        progress = common.Progress(what, n * epochs, "examples", (now["epoch"] - 1) * n + min(n, now["done"] * self.rows))
        while now["epoch"] <= epochs and not all(self.diverged):
            order, line = self.order.get_state(), note(now["epoch"])
            shuffled = torch.randperm(self.examples, generator=self.order, device=self.device)[:n].split(self.rows)
            while now["done"] < len(shuffled):
                rows = shuffled[now["done"]][self.rank * f.batch_size:][:f.batch_size]
                self.weight = len(rows) / f.batch_size
                yield rows
                now["done"] += 1
                progress.update((now["epoch"] - 1) * n + min(n, now["done"] * self.rows), line)
                due = self.checkpoint and self.rank == 0 and self.checkpoint.due(f.checkpoint_seconds)
                came, due = self._agreed(self.came[0] if self.came else 0, int(bool(due)))
                if self.checkpoint and (came or due):
                    own, now["tally"] = now["tally"], self._of_all(now["tally"])
                    if self.rank == 0:
                        keep(order)
                        self.checkpoint.write(self.phases)
                    now["tally"] = own
                if came:
                    raise common.Interrupted(came)
            self._end_epoch()
        keep(self.order.get_state())
        if self.checkpoint and self.G > 1:                # stands until the last of the group is written
            self.checkpoint.write(self.phases)
        progress.update(len(now["curves"]) * n, note(len(now["curves"])), end=True)

    def _agreed(self, *numbers):
        """Whole numbers as all processes know them, the largest of each. Of many processes all hear of it in the same step, one of
        every AGREE and the last of an epoch, and of zeros until then: none may stop alone while others wait for it."""
        if self.world == 1:
            return numbers
        heard = torch.tensor(numbers)
        if self.now["done"] % AGREE and self.now["done"] < self.n // self.rows:
            return heard.zero_().tolist()
        torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MAX)
        return heard.tolist()

    def _of_all(self, tally):
        """The tallies of all processes, {name: (processes, ...)}; of one process its own."""
        if self.world == 1:
            return tally
        gathered = {}
        for name, value in tally.items():
            of_each = [torch.empty_like(value, device="cpu") for _ in range(self.world)]
            torch.distributed.all_gather(of_each, value.cpu())
            gathered[name] = torch.stack(of_each)
        return gathered

    def replayed(self, step):
        """step(rows) as a `Replayed` one."""
        return Replayed(step, self.f.batch_size, self.device, self.world > 1)

    def record(self, means):
        """Note the means of a batch, {name: 0-d, or (G,) of G settings}, the loss first. They stay on the device, in the same
        memory; the host reads them once an epoch."""
        values, tally = torch.stack(list(means.values())).detach().view(-1, self.G), self.now["tally"]
        if not tally:                                     # sums over the epoch; each setting's last loss that was in order,
            self.now["names"] = list(means)               # whether all were, and the loss from which on it is not
            tally.update(sums=torch.zeros_like(values), last=torch.full_like(values[0], math.nan),
                         alive=torch.ones_like(values[0], dtype=torch.bool), limit=EXPLODED * (1 + values[0].abs()))
        tally["sums"].add_(values, alpha=self.weight)
        tally["alive"].logical_and_(values[0] < tally["limit"])              # false for nan, too
        tally["last"].copy_(torch.where(tally["alive"], values[0], tally["last"]))

    def _end_epoch(self):
        """Read the tally: means over the epoch and over all processes, and which settings have diverged."""
        now, tally = self.now, self.now["tally"]
        whole = torch.cat([tally["sums"] / (self.n / self.rows), tally["alive"][None], tally["last"][None]])
        if self.world > 1:
            torch.distributed.all_reduce(whole)
            whole /= self.world
        *means, alive, last = whole.tolist()
        now["curves"].append(means)
        now["diverged"] = [of or (None if alive[g] == 1 else {"epoch": now["epoch"], "last_finite_loss": last[g]})
                           for g, of in enumerate(now["diverged"])]
        tally["sums"].zero_()
        now.update(epoch=now["epoch"] + 1, done=0)

    @property
    def epochs_done(self):
        """How many epochs are behind the batch that is now trained on, and which part of this one."""
        return self.now["epoch"] - 1 + self.now["done"] * self.rows / self.n

    @property
    def diverged(self):
        """Of each setting None, or where it diverged: {"epoch", "last_finite_loss"}."""
        return [next(filter(None, of), None) for of in zip(*(now["diverged"] for now in self.phases.values()))]

    def results(self):
        """What training.json says of each setting: curves by name, None or where it diverged, seconds."""
        def curves(g):
            for phase, now in self.phases.items():
                until = now["diverged"][g]["epoch"] - 1 if now["diverged"][g] else None
                for k, name in enumerate(now["names"]):
                    yield f"{phase} {name}".strip(), [means[k][g] for means in now["curves"][:until]]
        return [{"curves": dict(curves(g)), "diverged": diverged, "seconds": sum(now["seconds"] for now in self.phases.values()),
                 "side_by_side": self.G, "processes": self.world} for g, diverged in enumerate(self.diverged)]


def random_states(device, restored=None):
    """The states of the default generators, the CPU's and CUDA's; restored puts earlier ones back."""
    if restored:
        torch.set_rng_state(restored[0].cpu())
        if device.type == "cuda":
            torch.cuda.set_rng_state(restored[1].cpu(), device)
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def train_with_adam(models, group, data, loop):
    """Minimise each setting's own loss with Adam, at --lr and within --grad_clip, those of a group as one batched model."""
    first, G, device = group[0], len(group), data.train[0].device
    share = torch.zeros_like(data.train[0][0, 0]) if beta_share(first, 0) < 1 else None
    stacked = Stacked(models, group, data.train, share) if G > 1 else None
    parameters, f = list((stacked or models[0]).parameters()), common.on_device(first, data.train[0])
    # Where a step is to be captured, the learning rate is to lie on the device.
    lr = torch.tensor(first.lr, device=device) if device.type == "cuda" else first.lr
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True, capturable=device.type == "cuda")
    parts = {"model": stacked or models[0], "optimizer": optimizer}
    if first.lr_schedule == "cosine":
        parts["schedule"] = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (1 + math.cos(math.pi * step / loop.steps)) / 2)

    def step(rows):
        batch = [t.index_select(0, rows) for t in data.train]
        if stacked:
            means = stacked(*batch)
        else:
            terms = models[0](*batch, f)
            means = common.means(models[0].loss(terms, weighted(f, share)), terms)
        optimizer.zero_grad()
        means["loss"].sum().backward()
        clip(parameters, first.grad_clip, G)
        optimizer.step()
        loop.record(means)

    replayed = loop.replayed(step)
    for rows in loop.batches(**parts):
        if share is not None:
            share.fill_(beta_share(first, loop.epochs_done))
        replayed(rows)
        if "schedule" in parts:
            parts["schedule"].step()
    if stacked:
        for g, model in enumerate(models):
            model.load_state_dict({name: value[g] for name, value in stacked.state_dict().items()})


def beta_share(f, epochs):
    """The share of beta that counts so many epochs after the start: 1, or what --beta_warmup and --beta_cycles let rise from 0."""
    length = f.num_epochs / getattr(f, "beta_cycles", 1)
    rise = getattr(f, "beta_warmup", 0) or (length / 2 if length < f.num_epochs else 0)
    return min(1.0, epochs % length / rise) if rise else 1.0


def weighted(f, share):
    """The setting with all its betas times share, a 0-d tensor (None for 1)."""
    betas = [field.name for field in dataclasses.fields(f) if field.metadata["scalar"] and field.name.startswith("beta")]
    return f if share is None else dataclasses.replace(f, **{name: getattr(f, name) * share for name in betas})


class Stacked:
    """G models of one class as one, their parameters stacked to (G, ...). Called on a batch it gives the means of each setting's
    loss and terms, {name: (G,)}. share (0-d) of every beta counts."""

    def __init__(self, models, group, train, share=None):
        self.scalars = common.scalars_of(group, train[0])
        self.weights, self.buffers = torch.func.stack_module_state(models)

        def of_one(weights, buffers, scalars, *batch):
            f = dataclasses.replace(group[0], **scalars)
            terms = torch.func.functional_call(models[0], (weights, buffers), (*batch, f))
            return common.means(models[0].loss(terms, weighted(f, share)), terms)

        self.of_each = torch.vmap(of_one, in_dims=(0, 0, 0) + (None,) * len(train), randomness="same")

    def __call__(self, *batch):
        return self.of_each(self.weights, self.buffers, self.scalars, *batch)

    def parameters(self):
        return self.weights.values()

    def state_dict(self):
        return {name: value.detach() for name, value in (self.weights | self.buffers).items()}

    def load_state_dict(self, state):
        for name, value in self.state_dict().items():
            value.copy_(state[name])


def clip(parameters, max_norm, G):
    """Scale each setting's gradient to a norm of at most max_norm; those of G > 1 settings are stacked, (G, ...)."""
    if G == 1:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    gradients = [p.grad for p in parameters]
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    scale = (max_norm / (norms + 1e-6)).clamp(max=1)      # the rule of clip_grad_norm_
    for g in gradients:
        g.mul_(scale.view(-1, *[1] * (g.ndim - 1)))


class Replayed:
    """step(rows), on CUDA captured once as a graph for batches of `size` row numbers, and replayed: the host then launches
    one thing a batch instead of hundreds. Other batches, many processes' steps, which wait for each other, and devices without
    graphs take the step as it is."""
    EAGER = 3                                             # steps before the capture, so that all memory is there

    def __init__(self, step, size, device, together=False):
        self.step, self.graph, self.taken = step, None, 0
        self.rows = torch.empty(size, dtype=torch.long, device=device)
        self.capturable = device.type == "cuda"
        if self.capturable:
            self.beside = torch.cuda.Stream()
        if self.capturable and together:
            self._launch_always("many processes take it together")

    def _launch_always(self, why):
        self.capturable = False
        print(f"the training step cannot be captured as a CUDA graph, it is launched anew each time: {why}", file=sys.stderr)

    def __call__(self, rows):
        if not self.capturable or len(rows) != len(self.rows):
            return self.step(rows)
        self.rows.copy_(rows)
        if self.taken < self.EAGER:
            self.taken += 1
            self.beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.beside):
                self.step(self.rows)
            torch.cuda.current_stream().wait_stream(self.beside)
            return
        if not self.graph:
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self.beside):
                    self.step(self.rows)
                self.graph = graph
            except RuntimeError as wrong:
                self._launch_always(wrong)
                return self.step(rows)
        self.graph.replay()


CHECKPOINT_FORMAT = 3


class Checkpoint:
    """Where the training of a group of settings stands, in a file that is whole or absent. `state` is what was written, None
    if there is no file, or one that is not whole, not of these settings, or not of this format, torch, device or script: the
    file is then refused by name."""

    def __init__(self, group, data, processes=1):
        device = data.train[0].device
        script = Path(inspect.getfile(type(group[0]))).read_bytes()
        self.of = {"format": CHECKPOINT_FORMAT, "processes": processes, "torch": str(torch.__version__),
                   "device": common.device_name(device).replace(str(device), device.type),
                   "script": hashlib.sha256(script).hexdigest(), "settings": [files.what(f, data) for f in group]}
        digest = hashlib.sha256(json.dumps(self.of["settings"]).encode()).hexdigest()[:16]
        self.path = files.run_dir(group[0], data).parent / "checkpoints" / f"{digest}.pt"
        self.state, self.written = self._read(device), time.monotonic()

    def _read(self, device):
        try:
            saved = torch.load(self.path, weights_only=True, map_location=device)
            differ = [name for name in self.of if saved["of"].get(name) != self.of[name]]
            if not differ:
                return saved["state"]
            wrong = "it is of another " + " and ".join(differ)
        except FileNotFoundError:
            return None
        except Exception as error:                        # a broken file has many names
            wrong = f"it is not whole ({type(error).__name__})"
        print(f"checkpoint {self.path} is refused, training starts over: {wrong}", file=sys.stderr)

    def due(self, seconds):
        return time.monotonic() - self.written >= seconds

    def write(self, state):
        files.write(self.path, lambda file: torch.save({"of": self.of, "state": state}, file))
        self.written = time.monotonic()

    def remove(self):
        self.path.unlink(missing_ok=True)
        files.remove_unfinished(self.path)
        with contextlib.suppress(OSError):                # others may have theirs there
            self.path.parent.rmdir()


@contextlib.contextmanager
def held_signals():
    """Let SIGINT and SIGTERM wait: yields the list of those that came, which the body is to look at between steps."""
    came, numbers = [], (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    handlers = [signal.signal(number, lambda number, frame: came.append(number)) for number in numbers]
    try:
        yield came
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)
