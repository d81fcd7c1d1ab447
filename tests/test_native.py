"""The C++ extension itself: every instruction set by force, strides, threads, arguments it must refuse."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from native_calls import raw_attention, raw_attention_bwd
from test_backends import run_python

import vlmkern

report = vlmkern.backends()["native"]
pytestmark = pytest.mark.skipif(not report["available"], reason=report.get("reason", ""))

CHECK_ISA = """
import torch, vlmkern
from native_calls import silu_mul, silu_mul_bwd
def plain(up):
    value, gate = up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * value
def plain_bwd(grad, up):
    up = up.requires_grad_()
    hidden = plain(up)
    return torch.autograd.grad(hidden, up, grad)[0], hidden.detach()
torch.manual_seed(0)
special = torch.tensor(
    [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 6e-8, 65519.0, 65520.0, -65504.0, 3.3e38, -90.0, 90.0]
)
for dtype, rtol in ((torch.float32, 2e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
    for features in (1, 7, 8, 16, 31, 129):
        up = (torch.randn(5, 2 * features) * 5).to(dtype)
        torch.testing.assert_close(silu_mul(up), plain(up), rtol=rtol, atol=1e-6)
        grad = torch.randn(5, features).to(dtype)
        for actual, exact in zip(silu_mul_bwd(grad, up), plain_bwd(grad.double(), up.double())):
            limit = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 3e-3}[dtype]
            torch.testing.assert_close(actual.double(), exact, rtol=limit, atol=limit)
    up = torch.cat([torch.ones(len(special)), special]).to(dtype)[None]
    torch.testing.assert_close(silu_mul(up), plain(up), rtol=rtol, atol=1e-38, equal_nan=True)
    # values that must survive every load and store exactly: silu(100) is 100, so hidden = 100 * value / 100
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    if dtype != torch.float32:
        values = bits.view(dtype)[None]
        up = torch.cat([values, torch.full_like(values, 64.0)], 1)
        torch.testing.assert_close(silu_mul(up), plain(up), rtol=0, atol=0, equal_nan=True)

from native_calls import attention, attention_bwd
from native_calls import linear
import reference_calls as reference_attention
for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
    for tokens, dim in ((1, 1), (7, 8), (50, 72), (300, 80), (17, 33)):
        q, k, v = torch.randn(2, tokens, 3, 2, dim).to(dtype).unbind(2)
        out, lse = attention(q, k, v, dim**-0.5, None, None)
        exact, exact_lse = reference_attention.attention(q.double(), k.double(), v.double(), dim**-0.5, None, None)
        torch.testing.assert_close(out.double(), exact, rtol=limit, atol=limit)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=2e-3 if dtype == torch.bfloat16 else 1e-5)
        grad = torch.randn(2, tokens, 2, dim).to(dtype)
        bwd = reference_attention.attention_bwd
        inputs = [t.double() for t in (grad, q, k, v)]
        for actual, expected in zip(
            attention_bwd(grad, q, k, v, out, lse, dim**-0.5, None, None),
            bwd(*inputs, exact, exact_lse, dim**-0.5, None, None),
        ):
            torch.testing.assert_close(actual.double(), expected, rtol=2 * limit, atol=2 * limit)
    from native_calls import attention_pool_bwd
    import reference_calls as reference_pool
    tensors = [torch.randn(1, 15, 9), torch.randn(6, 9) / 3, torch.randn(14, 9) / 3, torch.randn(4, 8) / 3]
    f, w_q, w_kv, w_o = (t.to(dtype) for t in tensors)
    grad = torch.randn(1, 4, 4).to(dtype)
    options = ([3, 5], 2, [2, 3], None, None, None, [True] * 7)
    actual = attention_pool_bwd(grad, [f], w_q, None, w_kv, None, w_o, *options)
    f, w_q, w_kv, w_o, grad = (t.double() for t in (f, w_q, w_kv, w_o, grad))
    expected = reference_pool.attention_pool_bwd(grad, [f], w_q, None, w_kv, None, w_o, *options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2 * limit, atol=limit * (1 + e.abs().max().item()))
    for rows in (1, 2, 3, 4):
        x, weight, bias = (t.to(dtype) for t in (torch.randn(rows, 137), torch.randn(9, 137) / 12, torch.randn(9)))
        exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(linear(x, weight, bias, "none", None).double(), exact, rtol=limit, atol=limit)
