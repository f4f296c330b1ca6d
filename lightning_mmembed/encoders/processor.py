"""From items to the tensors that an encoder reads."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lightning_mmembed.encoders.families import Family, Picture
from lightning_mmembed.encoders.prompts import Entry, PromptTokenizer, Tokens, item_of
from lightning_mmembed.errors import UserInputError, refuse_below_one
from lightning_mmembed.items import Item, Query

PADDING_SIDES = ("right", "left")

#: A pass of so many positions keeps a device busy, so that it ends before an item so much longer than its first.
_SMALLEST_PASS, _LONGER = 1024, 1.125

#: Items that are read before they are sorted by length: as many as fill so many passes, read so many at a time.
_PASSES_IN_WINDOW, _READ_AT_ONCE = 8, 32


@dataclass(frozen=True)
class Bucket:
    """Items of similar length, padded to the longest of them: one pass of the backbone.

    Args:
        input_ids: ``(B, L)`` token ids, the picture's own ids among them.
        attention_mask: ``(B, L)`` 1 on tokens, 0 on padding.
        pool_mask: ``(B, L)`` 1 on the tokens that are pooled: all but the instruction and the padding.
        pictures: The family's inputs for the pictures, in the order of their rows; empty when no item has one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pool_mask: Tensor
    pictures: dict[str, Tensor]

    def to(self, device: torch.device | str) -> Bucket:
        """Copy to a device."""
        return Bucket(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.pool_mask.to(device),
            {name: value.to(device, non_blocking=True) for name, value in self.pictures.items()},
        )


@dataclass(frozen=True)
class EncoderInputs:
    """A list of items, cut by length into buckets.

    Args:
        buckets: The buckets, shortest items first.
        order: ``(N,)`` position in the list of items of each row of the concatenated buckets.
        truncated: Number of items whose text was cut to the longest allowed.
    """

    buckets: list[Bucket]
    order: Tensor
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.order)

    def passes(self) -> list[EncoderInputs]:
        """Each bucket by itself; together they hold the items in the order of :attr:`order`."""
        device = self.order.device
        return [EncoderInputs([b], torch.arange(len(b.input_ids), device=device)) for b in self.buckets]

    def to(self, device: torch.device | str) -> EncoderInputs:
        """Copy to a device."""
        return replace(self, buckets=[bucket.to(device) for bucket in self.buckets], order=self.order.to(device))


