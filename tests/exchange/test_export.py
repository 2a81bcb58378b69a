"""What `fastmim export` writes, read by the libraries that it is for."""

import json

import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoImageProcessor, ViTMAEForPreTraining, ViTModel

from fastmim import recipes
from fastmim.errors import CheckpointError, ConfigError
from fastmim.exchange.layouts import Architecture
from fastmim.exchange.outward import export_weights
from fastmim.exchange.weights import Weights
from fastmim.masking import mask_from_order
from tests.exchange.peers import PublicMAE, images_of, pixels_of, random_objective, saved, whole_features

# Square or not, 1, 3 or 4 channels, an MLP of another width, normalised targets or plain ones.
VARIANTS = {
    "square": ["objective.norm_pix_loss=true"],
    "wide": ["data.image_size=[16,32]", "model.mlp_ratio=2.5", "objective.norm_pix_loss=false"],
    "one channel": ["data.channels=1", "model.depth=1", "objective.decoder_depth=2"],
    "learned": ["model.positions=learned", "objective.norm_pix_loss=true"],
    "four channels": ["data.channels=4", "mask.ratio=0.5", "objective.norm_pix_loss=false"],
}


@pytest.fixture(params=VARIANTS)
def exported(request, tiny_config, tmp_path):
    config = tiny_config(*VARIANTS[request.param])
    objective = random_objective(config)
    return config, objective, str(saved(objective, config, tmp_path / "ours.safetensors"))


def test_architecture_lists_every_parameter_of_mae(exported):
    config, objective, _ = exported
    shapes = {name: tuple(parameter.shape) for name, parameter in objective.named_parameters()}
    assert Architecture.of(config, decoder=True).shapes() == shapes
    encoder = {name: shape for name, shape in shapes.items() if name.startswith("encoder.")}
    assert Architecture.of(config, decoder=False).shapes() == encoder


def test_timm_loads_strictly_and_sees_the_same(exported, tmp_path):
    config, objective, ours = exported
    told = export_weights(ours, str(tmp_path / "timm.safetensors"), "timm")
    model = eval(told.partition("to load it: ")[2], {"timm": timm}).eval()  # the call that a user is told
    images = images_of(config)
    with torch.no_grad():
        features = model.forward_features(pixels_of(images, config))
    assert (features - whole_features(objective, images)).abs().max() < 1e-5
    data = timm.data.resolve_model_data_config(model)
    assert data["mean"] == tuple(config.data.mean) and data["std"] == tuple(config.data.std)
    assert data["input_size"] == (config.data.channels, *config.data.image_size)


@pytest.mark.parametrize("size, patch", [("base", 16), ("huge", 14), ("tiny", 16)])
def test_timm_call_names_the_standard_sizes(size, patch, tiny_config):
    from fastmim.exchange.outward import timm_call

    config = recipes.override([f"model.size={size}", f"model.patch_size={patch}"])
    told = (
        "{'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225), 'input_size': (3, 224, 224)}, "
        "checkpoint_path='x')"
    )
    assert (
        timm_call("x", config)
        == f"timm.create_model('vit_{size}_patch{patch}_224', num_classes=0, pretrained_cfg_overlay={told}"
    )


