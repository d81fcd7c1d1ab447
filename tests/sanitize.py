"""Runs the op tests on a sanitized extension: python tests/sanitize.py BUILD_DIRECTORY.

For each instruction set that this CPU has, a process with the sanitizer's runtime preloaded puts the extension of the
build directory in the place of the installed one and runs pytest.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

TESTS = (
    "ops",
    "test_native.py",
    *(f"test_native_{name}.py" for name in ("extremes", "memory", "norms", "properties")),
)
# what emulated tiles compute
TILES = ("ops/attention", "ops/attention_pool", "test_native_extremes.py", "test_native_properties.py")
# compilers and child processes would run with the preloaded runtime, and without the sanitized extension
LEFT_OUT = " and ".join(
    f"not {name}" for name in ("compile", "by_force", "isa_that", "opcheck", "change_after", "forked", "for_it")
)


def main(directory: str) -> int:
    extension = next(Path(directory).glob("_C*.so")).resolve()
    # libstdc++ too: the sanitizer looks for it when it starts, before Python loads anything of C++
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    report = subprocess.run(
        [
            sys.executable,
            "-c",
            "import vlmkern; n = vlmkern.backends()['native']; print(*n['isas'], *n.get('emulated_isas', []))",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    for isa in report.stdout.split():
        print(f"== {isa}", flush=True)
        environment = os.environ | {
            "LD_PRELOAD": " ".join(runtimes),
            # leaks of the interpreter and of torch are not ours; new and malloc are paired inside torch's own libraries
            "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "VLMKERN_CPU_ISA": isa,
            "VLMKERN_SANITIZED": str(extension),
            "OMP_NUM_THREADS": "2",
        }
        status = subprocess.run([sys.executable, __file__], env=environment, check=False).returncode
        if status:
            return status
    return 0


def run_tests(extension: str) -> int:
    # before the package, which would load its own
    loader = importlib.machinery.ExtensionFileLoader("vlmkern._C", extension)
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_file_location("vlmkern._C", extension, loader=loader)
    )
    loader.exec_module(module)
    sys.modules["vlmkern._C"] = module

    import pytest

    import vlmkern

    assert vlmkern.dispatch.extension.extension() is module

    folder = Path(__file__).parent
    tests = TILES if os.environ["VLMKERN_CPU_ISA"] == "amx_emulated" else TESTS
    files = [str(folder / name) for name in tests]
    return pytest.main([*files, "-q", "-k", LEFT_OUT, "-p", "no:cacheprovider", "--no-header"])


if __name__ == "__main__":
    sanitized = os.environ.get("VLMKERN_SANITIZED")
    sys.exit(run_tests(sanitized) if sanitized else main(sys.argv[1]))
