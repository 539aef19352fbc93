"""measurements.py: rows of .csv files, and statistics of them that are worked out by hand."""
import unittest

import numpy as np

import measurements
from tests import small

# The columns that every row has beside its flags and metrics.
DESCRIPTION = {"dataset": "mnist", "device": "cpu", "torch": "2.0", "seconds": 60.0}


def command_with(line, flags, rows):
    """A measurements.Command with made-up rows, each {column: value}.

    flags is {name: values}. A row without "seed" has seed 1.
    """
    return measurements.Command(
        line=line,
        flags=flags,
        rows=[{"command": line, **DESCRIPTION, "seed": 1, **row} for row in rows],
    )


def sweep(metric, values, line="MNIST_CVAE_Relu.py", flag="beta"):
    """A Command whose flag takes the values 1.0, 2.0, ... with these values of a metric.

    A setting whose value is None diverged.
    """
    settings = [float(k) for k in range(1, 1 + len(values))]
    rows = []
    for setting, value in zip(settings, values):
        measured = {} if value is None else {"elbo": -1.0, metric: value}
        rows.append({flag: setting, **measured})
    return command_with(line, {flag: settings}, rows)


class Reading(small.InFolder):
    def test_parse(self):
        for text, value in (
            ("3", 3),
            ("-2", -2),
            ("3.0", 3.0),
            ("1e-05", 0.00001),
            ("inf", np.inf),
            ("True", True),
            ("False", False),
            ("Random", "Random"),
            ("2,2", "2,2"),
            ("10 -> 10, 3 -> 4", "10 -> 10, 3 -> 4"),
        ):
            parsed = measurements.parse(text)
            self.assertEqual(parsed, value)
            self.assertIs(type(parsed), type(value), text)

    def test_rows(self):
        """Empty cells are left out. A quoted cell may hold commas."""
        path = self.folder / "x.csv"
        path.write_text(
            "command,beta,seed,elbo,headroom\n"
            '"x.py --beta 1,2",1.0,3,-2.5,\n'
            '"x.py --beta 1,2",2.0,3,,\n',
            encoding="utf-8",
        )
        self.assertEqual(measurements.read_rows(path), [
            {"command": "x.py --beta 1,2", "beta": 1.0, "seed": 3, "elbo": -2.5},
            {"command": "x.py --beta 1,2", "beta": 2.0, "seed": 3},
        ])

    def test_no_file_and_no_rows(self):
        self.assertEqual(measurements.read_rows(self.folder / "x.csv"), [])
        (self.folder / "x.csv").write_text("command,beta\n", encoding="utf-8")
        self.assertEqual(measurements.read_rows(self.folder / "x.csv"), [])


