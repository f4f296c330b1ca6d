"""Writes the benchmark as a tree in M-BEIR's published layout, and its text-to-text set as a folder in BEIR's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.progress import track

from lightning_mmembed.data.mini.draw import draw_look, encode
from lightning_mmembed.data.mini.prompts import PROMPTS
from lightning_mmembed.data.mini.records import Collector
from lightning_mmembed.data.mini.tasks import collect
from lightning_mmembed.data.mini.texts import TEXT_VERSION, questions_and_passages
from lightning_mmembed.data.mini.world import DATASET_IDS, seeded
from lightning_mmembed.data.shard import shard_dataset
from lightning_mmembed.data.sources import open_layout
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import building_directory, locked
from lightning_mmembed.items import MBEIR_TASKS, TASK_MODALITIES, Task, encode_id

#: Raised whenever the same seed starts to give other bytes.
GENERATOR_VERSION = 1
_GENERATOR = "lightning_mmembed.data.mini"
_MARKER = "generated.json"


def generate_mini(out: str | Path, seed: int = 0) -> Path:
    """Write the built-in benchmark to ``out``, or return at once if it stands there already.

    The tree is written beside ``out`` and renamed when complete, so a half-written one is never seen. A tree of
    another seed or version is replaced.

    Args:
        out: Root of the tree.
        seed: Decides everything: the same seed gives the same bytes.

    Returns:
        ``out`` as a path.

    Raises:
        UserInputError: If ``out`` holds something that this function did not write.
    """
    made_of = {"generator": _GENERATOR, "version": GENERATOR_VERSION, "seed": seed}
    return _generate(Path(out), made_of, lambda tree: _write_tree(tree, collect(seed), seed))


def generate_mini_text(out: str | Path, seed: int = 0) -> Path:
    """Write the text-to-text set of the drawn world to ``out`` in BEIR's layout, or return at once if it stands there.

    Passages on two things each, and questions on them; see :mod:`lightning_mmembed.data.mini.texts`. Each question is
    answered by one passage. Nothing that validation and test ask about is in a passage that training asks for.

    Args:
        out: The folder.
        seed: Decides everything: the same seed gives the same bytes.

    Returns:
        ``out`` as a path.

    Raises:
        UserInputError: If ``out`` holds something that this function did not write.
    """
    made_of = {"generator": f"{_GENERATOR}.texts", "version": TEXT_VERSION, "seed": seed}
    return _generate(Path(out), made_of, lambda tree: _write_texts(tree, seed))


def shards_of(source: str | Path, out: str | Path, **settings: Any) -> Path:
    """The shards of a folder in M-BEIR's or BEIR's layout, made if they are absent or stale.

    What several folders need in a configuration that reads them as one.

    Args:
        source: The folder.
        out: Folder of the shards.
        **settings: Of texts, see :class:`~lightning_mmembed.data.texts.TextLayout`.

    Returns:
        ``out``.
    """
    return shard_dataset(open_layout(source, **settings), out)


def _generate(out: Path, made_of: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    with locked(out):
        if not _stands(out, made_of):
            with building_directory(out) as tree:
                write(tree)
                files = sum(path.is_file() for path in tree.rglob("*"))
                _write_text(tree / _MARKER, json.dumps({**made_of, "files": files}, indent=2) + "\n")
    return out


def _stands(out: Path, made_of: Mapping[str, Any]) -> bool:
    """Whether ``out`` is the complete tree asked for; an older or damaged tree of ours may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / _MARKER).read_text(encoding="utf-8"))
        ours = found["generator"] == made_of["generator"]
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserInputError(
            f"out={str(out)!r} holds something that the built-in benchmark did not write; "
            "delete it or choose another directory"
        )
    if any(found.get(key) != value for key, value in made_of.items()):
        return False
    return bool(found.get("files") == sum(path.is_file() for path in out.rglob("*")) - 1)


def _write_tree(root: Path, collector: Collector, seed: int) -> None:
    _write_queries(root, collector)
    _write_pools(root, collector)
    _write_instructions(root / "instructions" / "query_instructions.tsv")
    for folder in sorted({path.rpartition("/")[0] for path in collector.pictures}):
        (root / folder).mkdir(parents=True)
    for path, (domain, look) in track(collector.pictures.items(), "Drawing the built-in benchmark", transient=True):
        picture = draw_look(domain, look, seeded(seed, "picture", path))
        (root / path).write_bytes(encode(picture))


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    _write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def _write_texts(root: Path, seed: int) -> None:
    passages, questions, judged = questions_and_passages(seed)
    _write_lines(root / "corpus.jsonl", passages)
    _write_lines(root / "queries.jsonl", questions)
    for split, lines in judged.items():
        rows = ["query-id\tcorpus-id\tscore\n", *(f"{query}\t{passage}\t1\n" for query, passage in lines)]
        _write_text(root / "qrels" / f"{split}.tsv", "".join(rows))


def _write_queries(root: Path, collector: Collector) -> None:
    """Queries and relevance files: by task for evaluation, by dataset with the tasks mixed for training."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for (split, task), queries in collector.queries.items():
        stem = f"{Task.parse(task).dataset}_train" if split == "train" else f"{task}_{split}"
        groups.setdefault((split, stem), []).extend(queries)
    for (split, stem), queries in groups.items():
        if split == "train":
            seeded(collector.seed, "order", stem).shuffle(queries)
        _write_lines(root / "query" / split / f"mbeir_{stem}.jsonl", queries)
        rows = [f"{q['qid']} 0 {did} 1 {q['task_id']}\n" for q in queries for did in q["pos_cand_list"]]
        _write_text(root / "qrels" / split / f"mbeir_{stem}_qrels.txt", "".join(rows))


def _write_pools(root: Path, collector: Collector) -> None:
    """Local pools of the evaluation side, and the two union pools."""
    union: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for (side, task), entries in collector.pools.items():
        records = [entry.record() for entry in entries]
        if side == "train":
            union["train"] += records
            continue
        stem = task if side == "eval" else f"{task}_{side}"
        _write_lines(root / "cand_pool" / "local" / f"mbeir_{stem}_cand_pool.jsonl", records)
        if side != "val":
            union["test"] += records
    for split, records in union.items():
        records.sort(key=lambda record: encode_id(record["did"]))
        _write_lines(root / "cand_pool" / "global" / f"mbeir_union_{split}_cand_pool.jsonl", records)


def _write_instructions(path: Path) -> None:
    rows = [("query_modality", "cand_modality", "dataset_name", "dataset_id", *(f"prompt_{n}" for n in range(1, 5)))]
    for name in MBEIR_TASKS:
        task = Task.parse(name)
        asked, wanted = TASK_MODALITIES[task.task_id]
        rows.append((str(asked), str(wanted), task.dataset, str(DATASET_IDS[task.dataset]), *PROMPTS[name]))
    _write_text(path, "".join("\t".join(row) + "\n" for row in rows))
