"""Shapley values of a game: what each player adds, averaged over all orders in which the players may come.

Shapley 1953, A Value for n-Person Games.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import comb

Worth = Callable[[frozenset[str]], float]
"""What a coalition of players is worth, $v(S)$."""


def exact(players: Sequence[str], worth: Worth) -> dict[str, float]:
    """$\\phi_i = \\sum_{S \\not\\ni i} \\frac{|S|! (n - |S| - 1)!}{n!} (v(S \\cup i) - v(S))$, by all $2^n$ coalitions.

    Args:
        players: their names, $n$ of them.
        worth: asked once for each coalition.
    """
    n = len(players)
    coalitions = [frozenset(some) for size in range(n + 1) for some in combinations(players, size)]
    value = {coalition: worth(coalition) for coalition in coalitions}
    return {
        player: sum(
            (value[rest | {player}] - value[rest]) / (n * comb(n - 1, len(rest)))
            for rest in coalitions
            if player not in rest
        )
        for player in players
    }


def marginals(order: Sequence[str], worth: Worth, whole: float, truncation: float = 0.0) -> dict[str, float]:
    """What each player adds when they come in this order, $v(S \\cup i) - v(S)$ with $S$ those before $i$.

    Args:
        order: the players.
        worth: $v$.
        whole: $v$ of all players.
        truncation: once $|v(N) - v(S)|$ is below it, those who are still to come count as adding 0, unasked.
    """
    added = dict.fromkeys(order, 0.0)
    before: frozenset[str] = frozenset()
    for player in order:
        now = worth(before)
        if abs(whole - now) < truncation:
            break
        before |= {player}
        added[player] = worth(before) - now
    return added


def mean(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over several orders, player by player."""
    return {player: sum(one[player] for one in values) / len(values) for player in values[0]}
