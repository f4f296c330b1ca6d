"""Prompts of the reranker: a wording for each task, in the frame of the model's own chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from lightning_mmembed.encoders.loading import find_file, read_json
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Item, Query, Task

#: What a wording must hold, once each and in this order, and what it may hold.
QUERY, CANDIDATE, INSTRUCTION = "{query}", "{candidate}", "{instruction}"
_FIELD = re.compile(r"\{(query|candidate|instruction)\}")
_FAILURES = (TemplateError, TypeError, ValueError)
#: Words that no chat template changes, to see what it writes around them.
_FIRST, _SECOND = "Mmembedfirst", "Mmembedsecond"


class Prompts:
    """A wording for each task.

    Args:
        wordings: By the name of a task (``"cirr_task7"``), or of its M-BEIR task id (``"task7"``) for every dataset
            that has no wording of its own. ``{query}`` and ``{candidate}`` stand for the items, in this order, so that
            what all candidates of a query share comes first; a line with ``{instruction}`` is left out of a query
            without one, and so holds neither item.

    Raises:
        UserInputError: If a wording lacks a field, has one twice, has the candidate first, or has an item in the line
            of the instruction.
    """

    def __init__(self, wordings: Mapping[str, str]) -> None:
        self.wordings = dict(wordings)
        for name, wording in self.wordings.items():
            fields = [field for field in _FIELD.findall(wording) if field != "instruction"]
            if fields != ["query", "candidate"]:
                raise UserInputError(
                    f"prompts[{name!r}]={wording!r} has the fields {fields}; write {QUERY} once, and after it "
                    f"{CANDIDATE} once"
                )
            if any(INSTRUCTION in line and (QUERY in line or CANDIDATE in line) for line in wording.splitlines()):
                raise UserInputError(
                    f"prompts[{name!r}]={wording!r} has an item in the line of {INSTRUCTION}, which is left out of a "
                    f"query without one; give {INSTRUCTION} a line of its own"
                )

    def of(self, task: Task | str | None) -> str:
        """The wording of a task.

        Raises:
            UserInputError: If the task has none.

        Example:
            >>> Prompts({"task7": "{query} {candidate}"}).of("cirr_task7")
            '{query} {candidate}'
        """
        name = task.name if isinstance(task, Task) else task
        for key in (name, "task" + name.rpartition("_task")[2]) if name else ():
            if key in self.wordings:
                return self.wordings[key].strip()
        raise UserInputError(
            f"task={name!r} has no prompt; those with one are {sorted(self.wordings)}. Write prompts[{name!r}], with "
            f"{QUERY} and {CANDIDATE} in it"
        )


@dataclass(frozen=True)
class Frame:
    """What stands around a prompt, and how a picture and an answer are written.

    Args:
        head: Before the prompt.
        tail: Between the prompt and the answer.
        space: What the template writes right before an answer: a space, or nothing.
        mark: What stands for a picture.
    """

    head: str
    tail: str
    space: str
    mark: str


#: The frame of a model without a chat template, apart from the mark of a picture.
PLAIN = Frame("", "\nAnswer:", " ", "")
#: Of no model: a wording is shown as it is.
NO_FRAME = Frame("", "", "", "<image>")


def read_template(path: str, tokenizer: Any) -> str | None:
    """The chat template of a checkpoint: that of its processor, where it has one, else the tokenizer's."""
    file = find_file(path, "chat_template.jinja")
    if file is not None:
        return file.read_text()
    template = (read_json(path, "chat_template.json") or {}).get("chat_template") or tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def read_frame(path: str, tokenizer: Any, image_token: str) -> Frame:
    r"""What a checkpoint's chat template writes around one message of the user, and before the answer.

    A picture is written where it is mentioned, in the words of the template, even where the template itself would
    write all pictures of a message before its text: a model could not tell the query's from the candidate's. A
    checkpoint without a template gets ``{prompt}\nAnswer:``.

    Args:
        path: A directory or a hub id.
        tokenizer: Its tokenizer.
        image_token: What stands for a picture where the template does not say.

    Raises:
        UserInputError: If the template does not write the message as it is, or has no place for a picture.
    """
    template = read_template(path, tokenizer)
    if template is None:
        return replace(PLAIN, mark=image_token)
    try:
        as_parts = _render(tokenizer, template, [_FIRST])
    except _FAILURES:  # a template of texts alone joins what it takes for one
        as_parts = ""
    if _FIRST in as_parts and "{'type'" not in as_parts:
        return _frame(path, tokenizer, template)
    try:
        head, found, tail = _render(tokenizer, template, _FIRST).partition(_FIRST)
    except _FAILURES as error:
        raise _unusable(path, f"fails: {error}") from error
    if not found:
        raise _unusable(path, "does not write the message")
    return _with_answer(tokenizer, template, head, tail, _FIRST, image_token)