print(vlmkern.backends()["native"]["isa"])
"""


@pytest.mark.parametrize("isa", [*report.get("isas", []), *report.get("emulated_isas", [])])
def test_every_usable_isa_by_force(isa):
    result = run_python(CHECK_ISA, VLMKERN_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == isa


TILES = """
import sys, torch, vlmkern
from vlmkern import ops

torch.manual_seed(0)
results = []
for tokens, dim in ((1, 1), (31, 7), (33, 72), (300, 80), (129, 256)):
    q, k, v = (t.detach().requires_grad_() for t in torch.randn(2, tokens, 3, 2, dim).bfloat16().unbind(2))
    out = ops.attention(q, k, v)
    results += [out, *torch.autograd.grad(out, (q, k, v), torch.randn_like(out))]
torch.save([r.detach() for r in results], sys.argv[1])
"""


@pytest.mark.skipif("amx_emulated" not in report.get("emulated_isas", []), reason="a build without emulated tiles")
def test_tiles_compute_what_vectors_do(tmp_path):
    """On plain C++, and where the CPU has AMX on its own tiles: the same source, against another's sums of pairs."""
    found = {}
    for isa in ("amx_emulated", *{"amx", "avx512_bf16"}.intersection(report["isas"])):
        result = run_python(f"import sys; sys.argv[1:] = [{str(tmp_path / isa)!r}]\n{TILES}", VLMKERN_CPU_ISA=isa)
        assert result.returncode == 0, result.stderr
        found[isa] = torch.load(tmp_path / isa)
    emulated = found.pop("amx_emulated")
    for others in found.values():
        for ours, theirs in zip(emulated, others, strict=True):
            # weights are rounded to bfloat16 on the way: a unit of the largest value's last place, here and there
            scale = max(1e-3, theirs.float().abs().max().item())
            torch.testing.assert_close(ours.float() / scale, theirs.float() / scale, rtol=0, atol=2**-7)


def test_isa_that_is_not_there():
    result = run_python("import vlmkern; print(vlmkern.backends()['native']['reason'])", VLMKERN_CPU_ISA="sse9")
    assert "VLMKERN_CPU_ISA=sse9: expected one of portable, avx2, avx512, avx512_bf16" in result.stdout
    code = "import torch, vlmkern\nwith vlmkern.use_backend('native'): pass"
    assert "BackendUnavailable" in run_python(code, VLMKERN_CPU_ISA="sse9").stderr


def test_row_stride():
    from native_calls import silu_mul

    wide = torch.randn(9, 50)
    up = wide[:, 3:37]
    value, gate = up.chunk(2, dim=-1)
    torch.testing.assert_close(silu_mul(up), torch.nn.functional.silu(gate) * value, rtol=1e-5, atol=1e-6)


def test_threads_change_no_bit():
    from native_calls import silu_mul

    up = torch.randn(333, 2 * 997)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(silu_mul(up))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_concurrent_calls():
    from native_calls import silu_mul

    inputs = [torch.randn(64, 2 * 513) for _ in range(16)]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(silu_mul, inputs))
    for up, out in zip(inputs, outputs, strict=True):
        assert torch.equal(out, silu_mul(up))


