"""The built-in set `referrals`: 12,000 fictional referrals to ten clinics, each one short question with one short answer.

An instruction tells age, occupation and complaint and asks for the clinic and the patient; the response begins with the label (the
clinic), and then has what only the record knows: the patient's name, the date of the visit and a telephone number, its details. So one set has
labels that can be learnt from others' records, and particulars that can only be remembered.
All people are invented; nothing here is advice. The same record always comes at the same place.
Left out: several referrals of one patient (names repeat by chance in so many records, telephone numbers do not).
"""

from random import Random

from raysim.data.builtin.clinic import BEGINNERS, LONG_SPANS, SHORT_SPANS, occupations
from raysim.data.builtin.clinic_facts import TOPICS, Condition
from raysim.data.builtin.people import FAMILY, MEN, WOMEN, capital, some_date, with_article
from raysim.data.records import Record

NOTICE = "All patients are fictional, and nothing here is medical advice."

NUM_RECORDS = 12_000
ASKS = (
    "Which clinic, and who is it? {who}, {complaint} {span}.",
    "Refer {who} with {complaint} {span}. Clinic and patient, please.",
    "{who} has {complaint} {span}. Where to, and whose file?",
    "New referral: {who}, {complaint} {span}. Clinic and patient?",
)


def records() -> list[Record]:
    """The records, in a fixed random order; every clinic has equally many, and no two ask the same."""
    rng = Random("referrals")
    conditions = [(topic, condition) for topic, found in TOPICS.items() for condition in found]
    order = [conditions[i % len(conditions)] for i in range(NUM_RECORDS)]
    rng.shuffle(order)
    result: dict[str, Record] = {}
    for number, ((topic, condition), phone) in enumerate(zip(order, _phones(rng), strict=True)):
        while (record := _record(number, topic, condition, phone=phone, rng=rng)).instruction in result:
            pass
        result[record.instruction] = record
    return list(result.values())


def _phones(rng: Random) -> list[str]:
    """Different numbers of the 555 exchange, which is never assigned."""
    return [f"555-{number // 10_000}-{number % 10_000:04d}" for number in rng.sample(range(1_000_000, 10_000_000), NUM_RECORDS)]


def _record(record_id: int, topic: str, condition: Condition, *, phone: str, rng: Random) -> Record:
    age = rng.randint(*condition.ages)
    job = rng.choice(BEGINNERS if age < 25 else JOBS)
    who = with_article(f"{age}-year-old {'retired ' if age > 67 else ''}{job}")
    span = rng.choice(SHORT_SPANS if condition.sudden else LONG_SPANS)
    asked = capital(rng.choice(ASKS).format(who=who, complaint=condition.complaint, span=span))
    name = f"{rng.choice(WOMEN if condition.only else WOMEN + MEN)} {rng.choice(FAMILY)}"
    date = some_date(rng)
    return Record(
        record_id=record_id,
        instruction=asked,
        response=f"{topic}: {name}, seen {date}, telephone {phone}",
        label=topic,
        details=(name, date, phone),
    )


JOBS = occupations()
