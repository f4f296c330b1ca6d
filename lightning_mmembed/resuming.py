"""How far a run is, as a checkpoint tells it: in one form that Lightning goes on from exactly, whenever it was saved.

Lightning counts in a checkpoint what has begun and what has ended, and guesses from it which hook saved it. Some of
its guesses (2.6) lose a validation, count an epoch twice or go on in the middle of an accumulation whose gradients are
gone. So the counts are put down as if nothing were ever half done: an epoch is done or not, a batch too, a validation
is due or not, and batches since the last optimizer step are not done. Which batches come next follows from these counts
alone, because a batch is a function of its position.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

_EPOCHS, _BATCHES, _VALIDATION = "epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"


def settle_progress(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Rewrite the counts of a checkpoint that is about to be saved.

    Args:
        trainer: The Trainer; one that does not fit is left alone.
        checkpoint: Its checkpoint.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return
    state = checkpoint["loops"]["fit_loop"]
    epochs = state[_EPOCHS]["current"]
    if epochs["ready"] == epochs["processed"]:
        _settle_epoch(trainer, state)
    else:
        _settle_batch(trainer, state)


def _settle_epoch(trainer: Trainer, state: dict[str, Any]) -> None:
    """No batch of the next epoch is done."""
    for counts in (state[_EPOCHS]["total"], state[_EPOCHS]["current"]):
        _count(counts, counts["processed"])
    batches = state[_BATCHES]
    batches["is_last_batch"] = False
    _count(batches["current"], 0)
    _put_validation(state, due=False)
    if trainer.max_steps != -1:  # Lightning then enters the epoch as if it had been in it
        epoch, total = state[_EPOCHS]["current"]["processed"], batches["total"]["processed"]
        _logged_steps(state, -int(_validates_after(trainer, epoch, 0, total)))


def _settle_batch(trainer: Trainer, state: dict[str, Any]) -> None:
    """The batches up to the last optimizer step are done, and the validation after it or not."""
    batches, epoch = state[_BATCHES], state[_EPOCHS]["current"]["processed"]
    current, total = batches["current"], batches["total"]
    in_next = current["ready"] > current["processed"]
    last = current["processed"] == trainer.num_training_batches
    undone = 0 if last else current["processed"] % trainer.accumulate_grad_batches
    for counts in (current, total):
        _count(counts, counts["processed"] - undone)
    batches["is_last_batch"] = last
    validates = _validates_after(trainer, epoch, current["processed"], total["processed"])
    _put_validation(state, due=validates and not (undone or in_next or _is_validated(trainer)))
    # A step is logged when its validation is over; where there is one, the resumed loop passes that place again.
    _logged_steps(state, int(not undone and not in_next) - int(validates))


def _is_validated(trainer: Trainer) -> bool:
    loop = trainer.fit_loop.epoch_loop.val_loop
    return trainer.validating and loop.batch_progress.current.completed == sum(loop.max_batches)


def _validates_after(trainer: Trainer, epoch: int, done: int, total: int) -> bool:
    """Whether the validation split is evaluated after so many batches of an epoch, and of all epochs."""
    every, period = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or every is None or (period is not None and (epoch + 1) % period):
        return False
    return (total if period is None else done) % every == 0


def _put_validation(state: dict[str, Any], due: bool) -> None:
    """Lightning repeats a validation in which a batch has begun and not ended."""
    progress = state[_VALIDATION]
    progress["is_last_batch"] = False
    for counts in (progress["total"], progress["current"]):
        counts.update(ready=int(due), started=int(due), processed=0, completed=0)


def _count(counts: dict[str, int], number: int) -> None:
    counts.update(ready=number, started=number, processed=number, completed=number)


def _logged_steps(state: dict[str, Any], change: int) -> None:
    state["epoch_loop.state_dict"]["_batches_that_stepped"] += change
