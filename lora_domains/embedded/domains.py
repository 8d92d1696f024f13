"""Labelled rows of the five domains, on which the base was never trained.

Every label follows from one rule that a reader can check, and the rule needs more than the words
of a row: who has a finding and when, what comes after 'but', which request is meant and which
topic is only mentioned. The test split also uses a few words and phrasings that train does not.
"""

# ruff: noqa: E501 (lines of the tables are alternatives, one to a line)

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from random import Random
from typing import Any

from lora_domains.embedded.grammar import Grammar
from lora_domains.embedded.prose import COMMON

SIZES = {
    "medical": {"train": 1600, "validation": 300, "test": 2000},
    "legal": {"train": 1200, "validation": 240, "test": 2000},
    "finance": {"train": 1400, "validation": 270, "test": 2000},
    "support": {"train": 1500, "validation": 300, "test": 2000},
    "spam": {"train": 1600, "validation": 300, "test": 2000},
}
_ORDER = ("train", "validation", "test")
_SEEDS = {"train": "{} train", "validation": "{} validation", "test": "{} test 2"}
"""Of the draws. The first test rows (seed "{} test", 400 to 900 of them) were scored many times while
the package was made, so others are drawn now."""
Row = dict[str, Any]

# --------------------------------------------------------------------------------- medical
# Urgent: the patient has a grave finding now. Everything else is routine. Only phrasings are held
# out of train, never findings: nobody could know how grave an unseen one is.

_MEDICAL = """
@grave = chest pain, shortness of breath, slurred speech, vomiting blood, coughing up blood, facial droop, a seizure,
 weakness of the left arm, loss of consciousness, severe abdominal pain, black stools, loss of vision, severe bleeding, fainting, sudden confusion
@mild = a runny nose, dry skin, a small wart, mild heartburn, a sore throat, itchy eyes, a mild cough, mild knee pain, acne,
 a splinter, trouble sleeping, a blister, dandruff, hay fever, sneezing
@ask = a repeat prescription, a vaccination, a routine blood test, a sick note, travel advice, a check-up, a form for the gym,
 a review of tablets, removal of stitches, a hearing test, dietary advice, the result of a blood test, a dressing change
@since = since this morning, for the last hour, since {1-12} pm today, started {10-50} minutes ago, since last night, at present,
 now, that began an hour ago, which is getting worse, on arrival, for {2-6} hours, during triage, at this moment
@since_test = as we speak, from noon on, which has not let up
@ago = {2-20} years ago, in {1985-2021}, last year, as a child, {2-11} months ago, after surgery in {2001-2020}
@over = now resolved, fully recovered, no symptoms since, settled, treated at the time, long gone, none today
@over_test = cleared up since, past history now
@no = denies, no, reports no, has no, without, never had, negative for, not complaining of
@no_test = free of, no sign of, specifically denies
@kin = mother, father, sister, brother, aunt, uncle, grandmother, cousin, wife's father, neighbour
@kin_test = stepfather, twin, nephew
@kinhas = had {g} {ago}, has {g}, died after {g}, was admitted with {g}
@fear = worried about {g} after reading about it, asks what to do in case of {g}, leaflet on {g} given, told to call in case of {g}
@fear_test = friend posted about {g} online and wants reassurance, to come back should {g} develop
@mildtime = for {2-9} days, for {2-9} weeks, since {month}, on and off, after gardening, mostly at night, {since}, {since}, {since}
@lead = {age}-year-old {sex}, {Sex} aged {age}, {age} yo {sex}, {Sex} of {age}, {Sex} ({age}), Pt {age}, {name}, {Sex}
@open_now = with, presents with, complains of, reports, came in with, has, c/o, brought in with
@stable
Vitals normal.
BP {110-139}/{62-84}, pulse {58-88}.
BP {110-139}/{62-84}.
Sats {96-99}%.
Temp 36.{1-9}, sats {96-99}%.
Eating and drinking.
Walks unaided.
Works as a {job}.
Lives with family.
Takes vitamin D.
No allergies.
Alert and talking.
Non-smoker.
Seen by {first}.
@contrast = but, however, though, now, yet
"""

_GRAMMAR = Grammar(COMMON, _MEDICAL)


