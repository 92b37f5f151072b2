"""Where claims are tried: clients with real text, a real model, a budget; small enough for one processor core.

A scenario is made for one seed, which decides the rows, who has them, the new weights and every draw of the run.
"""

from __future__ import annotations

import csv
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from benchmarks.fidelity import pretrained_speech, pretrained_vision
from fedfm.core import seeds
from fedfm.core.plan import Members
from fedfm.core.update import Member
from fedfm.data import Chatterbot, Dirichlet, Iid, Natural, Partition, Pathological, Splits, federate, from_rows
from fedfm.errors import ModelError
from fedfm.models import load
from fedfm.models.embedded import EMBEDDED
from fedfm.tasks import MaskedLM
from fedfm.tasks.task import IGNORE, collate

DATA = Path(__file__).parents[3] / "shared" / "data"
"""Files too large or not ours to ship; where they are absent, data of an installed package stand in."""

MINILM = "all-minilm-l6-v2"
SMOLLM = "smollm2-135m-instruct"
HELD_OUT = Splits(validation=0.1, test=0.35)
LIAR = "liar"
"""Beginning of the names of clients whose labels are wrong; they are not scored."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Corpus:
    """Labelled text.

    Args:
        rows: with ``text`` and ``label``, a number from 0.
        about: what it is, for the reader of a result.
    """

    rows: Rows
    about: str

    @property
    def classes(self) -> int:
        """Number of classes."""
        return 1 + max(row["label"] for row in self.rows)

    def some(self, count: int, seed: int) -> Rows:
        """Rows drawn by the seed, without repetition."""
        order = seeds.numpy_generator(seed, "fidelity", "rows").permutation(len(self.rows))
        return [self.rows[i] for i in order[:count]]


@cache
def headlines() -> Corpus:
    """Headlines of AG News in four classes."""
    if not (place := DATA / "ag_news.csv").exists():
        return topics()
    with place.open(newline="", encoding="utf-8") as file:
        rows = [{"text": title, "label": int(number) - 1} for number, title, _ in csv.reader(file)]
    return Corpus(rows, "AG News headlines, 4 classes")


@cache
def questions(intents: int = 12) -> Corpus:
    """Questions of bank customers; the intents with most rows."""
    if not (place := DATA / "banking77_train.csv").exists():
        return topics()
    with place.open(newline="", encoding="utf-8") as file:
        found = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    names = [intent for _, intent in found]
    most = sorted(set(names), key=lambda n: (-names.count(n), n))[:intents]
    rows = [{"text": text, "label": most.index(intent)} for text, intent in found if intent in most]
    return Corpus(rows, f"Banking77 questions, {intents} intents")


@cache
def topics() -> Corpus:
    """The stand-in: questions of the package chatterbot-corpus, by topic."""
    names = ("trivia", "emotion", "ai", "coding", "psychology")
    dialogues = Chatterbot(topics=names).load()
    # A question may come with several answers; as text to classify it is one row.
    labels = {d["messages"][0]["content"]: names.index(d["topic"]) for d in dialogues}
    rows = [{"text": text, "label": label} for text, label in labels.items()]
    return Corpus(rows, "chatterbot questions in 5 topics, in place of the data in ../shared, which is absent")


def dealt(
    corpus: Callable[[], Corpus], partition: Partition, count: int, public: int = 64
) -> Callable[[int], dict[str, Any]]:
    """Rows dealt to clients; some more that everybody has."""

    def make(seed: int) -> dict[str, Any]:
        rows = corpus().some(count + public, seed)
        own = Dataset.from_list(rows[: -public or None])
        return {"members": federate(own, partition, HELD_OUT, seed), "public": rows[len(own) :], **classes(corpus())}

    return make


def classes(corpus: Corpus) -> dict[str, Any]:
    """How a model for this corpus is loaded."""
    return {"model": minilm(), "load": {"num_labels": corpus.classes}}


def lied(clients: int = 10, liars: int = 3, each: int = 48, public: int = 64) -> Callable[[int], dict[str, Any]]:
    """Rows dealt by chance; some clients give every training row the label of the next class."""

    def make(seed: int) -> dict[str, Any]:
        corpus = headlines()
        rows = corpus.some(clients * each + public, seed)
        parts = {f"client-{i:02}": rows[i * each : (i + 1) * each] for i in range(clients)}
        for name in list(parts)[clients - liars :]:
            wrong = [{**r, "label": (r["label"] + 1) % corpus.classes} for r in parts.pop(name)]
            parts[name.replace("client", LIAR)] = wrong
        members = from_rows(parts, HELD_OUT, seed)
        return {"members": members, "public": rows[clients * each :], **classes(corpus)}

    return make


def dialogues(seed: int) -> dict[str, Any]:
    """Dialogues of the package chatterbot-corpus; each client has a topic."""
    chosen = Chatterbot(topics=("ai", "emotion", "psychology"))
    return {"members": federate(chosen, Natural("topic"), HELD_OUT, seed, max_examples=12)}


def tasks(seed: int) -> dict[str, Any]:
    """Headlines and two sets of questions, each with classes of its own; each client has two of the three tasks."""
    news, bank, each = headlines(), questions(), 30
    first, half = news.classes, bank.classes // 2
    asked = [{**row, "label": first + row["label"]} for row in bank.some(len(bank.rows), seed)]
    of = {
        "news": news.some(6 * each, seed),
        "bank": [row for row in asked if row["label"] < first + half],
        "more": [row for row in asked if row["label"] >= first + half],
    }
    stocks = {name: iter([{**row, "task": name} for row in rows]) for name, rows in of.items()}
    pairs = list(combinations(of, 2)) * 3
    clients = {f"client-{i}": [next(stocks[t]) for t in pair for _ in range(each)] for i, pair in enumerate(pairs)}
    return {
        "members": from_rows(clients, HELD_OUT, seed),
        "model": minilm(),
        "load": {"num_labels": first + bank.classes},
    }


LANGUAGES = ("french", "italian", "portuguese", "spanish", "dutch", "english", "german", "russian", "ukrainian")


def languages(seed: int) -> dict[str, Any]:
    """Dialogues of the package chatterbot-corpus; each client has a language, and there are three families."""
    return {"members": federate(Chatterbot(LANGUAGES), Natural("language"), HELD_OUT, seed, max_examples=16)}


@dataclass(frozen=True)
class Elsewhere:
    """Clients whose test rows are of another kind than what anybody trains on.

    Args:
        training: the rows of each client.
        test: and those on which its model is scored.
    """

    training: Mapping[str, Rows]
    test: Mapping[str, Rows]

    @property
    def ids(self) -> list[str]:
        """Names of the clients."""
        return list(self.training)

    def member(self, id: str) -> Member:
        """The member called ``id``."""
        return Member(id, len(self.training[id]))

    def rows(self, id: str, split: str) -> Rows:
        """The rows of a split; there are none to validate on."""
        return {"train": self.training, "test": self.test}.get(split, {}).get(id, [])

    def pooled(self) -> Elsewhere:
        """All clients in one."""
        both = ({"all": [row for own in rows.values() for row in own]} for rows in (self.training, self.test))
        return Elsewhere(*both)


KNOWN = ("trivia", "emotion", "ai", "coding", "psychology", "literature")
UNSEEN = ("humor", "money", "science", "movies", "sports", "food", "politics")


def unseen(seed: int, each: int = 24, asked: int = 8) -> dict[str, Any]:
    """Dialogues of the package chatterbot-corpus; each client has a topic and is scored on topics that nobody has."""
    rows = list(Chatterbot(topics=(*KNOWN, *UNSEEN)).load())
    rows = [rows[i] for i in seeds.numpy_generator(seed, "fidelity", "unseen").permutation(len(rows))]
    training = {topic: [row for row in rows if row["topic"] == topic][:each] for topic in KNOWN}
    others = iter(row for row in rows if row["topic"] in UNSEEN)
    test = {topic: [next(others) for _ in range(asked)] for topic in KNOWN}
    return {"members": Elsewhere(training, test)}


def untaught(seed: int) -> dict[str, Any]:
    """Headlines dealt with skewed labels, and a small BERT that knows nothing yet."""
    split = Dirichlet(8, 0.3, min_partition_size=20)
    return {**dealt(headlines, split, 4000, public=0)(seed), "model": fresh_classifier(headlines().classes)}


def digits(seed: int) -> dict[str, Any]:
    """Digits that the small CLIP never saw; each client has 16 training images of each of two classes, or few more."""
    names = [str(digit) for digit in range(10)]
    people = federate(pretrained_vision.unseen(), Pathological(10, 2), HELD_OUT, seed, max_examples=58)
    return {"members": people, "model": digit_clip(), "load": {"label_names": tuple(names)}}


@cache
def digit_clip() -> str:
    """Folder of the small CLIP; trained once for each version of its script."""
    code = Path(pretrained_vision.__file__).read_bytes()
    folder = Path(__file__).parent / "results" / ".runs" / f"clip-{hashlib.sha256(code).hexdigest()[:16]}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as made:
            folder.parent.mkdir(exist_ok=True)
            pretrained_vision.clip(Path(made) / "clip").rename(folder)
    return str(folder)


def texts(seed: int) -> dict[str, Any]:
    """Headlines without labels, and a small BERT that knows nothing yet."""
    rows = headlines().some(480, seed)
    members: Members = federate(Dataset.from_list(rows), Dirichlet(4, 0.5, min_partition_size=20), HELD_OUT, seed)
    return {"members": members, "model": fresh_bert()}


def speakers(seed: int) -> dict[str, Any]:
    """Spoken digits; each client is a speaker, and of three of the six the model has heard others' takes before."""
    rows = Dataset.from_list([dict(row) for row in pretrained_speech.listed(DATA / "fsdd")])
    return {"members": federate(rows, Natural("speaker"), HELD_OUT, seed, max_examples=120), "model": listener()}


