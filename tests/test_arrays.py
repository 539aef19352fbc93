"""arrays.py: files of every kind, what it refuses to read, remarks, categories, and halves of rows.

Many tests call predict_collapse.py, whose messages name the flag and the place in the file. For
text files see test_text_files.py.
"""
import contextlib
import io
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

# What the names of files end in.
SUFFIXES = (".npy", ".npz", ".csv", ".tsv", ".pt")


class ReadingCase(Case):
    """Tests that read files with the functions of arrays.py."""

    def read(self, path, **flags):
        """(rows, stderr) of the file that --x names, with these other flags."""
        f = predict_collapse.Flags(x=str(path), **flags)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            sources = arrays.open_rows(f, ("x",))
            [rows] = arrays.read_all(f, sources)
        self.assertEqual(rows.dtype, np.float64)
        self.assertEqual(rows.shape, (sources[0].count, sources[0].columns))
        return rows, err.getvalue()

    def check_rows(self, path, expected, **flags):
        """Check the rows of a file, in chunks of different lengths. Returns stderr."""
        for chunk in (4096, 4):
            with mock.patch("arrays.CHUNK", chunk):
                rows, err = self.read(path, **flags)
            np.testing.assert_array_equal(rows, expected)
        return err


class Files(ReadingCase):
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
        theta = np.linalg.svd((whole - whole.mean(0)) / 300**0.5, compute_uv=False)
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
        torch.save({"x": torch.ones(3, 2), "y": torch.ones(3, 2)}, self.folder / "dict.pt")
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
            "wants a file whose name ends in .npy, .npz, .csv, .tsv, .pt or a folder of images",
        )

    def test_no_file(self):
        """A folder without images and an absent file are refused in one line."""
        x = self.save("x.npy", self.x)
        for suffix in SUFFIXES:
            folder = self.folder / f"folder{suffix}"
            folder.mkdir()
            self.refuse_in_one_line(["--x", folder], "--x", folder.name, "contains no images")
            self.refuse_in_one_line(
                ["--x", x, "--collapsed", 1, "--residual", folder],
                "--residual", folder.name, "regular file")
            self.refuse_in_one_line(
                ["--x", self.folder / f"absent{suffix}"],
                "--x", f"absent{suffix}", "No such file")
        self.refuse_in_one_line(["--x", self.folder / "absent"], "wants a file whose name ends in")

    @unittest.skipUnless(os.path.exists("/dev/null"), "there is no /dev/null")
    def test_a_device(self):
        self.refuse_in_one_line(["--x", "/dev/null"], "--x", "/dev/null", "wants a file")
        for suffix in SUFFIXES:
            link = self.folder / f"device{suffix}"
            link.symlink_to("/dev/null")
            self.refuse_in_one_line(["--x", link], "--x", link.name, "regular file")

    @unittest.skipUnless(hasattr(os, "mkfifo"), "there are no FIFOs")
    def test_a_fifo(self):
        """Opening a FIFO would wait for a writer for ever."""
        x = self.save("x.npy", self.x)
        for suffix in SUFFIXES:
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


