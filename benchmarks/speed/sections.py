"""The parts of the page docs/speed.md: a result file in, lines of Markdown and charts out."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.speed.pictures import Bar, Line, bars, lines
from benchmarks.speed.wanted import Goal
from fedfm.report.units import figure

NAMES = {
    "plain": "plain loop",
    "trl": "TRL",
    "flower": "Flower",
    "nvflare": "NVFlare",
    "default": "",
    "sequential": "one by one",
    "reload": "",
    "one": "one worker",
}
"""Peers and their modes as people call them, where that is another word."""
STYLES = {"plain": 0, "fedfm:sequential": 3, "fedfm": 1, "trl": 2, "pfl": 4, "flower": 5, "nvflare": 6}
"""Colours of the charts."""

Result = Mapping[str, Any]
Pictures = dict[str, str]
"""SVG files by name; a part adds its own."""


def peer(name: str) -> str:
    """A peer as people call it.

    >>> peer("fedfm:sequential-bf16")
    'fedfm, one by one, bf16'
    """
    first, _, mode = name.partition(":")
    return ", ".join(said for word in (first, *mode.split("-")) if (said := NAMES.get(word, word)))


def style(name: str) -> int:
    """The colour of a peer; in another precision it has the same one."""
    return STYLES.get(name.removesuffix("-bf16"), STYLES.get(name.partition(":")[0], 0))


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table; all columns but the first are numbers."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, marks, *rows)] + [""]


def prose(*words: str) -> list[str]:
    """A paragraph."""
    return [*textwrap.wrap(" ".join(words), 120), ""]


def picture(pictures: Pictures, name: str, title: str, drawn: str) -> list[str]:
    """A chart in the page."""
    pictures[name] = drawn
    return [f"![{title}]({name}.svg)", ""]


def goal_rows(found: Sequence[Goal]) -> list[str]:
    """The table of goals: those not met first, those not measured last."""
    said = {False: "**not met**", True: "met", None: "not yet measured"}
    rows = [
        (
            goal.what,
            f"{figure(goal.value)} {goal.unit}".strip() if goal.value is not None else "–",
            f"{'at least' if goal.least else 'at most'} {goal.limit:,g} {goal.unit}".strip(),
            said[goal.met],
        )
        for goal in sorted(found, key=lambda goal: list(said).index(goal.met))
    ]
    return grid(("what", "found", "goal", ""), rows)


def real_model(result: Result, pictures: Pictures) -> Iterator[str]:
    """Peers on a real model."""
    for one in result["jobs"]:
        about, ran = one["job"], one["summary"]
        yield from prose(
            f"{about['about']}; {about['a_round']} clients a round, {about['rounds']} rounds,",
            f"{about['training'].get('max_steps')} steps of {about['training'].get('per_device_train_batch_size')}.",
        )
        rows = sorted(ran.items(), key=lambda item: item[1]["seconds_a_step"])
        drawn = [Bar(peer(n), r["seconds_a_step"], style(n), f"{r['seconds_a_step']:.3f}") for n, r in rows]
        title = "Seconds of a training step"
        yield from picture(pictures, "speed-real-model", title, bars(title, drawn, "seconds; less is better"))
        yield from grid(
            ("peer", "s a step", "least", "most", "time / plain", "start-up, s", "peak, MB", "memory / plain"),
            [
                (
                    peer(n),
                    *(f"{r[k]:.3f}" for k in ("seconds_a_step", "least", "most")),
                    figure(r.get("ratio")),
                    f"{r['startup_s']:.1f}",
                    f"{r['peak_mb']:,.0f}",
                    figure(r.get("memory_ratio")),
                )
                for n, r in rows
            ],
        )
        yield from failures(one)


def more_clients(result: Result, pictures: Pictures) -> Iterator[str]:
    """Peers on a small encoder, with more and more clients."""
    yield from prose(
        f"{result['jobs'][0]['job']['about']}; a tenth of the clients takes part in a round, of up to 8 all."
    )
    title = "Seconds of a training step, by number of clients"
    yield from by_clients(result["jobs"], pictures, "speed-more-clients", title, "seconds a step", 1)


def empty_work(result: Result, pictures: Pictures) -> Iterator[str]:
    """Peers on client work that trains nothing."""
    yield from prose("Client work that trains nothing: what is left is the engine and the way of an update.")
    for megabytes in sorted({one["job"]["megabytes"] for one in result["jobs"]}):
        jobs = [one for one in result["jobs"] if one["job"]["megabytes"] == megabytes]
        title = f"Milliseconds of a client task with an update of {f'{megabytes:g} MB' if megabytes else 'a few bytes'}"
        yield from by_clients(jobs, pictures, f"speed-empty-{megabytes:g}mb", title, "ms a task", 1000)


def by_clients(
    jobs: Sequence[Result], pictures: Pictures, name: str, title: str, unit: str, factor: float
) -> Iterator[str]:
    """A curve and a row for each peer against the number of clients.

    Args:
        jobs: one for each number of clients.
        pictures: where the chart goes.
        name: of the chart's file.
        title: of the chart.
        unit: of the readings.
        factor: from seconds to that unit.
    """
    found: dict[str, dict[int, float]] = {}
    for one in jobs:
        for n, r in one["summary"].items():
            found.setdefault(n, {})[one["job"]["clients"]] = factor * r["seconds_a_step"]
    counts = sorted({one["job"]["clients"] for one in jobs})
    curves = [Line(peer(n), style(n), sorted(points.items())) for n, points in found.items()]
    yield from picture(pictures, name, title, lines(title, curves, "clients", f"{unit}; less is better"))
    yield from grid(
        (unit, *(f"{n:,} clients" for n in counts)),
        [(peer(n), *(figure(points.get(count)) for count in counts)) for n, points in found.items()],
    )
    for one in jobs:
        yield from failures(one)


def failures(one: Result) -> Iterator[str]:
    """Who gave no result, and why."""
    seen = {f["peer"]: f["reason"].splitlines()[0] for f in one["failures"]}
    for name, reason in seen.items():
        yield from prose(f"{peer(name)} gave no result with {one['job']['clients']} clients: {reason}.")


def crowd(result: Result, pictures: Pictures) -> Iterator[str]:
    """Memory and start-up with many clients."""
    kinds = {"iid": "dealt by chance", "natural": "named by a column"}
    yield from prose(
        "Clients that are there, of which 1,000 are visited; rows are mapped from disk, model and rows not counted."
    )
    rows = result["registered"]

    def curve(kind: str, style: int, reading: str) -> Line:
        points = [(one["clients"], one[reading]) for one in rows if one["partition"] == kind]
        return Line(kinds[kind], style, sorted(points))

    for name, reading, title, unit in (
        ("speed-memory", "visited_used_mb", "Memory beyond the model, by number of registered clients", "MB"),
        ("speed-start-up", "startup_s", "Start-up, by number of registered clients", "seconds"),
    ):
        drawn = lines(title, [curve("natural", 2, reading), curve("iid", 1, reading)], "registered clients", unit)
        yield from picture(pictures, name, title, drawn)
    yield from grid(
        ("clients", "", "start-up, s", "MB before a round", "MB after a round", "round, s"),
        [
            (
                f"{one['clients']:,}",
                kinds[one["partition"]],
                *(figure(one[k]) for k in ("startup_s", "built_used_mb", "visited_used_mb", "round_s")),
            )
            for one in rows
        ],
    )
    [busy] = result["round"]
    yield from prose(
        f"A round with {busy['clients']:,} sampled clients of a tiny model takes {figure(busy['seconds'])} s,",
        f"{figure(busy['ms_a_client'])} ms a client, and {figure(busy['peak_mb'])} MB.",
    )
    update = figure(result["cohort"][0]["update_mb"])
    yield from prose(
        f"Updates of {update} MB: the server keeps a running mean, so the peak should not grow with the cohort. Fused,",
        "the clients of a group have finished before the first is read.",
    )
    yield from grid(
        ("clients that send", "", "peak, MB", "round, s"),
        [(f"{o['clients']:,}", o["engine"], figure(o["peak_mb"]), figure(o["seconds"])) for o in result["cohort"]],
    )
    yield from prose("Private tensors lie on disk, one file a client; FedIT keeps none and is what to compare with.")
    yield from grid(
        ("clients visited", "method", "on disk, MB", "in memory, MB"),
        [
            (f"{o['clients']:,}", o["method"], figure(o["kept_mb"]), figure(o["visited_used_mb"]))
            for o in result["private"]
        ],
    )


def fused(result: Result, pictures: Pictures) -> Iterator[str]:
    """The fused trainer beside the sequential one."""
    yield from grid(
        ("setting", "one by one, clients/s", "fused, clients/s", "ratio"),
        [
            (name, *(figure(row[k]) for k in ("sequential, clients/s", "fused, clients/s", "ratio")))
            for name, row in result["results"].items()
        ],
    )


def overhead(result: Result, pictures: Pictures) -> Iterator[str]:
    """The engine beside a plain loop."""
    rows = [(name.strip(), v if isinstance(v, str) else figure(v)) for name, v in result["results"].items()]
    yield from grid(("what", "found"), rows)


def seeds(result: Result, pictures: Pictures) -> Iterator[str]:
    """FedKSeed beside inference."""
    one, more = result["round"], result["more_than_inference_mb"]
    yield from prose(
        f"FedKSeed tunes all {one['model_mb'] / 4:,.0f} million parameters of SmolLM2-135M with",
        f"{one['bytes_up_a_client'] / 1000:.1f} kB up a client and round, and {more:.0f} MB more than scoring the same",
        f"rows; the largest tensor has {one['largest_tensor_mb']:.0f} MB.",
    )


def unseen(result: Result, pictures: Pictures) -> Iterator[str]:
    """Secure aggregation beside the plain mean."""
    yield from prose(
        "A round without training: seconds of the processor in one thread, of a client and of all the server's work,",
        "and what travels to and from a client beside the model. Five percent of the clients drop out, rounded up.",
        "With encryption and shares, some clients also deal the key or open the sum: the last columns. Where not all",
        "clients made their vector (see the result file), the server added those of five again and again.",
    )
    yield from ("What the protocols do: [secure-aggregation.md](secure-aggregation.md).", "")
    rows = [row for row in result["rows"] if row["dropped"]]
    for clients, megabytes in dict.fromkeys((row["clients"], row["megabytes"]) for row in rows):
        some = [row for row in rows if (row["clients"], row["megabytes"]) == (clients, megabytes)]
        yield from prose(f"{clients} clients with an update of {megabytes} MB in float32:")
        yield from grid(
            ("", "client, s", "server, s", "up, MB", "down, MB", "who deals or opens, s", "down, MB"),
            [
                (
                    row["protocol"],
                    f"{row['client_seconds']:.3f}",
                    f"{row['server_seconds']:.2f}",
                    f"{row['client_bytes_up'] / 1e6:.2f}",
                    f"{row['client_bytes_down'] / 1e6:.2f}",
                    f"{special['seconds']:.2f}" if (special := row.get("special")) else "–",
                    f"{special['opener_bytes_down'] / 1e6:.1f}" if special else "–",
                )
                for row in some
            ],
        )


def rules(result: Result, pictures: Pictures) -> Iterator[str]:
    """Robust rules beside the plain mean."""
    yield from prose(
        f"Uploads of one round, {result['clients']} clients with {result['megabytes']} MB each, {result['hostile']} of",
        "them hostile; seconds of the rule and of the mean of what it leaves, in turns with the plain mean. Factors",
        "are those of LoRA, compared by their products. Rules that try uploads on public rows come with an",
        "evaluation for each upload on top. What the rules do: [attacks.md](attacks.md).",
    )
    of: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        of.setdefault(row["rule"], {})[row["uploads"]] = row
    shapes = list(dict.fromkeys(row["uploads"] for row in result["rows"]))
    first = shapes[0]
    table = []
    for rule, found in sorted(of.items(), key=lambda item: float(item[1][first]["seconds"])):
        cells = [found.get(shape) for shape in shapes]
        told = [
            text
            for cell in cells
            for text in ((f"{cell['seconds']:.2f}", figure(cell["ratio"])) if cell else ("–", "–"))
        ]
        table.append((f"`{rule}`", *told))
    yield from grid(("", *(text for shape in shapes for text in (f"{shape}, s", "times the mean"))), table)


def card(result: Result, pictures: Pictures) -> Iterator[str]:
    """Both trainers on a CUDA card."""
    setting = result["setting"]
    yield from prose(
        f"{setting['model']}, LoRA of rank 8, {setting['steps']} steps of {setting['batch']} texts, bf16. The limit, a",
        f"product of two large bf16 matrices, is {figure(result['limit_flop_per_s'] / 1e12)} TFLOP/s.",
    )
    title = "Tokens a second on the card, by number of clients"
    curves = [
        Line(name, style, [(one["clients"], one[of]["tokens_per_s"]) for one in result["rows"]])
        for name, style, of in (("fused", 1, "fused"), ("one by one", 3, "sequential"))
    ]
    drawn = lines(title, curves, "clients", "tokens a second; more is better")
    yield from picture(pictures, "speed-card", title, drawn)
    yield from grid(
        ("clients", "one by one, tokens/s", "fused, tokens/s", "ratio", "fused, of the limit", "fused, peak MB"),
        [
            (
                str(one["clients"]),
                f"{one['sequential']['tokens_per_s']:,.0f}",
                f"{one['fused']['tokens_per_s']:,.0f}",
                figure(one["ratio"]),
                f"{one['fused']['share_of_limit']:.1%}",
                f"{one['fused']['peak_mb']:,.0f}",
            )
            for one in result["rows"]
        ],
    )


def remaining(result: Result, pictures: Pictures) -> Iterator[str]:
    """A profile."""
    yield from prose(
        f"{result['what']}. Its matrix products are {result['flop'] / 1e12:.2f} TFLOP; at the",
        f"{result['flop_per_s'] / 1e9:.0f} GFLOP/s that this machine reaches on two large float32 matrices, they alone",
        f"take {result['least_s']:.1f} s: no way of arranging the same float32 work is faster.",
    )
    parts = sorted(result["parts"], key=lambda part: -part["share"])
    title = "Where the time goes"
    drawn = bars(
        title, [Bar(p["name"], 100 * p["share"], 3, f"{p['share']:.0%}") for p in parts], "percent of the time"
    )
    yield from picture(pictures, "speed-profile", title, drawn)
    rows = [(p["name"], figure(p["seconds"]), f"{p['share']:.1%}") for p in parts]
    yield from grid(("part", "seconds", "share"), rows)
