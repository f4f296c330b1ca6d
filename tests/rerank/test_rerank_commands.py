"""``mmembed-rerank`` and ``evaluate.py rerank=...``: from a run to a better one, resumed and shared out."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from worlds import ARCHITECTURE, tiny_module, tiny_trainer

from lightning_mmembed import ZeroShotReranker, cli
from lightning_mmembed.cli import evaluate, train, user_error
from lightning_mmembed.cli_mine import mine
from lightning_mmembed.cli_rerank import rerank, show
from lightning_mmembed.data import Shards
from lightning_mmembed.data.negatives import write_negatives
from lightning_mmembed.data.soft_labels import SoftLabels
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.rerank import ScoreStore, zero_shot

TASKS = ["pets_task0", "pets_task1", "pets_task3", "pets_task7"]
#: The command as a file: a second process is started with the same command line, which `python -c` has not.
MAIN = """
import sys
sys.path[:0] = [{root!r}]
from lightning_mmembed.cli_rerank import rerank_main
{before}
rerank_main()
"""


@pytest.fixture(scope="module")
def world(
    tiny_shards: Path, answering_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Overrides of a small dataset and a small model, and run directories ``test`` and ``val`` of an evaluation."""
    root = tmp_path_factory.mktemp("reranked")
    shared = [
        *("data=mbeir", "dataset=pets", "data.source=null", f"data.shards={tiny_shards}", f"paths.root_dir={root}"),
        *("rerank.dtype=float32", f"rerank.pretrained_model_name_or_path={answering_checkpoint('llava_next')}"),
    ]
    for split in ("test", "val"):
        size = [f"model.encoder.architecture.{name}={value}" for name, value in ARCHITECTURE.items()]
        where = [f"paths.output_dir={root / split}", f"split={split}", f"paths.root_dir={root}"]
        evaluate(composed("evaluate", *shared[:4], *size, *where))
    return shared


def root_of(world: list[str]) -> Path:
    return Path(next(one for one in world if one.startswith("paths.root_dir=")).partition("=")[2])


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_module("lightning_mmembed.conf", version_base="1.3"):
        return compose(name, list(overrides))


def settings(world: list[str], out: Path, *overrides: str) -> list[str]:
    scores = [] if any(one.startswith("scores_dir=") for one in overrides) else [f"scores_dir={out}/scores"]
    cpu = "fabric.accelerator=cpu"
    return [*world, f"run={root_of(world)}/test", f"paths.output_dir={out}", cpu, *scores, *overrides]


def runs_of(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in sorted(directory.rglob("*.run"))}


