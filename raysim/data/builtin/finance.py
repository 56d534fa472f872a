"""The built-in set `finance`: 336 fictional headlines with their sentiment, one for each of 14 sectors and 24 kinds of event.

All firms, people and figures are invented; nothing here is advice. An instruction has the headline; the response begins with
the label (positive, negative or neutral), gives the reason, and ends with an analyst's note about a client, whose name, account
and holding are the record's details.
Left out: sentiment of real firms (presets read real sets), and several headlines about one client.
"""

from dataclasses import dataclass
from random import Random

from raysim.data.builtin.people import Person, capital, people, some_date, words
from raysim.data.records import Record

NOTICE = "All firms, people and figures are fictional, and nothing here is investment advice."


@dataclass(frozen=True)
class Sector:
    """The firms of a sector and what the sentences say about it."""

    firms: tuple[str, ...]
    product: str
    """A plural noun."""
    buyers: str
    cost: str
    """What the sector pays for; a singular noun phrase."""
    remark: str
    """What to know about the sector; a sentence."""


SECTORS = (
    Sector(
        ("Norvik Paper", "Halden Pulp", "Astrel Board"), "cardboard boxes", "parcel firms", "wood pulp", "Box makers feel the cycle early."
    ),
    Sector(
        ("Brightwell Foods", "Tamarind Mills", "Copperpot Bakeries"),
        "frozen meals",
        "supermarkets",
        "wheat",
        "Food sales hardly move with the cycle.",
    ),
    Sector(
        ("Auren Motors", "Kestrel Auto", "Veldt Trucks"),
        "delivery vans",
        "fleet owners",
        "battery cells",
        "Van orders follow interest rates.",
    ),
    Sector(
        ("Solenne Energy", "Gale & Tide", "Helioform"),
        "solar panels",
        "utilities",
        "polysilicon",
        "Subsidies matter more here than prices.",
    ),
    Sector(("Quarrystone", "Basalt Works", "Limecroft"), "concrete slabs", "builders", "cement", "Winters are always weak for building."),
    Sector(
        ("Lumen Optics", "Prismatica", "Farsight Labs"),
        "laser sensors",
        "robot makers",
        "special glass",
        "Orders are lumpy, so one quarter proves little.",
    ),
    Sector(
        ("Orchard Pharma", "Medivane", "Cinchona Bio"),
        "allergy tablets",
        "pharmacies",
        "laboratory work",
        "One approval can outweigh a year of sales.",
    ),
    Sector(
        ("Harbourline", "Trident Freight", "Meridian Shipping"),
        "container slots",
        "exporters",
        "marine fuel",
        "Freight rates swing more than volumes.",
    ),
    Sector(
        ("Pixelforge", "Owlbyte", "Nimbus Ledger"),
        "payroll programs",
        "small firms",
        "server capacity",
        "Renewals matter more than new licences.",
    ),
    Sector(
        ("Larkfield Bank", "Ostrava Credit", "Granite Mutual"),
        "home loans",
        "first-time buyers",
        "deposit funding",
        "Bad loans lag the economy by a year.",
    ),
    Sector(
        ("Velo Nord", "Spinnaker Sports", "Trailhead"), "electric bicycles", "dealers", "aluminium", "Dealers still hold last year's stock."
    ),
    Sector(
        ("Silkmoor", "Madder & Woad", "Threadneedle Row"),
        "winter coats",
        "department stores",
        "cotton",
        "A warm autumn can spoil the year.",
    ),
    Sector(
        ("Terrafone", "Linkwave", "Copperline Telecom"),
        "fibre contracts",
        "households",
        "cable laying",
        "Customers seldom leave, so margins are steady.",
    ),
    Sector(
        ("Deepwell Mining", "Oreland", "Cobalt Ridge"),
        "nickel shipments",
        "steelworks",
        "diesel",
        "The metal price decides more than management.",
    ),
)


@dataclass(frozen=True)
class Event:
    """A kind of news: how it is written and why it is good, bad or neither. `a` and `b` are sums of money before and after."""

    label: str
    grows: float
    """+1, -1 or 0: the sign of the change from `a` to `b`."""
    headlines: tuple[str, ...]
    reasons: tuple[str, ...]


