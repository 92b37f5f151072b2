"""A server that hands out weights by which it reads tokens: what is read and grouped by hand, whole attacks."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedfm.audit import Case
from fedfm.audit.reconstruction.decepticons import Decepticons, alike, between
from fedfm.audit.reconstruction.grouping import Item, by_code, by_prefix, single
from fedfm.audit.reconstruction.planted import CONSTANT, Measure, signs
from fedfm.core.plan import Training
from fedfm.errors import RecipeError
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.privacy.dp_sgd import DPSGD
from fedfm.secure.secagg import SecAgg
from fedfm.spaces import Full, LoRA
from fedfm.tasks import CausalLM, Chat, Classify
from fedfm.wire import Clip, LocalGaussian
from tests.conftest import People, byte_tokenizer, dialogue

STEP = {"max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0}
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
Make = Callable[..., Case]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of two blocks with wide feed-forward layers."""
    tokenizer, found = byte_tokenizer(), {}
    ends = {"vocab_size": len(tokenizer), "pad_token_id": 0}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    bert = BertConfig(**SIZES, **ends, **still, intermediate_size=1024)
    llama = LlamaConfig(**SIZES, **ends, intermediate_size=4096, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    for name, make, config in (
        ("bert", BertForSequenceClassification, bert),
        ("llama", LlamaForCausalLM, llama),
    ):
        found[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        make(config).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@pytest.fixture
def made(folders: dict[str, Path]) -> Make:
    """A case of one round."""

    def make(kind: str, *clients: Sequence[Any], **changes: Any) -> Case:
        task = changes.pop("task", Classify(max_length=32) if kind == "bert" else CausalLM(max_length=32))
        training = Training(**{**STEP, **changes.pop("training", {})})
        data = {
            name: {
                "train": [{"text": t, "label": at % 3} if isinstance(t, str) else t for at, t in enumerate(texts)],
                "validation": [],
                "test": [{"text": "it is", "label": 0}] * 3 if isinstance(texts[0], str) else texts[:1],
            }
            for name, texts in zip(("ann", "bob", "cid"), clients, strict=False)
        }
        settings = {"space": Full(), "rounds": 1, "evaluation": Evaluation(every=0), "training": training, **changes}
        run = Federation(str(folders[kind]), FedAvg(), People(data), task, **settings)
        return Case(run, {"of": torch.zeros(1)})

    return make


def texts(count: int, shortest: int, longest: int) -> list[str]:
    """Texts that nobody could guess."""
    draw = random.Random(3)
    signs = string.ascii_letters + string.digits + " .,;"
    return ["".join(draw.choices(signs, k=draw.randint(shortest, longest))) for _ in range(count)]


def test_between_thresholds_stands_what_entered_there() -> None:
    tokens = torch.tensor([[4.0, 1.0, 2.0], [4.0, 3.0, -1.0], [4.0, 0.5, 0.5]], dtype=torch.float64)
    shares = torch.tensor([0.2, -0.4, 0.3], dtype=torch.float64)
    # The first token passes one threshold, the second two, the third all four; between the last two lies nothing.
    passed = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]], dtype=torch.float64)
    found = between((passed * shares) @ tokens, 9)
    assert torch.allclose(found, (tokens / 4)[[1, 2, 0]])  # the largest share first
    assert between((passed * shares) @ tokens, 2).equal(found[:2])
    assert len(between(torch.zeros(4, 3, dtype=torch.float64), 9)) == 0


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_token_alone_between_thresholds_gives_its_embedding(made: Make, kind: str) -> None:
    case, attack = made(kind, ["fox", "a bee"], training={"weight_decay": 0.1}), Decepticons()
    family = attack.family(case)
    assert family is not None
    [leak] = attack.leaks(case)
    true = []
    for row in leak.rows:
        ids = row.input_ids
        entered = family.entering(family.tokens(case.initial, ids, torch.arange(len(ids)))[None])[0]
        true += list(entered / CONSTANT)
    found = attack.found(case, leak)
    apart = torch.cdist(found.float(), torch.stack(true))
    # Each is found, but a last one after which nothing is predicted.
    assert int((apart.min(0).values < 1e-4).sum()) == 8
    # Whatever is found is one of them, also by what little of it reaches the next threshold.
    assert float(apart.min(1).values.max()) < 0.05


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_of_eight_rows_most_tokens_are_read(made: Make, kind: str) -> None:
    case = made(kind, texts(8, 16, 32))
    found = {finding.measure: finding for finding in Decepticons().look(case)}
    assert found["tokens recovered (F1)"].trials == 8
    assert found["tokens recovered (F1)"].low > 0.8
    assert found["ROUGE-2"].value > 0.7  # Their order, too.
    assert found["tokens recovered (F1)"].chance < 0.2
    assert found["tokens recovered (F1)"].notes == "the server changed the weights that it handed out"


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_labels_that_pull_in_turn_hide_nothing(made: Make, optim: str) -> None:
    # The same text with each of the classes: gradients of equal strength would cancel out.
    case = made("bert", ["fox", "fox", "fox"], training={"optim": optim, "learning_rate": 1e-3})
    attack = Decepticons()
    [leak] = attack.leaks(case)
    found = {one.token for one in attack.items(case, leak)}
    # AdamW sends little but signs.
    assert (found == set(leak.rows[0].input_ids.tolist())) == (optim == "sgd")


