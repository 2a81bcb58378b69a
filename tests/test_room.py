"""Memory that calls share."""

from pathlib import Path

import torch

from fastmim.room import Room


def mapping_of(tensor: torch.Tensor) -> list[str]:
    """The words about the memory of a tensor in this process's list."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        words = line.split()
        start, end = (int(word, 16) for word in words[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return words
    raise LookupError(f"{tensor.data_ptr():x} is not mapped")


def test_it_is_private_and_not_of_the_heap():
    _, access, *_, where = mapping_of(Room().take("a", 3, 1000, torch.float32))
    assert access == "rw-p" and where != "[heap]"


def test_what_fits_lies_in_the_same_memory():
    room = Room()
    first = room.take("a", 4, 6, torch.float32)
    assert first.shape == (4, 6) and room.take("a", 3, 8, torch.float32).data_ptr() == first.data_ptr()
    assert room.take("b", 4, 6, torch.float32).data_ptr() != first.data_ptr()
    assert room.take("a", 4, 6, torch.bfloat16).data_ptr() != first.data_ptr()
    first.fill_(7)
    larger = room.take("a", 5, 6, torch.float32)
    assert larger.shape == (5, 6) and larger.fill_(1).sum() == 30 and (first == 7).all()


def test_no_rows():
    assert Room().take("a", 0, 8, torch.float32).shape == (0, 8)
