"""The training of all models.

A setting is one combination of a script's flags. Lists and ranges in the flags make several
settings. A group is a list of settings that are trained side by side.

The file reads from the inside out:

1. The training step for one model, as one writes it in PyTorch.
2. The training step for a group: the models are stacked and trained as one batched model.
3. The training step as a CUDA graph, which is captured once and then replayed.
4. The loop, `Training`: batches, their means, curves, divergence. The small scripts train with
   Adam by `train_with_adam`. A deep model's script writes the body of the loop itself.
5. `fit`, which trains what is not finished yet, and the files of a run.
6. Checkpoints and signals.

The docstring of report.py lists what a model has to offer. Nothing in this file knows an objective,
except through a model's `loss`.
"""
import contextlib
import copy
import dataclasses
import hashlib
import inspect
import json
import math
import signal
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import files
import processes


# --- 1. The training step for one model ---


def training_step(model, optimizer, batch, f, share=None):
    """One step of the optimiser on the mean loss of a batch.

    batch holds the tensors that the model's forward takes, one row per example. f is the setting,
    with its scalars on the device (see `common.on_device`). share is the factor of every beta
    during its warm-up (see `beta_share`), a 0-d tensor, or None without a warm-up. Returns the
    means over the batch in nats per example, {name: 0-d tensor}: the loss first, then the
    reconstruction and the KL of each level.
    """
    optimizer.zero_grad()

    terms = model(*batch, f)
    loss = model.loss(terms, with_beta_share(f, share))
    means = common.batch_means(loss, terms)

    means["loss"].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), f.grad_clip)
    optimizer.step()
    return means


def beta_share(f, epochs):
    """The factor of every beta when `epochs` epochs are done, a number from 0 to 1.

    It rises linearly from 0 to 1 over --beta_warmup epochs (Bowman et al. 2016, arXiv 1511.06349).
    With --beta_cycles it does so anew in each cycle, for half of the cycle if --beta_warmup is 0
    (Fu et al. 2019, arXiv 1903.10145). Without these flags it is always 1.
    """
    warmup = getattr(f, "beta_warmup", 0)
    cycles = getattr(f, "beta_cycles", 1)
    cycle_length = f.num_epochs / cycles
    if warmup == 0 and cycles > 1:
        warmup = cycle_length / 2
    if warmup == 0:
        return 1.0
    epochs_of_cycle = epochs % cycle_length
    return min(1.0, epochs_of_cycle / warmup)


def with_beta_share(f, share):
    """The setting with every beta multiplied by share, a 0-d tensor. None leaves it as it is."""
    if share is None:
        return f
    scaled = {}
    for field in dataclasses.fields(f):
        if field.metadata["scalar"] and field.name.startswith("beta"):
            scaled[field.name] = getattr(f, field.name) * share
    return dataclasses.replace(f, **scaled)


# --- 2. The training step for a group ---


class StackedModels:
    """G models of one class as one batched model, each with the scalars of its own setting.

    models are the G modules and group their settings, which differ only in scalars of the
    objective. train is the tuple of training tensors. share is as in `training_step`. Parameters
    and buffers are stacked to (G, ...). All models see the same batch and the same noise. In the
    step, models[0] only supplies the code. Its own weights are not used.
    """

    def __init__(self, models, group, train, share=None):
        self.scalars = common.objective_scalars(group, train[0])
        self.weights, self.buffers = torch.func.stack_module_state(models)

        def means_of_one(weights, buffers, scalars, *batch):
            f = dataclasses.replace(group[0], **scalars)
            terms = torch.func.functional_call(models[0], (weights, buffers), (*batch, f))
            loss = models[0].loss(terms, with_beta_share(f, share))
            return common.batch_means(loss, terms)

        batch_dims = (None,) * len(train)
        self.means_of_each = torch.vmap(
            means_of_one, in_dims=(0, 0, 0, *batch_dims), randomness="same"
        )

    def __call__(self, *batch):
        """The means over a batch of each setting's loss and terms, {name: (G,)}, in nats."""
        return self.means_of_each(self.weights, self.buffers, self.scalars, *batch)

    def parameters(self):
        return self.weights.values()

    def state_dict(self):
        state = {}
        for name, value in (self.weights | self.buffers).items():
            state[name] = value.detach()
        return state

    def load_state_dict(self, state):
        # The tensors of state_dict share the memory of the weights, which is overwritten here.
        for name, value in self.state_dict().items():
            value.copy_(state[name])

    def copy_to(self, models):
        """Give each of the G models its own weights and buffers."""
        state = self.state_dict()
        for g, model in enumerate(models):
            model.load_state_dict({name: value[g] for name, value in state.items()})


def grid_step(stacked, optimizer, batch, max_norm):
    """`training_step` for G models at once, by a `StackedModels`: means {name: (G,)}.

    The G losses share no weight, so the gradient of their sum holds the gradient of each.
    """
    optimizer.zero_grad()
    means = stacked(*batch)
    means["loss"].sum().backward()
    clip_each(stacked.parameters(), max_norm)
    optimizer.step()
    return means