class NamedArrays(ReadingCase):
    """Files with several arrays: FILE:NAME chooses one."""

    def setUp(self):
        super().setUp()
        np.savez(self.folder / "two.npz", train=self.x, test=self.y)
        torch.save(
            {"train": torch.from_numpy(self.x), "test": torch.from_numpy(self.y), "epoch": 3},
            self.folder / "two.pt",
        )

    def test_names(self):
        for name in ("two.npz", "two.pt"):
            self.check_rows(f"{self.folder / name}:train", self.x)
            self.check_rows(f"{self.folder / name}:test", self.y)
        # The name of a file may contain a colon, too.
        if os.name != "nt":
            path = self.folder / "a.npz:train"
            path.mkdir()
            path /= "two.npz"
            np.savez(path, self.x)
            self.check_rows(path, self.x)

    def test_a_single_array_needs_no_name(self):
        torch.save({"x": torch.from_numpy(self.x), "epoch": 3}, self.folder / "one.pt")
        np.savez(self.folder / "one.npz", x=self.x)
        for name in ("one.npz", "one.pt"):
            self.check_rows(self.folder / name, self.x)
            self.check_rows(f"{self.folder / name}:x", self.x)

    def test_the_tensors_of_a_tuple_have_numbers(self):
        """The files of old versions of torchvision's MNIST are of this kind."""
        torch.save((torch.from_numpy(self.x), torch.arange(300)), self.folder / "pair.pt")
        self.check_rows(f"{self.folder / 'pair.pt'}:0", self.x)
        self.refuse_in_one_line(
            ["--x", self.folder / "pair.pt"], "contains 2 arrays (0, 1)", "pair.pt:0")

    def test_no_name(self):
        for name in ("two.npz", "two.pt"):
            path = self.folder / name
            self.refuse_in_one_line(
                ["--x", path],
                f"--x: {str(path)!r} cannot be read as an array: it contains 2 arrays (train, "
                f"test), wants the name of one, as in --x {path}:train",
            )
        # Long lists are cut.
        torch.save(
            {f"layer_{i}.weight": torch.ones(2, 2) for i in range(9)}, self.folder / "state.pt")
        line = self.refuse(["--x", self.folder / "state.pt"], "9 arrays (layer_0.weight, ")
        self.assertIn("layer_5.weight, ...)", line)
        self.assertNotIn("layer_6", line)

    def test_unknown_names(self):
        for name in ("two.npz", "two.pt"):
            self.refuse_in_one_line(
                ["--x", f"{self.folder / name}:valid"],
                "--x", name, "no array 'valid', wants one of train, test")
        self.refuse_in_one_line(
            ["--x", f"{self.folder / 'absent.npz'}:x"], "absent.npz", "No such file")
        torch.save(torch.ones(3, 2), self.folder / "tensor.pt")
        self.refuse_in_one_line(
            ["--x", f"{self.folder / 'tensor.pt'}:x"], "without a name")
        np.savez(self.folder / "none.npz")
        torch.save({"epoch": 3}, self.folder / "none.pt")
        for name in ("none.npz", "none.pt"):
            self.refuse_in_one_line(["--x", self.folder / name], name, "contains no arrays")
        np.savez(self.folder / "x.npz", x=self.x)
        self.refuse_in_one_line(
            ["--x", f"{self.save('x.npy', self.x)}:x"], "wants a file whose name ends in")


