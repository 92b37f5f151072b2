"""Tiny real models, built here: no hub, no embedded package, nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from fedfm.core.method import Method
from fedfm.core.plan import Training
from fedfm.core.update import Member
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.models import Loaded, load
from fedfm.spaces import LoRA
from fedfm.tasks import Chat

torch.set_num_threads(1)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes with the special tokens of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<|im_start|>": 1, "<|im_end|>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=template,
    )


@pytest.fixture(scope="session", autouse=True)
def float32() -> Iterator[None]:
    """The same numbers on every machine: left alone, a processor that multiplies in bfloat16 would do so.

    Processes that a test starts are to be told by ``training.bf16``.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedfm.train.passes.bf16_in_hardware", lambda device: False)
        yield


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-block Llama with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-block BERT with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = byte_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        num_labels=3,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def masked_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-block BERT with a masked-language-model head and a byte tokenizer that has a mask."""
    folder = tmp_path_factory.mktemp("masked")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def whisper_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper of one block on either side that hears a second in ten steps, with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("whisper")
    special = [
        "<|endoftext|>",
        "<|startoftranscript|>",
        "<|en|>",
        "<|translate|>",
        "<|transcribe|>",
        "<|notimestamps|>",
    ]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[], additional_special_tokens=special[1:])
    config = WhisperConfig(
        vocab_size=len(vocab),
        num_mel_bins=4,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=5,
        max_target_positions=64,
        init_std=0.3,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
    )
    torch.manual_seed(0)
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=4, hop_length=1600, chunk_length=1).save_pretrained(folder)
    return folder


def tone(pitch: float, seconds: float = 0.2, rate: int = 4000) -> dict[str, Any]:
    """A sound in memory."""
    times = torch.arange(round(seconds * rate)) / rate
    return {"array": (0.3 * torch.sin(2 * torch.pi * pitch * times)).tolist(), "sampling_rate": rate}


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-block ViT for images of 8 x 8, with a head for two classes."""
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of two blocks in each tower for images of 8 x 8, with a tokenizer of bytes that ends each text."""
    folder = tmp_path_factory.mktemp("clip")
    # As in CLIP, the token at the end is the one with the highest number.
    vocab = {c: i for i, c in enumerate(["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", vocab["<end>"])])
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(vocab),
            "max_position_embeddings": 40,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": vocab["<end>"],
        },
        vision_config={**tower, "image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    size = {"height": 8, "width": 8}
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=size).save_pretrained(folder)
    return folder


def picture(shade: int, size: int = 8) -> Image.Image:
    """A grey image whose upper half is of this shade, 0 to 255."""
    image = Image.new("L", (size, size))
    image.paste(shade, (0, 0, size, size // 2))
    return image


@pytest.fixture
def llama(llama_folder: Path) -> Loaded:
    """The tiny Llama, loaded."""
    return load(str(llama_folder), head="causal_lm")


@dataclass(frozen=True)
class People:
    """Members with rows in memory: the smallest thing a federation accepts."""

    data: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]

    @property
    def ids(self) -> list[str]:
        return list(self.data)

    def member(self, id: str) -> Member:
        return Member(id, len(self.data[id]["train"]))

    def rows(self, id: str, split: str) -> Sequence[Mapping[str, Any]]:
        return self.data[id][split]

    def pooled(self) -> People:
        everyone: dict[str, list[Mapping[str, Any]]] = {"train": [], "validation": [], "test": []}
        for client in sorted(self.data):
            for split, rows in self.data[client].items():
                everyone[split] += rows
        return People({"all": everyone})

    def only(self, *ids: str) -> People:
        return People({i: self.data[i] for i in ids})


def dialogue(question: str, answer: str) -> dict[str, Any]:
    """A row of the chat task."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def people() -> People:
    """Three clients of unequal size, each with its own habit."""

    def rows(habit: str, n: int) -> list[dict[str, Any]]:
        return [dialogue(f"{habit} {i}?", f"{habit * (1 + i % 3)}!") for i in range(n)]

    return People(
        {
            name: {"train": rows(habit, n), "validation": rows(habit, 2), "test": rows(habit, 3)}
            for name, habit, n in (("ann", "ha", 6), ("bob", "no", 3), ("cid", "mm", 4))
        }
    )


FAST = Training(max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2)


@pytest.fixture
def federation(llama_folder: Path, people: People) -> Callable[..., Federation]:
    """Makes a small federation of the tiny Llama; every call loads a fresh model."""

    def make(method: Method, **changes: Any) -> Federation:
        settings: dict[str, Any] = {
            "members": people,
            "task": Chat(),
            "space": LoRA(r=2, lora_alpha=4),
            "training": FAST,
            "rounds": 2,
            "evaluation": Evaluation(every=1),
            **changes,
        }
        return Federation(str(llama_folder), method, settings.pop("members"), settings.pop("task"), **settings)

    return make
