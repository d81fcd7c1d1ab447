"""What pictures cost: tokens, FLOPs and KV-cache bytes of jina-vlm without and with attention pooling (paper, Table 1),
and of five systems side by side."""

from .costs import MODELS, picture_efficiency
from .formulas import Sizes, TokenLayout, token_layout
from .pictures import SYSTEMS, image_tokens
from .table import CONVENTIONS, QUANTITIES, efficiency_rows, render, render_sweep, sweep_rows

__all__ = [
    "CONVENTIONS",
    "MODELS",
    "QUANTITIES",
    "SYSTEMS",
    "Sizes",
    "TokenLayout",
    "efficiency_rows",
    "image_tokens",
    "picture_efficiency",
    "render",
    "render_sweep",
    "sweep_rows",
    "token_layout",
]
