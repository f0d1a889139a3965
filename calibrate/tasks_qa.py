"""Question answering over a document: facts about people, told in several ways, among facts of the same kind.

RULER asks questions of SQuAD and HotpotQA with other paragraphs around (arXiv 2404.06654, section 3.4). Those are in
the training text of most models; here people and facts are drawn at random, so that only reading answers. A fact is
told in one of several sentences.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsec.calibrate.tasks_frame import Draw, Hidden

PEOPLE = 8
FIRST_NAMES = (
    "Adele", "Bruno", "Carla", "Dmitri", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas",
    "Karin", "Leon", "Marta", "Nils", "Olga", "Pavel", "Rosa", "Stefan", "Tessa", "Viktor",
)  # fmt: skip
LAST_NAMES = (
    "Abbott", "Bergman", "Castell", "Donovan", "Ekberg", "Farkas", "Grimaldi", "Hartley", "Ivanov", "Jansen",
    "Kowalski", "Lindgren", "Moretti", "Novak", "Ortega", "Petrov", "Quinn", "Rossi", "Schneider", "Torres",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """What facts of a kind may be, the sentences that tell one, the question and the beginning of its answer."""

    facts: tuple[str, ...]
    told: tuple[str, ...]
    question: str
    begin: str


KINDS = (
    Kind(
        (
            "Athens", "Berlin", "Boston", "Cairo", "Chicago", "Dublin", "Geneva", "Lisbon",
            "London", "Madrid", "Milan", "Moscow", "Oslo", "Paris", "Prague", "Rome",
        ),
        (
            "{name} was born in {fact} and left as a child.",
            "{name}, born in {fact}, moved away as a student.",
            "The records say that {name} was born in {fact}.",
        ),
        "Where was {name} born?",
        "{name} was born in",
    ),
    Kind(
        (
            "accordion", "banjo", "bassoon", "cello", "clarinet", "drums", "flute", "guitar",
            "harp", "oboe", "organ", "piano", "trombone", "trumpet", "tuba", "violin",
        ),
        (
            "{name} played the {fact} in school.",
            "On Sundays {name} played the {fact}.",
            "{name}, who played the {fact} well, often gave concerts.",
        ),
        "Which instrument did {name} play?",
        "{name} played the",
    ),
    Kind(
        (
            "camel", "cat", "chicken", "cow", "dog", "donkey", "duck", "goat",
            "horse", "monkey", "parrot", "pig", "rabbit", "snake", "spider", "turtle",
        ),
        (
            "{name} kept a {fact} at home.",
            "For many years {name} kept a {fact}.",
            "{name}, who kept a {fact}, never travelled.",
        ),
        "Which animal did {name} keep?",
        "{name} kept a",
    ),
)  # fmt: skip


def qa(draw: Draw) -> Hidden:
    """One question about one of several people, each with a fact of the same kind."""
    kind = draw.rng.choice(KINDS)
    firsts, lasts = (draw.rng.sample(names, PEOPLE) for names in (FIRST_NAMES, LAST_NAMES))
    names = [f"{first} {last}" for first, last in zip(firsts, lasts, strict=True)]
    # Facts that the text does not mention, where there are enough.
    text = draw.text.lower()
    fresh = [fact for fact in kind.facts if fact.lower() not in text]
    facts = draw.rng.sample(fresh if len(fresh) >= PEOPLE else kind.facts, PEOPLE)
    statements = [
        "\n" + draw.rng.choice(kind.told).format(name=name, fact=fact) + "\n"
        for name, fact in zip(names, facts, strict=True)
    ]
    question = f"\nQuestion: {kind.question}\nAnswer: {kind.begin}".format(name=names[0])
    return Hidden(statements, question, facts[:1], f" {facts[0]}.")