class _Draw:
    """Draws for one split; in test, one draw in eight is of words that train does not have."""

    def __init__(self, rng: Random, grammar: Grammar, split: str) -> None:
        self.rng, self.grammar, self.split = rng, grammar, split
        self.patient: dict[str, str] = {}
        self.patients = 0

    def __call__(self, rule: str, **fixed: str) -> str:
        held_out = f"{rule}_test"
        if self.split == "test" and held_out in self.grammar.rules and self.rng.random() < 0.12:
            rule = held_out
        return self.grammar.text(self.rng, "{" + rule + "}", **fixed)

    def odds(self, share: float) -> bool:
        return self.rng.random() < share


def _bare(finding: str) -> str:
    """A finding without its article, as clinicians write it after 'no'."""
    return finding.removeprefix("a ").removeprefix("an ")


def _absent(draw: _Draw, finding: str, other: str) -> str:
    """A statement in which the patient does not have a finding now."""
    kind = draw.rng.choice(("no", "no", "no", "kin", "kin", "past", "past", "fear"))
    if kind == "no":
        also = draw.odds(0.35) and finding != other
        tail = f" or {_bare(other)}" if also else ""
        return f"{draw('no')} {_bare(finding)}{tail}"
    if kind == "kin":
        return f"{draw('kin')} {draw('kinhas', g=finding)}"
    if kind == "past":
        had = draw.rng.choice((_bare(finding), f"history of {_bare(finding)}", f"had {finding}"))
        return f"{had} {draw('ago')}, {draw('over')}"
    return draw("fear", g=finding)


def _present(draw: _Draw, finding: str, other: str) -> str:
    """A statement in which the patient has `finding` now, and not `other`."""
    since = draw("since")
    but = draw("contrast")
    return draw.rng.choice(
        (
            f"{finding} {since}",
            f"{draw('open_now')} {finding} {since}",
            f"{draw('open_now')} {finding}",
            f"{draw('no')} {_bare(other)}, {but} {finding} {since}",
            f"{draw('no')} {_bare(other)} {but} {finding} {since}",
        )
    )


def _trifle(draw: _Draw) -> str:
    """Something harmless: a request, a minor finding, or an absent one."""
    kind = draw.rng.random()
    if kind < 0.25:
        return f"{draw.rng.choice(('asks', 'here'))} for {draw('ask')}"
    if kind < 0.45:
        return _absent(draw, draw("mild"), draw("mild"))
    if kind < 0.75:
        return f"{draw('mild')} {draw('mildtime')}"
    return _present(draw, draw("mild"), draw("mild"))


def _patient(rng: Random) -> dict[str, str]:
    sex = rng.choice(("female", "male"))
    noun = rng.choice(("woman", "lady") if sex == "female" else ("man", "gentleman"))
    title = rng.choice(("Mrs", "Ms") if sex == "female" else ("Mr",))
    name = f"{title} {rng.choice(_GRAMMAR.rules['last'])}"
    return {"sex": sex, "noun": noun, "age": str(rng.randint(18, 91)), "name": name}


def _medical(draw: _Draw) -> Row:
    rng = draw.rng
    if not draw.patient or draw.odds(0.7):  # three in ten notes are about the previous patient
        draw.patient = _patient(rng)
        draw.patients += 1
    patient = draw.patient
    she = patient["sex"] == "female"
    urgent = draw.odds(0.385)
    if urgent:
        other = draw("grave") if draw.odds(0.7) else draw("mild")
        parts = [_present(draw, draw("grave"), other)]
        parts += [_absent(draw, draw("grave"), draw("grave")) for _ in range(rng.choice((0, 1, 1)))]
        parts += [_trifle(draw) for _ in range(rng.choice((0, 0, 1)))]
    else:
        parts = [
            _absent(draw, draw("grave"), draw("grave")) for _ in range(rng.choice((0, 1, 1, 1)))
        ]
        if not parts or draw.odds(0.35):  # a minor complaint, worded like a grave one
            other = draw("grave") if draw.odds(0.75) else draw("mild")
            parts.append(_present(draw, draw("mild"), other))
        parts += [_trifle(draw) for _ in range(rng.choice((0, 0, 1)))]
    rng.shuffle(parts)
    sentences = [part[:1].upper() + part[1:] + "." for part in parts]
    if draw.odds(0.5):
        sentences.insert(rng.randint(0, len(sentences)), draw("stable"))
    text = " ".join(sentences)
    if draw.odds(0.6):
        noun = patient["noun"]
        lead = draw(
            "lead", age=patient["age"], sex=noun, Sex=noun.capitalize(), name=patient["name"]
        )
        text = f"{lead}{rng.choice((', ', ': ', '. ', ' - '))}{text}"
    for place, word in (("{his}", "her" if she else "his"), ("{he}", "she" if she else "he")):
        text = text.replace(place, word)
    text = text.replace("{him}", "her" if she else "him")
    text = text.lower() if draw.odds(0.15) else text
    return {
        "text": text,
        "label": "urgent" if urgent else "routine",
        "sex": patient["sex"],
        "site": rng.choice(("clinic", "phone", "ward")),
        "patient": f"{draw.split}-{draw.patients:04d}",
    }


