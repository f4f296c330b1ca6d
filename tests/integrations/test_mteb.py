"""Encoders in mteb: real task objects on local data, run by mteb itself, against the package's own metrics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mteb", minversion="2")

import mteb
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.cache import ResultCache
from mteb.models import EncoderProtocol
from mteb.types import PromptType
from torch.utils.data import DataLoader

from lightning_mmembed import Item, MLLMEncoder, Query
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.integrations.mteb import MTEBEncoder
from lightning_mmembed.metrics import ndcg
from lightning_mmembed.retrieval.embed import encoder_fingerprint

INSTRUCTION = "Find what the text asks for."
COLOURS = ("red", "green", "blue", "gold", "gray", "pink", "teal", "navy")
SHAPES = ("ellipse", "rectangle", "triangle")


def picture(colour: str, shape: str) -> Image.Image:
    size = (30 + 6 * SHAPES.index(shape), 36)
    return Image.blend(Image.linear_gradient("L").convert("RGB").resize(size), Image.new("RGB", size, colour), 0.6)


LOOKS = [(colour, shape) for colour in COLOURS for shape in SHAPES]


class LocalRetrieval(AbsTaskRetrieval):
    """Which pet is it: local queries and documents, several labelled documents a query."""

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        queries, corpus = [f"which pet is {c}?" for c in COLOURS], [f"a {c} {s}" for c, s in LOOKS]
        self.dataset = {
            "default": {
                "test": {
                    "queries": self.table("q", queries, [picture(c, "ellipse") for c in COLOURS], "query"),
                    "corpus": self.table("d", corpus, [picture(*look) for look in LOOKS], "document"),
                    "relevant_docs": POSITIVES,
                    "top_ranked": None,
                }
            }
        }
        self.data_loaded = True

    def table(self, prefix: str, texts: list[str], images: list[Image.Image], side: str) -> Dataset:
        kinds = self.metadata.get_modalities(PromptType(side))
        columns: dict[str, Any] = {"id": [f"{prefix}{i}" for i in range(len(texts))]}
        types: dict[str, Any] = {"id": Value("string")}
        if "text" in kinds:
            columns["text"], types["text"] = texts, Value("string")
        if "image" in kinds:
            columns["image"], types["image"] = images, ImageFeature()
        return Dataset.from_dict(columns, features=Features(types))


POSITIVES = {
    f"q{i}": {f"d{j}": 1 for j, (colour, _) in enumerate(LOOKS) if colour == own} for i, own in enumerate(COLOURS)
}


def task(category: str, prompt: Any = None) -> LocalRetrieval:
    letters = set(category) - {"2"}
    kinds = {
        "type": "Retrieval" if letters == {"t"} else "Any2AnyRetrieval",
        "modalities": [{"t": "text", "i": "image"}[letter] for letter in sorted(letters, reverse=True)],
    }
    LocalRetrieval.metadata = TaskMetadata(
        name=f"LocalPets-{category}",
        description="Pets of this test.",
        dataset={"path": "local/pets", "revision": "1"},
        category=category,
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        prompt=prompt,
        **kinds,
    )
    return LocalRetrieval()


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Path) -> MLLMEncoder:
    return MLLMEncoder.from_pretrained(tiny_checkpoint)


def items(category: str, texts: list[str], images: list[Image.Image]) -> list[Item]:
    kinds = [("t" in category, "i" in category)] * len(texts)
    return [
        Item(text if has_text else None, image if has_image else None)
        for text, image, (has_text, has_image) in zip(texts, images, kinds, strict=True)
    ]


def own_ndcg(encoder: MLLMEncoder, category: str, instruction: str | None) -> float:
    """nDCG@10 of the encoder's own vectors by the package's own metric, over a full sort."""
    left, right = category.split("2")
    asked = items(left, [f"which pet is {c}?" for c in COLOURS], [picture(c, "ellipse") for c in COLOURS])
    pool = items(right, [f"a {c} {s}" for c, s in LOOKS], [picture(*look) for look in LOOKS])
    queries = encoder.encode([Query(item, instruction) for item in asked])
    order = (queries @ encoder.encode(pool).T).argsort(1, descending=True)
    positive = torch.tensor([[f"d{j}" in POSITIVES[f"q{i}"] for j in range(len(LOOKS))] for i in range(len(COLOURS))])
    return float(ndcg(positive.gather(1, order), positive.sum(1), 10).mean())


def evaluate(model: MTEBEncoder, of: LocalRetrieval, cache: Path) -> float:
    result = mteb.evaluate(
        model, of, cache=ResultCache(cache), show_progress_bar=False, co2_tracker=False, encode_kwargs={"batch_size": 5}
    )
    (scores,) = result.task_results[0].scores["test"]
    return float(scores["ndcg_at_10"])


@pytest.mark.parametrize("category", ["t2t", "t2i", "i2t", "it2i", "i2it", "it2it"])
def test_mtebs_own_evaluation_gives_the_score_of_our_own_search(
    encoder: MLLMEncoder, tmp_path: Path, category: str
) -> None:
    model = MTEBEncoder(encoder, "tests/tiny")
    score = evaluate(model, task(category, {"query": INSTRUCTION}), tmp_path)
    assert score == pytest.approx(own_ndcg(encoder, category, INSTRUCTION), abs=1e-5)
    assert 0 < score < 1


def test_the_results_are_kept_under_the_fingerprint_of_the_weights(encoder: MLLMEncoder, tmp_path: Path) -> None:
    model = MTEBEncoder(encoder, "tests/tiny")
    evaluate(model, task("t2t"), tmp_path)
    assert list(tmp_path.rglob(f"tests__tiny/{encoder_fingerprint(encoder)}/LocalPets-t2t.json"))


def spied(encoder: MLLMEncoder, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the encoder is given from here on."""
    seen: list[Any] = []
    real = encoder.encode

    def record(entries: Any, **options: Any) -> Any:
        seen.extend(entries)
        return real(entries, **options)

    monkeypatch.setattr(encoder, "encode", record)
    return seen


