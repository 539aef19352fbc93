"""The shape of the project: imports from module to module, widths of lines, packages in use."""
import ast
import re
import sys
import unittest

from tests.small import ROOT

# Each module imports only modules that stand before it in this list.
MODULES = (
    "processes", "common", "theory", "files", "own_model", "headroom", "verify", "datasets",
    "text_files", "losses", "arrays",
    "training", "pictures", "linear_prediction", "stability", "post_mortem", "report",
    "deep",
    "measurements", "answers", "figures", "page",
)
WIDEST = 100

# What Windows lacks. test_platforms.py takes some of it away, and runs programs without it.
POSIX_MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "syslog", "posix")
POSIX_ATTRIBUTES = {
    "signal": (
        "SIGPIPE", "SIGHUP", "SIGKILL", "SIGALRM", "SIGUSR1", "SIGCHLD", "SIG_BLOCK",
        "pthread_sigmask", "sigwait", "alarm", "setitimer", "siginterrupt",
    ),
    "os": (
        "fork", "getuid", "geteuid", "mkfifo", "killpg", "setsid", "getpgid", "sysconf", "uname",
        "statvfs", "sched_getaffinity", "O_NONBLOCK", "O_DIRECTORY", "O_CLOEXEC", "WIFEXITED",
    ),
}


def programs_and_modules():
    """The Python files of the project, except the tests."""
    return sorted(ROOT.glob("*.py"))


def python_files():
    """All Python files of the project, tests and examples included."""
    others = [*ROOT.glob("tests/*.py"), *ROOT.glob("examples/*.py")]
    return [*programs_and_modules(), *sorted(others)]


def syntax_tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(path):
    """The names that a file's import statements ask for, wherever in the file they stand."""
    return imported_by(ast.walk(syntax_tree(path)))


def imported_by(nodes):
    """The names that the import statements among these nodes ask for."""
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return names


def wide_lines(text):
    """The numbers of the lines that are wider than allowed."""
    return [number for number, line in enumerate(text.split("\n"), 1) if len(line) > WIDEST]


def wide_prose(text):
    """The numbers of the lines of Markdown prose that are wider than allowed.

    Rows of tables, lines with links, pictures or HTML, and code cannot be broken anywhere.
    """
    prose = []
    in_code = False
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        is_indented_code = line.startswith("    ")
        cannot_be_broken = re.search(r"^\s*[|<]|\]\(|\]: |https?://", line) is not None
        is_prose = not (in_code or is_indented_code or cannot_be_broken)
        # Lines that are left out keep their place, so that the numbers are right.
        prose.append(line if is_prose else "")
    return wide_lines("\n".join(prose))


def text_calls_without_encoding(tree):
    """The numbers of the lines that open a text file in the encoding of the computer."""
    numbers = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        if isinstance(node.func, ast.Name) and node.func.id == "open":
            modes = node.args[1:2]
            modes += [keyword.value for keyword in node.keywords if keyword.arg == "mode"]
            is_binary = any(isinstance(mode, ast.Constant) and "b" in mode.value for mode in modes)
            if not is_binary:
                numbers.append(node.lineno)
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("read_text", "write_text"):
            # files.write_text always writes UTF-8.
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "files"):
                numbers.append(node.lineno)
    return sorted(numbers)


