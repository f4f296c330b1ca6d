"""From token states to one vector: mean, last token, or NV-Embed's latent attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mmembed.errors import UserInputError


class MeanPooling(nn.Module):
    """Mean of the pooled token states."""

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Pool ``(B, L, D)`` states over a ``(B, L)`` mask to ``(B, D)`` float32."""
        weights = mask.unsqueeze(-1).float()
        return (states.float() * weights).sum(1) / weights.sum(1).clamp(min=1)


class LastTokenPooling(nn.Module):
    """State of the last pooled token, wherever the padding stands."""

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Pool ``(B, L, D)`` states over a ``(B, L)`` mask to ``(B, D)`` float32."""
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask > 0, positions, -1).argmax(1)
        return states[torch.arange(len(states), device=states.device), last].float()


class LatentAttentionPooling(nn.Module):
    """Latent attention of NV-Embed, then the mean.

    The token states are the queries of a cross-attention whose keys and values are learned latents; a GEGLU
    feed-forward follows, both with pre-norm and residual (``modeling_nvembed.py`` of NV-Embed-v1).

    Args:
        hidden_size: Width ``D`` of the states.
        num_latents: Number of learned latents.
        num_heads: Heads of the cross-attention.
        head_dim: Width of a head; the release uses ``D`` itself.
    """

    def __init__(self, hidden_size: int, num_latents: int = 512, num_heads: int = 8, head_dim: int | None = None):
        super().__init__()
        head_dim = hidden_size if head_dim is None else head_dim
        self.num_heads = num_heads
        self.latents = nn.Parameter(torch.randn(num_latents, hidden_size) / hidden_size**0.5)
        self.state_norm = nn.LayerNorm(hidden_size)
        self.latent_norm = nn.LayerNorm(hidden_size)
        self.to_q = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.to_kv = nn.Linear(hidden_size, 2 * num_heads * head_dim, bias=False)
        self.to_out = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.feed_forward_norm = nn.LayerNorm(hidden_size)
        self.feed_forward_in = nn.Linear(hidden_size, 8 * hidden_size)
        self.feed_forward_out = nn.Linear(4 * hidden_size, hidden_size)
        self.mean = MeanPooling()

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Pool ``(B, L, D)`` states over a ``(B, L)`` mask to ``(B, D)`` float32."""
        states = states.to(self.latents.dtype)
        states = states + self._attend(self.state_norm(states))
        values, gates = self.feed_forward_in(self.feed_forward_norm(states)).chunk(2, dim=-1)
        states = states + self.feed_forward_out(values * F.gelu(gates))
        pooled: Tensor = self.mean(states, mask)
        return pooled

    def _attend(self, states: Tensor) -> Tensor:
        parts = (self.to_q(states), *self.to_kv(self.latent_norm(self.latents)).chunk(2, dim=-1))
        # All states of the batch as one item's: the latents are the same for every item, and their gradient would be
        # held once for each of them.
        query, key, value = (x.flatten(0, -2).unflatten(-1, (self.num_heads, -1)).transpose(0, 1) for x in parts)
        out = F.scaled_dot_product_attention(query[None], key[None], value[None])[0]
        attended: Tensor = self.to_out(out.transpose(0, 1).flatten(1)).view_as(states)
        return attended


def build_pooling(name: str, hidden_size: int, **options: int) -> nn.Module:
    """Make a pooling by its name; ``options`` are further arguments of :class:`LatentAttentionPooling`.

    Raises:
        UserInputError: If ``name`` is none of ``latent-attention``, ``mean``, ``last``.
    """
    if name == "mean":
        return MeanPooling()
    if name == "last":
        return LastTokenPooling()
    if name == "latent-attention":
        return LatentAttentionPooling(hidden_size, **options)
    raise UserInputError(f"pooling={name!r} is unknown; write 'latent-attention', 'mean' or 'last'")
