"""Named streams: equal names give equal numbers for ever, different names unrelated ones, and no global state moves."""

import hashlib
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raysim.rng import numpy_rng, seed_for, torch_rng

parts = st.one_of(st.text(max_size=8), st.integers(-(2**40), 2**40))
names = st.lists(parts, max_size=4).map(tuple)
roots = st.integers(0, 2**62)


def test_seed_is_the_documented_function() -> None:
    # Written out by hand: a change of this encoding changes every result that was ever recorded.
    digest = hashlib.sha256(b"7|str:5:noise|int:1:3").digest()
    assert seed_for(7, "noise", 3) == int.from_bytes(digest[:8], "big") >> 1
    assert seed_for(0) == int.from_bytes(hashlib.sha256(b"0").digest()[:8], "big") >> 1


@given(roots, names)
def test_seed_is_a_63_bit_function_of_its_arguments(root: int, name: tuple[str | int, ...]) -> None:
    seed = seed_for(root, *name)
    assert 0 <= seed < 2**63
    assert seed == seed_for(root, *name)


@given(roots, names, names)
def test_different_names_give_different_seeds(root: int, one: tuple[str | int, ...], other: tuple[str | int, ...]) -> None:
    assert (seed_for(root, *one) == seed_for(root, *other)) == (one == other)


@given(roots, roots, names)
def test_different_roots_give_different_seeds(one: int, other: int, name: tuple[str | int, ...]) -> None:
    assert (seed_for(one, *name) == seed_for(other, *name)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "b"), ("ab",)),
        ((1,), ("1",)),
        ((12, 3), (1, 23)),
        (("a|str:1:b",), ("a", "b")),
        (("noise", 1), (1, "noise")),
        ((), ("",)),
    ],
)
def test_names_that_read_alike_stay_apart(one: tuple[str | int, ...], other: tuple[str | int, ...]) -> None:
    assert seed_for(0, *one) != seed_for(0, *other)


def test_root_is_not_read_as_part_of_the_name() -> None:
    assert seed_for(1, 2) != seed_for(12)
    assert seed_for(1, 2) != seed_for(2, 1)


def test_generators_repeat_and_differ_by_name() -> None:
    for make in (numpy_rng, torch_rng):
        assert _normals(make(0, "x", 1)).tolist() == _normals(make(0, "x", 1)).tolist()
        assert _normals(make(0, "x", 1)).tolist() != _normals(make(0, "x", 2)).tolist()
        assert _normals(make(0, "x", 1)).tolist() != _normals(make(1, "x", 1)).tolist()


def test_a_stream_does_not_depend_on_other_draws() -> None:
    alone = _normals(torch_rng(0, "noise", 3))
    _normals(torch_rng(0, "noise", 2))
    np.random.default_rng(0).normal(size=10)
    assert torch.equal(torch.tensor(alone), torch.tensor(_normals(torch_rng(0, "noise", 3))))


def test_no_global_generator_moves() -> None:
    before = _global_states()
    _normals(numpy_rng(0, "a"))
    _normals(torch_rng(0, "a"))
    assert _global_states() == before
    torch.rand(1)
    assert _global_states() != before


def _global_states() -> list[object]:
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002  # read, not drawn from
    return [random.getstate(), repr(numpy_state["state"]["pos"]), numpy_state["state"]["key"].tobytes(), torch.get_rng_state().tolist()]


def test_seeds_of_consecutive_rounds_look_random() -> None:
    assert _bits_look_random([seed_for(0, "noise", round_index) for round_index in range(2000)])
    assert not _bits_look_random([2**40 + round_index for round_index in range(2000)])  # what `root + index` would give


def test_streams_of_neighbouring_names_are_uncorrelated() -> None:
    for make in (numpy_rng, torch_rng):
        first, second = (_normals(make(0, "client", client_id), size=20_000) for client_id in (0, 1))
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 / 20_000**0.5
        leaking = 0.9 * second + 0.1 * first
        assert abs(np.corrcoef(first, leaking)[0, 1]) > 5 / 20_000**0.5


def _normals(generator: np.random.Generator | torch.Generator, size: int = 16) -> np.ndarray:
    if isinstance(generator, torch.Generator):
        return torch.randn(size, generator=generator).numpy()
    return generator.normal(size=size)


def _bits_look_random(seeds: list[int]) -> bool:
    """Whether every one of the 63 bits is set in half of the seeds, to five standard errors."""
    bits_NB = np.array([[seed >> bit & 1 for bit in range(63)] for seed in seeds])
    return bool(np.all(np.abs(bits_NB.mean(axis=0) - 0.5) < 5 * 0.5 / len(seeds) ** 0.5))


def test_numpy_integers_name_the_same_stream_and_fractions_none() -> None:
    assert seed_for(0, "client", np.int64(3)) == seed_for(0, "client", 3)
    with pytest.raises(TypeError):
        seed_for(0, "client", 3.0)  # type: ignore[arg-type]  # what a caller without types might do
