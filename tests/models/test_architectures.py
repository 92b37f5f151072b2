"""Every row of the table against a tiny model of that family, as the installed transformers builds it."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fedfm.errors import ModelError
from fedfm.models import architecture
from fedfm.models.architectures import TABLE, head_split

PLAIN = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PICTURE = {k: PLAIN[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")} | {
    "image_size": 8,
    "patch_size": 4,
}
MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("Llama", PLAIN, ("ForCausalLM", "ForSequenceClassification")),
    "mistral": ("Mistral", PLAIN | {"num_key_value_heads": 2}, ("ForCausalLM", "ForSequenceClassification")),
    "qwen2": ("Qwen2", PLAIN | {"num_key_value_heads": 2}, ("ForCausalLM", "ForSequenceClassification")),
    "qwen3": ("Qwen3", PLAIN | {"num_key_value_heads": 2, "head_dim": 8}, ("ForCausalLM",)),
    "gemma": ("Gemma", PLAIN | {"num_key_value_heads": 2, "head_dim": 8}, ("ForCausalLM",)),
    "gemma2": ("Gemma2", PLAIN | {"num_key_value_heads": 2, "head_dim": 8}, ("ForCausalLM",)),
    "phi3": ("Phi3", PLAIN, ("ForCausalLM",)),
    "gpt2": (
        "GPT2",
        {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4},
        ("LMHeadModel", "ForSequenceClassification"),
    ),
    "bert": ("Bert", PLAIN, ("ForSequenceClassification", "ForMaskedLM")),
    "roberta": ("Roberta", PLAIN, ("ForSequenceClassification", "ForMaskedLM")),
    "xlm-roberta": ("XLMRoberta", PLAIN, ("ForSequenceClassification",)),
    "distilbert": (
        "DistilBert",
        {"vocab_size": 99, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
        ("ForSequenceClassification", "ForMaskedLM"),
    ),
    "t5": (
        "T5",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        ("ForConditionalGeneration",),
    ),
    "vit": ("ViT", PICTURE, ("ForImageClassification",)),
    "clip": ("CLIP", {"text_config": PLAIN, "vision_config": PICTURE}, ("Model",)),
    "whisper": (
        "Whisper",
        {
            "vocab_size": 99,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        ("ForConditionalGeneration",),
    ),
}
CASES = [(family, suffix) for family, (_, _, suffixes) in MODELS.items() for suffix in suffixes]


def build(family: str, suffix: str) -> nn.Module:
    stem, settings, _ = MODELS[family]
    return getattr(transformers, stem + suffix)(getattr(transformers, f"{stem}Config")(**settings)).eval()


def test_every_family_is_tried() -> None:
    assert set(MODELS) == set(TABLE)


@pytest.mark.parametrize(("family", "suffix"), CASES)
def test_paths_exist_and_targets_are_linear(family: str, suffix: str) -> None:
    model = build(family, suffix)
    found = architecture(model)
    assert found.family == family
    blocks = attrgetter(found.blocks)(model)
    assert isinstance(blocks, nn.ModuleList)
    assert len(blocks) == 2
    assert isinstance(attrgetter(found.embeddings)(model), (nn.Embedding, nn.Conv2d))
    assert all(hasattr(model, head) for head in found.heads)
    for target in found.target_modules:
        hits = [m for n, m in blocks.named_modules() if n.rpartition(".")[2] == target]
        assert len(hits) >= 2, target
        assert {type(m).__name__ for m in hits} <= {"Linear", "Conv1D"}


def test_an_unknown_family_is_worked_out() -> None:
    model = build("mistral", "ForCausalLM")
    model.config.model_type = "brand-new"
    found = architecture(model)
    assert (found.blocks, found.target_modules) == ("model.layers", ("q_proj", "v_proj"))
    assert found.heads == ("lm_head",)


def test_a_model_without_attention_has_no_usual_layers() -> None:
    """State-space blocks have an in_proj too, but it is no attention projection."""

    class Plain(nn.Module):
        config = type("Config", (), {"model_type": "brand-new"})()

        def __init__(self) -> None:
            super().__init__()
            blocks = [nn.ModuleDict({"in_proj": nn.Linear(2, 2), "out": nn.Linear(2, 2)}) for _ in range(3)]
            self.stack = nn.ModuleList(blocks)

    found = architecture(Plain())
    assert found.blocks == ""
    with pytest.raises(ModelError, match=r"architecture Plain .*space\.target_modules.* layers are in_proj, out\."):
        _ = found.target_modules


def test_half_of_a_known_family_is_worked_out() -> None:
    """Whisper for audio classification has no decoder, where the table looks."""
    found = architecture(build("whisper", "ForAudioClassification"))
    assert (found.family, found.blocks) == ("whisper", "encoder.layers")
    assert set(found.target_modules) == {"q_proj", "v_proj"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_head_of_body_is_the_logits(family: str) -> None:
    model = build(family, MODELS[family][2][0])
    split = head_split(model)
    assert split is not None
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        hidden = attrgetter(split.body)(model)(input_ids=ids).last_hidden_state
        assert torch.equal(attrgetter(split.head)(model)(hidden), model(ids).logits)


def test_capped_logits_have_no_split() -> None:
    """Gemma 2 squeezes its logits through tanh; with weights as small as these the difference is in the last digits."""
    model = build("gemma2", "ForCausalLM")
    model.get_output_embeddings().weight.data.mul_(100)
    assert head_split(model) is None
