"""The dialogues of the package ``chatterbot-corpus``: 28 languages, 21 topics in English, no download.

A file is a list of conversations, and a conversation a list of statements. What more than two statements mean differs
from file to file and is written nowhere, so it was read off them:

* one question and several answers to it in the files on computers and emotions of every language, in all files but the
  conversations in the languages of ``LISTS_OF_ANSWERS``, and in the single files ``MORE``: one row per answer;
* a dialogue in turns everywhere else (conversations, health, sports, ...): one row, which ends with the last answer. A
  question that comes again within a dialogue begins a new row.

Entries that are no list of statements (broken ones, such as a sentence spelled out letter by letter) are left out.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from datasets import Dataset, Features, Value

from fedfm.data.shapes import MESSAGES, Message, assistant, user
from fedfm.errors import DataError, nearest

QUESTION_WITH_ANSWERS = {"computer", "computers", "emotion", "emotions", "emociones"}
"""Topics whose longer entries are one question and its answers."""

LISTS_OF_ANSWERS = {"persian", "spanish", "thai", "turkish"}
"""Languages in which that holds for every topic but ``DIALOGUE``."""

DIALOGUE = {"conversations"}

MORE = {("korean", "food"), ("ukrainian", "gossip")}
"""Single files in which it holds."""


@dataclass(frozen=True)
class Chatterbot:
    """Rows with ``messages``, ``topic`` and ``language``; no two rows hold the same messages.

    Args:
        languages: folders of the corpus, such as ``english``; none means all.
        topics: files in them, such as ``science``; none means all.
    """

    id: ClassVar[str] = "chatterbot"

    languages: tuple[str, ...] = ("english",)
    topics: tuple[str, ...] = ()

    def load(self) -> Dataset:
        """The rows, sorted by language and topic.

        Raises:
            DataError: the package is not installed; no such language or topic.
        """
        root = _folder()
        there = sorted(p.name for p in root.iterdir() if any(p.glob("*.yml")))
        for language in self.languages:
            _known("language", language, there)
        files = [f for name in sorted(set(self.languages) or there) for f in sorted((root / name).glob("*.yml"))]
        for topic in self.topics:
            _known("topic", topic, sorted({f.stem for f in files}))
        rows: dict[tuple[str, ...], dict[str, Any]] = {}
        for file in files:
            if not self.topics or file.stem in self.topics:
                for messages in _read(file):
                    row = {"messages": messages, "topic": file.stem, "language": file.parent.name}
                    # The corpus repeats itself: without this a test row could be one that was trained on.
                    rows.setdefault(tuple(m["content"] for m in messages), row)
        features = Features({"messages": MESSAGES, "topic": Value("string"), "language": Value("string")})
        return Dataset.from_list(list(rows.values()), features=features)


def _folder() -> Path:
    package = importlib.util.find_spec("chatterbot_corpus")
    if package is None or package.origin is None:
        raise DataError(
            "source 'chatterbot' needs the package chatterbot-corpus, which is not installed. Install it with "
            'pip install "fedfm[demo]", or use data of the Hub: source: {kind: hub, path: ...}.'
        )
    return Path(package.origin).parent / "data"


def _known(what: str, name: str, there: Sequence[str]) -> None:
    if name not in there:
        raise DataError(f"chatterbot has no {what} {name!r}.{nearest(name, there)} There are {', '.join(there)}.")


def _read(file: Path) -> Iterator[list[Message]]:
    """The dialogues of a file."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)  # noqa: S506 - both loaders are safe ones
    for entry in content["conversations"]:
        statements = [clean(s) for s in entry if isinstance(s, str)] if isinstance(entry, list) else []
        yield from dialogues([s for s in statements if s], language=file.parent.name, topic=file.stem)


def dialogues(statements: Sequence[str], language: str, topic: str) -> Iterator[list[Message]]:
    """What the statements of one entry mean: lists of messages that begin with the user and end with the assistant."""
    lists = language in LISTS_OF_ANSWERS and topic not in DIALOGUE
    if lists or topic in QUESTION_WITH_ANSWERS or (language, topic) in MORE:
        yield from ([user(statements[0]), assistant(answer)] for answer in statements[1:])
        return
    turns: list[Message] = []
    for question, answer in zip(statements[::2], statements[1::2], strict=False):
        if turns and question == statements[0]:
            yield turns
            turns = []
        turns += [user(question), assistant(answer)]
    if turns:
        yield turns


def clean(statement: str) -> str:
    """The statement without stray spaces; the lines of program code stay as they are.

    >>> clean(" Hi   there ")
    'Hi there'
    """
    text = statement.replace("\u00a0", " ").strip()
    return text if "\n" in text else re.sub(r"\s+", " ", text)
