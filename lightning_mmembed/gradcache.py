"""Contrastive steps over batches that are larger than memory: vectors first, gradients pass by pass.

GradCache (Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"): the vectors of
all items are computed without a graph; the loss gives the gradient of every vector; then each pass is computed once
more, with a graph, and its share of the gradient is sent through it. The gradient of the weights is that of the whole
batch, and activations are held of one pass at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_mmembed.encoders.processor import EncoderInputs

Encode = Callable[[EncoderInputs], Tensor]


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers, of dropout for instance, from a seed; afterwards the streams go on as if nothing was drawn.

    Args:
        seed: Any integer below ``2 ** 64``.
        device: Whose stream is meant besides the CPU's.
    """
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(seed)
        yield


class GradCache:
    """The vectors of a batch, computed without a graph, and the way of their gradients to the weights.

    Args:
        encode: From the inputs of a pass to ``(B, D)`` vectors.
        passes: The inputs of each pass.
        seed: Of the random numbers; each pass draws from a seed of its own, the same both times.

    Attributes:
        vectors: ``(N, D)`` vectors in the order of the passes; a leaf, whose ``grad`` :meth:`backward` sends on.
    """

    def __init__(self, encode: Encode, passes: Sequence[EncoderInputs], seed: int) -> None:
        self._passes, self._seed = passes, seed
        with torch.no_grad():
            parts = [self._encode(number, encode) for number in range(len(passes))]
        self.vectors = torch.cat(parts).requires_grad_()

    def _encode(self, number: int, encode: Encode) -> Tensor:
        inputs = self._passes[number]
        with seeded((self._seed + number) % 2**64, inputs.order.device):
            return encode(inputs)

    def backward(self, encode: Encode, encode_last: Encode) -> None:
        """Add the gradient of what was computed from :attr:`vectors` to that of the weights.

        Args:
            encode: As it was given before.
            encode_last: The same for the last pass, in which gradients are exchanged between processes.
        """
        assert self.vectors.grad is not None
        gradients = torch.split(self.vectors.grad, [len(inputs) for inputs in self._passes])
        for number, gradient in enumerate(gradients):
            last = number == len(self._passes) - 1
            self._encode(number, encode_last if last else encode).backward(gradient)  # type: ignore[no-untyped-call]
