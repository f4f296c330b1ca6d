"""Contract 5: the gradient of a step is that of one process which encodes everything at once.

A step of the Trainer in two or three processes, with GradCache or without, is compared with plain torch code on one
process that shares nothing with the module but the encoder.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from contrast_worlds import Gradients, error
from distributed_worlds import in_processes
from parity_cells import DEFECTS, DROPOUT, SIZES, TOKENS, Cell, expected, results, train

TOLERANCE = 1e-5

#: What a defect comes to at least.
DEFECTIVE = 1e-3

NO_YES = (False, True)
CELLS = [Cell(*values) for values in itertools.product(SIZES, TOKENS, NO_YES, NO_YES, NO_YES)]
WITH_DROPOUT = [
    Cell(strategy, passes, checkpointing=checkpointing, dropout=DROPOUT)
    for strategy, passes, checkpointing in itertools.product(SIZES, ("plain", "three-items"), NO_YES)
]

#: Two processes are enough to see that the table holds; the rest of it takes a minute and a half.
QUICK = [
    cell
    for cell in CELLS
    if cell.strategy == "ddp-2" and cell.passes in ("plain", "three-items") and cell.negatives
    if not cell.checkpointing
]


def defective(defect: str, strategy: str) -> Cell:
    """A cell that ought to see a defect."""
    dropout = DROPOUT if defect == "dropout_not_replayed" else 0.0
    return Cell(strategy, "three-items", dropout=dropout, defect=defect)


DEFECTIVE_CELLS = [
    defective(defect, strategy)
    for defect, strategy in itertools.product(DEFECTS, ("ddp-3", "fsdp2-2"))
    if (defect, strategy) != ("no_exchange", "fsdp2-2")  # FSDP2 exchanges the gradients of every pass
]

Trained = Callable[[Cell], "list[dict[str, Any]]"]
Expected = Callable[..., Gradients]


def marked(cells: list[Cell]) -> list[Any]:
    slow = pytest.mark.slow
    return [pytest.param(cell, id=str(cell), marks=() if cell in QUICK else slow) for cell in cells]


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """What each process of a cell has found; the processes of a strategy are started once for all of its cells."""

    @cache
    def directory(strategy: str, kind: str) -> Path:
        cells = [cell for cell in kinds[kind] if cell.strategy == strategy]
        found = tmp_path_factory.mktemp(strategy)
        in_processes(len(SIZES[strategy]), train, cells, tiny_checkpoint, found)
        return found

    rest = [cell for cell in [*CELLS, *WITH_DROPOUT] if cell not in QUICK]
    kinds = {"quick": QUICK, "rest": rest, "defective": DEFECTIVE_CELLS}

    def of(cell: Cell) -> list[dict[str, Any]]:
        kind = next(kind for kind, cells in kinds.items() if cell in cells)
        return results(cell, directory(cell.strategy, kind))

    return of


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Expected:
    @cache
    def of(sizes: tuple[int, ...], negatives: bool, lora: bool) -> Gradients:
        strategy = next(strategy for strategy in SIZES if SIZES[strategy] == sizes)
        return expected(Cell(strategy, "plain", negatives, lora), tiny_checkpoint, [])

    def for_cell(cell: Cell, seeds: list[int]) -> Gradients:
        if cell.dropout:
            return expected(cell, tiny_checkpoint, seeds)
        return of(SIZES[cell.strategy], cell.negatives, cell.lora)

    return for_cell


def errors(cell: Cell, trained: Trained, reference: Expected) -> list[tuple[float, float]]:
    """The error as a whole and the largest one of a weight, in each process."""
    found = trained(cell)
    right = reference(cell, [one["seed"] for one in found])
    return [error(one["gradients"], right) for one in found]


@pytest.mark.parametrize("cell", marked(CELLS))
def test_every_process_has_the_gradient_of_one_that_encodes_everything(
    cell: Cell, trained: Trained, reference: Expected
) -> None:
    found = errors(cell, trained, reference)
    assert max(whole for whole, _ in found) <= TOLERANCE
    assert max(single for _, single in found) <= TOLERANCE


@pytest.mark.parametrize("cell", marked(WITH_DROPOUT))
def test_dropout_is_drawn_once_for_each_item_of_each_process(cell: Cell, trained: Trained, reference: Expected) -> None:
    seeds = [one["seed"] for one in trained(cell)]
    assert len(set(seeds)) == len(seeds)
    assert max(single for _, single in errors(cell, trained, reference)) <= TOLERANCE
    without = reference(Cell(cell.strategy, cell.passes), [])
    assert error(reference(cell, seeds), without)[0] > DEFECTIVE


@pytest.mark.parametrize("cell", marked(DEFECTIVE_CELLS))
def test_the_comparison_sees_a_defect(cell: Cell, trained: Trained, reference: Expected) -> None:
    assert min(whole for whole, _ in errors(cell, trained, reference)) > DEFECTIVE
