"""Draws the small pictures of the concepts, of choosing κ and of our results: ``python docs/pictures.py``.

Agents and way are sketches, and results is of finished runs. The others show what the library computes: agents whose
losses are ½‖z − cᵢ‖², with minima cᵢ that differ.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gut_fast as gf
from gut_fast.study import plots
from gut_fast.study.graph_pictures import plot_graph
from gut_fast.study.looks import LOOKS
from gut_fast.study.report.frontier import bytes_sent
from gut_fast.study.report.study import END, gather
from gut_fast.study.results import read_results

FOLDER = Path(__file__).with_name("pictures")
WIDTH, DPI = 5.2, 160
"""A picture is as wide as a phone at some 80 pixels an inch, so that its letters are readable there."""

KINDS = ("#4477AA", "#EE6677", "#228833", "#CCBB44")
"""The colours of four kinds of samples; no method has them."""


def minima(num_agents: int) -> torch.Tensor:
    """The minimum of each agent's own loss, float64 [N, 2]: on an ellipse, so that neighbours are alike."""
    angles = 2 * math.pi * torch.arange(num_agents, dtype=torch.float64) / num_agents
    return torch.stack([1.6 * angles.cos(), angles.sin()], 1)


def paths(
    make: Callable[..., torch.optim.Optimizer], targets: torch.Tensor, steps: int, **options: Any
) -> torch.Tensor:
    """The parameters of all agents at each step, float64 [steps + 1, N, 2], from a common start."""
    z = torch.nn.Parameter(torch.full_like(targets, 0.0) + torch.tensor([2.2, 1.5]).double())
    optimizer = make([z], **options)
    found = [z.detach().clone()]
    for _ in range(steps):
        z.grad = z.detach() - targets
        optimizer.step()
        found.append(z.detach().clone())
    return torch.stack(found)


def draw_agents(figure: Figure) -> None:
    """Eight agents on a ring; the slices say which kinds of samples each holds."""
    axes = figure.subplots()
    plot_graph(axes, gf.topology.ring(8), numbered=False)
    for agent in range(8):
        angle = 2 * math.pi * agent / 8
        share = 0.9 if agent % 2 else 0.65
        pie: dict[str, Any] = {"radius": 0.24, "center": (math.sin(angle), math.cos(angle)), "counterclock": False}
        colors = (KINDS[agent // 2], KINDS[(agent // 2 + 1) % 4])
        axes.pie([share, 1 - share], colors=colors, wedgeprops={"edgecolor": "white", "zorder": 5}, **pie)
        axes.text(1.52 * math.sin(angle), 1.42 * math.cos(angle), f"agent {agent}", ha="center", va="center")
    axes.set(xlim=(-2.1, 2.1), ylim=(-1.55, 1.55), title="")


def draw_mixing(figure: Figure) -> None:
    """The matrix W of a ring of 8, and how fast disagreement dies out on three topologies of 16."""
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    W = gf.topology.ring(8).matrix()
    left.imshow(W, cmap="Blues", vmin=0, vmax=0.6)
    left.grid(visible=False)
    for i, j in W.nonzero().tolist():
        left.text(j, i, "⅓", ha="center", va="center")
    left.set(title="W of ring(8)", xlabel="agent j, heard", ylabel="agent i", xticks=range(8), yticks=range(8))
    for spec, line in (("ring", "-"), ("torus", "--"), ("exponential", ":")):
        topology = gf.topology.torus(4, 4) if spec == "torus" else getattr(gf.topology, spec)(16)
        slowest = max(abs(topology.lambda_2), abs(topology.lambda_min))
        right.plot(range(41), [slowest**step for step in range(41)], line, color="#333333", label=spec)
    right.set(title="Disagreement left", xlabel="step", yscale="log", ylim=(1e-3, 1.2), xlim=(0, 40))
    right.legend()


def draw_drift(figure: Figure) -> None:
    """One step of DSGD for three agents of a ring: local steps lead apart, the drift D leads back."""
    axes = figure.subplots()
    topology, lr = gf.topology.ring(3), 0.5
    z = torch.tensor([[0.0, 0.1], [0.1, -0.1], [-0.1, 0.0]], dtype=torch.float64)
    targets = torch.tensor([[-1.6, 1.0], [1.8, 0.9], [0.2, -1.3]], dtype=torch.float64)
    S = z - lr * (z - targets)
    mixed = topology.matrix() @ S
    arrow: dict[str, Any] = {"length_includes_head": True, "head_width": 0.055, "linewidth": 1.3}
    for start, message, end, color in zip(z, S, mixed, KINDS, strict=False):
        axes.arrow(*start, *(message - start), color=color, **arrow)
        axes.arrow(*message, *(0.93 * (end - message)), color="#666666", linestyle=(0, (2, 1)), **arrow)
        axes.plot(*message, "o", color=color)
    axes.plot(*mixed[0], "o", color="#000000", markersize=9)
    for agent, place in enumerate(S):
        side = ("right", "left", "left")[agent]
        axes.annotate(f"S of agent {agent}", place.tolist(), xytext=(-7 if side == "right" else 7, 3),
                      textcoords="offset points", ha=side)  # fmt: skip
    axes.annotate("z′ = S + D", mixed[0].tolist(), xytext=(14, -16), textcoords="offset points")
    axes.set(xlim=(-1.6, 1.6), ylim=(-0.8, 0.75), xticks=[], yticks=[])
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)


def draw_rest(figure: Figure) -> None:
    """Where eight agents with different minima come to rest: DSGD beside GUT, on one scale."""
    targets, ring = minima(8), gf.topology.ring(8)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, (name, make, options) in zip(panels, (("DSGD", gf.DSGD, {}), ("GUT", gf.GUT, {"mu": 0.9})), strict=True):
        walked = paths(make, targets, 300, lr=0.3, topology=ring, **options)
        look = LOOKS[name]
        axes.plot(*targets.T, "x", color="#888888", label="own minimum")
        axes.plot(*walked[:, 0].T, color=look.color, linewidth=0.8)
        axes.plot(*walked[-1].T, look.marker, color=look.color, linestyle="", markersize=5, label="agent at rest")
        axes.plot(0, 0, "+", color="#CC3311", markersize=13, markeredgewidth=2, label="common minimum")
        _plain(axes, name)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, columnspacing=1)


