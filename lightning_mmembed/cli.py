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
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.failures import causes, run_failure

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
    from lightning_mmembed.checkpoints import read_encoder_weights

    objects = build(cfg)
    trainer, module, datamodule = objects["trainer"], objects["module"], objects["datamodule"]
    resumed = _last_checkpoint(cfg) if cfg.ckpt_path == "last" else cfg.ckpt_path
    if resumed is not None and not Path(resumed).is_dir():
        read_encoder_weights(module.encoder, resumed)  # the Trainer's own errors name neither key nor remedy
    metrics: dict[str, float] = {}
    if cfg.train:
        trainer.fit(module, datamodule, ckpt_path=resumed)
        metrics |= _floats(trainer.callback_metrics)
    if cfg.test:
        best = trainer.checkpoint_callback.best_model_path if cfg.train and trainer.checkpoint_callback else None
        ckpt_path = best or (None if cfg.train else resumed)
        trainer.test(module, datamodule, ckpt_path=ckpt_path, verbose=False)
        metrics |= _floats(trainer.callback_metrics)
    if trainer.is_global_zero:
        print(f"run directory: {cfg.paths.output_dir}")
    return metrics, objects


def _last_checkpoint(cfg: DictConfig) -> Path | None:
    """The run's own last checkpoint; None if it has not saved any."""
    from lightning_mmembed.sharded_checkpoints import finish_replacing

    path = Path(cfg.paths.output_dir) / "checkpoints" / "last.ckpt"
    finish_replacing(path)
    return path if path.exists() else None


def evaluate(cfg: DictConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Evaluate a checkpoint, the untrained model, or the TREC runs of any system.

    Args:
        cfg: A configuration composed from ``conf/evaluate.yaml``.

    Returns:
        The logged metrics, and the objects by name: datamodule, module, callbacks, trainer; of TREC runs no module
        and no trainer.

    Raises:
        UserInputError: If ``split`` is neither ``test`` nor ``val``, the checkpoint or a run does not fit, or both are
            given.
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
        return _evaluate_run(cfg)
    objects = build(cfg)
    if cfg.ckpt_path is not None:
        load_encoder_weights(objects["module"].encoder, cfg.ckpt_path)
    trainer = objects["trainer"]
    run = trainer.test if cfg.split == "test" else trainer.validate
    run(objects["module"], objects["datamodule"], verbose=False)
    if trainer.is_global_zero:
        print(f"run directory: {cfg.paths.output_dir}")
    return _floats(trainer.callback_metrics), objects


def _evaluate_run(cfg: DictConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Score TREC runs with the metrics of the evaluation callback, and write what it would write."""
    from lightning_mmembed.callbacks import RetrievalEvaluation, RunReport
    from lightning_mmembed.data.manifest import left_out
    from lightning_mmembed.retrieval.results import RUN_DEPTH
    from lightning_mmembed.retrieval.runs import record
    from lightning_mmembed.retrieval.trec import find_runs, read_run, score_run

    files = find_runs(cfg.run, cfg.run_pool)
    callbacks = _instantiate_all(cfg.callbacks)
    evaluation = next((c for c in callbacks if isinstance(c, RetrievalEvaluation)), None) or RetrievalEvaluation()
    apply_extras(cfg)
    _record(cfg)
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
    rank_zero_only(_record)(cfg)  # other processes, started by torchrun or SLURM, may have another run directory
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


def _record(cfg: DictConfig) -> None:
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


def _optimized(cfg: DictConfig) -> float | None:
    """Train, and return the metric that a sweep optimises."""
    metrics, _ = train(cfg)
    name = cfg.optimized_metric
    if name is not None and name not in metrics:
        raise UserInputError(f"optimized_metric={name!r} is not logged; choose one of {', '.join(sorted(metrics))}")
    return None if name is None else metrics[name]


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="evaluate")
def evaluate_main(cfg: DictConfig) -> None:
    """``mmembed-evaluate``: see ``conf/evaluate.yaml``."""
    run_command(evaluate, cfg)


def shard_main() -> None:
    """``mmembed-shard``: see ``conf/shard.yaml``; ``mmembed-shard verify``: see ``conf/verify.yaml``."""
    if sys.argv[1:2] == ["verify"]:
        del sys.argv[1]  # Hydra takes every word for an override
        _verify_main()
    else:
        _convert_main()


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="shard")
def _convert_main(cfg: DictConfig) -> None:
    run_command(shard, cfg)


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="verify")
def _verify_main(cfg: DictConfig) -> None:
    run_command(verify, cfg)


def shard(cfg: DictConfig) -> Path:
    """Turn a dataset in M-BEIR's or BEIR's layout, or a file of queries and positives, into shards.

    Args:
        cfg: A configuration composed from ``conf/shard.yaml``.

    Returns:
        The folder of the shards.

    Raises:
        UserInputError: If the source cannot be used, or has not the published counts that it is to have.
    """
    from lightning_mmembed.data.jobs import usable_cores
    from lightning_mmembed.data.layout import MBEIRLayout
    from lightning_mmembed.data.manifest import read_manifest, summary
    from lightning_mmembed.data.places import Place
    from lightning_mmembed.data.published_counts import check_source_counts, count_source_lines
    from lightning_mmembed.data.shard import shard_dataset
    from lightning_mmembed.data.sources import TEXT_SETTINGS, open_layout

    source, out = cfg.source, cfg.out  # both are read first: one that is not given is told before any work
    if cfg.published_counts:
        check_source_counts(count_source_lines(MBEIRLayout(source)))
    settings = OmegaConf.to_container(OmegaConf.masked_copy(cfg, list(TEXT_SETTINGS)), resolve=True)
    layout = open_layout(source, cfg.layout, **cast(dict[str, Any], settings))
    directory = shard_dataset(
        layout,
        out,
        archive=cfg.archive,
        max_bad_fraction=cfg.max_bad_fraction,
        samples_per_shard=cfg.samples_per_shard,
        num_workers=usable_cores() if cfg.num_workers is None else cfg.num_workers,
    )
    print(f"{summary(read_manifest(Place(directory)))}\nshards: {directory}")
    return directory


def verify(cfg: DictConfig) -> None:
    """Check shards, and print what was counted.

    Args:
        cfg: A configuration composed from ``conf/verify.yaml``.

    Raises:
        UserInputError: If the shards are not sound; it names every finding.
    """
    from rich.console import Console

    from lightning_mmembed.data.verify import counts_table, verify_shards

    if cfg.published not in (True, False, None):
        raise UserInputError(f"published={cfg.published!r} is unknown; write true, false or null")
    verification = verify_shards(cfg.out, cfg.published)
    Console().print(counts_table(verification.counts))
    if verification.findings:
        raise UserInputError(verification.report(cfg.out))
    print(f"the shards in {cfg.out} are sound")
