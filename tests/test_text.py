"""Folders of text become samples of bytes, one folder an agent, and a transformer learns them."""

import gzip
import math

import pytest
import torch
from torch.nn import functional

import gut_fast as gf
from gut_fast import cli, data, models
from gut_fast.data import Dataset, text
from gut_fast.data.sources import FOLDER_VARIABLE
from gut_fast.files import FileError
from gut_fast.study import make_simulator, presets, run, train
from gut_fast.study.experiment import make_experiment
from gut_fast.study.sweep import make_sweep

SENTENCES = {"en": "one and the other. ", "de": "das eine und das andere. ", "ja": "これとそれ。"}


def write_folders(root, repeats=60, names=tuple(SENTENCES)):
    """Folders of text, each with a plain file and a compressed one in a folder of its own."""
    for number, name in enumerate(names):
        sentence = list(SENTENCES.values())[number % len(SENTENCES)]
        folder = root / name
        (folder / "more").mkdir(parents=True)
        (folder / "a.txt").write_text(sentence * repeats, encoding="utf-8")
        (folder / "more" / "b.1.gz").write_bytes(gzip.compress(f"{name}: {sentence}".encode() * repeats))
    return root


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path / "texts")


@pytest.fixture
def languages(tmp_path, monkeypatch):
    """A folder of eight small texts in place of the manual pages."""
    root = write_folders(tmp_path / "data" / "manpages", repeats=200, names=text.LANGUAGES)
    monkeypatch.setenv(FOLDER_VARIABLE, str(root.parent))
    run._pooled.cache_clear()
    yield root
    run._pooled.cache_clear()


def bytes_of(rows):
    return [bytes(row) for row in rows.tolist()]


# Folders


def test_a_sample_is_a_run_of_bytes_and_the_bytes_one_place_further(folders):
    found = data.text_folders(folders, length=16)
    assert isinstance(found, Dataset)
    assert (found.num_classes, found.input_shape, found.group_names) == (256, (16,), ("de", "en", "ja"))
    for inputs, targets in ((found.train_inputs, found.train_labels), (found.test_inputs, found.test_labels)):
        assert (inputs.dtype, targets.dtype) == (torch.int64, torch.int64)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    texts = [b"".join(bytes_of(found.train_inputs[part])) for part in found.parts]
    for name, own in zip(found.group_names, texts, strict=True):
        assert SENTENCES[name].encode()[:8] in own
        assert f"{name}: ".encode() in own  # of the compressed file
        assert not any(f"{other}: ".encode() in own for other in SENTENCES if other != name)