@pytest.mark.parametrize(
    ("prompt", "instructions", "expected"),
    [
        (INSTRUCTION, {}, INSTRUCTION),
        ({"query": INSTRUCTION}, {}, INSTRUCTION),
        ({"document": "not for queries"}, {}, None),
        (None, {}, None),
        (INSTRUCTION, {"LocalPets-t2i": "Find a pet."}, "Find a pet."),
        (None, {"LocalPets-t2i": "Find a pet."}, "Find a pet."),
        (INSTRUCTION, {"LocalPets-t2i": ""}, None),
        (INSTRUCTION, {"another": "Find a pet."}, INSTRUCTION),
    ],
)
def test_queries_get_the_instruction_and_documents_none(
    encoder: MLLMEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prompt: Any,
    instructions: Mapping[str, str],
    expected: str | None,
) -> None:
    seen = spied(encoder, monkeypatch)
    evaluate(MTEBEncoder(encoder, "tests/tiny", instructions=instructions), task("t2i", prompt), tmp_path)
    queries = [entry for entry in seen if isinstance(entry, Query)]
    documents = [entry for entry in seen if isinstance(entry, Item)]
    assert (len(queries), len(documents)) == (len(COLOURS), len(LOOKS))
    assert {query.instruction for query in queries} == {expected}
    assert {item.modality.value for item in documents} == {"image"}


def test_a_task_without_queries_is_encoded_as_documents(encoder: MLLMEncoder) -> None:
    texts = ["a red ellipse", "a blue one"]
    batches = DataLoader(Dataset.from_dict({"text": texts}), batch_size=1)
    model = MTEBEncoder(encoder, "tests/tiny")
    metadata = task("t2t", INSTRUCTION).metadata
    vectors = model.encode(batches, task_metadata=metadata, hf_split="test", hf_subset="default")
    np.testing.assert_allclose(vectors, encoder.encode_document(texts), rtol=0, atol=1e-6)


def test_the_model_says_of_itself_what_is_known(encoder: MLLMEncoder) -> None:
    model = MTEBEncoder(encoder, "tests/tiny", license="apache-2.0", training_datasets={"MSCOCO"})
    meta = model.mteb_model_meta
    assert isinstance(model, EncoderProtocol)
    assert meta is not None
    assert (meta.name, meta.revision) == ("tests/tiny", encoder_fingerprint(encoder))
    assert meta.embed_dim == encoder.embedding_dim
    assert meta.n_parameters == sum(parameter.numel() for parameter in encoder.parameters())
    assert (meta.license, meta.training_datasets) == ("apache-2.0", {"MSCOCO"})
    assert set(meta.modalities) == {"text", "image"}
    assert MTEBEncoder(encoder, "tests/tiny", revision="v1").mteb_model_meta.revision == "v1"  # type: ignore[union-attr]


def test_a_name_without_an_organization_is_refused(encoder: MLLMEncoder) -> None:
    with pytest.raises(UserInputError, match="name='tiny' has no organization"):
        MTEBEncoder(encoder, "tiny")


def test_inputs_of_another_kind_are_named(encoder: MLLMEncoder) -> None:
    model, metadata = MTEBEncoder(encoder, "tests/tiny"), task("t2t").metadata
    batches: Any = [{"audio": [b"..."]}]
    with pytest.raises(UserInputError, match=r"task 'LocalPets-t2t' has inputs with \['audio'\]"):
        model.encode(batches, task_metadata=metadata, hf_split="test", hf_subset="default")