def test_what_is_not_supervised_is_read_too(made: Make) -> None:
    case = made("llama", [dialogue("where is he", "at home")], task=Chat(max_length=60))
    [leak] = Decepticons().leaks(case)
    assert int((leak.rows[0].target >= 0).sum()) < 10
    tokens, *_ = Decepticons().look(case)
    assert "where is he" in tokens.examples[0][0]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_noise_of_clients_stops_it_and_a_secure_sum_does_not(made: Make, kind: str) -> None:
    rows = texts(6, 6, 12)
    clients = (rows[:2], rows[2:4], rows[4:])
    plain, noisy, summed = (
        Decepticons().look(made(kind, *clients, **protection))[0]
        for protection in (
            {},
            {"stages": (Clip(1.0), LocalGaussian(0.01))},
            {"secure": SecAgg(max_value=64.0, bits=32)},
        )
    )
    assert plain.value > 0.9
    assert noisy.value < 0.2
    assert summed.trials == 6
    assert summed.value > 0.8
    # Of several rows clients cannot tell the gradients apart in all tensors of the space full, and send nothing.
    with pytest.raises(RecipeError, match="decepticons: no change of weights with a row behind it was seen in round 1"):
        Decepticons().look(made(kind, *clients, privacy=DPSGD(noise_multiplier=0.5)))


def test_private_training_on_one_row_stops_it(made: Make) -> None:
    text = texts(1, 12, 12)
    assert Decepticons().look(made("bert", text))[0].value == 1
    assert Decepticons().look(made("bert", text, privacy=DPSGD(noise_multiplier=0.5)))[0].value < 0.2


def test_the_run_itself_hands_out_what_it_should(made: Make) -> None:
    case, attack = made("bert", ["fox"]), Decepticons()
    honest, planted = case.watched.exposed()[0].start, attack.leaks(case)[0].exposed.start
    assert honest.keys() == planted.keys()
    assert all(honest[name].shape == planted[name].shape for name in honest)
    assert all(honest[name].equal(case.initial[name]) for name in honest)
    assert not honest[attack.family(case).measured].equal(planted[attack.family(case).measured])  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_client_who_compares_the_units_notices(made: Make, kind: str) -> None:
    case, attack = made(kind, ["fox"]), Decepticons()
    family = attack.family(case)
    assert family is not None
    units = family.units
    assert alike(case.initial[family.measured]) == []
    assert alike(attack.alter(case)("ann", case.initial)[family.measured]) == list(range(units))
    check = attack.look(case)[-1]
    assert (check.measure, check.value, check.trials) == ("units that the client could notice", 1.0, units)
    assert not check.leaks


