"""The stages of a recipe: runs that start from each other, each a process of its own, in order.

A stage that is finished and valid is left as it is, one that was killed goes on, and one whose configuration or start
has changed since is run anew; what was there is moved aside. What it was run with is in ``stage.json`` in its run
directory.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import file_sha256, fingerprint, read_json, write_atomically
from lightning_mmembed.programs import run_program
from lightning_mmembed.retrieval.table import MISSING

STAGE_FILE = "stage.json"
#: What may come out of a stage, in its run directory.
OUTPUTS = ("checkpoints/best.ckpt", "encoder/model.safetensors", "metrics.json")
#: Keys and nodes of a configuration that no figure depends on.
UNIMPORTANT = (
    *("paths", "extras", "logger", "tags", "task_name", "optimized_metric", "trainer.log_every_n_steps"),
    *("callbacks.checkpoint_steps", "callbacks.preemption", "callbacks.progress", "callbacks.report"),
    *("callbacks.watchdog", "callbacks.evaluation.vectors_dir", "*.num_workers"),
)
#: Those that name what a run starts from.
STARTS = (
    *("weights", "ckpt_path", "callbacks.mining.ckpt_path", "rerank.pretrained_model_name_or_path"),
    *("data.shards", "data.source", "data.negatives", "data.soft_labels", "model.encoder.corpus"),
    *("model.encoder.pretrained_model_name_or_path", "model.encoder.llava_next", "model.encoder.nv_embed"),
)
#: Pictures of a source are not looked at, as where its shards are made: they may be millions.
_PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_SHOWN = 5  # of what has changed

#: Overrides of a recipe, which its stages have values of their own for.
_OF_RECIPE = ("experiment=", "stages", "evaluations", "hydra.run.dir=", "ckpt_path=", "test=", "stage.")
#: Keys and groups of a training, which an evaluation has not.
_OF_TRAINING = ("train=", "save_encoder=", "mining=", "optimized_metric=", "debug=")


@dataclass(frozen=True)
class Stage:
    """A run of one of the programs.

    Args:
        name: What later stages call it.
        directory: Its run directory.
        overrides: As on the command line; ``{name}`` stands for the run directory of an earlier stage.
        program: ``"train"`` or ``"evaluate"``.
    """

    name: str
    directory: Path
    overrides: tuple[str, ...]
    program: str = "train"


def stages_of(cfg: DictConfig, directory: str | Path, given: Sequence[str]) -> list[Stage]:
    """The stages that a configuration names, each followed by its evaluations.

    Args:
        cfg: With ``stages``, by name overrides of ``train``, and ``evaluations``, by name overrides of ``evaluate``.
        directory: Where each stage gets a folder of its name.
        given: Overrides of the command line, which every run gets, but for those of the recipe itself and those of a
            stage, ``+stage.<name>.<override>``, which that stage and its evaluations get, after all others.

    Raises:
        UserInputError: If an override is of a stage that there is not, or of no key.
    """
    recipe = OmegaConf.to_container(OmegaConf.masked_copy(cfg, ["stages", "evaluations"]), resolve=False)
    assert isinstance(recipe, dict)
    of_all = [override for override in given if not override.lstrip("+~").startswith(_OF_RECIPE)]
    of_one = [override.lstrip("+").split(".", 2)[1:] for override in given if override.lstrip("+").startswith("stage.")]
    for name, *others in of_one:
        if not others:
            raise UserInputError(f"+stage.{name}: write what it is to have, such as +stage.random.data.batch_size=64")
        override = others[0]
        if name not in recipe["stages"]:
            names = ", ".join(recipe["stages"])
            raise UserInputError(f"+stage.{name}.{override}: the recipe has no stage {name!r}; write one of {names}")
    stages = []
    for name, overrides in recipe["stages"].items():
        theirs = [override for one, override in of_one if one == name]
        stage = Stage(str(name), Path(directory) / str(name), (*overrides, *of_all, *theirs))
        stages += [stage, *(evaluation(stage, str(n), more) for n, more in (recipe["evaluations"] or {}).items())]
    return stages


def evaluation(stage: Stage, name: str, overrides: Sequence[str]) -> Stage:
    """The evaluation of what a stage has trained; of its start, where it trains nothing."""
    kept = [override for override in stage.overrides if not override.startswith(_OF_TRAINING)]
    trained = [] if "train=false" in stage.overrides else [f"ckpt_path={_reference(stage)}/checkpoints/best.ckpt"]
    # An evaluation has not all that a training has: what it lacks is added, and not looked at.
    known = [re.sub(r"^~(callbacks\.\w+)(=.*)?$", r"\1=null", one) for one in (*kept, *overrides)]
    known = [f"++{one}" if re.match(r"(?!hydra)\w+\.|weights=", one) else one for one in known]
    return Stage(f"{stage.name}/{name}", stage.directory / name, (*known, *trained), "evaluate")


def run_stages(stages: Sequence[Stage]) -> None:
    """Run what is not finished, in order.

    Args:
        stages: The stages; all configurations are composed before the first is run.

    Raises:
        UserInputError: If a configuration lacks a value, or the directory of a stage holds something else.
        SystemExit: If a run failed, with its status.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise UserInputError(
            "stages=... starts a process for each stage, and this one is already one of several: run the stages one by "
            "one, as the heads of their files in conf/experiment say, or start the recipe without torchrun and srun"
        )
    composed = {stage.name: _composed(stage, stages) for stage in stages}
    as_run = {stage.name: _composed(stage, stages, elsewhere=False) for stage in stages}
    for stage in stages:
        if OmegaConf.select(as_run[stage.name], "trainer.strategy.save_distributed_checkpoint"):
            raise UserInputError(
                "trainer.strategy.save_distributed_checkpoint=true writes folders, from which only a fit can be "
                "resumed; the stages of a recipe start from one file: leave it false"
            )
    for number, stage in enumerate(stages, 1):
        title = f"stage {number} of {len(stages)}, {stage.name}"
        settings = _important(composed[stage.name])
        settings |= {_reference(other): _outputs(other.directory) for other in stages if _refers(stage, other)}
        if is_finished(stage.directory, settings):
            print(f"{title}: is finished, in {stage.directory}", flush=True)
            continue
        _make_room(stage, title, settings)
        note = {"finished": False, "settings": settings, "starts": _starts(as_run[stage.name]), "outputs": {}}
        write_atomically(stage.directory / STAGE_FILE, json.dumps(note, indent=1))
        _run(stage, title, stages)
        if stage.program == "train" and not _outputs(stage.directory):
            raise UserInputError(
                f"{title}: no checkpoints/best.ckpt was written: no validation took place in as many steps; raise "
                "trainer.max_epochs or trainer.max_steps, or lower trainer.val_check_interval"
            )
        note |= {"finished": True, "starts": _starts(as_run[stage.name]), "outputs": _outputs(stage.directory)}
        write_atomically(stage.directory / STAGE_FILE, json.dumps(note, indent=1))


