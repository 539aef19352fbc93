"""figures.py: the pictures of results, drawn from made-up rows and arrays."""
import unittest
import warnings
from types import SimpleNamespace
from unittest import mock

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import figures
import pictures
from tests import small
from tests.small import PNG
from tests.test_measurements import command_with, deep_model, predicted_sweep


def axes_of(draw, commands, arrays=None):
    """The axes (rows, columns) into which a function of figures.py draws."""
    with mock.patch("pictures.save_figure") as save:
        draw("x.png", commands, arrays)
    save.assert_called_once()
    sizes = save.call_args.kwargs
    axes = Figure().subplots(sizes["rows"], sizes["columns"], squeeze=False)
    sizes["draw"](axes)
    return axes


def lines(ax):
    """The lines of some axes with a label of their own: {label: [(x, y), ...]}."""
    points = {}
    for line in ax.get_lines():
        if not line.get_label().startswith("_"):
            points[line.get_label()] = list(zip(line.get_xdata(), line.get_ydata()))
    return points


def trained_dots(ax):
    """The points with error bars in some axes: {label: [(x, y), ...]}."""
    points = {}
    for container in ax.containers:
        line = container.lines[0]
        points[container.get_label()] = list(zip(line.get_xdata(), line.get_ydata()))
    return points


def bars(ax):
    """The bars in some axes: {label: [height, ...]}. Bars without a label follow under ""."""
    heights = {}
    for container in ax.containers:
        if hasattr(container, "patches"):
            label = container.get_label()
            key = "" if label.startswith("_") else label
            heights.setdefault(key, []).extend(patch.get_height() for patch in container.patches)
    return heights


class Drawn(small.InFolder):
    """Tests that draw into a file."""

    def picture(self, draw, commands, arrays=None, name="x.png"):
        """The bytes of the PNG file that a function draws, without any warning."""
        path = self.folder / name
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw(path, commands, arrays)
        content = path.read_bytes()
        self.assertTrue(content.startswith(PNG))
        return content

    def check_saved_arrays_draw_the_same(self, draw, commands, arrays):
        """The picture of arrays that were saved and read again is the same in every byte."""
        np.savez_compressed(self.folder / "x.npz", **arrays)
        with np.load(self.folder / "x.npz") as file:
            saved = {key: file[key] for key in file.files}
        first = self.picture(draw, commands, arrays)
        self.assertEqual(first, self.picture(draw, commands, saved, "y.png"))


# ------------------------------------------------------------------------------------ over a flag

def hierarchical_sweep(line="MNIST_HVAE_Relu.py", flag="beta_1", shift=0.0):
    """Two settings with two seeds of a two-level model."""
    rows = []
    for setting in (0.5, 2.0):
        for seed in (1, 2):
            row = {flag: setting, "seed": seed, "elbo": 0.0, "d_1": 4, "d_2": 8}
            for level in ("_1", "_2"):
                row[f"kl{level}"] = setting + seed + shift
                row[f"AU_kl{level}"] = 3
                row[f"linear kl{level}"] = 10.0 * setting
                row[f"linear AU{level}"] = 4
            rows.append(row)
    return command_with(line, {flag: [0.5, 2.0]}, rows)


class OverFlags(Drawn):
    def test_several_commands(self):
        """One column for each command with the exact objective, and one scale in each row."""
        commands = [
            hierarchical_sweep(),
            hierarchical_sweep("MNIST_HVAE_Relu.py --released_objective", shift=1000.0),
            hierarchical_sweep(flag="beta_2", shift=50.0),
        ]
        self.picture(figures.over_flags, commands, {})
        axes = axes_of(figures.over_flags, commands)
        self.assertEqual(axes.shape, (2, 2))
        for row in axes:
            self.assertEqual(row[0].get_ylim(), row[1].get_ylim())
        self.assertLess(axes[0][0].get_ylim()[1], 500)
        self.assertEqual([ax.get_xlabel() for ax in axes[1]], ["β1", "β2"])

    def test_one_command(self):
        """Its two panels are side by side. Dots are the means over the seeds."""
        command = hierarchical_sweep()
        self.picture(figures.over_flags, [command], {})
        axes = axes_of(figures.over_flags, [command])
        self.assertEqual(axes.shape, (1, 2))
        kl, units = axes[0]
        # Seeds 1 and 2 have the KLs 1.5 and 2.5, then 3 and 4.
        self.assertEqual(trained_dots(kl)["z1, trained"], [(0.5, 2.0), (2.0, 3.5)])
        self.assertEqual(lines(kl)["z2, linear theory"], [(0.5, 5.0), (2.0, 20.0)])
        self.assertEqual(trained_dots(units)["z2, trained"], [(0.5, 3.0), (2.0, 3.0)])
        self.assertEqual(lines(units)["z2, linear theory"], [(0.5, 4.0), (2.0, 4.0)])

    def test_a_flag_with_texts(self):
        """The settings are at equal distances, in the order of the command. One seed has no bar."""
        rows = []
        for corr_type, kl in (("Random", 9.0), ("Identical", 0.0)):
            rows.append({"corr_type": corr_type, "elbo": 0.0, "kl": kl, "AU_kl": 1})
        command = command_with("x.py", {"corr_type": ["Identical", "Random"]}, rows)
        self.picture(figures.over_flags, [command], {})
        [[kl, _]] = axes_of(figures.over_flags, [command])
        self.assertEqual(trained_dots(kl)["z, trained"], [(0, 0.0), (1, 9.0)])
        self.assertEqual([text.get_text() for text in kl.get_xticklabels()], ["1", "0"])

    def test_settings_that_diverged(self):
        """A setting has no dot. A command without any result does not end the program."""
        command = hierarchical_sweep()
        command.rows = command.rows[2:] + [{"beta_1": 0.5, "seed": 1}]
        [[kl, _]] = axes_of(figures.over_flags, [command])
        self.assertEqual(trained_dots(kl)["z1, trained"], [(2.0, 3.5)])
        diverged = command_with("x.py", {"beta_2": [1.0, 2.0]}, [{"beta_2": 1.0}, {"beta_2": 2.0}])
        self.picture(figures.over_flags, [hierarchical_sweep(), diverged], {})


