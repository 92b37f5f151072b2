"""The exception tree and the nearest name."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from fedfm import errors
from fedfm.errors import ClientError, FedfmError, LateClient, nearest


def test_the_tree_is_the_one_drawn_in_the_module() -> None:
    # Each line of the drawing is "│   └── Name   meaning": four characters for each level.
    drawn: dict[str, str] = {}
    path = ["FedfmError"]
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"([│ ]*)[├└]── (\w+)", line):
            depth = len(match[1]) // 4 + 1
            path[depth:] = [match[2]]
            drawn[match[2]] = path[depth - 1]
    defined = {
        name: cls.__bases__[0].__name__
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, FedfmError) and cls is not FedfmError
    }
    assert drawn == defined
    assert FedfmError.__bases__ == (Exception,)


def test_a_client_error_carries_where_it_happened() -> None:
    error = ClientError("no memory", client="ann", round=3, phase="local", job="Fit")
    assert str(error) == "client 'ann', round 3, task 'local', job Fit: no memory"
    assert (error.reason, error.client, error.round, error.phase, error.job) == ("no memory", "ann", 3, "local", "Fit")
    between = LateClient("late", client="ann", round=3, phase="local", job=None)
    assert str(between) == "client 'ann', round 3, task 'local', job none: late"


def test_an_error_needs_to_say_where() -> None:
    with pytest.raises(TypeError, match="client"):
        ClientError("no memory")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("learning_rte", ["learning_rate", "max_steps"], " Did you mean 'learning_rate'?"),
        ("max_step", ["learning_rate", "max_steps"], " Did you mean 'max_steps'?"),
        ("zzz", ["learning_rate", "max_steps"], ""),
        ("x", [], ""),
        ("fedavgg", {"fedavg": 1, "fedit": 2}, " Did you mean 'fedavg'?"),  # any iterable of names
        (5, ["5"], " Did you mean '5'?"),  # YAML keys may be numbers
    ],
)
def test_nearest(name: str, known: list[str], expected: str) -> None:
    assert nearest(name, known) == expected


def test_plain_errors_survive_a_process_boundary() -> None:
    for cls in (errors.BadUpdate, errors.Incompatible, errors.StoreError, errors.Stopped):
        back = pickle.loads(pickle.dumps(cls("why")))
        assert type(back) is cls
        assert str(back) == "why"
