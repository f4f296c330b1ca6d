"""Passes of an encoder whose weights are shared out over processes: none of them can make one alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_mmembed.distributed import Processes
from lightning_mmembed.encoders.base import Encoder
from lightning_mmembed.encoders.processor import EncoderInputs
from lightning_mmembed.encoders.sharding import is_sharded
from lightning_mmembed.items import Candidate, Item

Encode = Callable[[EncoderInputs], Tensor]


def idle_pass(encoder: Encoder) -> EncoderInputs:
    """A pass for nothing: an empty text."""
    return encoder.processor([Candidate(Item(text=""), "")])


@contextlib.contextmanager
def lockstep(encoder: Encoder, processes: Processes, encode: Encode) -> Iterator[Encode]:
    """Let processes encode as many items as each of them has, without waiting for each other where they need not.

    Every layer of a sharded encoder is gathered from all processes, so they make each pass together: before it they ask
    each other who has one left, and one that has none encodes an empty text until nobody has. Processes with a whole
    encoder each never ask.

    Args:
        encoder: The encoder.
        processes: Those that share its weights; with a sharded encoder all of them must come here.
        encode: Encodes the items of one pass.

    Yields:
        What encodes the items of any number of passes to ``(N, D)`` vectors in their order.
    """
    together = processes.size > 1 and is_sharded(encoder)

    def encode_all(inputs: EncoderInputs) -> Tensor:
        rows = []
        for part in inputs.passes():
            if together:
                processes.any(True)
            rows.append(encode(part))
        vectors = torch.cat(rows)
        return torch.empty_like(vectors).index_copy_(0, inputs.order, vectors)

    yield encode_all
    while together and processes.any(False):
        encode(idle_pass(encoder))
