"""Randomness as a function of names."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import torch

from fedfm.core import seeds


def test_the_same_names_give_the_same_seed_in_every_process() -> None:
    here = seeds.derive(3, "client", 7, "fit")
    code = "from fedfm.core import seeds; print(seeds.derive(3, 'client', 7, 'fit'))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(there.stdout) == here


def test_a_seed_is_63_bits_wide() -> None:
    drawn = [seeds.derive(0, "x", i) for i in range(2000)]
    assert all(0 <= seed < 2**63 for seed in drawn)
    # 2000 uniform draws all below 2^61 would have probability 4^-2000: the high bits are used.
    assert max(drawn) >= 2**61
    assert len(set(drawn)) == 2000


def test_names_are_kept_apart() -> None:
    names = [
        ("a", "bc"),
        ("ab", "c"),
        ("abc",),
        ("a", "b", "c"),
        ("", "abc"),
        (1, "1"),
        ("1", 1),
        (11,),
        (1, 1),
        ("1, 1",),
        ("a', 'bc",),
        (),
    ]
    derived = {names_: seeds.derive(0, *names_) for names_ in names}
    for one, other in itertools.combinations(names, 2):
        assert derived[one] != derived[other], (one, other)


def test_the_run_seed_and_the_order_of_names_count() -> None:
    assert seeds.derive(0, "a", 1) != seeds.derive(1, "a", 1)
    assert seeds.derive(0, "a", "b") != seeds.derive(0, "b", "a")
    # The seed is not just one more name that could be shifted along.
    assert seeds.derive(0, 1, 2) != seeds.derive(1, 0, 2)


def test_generators_draw_what_their_names_say() -> None:
    one = torch.rand(4, generator=seeds.generator(5, "noise", 1))
    same = torch.rand(4, generator=seeds.generator(5, "noise", 1))
    other = torch.rand(4, generator=seeds.generator(5, "noise", 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    first = seeds.numpy_generator(5, "noise", 1).random(4)
    assert np.array_equal(first, seeds.numpy_generator(5, "noise", 1).random(4))
    assert not np.array_equal(first, seeds.numpy_generator(5, "noise", 2).random(4))


def test_draws_of_neighbouring_names_are_not_correlated() -> None:
    # 200 streams of 50 draws: column means of uniforms have a standard deviation of 0.0204; 6 of them is 0.12.
    draws = np.stack([seeds.numpy_generator(0, "round", i).random(50) for i in range(200)])
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.12
    assert np.abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.05


def test_the_global_generators_are_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    drawn = torch.rand(2, generator=seeds.generator(0, "x")), seeds.numpy_generator(0, "x").random(2)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(torch.rand(2, generator=seeds.generator(0, "x")), drawn[0])
    assert np.array_equal(seeds.numpy_generator(0, "x").random(2), drawn[1])


def test_numbers_of_numpy_and_numbers_of_python_are_one_name() -> None:
    for kind in (np.int64, np.int32, np.uint8):
        assert seeds.derive(0, kind(1), "x") == seeds.derive(0, 1, "x")
        assert seeds.derive(kind(3), "x") == seeds.derive(3, "x")


def test_a_name_may_be_any_text() -> None:
    odd = ["", "\udc80", "\udc81", "größe", "\0"]
    assert len({seeds.derive(0, name) for name in odd}) == len(odd)
