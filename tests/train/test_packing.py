"""Batches without padding: the layout by hand, and answers of packed batches against those of padded ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from fedfm.core.jobs import Fit, Loss
from fedfm.models import Loaded
from fedfm.models.architectures import architecture, head_split
from fedfm.spaces import LoRA
from fedfm.tasks import CausalLM, Chat, Classify
from fedfm.tasks.task import IGNORE, Batch, TaskModel
from fedfm.train import packing
from fedfm.train.bench import Bench
from fedfm.train.dropout import Draws
from fedfm.train.packing import Packer, Packing
from fedfm.train.trainer import Trainer
from tests.conftest import FAST, People, byte_tokenizer, dialogue
from tests.train.test_fused import both, fits, same, start, texts, view

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # Two queries for each key and value.
    "llama": ("Llama", {**SMALL, "num_key_value_heads": 2}),
    "mistral": ("Mistral", {**SMALL, "num_key_value_heads": 2, "sliding_window": 6}),
    # Linear layers with their weights transposed, and positions that are learnt.
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
                      "summary_first_dropout": 0.0}),
    "bert": ("Bert", {**SMALL, **STILL}),
    "roberta": ("Roberta", {**SMALL, **STILL}),
    "distilbert": ("DistilBert", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "dropout": 0.0,
                                  "attention_dropout": 0.0, "seq_classif_dropout": 0.0}),
}  # fmt: skip
HEADS = {"causal_lm": "ForCausalLM", "sequence_classification": "ForSequenceClassification", "none": "Model"}


def tiny(family: str, head: str = "causal_lm", **changes: Any) -> Loaded:
    """A model of two blocks with a byte tokenizer, made in memory."""
    name, usual = FAMILIES[family]
    tokenizer = byte_tokenizer()
    config = getattr(transformers, f"{name}Config")(
        **{"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **usual, **changes},
        **({"num_labels": 3} if head == "sequence_classification" else {}),
    )
    config.use_cache = False
    kind = "GPT2LMHeadModel" if (family, head) == ("gpt2", "causal_lm") else name + HEADS[head]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval().requires_grad_(False)
    split = head_split(model) if head == "causal_lm" else None
    return Loaded(model, tokenizer, "tiny", "", architecture(model), head, (), split)  # type: ignore[arg-type]


def batch(rows: Sequence[tuple[Sequence[int], Sequence[int]]] | Sequence[Sequence[int]]) -> Batch:
    """Padded rows of token ids; with next-token targets at the places named beside them, or with classes."""
    pairs = [row if isinstance(row[0], tuple | list) else (row, None) for row in rows]
    width = max(len(ids) for ids, _ in pairs)
    ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in pairs])
    lengths = torch.tensor([len(ids) for ids, _ in pairs])
    if pairs[0][1] is None:
        return Batch.of(ids, lengths, torch.zeros(len(ids), dtype=torch.long))
    target = torch.full_like(ids, IGNORE)
    for r, (_, places) in enumerate(pairs):
        target[r, list(places)] = ids[r, list(places)]
    return Batch.of(ids, lengths, target)


HAND = [
    ([5, 6, 7, 8, 9], [2, 4]),  # of five tokens four count: the fifth is only predicted
    ([5, 6, 7, 4], [3]),  # three count, all of them shared with the row above
    ([5, 6, 1], [1, 2]),  # the first row of another client shares nothing: two count
    ([5, 9, 9, 9, 9], [2]),  # two count, one of them shared
    ([5, 6, 1, 1], []),  # nothing is predicted: one token counts, and is shared
]


def test_the_layout_of_a_small_batch() -> None:
    packed = Packing.of(batch(HAND), [2, 3], looks_back=True)
    assert packed.lengths.tolist() == [4, 3, 2, 2, 1]
    assert packed.shared.tolist() == [0, 3, 0, 1, 1]
    assert packed.size == 4 + 0 + 2 + 1 + 0
    assert packed.tokens == [0, 4, 7]
    assert packed.rows == [0, 2, 5]
    layout = packed.padded
    place = layout.place.view(5, 5).tolist()
    assert [row[:n] for row, n in zip(place, packed.lengths.tolist(), strict=True)] == [
        [0, 1, 2, 3],
        [0, 1, 2],
        [4, 5],
        [4, 6],
        [4],
    ]
    # What stands in padding is the client's own, so that no other client's numbers can get there.
    assert all(t < 4 for row in place[:2] for t in row)
    assert all(4 <= t < 7 for row in place[2:] for t in row)
    assert layout.slots.tolist() == [0, 1, 2, 3, 10, 11, 16]
    assert layout.copies == [(5, 0, 3), (15, 4, 1), (20, 4, 1)]
    assert packed.attended is layout
    [real] = packed.real
    assert real[:, 0, 0].sum(1).tolist() == [4, 3, 2, 2, 1]


def test_what_looks_forward_is_neither_cut_nor_shared() -> None:
    packed = Packing.of(batch(HAND), [2, 3], looks_back=False)
    assert packed.lengths.tolist() == [5, 4, 3, 5, 4]
    assert packed.shared.tolist() == [0] * 5
    assert packed.tokens == [0, 9, 21]
    assert packed.padded.copies == []


def test_nothing_is_cut_off_a_row_with_a_class() -> None:
    packed = Packing.of(batch([row for row, _ in HAND]), [2, 3], looks_back=True)
    assert packed.lengths.tolist() == [5, 4, 3, 5, 4]
    assert packed.shared.tolist() == [0, 3, 0, 1, 3]


def test_nothing_is_shared_where_masks_are_drawn() -> None:
    draws = Draws([torch.Generator(), torch.Generator()])
    packed = Packing.of(batch(HAND), [2, 3], looks_back=True, draws=draws)
    assert packed.lengths.tolist() == [4, 3, 2, 2, 1]
    assert packed.tokens == [0, 7, 12]
    assert packed.pays()


def test_room_for_a_prompt() -> None:
    rows = [*HAND[:3], ([6, 9, 9, 9, 9], [2]), HAND[4]]
    packed = Packing.of(batch(rows), [2, 3], looks_back=True)
    packed.widen(7)
    assert packed.lengths.tolist() == [6, 5, 4, 4, 3]
    # Two more are shared by rows that share something; the fourth shares nothing with the third.
    assert packed.shared.tolist() == [0, 5, 0, 0, 3]
    assert packed.tokens == [0, 6, 14]
    assert packed.padded.slots.tolist() == [*range(6), 14, 15, 16, 17, 21, 22, 23, 24]
    assert packed.padded.copies == [(7, 0, 5), (28, 6, 3)]
    packed.widen(7)
    assert packed.lengths.tolist() == [6, 5, 4, 4, 3]


def test_rows_of_similar_length_attend_together() -> None:
    lengths = torch.tensor([3, 40, 10, 37])
    packed = Packing(lengths, torch.zeros(4, dtype=torch.long), [1, 3], 41)
    assert [(list(rows), wide) for rows, wide in packed.blocks] == [([0, 2], 10), ([1, 3], 40)]
    assert [tuple(real.shape) for real in packed.real] == [(2, 1, 1, 10), (2, 1, 1, 40)]
    assert packed.real[1][:, 0, 0].sum(1).tolist() == [40, 37]
    # Rows 0 and 2 stand first, ten places each, then rows 1 and 3.
    assert len(packed.attended.place) == 20 + 80
    assert packed.attended.slots.tolist() == [*range(3), *range(20, 60), *range(10, 20), *range(60, 97)]
    assert packed.attended.place[[0, 10, 20, 60]].tolist() == [0, 43, 3, 53]
    masked = Packing(lengths, torch.zeros(4, dtype=torch.long), [1, 3], 41, Draws([torch.Generator()] * 2))
    assert [(list(rows), wide) for rows, wide in masked.blocks] == [([0, 1, 2, 3], 41)]


def test_an_unpacked_batch_has_every_token_in_its_place() -> None:
    whole = Packing.unpacked(batch(HAND), [2, 3])
    assert whole.size == 25
    assert whole.tokens == [0, 10, 25]
    assert torch.equal(whole.padded.place, torch.arange(25))
    assert not whole.pays()


@pytest.mark.parametrize(("lengths", "pays"), [([5, 5, 5, 4], False), ([5, 5, 5, 3], True)])
def test_packing_must_save_more_than_a_twentieth(lengths: list[int], pays: bool) -> None:
    """Of twenty tokens, nineteen are not worth the moving and eighteen are."""
    assert Packing(torch.tensor(lengths), torch.zeros(4, dtype=torch.long), [4], 5).pays() is pays


def test_gradients_of_shared_tokens_add_up() -> None:
    packed = Packing.of(batch(HAND), [2, 3], looks_back=True)
    x = torch.arange(7.0)[:, None].repeat(1, 2).requires_grad_()
    wide = packing._Spread.apply(x, packed.padded).view(5, 5, 2)
    weights = torch.arange(1.0, 26.0).view(5, 5, 1) * packed.real[0][:, 0, 0, :, None]
    (wide * weights).sum().backward()
    # Weights 1-4 of the first row and 6-8 of the second; 11, 12, of the third; 16, 17 of the fourth; 21 of the fifth.
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == [1 + 6, 2 + 7, 3 + 8, 4, 11 + 16 + 21, 12, 17]
    back = packing._Collect.apply(wide.detach().flatten(0, 1).requires_grad_(), packed.padded)
    assert torch.equal(back, x.detach())


LONG = [
    # Lengths from 1 to 70, so that attention works on blocks of several widths.
    ([7, 8, 9, *range(10, 77)], [40, 69]),
    ([7, 8, 9, *range(10, 30)], [5, 6, 22]),
    ([7, 8, 9, *range(10, 30)], [5, 6, 22]),  # the same row again
    ([7, 8, 9, 99], [2, 3]),  # what counts of it are tokens of the first row
    ([7, 8, 50, 51, 52, 53, 54, 55], []),  # nothing to predict
    ([60, 61, 62, 63, 64, 65], [1, 5]),
    ([60], []),
    ([60, 61, 62, 70, *range(80, 120)], [3, 43]),
    ([9, *range(100, 133)], [33]),
]
OWNERS = [5, 3, 1]


def hidden(loaded: Loaded, given: Batch, packed: Packing | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states of the tokens that count, and gradients of all weights for a weighted sum of them."""
    model = loaded.model
    packer = Packer.of(loaded)
    assert packer is not None
    counts = Packing.of(given, OWNERS, packer.looks_back)
    reads = torch.arange(given.input_ids.shape[1]) < counts.lengths[:, None]
    weights = torch.randn(*reads.shape, 32, generator=torch.Generator().manual_seed(1))
    with packer.packed(packed) if packed else nullcontext():
        states = model.base_model(input_ids=given.input_ids, attention_mask=given.mask).last_hidden_state
    model.requires_grad_(True).zero_grad()
    try:
        with packer.packed(packed) if packed else nullcontext():
            out = model.base_model(input_ids=given.input_ids, attention_mask=given.mask).last_hidden_state
            (out * weights)[reads].sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    finally:
        model.requires_grad_(False)
    return states[reads].detach(), gradients


