"""The commands: compose the configuration with Hydra, build the objects, run, and say where the output lies.

``train(cfg)`` and ``evaluate(cfg)`` are plain functions that return metrics and objects; the ``*_main`` functions are
the console scripts around them.
"""

from __future__ import annotations

import json
import logging
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.failures import causes, run_failure

if TYPE_CHECKING:
    from lightning_mmembed.rerank.pipeline import Reranked
    from lightning_mmembed.rerank.prompts import Prompts
    from lightning_mmembed.retrieval.results import RetrievalResult

log = logging.getLogger(__name__)

CONFIG_PATH = "pkg://lightning_mmembed.conf"
VERSIONED = ("lightning-mmembed", "torch", "lightning", "transformers", "torchmetrics", "hydra-core", "pillow")


def train(cfg: DictConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Fit, then evaluate the test split with the best checkpoint.

    Args:
        cfg: A configuration composed from ``conf/train.yaml``.

    Returns:
        The logged metrics, and the objects by name: datamodule, module, callbacks, trainer.
    """
    from lightning_mmembed.checkpoints import load_encoder_weights, read_encoder_weights

    objects = build(cfg)
    trainer, module, datamodule = objects["trainer"], objects["module"], objects["datamodule"]
    resumed = _last_checkpoint(cfg) if cfg.ckpt_path == "last" else cfg.ckpt_path
    if isinstance(resumed, ListConfig):
        raise UserInputError(
            f"ckpt_path={resumed} names several checkpoints, and a run is resumed from one; the mean of several is "
            "started from with weights=[...]"
        )
    if resumed is not None and not Path(resumed).is_dir():
        read_encoder_weights(module.encoder, resumed)  # the Trainer's own errors name neither key nor remedy
    if cfg.weights is not None and resumed is None:
        load_encoder_weights(module.encoder, cfg.weights)
    metrics: dict[str, float] = {}
    if cfg.train:
        trainer.fit(module, datamodule, ckpt_path=resumed)
        metrics |= _floats(trainer.callback_metrics)
    best = trainer.checkpoint_callback.best_model_path if cfg.train and trainer.checkpoint_callback else None
    if cfg.save_encoder and trainer.is_global_zero:
        _save_encoder(cfg, module.encoder, best or None)
    if cfg.test:
        ckpt_path = best or (None if cfg.train else resumed)
        trainer.test(module, datamodule, ckpt_path=ckpt_path, verbose=False)
        metrics |= _floats(trainer.callback_metrics)
    if trainer.is_global_zero:
        print(f"run directory: {cfg.paths.output_dir}")
    return metrics, objects


def _last_checkpoint(cfg: DictConfig) -> Path | None:
    """The run's own last checkpoint; None if it has not saved any."""
    from lightning_mmembed.files import locked
    from lightning_mmembed.sharded_checkpoints import finish_replacing

    path = Path(cfg.paths.output_dir) / "checkpoints" / "last.ckpt"
    if path.parent.is_dir():
        with locked(path):  # several processes begin at once
            finish_replacing(path)
    return path if path.exists() else None


def _save_encoder(cfg: DictConfig, encoder: Any, best: str | None) -> None:
    """Write the best encoder of a run, or the one that it has where it trains none, to be started from."""
    from lightning_mmembed.checkpoints import load_encoder_weights
    from lightning_mmembed.files import building_directory

    if best is not None:  # built anew: the one that was trained may be shared out among processes
        encoder = hydra.utils.instantiate(cfg.model.encoder, _convert_="all")
        load_encoder_weights(encoder, best)
    with building_directory(Path(cfg.paths.output_dir) / "encoder") as directory:
        encoder.save_pretrained(directory)


def evaluate(cfg: DictConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Evaluate a checkpoint, the untrained model, or the TREC runs of any system.

    Args:
        cfg: A configuration composed from ``conf/evaluate.yaml``.

    Returns:
        The logged metrics, and the objects by name: datamodule, module, callbacks, trainer; of TREC runs no module
        and no trainer.

    Raises:
        UserInputError: If ``split`` is neither ``test`` nor ``val``, the checkpoint or a run does not fit, or both are
            given, or what was ranked cannot be reranked as asked.
    """
    from lightning_mmembed.checkpoints import load_encoder_weights

    if cfg.split not in ("test", "val"):
        raise UserInputError(f"split={cfg.split!r} is unknown; write 'test' or 'val'")
    if cfg.run is not None:
        if cfg.ckpt_path is not None:
            raise UserInputError(
                f"run={str(cfg.run)!r} is scored without a model, so ckpt_path={str(cfg.ckpt_path)!r} would not be "
                "used; give one of the two"
            )
        if cfg.get("rerank") is not None:
            raise UserInputError(f"run={str(cfg.run)!r} is reranked by mmembed-rerank run=...; leave rerank out")
        return _evaluate_run(cfg)
    prompts = None if cfg.get("rerank") is None else _check_reranking(cfg)
    objects = build(cfg)
    if prompts is not None:
        from lightning_mmembed.cli_rerank import check_evaluation

        check_evaluation(cfg.reranking, objects["datamodule"].shards, cfg.split, prompts)
    if cfg.ckpt_path is not None:
        load_encoder_weights(objects["module"].encoder, cfg.ckpt_path)
    trainer = objects["trainer"]
    # The tasks that are reranked may be chosen by the validation split.
    chosen_by = _ranked(objects, "val") if prompts is not None and cfg.reranking.tasks == "auto" else None
    ranked = _ranked(objects, cfg.split)
    metrics = _floats(trainer.callback_metrics)
    if prompts is not None:
        objects["reranked"] = _rerank(cfg, objects, ranked, chosen_by)
    if trainer.is_global_zero:
        print(f"run directory: {cfg.paths.output_dir}")
    return metrics, objects


def _check_reranking(cfg: DictConfig) -> Prompts:
    """Refuse reranking that cannot be done as asked, before anything is built; the reranker's wordings."""
    from lightning_mmembed.cli_rerank import check_reranker, check_settings

    check_settings(cfg.reranking, cfg.split)
    if not cfg.callbacks or "evaluation" not in cfg.callbacks:
        raise UserInputError("rerank=... reranks what the evaluation ranked; leave callbacks=evaluate as it is")
    if cfg.callbacks.evaluation.instruction == "all":
        raise UserInputError(
            "callbacks.evaluation.instruction='all' cannot be reranked; write a single prompt, such as 0, or random"
        )
    if cfg.reranking.metric not in cfg.callbacks.evaluation.metrics:
        raise UserInputError(
            f"metric={cfg.reranking.metric!r} is not among callbacks.evaluation.metrics, which are "
            f"{', '.join(cfg.callbacks.evaluation.metrics)}; choose one of them, or add it there"
        )
    return check_reranker(cfg.rerank)


def _ranked(objects: dict[str, Any], split: str) -> RetrievalResult | None:
    """Evaluate a split; what was ranked, if a callback has ranked it."""
    from lightning_mmembed.callbacks import RetrievalEvaluation

    trainer = objects["trainer"]
    run = trainer.test if split == "test" else trainer.validate
    run(objects["module"], objects["datamodule"], verbose=False)
    evaluation = next((c for c in objects["callbacks"] if isinstance(c, RetrievalEvaluation)), None)
    return None if evaluation is None else evaluation.result


def _rerank(
    cfg: DictConfig, objects: dict[str, Any], ranked: RetrievalResult | None, chosen_by: RetrievalResult | None
) -> Reranked:
    from lightning_mmembed.callbacks.access import output_directory, processes_of
    from lightning_mmembed.cli_rerank import load_reranker, rerank_evaluation

    trainer, shards = objects["trainer"], objects["datamodule"].shards
    assert ranked is not None
    directory = output_directory(trainer, cfg.paths.output_dir) / "reranked"
    reranker = load_reranker(cfg.rerank, trainer.strategy.root_device)
    processes = processes_of(trainer)
    return rerank_evaluation(cfg.reranking, reranker, ranked, chosen_by, directory, shards.fingerprint, processes)


def _evaluate_run(cfg: DictConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Score TREC runs with the metrics of the evaluation callback, and write what it would write."""
    from lightning_mmembed.callbacks import RetrievalEvaluation, RunReport
    from lightning_mmembed.data.manifest import left_out
    from lightning_mmembed.retrieval.results import RUN_DEPTH
    from lightning_mmembed.retrieval.runs import record
    from lightning_mmembed.retrieval.trec import find_runs, read_run, refuse_other_split, score_run

    files = find_runs(cfg.run, cfg.run_pool)
    refuse_other_split(files, cfg.split)
    callbacks = _instantiate_all(cfg.callbacks)
    evaluation = next((c for c in callbacks if isinstance(c, RetrievalEvaluation)), None) or RetrievalEvaluation()
    apply_extras(cfg)
    record_config(cfg)
    datamodule = hydra.utils.instantiate(cfg.data, _convert_="all")
    datamodule.prepare_data()
    shards, directory = datamodule.shards, Path(cfg.paths.output_dir)
    lost = left_out(shards.manifest, cfg.split), left_out(shards.manifest)
    runs = {pool: read_run(*paths, left_out=lost) for pool, paths in files.items()}
    result = score_run(runs, shards.pool(cfg.split), shards.query_sets(cfg.split), evaluation.metrics)
    # What the other system was asked with is not known here.
    facts = {"system": next(iter(runs.values())).tag, "split": cfg.split, "instruction": "given run"}
    facts |= {"depth": RUN_DEPTH, "shards": shards.fingerprint}
    written = record(directory, [result], facts, evaluation.compare)
    for report in (c for c in callbacks if isinstance(c, RunReport)):
        report.write(directory, written, result)
    print(f"run directory: {directory}")
    metrics = {f"{cfg.split}/{name}": value for name, value in result.named_metrics.items()}
    return metrics, {"datamodule": datamodule, "callbacks": callbacks}


def build(cfg: DictConfig) -> dict[str, Any]:
    """Build datamodule, module, callbacks, loggers and trainer, and record the configuration in the run directory."""
    from lightning.pytorch import seed_everything
    from lightning.pytorch.utilities import rank_zero_only

    apply_extras(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    rank_zero_only(record_config)(cfg)  # other processes, started by torchrun or SLURM, may have another run directory
    datamodule = hydra.utils.instantiate(cfg.data, _convert_="all")
    datamodule.prepare_data()  # the tiny checkpoint's tokenizer learns from the shards
    module = hydra.utils.instantiate(cfg.model, _convert_="all")
    callbacks = _instantiate_all(cfg.callbacks)
    trainer = hydra.utils.instantiate(
        cfg.trainer, callbacks=callbacks, logger=_instantiate_all(cfg.get("logger")) or False, _convert_="all"
    )
    return {"datamodule": datamodule, "module": module, "callbacks": callbacks, "trainer": trainer}


def apply_extras(cfg: DictConfig) -> None:
    """Quieten libraries and print the configuration, as asked for."""
    if cfg.extras.quiet_libraries:
        import transformers

        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        warnings.filterwarnings("ignore", module="lightning|torch")
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if cfg.extras.print_config:
        print(OmegaConf.to_yaml(cfg, resolve=True))


def record_config(cfg: DictConfig) -> None:
    """Write what a run needs to be repeated: the resolved configuration, versions and seed."""
    from lightning_mmembed.files import write_atomically

    directory = Path(cfg.paths.output_dir)
    write_atomically(directory / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    versions = {name: version(name) for name in VERSIONED} | {"python": platform.python_version()}
    write_atomically(directory / "versions.json", json.dumps({"seed": cfg.seed, **versions}, indent=1))


def _instantiate_all(nodes: DictConfig | None) -> list[Any]:
    """Build every node that has a target; a node set to null is dropped."""
    return [
        hydra.utils.instantiate(node, _convert_="all")
        for node in (nodes or {}).values()
        if isinstance(node, DictConfig) and "_target_" in node
    ]


def _floats(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def user_error(error: BaseException) -> str | None:
    """The message for an error that the user can mend, or None for one that is a defect of the program.

    Hydra wraps what a constructor raises; the innermost wrong input, value or key is the one to tell.
    """
    chain = list(causes(error))
    for kind in (UserInputError, OmegaConfBaseException):
        found = next((e for e in chain if isinstance(e, kind)), None)
        if found is not None:
            return str(found)
    if isinstance(error, HydraException):  # a target that does not exist, or refuses its arguments
        return str(chain[-1]) if isinstance(chain[-1], (TypeError, ValueError, ImportError)) else str(error)
    return None


def run_command(command: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
    """Run a command; what the user can mend is printed alone and ends it with status 2, a run that failed with 1."""
    try:
        return command(cfg)
    except Exception as error:
        for status, message in ((2, user_error(error)), (1, run_failure(error))):
            if message is not None:
                print(f"error: {message}", file=sys.stderr)
                raise SystemExit(status) from None
        raise


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="train")
def train_main(cfg: DictConfig) -> float | None:
    """``mmembed-train``: see ``conf/train.yaml``."""
    score: float | None = run_command(_optimized, cfg)
    return score


def run_recipe(cfg: DictConfig, given: Sequence[str]) -> None:
    """Run the stages of a recipe, each a process of its own, and print a table of what they reached.

    Args:
        cfg: A configuration composed from ``conf/train.yaml`` with ``stages``.
        given: The overrides that it was composed with.
    """
    from rich.console import Console

    from lightning_mmembed.stages import results_table, run_stages, stages_of

    stages = stages_of(cfg, cfg.paths.output_dir, given)
    run_stages(stages)
    Console().print(results_table(stages))
    print(f"run directory: {cfg.paths.output_dir}")


def _optimized(cfg: DictConfig) -> float | None:
    """Train, and return the metric that a sweep optimises."""
    if cfg.stages:
        hydra_cfg = HydraConfig.get()
        # Folders of the user's own configurations, of --config-dir too: the stages are to find them.
        sources = hydra_cfg.runtime.config_sources
        own = [f"'{one.schema}://{one.path}'" for one in sources if "command-line" in one.provider]
        run_recipe(cfg, [*([f"hydra.searchpath=[{','.join(own)}]"] if own else []), *hydra_cfg.overrides.task])
        return None
    metrics, _ = train(cfg)
    name = cfg.optimized_metric
    if name is not None and name not in metrics:
        raise UserInputError(f"optimized_metric={name!r} is not logged; choose one of {', '.join(sorted(metrics))}")
    return None if name is None else metrics[name]


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="evaluate")
def evaluate_main(cfg: DictConfig) -> None:
    """``mmembed-evaluate``: see ``conf/evaluate.yaml``."""
    run_command(evaluate, cfg)
