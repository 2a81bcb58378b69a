"""What one scan found, as packed columns, and its cache on disk."""

import contextlib
import hashlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmim.data.scan import UNREADABLE, Header

_VERSION = 1
logger = logging.getLogger("fastmim")


@dataclass(frozen=True, eq=False)
class Names:
    """Byte strings in one block, of which item i is `blob[ends[i - 1]:ends[i]]`."""

    blob: np.ndarray
    """uint8"""
    ends: np.ndarray
    """int64 [n]"""

    @classmethod
    def pack(cls, names: Iterable[bytes]) -> "Names":
        """Join byte strings."""
        names = list(names)
        ends = np.cumsum(np.fromiter(map(len, names), np.int64, len(names)))
        return cls(np.frombuffer(b"".join(names), np.uint8), ends)

    @classmethod
    def concatenate(cls, parts: list["Names"]) -> "Names":
        """One after the other."""
        starts = np.cumsum([0, *(len(part.blob) for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
        blobs = [part.blob for part in parts]
        return cls(
            np.concatenate([*blobs, np.empty(0, np.uint8)]), np.concatenate([*ends, np.empty(0, np.int64)])
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        return self.blob[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        whole, start = self.blob.tobytes(), 0
        for end in self.ends.tolist():
            yield whole[start:end]
            start = end

    def take(self, rows: np.ndarray) -> "Names":
        """The names of some rows, in the order given."""
        if len(rows) == len(self) and np.array_equal(rows, np.arange(len(self))):
            return self
        return Names.pack(map(self.__getitem__, rows.tolist()))

    def equals(self, other: "Names") -> bool:
        """Whether both hold the same strings."""
        return np.array_equal(self.ends, other.ends) and np.array_equal(self.blob, other.blob)


@dataclass(eq=False)
class Table:
    """The files of a folder or the members of a shard, one row each, whatever the configuration accepts.

    A row of height 0 has a reason, or has not been read.
    """

    names: Names
    sizes: np.ndarray
    mtimes: np.ndarray
    """int64, nanoseconds; zero for members."""
    offsets: np.ndarray
    """int64, first byte in the shard; zero for files."""
    classes: np.ndarray
    """int32, -1 without."""
    heights: np.ndarray
    widths: np.ndarray
    modes: np.ndarray
    """S8, Pillow's modes."""
    reasons: dict[int, str]
    """Why a row cannot be used."""

    @classmethod
    def unread(cls, names: list[bytes], sizes: list, mtimes: list, offsets: list, classes: list) -> "Table":
        """A table whose headers are still to be read; an empty list is a column of defaults."""
        n = len(names)

        def column(values: list, default: int, dtype: type) -> np.ndarray:
            return np.array(values, dtype) if values else np.full(n, default, dtype)

        return cls(
            Names.pack(names),
            column(sizes, 0, np.int64),
            column(mtimes, 0, np.int64),
            column(offsets, 0, np.int64),
            column(classes, -1, np.int32),
            np.zeros(n, np.int32),
            np.zeros(n, np.int32),
            np.zeros(n, "S8"),
            {},
        )

    def adopt(self, known: "Table") -> None:
        """Take over the headers that `known` holds of files whose name, size and time have not changed."""
        if self.names.equals(known.names):
            mine = theirs = np.arange(len(self.names))
        else:
            rows = {name: row for row, name in enumerate(known.names)}
            pairs = [(row, rows[name]) for row, name in enumerate(self.names) if name in rows]
            mine, theirs = np.array(pairs, np.int64).reshape(-1, 2).T
        same = (self.sizes[mine] == known.sizes[theirs]) & (self.mtimes[mine] == known.mtimes[theirs])
        mine, theirs = mine[same], theirs[same]
        for name in ("heights", "widths", "modes"):
            getattr(self, name)[mine] = getattr(known, name)[theirs]
        if known.reasons:
            self.reasons = {
                row: known.reasons[other]
                for row, other in zip(mine.tolist(), theirs.tolist(), strict=True)
                if other in known.reasons
            }

    def take(self, rows: np.ndarray) -> "Table":
        """Some rows, all of them without a reason."""
        return Table(self.names.take(rows), **{n: getattr(self, n)[rows] for n in _COLUMNS}, reasons={})

    @classmethod
    def concatenate(cls, parts: list["Table"]) -> "Table":
        """One after the other; rows without reasons."""
        columns = {n: np.concatenate([getattr(part, n) for part in parts]) for n in _COLUMNS}
        return cls(Names.concatenate([part.names for part in parts]), **columns, reasons={})

    def set(self, row: int, header: Header) -> None:
        """Enter what was read of one file."""
        self.heights[row], self.widths[row], self.modes[row] = header.height, header.width, header.mode
        if header.reason:
            self.reasons[row] = header.reason

    def to_read(self, max_file_bytes: int) -> np.ndarray:
        """Rows whose header is unknown and worth reading."""
        rows = np.flatnonzero((self.heights == 0) & (self.sizes > 0) & (self.sizes <= max_file_bytes))
        return np.array([row for row in rows.tolist() if row not in self.reasons], np.int64)


def cache_path(kind: str, location: str) -> Path:
    """Where the table of a folder or shard is kept; $FASTMIM_CACHE, or ~/.cache/fastmim."""
    folder = os.environ.get("FASTMIM_CACHE") or "~/.cache/fastmim"
    key = hashlib.sha256(f"{kind}\0{location}".encode("utf-8", "surrogateescape")).hexdigest()
    return Path(folder).expanduser() / "index" / f"{key}.npz"


def load_table(path: Path) -> tuple[Table, list[tuple[str, str]]] | None:
    """A stored table and its notes; None where there is none or it cannot be read."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            if int(data["version"]) != _VERSION:
                return None
            columns = {name: data[name] for name in _COLUMNS}
            names = Names(data["names"], data["name_ends"])
            texts = Names(data["reasons"], data["reason_ends"])
            reasons = dict(zip(data["reason_rows"].tolist(), (t.decode() for t in texts), strict=True))
            notes = [t.decode("utf-8", "surrogateescape") for t in Names(data["notes"], data["note_ends"])]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("index cache %s cannot be read (%s); scanning again", path, error)
        return None
    return Table(names, **columns, reasons=reasons), list(zip(notes[::2], notes[1::2], strict=True))


_COLUMNS = ("sizes", "mtimes", "offsets", "classes", "heights", "widths", "modes")


def store_table(path: Path, table: Table, notes: list[tuple[str, str]]) -> None:
    """Write a table and its notes; other processes see the old file or the whole new one.

    Files that could not be opened or read are not told: they are tried again at the next start.
    """
    reasons = {row: reason for row, reason in table.reasons.items() if not reason.startswith(UNREADABLE)}
    texts = Names.pack(reason.encode("utf-8", "replace") for reason in reasons.values())
    pairs = (part for note in notes for part in note)
    packed = Names.pack(part.encode("utf-8", "surrogateescape") for part in pairs)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            np.savez(
                file,
                version=_VERSION,
                names=table.names.blob,
                name_ends=table.names.ends,
                reasons=texts.blob,
                reason_ends=texts.ends,
                reason_rows=np.array(list(reasons), np.int64),
                notes=packed.blob,
                note_ends=packed.ends,
                **{name: getattr(table, name) for name in _COLUMNS},
            )
        temporary.replace(path)
    except OSError as error:
        logger.warning("index cache %s cannot be written (%s); the next start scans again", path, error)
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
