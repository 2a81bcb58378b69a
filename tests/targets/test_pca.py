"""Principal coefficients of patches: the basis against an SVD in float64, and runs that predict them."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastmim import manifest as manifests
from fastmim import recipes
from fastmim.errors import ConfigError
from fastmim.models.pixels import PixelScale
from fastmim.reconstruct import reconstruct_images
from fastmim.targets import build_head
from tests.launching import TINY_YAML, launch, losses, records, train, write_images

COMPONENTS = 12


@pytest.fixture
def fitted(tiny_config):
    config = tiny_config("target.kind=pca", f"target.components={COMPONENTS}", "data.image_size=[16,32]")
    images = smooth_images(70, 16, 32)
    head = build_head(config, 32, PixelScale(config.data.mean, config.data.std))
    head.prepare(images)
    return config, head, images


def smooth_images(n, height, width):
    """Pictures whose patches vary along some directions more than along others."""
    torch.manual_seed(0)
    small = torch.rand(n, 3, height // 4, width // 4)
    large = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")
    return (large * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def all_patches(config, images):
    """float64 [n * N, L], one patch after the other."""
    size = config.model.patch_size
    pixels = (images.numpy().astype(np.float64) / 255 - config.data.mean) / config.data.std
    return np.stack(
        [
            image[row : row + size, column : column + size].ravel()
            for image in pixels
            for row in range(0, image.shape[0], size)
            for column in range(0, image.shape[1], size)
        ]
    )


def svd_basis(patches):
    """Mean and the first right singular vectors, each with its largest entry positive."""
    mean = patches.mean(0)
    directions = np.linalg.svd(patches - mean, full_matrices=False)[2][:COMPONENTS]
    largest = directions[np.arange(COMPONENTS), np.abs(directions).argmax(1)]
    return mean, directions * np.sign(largest)[:, None]


def test_the_basis_is_that_of_an_svd(fitted):
    config, head, images = fitted
    mean, directions = svd_basis(all_patches(config, images))
    np.testing.assert_allclose(head.basis.mean, mean, atol=1e-5)
    np.testing.assert_allclose(head.basis.components, directions, atol=1e-4)


def test_loss_and_gradients_are_the_formulas(fitted):
    config, head, images = fitted
    images, ids = images[:2], torch.tensor([[1, 4, 7], [0, 2, 3]])
    patches = torch.tensor(all_patches(config, images)).view(2, 8, -1)
    mean, directions = map(torch.tensor, svd_basis(all_patches(config, smooth_images(70, 16, 32))))
    x = torch.randn(2, 3, 32, requires_grad=True)
    loss, per_patch, pred = head(x, images, ids)
    loss.backward()

    exact = x.detach().double().requires_grad_()
    weight, bias = head.linear.weight.detach().double().requires_grad_(), head.linear.bias.detach().double()
    wanted = (patches[torch.arange(2)[:, None], ids] - mean) @ directions.T
    error = (exact @ weight.T + bias - wanted).square()
    error.mean().backward()
    torch.testing.assert_close(loss.double(), error.mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(per_patch.double(), error.mean(-1), rtol=1e-4, atol=0)
    assert not per_patch.requires_grad and loss.dtype == torch.float32
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(head.linear.weight.grad.double(), weight.grad, rtol=1e-3, atol=1e-4)
    pixels = mean + (exact @ weight.T + bias) @ directions
    torch.testing.assert_close(head.to_pixels(pred).double(), pixels, rtol=1e-3, atol=1e-3)


def test_bf16_rounds_the_linear_and_not_the_basis(fitted):
    _, head, images = fitted
    before = {name: value.clone() for name, value in head.basis.state_dict().items()}
    head.bfloat16()
    assert head.linear.weight.dtype == torch.bfloat16
    assert all(torch.equal(head.basis.state_dict()[name], value) for name, value in before.items())
    loss = head(torch.randn(2, 8, 32, dtype=torch.bfloat16), images[:2], torch.arange(8).expand(2, -1)).loss
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_a_basis_that_was_never_fitted_gives_no_number(tiny_config):
    config = tiny_config("target.kind=pca", "target.components=5")
    head = build_head(config, 32, PixelScale(config.data.mean, config.data.std))
    images = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    assert head(torch.zeros(1, 2, 32), images, torch.tensor([[0, 3]])).loss.isnan()


def test_more_components_than_values_are_refused():
    overrides = ["target.kind=pca", "model.patch_size=4", "data.image_size=32", "target.components=49"]
    with pytest.raises(ConfigError, match=r"target.components=49; expected at most the 48 values of a patch"):
        recipes.override(overrides)


PCA = ["data.source=images", "target.kind=pca", "target.components=20", "target.fit_images=10"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pca")
    write_images(folder / "images", 24)
    (folder / "tiny.yaml").write_text(TINY_YAML)
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def whole(recipe):
    return train(recipe, *PCA, "output=whole", "train.max_steps=4", "train.precision=bf16")


def test_a_resumed_run_is_bitwise_the_same(recipe, whole):
    arguments = [*PCA, "output=parts", "train.precision=bf16"]
    train(recipe, *arguments, "train.max_steps=2")
    assert losses(train(recipe, *arguments, "train.max_steps=4")) == losses(whole)
    checkpoints = [manifests.checkpoint_path(recipe.parent / run, 4) for run in ("parts", "whole")]
    ours, theirs = (load_file(checkpoint / manifests.WEIGHTS) for checkpoint in checkpoints)
    assert (
        theirs["head.basis.components"].shape == (20, 192)
        and theirs["head.basis.components"].isfinite().all()
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_trained_run_reconstructs(recipe, whole, tmp_path):
    told = reconstruct_images(
        str(recipe.parent / "whole"), str(recipe.parent / "images"), str(tmp_path / "out.png")
    )
    assert "8 of 24 images" in told and (tmp_path / "out.png").stat().st_size > 0


def test_two_ranks_share_one_basis_and_pass_over_a_bad_image(recipe, tmp_path):
    folder = write_images(tmp_path / "images", 24)
    data = (folder / "0000.png").read_bytes()
    (folder / "0000.png").write_bytes(data[:60] + bytes(len(data) - 80) + data[-20:])
    (tmp_path / "tiny.yaml").write_text(TINY_YAML)
    arguments = [*PCA, "train.max_steps=2", "data.max_bad_fraction=0.1"]
    alone = train(tmp_path / "tiny.yaml", *arguments, "output=one")
    done = launch(
        tmp_path / "tiny.yaml", *arguments, "output=two", "deepspeed.zero_optimization.stage=3", ranks=2
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("0000.png cannot be decoded (damaged or truncated pixels); it is left out") == 1
    np.testing.assert_allclose(losses(records(tmp_path / "two")), losses(alone), rtol=1e-4)
