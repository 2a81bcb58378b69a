"""Rows that take minutes each, kept in a file, so that a benchmark that was stopped goes on; and how they are told."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import describe_machine
from benchmarks.markdown import fill
from fastmim.manifest import write_durably

OURS, RANDOM = "pre-trained", "random weights"
"""Where a network starts from, in rows and tables."""


class Results:
    """Rows in a file, so that a run that was stopped goes on.

    Args:
        path: of the file.
        settings: what makes the rows comparable; a file of others is refused.
    """

    def __init__(self, path: Path, settings: dict):
        self.path = path
        found = json.loads(path.read_text()) if path.exists() else {"settings": settings, "rows": {}}
        if found["settings"] != settings:
            sys.exit(f"{path} is of {found['settings']}, this call of {settings}; expected another --runs")
        self.told = {**found, "machine": describe_machine("cpu")}

    def keep(self, name: str, make: Callable[[], dict]) -> dict:
        """A row, made where it is missing."""
        rows = self.told["rows"]
        if name not in rows:
            print(f"{name} ...", file=sys.stderr, flush=True)
            started = time.perf_counter()
            rows[name] = make()
            rows[name]["seconds"] = time.perf_counter() - started
            write_durably(self.path, json.dumps(self.told, indent=1))
        return rows[name]


def parse(
    parser: argparse.ArgumentParser, arguments: list[str] | None, minutes: float | None, runs: str
) -> argparse.Namespace:
    """Parse with the options that these benchmarks share, of which `--minutes` and `--runs` have defaults."""
    parser.add_argument(
        "--minutes", type=float, default=minutes, help="of pre-training (default: as documented)"
    )
    parser.add_argument("--runs", type=Path, default=Path(runs), help="where all is kept")
    parser.add_argument("--quick", action="store_true", help="a tiny network, a few steps: does it run?")
    parser.add_argument("--json", type=Path, help="write machine and rows")
    parser.add_argument(
        "--docs", type=Path, help="the table into FOLDER/evaluation.md, rows into FOLDER/results"
    )
    args = parser.parse_args(arguments)
    if args.quick and args.docs:
        parser.error("--docs with --quick, whose figures say nothing; expected one of them")
    return args


def tell(args: argparse.Namespace, told: dict, stored: str, name: str, text: str) -> None:
    """Print a table, and write it where the options say so.

    Args:
        args: `--json PATH` takes the rows, `--docs FOLDER` FOLDER/results/STORED.json, and the table the page.
        told: machine, settings and rows.
        stored: name of the rows.
        name: of the table's markers in the page.
        text: the table.
    """
    print(text)
    rows = json.dumps(told, indent=1) + "\n"
    if args.json:
        args.json.write_text(rows)
    if args.docs:
        page, results = args.docs / "evaluation.md", args.docs / "results"
        results.mkdir(exist_ok=True)
        (results / f"{stored}.json").write_text(rows)
        page.write_text(fill(page.read_text(), {name: text}, partly=True))


def percent(values: list[float]) -> str:
    """The mean of shares in percent, with their standard deviation where there are several; a dash of none."""
    if not values:
        return "–"
    each = [100 * value for value in values]
    spread = f" ± {statistics.stdev(each):.1f}" if len(each) > 1 else ""
    return f"{statistics.mean(each):.1f}{spread}"


def cost(told: dict) -> str:
    """What pre-training and all rows together took."""
    run, total = told["rows"]["pre-training"], sum(row["seconds"] for row in told["rows"].values())
    return (
        f"{run['run_seconds'] / 60:.0f} minutes of pre-training on {run['images']:,} images, "
        f"{total / 60:.0f} minutes in all, on {told['machine']['cores']} cores"
    )
