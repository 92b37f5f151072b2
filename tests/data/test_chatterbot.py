from __future__ import annotations

import importlib.util

import pytest

from fedfm.data import Chatterbot, chatterbot
from fedfm.data.chatterbot import clean, dialogues
from fedfm.errors import DataError

needs_corpus = pytest.mark.skipif(
    importlib.util.find_spec("chatterbot_corpus") is None, reason="chatterbot-corpus is not installed (fedfm[demo])"
)


def spoken(statements: list[str], language: str, topic: str) -> list[list[str]]:
    return [[m["content"] for m in messages] for messages in dialogues(statements, language, topic)]


def test_one_question_with_several_answers_gives_a_row_for_each() -> None:
    assert spoken(["q", "a", "b", "c"], "english", "emotion") == [["q", "a"], ["q", "b"], ["q", "c"]]
    assert spoken(["q", "a", "b"], "persian", "sports") == [["q", "a"], ["q", "b"]]
    assert spoken(["q", "a", "b"], "korean", "food") == [["q", "a"], ["q", "b"]]


def test_a_dialogue_is_one_row_that_ends_with_an_answer() -> None:
    assert spoken(["a", "b", "c", "d"], "english", "conversations") == [["a", "b", "c", "d"]]
    assert spoken(["a", "b", "c"], "persian", "conversations") == [["a", "b"]]
    assert spoken(["a"], "english", "sports") == []
    assert spoken([], "english", "sports") == []


def test_a_repeated_question_begins_a_new_row() -> None:
    assert spoken(["q", "a", "q", "b"], "english", "literature") == [["q", "a"], ["q", "b"]]


def test_roles_alternate_from_user_to_assistant() -> None:
    (messages,) = dialogues(["a", "b", "c", "d"], "english", "health")
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]


def test_white_space_is_cleaned_but_code_keeps_its_lines() -> None:
    assert clean("  What   is\u00a0this? ") == "What is this?"
    assert clean("for i in x:\n    print(i)\n") == "for i in x:\n    print(i)"


@needs_corpus
def test_english_has_21_topics_without_duplicates() -> None:
    rows = Chatterbot().load()
    assert set(rows.column_names) == {"messages", "topic", "language"}
    assert len(set(rows["topic"])) == 21
    texts = [tuple(m["content"] for m in messages) for messages in rows["messages"]]
    assert len(texts) == len(set(texts)) > 1000
    # 1050 entries, ten of which differ.
    assert sum(topic == "tech_support" for topic in rows["topic"]) == 10
    for messages in rows["messages"]:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(m["content"] and m["content"] == m["content"].strip() for m in messages)


@needs_corpus
def test_an_entry_spelled_out_letter_by_letter_is_left_out() -> None:
    rows = Chatterbot(topics=("trivia",)).load()
    assert len(rows) == 260
    assert min(len(m["content"]) for messages in rows["messages"] for m in messages[:1]) > 1


@needs_corpus
def test_languages_and_topics_choose_rows() -> None:
    rows = Chatterbot(languages=("german", "french"), topics=("conversations",)).load()
    assert list(dict.fromkeys(rows["language"])) == ["french", "german"]
    assert set(rows["topic"]) == {"conversations"}


@needs_corpus
def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no language 'englsh'. Did you mean 'english'\? There are bengali, chinese"):
        Chatterbot(languages=("englsh",)).load()
    with pytest.raises(DataError, match=r"no topic 'sport'. Did you mean 'sports'\?"):
        Chatterbot(topics=("sport",)).load()


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatterbot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'pip install "fedfm\[demo\]"'):
        Chatterbot().load()
