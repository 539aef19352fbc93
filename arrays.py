"""The arrays of a user: their rows are read in chunks, and every number is checked.

predict_collapse.py and its modules read their data with this one. The data are a file in one of the
formats .npy, .npz, .pt, .csv and .tsv, a folder of images, or a data set of images. A file that
holds no array, or a number that is not allowed, ends the program with one line. The line names the
flag and, in words, the place in the file.

In this module, `f` is a setting of predict_collapse.py. First come files and data sets, then the
formats of arrays, text files and folders of images, the choice of columns and missing numbers. Then
come chunks and the checks of their numbers, remarks on the numbers, wide rows, categories, and the
two halves of the rows. The last function checks that the results computed from the arrays are
finite.
"""
import csv
import dataclasses
import difflib
import os
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import common
import numpy as np
import torch

import datasets
import losses
import text_files

# The largest number in a file. Its square is finite in float64.
LARGEST = 1e100

# The number of rows that are read at a time, at most. It is even, see `halves_of`.
CHUNK = 4096

# Wide rows are read fewer at a time, so that a chunk has about this many numbers at most.
CHUNK_NUMBERS = 2**23

# The largest number of columns, unless there are as few rows. The arithmetic grows with the cube of
# the smaller of the two.
MAX_COLUMNS = 8_000

# The largest number of categories of one column, and of all columns together. The arithmetic grows
# with the cube of the latter.
MAX_CATEGORIES = 1_000
MAX_ALL_CATEGORIES = 4_000

# The largest value of a pixel in a file of whole numbers, by which --scale divides.
LARGEST_PIXEL = 255


# --- Files and data sets ---


@dataclass
class Extent:
    """What is known of all numbers of a source after a pass over its rows. See `remark_on`.

    low, high: the smallest and the largest number.
    is_whole: whether all of them are whole numbers.
    is_uint8: whether the source holds them as bytes.
    is_open: whether a remark may still apply. If not, the rest need not be up to date.
    """
    low: float = np.inf
    high: float = -np.inf
    is_whole: bool = True
    is_uint8: bool = False
    is_open: bool = True


@dataclass
class Rows:
    """The rows of a file or of a data set, to be read chunk by chunk.

    flag: the flag that names the file, for messages.
    count: the number of rows.
    columns: the number of columns, once each row is flattened.
    read: read(start, stop) gives the rows from start up to stop, an array (rows, ...).
    place: place(row, column), which count from 0, describes the place of a number in words.
    width: the number of columns in the file, which are more than `columns` if some are left out.
    extent: the Extent of the numbers.
    """
    flag: str
    count: int
    columns: int
    read: Callable
    place: Callable
    width: int
    extent: Extent = dataclasses.field(default_factory=Extent)


