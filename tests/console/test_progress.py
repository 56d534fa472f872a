"""What a run prints: plain lines where there is no terminal, a live block and a table that fit where there is one."""

import fcntl
import os
import pickle
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from raysim.console.progress import Progress, record_line, run_line
from raysim.console.tables import Compared, columns_of, comparison_text, print_comparison, short_text
from raysim.reports.tables import comparison_rows
from raysim.results.contents import Summary
from raysim.results.folders import typed
from tests.run_folders import ENDS, record, summary

ROOT = Path(__file__).resolve().parents[2]


def rows() -> list[Compared]:
    return comparison_rows([summary_of(method) for method in ENDS])


def summary_of(method: str) -> Summary:
    return typed(Summary, summary(method, method, [record(method, -1 if method == "base" else 4, 3)], seed=0), where="summary.json")


def a_run(progress: Progress, num_rounds: int = 2) -> None:
    with progress:
        for round_index in range(num_rounds):
            progress.round(round_index, [0, 1, 2])
            for client_id in (1, 0, 2):
                progress.client_done(client_id, 500, "training")
            progress.phase("evaluating")
            progress.record(record("dplora", round_index, 3))


def control_characters(text: str) -> set[str]:
    return {character for character in text if ord(character) < 32 and character != "\n"} | ({"\x7f"} & set(text))


def test_without_a_terminal_there_is_one_plain_line_a_round(capsys: pytest.CaptureFixture[str]) -> None:
    a_run(Progress(2, "dplora"))
    out = capsys.readouterr().out
    assert not control_characters(out)
    lines = out.splitlines()
    assert [line.split("  ")[1] for line in lines] == ["round 1/2", "round 2/2"]
    assert "eps 1.7" in lines[0]
    assert "left" in lines[0]
    assert "left" not in lines[1], "nothing is left after the last round"


def test_disabled_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    a_run(Progress(2, "dplora", enabled=False))
    assert capsys.readouterr().out == ""


def test_a_record_line_has_the_numbers_of_its_record() -> None:
    line = record_line(record("fedit", 2, 3) | {"num_dropped": 1}, title="fedit", total_rounds=5)
    expected = record("fedit", 2, 3)
    assert line.startswith("fedit  round 3/5  ")
    assert f"loss {expected['train_loss']:.2f}" in line
    assert f"nll {expected['eval']['heldout_nll']:.2f}" in line
    assert f"leak {expected['attack']['train_rouge_l']:.2f}/{expected['attack']['heldout_rouge_l']:.2f}" in line
    assert "1 dropped" in line
    assert line.rstrip().endswith("eps —  1 dropped")


def test_a_record_line_leaves_out_what_was_not_measured() -> None:
    line = record_line(record("base", -1, 3) | {"attack": None, "tokens_per_s": None}, title="base", total_rounds=0)
    assert line == "base  before training  nll 2.41  eps —"


def test_time_left_is_known_after_the_first_round_and_shrinks() -> None:
    progress = Progress(3, "fedit", enabled=False)
    progress.round(0, [0])
    assert progress.left_s() is None
    progress._round_started -= 10  # as if the round had begun ten seconds ago
    progress.record(record("fedit", 0, 1))
    first = progress.left_s()
    assert first == pytest.approx(20, abs=0.5)
    progress.round(1, [0])
    progress._round_started -= 7
    assert progress.left_s() == pytest.approx(13, abs=0.5)
    progress._round_started -= 3
    progress.record(record("fedit", 1, 1))
    assert progress.left_s() == pytest.approx(10, abs=0.5)
    progress.record(record("fedit", 2, 1))
    assert progress.left_s() == 0


def test_time_left_after_a_resume_counts_the_rounds_that_are_left() -> None:
    progress = Progress(10, "fedit", enabled=False)
    progress.round(7, [0])
    progress._round_started -= 4
    progress.record(record("fedit", 7, 1))
    assert progress.left_s() == pytest.approx(8, abs=0.5)


def test_a_long_round_gives_a_sign_of_life_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, "fedit") as progress:
        progress.round(0, [0, 1])
        progress._last_line -= 60
        progress.client_done(0, 10)
        progress.client_done(1, 10)
    assert capsys.readouterr().out.splitlines() == ["fedit  round 1/2  training  1 of 2 clients done  elapsed 0:00"]


