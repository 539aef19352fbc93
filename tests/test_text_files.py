"""text_files.py: numbers, names and places of .csv and .tsv files, and the cells that it refuses.

The first tests read files directly. The others call predict_collapse.py, whose messages name the
flag and the place in the file.
"""
import math
import unittest
from unittest import mock

import numpy as np

import text_files
from tests import small
from tests.test_predict_collapse import Case


def all_columns(names, count):
    """The choice of all columns."""
    return list(range(count))


class Tables(small.InFolder):
    """read_table."""

    def write(self, text, name="x.csv", encoding="utf-8"):
        """Write a text file. Returns its path as a text."""
        path = self.folder / name
        path.write_bytes(text.encode(encoding))
        return str(path)

    def read(self, text, name="x.csv", choose=all_columns, allows_missing=False):
        """The Table of a file with this text."""
        return text_files.read_table(self.write(text, name), choose, allows_missing)

    def check(self, table, numbers, names=(), remark=""):
        np.testing.assert_array_equal(table.numbers, numbers)
        self.assertEqual(table.names, list(names))
        self.assertIn(remark, table.remark)
        if not remark:
            self.assertEqual(table.remark, "")

    def test_delimiters(self):
        """A semicolon outside quotes comes first, then a tab, then a comma."""
        numbers = [[1, 2.5], [3, 4]]
        self.check(self.read("1,2.5\n3,4\n"), numbers)
        self.check(self.read("1;2.5\n3;4\n"), numbers)
        self.check(self.read("1\t2.5\n3\t4\n"), numbers)
        self.check(self.read("# a; b\n\na\tb\n1\t2.5\n3\t4\n"), numbers, ["a", "b"])
        self.check(self.read('"a;b","c\td"\n1,2.5\n3,4\n'), numbers, ["a;b", "c\td"])
        self.check(self.read('"a,b";c\n1;2.5\n3;4\n'), numbers, ["a,b", "c"])
        self.check(self.read("1\t2.5\n3\t4\n", "x.tsv"), numbers)
        self.check(self.read("a;b\tc\n1\t2.5\n3\t4\n", "x.TSV"), numbers, ["a;b", "c"])

    def test_encodings(self):
        numbers = [[1, 2], [3, 4]]
        text = "Größe,b\n1,2\n3,4\n"
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            table = text_files.read_table(self.write(text, encoding=encoding), all_columns, False)
            self.check(table, numbers, ["Größe", "b"])
        # The mark of UTF-16 of the other order of bytes.
        path = self.write("\ufeff" + text, encoding="utf-16-be")
        self.check(text_files.read_table(path, all_columns, False), numbers, ["Größe", "b"])

        path = self.write(text, encoding="latin-1")
        with self.assertRaisesRegex(ValueError, "another encoding, wants UTF-8"):
            text_files.read_table(path, all_columns, False)

    def test_names(self):
        numbers = [[1, 2], [3, 4]]
        self.check(self.read("a,b\n1,2\n3,4\n"), numbers, ["a", "b"])
        self.check(self.read("1,2\n3,4\n"), numbers)
        # A name may be missing, but not all of them.
        self.check(self.read("a,\n1,2\n3,4\n"), numbers, ["a", ""])
        table = self.read("NA,NA\n1,2\n", allows_missing=True)
        self.check(table, [[math.nan, math.nan], [1, 2]])

    def test_numbers_as_names(self):
        """pandas' DataFrame(x).to_csv(f, index=False) begins a file with 0,1,2."""
        counts = "the first line counts 0, 1, ..., so it is taken for names"
        self.check(self.read("0,1,2\n5,6,7\n"), [[5, 6, 7]], ["0", "1", "2"], counts)
        self.check(self.read("0,1\n5,6\n"), [[5, 6]], ["0", "1"], counts)
        # These are rows of numbers.
        self.check(self.read("0,1,3\n5,6,7\n"), [[0, 1, 3], [5, 6, 7]])
        self.check(self.read("1,2,3\n5,6,7\n"), [[1, 2, 3], [5, 6, 7]])
        self.check(self.read("0.0,1.0\n5,6\n"), [[0, 1], [5, 6]])
        self.check(self.read("0\n5\n"), [[0], [5]])

    def test_names_of_rows(self):
        """pandas' to_csv(f) and R's write.csv give a first column without a name."""
        left_out = "the first column has no name, so it is taken for names of the rows"
        self.check(self.read(",0,1\n0,5,6\n1,7,8\n"), [[5, 6], [7, 8]], ["", "0", "1"], left_out)
        self.check(self.read(",a,b\n0,5,6\n1,7,8\n"), [[5, 6], [7, 8]], ["", "a", "b"], left_out)
        # They need not be numbers.
        text = '"","a"\n"first",5\n"second",7\n'
        self.check(self.read(text), [[5], [7]], ["", "a"], left_out)
        self.assertEqual(self.read(text).columns, [1])
        # This is a row whose first number is missing.
        table = self.read(",5,6\n1,7,8\n", allows_missing=True)
        self.check(table, [[math.nan, 5, 6], [1, 7, 8]])

    def test_numbers_of_rows(self):
        """A file without names may begin each row with its number."""
        for text, expected in (
            ("0,5\n1,6\n2,7\n", True),
            ("1,5\n2,6\n3,7\n", True),
            ("2,5\n3,6\n4,7\n", False),
            ("0,5\n1,6\n3,7\n", False),
            # Too small to say.
            ("1,5\n2,6\n", False),
            ("1\n2\n3\n", False),
            # A name says what the column is.
            ("a,b\n0,5\n1,6\n2,7\n", False),
        ):
            with self.subTest(text):
                self.assertIs(self.read(text).begins_with_row_numbers(), expected)

        without_first = self.read("0,1,5\n1,2,6\n2,3,7\n", choose=lambda names, count: [1, 2])
        self.assertFalse(without_first.begins_with_row_numbers())

    def test_missing_numbers(self):
        text = "a,b\n1,2\n{},4\n5,{}\n"
        for word in ("", " ", "NA", "N/A", "nan", "NaN", "null", "None", "NULL", "-nan"):
            with self.subTest(word):
                table = self.read(text.format(word, word), allows_missing=True)
                self.check(table, [[1, 2], [math.nan, 4], [5, math.nan]], ["a", "b"])
                with self.assertRaises(text_files.MissingCell) as caught:
                    self.read(text.format(word, word))
                self.assertEqual(
                    str(caught.exception),
                    "the cell in line 3, column 1 ('a') is missing (lines and columns count from "
                    "1)",
                )

    def test_chosen_columns(self):
        """The other columns need not hold numbers. The order is that of the choice."""
        calls = []

        def choose(names, count):
            calls.append((names, count))
            return [2, 0]

        text = "size,kind,age\n1,cat,\n2,,3\n"
        table = self.read(text, choose=choose, allows_missing=True)
        self.assertEqual(calls, [(["size", "kind", "age"], 3)])
        self.check(table, [[math.nan, 1], [3, 2]], ["size", "kind", "age"])
        counting = "lines and columns count from 1"
        self.assertEqual(table.place(1, 0), f"line 3, column 3 ('age'; {counting})")
        self.assertEqual(table.place(0, 1), f"line 2, column 1 ('size'; {counting})")

        # Names of rows do not count as a column.
        table = self.read(",a,b,c\nx,1,2,3\n", choose=choose)
        self.assertEqual(calls[1], (["a", "b", "c"], 3))
        self.check(table, [[3, 1]], ["", "a", "b", "c"], "names of the rows")
        self.assertEqual(table.place(0, 0), f"line 2, column 4 ('c'; {counting})")

    def test_places_without_names(self):
        table = self.read("# first\n\n1,2\n\n3,4\n")
        self.assertEqual(
            table.place(1, 1), "line 5, column 2 (lines and columns count from 1)")

    def test_all_columns_in_another_order(self):
        table = self.read("1,2\n3,4\n", choose=lambda names, count: [1, 0])
        self.check(table, [[2, 1], [4, 3]])


