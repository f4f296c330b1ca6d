"""The words that the package is written in: every spelling that files may hold is read, every other one is refused."""

from __future__ import annotations

import random

import pytest
from PIL import Image

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import MBEIR_TASKS, Item, Modality, Task, decode_id, encode_id, task_order

# What each of the 16 tasks asks for, written out from the table of the M-BEIR paper.
WANTED = {
    "visualnews_task0": "image",
    "mscoco_task0": "image",
    "fashion200k_task0": "image",
    "webqa_task1": "text",
    "edis_task2": "image,text",
    "webqa_task2": "image,text",
    "visualnews_task3": "text",
    "mscoco_task3": "text",
    "fashion200k_task3": "text",
    "nights_task4": "image",
    "oven_task6": "text",
    "infoseek_task6": "text",
    "fashioniq_task7": "image",
    "cirr_task7": "image",
    "oven_task8": "image,text",
    "infoseek_task8": "image,text",
}


@pytest.mark.parametrize("modality", Modality)
def test_a_modality_is_read_from_what_it_is_written_as_and_its_code_is_its_place(modality: Modality) -> None:
    assert Modality.parse(str(modality)) is modality
    assert list(Modality)[modality.code] is modality


@pytest.mark.parametrize("value", ["Text", "image, text", "", "video", None, 0])
def test_an_unknown_modality_is_refused_with_the_known_ones(value: object) -> None:
    with pytest.raises(UserInputError, match=r"is unknown; write one of 'text', 'image', 'image,text'"):
        Modality.parse(value)


def test_every_benchmark_task_asks_for_the_modality_of_the_published_table() -> None:
    assert {name: str(Task.parse(name).target_modality) for name in MBEIR_TASKS} == WANTED


@pytest.mark.parametrize("name", [*MBEIR_TASKS, "my_task_force_task2"])
def test_a_task_is_read_from_its_own_name(name: str) -> None:
    assert Task.parse(name).name == name


@pytest.mark.parametrize("name", ["mscoco", "mscoco_task", "mscoco_taskx", "mscoco_task-1", "mscoco_task9", ""])
def test_a_malformed_task_name_is_refused(name: str) -> None:
    with pytest.raises(UserInputError, match="task"):
        Task.parse(name)


def test_tasks_of_other_datasets_follow_those_of_the_benchmark_by_name() -> None:
    names = ["zoo_task3", *reversed(MBEIR_TASKS), "a_task0"]
    assert sorted(names, key=task_order) == [*MBEIR_TASKS, "a_task0", "zoo_task3"]


def test_encoded_ids_order_as_dataset_then_number_and_decode_to_the_same_id() -> None:
    rng = random.Random(0)
    pairs = [(rng.randrange(12), rng.choice([rng.randrange(20), rng.randrange(10**10)])) for _ in range(500)]
    names = [f"{dataset}:{number}" for dataset, number in pairs]
    assert [decode_id(encode_id(name)) for name in names] == names
    assert sorted(names, key=encode_id) == [f"{dataset}:{number}" for dataset, number in sorted(pairs)]


@pytest.mark.parametrize("name", ["", "9", "9:", ":9", "a:1", "1:a", "9:1:2", "-1:3", "9:-3", "9: 3", "9:10000000000"])
def test_a_malformed_id_is_refused_with_an_example(name: str) -> None:
    with pytest.raises(UserInputError, match=r"is malformed; write '<dataset id>:<number>'"):
        encode_id(name)


@pytest.mark.parametrize(
    ("text", "has_image", "modality"),
    [
        ("a", False, Modality.TEXT),
        (None, False, Modality.TEXT),
        ("", True, Modality.IMAGE),
        (None, True, Modality.IMAGE),
        ("a", True, Modality.IMAGE_TEXT),
    ],
)
def test_the_modality_of_an_item_is_what_it_holds(text: str | None, has_image: bool, modality: Modality) -> None:
    assert Item(text, Image.new("RGB", (1, 1)) if has_image else None).modality is modality