@pytest.mark.parametrize("classes", [False, True], ids=["words", "classes"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta", "distilbert"])
def test_hidden_states_and_gradients_are_those_of_the_padded_batch(family: str, classes: bool) -> None:
    loaded = tiny(family, "none")
    given = batch([ids for ids, _ in LONG] if classes else LONG)
    packer = Packer.of(loaded)
    assert packer is not None
    assert packer.looks_back == (family in ("llama", "gpt2"))
    packed = Packing.of(given, OWNERS, packer.looks_back)
    assert len(packed.blocks) > 2
    states, gradients = hidden(loaded, given, packed)
    wanted, slopes = hidden(loaded, given, None)
    torch.testing.assert_close(states, wanted, rtol=0, atol=1e-5)
    assert gradients.keys() == slopes.keys()
    assert len(slopes) > 15
    for name, slope in slopes.items():
        # Next to the largest slope of the tensor, where that is large: sums over hundreds of tokens round more.
        bound = 1e-5 * max(1.0, float(slope.abs().max()))
        torch.testing.assert_close(gradients[name], slope, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_losses_are_those_of_the_padded_batch(family: str) -> None:
    """Of every row, those with nothing to predict, too."""
    loaded = tiny(family)
    given, packer = batch(LONG), Packer.of(loaded)
    assert packer is not None
    model = loaded.model
    task = TaskModel(model, model.base_model, model.lm_head)
    wanted = CausalLM().losses(task, given)
    with packer.packed(Packing.of(given, OWNERS, True)):
        got = CausalLM().losses(task, given)
    torch.testing.assert_close(got.total, wanted.total, rtol=1e-5, atol=1e-5)
    assert got.count.tolist() == wanted.count.tolist() == [2, 3, 3, 2, 0, 2, 0, 2, 1]
    assert got.total[[4, 6]].tolist() == [0, 0]


def test_shared_beginnings_are_computed_once() -> None:
    """What the layers of a block really get."""
    loaded = tiny("llama", "none")
    given, packer = batch(LONG), Packer.of(loaded)
    assert packer is not None
    seen: list[tuple[int, ...]] = []
    loaded.model.layers[1].mlp.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape)))
    # Of the rows of the first client count 69, 22, 22, 3 and 1 tokens, of which all but the first row's are shared.
    # Of the second client 5, 1, 43 - 3, of the third 33; the row of one token is shared.
    for rows, size in ((OWNERS, 69 + 5 + 40 + 33), ([1] * 9, 69 + 22 + 22 + 3 + 1 + 5 + 1 + 43 + 33)):
        packed = Packing.of(given, rows, True)
        with packer.packed(packed), torch.no_grad():
            loaded.model(input_ids=given.input_ids)
        assert packed.size == size
        assert seen.pop() == (1, size, 32)
    with torch.no_grad():
        loaded.model(input_ids=given.input_ids)
    assert seen.pop() == (9, 70, 32)