class TextFiles(Case):
    """Files that end in .csv or .tsv, as predict_collapse.py reads them."""

    # The rows of a file. Their means are 0, so that it does not matter whether they are subtracted.
    ROWS = np.array([[1.0, 2.0], [3.0, -4.0], [-5.0, 7.0], [1.0, -5.0]])

    def text(self, first="", newline="\n"):
        """The text of a file that holds the rows, after the text `first`."""
        lines = [",".join(f"{number:g}" for number in row) for row in self.ROWS]
        return first + newline.join(lines) + newline

    def check_rows(self, path, *argv):
        """Check that the program reads these rows from a file. Returns stderr."""
        saved, _, err = self.predict("--x", path, *argv)
        self.assertEqual(saved["rows"], 4)
        theta = np.linalg.svd(self.ROWS / 4**0.5, compute_uv=False)
        np.testing.assert_allclose(saved["predicted"]["theta"], theta, rtol=1e-9)
        return err

    def refuse_cell(self, text, *words):
        """Check that the program refuses a file with this text, in one line with these words."""
        path = self.write("x.csv", text)
        self.refuse_in_one_line(["--x", path], "--x", "x.csv", *words)

    def test_a_bad_cell_in_the_first_row(self):
        """The first row is not dropped as a header because one of its cells is no number."""
        self.refuse_cell(
            "1,abc\n3,4\n5,6\n7,8\n", "line 1, column 2", "'abc'", "wants a number")
        self.refuse_cell("x1,2\n3,4\n5,6\n7,8\n", "line 1, column 1", "'x1'", "wants a number")

    def test_decimal_commas(self):
        """Some countries write a decimal comma."""
        words = ("wants a number with a decimal point, not a comma",)
        self.refuse_cell('1,"2,5"\n3,4\n5,6\n', "line 1, column 2", "'2,5'", *words)
        self.refuse_cell("1,5;2,5\n3;4\n", "line 1, column 1", "'1,5'", *words)
        self.refuse_cell("a;b\n3;-4,5e3\n", "line 2, column 2 ('b')", "'-4,5e3'", *words)
        # A comma between thousands is another matter.
        path = self.write("x.csv", 'a,b\n1,"2,500.5"\n')
        line = self.refuse(["--x", path], "'2,500.5'", "wants a number")
        self.assertNotIn("decimal", line)

    def test_spaces_between_columns(self):
        """numpy.savetxt writes them unless it gets a delimiter."""
        self.refuse_cell(
            "1.0 2.0\n3.0 4.0\n", "'3.0 4.0'", "a comma, a semicolon or a tab between two columns")

    def test_a_missing_cell(self):
        path = self.write("x.csv", "age,size\n1,2\n\n3,4\n5,\n,7\n")
        line = self.refuse(["--x", path])
        self.assertEqual(
            line,
            f"predict_collapse.py: error: --x: {str(path)!r}: the cell in line 5, column 2 "
            "('size') is missing (lines and columns count from 1), wants a number, or --missing "
            "drop to leave out its row",
        )
        self.refuse_cell("1,\n3,4\n5,6\n", "the cell in line 1, column 2 is missing")

    def test_rows_with_missing_cells_are_dropped(self):
        lines = self.text().splitlines()
        text = "\n".join(["a,b", *lines[:2], "NA,1e300", *lines[2:], "4,"])
        err = self.check_rows(self.write("x.csv", text), "--missing", "drop")
        self.assertIn("note: 2 of 6 rows lack a number and are left out\n", err)

    def test_a_bad_cell_in_the_first_row_after_a_header(self):
        self.refuse_cell(
            "age,size\n1,abc\n3,4\n5,6\n", "line 2, column 2", "'size'", "'abc'", "wants a number")

    def test_a_bad_cell_further_down(self):
        text = self.text()
        self.refuse_cell(text + "8,x\n", "line 5, column 2", "'x'", "wants a number")
        self.refuse_cell(
            "age,size\n" + text + "8,x\n",
            "the cell in line 6, column 2 ('size') is 'x' (lines and columns count from 1), wants "
            "a number; --drop leaves out a column",
        )

    def test_a_second_line_without_numbers(self):
        """Only one line is a header."""
        self.refuse_cell("age,size\nyears,m\n1,2\n3,4\n", "line 2, column 1", "'age'", "'years'")

    def test_rows_of_different_lengths(self):
        self.refuse_cell("1,2\n3,4\n5,6,7\n", "line 3", "3 cells", "2", "line 1")
        self.refuse_cell("a,b\n1,2\n\n3\n", "line 4", "1 cells", "2", "line 2")
        # Otherwise, names would belong to wrong columns.
        self.refuse_cell("a,b\n\n1,2,3\n4,5,6\n", "line 3 has 3 cells, wants 2 as in line 1")

    def test_no_rows(self):
        for text in ("", "a,b\n", "\n\n# 1,2\n"):
            self.refuse_cell(text, "cannot be read as an array: it contains no rows of numbers")

    def test_header(self):
        """A first line without any number is skipped."""
        self.check_rows(self.write("x.csv", self.text("age,size\n")))
        self.check_rows(self.write("x.csv", self.text('"the age, in years","size"\n')))

    def test_files_of_pandas(self):
        """Names that are numbers and names of rows lead to a note."""
        err = self.check_rows(self.write("x.csv", self.text("0,1\n")))
        self.assertRegex(err, "note: --x: '.*x.csv': the first line counts 0, 1, ...")
        lines = [f"{i},{line}" for i, line in enumerate(self.text().splitlines(), 1)]
        path = self.write("x.csv", "\n".join([",a,b", *lines]))
        err = self.check_rows(path)
        self.assertRegex(err, "note: --x: '.*x.csv': the first column has no name")

        # Without names, nothing is left out, and there is a warning with the remedy.
        path = self.write("x.csv", "\n".join(lines))
        saved, _, err = self.predict("--x", path)
        self.assertEqual(len(saved["predicted"]["theta"]), 3)
        self.assertRegex(
            err, "warning: --x: '.*x.csv': the first column looks like a row index; --drop 0")
        self.assertNotIn("looks like", self.check_rows(path, "--drop", 0))

    def test_a_file_with_tabs(self):
        text = self.text("a,b\n").replace(",", "\t")
        self.check_rows(self.write("x.tsv", text))
        self.check_rows(self.write("x.csv", text))

    def test_first_row_of_numbers_is_kept(self):
        """nan and inf are no names. inf is refused with its column."""
        self.check_rows(self.write("x.csv", self.text()))
        self.refuse_cell("nan,nan\n1,2\n3,4\n", "line 1, column 1 is missing")
        for value in ("inf", "-inf"):
            line = self.refuse(
                ["--x", self.write("x.csv", f"{value},{value}\n1,2\n3,4\n")],
                "--x", "line 1, column 1", "wants finite numbers")
            self.assertIn(f"is {value}, wants", line)
            self.assertNotIn("--missing", line)

    def test_blank_lines_and_comments(self):
        first = "# measured in May\n\nage,size\n  \n"
        self.check_rows(self.write("x.csv", self.text(first) + "\n# the end\n\n"))

    def test_rows_are_named_by_lines(self):
        """Where a number is bad, its line in the file is named, and the name of its column."""
        text = "# first\n\nage,size\n1,2\n\n3,4\n# between\n5,inf\n7,8\n"
        path = self.write("x.csv", text)
        self.refuse(
            ["--x", path],
            "--x: a number in line 8, column 2 ('size'; lines and columns count from 1) is inf, "
            "wants finite numbers",
        )
        path = self.write("x.csv", text.replace("inf", "1e200"))
        self.refuse(["--x", path], "--x", "line 8, column 2", "'size'", "1e+200", "up to 1e+100")
        # Chunks do not matter, and neither do rows that are left out.
        with mock.patch("arrays.CHUNK", 2):
            self.refuse(["--x", path], "--x", "line 8, column 2", "'size'", "1e+200")
            path = self.write("x.csv", text.replace("inf", "1e200").replace("3,4", "3,"))
            self.refuse(
                ["--x", path, "--missing", "drop"], "line 8, column 2", "'size'", "1e+200")
        # The same number in a file without a header has no name.
        path = self.write("x.csv", "1,2\n\n3,4\n5,inf\n")
        self.refuse(
            ["--x", path], "--x", "line 4, column 2 (lines and columns count from 1) is inf")

    def test_columns_of_y_and_residual(self):
        """Messages name the flag whose file holds the bad number."""
        x = self.write("x.csv", self.text())
        bad = self.write("bad.csv", "target\n1\n2\n\ninf\n4\n")
        for flags in (["--model", "cvae", "--y"], ["--collapsed", 1, "--residual"]):
            self.refuse(["--x", x, *flags, bad], flags[-1], "line 5, column 1", "'target'", "inf")
        missing = self.write("missing.csv", "target\n1\n2\n\nnan\n4\n")
        self.refuse(
            ["--x", x, "--model", "cvae", "--y", missing],
            "--y", "line 5, column 1 ('target') is missing", "--missing drop")

    def test_byte_order_mark(self):
        """Spreadsheets begin a file with one. It is not a part of the first number or name."""
        for newline in ("\n", "\r\n"):
            text = self.text(newline=newline)
            for encoding in ("utf-8-sig", "utf-16"):
                self.check_rows(self.write("x.csv", text, encoding))
                self.check_rows(self.write("x.csv", "age,size" + newline + text, encoding))
        path = self.write("x.csv", "age,size\nx,2\n3,4\n", "utf-8-sig")
        self.refuse(["--x", path], "line 2, column 1 ('age') is 'x'")

    def test_accents_in_the_header(self):
        """The file is read as UTF-8, also where the computer's own encoding is another one."""
        header = "Größe,élévation\n"
        self.check_rows(self.write("x.csv", self.text(header)))
        path = self.write("x.csv", header + "1,2\n3,ö\n5,6\n")
        self.refuse(["--x", path], "line 3, column 2 ('élévation') is 'ö'")
        path = self.write("x.csv", header + "1,2\ninf,4\n5,6\n")
        self.refuse(["--x", path], "line 3, column 1 ('Größe'; ", "is inf")

        def open_in_ascii(path, mode="r", encoding="ascii", **options):
            encoding = None if "b" in mode else encoding
            return open(path, mode, encoding=encoding, **options)

        with mock.patch("text_files.open", open_in_ascii, create=True):
            self.check_rows(self.write("x.csv", self.text(header)))

    def test_another_encoding(self):
        """A file that is not UTF-8 is refused in one line, not with a traceback."""
        path = self.write("x.csv", self.text("Größe,Länge\n"), encoding="latin-1")
        self.refuse_in_one_line(
            ["--x", path], "--x", "x.csv", "cannot be read as an array", "wants UTF-8")


if __name__ == "__main__":
    unittest.main()
