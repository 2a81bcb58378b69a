"""R-MAE and C-MAE against their formulas: two branches, complementary masks, what is shared and what is stopped."""

import pytest
import torch

from fastmim.objectives import build_objective
from tests.objectives.naive_mae import NaiveMAE, ids_of, images_of
from tests.objectives.naive_vit import assert_gradients, randomise

DECODER = ["objective.decoder_width=16", "objective.decoder_depth=1", "objective.decoder_heads=2"]
SHARED, STOPPED = "objective.share_decoder=true", "objective.stop_gradient=true"


def build(tiny_config, name, *overrides):
    torch.manual_seed(0)
    config = tiny_config(f"objective.name={name}", *DECODER, "data.image_size=[32,24]", *overrides)
    objective = build_objective(config)
    randomise(objective)
    images = images_of(config)
    return objective, images, objective.sample_mask(torch.zeros(3, dtype=torch.int64), torch.arange(3))


def naive_branches(naive, image, kept, removed, shared):
    """Features of removed patches, unseen and seen."""
    first = naive.decode_mae(naive.encode(image, kept), kept, removed)
    second_decoder = "decoder" if shared else "second_decoder"
    return first, naive.decode_mae(naive.encode(image, removed), removed, removed, second_decoder)


@pytest.mark.parametrize("ratio", [0.75, 0.4])
def test_a_swapped_mask_is_the_complement(tiny_config, ratio):
    _, _, mask = build(tiny_config, "r_mae", f"mask.ratio={ratio}")
    swapped = mask.swapped()
    assert torch.equal(swapped.mask, ~mask.mask)
    order = torch.cat([swapped.ids_keep, swapped.ids_mask], dim=1)
    assert torch.equal(order.argsort(1), swapped.ids_restore)
    removed = torch.ones_like(mask.mask).scatter(1, swapped.ids_keep, False)
    assert torch.equal(removed, swapped.mask)
    back = swapped.swapped()
    for field in ("ids_keep", "ids_mask", "ids_restore", "mask"):
        assert torch.equal(getattr(back, field), getattr(mask, field))


@pytest.mark.parametrize("options", [(), (SHARED,), (STOPPED,), (SHARED, STOPPED)], ids="-".join)
def test_r_mae_is_its_formula(tiny_config, options):
    weight = "objective.rebuild_weight=0.7"
    objective, images, mask = build(tiny_config, "r_mae", weight, "mask.ratio=0.6", *options)
    shared = SHARED in options
    naive, agree, rebuild = NaiveMAE(objective), [], []
    for sample, image in enumerate(images):
        kept, removed = ids_of(mask, sample)
        first, second = naive_branches(naive, image, kept, removed, shared)
        first = naive.linear(first, "head.linear")
        second = naive.linear(second, "head.linear" if shared else "second_head.linear")
        rebuild += [(second - naive.target(image, removed, norm_pix=True)).square()]
        agree += [(first - (second.detach() if STOPPED in options else second)).square()]
    agree, rebuild = torch.stack(agree).mean(), torch.stack(rebuild).mean()
    want = agree + 0.7 * rebuild
    got = objective.losses(images, mask)
    for name, value in (("loss", want), ("agree", agree), ("rebuild", rebuild)):
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=0, msg=name)
    got["loss"].backward()
    want.backward()
    assert_gradients(objective, naive)


def test_r_mae_whose_second_branch_rebuilds_without_loss_is_mae(tiny_config):
    objective, images, mask = build(tiny_config, "r_mae")
    mae = build_objective(tiny_config("data.image_size=[32,24]"))
    weights = objective.state_dict()
    mae.load_state_dict({name: weights[name] for name in mae.state_dict()})
    naive = NaiveMAE(objective)
    exact = torch.stack([naive.target(image, ids_of(mask, i)[1], True) for i, image in enumerate(images)])
    objective.second_head.linear.register_forward_hook(lambda *_: exact.detach().float())
    got, want = objective.losses(images, mask), mae.loss(images, mask)[0]
    torch.testing.assert_close(got["loss"], want, rtol=1e-6, atol=0)
    assert got["rebuild"] < 1e-10
    got["loss"].backward()
    want.backward()
    for name, parameter in mae.named_parameters():
        torch.testing.assert_close(objective.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-7)


def test_r_mae_draws_the_branch_that_has_not_seen(tiny_config):
    objective, images, mask = build(tiny_config, "r_mae")
    painted = images.clone()
    painted.view(3, 4, 8, 3, 8, 3).transpose(2, 3)[mask.mask.view(3, 4, 3)] = 0
    rebuilt = objective.reconstruct(images, mask)
    assert torch.equal(objective.reconstruct(painted, mask), rebuilt) and not torch.equal(rebuilt, images)


@pytest.mark.parametrize("options", [(), (SHARED,), (SHARED, STOPPED)], ids="-".join)
def test_c_mae_is_its_formula(tiny_config, options):
    temperature, shared = 0.3, SHARED in options
    settings = [f"objective.temperature={temperature}", "objective.projection=12", *options]
    objective, images, mask = build(tiny_config, "c_mae", *settings)
    naive, queries, keys = NaiveMAE(objective), [], []
    for sample, image in enumerate(images):
        first, second = naive_branches(naive, image, *ids_of(mask, sample), shared)
        queries += list(naive.linear(first, "projection"))
        keys += list(naive.linear(second, "projection" if shared else "second_projection"))
    if STOPPED in options:
        keys = [key.detach() for key in keys]
    errors = []
    for place, query in enumerate(queries):
        scores = [query @ key / (query.norm() * key.norm()) / temperature for key in keys]
        errors += [torch.stack(scores).exp().sum().log() - scores[place]]
    want = torch.stack(errors).mean()
    got = objective.loss(images, mask)
    assert len(keys) == 27  # 3 images of 9 removed patches
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    got.backward()
    want.backward()
    assert_gradients(objective, naive)
    assert not objective.config.draws_pictures


def test_shared_networks_exist_once(tiny_config):
    for name, parts in (("r_mae", ("decoder", "head")), ("c_mae", ("decoder", "projection"))):
        alone, both = (build(tiny_config, name, *options)[0] for options in ((SHARED,), ()))
        second = {key for key in both.state_dict() if key.startswith("second_")}
        assert {key.removeprefix("second_") for key in second} == {
            key for key in alone.state_dict() if key.split(".")[0] in parts
        }
        assert alone.state_dict().keys() == both.state_dict().keys() - second


def test_a_stopped_branch_stores_nothing(tiny_config):
    objective, images, mask = build(tiny_config, "c_mae", SHARED, STOPPED)
    needs_gradient = []
    objective.encoder.register_forward_hook(lambda _, args, out: needs_gradient.append(out.requires_grad))
    objective.loss(images, mask)
    assert needs_gradient == [False, True]
