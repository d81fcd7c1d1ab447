"""Matrix products on CPUs: which route is taken on which CPU, that each computes the same, and what it costs."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from support import LOW_PRECISION, low_precision_close
from test_backends import run_python
from torch.utils._python_dispatch import TorchDispatchMode

import vlmkern
from vlmkern import ops
from vlmkern.dispatch import routes, targets
from vlmkern.nn import SwiGLUMLP
from vlmkern.ops import _cpu_products
from vlmkern.ops.linear import native as native_linear
from vlmkern.ops.linear.problem import Linear, LinearGradient
from vlmkern.ops.swiglu_mlp import native as native_swiglu
from vlmkern.ops.swiglu_mlp.problem import SwiGLU

NATIVE = vlmkern.backends()["native"]
pytestmark = pytest.mark.skipif(not NATIVE["available"], reason=NATIVE.get("reason", ""))

AMX = frozenset({"avx512_fp16", "amx_tile", "amx_bf16"})
# what a process is told to stand for CPUs with less than this one
HELD_TO = {
    "avx2": {
        "VLMKERN_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {"VLMKERN_CPU_ISA": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
}
DTYPES = (torch.float32, *LOW_PRECISION)


def as_on(monkeypatch, way, epilogues=()):
    """All products go one way, as on CPUs where it is the fastest."""
    float32 = way if way in ("torch", "oneDNN") else "oneDNN"
    monkeypatch.setattr(routes, "here", lambda dtype: float32 if dtype == torch.float32 else way)
    monkeypatch.setattr(routes, "epilogues", lambda: frozenset(epilogues))


class TestTable:
    @pytest.mark.parametrize(
        "isa, vendor, features, family, float32, bfloat16, float16",
        [
            ("avx512_bf16", "GenuineIntel", AMX, "Intel, AMX", "torch", "oneDNN", "oneDNN"),
            # Cooper Lake, Ice Lake, Haswell
            ("avx512_bf16", "GenuineIntel", frozenset(), "Intel, AVX-512", "torch", "oneDNN", "panels"),
            ("avx512", "GenuineIntel", frozenset(), "Intel, AVX-512", "torch", "panels", "panels"),
            ("avx2", "GenuineIntel", frozenset(), "Intel, AVX2", "torch", "panels", "panels"),
            # Zen 4 and 5, Zen 2 and 3
            ("avx512_bf16", "AuthenticAMD", frozenset(), "AVX-512", "oneDNN", "oneDNN", "panels"),
            ("avx2", "AuthenticAMD", frozenset(), "AVX2", "oneDNN", "panels", "panels"),
            # whose maker is not known
            ("avx512_bf16", "", frozenset(), "AVX-512", "oneDNN", "oneDNN", "panels"),
            ("portable", "", frozenset(), "other", "oneDNN", "torch", "torch"),
        ],
    )
    def test_cpus_that_are_not_here(self, isa, vendor, features, family, float32, bfloat16, float16):
        target = targets.of_isa(isa, vendor, features)
        assert routes.family(target).name == family
        assert [routes.of_product(dtype, target) for dtype in DTYPES] == [float32, bfloat16, float16]

    def test_without_onednn_torch_has_float32_and_panels_are_made_for_it(self):
        target = targets.of_isa("avx2")._replace(onednn=frozenset())
        assert [routes.of_product(dtype, target) for dtype in DTYPES] == ["torch", "panels", "panels"]

    def test_epilogues_are_left_out_where_a_pass_is_faster(self):
        assert not routes.family(targets.of_isa("avx512_bf16", "GenuineIntel", AMX)).epilogues
        assert not routes.family(targets.of_isa("avx2")).epilogues
        assert routes.family(targets.of_isa("avx512")).epilogues == {"gelu_tanh", "gelu", "silu"}

    def test_every_family_says_what_was_measured_and_some_cpu_belongs_to_it(self):
        for index, family in enumerate(routes.FAMILIES):
            target = targets.Target("cpu", vendor=family.vendor, features=frozenset({family.feature}))
            assert routes.family(target) is family, index
            assert family.float32 in ("oneDNN", "torch") and family.measured

    @pytest.mark.parametrize("isa", [isa for isa in HELD_TO if isa in NATIVE["isas"]])
    def test_a_cpu_held_to_less_takes_the_routes_of_one_that_has_less(self, isa):
        code = """
