"""What every encoder is to the rest of the package: items in, unit vectors out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lightning_mmembed.encoders.processor import Bucket, EncoderInputs, ItemProcessor, check_text
from lightning_mmembed.encoders.prompts import Entry
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Candidate, Item, Query
from lightning_mmembed.progress import progress_bar

if TYPE_CHECKING:
    from typing_extensions import Unpack

log = logging.getLogger(__name__)

#: Positions of a pass, padding counted, where nobody says otherwise: what a CPU's caches hold, and what keeps any other
#: device busy, some 1000 short texts or 28 pictures of LLaVA-NeXT's size.
CPU_TOKENS, TOKENS = 2048, 16384

#: What ``encode_query`` and ``encode_document`` take for an item. A ``str`` is always a text, a ``Path`` a picture.
ItemLike = Item | str | Image.Image | Path | tuple[Image.Image | Path, str | None]


class EncodeOptions(TypedDict, total=False):
    """The arguments of :meth:`Encoder.encode`, which ``encode_query`` and ``encode_document`` take too."""

    batch_size: int | None
    tokens_per_batch: int | None
    max_length: int | None
    show_progress_bar: bool


class Encoder(nn.Module):
    """A bi-encoder: subclasses say in ``encode_bucket`` how prepared items become vectors.

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

    @property
    def tokens_per_batch(self) -> int:
        """Positions of a pass where nobody says otherwise, padding and pictures counted; it goes by the device."""
        return CPU_TOKENS if self.device.type == "cpu" else TOKENS

    def forward(self, inputs: EncoderInputs) -> Tensor:
        """Encode prepared items.

        Args:
            inputs: What :attr:`processor` made of ``N`` items.

        Returns:
            ``(N, D)`` unit vectors in float32, in the order of the items.
        """
        if not len(inputs):  # there is no pass of a backbone with nothing in it
            return torch.zeros(0, self.embedding_dim, device=self.device)
        rows = torch.cat([self.encode_bucket(bucket) for bucket in inputs.buckets])[:, : self.embedding_dim]
        vectors = F.normalize(torch.zeros_like(rows).index_copy(0, inputs.order, rows), dim=-1)
        return vectors + self._unused() if torch.is_grad_enabled() else vectors

    def occasional_parameters(self) -> list[nn.Parameter]:
        """The trained weights that a pass may have no use for, such as those that only pictures reach."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _unused(self) -> Tensor | float:
        """Zero, as a function of all weights that a pass may leave out.

        It gives each of them a gradient, so that a step does not depend on which process happened to see a picture:
        processes exchange the gradients of the same weights, and DDP need not search for unused ones.
        """
        return sum((parameter.flatten()[0].float() * 0 for parameter in self.occasional_parameters()), 0.0)

    def blocks(self) -> list[nn.Module]:
        """The large parts that every pass runs through, in order: what FSDP gathers one at a time."""
        return []

    def encode_bucket(self, bucket: Bucket) -> Tensor:
        """Encode the ``B`` items of one pass to ``(B, D or more)`` float32 vectors of any length; ``D`` are used."""
        raise NotImplementedError

    @overload
    def encode_query(
        self,
        items: Sequence[ItemLike],
        instruction: str | None = ...,
        *,
        convert_to_numpy: Literal[False] = ...,
        **options: Unpack[EncodeOptions],
    ) -> Tensor: ...
    @overload
    def encode_query(
        self,
        items: Sequence[ItemLike],
        instruction: str | None = ...,
        *,
        convert_to_numpy: Literal[True],
        **options: Unpack[EncodeOptions],
    ) -> np.ndarray: ...
    def encode_query(self, items: Sequence[ItemLike], instruction: str | None = None, **options: Any) -> Any:
        """Encode queries.

        Args:
            items: Texts, pictures, paths of picture files (``pathlib.Path``: a ``str`` is a text), pairs of a picture
                or its path and a text, or :class:`Item` objects. The empty text is an item like any other, and an
                :class:`Item` without text and picture is the same, as in the released MM-Embed. Files are read as they
                are needed.
            instruction: What to find, the same for all of them.
            **options: See :meth:`encode`.

        Returns:
            ``(N, D)`` unit vectors in float32, on the CPU.

        Raises:
            UserInputError: If an item is none of these, a text holds half of a surrogate pair, or a picture is missing,
                broken, without area or larger than PIL allows; the message names its path or its position.
        """
        return self.encode(_Entries(items, instruction, is_query=True), **options)

    @overload
    def encode_document(
        self,
        items: Sequence[ItemLike],
        *,
        convert_to_numpy: Literal[False] = ...,
        **options: Unpack[EncodeOptions],
    ) -> Tensor: ...
    @overload
    def encode_document(
        self, items: Sequence[ItemLike], *, convert_to_numpy: Literal[True], **options: Unpack[EncodeOptions]
    ) -> np.ndarray: ...
    def encode_document(self, items: Sequence[ItemLike], **options: Any) -> Any:
        """Encode candidates, which get no instruction; see :meth:`encode_query`."""
        return self.encode(_Entries(items), **options)

    @overload
    def encode(
        self,
        entries: Sequence[Entry],
        *,
        convert_to_numpy: Literal[False] = ...,
        **options: Unpack[EncodeOptions],
    ) -> Tensor: ...
    @overload
    def encode(
        self, entries: Sequence[Entry], *, convert_to_numpy: Literal[True], **options: Unpack[EncodeOptions]
    ) -> np.ndarray: ...
    def encode(
        self,
        entries: Sequence[Entry],
        *,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        max_length: int | None = None,
        show_progress_bar: bool = False,
        convert_to_numpy: bool = False,
    ) -> Tensor | np.ndarray:
        """Encode queries and candidates, each with its own instruction.

        Entries of like length go through the backbone together. The vectors do not depend on how many do.

        Args:
            entries: Queries, candidates or items.
            batch_size: The most entries in a pass; by default only ``tokens_per_batch`` counts.
            tokens_per_batch: The most positions in a pass, padding and pictures counted, by default
                :attr:`tokens_per_batch`; a longer entry goes alone. Lower it where memory runs out.
            max_length: Longest text in tokens, by default the encoder's own. The end of a longer text is cut, never
                the instruction, and a warning is logged that says how many were.
            show_progress_bar: Show progress with an ETA, on a terminal.
            convert_to_numpy: Give an array in place of a tensor.

        Returns:
            ``(N, D)`` unit vectors in float32, on the CPU, in the order of the entries.

        Raises:
            UserInputError: If a picture cannot be decoded, a text holds half of a surrogate pair, an instruction leaves
                no room for its query, or a number is too small.
        """
        processor = self.processor if max_length is None else self.processor.limited(max_length)
        budget = self.tokens_per_batch if tokens_per_batch is None else tokens_per_batch
        vectors, truncated = [torch.zeros(0, self.embedding_dim)], 0
        with progress_bar(show_progress_bar) as progress:
            bar = progress.add_task("encoding", total=len(entries))
            for inputs in processor.windows(entries, budget, batch_size):
                vectors.append(self.encode_inputs(inputs))
                truncated += inputs.truncated
                progress.advance(bar, len(inputs))
        log_truncated(truncated, len(entries), processor)
        encoded = torch.cat(vectors)
        return encoded.numpy() if convert_to_numpy else encoded

    @torch.no_grad()  # not inference_mode: FSDP2 would keep weights gathered in it, which no training step could use
    def encode_inputs(self, inputs: EncoderInputs) -> Tensor:
        """Encode prepared items in evaluation mode, from any device; the vectors come back on the CPU."""
        with evaluating(self):
            vectors: Tensor = self(inputs.to(self.device)).cpu()
        return vectors


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, after which each part is in the mode that it was in, whatever happens."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def log_truncated(truncated: int, total: int, processor: ItemProcessor) -> None:
    """Warn that texts were cut, if any was."""
    if truncated:
        log.warning("%d of %d texts were cut to max_length=%d tokens", truncated, total, processor.prompts.max_length)


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
    """Make an item of a text, a picture, the path of a picture, or a pair of a picture or its path and a text.

    Raises:
        UserInputError: If ``value`` is something else, its text holds half of a surrogate pair, or the file cannot be
            read.

    Example:
        >>> to_item("a red bus")
        Item(text='a red bus', image=None)
    """
    if isinstance(value, Item | str):
        item = value if isinstance(value, Item) else Item(text=value)
        check_text(item.text)
        return item
    image, text = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if isinstance(image, Image.Image | Path) and isinstance(text, str | None):
        check_text(text)
        return Item(text, read_picture(image) if isinstance(image, Path) else image)
    raise UserInputError(
        f"item={value!r} is a {type(value).__name__}; give a str, a PIL image or an (image, text) pair, where a "
        "pathlib.Path stands for the picture in its file"
    )


def read_picture(path: Path) -> bytes:
    """The bytes of a picture file.

    Raises:
        UserInputError: If it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserInputError(
            f"picture {str(path)!r} cannot be read: {error.strerror}; give the path of a file"
        ) from error


class _Entries(Sequence[Entry]):
    """What the user gave, made into queries or candidates as they are read, so that no file is open before its turn."""

    def __init__(self, items: Sequence[ItemLike], instruction: str | None = None, is_query: bool = False) -> None:
        if isinstance(items, str | Image.Image | Path | Item):
            raise UserInputError(f"items={items!r} is a single item; give a list, such as [{items!r}]")
        self._items, self._instruction, self._is_query = items, instruction, is_query

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, position: Any) -> Any:
        value = self._items[position]
        path = value[0] if isinstance(value, tuple) and value else value
        name = f"items[{position}]" + (f"={str(path)!r}" if isinstance(path, Path) else "")
        try:
            item = to_item(value)
        except UserInputError as error:
            raise UserInputError(f"{name}: {error}") from error
        return Query(item, self._instruction, name) if self._is_query else Candidate(item, name)
