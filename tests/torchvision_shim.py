"""torchvision beside a torch for the CPU.

Registries have torchvision's wheel for CUDA only. Beside a CPU torch its compiled part cannot be loaded, and its import
fails at the operators that it describes. Their schemas are enough: data sets and transforms do not use them.
"""

import pytest
import torch

library = None


def torchvision_or_skip():
    """The package `torchvision`; skips the calling module's tests where it is not installed."""
    global library
    pytest.importorskip("PIL")
    try:
        return pytest.importorskip("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return pytest.importorskip("torchvision")