# ---------------------------------------------------------------------------------- collapse curves

class CollapseCurves(Drawn):
    def test_one_number_per_unit_is_enough(self):
        """It has the collapse curve of all examples, for any number of them."""
        random = np.random.default_rng(0)
        for n in (1, 2, 7, 19, 20, 21, 39, 40, 41, 100, 137, 1000):
            for dtype in (np.float32, np.float64):
                unit_kl = random.gamma(0.3, 0.2, (n, 6)).astype(dtype)
                # A unit that is never in use, and one whose KLs are thresholds.
                unit_kl[:, 0] = 0
                unit_kl[:, 1] = random.choice(pictures.EPSILON, n)
                quantiles = pictures.kl_of_most_examples(unit_kl)
                self.assertEqual(quantiles.shape, (6,))
                np.testing.assert_array_equal(
                    pictures.collapse_curve(quantiles[None], pictures.EPSILON),
                    pictures.collapse_curve(unit_kl, pictures.EPSILON),
                )

    def test_by_hand(self):
        """Of 20 examples, 19 are 95 %. Of 21 examples, 20 are the fewest with at least 95 %."""
        unit_kl = np.arange(20.0)[:, None]
        self.assertEqual(pictures.kl_of_most_examples(unit_kl), [18.0])
        unit_kl = np.arange(21.0)[:, None]
        self.assertEqual(pictures.kl_of_most_examples(unit_kl), [19.0])

    def run_with(self, units, seeds=(1,), diverged=(), is_released=False):
        """Like a reproduce.Run: settings beta = 0, 1, ... for each seed, seed after seed.

        units is a list with the arrays of each setting of the first seed.
        """
        results = []
        for seed in seeds:
            for k in range(len(units)):
                is_diverged = seed == seeds[0] and k in diverged
                results.append(SimpleNamespace(metrics=None if is_diverged else {"kl": 1.0}))
        return SimpleNamespace(
            results=results,
            settings=list(results),
            is_released=is_released,
            first_seed_indices=lambda: list(range(len(units))),
            setting_labels=lambda: [{"beta": float(k)} for k in range(len(units))],
            units=lambda i: units[i],
        )

    def test_arrays(self):
        """Those of the exact objective and the first seed, without settings that diverged."""
        units = []
        for kl in (3.0, 0.0, 1.0):
            units.append({
                "log_px": np.zeros(40),
                "unit_kl_1": np.full((40, 2), kl),
                "unit_kl_2": np.full((40, 3), 2 * kl),
            })
        arrays = figures.collapse_arrays([
            self.run_with(units[:1], is_released=True),
            self.run_with(units, seeds=(1, 2), diverged=(1,)),
        ])
        self.assertEqual(sorted(arrays), ["labels", "unit_kl_1", "unit_kl_2"])
        self.assertEqual(arrays["labels"].tolist(), ["beta = 0.0", "beta = 2.0"])
        np.testing.assert_array_equal(arrays["unit_kl_1"], [[3.0] * 2, [1.0] * 2])
        np.testing.assert_array_equal(arrays["unit_kl_2"], [[6.0] * 3, [2.0] * 3])

    def test_without_the_released_objective(self):
        """A result of the exact objective alone. An unfinished one has no arrays."""
        run = self.run_with([{"unit_kl": np.full((40, 2), 0.5)}] * 2)
        arrays = figures.collapse_arrays([run])
        np.testing.assert_array_equal(arrays["unit_kl"], [[0.5, 0.5]] * 2)
        run.results.pop()
        self.assertIsNone(figures.collapse_arrays([run]))

    def test_values_of_examples_that_are_missing(self):
        """Another process removed units.npz, or it is broken. The other settings are kept."""
        units = [None, {"unit_kl": np.ones((40, 2))}]
        arrays = figures.collapse_arrays([self.run_with(units)])
        self.assertEqual(arrays["labels"].tolist(), ["beta = 1.0"])
        np.testing.assert_array_equal(arrays["unit_kl"], [[1.0, 1.0]])

    def arrays(self, kls_of_z1):
        """z2 has a collapsed unit. z1 has units with these KLs in all settings."""
        return {
            "labels": np.array(["beta = 1.0", "beta = 2.0"]),
            "unit_kl_1": np.array([kls_of_z1, kls_of_z1], dtype=np.float32),
            "unit_kl_2": np.array([[0.0, 1.0], [3.0, 4.0]], dtype=np.float32),
        }

    def titles(self, arrays):
        """The titles of the panels from the top."""
        return [ax.get_title() for [ax] in axes_of(figures.collapse_curves, [], arrays)]

    def test_levels(self):
        """A panel for each level with a collapsed unit. Without any, the first level is shown."""
        self.assertEqual(self.titles(self.arrays([0.0, 1.0])), ["units of z1", "units of z2"])
        arrays = self.arrays([0.5, 1.0])
        self.assertEqual(self.titles(arrays), ["units of z2"])
        arrays["unit_kl_2"] += 1
        self.assertEqual(self.titles(arrays), ["units of z1"])
        self.assertEqual(
            self.titles({"labels": arrays["labels"], "unit_kl": arrays["unit_kl_1"]}),
            ["units of z"],
        )

    def test_curves(self):
        """At the largest threshold every unit is collapsed. At 0.5 nats one of two is, or none."""
        [[ax]] = axes_of(figures.collapse_curves, [], self.arrays([0.5, 1.0]))
        for label, share in (("beta = 1.0", 50.0), ("beta = 2.0", 0.0)):
            curve = dict(lines(ax)[label])
            epsilons = [epsilon for epsilon in curve if epsilon < 0.5]
            self.assertEqual(curve[max(epsilons)], share)
            self.assertEqual(curve[max(curve)], 100.0)

    def test_saved_arrays_draw_the_same(self):
        self.check_saved_arrays_draw_the_same(
            figures.collapse_curves, [], self.arrays([0.0, 1.0])
        )

    def test_all_settings_diverged(self):
        """There may be no picture, but no error either."""
        figures.collapse_curves(self.folder / "x.png", [], {"labels": np.array([])})


