"""answers.py: what each answer says of made-up rows, as expected and when they contradict it."""
import unittest

import answers
import headroom
import measurements
from tests.test_measurements import command_with, deep_model, predicted_sweep, sweep


class FirstWords(unittest.TestCase):
    def test_yes_or_no(self):
        self.assertEqual(answers.yes_or_no(3, 3), "Yes.")
        self.assertEqual(answers.yes_or_no(2, 3), "Mostly.")
        # Half of the cases are not most of them.
        self.assertEqual(answers.yes_or_no(2, 4), "No.")
        self.assertEqual(answers.yes_or_no(0, 3), "No.")


class Directions(unittest.TestCase):
    def test_as_expected(self):
        commands = [sweep("kl", [3.0, 2.0, 1.0]), sweep("kl", [2.0, 1.0], flag="eta_dec")]
        self.assertEqual(
            answers.directions(commands),
            "Yes. Along β the KL falls in 2 of 2 steps. Along η_dec the KL falls in 1 of 1 step.",
        )

    def test_otherwise(self):
        rising = sweep("kl", [1.0, 2.0, 3.0])
        self.assertEqual(
            answers.directions([rising]), "No. Along β the KL falls in 0 of 2 steps."
        )
        once = sweep("kl", [3.0, 2.0, 1.0, 5.0])
        self.assertEqual(
            answers.directions([once]), "Mostly. Along β the KL falls in 2 of 3 steps."
        )

    def test_unchanged_steps(self):
        """A step that changes nothing does not speak for the paper."""
        self.assertEqual(
            answers.directions([sweep("kl", [0.0, 0.0, 0.0])]),
            "No. Along β the KL falls in 0 of 2 steps and stays in 2.",
        )
        self.assertEqual(
            answers.directions([sweep("kl", [3.0, 2.0, 0.0, 0.0])]),
            "Mostly. Along β the KL falls in 2 of 3 steps and stays in 1.",
        )

    def test_levels_and_objectives(self):
        """z2 is named. The released objective is not counted."""
        exact = sweep("kl_2", [1.0, 2.0], flag="beta_1")
        released = sweep("kl_2", [2.0, 1.0], "x.py --released_objective", flag="beta_1")
        self.assertEqual(
            answers.directions([exact, released]),
            "Yes. Along β1 the KL of z2 rises in 1 of 1 step.",
        )

    def test_seeds(self):
        """The mean over the seeds falls in both steps, although that of seed 2 rises in one."""
        command = sweep("kl_2", [6.0, 5.0, 4.0], flag="beta_2")
        for value, kl in zip((1.0, 2.0, 3.0), (3.0, 3.5, 3.0)):
            command.rows.append({**command.rows[0], "beta_2": value, "seed": 2, "kl_2": kl})
        self.assertEqual(
            answers.directions([command]), "Yes. Along β2 the KL of z2 falls in 2 of 2 steps."
        )

    def test_no_step(self):
        """All settings except one diverged, so nothing supports a yes."""
        self.assertFalse(answers.directions([sweep("kl", [3.0, None])]).startswith("Yes"))


def hierarchical(active, flag="beta_1"):
    """A sweep of an HVAE with these active units of z1 (of 4) and of z2 (of 8)."""
    settings = [float(k) for k in range(1, 1 + len(active))]
    rows = []
    for setting, (active_1, active_2) in zip(settings, active):
        rows.append({
            flag: setting, "elbo": 0.0, "kl_1": 1.0, "kl_2": 1.0, "d_1": 4, "d_2": 8,
            "AU_kl_1": active_1, "AU_kl_2": active_2,
        })
    return command_with("MNIST_HVAE_Relu.py", {flag: settings}, rows)


class LevelsInUse(unittest.TestCase):
    def test_two_levels(self):
        self.assertEqual(
            answers.levels_in_use([hierarchical([(4, 0), (4, 3), (4, 8)])]),
            "z1 keeps 4 of 4 units at every β1. z2 keeps 0 of 8 units at β1 = 1.0 and 8 at "
            "β1 = 3.0.",
        )

    def test_otherwise(self):
        self.assertEqual(
            answers.levels_in_use([hierarchical([(4, 8), (0, 8)], flag="beta_2")]),
            "z1 keeps 4 of 4 units at β2 = 1.0 and 0 at β2 = 2.0. z2 keeps 8 of 8 units at every "
            "β2.",
        )

    def test_one_level_and_seeds(self):
        """The mean over the seeds: 3 and 4 units, then 1 and 1."""
        rows = []
        for beta, seed, active in ((1.0, 1, 3), (1.0, 2, 4), (2.0, 1, 1), (2.0, 2, 1)):
            rows.append({
                "beta": beta, "seed": seed, "elbo": 0.0, "kl": 1.0, "dim_z": 16, "AU_kl": active,
            })
        command = command_with("x.py", {"beta": [1.0, 2.0]}, rows)
        self.assertEqual(
            answers.levels_in_use([command]),
            "z keeps 3.5 of 16 units at β = 1.0 and 1 at β = 2.0.",
        )

    def test_the_same_mean_at_every_setting(self):
        """15, 16 and 16 units are 15.67 on average."""
        rows = []
        for beta in (1.0, 2.0):
            for seed, active in ((1, 15), (2, 16), (3, 16)):
                rows.append({
                    "beta": beta, "seed": seed, "elbo": 0.0, "kl": 1.0, "dim_z": 16,
                    "AU_kl": active,
                })
        command = command_with("x.py", {"beta": [1.0, 2.0]}, rows)
        self.assertEqual(answers.levels_in_use([command]), "z keeps 15.7 of 16 units at every β.")

    def test_settings_that_diverged(self):
        """If the first one diverged, the second one is named. If all did, no count is named."""
        command = hierarchical([(4, 0), (4, 3), (4, 8)])
        command.rows[0] = {"beta_1": 1.0, "seed": 1}
        answer = answers.levels_in_use([command])
        self.assertIn("3 of 8 units at β1 = 2.0 and 8 at β1 = 3.0", answer)
        command.rows = [{"beta_1": 1.0, "seed": 1}]
        self.assertNotIn("units", answers.levels_in_use([command]))