def test_a_run_is_reranked_and_told_before_and_after(
    world: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = rerank(composed("rerank", *settings(world, tmp_path, f"soft_labels={tmp_path}/labels.parquet")))
    assert made is not None
    printed = capsys.readouterr().out
    assert re.search(r"to be scored: [\d,]+ pairs, some [\d,]+ tokens and \d:\d\d:\d\d by a probe", printed)
    assert all(task in printed for task in TASKS)
    before, after = runs_of(root_of(world) / "test" / "runs"), runs_of(tmp_path / "runs")
    assert before.keys() == after.keys()
    for name, text in after.items():
        old, new = (_lists(content) for content in (before[name], text))
        assert old.keys() == new.keys()
        for qid, dids in new.items():
            assert sorted(dids[:10]) == sorted(old[qid][:10])
            assert dids[10:] == old[qid][10:]
    assert before != after
    content = json.loads((tmp_path / "reranking.json").read_text())
    assert content["tasks"] == TASKS
    assert content["split"] == "test"
    assert pq.read_schema(tmp_path / "labels.parquet").metadata[b"split"] == b"test"
    assert content["pairs"]["scored"] == len(made.scores) == pq.read_table(tmp_path / "labels.parquet").num_rows
    figures = content["effects"]["union"]["pets_task3"]
    metrics = json.loads((root_of(world) / "test" / "metrics.json").read_text())
    assert figures["before"] == metrics["union"]["tasks"]["pets_task3"]["hit@1"]
    assert figures["value"] == pytest.approx(figures["after"] - figures["before"])


def _lists(content: str) -> dict[str, list[str]]:
    lists: dict[str, list[str]] = {}
    for qid, _, did, *_ in map(str.split, content.splitlines()):
        lists.setdefault(qid, []).append(did)
    return lists


def test_a_second_run_finds_every_score_and_writes_the_same(world: list[str], tmp_path: Path) -> None:
    where = f"scores_dir={tmp_path}/scores"
    first = rerank(composed("rerank", *settings(world, tmp_path / "1", where)))
    second = rerank(composed("rerank", *settings(world, tmp_path / "2", where)))
    assert first is not None
    assert second is not None
    assert (second.counts["scored"], second.counts["found"]) == (0, len(first.scores))
    assert runs_of(tmp_path / "1") == runs_of(tmp_path / "2")


def test_tasks_are_chosen_by_the_validation_split_and_kept(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A reranker that knows the answers of two tasks and is wrong on purpose on the others.
    def score_pairs(self: ZeroShotReranker, pairs: object) -> object:
        raise AssertionError("the scores below are used")

    def score(self: ZeroShotReranker, query: object, candidates: list[object], task: object = None) -> object:
        import torch

        right = [candidate.did in query.positives for candidate in candidates]  # type: ignore[attr-defined]
        known = query.task.task_id in (0, 3)  # type: ignore[attr-defined]
        return torch.tensor([float(one == known) for one in right])

    monkeypatch.setattr(ZeroShotReranker, "score_pairs", score_pairs)
    monkeypatch.setattr(ZeroShotReranker, "score", score)
    auto = ("tasks=auto", f"val_run={root_of(world)}/val", "depth=40")
    made = rerank(composed("rerank", *settings(world, tmp_path, *auto)))
    assert made is not None
    assert made.tasks == ["pets_task0", "pets_task3"]
    content = json.loads((tmp_path / "reranking.json").read_text())
    assert content["tasks"] == made.tasks
    assert content["choice"]["effects"]["union"]["pets_task0"]["low"] > 0
    before, after = runs_of(root_of(world) / "test" / "runs"), runs_of(tmp_path / "runs")
    for task in TASKS:
        same = before[f"union/{task}.run"].replace("mmembed", "reranked") == after[f"union/{task}.run"]
        assert same == (task not in made.tasks)


def test_an_evaluation_reranks_as_the_command_reranks_its_run(world: list[str], tmp_path: Path) -> None:
    size = [f"model.encoder.architecture.{name}={value}" for name, value in ARCHITECTURE.items()]
    where = [f"paths.output_dir={tmp_path / 'run'}", f"reranking.scores_dir={tmp_path / 'scores'}"]
    _, objects = evaluate(composed("evaluate", *world[:5], "rerank=llava_next", *world[5:], *size, *where))
    command = rerank(composed("rerank", *settings(world, tmp_path / "command")))
    assert command is not None
    assert objects["reranked"].counts == command.counts
    assert runs_of(tmp_path / "run" / "reranked" / "runs") == runs_of(tmp_path / "command" / "runs")


def test_an_evaluation_chooses_the_tasks_by_the_validation_split(world: list[str], tmp_path: Path) -> None:
    size = [f"model.encoder.architecture.{name}={value}" for name, value in ARCHITECTURE.items()]
    where = [f"paths.output_dir={tmp_path / 'run'}", f"reranking.scores_dir={tmp_path / 'scores'}"]
    auto = ["rerank=llava_next", *world[5:], "reranking.tasks=auto", "reranking.val_queries=2"]
    evaluate(composed("evaluate", *world[:5], *auto, *size, *where))
    within = json.loads((tmp_path / "run" / "reranked" / "reranking.json").read_text())
    given = ["tasks=auto", "val_queries=2", f"val_run={root_of(world)}/val"]
    rerank(composed("rerank", *settings(world, tmp_path / "command", *given)))
    command = json.loads((tmp_path / "command" / "reranking.json").read_text())
    assert within["choice"] == command["choice"]
    assert within["effects"] == command["effects"]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["protocol"]["split"] == "test", "the evaluation is of the split that was asked for"


def test_positives_and_mined_negatives_are_scored_to_distil_from(world: list[str], tmp_path: Path) -> None:
    shards = Shards(next(one for one in world if one.startswith("data.shards=")).partition("=")[2])
    rows, pool = shards.query_rows("train"), shards.pool("train")
    qids = shards.query_ids(rows)[:3]
    wrong = [int(did) for did in pool.ids[-4:]]
    columns = {"qid": [int(qid) for qid in qids for _ in wrong], "did": wrong * 3}
    columns |= {"kind": [0, 0, 1, 1] * 3, "rank": [1, 2, 45, 46] * 3, "score": [0.5] * 12}
    made_of = {"pool": shards.pool_fingerprint("train")}
    negatives = write_negatives(tmp_path / "negatives.parquet", columns, made_of, {})
    labels = tmp_path / "labels.parquet"
    given = settings(world, tmp_path, f"negatives={negatives}", f"soft_labels={labels}")
    assert rerank(composed("rerank", *[one for one in given if not one.startswith("run=")])) is None
    read = pq.read_table(labels).to_pydict()
    scored = set(zip(read["qid"], read["did"], strict=True))
    expected = {
        (int(qid), did)
        for qid, positives in zip(shards.query_ids(rows), shards.positives(rows), strict=True)
        for did in [*positives, *(wrong if qid in qids else [])]
    }
    assert scored == expected
    assert all(0 <= score <= 1 for score in read["score"])
    SoftLabels(labels, shards.fingerprint)


def test_the_commands_of_the_guide_lead_from_mining_to_distillation(
    world: list[str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    best, trainer = tmp_path / "best.ckpt", tiny_trainer(tmp_path)
    trainer.strategy.connect(tiny_module(tiny_checkpoint))
    trainer.save_checkpoint(best)
    guide = (Path(__file__).parents[2] / "docs" / "reranking.md").read_text().partition("## 4.")[2]
    block = guide.split("```")[1].replace("\\\n", "").replace("best.ckpt", str(best)).replace("data/", f"{tmp_path}/")
    mining, scoring, training = (line.split() for line in block.splitlines()[1:])
    model = [f"model.encoder.pretrained_model_name_or_path={tiny_checkpoint}", "model.encoder.max_length=48"]
    data = [*world[:4], "model=llava_next", *model, f"paths.root_dir={tmp_path}"]
    cpu = "fabric.accelerator=cpu"
    mine(composed("mine", *data, *mining[1:], cpu, "mining.k=9", "mining.k_prime=3"))
    given = [one for one in settings(world, tmp_path) if not one.startswith("run=")]
    assert rerank(composed("rerank", *given, *scoring[1:])) is None
    short = ["trainer.max_epochs=1", "data.batch_size=8", "test=false", f"paths.output_dir={tmp_path}/run"]
    metrics, _ = train(composed("train", *data, *training[2:], *short))
    assert metrics["train/share_with_teacher"] == 1
    assert metrics["train/loss"] > 0


def test_the_prompt_of_a_task_is_shown_without_weights(
    world: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model"
    shutil.copytree(world[-1].partition("=")[2], path)
    (path / "model.safetensors").unlink()
    prompt = show(composed("show", "task=cirr_task7", f"rerank.pretrained_model_name_or_path={path}"))
    assert prompt == (
        "[INST] [instruction]\nImage and the change to it: <image>\n[text of the query]\nChanged image: <image>\n"
        "Does the last image show the first one with the change? True or False [/INST]"
    )
    assert prompt in capsys.readouterr().out
    shown = show(composed("show", "task=webqa_task1", f"rerank.pretrained_model_name_or_path={path}"))
    assert "<image>" not in shown
    with pytest.raises(UserInputError, match="task='nothing' is no task name"):
        show(composed("show", "task=nothing", f"rerank.pretrained_model_name_or_path={path}"))


def test_the_wording_of_a_task_is_shown_where_its_checkpoint_is_out_of_reach(
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompt = show(composed("show", "task=cirr_task7", "rerank.pretrained_model_name_or_path=nobody/nothing"))
    assert prompt == (
        "[instruction]\nImage and the change to it: <image>\n[text of the query]\nChanged image: <image>\n"
        "Does the last image show the first one with the change? True or False"
    )
    captured = capsys.readouterr()
    assert prompt in captured.out
    assert "checkpoint 'nobody/nothing' cannot be read" in captured.err
    with pytest.raises(UserInputError, match="task='nothing' is no task name"):
        show(composed("show", "task=nothing", "rerank.pretrained_model_name_or_path=nobody/nothing"))


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["run=null"], "give run=<TREC run"),
        (["run={root}/nothing"], "nothing' is neither a file"),
        (["tasks=[cirr_task7]"], "are unknown; those that are ranked are pets_task0"),
        (["tasks=pets_task0"], "tasks='pets_task0' is unknown; write a list"),
        (["tasks=auto"], "needs val_run="),
        (["tasks=auto", "split=val"], "chooses by the validation split"),
        (["split=val"], "test' is of the test split"),
        (["run={root}/test/runs", "split=val"], "is of the test split"),
        (["run={root}/test/runs/union/pets_task3.run", "split=val"], "is of the test split"),
        (["tasks=auto", "val_run={root}/test"], "test' is of the test split"),
        (["tasks=auto", "val_run={root}/val", "val_queries=0"], "val_queries=0"),
        (["max_pairs=-1"], "max_pairs=-1"),
        (["top=1"], "top=1 goes by one ranking"),
        (["tasks=[]"], "tasks=[] is unknown"),
        (["negatives=x.parquet", "run=null"], "soft_labels=<Parquet file>"),
        (["negatives=x.parquet", "run=null", "soft_labels=y.parquet", "depth=5"], "depth=5 is of a ranking"),
        (["negatives=x.parquet", "run=null", "soft_labels=y.parquet", "top=1"], "top=1 is of a ranking"),
        (["soft_labels={root}"], "is a folder; give the name of a file"),
        (["depth=0"], "depth=0"),
        (["metric=hit@70"], "metric='hit@70'"),
        (["metric=recal@5"], "metric='recal@5'"),
        (["rerank.labels=[Truthfully,False]"], "label 'Truthfully' is no single token"),
        (["rerank.pretrained_model_name_or_path={root}"], "{root}"),
    ],
)
def test_what_cannot_be_used_is_named(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], named: str
) -> None:
    filled = [one.format(root=root_of(world)) for one in overrides]
    cfg = composed("rerank", *settings(world, tmp_path, *filled))
    monkeypatch.setattr(zero_shot, "load_generator", None)  # told before minutes of loading weights
    with pytest.raises(Exception) as raised:  # noqa: PT011 - Hydra wraps what a constructor raises
        rerank(cfg)
    assert named.format(root=root_of(world)) in (user_error(raised.value) or "")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["reranking.metric=hit@7"], "metric='hit@7' is not among callbacks.evaluation.metrics"),
        (["reranking.tasks=[cirr_task7]"], "are unknown; those that are ranked are pets_task0"),
        (["reranking.top=1"], "top=1 goes by one ranking"),
        (["reranking.max_pairs=-1"], "max_pairs=-1"),
        (["rerank.labels=[Truthfully,False]"], "label 'Truthfully' is no single token"),
        (["rerank.pretrained_model_name_or_path={root}/nowhere"], "nowhere"),
        (["rerank.prompts.task3=nothing"], "prompts['task3']"),
        (["rerank.max_length=0"], "max_length=0"),
        (["~rerank.prompts.task0"], "task='pets_task0' has no prompt"),
    ],
)
def test_what_an_evaluation_cannot_rerank_is_named_before_anything_is_embedded(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], named: str
) -> None:
    size = [f"model.encoder.architecture.{name}={value}" for name, value in ARCHITECTURE.items()]
    filled = [one.format(root=root_of(world)) for one in overrides]
    given = [*world[:5], "rerank=llava_next", *world[5:], *size, *filled]
    cfg = composed("evaluate", *given, f"paths.output_dir={tmp_path}", f"reranking.scores_dir={tmp_path}/scores")
    monkeypatch.setattr(cli, "_ranked", None)
    with pytest.raises(UserInputError) as raised:
        evaluate(cfg)
    assert named.format(root=root_of(world)) in str(raised.value)