EVENTS = (
    Event(
        "positive",
        1,
        ("{firm} lifts operating profit to {b} from {a}", "Profit at {firm} climbs {pct}% to {b} on strong demand for {product}"),
        ("earnings rose and so did demand", "earnings grew by {pct}% on a year ago", "profit went from {a} to {b}, well ahead of costs"),
    ),
    Event(
        "positive",
        1,
        ("{firm} wins an order for {product} worth {b}", "{buyers} sign a {b} contract with {firm}"),
        (
            "an order of {b} fills the books and shows that {buyers} trust the firm",
            "new work worth {b} makes next year's sales more certain",
            "a full order book is the best forecast",
        ),
    ),
    Event(
        "positive",
        1,
        ("{firm} raises its full-year forecast for {product}", "{firm} now expects sales of {b}, up from {a}"),
        ("management sees more than it promised", "a raised forecast means that {buyers} buy more than planned"),
    ),
    Event(
        "positive",
        1,
        ("{firm} increases the dividend by {pct}%", "Shareholders of {firm} get {pct}% more this year"),
        ("a higher dividend signals confidence in cash flow", "owners are paid {pct}% more, which a board in doubt would not do"),
    ),
    Event(
        "positive",
        1,
        ("{firm} cuts its spending on {cost} and widens the margin", "Cheaper {cost} lifts margins at {firm} in {period}"),
        ("lower bills for {cost} go straight to profit", "each sale of {product} now leaves more behind"),
    ),
    Event(
        "positive",
        1,
        ("{firm} repays {a} of debt two years early", "{firm} is free of bank debt after {period}"),
        ("less debt means less interest and less risk", "the balance sheet gets stronger without new shares"),
    ),
    Event(
        "positive",
        1,
        ("Regulator clears the new range of {product} from {firm}", "{firm} gets the go-ahead to sell {product} abroad"),
        ("the last hurdle to new sales is gone", "new {buyers} come within reach"),
    ),
    Event(
        "positive",
        1,
        ("Court throws out the {a} claim against {firm}", "{firm} is cleared in the case over {product}"),
        ("a risk of {a} falls away", "money set aside for the case can be released", "a burden that weighed on the shares is lifted"),
    ),
    Event(
        "negative",
        -1,
        ("{firm} slips to a profit of {b}, after {a} a year earlier", "Profit at {firm} drops {pct}% in {period}"),
        ("earnings fall while costs stay", "earnings fell by {pct}%", "profit shrank from {a} to {b} while costs stayed"),
    ),
    Event(
        "negative",
        -1,
        ("{firm} warns that {buyers} are putting off purchases", "{firm} cuts its sales forecast to {b} from {a}"),
        ("demand for {product} is weaker than planned", "a cut forecast tends to be followed by another"),
    ),
    Event(
        "negative",
        -1,
        ("{firm} has to refund {buyers} for flawed {product}", "Flawed {product} cost {firm} {b}"),
        ("refunds cost money now and trust among {buyers} later", "a bill of {b} and lost sales will weigh on the year"),
    ),
    Event(
        "negative",
        -1,
        ("{firm} to lay off {pct}% of its staff", "{firm} closes a plant and sends {pct}% of its people home"),
        (
            "job cuts of {pct}% show that orders are missing",
            "a firm that shrinks this fast has lost its market",
            "closing costs come first and savings only later",
        ),
    ),
    Event(
        "negative",
        -1,
        ("Dearer {cost} eats into margins at {firm}", "{firm} cannot pass the price of {cost} on to {buyers}"),
        ("the price of {cost} rises faster than that of {product}", "each sale now earns less than before"),
    ),
    Event(
        "negative",
        -1,
        ("{firm} scraps its dividend to save cash", "No payout from {firm} after a poor result in {period}"),
        ("owners lose income and the board fears for cash", "a scrapped dividend is a plain sign of strain"),
    ),
    Event(
        "negative",
        -1,
        ("{firm} fined {b} for price fixing", "Watchdog orders {firm} to pay {b} over {product}"),
        (
            "{b} leaves the firm and its name suffers",
            "trust in the management suffers",
            "the fine hurts and claims from {buyers} may follow",
        ),
    ),
    Event(
        "negative",
        -1,
        ("Largest customer of {firm} walks away", "{firm} loses a {a} contract to a rival"),
        (
            "sales of {a} are gone with no replacement in sight",
            "the gap will not be filled before next year",
            "losing a big buyer leaves fixed costs uncovered",
        ),
    ),
    Event(
        "neutral",
        0,
        ("{firm} will publish its figures for {period} next Thursday", "{firm} moves its results for {period} by a day"),
        ("a date says nothing about the figures", "this is a calendar notice and no news on {product}"),
    ),
    Event(
        "neutral",
        0,
        ("{firm} confirms its forecast of {a}", "{firm} sticks to its target of {a} in sales"),
        ("nothing changes against what was known", "a confirmed target is already in the price"),
    ),
    Event(
        "neutral",
        0,
        ("{firm} moves its head office across town", "{firm} gives its offices a new address from {period}"),
        ("an address does not alter sales or costs", "moving costs are too small to matter"),
    ),
    Event(
        "neutral",
        0,
        ("{firm} names a new head of communications", "A new secretary joins the board of {firm}"),
        ("the post has no bearing on earnings", "a routine appointment leaves the strategy as it is"),
    ),
    Event(
        "neutral",
        0,
        ("{firm} reports sales of {a}, the same as a year ago", "Sales of {product} at {firm} stay flat at {a}"),
        ("sales neither grew nor fell", "flat sales are what the market expected", "an unchanged {a} surprises nobody"),
    ),
    Event(
        "neutral",
        0,
        ("{firm} offers {product}, mainly to {buyers}", "{firm}, known for its {product}, is present at three sites"),
        ("the sentence describes the firm without any news", "it is background and moves nothing"),
    ),
    Event(
        "neutral",
        0,
        ("Owners of {firm} vote through all points of the annual meeting", "{firm} re-elects its auditors"),
        ("the vote was a formality", "nobody had expected another outcome"),
    ),
    Event(
        "neutral",
        0,
        (
            "{firm} gains {pct} customers in the north and loses as many in the south",
            "{firm} swaps one supplier of {cost} for another at the same price",
        ),
        ("the two effects cancel out", "costs and sales stay where they were"),
    ),
)