class Settings(unittest.TestCase):
    def test_order_and_seeds(self):
        """The order is that of the flag's values. The rows of a setting are those of its seeds."""
        command = command_with("x.py", {"beta": [2.0, 0.5, 1.0]}, [
            {"beta": 0.5, "seed": 1, "elbo": -1.0},
            {"beta": 1.0, "seed": 1, "elbo": -2.0},
            {"beta": 2.0, "seed": 1, "elbo": -3.0},
            {"beta": 0.5, "seed": 2, "elbo": -4.0},
            {"beta": 1.0, "seed": 2, "elbo": -5.0},
            {"beta": 2.0, "seed": 2, "elbo": -6.0},
        ])
        elbos = []
        for values, rows in command.by_setting().items():
            elbos.append((values, [row["elbo"] for row in rows]))
        self.assertEqual(elbos, [
            ((2.0,), [-3.0, -6.0]), ((0.5,), [-1.0, -4.0]), ((1.0,), [-2.0, -5.0]),
        ])

    def test_two_flags(self):
        """The first flag varies slowest."""
        flags = {"beta_1": [1.0, 2.0], "corr_type": ["Random", "Identical"]}
        rows = []
        for corr_type in ("Identical", "Random"):
            for beta_1 in (2.0, 1.0):
                rows.append({"beta_1": beta_1, "corr_type": corr_type, "elbo": 0.0})
        command = command_with("x.py", flags, rows)
        self.assertEqual(list(command.by_setting()), [
            (1.0, "Random"), (1.0, "Identical"), (2.0, "Random"), (2.0, "Identical"),
        ])
        self.assertEqual(command.label((1.0, "Random")), "beta_1 = 1.0, corr_type = Random")

    def test_seeds_and_settings_that_diverged(self):
        command = command_with("x.py", {"lr": [0.1, 10.0]}, [
            {"lr": 0.1, "seed": 1},
            {"lr": 0.1, "seed": 2, "elbo": -1.0},
            {"lr": 10.0, "seed": 1},
            {"lr": 10.0, "seed": 2},
        ])
        settings = command.by_setting()
        self.assertEqual(list(settings), [(0.1,)])
        self.assertEqual([row["seed"] for row in settings[0.1,]], [2])

    def test_a_check_of_a_theorem_is_finished(self):
        command = command_with("matrix_VAE.py", {}, [{"max error": 1e-9}])
        self.assertEqual(list(command.by_setting()), [()])
        self.assertEqual(command.label(()), "")

    def test_line(self):
        command = command_with("MNIST_CVAE_Relu.py --beta 1 --released_objective", {}, [])
        self.assertEqual(command.script, "MNIST_CVAE_Relu")
        self.assertTrue(command.is_released)
        self.assertFalse(command_with("MNIST_CVAE_Relu.py --beta 1", {}, []).is_released)

    def test_written_flags(self):
        """A flag without a value, such as --released_objective, has none."""
        command = command_with("x.py --beta 1,2 --released_objective --prior vamp", {}, [])
        self.assertEqual(command.written_flags(), {"beta": "1,2", "prior": "vamp"})
        self.assertEqual(command_with("x.py", {}, []).written_flags(), {})

    def test_what_distinguishes_a_command(self):
        """The flags on its line that other commands of the script lack or have otherwise."""
        plain = command_with("x.py --preset small", {}, [])
        vamp = command_with("x.py --preset small --prior vamp", {}, [])
        large = command_with("x.py --preset large", {}, [])
        other_script = command_with("y.py --preset large", {}, [])
        commands = [plain, vamp, other_script]
        self.assertEqual(measurements.own_flags(plain, commands), [])
        self.assertEqual(measurements.own_flags(vamp, commands), ["prior = vamp"])
        self.assertEqual(measurements.own_flags(other_script, commands), [])
        commands.append(large)
        self.assertEqual(measurements.own_flags(plain, commands), ["preset = small"])
        self.assertEqual(
            measurements.own_flags(vamp, commands), ["preset = small", "prior = vamp"]
        )
        varying = command_with("x.py --beta 1,2", {"beta": [1.0, 2.0]}, [])
        self.assertEqual(measurements.own_flags(varying, [varying, plain]), [])


