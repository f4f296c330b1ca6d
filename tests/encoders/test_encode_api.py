"""What ``encode_query`` and ``encode_document`` take, how they cut it into passes, and what they refuse."""

from __future__ import annotations

import io
import itertools
import logging
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_mmembed import Candidate, MLLMEncoder, Query
from lightning_mmembed.encoders.base import to_item
from lightning_mmembed.encoders.processor import EncoderInputs, ItemProcessor, passes
from lightning_mmembed.encoders.prompts import Entry
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Item
from lightning_mmembed.retrieval.embed import VectorStore

TOLERANCE = 1e-5  # contract 1
POSITIONS = 5  # (32 / 16) ** 2 patches and image_newline
LONG = " ".join(f"word{n}" for n in range(200))


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Path) -> MLLMEncoder:
    return MLLMEncoder.from_pretrained(tiny_checkpoint, max_length=64).eval()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (40, 24), "red").save(path)
    return path


def mixed(count: int = 40) -> list[Entry]:
    """Texts, pictures and both, of many lengths and in no order."""
    pictures = [Image.new("RGB", (20 + n, 30), (6 * n, 0, 255 - 6 * n)) if n % 3 else None for n in range(count)]
    items = [Item(None if n % 3 == 1 else f"{n}" + " ab" * (n * 7 % 19), p) for n, p in enumerate(pictures)]
    return [Query(item, "Find it.") if n % 4 == 0 else item for n, item in enumerate(items)]


def seen_passes(monkeypatch: pytest.MonkeyPatch, encoder: MLLMEncoder) -> list[tuple[int, int]]:
    """The shapes of the passes that follow."""
    shapes: list[tuple[int, int]] = []
    encode = encoder.encode_bucket

    def noted(bucket: Any) -> Tensor:
        shapes.append(tuple(bucket.input_ids.shape))
        return encode(bucket)

    monkeypatch.setattr(encoder, "encode_bucket", noted)
    return shapes


# --- what an item may be --------------------------------------------------------------------------------------------


def test_a_path_a_picture_and_its_bytes_give_the_same_vector_alone_and_with_a_text(
    encoder: MLLMEncoder, photo: Path
) -> None:
    picture = Image.open(photo)
    alone = encoder.encode_document([photo, picture, Item(image=photo.read_bytes()), Item(image=picture)])
    paired = encoder.encode_document([(photo, "a pet"), (picture, "a pet"), Item("a pet", picture)])
    for vectors in (alone, paired):
        torch.testing.assert_close(vectors, vectors[:1].expand_as(vectors), atol=TOLERANCE, rtol=0)
    assert float((alone[0] - paired[0]).abs().max()) > 100 * TOLERANCE


def test_a_str_is_a_text_even_where_a_file_of_that_name_is(encoder: MLLMEncoder, photo: Path) -> None:
    assert torch.equal(encoder.encode_document([str(photo)]), encoder.encode([Item(str(photo))]))


def test_queries_get_the_instruction_and_documents_none(encoder: MLLMEncoder, photo: Path) -> None:
    asked = encoder.encode_query(["a pet", photo], "Find it.")
    expected = encoder.encode([Query(Item("a pet"), "Find it."), Query(Item(image=photo.read_bytes()), "Find it.")])
    torch.testing.assert_close(asked, expected, atol=TOLERANCE, rtol=0)
    assert float((asked[0] - encoder.encode_document(["a pet"])[0]).abs().max()) > 100 * TOLERANCE


def test_an_empty_text_is_an_item_and_so_is_one_without_text_and_picture(encoder: MLLMEncoder) -> None:
    vectors = encoder.encode_document(["", Item(), Item("")])
    torch.testing.assert_close(vectors, vectors[:1].expand_as(vectors), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))


def test_an_array_holds_the_numbers_of_the_tensor(encoder: MLLMEncoder) -> None:
    for encode in (encoder.encode_query, encoder.encode_document):
        array = encode(["a pet", "a red ellipse"], convert_to_numpy=True)
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, encode(["a pet", "a red ellipse"]).numpy())
    assert encoder.encode([], convert_to_numpy=True).shape == (0, encoder.embedding_dim)


