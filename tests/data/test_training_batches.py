"""What a batch holds: positives, instructions and negatives, and that no labelled positive counts as a negative."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds import PROMPTS

from lightning_mmembed import Candidate, MLLMEncoder, Query
from lightning_mmembed.data import Shards
from lightning_mmembed.data.batches import EpochPlan, TrainingBatch, TrainingBatches
from lightning_mmembed.data.instructions import Instructions
from lightning_mmembed.data.layout import format_text
from lightning_mmembed.data.negatives import KINDS, MinedNegatives, draw_negatives, write_negatives
from lightning_mmembed.data.sampling import task_targets
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Modality, Task, encode_id
from lightning_mmembed.losses import contrastive_loss, labelled_positive_mask
from lightning_mmembed.mining_rule import MiningRule
from lightning_mmembed.retrieval.embed import VectorStore
from lightning_mmembed.retrieval.mine import mine_negatives


def batches_of(shards_dir: Path, **arguments: Any) -> TrainingBatches:
    """The training batches, with the items themselves in place of an encoder's inputs."""
    shards = Shards(shards_dir)
    pool = shards.pool("train").ids.numpy()
    return TrainingBatches(shards, shards.query_rows("train"), pool, list, **arguments)  # type: ignore[arg-type]


def items_of(batch: TrainingBatch) -> tuple[list[Query], list[Candidate]]:
    entries: Any = batch.inputs
    return entries[: len(batch)], entries[len(batch) :]


