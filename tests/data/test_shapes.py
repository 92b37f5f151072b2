from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from fedfm.data.shapes import canonical, prompt
from fedfm.errors import DataError

PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def shaped(*rows: dict[str, Any]) -> Dataset:
    return canonical(Dataset.from_list(list(rows)), "the data")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": PAIR},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": PAIR},
        {"prompt": "q", "completion": "a"},
        {"prompt": PAIR[:1], "completion": PAIR[1:]},
        {"question": "q", "answer": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "output": "a"},
    ],
)
def test_every_dialogue_shape_becomes_the_same_messages(row: dict[str, Any]) -> None:
    out = shaped(row | {"site": 7})
    assert out[0] == {"messages": PAIR, "site": 7}


def test_alpaca_input_follows_the_instruction_after_a_blank_line() -> None:
    out = shaped({"instruction": "Sort.", "input": "3 1", "output": "1 3"})
    assert out[0]["messages"][0]["content"] == "Sort.\n\n3 1"
    assert out.column_names == ["messages"]


def test_system_turns_stay() -> None:
    out = shaped({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]})
    assert [m["role"] for m in out[0]["messages"]] == ["system", "user"]


def test_text_stays_with_its_label_as_classes() -> None:
    out = shaped({"text": "x", "label": "b", "n": 1}, {"text": "y", "label": "a", "n": 2})
    assert out[0] == {"text": "x", "label": 1, "n": 1}
    assert out.features["label"].names == ["a", "b"]


def test_labels_that_run_from_zero_keep_their_numbers() -> None:
    out = shaped({"text": "x", "label": 1}, {"text": "y", "label": 0})
    assert list(out["label"]) == [1, 0]
    assert out.features["label"].names == ["0", "1"]


def test_targets_with_fractions_stay_numbers() -> None:
    out = shaped({"text": "x", "label": 0.5}, {"text": "y", "label": 2.0})
    assert list(out["label"]) == [0.5, 2.0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "x"}, r"the data has the columns body, which is no known shape. Known are messages; conversations;"),
        ({"messages": "hello"}, r"'messages' must hold lists of \{role, content\}, but holds"),
        ({"messages": [{"role": "user", "content": None}, *PAIR]}, r"row 0: 'messages' must hold .* a content"),
        ({"messages": None}, r"'messages' must hold"),
        ({"text": None}, r"the column 'text' must hold a text in each row, but 1 of 1 rows have none"),
        ({"text": 3}, r"the column 'text' must hold a text in each row, but it holds"),
        ({"question": "q", "answer": 4}, r"the data, row 0: 'answer' must be a text, but is 4. Mend or remove the row"),
        ({"prompt": ["q"], "completion": "a"}, r"row 0: a message must be \{role, content\}"),
        ({"conversations": [{"from": "humn", "value": "q"}]}, r"the speaker 'humn'.*Did you mean 'human'\?"),
        ({"conversations": [{"from": "human", "value": None}]}, r"must hold \{from, value\} of texts"),
        ({"conversations": {"from": ["human"], "value": ["q"]}}, r"'conversations' must be a list of turns"),
        ({"text": "x", "label": None}, r"the label needs a value of 'label' in each row"),
    ],
)
def test_what_does_not_fit_names_the_row_and_what_to_do(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        shaped(row)
    assert "\n" not in str(caught.value)


def test_an_empty_dialogue_names_its_row() -> None:
    with pytest.raises(DataError, match=r"row 1: 'messages' must hold at least one message"):
        shaped({"messages": PAIR}, {"messages": []})


def test_the_row_that_does_not_fit_is_named_by_its_number() -> None:
    with pytest.raises(DataError, match=r"row 1: 'answer' must be a text, but is None"):
        shaped({"question": "q", "answer": "a"}, {"question": "q", "answer": None})


def test_the_prompt_is_the_first_user_message_or_the_text() -> None:
    assert prompt({"messages": [{"role": "system", "content": "s"}, *PAIR]}) == "q"
    assert prompt({"text": "x"}) == "x"
    assert prompt({"pixels": [0.0]}) is None
