"""The arrays of a user: their rows are read in chunks, and every number is checked.

predict_collapse.py and post_mortem.py read their data with this module. The data are files in the
formats .npy, .npz, .csv and .pt, or a data set of images. A file that holds no array, or a number
that is not allowed, ends the program with one line. The line names the flag and, in words, the
place in the file.

In this module, `f` is a setting of predict_collapse.py. First come files and data sets, then the
formats of files, chunks and the checks of their numbers, categories, and the two halves of the
rows. The last function checks that the results computed from the arrays are finite.
"""
import csv
import dataclasses
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import common
import numpy as np
import torch

import datasets

# The largest number in a file. Its square is finite in float64.
LARGEST = 1e100

# The number of rows that are read at a time. It is even, see `halves_of`.
CHUNK = 4096

# The largest number of categories of one column, and of all columns together. The arithmetic grows
# with the cube of the latter.
MAX_CATEGORIES = 1_000
MAX_ALL_CATEGORIES = 4_000


# --- Files and data sets ---


@dataclass
class Rows:
    """The rows of a file or of a data set, to be read chunk by chunk.

    flag: the flag that names the file, for messages.
    count: the number of rows.
    columns: the number of columns, once each row is flattened.
    read: read(start, stop) gives the rows from start up to stop, an array (rows, ...).
    place: place(row, column), which count from 0, describes the place of a number in words.
    """
    flag: str
    count: int
    columns: int
    read: Callable
    place: Callable


def open_rows(f, flags):
    """A list of Rows: the data set of --dataset, or the file of each of the flags.

    Ends the program if a file holds no array of numbers, if there are fewer than two rows, or if
    the files differ in their numbers of rows.
    """
    if f.dataset != "none":
        return _open_data_set(f)

    sources = [open_file(f, flag) for flag in flags]
    count = sources[0].count
    for source in sources:
        if source.count != count:
            common.stop(
                f,
                f"--{source.flag}: got {source.count:,} rows, wants {count:,} rows like --x",
            )
    if count < 2:
        common.stop(f, "--x: got one row, wants at least 2 rows")
    return sources


def _open_data_set(f):
    """A list of Rows: the training images of --dataset, for a CVAE their x and their y.

    A Bernoulli decoder gets binary pixels.
    """
    if f.model == "cvae":
        [data] = datasets.load_mnist_quarters([f])
    else:
        [data] = datasets.load_mnist([f])

    sources = []
    for flag, images in zip(("x", "y"), data.train):
        source = _rows_of_array(flag, images.cpu().numpy())
        if f.likelihood == "bernoulli":
            source = _binary_rows(source)
        sources.append(source)
    return sources


def _binary_rows(source):
    """Rows with a 1 for each number of `source` above 0.5, and a 0 for each other number."""
    def read(start, stop):
        return source.read(start, stop) > 0.5

    return dataclasses.replace(source, read=read)


def open_file(f, flag):
    """Rows of the file that a flag names. Ends the program if it holds no array of numbers."""
    path = getattr(f, flag)
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        common.stop(
            f, f"--{flag}: got {path!r}, wants a file whose name ends in {', '.join(READERS)}"
        )
    if os.path.exists(path) and not os.path.isfile(path):
        common.stop(
            f, f"--{flag}: got {path!r}, wants a regular file, not a folder, device or pipe"
        )

    try:
        with warnings.catch_warnings():
            # numpy and torch warn of some files that are refused here, such as sparse tensors.
            warnings.simplefilter("ignore")
            return READERS[suffix](flag, path)
    except MemoryError:
        raise
    except Exception as error:
        # numpy and torch raise many kinds of errors for broken files.
        reason = getattr(error, "strerror", None) or str(error) or "the file is empty"
        common.stop(
            f, f"--{flag}: {path!r} cannot be read as an array: {reason.splitlines()[0]}"
        )


# --- The formats of files ---


