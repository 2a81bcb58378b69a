"""AdamW in two halves: against float64, stored and taken up, and steps that must not happen."""

import copy
import math

import pytest
import torch
from fastmim.kernels import _dispatch
from fastmim.kernels.adamw_halves import NativeAdamW, _adamw_halves_kernel
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.compiled import compile_to_sass, opcodes, record_launches
from fastmim import split_adamw
from fastmim.errors import CheckpointError
from fastmim.halves import join, split
from fastmim.split_adamw import SplitAdamW

SHAPES = [(5, 3), (40,), (7,)]
DECAYS = [0.1, 0.1, 0.0]
MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.fixture(params=["reference", "interpret", "native", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request, monkeypatch):
    """As everywhere, and C on the CPU."""
    automatic = request.param in ("native", "cuda")
    monkeypatch.setattr(_dispatch, "MODE", "auto" if automatic else request.param)
    if request.param == "native":
        assert NativeAdamW.load() is not None
    if request.param == "cuda":
        torch.set_default_device("cuda")
    yield request.param
    torch.set_default_device(None)


def set_chunk(monkeypatch, numbers):
    for device in split_adamw.CHUNKS:
        monkeypatch.setitem(split_adamw.CHUNKS, device, numbers)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_two_halves_are_the_whole(numbers):
    value = torch.tensor(numbers)
    low, rest = torch.empty(len(numbers), dtype=torch.bfloat16), torch.empty(len(numbers), dtype=torch.int16)
    split(value.clone(), low, rest)
    assert torch.equal(join(low, rest).view(torch.int32), value.view(torch.int32))
    tie = value.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(low[~tie], value.bfloat16()[~tie])


def adamw_in_float64(parameter, gradients, lr, decay, betas=(0.9, 0.95), eps=1e-8):
    """Loshchilov and Hutter's algorithm 2, one tensor; a step without a gradient is counted and leaves it."""
    parameter, mean, square = parameter.double(), 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        if gradient is None:
            continue
        gradient = gradient.double()
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        direction = (mean / (1 - betas[0] ** step)) / ((square / (1 - betas[1] ** step)).sqrt() + eps)
        parameter = parameter - lr * (direction + decay * parameter)
    return parameter


def problem(steps, betas=(0.9, 0.95), **options):
    """Parameters of two groups, their optimiser, and gradients of so many steps."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in SHAPES]
    groups = [
        {"params": parameters[:2], "weight_decay": DECAYS[0]},
        {"params": parameters[2:], "weight_decay": DECAYS[2]},
    ]
    gradients = [[torch.randn_like(parameter) for parameter in parameters] for _ in range(steps)]
    return parameters, SplitAdamW(groups, lr=1e-4, betas=betas, **options), gradients


def take_steps(parameters, optimizer, gradients):
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step()


def norm_of(gradients):
    return torch.cat([gradient.double().flatten() for gradient in gradients]).norm().item()


@pytest.mark.parametrize("chunk", [4, 16, 1 << 10])
@pytest.mark.parametrize(("clip", "betas"), [(None, (0.9, 0.999)), (2.0, (0.9, 0.95))])
def test_steps_are_those_of_float32(backend, monkeypatch, chunk, clip, betas):
    set_chunk(monkeypatch, chunk)
    parameters, optimizer, gradients = problem(20, betas, clip_grad=clip)
    starts = [parameter.detach().clone() for parameter in parameters]
    take_steps(parameters, optimizer, gradients)
    scales = [1.0 if clip is None else min(1.0, clip / norm_of(step)) for step in gradients]
    assert clip is None or max(scales) < 1
    for i, parameter in enumerate(parameters):
        scaled = [step[i].double() * scale for step, scale in zip(gradients, scales, strict=True)]
        master = optimizer.masters[parameter].detach()
        wanted = adamw_in_float64(starts[i], scaled, 1e-4, DECAYS[i], betas)
        torch.testing.assert_close(master.double(), wanted, rtol=2e-6, atol=1e-7)
        assert torch.equal(parameter, master.bfloat16()) and parameter.grad is None
        # Steps this small would vanish in sixteen bits.
        assert not torch.equal(master, master.bfloat16().float())
    assert optimizer.grad_norm.item() == pytest.approx(norm_of(gradients[-1]), rel=1e-6)


@pytest.mark.parametrize("chunk", [4, 1 << 10])
def test_a_parameter_without_a_gradient_stays(backend, monkeypatch, chunk):
    set_chunk(monkeypatch, chunk)
    parameters, optimizer, gradients = problem(3)
    start = parameters[0].detach().clone()
    take_steps(parameters, optimizer, [[None, *step[1:]] for step in gradients])
    assert torch.equal(optimizer.masters[parameters[0]].detach(), start.float())
    wanted = adamw_in_float64(problem(0)[0][1].detach(), [step[1] for step in gradients], 1e-4, DECAYS[1])
    torch.testing.assert_close(
        optimizer.masters[parameters[1]].detach().double(), wanted, rtol=2e-6, atol=1e-7
    )


@pytest.mark.parametrize("chunk", [4, 1 << 10])
def test_gradients_come_and_go_and_parameters_move(backend, monkeypatch, chunk):
    set_chunk(monkeypatch, chunk)
    parameters, optimizer, gradients = problem(5)
    starts = [parameter.detach().clone() for parameter in parameters]
    for step, without in zip(gradients, (2, 0, None, None, 1), strict=True):
        if without is not None:
            step[without] = None
    take_steps(parameters, optimizer, gradients[:3])
    for parameter in parameters:
        parameter.data = parameter.data.clone()
    take_steps(parameters, optimizer, gradients[3:])
    for parameter, start, decay, *steps in zip(parameters, starts, DECAYS, *gradients, strict=True):
        master = optimizer.masters[parameter].detach()
        wanted = adamw_in_float64(start, steps, 1e-4, decay)
        torch.testing.assert_close(master.double(), wanted, rtol=2e-6, atol=1e-7)
        assert torch.equal(parameter, master.bfloat16())


def test_what_is_stored_goes_on_the_same_and_bad_steps_change_nothing(backend):
    parameters, optimizer, gradients = problem(6)
    take_steps(parameters, optimizer, gradients[:3])
    stored = copy.deepcopy(optimizer.state_dict())
    others, resumed, _ = problem(0)
    resumed.load_state_dict(stored)
    with torch.no_grad():
        for other, parameter in zip(others, parameters, strict=True):
            other.copy_(parameter)
    gradients[3][0][1, 1] = math.nan
    take_steps(parameters, optimizer, gradients[3:4])
    assert optimizer.found_inf == 1
    take_steps(parameters, optimizer, gradients[4:])
    assert optimizer.found_inf == 0
    take_steps(others, resumed, gradients[4:])
    for parameter, other in zip(parameters, others, strict=True):
        assert torch.equal(parameter, other)
        assert torch.equal(optimizer.masters[parameter].detach(), resumed.masters[other].detach())


def test_a_bad_first_step_is_none(backend):
    parameters, optimizer, gradients = problem(3)
    gradients[0][1][0] = math.inf
    starts = [parameter.detach().clone() for parameter in parameters]
    take_steps(parameters, optimizer, gradients)
    for start, parameter, decay, *taken in zip(starts, parameters, DECAYS, *gradients[1:], strict=True):
        wanted = adamw_in_float64(start, taken, 1e-4, decay)
        torch.testing.assert_close(
            optimizer.masters[parameter].detach().double(), wanted, rtol=2e-6, atol=1e-7
        )


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu():
    with torch.device("cuda"):
        parameters, optimizer, gradients = problem(3, clip_grad=1.0)
        take_steps(parameters, optimizer, gradients[:2])
        for parameter, gradient in zip(parameters, gradients[2], strict=True):
            parameter.grad = gradient
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_gradients_of_several_passes_are_summed_in_float32(backend):
    parameter = nn.Parameter(torch.zeros(3).bfloat16())
    optimizer = SplitAdamW([{"params": [parameter]}], lr=0.0, sum_in_float32=True)
    # Beside 256, bf16 has no 257.
    for gradient in (256.0, 1.0, 1.0):
        (parameter * gradient).sum().backward()
        assert parameter.grad is None
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(258 * 3**0.5)
    (parameter * 2).sum().backward()
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(2 * 3**0.5)


@pytest.mark.parametrize("other", ["interpret", "auto"])
def test_kernels_compute_what_plain_pytorch_does(monkeypatch, other):
    """In the units of the last place: a number's halves, both moments, and a clipped gradient."""
    found = {}
    for mode in ("reference", other):
        monkeypatch.setattr(_dispatch, "MODE", mode)
        parameters, optimizer, gradients = problem(5, clip_grad=1.0)
        take_steps(parameters, optimizer, gradients)
        masters = [optimizer.masters[parameter].detach() for parameter in parameters]
        found[mode] = [*masters, *(getattr(flat, name) for flat in optimizer.flats for name in MOMENTS)]
    for plain, fused in zip(*found.values(), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("summed", [False, True])
def test_threads_share_a_step_and_do_not_change_it(monkeypatch, summed):
    monkeypatch.setattr(_dispatch, "MODE", "auto")
    torch.manual_seed(0)
    starts = [torch.randn(shape).bfloat16() for shape in ((3, 5001), (17,), (9000,))]
    passes = [[torch.randn_like(start) for start in starts] for _ in range(1 + summed)]
    gradients = [sum(gradient.double() for gradient in of) for of in zip(*passes, strict=True)]
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            parameters = [nn.Parameter(start.clone()) for start in starts]
            optimizer = SplitAdamW(
                [{"params": parameters}], clip_grad=10.0, sum_in_float32=summed, lr=1e-4, weight_decay=0.1
            )
            for given in passes:
                for parameter, gradient in zip(parameters, given, strict=True):
                    (parameter * gradient).sum().backward()
            optimizer.step()
            found.append((optimizer.grad_norm, [optimizer.masters[p].detach() for p in parameters]))
    finally:
        torch.set_num_threads(threads)
    norm = norm_of(gradients)
    for start, gradient, master in zip(starts, gradients, found[0][1], strict=True):
        wanted = adamw_in_float64(start, [gradient * 10 / norm], 1e-4, 0.1, (0.9, 0.999))
        torch.testing.assert_close(master.double(), wanted, rtol=2e-6, atol=1e-7)
    for norm, masters in found[1:]:
        assert torch.equal(norm, found[0][0])
        assert all(map(torch.equal, masters, found[0][1]))


def test_a_graph_of_parameters_that_moved_on_is_refused(backend):
    parameter = nn.Parameter(torch.ones(40).bfloat16())
    optimizer = SplitAdamW([{"params": [parameter]}], lr=1.0)
    loss = (parameter * parameter).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_of_other_strides(backend):
    parameters, optimizer, _ = problem(0)
    starts = [parameter.detach().clone() for parameter in parameters]
    wide = [torch.randn(*parameter.shape, 2).bfloat16() for parameter in parameters]
    for parameter, gradient in zip(parameters, wide, strict=True):
        parameter.grad = gradient[..., 1]
    optimizer.step()
    for parameter, start, gradient, decay in zip(parameters, starts, wide, DECAYS, strict=True):
        wanted = adamw_in_float64(start, [gradient[..., 1]], 1e-4, decay)
        torch.testing.assert_close(
            optimizer.masters[parameter].detach().double(), wanted, rtol=2e-6, atol=1e-7
        )


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("summed", [False, True])
def test_the_kernel_does_not_spill_and_reads_128_bits(capability, summed):
    parameter = nn.Parameter(torch.zeros(64, 64).bfloat16())
    optimizer = SplitAdamW([{"params": [parameter]}], lr=1.0, sum_in_float32=summed)
    (parameter * 2).sum().backward()
    with record_launches() as launches:
        optimizer.step()
    (launch,) = launches
    assert launch.function is _adamw_halves_kernel
    sass = compile_to_sass(launch, capability)
    assert not opcodes(sass, "STL") and not opcodes(sass, "LDL")
    for kind, count in (("LDG", 5), ("STG", 4)):
        assert sum(name.endswith(".128") for name in opcodes(sass, kind)) >= count


@pytest.mark.parametrize(
    ("tensor", "told"),
    [(torch.zeros(2, 3), "float32"), (torch.zeros(2, 3).bfloat16().t(), r"strides \(1, 3\)")],
)
def test_other_parameters_are_refused(tensor, told):
    with pytest.raises(ValueError, match=told):
        SplitAdamW([{"params": [nn.Parameter(tensor)]}], lr=1.0)


def test_the_state_of_another_optimiser_is_refused():
    _, optimizer, _ = problem(0)
    with pytest.raises(CheckpointError, match="has masters, param_groups, state; expected also flats, step"):
        optimizer.load_state_dict({"state": {}, "param_groups": [], "masters": []})
