import torch
from fastmim.kernels import gather_patches, gather_tokens, masked_pixel_loss, unshuffle

from tests.kernels.kernel_testing import constants, random_images

MEAN, STD = constants(3)


def training_step(images, noise, weight, mask_token, pos_embed):
    """The four operations as a masked autoencoder of one linear layer uses them."""
    shuffle = noise.argsort(1)
    ids_keep, ids_mask, ids_restore = shuffle[:, :2], shuffle[:, 2:], shuffle.argsort(1)
    x = gather_patches(images, ids_keep, 4, MEAN, STD, torch.float32) @ weight
    x = x + gather_tokens(pos_embed.expand(x.shape[0], -1, -1), ids_keep, offset=1)
    x = unshuffle(torch.cat([x[:, :1], x], dim=1), mask_token, pos_embed, ids_restore)
    pred = gather_tokens(x, ids_mask, offset=1) @ weight.T
    return masked_pixel_loss(pred, images, ids_mask, 4, MEAN, STD, norm_pix=True)[0]


def test_compiled_gradients_follow_the_batch_size(compiler):
    shapes = (48, 16), (1, 1, 16), (1, 7, 16)
    parameters = [torch.randn(shape, requires_grad=True) for shape in shapes]
    compiled = compiler(training_step, dynamic=True)
    for batch in (2, 3, 5):
        data = random_images(batch, 8, 12, 3), torch.rand(batch, 6)
        expected = torch.autograd.grad(training_step(*data, *parameters), parameters)
        actual = torch.autograd.grad(compiled(*data, *parameters), parameters)
        torch.testing.assert_close(actual, expected)