class Shared(unittest.TestCase):
    """What two commands share counts once."""

    def setUp(self):
        """Both commands have beta = 1 and eta_dec = 1, with two seeds. The times differ."""
        by_beta = []
        by_eta = []
        for seed in (1, 2):
            for value in (1.0, 2.0):
                by_beta.append({"beta": value, "eta_dec": 1.0, "seed": seed, "elbo": -value})
                row = {"beta": 1.0, "eta_dec": value, "seed": seed, "elbo": -value}
                by_eta.append({**row, "seconds": 99.0, "device": "cuda", "torch": "3.0"})
        self.commands = [
            command_with("x.py --beta 1,2", {"beta": [1.0, 2.0]}, by_beta),
            command_with("x.py --eta_dec 1,2", {"eta_dec": [1.0, 2.0]}, by_eta),
        ]

    def test_rows(self):
        """Four rows each, two of which are the same."""
        self.assertEqual(len(measurements.distinct_rows(self.commands)), 6)

    def test_settings(self):
        settings = measurements.distinct_settings(self.commands)
        self.assertEqual(len(settings), 3)
        self.assertEqual([len(rows) for rows in settings], [2, 2, 2])

    def test_other_scripts_and_seeds_are_not_the_same(self):
        rows = [{"beta": 1.0, "elbo": -1.0}]
        commands = [command_with("x.py", {}, rows), command_with("y.py", {}, rows)]
        self.assertEqual(len(measurements.distinct_rows(commands)), 2)
        self.assertEqual(len(measurements.distinct_settings(commands)), 2)
        rows = [{"beta": 1.0, "elbo": -1.0, "seed": seed} for seed in (1, 2)]
        command = command_with("x.py", {}, rows)
        self.assertEqual(len(measurements.distinct_rows([command])), 2)

    def test_other_data_are_not_the_same(self):
        rows = [{"elbo": -1.0, "dataset": name} for name in ("mnist", "fashion")]
        commands = [command_with("x.py", {}, [row]) for row in rows]
        self.assertEqual(len(measurements.distinct_rows(commands)), 2)
        self.assertEqual(len(measurements.distinct_settings(commands)), 2)

    def test_a_shared_setting_with_other_seeds(self):
        """It counts once with the seeds of both commands, whichever of them comes first."""
        by_beta, by_eta = self.commands
        by_eta.rows = [row for row in by_eta.rows if row["seed"] == 2]
        for commands in ([by_beta, by_eta], [by_eta, by_beta]):
            settings = measurements.distinct_settings(commands)
            self.assertEqual(len(settings), 3)
            shared = [rows for rows in settings if rows[0]["elbo"] == -1.0]
            self.assertEqual([sorted(row["seed"] for row in rows) for rows in shared], [[1, 2]])

    def test_numbers_of_seeds(self):
        """They are those of the settings. Seeds that diverged count."""
        self.assertEqual(measurements.seed_counts(self.commands), [2])
        by_beta, by_eta = self.commands
        by_eta.rows = [row for row in by_eta.rows if row["seed"] == 2]
        self.assertEqual(measurements.seed_counts(self.commands), [1, 2])
        self.assertEqual(measurements.seed_counts([by_eta]), [1])
        by_eta.rows.append({"eta_dec": 2.0, "seed": 9})
        self.assertEqual(measurements.seed_counts([by_eta]), [1, 2])
        self.assertEqual(measurements.seed_counts([]), [])

    def test_rows_that_diverged(self):
        """A row counts, but it is no setting with results."""
        command = sweep("kl", [None, 3.0])
        self.assertEqual(len(measurements.distinct_rows([command])), 2)
        self.assertEqual(len(measurements.distinct_settings([command])), 1)