import json, torch, vlmkern
from vlmkern import ops
names = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x, w, up = torch.ones(20, 8, dtype=dtype), torch.ones(6, 8, dtype=dtype), torch.ones(12, 8, dtype=dtype)
    calls = ((ops.linear, x, w), (ops.linear, x[:8], w), (ops.linear, x[:2], w), (ops.swiglu_mlp, x, up, w[:, :6]))
    names[str(dtype)] = [vlmkern.explain(*call)[0].kernel for call in calls]
print(json.dumps(names))
"""
        result = run_python(code, **HELD_TO[isa])
        assert result.returncode == 0, result.stderr
        named = json.loads(result.stdout)
        for dtype in ("torch.bfloat16", "torch.float16"):
            assert named[dtype] == ["panels in float32", "linear_few_rows", "linear_few_rows", "panels in float32"]
        assert named["torch.float32"][2] == "linear_few_rows"
        assert "panels in float32" not in named["torch.float32"]

    @pytest.mark.skipif("avx2" not in NATIVE["isas"], reason="needs a CPU with AVX2")
    def test_instructions_are_used_where_onednn_may(self):
        """Its cap is what a CPU without the instructions is like, whatever CPUID says."""
        code = """
import torch
from vlmkern.dispatch import routes, targets
print(sorted(map(str, targets.of_device("cpu").onednn)), routes.here(torch.bfloat16))
"""
        for cap in ("AVX512_CORE", "avx2"):
            assert (
                run_python(code, ONEDNN_MAX_CPU_ISA=cap, VLMKERN_CPU_ISA="").stdout == "['torch.float32'] panels\n"
            ), cap


@pytest.mark.parametrize("way", ["panels", "torch", "oneDNN"])
@pytest.mark.parametrize("dtype", DTYPES)
class TestNumbers:
    """Every route on this machine, whichever is the fastest here, against float64."""

    @pytest.fixture(autouse=True)
    def route(self, monkeypatch, way, dtype):
        if way == "oneDNN" and dtype not in targets.of_device("cpu").onednn:
            pytest.skip("oneDNN has no such products here")
        as_on(monkeypatch, way)
        # several panels and blocks of rows, the last ones smaller
        monkeypatch.setattr(_cpu_products, "_PANEL_OUTPUTS", 32)
        monkeypatch.setattr(_cpu_products, "_BLOCK_ROWS", 16)

    @pytest.mark.parametrize("activation", ["none", "gelu_tanh", "gelu", "silu", "quick_gelu"])
    @pytest.mark.parametrize("epilogues", [(), ("gelu_tanh", "gelu", "silu")])
    def test_linear(self, monkeypatch, way, dtype, activation, epilogues):
        as_on(monkeypatch, way, epilogues)
        x, weight, bias, residual = (
            t.to(dtype) for t in (torch.randn(45, 200), torch.randn(90, 200) / 14, torch.randn(90), torch.randn(45, 90))
        )
        for b, r in ((bias, residual), (None, residual), (bias, None)):
            with vlmkern.use_backend("native"):
                y = ops.linear(x, weight, b, activation=activation, residual=r)
            with vlmkern.use_backend("reference"):
                close(
                    y, lambda t, b=b, r=r: ops.linear(*to(t, x, weight, b), activation=activation, residual=to1(r, t))
                )

    @pytest.mark.parametrize("layout", ["a view", "transposed", "a view, transposed", "every other", "expanded"])
    def test_linear_of_any_strides(self, way, dtype, layout):
        def values(*shape):
            return torch.randn(*shape).to(dtype)

        weight = {
            "a view": values(70, 80)[:, 5:45],
            "transposed": values(40, 70).T,
            "a view, transposed": values(40, 140)[:, ::2].T,
            "every other": values(70, 80)[:, ::2],
            "expanded": values(1, 40).expand(70, 40),
        }[layout]
        x, bias, residual = values(40, 37).T, values(140)[::2], values(70, 37).T
        with vlmkern.use_backend("native"):
            y = ops.linear(x, weight, bias, residual=residual)
        assert y.is_contiguous()
        close(y, lambda t: F.linear(*to(t, x, weight, bias)) + residual.to(t))

    @pytest.mark.parametrize("rows", [3, 9, 33])
    def test_swiglu(self, way, dtype, rows):
        x, w_up, w_down, b_up, b_down = to(
            dtype,
            *(torch.randn(rows, 60), torch.randn(140, 60) / 8, torch.randn(50, 70) / 8, torch.randn(140)),
            torch.randn(50),
        )
        with vlmkern.use_backend("native"):
            y = ops.swiglu_mlp(x, w_up, w_down, b_up=b_up, b_down=b_down)
        with vlmkern.use_backend("reference"):
            close(y, lambda t: swiglu(*to(t, x, w_up, w_down, b_up, b_down)))

    @pytest.mark.parametrize("heads, key_dim, value_dim", [(4, 12, 10), (1, 24, 40)])
    def test_attention_pool(self, way, dtype, heads, key_dim, value_dim):
        features = [t.to(dtype) for t in torch.randn(2, 3, 35, 20)]
        shapes = ((heads * key_dim, 40), (heads * (key_dim + value_dim), 40), (18, heads * value_dim))
        weights = [t.to(dtype) for s in shapes for t in (torch.randn(*s) * s[1] ** -0.5, torch.randn(s[0]))]

        def call(t):
            return ops.attention_pool(to(t, *features), *to(t, *weights), grid=(5, 7), num_heads=heads)

        with vlmkern.use_backend("native"):
            y = call(dtype)
        with vlmkern.use_backend("reference"):
            close(y, call)

    @pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
    def test_linear_gradients(self, way, dtype, activation):
        tensors = to(dtype, torch.randn(45, 60), torch.randn(70, 60) / 8, torch.randn(70), torch.randn(45, 70))
        gradients_close(tensors, lambda x, w, b, r: ops.linear(x, w, b, activation=activation, residual=r))

    def test_swiglu_gradients(self, way, dtype):
        tensors = to(dtype, torch.randn(45, 60), torch.randn(80, 60) / 8, torch.randn(50, 40) / 6, torch.randn(80))
        gradients_close(tensors, lambda x, up, down, b: ops.swiglu_mlp(x, up, down, b_up=b))

    def test_attention_pool_gradients(self, way, dtype):
        shapes = ((24, 40), (24,), (56, 40), (56,), (18, 32), (18,))
        tensors = to(dtype, torch.randn(3, 36, 40), *(torch.randn(*s) * s[-1] ** -0.5 for s in shapes))
        gradients_close(tensors, lambda f, *w: ops.attention_pool([f], *w, grid=(6, 6), num_heads=2))

    def test_sizes_of_zero_and_one(self, way, dtype):
        for rows, inputs, outputs in ((0, 16, 9), (20, 0, 9), (20, 16, 0), (20, 1, 1), (1, 1, 1)):
            x, w, b = to(dtype, torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs))
            with vlmkern.use_backend("native"):
                y = ops.linear(x, w, b, activation="silu")
            torch.testing.assert_close(y, F.silu(F.linear(x, w, b)), rtol=0.02, atol=0.02)
        for rows, features, outputs in ((0, 5, 3), (20, 0, 3), (20, 5, 0), (20, 1, 1)):
            x, up, down = to(dtype, torch.randn(rows, 8), torch.randn(2 * features, 8), torch.randn(outputs, features))
            with vlmkern.use_backend("native"):
                y = ops.swiglu_mlp(x, up, down)
            assert y.shape == (rows, outputs)
            torch.testing.assert_close(y, swiglu(x, up, down), rtol=0.05, atol=0.05)

    def test_nan_and_infinity_stay_in_their_rows(self, way, dtype):
        x, w = to(dtype, torch.randn(40, 33), torch.randn(50, 33))
        x[20, 32], x[39, 0] = torch.nan, torch.inf
        with vlmkern.use_backend("native"):
            y = ops.linear(x, w)
        assert y[20].isnan().all() and y[39].isinf().all()
        assert y[:20].isfinite().all() and y[21:39].isfinite().all()


@pytest.fixture
def panels(monkeypatch):
    as_on(monkeypatch, "panels", routes.epilogues())


@pytest.mark.usefixtures("panels")
class TestPanels:
    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    def test_results_are_those_of_float32_rounded_once(self, dtype):
        x, w, b, r = to(dtype, torch.randn(60, 300), torch.randn(80, 300) / 17, torch.randn(80), torch.randn(60, 80))
        with vlmkern.use_backend("native"):
            y = ops.linear(x, w, b, activation="gelu_tanh", residual=r)
            wide = ops.linear(*to(torch.float32, x, w, b), activation="gelu_tanh", residual=r.float())
        # which route has which sums in another order
        assert (y != wide.to(dtype)).float().mean() < 0.01

    def test_no_weight_is_there_in_float32(self):
        """Weights of 46 MB in float32, buffers of 8."""
        x, w, down, grad = to(
            torch.float16,
            *(torch.randn(12, 2400), torch.randn(4800, 2400), torch.randn(8, 2400), torch.randn(12, 4800)),
        )
        calls = (
            lambda: native_linear.linear(Linear(x, w, None, "gelu", None)),
            lambda: native_linear.linear_bwd(
                LinearGradient(grad, x, w, None, "gelu", [True, False, False, False], None)
            ),
            lambda: native_swiglu.swiglu_mlp(SwiGLU(x, w, down, None, None)),
        )
        for call in calls:
            with Largest() as seen:
                call()
            assert 0 < seen.bytes <= 8 << 20

    def test_a_block_of_rows_is_there_in_float32(self):
        x, w = torch.randn(5000, 64).half(), torch.randn(32, 64).half()
        with Largest() as seen:
            native_linear.linear(Linear(x, w, None, "none", None))
        assert seen.bytes == _cpu_products._BLOCK_ROWS * 64 * 4

    @pytest.mark.parametrize("release", [False, True])
    def test_nothing_is_packed_for_onednn(self, release):
        model = SwiGLUMLP(64, 96, 32).half().requires_grad_(False)
        x = torch.randn(40, 64).half()
        expected = model(x)
        report = vlmkern.pack(model, release=release)
        assert torch.equal(model(x), expected)
        assert not report.released and report.bytes == 0
        vlmkern.unpack(model)

    def test_autocast(self):
        x, w = torch.randn(20, 32), torch.randn(24, 32)
        with torch.autocast("cpu", torch.float16):
            y = ops.linear(x, w)
        assert y.dtype == torch.float16 and torch.equal(y, ops.linear(x.half(), w.half()))

    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    def test_compile_fullgraph_without_recompiling(self, dtype):
        torch._dynamo.reset()
        w, up, down = to(dtype, torch.randn(12, 16), torch.randn(20, 16), torch.randn(6, 10))

        def call(x):
            return ops.linear(x + 1, w, activation="gelu"), ops.swiglu_mlp(x, up, down)

        compiled = torch.compile(call, fullgraph=True, dynamic=True)
        for rows in (2, 7, 30, 100):
            x = torch.randn(rows, 16).to(dtype)
            with torch.compiler.set_stance("fail_on_recompile" if rows >= 30 else "default"):
                torch.testing.assert_close(compiled(x), call(x), rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    def test_opcheck(self, dtype):
        x, w, b, r = (
            t.to(dtype).requires_grad_()
            for t in (torch.randn(12, 8), torch.randn(5, 8), torch.randn(5), torch.randn(12, 5))
        )
        torch.library.opcheck(torch.ops.vlmkern.linear.default, (x, w, b, "gelu_tanh", r))


def test_float32_is_computed_as_torch_computes_it_at_each_precision_that_is_allowed():
    """oneDNN may take bfloat16 for float32 under the same settings through our routes as through F.linear: its own log
    says what it was allowed, whether or not this CPU makes use of it."""
    code = """
