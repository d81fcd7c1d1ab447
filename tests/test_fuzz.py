"""A short run of the fuzzer, `make fuzz`, with a fixed seed; and the fuzzer itself: what it must see."""

from __future__ import annotations

import cmath
import json
import math
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
from fuzz import __main__ as fuzz
from fuzz import judge, oracles
from fuzz.generate import Arena, Draw
from fuzz.rounding import Exact

# of each op and mode; of those that are not named
CASES, MOST = {"compiled": 1}, 15
SEED = 0


@pytest.fixture(scope="module")
def records():
    """Of every case, by op and mode."""
    found = defaultdict(list)
    runs = [
        {"op": op, "seed": SEED, "mode": mode, "first": 0, "last": CASES.get(mode, MOST)}
        for op in fuzz.OPS
        for mode in fuzz.MODES
    ]
    for record in fuzz.outcomes(runs, {}):
        found[record["op"], record["mode"]].append(record)
    return found


@pytest.mark.parametrize("mode", fuzz.MODES)
@pytest.mark.parametrize("op", fuzz.OPS)
def test_random_cases(records, op, mode):
    found = records[op, mode]
    assert len(found) == CASES.get(mode, MOST)
    failures = [
        f"{fuzz.reproducer(record, SEED)}\n    {record['message']}" for record in found if record["outcome"] == "failed"
    ]
    assert not failures, "\n".join(failures)


DIES = """
import os, sys, json
from tests.fuzz import cases, worker

def run(op, seed, index, mode=None, note=None):
    note(f"case {index}")
    if index == 3:
        os.abort()
    if index == 5:
        raise ValueError("no")
    return "passed"

cases.run = run
worker.main([{"op": "linear", "seed": 0, "first": 0, "last": 8}])
"""


def test_a_crash_is_a_failure_of_its_case():
    result = subprocess.run([sys.executable, "-c", DIES], cwd=fuzz.ROOT, stdout=subprocess.PIPE, text=True, check=True)
    records = list(map(json.loads, result.stdout.splitlines()))
    assert [record["index"] for record in records] == list(range(8))
    failed = {record["index"]: record["message"] for record in records if record["outcome"] == "failed"}
    assert failed[3] == "killed by SIGABRT (case 3)" and "ValueError: no" in failed[5] and len(failed) == 2


def close(actual, exact, plain=None, precision=torch.float32, **options):
    judge.close(
        "out",
        actual,
        exact,
        plain=lambda: exact.to(precision) if plain is None else plain,
        moved=lambda: [exact],
        precision=precision,
        **({"per_row": False} | options),
    )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_limit_scales_with_the_result(precision, size):
    exact = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3) * size
    close(exact.to(precision), exact, precision=precision)
    wrong = exact.clone()
    wrong[1, 1] += 6 * torch.finfo(precision).eps * size
    with pytest.raises(judge.Failure, match="error"):
        close(wrong.to(precision), exact, precision=precision)
    close(wrong.to(precision), exact, precision=precision, plain=wrong)


def test_small_rows_are_judged_by_themselves():
    exact = torch.tensor([[1.0, 2.0], [1e-6, 2e-6]], dtype=torch.float64)
    wrong = exact + torch.tensor([[0.0, 0.0], [0.0, 1e-8]])
    close(wrong, exact)
    with pytest.raises(judge.Failure, match="row 1"):
        close(wrong, exact, per_row=True)


def test_nan_belongs_where_it_is():
    exact = torch.tensor([1.0, torch.nan, 3.0], dtype=torch.float64)
    close(exact, exact)
    with pytest.raises(judge.Failure, match="should be finite"):
        close(torch.tensor([1.0, torch.nan, torch.inf]), exact, plain=exact)
    with pytest.raises(judge.Failure, match="should have reached"):
        close(torch.tensor([1.0, 2.0, 3.0]), exact)


def test_results_that_change():
    y = torch.randn(3)
    judge.same_bits("out", y, y.clone())
    with pytest.raises(judge.Failure, match="another result"):
        judge.same_bits("out", y, y * (1 + 2e-7))