def grid_of_betas(active):
    """A grid over beta_1 and beta_2, from {(beta_1, beta_2): active units of z2}."""
    flags = {
        "beta_1": sorted({beta_1 for beta_1, _ in active}),
        "beta_2": sorted({beta_2 for _, beta_2 in active}),
    }
    rows = []
    for (beta_1, beta_2), count in active.items():
        rows.append({
            "beta_1": beta_1, "beta_2": beta_2, "elbo": 0.0, "kl_2": float(count),
            "AU_kl_2": count,
        })
    return command_with("MNIST_HVAE_Relu.py", flags, rows)


class WhereZ2IsEmpty(unittest.TestCase):
    def answer(self, active):
        return answers.where_z2_is_empty([grid_of_betas(active)])

    def test_a_threshold(self):
        """The ratios are 1, 2, 1/2 and 1."""
        active = {(1.0, 1.0): 3, (1.0, 2.0): 0, (2.0, 1.0): 8, (2.0, 2.0): 1}
        self.assertEqual(
            self.answer(active),
            "All units of z2 are collapsed in 1 of 4 settings. In this grid, these are exactly the "
            "ones with β2 / β1 ≥ 2. The others have β2 / β1 ≤ 1.",
        )

    def test_no_threshold(self):
        """With the ratio 1, z2 is empty in one setting and in use in the other."""
        active = {(1.0, 1.0): 0, (1.0, 2.0): 0, (2.0, 1.0): 8, (2.0, 2.0): 1}
        answer = self.answer(active)
        self.assertIn("in 2 of 4 settings.", answer)
        self.assertNotIn("exactly", answer)
        self.assertIn("β2 / β1 < 1 ", answer)
        self.assertIn("β2 / β1 > 1 ", answer)

    def test_all_or_none(self):
        for count, empty in ((0, 2), (1, 0)):
            self.assertEqual(
                self.answer({(1.0, 1.0): count, (1.0, 2.0): count}),
                f"All units of z2 are collapsed in {empty} of 2 settings.",
            )

    def test_seeds(self):
        """z2 counts as empty only if it is empty for all seeds."""
        command = grid_of_betas({(1.0, 1.0): 0, (1.0, 2.0): 0})
        command.rows.append({**command.rows[1], "seed": 2, "AU_kl_2": 1})
        self.assertIn("in 1 of 2 settings.", answers.where_z2_is_empty([command]))


class OrderOfDigits(unittest.TestCase):
    def digits(self, trained, script="MNIST_CVAE_Relu_single_digit.py"):
        return predicted_sweep(list(zip([1.0, 2.0, 3.0], trained)), line=script)

    def test_as_expected_and_otherwise(self):
        answer = answers.order_of_digits([self.digits([4.0, 5.0, 6.0])])
        self.assertIn("1.00 (MNIST_CVAE_Relu_single_digit).", answer)
        answer = answers.order_of_digits([self.digits([6.0, 5.0, 4.0])])
        self.assertIn("-1.00 (MNIST_CVAE_Relu_single_digit).", answer)

    def test_two_scripts(self):
        commands = [self.digits([4.0, 5.0, 6.0]), self.digits([4.0, 6.0, 5.0], "x.py")]
        answer = answers.order_of_digits(commands)
        self.assertIn("1.00 (MNIST_CVAE_Relu_single_digit) and 0.50 (x).", answer)

    def test_no_correlation(self):
        """The KL of all digits is the same. The sentence must not end in "of"."""
        self.assertNotIn("of .", answers.order_of_digits([self.digits([4.0, 4.0, 4.0])]))


class LearnableAndFixed(unittest.TestCase):
    def command(self, script, by_kl, by_mean=None):
        """A command with these active units of 5, for each seed."""
        rows = []
        for seed, counts in enumerate(zip(by_kl, by_mean or by_kl)):
            row = {"seed": seed, "elbo": 0.0, "beta": 4.0, "d_1": 5}
            rows.append(row | dict(zip(("AU_kl", "AU"), counts)))
        return command_with(script, {}, rows)

    def test_a_pair(self):
        """The counts by KL and by mean, of both seeds."""
        answer = answers.learnable_and_fixed([
            self.command("MNIST_VAE_Relu_learnable_sigma.py", [3, 4], [2, 2]),
            self.command("MNIST_VAE_Relu_nonlearnable_sigma.py", [5, 5], [3, 3]),
        ])
        self.assertEqual(
            answer,
            "In 1 of 1 pair of models, a learnable variance leaves fewer units active with each "
            "seed, counted by their KL. Counted by their posterior means, it does so in 1.\n\n"
            "- The ReLU model with β = 4: by their KL, 3.5 ± 0.7 of 5 units are active with a "
            "learnable variance, and 5 with a fixed one. By their posterior means, 2 and 3 are.",
        )

    def test_fewer_units(self):
        """Seed by seed, once by KL and once by posterior mean. The seeds are 0, 1 and so on."""
        answer = answers.learnable_and_fixed([
            # Fewer by the KL. By the means as many with seed 1.
            self.command("MNIST_VAE_Relu_learnable_sigma.py", [1, 4], [3, 4]),
            self.command("MNIST_VAE_Relu_nonlearnable_sigma.py", [5, 5], [4, 4]),
            # By the KL more with seed 1. Fewer by the means, and the fixed one lacks seed 2.
            self.command("MNIST_VAE_Linear_learnable_sigma.py", [1, 4, 1], [1, 4, 9]),
            self.command("MNIST_VAE_Linear_nonlearnable_sigma.py", [3, 3], [3, 5]),
            self.command("MNIST_VAE_Linear_learnable_sigma.py", [1], [1]),
            self.command("MNIST_VAE_Linear_nonlearnable_sigma.py", [2], [2]),
        ])
        self.assertTrue(answer.startswith(
            "In 2 of 3 pairs of models, a learnable variance leaves fewer units active with each "
            "seed, counted by their KL. Counted by their posterior means, it does so in 2.\n\n"
            "- The ReLU model"
        ), answer)

    def test_no_seed_in_common(self):
        learnable = self.command("MNIST_VAE_Relu_learnable_sigma.py", [1])
        fixed = self.command("MNIST_VAE_Relu_nonlearnable_sigma.py", [5])
        self.assertTrue(answers.is_smaller_with_each_seed(learnable, fixed, "AU"))
        fixed.rows[0]["seed"] = 7
        self.assertFalse(answers.is_smaller_with_each_seed(learnable, fixed, "AU"))

    def test_a_command_without_rows(self):
        """The .csv file lacks one of the fixed ones. The others are still the right pair."""
        answer = answers.learnable_and_fixed([
            self.command("MNIST_VAE_Linear_learnable_sigma.py", [5]),
            self.command("MNIST_VAE_Linear_nonlearnable_sigma.py", []),
            self.command("MNIST_VAE_Relu_learnable_sigma.py", [1]),
            self.command("MNIST_VAE_Relu_nonlearnable_sigma.py", [3]),
        ])
        self.assertIn("The ReLU model with β = 4: by their KL, 1 of 5 units", answer)
        self.assertIn("In 1 of 1 pair of", answer)
        self.assertNotIn("linear model", answer)

    def test_all_seeds_diverged(self):
        commands = [
            self.command("MNIST_VAE_Linear_learnable_sigma.py", [2]),
            self.command("MNIST_VAE_Linear_nonlearnable_sigma.py", [2]),
        ]
        commands[0].rows = [{"seed": 1, "beta": 4.0, "d_1": 5}]
        self.assertEqual(
            answers.learnable_and_fixed(commands), "No pair of models is finished."
        )


