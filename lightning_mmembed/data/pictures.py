"""Where the pictures of a source are read: its folder, or the split archive as one stream."""

from __future__ import annotations

import errno
import glob
import gzip
import io
import logging
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lightning_mmembed.data.layout import MBEIRLayout
from lightning_mmembed.errors import UserInputError

log = logging.getLogger(__name__)

#: The number of a part, as M-BEIR names them.
_PART = re.compile(r"\.part-(\d+)$")

#: A picture's path in the source, and its bytes; None where it is missing.
Picture = tuple[str, bytes | None]


def archive_parts(layout: MBEIRLayout, archive: str | None) -> list[Path]:
    """The parts of the picture archive in order; none if pictures are read from the folder.

    Parts that all end in ``.part-<number>`` go by their numbers, others by their names. Of an archive that lies beside
    its own parts, the larger of the two is read.

    Args:
        layout: The source.
        archive: The archive, or a pattern of its parts; by default :func:`archive_beside` where the folder
            ``mbeir_images`` is absent.

    Raises:
        UserInputError: If there is no such file, or a part is missing.
    """
    if archive is None:
        parts = [] if (layout.source / "mbeir_images").is_dir() else archive_beside(layout)
    else:
        parts = sorted(Path(name) for name in glob.glob(archive))
        if not parts:
            raise UserInputError(f"archive={archive!r} matches no file; give the archive or a pattern of its parts")
    parts = _one_of(parts)
    numbers = [int(match[1]) for part in parts if (match := _PART.search(part.name))]
    if len(numbers) == len(parts):  # part-100 comes after part-99
        parts = [part for _, part in sorted(zip(numbers, parts, strict=True))]
    missing = sorted(set(range(max(numbers, default=-1) + 1)) - set(numbers))
    if missing:
        names = ", ".join(f"part-{number:02d}" for number in missing)
        raise UserInputError(f"{parts[0].parent}: {names} of the archive is missing; fetch it, then run this again")
    return parts


def archive_beside(layout: MBEIRLayout) -> list[Path]:
    """The picture archive in a source, whole or as parts, under the names that M-BEIR gives them."""
    name = re.compile(r"mbeir_images\.tar\.gz(\.part-[0-9a-z]+)?")
    return sorted(path for path in layout.source.glob("mbeir_images.tar.gz*") if name.fullmatch(path.name))


def _one_of(paths: list[Path]) -> list[Path]:
    """The archive or its parts, whichever is larger, where both are there: one after the other would be read twice."""
    for whole in paths:
        parts = [path for path in paths if path.name.startswith(f"{whole.name}.part-")]
        if parts:
            sizes = [sum(path.stat().st_size for path in some) for some in ([whole], parts)]
            chosen, other = ([whole], parts) if sizes[0] >= sizes[1] else (parts, [whole])
            log.warning("%s is read and not %s, which holds the same", chosen[0], other[0])
            return chosen
    return paths


def stream_archive(parts: list[Path]) -> Iterator[tuple[str, bytes]]:
    """Read the files of an archive that is cut into parts, as one stream, without extracting it.

    Raises:
        UserInputError: If a part is cut short or damaged.
    """
    count = 0
    with io.BufferedReader(_Concatenated(parts), 1 << 20) as stream:
        packed = stream.peek(2)[:2] == b"\x1f\x8b"
        source = gzip.GzipFile(fileobj=stream) if packed else stream
        try:
            for picture in _members(source):
                yield picture
                count += 1
            while source.read(1 << 20):  # the end, where gzip keeps its checksum
                pass
        except (EOFError, tarfile.TarError, zlib.error, gzip.BadGzipFile) as error:
            sizes = ", ".join(f"{part.name} ({part.stat().st_size:,} bytes)" for part in parts)
            raise UserInputError(
                f"the archive ends or breaks after {count:,} files ({error}): a part is missing or cut short. Here are "
                f"{sizes}. Fetch what is missing and run this again"
            ) from error


def _members(source: gzip.GzipFile | io.BufferedReader[_Concatenated]) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each file of a tar stream."""
    with tarfile.open(fileobj=source, mode="r|") as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                data = file.read()
                if len(data) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
                yield member.name.removeprefix("./"), data
            tar.members.clear()  # type: ignore[attr-defined]  # it would remember every member


class _Concatenated(io.RawIOBase):
    """Files read one after the other."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = list(paths)
        self._file: io.BufferedReader | None = None

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer, over the ends of files: a reader takes a read that comes short for all there is to see."""
        count = 0
        while count < len(buffer):
            if self._file is None:
                if not self._paths:
                    break
                self._file = open(self._paths.pop(0), "rb")  # noqa: SIM115 - closed at its end
            read = self._file.readinto(buffer[count:])
            if not read:
                self._file.close()
                self._file = None
            count += read
        return count


def extracted_picture(source: Path, name: str) -> bytes | None:
    """The bytes of a picture in a source's folder; None where it is missing."""
    path = source / name
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # then there is no such file
            return None
        raise


def picture_problem(data: bytes | None) -> str | None:
    """Why a picture cannot be used, or None."""
    if data is None:
        return "is missing"
    try:
        with Image.open(io.BytesIO(data)) as image:
            # Every byte is read, so a cut picture is found, but most of a JPEG's arithmetic is left out.
            image.draft(image.mode, (1, 1))
            image.load()
    except UnidentifiedImageError:  # its message names an object in memory
        return "cannot be decoded (no known picture format)"
    except Exception as error:  # PIL raises many kinds of errors on broken files
        return f"cannot be decoded ({error})"
    return None
