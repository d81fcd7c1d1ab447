"""Tensor parallelism: attention by heads, MLPs by hidden columns (Shoeybi et al. 2019, section 3).

Every rank gets the whole input, works on its heads or columns with parameters that are DTensors, and the partial
results are summed; biases and residuals of the last product are added once, after the sum. State-dict names and the
tensors' full shapes stay, also where a parameter holds several matrices one after the other ([q | k | v],
[value | gate]): each rank holds its part of each.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from .. import ops
from ..models.jina_vlm.vision import VisionMLP
from ..nn import AttentionPool, SwiGLUMLP, TileAttention, functional
from ._group import enter, group_of, leave

ROWS, COLUMNS = Shard(0), Shard(1)


def tensor_parallel(module: nn.Module, mesh: DeviceMesh) -> dict[str, str]:
    """Shards, in place, the layers inside a module that can be: `TileAttention` and `AttentionPool` by heads, the
    tower's MLPs and `SwiGLUMLP` (connector and decoder) by hidden columns.

    The rest stays whole on every rank, where equal inputs give equal gradients: embeddings, norms, the decoder's
    grouped-query attention (whose fused projection cannot be sharded by groups in place), the head.

    Args:
        module: with the same weights on all ranks.
        mesh: of one dimension.

    Returns:
        Name of each sharded module and how it was sharded.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: a mesh of several dimensions; heads or columns that the mesh's size does not divide (nothing is
            sharded then).

    Example:
        mesh = init_device_mesh("cuda", (2,))
        tensor_parallel(model, mesh)
        logits = model(**inputs)  # the same on both ranks
    """
    group_of(mesh)
    plan: dict[str, ParallelStyle] = {}
    for name, inner in module.named_modules():
        style = _STYLES.get(type(inner))
        if style is not None:
            style.check(name, inner, mesh.size())
            plan[name] = style
    if "" in plan:
        parallelize_module(module, mesh, plan.pop(""))
    parallelize_module(module, mesh, plan)
    return {
        name or type(module).__name__: _STYLES[type(inner)].unit
        for name, inner in module.named_modules()
        if type(inner) in _STYLES
    }


class _Style(ParallelStyle):
    """One kind of module: where its parameters are cut, and its forward on one rank's part.

    Attributes:
        unit: what is shared out, for messages.
        cuts: parameter name -> placement; parameters that are not named stay whole.
    """

    unit: str

    def cuts(self, module: nn.Module) -> dict[str, Placement]:
        raise NotImplementedError

    def units(self, module: nn.Module) -> int:
        """How many heads or columns there are."""
        raise NotImplementedError

    def check(self, name: str, module: nn.Module, parts: int) -> None:
        """ValueError unless the units can be shared out evenly."""
        if self.units(module) % parts:
            raise ValueError(
                f"{name or type(module).__name__}: got {self.units(module)} {self.unit}, expected a multiple of the"
                f" mesh's size, {parts}"
            )

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.check("", module, device_mesh.size())
        group = group_of(device_mesh)
        for name, placement in self.cuts(module).items():
            owner, _, last = name.rpartition(".")
            parameter = module.get_parameter(name)
            if isinstance(parameter, DTensor):
                raise ValueError(f"{name}: got a parameter that is sharded already, expected a plain one")
            sharded = nn.Parameter(
                distribute_tensor(parameter.detach(), device_mesh, [placement]), requires_grad=parameter.requires_grad
            )
            module.get_submodule(owner).register_parameter(last, sharded)
        parts = device_mesh.size()

        def forward(self_: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            return self.forward(self_, group, parts, *args, **kwargs)

        module.forward = MethodType(forward, module)
        return module

    def forward(self, module: nn.Module, group: Any, parts: int, *args: Any, **kwargs: Any) -> Tensor:
        """One rank's part, summed."""
        raise NotImplementedError