def open_rows(f, flags):
    """A list of Rows: the data set of --dataset, or the file of each of the flags.

    Ends the program if a file holds no array of numbers, if there are fewer than two rows, or if
    the files differ in their numbers of rows. With --missing drop, rows with a missing number in
    one of the files are left out of all of them.
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
    if f.missing == "drop":
        return _without_missing(f, sources)
    return sources


def _open_data_set(f):
    """A list of Rows: the training images of --dataset, for a CVAE their x and their y.

    With --likelihood bernoulli the pixels are binary. With --loss bce_sum or bce_mean they are not,
    because most scripts with this loss read grey pixels.
    """
    if f.model == "cvae":
        [data] = datasets.load_mnist_quarters([f])
    else:
        [data] = datasets.load_mnist([f])

    sources = []
    for flag, images in zip(("x", "y"), data.train):
        source = _rows_of_array(flag, images.cpu().numpy())
        if f.likelihood == "bernoulli" and f.loss == "none":
            source = _binary_rows(source)
        sources.append(source)
    return sources


def _binary_rows(source):
    """Rows with a 1 for each number of `source` above 0.5, and a 0 for each other number."""
    def read(start, stop):
        return source.read(start, stop) > 0.5

    return dataclasses.replace(source, read=read)


def open_file(f, flag):
    """Rows of the file or the folder that a flag names. For --x they have the chosen columns.

    Ends the program if it holds no array of numbers.
    """
    path, name = _split_name(getattr(f, flag))
    if flag in ("x", "y") and os.path.isdir(path):
        source = _open_images(f, flag, path)
    else:
        source = _open_array(f, flag, path, name)
        if path.lower().endswith(TEXT_SUFFIXES):
            # Its columns are chosen while it is read, since the others may hold no numbers.
            return source
    return _with_columns(f, source) if flag == "x" else source


def _split_name(path):
    """(path of the file, name of the array in it), as in data.npz:x. The name may be empty."""
    file, _, name = path.rpartition(":")
    if file.lower().endswith((".npz", ".pt")) and not os.path.exists(path):
        return file, name
    return path, ""


def _open_array(f, flag, path, name):
    """Rows of the file at a path. name is the name of the array in it, or ""."""
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        or_folder = " or a folder of images" if flag in ("x", "y") else ""
        common.stop(
            f,
            f"--{flag}: got {path!r}, wants a file whose name ends in {', '.join(READERS)}"
            f"{or_folder}",
        )
    if os.path.exists(path) and not os.path.isfile(path):
        common.stop(
            f, f"--{flag}: got {path!r}, wants a regular file, not a folder, device or pipe"
        )

    try:
        with warnings.catch_warnings():
            # numpy and torch warn of some files that are refused here, such as sparse tensors.
            warnings.simplefilter("ignore")
            return READERS[suffix](f, flag, path, name)
    except MemoryError:
        raise
    except text_files.MissingCell as error:
        common.stop(f, f"--{flag}: {path!r}: {error}, wants a number{_missing_remedy(flag)}")
    except text_files.WordCell as error:
        remedy = "; --drop leaves out a column" if flag == "x" else ""
        common.stop(f, f"--{flag}: {path!r} cannot be read as an array: {error}{remedy}")
    except Exception as error:
        # numpy and torch raise many kinds of errors for broken files.
        reason = getattr(error, "strerror", None) or str(error) or "the file is empty"
        common.stop(
            f, f"--{flag}: {path!r} cannot be read as an array: {reason.splitlines()[0]}"
        )


def note(message):
    """Print a remark on the data on stderr."""
    print(f"note: {message}", file=sys.stderr)


def warn(message):
    """Print a warning on stderr."""
    print(f"warning: {message}", file=sys.stderr)


# --- The formats of arrays ---


def _rows_of_array(flag, array):
    """Rows of an array (rows, ...). Raises ValueError if it holds no rows of numbers."""
    _check_dtype(array)
    # The targets of a CVAE may be a vector: one number for each row of --x.
    least_dimensions = 2 if flag == "x" else 1
    if array.ndim < least_dimensions or not array.size:
        raise ValueError(f"its shape is {array.shape}, wants one row of numbers per example")

    def read(start, stop):
        return array[start:stop]

    columns = array[0].size
    return Rows(
        flag=flag, count=len(array), columns=columns, read=read, place=_place, width=columns
    )


def _check_dtype(array):
    """Raise ValueError if an array holds no real numbers."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"its values have the type {array.dtype}, wants real numbers")


def _place(row, column):
    """The place of a number in an array, in words."""
    return f"row {row:,} and column {column:,} (both counted from 0)"


def _read_npy(f, flag, path, name):
    """Rows of an .npy file. At most one chunk of it is in memory at any time."""
    array = np.load(path, mmap_mode="r")
    if not isinstance(array, np.ndarray):
        raise ValueError("it is not in the format .npy")

    def read(start, stop):
        # A memory map keeps the pages that were read, so each chunk gets its own map.
        return np.load(path, mmap_mode="r")[start:stop]

    return dataclasses.replace(_rows_of_array(flag, array), read=read)


def _read_npz(f, flag, path, name):
    """Rows of an array of an .npz file, or of the sparse matrix that it holds."""
    archive = np.load(path)
    if isinstance(archive, np.ndarray):
        raise ValueError("it is not in the format .npz")
    with archive:
        names = archive.files
        if not name and _is_sparse(names):
            return _rows_of_sparse(flag, {part: archive[part] for part in names})
        return _rows_of_array(flag, archive[_choose_name(flag, path, names, name)])