# --------------------------------------------------------------------------------- legal
# The label is the subject of the main clause; conditions and provisos mention other titles.

_LEGAL = """
@party = the Supplier, the Buyer, the Tenant, the Landlord, the Company, the Client, the Licensee, the Contractor, the Borrower,
 the Lender, either party, each party, the Employee, the Agent, the Publisher, the Provider, the Customer, the Franchisee
@party_test = the Consultant, the Distributor, the Grantor
@days = {2-90} days, {2-12} months, {10-60} business days, {1-5} years
@Termination
{party} may end this Agreement on {days} prior written notice
this Agreement comes to an end if {party} commits a material breach and fails to cure it within {days}
upon expiry {party} shall cease to use the {goods} and the parties are released
{party} may cancel this Agreement at once if {party} becomes insolvent
@Confidentiality
{party} shall keep the {goods} secret and shall not disclose them to any third party
{party} may show the {goods} only to staff who need to know them
{party} shall treat all {goods} received as proprietary and private for {days}
no {goods} may be revealed to outsiders without the consent of {party}
@Payment
{party} shall pay each invoice within {days} of receipt
all fees for the {goods} fall due within {days} and late sums bear interest of {2-9}%
{party} shall transfer the price of the {goods} in {2-12} instalments
the fee of {price} is payable in advance to {party}
@Governing Law
this Agreement is governed by the laws of {city}
the laws of {city} apply, without regard to conflict of laws rules
the validity of this Agreement is construed under the law of {city}
{party} and {party} choose the law of {city}
@Assignment
{party} may not transfer this Agreement or any right under it without consent
{party} may assign its rights to an affiliate on {days} notice
any attempt by {party} to hand over its duties to a successor is void
this Agreement binds the successors and permitted assigns of {party}
@Indemnification
{party} shall hold {party} harmless from claims of third parties about the {goods}
{party} shall defend and reimburse {party} for losses arising out of the {goods}
{party} bears the cost of any suit brought by others against {party}
{party} shall make good all damages that {party} owes to outsiders
@Limitation of Liability
the total liability of {party} shall not exceed {price}
{party} is in no event liable for lost profits or indirect damages
the damages owed by {party} are capped at the fees of {days}
neither {party} nor its staff answers for consequential loss
@Force Majeure
{party} is excused while war, flood or strike prevents performance
neither side is in default when events beyond its control stop the {goods}
if an earthquake or epidemic delays the {goods}, the time is extended by {days}
acts of God suspend the duties of {party} for {days}
@Warranty
{party} warrants that the {goods} are free from defects for {days}
{party} promises that the {goods} conform to the specification
the {goods} are provided as is and {party} gives no guarantee of quality
{party} shall repair or replace defective {goods} for {days}
@Notices
messages under this Agreement shall be in writing and sent to {party} by courier
any communication is deemed received {2-9} days after it is mailed to {party}
letters to {party} go to the address in {city}
{party} shall tell {party} of a change of address within {days}
@Insurance
{party} shall maintain a policy covering the {goods} of at least {price}
{party} shall furnish a certificate of coverage for the {goods}
{party} must insure the {goods} with a carrier from {city}
the premium for the cover of the {goods} is borne by {party}
@Audit
{party} may inspect the books of {party} on {days} notice
{party} shall keep accounts of the {goods} and open them for examination
an accountant from {city} may review the records of {party} once a year
{party} shall grant access to its ledgers for {days}
@Intellectual Property
all copyrights in the {goods} belong to {party}
{party} retains title to patents and trademarks in the {goods}
inventions made by {party} are owned by {party}
nothing gives {party} any ownership of designs made by {party}
@Non-Compete
{party} shall not engage in a rival business in {city} for {days}
{party} may not solicit the customers of {party} for {days}
for {days} {party} shall not work for a competitor
{party} shall refrain from selling similar {goods} in {city}
@Severability
if any provision is held invalid, the remainder stays in force
an unenforceable term shall be replaced and the rest is unaffected
the invalidity of one section does not touch the others
each clause stands alone should a court in {city} strike one out
@about_Termination = the end of this Agreement, any cancellation, expiry of the term, a notice to end this Agreement
@about_Confidentiality = the duty of secrecy, disclosure of private data, the secret nature of the {goods}
@about_Payment = payment of all fees, the invoice, any sum due, interest on late sums
@about_Governing Law = the laws of {city}, any mandatory law, the law that governs
@about_Assignment = a transfer to an affiliate, any permitted assigns, a change of successor
@about_Indemnification = the promise to hold harmless, claims of third parties, losses reimbursed
@about_Limitation of Liability = the cap on damages, liability for lost profits, any limit of liability
@about_Force Majeure = flood or strike, events beyond control, an act of God
@about_Warranty = any guarantee of quality, repair of defective {goods}, the warranty period
@about_Notices = a letter to the address in {city}, written communication, mail by courier
@about_Insurance = the policy and its premium, a certificate of coverage, cover by a carrier
@about_Audit = an inspection of the books, the keeping of accounts, access to ledgers
@about_Intellectual Property = copyrights and patents, ownership of designs, trademarks in the {goods}
@about_Non-Compete = work for a competitor, a rival business, contact with customers
@about_Severability = the invalidity of one section, an unenforceable term, a provision held invalid
@goods = goods, documents, premises, equipment, software, materials, records, reports, drawings, services, samples, vehicles, data
@before
Notwithstanding {a}, {main}.
Subject to the section on {a}, {main}.
Without prejudice to {a}, {main}.
Irrespective of {a} and {b}, {main}.
Except as stated elsewhere about {a}, {main}.
In addition to what is agreed on {a}, {main}.
@before_test
Regardless of {a}, {main}.
Whatever is said of {a}, {main}.
@after
{Main}, regardless of {a}.
{Main}; the clauses on {a} and {b} remain unaffected.
{Main}, even in the event of {a}.
{Main}, and nothing here concerns {a}.
{Main}, save for what is said on {a}.
{Main}. This does not limit {a}.
@after_test
{Main}, {a} and {b} aside.
@alone
{Main}.
@told
Although {other}, {main}.
Even where {other}, {main}.
Whether or not {other}, {main}.
{Main}, even if elsewhere {other}.
{Main}, although {other}.
The section under which {other} does not alter that {main}.
Elsewhere it is agreed that {other}; here {main}.
{Main}; that {other} is ruled in another section.
If and so long as {other}, {main}.
Before {other}, {main}.
@told_test
While it is true that {other}, {main}.
{Main}, never mind that {other}.
"""

