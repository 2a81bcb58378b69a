"""One scan of a source makes an index: what images there are, where, how large, of which class.

The index gives crop windows without decoding and finds broken files before training. It imports neither torch
nor DALI.
"""

import glob
import hashlib
import io
import os
import tarfile
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from fastmim.config import DataConfig
from fastmim.data import scan
from fastmim.data.headers import read_headers
from fastmim.data.sources import Member, Refused, list_members, walk_folder
from fastmim.data.table import Names, Table, cache_path, load_table, store_table
from fastmim.data.usable import is_no_image, nothing_usable, suffix_of, usable_rows, what_is_near
from fastmim.errors import DataError

_THREADS = 16


def _nothing() -> np.ndarray:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class Index:
    """The usable images of a source, in a fixed order; every array has one row an image."""

    kind: str
    """folder, tar or npy."""
    root: str
    """The folder, the folder of the shards, or the .npy file."""
    names: Names
    """Paths or members; empty for npy."""
    heights: np.ndarray
    """int32 [n], pixels, upright."""
    widths: np.ndarray
    sizes: np.ndarray
    """int64 [n], bytes in the file."""
    classes: np.ndarray
    """int32 [n], -1 without a class."""
    class_names: tuple[str, ...]
    rejected: tuple[tuple[str, str], ...]
    """Location and reason of everything that cannot be used."""
    fingerprint: str
    """SHA-256 of the order, names below the root, sizes, heights and widths: a moved set keeps it."""
    shards: tuple[str, ...] = ()
    """Paths below the root."""
    shard_ids: np.ndarray = field(default_factory=_nothing)
    """int32 [n], for tar."""
    offsets: np.ndarray = field(default_factory=_nothing)
    """int64 [n], first byte in its shard, for tar."""

    def __len__(self) -> int:
        return len(self.heights)

    def path(self, i: int) -> bytes:
        """The path of image i of a folder."""
        return os.path.join(os.fsencode(self.root), self.names[i])

    def shard_path(self, shard: int) -> str:
        """The path of a shard of a tar source."""
        return os.path.join(self.root, self.shards[shard])

    def name(self, i: int) -> str:
        """What to call image i in a message."""
        if self.kind == "npy":
            return f"{self.root}[{i}]"
        name = self.names[i].decode("utf-8", "replace")
        if self.kind == "tar":
            return f"{self.shard_path(self.shard_ids[i])}:{name}"
        return os.path.join(self.root, name)

    def require_all(self, what: str) -> None:
        """Refuse a source that leaves an image out; files that are none may lie beside.

        Raises:
            DataError: names `what`, the first such image and why.
        """
        lacking = [(name, reason) for name, reason in self.rejected if not is_no_image(name, reason)]
        if lacking:
            name, reason = lacking[0]
            raise DataError(
                f"{what}: {len(lacking)} beside {len(self)} images cannot be used, such as {name}: {reason}; expected "
                "none (fastmim index --all names them)"
            )

    def summary(self, listed: int = 5) -> str:
        """A few lines for a person; of what was left out, the first `listed` are named."""
        low, high = (self.heights.min(), self.widths.min()), (self.heights.max(), self.widths.max())
        size = f"{low[0]}x{low[1]}" + ("" if low == high else f" to {high[0]}x{high[1]}")
        lines = [f"{self.root}: {len(self):,} images ({self.kind}), {size} pixels"]
        lines[0] += f", {self.sizes.sum() / 2**20:,.1f} MiB"
        if self.class_names:
            lines.append(f"{len(self.class_names):,} class{'es' if len(self.class_names) > 1 else ''}")
        if self.rejected:
            lines.append(f"{len(self.rejected):,} left out:")
            lines += [f"  {location}: {reason}" for location, reason in self.rejected[:listed]]
            if len(self.rejected) > listed:
                lines.append(f"  and {len(self.rejected) - listed:,} more (fastmim index --all names them)")
        return "\n".join(lines)


_BLOCKS, _BLOCK = 64, 4096
"""Evenly spaced blocks, and bytes in each, that stand for the content of an array in its fingerprint."""


