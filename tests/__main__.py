"""Runs the tests.

    python -m tests                    every file in this folder
    python -m tests test_files ...     the named files

Without names, several processes run the files side by side. A file that takes long has a process of
its own, and the others share a few. Named files run in this process. The last line of the output is
"N passed, N failed, N skipped". The exit status is 0 only if tests passed and none failed.
"""
import os
import re
import subprocess
import sys
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parent

# The files that take longest. They begin first, in this order, so that no core waits for them at
# the end.
LONGEST = (
    "test_deep",
    "test_going_on",
    "test_scripts",
    "test_reproduce",
    "test_benchmark",
    "test_linear",
    "test_any_decoder",
    "test_fuzz",
    "test_theory",
    "test_headroom",
    "test_report",
    "test_verify",
)

# The number of processes for all other files. Each of them imports torch, which takes seconds.
OTHER_PROCESSES = 5

# At most this number of cores is used.
MAX_CORES = 4

# The number of slow tests that are listed after each file.
SLOWEST_SHOWN = 5


class Result(unittest.TextTestResult):
    """Counts the tests that passed, and measures the seconds of each test."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.passed = 0
        self.seconds = []

    def startTest(self, test):
        super().startTest(test)
        self.started = time.monotonic()

    def stopTest(self, test):
        super().stopTest(test)
        self.seconds.append((time.monotonic() - self.started, test.id()))

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1

    def counts(self):
        """The numbers of tests that passed, failed and were skipped."""
        failed = len(self.failures) + len(self.errors) + len(self.unexpectedSuccesses)
        return self.passed, failed, len(self.skipped)

    def slowest(self):
        """The names and seconds of the tests that took longest, as text."""
        longest_first = sorted(self.seconds, reverse=True)
        parts = []
        for seconds, name in longest_first[:SLOWEST_SHOWN]:
            parts.append(f"{name.removeprefix('tests.')} {seconds:.1f} s")
        return ", ".join(parts)


def run_here(names):
    """Run the tests of these files in this process. Returns (passed, failed, skipped)."""
    modules = [f"tests.{name}" for name in names]
    suite = unittest.defaultTestLoader.loadTestsFromNames(modules)
    result = unittest.TextTestRunner(resultclass=Result, verbosity=2).run(suite)
    print(f"slowest: {result.slowest()}")
    return result.counts()


def run_apart(names):
    """Run the tests of these files in a process of their own, and print its output when it ends.

    Returns (passed, failed, skipped). A process that does not get to its last line counts as one
    failed test.
    """
    process = subprocess.run(
        [sys.executable, "-m", "tests", *names],
        cwd=TESTS.parent,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"OMP_NUM_THREADS": "1"} | os.environ,
    )
    print(f"\n{', '.join(names)}\n{process.stdout}", flush=True)
    last_line = re.search(r"(\d+) passed, (\d+) failed, (\d+) skipped\n$", process.stdout)
    if last_line is None:
        return 0, 1, 0
    passed, failed, skipped = last_line.groups()
    return int(passed), int(failed), int(skipped)


def run_all():
    """Run all files in several processes. Returns (passed, failed, skipped)."""
    names = sorted(path.stem for path in TESTS.glob("test_*.py"))
    others = [name for name in names if name not in LONGEST]
    groups = [[name] for name in LONGEST]
    groups += [others[k::OTHER_PROCESSES] for k in range(OTHER_PROCESSES)]

    # One more process than there are cores, since some tests wait.
    cores = min(MAX_CORES, os.cpu_count() or 1)
    with ThreadPoolExecutor(cores + 1) as pool:
        counts = list(pool.map(run_apart, groups))

    passed = sum(count[0] for count in counts)
    failed = sum(count[1] for count in counts)
    skipped = sum(count[2] for count in counts)
    return passed, failed, skipped


def main(names):
    """Run the named files, or all. Returns the exit status."""
    sys.path.insert(0, str(TESTS.parent))
    passed, failed, skipped = run_here(names) if names else run_all()
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
