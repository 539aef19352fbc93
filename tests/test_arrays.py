"""arrays.py: files of every kind, what it refuses to read, categories, and halves of the rows.

Most tests call predict_collapse.py, whose messages name the flag and the place in the file.
"""
import math
import os
import threading
import unittest
import warnings
from unittest import mock

import numpy as np
import torch

import arrays
import predict_collapse
from tests.test_predict_collapse import Case


class Files(Case):
    def theta(self, path):
        """The theta that the program predicts for the rows of a file."""
        return self.predict("--x", path)[0]["predicted"]["theta"]

    def check_same(self, path, expected):
        """Check that the prediction for a file is the expected one, {name: list}."""
        predicted = self.predict("--x", path)[0]["predicted"]
        self.assertEqual(set(predicted), set(expected))
        for name, values in expected.items():
            np.testing.assert_allclose(
                predicted[name], values, rtol=1e-7, atol=1e-9, err_msg=f"{path.name} {name}")

    def test_every_format(self):
        """The prediction is the same for each kind of file, type of number and order in memory."""
        x = self.x.astype(np.float32)
        expected = self.predict("--x", self.save("x.npy", x))[0]["predicted"]
        np.savez(self.folder / "x.npz", x)
        np.savetxt(self.folder / "x.csv", x, delimiter=",", fmt="%.9g")
        np.savetxt(
            self.folder / "named.csv",
            x,
            delimiter=",",
            fmt="%.9g",
            header="a,b,c,d,e,f",
            comments="",
        )
        torch.save(torch.from_numpy(x), self.folder / "x.pt")
        torch.save(torch.from_numpy(x).requires_grad_(), self.folder / "grad.pt")
        self.save("fortran.npy", np.asfortranarray(x))
        self.save("double.npy", x.astype(np.float64))
        self.save("deep.npy", x.reshape(300, 2, 3))

        text_files = ["x.csv", "named.csv"]
        binary_files = ["x.npz", "x.pt", "grad.pt", "fortran.npy", "double.npy", "deep.npy"]
        for name in text_files + binary_files:
            self.check_same(self.folder / name, expected)

    def test_any_length_of_a_chunk(self):
        x = self.save("x.npy", self.x)
        expected = self.predict("--x", x)[0]["predicted"]
        with mock.patch("arrays.CHUNK", 7):
            self.check_same(x, expected)

    def test_whole_numbers_and_bfloat16(self):
        whole = np.round(10 * self.x)
        x = self.save("int.npy", whole.astype(np.int16))
        expected = self.predict("--x", x)[0]["predicted"]
        theta = np.linalg.svd(whole / 300**0.5, compute_uv=False)
        np.testing.assert_allclose(expected["theta"], theta, rtol=1e-7)

        # These numbers have few bits, so that bfloat16 holds them exactly.
        torch.save(torch.from_numpy(whole).bfloat16(), self.folder / "half.pt")
        half = self.predict("--x", self.folder / "half.pt")[0]["predicted"]
        self.assertEqual(half, expected)

    def test_no_array(self):
        self.write("text.npy", "no array")
        self.write("empty.npy", "")
        self.write("text.csv", "a,b\nc,d\n1,2\n")
        self.write("text.pt", "no tensor")
        self.write("text.npz", "no archive")
        self.write("empty.csv", "")
        torch.save({"x": torch.ones(3, 2)}, self.folder / "dict.pt")
        torch.save(torch.eye(3).to_sparse(), self.folder / "sparse.pt")
        np.savez(self.folder / "two.npz", a=self.x, b=self.y)
        objects = np.array([{}, 1], dtype=object)
        np.save(self.folder / "objects.npy", objects, allow_pickle=True)
        self.save("words.npy", np.array([["a", "b"]] * 3))
        self.save("complex.npy", self.x * 1j)
        self.save("none.npy", self.x[:0])
        self.save("vector.npy", self.x[:, 0])
        names = [path.name for path in sorted(self.folder.iterdir())]
        self.assertEqual(len(names), 14)
        for name in [*names, "absent.npy"]:
            with self.subTest(name), warnings.catch_warnings():
                warnings.simplefilter("error")
                self.refuse(
                    ["--x", self.folder / name], "--x", name, "cannot be read as an array")

        self.refuse(
            ["--x", self.folder / "x.txt"],
            "--x",
            "wants a file whose name ends in .npy, .npz, .csv, .pt",
        )

    def test_no_file(self):
        """A folder and an absent file are refused in one line."""
        for suffix in (".npy", ".npz", ".csv", ".pt"):
            (self.folder / f"folder{suffix}").mkdir()
            self.refuse_in_one_line(
                ["--x", self.folder / f"folder{suffix}"], "--x", f"folder{suffix}", "regular file")
            self.refuse_in_one_line(
                ["--x", self.folder / f"absent{suffix}"], "--x", f"absent{suffix}")
        self.refuse_in_one_line(["--x", self.folder], "--x", "wants a file whose name ends in")

    @unittest.skipUnless(os.path.exists("/dev/null"), "there is no /dev/null")
    def test_a_device(self):
        self.refuse_in_one_line(["--x", "/dev/null"], "--x", "/dev/null", "wants a file")
        for suffix in (".npy", ".npz", ".csv", ".pt"):
            link = self.folder / f"device{suffix}"
            link.symlink_to("/dev/null")
            self.refuse_in_one_line(["--x", link], "--x", link.name, "regular file")

    @unittest.skipUnless(hasattr(os, "mkfifo"), "there are no FIFOs")
    def test_a_fifo(self):
        """Opening a FIFO would wait for a writer for ever."""
        x = self.save("x.npy", self.x)
        for suffix in (".npy", ".npz", ".csv", ".pt"):
            fifo = self.folder / f"fifo{suffix}"
            os.mkfifo(fifo)
            self.refuse_fifo(["--x", fifo], fifo)
        for flags in (["--model", "cvae", "--y"], ["--collapsed", 1, "--residual"]):
            self.refuse_fifo(["--x", x, *flags, self.folder / "fifo.npy"], self.folder / "fifo.npy")

    def refuse_fifo(self, argv, fifo):
        """Check that the program refuses a FIFO, in a thread that cannot hang the test."""
        results = []

        def run():
            results.append(self.call(*argv))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(30)
        if thread.is_alive():
            # The end of a writer lets the reader go on.
            os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
            thread.join(30)
            self.fail(f"{fifo.name} was opened")
        [(status, out, err)] = results
        self.assertEqual((status, out), (2, ""))
        self.assertEqual(len(err.splitlines()), 1, err)
        self.assertIn(fifo.name, err)
        self.assertIn("wants a regular file", err)

    def test_rows_that_do_not_fit(self):
        x = self.save("x.npy", self.x)
        short_y = self.save("y.npy", self.y[:-1])
        self.refuse(
            ["--model", "cvae", "--x", x, "--y", short_y],
            "--y: got 299 rows, wants 300 rows like --x",
        )
        self.refuse(["--x", self.save("one.npy", self.x[:1])], "--x", "at least 2")
        short_r = self.save("r.npy", self.y[1:])
        self.refuse(
            ["--x", x, "--collapsed", 1, "--residual", short_r], "--residual", "299 rows", "300")

    def test_bad_numbers(self):
        for value in (math.nan, math.inf, -math.inf):
            broken = self.x.copy()
            broken[217, 3] = value
            with mock.patch("arrays.CHUNK", 50):
                self.refuse(
                    ["--x", self.save("broken.npy", broken)],
                    "--x", "row 217 and column 3 (both counted from 0)", str(value))
        self.refuse(["--x", self.save("vast.npy", self.x * 1e200)], "--x", "up to 1e+100")

        # The message names the first bad number, also where numbers of both kinds are bad.
        both = self.x.copy()
        both[[3, 5], 0] = 1e101, math.nan
        self.refuse(["--x", self.save("both.npy", both)], "--x", "row 3 ", "1e+101", "up to 1e+100")


