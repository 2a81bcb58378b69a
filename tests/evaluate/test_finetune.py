"""`fastmim evaluate finetune`: what is trained and how, that it goes on where it was stopped, and on two ranks."""

import json
import math
import signal
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from fastmim.cli import main
from fastmim.data.loader import load_images
from fastmim.evaluate.classifier import Classifier, copy_encoder, timm_tensors
from fastmim.evaluate.config_finetune import FinetuneConfig
from fastmim.evaluate.encoder import load_encoder
from fastmim.evaluate.labels import read_labelled
from tests.launching import environment, run_command, wait_for

# Nothing random but crops and flips.
PLAIN = [
    "mixup=0",
    "cutmix=0",
    "erasing=0",
    "smoothing=0",
    "rand_augment=null",
    "drop_path=0",
    "precision=fp32",
]
SHORT = ["batch_size=12", "warmup_epochs=1", "workers=0", "blr=0.02"]


@pytest.fixture
def command(weights, train_folder, test_folder, tmp_path):
    """The words of a command; `run=False` returns them in place of the exit code."""

    def build(*words, out="out", run=True, data=train_folder, test=test_folder):
        options = {"--weights": weights, "--data": data, "--test": test, "--out": tmp_path / out}
        given = [str(word) for pair in options.items() for word in pair]
        words = ["evaluate", "finetune", *given, *SHORT, *words]
        return main(words) if run else words

    return build


def result(tmp_path, out="out"):
    told = json.loads((tmp_path / out / "eval.json").read_text())
    return {key: value for key, value in told.items() if key not in ("seconds", "paths", "versions")}


def records(tmp_path, out="out", name="metrics"):
    return [json.loads(line) for line in (tmp_path / out / f"{name}.jsonl").read_text().splitlines()]


