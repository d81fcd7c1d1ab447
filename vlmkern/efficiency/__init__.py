"""FLOPs, KV-cache bytes and visual tokens of jina-vlm without and with attention pooling (paper, Table 1)."""

from .formulas import Sizes, TokenLayout, token_layout
from .table import CONVENTIONS, QUANTITIES, efficiency_rows, render, render_sweep, sweep_rows

__all__ = [
    "CONVENTIONS",
    "QUANTITIES",
    "Sizes",
    "TokenLayout",
    "efficiency_rows",
    "render",
    "render_sweep",
    "sweep_rows",
    "token_layout",
]
