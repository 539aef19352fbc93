"""Data sets, kept whole on the device.

MNIST, Fashion-MNIST, Omniglot and CIFAR-10 come through torchvision. Where nothing can be
downloaded, the program draws its own data set, the embedded digits.

The file has four parts: the functions that scripts call, how a data set is found or downloaded, how
its files are read and checked, and how a digit is drawn. Batches are made in training.py.
"""
import contextlib
import dataclasses
import functools
import math
import socket
import sys
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
import torch
from torch.nn import functional as F

import files
import processes
import theory

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass
class Data:
    """One data set, whole, on the device.

    name: what tables, files and figures call it.
    train, test: the arguments of a model's forward, as a tuple of tensors with one row per example.
        For a VAE this is one tensor (n, 784) in [0, 1].
    train_labels, test_labels: the classes of images, (n,), from 0 on. None for data without
        classes.
    also_train: whether a run reports its metrics on the training rows, too.
    """
    name: str
    train: tuple
    test: tuple
    train_labels: torch.Tensor = None
    test_labels: torch.Tensor = None
    also_train: bool = False

    @functools.cached_property
    def moment(self):
        """The second moment of the training rows: (d, d), float64, on the CPU.

        The columns of all tensors of `train` are joined, so d is the sum of their widths. See
        `theory.second_moment`.
        """
        return theory.second_moment(*self.train)

    @functools.cached_property
    def moment_with_one(self):
        """The second moment of the training rows with a 1 appended to each row.

        (d + 1, d + 1), float64, on the CPU.
        """
        means = [columns.flatten(1).mean(0, dtype=torch.float64) for columns in self.train]
        mean = torch.cat(means).cpu()
        one = torch.ones(1, dtype=torch.float64)

        first_columns = torch.cat([self.moment, mean[None, :]])
        last_column = torch.cat([mean, one])[:, None]
        return torch.cat([first_columns, last_column], dim=1)


# -------------------------------------------------------------------------------- what scripts call

def load_mnist(settings):
    """The data of each setting: a list of `Data`, shared where the settings share --dataset.

    Images are float32 in [0, 1], flattened to 784 numbers (CIFAR-10 to 3072). Ends the program if
    --dataset is not on disk and cannot be downloaded, or if a file is corrupt.
    """
    rank, _ = processes.rank_and_count()
    if rank > 0:
        # The first process may have to download or draw the files that all processes read.
        processes.barrier()

    loaded = {}
    for f in settings:
        if f.dataset not in loaded:
            name = _choose_dataset(f)
            arrays = _read(f, name)
            loaded[f.dataset] = _move_to_device(name, arrays, common.select_device(f))

    if rank == 0:
        processes.barrier()
    return [loaded[f.dataset] for f in settings]


def load_images(settings):
    """The data of each setting as images: (n, 1, 28, 28), for CIFAR-10 (n, 3, 32, 32).

    Pixels are float32 in [0, 1]. The images are cut to the first --num_train and --num_test. With
    --side they are means over squares of pixels, rounded to multiples of 1/255 for CIFAR-10. Then
    the test images are binarised once, by the seed, except for CIFAR-10. The data are shared where
    settings share --dataset, --seed, --num_train, --num_test and --side.
    """
    loaded = {}
    keys = []
    for f, data in zip(settings, load_mnist(settings)):
        key = (f.dataset, f.seed, f.num_test, getattr(f, "num_train", 0), getattr(f, "side", 0))
        keys.append(key)
        if key not in loaded:
            loaded[key] = _as_images(f, data)
    return [loaded[key] for key in keys]


def _as_images(f, data):
    """The `Data` of `load_images` for one setting, from the flat images of `load_mnist`."""
    shape = (-1, *image_shape(data.name))
    train_rows = slice(getattr(f, "num_train", 0) or None)
    test_rows = slice(f.num_test or None)
    train = data.train[0][train_rows].view(shape)
    test = data.test[0][test_rows].view(shape)
    side = getattr(f, "side", 0)
    if side:
        train = _smaller(train, side, data.name)
        test = _smaller(test, side, data.name)

    if data.name != "cifar10":
        random = torch.rand(test.shape, generator=common.generator(f.seed, "data"))
        test = (random.to(test.device) < test).float()

    return Data(
        name=data.name,
        train=(train,),
        test=(test,),
        train_labels=data.train_labels[train_rows],
        test_labels=data.test_labels[test_rows],
    )


