"""Heads and their loss."""

import numpy as np
import pytest
import torch
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetHead

from fastmim.evaluate.segment.heads import LinearHead, Pyramid, UPerNet, segmentation_loss


def maps(width=8, side=(6, 8), count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, width, *side, generator=generator) for _ in range(count)]


def test_four_scales_come_of_maps_of_one_size():
    shapes = [tuple(each.shape[2:]) for each in Pyramid(8)(maps())]
    assert shapes == [(24, 32), (12, 16), (6, 8), (3, 4)]


@pytest.mark.parametrize("side", [(6, 8), (5, 7), (2, 2)])
def test_upernet_answers_at_the_largest_scale_and_trains_whole(side):
    head = UPerNet(8, 16, 5, dropout=0.1, auxiliary=True)
    logits, auxiliary = head(maps(side=side))
    assert logits.shape == (2, 5, 4 * side[0], 4 * side[1]) and auxiliary.shape == (2, 5, *side)
    classes = torch.randint(0, 5, (2, 8 * side[0], 8 * side[1]))
    segmentation_loss([logits, auxiliary], classes, 255, 0.4).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert len(head.eval()(maps(side=side))) == 1
    assert len(UPerNet(8, 16, 5, 0.1, auxiliary=False)(maps(side=side))) == 1


def test_upernet_fuses_as_transformers_does():
    """The same weights in the head of another implementation, which works on any four scales."""
    torch.manual_seed(0)
    head = UPerNet(8, 16, 5, dropout=0.0, auxiliary=False).eval()
    config = UperNetConfig(hidden_size=16, num_labels=5, pool_scales=[1, 2, 3, 6])
    theirs = UperNetHead(config, in_channels=[8, 8, 8, 8]).eval()
    pairs = {
        "psp_modules.{}.1": [pool[1] for pool in head.pools],
        "lateral_convs.{}": list(head.laterals),
        "fpn_convs.{}": list(head.smooth),
    }
    modules = {name.format(i): each for name, of in pairs.items() for i, each in enumerate(of)}
    modules |= {"bottleneck": head.bottleneck, "fpn_bottleneck": head.fuse}
    for name, ours in modules.items():
        theirs.get_submodule(name).conv.load_state_dict(ours[0].state_dict())
    theirs.classifier.load_state_dict(head.classify.state_dict())
    with torch.no_grad():
        for buffer in head.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
        for name, ours in modules.items():
            theirs.get_submodule(name).batch_norm.load_state_dict(ours[1].state_dict())
        scales = head.pyramid(maps())
        torch.testing.assert_close(head(maps())[0], theirs(scales))


def test_a_linear_head_sees_the_last_map_alone():
    head = LinearHead(8, 3).eval()
    assert torch.equal(head(maps())[0], head(maps()[-1:])[0])
    assert head(maps())[0].shape == (2, 3, 6, 8)


def test_the_loss_is_the_mean_over_labelled_pixels():
    generator = torch.Generator().manual_seed(0)
    logits, auxiliary = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    classes = torch.randint(0, 3, (2, 4, 4), generator=generator)
    classes[0, :2] = 255

    def mean(values):
        values = values.double().numpy()
        chance = np.exp(values) / np.exp(values).sum(1, keepdims=True)
        right = [
            -np.log(chance[b, classes[b, y, x], y, x])
            for b, y, x in np.ndindex(2, 4, 4)
            if classes[b, y, x] != 255
        ]
        return np.mean(right)

    told = segmentation_loss([logits, auxiliary], classes, 255, 0.4)
    assert told.item() == pytest.approx(mean(logits) + 0.4 * mean(auxiliary), rel=1e-5)
    nothing = segmentation_loss([logits], torch.full_like(classes, 255), 255, 0.4)
    assert nothing.item() == 0
