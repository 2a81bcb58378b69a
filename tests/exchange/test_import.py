"""Weights of other libraries, made by those libraries where they can be, become ours."""

import argparse
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from fastmim.errors import CheckpointError, ConfigError
from fastmim.exchange.inward import import_weights
from fastmim.exchange.outward import export_weights
from fastmim.exchange.weights import read_weights
from fastmim.masking import mask_from_order
from fastmim.objectives import build_objective
from tests.exchange.peers import (
    images_of,
    pixels_of,
    published,
    random_objective,
    randomised,
    saved,
    whole_features,
)

ROUND_TRIPS = {
    "timm": ("t.safetensors", "timm", True),
    "mae encoder": ("m.pth", "mae", True),
    "mae": ("m.pth", "mae", False),
    "mae safetensors": ("m.safetensors", "mae", False),
    "transformers encoder": ("h", "transformers", True),
    "transformers": ("h", "transformers", False),
}


def test_files_of_other_libraries_are_told_to_be_imported(tiny_config, tmp_path):
    torch.save(published(tiny_config()).state_dict(), tmp_path / "mae.pth")
    timm_file = str(tmp_path / "timm.safetensors")
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1).state_dict(), timm_file)
    ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "hub"
    )
    for source in ("mae.pth", "timm.safetensors", "hub"):
        with pytest.raises(
            CheckpointError, match=rf"{source} is no weights file of fastmim.*fastmim import reads"
        ):
            read_weights(str(tmp_path / source))


@pytest.mark.parametrize("asked", ["auto", "by name"])
@pytest.mark.parametrize("trip", ROUND_TRIPS)
def test_there_and_back_is_bitwise_the_same(trip, asked, tiny_config, tmp_path):
    name, layout, encoder_only = ROUND_TRIPS[trip]
    config = tiny_config("data.mean=[0.1,0.2,0.3]", "objective.norm_pix_loss=false", "model.mlp_ratio=3.3")
    ours = str(saved(random_objective(config), config, tmp_path / "ours.safetensors"))
    export_weights(ours, str(tmp_path / name), layout, encoder_only)
    back = str(tmp_path / "back.safetensors")
    import_weights(str(tmp_path / name), back, "auto" if asked == "auto" else layout)
    first, second = read_weights(ours), read_weights(back)
    wanted = first.encoder_only().tensors if encoder_only else first.tensors
    assert second.tensors.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in second.tensors.items())
    assert second.config.objective == config.objective and second.config.data == config.data
    assert int(second.config.model.width * second.config.model.mlp_ratio) == int(32 * 3.3)
    assert (
        second.history["step"] == "7"
        and second.history["imported_from"] == f"{name} ({second_layout(trip, asked)})"
    )


def second_layout(trip, asked):
    # Without a decoder, the published MAE file has timm's names.
    return "timm" if (trip, asked) == ("mae encoder", "auto") else ROUND_TRIPS[trip][1]


def with_fixed_positions(model, config):
    """Our tables in a peer that has learned ones."""
    model.pos_embed.data.copy_(build_objective(config).encoder.pos_embed)
    return model


def loaded(path):
    weights = read_weights(str(path))
    objective = build_objective(weights.config).eval()
    objective.load_state_dict(weights.tensors, strict=False)
    return objective, weights.config


TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def test_a_model_of_timm_with_its_head(tiny_config, tmp_path):
    model = randomised(timm.create_model("vit_base_patch16_224", num_classes=5, **TIMM))
    with_fixed_positions(model, tiny_config())
    # The row of the cls token is a constant beside the token, so no fixed table is missed.
    model.pos_embed.data[:, 0] = torch.randn(32)
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    out = tmp_path / "ours.safetensors"
    with pytest.raises(ConfigError, match=r"does not tell everything; add model.heads=\.\.\."):
        import_weights(str(tmp_path / "timm.safetensors"), str(out))
    told = import_weights(str(tmp_path / "timm.safetensors"), str(out), overrides=["model.heads=2"])
    assert "left out: head.bias, head.weight" in told and "data.mean and data.std are not in the file" in told
    assert "encoder (2 blocks of width 32, 2 heads, patches of 8)" in told
    objective, config = loaded(out)
    images = images_of(config)
    with torch.no_grad():
        features = model.forward_features(pixels_of(images, config))
    assert (features - whole_features(objective, images)).abs().max() < 1e-5


