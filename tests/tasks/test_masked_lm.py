"""What is hidden, what is predicted, and the loss."""

import math
from types import SimpleNamespace

import pytest
import torch

from fedfm.errors import ModelError, RecipeError
from fedfm.models import Loaded
from fedfm.tasks import MaskedLM
from fedfm.tasks.task import Batch, TaskModel
from tests.conftest import byte_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def loaded(mask: bool = True) -> Loaded:
    tokenizer = byte_tokenizer()
    if mask:
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return SimpleNamespace(tokenizer=tokenizer, name="tiny")  # type: ignore[return-value]


def rows(*texts: str) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


@pytest.mark.parametrize(("length", "hidden"), [(2, 1), (11, 2), (41, 6), (201, 30)])
def test_fifteen_percent_of_the_tokens_after_the_first_and_at_least_one(length: int, hidden: int) -> None:
    # The byte tokenizer puts no special token in, so length - 1 tokens may be hidden: 15 % of 1, 10, 40, 200
    # are 0.15 (at least 1), 1.5 (to the even 2), 6 and 30.
    [example] = MaskedLM().encode(rows((LETTERS * 9)[:length]), loaded())
    assert int((example.target != -100).sum()) == hidden


def test_targets_are_the_text_and_other_positions_are_as_they_were() -> None:
    given = loaded()
    text = LETTERS * 4
    [example] = MaskedLM().encode(rows(text), given)
    original = torch.tensor(given.tokenizer(text)["input_ids"])
    chosen = example.target != -100
    assert torch.equal(example.target[chosen], original[chosen])
    assert torch.equal(example.input_ids[~chosen], original[~chosen])
    assert not torch.equal(example.input_ids, original)


def test_eight_in_ten_are_masked_one_is_random_one_stays() -> None:
    given = loaded()
    mask = given.tokenizer.mask_token_id
    texts = [f"{i:03d} {LETTERS * 9}" for i in range(100)]
    examples = MaskedLM(max_length=230).encode(rows(*texts), given)
    seen = torch.cat([e.input_ids[e.target != -100] for e in examples])
    wanted = torch.cat([e.target[e.target != -100] for e in examples])
    n = len(seen)
    assert n == 100 * 34  # 15 % of 229
    # Four standard deviations of a share: 4 sqrt(0.8 * 0.2 / 3400) = 0.027, 4 sqrt(0.1 * 0.9 / 3400) = 0.021.
    assert float((seen == mask).float().mean()) == pytest.approx(0.8, abs=0.027)
    assert float((seen == wanted).float().mean()) == pytest.approx(0.1, abs=0.021)
    random = seen[(seen != mask) & (seen != wanted)]
    assert len(random) / n == pytest.approx(0.1, abs=0.021)
    assert len(random.unique()) > 100  # of 260 tokens, drawn about 340 times


def test_every_position_but_the_first_can_be_hidden() -> None:
    examples = MaskedLM().encode(rows(*(f"{i:03d} {LETTERS[:6]}" for i in range(200))), loaded())
    hidden = torch.stack([e.target != -100 for e in examples])
    assert not hidden[:, 0].any()
    assert hidden[:, 1:].any(0).all()


def test_special_tokens_are_never_hidden() -> None:
    given = loaded()
    examples = MaskedLM(mlm_probability=1.0).encode(rows("ab<|im_end|>cd<|im_start|>", "x<|im_end|>"), given)
    # With probability 1 all tokens are hidden but the first and the special ones; the second text has no other.
    assert [[t != -100 for t in e.target.tolist()] for e in examples] == [[False, True, False, True, True, False]]


def test_the_mask_is_a_function_of_the_text_alone() -> None:
    first = MaskedLM().encode(rows("a text of some length", "another text, also of some length"), loaded())
    again = MaskedLM().encode(rows("another text, also of some length"), loaded())
    assert torch.equal(first[1].input_ids, again[0].input_ids)
    assert torch.equal(first[1].target, again[0].target)
    places = {
        tuple(e.target.ne(-100).tolist()) for e in MaskedLM().encode(rows(*(f"{i}" * 40 for i in range(9))), loaded())
    }
    assert len(places) == 9  # other texts of the same length are masked elsewhere


def test_nothing_to_learn_is_left_out_and_long_texts_are_cut() -> None:
    examples = MaskedLM(max_length=5).encode(rows("", "x", LETTERS), loaded())
    assert [len(e) for e in examples] == [5]


def test_a_tokenizer_without_mask_token_is_refused() -> None:
    with pytest.raises(ModelError, match="the tokenizer of tiny has no mask token"):
        MaskedLM().encode(rows("text"), loaded(mask=False))


class Given(torch.nn.Module):
    """Scores that are told, and what it was called with."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        self.mask = attention_mask
        return SimpleNamespace(logits=self.logits)


def test_loss_at_hidden_positions_without_a_shift() -> None:
    # Vocabulary of 2; the odds of token 1 are e^x, so -log p(1) = log(1 + e^-x) and -log p(0) = log(1 + e^x).
    x = torch.tensor([[9.0, math.log(3.0), 9.0, 0.0], [9.0, 9.0, math.log(4.0), 9.0]])
    model = Given(torch.stack([torch.zeros_like(x), x], dim=-1))
    ignore = -100
    target = torch.tensor([[ignore, 1, ignore, 0], [ignore, ignore, 0, ignore]])
    batch = Batch.of(torch.zeros(2, 4, dtype=torch.long), torch.tensor([4, 3]), target)
    losses = MaskedLM().losses(TaskModel(model), batch)
    # log(4/3) + log 2 = log(8/3); log 5.
    assert losses.total.tolist() == pytest.approx([math.log(8 / 3), math.log(5)])
    assert losses.count.tolist() == [2, 1]
    assert model.mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    metrics = MaskedLM().metrics(losses.tally)
    assert metrics["loss"] == pytest.approx(math.log(40 / 3) / 3)
    assert metrics["perplexity"] == pytest.approx((40 / 3) ** (1 / 3))
    assert losses.tally["examples"] == 2


def test_padding_has_no_say() -> None:
    x = torch.zeros(1, 3, 2)
    target = torch.tensor([[-100, 1, -100]])
    batch = Batch.of(torch.zeros(1, 3, dtype=torch.long), torch.tensor([2]), target)
    assert MaskedLM().losses(TaskModel(Given(x)), batch).total.tolist() == pytest.approx([math.log(2)])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_length": 1}, "task.max_length must be at least 2 tokens, but is 1."),
        ({"mlm_probability": 0.0}, "task.mlm_probability must be above 0 and at most 1, but is 0.0."),
        ({"mlm_probability": 1.5}, "task.mlm_probability must be above 0 and at most 1, but is 1.5."),
    ],
)
def test_wrong_settings_are_refused(setting: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        MaskedLM(**setting)  # type: ignore[arg-type]
    assert str(caught.value) == message
