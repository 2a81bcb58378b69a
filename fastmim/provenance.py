"""Which source code is running."""

import functools
import os
import subprocess
from pathlib import Path


@functools.cache
def source_commit() -> str | None:
    """The git commit of this package, with `-dirty` where tracked files differ from it; None outside of its repository.

    A package that is installed into the environment of another repository is not of that one.
    """
    folder = Path(__file__).parent
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
