"""CerP: the trigger within its bound, the two terms, and what hostile clients tell each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from fedfm.attack.cerp import TRIGGER, Apart, CerP, Close
from fedfm.attack.threat import Circle, Hostile, Rows
from fedfm.core import seeds, trees
from fedfm.core.jobs import Fit, Job, Loss, Scores
from fedfm.core.update import Tensors
from fedfm.errors import Incompatible, RecipeError
from fedfm.federation import Outcome
from fedfm.models import load
from fedfm.schedule.buffered import Buffered
from fedfm.spaces import LoRA
from fedfm.train import Trainer
from fedfm.train.bench import Bench
from tests.attack.world import made

SPACE = LoRA(r=2, lora_alpha=4)
COST = {"a": 1.0, "b": 1.0, "x": 0.5, "y": 0.25, "z": 2.0}


@dataclass
class Scale:
    """A trainer whose model loses so much by each word of a trigger of two, and knows what it was asked."""

    of: Mapping[str, Sequence[Mapping[str, Any]]]
    examples: list[Any] = field(default_factory=list)
    asked: list[list[str]] = field(default_factory=list)

    loaded: Any = None
    task: Any = field(default_factory=lambda: SimpleNamespace(encode=lambda rows, loaded: list(rows)))

    @property
    def data(self) -> Any:
        return SimpleNamespace(rows=lambda id, split: self.of[id])

    @contextmanager
    def given(self, client: Any, examples: list[Any], split: str = "train") -> Iterator[None]:
        self.examples = examples
        yield

    def answer(self, job: Job, client: Any) -> Scores:
        assert isinstance(job, Loss)
        self.asked.append([row["text"] for row in self.examples])
        losses = [sum(COST[word] for word in row["text"].split()[:2]) for row in self.examples]
        return Scores(torch.tensor(losses), torch.ones(len(losses), dtype=torch.long), {})


ROWS = {"p": [{"text": f"p{i}", "label": i % 2} for i in range(6)], "q": [{"text": "q0", "label": 1}]}


def tuned(**settings: Any) -> tuple[str, Scale]:
    scale = Scale(ROWS)
    threat = CerP(**{"trigger": "a b", "candidates": ("x", "y", "z"), "target": 0, **settings})
    return threat.tuned(scale, None, Loss({}), ("p", "q")), scale  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words", "asked"),
    [
        # Each word costs 1 at first. One change: a or b becomes y, the cheapest; of equals the first.
        (0, "a b", 1),
        (1, "y b", 1 + 6),
        # Then b is left, and x is the cheapest of x and z.
        (2, "y x", 1 + 6 + 2),
        # No word is changed twice.
        (3, "y x", 1 + 6 + 2),
    ],
)
def test_words_are_changed_one_by_one_up_to_the_bound(changes: int, words: str, asked: int) -> None:
    found, scale = tuned(changes=changes)
    assert found == words
    assert len(scale.asked) == asked
    assert sum(a != b for a, b in zip(found.split(), ["a", "b"], strict=True)) <= changes


def test_what_brings_no_less_loss_is_left() -> None:
    assert tuned(candidates=("z",), changes=2)[0] == "a b"
    assert tuned(trigger="y x", candidates=("a", "z"), changes=2)[0] == "y x"


def test_triggers_are_tried_on_rows_of_other_classes_from_each_client_in_turn() -> None:
    _, scale = tuned(changes=0, tries=3)
    assert scale.asked == [["a b p1", "a b q0", "a b p3"]]
    _, scale = tuned(changes=0)
    assert scale.asked == [["a b p1", "a b q0", "a b p3", "a b p5"]]


def test_with_no_row_to_try_the_trigger_stays() -> None:
    scale = Scale({"p": [], "q": []})
    assert CerP(trigger="a b").tuned(scale, None, Loss({}), ("p", "q")) == "a b"  # type: ignore[arg-type]


def pair(a: float, b: Sequence[float], grad: bool = False) -> dict[str, torch.Tensor]:
    made = {"a": torch.tensor([float(a)]), "b": torch.tensor([float(x) for x in b])}
    return {name: tensor.requires_grad_(grad) for name, tensor in made.items()}


def test_near_the_honest_model_by_hand() -> None:
    # From (1, 1, 2) to (3, 2, 4): the square root of 4 + 1 + 4.
    weights = pair(1, [1, 2], grad=True)
    term = Close(pair(3, [2, 4]), 0.5)(weights, {})
    assert float(term.detach()) == pytest.approx(1.5)
    term.backward()
    assert weights["a"].grad is not None
    assert float(weights["a"].grad) == pytest.approx(0.5 * -2 / 3)


def test_another_way_than_others_by_hand() -> None:
    # The change (3, 4, 0) against (0, 5, 0): 0.8; against (0, 0, 2): 0; against (-6, -8, 0): -1.
    start, weights = pair(1, [1, 1]), pair(4, [5, 1], grad=True)
    for others, cosine in ([pair(0, [5, 0])], 0.8), ([pair(0, [0, 2])], 0.0), ([pair(-6, [-8, 0])], -1.0):
        assert float(Apart(others, 2.0)(weights, start).detach()) == pytest.approx(2 * cosine, abs=1e-6)
    assert float(Apart([pair(0, [5, 0]), pair(-6, [-8, 0])], 1.0)(weights, start).detach()) == pytest.approx(-0.2)
    assert float(Apart([], 1.0)(weights, start).detach()) == 0.0
    Apart([pair(0, [5, 0])], 1.0)(weights, start).backward()
    # The gradient of a cosine stands across the change: (0, 1, 0) / 5 - 0.8 (3, 4, 0) / 25.
    assert weights["a"].grad is not None
    assert weights["b"].grad is not None
    assert [float(weights["a"].grad), *weights["b"].grad.tolist()] == pytest.approx([-0.096, 0.072, 0.0])


def test_the_first_step_is_not_thrown_away() -> None:
    """Nothing has changed yet: the other's direction, as if the change were a tenth as long as the other."""
    start, weights = pair(1, [1, 1]), pair(1, [1, 1], grad=True)
    term = Apart([pair(0, [5, 0])], 1.0)(weights, start)
    term.backward()
    assert float(term.detach()) == 0.0
    assert weights["b"].grad is not None
    assert weights["b"].grad.tolist() == pytest.approx([1 / 0.5, 0.0])


