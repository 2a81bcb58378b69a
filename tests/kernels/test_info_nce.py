import itertools

import pytest
import torch
import torch.nn.functional as F
from fastmim.kernels.info_nce import info_nce, info_nce_reference

from tests.kernels.kernel_testing import DTYPES, INDEX_DTYPES, assert_error_budget
from tests.kernels.test_masked_cross_entropy import gradient_floor

# In all of these tests 128 queries are a chunk.
pytestmark = pytest.mark.usefixtures("small_chunks")

# queries, keys, columns; 300 queries are three chunks, 8195 keys are two blocks of a row
SHAPES = [
    (1, 1, 1),
    (1, 7, 96),
    (37, 37, 96),
    (197, 394, 768),
    (300, 300, 32),
    (2, 8195, 16),
    (49, 196, 1280),
]
TEMPERATURE = 0.2


def setup(rows, others, columns, dtype=torch.float32, ids_dtype=torch.int64):
    queries = F.normalize(torch.randn(rows, columns), dim=-1)
    keys = F.normalize(torch.randn(others, columns), dim=-1)
    return queries.to(dtype), keys.to(dtype), torch.randperm(max(rows, others))[:rows].to(ids_dtype) % others


def exact_loss(queries, keys, labels, temperature=TEMPERATURE):
    """CPC's equation 4 in float64, query by query."""
    losses = []
    for query, label in zip(queries, labels, strict=True):
        similarities = (keys * query).sum(1) / temperature
        largest = similarities.detach().max()
        positive = (similarities[label] - largest).exp()
        losses.append(-(positive / (similarities - largest).exp().sum()).log())
    return torch.stack(losses).sum() / len(losses), torch.stack(losses)


def run(function, arguments, dtype, scale=1.0, temperature=TEMPERATURE):
    queries, keys, labels = arguments
    inputs = [x.detach().to(dtype).requires_grad_() for x in (queries, keys)]
    loss, per_row = function(*inputs, labels, temperature)
    return loss.detach(), per_row.detach(), *torch.autograd.grad(loss * scale, inputs)


@pytest.mark.parametrize(
    ("shape", "dtype"), [*itertools.product(SHAPES, DTYPES), ((1023, 3, 8), torch.bfloat16)]
)
def test_loss_and_gradients(backend, unwritten_shows, shape, dtype):
    arguments = setup(*shape, dtype)
    # The scale plays the part of fp16 loss scaling and keeps small gradients out of float16's subnormals.
    actual = run(info_nce, arguments, dtype, scale=100.0)
    native = run(info_nce_reference, arguments, dtype, scale=100.0)
    exact = run(exact_loss, arguments, torch.float64, scale=100.0)
    assert actual[0].dtype == actual[1].dtype == torch.float32
    for got, expected, wanted in zip(actual[:2], native[:2], exact[:2], strict=True):
        # A logarithm of a sum is of order one however small the loss is.
        assert_error_budget(got + 1, expected + 1, wanted + 1)
    for got, expected, wanted in zip(actual[2:], native[2:], exact[2:], strict=True):
        assert_error_budget(got, expected, wanted, floor=gradient_floor(backend, dtype))


