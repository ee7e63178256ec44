import importlib.util
import math
import sys

import networkx as nx
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from gut_fast import analysis, rules, topology
from gut_fast.kernels import machine
from gut_fast.kernels.backends import cpu, cuda, triton
from gut_fast.study import (
    TOPOLOGIES,
    Experiment,
    Run,
    graph_pictures,
    make_simulator,
    parse_topology,
    plots,
    summary,
    train,
)
from gut_fast.study.run import samples_per_class
from gut_fast.study.sweep import make_sweep
from gut_fast.study.tune import make_tuning

QUICK = Experiment(topology="ring:4", steps=6, eval_every=3, engine="vmap", partition_options={"alpha": 0.1})


def quick_run(**changes):
    experiment = Experiment(**{**QUICK.as_dict(), "hyperparameters": {}, **changes})
    return train(experiment, make_simulator(experiment), progress=False)


def made_up_run(seed, accuracy, steps=(10, 20), **final):
    """A run whose averaged model has these accuracies."""
    rows = [
        {
            "step": step,
            "test_loss": 2 - value,
            "test_accuracy": value,
            "mean_agent_accuracy": value - 0.01,
            "worst_agent_accuracy": value - 0.02,
            "consensus_error": 10.0**-step,
            "mean_bytes_sent": 2.5e6,
        }
        for step, value in zip(steps, accuracy, strict=True)
    ]
    rows[-1].update(final)
    return Run(Experiment(steps=20, seed=seed), rows, "vmap", 1.25)


# Specs


def test_every_constructor_has_a_form():
    constructors = {name.replace("_", "-") for name in topology.__all__} - {"CSR", "Topology", "nobody"}
    assert set(TOPOLOGIES) == constructors


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("ring:16", topology.ring(16)),
        ("torus:4x8", topology.torus(4, 8)),
        ("petersen", topology.petersen()),
        ("dyck", topology.dyck()),
        ("complete:3", topology.complete(3)),
        ("chain:5", topology.chain(5)),
        ("star:6", topology.star(6)),
        ("hypercube:3", topology.hypercube(3)),
        ("exponential:9", topology.exponential(9)),
        ("circulant:16:1,4", topology.circulant(16, (1, 4))),
        ("erdos-renyi:16:0.3:1", topology.erdos_renyi(16, 0.3, 1)),
        ("random-regular:16:4:1", topology.random_regular(16, 4, 1)),
        ("one-peer-exponential:16", topology.one_peer_exponential(16)),
        ("one_peer_exponential:16", topology.one_peer_exponential(16)),
        ("base:25:1", topology.base(25)),
        ("equi-static:16:4:1", topology.equi_static(16, 4, 1)),
        ("equi-dynamic:16:1", topology.equi_dynamic(16, 1)),
        ("random-matching:7:3", topology.random_matching(7, 3)),
        ("sequence:ring:8+hypercube:3", topology.sequence([topology.ring(8), topology.hypercube(3)])),
    ],
)
def test_spec_is_the_constructor(spec, expected):
    parsed = parse_topology(spec)
    assert parsed == expected
    assert parsed.name == expected.name
    assert parse_topology(spec, 0.5) == expected.lazy(0.5)


def test_the_example_of_every_form_can_be_parsed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("W.npy", topology.ring(5).matrix().numpy())
    nx.write_edgelist(nx.cycle_graph(5), "graph.edgelist")
    for name, form in TOPOLOGIES.items():
        assert parse_topology(form.example).num_agents > 1
        assert form.usage(name).count(":") <= form.example.count(":")


def test_specs_read_files(tmp_path):
    ring = topology.ring(5)
    np.save(tmp_path / "W.npy", ring.matrix().numpy())
    np.savetxt(tmp_path / "W.csv", ring.matrix().numpy(), delimiter=",")
    np.savetxt(tmp_path / "W.txt", ring.matrix().numpy())
    for file in ("W.npy", "W.csv", "W.txt"):
        parsed = parse_topology(f"from-matrix:{tmp_path / file}")
        assert torch.allclose(parsed.matrix(), ring.matrix())
        assert parsed.name == f"from_matrix({file})"
    nx.write_graphml(nx.cycle_graph(5), tmp_path / "graph.graphml")
    assert torch.equal(parse_topology(f"from-networkx:{tmp_path / 'graph.graphml'}").matrix(), ring.matrix())


