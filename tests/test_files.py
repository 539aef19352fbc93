"""The names of runs, and files that are whole or absent."""
import contextlib
import dataclasses
import io
import json
import os
import sys
import time
import unittest
from pathlib import Path
from unittest import mock

import common
import torch

import files
from tests import small

# The size of the files that processes write at the same time, in bytes.
FILE_SIZE = 200_000


def write_often(path, letter, enough):
    """Write a file of one letter again and again, in a child process, until an event is set.

    It does not wait for the disk, which can take seconds on a busy machine.
    """
    with mock.patch("os.fsync"):
        while not enough.is_set():
            files.write(path, lambda file: file.write(letter * FILE_SIZE))


class Writing(small.InFolder):
    def names(self):
        """The names of all files in the test's folder, hidden ones included."""
        return {path.name for path in self.folder.iterdir()}

    def test_files_are_whole_or_absent(self):
        path = self.folder / "deep" / "file"
        files.write(path, lambda file: file.write(b"first"))

        def breaks(file):
            file.write(b"half")
            raise OSError("disk full")

        with self.assertRaises(OSError):
            files.write(path, breaks)
        with mock.patch("os.replace", side_effect=OSError("killed")), self.assertRaises(OSError):
            files.write(path, lambda file: file.write(b"second"))
        self.assertEqual([file.name for file in path.parent.iterdir()], ["file"])
        self.assertEqual(path.read_bytes(), b"first")

    def test_an_error_while_the_file_is_written(self):
        path = self.folder / "file"
        path.write_bytes(b"first")
        with mock.patch("os.fsync", side_effect=OSError("disk full")), \
                self.assertRaises(OSError) as raised:
            files.write(path, lambda file: file.write(b"second"))
        # A message about the error can name the file.
        self.assertEqual(raised.exception.filename, str(path))
        self.assertEqual(self.names(), {"file"})
        self.assertEqual(path.read_bytes(), b"first")

    def test_text_is_utf_8(self):
        path = self.folder / "text"
        files.write_text(path, "\u03b4-VAE\n")
        self.assertEqual(path.read_bytes(), b"\xce\xb4-VAE\n")
        files.write_json(path, {"\u03b4": [1.5, None, "x"]})
        self.assertEqual(json.loads(path.read_bytes()), {"\u03b4": [1.5, None, "x"]})

    def test_leftovers_of_killed_processes_are_removed_by_age(self):
        """What another process writes at this moment is left alone."""
        path = self.folder / "file[1]"
        ages = {
            ".file[1].0123": 2 * 3600,
            ".file[1].4567": 0,
            ".file[1].89ab": 1800,
            # These belong to other files. The first one would match if [1] were a pattern.
            ".file1.0123": 2 * 3600,
            ".other.0123": 2 * 3600,
            "file[1].0123": 2 * 3600,
        }
        for name, age in ages.items():
            (self.folder / name).write_bytes(b"half")
            os.utime(self.folder / name, (time.time() - age, time.time() - age))

        files.write(path, lambda file: file.write(b"whole"))
        expected = set(ages) - {".file[1].0123"} | {"file[1]"}
        self.assertEqual(self.names(), expected)
        self.assertEqual(path.read_bytes(), b"whole")

    def test_leftovers_that_another_process_removes_first(self):
        leftover = self.folder / ".file.0123"
        leftover.write_bytes(b"half")
        os.utime(leftover, (0, 0))
        with mock.patch.object(Path, "unlink", side_effect=FileNotFoundError):
            files.remove_unfinished(self.folder / "file")
        removed_before = [self.folder / ".file.4567"]
        with mock.patch.object(Path, "glob", return_value=removed_before):
            files.remove_unfinished(self.folder / "file")
        # A folder with the name of a leftover is no leftover.
        leftover.unlink()
        leftover.mkdir()
        os.utime(leftover, (0, 0))
        files.remove_unfinished(self.folder / "file")
        self.assertEqual(self.names(), {".file.0123"})

    def test_two_processes_that_write_the_same_file(self):
        """A reader meets a whole file at any time. Nothing is left beside it."""
        path = self.folder / "file"
        enough = small.CHILDREN.Event()
        writers = []
        for letter in (b"a", b"b"):
            writer = small.CHILDREN.Process(target=write_often, args=(path, letter, enough))
            writer.start()
            self.addCleanup(writer.kill)
            writers.append(writer)

        # 1. Read until both processes have replaced the file of the other one. Only one content is
        # kept, since there may be many reads. The pauses leave the processors to the writers.
        whole = {b"a" * FILE_SIZE, b"b" * FILE_SIZE}
        previous = None
        changes = 0
        end = time.monotonic() + 300
        while changes < 10:
            self.assertLess(time.monotonic(), end)
            time.sleep(0.001)
            with contextlib.suppress(FileNotFoundError):
                content = path.read_bytes()
                self.assertTrue(content in whole, f"a file of {len(content)} bytes")
                changes += previous is not None and content != previous
                previous = content

        # 2. Both end well, and the last file is whole, too.
        enough.set()
        self.assertEqual(small.exit_statuses(writers), [0, 0])
        self.assertTrue(path.read_bytes() in whole)
        self.assertEqual(self.names(), {"file"})

    def test_a_folder_that_another_process_removes(self):
        """It removes the folder while it is empty, between the making of folder and file."""
        path = self.folder / "run" / "file"
        make_folder = Path.mkdir
        removed = []

        def make_and_remove(folder, **options):
            make_folder(folder, **options)
            if len(removed) < 3:
                removed.append(folder)
                folder.rmdir()

        with mock.patch.object(Path, "mkdir", make_and_remove):
            files.write(path, lambda file: file.write(b"whole"))
        self.assertEqual(len(removed), 3)
        self.assertEqual(path.read_bytes(), b"whole")

    def test_a_file_that_another_process_has_opened_on_windows(self):
        """Windows replaces no open file. Another attempt comes a moment later."""
        path = self.folder / "file"
        replace = os.replace
        refused = []

        def refuse_twice(source, target):
            if len(refused) < 2:
                refused.append(target)
                raise PermissionError(13, "in use", str(target))
            replace(source, target)

        with mock.patch("os.replace", refuse_twice), mock.patch("time.sleep") as sleep:
            files.write(path, lambda file: file.write(b"whole"))
        self.assertEqual(sleep.call_count, 2)
        self.assertEqual(path.read_bytes(), b"whole")

        # A file that stays open is an error in the end, and leaves nothing beside it.
        always = PermissionError(13, "in use", str(path))
        with mock.patch("os.replace", side_effect=always), mock.patch("time.sleep"):
            with self.assertRaises(PermissionError):
                files.write(path, lambda file: file.write(b"second"))
        self.assertEqual(path.read_bytes(), b"whole")
        self.assertEqual(self.names(), {"file"})

    def test_a_folder_in_the_place_of_the_file(self):
        path = self.folder / "file"
        path.mkdir()
        with self.assertRaises(IsADirectoryError) as caught:
            files.write(path, lambda file: file.write(b"whole"))
        self.assertEqual(caught.exception.filename, str(path))
        self.assertEqual(self.names(), {"file"})


