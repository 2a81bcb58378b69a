"""The errors that a user can act on; the command line prints them in one line, without a traceback."""


class FastmimError(Exception):
    """A problem whose message names what, got and wanted.

    Attributes:
        exit_code: what the process ends with.
        everywhere: whether every rank raises it, so that one rank's word is enough.
    """

    exit_code = 2
    everywhere = False

    def __init__(self, message: str, everywhere: bool | None = None):
        super().__init__(message)
        if everywhere is not None:
            self.everywhere = everywhere


class ConfigError(FastmimError):
    """A configuration that cannot be run: a key, its value and what is accepted."""

    everywhere = True


class DataError(FastmimError):
    """A source that cannot be read or holds no usable image."""


class CheckpointError(FastmimError):
    """A checkpoint that is missing, incomplete, altered, or of another run."""

    everywhere = True


class TrainingAborted(FastmimError):  # noqa: N818 (an outcome, not a mistake)
    """A run that was stopped because going on would waste it: too many bad images or skipped steps."""

    exit_code = 3