class SparseMatrices(ReadingCase):
    """.npz files as scipy.sparse.save_npz writes them."""

    # Two rows and the last column are 0.
    DENSE = np.array([
        [0, 2.5, 0, 0], [0, 0, 0, 0], [1, 0, -3, 0], [0, 4, 0, 0], [0, 0, 5, 0], [0, 0, 0, 0],
    ])

    def save_sparse(self, name, **parts):
        """Write the arrays of a sparse matrix. Returns the path."""
        np.savez(self.folder / name, **parts)
        return self.folder / name

    def entries(self):
        """(data, row, col) of the entries, by rows."""
        row, col = np.nonzero(self.DENSE)
        return self.DENSE[row, col], row, col

    def test_csr(self):
        data, _, col = self.entries()
        pointers = [0, 1, 1, 3, 4, 5, 5]
        for kind in (b"csr", "csr"):
            path = self.save_sparse(
                "x.npz",
                indices=col.astype(np.int32),
                indptr=np.array(pointers, np.int32),
                format=kind,
                shape=(6, 4),
                data=data,
            )
            self.check_rows(path, self.DENSE)

    def test_csc(self):
        columns, rows = np.nonzero(self.DENSE.T)
        path = self.save_sparse(
            "x.npz",
            indices=rows,
            indptr=np.array([0, 1, 3, 5, 5]),
            format=b"csc",
            shape=(6, 4),
            data=self.DENSE.T[columns, rows],
        )
        self.check_rows(path, self.DENSE)

    def test_coo(self):
        """Entries may have any order, and those at the same place are summed."""
        data, row, col = self.entries()
        order = [3, 0, 4, 1, 2]
        data, row, col = data[order], row[order], col[order]
        parts = {"data": data, "row": row, "col": col}
        path = self.save_sparse("x.npz", format=b"coo", shape=(6, 4), **parts)
        self.check_rows(path, self.DENSE)
        path = self.save_sparse("x.npz", shape=(6, 4), **parts)
        self.check_rows(path, self.DENSE)
        # Without a shape, it ends with the last entry.
        self.check_rows(self.save_sparse("x.npz", **parts), self.DENSE[:5, :3])

        twice = {name: np.concatenate([part, part]) for name, part in parts.items()}
        path = self.save_sparse("x.npz", format=b"coo", shape=(6, 4), **twice)
        self.check_rows(path, 2 * self.DENSE)

    def test_a_part_by_its_name(self):
        """A name still chooses an array."""
        data, row, col = self.entries()
        path = self.save_sparse("x.npz", data=np.stack([data, data], 1), row=row, col=col)
        self.check_rows(f"{path}:data", np.stack([data, data], 1))

    def test_columns_of_wide_rows(self):
        """Only few rows are dense at a time, also where few columns are chosen."""
        path = self.save_sparse(
            "x.npz", data=[1.0, 2.0], row=[0, 9], col=[7, 10**6 - 1], shape=(10, 10**6))
        source = arrays.open_file(predict_collapse.Flags(x=str(path), columns="7"), "x")
        self.assertEqual((source.columns, arrays.chunk_size([source])), (1, 8))

    def test_other_formats(self):
        data, row, col = self.entries()
        for kind in (b"bsr", b"dia"):
            path = self.save_sparse("x.npz", format=kind, shape=(6, 4), data=data)
            self.refuse_in_one_line(
                ["--x", path],
                f"its sparse format is {kind.decode()}, wants csr, csc or coo", ".tocsr()")
        for bad in ({"row": row + 2}, {"col": col - 1}, {"data": data[1:]}):
            parts = {"data": data, "row": row, "col": col, "shape": (6, 4), **bad}
            self.refuse_in_one_line(
                ["--x", self.save_sparse("x.npz", **parts)], "do not fit 6 rows of 4 columns")
        path = self.save_sparse("x.npz", data=1j * data, row=row, col=col)
        self.refuse_in_one_line(["--x", path], "wants real numbers")


class TorchFiles(ReadingCase):
    def test_the_old_format(self):
        path = self.folder / "old.pt"
        torch.save(
            torch.from_numpy(self.x), path, _use_new_zipfile_serialization=False)
        self.check_rows(path, self.x)

    def test_other_objects(self):
        """The messages of torch have many lines and colours."""
        model = torch.nn.Linear(3, 2)
        for name, value in (
            ("model.pt", model),
            ("array.pt", self.x),
            ("data_set.pt", torch.utils.data.TensorDataset(torch.ones(3))),
        ):
            path = self.folder / name
            torch.save(value, path)
            self.refuse_in_one_line(
                ["--x", path],
                f"--x: {str(path)!r} cannot be read as an array: it holds objects other than "
                "tensors; save one tensor with torch.save(x, FILE), or an array with np.save",
            )
            torch.save(value, path, _use_new_zipfile_serialization=False)
            self.refuse_in_one_line(["--x", path], name, "objects other than tensors")

    def test_broken_files(self):
        path = self.folder / "x.pt"
        torch.save(torch.from_numpy(self.x), path)
        content = path.read_bytes()
        for broken in (b"", b"no tensor", content[:2000]):
            path.write_bytes(broken)
            self.refuse_in_one_line(["--x", path], "x.pt", "not in the format .pt")


