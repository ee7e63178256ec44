"""Who takes part: the list of all contenders, and the field of those that can."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from gut_fast.benchmark.contenders import Ceiling, Contender, GutFast, Kernel, MomentumSGD, Unavailable, Workload
from gut_fast.benchmark.formulations import Compiled, Eager
from gut_fast.benchmark.gpu_contenders import Captured, LargeCopy, SmallCopy, copy_length, in_turns, num_sets
from gut_fast.benchmark.others import AuthorsSequence, Jax
from gut_fast.kernels import ops
from gut_fast.kernels.backends import AUTOMATIC, BACKENDS

__all__ = ["FAMILIES", "Field", "enter"]

FAMILIES = {
    "ceiling": "the same streams in a plain compiled loop, no mixing; on a GPU a large copy, scaled to as many bytes",
    "copy": "on a GPU, copies of the step's bytes",
    "gut_fast": "optimizer.step() of this library",
    "backend": "the same with another backend of the library",
    "kernel": "its op, called directly",
    "graph": "optimizer.step() of this library in a CUDA graph",
    "sgd": "torch.optim.SGD(momentum=0.9, fused=True) on the same tensors: no gossip",
    "compile": "torch.compile",
    "eager": "PyTorch, eager",
    "scipy": "eager with scipy's sparse product",
    "jax": "jax.jit, on threads of its own",
    "authors": "the published algorithm, agent by agent and tensor by tensor",
}
"""Families of contenders and what they are."""

OPTIONS = {"tiled": "tiles", "by_tensor": "by tensor", "in_place": "z in place"}
"""Options of formulations, and what their names say of them."""

ESSENTIAL = ("gut_fast", "backend", "kernel")
"""Families that are not left out if they cannot be made."""

MODES = ("max-autotune-no-cudagraphs", "reduce-overhead")
"""Of `torch.compile`, tried on a GPU beside the default."""

COMPILED: Sequence[tuple[str, Sequence[str]]] = (
    *((mixing, options) for mixing in ("rolls", "index", "mean") for options in ((), ("tiled",))),
    ("matmul", ()),
    ("rolls", ("in_place",)),
)
EAGER: Sequence[tuple[str, Sequence[str]]] = (
    *((mixing, options) for mixing in ("rolls", "index", "matmul", "mean") for options in ((), ("tiled",))),
    *((mixing, ("by_tensor",)) for mixing in ("rolls", "index", "matmul", "mean")),
    ("sparse", ()),
)
"""Ways to mix, each with options."""


@dataclass(frozen=True)
class _Candidate:
    """A contender that may or may not be able to take part; `buffers`: how many matrices [N, D] it adds, roughly."""

    name: str
    family: str
    buffers: int
    make: Callable[[], Contender]


@dataclass
class Field:
    """Those who take part, by name, and why others do not."""

    contenders: dict[str, Contender]
    absent: dict[str, str]


def enter(workload: Workload, families: Collection[str]) -> Field:
    """All contenders of these families that can make the workload's steps.

    The library itself is always among them. A contender whose buffers would take more than a share of the device's
    memory, with those before it, stays away. On a GPU those on the library's buffers have several sets of them.

    Raises:
        ValueError: an unknown family.
    """
    if unknown := sorted(set(families) - FAMILIES.keys()):
        raise ValueError(f"unknown peers {', '.join(unknown)}; known are {', '.join(FAMILIES)}")
    sets = [workload, *(Workload(workload.case, workload.device) for _ in range(num_sets(workload) - 1))]
    ours = [GutFast(each) for each in sets]
    field = Field({}, {})
    size = workload.values.numel() * workload.values.element_size()
    used = (2 + len(workload.rule.states)) * len(sets)
    room = workload.device.room()
    for candidate in _candidates(ours):
        if candidate.family not in {"gut_fast", *families}:
            continue
        needed = (used + candidate.buffers) * size
        if needed > room:
            field.absent[candidate.name] = f"all together would need {needed / 1e9:.1f} GB of memory"
            continue
        try:
            field.contenders[candidate.name] = candidate.make()
        except Unavailable as reason:
            field.absent[candidate.name] = str(reason)
        except RuntimeError as error:  # such as fused SGD where torch has it not for such tensors
            if candidate.family in ESSENTIAL:
                raise
            field.absent[candidate.name] = str(error)
        else:
            used += candidate.buffers
    return field


def _candidates(ours: Sequence[GutFast]) -> Iterator[_Candidate]:
    """In the order in which memory is given out; `ours` is our step on each set of buffers."""
    workload = ours[0].workload
    yield from _ceilings(ours[0])
    yield from _on_our_buffers(ours)
    yield from _formulations(workload)
    rows, scratch = 1 + len(workload.rule.states), 2 * workload.rule.num_messages
    yield _Candidate("scipy, sparse", "scipy", rows + scratch, partial(Eager, workload, "scipy"))
    for mixing in ("rolls", "matmul"):
        yield _Candidate(f"jax, {mixing}", "jax", rows + 1, partial(Jax, workload, mixing))
    # Every neighbour's x now and before, and x, x before, m and δ.
    copies = 5 + 2 * (len(workload.topology.csr(0).neighbor) // workload.num_agents)
    yield _Candidate("authors' sequence", "authors", copies, lambda: AuthorsSequence(workload))


def _ceilings(ours: GutFast) -> Iterator[_Candidate]:
    if not ours.workload.device.is_gpu:
        yield _Candidate("ceiling", "ceiling", 0, lambda: Ceiling(ours))
        return
    large = lru_cache(partial(LargeCopy, ours.workload))
    buffers = 2 * copy_length(ours.workload) // ours.workload.values.nbytes
    yield _Candidate("ceiling", "ceiling", buffers, large)
    yield _Candidate("copy", "copy", 0, lambda: SmallCopy(large()))


def _on_our_buffers(ours: Sequence[GutFast]) -> Iterator[_Candidate]:
    workloads = [each.workload for each in ours]
    states = len(workloads[0].rule.states)

    def candidate(name: str, family: str, buffers: int, make: Callable[[int], Contender]) -> _Candidate:
        """`make` makes the one on the set of that number."""
        sets = range(len(ours))
        return _Candidate(name, family, buffers * len(sets), lambda: in_turns([make(each) for each in sets]))

    def with_backend(name: str, each: int) -> Contender:
        return GutFast(workloads[each], backend=name)

    yield candidate("gut_fast", "gut_fast", 0, lambda each: ours[each])
    yield candidate("kernel", "kernel", 0, lambda each: Kernel(ours[each]))
    for name in _other_backends(workloads[0]):
        yield candidate(f"gut_fast, {name}", "backend", states, partial(with_backend, name))
    if workloads[0].device.is_gpu:
        yield candidate("gut_fast, captured", "graph", states, lambda each: Captured(workloads[each]))
    yield candidate("momentum SGD, fused", "sgd", 1, lambda each: MomentumSGD(workloads[each]))


def _other_backends(workload: Workload) -> list[str]:
    """Those that could make the steps instead of the chosen one; plain PyTorch is among the peers."""
    chosen = ops.select_backend(workload.case.backend, *workload.kind)
    others = {name: BACKENDS[name] for name in AUTOMATIC[workload.device.torch_device.type] if name != "torch"}
    return [
        name
        for name, backend in others.items()
        if backend is not chosen and backend.unavailable(*workload.kind) is None
    ]


def _formulations(workload: Workload) -> Iterator[_Candidate]:
    """In plain PyTorch. Tiles fit into a processor's cache; a GPU is kept busy by whole matrices alone."""
    rows, scratch = 1 + len(workload.rule.states), 2 * workload.rule.num_messages
    is_gpu = workload.device.is_gpu
    for mixing, options in COMPILED:
        if is_gpu and "tiled" in options:
            continue
        for mode in (None, *(MODES if is_gpu and not options and mixing != "matmul" else ())):
            make = partial(Compiled, workload, mixing, mode=mode, **dict.fromkeys(options, True))
            name = ", ".join(["compile", mixing, *(OPTIONS[option] for option in options), *([mode] if mode else [])])
            yield _Candidate(name, "compile", 2 * rows, make)
    for mixing, options in EAGER:
        if (is_gpu and "tiled" in options) or ("by_tensor" in options and len(workload.parameters) == 1):
            continue
        make_eager = partial(Eager, workload, mixing, **dict.fromkeys(options, True))
        name = ", ".join(["eager", mixing, *(OPTIONS[option] for option in options)])
        yield _Candidate(name, "eager", rows + (1 if options else scratch + 1), make_eager)
