"""Native kernels in processes that are forked, as data loaders and prefork servers do."""

from __future__ import annotations

import pytest
from test_backends import run_python

import vlmkern

report = vlmkern.backends()["native"]
pytestmark = pytest.mark.skipif(not report["available"], reason=report.get("reason", ""))

# calls the extension with two threads and sizes that each use them; torch's own thread pool is left out of it
OPS = """
import os, signal, sys, threading, time
import torch
from native_calls import attention, attention_bwd
from native_calls import attention_pool
from native_calls import linear
from native_calls import silu_mul, silu_mul_bwd

torch.set_num_threads(2)
torch.manual_seed(0)
q, k, v = torch.randn(1, 200, 3, 4, 24).unbind(2)
up, grad = torch.randn(256, 1024), torch.randn(256, 512)
x, weight = torch.randn(2, 512), torch.randn(512, 512)
features = torch.randn(2, 256, 32)
w_q, w_kv, w_o = torch.randn(3, 32), torch.randn(6, 32), torch.randn(4, 3)


def compute():
    out, lse = attention(q, k, v, 0.2, None, None)
    return [
        out,
        *attention_bwd(torch.ones_like(out), q, k, v, out, lse, 0.2, None, None),
        silu_mul(up),
        *silu_mul_bwd(grad, up),
        linear(x, weight, None, "none", None),
        attention_pool([features], w_q, None, w_kv, None, w_o, None, [16, 16], 3, [2, 2], None, None, None),
    ]


def in_children(count, work):
    # forks, and expects every child to be done with `work` soon
    for i in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work()
                status = 0
            finally:
                os._exit(status)
        until = time.monotonic() + 20
        while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < until:
            time.sleep(0.001)
        if done[0] == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            sys.exit(f"child {i} of {count} hangs")
        assert done[1] == 0, f"child {i}: status {done[1]}"


def same(expected):
    found = compute()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

"""


def check(code):
    result = run_python(OPS + code)
    assert result.returncode == 0, result.stderr


def test_children_compute_after_their_parent():
    """The parent's worker threads are not there in a child: nothing may wait for them."""
    check("""
expected = compute()
in_children(10, lambda: same(expected))
same(expected)
""")


def test_children_compute_before_their_parent():
    check("""
in_children(3, compute)
expected = compute()
in_children(3, lambda: same(expected))
""")


def test_a_child_forked_while_another_thread_computes():
    check("""
expected = compute()
stop = threading.Event()


def keep_computing():
    while not stop.is_set():
        attention(q, k, v, 0.2, None, None)
        silu_mul(up)


thread = threading.Thread(target=keep_computing)
thread.start()
try:
    in_children(10, lambda: same(expected))
finally:
    stop.set()
    thread.join()
""")


def test_threads_and_children_of_children():
    """Threads that a child starts, and children that it forks, compute too."""
    check("""
expected = compute()


def child():
    same(expected)
    errors = []

    def run():
        try:
            same(expected)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors, errors
    in_children(2, lambda: same(expected))


in_children(3, child)
""")