def posix_names(tree):
    """What a file uses although Windows lacks it, such as "os.fork"."""
    names = [name for name in imported_by(ast.walk(tree)) if name in POSIX_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in POSIX_ATTRIBUTES.get(node.value.id, ()):
                names.append(f"{node.value.id}.{node.attr}")
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name in POSIX_ATTRIBUTES.get(node.module, ()):
                    names.append(f"{node.module}.{alias.name}")
    return names


class Width(unittest.TestCase):
    def test_no_line_of_code_is_too_wide(self):
        for path in python_files():
            with self.subTest(file=path.name):
                self.assertEqual(wide_lines(path.read_text(encoding="utf-8")), [])

    def test_no_line_of_prose_is_too_wide(self):
        texts = [ROOT / "README.md", ROOT / "results" / "comments.md", *ROOT.glob("docs/*.md")]
        for path in sorted(texts):
            with self.subTest(file=path.name):
                self.assertEqual(wide_prose(path.read_text(encoding="utf-8")), [])

    def test_a_wide_line_is_noticed(self):
        self.assertEqual(wide_lines("x" * WIDEST + "\n" + "x" * (WIDEST + 1)), [2])

    def test_wide_prose_is_noticed(self):
        wide = "word " * 21
        others = (
            "    " + wide, "| " + wide, "[" + wide + "](link)", "![](picture) " + wide,
            "[1]: " + wide, "<img> " + wide, "https://example.org/ " + wide,
        )
        for line in others:
            self.assertEqual(wide_prose(f"narrow\n{line}\n"), [], line)
        self.assertEqual(wide_prose(f"narrow\n{wide}\n- {wide}\n"), [2, 3])
        self.assertEqual(wide_prose(f"```\n{wide}\n```\n{wide}"), [4])


class Imports(unittest.TestCase):
    def test_modules_import_only_what_stands_before_them(self):
        for place, module in enumerate(MODULES):
            allowed = set(MODULES[:place])
            for name in imported_modules(ROOT / f"{module}.py"):
                if (ROOT / f"{name}.py").exists():
                    with self.subTest(module=module):
                        self.assertIn(name, allowed)

    def test_scripts_import_no_other_script(self):
        """Only reproduce.py runs other scripts, and it imports them by their names."""
        for path in programs_and_modules():
            for name in imported_modules(path):
                if (ROOT / f"{name}.py").exists():
                    with self.subTest(file=path.name):
                        self.assertIn(name, MODULES)

    def test_every_program_imports_common_first(self):
        """common.py checks the version of Python and catches Ctrl-C during slow imports.

        Only the standard library may come before it.
        """
        for path in programs_and_modules():
            if path.stem in MODULES:
                continue
            names = [name.split(".")[0] for name in imported_by(syntax_tree(path).body)]
            others = [name for name in names if name not in sys.stdlib_module_names]
            with self.subTest(script=path.name):
                self.assertEqual(others[0], "common")

    def test_slow_packages_are_imported_where_they_are_used(self):
        for path in programs_and_modules():
            for name in imported_by(syntax_tree(path).body):
                with self.subTest(file=path.name):
                    self.assertNotIn(name.split(".")[0], ("matplotlib", "torchvision"))

    def test_only_the_allowed_packages_are_imported(self):
        allowed = {"torch", "torchvision", "numpy", "matplotlib", "tests", "examples"}
        allowed |= set(sys.stdlib_module_names) - {"argparse"}
        allowed |= {path.stem for path in programs_and_modules()}
        for path in python_files():
            for name in imported_modules(path):
                with self.subTest(file=path.name):
                    self.assertIn(name.split(".")[0], allowed)


class Portable(unittest.TestCase):
    def test_no_program_uses_what_windows_lacks(self):
        """Neither at import time nor later."""
        for path in programs_and_modules():
            with self.subTest(file=path.name):
                self.assertEqual(posix_names(syntax_tree(path)), [])

    def test_what_windows_lacks_is_noticed(self):
        code = "import os, fcntl\nfrom signal import SIGPIPE\ndef f():\n    os.fork()\n"
        self.assertEqual(posix_names(ast.parse(code)), ["fcntl", "signal.SIGPIPE", "os.fork"])
        code = "import os, signal\nos.replace(a, b)\nsignal.raise_signal(signal.SIGTERM)\n"
        self.assertEqual(posix_names(ast.parse(code)), [])

    def test_text_files_are_opened_as_utf_8(self):
        """The encoding of a computer may lack characters, as those of Windows do."""
        for path in programs_and_modules():
            with self.subTest(file=path.name):
                self.assertEqual(text_calls_without_encoding(syntax_tree(path)), [])

    def test_a_missing_encoding_is_noticed(self):
        lines = (
            "open(path)", "open(path, 'w')", "open(path, mode='a')", "path.read_text()",
            "Path(path).write_text(text)",
        )
        code = "\n".join(lines)
        self.assertEqual(text_calls_without_encoding(ast.parse(code)), [1, 2, 3, 4, 5])
        lines = (
            "open(path, encoding='utf-8')", "open(path, 'wb')", "open(path, mode='rb')",
            "path.read_text(encoding='utf-8')", "files.write_text(path, text)",
        )
        self.assertEqual(text_calls_without_encoding(ast.parse("\n".join(lines))), [])


class OldPython(unittest.TestCase):
    def test_programs_can_be_read_by_an_old_python(self):
        """An old Python must get as far as the line of common.py that names the version needed."""
        for path in programs_and_modules():
            if path.stem == "common" or path.stem not in MODULES:
                with self.subTest(file=path.name):
                    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 7))

    def test_new_syntax_is_noticed(self):
        with self.assertRaises(SyntaxError):
            ast.parse("if (n := 3): pass", feature_version=(3, 7))


if __name__ == "__main__":
    unittest.main()
