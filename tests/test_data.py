"""Data sets in memory, divisions among agents, random crops, and the command that shows them."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gut_fast import data
from gut_fast.cli.data import data_command
from gut_fast.cli.terminal import BadArgumentError
from gut_fast.data import Dataset, RandomCropFlip, digits, partition
from gut_fast.data.partition import class_histogram, dirichlet, dirichlet_blocks, heterogeneity, iid, shards

LABELS = torch.arange(600) % 10
OPTIONS = {
    "dirichlet": {"alpha": 0.1},
    "dirichlet-blocks": {"alpha": 0.1},
    "shards": {"classes_per_agent": 2},
    "iid": {},
}


def assert_divides(parts, num_samples, num_agents):
    assert len(parts) == num_agents
    assert all(part.dtype == torch.int64 and len(part) >= 1 for part in parts)
    assert all(torch.equal(part, part.sort().values) for part in parts)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(num_samples))


def test_digits_are_split_standardised_and_whole():
    sets = digits()
    assert sets.train_inputs.shape == (1400, 1, 8, 8)
    assert sets.test_inputs.shape == (397, 1, 8, 8)
    assert sets.train_inputs.dtype == sets.test_inputs.dtype == torch.float32
    assert sets.input_shape == (1, 8, 8)
    assert sets.num_classes == 10
    assert sets.train_inputs.mean().abs() < 1e-6
    assert (sets.train_inputs.std() - 1).abs() < 1e-6
    from sklearn.datasets import load_digits

    labels = torch.cat([sets.train_labels, sets.test_labels])
    assert torch.equal(labels.bincount(), torch.from_numpy(load_digits().target).bincount())


def test_digits_are_a_function_of_the_seed_alone():
    first = digits(3)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    second = digits(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.train_inputs, second.train_inputs)
    assert torch.equal(first.test_labels, second.test_labels)
    assert not torch.equal(first.train_labels, digits(4).train_labels)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "scikit-learn>=1.4"'):
        digits()


def test_load_by_name():
    assert data.load("digits", seed=1).name == "digits"
    with pytest.raises(ValueError, match=r"unknown data set 'cifar'; known are cifar10, .*, digits, .*, mnist-5k"):
        data.load("cifar")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": torch.zeros(3)}, "train_labels must be a 1-D int64 tensor"),
        ({"train_labels": torch.zeros(3, 1, dtype=torch.int64)}, r"got shape \(3, 1\)"),
        ({"test_labels": torch.zeros(3, dtype=torch.int64)}, "2 test inputs but 3 test labels"),
        ({"test_inputs": torch.zeros(0, 2), "test_labels": torch.zeros(0, dtype=torch.int64)}, "has no test samples"),
        ({"test_labels": torch.tensor([0, 5])}, r"test_labels span 0 … 5, expected 0 … 4"),
    ],
)
def test_data_set_checks_its_labels(change, message):
    good = {
        "train_inputs": torch.zeros(3, 2),
        "train_labels": torch.tensor([0, 1, 4]),
        "test_inputs": torch.zeros(2, 2),
        "test_labels": torch.tensor([0, 1]),
    }
    assert Dataset("toy", 5, **good).input_shape == (2,)
    with pytest.raises(ValueError, match=message):
        Dataset("toy", 5, **{**good, **change})


def test_pooling_averages_squares_of_pixels():
    sets = digits()
    half = sets.pooled(2)
    assert half.input_shape == (1, 4, 4)
    squares = sets.test_inputs.view(-1, 1, 4, 2, 4, 2)
    torch.testing.assert_close(half.test_inputs, squares.mean((3, 5)))
    assert torch.equal(half.train_labels, sets.train_labels)
    assert half.train_inputs.mean().abs() < 1e-6
    assert torch.equal(sets.pooled(1).train_inputs, sets.train_inputs)


def test_validation_samples_are_training_samples_of_every_class():
    sets = digits()
    split = sets.with_validation(0.2, seed=3)
    per_class = sets.train_labels.bincount()
    assert torch.equal(split.test_labels.bincount(), (per_class * 0.2).round().long())
    assert torch.equal(split.train_labels.bincount() + split.test_labels.bincount(), per_class)

    def rows(inputs, labels):
        return sorted(
            (*pixels.flatten().tolist(), label) for pixels, label in zip(inputs, labels.tolist(), strict=True)
        )

    inputs, labels = (torch.cat([getattr(split, f"{s}_{name}") for s in ("train", "test")]) for name in NAMES_OF_PARTS)
    assert rows(inputs, labels) == rows(sets.train_inputs, sets.train_labels)
    again, other = sets.with_validation(0.2, seed=3), sets.with_validation(0.2, seed=4)
    assert torch.equal(again.test_inputs, split.test_inputs)
    assert not torch.equal(other.test_inputs, split.test_inputs)


NAMES_OF_PARTS = ("inputs", "labels")
FLAT = Dataset("flat", 2, torch.zeros(4, 6), torch.tensor([0, 0, 0, 1]), torch.zeros(1, 6), torch.tensor([0]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: digits().pooled(3), ValueError, r"sides are multiples of 3, the inputs have shape \(1, 8, 8\)"),
        (lambda: FLAT.pooled(2), ValueError, r"for images .* have shape \(6,\)"),
        (lambda: digits().pooled(0), ValueError, "factor must be at least 1, got 0"),
        (lambda: digits().pooled(2.0), TypeError, "factor must be an integer, got 2.0"),
        (lambda: digits().with_validation(0.0), ValueError, "fraction must be between 0 and 1, got 0.0"),
        (lambda: digits().with_validation(1.0), ValueError, "fraction must be between 0 and 1, got 1.0"),
        (lambda: digits().with_validation(float("nan")), ValueError, "fraction must be between 0 and 1, got nan"),
        (lambda: digits().with_validation("0.1"), TypeError, "fraction must be a number, got '0.1'"),
        (lambda: digits().with_validation(0.1, seed=0.5), TypeError, "seed must be an integer, got 0.5"),
        (lambda: digits().with_validation(0.1, seed=-1), ValueError, "seed must be at least 0, got -1"),
        (lambda: digits().with_validation(1e-3), ValueError, r"class 0 would leave \d+ to train on and 0 to validate"),
        (lambda: FLAT.with_validation(0.4), ValueError, "0.4 of the 1 samples of class 1 would leave 1 .* and 0 "),
    ],
)
def test_bad_pooling_and_validation_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


@st.composite
def divisions(draw):
    """A name, labels, a number of agents, and options that are valid together."""
    name = draw(st.sampled_from(sorted(OPTIONS)))
    labels = draw(st.lists(st.integers(0, 4), min_size=1, max_size=80))
    num_agents = draw(st.integers(1, len(labels)))
    options = {}
    if name.startswith("dirichlet"):
        options["alpha"] = draw(st.floats(1e-300, 1e6))
    if name == "shards":
        num_classes = len(set(labels))
        classes_per_agent = draw(st.integers(min(-(-num_classes // num_agents), num_classes), num_classes))
        assume(num_agents * classes_per_agent <= len(labels))
        options["classes_per_agent"] = classes_per_agent
    return name, torch.tensor(labels), num_agents, options


@given(division=divisions(), seed=st.integers(0, 2**40))
@settings(max_examples=80, deadline=None)
def test_every_division_holds_every_sample_once_and_repeats(division, seed):
    name, labels, num_agents, options = division
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    parts = partition.partition(name, labels, num_agents, seed, **options)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert_divides(parts, len(labels), num_agents)
    again = partition.partition(name, labels.clone(), num_agents, seed, **options)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    if name == "shards":
        held = (class_histogram(labels, parts, 5) > 0).sum(1)
        assert held.max() <= options["classes_per_agent"]
    else:
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_the_seed_matters(name):
    parts = [partition.partition(name, LABELS, 16, seed, **OPTIONS[name]) for seed in (0, 1)]
    assert not all(torch.equal(a, b) for a, b in zip(*parts, strict=True))


def test_alpha_decides_how_many_classes_an_agent_has():
    def classes_per_agent(alpha):
        return (class_histogram(LABELS, dirichlet(LABELS, 16, alpha), 10) > 0).sum(1).double().mean()

    assert classes_per_agent(0.01) < 3
    assert 3 < classes_per_agent(0.5) < 9
    assert classes_per_agent(1e6) == 10
    even = class_histogram(LABELS, dirichlet(LABELS, 10, 1e9), 10)
    assert (even - 6).abs().max() <= 1


@given(
    num_agents=st.integers(1, 40), alpha=st.floats(5e-324, 1e300), seed=st.integers(0, 9), min_size=st.integers(1, 15)
)
@settings(max_examples=40, deadline=None)
def test_ragged_dirichlet_keeps_everyone_at_least_at_min_size(num_agents, alpha, seed, min_size):
    parts = dirichlet(LABELS, num_agents, alpha, seed, equal=False, min_size=min_size)
    assert_divides(parts, 600, num_agents)
    assert min(len(part) for part in parts) >= min_size


def test_ragged_dirichlet_has_the_moments_of_the_distribution():
    """An agent's share of a class is Beta(α, (N − 1)α): mean 1/N, variance (N − 1) / (N² (Nα + 1))."""
    num_agents, alpha = 5, 0.7
    labels = torch.zeros(4000, dtype=torch.int64)
    shares = torch.tensor(
        [[len(part) / 4000 for part in dirichlet(labels, num_agents, alpha, seed, equal=False)] for seed in range(300)]
    )
    variance = (num_agents - 1) / (num_agents**2 * (num_agents * alpha + 1))
    assert (shares.mean(0) - 1 / num_agents).abs().max() < 4 * (variance / 300) ** 0.5
    assert abs(shares.var(0).mean() / variance - 1) < 0.15


