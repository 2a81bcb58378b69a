"""Memory that a step frees is there for the next one."""

import subprocess
import sys
from pathlib import Path

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


# Between blocks that stay, which glibc gives back at the heap's end alone.
HOLES = """
import ctypes
from fastmim.heap import give_heap_back, keep_heap

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
keep_heap()
blocks = [libc.malloc(ctypes.c_size_t(2**20)) for _ in range(200)]
for block in blocks:
    ctypes.memset(block, 1, 2**20)
for block in blocks[::2]:
    libc.free(ctypes.c_void_p(block))
def held():
    return int(open("/proc/self/statm").read().split()[1]) // 256
before = held()
give_heap_back()
print(before - held(), sum(ctypes.string_at(block + 2**19, 1) == b"\\1" for block in blocks[1::2]))
"""


def test_holes_are_given_back_and_what_lies_between_stays():
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    returned, whole = map(int, done.stdout.split())
    assert returned > 90 and whole == 100


# How often an engine has given the heap back: once built, and after each of three steps.
STEPS = """
from benchmarks.gloo import SMALL, FixedBatch, make_config
from fastmim import engine

given = []
engine.give_heap_back = lambda: given.append(1)
words = [*SMALL, "optim.batch_size=2", "model.size=tiny", "model.depth=1", "data.image_size=32"]
batch = FixedBatch(make_config(words))
counts = [len(given)]
for _ in range(3):
    batch.step()
    counts.append(len(given))
print("counts", counts)
"""


def test_an_engine_gives_the_heap_back_when_built_and_after_its_first_step():
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", STEPS], cwd=root, capture_output=True, text=True, check=False
    )
    assert "counts [1, 2, 2, 2]" in done.stdout, done.stderr