def test_learned_positions_are_kept(tmp_path):
    model = randomised(timm.create_model("vit_base_patch16_224", num_classes=0, **TIMM))
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    arguments = str(tmp_path / "timm.safetensors"), str(tmp_path / "ours.safetensors")
    with pytest.raises(ConfigError, match=r"does not tell everything; add data.image_size="):
        import_weights(*arguments, overrides=["model.heads=2"])
    with pytest.raises(ConfigError, match=r"model.positions=sincos: .* has learned"):
        import_weights(
            *arguments, overrides=["model.heads=2", "data.image_size=32", "model.positions=sincos"]
        )
    told = import_weights(*arguments, overrides=["model.heads=2", "data.image_size=32"])
    assert "left out" not in told
    objective, config = loaded(tmp_path / "ours.safetensors")
    assert config.model.positions == "learned"
    images = images_of(config)
    with torch.no_grad():
        features = model.forward_features(pixels_of(images, config))
    assert (features - whole_features(objective, images)).abs().max() < 1e-5
    # And out again.
    told = export_weights(arguments[1], str(tmp_path / "back.safetensors"), "timm")
    assert "positions: the learned table, for 4 x 4 patches" in told
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())
    # For larger images, as timm resizes.
    export_weights(arguments[1], str(tmp_path / "large.safetensors"), "timm", image_size=(48, 40))
    table = load_file(tmp_path / "large.safetensors")["pos_embed"]
    torch.testing.assert_close(table, resample_abs_pos_embed(model.pos_embed.detach(), [6, 5]))


def test_learned_positions_are_left_out_when_asked(tmp_path):
    model = randomised(timm.create_model("vit_base_patch16_224", num_classes=0, **TIMM))
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    arguments = str(tmp_path / "timm.safetensors"), str(tmp_path / "ours.safetensors")
    with pytest.raises(ConfigError, match=r"makes 8 x 8 patches; .* has 16 positions"):
        import_weights(*arguments, overrides=["model.heads=2", "data.image_size=64"], fixed_positions=True)
    told = import_weights(*arguments, overrides=["model.heads=2", "data.image_size=32"], fixed_positions=True)
    assert "the learned ones were left out" in told
    tensors = load_file(tmp_path / "ours.safetensors")
    assert "encoder.pos_embed" not in tensors
    torch.testing.assert_close(
        tensors["encoder.cls_token"], (model.cls_token + model.pos_embed[:, :1]).detach()
    )


HUGGING = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 64,
}


def test_what_transformers_saves_with_a_decoder(tiny_config, tmp_path):
    peer = randomised(
        ViTMAEForPreTraining(ViTMAEConfig(**HUGGING, **DECODER, mask_ratio=0.5, norm_pix_loss=True))
    )
    # A fresh ViTMAE has tables of zeros; the published ones have sin-cos tables.
    objective = build_objective(tiny_config())
    peer.vit.embeddings.position_embeddings.data.copy_(objective.encoder.pos_embed)
    peer.decoder.decoder_pos_embed.data.copy_(objective.decoder.pos_embed)
    peer.save_pretrained(tmp_path / "peer")
    out = tmp_path / "ours.safetensors"
    import_weights(str(tmp_path / "peer"), str(out), "transformers")
    objective, config = loaded(out)
    assert config.mask.ratio == 0.5 and config.objective.norm_pix_loss and config.objective.decoder_heads == 4
    images, noise = images_of(config), torch.rand(2, 16)
    with torch.no_grad():
        loss = objective.loss(images, mask_from_order(noise.argsort(dim=1), 8))[0]
        wanted = peer(pixel_values=pixels_of(images, config), noise=noise).loss
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)


