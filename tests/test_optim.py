"""Learning rates, decay groups, and steps that must not happen."""

import math

import pytest
import torch
from torch import nn

from fastmim.config_training import OptimConfig
from fastmim.objectives import build_objective
from fastmim.optim import GuardedAdamW, learning_rate, parameter_groups


def test_learning_rate_warms_up_then_follows_a_cosine():
    config = OptimConfig(batch_size=512, blr=1e-3, min_lr=1e-4, epochs=100, warmup_epochs=10)
    assert config.lr == pytest.approx(2e-3)
    assert learning_rate(config, 0) == 0
    assert learning_rate(config, 5) == pytest.approx(1e-3)
    assert learning_rate(config, 10) == pytest.approx(2e-3)
    assert learning_rate(config, 55) == pytest.approx((2e-3 + 1e-4) / 2)
    quarter = 1e-4 + 1.9e-3 * (1 + math.cos(math.pi / 4)) / 2
    assert learning_rate(config, 32.5) == pytest.approx(quarter)
    assert learning_rate(config, 100) == pytest.approx(1e-4)
    assert learning_rate(config, 101) == pytest.approx(1e-4)


def test_only_matrices_decay(tiny_config):
    objective = build_objective(tiny_config())
    decayed, kept = parameter_groups(objective, 0.05)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    names = {parameter: name for name, parameter in objective.named_parameters()}
    kept_names = {names[parameter] for parameter in kept["params"]}
    assert {"encoder.cls_token", "decoder.mask_token", "encoder.norm.weight"} <= kept_names
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert all(name.endswith(("bias", "token", "weight")) for name in kept_names)
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_changes_nothing(bad):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    optimizer = GuardedAdamW(layer.parameters(), lr=0.1)
    layer(torch.randn(2, 4)).square().mean().backward()
    optimizer.step()
    assert optimizer.found_inf == 0
    weights = [parameter.detach().clone() for parameter in layer.parameters()]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    steps = [state["step"].clone() for state in optimizer.state.values()]
    layer.weight.grad[1, 2] = bad
    optimizer.step()
    assert optimizer.found_inf == 1
    assert all(torch.equal(a, b) for a, b in zip(weights, layer.parameters(), strict=True))
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, optimizer.state.values(), strict=True))
    assert all(torch.equal(a, s["step"]) for a, s in zip(steps, optimizer.state.values(), strict=True))


def test_a_finite_gradient_steps_as_adamw_does():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 4), nn.Linear(4, 4)
    theirs.load_state_dict(ours.state_dict())
    optimizers = [
        GuardedAdamW(ours.parameters(), lr=0.1),
        torch.optim.AdamW(theirs.parameters(), lr=0.1),
    ]
    made = {
        parameter: optimizers[0].state[parameter]["exp_avg"].data_ptr() for parameter in ours.parameters()
    }
    for _ in range(3):
        x = torch.randn(2, 4)
        for layer, optimizer in zip((ours, theirs), optimizers, strict=True):
            layer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    norm = torch.cat([parameter.grad.flatten() for parameter in theirs.parameters()]).norm()
    assert optimizers[0].grad_norm == pytest.approx(norm.item(), rel=1e-5)
    torch.testing.assert_close(ours.weight, theirs.weight)
    for parameter, address in made.items():  # with the optimiser, not amid the first step
        assert optimizers[0].state[parameter]["exp_avg"].data_ptr() == address


def test_what_is_not_guarded_is_refused():
    layer = torch.nn.Linear(4, 3)
    with pytest.raises(AssertionError, match="amsgrad"):
        GuardedAdamW(layer.parameters(), amsgrad=True)
    with pytest.raises(AssertionError, match="closure"):
        GuardedAdamW(layer.parameters()).step(lambda: None)


def test_the_norm_is_that_of_all_gradients():
    """By C where gradients are as C takes them, else by PyTorch."""
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.zeros(300, 70)), nn.Parameter(torch.zeros(300))
    optimizer = GuardedAdamW([weight, bias], lr=0.1)
    for transposed in (False, True):
        bias.grad = torch.randn(300)
        weight.grad = torch.randn(70, 300).T if transposed else torch.randn(300, 70)
        wanted = sum(parameter.grad.double().square().sum() for parameter in (weight, bias)).sqrt()
        with torch.device("meta"):  # a default device changes nothing
            optimizer.step()
        torch.testing.assert_close(optimizer.grad_norm.double(), wanted, rtol=1e-6, atol=0)
        assert optimizer.grad_norm.dtype == torch.float32 and optimizer.grad_norm.shape == ()
