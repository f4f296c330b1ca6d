"""The layout, the prompts and the quirks of the released nvidia/MM-Embed (``modeling_nvmmembed.py``).

The release is a LLaVA-NeXT checkpoint whose language model is that of NV-Embed-v1, with NV-Embed's latent attention
beside it. Its ``text_config`` is not the one in use: that comes from the text embedder's own configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import MistralConfig, PretrainedConfig

from lightning_mmembed.encoders.loading import find_file, read_json
from lightning_mmembed.encoders.prompts import Entry, PromptTokenizer, Tokens, item_of
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Query

ARCHITECTURE = "NVMMEmbedModel"
TEXT_EMBEDDER = "nvidia/NV-Embed-v1"
LATENT_ATTENTION = "latent_attention_model."

#: The text embedder's configuration, where a checkpoint names it by its hub id: nothing more need be downloaded.
NV_EMBED_V1: dict[str, Any] = {
    "text_config": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "latent_attention_config": {"num_latents_value": 512, "num_cross_heads": 8, "cross_dim_head": 4096},
}

#: Our names of the parts of the latent attention, and the release's.
POOLING_NAMES = {
    "latents": "latents",
    "state_norm": "cross_attend_blocks.0.norm",
    "latent_norm": "cross_attend_blocks.0.norm_context",
    "to_q": "cross_attend_blocks.0.fn.to_q",
    "to_kv": "cross_attend_blocks.0.fn.to_kv",
    "to_out": "cross_attend_blocks.0.fn.to_out",
    "feed_forward_norm": "cross_attend_blocks.1.norm",
    "feed_forward_in": "cross_attend_blocks.1.fn.net.0",
    "feed_forward_out": "cross_attend_blocks.1.fn.net.2",
}

_SEPARATOR = "\nQuery: "
#: What the release adds to the masked length for a picture before the separator, one less than its patches.
_PICTURE_SHIFT = 575


class MMEmbedPrompts(PromptTokenizer):
    r"""Tokenises as the release does, its quirks included, so that its vectors are met.

    Special tokens that a text spells out are parsed as such. What is pooled starts after the newline of the first
    ``\nQuery: `` wherever that stands, in a candidate's text too.
    """

    name = "mm-embed"

    def __init__(self, tokenizer: Any, max_length: int = 512) -> None:
        super().__init__(tokenizer, max_length)
        self.image_id, self.pad_id = (int(tokenizer.convert_tokens_to_ids(token)) for token in ("<image>", "<pad>"))

    def __call__(self, entries: Sequence[Entry]) -> list[Tokens]:
        """See :meth:`PromptTokenizer.__call__`.

        Raises:
            UserInputError: If an instruction leaves no room for its query, or an item with a picture spells out the
                image token.
        """
        prompts = [self._write(entry) for entry in entries]
        return [self._of(*given) for given in zip(entries, prompts, self._ids(prompts), strict=True)]

    def _write(self, entry: Entry) -> str:
        item, head = item_of(entry), ""
        if isinstance(entry, Query):
            head = "Query: " if entry.instruction is None else f"Instruct: {entry.instruction}{_SEPARATOR}"
        template = head + ("" if item.image is None else "<image>\n") + "<text>"
        return template.replace("<text>", item.text or "")

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def _of(self, entry: Entry, prompt: str, whole: list[int]) -> Tokens:
        kept = whole[: self.limit(entry) - 2]
        image_at = None
        if item_of(entry).image is not None:
            if whole.count(self.image_id) > 1:
                raise UserInputError(f"an item with a picture spells out '<image>' in its text: {prompt!r}; remove it")
            if self.image_id not in kept:
                raise self.no_room(len(kept))
            image_at = 1 + kept.index(self.image_id)
            kept.remove(self.image_id)
        start = self._pool_from(prompt, image_at is not None)
        if isinstance(entry, Query) and entry.instruction is not None and start >= len(kept) + 2:
            raise self.no_room(start)
        remapped = [{self.image_id: 0, self.pad_id: self.eos[0]}.get(token, token) for token in kept]
        return Tokens(self.bos + remapped + self.eos, image_at, start, len(kept) + (image_at is not None) < len(whole))

    def _pool_from(self, prompt: str, has_image: bool) -> int:
        before, separator, _ = prompt.partition(_SEPARATOR)
        if not separator:
            return 0
        shift = _PICTURE_SHIFT if has_image and "<image>" in before else 0
        # BOS and EOS are counted: there is no EOS here, so that the newline is left out in its stead.
        return 1 + len(self._ids([before])[0]) + 1 + shift


def is_released(config: PretrainedConfig) -> bool:
    """Whether a configuration is the release's, or of a checkpoint in its layout."""
    return ARCHITECTURE in (config.architectures or [])