def clip_each(parameters, max_norm):
    """Scale the gradient of each setting to a norm of at most max_norm.

    parameters are stacked, each of shape (G, ...). The rule is that of
    torch.nn.utils.clip_grad_norm_, applied to each setting by itself.
    """
    gradients = [parameter.grad for parameter in parameters]
    norms_by_tensor = [gradient.flatten(1).norm(dim=1) for gradient in gradients]
    norms = torch.stack(norms_by_tensor).norm(dim=0)
    scale = (max_norm / (norms + 1e-6)).clamp(max=1)
    for gradient in gradients:
        # A dimension of size 1 for each dimension of the gradient after the first.
        ones = [1] * (gradient.ndim - 1)
        gradient.mul_(scale.view(-1, *ones))


# --- 3. The training step as a CUDA graph ---


class Replayed:
    """A training step that is captured as a CUDA graph and then replayed.

    For each batch the host launches one graph instead of hundreds of kernels. step is a function of
    the row numbers of a batch, (size,), and must do all its work on the device. It is called
    directly, as if there were no graph, in three cases: for batches of another size, on devices
    other than CUDA, and where several processes take the step together, since they wait for each
    other in it.
    """

    # Steps before the capture. They allocate the gradients and the optimiser's state.
    EAGER = 3

    def __init__(self, step, size, device, together=False):
        self.step = step
        self.graph = None
        self.eager_steps = 0
        # The graph always reads the row numbers from this memory.
        self.rows = torch.empty(size, dtype=torch.long, device=device)
        self.capturable = device.type == "cuda"
        if self.capturable:
            self.stream = torch.cuda.Stream()
        if self.capturable and together:
            self._give_up("several processes take it together")

    def __call__(self, rows):
        if not self.capturable or len(rows) != len(self.rows):
            self.step(rows)
            return
        self.rows.copy_(rows)
        if self.eager_steps < self.EAGER:
            self._step_eagerly()
            return
        if self.graph is None:
            self._capture()
        # The capture may have failed.
        if self.graph is None:
            self.step(rows)
        else:
            self.graph.replay()

    def _step_eagerly(self):
        """Take the step on the stream that will be captured, as CUDA graphs require."""
        self.eager_steps += 1
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step(self.rows)
        torch.cuda.current_stream().wait_stream(self.stream)

    def _capture(self):
        """Capture the step, which does not run it. Leaves graph at None where that fails."""
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self.step(self.rows)
            self.graph = graph
        except RuntimeError as error:
            self._give_up(error)

    def _give_up(self, reason):
        self.capturable = False
        print(
            "the training step cannot be captured as a CUDA graph, so its kernels are launched "
            f"one by one: {reason}",
            file=sys.stderr,
        )


# --- 4. The loop ---


# A setting has diverged when its loss is not finite, or when it reaches this number times
# 1 + |the loss of the first batch|.
EXPLODED = 1e3

# Several processes agree on signals and checkpoints once in this number of steps.
AGREE = 8


@dataclass
class Divergence:
    """Where the training of a setting diverged."""

    # The epoch in which it diverged, counted from 1.
    epoch: int
    # The last loss before that, in nats per example. None if no loss was finite.
    last_finite_loss: float


@dataclass
class TrainingRecord:
    """How the training of a setting went. training.json holds these fields, too."""

    # {name: [mean over each epoch]} in nats per example. They end before a divergence.
    curves: dict
    # A Divergence, or None.
    diverged: Divergence
    # The seconds that the training of the whole group took.
    seconds: float
    # The number of settings in that group.
    side_by_side: int
    # The number of processes that trained it together.
    processes: int

    @classmethod
    def from_json(cls, saved):
        """The record in the dict of a training.json. Raises ValueError if it is not a whole one."""
        number = (int, float)

        curves = _checked(saved, "curves", dict)
        _checked(curves, "loss", list)
        for name in curves:
            for mean in _checked(curves, name, list):
                if not isinstance(mean, number):
                    raise ValueError(f"the curve {name!r} does not consist of numbers")

        diverged = _checked(saved, "diverged", (dict, type(None)))
        if diverged is not None:
            diverged = Divergence(
                epoch=_checked(diverged, "epoch", int),
                last_finite_loss=_checked(diverged, "last_finite_loss", (*number, type(None))),
            )
        return cls(
            curves=curves,
            diverged=diverged,
            seconds=_checked(saved, "seconds", number),
            side_by_side=_checked(saved, "side_by_side", int),
            processes=_checked(saved, "processes", int),
        )


def _checked(values, name, kinds):
    """values[name]. Raises ValueError if there is none, or if it is of another type."""
    if name not in values:
        raise ValueError(f"{name!r} is missing")
    if not isinstance(values[name], kinds):
        raise ValueError(f"{name!r} has the wrong type {type(values[name]).__name__}")
    return values[name]


@dataclass
class Tally:
    """The means of an epoch's batches, added up on the device. The host reads them once an epoch.

    The tensors keep their memory throughout a phase, because a captured step adds to them.
    """

    # Sums over the batches of this epoch, each weighted by its size: (means, G).
    sums: torch.Tensor
    # Whether no loss has reached the limit so far: (G,), bool.
    alive: torch.Tensor
    # The last loss below the limit, nan if there was none: (G,).
    last: torch.Tensor
    # A setting has diverged if its loss reaches this: (G,).
    limit: torch.Tensor

    @classmethod
    def like(cls, values):
        """An empty tally for the means of the first batch, (means, G), the loss first."""
        first_loss = values[0]
        return cls(
            sums=torch.zeros_like(values),
            alive=torch.ones_like(first_loss, dtype=torch.bool),
            last=torch.full_like(first_loss, math.nan),
            limit=EXPLODED * (1 + first_loss.abs()),
        )

    def add(self, values, weight):
        """Add the means of a batch, (means, G), the loss first."""
        loss = values[0]
        self.sums.add_(values, alpha=weight)
        # The comparison is false for nan, too.
        self.alive.logical_and_(loss < self.limit)
        self.last.copy_(torch.where(self.alive, loss, self.last))