def test_training_and_test_samples_are_all_the_text_without_overlap(folders):
    found = data.text_folders(folders, length=16, test_fraction=0.25)
    for group, name in enumerate(found.group_names):
        whole = sum(
            len(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
            for path in (folders / name / "a.txt", folders / name / "more" / "b.1.gz")
        )
        count = (whole - 1) // 16
        assert len(found.parts[group]) == count - round(0.25 * count)
    total = len(found.train_labels) + len(found.test_labels)
    assert len(found.test_labels) == pytest.approx(total / 4, abs=2)


def test_the_seed_draws_the_split_and_the_order_of_the_files(folders):
    first, again, other = (data.text_folders(folders, length=16, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.train_inputs, again.train_inputs)
    assert torch.equal(first.test_labels, again.test_labels)
    assert not torch.equal(first.test_inputs, other.test_inputs)
    starts = {
        bytes(data.text_folders(folders, length=2, test_fraction=0.01, seed=seed).train_inputs[0].tolist())
        for seed in range(20)
    }
    assert {b"da", b"de"} <= starts  # either file of the first folder may come first


def test_no_more_than_max_bytes_are_taken_of_a_folder_nor_decompressed(folders):
    (folders / "en" / "bomb.gz").write_bytes(gzip.compress(b"x" * (64 << 20)))
    found = data.text_folders(folders, length=10, max_bytes=1001)
    assert [len(part) for part in found.parts] == [90, 90, 90]
    assert "3,003 bytes" in found.source


def test_links_and_hidden_names_are_left_out(folders, tmp_path):
    before = data.text_folders(folders, length=16)
    (tmp_path / "secret").write_text("never " * 1000)
    (folders / "en" / "link").symlink_to(tmp_path / "secret")
    (folders / "en" / "folder").symlink_to(tmp_path)
    (folders / "everything").symlink_to(folders)
    (folders / "en" / ".hidden").write_text("never " * 1000)
    (folders / ".git").mkdir()
    (folders / "README").write_text("no folder")
    after = data.text_folders(folders, length=16)
    assert after.group_names == before.group_names
    assert torch.equal(after.train_inputs, before.train_inputs)


def test_folders_without_enough_text_are_named(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.text_folders(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=r"empty has no folders; expected a folder of text for each agent"):
        data.text_folders(tmp_path / "empty")
    with pytest.raises(FileError, match=r"folder de has .* bytes of text in 2 files, 1 samples of 2048 bytes"):
        data.text_folders(folders, length=2048)
    (folders / "nothing").mkdir()
    with pytest.raises(FileError, match=r"folder nothing has 0 bytes of text in 0 files, 0 samples of 64 bytes"):
        data.text_folders(folders)


@pytest.mark.parametrize("damage", [lambda content: content[:-20], lambda content: b"x" + content, lambda _: b"text"])
def test_a_damaged_compressed_file_is_named(folders, damage):
    path = folders / "en" / "more" / "b.1.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FileError, match=r"b\.1\.gz is no whole gzip file .*; remove or replace it"):
        data.text_folders(folders)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": 0}, ValueError, "length must be at least 1, got 0"),
        ({"length": 8.0}, TypeError, "length must be an integer, got 8.0"),
        ({"test_fraction": 1}, ValueError, "test_fraction must be between 0 and 1, got 1"),
        ({"test_fraction": "half"}, TypeError, "test_fraction must be a number, got 'half'"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"max_bytes": 0}, ValueError, "max_bytes must be at least 1, got 0"),
    ],
)
def test_bad_options_of_text_are_named(folders, options, error, message):
    with pytest.raises(error, match=message):
        data.text_folders(folders, **options)


