"""Live progress on the terminal: one bar over all runs with the time that is left, one line a round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedfm.observe.observer import Observer


class TerminalProgress(Observer):
    """Shared by the runs that follow each other.

    Args:
        console: where to write; standard error, so that results on standard output stay clean.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("[dim]{task.completed:.0f}/{task.total:.0f} steps[/]"),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/]"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=0)
        self._planned = 0.0
        self._name = ""
        self._rounds = 0

    def planned(self, steps: float) -> None:
        self._planned = steps
        self._bar.update(self._task, total=steps)

    def started(self, name: str, rounds: int, done: int, steps: float) -> None:
        self._name, self._rounds = name, rounds
        left = rounds - done
        if not self._planned:
            self._bar.update(self._task, total=steps)
        elif done and rounds:
            # Steps of rounds that a checkpoint holds are not waited for.
            self._planned -= steps / left * done if left else 0
            self._bar.update(self._task, total=self._planned)
        self._bar.start()
        self._describe(done)
        if done:
            self.console.print(f"{name}: going on after round {done} of {rounds}", highlight=False)

    def stepped(self, steps: int) -> None:
        self._bar.advance(self._task, steps)

    def round_finished(self, record: Mapping[str, Any]) -> None:
        self._describe(record["round"])
        self.console.print(line(self._name, self._rounds, record), highlight=False)

    def finished(self, status: str) -> None:
        self._bar.stop()

    def _describe(self, done: int) -> None:
        now = min(done + 1, self._rounds)
        self._bar.update(self._task, description=f"{self._name} round {now}/{self._rounds}")


def line(name: str, rounds: int, record: Mapping[str, Any]) -> str:
    """A round in one line."""
    words = [f"[bold]{name:<12}[/] round {record['round']:>3}/{rounds}"]
    if record.get("train_loss") is not None:
        words.append(f"train {record['train_loss']:.3f}")
    if scores := record.get("validation"):
        words += [f"{key} {_number(scores['mean'][key])}" for key in scores["mean"] if key != "perplexity"][:2]
        words.append(f"worst tenth {_number(scores['worst_decile'])}")
    if record.get("bytes_up") or record.get("bytes_down"):
        words.append(f"up {size(record['bytes_up'])} down {size(record['bytes_down'])}")
    words.append(f"{record['seconds']:.1f} s")
    dropped = [escape(f"dropped {d['client']}: {d['reason']}") for d in record.get("dropped", [])[:3]]
    words += [f"[red]{one}[/]" for one in dropped]
    return "  ".join(words)


def size(count: float) -> str:
    """Bytes in the unit that fits.

    >>> size(1_234_567)
    '1.2 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"