def _choose_name(flag, path, names, name):
    """The name of the array to read from a file, out of the names of all arrays in it.

    name is the name that the command line gives, or "". Raises ValueError if it is none of them, or
    if there are several and it is "".
    """
    if name in names:
        return name
    if not names:
        raise ValueError("it contains no arrays")

    listed = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    if name:
        raise ValueError(f"it contains no array {name!r}, wants one of {listed}")
    if len(names) > 1:
        raise ValueError(
            f"it contains {len(names):,} arrays ({listed}), wants the name of one, as in "
            f"--{flag} {path}:{names[0]}"
        )
    return names[0]


def _is_sparse(names):
    """Whether the arrays of an .npz file, by their names, are those of a sparse matrix."""
    if {"format", "shape", "data"} <= set(names):
        # scipy.sparse.save_npz gives these names.
        return True
    return {"row", "col", "data"} <= set(names) <= {"row", "col", "data", "shape"}


def _rows_of_sparse(flag, parts):
    """Rows of a sparse matrix. Each chunk of rows becomes dense when it is read.

    parts are the arrays of scipy.sparse.save_npz, {name: array}. Numbers at the same place are
    summed. Raises ValueError if they are no matrix in the format csr, csc or coo.
    """
    data = parts["data"]
    _check_dtype(data)
    rows, columns = _places_of_entries(parts)
    shape = parts["shape"] if "shape" in parts else (rows.max() + 1, columns.max() + 1)
    count, width = (int(size) for size in shape)
    is_matrix = count > 0 and width > 0 and len(data) == len(rows) == len(columns)
    if not is_matrix or not (_are_below(rows, count) and _are_below(columns, width)):
        raise ValueError(f"its numbers do not fit {count:,} rows of {width:,} columns")

    # The entries in the order of their rows. Row i has those from starts[i] up to starts[i + 1].
    order = np.argsort(rows, kind="stable")
    data, rows, columns = data[order], rows[order], columns[order]
    starts = np.searchsorted(rows, np.arange(count + 1))

    def read(start, stop):
        entries = slice(starts[start], starts[stop])
        dense = np.zeros((stop - start, width))
        np.add.at(dense, (rows[entries] - start, columns[entries]), data[entries])
        return dense

    return Rows(flag=flag, count=count, columns=width, read=read, place=_place, width=width)


def _are_below(places, size):
    """Whether all places count from 0 and are below a size."""
    return bool(((places >= 0) & (places < size)).all())


def _places_of_entries(parts):
    """(row, column) of each entry of a sparse matrix, two arrays of whole numbers."""
    kind = parts["format"].item() if "format" in parts else "coo"
    kind = kind.decode() if isinstance(kind, bytes) else kind
    if kind == "coo":
        return parts["row"].astype(np.int64), parts["col"].astype(np.int64)
    if kind not in ("csr", "csc"):
        raise ValueError(
            f"its sparse format is {kind}, wants csr, csc or coo; convert the matrix with .tocsr()"
        )
    # indptr says where the entries of each row begin, or of each column for csc.
    lengths = np.diff(parts["indptr"])
    lines = np.repeat(np.arange(len(lengths)), lengths)
    indices = parts["indices"].astype(np.int64)
    return (lines, indices) if kind == "csr" else (indices, lines)


def _read_pt(f, flag, path, name):
    """Rows of a tensor of a .pt file, which holds one tensor, or several with names."""
    contents = _load_pt(path)
    if isinstance(contents, (list, tuple)):
        contents = dict(enumerate(contents))
    if isinstance(contents, dict):
        tensors = {str(key): value for key, value in contents.items() if torch.is_tensor(value)}
        tensor = tensors[_choose_name(flag, path, list(tensors), name)]
    elif name:
        raise ValueError(f"it contains a single object without a name, wants --{flag} {path}")
    else:
        tensor = contents

    if not torch.is_tensor(tensor):
        raise ValueError(f"it contains a {type(tensor).__name__}, wants a tensor")
    if tensor.dtype == torch.bfloat16:
        # numpy has no bfloat16.
        tensor = tensor.float()
    return _rows_of_array(flag, tensor.detach().numpy())


