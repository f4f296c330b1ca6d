"""``mmembed-rerank``: reranks TREC runs with a multimodal LLM, and shows the prompts that it is asked with."""

from __future__ import annotations

import dataclasses
import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from lightning_mmembed.cli import CONFIG_PATH, apply_extras, record_config, run_command
from lightning_mmembed.distributed import ALONE, Processes
from lightning_mmembed.errors import UserInputError

if TYPE_CHECKING:
    from lightning_mmembed.data.shards import Shards
    from lightning_mmembed.rerank import ZeroShotReranker
    from lightning_mmembed.rerank.pipeline import Budget, Reranked
    from lightning_mmembed.rerank.runs import Estimate
    from lightning_mmembed.rerank.store import ScoreStore
    from lightning_mmembed.retrieval.results import RetrievalResult

#: By which rule ``tasks=auto`` chooses; kept beside what it chose.
RULE = "the 95 % interval of the difference on the validation split lies above zero"


def rerank(cfg: DictConfig) -> Reranked | None:
    """Rerank TREC runs, or score mined negatives to distil from.

    Args:
        cfg: A configuration composed from ``conf/rerank.yaml``.

    Returns:
        What came of it; ``None`` where mined negatives were scored.

    Raises:
        UserInputError: If the run does not fit the split, a task is unknown or has no prompt, the model cannot rerank,
            or an argument cannot be used.
    """
    if (cfg.run is None) == (cfg.negatives is None):
        raise UserInputError("give run=<TREC run or run directory>, or else negatives=<file of mined negatives>")
    if cfg.negatives is not None and (cfg.soft_labels is None or cfg.tasks == "auto"):
        raise UserInputError(
            f"negatives={cfg.negatives!r} are scored for soft_labels=<Parquet file>, with tasks=<a list> or all; given "
            f"are soft_labels={cfg.soft_labels!r} and tasks={cfg.tasks!r}"
        )
    budget = _budget(cfg)
    _check_tasks(cfg, cfg.split)
    if cfg.tasks == "auto" and cfg.val_run is None:
        raise UserInputError("tasks=auto needs val_run=<a run over the validation split>, to choose them by")
    apply_extras(cfg)
    fabric = hydra.utils.instantiate(cfg.fabric, _convert_="all")
    fabric.launch()
    processes = Processes(fabric.global_rank, fabric.world_size, fabric.device)
    directory = Path(processes.broadcast(str(cfg.paths.output_dir)))
    datamodule = hydra.utils.instantiate(cfg.data, _convert_="all")
    if processes.rank == 0:
        record_config(cfg)
        datamodule.prepare_data()
    processes.barrier()
    shards: Shards = datamodule.shards
    # Before the model: a run that does not fit is told before the work.
    before = None if cfg.run is None else _scored_run(cfg, shards, cfg.run, cfg.split)
    val = _scored_run(cfg, shards, cfg.val_run, "val") if cfg.tasks == "auto" else None
    reranker = load_reranker(cfg.rerank, fabric.device)
    if before is None:
        _score_negatives(cfg, shards, reranker, processes)
        return None
    return rerank_evaluation(cfg, reranker, before, val, directory, shards.fingerprint, processes, budget)


def load_reranker(node: DictConfig, device: Any) -> ZeroShotReranker:
    """Build the configured reranker, on a device unless it names one."""
    reranker: ZeroShotReranker = hydra.utils.instantiate(node, _convert_="all")
    if node.get("device") is None:
        reranker.model.to(device)
    return reranker


