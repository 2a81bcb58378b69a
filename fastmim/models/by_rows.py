"""What stands around attention in a block, a few rows at a time: for a CPU.

Some tokens go through norm, linears, GELU and residual addition, and then the next ones: what one operation writes is
in the cache when another reads it. Results of norms and GELU are not kept for the backward pass, which computes them
again. What lives for some rows only lies in the same memory from call to call (`room.py`).
"""

from collections.abc import Callable

import torch
import torch.nn.modules.module as torch_modules
from torch import Tensor, nn

from fastmim.kernels import _dispatch
from fastmim.kernels.block_rows import gelu_rows, gelu_rows_gradient, norm_rows, norm_rows_gradient
from fastmim.models.tracing import wants_plain_operators
from fastmim.room import Room, equal_parts

PART_BYTES = 16 * 2**20
"""Of the widest result at a time."""

_ROUNDED_PARTS = 3
"""Parts at most whose sum is kept in 16 bits; that of more is kept in float32, which takes time."""

_PARTS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {nn.LayerNorm: (), nn.Linear: ()}
"""Modules in whose place these functions may compute -> what such a module is made of."""


def stands_for(*parts: type[nn.Module]) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Mark a class of modules: made of these parts, in their order, it computes what these functions do."""

    def mark(module: type[nn.Module]) -> type[nn.Module]:
        _PARTS[module] = parts
        return module

    return mark


def runs_by_rows(x: Tensor, *modules: nn.Module) -> bool:
    """Whether these functions compute what the modules do: on a CPU, in one dtype.

    Modules that have hooks, or that somebody put in the place of ours (adapters, quantised linears), are called. So are
    all for a compiler, which fuses them by itself; for autocast, which casts what they are given; for ZeRO-3, which has
    a module's parameters only while it is called; and for an interpreter of kernels.
    """
    if type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu" or wants_plain_operators():
        return False
    if torch.is_autocast_enabled("cpu") or _dispatch.use_triton(x) or torch_modules._has_any_global_hook():
        return False
    parameters = [parameter for module in modules for parameter in module.parameters()]
    plain = all(parameter.dtype == x.dtype and not hasattr(parameter, "ds_id") for parameter in parameters)
    return plain and all(map(_is_untouched, modules))


def _is_untouched(module: nn.Module) -> bool:
    """Whether a module and its parts are what they were built as, and nobody waits for their calls."""
    parts = list(module.children())
    hooks = (
        *(module._forward_pre_hooks, module._forward_hooks),
        *(module._backward_pre_hooks, module._backward_hooks),
    )
    built = _PARTS.get(type(module)) == tuple(map(type, parts)) and "forward" not in vars(module)
    return built and not any(hooks) and all(map(_is_untouched, parts))


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """linear(norm(x)), which keeps x. [..., D] -> [..., outputs]."""
    return _NormLinear.apply(x, norm.weight, norm.bias, linear.weight, linear.bias, norm.eps)


def add_linear(x: Tensor, y: Tensor, linear: nn.Linear) -> Tensor:
    """x + linear(y), which keeps y. [..., D], [..., inputs] -> [..., D]."""
    return _AddLinear.apply(x, y, linear.weight, linear.bias)


def norm_mlp(x: Tensor, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear, add: bool) -> Tensor:
    """fc2(GELU(fc1(norm(x)))), plus x where it `add`s it; keeps x and fc1's product. [..., D] -> [..., D]."""
    parameters = norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias
    return _NormMLP.apply(x, *parameters, norm.eps, add, torch.is_grad_enabled())


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gain, shift, weight, bias, eps):
        ctx.save_for_backward(x, gain, shift, weight)
        ctx.eps = eps
        out = x.new_empty(*x.shape[:-1], len(weight))
        rows, out_rows = _rows(x), _rows(out)
        for part in _parts(rows, len(weight)):
            normed = _norm(rows[part], gain, shift, eps)
            torch.addmm(bias, normed, weight.t(), out=out_rows[part])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, gain, shift, weight = ctx.saved_tensors
        grads = _rows(grad)
        parts = _parts(grads, len(weight))
        of_weight = _WeightGradient(weight, len(parts), ctx.needs_input_grad[3])
        norm = _NormGradient(x, gain, shift, ctx.eps)
        for part in parts:
            of_weight.add(grads[part], norm.backward(part, _product("normed", grads[part], weight)))
        return *norm.gradients(), of_weight.total(), grads.sum(0), None


class _AddLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, weight, bias):
        ctx.save_for_backward(y, weight)
        out = torch.add(x, bias, out=_contiguous(x))
        torch.addmm(_rows(out), _rows(y), weight.t(), out=_rows(out))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y, weight = ctx.saved_tensors
        grads = _rows(grad)
        of_weight = grads.t() @ _rows(y) if ctx.needs_input_grad[2] else None
        return grad, (grads @ weight).view(y.shape), of_weight, grads.sum(0)


