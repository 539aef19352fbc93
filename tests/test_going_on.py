"""Nothing is lost: killed, interrupted, beside another process, on a full disk or dealt over processes, the same numbers."""
import itertools
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import unittest
from pathlib import Path

import common
import pictures
import training
from tests import small
from tests.small import ROOT


def child(argv, output, file_size=None, die_at=None, counted=None):
    """Run MNIST_CVAE_Relu.py as from the command line, with its output in a file, in a child of small.FORKS.

    It draws no pictures, which take most of the time and are not compared, but where a file_size limits them. With die_at or
    counted it counts moments: the training's steps, each tenth of which then leaves a checkpoint, and what it does to files. It
    kills itself just before moment die_at; counted is a file to write the number of all moments to.
    """
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    else:
        pictures.save_figure = lambda *args: None
    if die_at or counted:
        at_moments(die_at, counted)
    small.as_command("MNIST_CVAE_Relu.py", argv, ".", output, output)


def at_moments(die_at, counted):
    moments, steps = itertools.count(1), itertools.count(1)

    def before(function):
        def wrapped(*args, **kwargs):
            moment = next(moments)
            if moment == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if counted:
                counted.write_text(str(moment))
            return function(*args, **kwargs)
        return wrapped

    training.Training.record = before(training.Training.record)
    for module, name in ((os, "fsync"), (os, "replace"), (Path, "unlink"), (Path, "rmdir")):
        setattr(module, name, before(getattr(module, name)))
    training.Checkpoint.due = lambda checkpoint, seconds: next(steps) % 10 == 0


def without_seconds(value):
    """A result file's content but for what the clock says."""
    return {name: of for name, of in value.items() if name != "seconds"}


class Processes(small.WithMnist):
    def argv(self, out_dir, *more):
        return ["--data_dir", self.folder / "data", "--out_dir", self.folder / out_dir, "--num_samples", 20, "--device", "cpu",
                "--num_epochs", 100, "--beta", "0.2,1", "--checkpoint_seconds", 0.05, *more]

    def start(self, out_dir, *more, **limits):
        process = small.FORKS.Process(target=child, args=(self.argv(out_dir, *more), self.folder / f"{out_dir}.log"), kwargs=limits)
        process.start()
        self.addCleanup(process.kill)
        return process

    def log(self, out_dir):
        path = self.folder / f"{out_dir}.log"
        return path.read_text() if path.exists() else ""

    def until(self, out_dir, text, seconds=60):
        """Wait until the process has said so."""
        end = time.monotonic() + seconds
        while text not in self.log(out_dir):
            self.assertLess(time.monotonic(), end, self.log(out_dir))
            time.sleep(0.01)

    def run_to_its_end(self, out_dir, *more, status=0, **limits):
        process = self.start(out_dir, *more, **limits)
        process.join(120)
        self.assertEqual(process.exitcode, status, self.log(out_dir))

    def left(self, out_dir):
        """{path: content} of the results, but for seconds."""
        folder = self.folder / out_dir / "MNIST_CVAE_Relu"
        self.assertFalse((folder / "checkpoints").exists())
        self.assertEqual([path for path in folder.rglob(".*")], [])
        return {str(path.relative_to(folder)): without_seconds(json.loads(path.read_text()))
                for path in folder.rglob("*.json")}

    @classmethod
    def undisturbed(cls, case):
        """What a run that nobody disturbs leaves; made once."""
        if not hasattr(cls, "_undisturbed"):
            case.run_to_its_end("undisturbed")
            cls._undisturbed = case.left("undisturbed")
            assert len(cls._undisturbed) == 4, cls._undisturbed.keys()
        return cls._undisturbed


class Killed(Processes):
    def test_at_twenty_random_moments(self):
        """SIGKILL, and the same command again; as often as a run ends before its kill, its results are compared."""
        expected, counted = self.undisturbed(self), self.folder / "moments"
        self.run_to_its_end("counted", counted=counted)
        self.assertEqual(self.left("counted"), expected)
        draw, kills, runs, went_on, moments = random.Random(1), 0, 0, 0, int(counted.read_text())
        self.assertGreater(moments, 200)                      # a hundred epochs of two steps, and the files
        while True:
            process = self.start(f"killed_{runs}", die_at=draw.randint(1, moments) if kills < 20 else moments + 1)
            process.join(120)
            if process.exitcode == -signal.SIGKILL:
                kills += 1
                continue
            self.assertEqual(process.exitcode, 0, self.log(f"killed_{runs}"))
            self.assertEqual(self.left(f"killed_{runs}"), expected)
            went_on += self.log(f"killed_{runs}").count("going on after ")
            runs += 1
            if kills == 20:
                break
        self.assertGreater(went_on, 10)                       # a kill before the first checkpoint leaves nothing to go on from

    def test_by_sigint_and_sigterm(self):
        """A checkpoint first, one line, the signal's exit status; then on from there."""
        expected = self.undisturbed(self)
        for number in (signal.SIGINT, signal.SIGTERM):
            name = f"stopped_{number}"
            process = self.start(name, "--checkpoint_seconds", 1e6)
            self.until(name, "training 2 settings: epoch")
            time.sleep(0.3)
            os.kill(process.pid, number)
            process.join(30)
            self.assertEqual(process.exitcode, 128 + number)
            self.assertRegex(self.log(name).strip().split("\n")[-1], "^interrupted")
            self.assertNotIn("Traceback", self.log(name))
            [checkpoint] = (self.folder / name / "MNIST_CVAE_Relu" / "checkpoints").iterdir()
            self.run_to_its_end(name)
            self.assertIn(f", from {checkpoint}", self.log(name))
            self.assertEqual(self.left(name), expected)

    def test_beside_another_process(self):
        """The second waits, says so, and shows what the first has made."""
        expected = self.undisturbed(self)
        first = self.start("beside")
        self.until("beside", "training 2 settings: epoch")
        second = self.start("beside")
        for process in (first, second):
            process.join(120)
            self.assertEqual(process.exitcode, 0, self.log("beside"))
        self.assertEqual(self.left("beside"), expected)
        log = self.log("beside")
        self.assertEqual((log.count("waiting for another process"), log.count("already trained")), (1, 2))
        self.assertEqual(log.count("epoch 100/100"), 1)       # trained once

    def test_a_full_disk(self):
        """A file that cannot be written ends with one line; with room again it goes on."""
        expected = self.undisturbed(self)
        for size in (20_000, 400_000):                        # neither checkpoint nor result; no picture
            name = f"full_{size}"
            self.run_to_its_end(name, status=1, file_size=size)
            log = self.log(name)
            self.assertNotIn("Traceback", log)
            self.assertIn("could not be written", log.strip().split("\n")[-1])
            self.run_to_its_end(name)
            self.assertEqual(self.left(name), expected)


