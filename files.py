"""The names of runs, and files that are whole or absent.

A run leaves training.json, model.pt, result.json, units.npz and pictures in the folder
<out_dir>/<script>/<run>. The name <run> lists the flags that are not at their default, as in
"beta_1=0.1,seed=2", or is "default". A file appears whole or not at all: it is written under a
hidden name beside its own, .<file>.<random digits>, and then renamed.

First come the names, then reading and writing. The contents of the files are the business of
training.py, report.py and pictures.py. In this module, `data` is a datasets.Data, or None for a
script that makes its own data.
"""
import contextlib
import dataclasses
import errno
import glob
import hashlib
import io
import json
import os
import platform
import re
import sys
import time
import uuid
from pathlib import Path

import common
import numpy as np
import torch

# Flags that say where and how a run is computed, and how it is shown. They do not change its
# result, so they are not part of its name.
LOCATION_FLAGS = (
    "device",
    "data_dir",
    "out_dir",
    "checkpoint_seconds",
    "overwrite",
    "columns",
    "evaluate",
    "preset",
)

# Files of a run that its scripts read again.
RUN_FILES = ("training.json", "model.pt", "result.json", "units.npz")

# The longest name of a folder, in bytes. File systems allow 255.
LONGEST_NAME = 200

# The age from which on an unfinished file belongs to a process that was killed. No process takes
# that long to write a file.
UNFINISHED_SECONDS = 3600

# Attempts to make a folder and a file in it. Another process may remove the folder while it is
# empty.
CREATE_ATTEMPTS = 10

# Pauses before further attempts to replace a file, in seconds. On Windows, a file that another
# process has opened cannot be replaced.
REPLACE_PAUSES = (0.05, 0.1, 0.2, 0.4)


# --- Names ---


def run_settings(f, data):
    """The flags that determine a run's result: {name: value}.

    "dataset" is the data set that was used, where --dataset may be "auto".
    """
    settings = {}
    for name in common.all_flags(f):
        if name not in LOCATION_FLAGS or name in f.data_flags:
            settings[name] = getattr(f, name)
    if data and "dataset" in settings:
        settings["dataset"] = data.name
    return settings


def changed_settings(f, data):
    """The `run_settings` that are not at their default. MNIST counts as the default data set."""
    defaults = run_settings(type(f)(), data)
    if data:
        defaults["dataset"] = "mnist"
    changed = {}
    for name, value in run_settings(f, data).items():
        if value != defaults[name]:
            changed[name] = value
    return changed


def spell(flags):
    """{name: value} as the name of a folder: "beta_1=0.1,seed=2".

    Characters that Windows refuses in names become "_". A name that is too long is cut, and ends
    with a digest of the whole name.
    """
    name = ",".join(f"{flag}={value}" for flag, value in flags.items())
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", name)
    # The names of files on the command line need not be valid Unicode.
    encoded = name.encode(errors="surrogatepass")
    if len(encoded) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:16]
    return f"{encoded[:LONGEST_NAME - 20].decode(errors='ignore')}~{digest}"


def run_dir(f, data):
    """The folder of a setting's files: <out_dir>/<script>/<run>."""
    run = spell(changed_settings(f, data)) or "default"
    return Path(f.out_dir, common.script_name(f), run)


def varying_flags(settings, data):
    """The flags, except the seed, that differ between settings: {name: its values, in order}."""
    all_settings = [run_settings(f, d) for f, d in zip(settings, data)]
    varying = {}
    for name in all_settings[0]:
        values = list(dict.fromkeys(row[name] for row in all_settings))
        if name != "seed" and len(values) > 1:
            varying[name] = values
    return varying


def caption(settings, data):
    """The title of a table or picture: the script, the data sets, and the flags in common."""
    left_out = {"seed", "dataset", *varying_flags(settings, data)}
    common_flags = {}
    for name, value in changed_settings(settings[0], data[0]).items():
        if name not in left_out:
            common_flags[name] = value
    names = ", ".join(dict.fromkeys(d.name for d in data))
    return f"{common.script_name(settings[0])} on {names} {spell(common_flags)}".strip()