class _NormMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gain, shift, weight1, bias1, weight2, bias2, eps, add, keep):
        out = _contiguous(x)
        if add:
            torch.add(x, bias2, out=out)
        else:
            out.copy_(bias2)
        rows, out_rows = _rows(x), _rows(out)
        hidden = x.new_empty(len(rows), len(weight1)) if keep else None
        ctx.save_for_backward(x, gain, shift, weight1, bias1, weight2, hidden)
        ctx.eps, ctx.add, ctx.spent = eps, add, False
        for part in _parts(rows, len(weight1)):
            normed = _norm(rows[part], gain, shift, eps)
            into = (
                _room.take("hidden", len(normed), len(weight1), x.dtype) if hidden is None else hidden[part]
            )
            torch.mm(normed, weight1.t(), out=into)
            active = gelu_rows(into, bias1, _room.take("active", *into.shape, x.dtype))
            torch.addmm(out_rows[part], active, weight2.t(), out=out_rows[part])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, gain, shift, weight1, bias1, weight2, hidden = ctx.saved_tensors
        hidden = _of_norm(x, gain, shift, ctx.eps, weight1) if ctx.spent else hidden.data
        ctx.spent = True  # `hidden`, unlike what its version tells, becomes GELU's result
        grads = _rows(grad)
        parts = _parts(grads, len(weight1))
        of_weight1 = _WeightGradient(weight1, len(parts), ctx.needs_input_grad[3])
        of_weight2 = _WeightGradient(weight2, len(parts), ctx.needs_input_grad[5])
        of_bias1 = _zeros_for_sum(x, len(weight1))
        norm = _NormGradient(x, gain, shift, ctx.eps, grads if ctx.add else None)
        for part in parts:
            of_hidden = _product("active", grads[part], weight2)
            gelu_rows_gradient(hidden[part], bias1, of_hidden, of_bias1)
            of_weight2.add(grads[part], hidden[part])
            of_weight1.add(of_hidden, norm.backward(part, _product("normed", of_hidden, weight1)))
        of_bias2 = norm.sum_of_added() if ctx.add else grads.sum(0)
        of_mlp = of_weight1.total(), of_bias1.to(x.dtype), of_weight2.total(), of_bias2
        return *norm.gradients(), *of_mlp, None, None, None


def _of_norm(x: Tensor, gain: Tensor, shift: Tensor, eps: float, weight: Tensor) -> Tensor:
    """What `_NormMLP` keeps [rows, hidden], computed again for a second backward pass."""
    rows = _rows(x)
    return norm_rows(rows, gain, shift, eps, torch.empty_like(rows)) @ weight.t()


class _NormGradient:
    """The gradients of a LayerNorm, a few rows at a time.

    Args:
        x: [..., D], of the norm.
        gain, shift: [D], its parameters.
        eps: of the norm.
        added: [rows, D], what x is given besides.
    """

    def __init__(self, x: Tensor, gain: Tensor, shift: Tensor, eps: float, added: Tensor | None = None):
        self._rows, self._gain, self._shift, self._eps, self._added = _rows(x), gain, shift, eps, added
        self._of_x = _contiguous(x)
        self._sums = _zeros_for_sum(x, 3, len(gain))

    def backward(self, part: slice, grad: Tensor) -> Tensor:
        """The norm of these rows, in the memory of the gradient of it [rows, D]."""
        added = None if self._added is None else self._added[part]
        norm = self._rows[part], self._gain, self._shift, self._eps
        norm_rows_gradient(*norm, grad, added, _rows(self._of_x)[part], self._sums)
        return grad

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of x, gain and shift."""
        return self._of_x, self._copy(0), self._copy(1)

    def sum_of_added(self) -> Tensor:
        """[D], over all rows."""
        return self._copy(2)

    def _copy(self, row: int) -> Tensor:
        """A tensor of its own: the gradient of a parameter would keep the memory of all."""
        return self._sums[row].to(self._gain.dtype, copy=True)


class _WeightGradient:
    """The gradient of a linear's weight, a few rows at a time.

    Args:
        weight: [outputs, inputs].
        parts: how many are added.
        wanted: whether anything is.
    """

    def __init__(self, weight: Tensor, parts: int, wanted: bool):
        self._dtype, self._parts = weight.dtype, 0
        dtype = torch.promote_types(self._dtype, torch.float32) if parts > _ROUNDED_PARTS else self._dtype
        # Zeros only where there is no part to begin with.
        make = torch.empty_like if parts else torch.zeros_like
        self._sum = make(weight, dtype=dtype) if wanted else None

    def add(self, grads: Tensor, inputs: Tensor) -> None:
        """The part of some rows: gradients [rows, outputs] of what the linear made of inputs [rows, inputs]."""
        if self._sum is None:
            return
        if self._sum.dtype == self._dtype:
            torch.addmm(self._sum, grads.t(), inputs, beta=int(self._parts > 0), out=self._sum)
        elif self._parts:
            self._sum += _product("of_weight", grads.t(), inputs)
        else:
            self._sum.copy_(_product("of_weight", grads.t(), inputs))
        self._parts += 1

    def total(self) -> Tensor | None:
        """In the weight's dtype; None where it is not wanted."""
        return None if self._sum is None else self._sum.to(self._dtype)


_room = Room()


def _norm(rows: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    return norm_rows(rows, gain, shift, eps, _room.take("normed", *rows.shape, rows.dtype))


def _product(name: str, a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out=_room.take(name, len(a), b.shape[1], a.dtype))


def _zeros_for_sum(x: Tensor, *shape: int) -> Tensor:
    """Where parts are summed: in float32 at least."""
    return x.new_zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _contiguous(x: Tensor) -> Tensor:
    """A new tensor of the shape of x, whose rows are a view."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _parts(rows: Tensor, width: int) -> list[slice]:
    """Of rows for which `width` numbers each are the widest result."""
    return equal_parts(len(rows), width * rows.element_size(), PART_BYTES)
