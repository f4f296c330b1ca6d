"""A model of sentence-transformers that looks the vectors of its texts up in a table: one word, one row."""

from __future__ import annotations

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace


def table_model(table: dict[str, np.ndarray]) -> SentenceTransformer:
    """A model on the CPU whose vector of each word is the one of the table; its weights are one float32 matrix."""
    words = {word: row for row, word in enumerate(["nothing", *table])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="nothing"))
    tokenizer.pre_tokenizer = Whitespace()
    vectors = np.stack(list(table.values())).astype(np.float32)
    weights = np.concatenate([np.zeros_like(vectors[:1]), vectors])
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")


def features(model: SentenceTransformer, texts: list[str]) -> dict[str, torch.Tensor]:
    """The inputs of some texts."""
    return dict(model.preprocess(texts))