def rerank_evaluation(
    settings: DictConfig,
    reranker: ZeroShotReranker,
    before: RetrievalResult,
    val: RetrievalResult | None,
    directory: Path,
    shards: str,
    processes: Processes = ALONE,
    budget: Budget | None = None,
) -> Reranked:
    """Rerank an evaluation, print its figures before and after, and write runs, figures and scores.

    Args:
        settings: The group ``reranking``.
        reranker: The model, in every process.
        before: The evaluation.
        val: That of the validation split, where tasks are to be chosen by it.
        directory: Where to write; the runs lie below ``runs``.
        shards: Fingerprint of the dataset.
        processes: Those that share out the work.
        budget: What the settings say, where it was read before.
    """
    from lightning_mmembed.files import write_atomically
    from lightning_mmembed.rerank.effect import effect_facts, effects
    from lightning_mmembed.rerank.pipeline import rerank_result
    from lightning_mmembed.rerank.work import write_scores
    from lightning_mmembed.retrieval.runs import write_runs

    budget = budget or _budget(settings)
    with _store(settings, reranker) as store:
        chosen, choice = _tasks(settings, reranker, before, val, budget, store, processes)
        reranked = rerank_result(reranker, before, chosen, budget, store, processes, _announce)
    found = effects(before, reranked.after, settings.metric)
    if processes.rank > 0:
        return reranked
    facts = {
        "reranker": reranker.fingerprint,
        "shards": shards,
        **{name: value for name, value in dataclasses.asdict(budget).items() if value is not None},
        "metric": settings.metric,
        "tasks": reranked.tasks,
        "choice": choice,
        "pairs": reranked.counts,
        "effects": effect_facts(before, reranked.after, found, settings.metric),
    }
    written = write_runs(directory / "runs", reranked.after, "reranked")
    write_atomically(directory / "reranking.json", json.dumps(facts, indent=1))
    _print(before, reranked, found, settings.metric)
    if settings.soft_labels is not None:
        made = {"reranker": reranker.fingerprint, "shards": shards}
        print(f"soft labels: {write_scores(settings.soft_labels, reranked.rows, reranked.scores, made)}")
    print(f"{len(written)} TREC runs: {directory / 'runs'}\nfigures: {directory / 'reranking.json'}")
    return reranked


def show(cfg: DictConfig) -> str:
    """Print the prompt of a task; no weights are loaded.

    Args:
        cfg: A configuration composed from ``conf/show.yaml``.

    Raises:
        UserInputError: If the task has no prompt, or the model cannot rerank.
    """
    from lightning_mmembed.rerank.zero_shot import example_prompt

    settings: Any = OmegaConf.to_container(cfg.rerank, resolve=True)
    prompt = example_prompt(settings["pretrained_model_name_or_path"], settings["prompts"], str(cfg.task))
    print(prompt)
    print(f"\nscore: P({settings['labels'][0]}) / (P({settings['labels'][0]}) + P({settings['labels'][1]})) after it")
    return prompt


def check_settings(settings: DictConfig, split: str) -> None:
    """Refuse settings of an evaluation's reranking that cannot be used, before any work.

    Raises:
        UserInputError: If there is one.
    """
    _budget(settings)
    _check_tasks(settings, split)


def _check_tasks(settings: DictConfig, split: str) -> None:
    if not (settings.tasks in (None, "auto") or isinstance(settings.tasks, ListConfig)):
        raise UserInputError(f"tasks={settings.tasks!r} is unknown; write a list such as [cirr_task7], auto, or null")
    if settings.tasks == "auto" and split == "val":
        raise UserInputError(
            "tasks=auto chooses by the validation split, whose figures would then be better than those of new "
            "queries; write split=test"
        )


def _budget(settings: DictConfig) -> Budget:
    from lightning_mmembed.rerank.pipeline import Budget

    return Budget(settings.depth, settings.weight, settings.max_pairs, settings.max_seconds, settings.top)


def _store(settings: DictConfig, reranker: ZeroShotReranker) -> ScoreStore:
    """The scores of this reranker: those of others lie in folders of their own."""
    from lightning_mmembed.rerank.store import ScoreStore

    return ScoreStore(Path(settings.scores_dir) / reranker.fingerprint)


def _scored_run(cfg: DictConfig, shards: Shards, run: str, split: str) -> RetrievalResult:
    from lightning_mmembed.data.manifest import left_out
    from lightning_mmembed.metrics import DEFAULT_METRICS
    from lightning_mmembed.retrieval.trec import find_runs, read_run, score_run

    lost = left_out(shards.manifest, split), left_out(shards.manifest)
    runs = {pool: read_run(*paths, left_out=lost) for pool, paths in find_runs(run, cfg.run_pool).items()}
    metrics = tuple(dict.fromkeys((*DEFAULT_METRICS, cfg.metric)))
    try:
        return score_run(runs, shards.pool(split), shards.query_sets(split, cfg.instruction), metrics)
    except ValueError as error:
        if isinstance(error, UserInputError):
            raise
        raise UserInputError(f"metric={cfg.metric!r}: {error}") from error