@pytest.mark.parametrize("temperature", [0.05, 1.0, 10.0])
def test_temperature(backend, temperature):
    arguments = setup(20, 30, 16)
    actual = run(info_nce, arguments, torch.float32, temperature=temperature)
    expected = run(exact_loss, arguments, torch.float64, temperature=temperature)
    torch.testing.assert_close([x.double() for x in actual], list(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ids_dtype", INDEX_DTYPES)
def test_strided_inputs(backend, unwritten_shows, ids_dtype):
    queries, keys, labels = setup(150, 33, 20, ids_dtype=ids_dtype)
    expected = run(info_nce_reference, (queries, keys, labels), torch.float32)
    for strided in (
        (queries.T.contiguous().T, keys, labels.repeat_interleave(3)[::3]),
        (queries, keys.T.contiguous().T, labels),
        (queries.repeat_interleave(2, 1)[:, ::2], keys.repeat(2, 1)[33:], labels),
    ):
        torch.testing.assert_close(run(info_nce, strided, torch.float32), expected)


def test_equal_keys_cost_the_logarithm_of_their_number(backend):
    queries, keys, labels = setup(5, 8, 16)
    loss, per_row, grad, _ = run(info_nce, (queries, keys[:1].expand(8, -1), labels), torch.float32)
    torch.testing.assert_close(loss, torch.tensor(8.0).log())
    torch.testing.assert_close(per_row, torch.full((5,), 8.0).log())
    assert grad.abs().max() < 1e-6


def test_order_of_keys_does_not_matter(backend):
    queries, keys, labels = setup(37, 37, 16)
    expected = info_nce(queries, keys, labels, TEMPERATURE)
    order = torch.randperm(37)
    actual = info_nce(queries, keys[order], order.argsort()[labels], TEMPERATURE)
    torch.testing.assert_close(actual, expected)


def test_both_sides_may_be_one_tensor(backend):
    x, _, _ = setup(9, 9, 16)
    labels = torch.arange(9).roll(1)
    x.requires_grad_()
    grads = [
        torch.autograd.grad(function(x, x, labels, TEMPERATURE)[0], x)
        for function in (info_nce, info_nce_reference)
    ]
    torch.testing.assert_close(*grads)


def test_a_detached_side_has_no_gradient(backend):
    queries, keys, labels = setup(9, 12, 16)
    queries.requires_grad_(), keys.requires_grad_()
    both = torch.autograd.grad(info_nce(queries, keys, labels, TEMPERATURE)[0], (queries, keys))
    loss, per_row = info_nce(queries, keys.detach(), labels, TEMPERATURE)
    assert not per_row.requires_grad
    assert torch.equal(torch.autograd.grad(loss, queries)[0], both[0])
    loss, _ = info_nce(queries.detach(), keys, labels, TEMPERATURE)
    assert torch.equal(torch.autograd.grad(loss, keys)[0], both[1])


def test_same_result_under_autocast(backend):
    arguments = setup(37, 20, 16)
    expected = run(info_nce, arguments, torch.float32)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        actual = run(info_nce, arguments, torch.float32)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_reference_is_exact_and_differentiable():
    queries, keys, labels = setup(3, 5, 4)
    inputs = [x.double().requires_grad_() for x in (queries, keys)]
    exact = exact_loss(*inputs, labels)
    for function in (info_nce_reference, info_nce):
        actual = function(*inputs, labels, TEMPERATURE)
        torch.testing.assert_close(tuple(actual), exact, rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(lambda *x, f=function: f(*x, labels, TEMPERATURE)[0], inputs)


def test_compiles_without_graph_breaks(backend, compiler):
    def step(queries, keys, labels):
        loss, per_row = info_nce(queries * 2, keys, labels, TEMPERATURE)
        return loss * 3, per_row

    compiled = compiler(step, dynamic=True)
    for rows in (6, 150):
        queries, keys, labels = setup(rows, rows + 3, 8)
        inputs = [queries.requires_grad_(), keys.requires_grad_()]
        loss, per_row = step(*inputs, labels)
        compiled_loss, compiled_per_row = compiled(*inputs, labels)
        expected, actual = (torch.autograd.grad(value, inputs) for value in (loss, compiled_loss))
        torch.testing.assert_close((actual, compiled_loss, compiled_per_row), (expected, loss, per_row))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": torch.zeros(4, 8).long()}, TypeError, r"queries has dtype int64; wanted float32"),
        ({"queries": torch.zeros(8)}, ValueError, r"queries has shape \[8\]; wanted \[R, D\]"),
        ({"queries": torch.zeros(0, 8)}, ValueError, r"queries has shape \[0, 8\]; wanted at least one row"),
        ({"keys": torch.zeros(5, 8).int()}, TypeError, r"keys has dtype int32; wanted float32"),
        ({"keys": torch.zeros(0, 8)}, ValueError, r"keys has shape \[0, 8\]; wanted at least one row"),
        ({"keys": torch.zeros(5, 7)}, ValueError, r"keys has shape \[5, 7\]; .* \[S, D\] = \[any, 8\]"),
        ({"keys": torch.zeros(5, 8, device="meta")}, ValueError, r"keys is on meta; wanted cpu"),
        ({"labels": torch.zeros(4)}, TypeError, r"labels has dtype float32; wanted int64 or int32"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels has shape \[3\]; wanted \[R\] = \[4\]"),
        ({"labels": torch.full((4,), 5)}, ValueError, r"labels has values 5\.\.5; wanted 0\.\.4"),
        ({"temperature": 0.0}, ValueError, r"temperature is 0\.0; wanted a positive number"),
        ({"temperature": -1.0}, ValueError, r"temperature is -1\.0; wanted a positive number"),
    ],
)
def test_errors_name_argument_got_and_wanted(change, error, message):
    queries, keys, labels = setup(4, 5, 8)
    arguments = {"queries": queries, "keys": keys, "labels": labels, "temperature": 0.1}
    with pytest.raises(error, match=message):
        info_nce(**(arguments | change))
