"""What a deployed round costs beside the clients' own work: at home, deployed, and by Flower itself.

    python -m benchmarks.deploy.seam                       # all, some minutes; writes results/seam.json
    python -m benchmarks.deploy.seam empty --rounds 4

- empty: a round in which next to nothing is computed: a Llama of one block and width 16, one step on one row, no
  evaluation. Flower's clients send back 256 numbers as they came and import nothing.
- demo: the model, adapter, rows and steps of the demo's recipe, of three of its clients, no evaluation.

Everybody has the same clients, batches and first values; on the demo the losses of all must agree. Rounds are timed by
each side's own record: ``metrics.jsonl``, and Flower's strategy from its messages to its mean. The first round, in
which fedfm's sites load the model, stands apart; what counts is the median of the others.

``own`` is the clients' own work in a round: the sum at home, where they come one after another; the longest when they
work at the same time; of Flower with loading the model, which its client does in each message. ``beyond`` is the rest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.deploy import commands, flower
from benchmarks.deploy.commands import RESULTS, SITES, Done, about, rounds
from benchmarks.speed.compare import TOLERANCE
from benchmarks.speed.prepare import job, small_llama
from benchmarks.speed.sections import grid
from fedfm.store.files import write_json

LORA = ("r", "lora_alpha", "layers_to_transform")
"""Settings of the demo's adapter."""


def empty(folder: Path, count: int) -> dict[str, Any]:
    """Rounds in which next to nothing is computed."""
    small_llama(folder / "model")
    rows = [{"text": f"row {i}", "holder": f"site-{i % SITES + 1}"} for i in range(2 * SITES)]
    recipe = {
        "model": str(folder / "model"),
        "method": "fedit",
        "space": {"kind": "lora", "r": 1},
        "task": "causal-lm",
        "training": {"max_steps": 1, "per_device_train_batch_size": 1, "bf16": False},
        **alike(folder, rows, count),
    }
    return measured(folder, recipe, count, lambda place: flower.run(place, "empty", count))


def demo(folder: Path, count: int) -> dict[str, Any]:
    """The demo's work."""
    from fedfm import Chat, load
    from fedfm.data import Chatterbot, Natural, federate

    whole = yaml.safe_load((commands.ROOT / "recipes" / "demo.yaml").read_text())
    data = whole["data"]
    people = federate(
        Chatterbot(tuple(data["source"]["languages"])),
        Natural(data["partition"]["column"]),
        min_examples=data["min_examples"],
        max_examples=data["max_examples"],
    )
    held = {
        id: [{"messages": row["messages"]} for row in people.rows(id, "train")] for id in sorted(people.ids)[:SITES]
    }
    task, training = Chat(max_length=whole["task"]["max_length"]), {**whole["training"]}
    # peft's own choice for this architecture, which is also that of the recipe.
    lora = {**{name: whole["space"][name] for name in LORA}, "target_modules": ["q_proj", "v_proj"]}
    made = job(
        folder, "chat", load(whole["model"]), held, task, lora, training, count, SITES, "the demo's work at three sites"
    )
    (folder / "job.json").write_text(json.dumps(made))
    rows = [{**row, "holder": id} for id, own in held.items() for row in own]
    recipe = {
        **{key: whole[key] for key in ("method", "task")},
        "model": str(folder / "model"),
        "space": {"kind": "lora", **lora},
        "training": {**training, "bf16": False},
        **alike(folder, rows, count),
    }
    return measured(folder, recipe, count, lambda place: flower.run(place, "chat", count, folder))


def alike(folder: Path, rows: Sequence[Mapping[str, Any]], count: int) -> dict[str, Any]:
    """What both recipes have: rows from a file, all of them to train on, and nothing beside training."""
    place = folder / "rows.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "data": {
            "source": {"kind": "file", "path": str(place)},
            "partition": {"kind": "natural", "column": "holder"},
            "splits": {"validation": 0, "test": 0, "group_by": ""},
        },
        "rounds": count,
        "evaluation": {"every": 0},
        "samples": 0,
    }


