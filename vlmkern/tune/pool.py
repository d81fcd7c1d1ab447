"""Compiles candidates ahead in processes of their own, for a device that need not be there.

What is compiled lies in Triton's disk cache, under the key that a launch with the same arguments has: the process that
times candidates finds it there. A process that dies or takes too long costs the candidate that it was at.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from torch import Tensor

from .._files import named_line
from ..aot import REGISTERS, SHARED_KIB, block_registers, compile_launch, record_launch, register_usage
from ..kernels._launch import Config, Launch
from .candidates import DTYPES, Problem, kernel_of

# far beyond what any candidate takes: 10 s with all processors in use
LONGEST_SECONDS = 60.0

# columns of tensor memory on sm_100
_TENSOR_COLUMNS = 512


class Task(NamedTuple):
    """A candidate to be compiled: `arch` says which tables serve other kernels, `target` for what it is compiled."""

    problem: Problem
    config: Config
    arch: int
    target: int


class Binary(NamedTuple):
    """What a candidate takes of a multiprocessor: bytes of shared memory, columns of tensor memory, registers of a
    thread, warps, and bytes of local memory of a thread."""

    shared: int
    tensor_columns: int
    registers: int
    warps: int
    local: int


class Failed(NamedTuple):
    """In place of a result: why there is none."""

    reason: str


def compile_task(task: Task) -> Binary:
    """Compiles a candidate into Triton's cache.

    Raises:
        ValueError: the kernel does not take this configuration at this shape.
        Exception: whatever else the compiler refuses it with.
    """
    launch, _ = _record(task)
    compiled = compile_launch(launch, task.target)
    registers, local = register_usage(compiled.asm["cubin"])
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    return Binary(compiled.metadata.shared, columns, registers, compiled.metadata.num_warps, local)


def least_shared_bytes(task: Task) -> int:
    """Shared memory that a candidate takes at least, before it is compiled: blocks that descriptors fetch lie there,
    those of the next iterations too. Nothing is said of what pointers fetch, which may stay in registers, as may all
    where descriptors are emulated.

    Raises:
        ValueError: the kernel does not take this configuration at this shape.
    """
    launch, written = _record(task)
    if task.target < 90:
        return 0
    # a head that is not split is fetched by one of two descriptors that are the same; results are fetched by none
    blocks = {
        (id(arg.base), tuple(arg.block_shape)): math.prod(arg.block_shape) * arg.base.itemsize
        for arg in launch.args
        if hasattr(arg, "block_shape") and not any(arg.base is tensor for tensor in written)
    }
    # the last stage's may serve for what else there is
    return (launch.options.get("num_stages", 1) - 1) * sum(blocks.values())


def _record(task: Task) -> tuple[Launch, list[Tensor]]:
    """The candidate's launch, on no device, and the tensors that it writes."""
    kernel, written = kernel_of(task.problem), []
    example = kernel.example(DTYPES[task.problem.bits], "meta", **task.problem.shape)
    launch = record_launch(kernel, lambda: written.extend(tensors(example())), task.config, task.arch)
    if launch is None:
        raise ValueError("the kernel takes another configuration at this shape")
    return launch, written


def tensors(result: Any) -> list[Tensor]:
    """The tensors that a call of an example gives."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for item in result for tensor in tensors(item)] if isinstance(result, (list, tuple)) else []


def shared_bytes_of(arch: int) -> int:
    """Shared memory that a block may have: a multiprocessor's but for what the system keeps."""
    return (SHARED_KIB[arch] - 1) * 1024


def cannot_launch(binary: Binary, shared_bytes: int) -> tuple[str, str] | None:
    """Which resource a compiled candidate wants more of than there is, and how much; None if it can be launched."""
    if binary.shared > shared_bytes:
        return "shared memory", f"takes {binary.shared} bytes of shared memory, a block may have {shared_bytes}"
    if binary.tensor_columns > _TENSOR_COLUMNS:
        return "shared memory", f"takes {binary.tensor_columns} columns of tensor memory, there are {_TENSOR_COLUMNS}"
    if block_registers(binary.registers, binary.warps) > REGISTERS:
        return "registers", f"takes {binary.registers} registers in each of {binary.warps} warps"
    return None


