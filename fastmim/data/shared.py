"""One scan per node: the index of a source, agreed on by all ranks."""

import pickle
import tempfile
from pathlib import Path

from fastmim.config import DataConfig
from fastmim.data.index import Index, build_index
from fastmim.errors import DataError
from fastmim.ranks import Ranks


def open_index(source: str, config: DataConfig, ranks: Ranks, option: str = "data.source") -> Index:
    """Scan on each node's first rank, hand the index to its others, and see that all nodes found the same images.

    Storage is asked for a folder's files once a node, however many ranks are there.

    Raises:
        DataError: on every rank, when the source cannot be used on one or differs between nodes.
    """
    index = ranks.run_on_first(lambda: build_index(source, config, option=option), each_node=True)
    laid = ranks.run_on_first(lambda: _lay_down(index), each_node=True) if ranks.world_size > 1 else None
    # A launcher numbers the ranks of a node in a row: the last first rank before this one is of the same node.
    places = [place for place in ranks.gather(laid)[: ranks.rank + 1] if place is not None]
    if index is None:
        index = pickle.loads(places[-1].read_bytes())
    prints = ranks.gather(index.fingerprint)  # all have read by then
    if laid is not None:
        laid.unlink()
    if len(set(prints)) > 1:
        other = next(rank for rank, fingerprint in enumerate(prints) if fingerprint != prints[0])
        raise DataError(f"{option}={source!r} holds other images on rank {other} than on rank 0")
    return index


def _lay_down(index: Index | None) -> Path:
    """Write an index where the other ranks of this node, and no other user, can read it."""
    with tempfile.NamedTemporaryFile(prefix="fastmim-index-", delete=False) as file:
        pickle.dump(index, file, protocol=5)
    return Path(file.name)