# --- passes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_runs_cover_every_length_once_stay_in_the_budget_and_could_not_be_longer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.integers(1, 60, size=int(rng.integers(0, 80))))
    budget, rows = int(rng.integers(1, 400)), [None, 1, 7][seed % 3]
    runs = passes(lengths, budget, rows)
    assert [n for run in runs for n in run] == list(range(len(lengths)))
    for run in runs:
        assert len(run) == 1 or len(run) * lengths[run[-1]] <= budget
        assert rows is None or len(run) <= rows
        if run.stop < len(lengths) and len(run) != rows:
            assert (len(run) + 1) * lengths[run.stop] > budget, "one more would have fitted"


@pytest.mark.parametrize("seed", range(10))
def test_a_pass_that_is_large_enough_is_padded_by_an_eighth_at_most(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.sort(np.concatenate([rng.integers(5, 40, size=800), np.full(500, 100)]))
    runs = passes(lengths, 16384)
    assert [n for run in runs for n in run] == list(range(len(lengths)))
    for run in runs:
        assert len(run) * lengths[run[-1]] <= 16384
        if len(run) * lengths[run[-1]] >= 2048:  # beyond the 1024 that no pass is cut below
            assert lengths[run[-1]] <= 9 / 8 * lengths[run[0]] + 1


@pytest.mark.parametrize("budget", [1, 30, 100, 16384])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_vectors_come_in_the_order_of_the_entries_and_do_not_depend_on_the_passes(
    encoder: MLLMEncoder, monkeypatch: pytest.MonkeyPatch, budget: int, batch_size: int | None
) -> None:
    entries = mixed()
    alone = torch.cat([encoder.encode_inputs(encoder.processor([entry])) for entry in entries])
    assert float(torch.pdist(alone).min()) > 0
    shapes = seen_passes(monkeypatch, encoder)
    vectors = encoder.encode(entries, tokens_per_batch=budget, batch_size=batch_size)
    torch.testing.assert_close(vectors, alone, atol=TOLERANCE, rtol=0)
    assert sum(rows for rows, _ in shapes) == len(entries)
    for rows, length in shapes:
        assert rows == 1 or rows * length <= budget, "pictures and padding are counted"
        assert batch_size is None or rows <= batch_size


def test_what_length_buckets_cut_has_the_vectors_of_each_row_alone(encoder: MLLMEncoder) -> None:
    entries, processor = mixed(), encoder.processor
    alone = torch.cat([encoder.encode_inputs(processor([entry])) for entry in entries])
    for buckets in (1, 2, 5, 64):
        inputs = ItemProcessor(processor.prompts, processor.family, buckets)(entries)
        assert len(inputs.buckets) == min(buckets, len(entries))
        torch.testing.assert_close(encoder.encode_inputs(inputs), alone, atol=TOLERANCE, rtol=0)


def test_short_texts_are_not_padded_to_a_picture_or_a_long_text(
    encoder: MLLMEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = seen_passes(monkeypatch, encoder)
    pictures = [Image.new("RGB", (8, 8)) for _ in range(20)]
    encoder.encode_document(
        [value for pair in zip(["!"] * 20, pictures, strict=True) for value in pair] + [LONG], tokens_per_batch=60
    )
    assert {length for _, length in shapes if length < 2 + POSITIONS} == {3}
    assert [rows for rows, length in shapes if length == 3] == [20]


def test_no_more_items_are_read_ahead_than_fill_a_few_passes(
    encoder: MLLMEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, at_a_pass = 0, []

    class Documents(list[str]):
        def __getitem__(self, position: Any) -> Any:
            nonlocal read
            read += 1
            return super().__getitem__(position)

    encode = encoder.encode_inputs

    def noted(inputs: EncoderInputs) -> Tensor:
        at_a_pass.append(read)
        return encode(inputs)

    monkeypatch.setattr(encoder, "encode_inputs", noted)
    assert encoder.encode_document(Documents(["!"] * 1000), tokens_per_batch=30).shape == (1000, encoder.embedding_dim)
    window = 8 * 30 // 3 + 32  # eight passes of texts of three tokens, and what is read at once
    assert at_a_pass[0] <= window
    assert max(later - earlier for earlier, later in itertools.pairwise(at_a_pass)) <= window


def test_memory_for_pictures_goes_by_the_budget_not_by_the_number_of_items(
    encoder: MLLMEncoder, tmp_path: Path
) -> None:
    Image.new("RGB", (400, 400), "red").save(tmp_path / "red.bmp")  # 480 kB each

    def peak(count: int) -> int:
        tracemalloc.start()
        encoder.encode_document([tmp_path / "red.bmp"] * count, tokens_per_batch=64)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(8)  # what is kept for good
    assert peak(320) < 1.5 * peak(64)


@pytest.mark.parametrize("name", ["tokens_per_batch", "batch_size", "max_length"])
def test_a_number_that_is_too_small_is_named(encoder: MLLMEncoder, name: str) -> None:
    with pytest.raises(UserInputError, match=rf"{name}=0 "):
        encoder.encode_document(["a pet"], **{name: 0})  # type: ignore[misc]


# --- the limit of the text ------------------------------------------------------------------------------------------


def test_a_limit_for_one_call_gives_what_an_encoder_with_that_limit_gives_and_leaves_this_one_alone(
    encoder: MLLMEncoder, tiny_checkpoint: Path
) -> None:
    before = encoder.encode_query([LONG], "Find it.")
    limited = encoder.encode_query([LONG], "Find it.", max_length=24)
    other = MLLMEncoder.from_pretrained(tiny_checkpoint, max_length=24).eval()
    assert torch.equal(limited, other.encode_query([LONG], "Find it."))
    assert float((limited - before).abs().max()) > 100 * TOLERANCE
    assert encoder.processor.prompts.max_length == 64
    assert torch.equal(encoder.encode_query([LONG], "Find it."), before)


def test_texts_that_are_cut_are_counted_in_one_warning_a_call(
    encoder: MLLMEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        encoder.encode_document(["a pet", "a red ellipse"])
        assert caplog.messages == []
        encoder.encode_document(
            ["a pet", LONG, (Image.new("RGB", (8, 8)), LONG), *["a pet"] * 100], tokens_per_batch=20
        )
    assert caplog.messages == ["2 of 103 texts were cut to max_length=64 tokens"]


def test_the_store_reports_the_texts_that_it_cut(
    encoder: MLLMEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [Candidate(Item(text), f"1:{n}") for n, text in enumerate(["a pet", LONG, LONG])]
    store = VectorStore(tmp_path, batch_size=1, show_progress=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # the second time nothing is computed
            store.embed(encoder, entries, "content", "weights", "")
    assert caplog.messages == ["2 of 3 texts were cut to max_length=64 tokens"]


def test_an_instruction_is_never_cut(encoder: MLLMEncoder) -> None:
    with pytest.raises(UserInputError, match=r"max_length=10 leaves no room .* raise max_length or shorten"):
        encoder.encode_query(["a pet"], LONG, max_length=10)


def test_a_store_cuts_what_it_reads_at_once_into_passes_of_its_budget(
    encoder: MLLMEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [entry if isinstance(entry, Query) else Candidate(entry) for entry in mixed()]  # type: ignore[arg-type]
    expected = encoder.encode(entries)
    shapes = seen_passes(monkeypatch, encoder)
    store = VectorStore(tmp_path, dtype="float32", show_progress=False, tokens_per_batch=100)
    vectors = store.embed(encoder, entries, "content", "weights", "")  # type: ignore[arg-type]
    torch.testing.assert_close(vectors.read(0, len(entries)), expected, atol=TOLERANCE, rtol=0)
    assert all(rows * length <= 100 for rows, length in shapes)
    assert max(rows for rows, _ in shapes) > 4


# --- bad input ------------------------------------------------------------------------------------------------------


def missing(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def text_file(path: Path) -> None:
    path.write_text("no picture")


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (missing, "cannot be read: No such file or directory"),
        (folder, "cannot be read: Is a directory"),
        (text_file, "a picture of 10 bytes cannot be decoded: no known picture format"),
        (empty_file, "a picture of 0 bytes cannot be decoded: no known picture format"),
        (truncated, r"a picture of \d+ bytes cannot be decoded: "),
    ],
)
@pytest.mark.parametrize("paired", [False, True], ids=["alone", "with a text"])
def test_a_file_that_cannot_be_used_is_named_by_path_and_position(
    encoder: MLLMEncoder, photo: Path, harm: Callable[[Path], None], reason: str, paired: bool
) -> None:
    harm(photo)
    items: list[Any] = ["a pet"] * 50 + [(photo, "a pet") if paired else photo]
    for encode in (encoder.encode_query, encoder.encode_document):
        with pytest.raises(UserInputError, match=rf"^items\[50\]='{photo}': .*{reason}"):
            encode(items)


def lazily_truncated() -> Image.Image:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:-200]))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.new("RGB", (0, 5)), "its 0 x 5 pixels have no area"),
        (Image.new("RGB", (5, 0)), "its 5 x 0 pixels have no area"),
        (lazily_truncated(), "truncated"),
        (b"no picture", "no known picture format"),
    ],
    ids=["no width", "no height", "truncated", "bytes"],
)
def test_a_picture_that_cannot_be_used_is_named_by_id_or_position(
    encoder: MLLMEncoder, image: Image.Image | bytes, reason: str
) -> None:
    item = Item("a pet", image)
    before: list[Entry] = [Item("a pet")] * 40
    for entry, name in ((item, r"items\[40\]"), (Candidate(item, "9:7"), "9:7"), (Query(item, qid="9:8"), "9:8")):
        with pytest.raises(UserInputError, match=rf"^{name}: a picture.* cannot be decoded: .*{reason}"):
            encoder.encode([*before, entry])
    with pytest.raises(UserInputError, match=rf"^items\[1\]: .*{reason}"):
        encoder.encode_document(["a pet", item])


