"""Update rules: every decentralized method is one row of coefficients.

N agents hold D parameters each; ``W`` is the [N, N] mixing matrix. All methods here are linear in the parameters, the
gradient and the state, so one step of any of them is::

    inputs    u      = (z, state_1 … state_q, g)                       K = q + 2 rows of shape [N, d]
    message   S_m    = Σ_k A[m, k] u_k                                 m < M: the models sent to each neighbour per step
    drift     D_m(i) = Σ_j W[i, j] (S_m(j) − S_m(i))                   the only term that looks at other agents
    outputs   o_l    = Σ_k B[l, k] u_k + Σ_m C[l, m] S_m + E[l, m] D_m     o_0 is the new z, o_1 … the new state

An `UpdateRule` is the function from hyper-parameters to ``(A, B, C, E)``. The gradient ``g`` is taken at ``z``, so
``z`` is the model's parameters and ``loss.backward(); optimizer.step()`` is the whole algorithm. States are zero at the
start and kept in gradient units, so a learning-rate schedule rescales them as `torch.optim.SGD` does its momentum.

Where a schedule makes η tiny and then large again, as with warm restarts, D/η of the tiny η is noise that the large one
multiplies. So the drift can be divided by a rate of its own, ``ρ_t = max(η_t, γ ρ_{t−1})`` (`next_drift_lr`), which is
η while η is constant or grows, and follows a falling η at the pace of γ only: ρ takes the place of η in E.

To add a method, write one function under ``@update_rule``; every backend, test, benchmark and command picks it up.
"""

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
    "drift_memory": Interval(0.0, 1.0, open_above=True),
    "weight_decay": Interval(0.0, math.inf, open_above=True),
    "mu": Interval(0.0, 1.0),
    "momentum": Interval(0.0, 1.0, open_above=True),
}
"""The domain of a hyper-parameter of this name, wherever it appears; other names take any finite number."""


RESERVED = (
    *("weight_decay", "maximize", "drift_lr", "drift_memory"),
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
        domains: allowed `Interval` of hyper-parameters; unless given here ``mu`` is in [0, 1], ``momentum`` in [0, 1).

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
        **hyperparameters: Any,
    ) -> Coefficients:
        """The matrices of one step at learning rate `lr`.

        Weight decay λ replaces g by g + λz, `maximize` replaces g by −g, as in `torch.optim.SGD`. At ``lr = 0`` every
        rule is plain gossip: z mixes, ``z' = z + D`` with ``S = z``, and the state stays as it is. The states' rows of
        E are those at learning rate `drift_lr` (see `next_drift_lr`) if that is given and larger.

        Raises:
            TypeError, ValueError: a bad value, shape or entry; the message says which.
        """
        self._check_value("lr", lr)
        self._check_value("weight_decay", weight_decay)
        self._check_value("maximize", maximize, is_flag=True)
        checked = self.check(hyperparameters)
        if drift_lr is not None:
            self._check_value("drift_lr", drift_lr)
        if lr == 0:
            return plain_gossip(len(self.inputs), self.num_messages)
        coefficients = self._evaluate(lr, checked)
        if drift_lr is not None and drift_lr > lr:
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


@update_rule()
def dsgd(lr: float) -> Coefficients:
    """S = z − ηg;  z' = S + D

    Decentralized SGD, adapt then combine. Lian et al., "Can Decentralized Algorithms Outperform Centralized
    Algorithms?", NeurIPS 2017.
    """
    return Coefficients(A=[[1, -lr]], B=[[0, 0]], C=[[1]], E=[[1]])


@update_rule("r")
def gut(lr: float, mu: float = 0.9) -> Coefficients:
    """S = z − η(g + μr);  z' = S + D;  r' = μr − D/η

    Global Update Tracking: DSGD plus one buffer r, a leaky sum of the agent's own past drifts; at rest r = −g.
    Aketi, Hashemi, Roy, "Global Update Tracking", NeurIPS 2023 (arXiv 2305.04792), with z = Wx substituted.
    """
    return Coefficients(
        A=[[1, -lr * mu, -lr]],
        B=[[0, 0, 0], [0, mu, 0]],
        C=[[1], [0]],
        E=[[1], [-1 / lr]],
    )


@update_rule("m", "r")
def gutm(lr: float, momentum: float = 0.9, mu: float = 0.8) -> Coefficients:
    """d = g + βm + μr;  S = z − ηd;  z' = S + D;  m' = βm + (1−β)(d − D/η);  r' = μr − D/η

    Quasi-global momentum with global update tracking beside it, decoupled: the average moves as QG-DSGDm's does.
    gut_fast's own rule.
    """
    keep = 1 - momentum
    return Coefficients(
        A=[[1, -lr * momentum, -lr * mu, -lr]],
        B=[[0, 0, 0, 0], [0, momentum + keep * momentum, keep * mu, keep], [0, 0, mu, 0]],
        C=[[1], [0], [0]],
        E=[[1], [-keep / lr], [-1 / lr]],
    )