def build_index(
    source: str, config: DataConfig, progress: bool = True, refresh: bool = False, option: str = "data.source"
) -> Index:
    """Scan a source, or what has changed in it since the last scan.

    Args:
        source: a folder of images, a tar shard or a glob of shards, or an .npy uint8 array [n, H, W(, C)].
        config: channels, max_pixels and max_file_bytes decide what is usable.
        progress: show a bar.
        refresh: read everything again.
        option: what the source was given as, for messages.

    Raises:
        DataError: when there is no such source, or no usable image in it.
    """
    with warnings.catch_warnings():
        # What Pillow warns of, such as damaged tags, is either harmless or a reason in the index.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        return _build_index(source, config, progress, refresh, option)


def _build_index(source: str, config: DataConfig, progress: bool, refresh: bool, option: str) -> Index:
    if not source:
        raise DataError(f"{option} is empty; expected a folder of images, .tar shards or an .npy array")
    path = os.path.abspath(os.path.expanduser(source))
    if os.path.isdir(path):
        return _index_folder(path, config, progress, refresh)
    if path.endswith(".npy") and os.path.isfile(path):
        return _index_npy(path, config)
    shards = [path] if os.path.isfile(path) else sorted(p for p in glob.glob(path) if os.path.isfile(p))
    if not shards:
        raise DataError(f"{option}={source!r} does not exist; {what_is_near(path)}")
    strangers = [shard for shard in shards if not shard.endswith(".tar")]
    if strangers:
        raise DataError(
            f"{option}={source!r}: {strangers[0]} is no source; expected a folder of images, .tar shards or "
            "an .npy array"
        )
    return _index_shards(shards, config, progress, refresh)


def _index_folder(root: str, config: DataConfig, progress: bool, refresh: bool) -> Index:
    found = walk_folder(root)
    table = Table.unread(found.names, found.sizes, found.mtimes, [], [])
    cache = cache_path("folder", root)
    known = None if refresh else load_table(cache)
    if known:
        table.adopt(known[0])
    prefix = os.path.join(os.fsencode(root), b"")
    todo = table.to_read(config.max_file_bytes)

    def read(row: int) -> scan.Header:
        return scan.read_path(prefix + table.names[row], int(table.sizes[row]))

    if len(todo):
        read_headers(table, todo, read, progress, root, lambda: store_table(cache, table, []))
    rows, rejected = usable_rows(table, config, "")
    rejected += found.refused
    if not len(rows):
        raise DataError(nothing_usable(root, Counter(suffix_of(n) for n in found.names), rejected))
    table = table.take(rows)
    table.classes, class_names = _folder_classes(table.names)
    return _make_index("folder", root, table, class_names, rejected)


def _index_shards(shards: list[str], config: DataConfig, progress: bool, refresh: bool) -> Index:
    root = os.path.dirname(shards[0]) if len(shards) == 1 else os.path.commonpath(shards)
    tables: list[Table] = []
    rejected: Refused = []
    others: Counter = Counter()
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=len(shards), desc="scan shards", unit=" shards", disable=not progress) as bar,
    ):
        for shard, (table, refused, other) in zip(
            shards, pool.map(lambda shard: _scan_shard(shard, config, refresh), shards), strict=True
        ):
            rows, left_out = usable_rows(table, config, f"{shard}:")
            tables.append(table.take(rows))
            rejected += left_out + refused
            others += other
            bar.update()
    table = Table.concatenate(tables)
    if not len(table.names):
        raise DataError(nothing_usable(", ".join(shards[:3]), others, rejected))
    ids = np.repeat(np.arange(len(shards), dtype=np.int32), [len(table.names) for table in tables])
    class_names = tuple(map(str, range(int(table.classes.max()) + 1)))
    relative = tuple(os.path.relpath(shard, root) for shard in shards)
    return _make_index("tar", root, table, class_names, rejected, relative, ids)


def _scan_shard(shard: str, config: DataConfig, refresh: bool) -> tuple[Table, Refused, Counter]:
    """The members of a shard, those refused, and how many of which suffix are no images."""
    stat = os.stat(shard)
    stamp = f"{stat.st_size} {stat.st_mtime_ns}"
    cache = cache_path("tar", shard)
    known = None if refresh else load_table(cache)
    if known and known[1][:1] == [("stamp", stamp)]:
        table, refused, others = known[0], known[1][1:], Counter()
    else:
        try:
            found = list_members(shard)
        except (tarfile.TarError, OSError) as error:
            return Table.unread([], [], [], [], []), [(shard, f"no uncompressed tar ({error})")], Counter()
        refused, others = found.refused, found.others
        table = Table.unread(found.names, found.sizes, [], found.offsets, found.classes)
    rows = table.to_read(config.max_file_bytes)
    if len(rows):
        with open(shard, "rb") as file:
            for row in rows.tolist():
                size = int(table.sizes[row])
                part = io.BufferedReader(Member(file.fileno(), int(table.offsets[row]), size))
                table.set(row, scan.read_header(part, size))
        store_table(cache, table, [("stamp", stamp), *refused])
    return table, refused, others