@dataclass
class Phase:
    """Where one phase of a training is. Most trainings have a single phase, named ""."""

    name: str
    # For each setting None, or its Divergence in this phase.
    divergences: list
    # The epoch that is being trained, counted from 1.
    epoch: int = 1
    # The number of this epoch's batches that are done.
    batches_done: int = 0
    # Names of the recorded means, the loss first.
    names: list = dataclasses.field(default_factory=list)
    # For each finished epoch the means, a list over names of lists over settings.
    curves: list = dataclasses.field(default_factory=list)
    # For each setting its last finite loss when the last finished epoch ended, or None.
    last_losses: list = dataclasses.field(default_factory=list)
    # The Tally. None before the first batch and after the last epoch.
    tally: Tally = None
    # The seconds of training so far.
    seconds: float = 0.0
    # The state from which a later command resumes, None before the first checkpoint. It has
    # "parts": {name: state_dict}, "order": the state of the batches' generator when the epoch
    # began, and "noise": the `random_states`.
    restart: dict = None

    def state_dict(self):
        """The phase as a checkpoint holds it: dicts, lists, tensors, text and numbers."""
        state = dict(vars(self))
        state["divergences"] = [
            None if divergence is None else dataclasses.asdict(divergence)
            for divergence in self.divergences
        ]
        state["tally"] = None if self.tally is None else dict(vars(self.tally))
        return state

    @classmethod
    def from_state(cls, state):
        """The phase that a `state_dict` describes."""
        phase = cls(**state)
        phase.divergences = [
            None if divergence is None else Divergence(**divergence)
            for divergence in state["divergences"]
        ]
        phase.tally = None if state["tally"] is None else Tally(**state["tally"])
        return phase


