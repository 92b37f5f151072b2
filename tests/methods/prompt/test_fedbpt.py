"""FedBPT: prompts searched without a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfm.core import seeds, trees
from fedfm.core.client import View, work
from fedfm.core.jobs import Job, Loss, Scores
from fedfm.core.mean import WeightedMean
from fedfm.core.method import State
from fedfm.core.space import Layout
from fedfm.core.traits import Trait
from fedfm.core.update import Kind, Member, Tensors, Update
from fedfm.errors import DataError, Incompatible, RecipeError
from fedfm.federation import Federation
from fedfm.methods.prompt.cma_es import Search, ask, tell
from fedfm.methods.prompt.fedbpt import FedBPT
from fedfm.rules import Add
from fedfm.spaces import LoRA, Prompt

NAME = "prompt_embeddings"
TINY = FedBPT(intrinsic_dimension=6, local_iterations=3, population=5)


def layout(seed: int = 0, rows: int = 4, width: int = 3) -> Layout:
    draw = torch.Generator().manual_seed(7)
    return Layout({NAME: torch.randn(rows, width, generator=draw)}, clients=3, seed=seed)


def quadratic(target: torch.Tensor, seen: list[Job] | None = None) -> Callable[[Job, View], Scores]:
    """A client whose two examples have the losses |P - target|^2 and three times that, over 1 and 3 positions."""

    def answer(job: Job, client: View) -> Scores:
        assert isinstance(job, Loss)
        assert job.split == "train"
        if seen is not None:
            seen.append(job)
        one = (job.tensors[NAME] - target).square().sum()
        return Scores(torch.stack([one, 3 * one]), torch.tensor([1, 3]), {})

    return answer


def view(id: str = "ann", space: Layout | None = None) -> View:
    return View(Member(id, 4), 1, space=space or layout())


def local(method: FedBPT, state: State, client: View, target: torch.Tensor, seen: Any = None) -> Update:
    update = work(method, "local", client, method.message(state, client.member), quadratic(target, seen))
    return Update(update.tensors, update.weight, update.metrics, update.kind, client.member.id)


def upload(mean: list[float], fitness: float, sigmas: list[float]) -> Update:
    tensors = {"mean": torch.tensor(mean), "fitness": torch.tensor(fitness), "sigmas": torch.tensor(sigmas)}
    return Update(tensors, 4, kind=Kind.KNOWLEDGE, member="x")


def test_the_client_runs_plain_cma_es_on_its_loss() -> None:
    target, client, jobs = torch.full((4, 3), 0.5), view(), []
    update = local(TINY, TINY.start(layout()), client, target, jobs)
    # The same by hand: black-box tuning of one client, three generations of five candidates.
    start = layout().initial[NAME]
    projection = torch.randn(12, 6, generator=seeds.generator(0, "method", "projection"))
    projection = projection * float(start.std(correction=0)) / 6**0.5
    search, draw, sigmas = Search.start(torch.zeros(6), 1.0), client.draw("candidates"), []
    for _ in range(3):
        sigmas.append(search.sigma)
        points = ask(search, 5, draw)
        prompts = start.flatten() + points.float() @ projection.T
        search = tell(search, points, (prompts - 0.5).square().sum(1))
    torch.testing.assert_close(update.tensors["mean"], search.mean.float())
    assert update.tensors["sigmas"].tolist() == pytest.approx(sigmas)
    last = start.flatten() + projection @ search.mean.float()
    # 4 x loss over 4 positions is the loss.
    assert update.tensors["fitness"].item() == pytest.approx(float((last - 0.5).square().sum()), rel=1e-5)
    assert len(jobs) == 3 * 5 + 1
    assert update.weight == 4


def test_with_one_client_the_server_goes_where_the_client_went() -> None:
    state = TINY.start(layout())
    update = local(TINY, state, view(), torch.zeros(4, 3))
    state = TINY.apply(state, TINY.combine(state, [update], WeightedMean()), Add())
    torch.testing.assert_close(state.weights["mean"], update.tensors["mean"].double())


def test_step_sizes_by_hand() -> None:
    # Five candidates: ln 3 - ln i > 0 for two, so mu = 2 (i = 3 has weight 0). Two clients, sigmas 1 and 2 twice each:
    # sigma_g = sqrt((1 + 4 + 1 + 4) / 2 / 2) = sqrt(2.5).
    method = FedBPT(intrinsic_dimension=2, local_iterations=2, population=5, sigma=2.0, least_sigma=0.5)
    state = method.start(layout())
    uploads = [upload([1.0, 0.0], 3.0, [1.0, 2.0]), upload([0.0, 1.0], 1.0, [1.0, 2.0])]
    wide = 2.5**0.5
    before = Search.start(torch.zeros(2), wide)
    after = tell(before, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([3.0, 1.0]), parents=2)
    new = method.apply(state, method.combine(state, uploads, WeightedMean()), Add())
    # Weights of two parents: ln 2.5 and ln 1.25, that is 0.8042 and 0.1958; the second client is the better one.
    assert new.weights["mean"].tolist() == pytest.approx([0.1958, 0.8042], abs=1e-4)
    assert new.weights["sigma"].item() == pytest.approx(min(2.0, max(0.5, 2.0 * after.sigma / wide)))
    assert 0.5 < new.weights["sigma"].item() < 2.0
    torch.testing.assert_close(new.weights["covariance"], after.covariance)
    torch.testing.assert_close(new.weights["path_sigma"], after.path_sigma)
    assert new.weights["generation"] == 1


def test_the_step_size_is_bounded_on_both_sides() -> None:
    method = FedBPT(intrinsic_dimension=2, local_iterations=1, population=5, sigma=1.0, least_sigma=0.95)
    state = method.start(layout())
    for mean, wanted in (([0.0, 0.0], 0.95), ([99.0, 99.0], 1.0)):  # without progress it falls, with much it rises
        new = method.apply(state, method.combine(state, [upload(mean, 1.0, [1.0])], WeightedMean()), Add())
        assert new.weights["sigma"].item() == pytest.approx(wanted)


def test_only_the_order_of_the_fitness_counts_so_it_is_not_linear() -> None:
    state = TINY.start(layout())
    updates = [local(TINY, state, view(i), torch.full((4, 3), t)) for i, t in (("ann", 0.0), ("bob", 2.0))]
    apart = TINY.combine(state, updates, WeightedMean())
    together = TINY.combine(state, [WeightedMean()(updates)], WeightedMean())
    assert not torch.allclose(apart.tensors["mean"], together.tensors["mean"])
    assert Trait.LINEAR not in TINY.traits


def test_the_upload_depends_on_the_dimension_and_the_generations_alone() -> None:
    sizes = set()
    for rows, width in ((4, 3), (9, 20)):
        space = layout(rows=rows, width=width)
        update = local(TINY, TINY.start(space), view(space=space), torch.zeros(rows, width))
        assert {n: t.shape for n, t in update.tensors.items()} == {"mean": (6,), "fitness": (), "sigmas": (3,)}
        sizes.add(trees.nbytes(update.tensors))
    assert sizes == {4 * (6 + 1 + 3)}


def test_the_projection_follows_from_the_seed_and_never_travels() -> None:
    z = torch.ones(6)
    prompts = [TINY.compose(view(i, layout(seed)), {"mean": z})[NAME] for i, seed in (("a", 0), ("b", 0), ("a", 1))]
    assert torch.equal(prompts[0], prompts[1])
    assert not torch.equal(prompts[0], prompts[2])
    # One candidate at sigma_0 moves the prompt by about the spread of its start, whatever the dimension.
    wide = FedBPT(intrinsic_dimension=400)
    space = layout(rows=30, width=30)
    draws = torch.Generator().manual_seed(0)
    moved = wide.compose(view(space=space), {"mean": torch.randn(400, generator=draws)})[NAME] - space.initial[NAME]
    assert float(moved.std()) == pytest.approx(float(space.initial[NAME].std()), rel=0.1)
    state = TINY.start(layout())
    assert set(TINY.message(state, Member("a", 1))) == {"mean", "sigma", "covariance"}


def test_clients_with_different_optima_meet_in_between() -> None:
    method, space = FedBPT(intrinsic_dimension=6, local_iterations=4, population=10), layout()
    state, targets = method.start(space), {"ann": torch.full((4, 3), 0.2), "bob": torch.full((4, 3), -0.2)}

    def loss(state: Any) -> float:
        prompt = method.result(state, space)[NAME]
        return float(sum((prompt - t).square().sum() for t in targets.values()))

    before = loss(state)
    # The optimum within reach of z is that of least squares, as the losses meet at P = 0.
    start, pull = space.initial[NAME], method.compose(view(space=space), {"mean": torch.zeros(6)})[NAME]
    assert torch.equal(start, pull)
    columns = [method.compose(view(space=space), {"mean": z})[NAME] - start for z in torch.eye(6)]
    matrix = torch.stack([c.flatten() for c in columns], dim=1)  # A, [12, 6]
    best = torch.linalg.lstsq(matrix, -start.flatten()[:, None]).solution.flatten()
    least = loss(replace(state, weights={"mean": best}))
    for round in range(1, 9):
        views = [View(Member(i, 4), round, space=space) for i in targets]
        updates = [local(method, state, v, targets[v.member.id]) for v in views]
        state = method.apply(state, method.combine(state, updates, WeightedMean()), Add())
    assert least <= loss(state) < least + 0.2 * (before - least)


def test_no_gradient_is_computed(federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a gradient was asked for")

    monkeypatch.setattr(torch.Tensor, "backward", never)
    monkeypatch.setattr(torch.autograd, "grad", never)
    method = FedBPT(intrinsic_dimension=8, local_iterations=2, population=4)
    made = federation(method, space=Prompt(3))
    member = made.plan.members.member("ann")
    message = method.message(method.start(made.layout), member)
    work(method, "local", View(member, 1, space=made.layout), message, made.trainer.answer)
    parameters = list(made.bench.loaded.model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in parameters)


def test_a_run_on_a_model_lowers_the_loss(federation: Callable[..., Federation], tmp_path: Path) -> None:
    method = FedBPT(intrinsic_dimension=8, local_iterations=2, population=5)
    outcome = federation(method, space=Prompt(3)).run(tmp_path / "run")
    losses = [r["train_loss"] for r in outcome.records[1:]]
    assert losses[-1] < losses[0]
    assert not list((tmp_path / "run/clients").glob("*/*"))
    assert (tmp_path / "run/final/adapter_model.safetensors").exists()


def test_a_client_without_examples_says_so() -> None:
    def answer(job: Job, client: View) -> Scores:
        return Scores(torch.zeros(0), torch.zeros(0), {})

    message: Tensors = TINY.message(TINY.start(layout()), Member("ann", 0))
    with pytest.raises(Exception, match="client 'ann' has no training example") as caught:
        work(TINY, "local", view(), message, answer)
    assert isinstance(caught.value.__cause__, DataError)


def test_settings(federation: Callable[..., Federation]) -> None:
    with pytest.raises(RecipeError, match="FedBPT population must be at least 2, but is 1"):
        FedBPT(population=1)
    with pytest.raises(RecipeError, match=r"least_sigma 0 to sigma, but they are 0\.1 and 0\.5"):
        FedBPT(sigma=0.1)
    with pytest.raises(Incompatible, match="FedBPT is defined on the space prompt"):
        federation(FedBPT(), space=LoRA(r=2))