class Names(small.InFolder):
    def test_run_names(self):
        data = small.gaussian_data()
        mnist = dataclasses.replace(data, name="mnist")
        self.assertEqual(files.run_dir(small.Flags(), mnist), Path("runs/small/default"))
        f = small.Flags(beta_1=0.1, seed=2, device="cpu", out_dir="elsewhere")
        expected = Path("elsewhere/small/beta_1=0.1,seed=2,dataset=gaussian")
        self.assertEqual(files.run_dir(f, data), expected)

    def test_long_names(self):
        long = {f"flag_{k}": 0.123456789 for k in range(30)}
        self.assertLess(len(files.spell(long)), 256)
        self.assertNotEqual(files.spell(long), files.spell(long | {"flag_29": 1}))

        # File systems count bytes. A name on the command line need not be valid Unicode.
        for value in ("\u03b4" * 150, "\udcff" * 100):
            name = files.spell({"name": value})
            self.assertLess(len(os.fsencode(name)), 256)
            (self.folder / name).mkdir()
            self.assertNotEqual(name, files.spell({"name": value + "x"}))

    def test_names_that_windows_accepts(self):
        """Characters that Windows refuses in names become "_"."""
        refused = '<>:"/\\|?*' + "".join(chr(number) for number in range(32))
        for character in refused:
            name = files.spell({"sigma": f"8{character}4"})
            self.assertEqual(name, "sigma=8_4")

        # A value per unit, as in --sigma 8/4, must not make folders of its own either.
        f = small.Flags(beta_1="0.5/2.0", out_dir=str(self.folder))
        folder = files.make_run_dir(f, small.gaussian_data())
        self.assertEqual(folder.name, "beta_1=0.5_2.0,dataset=gaussian")
        self.assertEqual(folder.parent, self.folder / "small")
        self.assertTrue(folder.is_dir())

    def test_captions(self):
        """The title of a table names the flags that all its settings have in common."""
        data = small.gaussian_data()
        settings = []
        for beta_2 in (1.0, 3.0):
            for seed in (4, 5):
                settings.append(small.Flags(beta_1=2.0, beta_2=beta_2, seed=seed))
        all_data = [data] * 4
        self.assertEqual(files.varying_flags(settings, all_data), {"beta_2": [1.0, 3.0]})
        self.assertEqual(files.caption(settings, all_data), "small on gaussian beta_1=2.0")
        both = [data, dataclasses.replace(data, name="mnist")]
        self.assertEqual(
            files.caption(settings[:1] * 2, both), "small on gaussian, mnist beta_1=2.0")


