"""Data: MNIST's files and what is wrong with them, fetching without a network, the embedded digits."""
import gzip
import hashlib
import shutil
import socket
import struct
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import common
import MNIST_HVAE_Relu
from tests.small import REAL_MNIST, call, write_mnist


def load(data_dir, dataset):
    """load_mnist's data and what it said on stderr, or the exit status instead of the data."""
    f = MNIST_HVAE_Relu.Flags(dataset=dataset, data_dir=str(data_dir), device="cpu")
    found = []
    status, _, err = call(lambda _: found.append(common.load_mnist([f])[0]))
    return (found[0] if found else status), err


class Mnist(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def test_files_as_they_are(self):
        raw = write_mnist(self.folder, 30, 20)
        for dataset in ("mnist", "auto"):
            data, err = load(self.folder, dataset)
            self.assertEqual((data.name, err), ("mnist", ""))
            [train], [test] = data.train, data.test
            self.assertEqual((train.shape, test.shape, train.dtype), ((30, 784), (20, 784), torch.float32))
            # Row 7, pixel (12, 13), straight from the file: 16 bytes of header, then images row by row.
            byte = (raw / "train-images-idx3-ubyte").read_bytes()[16 + 7 * 784 + 12 * 28 + 13]
            self.assertAlmostEqual(train[7, 12 * 28 + 13].item(), byte / 255, places=7)
            self.assertEqual(data.test_labels.tolist(), list((raw / "t10k-labels-idx1-ubyte").read_bytes()[8:]))

    def test_fashion_lies_beside_mnist(self):
        write_mnist(self.folder, 30, 20)
        (self.folder / "MNIST").rename(self.folder / "FashionMNIST")
        data, err = load(self.folder, "fashion")
        self.assertEqual((data.name, len(data.train[0]), len(data.test[0]), err), ("fashion", 30, 20, ""))

    @unittest.skipUnless(REAL_MNIST, "MNIST is not here")
    def test_real_mnist(self):
        data, err = load(REAL_MNIST, "mnist")
        self.assertEqual((data.train[0].shape, data.test[0].shape, err), ((60000, 784), (10000, 784), ""))
        # LeCun's training set: 5,923 zeros and 6,742 ones, mean pixel 0.1307.
        self.assertEqual(data.train_labels.bincount().tolist()[:2], [5923, 6742])
        self.assertAlmostEqual(data.train[0].mean().item(), 0.1307, places=4)

    def test_bad_files_are_named(self):
        """Truncated, wrong magic number, labels for images, empty, labels that are no digits."""
        def truncate(content):
            return content[:-100]

        def wrong_magic(content):
            return b"\x1f\x8b\x08\x00" + content[4:]

        def wrong_kind(content):                          # a vector's magic number in a file of images and vice versa
            return struct.pack(">i", 0x801 if content[3] == 3 else 0x803) + content[4:]

        def empty(content):
            return b""

        def more_announced(content):
            return content[:4] + struct.pack(">i", 10**6) + content[8:]

        write_mnist(self.folder / "good", 110, 110)
        for file in common.MNIST_FILES:
            for k, spoil in enumerate((truncate, wrong_magic, wrong_kind, empty, more_announced)):
                with self.subTest(file=file, spoil=spoil.__name__):
                    shutil.copytree(self.folder / "good", self.folder / f"{file}{k}")
                    raw = self.folder / f"{file}{k}" / "MNIST" / "raw"
                    (raw / file).write_bytes(spoil((raw / file).read_bytes()))
                    for dataset in ("mnist", "auto"):     # a corrupt MNIST is no reason to fall back
                        status, err = load(self.folder / f"{file}{k}", dataset)
                        self.assertEqual(status, 2)
                        self.assertIn(f"error: --data_dir: {raw / file} is truncated or corrupt", err)
                        self.assertEqual(err.count("\n"), 1)
        raw = write_mnist(self.folder / "eleven")
        labels = raw / "t10k-labels-idx1-ubyte"
        labels.write_bytes(labels.read_bytes()[:-1] + b"\x0b")
        self.assertEqual(load(self.folder / "eleven", "mnist")[0], 2)

    @mock.patch("common._any_answers", return_value=False)
    def test_missing_and_no_network(self, _):
        for dataset in ("mnist", "fashion"):
            status, err = load(self.folder, dataset)
            self.assertEqual(status, 2)
            self.assertIn(f"error: --dataset: {dataset} is not in --data_dir {str(self.folder)!r}", err)
            self.assertEqual(err.count("\n"), 1)
        blank = np.zeros((4, 28, 28), np.uint8), np.zeros(4, np.uint8)
        with mock.patch("common.draw_digits", return_value=blank):
            data, err = load(self.folder, "auto")
        self.assertEqual(data.name, "digits")
        self.assertIn("warning", err)
        self.assertIn("digits", err)

    @mock.patch("common._any_answers", side_effect=AssertionError("asked the network"))
    def test_packed_files_are_unpacked(self, _):
        raw, packed = write_mnist(self.folder / "a", 30, 20), self.folder / "b" / "MNIST" / "raw"
        packed.mkdir(parents=True)
        resources = []
        for file in common.MNIST_FILES:
            content = gzip.compress((raw / file).read_bytes())
            (packed / f"{file}.gz").write_bytes(content)
            resources.append((f"{file}.gz", hashlib.md5(content).hexdigest()))
        with mock.patch("torchvision.datasets.MNIST.resources", resources):
            data, _ = load(self.folder / "b", "auto")
        torch.testing.assert_close(data.train, load(self.folder / "a", "mnist")[0].train)

    def test_fetching_does_not_hang(self):
        """A server that accepts and then says nothing is no network."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/file"
            self.assertFalse(common._any_answers([url, url], seconds=0.3))
        self.assertFalse(common._any_answers(["http://name.invalid/file"], seconds=0.3))

    def test_fetching_that_breaks_off_falls_back(self):
        """The mirror answers at first, then every file fails."""
        with mock.patch("common._any_answers", return_value=True), \
                mock.patch("torchvision.datasets.MNIST.download", side_effect=RuntimeError("Error downloading")):
            status, err = load(self.folder, "mnist")
        self.assertEqual(status, 2)
        self.assertIn("Error downloading", err)
        self.assertIsNone(socket.getdefaulttimeout())


class Digits(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.images, cls.labels = common.draw_digits(4000, seed=1)

    def test_same_seed_same_digits(self):
        again, labels = common.draw_digits(4000, seed=1)
        np.testing.assert_array_equal(self.images, again)
        np.testing.assert_array_equal(self.labels, labels)
        self.assertFalse(np.array_equal(self.images, common.draw_digits(4000, seed=2)[0]))

    def test_they_are_images_of_ten_classes(self):
        self.assertEqual((self.images.shape, self.images.dtype), ((4000, 28, 28), np.uint8))
        self.assertGreater(np.bincount(self.labels, minlength=10).min(), 300)
        self.assertTrue((self.images.max(axis=(1, 2)) > 200).all())           # ink in each
        self.assertLess(self.images[:, [0, -1], :].mean() / 255, 0.01)        # and the margins free
        self.assertLess(self.images[:, :, [0, -1]].mean() / 255, 0.01)

    def test_classes_can_be_told_apart(self):
        """A linear classifier (least squares, no tuning) that saw 3,000 of them names the others."""
        x = np.concatenate([self.images.reshape(len(self.images), -1) / 255, np.ones((len(self.images), 1))], axis=1)
        weights = np.linalg.lstsq(x[:3000].T @ x[:3000] + 10 * np.eye(785), x[:3000].T @ np.eye(10)[self.labels[:3000]],
                                  rcond=None)[0]
        accuracy = ((x[3000:] @ weights).argmax(1) == self.labels[3000:]).mean()
        self.assertGreater(accuracy, 0.9)

    def test_variety(self):
        """More directions of variation than the model's sixteen units: 90 % of the variance needs over twenty."""
        x = self.images.reshape(len(self.images), -1) / 255
        variance = np.sort(np.linalg.eigvalsh(np.cov(x.T)))[::-1]
        self.assertGreater((np.cumsum(variance) / variance.sum() < 0.9).sum(), 20)

    def test_kept_and_drawn_again_if_broken(self):
        drawn = mock.Mock(side_effect=lambda n, seed: (self.images[:50 * seed], self.labels[:50 * seed]))
        with tempfile.TemporaryDirectory() as folder, mock.patch("common.draw_digits", drawn):
            data, err = load(folder, "digits")
            self.assertEqual((data.name, len(data.train[0]), len(data.test[0]), err), ("digits", 50, 100, ""))
            self.assertEqual(drawn.call_count, 2)
            again, _ = load(folder, "digits")
            self.assertEqual(drawn.call_count, 2)
            torch.testing.assert_close(again.train, data.train)
            file = Path(folder, "digits.npz")
            self.assertEqual([path.name for path in Path(folder).iterdir()], ["digits.npz"])
            file.write_bytes(file.read_bytes()[:5000])
            again, _ = load(folder, "digits")
            self.assertEqual(drawn.call_count, 4)
            torch.testing.assert_close(again.train, data.train)


if __name__ == "__main__":
    unittest.main()