class Prediction(unittest.TestCase):
    def test_range_over_scripts(self):
        """The linear model is left out, although its order is the worst."""
        commands = [
            predicted_sweep([(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)], line="a.py"),
            predicted_sweep([(1.0, 1.0), (2.0, 3.0), (3.0, 2.0)], line="b.py"),
            predicted_sweep([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)], line="MNIST_CVAE_Linear.py"),
        ]
        self.assertIn("0.50 to 1.00.", answers.prediction(commands))

    def test_otherwise(self):
        backwards = predicted_sweep([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)], line="a.py")
        self.assertIn("-1.00", answers.prediction([backwards]))

    def test_too_few(self):
        answer = answers.prediction([predicted_sweep([(1.0, 1.0)])])
        self.assertEqual(answer, "There are too few settings for a rank correlation.")


class OrderOfCollapse(unittest.TestCase):
    def test_steps_and_correlations(self):
        """Each sweep has its steps, and each of its levels has a correlation."""
        one_level = predicted_sweep([(9.0, 8.0), (5.0, 6.0), (1.0, 2.0)])
        rows = []
        for beta_2, kl_1, kl_2 in ((1.0, 1.0, 9.0), (2.0, 3.0, 1.0), (3.0, 2.0, 1.002)):
            rows.append({
                "beta_2": beta_2, "elbo": 0.0, "kl_1": kl_1, "kl_2": kl_2,
                "linear kl_1": beta_2, "linear kl_2": 10 - beta_2,
            })
        two_levels = command_with("MNIST_HVAE_Relu.py", {"beta_2": [1.0, 2.0, 3.0]}, rows)
        # In z1 the ranks 1, 3, 2 stand beside 1, 2, 3. The same holds for z2, from 3 to 1.
        self.assertEqual(
            answers.order_of_collapse([one_level, two_levels]),
            "The KL changes in the paper's direction in 3 of 4 steps and stays in 1. Within "
            "a sweep, the rank correlation of predicted and trained KL is 0.50 to 1.00.",
        )

    def test_one_correlation(self):
        backwards = predicted_sweep([(9.0, 1.0), (5.0, 2.0), (1.0, 3.0)])
        self.assertEqual(
            answers.order_of_collapse([backwards]),
            "The KL changes in the paper's direction in 0 of 2 steps. Within a sweep, the rank "
            "correlation of predicted and trained KL is -1.00.",
        )

    def test_each_sweep_has_its_own_order(self):
        """Together the two sweeps of a script would not be in the predicted order."""
        small = predicted_sweep([(1.0, 7.0), (2.0, 8.0), (3.0, 9.0)], line="x.py --a")
        large = predicted_sweep([(4.0, 1.0), (5.0, 2.0), (6.0, 3.0)], line="x.py --b")
        self.assertIn(" is 1.00.", answers.order_of_collapse([small, large]))

    def test_too_few(self):
        """A command without a sweep, and one that was added after the .csv file was written."""
        commands = [predicted_sweep([(1.0, 1.0)]), command_with("x.py", {"beta": [1.0]}, [])]
        self.assertEqual(
            answers.order_of_collapse(commands), "There are too few settings for an order."
        )


def linear_models(verdicts, gaps):
    """A command with a trained linear model for each verdict and gap."""
    rows = []
    for seed, (verdict, gap) in enumerate(zip(verdicts, gaps)):
        rows.append({"seed": seed, "elbo": 0.0, "verdict": verdict, "gap": gap})
    return command_with("MNIST_CVAE_Linear.py", {}, rows)


def brute_force(verdicts, errors):
    """A command that checks a theorem with several seeds."""
    rows = []
    for seed, (verdict, error) in enumerate(zip(verdicts, errors)):
        rows.append({"seed": seed, "verdict": verdict, "max error": error, "gap": 0.0})
    return command_with("matrix_VAE.py", {}, rows)