@pytest.mark.parametrize("equal", [True, False])
def test_an_alpha_that_underflows_gives_each_class_to_few_agents(equal):
    """The Dirichlet distribution of numpy returns NaN or zeros for this α."""
    histogram = class_histogram(LABELS, dirichlet(LABELS, 5, 1e-3, equal=equal), 10)
    assert histogram.sum() == 600
    held = (histogram > 1).sum(0)  # one sample may go to an agent that would have none
    assert (held == 1).all() if not equal else held.max() <= 3


def test_dirichlet_blocks_divides_within_blocks_of_ten():
    """Each block of ten agents holds its share of every class; without blocks a class is with one or two of all 20."""
    blocks = class_histogram(LABELS, dirichlet_blocks(LABELS, 20, 1e-3), 10)
    whole = class_histogram(LABELS, dirichlet(LABELS, 20, 1e-3), 10)
    assert blocks.sum(1).eq(30).all()
    assert ((blocks[:10].sum(0) - 30).abs() < 15).all()
    assert ((whole[:10].sum(0) - 30).abs() == 30).any()
    assert (blocks > 0).sum(1).max() <= 4


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_numpy_numbers_are_taken_and_do_not_overflow(name):
    expected = partition.partition(name, LABELS, 100, seed=3, **OPTIONS[name])
    kinds = {"alpha": np.float64, "classes_per_agent": np.int8}
    options = {option: kinds[option](value) for option, value in OPTIONS[name].items()}
    parts = partition.partition(name, LABELS, np.int8(100), seed=np.int64(3), **options)
    assert all(map(torch.equal, parts, expected))