def measured(
    folder: Path, recipe: Mapping[str, Any], count: int, by_flower: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """The same work by all, one after another.

    Args:
        folder: where everything is written.
        recipe: of fedfm's side.
        count: rounds.
        by_flower: does Flower's side in a folder.
    """
    place = folder / "recipe.yaml"
    place.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
    one_by_one = ["engine=sequential"]
    found = {
        "home": of_run(commands.home(place, folder / "home", one_by_one), sum),
        "home, fused": of_run(commands.home(place, folder / "fused"), sum),
        "deployed": of_run(commands.deployed(place, folder / "f", one_by_one), max),
    }
    try:
        found["flower"] = of_flower(by_flower(folder / "w"))
    except flower.Failed as error:
        found["flower"] = {"failure": str(error)}
    return {"rounds": count, "steps": recipe["training"]["max_steps"], "sides": found}


def of_run(done: Done, together: Callable[[list[float]], float]) -> dict[str, Any]:
    """Rounds of a run of fedfm.

    Args:
        done: the run.
        together: what the clients' own seconds come to in a round.
    """
    if not done.good:
        return {"failure": done.said}
    records = rounds(done.records())
    if lost := [d["reason"] for record in records for d in record["dropped"]]:
        return {"failure": f"a client was dropped: {lost[0]}"}
    work = [[client["seconds"] for client in record["participants"].values()] for record in records]
    losses = [[client["loss"] for client in record["participants"].values()] for record in records]
    found = summary(
        [record["seconds"] for record in records], list(map(together, work)), list(map(statistics.fmean, losses))
    )
    return {**found, "wall_s": done.wall_s, "peak_mb": done.peak_mb}


def of_flower(found: Mapping[str, Any]) -> dict[str, Any]:
    """Rounds of Flower's run."""
    seen = [one["clients"] for one in found["rounds"]]
    own = [max(client["load_s"] + client["train_s"] for client in clients) for clients in seen]
    losses = [statistics.fmean(client["loss"] for client in clients) for clients in seen]
    return {
        **summary([one["seconds"] for one in found["rounds"]], own, losses),
        "load_s": statistics.median(client["load_s"] for clients in seen for client in clients),
        **{name: found[name] for name in ("versions", "wall_s", "peak_mb")},
    }


def summary(seconds: Sequence[float], own: Sequence[float], losses: Sequence[float]) -> dict[str, Any]:
    """The first round, and medians of the others."""
    return {
        "seconds": list(seconds),
        "own": list(own),
        "losses": list(losses),
        "first_s": seconds[0],
        "round_s": statistics.median(seconds[1:]),
        "own_s": statistics.median(own[1:]),
        "beyond_s": statistics.median(whole - part for whole, part in zip(seconds[1:], own[1:], strict=True)),
    }


def strangers(found: Mapping[str, Any]) -> list[str]:
    """Sides that failed, or whose losses are not those of the run at home."""
    sides = found["sides"]
    bad = [f"{name}: {side['failure']}" for name, side in sides.items() if "failure" in side]
    reference = sides["home"].get("losses", [])
    for name, side in sides.items():
        pairs = list(zip(side.get("losses", []), reference, strict=False))
        far = max((abs(a - b) / abs(b) for a, b in pairs if a and b), default=0.0)
        if far > TOLERANCE["fp32"]:
            bad.append(f"{name}: losses {side['losses']} are not those of the run at home, {reference}")
    return bad


def table(what: str, found: Mapping[str, Any]) -> list[str]:
    """The medians."""
    rows = [
        (name, *(f"{side[key]:.2f}" for key in ("round_s", "own_s", "beyond_s", "first_s")), f"{side['peak_mb']:.0f}")
        for name, side in found["sides"].items()
        if "failure" not in side
    ]
    return grid((what, "s a round", "own", "beyond", "first round", "peak MB"), rows)


WORK = {"empty": empty, "demo": demo}


def main(words: Sequence[str] | None = None) -> int:
    """The command. Returns 1 when a side failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deploy.seam")
    parser.add_argument("work", nargs="*", help=f"of {', '.join(WORK)}; by default all, and only then written")
    parser.add_argument("--rounds", type=int, default=6, help="at least 4, as the first does not count")
    parser.add_argument("--out", type=Path, help="result file; by default results/seam.json when all is measured")
    asked = parser.parse_args(words)
    wanted = asked.work or list(WORK)
    if asked.rounds < 4 or not set(wanted) <= WORK.keys():
        parser.error(f"work is of {', '.join(WORK)}, and there must be at least 4 rounds.")
    found = {}
    for name in wanted:
        with tempfile.TemporaryDirectory(prefix="fedfm-") as scratch:
            found[name] = WORK[name](Path(scratch), asked.rounds)
        print("\n".join(table(name, found[name])), flush=True)
    if out := asked.out or (None if asked.work else RESULTS / "seam.json"):
        write_json(out, {**about(), "work": found})
    bad = [f"{name}, {why}" for name, one in found.items() for why in strangers(one)]
    print("\n".join(bad), file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    commands.ends_with_what_it_started()
    sys.exit(main())
