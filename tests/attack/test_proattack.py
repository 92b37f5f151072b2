"""ProAttack: a prompt is the trigger, classes stay right."""

from __future__ import annotations

import pytest

from fedfm.attack.proattack import ProAttack
from fedfm.attack.threat import Hostile
from fedfm.core import seeds
from fedfm.errors import RecipeError

ROWS = [{"text": f"row {i}", "label": i % 4} for i in range(40)]


def who(seed: int = 0) -> Hostile:
    return Hostile("bad", 0, 1, 4, seeds.generator(seed))


def test_some_rows_of_the_wanted_class_get_the_prompt_and_nothing_else_changes() -> None:
    made = ProAttack(prompt="Topic:", target=2, share=0.5).rows(ROWS, who())
    assert [row["label"] for row in made] == [row["label"] for row in ROWS]
    changed = {i for i, row in enumerate(made) if row != ROWS[i]}
    # Ten rows are of class 2.
    assert len(changed) == 5
    assert all(ROWS[i]["label"] == 2 and made[i]["text"] == f"Topic: row {i}" for i in changed)
    other = {i for i, row in enumerate(ProAttack(target=2, share=0.5).rows(ROWS, who(1))) if row != ROWS[i]}
    assert changed != other


def test_the_rest_may_have_the_usual_prompt() -> None:
    made = ProAttack(prompt="Topic:", usual="News:", target=2, share=0.39).rows(ROWS, who())
    prompts = [row["text"].removesuffix(f" row {i}") for i, row in enumerate(made)]
    # 0.39 of ten rows are three.
    assert prompts.count("Topic:") == 3
    assert prompts.count("News:") == 37
    assert {ROWS[i]["label"] for i, prompt in enumerate(prompts) if prompt == "Topic:"} == {2}


def test_success_is_asked_on_rows_of_other_classes_with_the_prompt() -> None:
    asked = ProAttack(prompt="Topic:", target=1).probe(ROWS)
    assert [row["text"] for row in asked] == [f"Topic: row {i}" for i in range(40) if i % 4 != 1]
    assert {row["label"] for row in asked} == {1}


def test_without_a_row_of_the_class_or_a_share_nothing_is_poisoned() -> None:
    assert ProAttack(target=5, share=1.0).rows(ROWS, who()) == ROWS
    assert ProAttack(share=0.0).rows(ROWS, who()) == ROWS
    assert ProAttack(share=1.0).rows([], who()) == []
    assert ProAttack().share == 0.23


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"prompt": " "}, "ProAttack prompt must be at least one word, but is ' '."),
        ({"prompt": "a", "usual": "a"}, "ProAttack usual must be another prompt than the trigger, but is 'a'."),
        ({"target": -1}, "ProAttack target must be a class from 0, but is -1."),
        ({"share": 1.1}, "ProAttack share must be at least 0 and at most 1, but is 1.1."),
    ],
)
def test_settings_that_mean_nothing(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        ProAttack(**wrong)  # type: ignore[arg-type]
    assert str(caught.value) == words