def test_a_ragged_division_takes_small_integers_and_single_precision():
    parts = dirichlet(LABELS, np.int8(100), np.float32(0.5), equal=False, min_size=np.int8(3))
    assert all(map(torch.equal, parts, dirichlet(LABELS, 100, 0.5, equal=False, min_size=3)))


@pytest.mark.parametrize("alpha", [1e-6, 0.01])
@pytest.mark.parametrize("equal", [True, False])
def test_divisions_take_time_in_proportion_to_the_agents(alpha, equal):
    """Sixteen times the agents took 250 times as long where every agent looked at every other one."""

    def seconds(num_agents):
        start = time.process_time()  # others may be at work beside it
        dirichlet(torch.arange(4 * num_agents) % 10, num_agents, alpha, equal=equal)
        return time.process_time() - start

    seconds(1000)
    assert seconds(16_000) < 80 * max(min(seconds(1000) for _ in range(3)), 0.01)


def test_dirichlet_blocks_with_a_last_block_that_is_smaller():
    parts = dirichlet_blocks(LABELS, 13, 0.1, seed=5)
    assert_divides(parts, 600, 13)
    assert {len(part) for part in parts} == {46, 47}


def test_shards_are_pure_and_of_different_classes():
    parts = shards(LABELS, 15, 2)
    histogram = class_histogram(LABELS, parts, 10)
    assert_divides(parts, 600, 15)
    assert ((histogram > 0).sum(1) == 2).all()
    assert (histogram.sum(1) == 40).all()


def test_shards_follow_unequal_class_sizes():
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([500, 90, 10]))
    parts = shards(labels, 6, 1, seed=1)
    assert_divides(parts, 600, 6)
    assert sorted(class_histogram(labels, parts, 3)[:, 0].tolist()) == [0, 0, 125, 125, 125, 125]


