"""Learning rates, decay groups, and steps that must not happen."""

import copy
import math

import pytest
import torch
from torch import nn

from fastmim.config import OptimConfig
from fastmim.objectives import build_objective
from fastmim.optim import GuardedAdamW, MasterAdamW, learning_rate, parameter_groups


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
    for _ in range(3):
        x = torch.randn(2, 4)
        for layer, optimizer in zip((ours, theirs), optimizers, strict=True):
            layer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    norm = torch.cat([parameter.grad.flatten() for parameter in theirs.parameters()]).norm()
    assert optimizers[0].grad_norm == pytest.approx(norm.item(), rel=1e-5)
    torch.testing.assert_close(ours.weight, theirs.weight)


def adamw_in_float64(parameter, gradients, lr, decay, betas=(0.9, 0.95), eps=1e-8):
    """Loshchilov and Hutter's algorithm 2, one tensor."""
    parameter, mean, square = parameter.double(), 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        gradient = gradient.double()
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        direction = (mean / (1 - betas[0] ** step)) / ((square / (1 - betas[1] ** step)).sqrt() + eps)
        parameter = parameter - lr * (direction + decay * parameter)
    return parameter


def sixteen_bit_problem(steps):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in [(5, 3), (7,)]]
    groups = [
        {"params": parameters[:1], "weight_decay": 0.1},
        {"params": parameters[1:], "weight_decay": 0.0},
    ]
    gradients = [[torch.randn_like(parameter) for parameter in parameters] for _ in range(steps)]
    return parameters, MasterAdamW(groups, lr=1e-4, betas=(0.9, 0.95)), gradients


def take_steps(parameters, optimizer, gradients):
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def test_sixteen_bit_parameters_follow_their_masters():
    parameters, optimizer, gradients = sixteen_bit_problem(20)
    starts = [parameter.detach().clone() for parameter in parameters]
    take_steps(parameters, optimizer, gradients)
    for i, decay in enumerate((0.1, 0.0)):
        wanted = adamw_in_float64(starts[i], [step[i] for step in gradients], 1e-4, decay)
        (master,) = optimizer.fp32_groups[i]
        torch.testing.assert_close(master.detach().double(), wanted, rtol=1e-6, atol=1e-7)
        assert torch.equal(parameters[i], master.bfloat16()) and parameters[i].grad is None
        # Steps this small would vanish in sixteen bits.
        assert not torch.equal(master, master.bfloat16().float())
    norm = torch.cat([gradient.double().flatten() for gradient in gradients[-1]]).norm()
    assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)


def test_masters_are_stored_whole_and_bad_steps_leave_them():
    parameters, optimizer, gradients = sixteen_bit_problem(6)
    take_steps(parameters, optimizer, gradients[:3])
    stored = copy.deepcopy(optimizer.state_dict())
    others, resumed, _ = sixteen_bit_problem(0)
    resumed.load_state_dict(stored)
    gradients[3][0][1, 1] = math.nan
    take_steps(parameters, optimizer, gradients[3:])
    take_steps(others, resumed, gradients[4:])
    for ours, theirs in zip(
        (*optimizer.fp32_groups, parameters), (*resumed.fp32_groups, others), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_gradients_of_several_passes_are_summed_in_float32():
    parameter = nn.Parameter(torch.zeros(3).bfloat16())
    optimizer = MasterAdamW([{"params": [parameter]}], lr=0.0, sum_in_float32=True)
    # Beside 256, bf16 has no 257.
    for gradient in (256.0, 1.0, 1.0):
        (parameter * gradient).sum().backward()
        assert parameter.grad is None
    (master,) = optimizer.fp32_groups[0]
    assert master.grad.tolist() == [258.0] * 3
    optimizer.step()
    assert master.grad is None and optimizer.grad_norm.item() == pytest.approx(258 * 3**0.5)
