"""Client work, one job after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from fedfm.core.client import View, work
from fedfm.core.jobs import Call, Fit, Fitted, Job, Loss, Scores
from fedfm.core.method import Client, Method, Work
from fedfm.core.update import Kind, Member, Tensors, Update
from fedfm.errors import ClientError, DataError, LateClient, Stopped


@dataclass(frozen=True)
class Two(Method):
    """Asks two things and adds up the answers."""

    phases: ClassVar[tuple[str, ...]] = ("local", "other")

    def local(self, client: Client, message: Tensors) -> Work:
        first = yield Call(function=lambda rows, draw: len(rows))
        second = yield Call(function=lambda rows, draw: len(rows), split="validation")
        client.keep({"seen": torch.tensor(float(first))})
        return Update({"sum": message["w"] + first + second}, weight=client.member.examples)

    def other(self, client: Client, message: Tensors) -> Work:
        yield Loss({})
        raise ZeroDivisionError("a defect of the method")

    def silent(self, client: Client, message: Tensors) -> Work:
        return Update({"own": client.private["p"]})
        yield


def view(**changes: Any) -> View:
    return View(Member("ann", 5), 3, **changes)


def test_jobs_are_answered_in_turn_and_the_return_value_is_the_update() -> None:
    asked: list[tuple[type[Job], str, str]] = []

    def answer(job: Job, client: View) -> int:
        assert isinstance(job, Call)
        asked.append((type(job), job.split, client.member.id))
        return {"train": 10, "validation": 20}[job.split]

    client = view()
    update = work(Two(), "local", client, {"w": torch.tensor(1.0)}, answer)
    assert asked == [(Call, "train", "ann"), (Call, "validation", "ann")]
    assert update.tensors["sum"].item() == 31.0  # 1 + 10 + 20
    assert update.weight == 5
    assert client.kept is not None
    assert client.kept["seen"].item() == 10.0
    assert client.private == {}  # what is kept is for later rounds


def test_a_task_may_ask_nothing() -> None:
    def answer(job: Job, client: View) -> None:
        pytest.fail("no job was asked for")

    update = work(Two(), "silent", view(private={"p": torch.tensor([4.0])}), {}, answer)
    assert update.tensors["own"].tolist() == [4.0]


def test_an_error_while_a_job_is_answered() -> None:
    cause = RuntimeError("out of order")

    def answer(job: Job, client: View) -> None:
        raise cause

    with pytest.raises(ClientError) as caught:
        work(Two(), "local", view(), {}, answer)
    error = caught.value
    assert str(error) == "client 'ann', round 3, task 'local', job Call: RuntimeError: out of order"
    assert (error.client, error.round, error.phase, error.job) == ("ann", 3, "local", "Call")
    assert error.reason == "RuntimeError: out of order"
    assert error.__cause__ is cause
    assert not isinstance(error, LateClient)


def test_an_error_of_fedfm_keeps_its_own_words() -> None:
    def answer(job: Job, client: View) -> None:
        raise DataError("the column 'text' is missing")

    with pytest.raises(ClientError) as caught:
        work(Two(), "local", view(), {}, answer)
    assert caught.value.reason == "the column 'text' is missing"
    assert isinstance(caught.value.__cause__, DataError)


def test_an_error_before_the_first_job() -> None:
    with pytest.raises(ClientError) as caught:
        work(Two(), "silent", view(), {}, lambda job, client: None)
    assert caught.value.job is None
    assert str(caught.value) == "client 'ann', round 3, task 'silent', job none: KeyError: 'p'"


def test_an_error_of_the_method_is_wrapped_too() -> None:
    with pytest.raises(ClientError, match=r"task 'other'.*ZeroDivisionError: a defect of the method") as caught:
        work(Two(), "other", view(), {}, lambda job, client: None)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_between_jobs_no_job_is_named() -> None:
    class Careless(Method):
        def local(self, client: Client, message: Tensors) -> Work:
            yield Call()
            raise ValueError("after the answer")

    with pytest.raises(ClientError, match="task 'local', job none: ValueError: after the answer") as caught:
        work(Careless(), "local", view(), {}, lambda job, client: 1)
    assert caught.value.job is None


def test_a_stray_stop_iteration_of_a_trainer_is_an_error_and_no_return() -> None:
    def answer(job: Job, client: View) -> Any:
        return next(iter(()))

    with pytest.raises(ClientError, match="job Call: StopIteration") as caught:
        work(Two(), "local", view(), {}, answer)
    assert isinstance(caught.value.__cause__, StopIteration)


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ClientError, match="task 'nosuch', job none: AttributeError"):
        work(Two(), "nosuch", view(), {}, lambda job, client: None)


def test_a_deadline_becomes_a_late_client() -> None:
    def answer(job: Job, client: View) -> None:
        raise TimeoutError("late: 9 s are more than the 5 s allowed")

    with pytest.raises(LateClient) as caught:
        work(Two(), "local", view(), {}, answer)
    assert caught.value.reason == "late: 9 s are more than the 5 s allowed"
    assert (caught.value.client, caught.value.job) == ("ann", "Call")
    assert isinstance(caught.value.__cause__, TimeoutError)


@pytest.mark.parametrize("error", [Stopped("stopped by the user"), KeyboardInterrupt()])
def test_a_stop_passes_through_as_it_is(error: BaseException) -> None:
    def answer(job: Job, client: View) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        work(Two(), "local", view(), {}, answer)
    assert caught.value is error


def test_the_default_method_sends_the_change_and_its_numbers() -> None:
    message = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([2.0])}

    def answer(job: Job, client: View) -> Fitted:
        assert isinstance(job, Fit)
        assert job.train == ("*",)
        return Fitted({name: t + 0.5 for name, t in job.tensors.items()}, steps=4, examples=8, loss=1.25)

    client = view()
    update = work(Method(), "local", client, message, answer)
    assert {n: t.tolist() for n, t in update.tensors.items()} == {"a": [0.5, 0.5], "b": [0.5]}
    assert dict(update.metrics) == {"loss": 1.25, "steps": 4, "examples": 8}
    assert (update.weight, update.kind) == (5, Kind.DELTA)
    assert client.kept is None
    assert message["a"].tolist() == [1.0, 1.0]


def test_what_is_trained_but_not_shared_stays_with_the_client() -> None:
    class Half(Method):
        train = ("lora_A", "lora_B")
        share = ("lora_A",)

    seen: list[dict[str, list[float]]] = []

    def answer(job: Job, client: View) -> Fitted:
        seen.append({n: t.tolist() for n, t in job.tensors.items()})
        return Fitted({**{n: t + 1 for n, t in job.tensors.items()}, "bias": torch.ones(1)}, 1, 1, 0.0)

    client = view(private={"x.lora_B": torch.tensor([7.0])})
    update = work(Half(), "local", client, {"x.lora_A": torch.tensor([1.0])}, answer)
    assert seen == [{"x.lora_B": [7.0], "x.lora_A": [1.0]}]
    assert {n: t.tolist() for n, t in update.tensors.items()} == {"x.lora_A": [1.0]}
    assert client.kept is not None
    assert {n: t.tolist() for n, t in client.kept.items()} == {"x.lora_B": [8.0]}


@pytest.mark.parametrize(("phase", "split"), [("validate", "validation"), ("test", "test")])
def test_scoring_sends_tallies_weighted_by_the_examples_of_the_split(phase: str, split: str) -> None:
    def answer(job: Job, client: View) -> Scores:
        assert isinstance(job, Loss)
        assert job.split == split
        return Scores(torch.zeros(6), torch.ones(6), {"loss": torch.tensor(9.0)})

    update = work(Method(), phase, view(), {}, answer)
    assert update.tensors["loss"].item() == 9.0
    assert (update.weight, update.kind) == (6, Kind.KNOWLEDGE)


def test_keeping_replaces_what_was_kept() -> None:
    client = view()
    given = {"a": torch.ones(1)}
    client.keep(given)
    given["later"] = torch.ones(1)
    assert client.kept is not None
    assert list(client.kept) == ["a"]
    client.keep({"b": torch.ones(1)})
    assert list(client.kept) == ["b"]
