"""GradCache on one process: the step of a batch that is held at once, in every respect that a Trainer knows."""

from __future__ import annotations

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
    error,
    fit,
    gradients_of,
    norm,
    oracle_gradients,
    oracle_gradients_with_dropout,
    oracle_loss,
    parts,
    with_sgd,
)
from distributed_worlds import in_processes
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from worlds import tiny_module, tiny_trainer

from lightning_mmembed import MBEIRDataModule, RetrievalModule
from lightning_mmembed.distributed import Processes
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.sharded_checkpoints import whole
from lightning_mmembed.strategies import FSDP2Strategy

TOLERANCE = 1e-5

#: A batch without any picture, and one with some.
TEXTS, MIXED = parts((4, 5), negatives=True)

#: Positions of a pass: of one item, of about three, of all of them.
CUTS = (1, 80, 10**6)


def weights(module: RetrievalModule) -> Gradients:
    return {name: parameter.detach().clone() for name, parameter in module.encoder.named_parameters()}


def mean(*gradients: Gradients) -> Gradients:
    return {name: torch.stack([one[name] for one in gradients]).mean(0) for name in gradients[0]}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["held", "checkpointing"])
@pytest.mark.parametrize("part", [TEXTS, MIXED], ids=["texts", "mixed"])
@pytest.mark.parametrize("tokens", CUTS)
def test_every_cut_gives_the_gradient_of_a_step_that_holds_all_graphs(
    tokens: int, part: Part, checkpointing: bool, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def encoder(checkpointing: bool = False) -> Any:
        return build_encoder(tiny_checkpoint, lora=True, checkpointing=checkpointing, dropout=0.3)

    module = with_sgd(encoder(checkpointing), tokens)
    found = fit(tmp_path, module, [batch_of(module.encoder, part, tokens)])
    right = oracle_gradients_with_dropout(encoder(), [part], tokens, [found.seed])
    assert max(error(found.gradients, right)) <= TOLERANCE
    another = oracle_gradients_with_dropout(encoder(), [part], tokens, [found.seed + 1000])
    assert error(another, right)[0] > 1e-2


def test_a_batch_of_texts_gives_the_weights_that_only_pictures_reach_a_gradient_of_zero(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for tokens in (None, 80):
        module = with_sgd(build_encoder(tiny_checkpoint), tokens)
        found = fit(tmp_path, module, [batch_of(module.encoder, TEXTS, tokens)]).gradients
        tower = [gradient for name, gradient in found.items() if "vision_tower" in name or "projector" in name]
        assert tower
        assert not any(gradient.any() for gradient in tower)
        assert norm(found.values()) > 0


def test_the_gradient_of_all_passes_together_is_clipped(tiny_checkpoint: Path, tmp_path: Path) -> None:
    module = with_sgd(build_encoder(tiny_checkpoint), 80)
    before = weights(module)
    right = oracle_gradients(build_encoder(tiny_checkpoint), [MIXED])
    limit = norm(right.values()) / 7
    fit(tmp_path, module, [batch_of(module.encoder, MIXED, 80)], gradient_clip_val=limit)
    after = weights(module)
    moved = {name: (before[name] - after[name]) / 0.1 for name in right}
    assert norm(moved.values()) == pytest.approx(limit, rel=1e-4)
    assert error(moved, {name: gradient / 7 for name, gradient in right.items()})[0] < 1e-4  # float32 of a difference


def test_accumulated_gradients_are_the_mean_of_those_of_the_batches(tiny_checkpoint: Path, tmp_path: Path) -> None:
    module = with_sgd(build_encoder(tiny_checkpoint), 80)
    batches = [batch_of(module.encoder, part, 80) for part in (MIXED, TEXTS)]
    found = fit(tmp_path, module, batches, accumulate_grad_batches=2).gradients
    right = mean(*(oracle_gradients(build_encoder(tiny_checkpoint), [part]) for part in (MIXED, TEXTS)))
    assert max(error(found, right)) <= TOLERANCE


def test_the_scheduler_is_stepped_once_a_step_however_many_passes_there_are(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    module = with_sgd(build_encoder(tiny_checkpoint), 1, scheduler=partial(LambdaLR, lr_lambda=lambda n: 1 / (1 + n)))
    rates: list[float] = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    fit(tmp_path, module, [batch_of(module.encoder, TEXTS, 1)] * 3, callbacks=[Rates()])
    assert rates == pytest.approx([0.1, 0.1 / 2, 0.1 / 3])


def test_a_step_in_bfloat16_has_the_gradient_of_one_that_holds_all_graphs(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    exact = oracle_gradients(build_encoder(tiny_checkpoint), [MIXED])
    for tokens in (None, 80):
        module = with_sgd(build_encoder(tiny_checkpoint), tokens)
        found = fit(tmp_path, module, [batch_of(module.encoder, MIXED, tokens)], precision="bf16-mixed").gradients
        # With its cache, autocast would sum the gradients of passes in bfloat16.
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            vectors = passes_of(build_encoder(tiny_checkpoint), MIXED, tokens)
        right = gradients_by_the_definition(*vectors)
        rounding = error(right, exact)[0]
        assert 1e-3 < rounding < 0.1, "bfloat16 is used"
        # Rounding to bfloat16 makes much of a gradient of the vectors that differs in the last digit of float32.
        assert error(found, right)[0] < rounding / 4


def passes_of(encoder: Any, part: Part, tokens: int | None) -> tuple[Any, Tensor]:
    inputs = batch_of(encoder, part, tokens).inputs
    return encoder, torch.cat([encoder(one) for one in inputs.passes()])[inputs.order.argsort()]


def gradients_by_the_definition(encoder: Any, vectors: Tensor) -> Gradients:
    count = len(MIXED.queries)
    oracle_loss([MIXED], vectors[:count], vectors[count:]).backward()  # type: ignore[no-untyped-call]
    return gradients_of(encoder, absent=True)


@pytest.mark.parametrize("tokens", [None, 80])
def test_a_step_leaves_the_random_numbers_of_the_process_as_they_were(
    tokens: int | None, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    states: list[Tensor] = []

    class States(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            states.append(torch.get_rng_state())

        on_train_batch_end = on_train_batch_start

    module = with_sgd(build_encoder(tiny_checkpoint, lora=True, dropout=0.3), tokens)
    fit(tmp_path, module, [batch_of(module.encoder, MIXED, tokens)] * 2, callbacks=[States()])
    assert len(states) == 4
    assert all(torch.equal(state, states[0]) for state in states)


def test_dropout_differs_between_steps_and_runs_but_not_between_runs_of_one_seed(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def step(number: int, seed: int) -> Gradients:
        module = with_sgd(build_encoder(tiny_checkpoint, lora=True, dropout=0.3), 80, optimizer=still)
        torch.manual_seed(seed)
        return fit(tmp_path, module, [batch_of(module.encoder, TEXTS, 80)] * (number + 1)).gradients

    still = partial(torch.optim.SGD, lr=0.0)
    first = step(0, 1)
    assert error(step(0, 1), first) == (0, 0)
    assert error(step(1, 1), first)[0] > 1e-2
    assert error(step(0, 2), first)[0] > 1e-2


def test_five_steps_of_adamw_lead_to_the_weights_of_plain_steps(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = []
    for tokens in (None, 80):
        module = RetrievalModule(build_encoder(tiny_checkpoint), mini_batch_num_tokens=tokens)
        start = weights(module)
        fit(tmp_path, module, [batch_of(module.encoder, part, tokens) for part in (MIXED, TEXTS, MIXED, TEXTS, MIXED)])
        found.append(weights(module))
    assert max(float((found[0][name] - start[name]).abs().max()) for name in start) > 2e-4, "they have moved"
    # No softmax sees the biases of keys: their gradients are rounding alone, which AdamW makes as large as any other.
    names = [name for name in start if not name.endswith("k_proj.bias")]
    assert max(float((found[0][name] - found[1][name]).abs().max()) for name in names) < 1e-6


def test_validation_is_that_of_a_module_without_it(tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = []
    for tokens in (None, 1, 100):
        module = tiny_module(tiny_checkpoint)
        module.mini_batch_num_tokens = tokens
        datamodule = MBEIRDataModule(tiny_shards, batch_size=6, negatives_per_query=2)
        found.append(tiny_trainer(tmp_path).validate(module, datamodule, verbose=False)[0])
    assert found[0].keys() == {"val/loss", "val/accuracy"}
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_a_budget_of_no_tokens_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(UserInputError, match="mini_batch_num_tokens=0 is too small"):
        with_sgd(build_encoder(tiny_checkpoint), 0)


def test_it_is_refused_under_a_strategy_whose_gradient_would_be_another(tiny_checkpoint: Path, tmp_path: Path) -> None:
    module, trainer = with_sgd(build_encoder(tiny_checkpoint), 80), tiny_trainer(tmp_path)
    trainer._accelerator_connector.strategy = FSDPStrategy()  # a Trainer asks for a GPU before it takes it
    module.trainer = trainer
    with pytest.raises(UserInputError, match="tokens=80 cannot be used with FSDPStrategy: GradCache runs several"):
        module.setup("fit")
    trainer._accelerator_connector.strategy = DDPStrategy(static_graph=True)
    with pytest.raises(UserInputError, match=r"DDPStrategy: .* DDP without static_graph"):
        module.setup("fit")
    module.mini_batch_num_tokens = None
    module.setup("fit")


# --- with several processes ------------------------------------------------------------------------------------------

STRATEGIES: dict[str, Callable[[], Any]] = {"ddp": lambda: "ddp", "fsdp2": FSDP2Strategy}

#: Two batches of each of two processes.
WORLDS = (parts((2, 3), negatives=True), parts((3, 1), negatives=False))


def accumulate(processes: Processes, checkpoint: Path, directory: Path) -> None:
    for name, strategy in STRATEGIES.items():
        module = with_sgd(build_encoder(checkpoint), 80)
        batches = [batch_of(module.encoder, world[processes.rank], 80) for world in WORLDS]
        settings = {"devices": processes.size, "strategy": strategy(), "accumulate_grad_batches": 2}
        found = fit(directory, module, batches, **settings).gradients
        torch.save(found, directory / f"{name}-{processes.rank}.pt")


@pytest.mark.slow
def test_processes_accumulate_the_mean_of_the_gradients_of_their_batches(tiny_checkpoint: Path, tmp_path: Path) -> None:
    in_processes(2, accumulate, tiny_checkpoint, tmp_path)
    right = mean(*(oracle_gradients(build_encoder(tiny_checkpoint), world) for world in WORLDS))
    for name in STRATEGIES:
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert max(error(found, right)) <= TOLERANCE, (name, rank)


def clip(processes: Processes, checkpoint: Path, directory: Path, limit: float) -> None:
    for name, strategy in STRATEGIES.items():
        module = with_sgd(build_encoder(checkpoint), 80)
        before = weights(module)
        batches = [batch_of(module.encoder, WORLDS[0][processes.rank], 80)]
        fit(directory, module, batches, devices=processes.size, strategy=strategy(), gradient_clip_val=limit)
        after = {name: whole(value.detach()) for name, value in module.encoder.named_parameters()}
        moved = {weight: (before[weight] - after[weight]) / 0.1 for weight in before}
        torch.save(moved, directory / f"{name}-{processes.rank}.pt")


@pytest.mark.slow
def test_processes_clip_the_gradient_of_all_of_them_together(tiny_checkpoint: Path, tmp_path: Path) -> None:
    right = oracle_gradients(build_encoder(tiny_checkpoint), WORLDS[0])
    limit = norm(right.values()) / 7
    in_processes(2, clip, tiny_checkpoint, tmp_path, limit)
    for name in STRATEGIES:
        for rank in range(2):
            moved = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert norm(moved[weight] for weight in right) == pytest.approx(limit, rel=1e-4), (name, rank)
            assert error(moved, {weight: value / 7 for weight, value in right.items()})[0] < 1e-4, (name, rank)
