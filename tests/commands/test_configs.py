"""`raysim configs`: every key with what it takes, the page of one key, and what is refused."""

import pytest

from raysim.cli import main
from raysim.config import KEYS, RULES, UNUSED_RULES, concerns, load, said, shipped_configs, statement


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What `raysim configs` prints."""
    assert main(["configs", *words]) == 0
    return capsys.readouterr().out


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_every_key_is_listed_once_with_its_default_and_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys).split("\n")
    listed = [line.split("=")[0].strip() for line in lines if line.startswith("  ") and "=" in line.split()[0]]
    assert sorted(listed) == sorted(KEYS)
    text = one_line("\n".join(lines))
    for key in KEYS.values():
        assert f" {key.name}={said(key.default)} " in text
    assert "lora.rank=16 at least 1, at most 65536" in text
    assert "lora.alpha=32 more than 0 lora" in text
    assert "privacy.delta=0 0, or at least 1e-100, at most 0.5" in text
    assert "data.preset='' '', alpacare, medinstruct" in text
    assert "privacy.secure_noise=false true or false" in text
    assert all(f"  {path.stem} " in "\n".join(lines) for path in shipped_configs().glob("*.yaml"))


@pytest.mark.parametrize("columns", [100, 140])
def test_lines_fit_the_terminal(columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    longest = [max(printed(capsys, *words).split("\n"), key=len) for words in ([], *([key] for key in KEYS))]
    assert [line for line in longest if len(line) > columns] == []


@pytest.mark.parametrize("columns", [20, 1000])
def test_a_narrow_or_wide_terminal_gets_readable_lines(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert 80 <= max(map(len, printed(capsys).split("\n"))) <= 140


def test_a_section_lists_its_keys_alone(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "resources")
    assert [line.split("=")[0].strip() for line in text.split("\n") if "=" in line] == [key for key in KEYS if key.startswith("resources.")]
    assert "resources.client.num_cpus" in printed(capsys, "resources.client")


@pytest.mark.parametrize("name", KEYS)
def test_the_page_of_a_key_tells_all_that_is_known_of_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    page, key = one_line(printed(capsys, name)), KEYS[name]
    assert page.startswith(f"{name}={said(key.default)} {key.doc} ")
    assert all(said(choice) in page for choice in key.choices)
    assert page.count(" counts where ") == len(key.needs)
    assert ("setting it elsewhere is refused" in page) == bool(key.only)
    for rule in RULES:
        if rule not in UNUSED_RULES or rule.key == name:
            assert (f"- {one_line(statement(rule))}" in page) == concerns(rule, name)


def test_a_page_reads_as_a_user_wants_it(capsys: pytest.CaptureFixture[str]) -> None:
    page = printed(capsys, "privacy.num_bands")
    for line in (
        "  takes     whole number, at least 1 and at most 1000000",
        "  default   1",
        "  counts    where privacy.unit is client; setting it elsewhere is refused",
        "  - privacy.num_bands needs privacy.sampler='cyclic', at least as many cohorts in its cycle, and seeded noise, privacy.secure_noise=false",
    ):
        assert f"\n{line}\n" in page
    assert "counts    where server.optimizer is adam or yogi\n" in printed(capsys, "server.beta2")
    assert "needed by server.beta1, server.beta2, server.tau" in printed(capsys, "server.optimizer")
    assert "sweep.private_selection counts every run as a trial" in printed(capsys, "sweep.seeds")
    assert "results   do not depend on it" in printed(capsys, "resources.num_actors")


def test_a_default_as_it_is_printed_can_be_given() -> None:
    for key in KEYS.values():
        if key.name != "compare":
            value = said(key.default)
            assert load() == load("", [f"{key.name}={value}"]), key.name


@pytest.mark.parametrize(
    ("asked", "near"), [("lora.rnak", "lora.rank"), ("num_gpu", "resources.client.num_gpus"), ("privcy", "privacy"), ("zzzzzz", "")]
)
def test_what_is_no_key_is_refused_with_the_nearest(asked: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", asked]) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"raysim: unknown key {asked}")
    assert (f"did you mean {near}?" in text) == bool(near)
    assert text.count("\n") == 1
