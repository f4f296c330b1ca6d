"""The zero-shot reranker of the paper: P(True) of a pair by an off-the-shelf multimodal LLM, without training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from lightning_mmembed.encoders.base import CPU_TOKENS, TOKENS
from lightning_mmembed.encoders.families import Family
from lightning_mmembed.encoders.loading import check_dtype, load_config, load_tokenizer, reading
from lightning_mmembed.errors import UserInputError, refuse_below_one
from lightning_mmembed.files import fingerprint
from lightning_mmembed.items import TASK_MODALITIES, Candidate, Item, Modality, Query, Task
from lightning_mmembed.rerank.inputs import PairProcessor, Pairs, Row, cheapest_passes, label_ids
from lightning_mmembed.rerank.model import context, copies, load_generator, read_family, shares_prefix, states_of
from lightning_mmembed.rerank.prompts import NO_FRAME, Prompts, PromptWriter, read_frame
from lightning_mmembed.rerank.store import pair_key

LABELS = ("True", "False")

#: Positions that keys and values are held of at a time, as a multiple of those that a pass computes.
_CACHED = 8

#: Of a configuration: where it was read, and what weights and version say already.
_NO_MATTER = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")


class ZeroShotReranker:
    """Asks a multimodal LLM whether a candidate is what a query looks for.

    Query and candidate stand in one prompt, in the frame of the model's chat template. The score is the softmax over
    the logits of two labels at the first position of the answer (Lin et al. 2025, zero-shot reranking). What all
    candidates of a query share is computed once, and its keys and values are used again for each of them.

    Args:
        model: A model of transformers with a language-model head.
        processor: Writes and tokenises prompts and prepares pictures.
        labels: The words for a match and for none.
        tokens_per_batch: The most positions in a pass, by default 2048 on a CPU and 16384 elsewhere.

    Attributes:
        pairs: Pairs scored so far.
        tokens: Positions computed for them, padding and pictures counted.
        shortened: Candidates whose text was cut to the longest prompt.
    """

    def __init__(
        self,
        model: Any,
        processor: PairProcessor,
        labels: Sequence[str] = LABELS,
        tokens_per_batch: int | None = None,
    ) -> None:
        refuse_below_one(tokens_per_batch=tokens_per_batch)
        self.model, self.processor, self.labels = model.eval(), processor, tuple(labels)
        self.label_ids = label_ids(processor.tokenizer, processor.writer.frame, labels)
        self._tokens_per_batch = tokens_per_batch
        self.pairs = self.tokens = self.shortened = 0

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        prompts: Mapping[str, str],
        labels: Sequence[str] = LABELS,
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
        dtype: torch.dtype | str = torch.float32,
        attn_implementation: str | None = None,
        device: torch.device | str | None = None,
    ) -> ZeroShotReranker:
        """Load a multimodal LLM of transformers; only safetensors are read, and no code of the checkpoint is run.

        Args:
            pretrained_model_name_or_path: A directory or a hub id, such as ``"llava-hf/llava-v1.6-mistral-7b-hf"``.
            prompts: A wording for each task, see :class:`~lightning_mmembed.rerank.prompts.Prompts`; those of
                ``conf/rerank/llava_next.yaml`` are a start.
            labels: The words for a match and for none; each must be a single token.
            max_length: The most positions of a prompt, by default as many as the model can read. Of a longer one the
                end of the candidate's text is cut.
            tokens_per_batch: The most positions in a pass, padding and pictures counted.
            dtype: Type of the weights; the logits of the labels are computed in float32 in any case.
            attn_implementation: ``"sdpa"``, ``"eager"``, ``"flash_attention_2"`` ...; by default transformers' choice.
            device: Where to put the model; by default the CPU.

        Raises:
            UserInputError: If there is no checkpoint or no multimodal LLM in it, if it lacks weights, if its chat
                template cannot be used, if a label is no single token, or a prompt or ``max_length`` is wrong.
        """
        path = str(pretrained_model_name_or_path)
        config, processor = read_processor(
            path,
            prompts=prompts,
            labels=labels,
            max_length=max_length,
            tokens_per_batch=tokens_per_batch,
            dtype=dtype,
        )
        with reading(path):
            model = load_generator(path, config, processor.family, dtype=dtype, attn_implementation=attn_implementation)
        return cls(model if device is None else model.to(device), processor, labels, tokens_per_batch)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(iter(self.model.parameters())).device
        return device

    @property
    def tokens_per_batch(self) -> int:
        """The most positions in a pass; unless it was given, by where the weights are now."""
        default = CPU_TOKENS if self.device.type == "cpu" else TOKENS
        return default if self._tokens_per_batch is None else self._tokens_per_batch

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the weights and of all else that a score depends on, apart from the pair and its wording.

        All else is the model's configuration, tokenizer, frame, pictures, longest prompt and labels, and the versions
        of this package and of transformers. The device and the way to attend, which change a score in its last digits
        alone, are left out.
        """
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        processor = self.processor
        words = processor.tokenizer.backend_tokenizer.to_str()
        frame, pictures = repr(processor.writer.frame), processor.family.settings()
        settings = [_settings(self.model.config.to_diff_dict()), words, frame, pictures, processor.max_length]
        versions = [version("lightning-mmembed"), version("transformers")]
        return fingerprint(digest.hexdigest(), *versions, *settings, self.labels)

    def key(self, query: Query, candidate: Candidate, task: Task | str | None = None) -> str:
        """What a score is kept under in a :class:`~lightning_mmembed.rerank.store.ScoreStore`."""
        wording = self.processor.writer.prompts.of(task or query.task)
        return pair_key(self.fingerprint, wording, query.instruction, query.item, candidate.item)

    def prompt_text(self, query: Query, candidate: Candidate, task: Task | str | None = None) -> str:
        """The whole prompt as text, before any shortening; a picture is the mark that the chat template writes for it.

        Args:
            query: The query.
            candidate: The candidate.
            task: The task whose wording is used; by default the query's own.

        Raises:
            UserInputError: If the task has no prompt.
        """
        writer = self.processor.writer
        return "".join(writer(query, candidate.item, writer.prompts.of(task or query.task)))

    def score(self, query: Query, candidates: Sequence[Candidate], task: Task | str | None = None) -> Tensor:
        """P(True) of some candidates of a query.

        Args:
            query: The query.
            candidates: Any number.
            task: The task whose wording is used; by default the query's own.

        Returns:
            ``(N,)`` scores between 0 and 1 in float32, on the CPU, in the order of the candidates. None depends on
            the others.

        Raises:
            UserInputError: If the task has no prompt, an item is empty or cannot be read, a prompt is too long without
                the candidate's text, or a score is not finite.
        """
        wording = self.processor.writer.prompts.of(task or query.task)
        return self.score_pairs(self.processor(query, candidates, wording)) if candidates else torch.zeros(0)

    @torch.inference_mode()
    def score_pairs(self, pairs: Pairs) -> Tensor:
        """P(True) of prepared pairs, which :attr:`processor` makes in any process.

        Args:
            pairs: Those of one query.

        Returns:
            ``(N,)`` scores between 0 and 1 in float32, on the CPU.

        Raises:
            UserInputError: If a score is not finite.
        """
        scores = self._scores(pairs)
        if not scores.isfinite().all():
            n = int((~scores.isfinite()).nonzero()[0])
            raise UserInputError(
                f"{pairs.names[n]} has the score {float(scores[n])}; load the model in another dtype, such as bfloat16 "
                "or float32"
            )
        self.pairs += len(pairs.rows)
        self.shortened += pairs.shortened
        return scores

    def _scores(self, pairs: Pairs) -> Tensor:
        rows = pairs.rows
        positions = [self._positions(row) for row in rows]
        shared, pictures, cache = 0, 0, None
        # One pass is less work than two.
        if len(rows) > 1 and shares_prefix(self.model, self.processor.family, max(len(row.ids) for row in rows)):
            shared, pictures, cache = pairs.shared, pairs.shared_pictures, DynamicCache()
            first = Row(rows[0].ids[:shared], rows[0].pictures[:pictures])
            self._states([first], [positions[0][:, :shared]], 0, cache)
        own = [Row(row.ids[shared:], row.pictures[pictures:]) for row in rows]
        lengths = np.array([len(row.ids) for row in own])
        order = np.argsort(lengths, kind="stable")
        most = max(1, _CACHED * self.tokens_per_batch // (shared + int(lengths.max())))
        scores = torch.zeros(len(rows))
        for run in cheapest_passes(lengths[order].tolist(), self.tokens_per_batch, most):
            part = order[run.start : run.stop].tolist()
            past = None if cache is None else copies(cache, len(part))
            states = self._states([own[n] for n in part], [positions[n][:, shared:] for n in part], shared, past)
            scores[part] = self._probabilities(states[:, -1]).cpu()
        return scores

    def _positions(self, row: Row) -> Tensor:
        """``(R, L)`` positions of a whole prompt; of a Qwen-VL three for each token, laid out by its pictures."""
        rope_index = getattr(self.model.model, "get_rope_index", None)
        if rope_index is None:
            return torch.arange(len(row.ids))[None]
        ids = torch.tensor([row.ids])
        is_image = (ids == self.processor.family.image_token_id).int()
        grids = [picture.inputs["image_grid_thw"] for picture in row.pictures]
        found: Tensor = rope_index(
            input_ids=ids, mm_token_type_ids=is_image, image_grid_thw=torch.cat(grids) if grids else None
        )[0]
        return found[:, 0]

    def _states(self, rows: list[Row], positions: list[Tensor], shared: int, cache: DynamicCache | None) -> Tensor:
        """``(B, L, D)`` states of some rows, padded on the left, after what they share."""
        longest = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), longest), self.processor.pad)
        mask = torch.ones(len(rows), shared + longest, dtype=torch.long)
        placed = torch.zeros(len(positions[0]), len(rows), longest, dtype=torch.long)
        for n, (row, own) in enumerate(zip(rows, positions, strict=True)):
            padding = longest - len(row.ids)
            ids[n, padding:] = torch.tensor(row.ids)
            mask[n, shared : shared + padding] = 0
            placed[:, n, padding:] = own
        pictures = [picture.inputs for row in rows for picture in row.pictures]
        inputs = {name: torch.cat([of_one[name] for of_one in pictures]) for name in (pictures[0] if pictures else ())}
        self.tokens += ids.numel()
        return states_of(
            self.model,
            self.processor.family,
            ids.to(self.device),
            mask.to(self.device),
            placed.to(self.device),
            {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()},
            cache,
        )

    def _probabilities(self, states: Tensor) -> Tensor:
        """Softmax over the labels' logits, ``(B,)``, in float32: in bfloat16 most of ten candidates would be ties."""
        head = self.model.get_output_embeddings()
        logits: Tensor = states.float() @ head.weight[self.label_ids].float().T
        if getattr(head, "bias", None) is not None:
            logits = logits + head.bias[self.label_ids].float()
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        if cap:
            logits = cap * torch.tanh(logits / cap)
        return logits.softmax(-1)[:, 0]


