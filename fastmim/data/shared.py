"""One scan per node: the index of a source, agreed on by all ranks."""

from fastmim.config import DataConfig
from fastmim.data.index import Index, build_index
from fastmim.errors import DataError
from fastmim.ranks import Ranks


def open_index(source: str, config: DataConfig, ranks: Ranks, option: str = "data.source") -> Index:
    """Scan on each node's first rank, read the cache on the others, and see that all found the same images.

    Raises:
        DataError: on every rank, when the source cannot be used on one or differs between nodes.
    """
    ranks.run_on_first(lambda: build_index(source, config, option=option), each_node=True)
    index = build_index(source, config, progress=False, option=option)
    prints = ranks.gather(index.fingerprint)
    if len(set(prints)) > 1:
        other = next(rank for rank, fingerprint in enumerate(prints) if fingerprint != prints[0])
        raise DataError(f"{option}={source!r} holds other images on rank {other} than on rank 0")
    return index
