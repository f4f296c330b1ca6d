"""Shows what a search of plain files found: a table, a TREC run, a page with thumbnails."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import Image
from rich.markup import escape
from rich.table import Table

from lightning_mmembed.encoders.processor import decode_image
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import write_atomically
from lightning_mmembed.retrieval.report import GalleryQuery, template

_THUMBNAIL = (320, 320)


def found_table(query: GalleryQuery) -> Table:
    """The results of a query: rank, score, id, kind and, where there is one, the start of the text."""
    asked = " + ".join([*(["a picture"] if query.image else []), *([repr(query.text)] if query.text else [])])
    table = Table(title=escape(f"{query.qid}: {asked}"), title_justify="left")
    for name in ("rank", "score"):
        table.add_column(name, justify="right")
    table.add_column("id", overflow="fold")
    table.add_column("kind")
    texts = any(result.text for result in query.results)
    if texts:
        table.add_column("text", overflow="ellipsis", no_wrap=True)
    for rank, result in enumerate(query.results, 1):
        text = [escape(result.text or "")] if texts else []
        table.add_row(str(rank), f"{result.score:.4f}", escape(result.did), result.modality, *text)
    return table


def run_lines(queries: Sequence[GalleryQuery], tag: str = "mmembed") -> str:
    r"""The results as a six-column TREC run; white space in an id is written as in a URL.

    Example:
        >>> from lightning_mmembed.retrieval.report import GalleryResult
        >>> result = GalleryResult("my cat.jpg", 0.5, None, None, "image", False, True)
        >>> run_lines([GalleryQuery("", "1", None, "a cat", None, (), (result,))])
        '1 Q0 my%20cat.jpg 1 0.5 mmembed\n'
    """
    return "".join(
        f"{_column(query.qid)} Q0 {_column(result.did)} {rank} {result.score:.9g} {tag}\n"
        for query in queries
        for rank, result in enumerate(query.results, 1)
    )


def write_page(path: str | Path, title: str, queries: Sequence[GalleryQuery]) -> Path:
    """Write the results as a single HTML file that needs nothing else."""
    page = template("found.html.j2").render(title=title, queries=queries)
    return write_atomically(path, page.encode(errors="replace"))


def thumbnail(image: Path | bytes | None) -> bytes | None:
    """A small JPEG of a picture file or its bytes; ``None`` if there is none, or it can no longer be read."""
    if image is None:
        return None
    try:
        small = decode_image(image.read_bytes() if isinstance(image, Path) else image)
    except (OSError, UserInputError):
        return None
    small.thumbnail(_THUMBNAIL, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return file.getvalue()


def _column(name: str) -> str:
    """An id without white space, and without what no UTF-8 file can hold."""
    awkward = {c for c in name if c.isspace() or c == "%" or not c.isprintable()}
    return "".join(quote(c, errors="surrogateescape") if c in awkward else c for c in name)