def test_writes_only_its_output():
    """Guards of NaN around the output stay."""
    extension = vlmkern.dispatch.extension.extension()
    up = torch.randn(3, 2 * 13)
    buffer = torch.full((3 * 13 + 32,), torch.nan)
    out = buffer[16:-16]
    extension.silu_mul_fwd(0, up.data_ptr(), 26, out.data_ptr(), 3, 13, 1)
    assert buffer[:16].isnan().all() and buffer[-16:].isnan().all() and out.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, 64, 26, 64, 3, 13, 1), "dtype"),
        ((0, 64, 26, 64, -1, 13, 1), "negative"),
        ((0, 64, 25, 64, 3, 13, 1), "up_stride: got 25, expected at least 2"),
        ((0, 64, 2**62, 64, 3, 13, 1), "up_stride"),
        ((0, 64, 2**63 - 1, 64, 1, 2**62, 1), "cols"),
        ((0, 0, 26, 64, 3, 13, 1), "null pointer"),
        ((0, 64, 0, 64, 2**62, 0, 1), "rows and cols: too large"),
    ],
)
def test_refuses_arguments_that_describe_no_memory(arguments, message):
    with pytest.raises(ValueError, match=message):
        vlmkern.dispatch.extension.extension().silu_mul_fwd(*arguments)


TABLES = [(64, 0, 4)] * 4
REFUSED = [
    ({"dtype": 5}, "dtype"),
    ({"sizes": (1, -2, 2, 3, 3, 8)}, "negative"),
    ({"sizes": (1, 2, -2, 3, 3, 8)}, "negative"),
    ({"sizes": (1, 2, 2, 3, 3, 0)}, "head_dim at least 1"),
    ({"sizes": (2**40, 2**40, 2, 3, 3, 8)}, "too large"),
    ({"sizes": (2**40, 2, 2**40, 3, 3, 8)}, "too large"),
    ({"sizes": (1, 2, 2, 3, 2, 8)}, "heads: expected a multiple"),
    ({"sizes": (1, 2, 2, 3, 0, 8)}, "heads: expected a multiple"),
    ({"sizes": (1, 2, 2, 3, 3, 7), "tables": (TABLES, False)}, "rotary: expected an even head_dim"),
    ({"k": (64, (48, -24, 8))}, "k: got a stride of -24"),
    ({"v": (64, (48, 2**60, 8))}, "v: got a stride"),
    ({"scoring": (1.0, -1.0, -1, -1)}, "softcap"),
    ({"scoring": (1.0, float("nan"), -1, -1)}, "softcap"),
    ({"tables": (TABLES[:3], False)}, "rotary: expected four tables"),
    ({"tables": ([*TABLES[:3], (0, 0, 4)], False)}, "rotary: got no table"),
    ({"tables": ([*TABLES[:2], (64, 0, -4), TABLES[3]], False)}, "cos_k: got a stride of -4"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [*REFUSED, *(({name: (0, (48, 24, 8))}, "null pointer") for name in "qkv"), ({"out": 0}, "null pointer")],
)
def test_attention_refuses_arguments_that_describe_no_memory(changes, message):
    with pytest.raises(ValueError, match=message):
        vlmkern.dispatch.extension.extension().attention_fwd(**raw_attention(**changes))


@pytest.mark.parametrize("bounds", [[0, 3], [1, 2], [0, 5, 2], [0, -1, 2]])
@pytest.mark.parametrize("of_keys", [False, True])
def test_attention_refuses_bounds_outside_the_tokens(bounds, of_keys):
    right, wrong = torch.tensor([0, *[2] * (len(bounds) - 1)]).int(), torch.tensor(bounds).int()
    given = (right.data_ptr(), wrong.data_ptr()) if of_keys else (wrong.data_ptr(), 0)
    with pytest.raises(ValueError, match="cu_seqlens"):
        vlmkern.dispatch.extension.extension().attention_fwd(**raw_attention(bounds=(*given, len(bounds) - 1)))
    with pytest.raises(ValueError, match="cu_seqlens"):
        vlmkern.dispatch.extension.extension().attention_bwd(**raw_attention_bwd(bounds=(*given, len(bounds) - 1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *REFUSED,
        ({"grad": (64, (48, -24, 8))}, "grad: got a stride of -24"),
        ({"out": (64, (48, 24, -8))}, "out: got a stride of -8"),
        *(({name: (0, (48, 24, 8))}, "null pointer") for name in ("grad", "q", "k", "v", "out")),
        *(({name: 0}, "null pointer") for name in ("lse", "dq", "dk", "dv")),
    ],
)
def test_attention_bwd_refuses_arguments_that_describe_no_memory(changes, message):
    with pytest.raises(ValueError, match=message):
        vlmkern.dispatch.extension.extension().attention_bwd(**raw_attention_bwd(**changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens, dim", [(1, 1), (19, 33), (145, 72)])
def test_attention_bwd_writes_only_its_outputs(dtype, tokens, dim):
    """Guards of NaN around the three outputs stay, and every element between them is written."""
    from native_calls import attention

    q, k, v, grad = torch.randn(4, 1, tokens, 3, dim).to(dtype).unbind(0)
    out, lse = attention(q, k, v, 1.0, None, None)
    buffer = torch.full((3, q.numel() + 64), torch.nan, dtype=dtype)
    grads = [row[32:-32].data_ptr() for row in buffer]
    tensors = {
        name: (t.data_ptr(), t.stride()[:3]) for name, t in {"grad": grad, "q": q, "k": k, "v": v, "out": out}.items()
    }
    vlmkern.dispatch.extension.extension().attention_bwd(
        **raw_attention_bwd(
            dtype=vlmkern.dispatch.extension.dtype_code(dtype),
            **tensors,
            lse=lse.data_ptr(),
            **dict(zip(("dq", "dk", "dv"), grads, strict=True)),
            sizes=(1, tokens, tokens, 3, 3, dim),
        )
    )
    assert buffer[:, :32].isnan().all() and buffer[:, -32:].isnan().all() and buffer[:, 32:-32].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 64, 8, 64, 8, 0, 64, 5, 8, 3, 1), "rows: got 5, expected 0 to 4"),
        ((0, 64, 8, 64, 8, 0, 64, 1, 2**50, 3, 1), "weight: too large"),
        ((0, 64, 8, 64, 0, 0, 64, 1, 2**48, 2**48, 1), "weight: too large"),
        ((0, 64, -8, 64, 8, 0, 64, 2, 8, 3, 1), "x_stride"),
        ((0, 64, 8, 64, 2**60, 0, 64, 1, 8, 3, 1), "weight_stride"),
        ((0, 64, 8, 0, 8, 0, 64, 1, 8, 3, 1), "null pointer"),
    ],
)
def test_linear_refuses_arguments_that_describe_no_memory(arguments, message):
    with pytest.raises(ValueError, match=message):
        vlmkern.dispatch.extension.extension().linear_few_rows(*arguments)