def read_processor(
    pretrained_model_name_or_path: str | Path,
    *,
    prompts: Mapping[str, str],
    labels: Sequence[str] = LABELS,
    max_length: int | None = None,
    tokens_per_batch: int | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> tuple[Any, PairProcessor]:
    """Configuration and processor of a checkpoint: what can be wrong with a reranker is told without its weights.

    For the arguments and what is raised see :meth:`ZeroShotReranker.from_pretrained`.
    """
    path, wordings = str(pretrained_model_name_or_path), Prompts(prompts)
    check_dtype(dtype)
    refuse_below_one(tokens_per_batch=tokens_per_batch)
    with reading(path):
        config, family, writer, tokenizer = _read_writer(path, wordings)
        label_ids(tokenizer, writer.frame, labels)
        return config, PairProcessor(tokenizer, family, writer, context(config, max_length))


def example_prompt(path: str | Path | None, prompts: Mapping[str, str], task: str) -> str:
    """The prompt of a task, in the frame of a checkpoint, with names in the place of texts; no weights are loaded.

    Args:
        path: A directory or a hub id; ``None`` leaves the frame out.
        prompts: See :meth:`ZeroShotReranker.from_pretrained`.
        task: Such as ``"cirr_task7"``; the modalities are those of its id.

    Raises:
        UserInputError: If the task has no prompt, or there is no multimodal LLM.
    """
    parsed = Task.parse(task)
    wording = Prompts(prompts).of(parsed)
    writer = PromptWriter(None, NO_FRAME, Prompts(prompts))
    if path is not None:
        with reading(str(path)):
            writer = _read_writer(str(path), Prompts(prompts))[2]

    def example(modality: Modality, name: str) -> Item:
        picture = None if modality is Modality.TEXT else Image.new("RGB", (1, 1))
        return Item(None if modality is Modality.IMAGE else f"[{name}]", picture)

    asked, wanted = TASK_MODALITIES[parsed.task_id]
    query = Query(example(asked, "text of the query"), "[instruction]", task=parsed)
    return "".join(writer(query, example(wanted, "text of the candidate"), wording))


def _settings(config: Any) -> Any:
    """A configuration without what changes no score, or is known from the weights and the version."""
    if not isinstance(config, dict):
        return config
    return {name: _settings(value) for name, value in config.items() if name not in _NO_MATTER}


def _read_writer(path: str, prompts: Prompts) -> tuple[Any, Family, PromptWriter, Any]:
    """Configuration, family, writer of prompts and tokenizer of a checkpoint."""
    config, tokenizer = load_config(path), load_tokenizer(path)
    family = read_family(path, config, tokenizer)
    frame = read_frame(path, tokenizer, str(tokenizer.convert_ids_to_tokens(family.image_token_id)))
    return config, family, PromptWriter(tokenizer, frame, prompts), tokenizer