@pytest.fixture(scope="module")
def mined(tiny_shards: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> MinedNegatives:
    """What the miner finds with an untrained encoder; from rank 1 on, so that positives are met."""
    shards, directory = Shards(tiny_shards), tmp_path_factory.mktemp("mined")
    encoder = MLLMEncoder.from_pretrained(tiny_checkpoint)
    store = VectorStore(directory, show_progress=False)
    rule = MiningRule(k=48, k_prime=0)
    columns, audit = mine_negatives(encoder, shards.pool("train"), shards.query_sets("train"), store, "x", rule)
    assert sum(task["positives_met"] for task in audit.values()) == 60
    return MinedNegatives(write_negatives(directory / "negatives.parquet", columns, {}, audit))


ALL = np.arange(48)


def test_the_items_of_a_batch_are_queries_positives_and_negatives_in_the_order_of_their_ids(tiny_shards: Path) -> None:
    batch = batches_of(tiny_shards, negatives_per_query=2)[0, ALL[:5]]
    queries, candidates = items_of(batch)
    assert [encode_id(q.qid) for q in queries] == batch.query_ids.tolist()
    assert [encode_id(c.did) for c in candidates] == batch.candidate_ids.tolist()
    assert (len(queries), len(candidates), len(batch)) == (5, 15, 5)
    assert batch.positive_index.tolist() == [0, 1, 2, 3, 4]


def test_the_positive_of_a_query_is_a_labelled_one_and_each_of_them_has_its_turn(tiny_shards: Path) -> None:
    batches = batches_of(tiny_shards)
    drawn: dict[int, set[int]] = defaultdict(set)
    labelled: dict[int, set[int]] = {}
    for epoch in range(12):
        batch = batches[epoch, ALL]
        for query, positive, row in zip(
            items_of(batch)[0], batch.positive_index, batch.positives.tolist(), strict=True
        ):
            qid = encode_id(query.qid)
            labelled[qid] = {encode_id(did) for did in query.positives}
            assert {did for did in row if did >= 0} == labelled[qid]
            drawn[qid].add(int(batch.candidate_ids[positive]))
    assert drawn == labelled
    assert max(map(len, labelled.values())) == 2


def test_a_positive_that_the_training_pool_lacks_is_never_drawn_but_still_labelled(tiny_shards: Path) -> None:
    batches = batches_of(tiny_shards)
    task3 = [i for i in ALL if len(batches.shards.positives(batches.rows[[i]])[0]) == 2]
    gone = {min(batches.shards.positives(batches.rows[[i]])[0]) for i in task3}
    batches.pool = np.array([did for did in batches.pool if did not in gone])
    for epoch in range(6):
        batch = batches[epoch, np.array(task3)]
        assert not gone.intersection(batch.candidate_ids.tolist())
        assert gone.issubset(batch.positives.flatten().tolist())


# --- instructions ---------------------------------------------------------------------------------------------------


def test_the_instruction_is_a_function_of_seed_epoch_and_qid_and_all_prompts_occur(tiny_shards: Path) -> None:
    drawn: dict[tuple[str, ...], set[str | None]] = defaultdict(set)
    one, two, other = (batches_of(tiny_shards, seed=seed) for seed in (1, 1, 2))
    changed = 0
    for epoch in range(10):
        queries = items_of(one[epoch, ALL])[0]
        again = {q.qid: q.instruction for i in ALL[::-1] for q in items_of(two[epoch, np.array([i])])[0]}
        assert {q.qid: q.instruction for q in queries} == again, "neither the order nor the batch matters"
        changed += sum(q.instruction != again for q, again in zip(queries, items_of(other[epoch, ALL])[0], strict=True))
        for query in queries:
            assert query.task is not None
            drawn[query.item.modality.value, query.task.target_modality.value].add(query.instruction)
    assert drawn == {key: {format_text(prompt) for prompt in prompts} for key, prompts in PROMPTS.items()}
    assert changed


def test_the_prompts_of_a_kind_are_drawn_equally_often() -> None:
    task = Task("pets", 0)
    instructions = Instructions({(77, Modality.TEXT, Modality.IMAGE): ("a", "b", "c", "d")})
    counts = Counter(instructions.draw(f"77:{n}", Modality.TEXT, task, 0, n % 7) for n in range(2000))
    assert all(abs(counts[prompt] - 500) < 4 * (2000 * 0.25 * 0.75) ** 0.5 for prompt in "abcd")


def test_without_a_draw_every_query_gets_the_first_prompt(tiny_shards: Path) -> None:
    batches = batches_of(tiny_shards, draw_instructions=False)
    for epoch in range(3):
        assert {q.instruction for q in items_of(batches[epoch, ALL])[0]} == {
            format_text(p[0]) for p in PROMPTS.values()
        }


def test_evaluation_uses_the_prompt_at_the_place_asked_for_or_says_that_there_is_none(tiny_shards: Path) -> None:
    shards = Shards(tiny_shards)
    for index in range(3):
        found = {q.instruction for s in shards.query_sets("test", index) for q in s.queries}
        assert found == {format_text(prompts[index]) for prompts in PROMPTS.values()}
    with pytest.raises(UserInputError, match="instruction=3: pets_task0 has 3 prompts; write a place from 0 to 2"):
        shards.query_sets("test", 3)  # before any record is read


def test_a_prompt_that_some_query_lacks_is_refused_before_any_record_is_read(tiny_shards: Path, tmp_path: Path) -> None:
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    for path in shards.rglob("*.tar"):
        path.unlink()
    (file,) = shards.rglob("*.tsv")
    prompt = PROMPTS["image,text", "image"][2]
    assert Shards(shards).prompt_count("test") == 3
    lines = file.read_text().splitlines()
    file.write_text("\n".join(line.replace(prompt, "") for line in lines))
    assert Shards(shards).prompt_count("test") == 2
    assert len(Shards(shards).query_sets("test", 1)) == 4
    with pytest.raises(UserInputError, match="instruction=2: pets_task7 has 2 prompts; write a place from 0 to 1"):
        Shards(shards).query_sets("test", 2)
    file.write_text("\n".join(line for line in lines if prompt not in line))
    for instruction in (0, "random"):
        with pytest.raises(UserInputError, match=r"of pets_task7: the instruction file has no line with dataset_id=77"):
            Shards(shards).query_sets("test", instruction)


# --- contract 6: no labelled positive is a negative -----------------------------------------------------------------


@pytest.mark.parametrize("source", ["mined", "random"])
def test_no_labelled_positive_is_drawn_as_a_negative(tiny_shards: Path, mined: MinedNegatives, source: str) -> None:
    batches = batches_of(tiny_shards, negatives_per_query=6, mined=mined if source == "mined" else None)
    met = 0
    for epoch in range(20):
        batch = batches[epoch, ALL]
        queries, candidates = items_of(batch)
        for number, query in enumerate(queries):
            start = len(queries) + 6 * number
            negatives = {c.did for c in candidates[start : start + 6]}
            assert len(candidates[start : start + 6]) == 6
            assert not negatives.intersection(query.positives), query.qid
            met += len(negatives)
    assert met > 2000


def test_the_mined_negatives_hold_no_labelled_positive(tiny_shards: Path, mined: MinedNegatives) -> None:
    for queries in Shards(tiny_shards).query_sets("train"):
        for qid, positives in zip(queries.ids.tolist(), queries.positives, strict=True):
            found = np.concatenate(mined.of(qid))
            assert len(found)
            assert not set(found.tolist()).intersection(positives)


def test_the_mask_covers_every_labelled_positive_also_of_queries_drawn_twice(tiny_shards: Path) -> None:
    batches = batches_of(tiny_shards, negatives_per_query=3)
    masked = 0
    for epoch in range(10):
        batch = batches[epoch, np.concatenate([ALL, ALL[::3]])]  # with duplicates
        mask = labelled_positive_mask(batch.positives, batch.candidate_ids, batch.positive_index)
        queries, candidates = items_of(batch)
        for row, query in enumerate(queries):
            for column, candidate in enumerate(candidates):
                is_target = column == int(batch.positive_index[row])
                assert bool(mask[row, column]) == (candidate.did in query.positives and not is_target)
        masked += int(mask.sum())
    assert masked > 100


def test_the_copies_of_an_up_sampled_query_are_not_each_others_negatives(tiny_shards: Path) -> None:
    batches = batches_of(tiny_shards, negatives_per_query=1)
    tasks = batches.shards.task_names(batches.rows)
    plan = EpochPlan(tasks, 72, resampled=task_targets(tasks, {"pets": 3}))  # so large that copies meet
    generator = torch.Generator().manual_seed(0)
    for key in plan:
        batch = batches[key]
        copies = Counter(batch.query_ids.tolist())
        assert max(copies.values()) > 1
        queries, candidates = (torch.randn(n, 4, generator=generator) for n in (72, 144))
        mask = labelled_positive_mask(batch.positives, batch.candidate_ids, batch.positive_index)
        terms = []
        for row, (query, labelled) in enumerate(zip(queries, batch.positives.tolist(), strict=True)):
            others = [c for c in range(144) if c != row and int(batch.candidate_ids[c]) not in labelled]
            twins = set(torch.nonzero(batch.query_ids == batch.query_ids[row]).flatten().tolist()) - {row}
            assert len(twins) == copies[int(batch.query_ids[row])] - 1
            assert not twins.intersection(others)
            scores = np.exp((candidates[[row, *others]] @ query).numpy().astype(float) / 0.05)
            terms.append(-np.log(scores[0] / scores.sum()))
        found = contrastive_loss(queries, candidates, batch.positive_index, mask).item()
        np.testing.assert_allclose(found, np.mean(terms), rtol=1e-5)


def test_a_masked_positive_has_no_gradient_in_the_loss(tiny_shards: Path) -> None:
    batch = batches_of(tiny_shards, negatives_per_query=1)[0, np.repeat(ALL, 2)]
    mask = labelled_positive_mask(batch.positives, batch.candidate_ids, batch.positive_index)
    torch.manual_seed(0)
    queries, candidates = torch.randn(len(batch), 4), torch.randn(len(batch.candidate_ids), 4, requires_grad=True)
    for row in range(0, len(batch), 11):
        loss = contrastive_loss(
            queries[row : row + 1], candidates, batch.positive_index[row : row + 1], mask[row : row + 1]
        )
        (gradient,) = torch.autograd.grad(loss, candidates)
        assert mask[row].any()
        assert not gradient[mask[row]].any()


# --- mined negatives ------------------------------------------------------------------------------------------------

QID = encode_id("77:1")


def write(path: Path, rows: list[tuple[int, int, int]]) -> MinedNegatives:
    """A file of (qid, did, kind) rows, best first."""
    columns = {
        "qid": np.array([r[0] for r in rows], dtype=np.int64),
        "did": np.array([r[1] for r in rows], dtype=np.int64),
        "kind": np.array([r[2] for r in rows], dtype=np.int8),
        "rank": np.arange(1, len(rows) + 1, dtype=np.int16),
        "score": np.linspace(1, 0, len(rows), dtype=np.float32),
    }
    return MinedNegatives(write_negatives(path, columns, {"encoder": "abc"}, {"pets_task0": {"queries": 1}}))


def test_mined_negatives_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [(QID, 11, 0), (QID + 1, 12, 1), (QID, 13, 1), (QID, 14, 0), (QID + 2, 15, 0)]
    mined = write(tmp_path / "negatives.parquet", rows)
    assert (mined.made_of, mined.audit) == ({"encoder": "abc"}, {"pets_task0": {"queries": 1}})
    assert KINDS[:2] == ("wrong_modality", "wrong_content")
    for qid in range(QID - 1, QID + 4):
        expected = [[did for q, did, k in rows if q == qid and k == kind] for kind in range(3)]
        assert [part.tolist() for part in mined.of(qid)] == expected
    assert [path.name for path in tmp_path.iterdir()] == ["negatives.parquet"]


def test_an_absent_file_of_negatives_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"negatives='.*absent.parquet' is missing; mine again"):
        MinedNegatives(tmp_path / "absent.parquet")