@update_rule("m")
def qgt(lr: float, momentum: float = 0.9, mu: float = 1.0) -> Coefficients:
    """d = g + βm;  S = z − ηd;  z' = S + D;  m' = βm + (1−β)d − μD/η

    Quasi-global tracking: momentum and update tracking in one buffer. It is QG-DSGDm with the weight of the drift set
    free, which is μ = 1 − β there; the average moves as QG-DSGDm's does whatever μ is. gut_fast's own rule.
    """
    keep = 1 - momentum
    return Coefficients(
        A=[[1, -lr * momentum, -lr]],
        B=[[0, 0, 0], [0, momentum + keep * momentum, keep]],
        C=[[1], [0]],
        E=[[1], [-mu / lr]],
    )


@update_rule("r")
def d2(lr: float) -> Coefficients:
    """S = z − η(g + r);  z' = S + D;  r' = r − D/η

    D² / Exact Diffusion: GUT at μ = 1. Tang et al., "D²: Decentralized Training over Decentralized Data", ICML 2018;
    Yuan et al., "Exact Diffusion for Distributed Optimization and Learning", IEEE TSP 2019.
    """
    return Coefficients(
        A=[[1, -lr, -lr]],
        B=[[0, 0, 0], [0, 1, 0]],
        C=[[1], [0]],
        E=[[1], [-1 / lr]],
    )


@update_rule("p", "c")
def qg_gutm(lr: float, momentum: float = 0.9, mu: float = 0.06) -> Coefficients:
    """S = z − η(g + p);  z' = S + D;  p' = βg + (β+μ)p − μD/η − β(1+μ)c;  c' = D/η

    Global Update Tracking with quasi-global momentum; at μ = 0 it is QG-DSGDm in heavy-ball form, and its average moves
    with momentum β + μ, which must stay below 1. Aketi, Hashemi, Roy, "Global Update Tracking", NeurIPS 2023
    (arXiv 2305.04792), QG-GUTm, with z = Wx substituted.
    """
    return Coefficients(
        A=[[1, -lr, 0, -lr]],
        B=[[0, 0, 0, 0], [0, momentum + mu, -momentum * (1 + mu), momentum], [0, 0, 0, 0]],
        C=[[1], [0], [0]],
        E=[[1], [-mu / lr], [1 / lr]],
    )


@update_rule("m")
def dsgdm(lr: float, momentum: float = 0.9, nesterov: bool = False) -> Coefficients:
    """S = z − η(g + βm) [Nesterov: z − η(g + β(βm + g))];  z' = S + D;  m' = βm + g

    Decentralized SGD with local momentum. Yu, Jin, Yang, "On the Linear Speedup Analysis of Communication Efficient
    Momentum SGD", ICML 2019.
    """
    from_momentum, from_gradient = (momentum**2, 1 + momentum) if nesterov else (momentum, 1.0)
    return Coefficients(
        A=[[1, -lr * from_momentum, -lr * from_gradient]],
        B=[[0, 0, 0], [0, momentum, 1]],
        C=[[1], [0]],
        E=[[1], [0]],
    )


@update_rule("m")
def qg_dsgdm(lr: float, momentum: float = 0.9, nesterov: bool = False) -> Coefficients:
    """d = g + βm [Nesterov: g + β(βm + g)];  S = z − ηd;  z' = S + D;  m' = βm + (1−β)(d − D/η)

    Quasi-global momentum in moving-average form: the momentum of the agent's whole displacement. Lin et al.,
    "Quasi-Global Momentum", ICML 2021.
    """
    from_momentum, from_gradient = (momentum**2, 1 + momentum) if nesterov else (momentum, 1.0)
    keep = 1 - momentum
    return Coefficients(
        A=[[1, -lr * from_momentum, -lr * from_gradient]],
        B=[[0, 0, 0], [0, momentum + keep * from_momentum, keep * from_gradient]],
        C=[[1], [0]],
        E=[[1], [-keep / lr]],
    )


@update_rule("v", "q")
def gradient_tracking(lr: float) -> Coefficients:
    """y = v + g − q;  S₁ = z − ηy;  S₂ = y;  z' = S₁ + D₁;  v' = S₂ + D₂;  q' = g

    Distributed stochastic gradient tracking: y tracks the mean gradient exactly, at two messages a step. Pu, Nedić,
    "Distributed Stochastic Gradient Tracking Methods", Math. Programming 2021.
    """
    return Coefficients(
        A=[[1, -lr, lr, -lr], [0, 1, -1, 1]],
        B=[[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]],
        C=[[1, 0], [0, 1], [0, 0]],
        E=[[1, 0], [0, 1], [0, 0]],
    )


@update_rule("v", "m")
def momentum_tracking(lr: float, momentum: float = 0.9) -> Coefficients:
    """y = v + (β−1)m + g;  S₁ = z − ηy;  S₂ = y;  z' = S₁ + D₁;  v' = S₂ + D₂;  m' = βm + g

    Gradient tracking of the momentum, at two messages a step. Takezawa et al., "Momentum Tracking", TMLR 2023.
    """
    fade = momentum - 1
    return Coefficients(
        A=[[1, -lr, -lr * fade, -lr], [0, 1, fade, 1]],
        B=[[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, momentum, 1]],
        C=[[1, 0], [0, 1], [0, 0]],
        E=[[1, 0], [0, 1], [0, 0]],
    )
