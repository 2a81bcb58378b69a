"""bf16 products in float32, for every operator that asks for one, against products in float64."""

import pytest
import torch
import torch.nn.functional as F

from fastmim import wide_products

torch.manual_seed(0)


@pytest.fixture(autouse=True)
def widened(monkeypatch):
    """Our kernels, a few numbers at a time, for one test."""
    monkeypatch.setattr(wide_products, "PART_BYTES", 256)
    library = wide_products.widen_products()
    yield
    library._destroy()
    wide_products.widen_products.cache_clear()


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def transposed(*shape: int) -> torch.Tensor:
    """Of this shape, each matrix with contiguous columns."""
    return bf16(*shape).mT.contiguous().mT


def assert_is(result: torch.Tensor, wanted: torch.Tensor):
    """Rounded once: within half a unit of bf16's 8 bits, and an error of the order of a sum in float32."""
    assert result.dtype == torch.bfloat16 and result.shape == wanted.shape
    torch.testing.assert_close(result.double(), wanted, rtol=2**-8, atol=1e-5)


PRODUCTS = {
    "mm": lambda **into: torch.mm(bf16(3, 4), bf16(4, 5), **into),
    "addmm": lambda **into: torch.addmm(bf16(5), bf16(3, 4), bf16(4, 5), **into),
    "bmm": lambda **into: torch.bmm(bf16(2, 3, 4), bf16(2, 4, 5), **into),
    "baddbmm": lambda **into: torch.baddbmm(bf16(2, 3, 5), bf16(2, 3, 4), bf16(2, 4, 5), **into),
}


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_each_operator_asks_for_products_in_float32(name, into):
    def products_within() -> int:
        options = {"out": torch.empty_like(PRODUCTS[name]())} if into else {}
        with torch.profiler.profile() as profiler:
            PRODUCTS[name](**options)
        names = [event.name for event in profiler.events()]
        return sum(names.count(f"aten::{each}") for each in PRODUCTS) - 1

    assert products_within() >= 1
    wide_products.widen_products()._destroy()
    assert products_within() == 0


@pytest.mark.parametrize("make_a", [bf16, transposed])
@pytest.mark.parametrize("make_b", [bf16, transposed])
@pytest.mark.parametrize(
    "rows, inner, columns", [(7, 5, 11), (3, 50, 4), (50, 3, 4), (1, 9, 1), (0, 3, 4), (3, 0, 4)]
)
def test_products_of_matrices(make_a, make_b, rows, inner, columns):
    a, b = make_a(rows, inner), make_b(inner, columns)
    assert_is(a @ b, a.double() @ b.double())
    base, row = bf16(rows, columns), bf16(columns)
    assert_is(torch.addmm(base, a, b, beta=0.5, alpha=3), 0.5 * base.double() + 3 * (a.double() @ b.double()))
    assert_is(F.linear(a, b.t(), row), a.double() @ b.double() + row.double())


def test_what_is_added_to_may_be_the_result():
    base, a, b = bf16(9, 4), bf16(9, 30), bf16(30, 4)
    wanted = base.double() + a.double() @ b.double()
    torch.addmm(base, a, b, out=base)
    assert_is(base, wanted)
    wide = bf16(9, 8)
    torch.mm(a, b, out=wide[:, ::2])
    assert_is(wide[:, ::2], a.double() @ b.double())


def test_what_beta_leaves_out_is_not_read():
    a, b, nothing = bf16(3, 50), bf16(50, 4), torch.full((4,), torch.nan).bfloat16()
    assert_is(torch.addmm(nothing, a, b, beta=0), a.double() @ b.double())
    assert_is(torch.baddbmm(nothing, a[None], b[None], beta=0), (a.double() @ b.double())[None])


@pytest.mark.parametrize("make_a", [bf16, transposed])
@pytest.mark.parametrize("make_b", [bf16, transposed])
@pytest.mark.parametrize("matrices", [0, 1, 5])
def test_products_of_many_matrices(make_a, make_b, matrices):
    a, b, base = make_a(matrices, 7, 5), make_b(matrices, 5, 3), bf16(matrices, 1, 3)
    assert_is(a @ b, a.double() @ b.double())
    assert_is(torch.baddbmm(base, a, b, alpha=0.125), base.double() + 0.125 * (a.double() @ b.double()))
    out = torch.empty_like(a @ b)
    assert_is(torch.bmm(a, b, out=out), a.double() @ b.double())


def test_gradients_and_autocast():
    linear = torch.nn.Linear(6, 5)
    x, grad = torch.randn(40, 6), torch.randn(40, 5)
    wanted = torch.nn.Linear(6, 5).double()
    for parameter, other in zip(wanted.parameters(), linear.parameters(), strict=True):
        parameter.data = other.bfloat16().double()
    wanted(x.bfloat16().double()).backward(grad.bfloat16().double())
    with torch.autocast("cpu", torch.bfloat16):
        linear(x).backward(grad.bfloat16())
    assert_is(linear.weight.grad.bfloat16(), wanted.weight.grad)
    own = torch.nn.Linear(6, 5).bfloat16()
    own.load_state_dict(linear.state_dict())
    own(x.bfloat16()).backward(grad.bfloat16())
    assert_is(own.weight.grad, wanted.weight.grad)


def test_other_dtypes_are_left_to_pytorch():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    torch.testing.assert_close(a @ b, (a.double() @ b.double()).float())
    out = torch.empty(3, 5)
    assert torch.mm(a, b, out=out) is out
    torch.testing.assert_close(torch.addmm(out, a, b, beta=2), 3 * out)
    whole = torch.ones(2, 3, dtype=torch.int64) @ torch.ones(3, 2, dtype=torch.int64)
    assert whole.tolist() == [[3, 3], [3, 3]]
    with pytest.raises(RuntimeError, match="dtype"):
        a @ b.bfloat16()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        bf16(2, 3) @ bf16(4, 5)