_LEGAL_GRAMMAR = Grammar(COMMON, _LEGAL)
TITLES = tuple(
    name.removeprefix("about_") for name in _LEGAL_GRAMMAR.rules if name.startswith("about_")
)


def _legal(draw: _Draw) -> Row:
    label = draw.rng.choice(TITLES)
    one, two = draw.rng.sample([t for t in TITLES if t != label], 2)
    main = draw(label)
    shape = draw.rng.choices(("before", "after", "alone", "told"), (2, 2, 1, 6))[0]
    text = draw(
        shape,
        a=draw(f"about_{one}"),
        b=draw(f"about_{two}"),
        other=draw(one),
        main=main,
        Main=main[:1].upper() + main[1:],
    )
    if draw.odds(0.5):
        text = f"{draw.rng.randint(1, 30)}.{draw.rng.randint(1, 12)} {text}"
    return {"text": text, "label": label}


# --------------------------------------------------------------------------------- finance
# The label follows from the direction and from what moves; the main clause decides, not the
# 'although' clause.

_FINANCE = """
@up_good = profit, sales, revenue, earnings, margin, orders, net income, output, exports, cash flow
@up_good_test = net profit, quarterly sales
@up_bad = costs, losses, debt, complaints
@up_bad_test = production costs, net debt
@rise = rose, climbed, jumped, grew, increased, surged, went up, picked up, edged up, doubled
@rise_test = swelled, advanced
@drop = fell, dropped, slid, shrank, decreased, declined, went down, plunged, eased, halved
@drop_test = contracted, dwindled
@by = {1-40}%, {1-9}.{1-9}%, by {2-30} percent, to {2-900} million, sharply, slightly, in the quarter, in {month}, year on year, again
@fact
{firm} will publish its {x} on {date}
{firm} keeps its guidance for {x} unchanged
{x} matched forecasts
{firm} names {first} {last} head of {city} office
{x} stayed flat in the quarter
{firm} did not comment on {x}
{firm} moves its office to {city}
{firm} will present its report on {x} in {city}
{firm} pays {price} a share, the same as last year
{x} of {amount} met forecasts, neither more nor less
{x} neither rose nor fell in {month}
no change in {x} at {amount}, {firm} says
{firm} plans a call on {x} for {date}, and one on {y}
analysts at {firm} discuss whether {x} rose or fell
{firm} repeats that {x} will be about {amount} again
{x} of {firm} due on {date}, {y} to follow in {month}
@firm = {last} Group, {last} and Sons, {city} Motors, North Bank, Delta Foods, Alpha Steel, Nova Energy, Orion Media, Baltic Paper, {last} Holdings,
 Apex Retail, {last} plc, {last} Corp, {last} Inc, {last} Oyj, {ticker}
@ticker = ${capital}{capital}{capital}, ${capital}{capital}, ${capital}{capital}{capital}{capital}
@opener = {firm}:, At {firm}, {firm} says, {firm} reports, Update:, {city} -, {firm} Q{1-4}:, {ticker}
@weak = although, even though, despite news that, while
@weak_test = notwithstanding that, for all that
@strong = but, yet, however, and still
@strong_test = all the same
"""