class TileAttentionParallel(_Style):
    """`TileAttention` by heads."""

    unit = "heads"

    def units(self, module: TileAttention) -> int:
        return module.num_heads

    def cuts(self, module: TileAttention) -> dict[str, Placement]:
        biases = dict.fromkeys(("q_b", "k_b", "v_b"), ROWS)
        return {"qkv_w.weight": _StridedShard(0, split_factor=3), **biases, "out.weight": COLUMNS}

    def forward(
        self,
        module: TileAttention,
        group: Any,
        parts: int,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        bias = torch.cat([_local(module.q_b), _local(module.k_b), _local(module.v_b)])
        part = functional.self_attention(
            enter(x, group),
            [(_local(module.qkv_w.weight), bias)],
            (_local(module.out.weight), None),
            module.num_heads // parts,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        )
        return _finish(part, group, module.out.bias, residual)


class MLPParallel(_Style):
    """The tower's MLP by hidden columns."""

    unit = "hidden columns"

    def units(self, module: VisionMLP) -> int:
        return module.up.out_features

    def cuts(self, module: VisionMLP) -> dict[str, Placement]:
        return {"up.weight": ROWS, "up.bias": ROWS, "down.weight": COLUMNS}

    def forward(self, module: VisionMLP, group: Any, parts: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        up = (_local(module.up.weight), _local(module.up.bias))
        part = functional.mlp(enter(x, group), up, (_local(module.down.weight), None), "gelu_tanh")
        return _finish(part, group, module.down.bias, residual)


class SwiGLUParallel(_Style):
    """`SwiGLUMLP` by hidden columns."""

    unit = "hidden columns"

    def units(self, module: SwiGLUMLP) -> int:
        return module.down.in_features

    def cuts(self, module: SwiGLUMLP) -> dict[str, Placement]:
        return {"up.weight": _StridedShard(0, split_factor=2), "down.weight": COLUMNS}

    def forward(self, module: SwiGLUMLP, group: Any, parts: int, x: Tensor) -> Tensor:
        part = ops.swiglu_mlp(enter(x, group), _local(module.up.weight), _local(module.down.weight))
        return leave(part, group)


class AttentionPoolParallel(_Style):
    """`AttentionPool` by heads."""

    unit = "heads"

    def units(self, module: AttentionPool) -> int:
        return module.num_heads

    def check(self, name: str, module: AttentionPool, parts: int) -> None:
        super().check(name, module, parts)
        keys, values = module.q_w.out_features, module.out.in_features
        if keys != values:
            raise ValueError(f"{name}: got keys of {keys} and values of {values}, expected equal sizes to shard")

    def cuts(self, module: AttentionPool) -> dict[str, Placement]:
        cuts: dict[str, Placement] = {"q_w.weight": ROWS, "kv_w.weight": _StridedShard(0, split_factor=2)}
        if module.q_b is not None:
            cuts |= dict.fromkeys(("q_b", "k_b", "v_b"), ROWS)
        return {**cuts, "out.weight": COLUMNS}

    def forward(
        self,
        module: AttentionPool,
        group: Any,
        parts: int,
        features: Any,
        pad_embed: Tensor | None = None,
        mask: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        biased = module.q_b is not None
        part = ops.attention_pool(
            [enter(feature, group) for feature in features],
            _local(module.q_w.weight),
            _local(module.q_b) if biased else None,
            _local(module.kv_w.weight),
            torch.cat([_local(module.k_b), _local(module.v_b)]) if biased else None,
            _local(module.out.weight),
            None,
            grid=module.grid,
            num_heads=module.num_heads // parts,
            window=module.window,
            pad_embed=None if pad_embed is None else enter(pad_embed, group),
            mask=mask,
            keep=keep,
        )
        return _finish(part, group, module.out.bias, None)


_STYLES: dict[type[nn.Module], _Style] = {
    TileAttention: TileAttentionParallel(),
    VisionMLP: MLPParallel(),
    SwiGLUMLP: SwiGLUParallel(),
    AttentionPool: AttentionPoolParallel(),
}


def _local(parameter: DTensor) -> Tensor:
    return parameter.to_local()


def _finish(part: Tensor, group: Any, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The sum over ranks, with what is added once."""
    y = leave(part, group)
    if bias is not None:
        y = y + bias
    return y if residual is None else y + residual
