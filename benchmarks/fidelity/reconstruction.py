"""Rows rebuilt from what a server reads, measured: texts and images, by what is tuned, by the batch, by what protects.

    PYTHONPATH=src:. python -m benchmarks.fidelity.reconstruction [texts] [searches] [images]

writes ``reconstruction.json`` beside this file, the section "Rebuilding rows" of ``docs/audits-measured.md`` and the
picture ``docs/reconstruction.png``; ``--page`` only these two, from the numbers that are there, and ``--only`` measures
one setting.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from benchmarks.fidelity.scenarios import headlines, minilm
from fedfm.audit import Case
from fedfm.audit.reconstruction.attribute import Attribute
from fedfm.audit.reconstruction.dlg import DLG
from fedfm.audit.reconstruction.film import FILM
from fedfm.audit.reconstruction.inverting_gradients import InvertingGradients
from fedfm.audit.reconstruction.leak import Leak
from fedfm.audit.reconstruction.reconstruction import Views
from fedfm.core.plan import Training
from fedfm.core.update import Member
from fedfm.data import Digits
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.privacy.dp_sgd import DPSGD
from fedfm.results import machine
from fedfm.secure.secagg import SecAgg
from fedfm.spaces import Full, LoRA
from fedfm.tasks import Classify, ImageClassify
from fedfm.wire import Clip, LocalGaussian, TopK

HERE = Path(__file__).parent
RESULTS = HERE / "reconstruction.json"
PAGE = HERE.parents[1] / "docs" / "audits-measured.md"
PICTURE = PAGE.with_name("reconstruction.png")
TITLE = "## Rebuilding rows"

STEP = {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
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
    "2 rows": {"rows": 2},
    "4 rows": {"rows": 4},
    "16 rows": {"rows": 16},
    "4 rows, 4 steps of 1": {"rows": 4, "training": {"max_steps": 4, "per_device_train_batch_size": 1}},
    "1 row, AdamW": {"training": {"optim": "adamw_torch", "learning_rate": 1e-3}},
    "1 row, gradient clipped": {"training": {"max_grad_norm": 0.1}},
    "1 row, the largest 10 %": {"stages": (TopK(0.1),)},
    "1 row, the largest 1 %": {"stages": (TopK(0.01),)},
    "1 row, noise of 0.001 S": {"stages": (Clip(0.1), LocalGaussian(0.001))},
    "1 row, noise of 0.1 S": {"stages": (Clip(0.1), LocalGaussian(0.1))},
    "1 row, DP-SGD with noise 1": {"privacy": DPSGD(noise_multiplier=1.0)},
    "3 clients of 1 row, summed unseen": {"secure": SecAgg()},
    "1 row, LoRA": {"space": LoRA(r=8)},
    "1 row, LoRA on all layers": {"space": "all"},
}
"""What a client does; unless said, one step of SGD on all weights."""
SEARCHED = ("1 row", "1 row, LoRA on all layers")
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
        kind: ``texts`` or ``images``.
        setting: one of :data:`SETTINGS`.
    """
    given, count = dict(setting), setting.get("rows", 1)
    given.pop("rows", None)
    found, model, task = (
        (texts(), small_minilm(), Classify(max_length=TOKENS))
        if kind != "images"
        else (images(), fresh_vit(), ImageClassify())
    )
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
        load={"num_labels": 4} if kind != "images" else None,
        **{"space": Full(), **given},
    )
    return Case(run, {"of": torch.zeros(1)})


class Kept(InvertingGradients):
    """Keeps what it rebuilt, to look at."""

    found: ClassVar[list[tuple[Leak, list[torch.Tensor]]]] = []

    def recover(self, case: Case, leak: Leak) -> tuple[list[torch.Tensor], str]:
        rows, note = super().recover(case, leak)
        self.found.append((leak, rows))
        return rows, note


def measure(kinds: Sequence[str], only: Sequence[str]) -> None:
    """Attack each setting; numbers are written down as they come.

    Args:
        kinds: what is measured.
        only: settings; all unless given.
    """
    chosen = {"texts": tuple(SETTINGS), "searches": SEARCHED, "images": DRAWN}
    for kind in kinds:
        for name in chosen[kind]:
            if only and name not in only:
                continue
            began, attacked = time.process_time(), case(kind, SETTINGS[name])
            pairs: list[Any] = []
            if kind == "images":
                Kept.found.clear()
                attack = Kept(iterations=400, restarts=2, clients=2)
                if why := attack.refusal(attacked):
                    print(f"{kind} {name}: {why}", flush=True)
                    continue
                findings = [*attack.look(attacked)]
                views = Views(attacked, [leak for leak, _ in Kept.found])
                for leak, rows in Kept.found:
                    true = [views.row(row) for row in leak.rows]
                    pairs += zip(views.matched([views.shown(row) for row in rows], true), true, strict=True)
            elif kind == "searches":
                findings = [*InvertingGradients(iterations=200, clients=2).look(attacked)]
                findings += DLG(iterations=10, restarts=1, clients=2).look(attacked)
            else:
                findings = [FILM().known(attacked), *Attribute().look(attacked)]
            spent = time.process_time() - began
            write(kind, name, [finding.to_json() for finding in findings], spent, pairs)
            told = ", ".join(f"{f.attack} {f.measure} {f.value:.2f} ({f.chance:.2f})" for f in findings)
            print(f"{kind} {name:<36} {spent:4.0f} s {told}", flush=True)


