"""What a judge is told, and how its reply is read: whole, in any wrapping, and never by guessing."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysim.judging.pairwise import CRITERIA, Question, Ratings
from raysim.judging.prompts import EXAMPLE_RATINGS, REMINDER, RULES, json_turns, line_turns, read_ratings, score_openings, write_ratings

QUESTION = Question("What is 2 + 2?", "It is 4.", "It is 5.")
GOOD = Ratings((5.0, 4.0, 3.0, 2.0), (1.0, 2.0, 3.0, 4.5))
WRITTEN = write_ratings(GOOD)
OTHER = write_ratings(Ratings((1.0,) * 4, (1.0,) * 4))

ratings_strategy = st.builds(
    Ratings,
    st.tuples(*[st.integers(1, 5).map(float)] * 4),
    st.tuples(*[st.floats(1, 5)] * 4),
)


@given(ratings_strategy)
def test_what_is_written_is_read(ratings: Ratings) -> None:
    assert read_ratings(write_ratings(ratings)) == ratings


@pytest.mark.parametrize(
    "reply",
    [
        WRITTEN,
        f"Here are the scores:\n```json\n{json.dumps(json.loads(WRITTEN), indent=2)}\n```\nBoth are short.",
        f"{{thinking}} {WRITTEN} {{}} {{",
        f"{WRITTEN}\n{WRITTEN}",
        json.dumps({"comment": "x", **json.loads(WRITTEN)}),
        WRITTEN.replace("5.0", "5"),
    ],
)
def test_a_reply_is_read_in_any_wrapping(reply: str) -> None:
    assert read_ratings(reply) == GOOD


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "5 4 3 2",
        WRITTEN[:-1],
        f"{WRITTEN} no, rather {OTHER}",
        WRITTEN.replace("5.0", "6"),
        WRITTEN.replace("5.0", "0"),
        WRITTEN.replace("5.0", "NaN"),
        WRITTEN.replace("5.0", "true"),
        WRITTEN.replace("5.0", '"5"'),
        WRITTEN.replace("5.0", "null"),
        WRITTEN.replace('"coherence"', '"clarity"', 1),
        WRITTEN.replace("answer_2", "answer_3"),
        json.dumps({"answer_1": 4, "answer_2": 3}),
        json.dumps([5, 4]),
        '{"a":' * 5000,
        "{" * 50000,
    ],
)
def test_what_has_no_one_reading_is_not_read(reply: str) -> None:
    assert read_ratings(reply) is None


def test_the_judge_is_warned_and_shown_an_example_that_leans_to_no_side() -> None:
    for word in ("Position.", "Length.", "Names.", *CRITERIA, "1 (poor)", "5 (excellent)"):
        assert word in RULES
    assert sum(EXAMPLE_RATINGS.first) == sum(EXAMPLE_RATINGS.second)
    assert EXAMPLE_RATINGS.first != EXAMPLE_RATINGS.second
    assert read_ratings(REMINDER) is None, "a judge that repeats the reminder has not judged"


def test_both_conversations_ask_about_the_question_in_its_order() -> None:
    for turns in (json_turns(QUESTION), line_turns(QUESTION)):
        assert [role for role, _ in turns] == ["user", "assistant", "user"]
        assert turns[0][1].startswith(RULES)
        asked = turns[2][1]
        assert RULES not in asked
        assert asked.index("What is 2 + 2?") < asked.index("It is 4.") < asked.index("It is 5.")
    swapped = Question(QUESTION.instruction, QUESTION.second, QUESTION.first)
    assert json_turns(swapped)[2][1].index("It is 5.") < json_turns(swapped)[2][1].index("It is 4.")
    assert read_ratings(json_turns(QUESTION)[1][1]) == EXAMPLE_RATINGS
    lines = line_turns(QUESTION)[1][1].splitlines()
    assert [line.rsplit(" ", 1)[0] for line in lines] == score_openings()
    assert [float(line.rsplit(" ", 1)[1]) for line in lines] == [*EXAMPLE_RATINGS.first, *EXAMPLE_RATINGS.second]