# ------------------------------------------------------------------------ arrays that a grid leaves

def arrays_of_units():
    """The arrays of pictures.unit_curves for a two-level model with two settings."""
    arrays = {
        "flag": np.array("beta_2"),
        "levels": np.array(["_1", "_2"]),
        "x": np.linspace(1.0, 2.0, 5),
        "trained_x": np.array([1.0, 2.0]),
        "dense": np.array(True),
    }
    for level in ("_1", "_2"):
        arrays[f"predicted{level}"] = np.array([[2.0, 0.5], [2, 0.2], [2, 0], [2, 0], [1, 0]])
        arrays[f"trained{level}"] = np.array([[2.0, 0.4], [1.0, 0.0]])
        arrays[f"collapse{level}"] = np.array([1.3])
    return arrays


def arrays_of_images():
    """The arrays of pictures.sheet_arrays for 2 x 2 settings, one of which diverged."""
    random = np.random.default_rng(0)
    arrays = {
        "row_flag": np.array("beta_1"),
        "column_flag": np.array("beta_2"),
        "row_values": np.array(["0.1", "1.0"]),
        "column_values": np.array(["1.0", "2.0"]),
        "title_0": np.array("test images"),
        "originals": random.integers(0, 256, (3, 1, 28, 28), dtype=np.uint8),
    }
    for kind in (1, 2):
        arrays[f"title_{kind}"] = np.array(f"reconstructed through z{kind}")
        arrays[f"images_{kind}"] = random.integers(0, 256, (2, 2, 3, 1, 28, 28), dtype=np.uint8)
        arrays[f"shown_{kind}"] = np.array([[True, True], [True, False]])
    return arrays


