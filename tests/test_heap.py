"""Memory that a step frees is there for the next one."""

import subprocess
import sys

# Four blocks of 24 MiB, freed together: more than glibc keeps at the heap's end unless it is told to. No library is
# loaded that would put blocks of its own behind them.
TURNS = """
import ctypes, resource, sys
from fastmim.heap import keep_heap

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
if sys.argv[1] == "kept":
    keep_heap()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(ctypes.c_size_t(24 * 2**20)) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, 24 * 2**20)
    for block in blocks:
        libc.free(ctypes.c_void_p(block))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Page faults of the last turn."""
    done = subprocess.run([sys.executable, "-c", TURNS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_memory_costs_no_page_fault_again():
    pages = 4 * 24 * 2**20 // 4096
    assert faults("given back") > 0.9 * pages  # what the setting is for
    assert faults("kept") < pages / 20