class RunFolders(small.InFolder):
    def setUp(self):
        super().setUp()
        self.data = small.gaussian_data()
        self.f = small.Flags(out_dir=str(self.folder / "runs"))

    def refused(self):
        """make_run_dir must end the program with one line, which is returned."""
        with contextlib.redirect_stderr(io.StringIO()) as err:
            with self.assertRaises(SystemExit) as end:
                files.make_run_dir(self.f, self.data)
        self.assertEqual(end.exception.code, 2)
        self.assertRegex(err.getvalue(), r"^small\.py: error: --out_dir: [^\n]+\n$")
        return err.getvalue()

    def test_a_run_folder_is_made_once(self):
        folder = files.make_run_dir(self.f, self.data)
        self.assertEqual(folder, self.folder / "runs" / "small" / "dataset=gaussian")
        self.assertTrue(folder.is_dir())
        (folder / "result.json").touch()
        (folder / "sub").mkdir()
        self.assertEqual(files.make_run_dir(self.f, self.data), folder)
        self.assertTrue((folder / "result.json").exists())

    def test_a_file_in_the_way(self):
        folder = files.run_dir(self.f, self.data)
        for path in (folder.parents[1], folder.parent, folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            self.assertIn(f"{path} is a file", self.refused())
            self.assertEqual(path.read_bytes(), b"")
            path.unlink()

    def test_a_folder_in_the_place_of_a_file(self):
        folder = files.make_run_dir(self.f, self.data)
        for name in ("training.json", "model.pt", "result.json", "units.npz"):
            (folder / name).mkdir()
            self.assertIn(f"{folder / name} is a folder", self.refused())
            self.assertTrue((folder / name).is_dir())
            (folder / name).rmdir()

    def test_a_folder_that_cannot_be_made(self):
        error = PermissionError(13, os.strerror(13))
        with mock.patch.object(Path, "mkdir", side_effect=error):
            self.assertIn(os.strerror(13), self.refused())
        # `common.run` explains a full disk, so this error passes.
        error = OSError(common.FULL_DISK_ERRORS[0], "full")
        with mock.patch.object(Path, "mkdir", side_effect=error), self.assertRaises(OSError):
            files.make_run_dir(self.f, self.data)

    def test_a_description_names_what_computed_the_result(self):
        entries = files.description(dataclasses.replace(self.f, device="cpu"), self.data)
        self.assertEqual(entries["script"], "small")
        self.assertEqual((entries["dataset"], entries["device"]), ("gaussian", "cpu"))
        self.assertEqual(entries["settings"], files.run_settings(self.f, self.data))
        self.assertEqual(entries["versions"]["torch"], torch.__version__)
        self.assertTrue(sys.version.startswith(entries["versions"]["python"]))


class Reading(small.InFolder):
    def read(self, path):
        """What read_json returns, and what it says."""
        with contextlib.redirect_stderr(io.StringIO()) as err:
            value = files.read_json(path)
        return value, err.getvalue()

    def test_a_whole_file(self):
        path = self.folder / "result.json"
        files.write_json(path, {"metrics": {"kl": 1.5}, "name": "\u03b4"})
        self.assertEqual(self.read(path), ({"metrics": {"kl": 1.5}, "name": "\u03b4"}, ""))
        path.write_text("{}", encoding="utf-8")
        self.assertEqual(self.read(path), ({}, ""))

    def test_a_missing_file_is_no_reason_to_speak(self):
        self.assertEqual(self.read(self.folder / "result.json"), (None, ""))
        self.assertEqual(self.read(self.folder / "no_folder" / "result.json"), (None, ""))

    def test_a_broken_file_is_one_line(self):
        path = self.folder / "result.json"
        contents = (
            b"null", b"[]", b"3", b'"text"', b"", b"junk", b'{"metrics": ', b"\xff\xfe\x00",
            b"[" * 100_000,
        )
        for content in contents:
            with self.subTest(content=content[:20]):
                path.write_bytes(content)
                value, line = self.read(path)
                self.assertIsNone(value)
                self.assertRegex(line, r"^[^\n]*result\.json is ignored, since [^\n]+\n$")

    def test_a_folder_in_its_place_is_one_line(self):
        value, line = self.read(self.folder)
        self.assertIsNone(value)
        self.assertIn(f"{self.folder} is ignored", line)
        self.assertEqual(line.count("\n"), 1)

    def test_only_the_very_settings_match(self):
        data = small.gaussian_data()
        f = small.Flags(out_dir=str(self.folder), beta_1=2.0)
        folder = files.make_run_dir(f, data)

        def write(settings):
            files.write_json(folder / "training.json", {"settings": settings, "seconds": 1.0})

        def matches(f, folder=None):
            return files.read_matching(f, data, "training.json", folder) is not None

        self.assertFalse(matches(f))
        write(files.run_settings(f, data))
        self.assertTrue(matches(f))
        # Where and how a run is computed does not matter.
        self.assertTrue(matches(dataclasses.replace(f, device="cuda", overwrite=True)))

        # In the folder of another run, only flags of the evaluation may differ.
        other_draws = dataclasses.replace(f, num_samples=5)
        self.assertFalse(matches(other_draws))
        self.assertTrue(matches(other_draws, folder))
        self.assertFalse(matches(dataclasses.replace(f, beta_1=3.0), folder))

        # Settings that lack a flag, have one more, or are no dict match nothing.
        lacking = files.run_settings(f, data)
        del lacking["beta_2"]
        further = files.run_settings(f, data) | {"further": 1}
        for settings in (lacking, further, None, [], "text", {}):
            write(settings)
            self.assertFalse(matches(f))
            self.assertFalse(matches(f, folder))
        files.write_json(folder / "training.json", {"seconds": 1.0})
        self.assertFalse(matches(f))


if __name__ == "__main__":
    unittest.main()
