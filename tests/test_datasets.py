"""Data: MNIST's files and their faults, fetching without a network, the embedded digits."""
import contextlib
import gzip
import hashlib
import io
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import torch

import MNIST_CVAE_Linear_single_digit
import MNIST_HVAE_Ladder
import MNIST_HVAE_Relu
import MNIST_VAE_Bernoulli
from tests import small
from tests.small import REAL_MNIST, call, write_mnist


def load(data_dir, dataset):
    """Load a data set by load_mnist. Returns (its data or the exit status, the text on stderr)."""
    f = MNIST_HVAE_Relu.Flags(dataset=dataset, data_dir=str(data_dir), device="cpu")
    loaded = []
    status, _, err = call(lambda argv: loaded.extend(datasets.load_mnist([f])))
    return (loaded[0] if loaded else status), err


# Ways to spoil the content of one of MNIST's files.

def truncate(content):
    return content[:-100]


def give_wrong_magic(content):
    return b"\x1f\x8b\x08\x00" + content[4:]


def swap_magic(content):
    """Give a file of images the magic number of a file of labels, and the other way round."""
    is_of_images = content[3] == 3
    return struct.pack(">i", 0x801 if is_of_images else 0x803) + content[4:]


def empty(content):
    return b""


def announce_more(content):
    return content[:4] + struct.pack(">i", 10**6) + content[8:]


SPOILERS = (truncate, give_wrong_magic, swap_magic, empty, announce_more)