@pytest.fixture(scope="module")
def bench(bert_folder: Path) -> Bench:
    loaded = load(str(bert_folder), head="sequence_classification", num_labels=3)
    return Bench.of(loaded, SPACE, 0)


@dataclass(frozen=True, kw_only=True)
class Heard(CerP):
    """CerP that keeps what hostile clients told each other and what they asked for."""

    id: ClassVar[str] = "heard"

    circles: list[Circle] = field(default_factory=list, compare=False, repr=False)
    asked: list[str] = field(default_factory=list, compare=False, repr=False)

    def probe(self, rows: Rows) -> Rows:
        self.asked.append(self.trigger)
        return super().probe(rows)

    def job(self, job: Job, who: Hostile) -> Job:
        if isinstance(job, Fit) and who.rank == 0:
            self.circles.append(who.circle)
        return super().job(job, who)

    def trial(self, job: Job, circle: Circle) -> Job:
        self.circles.append(circle)
        return super().trial(job, circle)


def cerp(**settings: Any) -> Heard:
    given = {"clients": ("c1", "c3", "c4"), "share": 1.0, "target": 2, "trigger": "ab cd ef", "tries": 3, "changes": 1}
    return Heard(**{**given, "candidates": ("gh", "snow"), **settings})  # type: ignore[arg-type]


def run(bench: Bench, threat: CerP, **changes: Any) -> Outcome:
    return made(bench, SPACE, threat=threat, **changes).run()


def cosine(one: Tensors, other: Tensors) -> float:
    return sum(float((t * other[n]).sum()) for n, t in one.items()) / (trees.norm(one) * trees.norm(other))


def told(bench: Bench, **settings: Any) -> list[Tensors]:
    threat = cerp(**settings)
    run(bench, threat, rounds=1)
    [circle] = threat.circles
    return [circle.told[id] for id in circle.ids]


def test_colluders_go_other_ways_when_told_to(bench: Bench) -> None:
    without, with_it = (told(bench, alpha=0.0, beta=b) for b in (0.0, 5.0))
    pairs = ((0, 1), (0, 2), (1, 2))
    mean = [sum(cosine(changes[i], changes[j]) for i, j in pairs) / 3 for changes in (without, with_it)]
    assert mean[1] < mean[0] - 0.1
    # The first has nobody to keep away from.
    assert all(torch.equal(t, with_it[0][n]) for n, t in without[0].items())


def test_colluders_stay_near_what_they_would_have_learnt(bench: Bench) -> None:
    """With nothing poisoned that is what they learn; so the first one's change there is the honest one."""
    [honest, *_] = told(bench, alpha=0.0, beta=0.0, share=0.0)
    far = [
        trees.norm(trees.subtract(told(bench, alpha=a, beta=0.0)[0], honest)) for a in (0.0, 1.0, 100.0)
    ]  # fmt: skip
    assert far[0] > far[1] > far[2]


def test_all_learn_parts_of_one_trigger_that_is_tuned_once(bench: Bench) -> None:
    threat = cerp()
    calls: list[str] = []

    @dataclass(frozen=True, kw_only=True)
    class Counted(Heard):
        id: ClassVar[str] = "counted"

        def tuned(self, *arguments: Any) -> str:
            calls.append(super().tuned(*arguments))
            return calls[-1]

    made(bench, SPACE, threat=replace_kind(threat, Counted), rounds=2).run()
    # Once in each round, however many are hostile.
    assert len(calls) == 2
    words = calls[0].split()
    assert sum(a != b for a, b in zip(words, ["ab", "cd", "ef"], strict=True)) <= 1


