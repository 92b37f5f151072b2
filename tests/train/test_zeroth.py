"""Zeroth-order jobs: directions drawn again, points rebuilt, slopes without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedfm.core.client import View
from fedfm.core.jobs import Fit, Gradient, Loss
from fedfm.core.method import Method
from fedfm.federation import Federation
from fedfm.spaces import Full
from fedfm.train import zeroth
from fedfm.train.trainer import Trainer
from fedfm.train.zeroth import At, Descend, move, moved, normals
from tests.conftest import FAST

Make = Callable[..., Federation]
WHOLE = replace(FAST, max_steps=1, per_device_train_batch_size=6)  # one batch of all of ann's rows


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    zeroth._SNAPSHOTS.clear()
    yield
    zeroth._SNAPSHOTS.clear()


@pytest.fixture
def full(federation: Make) -> Trainer:
    return federation(Method(), space=Full(), training=WHOLE, engine=Trainer).trainer


def view(trainer: Trainer, client: str = "ann") -> View:
    return View(trainer.data.member(client), 1)


def now(trainer: Trainer) -> dict[str, torch.Tensor]:
    return trainer.space.read()


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(t, right[n]) for n, t in left.items())


def along(gradient: dict[str, torch.Tensor], seed: int) -> float:
    """The derivative along the first direction."""
    return sum(float((g.flatten() * normals(zeroth.key(seed, 0, n), 0, g.numel())).sum()) for n, g in gradient.items())


def test_numbers_are_those_of_splitmix64() -> None:
    # SplitMix64 in plain integers: x = k + i * W, mixed; each 16 bits, read as a signed number s, stand for the
    # quantile of (s + 32768 + 0.5) / 65536.
    full64 = (1 << 64) - 1
    expected = []
    for i in range(3):
        x = (2026 + i * 0x9E3779B97F4A7C15) & full64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & full64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & full64
        x ^= x >> 31
        for part in range(4):
            bits = (x >> (16 * part)) & 0xFFFF
            place = (bits + 32768) % 65536
            expected.append(torch.special.ndtri(torch.tensor((place + 0.5) / 65536, dtype=torch.float64)).item())
    assert normals(2026, 0, 12).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_numbers_are_standard_normal_and_independent() -> None:
    n = 1 << 18
    a, b = normals(1, 0, n).double(), normals(2, 0, n).double()
    assert float(a.mean()) == pytest.approx(0, abs=0.01)  # five standard errors: 5 / sqrt(n)
    assert float(a.square().mean()) == pytest.approx(1, abs=0.014)
    assert float(a.pow(4).mean()) == pytest.approx(3, abs=0.1)
    assert float((a.abs() < 1).double().mean()) == pytest.approx(0.6827, abs=0.005)
    for other in (b, a.roll(1), a.roll(4)):
        assert float((a * other).mean()) == pytest.approx(0, abs=0.01)


def test_a_part_is_drawn_as_in_the_whole() -> None:
    whole = normals(5, 0, 1001)
    assert torch.equal(whole[400:], normals(5, 400, 601))
    assert torch.equal(whole[:3], normals(5, 0, 3))
    assert not torch.equal(whole, normals(6, 0, 1001))


def test_moved_by_hand_over_several_parts() -> None:
    # w0 + 0.5 z_0 - 2 z_2 with a tensor of more entries than are drawn at once.
    start = torch.full((300, 400), 3.0)
    z = [normals(zeroth.key(9, j, "w"), 0, start.numel()).view(start.shape) for j in range(3)]
    found = moved("w", start, torch.tensor([0.5, 0.0, -2.0]), 9)
    assert torch.allclose(found, 3.0 + 0.5 * z[0] - 2.0 * z[2], atol=1e-6)
    assert torch.equal(start, torch.full((300, 400), 3.0))
    assert not torch.equal(found, moved("v", start, torch.tensor([0.5, 0.0, -2.0]), 9))
    assert not torch.equal(found, moved("w", start, torch.tensor([0.5, 0.0, -2.0]), 10))


def test_small_moves_of_a_16_bit_tensor_add_up() -> None:
    # One move of 1e-4 is below the spacing of bfloat16 at 1; 64 along one direction, summed in float32, are not.
    start = torch.ones(1000, dtype=torch.bfloat16)
    once = moved("w", start, torch.tensor([64e-4]), 0)
    assert once.dtype == torch.bfloat16
    z = normals(zeroth.key(0, 0, "w"), 0, 1000)
    assert torch.equal(once, (1 + 64e-4 * z).bfloat16())


def test_little_is_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    draw = zeroth.normals

    def counted(key: int, at: int, count: int, device: Any) -> torch.Tensor:
        nonlocal most
        most = max(most, count)
        return draw(key, at, count, device)

    monkeypatch.setattr(zeroth, "normals", counted)
    move(torch.zeros(1000, 1000), [(1, 0.1), (2, 0.2)])
    assert 0 < most <= 1 << 16


def test_the_slope_is_the_derivative_along_the_direction(full: Trainer) -> None:
    gradient = full.answer(Gradient({}), view(full)).tensors
    pairs = []
    for seed in range(8):
        full.seed = seed
        fitted = full.answer(Descend({}, coefficients=torch.zeros(1), epsilon=1e-3), view(full))
        slope = -float(fitted.tensors["coefficients"][0]) / fitted.learning_rate
        pairs.append((slope, along(gradient, seed)))
    slopes, derivatives = torch.tensor(pairs).T
    assert float(derivatives.abs().max()) > 0.3
    # A difference of two losses of about 5.5 in float32 over 2e-3, and a third derivative.
    assert torch.allclose(slopes, derivatives, rtol=1e-2, atol=5e-3)
    # The loss in the answer is that at the weights themselves, up to what curvature adds.
    scores = full.answer(Loss({}), view(full))
    assert fitted.loss == pytest.approx(float(scores.loss.sum() / scores.count.sum()), rel=1e-3)


def test_a_step_goes_down(full: Trainer) -> None:
    def loss(coefficients: torch.Tensor) -> float:
        scores = full.answer(At({}, coefficients=coefficients, job=Loss({})), view(full))
        return float(scores.loss.sum() / scores.count.sum())

    gradient = full.answer(Gradient({}), view(full)).tensors
    steep = [seed for seed in range(20) if abs(along(gradient, seed)) > 0.3]
    assert len(steep) >= 3
    for seed in steep:
        full.seed = seed
        fitted = full.answer(Descend({}, coefficients=torch.zeros(1), epsilon=1e-3, rate=0.02), view(full))
        assert loss(fitted.tensors["coefficients"]) < loss(torch.zeros(1))


def test_weights_in_place_are_those_that_the_coefficients_say(full: Trainer) -> None:
    start = torch.tensor([0.01, 0.0, -0.02, 0.0])
    fitted = full.answer(Descend({}, coefficients=start, epsilon=1e-3, max_steps=20), view(full))
    after = start + fitted.tensors["coefficients"]
    assert int((fitted.tensors["coefficients"] != 0).sum()) == 4  # 20 draws of 4 directions
    assert (fitted.steps, fitted.examples) == (20, 120)
    for name, tensor in now(full).items():
        assert torch.allclose(tensor, moved(name, full.space.initial[name], after, full.seed), atol=1e-5), name


def test_the_learning_rate_is_that_of_the_round_times_the_factor(full: Trainer) -> None:
    once, twice = (
        full.answer(Descend({}, coefficients=torch.zeros(1), epsilon=1e-3, rate=rate), view(full)) for rate in (1, 2)
    )
    assert (once.learning_rate, twice.learning_rate) == (0.01, 0.02)
    assert torch.equal(2 * once.tensors["coefficients"], twice.tensors["coefficients"])


def test_nothing_has_a_gradient(full: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    full.answer(Fit({}, max_steps=1), view(full))  # leaves parameters that want one
    seen: list[bool] = []
    hook = full.loaded.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(torch.is_grad_enabled() or output.requires_grad)
    )
    monkeypatch.setattr(torch.Tensor, "backward", lambda *args: pytest.fail("a gradient was asked for"))
    full.answer(Descend({}, coefficients=torch.zeros(2), epsilon=1e-3), view(full))
    full.answer(At({}, coefficients=torch.zeros(2), job=Loss({})), view(full))
    hook.remove()
    assert seen
    assert not any(seen)
    assert all(p.grad is None and not p.requires_grad for p in full.space.parameters.values())


def test_the_second_visit_reads_what_the_first_worked_out_to_the_bit(
    full: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    point, other = torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.1, -0.2, 0.4])
    job = At({}, coefficients=point, job=Loss({}))
    times: list[str] = []
    monkeypatch.setattr(zeroth, "moved", lambda name, *rest: times.append(name) or moved(name, *rest))
    job.place(full)
    first, worked = now(full), len(times)
    assert worked == len(first)
    full.space.load({})
    job.place(full)
    assert same(now(full), first)
    assert len(times) == worked  # read, not worked out
    replace(job, coefficients=other).place(full)
    assert not same(now(full), first)
    assert len(times) == 2 * worked
    job.place(full)  # one point is kept, so this one is worked out anew
    assert len(times) == 3 * worked
    assert same(now(full), first)


def test_steps_are_the_same_with_and_without_a_kept_point(full: Trainer) -> None:
    point = torch.tensor([0.1, -0.2, 0.3])
    job = Descend({}, coefficients=point, epsilon=1e-3, max_steps=3)
    first = full.answer(job, view(full, "bob"))
    full.answer(job, view(full, "ann"))
    again = full.answer(job, view(full, "bob"))
    assert torch.equal(first.tensors["coefficients"], again.tensors["coefficients"])
    assert first.loss == again.loss


def test_a_kept_point_is_that_of_its_seed(full: Trainer) -> None:
    job = At({}, coefficients=torch.tensor([0.1, -0.2]), job=Loss({}))
    job.place(full)
    full.seed = 1
    job.place(full)
    for name, tensor in now(full).items():
        assert torch.equal(tensor, moved(name, full.space.initial[name], job.coefficients, 1))


def test_two_spaces_keep_their_own_points(federation: Make) -> None:
    point = torch.tensor([0.1, -0.2])
    job = At({}, coefficients=point, job=Loss({}))
    trainers = [federation(Method(), space=Full(), training=WHOLE, seed=seed).trainer for seed in (0, 1)]
    for trainer in trainers:
        job.place(trainer)
        for name, tensor in now(trainer).items():
            assert torch.equal(tensor, moved(name, trainer.space.initial[name], point, trainer.seed))


def test_from_given_weights(full: Trainer) -> None:
    point = torch.tensor([0.1, -0.2])
    name = next(iter(full.space.parameters))
    given = {name: torch.full_like(full.space.initial[name], 0.5)}
    At({}, coefficients=point, job=Loss({})).place(full)
    usual = now(full)
    At(given, coefficients=point, job=Loss({})).place(full)
    assert torch.equal(now(full)[name], moved(name, given[name], point, full.seed))
    assert same({n: t for n, t in now(full).items() if n != name}, {n: t for n, t in usual.items() if n != name})
    At({}, coefficients=point, job=Loss({})).place(full)
    assert same(now(full), usual)


def test_a_job_at_a_point_is_that_job_with_the_weights_there(federation: Make) -> None:
    for space in (Full(), None):  # None: LoRA
        trainer = federation(Method(), **({"space": space} if space else {})).trainer
        initial, point = trainer.space.initial, torch.tensor([0.05, -0.1])
        there = {name: moved(name, initial[name], point, trainer.seed) for name in initial}
        expected = trainer.answer(Loss(there), view(trainer))
        found = trainer.answer(At({}, coefficients=point, job=Loss({})), view(trainer))
        base = trainer.answer(Loss({}), view(trainer))
        assert torch.equal(found.loss, expected.loss)
        assert not torch.allclose(found.loss, base.loss)


def test_after_factors_of_another_rank_and_a_patched_base(federation: Make) -> None:
    trainer = federation(Method()).trainer
    initial = trainer.space.initial
    job = At({}, coefficients=torch.tensor([0.05]), job=Loss({}))
    expected = trainer.answer(job, view(trainer)).loss
    narrow = {n: t[:1].clone() if ".lora_A" in n else t[:, :1].clone() for n, t in initial.items()}
    patch = {n: torch.ones_like(t) for n, t in initial.items()}
    trainer.answer(Loss(narrow, patches=(patch,)), view(trainer))
    assert torch.equal(trainer.answer(job, view(trainer)).loss, expected)
    patched = trainer.answer(replace(job, patches=(patch,)), view(trainer)).loss
    assert not torch.allclose(patched, expected)


def test_a_batch_in_parts_is_a_batch(federation: Make) -> None:
    parts = replace(WHOLE, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    one, three = (
        federation(Method(), space=Full(), training=args)
        .trainer.answer(Descend({}, coefficients=torch.zeros(1), epsilon=1e-3), View(member, 1))
        .tensors["coefficients"]
        for args in (WHOLE, parts)
        for member in [federation(Method()).plan.members.member("ann")]
    )
    assert torch.allclose(one, three, rtol=0.01)


def test_steps_and_batches_are_those_of_a_fit(full: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    full.training = replace(FAST, max_steps=3)
    batches: list[list[list[int]]] = [[], []]
    losses = full.losses
    for at, job in enumerate((Fit({}), Descend({}, coefficients=torch.zeros(1), epsilon=1e-3))):

        def noted(examples: list[Any], batch: Any, at: int = at, **others: Any) -> Any:
            batches[at].append(batch.input_ids.tolist())
            return losses(examples, batch, **others)

        monkeypatch.setattr(full, "losses", noted)
        assert full.answer(job, view(full)).steps == 3
    assert batches[1] == [batch for batch in batches[0] for _ in range(2)]


def test_each_step_is_told(full: Trainer) -> None:
    told: list[int] = []
    full.pulse = told.append
    full.answer(Descend({}, coefficients=torch.zeros(1), epsilon=1e-3, max_steps=4), view(full))
    assert sum(told) == 4
