"""`raysim rules`: the table is that of the rules, and the traits that the configuration goes by are those of the functions."""

import dataclasses

import pytest

from raysim.cli import main
from raysim.commands import rules
from raysim.config import CHOICES
from raysim.lora import properties
from raysim.lora.rule import LoraRule, lora_rule
from raysim.lora.rules import average
from raysim.lora.spec import RULES
from tests.conftest import ROOT


def test_the_table_has_a_row_for_every_rule_and_stands_on_its_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(RULES)]] == list(CHOICES["lora.aggregation"]) == list(RULES)
    assert f"```text\n{printed}```" in (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    assert all(len(line) <= rules.WIDTH for line in lines)


def test_what_is_said_of_a_rule_is_measured_and_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another function in place of one rule's is another row."""

    def other(name: str) -> LoraRule:
        return dataclasses.replace(average.RULE, trainable=lora_rule("ffa").trainable) if name == "average" else lora_rule(name)

    before = rules.row(RULES["average"]).cells
    monkeypatch.setattr(rules, "lora_rule", other)
    after = rules.row(RULES["average"]).cells
    assert (before[3:6], after[3:6]) == (("A, B", "A, B", "no (0.32)"), ("B", "B", "yes"))


@pytest.mark.parametrize("name", RULES)
def test_the_traits_of_a_rule_are_those_of_its_functions(name: str) -> None:
    spec, rule = RULES[name], lora_rule(name)
    layout = properties.tried_layout(rule)
    assert spec.between == rule.between
    assert spec.linear == (rule.combine is None and rule.settle is None)
    assert spec.moves_base == ("delta" in rule.start(layout, 0))
    assert spec.personal == (rule.sends is not None)
    same = all(rule.trainable(layout, turn) == rule.trainable(layout, None) for turn in properties.TURNS)
    assert spec.fixed == (spec.linear and same and not spec.personal)
    assert spec.prunes == (rule.kept is not None and rule.given is not None and not spec.personal)
    assert spec.own_ranks == (rule.form == "stack" and rule.given is not None)
    if rule.form == "stack" or rule.trips:
        assert spec.no_client, "a sum that is clipped and noised is all that protects a client"
    assert rule.sensitivity(3.0) == 3.0