def test_transformers_encoder_sees_the_same(exported, tmp_path):
    config, objective, ours = exported
    export_weights(ours, str(tmp_path / "vit"), "transformers", encoder_only=True)
    model, report = ViTModel.from_pretrained(
        tmp_path / "vit", add_pooling_layer=False, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    images = images_of(config)
    with torch.no_grad():
        features = model.eval()(pixels_of(images, config)).last_hidden_state
    assert (features - whole_features(objective, images)).abs().max() < 1e-5


def loss_and_order(config, objective, images):
    order = torch.rand(len(images), config.grid[0] * config.grid[1]).argsort(dim=1)
    with torch.no_grad():
        return objective.loss(images, mask_from_order(order, objective.sampler.keep))[0], order


def test_transformers_decoder_has_the_same_loss(exported, tmp_path):
    config, objective, ours = exported
    out = tmp_path / "vitmae"
    if config.grid[0] != config.grid[1]:
        with pytest.raises(
            ConfigError, match=r"16 x 32 pixels.*square ones only.*--encoder-only, or --image-size"
        ):
            export_weights(ours, str(out), "transformers")
        assert not out.exists()
        return
    export_weights(ours, str(out), "transformers")
    model, report = ViTMAEForPreTraining.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    images = images_of(config)
    loss, order = loss_and_order(config, objective, images)
    with torch.no_grad():
        wanted = model.eval()(pixels_of(images, config), noise=order.argsort(dim=1).float()).loss
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)


def test_transformers_processor_normalises_alike(tiny_config, tmp_path):
    config = tiny_config("data.mean=[0.1,0.2,0.3]", "data.std=[0.4,0.5,0.6]")
    ours = saved(random_objective(config), config, tmp_path / "ours.safetensors")
    export_weights(str(ours), str(tmp_path / "vit"), "transformers", encoder_only=True)
    images = images_of(config)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "vit")
    pixels = processor(list(images.permute(0, 3, 1, 2)), return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels, pixels_of(images, config), rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_mae_has_the_published_names_and_loss(exported, tmp_path, suffix):
    config, objective, ours = exported
    out = tmp_path / f"mae{suffix}"
    export_weights(ours, str(out), "mae")
    state = torch.load(out, weights_only=True)["model"] if suffix == ".pth" else load_file(out)
    peer = PublicMAE(config)
    peer.load_state_dict(state, strict=True)
    images = images_of(config)
    loss, order = loss_and_order(config, objective, images)
    with torch.no_grad():
        torch.testing.assert_close(loss, peer.eval()(pixels_of(images, config), order), rtol=1e-5, atol=0)


def test_mae_encoder_alone_has_the_names_of_the_published_file(tiny_config, tmp_path):
    config = tiny_config("model.depth=1")
    ours = saved(random_objective(config), config, tmp_path / "ours.safetensors")
    export_weights(str(ours), str(tmp_path / "mae.pth"), "mae", encoder_only=True)
    linears = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2"]
    names = [f"{stem}.{part}" for stem in ("patch_embed.proj", "norm") for part in ("weight", "bias")]
    names += [f"blocks.0.{linear}.{part}" for linear in linears for part in ("weight", "bias")]
    state = torch.load(tmp_path / "mae.pth", weights_only=True)["model"]
    assert sorted(state) == sorted([*names, "cls_token", "pos_embed"])


def test_metadata_tell_where_the_weights_are_from(tiny_config, tmp_path):
    config = tiny_config(
        "data.source=/home/me/images", "output=/home/me/run", "model.init=/home/me/w.safetensors"
    )
    ours = saved(random_objective(config), config, tmp_path / "ours.safetensors")
    for layout, out in (("timm", "a.safetensors"), ("transformers", "b"), ("fastmim", "c.safetensors")):
        export_weights(str(ours), str(tmp_path / out), layout)
        path = tmp_path / out / "model.safetensors" if layout == "transformers" else tmp_path / out
        with safe_open(path, "pt") as file:
            told = file.metadata()
        assert told["format"] == "pt" and told["fastmim.step"] == "7" and told["fastmim.version"] == "0.1.0"
        assert json.loads(told["fastmim.mean"]) == config.data.mean
        assert json.loads(told["fastmim.std"]) == config.data.std
        assert told["fastmim.norm_pix_loss"] == "true"
        recipe = recipes.build(yaml.safe_load(told["fastmim.config"]))
        assert recipe.model.width == 32 and recipe.objective == config.objective
        assert "/home/me" not in str(told)


def test_fastmim_file_holds_the_weights_themselves(tiny_config, tmp_path):
    config = tiny_config()
    objective = random_objective(config)
    ours = saved(objective, config, tmp_path / "ours.safetensors")
    export_weights(str(ours), str(tmp_path / "encoder.safetensors"), "fastmim", encoder_only=True)
    held, wanted = load_file(tmp_path / "encoder.safetensors"), objective.state_dict()
    assert held.keys() == {name for name in wanted if name.startswith("encoder.")}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in held.items())