class Directions(unittest.TestCase):
    def counts(self, command):
        """{(flag, metric, direction): (agreeing, unchanged, all steps)}"""
        counts = {}
        for step in measurements.steps_of(command):
            counts[step.flag, step.metric, step.direction] = (
                step.agreeing, step.unchanged, step.total
            )
        return counts

    def test_one_flag(self):
        """It falls, then hardly changes, then grows."""
        self.assertEqual(
            self.counts(sweep("kl", [4.0, 3.0, 3.004, 3.2])), {("beta", "kl", "falls"): (1, 1, 3)}
        )

    def test_unchanged(self):
        """Changes by 0.0049 nats are none, in either direction. Changes by 0.0051 nats are."""
        self.assertEqual(
            self.counts(sweep("kl", [1.0, 1.0049, 1.01])), {("beta", "kl", "falls"): (0, 1, 2)}
        )
        rising = sweep("kl_2", [1.0, 0.9951, 1.0002], flag="beta_1")
        self.assertEqual(self.counts(rising), {("beta_1", "kl_2", "rises"): (1, 1, 2)})

    def test_no_step_to_a_setting_that_diverged(self):
        self.assertEqual(
            self.counts(sweep("kl", [4.0, None, 5.0, 1.0])), {("beta", "kl", "falls"): (1, 0, 1)}
        )
        self.assertEqual(self.counts(sweep("kl", [4.0, None])), {})

    def test_means_over_the_seeds(self):
        """The mean falls from 3 to 2.5, although it rises for seed 2."""
        rows = []
        for beta, seed, kl in ((1.0, 1, 4.0), (1.0, 2, 2.0), (2.0, 1, 1.0), (2.0, 2, 4.0)):
            rows.append({"beta": beta, "seed": seed, "elbo": 0.0, "kl": kl})
        command = command_with("x.py", {"beta": [1.0, 2.0]}, rows)
        self.assertEqual(self.counts(command), {("beta", "kl", "falls"): (1, 0, 1)})

    def test_the_order_of_the_flag_counts(self):
        """The flag's values are in the order of the command, from Identical to Random."""
        rows = []
        for corr_type, kl in (("Random", 9.0), ("Gaussian_noise_1_2", 5.0), ("Identical", 0.0)):
            rows.append({"corr_type": corr_type, "elbo": 0.0, "kl": kl})
        flags = {"corr_type": ["Identical", "Gaussian_noise_1_2", "Random"]}
        command = command_with("x.py", flags, rows)
        self.assertEqual(self.counts(command), {("corr_type", "kl", "rises"): (2, 0, 2)})

    def test_two_flags(self):
        """A step changes one flag. A row for each beta_1, a column for each beta_2."""
        kl_2 = [
            [5.0, 3.0],
            [6.0, 7.0],
            [4.0, 8.0],
        ]
        rows = []
        for beta_1, values in zip((1.0, 2.0, 4.0), kl_2):
            for beta_2, value in zip((1.0, 2.0), values):
                rows.append({"beta_1": beta_1, "beta_2": beta_2, "elbo": 0.0, "kl_2": value})
        flags = {"beta_1": [1.0, 2.0, 4.0], "beta_2": [1.0, 2.0]}
        command = command_with("MNIST_HVAE_Relu.py", flags, rows)
        # Along beta_1: 5, 6, 4 and 3, 7, 8. Along beta_2: 5, 3 and 6, 7 and 4, 8.
        self.assertEqual(self.counts(command), {
            ("beta_1", "kl_2", "rises"): (3, 0, 4), ("beta_2", "kl_2", "falls"): (1, 0, 3),
        })

    def test_eta_dec(self):
        """It has the KL of a one-level model, and the KL of z2 of a hierarchical one."""
        self.assertEqual(
            self.counts(sweep("kl", [2.0, 1.0], flag="eta_dec")),
            {("eta_dec", "kl", "falls"): (1, 0, 1)},
        )
        rows = [
            {"eta_dec": 1.0, "elbo": 0.0, "kl_1": 1.0, "kl_2": 1.0},
            {"eta_dec": 2.0, "elbo": 0.0, "kl_1": 0.0, "kl_2": 3.0},
        ]
        command = command_with("x.py", {"eta_dec": [1.0, 2.0]}, rows)
        self.assertEqual(self.counts(command), {("eta_dec", "kl_2", "falls"): (0, 0, 1)})

    def test_a_flag_of_which_the_paper_says_nothing(self):
        self.assertEqual(self.counts(sweep("kl", [4.0, 3.0], flag="d_hidden")), {})


def predicted_sweep(pairs, metric="kl", line="MNIST_CVAE_Relu.py"):
    """A sweep over beta with pairs of the predicted and the trained value of a metric."""
    rows = []
    for k, (predicted, trained) in enumerate(pairs):
        rows.append({
            "beta": float(k), "elbo": 0.0, f"linear {metric}": predicted, metric: trained,
        })
    return command_with(line, {"beta": [float(k) for k in range(len(pairs))]}, rows)