import sys, torch, torch.nn.functional as F
from vlmkern import ops
import vlmkern
layer = torch.nn.Linear(64, 48).requires_grad_(False)
x, r = torch.randn(20, 64), torch.randn(20, 48)
up, down = torch.randn(40, 64), torch.randn(9, 20)
trained = layer.weight.clone().requires_grad_()
def note(text):
    print("##", text, flush=True)
for setting in ("highest", "high", "medium"):
    torch.set_float32_matmul_precision(setting)
    for packed in (False, True):
        vlmkern.pack(layer) if packed else vlmkern.unpack(layer)
        note(setting + " ops")
        ops.linear(x, layer.weight, layer.bias, activation="gelu_tanh")
        ops.linear(x, layer.weight, residual=r)
        ops.swiglu_mlp(x, up, down)
        ops.linear(x, trained).sum().backward()
    note(setting + " torch")
    F.linear(x, layer.weight)
"""
    result = run_python(code, ONEDNN_VERBOSE="1")
    assert result.returncode == 0, result.stderr
    products: dict[str, list[bool]] = {}
    for line in result.stdout.splitlines():
        if line.startswith("## "):
            name = line[3:]
        elif "exec,cpu,inner_product" in line or "exec,cpu,matmul" in line:
            products.setdefault(name, []).append("fpmath:bf16" in line)
    # torch asks oneDNN, and not MKL, where less is allowed and oneDNN has bfloat16
    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert products.get("medium torch", []) == [True] * has_bfloat16
    for setting, allowed in (("highest", False), ("high", False), ("medium", has_bfloat16)):
        assert set(products.get(f"{setting} torch", [])) <= {allowed}
        assert set(products.get(f"{setting} ops", [])) <= {allowed}, setting
        # five or six products, as they are and of a packed layer
        assert routes.here(torch.float32) != "oneDNN" or len(products[f"{setting} ops"]) >= 2 * 5


class Largest(TorchDispatchMode):
    """Bytes of the largest float32 tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


def to(dtype, *tensors):
    return [to1(t, dtype) for t in tensors]


def to1(tensor, dtype):
    return None if tensor is None else tensor.to(dtype)


def swiglu(x, w_up, w_down, b_up=None, b_down=None):
    value, gate = F.linear(x, w_up, b_up).chunk(2, -1)
    return F.linear(F.silu(gate) * value, w_down, b_down)


def close(actual, run):
    """Against float64: 16-bit types by what plain torch makes of it, float32 by its own precision."""
    assert torch.isfinite(actual).all()
    if actual.dtype == torch.float32:
        exact = run(torch.float64)
        assert (actual.double() - exact).abs().max() <= 2e-5 * exact.abs().max()
    else:
        low_precision_close(actual, run)


def gradients_close(tensors, call):
    def gradients(dtype, backend):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        with vlmkern.use_backend(backend):
            return torch.autograd.grad(call(*leaves).square().sum(), leaves)

    dtype = tensors[0].dtype
    found = gradients(dtype, "native")
    for index, gradient in enumerate(found):
        exact = gradients(torch.float64, "reference")[index]
        if exact.abs().max() > 1e-9:  # keys' biases get none
            close(gradient, lambda t, index=index: gradients(t, "reference")[index])
