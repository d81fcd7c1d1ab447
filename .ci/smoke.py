"""Run from an installed wheel, outside the checkout: python smoke.py native|pure."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import torch

import vlmkern

expect_native = sys.argv[1] == "native"
assert "triton" not in sys.modules, "importing vlmkern imported triton"
assert "site-packages" in vlmkern.__file__, vlmkern.__file__
assert vlmkern.backends()["native"]["available"] is expect_native, vlmkern.backends()["native"]

module = importlib.import_module("vlmkern.kernels.swiglu_mlp.gate")
assert hasattr(module, "swiglu_mlp_fwd_kernel")
launch = importlib.import_module("vlmkern.kernels._launch")
assert launch.table("attention_fwd_kernel", 90)["entries"], "the tables of configurations are not in the package"
transformers = importlib.import_module("transformers")
assert transformers.SiglipVisionModel and transformers.Qwen3ForCausalLM

q = torch.randn(2, 9, 3, 72)
expected = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3).transpose(1, 2)
torch.testing.assert_close(vlmkern.ops.attention(q, q, q), expected, rtol=1e-5, atol=1e-5)

command = [str(Path(sys.executable).with_name("vlmkern")), "demo", "--size", "tiny", "--json"]
report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
assert len(report["new_ids"]) == 16 and Path(report["picture"]).exists()
print(f"vlmkern {vlmkern.__version__} from {Path(vlmkern.__file__).parent}: smoke test passed ({sys.argv[1]})")