def _load_pt(path):
    """The contents of a .pt file. Raises ValueError if it holds objects other than tensors."""
    # Only zip archives, the format since PyTorch 1.6, can be mapped into memory.
    is_archive = zipfile.is_zipfile(path)
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=is_archive)
    except (MemoryError, OSError):
        raise
    except Exception:
        # torch raises many kinds of errors, with messages of many lines.
        other_format = "" if is_archive else "it is not in the format .pt, or "
        raise ValueError(
            f"{other_format}it holds objects other than tensors; save one tensor with "
            "torch.save(x, FILE), or an array with np.save"
        ) from None


# --- Text files ---

TEXT_SUFFIXES = (".csv", ".tsv")


def _read_text(f, flag, path, name):
    """Rows of a text file. For --x they have the chosen columns."""
    def choose(names, count):
        return choose_columns(f, names, count) if flag == "x" else list(range(count))

    table = text_files.read_table(path, choose, allows_missing=f.missing == "drop")
    if table.remark:
        note(f"--{flag}: {path!r}: {table.remark}")
    if flag == "x" and table.begins_with_row_numbers():
        warn(f"--x: {path!r}: the first column looks like a row index; --drop 0 leaves it out")
    return dataclasses.replace(_rows_of_array(flag, table.numbers), place=table.place)


# The function that reads each kind of file. It gives Rows from f, the flag, the path of the file
# and the name of an array in it, which may be "".
READERS = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".csv": _read_text,
    ".tsv": _read_text,
    ".pt": _read_pt,
}


# --- Folders of images ---

# The formats that torchvision decodes itself.
TORCHVISION_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def _open_images(f, flag, folder):
    """Rows of the images in a folder and its subfolders, in the order of their paths.

    Ends the program if there are none, if one of them cannot be decoded, or if they differ in their
    shapes.
    """
    paths = _image_paths(folder)
    if not paths:
        common.stop(
            f, f"--{flag}: the folder {folder!r} contains no images, wants some, such as .png files"
        )
    [first] = _decode_images(f, flag, paths[:1])

    def read(start, stop):
        images = _decode_images(f, flag, paths[start:stop])
        for path, image in zip(paths[start:stop], images):
            if (image.shape, image.dtype) != (first.shape, first.dtype):
                common.stop(
                    f,
                    f"--{flag}: the image {path!r} has the shape {image.shape} and the type "
                    f"{image.dtype}, wants {first.shape} and {first.dtype} like {paths[0]!r}",
                )
        return np.stack(images)

    def place(row, column):
        return f"the image {paths[row]!r}, column {column:,} (counted from 0)"

    columns = first.size
    return Rows(
        flag=flag, count=len(paths), columns=columns, read=read, place=place, width=columns
    )


def _image_paths(folder):
    """The paths of all images in a folder and its subfolders, as sorted texts.

    Hidden files, such as those that macOS adds to archives, are left out.
    """
    # torchvision is slow to import.
    from torchvision.datasets.folder import IMG_EXTENSIONS

    paths = []
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith("."):
                paths.append(os.path.join(parent, name))
    return sorted(paths)


def _decode_images(f, flag, paths):
    """The pixels of images: a list of arrays (channels, height, width).

    Ends the program if one of them is broken. Threads would only help with larger images than the
    arithmetic allows.
    """
    images = []
    with warnings.catch_warnings():
        # torchvision 0.29 warns that its decoder will move to another package.
        warnings.simplefilter("ignore")
        for path in paths:
            try:
                images.append(_decode_image(path))
            except MemoryError:
                raise
            except Exception:
                # Each format has its own errors.
                common.stop(f, f"--{flag}: the file {path!r} cannot be decoded as an image")
    return images


def _decode_image(path):
    """The pixels of an image (channels, height, width). Raises many kinds of errors."""
    if not os.path.isfile(path):
        # Opening a pipe would wait for ever.
        raise ValueError(path)
    if path.lower().endswith(TORCHVISION_SUFFIXES):
        from torchvision.io import decode_image
        return decode_image(torch.from_numpy(np.fromfile(path, np.uint8))).numpy()

    import matplotlib.image
    # (height, width), or (height, width, channels).
    return np.atleast_3d(matplotlib.image.imread(path)).transpose(2, 0, 1)


# --- The choice of columns ---


