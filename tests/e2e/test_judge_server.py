"""Judges that are the real small model: behind `transformers serve`, killed in the middle, and in this process by likelihood.

Left out: what a server can say and do otherwise (tests/judging/test_endpoint.py, of a small one).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from raysim.data.sources import BUILTIN
from raysim.judging.endpoint import Endpoint, EndpointJudge, JudgeError
from raysim.judging.likelihood import LikelihoodJudge
from raysim.judging.pairwise import Pair, in_words, judge_pairs, summarise
from raysim.model.base_model import load_base_model
from raysim.model.find import find_model
from raysim.model.language_model import build_language_model
from tests.judge_server import patience, serving
from tests.small_runs import environment

pytestmark = pytest.mark.slow
START_S = 120
SETTINGS: dict[str, Any] = {
    "timeout_s": 120.0,
    "concurrency": 1,
    "max_attempts": 2,
    "max_unparsed": 0,
    "parameters": {"temperature": 0.0, "max_tokens": 24},
    "price_prompt": 1.0,
    "price_completion": 2.0,
}


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """The answer to another question against the true answer."""
    records = BUILTIN["clinic"]()[:4]
    return [Pair(record.instruction, other.response, record.response) for record, other in zip(records, reversed(records), strict=True)]


@contextmanager
def served(model: str, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a server of the model, a process of its own, once it answers; it is gone when the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--dtype", "float32"],
            env={**environment(), "HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        process.kill()
        process.wait()


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if httpx2.get(url, timeout=5.0).status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.2)
    pytest.fail(f"the server did not answer within {START_S} s:\n{log.read_text()}")


def kill_after_replies(journal: Path, number: int, process: subprocess.Popen[bytes]) -> None:
    """Kills the server as soon as the journal has so many replies."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if journal.is_file() and journal.read_bytes().count(b"\n") >= number:
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)


def test_a_real_server_that_is_killed_in_the_middle_is_gone_on_with_elsewhere(tmp_path: Path, pairs: list[Pair]) -> None:
    model, journal = find_model("smollm2-135m-instruct"), tmp_path / "judge.jsonl"
    with served(model, tmp_path / "server.log") as (url, process):
        real = Endpoint(url, model)
        with EndpointJudge(real, journal=journal, settings=patience(**SETTINGS)) as judge:
            judged = judge_pairs(pairs[:1], judge)
            tally = judge.tally()
        killer = threading.Thread(target=kill_after_replies, args=(journal, 3, process))
        killer.start()
        with (
            EndpointJudge(real, journal=journal, settings=patience(**SETTINGS)) as judge,
            pytest.raises(JudgeError, match="could not be had in 2 attempts"),
        ):
            judge_pairs(pairs[:2], judge)
        killer.join()
    assert (tally["num_sent"], tally["num_failed"], tally["num_replayed"], tally["num_replies"]) == (2, 0, 0, 2)
    kept = [json.loads(line) for line in journal.read_text().splitlines()]
    check_tokens(kept[:2], tally)
    summary = summarise(judged)
    assert summary["num_judged"] + summary["num_unparsed"] == 1
    with EndpointJudge(real, journal=journal, settings=patience(**SETTINGS)) as judge:
        assert judge_pairs(pairs[:1], judge) == judged, "the server is gone, and is not missed"
    with serving() as other, EndpointJudge(Endpoint(other.url, model), journal=journal, settings=patience(**SETTINGS)) as judge:
        assert judge_pairs(pairs[:2], judge)[:1] == judged
        tally = judge.tally()
    assert (tally["num_sent"], tally["num_failed"], tally["num_replayed"], tally["num_replies"]) == (1, 0, 3, 4)
    answered = [entry["key"] for entry in map(json.loads, journal.read_text().splitlines()) if entry["reply"] is not None]
    assert len(answered) == len(set(answered)) == 4


def check_tokens(entries: list[dict[str, Any]], tally: dict[str, Any]) -> None:
    """The tally is the sum of what the server said, and the prices are those of a million tokens."""
    usages = [entry["reply"]["usage"] for entry in entries if entry["reply"] is not None]
    assert tally["prompt_tokens"] == sum(usage["prompt_tokens"] for usage in usages) > 1000
    assert tally["completion_tokens"] == sum(usage["completion_tokens"] for usage in usages) > 2
    assert tally["num_without_usage"] == 0
    assert tally["cost"] == pytest.approx((tally["prompt_tokens"] + 2.0 * tally["completion_tokens"]) / 1e6)


def test_the_small_model_as_a_likelihood_judge_is_shown_to_be_weak(pairs: list[Pair]) -> None:
    """It decides by place more than by text: the orders contradict each other, and the figures beside the win rate say so."""
    base = load_base_model("smollm2-135m-instruct")
    lm = build_language_model(base, rank=1, alpha=1.0, dropout=0.0, target_modules=["q_proj"])
    same = Pair(pairs[0].instruction, pairs[0].reference, pairs[0].reference)
    judged = judge_pairs([*pairs, same], LikelihoodJudge(lm, None, batch_size=2))
    assert judged[-1].outcome == "tie"
    summary = summarise(judged[:-1])
    assert summary["num_judged"] == len(pairs), "likelihoods can always be read"
    assert summary["num_different"] == summary["num_readings"] == 2 * len(pairs), "it does tell texts apart"
    assert summary["self_agreement"]["share"] <= 0.5, summary
    assert abs(summary["position"]["first"] - summary["position"]["second"]) >= 0.5, summary
    assert "Cohen's kappa" in in_words(summary)
