"""The pyramid and the detector on it: shapes, strides, and what reaches the encoder."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from fastmim.errors import ConfigError
from fastmim.evaluate.classifier import layer_decay_groups
from fastmim.evaluate.dense import DenseEncoder
from fastmim.evaluate.detect.config import DetectConfig
from fastmim.evaluate.detect.model import SquareTransform, build_detector
from fastmim.evaluate.detect.pyramid import LEVELS, PyramidBackbone, SimpleFeaturePyramid
from fastmim.evaluate.detect.training import learning_rate_factor
from fastmim.models import Encoder
from fastmim.models.pixels import PixelScale

SMALL = {"image_size": 64, "width": 16, "hidden": 32, "proposals": 20, "precision": "fp32"}
SMALL |= {"box_samples": 8, "rpn_samples": 8}


@pytest.fixture
def config(tiny_config):
    return tiny_config("model.depth=4")


@pytest.fixture
def encoder(config):
    torch.manual_seed(0)
    return Encoder(config, PixelScale(config.data.mean, config.data.std)).eval()


@pytest.fixture
def build(encoder, config):
    def run(**changes):
        settings = DetectConfig(annotations="", **(SMALL | changes)).resolved(config)
        dense = DenseEncoder(
            encoder, config, blocks=[4], window=settings.window, trainable=settings.trainable
        )
        return build_detector(dense, settings, config.data.mean, 3), settings

    return run


def pictures(*sizes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


def target(*boxes):
    masks = torch.zeros(len(boxes), 64, 64, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = 1
    rows = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": rows, "labels": torch.ones(len(boxes), dtype=torch.int64), "masks": masks}


def test_the_pyramid_has_five_scales_of_one_map():
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid(24, 16)
    levels = pyramid(torch.randn(2, 24, 8, 12))
    assert [tuple(level.shape) for level in levels] == [
        (2, 16, 32, 48),
        (2, 16, 16, 24),
        (2, 16, 8, 12),
        (2, 16, 4, 6),
        (2, 16, 2, 3),
    ]
    assert torch.equal(levels[4], levels[3][:, :, ::2, ::2])
    x = torch.randn(2, 24, 8, 12)
    _, one, norm, three, last = pyramid.levels[2]

    def channel_norm(x):
        mean, variance = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt()

    wanted = channel_norm(F.conv2d(channel_norm(F.conv2d(x, one.weight)), three.weight, padding=1))
    torch.testing.assert_close(pyramid(x)[2], wanted)
    assert norm.bias.shape == last.bias.shape == (16,) and one.bias is None and three.bias is None


def test_the_encoder_sees_the_bytes_normalised_once(build, encoder, config):
    model, _ = build(window=None)
    images = pictures((64, 40), (24, 64))
    told, _ = model.network.transform(images)
    assert told.tensors.dtype == torch.uint8 and told.image_sizes == [(64, 40), (24, 64)]
    square = torch.empty(2, 64, 64, 3, dtype=torch.uint8)
    square[:] = torch.tensor(config.data.mean).mul(255).round()
    square[0, :, :40], square[1, :24] = (image.permute(1, 2, 0) for image in images)
    seen = []
    handle = model.network.backbone.encoder.register_forward_hook(
        lambda module, given, made: seen.append(made[-1])
    )
    model.eval()(images)
    handle.remove()
    (wanted,) = DenseEncoder(encoder, config, blocks=[4])(square)
    assert torch.equal(seen[0], wanted)


def test_what_is_filled_in_is_the_mean():
    transform = SquareTransform(8, [0.25, 0.5])
    told, _ = transform([torch.zeros(2, 3, 5, dtype=torch.uint8)])
    assert told.tensors[0, :, 7, 7].tolist() == [64, 128] and told.tensors[0, :, :3, :5].sum() == 0


def test_anchors_and_pooling_follow_the_strides(build):
    model, _ = build()
    network = model.network
    assert [sizes[0] for sizes in network.rpn.anchor_generator.sizes] == [16, 32, 64, 128, 256]
    told, _ = network.transform(pictures((16, 16)))
    levels = network.backbone(told.tensors)
    assert [tuple(level.shape[2:]) for level in levels.values()] == [
        (32, 32),
        (16, 16),
        (8, 8),
        (4, 4),
        (2, 2),
    ]
    (anchors,) = network.rpn.anchor_generator(told, list(levels.values()))
    assert len(anchors) == 3 * (32**2 + 16**2 + 8**2 + 4**2 + 2**2)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centres[3 * (32**2 + 16**2 + 8**2)].tolist() == [0, 0] and centres[-1].tolist() == [32, 32]
    # An image that fills a quarter of the square is pooled where it is.
    box = torch.tensor([[2.0, 3.0, 14.0, 15.0]])
    told = network.roi_heads.box_roi_pool(levels, [box], [(16, 16)])
    torch.testing.assert_close(told, roi_align(levels["0"], [box], 7, spatial_scale=1 / 2, sampling_ratio=2))
    for name in LEVELS[:-1]:
        assert name in network.roi_heads.box_roi_pool.featmap_names


@pytest.mark.parametrize("head", ["faster_rcnn", "mask_rcnn"])
def test_losses_reach_the_encoder_and_boxes_stay_in_the_image(build, head):
    model, _ = build(head=head, window=3)
    targets = [target((4, 4, 30, 30), (20, 30, 60, 50)), target()]
    losses = model.train()(pictures((64, 64), (64, 64)), targets)
    names = ["loss_box_reg", "loss_classifier", "loss_objectness", "loss_rpn_box_reg"]
    assert sorted(losses) == sorted([*names, *["loss_mask"] * (head == "mask_rcnn")])
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    found = model.eval()(pictures((64, 30)))[0]
    if len(found["boxes"]):
        assert found["boxes"][:, 2].max() <= 30 and ("masks" in found) == (head == "mask_rcnn")


def test_a_frozen_encoder_wants_no_gradients(build):
    model, _ = build(trainable=False, head="faster_rcnn")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names and not any("backbone.encoder" in name for name in names)


def test_heads_start_from_the_seed_alone(build):
    torch.manual_seed(1)
    first = build()[0].state_dict()
    before = torch.get_rng_state()
    again, other = build()[0].state_dict(), build(seed=1)[0].state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "network.backbone.pyramid.levels.0.1.weight"
    assert not torch.equal(first[name], other[name])
    encoder = [name for name in first if "encoder" in name]
    assert encoder and all(torch.equal(first[name], other[name]) for name in encoder)


def test_rates_fall_from_layer_to_layer(build):
    model, settings = build(weight_decay=0.1, layer_decay=0.5)
    groups = layer_decay_groups(model, settings.weight_decay, settings.layer_decay)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    told = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    assert len(told) == sum(p.requires_grad for p in model.parameters())
    encoder = "network.backbone.encoder.encoder"
    assert told["network.roi_heads.box_head.5.weight"] == (1, 0.1)
    assert told["network.backbone.pyramid.levels.0.2.weight"] == (1, 0)
    assert told[f"{encoder}.blocks.layers.3.mlp.fc1.weight"] == (0.5, 0.1)
    assert told[f"{encoder}.blocks.layers.0.attn.qkv.bias"] == (0.0625, 0)
    assert told[f"{encoder}.patch_embed.weight"] == (0.03125, 0.1)


def test_the_rate_rises_and_falls_in_steps():
    config = DetectConfig(annotations="", warmup_steps=4)
    told = [learning_rate_factor(config, step, 27) for step in range(27)]
    wanted = [0.001, 0.25075, 0.5005, 0.75025, *[1] * 20, 0.1, 0.1, 0.01]
    assert told == pytest.approx(wanted)


def test_the_papers_values_are_those_of_the_encoders_depth(tiny_config):
    def resolved(depth, **given):
        return DetectConfig(annotations="", **given).resolved(tiny_config(f"model.depth={depth}"))

    told = {depth: resolved(depth) for depth in (12, 24, 32)}
    assert [(c.layer_decay, c.drop_path, c.epochs) for c in told.values()] == [
        (0.7, 0.1, 100),
        (0.8, 0.4, 100),
        (0.9, 0.5, 75),
    ]
    assert resolved(24, epochs=3, drop_path=0.0).model_dump(
        include={"epochs", "drop_path", "layer_decay"}
    ) == {
        "epochs": 3,
        "drop_path": 0.0,
        "layer_decay": 0.8,
    }
    assert resolved(12, trainable=False).layer_decay is None
    with pytest.raises(
        ConfigError, match="image_size=1008; expected a multiple of 32, 4 of the encoder's patches"
    ):
        resolved(12, image_size=1008)


def test_the_backbone_computes_in_bf16_and_gives_float32(encoder, config):
    torch.manual_seed(0)
    backbone = PyramidBackbone(DenseEncoder(encoder, config, blocks=[4]), 16, "bf16")
    image = pictures((64, 64))[0][None]
    levels = backbone(image)
    backbone.precision = "fp32"
    exact = backbone(image)
    for name in LEVELS:
        assert levels[name].dtype == torch.float32
        assert 0 < (levels[name] - exact[name]).abs().max() < 0.2
