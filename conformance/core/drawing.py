"""conformance, drawing: choices by a seed, and few settings that have everything between them."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import numpy as np

Setting = TypeVar("Setting", bound=Hashable)
Choice = TypeVar("Choice")


def one_of(rng: np.random.Generator, choices: Sequence[Choice]) -> Choice:
    """One of them, each as likely as any other."""
    return choices[int(rng.integers(len(choices)))]


def covering(settings: Sequence[Setting], facts_of: Callable[[Setting], Iterable]) -> list[Setting]:
    """Few settings of which one has each fact that some setting has, in the order in which they were picked."""
    settings = list(dict.fromkeys(settings))
    facts = [frozenset(facts_of(setting)) for setting in settings]
    missing: set = set().union(*facts)
    kept = []
    while missing:
        gains = [len(each & missing) for each in facts]  # by place: the hash of a setting takes longer than this
        best = gains.index(max(gains))
        kept.append(settings[best])
        missing -= facts[best]
    return kept
