"""Pictures: what they show, captions and labels that fit, data that is hard to draw."""
import io
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
import verify
from tests import small


def check_drawn(test, draw, names):
    """Check that draw(folder) writes the PNG files of these names, and that no warning appears."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw(Path(folder))
        drawn = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    test.assertEqual(sorted(drawn), sorted(names))
    for name, picture in drawn.items():
        test.assertTrue(picture.startswith(small.PNG), name)
    messages = [str(w.message) for w in caught if w.category in (UserWarning, RuntimeWarning)]
    test.assertEqual(messages, [])


def drawn_figure(draw):
    """The matplotlib figure that draw(path) would save."""
    savefig = mock.patch("matplotlib.figure.Figure.savefig", autospec=True)
    with mock.patch("files.write") as write, savefig as save:
        draw("x.png")
        write_picture = write.call_args.args[1]
        write_picture(None)
    [figure] = save.call_args.args[:1]
    return figure


def laid_out(figure):
    """The renderer of a figure, after its parts have been laid out."""
    FigureCanvasAgg(figure).draw()
    return figure.canvas.get_renderer()


def caption_of(figure):
    """The caption of a figure in one line."""
    return figure.get_supxlabel().replace("\n", " ")


def titles(figure):
    """The titles of the axes that a figure shows."""
    return [ax.get_title() for ax in figure.axes if ax.axison]


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


# KLs of units, (examples, units), in nats: all above 0.01, all below it, and one of each.
ACTIVE = np.full((4, 2), 1.0)
COLLAPSED = np.full((4, 2), 0.001)
MIXED = np.array([[1.0, 0.001]] * 4)


class CollapsePictures(unittest.TestCase):
    def figure(self, runs, **arguments):
        return drawn_figure(lambda path: pictures.draw_collapse(path, runs, "seed=1", **arguments))

    def test_a_level_in_which_no_unit_collapses_has_a_sentence_instead(self):
        runs = {}
        for label, unit_kl_2 in (("a", MIXED), ("b", ACTIVE)):
            runs[label] = {"unit_kl_1": ACTIVE, "unit_kl_2": unit_kl_2}
        figure = self.figure(runs)
        self.assertEqual(titles(figure), ["units of z2"])
        expected = "seed=1; no unit of z1 collapses (ε = 0.01 nats)"
        self.assertEqual(caption_of(figure), expected)

    def test_a_level_in_which_all_units_collapse_has_a_sentence_instead(self):
        runs = {"": {"unit_kl_1": MIXED, "unit_kl_2": COLLAPSED}}
        figure = self.figure(runs)
        self.assertEqual(titles(figure), ["units of z1"])
        expected = "seed=1; all units of z2 collapse (ε = 0.01 nats)"
        self.assertEqual(caption_of(figure), expected)

    def test_one_panel_is_left_in_any_case(self):
        figure = self.figure({"": {"unit_kl_1": ACTIVE, "unit_kl_2": COLLAPSED}})
        self.assertEqual(titles(figure), ["units of z1", "units of z2"])
        self.assertEqual(caption_of(figure), "seed=1")

    def test_a_level_that_differs_between_runs_is_drawn(self):
        """In one run all units collapse, in the other one none."""
        runs = {"a": {"unit_kl": ACTIVE}, "b": {"unit_kl": COLLAPSED}}
        self.assertEqual(pictures.uniform_levels(runs), {})

    def test_the_context_and_all_levels_have_names(self):
        runs = {"": {"unit_kl_1": MIXED, "unit_kl_2": MIXED, "unit_kl": MIXED}}
        figure = self.figure(runs, context="_2")
        expected = ["units of z1", "units of the context", "units of all levels"]
        self.assertEqual(titles(figure), expected)

    def test_which_level_is_the_context(self):
        deep = nn.Identity()
        self.assertIsNone(pictures.context_level(deep))
        deep.levels = 5
        self.assertIsNone(pictures.context_level(deep))
        deep.learned_levels = 5
        self.assertIsNone(pictures.context_level(deep))
        deep.learned_levels = 4
        self.assertEqual(pictures.context_level(deep), "_5")

    def test_one_legend_beside_the_axes_for_all_panels(self):
        """Colours tell the runs apart, and all lines are solid."""
        runs = {}
        for k in range(4):
            runs[f"beta = {k}"] = {"unit_kl_1": MIXED * (k + 1), "unit_kl_2": MIXED}
        figure = self.figure(runs)
        laid_out(figure)
        first, second = figure.axes
        self.assertIsNotNone(first.get_legend() or second.get_legend())
        legends = [ax.get_legend() for ax in figure.axes if ax.get_legend()]
        self.assertEqual(len(legends), 1)
        labels = [text.get_text() for text in legends[0].get_texts()]
        self.assertEqual(labels, list(runs))
        self.assertGreater(legends[0].get_window_extent().x0, second.bbox.x1)
        self.assertLess(legends[0].get_window_extent().x1, figure.bbox.x1)

        lines = first.get_lines()
        self.assertEqual({line.get_linestyle() for line in lines}, {"-"})
        self.assertEqual(len({line.get_color() for line in lines}), 4)

    def test_a_legend_of_many_runs_lists_some(self):
        """Of 25 runs, every third has a label: 0, 3, ..., 24."""
        runs = {str(k): {"unit_kl": MIXED} for k in range(25)}
        [ax] = self.figure(runs).axes
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        self.assertEqual(labels, [str(k) for k in range(0, 25, 3)])


class Panels(unittest.TestCase):
    def test_rows_have_nearly_equal_lengths(self):
        columns = [pictures.panel_columns(count) for count in range(1, 12)]
        self.assertEqual(columns, [1, 2, 3, 4, 5, 3, 4, 4, 5, 5, 4])

    def test_epochs_are_whole_numbers(self):
        for curve, marker in (([2.0, 1.0, 0.5], "None"), ([2.0], "o")):
            figure = drawn_figure(
                lambda path: pictures.draw_panels(
                    path, {"loss": curve}, 3.4, 3.0, "", pictures.plot_training
                )
            )
            [ax] = figure.axes
            self.assertTrue(all(tick == round(tick) for tick in ax.get_xticks()))
            self.assertEqual(ax.get_lines()[0].get_marker(), marker)


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
        return drawn_figure(
            lambda path: pictures.save_figure(
                path, columns, 1, width, 3.0, caption, lambda axes: None
            )
        )


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


def level_headroom(units, collapsed, tau, tau_any, level=0.5, theta=()):
    """A LevelHeadroom of a Gaussian decoder without a headroom."""
    return headroom.LevelHeadroom(
        units=units,
        collapsed=collapsed,
        headroom=0.0,
        headroom_any=0.0,
        level=level,
        tau=tau,
        tau_any=tau_any,
        theta=list(theta),
    )


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
        level = level_headroom(units=3, collapsed=1, tau=[0.1], tau_any=[0.2])
        level.theta = [math.inf, 2.0]

        def draw(folder):
            pictures.draw_headroom(folder / "headroom.png", {"z": level}, "")

        check_drawn(self, draw, ["headroom.png"])


class Headroom(unittest.TestCase):
    def test_the_legend_is_below_the_axes_and_a_long_title_has_several_lines(self):
        verdict = (
            "16 of 16 units collapsed because of training: reviving them would lower the loss by "
            "at least 0.062 nats; the loss still fell by 0.12 nats in the last tenth of the epochs"
        )
        level = level_headroom(
            units=16, collapsed=2, tau=[0.3, 0.1], tau_any=[0.4, 0.2], theta=[2.0] * 14
        )
        figure = self.figure_of(level, verdict)
        renderer = laid_out(figure)
        [ax] = figure.axes
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        expected = [
            "variance described by active units",
            "variance of further units with a linear encoder",
            "variance of further units with any encoder",
            "threshold: a unit above it lowers the loss",
            "number of units",
        ]
        self.assertEqual(labels, expected)
        self.assertLess(ax.get_legend().get_window_extent().y1, ax.bbox.y0)
        self.assertEqual(ax.get_title().replace("\n", " "), verdict)
        self.assertLess(ax.title.get_window_extent(renderer).x1, figure.bbox.x1)
        # The axis ends at half of the smallest variance, 0.1, and at twice the largest one, 2.
        np.testing.assert_allclose(ax.get_ylim(), [0.05, 4.0])

    def figure_of(self, level, title="title"):
        """The figure of `plot_headroom` for a headroom.LevelHeadroom."""
        def draw(axes):
            pictures.plot_headroom(axes[0, 0], title, level)

        return drawn_figure(lambda path: pictures.save_figure(path, 1, 1, 4.6, 4.2, "", draw))

    def points(self, ax):
        """{label: (units, values)} of the lines that have points."""
        points = {}
        for line in ax.lines:
            if line.get_marker() != "None":
                points[line.get_label()] = (list(line.get_xdata()), list(line.get_ydata()))
        return points

    def test_points_of_both_encoders(self):
        """Further units come after the active ones. Those with any encoder are above the others."""
        level = level_headroom(
            units=3, collapsed=2, tau=[0.3, 0.1, 0.0], tau_any=[0.7, 0.2, 0.1], theta=[2.0]
        )
        [ax] = self.figure_of(level).axes
        expected = {
            "variance described by active units": ([1], [2.0]),
            # A log axis has no 0.
            "variance of further units with a linear encoder": ([2, 3, 4], [0.3, 0.1, 1e-300]),
            "variance of further units with any encoder": ([2, 3, 4], [0.7, 0.2, 0.1]),
        }
        self.assertEqual(self.points(ax), expected)
        self.assertEqual(ax.get_ylabel(), "variance")

    def test_another_decoder_has_eigenvalues(self):
        """Without active units the points begin at unit 1. The axis holds the largest one."""
        level = level_headroom(
            units=3, collapsed=3, tau=[1.5, 0.9, 0.8], tau_any=[6.0, 2.0, 1.0], level=2.0
        )
        level.likelihood = "bernoulli"
        [ax] = self.figure_of(level).axes
        expected = {
            "eigenvalue ρ of further units with a linear encoder": ([1, 2, 3], [1.5, 0.9, 0.8]),
            "eigenvalue ρ of further units with any encoder": ([1, 2, 3], [6.0, 2.0, 1.0]),
        }
        self.assertEqual(self.points(ax), expected)
        self.assertEqual(ax.get_ylabel(), "eigenvalue ρ")
        np.testing.assert_allclose(ax.get_ylim(), [0.4, 12.0])

    def test_without_weight_there_is_no_threshold(self):
        """The level is None if -log p(t|z) has no weight in the loss."""
        level = level_headroom(units=2, collapsed=2, tau=[0.3], tau_any=[0.4], level=None)
        [ax] = self.figure_of(level).axes
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        self.assertEqual([label for label in labels if "threshold" in label], [])


# A closed form in which unit i of z2 has an information of collapse[i] - beta_2 nats.
COLLAPSE = [2.5, 1.2, 0.7]


class LinearModel(nn.Module):
    @staticmethod
    def predicted(f, data):
        information = torch.tensor(COLLAPSE) - torch.as_tensor(f.beta_2)[..., None]
        return {"information_2": information.clamp(min=0)}


def linear_grid(betas):
    """A pictures.Grid of `LinearModel`s over beta_2, trained to half of the predicted values."""
    data = small.gaussian_data(8, 4)
    cells = {}
    for beta in betas:
        f = small.Flags(device="cpu", beta_2=beta)
        run = evaluated_run(f, data, np.ones((4, 3)), LinearModel())
        predicted = LinearModel.predicted(f, data)["information_2"].tolist()
        run.result.theory = verify.Comparison(
            predicted={"information_2": predicted, "collapse_2": [*COLLAPSE[:2], None]},
            trained={"information_2": [value / 2 for value in predicted]},
            errors={},
            optimal_loss=0.0,
            loss=0.0,
            gap=0.0,
        )
        cells[beta,] = run
    return pictures.Grid({"beta_2": list(betas)}, cells, LinearModel(), "a caption")


class UnitCurves(small.InFolder):
    def test_the_arrays(self):
        arrays = pictures.unit_curves(linear_grid([0.5, 1.0, 2.0]))
        self.assertEqual(str(arrays["flag"]), "beta_2")
        self.assertEqual(arrays["levels"].tolist(), ["_2"])
        self.assertTrue(arrays["dense"])
        self.assertEqual(arrays["trained_x"].tolist(), [0.5, 1.0, 2.0])
        expected = [[1.0, 0.35, 0.1], [0.75, 0.1, 0], [0.25, 0, 0]]
        np.testing.assert_allclose(arrays["trained_2"], expected, atol=1e-6)

        # Between 0.5 and 2.0 only the second unit collapses. The third one is said never to do so.
        self.assertEqual(arrays["collapse_2"].tolist(), [1.2])
        x = arrays["x"]
        self.assertEqual((x[0], x[-1], x.shape), (0.5, 2.0, (600,)))
        np.testing.assert_allclose(arrays["predicted_2"][:, 0], 2.5 - x, atol=1e-6)

    def test_between_settings_that_are_no_numbers(self):
        """Only the trained settings are predicted. A unit that a setting lacks has 0 nats."""
        grid = linear_grid([0.5, 1.0])
        grid.flags = {"lr_schedule": ["constant", "cosine"]}
        runs = list(grid.cells.values())
        grid.cells = {("constant",): runs[0], ("cosine",): runs[1]}
        runs[1].result.theory.trained["information_2"] = [0.75]

        arrays = pictures.unit_curves(grid)
        self.assertFalse(arrays["dense"])
        self.assertEqual(arrays["x"].tolist(), ["constant", "cosine"])
        np.testing.assert_allclose(arrays["trained_2"][1], [0.75, 0, 0], atol=1e-6)
        expected = [[2.0, 0.7, 0.2], [1.5, 0.2, 0]]
        np.testing.assert_allclose(arrays["predicted_2"], expected, atol=1e-6)
        self.assertEqual(arrays["collapse_2"].tolist(), [])
        check_drawn(
            self, lambda folder: pictures.draw_unit_curves(folder / "x.png", arrays, ""), ["x.png"]
        )

    def test_the_saved_arrays_give_the_same_picture(self):
        grid = linear_grid([0.2, 0.5, 1.0, 2.0])
        with mock.patch("pictures.make_grid", lambda runs: grid), mock.patch("sys.stderr"), \
                mock.patch("pictures.grid_dir", lambda settings, data: self.folder):
            pictures.draw_grid(list(grid.cells.values()))
        with np.load(self.folder / "theory.npz") as arrays:
            pictures.draw_unit_curves(self.folder / "again.png", dict(arrays), grid.caption)
        first = (self.folder / "theory.png").read_bytes()
        self.assertEqual((self.folder / "again.png").read_bytes(), first)
        self.assertLess((self.folder / "theory.npz").stat().st_size, 30_000)

    def scale(self, betas):
        """The scale of the flag's axis, and the numbers that label it."""
        arrays = pictures.unit_curves(linear_grid(betas))
        figure = drawn_figure(lambda path: pictures.draw_unit_curves(path, arrays, ""))
        laid_out(figure)
        ax = figure.axes[0]
        low, high = ax.get_xlim()
        labels = []
        for tick in ax.xaxis.get_major_ticks():
            if low <= tick.get_loc() <= high:
                labels.append(tick.label1.get_text())
        return ax.get_xscale(), labels

    def test_a_decade_has_a_logarithmic_axis(self):
        self.assertEqual(self.scale([0.1, 0.3, 1.0]), ("log", ["0.1", "0.2", "0.5", "1"]))
        self.assertEqual(self.scale([0.2, 0.5, 1.9])[0], "linear")
        # 0 has no logarithm.
        self.assertEqual(self.scale([0.0, 0.1, 1.0])[0], "linear")

    def test_evenly_spaced_values_have_a_linear_axis_where_units_collapse_late(self):
        """The units collapse at 0.7, 1.2 and 2.5, at 1.2 in the median."""
        # The lowest fifth of 0.1 to 4.0 ends at 0.88.
        self.assertEqual(self.scale([0.1, 1.4, 2.7, 4.0])[0], "linear")
        # That of 0.5 to 8.0 ends at 2.0.
        self.assertEqual(self.scale([0.5, 3.0, 5.5, 8.0])[0], "log")

    def test_counts_have_whole_numbers(self):
        arrays = pictures.unit_curves(linear_grid([0.5, 1.0, 2.0]))
        figure = drawn_figure(lambda path: pictures.draw_unit_curves(path, arrays, ""))
        ax = figure.axes[1]
        self.assertEqual(ax.get_ylabel(), "active units of z2 (of 3)")
        self.assertTrue(all(tick == round(tick) for tick in ax.get_yticks()))
        np.testing.assert_array_equal(ax.get_lines()[1].get_ydata(), [3, 2, 1])