class ItemProcessor:
    """Writes prompts, tokenises them and prepares pictures.

    Args:
        prompts: Tokenises prompts.
        family: Prepares pictures.
        length_buckets: Number of buckets that a list of items is cut into where no budget of tokens is given: in
            training, whose processes must run the same number of passes.
        padding_side: ``"right"`` or ``"left"``; no vector depends on it.

    Raises:
        UserInputError: If ``padding_side`` is neither.
    """

    def __init__(
        self, prompts: PromptTokenizer, family: Family, length_buckets: int = 4, padding_side: str = "right"
    ) -> None:
        if padding_side not in PADDING_SIDES:
            raise UserInputError(f"padding_side={padding_side!r} is unknown; write one of {PADDING_SIDES}")
        self.prompts, self.family = prompts, family
        self.length_buckets, self.padding_side = length_buckets, padding_side

    def settings(self) -> dict[str, Any]:
        """What a vector depends on besides the weights, for its fingerprint."""
        tokenizer = self.prompts.tokenizer
        words = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
        prompts = [type(self.prompts).__name__, self.prompts.max_length, words]
        if self.prompts.passage_length is not None:
            prompts.append(self.prompts.passage_length)
        return {"prompts": prompts, **self.family.settings()}

    def limited(self, max_length: int) -> ItemProcessor:
        """The same with another limit of the text, in tokens; this one is left as it is.

        Raises:
            UserInputError: If nothing of a text fits into ``max_length``.
        """
        limited = copy.copy(self)
        limited.prompts = copy.copy(self.prompts)
        limited.prompts.max_length, limited.prompts.passage_length = max_length, None
        return limited

    def __call__(
        self, entries: Sequence[Entry], tokens_per_batch: int | None = None, batch_size: int | None = None
    ) -> EncoderInputs:
        """Prepare a list of queries and candidates for the encoder.

        Args:
            entries: Queries, candidates or items.
            tokens_per_batch: Cut into as many buckets as needed for none to have more positions than this, padding and
                pictures counted; an item that is longer has one of its own. ``None`` cuts into ``length_buckets``.
            batch_size: With a budget of tokens: the most items in a bucket.

        Raises:
            UserInputError: If a picture cannot be decoded, a text holds half of a surrogate pair, or an instruction
                leaves no room for its query.
        """
        return self._collate(self._rows(entries, 0), tokens_per_batch, batch_size)

    def windows(
        self, entries: Iterable[Entry], tokens_per_batch: int, batch_size: int | None = None
    ) -> Iterator[EncoderInputs]:
        """Prepare any number of entries, some passes at a time, so that memory goes by the budget, not by the entries.

        Args:
            entries: Read as they are needed.
            tokens_per_batch: See :meth:`__call__`.
            batch_size: See :meth:`__call__`.

        Yields:
            The inputs of neighbouring entries, in their order.

        Raises:
            UserInputError: As :meth:`__call__`; an entry without an id is named by its position.
        """
        entries, read = iter(entries), 0
        rows: list[_Row] = []
        while some := list(islice(entries, _READ_AT_ONCE)):
            rows += self._rows(some, read)
            read += len(some)
            if sum(len(row.ids) for row in rows) >= _PASSES_IN_WINDOW * tokens_per_batch:
                inputs, rows = self._collate(rows, tokens_per_batch, batch_size), []
                yield inputs  # which holds the pictures alone now
        if rows:
            yield self._collate(rows, tokens_per_batch, batch_size)

    def _rows(self, entries: Sequence[Entry], first: int) -> list[_Row]:
        """Tokens and pictures of some entries, of which the first one has a position in a longer list."""
        for n, entry in enumerate(entries):
            with _naming(entry, first + n):
                check_text(item_of(entry).text)
                check_text(entry.instruction if isinstance(entry, Query) else None)
        tokens = self.prompts(entries)
        pictures = [self._picture(entry, first + n) for n, entry in enumerate(entries)]
        return [_Row.of(*pair) for pair in zip(tokens, pictures, strict=True)]

    def _collate(self, rows: list[_Row], tokens_per_batch: int | None, batch_size: int | None) -> EncoderInputs:
        lengths = np.array([len(row.ids) for row in rows], dtype=np.int64)
        order = np.argsort(lengths, kind="stable")
        if tokens_per_batch is None:
            parts = np.array_split(order, max(1, min(self.length_buckets, len(order))))
        else:
            parts = [order[run.start : run.stop] for run in passes(lengths[order], tokens_per_batch, batch_size)]
        buckets = [self._bucket([rows[i] for i in part]) for part in parts]
        return EncoderInputs(buckets, torch.from_numpy(order), sum(row.truncated for row in rows))

    def _picture(self, entry: Entry, position: int) -> Picture | None:
        image = item_of(entry).image
        if image is None:
            return None
        with _naming(entry, position):
            return self.family.picture(decode_image(image))

    def _bucket(self, rows: list[_Row]) -> Bucket:
        longest = max((len(row.ids) for row in rows), default=0)
        input_ids = torch.full((len(rows), longest), self.prompts.pad)
        attention_mask = torch.zeros_like(input_ids)
        pool_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            start = longest - len(row.ids) if self.padding_side == "left" else 0
            end = start + len(row.ids)
            input_ids[i, start:end] = torch.tensor(row.ids)
            attention_mask[i, start:end] = 1
            pool_mask[i, start + row.pool_from : end] = 1
        pictures = [row.picture for row in rows if row.picture is not None]
        names = pictures[0].inputs if pictures else ()
        return Bucket(
            input_ids,
            attention_mask,
            pool_mask,
            {name: torch.cat([picture.inputs[name] for picture in pictures]) for name in names},
        )


