"""The equations of CMA-ES, by hand and beside the package ``cma``."""

from __future__ import annotations

import pytest
import torch

from fedfm.core import seeds
from fedfm.methods.prompt.cma_es import Search, ask, ranking, tell


def ellipsoid(points: torch.Tensor) -> torch.Tensor:
    """Ill-conditioned, with its minimum at 0, ``[N]``."""
    scale = 10 ** torch.linspace(0, 2, points.shape[1]).double()
    return (points.square() * scale).sum(1)


@pytest.mark.parametrize(
    ("dimensions", "size", "parents"), [(8, 6, 0), (30, 7, 0), (100, 20, 0), (12, 3, 3), (60, 10, 10)]
)
def test_generations_are_those_of_the_package(dimensions: int, size: int, parents: int) -> None:
    cma = pytest.importorskip("cma")
    options = {"popsize": size, "verbose": -9, "seed": 1, "CMA_mirrors": 0, **({"CMA_mu": parents} if parents else {})}
    theirs = cma.CMAEvolutionStrategy([1.0] * dimensions, 0.7, options)
    # It starts with a covariance a bit off the identity, so that no two axes are alike.
    ours = Search.start(torch.ones(dimensions), 0.7, torch.tensor(theirs.sm.C))
    draw = seeds.generator(0, "golden")
    for _ in range(10):
        points = ask(ours, size, draw)
        fitness = ellipsoid(points)
        theirs.ask()
        theirs.tell(list(points.numpy()), fitness.tolist())
        ours = tell(ours, points, fitness, parents)
        assert ours.sigma == pytest.approx(theirs.sigma, rel=1e-7)
        for mine, other in (
            (ours.mean, theirs.mean),
            (ours.covariance, theirs.sm.C),
            (ours.path_covariance, theirs.pc),
            (ours.path_sigma, theirs.adapt_sigma.ps),
        ):
            torch.testing.assert_close(mine, torch.tensor(other), rtol=1e-6, atol=1e-9)


def test_weights_by_hand() -> None:
    # N = 4: ln 2.5 - ln i = 0.9163, 0.2231, -0.1823, -0.4700; sums 1.1394 and -0.6523.
    assert ranking(4).tolist() == pytest.approx([0.8042, 0.1958, -0.2795, -0.7205], abs=1e-4)


def test_the_mean_moves_to_the_weighted_better_half() -> None:
    # Two of four count: 0.8042 * 3 + 0.1958 * 1 = 2.6084 on the first axis; the order of the points plays no part.
    points = torch.tensor([[1.0, 0.0], [9.0, 9.0], [3.0, 0.0], [8.0, 8.0]])
    fitness = torch.tensor([2.0, 99.0, 1.0, 98.0])
    search = Search.start(torch.zeros(2), 1.0)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        after = tell(search, points[order], fitness[order])
        assert after.mean.tolist() == pytest.approx([2.6084, 0.0], abs=1e-4)
    # Only the order of the fitness counts.
    same = tell(search, points, fitness.exp())
    assert torch.equal(same.covariance, tell(search, points, fitness).covariance)


def test_one_candidate_alone_is_the_new_mean() -> None:
    after = tell(Search.start(torch.zeros(3), 0.5), torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([7.0]), parents=1)
    assert after.mean.tolist() == pytest.approx([1.0, -2.0, 0.5], abs=1e-12)


def test_candidates_have_the_mean_the_step_size_and_the_covariance() -> None:
    covariance = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    search = Search.start(torch.tensor([5.0, -5.0]), 0.5, covariance)
    points = ask(search, 20000, seeds.generator(0, "many"))
    assert points.mean(0).tolist() == pytest.approx([5.0, -5.0], abs=0.03)
    assert (points.T.cov() / 0.25).flatten().tolist() == pytest.approx([4.0, 1.0, 1.0, 2.0], abs=0.1)
    assert torch.equal(points, ask(search, 20000, seeds.generator(0, "many")))


def test_it_finds_the_minimum_and_changes_nothing_in_place() -> None:
    search = start = Search.start(torch.ones(6), 1.0)
    draw = seeds.generator(3, "search")
    for _ in range(150):
        points = ask(search, 9, draw)
        kept = points.clone()
        search = tell(search, points, ellipsoid(points))
        assert torch.equal(points, kept)
    assert float(ellipsoid(search.mean[None])) < 1e-6
    assert torch.equal(start.mean, torch.ones(6).double())
    assert torch.equal(start.covariance, torch.eye(6).double())
