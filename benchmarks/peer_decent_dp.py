"""Training steps per second beside decent-dp: one process per agent and gloo, against all agents in one process.

    python benchmarks/peer_decent_dp.py [--models mlp lenet5] [--topologies complete ring] [--rounds 9] [--json FILE]

decent-dp is no dependency: install it in an environment of its own, beside gut_fast[data]. Both sides train the same
model from the same start on the same batches, 32 samples per agent and step, with decentralized SGD as decent-dp does
it, where the gradient is taken at the parameters before they are mixed (Lian et al., NeurIPS 2017):

    x(k+1) = W(k) x(k) − η g(x(k))

Here that is a rule of four lines, `dpsgd` below. First all contenders' losses and parameters are compared with the
recurrence in float64, then all train in turns. decent-dp draws its batches before the clock starts, its processes have
one torch thread each and sleep in their pipes while others are timed; ours are whole steps of `gf.Simulator`. Processor
time per step stands beside: on a machine that others use, four processes get a larger share of it than one.
"""

import argparse
import contextlib
import copy
import datetime
import importlib.metadata
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed
from torch.nn.functional import cross_entropy, interpolate
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import gut_fast as gf
from gut_fast.kernels import machine
from gut_fast.simulation.batches import Batches
from gut_fast.simulation.engines import ENGINES

LR, BATCH_SIZE, SEED = 0.1, 32, 0
CHECKED_STEPS = 12
TOLERANCES = {torch.float64: 1e-9, torch.float32: 5e-2}
"""Of losses and parameters against the recurrence, in units of the largest loss and the largest change of a parameter.
LeNet-5 in float32 loses up to 5e-3 in these steps: a near tie in max pooling sends a gradient elsewhere."""

TIMEOUT = 60
"""Seconds without an answer after which decent-dp's processes are killed."""


@gf.update_rule()
def dpsgd(lr):
    """S = z;  z' = S − ηg + D: the parameters travel while the gradient is computed."""
    return gf.Coefficients(A=[[1, 0]], B=[[0, -lr]], C=[[1]], E=[[1]])


class Task:
    """A model and the digits, divided unevenly among the agents; images of 28×28 for LeNet-5."""

    def __init__(self, model, num_agents, dtype):
        data = gf.data.digits()
        inputs = data.train_inputs.to(dtype)
        if model == "lenet5":
            inputs = interpolate(inputs, size=(28, 28), mode="bilinear")
        # One test image: the simulator's evaluation after each run belongs to no training step.
        self.data = replace(data, train_inputs=inputs, test_inputs=inputs[:1], test_labels=data.train_labels[:1])
        self.parts = gf.data.partition.dirichlet(data.train_labels, num_agents, alpha=0.5, seed=SEED)
        torch.manual_seed(SEED)
        self.module = gf.models.build(model, self.data.input_shape, self.data.num_classes).to(dtype)

    def batches(self):
        """Every agent's batch at every step."""
        return Batches(self.data.train_inputs, self.data.train_labels, self.parts, BATCH_SIZE, SEED)


