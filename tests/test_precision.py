"""The number format of a run, on a CPU that computes bf16 and on one that does not."""

import pytest
import torch

from fastmim import precision
from fastmim.errors import ConfigError
from fastmim.precision import choose_precision

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["with bf16", "without"])
def has_bf16(request, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param)
    for name in ("_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    return request.param


def test_auto_is_what_the_hardware_computes(has_bf16, caplog):
    assert choose_precision("auto", CPU) == ("bf16" if has_bf16 else "fp32")
    assert choose_precision("fp32", CPU) == "fp32"
    assert not caplog.text


def test_bf16_without_hardware_is_multiplied_in_float32_and_fp16_refused(has_bf16, caplog, monkeypatch):
    widened = []
    monkeypatch.setattr(precision, "widen_products", lambda: widened.append(True))
    with caplog.at_level("INFO", "fastmim"):
        assert precision.choose_precision("bf16", CPU) == "bf16"
    assert widened == ([] if has_bf16 else [True])
    assert ("this cpu has none and multiplies in float32" in caplog.text) is not has_bf16
    with pytest.raises(ConfigError, match="this cpu does not compute it; expected bf16 or fp32"):
        choose_precision("fp16", CPU)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_gpu_that_emulates_bf16_is_warned_of(has_bf16, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert choose_precision("bf16", torch.device("cuda")) == "bf16"
    assert ("this cuda emulates it, more slowly than float32" in caplog.text) is not has_bf16
