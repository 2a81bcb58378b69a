"""Properties that hold whatever the sizes: what is taken out goes back, and order does not matter."""

import pytest
import torch
from fastmim.kernels import (
    embed_tokens,
    gather_tokens,
    masked_pixel_loss,
    sample_random_mask,
    scatter_tokens,
    unshuffle,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.kernel_testing import assert_same_sums, constants, random_images

# The backend is set once for all examples, and no example changes it.
SAME_BACKEND = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def masked_tokens(draw):
    """Tokens [B, N, D] and a mask of them."""
    batch, patches, width = draw(st.integers(1, 3)), draw(st.integers(2, 70)), draw(st.integers(1, 40))
    keep = draw(st.integers(1, patches - 1))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(batch, patches, width)
    epochs = torch.zeros(batch, dtype=torch.int64)
    seed = draw(st.integers(0, 2**63))
    return x, sample_random_mask(seed, epochs, torch.arange(batch), patches, keep)[:3]


@SAME_BACKEND
@given(case=masked_tokens())
def test_unshuffle_restores_what_gather_kept(backend, case):
    x, (ids_keep, ids_mask, ids_restore) = case
    batch, patches, width = x.shape
    kept = gather_tokens(x, ids_keep)
    cls, mask_token = torch.full((batch, 1, width), 7.0), torch.full((1, 1, width), 5.0)
    latent = torch.cat([cls, kept], 1)
    restored = unshuffle(latent, mask_token, torch.zeros(1, 1 + patches, width), ids_restore)
    assert torch.equal(restored[:, :1], cls)
    assert torch.equal(gather_tokens(restored, ids_keep, offset=1), kept)
    assert (gather_tokens(restored, ids_mask, offset=1) == 5.0).all()
    both = scatter_tokens(kept, ids_keep, patches) + scatter_tokens(
        gather_tokens(x, ids_mask), ids_mask, patches
    )
    assert torch.equal(both, x)


@SAME_BACKEND
@given(case=masked_tokens())
def test_each_token_carries_the_position_it_came_from(backend, case):
    _, (ids_keep, _, ids_restore) = case
    batch, patches = ids_restore.shape
    place = torch.arange(1 + patches, dtype=torch.float32)[None, :, None]
    zero = torch.zeros(1, 1, 1)
    embedded = embed_tokens(zero.expand(batch, ids_keep.shape[1], 1), zero, place, ids_restore)
    assert torch.equal(embedded[:, 1:, 0].long(), ids_keep + 1)
    assert (embedded[:, 0] == 0).all()


@pytest.mark.parametrize("norm_pix", [False, True])
@SAME_BACKEND
@given(data=st.data())
def test_loss_does_not_depend_on_the_order_of_samples(backend, norm_pix, data):
    batch = data.draw(st.integers(2, 5), "batch")
    order = torch.tensor(data.draw(st.permutations(range(batch)), "order"))
    removed = data.draw(st.integers(1, 5), "removed")
    images, statistics = random_images(batch, 8, 12, 3), constants(3)
    pred = torch.randn(batch, removed, 48)
    _, ids_mask, *_ = sample_random_mask(
        0, torch.zeros(batch).long(), torch.arange(batch), patches=6, keep=6 - removed
    )
    loss, per_patch = masked_pixel_loss(pred, images, ids_mask, 4, *statistics, norm_pix)
    permuted, per_patch_permuted = masked_pixel_loss(
        pred[order], images[order], ids_mask[order], 4, *statistics, norm_pix
    )
    assert_same_sums(per_patch_permuted, per_patch[order], backend)
    torch.testing.assert_close(permuted, loss, rtol=1e-6, atol=0)
