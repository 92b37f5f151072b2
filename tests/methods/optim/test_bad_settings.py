"""Settings that no paper allows."""

from __future__ import annotations

import math

import pytest

from fedfm.core.method import Method
from fedfm.core.plan import Plan, Training
from fedfm.errors import RecipeError
from fedfm.methods.optim.feddc import FedDC
from fedfm.methods.optim.feddyn import FedDyn
from fedfm.methods.optim.fednova import FedNova
from fedfm.methods.optim.fedprox import FedProx
from fedfm.methods.optim.fedsgd import FedSGD
from fedfm.sample import Uniform
from tests.conftest import People


@pytest.mark.parametrize(
    ("kind", "name", "wrong"),
    [
        (FedProx, "mu", -1.0),
        (FedProx, "mu", math.nan),
        (FedDyn, "alpha", 0.0),
        (FedDC, "alpha", -1.0),
        (FedNova, "mu", -1.0),
        (FedSGD, "learning_rate", 0.0),
        (FedSGD, "learning_rate", math.inf),
    ],
)
def test_they_are_refused_by_name(kind: type[Method], name: str, wrong: float) -> None:
    with pytest.raises(RecipeError, match=rf"{kind.__name__} {name} must be .*, but is {wrong}"):
        kind(**{name: wrong})


def test_a_proximal_term_that_overshoots_is_refused() -> None:
    with pytest.raises(RecipeError, match="times mu below 1, but they are 2 and 1"):
        FedNova(mu=1.0).plan(Plan(People({}), Uniform(), Training(learning_rate=2.0), 1))
