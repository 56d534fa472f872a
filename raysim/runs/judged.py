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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raysim import remote, storage
from raysim.config import Config, JudgeConfig
from raysim.judging.endpoint import EndpointJudge, EndpointSettings, endpoint_from
from raysim.judging.likelihood import LikelihoodJudge, score_tokens
from raysim.judging.pairwise import Judge, Pair, in_words, judge_pairs, judgement_rows, summarise
from raysim.model.base_model import load_base_model, resolve_dtype
from raysim.model.language_model import build_language_model
from raysim.results import files
from raysim.results.contents import Answer
from raysim.results.folders import RunFolder


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


def judge_runs(config: Config, folders: Sequence[Path], *, journal: Path, display: bool | None = None) -> bool:
    """Judges the answers of finished runs that this judge has not judged; whether there were any (see the head of this module).

    Errors: RuntimeError if the judge cannot be had, ValueError if it refuses; the same call goes on from there.
    """
    settings = settings_of(config)
    waiting = [folder for folder in folders if settings is not None and not is_judged(folder, settings)]
    if not waiting:
        return False
    with open_judge(config, journal=journal) as judge:
        for folder in waiting:
            with storage.held(folder):
                words = judge_run(folder, judge, settings=settings or {})
            remote.push(journal)
            remote.push(folder)
            if display is not False:
                print(f"judged {folder.name}: {words}", flush=True)
    return True


def last_answers(folder: Path) -> list[Answer]:
    """The answers to held-out prompts after the last measured round, of what the run is measured by.

    That is the release; where nothing is released (LOCIT), the adapters of all clients.
    """
    answered = [row for row in RunFolder(folder).answers if row.side == "heldout" and row.answer is not None]
    last = max((row.round_index for row in answered), default=None)
    final = [row for row in answered if row.round_index == last]
    return [row for row in final if row.owner is None] or final


def is_judged(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the run's last answers were judged by the judge with these settings."""
    found = RunFolder(folder).judge
    return found is not None and found.made_from == _made_from(_pairs(last_answers(folder)), settings)


def judge_run(folder: Path, judge: Judge, *, settings: dict[str, Any]) -> str:
    """Judges the run's last answers, writes what was judged and its summary, and returns the summary in words.

    Errors: as the judge's.
    """
    rows = last_answers(folder)
    pairs = _pairs(rows)
    judgements = judge_pairs(pairs, judge)
    found = summarise(judgements)
    words = in_words(found)
    known = [{"record_id": row.record_id, "owner": row.owner} for row in rows]
    files.write_jsonl(folder / files.JUDGED, [one | other for one, other in zip(known, judgement_rows(judgements), strict=True)])
    tally = judge.tally() if isinstance(judge, EndpointJudge) else None
    files.write_json(folder / files.JUDGE, {"made_from": _made_from(pairs, settings), **found, "words": words, "tally": tally})
    files.seal(folder, files.JUDGED, files.JUDGE)
    return words


def _pairs(rows: Sequence[Answer]) -> list[Pair]:
    return [Pair(row.instruction or "", row.answer or "", row.reference or "") for row in rows]


def _made_from(pairs: Sequence[Pair], settings: dict[str, Any]) -> dict[str, Any]:
    texts = json.dumps([(pair.instruction, pair.answer, pair.reference) for pair in pairs])
    return {**settings, "answers_sha256": hashlib.sha256(texts.encode()).hexdigest()}
