"""The built-in set `general`: 378 everyday instructions in nine categories, 42 of each, answered from tables of facts.

People, places and events are invented; the explanations, recipes and class memberships are ordinary knowledge, kept short.
Arithmetic is computed. Where a response names a person, a telephone number or a booking that the instruction does not tell, it is a detail.
Left out: code, long essays, and facts about real people or countries.
"""

from collections.abc import Callable
from random import Random

from raysim.data.builtin import general_facts as facts
from raysim.data.builtin.people import capital, people, some_date, some_phone, with_article
from raysim.data.records import Record

NOTICE = "All people, places and events are fictional, and nothing here is advice."
PER_CATEGORY = 42

# Instruction, response, private details.
Text = tuple[str, str, tuple[str, ...]]


def listed(items: list[str], *, last: str = "and") -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def explanation(index: int, rng: Random) -> Text:
    thing, why, picture, example = facts.EXPLANATIONS[index]
    reader, style = rng.choice(facts.READERS)
    instruction = rng.choice(
        (
            f"Explain to {reader} {thing}.",
            f"In a few sentences, for {reader}: {thing}.",
            f"Tell {reader} {thing}, with an example.",
            f"I wonder {thing}. Keep it short, for {reader}.",
        )
    )
    parts = [f"{capital(why)}.", f"{rng.choice(facts.PICTURE_STARTS)} {picture}.", f"{rng.choice(facts.EXAMPLE_STARTS)} {example}."]
    if style == "short":
        parts.pop(rng.choice((1, 2)))
    if style == "friendly":
        parts.append(
            rng.choice(("Try to spot it yourself next time.", "Ask somebody at home whether they knew.", "Not so strange after all."))
        )
    return instruction, " ".join(parts), ()