def _rows_of_array(flag, array):
    """Rows of an array (rows, ...). Raises ValueError if it holds no rows of numbers."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"its values have the type {array.dtype}, wants real numbers")
    # The targets of a CVAE may be a vector: one number for each row of --x.
    least_dimensions = 2 if flag == "x" else 1
    if array.ndim < least_dimensions or not array.size:
        raise ValueError(f"its shape is {array.shape}, wants one row of numbers per example")

    def read(start, stop):
        return array[start:stop]

    def place(row, column):
        return f"row {row:,} and column {column:,} (both counted from 0)"

    return Rows(flag=flag, count=len(array), columns=array[0].size, read=read, place=place)


def _read_npy(flag, path):
    """Rows of an .npy file. At most one chunk of it is in memory at any time."""
    array = np.load(path, mmap_mode="r")
    if not isinstance(array, np.ndarray):
        raise ValueError("it is not in the format .npy")

    def read(start, stop):
        # A memory map keeps the pages that were read, so each chunk gets its own map.
        return np.load(path, mmap_mode="r")[start:stop]

    return dataclasses.replace(_rows_of_array(flag, array), read=read)


def _read_npz(flag, path):
    """Rows of the only array of an .npz file."""
    archive = np.load(path)
    if isinstance(archive, np.ndarray):
        raise ValueError("it is not in the format .npz")
    with archive:
        names = archive.files
        if len(names) != 1:
            raise ValueError(
                f"it contains {len(names)} arrays ({', '.join(names)}), wants exactly one"
            )
        return _rows_of_array(flag, archive[names[0]])


def _read_pt(flag, path):
    """Rows of the tensor of a .pt file."""
    tensor = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    if not torch.is_tensor(tensor):
        raise ValueError(f"it contains a {type(tensor).__name__}, wants a tensor")
    if tensor.dtype == torch.bfloat16:
        # numpy has no bfloat16.
        tensor = tensor.float()
    return _rows_of_array(flag, tensor.detach().numpy())


def _read_csv(flag, path):
    """Rows of a .csv file. A first line without any number holds the names of the columns.

    Blank lines and lines that begin with # are skipped.
    """
    names = []
    numbers = []
    lines = []
    # Spreadsheets begin a file with a byte order mark, which the encoding utf-8-sig drops.
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        for cells in reader:
            is_blank = len(cells) <= 1 and not "".join(cells).strip()
            if is_blank or cells[0].lstrip().startswith("#"):
                continue
            if not names and not numbers and not any(_is_number(cell) for cell in cells):
                names = cells
                continue
            if numbers and len(cells) != len(numbers[0]):
                raise ValueError(
                    f"line {reader.line_num:,} has {len(cells)} cells, wants {len(numbers[0])} as "
                    f"in line {lines[0]:,}"
                )
            numbers.append(_parse_cells(cells, reader.line_num, names))
            lines.append(reader.line_num)

    if not numbers:
        raise ValueError("it contains no rows of numbers")

    def place(row, column):
        return _csv_place(lines[row], column, names)

    return dataclasses.replace(_rows_of_array(flag, np.stack(numbers)), place=place)


def _parse_cells(cells, line, names):
    """The numbers (columns,) in a line of a .csv file. Raises ValueError that names a bad cell."""
    numbers = []
    for column, cell in enumerate(cells):
        try:
            numbers.append(float(cell))
        except ValueError:
            place = _csv_place(line, column, names)
            raise ValueError(f"{place} is {cell[:40]!r}, wants a number") from None
    return np.array(numbers)


def _is_number(text):
    """Whether a text is a number. "nan" and "inf" are numbers here."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _csv_place(line, column, names):
    """The place of a cell, in words. column counts from 0, and names may be empty."""
    name = f" ({names[column].strip()[:40]!r})" if column < len(names) else ""
    return f"line {line:,}, column {column + 1:,}{name}"


# The function that reads each kind of file.
READERS = {".npy": _read_npy, ".npz": _read_npz, ".csv": _read_csv, ".pt": _read_pt}


# --- Chunks of rows, and the checks of their numbers ---


@dataclass
class Domain:
    """The numbers that a file may hold.

    low, high: the smallest and the largest of them.
    is_whole: whether all of them are whole numbers.
    words: a description of them.
    """
    low: float
    high: float
    is_whole: bool
    words: str


COUNTS = Domain(low=0, high=LARGEST, is_whole=True, words="whole numbers of at least 0")

# The numbers that the file of a flag may hold, for each --likelihood. Any number up to LARGEST is
# allowed elsewhere. With --residual, that also holds for --x.
DOMAINS = {
    ("bernoulli", "x"): Domain(low=0, high=1, is_whole=True, words="0 or 1"),
    ("categorical", "x"): COUNTS,
    ("poisson", "x"): COUNTS,
    ("bernoulli", "residual"): Domain(
        low=-1, high=1, is_whole=False, words="numbers from -1 to 1"
    ),
    ("bernoulli", "fisher"): Domain(
        low=0, high=0.25, is_whole=False, words="numbers from 0 to 0.25"
    ),
    ("poisson", "fisher"): Domain(
        low=0, high=LARGEST, is_whole=False, words="numbers of at least 0"
    ),
}


