"""The errors that a user can act on; the command line prints them in one line, without a traceback."""


class FastmimError(Exception):
    """A problem whose message names what, got and wanted. `exit_code` is what the process ends with."""

    exit_code = 2


class ConfigError(FastmimError):
    """A configuration that cannot be run: a key, its value and what is accepted."""


class DataError(FastmimError):
    """A source that cannot be read or holds no usable image."""


class CheckpointError(FastmimError):
    """A checkpoint that is missing, incomplete, altered, or of another run."""


class TrainingAborted(FastmimError):  # noqa: N818 (an outcome, not a mistake)
    """A run that was stopped because going on would waste it: too many bad images or skipped steps."""

    exit_code = 3


class TooManyBadImages(TrainingAborted):
    """Raised on the rank that met them, alone."""