def description(f, data):
    """The entries that every result file of a run begins with: a dict."""
    return {
        "script": common.script_name(f),
        "settings": run_settings(f, data),
        "dataset": data.name if data else "synthetic",
        "device": common.device_name(common.select_device(f)),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


# --- Writing ---


def make_run_dir(f, data):
    """Make a run's folder, and return it.

    Ends the program, naming --out_dir, if a file has the place of one of its folders, or a folder
    the place of one of RUN_FILES.
    """
    folder = run_dir(f, data)
    for path in (*reversed(folder.parents), folder):
        if os.path.exists(path) and not os.path.isdir(path):
            common.stop(f, f"--out_dir: got {f.out_dir!r}, but {path} is a file, wants a folder")
    for name in RUN_FILES:
        if os.path.isdir(folder / name):
            common.stop(
                f, f"--out_dir: got {f.out_dir!r}, but {folder / name} is a folder, wants a file"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        # `common.run` explains a full disk.
        if error.errno in common.FULL_DISK_ERRORS:
            raise
        common.stop(
            f, f"--out_dir: got {f.out_dir!r}, but {folder} cannot be made ({error.strerror})"
        )
    return folder


def write(path, save):
    """Let save(file) write a binary file, which appears at `path` whole or not at all.

    Makes the file's folder. Several processes may write the same file at the same time: the last
    one to finish wins. Raises OSError.
    """
    path = Path(path)
    # torch.save reports a full disk as a RuntimeError, so it writes to memory.
    content = io.BytesIO()
    save(content)

    remove_unfinished(path)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with _create(unfinished) as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        _replace(unfinished, path)
    except OSError as error:
        # The message names the file that was wanted, not the unfinished one.
        if error.filename in (None, str(unfinished)):
            error.filename = str(path)
        raise
    finally:
        # After an error the file may be there, or even its folder may be absent.
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _create(path):
    """Open a new binary file, and make its folder."""
    for _ in range(CREATE_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return open(path, "wb")
    return open(path, "wb")


def _replace(source, target):
    """os.replace, in several attempts while another process has the target open (Windows)."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    for pause in REPLACE_PAUSES:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(pause)
    os.replace(source, target)


def remove_unfinished(path):
    """Remove the unfinished files beside `path` that killed processes have left.

    An unfinished file counts as theirs when it is older than UNFINISHED_SECONDS.
    """
    path = Path(path)
    for unfinished in path.parent.glob(f".{glob.escape(path.name)}.*"):
        # Another process may finish or remove it at any moment.
        with contextlib.suppress(OSError):
            if time.time() - unfinished.stat().st_mtime > UNFINISHED_SECONDS:
                unfinished.unlink()


def write_text(path, text):
    """Write a text file in UTF-8, whole or not at all. Raises OSError."""
    write(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path, value):
    """Write a JSON file, whole or not at all. Raises OSError."""
    write_text(path, json.dumps(value, indent=1))


# --- Reading ---


def read_json(path):
    """The JSON object in a file, as a dict. None if there is no such file.

    A file that holds no JSON object also gives None, and one line on stderr.
    """
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        print(f"{path} is ignored, since it cannot be read: {error}", file=sys.stderr)
        return None
    if not isinstance(value, dict):
        print(f"{path} is ignored, since it holds no JSON object", file=sys.stderr)
        return None
    return value


def read_matching(f, data, name, folder=None):
    """The contents of a run's JSON file, if its settings are f's: a dict, else None.

    By default the file is in f's own folder. In the folder of another run, flags that affect the
    evaluation only may differ.
    """
    result = read_json((folder or run_dir(f, data)) / name)
    if result is None:
        return None
    settings = result.get("settings")
    if not isinstance(settings, dict):
        return None

    settings = dict(settings)
    wanted = run_settings(f, data)
    if folder:
        for field in dataclasses.fields(f):
            if field.metadata["evaluation"]:
                settings[field.name] = wanted[field.name]
    return result if settings == wanted else None
