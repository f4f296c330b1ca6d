"""FSDP2 in two CPU processes: the same vectors, every layer by itself, weights of several types, every encoder."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from contrast_worlds import (
    Gradients,
    Part,
    batch_of,
    build_encoder,
    drawn_item,
    error,
    fit,
    oracle_gradients,
    parts,
    with_sgd,
)
from distributed_worlds import in_processes
from lightning.pytorch.strategies import ModelParallelStrategy
from tokenizers import processors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel
from worlds import ARCHITECTURE, tiny_trainer

from lightning_mmembed import Candidate, MBEIRDataModule
from lightning_mmembed.distributed import Processes
from lightning_mmembed.encoders.dual import DualEncoder
from lightning_mmembed.encoders.sharding import is_sharded, shard
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.strategies import FSDP2Strategy

pytestmark = pytest.mark.slow  # starts processes

TOLERANCE = 1e-5
STRATEGIES: dict[str, Callable[[], Any]] = {"ddp": lambda: "ddp", "fsdp2": FSDP2Strategy}

#: Of two processes: the first one never has a picture, in the second batch none has.
MIXED = parts((2, 3), negatives=True)
TEXTS = [parts((n,), negatives=True)[0] for n in (3, 2)]

#: Number of steps of a run by the batch that it ends with.
LENGTHS = {"texts": 1, "mixed": 4}


# --- what is sharded -------------------------------------------------------------------------------------------------


def check_sharded_encoder(processes: Processes, checkpoint: Path) -> None:
    kinds = (("text",), ("image", "image,text"))[processes.rank]
    entries = [Candidate(drawn_item(number, kinds[number % len(kinds)])) for number in range(6)]
    encoder = build_encoder(checkpoint)
    expected = encoder.encode(entries, batch_size=6)
    names = [name for name, _ in encoder.named_parameters()]
    mesh = init_device_mesh("cpu", (processes.size,))
    assert not is_sharded(encoder)
    shard(encoder, mesh, "32-true")
    assert is_sharded(encoder)
    assert [name for name, _ in encoder.named_parameters()] == names

    units = [module for module in encoder.modules() if isinstance(module, FSDPModule)]
    layers = list(encoder.backbone.language_model.layers)
    assert len(layers) == ARCHITECTURE["num_layers"]
    assert units == [encoder, *layers]
    for name, parameter in encoder.named_parameters():
        assert isinstance(parameter, DTensor), name
        rows = parameter.shape[0]
        own = len(torch.arange(rows).chunk(processes.size)[processes.rank]) if rows > 1 else rows - processes.rank
        assert len(parameter.to_local()) == own, name
    torch.testing.assert_close(encoder.encode(entries, batch_size=6), expected, rtol=0, atol=1e-6)


def test_a_sharded_encoder_gives_the_vectors_of_a_whole_one_and_each_layer_is_a_unit(tiny_checkpoint: Path) -> None:
    in_processes(2, check_sharded_encoder, tiny_checkpoint)


# --- training --------------------------------------------------------------------------------------------------------


def train(processes: Processes, build: Callable[[], Any], directory: Path) -> None:
    """Train on batches without pictures, with pictures in one process, and without any."""
    for strategy, tokens, (name, length) in itertools.product(STRATEGIES, (None, 80), LENGTHS.items()):
        module = with_sgd(build(), tokens, optimizer=partial(torch.optim.SGD, lr=0.0))
        worlds = (TEXTS, MIXED, TEXTS, MIXED)[:length]
        batches = [batch_of(module.encoder, world[processes.rank], tokens) for world in worlds]
        settings = {"devices": processes.size, "strategy": STRATEGIES[strategy]()}
        found = fit(directory, module, batches, **settings).gradients
        torch.save(found, directory / f"{strategy}-{tokens}-{name}-{processes.rank}.pt")


def assert_gradients(directory: Path, expected: dict[str, Gradients]) -> None:
    for strategy, tokens, name, rank in itertools.product(STRATEGIES, (None, 80), LENGTHS, range(2)):
        found = torch.load(directory / f"{strategy}-{tokens}-{name}-{rank}.pt", weights_only=True)
        assert max(error(found, expected[name])) <= TOLERANCE, (strategy, tokens, name, rank)


def expected(build: Callable[[], Any]) -> dict[str, Gradients]:
    worlds: dict[str, list[Part]] = {"texts": TEXTS, "mixed": MIXED}
    return {name: oracle_gradients(build(), world) for name, world in worlds.items()}


def test_steps_without_pictures_in_some_processes_or_in_all_need_no_search_for_unused_weights(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    build = partial(build_encoder, tiny_checkpoint, True)
    in_processes(2, train, build, tmp_path)
    right = expected(build)
    assert_gradients(tmp_path, right)
    assert not any(gradient.any() for name, gradient in right["texts"].items() if "projector" in name)


@pytest.fixture(scope="module")
def clip(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("clip")
    words = AutoTokenizer.from_pretrained(tiny_checkpoint)
    ids = [(name, words.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    words.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ids)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(words), "max_position_embeddings": 40, "eos_token_id": ids[1][1]}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


def test_a_dual_encoder_trains_under_both_strategies(clip: Path, tmp_path: Path) -> None:
    build = partial(DualEncoder.from_pretrained, clip)
    in_processes(2, train, build, tmp_path)
    assert_gradients(tmp_path, expected(build))


def train_beside_bfloat16(processes: Processes, checkpoint: Path, directory: Path) -> None:
    for precision in ("32-true", "bf16-mixed"):
        for tokens in (None, 80):
            encoder = build_encoder(checkpoint, lora=True, dtype=torch.bfloat16)
            before = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
            module = with_sgd(encoder, tokens, optimizer=partial(torch.optim.AdamW, lr=1e-3))
            batches = [batch_of(encoder, MIXED[processes.rank], tokens)]
            settings = {"devices": processes.size, "strategy": FSDP2Strategy(), "precision": precision}
            found = fit(directory, module, batches, **settings).gradients
            torch.save(found, directory / f"{precision}-{tokens}-{processes.rank}.pt")
            for name, parameter in encoder.named_parameters():
                after = parameter.full_tensor()
                assert after.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
                assert torch.equal(after, before[name]) != parameter.requires_grad, name


def test_adapters_in_float32_are_trained_beside_a_frozen_base_in_bfloat16(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    in_processes(2, train_beside_bfloat16, tiny_checkpoint, tmp_path)
    right = oracle_gradients(build_encoder(tiny_checkpoint, lora=True), MIXED)
    rounding = error(oracle_gradients(build_encoder(tiny_checkpoint, lora=True, dtype=torch.bfloat16), MIXED), right)[0]
    for precision in ("32-true", "bf16-mixed"):
        for tokens in (None, 80):
            for rank in range(2):
                found = torch.load(tmp_path / f"{precision}-{tokens}-{rank}.pt", weights_only=True)
                assert all(gradient.dtype == torch.float32 for gradient in found.values())
                assert 0 < error(found, right)[0] < 2 * rounding, (precision, tokens, rank)


# --- what is refused -------------------------------------------------------------------------------------------------


def check_tensor_parallel(processes: Processes, checkpoint: Path, directory: Path) -> None:
    module = with_sgd(build_encoder(checkpoint), 80)
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=processes.size)
    with pytest.raises(UserInputError, match="tensor_parallel_size=2 is not supported; use lightning_mmembed"):
        fit(directory, module, [], devices=processes.size, strategy=strategy)


def test_tensor_parallelism_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    in_processes(2, check_tensor_parallel, tiny_checkpoint, tmp_path)


# --- validation ------------------------------------------------------------------------------------------------------


def validate(processes: Processes, checkpoint: Path, shards: Path, directory: Path) -> None:
    found = []
    for strategy in STRATEGIES.values():
        for tokens in (None, 80):
            module = with_sgd(build_encoder(checkpoint), tokens)
            trainer = tiny_trainer(directory, devices=processes.size, strategy=strategy())
            datamodule = MBEIRDataModule(shards, batch_size=3, negatives_per_query=1)
            found.append(trainer.validate(module, datamodule, verbose=False)[0])
    assert found[0].keys() == {"val/loss", "val/accuracy"}
    assert all(one == pytest.approx(found[0], rel=1e-5) for one in found)


def test_validation_is_the_same_under_both_strategies_with_gradcache_or_without(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    in_processes(2, validate, tiny_checkpoint, tiny_shards, tmp_path)
