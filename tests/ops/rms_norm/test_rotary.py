"""`vlmkern.ops.rms_norm` with rotary tables: heads normed and turned, in one pass."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import LOW_PRECISION, low_precision_close, op_backends

import vlmkern
from vlmkern import ops

OP = torch.ops.vlmkern.rms_norm.default
BACKENDS = pytest.mark.parametrize("backend", op_backends("rms_norm"))


def exact(x, weight, angles, interleaved=False, eps=1e-6, offset=0.0):
    """In float64: pairs of channels are complex numbers, which a rotation multiplies by e^(i angle). angles [N, C / 2],
    or with all leading dimensions of x [..., N, H, C]."""
    x, weight, angles = x.double(), weight.double(), angles.double()
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight + offset)
    half = x.shape[-1] // 2
    pairs = normed.unflatten(-1, (half, 2)) if interleaved else normed.unflatten(-1, (2, half)).mT
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.clone(memory_format=torch.contiguous_format)) * turn)
    return (turned if interleaved else turned.mT).flatten(-2)


def tables(angles):
    return angles.cos().float(), angles.sin().float()


def make(*shape, dtype=torch.float32):
    """x [..., N, H, C], weight, and angles [N, C / 2]."""
    x, weight = torch.randn(shape).to(dtype), (torch.randn(shape[-1]) + 1).to(dtype)
    return x, weight, torch.rand(shape[-3], shape[-1] // 2) * 60 - 30


def views(cols):
    """[2, 5, 3, cols]: dense, q of a fused projection, heads first, repeated heads, and rows apart."""
    return (
        torch.randn(2, 5, 3, cols),
        torch.randn(2, 5, 3, 3, cols)[:, :, 1],
        torch.randn(2, 3, 5, cols).transpose(1, 2),
        torch.randn(2, 5, 1, cols).expand(-1, -1, 3, -1),
        torch.randn(cols, 2, 5, 3).permute(1, 2, 3, 0),
    )


@BACKENDS
class TestNumbers:
    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize("cols", [2, 6, 16, 24, 34, 72, 80, 128, 130])
    def test_widths(self, backend, cols, interleaved):
        x, weight, angles = make(2, 7, 3, cols)
        with vlmkern.use_backend(backend):
            found = ops.rms_norm(x, weight, rotary=tables(angles), interleaved=interleaved, offset=1.0)
        expected = exact(x, weight, angles, interleaved, offset=1.0)
        assert found.is_contiguous() and found.shape == x.shape
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize("interleaved", [False, True])
    def test_views_and_forms_of_tables(self, backend, interleaved):
        """Tables of half rows and whole ones, for all leading dimensions or the tokens alone, dense and strided."""
        weight = torch.randn(48)[::2]
        angles = torch.rand(2, 5, 12) * 6
        for x in views(24):
            for leading, width, spread in itertools.product((False, True), (1, 2), (False, True)):
                a = angles if leading else angles[1]
                pair = tuple(t.repeat(*(1,) * (t.dim() - 1), width) for t in (a.cos(), a.sin()))
                if spread:
                    pair = tuple(apart_rows(t) for t in pair)
                with vlmkern.use_backend(backend):
                    found = ops.rms_norm(x, weight, rotary=pair, interleaved=interleaved)
                torch.testing.assert_close(found.double(), exact(x, weight, a, interleaved), rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize("lead", [(), (2,), (2, 3), (0,)])
    def test_leading_dimensions(self, backend, lead):
        x, weight, angles = make(*lead, 5, 3, 16)
        with vlmkern.use_backend(backend):
            found = ops.rms_norm(x, weight, rotary=tables(angles))
            own = angles.expand(*lead, -1, -1)
            assert torch.equal(found, ops.rms_norm(x, weight, rotary=(own.cos(), own.sin())))
        torch.testing.assert_close(found.double(), exact(x, weight, angles), rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    @pytest.mark.parametrize("interleaved", [False, True])
    def test_is_rounded_once(self, backend, dtype, interleaved):
        """Half a unit in the last place, and the error of float32 next to the largest of the row."""
        x, weight, angles = make(3, 17, 2, 128, dtype=dtype)
        with vlmkern.use_backend(backend):
            found = ops.rms_norm(x, weight, rotary=tables(angles), interleaved=interleaved)
        assert found.dtype == dtype
        expected = exact(x, weight, angles, interleaved)
        info = torch.finfo(dtype)
        step = torch.exp2(expected.abs().clamp_min(info.smallest_normal).log2().floor()) * info.eps
        # angles of up to 30 have cosines rounded to float32
        limit = step / 2 + 4e-6 * expected.abs().amax(-1, keepdim=True)
        assert ((found.double() - expected).abs() <= limit).all()

    def test_more_rows_than_a_thread_takes_at_once(self, backend):
        x, weight, angles = make(3, 211, 5, 32)
        with vlmkern.use_backend(backend):
            found = ops.rms_norm(x, weight, rotary=tables(angles))
        torch.testing.assert_close(found.double(), exact(x, weight, angles), rtol=1e-5, atol=2e-5)


def apart_rows(t):
    """The same values in memory where tokens are further apart."""
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 5), torch.nan)
    wide[..., :-5] = t
    return wide[..., :-5]


@BACKENDS
class TestGradients:
    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize("trained", [(0,), (1,), (0, 1)])
    def test_against_float64(self, backend, trained, interleaved):
        weight, angles = torch.randn(24), torch.rand(5, 12) * 6
        for x, grad in itertools.product(views(24), views(24)[:3]):
            found = []
            for function, dtype in ((None, torch.float32), (exact, torch.float64)):
                tensors = [t.detach().to(dtype) if function else t.detach() for t in (x, weight)]
                leaves = [tensors[i].requires_grad_() for i in trained]
                if function is None:
                    with vlmkern.use_backend(backend):
                        out = ops.rms_norm(*tensors, rotary=tables(angles), interleaved=interleaved, offset=0.5)
                else:
                    out = exact(*tensors, angles, interleaved, offset=0.5)
                found.append(torch.autograd.grad(out, leaves, grad.to(dtype)))
            for a, e in zip(*found, strict=True):
                torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    def test_low_precision(self, backend, dtype):
        x, weight, angles = make(2, 9, 4, 72, dtype=dtype)
        grad = torch.randn(2, 9, 4, 72).to(dtype)
        cos, sin = (torch.cat([t, t], -1)[:, None] for t in (angles.cos(), angles.sin()))

        def gradients(t):
            leaves = [v.detach().to(t).requires_grad_() for v in (x, weight)]
            wide = torch.promote_types(t, torch.float32)
            normed = torch.nn.functional.rms_norm(leaves[0].to(wide), (72,), leaves[1].to(wide), 1e-6).to(t)
            first, second = normed.chunk(2, -1)
            return torch.autograd.grad(
                normed * cos.to(t) + torch.cat([-second, first], -1) * sin.to(t), leaves, grad.to(t)
            )

        leaves = [v.detach().requires_grad_() for v in (x, weight)]
        with vlmkern.use_backend(backend):
            actual = torch.autograd.grad(ops.rms_norm(*leaves, rotary=tables(angles)), leaves, grad)
        for i, gradient in enumerate(actual):
            low_precision_close(gradient, lambda t, i=i: gradients(t)[i])

    def test_long_rows(self, backend):
        """Of several rows at a time."""
        x, weight, angles = make(3, 2, 2048)
        grad, found = torch.randn(3, 2, 2048), []
        for dtype in (torch.float32, torch.float64):
            leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight)]
            with vlmkern.use_backend(backend):
                out = ops.rms_norm(*leaves, rotary=tables(angles)) if dtype == torch.float32 else exact(*leaves, angles)
            found.append(torch.autograd.grad(out, leaves, grad.to(dtype)))
        for a, e in zip(*found, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved):
    x, weight, angles = make(3, 2, 6, dtype=torch.float64)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    pair = tables(angles)
    assert torch.autograd.gradcheck(
        lambda x, w: ops.rms_norm(x, w, eps=1e-3, rotary=pair, interleaved=interleaved), inputs
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_float64_tables(interleaved):
    """As exact as their numbers, which those of float32 are not."""
    x, weight, angles = make(2, 7, 3, 16, dtype=torch.float64)
    pair = angles.double().cos(), angles.double().sin()
    found = ops.rms_norm(x, weight, rotary=pair, interleaved=interleaved)
    torch.testing.assert_close(found, exact(x, weight, angles, interleaved), rtol=1e-12, atol=1e-12)


def test_is_what_norm_and_attention_do_one_after_the_other():
    """The same rotation as that of `ops.attention`."""
    q, k, v = torch.randn(2, 9, 3, 4, 32).unbind(2)
    weight, angles = torch.randn(32), torch.rand(9, 16)
    for interleaved in (False, True):
        turned = (ops.rms_norm(t, weight, rotary=tables(angles), interleaved=interleaved) for t in (q, k))
        normed = (ops.rms_norm(t, weight) for t in (q, k))
        expected = ops.attention(*normed, v, rotary=tables(angles), interleaved=interleaved)
        torch.testing.assert_close(ops.attention(*turned, v), expected, rtol=1e-5, atol=1e-5)


class TestRegistration:
    def test_opcheck(self):
        x, weight, angles = make(2, 5, 3, 8)
        pair = tables(angles)
        inputs = (x.requires_grad_(), weight.requires_grad_(), None, 1e-6, 0.0)
        torch.library.opcheck(OP, (*inputs, *pair, False))
        torch.library.opcheck(OP, (x.detach().transpose(0, 1).transpose(0, 1), weight, None, 1e-6, 1.0, *pair, True))

    def test_autocast_leaves_tables_in_float32(self):
        x, weight, angles = make(5, 3, 40)
        with torch.autocast("cpu", torch.bfloat16):
            found = ops.rms_norm(x, weight, rotary=tables(angles))
        assert torch.equal(found, ops.rms_norm(x.bfloat16(), weight.bfloat16(), rotary=tables(angles)))

    def test_compile_without_recompiling(self):
        torch._dynamo.reset()
        weight = torch.randn(8)
        compiled = torch.compile(
            lambda x, cos, sin: ops.rms_norm(x + 1, weight, rotary=(cos, sin)), fullgraph=True, dynamic=True
        )
        for tokens in (2, 7, 30):
            x, _, angles = make(2, tokens, 3, 8)
            with torch.compiler.set_stance("fail_on_recompile" if tokens == 30 else "default"):
                found = compiled(x, *tables(angles))
            torch.testing.assert_close(found.double(), exact(x + 1, weight, angles), rtol=1e-5, atol=2e-5)

    def test_export(self):
        class Norm(torch.nn.Module):
            def forward(self, x, weight, cos, sin):
                return ops.rms_norm(x, weight, rotary=(cos, sin))

        x, weight, angles = make(2, 5, 3, 8)
        tokens = torch.export.Dim("tokens", min=2)
        shapes = ({1: tokens}, {}, {0: tokens}, {0: tokens})
        exported = torch.export.export(Norm(), (x, weight, *tables(angles)), dynamic_shapes=shapes)
        x, weight, angles = make(2, 9, 3, 8)
        torch.testing.assert_close(
            exported.module()(x, weight, *tables(angles)).double(), exact(x, weight, angles), rtol=1e-5, atol=2e-5
        )


@pytest.mark.parametrize("backend", [*op_backends("rms_norm"), "auto"])
def test_errors(backend):
    x, weight, angles = make(2, 5, 3, 8)
    cos, sin = tables(angles)
    cases = [
        ({"rotary": cos}, ValueError, "rotary: got Tensor"),
        ({"rotary": (cos,)}, ValueError, "rotary: got tuple"),
        ({"rotary": (cos, None)}, TypeError, "rotary: sin: got None"),
        ({"rotary": (cos, sin), "residual": x}, ValueError, "rotary: got tables with a residual"),
        ({"rotary": (cos.double(), sin)}, TypeError, "rotary: cos: got dtype torch.float64, expected torch.float32"),
        ({"rotary": (cos[:4], sin[:4])}, ValueError, r"rotary: cos: got shape \[4, 4\], expected \[5, 8\]|\[5, 4\]"),
        ({"rotary": (cos[:, :3], sin[:, :3])}, ValueError, r"rotary: cos: got shape \[5, 3\]"),
        ({"rotary": (cos, torch.cat([sin, sin], 1))}, ValueError, "rotary: sin: got shape"),
        ({"rotary": (cos.expand(3, 5, 4), sin.expand(3, 5, 4))}, ValueError, r"rotary: cos: got shape \[3, 5, 4\]"),
        ({"rotary": (cos[None, None], sin[None, None])}, ValueError, r"rotary: cos: got shape \[1, 1, 5, 4\]"),
        ({"rotary": (cos.t().contiguous().t(), sin)}, ValueError, "rotary: cos: got strides"),
        ({"rotary": (cos.to("meta"), sin)}, ValueError, "rotary: cos: got device meta, expected cpu"),
        ({"rotary": (cos.clone().requires_grad_(), sin)}, ValueError, "rotary: got a cos that requires a gradient"),
    ]
    with vlmkern.use_backend(backend):
        for options, error, message in cases:
            with pytest.raises(error, match=message):
                ops.rms_norm(x, weight, **options)
        with pytest.raises(ValueError, match="rotary: got a head dimension of 7"):
            ops.rms_norm(x[..., :7], weight[:7], rotary=(cos, sin))
        with pytest.raises(ValueError, match=r"x: got shape \[3, 8\], expected \[..., N, H, C\]"):
            ops.rms_norm(x[0, 0], weight, rotary=(cos, sin))
        with pytest.raises(ValueError, match="rotary: got one table"):
            OP(x, weight, None, 1e-6, 0.0, cos, None)
        with pytest.raises(ValueError, match="rotary: cos: got shape"):
            torch.ops.vlmkern.rms_norm_bwd(x, None, x, weight, 1e-6, 0.0, [True] * 2, cos[:2], sin[:2])
