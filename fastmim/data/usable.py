"""Which scanned images a configuration can train on, and what to say where there are none."""

import os
from collections import Counter

import numpy as np

from fastmim.config import DataConfig
from fastmim.data.scan import NO_IMAGE
from fastmim.data.sources import IMAGE_SUFFIXES, LEADS_BACK, Refused
from fastmim.data.table import Table

EMPTY = "empty file"
_OTHER_IMAGE_SUFFIXES = {"jpe", "jfif", "jxl", "gif", "heic", "heif", "avif", "pnm"}
"""Of formats that are not read, or by which files of those that are may be called."""


def usable_rows(table: Table, config: DataConfig, prefix: str) -> tuple[np.ndarray, Refused]:
    """Rows that this configuration can train on, and the others with their reasons."""
    reasons = dict(table.reasons)
    for row in np.flatnonzero(table.sizes == 0).tolist():
        reasons[row] = EMPTY
    for row in np.flatnonzero(table.sizes > config.max_file_bytes).tolist():
        reasons[row] = (
            f"{table.sizes[row]} bytes; expected at most data.max_file_bytes={config.max_file_bytes}"
        )
    pixels = table.heights.astype(np.int64) * table.widths
    for row in np.flatnonzero(pixels > config.max_pixels).tolist():
        size = f"{table.heights[row]}x{table.widths[row]}"
        reasons[row] = f"{size} pixels; expected at most data.max_pixels={config.max_pixels}"
    if config.channels not in (1, 3):
        # DALI returns RGBA as it is stored; its other many-channel decodings fail or change with the format.
        wrong = (table.heights > 0) & ((config.channels != 4) | (table.modes != b"RGBA"))
        for row in np.flatnonzero(wrong).tolist():
            reasons.setdefault(
                row, f"pixels of mode {table.modes[row].decode()}; expected data.channels={config.channels}"
            )
    usable = np.ones(len(table.names), bool)
    usable[list(reasons)] = False
    rejected = [
        (prefix + table.names[row].decode("utf-8", "replace"), reasons[row]) for row in sorted(reasons)
    ]
    return np.flatnonzero(usable), rejected


def is_no_image(name: str, reason: str) -> bool:
    """Whether what was left out for `reason` is no image that somebody could miss."""
    if " tar" in reason:  # of a whole shard, or its end
        return False
    suffix = os.path.splitext(name)[1][1:].lower()
    if name.endswith("/") or suffix in IMAGE_SUFFIXES | _OTHER_IMAGE_SUFFIXES:
        return reason == LEADS_BACK  # what it leads to is there already
    return bool(suffix) or reason == LEADS_BACK or reason.startswith((NO_IMAGE, EMPTY))


def nothing_usable(source: str, suffixes: Counter, rejected: Refused) -> str:
    """What was found where no image was."""
    total = sum(suffixes.values())
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5))
    message = f"{source} holds no usable image; found {total} file{'' if total == 1 else 's'}"
    message += f": {kinds}" if kinds else ""
    if ".tar" in suffixes:
        message += f" (for shards, data.source={os.path.join(source, '*.tar')!r})"
    message += "".join(f"\n  {location}: {reason}" for location, reason in rejected[:5])
    return message + (f"\n  and {len(rejected) - 5} more" if len(rejected) > 5 else "")


def what_is_near(path: str) -> str:
    """What the nearest folder that does exist holds."""
    folder = os.path.dirname(path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    entries = sorted(os.listdir(folder))
    shown = ", ".join(entries[:5]) + (f" and {len(entries) - 5} more" if len(entries) > 5 else "")
    return f"{folder} holds {shown or 'nothing'}"


def suffix_of(name: bytes) -> str:
    """Lower-case suffix of a file, for counting."""
    return os.path.splitext(os.fsdecode(name))[1].lower() or "without a suffix"
