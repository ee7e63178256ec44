"""All-pairs coverage: a few cases in which every two values of two factors meet at least once."""

import itertools
from collections import Counter


def all_pairs(**factors):
    """Dictionaries of one value for each factor, which together contain every pair of values of two factors.

    Greedy and deterministic: each case starts from a pair that has not met yet; the other factors take, one after the
    other, the value that meets the most new values, and of equal ones the value used least.
    """
    columns = {name: list(values) for name, values in factors.items()}
    new = dict.fromkeys(
        ((a, i), (b, j))
        for a, b in itertools.combinations(columns, 2)
        for i, j in itertools.product(range(len(columns[a])), range(len(columns[b])))
    )
    order, used = {name: k for k, name in enumerate(columns)}, Counter()
    cases = []
    while new:
        case = dict(next(iter(new)))
        for name in sorted(columns.keys() - case.keys(), key=order.get):

            def gain(i, name=name, case=case):
                pairs = [tuple(sorted([(name, i), item], key=lambda x: order[x[0]])) for item in case.items()]
                return sum(pair in new for pair in pairs), -used[name, i]

            case[name] = max(range(len(columns[name])), key=gain)
        used.update(case.items())
        for pair in itertools.combinations([(name, case[name]) for name in columns], 2):
            new.pop(pair, None)
        cases.append({name: columns[name][case[name]] for name in columns})
    return cases


def each_once(**factors):
    """Dictionaries of one value for each factor, as many as the longest factor has: every value occurs."""
    length = max(map(len, factors.values()))
    return [{name: list(values)[k % len(values)] for name, values in factors.items()} for k in range(length)]