@dataclass(frozen=True)
class _Row:
    """One item's ids with those of its picture among them."""

    ids: list[int]
    pool_from: int
    truncated: bool
    picture: Picture | None

    @classmethod
    def of(cls, tokens: Tokens, picture: Picture | None) -> _Row:
        ids = tokens.ids
        if picture is not None:
            ids = ids[: tokens.image_at] + picture.token_ids + ids[tokens.image_at :]
        # Where a passage is cut before what MM-Embed's rule would pool of it, all that is left is pooled.
        return cls(ids, tokens.pool_from if tokens.pool_from < len(ids) else 0, tokens.truncated, picture)


def passes(lengths: Sequence[int] | np.ndarray, tokens: int, rows: int | None = None) -> list[range]:
    """Cut ascending lengths into runs that take at most so many positions when each is padded to its longest.

    A run of 1024 positions or more ends before the budget does where the next length is more than an eighth above its
    first, so that little is padded.

    Args:
        lengths: Ascending.
        tokens: The budget; a length beyond it makes a run of its own.
        rows: The most lengths in a run.

    Raises:
        UserInputError: If ``tokens`` or ``rows`` is below 1.

    Example:
        >>> passes([3, 3, 4, 9, 20], 12)
        [range(0, 3), range(3, 4), range(4, 5)]
    """
    refuse_below_one(tokens_per_batch=tokens, batch_size=rows)
    runs, start = [], 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or stop - start == rows or _ends(lengths, start, stop, tokens):
            runs.append(range(start, stop))
            start = stop
    return runs


def _ends(lengths: Sequence[int] | np.ndarray, start: int, stop: int, tokens: int) -> bool:
    """Whether a run of lengths would be too long with the next one, or is better not padded to it."""
    if (stop + 1 - start) * int(lengths[stop]) > tokens:
        return True
    positions = (stop - start) * int(lengths[stop - 1])
    return positions >= _SMALLEST_PASS and bool(lengths[stop] > _LONGER * lengths[start])


@contextlib.contextmanager
def _naming(entry: Entry, position: int) -> Iterator[None]:
    """Name an entry, by its id or its position, in what is wrong with it."""
    try:
        yield
    except ValueError as error:  # of a family too, such as one that refuses a very long and thin picture
        name = "" if isinstance(entry, Item) else entry.qid if isinstance(entry, Query) else entry.did
        raise UserInputError(f"{name or f'items[{position}]'}: {error}") from error


def check_text(text: str | None) -> None:
    """Refuse what no tokenizer takes; JSON can name it, and so can an argument that is not UTF-8.

    Raises:
        UserInputError: If the text holds half of a surrogate pair.
    """
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise UserInputError(
            f"its text or instruction holds {error.object[error.start]!a}, half of a surrogate pair, which is no "
            "character; take it out, or write texts in UTF-8"
        ) from error


def decode_image(image: bytes | Image.Image) -> Image.Image:
    """Decode a picture to RGB; alpha is dropped, not blended, as the references do.

    Args:
        image: The bytes of a picture file, or a picture of PIL, read or not.

    Raises:
        UserInputError: If it is no picture, a truncated one, one without area, or larger than PIL allows.
    """
    what = f"a picture of {len(image)} bytes" if isinstance(image, bytes) else "a picture"
    try:
        opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
        if 0 in opened.size:
            raise ValueError(f"its {opened.width} x {opened.height} pixels have no area")
        return opened.convert("RGB")
    except Image.DecompressionBombError as error:
        raise UserInputError(
            f"{what} cannot be decoded: {error}. If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS; else leave it out"
        ) from error
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error ... on broken files
        # The message of an unidentified one names an object in memory.
        reason = "no known picture format" if isinstance(error, UnidentifiedImageError) else error
        raise UserInputError(f"{what} cannot be decoded: {reason}; replace it or leave it out") from error