class Training:
    """The loop around a training step: batches, their means, curves, checkpoints.

        for rows in loop.batches(model=model, optimizer=optimizer):
            batch = [tensor[rows] for tensor in data.train]
            means = training_step(model, optimizer, batch, f)
            loop.record(means)

    It trains a group of G settings side by side in this process. With together=True it trains one
    setting by all processes, each of which takes --batch_size rows of every step. With a Checkpoint
    it goes on from there. signals is the list that `deferred_signals` yields.
    """

    def __init__(self, group, data, checkpoint=None, together=False, signals=()):
        self.f = group[0]
        self.group_size = len(group)
        self.device = data.train[0].device
        self.rank, self.process_count = processes.rank_and_count() if together else (0, 1)

        self.num_examples = len(data.train[0])
        self.examples_per_step = self.process_count * self.f.batch_size
        self.examples_per_epoch = self.num_examples
        if together:
            self._leave_out_incomplete_batch()
        self.steps_per_epoch = math.ceil(self.examples_per_epoch / self.examples_per_step)
        # The number of steps of the whole training.
        self.steps = self.steps_per_epoch * self.f.num_epochs

        # The random generator that shuffles the examples.
        self.order = common.generator(self.f.seed, "batches", self.device)
        self.signals = signals

        # The Phase that is being trained.
        self.phase = None
        # The time at which this phase would have begun if no command had been interrupted.
        self.start = None
        # The weight of the current batch in the means over the epoch.
        self.weight = 1.0

        self.checkpoint = checkpoint
        self.phases = {}
        if checkpoint is not None and checkpoint.state is not None:
            for name, state in checkpoint.state.items():
                self.phases[name] = Phase.from_state(state)

    def _leave_out_incomplete_batch(self):
        """Let all steps be of one size, for all processes."""
        if self.examples_per_step > self.num_examples:
            common.stop(
                self.f,
                f"--batch_size: got {self.f.batch_size} for each of {self.process_count} "
                f"process(es), wants at most {self.num_examples:,} in all, the number of training "
                "examples",
            )
        steps = self.num_examples // self.examples_per_step
        self.examples_per_epoch = steps * self.examples_per_step

    # What a training step uses.

    def batches(self, phase="", epochs=None, test=None, **parts):
        """Yield the row numbers of each batch of this process, (batch size,), over all epochs.

        phase names a further phase of the training, and epochs is its length (default:
        --num_epochs). test is a function without arguments that returns {name: number}. It is
        called after each epoch, and its numbers become curves. parts are the objects that change
        in training and have a state_dict: models, optimisers, schedules. They go on from the
        checkpoint if there is one, and so do the random numbers. If a signal has arrived, it writes
        a checkpoint and raises Interrupted.
        """
        epochs = epochs or self.f.num_epochs
        current = self._begin_phase(phase, epochs, parts)
        progress = self._progress(epochs)

        while current.epoch <= epochs and not self._all_diverged():
            # A checkpoint keeps this state. A later command then shuffles in the same way, and
            # skips the batches of this epoch that are done.
            order_state = self.order.get_state()
            shuffled = self._shuffled_batches()
            note = self._note(current.epoch, epochs)
            while current.batches_done < len(shuffled):
                rows = self._own_rows(shuffled[current.batches_done])
                # A batch that is not full counts less.
                self.weight = len(rows) / self.f.batch_size
                yield rows
                current.batches_done += 1
                progress.update(self._examples_done(), note)
                self._save_or_stop(order_state, parts)
            self._end_epoch(test() if test else {})

        self._end_phase(parts)
        epochs_done = len(current.curves)
        note = self._note(epochs_done, epochs)
        progress.update(epochs_done * self.examples_per_epoch, note, end=True)

    def replayed(self, step):
        """The function step(rows), as a `Replayed` step for batches of full size."""
        return Replayed(step, self.f.batch_size, self.device, together=self.process_count > 1)

    def record(self, means):
        """Note the means of a batch, {name: 0-d tensor, or (G,) for a grid}, the loss first."""
        values = torch.stack(list(means.values())).detach().view(-1, self.group_size)
        if self.phase.tally is None:
            self.phase.names = list(means)
            self.phase.tally = Tally.like(values)
        self.phase.tally.add(values, self.weight)

    @property
    def epochs_done(self):
        """The number of epochs done before the current batch, a fraction within an epoch."""
        examples = self.phase.batches_done * self.examples_per_step
        return self.phase.epoch - 1 + examples / self.examples_per_epoch

    # The steps of `batches`.

    def _begin_phase(self, name, epochs, parts):
        """Start a phase, or go on from the checkpoint. Returns the Phase."""
        if name not in self.phases:
            self.phases[name] = Phase(name, divergences=[None] * self.group_size)
        phase = self.phases[name]
        self.phase = phase

        if phase.restart is not None:
            for part_name, part in parts.items():
                part.load_state_dict(phase.restart["parts"][part_name])
            self.order.set_state(phase.restart["order"].cpu())
            set_random_states(self.device, phase.restart["noise"])
            if phase.tally is not None and self.process_count > 1:
                self._keep_own_tally(phase.tally)
            # Training goes on in the last phase. It has finished those before it.
            if phase is list(self.phases.values())[-1]:
                print(
                    f"resuming after {phase.epoch - 1} of {epochs} epochs from the checkpoint "
                    f"{self.checkpoint.path}",
                    file=sys.stderr,
                )
        self.start = time.monotonic() - phase.seconds
        return phase

    def _keep_own_tally(self, tally):
        """Keep this process's part of a tally whose tensors hold all processes, stacked."""
        for name, value in vars(tally).items():
            setattr(tally, name, value[self.rank].to(self.device))

    def _progress(self, epochs):
        words = ["training"]
        if self.phase.name:
            words.append(self.phase.name)
        if self.group_size > 1:
            words.append(f"{self.group_size} settings")
        return common.Progress(
            " ".join(words),
            total=self.examples_per_epoch * epochs,
            unit="examples",
            already_done=self._examples_done(),
        )

    def _examples_done(self):
        """The number of examples that this phase has seen, each counted once an epoch."""
        in_epoch = self.phase.batches_done * self.examples_per_step
        in_epoch = min(self.examples_per_epoch, in_epoch)
        return (self.phase.epoch - 1) * self.examples_per_epoch + in_epoch

    def _note(self, epoch, epochs):
        """The note in the progress line: "epoch 12/100, loss 235.32 to 250.01, ".

        The losses are those of the last finished epoch, from the smallest to the largest of the
        settings.
        """
        note = f"epoch {epoch}/{epochs}, "
        if not self.phase.curves:
            return note
        losses = self.phase.curves[-1][0]
        smallest = f"{min(losses):.2f}"
        largest = f"{max(losses):.2f}"
        if smallest == largest:
            return f"{note}loss {smallest}, "
        return f"{note}loss {smallest} to {largest}, "

    def _shuffled_batches(self):
        """The row numbers of each step of an epoch, for all processes."""
        rows = torch.randperm(self.num_examples, generator=self.order, device=self.device)
        return rows[:self.examples_per_epoch].split(self.examples_per_step)

    def _own_rows(self, rows):
        """The part of a step's row numbers that this process takes."""
        first = self.rank * self.f.batch_size
        return rows[first:first + self.f.batch_size]

    def _save_or_stop(self, order_state, parts):
        """Write a checkpoint if one is due or a signal has arrived. For a signal, then stop.

        It stops by raising Interrupted. order_state is the state of the batches' generator when
        this epoch began.
        """
        signal_number = self.signals[0] if self.signals else 0
        due = False
        if self.checkpoint is not None and self.rank == 0:
            due = self.checkpoint.due(self.f.checkpoint_seconds)
        if self.process_count > 1:
            signal_number, due = self._agree(signal_number, due)

        if self.checkpoint is not None and (signal_number or due):
            self._save(order_state, parts)
        if signal_number:
            raise common.Interrupted(signal_number)

    def _agree(self, signal_number, due):
        """The signal that any process has received, and whether a checkpoint is due for any.

        All processes learn this in the same step: no process may stop while others wait for it.
        They ask each other in one of AGREE steps and in the last step of an epoch. In the other
        steps the answer is that there is nothing to do.
        """
        step = self.phase.batches_done
        if step % AGREE != 0 and step < self.steps_per_epoch:
            return 0, 0
        return processes.largest([signal_number, int(due)])

    def _save(self, order_state, parts):
        """Write a checkpoint within an epoch. Several processes do so together."""
        # 1. The tally of this process, or those of all, stacked.
        tally = dict(vars(self.phase.tally))
        if self.process_count > 1:
            for name, value in tally.items():
                tally[name] = processes.gather(value)
        if self.rank > 0:
            return

        # 2. The file, which the first process writes.
        self.phase.seconds = time.monotonic() - self.start
        self.phase.restart = self._restart_point(order_state, parts)
        state = self._state_dict()
        state[self.phase.name]["tally"] = tally
        self.checkpoint.write(state)

    def _restart_point(self, order_state, parts):
        """What `Phase.restart` describes."""
        states = {name: part.state_dict() for name, part in parts.items()}
        return {"parts": states, "order": order_state, "noise": random_states(self.device)}

    def _state_dict(self):
        return {name: phase.state_dict() for name, phase in self.phases.items()}

    def _end_epoch(self, further_means):
        """Read the tally: means over the epoch and all processes, and which settings diverged.

        further_means, {name: number}, are added to the curves of all settings. If one of them is
        not finite, all settings have diverged.
        """
        phase = self.phase
        tally = phase.tally

        # 1. The means. The host waits here, once an epoch. The number of batches is a fraction if
        #    the last batch is not full, as is the weight of that batch.
        batches = self.examples_per_epoch / self.examples_per_step
        summary = torch.cat([tally.sums / batches, tally.alive[None], tally.last[None]])
        if self.process_count > 1:
            processes.mean_(summary)
        *means, alive, last = summary.tolist()

        for name, value in further_means.items():
            if name not in phase.names:
                phase.names.append(name)
            means.append([value] * self.group_size)

        # 2. Divergence: alive is 1 only where no process met a loss beyond the limit. The last step
        #    of an epoch can spoil the weights without a loss that shows it.
        further_are_finite = all(math.isfinite(value) for value in further_means.values())
        phase.curves.append(means)
        phase.last_losses = [loss if math.isfinite(loss) else None for loss in last]
        for g in range(self.group_size):
            has_diverged = alive[g] != 1 or not further_are_finite
            if has_diverged and phase.divergences[g] is None:
                phase.divergences[g] = Divergence(phase.epoch, phase.last_losses[g])

        # 3. The next epoch.
        tally.sums.zero_()
        phase.epoch += 1
        phase.batches_done = 0

    def _end_phase(self, parts):
        """Finish the current phase, and note the state from which a later command goes on."""
        self.phase.seconds = time.monotonic() - self.start
        # A copy, because further phases may change the parts.
        self.phase.restart = copy.deepcopy(self._restart_point(self.order.get_state(), parts))
        self.phase.tally = None
        # A grid writes its results one after another. The checkpoint lasts until all are written.
        if self.checkpoint is not None and self.group_size > 1:
            self.checkpoint.write(self._state_dict())

    # The outcome for each setting.

    @property
    def diverged(self):
        """For each setting None, or its first Divergence."""
        first = [None] * self.group_size
        for phase in self.phases.values():
            for g, divergence in enumerate(phase.divergences):
                if first[g] is None:
                    first[g] = divergence
        return first

    def _all_diverged(self):
        return None not in self.diverged

    def check_weights(self, models):
        """Mark a setting as diverged in the last epoch if one of its weights is not finite.

        The last step of the training can cause this, because no loss is computed after it.
        """
        finite = []
        for model in models:
            finite_tensors = [parameter.isfinite().all() for parameter in model.parameters()]
            finite.append(torch.stack(finite_tensors).all())
        last_phase = list(self.phases.values())[-1]
        diverged = self.diverged
        for g, is_finite in enumerate(torch.stack(finite).tolist()):
            if not is_finite and diverged[g] is None:
                last_phase.divergences[g] = Divergence(
                    epoch=len(last_phase.curves), last_finite_loss=last_phase.last_losses[g]
                )

    def records(self):
        """One TrainingRecord per setting."""
        seconds = sum(phase.seconds for phase in self.phases.values())
        records = []
        for g, divergence in enumerate(self.diverged):
            record = TrainingRecord(
                curves=self._curves(g),
                diverged=divergence,
                seconds=seconds,
                side_by_side=self.group_size,
                processes=self.process_count,
            )
            records.append(record)
        return records

    def _curves(self, g):
        """The curves of setting g by name. In a phase where it diverged they end before that."""
        curves = {}
        for phase in self.phases.values():
            epochs = len(phase.curves)
            if phase.divergences[g] is not None:
                epochs = phase.divergences[g].epoch - 1
            for k, name in enumerate(phase.names):
                curve = [means[k][g] for means in phase.curves[:epochs]]
                curves[f"{phase.name} {name}".strip()] = curve
        return curves


