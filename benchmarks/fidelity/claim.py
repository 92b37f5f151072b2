"""What is claimed of a method, and the rule by which it counts as shown: fixed before any run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Score = dict[str, Any]
"""Metrics and costs of one run; ``None`` for what is not finite."""


@dataclass(frozen=True)
class Verdict:
    """What came of it.

    Args:
        difference: mean over seeds of how much better the method's metric is; ``None`` when a run diverged.
        standard_error: of that mean; ``None`` with one seed.
        bytes_up_ratio: bytes that the method's clients send over those of the baseline's.
        claim_shown: whether the claim shows by its rule.
    """

    difference: float | None
    standard_error: float | None
    bytes_up_ratio: float | None
    claim_shown: bool


@dataclass(frozen=True)
class Claim:
    """A claim in a scenario. Arguments of ``Federation`` are in the spelling of recipes.

    Args:
        sentence: what the paper says, in a sentence.
        scenario: where it is tried.
        run: arguments of the method's run; the method of the claim's own id unless named.
        against: arguments of the baseline's run; fedavg unless named.
        both: arguments of both.
        metric: ``accuracy``, ``loss`` or ``wer`` (word error rate) over all test rows, or ``mean ...`` over clients
            that count the same; ``attack_success``, of threats that want an answer; ``told`` or ``traced``, of marks.
        expect: the method is better or worse by more than the standard error, or near: not worse by more than
            ``within``.
        within: in units of the metric.
        bytes_up: clients send at most this share of what the baseline's clients send; ``None`` asks nothing.
        note: the likely reason if it does not show.
    """

    sentence: str
    scenario: str = "agnews"
    run: Mapping[str, Any] = field(default_factory=dict)
    against: Mapping[str, Any] = field(default_factory=dict)
    both: Mapping[str, Any] = field(default_factory=dict)
    metric: str = "accuracy"
    expect: Literal["better", "worse", "near"] = "better"
    within: float = 0.0
    bytes_up: float | None = None
    note: str = "The budget is small: a few rounds of a small model, where all methods are still close together."

    @property
    def lower(self) -> bool:
        """Whether less of the metric is better."""
        return self.metric.removeprefix("mean ") in ("loss", "wer", "attack_success")

    @property
    def rule(self) -> str:
        """When the claim counts as shown."""
        words = {
            "better": "paired difference above its standard error",
            "worse": "paired difference below minus its standard error",
            "near": f"paired difference at least -{self.within:g}",
        }[self.expect]
        return words + (f"; bytes up at most {self.bytes_up:g} of the baseline's" if self.bytes_up is not None else "")

    def judge(self, method: Sequence[Score], baseline: Sequence[Score]) -> Verdict:
        """Apply the rule to runs with the same seeds, $d_s = m_s - b_s$ (its negative where less is better)."""
        sent = sum(r["bytes_up"] for r in baseline)
        ratio = sum(r["bytes_up"] for r in method) / sent if sent else None
        pairs = [(m[self.metric], b[self.metric]) for m, b in zip(method, baseline, strict=True)]
        if any(m is None or b is None for m, b in pairs):
            return Verdict(None, None, ratio, False)
        gains = [(b - m) if self.lower else (m - b) for m, b in pairs]
        mean = statistics.fmean(gains)
        error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
        shown = {
            "better": error is not None and mean > error,
            "worse": error is not None and mean < -error,
            "near": len(gains) > 1 and mean >= -self.within,
        }[self.expect]
        if self.bytes_up is not None:
            shown = shown and ratio is not None and ratio <= self.bytes_up
        return Verdict(mean, error, ratio, shown)
