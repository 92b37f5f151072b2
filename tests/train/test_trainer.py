"""The trainer against loops written out here, and its cheap steps against the expensive ones."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfm.core import seeds, trees
from fedfm.core.client import View
from fedfm.core.jobs import Call, Features, Fit, Generate, Loss
from fedfm.core.plan import Training
from fedfm.core.update import Member
from fedfm.errors import DataError
from fedfm.models import Loaded, load
from fedfm.spaces import Full, LoRA
from fedfm.tasks import CausalLM, Chat, Classify
from fedfm.train import Trainer
from fedfm.train.batches import batches
from fedfm.train.bench import Bench
from tests.conftest import FAST, People, dialogue

ANN = View(Member("ann", 6), 1)


def trainer(loaded: Loaded, people: People, **changes: Any) -> Trainer:
    settings = {"training": FAST, "space": LoRA(r=2), "task": Chat(), **changes}
    bench, args = Bench.of(loaded, settings["space"], 0), settings["training"]
    trunk = bench.trunk if args.cache_frozen_blocks else None
    return Trainer(loaded, bench.space, settings["task"], args, people, trunk=trunk)


def test_fit_is_the_plain_loop(llama_folder: Path, people: People) -> None:
    """Same batches, written out: full forward, full head, Hugging Face's own loss."""
    args = Training(max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5)
    one = trainer(load(str(llama_folder)), people, training=args)
    fitted = one.answer(Fit({}), ANN)

    plain = load(str(llama_folder))
    space = LoRA(r=2).attach(plain, 0)
    parameters = list(space.train_only(("*",)).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    examples = Chat().encode(people.rows("ann", "train"), plain)
    order = batches([1] * 6, 2, seeds.generator(0, 1, "ann", "fit", "batches"), by_length=False)
    losses = []
    plain.model.train()
    for _ in range(3):
        chosen = [examples[i] for i in next(order)]
        width = max(map(len, chosen))
        ids, labels = torch.zeros(2, width, dtype=torch.long), torch.full((2, width), -100)
        mask = torch.zeros(2, width, dtype=torch.long)
        for row, e in enumerate(chosen):
            ids[row, : len(e)], labels[row, : len(e)], mask[row, : len(e)] = e.input_ids, e.target, 1
        loss = plain.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for name, tensor in space.read().items():
        torch.testing.assert_close(fitted.tensors[name], tensor, rtol=1e-4, atol=1e-6)
    assert fitted.loss == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert (fitted.steps, fitted.examples) == (3, 6)


def test_accumulated_batches_equal_one_large_batch(llama_folder: Path, people: People) -> None:
    large = replace(FAST, per_device_train_batch_size=4)
    small = replace(FAST, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    a = trainer(load(str(llama_folder)), people.only("cid"), training=large).answer(Fit({}), View(Member("cid", 4), 1))
    b = trainer(load(str(llama_folder)), people.only("cid"), training=small).answer(Fit({}), View(Member("cid", 4), 1))
    # Answers differ in length, so a mean of the two halves' means would be another number.
    assert a.loss == pytest.approx(b.loss, abs=1e-5)
    for name in a.tensors:
        torch.testing.assert_close(a.tensors[name], b.tensors[name], rtol=1e-3, atol=1e-5)


def test_a_term_adds_its_gradient(llama: Loaded, people: People) -> None:
    """With one SGD step, the term (1/2)||w||^2 moves the weights by -lr * w more."""
    args = Training(max_steps=1, optim="sgd", learning_rate=0.1, max_grad_norm=0, per_device_train_batch_size=6)
    one = trainer(llama, people, training=args)

    def pull(weights: trees.Tensors, start: trees.Tensors) -> torch.Tensor:
        assert all(torch.equal(weights[n], start[n]) for n in start)  # the first step starts at the start
        return sum((0.5 * w.pow(2).sum() for w in weights.values()), torch.zeros(()))

    without = one.answer(Fit({}), ANN).tensors
    with_term = one.answer(Fit({}, terms=(pull,)), ANN).tensors
    for name, start in one.space.initial.items():
        torch.testing.assert_close(with_term[name] - without[name], -0.1 * start, rtol=1e-3, atol=1e-6)


def test_only_train_gets_gradients(llama: Loaded, people: People) -> None:
    one = trainer(llama, people)
    fitted = one.answer(Fit({}, train=("lora_B",)), ANN)
    for name, tensor in fitted.tensors.items():
        assert torch.equal(tensor, one.space.initial[name]) == ("lora_A" in name)
    assert all(not p.requires_grad for n, p in llama.model.named_parameters() if "lora_B" not in n)


def test_no_graph_below_the_lowest_tuned_block(llama: Loaded, people: People) -> None:
    one = trainer(
        llama, people, space=LoRA(r=2, layers_to_transform=(1,)), training=replace(FAST, cache_frozen_blocks=False)
    )
    seen: list[bool] = []
    llama.model.model.layers[1].register_forward_pre_hook(lambda m, args: seen.append(args[0].requires_grad))
    one.answer(Fit({}), ANN)
    assert seen == [False, False]


def test_kept_hidden_states_change_nothing(llama_folder: Path, people: People) -> None:
    """Blocks below the tuned one run once for each example, and the result is that of running them always."""
    results, runs = {}, {}
    for cached in (True, False):
        loaded = load(str(llama_folder))
        args = replace(FAST, max_steps=6, cache_frozen_blocks=cached)
        one = trainer(loaded, people, space=LoRA(r=2, layers_to_transform=(1,)), training=args)
        assert (one.trunk is not None) == cached
        count: list[int] = []
        loaded.model.model.layers[0].register_forward_hook(lambda m, i, o, c=count: c.append(len(o)))
        results[cached] = (one.answer(Fit({}), ANN), one.answer(Loss({}, "test"), ANN))
        runs[cached] = sum(count)
    assert runs[True] == 6  # each text once: the test rows are among the training rows
    assert runs[False] == 12 + 3
    (fit, scores), (plain_fit, plain_scores) = results[True], results[False]
    for name in fit.tensors:
        torch.testing.assert_close(fit.tensors[name], plain_fit.tensors[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores.loss, plain_scores.loss)


def test_no_trunk_where_it_would_be_wrong(llama_folder: Path, bert_folder: Path, people: People) -> None:
    assert trainer(load(str(llama_folder)), people).trunk is None  # every block is tuned
    assert trainer(load(str(llama_folder)), people, space=Full()).trunk is None
    dropping = load(str(bert_folder), head="sequence_classification", num_labels=3)
    dropping.model.config.hidden_dropout_prob = 0.1
    upper = LoRA(r=2, layers_to_transform=(1,))
    assert trainer(dropping, people, space=upper, task=Classify()).trunk is None


def test_scores_are_per_example(llama: Loaded, people: People) -> None:
    one = trainer(llama, people)
    together = one.answer(Loss({}, "train"), ANN)
    for i, row in enumerate(people.rows("ann", "train")):
        alone = trainer_of(row, one).answer(Loss({}, "train"), View(Member("x", 1), 1))
        torch.testing.assert_close(together.loss[i], alone.loss[0], rtol=1e-4, atol=1e-4)
        assert together.count[i] == alone.count[0]
    assert float(together.tally["loss"]) == pytest.approx(float(together.loss.sum()), rel=1e-5)
    assert float(together.tally["tokens"]) == together.count.sum()


def trainer_of(row: dict[str, Any], like: Trainer) -> Trainer:
    """A trainer on the same model whose only client has one row."""
    return Trainer(like.loaded, like.space, like.task, like.training, People({"x": {"train": [row]}}))


def test_classification_loss_and_metrics(bert_folder: Path) -> None:
    loaded = load(str(bert_folder), head="sequence_classification", num_labels=3)
    rows = [{"text": t, "label": y} for t, y in (("aa", 0), ("bb", 1), ("cc", 2), ("dddd", 0))]
    one = trainer(loaded, People({"x": {"train": rows}}), task=Classify())
    scores = one.answer(Loss({}, "train"), View(Member("x", 4), 1))
    with torch.no_grad():
        logits = torch.cat([loaded.model(**loaded.tokenizer(r["text"], return_tensors="pt")).logits for r in rows])
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0]), reduction="none")
    torch.testing.assert_close(scores.loss, wanted, rtol=1e-4, atol=1e-4)
    # By hand: truth 0 0 1 2, predictions 0 1 1 1 -> F1 of the classes: 2/3, 1/2, 0.
    tally = {"loss": torch.tensor(2.0), "examples": torch.tensor(4.0)}
    tally["confusion"] = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    metrics = Classify().metrics(tally)
    assert metrics == pytest.approx({"loss": 0.5, "accuracy": 0.5, "macro_f1": (2 / 3 + 1 / 2) / 3})