class GridArrays(Drawn):
    def test_unit_curves(self):
        self.check_saved_arrays_draw_the_same(figures.unit_curves, [], arrays_of_units())

    def test_contact_sheet(self):
        self.check_saved_arrays_draw_the_same(figures.contact_sheet, [], arrays_of_images())

    def test_the_sheet_is_that_of_z2(self):
        """Each cell has the images of z2, and the strip above them has the test images."""
        arrays = arrays_of_images()
        with mock.patch("pictures.show_bytes") as show:
            self.picture(figures.contact_sheet, [], arrays)
        shown = [call.args[1] for call in show.call_args_list]
        wanted = [arrays["originals"], *arrays["images_2"][arrays["shown_2"]]]
        self.assertEqual(len(shown), 4)
        for images, wanted_images in zip(shown, wanted):
            np.testing.assert_array_equal(images, wanted_images)

    def test_reading(self):
        """The arrays are in the folder of the grid of the first run."""
        np.savez_compressed(self.folder / "theory.npz", **arrays_of_units())
        runs = [SimpleNamespace(grid_dir=lambda: self.folder)]
        arrays = figures.grid_arrays("theory.npz")(runs)
        self.assertEqual(list(arrays), list(arrays_of_units()))
        np.testing.assert_array_equal(arrays["trained_x"], [1.0, 2.0])


# --------------------------------------------------------------------------------------- bars

class PerDigit(Drawn):
    def command(self, script, shift=0.0, predicted=True):
        """Digits 0 and 1 with three seeds, whose KLs are 1, 2 and 3 plus the digit."""
        rows = []
        for digit in (0, 1):
            for seed in (1, 2, 3):
                row = {
                    "digit": digit, "seed": seed, "elbo": 0.0, "kl": seed + digit + shift,
                    "AU_kl": 7,
                }
                if predicted:
                    row |= {"linear kl": 5.0 + digit, "linear AU": 9}
                rows.append(row)
        return command_with(script, {"digit": [0, 1]}, rows)

    def test_dots_and_lines(self):
        """The seeds of a digit are side by side. All rows have one scale."""
        commands = [self.command("x.py"), self.command("y.py", shift=20.0)]
        self.picture(figures.per_digit, commands, {})
        axes = axes_of(figures.per_digit, commands)
        self.assertEqual(axes.shape, (2, 2))
        for column in (0, 1):
            self.assertEqual(axes[0][column].get_ylim(), axes[1][column].get_ylim())
        dots = lines(axes[0][0])["trained, one dot per seed"]
        self.assertEqual([y for _, y in dots], [1.0, 2.0, 3.0])
        np.testing.assert_allclose([x for x, _ in dots], [-0.2, 0.0, 0.2])
        self.assertEqual([y for _, y in lines(axes[0][0])["linear theory"]], [5.0, 5.0])
        self.assertEqual([y for _, y in lines(axes[1][1])["linear theory"]], [9, 9])
        self.assertEqual([ax.get_title() for ax in axes[:, 0]], ["x", "y"])

    def test_without_a_prediction(self):
        self.picture(figures.per_digit, [self.command("x.py", predicted=False)], {})

    def test_a_digit_that_diverged(self):
        command = self.command("x.py")
        command.rows[0] = {"digit": 0, "seed": 1}
        self.picture(figures.per_digit, [command], {})
        [[kl, _]] = axes_of(figures.per_digit, [command])
        dots = lines(kl)["trained, one dot per seed"]
        self.assertEqual([y for _, y in dots], [2.0, 3.0])


class SigmaBars(Drawn):
    def command(self, script, active, beta=1.0):
        rows = []
        for seed, count in enumerate(active):
            rows.append({
                "seed": seed, "elbo": 0.0, "beta": beta, "d_1": 16, "AU_kl": count,
                "AU": count - 1, "kl": 2.0 * count,
            })
        return command_with(script, {}, rows)

    def test_pairs(self):
        commands = [
            self.command("MNIST_VAE_Linear_learnable_sigma.py", [1, 2, 3]),
            self.command("MNIST_VAE_Linear_nonlearnable_sigma.py", [5, 5, 5]),
            self.command("MNIST_VAE_Relu_learnable_sigma.py", [7], beta=4.0),
            self.command("MNIST_VAE_Relu_nonlearnable_sigma.py", [8], beta=4.0),
        ]
        self.picture(figures.sigma_bars, commands, {})
        [[units, by_mean, kl]] = axes_of(figures.sigma_bars, commands)
        self.assertEqual(bars(units), {"learnable": [2.0], "fixed": [5.0], "": [7.0, 8.0]})
        self.assertEqual(bars(by_mean), {"learnable": [1.0], "fixed": [4.0], "": [6.0, 7.0]})
        self.assertEqual(bars(kl), {"learnable": [4.0], "fixed": [10.0], "": [14.0, 16.0]})
        names = [text.get_text() for text in units.get_xticklabels()]
        self.assertIn("linear, β = 1", names[0])
        self.assertIn("ReLU, β = 4", names[1])

    def test_all_seeds_diverged(self):
        commands = [
            self.command("MNIST_VAE_Linear_learnable_sigma.py", [1, 2]),
            command_with(
                "MNIST_VAE_Linear_nonlearnable_sigma.py", {}, [{"seed": 1, "beta": 1.0, "d_1": 16}]
            ),
        ]
        figures.sigma_bars(self.folder / "x.png", commands, {})
        self.assertFalse((self.folder / "x.png").exists())

    def test_a_command_without_rows(self):
        """The .csv file lacks the fixed variance."""
        commands = [
            self.command("MNIST_VAE_Linear_learnable_sigma.py", [1]),
            self.command("MNIST_VAE_Linear_nonlearnable_sigma.py", []),
        ]
        figures.sigma_bars(self.folder / "x.png", commands, {})
        self.assertFalse((self.folder / "x.png").exists())


