"""Scores on disk, in parts that are each whole or absent, so that no pair is scored twice."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image

from lightning_mmembed.files import resumable, write_atomically
from lightning_mmembed.items import Item

log = logging.getLogger(__name__)

_PAIR = np.dtype([("key", "S32"), ("score", "<f4")])


def pair_key(reranker: str, prompt: str, instruction: str | None, query: Item, candidate: Item) -> str:
    """What a score depends on, in 32 hexadecimal digits; ids of queries and candidates do not count.

    Args:
        reranker: Fingerprint of weights, tokenizer, pictures and labels.
        prompt: The wording.
        instruction: Of the query.
        query: The item of the query.
        candidate: The item of the candidate.
    """
    parts = [reranker, prompt, instruction, *_content(query), *_content(candidate)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _content(item: Item) -> list[str | None]:
    image = item.image
    if image is None:
        return [item.text or "", None]
    digest = hashlib.sha256()
    if isinstance(image, Image.Image):
        digest.update(f"{image.mode} {image.size} ".encode())
        digest.update(image.tobytes())
    else:
        digest.update(image)
    return [item.text or "", digest.hexdigest()]


class ScoreStore:
    """Scores by the key of their pair; a context manager that writes what is left when it is closed.

    New scores are appended as a part of their own, under a temporary name that is then renamed. Several processes may
    write into one directory. A part that is cut short is left aside, and its pairs are scored again.

    Args:
        directory: Where the parts lie.
        seconds: A process that is killed loses the pairs of at most so long.

    Raises:
        UserInputError: If the disk is full, when a part is written.
    """

    def __init__(self, directory: str | Path, seconds: float = 10.0) -> None:
        self.directory, self.seconds = Path(directory), seconds
        self._scores: dict[str, float] = {}
        self._new: list[tuple[str, float]] = []
        self._written = time.monotonic()
        for path in sorted(self.directory.glob("part-*.npy")):
            try:
                part = np.load(path, allow_pickle=False)
                if part.dtype != _PAIR:
                    raise ValueError(f"holds {part.dtype}")
            except (OSError, ValueError, EOFError) as error:
                log.warning("scores in %s cannot be read (%s); their pairs are scored again", path, error)
                continue
            self._scores.update(zip(np.char.decode(part["key"]).tolist(), part["score"].tolist(), strict=True))

    def __len__(self) -> int:
        return len(self._scores)

    def get(self, key: str) -> float | None:
        """The score of a pair, ``None`` if it has none."""
        return self._scores.get(key)

    def add(self, keys: Sequence[str], scores: Sequence[float]) -> None:
        """Keep scores, and write them if the last part is older than :attr:`seconds`."""
        new = [(key, float(np.float32(score))) for key, score in zip(keys, scores, strict=True)]
        self._scores.update(new)
        self._new += new
        if time.monotonic() - self._written >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write what is new as a part."""
        self._written = time.monotonic()
        if not self._new:
            return
        file = io.BytesIO()  # into a file on a full disk, np.save may leave out the end without an error
        np.save(file, np.array([(key.encode(), score) for key, score in self._new], _PAIR))
        with resumable(self.directory):
            write_atomically(self.directory / f"part-{time.time_ns():020d}-{secrets.token_hex(4)}.npy", file.getvalue())
        self._new = []

    def __enter__(self) -> ScoreStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.flush()
