"""Numbers that kernels are compiled with."""

import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SQRT_HALF = tl.constexpr(0.7071067811865476)
NORMAL_AT_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)

# tanh-GELU is x * sigmoid(2u) with u = sqrt(2 / pi) * (x + 0.044715 x^3): these are 2 sqrt(2 / pi) and its cubic part
GELU_TANH_LINEAR = tl.constexpr(1.5957691216057308)
GELU_TANH_CUBIC = tl.constexpr(0.07135481282553575)

# quick GELU is x * sigmoid(QUICK_GELU x)
QUICK_GELU = tl.constexpr(1.702)
