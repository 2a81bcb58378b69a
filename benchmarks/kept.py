"""Rows that take minutes each, kept in a file: a benchmark that was stopped goes on."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import describe_machine
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
