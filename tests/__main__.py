"""`python -m tests` runs every unittest in this folder; `python -m tests test_fit ...` those of some files."""
import sys
import time
import unittest
from pathlib import Path

here = Path(__file__).parent
sys.path.insert(0, str(here.parent))


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


names = [f"tests.{name}" for name in sys.argv[1:]]
loader = unittest.defaultTestLoader
suite = loader.loadTestsFromNames(names) if names else loader.discover(str(here), top_level_dir=str(here.parent))
result = unittest.TextTestRunner(resultclass=Result, verbosity=2).run(suite)
print("slowest: " + ", ".join(f"{name.removeprefix('tests.')} {seconds:.1f} s" for seconds, name in result.slow))
failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
print(f"{result.passed} passed, {failed} failed, {len(result.skipped)} skipped")
sys.exit(failed > 0 or result.passed == 0)
