"""The poolings against independent implementations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_mmembed.encoders.pooling import LatentAttentionPooling, build_pooling


def layer_norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + norm.eps) * norm.weight + norm.bias


def by_loops(pool: LatentAttentionPooling, states: Tensor, mask: Tensor) -> Tensor:
    """Latent attention written out: a query token at a time, a head at a time."""
    heads, width = pool.num_heads, pool.to_q.weight.shape[0] // pool.num_heads
    latents = torch.stack([layer_norm(latent, pool.latent_norm) for latent in pool.latents])
    keys = torch.einsum("oi,li->lo", pool.to_kv.weight[: heads * width], latents)
    values = torch.einsum("oi,li->lo", pool.to_kv.weight[heads * width :], latents)
    pooled = []
    for row, row_mask in zip(states, mask, strict=True):
        kept = []
        for state, counts in zip(row, row_mask, strict=True):
            if not counts:
                continue
            query = torch.einsum("oi,i->o", pool.to_q.weight, layer_norm(state, pool.state_norm))
            heard = []
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                scores = torch.stack([query[part] @ key[part] for key in keys]) / math.sqrt(width)
                weights = scores.exp() / scores.exp().sum()
                heard.append(torch.einsum("l,ld->d", weights, values[:, part]))
            state = state + torch.einsum("oi,i->o", pool.to_out.weight, torch.cat(heard))
            wide = pool.feed_forward_in.weight @ layer_norm(state, pool.feed_forward_norm) + pool.feed_forward_in.bias
            value, gate = wide[: len(wide) // 2], wide[len(wide) // 2 :]
            gelu = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
            kept.append(state + pool.feed_forward_out.weight @ (value * gelu) + pool.feed_forward_out.bias)
        pooled.append(torch.stack(kept).mean(0))
    return torch.stack(pooled)


@pytest.mark.parametrize("head_dim", [None, 3])
def test_latent_attention_equals_its_definition_head_by_head(head_dim: int | None) -> None:
    torch.manual_seed(0)
    pool = LatentAttentionPooling(8, num_latents=5, num_heads=2, head_dim=head_dim).double()
    with torch.no_grad():
        for parameter in pool.parameters():  # norms too
            parameter.add_(torch.randn_like(parameter) * 0.3)
    states = torch.randn(3, 4, 8, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]])
    torch.testing.assert_close(pool(states, mask).double(), by_loops(pool, states, mask), rtol=1e-5, atol=1e-5)


def test_the_default_sizes_are_those_of_the_release() -> None:
    pool = build_pooling("latent-attention", 8)
    assert {name: tuple(p.shape) for name, p in pool.named_parameters() if p.ndim == 2} == {
        "latents": (512, 8),
        "to_q.weight": (64, 8),
        "to_kv.weight": (128, 8),
        "to_out.weight": (8, 64),
        "feed_forward_in.weight": (64, 8),
        "feed_forward_out.weight": (8, 32),
    }


@pytest.mark.parametrize(("name", "expected"), [("mean", [[2.5, 3.5], [6.0, 7.0]]), ("last", [[3.0, 4.0], [6.0, 7.0]])])
def test_pooling_reads_the_masked_positions_only(name: str, expected: list[list[float]]) -> None:
    states = torch.tensor(
        [[[9.0, 9.0], [2.0, 3.0], [3.0, 4.0], [9.0, 9.0]], [[6.0, 7.0], [9.0, 9.0], [9.0, 9.0], [9.0, 9.0]]]
    )
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])
    assert build_pooling(name, 2)(states, mask).tolist() == expected


@pytest.mark.parametrize("name", ["mean", "last", "latent-attention"])
def test_vectors_of_low_precision_states_are_pooled_in_float32(name: str) -> None:
    pool = build_pooling(name, 8).to(torch.bfloat16)
    assert pool(torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.ones(2, 3)).dtype is torch.float32