def chunks(f, sources):
    """The rows of all sources, chunk by chunk: a list with an array (rows, columns) per source.

    Arrays are float64. Ends the program if a number is not finite, if it exceeds LARGEST, or if
    --likelihood does not allow it.
    """
    count = sources[0].count
    progress = common.Progress("reading", count, "rows")
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        parts = []
        for source in sources:
            rows = source.read(start, start + CHUNK).reshape(size, -1).astype(np.float64)
            check_numbers(f, source, rows, start)
            parts.append(rows)
        yield parts
        progress.update(start + size)
    progress.update(count, end=True)


def check_numbers(f, source, rows, start):
    """End the program if one of the rows (rows, columns) from start on holds a bad number."""
    is_bad = ~(np.abs(rows) <= LARGEST)
    domain = None if f.residual and source.flag == "x" else DOMAINS.get((f.likelihood, source.flag))
    if domain:
        # Means over float32 numbers may exceed a limit by a rounding error.
        is_bad |= (rows < domain.low - 1e-6) | (rows > domain.high + 1e-6)
        if domain.is_whole:
            is_bad |= rows != np.floor(rows)
    if not is_bad.any():
        return

    row, column = np.argwhere(is_bad)[0]
    value = rows[row, column]
    if not np.isfinite(value):
        wanted = "finite numbers"
    elif abs(value) > LARGEST:
        wanted = f"numbers up to {LARGEST:g}, so that their squares can be summed"
    else:
        wanted = f"{domain.words} for --likelihood {f.likelihood}"
    common.stop(
        f,
        f"--{source.flag}: a number in {source.place(start + row, column)} is {value:.3g}, wants "
        f"{wanted}",
    )


# --- Categories ---


def find_categories(f, source):
    """The codes of the categories of each column in ascending order, in one pass over the rows.

    Returns a list with an array per column. Ends the program if there are too many.
    """
    codes = [np.empty(0)] * source.columns
    start = 0
    for [rows] in chunks(f, [source]):
        for column, known in enumerate(codes):
            codes[column] = np.union1d(known, rows[:, column])
            if len(codes[column]) > MAX_CATEGORIES:
                place = source.place(start, column)
                common.stop(
                    f,
                    f"--x: the column of the number in {place} has more than {MAX_CATEGORIES:,} "
                    f"different numbers, wants at most {MAX_CATEGORIES:,} categories in a column",
                )
        start += len(rows)

    total = sum(len(column) for column in codes)
    if total > MAX_ALL_CATEGORIES:
        common.stop(
            f,
            f"--x: the columns have {total:,} categories together, wants at most "
            f"{MAX_ALL_CATEGORIES:,}",
        )
    return codes


def indicators(rows, codes):
    """The indicators (n, D) of the categories of rows (n, columns), as numbers 0 and 1.

    codes is a result of `find_categories`. D is the number of categories of all columns.
    """
    parts = []
    for column, known in enumerate(codes):
        parts.append(rows[:, column, None] == known)
    return np.concatenate(parts, axis=1).astype(np.float64)


# --- The two halves of the rows ---


def half_sizes(count):
    """The numbers of rows in the two halves of count rows."""
    return (count + 1) // 2, count // 2


def halves_of(size, random):
    """The places of the rows of each half among the `size` rows of a chunk: two arrays.

    One row of each pair of neighbours is in each half, by chance. Even and odd rows would be no
    fair halves of a file that alternates between two sources, as MNIST seems to do. random is a
    np.random.Generator. The chunks of a file, except the last one, must have an even size.
    """
    is_swapped = random.random((size + 1) // 2) < 0.5
    if size % 2:
        # The last row has no neighbour, and is in the first half.
        is_swapped[-1] = False
    first = 2 * np.arange(len(is_swapped)) + is_swapped
    second = 2 * np.arange(len(is_swapped)) + ~is_swapped
    return first, second[:size // 2]


# --- Results ---


def check_finite(settings, results):
    """End the program if one of the results, {name: numbers}, is infinite or not a number.

    The message names the flags that make the settings unusual. Only the betas at which units
    collapse may be infinite: such a unit never collapses.
    """
    for name, numbers in results.items():
        numbers = torch.as_tensor(numbers, dtype=torch.float64)
        is_wrong = numbers.isnan() if name.startswith("collapse") else ~numbers.isfinite()
        if is_wrong.any():
            flags = ", ".join(_changed_scalars(settings)) or "--x"
            common.stop(
                settings[0],
                f"{flags}: {name} is not finite for these values, wants less extreme values",
            )


def _changed_scalars(settings):
    """The flags for scalars of the objective that are not at their default in all settings.

    They are those flags whose default is a number that need not be whole.
    """
    flags = []
    for field in dataclasses.fields(settings[0]):
        is_scalar = type(field.default) is float
        if is_scalar and any(getattr(f, field.name) != field.default for f in settings):
            flags.append(f"--{field.name}")
    return flags
