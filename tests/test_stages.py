"""Recipes: stages run in order, go on where they were killed, and anew when what they start from changes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from fnmatch import fnmatchcase
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
from lightning_mmembed.programs import run_program
from lightning_mmembed.stages import (
    STAGE_FILE,
    UNIMPORTANT,
    Stage,
    _composed,
    _important,
    _leaves,
    _quoted,
    _starts,
    _written,
    is_finished,
    results_table,
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


@pytest.mark.parametrize(
    "path",
    sorted(set(CONF.rglob("*.yaml")) - set(CONF.glob("base/*"))),
    ids=lambda path: str(path.relative_to(CONF))[:-5],
)
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


def test_an_override_of_a_stage_is_of_that_stage_and_its_evaluations_alone_and_goes_last(tmp_path: Path) -> None:
    given = ["model.optimizer.lr=1e-3", "+stage.continual.model.optimizer.lr=2e-5", "+stage.hard.trainer=cpu"]
    given += ["+stage.hard.data.upsample={webqa: 2}", "model=tiny", "+stage.joint.model=llava_next"]
    given += ["+stage.joint.model.encoder.pretrained_model_name_or_path=m", "~callbacks.report"]
    stages = recipe("", tmp_path, *given)
    cfgs = {stage.name: _composed(stage, stages) for stage in stages}
    for name, cfg in cfgs.items():
        stage = name.partition("/")[0]
        assert cfg.model.optimizer.lr == (2e-5 if stage == "continual" else 1e-3), name
        assert cfg.trainer.accelerator == ("cpu" if stage == "hard" else "gpu"), name
        assert cfg.data.upsample == ({"webqa": 2} if stage == "hard" else None), name
        assert ("tiny" in cfg.model.encoder._target_) == (stage != "joint"), name
        assert not cfg.callbacks.get("report"), name


def test_an_override_of_a_stage_that_there_is_not_names_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="no stage 'continued'; write one of random, hard, continual, joint"):
        recipe("", tmp_path, "+stage.continued.seed=1")


def test_an_override_of_a_stage_without_a_key_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"\+stage.joint=null: write what it is to have"):
        recipe("", tmp_path, "+stage.joint=null")


def test_what_only_training_has_is_no_hindrance_to_the_evaluations(tmp_path: Path) -> None:
    given = ["+stage.random.weights=/x.ckpt", "debug=default", "~callbacks.watchdog", "~callbacks.report"]
    stages = recipe("", tmp_path, *given)
    for stage in stages:
        cfg = _composed(stage, stages)
        assert not cfg.callbacks.get("watchdog"), stage.name
        assert not cfg.callbacks.get("report"), stage.name
        if stage.program == "train":
            assert cfg.trainer.limit_train_batches == 3
            assert cfg.weights == ({"random": "/x.ckpt"}.get(stage.name, cfg.weights))


def test_a_recipe_of_one_s_own_reaches_its_stages_from_a_folder_of_one_s_own(tmp_path: Path) -> None:
    own = tmp_path / "my conf" / "experiment" / "mine"
    own.mkdir(parents=True)
    (own / "one.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: llava_next\n"
        "model:\n  encoder:\n    pretrained_model_name_or_path: /absent\n"
    )
    (own / "all.yaml").write_text("# @package _global_\nstages:\n  one: [experiment=mine/one, data=mini]\n")
    program = Path(sysconfig.get_path("scripts")) / "mmembed-train"
    for given in (["--config-dir", str(tmp_path / "my conf")], [f"hydra.searchpath=['file://{tmp_path}/my conf']"]):
        command = [sys.executable, str(program), *given, "experiment=mine/all", "data.source=/no/where"]
        done = subprocess.run(
            [*command, f"hydra.run.dir={tmp_path / 'run'}"], capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 2, done.stderr
        assert "Could not find" not in done.stderr
        assert "stage 1 of 1, one: ended with status 2" in done.stderr


def test_a_recipe_of_sharded_checkpoints_is_refused_before_its_first_stage(tmp_path: Path) -> None:
    given = ["trainer=fsdp2", "trainer.strategy.save_distributed_checkpoint=true"]
    with pytest.raises(UserInputError, match="the stages of a recipe start from one file"):
        run_stages(recipe("mini/", tmp_path, *given))


@pytest.mark.parametrize("path", sorted(CONF.rglob("all.yaml")), ids=lambda path: path.parent.name)
def test_every_command_at_the_head_of_a_recipe_composes_and_leaves_continual_its_low_rate(path: Path) -> None:
    head = path.read_text().partition("defaults:")[0].replace("\\\n#", "")
    commands = re.findall(r"^#   python train.py (.*)", head, re.MULTILINE)
    assert commands
    for command in commands:
        given = shlex.split(command)
        cfg = composed("train", *given, "paths.root_dir=.", "paths.output_dir=.")
        stages = stages_of(cfg, ".", given)
        cfgs = {stage.name: _composed(stage, stages) for stage in stages}
        rates = {name: cfg.model.optimizer.lr for name, cfg in cfgs.items()}
        assert rates["hard"] == rates["random"] == rates["joint"] == 5 * rates["continual"]
        for cfg in cfgs.values():
            _important(cfg)


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


# --- the programs ---------------------------------------------------------------------------------------------------

#: A training that writes its process number for its weights.
TRAINING = """
import os, pathlib, re, sys
directory = pathlib.Path(next(re.sub("^'|'$", "", a[14:]) for a in sys.argv if a.startswith("hydra.run.dir=")))
(directory / "checkpoints").mkdir(parents=True, exist_ok=True)
(directory / "checkpoints" / "best.ckpt").write_text(str(os.getpid()))
"""


def installed(directory: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Install programs as pip does with --user: the package's record in one folder, its scripts in another's bin/."""
    home = directory / "home"
    record = home / "lib" / "site-packages" / "lightning_mmembed-0.1.0.dist-info" / "RECORD"
    for place in (record.parent, home / "bin"):
        place.mkdir(parents=True)
    (record.parent / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning-mmembed\nVersion: 0.1.0\n")
    record.write_text("".join(f"../../bin/mmembed-{name},,\n" for name in programs))
    for name, content in programs.items():
        (home / "bin" / f"mmembed-{name}").write_text(content)
    monkeypatch.syspath_prepend(str(record.parents[1]))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_what_asks_a_recipe_to_end_reaches_its_stage_and_nothing_is_begun_after_it_though_it_ends_well(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (f"signal.signal(signal.{name}, lambda *_: sys.exit(0))", f"os.kill(os.getppid(), signal.{name})")
    program = "\n".join(["import os, signal, sys", *lines, "signal.pause()"])
    installed(tmp_path, monkeypatch, evaluate=program)
    assert run_program("evaluate", []) == TRY_AGAIN


def test_a_stage_that_the_terminal_interrupts_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tmp_path / "saved"
    lines = ("os.kill(os.getppid(), signal.SIGINT)", "time.sleep(1)", f"pathlib.Path({str(saved)!r}).touch()")
    program = "\n".join(["import os, pathlib, signal, time", *lines])
    installed(tmp_path, monkeypatch, evaluate=program)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    try:
        assert run_program("evaluate", []) == TRY_AGAIN
    finally:
        signal.signal(signal.SIGINT, before)
    assert saved.exists()


def test_a_program_is_found_where_it_was_installed_and_its_lack_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, monkeypatch, train="raise SystemExit(7)")
    assert run_program("train", ["no.such.key=1"]) == 7
    monkeypatch.setattr(sys, "path", sys.path[:1])
    (tmp_path / "home" / "bin" / "mmembed-train").unlink()
    for program in ("train", "evaluate"):  # recorded and gone, and not recorded
        with pytest.raises(UserInputError, match=f"^mmembed-{program}, .* is not installed; install the package"):
            run_program(program, ["no.such.key=1"])


# --- what is finished -----------------------------------------------------------------------------------------------


def random_stage(directory: Path, *overrides: str) -> Stage:
    common = ("experiment=mm_embed/mini/random", "model.encoder.pretrained_model_name_or_path=start")
    return Stage("random", directory / "runs" / "random", (*common, *overrides))


def test_a_finished_stage_is_left_as_it_is_where_a_setting_changes_that_no_figure_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(tmp_path, monkeypatch, train=TRAINING)
    run_stages([random_stage(tmp_path)])
    capsys.readouterr()
    unimportant = {
        "data.num_workers": 2,
        "callbacks.evaluation.num_workers": 1,
        "callbacks.watchdog.timeout": 7,
        "callbacks.progress": "null",
        "callbacks.checkpoint_steps.every_n_train_steps": 5,
        "callbacks.report.queries_per_task": 1,
        "callbacks.preemption": "null",
        "optimized_metric": "val/union/hit@5",
        "trainer.log_every_n_steps": 3,
    }
    run_stages([random_stage(tmp_path, *(f"{key}={value}" for key, value in unimportant.items()))])
    assert "is finished" in capsys.readouterr().out
    monkeypatch.chdir("/")  # nor does it depend on where the command is given
    run_stages([random_stage(tmp_path)])
    assert "is finished" in capsys.readouterr().out


def test_all_that_is_held_unimportant_is_in_the_configuration_of_a_stage() -> None:
    content = OmegaConf.to_container(composed("train", "paths.root_dir=.", "paths.output_dir=."), resolve=True)
    keys = [f"{key}." for key, _ in _leaves(content)]
    for pattern in UNIMPORTANT:
        assert any(fnmatchcase(key, f"{pattern}.*") for key in keys), pattern


def test_what_is_run_anew_is_kept_beside_it_and_said_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(tmp_path, monkeypatch, train=TRAINING)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "model.safetensors").write_bytes(b"begun with")
    place = tmp_path / "runs" / "random"
    made = []

    def run(*overrides: str) -> str:
        """Run the stage, and give what was said to have changed."""
        run_stages([random_stage(tmp_path, *overrides)])
        made.append((place / "checkpoints" / "best.ckpt").read_bytes())
        said = re.search(r": changed since it was run: (.*); it is run anew, (.*)", capsys.readouterr().out)
        assert said is None or said[2] == f"and what was there is kept in {place}.old-{len(made) - 1}"
        return "" if said is None else said[1]

    later = ("data.batch_size=3", "data.upsample={edis: 2}")
    assert run() == ""
    assert run(*later) == "data.batch_size, data.upsample.edis"
    (place / "checkpoints" / "best.ckpt").write_bytes(made[1][:-1])  # cut short
    assert run(*later) == "checkpoints/best.ckpt"
    (tmp_path / "start" / "model.safetensors").write_bytes(b"begun with another")
    assert run(*later) == "start"
    assert run(*later) == ""
    kept = [Path(f"{place}.old-{number}") / "checkpoints" / "best.ckpt" for number in (1, 2, 3)]
    assert [path.read_bytes() for path in kept] == [made[0], made[1][:-1], made[2]]
    assert len(set(made)) == 4  # and a stage that was finished


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
    settings = {"seed": 1, "weights": None}
    note: dict[str, Any] = {"settings": settings, "finished": True}
    note["outputs"] = {"checkpoints/best.ckpt": file_sha256(output)}
    note["starts"] = _starts(OmegaConf.create({"weights": str(start), "data": {"shards": ["/absent"]}}))
    (tmp_path / STAGE_FILE).write_text(json.dumps(note))
    assert is_finished(tmp_path, settings)
    assert is_finished(tmp_path, {"seed": 1, "of a later version": None})
    assert not is_finished(tmp_path, {"seed": 2})
    start.write_bytes(b"begun with another")
    assert not is_finished(tmp_path, settings)
    start.unlink()
    assert is_finished(tmp_path, settings)
    (tmp_path / STAGE_FILE).write_text(json.dumps({**note, "finished": False}))
    assert not is_finished(tmp_path, settings)
    (tmp_path / STAGE_FILE).write_text(json.dumps({**note, "settings": {}}))
    assert not is_finished(tmp_path, settings)
    (tmp_path / STAGE_FILE).write_text(json.dumps(note))
    assert is_finished(tmp_path, settings)
    output.write_bytes(b"train")
    assert not is_finished(tmp_path, settings)
    output.unlink()
    assert not is_finished(tmp_path, settings)


