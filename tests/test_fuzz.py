"""Whatever the command line, a script runs or says in one line which flag is wrong: 500 random ones."""
import contextlib
import os
import random
import tempfile
import unittest
from unittest import mock

import common
import datasets
import theory
import MNIST_CVAE_Relu
import MNIST_VAE_Linear_nonlearnable_sigma
import matrix_VAE
import Synthetic_CVAE_Relu_correlation
from tests import small

SCRIPTS = [MNIST_CVAE_Relu, MNIST_VAE_Linear_nonlearnable_sigma, Synthetic_CVAE_Relu_correlation, matrix_VAE]
NUMBERS = ["0", "1", "2", "-1", "0.5", "1e-3", "1e400", "nan", "inf", "-inf", "", " ", "1,2", "0.5,1,", "1:2", "1:3:1", "3:1",
           "1:2:0", "1:9:-1", "a", "1/2", "1e-400", "0x10", "1_0", "١", "--", "1;2", "[1]", "1 2", "1:2:3:4", ",", ":", "1e5000",
           "99999999999999999999", "0.1:0.5:0.1", "true", "None", "-0", "+1", "1.", ".5", "\\", "\n", "\0", "é", "1/0.5", "1/"]
WORDS = ["auto", "cpu", "cuda", "cuda:99", "mps", "meta", "mnist", "digits", "cosine", "constant", "Random", "Identical,Random",
         "/dev/null", "", "true", "false", "True", "tf32", "float32,tf32", "a,b"]
SMALL = {"num_epochs": "1", "batch_size": "64", "dim_x": "3", "dim_y": "3", "dim_z": "2", "d_1": "2", "d_0": "3", "d_hidden": "3",
         "num_samples": "20", "num_draws": "2"}


class CommandLines(unittest.TestCase):
    def test_runs_or_exits_with_one_line(self):
        draw = random.Random(0)
        self.addCleanup(os.chdir, os.getcwd())                # words are paths, too
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            small.write_mnist(f"{folder}/data")
            moments = {}                                      # of data that is always the same, but for its digit

            def moment(data):
                shapes = tuple(t.shape for t in data.train)
                if shapes not in moments:
                    moments[shapes] = theory.second_moment(*data.train)
                return moments[shapes]

            draw_digits = datasets.draw_digits
            for where, name, value in ((datasets.Data, "moment", property(moment)),
                                       (datasets, "draw_digits", lambda n, seed: draw_digits(n // 200, seed)),
                                       (datasets, "_any_answers", lambda urls: False)):       # no waiting for a network
                patch = mock.patch.object(where, name, value)
                patch.start()
                self.addCleanup(patch.stop)
            ended = {0: 0, 1: 0, 2: 0}
            for case in range(500):
                [script] = draw.choices(SCRIPTS, [6, 2, 8, 1])      # the last take longest
                own, shared = common.own_and_shared(script.Flags)
                fields = own | shared
                # Of what a case leaves out, small sizes; several folders, so that some find their run finished.
                flags = {name: value for name, value in SMALL.items() if name in fields}
                flags |= {"device": "cpu", "out_dir": f"{folder}/runs{case % 7}", "seed": str(case % 3)}
                flags |= {"data_dir": f"{folder}/data"} if "data_dir" in fields else {}
                argv = []
                for name in draw.sample(list(fields), draw.choice([0, 1, 1, 1, 1, 2])):
                    flags.pop(name, None)
                    value = draw.choice(WORDS if isinstance(fields[name].default, (str, bool)) else NUMBERS)
                    argv += draw.choice([[f"--{name}", value], [f"--{name}={value}"], [f"--{name}"]] if draw.random() < 0.2
                                        else [[f"--{name}", value]])
                argv += draw.choice([[]] * 12 + [["--no_such_flag", "1"], ["word"], ["-x"], ["--"], ["--beta_"]])
                argv = [word for name, value in flags.items() for word in (f"--{name}", value)] + argv
                with self.subTest(script=script.__name__, argv=argv):
                    # Drawing takes most of the time, so that few cases draw.
                    with mock.patch("pictures.save_figure") if case % 10 else contextlib.nullcontext():
                        status, out, err = small.call(script.main, *argv)
                    self.assertIn(status, (0, 1, 2))
                    ended[status] += 1
                    self.assertNotIn("Traceback", out + err)
                    if status == 2:
                        self.assertEqual((out, err.count("\n")), ("", 1), err)
                        self.assertRegex(err, r"^\w+\.py: error: ")
                    else:
                        self.assertGreater(len(out.strip().split("\n")), 1)
            self.assertGreater(ended[0], 100)
            self.assertGreater(ended[2], 100)


if __name__ == "__main__":
    unittest.main()
