"""Loss on assistant tokens only, whatever the template does with the text."""

from types import SimpleNamespace

import pytest

from fedfm.errors import DataError, ModelError
from fedfm.tasks import Chat
from tests.conftest import CHATML, byte_tokenizer, dialogue

LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} <|im_end|>{% endif %}{% endfor %}"
)
SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
THINKING = (  # the last answer gets an empty thought before it, earlier ones do not
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"


def supervised(template: str, messages: list[dict[str, str]], **settings: int) -> str:
    """The supervised tokens, as text."""
    tokenizer = byte_tokenizer(template)
    [example] = Chat(**settings).encode([{"messages": messages}], SimpleNamespace(tokenizer=tokenizer, name="tiny"))
    assert example.input_ids.shape == example.target.shape
    kept = example.target != -100
    assert (example.target[kept] == example.input_ids[kept]).all()
    return tokenizer.decode(example.input_ids[kept])


TWO_TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Bye"},
]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "Hello<|im_end|>Bye<|im_end|>"),
        (LLAMA2, "Hello<|im_end|>Bye<|im_end|>"),
        (SYSTEM, "Hello<|im_end|>Bye<|im_end|>"),
        (THINKING, "Hello<|im_end|>Bye<|im_end|>"),
        (PLAIN, "HelloBye"),  # nothing ends a turn but text, which nobody has to learn
    ],
)
def test_only_answers_and_their_end_are_supervised(template: str, expected: str) -> None:
    # The user's "Hello" has the same letters as the assistant's and must not be supervised.
    assert supervised(template, TWO_TURNS) == expected


def test_content_that_looks_like_the_template_is_found() -> None:
    messages = dialogue("x", "a user said: x\nassistant")["messages"]
    assert supervised(CHATML, messages) == "a user said: x\nassistant<|im_end|>"


def test_trimmed_and_multibyte_content() -> None:
    assert supervised(LLAMA2, dialogue("q", "  né 東 ")["messages"]) == "né 東<|im_end|>"


def test_a_template_that_rewrites_answers_is_refused() -> None:
    # Upper-casing is seen: the mark does not come back.
    shouting = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
    with pytest.raises(DataError, match=r"cannot tell where .* puts the answer 'yes'.*task.chat_template"):
        supervised(shouting, dialogue("q", "yes")["messages"])


def test_cut_dialogues() -> None:
    messages = dialogue("q" * 10, "a" * 10)["messages"]
    full = supervised(CHATML, messages)
    assert supervised(CHATML, messages, max_length=36) == "a" * 7  # 29 tokens stand before the answer
    assert full == "a" * 10 + "<|im_end|>"
    loaded = SimpleNamespace(tokenizer=byte_tokenizer(), name="tiny")
    assert Chat(max_length=20).encode([{"messages": messages}], loaded) == []


def test_no_template_is_an_error_that_says_what_to_do() -> None:
    loaded = SimpleNamespace(tokenizer=byte_tokenizer(None), name="gpt2")
    with pytest.raises(ModelError, match=r"gpt2 has no chat template.*task.chat_template.*causal-lm"):
        Chat().encode([dialogue("q", "a")], loaded)
    [example] = Chat(chat_template=CHATML).encode([dialogue("q", "a")], loaded)
    assert (example.target != -100).sum() == 2


def test_prompt_is_what_the_model_sees_before_an_answer() -> None:
    loaded = SimpleNamespace(tokenizer=byte_tokenizer(), name="tiny")
    assert Chat().render("Hi", loaded) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