class Predictions(unittest.TestCase):
    def test_points(self):
        """The means over the seeds. A setting of two commands counts once."""
        rows = []
        for beta, seed, predicted, trained in (
            (1.0, 1, 5.0, 4.0), (1.0, 2, 5.0, 3.0), (2.0, 1, 2.0, 1.0), (2.0, 2, 4.0, 1.0),
        ):
            rows.append({
                "beta": beta, "seed": seed, "elbo": 0.0, "linear kl": predicted, "kl": trained,
            })
        command = command_with("x.py --beta 1,2", {"beta": [1.0, 2.0]}, rows)
        other = command_with("x.py --beta 1", {}, [row for row in rows if row["beta"] == 1.0])
        points = measurements.predicted_and_trained([command, other], "kl")
        np.testing.assert_array_equal(points, [[5.0, 3.5], [3.0, 1.0]])

    def test_settings_without_a_prediction(self):
        points = measurements.predicted_and_trained([sweep("kl", [1.0, 2.0])], "kl")
        self.assertEqual(points.shape, (0, 2))

    def test_rank_correlations(self):
        """Spearman's: with n ranks it is 1 - 6 (sum of squared differences) / (n (n^2 - 1))."""
        for trained, correlation in (
            ([0.1, 0.2, 0.3], 1.0),
            # The differences of the ranks are 0, 1 and 1: 1 - 6 * 2 / 24.
            ([0.1, 0.3, 0.2], 0.5),
            ([0.3, 0.2, 0.1], -1.0),
        ):
            command = predicted_sweep(list(zip([1.0, 2.0, 30.0], trained)))
            correlations = measurements.rank_correlations([command])
            self.assertEqual(list(correlations), ["kl"])
            self.assertAlmostEqual(correlations["kl"], correlation)

    def test_of_the_means_over_the_seeds(self):
        """The ranks are 2, 1, 3 for one seed and 1, 3, 2 for the other. The means are 1, 2, 3."""
        rows = []
        for beta, predicted, by_seed in (
            (1.0, 1.0, (2.0, 0.0)), (2.0, 2.0, (1.0, 3.0)), (3.0, 3.0, (4.0, 2.0)),
        ):
            for seed, trained in enumerate(by_seed):
                rows.append({
                    "beta": beta, "seed": seed, "elbo": 0.0, "linear kl": predicted, "kl": trained,
                })
        command = command_with("x.py", {"beta": [1.0, 2.0, 3.0]}, rows)
        self.assertAlmostEqual(measurements.rank_correlations([command])["kl"], 1.0)

    def test_levels(self):
        rows = []
        for beta_2, kl_1, kl_2 in ((1.0, 1.0, 9.0), (2.0, 2.0, 5.0), (3.0, 3.0, 1.0)):
            rows.append({
                "beta_2": beta_2, "elbo": 0.0, "kl_1": kl_1, "kl_2": kl_2,
                "linear kl_1": beta_2, "linear kl_2": beta_2,
            })
        command = command_with("x.py", {"beta_2": [1.0, 2.0, 3.0]}, rows)
        correlations = measurements.rank_correlations([command])
        self.assertEqual(list(correlations), ["kl_1", "kl_2"])
        self.assertAlmostEqual(correlations["kl_1"], 1.0)
        self.assertAlmostEqual(correlations["kl_2"], -1.0)

    def test_too_few_settings_and_equal_values(self):
        few = predicted_sweep([(1.0, 2.0), (2.0, 3.0)])
        equal = predicted_sweep([(1.0, 2.0), (1.0, 3.0), (1.0, 4.0)])
        for command in (few, equal):
            self.assertEqual(measurements.rank_correlations([command]), {})