def _tasks(
    settings: DictConfig,
    reranker: ZeroShotReranker,
    before: RetrievalResult,
    val: RetrievalResult | None,
    budget: Budget,
    store: ScoreStore,
    processes: Processes,
) -> tuple[list[str], dict[str, Any] | None]:
    """The tasks to rerank, and where they are chosen by the validation split, how."""
    from rich.console import Console

    from lightning_mmembed.rerank.effect import effect_facts, effect_table, effects, helped
    from lightning_mmembed.rerank.pipeline import rerank_result, spread_queries

    if settings.tasks != "auto":
        return list(before.tasks if settings.tasks is None else settings.tasks), None
    assert val is not None
    asked = spread_queries(val, settings.val_queries)
    full = dataclasses.replace(budget, max_pairs=None, max_seconds=None)  # the choice has a budget of its own
    both = [name for name in asked.tasks if name in before.tasks]
    reranked = rerank_result(reranker, asked, both, full, store, processes, _announce)
    found = effects(asked, reranked.after, settings.metric)
    chosen = [name for name in helped(found) if name in before.tasks]
    if processes.rank == 0:
        title = f"{settings.metric} of validation queries"
        pool = next(iter(found))
        Console().print(effect_table(asked, reranked.after, found, pool, settings.metric, reranked.tasks, title))
        print(f"reranked are those where {RULE}: {', '.join(chosen) or 'none'}")
    effect = effect_facts(asked, reranked.after, found, settings.metric)
    return chosen, {"rule": RULE, "val_queries": settings.val_queries, "effects": effect}


def _score_negatives(cfg: DictConfig, shards: Shards, reranker: ZeroShotReranker, processes: Processes) -> None:
    """Score positives and mined negatives of the training queries, and write them as soft labels."""
    from lightning_mmembed.rerank.distil import work_of_negatives
    from lightning_mmembed.rerank.pipeline import score_work
    from lightning_mmembed.rerank.work import scored_pairs, write_scores

    names = None if cfg.tasks is None else list(cfg.tasks)
    work = work_of_negatives(shards, cfg.negatives, names, cfg.instruction)
    with _store(cfg, reranker) as store:
        scored = score_work(reranker, work, _budget(cfg), store, processes, _announce)
    if processes.rank == 0:
        made = {"reranker": reranker.fingerprint, "shards": shards.fingerprint}
        path = write_scores(cfg.soft_labels, *scored_pairs(work, scored.scores), made)
        print(f"{_told(scored.counts)}\nsoft labels: {path}")


def _announce(left: Estimate) -> None:
    took = timedelta(seconds=round(left.seconds))
    print(f"to be scored: {left.pairs:,} pairs, some {left.tokens:,} tokens and {took} by a probe", flush=True)


def _told(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count or name == "scored") + " pairs"


def _print(before: RetrievalResult, reranked: Reranked, found: dict[str, Any], metric: str) -> None:
    from rich.console import Console

    from lightning_mmembed.rerank.effect import effect_table

    for pool in found:
        title = f"{metric}, " + (f"union pool of {len(before.pool):,}" if pool == "union" else "local pools")
        Console().print(effect_table(before, reranked.after, found, pool, metric, reranked.tasks, title))
    print(_told(reranked.counts))


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="rerank")
def _rerank_main(cfg: DictConfig) -> None:
    run_command(rerank, cfg)


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="show")
def _show_main(cfg: DictConfig) -> None:
    run_command(show, cfg)


def rerank_main() -> None:
    """``mmembed-rerank``: see ``conf/rerank.yaml``; ``mmembed-rerank show``: see ``conf/show.yaml``."""
    if sys.argv[1:2] == ["show"]:
        del sys.argv[1]  # Hydra takes every word for an override
        _show_main()
    else:
        _rerank_main()
