"""Writes patterns.inc: which coefficients of each rule are zero or one whatever its hyper-parameters are, in a step
that mixes and in a local one.

Run by CMake: ``python patterns.py path/to/rules.py path/to/patterns.inc``. The kernel compiles one instance for each,
so a new row in rules.py gets its own without another word.
"""

import importlib
import itertools
import pathlib
import sys
import types


def load_rules(path):
    """The rules of the table, without running the package: a build has no torch."""
    package = types.ModuleType("gut_fast")
    package.__path__ = [str(pathlib.Path(path).parent)]
    sys.modules["gut_fast"] = package
    return importlib.import_module("gut_fast.rules").RULES.values()


def samples(rule, weight_decay, is_local):
    """The rule's coefficients at values of the hyper-parameters that share no accidental zero or one."""
    for lr, fraction, maximize in ((0.137, 0.618, False), (0.029, 0.271, True)):
        hyperparameters = {
            name: maximize if isinstance(default, bool) else fraction for name, default in rule.hyperparameters.items()
        }
        settings = {"weight_decay": weight_decay, "maximize": maximize, "is_local": is_local, **hyperparameters}
        yield rule.coefficients(lr, **settings).flat()


def pattern(rule, weight_decay, is_local):
    """States, messages, and a bit for each coefficient that is always zero, and always one."""
    entries = list(zip(*samples(rule, weight_decay, is_local), strict=True))

    def bits(value):
        return sum(1 << i for i, values in enumerate(entries) if set(values) == {value})

    return len(rule.states), rule.num_messages, bits(0.0), bits(1.0)


def patterns(rules):
    """The different patterns and the rules that have them. Of patterns with the same zeros the one with fewest ones
    serves all: a product with one changes nothing.
    """
    found = {}
    for rule in rules:
        for weight_decay, is_local in itertools.product((0.0, 0.011), (False, True)):
            states, messages, zeros, ones = pattern(rule, weight_decay, is_local)
            common, names = found.get((states, messages, zeros), (ones, {}))
            found[states, messages, zeros] = common & ones, names | {rule.name: None}
    return [(*key, ones, ", ".join(names)) for key, (ones, names) in found.items()]


def main(rules_path, output_path):
    """One line for each pattern."""
    lines = [
        f"GUT_FAST_PATTERN({states}, {messages}, {zeros:#x}, {ones:#x})  // {names}\n"
        for states, messages, zeros, ones, names in patterns(load_rules(rules_path))
    ]
    content, output = "".join(lines), pathlib.Path(output_path)
    if not output.exists() or output.read_text() != content:  # an untouched file leaves what includes it compiled
        output.write_text(content)


if __name__ == "__main__":
    main(*sys.argv[1:])
