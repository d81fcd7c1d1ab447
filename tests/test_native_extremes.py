"""Native kernels where float32 runs out: huge, infinite and undefined scores, extreme scales, on every instruction set.

Inputs are small whole numbers times powers of two, so that a score has one value in any order of summation, in float32
as in float64, and all that is judged is what the kernels do with it.
"""

from __future__ import annotations

import os

import pytest
from test_backends import run_python

import vlmkern

report = vlmkern.backends()["native"]
pytestmark = pytest.mark.skipif(not report["available"], reason=report.get("reason", ""))
each_isa = pytest.mark.parametrize("isa", [*report.get("isas", []), *report.get("emulated_isas", [])])


def check(isa: str, code: str) -> None:
    """Runs the code with the instruction set; in this process where its extension is a sanitized one."""
    if "VLMKERN_SANITIZED" in os.environ:
        if isa == report["isa"]:
            exec(SHARED + code, {})
        return
    result = run_python(SHARED + code, VLMKERN_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr


SHARED = """
import itertools
import torch
from native_calls import attention

torch.manual_seed(0)
inf, nan = float("inf"), float("nan")
# of a result, and of the weights before they are rounded to be multiplied
LIMITS = {torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SMALLEST = {torch.float32: 1e-36, torch.bfloat16: 1e-36, torch.float16: 2.0**-24}


def whole(*shape, most=4):
    return torch.randint(-most, most + 1, shape).double()


def softmax(raw, scale):
    # raw scores as float32 holds them, everything after them in float64: scaled differences, so that a scale may
    # take the scores out of range but not the result
    raw = raw.float().double()
    if scale < 0:
        raw, scale = -raw, -scale
    return torch.softmax((raw - raw.amax(-1, keepdim=True)) * scale, -1)


def slack(p):
    # an exponent is rounded by a share of itself, so a weight's error grows with the exponent
    return p * (1 - torch.log(p.clamp(min=1e-40)) / 16)


def judge(actual, expected, bound, what):
    # NaN in the same places, and elsewhere no further away than the bound
    actual = actual.double()
    assert torch.equal(actual.isnan(), expected.isnan()), (what, actual.isnan().sum(), expected.isnan().sum())
    error = ((actual - expected).abs() / bound)[~expected.isnan()]
    assert error.numel() == 0 or error.max() <= 1, (what, error.max())
"""

FORWARD = """
def run(raw_q, raw_k, v, scale, dtype, what):
    # [tokens, dim], [keys = tokens, dim]
    q, k, v = (x.to(dtype)[None, :, None] for x in (raw_q, raw_k, v))
    out, lse = attention(q, k, v, scale, None, None)
    scale = float(torch.tensor(scale, dtype=torch.float32))
    raw = q[0, :, 0].double() @ k[0, :, 0].double().T
    p = softmax(raw, scale)
    v = v[0, :, 0].double()
    judge(out[0, :, 0], p @ v, LIMITS[dtype] * (slack(p) @ v.abs()) + SMALLEST[dtype], (what, dtype, scale))
    return raw.float(), lse[0, 0].double()
"""


@each_isa
def test_attention_of_large_scores(isa):
    """Weights by the differences of scores, however far these lie from zero, and the log-sum-exp."""
    check(
        isa,
        FORWARD
        + """
for dtype, tokens in itertools.product(LIMITS, (5, 300, 530)):
    for base, times in ((0, 0), (5, 0), (8, 0), (11, 0), (11, 1), (8, 5)):
        q, k, v = whole(tokens, 20), whole(tokens, 20), whole(tokens, 20)
        # the keys' shares of the base grow: each chunk of keys brings new maxima; 2^22 and whole numbers are exact
        q[:, 0], k[:, 0] = 2.0**base, (2.0**base * torch.linspace(0.5, 1, tokens).double()).bfloat16().double()
        q, k = q * 2.0**times, k * 2.0**times
        for scale in (2.0**-3, -0.1, 0.7 * 4.0**-times, 2.0 ** -(base + 2 * times)):
            raw, lse = run(q, k, v, scale, dtype, (tokens, base, times))
            exact = torch.logsumexp(raw.double() * scale, -1)
            limit = 3e-3 if dtype == torch.bfloat16 else 2e-6
            judge(lse, exact, limit + 3e-7 * exact.abs(), ("lse", tokens, base, times, dtype, scale))
""",
    )


@each_isa
def test_attention_up_to_the_largest_scores(isa):
    """Scores up to 1e38 and scales that overflow or vanish on their way leave a softmax that is well defined."""
    check(
        isa,
        FORWARD
        + """
for dtype, tokens in itertools.product((torch.float32, torch.bfloat16), (3, 300)):
    for power in (10, 15, 30, 45, 60):
        q, k, v = whole(tokens, 8, most=2), whole(tokens, 8, most=2), whole(tokens, 3 + 5)
        q, k = q * 2.0**power, k * 2.0**power
        for scale in (0.125, -1.0, 3.0, 0.0, -0.0, 1e30, -1e30, 3e38, 1e-30, 1e-37, 1e-38, -1e-40, 1e-45):
            run(q, k, v, scale, dtype, (tokens, power))
    # of both signs and of the order of the largest number: even their difference overflows
    q, k, v = torch.full((tokens, 1), 2.0**63).double(), torch.full((tokens, 1), 2.0**63).double(), whole(tokens, 1)
    k[1::2] *= -1
    for scale in (1.0, 1e-30, 1e-38, 1e-40, 0.0, -1.0, 1e30):
        raw, _ = run(q * 1.5, k * 1.25, v, scale, dtype, "overflowing difference")
        assert raw.isfinite().all()
    # scores below the range of normal numbers
    if dtype == torch.float32:
        q, k, v = whole(tokens, 4) * 2.0**-65, whole(tokens, 4) * 2.0**-65, whole(tokens, 4)
        for scale in (1.0, 1e38, -3e38):
            run(q, k, v, scale, dtype, "tiny scores")
""",
    )


@each_isa
def test_attention_of_infinite_scores(isa):
    """-inf weighs nothing; +inf, NaN, and rows of nothing but -inf are NaN; other rows do not notice."""
    check(
        isa,
        FORWARD
        + """
for dtype, tokens in itertools.product(LIMITS, (2, 40, 530)):
    for scale in (0.5, -1e30, 0.0, 1e-40):
        for keys in ([tokens - 1], range(0, tokens, 3), range(min(tokens, 270)), range(tokens)):
            for bad in (inf, -inf, nan):
                q, k, v = whole(tokens, 9), whole(tokens, 9), whole(tokens, 9)
                q[:, 0] = torch.tensor([1.0, -1.0, 0.0, 2.0]).repeat(tokens)[:tokens]
                k[list(keys), 0] = bad
                raw, lse = run(q, k, v, scale, dtype, (tokens, bad))
                exact = torch.logsumexp(raw.double() * scale, -1)
                seen = (exact.abs() < 1e30) & raw.isfinite().any(-1)
                judge(lse[seen], exact[seen], 3e-3 + 1e-6 * exact[seen].abs(), ("lse", tokens, bad, scale))
        q, k, v = whole(tokens, 9), whole(tokens, 9), whole(tokens, 9)
        q[tokens // 2, 3] = nan
        run(q, k, v, scale, dtype, "NaN query")
""",
    )


@each_isa
def test_attention_gradients_of_large_scores(isa):
    """Against float64, with bounds by the sizes of the terms that each gradient sums."""
    check(
        isa,
        """
from native_calls import attention_bwd

for dtype, tokens in itertools.product(LIMITS, (5, 150)):
    for base, times in ((0, 0), (4, 0), (8, 0), (11, 1), (3, 24)):
        if times == 24 and dtype == torch.float16:
            continue
        q, k, v, grad = (whole(tokens, 20) for _ in range(4))
        q[:, 0], k[:, 0] = 2.0**base, 2.0**base
        k[1] = k[0]  # a tie shares its gradient
        q, k, v, grad = (x.to(dtype) for x in (q * 2.0**times, k * 2.0**times, v, grad))
        for scale in (0.125, -0.1, 0.7 * 4.0**-times, 2.0 ** -(base + 2 * times), 0.0):
            inputs = [x[None, :, None] for x in (grad, q, k, v)]
            saved = attention(*inputs[1:], scale, None, None)
            found = attention_bwd(*inputs, *saved, scale, None, None)
            g, a, b, c = (x.double() for x in (grad, q, k, v))
            exact_scale = float(torch.tensor(scale, dtype=torch.float32))
            p = softmax(a @ b.T, exact_scale)
            dp = g @ c.T
            ds = p * (dp - (p * dp).sum(-1, keepdim=True))
            terms = slack(p) * (g.abs() @ c.abs().T + (g.abs() * (slack(p) @ c.abs())).sum(-1, keepdim=True))
            what = (dtype, tokens, base, times, scale)
            for name, actual, expected, size in (
                ("dq", found[0], ds @ b * exact_scale, terms @ b.abs() * abs(exact_scale)),
                ("dk", found[1], ds.T @ a * exact_scale, terms.T @ a.abs() * abs(exact_scale)),
                ("dv", found[2], p.T @ g, slack(p).T @ g.abs()),
            ):
                largest = torch.finfo(dtype).max
                judge(actual[0, :, 0].double().clamp(-largest, largest), expected.clamp(-largest, largest),
                      2 * LIMITS[dtype] * size + 16 * SMALLEST[dtype], (name, *what))
""",
    )


@each_isa
def test_attention_gradients_of_one_key_alone(isa):
    """A query that gives its whole weight to one key sends nothing to scores, however large these are."""
    check(
        isa,
        """
from native_calls import attention_bwd

for dtype in LIMITS:
    q, k = torch.eye(48) * 2.0**10, torch.eye(48) * 2.0**5
    v, grad = torch.randn(2, 48, 48)
    grad, q, k, v = (x.to(dtype)[None, :, None] for x in (grad, q, k, v))
    dq, dk, dv = attention_bwd(grad, q, k, v, *attention(q, k, v, 1.0, None, None), 1.0, None, None)
    assert (dq == 0).all() and (dk == 0).all() and torch.equal(dv, grad)
""",
    )


@each_isa
def test_attention_gradients_of_infinite_scores(isa):
    """A weight of zero stays one, and what is not defined is NaN for the queries concerned."""
    check(
        isa,
        """
from native_calls import attention_bwd

for dtype, tokens, scale in itertools.product(LIMITS, (40, 200), (0.5, -0.5)):
    grad, q, k, v = (whole(tokens, 9) for _ in range(4))
    if dtype != torch.float16:  # one key that no query sees, as its scores are below the lowest number
        q[:, 0], k[:, 0], k[7, 0] = 2.0**60, 0.0, -(2.0**100) / scale
    inputs = [x.to(dtype)[None, :, None] for x in (grad, q, k, v)]
    dq, dk, dv = attention_bwd(*inputs, *attention(*inputs[1:], scale, None, None), scale, None, None)
    g, a, b, c = (x[0, :, 0].double() for x in inputs)
    p = softmax(a @ b.T, scale)
    judge(dv[0, :, 0], p.T @ g, 2 * LIMITS[dtype] * (slack(p).T @ g.abs()) + 16 * SMALLEST[dtype], "dv")
    if dtype != torch.float16:
        assert (dk[0, 7, 0] == 0).all() and (dv[0, 7, 0] == 0).all()
    for bad in (nan, inf, -inf):
        poisoned = [x.clone() for x in inputs]
        poisoned[1][0, 3, 0, 2] = bad
        dq, dk, dv = attention_bwd(*poisoned, *attention(*poisoned[1:], scale, None, None), scale, None, None)
        assert dq[0, 3].isnan().all() and dk.isnan().all() and dv.isnan().all()
        assert not dq[0, [i for i in range(tokens) if i != 3]].isnan().any()
""",
    )


@each_isa
def test_attention_of_sizes_at_the_ends(isa):
    """One channel and many, one token, no head."""
    check(
        isa,
        FORWARD
        + """
from native_calls import attention_bwd

for dtype, tokens, dim in itertools.product(LIMITS, (1, 2, 17, 97), (1, 2, 256, 301)):
    q, k, v, grad = torch.randn(4, tokens, dim)
    run(q, k, v, dim**-0.5, dtype, (tokens, dim))
    g, a, b, c = (x.to(dtype)[None, :, None] for x in (grad, q, k, v))
    found = attention_bwd(g, a, b, c, *attention(a, b, c, dim**-0.5, None, None), dim**-0.5, None, None)
    leaves = [x.double().requires_grad_() for x in (a, b, c)]
    p = torch.softmax(torch.einsum("bnhd,bmhd->bhnm", *leaves[:2]) * dim**-0.5, -1)
    exact = torch.autograd.grad(torch.einsum("bhnm,bmhd->bnhd", p, leaves[2]), leaves, g.double())
    for actual, expected in zip(found, exact, strict=True):
        judge(actual, expected, 4 * LIMITS[dtype] * (1 + expected.abs().max()), ("gradient", dtype, tokens, dim))
    nothing = torch.empty(2, tokens, 0, dim, dtype=dtype)
    out, lse = attention(nothing, nothing, nothing, 1.0, None, None)
    grads = attention_bwd(nothing, nothing, nothing, nothing, out, lse, 1.0, None, None)
    assert all(t.shape == nothing.shape for t in (out, *grads)) and lse.shape == (2, 0, tokens)
""",
    )


POOL = """
from vlmkern.dispatch.extension import dtype_code, extension


def pool(features, q, w_k, w_v, heads, scale):
    # features [windows, 4, width], q [windows, heads * key_dim] -> the context of many heads
    windows, size, width = features.shape
    problem = extension().AttentionPool(
        dtype_code(q.dtype), [(features.data_ptr(), features.stride(0), features.stride(1))],
        windows, width, [2, 2], [2, 2], 0, 0, 0, windows,
    )
    context = q.new_empty(windows, len(w_v))
    problem.context(q.data_ptr(), w_k.data_ptr(), w_v.data_ptr(), 0, context.data_ptr(), heads,
                    len(w_k) // heads, len(w_v) // heads, scale, 1)
    return context


def pool_slots(features, q, scale):
    windows, size, width = features.shape
    problem = extension().AttentionPool(
        dtype_code(q.dtype), [(features.data_ptr(), features.stride(0), features.stride(1))],
        windows, width, [2, 2], [2, 2], 0, 0, 0, windows,
    )
    pooled = torch.empty_like(q)
    problem.slots(q.data_ptr(), pooled.data_ptr(), scale, 1)
    return pooled


def slots_bwd(features, a, b, scale):
    windows, size, width = features.shape
    a, b, dx = a.clone(), b.clone(), torch.zeros(features.shape)
    extension().attention_pool_slots_bwd(dtype_code(a.dtype), features.data_ptr(), [(a.data_ptr(), b.data_ptr())],
                                         dx.data_ptr(), windows, size, width, scale, 1)
    return dx, a, b


def run_all(x, q, b, scale, dtype, what):
    # one key and value per channel, so that absorbing the projections rounds nothing
    width = x.shape[-1]
    x, q, b = (t.to(dtype) for t in (x, q, b))
    eye = torch.eye(width, dtype=dtype)
    exact_scale = float(torch.tensor(scale, dtype=torch.float32))
    xs, qs, bs = x.double(), q.double(), b.double()
    p = softmax((qs[:, None] * xs).sum(-1), exact_scale)
    weighed = slack(p)[..., None]
    expected = (p[..., None] * xs).sum(1)
    bound = LIMITS[dtype] * (weighed * xs.abs()).sum(1) + SMALLEST[dtype]
    # an infinite or undefined channel makes the whole window's scores so, or meets a weight of zero
    judge(pool(x, torch.cat([q, q], 1), torch.cat([eye, eye]), torch.cat([eye, eye]), 2, scale),
          torch.cat([expected, expected], 1), torch.cat([bound, bound], 1), ("heads", dtype, scale, what))
    judge(pool_slots(x, q, scale), expected, bound, ("one head", dtype, scale, what))
    dx, y, pooled = slots_bwd(x, q, b, scale)
    judge(pooled, expected, bound, ("pooled", dtype, scale, what))
    dp = (bs[:, None] * xs).sum(-1)
    ds = exact_scale * p * (dp - (p * dp).sum(-1, keepdim=True))
    size = (bs[:, None] * xs).abs().sum(-1)
    terms = abs(exact_scale) * slack(p) * (size + (slack(p) * size).sum(-1, keepdim=True))
    judge(y, (ds[..., None] * xs).sum(1), 2 * LIMITS[dtype] * (terms[..., None] * xs.abs()).sum(1) + SMALLEST[dtype],
          ("y", dtype, scale, what))
    judge(dx, ds[..., None] * qs[:, None] + p[..., None] * bs[:, None],
          2 * LIMITS[torch.float32] * (terms[..., None] * qs.abs()[:, None] + slack(p)[..., None] * bs.abs()[:, None])
          + SMALLEST[dtype], ("dx", dtype, scale, what))
"""


@each_isa
def test_attention_pool_of_large_scores(isa):
    """Both pooling kernels and their gradients, from scores of ordinary size to the largest."""
    check(
        isa,
        POOL
        + """
for dtype in LIMITS:
    for base, times in ((0, 0), (4, 0), (7, 0), (7, 2), (8, 20), (8, 40)):
        if times > 2 and dtype == torch.float16:
            continue
        for scale in (0.125, -0.1, 0.7 * 4.0**-times, 2.0 ** -(base + 2 * times), 0.0, 1e-40, -1e30):
            if scale == -1e30 and (times or dtype == torch.float16):
                continue  # gradients overflow
            x, q, b = whole(37, 4, 5), whole(37, 5), whole(37, 5)
            x[..., 0], q[..., 0] = 2.0**base, 2.0**base
            x[:, 2] = x[:, 1]
            run_all(x * 2.0**times, q * 2.0**times, b, scale, dtype, (base, times))
""",
    )


@each_isa
def test_attention_pool_of_infinite_and_undefined_values(isa):
    """What is not defined stays in its window."""
    check(
        isa,
        POOL
        + """
for dtype, bad, place in itertools.product(LIMITS, (nan, inf, -inf), ("slot", "slots", "query", "weight")):
    x, q = whole(37, 4, 5).to(dtype), whole(37, 5).to(dtype)
    w_k, w_v = torch.eye(5, dtype=dtype), torch.eye(5, dtype=dtype)
    if place == "slot":
        x[11, 1, 2] = bad
    elif place == "slots":
        x[11, :, 2] = bad
    elif place == "query":
        q[11, 2] = bad
    else:
        w_k[2, 3] = bad
    v = (x[..., None, :].double() * w_v.double()).sum(-1)
    k = (x[..., None, :].double() * w_k.double()).sum(-1)
    expected, pooled = (
        (torch.softmax((q[:, None].double() * keys).sum(-1), -1)[..., None] * values).sum(1)
        for keys, values in ((k, v), (x.double(), x.double()))
    )
    found = pool(x, torch.cat([q, q], 1), torch.cat([w_k, w_k]), torch.cat([w_v, w_v]), 2, 1.0)
    others = [i for i in range(37) if i != 11]
    if place == "weight":
        assert found.isnan().all()
        continue
    assert found[others].isfinite().all() and not found[11].isfinite().all()
    assert found[11].isnan()[expected[11].repeat(2).isnan()].all()
    one = pool_slots(x, q, 1.0)
    assert one[others].isfinite().all() and torch.equal(one[11].isnan(), pooled[11].isnan())
    for t in slots_bwd(x, q, whole(37, 5).to(dtype), 1.0):
        assert t[others].isfinite().all() and t[11].isnan().any()
# slots whose score is -inf weigh nothing
for dtype in (torch.float32, torch.bfloat16):
    x, q = whole(37, 4, 5), whole(37, 5)
    q[:, 0], x[..., 0], x[:, 2, 0] = 2.0**70, 0.0, -(2.0**70)
    x, q = x.to(dtype), q.to(dtype)
    p = torch.softmax((q.double()[:, None] * x.double()).sum(-1).float().double(), -1)
    expected = (p[..., None] * x.double()).sum(1)
    assert (p[:, 2] == 0).all()
    bound = LIMITS[dtype] * (slack(p)[..., None] * x.double().abs()).sum(1) + SMALLEST[dtype]
    judge(pool_slots(x, q, 1.0), expected, bound, "-inf")
    eye = torch.eye(5, dtype=dtype)
    judge(pool(x, q, eye, eye, 1, 1.0), expected, bound, "-inf")
""",
    )