class Images(ReadingCase):
    """Folders of images."""

    def setUp(self):
        super().setUp()
        self.images = self.folder / "images"
        self.pixels = np.random.default_rng(4).integers(0, 256, (6, 1, 4, 5), dtype=np.uint8)
        # The order of the paths is not that in which they are written.
        for place in (3, 0, 5, 1, 4, 2):
            subfolder = "b" if place > 3 else "a/deep"
            self.write_image(f"{subfolder}/{place}.png", self.pixels[place])

    def write_image(self, name, pixels):
        """Write pixels (channels, height, width) as an image. Returns its path."""
        import matplotlib.image
        from torchvision.io import write_png

        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if name.lower().endswith("png"):
                write_png(torch.from_numpy(pixels), str(path))
            else:
                matplotlib.image.imsave(path, pixels.transpose(1, 2, 0))
        return path

    def test_pixels(self):
        """Images of all subfolders, in the order of their paths."""
        self.write("images/notes.txt", "no image")
        self.write("images/._0.png", "a hidden file of macOS")
        err = self.check_rows(self.images, self.pixels.reshape(6, -1))
        self.assertIn("--x looks like pixels from 0 to 255", err)
        self.images = self.images.rename(self.folder / "images.csv")
        self.check_rows(self.images, self.pixels.reshape(6, -1)[:, [3, 0]], columns="3,0")

    def test_a_prediction(self):
        saved, out, _ = self.predict("--x", self.images, "--scale")
        rows = self.pixels.reshape(6, -1) / 255
        theta = np.linalg.svd((rows - rows.mean(0)) / 6**0.5, compute_uv=False)
        np.testing.assert_allclose(saved["predicted"]["theta"], theta[:5], rtol=1e-9)
        self.assertIn("images (6 rows)", out)

    def test_other_formats(self):
        """Formats that torchvision itself does not decode, and upper case."""
        colours = np.random.default_rng(5).integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
        for suffix in (".bmp", ".ppm", ".tiff", ".PNG"):
            folder = self.folder / suffix[1:]
            self.images = folder
            for place, pixels in enumerate(colours):
                self.write_image(f"{place}{suffix}", pixels)
            rows, _ = self.read(folder)
            # matplotlib writes the opacity as a fourth channel in some formats.
            np.testing.assert_array_equal(
                rows.reshape(2, -1, 4, 5)[:, :3], colours, err_msg=suffix)

        # A .pgm file has one channel.
        folder = self.folder / "faces"
        folder.mkdir()
        for place in range(2):
            header = b"P5 5 4 255\n"
            (folder / f"{place}.pgm").write_bytes(header + self.pixels[place].tobytes())
        self.check_rows(folder, self.pixels[:2].reshape(2, -1))

    def test_different_shapes(self):
        first = self.images / "a" / "deep" / "0.png"
        for shape in ((3, 4, 5), (1, 5, 4)):
            path = self.write_image("b/6.png", np.zeros(shape, np.uint8))
            self.refuse(
                ["--x", self.images],
                f"--x: the image {str(path)!r} has the shape {shape} and the type uint8, wants "
                f"(1, 4, 5) and uint8 like {str(first)!r}",
            )

    def test_broken_images(self):
        path = self.images / "b" / "4.png"
        content = path.read_bytes()
        for broken in (b"", b"no image", content[:40]):
            path.write_bytes(broken)
            self.refuse(
                ["--x", self.images],
                f"--x: the file {str(path)!r} cannot be decoded as an image")
        # The first image is read before the others.
        first = self.images / "a" / "deep" / "0.bmp"
        first.write_bytes(b"no image")
        self.refuse_in_one_line(["--x", self.images], str(first), "cannot be decoded")

    def test_no_images(self):
        (self.folder / "empty").mkdir()
        self.refuse_in_one_line(
            ["--x", self.folder / "empty"], "--x", "empty", "contains no images")

    def test_a_bad_number_is_named_by_its_image(self):
        path = self.images / "a" / "deep" / "1.png"
        pixels = np.zeros((6, 1, 4, 5), np.uint8)
        pixels[1, 0, 1, 2] = 9
        for place, image in enumerate(pixels):
            self.write_image(f"{'b' if place > 3 else 'a/deep'}/{place}.png", image)
        self.refuse(
            ["--x", self.images, "--likelihood", "bernoulli"],
            f"a number in the image {str(path)!r}, column 7 (counted from 0) is 9, wants")


