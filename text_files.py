"""Text files of numbers, as spreadsheets, pandas, numpy and R write them.

`read_table` reads a .csv or a .tsv file. A program that calls it chooses the columns, and says
whether a number may be missing. First come the table and its reading, then the lines of a file,
the first line, and the cells of a line.

In messages, lines and columns count from 1, as in an editor.
"""
import csv
import math
import re
from dataclasses import dataclass

import numpy as np

# The texts of a cell whose number is missing, in lower case.
MISSING = ("", "na", "n/a", "nan", "null", "none")

# What messages count from.
COUNTING = "lines and columns count from 1"


class MissingCell(ValueError):
    """A chosen cell is empty, or says that its number is missing. The message says which one."""


class WordCell(ValueError):
    """A chosen cell holds a text that is no number. The message says which one."""


@dataclass
class Table:
    """The numbers of a text file.

    numbers: (rows, chosen columns), float64. A missing number is nan.
    lines: the line of each row in the file, which counts from 1.
    columns: the place of each chosen column in the file, which counts from 0.
    names: the names of all columns of the file, or an empty list.
    remark: a sentence on a first line that is taken for names although it holds numbers, or on a
        first column that is left out. It is "" for most files.
    """
    numbers: np.ndarray
    lines: list
    columns: list
    names: list
    remark: str

    def place(self, row, column):
        """The place of a number in the file, in words. row and column count from 0."""
        return _place(self.lines[row], self.columns[column], self.names, COUNTING)

    def begins_with_row_numbers(self):
        """Whether a file without names begins each row with its number, from 0 or 1 on.

        A file of fewer than three rows, or of one column, is too small to say.
        """
        count, width = self.numbers.shape
        if self.names or self.columns[0] != 0 or count < 3 or width < 2:
            return False
        first_column = self.numbers[:, 0]
        numbers = np.arange(count)
        return bool((first_column == numbers).all() or (first_column == numbers + 1).all())


def read_table(path, choose, allows_missing):
    """The Table of a .csv or .tsv file.

    choose(names, count) gives the places of the chosen columns, in any order, from the names of all
    columns and their number. The names are an empty list if the file has none. The other columns
    need not hold numbers. Raises MissingCell for a missing number unless allows_missing, WordCell
    for another text in the place of a number, and ValueError for a file that holds no table.
    """
    try:
        table = _read_lines(_lines_of_cells(path), choose)
    except UnicodeDecodeError:
        raise ValueError("its text has another encoding, wants UTF-8") from None

    is_missing = np.isnan(table.numbers)
    if is_missing.any() and not allows_missing:
        row, column = np.argwhere(is_missing)[0]
        place = _place(table.lines[row], table.columns[column], table.names)
        raise MissingCell(f"the cell in {place} is missing ({COUNTING})")
    return table


def _read_lines(lines, choose):
    """The Table of the lines of a file, an iterable of (number of the line, its cells)."""
    names = []
    columns = None
    numbers = []
    numbers_of_lines = []
    for line, cells in lines:
        # 1. The first line fixes the columns.
        if columns is None:
            width = len(cells)
            width_line = line
            names, skipped, remark = _read_first_line(cells)
            chosen = choose(names[skipped:], width - skipped)
            columns = [column + skipped for column in chosen]
            if names:
                continue

        # 2. Each other line has as many cells.
        if len(cells) != width:
            raise ValueError(
                f"line {line:,} has {len(cells)} cells, wants {width} as in line {width_line:,}"
            )
        if not numbers:
            width_line = line

        # 3. The chosen cells hold numbers.
        numbers.append(_read_cells(line, cells, columns, names))
        numbers_of_lines.append(line)

    if not numbers:
        raise ValueError("it contains no rows of numbers")
    return Table(
        numbers=np.stack(numbers),
        lines=numbers_of_lines,
        columns=columns,
        names=names,
        remark=remark,
    )


# --- The lines of a file ---


