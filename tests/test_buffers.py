"""Flat buffers: distinct page offsets, and segments as views."""

import copy

import pytest
import torch

from gut_fast.kernels.buffers import FlatState, allocate, segment_views


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_elements", [0, 1, 4097, 2_500_000])
def test_allocate(num_elements, dtype):
    flat = allocate(num_elements, dtype)
    assert flat.shape == (num_elements,)
    assert flat.dtype == dtype
    assert not flat.any()
    assert flat.data_ptr() % 64 == 0 or num_elements == 0
    flat.fill_(3)
    twin = copy.deepcopy(flat)
    flat.zero_()
    assert (twin == 3).all()


@pytest.mark.parametrize("num_elements", [100_000, 2_000_000])
def test_buffers_allocated_together_start_at_different_offsets_of_a_page(num_elements):
    offsets = {allocate(num_elements, torch.float32).data_ptr() % 4096 for _ in range(7)}
    assert len(offsets) == 7


def test_allocate_on_another_device():
    assert allocate(10, torch.float32, "meta").device.type == "meta"


def test_segment_views_are_agent_major_blocks():
    flat = torch.arange(30.0)
    first, second, scalar = segment_views(flat, 3, [(2, 3), (3,), ()])
    assert first.shape == (3, 2, 3)
    assert torch.equal(first[1].flatten(), flat[6:12])
    assert torch.equal(second[2], flat[24:27])
    assert torch.equal(scalar, flat[27:])
    first[0, 0, 0] = -1
    assert flat[0] == -1


def test_segments_must_fill_the_buffer():
    with pytest.raises(ValueError, match=r"3 agents of shapes \[\(2,\)\] need 6 elements, the buffer has 7"):
        segment_views(torch.zeros(7), 3, [(2,)])


def test_state_that_does_not_fit_is_refused_before_anything_changes():
    parameters = [torch.zeros(2, 3), torch.zeros(2, 4)]
    flat = FlatState(parameters, ["r"], torch.float32)
    state = {parameter: {} for parameter in parameters}
    flat.adopt(state)
    state[parameters[0]]["r"] = torch.ones(2, 3)
    state[parameters[1]]["r"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"state 'r' of a parameter must be a tensor \(2, 4\), got \(4,\)"):
        flat.adopt(state)
    assert not flat.buffers[0].any()