def assert_same_weights(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_whole_recipe_learns_classes_and_repeats_itself(command, tmp_path):
    words = ["epochs=3", "save=true", "ema_decay=0.5", "accumulation=2"]
    assert command(*words) == 0
    told = result(tmp_path)
    assert told["top1"] > 0.8 and told["settings"]["rand_augment"] == "rand-m9-mstd0.5-inc1"
    losses = [record["loss"] for record in records(tmp_path)]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".lock",
        "confusion.png",
        "eval.json",
        "metrics.jsonl",
        "model.safetensors",
    ]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["fastmim.classes"]) == ["blue", "green", "red"]
    assert json.loads(metadata["fastmim.mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(metadata["fastmim.image_size"]) == [32, 32]
    # RandAugment in another process draws the same.
    assert command(*words, "workers=1", out="again") == 0
    assert [record["loss"] for record in records(tmp_path, "again")] == losses
    again = result(tmp_path, "again")
    assert again | {"sweep": []} == told | {"sweep": []}
    assert_same_weights(*(tmp_path / out / "model.safetensors" for out in ("out", "again")))


def test_the_paper_s_defaults_go_by_the_depth(tiny_config):
    wanted = {
        6: (100, 5e-4, 0.65, 0.1),
        12: (100, 5e-4, 0.65, 0.1),
        24: (50, 1e-3, 0.75, 0.2),
        32: (50, 1e-3, 0.75, 0.3),
    }
    for depth, values in wanted.items():
        told = FinetuneConfig().resolved(tiny_config(f"model.depth={depth}"))
        assert (told.epochs, told.blr, told.layer_decay, told.drop_path) == values
        assert told.image_size == (32, 32) and told.precision in ("bf16", "fp32")
    told = FinetuneConfig(epochs=7, drop_path=0, rand_augment=None, image_size=16).resolved(tiny_config())
    assert (told.epochs, told.drop_path, told.rand_augment, told.image_size) == (7, 0, None, (16, 16))


def train_timm(model, images, labels, steps, depth, smoothing):
    """Plain AdamW with the paper's groups, on every image at once; the schedule is a cosine over the steps.

    Returns the average of the weights with a decay of one half.
    """
    targets = (1 - smoothing) * F.one_hot(labels, 3) + smoothing / 3
    average = {name: value.clone() for name, value in model.state_dict().items()}
    groups = []
    for name, parameter in model.named_parameters():
        if name.startswith(("patch_embed", "cls_token")):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            layer = depth + 1
        still = parameter.ndim == 1 or name == "cls_token"
        parameter.requires_grad_(name != "pos_embed")
        groups.append(
            {
                "params": [parameter],
                "scale": 0.65 ** (depth + 1 - layer),
                "weight_decay": 0 if still else 0.05,
            }
        )
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    peak = 0.02 * 36 / 256
    for step in range(steps):
        rate = 1e-6 + (peak - 1e-6) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.zero_grad()
        (-(targets * model(images).log_softmax(1)).sum(1).mean()).backward()
        optimizer.step()
        average = {name: (average[name] + value) / 2 for name, value in model.state_dict().items()}
    return average


@pytest.mark.parametrize(
    "pool, smoothing, averaged", [("mean", 0, False), ("cls", 0.2, False), ("mean", 0.1, True)]
)
def test_training_is_plain_adamw_on_timm_s_vit(
    command, weights, train_folder, tmp_path, pool, smoothing, averaged
):
    # Square images as they are, all in each batch: no crop and no order matters.
    squares = tmp_path / "squares"
    for path in train_folder.rglob("*.png"):
        place = squares / path.relative_to(train_folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as picture:
            picture.resize((32, 32)).save(place)
    whole = ["batch_size=36", "accumulation=2", "scale=[1,1]", "flip=0", "warmup_epochs=0", "epochs=3"]
    own = [f"pool={pool}", f"smoothing={smoothing}", *(["ema_decay=0.5"] if averaged else [])]
    assert command(*PLAIN, *whole, *own, "save=true", data=squares) == 0
    trained = load_file(tmp_path / "out" / "model.safetensors")

    encoder, config = load_encoder(str(weights))
    torch.manual_seed(0)
    copy = copy_encoder(encoder, config.grid, config, "fp32")
    start = timm_tensors(Classifier(copy, 16, 3, pool), config)
    assert start["head.weight"].std() == pytest.approx(2e-5, rel=0.3)
    call = result(tmp_path)["sweep"][0]["load"]
    model = eval(call, {"timm": timm})  # as its reader does
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in trained.items())
    model.load_state_dict(start)
    labelled = read_labelled(str(squares), config.data, None, "--data")
    images = load_images(labelled.index, config.data, len(labelled))
    x = (images / 255 - torch.tensor(config.data.mean)) / torch.tensor(config.data.std)
    labels = torch.from_numpy(labelled.labels)
    average = train_timm(model.train(), x.permute(0, 3, 1, 2), labels, 3, depth=2, smoothing=smoothing)
    for name, value in (average if averaged else model.state_dict()).items():
        if name == "pos_embed":
            assert torch.equal(value, trained[name])
            continue
        moved = (value - start[name]).abs().max()
        assert moved > 0, name
        torch.testing.assert_close(trained[name], value, rtol=0, atol=0.02 * moved.item() + 1e-7, msg=name)


def test_a_killed_training_goes_on_bit_for_bit(command, tmp_path):
    words = ["epochs=12", "save=true", "ema_decay=0.9", "trainable_blocks=[1,0]", "test_every=40"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "fastmim.cli", *command(*words, out="killed", run=False)],
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    log = tmp_path / "killed" / "blocks-1.jsonl"
    wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") >= 2, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (tmp_path / "killed" / "blocks-1.unfinished").exists()
    assert not (tmp_path / "killed" / "eval.json").exists()
    done = len(log.read_text().splitlines())
    assert done < 12
    first = log.read_text().splitlines()[:1]
    assert command(*words, "seed=1", out="killed") == 2
    # In processes as the killed one was: sums differ in their last bits with the number of threads.
    for out in ("killed", "whole"):
        done = run_command(command(*words, out=out, run=False))
        assert done.returncode == 0, done.stderr
    assert log.read_text().splitlines()[:1] == first, "trained again from the start"
    assert result(tmp_path, "killed") | {"sweep": 0} == result(tmp_path, "whole") | {"sweep": 0}
    for name in ("blocks-1", "blocks-0"):
        assert_same_weights(*(tmp_path / out / f"{name}.safetensors" for out in ("killed", "whole")))
        told = [
            [(r["epoch"], r["loss"]) for r in records(tmp_path, out, name)] for out in ("killed", "whole")
        ]
        assert told[0] == told[1] and len(told[0]) == 12
    assert not list((tmp_path / "killed").glob("*.unfinished"))


def test_two_ranks_are_one(command, tmp_path):
    # All but stochastic depth, whose draws are a rank's own.
    words = ["epochs=2", "precision=fp32", "drop_path=0", "images_at_once=4", "save=true"]
    assert command(*words, out="one") == 0
    done = run_command(command(*words, out="two", run=False), ranks=2)
    assert done.returncode == 0 and done.stdout.count("eval.json: top-1") == 1, done.stdout + done.stderr
    one, two = (result(tmp_path, out) for out in ("one", "two"))
    assert one["top1"] == two["top1"] and one["settings"] == two["settings"]
    losses = [[record["loss"] for record in records(tmp_path, out)] for out in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    files = [load_file(tmp_path / out / "model.safetensors") for out in ("one", "two")]
    for name, value in files[0].items():
        torch.testing.assert_close(files[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_what_cannot_be_trained_is_refused_in_one_line(command, tmp_path, capsys):
    (tmp_path / "other.yaml").write_text("protocol: linear\nsolver: exact\n")
    (tmp_path / "none.yaml").write_text("epochs: 3\n")
    refused = {
        "trainable_blocks=3; expected at most the encoder's 2 blocks": ["trainable_blocks=3"],
        "trainable_blocks=0.25; expected 0, 0.5 or a whole number": ["trainable_blocks=[1,0.25]"],
        "trainable_blocks=-1; expected 0, 0.5": ["trainable_blocks=-1"],
        "trainable_blocks=[1.0, 1.0]; expected different values": ["trainable_blocks=[1,1]"],
        "image_size=[36, 32]; expected multiples of the patch size 8": ["image_size=[36,32]"],
        "batch_size=48; expected at most the 36 training images": ["batch_size=48"],
        "batch_size=9; expected a multiple of 2 (1 ranks x accumulation=1, in pairs": ["batch_size=9"],
        "batch_size=12; expected a multiple of accumulation=5": ["accumulation=5"],
        "warmup_epochs=5; expected less than epochs=5": ["warmup_epochs=5", "epochs=5"],
        "min_lr=1; expected at most the peak learning rate": ["min_lr=1"],
        "rand_augment='autoaugment'": ["rand_augment=autoaugment"],
        "--recipe linear_small: protocol='linear'; expected 'finetune'": ["--recipe", "linear_small"],
        "protocol='linear'; expected 'finetune'": ["--recipe", tmp_path / "other.yaml"],
        "protocol=None; expected 'finetune'": ["--recipe", tmp_path / "none.yaml"],
        "--recipe nothing: unknown recipe; expected one of": ["--recipe", "nothing"],
    }
    for shown, words in refused.items():
        assert command(*map(str, words)) == 2, shown
        told = capsys.readouterr().err
        assert shown in told and told.count("\n") == 1, told


def test_a_diverged_training_ends(command, tmp_path, capsys):
    assert command(*PLAIN, "epochs=3", "blr=1e30", "warmup_epochs=0") == 3
    assert "had no finite gradient; lower blr=1e+30" in capsys.readouterr().err