def test_agents_have_the_numbers_of_the_file(tmp_path):
    (tmp_path / "chain.edgelist").write_text("2 0\n0 1\n")
    chain = parse_topology(f"from-networkx:{tmp_path / 'chain.edgelist'}")
    assert [chain.neighbors(agent) for agent in range(3)] == [[1, 2], [0], [0]]
    (tmp_path / "names.edgelist").write_text("b 0\n0 1\n")
    assert parse_topology(f"from-networkx:{tmp_path / 'names.edgelist'}").neighbors(1) == [0, 2]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("moebius:4", "unknown topology 'moebius' in 'moebius:4'; known are ring, torus"),
        ("ring", "'ring': expected ring:N, for example ring:16"),
        ("ring:", "expected ring:N"),
        ("ring:x", "'x' is not an integer; expected ring:N"),
        ("ring:4:4", "'4:4' is not an integer"),
        ("torus:1000000x1000000", "1,000,000,000,000 agents are too many"),
        ("complete:100000", "100,000 agents are too many, the command takes at most 4,000 here"),
        ("hypercube:100000", r"2\^100000 agents are too many"),
        ("ring:0", "ring: n must be at least 1"),
        ("petersen:3", "expected petersen, for example petersen"),
        ("torus:12", "'12' is not a size; expected torus:ROWSxCOLS"),
        ("torus:4x", "'' is not an integer"),
        ("circulant:8:1,,2", "'' is not an integer"),
        ("erdos-renyi:16:many:1", "'many' is not a number"),
        ("base:25", "expected base:N:K, for example base:25:1"),
        ("base:8000:4000", "8,000 agents with 4,000 neighbors each are too many"),
        ("random-regular:50000:1000:1", "50,000 agents with 1,000 neighbors each are too many"),
        ("erdos-renyi:16:0.3", "expected erdos-renyi:N:P:SEED"),
        ("sequence:ring:8+ring", "'ring': expected ring:N"),
        ("from-networkx:graph.png", r"does not end in .adjlist, .edgelist"),
    ],
)
def test_bad_specs_say_what_is_expected(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(spec)


def test_bad_files_say_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        parse_topology(f"from-matrix:{tmp_path / 'none.npy'}")
    (tmp_path / "W.csv").write_text("1,x\n")
    with pytest.raises(ValueError, match=r"W\.csv cannot be read as a matrix"):
        parse_topology(f"from-matrix:{tmp_path / 'W.csv'}")
    (tmp_path / "bad.gml").write_text("graph [")
    with pytest.raises(ValueError, match=r"bad\.gml cannot be read as a graph"):
        parse_topology(f"from-networkx:{tmp_path / 'bad.gml'}")


# Experiments


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rule": "sgd"}, "unknown rule 'sgd'"),
        ({"hyperparameters": {"mu": 1.5}}, r"mu=1.5 is outside \[0, 1\]"),
        ({"hyperparameters": {"speed": 1}}, "no hyper-parameter 'speed'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"milestones": (-0.5,)}, "milestones are fractions"),
    ],
)
def test_bad_experiment_cannot_be_made(values, message):
    with pytest.raises(ValueError, match=message):
        Experiment(**values)


def test_experiments_of_a_seed_are_paired_over_rules():
    first, second = (make_simulator(Experiment(topology="ring:4", rule=rule, seed=5)) for rule in ("dsgd", "gutm"))
    assert torch.equal(first.stacked.values, second.stacked.values)
    assert torch.equal(first.data.test_labels, second.data.test_labels)
    assert all(torch.equal(a, b) for a, b in zip(first.batches.parts, second.batches.parts, strict=True))
    assert torch.equal(first.batches.indices(70), second.batches.indices(70))


