"""Collapse curves by their definition; captions that fit."""
import unittest
from unittest import mock

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

import files
import pictures


class Curves(unittest.TestCase):
    def test_collapse_curve_by_its_definition(self):
        kl = np.random.default_rng(0).gamma(0.3, 0.2, (400, 12))
        kl[:, 3] = 0
        kl[:, 4] = 0.1                                        # on the grid of epsilons: P[KL < 0.1] is 0
        epsilon = np.array([0, 1e-6, 1e-3, 0.05, 0.1, 0.2, 1, 10])
        for delta in (0.05, 0.5, 0.0025):
            expected = [np.mean([(kl[:, i] < e).mean() >= 1 - delta - 1e-12 for i in range(12)]) for e in epsilon]
            np.testing.assert_allclose(pictures.collapse_curve(kl, epsilon, delta), expected)
        self.assertEqual(pictures.collapse_curve(kl, epsilon)[-1], 1)


class Captions(unittest.TestCase):
    def test_captions_fit(self):
        """A long caption is broken between flags, so that none of it is cut off."""
        caption = "MNIST_HVAE_DCT on mnist latents=2,2," + ",".join(f"a_flag_{k}=MWMW{k}" for k in range(12)) + " seed=0"
        for columns, width in ((1, 3.4), (2, 4.2), (5, 4.2)):
            with mock.patch("files.write"), mock.patch("matplotlib.figure.Figure.savefig", autospec=True) as save:
                pictures.save_figure("x.png", columns, 1, width, 3.0, caption, lambda axes: None)
                files.write.call_args.args[1](None)
            [figure] = save.call_args.args[:1]
            shown = figure.get_supxlabel()
            self.assertEqual("".join(shown.split()), "".join(caption.split()))
            self.assertIn("latents=2,2, a_flag_0=MWMW0", shown.replace("\n", " "))
            lines = figure.text(0, 0, shown, fontsize=8).get_window_extent(FigureCanvasAgg(figure).get_renderer())
            self.assertLess(lines.width, figure.bbox.width)


if __name__ == "__main__":
    unittest.main()