def _plain(axes: Axes, title: str) -> None:
    axes.set(title=title, xlim=(-2, 2.4), ylim=(-1.3, 1.7))
    axes.set_aspect("equal")
    axes.tick_params(labelleft=False, labelbottom=False, length=0)


def draw_tracking(figure: Figure) -> None:
    """The disagreement of the same agents over the steps, for three values of μ."""
    axes, targets, ring = figure.subplots(), minima(8), gf.topology.ring(8)
    cases = (("DSGD", "μ = 0: DSGD", gf.DSGD, {}), ("GUT", "μ = 0.9: GUT", gf.GUT, {"mu": 0.9}),
             ("D2", "μ = 1: D²", gf.D2, {}))  # fmt: skip
    for name, label, make, options in cases:
        walked = paths(make, targets, 160, lr=0.3, topology=ring, **options)
        apart = (walked - walked.mean(1, keepdim=True)).square().sum(2).mean(1)[1:]
        look = LOOKS[name]
        axes.plot(range(1, 161), apart, look.line, marker=look.marker, markevery=20, color=look.color, label=label)
    axes.set(xlabel="step", ylabel="consensus error", yscale="log", ylim=(1e-10, 10), xlim=(0, 160))
    axes.legend(loc="center right")


def draw_kappa(figure: Figure) -> None:
    """GUT on a graph that varies, with κ = 1, as published, and a smaller κ: means over the period of four steps."""
    axes, targets, topology = figure.subplots(), minima(16), gf.topology.one_peer_exponential(16)
    cases = (("DSGD", "DSGD", gf.DSGD, {}), ("GUT", "GUT, κ = 1", gf.GUT, {"mu": 0.9}),
             ("κ-GUT", "GUT, κ = 0.1, μ = 1", gf.GUT, {"mu": 1.0, "kappa": 0.1}))  # fmt: skip
    for name, label, make, options in cases:
        walked = paths(make, targets, 400, lr=0.02, topology=topology, **options)
        apart = (walked - walked.mean(1, keepdim=True)).square().sum(2).mean(1)[1:].unflatten(0, (-1, 4)).mean(1)
        look = LOOKS[name]
        axes.plot(range(4, 401, 4), apart, look.line, marker=look.marker, markevery=12, color=look.color, label=label)
    axes.set(xlabel="step", ylabel="consensus error", yscale="log", ylim=(1e-12, 1e12), xlim=(0, 400))
    axes.legend(loc="upper right")