def attention_with_gradient(qkv):
    """The result, and the gradient of its sum by the fused qkv."""
    qkv = qkv.detach().requires_grad_()
    out = vlmkern.ops.attention(*qkv.unbind(2))
    return out, torch.autograd.grad(out.sum(), qkv)[0]


def test_attention_threads_change_no_bit():
    qkv = torch.randn(1, 333, 3, 3, 72)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(attention_with_gradient(qkv))
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, results[0], result)) for result in results[1:])


def test_attention_pool_gradient_threads_change_no_bit():
    features, vectors = torch.randn(200, 4, 96), torch.randn(3, 2, 200, 96)
    results = []
    for threads in (1, 2, 5):
        pair, d_x = vectors.clone(), torch.zeros(200, 4, 96)
        pointers = [[t.data_ptr() for t in head] for head in pair]
        vlmkern.dispatch.extension.extension().attention_pool_slots_bwd(
            0, features.data_ptr(), pointers, d_x.data_ptr(), 200, 4, 96, 0.1, threads
        )
        results.append((pair, d_x))
    assert all(all(map(torch.equal, results[0], result)) for result in results[1:])


def test_concurrent_attention():
    inputs = [torch.randn(1, 100, 3, 2, 72) for _ in range(16)]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(attention_with_gradient, inputs))
    for qkv, found in zip(inputs, outputs, strict=True):
        assert all(map(torch.equal, found, attention_with_gradient(qkv)))


def test_empty_touches_nothing():
    extension = vlmkern.dispatch.extension.extension()
    extension.silu_mul_fwd(0, 0, 26, 0, 0, 13, 1)
    extension.silu_mul_fwd(0, 0, 0, 0, 5, 0, 1)
    assert sys.modules["vlmkern._C"] is extension