class Rank:
    """One agent of decent-dp; lives in a process of its own."""

    num_drawn = 512
    """Steps whose batches are drawn beforehand; then they come again."""

    def __init__(self, rank, num_agents, store):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(1)
        timeout = datetime.timedelta(seconds=TIMEOUT)
        distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=num_agents, timeout=timeout
        )
        self.rank, self.num_agents = rank, num_agents

    def prepare(self, model, topology, dtype):
        """A new training run; returns this agent's rows [CHECKED_STEPS, N] of the mixing matrices."""
        from decent_dp.ddp import DecentralizedDataParallel
        from loguru import logger

        logger.disable("decent_dp")
        task = Task(model, self.num_agents, dtype)
        self.inputs, self.labels = task.data.train_inputs, task.data.train_labels
        batches = task.batches()
        self.indices = [batches.indices(step)[self.rank].clone() for step in range(self.num_drawn)]
        self.model = DecentralizedDataParallel(task.module, self.make_optimizer, topology=topology)
        self.step = 0
        # Nothing is mixed at step 0, where all agents are equal; its edge 2 is never used: lazy start in its forward().
        edges = [0, 1, *range(3, CHECKED_STEPS + 1)]
        return [self.row(self.model._topo.get_edge(edge)) for edge in edges]

    @staticmethod
    def make_optimizer(named_parameters):
        """Decentralized SGD's local part, in torch's fastest form."""
        return torch.optim.SGD([parameter for _, parameter in named_parameters], LR, fused=True)

    def row(self, edge):
        """This agent's row of an edge's mixing matrix: it keeps `weight`, the others share the rest."""
        row = [0.0] * self.num_agents
        for rank in edge.ranks:
            row[rank] = edge.weight if rank == self.rank else (1 - edge.weight) / (len(edge.ranks) - 1)
        return row

    def train(self, steps):
        """Losses of these steps."""
        losses = []
        for _ in range(steps):
            batch = self.indices[self.step % self.num_drawn]
            loss = cross_entropy(self.model(self.inputs[batch]), self.labels[batch])
            loss.backward()
            losses.append(loss.detach())
            self.step += 1
        return torch.stack(losses).tolist()

    def cpu_seconds(self):
        """Processor time of this process so far."""
        return time.process_time()

    def parameters(self):
        """All parameters in one list."""
        return parameters_to_vector(self.model.parameters()).tolist()


def serve(rank, num_agents, store, connection):
    """A rank's process: does what comes through the pipe until that is closed."""
    agent = Rank(rank, num_agents, store)
    with contextlib.suppress(EOFError):
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(agent, method)(*arguments))
    distributed.destroy_process_group()


class DecentDP:
    """All of decent-dp's processes. Whatever happens to one of them ends in an error, never in a wait without end."""

    def __init__(self, num_agents):
        self.name = f"decent-dp, {num_agents} processes"
        self.folder = tempfile.TemporaryDirectory()
        self.processes, self.connections = [], []
        context = multiprocessing.get_context("spawn")
        for rank in range(num_agents):
            connection, other_end = context.Pipe()
            arguments = (rank, num_agents, str(Path(self.folder.name) / "store"), other_end)
            self.processes.append(context.Process(target=serve, args=arguments, daemon=True))
            self.connections.append(connection)
            self.processes[-1].start()
            other_end.close()

    def ask(self, method, *arguments):
        """The answers of all ranks to one call of a method of `Rank`."""
        for connection in self.connections:
            connection.send((method, arguments))
        deadline = time.monotonic() + TIMEOUT
        return [self._answer(rank, method, deadline) for rank in range(len(self.processes))]

    def _answer(self, rank, method, deadline):
        connection = self.connections[rank]
        sentinels = [process.sentinel for process in self.processes]
        ready = multiprocessing.connection.wait([connection, *sentinels], max(0, deadline - time.monotonic()))
        if connection in ready:
            try:
                return connection.recv()
            except EOFError:
                pass  # it has ended
        for process in self.processes:
            process.join(0.2)
        codes = {rank: process.exitcode for rank, process in enumerate(self.processes)}
        dead = [f"rank {rank} ended with code {code}" for rank, code in codes.items() if code is not None]
        reason = ", ".join(dead) or f"no answer within {TIMEOUT} s"
        raise SystemExit(f"decent-dp, {method}: {reason}; all its processes are stopped")

    def train(self, steps):
        """Mean loss over agents of each step."""
        return torch.tensor(self.ask("train", steps), dtype=torch.float64).mean(0)

    def cpu_seconds(self):
        """Processor time of all processes so far."""
        return sum(self.ask("cpu_seconds"))

    def parameters(self):
        """All agents' parameters [N, D]."""
        return torch.tensor(self.ask("parameters"), dtype=torch.float64)

    def close(self):
        """Lets the processes end, and ends those that do not."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(2)
            process.kill()
        self.folder.cleanup()


class Ours:
    """All agents in one process."""

    def __init__(self, task, W, engine, threads):
        steps = [gf.topology.from_matrix(matrix, connected=False, name=f"W({k})") for k, matrix in enumerate(W)]
        topology = gf.topology.sequence(steps)
        torch.set_num_threads(threads)
        self.threads = threads
        self.simulator = gf.Simulator(
            task.module,
            topology,
            optimizer=lambda parameters: gf.GossipOptimizer(parameters, dpsgd, lr=LR, topology=topology),
            data=task.data,
            parts=task.parts,
            batch_size=BATCH_SIZE,
            engine=engine,
            seed=SEED,
        )
        self.engine = engine

    @property
    def name(self):
        """Engine and threads; what "auto" has chosen."""
        chosen = "" if self.simulator.engine == self.engine else f" ({self.simulator.engine})"
        return f"gut_fast, {self.engine}{chosen}, {self.threads} thread{'s' * (self.threads != 1)}"

    def train(self, steps, eval_every=None):
        """Mean loss over agents of each evaluation's steps."""
        torch.set_num_threads(self.threads)
        before = len(self.simulator.history)
        target = self.simulator.step + steps
        self.simulator.run(target, milestones=(), eval_every=eval_every, progress=False)
        losses = [row["train_loss"] for row in self.simulator.history[before:] if row["step"] > 0]
        return torch.tensor(losses, dtype=torch.float64)

    def cpu_seconds(self):
        """Processor time of this process, all threads, so far."""
        return time.process_time()

    def parameters(self):
        """All agents' parameters [N, D]."""
        stacked = self.simulator.stacked
        agents = [stacked.agent(i) for i in range(stacked.num_agents)]
        return torch.stack([parameters_to_vector(agent.parameters()) for agent in agents]).double()


