"""A problem and the op's run on it in one object, which the tests can stop, change and look into."""

import torch

from gut_fast.rules import get_rule
from gut_fast.verify.lockstep import OpRun, Precision, Problem, excess_error, seeded

__all__ = ["Lockstep", "seeded"]


class Lockstep(Problem):
    """N agents with segments of `columns` numbers each: see `gut_fast.verify.lockstep`."""

    def __init__(
        self,
        rule,
        topology,
        columns,
        dtype=torch.float32,
        backend="cpu",
        hyperparameters=None,
        lr=0.05,
        grad_scale=None,
        state_dtype=None,
    ):
        super().__init__(get_rule(rule), topology, columns, hyperparameters or {}, lr, grad_scale=grad_scale)
        self.precision = Precision(dtype, state_dtype or dtype)
        self.op = OpRun(self, self.precision, backend)
        self.flat, self.parameters, self.state = self.op.flat, self.op.parameters, self.op.state
        self.op_step, self.rows, self.guards_intact = self.op.step, self.op.rows, self.op.guards_intact

    def run(self, num_steps):
        self.num_steps = num_steps
        self.op.run(num_steps)
        return self

    def excess_error(self):
        exact, plain = self.run_reference(self.num_steps), self.run_reference(self.num_steps, self.precision)
        return excess_error(self.rows(), exact, plain, self.lr)
