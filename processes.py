"""Training by several processes, which torchrun starts: who does what, and what they do together.

torchrun describes each process in environment variables (RANK, WORLD_SIZE, ...). Without torchrun
there is one process. Nothing is communicated then: a mean or a maximum over all processes is the
value of this process.

`barrier`, `largest`, `gather` and `mean_` are collective: each process must call them, in the same
order, or the others wait for it.

In this order: which process this is; collective operations; models and noise; the end of a process.
"""
import contextlib
import datetime
import os
import re
import sys

import torch


# --- Which process this is ---


def rank_and_count():
    """The rank of this process and the number of processes: (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def local_rank_and_count():
    """The rank of this process among those on this machine, and their number."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def own_indices(count):
    """Which of `count` settings this process trains: a range of their indices.

    The settings are dealt over the processes in turn, the first one to process 0.
    """
    rank, processes = rank_and_count()
    return range(rank, count, processes)


@contextlib.contextmanager
def alone():
    """Within this context, this process counts as the only one. It keeps its GPU."""
    hidden = {}
    for name in ("RANK", "WORLD_SIZE"):
        if name in os.environ:
            hidden[name] = os.environ.pop(name)
    try:
        yield
    finally:
        os.environ.update(hidden)


# --- Collective operations ---


def _connect():
    """Connect the processes, unless they are connected already."""
    if torch.distributed.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # A process may wait for others that train for days.
    torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=365))


def barrier():
    """Wait until all processes have reached this call."""
    if rank_and_count()[1] == 1:
        return
    _connect()
    # torch.distributed.barrier would use the GPUs where there are some. This sum is made by gloo
    # on every machine.
    torch.distributed.all_reduce(torch.zeros(1))


def largest(numbers):
    """The elementwise maximum of a list of whole numbers over all processes: a list of int."""
    if rank_and_count()[1] == 1:
        return list(numbers)
    _connect()
    maxima = torch.tensor(numbers)
    torch.distributed.all_reduce(maxima, torch.distributed.ReduceOp.MAX)
    return maxima.tolist()


def gather(value):
    """The values of a tensor (...) in all processes: (processes, ...), on the CPU."""
    own = value.detach().cpu()
    _, processes = rank_and_count()
    if processes == 1:
        return torch.stack([own])
    _connect()
    values = [torch.empty_like(own) for _ in range(processes)]
    torch.distributed.all_gather(values, own)
    return torch.stack(values)


def mean_(value):
    """Replace a tensor by its mean over all processes, in place, and return it."""
    _, processes = rank_and_count()
    if processes > 1:
        _connect()
        torch.distributed.all_reduce(value)
        value /= processes
    return value


# --- Models and noise ---


def data_parallel(model):
    """The model, with gradients that are the means over all processes."""
    if rank_and_count()[1] == 1:
        return model
    # static_graph is correct here, because every training step uses the same parameters.
    return torch.nn.parallel.DistributedDataParallel(model, static_graph=True)


# (rank, number of processes) of the process whose rows of the noise are drawn.
_noise_rows = (0, 1)


@contextlib.contextmanager
def noise_rows(rank, count):
    """Within this context, `normal_like` and `uniform_like` draw the noise for `count` processes.

    Each process draws all of it, from the same seed, and keeps its own rows. So `count` processes
    that train one model use the same noise as one process with `count` times the batch size.
    """
    global _noise_rows
    previous = _noise_rows
    _noise_rows = (rank, count)
    try:
        yield
    finally:
        _noise_rows = previous


def normal_like(x):
    """Standard normal noise of the shape, type and device of x (B, ...); see `noise_rows`."""
    return _draw_rows(torch.randn, x)


def uniform_like(x):
    """Uniform noise in [0, 1) of the shape, type and device of x (B, ...); see `noise_rows`."""
    return _draw_rows(torch.rand, x)


def _draw_rows(draw, x):
    """Draw the noise of all processes, and return the rows of this one."""
    rank, count = _noise_rows
    batch_size = len(x)
    noise = draw(count * batch_size, *x.shape[1:], dtype=x.dtype, device=x.device)
    return noise[rank * batch_size:(rank + 1) * batch_size]


# --- The end of a process ---


def lost_connection(error):
    """Whether this RuntimeError means that another process has ended."""
    if rank_and_count()[1] == 1:
        return False
    return re.search("connection (closed|reset)|broken pipe", str(error), re.IGNORECASE) is not None


def leave(status):
    """End this process with an exit status.

    The threads of torch.distributed can abort a process while Python shuts down. Hence one of
    several processes ends at once, without Python's shutdown.
    """
    if rank_and_count()[1] == 1:
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(status or 0)
