"""Nothing is lost: killed, interrupted, beside another process, on a full disk or dealt over processes, the same numbers."""
import contextlib
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import torch

import common
import MNIST_CVAE_Relu
import MNIST_HVAE_Relu
import Synthetic_CVAE_Relu_correlation
from tests import small
from tests.small import ROOT

# A process that has imported everything and started no thread, to fork from: a child starts in milliseconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "matplotlib.figure", "torchvision.utils", "common", "MNIST_CVAE_Relu"])


def child(argv, output, file_size=None):
    """Run MNIST_CVAE_Relu.py as from the command line, with its output in a file."""
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = ["MNIST_CVAE_Relu.py", *map(str, argv)]
    common.run(MNIST_CVAE_Relu.main)


def without_seconds(value):
    """A result file's content but for what the clock says."""
    return {name: of for name, of in value.items() if name != "seconds"}


class Processes(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        small.write_mnist(cls.folder / "data")

    def argv(self, out_dir, *more):
        return ["--data_dir", self.folder / "data", "--out_dir", self.folder / out_dir, "--num_samples", 20, "--device", "cpu",
                "--num_epochs", 100, "--beta", "0.2,1", "--checkpoint_seconds", 0.05, *more]

    def start(self, out_dir, *more, file_size=None):
        process = FORKS.Process(target=child, args=(self.argv(out_dir, *more), self.folder / f"{out_dir}.log", file_size))
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
        """What a run that nobody disturbs leaves, and how long it takes; made once."""
        if not hasattr(cls, "_undisturbed"):
            start = time.monotonic()
            case.run_to_its_end("undisturbed")
            cls._undisturbed = case.left("undisturbed"), time.monotonic() - start
            assert len(cls._undisturbed[0]) == 4, cls._undisturbed[0].keys()
        return cls._undisturbed


class Killed(Processes):
    def test_at_twenty_random_moments(self):
        """SIGKILL, and the same command again; as often as a run ends before its kill, its results are compared."""
        expected, duration = self.undisturbed(self)
        moments, kills, runs, went_on = random.Random(1), 0, 0, 0
        while kills < 20:
            process = self.start(f"killed_{runs}")
            process.join(moments.uniform(0.0, 0.9 * duration))
            if process.is_alive():
                process.kill()
                kills += 1
            process.join()
            if process.exitcode != -signal.SIGKILL:
                self.assertEqual(process.exitcode, 0, self.log(f"killed_{runs}"))
                self.assertEqual(self.left(f"killed_{runs}"), expected)
                went_on += self.log(f"killed_{runs}").count("going on in epoch")
                runs += 1
        self.run_to_its_end(f"killed_{runs}")
        self.assertEqual(self.left(f"killed_{runs}"), expected)
        went_on += self.log(f"killed_{runs}").count("going on in epoch")
        self.assertGreater(went_on, 3)                        # kills while it drew or started have nothing to go on from

    def test_by_sigint_and_sigterm(self):
        """A checkpoint first, one line, the signal's exit status; then on from there."""
        expected, _ = self.undisturbed(self)
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
        expected, _ = self.undisturbed(self)
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
        expected, _ = self.undisturbed(self)
        for size in (20_000, 400_000):                        # neither checkpoint nor result; no picture
            name = f"full_{size}"
            self.run_to_its_end(name, status=1, file_size=size)
            log = self.log(name)
            self.assertNotIn("Traceback", log)
            self.assertIn("could not be written", log.strip().split("\n")[-1])
            self.run_to_its_end(name)
            self.assertEqual(self.left(name), expected)


class Dealt(unittest.TestCase):
    """Over processes, by torchrun."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        small.write_mnist(self.folder / "data")

    def start(self, out_dir, processes, *more):
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] if processes else []
        return subprocess.Popen(
            [sys.executable, *launcher, str(small.ROOT / "MNIST_HVAE_Relu.py"), "--data_dir", "data", "--out_dir", out_dir,
             "--d_hidden", "32", "--num_samples", "20", "--device", "cpu", "--beta_1", "0.1,1,3", "--beta_2", "0.5,2",
             *map(str, more)],
            cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})

    def test_over_two_processes(self):
        """The table of one process; then one of two killed midway, and the same command: every row, none trained twice."""
        alone = self.start("alone", 0, "--num_epochs", 3)
        table, err = alone.communicate(timeout=120)
        self.assertEqual(alone.returncode, 0, err)
        dealt = self.start("dealt", 2, "--num_epochs", 3)
        of_two, err = dealt.communicate(timeout=120)
        self.assertEqual(dealt.returncode, 0, err)
        self.assertEqual(of_two, table)
        self.assertIn("process 0: training 3 settings", err)
        self.assertIn("process 1: training 3 settings", err)
        self.assertEqual(len(list((self.folder / "dealt").rglob("result.json"))), 6)

        # Every second setting, those with beta_2 = 2, is process 1's; process 0's are finished beforehand.
        short = self.start("killed", 0, "--num_epochs", 200, "--beta_2", "0.5")
        _, err = short.communicate(timeout=120)
        self.assertEqual(short.returncode, 0, err)
        killed = self.start("killed", 2, "--num_epochs", 200, "--checkpoint_seconds", 0.05)
        while not list((self.folder / "killed" / "MNIST_HVAE_Relu").glob("checkpoints/*.pt")):
            self.assertIsNone(killed.poll())
            time.sleep(0.01)
        os.kill(self.rank(1, killed.pid), signal.SIGKILL)
        out, err = killed.communicate(timeout=120)
        self.assertNotEqual(killed.returncode, 0)
        self.assertEqual(out, "")
        again = self.start("killed", 2, "--num_epochs", 200)
        out, err = again.communicate(timeout=120)
        self.assertEqual(again.returncode, 0, err)
        self.assertEqual(err.count("already trained"), 3)
        self.assertIn("going on in epoch", err)
        self.assertEqual(len(out.strip().split("\n\n")[0].split("\n")), 2 + 6)

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

    def rank(self, number, parent):
        """The process id of one of torchrun's processes."""
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"\0RANK={number}\0".encode() in b"\0" + (path / "environ").read_bytes() \
                        and int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                    return int(path.name)
        self.fail(f"no process {number}")


class Checkpoints(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(common.unlock)
        self.folder = Path(folder.name)

    def settings(self, count, **values):
        return [MNIST_HVAE_Relu.Flags(d_hidden=8, d_1=3, d_2=2, batch_size=32, num_epochs=3, num_samples=0, device="cpu",
                                      out_dir=str(self.folder), beta_1=0.5 + k, **values) for k in range(count)]

    def fit(self, settings, data, stop_after=None):
        """common.fit, stopped after so many checkpoints, which are written at every step; the models and stderr."""
        written, write = [], common.Checkpoint.write

        def counted(checkpoint, state):
            write(checkpoint, state)
            written.append(checkpoint.path)
            if len(written) == stop_after:
                raise SystemExit

        with mock.patch("common.Checkpoint.write", counted), contextlib.redirect_stderr(io.StringIO()) as err:
            with contextlib.suppress(SystemExit):
                settings = [dataclasses.replace(f, checkpoint_seconds=0.0) for f in settings]
                return common.fit(MNIST_HVAE_Relu.HVAE, settings, [data] * len(settings)), err.getvalue()
        return written[-1], err.getvalue()

    def curves(self, f, data):
        return {name: of for name, of in common.read_result(f, data, "training.json").items() if name != "seconds"}

    def test_same_numbers_from_every_place(self):
        """Stopped in an epoch, before its small last batch, at its end and after all: bit by bit as if not."""
        data = small.digit_data(100, 4, torch.float32)        # four batches an epoch, the last of 4 examples
        for count, schedule in ((1, "constant"), (1, "cosine"), (3, "constant")):
            settings = self.settings(count, lr_schedule=schedule, overwrite=True)
            expected, _ = self.fit(settings, data)
            curves = [self.curves(f, data) for f in settings]
            for stop_after in (1, 3, 4, 6, 12) + ((13,) if count > 1 else ()):
                self.fit(settings, data, stop_after)
                found, err = self.fit(settings, data)
                self.assertIn("going on in epoch", err)
                for a, b in zip(expected, found):
                    for name, value in a.state_dict().items():
                        self.assertTrue(torch.equal(value, b.state_dict()[name]), (count, stop_after, name))
                self.assertEqual([self.curves(f, data) for f in settings], curves)
                self.assertFalse((self.folder / "MNIST_HVAE_Relu" / "checkpoints").exists())

    def test_killed_between_the_results_of_a_group(self):
        """The finished ones stay as they are, the others come from the checkpoint of all."""
        data, settings = small.digit_data(100, 4, torch.float32), self.settings(3)
        expected, _ = self.fit(settings, data)
        again, files = [dataclasses.replace(f, seed=1) for f in settings], []
        real = common.write_json

        def second_fails(path, value):
            files.append(path)
            if len(files) == 2:
                raise SystemExit
            real(path, value)

        with mock.patch("common.write_json", second_fails):
            self.fit(again, data)
        undisturbed = [dataclasses.replace(f, out_dir=f"{self.folder}/other") for f in again]
        expected, _ = self.fit(undisturbed, data)
        with mock.patch("common.train", wraps=common.train) as spy:
            found, err = self.fit(again, data)
        self.assertEqual(len(spy.call_args.args[1]), 3)
        self.assertIn("going on in epoch 4 of 3", err)
        self.assertEqual(err.count("already trained"), 1)
        for a, b in zip(expected, found):
            for name, value in a.state_dict().items():
                self.assertTrue(torch.equal(value, b.state_dict()[name]))

    def test_refused(self):
        """Truncated, of another version, or of other settings: named, and training starts over."""
        data, [f, other] = small.digit_data(100, 4, torch.float32), self.settings(2)
        path, _ = self.fit([f], data, 5)
        whole = path.read_bytes()
        saved = torch.load(path, weights_only=True)
        elsewhere, _ = self.fit([other], data, 5)

        def of_another(**values):
            buffer = io.BytesIO()
            torch.save(saved | {"of": saved["of"] | values}, buffer)
            return buffer.getvalue()

        for content, says in ((whole[:-300], "it is not whole"), (b"", "it is not whole"), (b"no checkpoint", "it is not whole"),
                              (of_another(torch="1.0"), "it is of another torch"),
                              (of_another(format=0), "it is of another format"),
                              (of_another(device="cuda (NVIDIA H200)"), "it is of another device"),
                              (of_another(script="0"), "it is of another script"),
                              (elsewhere.read_bytes(), "it is of another settings")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            _, err = self.fit([dataclasses.replace(f, overwrite=True)], data)
            self.assertIn(f"checkpoint {path} is refused, training starts over: {says}", err)
            self.assertNotIn("going on", err)
            self.assertFalse(path.exists())

    def test_no_pickle_is_executed(self):
        data, [f] = small.digit_data(100, 4, torch.float32), self.settings(1)
        path, _ = self.fit([f], data, 5)
        harmed = self.folder / "harmed"

        class Harm:
            def __reduce__(self):
                return Path.touch, (harmed,)

        torch.save({"of": Harm(), "state": {}}, path)
        _, err = self.fit([f], data)
        self.assertIn("is refused", err)
        self.assertFalse(harmed.exists())

    def test_results_of_before_a_flag_was_new(self):
        """A finished run's settings may lack a flag: it counts as at its default."""
        data, [f] = small.digit_data(100, 4, torch.float32), self.settings(1)
        self.fit([f], data)
        path = common.run_dir(f, data) / "training.json"
        training = json.loads(path.read_text())
        del training["settings"]["matmul"]
        path.write_text(json.dumps(training))
        self.assertIsNotNone(common.read_result(f, data, "training.json"))
        self.assertIsNone(common.read_result(dataclasses.replace(f, matmul="tf32"), data, "training.json"))
        del training["settings"]["d_hidden"]                  # not at its default here
        path.write_text(json.dumps(training))
        self.assertIsNone(common.read_result(f, data, "training.json"))

    def test_another_evaluation_trains_nothing(self):
        """Other draws take over the trained weights, not so anything else; nor are they taken over where they are broken."""
        data, [f] = small.digit_data(100, 4, torch.float32), self.settings(1)
        [model], _ = self.fit([f], data)
        more = dataclasses.replace(f, num_samples=7)
        (again, *_), err = self.fit([more, dataclasses.replace(more, num_samples=8)], data)
        self.assertEqual((err.count("already trained"), err.count("training: ")), (2, 0))
        for name, weights in model.state_dict().items():
            self.assertTrue(torch.equal(again.state_dict()[name], weights), name)
        self.assertEqual(self.curves(more, data) | {"settings": 0}, self.curves(f, data) | {"settings": 0})
        self.assertEqual(common.read_result(more, data, "training.json")["settings"]["num_samples"], 7)
        self.assertTrue((common.run_dir(more, data) / "model.pt").exists())
        for other in (dataclasses.replace(f, seed=1), dataclasses.replace(more, d_2=3), dataclasses.replace(more, lr=2e-3)):
            _, err = self.fit([other], data)
            self.assertNotIn("already trained", err)
        for draws in (0, 7):                                  # a diverged training, too, is not made twice
            [lost], err = self.fit([dataclasses.replace(f, lr=1e6, num_samples=draws)], data)
            self.assertEqual((lost, "already trained" in err), (None, draws == 7))
        broken = dataclasses.replace(f, d_1=4)
        self.fit([broken], data)
        (common.run_dir(broken, data) / "model.pt").write_bytes(b"")
        _, err = self.fit([dataclasses.replace(broken, num_samples=7)], data)
        self.assertIn("training again", err)
        self.assertNotIn("already trained", err)

    def test_rows_are_no_draws(self):
        """Where --num_samples is the number of rows, other rows train anew, other draws do not."""
        argv = ("--dim_x", 3, "--dim_y", 3, "--dim_z", 2, "--num_epochs", 1, "--device", "cpu", "--out_dir", self.folder)
        for flags, trained in (((40, 0), True), ((40, 5), False), ((50, 5), True)):
            status, _, err = small.call(Synthetic_CVAE_Relu_correlation.main, *argv, "--num_samples", flags[0], "--num_draws", flags[1])
            self.assertEqual((status, "training: epoch" in err, "already trained" in err), (0, trained, not trained), err)

    def test_where_there_are_no_locks(self):
        """Some network file systems have none: said, and trained all the same."""
        data, [f] = small.digit_data(100, 4, torch.float32), self.settings(1)
        with mock.patch("fcntl.lockf", side_effect=OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))):
            [model], err = self.fit([f], data)
        self.assertIsNotNone(model)
        self.assertIn("warning: no locks in ", err)

    def test_a_full_disk_is_one_line(self):
        for number, status in ((errno.ENOSPC, 1), (errno.EDQUOT, 1)):
            with contextlib.redirect_stderr(io.StringIO()) as err, self.assertRaises(SystemExit) as end:
                common.run(mock.Mock(side_effect=OSError(number, os.strerror(number), "runs/x/model.pt")))
            self.assertEqual(end.exception.code, status)
            self.assertIn("runs/x/model.pt could not be written", err.getvalue())
        with self.assertRaises(OSError):                      # others are no full disk
            common.run(mock.Mock(side_effect=OSError(errno.EACCES, "no")))


if __name__ == "__main__":
    unittest.main()