def recurrence(task, W):
    """x(k+1) = W(k) x(k) − η g(x(k)) for all W: mean loss of each step, parameters [N, D] at the start and the end."""
    module, batches = copy.deepcopy(task.module), task.batches()
    start = parameters_to_vector(module.parameters()).detach().expand(len(task.parts), -1)
    x, losses = start.clone(), []
    for step, matrix in enumerate(W):
        inputs, labels = batches(step)
        gradients = torch.empty_like(x)
        for i, agent in enumerate(x):
            vector_to_parameters(agent, module.parameters())
            loss = cross_entropy(module(inputs[i]), labels[i])
            gradients[i] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])
            losses.append(loss.item())
        x = matrix @ x - LR * gradients
    return torch.tensor(losses, dtype=torch.float64).view(len(W), -1).mean(1), start, x


def compare(contender, losses, truth, tolerance):
    """Error of a contender's checked steps, in the units of `TOLERANCES`; raises if it is larger."""
    true_losses, start, end = truth
    loss_error = ((losses - true_losses).abs().max() / true_losses.max()).item()
    error = ((contender.parameters() - end).abs().max() / (end - start).abs().max()).item()
    if not max(loss_error, error) < tolerance:
        raise SystemExit(f"{contender.name}: error of loss {loss_error:.1e}, of parameters {error:.1e}; no timing")
    return {"loss": loss_error, "parameters": error}


def run_case(peer, model, topology, options):
    """Compares in float64, then in float32, then times what has been compared last."""
    errors, truth = {}, None
    for dtype, tolerance in TOLERANCES.items():
        task = Task(model, options.agents, dtype)
        W = torch.tensor(peer.ask("prepare", model, topology, dtype), dtype=torch.float64).transpose(0, 1)
        truth = truth or recurrence(task, W)
        ours = [Ours(task, W, engine, threads) for engine, threads in our_settings(options)]
        found = {peer.name: compare(peer, peer.train(CHECKED_STEPS), truth, tolerance)}
        for contender in ours:
            found[contender.name] = compare(contender, contender.train(CHECKED_STEPS, eval_every=1), truth, tolerance)
        errors[str(dtype).removeprefix("torch.")] = found
    speeds = measure((peer, *ours), options)
    losses = truth[0][[0, -1]].tolist()
    return {"model": model, "topology": topology, "losses": losses, "errors": errors, "speeds": speeds}


def our_settings(options):
    """Pairs of engine and threads; workers need two threads to differ from the loop."""
    engines = [engine for engine in ("loop", "auto", "workers") if engine in ENGINES]
    return [(e, threads) for e in engines for threads in options.threads if e != "workers" or threads > 1]


