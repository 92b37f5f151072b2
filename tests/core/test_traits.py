"""What composes with what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest

from fedfm.core.method import Method
from fedfm.core.traits import NONE, Part, Trait, Traits, check
from fedfm.errors import Incompatible, RecipeError
from fedfm.rules.add import Add
from fedfm.sample.uniform import Uniform
from fedfm.wire.clip import Clip


class Krum(Part):
    """A screen: reads single uploads."""

    needs: ClassVar[Traits] = frozenset({Trait.VISIBLE, Trait.ALIGNED})
    breaks: ClassVar[Traits] = frozenset({Trait.UNIFORM})


class SecAgg(Part):
    """Hides single uploads."""

    needs: ClassVar[Traits] = frozenset({Trait.LINEAR, Trait.ALIGNED, Trait.DENSE})
    breaks: ClassVar[Traits] = frozenset({Trait.VISIBLE})
    instead: ClassVar[Mapping[Trait, str]] = {Trait.VISIBLE: "Use a norm bound in place of the screen."}


class TopK(Part):
    """Clients choose coordinates."""

    breaks: ClassVar[Traits] = frozenset({Trait.DENSE})


class LocalNoise(Part):
    """Unbounded noise on each upload."""

    needs: ClassVar[Traits] = frozenset({Trait.BOUNDED})
    breaks: ClassVar[Traits] = frozenset({Trait.BOUNDED})
    instead: ClassVar[Mapping[Trait, str]] = {Trait.BOUNDED: "Put Clip before it."}


class Median(Part):
    """Not a mean."""

    needs: ClassVar[Traits] = frozenset({Trait.LINEAR, Trait.VISIBLE, Trait.ALIGNED, Trait.DENSE})
    breaks: ClassVar[Traits] = frozenset({Trait.LINEAR})


@dataclass(frozen=True)
class Personal(Method):
    """Keeps state on clients, and says so."""

    traits: ClassVar[Traits] = Method.traits - {Trait.FORGETFUL}


@dataclass(frozen=True)
class Reader(Method):
    """Its combine reads single uploads."""

    needs: ClassVar[Traits] = frozenset({Trait.VISIBLE})
    instead: ClassVar[Mapping[Trait, str]] = {Trait.VISIBLE: "Choose FedAvg, which needs only the mean."}


@dataclass(frozen=True)
class Bare(Method):
    """Promises nothing."""

    traits: ClassVar[Traits] = NONE


ALL = frozenset(Trait) - {Trait.BOUNDED, Trait.UNIFORM, Trait.ANY_RANK}


def message(method: Method, *parts: Part) -> str:
    with pytest.raises(Incompatible) as caught:
        check(method, parts)
    assert isinstance(caught.value, RecipeError)
    return str(caught.value)


def test_the_method_alone_is_one_line() -> None:
    (line,) = check(Method(), [])
    assert (line.part, line.needs, line.breaks, line.gives, line.after) == ("Method", NONE, NONE, ALL, ALL)


def test_what_holds_after_each_part() -> None:
    lines = check(Method(), [Uniform(), Clip(1.0), LocalNoise(), SecAgg(), Add()])
    assert [line.part for line in lines] == ["Method", "Uniform", "Clip", "LocalNoise", "SecAgg", "Add"]
    assert [line.after for line in lines] == [
        ALL,
        ALL,
        ALL | {Trait.BOUNDED, Trait.UNIFORM},  # Clip gives both
        ALL | {Trait.UNIFORM},  # the noise takes the bound away
        (ALL | {Trait.UNIFORM}) - {Trait.VISIBLE},
        (ALL | {Trait.UNIFORM}) - {Trait.VISIBLE},
    ]
    assert lines[2].gives == {Trait.BOUNDED, Trait.UNIFORM}
    assert lines[3].needs == lines[3].breaks == {Trait.BOUNDED}


def test_a_screen_behind_secure_aggregation_is_refused_with_the_takers_advice() -> None:
    assert message(Method(), SecAgg(), Krum()) == (
        "Krum needs VISIBLE (the server can read each client's upload), which SecAgg takes away. "
        "Use a norm bound in place of the screen."
    )


def test_order_matters() -> None:
    assert check(Method(), [Krum(), SecAgg()])[-1].after == ALL - {Trait.VISIBLE}
    assert check(Method(), [SecAgg(), TopK()])[-1].after == ALL - {Trait.VISIBLE, Trait.DENSE}
    assert message(Method(), TopK(), SecAgg()) == (
        "SecAgg needs DENSE (no client leaves out coordinates of its own choice), which TopK takes away. "
        "Leave SecAgg out."
    )


def test_a_trait_that_nobody_gives_is_asked_of_the_method() -> None:
    assert message(Method(), LocalNoise()) == (
        "LocalNoise needs BOUNDED (the norm of every upload is known to be bounded), which Method does not promise. "
        "Put Clip before it."
    )
    assert check(Method(), [Clip(1.0), LocalNoise()])[-1].after == ALL | {Trait.UNIFORM}
    assert "Clip" not in message(Method(), LocalNoise(), Clip(1.0)).split(". ")[0]  # too late: Clip stands behind it


def test_a_trait_given_back_holds_again_and_the_last_taker_is_named() -> None:
    assert check(Method(), [Clip(1.0), LocalNoise(), Clip(2.0), LocalNoise()])[-1].after == ALL | {Trait.UNIFORM}
    text = message(Method(), Clip(1.0), LocalNoise(), LocalNoise())
    assert "LocalNoise needs BOUNDED" in text
    assert "which LocalNoise takes away" in text


def test_what_a_part_gives_holds_although_it_breaks_the_same() -> None:
    class Rebound(LocalNoise):
        """Takes the old bound away and gives one of its own."""

        gives: ClassVar[Traits] = frozenset({Trait.BOUNDED})

    assert Trait.BOUNDED in check(Method(), [Clip(1.0), Rebound(), LocalNoise()])[2].after


def test_the_parts_own_advice_goes_before_the_takers() -> None:
    class Screen(Krum):
        instead: ClassVar[Mapping[Trait, str]] = {Trait.VISIBLE: "Screen on the clients."}

    text = message(Method(), SecAgg(), Screen())
    assert text.endswith("which SecAgg takes away. Screen on the clients.")


def test_the_first_trait_in_order_of_definition_is_reported() -> None:
    # Median needs LINEAR, VISIBLE, ALIGNED and DENSE; a bare method has none of them.
    assert message(Bare(), Median()).startswith("Median needs LINEAR (")
    # After SecAgg and TopK it lacks VISIBLE and DENSE; VISIBLE is defined first.
    assert message(Method(), SecAgg(), TopK(), Median()).startswith("Median needs VISIBLE (")


def test_a_method_whose_own_need_is_broken_names_itself_and_the_taker() -> None:
    assert check(Reader(), [Krum()])[0].needs == {Trait.VISIBLE}
    assert message(Reader(), SecAgg()) == (
        "Reader needs VISIBLE (the server can read each client's upload), which SecAgg takes away. "
        "Choose FedAvg, which needs only the mean."
    )


def test_without_advice_a_broken_method_stays_and_the_taker_goes() -> None:
    class Bitten(Method):
        needs: ClassVar[Traits] = frozenset({Trait.DENSE})

    assert message(Bitten(), TopK()) == (
        "Bitten needs DENSE (no client leaves out coordinates of its own choice), which TopK takes away. "
        "Leave TopK out."
    )

    # The taker's own advice is better than leaving it out.
    class Watched(Method):
        needs: ClassVar[Traits] = frozenset({Trait.VISIBLE})

    assert message(Watched(), SecAgg()).endswith("which SecAgg takes away. Use a norm bound in place of the screen.")


def test_a_method_may_need_what_a_part_gives() -> None:
    class Equal(Method):
        needs: ClassVar[Traits] = frozenset({Trait.UNIFORM})

    assert Trait.UNIFORM in check(Equal(), [Clip(1.0)])[-1].after
    assert "Equal needs UNIFORM" in message(Equal())
    assert "which Krum takes away" in message(Equal(), Clip(1.0), Krum())


def test_a_promise_that_the_method_leaves_out_is_noticed() -> None:
    class Buffered(Part):
        needs: ClassVar[Traits] = frozenset({Trait.LINEAR, Trait.VISIBLE, Trait.ONE_ASK, Trait.FORGETFUL})

    assert len(check(Method(), [Buffered()])) == 2
    text = message(Personal(), Buffered())
    assert text.startswith("Buffered needs FORGETFUL (clients keep no state between rounds), which Personal does not")


def test_checking_changes_nothing() -> None:
    parts = [Clip(1.0), SecAgg()]
    assert check(Method(), parts) == check(Method(), parts)
    assert Method.traits == ALL
