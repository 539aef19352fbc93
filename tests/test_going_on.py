"""After any end of a run, the same command goes on and leaves the same numbers.

The runs here are killed, interrupted, disturbed by the same command in another process, stopped by
a full disk, or shared by several processes.
"""
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import unittest
from pathlib import Path

import common
import torch

import files
import pictures
import training
from tests import small

WINDOWS = os.name == "nt"

# The exit status that a shell gives to a program whose output nobody reads, 128 + SIGPIPE.
CLOSED_OUTPUT = 141


def child(argv, out, err, file_size=None, die_at=None, counted=None, unfinished_seconds=None):
    """Run MNIST_CVAE_Relu.py as from the command line, in a child process of small.CHILDREN.

    file_size is the limit for the size of files, in bytes. Only with it pictures are drawn. They
    take most of the time, and they are not compared. With die_at or counted, the child counts
    moments (see `count_moments`). unfinished_seconds is as files.UNFINISHED_SECONDS.
    """
    if file_size:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    else:
        pictures.save_figure = lambda *args, **kwargs: None
    if unfinished_seconds is not None:
        files.UNFINISHED_SECONDS = unfinished_seconds
    if die_at or counted:
        count_moments(die_at, counted)
    small.as_command("MNIST_CVAE_Relu.py", argv, ".", out, err)


def count_moments(die_at, counted):
    """Count the training's steps and operations on files, and leave a checkpoint each ten steps.

    The process kills itself just before moment die_at. counted is a file, to which it writes the
    number of moments so far.
    """
    moments = itertools.count(1)
    steps = itertools.count(1)

    def with_moment(function):
        def wrapped(*args, **kwargs):
            moment = next(moments)
            if moment == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if counted:
                counted.write_text(str(moment))
            return function(*args, **kwargs)
        return wrapped

    training.Training.record = with_moment(training.Training.record)
    for place, name in ((os, "fsync"), (os, "replace"), (Path, "unlink"), (Path, "rmdir")):
        setattr(place, name, with_moment(getattr(place, name)))
    training.Checkpoint.due = lambda checkpoint, seconds: next(steps) % 10 == 0


def digest_of_weights(path):
    """A digest of the names, shapes and bits of the weights in a model.pt."""
    digest = hashlib.sha256()
    for name, value in torch.load(path, weights_only=True).items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


