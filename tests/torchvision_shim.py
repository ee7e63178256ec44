"""torchvision beside a torch for the CPU.

Registries have torchvision's wheel for CUDA only. Beside a CPU torch its compiled part cannot be loaded, and its import
fails at the operators that it describes. Their schemas are enough: data sets and transforms do not use them.
"""

import pytest
import torch

library = None


def mend_torchvision():
    """Makes `torchvision` importable, for what imports it on its own; does nothing where it is not installed."""
    global library
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def torchvision_or_skip():
    """The package `torchvision`; skips the calling module's tests where it is not installed."""
    pytest.importorskip("PIL")
    mend_torchvision()
    return pytest.importorskip("torchvision")
