"""docs/own_model.md: its programs run as they are printed, on a few drawn digits.

Its table of losses agrees with torch.distributions, its commands have flags that exist, and each
change of a program that it describes fits the program.
"""
import contextlib
import io
import os
import re
import unittest

import common
import torch
from torch.distributions import Bernoulli, Categorical, Normal, Poisson
from torch.nn import functional

import losses
import predict_collapse
from tests import small
from tests.small import ROOT
from tests.test_scripts import png_size

PAGE = (ROOT / "docs" / "own_model.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
EPOCHS = "for epoch in range(10):"


def block_with(text):
    """The only Python block of the page that contains a text."""
    [block] = [block for block in BLOCKS if text in block]
    return block


def section(number):
    """The text of a section of the page."""
    return re.search(rf"^## {number}\. .*?(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[0]


def commands():
    """The arguments of each predict_collapse.py command of the page, a list of lists."""
    text = PAGE.replace(" \\\n", " ")
    found = re.findall(r"^    python predict_collapse\.py (.*)$", text, re.MULTILINE)
    return [line.split() for line in found]


def changes(text):
    """The changes of a program that a text describes: a list of (old code, new code)."""
    return re.findall(r"`([^`]+)` becomes `([^`]+)`", text)


def run(code, variables):
    """Run a program with these global variables, and return what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), torch.random.fork_rng(devices=[]):
        exec(compile(code, "own_model.md", "exec"), variables)
    return out.getvalue()


class Programs(small.WithMnist):
    """The folder has the drawn digits where torchvision looks for MNIST."""

    def setUp(self):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)

    def replaced(self, code, old, new):
        """A program with a text replaced, which must occur exactly once."""
        self.assertEqual(code.count(old), 1, old)
        return code.replace(old, new)

    def run_epochs(self, code, epochs):
        """Run a program with fewer epochs. Returns (its variables, its output after training)."""
        code = self.replaced(code, EPOCHS, f"for epoch in range({epochs}):")
        variables = {}
        lines = run(code, variables).splitlines()
        for epoch, line in enumerate(lines[:epochs], start=1):
            self.assertRegex(line, rf"^epoch {epoch}: loss \d+\.\d\d, KL \d+\.\d\d\d$")
        return variables, "\n".join(lines[epochs:])

    def test_vae_and_its_files(self):
        """The answer from files agrees with that of the training loop, and with the data."""
        variables, answer = self.run_epochs(block_with("class VAE("), epochs=30)
        result = variables["result"]
        self.assertEqual(answer, str(result))
        verdict = "16 of 16 units collapsed because of the objective"
        self.assertTrue(answer.startswith(f"With beta = 60 and a Bernoulli decoder, {verdict}"))
        self.assertEqual(result.count, 256)
        png_size(self.folder / "own_model.png")

        # rho_1 of the collapsed model is that of the correlations of the pixels that vary.
        pixels = variables["images"].double()
        correlations = torch.corrcoef(pixels[:, pixels.var(0) > 0].T)
        self.assertLess(torch.linalg.eigvalsh(correlations)[-1].item(), 60)

        run(block_with("np.save("), variables)
        [argv] = [argv for argv in commands() if "--residual" in argv]
        status, out, _ = small.call(predict_collapse.main, *argv)
        self.assertEqual(status, 0)
        self.assertIn(f"With beta = 60 and a Bernoulli decoder, {verdict}", out)

        out = run(block_with("dead = "), variables)
        hidden = variables["model"].encoder[:2](variables["images"])
        dead = 256 - len(set(hidden.nonzero()[:, 1].tolist()))
        self.assertEqual(out, f"{dead} of 256 hidden units of the encoder are dead\n")

    def test_cvae(self):
        """After two epochs most units are collapsed, and training would activate them."""
        _, answer = self.run_epochs(block_with("class CVAE("), epochs=2)
        self.assertRegex(answer, "^With beta = 1 and eta_dec = 1, .* because of training: ")

    def test_all_blocks_are_tried(self):
        self.assertEqual(len(BLOCKS), 4)

    def test_changes_fit_the_programs(self):
        for number, name in ((5, "class VAE("), (6, "class CVAE(")):
            code = block_with(name)
            found = changes(section(number))
            self.assertGreater(len(found), 1)
            for old, new in found:
                with self.subTest(section=number, old=old):
                    compile(self.replaced(code, old, new), "own_model.md", "exec")


class Commands(unittest.TestCase):
    def test_commands_are_allowed(self):
        self.assertGreater(len(commands()), 2)
        for argv in commands():
            with self.subTest(command=" ".join(argv)):
                settings = common.parse_flags(predict_collapse.Flags, argv)
                losses.check_flags(settings)

    def test_flags_exist(self):
        """Also those in sentences and tables."""
        names = set(re.findall(r"(?<![\w-])--(\w+)", PAGE))
        self.assertIn("columns", names)
        for name in names:
            with self.subTest(flag=name):
                self.assertTrue(hasattr(predict_collapse.Flags, name))

    def test_links(self):
        prose = re.sub(r"^```.*?^```$", "", PAGE, flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", prose):
            with self.subTest(link=target):
                self.assertTrue((ROOT / "docs" / target).exists())
        png_size(ROOT / "docs" / "own_model.png")


class TableOfLosses(unittest.TestCase):
    """Each loss of the table, times beta / w, is -log p(x|z) except for a constant."""

    def setUp(self):
        self.rows = []
        for line in section(2).splitlines():
            cells = [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
            if "(" in cells[0] and len(cells) == 5:
                self.rows.append(cells)

    def test_all_losses_are_in_the_table(self):
        names = [flag.removeprefix("--loss ") for _, flag, *_ in self.rows if "--loss" in flag]
        self.assertEqual(sorted(names), sorted(losses.LOSSES))

    def test_each_loss(self):
        B, D, K = 7, 5, 3
        torch.manual_seed(0)
        bits = torch.randint(2, (B, D)).double()
        codes = torch.randint(K, (B, D))
        variance = torch.full((B, D), 0.3, dtype=torch.float64)
        for code, _, decoder, eta_dec, beta in self.rows:
            with self.subTest(loss=code):
                difference = []
                for _ in range(2):
                    logits = torch.randn(B, K, D).double()
                    m = torch.randn(B, D).double()
                    p = torch.rand(B, D).double()
                    values = {
                        **vars(functional), "B": B, "x": bits, "codes": codes, "logits": logits,
                        "m": m, "p": p, "variance": variance, "log_rates": m,
                    }
                    square = {"√½": 0.5, "learned": 0.3, "1": 1, "": 1}[eta_dec]
                    std = torch.full_like(m, square).sqrt()
                    log_p = {
                        "Gaussian": lambda: Normal(m, std).log_prob(bits),
                        "Bernoulli": lambda: Bernoulli(p).log_prob(bits),
                        "categories": lambda: Categorical(logits=logits.mT).log_prob(codes),
                        "Poisson": lambda: Poisson(m.exp()).log_prob(bits),
                    }[decoder]()
                    factor = {"w": 1, "w D": D, "w D / 2": D / 2}[beta.split(",")[0]]
                    loss = eval(code, values)
                    difference.append(factor * loss.item() + log_p.sum().item() / B)
                self.assertAlmostEqual(*difference)


if __name__ == "__main__":
    unittest.main()