def test_negatives_of_an_unknown_task_are_named_before_weights_are_loaded(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = Shards(next(one for one in world if one.startswith("data.shards=")).partition("=")[2])
    columns = {"qid": [1], "did": [int(shards.pool("train").ids[0])], "kind": [0], "rank": [1], "score": [0.5]}
    made_of = {"pool": shards.pool_fingerprint("train")}
    negatives = write_negatives(tmp_path / "negatives.parquet", columns, made_of, {})
    more = ["run=null", f"negatives={negatives}", f"soft_labels={tmp_path}/labels.parquet", "tasks=[pets_task9]"]
    monkeypatch.setattr(zero_shot, "load_generator", None)
    with pytest.raises(UserInputError, match=r"tasks=\['pets_task9'\] have no training queries"):
        rerank(composed("rerank", *settings(world, tmp_path, *more)))


def test_a_task_that_is_named_twice_is_reranked_once(world: list[str], tmp_path: Path) -> None:
    made = rerank(composed("rerank", *settings(world, tmp_path, "tasks=[pets_task0,pets_task0]")))
    assert made is not None
    assert made.tasks == ["pets_task0"]
    assert len(set(map(tuple, made.rows.tolist()))) == len(made.rows)


def test_without_a_number_of_validation_queries_all_are_asked(world: list[str], tmp_path: Path) -> None:
    given = ["tasks=auto", f"val_run={root_of(world)}/val", "val_queries=null", "depth=2"]
    rerank(composed("rerank", *settings(world, tmp_path, *given)))
    content = json.loads((tmp_path / "reranking.json").read_text())
    assert content["choice"]["val_queries"] is None
    metrics = json.loads((root_of(world) / "val" / "metrics.json").read_text())
    for task, figures in content["choice"]["effects"]["union"].items():
        if task in TASKS:
            assert figures["before"] == metrics["union"]["tasks"][task]["hit@1"]


def test_a_run_of_few_queries_is_told(world: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "few.run"
    path.write_text((root_of(world) / "test/runs/union/pets_task0.run").read_text().splitlines()[0] + "\n")
    rerank(composed("rerank", *settings(world, tmp_path, f"run={path}")))
    assert re.search(r"the union run mmembed lacks \d+ queries, which score 0", caplog.text)


def test_a_candidate_that_is_not_in_the_pool_is_named_by_file_and_line(world: list[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.run"
    line = (root_of(world) / "test/runs/union/pets_task0.run").read_text().splitlines()[0].split()
    path.write_text(" ".join([line[0], "Q0", "77:999999", "1", "0.5", "x"]) + "\n")
    with pytest.raises(UserInputError, match=r"bad.run:1: did='77:999999' is not in the test pool"):
        rerank(composed("rerank", *settings(world, tmp_path, f"run={path}")))


# --- killed, and shared out -----------------------------------------------------------------------------------------


def command(directory: Path, *overrides: str, before: str = "") -> list[str]:
    script = directory / ("slowed.py" if before else "rerank.py")
    script.write_text(MAIN.format(root=str(Path(__file__).parents[2]), before=before))
    return [sys.executable, str(script), *overrides]


ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_command_that_is_killed_ends_as_one_that_was_not_and_scores_nothing_twice(
    world: list[str], tmp_path: Path
) -> None:
    def overrides(name: str) -> list[str]:
        return [*settings(world, tmp_path / name), f"hydra.run.dir={tmp_path / name}"]

    environment = {**os.environ, **ENVIRONMENT}
    subprocess.run(
        command(tmp_path, *overrides("whole")), env=environment, check=True, timeout=240, capture_output=True
    )
    line = command(tmp_path, *overrides("killed"), before=SLOWED)
    scores = tmp_path / "killed" / "scores"
    with subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        limit = time.monotonic() + 120
        while len(list(scores.rglob("part-*.npy"))) < 6 and time.monotonic() < limit:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    kept = sum(len(ScoreStore(path)) for path in scores.iterdir())
    assert kept > 0
    subprocess.run(
        command(tmp_path, *overrides("killed")), env=environment, check=True, timeout=240, capture_output=True
    )
    whole, killed = (json.loads((tmp_path / name / "reranking.json").read_text()) for name in ("whole", "killed"))
    assert killed["effects"] == whole["effects"]
    assert runs_of(tmp_path / "killed" / "runs") == runs_of(tmp_path / "whole" / "runs")
    everything = whole["pairs"]["scored"] + whole["pairs"]["found"]
    assert killed["pairs"]["scored"] + killed["pairs"]["found"] == everything
    assert killed["pairs"]["found"] >= kept
    (part,) = scores.iterdir()
    import numpy as np

    keys = np.concatenate([np.load(path)["key"] for path in part.glob("part-*.npy")])
    assert len(keys) == len(set(keys.tolist())) == everything


#: Writes every score at once and takes its time, so that a kill comes in the middle.
SLOWED = """
import time
from lightning_mmembed.rerank import ScoreStore
add = ScoreStore.add
def slow(self, keys, scores):
    self.seconds = 0
    add(self, keys, scores)
    time.sleep(0.1)
ScoreStore.add = slow
"""


@pytest.mark.slow
def test_two_processes_write_what_one_writes(world: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, **ENVIRONMENT}
    for devices in (1, 2):
        out = tmp_path / str(devices)
        # Each process has a time of its own; the first one's counts.
        place = settings(world, out, f"fabric.devices={devices}", "tasks=[pets_task7,pets_task3]", "max_pairs=61")
        labels = f"soft_labels={out}/labels.parquet"
        subprocess.run(
            command(tmp_path, *place, labels, f"hydra.run.dir={out}"), env=environment, check=True, timeout=240,
            capture_output=True,
        )  # fmt: skip
    one, two = (json.loads((tmp_path / name / "reranking.json").read_text()) for name in ("1", "2"))
    assert one["effects"] == two["effects"]
    assert sum(one["pairs"].values()) == sum(two["pairs"].values())
    assert runs_of(tmp_path / "1" / "runs") == runs_of(tmp_path / "2" / "runs")
    tables = [pq.read_table(tmp_path / name / "labels.parquet") for name in ("1", "2")]
    assert tables[0].equals(tables[1])


def test_both_configurations_have_the_same_settings() -> None:
    alone, within = composed("rerank"), composed("evaluate", "rerank=llava_next")
    assert OmegaConf.to_container(within.reranking, resolve=False).keys() <= set(alone)
    assert alone.rerank == within.rerank