@cache
def listener() -> str:
    """Folder of a small Whisper, trained on other takes of three speakers when it is first needed."""
    about = hashlib.sha256(Path(pretrained_speech.__file__).read_bytes()).hexdigest()[:16]
    folder = Path(__file__).parent / "results" / ".runs" / f"listener-{about}"
    if not (done := folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        pretrained_speech.pretrained(folder, DATA / "fsdd")
        done.touch()
    return str(folder)


@cache
def minilm() -> str:
    """Folder of MiniLM without dropout, so that its frozen blocks are run once for each row."""
    found = EMBEDDED[MINILM].local()
    if found is None:
        raise ModelError(f"{MINILM} comes from the package {EMBEDDED[MINILM].package}, which is not installed.")
    folder = Path(tempfile.mkdtemp(prefix="fedfm-minilm-"))
    for file in found.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((found / "config.json").read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config | still))
    return str(folder)


@cache
def fresh_bert() -> str:
    """Folder of a BERT of 4 blocks and width 128 with random weights and MiniLM's vocabulary."""
    folder = tempfile.mkdtemp(prefix="fedfm-bert-")
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def fresh_classifier(classes: int) -> str:
    """Folder of a BERT of 2 blocks and width 128 that classifies, with random weights, no dropout and MiniLM's
    vocabulary."""
    folder = tempfile.mkdtemp(prefix="fedfm-classifier-")
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def masked_minilm() -> str:
    """Folder of MiniLM with a head for masked words, which it comes without: fitted to 2,000 headlines without labels,
    while the encoder stays as it is."""
    folder = tempfile.mkdtemp(prefix="fedfm-masked-minilm-")
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    encoder = BertModel.from_pretrained(minilm(), add_pooling_layer=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForMaskedLM(encoder.config)
        model.bert.load_state_dict(encoder.state_dict())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        loaded = load(folder, head="masked_lm")
        model = loaded.model
        examples = MaskedLM(max_length=24, mlm_probability=0.3).encode(headlines().some(2000, 0), loaded)
        examples.sort(key=len)
        states, words = [], []
        with torch.no_grad():
            for at in range(0, len(examples), 64):
                batch = collate(examples[at : at + 64], tokenizer.pad_token_id)
                hidden = model.bert(input_ids=batch.input_ids, attention_mask=batch.mask).last_hidden_state
                states.append(hidden[batch.target != IGNORE])
                words.append(batch.target[batch.target != IGNORE])
        fit_head(model.cls.predictions, torch.cat(states), torch.cat(words))
    model.save_pretrained(folder)
    return folder


def fit_head(head: Any, states: torch.Tensor, words: torch.Tensor, passes: int = 6) -> None:
    """Train the transformation and the biases of a head for masked words, not the words' embeddings.

    Args:
        head: of a BERT.
        states: what enters it, ``[S, D]``.
        words: what should come out, ``[S]``; the scores of other words are not looked at.
        passes: over them.
    """
    known, wanted = words.unique(return_inverse=True)
    embedded = head.decoder.weight.detach()[known]
    with torch.no_grad():
        head.bias.fill_(-8.0)  # Words that never came are unlikely.
    trained = [p.requires_grad_() for p in (*head.transform.parameters(), head.bias)]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    for _ in range(passes):
        for few in torch.randperm(len(states)).split(256):
            scores = head.transform(states[few]) @ embedded.T + head.bias[known]
            torch.nn.functional.cross_entropy(scores, wanted[few]).backward()
            optimizer.step()
            optimizer.zero_grad()


@dataclass(frozen=True)
class Scenario:
    """A place where a claim is tried.

    Args:
        about: clients and split in words; the corpus is named before it.
        make: members, public rows and how the model is loaded, for a seed.
        settings: arguments of ``Federation`` in the spelling of recipes.
        model: its name; ``make`` may give a folder where it lies.
        corpus: whose rows they are, if it depends on what is installed.
    """

    about: str
    make: Callable[[int], Mapping[str, Any]]
    settings: Mapping[str, Any]
    model: str = MINILM
    corpus: Callable[[], Corpus] | None = None

    def describe(self) -> str:
        """Data, clients and model in one sentence."""
        return ", ".join([*([self.corpus().about] if self.corpus else []), self.about, self.model])


ADAMW = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 2e-3}
SGD = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
UPPER = {"kind": "lora", "r": 4, "lora_alpha": 16, "layers_to_transform": [5]}
STEEP = {**UPPER, "lora_alpha": 64}
"""For SGD, which has one learning rate for the factors and the much steeper head."""
HEADLINES: dict[str, Any] = {
    "task": {"kind": "classify", "max_length": 24},
    "space": UPPER,
    "training": ADAMW,
    "rounds": 30,
    "sampler": {"kind": "uniform", "count": 4},
}
EVERYONE = {"kind": "uniform", "fraction": 1.0}
ATTACKED: dict[str, Any] = {"sampler": EVERYONE, "rounds": 8, "training": {**ADAMW, "learning_rate": 6e-3}}
"""Few rounds, in which all take part: hostile clients are hostile in each of them."""
SKEW = "8 clients by Dirichlet 0.3"
skewed = dealt(headlines, Dirichlet(8, 0.3, min_partition_size=10), 480)


