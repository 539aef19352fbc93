"""Pictures: collapse curves by their definition, captions that fit, data that is hard to draw."""
import math
import tempfile
import unittest
import warnings
from pathlib import Path
from unittest import mock

import common
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

import files
import headroom
import pictures
import report
from tests import small


def check_drawn(test, draw, names):
    """Check that draw(folder) writes the PNG files of these names, and that no warning appears."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw(Path(folder))
        drawn = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    test.assertEqual(sorted(drawn), sorted(names))
    for name, picture in drawn.items():
        test.assertTrue(picture.startswith(b"\x89PNG"), name)
    messages = [str(w.message) for w in caught if w.category in (UserWarning, RuntimeWarning)]
    test.assertEqual(messages, [])


class Curves(unittest.TestCase):
    def test_collapse_curve_by_its_definition(self):
        kl = np.random.default_rng(0).gamma(0.3, 0.2, (400, 12))
        kl[:, 3] = 0
        # This KL is one of the epsilons: P[KL < 0.1] is 0.
        kl[:, 4] = 0.1
        epsilons = np.array([0, 1e-6, 1e-3, 0.05, 0.1, 0.2, 1, 10])

        for delta in (0.05, 0.5, 0.0025):
            expected = []
            for epsilon in epsilons:
                share_below = (kl < epsilon).mean(axis=0)
                collapsed = share_below >= 1 - delta - 1e-12
                expected.append(collapsed.mean())
            curve = pictures.collapse_curve(kl, epsilons, delta)
            np.testing.assert_allclose(curve, expected)

        # With the default delta, every unit is collapsed at the largest epsilon.
        self.assertEqual(pictures.collapse_curve(kl, epsilons)[-1], 1)

    def test_of_one_example(self):
        """A unit is then collapsed from its only KL on."""
        curve = pictures.collapse_curve(np.array([[0.5, 0.0]]), np.array([0.0, 0.5, 0.6]))
        np.testing.assert_array_equal(curve, [0, 0.5, 1])


class Captions(unittest.TestCase):
    def test_captions_fit(self):
        """A long caption is broken between flags, so that none of it is cut off."""
        many_flags = ",".join(f"a_flag_{k}=MWMW{k}" for k in range(12))
        caption = f"MNIST_HVAE_DCT on mnist latents=2,2,{many_flags} seed=0"
        for columns, width in ((1, 3.4), (2, 4.2), (5, 4.2)):
            figure = self.saved_figure(columns, width, caption)

            # All of it is shown.
            shown = figure.get_supxlabel()
            self.assertEqual("".join(shown.split()), "".join(caption.split()))
            self.assertIn("latents=2,2, a_flag_0=MWMW0", shown.replace("\n", " "))

            # It is not wider than the picture.
            renderer = FigureCanvasAgg(figure).get_renderer()
            lines = figure.text(0, 0, shown, fontsize=8).get_window_extent(renderer)
            self.assertLess(lines.width, figure.bbox.width)

    def saved_figure(self, columns, width, caption):
        """The matplotlib figure that save_figure saves."""
        savefig = mock.patch("matplotlib.figure.Figure.savefig", autospec=True)
        with mock.patch("files.write"), savefig as save:
            pictures.save_figure("x.png", columns, 1, width, 3.0, caption, lambda axes: None)
            write_picture = files.write.call_args.args[1]
            write_picture(None)
        [figure] = save.call_args.args[:1]
        return figure


class Images(nn.Module):
    """A model that only has pictures: it reconstructs every image as it is."""

    def reconstructions(self, x, f):
        return {"test images": x, "reconstructed": x}

    def samples(self, n, f):
        return torch.zeros(n, 784)


def evaluated_run(f, data, unit_kl, model=None):
    """A report.EvaluatedRun with one level. Its units have these KLs, (n, d)."""
    metrics = {"elbo": -1.0, "reconstruction": 1.0, "kl": float(unit_kl.sum(1).mean())}
    result = report.RunResult(
        **files.description(f, data),
        seconds={"train": 1.0},
        diverged=None,
        side_by_side=1,
        curves={"loss": [2.0], "reconstruction": [1.0]},
        metrics=metrics,
    )
    return report.EvaluatedRun(f, data, model, result, {"unit_kl": unit_kl})


class HardToDraw(unittest.TestCase):
    def test_one_test_image(self):
        """One epoch and one test image: all pictures of the run, without a warning."""
        data = small.digit_data(16, 1, torch.float32)
        f = small.Flags(device="cpu", num_epochs=1)
        run = evaluated_run(f, data, np.array([[0.5, 0.0]]), Images())

        def draw(folder):
            pictures.draw_run(run, folder)

        names = ["collapse.png", "training.png", "reconstructions.png", "samples.png"]
        check_drawn(self, draw, names)

    def test_the_run_is_not_read_from_disk(self):
        """Another process may replace or remove the files of the run in the meantime."""
        data = small.digit_data(16, 4, torch.float32)
        with tempfile.TemporaryDirectory() as out_dir:
            runs = []
            for beta in (0.5, 1.0):
                f = small.Flags(device="cpu", beta_1=beta, out_dir=out_dir)
                runs.append(evaluated_run(f, data, np.ones((4, 2)), Images()))
            # The runs have no file at all.
            pictures.draw_run(runs[0], files.run_dir(runs[0].f, data))
            with mock.patch("sys.stderr"):
                pictures.draw_grid(runs)
            self.assertEqual(len(list(Path(out_dir).glob("*/grids/*/collapse.png"))), 1)

    def test_a_variance_that_overflowed(self):
        """Just before a model diverges, a unit's variance is infinite. The others are drawn."""
        level = headroom.LevelHeadroom(
            units=3, collapsed=1, headroom=0.0, level=0.5, tau=[0.1], theta=[math.inf, 2.0]
        )

        def draw(folder):
            pictures.draw_headroom(folder / "headroom.png", {"z": level}, "")

        check_drawn(self, draw, ["headroom.png"])


