"""The examples in `kernels/README.md` run, and its tables are those that the benchmark writes."""

import re
from pathlib import Path

import fastmim.kernels
import pytest
import torch
from fastmim.kernels import _dispatch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from benchmarks import markdown, readme
from benchmarks.cases import CASES
from benchmarks.problems import SHAPES

TEXT = Path(fastmim.kernels.__file__).with_name("README.md").read_text()


def example(before):
    """Run the first Python block after a text; return its names."""
    names = {}
    exec(re.search(r"```python\n(.*?)```", TEXT[TEXT.index(before) :], re.DOTALL)[1], names)
    return names


def test_the_first_example_runs(backend):
    names = example("## Use")
    assert names["visible"].shape == (8, 49, 768)
    assert names["pred"].grad.isfinite().all() and names["loss"] > 0


@pytest.mark.parametrize("norm_pix", [False, True])
def test_vit_mae_with_kernels_is_the_unmodified_model(backend, norm_pix):
    config = ViTMAEConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32,
        patch_size=8, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=32, norm_pix_loss=norm_pix,
    )  # fmt: skip
    device = torch.get_default_device()
    original = ViTMAEForPreTraining(config).to(device)
    fast = example("<!-- example: ViTMAE -->")["FastViTMAE"](config).to(device)
    fast.load_state_dict(original.state_dict())
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    losses = fast(images, noise=noise), original(images, noise=noise).loss
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    trained = [name for name, parameter in original.named_parameters() if parameter.requires_grad]
    for name in trained:
        expected = original.get_parameter(name).grad
        # The gradient of a key's bias is zero but for rounding.
        tolerance = 1e-9 + 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(fast.get_parameter(name).grad, expected, rtol=1e-5, atol=tolerance)
    assert _dispatch.use_triton(images) == (backend != "reference")


def test_the_example_is_short():
    block = re.search(r"<!-- example: ViTMAE -->\n```python\n(.*?)```", TEXT, re.DOTALL)[1]
    assert len([line for line in block.splitlines() if line]) <= 15


def test_every_kernel_has_a_table_of_every_shape():
    tables = dict(re.findall(r"<!-- table: (\w+) -->\n(.*?)\n?<!-- end -->", TEXT, re.DOTALL))
    assert tables.keys() == {*CASES, "logits"}
    assert tables.pop("logits") == readme.logits_table()
    for kernel, lines in tables.items():
        header, _, *rows = lines.splitlines()
        assert header == markdown.table(readme.HEADER, []).splitlines()[0]
        assert {row.split(" batch ")[0].removeprefix("| ") for row in rows} == set(SHAPES), kernel


def row(kernel="gather_tokens", **changes):
    columns = ("launches", "registers", "spills", "shared_bytes", "load_bits", "store_bits", "eager_launches")
    return {
        **dict.fromkeys(columns, 1),
        **{"kernel": kernel, "pass": "forward", "dtype": "bfloat16", "arch": "sm_90", "shape": "S batch 1"},
        **{"bytes": 1_100_000, "floor_bytes": 1_000_000, "eager_bytes": 3_000_000, "occupancy": None},
        "predicted_us": {"A100": 3.0, "H100": 2.0, "B200": 1.0},
        **changes,
    }


def test_tables_are_filled_between_their_markers():
    text = "a\n<!-- table: gather_tokens -->\nold\n<!-- end -->\nb"
    tables = readme.tables([row(), row("unshuffle")])
    filled = markdown.fill(text, tables)
    assert filled.startswith("a\n<!-- table: gather_tokens -->\n| shape") and filled.endswith(
        "<!-- end -->\nb"
    )
    assert "| 1.1 | 1.100 | 3.0 | 1 | 3.0 / 2.0 / 1.0 |" in filled and "old" not in filled
    assert markdown.fill(filled, tables) == filled


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(), row(arch="sm_80")], r"rows have arch sm_80, sm_90; wanted one"),
        ([row(), row(dtype="float32")], r"rows have dtype bfloat16, float32; wanted one"),
        ([row("unshuffle")], r"no rows of gather_tokens; wanted some"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        markdown.fill("<!-- table: gather_tokens -->\n<!-- end -->", readme.tables(rows))
