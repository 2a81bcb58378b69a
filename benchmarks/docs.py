"""Fill the tables of `benchmarks/README.md` from `benchmarks/results/*.json`; `make bench-docs` does it.

A script NAME.py stores results/NAME.json and offers `tables(stored)`, the page's tables by name. Rows of another
machine stand beside it in results/NAME.MACHINE.json, where --json puts them; their tables end in _MACHINE. A table
whose rows are not there stays as it is.
"""

import importlib
import json
import sys
from pathlib import Path

# Run as a script, Python looks here first, where `kernels.py` would pass for a package of that name.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.markdown import fill
from benchmarks.report import RESULTS

PAGE = Path(__file__).with_name("README.md")


def collect(results: Path) -> dict[str, str]:
    """The tables of every stored result, each above a line that tells the machine, the commit and the arguments.

    Raises:
        ValueError: a result without a script of its name that offers tables.
    """
    found: dict[str, str] = {}
    for path in sorted(results.glob("*.json")):
        stored = json.loads(path.read_text())
        stem, _, machine = path.stem.partition(".")
        try:
            script = importlib.import_module(f"benchmarks.{stem}")
            tables = script.tables(stored)
        except (ModuleNotFoundError, AttributeError) as error:
            raise ValueError(f"{path}: expected benchmarks/{stem}.py with `tables`; {error}") from error
        suffix = f"_{machine}" if machine else ""
        for name, text in tables.items():
            told = predicted_by(stored) if name in getattr(script, "PREDICTED", ()) else origin(stored)
            found[f"{name}{suffix}"] = f"{text}\n\n{told}"
    return found


def origin(stored: dict) -> str:
    """Where rows come from, in a line."""
    machine = stored["machine"]
    cores, threads = machine["cores"], machine.get("threads")
    used = f"{cores} cores" if threads in (None, cores) else f"{threads} threads of {cores} cores"
    facts = [f"{machine['device']}, {used}, torch {machine['torch']}, commit {machine['commit']}"]
    hidden = ("json", "plot")
    facts += [f"{name}={value}" for name, value in stored["arguments"].items() if name not in hidden]
    return f"<sub>{'; '.join(facts)}</sub>"


def predicted_by(stored: dict) -> str:
    """What formula a table is of, in a line: it was not measured on any machine."""
    return f"<sub>predicted by commit {stored['machine']['commit']}</sub>"


def main() -> None:
    """Fill the page."""
    PAGE.write_text(fill(PAGE.read_text(), collect(RESULTS), partly=True))


if __name__ == "__main__":
    main()
