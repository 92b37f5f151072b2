"""Attacks on membership and memory, with and without protection: what finished runs tell of their clients' rows.

    PYTHONPATH=src:. python -m benchmarks.fidelity.membership_audits [--only SCENE] [--page]

writes ``membership_audits.json`` beside this file, run by run, and a section of ``docs/audits-measured.md``. A script
that was ended goes on with what is missing; ``--page`` writes the section of what is there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.fidelity.scenarios import headlines, minilm
from fedfm import parts
from fedfm.audit import Case, Inference
from fedfm.audit.memory.canaries import Canaries
from fedfm.core.plan import Training
from fedfm.data import Chatterbot, Splits, from_rows
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.privacy.dp_sgd import DPSGD
from fedfm.results import machine
from fedfm.rounds import Rounds
from fedfm.secure.secagg import SecAgg
from fedfm.spaces import Full, LoRA
from fedfm.tasks import Chat, Classify
from fedfm.wire import Clip, Gaussian, LocalGaussian

HERE = Path(__file__).parent
RESULTS = HERE / "membership_audits.json"
PAGE = HERE.parents[1] / "docs" / "audits-measured.md"
TITLE = "## Membership and memory"

HALF = Splits(validation=0.0, test=0.5)
CLIENTS, EACH, SHADOWS, SEED = 4, 40, 6, 1

PROTECTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "clip, noise on the mean": {"stages": (Clip(1.0), Gaussian(1.0, delta=1e-2))},
    "clip, noise on each upload": {"stages": (Clip(1.0), LocalGaussian(0.05))},
    "dp-sgd": {"privacy": DPSGD(noise_multiplier=1.0, delta=1e-3)},
    "secagg": {"secure": SecAgg()},
}
"""What is tried, as a reader calls it, and as arguments of a federation."""


def headline_sorters(**protection: Any) -> Federation:
    """MiniLM with LoRA in its last block and a new head, on headlines, for many epochs."""
    rows = headlines().some(CLIENTS * EACH, SEED)
    members = from_rows({f"client-{i}": rows[i * EACH : (i + 1) * EACH] for i in range(CLIENTS)}, HALF, SEED)
    return Federation(
        minilm(),
        FedAvg(),
        members,
        Classify(max_length=24),
        space=LoRA(r=4, lora_alpha=16, layers_to_transform=(5,)),
        training=Training(num_train_epochs=4, learning_rate=6e-3, per_device_train_batch_size=8),
        rounds=6,
        evaluation=Evaluation(every=0),
        seed=SEED,
        load={"num_labels": 4},
        **protection,
    )


def one_step_sorters(**protection: Any) -> Federation:
    """All of MiniLM, one step of SGD a round with all rows: what a server learns from single gradients."""
    rows = headlines().some(CLIENTS * EACH, SEED)
    members = from_rows({f"client-{i}": rows[i * EACH : (i + 1) * EACH] for i in range(CLIENTS)}, HALF, SEED)
    return Federation(
        minilm(),
        FedAvg(),
        members,
        Classify(max_length=24),
        space=Full(),
        training=Training(max_steps=1, learning_rate=0.1, per_device_train_batch_size=EACH // 2, optim="sgd"),
        rounds=1,
        evaluation=Evaluation(every=0),
        seed=SEED,
        load={"num_labels": 4},
        **protection,
    )


def little_talkers(**protection: Any) -> Federation:
    """A Llama of two blocks that reads bytes, all of it trained on dialogues from random weights."""
    rows = Chatterbot(topics=("ai", "emotion", "psychology", "trivia")).load()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED)).tolist()
    short = [rows[i] for i in order if len(rows[i]["messages"]) == 2 and len(str(rows[i]["messages"])) < 220]
    members = from_rows({f"client-{i}": short[i * EACH : (i + 1) * EACH] for i in range(CLIENTS)}, HALF, SEED)
    return Federation(
        little_llama(),
        FedAvg(),
        members,
        Chat(max_length=160),
        space=Full(),
        training=Training(num_train_epochs=8, learning_rate=3e-3, per_device_train_batch_size=8),
        rounds=4,
        public=short[CLIENTS * EACH : CLIENTS * EACH + 48],
        evaluation=Evaluation(every=0),
        seed=SEED,
        **protection,
    )


@cache
def little_llama() -> str:
    """Folder of a Llama of 2 blocks and width 128 with random weights, whose words are bytes."""
    vocab = {"<pad>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    vocab |= {c: i + 3 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<|im_start|>", "<|im_end|>"])
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role[0] }}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>a{% endif %}"
    )
    ends = {"pad_token": "<pad>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **ends)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tempfile.mkdtemp(prefix="fedfm-llama-")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


MODEL = ("loss", "reference")
SERVER = ("upload-loss", "gradient-alignment", "server-ascent")
LONG = ("logits", "shadow", "lira", "lira-offline", "spv")
"""Tried without protection alone: each trains models of its own."""
SCENES: dict[str, tuple[Callable[..., Federation], Sequence[str], Sequence[str]]] = {
    "headlines": (headline_sorters, (*MODEL, "sensitivity", *LONG[:4], *SERVER), tuple(PROTECTIONS)),
    "one step": (
        one_step_sorters,
        ("upload-loss", "gradient-alignment", "ami-fc"),
        ("nothing", "clip, noise on each upload", "secagg"),
    ),
    "dialogues": (
        little_talkers,
        (*MODEL, "min-k", "extraction", *SERVER, "canaries", "spv"),
        ("nothing", "clip, noise on the mean", "clip, noise on each upload"),
    ),
}
"""By name: the run, the attacks, and the protections with which it is tried."""
ABOUT = {
    "headlines": "Headlines in four classes: LoRA in MiniLM's last block, six rounds of four epochs",
    "one step": "Headlines: all of MiniLM, one round of one step of SGD on all rows of a client",
    "dialogues": "Dialogues: a Llama of two blocks from random weights, four rounds of eight epochs",
}


def attack(name: str) -> Inference:
    """An attack; canaries planted less often than by default, so that clients keep rows of their own."""
    found: Inference = Canaries(repeats=(1, 5, 25)) if name == "canaries" else parts.make("audit", name, "attack")
    return found


def measure(only: Sequence[str]) -> None:
    """Do what is not there yet; each attack is written down when it is done.

    Args:
        only: scenes; all unless given.
    """
    found: dict[str, Any] = {"scenes": {}, "quality": {}, "seconds": 0.0}
    found |= json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    tries = [(scene, protection) for scene in only or SCENES for protection in SCENES[scene][2]]
    # What is without protection comes first.
    for scene, protection in sorted(tries, key=lambda pair: pair[1] != "nothing"):
        make, names, _ = SCENES[scene]
        done = found["scenes"].setdefault(scene, {}).setdefault(protection, {})
        left = [name for name in names if name not in done and (protection == "nothing" or name not in LONG)]
        began = time.process_time()
        if not left and protection in found["quality"].get(scene, {}):
            continue
        run = make(**PROTECTIONS[protection])
        state = Rounds(run, None, ()).run(False).state
        scores = run.assess(state)
        found["quality"].setdefault(scene, {})[protection] = scores.pooled if scores else {}
        case = Case(run, run.result(state), rows=80, models=SHADOWS, seed=SEED)
        for name in left:
            done[name] = [finding.to_json() for finding in attack(name).look(case)]
            shown = "  ".join(f"{f['measure']} {f['value']:.3f}" for f in done[name])
            print(f"{scene:<10} {protection:<28} {name:<20} {shown}", flush=True)
            spent, began = time.process_time() - began, time.process_time()
            found |= {"seconds": round(found["seconds"] + spent, 1), "machine": machine()}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def page(found: Mapping[str, Any]) -> list[str]:
    """The section as lines of Markdown."""
    lines = [
        TITLE,
        "",
        "Made by `python -m benchmarks.fidelity.membership_audits`; the numbers are in",
        "[membership_audits.json](../benchmarks/fidelity/membership_audits.json).",
        f"{CLIENTS} clients with {EACH // 2} rows that are trained on and as many that are not; one seed;",
        f"{SHADOWS} shadow models; {found['seconds'] / 60:.0f} minutes of processor time. In brackets: intervals of",
        "95 percent. **Bold**: better than guessing. Uploads are clipped at 1; noise is 1 on the mean, 0.05 on each;",
        "`dp-sgd` adds 1 to gradients of rows clipped at 1.",
        "",
    ]
    for scene, runs in found["scenes"].items():
        lines += [f"### {ABOUT[scene]}", "", "| attack | measure | " + " | ".join(runs) + " |"]
        lines += ["|---|---|" + "---:|" * len(runs)]
        keys = {(f["attack"], f["measure"]): f for run in runs.values() for fs in run.values() for f in fs}
        for id, measure in keys:
            cells = [next((_cell(f) for f in run.get(id, ()) if f["measure"] == measure), "–") for run in runs.values()]
            lines.append(f"| `{id}` | {measure} | " + " | ".join(cells) + " |")
        quality = found["quality"].get(scene, {})
        for name in ("accuracy", "loss"):
            if all(name in quality.get(run, {}) for run in runs):
                shown = [f"{quality[run][name]:.2f}" for run in runs]
                lines.append(f"| the model itself | {name} on held-out rows | " + " | ".join(shown) + " |")
        lines.append("")
    return [*lines, *READING, ""]


def _cell(finding: Mapping[str, Any]) -> str:
    text = f"{finding['value']:.2f} [{finding['low']:.2f}, {finding['high']:.2f}]"
    return f"**{text}**" if finding["leaks"] else text


READING: tuple[str, ...] = (
    "What is to be read from it, and what not:",
    "",
    "- One seed and 80 rows on each side: a difference of 0.1 in an AUC says little. No paper's claim is judged here.",
    "- On headlines LiRA finds a third of the rows with one false alarm in a hundred, where the loss, whose average is",
    "  nearly as good, finds hardly any: what stands out is seen when rows are compared with themselves. The server,",
    "  which reads uploads, finds as many by one round and no model of its own.",
    "- `ami-fc` is exact: a server that changes weights needs one round. It needs a space in which it hands out the",
    "  feed-forward layers, and it stands out to a client who looks at the weights.",
    "- Noise that the server adds to the mean hides nothing from it, as it reads uploads before. A secure sum changes",
    "  nothing of the model, and of a round of four clients it leaves the server a part of what it had.",
    "- Noise on each upload, 0.05 of the bound, stops all three attacks on single gradients. After six rounds of many",
    "  steps the model of such clients still tells who was there, only less, and has learnt nearly as much.",
    "- `dp-sgd` with noise 1 leaves an AUC of 0.6 and hardly a row that is found without false alarms, of a model that",
    "  has learnt nothing from so few rows. With all weights tuned it takes no batch of this model, so it is not among",
    "  the protections of one step.",
    "- `ami-fc` under noise lies below guessing, which is no finding: of so many intervals some miss.",
    "- With noise on the mean of four clients the attacks on the model find nothing (one of five rates of hits reaches",
    "  above guessing), and the model has learnt nothing: its accuracy is that of guessing.",
    "- Each canary, also one planted once, is likelier than 255 other secrets; planted five times it is spoken out.",
    "- No rest of a row was written word for word: a model may tell who was there without reciting it.",
    "- –: does not belong to that run, or the script was ended before it; started again, it goes on.",
)


def write(found: Mapping[str, Any]) -> None:
    """Put the section in its place on the page, whose other sections stay."""
    text = PAGE.read_text() if PAGE.exists() else "# Audits, measured\n\n"
    before, _, after = text.partition(TITLE)
    _, heading, rest = after.partition("\n## ")
    PAGE.write_text(before + "\n".join(page(found)) + (heading + rest if heading else ""))


def main() -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="only write the section of what is there")
    parser.add_argument("--only", action="append", default=[], choices=SCENES)
    given = parser.parse_args()
    if not given.page:
        measure(given.only)
    write(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
