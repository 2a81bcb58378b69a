"""The configuration: every bad value is refused in one line that names the key, the value and what is accepted."""

import subprocess
import sys

import pytest
import yaml

from fastmim import recipes
from fastmim.errors import ConfigError

BAD = [
    ("optim.blrr=1", "optim.blrr=1: unknown key; did you mean optim.blr?"),
    ("modle.size=base", "modle={'size': 'base'}: unknown key; did you mean model?"),
    ("optim.blr=fast", "optim.blr='fast'; expected a number > 0"),
    ("mask.ratio=1.5", "mask.ratio=1.5; expected a number > 0 and < 1"),
    ("mask.ratio=0", "mask.ratio=0; expected a number > 0 and < 1"),
    ("mask.ratio=0.999", "mask.ratio=0.999 keeps 0 of 196 patches"),
    ("data.image_size=225", "data.image_size=[225, 225]; expected multiples of model.patch_size=16"),
    ("data.image_size=[224,100]", "data.image_size=[224, 100]; expected multiples"),
    ("model.heads=5", "model.heads=5; expected a divisor of model.width=768"),
    (
        "objective.decoder_heads=7",
        "objective.decoder_heads=7; expected a divisor of objective.decoder_width=512",
    ),
    ("optim.warmup_epochs=1600", "optim.warmup_epochs=1600; expected less than optim.epochs=1600"),
    ("optim.accumulation=3", "optim.batch_size=4096; expected a multiple of optim.accumulation=3"),
    ("optim.min_lr=1", "optim.min_lr=1; expected at most the peak learning rate 0.0024"),
    ("optim.clip_grad=-1", "optim.clip_grad=-1; expected a number > 0"),
    ("model.size=giant", "model.size='giant'; expected 'tiny', 'small', 'base', 'large' or 'huge'"),
    ("model.size=null", "model.size=None needs model.width, model.depth, model.heads"),
    ("data.mean=[0.5]", "data.mean has 1 values; expected data.channels=3"),
    ("data.channels=0", "data.channels=0; expected an integer > 0"),
    ("model.size=[base]", "model.size=['base']; expected 'tiny', 'small', 'base', 'large' or 'huge'"),
    (
        "deepspeed.zero_optimization.stage=true",
        "deepspeed.zero_optimization.stage=True; expected 0, 1, 2 or 3",
    ),
    ("data.std=[1,0,1]", "data.std=[1.0, 0.0, 1.0]; expected values above 0"),
    ("data.scale=[0.5,0.2]", "data.scale=[0.5, 0.2]; expected 0 < lowest <= highest <= 1"),
    ("train.precision=fp8", "train.precision='fp8'; expected 'auto', 'bf16', 'fp16' or 'fp32'"),
    ("deepspeed.foo=1", "deepspeed.foo: unknown key; expected one of aio, "),
    ("deepspeed.bf16.enabled=true", "deepspeed.bf16 is set by train.precision; set it there"),
    ("deepspeed.train_batch_size=8", "deepspeed.train_batch_size is set by optim.batch_size"),
    ("deepspeed.gradient_clipping=1", "deepspeed.gradient_clipping is set by optim.clip_grad"),
    ("deepspeed.zero_optimization.stage=4", "deepspeed.zero_optimization.stage=4; expected 0, 1, 2 or 3"),
    (
        "deepspeed.zero_optimization={stage: 0, offload_optimizer: {device: cpu}}",
        "deepspeed.zero_optimization.offload_optimizer without ZeRO; expected deepspeed.zero_optimization.stage=1, 2",
    ),
    (
        "target.kind=features",
        "target.kind='features' with objective.name='mae'; expected one of pixels, pca, tokens",
    ),
    ("target.kind=tokens", "target.tokenizer is not set; objective.name='mae' predicts tokens and needs it"),
    ("target.tokenizer=x", "target.tokenizer with target.kind='pixels'; expected target.kind='tokens'"),
    ("objective.kept_mask_ratio=0.5", "objective.kept_mask_ratio=0.5 with objective.decoder='self'"),
    ("objective.temperature=1", "objective.temperature=1: unknown key; expected one of decoder_width, "),
    ("objective.name=meh", "objective.name='meh'; expected one of mae, simmim, beit, "),
    ("data.flip=true", "data.flip=True; expected a number >= 0 and <= 1"),
    ("optim.accumulation=true", "optim.accumulation=True; expected an integer > 0"),
    ("train.max_steps=no", "train.max_steps=False; expected an integer > 0"),
    ("objective.decoder_depth=true", "objective.decoder_depth=True; expected an integer > 0"),
    ("log.wandb=maybe", "log.wandb='maybe'; expected true or false"),
    ("data.image_size=224,224", "data.image_size='224,224'; expected a list, as '[1, 2]'"),
    ("data.image_size=[224,160,3]", "data.image_size=[224, 160, 3]; expected 2 values"),
    ("optim.betas=[0.9]", "optim.betas=[0.9]; expected 2 values"),
    ("optim.betas=[0.9,", "what has spaces needs quotes, as 'optim.betas=[1, 2]'"),
    ("train=3", "train=3; expected a mapping of keys"),
    ("deepspeed=3", "deepspeed=3; expected a mapping, as '{key: value}'"),
    (
        "deepspeed.zero_optimization.offload_optimizer=cpu",
        "deepspeed.zero_optimization.offload_optimizer='cpu'; expected a mapping such as {device: cpu}",
    ),
    (
        "deepspeed.zero_optimisation.stage=2",
        "deepspeed.zero_optimisation: unknown key; did you mean deepspeed.zero_optimization?",
    ),
    ("no_equals_sign", "'no_equals_sign' is not an override; expected key.sub=value"),
    ("optim.blr.x=1", "optim.blr.x=1: optim.blr holds 0.00015, not a section"),
    ("optim=[1", "optim='[1': the value is not YAML"),
]


