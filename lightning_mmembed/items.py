"""Items, queries, candidates and tasks: the words that the whole package is written in."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from PIL import Image

from lightning_mmembed.errors import UserInputError

if TYPE_CHECKING:
    from torch import Tensor


class Modality(str, enum.Enum):
    """What an item is made of, in M-BEIR's spelling.

    Example:
        >>> Modality.parse("text,image")
        <Modality.IMAGE_TEXT: 'image,text'>
    """

    TEXT = "text"
    IMAGE = "image"
    IMAGE_TEXT = "image,text"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def parse(cls, value: object) -> Modality:
        """Read a modality as it stands in a file; ``text,image`` is taken as an alias of ``image,text``.

        Raises:
            UserInputError: If ``value`` is no modality.
        """
        text = "image,text" if value == "text,image" else value
        try:
            return cls(text)
        except ValueError:
            known = ", ".join(repr(m.value) for m in cls)
            raise UserInputError(f"modality={value!r} is unknown; write one of {known}") from None

    @property
    def code(self) -> int:
        """Position in ``list(Modality)``: the integer that index files and tensors hold."""
        return list(Modality).index(self)


#: The modalities (query, wanted candidate) of M-BEIR's task ids; id 5 is unused by the benchmark.
TASK_MODALITIES: dict[int, tuple[Modality, Modality]] = {
    0: (Modality.TEXT, Modality.IMAGE),
    1: (Modality.TEXT, Modality.TEXT),
    2: (Modality.TEXT, Modality.IMAGE_TEXT),
    3: (Modality.IMAGE, Modality.TEXT),
    4: (Modality.IMAGE, Modality.IMAGE),
    5: (Modality.IMAGE, Modality.IMAGE_TEXT),
    6: (Modality.IMAGE_TEXT, Modality.TEXT),
    7: (Modality.IMAGE_TEXT, Modality.IMAGE),
    8: (Modality.IMAGE_TEXT, Modality.IMAGE_TEXT),
}

#: Order of the 16 (dataset, task) pairs in every published M-BEIR table.
MBEIR_TASKS: tuple[str, ...] = (
    "visualnews_task0",
    "mscoco_task0",
    "fashion200k_task0",
    "webqa_task1",
    "edis_task2",
    "webqa_task2",
    "visualnews_task3",
    "mscoco_task3",
    "fashion200k_task3",
    "nights_task4",
    "oven_task6",
    "infoseek_task6",
    "fashioniq_task7",
    "cirr_task7",
    "oven_task8",
    "infoseek_task8",
)


@dataclass(frozen=True, order=True)
class Task:
    """A (dataset, task id) pair.

    Example:
        >>> task = Task("mscoco", 0)
        >>> task.name, str(task.target_modality)
        ('mscoco_task0', 'image')
    """

    dataset: str
    task_id: int

    def __post_init__(self) -> None:
        if self.task_id not in TASK_MODALITIES:
            raise UserInputError(f"task_id={self.task_id!r} of dataset {self.dataset!r} is unknown; use 0 to 8")

    @property
    def name(self) -> str:
        """``{dataset}_task{id}``, as the files and tables say."""
        return f"{self.dataset}_task{self.task_id}"

    @property
    def target_modality(self) -> Modality:
        """The modality that the instructions of this task ask for."""
        return TASK_MODALITIES[self.task_id][1]

    @classmethod
    def parse(cls, name: str) -> Task:
        """The inverse of :attr:`name`."""
        dataset, separator, number = name.rpartition("_task")
        if not separator or not number.isdigit():
            raise UserInputError(f"task={name!r} is no task name; write it as 'mscoco_task0'")
        return cls(dataset, int(number))


def task_order(name: str) -> tuple[int, str]:
    """Sort key: M-BEIR's canonical order first, tasks of other datasets after it by name."""
    return (MBEIR_TASKS.index(name), name) if name in MBEIR_TASKS else (len(MBEIR_TASKS), name)


_ID_BASE = 10**10

#: One encoded id, or a tensor of them.
Codes = TypeVar("Codes", int, "Tensor")


def encode_id(name: str) -> int:
    """The integer of a ``did`` or ``qid``: ``dataset id * 10**10 + number``, in the canonical order of ties.

    Example:
        >>> sorted(["9:10", "9:9", "0:12"], key=encode_id)
        ['0:12', '9:9', '9:10']

    Raises:
        UserInputError: If the id is not two integers joined by a colon.
    """
    dataset, _, number = str(name).partition(":")
    in_range = (
        dataset.isdecimal() and number.isdecimal() and int(dataset) < 2**63 // _ID_BASE and int(number) < _ID_BASE
    )
    if not in_range:
        raise UserInputError(f"id={name!r} is malformed; write '<dataset id>:<number>', such as '9:24809'")
    return int(dataset) * _ID_BASE + int(number)


def dataset_number(code: Codes) -> Codes:
    """The dataset id of an encoded id, or of each of a tensor.

    Example:
        >>> dataset_number(encode_id("9:24809"))
        9
    """
    return code // _ID_BASE


def decode_id(code: int) -> str:
    """The inverse of :func:`encode_id`.

    Example:
        >>> decode_id(encode_id("9:24809"))
        '9:24809'
    """
    return f"{code // _ID_BASE}:{code % _ID_BASE}"


@dataclass(frozen=True)
class Item:
    """A text, an image, or an image with a text.

    Args:
        text: The text; ``None`` and ``""`` are the same to the encoder.
        image: A decoded picture, or the bytes of a picture file, decoded when the item is encoded.
    """

    text: str | None = None
    image: Image.Image | bytes | None = None

    @property
    def modality(self) -> Modality:
        """What the item is made of."""
        if self.image is None:
            return Modality.TEXT
        return Modality.IMAGE_TEXT if self.text else Modality.IMAGE


@dataclass(frozen=True)
class Query:
    """An item with the instruction that says what to find.

    Args:
        item: What is asked.
        instruction: The sentence that says what, and so which modality, is wanted.
        qid: ``"<dataset id>:<number>"``, unique within a split.
        task: The task that the query belongs to.
        positives: ``did`` of every labelled positive.
    """

    item: Item
    instruction: str | None = None
    qid: str = ""
    task: Task | None = None
    positives: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Candidate:
    """An item of a pool, keyed by its ``did`` (``"<dataset id>:<number>"``)."""

    item: Item
    did: str = ""