class DeltaBars(Drawn):
    def test_bars_and_deltas(self):
        def row(**columns):
            return {"elbo": 0.0, **columns}

        commands = [
            command_with("x.py --prior standard", {}, [
                row(prior="standard", delta=1.0, smallest_rate=0.0, kl=0.5, rate_auxiliary=0.25),
            ]),
            command_with("x.py --delta 2,5", {"delta": [2.0, 5.0]}, [
                row(prior="ar1", delta=2.0, smallest_rate=2.0, kl=2.5, rate_auxiliary=1.0),
                row(prior="ar1", delta=5.0, smallest_rate=5.0, kl=8.0, rate_auxiliary=4.0),
            ]),
        ]
        self.picture(figures.delta_bars, commands, {})
        [[ax]] = axes_of(figures.delta_bars, commands)
        own, auxiliary = [bars(ax)[label] for label in bars(ax) if label]
        self.assertEqual((own, auxiliary), ([0.5, 2.5, 8.0], [0.25, 1.0, 4.0]))
        self.assertEqual(
            [line.get_ydata()[0] for line in ax.get_lines()], [0.0, 2.0, 5.0]
        )
        self.assertEqual(
            [text.get_text() for text in ax.get_xticklabels()],
            ["standard prior", "δ = 2", "δ = 5"],
        )


class LevelBars(Drawn):
    def command(self, script, kls, active, **columns):
        return command_with(script, {}, [{
            "elbo": 0.0, "kl from the top": kls, "AU_kl from the top": active, **columns,
        }])

    def ladder(self):
        return self.command("MNIST_HVAE_Ladder.py", "4, 3", "8, 6")

    def dct(self):
        return self.command("MNIST_HVAE_DCT.py", "9, 2, 1", "49, 0, 5", context_baseline=3.0)

    def test_levels(self):
        """Level 1 is next to the image, so it is the last number of a cell."""
        commands = [self.ladder(), self.dct()]
        self.picture(figures.level_bars, commands, {})
        [[kl, units]] = axes_of(figures.level_bars, commands)
        self.assertEqual(
            bars(kl), {"MNIST_HVAE_Ladder": [3.0, 4.0], "MNIST_HVAE_DCT": [1.0, 2.0, 9.0]}
        )
        self.assertEqual(
            bars(units), {"MNIST_HVAE_Ladder": [6.0, 8.0], "MNIST_HVAE_DCT": [5.0, 0.0, 49.0]}
        )
        names = [text.get_text() for text in kl.get_xticklabels()]
        self.assertEqual(len(names), 3)
        self.assertIn("context", names[2])

    def test_without_a_context(self):
        [[kl, _]] = axes_of(figures.level_bars, [self.ladder()])
        names = [text.get_text() for text in kl.get_xticklabels()]
        self.assertNotIn("context", "".join(names))

    def test_a_model_that_diverged(self):
        """The others keep their names. A seed that diverged is not the seed that is shown."""
        diverged = command_with("MNIST_HVAE_Ladder.py", {}, [{"seed": 1}])
        [[kl, _]] = axes_of(figures.level_bars, [diverged, self.dct()])
        self.assertEqual(bars(kl), {"MNIST_HVAE_DCT": [1.0, 2.0, 9.0]})
        dct = self.dct()
        dct.rows.insert(0, {"seed": 0})
        [[kl, _]] = axes_of(figures.level_bars, [self.ladder(), dct])
        self.assertEqual(bars(kl)["MNIST_HVAE_DCT"], [1.0, 2.0, 9.0])
        figures.level_bars(self.folder / "x.png", [diverged], {})
        self.assertFalse((self.folder / "x.png").exists())


# ------------------------------------------------------------------------ curves of the deep models

