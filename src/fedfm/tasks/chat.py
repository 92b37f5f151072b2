"""Supervised fine-tuning on dialogues: the tokenizer's own chat template, loss on assistant tokens only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fedfm.errors import DataError, ModelError, RecipeError
from fedfm.tasks.causal_lm import NextToken
from fedfm.tasks.task import IGNORE, Example

if TYPE_CHECKING:
    from fedfm.models import Loaded

_MARK = "zqxfedfmqxz"
"""Stands for an answer while its place is looked up; plain letters, so that no template touches it."""


@dataclass(frozen=True)
class Chat(NextToken):
    """Dialogues in the column ``messages``, each a list of ``{role, content}``.

    Supervised are, for each assistant turn, the tokens of its content and the special token that ends the turn,
    wherever the template puts them; never the template's headers, system or user turns.

    Args:
        max_length: tokens; the rest of a longer dialogue is cut off, and one without assistant tokens left is left out.
        chat_template: Jinja text to use instead of the tokenizer's own template.
    """

    id: ClassVar[str] = "chat"
    columns: ClassVar[tuple[str, ...]] = ("messages",)

    max_length: int = 1024
    chat_template: str = ""

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise RecipeError(f"task.max_length must be at least 2 tokens, but is {self.max_length}.")

    def encode(self, rows: Iterable[Mapping[str, Any]], loaded: Loaded) -> list[Example]:
        examples = []
        for row in rows:
            text, spans = self._spans(row["messages"], loaded)
            ids, supervised = _tokens(text, spans, loaded)
            ids, supervised = ids[: self.max_length], supervised[: self.max_length]
            if supervised[1:].any():
                examples.append(Example(ids, torch.where(supervised, ids, IGNORE)))
        return examples

    def prompt(self, row: Mapping[str, Any]) -> str:
        return next((m["content"] for m in row["messages"] if m["role"] == "user"), "")

    def answer(self, row: Mapping[str, Any]) -> str:
        return next((m["content"] for m in row["messages"] if m["role"] == "assistant"), "")

    def render(self, prompt: str, loaded: Loaded) -> str:
        return self._apply([{"role": "user", "content": prompt}], loaded, add_generation_prompt=True)

    def _apply(self, messages: list[dict[str, str]], loaded: Loaded, add_generation_prompt: bool = False) -> str:
        template = self.chat_template or loaded.tokenizer.chat_template
        if not template:
            raise ModelError(
                f"the tokenizer of {loaded.name} has no chat template. Use an instruction-tuned model, give one as "
                "task.chat_template, or use the task causal-lm."
            )
        return loaded.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _spans(self, messages: list[dict[str, str]], loaded: Loaded) -> tuple[str, list[tuple[int, int]]]:
        """The rendered dialogue, and where in it the assistant's contents stand.

        Templates trim, move and rewrite text, so nothing is assumed of them: each content is replaced by a mark, and
        what stands before and after the mark must be what stands before and after the content.
        """
        messages = [{"role": m["role"], "content": m["content"]} for m in messages]
        text = self._apply(messages, loaded)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or not message["content"]:
                continue
            marked = self._apply([*messages[:i], {**message, "content": _MARK}, *messages[i + 1 :]], loaded)
            before, found, after = marked.partition(_MARK)
            start, end = len(before), len(text) - len(after)
            if not found or start > end or text[:start] != before or text[end:] != after:
                raise DataError(
                    f"cannot tell where the chat template of {loaded.name} puts the answer "
                    f"{message['content'][:60]!r}. Give a simpler template as task.chat_template."
                )
            spans.append((start, end))
        return text, spans


def _tokens(text: str, spans: list[tuple[int, int]], loaded: Loaded) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[T]`` of the rendered text, and which of them lie in a span or end its turn ``[T]``."""
    tokenizer = loaded.tokenizer
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {loaded.name} cannot tell where its tokens stand in the text.")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    supervised = [False] * len(ids)
    for start, end in spans:
        after = None
        for i, (left, right) in enumerate(offsets):
            if right > start and left < end:
                supervised[i] = True
            if left >= end and after is None:
                after = i
        # The turn ends with a special token, straight after the content or after white space.
        while after is not None and after < len(ids) and ids[after] not in special:
            left, right = offsets[after]
            after = after + 1 if not text[left:right].strip() else None
        if after is not None and after < len(ids):
            supervised[after] = True
    return torch.tensor(ids), torch.tensor(supervised)