class TextFiles(Case):
    """Files that end in .csv."""

    # The rows of a file, and their theta by numpy.
    ROWS = np.array([[1.0, 2.0], [3.0, -4.0], [5.0, 7.0], [-2.0, 8.0]])

    def text(self, first="", newline="\n"):
        """The text of a file that holds the rows, after the text `first`."""
        lines = [",".join(f"{number:g}" for number in row) for row in self.ROWS]
        return first + newline.join(lines) + newline

    def check_rows(self, path, rows=ROWS):
        """Check that the program reads these rows from a file."""
        saved, _, _ = self.predict("--x", path)
        self.assertEqual(saved["rows"], len(rows))
        theta = np.linalg.svd(rows / len(rows)**0.5, compute_uv=False)
        np.testing.assert_allclose(saved["predicted"]["theta"], theta, rtol=1e-9)

    def refuse_cell(self, text, *words):
        """Check that the program refuses a file with this text, in one line with these words."""
        path = self.write("x.csv", text)
        self.refuse_in_one_line(["--x", path], "--x", "x.csv", *words)

    def test_a_bad_cell_in_the_first_row(self):
        """The first row is not dropped as a header because one of its cells is no number."""
        self.refuse_cell(
            "1,abc\n3,4\n5,6\n7,8\n", "line 1, column 2", "'abc'", "wants a number")
        self.refuse_cell("x1,2\n3,4\n5,6\n7,8\n", "line 1, column 1", "'x1'", "wants a number")
        # Spreadsheets leave a missing number empty, and some countries write a decimal comma.
        self.refuse_cell("1,\n3,4\n5,6\n", "line 1, column 2", "''")
        self.refuse_cell('1,"2,5"\n3,4\n5,6\n', "line 1, column 2", "'2,5'")

    def test_a_bad_cell_in_the_first_row_after_a_header(self):
        self.refuse_cell(
            "age,size\n1,abc\n3,4\n5,6\n", "line 2, column 2", "'size'", "'abc'", "wants a number")

    def test_a_bad_cell_further_down(self):
        text = self.text()
        self.refuse_cell(text + "8,x\n", "line 5, column 2", "'x'", "wants a number")
        self.refuse_cell(
            "age,size\n" + text + "8,x\n", "line 6, column 2", "'size'", "'x'", "wants a number")

    def test_a_second_line_without_numbers(self):
        """Only one line is a header."""
        self.refuse_cell("age,size\nyears,m\n1,2\n3,4\n", "line 2, column 1", "'age'", "'years'")

    def test_rows_of_different_lengths(self):
        self.refuse_cell("1,2\n3,4\n5,6,7\n", "line 3", "3 cells", "2", "line 1")
        self.refuse_cell("a,b\n1,2\n\n3\n", "line 4", "1 cells", "2", "line 2")

    def test_header(self):
        """A first line without any number is skipped."""
        self.check_rows(self.write("x.csv", self.text("age,size\n")))
        self.check_rows(self.write("x.csv", self.text('"the age, in years","size"\n')))

    def test_first_row_of_numbers_is_kept(self):
        """nan and inf are numbers, and are refused as such, with their column."""
        self.check_rows(self.write("x.csv", self.text()))
        for value in ("nan", "inf", "-inf"):
            line = self.refuse(
                ["--x", self.write("x.csv", f"{value},{value}\n1,2\n3,4\n")],
                "--x", "line 1, column 1", "wants finite numbers")
            self.assertIn(f"is {value}, wants", line)

    def test_blank_lines_and_comments(self):
        first = "# measured in May\n\nage,size\n  \n"
        self.check_rows(self.write("x.csv", self.text(first) + "\n# the end\n\n"))

    def test_rows_are_named_by_lines(self):
        """Where a number is bad, its line in the file is named, and the name of its column."""
        text = "# first\n\nage,size\n1,2\n\n3,4\n# between\n5,nan\n7,8\n"
        path = self.write("x.csv", text)
        self.refuse(
            ["--x", path], "--x", "line 8, column 2", "'size'", "is nan", "finite numbers")
        path = self.write("x.csv", text.replace("nan", "1e200"))
        self.refuse(["--x", path], "--x", "line 8, column 2", "'size'", "1e+200", "up to 1e+100")
        # Chunks do not matter.
        with mock.patch("arrays.CHUNK", 2):
            self.refuse(["--x", path], "--x", "line 8, column 2", "'size'", "1e+200")
        # The same number in a file without a header has no name.
        path = self.write("x.csv", "1,2\n\n3,4\n5,nan\n")
        line = self.refuse(["--x", path], "--x", "line 4, column 2 is nan")
        self.assertNotIn("size", line)

    def test_columns_of_y_and_residual(self):
        """Messages name the flag whose file holds the bad number."""
        x = self.write("x.csv", self.text())
        bad = self.write("bad.csv", "target\n1\n2\n\nnan\n4\n")
        for flags in (["--model", "cvae", "--y"], ["--collapsed", 1, "--residual"]):
            self.refuse(["--x", x, *flags, bad], flags[-1], "line 5, column 1", "'target'", "nan")

    def test_byte_order_mark(self):
        """Spreadsheets begin a file with one. It is not a part of the first number or name."""
        for newline in ("\n", "\r\n"):
            text = self.text(newline=newline)
            self.check_rows(self.write("x.csv", text, encoding="utf-8-sig"))
            self.check_rows(self.write("x.csv", "age,size" + newline + text, "utf-8-sig"))
        path = self.write("x.csv", "age,size\nx,2\n3,4\n", "utf-8-sig")
        self.refuse(["--x", path], "line 2, column 1 ('age') is 'x'")

    def test_accents_in_the_header(self):
        """The file is read as UTF-8, also where the computer's own encoding is another one."""
        header = "Größe,élévation\n"
        self.check_rows(self.write("x.csv", self.text(header)))
        path = self.write("x.csv", header + "1,2\n3,ö\n5,6\n")
        self.refuse(["--x", path], "line 3, column 2 ('élévation') is 'ö'")
        path = self.write("x.csv", header + "1,2\nnan,4\n5,6\n")
        self.refuse(["--x", path], "line 3, column 1 ('Größe') is nan")

        def open_in_ascii(path, *args, encoding="ascii", **options):
            return open(path, *args, encoding=encoding, **options)

        with mock.patch("arrays.open", open_in_ascii, create=True):
            self.check_rows(self.write("x.csv", self.text(header)))

    def test_another_encoding(self):
        """A file that is not UTF-8 is refused in one line, not with a traceback."""
        path = self.write("x.csv", self.text("Größe,Länge\n"), encoding="latin-1")
        self.refuse_in_one_line(["--x", path], "--x", "x.csv", "cannot be read as an array")


