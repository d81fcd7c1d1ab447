"""What attention's kernels take beyond equal lengths and heads compiles for every target, and on sm_90 without
spills, in the configurations that the tables give for each head dimension."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from vlmkern.aot import compile_launch, register_usage
from vlmkern.kernels import _launch
from vlmkern.kernels.attention import backward, forward

WINDOW = {"left": 256, "right": 32}
# causal and the like are in `vlmkern aot`: these beside it
FORMS = {
    "causal": {"right": 0},
    "causal_grouped_capped": {"right": 0, "heads_k": 8, "softcap": 50.0},
    "window_lengths": {**WINDOW, "keys": 900},
    "everything": {**WINDOW, "keys": 900, "heads_k": 4, "softcap": 30.0, "rotary": True, "scale": -0.1},
}


def launches(arch, head_dim, dtype, packed, *, keys=729, heads_k=16, rotary=False, scale=0.1, **options):
    """Those of a call and its gradients."""

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, k, v = empty(2, 729, 16, head_dim), *empty(2, keys, 2, heads_k, head_dim).unbind(2)
    if rotary:
        for name, tokens in (("", 729), ("_k", keys)):
            rows = 2 * tokens if packed else tokens
            options |= {f"{table}{name}": empty(rows, head_dim // 2, dtype=torch.float32) for table in ("cos", "sin")}
    bounds = [None] * 4
    if packed:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        bounds = [x for tokens in (729, keys) for x in (empty(3, dtype=torch.int32), tokens)]
        bounds = bounds if keys != 729 else [*bounds[:2], None, None]
    with _launch.recording(arch) as found:
        out, lse = forward.attention_fwd(q, k, v, scale, *bounds, **options)
        backward.attention_bwd(out, q, k, v, out, lse, scale, *bounds, **options)
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128, 256])
def test_no_spills_on_hopper(head_dim, form, packed):
    for launch in launches(90, head_dim, torch.bfloat16, packed, **FORMS[form]):
        _, local = register_usage(compile_launch(launch, 90).asm["cubin"])
        assert local == 0, launch.kernel.__name__


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_everything_for_every_target(arch, dtype):
    found = launches(arch, 72, dtype, True, **FORMS["everything"])
    # k is turned for the forward, q and k for the gradients, and these back
    assert len(found) == 2 + 2 + 2 + 2
    back = [launch.args[:2] for launch in found if launch.constants.get("BACK")]
    # rounded once
    assert [(x.dtype, turned.dtype) for x, turned in back] == [(torch.float32, dtype)] * 2
    for launch in found:
        compile_launch(launch, arch)


@pytest.mark.parametrize("queries, keys, heads", [(1, 1, 1), (1, 17, 4), (17, 1, 4)])
def test_sizes_of_one(queries, keys, heads):
    """Of which Triton makes constants, that some code cannot take."""
    q = torch.empty(1, queries, heads, 8, device="meta")
    k = torch.empty(1, keys, 1, 8, device="meta")
    angles = [torch.empty(n, 4, device="meta") for n in (queries, queries, keys, keys)]
    bounds = torch.empty(2, dtype=torch.int32, device="meta")
    for window in ((-1, 0), (1, 1), (0, -1), (-1, -1)):
        for packed in (False, True):
            args = (q[0], k[0], k[0], 1.0, bounds, queries, bounds, keys) if packed else (q, k, k, 1.0, *[None] * 4)
            with _launch.recording(90) as found:
                out, lse = forward.attention_fwd(*args, *window, 1.0, *angles)
                backward.attention_bwd(out, *args[:3], out, lse, *args[3:], *window, 1.0, *angles)
            for launch in found:
                compile_launch(launch, 90)
