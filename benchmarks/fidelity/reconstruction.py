"""Rows rebuilt from what a server reads, measured: texts and images, by what is tuned, by the batch, by what protects.

    PYTHONPATH=src:. python -m benchmarks.fidelity.reconstruction [KIND ...]

with the kinds ``texts``, ``writers``, ``labels``, ``sentences``, ``searches`` and ``images`` (all unless given) writes
``reconstruction.json`` beside this file, the section "Rebuilding rows" of ``docs/audits-measured.md`` and the picture
``docs/reconstruction.png``. Each attack is written down when it is done, and one that is there is not done again;
``--page`` writes the section of what is there, ``--only`` measures one setting.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from benchmarks.fidelity.scenarios import SMOLLM, headlines, minilm
from fedfm.audit import Case, Finding, Inference
from fedfm.audit.reconstruction.attribute import Attribute
from fedfm.audit.reconstruction.decepticons import Decepticons
from fedfm.audit.reconstruction.dlg import DLG
from fedfm.audit.reconstruction.film import FILM
from fedfm.audit.reconstruction.inverting_gradients import InvertingGradients
from fedfm.audit.reconstruction.lamp import LAMP
from fedfm.audit.reconstruction.leak import Leak
from fedfm.audit.reconstruction.reconstruction import Views
from fedfm.core.plan import Training
from fedfm.core.update import Member
from fedfm.data import Digits
from fedfm.errors import RecipeError
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.models import load
from fedfm.privacy.dp_sgd import DPSGD
from fedfm.results import machine
from fedfm.secure.secagg import SecAgg
from fedfm.spaces import Full, LoRA
from fedfm.tasks import CausalLM, Classify, ImageClassify
from fedfm.wire import Clip, LocalGaussian, TopK

HERE = Path(__file__).parent
RESULTS = HERE / "reconstruction.json"
PAGE = HERE.parents[1] / "docs" / "audits-measured.md"
PICTURE = PAGE.with_name("reconstruction.png")
TITLE = "## Rebuilding rows"

STEP = {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0, "bf16": False}
TOKENS, BLOCKS, SEED = 10, 2, 1
ATTACKED = 3
MOST = 4
"""Images shown of a setting."""


@dataclass(frozen=True)
class Clients:
    """Clients with so many rows each; all have the same others to guess by."""

    dealt: Sequence[Sequence[Mapping[str, Any]]]
    others: Sequence[Mapping[str, Any]]

    @property
    def ids(self) -> list[str]:
        return [f"client-{at}" for at in range(len(self.dealt))]

    def member(self, id: str) -> Member:
        return Member(id, len(self.rows(id, "train")))

    def rows(self, id: str, split: str) -> Sequence[Mapping[str, Any]]:
        return self.dealt[self.ids.index(id)] if split == "train" else self.others if split == "test" else []

    def pooled(self) -> Clients:
        return Clients([[row for rows in self.dealt for row in rows]], self.others)


SETTINGS: dict[str, dict[str, Any]] = {
    "1 row": {},
    "4 rows": {"rows": 4},
    "8 rows": {"rows": 8},
    "16 rows": {"rows": 16},
    "8 rows, bfloat16": {"rows": 8, "training": {"bf16": True}},
    "4 rows, 4 steps of 1": {"rows": 4, "training": {"max_steps": 4, "per_device_train_batch_size": 1}},
    "1 row, AdamW": {"training": {"optim": "adamw_torch", "learning_rate": 1e-3}},
    "1 row, gradient clipped": {"training": {"max_grad_norm": 0.1}},
    "1 row, the largest 10 %": {"stages": (TopK(0.1),)},
    "1 row, the largest 1 %": {"stages": (TopK(0.01),)},
    "1 row, noise of 0.001 S": {"stages": (Clip(0.1), LocalGaussian(0.001))},
    "1 row, noise of 0.1 S": {"stages": (Clip(0.1), LocalGaussian(0.1))},
    "8 rows, noise of 0.001 S": {"rows": 8, "stages": (Clip(0.1), LocalGaussian(0.001))},
    "8 rows, noise of 0.1 S": {"rows": 8, "stages": (Clip(0.1), LocalGaussian(0.1))},
    "1 row, DP-SGD with noise 1": {"privacy": DPSGD(noise_multiplier=1.0)},
    "8 rows, DP-SGD with noise 1": {"rows": 8, "privacy": DPSGD(noise_multiplier=1.0)},
    "3 clients of 1 row, summed unseen": {"secure": SecAgg()},
    "3 clients of 8 rows, summed unseen": {"rows": 8, "secure": SecAgg(max_value=64.0, bits=32)},
    "1 row, LoRA": {"space": LoRA(r=8)},
    "1 row, LoRA on all layers": {"space": "all"},
}
"""What a client does; unless said, one step of SGD on all weights."""
PROTECTED = ("1 row", "4 rows", "8 rows", "8 rows, noise of 0.1 S", "3 clients of 8 rows, summed unseen")
"""What is measured on a model that writes text."""
LABELLED = ("1 row", "4 rows", "1 row, noise of 0.1 S", "1 row, LoRA")
"""Where a field of the rows is looked for."""
WRITTEN = ("1 row", "4 rows", "1 row, noise of 0.1 S", "3 clients of 1 row, summed unseen")
"""Where sentences are made of the words that are known."""
SEARCHED = ("1 row", "1 row, noise of 0.1 S", "1 row, LoRA on all layers")
"""Where texts are also looked for by gradients."""
DRAWN = (
    "1 row",
    "4 rows",
    "1 row, AdamW",
    "1 row, the largest 10 %",
    "1 row, noise of 0.001 S",
    "1 row, noise of 0.1 S",
    "3 clients of 1 row, summed unseen",
    "1 row, LoRA",
)
"""What is measured on images, and drawn."""


@cache
def small_minilm() -> str:
    """MiniLM's first blocks."""
    found, folder = Path(minilm()), Path(tempfile.mkdtemp(prefix="fedfm-small-"))
    for file in found.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((found / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": BLOCKS}))
    return str(folder)


@cache
def small_smollm() -> str:
    """SmolLM2's first blocks."""
    whole, folder = load(SMOLLM, head="causal_lm"), tempfile.mkdtemp(prefix="fedfm-writer-")
    whole.model.model.layers = whole.model.model.layers[:BLOCKS]
    whole.model.config.num_hidden_layers = BLOCKS
    whole.model.save_pretrained(folder)
    whole.tokenizer.save_pretrained(folder)
    return folder


@cache
def fresh_vit() -> str:
    """A ViT of one block and width 96 with random weights, for images of 8 x 8 in patches of 4 x 4."""
    folder = tempfile.mkdtemp(prefix="fedfm-vit-")
    size = {"image_size": 8, "patch_size": 4, "hidden_size": 96, "intermediate_size": 192}
    depth = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_labels": 10, "initializer_range": 0.1}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTForImageClassification(ViTConfig(**size, **depth, **still)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@cache
def texts() -> list[dict[str, Any]]:
    """Headlines."""
    return headlines().some(400, SEED)


@cache
def images() -> list[dict[str, Any]]:
    """Digits."""
    rows = Digits().load().with_format("numpy")
    pixels, labels = rows["pixels"][:].reshape(-1, 8, 8), rows["label"][:]
    return [
        {"image": Image.fromarray((image * 255).round().astype("uint8")), "label": int(label)}
        for image, label in zip(pixels[:400], labels[:400], strict=True)
    ]


def case(kind: str, setting: Mapping[str, Any]) -> Case:
    """A run of one round.

    Args:
        kind: of :data:`ATTACKS`.
        setting: one of :data:`SETTINGS`.
    """
    given, count = dict(setting), setting.get("rows", 1)
    given.pop("rows", None)
    found, model, task = {
        "images": lambda: (images(), fresh_vit(), ImageClassify()),
        "writers": lambda: (texts(), small_smollm(), CausalLM(max_length=TOKENS)),
    }.get(kind, lambda: (texts(), small_minilm(), Classify(max_length=TOKENS)))()
    dealt = [found[at * count : (at + 1) * count] for at in range(ATTACKED)]
    if given.get("space") == "all":
        linear = ["query", "key", "value", "dense"] if kind != "images" else ["q_proj", "k_proj", "v_proj", "o_proj",
                                                                            "fc1", "fc2"]  # fmt: skip
        given["space"] = LoRA(r=8, target_modules=tuple(linear))
    training = Training(**{"per_device_train_batch_size": count, **STEP, **given.pop("training", {})})
    run = Federation(
        model,
        FedAvg(),
        Clients(dealt, found[-100:]),
        task,
        training=training,
        rounds=1,
        evaluation=Evaluation(every=0),
        seed=SEED,
        load={"num_labels": 4} if isinstance(task, Classify) else None,
        **{"space": Full(), **given},
    )
    return Case(run, {"of": torch.zeros(1)})


@dataclass(frozen=True)
class Kept(InvertingGradients):
    """Keeps what it rebuilt, to look at."""

    found: list[tuple[Leak, list[torch.Tensor]]] = field(default_factory=list)

    def recover(self, case: Case, leak: Leak) -> tuple[list[torch.Tensor], str]:
        rows, note = super().recover(case, leak)
        self.found.append((leak, rows))
        return rows, note


class Words(FILM):
    """The words alone, whose sentences nobody makes."""

    def look(self, case: Case) -> tuple[Finding, ...]:
        return (self.known(case),)


ATTACKS: dict[str, tuple[Sequence[str], dict[str, Callable[[], Inference]]]] = {
    "texts": (tuple(SETTINGS), {"decepticons": Decepticons, "film": Words}),
    "writers": (PROTECTED, {"decepticons": Decepticons, "film": Words}),
    "labels": (LABELLED, {"attribute": Attribute}),
    "sentences": (WRITTEN, {"film": lambda: FILM(clients=1, beams=4, orders=20)}),
    "searches": (
        SEARCHED,
        {
            "inverting-gradients": lambda: InvertingGradients(iterations=200, clients=2),
            "dlg": lambda: DLG(iterations=10, restarts=1, clients=2),
            "lamp": lambda: LAMP(iterations=200, beginnings=20, orders=20, clients=1),
        },
    ),
    "images": (
        DRAWN,
        {
            "inverting-gradients": lambda: Kept(iterations=400, clients=ATTACKED),
            "dlg": lambda: DLG(iterations=10, restarts=1, clients=ATTACKED),
        },
    ),
}
"""By kind: the settings, and the attacks."""


def measure(kinds: Sequence[str], only: Sequence[str]) -> None:
    """Attack each setting; numbers are written down as they come, and what is there is not done again.

    Args:
        kinds: what is measured.
        only: settings; all unless given.
    """
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for kind in kinds:
        settings, attacks = ATTACKS[kind]
        for id, make in attacks.items():
            for name in only or settings:
                empty: dict[str, Any] = {"attacks": {}, "refused": {}, "processor_seconds": 0.0}
                cell = found.setdefault(kind, {}).setdefault(name, empty)
                if id in cell["attacks"] or id in cell["refused"]:
                    continue
                began, attacked, attack = time.process_time(), case(kind, SETTINGS[name]), make()
                if why := attack.refusal(attacked):
                    cell["refused"][id] = why
                else:
                    try:
                        findings = attack.look(attacked)
                        cell["attacks"][id] = [finding.to_json() for finding in findings]
                    except RecipeError as error:  # Clients sent nothing that could be attacked.
                        cell["refused"][id] = str(error).removeprefix(f"{id}: ").rstrip(".")
                if isinstance(attack, Kept) and attack.found:
                    cell["images"] = shown(attacked, attack)
                cell["processor_seconds"] = round(cell["processor_seconds"] + time.process_time() - began, 1)
                found |= {"machine": machine(), "torch": torch.__version__, "seed": SEED}
                RESULTS.write_text(json.dumps(found) + "\n")
                told = ", ".join(
                    f"{f['measure']} {f['value']:.2f} ({f['chance']:.2f})" for f in cell["attacks"].get(id, ())
                )
                print(f"{kind} {name:<36} {id}: {told or cell['refused'][id]}", flush=True)


def shown(case: Case, attack: Kept) -> list[Any]:
    """Images as they are shown, each (rebuilt, true), ``[H, W, C]``."""
    views, pairs = Views(case, [leak for leak, _ in attack.found]), []
    for leak, rows in attack.found:
        true = [views.row(row) for row in leak.rows]
        pairs += list(zip(views.matched([views.shown(row) for row in rows], true), true, strict=True))
    return [[(image.permute(1, 2, 0) * 255).round().int().tolist() for image in pair] for pair in pairs[:MOST]]


def picture(shown: Mapping[str, Sequence[Any]], scale: int = 6) -> Image.Image:
    """True images beside rebuilt ones, a line for each setting.

    Args:
        shown: by setting, (rebuilt, true) pairs of images ``[H, W, C]``.
        scale: pixels of the picture for each of an image.
    """
    side = 8 * scale + 4
    out = Image.new("RGB", (220 + MOST * 2 * side, 14 + len(shown) * side), "white")
    pen = ImageDraw.Draw(out)
    for at, title in enumerate(("true", "rebuilt")):
        pen.text((220 + at * MOST * side, 0), title, fill="black")
    for line, (name, pairs) in enumerate(shown.items()):
        pen.text((2, 14 + line * side + side // 3), name, fill="black")
        for column, pair in enumerate(pairs):
            for half, image in enumerate(reversed(pair)):
                tile = Image.fromarray(np.array(image, dtype=np.uint8))
                tile = tile.resize((8 * scale, 8 * scale), Image.Resampling.NEAREST)
                out.paste(tile, (220 + (half * MOST + column) * side, 14 + line * side))
    return out


ABOUT: dict[str, tuple[str, str, dict[str, tuple[str, str]]]] = {
    "texts": (
        "Headlines of a classifier",
        f"AG News headlines of at most {TOKENS} tokens, 4 classes; the first {BLOCKS} blocks of all-minilm-l6-v2 and a "
        "new head. FILM: the words that it knows before it writes any sentence.",
        {
            "Decepticons: tokens, F1": ("decepticons", "tokens recovered (F1)"),
            "Decepticons: rows found exactly": ("decepticons", "rows recovered exactly"),
            "FILM: words known, F1": ("film", "words known (F1)"),
        },
    ),
    "writers": (
        "Headlines of a model that writes",
        f"The same headlines; the first {BLOCKS} blocks of SmolLM2-135M, whose table of token embeddings is its output "
        "layer, too.",
        {
            "Decepticons: tokens, F1": ("decepticons", "tokens recovered (F1)"),
            "Decepticons: rows found exactly": ("decepticons", "rows recovered exactly"),
            "FILM: words known, F1": ("film", "words known (F1)"),
        },
    ),
    "labels": (
        "Labels of known headlines",
        "Of the classifier's rows all is known but the label.",
        {"label found": ("attribute", "label found")},
    ),
    "sentences": (
        "Sentences of known words",
        "FILM on the headlines of one client of the classifier, with 4 beams and 20 orders.",
        {
            "tokens, F1": ("film", "tokens recovered (F1)"),
            "ROUGE-2": ("film", "ROUGE-2"),
            "ROUGE-L": ("film", "ROUGE-L"),
        },
    ),
    "searches": (
        "Headlines looked for by their gradient",
        "On the classifier. Inverting Gradients with 200 iterations and DLG with 10 of 20 steps, at two clients; LAMP "
        "with 200 iterations at one.",
        {
            f"{title}: {short}": (id, name)
            for id, title in (("inverting-gradients", "Inverting Gradients"), ("dlg", "DLG"), ("lamp", "LAMP"))
            for short, name in (("tokens, F1", "tokens recovered (F1)"), ("ROUGE-L", "ROUGE-L"))
        },
    ),
    "images": (
        "Images",
        "Digits of scikit-learn, 8 x 8 pixels; a ViT of one block and width 96 with random weights; Inverting "
        "Gradients with 400 iterations, DLG with 10 of 20 steps. PSNR in dB, SSIM at most 1.",
        {
            "Inverting Gradients: PSNR": ("inverting-gradients", "PSNR in dB"),
            "Inverting Gradients: SSIM": ("inverting-gradients", "SSIM"),
            "DLG: PSNR": ("dlg", "PSNR in dB"),
        },
    ),
}
"""By kind: its title, what was done, and what its table shows of which attack."""


def table(cells: Mapping[str, Any], columns: Mapping[str, tuple[str, str]]) -> list[str]:
    """The lines of a table, a setting a line; intervals in square brackets, guessing in round ones."""

    def text(cell: Mapping[str, Any], id: str, measure: str) -> str:
        one = next((f for f in cell["attacks"].get(id, ()) if f["measure"] == measure), None)
        if one is None:
            return "refused" if id in cell["refused"] else "–"
        value = f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}] ({one['chance']:.2f})"
        return f"**{value}**" if one["leaks"] else value

    lines = [f"| the client's round | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, cell in cells.items():
        lines.append(f"| {name} | {' | '.join(text(cell, *which) for which in columns.values())} |")
    return lines


def section(found: Mapping[str, Any]) -> str:
    """The section of the page."""
    cells = {kind: found[kind] for kind in ABOUT if found.get(kind)}
    seconds = sum(cell["processor_seconds"] for kind in cells.values() for cell in kind.values())
    lines = [
        TITLE,
        "",
        "Made by `python -m benchmarks.fidelity.reconstruction`; the numbers are in",
        "[reconstruction.json](../benchmarks/fidelity/reconstruction.json). Unless said, each of "
        f"{ATTACKED} clients takes one step of SGD on all weights in 32 bits, and the server reads its upload. "
        "In square brackets: intervals of 95 percent; in round ones: guessing. **Bold**: better than guessing. "
        f"{seconds / 60:.0f} minutes of processor time.",
        "",
    ]
    for kind, measured in cells.items():
        title, about, columns = ABOUT[kind]
        lines += [f"### {title}", "", about, "", *table(measured, columns), ""]
        refused = {(id, why): None for cell in measured.values() for id, why in cell["refused"].items()}
        lines += [f"- `{id}` refused: {why}." for id, why in refused] + ([""] if refused else [])
        if kind in ("sentences", "searches"):
            examples = [
                f"- {name}: `{id}` wrote “{f['examples'][0][0]}” for “{f['examples'][0][1]}”."
                for name, cell in measured.items()
                for id, findings in cell["attacks"].items()
                for f in findings
                if f["examples"]
            ]
            lines += [*examples, ""]
    if "images" in cells:
        lines += ["![True and rebuilt digits](reconstruction.png)", ""]
    return "\n".join([*lines, *READING, ""])


READING: tuple[str, ...] = (
    "What is to be read from it, and what not:",
    "",
    "- Three clients say no more than that an attack works or does not. –: not measured; the script goes on with it.",
    "- A server that changes what it hands out reads eight headlines at once, nearly all of them word for word, also",
    "  of the sum of several clients. Several local steps, AdamW and the rounding of bfloat16 cost it tokens. Noise of",
    "  the clients costs it all of them, also a little of it, as a change of bounded length is small in each weight.",
    "- Of a model that sees only what stands before a token it reads nearly as much, without any embedding of places;",
    "  but next to nothing of the sum of three clients, likely as a secure sum rounds what is small beside its bound.",
    "- The words of a batch of any size are known from the table of token embeddings to a server that changes nothing,",
    "  unless clients add noise or the table is frozen. Where it is the output layer, too, they did not stand out.",
    "- With all weights tuned `dp-sgd` takes no batch of several rows of this model, as their gradients in the table",
    "  of places cannot be told apart: clients send nothing, so there is nothing to attack.",
    "- LoRA leaves Decepticons nothing to change and FILM no table to look at.",
    "- Rows that are looked for by their gradient are hardly found in a model of this size in so few iterations; more",
    "  may find more. What they find in a small one is in the tests (`tests/audit/test_reconstruction.py`).",
)


def main() -> None:
    """Measure, or with ``--page`` only write the section again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=tuple(ATTACKS))
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    if not given.page:
        torch.set_num_threads(1)
        measure(given.kinds, given.only)
    found = json.loads(RESULTS.read_text())
    drawn = {name: cell["images"] for name, cell in found.get("images", {}).items() if "images" in cell}
    if drawn:
        picture(drawn).save(PICTURE, optimize=True)
    page = PAGE.read_text() if PAGE.exists() else "# Audits, measured\n"
    before, _, after = page.partition(TITLE)
    _, mark, rest = after.partition("\n## ")
    PAGE.write_text(before.rstrip() + "\n\n" + section(found) + (f"{mark}{rest}" if mark else ""))


if __name__ == "__main__":
    main()