class LinearModels(unittest.TestCase):
    OFF = "a singular value is off"

    def test_trained_as_predicted(self):
        command = linear_models(["as predicted"] * 2, [0.001, 0.3])
        self.assertEqual(
            answers.trained_as_predicted([command]),
            "Yes. 2 of 2 trained models pass every check of the closed form. The losses are at "
            "most 0.3 nats above the optimal ones.",
        )

    def test_some_and_none_of_them(self):
        """The largest gap is that of any model, whether it passes or differs."""
        command = linear_models(
            [self.OFF, "as predicted", "as predicted", self.OFF], [0.02, 0.7, 0.001, 0.004]
        )
        answer = answers.trained_as_predicted([command])
        self.assertTrue(answer.startswith("No. 2 of 4 trained models "), answer)
        self.assertIn("at most 0.7 nats", answer)

        command.rows[0]["verdict"] = "as predicted"
        answer = answers.trained_as_predicted([command])
        self.assertTrue(answer.startswith("Mostly. 3 of 4 trained models "), answer)

    def test_a_model_that_diverged(self):
        """It does not pass the checks."""
        command = linear_models(["as predicted"], [0.0])
        command.rows.append({"seed": 9})
        self.assertFalse(answers.trained_as_predicted([command]).startswith("Yes"))

    def test_theorems(self):
        commands = [
            brute_force(["VERIFIED", "VERIFIED"], [2e-9, 3e-12]),
            linear_models(["as predicted"] * 3, [0.0] * 3),
        ]
        answer = answers.theorems(commands)
        self.assertTrue(answer.startswith("Yes. "), answer)
        self.assertIn("in 2 of 2 runs, with a largest error of 2e-09. 3 of 3 trained", answer)

    def test_theorems_fail(self):
        trained = linear_models(["as predicted"], [0.0])
        answer = answers.theorems([brute_force(["FAILED"], [0.5]), trained])
        self.assertTrue(answer.startswith("No. "), answer)
        self.assertIn("in 0 of 1 run, with a largest error of 5e-01", answer)

    def test_trained_models_fail(self):
        """The question asks for training, too, so the answer is not yes."""
        verified = brute_force(["VERIFIED"], [0.0])
        answer = answers.theorems([verified, linear_models([self.OFF], [0.2])])
        self.assertIn("0 of 1 trained models", answer)
        self.assertFalse(answer.startswith("Yes"), answer)

    def test_only_trained_models(self):
        """The .csv file has no checks by brute force."""
        answer = answers.theorems([linear_models(["as predicted"], [0.0])])
        self.assertIn("1 of 1 trained models", answer)


# The flags of each remedy, and their values without it.
REMEDY_FLAGS = {
    "none": {},
    "start": {"start_std": 0.1},
    "warm-up": {"beta_warmup": 25.0},
    "cycles": {"beta_cycles": 4},
    "free bits": {"free_bits": 0.1},
}
NO_REMEDY_FLAGS = {"start_std": 1.0, "beta_warmup": 0.0, "beta_cycles": 1, "free_bits": 0.0}


def remedy_commands(objectives, headroom=0.5, script="MNIST_CVAE_Relu.py"):
    """A command for each of the REMEDIES, with beta = 2 and two seeds.

    objectives are the negative beta-ELBOs of seed 1. Those of seed 2 are 1 nat higher.
    """
    commands = []
    for k, (objective, remedy) in enumerate(zip(objectives, answers.REMEDIES)):
        rows = []
        for seed in (1, 2):
            # The objective is reconstruction + 2 kl.
            rows.append({
                **NO_REMEDY_FLAGS, **REMEDY_FLAGS[remedy.name],
                "seed": seed, "beta": 2.0, "elbo": 0.0, "kl": 1.5,
                "reconstruction": objective - 3.0 + (seed - 1), "headroom": headroom,
                "AU_kl": k + seed,
            })
        flags = remedy.flags.format(start="--start_std", quarter=25)
        commands.append(command_with(f"{script} --beta 2.0 {flags}", {}, rows))
    return commands


class Remedies(unittest.TestCase):
    def test_plain_objective(self):
        row = {"reconstruction": 10.0, "beta": 0.5, "kl": 4.0}
        self.assertEqual(answers.plain_objective(row), 12.0)
        # The released objective counts the reconstruction twice.
        row["released_objective"] = True
        self.assertEqual(answers.plain_objective(row), 22.0)
        row = {"reconstruction": 10.0, "beta_1": 0.5, "beta_2": 3.0, "kl_1": 4.0, "kl_2": 1.0}
        self.assertEqual(answers.plain_objective(row), 15.0)

    def test_cases(self):
        cases = answers.remedy_cases(remedy_commands([9.0] * 5))
        [(key, by_remedy)] = cases.items()
        self.assertEqual(key, ("MNIST_CVAE_Relu", "beta = 2.0"))
        self.assertEqual(list(by_remedy), ["none", "start", "warm-up", "cycles", "free bits"])
        self.assertEqual(by_remedy["cycles"][2]["AU_kl"], 5)

    def test_cases_of_two_models(self):
        """Each has its own remedies. A row that diverged is left out."""
        commands = remedy_commands([9.0] * 5) + remedy_commands([5.0] * 5, script="y.py")
        for row in commands[6].rows:
            row.pop("elbo")
        cases = answers.remedy_cases(commands)
        self.assertEqual(list(cases), [("MNIST_CVAE_Relu", "beta = 2.0"), ("y", "beta = 2.0")])
        self.assertNotIn("start", cases["y", "beta = 2.0"])

    def test_a_command_without_rows(self):
        """The .csv file lacks the command with a start, so no other remedy takes its name."""
        commands = remedy_commands([9.0] * 5)
        commands[1].rows = []
        [by_remedy] = answers.remedy_cases(commands).values()
        self.assertNotIn("start", by_remedy)
        self.assertEqual(by_remedy["free bits"][1]["free_bits"], 0.1)
        self.assertEqual(by_remedy["warm-up"][1]["beta_warmup"], 25.0)

    def test_changes(self):
        """Each remedy changes the objective by the same number of nats for both seeds."""
        cases = answers.remedy_cases(remedy_commands([9.0, 7.0, 8.0, 9.0, 20.0]))
        for name, change in (("start", -2.0), ("warm-up", -1.0), ("free bits", 11.0)):
            changes = answers.objective_changes(cases, has_headroom=True, name=name)
            self.assertEqual(changes, [change, change])
        self.assertEqual(answers.objective_changes(cases, has_headroom=False, name="start"), [])
        self.assertEqual(answers.objective_changes(cases, has_headroom=True, name="none"), [])

    def test_a_seed_without_a_run_to_compare(self):
        commands = remedy_commands([9.0, 7.0, 8.0, 9.0, 20.0])
        commands[0].rows.pop()
        cases = answers.remedy_cases(commands)
        self.assertEqual(
            answers.objective_changes(cases, has_headroom=True, name="start"), [-2.0]
        )

    def test_training_collapsed_units(self):
        answer = answers.remedies(remedy_commands([9.0, 7.0, 8.0, 9.0, 20.0]))
        self.assertEqual(
            answer,
            "Where training had collapsed units, the objective changes on average by these nats: "
            "start -2.00, warm-up -1.00, cycles +0.00 and free bits +11.00.",
        )

    def test_the_objective_collapsed_units(self):
        answer = answers.remedies(remedy_commands([9.0, 10.0, 10.0, 10.0, 9.0], headroom=0.01))
        self.assertTrue(answer.startswith("Elsewhere, the objective changes "), answer)
        self.assertIn("start +1.00", answer)
        self.assertNotIn("Where training", answer)


