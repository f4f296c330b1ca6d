"""A small dataset in M-BEIR's layout, drawn with Pillow: pets in four tasks, with every kind of query."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_mmembed import Candidate, MLLMEncoder, Query, RetrievalModule

COLOURS = ("red", "green", "blue", "gold", "purple", "gray")
SHAPES = ("ellipse", "rectangle", "triangle")
TRAIN_LOOKS = [(colour, shape) for shape in SHAPES[:2] for colour in COLOURS]
EVAL_LOOKS = [(colour, "triangle") for colour in COLOURS]

#: Small enough that an encoder of it runs in milliseconds.
ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 64,
    "vision_hidden_size": 32,
    "vision_layers": 2,
    "image_size": 32,
    "patch_size": 16,
    "vocab_size": 400,
}

PROMPTS = {
    ("text", "image"): ("Find the picture of this pet.", "Which picture shows it?", "Show me the pet"),
    ("image", "text"): ("Find the caption of this picture.", "Which words fit?", "Tell me what it shows"),
    ("image,text", "image"): ("Find the pet changed as told.", "Which picture is it after the change?", "Change it"),
    ("text", "text"): ("Find the answer to the question.", "Which sentence answers?", "Answer me"),
}


def write_lines(path: Path, records: Iterable[dict[str, Any] | str]) -> Path:
    """Write a JSON-lines file; a text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw_pet(path: Path, colour: str, shape: str) -> None:
    """A shape of a colour on a canvas that is wider than high; PNG pictures get a half-transparent corner."""
    mode = "RGBA" if path.suffix == ".png" else "RGB"
    image = Image.new(mode, (48, 36), "white")
    draw = ImageDraw.Draw(image)
    if shape == "triangle":
        draw.polygon([(24, 4), (44, 32), (4, 32)], fill=colour)
    else:
        getattr(draw, shape)((6, 6, 42, 30), fill=colour)
    if mode == "RGBA":
        draw.rectangle((0, 0, 5, 5), fill=(255, 0, 0, 100))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_pets(root: str | Path, name: str = "pets", dataset_id: int = 77, global_train_pool: bool = True) -> Path:
    """Write the dataset; returns ``root``.

    Args:
        root: Where to write.
        name: Of the dataset.
        dataset_id: First part of its ids.
        global_train_pool: Write a training pool; without it the local pools are all there is.
    """
    root = Path(root)
    sides = {
        "train": _side(root, name, dataset_id, TRAIN_LOOKS, 0),
        "eval": _side(root, name, dataset_id, EVAL_LOOKS, 50),
    }
    pools = root / "cand_pool"
    for task in (0, 1, 3, 7):
        modality = "image" if task in (0, 7) else "text"
        kept = [c for c in sides["eval"]["pool"] if c["modality"] == modality and (task != 1 or "answer" in c["txt"])]
        if task == 3:  # a pool for each split; the one of val lacks the positives of a query
            write_lines(pools / "local" / f"mbeir_{name}_task{task}_val_cand_pool.jsonl", kept[:14])
            write_lines(pools / "local" / f"mbeir_{name}_task{task}_test_cand_pool.jsonl", kept)
        else:
            write_lines(pools / "local" / f"mbeir_{name}_task{task}_cand_pool.jsonl", kept)
    if global_train_pool:
        write_lines(pools / "global" / f"mbeir_{name}_train_cand_pool.jsonl", sides["train"]["pool"])
    for split in ("train", "val", "test") if global_train_pool else ("val", "test"):
        _write_split(root, name, split, sides["train" if split == "train" else "eval"]["queries"])
    if not global_train_pool:
        _write_split(root, name, "train", sides["eval"]["queries"])
    header = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\tprompt_3"
    rows = ["\t".join([*kinds, name, str(dataset_id), *prompts]) for kinds, prompts in PROMPTS.items()]
    instructions = root / "instructions" / "query_instructions.tsv"
    instructions.parent.mkdir(parents=True, exist_ok=True)
    instructions.write_text("\n".join([header, *rows]) + "\n")
    return root


