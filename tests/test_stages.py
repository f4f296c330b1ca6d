"""Recipes: stages run in order, go on where they were killed, and anew when what they start from changes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from test_cli import composed
from text_worlds import birds
from worlds import ARCHITECTURE, write_pets

from lightning_mmembed.cli_shard import shard
from lightning_mmembed.data import Shards
from lightning_mmembed.data.batches import TrainingBatches
from lightning_mmembed.errors import TRY_AGAIN, UserInputError
from lightning_mmembed.files import file_sha256
from lightning_mmembed.stages import (
    STAGE_FILE,
    Stage,
    _composed,
    _important,
    _quoted,
    _starts,
    _written,
    is_finished,
    run_program,
    run_stages,
    stages_of,
)

CONF = Path(__file__).parents[1] / "conf" / "experiment" / "mm_embed"
GIVEN = {
    "": ["multimodal=[/data/a]", "text=[/data/b]"],
    "mini/": [],
    "emoji/": ["emoji=/data/emoji", "texts='/data/the texts'"],
}
#: Seconds that a recipe may take on a busy machine.
PATIENCE = 600.0


def recipe(size: str, directory: Path, *overrides: str) -> list[Stage]:
    given = [f"experiment=mm_embed/{size}all", *GIVEN[size], *overrides]
    cfg = composed("train", *given, f"paths.root_dir={directory}", f"paths.output_dir={directory}")
    return stages_of(cfg, directory, given)


# --- composition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", GIVEN)
def test_every_stage_of_a_recipe_and_its_evaluations_compose_with_nothing_left_to_give(
    size: str, tmp_path: Path
) -> None:
    stages = recipe(size, tmp_path, "seed=5")
    names = [stage.name for stage in stages if stage.program == "train"]
    assert names == (["pretrain"] if size else []) + ["random", "hard", "continual", "joint"]
    assert len(stages) == 3 * len(names)
    for stage in stages:
        content = _important(_composed(stage, stages))
        assert content["seed"] == 5, stage.name


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF))[:-5])
def test_every_stage_opens_with_the_command_that_runs_it(path: Path) -> None:
    name = str(path.relative_to(CONF.parent).with_suffix(""))
    assert f"#   python train.py experiment={name} " in path.read_text().partition("defaults:")[0].replace("\n", " ")


def test_the_paper_s_stages_have_the_paper_s_settings(tmp_path: Path) -> None:
    stages = recipe("", tmp_path)
    found = {stage.name: _composed(stage, stages) for stage in stages if stage.program == "train"}
    settings = {
        name: (cfg.data.batch_size, cfg.model.optimizer.lr, cfg.trainer.max_epochs, cfg.trainer.max_steps)
        for name, cfg in found.items()
    }
    assert settings == {
        "random": (128, 1e-4, 2, -1),
        "hard": (64, 1e-4, 2, -1),
        "continual": (64, 2e-5, -1, 4500),
        "joint": (64, 1e-4, 2, -1),
    }
    for name, cfg in found.items():
        assert (cfg.model.encoder.max_length, dict(cfg.model.encoder.lora)["lora_alpha"]) == (128, 64)
        assert cfg.model.encoder.get("passage_length") == (512 if name in ("continual", "joint") else None)


@pytest.mark.parametrize("value", ["/a b/c", "it's", "a=b,c", "[1]{2}", "back\\slash", "a\\'b", "end\\\\"])
def test_a_quoted_path_reaches_a_stage_as_it_is(value: str) -> None:
    cfg = composed("train", f"weights={_quoted(value)}")
    assert OmegaConf.to_container(cfg)["weights"] == value  # type: ignore[index, call-overload]


def test_of_a_list_of_checkpoints_each_becomes_a_path_of_its_stage(tmp_path: Path) -> None:
    places = {"one": tmp_path / "one", "two": tmp_path / "it's, two"}
    stages = [Stage(name, place, ()) for name, place in places.items()]
    both = Stage("both", tmp_path, ("ckpt_path=[{one}/best.ckpt,{two}/best.ckpt]",), "evaluate")
    [written] = _written(both, [*stages, both], lambda stage: str(stage.directory))
    assert composed("evaluate", written).ckpt_path == [f"{place}/best.ckpt" for place in places.values()]


def test_a_recipe_is_not_started_by_one_of_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserInputError, match="run the stages one by one"):
        run_stages(recipe("mini/", tmp_path))


def test_nothing_is_begun_after_a_stage_that_ends_well_although_it_was_asked_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))", "os.kill(os.getppid(), signal.SIGTERM)")
    (tmp_path / "mmembed-evaluate").write_text("\n".join(["import os, signal, sys", *lines, "signal.pause()"]))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert run_program("evaluate", []) == TRY_AGAIN


def test_a_folder_that_no_stage_wrote_is_left_alone(tmp_path: Path) -> None:
    stage = Stage("random", tmp_path / "random", ("experiment=mm_embed/mini/random", "model.encoder.lora=null"))
    stage = Stage(stage.name, stage.directory, (*stage.overrides, "model.encoder.pretrained_model_name_or_path=x"))
    (tmp_path / "random").mkdir()
    (tmp_path / "random" / "thesis.txt").write_text("three years of work")
    with pytest.raises(UserInputError, match="holds something that no stage wrote"):
        run_stages([stage])
    assert (tmp_path / "random" / "thesis.txt").exists()


def test_a_stage_is_finished_as_long_as_configuration_outputs_and_start_are_as_they_were(tmp_path: Path) -> None:
    output, start = tmp_path / "checkpoints" / "best.ckpt", tmp_path / "weights.ckpt"
    output.parent.mkdir()
    output.write_bytes(b"trained")
    start.write_bytes(b"begun with")
    note = {"made_of": "a", "finished": True, "outputs": {"checkpoints/best.ckpt": file_sha256(output)}}
    note["starts"] = _starts(OmegaConf.create({"weights": str(start), "data": {"shards": ["/absent"]}}))
    (tmp_path / STAGE_FILE).write_text(json.dumps(note))
    assert is_finished(tmp_path, "a")
    assert not is_finished(tmp_path, "b")
    start.write_bytes(b"begun with another")
    assert not is_finished(tmp_path, "a")
    note["starts"] = {}
    (tmp_path / STAGE_FILE).write_text(json.dumps({**note, "finished": False}))
    assert not is_finished(tmp_path, "a")
    (tmp_path / STAGE_FILE).write_text(json.dumps(note))
    assert is_finished(tmp_path, "a")
    output.unlink()
    assert not is_finished(tmp_path, "a")


def test_a_start_is_pretrained_without_instructions(tiny_shards: Path) -> None:
    shards = Shards(tiny_shards)
    pool = shards.pool("train").ids.numpy()
    batches = TrainingBatches(shards, shards.query_rows("train"), pool, list, instructions=False)  # type: ignore[arg-type]
    entries: Any = batches[0, np.arange(8)].inputs
    assert [entry.instruction for entry in entries[:8]] == [None] * 8


# --- a user's own data ----------------------------------------------------------------------------------------------


def started(command: list[str], directory: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = str(Path(sysconfig.get_path("scripts")) / "mmembed-train")
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, script, *command], cwd=directory, stdout=file, stderr=subprocess.STDOUT, env=environment
        )


def finished(command: list[str], directory: Path) -> str:
    """Run to the end, and give what was printed."""
    log = directory / "log.txt"
    child = started(command, directory, log)
    try:
        assert child.wait(PATIENCE) == 0, log.read_text()[-3000:]
    finally:
        child.kill()
    return log.read_text()


def killed_in(stage: Path, command: list[str], directory: Path) -> None:
    """Start, and kill with SIGKILL when a stage has saved a checkpoint and is not finished."""
    child, end = started(command, directory, directory / "killed.txt"), time.monotonic() + PATIENCE
    try:
        while not (stage / "checkpoints" / "last.ckpt").exists():
            assert child.poll() is None, (directory / "killed.txt").read_text()[-3000:]
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not json.loads((stage / STAGE_FILE).read_text())["finished"]


@pytest.mark.slow
def test_a_user_s_own_data_goes_through_all_stages_killed_once_and_anew_where_a_setting_changes(tmp_path: Path) -> None:
    write_pets(tmp_path / "pets")
    birds(tmp_path / "birds")
    for name in ("pets", "birds"):
        shard(composed("shard", f"source={tmp_path / name}", f"out={tmp_path / 'shards' / name}"))
    command = [
        "experiment=mm_embed/all",
        "multimodal=[shards/pets]",
        "text=[shards/birds]",
        "model=tiny",
        "model.optimizer.lr=1e-3",
        "trainer=cpu",
        "hydra.run.dir=runs/pets",
        "model.encoder.corpus.shards=[shards/pets,shards/birds]",
        *(f"model.encoder.architecture.{name}={value}" for name, value in ARCHITECTURE.items()),
        "data.batch_size=4",
        "trainer.max_epochs=-1",
        "trainer.max_steps=6",
        "trainer.check_val_every_n_epoch=null",
        "trainer.val_check_interval=3",
        "callbacks.checkpoint_steps.every_n_train_steps=1",
        "callbacks.report=null",
        "~stages.joint",
        "~evaluations.multimodal",
    ]
    runs = tmp_path / "runs" / "pets"
    killed_in(runs / "hard", command, tmp_path)
    first = finished(command, tmp_path)
    assert "random: is finished" in first
    assert "hard: is finished" not in first
    for name in ("random", "hard", "continual"):
        assert json.loads((runs / name / STAGE_FILE).read_text())["outputs"].keys() == {"checkpoints/best.ckpt"}
        found = json.loads((runs / name / "text" / "metrics.json").read_text())
        assert found["union"]["tasks"].keys() == {"birds_task1"}
    assert re.search(r"continual +\S text +\S 13 ", first)

    (runs / "hard" / "checkpoints" / "best.ckpt").unlink()
    again = finished([*command, "~stages.continual"], tmp_path)
    assert again.count(": is finished") == 2
    assert "hard: some of checkpoints/best.ckpt is gone; it is run anew" in again

    changed = finished([*command, "~stages.hard", "~stages.continual", "loss.temperature=0.1"], tmp_path)
    assert "random: its configuration or what it starts from has changed; it is run anew" in changed