def deep(script, active, **columns):
    """A command of a deep model: for each seed the active units per level, the top level first."""
    rows = []
    for seed, counts in enumerate(active, 1):
        row = {"seed": seed, "elbo": 0.0, "AU_kl from the top": counts}
        rows.append(row | columns)
    return command_with(script, {}, rows)


class DeepModels(unittest.TestCase):
    def test_levels_and_likelihoods(self):
        """The context, which is the top level of the DCT-VAE, is not learned."""
        answer = answers.deep_models([
            deep("MNIST_HVAE_Ladder.py", ["5, 0, 3"], log_px=-90.0),
            deep("MNIST_HVAE_DCT.py", ["0, 7, 8"], log_px=-80.0, context_baseline=1.0),
        ])
        self.assertIn("MNIST_HVAE_Ladder 2 of 3 and MNIST_HVAE_DCT 2 of 2.", answer)
        self.assertIn("MNIST_HVAE_DCT has the highest log p(x), -80.00 nats.", answer)

    def test_otherwise(self):
        answer = answers.deep_models([
            deep("MNIST_HVAE_Ladder.py", ["0, 0, 3"], log_px=-70.0),
            deep("MNIST_HVAE_DCT.py", ["9, 0, 0"], log_px=-80.0, context_baseline=1.0),
        ])
        self.assertIn("MNIST_HVAE_Ladder 1 of 3 and MNIST_HVAE_DCT 0 of 2.", answer)
        self.assertIn("MNIST_HVAE_Ladder has the highest log p(x), -70.00 nats.", answer)

    def test_log_px_of_several_seeds(self):
        """The means are -90 and -91. The standard deviation of -89 and -91 is the root of 2."""
        ladder = deep("MNIST_HVAE_Ladder.py", ["5, 3", "5, 3"])
        dct = deep("MNIST_HVAE_DCT.py", ["5, 3", "5, 3"], log_px=-91.0)
        for row, log_px in zip(ladder.rows, (-89.0, -91.0)):
            row["log_px"] = log_px
        self.assertIn(
            "MNIST_HVAE_Ladder has the highest log p(x), -90.00 ± 1.41 nats.",
            answers.deep_models([ladder, dct]),
        )

    def test_models_with_different_seeds(self):
        """With seed 1 y is best, although the mean of all seeds of x is higher."""
        x = deep("x.py", ["5", "5"], log_px=-80.0)
        x.rows[0]["log_px"] = -99.0
        y = deep("y.py", ["5"], log_px=-95.0)
        self.assertIn(
            "y has the highest log p(x), -95.00 nats. Only seed 1 can be compared.",
            answers.deep_models([x, y]),
        )
        y.rows[0]["seed"] = 7
        self.assertNotIn("log p(x)", answers.deep_models([x, y]))

    def test_seeds_and_a_model_with_one_level(self):
        """Without draws there is no log p(x). A cell with one number was read as a number."""
        answer = answers.deep_models([deep("x.py", ["5, 0", "5, 1"]), deep("y.py", [3])])
        self.assertIn("x 1.5 ± 0.7 of 2 and y 1 of 1.", answer)
        self.assertNotIn("log p(x)", answer)

    def test_a_model_that_diverged(self):
        diverged = command_with("y.py", {}, [{"seed": 1}])
        answer = answers.deep_models([deep("x.py", ["5, 0"], log_px=-90.0), diverged])
        self.assertIn("x 1 of 2", answer)