def test_a_client_alone_shares_only_among_its_own_rows() -> None:
    given = batch([[5, 6, 7]] * 4)
    assert Packing.of(given, [4], True).size == 3
    assert Packing.of(given, [2, 2], True).size == 6
    assert Packing.of(given, [2, 2], True).tokens == [0, 3, 6]


def repeated(people: People) -> People:
    """Every row twice, and clients that begin as they all do."""
    return People({c: {s: [*rows, *rows] for s, rows in splits.items()} for c, splits in people.data.items()})


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Notes of every packed forward how many tokens it computes, and of how many places."""
    seen: list[tuple[int, int]] = []
    inner = Packer.packed

    def packed(self: Packer, given: Packing, first: int = 0) -> Any:
        seen.append((given.size, len(given.lengths) * given.width))
        return inner(self, given, first)

    monkeypatch.setattr(Packer, "packed", packed)
    return seen


def answers(loaded: Loaded, people: People, task: Any, space: Any, packed: bool, **changes: Any) -> list[Any]:
    """What a sequential trainer makes of each client."""
    bench = Bench.of(loaded, space, 0)
    training = replace(FAST, per_device_train_batch_size=4, max_steps=3, optim="sgd", learning_rate=0.5, **changes)
    trainer = Trainer(
        loaded, bench.space, task, training, people, trunk=bench.trunk, packer=bench.packer if packed else None
    )
    assert not packed or trainer.packer is not None
    found: list[Any] = []
    for client in people.ids:
        own = start(trainer, client)
        found.append(trainer.answer(Fit(own), view(people, client)))
        found.append(trainer.answer(Loss(own, "test"), view(people, client)))
    bench.space.detach()
    return found


@pytest.mark.parametrize("case", ["llama", "gpt2", "trunk", "llama-classes", "bert-classes", "gpt2-classes"])
def test_a_trainer_with_packed_batches_answers_as_without(
    case: str, people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, _, classes = case.replace("trunk", "llama").partition("-")
    loaded = tiny(family, "sequence_classification" if classes else "causal_lm")
    task: Any = Classify() if classes else Chat()
    data = repeated(texts({"a": 5, "b": 3}) if classes else people)
    space = LoRA(r=2, layers_to_transform=(1,)) if case == "trunk" else LoRA(r=2)
    wanted = answers(loaded, data, task, space, packed=False)
    seen = spied(monkeypatch)
    got = answers(loaded, data, task, space, packed=True)
    assert len(seen) > 1
    assert all(size < places for size, places in seen[1:])
    for one, other in zip(got, wanted, strict=True):
        if hasattr(one, "tensors"):
            for name, tensor in other.tensors.items():
                torch.testing.assert_close(one.tensors[name], tensor, rtol=0, atol=1e-5)
            assert one.loss == pytest.approx(other.loss, abs=1e-5)
        else:
            torch.testing.assert_close(one.loss, other.loss, rtol=1e-5, atol=1e-4)


def test_packing_can_be_switched_off(federation: Any) -> None:
    from fedfm.methods.lora.fedit import FedIT

    on, off = (federation(FedIT(), training=replace(FAST, padding_free=free)) for free in (True, False))
    assert on.trainer.packer is not None
    assert off.trainer.packer is None


def extra(block: Any) -> None:
    """Have a block's attention handed a bias by distance, which not all kinds of attention understand."""

    def enter(module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        at = torch.arange(given["hidden_states"].shape[1])
        return args, {**given, "position_bias": -0.3 * (at - at[:, None]).abs().float()[None, None]}

    block.self_attn.register_forward_pre_hook(enter, with_kwargs=True)


def turned(block: Any) -> None:
    """Have a block depend on its neighbours in the batch."""
    block.mlp.register_forward_hook(lambda m, i, out: out + out.mean(dim=(0, 1)))


@pytest.mark.parametrize("case", ["window", "argument", "neighbours"])
def test_a_model_that_packing_changes_is_not_packed(case: str, people: People) -> None:
    loaded = tiny("mistral" if case == "window" else "llama")
    if case != "window":
        (extra if case == "argument" else turned)(loaded.model.model.layers[1])
    loaded.model.train()
    assert Packer.of(loaded) is None
    assert loaded.model.training
    assert untouched(loaded)
    if case == "neighbours":
        return  # what depends on its neighbours is not the same with others beside it
    pair = both(loaded, people)
    pair.many.packer = pair.one.packer = Bench(loaded, pair.one.space).packer
    asked = fits(pair, people)
    same(pair, [*asked, *((Loss(job.tensors, "test"), client) for job, client in asked)])
    assert pair.together == [("fit", 3), ("loss", 3)]


def test_a_window_wider_than_all_texts_is_not_packed_either() -> None:
    assert Packer.of(tiny("mistral", sliding_window=100)) is None
    assert Packer.of(tiny("mistral", sliding_window=None)) is not None
    # Nor where the model's attention is not told of it.
    loaded = tiny("llama")
    loaded.model.config.sliding_window = 100
    assert Packer.of(loaded) is None


def test_a_model_without_words_or_blocks_is_not_packed() -> None:
    loaded = tiny("llama")
    assert Packer.of(replace(loaded, tokenizer=None)) is None
    assert Packer.of(replace(loaded, architecture=replace(loaded.architecture, blocks=""))) is None


def untouched(loaded: Loaded) -> bool:
    """Whether a model's own attention and layers are in use, with no hook on a block, and no packing."""
    hooks: list[Mapping[int, Any]] = []
    for block in loaded.model.base_model.layers:
        hooks += [block._forward_pre_hooks, block._forward_hooks]
    usual = loaded.model.config._attn_implementation == "sdpa"
    own = any("forward" in vars(module) for module in loaded.model.modules())
    return usual and packing._now is None and not any(map(len, hooks)) and not own


def test_nothing_is_left_behind_after_an_error() -> None:
    loaded = tiny("llama", "none")
    packer, given = Packer.of(loaded), batch(HAND)
    assert packer is not None
    packed = Packing.of(given, [2, 3], True)
    wanted = loaded.model(input_ids=given.input_ids).last_hidden_state
    with pytest.raises(ZeroDivisionError), packer.packed(packed):  # noqa: PT012
        assert not untouched(loaded)
        with packer.packed(packed):
            pass
        assert packing._now is packed
        1 / 0  # noqa: B018
    assert untouched(loaded)

    def broken(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = loaded.model.layers[1].mlp.register_forward_pre_hook(broken)
    with pytest.raises(KeyboardInterrupt), packer.packed(packed):
        loaded.model(input_ids=given.input_ids)
    handle.remove()
    assert untouched(loaded)
    assert torch.equal(loaded.model(input_ids=given.input_ids).last_hidden_state, wanted)


def test_attention_outside_a_packed_batch_is_refused() -> None:
    q = torch.zeros(1, 2, 7, 4)
    with pytest.raises(ValueError, match="tokens that are not in it"):
        packing.attention(torch.nn.Module(), q, q, q, None)
    loaded = tiny("llama", "none")
    packer = Packer.of(loaded)
    assert packer is not None
    with packer.packed(Packing.of(batch(HAND), [2, 3], True)):
        assert packing.attention(torch.nn.Module(), q, q, q, None)[0].shape == (1, 7, 2, 4)
        with pytest.raises(ValueError, match="packed batch with s_aux"):
            packing.attention(torch.nn.Module(), q, q, q, None, s_aux=q)
        with pytest.raises(ValueError, match="tokens that are not in it"):
            packing.attention(torch.nn.Module(), q[:, :, :6], q, q, None)


def test_rows_that_layers_tell_apart_are_not_packed(llama: Loaded) -> None:
    people = People({"a": {"train": [dialogue("ab", "cd")] * 3, "test": []}})
    bench = Bench.of(llama, LoRA(r=2), 0)
    trainer = Trainer(llama, bench.space, Chat(), FAST, people, packer=bench.packer)
    given = batch(HAND)
    assert trainer._packing(given, [2, 3], None) is not None
    with bench.space.gated(torch.ones(5, 2)):
        assert trainer._packing(given, [2, 3], None) is None
    assert trainer._packing(given.part(slice(0, 1)), None, None) is None