def shards_written(directory: Path, fingerprint: str) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "manifest.json").write_text(json.dumps({"fingerprint": fingerprint}))
    return str(directory)


def test_training_data_that_changed_is_noticed_wherever_a_configuration_names_it(tmp_path: Path) -> None:
    names = ("a", "b", "c", "d", "one", "of a list")
    shards = {name: shards_written(tmp_path / name, "before") for name in names}
    files = {name: tmp_path / f"{name}.parquet" for name in ("negatives", "soft_labels", "given")}
    source, weights = tmp_path / "source", tmp_path / "nv_embed"
    for path in (*files.values(), source / "query" / "train" / "queries.jsonl", weights / "model.safetensors"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    data = {
        "shards": {"_target_": "builtins.sum", "_args_": [[[shards["a"]], [shards["b"]]], []]},
        "negatives": str(files["negatives"]),
        "soft_labels": str(files["soft_labels"]),
    }
    made = [{"_target_": "shards_of", "source": {"_target_": "made", "out": str(source)}, "out": shards["c"]}]
    configurations = [
        {"data": data, "model": {"encoder": {"nv_embed": str(weights), "corpus": {"shards": [shards["d"]]}}}},
        {"data": {"shards": made}},
        {"data": {"shards": shards["one"], "negatives": [str(files["given"])]}},
        {"data": {"shards": [shards["of a list"]]}},
    ]
    starts: dict[str, str] = {}
    for cfg in configurations:
        starts |= _starts(OmegaConf.create(cfg))
    assert starts.keys() == {*shards.values(), *map(str, files.values()), str(source), str(weights)}
    (tmp_path / STAGE_FILE).write_text(json.dumps({"settings": {}, "finished": True, "outputs": {}, "starts": starts}))
    for name in names:  # merely touched
        os.utime(tmp_path / name / "manifest.json", (1, 1))
    (source / "images").mkdir()
    (source / "images" / "1.jpg").write_text("no picture is looked at")
    assert is_finished(tmp_path, {})
    changes = [tmp_path / name / "manifest.json" for name in names]
    changes += [*files.values(), source / "query" / "train" / "queries.jsonl", weights / "model.safetensors"]
    for path in changes:
        before = path.read_text(), path.stat().st_mtime_ns
        path.write_text(before[0].replace("before", "afterwards"))
        assert not is_finished(tmp_path, {}), path
        path.write_text(before[0])
        os.utime(path, ns=(before[1], before[1]))
        assert is_finished(tmp_path, {}), path


@pytest.mark.parametrize("place", ["paths.root_dir={0}", "paths.data_dir={0}/data"])
def test_data_of_another_root_is_noticed(place: str, tmp_path: Path) -> None:
    shards = shards_written(tmp_path / "data", "before")
    given = ("experiment=mm_embed/mini/random", "model.encoder.pretrained_model_name_or_path=x")
    given += (place.format(tmp_path), "data.shards=${paths.data_dir}")
    stage = Stage("random", tmp_path / "random", given)
    assert _starts(_composed(stage, [stage], elsewhere=False)) == {shards: "before"}
    elsewhere = replace(stage, overrides=(*given, "paths.root_dir=/other"))
    assert _important(_composed(stage, [stage])) == _important(_composed(elsewhere, [stage]))


def test_a_table_of_results_leaves_open_what_was_not_measured(tmp_path: Path) -> None:
    stage = Stage("random/mini", tmp_path / "random" / "mini", (), "evaluate")
    stage.directory.mkdir(parents=True)
    metrics = {"protocol": {"queries": 5}, "union": {"average": {"hit@5": 0.5}}}
    (stage.directory / "metrics.json").write_text(json.dumps(metrics))
    columns = [list(column.cells) for column in results_table([stage]).columns]
    assert columns == [["random"], ["mini"], ["5"], ["50.0"], *[["\N{EN DASH}"]] * 3]


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
        "+stage.continual.model.optimizer.lr=2e-4",
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
        rate = OmegaConf.load(runs / name / "config.yaml").model.optimizer.lr
        assert rate == (2e-4 if name == "continual" else 1e-3)
        assert json.loads((runs / name / STAGE_FILE).read_text())["outputs"].keys() == {"checkpoints/best.ckpt"}
        found = json.loads((runs / name / "text" / "metrics.json").read_text())
        assert found["union"]["tasks"].keys() == {"birds_task1"}
    assert re.search(r"continual +\S text +\S 13 ", first)

    (runs / "hard" / "checkpoints" / "best.ckpt").unlink()
    command.remove("+stage.continual.model.optimizer.lr=2e-4")
    again = finished([*command, "~stages.continual"], tmp_path)
    assert again.count(": is finished") == 2
    assert "hard: changed since it was run: checkpoints/best.ckpt; it is run anew" in again
    assert (runs / "hard.old-1" / "text" / "metrics.json").is_file()

    changed = finished([*command, "~stages.hard", "~stages.continual", "loss.temperature=0.1"], tmp_path)
    assert "random: changed since it was run: loss.temperature, model.loss.temperature; it is run anew" in changed