class ConvergedModels(unittest.TestCase):
    def ladder(self, seeds=(1, 2)):
        """ELBOs of -30 and -31: 20 and 21 nats of reconstruction, 10 of the learned levels."""
        kinds = {1: (20.0, None, 10.0), 2: (21.0, None, 10.0), 3: (22.0, None, 10.0)}
        return deep_model("MNIST_HVAE_Ladder.py", {s: kinds[s] for s in seeds}, context=False)

    def dvp(self):
        """ELBOs of -35 and -37, because of a context of 14 and 15 nats."""
        return deep_model("MNIST_HVAE_DVP.py", {1: (19.0, 14.0, 2.0), 2: (20.0, 15.0, 2.0)})

    def test_seed_by_seed(self):
        """The differences are 5 and 6 nats, and those of the context -14 and -15."""
        answer = answers.converged_models([self.ladder(), self.dvp()])
        self.assertEqual(
            answer,
            # log p(x) is 1 nat above the ELBO: -29 and -30.
            "MNIST_HVAE_Ladder has the highest log p(x), -29.50 ± 0.71 nats. It is 5.50 ± 0.71 "
            "nats above MNIST_HVAE_DVP.\n\n"
            "- Learned units in use: MNIST_HVAE_Ladder 18 and MNIST_HVAE_DVP 18.\n"
            "- The ELBO of MNIST_HVAE_DVP is 5.50 ± 0.71 nats lower than that of "
            "MNIST_HVAE_Ladder, mostly because of the context (-14.50 ± 0.71).",
        )

    def test_a_model_with_fewer_seeds(self):
        """The DCT-VAE has seed 1 alone. Two models with more seeds are compared with theirs."""
        dct = deep_model("MNIST_HVAE_DCT.py", {1: (15.0, 1.0, 9.0)})
        answer = answers.converged_models([self.ladder(), self.dvp(), dct])
        self.assertTrue(answer.startswith(
            # Its ELBO is -25. Those of seed 1 of the others are -30 and -35.
            "MNIST_HVAE_DCT has the highest log p(x), -24.00 nats. It is 5.00 nats above "
            "MNIST_HVAE_Ladder (only seed 1) and 10.00 nats above MNIST_HVAE_DVP (only seed 1).\n"
        ), answer)
        self.assertIn("MNIST_HVAE_DVP is 5.50 ± 0.71 nats lower than", answer)
        self.assertIn(
            "The ELBO of MNIST_HVAE_DCT is 5.00 nats higher than that of MNIST_HVAE_Ladder (only "
            "seed 1), mostly because of the reconstruction (+5.00).",
            answer,
        )

    def test_the_best_model_has_more_seeds(self):
        """Its log p(x) is the mean of all its seeds, as in the table: -29 and -30."""
        dct = deep_model("MNIST_HVAE_DCT.py", {2: (25.0, 5.0, 9.0)})
        answer = answers.converged_models([self.ladder(), dct])
        self.assertTrue(answer.startswith(
            "MNIST_HVAE_Ladder has the highest log p(x), -29.50 ± 0.71 nats. It is 8.00 nats above "
            "MNIST_HVAE_DCT (only seed 2).\n"
        ), answer)

    def test_the_learned_latents(self):
        other = deep_model("x.py", {1: (19.0, 0.0, 14.0), 2: (19.0, 0.0, 15.0)})
        self.assertIn(
            "The ELBO of x is 3.00 nats lower than that of MNIST_HVAE_Ladder, mostly because of "
            "the learned latents (-4.50 ± 0.71).",
            answers.converged_models([self.ladder(), other]),
        )

    def test_units_and_rise(self):
        """The context is no learned level. The ELBO of one model fell at the end."""
        ladder, dvp = self.ladder(), self.dvp()
        for rows, rises, counts in (
            (ladder.rows, (0.25, 0.75), ("5, 3", "6, 4")),
            (dvp.rows, (-0.5, -0.5), ("9, 7, 0", "9, 7, 0")),
        ):
            for row, rise, active in zip(rows, rises, counts):
                row[measurements.RISE_AT_THE_END] = rise
                row["AU_kl from the top"] = active
                row["units from the top"] = "8, 16"
        answer = answers.converged_models([ladder, dvp])
        self.assertIn(
            "Learned units in use: MNIST_HVAE_Ladder 9.0 ± 1.4 of 24 and MNIST_HVAE_DVP 7 of 24.\n"
            "- Over the last ten epochs the ELBO of the test images still changes by these nats: "
            "+0.50 ± 0.35 (MNIST_HVAE_Ladder) and -0.50 (MNIST_HVAE_DVP).",
            answer,
        )

    def test_no_seed_in_common(self):
        answer = answers.converged_models([self.ladder(seeds=(3,)), self.dvp()])
        self.assertIn("no log p(x) with the same seed", answer)
        self.assertIn("MNIST_HVAE_Ladder 18 and MNIST_HVAE_DVP 18", answer)
        self.assertNotIn("highest", answer)
        self.assertNotIn("The ELBO", answer)

    def test_models_that_diverged(self):
        """The first model that has results takes the place of the first one."""
        diverged = command_with("MNIST_HVAE_Ladder.py", {}, [{"seed": 1}, {"seed": 2}])
        dct = deep_model("MNIST_HVAE_DCT.py", {1: (15.0, 1.0, 9.0)})
        answer = answers.converged_models([diverged, self.dvp(), dct])
        self.assertIn("than that of MNIST_HVAE_DVP (only seed 1)", answer)
        self.assertNotIn("Ladder", answer)
        self.assertEqual(answers.converged_models([diverged]), "All models diverged.")
        answer = answers.converged_models([diverged, dct])
        self.assertEqual(
            answer,
            "MNIST_HVAE_DCT has the highest log p(x), -24.00 nats.\n\n"
            "- Learned units in use: MNIST_HVAE_DCT 18.",
        )
        del dct.rows[0]["log_px"]
        answer = answers.converged_models([diverged, dct])
        self.assertTrue(answer.startswith("There is no log p(x)"), answer)


def bernoulli(kls, threshold=10.0, linear=False, beta_warmup=0.0):
    """A command of MNIST_VAE_Bernoulli.py. kls is {beta: KL per seed}.

    A seed with None diverged.
    """
    rows = []
    for beta, kls_of_seeds in kls.items():
        for seed, kl in enumerate(kls_of_seeds, 1):
            row = {"beta": beta, "seed": seed, "linear": linear, "beta_warmup": beta_warmup}
            if kl is not None:
                # A KL that is spread over many units leaves each of them below 0.01 nats.
                row |= {"elbo": -1.0, "kl": kl, "AU_kl": 0, "collapse_threshold": threshold}
            rows.append(row)
    line = f"MNIST_VAE_Bernoulli.py --linear {linear} --beta_warmup {beta_warmup}"
    return command_with(line, {"beta": list(kls)}, rows)


