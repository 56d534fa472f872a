"""Judgements of finished runs: the answers to held-out prompts that a run keeps, each against the true answer, in both orders.

A run is judged after it is finished, from `answers.jsonl` alone, so that a judge can be added, changed or taken up again later without
running anything twice. What an endpoint was asked and said stands in `judge.jsonl` of the run or the comparison; what came of it in
`judged.jsonl` (a pair a line) and `judge.json` (the summary) of each run. How far the judge agrees with itself is part of the summary.
Left out: judging earlier rounds than the last.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raysim.model.base_model import load_base_model, resolve_dtype
from raysim.model.language_model import build_language_model
from raysim.config import Config, JudgeConfig
from raysim.judging.endpoint import EndpointJudge, EndpointSettings, endpoint_from
from raysim.judging.likelihood import LikelihoodJudge, score_tokens
from raysim.judging.pairwise import Judge, Pair, in_words, judge_pairs, judgement_rows, summarise
from raysim.results.files import read_json, read_jsonl, write_json, write_jsonl


def check(judge: JudgeConfig) -> None:
    """Refuses an endpoint that the environment does not name, before any work.

    Errors: ValueError naming the variable.
    """
    if judge.kind == "endpoint":
        endpoint_from(os.environ)


def check_tokenizer(judge: JudgeConfig, tokenizer: Any) -> None:
    """Refuses a local judge whose tokenizer does not tell scores apart by one token, before any work.

    Errors: ValueError naming `judge.kind`.
    """
    if judge.kind != "likelihood":
        return
    try:
        score_tokens(tokenizer)
    except ValueError as error:
        raise ValueError(f"judge.kind='likelihood': {error}; set it to 'endpoint' or 'none'") from None


def settings_of(config: Config) -> dict[str, Any] | None:
    """What a judgement depends on beside the answers; None where none is asked for.

    The endpoint's address is no part of it: the same model behind another one is the same judge.
    """
    judge = config.judge
    if judge.kind == "none":
        return None
    if judge.kind == "likelihood":
        dtype = resolve_dtype(config.train.dtype, on_gpu=config.resources.client.num_gpus > 0)
        return {"kind": judge.kind, "model": config.model.name, "dtype": dtype, "batch_size": judge.batch_size}
    asked = {"temperature": judge.temperature, "max_tokens": judge.max_tokens, "max_unparsed": judge.max_unparsed}
    return {"kind": judge.kind, "model": endpoint_from(os.environ).model, **asked}


@contextlib.contextmanager
def open_judge(config: Config, *, journal: Path) -> Iterator[Judge]:
    """The configured judge, given back on leaving.

    Errors: ValueError if the endpoint is not named, or another process writes the journal.
    """
    judge = config.judge
    if judge.kind == "likelihood":
        dtype = resolve_dtype(config.train.dtype, on_gpu=config.resources.client.num_gpus > 0)
        base = load_base_model(config.model.name, dtype=dtype, cache_dir=config.model.cache_dir)
        lm = build_language_model(base, rank=1, alpha=1.0, dropout=0.0, target_modules=list(config.lora.target_modules))
        yield LikelihoodJudge(lm, None, batch_size=judge.batch_size)
        return
    with EndpointJudge(endpoint_from(os.environ), journal=journal, settings=endpoint_settings(judge, seed=config.seed)) as endpoint:
        yield endpoint


def endpoint_settings(judge: JudgeConfig, *, seed: int) -> EndpointSettings:
    """How the endpoint is asked, as configured."""
    return EndpointSettings(
        concurrency=judge.concurrency,
        timeout_s=judge.timeout_s,
        max_attempts=judge.max_attempts,
        first_wait_s=judge.first_wait_s,
        max_wait_s=judge.max_wait_s,
        max_unparsed=judge.max_unparsed,
        parameters={"temperature": judge.temperature, "max_tokens": judge.max_tokens},
        price_prompt=judge.price_prompt or None,
        price_completion=judge.price_completion or None,
        seed=seed,
    )


def last_answers(folder: Path) -> list[dict[str, Any]]:
    """The rows of answers.jsonl that hold an answer to a held-out prompt after the last measured round, of what the run is measured by.

    That is the release; where nothing is released (LOCIT), the adapters of all clients.

    Errors: ValueError if the run kept no answers.
    """
    path = folder / "answers.jsonl"
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is missing: the run is older than judges; run it again into another folder")
    rows = read_jsonl(path)
    answered = [row for row in rows if row["side"] == "heldout" and "answer" in row]
    last = max((row["round_index"] for row in answered), default=None)
    final = [row for row in answered if row["round_index"] == last]
    return [row for row in final if row["owner"] is None] or final


def is_judged(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the run's last answers were judged by the judge with these settings."""
    path = folder / "judge.json"
    return path.is_file() and read_json(path)["made_from"] == _made_from(last_answers(folder), settings)


def judge_run(folder: Path, judge: Judge, *, settings: dict[str, Any]) -> str:
    """Judges the run's last answers, writes judged.jsonl and judge.json, and returns the summary in words.

    Errors: as the judge's.
    """
    rows = last_answers(folder)
    judgements = judge_pairs([Pair(row["instruction"], row["answer"], row["reference"]) for row in rows], judge)
    found = summarise(judgements)
    words = in_words(found)
    known = [{"record_id": row["record_id"], "owner": row["owner"]} for row in rows]
    write_jsonl(folder / "judged.jsonl", [one | other for one, other in zip(known, judgement_rows(judgements), strict=True)])
    tally = judge.tally() if isinstance(judge, EndpointJudge) else None
    write_json(folder / "judge.json", {"made_from": _made_from(rows, settings), **found, "words": words, "tally": tally})
    return words


def _made_from(rows: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    pairs = json.dumps([(row["instruction"], row["answer"], row["reference"]) for row in rows])
    return {**settings, "answers_sha256": hashlib.sha256(pairs.encode()).hexdigest()}
