"""Other operating systems, as far as they can be imitated here."""
import os
import subprocess
import sys
import textwrap
import unittest
from pathlib import Path
from unittest import mock

from tests import small
from tests.small import ROOT

# Names of the standard library that Windows lacks. They are those that the packages do without:
# some other names they use wherever sys.platform is Linux's. test_structure.py has a longer list.
POSIX_MODULES = ("fcntl", "resource", "pwd", "grp", "termios")
POSIX_ATTRIBUTES = {
    "signal": ("SIGPIPE", "SIGHUP", "SIGKILL", "pthread_sigmask"),
    "os": ("fork", "getuid", "mkfifo", "killpg"),
}
WITHOUT_POSIX = f"""
    import os, signal, sys
    for module in {POSIX_MODULES}:
        sys.modules[module] = None      # makes its import fail
    for module, names in {POSIX_ATTRIBUTES}.items():
        for name in names:
            if hasattr(sys.modules[module], name):
                delattr(sys.modules[module], name)
"""

# The locale's encoding is ASCII, which lacks even more characters than Windows's code pages.
# Python's UTF-8 mode would hide that.
NO_UTF_8 = {
    "LC_ALL": "C",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONUTF8": "0",
    "PYTHONIOENCODING": "cp1252",
}


class Windows(small.WithMnist):
    def run_without_posix(self, program):
        """Run Python code in a process that lacks what Windows lacks."""
        code = textwrap.dedent(WITHOUT_POSIX) + textwrap.dedent(program)
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | NO_UTF_8,
            capture_output=True,
            encoding="cp1252",
            timeout=240,
        )

    def test_the_imitation_takes_things_away(self):
        ended = self.run_without_posix("import fcntl")
        self.assertIn("ModuleNotFoundError", ended.stderr)
        ended = self.run_without_posix("os.fork")
        self.assertIn("AttributeError", ended.stderr)
        # The docstring of this script contains Greek letters.
        ended = self.run_without_posix("open('MNIST_VAE_Delta.py').read()")
        self.assertIn("UnicodeDecodeError", ended.stderr)

    def test_every_module_can_be_imported(self):
        names = sorted(path.stem for path in ROOT.glob("*.py"))
        ended = self.run_without_posix(f"""
            import importlib
            for name in {names}:
                importlib.import_module(name)
            print("imported")
        """)
        self.assertEqual((ended.returncode, ended.stdout), (0, "imported\n"), ended.stderr)

    def test_a_short_training_and_its_continuation(self):
        """The second command finds the finished run and reads its files."""
        out_dir = self.folder / "runs"
        argv = [
            "--num_epochs", "1", "--num_samples", "4", "--d_hidden", "8", "--device", "cpu",
            "--data_dir", str(self.folder / "data"), "--out_dir", str(out_dir),
        ]
        ended = self.run_without_posix(f"""
            import common
            import MNIST_CVAE_Relu
            argv = {argv}
            assert MNIST_CVAE_Relu.main(argv) == 0
            common.run(lambda: MNIST_CVAE_Relu.main(argv))
        """)
        self.assertEqual(ended.returncode, 0, ended.stderr)
        self.assertEqual(ended.stdout.count("log_px"), 2)
        self.assertIn("already trained", ended.stderr)
        self.assertNotIn("is ignored", ended.stderr)
        [run] = (out_dir / "MNIST_CVAE_Relu").glob("*")
        for name in ("result.json", "training.json", "model.pt", "units.npz"):
            self.assertTrue(Path(run, name).exists(), name)


class ChildProcesses(unittest.TestCase):
    def test_the_tests_do_without_a_fork_server(self):
        """Windows has none."""
        with mock.patch("multiprocessing.get_all_start_methods", return_value=["spawn"]):
            self.assertEqual(small.child_context().get_start_method(), "spawn")


if __name__ == "__main__":
    unittest.main()
