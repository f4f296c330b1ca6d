"""The published figures agree with themselves, with the printed averages and with each other."""

from __future__ import annotations

import pytest

from lightning_mmembed.items import MBEIR_TASKS
from lightning_mmembed.retrieval.compare import ComparedRun
from lightning_mmembed.retrieval.published import PUBLISHED

SYSTEMS = {(run.pool, run.name): run for run in PUBLISHED}
WHOLE = [run for run in PUBLISHED if "oven_task8" in run.values]
# Task ids 0 to 4 have queries of one modality, 6 to 8 of an image and a text.
GROUPS = {"average": "012345678", "single_modal": "01234", "multi_modal": "678"}

# Percent, as the sources print them: all tasks, queries of one modality, queries of an image and a text.
PRINTED = {
    ("union", "BLIP2 zero-shot"): (5.9,),
    ("union", "multi-task CLIP_SF"): (36.1,),
    ("union", "multi-task BLIP_FF 384"): (36.5,),
    ("union", "UniIR CLIP_SF"): (48.9,),
    ("union", "UniIR CLIP_FF"): (43.3,),
    ("union", "UniIR BLIP_SF"): (42.7,),
    ("union", "UniIR BLIP_FF"): (45.5,),
    ("union", "CLIP_SF rerun"): (47.51,),
    ("union", "BLIP_FF rerun"): (44.33,),
    ("union", "MM-Embed"): (52.7, 56.1, 47.0),
    ("union", "M^hard (NV-Embed)"): (52.3, 56.4, 45.5),
    ("union", "CLIP_SF of MM-Embed"): (48.3, 53.5, 39.5),
    ("union", "U-MARVEL"): (60.7,),
    ("local", "UniIR CLIP_SF"): (50.6,),
    ("local", "UniIR BLIP_FF"): (46.8,),
    ("local", "CLIP_SF rerun"): (50.18,),
    ("local", "BLIP_FF rerun"): (46.45,),
    ("local", "U-MARVEL"): (63.2,),
}


@pytest.mark.parametrize("run", WHOLE, ids=lambda run: f"{run.pool}: {run.name}")
def test_the_averages_of_a_system_are_those_of_its_16_tasks(run: ComparedRun) -> None:
    assert run.values.keys() == {*MBEIR_TASKS, *GROUPS}
    for group, ids in GROUPS.items():
        shares = [run.values[task] for task in MBEIR_TASKS if task[-1] in ids]
        # Printed averages are rounded to 0.1 points, like the values that they are made of.
        assert run.values[group] == pytest.approx(sum(shares) / len(shares), abs=0.0006)


@pytest.mark.parametrize("system", PRINTED, ids=": ".join)
def test_the_averages_are_the_printed_ones(system: tuple[str, str]) -> None:
    for group, figure in zip(GROUPS, PRINTED[system], strict=False):
        assert SYSTEMS[system].values[group] == pytest.approx(figure / 100, abs=6e-5)


@pytest.mark.parametrize("pool", ["union", "local"])
@pytest.mark.parametrize("model", ["CLIP_SF", "BLIP_FF"])
def test_a_rerun_stays_near_its_paper_on_every_task(pool: str, model: str) -> None:
    paper, rerun = SYSTEMS[pool, f"UniIR {model}"].values, SYSTEMS[pool, f"{model} rerun"].values
    assert all(abs(paper[task] - rerun[task]) < 0.09 for task in MBEIR_TASKS)


@pytest.mark.parametrize(
    ("pool", "name", "task", "percent"),
    [
        ("union", "UniIR CLIP_SF", "mscoco_task0", 77.9),
        ("union", "MM-Embed", "infoseek_task6", 42.3),
        ("union", "MM-Embed", "infoseek_task8", 57.7),
        ("union", "multi-task BLIP_FF", "nights_task4", 31.3),
        ("local", "SigLIP zero-shot", "fashion200k_task0", 36.5),
        ("local", "CLIP_SF rerun", "oven_task8", 68.88),
    ],
)
def test_a_figure_stands_at_its_task(pool: str, name: str, task: str, percent: float) -> None:
    assert SYSTEMS[pool, name].values[task] == pytest.approx(percent / 100)


def test_every_system_is_named_once_per_pool_with_a_source_that_names_the_pool() -> None:
    assert len(SYSTEMS) == len(PUBLISHED)
    for run in PUBLISHED:
        assert f"{run.pool} pool" in run.source
        assert all(0 <= share <= 1 for share in run.values.values())