class Columns(ReadingCase):
    """--columns and --drop."""

    def test_columns_of_arrays(self):
        """They count from 0, after each row is flattened."""
        x = self.save("x.npy", self.x.reshape(300, 2, 3))
        self.check_rows(x, self.x[:, [4, 0]], columns="4, 0")
        self.check_rows(x, self.x[:, [1, 2, 4]], drop="0,3,5")
        self.check_rows(x, self.x[:, [3]], columns="3,5", drop="5,1")
        np.savez(self.folder / "x.npz", self.x)
        self.check_rows(self.folder / "x.npz", self.x[:, [4, 0]], columns="4,0")

        broken = self.x.copy()
        broken[217, 3] = math.inf
        path = self.save("broken.npy", broken)
        self.check_rows(path, self.x[:, [4, 5]], columns="4,5")
        self.refuse(["--x", path, "--columns", "5,3"], "row 217 and column 3 (both counted from 0)")

    def test_columns_of_text_files(self):
        path = self.write("x.csv", 'id,size,kind,"age, years"\na,1,cat,3\nb,2,dog,5\nc,4,cat,6\n')
        rows = np.array([[1.0, 3], [2, 5], [4, 6]])
        self.check_rows(path, rows, drop="id,kind")
        self.check_rows(path, rows[:, ::-1], columns='"age, years",size')
        path = self.write("x.csv", "a,1,3\nb,2,5\nc,4,6\n")
        self.check_rows(path, rows, columns="1,2")

    def test_only_x(self):
        x = self.save("x.npy", self.x)
        text = "a,b\n" + "".join(f"{a},{b}\n" for a, b in self.y[:, :2])
        for y in (self.write("y.csv", text), self.save("y.npy", self.y[:, :2])):
            f = predict_collapse.Flags(x=str(x), y=str(y), columns="2", model="cvae")
            with contextlib.redirect_stderr(io.StringIO()):
                rows, targets = arrays.read_all(f, arrays.open_rows(f, ("x", "y")))
            np.testing.assert_array_equal(rows, self.x[:, [2]])
            np.testing.assert_array_equal(targets, self.y[:, :2])

    def test_wrong_columns(self):
        x = self.save("x.npy", self.x)
        text = self.write("x.csv", "age,size,size,height\n1,2,3,4\n2,3,4,6\n")
        for path, flag, value, words in (
            (x, "columns", "6", "--x has no column '6', wants numbers from 0 to 5"),
            (x, "drop", "age", "--x has no column 'age', wants numbers from 0 to 5"),
            (text, "columns", "hight", "no column 'hight', wants names such as height"),
            (text, "columns", "0", "no column '0', wants names such as age, size, size, height"),
            (text, "drop", "size", "--x has 2 columns 'size', wants other names"),
            (text, "columns", "age,age", "got 'age' twice, wants each column once"),
            (x, "drop", "5,1,5", "got '5' twice, wants each column once"),
            (x, "drop", "0,1,2,3,4,5", "wants at least one column to be left"),
            (x, "columns", "0,", "--x has no column ''"),
        ):
            with self.subTest(value=value):
                self.refuse_in_one_line(["--x", path, f"--{flag}", value], f"--{flag}: ", words)
        self.refuse_in_one_line(
            ["--x", x, "--columns", "1,2", "--drop", "2,1"], "--drop: got '2,1', wants at least")