class Mnist(small.InFolder):
    def test_files_as_they_are(self):
        raw = write_mnist(self.folder, 30, 20)
        for dataset in ("mnist", "auto"):
            data, err = load(self.folder, dataset)
            self.assertEqual((data.name, err), ("mnist", ""))
            [train], [test] = data.train, data.test
            self.assertEqual((train.shape, test.shape), ((30, 784), (20, 784)))
            self.assertEqual(train.dtype, torch.float32)

            # Row 7, pixel (12, 13). The file has a header of 16 bytes, then images row by row.
            content = (raw / "train-images-idx3-ubyte").read_bytes()
            byte = content[16 + 7 * 784 + 12 * 28 + 13]
            self.assertAlmostEqual(train[7, 12 * 28 + 13].item(), byte / 255, places=7)
            labels = (raw / "t10k-labels-idx1-ubyte").read_bytes()[8:]
            self.assertEqual(data.test_labels.tolist(), list(labels))

    def test_fashion_lies_beside_mnist(self):
        write_mnist(self.folder, 30, 20)
        (self.folder / "MNIST").rename(self.folder / "FashionMNIST")
        data, err = load(self.folder, "fashion")
        self.assertEqual((data.name, err), ("fashion", ""))
        self.assertEqual((len(data.train[0]), len(data.test[0])), (30, 20))

    @unittest.skipUnless(REAL_MNIST, "MNIST is not on this computer")
    def test_real_mnist(self):
        data, err = load(REAL_MNIST, "mnist")
        self.assertEqual(data.train[0].shape, (60000, 784))
        self.assertEqual(data.test[0].shape, (10000, 784))
        self.assertEqual(err, "")
        # LeCun's training set has 5,923 zeros, 6,742 ones, and a mean pixel of 0.1307.
        self.assertEqual(data.train_labels.bincount().tolist()[:2], [5923, 6742])
        self.assertAlmostEqual(data.train[0].mean().item(), 0.1307, places=4)

    def test_bad_files_are_named(self):
        """A corrupt MNIST is also no reason to take the embedded digits instead."""
        write_mnist(self.folder / "good", 110, 110)
        for file in datasets.MNIST_FILES:
            for spoil in SPOILERS:
                with self.subTest(file=file, spoil=spoil.__name__):
                    folder = self.folder / f"{file}-{spoil.__name__}"
                    shutil.copytree(self.folder / "good", folder)
                    path = folder / "MNIST" / "raw" / file
                    path.write_bytes(spoil(path.read_bytes()))
                    self.check_refused(folder, path)

    def check_refused(self, folder, path):
        for dataset in ("mnist", "auto"):
            status, err = load(folder, dataset)
            self.assertEqual(status, 2)
            self.assertIn(f"error: --data_dir: {path} is truncated or corrupt", err)
            self.assertEqual(err.count("\n"), 1)

    def test_a_name_of_a_folder_that_is_too_long(self):
        status, err = load("x" * 300, "mnist")
        self.assertEqual(status, 2)
        self.assertIn("error: --data_dir: got ", err)
        self.assertIn("too long", err)
        self.assertEqual(err.count("\n"), 1)

    def test_a_label_that_is_no_digit(self):
        raw = write_mnist(self.folder)
        labels = raw / "t10k-labels-idx1-ubyte"
        labels.write_bytes(labels.read_bytes()[:-1] + b"\x0b")
        self.assertEqual(load(self.folder, "mnist")[0], 2)

    @mock.patch("datasets._any_answers", return_value=False)
    def test_missing_and_no_network(self, _):
        for dataset in ("mnist", "fashion"):
            status, err = load(self.folder, dataset)
            self.assertEqual(status, 2)
            message = f"error: --dataset: {dataset} is not in --data_dir {str(self.folder)!r}"
            self.assertIn(message, err)
            self.assertEqual(err.count("\n"), 1)

        blank = (np.zeros((4, 28, 28), np.uint8), np.zeros(4, np.uint8))
        with mock.patch("datasets.draw_digits", return_value=blank):
            data, err = load(self.folder, "auto")
        self.assertEqual(data.name, "digits")
        self.assertIn("warning", err)
        self.assertIn("digits", err)

    @mock.patch("datasets._any_answers", side_effect=AssertionError("asked the network"))
    def test_packed_files_are_unpacked(self, _):
        raw = write_mnist(self.folder / "unpacked", 30, 20)
        packed = self.folder / "packed" / "MNIST" / "raw"
        packed.mkdir(parents=True)
        resources = []
        for file in datasets.MNIST_FILES:
            content = gzip.compress((raw / file).read_bytes())
            (packed / f"{file}.gz").write_bytes(content)
            resources.append((f"{file}.gz", hashlib.md5(content).hexdigest()))

        with mock.patch("torchvision.datasets.MNIST.resources", resources):
            data, _ = load(self.folder / "packed", "auto")
        expected, _ = load(self.folder / "unpacked", "mnist")
        torch.testing.assert_close(data.train, expected.train)

    def test_fetching_does_not_hang(self):
        """A server that accepts a connection and then says nothing counts as no network."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/file"
            self.assertFalse(datasets._any_answers([url, url], seconds=0.3))
        self.assertFalse(datasets._any_answers(["http://name.invalid/file"], seconds=0.3))

    def test_fetching_that_breaks_off(self):
        """The mirror answers at first, then every file fails."""
        error = RuntimeError("Error downloading")
        with mock.patch("datasets._any_answers", return_value=True), \
                mock.patch("torchvision.datasets.MNIST.download", side_effect=error):
            status, err = load(self.folder, "mnist")
        self.assertEqual(status, 2)
        self.assertIn("Error downloading", err)
        self.assertIsNone(socket.getdefaulttimeout())


class FewImages(small.InFolder):
    """Data sets with very few images, or none of a class."""

    def remove_digit(self, raw, digit):
        """Turn all images of a digit in the MNIST of this folder into images of the next one."""
        for split in ("train", "t10k"):
            path = raw / f"{split}-labels-idx1-ubyte"
            content = path.read_bytes()
            labels = content[8:].replace(bytes([digit]), bytes([(digit + 1) % 10]))
            path.write_bytes(content[:8] + labels)

    def single_digit(self, *flags):
        """Call MNIST_CVAE_Linear_single_digit.py on the MNIST in this test's folder."""
        return call(
            MNIST_CVAE_Linear_single_digit.main,
            "--data_dir", self.folder,
            "--out_dir", self.folder / "runs",
            "--dataset", "mnist",
            "--device", "cpu",
            *flags,
        )

    def test_a_digit_that_the_data_lacks(self):
        raw = write_mnist(self.folder)
        self.remove_digit(raw, 3)
        status, out, err = self.single_digit("--digit", "3")
        self.assertEqual((status, out), (2, ""))
        self.assertRegex(err, r"^\S+: error: --digit: got 3, but mnist has no .* of this digit\n$")
        self.assertEqual(list((self.folder / "runs").rglob("*")), [])

    def test_a_digit_that_only_the_test_images_lack(self):
        raw = write_mnist(self.folder)
        whole = (raw / "train-labels-idx1-ubyte").read_bytes()
        self.remove_digit(raw, 3)
        (raw / "train-labels-idx1-ubyte").write_bytes(whole)
        # Another digit of the same list is in the data. Nothing is trained all the same.
        status, out, err = self.single_digit("--digit", "4,3")
        self.assertEqual((status, out), (2, ""))
        self.assertRegex(err, r"^\S+: error: --digit: got 3, but mnist has no test image .*\n$")
        self.assertEqual(list((self.folder / "runs").rglob("*")), [])

    def test_one_test_image(self):
        """A script ends without any warning, which would be an error for this Python."""
        write_mnist(self.folder, 64, 1)
        data, err = load(self.folder, "mnist")
        self.assertEqual((data.test[0].shape, data.test_labels.shape, err), ((1, 784), (1,), ""))

        command = [
            sys.executable, "-W", "error",
            str(small.ROOT / "MNIST_VAE_Relu_learnable_sigma.py"),
            "--data_dir", str(self.folder),
            "--out_dir", str(self.folder / "runs"),
            "--dataset", "mnist",
            "--device", "cpu",
            "--num_epochs", "1",
            "--num_samples", "4",
        ]
        process = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual(process.returncode, 0, process.stderr)
        self.assertNotIn("Warning", process.stderr)
        # The variance over one image is 0, so no unit is active by its variance.
        header, row = table_of(process.stdout)
        self.assertEqual(row[header.index("AU")], "0")
        self.assertNotIn("nan", process.stdout)


