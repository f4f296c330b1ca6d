"""The built-in benchmark: its layout, its splits and the uniqueness of its right answers."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightning_mmembed.data.mini import generate_mini
from lightning_mmembed.data.mini.records import Collector
from lightning_mmembed.data.mini.tasks import collect
from lightning_mmembed.data.mini.world import DATASET_IDS, DOMAIN_OF, LOOK_FIELDS, Look, values_of
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import MBEIR_TASKS, Modality, Task, encode_id

SPLITS = ("train", "val", "test")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def source_look(content: str, key: str = "look") -> Look | None:
    values = json.loads(content)[key]
    return Look(*values) if values else None


class Tree:
    """A generated tree, read back from disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def pool(self, stem: str) -> list[dict[str, Any]]:
        scope = "global" if "union" in stem else "local"
        return read_lines(self.root / "cand_pool" / scope / f"mbeir_{stem}_cand_pool.jsonl")

    @cached_property
    def union(self) -> dict[str, dict[str, dict[str, Any]]]:
        return {split: {c["did"]: c for c in self.pool(f"union_{split}")} for split in ("train", "test")}

    @cached_property
    def queries(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for split in SPLITS:
            for path in sorted((self.root / "query" / split).iterdir()):
                dataset = path.name.split("_")[1]
                for query in read_lines(path):
                    found[split, Task(dataset, query["task_id"]).name].append(query)
        return found

    @cached_property
    def candidates(self) -> dict[str, dict[str, Any]]:
        """Every candidate that stands in some pool."""
        coco = {c["did"]: c for task in (0, 3) for c in self.pool(f"mscoco_task{task}_val")}
        return {**self.union["train"], **self.union["test"], **coco}

    def looks(self, *splits: str) -> dict[str, set[Look]]:
        """The looks per domain that queries of ``splits`` show or want, and those of the pools they search."""
        found: dict[str, set[Look]] = defaultdict(set)
        for (split, task), queries in self.queries.items():
            for query in queries if split in splits else []:
                for key in ("wanted", "shown"):
                    look = source_look(query["query_src_content"], key)
                    if look:
                        found[DOMAIN_OF[Task.parse(task).dataset]].add(look)
        evaluation = [c for did, c in self.candidates.items() if did not in self.union["train"]]
        for candidate in self.union["train"].values() if "train" in splits else evaluation:
            found[domain_of(candidate["did"])].add(source_look(candidate["src_content"]))  # type: ignore[arg-type]
        return found


def domain_of(did: str) -> str:
    return DOMAIN_OF[list(DATASET_IDS)[int(did.split(":")[0])]]


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(generate_mini(tmp_path_factory.mktemp("mini") / "tree"))


@pytest.fixture(scope="session")
def collector() -> Collector:
    return collect(0)


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_published_file_of_the_layout_is_written(tree: Tree) -> None:
    datasets = sorted(DATASET_IDS)
    shared = [task for task in MBEIR_TASKS if not task.startswith("mscoco")]
    expected = {f"query/train/mbeir_{d}_train.jsonl" for d in datasets}
    expected |= {f"qrels/train/mbeir_{d}_train_qrels.txt" for d in datasets}
    for split in ("val", "test"):
        expected |= {f"query/{split}/mbeir_{t}_{split}.jsonl" for t in MBEIR_TASKS}
        expected |= {f"qrels/{split}/mbeir_{t}_{split}_qrels.txt" for t in MBEIR_TASKS}
        expected |= {f"cand_pool/local/mbeir_mscoco_task{n}_{split}_cand_pool.jsonl" for n in (0, 3)}
    expected |= {f"cand_pool/local/mbeir_{t}_cand_pool.jsonl" for t in shared}
    expected |= {f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl" for split in ("train", "test")}
    expected |= {"instructions/query_instructions.tsv", "generated.json"}
    files = {str(p.relative_to(tree.root)) for p in tree.root.rglob("*") if p.is_file() and p.suffix != ".jpg"}
    assert files == expected
    folders = {path.name for path in (tree.root / "mbeir_images").iterdir()}
    assert folders == {f"{d}_images" for d in datasets if d != "infoseek"}


def test_the_same_seed_gives_the_same_bytes_in_another_process_and_replaces_a_former_tree(
    tree: Tree, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    out.mkdir()
    marker = json.loads((tree.root / "generated.json").read_text())
    (out / "generated.json").write_text(json.dumps({**marker, "version": 0}))
    code = "import sys; from lightning_mmembed.data.mini import generate_mini; generate_mini(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert digests(out) == digests(tree.root)
    assert not list(tmp_path.glob(".*.tmp"))


def test_another_seed_gives_another_world(collector: Collector) -> None:
    other = collect(1)
    assert other.queries != collector.queries


def test_a_tree_that_stands_is_left_alone(tree: Tree) -> None:
    before = (tree.root / "generated.json").stat().st_mtime_ns
    assert generate_mini(tree.root) == tree.root
    assert (tree.root / "generated.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("content", ["notes", '{"generator": "something else"}', "[]"])
def test_a_foreign_directory_is_refused_and_left_as_it_was(tmp_path: Path, content: str) -> None:
    (tmp_path / "generated.json").write_text(content)
    with pytest.raises(UserInputError, match=re.escape(str(tmp_path)) + ".*choose another directory"):
        generate_mini(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == [content]


def test_records_have_all_keys_and_the_modality_of_their_parts(tree: Tree) -> None:
    for queries in tree.queries.values():
        for query in queries:
            assert list(query)[:4] == ["qid", "query_txt", "query_img_path", "query_modality"]
            assert list(query)[4:] == ["query_src_content", "pos_cand_list", "neg_cand_list", "task_id"]
            parts = [query["query_img_path"] and "image", query["query_txt"] and "text"]
            assert query["query_modality"] == ",".join(filter(None, parts))
    for candidate in tree.candidates.values():
        assert set(candidate) == {"txt", "img_path", "modality", "did", "src_content"}
        parts = [candidate["img_path"] and "image", candidate["txt"] and "text"]
        assert candidate["modality"] == ",".join(filter(None, parts))


def test_qids_restart_at_one_per_dataset_and_split(tree: Tree) -> None:
    numbers: dict[tuple[str, str], list[int]] = defaultdict(list)
    for (split, task), queries in tree.queries.items():
        dataset = Task.parse(task).dataset
        for query in queries:
            prefix, number = query["qid"].split(":")
            assert int(prefix) == DATASET_IDS[dataset]
            numbers[split, dataset].append(int(number))
    for found in numbers.values():
        assert sorted(found) == list(range(1, len(found) + 1))


def test_dids_are_unique_within_a_dataset_over_all_pools_and_splits(tree: Tree) -> None:
    pools = [tree.pool("union_train"), tree.pool("union_test")]
    pools += [tree.pool(f"mscoco_task{task}_val") for task in (0, 3)]
    dids = Counter(candidate["did"] for pool in pools for candidate in pool)
    assert set(dids.values()) == {1}


def test_the_test_union_is_the_sixteen_local_pools_sorted_by_id(tree: Tree) -> None:
    stems = [f"{t}_test" if t.startswith("mscoco") else t for t in MBEIR_TASKS]
    local = [candidate for stem in stems for candidate in tree.pool(stem)]
    union = tree.pool("union_test")
    assert union == sorted(local, key=lambda candidate: encode_id(candidate["did"]))


def test_sizes_stay_within_the_promised_ranges(tree: Tree) -> None:
    for task in MBEIR_TASKS:
        assert len(tree.queries["train", task]) >= 400
        assert len(tree.queries["val", task]) == 40
        assert len(tree.queries["test", task]) == 60
    for split, low, high in (("train", 6000, 8000), ("test", 3200, 3800)):
        union = tree.union[split]
        assert low <= len(union) <= high
        shares = Counter(candidate["modality"] for candidate in union.values())
        assert min(shares[str(modality)] for modality in Modality) >= 0.2 * len(union)


def test_qrels_say_what_the_queries_say_in_five_columns(tree: Tree) -> None:
    for path in sorted((tree.root / "qrels").glob("*/*.txt")):
        queries = read_lines(tree.root / "query" / path.parent.name / path.name.replace("_qrels.txt", ".jsonl"))
        rows = [line.split(" ") for line in path.read_text().splitlines()]
        wanted = [[q["qid"], "0", did, "1", str(q["task_id"])] for q in queries for did in q["pos_cand_list"]]
        assert rows == wanted


def test_positives_have_the_wanted_modality_and_stand_in_the_searched_pools(tree: Tree) -> None:
    for (split, task), queries in tree.queries.items():
        stem = f"{task}_{split}" if task.startswith("mscoco") else task
        pool = tree.union["train"] if split == "train" else {c["did"]: c for c in tree.pool(stem)}
        for query in queries:
            assert query["pos_cand_list"]
            for did in query["pos_cand_list"]:
                assert pool[did]["modality"] == str(Task.parse(task).target_modality)
            for did in query["neg_cand_list"]:
                assert did in tree.candidates
                assert did not in query["pos_cand_list"]


def test_instructions_hold_four_different_prompts_for_each_task(tree: Tree) -> None:
    lines = (tree.root / "instructions" / "query_instructions.tsv").read_text().splitlines()
    header, *rows = [line.split("\t") for line in lines]
    columns = ["query_modality", "cand_modality", "dataset_name", "dataset_id"]
    assert header == columns + [f"prompt_{number}" for number in range(1, 5)]
    assert len(rows) == 16
    assert len({prompt for row in rows for prompt in row[4:]}) == 64
    keys = {(row[3], row[0], row[1]) for row in rows}
    for (_, task), queries in tree.queries.items():
        wanted = str(Task.parse(task).target_modality)
        assert {(q["qid"].split(":")[0], q["query_modality"], wanted) for q in queries} <= keys


def test_combinations_of_evaluation_never_occur_in_training(tree: Tree) -> None:
    train, evaluation = tree.looks("train"), tree.looks("val", "test")
    for domain, looks in evaluation.items():
        assert looks
        assert not looks & train[domain]


def test_every_single_attribute_value_occurs_in_training(tree: Tree) -> None:
    for domain, looks in tree.looks("train").items():
        for attribute in LOOK_FIELDS:
            assert {getattr(look, attribute) for look in looks} == set(values_of(domain, attribute))


def test_names_of_evaluation_never_occur_in_training(tree: Tree) -> None:
    names = {
        split: {json.loads(c["src_content"]).get("entity") for c in union.values()} - {None}
        for split, union in tree.union.items()
    }
    assert names["test"]
    assert not names["train"] & names["test"]


def test_validation_and_test_want_different_candidates(tree: Tree) -> None:
    for task in MBEIR_TASKS:
        wanted = {split: {d for q in tree.queries[split, task] for d in q["pos_cand_list"]} for split in SPLITS}
        assert not wanted["val"] & wanted["test"]
        assert not wanted["train"] & (wanted["val"] | wanted["test"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_labelled_positives_are_the_only_right_answers_of_their_modality(tree: Tree, split: str) -> None:
    same: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for did, candidate in tree.union[split].items():
        source = json.loads(candidate["src_content"])
        same[domain_of(did), candidate["modality"], tuple(source["look"]), source.get("topic")].add(did)
    for (query_split, task), queries in tree.queries.items():
        for query in queries if query_split == split else []:
            source = json.loads(query["query_src_content"])
            domain = DOMAIN_OF[Task.parse(task).dataset]
            key = (domain, str(Task.parse(task).target_modality), tuple(source["wanted"]), source.get("topic"))
            assert same[key] == set(query["pos_cand_list"])


def test_a_named_thing_has_all_its_passages_in_one_dataset(tree: Tree) -> None:
    owners: dict[tuple[str, str], set[str]] = defaultdict(set)
    looks: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
    for did, candidate in tree.candidates.items():
        source = json.loads(candidate["src_content"])
        if "entity" in source:
            kind = "view" if source["topic"] == "view" else "facts" if source["topic"] != "name" else "name"
            owners[source["entity"], candidate["modality"]].add(f"{did.split(':')[0]} {kind}")
            looks[source["entity"]].add(tuple(source["look"]))
    assert {len(found) for found in owners.values()} == {1}
    assert {len(found) for found in looks.values()} == {1}
    assert len({next(iter(found)) for found in looks.values()}) == len(looks)


def test_what_a_test_query_asks_for_also_stands_in_another_modality(tree: Tree) -> None:
    modalities: dict[tuple[str, Any], set[str]] = defaultdict(set)
    for did, candidate in tree.union["test"].items():
        modalities[domain_of(did), source_look(candidate["src_content"])].add(candidate["modality"])
    for task in MBEIR_TASKS:
        for query in tree.queries["test", task]:
            wanted = source_look(query["query_src_content"], "wanted")
            assert len(modalities[DOMAIN_OF[Task.parse(task).dataset], wanted]) >= 2


def test_most_right_answers_have_a_distractor_of_their_modality_one_attribute_away(tree: Tree) -> None:
    looks: dict[tuple[str, str], set[Look]] = defaultdict(set)
    for did, candidate in tree.union["test"].items():
        looks[domain_of(did), candidate["modality"]].add(source_look(candidate["src_content"]))  # type: ignore[arg-type]
    for task in MBEIR_TASKS:
        domain, modality = DOMAIN_OF[Task.parse(task).dataset], str(Task.parse(task).target_modality)
        wanted = [source_look(q["query_src_content"], "wanted") for q in tree.queries["test", task]]
        close = [any(len(w.changed(look)) == 1 for look in looks[domain, modality]) for w in wanted if w]
        assert sum(close) / len(close) > 0.6


@pytest.mark.parametrize("task", ["fashioniq_task7", "cirr_task7"])
def test_a_change_note_names_the_one_or_two_attributes_that_change(tree: Tree, task: str) -> None:
    for split in SPLITS:
        for query in tree.queries[split, task]:
            shown, wanted = (source_look(query["query_src_content"], key) for key in ("shown", "wanted"))
            assert shown
            assert wanted
            changed = len(shown.changed(wanted))
            assert changed in (1, 2)
            assert query["query_txt"].count(" and ") == changed - 1


def test_texts_are_short_and_share_a_small_vocabulary(tree: Tree) -> None:
    texts = [c["txt"] for c in tree.candidates.values() if c["txt"]]
    texts += [q["query_txt"] for queries in tree.queries.values() for q in queries if q["query_txt"]]
    assert max(len(text.split()) for text in texts) <= 35
    names = {json.loads(c["src_content"]).get("entity", "") for c in tree.candidates.values()}
    prompts = (tree.root / "instructions" / "query_instructions.tsv").read_text()
    vocabulary = set(re.findall(r"[a-z]+", " ".join([*texts, prompts]).lower())) - {n.lower() for n in names}
    assert len(vocabulary) <= 1500


def test_every_picture_is_a_small_rgb_file_that_some_record_points_to(tree: Tree) -> None:
    named = {c["img_path"] for c in tree.candidates.values()}
    named |= {q["query_img_path"] for queries in tree.queries.values() for q in queries}
    paths = {str(path.relative_to(tree.root)) for path in tree.root.rglob("*.jpg")}
    assert named - {None} == paths
    for path in sorted(paths)[::50]:
        with Image.open(tree.root / path) as picture:
            assert (picture.size, picture.mode) == ((64, 64), "RGB")


def test_no_two_pictures_are_the_same(tree: Tree) -> None:
    pictures = [name for name in digests(tree.root).items() if name[0].endswith(".jpg")]
    assert len({digest for _, digest in pictures}) == len(pictures)
