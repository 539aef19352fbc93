"""Runs the examples, and writes what became of them to results/post_mortems.csv.

    python -m examples                            all examples, with the data sets in data/
    python -m examples folder                     with the data sets in another folder
    python -m examples folder mlp conditional     only these two

The table has a row for each example. Only the rows of the examples that ran are made anew. The
table is written after each example, so that an interruption loses only the current one.
"""
import common

import csv
import importlib
import io
import sys
from pathlib import Path

import files

TABLE = Path(__file__).resolve().parents[1] / "results" / "post_mortems.csv"

# The examples, in the order of the rows.
EXAMPLES = ("mlp", "convolutional", "conditional", "hierarchy", "sequence")

# The columns of the table. Losses and KLs are in nats per example. The docstring of an example
# says which loss it compares. A unit is active if its mean KL exceeds 0.01 nats.
COLUMNS = (
    "model",
    "script",
    "cause",
    "verdict",
    "remedy",
    "loss_before",
    "loss_after",
    "kl_before",
    "kl_after",
    "active_before",
    "active_after",
    "units",
    "control",
    "loss_control",
    "active_control",
)


def read_table(path):
    """The rows of the table, {script: row}. Empty if there is no table yet."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {row["script"]: row for row in csv.DictReader(file)}


def write_table(path, rows):
    """Write the rows {script: row}, in the order of EXAMPLES, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for name in EXAMPLES:
        script = f"examples/{name}.py"
        if script in rows:
            writer.writerow(rows[script])
    files.write_text(path, text.getvalue())


def rounded(row):
    """A row whose floats have four decimals."""
    cells = {}
    for name, value in row.items():
        cells[name] = f"{value:.4f}" if isinstance(value, float) else value
    return cells


def parse(words):
    """The folder of the data sets and the names of the examples, from the command line.

    Ends the program for a word that is neither an example nor a folder, and for a second folder.
    """
    names = [word for word in words if word in EXAMPLES]
    folders = [word for word in words if word not in EXAMPLES]
    for word in folders:
        if not Path(word).is_dir():
            sys.exit(f"got {word!r}, wants a folder, or one of {', '.join(EXAMPLES)}")
    if len(folders) > 1:
        sys.exit(f"got the folders {', '.join(folders)}, wants at most one")
    return folders[0] if folders else "data", names or list(EXAMPLES)


def main(words, table=TABLE):
    """Run the named examples, or all, and write their rows to the table."""
    folder, names = parse(words)
    for name in names:
        print(f"=== examples/{name}.py ===\n", flush=True)
        example = importlib.import_module(f"examples.{name}")
        row = example.main(folder)
        rows = read_table(table)
        rows[row["script"]] = rounded(row)
        write_table(table, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
