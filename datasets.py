"""Data sets, whole on the device: MNIST and others through torchvision, cut into quarters for a CVAE, binarised for the deep
models; and the embedded digits, which the program draws itself where nothing can be downloaded. First what a script calls, then
how a file is found, read and checked, then how a digit is drawn. Batches are training.py's.
"""
import contextlib
import functools
import math
import socket
import sys
import threading
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import common
import files
import theory


@dataclass
class Data:
    """One data set, whole, on the device. train and test hold what a model's forward takes, as a tuple of tensors with
    one row per example (for a VAE one tensor (n, 784) in [0, 1]); labels are (n,), 0 to 9, of images. also_train asks for
    the metrics on train, too."""
    name: str
    train: tuple
    test: tuple
    train_labels: torch.Tensor = None
    test_labels: torch.Tensor = None
    also_train: bool = False

    @functools.cached_property
    def moment(self):
        """The second moment of the training rows, all columns of train joined: (d, d), see `second_moment`."""
        return theory.second_moment(*self.train)

    @functools.cached_property
    def moment_with_one(self):
        """`moment` with a row and a column more: that of the training rows with a 1 at their end, (d + 1, d + 1)."""
        mean = torch.cat([t.flatten(1).mean(0, dtype=torch.float64) for t in self.train] + [torch.ones(1, device=self.train[0].device)])
        return torch.cat([torch.cat([self.moment, mean[None, :-1].cpu()]), mean[:, None].cpu()], dim=1)


def load_mnist(settings):
    """The data of each setting: a list of `Data`, shared where the settings share --dataset.

    Images are float32 in [0, 1], flattened to 784 (cifar10's to 3072). Ends the program if --dataset is neither on disk
    nor to be fetched, or if a file is corrupt.
    """
    loaded = {}
    if common.processes()[0] > 0:
        common.meet()                                     # the first process may have to fetch or draw what all read
    for f in settings:
        if f.dataset not in loaded:
            name = f.dataset
            if name == "auto":
                name = "mnist" if _on_disk_or_fetched("mnist", f.data_dir) else "digits"
                if name == "digits":
                    print(f"warning: MNIST is not in {f.data_dir!r} and cannot be fetched; "
                          "training on the embedded digits, which are not MNIST", file=sys.stderr)
            elif name != "digits" and not _on_disk_or_fetched(name, f.data_dir):
                common.stop(f, f"--dataset: {name} is not in --data_dir {f.data_dir!r} and cannot be fetched; "
                               "put its files there, or take --dataset digits")
            read = {"digits": lambda: digits(f.data_dir), "omniglot": lambda: _read_omniglot(f),
                    "cifar10": lambda: _read_cifar10(f)}
            arrays = read.get(name, lambda: _read_mnist(f, name))()
            device = common.device_of(f)
            images = [torch.from_numpy(a).to(device).float().div_(255).flatten(1) for a in arrays[0::2]]
            labels = [torch.from_numpy(a).to(device).long() for a in arrays[1::2]]
            loaded[f.dataset] = Data(name, (images[0],), (images[1],), labels[0], labels[1])
    if common.processes()[0] == 0:
        common.meet()
    return [loaded[f.dataset] for f in settings]


def load_images(settings):
    """The data of each setting as images (n, 1, 28, 28), or (n, 3, 32, 32) of cifar10, float32 in [0, 1]; the test images cut
    to --num_test and, but for cifar10, binarised once, by the seed. Shared where settings share these flags."""
    @functools.cache
    def load(name, seed, num_test):
        d, shape = whole[name], (-1, *image_shape(name))
        rows = slice(num_test or None)
        test = d.test[0][rows].view(shape)
        if name != "cifar10":
            random = torch.rand(test.shape, generator=common.generator(seed, "data"))
            test = (random.to(test.device) < test).float()
        return Data(d.name, (d.train[0].view(shape),), (test,), d.train_labels, d.test_labels[rows])

    whole = {f.dataset: d for f, d in zip(settings, load_mnist(settings))}
    return [load(f.dataset, f.seed, f.num_test) for f in settings]


def image_shape(dataset):
    """(C, H, W) of a data set's images."""
    return (3, 32, 32) if dataset == "cifar10" else (1, 28, 28)


