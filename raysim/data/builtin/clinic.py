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
engineer farmer firefighter fisher florist gardener glazier goldsmith hairdresser hotel porter interpreter joiner journalist
kindergarten teacher lawyer librarian locksmith mason mechanic midwife miller musician nurse optician painter pharmacist photographer
pilot plumber police officer postal worker potter printer roofer sailor secretary shepherd shop assistant singer social worker surveyor
tailor taxi driver teacher tiler translator vet waiter warehouse worker weaver welder"""
TWO_WORDS = ("bus", "hotel", "kindergarten", "police", "postal", "shop", "social", "taxi", "warehouse")
SHORT_SPANS = ("for two days", "for three days", "for four days", "for five days", "since the weekend", "since Monday")
LONG_SPANS = (
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
    def work_note(self) -> str:
        """A sentence for those whose work or age asks for one, with a space before it; else empty."""
        if self.age >= 76:
            return " At this age a fall or dizziness is a reason to call early."
        return f" {WORK_NOTES[self.job]}" if self.missed and self.job in WORK_NOTES else ""

    @property
    def secrets(self) -> tuple[str, ...]:
        return (self.person.name, self.date, self.reading, self.phone, self.file_number)


BEGINNERS = (
    "student",
    "apprentice baker",
    "shop assistant",
    "waiter",
    "trainee nurse",
    "gardener",
    "warehouse worker",
    "swimming instructor",
)
"""Occupations before the age of 25."""

WORK_NOTES = {
    "bus driver": "Leave the bus to a colleague on bad days.",
    "taxi driver": "Do not drive passengers on bad days.",
    "pilot": "The flight surgeon has to know about it.",
    "roofer": "Stay off the roof on bad days.",
    "firefighter": "The station should put light duty on the roster.",
    "sailor": "Take enough of the medicine on board.",
    "chef": "Ask for a chair and a break in the late shift.",
    "nurse": "Night shifts should wait until this has settled.",
    "midwife": "Night shifts should wait until this has settled.",
    "police officer": "The duty doctor should know about it.",
    "docker": "Ask for work without heavy loads for now.",
    "mason": "Ask for work without heavy loads for now.",
    "warehouse worker": "Ask for work without heavy loads for now.",
    "baker": "Plan the tablets and meals around the early shift.",
    "farmer": "Someone else should see to the animals this week.",
}
"""What an occupation adds to the advice while the goal is missed."""


# An instruction and its response.
Text = tuple[str, str]
Task = Callable[[Case, Random], Text]


def explain_result(case: Case, rng: Random) -> Text:
    c, p, say = case.condition, case.person, rng.choice
    instruction = say(
        (
            f"{capital(case.who)} with {c.name} has a new {c.test.name} result. Explain it to {p.him} in plain words, with the next step.",
            f"Explain the latest {c.test.name} in a short letter to {case.who} who came in because of {c.complaint}.",
            f"How would you put {with_article(c.test.name)} result to {case.who} who has lived with {c.name} {case.span}?",
        )
    )
    opening = say(
        (
            f"Dear {p.name}, the test of {case.date} shows {with_article(case.reading)}.",
            f"Dear {p.name}, your result of {case.date} is here: {with_article(case.reading)}.",
            f"Dear {p.name}, on {case.date} we measured {with_article(case.reading)}.",
        )
    )
    parts = [opening, _verdict(case, rng), f"In {c.name}, {c.cause}.", _action(case, rng), f"What also helps is {c.habit}.{case.work_note}"]
    if rng.random() < 0.5:
        parts.append(say((f"Questions? Ring us on {case.phone}.", f"Our nurses answer on {case.phone}.")))
    return instruction, " ".join(parts)


def letter(case: Case, rng: Random) -> Text:
    c, p, say = case.condition, case.person, rng.choice
    instruction = say(
        (
            f"Write to the family doctor of {case.who} seen by {c.service} for {c.name}.",
            f"Draft a clinic letter to the family doctor. The patient is {case.who} with {c.name} and {c.complaint}.",
            f"After today's visit, {case.who} with {c.complaint} needs a letter to the practice. Keep it brief.",
        )
    )
    opening = say(
        (
            f"Dear colleague, I saw {p.name} on {case.date} because of {c.complaint} {case.span}.",
            f"Dear colleague, thank you for asking us to see {p.name}, who came on {case.date} with {c.complaint}.",
            f"Dear colleague, {p.name} (file {case.file_number}) attended on {case.date}. {capital(p.he)} describes {c.complaint} {case.span}.",
        )
    )
    finding = say(
        (f"We found {with_article(case.reading)}", f"The examination was otherwise unremarkable, with {with_article(case.reading)}")
    )
    verdict = f"{finding}, {'short of' if case.missed else 'in line with'} the goal ({c.test.goal_text})."
    plan = f"I have advised {c.change}." if case.missed else f"{capital(p.he)} stays on {c.drug} ({c.dose})."
    closing = say(
        (
            f"Could you please arrange {c.check} {c.when}?",
            f"We will arrange {c.check} {c.when} and write again.",
            f"We will see {p.him} again after {c.check} {c.when}.",
        )
    )
    return instruction, " ".join((opening, verdict, plan, f"We talked about {c.habit}.{case.work_note}", closing, "With kind regards."))


def patient_question(case: Case, rng: Random) -> Text:
    c, p, say = case.condition, case.person, rng.choice
    instruction = say(
        (
            f"I am {case.who} with {c.name}. Since I started on {c.drug} I notice {c.side_effect}. Is that normal?",
            f"Question from {case.who}: I have {c.name}, and {c.side_effect} bothers me since {c.drug}. Should I stop?",
            f"I work as {with_article(case.job)}, am {case.age} and was put on {c.drug}. What do I do about {c.side_effect}?",
        )
    )
    thanks = say(
        (f"Dear {p.name}, thank you for writing.", f"Good morning {p.name}, you were right to ask.", f"Dear {p.name}, I can reassure you.")
    )
    answer = say(
        (
            f"The commonest trouble with {c.drug} is {c.side_effect}, and that is no reason to stop.",
            f"Many people on {c.drug} report {c.side_effect}; it mostly fades, so please do not stop on your own.",
        )
    )
    if case.missed:
        chart = say(
            (
                f"On {case.date} your chart still had {with_article(case.reading)}, so the treatment matters.",
                f"With {with_article(case.reading)} on {case.date}, you still need it.",
            )
        )
    else:
        chart = say(
            (
                f"It works: on {case.date} we noted {with_article(case.reading)}.",
                f"And it is worth it, with {with_article(case.reading)} on {case.date}.",
            )
        )
    contact = f"Call {case.phone} if it gets worse." if rng.random() < 0.6 else "Write again if it gets worse."
    return instruction, " ".join(
        (thanks, answer, chart, f"Remember: {c.caution}.{case.work_note}", contact, f"Seek help at once for {c.red_flag}.")
    )


def triage(case: Case, rng: Random) -> Text:
    c, p, say = case.condition, case.person, rng.choice
    instruction = say(
        (
            f"Telephone triage: {case.who} reports {c.complaint} {case.span}. Write the call note with the urgency.",
            f"{capital(case.who)} known to have {c.name} rings about {c.complaint}. How urgent is it? Note the call.",
            f"Triage this call and say why: {case.job}, {case.age}, {c.complaint} {case.span}.",
        )
    )
    urgency = say(("same day", "seen today")) if case.missed else say(("routine", "within the week"))
    head = say((f"Urgency: {urgency}. Caller: {p.name}, {case.phone}.", f"{capital(urgency)}. Call from {p.name}, back on {case.phone}."))
    story = f"{capital(c.complaint)} {case.span}; diagnosis {c.name}."
    reason = f"Last {case.reading} on {case.date}, {'outside' if case.missed else 'within'} the goal ({c.test.goal_text})"
    reason += ", so it cannot wait." if case.missed else ", and no alarm signs now."
    offer = f"Doctor to consider {c.change}." if case.missed else f"Advised {c.habit}, and to go on with {c.drug}."
    return instruction, " ".join(
        (
            head,
            story,
            reason,
            offer,
            say((f"Safety net: call back at once for {c.red_flag}.", f"Told to go to the emergency department in case of {c.red_flag}.")),
        )
    )


def medication(case: Case, rng: Random) -> Text:
    c, p, say = case.condition, case.person, rng.choice
    instruction = say(
        (
            f"Write out the treatment with {c.drug} for {case.who} with {c.name}: how, what to expect, what to avoid.",
            f"Give {case.who} the points to know about {c.drug}.",
            f"{capital(case.who)} starts on {c.drug} because of {c.complaint}. Write a leaflet of a few lines for {p.him}.",
        )
    )
    head = say(
        (
            f"Plan for {p.name}, {case.date}.",
            f"For {p.name} (file {case.file_number}), handed out on {case.date}.",
            f"{p.name}, your treatment from {case.date}:",
        )
    )
    why = f"Why: {case.reading}, while the goal is {c.test.goal_text}." if case.missed else f"Why: it keeps you well; last {case.reading}."
    points = (f"How: {c.drug}, {c.dose}.", f"What to expect: {c.side_effect}.", f"Take care: {c.caution}.", f"Alarm signs: {c.red_flag}.")
    return instruction, "\n".join((head, why, *points, f"Next: {c.check} {c.when}."))


def discharge(case: Case, rng: Random) -> Text:
    c, p, say = case.condition, case.person, rng.choice
    instruction = say(
        (
            f"Write the discharge note for {case.who} who came to the day clinic with {c.complaint}. Diagnosis: {c.name}.",
            f"{capital(case.who)} goes home today from the day clinic after treatment for {c.name}. Summarise the stay and the plan.",
            f"Discharge summary, please: {c.name}, {case.who}, treated with {c.drug}.",
        )
    )
    head = say(
        (
            f"{p.name}, file {case.file_number}, discharged on {case.date}.",
            f"Discharge of {p.name} on {case.date} (file {case.file_number}).",
        )
    )
    stay = say(
        (f"Came with {c.complaint}; diagnosis {c.name}.", f"{capital(p.he)} came in because of {c.complaint}, explained by {c.name}.")
    )
    course = f"At discharge {case.reading}, {'not yet at' if case.missed else 'at'} goal."
    drugs = f"Goes home on {c.drug}, {c.dose}." + (f" If there is no better value soon: {c.change}." if case.missed else "")
    after = say((f"To do: {c.check} {c.when}.", f"The practice is asked for {c.check} {c.when}."))
    advice = () if case.missed else (f"Advice given on {c.habit}.",)
    return instruction, " ".join((head, stay, course, drugs, after, f"Come back for {c.red_flag}.", *advice))


def referral(case: Case, rng: Random) -> Text:
    c, p, say = case.condition, case.person, rng.choice
    instruction = say(
        (
            f"Refer {case.who} with {c.name} to {c.service}.",
            f"Write a referral to {c.service}: {case.who}, {c.complaint} {case.span}.",
            f"{capital(case.who)} has {c.complaint} despite {c.drug}. Ask {c.service} for help in a few sentences.",
        )
    )
    request = say((f"I would be grateful if you saw {p.name}", f"Please see {p.name}", f"I should like your opinion on {p.name}"))
    job = "" if case.job.startswith("retired") else f" {capital(p.he)} works as {with_article(case.job)}."
    history = f"{capital(c.complaint)} {case.span}, in the setting of {c.name}.{job}"
    state = f"On {case.date} we measured {with_article(case.reading)} (goal {c.test.goal_text}) on {c.drug}, {c.dose}."
    wish = (
        f"Is it time for {c.change}?"
        if case.missed
        else say(("The value is good, so the question is about the symptoms.", "I ask for a second opinion on the symptoms."))
    )
    reach = say((f"{capital(p.he)} can be reached on {case.phone}.", f"Telephone: {case.phone}."))
    return instruction, " ".join((f"To {c.service}: {request} ({case.file_number}).", history, state, wish, reach))


def progress_note(case: Case, rng: Random) -> Text:
    c, p, say = case.condition, case.person, rng.choice
    instruction = say(
        (
            f"Turn this visit into a SOAP note: {case.who}, {c.name}, {c.complaint} {case.span}.",
            f"Write a structured progress note for {case.who} followed for {c.name}.",
            f"SOAP note, telegram style. {capital(case.job)}, {case.age}, comes back about {c.complaint}.",
        )
    )
    subjective = say((f"{c.complaint}, {case.span}", f"{c.complaint}; takes {c.drug} as told", f"{c.complaint}; some {c.side_effect}"))
    plan = f"{c.change}; {c.check} {c.when}" if case.missed else f"same {c.drug}, {c.dose}; {c.check} {c.when}"
    lines = (
        f"{case.date}, {p.name}, file {case.file_number}",
        f"S: {subjective}.",
        f"O: {case.reading} (goal {c.test.goal_text}).",
        f"A: {c.name}, {'not controlled' if case.missed else 'controlled'}.",
        f"P: {plan}. Advised {c.habit}. Warned about {c.red_flag}.",
    )
    return instruction, "\n".join(lines)


def reminder(case: Case, rng: Random) -> Text:
    c, p, say = case.condition, case.person, rng.choice
    instruction = say(
        (
            f"Write a friendly text message that reminds {case.who} of the next check for {c.name}.",
            f"Remind {case.who} on {c.drug} of the coming appointment, in a message for the telephone.",
            f"Send a short reminder to {case.who} who missed the last visit for {c.name}.",
        )
    )
    greeting = say((f"Hello {p.name},", f"Good day {p.name},", f"Hi {p.name},"))
    visit = say((f"we expect you on {case.date} for {c.check}.", f"your next visit is on {case.date}. Planned: {c.check}."))
    last = (
        f"Last time we noted {with_article(case.reading)}, {'and we would like to see it' if case.missed else 'nicely'} {c.test.goal_text}."
    )
    tip = say((f"Until then, keep up {c.habit}.", f"Meanwhile {c.habit} will do you good.", f"And do not forget {c.drug}: {c.dose}."))
    bring = say(("Please bring your list of medicines.", "Bring your diary along.", "Please come ten minutes early."))
    change = say((f"To change the day, call {case.phone}.", f"If you cannot come, tell us on {case.phone}."))
    return instruction, " ".join((greeting, visit, last, tip, bring, change))


def handover(case: Case, rng: Random) -> Text:
    c, p, say = case.condition, case.person, rng.choice
    instruction = say(
        (
            f"Give an SBAR handover to the evening team about {case.who} with {c.name}.",
            f"Hand {case.who} over to your colleague (situation, background, assessment, recommendation). Main problem: {c.complaint}.",
            f"Shift change: brief the next nurse on {case.who} here with {c.complaint}.",
        )
    )
    situation = say(
        (
            f"{p.name}, {case.age}, here since {case.date} with {c.complaint}",
            f"{p.name}, under our care since {case.date}; {c.complaint} {case.span}",
        )
    )
    background = say((f"{c.name}, on {c.drug}", f"{c.name}, treated with {c.drug}, {c.dose}", f"{case.job} with {c.name}"))
    assessment = f"{case.reading}, {'short of' if case.missed else 'within'} the goal ({c.test.goal_text})"
    wish = f"{c.change} after the round" if case.missed else f"no change tonight; plan {c.check} {c.when}"
    family = say((f"Family on {case.phone}. ", f"Next of kin: {case.phone}. ", ""))
    lines = (
        f"S: {situation}.",
        f"B: {capital(background)}.",
        f"A: last {assessment}.",
        f"R: {capital(wish)}. {family}Call the doctor for {c.red_flag}.",
    )
    return instruction, "\n".join(lines)


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


TASKS: tuple[Task, ...] = (
    explain_result,
    letter,
    patient_question,
    triage,
    medication,
    discharge,
    referral,
    progress_note,
    reminder,
    handover,
)


def occupations() -> list[str]:
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
        job=rng.choice(BEGINNERS) if age < 25 else f"retired {job}" if age > 67 else job,
        span=rng.choice(SHORT_SPANS if condition.sudden else LONG_SPANS),
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
    plan = [(topic, condition, task) for topic, conditions in TOPICS.items() for condition in conditions for task in TASKS]
    rng.shuffle(plan)
    patients = people(rng, len(plan), woman=[condition.only == "women" or rng.random() < 0.5 for _, condition, _ in plan])
    jobs = occupations()
    result = []
    for index, (topic, condition, task) in enumerate(plan):
        case = _case(condition, patients[index], job=rng.choice(jobs), rng=rng)
        instruction, response = task(case, rng)
        details = tuple(secret for secret in case.secrets if secret in response)
        result.append(Record(index, instruction, response, label=topic, details=details))
    return result