@pytest.mark.parametrize(("override", "message"), BAD, ids=[override for override, _ in BAD])
def test_bad_value_is_named(override, message):
    with pytest.raises(ConfigError) as caught:
        recipes.load("mae_vit_base", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_may_be_written_as_powers_of_ten():
    words = ["data.channels=1", "data.mean=5e-1", "data.std=[2E-1]", "optim.blr=1e-3", "train.max_steps=1e3"]
    config = recipes.load("mae_vit_base", [*words, "output=1e-3x"])
    assert (config.data.mean, config.data.std) == ([0.5], [0.2])
    assert (config.optim.blr, config.train.max_steps, config.output) == (1e-3, 1000, "1e-3x")


CROSS = "objective.decoder=cross"
DRAW = "log.reconstruct_every_steps=5"
BAD_TOGETHER = [
    (
        [CROSS, "objective.mask_token_in_encoder=true"],
        "objective.decoder='cross' with objective.mask_token_in_encoder=True; expected one of the two",
    ),
    (
        [CROSS, "objective.kept_mask_ratio=0.8"],
        "objective.kept_mask_ratio=0.8; expected at most mask.ratio=0.75",
    ),
    (
        ["objective.name=simmim", "target.kind=pca"],
        "target.kind='pca' with objective.name='simmim'; expected pixels",
    ),
    (
        ["objective.name=c_mae", "target.kind=pixels"],
        "target.kind='pixels' with objective.name='c_mae'; expected null",
    ),
    (["objective.name=beit"], "target.tokenizer is not set; objective.name='beit' predicts tokens"),
    (["objective.name=beit", "target.kind=pixels"], "with objective.name='beit'; expected tokens"),
    (
        ["objective.name=simmim", "objective.decoder_depth=1"],
        "objective.decoder_depth=1: unknown key; expected one of name, norm_pix_loss",
    ),
    (
        ["objective.name=r_mae", "objective.rebuild_weight=0"],
        "objective.rebuild_weight=0; expected a number > 0",
    ),
    (
        ["objective.name=c_mae", "objective.stop_gradient=true"],
        "objective.stop_gradient=True with objective.share_decoder=False; expected share_decoder=True",
    ),
    (["objective.name=c_mae", DRAW], "log.reconstruct_every_steps=5 with objective.name='c_mae'"),
    (
        ["target.kind=tokens", "target.tokenizer=x", DRAW],
        "log.reconstruct_every_steps=5 with objective.name='mae' and target.kind='tokens', which predicts no pixels",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_TOGETHER, ids=[" ".join(o) for o, _ in BAD_TOGETHER])
def test_bad_combination_is_named(overrides, message):
    with pytest.raises(ConfigError) as caught:
        recipes.load("mae_vit_base", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_objective_does_not_inherit_the_recipes_options():
    name = "objective.name=r_mae"
    overrides = ["objective.decoder_depth=3", name, "objective.rebuild_weight=2"]
    config, sources = recipes.load_with_sources("mae_vit_large_fast", overrides)
    assert (config.objective.decoder_depth, config.objective.rebuild_weight) == (3, 2)
    assert recipes.load("mae_vit_large_fast", [name]).objective.decoder_depth == 8  # not the recipe's 1
    told = {line.split(":")[0].strip(): line for line in recipes.dump(config, sources).splitlines()}
    for key, origin in (
        ("name", "command line"),
        ("decoder_depth", "command line"),
        ("rebuild_weight", "command line"),
        ("decoder_width", "default"),
        ("norm_pix_loss", "default"),
        ("ratio", "mae_vit_large_fast"),
    ):
        assert told[key].endswith(f"# {origin}"), told[key]


@pytest.mark.parametrize(
    "overrides", [["objective.name=mae"], ["objective.name=simmim", "objective.name=mae"]]
)
def test_the_recipes_own_objective_keeps_its_options(overrides):
    assert recipes.load("mae_vit_large_fast", overrides).objective.decoder_depth == 1


def test_an_empty_section_is_no_obstacle_to_an_objective(tmp_path):
    (tmp_path / "empty.yaml").write_text("objective:\n")
    config = recipes.load(str(tmp_path / "empty.yaml"), ["objective.name=simmim"])
    assert config.objective.name == "simmim"


def test_every_bad_value_is_reported_at_once():
    with pytest.raises(ConfigError, match=r"mask\.ratio=2.*optim\.epochs=-1"):
        recipes.load("mae_vit_base", ["mask.ratio=2", "optim.epochs=-1"])


def test_compile_does_not_mix_with_stage_3():
    with pytest.raises(ConfigError, match=r"train.compile=true with deepspeed.zero_optimization.stage=3"):
        recipes.load("mae_vit_base", ["train.compile=true", "deepspeed.zero_optimization.stage=3"])


def test_batch_must_divide_over_ranks():
    config = recipes.load("mae_vit_base", ["optim.batch_size=96", "optim.accumulation=2"])
    assert config.micro_batch(world_size=3) == 16
    with pytest.raises(ConfigError, match=r"optim.batch_size=96; expected a multiple of 10 \(5 ranks x"):
        config.micro_batch(world_size=5)


def test_unknown_recipe_lists_the_known():
    with pytest.raises(
        ConfigError, match=r"--config mae_vit_bass: unknown recipe; expected one of .*mae_vit_base, "
    ):
        recipes.load("mae_vit_bass")


def test_null_is_what_a_recipe_does_without(tmp_path):
    told = recipes.load(
        "mae_vit_base", ["data.channels=1", "data.mean=null", "data.std=null", "model.width=null"]
    )
    assert told.data.mean == [0.5] and told.data.std == [0.25] and told.model.width == 768


@pytest.mark.parametrize(
    "text", ["a.b: true", "1: {2: true}", "objective: {name: [mae], decoder_depth: true}"]
)
def test_truths_in_odd_places_are_refused_too(tmp_path, text):
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(ConfigError):
        recipes.load(str(tmp_path / "odd.yaml"))


def test_a_key_that_stands_twice_is_named(tmp_path):
    (tmp_path / "twice.yaml").write_text("optim:\n  blr: 1\n  epochs: 3\n  blr: 2\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml: not YAML: blr twice in a section"):
        recipes.load(str(tmp_path / "twice.yaml"))


def test_file_problems_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        recipes.load(str(tmp_path / "missing.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="not YAML"):
        recipes.load(str(tmp_path / "broken.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        recipes.load(str(tmp_path / "bytes.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds a list; expected a mapping"):
        recipes.load(str(tmp_path / "list.yaml"))


@pytest.mark.parametrize("name", recipes.names())
def test_resolved_recipe_resolves_to_itself(name):
    config = recipes.load(name)
    assert recipes.build(yaml.safe_load(recipes.dump(config))) == config


PAPER = {  # width, depth, heads, patch, decoder depth: MAE, section 4 and appendix A.1
    "mae_vit_base": (768, 12, 12, 16, 8),
    "mae_vit_large": (1024, 24, 16, 16, 8),
    "mae_vit_huge": (1280, 32, 16, 14, 8),
    "mae_vit_large_fast": (1024, 24, 16, 16, 1),
}


@pytest.mark.parametrize("name", PAPER)
def test_recipes_hold_the_papers_numbers(name):
    config = recipes.load(name)
    model, objective, optim = config.model, config.objective, config.optim
    assert (model.width, model.depth, model.heads, model.patch_size, objective.decoder_depth) == PAPER[name]
    assert (objective.decoder_width, objective.decoder_heads, objective.norm_pix_loss) == (512, 16, True)
    assert (optim.batch_size, optim.blr, optim.warmup_epochs, optim.betas) == (4096, 1.5e-4, 40, (0.9, 0.95))
    assert optim.lr == pytest.approx(2.4e-3)
    assert (config.mask.ratio, config.data.scale, optim.weight_decay) == (0.75, (0.2, 1.0), 0.05)


FAMILY = {  # objective, patches removed of 196, learning rate, betas, crop scale
    "mae_vit_base_mask_token": ("mae", 147, 2.4e-3, (0.9, 0.95), (0.2, 1.0)),
    "crossmae_vit_base": ("mae", 147, 2.4e-3, (0.9, 0.95), (0.2, 1.0)),
    "simmim_vit_base": ("simmim", 120, 4e-4, (0.9, 0.999), (0.67, 1.0)),
    "beit_vit_base": ("beit", 75, 1.5e-3, (0.9, 0.98), (0.08, 1.0)),
    "r_mae_vit_base": ("r_mae", 147, 2.4e-3, (0.9, 0.95), (0.2, 1.0)),
    "c_mae_vit_base": ("c_mae", 147, 2.4e-3, (0.9, 0.95), (0.2, 1.0)),
}


@pytest.mark.parametrize("name", FAMILY)
def test_recipes_of_the_family_hold_their_papers_numbers(name):
    config = recipes.load(name)
    removed = 196 - config.mask.len_keep(config.grid)
    found = (
        config.objective.name,
        removed,
        pytest.approx(config.optim.lr),
        config.optim.betas,
        config.data.scale,
    )
    assert found == FAMILY[name]
    assert (config.model.width, config.model.depth, config.optim.weight_decay) == (768, 12, 0.05)


def test_statistics_follow_the_channels():
    assert recipes.override([]).data.mean == [0.485, 0.456, 0.406]
    data = recipes.override(["data.channels=4"]).data
    assert (data.mean, data.std) == ([0.5] * 4, [0.25] * 4)


def test_dump_names_the_source_of_every_value():
    config, sources = recipes.load_with_sources(
        "mae_vit_large", ["optim.blr=1e-3", "deepspeed.zero_optimization.stage=2"]
    )
    origins = {}
    for line in recipes.dump(config, sources).splitlines():
        if "#" in line:
            value, origin = line.split("#")
            origins[value.strip()] = origin.strip()
    assert origins["blr: 0.001"] == "command line"
    assert origins["stage: 2"] == "command line"
    assert origins["size: large"] == "mae_vit_large"
    assert origins["width: 1024"] == "default"


def test_configuration_needs_no_torch():
    code = "import sys; from fastmim import recipes; recipes.load('mae_vit_base'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
