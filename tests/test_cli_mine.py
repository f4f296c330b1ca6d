"""``mmembed-mine`` and the words of the group ``mining``: what is mined, resumed, refused, and taken by training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from test_cli import CONF, composed
from worlds import tiny_module, tiny_trainer

from lightning_mmembed import HardNegativeMining, MBEIRDataModule, MLLMEncoder
from lightning_mmembed.cli_mine import mine
from lightning_mmembed.data import Shards
from lightning_mmembed.data.negatives import KINDS, MinedNegatives, check_share, share_at
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.mining_rule import MiningRule
from lightning_mmembed.retrieval.search import exact_search

WORDS = sorted(path.stem for path in (CONF / "mining").glob("*.yaml"))
RULE = ("mining.k=20", "mining.k_prime=6")


def arguments(shards: Path, checkpoint: Path, out: Path) -> list[str]:
    return [
        *("data=mbeir", "dataset=pets", "data.source=null", f"data.shards={shards}", "model=llava_next"),
        *(f"model.encoder.pretrained_model_name_or_path={checkpoint}", "model.encoder.max_length=48"),
        *(f"out={out}", f"paths.root_dir={out.parent}", "fabric.accelerator=cpu", "vectors.dtype=float32"),
    ]


def mined(shards: Path, checkpoint: Path, out: Path, *overrides: str) -> Path:
    return mine(composed("mine", *arguments(shards, checkpoint, out), *overrides))


def test_the_command_writes_what_a_training_run_mines(tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = mined(tiny_shards, tiny_checkpoint, tmp_path / "out" / "negatives.parquet", *RULE)
    miner = HardNegativeMining(before_fit=True, rule=MiningRule(k=20, k_prime=6), dtype="float32")
    trainer = tiny_trainer(tmp_path, max_steps=1, callbacks=[miner], limit_val_batches=0)
    trainer.fit(tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards, batch_size=8))
    theirs = miner.versions[0]["path"]
    assert pq.read_table(path).equals(pq.read_table(theirs))
    assert MinedNegatives(path).audit == MinedNegatives(theirs).audit
    assert MinedNegatives(path).made_of == MinedNegatives(theirs).made_of


def test_a_mining_goes_on_with_the_vectors_that_are_there_and_a_finished_one_is_left_alone(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = mined(tiny_shards, tiny_checkpoint, tmp_path / "negatives.parquet", *RULE)
    whole, written = path.read_bytes(), path.stat().st_mtime_ns
    mined(tiny_shards, tiny_checkpoint, path, *RULE)
    assert path.stat().st_mtime_ns == written
    parts = sorted((tmp_path / "data" / "vectors").rglob("*.npy"))
    parts[0].unlink()
    path.unlink()
    kept = {part: part.stat().st_mtime_ns for part in parts[1:]}
    mined(tiny_shards, tiny_checkpoint, path, *RULE)
    assert path.read_bytes() == whole
    assert parts[0].is_file()
    assert {part: part.stat().st_mtime_ns for part in parts[1:]} == kept


@pytest.mark.parametrize("override", ["mining.k=21", "mining.max_score=0.9", "vectors.dtype=float16", "pool=test"])
def test_a_file_that_was_mined_with_other_settings_is_mined_again(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, override: str
) -> None:
    path = mined(tiny_shards, tiny_checkpoint, tmp_path / "negatives.parquet", *RULE)
    before = MinedNegatives(path).made_of
    mined(tiny_shards, tiny_checkpoint, path, *RULE, override)
    assert MinedNegatives(path).made_of != before


def test_any_pool_can_be_mined_in_and_training_takes_the_file(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for pool in ("test", "pets_task3/val"):
        path = mined(tiny_shards, tiny_checkpoint, tmp_path / f"{pool[:4]}.parquet", f"pool={pool}", "mining=top_k")
        dids = pq.read_table(path)["did"].to_numpy()
        assert len(dids)
        assert set(dids) <= set(Shards(tiny_shards).pool(pool).ids.tolist())
        trainer = tiny_trainer(tmp_path, max_steps=1, limit_val_batches=0)
        trainer.fit(tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards, batch_size=8, negatives=path))


def test_the_cross_check_leaves_out_what_a_second_model_ranks_with_the_positives_of_the_wanted_modality(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    encoder = MLLMEncoder.from_pretrained(tiny_checkpoint, max_length=48)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    other = encoder.eval().save_pretrained(tmp_path / "other")
    check = ("mining=cross_check", f"check={other}")
    rows = {
        tuple(row)
        for row in zip(
            *pq.read_table(mined(tiny_shards, tiny_checkpoint, tmp_path / "a.parquet", *check, *RULE))
            .select(["qid", "did", "kind", "rank"])
            .to_pydict()
            .values(),
            strict=True,
        )
    }
    plain = pq.read_table(mined(tiny_shards, tiny_checkpoint, tmp_path / "b.parquet", *RULE)).to_pylist()
    shards, expected, left_out, spared = Shards(tiny_shards), set(), 0, 0
    pool = shards.pool("train")
    by_did = dict(zip(pool.ids.tolist(), encoder.encode(list(pool.items)), strict=True))
    asked = {}
    for queries in shards.query_sets("train"):
        for i, vector in enumerate(encoder.encode(list(queries.queries))):
            asked[int(queries.ids[i])] = (vector, [by_did[did] for did in queries.positives[i] if did in by_did])
    for row in plain:
        vector, positives = asked[row["qid"]]
        near = float(vector @ by_did[row["did"]]) - min(float(vector @ positive) for positive in positives)
        assert abs(near) > 1e-6
        checked = row["kind"] == KINDS.index("wrong_content")
        left_out, spared = left_out + (checked and near >= 0), spared + (not checked and near >= 0)
        if not checked or near < 0:
            expected.add((row["qid"], row["did"], row["kind"], row["rank"]))
    assert rows == expected
    assert left_out
    assert spared, "a candidate of another modality cannot be a positive that nobody labelled"
    audit = MinedNegatives(tmp_path / "a.parquet").audit
    assert sum(task["left_out_by_check_margin"] for task in audit.values()) == left_out


@pytest.mark.parametrize("word", WORDS)
def test_every_word_of_the_group_is_a_rule_in_training_and_offline(word: str, tmp_path: Path) -> None:
    paths = [f"paths.root_dir={tmp_path}", f"paths.output_dir={tmp_path}/run"]
    offline = composed("mine", f"mining={word}", "out=x", paths[0])
    training = composed("train", f"mining={word}", *paths)
    rule = instantiate(offline.mining, _convert_="all")
    assert rule == instantiate(OmegaConf.to_container(training.callbacks.mining.rule, resolve=True))
    share = OmegaConf.to_container(training.data, resolve=True)["wrong_modality_share"]
    epochs = training.trainer.max_epochs
    assert share == ({"start": 1.0, "end": 0.5, "epochs": epochs} if word == "curriculum" else 0.5)
    if word in ("absolute_margin", "relative_margin", "max_score"):
        assert getattr(rule, word) is not None
    expected = {
        "top_k": "top_k",
        "window": "window",
        "modality_aware": "modality_aware",
        "curriculum": "modality_aware",
    }
    assert rule.rule == expected.get(word, rule.rule)


def test_a_curriculum_goes_over_the_epochs_of_the_run_those_before_the_first_mining_included() -> None:
    cfg = composed("train", "mining=curriculum", "paths.root_dir=/x", "paths.output_dir=/x/run")
    (mined_after,) = cfg.callbacks.mining.after_epochs
    share = cfg.data.wrong_modality_share
    assert (mined_after, share.epochs) == (5, 10)
    assert round(share_at(share, mined_after), 2) == 0.72, "as conf/mining/curriculum.yaml and docs/mining.md say"
    assert [share_at(share, epoch) for epoch in (0, 9, 10)] == [1.0, 0.5, 0.5]


@pytest.mark.parametrize("epochs", [-1, "null"])
def test_a_curriculum_of_a_run_without_a_last_epoch_says_what_to_give(epochs: Any) -> None:
    overrides = ("mining=curriculum", f"trainer.max_epochs={epochs}", "paths.root_dir=/x", "paths.output_dir=/x/run")
    with pytest.raises(UserInputError, match=r"has no last epoch.*such as data\.wrong_modality_share\.epochs=8"):
        check_share(composed("train", *overrides).data.wrong_modality_share)
    check_share(composed("train", *overrides, "data.wrong_modality_share.epochs=8").data.wrong_modality_share)


def test_plain_top_k_takes_the_first_ranks_whatever_their_modality(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = mined(tiny_shards, tiny_checkpoint, tmp_path / "negatives.parquet", "mining=top_k", "mining.k=5")
    table = pq.read_table(path)
    assert set(table["kind"].to_pylist()) == {KINDS.index("any_modality")}
    shards, encoder = Shards(tiny_shards), MLLMEncoder.from_pretrained(tiny_checkpoint, max_length=48)
    pool = shards.pool("train")
    vectors, rows = encoder.encode(list(pool.items)), set()
    for queries in shards.query_sets("train"):
        (ranking,) = exact_search(encoder.encode(list(queries.queries)), vectors, 5)
        for qid, positives, places in zip(queries.ids.tolist(), queries.positives, ranking.rows, strict=True):
            rows |= {(qid, did) for did in pool.ids[places].tolist() if did not in positives}
    assert set(zip(table["qid"].to_pylist(), table["did"].to_pylist(), strict=True)) == rows


def test_the_page_shows_counts_scores_and_negatives_with_their_pictures(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    page = tmp_path / "mining.html"
    path = mined(tiny_shards, tiny_checkpoint, tmp_path / "negatives.parquet", *RULE, f"page={page}")
    text, audit = page.read_text(), MinedNegatives(path).audit
    for task in audit:
        assert f'<th class="name" scope="row">{task}' in text
    assert "Scores of the negatives" in text
    assert "data:image/" in text
    assert "labelled positive" in text
    total = sum(kind["negatives"] for task in audit.values() for kind in task["kinds"].values())
    assert total == pq.read_metadata(path).num_rows


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("mining=cross_check",), r"mining.check_margin=0.0 needs a second model; give check="),
        (("check=x",), r"check='x' would not be used; give mining=cross_check, or no check"),
        (("pool=absent",), r"has no pool 'absent'"),
        (("out=.",), r"out='\.' is a folder; give the name of a file"),
        (("page=.",), r"page='\.' is a folder; give the name of a file"),
        (("instruction=all",), r"instruction='all' is no single prompt"),
        (("vectors.dtype=int8",), "dtype='int8' is unknown"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named_before_a_model_is_loaded(
    tiny_shards: Path, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserInputError, match=message):
        mined(tiny_shards, tmp_path / "absent", tmp_path / "negatives.parquet", *overrides)
    assert not (tmp_path / "negatives.parquet").exists()


@pytest.mark.slow  # starts commands, which import torch and transformers
def test_two_processes_mine_from_a_shell_what_one_mines(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tables = []
    for devices in (1, 2):
        out = tmp_path / str(devices) / "negatives (1).parquet"
        process = subprocess.run(
            [
                str(Path(sys.executable).parent / "mmembed-mine"),
                *arguments(tiny_shards, tiny_checkpoint, out),
                *RULE,
                f"fabric.devices={devices}",
            ],
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert process.returncode == 0, process.stderr[-3000:]
        assert process.stdout.splitlines()[-1] == f"negatives: {out}"
        assert "all tasks" in process.stdout
        tables.append((pq.read_table(out), MinedNegatives(out).audit, MinedNegatives(out).made_of))
    assert tables[0][0].equals(tables[1][0])
    assert tables[0][1:] == tables[1][1:]
    assert np.all(tables[0][0]["rank"].to_numpy() <= 20)
