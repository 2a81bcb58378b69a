"""When models compute with plain operators alone: what looks at each of them cannot look into ours."""

import torch


def wants_plain_operators() -> bool:
    """Whether a compiler, `torch.jit`'s tracer or a transform of `torch.func` is at work."""
    if torch.compiler.is_compiling():
        return True
    return torch.jit.is_tracing() or torch._C._functorch.maybe_current_level() is not None
