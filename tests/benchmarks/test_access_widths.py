"""The widest access of every pass at ViT's shapes is the widest that the length of its rows allows."""

import math

import pytest

from benchmarks import rows
from benchmarks.cases import CASES
from benchmarks.problems import SHAPES

ONE_VALUE, FLAT = 4, 16
"""Bytes where a pass stores one float32 per row, and where it goes through a whole tensor as if it were one row."""


def rows_of(kernel, which, shape, item):
    """Bytes of the longest rows that a pass loads and stores; where it loads none, of what it loads instead."""
    width, patch = shape.width * item, shape.length * item
    if kernel.startswith("sample"):
        return 8, 8 * shape.patches
    if kernel == "gather_patches":
        return shape.patch_size * shape.channels, patch
    if kernel == "masked_pixel_loss":
        return (patch, patch) if which == "forward" else (FLAT, FLAT)
    if kernel in ("masked_cross_entropy", "info_nce"):
        logits = item * (shape.classes if kernel == "masked_cross_entropy" else shape.batch * shape.removed)
        return (logits, logits) if which == "forward" else (FLAT, FLAT)
    if kernel.endswith("align"):
        return width, ONE_VALUE if which == "forward" else width
    length = {"unshuffle": shape.decoder_width * item, "bias_gelu": 4 * width}.get(kernel, width)
    return length, length


def allowed_bits(row_bytes):
    """The widest access that starts on a multiple of itself in every row, up to 128 bits."""
    return 8 * math.gcd(row_bytes, 16)


def test_what_a_row_allows():
    assert [allowed_bits(size) for size in (1536, 1176, 588, 42, 3)] == [128, 64, 32, 16, 8]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("ViT-B/16", "bfloat16"), ("ViT-L/16", "bfloat16"), ("ViT-H/14", "bfloat16"), ("ViT-H/14", "float32")],
)
def test_accesses_are_as_wide_as_rows_allow(name, dtype):
    shape, narrow = SHAPES[name], []
    for kernel, kind, sized in rows.plan(CASES, [dtype], [shape]):
        item = rows.DTYPES[dtype].itemsize
        for which, launches in rows.record_passes(rows.build(kernel, kind, sized, "cpu")).items():
            if not launches:
                continue
            found = rows.summarise_launches(launches, "sm_90")
            allowed = map(allowed_bits, rows_of(kernel, which, sized, item))
            for access, bits in zip(("load_bits", "store_bits"), allowed, strict=True):
                if found[access] < bits:
                    narrow.append((kernel, which, access, found[access], bits))
    assert not narrow
