"""The MAE objective against transformers' ViTMAE: same weights, same mask, same loss and gradients."""

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from fastmim.masking import mask_from_order
from fastmim.objectives import build_objective
from tests.objectives.naive_mae import NaiveMAE, ids_of, images_of
from tests.objectives.naive_vit import assert_gradients, randomise

GRIDS = {"square": (4, 4), "wide": (2, 8)}


def peer_of(config):
    """A ViTMAE of the same shape. Its position tables are set by the caller; here the sizes only need to agree."""
    model, objective = config.model, config.objective
    side = int((config.grid[0] * config.grid[1]) ** 0.5) * model.patch_size
    return ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=model.width,
            num_hidden_layers=model.depth,
            num_attention_heads=model.heads,
            intermediate_size=int(model.width * model.mlp_ratio),
            decoder_hidden_size=objective.decoder_width,
            decoder_num_hidden_layers=objective.decoder_depth,
            decoder_num_attention_heads=objective.decoder_heads,
            decoder_intermediate_size=4 * objective.decoder_width,
            layer_norm_eps=1e-6,
            image_size=side,
            patch_size=model.patch_size,
            num_channels=config.data.channels,
            mask_ratio=config.mask.ratio,
            norm_pix_loss=objective.norm_pix_loss,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def pairs_of(ours, peer):
    """(name, our tensor's view in the peer's layout, peer's parameter) for every parameter."""

    def blocks(mine, theirs):
        for i, (block, layer) in enumerate(zip(mine.layers, theirs, strict=True)):
            for part in ("weight", "bias"):
                rows = getattr(block.attn.qkv, part).chunk(3)
                for piece, name in zip(rows, ("q_proj", "k_proj", "v_proj"), strict=True):
                    yield f"{i}.{name}.{part}", piece, getattr(getattr(layer.attention, name), part)
                yield (
                    f"{i}.proj.{part}",
                    getattr(block.attn.proj, part),
                    getattr(layer.attention.o_proj, part),
                )
                yield f"{i}.norm1.{part}", getattr(block.norm1, part), getattr(layer.layernorm_before, part)
                yield f"{i}.norm2.{part}", getattr(block.norm2, part), getattr(layer.layernorm_after, part)
                yield f"{i}.fc1.{part}", getattr(block.mlp.fc1, part), getattr(layer.mlp.fc1, part)
                yield f"{i}.fc2.{part}", getattr(block.mlp.fc2, part), getattr(layer.mlp.fc2, part)

    encoder, decoder = ours.encoder, ours.decoder
    embeddings = peer.vit.embeddings
    yield "cls_token", encoder.cls_token, embeddings.cls_token
    projection = embeddings.patch_embeddings.projection
    size, channels = projection.weight.shape[-1], projection.weight.shape[1]
    weight = encoder.patch_embed.weight.view(-1, size, size, channels).permute(0, 3, 1, 2)
    yield "patch_embed.weight", weight, projection.weight
    yield "patch_embed.bias", encoder.patch_embed.bias, projection.bias
    yield from blocks(encoder.blocks, peer.vit.layers)
    yield "mask_token", decoder.mask_token, peer.decoder.mask_token
    yield from ((f"decoder.{n}", a, b) for n, a, b in blocks(decoder.blocks, peer.decoder.decoder_layers))
    for part in ("weight", "bias"):
        yield f"norm.{part}", getattr(encoder.norm, part), getattr(peer.vit.layernorm, part)
        yield f"embed.{part}", getattr(decoder.embed, part), getattr(peer.decoder.decoder_embed, part)
        yield f"decoder_norm.{part}", getattr(decoder.norm, part), getattr(peer.decoder.decoder_norm, part)
        yield f"pred.{part}", getattr(ours.head.linear, part), getattr(peer.decoder.decoder_pred, part)


def gradients_of(ours, peer):
    """The same pairs, of gradients."""
    for parameter in [*ours.parameters(), *peer.parameters()]:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    swapped = [(p, p.data) for p in [*ours.parameters(), *peer.parameters()]]
    for parameter, _ in swapped:
        parameter.data = parameter.grad
    found = [(name, a.detach().clone(), b.detach().clone()) for name, a, b in pairs_of(ours, peer)]
    for parameter, data in swapped:
        parameter.data = data
    return found