def load_mnist_quarters(settings):
    """The data of each setting as a CVAE has it, the images of one class only where the setting has a --digit.

    x is the lower left quarter of an image, y the other three: see `quarters`. Shared where settings share both flags.
    """
    @functools.cache
    def load(name, digit):
        d = whole[name]
        train, test = (slice(None) if digit is None else labels == digit for labels in (d.train_labels, d.test_labels))
        return Data(d.name, quarters(d.train[0][train]), quarters(d.test[0][test]), d.train_labels[train], d.test_labels[test])

    whole = {f.dataset: d for f, d in zip(settings, load_mnist(settings))}
    return [load(f.dataset, getattr(f, "digit", None)) for f in settings]


def quarters(images):
    """(x, y) of images (n, 784): x (n, 196) the lower left quarter, y (n, 588) the upper left, upper right and lower
    right ones."""
    upper, lower = images.view(-1, 28, 28).split(14, dim=1)
    upper_left, upper_right, lower_left, lower_right = (
        quarter.flatten(1) for half in (upper, lower) for quarter in half.split(14, dim=2))
    return lower_left, torch.cat([upper_left, upper_right, lower_right], dim=1)


def whole_images(x, y):
    """Images (n, 784) from their quarters x (n, 196) and y (n, 588): undoes `quarters`."""
    upper_left, upper_right, lower_left, lower_right = (
        quarter.unflatten(1, (14, 14)) for quarter in (*y[:, :392].split(196, dim=1), x, y[:, 392:]))
    return torch.cat([torch.cat([upper_left, upper_right], 2), torch.cat([lower_left, lower_right], 2)], 1).flatten(1)


MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def _torchvision_class(name):
    import torchvision                                    # slow to import, and not every script needs it
    of = torchvision.datasets
    return {"mnist": of.MNIST, "fashion": of.FashionMNIST, "omniglot": of.Omniglot, "cifar10": of.CIFAR10}[name]


def _on_disk_or_fetched(name, data_dir):
    """Whether the data set is in data_dir, after an attempt to unpack or to fetch it if it is not."""
    from torchvision.datasets.utils import check_integrity
    dataset = _torchvision_class(name)
    if name == "omniglot":
        folder, packed = Path(data_dir, dataset.folder), False
        there = all((folder / part).is_dir() for part in dataset.zips_md5)
        urls = [f"{dataset.download_url_prefix}/images_background.zip"]
    elif name == "cifar10":
        there = Path(data_dir, dataset.base_folder).is_dir()
        packed = check_integrity(str(Path(data_dir, dataset.filename)), dataset.tgz_md5)
        urls = [dataset.url]
    else:
        raw = Path(data_dir, dataset.__name__, "raw")
        there = all((raw / file).exists() for file in MNIST_FILES)
        packed = all(check_integrity(str(raw / file), md5) for file, md5 in dataset.resources)
        urls = [f"{mirror}{MNIST_FILES[0]}.gz" for mirror in dataset.mirrors]
    if there or not (packed or _any_answers(urls)):
        return there
    print(f"{'unpacking' if packed else 'fetching'} {name} in {data_dir}", file=sys.stderr)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            for split in (True, False):                   # background and evaluation of omniglot, train and test otherwise
                dataset(data_dir, split, download=True)
    except Exception as wrong:                            # a broken connection has many names
        print(f"that failed: {wrong}", file=sys.stderr)
        return False
    finally:
        socket.setdefaulttimeout(patience)
    return True


def _any_answers(urls, seconds=5):
    """Whether one of the addresses answers within so many seconds, even where looking up its name hangs."""
    answered = threading.Event()

    def ask(url):
        with contextlib.suppress(Exception):
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            answered.set()

    for url in urls:
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    return answered.wait(seconds)


@contextlib.contextmanager
def _whole(f, path):
    """Ends the program, naming the file or folder, where what is done with it fails: torchvision asserts, indexes, reshapes."""
    try:
        yield
    except Exception as wrong:
        common.stop(f, f"--data_dir: {path} is truncated or corrupt ({wrong or type(wrong).__name__}); remove it to fetch it again")


def _read_mnist(f, name):
    """Train images (n, 28, 28), train labels (n,), test images, test labels, uint8; a bad file is named."""
    from torchvision.datasets.mnist import read_image_file, read_label_file
    raw, arrays = Path(f.data_dir, _torchvision_class(name).__name__, "raw"), []
    for file in MNIST_FILES:
        with _whole(f, raw / file):
            arrays.append((read_image_file if "images" in file else read_label_file)(str(raw / file)).numpy())
            array = arrays[-1]
            if not (array.shape[1:] == (28, 28) if "images" in file else len(array) == len(arrays[-2]) and array.max() <= 9):
                raise ValueError("not what it is to hold")
    return arrays


