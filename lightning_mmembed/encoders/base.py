"""What every encoder is to the rest of the package: items in, unit vectors out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from rich.progress import track
from torch import Tensor, nn

from lightning_mmembed.encoders.processor import EncoderInputs, ItemProcessor
from lightning_mmembed.encoders.prompts import Entry
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Item, Query

#: What ``encode_query`` and ``encode_document`` take for an item.
ItemLike = Item | str | Image.Image | tuple[Image.Image, str]


class Encoder(nn.Module):
    """A bi-encoder: subclasses say in ``forward`` how prepared items become vectors.

    Attributes:
        processor: Turns items into the inputs of ``forward``.
        embedding_dim: Width ``D`` of a vector.
    """

    processor: ItemProcessor
    embedding_dim: int

    @property
    def settings(self) -> dict[str, Any]:
        """How the encoder was built, as saved along with its weights."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def encode_query(
        self,
        items: Sequence[ItemLike],
        instruction: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool = False,
    ) -> Tensor:
        """Encode queries.

        Args:
            items: Texts, pictures, (picture, text) pairs or :class:`Item` objects.
            instruction: What to find, the same for all of them.
            batch_size: Items per pass.
            show_progress_bar: Show progress with an ETA.

        Returns:
            ``(N, D)`` unit vectors in float32, on the CPU.
        """
        return self.encode(
            [Query(to_item(item), instruction=instruction) for item in items], batch_size, show_progress_bar
        )

    def encode_document(
        self, items: Sequence[ItemLike], batch_size: int = 32, show_progress_bar: bool = False
    ) -> Tensor:
        """Encode candidates, which get no instruction; see :meth:`encode_query`."""
        return self.encode([to_item(item) for item in items], batch_size, show_progress_bar)

    def encode(self, entries: Sequence[Entry], batch_size: int = 32, show_progress_bar: bool = False) -> Tensor:
        """Encode queries and candidates, each with its own instruction; see :meth:`encode_query`."""
        starts = track(range(0, len(entries), batch_size), "encoding", disable=not show_progress_bar)
        vectors = [self.encode_inputs(self.processor(entries[start : start + batch_size])) for start in starts]
        return torch.cat(vectors) if vectors else torch.zeros(0, self.embedding_dim)

    @torch.inference_mode()
    def encode_inputs(self, inputs: EncoderInputs) -> Tensor:
        """Encode prepared items in evaluation mode, from any device; the vectors come back on the CPU."""
        was_training = self.training
        self.eval()
        vectors: Tensor = self(inputs.to(self.device)).cpu()
        self.train(was_training)
        return vectors


def encoder_of(module: nn.Module) -> Encoder:
    """The encoder of a module that trains one.

    Raises:
        UserInputError: If the module has no attribute ``encoder``, or another kind of object there.
    """
    encoder = getattr(module, "encoder", None)
    if not isinstance(encoder, Encoder):
        raise UserInputError(
            f"{type(module).__name__}.encoder is {type(encoder).__name__}; the datamodule and the callbacks need a "
            "module with an MLLMEncoder there, such as RetrievalModule"
        )
    return encoder


def to_item(value: ItemLike) -> Item:
    """Make an item of a text, a picture or a (picture, text) pair.

    Raises:
        UserInputError: If ``value`` is something else.

    Example:
        >>> to_item("a red bus")
        Item(text='a red bus', image=None)
    """
    if isinstance(value, Item):
        return value
    if isinstance(value, str):
        return Item(text=value)
    if isinstance(value, Image.Image):
        return Item(image=value)
    if isinstance(value, tuple) and len(value) == 2:
        return Item(image=value[0], text=value[1])
    raise UserInputError(
        f"item={value!r} is a {type(value).__name__}; give a str, a PIL image or an (image, text) pair"
    )
