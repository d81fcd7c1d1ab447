"""What tools override of how kernels are launched is theirs: of one thread, and for as long as they say."""

from __future__ import annotations

import threading

import pytest
import torch

pytest.importorskip("triton")

from vlmkern import aot
from vlmkern.kernels import _launch
from vlmkern.kernels.swiglu_mlp import gate

NAME = "silu_mul_fwd_kernel"
MINE = {"BLOCK": 64, "num_warps": 1}


def chosen():
    return _launch.select(NAME, torch.empty(1, device="meta"), rows=16, features=6144)


def in_another_thread(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def test_overrides_belong_to_a_thread():
    shipped = chosen()
    with _launch.forced(NAME, MINE), _launch.recording(80) as launches:
        assert chosen() == MINE and in_another_thread(chosen) == shipped
        gate.silu_mul(torch.empty(16, 2 * 64, device="meta"))

        def records_its_own():
            with _launch.recording(90) as others:
                gate.silu_mul(torch.empty(16, 2 * 64, device="meta"))
            return others

        assert len(in_another_thread(records_its_own)) == 1
    assert len(launches) == 1 and launches[0].constants["BLOCK"] == 64
    assert chosen() == shipped


def test_overrides_end_with_their_blocks():
    shipped = chosen()
    with _launch.forced(NAME, MINE):
        with pytest.raises(RuntimeError), _launch.forced(NAME, {"BLOCK": 128}), _launch.recording(80):
            raise RuntimeError
        assert chosen() == MINE
    assert chosen() == shipped


def test_plans_made_under_overrides_are_not_kept():
    calls = []

    @_launch.planned
    def plan(size):
        calls.append(size)
        return _launch.select(NAME, torch.empty(1, device="meta"), rows=size, features=6144)["BLOCK"]

    shipped = plan(16)
    with _launch.forced(NAME, MINE):
        assert [plan(16), plan(16)] == [64, 64]
    assert plan(16) == shipped and calls == [16, 16, 16]


def test_a_descriptor_is_the_one_that_its_constructor_makes():
    from triton.tools.tensor_descriptor import TensorDescriptor

    tensors = torch.randn(2, 4, 96, dtype=torch.bfloat16)[..., :72].unbind(0)
    like = _launch.descriptor_like(torch.bfloat16, [4, 72], [96, 1], [2, 64])
    made = [_launch.descriptor(like, x) for x in tensors]
    for x, ours in zip(tensors, made, strict=True):
        theirs = TensorDescriptor(x, [4, 72], [96, 1], [2, 64])
        assert type(ours) is TensorDescriptor and ours.base is x and vars(ours) == vars(theirs)


@pytest.mark.parametrize("strides, block", [([97, 1], [2, 64]), ([96, 2], [2, 64]), ([96, 1], [2, 72])])
def test_descriptors_are_checked_before_there_is_a_tensor(strides, block):
    with pytest.raises((AssertionError, ValueError)):
        _launch.descriptor_like(torch.bfloat16, [4, 72], strides, block)


def test_launches_compare_no_globals():
    """Triton compares what a kernel imports by name with what it was, at every launch."""
    compared = {}
    for kernel in aot.kernels():
        # which makes Triton look for them
        assert kernel.function.cache_key
        compared[kernel.name] = [name for name, _ in kernel.function.used_global_vals]
    assert len(compared) > 10 and not any(compared.values()), compared
