"""``mmembed-mine``: hard negatives for the training queries, without training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from lightning_mmembed.cli import CONFIG_PATH, apply_extras, run_command
from lightning_mmembed.cli_files import check_place, load_encoder, quoted, start
from lightning_mmembed.errors import UserInputError

if TYPE_CHECKING:
    from lightning_mmembed.encoders.base import Encoder
    from lightning_mmembed.mining_rule import MiningRule
    from lightning_mmembed.retrieval.pool import Pool, QuerySet

#: Arguments of the command line that are taken as they are written.
TEXTS = ("out", "page", "check", "ckpt_path")


def mine(cfg: DictConfig) -> Path:
    """Mine hard negatives for the training queries into a file, each process for its share of them.

    A file that was mined with the same weights, pool and settings is left as it is.

    Args:
        cfg: A configuration composed from ``conf/mine.yaml``.

    Returns:
        The file, which training takes as ``data.negatives``.

    Raises:
        UserInputError: If the rule, the pool, the model, the checkpoint or a place to write cannot be used.
    """
    from rich.console import Console

    from lightning_mmembed.retrieval.embed import encoder_fingerprint
    from lightning_mmembed.retrieval.mine import mine_into
    from lightning_mmembed.retrieval.mining_views import audit_table

    rule = hydra.utils.instantiate(cfg.mining, _convert_="all")
    _check_arguments(cfg, rule)
    apply_extras(cfg)
    fabric, store = start(cfg, cfg.vectors.directory)
    datamodule = hydra.utils.instantiate(cfg.data, _convert_="all")
    datamodule.prepare_data()
    # Before the model: a prompt or a pool that is not there is told before the work.
    pool = datamodule.shards.pool(cfg.pool)
    query_sets = datamodule.shards.query_sets("train", cfg.instruction, cfg.instruction_seed)
    encoder = load_encoder(cfg.model.encoder, cfg.ckpt_path).to(fabric.device)
    other = None if cfg.check is None else _second_encoder(cfg.check).to(fabric.device)
    check = None if other is None else (other, encoder_fingerprint(other))
    path = Path(store.processes.broadcast(str(cfg.out)))  # others may have made up one, such as by the time
    audit = mine_into(path, encoder, pool, query_sets, store, encoder_fingerprint(encoder), rule, check)
    if fabric.is_global_zero:
        Console().print(audit_table(audit))
        if cfg.page is not None:
            print(f"page: {_write_page(cfg, path, audit, pool, query_sets)}")
        print(f"negatives: {path}")
    return path


def _check_arguments(cfg: DictConfig, rule: MiningRule) -> None:
    if rule.needs_check_scores and cfg.check is None:
        raise UserInputError(
            f"mining.check_margin={rule.check_margin} needs a second model; give check=<folder or hub id of an encoder>"
        )
    if cfg.check is not None and not rule.needs_check_scores:
        raise UserInputError(f"check={cfg.check!r} would not be used; give mining=cross_check, or no check")
    if cfg.instruction != "random" and not isinstance(cfg.instruction, int):
        raise UserInputError(f"instruction={cfg.instruction!r} is no single prompt; write a place from 0, or random")
    for name in ("out", "page"):
        if cfg[name] is not None:
            check_place(name, cfg[name], is_folder=False)
    check_place("vectors.directory", cfg.vectors.directory, is_folder=True)


def _second_encoder(path: str) -> Encoder:
    from lightning_mmembed.encoders.dual import MODEL_TYPES, DualEncoder
    from lightning_mmembed.encoders.loading import load_config, reading
    from lightning_mmembed.encoders.mllm import MLLMEncoder

    with reading(path):
        is_dual = load_config(path).model_type in MODEL_TYPES
    encoder: Encoder = (DualEncoder if is_dual else MLLMEncoder).from_pretrained(path)
    return encoder.eval()


def _write_page(cfg: DictConfig, path: Path, audit: dict[str, Any], pool: Pool, query_sets: list[QuerySet]) -> Path:
    from lightning_mmembed.data.negatives import read_columns
    from lightning_mmembed.retrieval.mined_examples import mined_examples
    from lightning_mmembed.retrieval.mining_views import Mined
    from lightning_mmembed.retrieval.report import write_report

    settings = ", ".join(f"{name} {value}" for name, value in cfg.mining.items() if name != "_target_" and value)
    facts = {"negatives": str(path), "rule": settings, "pool": f"{pool.name}, {len(pool):,} candidates"}
    facts |= {} if cfg.ckpt_path is None else {"checkpoint": str(cfg.ckpt_path)}
    facts |= {} if cfg.check is None else {"second model": str(cfg.check)}
    shown = Mined(
        f"{sum(len(some) for some in query_sets):,} queries",
        audit,
        mined_examples(pool, query_sets, read_columns(path)),
    )
    return write_report(cfg.page, title=f"Hard negatives: {cfg.dataset}", metrics={}, minings=[shown], facts=facts)


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="mine")
def _mine_main(cfg: DictConfig) -> None:
    run_command(mine, cfg)


def mine_main() -> None:
    """``mmembed-mine``: see ``conf/mine.yaml``."""
    sys.argv[1:] = [quoted(argument, TEXTS) for argument in sys.argv[1:]]
    _mine_main()
