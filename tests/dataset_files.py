"""Small files in exactly the formats of the published data sets."""

import gzip
import hashlib
import struct

import numpy as np
from PIL import Image


def random_bytes(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def labels_of(num_samples, num_classes=10):
    return (np.arange(num_samples) * 7 % num_classes).astype(np.uint8)


# MNIST and Fashion-MNIST


def idx(values):
    """An IDX file of unsigned bytes."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def mnist_like(num_train=40, num_test=20):
    """The content of the four files, by name."""
    return {
        "train-images-idx3-ubyte": idx(random_bytes((num_train, 28, 28), 1)),
        "train-labels-idx1-ubyte": idx(labels_of(num_train)),
        "t10k-images-idx3-ubyte": idx(random_bytes((num_test, 28, 28), 2)),
        "t10k-labels-idx1-ubyte": idx(labels_of(num_test)),
    }


def write(folder, files, compressed=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


# CIFAR: pickles that Python 2 and the numpy of its time have written


def python2_pickle(value):
    """`value` of dicts, lists, tuples, strings, small integers and arrays of bytes, as protocol 2 of Python 2."""
    return b"\x80\x02" + _pickled(value) + b"."


def _pickled(value):
    if isinstance(value, dict):
        return b"}(" + b"".join(_pickled(part) for item in value.items() for part in item) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_pickled, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_pickled, value)) + b"t"
    if isinstance(value, str | bytes):
        text = value.encode() if isinstance(value, str) else value
        return b"T" + struct.pack("<i", len(text)) + text
    if isinstance(value, np.ndarray):
        return _pickled_array(value)
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    return b"N" if value is None else b"J" + struct.pack("<i", value)


def _pickled_array(array):
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + _pickled((0,)) + _pickled("b") + b"tR"
    dtype = b"cnumpy\ndtype\n" + _pickled(("u1", 0, 1)) + b"R" + _pickled((3, "|", None, None, None, -1, -1, 0)) + b"b"
    return (
        empty + b"(" + _pickled(1) + _pickled(array.shape) + dtype + _pickled(False) + _pickled(array.tobytes()) + b"tb"
    )


def cifar10_like(num_samples=20):
    """The content of the seven files, by name."""
    batches = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    files = {
        name: python2_pickle(
            {
                "batch_label": name,
                "labels": labels_of(num_samples).tolist(),
                "data": random_bytes((num_samples, 3072), seed),
                "filenames": [f"{index}.png" for index in range(num_samples)],
            }
        )
        for seed, name in enumerate(batches)
    }
    meta = {"num_cases_per_batch": num_samples, "label_names": [f"class {label}" for label in range(10)]}
    return {**files, "batches.meta": python2_pickle(meta)}


def cifar100_like(num_train=100, num_test=100):
    """The content of the three files, by name."""
    sizes = {"train": num_train, "test": num_test}
    files = {
        name: python2_pickle(
            {
                "filenames": [f"{index}.png" for index in range(size)],
                "batch_label": name,
                "fine_labels": labels_of(size, 100).tolist(),
                "coarse_labels": labels_of(size, 20).tolist(),
                "data": random_bytes((size, 3072), seed),
            }
        )
        for seed, (name, size) in enumerate(sizes.items())
    }
    names = [f"fine {label}" for label in range(100)]
    return {**files, "meta": python2_pickle({"fine_label_names": names, "coarse_label_names": names[:20]})}


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


# Imagenette


def write_imagenette(folder, classes, sizes):
    """Photographs of many shapes, some of them gray, in a folder for each class of each split."""
    for split, per_class in sizes.items():
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for index in range(per_class):
                seed = 100 * label + index
                pixels = random_bytes((48 + 4 * index, 80 - 8 * index, 3), seed)
                image = Image.fromarray(pixels if index else pixels[:, :, 0])
                image.save(folder / split / name / f"{name}_{index}.JPEG", "JPEG")
    return folder