def measure(contenders, options):
    """Steps per second and processor seconds per step in every round, by contender."""
    found = {contender: {"steps_per_second": [], "cpu_seconds_per_step": []} for contender in contenders}
    steps = dict.fromkeys(contenders, 2 * CHECKED_STEPS)
    for number in range(options.rounds + 1):
        for contender in contenders:
            cpu, start = contender.cpu_seconds(), time.perf_counter()
            contender.train(steps[contender])
            seconds = time.perf_counter() - start
            if number:  # in the first round "auto" chooses, and we find out how many steps to take
                found[contender]["steps_per_second"].append(steps[contender] / seconds)
                cpu_seconds = contender.cpu_seconds() - cpu
                found[contender]["cpu_seconds_per_step"].append(cpu_seconds / steps[contender])
            steps[contender] = max(1, round(steps[contender] * options.seconds / seconds))
    return {contender.name: values for contender, values in found.items()}


def print_case(case, options):
    worst = {dtype: max(max(error.values()) for error in errors.values()) for dtype, errors in case["errors"].items()}
    first, last = case["losses"]
    print(f"\n{case['model']}, {case['topology']}: loss {first:.2f} → {last:.2f} in {CHECKED_STEPS} steps", end=", ")
    print("worst error against the recurrence", ", ".join(f"{error:.0e} in {dtype}" for dtype, error in worst.items()))
    print(f"  {'':36}{'steps/s':>8}{'quartiles':>13}{'samples/s':>11}{'× decent-dp':>13}{'CPU ms/step':>13}")
    peer = statistics.median(next(iter(case["speeds"].values()))["steps_per_second"])
    for name, speeds in case["speeds"].items():
        low, median, high = statistics.quantiles(speeds["steps_per_second"], n=4)
        cpu = 1e3 * statistics.median(speeds["cpu_seconds_per_step"])
        samples = median * options.agents * BATCH_SIZE
        noisy = "  noisy" if high - low > 0.2 * median else ""
        quartiles = f"{low:.0f} … {high:.0f}"
        print(f"  {name:36}{median:8.0f}{quartiles:>13}{samples:11,.0f}{median / peer:13.2f}{cpu:13.1f}{noisy}")


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=("mlp", "lenet5"), default=["mlp", "lenet5"])
    parser.add_argument("--topologies", nargs="+", choices=("complete", "ring"), default=["complete", "ring"])
    parser.add_argument("--agents", type=int, default=4, help="even and at least 2: decent-dp's ring has no others")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="torch threads of ours")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.2, help="of training per contender and round")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.agents < 2 or options.agents % 2:
        parser.error(f"--agents must be even and at least 2, got {options.agents}")
    if options.rounds < 2 or options.seconds <= 0 or min(options.threads) < 1:
        parser.error("--rounds must be at least 2, --seconds positive and --threads at least 1")
    return options


def about():
    """Machine, versions and load."""
    versions = {**machine.versions(), "decent-dp": importlib.metadata.version("decent-dp")}
    return {"machine": machine.machine_line(), "load": os.getloadavg()[0], "versions": versions}


def main():
    options = parse_options()
    missing = [name for name in ("decent_dp", "sklearn") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"not installed: {', '.join(missing)}\n"
            "in an environment of its own, beside gut_fast: pip install decent-dp scikit-learn"
        )
    setting, peer, cases = about(), DecentDP(options.agents), []
    print(f"{options.agents} agents, {BATCH_SIZE} samples each per step, float32; medians of {options.rounds} rounds")
    print(f"{setting['machine']}, load {setting['load']:.1f}")
    print(" · ".join(f"{name} {version}" for name, version in setting["versions"].items()))
    try:
        for model in options.models:
            for topology in options.topologies:
                cases.append(run_case(peer, model, topology, options))
                print_case(cases[-1], options)
    finally:
        peer.close()
    if options.json:
        Path(options.json).write_text(json.dumps({"options": vars(options), **setting, "cases": cases}, indent=1))


if __name__ == "__main__":
    main()
