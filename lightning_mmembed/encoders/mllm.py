"""The encoder: a multimodal LLM that turns items into unit vectors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, LlavaNextConfig, LlavaNextModel
from transformers.image_processing_utils import BaseImageProcessor

from lightning_mmembed.encoders.llava_next import image_embeddings, image_positions
from lightning_mmembed.encoders.pooling import build_pooling
from lightning_mmembed.encoders.processor import Bucket, EncoderInputs, ItemProcessor
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import write_atomically
from lightning_mmembed.items import Item, Query

SETTINGS_FILE = "mmembed.json"
POOLING_FILE = "pooling.safetensors"

#: What ``encode_query`` and ``encode_document`` take for an item.
ItemLike = Item | str | Image.Image | tuple[Image.Image, str]


class MLLMEncoder(nn.Module):
    """A multimodal LLM as a bi-encoder: prompt, one pass without the LM head, pool, normalise.

    Args:
        backbone: The model without its language-model head.
        processor: Turns items into the backbone's inputs.
        image_mean: Per-channel mean that pictures are normalised by, for values from 0 to 1.
        image_std: Per-channel standard deviation, likewise.
        pooling: ``"mean"``, ``"last"`` or ``"latent-attention"``.
        bidirectional: Let every token attend to every other, as MM-Embed does; otherwise attention stays causal.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        backbone: LlavaNextModel,
        processor: ItemProcessor,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        pooling: str = "mean",
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        text_config = backbone.config.get_text_config()
        # transformers builds every attention mask from this one switch, padded or not (masking_utils).
        text_config.is_causal = not bidirectional
        self.backbone = backbone
        self.processor = processor
        self.pooling = build_pooling(pooling, text_config.hidden_size)
        self.embedding_dim: int = text_config.hidden_size
        self.settings = {"pooling": pooling, "bidirectional": bidirectional}
        self.register_buffer("image_mean", torch.tensor(image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        pooling: str | None = None,
        bidirectional: bool | None = None,
        max_length: int | None = None,
        length_buckets: int = 4,
        dtype: torch.dtype | str = torch.float32,
    ) -> MLLMEncoder:
        """Load a LLaVA-NeXT checkpoint, or an encoder saved by :meth:`save_pretrained`.

        Only safetensors are read and no code of the checkpoint is run.

        Args:
            pretrained_model_name_or_path: A local directory or a hub id.
            pooling: ``"mean"``, ``"last"`` or ``"latent-attention"``; by default the one saved, else ``"mean"``.
            bidirectional: By default what was saved, else True.
            max_length: Longest text in tokens; by default what was saved, else 128 (the paper's training length).
            length_buckets: Number of buckets that a batch is cut into, by length, to save padding.
            dtype: Type of the weights.

        Raises:
            UserInputError: If there is no checkpoint, or one of another architecture.
        """
        path = str(pretrained_model_name_or_path)
        config = _load_config(path)
        settings: dict[str, Any] = {"pooling": "mean", "bidirectional": True, "max_length": 128}
        saved = Path(path, SETTINGS_FILE)
        if saved.is_file():
            settings |= json.loads(saved.read_text())
        given = {"pooling": pooling, "bidirectional": bidirectional, "max_length": max_length}
        settings |= {key: value for key, value in given.items() if value is not None}
        with _reading(path):
            backbone = AutoModel.from_pretrained(
                path, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
            pictures: Any = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                path, backend="pil", trust_remote_code=False
            )
            processor = _build_processor(path, config, pictures, settings["max_length"], length_buckets)
        encoder = cls(
            backbone,
            processor,
            pictures.image_mean,
            pictures.image_std,
            pooling=settings["pooling"],
            bidirectional=settings["bidirectional"],
        )
        if Path(path, POOLING_FILE).is_file():
            encoder.pooling.load_state_dict(load_file(Path(path, POOLING_FILE)))
        return encoder

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write weights, tokenizer, image settings and pooling, to be read by :meth:`from_pretrained`."""
        directory = Path(directory)
        self.backbone.save_pretrained(directory)
        self.processor.tokenizer.save_pretrained(directory)
        _image_processor(self.processor, self.image_mean, self.image_std).save_pretrained(directory)
        pooling = self.pooling.state_dict()
        if pooling:
            save_file(pooling, directory / POOLING_FILE)
        settings = {**self.settings, "max_length": self.processor.max_length}
        return write_atomically(directory / SETTINGS_FILE, json.dumps(settings, indent=1))

    def forward(self, inputs: EncoderInputs) -> Tensor:
        """Encode prepared items.

        Args:
            inputs: What :attr:`processor` made of ``N`` items.

        Returns:
            ``(N, D)`` unit vectors in float32, in the order of the items.
        """
        rows = torch.cat([self._encode_bucket(bucket) for bucket in inputs.buckets])
        vectors = torch.zeros_like(rows).index_copy(0, inputs.order, rows)
        return F.normalize(vectors, dim=-1)

    def _encode_bucket(self, bucket: Bucket) -> Tensor:
        is_image = bucket.input_ids == self.processor.image_token_id
        # The id of the image token may lie outside the embedding table; its rows are overwritten below.
        embeddings = self.backbone.get_input_embeddings()(bucket.input_ids.masked_fill(is_image, 0))
        if bucket.pixel_values is not None:
            pixels = (bucket.pixel_values.float() / 255 - self.image_mean) / self.image_std
            pictures = image_embeddings(self.backbone, pixels.to(embeddings.dtype))
            embeddings = embeddings.masked_scatter(is_image.unsqueeze(-1), pictures.to(embeddings.dtype))
        states = self.backbone.language_model(
            inputs_embeds=embeddings, attention_mask=bucket.attention_mask, use_cache=False
        ).last_hidden_state
        pooled: Tensor = self.pooling(states, bucket.pool_mask)
        return pooled

    def encode_query(
        self,
        items: Sequence[ItemLike],
        instruction: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool = False,
    ) -> Tensor:
        """Encode queries.

        Args:
            items: Texts, pictures, (picture, text) pairs or :class:`Item` objects.
            instruction: What to find, the same for all of them.
            batch_size: Items per pass.
            show_progress_bar: Show progress with an ETA.

        Returns:
            ``(N, D)`` unit vectors in float32, on the CPU.
        """
        return self.encode(
            [Query(to_item(item), instruction=instruction) for item in items], batch_size, show_progress_bar
        )

    def encode_document(
        self, items: Sequence[ItemLike], batch_size: int = 32, show_progress_bar: bool = False
    ) -> Tensor:
        """Encode candidates, which get no instruction; see :meth:`encode_query`."""
        return self.encode([to_item(item) for item in items], batch_size, show_progress_bar)

    def encode(self, entries: Sequence[Query | Item], batch_size: int = 32, show_progress_bar: bool = False) -> Tensor:
        """Encode queries and candidates, each with its own instruction; see :meth:`encode_query`."""
        starts = track(range(0, len(entries), batch_size), "encoding", disable=not show_progress_bar)
        vectors = [self.encode_inputs(self.processor(entries[start : start + batch_size])) for start in starts]
        return torch.cat(vectors) if vectors else torch.zeros(0, self.embedding_dim)

    @torch.inference_mode()
    def encode_inputs(self, inputs: EncoderInputs) -> Tensor:
        """Encode prepared items in evaluation mode, from any device; the vectors come back on the CPU."""
        was_training = self.training
        self.eval()
        vectors: Tensor = self(inputs.to(self.image_mean.device)).cpu()
        self.train(was_training)
        return vectors


def encoder_of(module: nn.Module) -> MLLMEncoder:
    """The encoder of a module that trains one.

    Raises:
        UserInputError: If the module has no attribute ``encoder``, or another kind of object there.
    """
    encoder = getattr(module, "encoder", None)
    if not isinstance(encoder, MLLMEncoder):
        raise UserInputError(
            f"{type(module).__name__}.encoder is {type(encoder).__name__}; the datamodule and the callbacks need a "
            "module with an MLLMEncoder there, such as RetrievalModule"
        )
    return encoder


def to_item(value: ItemLike) -> Item:
    """Make an item of a text, a picture or a (picture, text) pair.

    Raises:
        UserInputError: If ``value`` is something else.

    Example:
        >>> to_item("a red bus")
        Item(text='a red bus', image=None)
    """
    if isinstance(value, Item):
        return value
    if isinstance(value, str):
        return Item(text=value)
    if isinstance(value, Image.Image):
        return Item(image=value)
    if isinstance(value, tuple) and len(value) == 2:
        return Item(image=value[0], text=value[1])
    raise UserInputError(
        f"item={value!r} is a {type(value).__name__}; give a str, a PIL image or an (image, text) pair"
    )


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Name the checkpoint in what transformers raises on an absent, foreign or broken one."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise UserInputError(
            f"checkpoint {path!r} cannot be read: {error}. Give a directory with config.json and *.safetensors, or a "
            "hub id"
        ) from error


def _load_config(path: str) -> LlavaNextConfig:
    with _reading(path):
        # False, not the default: transformers would ask whether to run the code of a checkpoint, and run it on a yes.
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if not isinstance(config, LlavaNextConfig):
        raise UserInputError(f"checkpoint {path!r} has model_type={config.model_type!r}; supported is 'llava_next'")
    return config


def _build_processor(
    path: str, config: LlavaNextConfig, pictures: Any, max_length: int, length_buckets: int
) -> ItemProcessor:
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    vision: Any = config.vision_config
    return ItemProcessor(
        tokenizer,
        image_token=str(tokenizer.convert_ids_to_tokens(config.image_token_id)),
        image_tokens=image_positions(config),
        image_size=vision.image_size,
        resample=int(pictures.resample),
        max_length=max_length,
        length_buckets=length_buckets,
    )


def _image_processor(processor: ItemProcessor, mean: Tensor, std: Tensor) -> BaseImageProcessor:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    size = processor.image_size
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_grid_pinpoints=[[size, size]],
        image_mean=mean.flatten().tolist(),
        image_std=std.flatten().tolist(),
        resample=processor.resample,
    )