class TestCurves(Drawn):
    """Curves of 20 epochs, and models whose ELBOs differ by known terms."""

    # The values of epochs 1 to 20 of each seed.
    LADDER = [[-1000.0 / epoch - shift for epoch in range(1, 21)] for shift in (0.0, 1.0)]
    DVP = [[-3000.0 / epoch for epoch in range(1, 21)]]

    def arrays(self):
        return {
            "MNIST_HVAE_Ladder seed 1": np.array(self.LADDER[0]),
            "MNIST_HVAE_Ladder seed 2": np.array(self.LADDER[1]),
            "MNIST_HVAE_DVP seed 1": np.array(self.DVP[0]),
        }

    def commands(self):
        return [
            deep_model(
                "MNIST_HVAE_Ladder.py", {1: (20.0, None, 10.0), 2: (21.0, None, 10.0)},
                context=False,
            ),
            deep_model("MNIST_HVAE_DVP.py", {1: (19.0, 14.0, 2.0)}),
        ]

    def panels(self, commands=None, arrays=None):
        """The three panels, which are also drawn into a file without a warning."""
        commands = commands or self.commands()
        arrays = arrays or self.arrays()
        self.picture(figures.test_curves, commands, arrays)
        [axes] = axes_of(figures.test_curves, commands, arrays)
        return axes

    def test_arrays(self):
        """Each script has a curve for each seed that has results."""
        def result(seed, curve, is_finished=True, name="test_elbo"):
            metrics = {"elbo": 0.0} if is_finished else None
            return SimpleNamespace(
                metrics=metrics,
                curves={"loss": [9.0, 9.0], name: curve},
                settings={"seed": seed},
            )

        runs = [
            SimpleNamespace(script="x", results=[
                result(0, [-3.0, -2.0]),
                result(1, [-9.0], is_finished=False),
                result(2, [-5.0, -4.0]),
            ]),
            SimpleNamespace(script="y", results=[]),
            SimpleNamespace(script="z", results=[result(0, [-1.0, -1.0], name="kl")]),
        ]
        arrays = figures.test_curve_arrays(runs)
        self.assertEqual(list(arrays), ["x seed 0", "x seed 2"])
        np.testing.assert_array_equal(arrays["x seed 0"], [-3.0, -2.0])
        np.testing.assert_array_equal(arrays["x seed 2"], [-5.0, -4.0])
        self.assertIsNone(figures.test_curve_arrays(runs[1:]))

    def test_curves(self):
        """A line for each seed, in the colour of the model. The legend has the number of seeds."""
        left, middle, _ = self.panels()
        for ax in (left, middle):
            self.assertEqual(
                [line.get_color() for line in ax.get_lines()], ["C0", "C0", "C1"]
            )
            for line, curve in zip(ax.get_lines(), [*self.LADDER, *self.DVP]):
                np.testing.assert_array_equal(line.get_xdata(), range(1, 21))
                np.testing.assert_array_equal(line.get_ydata(), curve)
        self.assertEqual(list(lines(left)), ["MNIST_HVAE_Ladder", "MNIST_HVAE_DVP (1 seed)"])

    def test_limits(self):
        """The first two epochs are cut off on the left, and the first ten in the middle."""
        left, middle, _ = self.panels()
        for ax, first_epoch in ((left, 3), (middle, 11)):
            low, high = ax.get_ylim()
            lowest, highest = -3000.0 / first_epoch, -1000.0 / 20
            self.assertTrue(-3000.0 / (first_epoch - 1) < low < lowest, low)
            self.assertTrue(highest < high < highest + 0.1 * (highest - lowest), high)
        self.assertLess(left.get_xlim()[0], 1)
        self.assertAlmostEqual(middle.get_xlim()[0], 10.5)
        self.assertEqual(left.get_xlim()[1], middle.get_xlim()[1])

    def test_differences(self):
        """With seed 1 the ELBOs are -30 and -35. With two seeds the bars have error bars."""
        _, _, right = self.panels()
        self.assertEqual(bars(right), {"MNIST_HVAE_DVP (only seed 1)": [-5.0, 1.0, 8.0, -14.0]})
        [container] = [c for c in right.containers if hasattr(c, "patches")]
        self.assertIsNone(container.errorbar)
        self.assertEqual(container.patches[0].get_facecolor()[:3], to_rgb("C1"))
        names = [text.get_text() for text in right.get_xticklabels()]
        self.assertEqual(names, ["ELBO", "reconstruction", "learned\nlatents", "context"])
        self.assertIn("MNIST_HVAE_Ladder", right.get_title())

        commands = self.commands()
        commands[1] = deep_model(
            "MNIST_HVAE_DVP.py", {1: (19.0, 14.0, 2.0), 2: (22.0, 14.0, 2.0)}
        )
        _, _, right = self.panels(commands)
        # The reconstructions differ by 1 and -1.
        self.assertEqual(bars(right), {"MNIST_HVAE_DVP": [-6.0, 0.0, 8.0, -14.0]})
        [container] = [c for c in right.containers if hasattr(c, "patches")]
        segments = container.errorbar.lines[2][0].get_segments()
        deviations = [(segment[1][1] - segment[0][1]) / 2 for segment in segments]
        np.testing.assert_allclose(deviations, [2**0.5, 2**0.5, 0.0, 0.0])

    def test_one_model(self):
        """There is nothing to compare, and no error."""
        commands = self.commands()[:1]
        _, _, right = self.panels(commands, {"MNIST_HVAE_Ladder": np.array(self.LADDER)})
        self.assertEqual(bars(right), {})

    def test_no_seed_in_common(self):
        commands = self.commands()
        commands[1].rows[0]["seed"] = 3
        _, _, right = self.panels(commands)
        self.assertEqual(bars(right), {})

    def test_models_that_diverged(self):
        """The others keep their colours."""
        commands = [
            command_with("MNIST_HVAE_Ladder.py", {}, [{"seed": 1}]),
            self.commands()[1],
            deep_model("MNIST_HVAE_DCT.py", {1: (19.0, 10.0, 2.0)}),
        ]
        left, _, right = self.panels(commands, {"MNIST_HVAE_DVP seed 1": np.array(self.DVP[0])})
        self.assertEqual([line.get_color() for line in left.get_lines()], ["C1"])
        self.assertEqual(bars(right), {"MNIST_HVAE_DCT": [4.0, 0.0, 0.0, 4.0]})
        figures.test_curves(self.folder / "none.png", commands[:1], {})
        self.assertFalse((self.folder / "none.png").exists())

    def test_short_and_flat_curves(self):
        """A training of one epoch, and one that changes nothing."""
        for curve in ([-3.0], [-3.0] * 5):
            left, _, _ = self.panels(self.commands(), {"MNIST_HVAE_Ladder seed 1": np.array(curve)})
            self.assertLess(left.get_ylim()[0], -3.0)
            self.assertGreater(left.get_ylim()[1], -3.0)

    def test_saved_arrays_draw_the_same(self):
        self.check_saved_arrays_draw_the_same(figures.test_curves, self.commands(), self.arrays())


