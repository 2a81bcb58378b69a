"""Which nvJPEG a process decodes with: DALI's, although torchvision brings an older one of the same name."""

import subprocess
import sys

import pytest

from fastmim import nvjpeg

# A pipeline loads nvJPEG where there is no GPU, too.
TOLD = """
import torchvision
from nvidia.dali import Pipeline, fn
pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
with pipeline:
    pipeline.set_outputs(fn.decoders.image(fn.external_source(name="file", ndim=1), device="cpu"))
pipeline.build()
from fastmim import nvjpeg
from fastmim.data.pipeline import _CUDA
print("found", *nvjpeg.found_version(_CUDA), nvjpeg.interpolates_windows(_CUDA), nvjpeg.interpolates_windows(_CUDA))
"""


def told(before: str) -> tuple[list[str], str]:
    """What a process finds that first runs `before`, and its other stream."""
    done = subprocess.run([sys.executable, "-c", before + TOLD], capture_output=True, text=True, check=True)
    return next(line for line in done.stdout.splitlines() if line.startswith("found")).split()[
        1:
    ], done.stderr


def test_dali_decodes_with_the_one_that_came_with_it():
    (major, minor, interpolates, _), errors = told("import fastmim")
    assert (int(major), int(minor)) >= (13, 2) and interpolates == "True"
    assert "chroma" not in errors


def test_an_older_one_that_was_there_first_is_told_once():
    (*version, interpolates, _), errors = told("import torchvision")
    if tuple(map(int, version)) >= (13, 2):
        pytest.skip("this torchvision brings one that does as well")
    assert interpolates == "False"
    assert errors.count(f"nvJPEG is {'.'.join(version)}; interpolated chroma wants 13.2") == 1


def test_none_is_needed():
    assert nvjpeg.found_version(1) is None and nvjpeg.interpolates_windows(1)