_FINANCE_GRAMMAR = Grammar(COMMON, _FINANCE)


def _move(draw: _Draw, bullish: bool) -> str:
    """A clause of good or bad news, which follows from what moves together with its direction."""
    good_thing = draw.odds(0.7)
    thing = draw("up_good" if good_thing else "up_bad")
    up = good_thing == bullish
    kind = draw.rng.choices(("plain", "than", "not", "plan", "stop"), (6, 2, 1, 1, 1))[0]
    if kind == "plain":
        return f"{thing} {draw('rise' if up else 'drop')} {draw('by')}"
    if kind == "not":
        verb = draw.rng.choice(
            ("rise", "grow", "climb") if not up else ("fall", "shrink", "decline")
        )
        return f"{thing} did not {verb} as forecast"
    if kind == "than":
        if bullish == good_thing:  # better for good things, worse for bad: more, or a smaller fall
            move = f"{draw('rise')} more" if draw.odds(0.5) else f"{draw('drop')} less"
        else:
            move = f"{draw('rise')} less" if draw.odds(0.5) else f"{draw('drop')} more"
        return f"{thing} {move} than {'expected' if draw.odds(0.7) else 'forecast'}"
    if kind == "plan":
        verb = draw.rng.choice(
            ("higher", "rising", "growing") if up else ("lower", "falling", "shrinking")
        )
        return f"{draw.rng.choice(('analysts see', 'management expects', 'we now see'))} {verb} {thing}"
    verb = draw.rng.choice(("decline", "slide", "fall") if up else ("rise", "growth", "climb"))
    return f"the {verb} in {thing} has ended"


def _finance(draw: _Draw) -> Row:
    rng = draw.rng
    label = rng.choices(("bullish", "bearish", "neutral"), (36, 32, 32))[0]
    things = draw(rng.choice(("up_good", "up_bad")))
    if label == "neutral":
        main = draw("fact", x=things, y=draw("up_bad"))
        other = draw("fact", x=draw("up_bad"), y=draw("up_good")) if draw.odds(0.35) else ""
        text = f"{main}; {other}" if other else main
    else:
        bullish = label == "bullish"
        main, against = _move(draw, bullish), _move(draw, not bullish)
        shapes = [
            f"{main}",
            f"{draw('weak')} {against}, {main}",
            f"{main}, {draw('weak')} {against}",
            f"{against}, {draw('strong')} {main}",
            f"{draw('fact', x=things, y=draw('up_bad'))}; {main}",
            f"{main} and {_move(draw, bullish)}",
        ]
        text = rng.choices(shapes, (4, 1, 2, 4, 1, 3))[0]
    if draw.odds(0.6):
        text = f"{draw('opener')} {text}"
    text = text[:1].upper() + text[1:]
    return {"text": text + rng.choice(("", ".", ".", " #stocks")), "label": label}


# --------------------------------------------------------------------------------- support
# The intent is what the customer wants now; other matters are mentioned as settled or denied.

