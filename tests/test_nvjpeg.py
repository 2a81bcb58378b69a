"""Which nvJPEG a process decodes with: DALI's, although torchvision brings an older one of the same name."""

import subprocess
import sys
from pathlib import Path

import pytest
from nvidia.dali import fn

from fastmim import nvjpeg
from fastmim.data.index import build_index
from fastmim.data.pipeline import image_pipeline
from tests.launching import write_images

ROOT = Path(__file__).parents[1]

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
    command = [sys.executable, "-c", before + TOLD]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return next(line for line in done.stdout.splitlines() if line.startswith("found")).split()[
        1:
    ], done.stderr


@pytest.mark.parametrize("first", ["fastmim", "benchmarks.loaders"])
def test_dali_decodes_with_the_one_that_came_with_it(first):
    (major, minor, interpolates, _), errors = told(f"import {first}")
    assert (int(major), int(minor)) >= (13, 2) and interpolates == "True"
    assert "chroma" not in errors


def test_an_older_one_that_was_there_first_is_told_once():
    (*version, interpolates, _), errors = told("import torchvision")
    old = tuple(map(int, version)) < (13, 2)  # as torchvision 0.26 to 0.29 bring it
    assert interpolates == str(not old)
    assert errors.count(f"nvJPEG is {'.'.join(version)}; interpolated chroma wants 13.2") == old


@pytest.mark.parametrize("able", [False, True])
def test_a_gpu_is_asked_for_what_its_nvjpeg_can(able, monkeypatch, tmp_path, tiny_config):
    write_images(tmp_path, 1, suffix=".jpg")
    config = tiny_config().data
    asked = []

    def decode(*inputs, **options):
        asked.append((options["device"], options["jpeg_fancy_upsampling"]))
        raise InterruptedError  # a pipeline for a GPU cannot be built without one

    monkeypatch.setattr(fn.decoders, "image_slice", decode)
    monkeypatch.setattr(nvjpeg, "interpolates_windows", lambda cuda: able)
    index = build_index(str(tmp_path), config, progress=False)
    for device_id in (0, None):
        with pytest.raises(InterruptedError):
            image_pipeline(index, config, batch_size=1, threads=1, prefetch=1, crops=1, device_id=device_id)
    assert asked == [("mixed", able), ("cpu", True)]


def test_none_is_needed():
    assert nvjpeg.found_version(1) is None and nvjpeg.interpolates_windows(1)