def train_with_adam(models, group, data, loop):
    """Minimise each setting's own loss with Adam, at --lr and within --grad_clip.

    The models of more than one setting train as one batched model. All are changed in place.
    """
    # The settings of a group share every flag except scalars of the objective. first has these
    # scalars as numbers, and f has them as tensors on the device.
    first = group[0]
    like = data.train[0]
    f = common.on_device(first, like)

    # 1. The factor of beta in its warm-up. It lies on the device, where a captured step reads it.
    share = None
    if beta_share(first, 0) < 1:
        share = torch.zeros((), dtype=like.dtype, device=like.device)

    # 2. The model or the stack of models, its optimiser and its schedule.
    is_grid = len(group) > 1
    trained = StackedModels(models, group, data.train, share) if is_grid else models[0]
    optimizer = make_adam(trained.parameters(), first, like.device)
    parts = {"model": trained, "optimizer": optimizer}
    schedule = None
    if first.lr_schedule == "cosine":
        schedule = cosine_schedule(optimizer, loop.steps)
        parts["schedule"] = schedule

    # 3. The step, which CUDA captures.
    def step(rows):
        batch = [tensor.index_select(0, rows) for tensor in data.train]
        if is_grid:
            means = grid_step(trained, optimizer, batch, first.grad_clip)
        else:
            means = training_step(trained, optimizer, batch, f, share=share)
        loop.record(means)

    replayed_step = loop.replayed(step)

    # 4. The loop.
    for rows in loop.batches(**parts):
        if share is not None:
            share.fill_(beta_share(first, loop.epochs_done))
        replayed_step(rows)
        if schedule is not None:
            schedule.step()

    if is_grid:
        trained.copy_to(models)


