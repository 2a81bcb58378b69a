import ast
import os
import subprocess
import sys
from pathlib import Path

import fastmim.kernels
import pytest
import torch
from fastmim.kernels import _dispatch, gather_patches, gather_tokens, sample_random_mask

FOLDER = Path(fastmim.kernels.__file__).parent


@pytest.mark.parametrize("mode", _dispatch.MODES)
def test_mode_is_read_from_the_environment(monkeypatch, mode):
    monkeypatch.setenv("FASTMIM_KERNELS", mode)
    assert _dispatch.read_mode() == mode


def test_mode_defaults_to_auto(monkeypatch):
    monkeypatch.delenv("FASTMIM_KERNELS", raising=False)
    assert _dispatch.read_mode() == "auto"


def test_unknown_mode_is_one_clear_error(monkeypatch):
    monkeypatch.setenv("FASTMIM_KERNELS", "cuda")
    with pytest.raises(
        ValueError, match=r"^FASTMIM_KERNELS is 'cuda'; expected one of auto, interpret, reference$"
    ):
        _dispatch.read_mode()


@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True)])
def test_debug_is_read_from_the_environment(monkeypatch, value, expected):
    monkeypatch.setenv("FASTMIM_DEBUG", value)
    assert _dispatch.read_debug() is expected


def test_unknown_debug_value(monkeypatch):
    monkeypatch.setenv("FASTMIM_DEBUG", "yes")
    with pytest.raises(ValueError, match=r"^FASTMIM_DEBUG is 'yes'; expected 0 or 1$"):
        _dispatch.read_debug()


class OnCuda:
    """As much of a CUDA tensor as the choice of an implementation looks at."""

    is_cuda, is_cpu, device = True, False, torch.device("cuda")


@pytest.mark.parametrize(
    ("mode", "cpu", "cuda"), [("auto", False, True), ("interpret", True, True), ("reference", False, False)]
)
def test_what_runs_where(monkeypatch, mode, cpu, cuda):
    monkeypatch.setattr(_dispatch, "MODE", mode)
    assert _dispatch.use_triton(torch.zeros(1)) is cpu
    assert _dispatch.use_triton(OnCuda) is cuda


def test_backend_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(_dispatch, "MODE", "interpret")
    _dispatch._log_backend.cache_clear()
    with caplog.at_level("INFO", logger="fastmim.kernels"):
        _dispatch.use_triton(torch.zeros(1))
        _dispatch.use_triton(torch.zeros(1))
    assert caplog.messages == ["cpu tensors: Triton kernels (FASTMIM_KERNELS=interpret)"]


def test_environment_selects_the_interpreter():
    script = """
import torch
from fastmim.kernels import _dispatch, gather_tokens
launched = []
launch = _dispatch.launch
_dispatch.launch = lambda *args, **kwargs: (launched.append(args[0].__name__), launch(*args, **kwargs))
x = torch.randn(1, 4, 8)
assert torch.equal(gather_tokens(x, torch.tensor([[2, 1]])), x[:, [2, 1]])
assert launched == ["_gather_tokens_forward_kernel"], launched
"""
    environment = os.environ | {"FASTMIM_KERNELS": "interpret"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)


def test_interpreter_leaves_triton_as_it_was(monkeypatch):
    monkeypatch.setattr(_dispatch, "MODE", "interpret")
    tl = _dispatch.tl
    places = (tl, tl.core, tl.standard, tl.math, tl.random, tl.tensor)
    before = [dict(vars(place)) for place in places]
    images, ids = torch.zeros(1, 8, 8, 1, dtype=torch.uint8), torch.tensor([[2, 1]])
    gather_patches(images, ids, 4, torch.zeros(1), torch.ones(1), torch.float32)
    gather_tokens(torch.zeros(1, 4, 8, requires_grad=True), ids).sum().backward()
    sample_random_mask(0, ids[0], ids[0], patches=4, keep=2)
    for place, attributes in zip(places, before, strict=True):
        changed = [name for name, value in attributes.items() if vars(place)[name] is not value]
        assert not changed, place


def test_ranges_are_read_on_cuda_only_in_debug_mode(monkeypatch):
    class Ids:
        device = torch.device("cuda")

        def aminmax(self):
            return torch.tensor(0), torch.tensor(9)

    monkeypatch.setattr(_dispatch, "DEBUG", False)
    _dispatch.check_range("ids", Ids(), 0, 4)
    monkeypatch.setattr(_dispatch, "DEBUG", True)
    with pytest.raises(ValueError, match=r"ids has values 0\.\.9; wanted 0\.\.3"):
        _dispatch.check_range("ids", Ids(), 0, 4)


def test_kernels_import_torch_and_triton_only():
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            else:
                assert not isinstance(node, ast.ImportFrom) or node.level == 1, path.name
                continue
            for module in modules:
                top = module.split(".")[0]
                ours = module.startswith("fastmim.kernels.")
                assert ours or top in ("torch", "triton") or top in sys.stdlib_module_names, (
                    f"{path.name}: {module}"
                )


def test_the_folder_imported_by_its_bare_name_registers_nothing_twice():
    code = "import fastmim.kernels, kernels; assert kernels.unshuffle is fastmim.kernels.unshuffle"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