class CausesOfCollapse(unittest.TestCase):
    def causes(self, *commands):
        return measurements.causes_of_collapse(commands)

    def command(self, rows, line="MNIST_CVAE_Relu.py"):
        rows = [{"elbo": -float(k), **row} for k, row in enumerate(rows)]
        return command_with(line, {}, rows)

    def test_one_level(self):
        causes = self.causes(self.command([
            {"dim_z": 16, "AU_kl": 16, "headroom": 0.0},
            # At most 0.01 nats are the objective's.
            {"dim_z": 16, "AU_kl": 13, "headroom": 0.01},
            {"dim_z": 16, "AU_kl": 0, "headroom": 0.0},
            {"dim_z": 16, "AU_kl": 13, "headroom": 0.02},
            {"dim_z": 16, "AU_kl": 0, "headroom": 0.5},
            {"dim_z": 16, "AU_kl": 1, "headroom": 0.3},
        ]))
        self.assertEqual((causes.levels, causes.by_objective, causes.by_training), (6, 2, 3))

    def test_level_2_of_a_hierarchical_model(self):
        """z1 has no headroom, so its collapsed units do not count."""
        causes = self.causes(self.command([
            {"d_1": 4, "d_2": 8, "AU_kl_1": 0, "AU_kl_2": 8, "headroom_2": 0.0},
            {"d_1": 4, "d_2": 8, "AU_kl_1": 4, "AU_kl_2": 4, "headroom_2": 0.0},
            {"d_1": 4, "d_2": 8, "AU_kl_1": 4, "AU_kl_2": 4, "headroom_2": 1.0},
        ]))
        self.assertEqual((causes.levels, causes.by_objective, causes.by_training), (3, 1, 1))

    def test_units_of_a_vae(self):
        """Its flag is d_1."""
        causes = self.causes(self.command([
            {"d_1": 5, "AU_kl": 5, "headroom": 0.0}, {"d_1": 5, "AU_kl": 4, "headroom": 0.0},
        ]))
        self.assertEqual((causes.levels, causes.by_objective, causes.by_training), (2, 1, 0))

    def test_rows_that_do_not_count(self):
        """A row without a headroom, a row that diverged, and the second one of a shared row."""
        rows = [{"dim_z": 16, "AU_kl": 0, "headroom": 0.0}]
        diverged = command_with("MNIST_CVAE_Relu.py", {}, [{"dim_z": 16}])
        without_headroom = self.command([{"dim_z": 16, "AU_kl": 0}], "y.py")
        causes = self.causes(
            self.command(rows, "x.py --a"), self.command(rows, "x.py"), diverged, without_headroom
        )
        self.assertEqual((causes.levels, causes.by_objective, causes.by_training), (1, 1, 0))

    def test_other_causes(self):
        """Only a richer encoder could use the units, or collapse is unstable."""
        rows = []
        for cause in ("none", "objective", "training", "training", "encoder", "unstable", "none"):
            rows.append({"dim_z": 16, "AU_kl": 0, "headroom": 0.0, "cause": cause})
        causes = self.causes(self.command(rows))
        self.assertEqual(
            (causes.levels, causes.by_objective, causes.by_training, causes.other),
            (7, 1, 2, 2),
        )
        self.assertEqual(causes.collapsed, 5)

    def test_many_levels(self):
        causes = self.causes(self.command([
            {"cause from the top": "none, training, objective"},
            {"cause from the top": "encoder, unstable, training"},
            {"cause from the top": "objective"},
        ]))
        self.assertEqual(
            (causes.levels, causes.by_objective, causes.by_training, causes.other),
            (7, 2, 2, 2),
        )

    def test_no_causes(self):
        causes = measurements.causes_of_collapse([])
        self.assertEqual((causes.levels, causes.collapsed), (0, 0))


class CausesOfRow(unittest.TestCase):
    def test_with_causes(self):
        """The headroom does not count where the row has a cause."""
        row = {"dim_z": 16, "AU_kl": 0, "headroom": 0.0, "headroom_any": 0.5, "cause": "encoder"}
        self.assertEqual(measurements.causes_of_row(row), {"": "encoder"})
        row = {"d_1": 4, "d_2": 8, "AU_kl_2": 0, "headroom_2": 1.0, "cause_2": "objective"}
        self.assertEqual(measurements.causes_of_row(row), {"_2": "objective"})

    def test_of_an_earlier_version(self):
        """Without a cause it is that of the headroom with a linear encoder."""
        row = {"dim_z": 16, "AU_kl": 0, "headroom": 0.01}
        self.assertEqual(measurements.causes_of_row(row), {"": "objective"})
        self.assertEqual(measurements.causes_of_row(row | {"headroom": 0.011}), {"": "training"})
        self.assertEqual(measurements.causes_of_row(row | {"AU_kl": 16}), {"": "none"})
        row = {"d_1": 4, "d_2": 8, "AU_kl_1": 0, "AU_kl_2": 8, "headroom_2": 0.0}
        self.assertEqual(measurements.causes_of_row(row), {"_2": "none"})

    def test_levels_from_the_top(self):
        """Level 1 is next to the image. Two levels have columns of their own."""
        row = {"cause from the top": "training, none, encoder", "AU_kl from the top": "49, 0, 7, 3"}
        causes = measurements.causes_of_row(row)
        self.assertEqual(
            list(causes.items()), [("_3", "training"), ("_2", "none"), ("_1", "encoder")]
        )
        row = {
            "headroom_1": 0.0, "headroom_2": 0.0, "cause_1": "objective", "cause_2": "unstable",
        }
        causes = measurements.causes_of_row(row)
        self.assertEqual(list(causes.items()), [("_2", "unstable"), ("_1", "objective")])

    def test_without_a_headroom(self):
        """A fixed variance, a setting that diverged, and a deep model of an earlier version."""
        for row in (
            {"d_1": 5, "AU_kl": 0, "elbo": -1.0},
            {"d_1": 5},
            {"AU_kl from the top": "49, 0, 45", "elbo": -1.0},
        ):
            self.assertEqual(measurements.causes_of_row(row), {})