def test_plain_table_is_aligned_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison(rows())
    out = capsys.readouterr().out
    assert not control_characters(out)
    assert out.startswith("\nmethod "), "one empty line between the rounds and the table"
    table = out[1:].split("\n\n")[0].splitlines()
    assert len(table) == 2 + len(ENDS) + 1, "a row a run, and one for what FEDPIT's clients keep"
    table = [line for line in table if "kept private" not in line]
    ends = [match.end() for match in re.finditer(r"-+", table[1])]
    for line, row in zip(table[2:], rows(), strict=True):
        for (key, _, _), end in zip(columns_of(rows())[1:], ends[1:], strict=True):
            assert line[:end].endswith(row.text[key])
            assert line[end : end + 1] in ("*" if key in row.best else " ", "")
    assert out.count("no guarantee") == len(ENDS) - 2, "all but DP-LoRA, and the base model, which has seen no record"


def test_comparison_text_shows_what_clients_keep() -> None:
    one = summary_of("fedpit")
    text = comparison_text(comparison_rows([one]))
    assert "kept private" in text
    assert one.private is not None
    assert one.private.eval is not None
    assert f"{one.private.eval.heldout_nll:.3f}" in text


def test_only_a_table_with_a_star_explains_it() -> None:
    assert "*: best of the trained runs." in comparison_text(rows())
    assert "*" not in comparison_text(comparison_rows([summary_of("fedit")]))


LIGHT = """
import pickle, sys, time
from raysim.console.progress import Progress
from raysim.console.tables import print_comparison
with open(sys.argv[1], "rb") as file:
    rows, record = pickle.load(file)
"""
"""How a script begins that prints what this process has made; what makes it imports torch."""


def script_of(text: str, folder: Path) -> list[str]:
    """The command of a script that knows `rows`, and the `record` of a round."""
    made = folder / "made"
    made.write_bytes(pickle.dumps((rows(), record("fedit", 0, 2))))
    return [sys.executable, "-c", LIGHT + text, str(made)]


def test_output_that_cannot_encode_signs_is_still_written(tmp_path: Path) -> None:
    script = script_of("print_comparison(rows)\nwith Progress(1, 'fedpit') as p: p.round(0, [0]); p.record(record)", tmp_path)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert b"no guarantee" in done.stdout


def on_a_terminal(script: list[str], columns: int) -> str:
    """What a script prints on a terminal of that width."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(script, stdout=side, stderr=side, env=environment)
    os.close(side)
    output = b""
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:  # Linux says so when the last writer has closed the terminal
            break
        if not chunk:
            break
        output += chunk
    os.close(main)
    assert process.wait(timeout=120) == 0, output.decode()
    return output.decode()


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "")


def test_a_run_of_many_is_announced_with_the_time_that_all_will_take() -> None:
    assert run_line(1, 48, name="fedit", seed=0, left_s=None) == "run 1 of 48: fedit, seed 0"
    assert run_line(7, 48, name="fedpit", seed=2, left_s=3725.0) == "run 7 of 48: fedpit, seed 2, all of them done in about 1:02:05"


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_table_fits_the_terminal(columns: int, tmp_path: Path) -> None:
    raw = on_a_terminal(script_of("print_comparison(rows)", tmp_path), columns)
    lines = without_escapes(raw).splitlines()
    assert "\x1b[1" in raw, "the best values are emphasised"
    assert max(map(len, lines)) <= columns
    for row in rows():
        line = next(line for line in lines if line.startswith(row.label))
        for key, _, _ in columns_of(rows()):
            text = row.text[key]
            assert text in line or (columns <= 100 and short_text(text) in line)
    assert "no guarantee" in "\n".join(lines)


def test_live_block_shows_clients_and_leaves_only_the_permanent_lines(tmp_path: Path) -> None:
    script = (
        "with Progress(2, 'fedit') as p:\n p.round(0, [0, 1]); p.client_done(1, 700); time.sleep(0.6)\n"
        " p.record(record); p._last_line -= 60; p.phase('attacking'); time.sleep(0.4)"
    )
    raw = on_a_terminal(script_of(script, tmp_path), 100)
    text = without_escapes(raw)
    assert "\x1b[" in raw
    assert re.search(r"… 0\s+✓ 1", text)
    assert "round 1/2" in text
    assert "elapsed" in text
    assert re.search(r"about \d+:\d\d left", text)
    assert text.count("loss ") == 1
    assert "clients done" not in text, "signs of life are for logs"
    assert "attacking  elapsed" not in text