def test_what_transformers_saves_of_an_encoder(tiny_config, tmp_path):
    peer = randomised(ViTModel(ViTConfig(**{**HUGGING, "layer_norm_eps": 1e-12})))
    table = build_objective(tiny_config("model.heads=4")).encoder.pos_embed
    peer.embeddings.position_embeddings.data.copy_(table)
    peer.save_pretrained(tmp_path / "peer")
    (tmp_path / "peer" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.1]})
    )
    told = import_weights(str(tmp_path / "peer"), str(tmp_path / "ours.safetensors"))
    assert "left out: pooler.dense.bias, pooler.dense.weight" in told
    assert "layer_norm_eps is 1e-12 there and 1e-06 here" in told
    objective, config = loaded(tmp_path / "ours.safetensors")
    assert config.data.mean == [0.5, 0.4, 0.3] and config.model.heads == 4 and config.model.mlp_ratio == 2
    images = images_of(config)
    with torch.no_grad():
        features = peer(pixels_of(images, config)).last_hidden_state
    assert (features - whole_features(objective, images)).abs().max() < 1e-4


@pytest.mark.parametrize("size", ["[32,32]", "[16,64]"])
def test_a_training_checkpoint_of_facebookresearch(size, tiny_config, tmp_path):
    """Optimiser and arguments beside the model, as the public main_pretrain.py saves them."""
    config = tiny_config(f"data.image_size={size}", "objective.norm_pix_loss=true")
    peer = published(config)
    args = argparse.Namespace(norm_pix_loss=True, mask_ratio=0.75, input_size=32, model="mae_vit_tiny")
    optimizer = torch.optim.AdamW(peer.parameters()).state_dict()
    content = {"model": peer.state_dict(), "optimizer": optimizer, "epoch": 3, "scaler": {}, "args": args}
    torch.save(content, tmp_path / "checkpoint-3.pth")
    out = tmp_path / "ours.safetensors"
    heads = ["model.heads=2", "objective.decoder_heads=2"]
    import_weights(str(tmp_path / "checkpoint-3.pth"), str(out), "mae", heads)
    objective, found = loaded(out)
    assert found.data.image_size == config.data.image_size and found.objective.norm_pix_loss
    images, order = images_of(config), torch.rand(2, 16).argsort(dim=1)
    with torch.no_grad():
        loss = objective.loss(images, mask_from_order(order, 4))[0]
        torch.testing.assert_close(loss, peer(pixels_of(images, config), order), rtol=1e-5, atol=0)


def test_heads_of_the_published_sizes_are_known(tiny_config, tmp_path):
    """`mae_pretrain_vit_base.pth` tells no heads; the published small sizes do not need to be told."""
    wide = ["model.size=tiny", "model.width=192", "model.depth=12", "model.heads=3"]
    config = tiny_config(*wide, "objective.decoder_width=512", "objective.decoder_heads=16")
    torch.save({"model": published(config).state_dict()}, tmp_path / "visualize.pth")
    arguments = str(tmp_path / "visualize.pth"), str(tmp_path / "ours.safetensors")
    with pytest.raises(
        ConfigError, match=r"add objective.norm_pix_loss=\.\.\. \(whether it was trained"
    ) as told:
        import_weights(*arguments)
    assert "heads=" not in str(told.value)
    import_weights(*arguments, overrides=["objective.norm_pix_loss=false"])
    found = read_weights(arguments[1]).config
    assert found.model.heads == 3 and found.objective.decoder_heads == 16


def test_half_precision_becomes_float32(tiny_config, tmp_path):
    config = tiny_config()
    state = {name: tensor.half() for name, tensor in published(config).state_dict().items()}
    torch.save(state, tmp_path / "half.pth")
    told = ["model.heads=2", "objective.decoder_heads=2", "objective.norm_pix_loss=false"]
    import_weights(str(tmp_path / "half.pth"), str(tmp_path / "ours.safetensors"), overrides=told)
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "ours.safetensors").values())


class Custom:
    pass


