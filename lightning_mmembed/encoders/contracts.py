"""What every encoder promises, checked by a few small passes: at load for unknown families, in tests for all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from lightning_mmembed.encoders.base import evaluating
from lightning_mmembed.encoders.processor import Bucket, EncoderInputs
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Item

if TYPE_CHECKING:
    from lightning_mmembed.encoders.mllm import MLLMEncoder

#: Largest difference between values that should be equal, over the largest of them or 1, by the type of the weights.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
#: Smallest difference between values that should differ; both come of passes of one shape, so that none is by rounding.
DIFFERENCE = 1e-5


@dataclass(frozen=True)
class Contract:
    """The outcome of one check.

    Args:
        name: What is promised.
        passed: Whether it was kept.
        detail: The largest difference seen, or why there is none.
    """

    name: str
    passed: bool
    detail: str


def check_contracts(encoder: MLLMEncoder) -> list[Contract]:
    """Check all that an encoder promises and that needs no gradient; an error in a check counts as a broken promise.

    The encoder is left as it was. Checked are :func:`text_only_rows`, :func:`batch_invariance`,
    :func:`padding_side_invariance`, :func:`pictures_count`, :func:`final_norm` and :func:`attention`.
    """
    with evaluating(encoder), torch.inference_mode():
        return [_outcome(name, check, encoder) for name, check in CONTRACTS.items()]


def require(encoder: MLLMEncoder, path: str) -> None:
    """Refuse an encoder that breaks a contract.

    Raises:
        UserInputError: With the names of the broken contracts and why.
    """
    broken: dict[str, list[str]] = {}
    for contract in check_contracts(encoder):
        if not contract.passed:
            broken.setdefault(contract.detail, []).append(contract.name)
    if broken:
        reasons = "; ".join(f"{', '.join(names)} ({why})" for why, names in broken.items())
        raise UserInputError(
            f"checkpoint {path!r}, model_type={encoder.backbone.config.model_type!r}, does not keep what an encoder "
            f"promises: {reasons}. Take a checkpoint of a family with an adapter, or pass check_contracts=False to "
            "use it all the same"
        )


def _outcome(name: str, check: Callable[[MLLMEncoder], Contract], encoder: MLLMEncoder) -> Contract:
    try:
        return check(encoder)
    except Exception as error:  # an unknown family may raise anything; that too is an answer
        return Contract(name, False, f"{type(error).__name__}: {error}")


def batch_invariance(encoder: MLLMEncoder) -> Contract:
    """A vector does not depend on what else is in its batch."""
    entries = _texts() + _pictures()
    alone = torch.cat([_encode(encoder, [entry]) for entry in entries])
    return _equal("batch invariance", encoder, _encode(encoder, entries), alone)


def padding_side_invariance(encoder: MLLMEncoder) -> Contract:
    """A vector does not depend on the side that its batch is padded on."""
    entries = _texts() + _pictures()
    left, right = (_encode(encoder, entries, side) for side in ("left", "right"))
    return _equal("padding-side invariance", encoder, left, right)


def text_only_rows(encoder: MLLMEncoder) -> Contract:
    """A text has the vector that it has among texts also beside pictures, and after a batch of them."""
    texts = _texts()
    before = _encode(encoder, texts)
    beside = _encode(encoder, texts + _pictures())[: len(texts)]
    after = _encode(encoder, texts)
    return _equal("text-only rows", encoder, torch.stack([beside, after]), before.expand(2, -1, -1))


def pictures_count(encoder: MLLMEncoder) -> Contract:
    """Another picture has another vector."""
    red, blue = (_encode(encoder, [Item(image=_drawn(colour, (48, 32)))]) for colour in ("red", "blue"))
    return _differ("pictures count", red, blue, "the picture does not reach its vector")


def final_norm(encoder: MLLMEncoder) -> Contract:
    """What is pooled is the output of the norm that ran last in the language model."""
    seen: list[Tensor] = []
    model = encoder.backbone.get_submodule(encoder.family.language_model)
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    hooks = [norm.register_forward_hook(lambda module, given, output: seen.append(output)) for norm in norms]
    try:
        bucket = _inputs(encoder, _texts() + _pictures()).to(encoder.device).buckets[0]
        states = _states(encoder, bucket, bucket.input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    name = "state after the final norm"
    if not seen or seen[-1].shape != states.shape:
        return Contract(name, False, "the last norm of the language model does not give its states")
    attended = bucket.attention_mask.bool()
    return _equal(name, encoder, states[attended], seen[-1][attended])


def attention(encoder: MLLMEncoder) -> Contract:
    """Another last token changes the states of earlier ones in a bidirectional encoder, and only there."""
    bidirectional = bool(encoder.settings["bidirectional"])
    name = "bidirectional attention" if bidirectional else "causal attention"
    outcomes = []
    for entries in ([Item("a red bus")], [*_texts(), *_pictures()]):  # without padding, and with it
        bucket = _inputs(encoder, entries).to(encoder.device).buckets[0]
        row = int(bucket.attention_mask.sum(1).argmin())
        last = int(bucket.attention_mask[row].sum()) - 2  # the last is EOS
        other = bucket.input_ids.clone()
        other[row, last] = other[row, last - 1]
        one, two = (_states(encoder, bucket, ids)[row, :last] for ids in (bucket.input_ids, other))
        if bidirectional:
            outcomes.append(_differ(name, one, two, "a later token does not reach the states of earlier ones"))
        else:
            outcomes.append(_equal(name, encoder, one, two))
    return min(outcomes, key=lambda outcome: outcome.passed)


def gradient_reach(encoder: MLLMEncoder, unread: Sequence[str] = ()) -> Contract:
    """The gradient reaches every trainable weight, and no other; needs a backward pass, so not checked at load.

    Args:
        encoder: Its gradients are cleared.
        unread: Parts of names of weights that the family does not read, such as layers after the one it takes.
    """
    encoder.zero_grad()
    vectors = encoder(encoder.processor(_texts() + _pictures()).to(encoder.device))
    (vectors * torch.linspace(-1, 1, vectors.shape[1], device=vectors.device)).sum().backward()
    wrong = []
    for name, weight in encoder.named_parameters():
        reached = weight.grad is not None and bool(weight.grad.abs().sum() > 0)
        if reached != (weight.requires_grad and not any(part in name for part in unread)):
            wrong.append(name)
    encoder.zero_grad()
    return Contract("gradient reach", not wrong, f"{len(wrong)} weights, such as {wrong[0]}" if wrong else "all")


CONTRACTS: dict[str, Callable[[MLLMEncoder], Contract]] = {
    "text-only rows": text_only_rows,  # first, while no picture has been seen
    "batch invariance": batch_invariance,
    "padding-side invariance": padding_side_invariance,
    "pictures count": pictures_count,
    "state after the final norm": final_norm,
    "attention": attention,
}


def _texts() -> list[Item]:
    return [
        Item("a red bus"),
        Item("a red bus and a blue one"),
        Item("the red bus that waits beside a tree until noon"),
    ]


def _pictures() -> list[Item]:
    """Of different shapes, with a text and without."""
    return [Item(image=_drawn("red", (48, 32))), Item("a blue bus", _drawn("blue", (30, 60)))]


def _drawn(colour: str, size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((4, 4, 20, 28), fill=colour)
    return image


def _inputs(encoder: MLLMEncoder, entries: Sequence[Item], padding_side: str = "right") -> EncoderInputs:
    """The items in one bucket."""
    processor = copy.copy(encoder.processor)
    processor.length_buckets, processor.padding_side = 1, padding_side
    return processor(entries)


def _encode(encoder: MLLMEncoder, entries: Sequence[Item], padding_side: str = "right") -> Tensor:
    return encoder.encode_inputs(_inputs(encoder, entries, padding_side))


def _states(encoder: MLLMEncoder, bucket: Bucket, ids: Tensor) -> Tensor:
    return encoder.family.states(encoder.backbone, ids, bucket.attention_mask, bucket.pictures)


def _distance(one: Tensor, two: Tensor) -> float:
    one, two = one.float(), two.float()
    return float((one - two).abs().max() / two.abs().max().clamp(min=1))


def _equal(name: str, encoder: MLLMEncoder, one: Tensor, two: Tensor) -> Contract:
    distance = _distance(one, two)
    # Written so that a NaN fails.
    return Contract(name, distance <= _tolerance(encoder.backbone), f"difference {distance:.1e}")


def _tolerance(backbone: nn.Module) -> float:
    """That of the coarsest type: what is trained may be in float32 beside it, and quantised weights have none."""
    present = {parameter.dtype for parameter in backbone.parameters()}
    return max((TOLERANCES[dtype] for dtype in present & TOLERANCES.keys()), default=max(TOLERANCES.values()))


def _differ(name: str, one: Tensor, two: Tensor, otherwise: str) -> Contract:
    distance = _distance(one, two)
    return Contract(name, distance > DIFFERENCE, f"difference {distance:.1e}" if distance > DIFFERENCE else otherwise)