def settings(path: str, config: Any) -> dict[str, Any]:
    """How the release's encoder is built; puts the text embedder's configuration in the place of ``text_config``.

    Raises:
        UserInputError: If the text embedder is not named, or its configuration cannot be found.
    """
    name = getattr(config, "retriever", None)
    if not isinstance(name, str):
        raise UserInputError(
            f"checkpoint {path!r} has architectures={[ARCHITECTURE]}, but its config.json names no text embedder: "
            f"retriever={name!r}; write {TEXT_EMBEDDER!r}, or the name of a folder with its config.json"
        )
    return use_text_embedder(config, _retriever(path, name))


def use_text_embedder(config: Any, retriever: dict[str, Any]) -> dict[str, Any]:
    """Put a text embedder's configuration in the place of ``text_config``; gives how its encoder is built."""
    text = {key: value for key, value in retriever["text_config"].items() if key not in ("model_type", "architectures")}
    # The release ignores the window in its two-sided attention.
    config.text_config = MistralConfig(**(text | {"sliding_window": None}))
    latent = retriever["latent_attention_config"]
    options = {
        "num_latents": latent["num_latents_value"],
        "num_heads": latent["num_cross_heads"],
        "head_dim": latent["cross_dim_head"],
    }
    return {
        "pooling": "latent-attention",
        "pooling_options": options,
        "bidirectional": True,
        "max_length": 512,
        "prompts": MMEmbedPrompts.name,
    }


def _retriever(path: str, name: str) -> dict[str, Any]:
    if name == TEXT_EMBEDDER:
        return NV_EMBED_V1
    found = read_json(path, f"{name}/config.json")
    if found is None:
        raise UserInputError(
            f"checkpoint {path!r} names its text embedder retriever={name!r}, but holds no {name}/config.json; "
            f"write {TEXT_EMBEDDER!r}, or the name of a folder with its config.json"
        )
    return found


def pooling_weights(path: str) -> dict[str, Tensor]:
    """The weights of the latent attention by our names, read from the checkpoint's files."""
    return latent_attention(read_tensors(path, LATENT_ATTENTION))


def read_tensors(path: str, prefix: str, skipped: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names begin with ``prefix``, by the rest of their names.

    Args:
        path: A directory or a hub id. Files without such tensors are not opened, nor downloaded.
        prefix: How the names begin.
        skipped: How the names of tensors begin that are not read all the same.

    Raises:
        UserInputError: If a file of the checkpoint is missing.
    """

    def wanted(key: str) -> bool:
        return key.startswith(prefix) and not key.startswith(skipped)

    index = read_json(path, "model.safetensors.index.json")
    files = {} if index is None else index["weight_map"]
    names = {"model.safetensors"} if index is None else {file for key, file in files.items() if wanted(key)}
    tensors: dict[str, Tensor] = {}
    for name in sorted(names):
        file = find_file(path, name)
        if file is None:
            raise UserInputError(f"checkpoint {path!r} has no {name}; download it again")
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - not a dict
                if wanted(key):
                    tensors[key.removeprefix(prefix)] = weights.get_tensor(key)
    return tensors


def latent_attention(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the latent attention by our names, from the release's."""
    ours = {theirs: ours for ours, theirs in POOLING_NAMES.items()}
    return {rename(key, ours): value for key, value in theirs.items()}


def rename(key: str, names: dict[str, str]) -> str:
    """The other name of a weight of the latent attention, given those of its modules."""
    part, dot, leaf = key.rpartition(".")
    return names[key] if key in names else names[part] + dot + leaf