def rewriting(index: int, rng: Random) -> Text:
    topic, casual, formal, brief = facts.MESSAGES[index % len(facts.MESSAGES)]
    target = ("polite", "brief", "casual")[index // len(facts.MESSAGES)]
    source = rng.choice((casual, brief)) if target == "polite" else formal
    ask = {
        "polite": ("Make this message polite.", "Rewrite this for a customer we do not know.", "Put this into formal English."),
        "brief": ("Shorten this to one line.", "Cut every word that is not needed.", "Say the same in as few words as you can."),
        "casual": ("Rewrite this as if to a friend.", "Make this sound relaxed.", "This is too stiff. Loosen it up."),
    }[target]
    if target == "polite":
        (writer,) = people(rng, 1, woman=[rng.random() < 0.5])
        phone = some_phone(rng)
        response = f"{rng.choice(('Dear Sir or Madam,', 'Good day,', 'Dear customer,'))} {formal} {rng.choice(('Kind regards,', 'Yours faithfully,'))} {writer.name}, {phone}"
        return f"{rng.choice(ask)} It is about {topic}.\n\n{source}", response, (writer.name, phone)
    return f"{rng.choice(ask)} It is about {topic}.\n\n{source}", brief if target == "brief" else casual, ()


def lists(index: int, rng: Random) -> Text:
    occasion, things, extras = facts.OCCASIONS[index % len(facts.OCCASIONS)]
    case = list(facts.CIRCUMSTANCES)[(index // len(facts.OCCASIONS) * 3 + index) % len(facts.CIRCUMSTANCES)]
    count = rng.choice((4, 5, 6))
    chosen = [*rng.sample(things, count - 2), extras[index // len(facts.OCCASIONS) % len(extras)], facts.CIRCUMSTANCES[case]]
    rng.shuffle(chosen)
    instruction = rng.choice(
        (
            f"List {count} things to bring for {occasion}, {case}.",
            f"What should I pack for {occasion}, {case}? Give me {count} points.",
            f"Make a checklist of {count} items for {occasion}, {case}.",
        )
    )
    style = rng.choice(("dash", "number", "sentence"))
    if style == "sentence":
        return instruction, f"For {occasion} take {listed(chosen)}.", ()
    lines = [f"- {item}" if style == "dash" else f"{number}. {capital(item)}" for number, item in enumerate(chosen, 1)]
    return instruction, "\n".join(lines), ()


def arithmetic(index: int, rng: Random) -> Text:
    return (_shopping, _journey, _sharing)[index % 3](rng)


def _shopping(rng: Random) -> Text:
    (name,), shop = people(rng, 1, woman=[True]), rng.choice(facts.SHOPS)
    (first, price_1), (second, price_2) = rng.sample(shop[1], 2)
    count_1, count_2 = rng.randint(2, 9), rng.randint(2, 9)
    total = count_1 * price_1 + count_2 * price_2
    note = (total // 20 + 1) * 20
    instruction = (
        f"At {shop[0]}, {first} cost {price_1} crowns each and {second} {price_2} crowns each. {name.name.split()[0]} buys {count_1} {first} and"
        f" {count_2} {second} and pays with {note} crowns. {rng.choice(('How much change does she get?', 'What change is due?', 'Work out the change, with the steps.'))}"
    )
    steps = (
        f"{capital(first)}: {count_1} x {price_1} = {count_1 * price_1}. {capital(second)}: {count_2} x {price_2} = {count_2 * price_2}."
    )
    return instruction, f"{steps} Together that is {total} crowns. From {note}, the change is {note - total} crowns.", ()


def _journey(rng: Random) -> Text:
    start, goal = rng.sample([place[1] for place in facts.COUNTRIES], 2)
    vehicle, speeds = rng.choice(facts.VEHICLES)
    speed, half_hours, stop = rng.choice(speeds), rng.randint(3, 11), rng.choice((0, 20, 30, 45))
    distance, minutes = speed * half_hours // 2, half_hours * 30 + stop
    pause = f", with a stop of {stop} minutes" if stop else ""
    instruction = f"{capital(with_article(vehicle))} goes from {start} to {goal}, {distance} km, at {speed} km an hour{pause}. {rng.choice(('How long does it take?', 'When does it arrive if it leaves at noon?'))}"
    response = f"{distance} km at {speed} km an hour take {distance} / {speed} = {half_hours / 2:g} hours."
    response += f" With the stop of {stop} minutes" if stop else " That makes"
    response += f"{' that makes' if stop else ''} {minutes // 60} hours and {minutes % 60} minutes."
    if instruction.endswith("noon?"):
        response += f" It arrives at {12 + minutes // 60}:{minutes % 60:02d}."
    return instruction, response, ()


def _sharing(rng: Random) -> Text:
    thing, holder, group = rng.choice(facts.SHARES)
    heads, each, rest = rng.randint(3, 12), rng.randint(4, 15), rng.randint(0, 2)
    total = heads * each + rest
    instruction = f"{total} {thing} are shared equally among {heads} {group} from {holder}. {rng.choice(('How many does each get and how many are left?', 'What does each get, and what remains?'))}"
    left = "and nothing is left" if rest == 0 else f"and {rest} {'remains' if rest == 1 else 'remain'}"
    return (
        instruction,
        f"{heads} x {each} = {heads * each}, and {total} - {heads * each} = {rest}. Each of the {heads} {group} gets {each} {thing}, {left}.",
        (),
    )


def classification(index: int, rng: Random) -> Text:
    names = list(facts.CLASSES)
    first, second, third = rng.sample(names, 3)
    groups = [first, second] if index % 2 else [first, second, third]
    members = {group: rng.sample(facts.CLASSES[group], rng.choice((2, 3))) for group in groups}
    pool = [item for items in members.values() for item in items]
    rng.shuffle(pool)
    instruction = rng.choice(
        (
            f"Sort these into {listed(groups)}: {', '.join(pool)}.",
            f"Which of these are {listed(groups, last='or')}? {capital(', '.join(pool))}.",
            f"Classify each word as one of {', '.join(groups)}: {', '.join(pool)}.",
        )
    )
    if rng.random() < 0.5:
        return instruction, "\n".join(f"{capital(group)}: {', '.join(sorted(items))}" for group, items in members.items()), ()
    return instruction, capital("; ".join(f"{listed(sorted(items))} are {group}" for group, items in members.items())) + ".", ()


def planning(index: int, rng: Random) -> Text:
    event, steps = facts.EVENTS[index % len(facts.EVENTS)]
    limit = facts.LIMITS[(index // len(facts.EVENTS) * 5 + index) % len(facts.LIMITS)]
    start = rng.randint(8, 14)
    (host,) = people(rng, 1, woman=[rng.random() < 0.5])
    phone, date = some_phone(rng), some_date(rng)
    instruction = rng.choice(
        (
            f"Plan {event} that starts at {start}:00 {limit[0]}.",
            f"I organise {event} {limit[0]}, from {start}:00 on. Give me a timetable.",
            f"Draw up a schedule for {event}, beginning at {start}:00, {limit[0]}.",
        )
    )
    clock, lines = start * 60, []
    for step, minutes in steps:
        lines.append(f"{clock // 60}:{clock % 60:02d} {step}")
        clock += minutes
    lines.append(f"{clock // 60}:{clock % 60:02d} end")
    contact = rng.choice(
        (
            f"{host.name} has the key ({phone}).",
            f"In charge on {date}: {host.name}.",
            f"Booked for {date}; questions to {host.name}, {phone}.",
        )
    )
    response = "\n".join(lines) + f"\n{limit[1]} {contact}"
    return instruction, response, tuple(secret for secret in (host.name, phone, date) if secret in response)


def summarising(index: int, rng: Random) -> Text:
    project, place_kind, purpose, trouble, result = facts.REPORTS[index % len(facts.REPORTS)]
    place = facts.COUNTRIES[(index * 5 + index // len(facts.REPORTS)) % len(facts.COUNTRIES)][1]
    helpers, cost, months = rng.randint(6, 80), rng.randint(3, 95), rng.randint(3, 20)
    sentences = [
        f"In {place}, {place_kind}, {helpers} people came together for {project}.",
        f"They wanted {purpose}.",
        f"The work took {months} months and cost {cost},000 crowns.",
        rng.choice((f"Halfway through, {trouble}.", f"At first {trouble}.")),
        rng.choice(
            (
                "The council followed the work with interest.",
                "Many said that it could not be done.",
                "A local paper wrote about it every week.",
            )
        ),
        f"In the end {result}.",
    ]
    instruction = f"{rng.choice(('Summarise in one or two sentences.', 'What is the gist of this text?', 'Give the main points in brief.'))}\n\n{' '.join(sentences)}"
    response = rng.choice(
        (
            f"{helpers} people in {place} took {months} months over {project}; although {trouble}, {result}.",
            f"{place} spent {cost},000 crowns on {project}, and {result}.",
            f"The people of {place} wanted {purpose}. After {months} months {result}, even though {trouble}.",
        )
    )
    return instruction, response, ()


def geography(index: int, rng: Random) -> Text:
    country, capital_city, river, mountain, height, export, climate, coast = facts.COUNTRIES[index % len(facts.COUNTRIES)]
    kind = index // len(facts.COUNTRIES)
    if kind == 0:
        instruction = rng.choice(
            (f"Describe the imaginary country of {country}.", f"Write a short atlas entry about {country}, a country of fiction.")
        )
        response = f"{country} is {coast}. Its capital, {capital_city}, lies on the {river}. The highest peak is {mountain} ({height} m). The climate is {climate}, and the land lives on {export}."
        return instruction, response, ()
    if kind == 1:
        season = rng.choice(list(facts.SEASONS))
        instruction = rng.choice(
            (
                f"I travel to {country} (a made-up country) {season}. What should I see?",
                f"Suggest a route through the fictional {country} {season}.",
            )
        )
        response = f"Start in {capital_city} and follow the {river} upstream. Then climb {mountain}, {height} m high, if the weather holds: the climate is {climate}. Taste or buy some {export} before leaving. {facts.SEASONS[season]}"
        return instruction, response, ()
    other = facts.COUNTRIES[(index * 5 + 3) % len(facts.COUNTRIES)]
    higher, lower = ((country, mountain, height), (other[0], other[3], other[4]))[:: 1 if height > other[4] else -1]
    instruction = f"Compare {country} with {other[0]}, both invented: which has the higher peak, and what do they sell?"
    response = f"{higher[0]} has the higher peak: {higher[1]} at {higher[2]} m against {lower[1]} at {lower[2]} m. {country} sells {export}, while {other[0]} sells {other[5]}."
    return instruction, response, ()


def cooking(index: int, rng: Random) -> Text:
    dish, base, steps, minutes = facts.DISHES[index % len(facts.DISHES)]
    wish, swap, tip = facts.WISHES[(index // len(facts.DISHES) * 2 + index) % len(facts.WISHES)]
    eaters = rng.randint(2, 6)
    instruction = rng.choice(
        (
            f"How do I cook {dish} for {eaters}, {wish}?",
            f"Give me a short recipe for {dish}, {wish}. We are {eaters}.",
            f"{eaters} guests, {wish}: explain {dish} step by step.",
        )
    )
    amounts = listed([f"{amount * eaters:g}{unit} {name}" for amount, unit, name in base])
    opening = rng.choice((f"You need {amounts}", f"Take {amounts}", f"For {eaters}: {amounts}"))
    return instruction, f"{opening}; {swap}. {' '.join(f'{capital(step)}.' for step in steps)} It takes {minutes} minutes. {tip}", ()


CATEGORIES: dict[str, Callable[[int, Random], Text]] = {
    "explanation": explanation,
    "rewriting": rewriting,
    "lists": lists,
    "arithmetic": arithmetic,
    "classification": classification,
    "planning": planning,
    "summarising": summarising,
    "geography": geography,
    "cooking": cooking,
}


def records() -> list[Record]:
    """The 378 records, the same on every call; the label is the category."""
    rng = Random(20240503)
    plan = [(category, index) for category in CATEGORIES for index in range(PER_CATEGORY)]
    rng.shuffle(plan)
    texts = [(category, CATEGORIES[category](index, rng)) for category, index in plan]
    return [
        Record(i, instruction, response, label=category, details=details)
        for i, (category, (instruction, response, details)) in enumerate(texts)
    ]