def test_the_seed_changes_model_split_partition_and_batches():
    first, second = (make_simulator(Experiment(topology="ring:4", seed=seed)) for seed in (0, 1))
    assert not torch.equal(first.stacked.values, second.stacked.values)
    assert not torch.equal(first.data.test_labels, second.data.test_labels)
    assert not torch.equal(first.batches.parts[0][:50], second.batches.parts[0][:50])
    assert not torch.equal(first.batches.indices(0), second.batches.indices(0))


def test_run_follows_the_experiment_and_repeats():
    run = quick_run(rule="qg_gutm", lr=0.05)
    assert [row["step"] for row in run.history] == [3, 6]
    assert run.final is run.history[-1]
    assert [row["lr"] for row in run.history] == pytest.approx([0.05, 0.0005])
    assert run.engine == "vmap"
    assert run.seconds > 0
    assert quick_run(rule="qg_gutm", lr=0.05).history == run.history
    assert quick_run(rule="qg_gutm", lr=0.05, seed=1).history != run.history


def test_options_reach_the_optimizer():
    values = {"rule": "dsgdm", "hyperparameters": {"nesterov": True}, "weight_decay": 0.1, "gamma": 0.5}
    values |= {"state_dtype": "bfloat16", "local_steps": 4, "wire_dtype": "int4", "wire_seed": 1}
    simulator = make_simulator(Experiment(topology="torus:2x3", backend="torch", batch_size=7, **values))
    group = simulator.optimizer.param_groups[0]
    assert simulator.optimizer.rule is rules.RULES["dsgdm"]
    assert (group["nesterov"], group["momentum"], group["weight_decay"]) == (True, 0.9, 0.1)
    assert simulator.optimizer.backend == "torch"
    assert simulator.optimizer.state_dtype == torch.bfloat16
    assert (simulator.optimizer.local_steps, simulator.optimizer.wire_dtype) == (4, "int4")
    assert simulator.topology == topology.torus(2, 3).lazy(0.5)
    assert simulator.batches.batch_size == 7


def test_samples_per_class_counts_what_the_simulator_trains_on():
    histogram = samples_per_class(QUICK)
    simulator = make_simulator(QUICK)
    assert histogram.shape == (4, 10)
    for agent, part in enumerate(simulator.batches.parts):
        assert torch.equal(histogram[agent], simulator.data.train_labels[part].bincount(minlength=10))


# Summaries


def test_mean_and_sample_standard_deviation():
    assert summary.mean_and_std([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(7)))
    assert summary.mean_and_std([4.0]) == (4.0, 0.0)


def test_paired_difference_is_taken_seed_by_seed():
    better = [made_up_run(seed, (0.1, value)) for seed, value in ((0, 0.9), (1, 0.8), (2, 0.5))]
    worse = [made_up_run(seed, (0.9, value)) for seed, value in ((2, 0.6), (0, 0.8), (1, 0.6))]
    difference = summary.paired_difference(better, worse)
    assert difference == pytest.approx([10.0, 20.0, -10.0])
    assert summary.difference_text(difference) == "+6.7 ± 15.3 points, better on 2 of 3 seeds"
    with pytest.raises(ValueError, match=r"seeds \[0, 1, 2\] cannot be paired with runs of seeds \[2, 0\]"):
        summary.paired_difference(better, worse[:2])