_SUPPORT = """
@item = kettle, lamp, jacket, printer, phone, headset, camera, blender, tent, desk, pair of boots, rucksack, tablet, keyboard, rug, toaster
@item_test = drone, teapot, sleeping bag
@no = {code}, #{#5}, {#6}
@cancel_order
please stop order {no} before it ships
I no longer want the {item}, call the order off
can you cancel what I ordered {when}
@track_order
where is my {item} right now
when will order {no} get here
can you tell me how far the parcel with the {item} has come
@return_item
I want to send the {item} back
how do I return the {item}
which label do I need to give the {item} back
@refund_status
when do I get my money back for the {item}
the refund of {price} has not reached me yet
how long until you pay back the {price}
@change_address
the parcel should go to a different street, please change it
I moved to {city}, update where you deliver
can you ship order {no} to my office instead
@damaged_item
the {item} arrived broken
there is a crack in the {item} I unpacked
the {item} came with a torn part
@wrong_item
you sent me a {item} that I never ordered
I got the wrong colour of {item}
the box held a {item} in place of what I chose
@reset_password
I forgot my password
how can I choose a new password for the account
the login rejects my password, let me set another
@close_account
delete my account for good
I want to leave, remove my profile
how can my account be closed
@invoice_copy
I need the invoice for order {no} as a PDF
please send the bill for the {item} again
my tax office asks for a copy of the invoice
@payment_failed
my card was declined at the checkout
the payment for the {item} does not go through
an error appears whenever I try to pay
@charged_twice
{price} was taken twice from my card
there are two charges for one {item}
why did you bill me double
@use_voucher
how do I redeem my voucher of {price}
the discount code {no} is not accepted
where do I type in the gift code
@product_question
does the {item} work with a {item}
how heavy is the {item}
is the {item} waterproof
@warranty_repair
the {item} stopped working after {2-11} months, is the repair covered
can the {item} be mended under warranty
my {item} died, who fixes it within the guarantee
@about_cancel_order = the cancelled order, stopping the order
@about_track_order = the tracking of my parcel, where the parcel is
@about_return_item = sending the {item} back, the return of the {item}
@about_refund_status = the refund of {price}, getting my money back
@about_change_address = my new address, the changed street
@about_damaged_item = the broken {item}, the crack in the {item}
@about_wrong_item = the wrong {item} you sent, the {item} I never ordered
@about_reset_password = my forgotten password, the new password
@about_close_account = deleting my account, the closed account
@about_invoice_copy = the copy of the invoice, the bill as a PDF
@about_payment_failed = my declined card, the failed payment
@about_charged_twice = the double charge, the two charges on my card
@about_use_voucher = my voucher of {price}, the discount code
@about_product_question = the weight of the {item}, whether the {item} is waterproof
@about_warranty_repair = the repair under warranty, the guarantee for the {item}
@settled
{About} is settled, thanks
I do not write because of {about}
this is not about {about}
you already helped me with {about}
last time I asked about {about}
my {relative} has a question on {about}, I do not
forget what I wrote about {about}
thank you for clearing up {about}
@settled_test
{About} no longer matters
leave {about} aside
@quoted
my {relative} asked you: {other}. I am somebody else
last week I wrote: {other}. That is done
your bot thinks I mean this: {other}. No
I am not asking this: {other}
in my first mail I said: {other}. Ignore that
the help page only answers: {other}. That is no use to me
I do not mean: {other}
you answered a question I never had: {other}
@quoted_test
another customer may say: {other}. I do not
@greet = Hi, Hello, Dear team, Good morning, Hey there, Hi team
@ask = now, what I need:, today, my question:, the matter is this:, instead, so
@thanks = Thanks {first}, Regards {first}, {first} {last}, Cheers, please reply soon, waiting for your answer
"""

_SUPPORT_GRAMMAR = Grammar(COMMON, _SUPPORT)
INTENTS = tuple(
    name.removeprefix("about_") for name in _SUPPORT_GRAMMAR.rules if name.startswith("about_")
)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _support(draw: _Draw) -> Row:
    rng = draw.rng
    label = rng.choice(INTENTS)
    sentences = []
    wish = draw(label)
    for other in rng.sample([i for i in INTENTS if i != label], rng.choice((0, 1, 1, 1, 2))):
        about = draw(f"about_{other}")
        if draw.odds(0.75):
            sentences.append(draw("quoted", other=draw(other)))
        else:
            sentences.append(draw("settled", about=about, About=_capital(about)))
    if sentences and draw.odds(0.3):
        wish = f"{draw('ask')} {wish}"
    sentences.insert(rng.randint(0, len(sentences)), wish)
    text = " ".join(_capital(s) + "." for s in sentences)
    if draw.odds(0.4):
        text = f"{draw('greet')}, {text}"
    if draw.odds(0.3):
        text = f"{text} {draw('thanks')}"
    return {"text": text.lower() if draw.odds(0.2) else text, "label": label}