class CollapseRanges(unittest.TestCase):
    def limits(self, kls):
        """(last_in_use, first_collapsed) of a command."""
        measured = answers.collapse_range(bernoulli(kls))
        self.assertEqual(measured.predicted, 10.0)
        return measured.last_in_use, measured.first_collapsed

    def test_on_both_sides(self):
        """z is in use if a single seed has a KL above 0.01 nats."""
        self.assertEqual(
            self.limits({1.0: [30.0, 30.0], 9.0: [0.0, 0.011], 11.0: [0.01, 0.0], 20.0: [0.0]}),
            (9.0, 11.0),
        )

    def test_on_one_side(self):
        self.assertEqual(self.limits({1.0: [30.0], 9.0: [2.0]}), (9.0, None))
        self.assertEqual(self.limits({11.0: [0.001], 20.0: [0.0]}), (None, 11.0))

    def test_a_gap(self):
        """At beta 9 z is collapsed, but it is in use again at beta 12."""
        self.assertEqual(
            self.limits({1.0: [30.0], 9.0: [0.0], 12.0: [0.02], 15.0: [0.0], 20.0: [0.0]}),
            (12.0, 15.0),
        )

    def test_the_order_of_the_flag_does_not_count(self):
        self.assertEqual(
            self.limits({20.0: [0.0], 1.0: [3.0], 11.0: [0.0], 9.0: [1.0]}), (9.0, 11.0)
        )

    def test_settings_that_diverged(self):
        """z is neither in use nor collapsed there. A seed that diverged leaves the others."""
        self.assertEqual(
            self.limits({1.0: [None, 2.0], 9.0: [None], 11.0: [None], 12.0: [0.0, None]}),
            (1.0, 12.0),
        )
        self.assertIsNone(answers.collapse_range(bernoulli({1.0: [None], 9.0: [None, None]})))

    def test_words(self):
        """9 is 10 % below the predicted threshold of 10, and 12.5 is 25 % above it."""
        both, only_in_use, only_collapsed = [
            answers.range_in_words(answers.CollapseRange(last, first, 10.0))
            for last, first in ((9.0, 12.5), (9.0, None), (None, 12.5))
        ]
        self.assertEqual(
            both,
            "last above 0.01 nats at β = 9 (10.0 % below the prediction) and smaller from β = 12.5 "
            "(25.0 % above the prediction) on",
        )
        self.assertEqual(
            only_in_use, "last above 0.01 nats at β = 9 (10.0 % below the prediction)"
        )
        self.assertEqual(
            only_collapsed, "at most 0.01 nats from β = 12.5 (25.0 % above the prediction) on"
        )

    def test_answer(self):
        """Commands with the same range share a sentence. One that diverged has none."""
        kls = {9.0: [1.0], 12.5: [0.0]}
        answer = answers.collapse_ranges([
            bernoulli(kls),
            bernoulli({9.0: [None]}, beta_warmup=8.0),
            bernoulli({12.5: [0.0]}, linear=True),
            bernoulli(kls, linear=True, beta_warmup=8.0),
        ])
        self.assertEqual(
            answer,
            "Collapse is predicted to be stable from β = 10.00 on.\n\n"
            "- The KL of the ReLU model that starts next to collapse and the linear model after a "
            "rise of β is last above 0.01 nats at β = 9 (10.0 % below the prediction) and smaller "
            "from β = 12.5 (25.0 % above the prediction) on.\n"
            "- The KL of the linear model that starts next to collapse is at most 0.01 nats from "
            "β = 12.5 (25.0 % above the prediction) on.",
        )

    def test_answer_with_all_ranges(self):
        """β 8 is the last one at which both models use z, β 12 the first at which neither does."""
        answer = answers.collapse_ranges([
            bernoulli({8.0: [1.0], 9.0: [1.0], 11.0: [0.0], 12.0: [0.0]}),
            bernoulli({8.0: [1.0], 9.0: [0.0], 11.0: [0.0], 12.0: [0.0]}, linear=True),
            bernoulli({8.0: [1.0], 9.0: [1.0], 11.0: [1.0], 12.0: [0.0]}, beta_warmup=8.0),
        ])
        self.assertTrue(answer.startswith(
            "Collapse is predicted to be stable from β = 10.00 on. Each kind of model still uses z "
            "at β = 8, and none does from β = 12 on.\n\n- "
        ), answer)

    def test_different_values_of_beta(self):
        """β 8 is the largest β at which all models were trained and use z."""
        answer = answers.collapse_ranges([
            bernoulli({8.0: [1.0], 9.0: [1.0], 12.0: [0.0]}),
            # No model was trained at β 9 here, and z is collapsed at β 10.
            bernoulli({8.0: [1.0], 10.0: [0.0], 11.0: [1.0], 12.0: [0.0]}, linear=True),
        ])
        self.assertIn("Each kind of model still uses z at β = 8, and none does from", answer)
        # Without such a β there is no sentence.
        answer = answers.collapse_ranges([
            bernoulli({8.0: [1.0], 12.0: [0.0]}), bernoulli({9.0: [1.0], 12.0: [0.0]}, linear=True)
        ])
        self.assertNotIn("Each kind", answer)

    def test_all_diverged(self):
        self.assertEqual(
            answers.collapse_ranges([bernoulli({9.0: [None]})]), "All models diverged."
        )


def with_causes(line, causes, context=False):
    """A command of a model with many levels: for each seed the causes, the top level first."""
    rows = []
    for seed, cause in enumerate(causes, 1):
        row = {"seed": seed, "elbo": 0.0, "cause from the top": cause}
        # The context has active units, but neither a headroom nor a cause.
        units = [9] * (context + len(cause.split(", ")))
        row["AU_kl from the top"] = ", ".join(map(str, units))
        rows.append(row)
    return command_with(line, {}, rows)


