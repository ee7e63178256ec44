"""Ranks that die, leave, dawdle, come back and end in any order: seeded schedules, with every setting of the ranks."""

import gc
import itertools
import os
import random
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gut_fast as gf
import ranks
from gut_fast.distributed import Group, PeerError, rejoin

SIZE, STEPS, LAST_EVENT = 5, 120, 40
PHASES = ("before backward", "in backward", "before the step", "messages sent", "while mixing", "while regrouping")
RULES = ("gut", "gradient_tracking", "dsgd")


def schedule_of(seed, overlap, shared_memory, policy):
    """Draws who goes, how and in which phase of which step, who sleeps where, and how all end."""
    draw = random.Random(f"{seed} {overlap} {shared_memory} {policy}")
    goers = draw.sample(range(1, SIZE), draw.choice((0, 1, 1, 2)))
    goes = {rank: (draw.randrange(LAST_EVENT), draw.choice(PHASES), draw.choice(("dies", "leaves"))) for rank in goers}
    comes_back = policy == "continue" and len(goers) == 1 and goes[goers[0]][2] == "leaves" and draw.random() < 0.7
    return {
        "options": {"overlap": overlap, "shared_memory": shared_memory, "on_peer_failure": policy},
        "rule": draw.choice(RULES),
        "goes": goes,
        "comes back": goers[0] if comes_back else None,
        "sleeps": {(draw.randrange(SIZE), draw.randrange(STEPS)): 0.05 * draw.random() for _ in range(30)},
        "is own store": comes_back or draw.random() < 0.5,
        "is connected": len(goers) < 2 or abs(goers[0] - goers[1]) == 1,
        "ends together": draw.random() < 0.5,
    }


class GoneError(Exception):
    """A rank leaves; its process stays."""


class Life:
    """A rank that trains on a quadratic, and goes in the phase of the step that the schedule says."""

    def __init__(self, rank, schedule):
        self.rank, self.schedule, self.in_backward = rank, schedule, False
        self.step_to_go, self.phase, self.how = schedule["goes"].get(rank, (STEPS, None, None))

    def join(self, group):
        """Makes the optimizer, which says in which phase it is."""
        self.parameters = [nn.Parameter(torch.zeros(300)) for _ in range(3)]
        where = {"topology": gf.topology.ring(SIZE), "process_group": group, "timeout": 20.0, "bucket_bytes": 1200}
        where |= self.schedule["options"]
        self.optimizer = gf.GossipOptimizer(self.parameters, self.schedule["rule"], lr=0.05, **where)
        exchange = self.optimizer._exchange
        begin, receive, regroup = exchange.begin, exchange._send_and_receive, exchange._regroup
        exchange.begin = lambda *a: (begin(*a), self.at("in backward" if self.in_backward else "messages sent"))
        exchange._send_and_receive = lambda *a: (receive(*a), self.at("while mixing"))
        exchange._regroup = lambda *a: (self.at("while regrouping"), regroup(*a))

    def at(self, phase):
        """Goes if this is the phase, or the step in which the phase should have come is over."""
        step = self.optimizer.num_steps
        if step > self.step_to_go or (step == self.step_to_go and phase == self.phase):
            self.step_to_go = STEPS
            if self.how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise GoneError

    def train(self):
        """Trains until all steps are taken, and who comes back is there."""
        back = self.schedule["comes back"]
        while self.optimizer.num_steps < STEPS or (back is not None and back not in self.optimizer.group.members):
            step = self.optimizer.num_steps
            time.sleep(self.schedule["sleeps"].get((self.rank, step), 0.002))
            self.at("before backward")
            self.optimizer.zero_grad()
            self.in_backward = True
            sum(0.5 * (parameter - self.rank).square().sum() for parameter in self.parameters).backward()
            self.in_backward = False
            self.at("before the step")
            self.optimizer.step()

    def leave(self):
        self.optimizer.group.close()
        del self.optimizer
        gc.collect()


def live(rank, size, schedule):
    """Lives as the schedule says; returns who is left, the steps taken, the mean over ranks, and the parameters."""
    life = Life(rank, schedule)
    life.join(Group(ranks.store, rank, range(size), timeout=20.0) if schedule["is own store"] else dist.group.WORLD)
    try:
        life.train()
    except GoneError as error:
        error.__traceback__ = None
        life.leave()
        if schedule["comes back"] != rank:
            time.sleep(0.3)
            return "left"
        life.join(rejoin(ranks.store, rank, size, timeout=20.0))
        life.train()
    group, mean = life.optimizer.group, None
    if schedule["ends together"] and schedule["is connected"]:
        mean = torch.cat(life.parameters).detach().clone()
        group.all_reduce(mean)
        mean /= group.size
    return list(group.members), life.optimizer.num_steps, mean, torch.cat(life.parameters).detach()


def check(schedule, outcomes):
    """Checks what became of each rank."""
    gone = {rank for rank in schedule["goes"] if rank != schedule["comes back"]}
    left = [rank for rank in range(SIZE) if rank not in gone]
    is_raised = schedule["options"]["on_peer_failure"] == "raise"
    for rank, outcome in enumerate(outcomes):
        if gone and is_raised and (rank not in gone or isinstance(outcome, Exception)):
            assert isinstance(outcome, PeerError), (rank, outcome)  # a rank's turn to go may come after the first one's
        elif rank in gone:
            assert outcome == (None if schedule["goes"][rank][2] == "dies" else "left"), (rank, outcome)
        else:
            assert isinstance(outcome, tuple), (rank, outcome)
            members, steps, mean, parameters = outcome
            assert members == left or not schedule["is connected"]
            assert steps == STEPS or (steps > STEPS and schedule["comes back"] is not None)
            assert ((parameters > -1.0) & (parameters < SIZE)).all()
            if mean is not None and schedule["comes back"] is None:
                assert (mean - sum(left) / len(left)).abs().max() < 0.1


SETTINGS = list(itertools.product((False, True), (False, True), ("continue", "raise")))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
@pytest.mark.parametrize(("overlap", "shared_memory", "policy"), SETTINGS)
def test_every_order_of_going_regrouping_and_ending_leaves_who_is_left_right(seed, overlap, shared_memory, policy):
    schedule = schedule_of(seed, overlap, shared_memory, policy)
    with ranks.Crew(SIZE, live, schedule) as crew:
        check(schedule, crew.outcomes())