def _read_omniglot(f):
    """Omniglot in the form of `_read_mnist`: strokes white on black, 105x105 brought to 28x28; the background alphabets for
    training, the evaluation alphabets for the test, so that no character is in both; labels are the characters."""
    from torchvision.transforms.functional import InterpolationMode, resize
    arrays = []
    for background in (True, False):
        with _whole(f, Path(f.data_dir, "omniglot-py")):
            drawn = _torchvision_class("omniglot")(f.data_dir, background, lambda image: 255 - np.array(
                resize(image, [28, 28], InterpolationMode.BILINEAR)))
            images, labels = zip(*drawn)
            arrays += [np.stack(images), np.array(labels)]
    return arrays


def _read_cifar10(f):
    """CIFAR-10 in the form of `_read_mnist`, images (n, 3, 32, 32)."""
    arrays = []
    for train in (True, False):
        with _whole(f, Path(f.data_dir, "cifar-10-batches-py")):
            part = _torchvision_class("cifar10")(f.data_dir, train)
            arrays += [part.data.transpose(0, 3, 1, 2).copy(), np.array(part.targets)]
    return arrays


# The embedded digits, as strokes: named control points (x right, y down, in a unit box), and curves through some of
# them, so that curves that share a point stay joined when it moves.
_STROKES = [
    (0, "a.50,.08 b.25,.22 c.18,.50 d.27,.80 e.50,.92 f.74,.79 g.82,.50 h.74,.21", "abcdefgha"),
    (1, "a.52,.08 b.51,.50 c.50,.92", "abc"),
    (1, "a.30,.28 b.54,.08 c.52,.50 d.51,.92", "ab bcd"),
    (1, "a.32,.28 b.54,.08 c.52,.50 d.51,.92 e.28,.92 f.74,.91", "ab bcd edf"),
    (2, "a.22,.30 b.36,.11 c.62,.11 d.76,.30 e.60,.56 f.20,.91 g.50,.89 h.82,.90", "abcdef fgh"),
    (2, "a.22,.28 b.40,.09 c.68,.14 d.70,.42 e.44,.78 f.22,.86 g.28,.72 h.50,.84 i.84,.88", "abcdefghi"),
    (3, "a.22,.20 b.44,.08 c.72,.20 d.66,.40 e.42,.48 f.72,.56 g.78,.74 h.52,.92 i.20,.80", "abcde efghi"),
    (3, "a.24,.10 b.74,.10 c.46,.42 d.72,.52 e.78,.74 f.52,.92 g.20,.82", "ab bc cdefg"),
    (4, "a.34,.10 b.20,.56 c.50,.57 d.82,.54 e.66,.10 f.63,.50 g.60,.92", "ab bcd efg"),
    (4, "a.60,.08 b.38,.36 c.16,.64 d.50,.64 e.84,.62 f.62,.40 g.60,.92", "abc cde afg"),
    (5, "a.76,.10 b.34,.11 c.28,.46 d.54,.40 e.78,.60 f.66,.86 g.40,.92 h.20,.80", "ab bc cdefgh"),
    (6, "a.66,.08 b.38,.30 c.22,.64 d.36,.90 e.62,.90 f.76,.70 g.58,.52 h.36,.58 i.24,.72", "abcdefghi"),
    (7, "a.20,.14 b.50,.12 c.80,.12 d.58,.48 e.44,.92", "abc cde"),
    (7, "a.20,.14 b.50,.12 c.80,.12 d.58,.48 e.44,.92 f.36,.52 g.76,.48", "abc cde fdg"),
    (8, "a.74,.20 b.50,.08 c.27,.25 d.50,.47 e.76,.72 f.50,.92 g.24,.73 h.49,.49", "abcdefgha"),
    (9, "a.74,.26 b.50,.08 c.26,.26 d.38,.50 e.62,.47 f.72,.64 g.58,.92", "abcdea afg"),
    (9, "a.74,.24 b.48,.09 c.27,.28 d.40,.50 e.64,.44 f.72,.50 g.68,.92", "abcdea afg"),
]
_POINTS = 112                                             # drawn points per digit