class Processes(small.WithMnist):
    def argv(self, out_dir, *more):
        return [
            *("--data_dir", self.folder / "data"),
            *("--out_dir", self.folder / out_dir),
            *("--num_samples", 20),
            *("--device", "cpu"),
            *("--num_epochs", 100),
            *("--beta", "0.2,1"),
            *("--checkpoint_seconds", 0.05),
            *more,
        ]

    def start(self, out_dir, *more, stdout=None, **limits):
        """Start a `child`. Its log is beside its folder. stdout goes there, or to another file."""
        log = self.folder / f"{out_dir}.log"
        process = small.CHILDREN.Process(
            target=child, args=(self.argv(out_dir, *more), stdout or log, log), kwargs=limits
        )
        process.start()
        self.addCleanup(process.kill)
        return process

    def log(self, out_dir):
        path = self.folder / f"{out_dir}.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait_for(self, out_dir, text, seconds=60):
        """Wait until the process has written this text to its log."""
        end = time.monotonic() + seconds
        while text not in self.log(out_dir):
            self.assertLess(time.monotonic(), end, self.log(out_dir))
            time.sleep(0.01)

    def run_to_its_end(self, out_dir, *more, status=0, **limits):
        process = self.start(out_dir, *more, **limits)
        process.join(120)
        self.assertEqual(process.exitcode, status, self.log(out_dir))

    def left(self, out_dir):
        """{path: content} of the results: JSON without the seconds, and a digest of weights.

        Checks that no checkpoint and no unfinished file is left.
        """
        folder = self.folder / out_dir / "MNIST_CVAE_Relu"
        self.assertFalse((folder / "checkpoints").exists())
        self.assertEqual(list(folder.rglob(".*")), [])
        contents = {}
        for path in folder.rglob("*.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            content.pop("seconds", None)
            contents[str(path.relative_to(folder))] = content
        for path in folder.rglob("model.pt"):
            contents[str(path.relative_to(folder))] = digest_of_weights(path)
        return contents

    @classmethod
    def undisturbed(cls, case):
        """What a run that nobody disturbs leaves. It is made once."""
        if not hasattr(cls, "_undisturbed"):
            case.run_to_its_end("undisturbed")
            cls._undisturbed = case.left("undisturbed")
            # Two settings: training.json, result.json and model.pt of each.
            case.assertEqual(len(cls._undisturbed), 6, cls._undisturbed.keys())
        return cls._undisturbed


class Killed(Processes):
    @unittest.skipIf(WINDOWS, "there is no SIGKILL")
    def test_at_twenty_random_moments(self):
        """SIGKILL, and the same command again, until twenty kills are done.

        Each time a run ends before its kill, its results are compared.
        """
        # 1. The number of moments: forty epochs of two steps, and the files.
        epochs = ("--num_epochs", 40)
        counted = self.folder / "moments"
        self.run_to_its_end("counted", *epochs, counted=counted)
        expected = self.left("counted")
        self.assertEqual(len(expected), 6, expected.keys())
        moments = int(counted.read_text())
        self.assertGreater(moments, 80)

        # 2. Twenty kills. The last command is not killed. A file that a kill left unfinished would
        # stay for an hour, but these commands remove it at once.
        draw = random.Random(1)
        kills = 0
        runs = 0
        runs_that_went_on = 0
        while True:
            out_dir = f"killed_{runs}"
            die_at = draw.randint(1, moments) if kills < 20 else moments + 1
            process = self.start(out_dir, *epochs, die_at=die_at, unfinished_seconds=0)
            process.join(120)
            if process.exitcode == -signal.SIGKILL:
                kills += 1
                continue
            self.assertEqual(process.exitcode, 0, self.log(out_dir))
            self.assertEqual(self.left(out_dir), expected)
            runs_that_went_on += self.log(out_dir).count("resuming after ")
            runs += 1
            if kills == 20:
                break

        # A kill before the first checkpoint leaves nothing to go on from.
        self.assertGreater(runs_that_went_on, 10)

    @unittest.skipIf(WINDOWS, "signals to another process end it there")
    def test_by_sigint_and_sigterm(self):
        """A checkpoint first, one line, the signal's exit status; then on from there."""
        expected = self.undisturbed(self)
        for number in (signal.SIGINT, signal.SIGTERM):
            name = f"stopped_{number}"
            process = self.start(name, "--checkpoint_seconds", 1e6)
            self.wait_for(name, "training 2 settings: epoch")
            time.sleep(0.3)
            os.kill(process.pid, number)
            process.join(30)
            self.assertEqual(process.exitcode, 128 + number)
            self.assertRegex(self.log(name).strip().split("\n")[-1], "^interrupted")
            self.assertNotIn("Traceback", self.log(name))
            [checkpoint] = (self.folder / name / "MNIST_CVAE_Relu" / "checkpoints").iterdir()
            self.run_to_its_end(name)
            self.assertIn(f"from the checkpoint {checkpoint}", self.log(name))
            self.assertEqual(self.left(name), expected)

    @unittest.skipIf(WINDOWS, "there is no limit for the size of files")
    def test_a_full_disk(self):
        """A file that cannot be written ends with one line; with room again it goes on."""
        expected = self.undisturbed(self)
        # Too small for the checkpoint and the results, and too small for a picture.
        for size in (20_000, 400_000):
            name = f"full_{size}"
            self.run_to_its_end(name, status=1, file_size=size)
            log = self.log(name)
            self.assertNotIn("Traceback", log)
            self.assertIn("could not be written", log.strip().split("\n")[-1])
            self.run_to_its_end(name)
            self.assertEqual(self.left(name), expected)


class Beside(Processes):
    """The same command in several processes at once. Each may train, and all files are whole."""

    def test_started_at_once(self):
        expected = self.undisturbed(self)
        outs = [self.folder / f"at_once.{k}.out" for k in range(2)]
        pair = [self.start("at_once", stdout=out) for out in outs]
        self.assertEqual(small.exit_statuses(pair), [0, 0], self.log("at_once"))
        self.assertEqual(self.left("at_once"), expected)
        self.assertNotIn("Traceback", self.log("at_once"))

        # Both print the results.
        first, second = [out.read_text(encoding="utf-8") for out in outs]
        self.assertEqual(first, second)
        self.assertIn("log_px", first)

    def test_started_in_the_middle(self):
        """The second one may go on from a checkpoint of the first, while the first goes on."""
        expected = self.undisturbed(self)
        first = self.start("beside")
        self.wait_for("beside", "training 2 settings: epoch")
        second = self.start("beside")
        self.assertEqual(small.exit_statuses([first, second]), [0, 0], self.log("beside"))
        self.assertEqual(self.left("beside"), expected)
        self.assertNotIn("Traceback", self.log("beside"))


def print_to_nobody(err):
    """Print much to a pipe that nobody reads. stderr goes to a file."""
    reading_end, stdout = os.pipe()
    os.close(reading_end)
    os.dup2(stdout, 1)
    with open(err, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", closefd=False)
    common.run(lambda: print("x" * 10**6))


class Unread(small.InFolder):
    def test_a_closed_stdout(self):
        """As in `| head -1`: no traceback, and the status of a shell for a closed output."""
        err = self.folder / "err"
        process = small.CHILDREN.Process(target=print_to_nobody, args=(err,))
        process.start()
        self.assertEqual(small.exit_statuses([process]), [CLOSED_OUTPUT])
        self.assertEqual(err.read_text(encoding="utf-8"), "")


class Shared(small.InFolder):
    """Settings that several processes share, as torchrun starts them."""

    def setUp(self):
        super().setUp()
        small.write_mnist(self.folder / "data")

    def argv(self, out_dir, more):
        argv = [
            *("--data_dir", "data"),
            *("--out_dir", out_dir),
            *("--d_hidden", "32"),
            *("--num_samples", "20"),
            *("--device", "cpu"),
            *("--beta_1", "0.1,3"),
            *("--beta_2", "0.5,2"),
        ]
        return argv + [str(word) for word in more]

    def start_by_torchrun(self, out_dir, *more):
        """Two processes, started by torchrun itself. They draw no pictures, to save time."""
        program = self.folder / "without_pictures.py"
        program.write_text(
            "import common\n"
            "import MNIST_HVAE_Relu\n"
            "import pictures\n"
            "pictures.draw_run = lambda *args: None\n"
            "pictures.draw_grid = lambda *args: None\n"
            "common.run(MNIST_HVAE_Relu.main)\n",
            encoding="utf-8",
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        command += ["--standalone", str(program)]
        variables = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(small.ROOT),
            "PYTHONUNBUFFERED": "1",
        }
        return subprocess.Popen(
            command + self.argv(out_dir, more),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=os.environ | variables,
        )

    def alone(self, out_dir, *more):
        """One process, to its end. Returns what it printed."""
        out = self.folder / f"{out_dir}.out"
        err = self.folder / f"{out_dir}.err"
        process = small.start_command(
            "MNIST_HVAE_Relu.py",
            self.argv(out_dir, more),
            self.folder,
            out,
            err,
            draws_pictures=False,
        )
        self.assertEqual(small.exit_statuses([process]), [0], err.read_text(encoding="utf-8"))
        return out.read_text(encoding="utf-8")

    def test_the_table_of_one_process(self):
        """Two processes print it, too, and each trains half of the settings."""
        table = self.alone("alone", "--num_epochs", 3)
        torchrun = self.start_by_torchrun("shared", "--num_epochs", 3)
        out, err = torchrun.communicate(timeout=120)
        self.assertEqual(torchrun.returncode, 0, err)
        self.assertEqual(out, table)
        self.assertIn("process 0: training 2 settings", err)
        self.assertIn("process 1: training 2 settings", err)
        self.assertEqual(len(list((self.folder / "shared").rglob("result.json"))), 4)

    @unittest.skipIf(WINDOWS, "there is no SIGKILL")
    def test_one_of_two_processes_is_killed(self):
        """The same command again shows every row, and trains none twice."""
        # 1. Process 1 has every second setting, those with beta_2 = 2. Those of process 0 are
        # finished beforehand.
        self.alone("killed", "--num_epochs", 100, "--beta_2", "0.5")
        argv = self.argv("killed", ["--num_epochs", 100, "--checkpoint_seconds", 0.05])

        # 2. Process 1 is killed after a checkpoint.
        pair, outs, errs = small.two_processes(
            self, "MNIST_HVAE_Relu.py", argv, self.folder, "killed"
        )
        script_folder = self.folder / "killed" / "MNIST_HVAE_Relu"
        while not list(script_folder.glob("checkpoints/*.pt")):
            self.assertIsNone(pair[1].exitcode)
            time.sleep(0.01)
        pair[1].kill()
        self.assertEqual(small.exit_statuses(pair), [1, -signal.SIGKILL])
        self.assertEqual(outs[0].read_text(encoding="utf-8"), "")
        err = errs[0].read_text(encoding="utf-8")
        self.assertIn("another process has ended; finished work is kept", err)
        self.assertNotIn("Traceback", err)

        # 3. The same command again.
        pair, outs, errs = small.two_processes(
            self, "MNIST_HVAE_Relu.py", argv, self.folder, "again"
        )
        self.assertEqual(small.exit_statuses(pair), [0, 0])
        err = "".join(path.read_text(encoding="utf-8") for path in errs)
        self.assertEqual(err.count("already trained"), 2)
        self.assertIn("resuming after ", err)
        table = outs[0].read_text(encoding="utf-8").strip().split("\n\n")[0]
        # A caption, the head, four settings, and the line about more columns.
        self.assertEqual(len(table.split("\n")), 2 + 4 + 1)

    def test_many_processes_end_at_once(self):
        """With their output and status, but without Python's shutdown.

        What is left of torch.distributed could abort them there.
        """
        code = (
            "import atexit, common, processes\n"
            "atexit.register(print, 'shut down')\n"
            "def main():\n"
            "    processes.barrier()\n"
            "    print('met')\n"
            "    return 3\n"
            "common.run(main)\n"
        )
        port = str(small.free_port())
        pair = []
        for rank in (0, 1):
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=small.ROOT,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | variables,
            )
            pair.append(process)
        for process in pair:
            out, _ = process.communicate(timeout=120)
            self.assertEqual((process.returncode, out), (3, "met\n"))


if __name__ == "__main__":
    unittest.main()
