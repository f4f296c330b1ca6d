"""Tiny checkpoints that answer, with a chat template and labels that are tokens, and a plain reference of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from lightning_mmembed import Candidate, Item, Query
from lightning_mmembed.items import Task
from tests.encoders.family_worlds import SIZE, TEXTS, WORLDS, World, drawn

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}MARK{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: All pictures of a message before its texts, and a space before the answer.
HOISTED = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% for c in m.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }}{% endfor %} [/INST]"
    "{% else %} {{ m.content[0].text }}</s>{% endif %}{% endfor %}"
)
SPOKEN = (
    "<s>{% for m in messages %}{{ m.role | capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}"
    "{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
TEMPLATES = {
    "llava_next": HOISTED,
    "llava_onevision": CHATML.replace("MARK", "<image>\n"),
    "qwen2_vl": CHATML.replace("MARK", "<|vision_start|><|image_pad|><|vision_end|>"),
    "qwen2_5_vl": CHATML.replace("MARK", "<|vision_start|><|image_pad|><|vision_end|>"),
    "qwen3_vl": CHATML.replace("MARK", "<|vision_start|><|image_pad|><|vision_end|>"),
    "idefics3": SPOKEN,
    "smolvlm": SPOKEN,
    "gemma3": CHATML.replace("MARK", "<start_of_image>"),
    "internvl": CHATML.replace("MARK", "<IMG_CONTEXT>\n"),
}
#: Families that the requirements name, the rest of those that share a prefix, and one that cannot.
FAMILIES = list(TEMPLATES)

PROMPTS = {
    "task6": "Question: {query}\nAnswer: {candidate}\nTrue or False",
    "cirr_task7": "{instruction}\nQuery: {query}\nFound: {candidate}\nDoes the second match the first? True or False",
}
TASK = Task("cirr", 7)
INSTRUCTION = "Find the picture that a change leads to."

ITEMS = {
    "text": Item("a red ellipse"),
    "image": Item(image=drawn()),
    "both": Item("which pet is green?", drawn((40, 70), "gold")),
}
QUERIES = {name: Query(item, INSTRUCTION, f"1:{n}", TASK) for n, (name, item) in enumerate(ITEMS.items())}
CANDIDATES = [
    Candidate(Item("a very long story about a red ellipse and a blue rectangle that goes on"), "2:0"),
    Candidate(Item(image=drawn((90, 40), "gold")), "2:1"),
    Candidate(Item("green in place of gray", drawn((40, 40))), "2:2"),
    Candidate(Item("a pet"), "2:3"),
    Candidate(Item("a", drawn((50, 90), "black")), "2:4"),
]


def tokenizer_json(special: list[str], words: list[str]) -> str:
    """A byte-level tokenizer in which some words are tokens, with a space before them and without."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=460,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    often = [text for word in words for text in (word, f" {word}")]
    tokenizer.train_from_iterator([*TEXTS, *often * 50], trainer)
    return tokenizer.to_str()


def build_answering(
    directory: Path,
    name: str,
    template: str | None = None,
    words: tuple[str, ...] = ("True", "False"),
    world: World | None = None,
    std: float = 0.15,
    **text: Any,
) -> Path:
    """Write a checkpoint of a family.

    Args:
        directory: Where.
        name: Of the family.
        template: Its chat template, by default the family's; ``""`` for none.
        words: Words that are single tokens.
        world: How the checkpoint is made, by default as the family's.
        std: Of the weights; strong enough for a word or a place to show in the score.
        **text: Changes to the configuration of the language model.
    """
    world = world or WORLDS[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json(list(world.special.values()), list(words))),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=world.special,
    )
    ids = {key: int(tokenizer.convert_tokens_to_ids(token)) for key, token in world.special.items()}
    content = world.config(ids)
    ends = {key: int(getattr(tokenizer, key)) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    content["text_config"] = {**content["text_config"], "vocab_size": len(tokenizer), **ends, **text}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**content))
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=std)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    template = TEMPLATES[name] if template is None else template
    if template:
        (directory / "chat_template.jinja").write_text(template)
    (directory / "preprocessor_config.json").write_text(json.dumps(world.pictures))
    return directory


