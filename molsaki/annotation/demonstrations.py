"""The demonstrations that ``molsaki annotate`` shows a teacher when it is given none."""

from __future__ import annotations

from molsaki.text.examples import Example


def _math(question: str, rationale: str, answer: str, keywords: str) -> Example:
    return Example("", question, rationale, answer, tuple(keywords.split(", ")), task="math")


def _choice(question: str, choices: str, rationale: str, answer: str, keywords: str) -> Example:
    return Example(
        "", question, rationale, answer, tuple(keywords.split(", ")), tuple(choices.split(", ")), task="commonsense"
    )


DEMONSTRATIONS = [
    _math(
        "A baker fills 6 trays with 12 rolls each and sells 45 rolls before noon. How many rolls are left?",
        "The baker makes 6 trays of 12 rolls, which is 6 * 12 = 72 rolls. After selling 45 of them, there are "
        "72 - 45 = 27 rolls left.",
        "27",
        "trays, rolls, sells, left",
    ),
    _math(
        "Nora read 38 pages on Monday and 17 pages more than that on Tuesday. Her book has 240 pages. How many pages "
        "did she read on the two days?",
        "On Tuesday Nora read 38 + 17 = 55 pages. How long the book is does not matter here. On the two days she read "
        "38 + 55 = 93 pages.",
        "93",
        "read, pages, more, two days",
    ),
    _math(
        "A rope of 63 meters is cut into pieces of 7 meters. How many pieces are there?",
        "Each piece takes 7 meters of the 63 meters. So the number of pieces is 63 / 7 = 9.",
        "9",
        "rope, cut, pieces, meters",
    ),
    _math(
        "Tickets cost $4 for a child and $9 for an adult. What do 3 children and 2 adults pay?",
        "The children pay 3 * 4 = 12 dollars. The adults pay 2 * 9 = 18 dollars. In total they pay 12 + 18 = 30 "
        "dollars.",
        "30",
        "child, adult, pay, total",
    ),
    _choice(
        "Where would you keep milk so that it stays fresh?",
        "cupboard, refrigerator, car, windowsill, bathtub",
        "Milk spoils when it is warm, so it has to be kept cold. A cupboard, a car, a windowsill and a bathtub are all "
        "about as warm as the room. The only cold place is the refrigerator.",
        "refrigerator",
        "milk, fresh, cold, warm, refrigerator",
    ),
    _choice(
        "What do people usually open when it starts to rain?",
        "book, umbrella, letter, bottle, gift",
        "Rain makes people wet, so they want something that covers them. Of these things, the one that covers a person "
        "when it is open is an umbrella.",
        "umbrella",
        "open, rain, wet, covers, umbrella",
    ),
    _choice(
        "The hikers were lost in the fog and could not see the sun. What helped them to find the north?",
        "mirror, blanket, compass, lantern, whistle",
        "To find the north without the sun, the hikers need a tool that shows directions. A lantern gives light and a "
        "whistle gives sound, but neither shows directions. The needle that points north is that of a compass.",
        "compass",
        "lost, north, sun, directions, compass",
    ),
    _choice(
        "Why did the gardener water the plants every evening in July?",
        "hot weather, heavy snow, too much shade, new neighbors, loud music",
        "Plants need more water when their soil dries out. In July the soil dries out because the sun is strong. So "
        "the reason is hot weather.",
        "hot weather",
        "water, plants, July, soil, dries out, hot weather",
    ),
]
