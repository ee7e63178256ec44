"""One colour, marker and line for each method, the same in every picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["LOOKS", "Look", "look_of", "looks_of"]


@dataclass(frozen=True)
class Look:
    """The colour, marker and line style of a method, as matplotlib takes them."""

    color: str
    marker: Any
    line: Any = "-"


DOTTED, SHORT, LONG = (0, (1, 1.2)), (0, (3, 1.5)), (0, (6, 2))
"""Line styles: of methods that send two messages, of heavy-ball momentum, and of a step taken after mixing."""

LOOKS = {
    "DSGD": Look("#000000", "o"),
    "GUT": Look("#D55E00", "s"),
    "κ-GUT": Look("#8C3B00", "d"),
    "QGT": Look("#56B4E9", "*"),
    "GUTm": Look("#CC79A7", "D"),
    "D2": Look("#0072B2", "^"),
    "EDM": Look("#44AA99", "h"),
    "QG-DSGDm": Look("#009E73", "v"),
    "QG-DSGDm β+μ": Look("#6B8E23", "X", SHORT),
    "QG-GUTm": Look("#E69F00", "P", SHORT),
    "DSGDm": Look("#777777", "p", SHORT),
    "EXTRA": Look("#332288", "<", LONG),
    "AWC-GUT": Look("#A6761D", (4, 1, 0), LONG),
    "DecentLaM": Look("#999933", ">", LONG),
    "GASLoC": Look("#6699CC", "H", LONG),
    "gradient tracking": Look("#882255", "8", DOTTED),
    "momentum tracking": Look("#5E4FA2", (6, 1, 0), DOTTED),
    "K-GT": Look("#661100", (3, 1, 0), DOTTED),
    "exact averages": Look("#999999", "x", SHORT),
    "exact averages β": Look("#666666", "+", SHORT),
    "local AdamW": Look("#888833", "1", SHORT),
    "DiLoCo": Look("#117733", "2", SHORT),
    "all-reduce every step": Look("#444444", "_", SHORT),
}
"""The look of each method by its name in tables. The first colours are Okabe and Ito's, for any colour vision."""

NAMES = {name.lower().replace("-", "_").replace(" ", "_"): name for name in LOOKS}
"""The names of the methods by their rules."""

REPEATS = ("-", "--", "-.", ":")
"""The lines of methods that would look alike, such as one method with several numbers of local steps."""


def look_of(label: str, rule: str = "") -> Look | None:
    """The look of a method by its label, such as ``"GUT, H = 4"`` or ``"K-GT †"``, or else by its rule; or None."""
    name = label.replace("†", "").partition(",")[0].partition(" (")[0].strip()
    return LOOKS.get(name) or LOOKS.get(NAMES.get(rule, ""))


def looks_of(rules: Mapping[str, str]) -> dict[str, Look]:
    """The looks of the methods of one picture, no two alike as far as looks reach.

    Args:
        rules: the name of the rule of each method by the method's label; an empty one where it is not known.
    """
    known = {label: look_of(label, rule) for label, rule in rules.items()}
    free = _free_looks(known)
    looks: dict[str, Look] = {}
    for label, look in known.items():
        one = look or next(free)
        times = sum((one.color, one.marker) == (other.color, other.marker) for other in looks.values())
        looks[label] = replace(one, line=REPEATS[times % len(REPEATS)]) if times else one
    return looks


def _free_looks(known: Mapping[str, Look | None]) -> Iterator[Look]:
    """Looks that no known method of the picture has, and then all of them again and again."""
    yield from (look for look in LOOKS.values() if look not in known.values())
    while True:
        yield from LOOKS.values()
