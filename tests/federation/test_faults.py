"""Who takes part in a round: named streams decide it, machines differ as they are said to, and the server waits as long as it must."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import expon, kstest, norm

from raysim.config import load
from raysim.federation.faults import Attendance, Fleet, attendance, failures, num_tokens
from raysim.privacy.mechanism import Mechanism


def fleet(*settings: str, num_clients: int = 400, tokens: int = 100) -> Fleet:
    """The fleet of clients that all hold so many tokens."""
    config = load("", [f"partition.num_clients={num_clients}", "data.num_train=0", *settings])
    return Fleet.of(config, [[_Example(tokens)]] * num_clients)  # type: ignore[list-item]  # of an example only its length is read


class _Example:
    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens


def test_speeds_follow_the_distribution_that_is_named_and_not_another() -> None:
    assert set(fleet("clients.token_s=0.5").times_s) == {50.0}
    lognormal = np.log(fleet("clients.token_s=0.5", "clients.speed=lognormal", "clients.spread=0.8").times_s)
    assert kstest(lognormal, norm(math.log(50), 0.8).cdf).pvalue > 1e-3
    assert kstest(lognormal, norm(math.log(50), 0.3).cdf).pvalue < 1e-6
    exponential = fleet("clients.token_s=0.5", "clients.speed=exponential").times_s
    assert kstest(exponential, expon(scale=50).cdf).pvalue > 1e-3
    assert kstest(exponential, expon(scale=100).cdf).pvalue < 1e-6


def test_a_client_s_speed_is_its_own_whoever_else_there_is() -> None:
    many, few = (fleet("clients.speed=lognormal", num_clients=n).times_s for n in (400, 5))
    assert many[:5] == few
    assert fleet("clients.speed=lognormal", "seed=1").times_s != many


def test_tokens_are_those_of_all_passes_or_of_the_steps_that_are_allowed() -> None:
    shard = [_Example(n) for n in (10, 20, 30)]
    for settings, expected in (
        (["train.num_epochs=3"], 180),
        (["train.num_epochs=3", "train.max_steps=2", "train.batch_size=2"], 80),
        (["method.name=dplora", "dplora.batch_size=2", "dplora.num_steps=5"], 200),
        (["method.name=dplora", "dplora.mode=literal", "dplora.batch_size=2"], 40),
    ):
        assert num_tokens(shard, load("", settings)) == expected  # type: ignore[arg-type]  # as above
    assert num_tokens([], load("", [])) == 0


TIMES = Fleet(dropout=(0.0,) * 6, times_s=(5.0, 1.0, 4.0, 3.0, 2.0, 6.0), seed=0)


def there(**changes: object) -> Attendance:
    return attendance(range(6), fleet=Fleet(**{**vars(TIMES), **changes}), round_index=0)  # type: ignore[arg-type]


def test_the_server_waits_for_all_or_for_the_deadline_or_for_as_many_as_it_wants() -> None:
    assert there() == Attendance((0, 1, 2, 3, 4, 5), (), {}, 6.0)
    late = {0: "late: 5 s of 4 s", 5: "late: 6 s of 4 s"}
    assert there(deadline_s=4.0) == Attendance((1, 2, 3, 4), (), late, 4.0)
    assert there(deadline_s=4.0, keeps_late=True) == Attendance((1, 2, 3, 4), (0, 5), {}, 4.0)
    others = dict.fromkeys((0, 2, 3, 5), "not among the first to send")
    assert there(num_wanted=2) == Attendance((1, 4), (), others, 2.0)
    assert there(num_wanted=2, deadline_s=4.0).simulated_s == 2.0
    assert there(num_wanted=5, deadline_s=4.0).simulated_s == 4.0
    assert there(deadline_s=0.5) == Attendance((), (), {k: f"late: {t:g} s of 0.5 s" for k, t in enumerate(TIMES.times_s)}, 0.5)
    assert attendance((), fleet=TIMES, round_index=0) == Attendance((), (), {}, 0.0)


@given(
    dropout=st.lists(st.floats(0, 0.99), min_size=6, max_size=6),
    deadline_s=st.floats(0, 7),
    num_wanted=st.integers(0, 7),
    keeps_late=st.booleans(),
    round_index=st.integers(0, 10**6),
)
def test_everybody_counts_now_or_next_time_or_is_told_why_not(
    dropout: list[float], deadline_s: float, num_wanted: int, keeps_late: bool, round_index: int
) -> None:
    cohort = (0, 2, 3, 5)
    some = Fleet(tuple(dropout), TIMES.times_s, 0, deadline_s, num_wanted, keeps_late)
    found = attendance(cohort, fleet=some, round_index=round_index)
    assert sorted([*found.survivors, *found.late, *found.absent]) == list(cohort)
    assert len(found.survivors) <= (num_wanted or 4)
    assert found == attendance(cohort, fleet=some, round_index=round_index)
    assert found.simulated_s <= (deadline_s or 6.0)


def test_a_reason_is_one_line_and_not_too_long() -> None:
    assert failures([], {3: "a\nb", 1: "x" * 1000}) == [{"client_id": 1, "reason": "x" * 300}, {"client_id": 3, "reason": "a b"}]


def test_more_clients_are_drawn_than_count() -> None:
    config = load("", ["partition.num_clients=10", "server.cohort_size=4", "clients.overselect=1.3", "data.num_train=40"])
    mechanism = Mechanism.from_config(config, shard_sizes=[4] * 10)
    assert [len(mechanism.sample_cohort(i)) for i in range(20)] == [6] * 20
    assert mechanism.expected_cohort == 4.0