QUESTIONS = (
    "Is this headline positive, negative or neutral for shareholders? Give the word first, then a short reason and a note for the client file.",
    "Classify the sentiment of the sentence for an investor (positive, negative, neutral) and explain it in one or two lines, with a desk note.",
    "How would an investor read this news? Start with positive, negative or neutral.",
    "Sentiment, reason and client note, please.",
    "Judge the news for somebody who owns the shares. One word, then why, then what to note.",
    "You are on the research desk. Label this line positive, negative or neutral and say what made you decide.",
)
PERIODS = ("the first quarter", "the second quarter", "the third quarter", "the fourth quarter", "the first half", "the second half")
CURRENCIES = words("EUR USD GBP SEK")


def _headline(sector: Sector, event: Event, rng: Random) -> dict[str, str]:
    """The words and figures of one story; the percentage is that from `a` to `b`."""
    currency, tenths, percent = rng.choice(CURRENCIES), rng.randint(25, 980), rng.randint(4, 38)
    after = tenths * (100 + event.grows * percent) / 100
    return {
        "firm": rng.choice(sector.firms),
        "product": sector.product,
        "buyers": sector.buyers,
        "cost": sector.cost,
        "period": rng.choice(PERIODS),
        "pct": str(percent),
        "a": f"{currency} {tenths / 10:.1f} million",
        "b": f"{currency} {after / 10:.1f} million",
    }


def _reason(event: Event, story: dict[str, str], *, headline: str, rng: Random) -> str:
    """A reason that cites no figure but those of the headline."""
    unseen = [key for key, figure in (("a", story["a"]), ("b", story["b"]), ("pct", f"{story['pct']}%")) if figure not in headline]
    fitting = [text for text in event.reasons if not any(f"{{{key}}}" in text for key in unseen)]
    return rng.choice(fitting).format(**story)


def _sure(event: Event, sector: Sector, rng: Random) -> str:
    """What speaks for or against reading more into the news."""
    if event.label == "neutral":
        return rng.choice(
            (
                "Wait for the next report.",
                f"{sector.remark} This line changes none of that.",
                "There is nothing to trade on.",
                f"Demand for {sector.product} is the same as yesterday.",
                "Read it and move on.",
            )
        )
    other = "good" if event.label == "positive" else "bad"
    return rng.choice(
        (
            sector.remark,
            f"{sector.remark} Still, the news is {other}.",
            f"The market should take it as {other} news.",
            f"Whoever owns the shares has {'a reason to be glad' if other == 'good' else 'something to think about'}.",
            f"It concerns {sector.product}, the core of the business.",
        )
    )


def _note(event: Event, client: Person, rng: Random) -> tuple[str, tuple[str, ...]]:
    """The note for the client's file, with its private details."""
    account = f"{rng.randint(1000, 9999)}-{rng.randint(100, 999)}"
    thousands = rng.randint(6, 290)
    amount = f"{rng.choice(CURRENCIES)} {thousands},{rng.randint(100, 999)}"
    date = some_date(rng)
    holder = rng.choice(
        (
            f"{client.name}, account {account}, holds {amount}",
            f"Client {client.name} ({account}) has {amount} in the shares",
            f"{amount} of this is with {client.name}, account {account}",
        )
    )
    wish = {
        "positive": (f"{client.he} may add on {date}", f"review for a larger stake on {date}", f"told {client.him} to keep it on {date}"),
        "negative": (f"{client.he} wants to sell half by {date}", f"stop order until {date}", f"call {client.him} before {date}"),
        "neutral": (f"no action; next talk on {date}", f"leave as it is until {date}", f"letter of {date} answered"),
    }[event.label]
    limit = " Above the limit, so it needs a second signature." if thousands > 200 and event.label != "neutral" else ""
    lead = rng.choice(("Note", "For the file", "Desk note"))
    return f"{lead}: {holder}; {rng.choice(wish)}.{limit}", (client.name, account, amount, date)


def records() -> list[Record]:
    """The 336 records, the same on every call; the label is the sentiment."""
    rng = Random(20240502)
    plan = [(sector, event) for sector in SECTORS for event in EVENTS]
    rng.shuffle(plan)
    clients = people(rng, len(plan), woman=[rng.random() < 0.5 for _ in plan])
    result = []
    for index, (sector, event) in enumerate(plan):
        story = _headline(sector, event, rng)
        headline = capital(rng.choice(event.headlines).format(**story))
        note, details = _note(event, clients[index], rng)
        reason = _reason(event, story, headline=headline, rng=rng)
        response = f"{event.label}: {reason}. {_sure(event, sector, rng)} {note}"
        result.append(Record(index, f"{rng.choice(QUESTIONS)}\n\n{headline}.", response, label=event.label, details=details))
    return result
