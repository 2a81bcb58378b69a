"""PyTorch operations that are called past PyTorch's dispatcher where nothing has to see them."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

_PLAIN = (Tensor, Parameter)


def _watched() -> bool:
    """Whether a dispatch mode or a transform of `torch.func` is active."""
    return (
        bool(torch._C._len_torch_dispatch_stack()) or torch._C._functorch.peek_interpreter_stack() is not None
    )


class Operation:
    """`torch.ops.fastmim.NAME`, and a shorter way to the same implementation.

    The dispatcher spends more of the host's time on an operation written in Python, and on its autograd node, than
    everything else in a call does, and a step of a small model waits for the host. So a call goes there only where the
    operation has to be seen: by a compiler, a dispatch mode (fake tensors, FLOP counters), a transform of
    `torch.func`, a tensor subclass, or for tensors without memory. Otherwise it is a `torch.autograd.Function`, or
    nothing but the implementation.

    Args:
        name: of the operation.
        run: the implementation; it changes none of its arguments.
    """

    def __init__(self, name: str, run: Callable):
        functools.update_wrapper(self, run)
        self._name, self._run = name, run
        self._operation = torch.library.custom_op(f"fastmim::{name}", run, mutates_args=())
        self._function = None

    def register_fake(self, fake: Callable) -> Callable:
        """As of `torch.library.custom_op`."""
        return self._operation.register_fake(fake)

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """As of `torch.library.custom_op`."""
        self._operation.register_autograd(backward, setup_context=setup_context)

        def forward(ctx, *args):
            # A `setup_context` of its own would have PyTorch inspect the signature in every call.
            output = self._run(*args)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self._name, (torch.autograd.Function,), methods)

    def __call__(self, *args):
        """Run the operation; its arguments are positional."""
        if torch.compiler.is_compiling() or _watched():
            return self._operation(*args)
        needs_grad, may_need = False, torch.is_grad_enabled()
        for arg in args:
            if isinstance(arg, Tensor):
                if type(arg) not in _PLAIN or arg.is_meta:
                    return self._operation(*args)
                needs_grad |= may_need and arg.requires_grad
        if not needs_grad:
            return self._run(*args)
        # Without a gradient of its own the operation refuses to be differentiated, as the dispatcher tells.
        return (self._function.apply if self._function else self._operation)(*args)


def operation(name: str) -> Callable[[Callable], Operation]:
    """Decorate the implementation of `torch.ops.fastmim.NAME`."""
    return functools.partial(Operation, name)
