"""Folders that are whole or absent."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, beside `out`; it becomes `out` at the end, and is gone after a failure.

    Where another process was faster, its folder stays: it is as whole as this one.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        made = Path(temporary) / out.name
        made.mkdir()
        yield made
        try:
            made.rename(out)
        except OSError:
            if not out.exists():
                raise
