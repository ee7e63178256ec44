"""Long runs of every rule in float32 beside float64: how far rounding takes the average of the agents.

Sixteen agents on a ring minimise quadratics of 64 coordinates in lockstep, with the same gradients but for what the
models differ by, along three directions: one of curvature 1; a flat one with noisy gradients; and a flat one whose
gradients never change, which is the worst there is, as the same rounding errors return at every step.

    python tests/soak/rules.py --steps 100000

prints a table, and ends with exit code 1 if an error is larger than its bound.
"""

import argparse
import sys
import time
from dataclasses import dataclass, field

import torch

import gut_fast as gf
from gut_fast import analysis
from gut_fast.rules import RULES

AGENTS, COLUMNS, LR = 16, 64, 0.1
TOPOLOGY = gf.topology.ring(AGENTS)
CURVATURE = {"curved": 1.0, "noisy flat": 0.0, "flat": 0.0}
"""The curvature of each direction."""

NOISE = {"curved": 0.0, "noisy flat": 0.1, "flat": 0.0}
"""The standard deviation of the gradients' noise along each direction."""

CASES = [*((rule, {}) for rule in RULES), ("gut", {"mu": 1.0})]
"""The rules with their hyper-parameters; D² is GUT at μ = 1, and runs under both names."""

MEAN_BOUND = 3e-4
"""How far float32 may take the average where the loss is curved, and without momentum where gradients are noisy."""

WALK_BOUND = 1e-7
"""How much farther a step may take it where gradients are noisy, for a rule that never forgets."""

HALF_BOUND = 0.05
"""How far state in bfloat16 may take it where the loss is curved."""


def offsets():
    """The agents' gradients at zero, [16, 64]: independent, of size one, with the sum zero to the bit."""
    half = torch.randn(AGENTS // 2, COLUMNS, generator=torch.Generator().manual_seed(0))
    return torch.cat([half, -half])[torch.randperm(AGENTS, generator=torch.Generator().manual_seed(1))]


@dataclass
class Run:
    """One rule's optimizer of one precision, on its own parameters."""

    rule: str
    hyperparameters: dict
    dtype: torch.dtype
    state_dtype: torch.dtype | None = None
    parameter: torch.Tensor = field(init=False)
    optimizer: gf.GossipOptimizer = field(init=False)

    def __post_init__(self):
        self.parameter = torch.nn.Parameter(torch.ones(AGENTS, COLUMNS, dtype=self.dtype))
        self.parameter.grad = torch.zeros_like(self.parameter)
        options = {"lr": LR, "topology": TOPOLOGY, "state_dtype": self.state_dtype, **self.hyperparameters}
        self.optimizer = gf.GossipOptimizer([self.parameter], self.rule, **options)

    def step(self, curvature, given):
        """Takes a step with the gradient ``curvature · z + given``."""
        torch.add(given, self.parameter.data, alpha=curvature, out=self.parameter.grad)
        self.optimizer.step()

    def average(self):
        return self.parameter.detach().double().mean(0)

    def excess(self):
        """How far the sums over agents that the rule keeps are from zero, over the number of agents."""
        sums, _ = analysis.conserved(self.rule, self.hyperparameters)
        state = self.optimizer.state[self.parameter]
        means = torch.stack([state[name].double().mean(0) for name in self.optimizer.rule.states] or [torch.zeros(1)])
        return float((torch.as_tensor(sums) @ means).abs().max()) if len(sums) else 0.0


def run(rule, hyperparameters, direction, state_dtype, steps):
    """Returns the error of the average after so many steps, and how far the sums that are kept are from zero."""
    exact = Run(rule, hyperparameters, torch.float64)
    rounded = Run(rule, hyperparameters, torch.float32, state_dtype)
    generator, curvature, noise = torch.Generator().manual_seed(2), CURVATURE[direction], NOISE[direction]
    given = start = offsets()
    wide = given.double()
    for _ in range(steps):
        if noise:
            given = start + noise * torch.randn(start.shape, generator=generator)
            wide = given.double()
        exact.step(curvature, wide)
        rounded.step(curvature, given)
    return float((exact.average() - rounded.average()).abs().max()), rounded.excess()


def bound(rule, hyperparameters, direction, state_dtype, steps):
    """How far rounding may take the average: on a constant flat direction by one rounding of each of its steps."""
    if state_dtype is not None:
        return HALF_BOUND
    if direction == "curved":
        return MEAN_BOUND
    gain = max(1.0, analysis.step_gain(rule, hyperparameters))
    if direction == "flat":
        return max(MEAN_BOUND, torch.finfo(torch.float32).eps * LR * steps * float(offsets().abs().max()) * gain)
    return MEAN_BOUND * gain + len(analysis.conserved(rule, hyperparameters)[0]) * WALK_BOUND * steps


def cases():
    """All cases of the table: rule, hyper-parameters, direction, and dtype of the state."""
    for rule, hyperparameters in CASES:
        for direction in CURVATURE:
            yield rule, hyperparameters, direction, None
        if len(analysis.conserved(rule, hyperparameters)[0]) == 0:
            yield rule, hyperparameters, "curved", torch.bfloat16


def soak(steps, say=print):
    """Runs all cases and says the result of each; returns how many are out of bounds."""
    broken = 0
    for rule, hyperparameters, direction, state_dtype in cases():
        start = time.monotonic()
        error, excess = run(rule, hyperparameters, direction, state_dtype, steps)
        limit = bound(rule, hyperparameters, direction, state_dtype, steps)
        is_broken = not error <= limit
        broken += is_broken
        name = " ".join([rule, *(f"{key}={value:g}" for key, value in hyperparameters.items())])
        state = "float32" if state_dtype is None else "bfloat16"
        line = f"{name:18} {state:8} {direction:10} average {error:.1e} <= {limit:.1e}  kept sums {excess:.1e}"
        say(f"{line}  {time.monotonic() - start:.1f} s{'  OUT OF BOUNDS' if is_broken else ''}")
    return broken


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="steps of each run, 100000 unless given")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    print(f"{steps} steps, {AGENTS} agents on {TOPOLOGY.name}, lr {LR}, float32 beside float64", flush=True)
    broken = soak(steps, lambda line: print(line, flush=True))
    print("all within bounds" if not broken else f"{broken} out of bounds")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
