"""What the extension refuses to touch: every function is told how far the memory of its tensors reaches."""

from __future__ import annotations

import pytest
import torch
from native_calls import raw_attention, raw_attention_bwd
from test_backends import run_python

import vlmkern

report = vlmkern.backends()["native"]
pytestmark = pytest.mark.skipif(not report["available"], reason=report.get("reason", ""))


def calls():
    """name -> (call(extents, threads), its tensors by name), each with memory of exactly the size that is needed."""
    from vlmkern import _C

    q, grad, out, dq = (torch.randn(1, 20, 2, 8) for _ in range(4))
    k, v, dk, dv = (torch.randn(1, 30, 1, 8) for _ in range(4))
    lse, tables = torch.zeros(2, 20), [torch.randn(n, 4) for n in (20, 20, 30, 30)]
    bounds, bounds_k = (torch.tensor(b).int() for b in ([0, 7, 20], [0, 9, 30]))
    of_keys = {"cu_seqlens": bounds, "cu_seqlens_k": bounds_k} | dict(
        zip(("cos", "sin", "cos_k", "sin_k"), tables, strict=True)
    )

    def asked(threads, extents):
        return {
            "sizes": (1, 20, 30, 2, 1, 8),
            "bounds": (bounds.data_ptr(), bounds_k.data_ptr(), 2),
            "scoring": (1.0, 2.0, -1, 0),
            "tables": ([(t.data_ptr(), 0, 4) for t in tables], False),
            "threads": threads,
            "extents": extents,
        }

    def heads(**tensors):
        return {name: (t.data_ptr(), t.stride()[:3]) for name, t in tensors.items()}

    x, weight, bias, y = torch.randn(2, 12), torch.randn(5, 12), torch.randn(5), torch.randn(2, 5)
    up, hidden, d_hidden, d_up = torch.randn(3, 26), torch.randn(3, 13), torch.randn(3, 13), torch.randn(3, 26)

    rows, others, normed, summed, d_rows = (torch.randn(3, 2, 9) for _ in range(5))
    scale, shift, d_scale, d_shift = (torch.randn(9) for _ in range(4))
    head, d_head, turned = (torch.randn(3, 2, 8) for _ in range(3))
    of_heads, cos, sin = (0, False, (1, 3, 2, 8)), torch.randn(3, 4), torch.randn(3, 4)
    rotary = ((cos.data_ptr(), 4), (sin.data_ptr(), 4), 3, 2, False)

    first, second = torch.randn(2, 15, 6), torch.randn(2, 15, 6)
    pad, pad_embed = torch.zeros(2, 15, dtype=torch.uint8), torch.randn(2, 12)
    keep = torch.arange(12)
    features = {"features[0]": first, "features[1]": second, "pad": pad, "pad_embed": pad_embed, "keep": keep}
    mean, pooled, pool_q, context = (torch.randn(12, n) for n in (12, 12, 6, 4))
    w_k, w_v, b_v = torch.randn(6, 12), torch.randn(4, 12), torch.randn(4)
    slots, d_slots = torch.randn(12, 4, 6), torch.zeros(12, 4, 6)
    a, b = torch.randn(12, 6), torch.randn(12, 6)

    def pool(extents=()):
        shapes = [(t.data_ptr(), t.stride(0), t.stride(1)) for t in (first, second)]
        places = (pad.data_ptr(), pad_embed.data_ptr(), keep.data_ptr())
        return _C.AttentionPool(0, shapes, 2, 6, (3, 5), (2, 2), *places, 12, extents)

    def at(*tensors):
        return [t.data_ptr() for t in tensors]

    def in_rows(*tensors):
        return [(t.data_ptr(), (0, 18, 9)) for t in tensors]

    return {
        "attention_fwd": (
            lambda e, n: _C.attention_fwd(
                0, **heads(q=q, k=k, v=v), out=out.data_ptr(), lse=lse.data_ptr(), **asked(n, e)
            ),
            {"q": q, "k": k, "v": v, "out": out, "lse": lse, **of_keys},
        ),
        "attention_bwd": (
            lambda e, n: _C.attention_bwd(
                0,
                **heads(grad=grad, q=q, k=k, v=v, out=out),
                lse=lse.data_ptr(),
                dq=dq.data_ptr(),
                dk=dk.data_ptr(),
                dv=dv.data_ptr(),
                **asked(n, e),
            ),
            {"grad": grad, "q": q, "k": k, "v": v, "out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, **of_keys},
        ),
        "linear_few_rows": (
            lambda e, n: _C.linear_few_rows(0, x.data_ptr(), 12, weight.data_ptr(), 12, *at(bias, y), 2, 12, 5, n, e),
            {"x": x, "weight": weight, "bias": bias, "y": y},
        ),
        "quick_gelu": (lambda e, n: _C.quick_gelu(0, y.data_ptr(), 10, n, e), {"x": y}),
        "norm_fwd": (
            lambda e, n: _C.norm_fwd(
                0, True, (1, 3, 2, 9), *in_rows(rows, others), *at(scale, shift, normed, summed), 1e-6, 0.0, n, e
            ),
            {"x": rows, "residual": others, "weight": scale, "bias": shift, "normed": normed, "summed": summed},
        ),
        "norm_bwd": (
            lambda e, n: _C.norm_bwd(
                *(0, True, (1, 3, 2, 9), *in_rows(normed, others, rows)),
                *(*at(scale, d_rows, d_scale, d_shift), 1e-6, 0.0, n, e),
            ),
            {"grad": normed, "grad_summed": others, "summed": rows, "weight": scale}
            | {"d_x": d_rows, "d_weight": d_scale, "d_bias": d_shift},
        ),
        "norm_fwd.rotary": (
            lambda e, n: _C.norm_fwd(
                *(*of_heads, (head.data_ptr(), (0, 16, 8)), (0, (0, 0, 0)), scale.data_ptr(), 0),
                *(turned.data_ptr(), 0, 1e-6, 0.0, n, e, rotary),
            ),
            {"x": head, "residual": None, "weight": scale[1:], "bias": None, "normed": turned, "summed": None}
            | {"cos": cos, "sin": sin},
        ),
        "norm_bwd.rotary": (
            lambda e, n: _C.norm_bwd(
                *(*of_heads, (turned.data_ptr(), (0, 16, 8)), (0, (0, 0, 0)), (head.data_ptr(), (0, 16, 8))),
                *(scale.data_ptr(), d_head.data_ptr(), 0, 0, 1e-6, 0.0, n, e, rotary),
            ),
            {"grad": turned, "grad_summed": None, "summed": head, "weight": scale[1:], "d_x": d_head}
            | {"d_weight": None, "d_bias": None, "cos": cos, "sin": sin},
        ),
        "silu_mul_fwd": (
            lambda e, n: _C.silu_mul_fwd(0, up.data_ptr(), 26, hidden.data_ptr(), 3, 13, n, e),
            {"up": up, "out": hidden},
        ),
        "silu_mul_bwd": (
            lambda e, n: _C.silu_mul_bwd(0, *at(d_hidden, up), 26, *at(d_up, hidden), 3, 13, n, e),
            {"grad": d_hidden, "up": up, "grad_up": d_up, "hidden": hidden},
        ),
        "pool": (lambda e, n: pool(e).mean(mean.data_ptr(), n), features),
        "pool.mean": (lambda e, n: pool().mean(mean.data_ptr(), n, e), {"mean": mean}),
        "pool.slots": (lambda e, n: pool().slots(*at(mean, pooled), 1.0, n, e), {"q": mean, "pooled": pooled}),
        "pool.context": (
            lambda e, n: pool().context(*at(pool_q, w_k, w_v, b_v, context), 2, 3, 2, 1.0, n, e),
            {"q": pool_q, "w_k": w_k, "w_v": w_v, "b_v": b_v, "context": context},
        ),
        "attention_pool_slots_bwd": (
            lambda e, n: _C.attention_pool_slots_bwd(
                0, slots.data_ptr(), [at(a, b)], d_slots.data_ptr(), 12, 4, 6, 1.0, n, e
            ),
            {"x": slots, "dx": d_slots, r"vectors[0]": a, "vectors[0] ": b},
        ),
    }


NAMES = (
    "attention_fwd",
    "attention_bwd",
    "linear_few_rows",
    "quick_gelu",
    "norm_fwd",
    "norm_bwd",
    "norm_fwd.rotary",
    "norm_bwd.rotary",
    "silu_mul_fwd",
    "silu_mul_bwd",
    "pool",
    "pool.mean",
    "pool.slots",
    "pool.context",
    "attention_pool_slots_bwd",
)


@pytest.mark.parametrize("name", NAMES)
def test_memory_that_ends_too_early(name):
    """One element less than a tensor's sizes and strides reach is refused, by its name, and nothing is written."""
    from vlmkern.dispatch.extension import extents

    call, tensors = calls()[name]
    given = extents(*tensors.values())
    before = {key: t.clone() for key, t in tensors.items() if t is not None}
    for index, key in enumerate(tensors):
        if tensors[key] is None:
            continue
        short = list(given)
        short[index] -= 1
        with pytest.raises(ValueError) as error:
            call(short, 1)
        assert f"{key.strip()}: got memory of {short[index]} elements, expected {given[index]}" in str(error.value)
        assert all(torch.equal(tensors[key], t) for key, t in before.items())
    with pytest.raises(ValueError, match="extents: got"):
        call([*given, 1], 1)
    call(given, 1)
    call((), 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threads", [0, -1, -(2**31)])
def test_fewer_than_one_thread(name, threads):
    call, _ = calls()[name]
    with pytest.raises(ValueError, match=f"threads: got {threads}, expected at least 1"):
        call((), threads)


@pytest.mark.parametrize("name", NAMES)
def test_more_threads_than_there_is_work(name):
    call, _ = calls()[name]
    call((), 2**31 - 1)


def test_tensors_shorter_than_the_first():
    """The functions of the native providers trust their callers with shapes; the extension does not."""
    from native_calls import attention, attention_bwd, attention_pool

    q, short = torch.randn(1, 40, 2, 8), torch.randn(1, 30, 2, 8)
    with pytest.raises(ValueError, match="v: got memory of 480 elements, expected 640"):
        attention(q, q, short, 1.0, None, None)
    with pytest.raises(ValueError, match="v: got memory of"):
        attention(q, q, torch.randn(1, 40, 2, 7), 1.0, None, None)
    with pytest.raises(ValueError, match="lse: got memory of"):
        attention_bwd(q, q, q, q, q, torch.zeros(1, 2, 30), 1.0, None, None)
    weights = (torch.randn(4, 6), None, torch.randn(8, 6), None, torch.randn(3, 4), None)
    with pytest.raises(ValueError, match=r"features\[1\]: got memory of"):
        attention_pool([torch.randn(1, 16, 3), torch.randn(1, 16, 2)], *weights, [4, 4], 2, [2, 2], None, None, None)


@pytest.mark.parametrize("tokens, heads, head_dim", [(2**44, 1, 8), (2**44, 16, 1), (2**46, 1, 1)])
def test_scratch_beyond_all_memory(tokens, heads, head_dim):
    """Sizes that strides of zero make possible, whose packed keys and values no address space holds."""
    from vlmkern import _C

    still = (64, (0, 0, 0))
    sizes = {"sizes": (1, tokens, tokens, heads, heads, head_dim), "threads": 2**31 - 1}
    with pytest.raises(MemoryError):
        _C.attention_fwd(**raw_attention(**dict.fromkeys("qkv", still), **sizes))
    with pytest.raises(MemoryError):
        _C.attention_bwd(**raw_attention_bwd(**dict.fromkeys(("grad", "q", "k", "v", "out"), still), **sizes))


@pytest.mark.parametrize(
    "window, sizes, message",
    [
        ((2**20, 2**20), (2, 3, 3), "window: too large"),
        ((2, 2), (2**46, 1, 1), "scores: too large"),
        ((2, 2), (2, 2**48, 1), "weights: too large"),
    ],
)
def test_pool_sizes_that_no_scratch_holds(window, sizes, message):
    from vlmkern import _C

    problem = _C.AttentionPool(0, [(64, 1, 1)], 1, 1, (1, 1), window, 0, 0, 0, 1)
    with pytest.raises(ValueError, match=message):
        problem.context(64, 64, 64, 0, 64, *sizes, 1.0, 1)


def test_strides_of_single_entries_are_never_followed():
    from vlmkern import _C

    q, expected, out, lse = torch.randn(3, 1, 1, 1, 8), torch.empty(8), torch.empty(8), torch.empty(1)
    for strides, result in (((8, 8, 8), expected), ((2**62, -(2**62), 2**63 - 1), out)):
        tensors = {name: (t.data_ptr(), strides) for name, t in zip("qkv", q, strict=True)}
        places = {"out": result.data_ptr(), "lse": lse.data_ptr()}
        _C.attention_fwd(**raw_attention(**tensors, **places, sizes=(1, 1, 1, 1, 1, 8)))
    assert torch.equal(out, expected) and torch.equal(out, q[2].flatten())
    x, weight, y = torch.randn(8), torch.randn(8), torch.zeros(1)
    _C.linear_few_rows(0, x.data_ptr(), -(2**62), weight.data_ptr(), 2**62, 0, y.data_ptr(), 1, 8, 1, 1)
    torch.testing.assert_close(y[0], x @ weight)
    up, hidden = torch.randn(1, 8), torch.zeros(1, 4)
    _C.silu_mul_fwd(0, up.data_ptr(), 2**63 - 1, hidden.data_ptr(), 1, 4, 1)
    torch.testing.assert_close(hidden, torch.nn.functional.silu(up[:, 4:]) * up[:, :4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_at_odd_addresses(dtype):
    """Memory of other programs need not be aligned: the results are those of aligned copies."""
    from native_calls import attention, attention_bwd, attention_pool, linear, silu_mul

    def odd(t):
        memory = torch.frombuffer(bytearray(t.nbytes + 16), dtype=torch.uint8)
        at = 1 - memory.data_ptr() % 2
        memory[at : at + t.nbytes] = t.contiguous().view(torch.uint8).flatten()
        return torch.frombuffer(memory.numpy(), dtype=t.dtype, count=t.numel(), offset=at).view(t.shape)

    q, k, v, grad = torch.randn(4, 50, 2, 19).to(dtype).unbind(0)
    out, lse = attention(q, k, v, 0.3, None, None)
    up, x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((3, 38), (2, 37), (9, 37), (9,)))
    features = torch.randn(1, 15, 20).to(dtype)
    weights = [torch.randn(*shape).to(dtype) for shape in ((6, 20), (10, 20), (3, 4))]
    pad_embed, mask, keep = torch.randn(2, 20).to(dtype), torch.rand(1, 15), torch.tensor([5, 0, 3])
    bounds = torch.tensor([0, 11, 50], dtype=torch.int32)

    def run(move):
        at = [move(t) for t in (q, k, v)]
        w_q, w_kv, w_o = map(move, weights)
        return [
            *attention(*at, 0.3, move(bounds), 39),
            *attention_bwd(move(grad), *at, move(out), move(lse), 0.3, None, None),
            silu_mul(move(up)),
            linear(move(x), move(weight), move(bias), "none", None),
            attention_pool(
                [move(features)], w_q, None, w_kv, None, w_o, None, [3, 5], 2, [2, 2], move(pad_embed), mask, move(keep)
            ),
        ]

    assert odd(q).data_ptr() % 2 == 1
    assert all(map(torch.equal, run(odd), run(torch.clone)))


# another thread writes while the call runs, so that what is read twice is not the same twice
CHANGING = """
import threading
import torch
from native_calls import raw_attention
from vlmkern import _C

stop = threading.Event()


def change(values, good, bad):
    while not stop.is_set():
        values[1] = bad
        values[1] = good


def run(values, good, bad, call):
    thread = threading.Thread(target=change, args=(values, good, bad))
    thread.start()
    seen = {"done": 0, "refused": 0}
    try:
        while min(seen.values()) < 20 and sum(seen.values()) < 5000:
            try:
                call()
                seen["done"] += 1
            except ValueError:
                seen["refused"] += 1
    finally:
        stop.set()
        thread.join()
    stop.clear()
    print(seen)


q = torch.randn(1, 256, 2, 16)
out, lse, bounds = torch.empty(256, 2, 16), torch.empty(2, 256), torch.tensor([0, 3, 256], dtype=torch.int32)
tensors = dict.fromkeys("qkv", (q.data_ptr(), q.stride()[:3]))
given = raw_attention(**tensors, out=out.data_ptr(), lse=lse.data_ptr(), sizes=(1, 256, 256, 2, 2, 16),
                      bounds=(bounds.data_ptr(), 0, 2))
run(bounds.numpy(), 3, 2**31 - 1, lambda: _C.attention_fwd(**given))

x, mean, keep = torch.randn(1, 1024, 64), torch.empty(4096, 64), torch.arange(4096) % 256
pad = torch.zeros(1024, dtype=torch.uint8)
problem = _C.AttentionPool(0, [(x.data_ptr(), x.stride(0), x.stride(1))], 1, 64, (32, 32), (2, 2), 0, 0,
                           keep.data_ptr(), 4096)
run(keep.numpy(), 3, 2**40, lambda: problem.mean(mean.data_ptr(), 1))
"""


def test_values_that_change_after_they_were_checked():
    result = run_python(CHANGING)
    assert result.returncode == 0, result.stderr or result.returncode