def table_of(printed):
    """The header and the row of the table that a script prints for one setting."""
    lines = [line.split() for line in printed.split("\n")]
    for line, next_line in zip(lines, lines[1:]):
        if "elbo" in line:
            return line, next_line
    raise AssertionError(f"there is no table in {printed!r}")


class Digits(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.images, cls.labels = datasets.draw_digits(4000, seed=1)

    def test_same_seed_same_digits(self):
        again, labels = datasets.draw_digits(4000, seed=1)
        np.testing.assert_array_equal(self.images, again)
        np.testing.assert_array_equal(self.labels, labels)
        others, _ = datasets.draw_digits(4000, seed=2)
        self.assertFalse(np.array_equal(self.images, others))

    def test_they_are_images_of_ten_classes(self):
        self.assertEqual(self.images.shape, (4000, 28, 28))
        self.assertEqual(self.images.dtype, np.uint8)
        self.assertGreater(np.bincount(self.labels, minlength=10).min(), 300)
        # There is ink in each image, and almost none in the margins.
        self.assertTrue((self.images.max(axis=(1, 2)) > 200).all())
        self.assertLess(self.images[:, [0, -1], :].mean() / 255, 0.01)
        self.assertLess(self.images[:, :, [0, -1]].mean() / 255, 0.01)

    def test_classes_can_be_told_apart(self):
        """A linear classifier that saw 3,000 of the digits names the others.

        It is fitted by least squares without any tuning.
        """
        pixels = self.images.reshape(len(self.images), -1) / 255
        x = np.concatenate([pixels, np.ones((len(pixels), 1))], axis=1)
        moment = x[:3000].T @ x[:3000] + 10 * np.eye(785)
        cross_moment = x[:3000].T @ np.eye(10)[self.labels[:3000]]
        weights = np.linalg.lstsq(moment, cross_moment, rcond=None)[0]
        accuracy = ((x[3000:] @ weights).argmax(1) == self.labels[3000:]).mean()
        self.assertGreater(accuracy, 0.9)

    def test_variety(self):
        """The digits vary in more directions than a model's sixteen units can follow.

        90 % of the variance needs over twenty directions.
        """
        pixels = self.images.reshape(len(self.images), -1) / 255
        variance = np.sort(np.linalg.eigvalsh(np.cov(pixels.T)))[::-1]
        shares = np.cumsum(variance) / variance.sum()
        self.assertGreater((shares < 0.9).sum(), 20)

    def test_digits_are_kept_and_drawn_again_if_broken(self):
        def draw(n, seed):
            return self.images[:50 * seed], self.labels[:50 * seed]

        draw_digits = mock.Mock(side_effect=draw)
        with tempfile.TemporaryDirectory() as folder, \
                mock.patch("datasets.draw_digits", draw_digits):
            # 1. Training and test images are drawn.
            data, err = load(folder, "digits")
            self.assertEqual((data.name, err), ("digits", ""))
            self.assertEqual((len(data.train[0]), len(data.test[0])), (50, 100))
            self.assertEqual(draw_digits.call_count, 2)

            # 2. They are read.
            again, _ = load(folder, "digits")
            self.assertEqual(draw_digits.call_count, 2)
            torch.testing.assert_close(again.train, data.train)
            file = Path(folder, "digits.npz")
            self.assertEqual([path.name for path in Path(folder).iterdir()], ["digits.npz"])

            # 3. They are drawn again.
            file.write_bytes(file.read_bytes()[:5000])
            again, _ = load(folder, "digits")
            self.assertEqual(draw_digits.call_count, 4)
            torch.testing.assert_close(again.train, data.train)


class DeepImages(small.InFolder):
    """Tests of the images that the deep scripts read."""

    def load(self, dataset, **flags):
        """The data by load_images, or the text on stderr if the program ends."""
        f = MNIST_HVAE_Ladder.Flags(
            dataset=dataset, data_dir=str(self.folder), device="cpu", **flags)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                return datasets.load_images([f])[0]
            except SystemExit as end:
                self.assertEqual(end.code, 2)
                return err.getvalue()

    def write_cifar10(self):
        """Write files of four images each in the format of CIFAR-10.

        Returns ({name of the file: its content}, a patch of torchvision's checksums with those of
        these files).
        """
        folder = self.folder / "cifar-10-batches-py"
        folder.mkdir()
        random = np.random.default_rng(2)
        batches = {}
        for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
            batches[name] = {
                "data": random.integers(0, 256, (4, 3072), dtype=np.uint8),
                "labels": random.integers(0, 10, 4).tolist(),
            }

        checksums = {}
        meta = {"label_names": list("abcdefghij")}
        for name, content in {**batches, "batches.meta": meta}.items():
            (folder / name).write_bytes(pickle.dumps(content))
            checksums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

        from torchvision.datasets import CIFAR10
        names_and_checksums = [[name, checksums[name]] for name in batches]
        patch = mock.patch.multiple(
            CIFAR10,
            train_list=names_and_checksums[:5],
            test_list=names_and_checksums[5:],
            meta={**CIFAR10.meta, "md5": checksums["batches.meta"]},
        )
        return batches, patch


class OtherSets(DeepImages):
    """Omniglot, CIFAR-10, and the images of the deep scripts."""

    def write_omniglot(self):
        """Write a small Omniglot where torchvision looks for it.

        It has two alphabets for training and one for the test. Each has two characters with three
        drawings each. Returns a patch of torchvision's checksums with those of these files.
        """
        random = torch.Generator().manual_seed(1)
        root = self.folder / "omniglot-py"
        for part, alphabets in (("images_background", "AB"), ("images_evaluation", "C")):
            for alphabet in alphabets:
                for character in (1, 2):
                    folder = root / part / alphabet / f"character0{character}"
                    folder.mkdir(parents=True)
                    for k in range(3):
                        write_drawing(folder / f"000{character}_0{k}.png", random)

        checksums = {}
        for part in ("images_background", "images_evaluation"):
            archive = shutil.make_archive(str(root / part), "zip", root, part)
            checksums[part] = hashlib.md5(Path(archive).read_bytes()).hexdigest()
        from torchvision.datasets import Omniglot
        return mock.patch.object(Omniglot, "zips_md5", checksums)

    def test_omniglot(self):
        patch = self.write_omniglot()
        with patch:
            data = self.load("omniglot", seed=3)
        self.assertEqual(data.train[0].shape, (12, 1, 28, 28))
        self.assertEqual(data.test[0].shape, (6, 1, 28, 28))
        # Strokes are white on black, and scaling keeps their area.
        ink = data.train[0].sum(dim=(1, 2, 3)) * (105 / 28) ** 2
        torch.testing.assert_close(ink, torch.full_like(ink, 8 * 4.0), rtol=0.05, atol=0)
        self.assertEqual(data.train_labels.tolist(), [k // 3 for k in range(12)])
        self.assertEqual(data.test_labels.tolist(), [0, 0, 0, 1, 1, 1])

        drawing = next((self.folder / "omniglot-py").rglob("*.png"))
        drawing.write_bytes(b"no picture")
        with patch:
            self.assertIn("omniglot-py is truncated or corrupt", self.load("omniglot"))

    def test_cifar10(self):
        batches, patch = self.write_cifar10()
        with patch:
            data = self.load("cifar10", num_test=3)
        self.assertEqual(data.train[0].shape, (20, 3, 32, 32))
        self.assertEqual(data.test[0].shape, (3, 3, 32, 32))

        def images_of(name):
            return torch.from_numpy(batches[name]["data"]).view(4, 3, 32, 32) / 255

        for k in range(5):
            name = f"data_batch_{k + 1}"
            rows = slice(4 * k, 4 * k + 4)
            torch.testing.assert_close(data.train[0][rows], images_of(name))
            self.assertEqual(data.train_labels[rows].tolist(), batches[name]["labels"])
        torch.testing.assert_close(data.test[0], images_of("test_batch")[:3])

        (self.folder / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"cut")
        with patch:
            self.assertIn("cifar-10-batches-py is truncated or corrupt", self.load("cifar10"))

    def test_neither_on_disk_nor_to_be_fetched(self):
        for name in ("omniglot", "cifar10"):
            with mock.patch("datasets._any_answers", return_value=False):
                message = f"--dataset: {name} is not in --data_dir .* and cannot be downloaded"
                self.assertRegex(self.load(name), message)

    def test_binary_test_images(self):
        """The test images are binarised once, by the seed. The training images stay grey.

        Over many seeds, each pixel is on as often as it is grey.
        """
        small.write_mnist(self.folder)
        settings = []
        for seed in [*range(400), 0]:
            f = MNIST_HVAE_Ladder.Flags(
                dataset="mnist", data_dir=str(self.folder), device="cpu", seed=seed, num_test=50)
            settings.append(f)
        [whole] = datasets.load_mnist(settings[:1])
        data = datasets.load_images(settings)
        self.assertIs(data[0], data[-1])

        draws = torch.stack([data_of_seed.test[0] for data_of_seed in data[:400]])
        self.assertEqual(draws.unique().tolist(), [0.0, 1.0])
        grey = whole.test[0][:50].view(50, 1, 28, 28)
        standard_error = (grey * (1 - grey) / 400).sqrt().clamp(min=1e-3)
        error = (draws.mean(0) - grey) / standard_error
        self.assertLess(error.abs().max(), 5)
        in_between = (grey > 0.1) & (grey < 0.9)
        self.assertAlmostEqual(error[in_between].std().item(), 1, delta=0.1)
        torch.testing.assert_close(data[0].train[0].flatten(1), whole.train[0])


class Smaller(DeepImages):
    """--side, --num_train and --num_test of the deep scripts."""

    def setUp(self):
        super().setUp()
        raw = small.write_mnist(self.folder, 40, 30)
        self.bytes_of = {}
        for split in ("train", "t10k"):
            content = (raw / f"{split}-images-idx3-ubyte").read_bytes()
            images = np.frombuffer(content, np.uint8, offset=16)
            self.bytes_of[split] = images.reshape(-1, 1, 28, 28)

    def mnist(self, **flags):
        """The data of a setting, from a few drawn digits."""
        return self.load("mnist", **({"latents": "1"} | flags))

    def block_means(self, images, side):
        """Means over squares of images (n, C, H, H) of bytes, (n, C, side, side) in [0, 1]."""
        n, channels, full, _ = images.shape
        square = full // side
        means = np.zeros((n, channels, side, side))
        for i in range(side):
            for j in range(side):
                rows = slice(square * i, square * (i + 1))
                columns = slice(square * j, square * (j + 1))
                total = images[:, :, rows, columns].astype(int).sum((2, 3))
                means[:, :, i, j] = total / square**2 / 255
        return torch.from_numpy(means).float()

    def test_pixels_are_means_over_squares(self):
        for side in (1, 4, 7, 14, 28):
            data = self.mnist(side=side)
            expected = self.block_means(self.bytes_of["train"], side)
            torch.testing.assert_close(data.train[0], expected)
            self.assertEqual(tuple(data.test[0].shape), (30, 1, side, side))
        # 0 keeps the size of the data set.
        self.assertTrue(torch.equal(data.train[0], self.mnist().train[0]))
        self.assertTrue(torch.equal(data.test[0], self.mnist().test[0]))

    def test_binary_test_images_of_another_side(self):
        """They are binarised after the means are taken.

        Over many seeds, each pixel is on as often as the smaller image is grey.
        """
        settings = []
        for seed in range(400):
            f = MNIST_HVAE_Ladder.Flags(
                dataset="mnist",
                data_dir=str(self.folder),
                device="cpu",
                latents="1",
                side=14,
                seed=seed,
            )
            settings.append(f)
        data = datasets.load_images(settings)
        draws = torch.stack([data_of_seed.test[0] for data_of_seed in data])
        self.assertEqual(draws.unique().tolist(), [0.0, 1.0])
        grey = self.block_means(self.bytes_of["t10k"], 14)
        error = (draws.mean(0) - grey) / (grey * (1 - grey) / 400).sqrt().clamp(min=1e-3)
        self.assertLess(error.abs().max(), 5)
        in_between = (grey > 0.1) & (grey < 0.9)
        self.assertAlmostEqual(error[in_between].std().item(), 1, delta=0.1)

    def test_colours_are_means_over_squares(self):
        """They are the multiples of 1/255 that are nearest to the means."""
        batches, patch = self.write_cifar10()
        with patch:
            data = self.load("cifar10", side=16, latents="1", num_train=6)
        train = [batches[f"data_batch_{k}"]["data"] for k in (1, 2)]
        expected = self.block_means(np.concatenate(train)[:6].reshape(-1, 3, 32, 32), 16)
        torch.testing.assert_close(data.train[0], expected, rtol=0, atol=0.5001 / 255)
        test = batches["test_batch"]["data"].reshape(-1, 3, 32, 32)
        expected = self.block_means(test, 16)
        torch.testing.assert_close(data.test[0], expected, rtol=0, atol=0.5001 / 255)
        multiples = torch.arange(256.0) / 255
        for images in (data.train[0], data.test[0]):
            self.assertTrue(torch.isin(images, multiples).all())

    def test_the_first_rows(self):
        whole = self.mnist()
        data = self.mnist(num_train=7, num_test=5)
        self.assertTrue(torch.equal(data.train[0], whole.train[0][:7]))
        self.assertTrue(torch.equal(data.train_labels, whole.train_labels[:7]))
        self.assertTrue(torch.equal(data.test_labels, whole.test_labels[:5]))
        self.assertEqual((len(whole.train[0]), len(whole.test[0])), (40, 30))

        # A number above the size of the data set takes all.
        for flags in ({"num_train": 40}, {"num_train": 41}, {"num_train": 10**9}):
            self.assertTrue(torch.equal(self.mnist(**flags).train[0], whole.train[0]))

    def test_what_settings_share(self):
        """Settings share their data only if all flags that choose them are equal."""
        settings = []
        flags = ({}, {"side": 14}, {"num_train": 9}, {"side": 14, "num_train": 9}, {"num_test": 9})
        for more in flags + flags:
            f = MNIST_HVAE_Ladder.Flags(
                dataset="mnist",
                data_dir=str(self.folder),
                device="cpu",
                latents="1",
                **more,
            )
            settings.append(f)
        data = datasets.load_images(settings)
        for first, second in zip(data[:5], data[5:]):
            self.assertIs(first, second)
        self.assertEqual(len({id(data_of_setting) for data_of_setting in data}), 5)
        sides = [data_of_setting.train[0].shape[-1] for data_of_setting in data[:5]]
        self.assertEqual(sides, [28, 14, 28, 14, 28])
        counts = [len(data_of_setting.train[0]) for data_of_setting in data[:5]]
        self.assertEqual(counts, [40, 40, 9, 9, 40])


class Binary(small.InFolder):
    """Images whose pixels are all 0.0 or 1.0, as the script with Bernoulli pixels reads them."""

    def setUp(self):
        super().setUp()
        write_mnist(self.folder, 40, 30)

    def setting(self, **flags):
        flags = {"dataset": "mnist", "data_dir": str(self.folder), "device": "cpu"} | flags
        return MNIST_VAE_Bernoulli.Flags(**flags)

    def test_threshold(self):
        """A pixel is 1 where its grey value exceeds 0.5: from byte 128 on."""
        f = self.setting()
        [data] = datasets.load_binary_mnist([f])
        [grey] = datasets.load_mnist([f])
        self.assertEqual(data.name, "mnist")
        for split in ("train", "test"):
            [images], [grey_images] = getattr(data, split), getattr(grey, split)
            self.assertEqual((images.shape, images.dtype), (grey_images.shape, torch.float32))
            grey_bytes = (grey_images * 255).round()
            self.assertTrue(torch.equal(images == 1, grey_bytes >= 128))
            self.assertTrue(torch.equal(images == 0, grey_bytes <= 127))
            # Both values next to the threshold occur.
            self.assertTrue((grey_bytes == 127).any() and (grey_bytes == 128).any())
        self.assertTrue(torch.equal(data.train_labels, grey.train_labels))
        self.assertTrue(torch.equal(data.test_labels, grey.test_labels))

    def test_samples_have_the_grey_values_as_means(self):
        """Over 400 seeds each pixel is on as often as it is grey, in both splits."""
        settings = [self.setting(binarise="sample", seed=seed) for seed in range(400)]
        [grey] = datasets.load_mnist(settings[:1])
        data = datasets.load_binary_mnist(settings)
        for split in ("train", "test"):
            draws = torch.stack([getattr(data_of_seed, split)[0] for data_of_seed in data])
            self.assertEqual(draws.unique().tolist(), [0.0, 1.0])
            [grey_images] = getattr(grey, split)
            mean = draws.mean(0)
            certain = (grey_images == 0) | (grey_images == 1)
            self.assertTrue(torch.equal(mean[certain], grey_images[certain]))
            in_between = (grey_images > 0.1) & (grey_images < 0.9)
            error = (mean - grey_images) / (grey_images * (1 - grey_images) / 400).sqrt()
            self.assertLess(error[in_between].abs().max().item(), 5)
            self.assertAlmostEqual(error[in_between].std().item(), 1, delta=0.1)

    def test_samples_of_a_seed(self):
        """The same seed gives the same pixels again, and another seed others."""
        settings = [self.setting(binarise="sample", seed=seed) for seed in (3, 4)]
        once = datasets.load_binary_mnist(settings)
        again = datasets.load_binary_mnist(settings)
        for split in ("train", "test"):
            for data, same in zip(once, again):
                self.assertTrue(torch.equal(getattr(data, split)[0], getattr(same, split)[0]))
            [images], [others] = getattr(once[0], split), getattr(once[1], split)
            self.assertFalse(torch.equal(images, others))

    def test_train_and_test_images_have_draws_of_their_own(self):
        """Where both splits are equal and grey, the drawn pixels differ."""
        half = torch.full((30, 784), 0.5)
        whole = datasets.Data("grey", (half,), (half,))
        with mock.patch("datasets.load_mnist", return_value=[whole]):
            [data] = datasets.load_binary_mnist([self.setting(binarise="sample")])
        agreement = (data.train[0] == data.test[0]).float().mean().item()
        self.assertAlmostEqual(agreement, 0.5, delta=0.02)

    def test_shared_between_settings(self):
        """The seed matters for samples only, and other flags do not matter."""
        settings = [
            self.setting(),
            self.setting(beta=2.0, seed=1),
            self.setting(binarise="sample", seed=1),
            self.setting(binarise="sample", seed=1, beta=2.0),
            self.setting(binarise="sample", seed=2),
        ]
        data = datasets.load_binary_mnist(settings)
        self.assertIs(data[0], data[1])
        self.assertIs(data[2], data[3])
        self.assertEqual(len({id(data_of_setting) for data_of_setting in data}), 3)

    def test_grey_images_stay_as_they_are(self):
        f = self.setting()
        [grey] = datasets.load_mnist([f])
        before = grey.train[0].clone()
        moment = grey.moment_with_one
        with mock.patch("datasets.load_mnist", return_value=[grey]):
            [data] = datasets.load_binary_mnist([f])
        self.assertTrue(torch.equal(grey.train[0], before))
        # The moments of the binary images are their own ones.
        self.assertFalse(torch.equal(data.moment_with_one, moment))
        pixels = torch.cat([data.train[0], torch.ones(40, 1)], dim=1).double()
        torch.testing.assert_close(data.moment_with_one, pixels.T @ pixels / 40)


def write_drawing(path, random):
    """Write a picture of Omniglot's size with a black rectangle of 8 x 4 pixels on white."""
    from torchvision.transforms.functional import to_pil_image

    ink = torch.ones(1, 105, 105)
    row, column = torch.randint(5, 95, (2,), generator=random).tolist()
    ink[:, row:row + 8, column:column + 4] = 0
    to_pil_image(ink).convert("1").save(path)


if __name__ == "__main__":
    unittest.main()