class DeepCauses(unittest.TestCase):
    def test_levels(self):
        """The levels have the numbers from the image, with a context above them or without."""
        for context in (False, True):
            command = with_causes(
                "x.py", ["training, training, none, objective"], context=context
            )
            self.assertEqual(
                answers.deep_causes([command]),
                "The objective collapsed units in level 1 of x. Training collapsed units in levels "
                "4 and 3 of x. All units are active in level 2 of x.",
            )

    def test_all_levels(self):
        command = with_causes("x.py", ["unstable, unstable, unstable"])
        self.assertEqual(
            answers.deep_causes([command]), "Collapse is unstable in all levels of x."
        )

    def test_seeds_that_differ(self):
        command = with_causes("x.py", ["training, none", "training, encoder", "none, encoder"])
        self.assertEqual(
            answers.deep_causes([command]),
            "Training collapsed units in level 2 (2 of 3 seeds) of x. Only a richer encoder could "
            "use the collapsed units in level 1 (2 of 3 seeds) of x. All units are active in "
            "levels 2 (1 of 3 seeds) and 1 (1 of 3 seeds) of x.",
        )

    def test_one_level(self):
        """It has no number. Commands of one script are distinguished by their flags."""
        commands = []
        for flags, causes in (
            ("--prior standard", ["objective", "objective"]), ("--delta 5", ["none", "training"]),
        ):
            rows = []
            for seed, cause in enumerate(causes, 1):
                rows.append({"seed": seed, "elbo": 0.0, "headroom": 0.0, "cause": cause})
            commands.append(command_with(f"y.py --preset small {flags}", {}, rows))
        self.assertEqual(
            answers.deep_causes(commands),
            "The objective collapsed units in y (prior = standard). Training collapsed units in y "
            "(delta = 5) (1 of 2 seeds). All units are active in y (delta = 5) (1 of 2 seeds).",
        )

    def test_varying_flags(self):
        rows = []
        for delta, cause in ((2.0, "none"), (5.0, "objective")):
            rows.append({"delta": delta, "elbo": 0.0, "headroom": 0.0, "cause": cause})
        command = command_with("y.py --delta 2,5", {"delta": [2.0, 5.0]}, rows)
        self.assertEqual(
            answers.deep_causes([command]),
            "The objective collapsed units in y (delta = 5.0). All units are active in y (delta = "
            "2.0).",
        )

    def test_models_that_diverged(self):
        diverged = command_with("y.py", {}, [{"seed": 1}])
        command = with_causes("x.py", ["none, none"])
        command.rows.insert(0, {"seed": 9})
        self.assertEqual(
            answers.deep_causes([diverged, command]), "All units are active in all levels of x."
        )
        self.assertEqual(answers.deep_causes([diverged]), "No model has a verdict.")

    def test_every_cause_has_words(self):
        """A cause without words would end the program that writes the page."""
        causes = {"none"}
        for nats, nats_any, unstable in (
            (1.0, 1.0, ""), (0.0, 1.0, ""), (0.0, 0.0, ""), (0.0, 0.0, "linear"),
        ):
            causes.add(headroom.cause_of_collapse(nats, nats_any, unstable))
        self.assertEqual(causes, set(answers.CAUSES_IN_WORDS))


class Ablation(unittest.TestCase):
    def change(self, script, before, after):
        """A command whose log p(x) changes along the flag grad_clip."""
        return sweep("log_px", [before, after], line=script, flag="grad_clip")

    def test_the_largest_change(self):
        answer = answers.ablation([
            self.change("x.py", -90.0, -89.0),
            self.change("y.py", -90.0, -92.5),
            command_with("z.py", {}, [{"elbo": 0.0, "log_px": 0.0}]),
        ])
        self.assertIn("-2.50 nats (y, grad_clip = 2.0)", answer)
        answer = answers.ablation([
            self.change("x.py", -90.0, -86.0), self.change("y.py", -90.0, -92.5),
        ])
        self.assertIn("+4.00 nats (x, grad_clip = 2.0)", answer)

    def test_seeds(self):
        """The changes with seeds 1 and 2 are 1 and 3. Seed 3 is there once."""
        command = self.change("x.py", -90.0, -89.0)
        for value, seed, log_px in ((1.0, 2, -80.0), (2.0, 2, -77.0), (2.0, 3, -10.0)):
            command.rows.append(
                {**command.rows[0], "grad_clip": value, "seed": seed, "log_px": log_px}
            )
        self.assertIn("is +2.00 ± 1.41 nats (x, ", answers.ablation([command]))

    def test_too_few(self):
        answer = answers.ablation([sweep("log_px", [-1.0, None])])
        self.assertEqual(answer, "There are too few settings to compare.")


class RatesAboveDelta(unittest.TestCase):
    def command(self, *rates):
        """A command with these (delta, KL). The standard prior has delta 0."""
        rows = []
        for delta, kl in rates:
            rows.append({"elbo": 0.0, "delta": delta, "smallest_rate": delta, "kl": kl})
        return command_with("MNIST_VAE_Delta.py", {"delta": [delta for delta, _ in rates]}, rows)

    def test_as_expected(self):
        standard = self.command((0.0, 0.04))
        answer = answers.rates_above_delta([standard, self.command((2.0, 2.25), (5.0, 8.5))])
        self.assertEqual(
            answer,
            "Yes. The KL is 2.25 nats for δ = 2 and 8.50 nats for δ = 5. With the standard prior "
            "it is 0.04 nats.",
        )

    def test_otherwise(self):
        answer = answers.rates_above_delta([self.command((2.0, 1.5), (5.0, 4.0))])
        self.assertTrue(answer.startswith("No. "), answer)
        answer = answers.rates_above_delta([self.command((2.0, 2.5), (5.0, 6.0), (9.0, 8.0))])
        self.assertTrue(answer.startswith("Mostly. "), answer)
        self.assertNotIn("standard prior", answer)

    def test_seeds(self):
        """The KL of one seed is below δ, so that the answer is not yes."""
        command = self.command((2.0, 3.0))
        command.rows.append({**command.rows[0], "seed": 2, "kl": 1.0})
        answer = answers.rates_above_delta([command])
        self.assertEqual(answer, "No. The KL is 2.00 ± 1.41 nats for δ = 2.")

    def test_no_delta(self):
        """All settings with a delta diverged, so nothing supports a yes."""
        answer = answers.rates_above_delta([self.command((0.0, 0.04))])
        self.assertFalse(answer.startswith("Yes"), answer)
        self.assertNotIn("is .", answer)


if __name__ == "__main__":
    unittest.main()
