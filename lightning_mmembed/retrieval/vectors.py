"""A matrix of vectors on disk, of which a few rows at a time are read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_mmembed.errors import UserInputError

#: What vectors are stored in: half and single precision, little-endian.
_DTYPES = {np.dtype("<f2"): torch.float16, np.dtype("<f4"): torch.float32}

#: Wanted rows that lie closer together than this are read in one go, with those between them.
_GAP = 64

#: Bytes that are read at a time where they are converted or picked from: what the processor's cache holds.
_PIECE = 2**22


@dataclass(frozen=True)
class Part:
    """A ``.npy`` file that holds a matrix, known by its header.

    Args:
        path: The file.
        rows: Number of rows.
        dim: Number of columns.
        dtype: Type of its numbers.
        offset: Bytes of the header.
    """

    path: Path
    rows: int
    dim: int
    dtype: np.dtype[np.floating]
    offset: int


def open_part(path: str | Path) -> Part:
    """Read the header of a ``.npy`` file and compare it with the size of the file.

    Args:
        path: The file.

    Raises:
        UserInputError: If it is missing, holds anything but a matrix of float16 or float32, or is cut short.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, by_column, dtype = read_header[np.lib.format.read_magic(file)](file)
            offset, size = file.tell(), path.stat().st_size
        if len(shape) != 2 or by_column or dtype not in _DTYPES:
            raise ValueError(f"it holds {dtype} of shape {shape}, not rows of float16 or float32")
        if size != offset + shape[0] * shape[1] * dtype.itemsize:
            raise ValueError(f"its {size} bytes are not what its shape {shape} of {dtype} needs")
    except (OSError, ValueError, KeyError) as error:
        raise UserInputError(
            f"{path} holds no vectors: {error}; delete it and run again, then it is made anew"
        ) from error
    return Part(path, shape[0], shape[1], dtype, offset)


class Vectors:
    """An ``(N, D)`` matrix that lies on disk in part files; nothing of it stays in memory.

    Rows are read from the files, not mapped: pages of a mapped file would count as memory of the process.

    Args:
        paths: The part files in order; all but the last have the same number of rows.
        dim: ``D``, which a matrix without parts could not tell.

    Raises:
        UserInputError: If a part is missing, cut short, or does not fit the others.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "part-00000.npy"
        >>> np.save(path, np.arange(6, dtype=np.float16).reshape(3, 2))
        >>> Vectors([path], 2).read(1, 3).tolist()
        [[2.0, 3.0], [4.0, 5.0]]
    """

    def __init__(self, paths: Sequence[str | Path], dim: int) -> None:
        self._parts = [open_part(path) for path in paths]
        self._part_rows = max(1, self._parts[0].rows) if self._parts else 1
        self.dim = dim
        self.dtype = _DTYPES[self._parts[0].dtype] if self._parts else torch.float32
        for part in self._parts:
            if part.dim != dim or part.dtype != self._parts[0].dtype:
                raise UserInputError(
                    f"{part.path} holds {part.dtype} of {part.dim} dimensions, and not {self._parts[0].dtype} of {dim} "
                    "as the other parts; delete it and run again, then it is made anew"
                )
        if any(part.rows != self._part_rows for part in self._parts[:-1]) or (
            self._parts and self._parts[-1].rows > self._part_rows
        ):
            raise UserInputError(
                f"the parts in {self._parts[0].path.parent} have {[part.rows for part in self._parts]} rows, and all "
                "but the last need the same number; delete the folder and run again"
            )

    def __len__(self) -> int:
        return sum(part.rows for part in self._parts)

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, D)``."""
        return len(self), self.dim

    def read(self, start: int, stop: int) -> Tensor:
        """Read neighbouring rows.

        Args:
            start: First row.
            stop: Row after the last; past the end, as in a slice, it means the end.

        Returns:
            ``(stop - start, D)`` vectors on the CPU, in the stored precision.

        Raises:
            UserInputError: If a file has become shorter since it was opened.
        """
        stop = min(stop, len(self))
        rows = np.empty((max(0, stop - start), self.dim), self._parts[0].dtype if self._parts else np.float32)
        place = start
        while place < stop:
            number, first = divmod(place, self._part_rows)
            count = min(stop - place, self._part_rows - first)
            self._fill(rows[place - start : place - start + count], self._parts[number], first)
            place += count
        return torch.from_numpy(rows)

    def copy_to(self, out: Tensor, start: int) -> None:
        """Read neighbouring rows into a tensor of any precision, without a copy of all of them in the stored one.

        Args:
            out: ``(n, D)``, overwritten.
            start: First row.
        """
        for first in range(0, len(out), self._piece):
            some = out[first : first + self._piece]
            some.copy_(self.read(start + first, start + first + len(some)))

    def rows(self, wanted: Tensor) -> Tensor:
        """Read single rows, in one go where they lie close together.

        Args:
            wanted: ``(R,)`` int64 rows, ascending.

        Returns:
            ``(R, D)`` vectors on the CPU, in the stored precision.
        """
        numbers = wanted.cpu().numpy()
        found = torch.empty(len(numbers), self.dim, dtype=self.dtype)
        far = (np.diff(numbers) > _GAP) | (np.diff(numbers // self._piece) > 0)
        cuts = [0, *(np.flatnonzero(far) + 1).tolist(), len(numbers)]
        for low, high in itertools.pairwise(cuts):
            if low < high:
                run = self.read(int(numbers[low]), int(numbers[high - 1]) + 1)
                found[low:high] = run[numbers[low:high] - numbers[low]]
        return found

    @property
    def _piece(self) -> int:
        """Rows that are read at a time."""
        return max(1, _PIECE // (self.dim * self.dtype.itemsize))

    @staticmethod
    def _fill(rows: np.ndarray, part: Part, first: int) -> None:
        with open(part.path, "rb", buffering=0) as file:
            file.seek(part.offset + first * part.dim * part.dtype.itemsize)
            left = rows.reshape(-1).view(np.uint8).data
            while left:
                count = file.readinto(left)
                if not count:
                    raise UserInputError(
                        f"{part.path} has become shorter while it was read; run again, then it is made anew"
                    )
                left = left[count:]
