"""Transformer blocks, from timm, with this engine's attention and kernels; and their initialisation."""

import functools
from collections.abc import Sequence

import torch
import torch._functorch.config
import torch.nn.functional as F
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from fastmim.kernels import _dispatch, add_layer_norm, gather_tokens
from fastmim.models.attention import Attention
from fastmim.models.by_rows import add_linear, norm_linear, norm_mlp, runs_by_rows, stands_for
from fastmim.models.recompute import recompute

LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)

_COMPILED_KEEPS = 0.65
"""Share of what the compiler would keep by itself: enough that it computes no product of the linears again."""


def kernels_run(x: Tensor) -> bool:
    """Whether a block computes with fused kernels; a compiler is given plain operators, which it fuses itself."""
    return not torch.compiler.is_compiling() and _dispatch.use_triton(x)


@stands_for()
class AddLayerNorm(nn.LayerNorm):
    """A LayerNorm, with LayerNorm's parameters, that also makes the residual addition before it."""

    def __init__(self, width: int, **options):
        super().__init__(width, eps=1e-6, **options)

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, branch [B, N, D] -> LayerNorm(x + branch), x + branch; without a branch LayerNorm(x), x."""
        if branch is None:
            return super().forward(x), x
        if kernels_run(x):
            return add_layer_norm(x, branch, self.weight, self.bias, self.eps)
        x = x + branch
        return super().forward(x), x


@stands_for(nn.Linear, nn.Linear)
class MLP(nn.Module):
    """timm's two-layer MLP, with its parameter names; dropout and a norm are options it does not have.

    Args:
        in_features: token dimension.
        hidden_features: width between the linears.
    """

    def __init__(self, in_features: int, hidden_features: int, **timm_options):
        super().__init__()
        # timm's block passes every option of its own MLP.
        assert timm_options.pop("act_layer") is nn.GELU and timm_options.pop("bias")
        active = [name for name, value in timm_options.items() if value]
        assert not active, f"options that this MLP does not have: {active}"
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        return self.fc2(F.gelu(self.fc1(x)))


def _summed(x: Tensor, branch: Tensor | None) -> Tensor:
    """x + branch, or x where there is none."""
    return x if branch is None else x + branch


def _mlp_summands(
    x: Tensor, branch: Tensor | None, norm: AddLayerNorm, mlp: MLP, drop_path: nn.Module
) -> tuple[Tensor, Tensor | None]:
    """With x + branch as x: x + drop_path(mlp(norm(x))), in two summands of which the second may be none.

    Args:
        x, branch: [B, N, D].
        norm, mlp, drop_path: parts of a block.
    """
    if not runs_by_rows(x, norm, mlp):
        normed, x = norm(x, branch)
        return x, drop_path(mlp(normed))
    x, adds = _summed(x, branch), isinstance(drop_path, nn.Identity)
    result = norm_mlp(x, norm, mlp.fc1, mlp.fc2, add=adds)
    return (result, None) if adds else (x, drop_path(result))


def add_mlp(x: Tensor, branch: Tensor, norm: AddLayerNorm, mlp: MLP, drop_path: nn.Module) -> Tensor:
    """As `_mlp_summands`, in one tensor."""
    return _summed(*_mlp_summands(x, branch, norm, mlp, drop_path))


class Block(timm_vit.Block):
    """timm's pre-norm block, which leaves its last residual addition to the norm that follows.

    Args:
        width: token dimension.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP over `width`.
        drop_path: stochastic depth rate.
        attention: backend, from `choose_attention`.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float, attention: str):
        super().__init__(
            width,
            heads,
            mlp_ratio,
            qkv_bias=True,
            drop_path=drop_path,
            norm_layer=AddLayerNorm,
            mlp_layer=MLP,
            attn_layer=_attention_class(attention),
        )

    def forward(
        self, x: Tensor, branch: Tensor | None = None, ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The block's output in two summands, what the MLP added last, or in one.

        Args:
            x, branch: [B, N, D], summands of the input.
            ids: int64 [B, M], the patches that are asked for, behind the cls token; the MLP runs on them alone.

        Returns:
            [B, N, D], or [B, M, D] where `ids` ask for them; and as much or None.
        """
        if runs_by_rows(x, self.norm1, self.attn):
            x = _summed(x, branch)
            attended = self.attn.attend(norm_linear(x, self.norm1, self.attn.qkv))
            if isinstance(self.drop_path1, nn.Identity):
                x, branch = add_linear(x, attended, self.attn.proj), None
            else:
                branch = self.drop_path1(self.attn.proj(attended))
        else:
            normed, x = self.norm1(x, branch)
            branch = self.drop_path1(self.attn(normed))
        if ids is not None:
            x, branch = gather_tokens(_summed(x, branch), ids, offset=1), None
        return _mlp_summands(x, branch, self.norm2, self.mlp, self.drop_path2)

    def closed(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """The block's input [B, N, D] to its output, of the patches `ids` alone where they are given."""
        return _summed(*self(x, None, ids))


class Blocks(nn.Module):
    """A stack of pre-norm transformer blocks.

    On CUDA, unless compiled, each residual addition is one launch with the norm after it; on a CPU it is made by the
    linear before it (`by_rows.py`).

    Args:
        width: token dimension.
        depth: number of blocks.
        heads: attention heads per block.
        mlp_ratio: hidden width of the MLP over `width`.
        drop_path: stochastic depth rate of the last block, rising linearly from 0.
        attention: backend, from `choose_attention`.
        checkpointing: recompute each block in the backward pass instead of storing it.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        attention: str = "sdpa",
        checkpointing: bool = False,
    ):
        super().__init__()
        rates = drop_path_rates(drop_path, depth)
        self.checkpointing = checkpointing
        self.layers = nn.ModuleList(Block(width, heads, mlp_ratio, rate, attention) for rate in rates)

    def compile_layers(self) -> None:
        """Compile each block; equal blocks share one compiled graph, but for the first, which adds no branch."""
        compile_each(self.layers)

    def forward(
        self, x: Tensor, every_layer: bool = False, ids: Tensor | None = None
    ) -> Tensor | list[Tensor]:
        """Through all blocks.

        Args:
            x: [B, N, D].
            every_layer: the output of each block is asked for.
            ids: int64 [B, M], the patches whose output is asked for, behind the cls token; all tokens unless given.

        Returns:
            [B, N, D], or [B, M, D] of `ids`; where `every_layer` one for each block.
        """
        asked = [None] * (len(self.layers) - 1) + [ids]
        if every_layer or (self.checkpointing and torch.is_grad_enabled()):
            outputs = []
            for layer, its in zip(self.layers, asked, strict=True):
                # Added up, since a block's input is what is stored: one tensor, not its two summands.
                x = recompute(layer.closed, x, its) if self.checkpointing else layer.closed(x, its)
                outputs.append(x)
            return outputs if every_layer else x
        branch = None
        for layer, its in zip(self.layers, asked, strict=True):
            x, branch = layer(x, branch, its)
        return _summed(x, branch)


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth of each block, rising linearly from 0 to `last`; numbers for a model on meta too."""
    return torch.linspace(0, last, depth, device="cpu").tolist()


def compile_each(layers: Sequence[nn.Module], keeps: float = _COMPILED_KEEPS) -> None:
    """`torch.compile` each module, however many graphs that makes: every rate of stochastic depth is one of its own.

    On a CPU it keeps a share of what the compiler would keep by itself: as little as a transformer block that is not
    compiled does, which computes norms and GELU again. Both are options of the process.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 4 * len(layers))
    if not torch.cuda.is_available():
        torch._functorch.config.activation_memory_budget = keeps
    for layer in layers:
        layer.compile()


@functools.cache
def _attention_class(backend: str) -> type[Attention]:
    # timm asks for a class and checks it with issubclass, so a partial will not do. One class per backend: blocks
    # of different classes would be compiled one by one, and past eight of them not at all.
    made = type(
        "Attention", (Attention,), {"__init__": functools.partialmethod(Attention.__init__, backend=backend)}
    )
    return stands_for(nn.Linear, nn.Linear)(made)


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform linears with zero biases, unit LayerNorms (MAE, appendix A.1); for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
