"""The command ``gut-fast data``: a data set, where it was found, and who would hold what of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from torch import Tensor

from gut_fast import data
from gut_fast.cli.options import AsJson, DataFolder, Download, check_picture, prepare_data
from gut_fast.cli.terminal import as_bad_argument, console_of_text, facts_grid, print_json, writing
from gut_fast.cli.topology import SPECS
from gut_fast.data import Dataset
from gut_fast.study import plots, summary
from gut_fast.study.experiment import Experiment, make_experiment
from gut_fast.study.run import load_data, samples_per_class

__all__ = ["data_command"]

DEFAULT = Experiment()
MAX_AGENTS_LISTED = 64


def data_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of: {', '.join(data.DATASETS)}.")],
    folder: DataFolder = None,
    download: Download = False,
    topology: Annotated[str, typer.Option(help=f"Its agents share the samples. For example {SPECS}.")] = (
        DEFAULT.topology
    ),
    partition: Annotated[
        str, typer.Option(help=f"One of: {', '.join(data.partition.PARTITIONS)}.")
    ] = DEFAULT.partition,
    alpha: Annotated[
        float | None,
        typer.Option(help="Dirichlet: small is different data everywhere. Default: 0.1."),
    ] = None,
    classes_per_agent: Annotated[int | None, typer.Option(help="Shards: classes of each agent.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the division.")] = DEFAULT.seed,
    out: Annotated[Path | None, typer.Option(help="Draw who holds what into this PNG file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a data set, where it was found, and how it is divided among agents."""
    with as_bad_argument():
        if out is not None:
            check_picture(out)
        prepare_data([name], folder, download)
        given = {"alpha": alpha, "classes_per_agent": classes_per_agent}
        experiment = make_experiment(
            {},
            {"data": name, "topology": topology, "partition": partition, "seed": seed}
            | {option: value for option, value in given.items() if value is not None},
        )
        dataset, histogram = load_data(experiment), samples_per_class(experiment)
    options = [f"{option} {value:g}" for option, value in experiment.partition_options.items()]
    division = ", ".join([partition, *options, f"seed {seed}"])
    if out is not None:
        with writing():
            _draw(histogram, f"Training samples of each agent: {name}, {division}", out)
    if as_json:
        print_json(_document(dataset, experiment, histogram))
        return
    console = console_of_text()
    console.print(name, style="bold")
    console.print(facts_grid({**_facts(dataset), **_division_facts(histogram, division)}))
    if len(histogram) <= MAX_AGENTS_LISTED:
        console.print(_agents_table(histogram))
    if out is not None:
        console.print(f"wrote {out}")


def _document(dataset: Dataset, experiment: Experiment, histogram: Tensor) -> dict[str, Any]:
    """Sizes, source and division of a data set for a program; the samples of each agent are counted by class."""
    return {
        "name": experiment.data,
        "training_samples": len(dataset.train_labels),
        "test_samples": len(dataset.test_labels),
        "shape": list(dataset.input_shape),
        "classes": dataset.num_classes,
        "groups": list(dataset.group_names),
        "source": dataset.source,
        "partition": experiment.partition,
        "partition_options": dict(experiment.partition_options),
        "seed": experiment.seed,
        "agents": len(histogram),
        "heterogeneity": data.partition.heterogeneity(histogram),
        "samples_per_class": histogram.tolist(),
    }


def _facts(dataset: Dataset) -> dict[str, str]:
    """Sizes and source of a data set."""
    of_each = f"of {_range(dataset.groups.bincount())} training samples"
    return {
        "training samples": f"{len(dataset.train_labels):,}",
        "test samples": f"{len(dataset.test_labels):,}",
        "shape": " × ".join(map(str, dataset.input_shape)),
        "classes": f"{dataset.num_classes}" + (f", {of_each}" if dataset.train_groups is None else ""),
        **({} if dataset.train_groups is None else {"groups": f"{', '.join(dataset.group_names)}, {of_each}"}),
        "from": dataset.source,
    }


def _division_facts(histogram: Tensor, division: str) -> dict[str, str]:
    """How unlike the agents' shares are."""
    return {
        "division": f"{division}, {len(histogram):,} agents",
        "samples an agent": _range(histogram.sum(1)),
        "classes an agent": _range((histogram > 0).sum(1)),
        "heterogeneity": f"{data.partition.heterogeneity(histogram):.3f}, the mean distance (total variation) of an "
        "agent's mix of classes from that of all",
    }


def _range(values: Tensor) -> str:
    """The least and the largest value."""
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} … {high:,}"


def _agents_table(histogram: Tensor) -> Table:
    """A line for each agent: how many samples it holds, and of what."""
    table = summary.plain_table("", "agent", "samples", "classes", "largest class", "its share")
    for agent, counts in enumerate(histogram):
        samples, largest = int(counts.sum()), int(counts.argmax())
        share = f"{int(counts.max()) / samples:.0%}"
        table.add_row(str(agent), f"{samples:,}", str(int((counts > 0).sum())), str(largest), share)
    return table


def _draw(histogram: Tensor, title: str, path: Path) -> None:
    """Writes a picture of who holds what."""
    num_agents, num_classes = histogram.shape
    size = (7.5 if num_classes <= 20 else 11.0, min(max(1.5 + 0.26 * num_agents, 4.0), 11.0))
    with plots.new_figure(path, size) as figure:
        plots.plot_class_histogram(figure.subplots(), histogram, title)
