"""Read one image's header: its upright size and mode, or why it cannot be used."""

import os
from dataclasses import dataclass
from typing import BinaryIO

from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from fastmim.data.exif import read_orientation

UNREADABLE = "cannot be read"
"""How a reason begins that is not the file's: it may be readable at the next start."""
NO_IMAGE = "not a "
"""How that of a file of no known format begins."""

_TAIL_BYTES = 65536

# The formats that DALI decodes, told by their first bytes: names are no evidence. Opening the plugin's class
# rather than Image.open leaves Pillow's own pixel limit out; data.max_pixels is the limit here.
_READERS = (
    (b"\xff\xd8\xff", JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"RIFF", WebPImageFile),
    (b"II*\0", TiffImageFile),
    (b"MM\0*", TiffImageFile),
    (b"BM", BmpImageFile),
    (b"P5", PpmImageFile),
    (b"P6", PpmImageFile),
    (b"\0\0\0\x0cjP  \r\n\x87\n", Jpeg2KImageFile),
    (b"\xff\x4f\xff\x51", Jpeg2KImageFile),
)
FORMATS = "JPEG, PNG, WebP, TIFF, BMP, PGM/PPM or JPEG 2000"

# What must come after the pixels of a whole file.
_END_MARKERS = {
    JpegImageFile: (b"\xff\xd9", "EOI marker"),
    Jpeg2KImageFile: (b"\xff\xd9", "EOC marker"),
}
# Pillow's modes of what DALI decodes right. It refuses or garbles the others: bilevel and luminance-alpha TIFF,
# CMYK JPEG 2000, 32-bit pixels.
_MODES = {
    JpegImageFile: {"L", "RGB", "CMYK"},
    PngImageFile: {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"},
    WebPImageFile: {"RGB", "RGBA"},
    TiffImageFile: {"L", "P", "RGB", "RGBA", "RGBX", "CMYK", "I;16", "I;16B"},
    BmpImageFile: {"1", "L", "P", "RGB"},
    PpmImageFile: {"L", "RGB", "I"},
    Jpeg2KImageFile: {"L", "RGB", "RGBA", "I;16"},
}


@dataclass(frozen=True)
class Header:
    """Upright height and width in pixels and Pillow's mode; or a reason, and no size."""

    height: int = 0
    width: int = 0
    mode: str = ""
    reason: str = ""


def read_header(file: BinaryIO, size: int) -> Header:
    """Read the header of an open image file, and whether its end is there.

    Args:
        file: seekable, at its beginning.
        size: bytes in the file.

    Returns:
        A header, with a reason where the image cannot be decoded.
    """
    start = file.read(16)
    reader = next((reader for magic, reader in _READERS if start.startswith(magic)), None)
    if reader is None or (reader is WebPImageFile and start[8:12] != b"WEBP"):
        return Header(reason=f"{NO_IMAGE}{FORMATS} image")
    file.seek(0)
    try:
        image = reader(file)
        exif = _png_exif(file) if reader is PngImageFile else image.info.get("exif")
        height, width = _upright_size(image, exif)
    except Exception as error:  # hostile bytes make Pillow's plugins raise nearly anything
        return Header(reason=f"unreadable ({error or type(error).__name__})")
    if image.mode not in _MODES[reader]:
        modes = ", ".join(sorted(_MODES[reader]))
        return Header(reason=f"{image.format} pixels of mode {image.mode}; expected one of {modes}")
    marker, name = _END_MARKERS.get(reader, (b"", ""))
    # Pillow leaves a JPEG file just after its SOS, so a thumbnail's own EOI does not count.
    if marker and not _ends_with(file, marker, file.tell() if reader is JpegImageFile else 0, size):
        return Header(reason=f"truncated: no {name} at its end")
    return Header(height, width, image.mode)


def _upright_size(image: ImageFile, exif: bytes | None) -> tuple[int, int]:
    """Height and width after the EXIF orientation.

    Raises:
        ValueError: when DALI may read the block otherwise, or not survive it.
    """
    width, height = image.size  # Pillow's TIFF reader has already applied the orientation
    if exif is None or isinstance(image, TiffImageFile):
        return height, width
    orientation, whole = read_orientation(exif)
    if not whole and isinstance(image, PngImageFile):
        raise ValueError("damaged EXIF block")  # some of these end the process, in DALI 2.4
    if not whole and height != width and (orientation == 0 or orientation > 4):
        raise ValueError("damaged EXIF block, which leaves height and width in doubt")
    return (width, height) if orientation > 4 else (height, width)


def _png_exif(file: BinaryIO) -> bytes | None:
    """The EXIF block of a PNG file, which DALI heeds behind the pixels too, where Pillow's header ends.

    Raises:
        ValueError: when the file does not reach its IEND chunk, or has several blocks.
    """
    blocks = []
    place = 8
    while True:
        file.seek(place)
        chunk = file.read(8)
        length, name = int.from_bytes(chunk[:4], "big"), chunk[4:]
        if len(chunk) < 8:
            raise ValueError("truncated: no IEND chunk")
        if name == b"eXIf":
            blocks.append(file.read(length))
        if name == b"IEND":
            break
        place += 12 + length
    if len(blocks) > 1:
        raise ValueError("several EXIF blocks")
    return blocks[0] if blocks else None


def _ends_with(file: BinaryIO, marker: bytes, start: int, size: int) -> bool:
    """Whether `marker` occurs after byte `start`: near the end for most files, before trailing bytes else."""
    tail = max(start, size - _TAIL_BYTES)
    file.seek(tail)
    if marker in file.read():
        return True
    file.seek(start)
    return marker in file.read(tail - start + len(marker) - 1)


def read_path(path: str | bytes, size: int) -> Header:
    """As `read_header`, for a file by its path; a file that cannot be opened has a reason too."""
    # Strings and open(): building 10 million Path objects takes minutes.
    try:
        with open(path, "rb") as file:
            return read_header(file, size)
    except OSError as error:
        return Header(reason=f"{UNREADABLE} ({error.strerror or os.strerror(error.errno or 0)})")