def is_finished(directory: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a stage is finished there, and configuration, starts and outputs are as they were then.

    Args:
        directory: Its run directory.
        settings: The keys of its configuration that matter, and the hashes of what it has from earlier stages.
    """
    note = read_json(directory / STAGE_FILE)
    return note is not None and note["finished"] and not _changes(directory, note, settings)


def _changes(directory: Path, note: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Keys, starts and outputs of a stage that are not as its note says."""
    before, found = note.get("settings", {}), _outputs(directory)
    keys = [key for key in sorted({*before, *settings}) if before.get(key) != settings.get(key)]
    # What is gone has not changed: data may be deleted, or lie elsewhere as seen from another working directory.
    places = [one for one, state in note["starts"].items() if Path(one).exists() and _state(Path(one)) != state]
    return [*keys, *places, *(name for name, digest in note["outputs"].items() if found.get(name) != digest)]


def _make_room(stage: Stage, title: str, settings: Mapping[str, Any]) -> None:
    """Move aside what was made with another configuration, from another start or not whole; what was killed stays."""
    note, directory = read_json(stage.directory / STAGE_FILE), stage.directory
    if note is None:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UserInputError(
                f"{directory} holds something that no stage wrote; move it away, or give another hydra.run.dir"
            )
    elif changed := _changes(directory, note, settings):
        places = (directory.with_name(f"{directory.name}.old-{number}") for number in itertools.count(1))
        old = next(place for place in places if not place.exists())
        directory.rename(old)
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        print(
            f"{title}: changed since it was run: {', '.join(changed[:_SHOWN])}{more}; it is run anew, and what was "
            f"there is kept in {old}",
            flush=True,
        )


def _run(stage: Stage, title: str, stages: Sequence[Stage]) -> None:
    arguments = _written(stage, stages, lambda other: str(other.directory.resolve()))
    arguments += [f"hydra.run.dir={_quoted(str(stage.directory.resolve()))}"]
    if stage.program == "train":
        arguments += ["ckpt_path=last", "test=false"]
    print(f"{title}: mmembed-{stage.program} {shlex.join(arguments)}", flush=True)
    status = run_program(stage.program, arguments)
    if status != 0:
        print(f"{title}: ended with status {status}; the same command goes on", file=sys.stderr, flush=True)
        raise SystemExit(status)


def _reference(stage: Stage) -> str:
    return f"{{{stage.name}}}"


def _refers(stage: Stage, other: Stage) -> bool:
    return any(_reference(other) in override for override in stage.overrides)


def _quoted(value: str) -> str:
    """A value that Hydra takes as it is."""
    if re.fullmatch(r"[\w./-]+", value):
        return value
    before_quotes = re.sub(r"(\\+)('|$)", r"\1\1\2", value)  # elsewhere a backslash is one
    return "'" + before_quotes.replace("'", "\\'") + "'"


def _written(stage: Stage, stages: Sequence[Stage], place: Callable[[Stage], str]) -> list[str]:
    """The overrides of a stage with places for the stages that they refer to."""
    written = []
    for override in stage.overrides:
        key, equals, value = override.partition("=")
        parts = re.split(r"([\[\],])", value)  # of a list, each may refer to another stage
        for n, part in enumerate(parts):
            for other in stages:
                parts[n] = parts[n].replace(_reference(other), place(other))
            if parts[n] != part:
                parts[n] = _quoted(parts[n])
        written.append(f"{key}{equals}{''.join(parts)}")
    return written


def _composed(stage: Stage, stages: Sequence[Stage], elsewhere: bool = True) -> DictConfig:
    """A stage's configuration, in which other stages are known by their names.

    Args:
        stage: The stage.
        stages: All of them.
        elsewhere: The same from every working directory and root, to be compared; otherwise as it is run.
    """
    overrides = _written(stage, stages, lambda other: f"<{other.name}>")
    root = ["paths.root_dir=."]  # an override that comes later is the one that holds
    overrides = [*overrides, *root] if elsewhere else [*root, *overrides]
    overrides.append("paths.output_dir=.")
    if GlobalHydra.instance().is_initialized():
        return compose(stage.program, overrides)
    with initialize_config_module("lightning_mmembed.conf", version_base="1.3"):
        return compose(stage.program, overrides)


def _important(cfg: DictConfig) -> dict[str, Any]:
    """What of a configuration the figures depend on: keys such as ``data.batch_size`` with their values."""
    content = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return {key: value for key, value in _leaves(content) if not _is_within(key, UNIMPORTANT)}


def _is_within(key: str, nodes: Sequence[str]) -> bool:
    return any(fnmatchcase(f"{key}.", f"{node}.*") for node in nodes)


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested mappings and lists, and the keys that lead to them."""
    inner = node if isinstance(node, dict) else dict(enumerate(node)) if isinstance(node, list) else {}
    for name, value in inner.items():
        yield from _leaves(value, f"{key}.{name}" if key else str(name))
    if not inner:
        yield key, node


def _outputs(directory: Path) -> dict[str, str]:
    return {name: file_sha256(directory / name) for name in OUTPUTS if (directory / name).is_file()}


def _starts(cfg: DictConfig) -> dict[str, str]:
    """The state of the files and folders that a configuration starts from and that are there."""
    leaves = _leaves(OmegaConf.to_container(cfg, resolve=True))
    named = {value for key, value in leaves if isinstance(value, str) and _is_within(key, STARTS)}
    return {place: _state(Path(place)) for place in sorted(named) if place and Path(place).exists()}


def _state(place: Path) -> str:
    """Changes with what shards hold; otherwise with size or time of a file, or of one in a folder."""
    manifest = read_json(place / "manifest.json")
    if isinstance(manifest, dict) and "fingerprint" in manifest:
        return str(manifest["fingerprint"])
    inside = (one for one in place.rglob("[!.]*") if one.suffix.lower() not in _PICTURES and one.is_file())
    stats = [(str(file.relative_to(place)), file.stat()) for file in ([place] if place.is_file() else sorted(inside))]
    return fingerprint([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def results_table(stages: Sequence[Stage]) -> Table:
    """What the evaluations found: a row each."""
    columns = {"hit@5": "union", "modality@1": "union", "ndcg@10": "union", "local hit@5": "local"}
    table = Table("stage", "data", "queries", *columns, title="Union pool, all tasks alike, in %")
    for stage in stages:
        metrics = read_json(stage.directory / "metrics.json")
        if stage.program != "evaluate" or metrics is None:
            continue
        averages = {pool: metrics.get(pool, {}).get("average", {}) for pool in columns.values()}
        values = [averages[pool].get(name.rpartition(" ")[2]) for name, pool in columns.items()]
        cells = (MISSING if value is None else f"{100 * value:.1f}" for value in values)
        name, _, title = stage.name.rpartition("/")
        table.add_row(name, title, str(metrics["protocol"]["queries"]), *cells)
    return table