def test_units_add_little_whatever_is_measured(made: Make) -> None:
    case, attack = made("bert", ["fox"]), Decepticons(bins=64)
    family = attack.family(case)
    assert family is not None
    found = attack.measured(case, family, case.initial)
    assert len(found.thresholds) == 64
    assert (found.thresholds.diff() >= 0).all()
    assert signs(6).tolist() == [1, -1, -1, 1, 1, -1]
    seen = torch.linspace(float(found.thresholds[1]), float(found.thresholds[-1]), 200)
    added = found.gain * (found.steep * (seen[:, None] - found.thresholds)).relu() @ signs(64)
    assert float(added.abs().max()) < 0.6
    same = Measure(found.direction, found.out, found.thresholds.sort(descending=True).values, 1.0)
    assert family.units_of(same)[:, 0].diff().gt(0).any()


def item(token: int, place: int, code: Sequence[float], own: Sequence[float] = (0.0, 0.0), sure: float = 1.0) -> Item:
    return Item(token, place, torch.tensor(code), torch.tensor(own), sure)


def test_rows_are_told_apart_by_their_codes() -> None:
    found = [
        item(5, 1, [1.0, 0.0]),
        item(6, 0, [1.0, 0.01]),
        item(7, 0, [-1.0, 0.5]),
        item(8, 2, [-1.0, 0.51]),
        item(6, 0, [1.0, 0.012], sure=0.95),  # once more, from the other side of a threshold
        item(9, 3, [0.1, 0.2]),  # of both rows: its code is a mixture
    ]
    assert sorted(by_code(found, [4, 4])) == [[6, 5, 9], [7, 8, 9]]
    assert by_code(found[:1], [4]) == [[5]]
    assert by_code([], [4]) == []
    assert [one.token for one in single(found)].count(6) == 1


def test_rows_are_put_in_order_by_the_codes_of_their_beginnings() -> None:
    draw = torch.Generator().manual_seed(0)
    own = torch.randn(20, 4, generator=draw)
    rows = [[3, 5, 8, 3], [3, 5, 9, 2, 7, 11], [1, 4]]
    found = {}
    for row in rows:
        codes = own[row].cumsum(0) / torch.arange(1, len(row) + 1)[:, None]
        for token, code in zip(row, codes, strict=True):
            found[token, *code.tolist()] = Item(token, 0, code, own[token], 1.0)
    items = list(found.values())
    assert len(items) == 10  # Two rows begin alike.
    assert sorted(by_prefix(items, [4, 6, 2], own)) == sorted(rows)
    # A token that was not found stands between two that were.
    fewer = [one for one in items if one.token != 2]
    assert sorted(by_prefix(fewer, [4, 6, 2], own)) == sorted(rows)
    # Of two in turn it is not known what they are.
    assert [3, 5, 9, 2, 7, 11] not in by_prefix([one for one in fewer if one.token != 7], [4, 6, 2], own)
    assert by_prefix([], [3], own) == [[]]


def test_it_says_why_it_cannot_be_carried_out(made: Make, sharp_bert: Path, llama_folder: Path) -> None:
    attack = Decepticons()
    assert attack.refusal(made("bert", ["fox"])) == ""
    assert attack.refusal(made("bert", ["fox"], space=LoRA(r=2))) == (
        "it needs a server that sets bert.encoder.layer.0.intermediate.dense.weight, as in the space full"
    )
    one = Federation(
        str(sharp_bert), FedAvg(), People({"ann": {"train": [{"text": "a", "label": 0}]}}), Classify(), space=Full()
    )
    assert attack.refusal(Case(one, {})) == (
        "it is written for models of the BERT and Llama families with two blocks or more"
    )
    with pytest.raises(RecipeError, match="Decepticons bins must be at least 2, but is 1"):
        Decepticons(bins=1)


@pytest.fixture(scope="module")
def sharp_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one block, of which nothing but the first token reaches the classifier."""
    folder, tokenizer = tmp_path_factory.mktemp("one"), byte_tokenizer()
    config = BertConfig(**{**SIZES, "num_hidden_layers": 1}, vocab_size=len(tokenizer), intermediate_size=64)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