# --------------------------------------------------------------------------------- spam
# Spam wants an unknown reader to click, call or pay; ham may talk about all of that.

_SPAM = """
@when = today, tonight, tomorrow, on {day}, this weekend, later, at {1-12}, at noon, after work, in a bit, next week, at lunch, before {1-12}, {day} morning, by {day}, around {1-12}pm
@prize = {price} cash, a {price} voucher, a free phone, a holiday for two, {price} of credit, a new tablet, free ringtones, a {price} gift card
@prize_test = a city break, concert tickets
@scam
{call} You have won {prize}! {act}
your number was selected for {prize}. {act}
FINAL notice: your {prize} expires {when}. {act}
{hi} its {first} from the gym, saw ur pic, {act}
{hi} {first} here, lonely in {city} tonight, {act}
your bank card is blocked, confirm your PIN at {url}
Your parcel could not be delivered, pay {price} at {url}
{hi} mum, lost my phone, this is my new number, send {price} to {#8} asap
earn {price} a week from home, no skills needed. {act}
get {prize} with every top-up today only, {act}
Loan of {price} approved, no credit check! {act}
someone you know fancies you. find out who, {act}
tax refund of {price} is waiting, claim at {url}
{hi} this is {first} from work, new account for the {price}: {#8}, pay {when}
@scam_test
{hi} your cloud storage is full, renew for {price} at {url}
we tried to call re your accident, you are owed {price}. {act}
@call = WINNER!!, Congratulations!, URGENT!, Dear customer, Free entry!, Hi, Good news, Last chance
@act = Call {phone} now, Txt WIN to {#5}, Reply YES to {#5}, claim at {url}, click {url}, call {phone} £1.50/min, text back to {#5} 18+, STOP to end
@hi = hey, hi, hiya, Hello, hey hun, morning, babe
@talk
{hi} {first} won {prize} at the raffle, so jealous
lol just got a text saying i won {prize}, obviously a scam, dont click it
can u send me {price} for the {thing}, im at the {place}
here is the link for the {place} tickets {url}, c u {when}
call me on {phone} when u r free
my bank blocked my card again, gotta go to the branch {when}
the parcel came, paid {price} to the postman
mum says the prize for the {sport2} cup is {price}
congratulations on winning the {sport2} match!! claim ur drink {when}
free {when}? we could go to the {place}
reply yes if u want {food2}, il order {when}
did u get the voucher i gave u for ur birthday?
dont pay that {price} fine online, the site {url} is fake
win or lose im proud of u {first}
urgent!! need the {thing}, where did u put it
txt {first} the code {#4} for the gate
i owe u {price}, will bring cash {when}
tax refund finally came, drinks on me {when}
{first} from the gym says hi, she starts {when}
{hi} its {first}, im at the {place}, where r u
running late, start without me
happy birthday {first}! have a lovely day
what time is dinner {when}? {first} is coming too
ok see u {when} at the {place}
left my {thing} at ur place, can u bring it {when}
the boss wants the report {when}, can u help
stop texting me in lectures haha
thanks for the {thing}, it is {good}
mum lost her phone, ring {first} instead
got the loan approved, we can buy the car!!
{first}'s {relative} is in town {when}, shall we go to the {place}
the {place} was packed {when}, never again
who took my {thing}? it was in the {place}
watching the {sport2} with {first}, we r losing
dont worry about the {thing}, i have another
{food2} was {good}, thanks for cooking {first}
my {relative} needs a lift to the {place} {when}
have u done the {thing} report for {title} {last}
that {job} at the {place} is so {adj}
im {feel}, can we talk {when}
cant find the {place}, is it near the {place}
bus broke down at the {place}, b there at {time}
will u be at the {place} or at the {place} {when}
how was the {place} with ur {relative}
i sold the {thing} for {price}, well chuffed
the free tickets for the {place} r with {first}
{first} called {number} times, ring him back
prize giving at school is at {time}, wear the {adj} one
we owe {first} {price} for the {thing}
@report
got this text today: "{s}" is it real
{first} fell for this one: {s} - what a fool
lol they sent me "{s}" again, deleted it
mum asks if she should answer this: "{s}" i said no way
haha look what came in: {s} as if
warn ur {relative}, this goes round: "{s}"
@report_test
never answer stuff like "{s}" ok
@bait
{t}. anyway {s}
{t} lol. {s}
{t}, and {s}
@bait_test
{t}... by the way {s}
@talk_test
the lottery numbers are out, we got nothing lol
{first} clicked one of those winner links, her phone is dead now
@sport2 = football, tennis, chess, rugby, darts, pub quiz
@food2 = pizza, curry, chips, noodles, kebab
@tail = x, xx, lol, :), haha, thx, ok?, love {first}, mate, bye, see ya, tell {first}, sorry, {first} says hi
"""