class MissingNumbers(ReadingCase):
    """--missing drop, for numbers that are nan. For text files see test_text_files.py."""

    def test_rows_are_left_out(self):
        broken = self.x.copy()
        broken[[0, 8, 8, 299], [0, 1, 2, 5]] = math.nan
        kept = np.delete(self.x, [0, 8, 299], axis=0)
        path = self.save("x.npy", broken)
        err = self.check_rows(path, kept, missing="drop")
        self.assertIn("note: 3 of 300 rows lack a number and are left out\n", err)
        # A column that is left out need not have all numbers.
        kept = np.delete(self.x, [8], axis=0)[:, [2, 4]]
        self.check_rows(path, kept, missing="drop", columns="2,4")
        err = self.check_rows(path, self.x[:, 3:5], missing="drop", columns="3,4")
        self.assertNotIn("lack", err)

    def test_x_and_y_stay_aligned(self):
        x = self.x.copy()
        x[5, 1] = math.nan
        y = self.y.copy()
        y[7] = math.nan
        paths = {"x": str(self.save("x.npy", x)), "y": str(self.save("y.npy", y))}
        f = predict_collapse.Flags(**paths, model="cvae", missing="drop")
        with contextlib.redirect_stderr(io.StringIO()) as err, mock.patch("arrays.CHUNK", 4):
            sources = arrays.open_rows(f, ("x", "y"))
            rows = arrays.read_all(f, sources)
        np.testing.assert_array_equal(rows[0], np.delete(self.x, [5, 7], axis=0))
        np.testing.assert_array_equal(rows[1], np.delete(self.y, [5, 7], axis=0))
        self.assertIn("2 of 300 rows lack", err.getvalue())
        self.assertIn("row 8 ", sources[0].place(6, 0))

    def test_refused(self):
        broken = self.x.copy()
        broken[217, 3] = math.nan
        path = self.save("x.npy", broken)
        self.refuse_in_one_line(
            ["--x", path],
            "row 217 and column 3 (both counted from 0) is nan, wants finite numbers, or "
            "--missing drop to leave out its row",
        )
        # Infinite numbers are not missing.
        broken[3, 3] = math.inf
        self.refuse(
            ["--x", self.save("x.npy", broken), "--missing", "drop"],
            "row 3 and column 3 (both counted from 0) is inf, wants finite numbers")
        broken[1:, 0] = math.nan
        self.refuse_in_one_line(
            ["--x", self.save("x.npy", broken), "--missing", "drop"],
            "--missing: drop leaves 1 of 300 rows, wants at least 2 rows")


class Scale(ReadingCase):
    def test_numbers_are_divided_by_255(self):
        pixels = np.random.default_rng(4).integers(0, 256, (6, 5), dtype=np.uint8)
        for dtype in (np.uint8, np.float32, np.int64):
            path = self.save("x.npy", pixels.astype(dtype))
            self.check_rows(path, pixels / 255, scale=True)

        f = predict_collapse.Flags(x=str(path), y=str(path), model="cvae", scale=True)
        with contextlib.redirect_stderr(io.StringIO()):
            rows = arrays.read_all(f, arrays.open_rows(f, ("x", "y")))
        np.testing.assert_array_equal(rows, [pixels / 255, pixels / 255])

    def test_numbers_that_are_no_pixels(self):
        for value in (-1, 256, 1e101):
            broken = np.abs(self.x)
            broken[217, 3] = value
            path = self.save("x.npy", broken)
            self.refuse_in_one_line(["--x", path, "--scale"], "row 217 and column 3 ", "wants")
        self.refuse(
            ["--x", self.save("x.npy", self.x - 300), "--scale"],
            "wants numbers from 0 to 255 for --scale")