def test_class_histogram_counts():
    labels = torch.tensor([0, 2, 2, 1])
    histogram = class_histogram(labels, [torch.tensor([1, 2]), torch.tensor([0, 3])], 4)
    assert histogram.tolist() == [[0, 0, 2, 0], [1, 1, 0, 0]]
    assert histogram.dtype == torch.int64
    with pytest.raises(ValueError, match=r"labels span 0 … 2, expected 0 … 1"):
        class_histogram(labels, [torch.tensor([0])], 2)


def test_heterogeneity_is_the_mean_total_variation_distance():
    assert heterogeneity(torch.tensor([[5, 5], [50, 50], [1, 1]])) == 0
    assert heterogeneity(torch.eye(4, dtype=torch.int64)) == pytest.approx(3 / 4)
    assert heterogeneity(torch.tensor([[3, 1], [0, 4]])) == pytest.approx((0.375 + 0.375) / 2)
    values = [heterogeneity(class_histogram(LABELS, dirichlet(LABELS, 16, a), 10)) for a in (1e-2, 0.1, 1, 1e6)]
    assert values == sorted(values, reverse=True)
    with pytest.raises(ValueError, match="every agent must have a sample"):
        heterogeneity(torch.tensor([[1, 0], [0, 0]]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dirichlet(LABELS, 4, 0.0), ValueError, r"alpha=0.0 must be positive and finite"),
        (lambda: dirichlet(LABELS, 4, -1), ValueError, r"alpha=-1 must be positive"),
        (lambda: dirichlet(LABELS, 4, float("nan")), ValueError, r"alpha=nan must be positive"),
        (lambda: dirichlet_blocks(LABELS, 4, float("inf")), ValueError, r"for the same mix everywhere use iid"),
        (lambda: dirichlet(LABELS, 4, "0.1"), TypeError, r"alpha must be a number, got '0.1'"),
        (
            lambda: dirichlet(LABELS, 601, 0.1),
            ValueError,
            r"num_agents=601 must be from 1 to the number of samples, 600",
        ),
        (lambda: iid(LABELS, 0), ValueError, r"num_agents=0 must be from 1"),
        (lambda: iid(LABELS, 2.0), TypeError, r"num_agents must be an integer, got 2.0"),
        (lambda: iid(LABELS.view(2, 300), 2), ValueError, r"1-D tensor of integers, got shape \(2, 300\)"),
        (lambda: iid(LABELS.double(), 2), ValueError, r"got shape \(600,\) of torch.float64"),
        (lambda: iid(LABELS, 2, seed=-1), ValueError, r"seed must be at least 0, got -1"),
        (lambda: iid(LABELS, 2, seed=None), TypeError, r"seed must be an integer, got None"),
        (lambda: shards(LABELS, 16, 0), ValueError, r"classes_per_agent=0 must be from 1 to the 10 classes"),
        (lambda: shards(LABELS, 16, 11), ValueError, r"classes_per_agent=11 must be from 1 to the 10 classes"),
        (lambda: shards(LABELS, 16, 1.5), TypeError, r"classes_per_agent must be an integer"),
        (lambda: shards(LABELS, 4, 2), ValueError, r"hold at most 8 of the 10 classes; use classes_per_agent >= 3"),
        (lambda: shards(LABELS, 400, 2), ValueError, r"800 shards cannot be cut from 600 samples"),
        (lambda: dirichlet(LABELS, 4, 1, equal=False, min_size=151), ValueError, r"min_size=151 .* at most 150"),
        (lambda: partition.partition("dirichlet", LABELS, 4), ValueError, r"partition 'dirichlet' needs alpha="),
        (
            lambda: partition.partition("iid", LABELS, 4, alpha=1),
            ValueError,
            r"'iid' has no option 'alpha'; it has: none",
        ),
        (
            lambda: partition.partition("random", LABELS, 4),
            ValueError,
            r"known are dirichlet, dirichlet-blocks, shards",
        ),
    ],
)
def test_bad_arguments_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Augmentation


def crop_and_flip(image, draw, padding):
    """One image [C, H, W], pixel by pixel."""
    top, left, mirrored = draw
    height, width = image.shape[1:]
    out = torch.zeros_like(image)
    for h in range(height):
        for w in range(width):
            y, x = h + top - padding, (width - 1 - w if mirrored else w) + left - padding
            if 0 <= y < height and 0 <= x < width:
                out[:, h, w] = image[:, y, x]
    return out