def replace_kind(threat: Heard, kind: type[Heard]) -> Heard:
    """The same settings of another class."""
    return kind(**{name: getattr(threat, name) for name in ("clients", "share", "target", "trigger", "tries",
                                                             "changes", "candidates")})  # fmt: skip


def test_success_is_counted_with_the_trigger_that_is_tuned_to_the_model(bench: Bench) -> None:
    threat = cerp()
    federation = made(bench, SPACE, threat=threat, rounds=1)
    state = federation.run().state
    threat.circles.clear()
    threat.asked.clear()
    success = federation.probe(state)
    circle = threat.circles[-1]
    assert circle.told[TRIGGER] != "ab cd ef"
    # Of the two honest clients, after triggers were tried out.
    assert threat.asked[-1] == threat.asked[-2] == circle.told[TRIGGER]
    plain = made(bench, SPACE, threat=cerp(trigger=circle.told[TRIGGER], changes=0))
    assert success == plain.probe(state)
    assert success is not None
    assert 0 <= success <= 1


def test_a_resumed_run_is_the_uninterrupted_one_and_engines_agree(bench: Bench, tmp_path: Path) -> None:
    whole = run(bench, cerp(beta=1.0))
    part = made(bench, SPACE, threat=cerp(beta=1.0))

    class Stop:
        def round_finished(self, record: dict[str, Any]) -> None:
            if record["round"] == 1:
                part.stop()

        def __getattr__(self, name: str) -> Any:
            return lambda *a, **k: None

    part.run(tmp_path / "part", observers=[Stop()])
    resumed = made(bench, SPACE, threat=cerp(beta=1.0)).run(tmp_path / "part", resume=True)
    alone = run(bench, cerp(beta=1.0), engine=Trainer)
    for name, tensor in whole.state.weights.items():
        assert torch.equal(tensor, resumed.state.weights[name])
        assert torch.allclose(tensor, alone.state.weights[name], atol=1e-5)


def test_what_was_told_by_those_who_come_later_is_not_heard(bench: Bench) -> None:
    """A task may be begun again when others have worked already: it gives the same once more."""
    threat, federation = cerp(beta=5.0, share=0.5), made(bench, SPACE, threat=cerp())
    assert federation.attack is not None
    circle = Circle(("c1", "c3", "c4"))
    client = SimpleNamespace(member=SimpleNamespace(id="c3", profile={}), round=1, space=federation.layout)
    who = Hostile("c3", 1, 3, 3, seeds.generator(0), circle)
    job = threat.job(Fit(federation.layout.initial), who)
    trainer = federation.trainer
    first = trainer.answer(job, client).tensors  # type: ignore[arg-type]
    circle.told["c4"] = circle.told["c3"]
    again = trainer.answer(job, client).tensors  # type: ignore[arg-type]
    assert all(torch.equal(t, again[n]) for n, t in first.items())
    circle.told["c1"] = circle.told["c3"]
    third = trainer.answer(job, client).tensors  # type: ignore[arg-type]
    assert not all(torch.equal(t, third[n]) for n, t in first.items())


def test_jobs_on_other_rows_stay_as_they_are() -> None:
    who = Hostile("c1", 0, 2, 3, seeds.generator(0))
    for job in (Fit({}, split="public"), Loss({})):
        assert CerP().job(job, who) is job
    assert CerP().trial(Fit({}), Circle()).__class__ is Fit


def test_where_it_cannot_be(bench: Bench) -> None:
    with pytest.raises(Incompatible, match="Heard looks at the uploads of a whole round, but Buffered takes them one"):
        made(bench, SPACE, threat=cerp(), schedule=Buffered(buffer=2))
    [dropped] = run(bench, cerp(clients=("c1",)), rounds=1).records[1]["dropped"]
    assert dropped["client"] == "c1"
    assert "Heard splits its trigger among hostile clients, but there is only one. Use badnets, or" in dropped["reason"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"changes": -1}, "CerP changes must be at least 0, but is -1."),
        ({"candidates": ()}, "CerP candidates must be single words, at least one, but is ()."),
        ({"candidates": ("a b",)}, "CerP candidates must be single words, at least one, but is ('a b',)."),
        ({"tries": 0}, "CerP tries must be at least 1, but is 0."),
        ({"alpha": -1.0}, "CerP alpha must be at least 0 and finite, but is -1.0."),
        ({"beta": math.inf}, "CerP beta must be at least 0 and finite, but is inf."),
        ({"trigger": "cf"}, "CerP trigger must be at least two words, but is 'cf'."),
    ],
)
def test_settings_that_mean_nothing(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        CerP(**wrong)
    assert str(caught.value) == words


def test_defaults_are_those_of_the_authors_code() -> None:
    threat = CerP()
    assert (threat.alpha, threat.beta, threat.share) == (1e-4, 1e-4, 5 / 64)
    assert replace(threat, beta=1.0).knowledge == "colluding"