WAY = (
    ("optim/optimizer.py", "step", "coefficients and state brought up to date", "#EAF2FB"),
    ("kernels/ops.py", "prepare", "all groups checked before one changes", "#EAF2FB"),
    ("kernels/backends/cpu.py", "direct_step", "handed to C++", "#EAF2FB"),
    ("csrc/bindings/tensor_step.h", "TensorStep", "every tensor read once, through DLPack", "#FDF0E6"),
    ("csrc/cpu/kernel.cpp", "gossip_step", "tier, loop, plan; threads claim columns", "#FDF0E6"),
    ("a block of columns, in the L1 cache", "", "messages S of all agents, then D and outputs", "#FBE3D3"),
)
"""The files that a step passes, with the function in each and what it does."""


def draw_way(figure: Figure) -> None:
    """The way of a step: a box for each file, Python in blue, C++ in orange."""
    axes = figure.subplots()
    for line, (file, function, does, color) in enumerate(WAY):
        box: dict[str, Any] = {"boxstyle": "round,pad=0.45", "facecolor": color, "edgecolor": "#777777"}
        name = f"{file}: {function}" if function else file
        axes.text(0.5, -line, f"{name}\n{does}", ha="center", va="center", fontsize=9.5, linespacing=1.5, bbox=box)
        if line:
            arrow = {"arrowstyle": "-|>", "color": "#555555"}
            axes.annotate("", (0.5, 0.36 - line), xytext=(0.5, 0.64 - line), arrowprops=arrow)
    axes.set(xlim=(0, 1), ylim=(0.5 - len(WAY), 0.5))
    axes.set_axis_off()


FRONTIER = ("exact averages β", "exact averages", "QGT", "GASLoC", "GUT", "DSGD")
ORDER = ("DSGD", "GUT", "D2", "QG-DSGDm", "QG-GUTm", "QG-DSGDm β+μ", "GUTm", "QGT")


def draw_results(figure: Figure) -> None:
    """Accuracies of the methods on Fashion-MNIST where data differ most, with and without decay, on one scale."""
    study = gather([read_results(Path(__file__).parents[1] / "results/fashion-mnist-14-ring16")], order=ORDER)
    cases = (("Averaged model", "test_accuracy", study.points[0]),
             ("Mean agent", "mean_agent_accuracy", study.points[1]))  # fmt: skip
    for axes, (title, metric, point) in zip(figure.subplots(1, 2, sharex=True, sharey=True), cases, strict=True):
        for line, method in enumerate(study.methods):
            found = study.numbers(method, metric, point, END)
            look = LOOKS[method]
            axes.errorbar(found.mean(), line, xerr=found.std(), marker=look.marker, color=look.color, markersize=6)
        axes.set(title=title, xlabel="test accuracy in %")
        axes.set_yticks(range(len(study.methods)), [study.name(method) for method in study.methods])
        axes.set_ylim(len(study.methods) - 0.4, -0.6)


def draw_frontier(figure: Figure) -> None:
    """Accuracy against bytes on the ring where data differ most, of some methods."""
    axes = figure.subplots()
    folder = Path(__file__).parents[1] / "results/frontier"
    study = gather([read_results(folder / name) for name in ("ring", "ring-int4", "exact-momentum")])
    point = study.points[0]
    for name in FRONTIER:
        look = LOOKS[name]
        for end, fill in ((", int4", "none"), ("", "full")):
            methods = [f"{name}, H = {H}{end}" for H in (16, 4, 1) if f"{name}, H = {H}{end}" in study.methods]
            sent = [bytes_sent(study, method, point) / 1e6 for method in methods]
            found = [study.numbers(method, "test_accuracy", point, END) for method in methods]
            style: dict[str, Any] = {"color": look.color, "marker": look.marker, "fillstyle": fill, "capsize": 2}
            means, spreads = ([getattr(each, what)() for each in found] for what in ("mean", "std"))
            label = name if fill == "full" else None
            axes.errorbar(sent, means, yerr=spreads, linestyle=look.line, linewidth=1.3, label=label, **style)
    axes.set(xscale="log", xlabel="MB sent by each agent, H = 16, 4, 1; hollow: in 4 bits", ylabel="test accuracy in %")
    axes.legend(loc="lower right", fontsize=9)


PICTURES = {
    "frontier": (draw_frontier, 3.9),
    "agents": (draw_agents, 3.8),
    "mixing": (draw_mixing, 2.8),
    "drift": (draw_drift, 2.6),
    "rest": (draw_rest, 2.7),
    "tracking": (draw_tracking, 2.9),
    "kappa": (draw_kappa, 2.9),
    "way": (draw_way, 5.2),
    "results": (draw_results, 3.6),
}

if __name__ == "__main__":
    for name, (draw, height) in PICTURES.items():
        with plots.new_figure(FOLDER / f"{name}.png", (WIDTH, height), DPI) as figure:
            draw(figure)
        print(f"wrote {FOLDER / name}.png")
