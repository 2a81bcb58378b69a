"""From a run under ZeRO-3 to other libraries and back into a run, by the commands that a user types."""

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import ViTMAEForPreTraining

from fastmim import manifest as manifests
from fastmim.cli import main
from tests.launching import TINY_YAML, launch, train, write_images


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of two ranks under ZeRO-3, with averaged weights."""
    folder = tmp_path_factory.mktemp("exchange")
    write_images(folder / "images", 10)
    (folder / "tiny.yaml").write_text(TINY_YAML)
    options = ["train.max_steps=2", "train.ema_decay=0.5", "deepspeed.zero_optimization.stage=3"]
    train(folder / "tiny.yaml", "data.source=images", "output=run", *options, ranks=2)
    return folder / "run"


def checkpoint(run, step):
    return manifests.checkpoint_path(run, step)


def test_sharded_weights_reach_other_libraries_whole(run, tmp_path, capsys):
    stored = load_file(checkpoint(run, 2) / "model.safetensors")
    assert main(["export", str(run), "--to", "timm", str(tmp_path / "t.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "encoder in the layout of timm, step 2" in told and "left out: decoder, head" in told
    model = eval(told.partition("to load it: ")[2], {"timm": timm})
    assert torch.equal(model.blocks[1].attn.qkv.weight, stored["encoder.blocks.layers.1.attn.qkv.weight"])
    assert main(["export", str(checkpoint(run, 2)), str(tmp_path / "h"), "--to", "transformers"]) == 0
    peer = ViTMAEForPreTraining.from_pretrained(tmp_path / "h")
    assert torch.equal(peer.decoder.decoder_pred.weight, stored["head.linear.weight"])
    assert main(["export", str(run), str(tmp_path / "e.pth"), "--to", "mae", "--ema"]) == 0
    averaged = load_file(checkpoint(run, 2) / "ema.safetensors")
    content = torch.load(tmp_path / "e.pth", weights_only=True)
    assert torch.equal(content["model"]["mask_token"], averaged["decoder.mask_token"])
    assert content["fastmim"]["fastmim.averaged"] == "true"
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        metadata = file.metadata()
    manifest = manifests.read_manifest(checkpoint(run, 2))
    assert metadata["fastmim.step"] == "2" and metadata["fastmim.epoch"] == "1.6"
    assert metadata.get("fastmim.commit") == manifest["versions"]["commit"]


def test_a_run_starts_from_what_was_imported_but_a_resume_does_not(run, tmp_path):
    """The first step has a learning rate of 0, so its checkpoint shows what the run began with."""
    recipe, init = run.parent / "tiny.yaml", str(tmp_path / "in.safetensors")
    wanted = load_file(checkpoint(run, 2) / "model.safetensors")
    assert main(["export", str(run), str(tmp_path / "m.pth"), "--to", "mae"]) == 0
    assert main(["import", str(tmp_path / "m.pth"), init]) == 0
    common = ["data.source=images", "output=next", "deepspeed.zero_optimization.stage=3"]
    done = launch(recipe, *common, f"model.init={init}", "train.max_steps=1")
    assert done.returncode == 0, done.stdout
    assert f"starting from {init}" in done.stdout
    held = load_file(checkpoint(run.parent / "next", 1) / "model.safetensors")
    assert held.keys() == wanted.keys() and all(torch.equal(held[name], wanted[name]) for name in wanted)
    # The file is not needed any more.
    done = launch(recipe, *common, "model.init=gone.pth", "train.max_steps=2")
    assert done.returncode == 0, done.stdout
    assert "resuming after step 1" in done.stdout and "starting from" not in done.stdout


def test_reconstruct_takes_a_file_with_a_decoder(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "whole.safetensors"), "--to", "fastmim"]) == 0
    assert (
        main(["export", str(run), str(tmp_path / "part.safetensors"), "--to", "fastmim", "--encoder-only"])
        == 0
    )
    arguments = ["--images", str(run.parent / "images"), "--out", str(tmp_path / "sheet.png"), "--count", "2"]
    assert main(["reconstruct", "--checkpoint", str(tmp_path / "whole.safetensors"), *arguments]) == 0
    assert "whole.safetensors, step 2, 75% of the patches" in capsys.readouterr().out
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.size[0] > 100
    assert main(["reconstruct", "--checkpoint", str(tmp_path / "part.safetensors"), *arguments]) == 2
    assert "such as decoder.blocks.layers.0.attn.proj.bias; expected a decoder" in capsys.readouterr().err


def test_bad_words_end_in_one_line(run, tmp_path, capsys):
    out = str(tmp_path / "o.safetensors")
    assert main(["export", str(run), out, "--to", "timm", "--image-size", "20", "16"]) == 2
    assert capsys.readouterr().err.startswith("fastmim export: data.image_size=[20, 16]; expected multiples")
    assert main(["import", str(tmp_path / "none.pth"), out, "--from", "mae", "model.heads=2"]) == 2
    assert "none.pth does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", str(run), out, "--to", "keras"])
    assert "invalid choice: 'keras'" in capsys.readouterr().err