class InProcess:
    """In place of a pool, for debugging: each task is done in this process when its result is asked for."""

    def __init__(self, function: Callable[[Any], Any], tasks: Iterable[tuple[Any, Any]]) -> None:
        self._function, self._tasks = function, deque(tasks)

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self._tasks.clear()

    def next(self, seconds: float) -> tuple[Any, Any] | None:
        """As of `Pool`, but it takes as long as it takes."""
        if not self._tasks:
            return None
        token, argument = self._tasks.popleft()
        try:
            return token, self._function(argument)
        except Exception as error:
            return token, Failed(named_line(error))


class Pool:
    """Calls a function of one argument in processes, which are started afresh: a fork would copy locks of torch's
    threads, and no CUDA context outlives it.

    Args:
        function: what to call; found by its name in the other processes.
        tasks: a token and an argument each, done in this order.
        workers: how many at a time.
        limit: seconds that one may take.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        tasks: Iterable[tuple[Any, Any]],
        workers: int,
        limit: float = LONGEST_SECONDS,
    ) -> None:
        self._function, self._tasks, self._limit = function, deque(tasks), limit
        self._count = min(workers, len(self._tasks))
        # of processes that end before they are ready: more is no accident
        self._false_starts = 2 * self._count
        self._workers: list[_Worker] = []
        self._results: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Pool:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def next(self, seconds: float) -> tuple[Any, Any] | None:
        """The token of a task that is done, and its result or a `Failed`; None if none is after so many seconds."""
        try:
            return self._results.get(timeout=seconds) if seconds > 0 else self._results.get_nowait()
        except queue.Empty:
            if self._error is not None:
                raise self._error from None
            return None

    def _serve(self) -> None:
        """In a thread, as whoever times candidates has no time to hand out tasks."""
        try:
            while not self._stop.is_set() and (self._tasks or any(worker.busy for worker in self._workers)):
                if self._false_starts < 0:
                    self._give_up()
                    return
                while self._tasks and len(self._workers) < self._count:
                    self._workers.append(_Worker(self._function))
                for worker in self._listen():
                    self._attend(worker)
        except Exception as error:
            self._error = error
        finally:
            for worker in self._workers:
                worker.end()

    def _listen(self) -> list[_Worker]:
        # short, as nothing else tells that the pool is left or that a limit has passed
        heard = wait([worker.connection for worker in self._workers], timeout=0.1)
        now = time.monotonic()
        return [w for w in self._workers if w.connection in heard or (w.busy and now - w.since > self._limit)]

    def _attend(self, worker: _Worker) -> None:
        if not worker.connection.poll():
            self._lose(worker, f"did not compile within {self._limit:g} s")
            return
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            self._lose(worker, f"the process that compiled it {worker.fate()}")
            return
        if worker.busy:
            self._results.put((worker.token, message))
        worker.ready, worker.busy = True, False
        if self._tasks:
            worker.take(*self._tasks.popleft())

    def _lose(self, worker: _Worker, reason: str) -> None:
        worker.end()
        self._workers.remove(worker)
        if worker.busy:
            self._results.put((worker.token, Failed(reason)))
        elif not worker.ready:
            self._false_starts -= 1

    def _give_up(self) -> None:
        while self._tasks:
            token, _ = self._tasks.popleft()
            self._results.put((token, Failed("the processes that compile do not start")))


class _Worker:
    """A process, and the task that it is at."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(function, other), daemon=True)
        self.process.start()
        # the only end in this process is the one above, so that it hears of the other's end
        other.close()
        self.token: Any = None
        self.ready = self.busy = False
        self.since = 0.0

    def fate(self) -> str:
        """How it ended, once its connection has."""
        self.process.join(1)
        code = self.process.exitcode
        return f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"

    def take(self, token: Any, argument: Any) -> None:
        self.token, self.busy, self.since = token, True, time.monotonic()
        # one that has just died is heard of when it is listened to
        with contextlib.suppress(OSError):
            self.connection.send(argument)

    def end(self) -> None:
        if self.process.is_alive() and self.ready:
            # the assembler, which it has started, with it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid or 0, signal.SIGKILL)
        elif self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()


def _work(function: Callable[[Any], Any], connection: Connection) -> None:
    os.setsid()
    # times are taken beside it
    os.nice(10)
    # the compiler says on stderr what it also raises
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    connection.send(None)
    # the other end is closed when whoever asked is gone
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            argument = connection.recv()
            try:
                answer = function(argument)
            except Exception as error:
                answer = Failed(named_line(error))
            connection.send(answer)
