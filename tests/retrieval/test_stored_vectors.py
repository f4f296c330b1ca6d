"""Vectors on disk read as the matrix that was written, and a file that is not whole is never read."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.retrieval.vectors import Vectors, open_part

ROWS, DIM = 23, 5
MATRIX = np.random.default_rng(0).normal(size=(ROWS, DIM))


def write(folder: Path, part_rows: int, dtype: str = "<f2") -> tuple[Vectors, torch.Tensor]:
    matrix = MATRIX.astype(dtype)
    paths = []
    for start in range(0, ROWS, part_rows):
        paths.append(folder / f"part-{start:05d}.npy")
        np.save(paths[-1], matrix[start : start + part_rows])
    return Vectors(paths, DIM), torch.from_numpy(matrix)


@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
@pytest.mark.parametrize("part_rows", [1, 7, ROWS, 100])
def test_every_range_of_rows_reads_as_a_slice_of_the_matrix(tmp_path: Path, part_rows: int, dtype: str) -> None:
    vectors, matrix = write(tmp_path, part_rows, dtype)
    assert (len(vectors), vectors.shape, vectors.dim, vectors.dtype) == (ROWS, (ROWS, DIM), DIM, matrix.dtype)
    for start, stop in itertools.combinations_with_replacement(range(ROWS + 3), 2):
        assert torch.equal(vectors.read(start, stop), matrix[start:stop]), (start, stop)


@pytest.mark.parametrize("gap", [0, 1, 64])
def test_single_rows_read_as_those_of_the_matrix(tmp_path: Path, gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mmembed.retrieval.vectors._GAP", gap)
    vectors, matrix = write(tmp_path, 7)
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, 2, 5, ROWS):
        wanted = torch.randperm(ROWS, generator=generator)[:count].sort().values
        assert torch.equal(vectors.rows(wanted), matrix[wanted])


class Noted(Vectors):
    """Notes how many rows each read took."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        self.lengths = [*getattr(self, "lengths", []), stop - start]
        return super().read(start, stop)


def test_single_rows_take_one_read_where_they_lie_close_together_but_never_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_mmembed.retrieval.vectors._PIECE", 7 * DIM * 2)
    write(tmp_path, 10)
    vectors = Noted(sorted(tmp_path.glob("*.npy")), DIM)
    vectors.rows(torch.arange(0, ROWS, 2))
    assert vectors.lengths == [7, 5, 7, 1]
    vectors.lengths = []
    copy = torch.empty(15, DIM)
    vectors.copy_to(copy, 3)
    assert torch.equal(copy, vectors.read(3, 18).float())
    assert vectors.lengths == [7, 7, 1, 15]


def test_a_matrix_without_parts_has_a_dimension() -> None:
    assert Vectors([], 8).read(0, 3).shape == (0, 8)
    assert Vectors([], 8).shape == (0, 8)


def test_headers_of_the_second_version_are_read(tmp_path: Path) -> None:
    with open(tmp_path / "part.npy", "wb") as file:
        np.lib.format.write_array(file, MATRIX.astype(np.float32), version=(2, 0))
    assert torch.equal(Vectors([tmp_path / "part.npy"], DIM).read(0, ROWS), torch.from_numpy(MATRIX).float())


@pytest.mark.parametrize("left", [0, 5, 60, 128, 129, -DIM * 2, -1])
def test_a_file_that_is_cut_short_anywhere_is_refused_with_its_name(tmp_path: Path, left: int) -> None:
    write(tmp_path, 100)
    (path,) = tmp_path.glob("*.npy")
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserInputError, match=r"part-00000.npy holds no vectors: .* delete it and run again"):
        open_part(path)


@pytest.mark.parametrize(
    "content",
    [
        MATRIX,
        MATRIX.astype(">f4"),
        MATRIX[0].astype(np.float32),
        np.asfortranarray(MATRIX.astype(np.float32)),
        np.array([{"a": 1}], dtype=object),
    ],
    ids=["double precision", "big-endian", "one row without the other axis", "by column", "a pickle"],
)
def test_a_file_of_anything_else_is_refused_with_its_name(tmp_path: Path, content: np.ndarray) -> None:
    np.save(tmp_path / "part.npy", content, allow_pickle=True)
    with pytest.raises(UserInputError, match=r"part.npy holds no vectors"):
        open_part(tmp_path / "part.npy")


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"gone.npy holds no vectors: .*No such file"):
        Vectors([tmp_path / "gone.npy"], DIM)


def test_parts_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    for name, shape, dtype in (("1", (4, 2), "<f4"), ("2", (3, 2), "<f4"), ("3", (4, 3), "<f4"), ("4", (4, 2), "<f2")):
        np.save(tmp_path / f"{name}.npy", np.zeros(shape, dtype))
    paths = {name: tmp_path / f"{name}.npy" for name in "1234"}
    assert len(Vectors([paths["1"], paths["2"]], 2)) == 7
    for names, dim, match in (
        ("3", 2, "3.npy holds float32 of 3 dimensions, and not float32 of 2"),
        ("13", 2, "3.npy holds float32 of 3 dimensions, and not float32 of 2"),
        ("14", 2, "4.npy holds float16 of 2 dimensions, and not float32 of 2"),
        ("21", 2, r"have \[3, 4\] rows"),
        ("121", 2, r"have \[4, 3, 4\] rows"),
    ):
        with pytest.raises(UserInputError, match=match):
            Vectors([paths[name] for name in names], dim)


def test_a_file_that_becomes_shorter_after_it_was_opened_is_named(tmp_path: Path) -> None:
    vectors, _ = write(tmp_path, 100)
    (path,) = tmp_path.glob("*.npy")
    path.write_bytes(path.read_bytes()[:-1])
    assert vectors.read(0, ROWS - 1).shape == (ROWS - 1, DIM)
    with pytest.raises(UserInputError, match=r"part-00000.npy has become shorter"):
        vectors.read(0, ROWS)
