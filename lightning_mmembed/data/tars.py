"""Tar files whose members can be read at their offset."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from types import TracebackType


class IndexedTar:
    """Writes a tar file, the same bytes for the same members, and tells where each member's bytes begin."""

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - closed on exit

    def __enter__(self) -> IndexedTar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Closing writes the end of the archive, which needs space that a full disk has not got.
        if error is None:
            self._tar.close()
        elif self._tar.fileobj is not None:
            self._tar.fileobj.close()

    def add(self, name: str, data: bytes) -> int:
        """Add a member; returns the offset of its bytes."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        return self._tar.offset - len(data) - -len(data) % tarfile.BLOCKSIZE
