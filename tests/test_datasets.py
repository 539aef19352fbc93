"""Data: MNIST's files and what is wrong with them, fetching without a network, the embedded digits."""
import contextlib
import gzip
import hashlib
import io
import pickle
import shutil
import socket
import struct
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import MNIST_HVAE_Ladder
import datasets
import MNIST_HVAE_Relu
from tests import small
from tests.small import REAL_MNIST, call, write_mnist


def load(data_dir, dataset):
    """load_mnist's data and what it said on stderr, or the exit status instead of the data."""
    f = MNIST_HVAE_Relu.Flags(dataset=dataset, data_dir=str(data_dir), device="cpu")
    found = []
    status, _, err = call(lambda _: found.append(datasets.load_mnist([f])[0]))
    return (found[0] if found else status), err


class Mnist(small.InFolder):
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
        for file in datasets.MNIST_FILES:
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

    @mock.patch("datasets._any_answers", return_value=False)
    def test_missing_and_no_network(self, _):
        for dataset in ("mnist", "fashion"):
            status, err = load(self.folder, dataset)
            self.assertEqual(status, 2)
            self.assertIn(f"error: --dataset: {dataset} is not in --data_dir {str(self.folder)!r}", err)
            self.assertEqual(err.count("\n"), 1)
        blank = np.zeros((4, 28, 28), np.uint8), np.zeros(4, np.uint8)
        with mock.patch("datasets.draw_digits", return_value=blank):
            data, err = load(self.folder, "auto")
        self.assertEqual(data.name, "digits")
        self.assertIn("warning", err)
        self.assertIn("digits", err)

    @mock.patch("datasets._any_answers", side_effect=AssertionError("asked the network"))
    def test_packed_files_are_unpacked(self, _):
        raw, packed = write_mnist(self.folder / "a", 30, 20), self.folder / "b" / "MNIST" / "raw"
        packed.mkdir(parents=True)
        resources = []
        for file in datasets.MNIST_FILES:
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
            self.assertFalse(datasets._any_answers([url, url], seconds=0.3))
        self.assertFalse(datasets._any_answers(["http://name.invalid/file"], seconds=0.3))

    def test_fetching_that_breaks_off_falls_back(self):
        """The mirror answers at first, then every file fails."""
        with mock.patch("datasets._any_answers", return_value=True), \
                mock.patch("torchvision.datasets.MNIST.download", side_effect=RuntimeError("Error downloading")):
            status, err = load(self.folder, "mnist")
        self.assertEqual(status, 2)
        self.assertIn("Error downloading", err)
        self.assertIsNone(socket.getdefaulttimeout())


