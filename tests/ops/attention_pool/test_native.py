"""The extension's attention pooling, below the op: what it refuses, and what it writes."""

from __future__ import annotations

import pytest
import torch

import vlmkern


class TestNativeArguments:
    """The extension refuses what describes no memory, and leaves what is around its outputs alone."""

    @pytest.fixture
    def make(self):
        report = vlmkern.backends()["native"]
        if not report["available"]:
            pytest.skip(report["reason"])

        def make(dtype=0, features=((64, 90, 6),), tiles=2, channels=6, grid=(3, 5), window=(2, 2), windows=12, **more):
            pointers = {"pad": 0, "pad_embed": 0, "keep": 0} | more
            return vlmkern.dispatch.extension.extension().AttentionPool(
                dtype, list(features), tiles, channels, grid, window, windows=windows, **pointers
            )

        return make

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"dtype": 7}, "dtype"),
            ({"features": ()}, "layers at least 1"),
            ({"features": ((0, 90, 6),)}, "null pointer"),
            ({"features": ((64, -90, 6),)}, r"features\[0\]: got strides"),
            ({"features": ((64, 90, 6), (64, 90, 2**60))}, r"features\[1\]: got strides"),
            ({"grid": (0, 5)}, "grid and window"),
            ({"window": (2, -1)}, "grid and window"),
            ({"windows": 11}, "expected all of the grid's"),
            ({"windows": -1}, "negative"),
            ({"channels": 2**60}, "too large"),
            ({"grid": (2**31, 2**31)}, "too large|too many"),
            ({"pad": 64}, "pad_embed"),
        ],
    )
    def test_refused(self, make, changes, message):
        problem = make(**changes)
        for call in (
            lambda: problem.mean(64, 1),
            lambda: problem.slots(64, 64, 1.0, 1),
            lambda: problem.context(64, 64, 64, 0, 64, 2, 3, 3, 1.0, 1),
        ):
            with pytest.raises(ValueError, match=message):
                call()

    def test_refused_results_and_indices(self, make):
        for arguments in ((0, 64, 64, 0, 64, 2, 3, 3), (64, 64, 64, 0, 0, 2, 3, 3), (64, 64, 64, 0, 64, 2, 0, 3)):
            with pytest.raises(ValueError, match=r"null pointer|expected at least 1"):
                make().context(*arguments, 1.0, 1)
        with pytest.raises(ValueError, match="null pointer"):
            make().mean(0, 1)
        keep = torch.tensor([0, 12])
        with pytest.raises(ValueError, match="keep: got 12, expected 0 to 11"):
            make(keep=keep.data_ptr(), windows=2).mean(64, 1)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({0: 7}, "dtype"),
            ({1: 0}, "null pointer"),
            ({2: [(64, 64), (64, 0)]}, "vectors: null pointer"),
            ({3: 0}, "null pointer"),
            ({4: -1}, "negative"),
            ({5: 0}, "size at least 1"),
            ({6: 2**60}, "x|vectors"),
        ],
    )
    def test_refused_gradients(self, make, changes, message):
        arguments = [0, 64, [(64, 64), (64, 64)], 64, 12, 4, 6, 1.0, 1]
        for index, value in changes.items():
            arguments[index] = value
        with pytest.raises(ValueError, match=message):
            vlmkern.dispatch.extension.extension().attention_pool_slots_bwd(*arguments)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_gradients_write_only_their_outputs(self, make, dtype):
        x, buffer = torch.randn(3, 5, 19).to(dtype), torch.full((4, 3 * 19 + 64), torch.nan, dtype=dtype)
        d_x = torch.full((3 * 5 * 19 + 64,), torch.nan)
        for row in (*buffer, d_x):
            row[32:-32] = torch.randn(len(row) - 64)
        pointers = [row[32:].data_ptr() for row in buffer]
        vlmkern.dispatch.extension.extension().attention_pool_slots_bwd(
            vlmkern.dispatch.extension.dtype_code(dtype),
            x.data_ptr(),
            [pointers[:2], pointers[2:]],
            d_x[32:].data_ptr(),
            *x.shape,
            0.5,
            1,
        )
        for row in (*buffer, d_x):
            assert row[:32].isnan().all() and row[-32:].isnan().all() and row[32:-32].isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_writes_only_its_outputs(self, make, dtype):
        x, weights = torch.randn(2, 15, 6).to(dtype), torch.randn(16, 6).to(dtype)
        code = {torch.float32: 0, torch.bfloat16: 1}[dtype]
        problem = make(dtype=code, features=((x.data_ptr(), 90, 6),))
        at = [weights.data_ptr()] * 2
        q = torch.randn(12, 6).to(dtype)
        for size, run in (
            (6, lambda out: problem.mean(out, 1)),
            (6, lambda out: problem.slots(q.data_ptr(), out, 1.0, 1)),
            (10, lambda out: problem.context(q.data_ptr(), *at, 0, out, 2, 3, 5, 1.0, 1)),
        ):
            buffer = torch.full((12 * size + 64,), torch.nan, dtype=dtype)
            out = buffer[32:-32]
            run(out.data_ptr())
            assert buffer[:32].isnan().all() and buffer[-32:].isnan().all() and out.isfinite().all()
