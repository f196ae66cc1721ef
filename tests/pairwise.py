"""Few cases in which every two values of different factors meet at least once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any


def pairwise(factors: Mapping[str, Sequence[Hashable]], allowed: Callable[[Mapping[str, Any]], bool]) -> list[dict]:
    """Cases {factor: value}, each of them allowed; a case that is not whole yet may be asked about too.

    Greedy: each case begins with a pair that has not met, and takes for every other factor the value that brings most
    new pairs.
    """

    def pairs(case: Mapping[str, Any]) -> set:
        return set(itertools.combinations(sorted(case.items(), key=lambda item: order[item[0]]), 2))

    order = {name: i for i, name in enumerate(factors)}
    missing = dict.fromkeys(
        ((a, x), (b, y))
        for a, b in itertools.combinations(factors, 2)
        for x, y in itertools.product(factors[a], factors[b])
        if allowed({a: x, b: y})
    )
    cases = []
    while missing:
        case = dict(next(iter(missing)))
        for name in factors:
            if name not in case:
                choices = [case | {name: value} for value in factors[name] if allowed(case | {name: value})]
                case = max(choices, key=lambda choice: len(pairs(choice) & missing.keys()))
        cases.append(case)
        for pair in pairs(case):
            missing.pop(pair, None)
    return cases