def _stroke_weights(names, curves):
    """(_POINTS, number of control points): each drawn point as a combination of control points. Curves are Catmull-Rom
    splines through their control points, drawn points are spread over all curves by chord length."""
    positions = np.array([[float(c) for c in word[1:].split(",")] for word in names.split()])
    index = {word[0]: i for i, word in enumerate(names.split())}
    segments = []                                         # four control points each: before, from, to, after
    for curve in curves.split():
        path = [index[letter] for letter in curve]
        closed = path[0] == path[-1]
        before = path[-2] if closed else path[0]
        after = path[1] if closed else path[-1]
        padded = [before, *path, after]
        segments += [padded[i:i + 4] for i in range(len(path) - 1)]
    lengths = np.array([np.linalg.norm(positions[c] - positions[b]) for _, b, c, _ in segments])
    ends = np.cumsum(lengths)
    weights = np.zeros((_POINTS, len(positions)))
    for row, along in enumerate((np.arange(_POINTS) + 0.5) / _POINTS * ends[-1]):
        k = int(np.searchsorted(ends, along))
        t = 1 - (ends[k] - along) / lengths[k]
        basis = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -t**2 + t**3)
        np.add.at(weights[row], segments[k], np.array(basis) / 2)
    return positions, weights


def draw_digits(n, seed):
    """n digits as drawn from strokes: images (n, 28, 28) and labels (n,), uint8, the same for the same seed.

    Each is a random template of a random class with moved control points (jitter), turned, slanted, scaled per axis,
    shifted, and inked with a pen of random width and softness.
    """
    random = torch.Generator().manual_seed(seed)
    classes = torch.randint(10, (n,), generator=random)
    uniform = torch.rand(n, 10, generator=random)
    between = lambda i, low, high: low + (high - low) * uniform[:, i]
    images = torch.empty(n, 28, 28, dtype=torch.uint8)
    turn, slant = between(0, -0.22, 0.22), between(1, -0.15, 0.45)
    width, height = between(2, 10.5, 18.5), between(3, 17, 21)
    pen, gain = between(4, 0.65, 1.35), between(5, 1.1, 1.9)
    pixel = torch.arange(28.0)
    for digit in range(10):
        templates = [strokes[1:] for strokes in _STROKES if strokes[0] == digit]
        for version, strokes in enumerate(templates):
            chosen = (classes == digit) & ((uniform[:, 6] * len(templates)).long() == version)
            positions, weights = (torch.tensor(a, dtype=torch.float32) for a in _stroke_weights(*strokes))
            for rows in chosen.nonzero()[:, 0].split(2048):
                column = lambda values: values[rows, None]
                control = positions + 0.028 * torch.randn(len(rows), *positions.shape, generator=random)
                x, y = (weights @ control - 0.5).unbind(-1)                       # (rows, _POINTS)
                x, y = column(width) * x - column(slant) * column(height) * y, column(height) * y
                cos, sin = column(turn.cos()), column(turn.sin())
                x, y = cos * x - sin * y, sin * x + cos * y
                # Centred on its ink as MNIST's digits are, but for half a pixel or so.
                x = x - x.mean(1, keepdim=True) + 13.5 + 1.4 * (column(uniform[:, 7]) - 0.5)
                y = y - y.mean(1, keepdim=True) + 13.5 + 1.4 * (column(uniform[:, 8]) - 0.5)
                # Ink at a pixel: a Gaussian pen moved along the curve. Its kernel is one of x times one of y, so that
                # an image is a matrix product over drawn points. A line's middle gets as much ink as `gain` says.
                spread = 2 * column(pen)[:, :, None] ** 2
                kernel_x = torch.exp(-(pixel - x[:, :, None]) ** 2 / spread)
                kernel_y = torch.exp(-(pixel - y[:, :, None]) ** 2 / spread)
                spacing = ((x.diff(dim=1) ** 2 + y.diff(dim=1) ** 2).sqrt()).median(dim=1).values
                ink = (kernel_y.transpose(1, 2) @ kernel_x) * (
                    spacing * gain[rows] / (pen[rows] * math.sqrt(2 * math.pi)))[:, None, None]
                images[rows] = (ink.clamp(max=1) * 255).round().to(torch.uint8)
    return images.numpy(), classes.to(torch.uint8).numpy()


def digits(data_dir):
    """The embedded data set, 60,000 training and 10,000 test digits by `draw_digits`, in the form of `_read_mnist`.

    Kept in data_dir/digits.npz once drawn; drawn again if that file is not whole; not kept if it cannot be written.
    """
    path = Path(data_dir, "digits.npz")
    names = ("train_images", "train_labels", "test_images", "test_labels")
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with np.load(path) as file:
            return [file[name] for name in names]
    arrays = [*draw_digits(60_000, seed=1), *draw_digits(10_000, seed=2)]
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, lambda file: np.savez(file, **dict(zip(names, arrays))))
    return arrays