# Manual pages


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Lists of installed packages of manual pages, and their pages."""
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(text, "DPKG_INFO", tmp_path / "info")
    (tmp_path / "info").mkdir()
    for name, package in text.LANGUAGES.items():
        page = tmp_path / "share" / "man" / name / "man1" / "tool.1.gz"
        page.parent.mkdir(parents=True)
        page.write_bytes(gzip.compress(f"A page in {name}. ".encode() * 1000))
        other = tmp_path / "share" / "doc" / package / "copyright.gz"
        (tmp_path / "info" / f"{package}.list").write_text(f"/.\n{page.parent}\n{page}\n{other}\n")
    return tmp_path


def test_the_manual_pages_are_those_of_the_installed_packages(packages):
    found = data.load("manpages")
    assert (found.name, found.group_names) == ("manpages", ("en", "de", "es", "fr", "ja", "nl", "pl", "ru"))
    for name, part in zip(found.group_names, found.parts, strict=True):
        assert f"page in {name}. ".encode() in bytes_of(found.train_inputs[part])[0] * 2
    assert "of 8 files" in found.source
    assert not torch.equal(data.load("manpages", seed=1).test_inputs, data.load("manpages", seed=2).test_inputs)


def test_missing_manual_pages_say_how_to_get_them(packages):
    page = packages / "share" / "man" / "ja" / "man1" / "tool.1.gz"
    page.unlink()
    with pytest.raises(FileNotFoundError, match=r"manpages-ja is installed without its pages.*--path-include=.*-ja`"):
        data.load("manpages")
    (packages / "info" / "manpages-ja.list").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"package manpages-ja is not installed; get it by `apt-get install man"
    ):
        data.load("manpages")


def test_a_folder_of_languages_takes_the_place_of_the_packages(packages, languages, tmp_path):
    assert data.load("manpages", folder=languages).source.startswith(str(languages))
    assert data.load("manpages").source.startswith(str(languages))  # by the environment variable
    with pytest.raises(FileNotFoundError, match="has no folders en, de, es, fr, ja, nl, pl, ru; copy text"):
        data.load("manpages", folder=tmp_path / "share")


# Data sets with groups


def test_groups_are_checked():
    labels, groups = torch.zeros(3, 4, dtype=torch.int64), torch.tensor([0, 1, 1])
    make = lambda **given: Dataset("mine", 2, labels, labels, labels, labels, augmentation=None, **given)  # noqa: E731
    assert make(train_groups=groups, group_names=("a", "b")).num_groups == 2
    with pytest.raises(ValueError, match="train_labels must be a 1-D int64 tensor, or of more dimensions beside"):
        make()
    with pytest.raises(ValueError, match="train_groups and group_names go together"):
        make(group_names=("a", "b"))
    for bad in (groups[:2], groups.float(), groups - 1, torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2])):
        with pytest.raises(ValueError, match=r"train_groups must be an int64 tensor .* each of 0 … 1 at least once"):
            make(train_groups=bad, group_names=("a", "b"))


def test_validation_samples_are_drawn_of_every_group(folders):
    found = data.text_folders(folders, length=16)
    held = found.with_validation(0.2, seed=3)
    assert held.train_groups.bincount().tolist() == [len(part) - round(0.2 * len(part)) for part in found.parts]
    assert len(held.train_labels) + len(held.test_labels) == len(found.train_labels)


def test_a_simulator_gives_each_agent_its_folder(folders):
    ring = gf.topology.ring(3)
    found = data.text_folders(folders, length=16)
    model = models.Transformer(256, 16, width=16, num_layers=1)

    def simulate(engine, **given):
        torch.manual_seed(0)
        simulator = gf.Simulator(
            model,
            ring,
            optimizer=lambda parameters: gf.GUT(parameters, lr=0.1, topology=ring),
            batch_size=4,
            engine=engine,
            **given,
        )
        return simulator.run(4, progress=False)

    history = simulate("loop", data=found)
    listed = [(found.train_inputs[part], found.train_labels[part]) for part in found.parts]
    same = simulate("loop", data=listed, test_data=(found.test_inputs, found.test_labels))
    assert history == same
    assert history[-1]["test_loss"] < math.log(256)
    vectorized = simulate("vmap", data=found)
    assert vectorized[-1]["test_loss"] == pytest.approx(history[-1]["test_loss"], rel=1e-5)
    assert vectorized[-1]["consensus_error"] == pytest.approx(history[-1]["consensus_error"], rel=1e-3)


def test_a_simulator_needs_as_many_agents_as_folders(folders):
    ring = gf.topology.ring(4)
    found, model = data.text_folders(folders), models.Transformer(256, 64, width=16, num_layers=1)
    with pytest.raises(ValueError, match=r"ring\(4\) has 4 agents, the model 4 and the data 3 parts"):
        gf.Simulator(model, ring, optimizer=lambda p: gf.DSGD(p, lr=0.1, topology=ring), data=found, batch_size=2)


# The transformer


def test_the_transformer_looks_at_no_later_token():
    torch.manual_seed(0)
    model = models.build("transformer:32:2", (12,), 50, tokens=True)
    tokens = torch.randint(50, (3, 12))
    outputs = model(tokens)
    assert outputs.shape == (3, 50, 12)
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 50
    assert torch.equal(model(changed)[..., :7], outputs[..., :7])
    assert not torch.allclose(model(changed)[..., 7:], outputs[..., 7:])
    torch.testing.assert_close(model(tokens[:, :5]), outputs[..., :5])
    earlier = tokens.clone()
    earlier[:, 0] = (earlier[:, 0] + 1) % 50
    assert (model(earlier) - outputs).abs().amax((0, 1)).min() > 0  # every place hears of the first token


def test_the_transformer_has_the_size_that_it_says():
    sizes = {"transformer": 86_656, "transformer:64:2": 86_656, "transformer:32:1": 18_624}
    for spec, expected in sizes.items():
        model = models.build(spec, (64,), 256, tokens=True)
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_the_transformer_begins_near_uniform_and_learns_a_text_by_heart():
    torch.manual_seed(0)
    model = models.Transformer(256, 16, width=32, num_layers=2)
    text_tokens = torch.tensor(list(b"to be or not to be, that is the question"))
    inputs, targets = (text_tokens[start : start + 32].view(2, 16) for start in (0, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(256), rel=0.05)
    assert losses[-1] < 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.build("transformer:64", (8,), 256, tokens=True), "width and number of layers, for example"),
        (lambda: models.build("transformer:64:x", (8,), 256, tokens=True), "got 'transformer:64:x'"),
        (lambda: models.build("transformer:20:1", (8,), 256, tokens=True), "must be a multiple of 16"),
        (lambda: models.build("transformer:64:0", (8,), 256, tokens=True), "all sizes at least 1, got .*num_layers=0"),
        (lambda: models.build("transformer", (1, 8), 256, tokens=True), r"of shape \(length,\).*got shape \(1, 8\)"),
        (lambda: models.build("transformer", (8,), 256, "groupnorm", tokens=True), "having its own layer norm"),
        (lambda: models.build("transformer", (1, 8, 8), 10), "quantities, such as pixels; take one of mlp, lenet5"),
        (lambda: models.build("mlp", (8,), 256, tokens=True), "mlp .*numbers of tokens; take one of transformer"),
    ],
)
def test_bad_transformers_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Experiments


SMALL = {"model": "transformer:16:1", "batch_size": 2, "steps": 6, "eval_every": 3, "engine": "loop"}


def text_experiment(**changed):
    return make_experiment(presets.preset_settings("manpages-lm-ring8", "gut"), {**SMALL, **changed})


def test_the_language_preset_gives_each_agent_a_language(languages):
    (dsgd, gut) = (task.experiment for task in make_sweep({"preset": "manpages-lm-ring8"}).tasks())
    assert (dsgd.rule, gut.rule, gut.inner, gut.model) == ("dsgd", "gut", "AdamW", "transformer:64:2")
    counts = run.samples_per_class(gut)
    assert counts.shape == (8, 8)
    assert (counts > 0).sum(0).tolist() == (counts > 0).sum(1).tolist() == [1] * 8


def test_the_language_preset_trains(languages):
    experiment = text_experiment()
    found = train(experiment, make_simulator(experiment), progress=False)
    assert [row["step"] for row in found.history] == [3, 6]
    assert found.final["diverged_agents"] == 0
    assert found.final["test_loss"] < found.history[0]["test_loss"] < math.log(256) + 0.1
    assert 0 <= found.final["test_accuracy"] <= 1


def test_text_takes_partitions_and_validation_as_other_data_do(languages):
    mixed = text_experiment(partition="dirichlet", alpha=100.0, topology="ring:4", validation=0.25)
    counts = run.samples_per_class(mixed)
    assert counts.shape == (4, 8)
    assert (counts > 0).all()
    assert len(make_simulator(mixed).data.test_labels) > len(data.load("manpages").test_labels)


def test_what_does_not_go_with_text_is_said(languages):
    for changed, message in (
        ({"model": "lenet5"}, "lenet5 is not for these inputs, which are numbers of tokens; take one of transformer"),
        ({"augment": True}, "no usual random changes to samples of manpages"),
        ({"pool": 2}, "pooling by 2 is for images"),
    ):
        with pytest.raises(ValueError, match=message):
            make_simulator(text_experiment(**changed))


def test_the_commands_show_text(languages, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ("--topology", "ring:8", "--partition", "shards", "--classes-per-agent", "1")
    assert cli.main(["data", "manpages", *options]) == 0
    out = capsys.readouterr().out
    assert "en, de, es, fr, ja, nl, pl, ru, of" in out
    small = ("--model", "transformer:16:1", "--steps", "2", "--batch-size", "2", "--engine", "loop", "--threads", "1")
    assert cli.main(["train", "--preset", "manpages-lm-ring8", *small, "--out", "run"]) == 0
    out = capsys.readouterr().out
    assert "in nats a byte" in out
    assert "loss" in out


@pytest.mark.slow
def test_the_installed_manual_pages_are_learnt():
    try:
        data.load("manpages")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    run._pooled.cache_clear()
    experiment = make_experiment(
        {}, {**presets.preset_settings("manpages-lm-ring8", "gut"), "steps": 30, "eval_every": 30}
    )
    found = train(experiment, make_simulator(experiment), progress=False)
    assert found.final["test_loss"] < 4.2  # log 256 is 5.5; bytes alone have less than 4.2