def make_adam(parameters, f, device):
    """Adam at --lr. On CUDA the learning rate lies on the device: a captured step reads it."""
    on_cuda = device.type == "cuda"
    lr = torch.tensor(f.lr, device=device) if on_cuda else f.lr
    return torch.optim.Adam(list(parameters), lr=lr, fused=True, capturable=on_cuda)


def cosine_schedule(optimizer, steps):
    """Let the learning rate fall from its start to 0 as a cosine, over this number of steps."""
    def factor(step):
        return (1 + math.cos(math.pi * step / steps)) / 2
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# --- 5. fit, and the files of a run ---


# The files of a run that --overwrite removes, besides its pictures. result.json and training.json
# say that the others belong together, so they go first.
OVERWRITTEN_FILES = (
    "result.json",
    "training.json",
    "model.pt",
    "units.npz",
    "compression.json",
    "attack.json",
)


@dataclass
class TrainedRun:
    """A setting with its trained model and the record of its training."""

    # The setting: an instance of the script's flags.
    f: object
    # Its data, a datasets.Data.
    data: object
    # The trained model, in evaluation mode. None if it diverged or if another process has it.
    model: torch.nn.Module = None
    # The TrainingRecord. None if another process has it.
    record: TrainingRecord = None


@dataclass
class FinishedRun:
    """A run that an earlier command has trained."""

    # The TrainedRun of the setting in question.
    run: TrainedRun
    # The folder that it was read from: the setting's own or a neighbour's.
    folder: Path
    # The contents of the training.json in that folder.
    saved: dict


def fit(Model, settings, data, side_by_side=True, train=None):
    """Train one `Model` per setting on its data. Returns a list of TrainedRun, one per setting.

    Settings that differ only in scalars of the objective train side by side as one batched model,
    unless side_by_side is False. Each setting starts from the same weights, and sees the same
    batches and the same noise, as if it were trained alone. Several processes share the settings:
    each trains its own, and the runs of the others have neither model nor record.

    A script with its own loop passes the function train(model, f, data, loop). Here loop is a
    `Training`, whose batches it takes. It returns the model to evaluate. Settings are then trained
    one after another, each by all processes together.

    A finished run is read from its folder and not trained again, unless --overwrite is given.
    model.pt and training.json of a run are written when its group ends. Until then there is a
    checkpoint. Raises Interrupted on SIGINT and SIGTERM.
    """
    for f in settings:
        check_beta_warmup(f)
    device = common.select_device(settings[0])
    print(f"device: {common.device_name(device)}", file=sys.stderr)
    # A folder that cannot be made ends the program before any training.
    for f, d in zip(settings, data):
        files.make_run_dir(f, d)

    runs = [TrainedRun(f, d) for f, d in zip(settings, data)]
    if train is not None:
        groups = [[i] for i in range(len(settings))]
    else:
        groups = groups_of_settings(settings, data, side_by_side)
    for indices in groups:
        group = [settings[i] for i in indices]
        for i, run in zip(indices, fit_group(Model, group, data[indices[0]], train)):
            runs[i] = run
    return runs


def check_beta_warmup(f):
    """End the program if beta's warm-up takes longer than the cycle that it belongs to."""
    warmup = getattr(f, "beta_warmup", 0)
    longest = f.num_epochs / getattr(f, "beta_cycles", 1)
    if warmup > longest:
        common.stop(
            f,
            f"--beta_warmup: got {warmup:g}, wants at most --num_epochs / --beta_cycles = "
            f"{longest:g}",
        )