def choose_columns(f, names, count):
    """The places of the columns that --columns chooses and --drop does not leave out: a list.

    names are the names of the `count` columns, or empty. Columns are in the order of --columns.
    Ends the program if a column does not exist, or if none is left.
    """
    chosen = list(range(count))
    if f.columns:
        chosen = _find_columns(f, "columns", names, count)
    if f.drop:
        dropped = set(_find_columns(f, "drop", names, count))
        chosen = [column for column in chosen if column not in dropped]
        if not chosen:
            common.stop(f, f"--drop: got {f.drop!r}, wants at least one column to be left")
    return chosen


def _find_columns(f, flag, names, count):
    """The places of the columns in the list of a flag. For names and count see `choose_columns`.

    The names in the list may be quoted, as in a .csv file.
    """
    known = [name.strip() for name in names] or [str(column) for column in range(count)]
    places = {}
    for place, name in enumerate(known):
        places.setdefault(name, []).append(place)

    chosen = []
    text = getattr(f, flag)
    for name in next(csv.reader([" ".join(text.splitlines())], skipinitialspace=True), []):
        name = name.strip()
        if name not in places:
            wanted = _nearest_columns(name, known) if names else f"numbers from 0 to {count - 1:,}"
            common.stop(f, f"--{flag}: --x has no column {name[:40]!r}, wants {wanted}")
        if len(places[name]) > 1:
            common.stop(
                f, f"--{flag}: --x has {len(places[name])} columns {name[:40]!r}, wants other names"
            )
        if places[name][0] in chosen:
            common.stop(f, f"--{flag}: got {name[:40]!r} twice, wants each column once")
        chosen.append(places[name][0])
    if not chosen:
        common.stop(f, f"--{flag}: got {text!r}, wants columns such as {known[0][:40]}")
    return chosen


def _nearest_columns(name, known):
    """Some names of columns that are similar to a name, in words, or else the first ones."""
    nearest = difflib.get_close_matches(name, known, n=3) or known[:6]
    return "names such as " + ", ".join(other[:40] for other in nearest)


def _with_columns(f, source):
    """Rows with the chosen columns of `source`."""
    chosen = choose_columns(f, [], source.columns)
    if chosen == list(range(source.columns)):
        return source

    def read(start, stop):
        rows = source.read(start, stop)
        return rows.reshape(len(rows), -1)[:, chosen]

    def place(row, column):
        return source.place(row, chosen[column])

    return dataclasses.replace(source, columns=len(chosen), read=read, place=place)


# --- Missing numbers ---


def _missing_remedy(flag):
    """The flag that helps with a missing number in the file of a flag, as the end of a message."""
    return ", or --missing drop to leave out its row" if flag in ("x", "y") else ""


def _without_missing(f, sources):
    """The sources without the rows in which one of them lacks a number. Prints how many they are.

    Ends the program if fewer than two rows are left.
    """
    count = sources[0].count
    is_missing = np.zeros(count, dtype=bool)
    for source in sources:
        # Whole numbers are never missing.
        if source.read(0, 1).dtype.kind != "f":
            continue
        size = chunk_size([source])
        for start in range(0, count, size):
            rows = source.read(start, min(start + size, count))
            rows = rows.reshape(len(rows), -1)
            is_missing[start:start + size] |= np.isnan(rows).any(1)

    kept = np.flatnonzero(~is_missing)
    if len(kept) == count:
        return sources
    if len(kept) < 2:
        common.stop(
            f, f"--missing: drop leaves {len(kept)} of {count:,} rows, wants at least 2 rows"
        )
    note(f"{count - len(kept):,} of {count:,} rows lack a number and are left out")
    return [_with_rows(source, kept) for source in sources]


def _with_rows(source, kept):
    """Rows with the rows of `source` at the places `kept`, an ascending array."""
    def read(start, stop):
        places = kept[start:stop]
        first = places[0]
        return source.read(first, places[-1] + 1)[places - first]

    def place(row, column):
        return source.place(kept[row], column)

    return dataclasses.replace(source, count=len(kept), read=read, place=place)


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


ANY = Domain(low=-LARGEST, high=LARGEST, is_whole=False, words="finite numbers")
COUNTS = Domain(low=0, high=LARGEST, is_whole=True, words="whole numbers of at least 0")
PIXELS = Domain(low=0, high=LARGEST_PIXEL, is_whole=False, words="numbers from 0 to 255")