def deep_model(line, seeds, context=True, log_px=True):
    """A command of a deep model with one setting.

    seeds is {seed: (reconstruction, KL of the context, KL of the learned levels)}, in nats. The
    model has two learned levels, with a quarter and three quarters of their KL. Without a context
    its KL is left out. log p(x) is 1 nat above the ELBO.
    """
    rows = []
    for seed, (reconstruction, context_kl, learned) in seeds.items():
        kls = [context_kl] if context else []
        kls += [learned / 4, 3 * learned / 4]
        row = {
            "seed": seed, "reconstruction": reconstruction, "kl": sum(kls),
            "elbo": -reconstruction - sum(kls),
            "kl from the top": ", ".join(f"{kl:.2f}" for kl in kls),
            "AU_kl from the top": ", ".join(["9"] * len(kls)),
        }
        if log_px:
            row["log_px"] = row["elbo"] + 1
        if context:
            row["context_baseline"] = 50.0
        rows.append(row)
    return command_with(line, {}, rows)


class DeepModels(unittest.TestCase):
    def test_rise_at_the_end(self):
        """The curve of k² is at 11² in its last epoch, and at 1² ten epochs before."""
        self.assertEqual(measurements.LAST_EPOCHS, 10)
        self.assertEqual(measurements.rise_at_the_end([k**2 for k in range(12)]), 120)
        self.assertEqual(measurements.rise_at_the_end([5.0, *[9.0] * 9, 2.0]), -3.0)
        self.assertIsNone(measurements.rise_at_the_end([1.0] * 10))
        self.assertIsNone(measurements.rise_at_the_end([]))

    def test_terms_of_the_elbo(self):
        [row] = deep_model("x.py", {1: (20.0, 8.0, 4.0)}).rows
        terms = measurements.elbo_terms(row)
        self.assertEqual(terms, {
            "log_px": -31.0, "elbo": -32.0, "reconstruction": -20.0, "learned latents": -4.0,
            "context": -8.0,
        })
        self.assertEqual(sum(terms[name] for name in measurements.ELBO_TERMS), terms["elbo"])

    def test_terms_without_a_context(self):
        """The top level is a learned one."""
        [row] = deep_model("x.py", {1: (20.0, None, 4.0)}, context=False, log_px=False).rows
        self.assertEqual(measurements.elbo_terms(row), {
            "elbo": -24.0, "reconstruction": -20.0, "learned latents": -4.0, "context": 0.0,
        })

    def test_differences_by_seed(self):
        """Only seed 2 is there in both models. One of them has no log p(x)."""
        command = deep_model("x.py", {2: (10.0, 8.0, 4.0), 3: (99.0, 99.0, 99.0)}, log_px=False)
        other = deep_model("y.py", {1: (55.0, None, 5.0), 2: (12.0, None, 9.0)}, context=False)
        self.assertEqual(measurements.shared_seeds([command, other]), [2])
        self.assertEqual(measurements.elbo_differences(command, other), {
            "elbo": [-22.0 + 21.0], "reconstruction": [2.0], "learned latents": [5.0],
            "context": [-8.0],
        })

    def test_seeds_in_another_order(self):
        """Differences are between results of one seed: 10 - 11 and 20 - 22 in the first term."""
        command = deep_model("x.py", {1: (10.0, 0.0, 1.0), 2: (20.0, 0.0, 1.0)})
        other = deep_model("y.py", {2: (22.0, 0.0, 1.0), 1: (11.0, 0.0, 1.0)})
        differences = measurements.elbo_differences(command, other)
        self.assertEqual(differences["reconstruction"], [1.0, 2.0])

    def test_no_seed_in_common(self):
        """A seed that diverged is not there."""
        command = deep_model("x.py", {1: (10.0, 8.0, 4.0)})
        other = deep_model("y.py", {2: (10.0, 8.0, 4.0)})
        other.rows.append({"seed": 1})
        self.assertEqual(measurements.shared_seeds([command, other]), [])
        self.assertEqual(measurements.elbo_differences(command, other), {})

    def test_remark_on_the_seeds(self):
        few = deep_model("x.py", {1: (1.0, 1.0, 1.0)})
        many = deep_model("y.py", {seed: (1.0, 1.0, 1.0) for seed in (1, 2, 3)})
        self.assertEqual(measurements.only_seeds([1], [few, few]), "")
        self.assertEqual(measurements.only_seeds([1], [few, many]), " (only seed 1)")
        self.assertEqual(measurements.only_seeds([1, 3], [many]), " (only seeds 1 and 3)")


