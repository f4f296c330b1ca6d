"""Encoders in sentence-transformers, with the same vectors.

Its own ``Transformer`` and ``Pooling`` cannot say what these encoders do: LLaVA-NeXT's tiles are dropped, the
instruction is left out of the pool while the ``Query: `` after it is not, and the pool may be latent attention. So the
whole encoder is one module, :class:`EncoderModule`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modality import infer_modality
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from lightning_mmembed.encoders.base import to_item
from lightning_mmembed.encoders.dual import MODEL_TYPES, DualEncoder
from lightning_mmembed.encoders.loading import load_config, reading
from lightning_mmembed.encoders.mllm import MLLMEncoder
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import new_directory
from lightning_mmembed.items import Item, Query

Savable = MLLMEncoder | DualEncoder

#: What sentence-transformers calls the items; ``message`` is its word for a batch of several kinds.
MODALITIES: list[Any] = ["text", "image", ("image", "text"), "message"]


class EncoderModule(InputModule):
    """An encoder as the only module of a ``SentenceTransformer``.

    ``encode_query(inputs, prompt=...)`` takes the prompt as the instruction; ``encode_document`` and ``encode``
    without a prompt encode candidates. An input is a text, a PIL picture, the path of a picture file, or a dictionary
    with ``"text"``, ``"image"`` or both.

    Args:
        encoder: The encoder.
    """

    def __init__(self, encoder: Savable) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.encoder = encoder

    @property
    def modalities(self) -> list[Any]:
        """What an input can be."""
        return MODALITIES

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        """The encoder's."""
        return self.encoder.processor.prompts.tokenizer

    @property
    def max_seq_length(self) -> int:
        """Longest text in tokens."""
        return self.encoder.processor.prompts.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.encoder.processor = self.encoder.processor.limited(value)

    def get_embedding_dimension(self) -> int:
        """Width of a vector."""
        return self.encoder.embedding_dim

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Prepare inputs for the encoder.

        Args:
            inputs: Texts, pictures, paths of pictures, or dictionaries of them.
            prompt: The instruction of queries; ``None`` and ``""`` are none.
            task: ``"query"``, ``"document"`` or ``None``; without one, a prompt makes the inputs queries.
            **kwargs: What other modules take.

        Raises:
            UserInputError: If an input is none of these, or documents are given an instruction.
        """
        if task == "document" and prompt:
            raise UserInputError(f"prompt={prompt!r} is given to documents, which get no instruction; leave it out")
        items = [_item(value) for value in inputs]
        if task != "query" and not prompt:
            return {"inputs": self.encoder.processor(items)}
        return {"inputs": self.encoder.processor([Query(item, prompt or None) for item in items])}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        """Encode prepared inputs to ``(N, D)`` unit vectors."""
        return {"sentence_embedding": self.encoder(features["inputs"].to(self.encoder.device))}

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write the encoder as its ``save_pretrained`` does, to safetensors whatever is asked for."""
        # Not there itself: sentence-transformers has begun to write there, and the encoder wants an empty directory.
        with tempfile.TemporaryDirectory(dir=output_path) as folder:
            for file in self.encoder.save_pretrained(Path(folder) / "encoder").iterdir():
                file.replace(Path(output_path) / file.name)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> EncoderModule:  # type: ignore[override]
        """Read the encoder.

        Args:
            model_name_or_path: A directory or a hub id.
            subfolder: Folder of the module in it.
            **kwargs: ``model_kwargs`` are arguments of the encoder's ``from_pretrained``, such as ``dtype``; ``token``,
                ``cache_folder``, ``revision`` and ``local_files_only`` say how to download.

        Raises:
            UserInputError: If there is no such checkpoint.
        """
        download: dict[str, Any] = {
            name: kwargs.get(name) for name in ("token", "cache_folder", "revision", "local_files_only")
        }
        path = cls.load_dir_path(model_name_or_path, subfolder, **download) or model_name_or_path
        with reading(path):
            dual = load_config(path).model_type in MODEL_TYPES
        options = kwargs.get("model_kwargs") or {}
        return cls((DualEncoder if dual else MLLMEncoder).from_pretrained(path, **options))


def _item(value: Any) -> Item:
    if isinstance(value, dict):
        if not value or value.keys() - {"text", "image"}:
            raise UserInputError(f"input={value!r} has keys {sorted(value)}; give 'text', 'image' or both")
        if all(part is None for part in value.values()):
            raise UserInputError(f"input={value!r} has neither a text nor a picture; give 'text', 'image' or both")
        image = Path(value["image"]) if isinstance(value.get("image"), str) else value.get("image")
        pair: Any = value["text"] if image is None else (image, value.get("text"))
        return to_item(pair)
    if isinstance(value, str) and infer_modality(value, MODALITIES) == "image":
        return to_item(Path(value))
    return to_item(value)


def export(encoder: Savable, directory: str | Path) -> Path:
    """Write an encoder so that sentence-transformers loads it, for texts and pictures, with the same vectors.

    ``SentenceTransformer(directory, trust_remote_code=True)`` loads it where ``lightning_mmembed`` is installed: the
    flag lets it import that package, and no other code is run.

    Args:
        encoder: The encoder, which can be read again from the directory too.
        directory: A new or an empty one.

    Raises:
        UserInputError: If the directory is in use.
    """
    with new_directory(directory) as building:
        model = SentenceTransformer(
            modules=[EncoderModule(encoder)], device=str(encoder.device), similarity_fn_name="cosine"
        )
        model.save(str(building), create_model_card=False)
    return Path(directory)