def test_bad_files_are_refused_in_one_line(tiny_config, tmp_path):
    config = tiny_config()
    state = published(config).state_dict()

    def file(name, content):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    (tmp_path / "noise.pth").write_bytes(b"garbage" * 9)
    (tmp_path / "hi.pth").write_text("hi\n")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 99)
    (tmp_path / "folder").mkdir()
    fewer = {name: tensor for name, tensor in state.items() if name != "norm.weight"}
    reshaped = {**state, "blocks.0.mlp.fc2.weight": torch.zeros(3, 3)}
    shorter = {**state, "decoder_pos_embed": state["decoder_pos_embed"][:, :5]}
    cases = [
        (str(tmp_path / "none.pth"), "auto", "none.pth does not exist"),
        (str(tmp_path / "noise.pth"), "auto", "neither a safetensors nor a PyTorch file"),
        (str(tmp_path / "hi.pth"), "auto", "neither a safetensors nor a PyTorch file"),
        (str(tmp_path / "table.csv"), "auto", "neither a safetensors nor a PyTorch file"),
        (str(tmp_path / "noise.safetensors"), "auto", "is not a safetensors file"),
        (str(tmp_path / "folder"), "auto", r"holds nothing; expected config.json and model.safetensors or"),
        (
            file("custom.pth", {"model": state, "best": Custom()}),
            "auto",
            r"needs .*Custom beside tensors.*may run code",
        ),
        (file("list.pth", [1]), "auto", "holds a list; expected a state dict"),
        (file("empty.pth", {"epoch": 3}), "auto", "holds epoch; expected a state dict, or one under 'model'"),
        (
            file("resnet.pth", {"conv1.weight": torch.zeros(1)}),
            "auto",
            r"holds conv1.weight; expected patch_embed",
        ),
        (file("mae.pth", state), "transformers", r"expected embeddings.patch_embeddings.*\(transformers\)"),
        (
            file("timm.pth", state),
            "timm",
            r"holds decoder_blocks.0.attn.proj.bias.* which fastmim's ViT has not",
        ),
        (file("fewer.pth", fewer), "auto", r"lacks norm.weight \(mae\)"),
        (
            file("shape.pth", reshaped),
            "auto",
            r"blocks.0.mlp.fc2.weight makes \[3, 3\]; expected \[32, 128\]",
        ),
        (file("short.pth", shorter), "auto", "position tables of 4 and 16 patches; expected one number"),
    ]
    for source, layout, message in cases:
        with pytest.raises(CheckpointError, match=message) as told:
            import_weights(source, str(tmp_path / "out.safetensors"), layout)
        assert "\n" not in str(told.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_options_that_contradict_the_file_are_refused(tiny_config, tmp_path):
    config = tiny_config()
    source = str(tmp_path / "mae.pth")
    torch.save(published(config).state_dict(), source)
    out = str(tmp_path / "out.safetensors")
    with pytest.raises(ConfigError, match=r"model.width=64: .*mae.pth has 32"):
        import_weights(source, out, overrides=["model.width=64"])
    with pytest.raises(ConfigError, match=r"model.heads=5; expected a divisor of model.width=32"):
        told = ["model.heads=5", "objective.decoder_heads=2", "objective.norm_pix_loss=true"]
        import_weights(source, out, overrides=told)
    with pytest.raises(ConfigError, match=r"expected a file whose name ends in .safetensors"):
        import_weights(source, str(tmp_path / "out.pth"))
    ours = saved(random_objective(config), config, tmp_path / "ours.safetensors")
    with pytest.raises(CheckpointError, match="is fastmim's own"):
        import_weights(str(ours), out)
    with pytest.raises(ConfigError, match="exists; expected another path, or --force"):
        import_weights(source, str(ours))


def test_settings_of_another_network_are_refused(tmp_path):
    ViTModel(ViTConfig(**HUGGING)).save_pretrained(tmp_path / "peer")
    settings = json.loads((tmp_path / "peer" / "config.json").read_text())
    cases = [
        ("model_type", "dinov2", "expected 'vit' or 'vit_mae'"),
        ("hidden_act", "relu", "expected 'gelu'"),
    ]
    for key, value, message in cases:
        (tmp_path / "peer" / "config.json").write_text(json.dumps({**settings, key: value}))
        with pytest.raises(CheckpointError, match=message):
            import_weights(str(tmp_path / "peer"), str(tmp_path / "out.safetensors"))
