"""A soft prompt in a model, seen from tasks, heads, generation and peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForSequenceClassification

from fedfm import parts
from fedfm.core import trees
from fedfm.core.client import View
from fedfm.core.jobs import Fit, Loss
from fedfm.core.update import Member
from fedfm.errors import ModelError, RecipeError
from fedfm.federation import Federation
from fedfm.models import Loaded, load
from fedfm.spaces import Attached, Prompt
from fedfm.tasks import Chat, Classify
from fedfm.train.bench import Bench
from fedfm.train.trainer import Trainer
from tests.conftest import FAST, People, byte_tokenizer

IDS = torch.tensor([[5, 9, 40, 17, 33], [8, 7, 60, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.fixture
def bert(bert_folder: Path) -> Loaded:
    """The tiny BERT with a head for three classes."""
    return load(str(bert_folder), head="sequence_classification", num_labels=3)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS, mask: torch.Tensor | None = MASK) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=mask).logits


def trained(space: Attached) -> dict[str, torch.Tensor]:
    """Values that no other tensor has."""
    draw = torch.Generator().manual_seed(1)
    return {n: torch.randn(t.shape, generator=draw) * 0.3 for n, t in space.initial.items()}


def chat_rows(n: int) -> list[dict[str, Any]]:
    from tests.conftest import dialogue

    return [dialogue(f"{i}?", f"{i * 7}!") for i in range(n)]


def trainer(loaded: Loaded, space: Attached, task: Any, rows: list[dict[str, Any]]) -> Trainer:
    people = People({"ann": {"train": rows, "validation": rows, "test": rows}})
    return Trainer(loaded, space, task, FAST, people)


def test_a_prompt_of_token_embeddings_is_the_same_as_these_tokens(llama: Loaded) -> None:
    words = torch.tensor([11, 90, 3])
    text = torch.cat((words.expand(2, -1), IDS), dim=1)
    wanted = logits(llama.model, text, torch.cat((torch.ones(2, 3).long(), MASK), dim=1))[:, 3:]
    space = Prompt(3).attach(llama, 0)
    space.load({"prompt_embeddings": llama.model.model.embed_tokens(words)})
    got = logits(llama.model)
    assert got.shape == (2, 5, llama.model.config.vocab_size)  # the prompt's positions are not seen
    torch.testing.assert_close(got[MASK.bool()], wanted[MASK.bool()])
    torch.testing.assert_close(logits(llama.model, mask=None)[0], wanted[0])
    # The body alone, as next-token tasks run it.
    with torch.no_grad():
        hidden = llama.model.model(input_ids=IDS, output_hidden_states=True)
    assert [h.shape for h in hidden.hidden_states] == [(2, 5, 32)] * 3
    torch.testing.assert_close(llama.model.lm_head(hidden.last_hidden_state)[0], wanted[0])


def test_the_prompt_stands_after_the_first_token_of_an_encoder(bert: Loaded) -> None:
    words = torch.tensor([11, 90])
    text = torch.cat((IDS[:, :1], words.expand(2, -1), IDS[:, 1:]), dim=1)
    wanted = logits(bert.model, text, torch.cat((torch.ones(2, 2).long(), MASK), dim=1))
    space = Prompt(2).attach(bert, 0)
    space.load({"prompt_embeddings": bert.model.bert.embeddings.word_embeddings(words)})
    torch.testing.assert_close(logits(bert.model), wanted)
    with torch.no_grad():
        typed = bert.model(input_ids=IDS, attention_mask=MASK, token_type_ids=torch.zeros_like(IDS)).logits
        placed = bert.model(input_ids=IDS, attention_mask=MASK, position_ids=torch.arange(5)[None]).logits
        hidden = bert.model.bert(input_ids=IDS, attention_mask=MASK).last_hidden_state
        bare = torch.cat([bert.model.bert(input_ids=one[None]).last_hidden_state for one in IDS[:1]])
    torch.testing.assert_close(typed, wanted)
    torch.testing.assert_close(placed, wanted)
    assert hidden.shape == (2, 5, 32)
    torch.testing.assert_close(hidden[:1], bare)


def test_it_starts_as_embeddings_of_tokens_drawn_by_the_seed(llama: Loaded) -> None:
    table = llama.model.model.embed_tokens.weight.detach().clone()
    starts = []
    for seed in (0, 0, 1):
        space = Prompt(6).attach(llama, seed)
        assert list(space.initial) == ["prompt_embeddings"]
        starts.append(space.initial["prompt_embeddings"])
        space.detach()
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    rows = [(table == row).all(1).any() for row in starts[0]]
    assert len(rows) == 6
    assert all(rows)


def test_the_model_is_as_before_when_it_is_detached(llama: Loaded) -> None:
    before, names = logits(llama.model), [n for n, _ in llama.model.named_parameters()]
    space = Prompt(4).attach(llama, 0)
    space.load(trained(space))
    assert not torch.equal(logits(llama.model), before)
    space.detach()
    assert torch.equal(logits(llama.model), before)
    assert [n for n, _ in llama.model.named_parameters()] == names


def test_peft_loads_what_is_saved_and_computes_the_same(llama: Loaded, llama_folder: Path, tmp_path: Path) -> None:
    space = Prompt(4).attach(llama, 0)
    values = trained(space)
    space.save(values, tmp_path)
    got = logits(llama.model)
    loaded = PeftModel.from_pretrained(load(str(llama_folder)).model, str(tmp_path)).eval()
    wanted = logits(loaded)[:, 4:]
    torch.testing.assert_close(got[MASK.bool()], wanted[MASK.bool()])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"
    assert (tmp_path / "tokenizer.json").exists()


def test_peft_loads_a_prompt_and_head_for_classes_of_a_causal_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    loaded = load(str(tmp_path / "base"), head="sequence_classification", num_labels=3)
    space = Prompt(4).attach(loaded, 0)
    assert list(space.parameters) == ["prompt_embeddings", "base_model.score.weight"]
    space.save(trained(space), tmp_path / "saved")
    got = logits(loaded.model)
    base = load(str(tmp_path / "base"), head="sequence_classification", num_labels=3).model
    peft = PeftModel.from_pretrained(base, str(tmp_path / "saved")).eval()
    torch.testing.assert_close(got[:1], logits(peft, IDS[:1], MASK[:1]))  # peft does not look for padding here


def test_an_encoder_is_saved_in_another_way_as_peft_would_compute_something_else(bert: Loaded, tmp_path: Path) -> None:
    space = Prompt(2).attach(bert, 0)
    values = trained(space)
    assert list(values) == ["prompt_embeddings", "base_model.classifier.weight", "base_model.classifier.bias"]
    space.save(values, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    about = json.loads((tmp_path / "prompt_config.json").read_text())
    assert (about["num_virtual_tokens"], about["after_token"]) == (2, 1)
    stored = load_file(tmp_path / "prompt_model.safetensors")
    assert all(torch.equal(stored[n], t) for n, t in values.items())


@pytest.mark.parametrize("use_cache", [True, False])
def test_generated_text_follows_from_the_prompt(llama: Loaded, use_cache: bool) -> None:
    space = Prompt(3).attach(llama, 0)
    space.load({"prompt_embeddings": trained(space)["prompt_embeddings"] * 10})
    ids = IDS[:1]
    for _ in range(6):  # greedy, the whole text anew for each token
        ids = torch.cat((ids, logits(llama.model, ids, torch.ones_like(ids))[:, -1:].argmax(-1)), dim=1)
    got = llama.model.generate(
        IDS[:1], attention_mask=MASK[:1], max_new_tokens=6, do_sample=False, use_cache=use_cache, eos_token_id=None
    )
    assert torch.equal(got, ids)
    space.load({})
    other = llama.model.generate(
        IDS[:1], attention_mask=MASK[:1], max_new_tokens=6, do_sample=False, use_cache=use_cache, eos_token_id=None
    )
    assert not torch.equal(other, ids)


def test_a_model_with_learnt_positions() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=100, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    from fedfm.models.architectures import architecture

    loaded = Loaded(model, byte_tokenizer(), "gpt2", "", architecture(model), "causal_lm")
    words = torch.tensor([11, 90, 3])
    wanted = logits(model, torch.cat((words, IDS[0]))[None], None)[:, 3:]
    space = Prompt(3).attach(loaded, 0)
    space.load({"prompt_embeddings": model.transformer.wte(words)})
    torch.testing.assert_close(logits(model, IDS[:1], None), wanted)
    places = torch.arange(5)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS[:1], position_ids=places).logits, wanted)


def test_only_the_prompt_is_trained_and_the_backbone_stays(llama: Loaded) -> None:
    before = trees.clone(dict(llama.model.named_parameters()))
    bench = Bench.of(llama, Prompt(4), 0)
    assert bench.trunk is None  # the lowest block sees the prompt
    fitted = trainer(llama, bench.space, Chat(), chat_rows(4)).answer(Fit({}), View(Member("ann", 4), 1))
    assert not torch.equal(fitted.tensors["prompt_embeddings"], bench.space.initial["prompt_embeddings"])
    bench.space.detach()
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in llama.model.named_parameters())


def test_padding_of_a_batch_changes_nothing(llama: Loaded, bert: Loaded) -> None:
    view = View(Member("ann", 6), 1)
    texts = [{"text": "abcdefgh"[: i + 1] * (i + 1), "label": i % 3} for i in range(6)]
    for loaded, task, rows in ((llama, Chat(), chat_rows(6)), (bert, Classify(), texts)):
        space = Prompt(4).attach(loaded, 0)
        tensors = {"prompt_embeddings": trained(space)["prompt_embeddings"]}
        together = trainer(loaded, space, task, rows).answer(Loss(tensors), view).loss
        alone = [trainer(loaded, space, task, [row]).answer(Loss(tensors), view).loss for row in rows]
        torch.testing.assert_close(together, torch.cat(alone))
        space.detach()


def test_a_federation_runs_with_it(federation: Any, tmp_path: Path) -> None:
    from fedfm.methods.fedavg import FedAvg

    made: Federation = federation(FedAvg(), space=Prompt(5))
    outcome = made.run(tmp_path / "run")
    # 5 vectors of 32 numbers of 4 bytes, whatever the depth of the model.
    assert trees.nbytes(outcome.state.weights) == 5 * 32 * 4
    assert outcome.records[-1]["train_loss"] < outcome.records[1]["train_loss"]
    assert (tmp_path / "run/final/adapter_model.safetensors").exists()


def test_models_that_do_not_read_tokens_are_refused(llama: Loaded) -> None:
    from dataclasses import replace

    with pytest.raises(ModelError, match="a soft prompt is for models that read one sequence of tokens"):
        Prompt().attach(replace(llama, tokenizer=None), 0)


def test_settings() -> None:
    assert parts.make("spaces", {"kind": "prompt", "num_virtual_tokens": 20}, "space") == Prompt(20)
    with pytest.raises(RecipeError, match=r"space\.num_virtual_tokens must be at least 1, but is 0"):
        Prompt(0)