class Digits(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.images, cls.labels = datasets.draw_digits(4000, seed=1)

    def test_same_seed_same_digits(self):
        again, labels = datasets.draw_digits(4000, seed=1)
        np.testing.assert_array_equal(self.images, again)
        np.testing.assert_array_equal(self.labels, labels)
        self.assertFalse(np.array_equal(self.images, datasets.draw_digits(4000, seed=2)[0]))

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
        with tempfile.TemporaryDirectory() as folder, mock.patch("datasets.draw_digits", drawn):
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


class Sets(small.InFolder):
    def load(self, dataset, **flags):
        """The data, or what was said on stderr."""
        f = MNIST_HVAE_Ladder.Flags(dataset=dataset, data_dir=str(self.folder), device="cpu", **flags)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                return datasets.load_images([f])[0]
            except SystemExit as end:
                self.assertEqual(end.code, 2)
                return err.getvalue()

    def write_omniglot(self):
        """Two alphabets for training, one for the test, of two characters and three drawings each, in torchvision's folders, and
        what patches its checksums with those of these files."""
        from torchvision.transforms.functional import to_pil_image
        random = torch.Generator().manual_seed(1)
        for part, alphabets in (("images_background", "AB"), ("images_evaluation", "C")):
            for alphabet in alphabets:
                for character in (1, 2):
                    folder = self.folder / "omniglot-py" / part / alphabet / f"character0{character}"
                    folder.mkdir(parents=True)
                    for k in range(3):
                        ink = torch.ones(1, 105, 105)
                        row, column = torch.randint(5, 95, (2,), generator=random).tolist()
                        ink[:, row:row + 8, column:column + 4] = 0            # black on white
                        to_pil_image(ink).convert("1").save(folder / f"000{character}_0{k}.png")
        sums = {}
        for part in ("images_background", "images_evaluation"):
            path = shutil.make_archive(str(self.folder / "omniglot-py" / part), "zip", self.folder / "omniglot-py", part)
            sums[part] = hashlib.md5(Path(path).read_bytes()).hexdigest()
        from torchvision.datasets import Omniglot
        return mock.patch.object(Omniglot, "zips_md5", sums)

    def test_omniglot(self):
        patch = self.write_omniglot()
        with patch:
            data = self.load("omniglot", seed=3)
        self.assertEqual((data.train[0].shape, data.test[0].shape), ((12, 1, 28, 28), (6, 1, 28, 28)))
        ink = data.train[0].sum(dim=(1, 2, 3)) * (105 / 28) ** 2              # white on black, and area is kept
        torch.testing.assert_close(ink, torch.full_like(ink, 8 * 4.0), rtol=0.05, atol=0)
        self.assertEqual(data.train_labels.tolist(), [k // 3 for k in range(12)])
        self.assertEqual(data.test_labels.tolist(), [0, 0, 0, 1, 1, 1])
        broken = next((self.folder / "omniglot-py").rglob("*.png"))
        broken.write_bytes(b"no picture")
        with patch:
            self.assertIn("omniglot-py is truncated or corrupt", self.load("omniglot"))

    def write_cifar10(self):
        """Files of a few images each in the format of CIFAR-10, and what patches torchvision's checksums with theirs."""
        folder, random, files = self.folder / "cifar-10-batches-py", np.random.default_rng(2), {}
        folder.mkdir()
        for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
            files[name] = {"data": random.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": random.integers(0, 10, 4).tolist()}
        contents = files | {"batches.meta": {"label_names": list("abcdefghij")}}
        sums = {}
        for name, content in contents.items():
            (folder / name).write_bytes(pickle.dumps(content))
            sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
        pairs = [[name, of] for name, of in sums.items()]
        from torchvision.datasets import CIFAR10
        patch = mock.patch.multiple(CIFAR10, train_list=pairs[:5], test_list=pairs[5:6],
                                    meta=CIFAR10.meta | {"md5": sums["batches.meta"]})
        return files, patch

    def test_cifar10(self):
        files, patch = self.write_cifar10()
        with patch:
            data = self.load("cifar10", num_test=3)
        self.assertEqual((data.train[0].shape, data.test[0].shape), ((20, 3, 32, 32), (3, 3, 32, 32)))
        for k, name in enumerate(list(files)[:5]):
            of_file = torch.from_numpy(files[name]["data"]).view(4, 3, 32, 32) / 255
            torch.testing.assert_close(data.train[0][4 * k:4 * k + 4], of_file)
            self.assertEqual(data.train_labels[4 * k:4 * k + 4].tolist(), files[name]["labels"])
        torch.testing.assert_close(data.test[0], torch.from_numpy(files["test_batch"]["data"][:3]).view(3, 3, 32, 32) / 255)
        (self.folder / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"cut")
        with patch:
            self.assertIn("cifar-10-batches-py is truncated or corrupt", self.load("cifar10"))

    def test_neither_on_disk_nor_to_be_fetched(self):
        for name in ("omniglot", "cifar10"):
            with mock.patch("datasets._any_answers", return_value=False):
                self.assertRegex(self.load(name), f"--dataset: {name} is not in --data_dir .* and cannot be fetched")

    def test_binary_test_images(self):
        """Binarised once, by the seed: each pixel is on as often as it is grey, over seeds; the training images stay grey."""
        small.write_mnist(self.folder)
        settings = [MNIST_HVAE_Ladder.Flags(dataset="mnist", data_dir=str(self.folder), device="cpu", seed=seed, num_test=50)
                    for seed in [*range(400), 0]]
        whole = datasets.load_mnist(settings[:1])[0]
        data = datasets.load_images(settings)
        self.assertIs(data[0], data[-1])
        draws = torch.stack([d.test[0] for d in data[:400]])
        self.assertEqual(draws.unique().tolist(), [0.0, 1.0])
        grey = whole.test[0][:50].view(50, 1, 28, 28)
        error = (draws.mean(0) - grey) / (grey * (1 - grey) / 400).sqrt().clamp(min=1e-3)
        self.assertLess(error.abs().max(), 5)
        self.assertAlmostEqual(error[(grey > 0.1) & (grey < 0.9)].std().item(), 1, delta=0.1)
        torch.testing.assert_close(data[0].train[0].flatten(1), whole.train[0])


if __name__ == "__main__":
    unittest.main()