def nonlinear_grid(values, predicted, trained, active=None):
    """A pictures.Grid over eta_dec whose runs have these KLs, predicted and trained.

    Two units are predicted to be active, and `active` are.
    """
    data = small.gaussian_data(8, 4)
    cells = {}
    for k, value in enumerate(values):
        run = evaluated_run(small.Flags(device="cpu", eta_dec=value), data, np.ones((4, 2)))
        active_units = 2 if active is None else active[k]
        run.result.metrics = {"kl": trained[k], "AU": active_units, "AU_kl": 2}
        run.result.linear = {"information": [0.5, 0.5], "kl": [predicted[k], 0.0]}
        cells[value,] = run
    return pictures.Grid({"eta_dec": list(values)}, cells, None, "")


class BesideLinear(unittest.TestCase):
    def axes(self, grid):
        """The axes with the KL, those with the counts, and the renderer."""
        figure = drawn_figure(lambda path: pictures.draw_beside_linear(path, grid))
        renderer = laid_out(figure)
        return figure.axes[0], figure.axes[1], renderer

    def test_equal_axes_and_whole_numbers(self):
        values = [0.1, 0.2, 0.3]
        grid = nonlinear_grid(values, [1.0, 5.0, 9.0], [2.0, 3.0, 3.5], active=[1, 2, 1])
        kl, counts, _ = self.axes(grid)
        for ax in (kl, counts):
            self.assertEqual(ax.get_xlim(), ax.get_ylim())
            self.assertEqual(ax.get_aspect(), 1)
            self.assertEqual(ax.get_xlabel(), "predicted for the linear model")
            self.assertEqual(ax.get_ylabel(), "trained")
        # From 1.0 to 9.0, with 8 % of 8.0 on each side.
        np.testing.assert_allclose(kl.get_xlim(), [0.36, 9.64])
        for tick in (*counts.get_xticks(), *counts.get_yticks()):
            self.assertEqual(tick, round(tick))
        self.assertEqual(kl.get_title(), "z: KL (nats), rank correlation 1.00\nlabels: eta_dec")

    def test_points_that_are_all_the_same_are_a_sentence(self):
        kl, counts, _ = self.axes(nonlinear_grid([0.1, 0.2], [1.0, 2.0], [1.0, 2.0]))
        self.assertTrue(kl.axison)
        self.assertFalse(counts.axison)
        [text] = counts.texts
        expected = (
            "The same in all settings:\nAU: predicted 2, trained 2\nAU_kl: predicted 2, trained 2"
        )
        self.assertEqual(text.get_text(), expected)

    def test_labels_cover_neither_points_nor_each_other(self):
        """Two equal points share a label. Ten others are in a line, close to each other."""
        values = [float(k) for k in range(1, 13)]
        predicted = [3.0, 3.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 20.0]
        trained = [4.0, 4.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 2.0]
        ax, _, renderer = self.axes(nonlinear_grid(values, predicted, trained))
        texts = {text.get_text(): text for text in ax.texts}
        expected = ["1.0; 2.0", *(str(value) for value in values[2:])]
        self.assertEqual(sorted(texts), sorted(expected))
        boxes = [text.get_window_extent(renderer) for text in ax.texts]
        for k, box in enumerate(boxes):
            for other in boxes[:k]:
                self.assertFalse(box.overlaps(other))
            self.assertTrue(ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1)
            for point in zip(predicted, trained):
                self.assertFalse(box.contains(*ax.transData.transform(point)))

    def test_many_settings_have_colours(self):
        """A colour bar has the values of the flag, every second of 20."""
        values = [float(k) for k in range(1, 21)]
        kl, _, _ = self.axes(nonlinear_grid(values, values, values))
        self.assertEqual(list(kl.texts), [])
        [points] = kl.collections
        self.assertEqual(points.get_array().tolist(), list(range(20)))
        bar = points.colorbar.ax
        labels = [label.get_text() for label in bar.get_yticklabels()]
        self.assertEqual(labels, [str(float(k)) for k in range(1, 21, 2)])
        self.assertEqual(bar.get_ylabel(), "eta_dec")

    def test_two_flags_have_colours_and_sizes(self):
        flags = {"a": ["x", "y"], "b": [1, 2, 3]}
        keys = [("x", 1), ("y", 1), ("x", 3)]
        style = pictures.flag_style(keys, flags)
        self.assertEqual(style["c"], [0, 1, 0])
        self.assertEqual(style["s"][0], style["s"][1])
        self.assertLess(style["s"][0], style["s"][2])
        self.assertEqual(pictures.style_in_words(flags, False), "sizes: b, from 1 to 3")