def rendered(table):
    console = Console(width=80, markup=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_tables_show_the_numbers_within_80_columns():
    runs = [made_up_run(seed, (0.1, value)) for seed, value in ((0, 0.9), (1, 0.8))]
    text = rendered(summary.methods_table({"QG-DSGDm β+μ (control)": runs}, "Title"))
    for cell in ("QG-DSGDm β+μ (control)", "0.1", "85.0 ± 7.1", "84.0", "83.0", "1.0e-20", "2.5", "1.2"):
        assert f" {cell} " in text
    text = rendered(summary.seeds_table(runs, "Title"))
    assert [line.split()[:2] for line in text.splitlines()[4:6]] == [["0", "90.0"], ["1", "80.0"]]
    assert "85.0 ± 7.1" in text
    assert "1.150 ± 0.071" in text
    assert "mean" not in rendered(summary.seeds_table(runs[:1], "Title")).split("worst")[1]


# The machine


def test_machine_tells_versions_tiers_and_what_is_missing():
    assert machine.versions()["torch"] == torch.__version__
    assert machine.installed_version("numpy") == np.__version__
    assert machine.installed_version("no-such-package") is None
    status = machine.backend_status()
    assert (status["cpu"], status["torch"]) == (None, None)
    assert status["cuda"] is not None
    assert cpu.tier() in machine.instruction_tiers()
    assert f"1 thread, instruction tier {cpu.tier()}" in machine.machine_line()


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name"),
    [
        ("AuthenticAMD", 25, 1, "A CPU (Zen 3)"),
        ("AuthenticAMD", 25, 17, "A CPU (Zen 4)"),
        ("AuthenticAMD", 26, 2, "A CPU (Zen 5)"),
        ("GenuineIntel", 6, 143, "A CPU (Sapphire Rapids)"),
        ("GenuineIntel", 6, 1, "A CPU"),
        ("Other", 25, 17, "A CPU"),
    ],
)
def test_the_generation_of_a_processor_is_told(tmp_path, vendor, family, model, name):
    file = tmp_path / "cpuinfo"
    first = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: A CPU\n"
    file.write_text(first + "\n" + first.replace("A CPU", "Another"))
    assert machine._processor(file) == name
    file.write_text("Hardware\t: a board\n")
    assert machine._processor(file)


def test_machine_without_the_kernel(monkeypatch):
    monkeypatch.setattr(cpu, "why_missing", "it was not built")
    assert machine.backend_status()["cpu"] == "it was not built"
    assert machine.backend_line("cpu") == "it was not built"
    assert machine.automatic_backend("cpu") == "torch; not cpu: it was not built"
    assert machine.instruction_tiers() == []
    assert "compiled kernel missing" in machine.machine_line()


def test_a_build_that_was_to_have_no_cuda_kernels_says_just_that(monkeypatch):
    error = ImportError("no module")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cuda, "CUDA_OPTION", "OFF")
    assert cuda._why_missing(error).startswith("gut_fast was built without it, because of GUT_FAST_CUDA=OFF;")
    monkeypatch.setattr(cuda, "CUDA_OPTION", "AUTO")
    assert "because no nvcc of 12.8 or later was found" in cuda._why_missing(error)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert "did not import (no module)" in cuda._why_missing(error)


def test_machine_says_which_backend_a_gpu_would_get(monkeypatch):
    monkeypatch.setattr(cuda, "why_missing", "no nvcc")
    monkeypatch.setattr(triton, "why_missing", "no Triton")
    assert machine.backend_line("cuda") == "no nvcc"
    assert machine.backend_line("torch") == "for tensors on cpu and cuda"
    assert machine.automatic_backend("cuda") == "torch; not cuda: no nvcc; not triton: no Triton"
    assert machine.automatic_backend("cpu") == "cpu"


# Pictures


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_curves_are_the_mean_and_the_range_over_seeds():
    runs = {"A": [made_up_run(0, (0.5, 0.9)), made_up_run(1, (0.7, 0.8))], "B": [made_up_run(0, (0.4, 0.6))]}
    groups = {label: [run.history for run in group] for label, group in runs.items()}
    axes, decays = Figure().subplots(), plots.decays_of(runs["A"][0].experiment)
    plots.plot_curves(axes, groups, "test_accuracy", "Title", "accuracy", decays=decays)
    first, second = axes.get_lines()[:2]
    assert first.get_ydata() == pytest.approx([60.0, 85.0])
    assert second.get_ydata() == pytest.approx([40.0, 60.0])
    assert first.get_color() != second.get_color()
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(vertex) for vertex in band.round(6)} >= {(10, 50), (10, 70), (20, 80), (20, 90)}
    assert [text.get_text() for text in axes.texts] == ["lr × 0.1"] * 2
    assert [text.xy[0] for text in axes.texts] == [10, 15]


def test_consensus_error_is_shown_on_a_logarithmic_scale():
    axes = Figure().subplots()
    plots.plot_curves(axes, {"A": [made_up_run(0, (0.5, 0.9)).history]}, "consensus_error", "Title", "error")
    assert axes.get_yscale() == "log"
    assert axes.get_lines()[0].get_ydata() == pytest.approx([1e-10, 1e-20])


