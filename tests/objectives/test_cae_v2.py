"""CAE v2 against its formula, and the teachers that it takes and refuses."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmim import manifest as manifests
from fastmim import recipes
from fastmim.errors import CheckpointError, ConfigError
from fastmim.exchange.weights import Weights
from fastmim.masking import mask_from_order
from fastmim.objectives import build_objective
from tests.launching import TINY_YAML, losses, train, write_images
from tests.objectives.naive_vit import NaiveViT, assert_gradients, randomise

SIZE = (64, 48)
TINY = [
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "model.patch_size=16",
    f"data.image_size={list(SIZE)}",
    "mask.ratio=0.5",
    "objective.name=cae_v2",
    "objective.regressor_depth=1",
    "target.teacher=test_vit",
    "target.teacher_weights=random",
]


def build(*overrides):
    torch.manual_seed(0)
    objective = build_objective(recipes.override([*TINY, *overrides]))
    data = objective.config.data
    images = torch.randint(0, 256, (3, *data.image_size, data.channels), dtype=torch.uint8)
    return objective, images, objective.sample_mask(torch.zeros(3, dtype=torch.int64), torch.arange(3))


# A map of features, and no class token.
MAP = ["target.teacher=test_convnext", "model.patch_size=32", "data.image_size=[64,96]"]


def timm_teacher(name="test_vit", **options):
    """Fresh weights, unlike those of `random`."""
    torch.manual_seed(1)
    model = timm.create_model(name, img_size=SIZE, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def features_of(model, images):
    """What timm gives for images that are normalised as its own data pipeline does."""
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return model.forward_features((images.permute(0, 3, 1, 2) / 255 - mean) / std)


def as_open_clip(state):
    """timm's names -> those of CLIP's visual tower beside a text tower, as open_clip saves both."""
    names = {
        "patch_embed.proj": "conv1",
        "norm_pre": "ln_pre",
        "blocks.": "transformer.resblocks.",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj": "attn.out_proj",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    named = {"text.weight": torch.zeros(2)}
    for name, tensor in state.items():
        if name == "head.bias":
            continue
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        whole = {"cls_token": "class_embedding", "pos_embed": "positional_embedding", "head.weight": "proj"}
        tensor = tensor.mT.contiguous() if name == "head.weight" else tensor
        tensor = tensor.squeeze() if name in ("cls_token", "pos_embed") else tensor
        named["visual." + whole.get(name, name).replace("norm.", "ln_post.")] = tensor
    return named


def naive_loss(objective, naive, images, mask, features, has_cls=True):
    """1 - cos over all rows of all samples, in one mean."""
    cosines = []
    for sample, image in enumerate(images):
        kept, removed = mask.ids_keep[sample].tolist(), mask.ids_mask[sample].tolist()
        latent = naive.encode(image, kept)
        rows = [*latent, *naive.regress(latent, kept, removed)]
        places = [0, *(1 + patch for patch in kept + removed)]
        for row, place in list(zip(rows, places, strict=True))[not has_cls :]:
            output = naive.linear(naive.norm(row, "head.norm"), "head.linear")
            target = features[sample, place - (not has_cls)].double()
            cosines.append(output @ target / output.norm() / target.norm())
    return (1 - torch.stack(cosines)).mean()


def test_loss_and_gradients_are_those_of_the_formula(tmp_path):
    model = timm_teacher()
    save_file(model.state_dict(), tmp_path / "teacher.safetensors")
    objective, images, mask = build(f"target.teacher_weights={tmp_path / 'teacher.safetensors'}")
    randomise(objective)
    naive = NaiveViT(objective)
    loss = objective.losses(images, mask)["loss"]
    want = naive_loss(objective, naive, images, mask, features_of(model, images))
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    loss.backward()
    want.backward()
    assert_gradients(objective, naive)


def test_without_a_class_token_cls_is_left_out():
    objective, images, mask = build(*MAP)
    teacher = objective.head.teacher.module.model
    assert not objective.head.has_cls
    features = features_of(teacher, images).flatten(2).mT
    naive = NaiveViT(objective)
    want = naive_loss(objective, naive, images, mask, features, has_cls=False)
    torch.testing.assert_close(objective.losses(images, mask)["loss"].double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_registers_and_distillation_tokens_are_no_patches(name):
    patch = timm.create_model(name, depth=1).patch_embed.patch_size[0]
    height, width = 4 * patch, 3 * patch
    sizes = [f"target.teacher={name}", f"model.patch_size={patch}", f"data.image_size=[{height},{width}]"]
    objective, *_ = build(*sizes)
    teacher = objective.head.teacher
    images = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
    features = features_of(teacher.module.model, images)
    got = teacher(images)
    assert got.shape[1] == 13
    assert torch.equal(got[:, 0], features[:, 0]) and torch.equal(got[:, 1:], features[:, -12:])


CLIP = ["target.teacher=vit_base_patch16_clip_224.openai", "objective.project_teacher=true"]


@pytest.mark.parametrize("layout", ["teacher.safetensors", "teacher.pth", "open_clip.safetensors"])
def test_a_clip_tower_from_a_local_file_gives_its_projected_tokens(tmp_path, monkeypatch, layout):
    # The released architecture, thinner: what its file is called and holds stays the same.
    thin = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **{**options, **thin}))
    model = timm_teacher("vit_base_patch16_clip_224.openai")
    torch.nn.init.zeros_(model.head.bias)  # CLIP's projection has none
    state = model.state_dict()
    path = tmp_path / layout
    if layout == "teacher.pth":
        torch.save({"state_dict": state}, path)
    else:
        save_file(as_open_clip(state) if layout.startswith("open") else state, path)
    objective, images, _ = build(*CLIP, f"target.teacher_weights={path}")
    got = objective.head.teacher(images)
    assert got.shape == (3, 13, 512)
    assert torch.equal(got, model.head(features_of(model, images)))
    objective, *_ = build(CLIP[0], f"target.teacher_weights={path}")
    assert torch.equal(objective.head.teacher(images), features_of(model, images))


def test_the_teacher_is_no_part_of_the_model():
    state = torch.random.get_rng_state()
    objective, images, mask = build()
    assert {name.split(".")[0] for name in objective.state_dict()} == {"encoder", "regressor", "head"}
    assert set(dict(objective.head.named_parameters())) == {
        "norm.weight",
        "norm.bias",
        "linear.weight",
        "linear.bias",
    }
    objective.bfloat16()
    objective.losses(images, mask)["loss"].backward()
    teacher = objective.head.teacher.module
    assert not teacher.training and {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in objective.parameters())
    # A random teacher is the same in every process, and takes nothing from the run's generator.
    torch.random.set_rng_state(state)
    other, *_ = build("target.teacher=test_vit2")
    assert torch.equal(other.encoder.patch_embed.weight.bfloat16(), objective.encoder.patch_embed.weight)
    torch.manual_seed(5)
    again = build_objective(objective.config).head.teacher.module
    assert torch.equal(again.model.norm.weight, teacher.model.norm.weight)
    assert torch.equal(again.model.patch_embed.proj.weight, teacher.model.patch_embed.proj.weight)


def test_grey_images_are_shown_as_grey_colours():
    objective, images, _ = build("data.channels=1")
    teacher = objective.head.teacher
    wanted = features_of(teacher.module.model, images.expand(-1, -1, -1, 3))
    # A convolution's sums differ in their last bits with the strides of what it is given.
    torch.testing.assert_close(teacher(images), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["target.teacher=vit_base"],
            "'vit_base' is no model of timm; expected one of timm.list_models(), perhaps",
        ),
        (["target.teacher=test_vit.nowhere"], "target.teacher='test_vit.nowhere' cannot be used with"),
        (["model.patch_size=8"], "has 12 patches in an image of [64, 48]; expected 48, the grid of 8 x 6"),
        (
            ["target.teacher=test_efficientnet"],
            "has 4 patches in an image of [64, 48]; expected 12, the grid of 4 x 3",
        ),
        (["data.channels=4"], "'test_vit' reads images of 3 channels; expected data.channels=3 or 1"),
        (
            ["target.teacher=deit_tiny_distilled_patch16_224", "objective.project_teacher=true"],
            "project_teacher=True with target.teacher='deit_tiny_distilled_patch16_224', which ends in no linear",
        ),
    ],
)
def test_teachers_that_do_not_fit_are_refused_in_one_line(overrides, message):
    with pytest.raises(ConfigError) as error:
        build(*overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        (
            {"embed_dim": 96},
            {},
            "has cls_token [1, 1, 96]; expected [1, 1, 64], that of target.teacher='test_vit'",
        ),
        (
            {"depth": 2},
            {},
            "lacks blocks.2.attn.proj.bias; expected the weights of target.teacher='test_vit'",
        ),
        ({}, {"blocks.9.weight": torch.zeros(1)}, "holds blocks.9.weight; expected the weights of"),
        ({}, {"pos_embed": torch.zeros(1, 5, 64)}, "has pos_embed [1, 5, 64]; expected [1, 13, 64]"),
    ],
)
def test_weights_of_another_model_are_refused_in_one_line(tmp_path, options, change, message):
    path = tmp_path / "teacher.safetensors"
    save_file(timm_teacher(**options).state_dict() | change, path)
    with pytest.raises(CheckpointError) as error:
        build(f"target.teacher_weights={path}")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("weights", ["absent.safetensors", "image.png"])
def test_files_that_are_no_weights_are_refused(tmp_path, weights):
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(CheckpointError, match=r"does not exist|neither a safetensors nor a PyTorch file"):
        build(f"target.teacher_weights={tmp_path / weights}")


@pytest.mark.parametrize("teacher", [[], MAP])
def test_analytic_flops_are_the_counted_ones(teacher):
    objective, images, mask = build(*teacher)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = objective.losses(images, mask)["loss"]
    assert objective.forward_flops() * 3 == pytest.approx(counter.get_total_flops(), rel=0.01)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    counted = counter.get_total_flops() + backward.get_total_flops()
    assert objective.step_flops() * 3 == pytest.approx(counted, rel=0.01)


def test_sharded_ranks_train_and_save_without_the_teacher(tmp_path):
    write_images(tmp_path / "images", 16)
    save_file(timm_teacher().state_dict(), tmp_path / "teacher.safetensors")
    text = TINY_YAML.splitlines()
    text[1] = "model: {size: null, width: 32, depth: 2, heads: 2, patch_size: 16}"
    text[2] = "objective: {name: cae_v2, regressor_depth: 1}"
    text[3] = f"data: {{image_size: {list(SIZE)}, threads: 1}}"
    target = "target: {teacher: test_vit, teacher_weights: teacher.safetensors}"
    (tmp_path / "tiny.yaml").write_text("\n".join([*text, target, "mask: {ratio: 0.5}"]))
    # The default threshold would keep every parameter of this size on all ranks.
    sharded = "deepspeed.zero_optimization={stage: 3, stage3_param_persistence_threshold: 0}"
    arguments = ["data.source=images", "train.max_steps=12", "output=run", sharded]
    values = losses(train(tmp_path / "tiny.yaml", *arguments, ranks=2))
    assert values[-1] < values[0] < 2
    saved = load_file(manifests.newest_whole(tmp_path / "run")[0] / manifests.WEIGHTS)
    assert {name.split(".")[0] for name in saved} == {"encoder", "regressor", "head"}


def test_a_run_of_this_engine_teaches(tmp_path):
    mae = build_objective(recipes.override([*TINY[:6], "objective.decoder_width=16"]))
    path = tmp_path / "teacher.safetensors"
    Weights(dict(mae.state_dict()), mae.config).save(path)
    own = [f"target.teacher={path}", "target.teacher_weights=null"]
    objective, images, mask = build(*own)
    everything = torch.arange(objective.patches).expand(len(images), -1)
    with torch.no_grad():
        features = mae.eval().encoder(images, mask_from_order(everything, objective.patches))
    torch.testing.assert_close(objective.head.teacher(images, torch.float32), features)
    assert not any("teacher" in name for name in objective.state_dict())
    loss = objective.losses(images, mask)["loss"]
    loss.backward()
    assert 0 < loss < 2 and mae.encoder.cls_token.grad is None
    with pytest.raises(
        ConfigError, match=r"data.image_size=\[32, 48\] .*expected \[64, 48\], as it was trained"
    ):
        build(*own, "data.image_size=[32,48]")
