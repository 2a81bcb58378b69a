"""The orientation in an EXIF block.

A crop window holds for the upright image, so the index must turn an image exactly when the decoder does. Pillow's
own reading is of no help: it heeds XMP, which DALI does not, and reads damaged blocks otherwise than DALI.
"""

import struct

_ORIENTATION = 0x0112
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_INTEGERS = {1: "B", 3: "H", 4: "I"}


def read_orientation(block: bytes) -> tuple[int, bool]:
    """The first orientation of an EXIF block.

    Args:
        block: a TIFF structure, with or without "Exif\\0\\0" before it.

    Returns:
        The orientation, 1 to 8, and 1 without one; and whether the block is whole: of known types, with every value
        of its first directory inside. Of a block that is not whole, an orientation that cannot be told is 0.
    """
    data = block.removeprefix(b"Exif\0\0")
    order = ">" if data[:1] == b"M" else "<"
    whole = data[:4] in (b"II*\0", b"MM\0*")
    orientation = None
    try:
        (start,) = struct.unpack_from(order + "I", data, 4)
        (entries,) = struct.unpack_from(order + "H", data, start)
        for place in range(start + 2, start + 2 + 12 * entries, 12):
            (tag,) = struct.unpack_from(order + "H", data, place)
            first = tag == _ORIENTATION and orientation is None
            orientation = 0 if first else orientation
            kind, count, offset = struct.unpack_from(order + "HII", data, place + 2)
            size = count * _TYPE_BYTES.get(kind, 0)
            whole &= kind in _TYPE_BYTES and (size <= 4 or offset + size <= len(data))
            if first and kind not in _INTEGERS:
                whole = False
            elif first:
                (orientation,) = struct.unpack_from(order + _INTEGERS[kind], data, place + 8)
    except struct.error:
        whole = False
    if orientation is None or (whole and not 1 <= orientation <= 8):
        return 1, whole
    return orientation if orientation <= 8 else 0, whole