class Reference:
    """One full prompt at a time, without a cache, written with transformers alone."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.pictures: Any = AutoImageProcessor.from_pretrained(path, backend="pil")
        self.model: Any = AutoModelForImageTextToText.from_pretrained(path).eval()

    def prompt(self, query: Query, candidate: Candidate) -> str:
        """The text of a prompt with its template's marks, by the template itself where that keeps the order."""
        parts: list[dict[str, str]] = [{"type": "text", "text": f"{INSTRUCTION}\nQuery: "}]
        for item, after in ((query.item, "\nFound: "), (candidate.item, None)):
            if item.image is not None:
                parts.append({"type": "image"})
            text = ("\n" if item.image is not None and item.text else "") + (item.text or "")
            parts.append({"type": "text", "text": text + (after or "\nDoes the second match the first? True or False")})
        if self.name == "llava_next":
            return "[INST] " + "".join(part.get("text", "<image>") for part in parts) + " [/INST]"
        if self.name in ("llava_onevision", "internvl"):  # their mark ends in the newline that we write ourselves
            mark = "<image>" if self.name == "llava_onevision" else "<IMG_CONTEXT>"
            body = "".join(part.get("text", mark) for part in parts)
            return f"<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n"
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )
        return text

    @torch.no_grad()
    def score(self, query: Query, candidate: Candidate, labels: tuple[str, str] = ("True", "False")) -> float:
        images = [item.image for item in (query.item, candidate.item) if item.image is not None]
        inputs = FORWARD[self.name](self, self.prompt(query, candidate), images)
        if "mm_token_type_ids" in inputs:
            self.model.model.rope_deltas = None
        logits = self.model(**inputs, use_cache=False).logits[0, -1].float()
        space = " " if self.name in ("llava_next", "idefics3", "smolvlm") else ""
        ids = [self.tokenizer(space + label, add_special_tokens=False)["input_ids"] for label in labels]
        assert [len(of_label) for of_label in ids] == [1, 1]
        yes, no = (logits[of_label[0]].exp() for of_label in ids)
        return float(yes / (yes + no))

    def ids(self, text: str) -> torch.Tensor:
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def _expanded(text: str, mark: str, written: list[str]) -> str:
    pieces = text.split(mark)
    assert len(pieces) == len(written) + 1
    return "".join(a + b for a, b in zip(pieces, [*written, ""], strict=True))


def _qwen(reference: Reference, text: str, images: list[Any]) -> dict[str, Any]:
    inputs = dict(reference.pictures(images=images, return_tensors="pt")) if images else {}
    counts = [int(grid.prod()) // 4 for grid in inputs.get("image_grid_thw", [])]
    ids = reference.ids(_expanded(text, "<|image_pad|>", ["<|image_pad|>" * count for count in counts]))
    if images:
        image = reference.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        inputs["mm_token_type_ids"] = (ids == image).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}


def _idefics(reference: Reference, text: str, images: list[Any]) -> dict[str, Any]:
    written = "<fake_token_around_image><global-img>" + "<image>" * 4 + "<fake_token_around_image>"
    ids = reference.ids(_expanded(text, "<image>", [written] * len(images)))
    inputs = {}
    if images:
        done = reference.pictures(images=[images], do_image_splitting=False, return_tensors="pt")
        inputs = {"pixel_values": done["pixel_values"]}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}


def _llava(reference: Reference, text: str, images: list[Any]) -> dict[str, Any]:
    model = reference.model.model
    default = model.config.vision_feature_select_strategy == "default"
    count = (SIZE // 8) ** 2
    ids = reference.ids(_expanded(text, "<image>", ["<image>" * (count + 1)] * len(images)))
    embeddings = model.get_input_embeddings()(ids)
    place = (ids[0] == reference.tokenizer.convert_tokens_to_ids("<image>")).nonzero()[:, 0].split(count + 1)
    for image, where in zip(images, place if images else (), strict=True):
        size = {"height": SIZE, "width": SIZE}
        view = reference.pictures(
            images=image.resize((SIZE, SIZE), resample=reference.pictures.resample),
            size=size if not default else {"shortest_edge": SIZE},
            image_grid_pinpoints=[[SIZE, SIZE]],
            return_tensors="pt",
        )["pixel_values"][0, :1]
        layer = model.config.vision_feature_layer
        states = model.vision_tower(view, output_hidden_states=True).hidden_states[layer][:, default:]
        features = torch.cat([model.multi_modal_projector(states)[0], model.image_newline[None]])
        embeddings[0, where] = features
    return {"inputs_embeds": embeddings, "attention_mask": torch.ones_like(ids)}


def _gemma(reference: Reference, text: str, images: list[Any]) -> dict[str, Any]:
    # The marks' own paragraphs are tokens of their own in the adapter.
    written = ["<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>"] * len(images)
    pieces = text.split("<start_of_image>")
    rows = [reference.ids(pieces[0])] if pieces[0] else []
    for picture, piece in zip(written, pieces[1:], strict=True):
        rows += [reference.ids(part) for part in ("\n\n", picture, "\n\n", piece)]
    ids = torch.cat(rows, 1)
    soft = reference.tokenizer.convert_tokens_to_ids("<image_soft_token>")
    inputs = {"token_type_ids": (ids == soft).long()}
    if images:
        inputs["pixel_values"] = reference.pictures(images=images, return_tensors="pt")["pixel_values"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}


def _internvl(reference: Reference, text: str, images: list[Any]) -> dict[str, Any]:
    ids = reference.ids(_expanded(text, "<IMG_CONTEXT>", ["<img>" + "<IMG_CONTEXT>" * 4 + "</img>"] * len(images)))
    inputs = {}
    if images:
        inputs["pixel_values"] = reference.pictures(images=images, crop_to_patches=False, return_tensors="pt")[
            "pixel_values"
        ]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}


FORWARD: dict[str, Callable[[Reference, str, list[Any]], dict[str, Any]]] = {
    "llava_next": _llava,
    "llava_onevision": _llava,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "idefics3": _idefics,
    "smolvlm": _idefics,
    "gemma3": _gemma,
    "internvl": _internvl,
}