def _headlines(
    about: str, make: Callable[[int], Mapping[str, Any]] = skewed, model: str = MINILM, **changes: Any
) -> Scenario:
    return Scenario(about, make, {**HEADLINES, **changes}, model, corpus=headlines)


DIALOGUES: dict[str, Any] = {
    "task": {"kind": "chat", "max_length": 72},
    "space": {"kind": "lora", "r": 4, "lora_alpha": 16, "layers_to_transform": [29]},
    "training": {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 5e-3},
    "rounds": 3,
    "sampler": EVERYONE,
}

SCENARIOS: dict[str, Scenario] = {
    "agnews": _headlines(f"{SKEW}, 4 a round, AdamW"),
    "agnews-sgd": _headlines(f"{SKEW}, 4 a round, SGD", training=SGD, space=STEEP),
    "agnews-iid": _headlines(
        "8 clients dealt by chance, AdamW", dealt(headlines, Iid(8), 480), sampler=EVERYONE, rounds=10
    ),
    "ranks": _headlines(
        f"{SKEW}, 4 a round, LoRA ranks 2, 4 and 8, AdamW",
        space={**UPPER, "r": 8},
        profiles={"rank": (2, 4, 8)},
    ),
    "blocks": _headlines(
        f"{SKEW}, 4 a round, LoRA on all 6 blocks, AdamW",
        space={"kind": "lora", "r": 4, "lora_alpha": 16},
        rounds=12,
    ),
    "stragglers": _headlines(
        f"{SKEW}, 4 a round, local work of 1, 4 and 12 steps, SGD",
        training=SGD,
        space=STEEP,
        profiles={"work": (0.25, 1, 3)},
    ),
    "speeds": _headlines(
        f"{SKEW}, speeds 1, 2 and 8, SGD",
        training=SGD,
        space=STEEP,
        sampler=EVERYONE,
        rounds=10,
        profiles={"speed": (1, 2, 8)},
    ),
    "private": _headlines(
        "3 clients dealt by chance with 275 training rows each, all in each round, AdamW",
        dealt(headlines, Iid(3), 1500, public=0),
        sampler=EVERYONE,
        rounds=5,
        training={**ADAMW, "per_device_train_batch_size": 32, "learning_rate": 1e-2},
    ),
    "crowd": _headlines(
        "40 clients dealt by chance, all in each round, AdamW",
        dealt(headlines, Iid(40), 2000, public=0),
        sampler=EVERYONE,
        rounds=5,
    ),
    "marked": _headlines(
        "4 clients dealt by chance with 220 training rows each, all in each round, AdamW",
        dealt(headlines, Iid(4), 1600),
        sampler=EVERYONE,
        rounds=8,
        training={"max_steps": 8, "per_device_train_batch_size": 16, "learning_rate": 5e-3},
    ),
    "liars": _headlines(
        "10 clients dealt by chance, 3 of them with wrong labels, AdamW", lied(), sampler=EVERYONE, rounds=15
    ),
    "attacked": _headlines("12 clients dealt by chance, AdamW", lied(12, 0, 40), **ATTACKED),
    "attacked-skewed": _headlines(
        "12 clients by Dirichlet 0.3, AdamW",
        dealt(headlines, Dirichlet(12, 0.3, min_partition_size=10), 480),
        **ATTACKED,
    ),
    "attacked-sgd": _headlines(
        "12 clients dealt by chance, one step of SGD a round",
        lied(12, 0, 40),
        space=STEEP,
        training={**SGD, "max_steps": 1},
        sampler=EVERYONE,
        rounds=60,
    ),
    "one-shot": _headlines(
        "8 clients dealt by chance, one round of 24 steps, AdamW",
        dealt(headlines, Iid(8), 480),
        sampler=EVERYONE,
        rounds=1,
        training={**ADAMW, "max_steps": 24},
    ),
    "prompt": _headlines(
        f"{SKEW}, 4 a round, 8 prompt vectors, AdamW",
        space={"kind": "prompt", "num_virtual_tokens": 8},
        training={**ADAMW, "learning_rate": 3e-2},
        rounds=15,
    ),
    "small-to-large": _headlines(
        f"{SKEW}, 4 a round, all weights, AdamW",
        untaught,
        space="full",
        training={"max_steps": 8, "per_device_train_batch_size": 16, "learning_rate": 1e-3},
        rounds=32,
        model="a BERT of 2 blocks and width 128 from random weights",
    ),
    "banking": Scenario(
        "8 clients with 3 classes each, 4 a round, AdamW",
        dealt(questions, Pathological(8, 3), 640),
        {**HEADLINES, "task": {"kind": "classify", "max_length": 32}},
        corpus=questions,
    ),
    "tasks": Scenario(
        "Banking77 questions in two sets and AG News headlines, 9 clients with two of these tasks, AdamW",
        tasks,
        {
            **HEADLINES,
            "task": {"kind": "classify", "max_length": 32},
            "training": {**ADAMW, "max_steps": -1, "num_train_epochs": 1},
            "rounds": 12,
            "sampler": EVERYONE,
        },
    ),
    "dialogues": Scenario(
        "chatterbot dialogues, 3 clients by topic, all in each round, AdamW",
        dialogues,
        DIALOGUES,
        model=SMOLLM,
    ),
    "unseen": Scenario(
        "chatterbot dialogues, 6 clients by topic, scored on 7 other topics, all in each round, one epoch, AdamW",
        unseen,
        {**DIALOGUES, "training": {**DIALOGUES["training"], "max_steps": -1, "num_train_epochs": 1}},
        model=SMOLLM,
    ),
    "languages": Scenario(
        "chatterbot dialogues, 9 clients by language, 3 families, all in each round, AdamW",
        languages,
        {**DIALOGUES, "rounds": 4},
        model=SMOLLM,
    ),
    "few-shot": Scenario(
        "as a cloze, 5 clients dealt by chance, all in each round, AdamW",
        lambda seed: {**dealt(headlines, Iid(5), 600, public=0)(seed), "load": {}, "model": masked_minilm()},
        {
            **HEADLINES,
            "task": {
                "kind": "cloze",
                "max_length": 32,
                "pattern": "{text} This is about {mask}.",
                "verbalizer": ["world", "sports", "business", "technology"],
            },
            "sampler": EVERYONE,
            "rounds": 10,
        },
        model=f"{MINILM} with a head for masked words fitted to headlines",
        corpus=headlines,
    ),
    "digits": Scenario(
        "handwritten digits of scikit-learn that the model never saw, 10 clients with 2 of 10 classes and 16 images of "
        "each, all in each round, AdamW",
        digits,
        {
            "task": {"kind": "zero-shot-image"},
            "space": {
                "kind": "lora",
                "r": 4,
                "lora_alpha": 8,
                "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"],
            },
            "training": {"max_steps": 4, "per_device_train_batch_size": 16, "learning_rate": 5e-3},
            "rounds": 8,
            "sampler": EVERYONE,
        },
        model="a CLIP of 218,113 parameters, trained for the purpose on other digits in other styles",
    ),
    "speech": Scenario(
        "spoken digits (FSDD), 6 clients by speaker, 3 of whom the model knows, all in each round, AdamW",
        speakers,
        {
            "task": "transcribe",
            "space": {"kind": "lora", "r": 8, "lora_alpha": 16},
            "training": {"max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-2},
            "rounds": 6,
            "sampler": EVERYONE,
        },
        model="a Whisper of 275,000 parameters, trained for the purpose on other takes of three of the speakers",
    ),
    "masked": Scenario(
        "without labels, 4 clients by Dirichlet 0.5, AdamW",
        texts,
        {
            "task": {"kind": "masked-lm", "max_length": 24},
            "space": "full",
            "training": {**ADAMW, "learning_rate": 1e-3},
            "rounds": 6,
            "sampler": EVERYONE,
        },
        model="a BERT of 4 blocks from random weights",
        corpus=headlines,
    ),
}
