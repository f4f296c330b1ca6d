"""Scores are those of full prompts, one at a time, whatever is shared, padded and batched."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rerank_worlds import CANDIDATES, FAMILIES, PROMPTS, QUERIES, Reference, build_answering

from lightning_mmembed import Candidate, Item, ZeroShotReranker
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.rerank.inputs import cheapest_passes

Checkpoint = Callable[[str], Path]


def plain(path: Path, name: str, query: Any) -> torch.Tensor:
    reference = Reference(path, name)
    return torch.tensor([reference.score(query, candidate) for candidate in CANDIDATES])


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_a_plain_pass_over_each_full_prompt(answering_checkpoint: Checkpoint, name: str) -> None:
    path = answering_checkpoint(name)
    reranker, reference = ZeroShotReranker.from_pretrained(path, prompts=PROMPTS), Reference(path, name)
    spread = []
    for query in QUERIES.values():  # one after another, so that nothing of one query may be left to the next
        expected = torch.tensor([reference.score(query, candidate) for candidate in CANDIDATES])
        torch.testing.assert_close(reranker.score(query, CANDIDATES), expected, atol=1e-4, rtol=0)
        spread.append(expected)
    assert float(torch.cat(spread).std()) > 0.01, "the scores must differ for the comparison to mean something"


@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("tokens", [1, 64, 100_000])
def test_a_score_depends_neither_on_batch_mates_nor_on_their_order_nor_on_the_budget(
    answering_checkpoint: Checkpoint, name: str, tokens: int
) -> None:
    reranker = ZeroShotReranker.from_pretrained(
        answering_checkpoint(name), prompts=PROMPTS, tokens_per_batch=tokens, attn_implementation="eager"
    )
    query = QUERIES["both"]
    alone = torch.cat([reranker.score(query, [candidate]) for candidate in CANDIDATES])
    torch.testing.assert_close(reranker.score(query, CANDIDATES), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(reranker.score(query, CANDIDATES[::-1]).flip(0), alone, atol=1e-5, rtol=0)


def test_what_candidates_share_is_computed_once(answering_checkpoint: Checkpoint) -> None:
    query, twice = QUERIES["both"], [CANDIDATES[0]] * 2
    computed = {}
    for name in ("qwen2_5_vl", "gemma3"):
        reranker = ZeroShotReranker.from_pretrained(answering_checkpoint(name), prompts=PROMPTS)
        reranker.score(query, twice[:1])
        whole = reranker.tokens
        reranker.score(query, twice)
        computed[name] = (reranker.tokens - whole) / whole
    assert computed["gemma3"] == 2  # a picture that attends in both directions: full prompts
    assert computed["qwen2_5_vl"] < 1.8


def test_the_positions_of_a_pass_go_by_the_device_that_the_model_was_moved_to(
    reranker: ZeroShotReranker, answering_checkpoint: Checkpoint
) -> None:
    given = ZeroShotReranker.from_pretrained(answering_checkpoint("qwen2_5_vl"), prompts=PROMPTS, tokens_per_batch=77)
    assert (reranker.tokens_per_batch, given.tokens_per_batch) == (2048, 77)
    for one in (reranker, given):
        one.model.to("meta")
    assert (reranker.tokens_per_batch, given.tokens_per_batch) == (16384, 77)


def test_lengths_are_cut_where_it_costs_least() -> None:
    rng = np.random.default_rng(0)

    def cost(lengths: list[int], runs: list[range]) -> int:
        return sum(128 + len(run) * lengths[run.stop - 1] for run in runs)

    for _ in range(30):
        lengths, tokens, rows = sorted(rng.integers(1, 400, 6).tolist()), int(rng.integers(1, 1500)), 4
        allowed = []
        for cuts in itertools.product([False, True], repeat=5):
            edges = [0, *(n + 1 for n in range(5) if cuts[n]), 6]
            runs = [range(*edge) for edge in itertools.pairwise(edges)]
            if all(len(r) <= rows and (len(r) == 1 or len(r) * lengths[r.stop - 1] <= tokens) for r in runs):
                allowed.append(cost(lengths, runs))
        found = cheapest_passes(lengths, tokens, rows)
        assert [n for run in found for n in run] == list(range(6))
        assert all(len(r) <= rows and (len(r) == 1 or len(r) * lengths[r.stop - 1] <= tokens) for r in found)
        assert cost(lengths, found) == min(allowed)


@pytest.mark.parametrize("window", [16, 48, 64, 4096])
def test_a_sliding_window_slides_over_the_tokens_and_not_over_the_padding(tmp_path: Path, window: int) -> None:
    path = build_answering(tmp_path / "model", "llava_next", sliding_window=window)
    reranker = ZeroShotReranker.from_pretrained(path, prompts=PROMPTS)
    expected = plain(path, "llava_next", QUERIES["both"])
    torch.testing.assert_close(reranker.score(QUERIES["both"], CANDIDATES), expected, atol=1e-4, rtol=0)


def test_a_picture_that_attends_in_both_directions_does_so_without_a_sliding_window_too(tmp_path: Path) -> None:
    layers = ["full_attention", "full_attention"]
    path = build_answering(tmp_path / "model", "gemma3", sliding_window=4096, layer_types=layers)
    reranker = ZeroShotReranker.from_pretrained(path, prompts=PROMPTS)
    expected = plain(path, "gemma3", QUERIES["both"])
    torch.testing.assert_close(reranker.score(QUERIES["both"], CANDIDATES), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_a_prompt_begins_with_one_mark_of_its_beginning(tmp_path: Path, template: str) -> None:
    path = build_answering(tmp_path / "model", "idefics3", template=None if template == "chat" else "")
    words = json.loads((path / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    words["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (path / "tokenizer.json").write_text(json.dumps(words))
    reranker = ZeroShotReranker.from_pretrained(path, prompts={"cirr_task7": "{query} or {candidate}"})
    ids = reranker.processor(QUERIES["text"], CANDIDATES[:1], "{query} or {candidate}").rows[0].ids
    assert (ids[0], ids.count(1)) == (1, 1)


def test_bfloat16_weights_leave_no_ties(answering_checkpoint: Checkpoint) -> None:
    path = answering_checkpoint("qwen2_5_vl")
    reranker = ZeroShotReranker.from_pretrained(path, prompts=PROMPTS, dtype="bfloat16")
    scores = reranker.score(QUERIES["image"], CANDIDATES)
    assert len(set(scores.tolist())) == len(CANDIDATES)
    torch.testing.assert_close(scores, plain(path, "qwen2_5_vl", QUERIES["image"]), atol=0.05, rtol=0)
    states = 8 * torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = reranker.model.lm_head.weight[reranker.label_ids].detach().double()
    expected = (states.double() @ rows.T).softmax(-1)[:, 0].float()
    torch.testing.assert_close(reranker._probabilities(states).detach(), expected, atol=1e-5, rtol=0)


def test_no_candidates_have_no_scores(reranker: ZeroShotReranker) -> None:
    assert reranker.score(QUERIES["text"], []).shape == (0,)


def test_the_task_of_a_query_can_be_overruled(reranker: ZeroShotReranker) -> None:
    other = reranker.score(QUERIES["text"], CANDIDATES, "oven_task6")
    assert not torch.allclose(other, reranker.score(QUERIES["text"], CANDIDATES), atol=1e-3)
    assert reranker.prompt_text(QUERIES["text"], CANDIDATES[3], "oven_task6") == (
        "<|im_start|>user\nQuestion: a red ellipse\nAnswer: a pet\nTrue or False<|im_end|>\n<|im_start|>assistant\n"
    )


# --- prompts longer than the context --------------------------------------------------------------------------------


def test_a_text_too_long_is_cut_at_its_end_and_counted(
    reranker: ZeroShotReranker, answering_checkpoint: Checkpoint
) -> None:
    query, long = QUERIES["both"], Candidate(Item("a pet " * 300, CANDIDATES[1].item.image), "2:9")
    short = reranker.processor(query, [CANDIDATES[2]], PROMPTS["cirr_task7"]).rows[0]
    limit = len(short.ids) + 10
    limited = ZeroShotReranker.from_pretrained(answering_checkpoint("qwen2_5_vl"), prompts=PROMPTS, max_length=limit)
    rows = limited.processor(query, [long, CANDIDATES[2]], PROMPTS["cirr_task7"]).rows
    assert limit - 2 <= len(rows[0].ids) <= limit
    assert rows[1].ids == short.ids
    scores = limited.score(query, [long, CANDIDATES[2]])
    assert limited.shortened == 1
    ends = limited.processor.tokenizer.decode(rows[0].ids).partition("Found: ")[2]
    kept = ends.partition("\n")[2].partition("\nDoes")[0]
    assert len(kept) < len("a pet " * 300)
    assert ("a pet " * 300).startswith(kept)
    same = reranker.score(query, [replace(long, item=replace(long.item, text=kept)), CANDIDATES[2]])
    torch.testing.assert_close(scores, same, atol=1e-5, rtol=0)


def test_a_prompt_too_long_without_the_candidates_text_names_query_and_candidate(
    answering_checkpoint: Checkpoint,
) -> None:
    short = ZeroShotReranker.from_pretrained(answering_checkpoint("qwen2_5_vl"), prompts=PROMPTS, max_length=20)
    with pytest.raises(UserInputError, match=r"query '1:2' with candidate '2:0'.*max_length=20"):
        short.score(QUERIES["both"], CANDIDATES)
    with pytest.raises(UserInputError, match="tokens_per_batch=0 is too small"):
        ZeroShotReranker.from_pretrained(answering_checkpoint("qwen2_5_vl"), prompts=PROMPTS, tokens_per_batch=0)
    for wrong in (0, 2000):
        with pytest.raises(UserInputError, match=f"max_length={wrong}.*1 to 1024"):
            ZeroShotReranker.from_pretrained(answering_checkpoint("qwen2_5_vl"), prompts=PROMPTS, max_length=wrong)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Item(image=b"no picture"), "2:8: a picture of 10 bytes cannot be decoded"),
        (Item(), "2:8: has neither a text nor a picture"),
        (Item("\ud800"), "2:8: its text or instruction holds .* half of a surrogate pair"),
    ],
)
def test_what_is_wrong_with_an_item_names_it(reranker: ZeroShotReranker, item: Item, message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        reranker.score(QUERIES["text"], [CANDIDATES[0], Candidate(item, "2:8")])
    with pytest.raises(UserInputError, match=message.replace("2:8", "1:7")):
        reranker.score(replace(QUERIES["text"], item=item, qid="1:7"), CANDIDATES)


def test_a_task_without_a_prompt_is_named(reranker: ZeroShotReranker) -> None:
    with pytest.raises(UserInputError, match=r"task='nights_task4' has no prompt.*cirr_task7.*task6"):
        reranker.score(QUERIES["text"], CANDIDATES, "nights_task4")
    with pytest.raises(UserInputError, match="task=None has no prompt"):
        reranker.score(replace(QUERIES["text"], task=None), CANDIDATES)


def test_weights_that_give_no_number_are_named(reranker: ZeroShotReranker) -> None:
    with torch.no_grad():
        next(reranker.model.model.language_model.parameters()).fill_(float("nan"))
    with pytest.raises(UserInputError, match="query '1:0' with candidate '2:0' has the score nan"):
        reranker.score(QUERIES["text"], CANDIDATES)


def test_a_checkpoint_that_cannot_rerank_is_named(tmp_path: Path, answering_checkpoint: Checkpoint) -> None:
    with pytest.raises(UserInputError, match=r"checkpoint '.*nowhere' cannot be read"):
        ZeroShotReranker.from_pretrained(tmp_path / "nowhere", prompts=PROMPTS)
    with pytest.raises(UserInputError, match="dtype='int8' is no type of weights"):
        ZeroShotReranker.from_pretrained(answering_checkpoint("qwen2_5_vl"), prompts=PROMPTS, dtype="int8")
    (tmp_path / "config.json").write_text('{"model_type": "paligemma"}')
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((answering_checkpoint("qwen2_5_vl") / file).read_bytes())
    with pytest.raises(UserInputError, match="model_type='paligemma', which cannot rerank"):
        ZeroShotReranker.from_pretrained(tmp_path, prompts=PROMPTS)
