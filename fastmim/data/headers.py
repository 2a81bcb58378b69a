"""Read the headers of many files side by side."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from fastmim.data.scan import Header
from fastmim.data.table import Table

_THREADS = 16
_CHUNK = 256
_KEEP_EVERY_S = 60


def read_headers(
    table: Table,
    rows: np.ndarray,
    read: Callable[[int], Header],
    progress: bool,
    name: str,
    keep: Callable[[], None],
) -> None:
    """Enter the headers of some rows in their table.

    Args:
        table: what is filled.
        rows: int64 [m], which of it.
        read: the header of a row.
        progress: show a bar.
        name: of the source, for the bar.
        keep: is called about once a minute, and at the end, whatever ends it.
    """
    chunks = np.array_split(rows, max(1, len(rows) // _CHUNK))
    kept = time.monotonic()
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=len(rows), desc=f"scan {name}", unit=" files", disable=not progress) as bar,
    ):
        try:
            headers_of = pool.map(lambda chunk: [read(row) for row in chunk.tolist()], chunks)
            for chunk, headers in zip(chunks, headers_of, strict=True):
                for row, header in zip(chunk.tolist(), headers, strict=True):
                    table.set(row, header)
                bar.update(len(chunk))
                if time.monotonic() - kept >= _KEEP_EVERY_S:
                    keep()
                    kept = time.monotonic()
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest
            keep()
