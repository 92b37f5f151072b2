"""The outcome of a run in plain words, computed from its numbers."""

from __future__ import annotations

from fedfm.report.read import Run, better, kind
from fedfm.report.units import figure, plural

TRAINING = {"local-only": "local-only training", "centralised": "centralised training"}


def verdict(run: Run) -> str:
    """What happened, how the mean client fares, and for how many clients that holds."""
    return " ".join(filter(None, [_state(run), _change(run), _clients(run), _alone(run)]))


def _state(run: Run) -> str:
    """How the run ended, unless it ended well."""
    done, planned = len(run.rounds), run.recipe.get("rounds")
    of = f"{done} of {plural(planned, 'round')}" if planned else plural(done, "round")
    reason = f": {run.reason.rstrip('.')}." if run.reason else "."
    return {
        "completed": "",
        "failed": f"The run failed after {of}{reason}",
        "stopped": f"The run was stopped after {of}{reason}",
        "unfinished": f"The run has not finished; {of} written. It is still running, or its process ended early.",
    }[run.status]


def _change(run: Run) -> str:
    scores, metric, method = run.scores, run.primary, run.method
    if not {"base", method} <= set(scores.models):
        return "No scores before and after training to compare."
    before, after = scores.mean("base", metric), scores.mean(method, metric)
    split = "held-out" if scores.split == "test" else "validation"
    what = f"the {split} {metric.replace('_', ' ')} of the mean client"
    tuned = "model" if kind(run.recipe.get("space")) == "full" else "adapter"
    when = f"After {plural(run.scored_round, 'round')}"
    lead = f"{when} {TRAINING.get(method, f'the federated {tuned}')}"
    if before is None or after is None:
        side = "before" if before is None else "after"
        return f"{when} {what} cannot be compared: {side} training it is not a finite number."
    if figure(before) == figure(after):
        result = f"{lead} leaves {what} at {figure(after)}"
    else:
        verb = "lowers" if after < before else "raises"
        result = f"{lead} {verb} {what} from {figure(before)} to {figure(after)}"
        if not better(metric, after, before):
            result += ", which is worse than no training"
    others = [(m, scores.mean(m, metric)) for m in scores.models if m not in ("base", method)]
    told = [f"{TRAINING.get(m, m)} {'reaches ' if not i else ''}{figure(v)}" for i, (m, v) in enumerate(others)]
    told = [t if v is not None else t.replace("–", "no finite value") for t, (_, v) in zip(told, others, strict=True)]
    return f"{result}; {', '.join(told)}." if told else f"{result}."


def _clients(run: Run) -> str:
    """For how many clients the method beats no training, and training alone."""
    metric = run.primary
    after = run.scores.of(run.method, metric)
    said = []
    for other, words in (("base", "end better than they began"), ("local-only", "better than by training alone")):
        scores = run.scores.of(other, metric)
        both = [c for c in after if c in scores]
        if both and other != run.method:
            gained = sum(better(metric, after[c], scores[c]) for c in both)
            said.append(f"{gained:,} of {plural(len(both), 'client')} {words}")
    return f"{', '.join(said)}." if said else ""


def _alone(run: Run) -> str:
    """The uncomfortable case, said aloud."""
    ours, alone = run.scores.mean(run.method, run.primary), run.scores.mean("local-only", run.primary)
    if run.method != "local-only" and better(run.primary, alone, ours):
        return "Here the mean client would do better to train alone."
    return ""