def test_a_gigantic_picture_is_refused_and_how_to_raise_the_limit_is_said(
    encoder: MLLMEncoder, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 24 // 2 - 1)  # PIL refuses what has more than twice as many
    with pytest.raises(UserInputError, match=r"red\.png'.*exceeds limit.*raise PIL\.Image\.MAX_IMAGE_PIXELS"):
        encoder.encode_document([photo])


def test_a_family_that_refuses_a_picture_names_the_item(encoder: MLLMEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(image: Image.Image) -> Any:
        raise ValueError("too thin")

    monkeypatch.setattr(encoder.processor.family, "picture", refuse)
    with pytest.raises(UserInputError, match=r"^items\[1\]: too thin"):
        encoder.encode_document(["a pet", Image.new("RGB", (1, 900))])


@pytest.mark.parametrize("value", [None, 7, b"bytes", ("a", "b"), (None, "a"), (Path("a"), 7), ("a", Path("b")), ()])
def test_what_is_no_item_is_named_with_its_position(encoder: MLLMEncoder, value: Any) -> None:
    with pytest.raises(UserInputError, match=r"^items\[2\].*; give a str, a PIL image or an \(image, text\) pair"):
        encoder.encode_query(["a", "b", value])


HALF = "a\ud800b"


@pytest.mark.parametrize("value", [HALF, Item(HALF), (Image.new("RGB", (2, 2)), HALF)], ids=["str", "item", "pair"])
def test_a_text_with_half_of_a_surrogate_pair_is_named_with_its_position(encoder: MLLMEncoder, value: Any) -> None:
    for encode in (encoder.encode_query, encoder.encode_document):
        with pytest.raises(UserInputError, match=r"^items\[40\]: .*'\\ud800', half of a surrogate pair"):
            encode(["a pet"] * 40 + [value])
    with pytest.raises(UserInputError, match=r"half of a surrogate pair"):
        to_item(value)


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        (Item(HALF), r"items\[40\]"),
        (Candidate(Item(HALF), "9:7"), "9:7"),
        (Query(Item(HALF), qid="9:8"), "9:8"),
        (Query(Item("a pet"), HALF), r"items\[40\]"),
    ],
    ids=["item", "candidate", "query", "instruction"],
)
def test_an_entry_with_half_of_a_surrogate_pair_is_named_by_id_or_position(
    encoder: MLLMEncoder, entry: Entry, name: str
) -> None:
    with pytest.raises(UserInputError, match=rf"^{name}: .*'\\ud800', half of a surrogate pair"):
        encoder.encode([Item("a pet")] * 40 + [entry])


@pytest.mark.parametrize("value", ["a pet", Path("a.jpg"), Image.new("RGB", (2, 2)), Item("a pet")])
def test_a_single_item_in_place_of_a_list_is_refused(encoder: MLLMEncoder, value: Any) -> None:
    with pytest.raises(UserInputError, match="is a single item; give a list"):
        encoder.encode_document(value)