def _unusable(path: str, what: str) -> UserInputError:
    return UserInputError(
        f"checkpoint {path!r}: its chat template {what}; put one into chat_template.jinja that writes a message of "
        "text and pictures"
    )


def _render(tokenizer: Any, template: str, content: list[str | None] | str, answer: str | None = None) -> str:
    """One message of texts and of pictures (``None``), and perhaps the answer to it."""

    def written(content: list[str | None] | str) -> Any:
        if isinstance(content, str):
            return content
        return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in content]

    messages = [{"role": "user", "content": written(content)}]
    if answer is not None:
        reply: list[str | None] | str = answer if isinstance(content, str) else [answer]
        messages.append({"role": "assistant", "content": written(reply)})
    rendered: str = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=answer is None
    )
    return rendered


def _frame(path: str, tokenizer: Any, template: str) -> Frame:
    head, _, tail = _render(tokenizer, template, [_FIRST]).partition(_FIRST)
    pictured = _render(tokenizer, template, [_FIRST, None, _SECOND])
    before, _, rest = pictured.partition(_FIRST)
    mark = rest.partition(_SECOND)[0].strip() or before[len(head) :].strip()
    if not mark:
        raise _unusable(path, "writes nothing for a picture")
    return _with_answer(tokenizer, template, head, tail, [_FIRST], mark)


def _with_answer(
    tokenizer: Any, template: str, head: str, tail: str, message: list[str | None] | str, mark: str
) -> Frame:
    """Move what the template writes before an answer into the tail, but for a last space, which its token holds."""
    try:
        answered = _render(tokenizer, template, message, _SECOND)
    except _FAILURES:  # a template that takes no answers
        answered = ""
    asked = head + _FIRST + tail
    if answered.startswith(asked) and _SECOND in answered:
        before = answered[len(asked) :].partition(_SECOND)[0]
        tail += before.rstrip(" ")
        return Frame(head, tail, " " if before.endswith(" ") else "", mark)
    special = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    ends = tail[-1:].isspace() or tail.endswith(special)
    return Frame(head, tail, "" if ends else " ", mark)


class PromptWriter:
    """Writes the prompt of a query and a candidate as text.

    A text that spells out a special token gets a space after its first character, so that nobody's text can end a turn
    or stand for a picture.

    Args:
        tokenizer: Knows the special tokens; without one it is the mark of a picture alone.
        frame: What stands around a prompt.
        prompts: The wordings.
    """

    def __init__(self, tokenizer: Any, frame: Frame, prompts: Prompts) -> None:
        self.frame, self.prompts = frame, prompts
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()} if tokenizer else {}
        special = {token for token, is_special in added.items() if is_special or token in frame.mark} or {frame.mark}
        longest_first = sorted((token for token in special if len(token) > 1), key=lambda token: (-len(token), token))
        self._special = re.compile("|".join(map(re.escape, longest_first)))

    def __call__(self, query: Query, candidate: Item, wording: str) -> tuple[str, str]:
        """The part of a prompt that does not depend on the candidate, and the rest."""
        if query.instruction is None:
            wording = "\n".join(line for line in wording.splitlines() if INSTRUCTION not in line)
        before, _, after = wording.partition(CANDIDATE)
        texts = {QUERY: self._item(query.item), INSTRUCTION: self._plain(query.instruction)}
        before, after = (_FIELD.sub(lambda field: texts[field[0]], part) for part in (before, after))
        return self.frame.head + before, self._item(candidate) + after + self.frame.tail

    def _item(self, item: Item) -> str:
        text = self._plain(item.text)
        if item.image is None:
            return text
        return f"{self.frame.mark}\n{text}" if text else self.frame.mark

    def _plain(self, text: str | None) -> str:
        return self._special.sub(lambda token: f"{token[0][0]} {token[0][1:]}", text or "")
