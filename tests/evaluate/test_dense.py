"""Maps of a dense encoder, against the encoder itself and against attention written out window by window."""

import pytest
import torch
import torch.nn.functional as F

from fastmim.errors import ConfigError
from fastmim.evaluate.dense import DenseEncoder, even_blocks
from fastmim.masking import mask_from_order
from fastmim.models import Encoder
from fastmim.models.pixels import PixelScale


@pytest.fixture
def config(tiny_config):
    return tiny_config("model.depth=3")


@pytest.fixture
def encoder(config):
    torch.manual_seed(0)
    return Encoder(config, PixelScale(config.data.mean, config.data.std)).eval()


def pictures(*size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


def test_maps_are_the_outputs_of_blocks_at_the_size_of_training(encoder, config):
    images = pictures(2, 32, 32, 3)
    everything = mask_from_order(torch.arange(16).expand(2, -1), 16)
    layers = encoder(images, everything, every_layer=True)
    maps = DenseEncoder(encoder, config, blocks=[1, 3])(images)
    for block, told in zip((1, 3), maps, strict=True):
        wanted = layers[block][:, 1:].mT.reshape(2, 32, 4, 4)
        torch.testing.assert_close(told, wanted)
    (normed,) = DenseEncoder(encoder, config, blocks=[3], normalised=True)(images)
    torch.testing.assert_close(normed, encoder(images, everything)[:, 1:].mT.reshape(2, 32, 4, 4))


def test_positions_of_another_grid_cover_the_same_extent(encoder, config):
    """Twice the patches of one image: a token's position is between those of the patches that it was part of."""
    dense = DenseEncoder(encoder, config, blocks=[1])
    with torch.no_grad():
        for parameter in encoder.blocks.parameters():
            parameter.zero_()  # blocks add nothing: a map is patches and positions
        encoder.patch_embed.weight.zero_()
        (told,) = dense(pictures(1, 48, 64, 3))
    table = encoder.pos_embed[0, 1:].T.reshape(1, 32, 4, 4)
    wanted = F.interpolate(table, (6, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(told, wanted)
    assert torch.allclose(told.mean((2, 3)), table.mean((2, 3)), atol=0.1)


def test_weights_for_other_images_are_the_same_backbone(encoder, config, tiny_config):
    """Their table is resized already; that of training is what counts."""
    wide = tiny_config("model.depth=3", "data.image_size=[48,80]", "model.positions_grid=[4,4]")
    other = Encoder(wide, encoder.scale).eval()
    other.load_state_dict(encoder.state_dict())
    for size in ((32, 32), (48, 80), (64, 24)):
        images = pictures(1, *size, 3)
        with torch.no_grad():
            ours, theirs = DenseEncoder(encoder, config)(images), DenseEncoder(other, wide)(images)
        for one, another in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, another)


def test_images_of_other_sizes_are_seen_where_they_are(encoder, config):
    images = pictures(1, 24, 40, 3)
    changed = images.clone()
    changed[0, 16:24, 8:16] = 255 - changed[0, 16:24, 8:16]
    with torch.no_grad():
        before, after = (DenseEncoder(encoder, config, blocks=[1])(x)[0] for x in (images, changed))
    moved = (after - before).norm(dim=1)[0]
    assert moved.shape == (3, 5) and moved.argmax().item() == 2 * 5 + 1


def test_blocks_attend_within_windows_as_vitdet_does(encoder, config):
    images = pictures(2, 32, 48, 3)
    dense = DenseEncoder(encoder, config, blocks=[1, 2], window=3, global_blocks=[2])
    first, second = dense(images)
    x = dense._embed(images, (4, 6)).unflatten(1, (4, 6))
    block = encoder.blocks.layers[0]
    normed = F.pad(F.layer_norm(x, (32,), block.norm1.weight, block.norm1.bias, 1e-6), (0, 0, 0, 0, 0, 2))
    attended = torch.zeros_like(normed)
    for row in (0, 3):
        for column in (0, 3):
            part = normed[:, row : row + 3, column : column + 3].flatten(1, 2)
            attended[:, row : row + 3, column : column + 3] = block.attn(part).unflatten(1, (3, 3))
    x = x + attended[:, :4]
    x = x + block.mlp(F.layer_norm(x, (32,), block.norm2.weight, block.norm2.bias, 1e-6))
    torch.testing.assert_close(first, x.permute(0, 3, 1, 2))
    block = encoder.blocks.layers[1]
    torch.testing.assert_close(second, block.closed(x.flatten(1, 2)).mT.unflatten(2, (4, 6)))


@pytest.mark.parametrize("options", [{}, {"normalised": True, "blocks": [3]}, {"window": 2}, {"blocks": [1]}])
def test_gradients_reach_what_has_a_part_and_nothing_else_wants_them(encoder, config, options):
    dense = DenseEncoder(encoder, config, **options).train()
    sum(each.square().mean() for each in dense(pictures(2, 32, 32, 3))).backward()
    for name, parameter in dense.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert encoder.patch_embed.weight.grad.abs().sum() > 0


def test_recomputed_blocks_give_the_same_gradients(encoder, config):
    images = pictures(2, 32, 32, 3)
    gradients = []
    for checkpointing in (False, True):
        encoder.blocks.checkpointing = checkpointing
        encoder.zero_grad()
        sum(each.square().mean() for each in DenseEncoder(encoder, config, window=3)(images)).backward()
        gradients.append(encoder.patch_embed.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_a_frozen_encoder_stays_as_it_is(encoder, config):
    dense = DenseEncoder(encoder, config, trainable=False, drop_path=0.5).train()
    assert not any(parameter.requires_grad for parameter in dense.parameters())
    images = pictures(4, 32, 32, 3)
    first, again = dense(images), dense(images)
    assert not first[0].requires_grad and torch.equal(first[-1], again[-1])


def test_stochastic_depth_is_of_training_alone(encoder, config):
    images = pictures(4, 32, 32, 3)
    plain = DenseEncoder(encoder, config)(images)[-1]
    dense = DenseEncoder(encoder, config, drop_path=0.9)
    assert not torch.equal(dense.train()(images)[-1], plain)
    assert torch.equal(dense.eval()(images)[-1], plain)


def test_blocks_divide_the_depth_evenly():
    assert [even_blocks(depth) for depth in (12, 24, 6, 2)] == [
        [3, 6, 9, 12],
        [6, 12, 18, 24],
        [2, 3, 5, 6],
        [1, 1, 2, 2],
    ]


def test_what_does_not_fit_is_refused(encoder, config):
    dense = DenseEncoder(encoder, config)
    for size in ((1, 32, 36, 3), (1, 32, 32, 1)):
        with pytest.raises(
            ConfigError, match=f"images of 32x{size[2]} pixels and {size[3]} channels; expected"
        ):
            dense(pictures(*size))
    for blocks in ([], [4], [0], [2, 1]):
        with pytest.raises(ConfigError, match="expected ascending numbers from 1 to 3"):
            DenseEncoder(encoder, config, blocks=blocks)
    with pytest.raises(ConfigError, match="without a window"):
        DenseEncoder(encoder, config, global_blocks=[1])