# ------------------------------------------------------------------------ the threshold of collapse

class AroundThreshold(Drawn):
    """Both models at two betas below the threshold of 10 and one above it, from both sides."""

    def command(self, linear, beta_warmup=0.0, kls=(4.0, 1.0, 0.0), gain=2.0):
        """Two seeds whose KLs are 1 nat and 3 nats above or below kls, unless these are 0."""
        rows = []
        for beta, kl in zip((2.0, 5.0, 20.0), kls):
            for seed in (1, 2):
                rows.append({
                    "beta": beta, "seed": seed, "linear": linear, "beta_warmup": beta_warmup,
                    "elbo": -1.0, "kl": kl * seed / 1.5, "AU_kl": 3 * seed if kl else 0,
                    "collapse_threshold": 10.0, "collapsed_loss": 200.0,
                    "collapsed_headroom": 1.0 if kl else 0.0,
                    # Next to collapse, the draws of z can lift the loss above the collapsed one.
                    "last epoch loss": 200.0 - gain * seed if kl else 200.1,
                })
        line = f"MNIST_VAE_Bernoulli.py --linear {linear} --beta_warmup {beta_warmup}"
        return command_with(line, {"beta": [2.0, 5.0, 20.0]}, rows)

    def commands(self):
        return [
            self.command(linear=False),
            self.command(linear=False, beta_warmup=8.0, kls=(3.0, 2.0, 0.0)),
            self.command(linear=True, gain=4.0),
            self.command(linear=True, beta_warmup=8.0),
        ]

    def panels(self, commands):
        """The three panels, which are also drawn into a file without a warning."""
        self.picture(figures.around_threshold, commands, {})
        [axes] = axes_of(figures.around_threshold, commands)
        return axes

    def check_points(self, line, points):
        np.testing.assert_allclose(line, points)

    def test_kl_and_units(self):
        """Means over the seeds, the same colour for a model from both sides."""
        kl, units, _ = self.panels(self.commands())
        names = [
            "ReLU model that starts next to collapse", "ReLU model after a rise of β",
            "linear model that starts next to collapse", "linear model after a rise of β",
        ]
        for ax in (kl, units):
            self.assertEqual(list(lines(ax)), [*names, "ρ1 = 10.00"])
            colors = [line.get_color() for line in ax.get_lines()]
            self.assertEqual(colors[:4], ["C0", "C0", "C1", "C1"])
            styles = [line.get_linestyle() for line in ax.get_lines()]
            self.assertEqual(styles[:4], ["-", "--", "-", "--"])
        self.check_points(lines(kl)[names[0]], [(2, 4), (5, 1), (20, 0)])
        self.check_points(lines(kl)[names[1]], [(2, 3), (5, 2), (20, 0)])
        self.check_points(lines(units)[names[3]], [(2, 4.5), (5, 4.5), (20, 0)])

    def test_threshold(self):
        for ax in self.panels(self.commands()):
            self.assertEqual([x for x, _ in lines(ax)["ρ1 = 10.00"]], [10.0, 10.0])

    def test_gains(self):
        """The gain of the models that start next to collapse, and the guaranteed one, once."""
        _, _, gain = self.panels(self.commands())
        names = ["ReLU model, trained", "linear model, trained", "guaranteed at the optimum"]
        self.assertEqual(list(lines(gain)), [*names, "ρ1 = 10.00"])
        # Gains of 2 and 4 nats, and of 4 and 8 nats.
        self.check_points(lines(gain)[names[0]], [(2, 3), (5, 3), (20, -0.1)])
        self.check_points(lines(gain)[names[1]], [(2, 6), (5, 6), (20, -0.1)])
        self.check_points(lines(gain)[names[2]], [(2, 1), (5, 1), (20, 0)])
        self.assertEqual([line.get_color() for line in gain.get_lines()][:2], ["C0", "C1"])

    def test_one_model(self):
        """The linear model keeps its colour. After a rise of beta alone there are no gains."""
        kl, _, gain = self.panels([self.command(linear=True)])
        self.assertEqual(kl.get_lines()[0].get_color(), "C1")
        self.assertEqual(gain.get_lines()[0].get_color(), "C1")
        self.assertIn("guaranteed at the optimum", lines(gain))
        kl, _, gain = self.panels([self.command(linear=False, beta_warmup=8.0)])
        self.assertEqual(len(lines(kl)), 2)
        self.assertEqual(list(lines(gain)), ["ρ1 = 10.00"])

    def test_everything_is_collapsed(self):
        """No value is positive, so that the logarithmic axes have nothing to show but the line."""
        kl, units, gain = self.panels([self.command(linear=False, kls=(0.0, 0.0, 0.0))])
        for ax in (kl, gain):
            lowest, highest = ax.get_ylim()
            self.assertGreater(lowest, 0)
            self.assertGreater(highest, lowest)

    def test_a_command_that_diverged(self):
        """The others are drawn. A setting that diverged has no point."""
        commands = self.commands()
        for row in commands[0].rows:
            del row["elbo"], row["collapse_threshold"]
        for row in commands[2].rows[:2]:
            del row["elbo"]
        kl, _, gain = self.panels(commands)
        self.assertEqual(len(lines(kl)), 4)
        self.assertEqual(kl.get_lines()[1].get_color(), "C1")
        self.check_points(lines(gain)["linear model, trained"], [(5, 6), (20, -0.1)])
        self.assertNotIn("ReLU model, trained", lines(gain))

    def test_all_diverged(self):
        command = self.command(linear=False)
        for row in command.rows:
            del row["elbo"]
        figures.around_threshold(self.folder / "x.png", [command], {})
        self.assertFalse((self.folder / "x.png").exists())