def groups_of_settings(settings, data, side_by_side):
    """The indices of this process's settings, in lists of those that train side by side."""
    groups = {}
    for i in processes.own_indices(len(settings)):
        # Settings with equal keys form a group. Without side_by_side each setting is alone.
        key = i
        if side_by_side:
            fixed = [
                getattr(settings[i], field.name)
                for field in dataclasses.fields(settings[i])
                if not field.metadata["scalar"]
            ]
            key = (*fixed, id(data[i]))
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def fit_group(Model, group, data, train):
    """Read the finished runs of a group and train the others: one TrainedRun per setting.

    data is the data set of all its settings. train is as for `fit`.
    """
    together = train is not None
    rank, process_count = processes.rank_and_count() if together else (0, 1)

    # 1. The runs that are finished. All processes look before the first one changes anything.
    folders = trained_folders(group[0], data)
    finished = []
    for f in group:
        finished.append(None if f.overwrite else read_trained(Model, f, data, folders))
    missing = [g for g in range(len(group)) if finished[g] is None]
    members, checkpoint = find_checkpoint(group, missing, data, process_count)
    if together:
        processes.barrier()

    # 2. Files. The first process writes them.
    runs = [None] * len(group)
    for g, f in enumerate(group):
        if finished[g] is not None:
            runs[g] = finished[g].run
            if rank == 0:
                take_over(finished[g])
        elif f.overwrite and rank == 0:
            remove_run_files(f, data)

    # 3. Training. A signal that arrives after the last step waits until the results are written.
    with deferred_signals() as signals:
        if missing:
            trained = train_group(
                Model,
                [group[g] for g in members],
                data,
                checkpoint=checkpoint,
                train=train,
                signals=signals,
            )
            # With a checkpoint of the whole group, finished settings are trained too. Their files
            # are not written again.
            for g, run in zip(members, trained):
                if g in missing:
                    runs[g] = run
                    if rank == 0:
                        digest = {"script_digest": script_digest(run.f)}
                        leave(run, files.description(run.f, data) | digest)
        if rank == 0:
            checkpoint.remove()

    if together:
        processes.barrier()
    return runs


def find_checkpoint(group, missing, data, process_count):
    """Which settings of a group to train, as a list of indices, and their Checkpoint.

    missing are the indices of the settings that are not finished. Only these are trained, with one
    exception. If a process died while it wrote the results of a group, it has left a checkpoint of
    the whole group. All settings of the group then go on from there.
    """
    everyone = list(range(len(group)))
    checkpoint = Checkpoint(group, data, process_count)
    if checkpoint.state is not None or not missing or missing == everyone:
        return everyone, checkpoint
    return missing, Checkpoint([group[g] for g in missing], data, process_count)


def train_group(Model, group, data, checkpoint=None, train=None, signals=()):
    """Train a group of settings side by side with Adam, or one setting by a script's own loop.

    Returns one TrainedRun per setting. checkpoint and signals are as for `Training`, train as for
    `fit`. Raises Interrupted, after it has written a checkpoint, if a signal arrives.
    """
    common.set_precision(group[0])
    together = train is not None
    loop = Training(group, data, checkpoint=checkpoint, together=together, signals=signals)

    # Models are built before the noise begins, because building reseeds the default generators.
    models = [build(Model, f, data) for f in group]
    with common.seeded(loop.f.seed, "noise", loop.device):
        with processes.noise_rows(loop.rank, loop.process_count):
            if train is not None:
                f = common.on_device(group[0], data.train[0])
                models = [train(models[0], f, data, loop)]
            else:
                train_with_adam(models, group, data, loop)

    loop.check_weights(models)
    runs = []
    for f, model, record in zip(group, models, loop.records()):
        trained_model = model.eval() if record.diverged is None else None
        runs.append(TrainedRun(f, data, trained_model, record))
    return runs


def build(Model, f, data):
    """A model on the device of its data, with initial weights that depend only on --seed."""
    like = data.train[0]
    with common.seeded(f.seed, "init", torch.device("cpu")):
        # channels_last makes convolutions faster on a CPU. It changes no other weights.
        return Model(f).to(like.device, like.dtype, memory_format=torch.channels_last)


def trained_folders(f, data):
    """The folders of all runs of this setting's script that hold a training.json."""
    script_folder = files.run_dir(f, data).parent
    return sorted(path.parent for path in script_folder.glob("*/training.json"))


def read_trained(Model, f, data, folders):
    """The FinishedRun of a setting that an earlier command has trained, None if there is none.

    The run is the setting's own or, among those in folders, a neighbour's that differs only in
    flags of the evaluation. A file that cannot be used is named on stderr, and the next folder is
    tried.
    """
    own_folder = files.run_dir(f, data)
    neighbours = [folder for folder in folders if folder != own_folder]
    for folder in [own_folder, *neighbours]:
        # None stands for the own folder, where every flag has to match.
        neighbour = None if folder == own_folder else folder
        saved = files.read_matching(f, data, "training.json", folder=neighbour)
        if saved is None:
            continue
        path = folder / "training.json"
        try:
            record = TrainingRecord.from_json(saved)
            model = None
            if record.diverged is None:
                path = folder / "model.pt"
                model = read_model(Model, f, data, path)
        except ValueError as error:
            print(f"cannot read {path}, training again: {error}", file=sys.stderr)
            continue
        return FinishedRun(TrainedRun(f, data, model, record), folder, saved)
    return None


def read_model(Model, f, data, path):
    """The model of a setting with the weights in a file. Raises ValueError, in one line."""
    model = build(Model, f, data).eval()
    try:
        model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except RuntimeError as error:
        # The file is not whole, or its weights are of other shapes.
        raise ValueError(textwrap.shorten(str(error), 150)) from None
    except Exception as error:
        # There are many other kinds of broken files, and each raises an error of its own.
        raise ValueError(
            f"it does not contain a model's weights ({type(error).__name__})"
        ) from None
    return model


def script_digest(f):
    """A digest of the text of a setting's script, by which a changed script is noticed."""
    return hashlib.sha256(Path(inspect.getfile(type(f))).read_bytes()).hexdigest()


