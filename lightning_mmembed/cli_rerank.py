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
from lightning_mmembed.cli_files import check_place
from lightning_mmembed.distributed import ALONE, Processes
from lightning_mmembed.errors import UserInputError

if TYPE_CHECKING:
    from lightning_mmembed.data.shards import Shards
    from lightning_mmembed.rerank import ZeroShotReranker
    from lightning_mmembed.rerank.pipeline import Budget, Reranked
    from lightning_mmembed.rerank.prompts import Prompts
    from lightning_mmembed.rerank.runs import Estimate
    from lightning_mmembed.rerank.store import ScoreStore
    from lightning_mmembed.rerank.work import Work
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
    from lightning_mmembed.rerank.pipeline import Budget, pools_of

    if (cfg.run is None) == (cfg.negatives is None):
        raise UserInputError("give run=<TREC run or run directory>, or else negatives=<file of mined negatives>")
    if cfg.negatives is not None and (cfg.soft_labels is None or cfg.tasks == "auto"):
        raise UserInputError(
            f"negatives={cfg.negatives!r} are scored for soft_labels=<Parquet file>, with tasks=<a list> or all; given "
            f"are soft_labels={cfg.soft_labels!r} and tasks={cfg.tasks!r}"
        )
    for name in ("depth", "weight", "top"):
        if cfg.negatives is not None and cfg[name] != getattr(Budget, name):
            raise UserInputError(f"{name}={cfg[name]} is of a ranking; negatives={cfg.negatives!r} are scored whole")
    check_settings(cfg, cfg.split)
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
    # Before the model: what does not fit is told before minutes of loading it.
    prompts = check_reranker(cfg.rerank)
    if cfg.run is None:
        work = _negatives(cfg, shards, prompts)
        _score_negatives(cfg, shards, work, load_reranker(cfg.rerank, fabric.device), processes)
        return None
    before = _scored_run(cfg, shards, "run", cfg.split)
    val = _scored_run(cfg, shards, "val_run", "val") if cfg.tasks == "auto" else None
    _check_names(cfg, pools_of(before), prompts)
    reranker = load_reranker(cfg.rerank, fabric.device)
    return rerank_evaluation(cfg, reranker, before, val, directory, shards.fingerprint, processes)