# -------------------------------------------------------------------------- prediction and training

class AgainstPrediction(Drawn):
    def test_panels(self):
        """One for each script and level with at least three settings, and colours for flags."""
        pairs = [(1.0, 1.5), (2.0, 2.5), (3.0, 2.0)]
        commands = [
            predicted_sweep(pairs, line="x.py --a"),
            predicted_sweep([(5.0, 6.0)], line="x.py --b"),
            predicted_sweep(pairs[:2], line="y.py"),
            predicted_sweep(pairs, "kl_2", "z.py"),
        ]
        commands[1].flags = {}
        panels = figures.prediction_panels(commands)
        self.assertEqual(list(panels), ["x", "z, z2"])
        np.testing.assert_array_equal(panels["x"]["beta"], pairs)
        np.testing.assert_array_equal(panels["x"][""], [(5.0, 6.0)])
        self.picture(figures.against_prediction, commands, {})
        legend = axes_of(figures.against_prediction, commands).flat[0].get_legend()
        self.assertEqual([text.get_text() for text in legend.get_texts()], ["beta", "none"])

    def test_equal_axes_hold_all_points(self):
        commands = [predicted_sweep([(1.0, 9.0), (2.0, 2.5), (-3.0, 2.0)], line="x.py")]
        ax = axes_of(figures.against_prediction, commands).flat[0]
        self.assertEqual(ax.get_xlim(), ax.get_ylim())
        self.assertLess(ax.get_xlim()[0], -3.0)
        self.assertGreater(ax.get_xlim()[1], 9.0)

    def test_too_few_settings(self):
        """No script has three settings, so there may be no picture, but no error either."""
        path = self.folder / "x.png"
        figures.against_prediction(path, [predicted_sweep([(1.0, 1.0)])], {})


class Scales(unittest.TestCase):
    def test_share_y(self):
        axes = Figure().subplots(1, 2)
        axes[0].set(ylim=(0, 3))
        axes[1].set(ylim=(-1, 2))
        figures.share_y(axes)
        self.assertEqual([ax.get_ylim() for ax in axes], [(-1, 3), (-1, 3)])


if __name__ == "__main__":
    unittest.main()