def test_class_histogram_has_a_number_for_every_class_held():
    axes = Figure().subplots()
    plots.plot_class_histogram(axes, torch.tensor([[3, 0, 1], [0, 7, 0]]), "Title")
    assert {(*text.get_position(), text.get_text()) for text in axes.texts} == {(0, 0, "3"), (2, 0, "1"), (1, 1, "7")}


def test_training_is_drawn_even_if_it_diverged(tmp_path):
    lost = made_up_run(0, (0.5, math.nan), consensus_error=math.inf, worst_agent_accuracy=math.nan)
    plots.draw_training({"A": [lost]}, torch.ones(50, 3, dtype=torch.int64), "Title", tmp_path / "lost.png")
    assert is_png(tmp_path / "lost.png")


@pytest.mark.parametrize("spec", ["torus:3x4", "one-peer-exponential:4", "complete:1", "ring:2"])
def test_topologies_are_drawn(tmp_path, spec):
    graph_pictures.draw_topology(parse_topology(spec), tmp_path / "graph.png")
    assert is_png(tmp_path / "graph.png")


def test_spectrum_shows_every_eigenvalue():
    axes = Figure().subplots()
    graph_pictures.plot_spectrum(axes, topology.ring(6))
    assert axes.get_lines()[0].get_ydata() == pytest.approx(topology.ring(6).eigenvalues.numpy())
    assert [text.get_text().split(" = ")[1] for text in axes.texts] == ["0.6667", "-0.3333"]
    with pytest.warns(UserWarning, match="asymmetric"):
        directed = topology.from_matrix([[0.5, 0.5, 0], [0, 0.5, 0.5], [0.5, 0, 0.5]])
    axes = Figure().subplots()
    graph_pictures.plot_spectrum(axes, directed)
    points = axes.get_lines()[1]
    assert sorted(points.get_ydata()) == pytest.approx(sorted(directed.eigenvalues.imag.numpy()))


@pytest.mark.parametrize("size", [(4, 8), (8, 4), (3, 3), (2, 5), (1, 6)])
def test_no_two_agents_of_a_torus_are_drawn_on_each_other(size):
    axes = Figure().subplots()
    graph_pictures.plot_graph(axes, topology.torus(*size))
    drawn = max((collection.get_offsets() for collection in axes.collections), key=len)
    distances = torch.cdist(*[torch.tensor(np.asarray(drawn))] * 2) + 10 * torch.eye(len(drawn))
    assert len(drawn) == size[0] * size[1]
    assert distances.min() > 0.1


def test_pictures_without_matplotlib_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "matplotlib>=3.8"'):
        plots.check_matplotlib()


@pytest.mark.parametrize("H", [1, 16])
def test_automatic_values_are_those_of_rounds_of_local_steps(H):
    """The file of a study, its tries too, names mu and kappa as an optimizer's arguments do."""
    content = {
        "settings": {"kappa": "auto", "local_steps": H},
        "methods": {"GUT": {"rule": "gut"}, "GUTm": {"rule": "gutm", "mu": "auto"}},
        "grid": {"topology": ["torus:4x4", "one-peer-exponential:4"]},
    }
    for task in make_sweep(content).tasks():
        rule, graph = task.experiment.rule, parse_topology(task.experiment.topology)
        name = {"gut": "kappa", "gutm": "mu"}[rule]
        chosen = analysis.with_auto(rule, {name: "auto"}, graph, H)[name]
        assert task.experiment.hyperparameters[name] == chosen
    tune = {"tries": 2, "seeds": [100], "space": {"kappa": ["auto", 0.3]}}
    tuning = make_tuning({"methods": {"GUT": {"rule": "gut", "local_steps": H, "topology": "torus:4x4"}}, "tune": tune})
    first, second = (task.experiment.hyperparameters["kappa"] for task in tuning.tasks())
    assert first == analysis.with_auto("gut", {"kappa": "auto"}, topology.torus(4, 4), H)["kappa"]
    assert second == 0.3