class Grids(small.InFolder):
    """Which runs of a grid are drawn."""

    def setUp(self):
        super().setUp()
        self.data = small.gaussian_data(16, 4)
        self.runs = []
        for beta in (0.5, 1.0, 2.0):
            f = small.Flags(device="cpu", beta_1=beta, out_dir=str(self.folder))
            self.runs.append(evaluated_run(f, self.data, np.full((4, 2), beta), nn.Identity()))

    def drawn_curves(self):
        """The labels of the runs in the picture of collapse curves, or None without a picture."""
        with mock.patch("pictures.draw_collapse") as draw, mock.patch("sys.stderr"):
            pictures.draw_grid(self.runs)
        if not draw.called:
            return None
        _, curves, _ = draw.call_args.args
        return list(curves)

    def test_all(self):
        self.assertEqual(self.drawn_curves(), ["beta_1 = 0.5", "beta_1 = 1.0", "beta_1 = 2.0"])

    def test_a_run_that_diverged_is_left_out(self):
        self.runs[0].model = None
        self.runs[0].result.metrics = None
        self.assertEqual(self.drawn_curves(), ["beta_1 = 1.0", "beta_1 = 2.0"])
        self.assertEqual(list(pictures.make_grid(self.runs).cells), [(1.0,), (2.0,)])

    def test_a_run_without_examples_is_left_out(self):
        """Another process evaluated it, and its units.npz is missing or broken."""
        folder = files.run_dir(self.runs[1].f, self.data)
        self.runs[1].loaded_examples = None
        self.runs[1].model = None
        self.assertEqual(self.drawn_curves(), ["beta_1 = 0.5", "beta_1 = 2.0"])
        files.write_text(folder / "units.npz", "no arrays")
        self.assertEqual(self.drawn_curves(), ["beta_1 = 0.5", "beta_1 = 2.0"])

    def test_nothing_to_draw(self):
        for run in self.runs:
            run.model = None
            run.result.metrics = None
        self.assertIsNone(self.drawn_curves())


if __name__ == "__main__":
    unittest.main()