_SPAM_GRAMMAR = Grammar(COMMON, _SPAM)
_SHORT = {
    "you": "u",
    "your": "ur",
    "are": "r",
    "to": "2",
    "for": "4",
    "please": "pls",
    "are you": "r u",
}


def _typos(rng: Random, text: str) -> str:
    """Abbreviate, or drop or double a letter, as people do on a phone."""
    words = text.split(" ")
    for i, word in enumerate(words):
        if word in _SHORT and rng.random() < 0.3:
            words[i] = _SHORT[word]
        elif word.isalpha() and len(word) > 4 and rng.random() < 0.04:
            cut = rng.randrange(1, len(word) - 1)
            words[i] = word[:cut] + rng.choice(("", word[cut] * 2)) + word[cut + 1 :]
    return " ".join(words)


def _spam(draw: _Draw) -> Row:
    rng = draw.rng
    spam = draw.odds(0.16)
    if spam:
        text = draw("scam")
        if draw.odds(0.3):  # begins like a friend
            text = draw("bait", t=draw("talk"), s=text)
    elif draw.odds(0.14):  # a friend describes spam
        text = draw("report", s=draw("scam"))
    else:
        text = draw("talk")
    if not spam and draw.odds(0.4):
        text += rng.choice((". ", ", ", " ")) + draw("talk")
    if draw.odds(0.25 if spam else 0.5):
        text += " " + draw("tail")
    text = _typos(rng, text)
    style = rng.random()
    text = text.lower() if style < 0.3 else _capital(text) if style < 0.8 else text
    return {"text": text, "label": "spam" if spam else "ham"}


# --------------------------------------------------------------------------------- rows

_DOMAINS: dict[str, tuple[Grammar, Callable[[_Draw], Row]]] = {
    "medical": (_GRAMMAR, _medical),
    "legal": (_LEGAL_GRAMMAR, _legal),
    "finance": (_FINANCE_GRAMMAR, _finance),
    "support": (_SUPPORT_GRAMMAR, _support),
    "spam": (_SPAM_GRAMMAR, _spam),
}


def _normal(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _grams(normal: str) -> set[str]:
    words = normal.split()
    return {" ".join(words[i : i + 5]) for i in range(len(words) - 4)}


class _Shelf:
    """The rows of the splits so far; refuses repeats, and test rows similar to an earlier row."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.holders: dict[str, list[tuple[str, int]]] = {}

    def takes(self, text: str, split: str) -> bool:
        normal = _normal(text)
        if normal in self.seen:
            return False
        grams = _grams(normal)
        rare = [g for g in grams if len(self.holders.get(g, ())) < 3]  # common phrases do not count
        shared: dict[tuple[str, int], int] = {}
        for gram in rare:
            for holder in self.holders.get(gram, ()):
                if holder[0] != split:
                    shared[holder] = shared.get(holder, 0) + 1
        if shared and max(shared.values()) * 2 >= len(rare):
            return False
        for gram in grams:
            self.holders.setdefault(gram, []).append((split, len(self.seen)))
        self.seen.add(normal)
        return True


def domain_rows(name: str, split: str) -> list[Row]:
    """The labelled rows of one split of a domain, the same every time and in no other split."""
    if name not in _DOMAINS or split not in _ORDER:
        raise ValueError(
            f"no rows for domain {name!r}, split {split!r}; "
            f"domains: {', '.join(_DOMAINS)}; splits: {', '.join(_ORDER)}"
        )
    return [dict(row) for row in _all_rows(name)[split]]


@cache
def _all_rows(name: str) -> Mapping[str, Sequence[Row]]:
    grammar, make = _DOMAINS[name]
    shelf, splits = _Shelf(), dict[str, list[Row]]()
    for part in _ORDER:  # earlier splits first, so that no text is drawn twice
        draw = _Draw(Random(_SEEDS[part].format(name)), grammar, part)
        rows = splits[part] = []
        while len(rows) < SIZES[name][part]:
            row = make(draw)
            if shelf.takes(row["text"], part):
                rows.append(row)
    return splits
