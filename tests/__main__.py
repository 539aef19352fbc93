"""`python -m tests` runs every unittest in this folder, each file in a process of its own, as many at once as there are cores
(at most four) and one more, since some wait; `python -m tests test_fit ...` those of some files, in this process."""
import os
import re
import subprocess
import sys
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

here = Path(__file__).parent
sys.path.insert(0, str(here.parent))
LONGEST = ("test_going_on", "test_deep", "test_scripts", "test_linear", "test_reproduce", "test_theory")  # begin first


class Result(unittest.TextTestResult):
    """Counts what passed, and says which tests took long."""
    passed, slow = 0, ()

    def startTest(self, test):
        super().startTest(test)
        self.started = time.monotonic()

    def stopTest(self, test):
        super().stopTest(test)
        self.slow = sorted([*self.slow, (time.monotonic() - self.started, test.id())], reverse=True)[:5]

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1


def run(names):
    """Those files' tests: how many passed, failed and were skipped."""
    suite = unittest.defaultTestLoader.loadTestsFromNames([f"tests.{name}" for name in names])
    result = unittest.TextTestRunner(resultclass=Result, verbosity=2).run(suite)
    print("slowest: " + ", ".join(f"{name.removeprefix('tests.')} {seconds:.1f} s" for seconds, name in result.slow))
    return result.passed, len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses), len(result.skipped)


def run_apart(name):
    """One file's tests in a process of their own: its output when it ends, and the same counts. One that dies has failed."""
    done = subprocess.run([sys.executable, "-m", "tests", name], cwd=here.parent, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={"OMP_NUM_THREADS": "1"} | os.environ)
    print(f"\n{name}\n{done.stdout}", flush=True)
    counts = re.search(r"(\d+) passed, (\d+) failed, (\d+) skipped\n$", done.stdout)
    return tuple(map(int, counts.groups())) if counts else (0, 1, 0)


if sys.argv[1:]:
    passed, failed, skipped = run(sys.argv[1:])
else:
    names = sorted((path.stem for path in here.glob("test_*.py")), key=lambda name: (name not in LONGEST, name))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1) + 1) as pool:
        passed, failed, skipped = map(sum, zip(*pool.map(run_apart, names)))
print(f"{passed} passed, {failed} failed, {skipped} skipped")
sys.exit(failed > 0 or passed == 0)
