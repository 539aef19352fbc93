"""What a run leaves: the folder that its flags name, files that are whole or absent, and locks that keep a second process away
while they are made. First the names, then the files, then the locks. What is in the files is for training.py, report.py and
pictures.py to say.
"""
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import os
import platform
import sys
from pathlib import Path

import numpy as np
import torch

import common

# How and where, not what: they do not name a run.
WHERE_FLAGS = ("device", "data_dir", "out_dir", "checkpoint_seconds", "overwrite", "evaluate", "preset")


def what(f, data):
    """The flags that say what is computed, {name: value}, with the data set that was used (data may be None for a script
    that makes its own); not where or on what."""
    own, shared = common.own_and_shared(f)
    flags = {name: getattr(f, name) for name in own | shared if name not in WHERE_FLAGS}
    return flags | ({"dataset": data.name} if data and "dataset" in flags else {})


def changed(f, data):
    """The flags of `what` that are not at their default, where MNIST counts as the default data set."""
    defaults = what(type(f)(), data) | ({"dataset": "mnist"} if data else {})
    return {name: value for name, value in what(f, data).items() if value != defaults[name]}


def spell(flags):
    """{name: value} as a folder's name: "beta_1=0.1,seed=2"; cut, with a digest of the whole, where it is too long."""
    name = ",".join(f"{name}={value}" for name, value in flags.items()).replace("/", "_")
    return name if len(name) <= 200 else f"{name[:180]}~{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def run_dir(f, data):
    """Where a setting's files go: out_dir/<script>/<run>, the run named by its `changed` flags, "default" if there are none."""
    return Path(f.out_dir, common.script_name(f), spell(changed(f, data)) or "default")


def varying(settings, data):
    """The flags that differ between settings, but for the seed: {name: its values in order}."""
    rows = [what(f, d) for f, d in zip(settings, data)]
    values = {name: list(dict.fromkeys(row[name] for row in rows)) for name in rows[0] if name != "seed"}
    return {name: of for name, of in values.items() if len(of) > 1}


def caption_of(settings, data):
    """What a table or picture is of: script, data set, and the flags that all settings share."""
    shared = {name: value for name, value in changed(settings[0], data[0]).items()
              if name not in (*varying(settings, data), "seed", "dataset")}
    return f"{common.script_name(settings[0])} on {', '.join({d.name: None for d in data})} {spell(shared)}".strip()


def describe(f, data):
    """What every result file says of its run."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"script": common.script_name(f), "settings": what(f, data), "dataset": data.name if data else "synthetic",
            "device": common.device_name(common.device_of(f)), "versions": versions}


def write(path, save):
    """Let save(file) write a binary file that appears at path whole or not at all; its folder is made. Raises OSError."""
    path, content = Path(path), io.BytesIO()
    save(content)                                         # torch.save itself would hide that a disk is full
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def remove_unfinished(path):
    """Remove what a process that was killed while it wrote this file left beside it, not what one writes at this moment."""
    for beside in path.parent.glob(f".{path.name}.*"):
        try:
            os.kill(int(beside.suffix[1:]), 0)            # asks whether there is such a process
        except ProcessLookupError:
            beside.unlink(missing_ok=True)
        except (ValueError, OverflowError, PermissionError):
            pass                                          # not ours


def write_json(path, value):
    write(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def read_result(f, data, name, folder=None):
    """The contents of a finished run's file, or None if there is none of these very settings. In the folder of another run
    flags of the evaluation may differ."""
    try:
        result = json.loads(((folder or run_dir(f, data)) / name).read_text())
    except (OSError, ValueError):
        return None
    settings, wanted = result.get("settings"), what(f, data)
    if not settings:
        return None
    before = {field.name: field.metadata["before"] for field in dataclasses.fields(f) if field.metadata["before"] is not None}
    settings = what(type(f)(), data) | before | settings  # those of an earlier version may lack a flag that is new
    if folder:
        settings |= {field.name: wanted[field.name] for field in dataclasses.fields(f) if field.metadata["evaluation"]}
    return result if settings == wanted else None


_lock_files = {}                                          # of this process: closing one gives up all its locks


def lock(folders):
    """Keep other processes from the runs of these folders until `unlock`, after they are done with theirs.

    Each run is a byte, by its name's digest, of out_dir/.lock: one open file, however many runs; locked in one order, so
    that no two processes wait for each other.
    """
    for folder in sorted(folders):
        path = folder.parents[1] / ".lock"
        if path not in _lock_files:
            path.parent.mkdir(parents=True, exist_ok=True)
            _lock_files[path] = open(path, "ab")
        byte = int.from_bytes(hashlib.sha256(str(folder).encode()).digest()[:7], "big")
        try:
            fcntl.lockf(_lock_files[path], fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError as wrong:
            if wrong.errno not in (errno.EACCES, errno.EAGAIN):
                print(f"warning: no locks in {path.parent} ({wrong.strerror}): start no second process with the same runs",
                      file=sys.stderr)
                return
            print(f"waiting for another process that is at {folder}", file=sys.stderr)
            fcntl.lockf(_lock_files[path], fcntl.LOCK_EX, 1, byte)


def unlock():
    while _lock_files:
        _lock_files.popitem()[1].close()
