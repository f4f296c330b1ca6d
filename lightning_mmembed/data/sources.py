"""Finds out which layout a source has."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning_mmembed.data.beir import BEIRLayout
from lightning_mmembed.data.layout import MBEIRLayout
from lightning_mmembed.data.records import Layout
from lightning_mmembed.data.triplets import TripletLayout
from lightning_mmembed.errors import UserInputError

log = logging.getLogger(__name__)

LAYOUTS = ("mbeir", "beir", "triplets")

#: What a source of texts does not say itself: arguments of :class:`~lightning_mmembed.data.texts.TextLayout`.
TEXT_SETTINGS = ("dataset", "dataset_id", "instruction", "val_fraction", "test_fraction", "split_seed")

_MARKS = {"beir": "it holds corpus.jsonl", "triplets": "it is a file of JSON lines"}


def open_layout(source: str | Path, layout: str | None = None, **settings: Any) -> Layout:
    """Open a source in the layout that it has.

    Args:
        source: A folder in M-BEIR's or BEIR's layout, or a ``.jsonl`` of queries and positives.
        layout: ``"mbeir"``, ``"beir"`` or ``"triplets"``; by default found out.
        **settings: See :class:`~lightning_mmembed.data.texts.TextLayout`; M-BEIR's layout tells them itself.

    Raises:
        UserInputError: If it has none of these, ``layout`` is unknown, or a setting cannot be used.
    """
    if layout not in (None, *LAYOUTS):
        raise UserInputError(f"layout={layout!r} is unknown; write one of {', '.join(LAYOUTS)}, or null to find it out")
    if layout is None:
        layout = _found(Path(source))
        if layout != "mbeir":
            log.info("%s has the layout %s: %s", source, layout, _MARKS[layout])
    if layout != "mbeir":
        texts = (BEIRLayout if layout == "beir" else TripletLayout)(source, **settings)
        log.info("dataset=%s dataset_id=%d, asked with %s", texts.dataset, texts.dataset_id, list(texts.instructions))
        return texts
    given = sorted(name for name, value in settings.items() if value)
    if given:
        raise UserInputError(
            f"{', '.join(given)}: only of beir and triplets; M-BEIR's layout says all of it in its files"
        )
    return MBEIRLayout(source)


def _found(source: Path) -> str:
    if source.is_file():
        return "triplets"
    if (source / "corpus.jsonl").is_file():
        return "beir"
    if (source / "query").is_dir() or (source / "cand_pool").is_dir():
        return "mbeir"
    raise UserInputError(
        f"source={str(source)!r} is neither a folder with query/ and cand_pool/ (M-BEIR), nor one with corpus.jsonl "
        "(BEIR), nor a .jsonl of queries and positives; give one of these"
    )