class OneShade(nn.Module):
    """A model of images of 2 x 2 pixels that reconstructs them in one shade."""

    def __init__(self, shade, original=1.0):
        super().__init__()
        self.shade = shade
        self.original = original

    def reconstructions(self, x, f):
        images = torch.ones(2, 1, 2, 2)
        return {"test images": self.original * images, "in one shade": self.shade * images}


def sheet_grid(models, n_test=2):
    """A pictures.Grid over eta_enc and beta_1. models is {(eta_enc, beta_1): model}."""
    data = small.digit_data(16, n_test, torch.float32)
    cells = {}
    for (row, column), model in models.items():
        f = small.Flags(device="cpu", eta_enc=row, beta_1=column)
        cells[row, column] = evaluated_run(f, data, np.ones((n_test, 2)), model)
    rows, columns = ([*dict.fromkeys(values)] for values in zip(*models))
    flags = {"eta_enc": rows, "beta_1": columns}
    return pictures.Grid(flags, cells, first_model(models), "a caption")


def first_model(models):
    """The first model of {setting: model}."""
    return next(iter(models.values()))


class Sheets(small.InFolder):
    def models(self):
        """Models over two rows and two columns, of which one setting diverged."""
        return {(0.1, 1.0): OneShade(0.0), (0.1, 2.0): OneShade(1.0), (0.2, 1.0): OneShade(0.5)}

    def test_the_arrays(self):
        arrays = pictures.sheet_arrays(sheet_grid(self.models()))
        self.assertEqual(str(arrays["row_flag"]), "eta_enc")
        self.assertEqual(str(arrays["column_flag"]), "beta_1")
        self.assertEqual(arrays["row_values"].tolist(), ["0.1", "0.2"])
        self.assertEqual(arrays["column_values"].tolist(), ["1.0", "2.0"])
        self.assertEqual(str(arrays["title_0"]), "test images")
        self.assertEqual(str(arrays["title_1"]), "in one shade")
        np.testing.assert_array_equal(arrays["originals"], np.full((2, 1, 2, 2), 255))

        images = arrays["images_1"]
        self.assertEqual((images.shape, images.dtype), ((2, 2, 2, 1, 2, 2), np.uint8))
        # There are 64 shades. 0.5 is the 32nd of 0 to 63: 32 / 63 of 255 is 129.5.
        np.testing.assert_array_equal(images[:, :, 0, 0, 0, 0], [[0, 255], [130, 0]])
        np.testing.assert_array_equal(arrays["shown_1"], [[True, True], [True, False]])
        self.assertEqual(pictures.sheet_kinds(arrays), [1])

    def test_test_images_that_differ_have_a_sheet(self):
        """A flag such as --digit changes them."""
        models = {(0.1, 1.0): OneShade(0.0), (0.1, 2.0): OneShade(0.0, original=0.0)}
        arrays = pictures.sheet_arrays(sheet_grid(models))
        self.assertNotIn("originals", arrays)
        self.assertEqual(pictures.sheet_kinds(arrays), [0, 1])
        np.testing.assert_array_equal(arrays["images_0"][0, :, 0, 0, 0, 0], [255, 0])

    def test_images_of_other_sizes_are_filled_with_black(self):
        """One image of 1 x 1 pixel in grey beside two of 2 x 2 in colour."""
        grey = np.full((1, 1, 1, 1), 7, dtype=np.uint8)
        coloured = np.full((2, 3, 2, 2), 9, dtype=np.uint8)
        images, shown = pictures.stack_images({(0, 0): grey, (0, 1): coloured}, (1, 2))
        self.assertEqual(images.shape, (1, 2, 2, 3, 2, 2))
        self.assertEqual(images[0, 0].sum(), 3 * 7)
        self.assertEqual(images[0, 0, 0, :, 0, 0].tolist(), [7, 7, 7])
        self.assertTrue((images[0, 1] == 9).all())
        self.assertEqual(shown.tolist(), [[True, True]])

    def test_no_model_has_images(self):
        arrays = pictures.sheet_arrays(sheet_grid({(0.1, 1.0): nn.Identity()}))
        self.assertEqual((arrays, pictures.sheet_kinds(arrays)), ({}, []))

    def test_values_are_on_the_margins(self):
        arrays = pictures.sheet_arrays(sheet_grid(self.models()))
        figure = drawn_figure(lambda path: pictures.draw_sheet(path, arrays, ""))
        self.assertEqual(figure.get_suptitle(), "in one shade")
        column_titles = sorted(ax.get_title() for ax in figure.axes if ax.get_title())
        self.assertEqual(column_titles, ["beta_1 = 1.0", "beta_1 = 2.0", "test images"])
        row_labels = [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()]
        self.assertEqual(row_labels, ["eta_enc = 0.1", "eta_enc = 0.2"])
        # The strip of test images, and three of the four cells.
        self.assertEqual(sum(len(ax.images) for ax in figure.axes), 4)

    def test_the_saved_arrays_give_the_same_picture(self):
        grid = sheet_grid(self.models())
        with mock.patch("pictures.make_grid", lambda runs: grid), mock.patch("sys.stderr"), \
                mock.patch("pictures.grid_dir", lambda settings, data: self.folder):
            pictures.draw_grid(list(grid.cells.values()))
        names = sorted(path.name for path in self.folder.iterdir())
        expected = ["metrics.png", "reconstructions.npz", "reconstructions_1.png"]
        self.assertEqual(names, expected)
        with np.load(self.folder / "reconstructions.npz") as arrays:
            pictures.draw_sheet(self.folder / "again.png", dict(arrays), grid.caption, kind=1)
        first = (self.folder / "reconstructions_1.png").read_bytes()
        self.assertEqual((self.folder / "again.png").read_bytes(), first)

    def test_the_size_of_a_large_grid(self):
        """5 x 5 settings with 20 blurred, noisy digits in two kinds have less than 400 KB."""
        random = torch.Generator().manual_seed(0)
        digits = small.digit_data(1000, 1, torch.float32).train[0].view(25, 40, 1, 28, 28)
        tiles = {}
        for k, batch in enumerate(digits):
            blurred = nn.functional.avg_pool2d(batch, 5, stride=1, padding=2)
            noisy = blurred + 0.01 * torch.randn(blurred.shape, generator=random)
            tiles[divmod(k, 5)] = pictures.as_bytes(noisy)
        images, _ = pictures.stack_images(tiles, (5, 5))
        self.assertEqual(images.size, 25 * 40 * 784)
        content = io.BytesIO()
        np.savez_compressed(content, images=images)
        self.assertLess(len(content.getvalue()), 400_000)

    def test_random_reconstructions_are_drawn_anew_alike(self):
        class Noise(nn.Module):
            def reconstructions(self, x, f):
                return {"test images": x, "noise": torch.rand(len(x), 784)}

        grid = sheet_grid({(0.1, 1.0): Noise(), (0.1, 2.0): Noise()})
        first = pictures.sheet_arrays(grid)
        np.testing.assert_array_equal(first["images_1"], pictures.sheet_arrays(grid)["images_1"])


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
