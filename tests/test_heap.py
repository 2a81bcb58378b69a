"""Memory that a step frees is there for the next one."""

import subprocess
import sys

import pytest

# Four blocks of 24 MiB are freed together: more than glibc keeps by itself at the heap's end. Where small blocks lie
# between, the heap settles after some turns.
TURNS = """
import resource, torch
from fastmim.heap import keep_heap
keep_heap()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    before = faults()
    blocks = [torch.ones(6 * 2**20) for _ in range(4)]
    del blocks
    print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's own settings")
def test_freed_memory_costs_no_page_fault_again():
    done = subprocess.run([sys.executable, "-c", TURNS], capture_output=True, text=True, check=True)
    assert max(map(int, done.stdout.split()[-6:])) < 4 * 24 * 2**20 // 4096 / 20