class Text(unittest.TestCase):
    def test_numbers_over_seeds(self):
        for values, text in (
            ([1.0], "1.00"),
            # The sample standard deviation of 1 and 3 is the square root of 2.
            ([1.0, 3.0], "2.00 ± 1.41"),
            # Their standard deviation is 0.0007, which would be printed as 0.00.
            ([1.0, 1.001], "1.00"),
            ([-2.0, -2.0, -2.0], "-2.00"),
        ):
            self.assertEqual(measurements.format_seeds(values), text)
        self.assertEqual(measurements.format_seeds([1.0, 1.001], 4), "1.0005 ± 0.0007")

    def test_counts_over_seeds(self):
        for values, text in (
            ([3], "3"),
            ([3, 3, 3], "3"),
            # The deviations from 3.5 are 1/2, so the variance is (1/4 + 1/4) / 1.
            ([3, 4], "3.5 ± 0.7"),
            ([0, 0], "0"),
        ):
            self.assertEqual(measurements.format_seeds(values), text)

    def test_changes_over_seeds(self):
        """The sign is that of the mean. Whole numbers are changes, too, not counts."""
        for values, text in (
            ([1.5], "+1.50"), ([-1.5], "-1.50"), ([0.0], "+0.00"), ([-0.001], "+0.00"),
            ([1.0, 3.0], "+2.00 ± 1.41"), ([3], "+3.00"),
        ):
            self.assertEqual(measurements.format_change(values), text)
        self.assertEqual(measurements.format_change([0.0625], 3), "+0.062")

    def test_deviation(self):
        self.assertEqual(measurements.deviation([4.0]), 0.0)
        self.assertAlmostEqual(measurements.deviation([1.0, 3.0]), 2**0.5)

    def test_seeds(self):
        self.assertEqual(measurements.seeds_as_text([2]), "seed 2")
        self.assertEqual(measurements.seeds_as_text([1, 3]), "seeds 1 and 3")

    def test_words(self):
        self.assertEqual(measurements.join_words([]), "")
        self.assertEqual(measurements.join_words(["a"]), "a")
        self.assertEqual(measurements.join_words(["a", "b"]), "a and b")
        self.assertEqual(measurements.join_words(name for name in "abc"), "a, b and c")
        self.assertEqual(measurements.plural(1, "seed"), "1 seed")
        self.assertEqual(measurements.plural(0, "seed"), "0 seeds")
        self.assertEqual(measurements.plural(2, "seed"), "2 seeds")

    def test_levels(self):
        one_level = {"elbo": 0, "kl_train": 1, "kl": 1, "linear kl": 1, "kl_start": 1}
        self.assertEqual(measurements.levels_of_row(one_level), [""])
        two_levels = {"kl_1": 1, "kl_1_train": 1, "kl_2": 1}
        self.assertEqual(measurements.levels_of_row(two_levels), ["_1", "_2"])
        self.assertEqual(measurements.levels_of_row({"kl from the top": "1, 2"}), [])

    def test_values_of_levels(self):
        """A cell with a single number was parsed as one. Counts are whole numbers."""
        self.assertEqual(measurements.values_of_levels("27.91, 0.01"), [27.91, 0.01])
        self.assertEqual(measurements.values_of_levels("none, training"), ["none", "training"])
        self.assertEqual(measurements.values_of_levels(2.5), [2.5])
        for cell in ("3, 0", 3):
            for count in measurements.values_of_levels(cell):
                self.assertIs(type(count), int)

    def test_mean_of_levels(self):
        rows = [{"kl from the top": "4.00, 1.50"}, {"kl from the top": "2.00, 0.50"}]
        np.testing.assert_array_equal(
            measurements.mean_of_levels(rows, "kl from the top"), [3.0, 1.0]
        )


if __name__ == "__main__":
    unittest.main()
