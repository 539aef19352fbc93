"""Names of runs, files that are whole or absent."""
import dataclasses
import os
import subprocess
import unittest
from pathlib import Path
from unittest import mock

import files
from tests import small


class Files(small.InFolder):
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
        self.assertEqual([p.name for p in path.parent.iterdir()], ["file"])
        self.assertEqual(path.read_bytes(), b"first")

    def test_what_another_process_writes_is_left_alone(self):
        """And what a killed one left is removed."""
        path, gone = self.folder / "file", subprocess.Popen(["true"])
        gone.wait()
        alive, killed = (self.folder / f".file.{pid}" for pid in (os.getppid(), gone.pid))
        for beside in (alive, killed):
            beside.write_bytes(b"half")
        files.write(path, lambda file: file.write(b"whole"))
        self.assertEqual({p.name for p in self.folder.iterdir()}, {"file", alive.name})

    def test_run_names(self):
        data = small.gaussian_data()
        self.assertEqual(files.run_dir(small.Flags(), dataclasses.replace(data, name="mnist")), Path("runs/small/default"))
        self.assertEqual(files.run_dir(small.Flags(beta_1=0.1, seed=2, device="cpu", out_dir="there"), data),
                         Path("there/small/beta_1=0.1,seed=2,dataset=gaussian"))
        long = {f"flag_{k}": 0.123456789 for k in range(30)}
        self.assertLess(len(files.spell(long)), 256)
        self.assertNotEqual(files.spell(long), files.spell(long | {"flag_29": 1}))


if __name__ == "__main__":
    unittest.main()