def check_reranker(node: DictConfig) -> Prompts:
    """Refuse a configured reranker that cannot be used, without loading its weights; else its wordings.

    Raises:
        UserInputError: See :meth:`~lightning_mmembed.ZeroShotReranker.from_pretrained`.
    """
    from lightning_mmembed.rerank.zero_shot import read_processor

    read = ("pretrained_model_name_or_path", "prompts", "labels", "max_length", "tokens_per_batch", "dtype")
    settings: Any = OmegaConf.to_container(node, resolve=True)
    _, processor = read_processor(**{name: settings[name] for name in read if name in settings})
    return processor.writer.prompts


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
    """
    from lightning_mmembed.files import write_atomically
    from lightning_mmembed.rerank.effect import effect_facts, effects
    from lightning_mmembed.rerank.pipeline import rerank_result
    from lightning_mmembed.rerank.work import write_scores
    from lightning_mmembed.retrieval.runs import write_runs

    budget = _budget(settings)
    made = {"reranker": reranker.fingerprint, "shards": shards, "split": before.pool.name}
    with _store(settings, reranker) as store:
        chosen, choice = _tasks(settings, reranker, before, val, budget, store, processes)
        reranked = rerank_result(reranker, before, chosen, budget, store, processes, _announce)
    found = effects(before, reranked.after, settings.metric)
    if processes.rank > 0:
        return reranked
    facts = {
        **made,
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
        print(f"soft labels: {write_scores(settings.soft_labels, reranked.rows, reranked.scores, made)}")
    print(f"{len(written)} TREC runs: {directory / 'runs'}\nfigures: {directory / 'reranking.json'}")
    return reranked


def show(cfg: DictConfig) -> str:
    """Print the prompt of a task; no weights are loaded. Of a checkpoint that is out of reach, the wording alone.

    Args:
        cfg: A configuration composed from ``conf/show.yaml``.

    Raises:
        UserInputError: If the task has no prompt, or the model cannot rerank.
    """
    from lightning_mmembed.rerank.zero_shot import example_prompt

    settings: Any = OmegaConf.to_container(cfg.rerank, resolve=True)
    path = settings["pretrained_model_name_or_path"]
    try:
        prompt = example_prompt(path, settings["prompts"], str(cfg.task))
    except UserInputError as error:
        if Path(path).is_dir():
            raise
        prompt = example_prompt(None, settings["prompts"], str(cfg.task))  # fails as before if the task is wrong
        print(f"{error}\nHere is the wording, without the frame of the model's chat template:\n", file=sys.stderr)
    print(prompt)
    print(f"\nscore: P({settings['labels'][0]}) / (P({settings['labels'][0]}) + P({settings['labels'][1]})) after it")
    return prompt


def check_settings(settings: DictConfig, split: str) -> None:
    """Refuse settings of reranking that cannot be used, whatever the data and the model.

    Raises:
        UserInputError: If there is one.
    """
    _budget(settings)
    check_place("scores_dir", settings.scores_dir, is_folder=True)
    if settings.soft_labels is not None:
        check_place("soft_labels", settings.soft_labels, is_folder=False)
    if not (settings.tasks in (None, "auto") or (isinstance(settings.tasks, ListConfig) and settings.tasks)):
        raise UserInputError(f"tasks={settings.tasks!r} is unknown; write a list such as [cirr_task7], auto, or null")
    asked = settings.val_queries
    if asked is not None and not (isinstance(asked, int) and asked > 0):
        raise UserInputError(f"val_queries={asked!r} is no number of queries; write 1 or more, or null for all")
    if settings.tasks == "auto" and split == "val":
        raise UserInputError(
            "tasks=auto chooses by the validation split, whose figures would then be better than those of new "
            "queries; write split=test"
        )


def check_evaluation(settings: DictConfig, shards: Shards, split: str, prompts: Prompts) -> None:
    """Refuse tasks that an evaluation is not going to rank, or that cannot be reranked, before anything is embedded.

    Raises:
        UserInputError: See :func:`~lightning_mmembed.rerank.pipeline.check_tasks`.
    """
    local = shards.pool(split).local
    pools = {task.name: ["union", *(["local"] if task.name in local else [])] for task in shards.tasks(split)}
    _check_names(settings, pools, prompts)


def _check_names(settings: DictConfig, ranked: dict[str, list[str]], prompts: Prompts) -> None:
    from lightning_mmembed.rerank.pipeline import check_tasks

    names = list(ranked) if settings.tasks in (None, "auto") else list(settings.tasks)
    check_tasks(names, ranked, prompts, _budget(settings))


def _budget(settings: DictConfig) -> Budget:
    from lightning_mmembed.rerank.pipeline import Budget

    return Budget(settings.depth, settings.weight, settings.max_pairs, settings.max_seconds, settings.top)


def _store(settings: DictConfig, reranker: ZeroShotReranker) -> ScoreStore:
    """The scores of this reranker: those of others lie in folders of their own."""
    from lightning_mmembed.rerank.store import ScoreStore

    return ScoreStore(Path(settings.scores_dir) / reranker.fingerprint)


def _scored_run(cfg: DictConfig, shards: Shards, key: str, split: str) -> RetrievalResult:
    """What ``run`` or ``val_run`` ranked."""
    from lightning_mmembed.data.manifest import left_out
    from lightning_mmembed.metrics import DEFAULT_METRICS
    from lightning_mmembed.retrieval.trec import find_runs, read_run, refuse_other_split, score_run

    files = find_runs(cfg[key], cfg.run_pool)
    refuse_other_split(files, split)
    lost = left_out(shards.manifest, split), left_out(shards.manifest)
    runs = {pool: read_run(*paths, left_out=lost) for pool, paths in files.items()}
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
        return list(before.tasks if settings.tasks is None else dict.fromkeys(settings.tasks)), None
    assert val is not None
    asked = val if settings.val_queries is None else spread_queries(val, settings.val_queries)
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


def _negatives(cfg: DictConfig, shards: Shards, prompts: Prompts) -> Work:
    """Positives and mined negatives of the training queries."""
    from lightning_mmembed.rerank.distil import work_of_negatives

    names = None if cfg.tasks is None else list(cfg.tasks)
    work = work_of_negatives(shards, cfg.negatives, names, cfg.instruction)
    for name in names or [task.name for task in shards.tasks("train")]:
        prompts.of(name)
    return work


def _score_negatives(
    cfg: DictConfig, shards: Shards, work: Work, reranker: ZeroShotReranker, processes: Processes
) -> None:
    """Score positives and mined negatives of the training queries, and write them as soft labels."""
    from lightning_mmembed.rerank.pipeline import score_work
    from lightning_mmembed.rerank.work import scored_pairs, write_scores

    with _store(cfg, reranker) as store:
        scored = score_work(reranker, work, _budget(cfg), store, processes, _announce)
    if processes.rank == 0:
        made = {"reranker": reranker.fingerprint, "shards": shards.fingerprint, "split": "train"}
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