class Remarks(ReadingCase):
    """Notes and warnings on the numbers."""

    PIXELS = np.array([[0, 17], [1, 255], [3, 4]])

    def remark(self, array, **flags):
        """The remark on the numbers in a file of this array, or ""."""
        _, err = self.read(self.save("x.npy", array), **flags)
        lines = [line for line in err.splitlines() if not line.startswith("reading")]
        self.assertLessEqual(len(lines), 1, err)
        return "".join(lines)

    def test_pixels(self):
        effect = "without which every beta is 65,025 times too large"
        for array in (
            self.PIXELS.astype(np.uint8),
            self.PIXELS.astype(np.float32),
            self.PIXELS,
            (self.PIXELS / 2).astype(np.uint8),
        ):
            remark = self.remark(array)
            self.assertTrue(
                remark.startswith("warning: --x looks like pixels from 0 to 255"), remark)
            self.assertIn("--scale", remark)
            self.assertIn(effect, remark)
        for flags in ({"model": "hvae"}, {"eta_dec": "learned"}):
            self.assertIn("every variance is 65,025 times", self.remark(self.PIXELS, **flags))

        # The largest is not 255, a number is not whole or negative, or another flag says enough.
        for array in (self.PIXELS // 2, self.PIXELS + 0.5, self.PIXELS - 1, 2 * self.PIXELS):
            self.assertEqual(self.remark(array), "")
        for likelihood in ("poisson", "categorical"):
            self.assertEqual(self.remark(self.PIXELS, likelihood=likelihood), "")
        self.assertNotIn("pixels", self.remark(self.PIXELS, scale=True))

    def test_the_theory_of_the_warning(self):
        """65,025 is the ratio of the betas at which units collapse."""
        x = self.save("x.npy", self.PIXELS.astype(np.uint8))
        with_scale, _, _ = self.predict("--x", x, "--scale")
        without, _, _ = self.predict("--x", x)
        np.testing.assert_allclose(
            without["predicted"]["collapse"],
            65025 * np.array(with_scale["predicted"]["collapse"]),
            rtol=1e-6,
        )

    def test_binary_numbers(self):
        binary = self.PIXELS % 2
        for array in (binary, binary.astype(np.uint8), binary.astype(bool), binary * 1.0):
            remark = self.remark(array)
            self.assertTrue(remark.startswith("note: --x is binary"), remark)
            for words in ("Gaussian decoder", "--likelihood bernoulli", "bce_sum or bce_mean"):
                self.assertIn(words, remark)
        self.assertIn("--x is binary", self.remark(255 * binary, scale=True))
        for flags in (
            {"likelihood": "bernoulli"}, {"loss": "mse_sum"}, {"model": "hvae"},
            {"residual": "r.npy"},
        ):
            self.assertEqual(self.remark(binary, **flags), "")
        for constant in (0, 1):
            self.assertEqual(self.remark(np.full((4, 2), constant)), "")

    def test_numbers_between_0_and_1(self):
        shares = self.PIXELS / 255
        remark = self.remark(shares)
        self.assertTrue(remark.startswith("note: all numbers of --x are from 0 to 1"), remark)
        self.assertIn("--loss bce_sum or --loss bce_mean", remark)
        self.assertEqual(self.remark(self.PIXELS, scale=True), remark)
        self.assertEqual(self.remark(shares, loss="mse_mean"), "")
        self.assertEqual(self.remark(shares + 0.1), "")
        self.assertEqual(self.remark(shares - 0.1), "")

    def test_numbers_of_all_chunks(self):
        """One number in any chunk matters."""
        array = np.tile(self.PIXELS % 2, (10, 1))
        with mock.patch("arrays.CHUNK", 4):
            self.assertIn("is binary", self.remark(array))
            for value, words in ((0.5, "from 0 to 1"), (255, "pixels"), (2, ""), (-1, "")):
                for row in (0, 17, 29):
                    other = array.astype(float)
                    other[row, 1] = value
                    remark = self.remark(other)
                    self.assertIn(words, remark)
                    self.assertEqual(bool(remark), bool(words))
            # The extremes may be in different chunks.
            zeros_first = np.repeat([[0], [1]], 4, axis=0)
            for array in (zeros_first, zeros_first[::-1]):
                self.assertIn("is binary", self.remark(array))

    def test_targets(self):
        """The decoder of a CVAE describes y."""
        x = self.save("x.npy", self.PIXELS.astype(np.uint8))
        y = self.save("y.npy", self.PIXELS)
        _, _, err = self.predict("--model", "cvae", "--x", x, "--y", y)
        self.assertEqual(err.count("pixels from 0 to 255"), 1)
        self.assertIn("--y looks like pixels", err)

    def test_a_remark_is_printed_once(self):
        f = predict_collapse.Flags(x=str(self.save("x.npy", self.PIXELS)))
        with contextlib.redirect_stderr(io.StringIO()) as err:
            sources = arrays.open_rows(f, ("x",))
            for _ in range(2):
                for _ in arrays.chunks(f, sources):
                    pass
        self.assertEqual(err.getvalue().count("warning"), 1)


class Sizes(ReadingCase):
    def test_wide_rows_have_small_chunks(self):
        """A chunk has 2^23 numbers at most. Its length is even, and at least 2."""
        for columns, size in ((1, 4096), (2048, 4096), (3001, 2794), (2**22, 2), (2**30, 2)):
            source = arrays.Rows(
                flag="x", count=10, columns=1, read=None, place=None, width=columns)
            self.assertEqual(arrays.chunk_size([source]), size)
            self.assertTrue(size == 2 or size * columns <= 2**23)
        halves = [
            arrays.Rows(flag=flag, count=10, columns=1, read=None, place=None, width=2**21)
            for flag in ("x", "y")
        ]
        self.assertEqual(arrays.chunk_size(halves), 2)

        x = self.save("x.npy", self.x)
        with mock.patch("arrays.CHUNK_NUMBERS", 25):
            f = predict_collapse.Flags(x=str(x))
            with contextlib.redirect_stderr(io.StringIO()):
                lengths = [
                    len(rows) for [rows] in arrays.chunks(f, arrays.open_rows(f, ("x",)))
                ]
            self.assertEqual(lengths, [4] * 75)
            self.check_rows(x, self.x)

    def test_too_many_rows_and_columns(self):
        f = predict_collapse.Flags()

        def source(flag, count, columns):
            return arrays.Rows(
                flag=flag, count=count, columns=columns, read=None, place=None, width=columns)

        for count, columns in ((8000, 10**6), (10**6, 8000), (8000, 8000)):
            arrays.check_size(f, source("x", count, columns))
        for flag, remedy in (
            ("x", "choose columns with --columns, or average neighbouring pixels"),
            ("y", "average neighbouring pixels"),
        ):
            with contextlib.redirect_stderr(io.StringIO()) as err, self.assertRaises(SystemExit):
                arrays.check_size(f, source(flag, 100_000, 20_000))
            self.assertEqual(
                err.getvalue(),
                f"predict_collapse.py: error: --{flag}: got 100,000 rows of 20,000 columns, wants "
                f"at most 8,000 columns (or at most 8,000 rows); {remedy}\n",
            )

    def test_coordinates(self):
        """The same inner products, in as many columns as there are rows."""
        wide = self.x[:4]
        coordinates = arrays.row_coordinates(wide)
        self.assertEqual(coordinates.shape, (4, 4))
        np.testing.assert_allclose(coordinates @ coordinates.T, wide @ wide.T, rtol=1e-12)
        for rows in (self.x, self.x[:6]):
            np.testing.assert_array_equal(arrays.row_coordinates(rows), rows)


class Likelihoods(ReadingCase):
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
            ("bernoulli", self.binary, 2, "2, wants numbers from 0 to 1 for --likelihood"),
            ("bernoulli", self.binary, -0.5, "-0.5, wants numbers from 0 to 1"),
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
            "--x: a number in line 6, column 2 ('right'; lines and columns count from 1) is 2, "
            "wants numbers from 0 to 1",
        )

    def test_grey_pixels(self):
        """A Bernoulli decoder takes numbers between 0 and 1. Pixels up to 255 want --scale."""
        grey = np.random.default_rng(3).random((50, 6))
        self.check_rows(self.save("grey.npy", grey), grey, likelihood="bernoulli")
        pixels = self.binary.astype(np.uint8)
        pixels[7, 1] = 255
        path = self.save("pixels.npy", pixels)
        self.check_rows(path, pixels / 255, likelihood="bernoulli", scale=True)
        line = self.refuse(
            ["--x", path, "--likelihood", "bernoulli"],
            "row 7 and column 1 ", "is 255, wants numbers from 0 to 1", "--scale")
        self.assertIn("--likelihood bernoulli", line)
        above = self.save("above.npy", 300 * self.binary)
        self.assertNotIn(
            "--scale", self.refuse(["--x", above, "--likelihood", "bernoulli"], "is 300, wants"))

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