def _write_split(root: Path, name: str, split: str, queries: list[dict[str, Any]]) -> None:
    # Val and test ask the same things in other words, so that what is learned for one is seen in the other.
    written = [
        {**query, "query_txt": f"{query['query_txt']} please"} if split == "val" and query["query_txt"] else query
        for query in queries
    ]
    write_lines(root / "query" / split / f"mbeir_{name}_{split}.jsonl", written)
    qrels = [f"{q['qid']} 0 {did} 1 {q['task_id']}" for q in written for did in q["pos_cand_list"]]
    write_lines(root / "qrels" / split / f"mbeir_{name}_{split}_qrels.txt", qrels)


def _side(root: Path, name: str, dataset_id: int, looks: list[tuple[str, str]], first: int) -> dict[str, Any]:
    """The candidates and the queries of one half: per look a picture, a caption, an answer and a query of each task."""
    pool, queries = [], []
    for number, (colour, shape) in enumerate(looks, first):
        image = f"mbeir_images/{name}_images/{number}{'.png' if number % 2 else '.jpg'}"
        draw_pet(root / image, colour, shape)
        did = {kind: f"{dataset_id}:{1000 * (place + 1) + number}" for place, kind in enumerate(("i", "t", "a", "t2"))}
        pool += [
            {"did": did["i"], "modality": "image", "txt": None, "img_path": image, "src_content": "{}"},
            {"did": did["t"], "modality": "text", "txt": f"a {colour} {shape}", "img_path": None, "src_content": "{}"},
            {"did": did["a"], "modality": "text", "txt": f"the answer is {colour}, {shape}", "img_path": None},
            {"did": did["t2"], "modality": "text", "txt": f"one more {shape} in {colour}", "img_path": None},
        ]
        other = looks[(number - first + 1) % len(looks)][0]
        for task, modality, text, positives in (
            (0, "text", f"a pet that is {colour} and {shape}", [did["i"]]),
            (3, "image", None, [did["t"], did["t2"]]),  # more than one positive
            (
                7,
                "image,text",
                f"{other} in place of {colour}",
                [f"{dataset_id}:{1000 + first + (number - first + 1) % len(looks)}"],
            ),
            (1, "text", f"which {shape} has the colour {colour}?", [did["a"]]),
        ):
            queries.append(
                {
                    "qid": f"{dataset_id}:{task * 100 + number}",
                    "query_txt": text,
                    "query_img_path": image if modality != "text" else None,
                    "query_modality": modality,
                    "query_src_content": None,
                    "pos_cand_list": positives,
                    "neg_cand_list": [],
                    "task_id": task,
                }
            )
    return {"pool": pool, "queries": queries}


def tiny_module(checkpoint: Path, lr: float = 3e-3, **encoder: Any) -> RetrievalModule:
    """A module over the tiny checkpoint, with a learning rate at which it learns in a few steps."""
    from lightning_mmembed import MLLMEncoder, RetrievalModule

    loaded = MLLMEncoder.from_pretrained(checkpoint, max_length=48, **encoder)
    return RetrievalModule(loaded, optimizer=partial(torch.optim.AdamW, lr=lr))


def tiny_trainer(directory: Path, **arguments: Any) -> Trainer:
    """A quiet Trainer on the CPU that writes below a directory."""
    from lightning.pytorch import Trainer

    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "reload_dataloaders_every_n_epochs": 1,
        "log_every_n_steps": 1,
    }
    return Trainer(default_root_dir=directory, **{**defaults, **arguments})


def ranking(encoder: MLLMEncoder, queries: Iterable[Query], pool: Iterable[Candidate]) -> list[list[Candidate]]:
    """The whole pool for each query, best first, ties by id: a full sort of every score."""
    from lightning_mmembed.items import encode_id

    candidates = sorted(pool, key=lambda candidate: encode_id(candidate.did))
    scores = (encoder.encode(list(queries)) @ encoder.encode([c.item for c in candidates]).T).numpy()
    return [[candidates[i] for i in np.argsort(-row, kind="stable")] for row in scores]


class Entries(Sequence["Candidate"]):
    """Candidates that note which of them were read, and end the run at one of them."""

    def __init__(self, entries: Sequence[Candidate], fatal: int | None = None) -> None:
        self.entries, self.fatal, self.read = list(entries), fatal, []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: Any) -> Any:
        if index == self.fatal:
            raise KeyboardInterrupt
        self.read.append(index)
        return self.entries[index]

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self.entries)