def take_over(finished):
    """Print that a run is finished. Write its files into its own folder if they were elsewhere."""
    run = finished.run
    remark = ""
    # Runs of earlier versions of this project have no digest.
    if finished.saved.get("script_digest", script_digest(run.f)) != script_digest(run.f):
        remark = f" by another version of {common.script_name(run.f)}.py"
    print(
        f"already trained{remark}: {finished.folder} (--overwrite trains it again)",
        file=sys.stderr,
    )
    if finished.folder != files.run_dir(run.f, run.data):
        settings = files.run_settings(run.f, run.data)
        leave(run, finished.saved | {"settings": settings})


def leave(run, description):
    """Write model.pt and training.json of a run.

    description holds the fields of training.json besides the record (see `files.description`).
    """
    folder = files.run_dir(run.f, run.data)
    # Files of an earlier training do not belong to this one.
    remove_file(folder / "result.json")
    if run.model is None:
        remove_file(folder / "model.pt")
    else:
        files.write(folder / "model.pt", lambda file: torch.save(run.model.state_dict(), file))
    files.write_json(folder / "training.json", description | dataclasses.asdict(run.record))


def remove_run_files(f, data):
    """Remove the files and pictures that an earlier run of this setting left, and nothing else."""
    folder = files.run_dir(f, data)
    for name in OVERWRITTEN_FILES:
        remove_file(folder / name)
    for path in folder.glob("*.png"):
        remove_file(path)


def remove_file(path):
    """Remove a file if there is one. A folder of this name stays."""
    if not path.is_dir():
        path.unlink(missing_ok=True)


# --- 6. Checkpoints and signals ---


class Checkpoint:
    """A file with the state of the training of a group, from which a later command resumes.

    `state` is the state that was written, or None. An incomplete file is refused, with one line on
    stderr. So is a file from other settings, another version of the script or of torch, another
    kind of device, or another number of processes.

    A training that resumes from a checkpoint ends with exactly the numbers of an undisturbed run.
    This is promised on the CPU, and on CUDA where the backward pass is deterministic. The deep
    models' bilinear interpolation is an operation whose backward pass on CUDA is not.
    """

    # The parts of the identity in words, for the message about a file that is refused.
    IDENTITY_WORDS = {
        "processes": "number of processes",
        "torch": "version of torch",
        "device": "device",
        "script": "version of the script",
        "settings": "list of settings",
    }

    def __init__(self, group, data, process_count=1):
        device = data.train[0].device
        # The name of the device without its number: "cuda (NVIDIA H200)".
        device_name = common.device_name(device).replace(str(device), device.type)
        # A checkpoint is used only if all of this is the same as when it was written.
        self.identity = {
            "processes": process_count,
            "torch": str(torch.__version__),
            "device": device_name,
            "script": script_digest(group[0]),
            "settings": [files.run_settings(f, data) for f in group],
        }
        settings = json.dumps(self.identity["settings"]).encode()
        name = hashlib.sha256(settings).hexdigest()[:16]
        folder = files.run_dir(group[0], data).parent / "checkpoints"
        self.path = folder / f"{name}.pt"
        self.state = self._read(device)
        # The time of the last checkpoint, or of the start.
        self.written = time.monotonic()

    def _read(self, device):
        """The state in the file, or None if there is no file or if it is refused."""
        try:
            saved = torch.load(self.path, weights_only=True, map_location=device)
            differing = []
            for name, value in self.identity.items():
                if saved["identity"].get(name) != value:
                    differing.append(f"a different {self.IDENTITY_WORDS[name]}")
            if not differing:
                return saved["state"]
            reason = "it was written with " + " and ".join(differing)
        except FileNotFoundError:
            return None
        except Exception as error:
            # There are many kinds of broken files, and each raises an error of its own.
            reason = f"it is incomplete or corrupt ({type(error).__name__})"
        print(
            f"cannot use the checkpoint {self.path}, training starts over: {reason}",
            file=sys.stderr,
        )
        return None

    def due(self, seconds):
        """Whether the last checkpoint is at least this number of seconds old."""
        return time.monotonic() - self.written >= seconds

    def write(self, state):
        """Write a state made of dicts, lists, tensors, text and numbers."""
        content = {"identity": self.identity, "state": state}

        def save(file):
            torch.save(content, file)

        files.write(self.path, save)
        self.written = time.monotonic()

    def remove(self):
        """Remove the file, and its folder if no other group has a checkpoint in it."""
        # On Windows, a file that another process is reading cannot be removed.
        with contextlib.suppress(PermissionError):
            self.path.unlink(missing_ok=True)
        files.remove_unfinished(self.path)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()


def random_states(device):
    """The states of the default generators: the CPU's and, on CUDA, the device's."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_states(device, states):
    """Put earlier `random_states` back."""
    torch.set_rng_state(states[0].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1].cpu(), device)


@contextlib.contextmanager
def deferred_signals():
    """A context in which SIGINT and SIGTERM wait. Yields the list of those that arrived.

    The body looks at the list and raises an exception when it can stop. If it ends without one,
    the first signal that arrived takes effect after the context. Only the main thread can receive
    signals, so in other threads the list stays empty.
    """
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number, frame):
        received.append(number)

    handlers = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            # A handler that is not Python's could not be put back, so it stays in charge.
            if handler is not None:
                handlers[number] = handler
                signal.signal(number, note)
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])
