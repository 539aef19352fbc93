"""Five hundred random command lines: a script runs, or says in one line which flag is wrong."""
import contextlib
import os
import random
import unittest
from unittest import mock

import common

import datasets
import matrix_VAE
import MNIST_CVAE_Relu
import MNIST_VAE_Linear_nonlearnable_sigma
import Synthetic_CVAE_Relu_correlation
import theory
from tests import small

# The scripts, and how often each is drawn. The last ones take longest.
SCRIPTS = {
    MNIST_CVAE_Relu: 6,
    MNIST_VAE_Linear_nonlearnable_sigma: 2,
    Synthetic_CVAE_Relu_correlation: 8,
    matrix_VAE: 1,
}

# Values for flags that take a number, and for the others.
NUMBERS = (
    "0", "1", "2", "-1", "0.5", "1e-3", "1e400", "nan", "inf", "-inf", "", " ", "1,2", "0.5,1,",
    "1:2", "1:3:1", "3:1", "1:2:0", "1:9:-1", "a", "1/2", "1e-400", "0x10", "1_0", "\u0661", "--",
    "1;2", "[1]", "1 2", "1:2:3:4", ",", ":", "1e5000", "99999999999999999999", "0.1:0.5:0.1",
    "true", "None", "-0", "+1", "1.", ".5", "\\", "\n", "\0", "\u00e9", "1/0.5", "1/",
)
WORDS = (
    "auto", "cpu", "cuda", "cuda:99", "mps", "meta", "mnist", "digits", "cosine", "constant",
    "Random", "Identical,Random", "/dev/null", "", "true", "false", "True", "tf32",
    "float32,tf32", "a,b",
)

# What may follow the flags. Most command lines end without it.
ENDINGS = (("--no_such_flag", "1"), ("word",), ("-x",), ("--",), ("--beta_",))

# Values of the flags that a command line would else leave at their defaults, which take long.
SMALL = {
    "num_epochs": "1",
    "batch_size": "64",
    "dim_x": "3",
    "dim_y": "3",
    "dim_z": "2",
    "d_1": "2",
    "d_0": "3",
    "d_hidden": "3",
    "num_samples": "20",
    "num_draws": "2",
}


def random_flag(draw, name, field):
    """The words of one flag with a random value."""
    takes_a_word = isinstance(field.default, (str, bool))
    value = draw.choice(WORDS if takes_a_word else NUMBERS)
    if draw.random() < 0.2:
        return draw.choice(([f"--{name}", value], [f"--{name}={value}"], [f"--{name}"]))
    return [f"--{name}", value]


def random_command_line(draw, script, case, folder):
    """The words of one random command line for a script."""
    fields = common.all_flags(script.Flags)

    # 1. Few flags get random values.
    names = draw.sample(list(fields), draw.choice((0, 1, 1, 1, 1, 2)))
    random_words = []
    for name in names:
        random_words.extend(random_flag(draw, name, fields[name]))
    if draw.random() < 0.3:
        random_words.extend(draw.choice(ENDINGS))

    # 2. The others are small. There are several output folders, so that some finished runs recur.
    others = {"device": "cpu", "out_dir": f"{folder}/runs{case % 7}", "seed": str(case % 3)}
    others["data_dir"] = f"{folder}/data"
    argv = []
    for name, value in (SMALL | others).items():
        if name in fields and name not in names:
            argv.extend((f"--{name}", value))
    return argv + random_words


class CommandLines(small.InFolder):
    def setUp(self):
        super().setUp()
        # Paths among the random words lead to this folder.
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        small.write_mnist(self.folder / "data")
        self.save_time()

    def save_time(self):
        """Compute the moments of data once, draw few digits, and do not wait for a network.

        The matrix script begins at two random points instead of eight.
        """
        moments = {}

        def moment(data):
            shapes = tuple(tensor.shape for tensor in data.train)
            if shapes not in moments:
                moments[shapes] = theory.second_moment(*data.train)
            return moments[shapes]

        patches = (
            mock.patch.object(datasets.Data, "moment", property(moment)),
            mock.patch.object(datasets, "_any_answers", lambda urls: False),
            small.few_digits(),
            mock.patch("verify.STARTS", 2),
        )
        for patch in patches:
            patch.start()
            self.addCleanup(patch.stop)

    def check(self, script, argv, with_pictures):
        """Run a command line, check what it prints, and return its exit status."""
        # Drawing takes most of the time, so few cases draw.
        pictures = contextlib.nullcontext() if with_pictures else mock.patch("pictures.save_figure")
        with pictures:
            status, out, err = small.call(script.main, *argv)
        self.assertIn(status, (0, 1, 2))
        self.assertNotIn("Traceback", out + err)
        if status == 2:
            self.assertEqual((out, err.count("\n")), ("", 1), err)
            self.assertRegex(err, r"^\w+\.py: error: ")
        else:
            self.assertGreater(len(out.strip().split("\n")), 1)
        return status

    def test_lists_of_one_number_a_unit(self):
        """The pictures of a grid over them have no prediction between the settings."""
        script = MNIST_VAE_Linear_nonlearnable_sigma
        others = {"num_epochs": "1", "num_samples": "2", "d_1": "2", "device": "cpu"}
        cases = (
            ("--sigma", "1,2"),
            ("--sigma", "1/2,0.5"),
            ("--sigma", "1,2", "--beta", "1,2"),
        )
        for values in cases:
            argv = list(values)
            for name, value in others.items():
                argv.extend((f"--{name}", value))
            with self.subTest(values=values), mock.patch("pictures.draw_run"):
                self.assertIn(self.check(script, argv, with_pictures=True), (0, 1))

    def test_runs_or_exits_with_one_line(self):
        draw = random.Random(0)
        statuses = []
        for case in range(500):
            [script] = draw.choices(list(SCRIPTS), list(SCRIPTS.values()))
            argv = random_command_line(draw, script, case, self.folder)
            with self.subTest(script=script.__name__, argv=argv):
                statuses.append(self.check(script, argv, with_pictures=case % 25 == 0))
        self.assertGreater(statuses.count(0), 100)
        self.assertGreater(statuses.count(2), 100)


if __name__ == "__main__":
    unittest.main()