def _index_npy(path: str, config: DataConfig) -> Index:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        with open(path, "rb") as file:
            named = file.read(6) == b"\x93NUMPY"
        why = error if named else "it does not begin as one"
        raise DataError(f"{path} cannot be read as an .npy array ({why})") from error
    channels = array.shape[3] if array.ndim == 4 else 1
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or not array.size:
        raise DataError(
            f"{path} holds {array.dtype} {list(array.shape)}; expected uint8 [n, H, W] or [n, H, W, C], not empty"
        )
    if not array.flags.c_contiguous:
        raise DataError(
            f"{path} is in Fortran order; expected C order (numpy.ascontiguousarray before saving)"
        )
    if channels != config.channels and {channels, config.channels} != {1, 3}:
        raise DataError(f"{path} has {channels} channels; expected data.channels={config.channels}")
    n, height, width = array.shape[:3]
    if height * width > config.max_pixels:
        raise DataError(
            f"{path}: {height}x{width} pixels; expected at most data.max_pixels={config.max_pixels}"
        )

    def column(value: int, dtype: type) -> np.ndarray:
        return np.broadcast_to(np.array(value, dtype), n)

    fingerprint = hashlib.sha256(f"npy\0{os.path.basename(path)}\0{list(array.shape)}".encode())
    # Arrays of one name and shape are told apart by a sample of their bytes, which costs no scan.
    content = array.reshape(-1)
    for start in np.linspace(0, max(0, content.size - _BLOCK), _BLOCKS).astype(np.int64).tolist():
        fingerprint.update(content[start : start + _BLOCK].tobytes())
    return Index(
        kind="npy",
        root=path,
        names=Names.pack([]),
        heights=column(height, np.int32),
        widths=column(width, np.int32),
        sizes=column(height * width * channels, np.int64),
        classes=column(-1, np.int32),
        class_names=(),
        rejected=(),
        fingerprint=fingerprint.hexdigest(),
    )


def _folder_classes(names: Names) -> tuple[np.ndarray, tuple[str, ...]]:
    """First-level folders as classes; -1 for images in the root itself."""
    ids: dict[bytes, int] = {}
    classes = np.full(len(names), -1, np.int32)
    for row, name in enumerate(names):
        folder, slash, _ = name.partition(b"/")
        if slash:
            classes[row] = ids.setdefault(folder, len(ids))
    # "a-b/" sorts before "a/": the names are sorted as paths, the classes as folders.
    order = sorted(ids)
    renumber = np.empty(len(ids) + 1, np.int32)
    renumber[-1] = -1
    renumber[[ids[folder] for folder in order]] = np.arange(len(ids))
    return renumber[classes], tuple(os.fsdecode(folder) for folder in order)


def _make_index(
    kind: str,
    root: str,
    table: Table,
    class_names: tuple[str, ...],
    rejected: Refused,
    shards: tuple[str, ...] = (),
    shard_ids: np.ndarray | None = None,
) -> Index:
    digest = hashlib.sha256("\0".join((kind, *shards)).encode("utf-8", "surrogateescape"))
    shard_ids = _nothing() if shard_ids is None else shard_ids
    columns = (table.names.blob, table.names.ends, table.sizes, table.heights, table.widths, shard_ids)
    for column in columns:
        digest.update(np.ascontiguousarray(column, column.dtype.newbyteorder("<")).data)
    return Index(
        kind=kind,
        root=root,
        names=table.names,
        heights=table.heights,
        widths=table.widths,
        sizes=table.sizes,
        classes=table.classes,
        class_names=class_names,
        rejected=tuple(rejected),
        fingerprint=digest.hexdigest(),
        shards=shards,
        shard_ids=shard_ids,
        offsets=table.offsets,
    )
