"""The first numbers of a vector can be used alone, wherever the whole one can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lightning_mmembed import MLLMEncoder
from lightning_mmembed.checkpoints import check_settings, write_settings
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Candidate, Item
from lightning_mmembed.retrieval.embed import VectorStore, encoder_fingerprint

RED = Image.new("RGB", (8, 8), "red")
ITEMS = ["a pet", RED, (RED, "a red pet")]


def test_truncated_vectors_are_the_first_numbers_as_unit_vectors_and_a_saved_encoder_goes_on_so(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    whole = MLLMEncoder.from_pretrained(tiny_checkpoint)
    first = MLLMEncoder.from_pretrained(tiny_checkpoint, truncate_dim=8)
    vectors = first.encode_document(ITEMS)
    assert vectors.shape == (3, first.embedding_dim) == (3, 8)
    torch.testing.assert_close(vectors, F.normalize(whole.encode_document(ITEMS)[:, :8], dim=1))
    assert first.encode_document([]).shape == (0, 8)
    again = MLLMEncoder.from_pretrained(first.save_pretrained(tmp_path / "saved"))
    assert torch.equal(again.encode_document(ITEMS), vectors)
    assert MLLMEncoder.from_pretrained(tmp_path / "saved", truncate_dim=4).embedding_dim == 4


def test_what_was_trained_whole_can_be_truncated_and_its_vectors_lie_apart(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    whole = MLLMEncoder.from_pretrained(tiny_checkpoint)
    first = MLLMEncoder.from_pretrained(tiny_checkpoint, truncate_dim=8)
    checkpoint: dict[str, object] = {}
    write_settings(whole, checkpoint)
    check_settings(first, checkpoint)
    store, entries = VectorStore(tmp_path, show_progress=False), [Candidate(Item(text="a pet"), "1:1")]
    shapes = [store.embed(one, entries, "pets", encoder_fingerprint(one), "").shape for one in (whole, first)]
    assert shapes == [(1, 32), (1, 8)]


@pytest.mark.parametrize("truncate_dim", [0, -1, 33])
def test_a_vector_cannot_be_truncated_to_more_than_it_has_or_nothing(tiny_checkpoint: Path, truncate_dim: int) -> None:
    with pytest.raises(UserInputError, match=rf"truncate_dim={truncate_dim} does not lie between 1 and 32"):
        MLLMEncoder.from_pretrained(tiny_checkpoint, truncate_dim=truncate_dim)
