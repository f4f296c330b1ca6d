"""The commands as plain functions, and the configuration they are composed from."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from worlds import ARCHITECTURE, write_pets

from lightning_mmembed.cli import evaluate, train
from lightning_mmembed.cli_shard import shard
from lightning_mmembed.data import Shards
from lightning_mmembed.errors import UserInputError

CONF = Path(__file__).parents[1] / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
ENTRIES = ("train", "evaluate")


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_module("lightning_mmembed.conf", version_base="1.3"):
        return compose(name, list(overrides))


def tiny_paths(directory: Path) -> list[str]:
    return [f"paths.root_dir={directory}", f"paths.output_dir={directory}/run"]


def tiny(directory: Path, source: Path | None = None) -> list[str]:
    """Overrides that make a run on the small dataset with a small model, below a directory."""
    return [
        "data=mbeir",
        "dataset=pets",
        f"data.source={'null' if source is None else source}",
        "data.batch_size=8",
        *tiny_paths(directory),
        *(f"model.encoder.architecture.{name}={value}" for name, value in ARCHITECTURE.items()),
        "model.encoder.max_length=48",
        "callbacks.evaluation.dtype=float32",
    ]


# --- composition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_resolves(entry: str, experiment: str, tmp_path: Path) -> None:
    cfg = composed(entry, f"experiment={experiment}", *tiny_paths(tmp_path))
    content = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(content, dict)
    assert {
        "data",
        "model",
        "loss",
        "callbacks",
        "trainer",
        "paths",
        "extras",
        "seed",
        "tags",
        "ckpt_path",
    } <= content.keys()
    assert cfg.dataset == ("emoji" if experiment == "emoji" else "mini")


@pytest.mark.parametrize("group", ["data", "model", "callbacks", "logger", "trainer", "debug"])
def test_every_choice_of_a_group_composes(group: str, tmp_path: Path) -> None:
    for path in sorted((CONF / group).glob("*.yaml")):
        given = {"mbeir": ["dataset=mine"], "mixed": ["dataset=mine", "data.shards=[a,b]"]}
        cfg = composed("train", f"{group}={path.stem}", *given.get(path.stem, []), *tiny_paths(tmp_path))
        OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "data").glob("*.yaml")))
def test_any_data_may_bring_soft_labels(name: str) -> None:
    assert composed("train", f"data={name}", "data.soft_labels=x").data.soft_labels == "x"


@pytest.mark.parametrize("name", ["tiny", "llava_next", "mm_embed", "mm_embed_parts"])
def test_vectors_of_any_multimodal_llm_may_be_cut(name: str) -> None:
    assert composed("train", f"model={name}", "model.encoder.truncate_dim=8").model.encoder.truncate_dim == 8


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_opens_with_the_command_that_runs_it(experiment: str) -> None:
    head = (CONF / "experiment" / f"{experiment}.yaml").read_text().partition("defaults:")[0]
    assert re.search(rf"^#   python train.py experiment={experiment}\b", head, re.MULTILINE)


def keys_of(path: Path) -> list[tuple[str, str, str]]:
    """(key, value, comment) of every line of a file that sets a key, without Hydra's own."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith(("#", "-"))]
    found = [re.fullmatch(r"\s*([\w ]+):\s*(.*?)\s*(?:(?<!\S)#\s*(.*))?", line) for line in lines]
    rows = [(m[1], m[2], m[3] or "") for m in found if m]
    return [row for row in rows if row[0] not in ("defaults", "_target_", "_partial_")]


def test_every_key_has_a_comment() -> None:
    """An experiment and a variant of a trainer need not repeat what the key that they override says."""
    files = [path for path in sorted(CONF.rglob("*.yaml")) if path.parent.name != "hydra"]
    assert len(files) > 15
    explained = {key for path in files for key, _, comment in keys_of(path) if comment}
    silent = []
    for path in files:
        overrides = "experiment" in path.parts or path.parent.name == "debug" or path.stem in ("gpu", "ddp", "ddp_sim")
        for key, value, comment in keys_of(path):
            refers = value.startswith("${")  # to a key that has a comment
            if value and not comment and not refers and not (overrides and key in explained):
                silent.append(f"{path.relative_to(CONF)}: {key}")
    assert silent == []


# --- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_ends_with_the_figures_that_an_evaluation_of_its_checkpoint_gives(
    tiny_source: Path, tmp_path: Path
) -> None:
    cfg = composed("train", *tiny(tmp_path, tiny_source), "trainer.max_epochs=1")
    metrics, objects = train(cfg)
    assert objects.keys() == {"datamodule", "module", "callbacks", "trainer"}
    run = tmp_path / "run"
    for name in (
        "config.yaml",
        "versions.json",
        "metrics.json",
        "report.html",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    ):
        assert (run / name).is_file(), name
    assert (tmp_path / "data/shards/pets/manifest.json").is_file()
    assert OmegaConf.load(run / "config.yaml").data.batch_size == 8
    assert json.loads((run / "versions.json").read_text())["seed"] == 0
    assert {"train/loss", "val/union/hit@5", "test/union/hit@5", "test/local/pets_task3/recall@5"} <= metrics.keys()

    best = run / "checkpoints" / "best.ckpt"
    overrides = [*tiny(tmp_path), f"ckpt_path={best}", "paths.output_dir=" + str(tmp_path / "evaluation")]
    again, _ = evaluate(composed("evaluate", *overrides))
    tested = {name: value for name, value in metrics.items() if name.startswith("test/")}
    assert len(tested) > 80
    assert again == tested
    report = json.loads((run / "metrics.json").read_text())
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text()) == report
    assert report["union"]["average"]["hit@5"] == pytest.approx(metrics["test/union/hit@5"], abs=1e-6)


def test_an_evaluation_of_an_unknown_split_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="split='train' is unknown; write 'test' or 'val'"):
        evaluate(composed("evaluate", *tiny(tmp_path), "split=train"))
    assert list(tmp_path.iterdir()) == []


def test_sharding_writes_where_it_is_told(
    tiny_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shard(composed("shard", f"source={tiny_source}", f"out={tmp_path / 'shards'}"))
    assert out == tmp_path / "shards"
    *_, held, where = capsys.readouterr().out.splitlines()
    assert held == "72 candidates; queries: 48 train, 24 val, 24 test; 0 records left out"
    assert where == f"shards: {out}"
    assert len(Shards(out).pool("train")) == 48


def test_sharding_again_says_that_the_shards_are_there_and_what_they_lack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    source, out = write_pets(tmp_path / "source"), tmp_path / "shards"
    (source / "mbeir_images/pets_images/50.jpg").unlink()
    settings = composed("shard", f"source={source}", f"out={out}", "max_bad_fraction=0.5", "num_workers=0")
    caplog.set_level(logging.INFO)
    for messages in ([], [f"{out} was already made from this source"]):
        shard(settings)
        assert caplog.messages == messages
        held = capsys.readouterr().out.splitlines()[-2]
        assert "; 5 records left out (77:1050: picture mbeir_images/pets_images/50.jpg is missing; " in held
        assert held.endswith("; and more: see bad_records in manifest.json)")


def test_nothing_is_written_outside_the_folders_that_are_named(
    tiny_source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    cfg = composed("train", *tiny(tmp_path / "here", tiny_source), "trainer.max_steps=1", "test=false")
    train(cfg)
    assert list(elsewhere.iterdir()) == []
