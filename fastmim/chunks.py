"""A group's numbers in chunks: parts of one parameter, or some parameters one behind the other."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flat:
    """What is kept of a group's numbers, parameter behind parameter."""

    rest: Tensor  # int16
    exp_avg: Tensor  # float32
    exp_avg_sq: Tensor  # float32

    def of(self, chunk: "Chunk") -> "Flat":
        """A view of the chunk's."""
        kept = slice(chunk.begin, chunk.begin + sum(chunk.sizes))
        return Flat(self.rest[kept], self.exp_avg[kept], self.exp_avg_sq[kept])


@dataclass(frozen=True)
class Piece:
    """Numbers of one parameter."""

    index: int  # of the parameter in its group
    start: int
    stop: int
    whole: bool

    def of(self, tensors: list[Tensor]) -> Tensor:
        """These numbers in flat tensors, one for each parameter."""
        flat = tensors[self.index]
        return flat if self.whole else flat[self.start : self.stop]


@dataclass(frozen=True)
class Chunk:
    """Numbers of a group that are updated at once: pieces that lie one behind the other."""

    begin: int
    pieces: list[Piece]

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Numbers of each piece."""
        return [piece.stop - piece.start for piece in self.pieces]

    def of(self, tensors: list[Tensor]) -> list[Tensor]:
        """These numbers in flat tensors, one for each parameter: a view of each piece."""
        return [piece.of(tensors) for piece in self.pieces]

    def fill(self, room: Tensor, tensors: list[Tensor]) -> Tensor:
        """Copy these numbers of flat tensors, one for each parameter, into a flat tensor; returns what they fill."""
        part = room[: sum(self.sizes)]
        torch._foreach_copy_(part.split(self.sizes), self.of(tensors))
        return part

    def empty(self, part: Tensor, tensors: list[Tensor]) -> None:
        """Copy what `fill` gave back into the tensors that it came from."""
        torch._foreach_copy_(self.of(tensors), part.split(self.sizes))


@dataclass(frozen=True)
class GroupStep:
    """A step of a group: its options and what is read and written, flat."""

    options: dict  # lr, betas, eps and weight_decay
    kept: Flat
    lows: list[Tensor]  # int16, the bits of each parameter
    gradients: list[Any]  # each a Tensor, or None for a parameter without one, of which no chunk has a piece
    chunks: list[Chunk]


@functools.lru_cache
def chunks_of(sizes: tuple[int, ...], lengths: tuple[int, ...], most: int) -> list[Chunk]:
    """Chunks of a group, of at most so many numbers.

    Args:
        sizes: of each parameter's gradient, 0 without one.
        lengths: of each parameter.
        most: numbers of a chunk.
    """
    chunks: list[Chunk] = []
    left = begin = 0
    for index, (size, length) in enumerate(zip(sizes, lengths, strict=True)):
        if not size:
            left = 0
        done = 0
        while done < size:
            if not left:
                chunks.append(Chunk(begin + done, []))
                left = most
            stop = min(size, done + left)
            chunks[-1].pieces.append(Piece(index, done, stop, whole=stop - done == size))
            left -= stop - done
            done = stop
        begin += length
    return chunks
