"""Native kernels where float32 runs out: huge, infinite and undefined scores, extreme scales, on every instruction set.

Inputs are small whole numbers times powers of two, so that a score has one value in any order of summation, in float32
as in float64, and all that is judged is what the kernels do with it.
"""

from __future__ import annotations

import pytest
from test_backends import run_python

import vlmkern

report = vlmkern.backends()["native"]
pytestmark = pytest.mark.skipif(not report["available"], reason=report.get("reason", ""))
each_isa = pytest.mark.parametrize("isa", report.get("isas", []))


def check(isa: str, code: str) -> None:
    result = run_python(SHARED + code, VLMKERN_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr


SHARED = """
import itertools
import torch
from vlmkern.native.attention import attention

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
    judge(out[0, :, 0], p @ v, LIMITS[dtype] * (p @ v.abs()) + SMALLEST[dtype], (what, dtype, scale))
    return raw.float(), lse[0, 0].double()
"""


@each_isa
def test_attention_of_large_scores(isa):
    """Weights by the differences of scores, however far these lie from zero, and the log-sum-exp."""
    check(
        isa,
        FORWARD
        + """
for dtype, tokens in itertools.product(LIMITS, (1, 5, 300, 600)):
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
for dtype, tokens in itertools.product(LIMITS, (1, 2, 40, 300, 600)):
    for scale in (0.5, -0.5, 0.0, 1e30, 1e-40):
        for keys in ([0], [tokens - 1], range(0, tokens, 3), range(min(tokens, 270)), range(tokens)):
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
