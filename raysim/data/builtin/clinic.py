"""The built-in set `clinic`: 400 fictional clinical texts, one for each of 40 conditions (10 topics) and 10 kinds of writing.

All people and values are invented and the medicine is simplified; nothing here is advice. An instruction tells the
situation (age, occupation, complaint) and never who it is about; the response also has a name, a date, a measured value and
at times a telephone or file number. These are the record's details: they can be known from a training record only.
Left out: several records of one patient (every record is its own group).
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from raysim.data.builtin.clinic_facts import TOPICS, Condition
from raysim.data.builtin.people import Person, capital, people, some_date, some_phone, with_article
from raysim.data.records import Record

NOTICE = "All patients, staff and values are fictional, the medicine is simplified, and nothing here is medical advice."

JOBS = """accountant baker beekeeper bookbinder bus driver carpenter cellist chemist chef cleaner cobbler dentist docker electrician
engineer farmer firefighter fisher florist gardener glazier goldsmith hairdresser hotel porter interpreter joiner journalist judge
kindergarten teacher lawyer librarian locksmith mason mechanic midwife miller musician nurse optician painter pharmacist photographer
pilot plumber police officer postal worker potter printer roofer sailor secretary shepherd shop assistant singer social worker surveyor
tailor taxi driver teacher tiler translator vet waiter warehouse worker weaver welder"""
TWO_WORDS = ("bus", "hotel", "kindergarten", "police", "postal", "shop", "social", "taxi", "warehouse")
SPANS = (
    *(
        f"for {span}"
        for span in ("ten days", "two weeks", "three weeks", "a month", "six weeks", "two months", "half a year", "most of the winter")
    ),
    *(f"since {start}" for start in ("the spring", "last autumn", "a move of house", "the new year")),
)


@dataclass(frozen=True)
class Case:
    """One fictional patient with one condition: what the instruction may tell, then what only the response tells."""

    condition: Condition
    age: int
    job: str
    span: str
    person: Person
    date: str
    reading: str
    missed: bool
    """Whether the reading misses its goal."""
    phone: str
    file_number: str

    @property
    def who(self) -> str:
        return with_article(f"{self.age}-year-old {self.job}")

    @property
    def secrets(self) -> tuple[str, ...]:
        return (self.person.name, self.date, self.reading, self.phone, self.file_number)


# An instruction and its response.
Text = tuple[str, str]
Task = Callable[[Case, Random], Text]


def explain_result(case: Case, rng: Random) -> Text:
    c, p, say = case.condition, case.person, rng.choice
    instruction = say(
        (
            f"{capital(case.who)} with {c.name} has a new {c.test.name} result. Explain it to {p.him} in plain words, with the next step.",
            f"Explain the latest {c.test.name} in a short letter to {case.who} who came in because of {c.complaint}.",
            f"How would you put a {c.test.name} result to {case.who} who has lived with {c.name} {case.span}?",
        )
    )
    opening = say(
        (
            f"Dear {p.name}, the test of {case.date} shows {with_article(case.reading)}.",
            f"Dear {p.name}, we have your result of {case.date}: {case.reading}.",
        )
    )
    return instruction, " ".join(
        (opening, _verdict(case, rng), f"In {c.name}, {c.cause}.", _action(case, rng), f"What also helps is {c.habit}.")
    )


def _verdict(case: Case, rng: Random) -> str:
    goal = case.condition.test.goal_text
    if case.missed:
        return rng.choice(
            (
                f"We aim for {goal}, so we are not there yet.",
                f"The goal is {goal}; this misses it.",
                f"It should be {goal}, so something has to change.",
            )
        )
    return rng.choice((f"That meets the goal of {goal}.", f"We aim for {goal}, so this is good news.", f"It should be {goal}, and it is."))


def _action(case: Case, rng: Random) -> str:
    c = case.condition
    if case.missed:
        return rng.choice((f"The next step is {c.change}.", f"I therefore suggest {c.change}.", f"Our proposal is {c.change}."))
    return rng.choice(
        (f"Please go on with {c.drug}, {c.dose}.", f"Nothing changes: {c.drug}, {c.dose}.", f"Stay with {c.drug} as before ({c.dose}).")
    )


TASKS: dict[str, Task] = {"explain result": explain_result}


def _jobs() -> list[str]:
    words, jobs = JOBS.split(), []
    while words:
        count = 2 if words[0] in TWO_WORDS else 1
        jobs.append(" ".join(words[:count]))
        words = words[count:]
    return jobs


def _case(condition: Condition, person: Person, *, job: str, rng: Random) -> Case:
    age = rng.randint(*condition.ages)
    test = condition.test
    value = round(rng.uniform(test.low, test.high), test.decimals)
    return Case(
        condition=condition,
        age=age,
        job=f"retired {job}" if age > 67 else job,
        span=rng.choice(SPANS),
        person=person,
        date=some_date(rng),
        reading=f"{test.name} of {value:.{test.decimals}f}{test.unit}",
        missed=value >= test.goal if test.high_is_bad else value <= test.goal,
        phone=some_phone(rng),
        file_number=f"{rng.choice('ABCDEFGHKLMNPRSTUVWXYZ')}-{rng.randint(10000, 99999)}",
    )


def records() -> list[Record]:
    """The 400 records, the same on every call; the label is the topic."""
    rng = Random(20240501)
    plan = [(topic, condition, task) for topic, conditions in TOPICS.items() for condition in conditions for task in TASKS.values()]
    rng.shuffle(plan)
    patients = people(rng, len(plan), woman=[condition.only == "women" or rng.random() < 0.5 for _, condition, _ in plan])
    jobs = _jobs()
    result = []
    for index, (topic, condition, task) in enumerate(plan):
        case = _case(condition, patients[index], job=rng.choice(jobs), rng=rng)
        instruction, response = task(case, rng)
        details = tuple(secret for secret in case.secrets if secret in response)
        result.append(Record(index, instruction, response, label=topic, details=details))
    return result
