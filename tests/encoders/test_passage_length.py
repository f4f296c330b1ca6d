"""Text documents may be longer than all else, as in MM-Embed's third stage; the setting is saved with the encoder."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_mmembed import MLLMEncoder
from lightning_mmembed.checkpoints import check_settings, write_settings

LONG = " ".join(f"pet {number} is gold" for number in range(40))


def test_only_documents_without_a_picture_are_read_further_and_a_saved_encoder_goes_on_so(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    short = MLLMEncoder.from_pretrained(tiny_checkpoint, max_length=16)
    longer = MLLMEncoder.from_pretrained(tiny_checkpoint, max_length=16, passage_length=400)
    whole = MLLMEncoder.from_pretrained(tiny_checkpoint, max_length=400)
    document = longer.encode_document([LONG])
    torch.testing.assert_close(document, whole.encode_document([LONG]))
    assert not torch.allclose(document, short.encode_document([LONG]), atol=1e-3)
    torch.testing.assert_close(longer.encode_query([LONG]), short.encode_query([LONG]))
    again = MLLMEncoder.from_pretrained(longer.save_pretrained(tmp_path / "saved"))
    assert again.settings["passage_length"] == 400
    torch.testing.assert_close(again.encode_document([LONG]), document)


def test_a_stage_may_read_more_than_the_one_that_it_starts_from(tiny_checkpoint: Path) -> None:
    checkpoint: dict[str, object] = {}
    write_settings(MLLMEncoder.from_pretrained(tiny_checkpoint, max_length=16), checkpoint)
    check_settings(MLLMEncoder.from_pretrained(tiny_checkpoint, max_length=16, passage_length=64), checkpoint)
