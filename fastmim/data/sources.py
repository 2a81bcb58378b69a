"""Find what a source holds: the files of a folder, the members of a tar shard."""

import io
import os
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

# A tar holds other components beside; a folder's files are told by their first bytes.
IMAGE_SUFFIXES = {"jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "pgm", "ppm", "jp2", "j2k"}

_MAX_CLASSES = 10**6

Refused = list[tuple[str, str]]  # location, reason
LEADS_BACK = "a link that leads back up"


@dataclass
class Found:
    """Files or members by name, in sorted order, and what was refused by its location alone."""

    names: list[bytes] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    mtimes: list[int] = field(default_factory=list)
    """Nanoseconds; empty for a shard."""
    offsets: list[int] = field(default_factory=list)
    """First byte in the shard; empty for a folder."""
    classes: list[int] = field(default_factory=list)
    """From `.cls` members, -1 without; empty for a folder."""
    refused: Refused = field(default_factory=list)
    others: Counter = field(default_factory=Counter)
    """Members of a shard that are no images, by suffix."""


def walk_folder(root: str) -> Found:
    """Every file below `root`, by its path from there.

    Links are followed while they stay inside `root`; those that leave it, lead back up, or lead nowhere are
    refused. So is what is neither file nor folder.
    """
    real_root = os.path.realpath(root)
    files: list[tuple[bytes, int, int]] = []
    found = Found()
    stack: list[tuple[bytes, tuple[str, ...]]] = [
        (b"", (real_root,))
    ]  # relative folder, real paths from the root down to it
    while stack:
        relative, chain = stack.pop()
        try:
            entries = list(os.scandir(os.path.join(os.fsencode(root), relative)))
        except OSError as error:
            found.refused.append((os.fsdecode(relative) + "/", f"cannot be read ({error.strerror})"))
            continue
        for entry in entries:
            name = relative + entry.name
            reason = _refuse_link(entry, real_root, chain)
            try:
                if reason:
                    pass
                elif entry.is_dir():
                    stack.append((name + b"/", (*chain, os.path.realpath(os.fsdecode(entry.path)))))
                elif entry.is_file():
                    stat = entry.stat()
                    files.append((name, stat.st_size, stat.st_mtime_ns))
                else:
                    reason = "neither a file nor a folder"
            except OSError as error:
                reason = f"cannot be read ({error.strerror})"
            if reason:
                found.refused.append((os.fsdecode(name), reason))
    files.sort()
    found.refused.sort()
    found.names = [name for name, _, _ in files]
    found.sizes = [size for _, size, _ in files]
    found.mtimes = [mtime for _, _, mtime in files]
    return found


def _refuse_link(entry: os.DirEntry, real_root: str, chain: tuple[str, ...]) -> str:
    if not entry.is_symlink():
        return ""
    real = os.path.realpath(os.fsdecode(entry.path))
    if not os.path.lexists(real):
        return "a link to nothing"
    if real != real_root and not real.startswith(real_root.rstrip("/") + "/"):
        return "a link that leaves the folder"
    return LEADS_BACK if real in chain else ""


def list_members(shard: str) -> Found:
    """The images of one tar shard, in their order, by member name and offset.

    Raises:
        tarfile.TarError, OSError: when it is no uncompressed tar.
    """
    found = Found()
    classes: dict[str, int] = {}
    extras: list[tuple[str, str, str]] = []  # key, component, name
    end = Path(shard).stat().st_size
    with tarfile.open(shard, "r:") as tar:
        while True:
            try:
                member = tar.next()
            except tarfile.TarError as error:
                found.refused.append((shard, f"truncated tar ({error})"))
                break
            if member is None:
                _refuse_garbage(tar, shard, found.refused)
                break
            tar.members.clear()  # type: ignore[attr-defined] (tarfile keeps every header it has read)
            if member.isdir():
                continue
            name = member.name
            reason = _refuse_member(member)
            if not reason and member.offset_data + member.size > end:
                reason = "truncated: the shard ends inside it"
            key, component = split_key(name)
            if reason:
                found.refused.append((f"{shard}:{name}", reason))
            elif component == "cls":
                classes[key] = _read_class(tar, member, shard, found.refused)
            elif component in IMAGE_SUFFIXES:
                found.names.append(name.encode("utf-8", "surrogateescape"))
                found.sizes.append(member.size)
                found.offsets.append(member.offset_data)
            elif component.rpartition(".")[2] in IMAGE_SUFFIXES:
                extras.append((key, component, name))
            else:
                found.others[f".{component}"] += 1
    keys = [split_key(name.decode("utf-8", "surrogateescape"))[0] for name in found.names]
    found.classes = [classes.get(key, -1) for key in keys]
    have_image = set(keys) if extras else set()
    for key, component, name in extras:
        if key in have_image:  # such as a mask beside it
            found.others[f".{component}"] += 1
        else:
            reason = f"component {component!r} of its key; expected one such as 'jpg'"
            found.refused.append((f"{shard}:{name}", reason))
    return found


def _refuse_garbage(tar: tarfile.TarFile, shard: str, refused: Refused) -> None:
    """tarfile takes a header it cannot read, after the first, for the end of the archive."""
    file = tar.fileobj
    file.seek(tar.offset)
    if any(file.read(tarfile.BLOCKSIZE)):
        refused.append((shard, f"no tar header at byte {tar.offset}; what follows is left out"))


def _refuse_member(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return "a link; expected a file"
    if member.name.startswith("/"):
        return "an absolute path"
    if ".." in member.name.split("/"):
        return "a path with '..'"
    return "" if member.isreg() and not member.issparse() else "not a plain file"


def _read_class(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: str, refused: Refused) -> int:
    file = tar.extractfile(member)
    text = file.read(32) if file else b""
    if text.strip().isdigit() and int(text) < _MAX_CLASSES:
        return int(text)
    wanted = f"an integer from 0 to {_MAX_CLASSES - 1}"
    refused.append((f"{shard}:{member.name}", f"class {text!r}; expected {wanted}"))
    return -1


def split_key(name: str) -> tuple[str, str]:
    """A member's key and component, which WebDataset parts at the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    key, _, component = base.partition(".")
    return folder + slash + key, component.lower()


class Member(io.RawIOBase):
    """A file that is some bytes of another. Wrap it in a BufferedReader: an image's header is many small reads."""

    def __init__(self, descriptor: int, offset: int, size: int):
        self._descriptor, self._offset, self._size = descriptor, offset, size
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As a file's."""
        start = (0, self._position, self._size)[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer) -> int:
        """As a file's, up to the end of the part."""
        wanted = min(len(buffer), max(0, self._size - self._position))
        read = os.preadv(self._descriptor, [memoryview(buffer)[:wanted]], self._offset + self._position)
        self._position += read
        return read