@pytest.mark.parametrize("index", range(20))
def test_writes_beside_a_view_are_seen(index):
    draw = Draw("arena", 0, index)
    arena = Arena(draw)
    view = arena.tensor(draw.normal([3, 4]), torch.float32, distinct=True)
    arena.seal()
    arena.verify()
    whole = view.as_strided([view.untyped_storage().size() // 4], [1], 0)
    assert whole.isnan().sum() >= 16
    whole[int(whole.isnan().nonzero()[draw.randrange(16)])] = 0
    with pytest.raises(judge.Failure, match="wrote to its arguments"):
        arena.verify()


def test_cases_depend_on_seed_and_index_alone():
    values = [Draw("linear", 1, 2).normal([4]) for _ in range(2)]
    assert torch.equal(*values) and not torch.equal(values[0], Draw("linear", 1, 3).normal([4]))


def test_oracles_against_formulas_written_out():
    """One case of each, with loops."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 5, 2, 3, dtype=torch.float64)
    asked = dict.fromkeys(("cu_seqlens", "cu_seqlens_k", "cos", "sin", "cos_k", "sin_k"))
    asked |= {"scale": 0.5, "window_left": -1, "window_right": -1, "softcap": 0.0, "interleaved": False}
    out, lse = oracles.attention({"q": q, "k": k, "v": v} | asked, Exact())
    scores = torch.tensor([float(q[0, 4, 1] @ k[0, j, 1]) * 0.5 for j in range(5)], dtype=torch.float64).exp()
    expected = sum(scores[j] * v[0, j, 1] for j in range(5)) / scores.sum()
    torch.testing.assert_close(out[0, 4, 1], expected)
    torch.testing.assert_close(lse[0, 1, 4], scores.sum().log())

    # the third of five queries over six keys, of which it sees the second to the fourth
    q, (k, v) = torch.randn(1, 5, 4, 4, dtype=torch.float64), torch.randn(2, 1, 6, 2, 4, dtype=torch.float64)
    angles, angles_k = torch.randn(5, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    asked |= {"window_left": 2, "window_right": 0, "softcap": 1.5, "cos": angles.cos(), "sin": angles.sin()}
    asked |= {"cos_k": angles_k.cos(), "sin_k": angles_k.sin()}
    out, lse = oracles.attention({"q": q, "k": k, "v": v} | asked, Exact())

    def turn(x, angle):
        turned = [complex(x[i], x[i + 2]) * cmath.exp(1j * float(angle[i])) for i in range(2)]
        return torch.tensor([z.real for z in turned] + [z.imag for z in turned], dtype=torch.float64)

    query = turn(q[0, 2, 3], angles[2])
    scores = [float(query @ turn(k[0, j, 1], angles_k[j])) * 0.5 for j in (1, 2, 3)]
    scores = [math.exp(1.5 * math.tanh(score / 1.5)) for score in scores]
    expected = sum(score * v[0, j, 1] for score, j in zip(scores, (1, 2, 3), strict=True)) / sum(scores)
    torch.testing.assert_close(out[0, 2, 3], expected)
    torch.testing.assert_close(lse[0, 3, 2], torch.tensor(sum(scores), dtype=torch.float64).log())

    f, w_q, w_kv, w_o = (torch.randn(*s, dtype=torch.float64) for s in ((1, 3, 2), (2, 2), (5, 2), (2, 3)))
    options = {"grid": [3, 1], "window": [2, 2], "num_heads": 1, "mask": None, "pad_embed": None, "keep": None}
    arguments = {"features": [f], "w_q": w_q, "b_q": None, "w_kv": w_kv, "b_kv": None, "w_o": w_o, "b_o": None}
    (pooled,) = oracles.attention_pool(arguments | options, Exact())
    slots = [f[0, 2], 0 * f[0, 0], 0 * f[0, 0], 0 * f[0, 0]]
    query, kv = w_q @ (f[0, 2] / 4), [w_kv @ slot for slot in slots]
    weights = torch.stack([(query @ x[:2] / 2**0.5).exp() for x in kv])
    context = sum(w * x[2:] for w, x in zip(weights, kv, strict=True)) / weights.sum()
    torch.testing.assert_close(pooled[0, 1], w_o @ context)
