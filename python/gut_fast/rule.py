"""An update rule is a function from hyper-parameters to the matrices of a step; the table is in `gut_fast.rules`."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from gut_fast.arguments import shown
from gut_fast.coefficients import ANY_NUMBER, Coefficients, Interval, is_number, plain_gossip

__all__ = ["RULES", "Coefficients", "Interval", "UpdateRule", "get_rule", "next_drift_lr", "update_rule"]

DOMAINS: Mapping[str, Interval] = {
    "lr": Interval(0.0, math.inf, open_above=True),
    "drift_lr": Interval(0.0, math.inf, open_above=True),
    "round_lr": Interval(0.0, math.inf, open_above=True),
    "drift_memory": Interval(0.0, 1.0, open_above=True),
    "weight_decay": Interval(0.0, math.inf, open_above=True),
    "mu": Interval(0.0, 1.0),
    "kappa": Interval(0.0, 1.0),
    "momentum": Interval(0.0, 1.0, open_above=True),
}
"""The domain of a hyper-parameter of this name, wherever it appears; other names take any finite number."""


RESERVED = (
    *("weight_decay", "maximize", "drift_lr", "drift_memory", "round_lr", "is_local", "local_steps", "mix_state"),
    *("params", "optimizer", "rule", "topology", "backend", "process_group"),
)
"""Options that every rule and optimizer has; no hyper-parameter can be called so."""


def next_drift_lr(lr: float, previous: float, memory: float) -> float:
    """Returns ``ρ_t = max(η_t, γ ρ_{t−1})``, the rate that the drift of a step is divided by.

    Args:
        lr: η_t, the learning rate of the step.
        previous: ρ_{t−1}, the rate of the step before; 0 if there was none.
        memory: γ in [0, 1); at 0 it is the learning rate, which is the published form of every method.
    """
    return max(lr, memory * previous)


@dataclass(frozen=True)
class UpdateRule:
    """One decentralized method.

    Args:
        name: how the method is called, for example ``"gut"``.
        states: names of its state rows, in order, for example ``("r",)``. State has the layout of the parameters.
        formula: function of the learning rate ``lr`` and the hyper-parameters, each with a default, that returns
            `Coefficients`. It is never called with ``lr = 0``: there every rule is plain gossip (see `coefficients`).
        domains: allowed `Interval` of hyper-parameters; unless given here ``mu`` and ``kappa`` are in [0, 1] and
            ``momentum`` in [0, 1).

    Raises:
        ValueError: a state has no name, two have the same or that of an input, or the coefficients at the default
            hyper-parameters have the wrong shape or are not finite.
        TypeError: the formula has no ``lr`` or a hyper-parameter without default, or returns something else.
    """

    name: str
    states: tuple[str, ...]
    formula: Callable[..., Coefficients] = field(repr=False)
    domains: Mapping[str, Interval] = field(default_factory=dict, repr=False, compare=False)
    num_messages: int = field(init=False)
    hyperparameters: Mapping[str, Any] = field(init=False, repr=False, compare=False)
    """Names and defaults of the hyper-parameters besides the learning rate."""

    def __post_init__(self) -> None:
        states = tuple(self.states)
        object.__setattr__(self, "states", states)
        names = ("z", *states, "g")
        if len(set(names)) != len(names) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"rule {self.name!r}: states must be distinct names other than 'z' and 'g', got {states}")
        parameters = inspect.signature(self.formula).parameters
        if next(iter(parameters), None) != "lr" or parameters["lr"].kind is inspect.Parameter.KEYWORD_ONLY:
            raise TypeError(f"rule {self.name!r}: the formula's first argument must be 'lr', got {list(parameters)}")
        for name in list(parameters)[1:]:
            if name in RESERVED:
                raise ValueError(
                    f"rule {self.name!r}: {name!r} is an option of every rule; call the hyper-parameter otherwise"
                )
            if parameters[name].default is inspect.Parameter.empty:
                raise TypeError(
                    f"rule {self.name!r}: hyper-parameter {name!r} needs a default in the formula's signature"
                )
        defaults = {name: parameters[name].default for name in list(parameters)[1:]}
        object.__setattr__(self, "hyperparameters", defaults)
        object.__setattr__(self, "num_messages", len(self._evaluate(1.0, self.hyperparameters).A))

    def __reduce__(self) -> tuple[Callable[..., UpdateRule], tuple[Any, ...]]:
        """Rules of the table pickle by name: the decorated function's name stands for the rule, not the function."""
        if RULES.get(self.name) is self:
            return get_rule, (self.name,)
        return UpdateRule, (self.name, self.states, self.formula, self.domains)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The K inputs, in the order of the columns of A and B."""
        return ("z", *self.states, "g")

    @property
    def outputs(self) -> tuple[str, ...]:
        """The K − 1 outputs, in the order of the rows of B, C and E."""
        return tuple(f"{name}'" for name in ("z", *self.states))

    @property
    def equation(self) -> str:
        """The rule's equations: the first paragraph of the formula's docstring."""
        return (inspect.getdoc(self.formula) or "").split("\n\n")[0].strip()

    @property
    def source(self) -> str:
        """The rule's publication: the rest of the formula's docstring."""
        return " ".join((inspect.getdoc(self.formula) or "").partition("\n\n")[2].split())

    def check(self, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
        """The hyper-parameters with defaults filled in.

        Raises:
            TypeError: a value is not a number (or, for a flag, not a bool).
            ValueError: an unknown name, or a value outside its domain.
        """
        known = self.hyperparameters
        for name, value in hyperparameters.items():
            if name not in known:
                raise ValueError(
                    f"rule {self.name!r} has no hyper-parameter {name!r}; it has: {', '.join(known) or 'none'}"
                )
            self._check_value(name, value, is_flag=isinstance(known[name], bool))
        return {**known, **hyperparameters}

    def domain(self, name: str) -> Interval:
        """The values that hyper-parameter `name`, ``lr`` or ``weight_decay`` may take."""
        return self.domains.get(name, DOMAINS.get(name, ANY_NUMBER))

    def check_option(self, name: str, value: Any) -> None:
        """Raises TypeError or ValueError unless the value is in the domain of an option of this name."""
        self._check_value(name, value)

    def _check_value(self, name: str, value: Any, is_flag: bool = False) -> None:
        if is_flag:
            if not isinstance(value, bool):
                raise TypeError(f"rule {self.name!r}: {name} must be True or False, got {shown(value)}")
        elif not is_number(value):
            raise TypeError(f"rule {self.name!r}: {name} must be a number, got {type(value).__name__} {shown(value)}")
        elif value not in self.domain(name):
            raise ValueError(f"rule {self.name!r}: {name}={value} is outside {self.domain(name)}")

    def coefficients(
        self,
        lr: float,
        *,
        drift_lr: float | None = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
        is_local: bool = False,
        **hyperparameters: Any,
    ) -> Coefficients:
        """The matrices of one step at learning rate `lr`; of one that sends nothing if it `is_local`.

        Weight decay λ replaces g by g + λz, `maximize` replaces g by −g, as in `torch.optim.SGD`. At ``lr = 0`` every
        rule is plain gossip: z mixes, ``z' = z + D`` with ``S = z``, and the state stays as it is. The states' rows of
        E are those at learning rate `drift_lr` (see `next_drift_lr`) if that is given and larger.

        Raises:
            TypeError, ValueError: a bad value, shape or entry; the message says which.
        """
        self._check_value("lr", lr)
        self._check_value("weight_decay", weight_decay)
        self._check_value("maximize", maximize, is_flag=True)
        self._check_value("is_local", is_local, is_flag=True)
        checked = self.check(hyperparameters)
        if drift_lr is not None:
            self._check_value("drift_lr", drift_lr)
        if lr == 0:
            return plain_gossip(len(self.inputs), self.num_messages)
        coefficients = self._evaluate(lr, checked)
        if is_local:
            coefficients = coefficients.local()
        elif drift_lr is not None and drift_lr > lr:
            E = [coefficients.E[0], *self._evaluate(drift_lr, checked).E[1:]]
            coefficients = replace(coefficients, E=E)
        return coefficients.with_gradient(weight_decay, maximize)

    @cached_property
    def divides_drift(self) -> bool:
        """True if what the states take of the drift depends on the learning rate."""
        at_one, at_two = (self._evaluate(lr, self.hyperparameters).E[1:] for lr in (1.0, 2.0))
        return at_one != at_two

    def _evaluate(self, lr: float, hyperparameters: Mapping[str, Any]) -> Coefficients:
        coefficients = self.formula(lr, **hyperparameters)
        where = f"rule {self.name!r}: "
        if not isinstance(coefficients, Coefficients):
            raise TypeError(f"{where}the formula must return Coefficients, got {type(coefficients).__name__}")
        coefficients.check(where, self.inputs, self.outputs, getattr(self, "num_messages", None))
        return coefficients


RULES: dict[str, UpdateRule] = {}
"""All rules of the library by name."""


def update_rule(*states: str) -> Callable[[Callable[..., Coefficients]], UpdateRule]:
    """Makes the decorated formula an `UpdateRule` of the function's name and puts it into `RULES`.

    Raises:
        ValueError: another module has a rule of that name (running the same definition again replaces it).
    """

    def decorate(formula: Callable[..., Coefficients]) -> UpdateRule:
        rule = UpdateRule(formula.__name__, states, formula)
        if rule.name in RULES and RULES[rule.name].formula.__module__ != formula.__module__:
            raise ValueError(f"there is a rule {rule.name!r} already; choose another name")
        RULES[rule.name] = rule
        return rule

    return decorate


def get_rule(rule: str | UpdateRule) -> UpdateRule:
    """The rule of that name, or the rule itself; ``"QG-GUTm"`` and ``"qg-gutm"`` are ``"qg_gutm"``.

    Raises:
        ValueError: there is no such rule.
        TypeError: it is neither a name nor a rule.
    """
    if isinstance(rule, UpdateRule):
        return rule
    if not isinstance(rule, str):
        raise TypeError(f"a rule is a name or an UpdateRule, got {type(rule).__name__}")
    names = {_plain(name): name for name in RULES} | {name: name for name in RULES}
    if (name := names.get(rule) or names.get(_plain(rule))) is None:
        similar = difflib.get_close_matches(_plain(rule), RULES, 1)
        hint = f"did you mean {similar[0]!r}?" if similar else "or pass an UpdateRule of your own"
        raise ValueError(f"unknown rule {rule!r}; known are {', '.join(RULES)}; {hint}")
    return RULES[name]


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")