def prints_to_nobody(err):
    nobody, stdout = os.pipe()
    os.close(nobody)
    os.dup2(stdout, 1)
    with open(err, "w") as file:
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", closefd=False)
    common.run(lambda: print("x" * 10**6))


class Unread(small.InFolder):
    def test_a_closed_stdout(self):
        """As of `| head -1`: no traceback, and the status that a shell gives to what a signal ended."""
        process = small.FORKS.Process(target=prints_to_nobody, args=(self.folder / "err",))
        process.start()
        self.assertEqual(small.ended([process]), [128 + signal.SIGPIPE])
        self.assertEqual((self.folder / "err").read_text(), "")


class Dealt(small.InFolder):
    """Over processes, by torchrun."""

    def setUp(self):
        super().setUp()
        small.write_mnist(self.folder / "data")

    def argv(self, out_dir, more):
        return ["--data_dir", "data", "--out_dir", out_dir, "--d_hidden", "32", "--num_samples", "20", "--device", "cpu",
                "--beta_1", "0.1,1,3", "--beta_2", "0.5,2", *map(str, more)]

    def start(self, out_dir, *more):
        """Two processes."""
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(ROOT / "MNIST_HVAE_Relu.py"),
             *self.argv(out_dir, more)], cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})

    def alone(self, out_dir, *more):
        """One process, to its end; what it printed."""
        out, err = self.folder / f"{out_dir}.out", self.folder / f"{out_dir}.err"
        process = small.FORKS.Process(target=small.as_command, args=("MNIST_HVAE_Relu.py", self.argv(out_dir, more), self.folder, out, err))
        process.start()
        process.join(120)
        self.assertEqual(process.exitcode, 0, err.read_text())
        return out.read_text()

    def test_over_two_processes(self):
        """The table of one process; then one of two killed midway, and the same command: every row, none trained twice."""
        table, dealt = self.alone("alone", "--num_epochs", 3), self.start("dealt", "--num_epochs", 3)
        of_two, err = dealt.communicate(timeout=120)
        self.assertEqual(dealt.returncode, 0, err)
        self.assertEqual(of_two, table)
        self.assertIn("process 0: training 3 settings", err)
        self.assertIn("process 1: training 3 settings", err)
        self.assertEqual(len(list((self.folder / "dealt").rglob("result.json"))), 6)

        # Every second setting, those with beta_2 = 2, is process 1's; process 0's are finished beforehand.
        self.alone("killed", "--num_epochs", 100, "--beta_2", "0.5")
        argv = self.argv("killed", ["--num_epochs", 100, "--checkpoint_seconds", 0.05])
        both, outs, errs = small.two_processes(self, "MNIST_HVAE_Relu.py", argv, self.folder, "killed")
        while not list((self.folder / "killed" / "MNIST_HVAE_Relu").glob("checkpoints/*.pt")):
            self.assertIsNone(both[1].exitcode)
            time.sleep(0.01)
        both[1].kill()
        self.assertEqual(small.ended(both), [1, -signal.SIGKILL])
        self.assertEqual(outs[0].read_text(), "")
        self.assertIn("another process has ended; what was finished stays", errs[0].read_text())
        self.assertNotIn("Traceback", errs[0].read_text())
        both, outs, errs = small.two_processes(self, "MNIST_HVAE_Relu.py", argv, self.folder, "again")
        self.assertEqual(small.ended(both), [0, 0])
        err = "".join(path.read_text() for path in errs)
        self.assertEqual(err.count("already trained"), 3)
        self.assertIn("going on after ", err)
        self.assertEqual(len(outs[0].read_text().strip().split("\n\n")[0].split("\n")), 2 + 6)

    def test_many_processes_end_at_once(self):
        """With their output and status, but not torn down: what is left of torch.distributed could abort them."""
        code = ("import atexit, common; atexit.register(print, 'torn down'); "
                "common.run(lambda: (common.meet(), print('met'), 3)[2])")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {
            "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for rank in (0, 1)]
        for process in both:
            out, _ = process.communicate(timeout=120)
            self.assertEqual((process.returncode, out), (3, "met\n"))


if __name__ == "__main__":
    unittest.main()
