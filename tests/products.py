"""Products of parameters of which `make test` runs a part, and `make test-all` the whole."""

import itertools

import pytest


def covering(*factors):
    """All combinations of the factors' values, most of them marked slow; tuples become several parameters.

    The fast combinations are those whose places sum to a multiple of the length of the last factor, which therefore
    should be the shortest. They hold every value, and with three factors every pair of values of the first two.
    """
    combinations = itertools.product(*(enumerate(factor) for factor in factors))
    return [
        pytest.param(
            *itertools.chain.from_iterable(value if isinstance(value, tuple) else (value,) for _, value in combination),
            marks=() if sum(place for place, _ in combination) % len(factors[-1]) == 0 else pytest.mark.slow,
        )
        for combination in combinations
    ]