def channels_last(inputs):
    return inputs.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("layout", [torch.clone, channels_last])
def test_random_crop_and_flip_is_its_definition(channels, padding, dtype, layout):
    augment = RandomCropFlip(padding)
    generator = torch.Generator().manual_seed(padding)
    inputs = layout(torch.randint(1, 256, (2, 6, channels, 3, 4), generator=generator).to(dtype))
    before, draws = inputs.clone(), augment.draw(12, generator).view(2, 6, 3)
    outputs = augment(inputs, draws)
    assert (outputs.dtype, outputs.shape, outputs.stride()) == (inputs.dtype, inputs.shape, inputs.stride())
    assert torch.equal(inputs, before)
    for agent in range(2):
        for sample in range(6):
            expected = crop_and_flip(inputs[agent, sample], draws[agent, sample].tolist(), padding)
            assert torch.equal(outputs[agent, sample], expected)


def test_every_place_and_both_sides_are_drawn_equally_often():
    draws = RandomCropFlip(1).draw(18_000, torch.Generator().manual_seed(0))
    assert draws.dtype == torch.int64
    places, counts = draws.unique(dim=0, return_counts=True)
    assert len(places) == 3 * 3 * 2
    assert 850 < counts.min() <= counts.max() < 1150  # five standard deviations around 1,000
    assert RandomCropFlip(4, flip=False).draw(100, torch.Generator())[:, 2].eq(0).all()
    assert RandomCropFlip(0).draw(100, torch.Generator())[:, :2].eq(0).all()


IMAGES = torch.zeros(2, 3, 1, 4, 4)
DRAWS = torch.zeros(2, 3, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RandomCropFlip(-1), ValueError, "padding must be at least 0, got -1"),
        (lambda: RandomCropFlip(2.0), TypeError, "padding must be an integer, got 2.0"),
        (lambda: RandomCropFlip(flip=1), TypeError, "flip must be True or False, got 1"),
        (
            lambda: RandomCropFlip()(IMAGES[0], DRAWS),
            ValueError,
            r"for images \[N, B, C, H, W\], got .* \(3, 1, 4, 4\)",
        ),
        (lambda: RandomCropFlip()(IMAGES, DRAWS[:1]), ValueError, r"of shape \(1, 3, 3\).*expected .* \(2, 3, 3\)"),
        (lambda: RandomCropFlip()(IMAGES, DRAWS.int()), ValueError, "draws is torch.int32 of shape"),
        (
            lambda: RandomCropFlip()(IMAGES, DRAWS + 2),
            ValueError,
            r"from 0 to 1, got \[2, 2, 2\] … \[2, 2, 2\]",
        ),
        (lambda: RandomCropFlip()(IMAGES, DRAWS - 1), ValueError, "top and left go from 0 to 8"),
    ],
)
def test_a_bad_augmentation_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


# The command


def test_the_command_shows_the_set_and_draws_who_holds_what(capsys, tmp_path):
    data_command("digits", topology="ring:6", partition="shards", classes_per_agent=2, out=tmp_path / "held.png")
    shown = capsys.readouterr().out
    for fact in (
        "1,400",
        "397",
        "1 × 8 × 8",
        "scikit-learn's load_digits",
        "shards, classes_per_agent 2, seed 0, 6 agents",
    ):
        assert fact in shown
    parts = shards(digits().train_labels, 6, 2)
    histogram = class_histogram(digits().train_labels, parts, 10)
    assert f"{heterogeneity(histogram):.3f}" in shown
    assert shown.count(f"{histogram[3].sum():,}") >= 1
    assert (tmp_path / "held.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_of_many_agents_lists_none(capsys):
    data_command("digits", topology="ring:200")
    assert "largest class" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "imagenet"}, "unknown data set 'imagenet'"),
        ({"name": "digits", "partition": "shards"}, "partition 'shards' needs classes_per_agent="),
        ({"name": "digits", "out": Path("held.jpg")}, "expected the name of a PNG file"),
        ({"name": "digits", "topology": "ring:1500"}, "num_agents=1500 must be from 1 to"),
    ],
)
def test_the_command_refuses_what_cannot_be_shown(options, message):
    with pytest.raises(BadArgumentError, match=message):
        data_command(**options)