def test_bad_input_is_refused_before_anything_is_written(tiny_config, tmp_path):
    config = tiny_config()
    objective = random_objective(config)
    ours = str(saved(objective, config, tmp_path / "ours.safetensors"))
    encoder = str(tmp_path / "encoder.safetensors")
    export_weights(ours, encoder, "fastmim", encoder_only=True)
    cases = [
        (
            (ours, "out.pth", "timm"),
            ConfigError,
            "OUT .*out.pth: expected a file whose name ends in .safetensors",
        ),
        ((ours, "out.bin", "mae"), ConfigError, r"ends in \.pth or \.safetensors"),
        ((ours, "out.safetensors", "transformers"), ConfigError, "expected a folder"),
        ((encoder, "out.pth", "mae"), CheckpointError, "holds no pixel decoder of MAE.*or --encoder-only"),
        (
            (encoder, "out", "transformers"),
            CheckpointError,
            "holds no pixel decoder of MAE.*or --encoder-only",
        ),
        ((str(tmp_path), "out.pth", "mae"), CheckpointError, "holds no whole checkpoint"),
        ((str(tmp_path / "none"), "out.pth", "mae"), CheckpointError, "none does not exist"),
    ]
    for (source, out, layout), error, message in cases:
        with pytest.raises(error, match=message):
            export_weights(source, str(tmp_path / out), layout)
        assert not (tmp_path / out).exists()
    with pytest.raises(CheckpointError, match=r"--ema: .* is a single file; expected a run"):
        export_weights(ours, str(tmp_path / "out.safetensors"), "timm", ema=True)


def test_what_exists_is_replaced_by_force_alone(tiny_config, tmp_path):
    config = tiny_config()
    ours = str(saved(random_objective(config), config, tmp_path / "ours.safetensors"))
    for layout, out in (("timm", tmp_path / "a.safetensors"), ("transformers", tmp_path / "b")):
        export_weights(ours, str(out), layout)
        with pytest.raises(ConfigError, match=r"exists; expected another path, or --force"):
            export_weights(ours, str(out), layout)
        export_weights(ours, str(out), layout, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b", "ours.safetensors"]
    (tmp_path / "c.safetensors").mkdir()
    with pytest.raises(ConfigError, match=r"c.safetensors is a folder; expected the other"):
        export_weights(ours, str(tmp_path / "c.safetensors"), "timm", force=True)


def test_an_encoder_of_another_objective_is_exported_alone(tiny_config, tmp_path):
    config = tiny_config("objective.name=simmim")
    ours = str(saved(random_objective(config), config, tmp_path / "ours.safetensors"))
    told = export_weights(ours, str(tmp_path / "timm.safetensors"), "timm")
    assert "left out: encoder.mask_token, head\n" in told
    with pytest.raises(CheckpointError, match=r"holds no pixel decoder of MAE \(objective.name='simmim'\)"):
        export_weights(ours, str(tmp_path / "mae.pth"), "mae")
    Weights({"codebook": torch.zeros(3)}, config).save(tmp_path / "none.safetensors")
    with pytest.raises(
        CheckpointError, match=r"no ViT encoder that --to timm can hold: encoder.cls_token is miss"
    ):
        export_weights(str(tmp_path / "none.safetensors"), str(tmp_path / "t.safetensors"), "timm")
    with pytest.raises(CheckpointError, match=r"no ViT encoder that --to fastmim can hold"):
        export_weights(
            str(tmp_path / "none.safetensors"), str(tmp_path / "t.safetensors"), "fastmim", encoder_only=True
        )
