"""Hygiene: a test that changes the state of its process fails, and the next one starts from a clean state."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before any import of transformers or huggingface_hub, which read it once: no test can reach a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from worlds import ARCHITECTURE, write_pets

# What pytest, torch and Lightning set themselves; it is put back all the same.
ENVIRONMENT_OF_OTHERS = frozenset(
    {
        "CUBLAS_WORKSPACE_CONFIG",  # Trainer(deterministic=True)
        "CUDA_MODULE_LOADING",  # the first use of a GPU
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "NODE_RANK",
        "PL_GLOBAL_SEED",  # seed_everything
        "PL_SEED_WORKERS",
        "PYTEST_CURRENT_TEST",
        "PYTORCH_NVML_BASED_CUDA_CHECK",  # Lightning, looking for a GPU
        "RANK",
        "TORCHINDUCTOR_CACHE_DIR",  # torch.compile
        "TRITON_CACHE_DIR",
        "WORLD_SIZE",
    }
)


@pytest.fixture(autouse=True)
def environment_stays_as_it_was() -> Iterator[None]:
    """Put the environment variables back, and fail the test that changed one."""
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    os.environ.clear()
    os.environ.update(before)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    leaked = sorted(changed - ENVIRONMENT_OF_OTHERS)
    assert not leaked, f"the test changed the environment variables {leaked}; use monkeypatch.setenv"


@pytest.fixture(autouse=True)
def process_group_is_destroyed() -> Iterator[None]:
    """Destroy the torch process group that a test, or the Trainer in it, has left over."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def number_of_threads_stays_as_it_was() -> Iterator[None]:
    """Put torch's number of threads back, and fail the test that changed it: the next one would run slower."""
    before = torch.get_num_threads()
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before, f"the test left torch with {after} threads in place of {before}"


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset in M-BEIR's layout; tests that change it write their own with :func:`worlds.write_pets`."""
    return write_pets(tmp_path_factory.mktemp("world") / "source")


@pytest.fixture(scope="session")
def tiny_shards(tiny_source: Path) -> Path:
    """The shards of the small dataset."""
    from lightning_mmembed.data import shard_dataset

    return shard_dataset(tiny_source, tiny_source.parent / "shards")


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_shards: Path) -> Path:
    """A random-weight LLaVA-NeXT checkpoint whose tokenizer learned from the small dataset; read-only."""
    from lightning_mmembed.data import ShardTexts
    from lightning_mmembed.encoders.tiny import tiny_encoder

    path = tiny_shards.parent / "checkpoint"
    tiny_encoder(path, ShardTexts(tiny_shards), ARCHITECTURE)
    return path