def test_both_kinds_are_drawn_with_equal_chance_however_many_there_are_of_each(tmp_path: Path) -> None:
    mined = write(tmp_path / "n.parquet", [(QID, 100, 0), *((QID, 200 + n, 1) for n in range(9))])
    drawn = [draw_negatives(mined, np.arange(9), QID, [], 1, 0, epoch) for epoch in range(2000)]
    counts = Counter(did for row in drawn for did in row)
    assert abs(counts[100] - 1000) < 4 * (2000 * 0.25) ** 0.5
    assert all(abs(counts[200 + n] - 1000 / 9) < 5 * (1000 / 9) ** 0.5 for n in range(9))
    several = {tuple(draw_negatives(mined, np.arange(9), QID, [], 4, 0, epoch)) for epoch in range(500)}
    assert len(several) > 100, "the epochs differ"


@pytest.mark.parametrize("kind", [0, 1])
def test_where_one_kind_is_empty_the_other_is_drawn(tmp_path: Path, kind: int) -> None:
    mined = write(tmp_path / "n.parquet", [(QID, 100 + n, kind) for n in range(3)])
    drawn = {did for epoch in range(30) for did in draw_negatives(mined, np.arange(9), QID, [], 2, 0, epoch)}
    assert drawn == {100, 101, 102}


def test_where_both_kinds_are_empty_any_candidate_that_is_no_positive_is_drawn(tmp_path: Path) -> None:
    mined = write(tmp_path / "n.parquet", [(QID + 1, 100, 0)])
    drawn = {did for epoch in range(60) for did in draw_negatives(mined, np.arange(9), QID, [3, 4], 2, 0, epoch)}
    assert drawn == {0, 1, 2, 5, 6, 7, 8}


def test_the_one_candidate_that_is_no_positive_is_found_in_a_small_pool() -> None:
    for epoch in range(50):
        assert draw_negatives(None, np.arange(3), QID, [0, 2], 2, 0, epoch) == [1, 1]


def test_a_pool_of_positives_only_is_named() -> None:
    with pytest.raises(UserInputError, match="query 77:1: every candidate of the training pool is a labelled positive"):
        draw_negatives(None, np.arange(3), QID, [0, 1, 2], 1, 0, 0)
