"""``mmembed-shard``: turns datasets into shards, and checks shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf

from lightning_mmembed.cli import CONFIG_PATH, run_command
from lightning_mmembed.errors import UserInputError


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
