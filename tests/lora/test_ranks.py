"""The rank of each client: as listed, or dealt from the seed in the shares that were asked for."""

import numpy as np
import pytest

from raysim.config import load
from raysim.federation.assignment import ranks_of
from raysim.federation.setup import prepare
from raysim.lora.ranks import dealt_ranks
from raysim.model.base_model import load_base_model
from raysim.model.language_model import build_language_model
from tests.conftest import SMALL


def test_ranks_are_those_listed_or_the_servers() -> None:
    assert dealt_ranks([4, 2, 8], {}, num_clients=3, rank=8, seed=0) == (4, 2, 8)
    assert dealt_ranks([], {}, num_clients=3, rank=8, seed=0) == (8, 8, 8)


def test_ranks_are_drawn_from_the_seed_in_their_shares() -> None:
    shares = {"4": 0.5, "16": 0.3, "64": 0.2}
    ranks = dealt_ranks([], shares, num_clients=4000, rank=64, seed=3)
    assert ranks == dealt_ranks([], shares, num_clients=4000, rank=64, seed=3) != dealt_ranks([], shares, num_clients=4000, rank=64, seed=4)
    found = [np.mean(np.array(ranks) == rank) for rank in (4, 16, 64)]
    np.testing.assert_allclose(found, [0.5, 0.3, 0.2], atol=0.03)  # four standard deviations


def test_a_mapping_is_read_as_shares_and_kept_by_the_file() -> None:
    config = load("", ["lora.aggregation=flora", "lora.client_ranks={4: 0.5, 16: 0.5}"])
    assert (config.lora.client_ranks, config.lora.rank_shares) == ([], {"4": 0.5, "16": 0.5})
    assert set(ranks_of(config, num_clients=50)) == {4, 16}
    listed = load("", ["lora.aggregation=flora", "lora.client_ranks=[2,4,16]"])
    assert ranks_of(listed, num_clients=3) == (2, 4, 16)


def test_bases_that_no_layer_has_are_refused() -> None:
    config = load("", [*SMALL, "lora.aggregation=fedsb", "lora.rank=65"])
    lm = build_language_model(
        load_base_model("tiny"), rank=65, alpha=1.0, dropout=0.0, target_modules=config.lora.target_modules, between=True
    )
    with pytest.raises(
        ValueError,
        match=r"^lora\.rank=65 must be at most \d+, the narrower side of the smallest adapted layer, for lora\.aggregation='fedsb'",
    ):
        prepare(config, lm)