def _smaller(images, side, dataset):
    """Means over squares of images (n, C, H, H): (n, C, side, side).

    The density of a coloured pixel counts multiples of 1/255 only, so CIFAR-10 is rounded to them.
    """
    images = F.avg_pool2d(images, images.shape[-1] // side)
    if dataset == "cifar10":
        images = (255 * images).round() / 255
    return images


def image_shape(dataset):
    """(C, H, W) of a data set's images."""
    return (3, 32, 32) if dataset == "cifar10" else (1, 28, 28)


def load_binary_mnist(settings):
    """The data of each setting as in `load_mnist`, with binary pixels: 0.0 or 1.0.

    With --binarise threshold a pixel is 1 where its grey value exceeds 0.5. With --binarise sample
    it is drawn once, by the seed, with the grey value as the probability of a 1. The data are
    shared where settings share --dataset and --binarise, and for sample also --seed.
    """
    loaded = {}
    keys = []
    for f, data in zip(settings, load_mnist(settings)):
        key = (f.dataset, f.binarise, f.seed if f.binarise == "sample" else None)
        keys.append(key)
        if key not in loaded:
            loaded[key] = _as_binary(f, data)
    return [loaded[key] for key in keys]


def _as_binary(f, data):
    """`Data` with the images of `load_mnist` made binary as --binarise of the setting f says."""
    generator = common.generator(f.seed, "data")
    splits = []
    for (images,) in (data.train, data.test):
        threshold = 0.5
        if f.binarise == "sample":
            threshold = torch.rand(images.shape, generator=generator).to(images.device)
        splits.append((images > threshold).to(images.dtype))
    train, test = splits
    return dataclasses.replace(data, train=(train,), test=(test,))


def load_mnist_quarters(settings):
    """The data of each setting as a CVAE reads it, cut by `quarters`.

    x is the lower left quarter of an image, y the other three. If a setting has a --digit, the data
    have only the images of that class, and the program ends if there are none. The data are shared
    where settings share --dataset and --digit.
    """
    loaded = {}
    keys = [(f.dataset, getattr(f, "digit", None)) for f in settings]
    for f, key, data in zip(settings, keys, load_mnist(settings)):
        if key not in loaded:
            loaded[key] = _as_quarters(f, data)
    return [loaded[key] for key in keys]


def _as_quarters(f, data):
    """The `Data` of `load_mnist_quarters` for one setting, from the flat images of `load_mnist`."""
    digit = getattr(f, "digit", None)
    if digit is None:
        train_rows = slice(None)
        test_rows = slice(None)
    else:
        train_rows = data.train_labels == digit
        test_rows = data.test_labels == digit
        for rows, split in ((train_rows, "training"), (test_rows, "test")):
            if not rows.any():
                common.stop(
                    f,
                    f"--digit: got {digit}, but {data.name} has no {split} image of this digit",
                )

    return Data(
        name=data.name,
        train=quarters(data.train[0][train_rows]),
        test=quarters(data.test[0][test_rows]),
        train_labels=data.train_labels[train_rows],
        test_labels=data.test_labels[test_rows],
    )


def quarters(images):
    """Cut images (n, 784) into x (n, 196), the lower left quarter, and y (n, 588), the other three.

    y holds the upper left, the upper right and the lower right quarter, in this order.
    Returns (x, y).
    """
    upper, lower = images.view(-1, 28, 28).split(14, dim=1)
    upper_left, upper_right = upper.split(14, dim=2)
    lower_left, lower_right = lower.split(14, dim=2)

    x = lower_left.flatten(1)
    y = torch.cat([upper_left.flatten(1), upper_right.flatten(1), lower_right.flatten(1)], dim=1)
    return x, y


def whole_images(x, y):
    """Images (n, 784) from their quarters x (n, 196) and y (n, 588): the inverse of `quarters`."""
    lower_left = x.unflatten(1, (14, 14))
    upper_left, upper_right, lower_right = (
        quarter.unflatten(1, (14, 14)) for quarter in y.split(196, dim=1)
    )
    upper = torch.cat([upper_left, upper_right], dim=2)
    lower = torch.cat([lower_left, lower_right], dim=2)
    return torch.cat([upper, lower], dim=1).flatten(1)


# ------------------------------------------------------------------ which data set, and where it is

def _choose_dataset(f):
    """The name of the data set that --dataset asks for; "auto" is MNIST or the embedded digits.

    After that the data set is on disk, except for the digits. Ends the program if a data set that
    --dataset names is not on disk and cannot be downloaded.
    """
    if f.dataset == "digits":
        return "digits"
    if f.dataset == "auto":
        if _is_on_disk_or_fetched("mnist", f):
            return "mnist"
        print(
            f"warning: MNIST is not in {f.data_dir!r} and cannot be downloaded; the embedded "
            "digits are used instead, so the results are not those of MNIST",
            file=sys.stderr,
        )
        return "digits"
    if not _is_on_disk_or_fetched(f.dataset, f):
        common.stop(
            f,
            f"--dataset: {f.dataset} is not in --data_dir {f.data_dir!r} and cannot be downloaded; "
            "put its files there, or give --dataset digits",
        )
    return f.dataset


def _torchvision_class(name):
    """The class in torchvision.datasets that knows the files of this data set."""
    # torchvision is slow to import, and not every script needs it.
    import torchvision

    classes = {
        "mnist": torchvision.datasets.MNIST,
        "fashion": torchvision.datasets.FashionMNIST,
        "omniglot": torchvision.datasets.Omniglot,
        "cifar10": torchvision.datasets.CIFAR10,
    }
    return classes[name]


@dataclass
class _Location:
    """Where a data set is.

    on_disk: whether its unpacked files are in --data_dir.
    packed: whether its whole archives are in --data_dir, so that torchvision needs no network.
    urls: addresses, one of which must answer before torchvision tries to download the archives.
    """
    on_disk: bool
    packed: bool
    urls: list


def _locate(name, data_dir):
    """The `_Location` of a data set, at the paths and addresses that torchvision uses."""
    from torchvision.datasets.utils import check_integrity

    dataset = _torchvision_class(name)
    if name == "omniglot":
        folder = Path(data_dir, dataset.folder)
        return _Location(
            on_disk=all((folder / part).is_dir() for part in dataset.zips_md5),
            packed=False,
            urls=[f"{dataset.download_url_prefix}/images_background.zip"],
        )
    if name == "cifar10":
        archive = Path(data_dir, dataset.filename)
        return _Location(
            on_disk=Path(data_dir, dataset.base_folder).is_dir(),
            packed=check_integrity(str(archive), dataset.tgz_md5),
            urls=[dataset.url],
        )
    raw = Path(data_dir, dataset.__name__, "raw")
    return _Location(
        on_disk=all((raw / file).exists() for file in MNIST_FILES),
        packed=all(check_integrity(str(raw / archive), md5) for archive, md5 in dataset.resources),
        urls=[f"{mirror}{MNIST_FILES[0]}.gz" for mirror in dataset.mirrors],
    )


def _is_on_disk_or_fetched(name, f):
    """Whether the data set is in --data_dir, after unpacking or downloading it where needed.

    Ends the program if --data_dir is no possible name of a folder.
    """
    data_dir = f.data_dir
    try:
        location = _locate(name, data_dir)
    except (OSError, ValueError) as error:
        # Such as a name that is too long, or one with a null character.
        reason = getattr(error, "strerror", None) or error
        common.stop(f, f"--data_dir: got {data_dir!r} ({reason}), wants a folder with data sets")
    if location.on_disk:
        return True
    if not location.packed and not _any_answers(location.urls):
        return False

    action = "unpacking" if location.packed else "downloading"
    print(f"{action} {name} in {data_dir}", file=sys.stderr)
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            # Omniglot's splits are background and evaluation. The others' are training and test.
            for split in (True, False):
                _torchvision_class(name)(data_dir, split, download=True)
    except Exception as error:
        # A broken connection raises many kinds of exceptions.
        print(f"{action} {name} failed: {error}", file=sys.stderr)
        return False
    finally:
        socket.setdefaulttimeout(previous_timeout)
    return True


def _any_answers(urls, seconds=5):
    """Whether one of the addresses answers in time, even where looking up its name hangs."""
    answered = threading.Event()

    def request_head(url):
        request = urllib.request.Request(url, method="HEAD")
        with contextlib.suppress(Exception):
            urllib.request.urlopen(request, timeout=seconds).close()
            answered.set()

    # A daemon thread that hangs does not keep the program from going on or from ending.
    for url in urls:
        threading.Thread(target=request_head, args=(url,), daemon=True).start()
    return answered.wait(seconds)


# --------------------------------------------------------------------------- how its files are read

def _read(f, name):
    """A data set as four integer arrays: training images and labels, test images and labels."""
    if name == "digits":
        return digits(f.data_dir)
    if name == "omniglot":
        return _read_omniglot(f)
    if name == "cifar10":
        return _read_cifar10(f)
    return _read_mnist(f, name)


def _move_to_device(name, arrays, device):
    """The `Data` of four arrays as `_read` returns them.

    Images become flat and float32 in [0, 1], labels int64.
    """
    train_images, train_labels, test_images, test_labels = arrays

    def images(array):
        return torch.from_numpy(array).to(device).float().div_(255).flatten(1)

    def labels(array):
        return torch.from_numpy(array).to(device).long()

    return Data(
        name=name,
        train=(images(train_images),),
        test=(images(test_images),),
        train_labels=labels(train_labels),
        test_labels=labels(test_labels),
    )


@contextlib.contextmanager
def _stop_if_broken(f, path):
    """End the program, naming this file or folder, where an exception is raised while it is read.

    torchvision reads with assertions, indices and reshapes, so a broken file raises many kinds of
    exceptions.
    """
    try:
        yield
    except Exception as error:
        reason = str(error) or type(error).__name__
        common.stop(
            f,
            f"--data_dir: {path} is truncated or corrupt ({reason}); delete it, and it is "
            "downloaded again",
        )


def _check_images(images):
    """Raise ValueError if these are not images (n, 28, 28)."""
    if images.shape[1:] != (28, 28):
        raise ValueError("it does not contain images of 28x28 pixels")


def _check_labels(labels, images):
    """Raise ValueError if these are not the labels of these images, (n,) from 0 to 9."""
    if labels.shape != (len(images),) or labels.max() > 9:
        raise ValueError("it does not contain one digit per image")


def _read_mnist(f, name):
    """Training images (n, 28, 28), training labels (n,), test images and test labels, all uint8.

    Ends the program with the name of the file if one is truncated or corrupt.
    """
    from torchvision.datasets.mnist import read_image_file, read_label_file

    raw = Path(f.data_dir, _torchvision_class(name).__name__, "raw")
    arrays = []
    for file in MNIST_FILES:
        path = raw / file
        with _stop_if_broken(f, path):
            if "images" in file:
                images = read_image_file(str(path)).numpy()
                _check_images(images)
                arrays.append(images)
            else:
                # A file of labels follows the file of their images.
                labels = read_label_file(str(path)).numpy()
                _check_labels(labels, images=arrays[-1])
                arrays.append(labels)
    return arrays


def _read_omniglot(f):
    """Omniglot in the form of `_read_mnist`, with the numbers of the characters as labels.

    Strokes are white on black, scaled from 105x105 to 28x28 pixels. The background alphabets are
    for training and the evaluation alphabets for the test, so that no character is in both.
    """
    from torchvision.transforms.functional import InterpolationMode, resize

    def white_on_black(image):
        return 255 - np.array(resize(image, [28, 28], InterpolationMode.BILINEAR))

    arrays = []
    for background in (True, False):
        with _stop_if_broken(f, Path(f.data_dir, "omniglot-py")):
            drawings = _torchvision_class("omniglot")(f.data_dir, background, white_on_black)
            images, labels = zip(*drawings)
            arrays += [np.stack(images), np.array(labels)]
    return arrays


def _read_cifar10(f):
    """CIFAR-10 in the form of `_read_mnist`, with images (n, 3, 32, 32)."""
    arrays = []
    for train in (True, False):
        with _stop_if_broken(f, Path(f.data_dir, "cifar-10-batches-py")):
            split = _torchvision_class("cifar10")(f.data_dir, train)
            arrays += [split.data.transpose(0, 3, 1, 2).copy(), np.array(split.targets)]
    return arrays


def digits(data_dir):
    """The embedded data set in the form of `_read_mnist`.

    It has 60,000 training and 10,000 test digits by `draw_digits`. Once drawn, they are kept in
    data_dir/digits.npz, unless that file cannot be written. They are drawn again if it is broken.
    """
    path = Path(data_dir, "digits.npz")
    names = ("train_images", "train_labels", "test_images", "test_labels")
    arrays = _read_digits(path, names)
    if arrays is not None:
        return arrays

    arrays = [*draw_digits(60_000, seed=1), *draw_digits(10_000, seed=2)]
    with contextlib.suppress(OSError):
        files.write(path, lambda file: np.savez(file, **dict(zip(names, arrays))))
    return arrays


def _read_digits(path, names):
    """The arrays of these names in digits.npz, or None if the file is absent or broken."""
    try:
        with np.load(path) as file:
            arrays = [file[name] for name in names]
        train_images, train_labels, test_images, test_labels = arrays
        _check_images(train_images)
        _check_labels(train_labels, train_images)
        _check_images(test_images)
        _check_labels(test_labels, test_images)
    except Exception:
        # A broken archive raises many kinds of exceptions.
        return None
    return arrays


# ----------------------------------------------------------------------------- how a digit is drawn

@dataclass
class _Template:
    """One way to write a digit.

    digit: the class, 0 to 9.
    points: named control points, as in "a.50,.08": x to the right, y down, in a unit box.
    curves: the names of the points that each curve leads through, in order. Curves that share a
        point stay joined when it moves.
    """
    digit: int
    points: str
    curves: str


_TEMPLATES = [
    _Template(
        0,
        "a.50,.08 b.25,.22 c.18,.50 d.27,.80 e.50,.92 f.74,.79 g.82,.50 h.74,.21",
        "abcdefgha",
    ),
    _Template(
        1,
        "a.52,.08 b.51,.50 c.50,.92",
        "abc",
    ),
    _Template(
        1,
        "a.30,.28 b.54,.08 c.52,.50 d.51,.92",
        "ab bcd",
    ),
    _Template(
        1,
        "a.32,.28 b.54,.08 c.52,.50 d.51,.92 e.28,.92 f.74,.91",
        "ab bcd edf",
    ),
    _Template(
        2,
        "a.22,.30 b.36,.11 c.62,.11 d.76,.30 e.60,.56 f.20,.91 g.50,.89 h.82,.90",
        "abcdef fgh",
    ),
    _Template(
        2,
        "a.22,.28 b.40,.09 c.68,.14 d.70,.42 e.44,.78 f.22,.86 g.28,.72 h.50,.84 i.84,.88",
        "abcdefghi",
    ),
    _Template(
        3,
        "a.22,.20 b.44,.08 c.72,.20 d.66,.40 e.42,.48 f.72,.56 g.78,.74 h.52,.92 i.20,.80",
        "abcde efghi",
    ),
    _Template(
        3,
        "a.24,.10 b.74,.10 c.46,.42 d.72,.52 e.78,.74 f.52,.92 g.20,.82",
        "ab bc cdefg",
    ),
    _Template(
        4,
        "a.34,.10 b.20,.56 c.50,.57 d.82,.54 e.66,.10 f.63,.50 g.60,.92",
        "ab bcd efg",
    ),
    _Template(
        4,
        "a.60,.08 b.38,.36 c.16,.64 d.50,.64 e.84,.62 f.62,.40 g.60,.92",
        "abc cde afg",
    ),
    _Template(
        5,
        "a.76,.10 b.34,.11 c.28,.46 d.54,.40 e.78,.60 f.66,.86 g.40,.92 h.20,.80",
        "ab bc cdefgh",
    ),
    _Template(
        6,
        "a.66,.08 b.38,.30 c.22,.64 d.36,.90 e.62,.90 f.76,.70 g.58,.52 h.36,.58 i.24,.72",
        "abcdefghi",
    ),
    _Template(
        7,
        "a.20,.14 b.50,.12 c.80,.12 d.58,.48 e.44,.92",
        "abc cde",
    ),
    _Template(
        7,
        "a.20,.14 b.50,.12 c.80,.12 d.58,.48 e.44,.92 f.36,.52 g.76,.48",
        "abc cde fdg",
    ),
    _Template(
        8,
        "a.74,.20 b.50,.08 c.27,.25 d.50,.47 e.76,.72 f.50,.92 g.24,.73 h.49,.49",
        "abcdefgha",
    ),
    _Template(
        9,
        "a.74,.26 b.50,.08 c.26,.26 d.38,.50 e.62,.47 f.72,.64 g.58,.92",
        "abcdea afg",
    ),
    _Template(
        9,
        "a.74,.24 b.48,.09 c.27,.28 d.40,.50 e.64,.44 f.72,.50 g.68,.92",
        "abcdea afg",
    ),
]

# The number of points along the curves at which the pen puts ink.
_POINTS = 112


def draw_digits(n, seed):
    """Draw n digits from strokes: images (n, 28, 28) and labels (n,), uint8.

    Each image is a random template of a random class. Its control points are moved (jitter). Then
    the digit is scaled per axis, slanted, turned and shifted, and inked with a pen of random width
    and strength. The same seed gives the same images.
    """
    random = torch.Generator().manual_seed(seed)
    classes = torch.randint(10, (n,), generator=random)
    uniform = torch.rand(n, 10, generator=random)
    style = _style(uniform)

    images = torch.empty(n, 28, 28, dtype=torch.uint8)
    for digit in range(10):
        templates = [template for template in _TEMPLATES if template.digit == digit]
        template_numbers = (uniform[:, 6] * len(templates)).long()
        for number, template in enumerate(templates):
            control_points = torch.tensor(_control_points(template), dtype=torch.float32)
            weights = torch.tensor(_curve_weights(template), dtype=torch.float32)
            chosen = (classes == digit) & (template_numbers == number)
            for rows in chosen.nonzero()[:, 0].split(2048):
                jitter = torch.randn(len(rows), *control_points.shape, generator=random)
                curve_points = weights @ (control_points + 0.028 * jitter)
                x, y = _place(curve_points, style, rows)
                ink = _ink(x, y, style.pen[rows], style.gain[rows])
                images[rows] = (ink.clamp(max=1) * 255).round().to(torch.uint8)
    return images.numpy(), classes.to(torch.uint8).numpy()


@dataclass
class _Style:
    """How each of n digits is drawn; every field is a tensor (n,).

    cos, sin: of the angle by which the digit is turned.
    slant: shift to the left per pixel downwards.
    width, height: scale of the unit box, in pixels.
    pen: standard deviation of the pen's ink, in pixels.
    gain: ink in the middle of a line, where 1 is white and more is cut to white.
    shift_x, shift_y: distance from the centre of the image, in pixels.
    """
    cos: torch.Tensor
    sin: torch.Tensor
    slant: torch.Tensor
    width: torch.Tensor
    height: torch.Tensor
    pen: torch.Tensor
    gain: torch.Tensor
    shift_x: torch.Tensor
    shift_y: torch.Tensor


def _style(uniform):
    """The styles of n digits from random numbers (n, 10) in [0, 1).

    Column 6 is not for the style: it chooses the template, see `draw_digits`.
    """
    def between(column, low, high):
        return low + (high - low) * uniform[:, column]

    angle = between(0, -0.22, 0.22)
    return _Style(
        cos=angle.cos(),
        sin=angle.sin(),
        slant=between(1, -0.15, 0.45),
        width=between(2, 10.5, 18.5),
        height=between(3, 17, 21),
        pen=between(4, 0.65, 1.35),
        gain=between(5, 1.1, 1.9),
        shift_x=1.4 * (uniform[:, 7] - 0.5),
        shift_y=1.4 * (uniform[:, 8] - 0.5),
    )


def _control_points(template):
    """The positions (K, 2) of a template's K control points, in the order of their names."""
    positions = []
    for word in template.points.split():
        x, y = word[1:].split(",")
        positions.append([float(x), float(y)])
    return np.array(positions)


def _curve_weights(template):
    """Each point on a template's curves as a combination of K control points: (_POINTS, K).

    The curves are Catmull-Rom splines through their control points. The points on them are spread
    over all curves by chord length.
    """
    positions = _control_points(template)
    segments = _spline_segments(template)
    chords = [positions[end] - positions[start] for _, start, end, _ in segments]
    lengths = np.array([np.linalg.norm(chord) for chord in chords])
    ends = np.cumsum(lengths)
    distances = (np.arange(_POINTS) + 0.5) / _POINTS * ends[-1]

    weights = np.zeros((_POINTS, len(positions)))
    for row, distance in enumerate(distances):
        segment = int(np.searchsorted(ends, distance))
        t = 1 - (ends[segment] - distance) / lengths[segment]
        basis = (
            -t + 2 * t**2 - t**3,
            2 - 5 * t**2 + 3 * t**3,
            t + 4 * t**2 - 3 * t**3,
            -t**2 + t**3,
        )
        # A control point may be in a segment twice, so the weights are added.
        np.add.at(weights[row], segments[segment], np.array(basis) / 2)
    return weights


def _spline_segments(template):
    """The segments of a template's curves, each four control points: before, start, end, after.

    A segment leads from start to end. Its neighbours, before and after, fix its directions there.
    At the end of an open curve the end point is its own neighbour.
    """
    numbers = {word[0]: number for number, word in enumerate(template.points.split())}
    segments = []
    for curve in template.curves.split():
        path = [numbers[name] for name in curve]
        closed = path[0] == path[-1]
        before = path[-2] if closed else path[0]
        after = path[1] if closed else path[-1]
        padded = [before, *path, after]
        for i in range(len(path) - 1):
            segments.append(padded[i:i + 4])
    return segments


def _place(curve_points, style, rows):
    """Turn, slant, scale and shift digits: from points (B, _POINTS, 2) in the unit box to pixels.

    rows (B,) are the digits' rows in the style. Returns x and y, each (B, _POINTS).
    """
    width = style.width[rows, None]
    height = style.height[rows, None]
    slant = style.slant[rows, None]
    cos = style.cos[rows, None]
    sin = style.sin[rows, None]

    x, y = (curve_points - 0.5).unbind(-1)
    x, y = width * x - slant * height * y, height * y
    x, y = cos * x - sin * y, sin * x + cos * y

    # The ink is centred as that of MNIST's digits is, except for the small random shift.
    x = x - x.mean(1, keepdim=True) + 13.5 + style.shift_x[rows, None]
    y = y - y.mean(1, keepdim=True) + 13.5 + style.shift_y[rows, None]
    return x, y


def _ink(x, y, pen, gain):
    """The ink (B, 28, 28) that pens leave along the points x and y, both (B, _POINTS).

    pen and gain, both (B,), are the width and the strength of each pen, see `_Style`.

    The pen is a Gaussian that moves along the curve. Its kernel is a function of x times a function
    of y, so an image is a matrix product over the points. Scaled by the points' spacing, the middle
    of a line gets as much ink as gain.
    """
    pixel = torch.arange(28.0)
    spread = 2 * pen[:, None, None] ** 2
    kernel_x = torch.exp(-(pixel - x[:, :, None]) ** 2 / spread)
    kernel_y = torch.exp(-(pixel - y[:, :, None]) ** 2 / spread)

    distances = (x.diff(dim=1) ** 2 + y.diff(dim=1) ** 2).sqrt()
    spacing = distances.median(dim=1).values
    scale = spacing * gain / (pen * math.sqrt(2 * math.pi))
    return (kernel_y.transpose(1, 2) @ kernel_x) * scale[:, None, None]
