"""Predicted bytes against those of real tensors: DeepSpeed's states on two ranks, what a forward pass keeps."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import memory
from benchmarks.gloo import make_config
from fastmim.deepspeed_fragment import bucket_settings
from fastmim.errors import ConfigError
from fastmim.memory import parameter_sizes, predict_memory
from fastmim.models import blocks
from fastmim.objectives import build_objective


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16"), (3, "bf16")])
def test_states_of_two_ranks(pair, tiny, stage, precision):
    words = [*tiny, f"{memory.STAGE}={stage}", f"train.precision={precision}"]
    predicted = predict_memory(make_config(words), precision, 2)
    for measured in pair.call(memory.measure, words, 1, False):
        assert measured["precision"] == precision
        assert predicted.parameters == pytest.approx(measured["parameters"], rel=0.02)
        assert predicted.optimiser == pytest.approx(measured["optimiser"], rel=0.02)


@pytest.mark.parametrize("variant", ["plain", "checkpointing", "matmul", "mask token"])
def test_activations(tiny, variant):
    words = {
        "checkpointing": ["train.activation_checkpointing=true", "model.depth=8"],
        "mask token": ["objective.mask_token_in_encoder=true"],
    }.get(variant, [])
    config = make_config([*tiny, "optim.batch_size=8", *words])
    attention = "matmul" if variant == "matmul" else "sdpa"
    objective = build_objective(config, attention)
    images = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
    ids = torch.arange(8)
    batch = SimpleNamespace(images=images, epochs=ids * 0, positions=ids)
    objective(batch)  # makes what calls share, which is no activation
    kept, loss = memory.kept_by(lambda: objective(batch)["loss"], torch.device("cpu"))
    predicted = predict_memory(config, "fp32", 1, on_cpu=True)
    assert predicted.activations == pytest.approx(kept, rel=memory.TOLERANCE["activations"])
    assert loss.isfinite()


def test_activations_of_a_gpu_are_those_of_blocks_that_compute_nothing_again(tiny, monkeypatch):
    monkeypatch.setattr(blocks, "runs_by_rows", lambda *_: False)
    config = make_config([*tiny, "optim.batch_size=8"])
    objective = build_objective(config, "sdpa")
    ids = torch.arange(8)
    images = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
    batch = SimpleNamespace(images=images, epochs=ids * 0, positions=ids)
    kept, _ = memory.kept_by(lambda: objective(batch)["loss"], torch.device("cpu"))
    predicted = predict_memory(config, "fp32", 1).activations
    assert predicted == pytest.approx(kept, rel=memory.TOLERANCE["activations"])


@pytest.mark.parametrize(("stage", "buffers"), [(1, 2), (2, 2), (3, 1)])
def test_on_gpus_gradients_are_summed_in_buckets_that_fill_during_the_backward_pass(stage, buffers):
    config = make_config([f"{memory.STAGE}={stage}", "model.size=large", "optim.batch_size=8"])
    settings = bucket_settings(stage, [10, 60 * 10**6, 30 * 10**6], 8, on_cpu=False)
    assert settings == {"overlap_comm": True, "reduce_bucket_size": 60 * 10**6}
    # One fills while another is summed; ZeRO-3 has one.
    assert predict_memory(config, "bf16", 8).buckets == buffers * 50 * 10**6 * 2
    whole = sum(parameter_sizes(config))
    assert bucket_settings(stage, [whole], 8, on_cpu=True) == {"reduce_bucket_size": whole}
    told = make_config([f"{memory.STAGE}={stage}", "deepspeed.zero_optimization.reduce_bucket_size=7"])
    assert predict_memory(told, "bf16", 8).buckets == buffers * 7 * 2


def test_without_zero_gradients_are_summed_in_buckets_that_end_with_a_whole_gradient():
    words = [f"{memory.STAGE}=0", "model.size=large", "optim.batch_size=8"]
    largest = 4 * 1024**2
    assert predict_memory(make_config(words), "bf16", 8).buckets == (50 * 10**6 + largest) * 2
    assert predict_memory(make_config(words), "bf16", 1).buckets == 0
    told = make_config([*words, "deepspeed.zero_optimization.reduce_bucket_size=7"])
    assert predict_memory(told, "bf16", 8).buckets == (7 + largest) * 2


@pytest.mark.parametrize(("stage", "share"), [(0, 1), (2, 2)])
def test_an_average_of_the_weights_takes_four_bytes_each(tiny, stage, share):
    words = [*tiny, f"{memory.STAGE}={stage}"]
    plain = predict_memory(make_config(words), "bf16", 2)
    averaged = predict_memory(make_config([*words, "train.ema_decay=0.999"]), "bf16", 2)
    count = sum(parameter_sizes(make_config(words)))
    assert averaged.states - plain.states == 4 * count // share


def test_the_parameters_are_those_of_the_model(tiny):
    config = make_config(tiny)
    built = [parameter.numel() for parameter in build_objective(config).parameters()]
    assert parameter_sizes(config) == built


def test_a_larger_world_fits_as_large_a_model():
    rows = memory.fitting(80e9, 64, [1, 64])
    assert {(row["stage"], row["ranks"]) for row in rows} == {(s, n) for s in range(4) for n in (1, 64)}
    order = [None, *memory.SIZES]
    for one, many in zip(rows[::4], rows[2::4], strict=True):
        assert (one["ranks"], many["ranks"]) == (1, 64)
        assert order.index(one["largest"]) <= order.index(many["largest"])
    assert all(row["peak"] <= 0.9 * 80e9 for row in rows if row["largest"])
    table = memory.fits_table(rows).splitlines()
    assert len(table) == 2 + 8 and "64 GPUs" in table[0]


def test_other_objectives_are_refused(tiny):
    with pytest.raises(ConfigError, match=r"objective\.name='simmim'"):
        predict_memory(make_config([*tiny[:5], "objective.name=simmim"]), "fp32", 1)


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_what_fits_is_printed_alone(option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        memory.main(["--fits", "80e9", option, str(tmp_path / "x")])
    assert "--fits prints a table alone" in capsys.readouterr().err