def test_causal_lm_supervises_every_token(llama: Loaded) -> None:
    [example] = CausalLM().encode([{"text": "abc"}], llama)
    assert example.target.tolist() == example.input_ids.tolist()
    assert llama.tokenizer.decode(example.input_ids) == "abc<|im_end|>"
    assert [len(e) for e in CausalLM(max_length=3).encode([{"text": "abcdef"}, {"text": ""}], llama)] == [3]


def test_head_at_supervised_positions_equals_the_full_head(llama: Loaded, people: People) -> None:
    one = trainer(llama, people)
    assert one.model.body is not None
    short = one.answer(Loss({}, "train"), ANN).loss
    one.model = replace(one.model, body=None, head=None)
    torch.testing.assert_close(one.answer(Loss({}, "train"), ANN).loss, short, rtol=1e-5, atol=1e-5)


def test_dropout_is_a_function_of_names_and_leaves_the_global_generator_alone(llama: Loaded, people: People) -> None:
    one = trainer(llama, people, space=LoRA(r=2, lora_dropout=0.5))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = one.answer(Fit({}), ANN).tensors
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = one.answer(Fit({}), ANN).tensors
    other = one.answer(Fit({}), View(Member("ann", 6), 2)).tensors
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize(("kind", "expected"), [("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0.25])])
def test_learning_rate_over_rounds(llama: Loaded, people: People, kind: Any, expected: list[float]) -> None:
    one = trainer(llama, people, training=replace(FAST, learning_rate=1.0, lr_scheduler_type=kind))
    one.rounds = 4
    assert [one.learning_rate(r) for r in (1, 2, 3, 4)] == expected


def test_features_generate_call(llama: Loaded, people: People) -> None:
    one = trainer(llama, people)
    features = one.answer(Features({}, "test"), ANN)
    assert features.shape == (3, 32)
    row = one.encoded("ann", "test")[0]
    with torch.no_grad():
        wanted = llama.model.model(row.input_ids[None]).last_hidden_state.mean(1)[0]
    torch.testing.assert_close(features[0], wanted, rtol=1e-4, atol=1e-5)
    texts = one.answer(Generate({}, prompts=("hi", "you"), max_new_tokens=4), ANN)
    assert [type(t) for t in texts] == [str, str]
    assert one.answer(Generate({}, prompts=("you",), max_new_tokens=4), ANN) == texts[1:]
    assert one.answer(Call(function=lambda rows, draw: (len(rows), torch.rand(1, generator=draw).item())), ANN)[0] == 6


def test_generation_follows_the_tensors(llama: Loaded) -> None:
    """Trained to answer one way, it answers that way."""
    rows = [dialogue("a", "wxyz")]
    args = Training(max_steps=80, learning_rate=1e-2, per_device_train_batch_size=1)
    one = trainer(llama, People({"x": {"train": rows}}), training=args, space=Full())
    fitted = one.answer(Fit({}), View(Member("x", 1), 1))
    assert fitted.loss < 1.5
    assert one.answer(Generate(fitted.tensors, prompts=("a",), max_new_tokens=8), View(Member("x", 1), 1)) == ["wxyz"]


def test_nothing_to_learn_is_an_error_with_the_client(llama: Loaded) -> None:
    one = trainer(llama, People({"empty": {"train": []}}))
    with pytest.raises(DataError, match="client 'empty' has no training example"):
        one.answer(Fit({}), View(Member("empty", 0), 1))


def test_batches_visit_everything_and_bucket_by_length() -> None:
    draw: Callable[[], torch.Generator] = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    order = batches([1] * 5, 2, draw(), by_length=False)
    one_pass = [next(order) for _ in range(3)]
    assert sorted(i for b in one_pass for i in b) == [0, 1, 2, 3, 4]
    assert [len(b) for b in one_pass] == [2, 2, 1]
    lengths = [1, 9, 2, 8, 3, 7]
    order = batches(lengths, 2, draw(), by_length=True)
    spread = [abs(lengths[a] - lengths[b]) for a, b in (next(order) for _ in range(3))]
    assert sorted(spread) == [1, 1, 4]  # 9 8, 7 3, 2 1
