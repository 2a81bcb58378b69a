"""Attention from queries to a context of other tokens."""

from torch import Tensor, nn

from fastmim.models.attention import attend


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a context.

    Args:
        dim: width of the queries and of the result.
        context_dim: width of the context.
        num_heads: heads; divides `dim`.
        backend: xformers, sdpa, short or matmul, from `choose_attention`.
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int, backend: str = "sdpa"):
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(context_dim, dim)
        self.v = nn.Linear(context_dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """queries [B, M, dim], keys and values [B, T, context_dim] -> [B, M, dim]."""
        q, k, v = self._heads(self.q(queries)), self._heads(self.k(keys)), self._heads(self.v(values))
        return self.proj(attend(q, k, v, self.backend).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1))