def sincos_table(dim, grid):
    """MAE's table, position by position in float64: half the channels for the column, half for the row."""
    table = torch.zeros(1 + grid[0] * grid[1], dim, dtype=torch.float64)
    quarter = dim // 4
    for row in range(grid[0]):
        for column in range(grid[1]):
            for i in range(quarter):
                omega = 1 / 10000 ** (i / quarter)
                values = table[1 + row * grid[1] + column]
                for start, place in ((0, column), (dim // 2, row)):
                    values[start + i] = torch.sin(torch.tensor(place * omega, dtype=torch.float64))
                    values[start + quarter + i] = torch.cos(torch.tensor(place * omega, dtype=torch.float64))
    return table[None]


@pytest.fixture
def both(request, tiny_config):
    grid, norm_pix, channels = request.param
    height, width = (8 * side for side in GRIDS[grid])
    statistics = [0.5, 0.4, 0.3, 0.2][:channels]
    config = tiny_config(
        f"data.image_size=[{height},{width}]",
        f"objective.norm_pix_loss={norm_pix}",
        f"data.channels={channels}",
        f"data.mean={statistics}",
        f"data.std={statistics}",
    )
    torch.manual_seed(0)
    ours, peer = build_objective(config), peer_of(config)
    with torch.no_grad():
        for _, a, b in pairs_of(ours, peer):
            # Biases and norms start at 0 and 1 in both; random ones show an exchange.
            a.copy_(torch.randn_like(a) * 0.1)
            b.copy_(a)
        peer.vit.embeddings.position_embeddings.copy_(sincos_table(config.model.width, config.grid))
        peer.decoder.decoder_pos_embed.copy_(sincos_table(config.objective.decoder_width, config.grid))
    # The peer resizes its tables for images that are not square; the right tables are already in place.
    encoder_table, decoder_table = peer.vit.embeddings.position_embeddings, peer.decoder.decoder_pos_embed
    peer.vit.embeddings.interpolate_pos_encoding = lambda *_: encoder_table
    peer.decoder.interpolate_pos_encoding = lambda *_: decoder_table
    peer.vit.embeddings.patch_embeddings.image_size = (height, width)
    images = torch.randint(0, 256, (3, height, width, channels), dtype=torch.uint8)
    return config, ours, peer, images


CASES = [("square", True, 3), ("square", False, 1), ("wide", True, 4), ("wide", False, 3)]


@pytest.mark.parametrize("both", CASES, indirect=True, ids=lambda case: "-".join(map(str, case)))
def test_loss_and_gradients_are_transformers(both):
    config, ours, peer, images = both
    noise = torch.rand(len(images), config.grid[0] * config.grid[1])
    mask = mask_from_order(noise.argsort(dim=1), ours.sampler.keep)
    mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
    pixels = ((images / 255 - mean) / std).permute(0, 3, 1, 2)

    loss, per_patch = ours.loss(images, mask)
    wanted = peer(pixel_values=pixels, noise=noise, interpolate_pos_encoding=True)
    assert torch.equal(wanted.mask.bool(), mask.mask)
    torch.testing.assert_close(loss, wanted.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(per_patch.mean(), loss, rtol=1e-5, atol=0)

    loss.backward()
    wanted.loss.backward()
    for name, got, want in gradients_of(ours, peer):
        error = (got - want).norm() / want.norm().clamp_min(1e-12)
        # A key's bias shifts all scores of a query alike: its true gradient is 0, and both hold rounding noise.
        if not name.endswith("k_proj.bias"):
            assert error < 1e-4, f"{name}: relative error {error:.2e}"


def test_mask_tokens_in_the_encoder_are_those_of_the_formula(tiny_config):
    torch.manual_seed(0)
    config = tiny_config("objective.mask_token_in_encoder=true", "data.image_size=[32,24]")
    objective, images = build_objective(config), images_of(config)
    randomise(objective)
    mask = objective.sample_mask(torch.zeros(3, dtype=torch.int64), torch.arange(3))
    naive, errors = NaiveMAE(objective), []
    for sample, image in enumerate(images):
        kept, removed = ids_of(mask, sample)
        features = naive.decode_mae(naive.encode_with_mask_tokens(image, kept), None, removed)
        errors += [naive.linear(features, "head.linear") - naive.target(image, removed, norm_pix=True)]
    want = torch.stack(errors).square().mean()
    loss, _ = objective.loss(images, mask)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    loss.backward()
    want.backward()
    assert_gradients(objective, naive)
    # All positions go through the encoder, and none is filled after it.
    assert objective.encoder(images, mask).shape == (3, 13, 32)
    assert "decoder.mask_token" not in objective.state_dict()


def test_reconstruct_puts_back_what_the_network_predicts(tiny_config):
    config = tiny_config("objective.norm_pix_loss=false", "data.image_size=[16,32]")
    objective = build_objective(config)
    images = torch.randint(0, 256, (2, 16, 32, 3), dtype=torch.uint8)
    mask = objective.sample_mask(torch.zeros(2, dtype=torch.int64), torch.arange(2))
    rebuilt = objective.reconstruct(images, mask)
    pred = objective.predict(images, mask).detach()
    mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
    for sample in range(2):
        removed = mask.ids_mask[sample].tolist()
        for patch in range(8):
            row, column = divmod(patch, 4)
            window = (sample, slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
            if patch not in removed:
                assert torch.equal(rebuilt[window], images[window])
                continue
            values = pred[sample, removed.index(patch)].view(8, 8, 3) * std + mean
            assert torch.equal(rebuilt[window], (values * 255).round().clamp(0, 255).to(torch.uint8))


@pytest.mark.parametrize("size", ["[32,8]", "[8,32]", "[32,32]"])
def test_reconstruct_leaves_its_images_as_they_are(tiny_config, size):
    config = tiny_config(f"data.image_size={size}")
    objective = build_objective(config)
    images = torch.randint(0, 256, (2, *config.data.image_size, 3), dtype=torch.uint8)
    before = images.clone()
    mask = objective.sample_mask(torch.zeros(2, dtype=torch.int64), torch.arange(2))
    rebuilt = objective.reconstruct(images, mask)
    assert torch.equal(images, before) and not torch.equal(rebuilt, before)


def test_normalised_predictions_get_the_statistics_of_visible_patches(tiny_config):
    config = tiny_config("objective.norm_pix_loss=true", "data.image_size=[32,64]")
    objective = build_objective(config)
    images = torch.randint(0, 256, (2, 32, 64, 3), dtype=torch.uint8)
    mask = objective.sample_mask(torch.zeros(2, dtype=torch.int64), torch.arange(2))
    pred = objective.predict(images, mask).detach().double()
    rebuilt = objective.reconstruct(images, mask)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (config.data.mean, config.data.std))
    for sample in range(2):
        pixels = ((images[sample].double() / 255 - mean) / std).reshape(4, 8, 8, 8, 3)
        for rank, patch in enumerate(mask.ids_mask[sample].tolist()):
            weight_sum = mean_sum = contrast_sum = 0.0
            for other in mask.ids_keep[sample].tolist():
                weight = 1 / ((patch // 8 - other // 8) ** 2 + (patch % 8 - other % 8) ** 2)
                values = pixels[other // 8, :, other % 8].flatten()
                weight_sum += weight
                mean_sum += weight * values.mean()
                contrast_sum += weight * (values.var() + 1e-6).sqrt()
            want = pred[sample, rank] * contrast_sum / weight_sum + mean_sum / weight_sum
            want = ((want.view(8, 8, 3) * std + mean) * 255).clamp(0, 255)
            row, column = 8 * (patch // 8), 8 * (patch % 8)
            got = rebuilt[sample, row : row + 8, column : column + 8].double()
            assert (got - want).abs().max() < 0.51
    assert "estimated from the visible patches" in objective.note_on_pictures()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruct_reads_nothing_of_a_removed_patch(tiny_config, norm_pix):
    objective = build_objective(tiny_config(f"objective.norm_pix_loss={norm_pix}"))
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    mask = objective.sample_mask(torch.zeros(2, dtype=torch.int64), torch.arange(2))
    painted = images.clone()
    blocks = painted.view(2, 4, 8, 4, 8, 3).transpose(2, 3)
    blocks[mask.mask.view(2, 4, 4)] = 0
    assert not torch.equal(painted, images)
    assert torch.equal(objective.reconstruct(painted, mask), objective.reconstruct(images, mask))


def test_the_encoder_computes_with_visible_patches_only(tiny_config):
    objective = build_objective(tiny_config())
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    mask = objective.sample_mask(torch.zeros(2, dtype=torch.int64), torch.arange(2))
    tokens = []
    objective.encoder.patch_embed.register_forward_hook(lambda _, args, out: tokens.append(out.shape[1]))
    objective.encoder.blocks.layers[0].register_forward_hook(
        lambda _, args, out: tokens.append(args[0].shape[1])
    )
    latent = objective.encoder(images, mask)
    assert tokens == [4, 5]
    painted = images.clone()
    blocks = painted.view(2, 4, 8, 4, 8, 3).transpose(2, 3)
    for sample in range(2):
        for patch in mask.ids_mask[sample].tolist():
            blocks[sample, patch // 4, patch % 4] = 0
    assert torch.equal(objective.encoder(painted, mask), latent)


def test_the_last_linear_runs_on_removed_patches_only(tiny_config):
    objective = build_objective(tiny_config())
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    mask = objective.sample_mask(torch.zeros(2, dtype=torch.int64), torch.arange(2))
    seen = []
    for module in (objective.decoder.norm, objective.head.linear):
        module.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    objective.predict(images, mask)
    assert seen == [12, 12]


def test_pixel_statistics_keep_their_precision(tiny_config):
    objective = build_objective(tiny_config()).bfloat16()
    assert objective.scale.mean.dtype == torch.float32
    assert objective.scale.mean.tolist() == pytest.approx([0.485, 0.456, 0.406], abs=1e-7)
    assert objective.encoder.cls_token.dtype == torch.bfloat16