def _lines_of_cells(path):
    """Yield (number of the line, its cells) for each line that counts.

    Blank lines and lines that begin with # do not count.
    """
    with open(path, newline="", encoding=_encoding(path)) as file:
        delimiter = "\t" if path.lower().endswith(".tsv") else _delimiter(file)
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter)
        for cells in reader:
            is_blank = len(cells) <= 1 and not "".join(cells).strip()
            if not is_blank and not cells[0].lstrip().startswith("#"):
                yield reader.line_num, cells


def _encoding(path):
    """The encoding of a text file: UTF-16 if it begins with the mark of UTF-16, else UTF-8."""
    with open(path, "rb") as file:
        mark = file.read(2)
    if mark in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    # Spreadsheets begin a file in UTF-8 with a mark, too, which this encoding drops.
    return "utf-8-sig"


def _delimiter(file):
    """The character between two cells, from the first line that counts."""
    for line in file:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        unquoted = re.sub('"[^"]*"', "", line)
        for delimiter in ";\t":
            if delimiter in unquoted:
                return delimiter
        break
    return ","


# --- The first line ---


def _read_first_line(cells):
    """(names, skipped, remark) from the cells of the first line.

    names are the names of the columns, or an empty list if the line is a row of numbers. skipped is
    the number of columns that hold no data: 1 if the first column numbers the rows, as in a file
    that pandas or R has written, and 0 otherwise. For remark see Table.
    """
    if len(cells) > 1 and not cells[0].strip():
        if _are_names(cells[1:]) or _count_from_0(cells[1:]):
            remark = (
                "the first column has no name, so it is taken for names of the rows and left out"
            )
            return cells, 1, remark
    if _are_names(cells):
        return cells, 0, ""
    if len(cells) > 1 and _count_from_0(cells):
        remark = "the first line counts 0, 1, ..., so it is taken for names of the columns"
        return cells, 0, remark
    return [], 0, ""


def _are_names(cells):
    """Whether no cell is a number, and at least one holds more than a sign for a missing one."""
    if any(_is_number(cell) or _is_decimal_comma(cell) for cell in cells):
        return False
    return not all(_is_missing(cell) for cell in cells)


def _count_from_0(cells):
    """Whether the cells are exactly 0, 1, 2 and so on."""
    return [cell.strip() for cell in cells] == [str(column) for column in range(len(cells))]


# --- The cells of a line ---


def _read_cells(line, cells, columns, names):
    """The numbers (columns,) in the chosen cells of a line. A missing number is nan.

    Raises WordCell for a cell that holds something else.
    """
    try:
        return np.array([float(cells[column]) for column in columns])
    except ValueError:
        pass

    # This is slower, and only for lines with a cell that is no number.
    numbers = []
    for column in columns:
        cell = cells[column]
        if _is_missing(cell):
            numbers.append(math.nan)
        elif _is_number(cell):
            numbers.append(float(cell))
        else:
            raise WordCell(
                f"the cell in {_place(line, column, names)} is {cell[:40]!r} ({COUNTING}), "
                f"wants {_wanted(cell)}"
            )
    return np.array(numbers)


def _wanted(cell):
    """What a cell should hold in place of a text that is no number."""
    if _is_decimal_comma(cell):
        return "a number with a decimal point, not a comma"
    parts = cell.split()
    if len(parts) > 1 and all(_is_number(part) for part in parts):
        return "a number, and a comma, a semicolon or a tab between two columns"
    return "a number"


def _is_number(text):
    """Whether a text is a number. "nan" and "inf" are numbers here."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_missing(cell):
    """Whether a cell says that its number is missing, see MISSING."""
    return cell.strip().lower() in MISSING


def _is_decimal_comma(cell):
    """Whether a text is a number with a decimal comma, such as 2,5."""
    return cell.count(",") == 1 and "." not in cell and _is_number(cell.replace(",", "."))


def _place(line, column, names, note=""):
    """The place of a cell, in words. column counts from 0, and names may be empty."""
    details = []
    if names:
        details.append(repr(names[column].strip()[:40]))
    if note:
        details.append(note)
    in_brackets = f" ({'; '.join(details)})" if details else ""
    return f"line {line:,}, column {column + 1:,}{in_brackets}"