def write(kind: str, name: str, findings: Sequence[Mapping[str, Any]], seconds: float, pairs: Sequence[Any]) -> None:
    """Put a setting's numbers into the file, and images as they are shown, each (rebuilt, true), ``[H, W, C]``."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    cells = found.setdefault(kind, {})
    cells[name] = {"findings": list(findings), "processor_seconds": round(seconds, 1)}
    if pairs:
        shown = [[(image.permute(1, 2, 0) * 255).round().int().tolist() for image in pair] for pair in pairs[:MOST]]
        cells[name]["images"] = shown
    found |= {"machine": machine(), "torch": torch.__version__, "seed": SEED}
    RESULTS.write_text(json.dumps(found) + "\n")


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


def section(found: Mapping[str, Any]) -> str:
    """The section of the page."""

    def cell(findings: Sequence[Mapping[str, Any]], attack: str, name: str) -> str:
        one = next((f for f in findings if (f["attack"], f["measure"]) == (attack, name)), None)
        return "" if one is None else f"{one['value']:.2f} ({one['chance']:.2f})"

    def table(kind: str, columns: Mapping[str, tuple[str, str]]) -> list[str]:
        lines = [f"| the client's round | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
        for name, cells in found.get(kind, {}).items():
            values = [cell(cells["findings"], *which) for which in columns.values()]
            lines.append(f"| {name} | {' | '.join(values)} |")
        return [*lines, ""]

    kinds = ("texts", "searches", "images")
    seconds = {k: sum(c["processor_seconds"] for c in found.get(k, {}).values()) for k in kinds}
    examples = [
        (f["attack"], name, mine, true)
        for name, cells in found.get("searches", {}).items()
        for f in cells["findings"]
        for mine, true in f["examples"][:1]
    ]
    searched = [("inverting-gradients", "Inverting Gradients"), ("dlg", "DLG")]
    return "\n".join(
        [
            TITLE,
            "",
            "Made by `python -m benchmarks.fidelity.reconstruction`; the numbers are in",
            "[reconstruction.json](../benchmarks/fidelity/reconstruction.json), with intervals. In brackets: guessing.",
            "Unless said, a client takes one step of SGD on all weights, and the server reads its upload.",
            "",
            "### Headlines",
            "",
            f"AG News headlines of at most {TOKENS} tokens, 4 classes; the first {BLOCKS} blocks of all-minilm-l6-v2 "
            f"and a new head; {ATTACKED} clients. {seconds['texts'] + seconds['searches']:.0f} seconds of processor "
            "time.",
            "",
            *table("texts", {"words known (FILM), F1": ("film", WORDS), "label found": ("attribute", "label found")}),
            *(
                []
                if not found.get("searches")
                else [
                    "Rows looked for by their gradient, 200 evaluations at each of two clients; tokens as F1:",
                    "",
                    *table(
                        "searches",
                        {
                            f"{title}: {short}": (id, name)
                            for id, title in searched
                            for short, name in (("tokens", "tokens recovered (F1)"), ("ROUGE-L", "ROUGE-L"))
                        },
                    ),
                ]
            ),
            *(f"- {name}: `{id}` wrote “{mine}” for “{true}”." for id, name, mine, true in examples),
            "",
            "### Images",
            "",
            "Digits of scikit-learn, 8 x 8 pixels; a ViT of one block and width 96 with random weights; Inverting "
            "Gradients with 400 iterations, begun twice; two clients. PSNR in dB, SSIM at most 1. "
            f"{seconds['images']:.0f} seconds of processor time.",
            "",
            *table(
                "images",
                {"PSNR": ("inverting-gradients", "PSNR in dB"), "SSIM": ("inverting-gradients", "SSIM")},
            ),
            "![True and rebuilt digits](reconstruction.png)",
            "",
            *READING,
            "",
        ]
    )


WORDS = "words known (F1)"
READING: tuple[str, ...] = (
    "What is to be read from it, and what not: two or three clients say no more than that an attack works or does not,",
    "and settings of the script that are not in the tables were not run. That the table of token embeddings tells all",
    "words of a batch, and none where it is frozen, as with LoRA, is seen on small models in the tests",
    "(`tests/audit/test_reconstruction.py`). Images are searched for in few iterations; more may find more. Inverting",
    "Gradients needs the label, so it is refused where the last layer does not travel.",
)


def main() -> None:
    """Measure, or with ``--page`` only write the section again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=("texts", "searches", "images"))
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    if not given.page:
        torch.set_num_threads(1)
        measure(given.kinds, given.only)
    found = json.loads(RESULTS.read_text())
    images = found.get("images", {}).items()
    picture({name: cells["images"] for name, cells in images if "images" in cells}).save(PICTURE, optimize=True)
    page = PAGE.read_text() if PAGE.exists() else "# Audits, measured\n"
    before, _, after = page.partition(TITLE)
    _, mark, rest = after.partition("\n## ")
    PAGE.write_text(before.rstrip() + "\n\n" + section(found) + (f"{mark}{rest}" if mark else ""))


if __name__ == "__main__":
    main()