# The numbers that the file of a flag may hold, for each --likelihood. Any number up to LARGEST is
# allowed elsewhere. With --residual, that also holds for --x.
DOMAINS = {
    # The loss -x log p - (1 - x) log(1 - p) has a meaning for grey pixels, too.
    ("bernoulli", "x"): Domain(low=0, high=1, is_whole=False, words="numbers from 0 to 1"),
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

    Arrays are float64. With --scale, those of --x and --y are divided by 255. Ends the program if a
    number is not finite, if it exceeds LARGEST, or if --likelihood or --scale does not allow it.
    After the last chunk of the first pass, remarks on the numbers are printed.
    """
    count = sources[0].count
    size = chunk_size(sources)
    progress = common.Progress("reading", count, "rows")
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield [_read_chunk(f, source, start, stop) for source in sources]
        progress.update(stop)
    progress.update(count, end=True)
    for source in sources:
        remark_on(f, source)


def chunk_size(sources):
    """The number of rows in a chunk. It is even, see `halves_of`."""
    width = sum(source.width for source in sources)
    return min(CHUNK, max(2, CHUNK_NUMBERS // width // 2 * 2))


def _read_chunk(f, source, start, stop):
    """The rows of a source from start up to stop, an array (rows, columns) of float64."""
    # The numbers are checked in the type of the file, where most types are smaller than float64.
    numbers = source.read(start, stop).reshape(stop - start, -1)
    check_numbers(f, source, numbers, start)
    rows = numbers.astype(np.float64)
    if _is_scaled(f, source):
        rows /= LARGEST_PIXEL
        numbers = rows
    _extend(f, source, numbers)
    return rows


def _is_scaled(f, source):
    """Whether --scale divides the numbers of a source by 255."""
    return f.scale and f.dataset == "none" and source.flag in ("x", "y")


def read_all(f, sources):
    """All rows of the sources: a list with an array (rows, columns) of float64 per source.

    The checks and the remarks are those of `chunks`.
    """
    arrays = [np.empty((source.count, source.columns)) for source in sources]
    start = 0
    for parts in chunks(f, sources):
        stop = start + len(parts[0])
        for array, rows in zip(arrays, parts):
            array[start:stop] = rows
        start = stop
    return arrays


def check_numbers(f, source, rows, start):
    """End the program if one of the rows (rows, columns) from start on holds a bad number."""
    domain = _domain(f, source)
    # Means over float32 numbers may exceed a limit by a rounding error.
    low = domain.low - 1e-6
    high = domain.high + 1e-6
    # A comparison with nan is false.
    is_within = float(rows.min()) >= low and float(rows.max()) <= high
    if is_within and (not domain.is_whole or _are_whole(rows)):
        return

    rows = rows.astype(np.float64)
    is_bad = ~((rows >= low) & (rows <= high))
    if domain.is_whole:
        is_bad |= rows != np.floor(rows)
    row, column = np.argwhere(is_bad)[0]
    value = rows[row, column]
    common.stop(
        f,
        f"--{source.flag}: a number in {source.place(start + row, column)} is {value:.3g}, wants "
        f"{_wanted(f, source, domain, value)}",
    )


def _are_whole(rows):
    """Whether all numbers of an array are whole."""
    return rows.dtype.kind != "f" or bool((rows == np.floor(rows)).all())


def _domain(f, source):
    """The Domain of the numbers in the file of a source, before --scale divides them."""
    if _is_scaled(f, source):
        return PIXELS
    if f.residual and source.flag == "x":
        return ANY
    return DOMAINS.get((f.likelihood, source.flag), ANY)


def _wanted(f, source, domain, value):
    """What a source should hold in place of a bad number, in words."""
    if np.isnan(value):
        return f"finite numbers{_missing_remedy(source.flag)}"
    if np.isinf(value):
        return "finite numbers"
    if abs(value) > LARGEST:
        return f"numbers up to {LARGEST:g}, so that their squares can be summed"
    if domain is PIXELS:
        return f"{domain.words} for --scale"
    is_pixel = f.likelihood == "bernoulli" and source.flag == "x" and 1 < value <= LARGEST_PIXEL
    remedy = "; --scale divides pixels from 0 to 255 by 255" if is_pixel else ""
    return f"{domain.words} for {losses.decoder_flag(f)}{remedy}"


# --- Remarks on the numbers ---


def _gets_remarks(f, source):
    """Whether a source holds what a Gaussian decoder describes, from a file of the user."""
    decoded = "y" if f.model == "cvae" else "x"
    is_prediction = f.dataset == "none" and not f.residual
    return is_prediction and f.likelihood == "gaussian" and source.flag == decoded


def _extend(f, source, rows):
    """Extend the Extent of a source by the numbers in a chunk of rows.

    No remark applies to numbers below 0 or above 255, or to numbers above 1 that are not whole.
    After the first chunk with such numbers, the rest is not examined. Most data have some early.
    """
    extent = source.extent
    if not extent.is_open or not _gets_remarks(f, source):
        return
    extent.is_uint8 = rows.dtype == np.uint8
    extent.low = min(extent.low, float(rows.min()))
    extent.high = max(extent.high, float(rows.max()))
    if extent.low < 0 or extent.high > LARGEST_PIXEL:
        extent.is_open = False
        return
    extent.is_whole = extent.is_whole and _are_whole(rows)
    if extent.high > 1 and not extent.is_whole:
        extent.is_open = False


def remark_on(f, source):
    """Print a remark on the numbers of a source, after the first pass over all its rows.

    The answer for a Gaussian decoder may not be the one that the user wants if the numbers are
    pixels from 0 to 255, or if they are binary or between 0 and 1.
    """
    extent = source.extent
    if not extent.is_open or not _gets_remarks(f, source):
        return
    extent.is_open = False

    if extent.is_whole and extent.high > 1:
        if extent.is_uint8 or extent.high == LARGEST_PIXEL:
            _warn_of_pixels(f, source)
        return
    if f.model != "vae" or f.loss != "none":
        return
    if not extent.is_whole:
        note(
            "all numbers of --x are from 0 to 1, and the answer is for a Gaussian decoder (squared "
            "error); if the decoder ends in a sigmoid and the loss is binary cross-entropy, --loss "
            "bce_sum or --loss bce_mean gives the answer for it"
        )
    elif extent.low < extent.high:
        note(
            "--x is binary, and the answer is for a Gaussian decoder (squared error); a decoder "
            "that is trained with binary cross-entropy wants --likelihood bernoulli, or --loss "
            "bce_sum or bce_mean"
        )


def _warn_of_pixels(f, source):
    """Warn that a source holds pixels from 0 to 255."""
    effect = "every beta is 65,025 times too large"
    if f.model == "hvae" or f.eta_dec == "learned":
        effect = "every variance is 65,025 times too large"
    warn(
        f"--{source.flag} looks like pixels from 0 to 255; a model of x / 255 wants --scale, "
        f"without which {effect}"
    )


# --- Wide rows ---


def check_size(f, source):
    """End the program if a source has more than MAX_COLUMNS rows and columns."""
    if min(source.count, source.columns) <= MAX_COLUMNS:
        return
    remedy = "average neighbouring pixels"
    if source.flag == "x":
        remedy = f"choose columns with --columns, or {remedy}"
    common.stop(
        f,
        f"--{source.flag}: got {source.count:,} rows of {source.columns:,} columns, wants at most "
        f"{MAX_COLUMNS:,} columns (or at most {MAX_COLUMNS:,} rows); {remedy}",
    )


def row_coordinates(rows):
    """Rows (n, d) with at most n columns and the same inner products: (n, min(n, d)).

    They are the coordinates of the rows in the space that the rows span. float64.
    """
    if rows.shape[1] <= len(rows):
        return rows
    return np.linalg.qr(rows.T, mode="r").T


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
    """The flags for scalars of the objective that at least one setting has changed.

    A flag counts as such a scalar if its default is a number that need not be whole.
    """
    flags = []
    for field in dataclasses.fields(settings[0]):
        is_scalar = type(field.default) is float
        if is_scalar and any(getattr(f, field.name) != field.default for f in settings):
            flags.append(f"--{field.name}")
    return flags