class Likelihoods(Case):
    """The numbers that --likelihood bernoulli, categorical and poisson allow."""

    def setUp(self):
        super().setUp()
        random = np.random.default_rng(2)
        self.binary = random.integers(0, 2, (301, 6))
        self.counts = random.poisson(2, (301, 6))
        # Codes with gaps, of 3, 2, 4 and 3 categories.
        columns = []
        for codes in ((3, 7, 10), (0, 1), (0, 5, 6, 100), (1, 2, 4)):
            columns.append(random.permutation(np.resize(codes, 301)))
        self.codes = np.stack(columns, 1)

    def test_bad_numbers(self):
        """The message names the flag, the row and the column, and what the likelihood wants."""
        for likelihood, array, value, wanted in (
            ("bernoulli", self.binary, 2, "2, wants 0 or 1 for --likelihood bernoulli"),
            ("bernoulli", self.binary, 0.5, "0.5, wants 0 or 1"),
            ("bernoulli", self.binary, math.nan, "nan, wants finite numbers"),
            ("poisson", self.counts, -1, "-1, wants whole numbers of at least 0"),
            ("poisson", self.counts, 0.5, "0.5, wants whole numbers"),
            ("categorical", self.codes, -2, "-2, wants whole numbers of at least 0"),
            ("categorical", self.codes, 1.5, "1.5, wants whole numbers"),
        ):
            broken = array.astype(float)
            broken[217, 3] = value
            path = self.save("broken.npy", broken)
            with self.subTest(likelihood=likelihood, value=value):
                with mock.patch("arrays.CHUNK", 50):
                    self.refuse(
                        ["--x", path, "--likelihood", likelihood],
                        f"--x: a number in row 217 and column 3 (both counted from 0) is {wanted}",
                    )
        # A text file has lines, and columns with names.
        path = self.write("x.csv", "# binary\nleft,right\n0,1\n1,1\n\n0,2\n")
        self.refuse(
            ["--x", path, "--likelihood", "bernoulli"],
            "--x: a number in line 6, column 2 ('right') is 2, wants 0 or 1",
        )

    def test_too_many_categories(self):
        x = self.save("x.npy", self.codes)
        argv = ["--x", x, "--likelihood", "categorical"]
        with mock.patch("arrays.MAX_CATEGORIES", 3):
            self.refuse(argv, "--x: the column of the number in row 0 and column 2", "at most 3")
        with mock.patch("arrays.MAX_ALL_CATEGORIES", 11):
            self.refuse(argv, "--x: the columns have 12 categories together, wants at most 11")

    def test_categories(self):
        """The codes of each column over several chunks, and an indicator for each code."""
        path = str(self.save("x.npy", self.codes))
        f = predict_collapse.Flags(x=path, likelihood="categorical")
        [source] = arrays.open_rows(f, ("x",))
        with mock.patch("arrays.CHUNK", 38), mock.patch("sys.stderr"):
            codes = arrays.find_categories(f, source)
        self.assertEqual(
            [column.tolist() for column in codes], [[3, 7, 10], [0, 1], [0, 5, 6, 100], [1, 2, 4]])

        indicators = arrays.indicators(np.array([[7, 0, 100, 1], [3, 1, 0, 4]]), codes)
        self.assertEqual(
            indicators.tolist(),
            [[0, 1, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1]],
        )


class Halves(unittest.TestCase):
    def test_each_row_is_in_one_half(self):
        """Each row is in one half, and the length of a chunk does not matter."""
        for count in (2, 301, 300):
            first, second = arrays.halves_of(count, np.random.default_rng(0))
            self.assertEqual((len(first), len(second)), arrays.half_sizes(count))
            self.assertEqual(sorted([*first, *second]), list(range(count)))

        random = np.random.default_rng(0)
        parts = [arrays.halves_of(size, random)[0] for size in (100, 100, 101)]
        together = np.concatenate([parts[0], parts[1] + 100, parts[2] + 200])
        expected, _ = arrays.halves_of(301, np.random.default_rng(0))
        np.testing.assert_array_equal(together, expected)
        # About half of the even rows are in each half.
        self.assertLess(abs((expected % 2 == 0).mean() - 0.5), 0.1)


if __name__ == "__main__":
    unittest.main()
