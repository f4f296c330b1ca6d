"""What an item's vector depends on, and which states it is pooled from."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lightning_mmembed import MLLMEncoder, Query
from lightning_mmembed.items import Item

POOLINGS = ("mean", "last", "latent-attention")
TOLERANCE = 1e-5  # contract 1


def picture(colour: str, size: tuple[int, int] = (40, 24)) -> Image.Image:
    return Image.new("RGB", size, colour)


def all_kinds() -> list[Query | Item]:
    """Texts, pictures and both, of several lengths, as candidates and as queries with and without an instruction."""
    long = "a very long story about a red ellipse and a blue rectangle that goes on for quite a while"
    return [
        Item(text="a red ellipse"),
        Item(text=long),
        Item(image=picture("red")),
        Item(text="gold", image=picture("gold", (10, 60))),
        Item(text=long, image=picture("blue")),
        Item(),
        Query(Item(text="which pet is green?")),
        Query(Item(text="which pet is green?"), instruction="Find the picture of this pet."),
        Query(Item(image=picture("purple")), instruction="Find the caption of this picture."),
        Query(Item(image=picture("gray"))),
        Query(Item(text="green in place of gray", image=picture("gray")), instruction="Change it"),
        Query(Item(text=long, image=picture("red")), instruction="Find the pet changed as told."),
    ]


def load(checkpoint: Path, pooling: str = "mean", bidirectional: bool = True, length_buckets: int = 4) -> MLLMEncoder:
    torch.manual_seed(0)  # latent attention is drawn at random
    encoder = MLLMEncoder.from_pretrained(
        checkpoint, pooling=pooling, bidirectional=bidirectional, length_buckets=length_buckets
    )
    return encoder.eval()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("bidirectional", [True, False], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_vector_does_not_depend_on_batch_mates_batch_size_order_padding_or_buckets(
    tiny_checkpoint: Path, pooling: str, bidirectional: bool
) -> None:
    entries = all_kinds()
    encoder = load(tiny_checkpoint, pooling, bidirectional, length_buckets=1)
    alone = torch.cat([encoder.encode([entry]) for entry in entries])  # no padding, no batch mates
    assert float(torch.pdist(alone).min()) > 100 * TOLERANCE, (
        "the items must differ for the comparison to mean something"
    )
    for buckets in (1, 2, 5, 64):
        encoder.processor.length_buckets = buckets
        for batch_size in (2, 5, len(entries)):
            assert distance(encoder.encode(entries, batch_size=batch_size), alone) <= TOLERANCE, (buckets, batch_size)
        order = list(range(len(entries)))
        random.Random(buckets).shuffle(order)
        shuffled = encoder.encode([entries[i] for i in order])
        assert distance(shuffled, alone[order]) <= TOLERANCE, buckets


@pytest.mark.parametrize("pooling", POOLINGS)
def test_other_batch_mates_of_the_same_length_leave_a_vector_alone(tiny_checkpoint: Path, pooling: str) -> None:
    encoder = load(tiny_checkpoint, pooling)
    mate = encoder.encode([Item(text="a red ellipse"), Item(image=picture("red"))])
    other = encoder.encode([Item(text="a red ellipse"), Item(image=picture("blue"))])
    assert distance(mate[0], other[0]) <= TOLERANCE
    assert distance(mate[1], other[1]) > 100 * TOLERANCE


def test_vectors_are_unit_length_float32_and_in_the_order_of_the_items(tiny_checkpoint: Path) -> None:
    encoder = load(tiny_checkpoint)
    vectors = encoder.encode(all_kinds())
    assert vectors.dtype is torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    assert encoder.encode([]).shape == (0, encoder.embedding_dim)


def test_encoding_leaves_the_mode_of_the_encoder_as_it_was(tiny_checkpoint: Path) -> None:
    encoder = load(tiny_checkpoint).train()
    encoder.encode_document(["a"])
    assert encoder.training


def test_the_four_ways_to_write_an_item_give_the_same_vector(tiny_checkpoint: Path) -> None:
    encoder = load(tiny_checkpoint)
    red = picture("red")
    given = encoder.encode_document(["a pet", red, (red, "a pet")])
    written = encoder.encode_document([Item("a pet"), Item(image=red), Item("a pet", red)])
    assert distance(given, written) <= TOLERANCE


# --- contract 2: the pooled state is the one after the final norm ---------------------------------------------------


def final_norm_states(encoder: MLLMEncoder, text: str) -> tuple[Tensor, Tensor]:
    """Token ids of a candidate, and what the final norm gave in a run of the language model of its own."""
    tokenizer = encoder.processor.prompts.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    input_ids = torch.tensor([[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]])
    seen: list[Tensor] = []
    hook = encoder.backbone.language_model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        encoder.backbone.language_model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
    hook.remove()
    return input_ids[0], seen[0][0]


def test_the_pooled_states_are_those_after_the_final_norm(tiny_checkpoint: Path) -> None:
    mean, last = load(tiny_checkpoint, "mean"), load(tiny_checkpoint, "last")
    # A fresh norm's weights are all one; with others the states before and after it point in other directions.
    for encoder in (mean, last):
        encoder.backbone.language_model.norm.weight.data = torch.linspace(0.2, 3, encoder.embedding_dim)
    _, states = final_norm_states(mean, "a red ellipse")
    assert distance(mean.encode_document(["a red ellipse"])[0], F.normalize(states.mean(0), dim=0)) <= TOLERANCE
    assert distance(last.encode_document(["a red ellipse"])[0], F.normalize(states[-1], dim=0)) <= TOLERANCE


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_scaling_the_final_norm_scales_the_vector_channel_by_channel(tiny_checkpoint: Path, pooling: str) -> None:
    encoder = load(tiny_checkpoint, pooling)
    before = encoder.encode(all_kinds())
    scale = torch.linspace(0.1, 4, encoder.embedding_dim)
    encoder.backbone.language_model.norm.weight.data *= scale
    assert distance(encoder.encode(all_kinds()), F.normalize(before * scale, dim=1)) <= TOLERANCE


# --- attention ------------------------------------------------------------------------------------------------------


def token_states(encoder: MLLMEncoder, entries: list[Query | Item]) -> dict[int, Tensor]:
    """``(L, D)`` final states of every entry, padding included, by its position."""
    encoder.processor.length_buckets = 1
    inputs = encoder.processor(entries)
    seen: list[Tensor] = []
    hook = encoder.backbone.language_model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    encoder.encode_inputs(inputs)
    hook.remove()
    return {int(position): states for position, states in zip(inputs.order, seen[0], strict=True)}


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
def test_a_later_token_changes_an_earlier_state_only_in_bidirectional_mode(tiny_checkpoint: Path, padded: bool) -> None:
    mates: list[Query | Item] = [Item(text="something that is much longer than the others are " * 2)] if padded else []
    for bidirectional in (True, False):
        encoder = load(tiny_checkpoint, bidirectional=bidirectional)
        one, two = (token_states(encoder, [Item(text=f"a red {end}"), *mates])[0] for end in ("x", "y"))
        assert distance(one[:3], two[:3]) > 1e-3 if bidirectional else distance(one[:3], two[:3]) <= TOLERANCE
        length = len(encoder.processor.prompts.tokenizer("a red x")["input_ids"]) + 2
        assert distance(one[length - 2], two[length - 2]) > 1e-3  # the token itself, in either mode


def test_another_picture_changes_the_states_of_the_text_before_it_only_in_bidirectional_mode(
    tiny_checkpoint: Path,
) -> None:
    for bidirectional in (True, False):
        encoder = load(tiny_checkpoint, bidirectional=bidirectional)
        one, two = (token_states(encoder, [Query(Item(image=picture(colour)))])[0] for colour in ("red", "blue"))
        assert distance(one[1], two[1]) > 1e-3 if bidirectional else distance(one[1], two[1]) <= TOLERANCE


@pytest.mark.parametrize("pooling", POOLINGS)
def test_another_instruction_changes_the_vector_although_its_tokens_are_not_pooled(
    tiny_checkpoint: Path, pooling: str
) -> None:
    encoder = load(tiny_checkpoint, pooling)
    one, two = (encoder.encode_query(["a red ellipse"], instruction=i) for i in ("Find the picture.", "Answer me"))
    assert distance(one, two) > 1e-3
