"""Launches that would not end: ended by the emulator, with the line, or by an interrupt."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from nbengine.kernels import emulator
from nbengine.kernels.emulator import EmulationError
from tests.kernels.emulation import NAME, ints, kernel, line_of


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block may take a twentieth of a second."""
    monkeypatch.setattr(emulator, "BLOCK_SECONDS", 0.05)


def assert_launches_work(with_checks: bool = True) -> None:
    text = """
    __global__ void kernel(int* out) {
      __shared__ int row[64];
      row[threadIdx.x] = threadIdx.x;
      __syncthreads();
      const int other = row[63 - threadIdx.x];
      out[blockIdx.x * 64 + threadIdx.x] = __shfl_xor_sync(0xffffffffu, other, 1);
    }
    """
    out = ints(4, 64)
    kernel(text, checks=with_checks)[4, 64](out)
    assert torch.equal(out, (63 - (torch.arange(64) ^ 1)).int().expand(4, 64))


@dataclass(frozen=True)
class Endless:
    """A kernel of which thread 3 of block 1 does not end, at the line that ends with `// here`."""

    text: str
    checks: tuple[bool, ...] = (True, False)


ENDLESS = {
    "with accesses": Endless("""
    __global__ void kernel(volatile int* out) {
      if (threadIdx.x == 3 && blockIdx.x == 1)
        for (int i = 0; i < 10; i += 0) out[1] = out[0];  // here
      out[2] = 1;
    }
    """),
    # Without checks, the compiler leaves a loop away that does nothing.
    "nothing but a jump": Endless(
        """
    __global__ void kernel(int* out) {
      int sum = 0;
      if (threadIdx.x == 3 && blockIdx.x == 1) {
        for (int i = 0; i < 10; i += 0) sum += i;  // here
      }
      out[0] = sum;
    }
    """,
        (True,),
    ),
    "numbers alone": Endless(
        """
    __global__ void kernel(int* out) {
      const bool is_mine = threadIdx.x == 3 && blockIdx.x == 1;
      unsigned n = is_mine;
      while (n != 0) n = n * 5 | 1;  // here
      out[0] = n;
    }
    """,
        (True,),
    ),
    "a local array": Endless("""
    __global__ void kernel(int* out) {
      volatile int local[64];
      for (int i = 0; i < 64; ++i) local[i] = i;
      const bool is_mine = threadIdx.x == 3 && blockIdx.x == 1;
      while (is_mine) local[local[5] & 63] = 5;  // here
      out[0] = local[0];
    }
    """),
    "a function of the device, after a barrier": Endless(
        """
    __device__ __noinline__ int collatz(unsigned n) {
      while (n != 1) n = n % 2 == 0 ? n / 2 : 3 * n;  // here
      return n;
    }
    __global__ void kernel(int* out) {
      __syncthreads();
      out[0] = collatz(threadIdx.x == 3 && blockIdx.x == 1 ? 7 : 8);
    }
    """,
        (True,),
    ),
    "the mathematical library": Endless(
        """
    __global__ void kernel(float* out) {
      float x = threadIdx.x == 3 && blockIdx.x == 1 ? 2.0f : 0.0f;
      while (x != 0.0f) x = tanhf(x) * 2.0f;  // here
      out[0] = x;
    }
    """,
        (True,),
    ),
}


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    ("name", "with_checks"),
    [(name, checks) for name, endless in ENDLESS.items() for checks in endless.checks],
)
def test_a_thread_that_does_not_end_is_named_with_its_line(name: str, with_checks: bool) -> None:
    text = ENDLESS[name].text
    out = torch.zeros(64) if "float* out" in text else ints(64)
    with pytest.raises(EmulationError) as caught:
        kernel(text, checks=with_checks)[2, 32](out)
    error = caught.value
    assert (error.kind, error.block, error.thread) == ("timeout", (1, 0, 0), (3, 0, 0))
    assert (error.file, error.line) == (NAME, line_of(text))
    assert "0.05 s of a processor: does its loop end?" in str(error)
    assert_launches_work(with_checks)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("with_checks", [True, False])
@pytest.mark.parametrize(
    "meet", ["__syncthreads()", "__syncwarp()", "__shfl_xor_sync(0xffffffffu, 1, 1)"]
)
def test_threads_that_meet_for_ever_are_told_where(meet: str, with_checks: bool) -> None:
    text = f"""
    __global__ void kernel(int* out) {{
      while (true) {meet};  // here
    }}
    """
    with pytest.raises(EmulationError) as caught:
        kernel(text, checks=with_checks)[3, 64](ints(1))
    assert (caught.value.kind, caught.value.line) == ("timeout", line_of(text))
    assert_launches_work(with_checks)


@pytest.mark.usefixtures("soon")
def test_what_has_an_error_already_is_not_blamed_for_its_time() -> None:
    """Nothing wrote what the loop waits for: that says more."""
    text = """
    __global__ void kernel(int* out) {
      __shared__ volatile int flag;
      while (flag == 0) {}  // here
      out[0] = 1;
    }
    """
    with pytest.raises(EmulationError) as caught:
        kernel(text)[1, 1](ints(1))
    assert (caught.value.kind, caught.value.line) == ("uninitialised", line_of(text))


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("with_checks", [True, False])
def test_the_time_is_a_blocks_and_not_the_launchs(with_checks: bool) -> None:
    text = """
    __global__ void kernel(int* out) {
      const long long begin = clock64();
      while (clock64() - begin < 10000000) {}  // 10 ms
      out[blockIdx.x] = 1;
    }
    """
    out, before = ints(16), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        kernel(text, checks=with_checks)[16, 1](out)
    finally:
        torch.set_num_threads(before)
    assert out.tolist() == [1] * 16


@pytest.mark.usefixtures("soon")
def test_a_launch_on_another_thread_ends_too() -> None:
    errors: list[EmulationError] = []

    def launch() -> None:
        try:
            kernel(ENDLESS["numbers alone"].text)[2, 32](ints(1))
        except EmulationError as error:
            errors.append(error)

    launcher = threading.Thread(target=launch)
    launcher.start()
    launcher.join()
    assert [error.kind for error in errors] == ["timeout"]


@pytest.mark.usefixtures("soon")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a fork")
def test_in_a_fork_too() -> None:
    endless = kernel(ENDLESS["a local array"].text, checks=False)
    with pytest.raises(EmulationError):
        endless[2, 32](ints(1))
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            endless[2, 32](ints(1))
        except EmulationError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_other_listeners_to_the_signal_of_the_ticks_take_and_lose_nothing(soon: None) -> None:
    endless = kernel(ENDLESS["numbers alone"].text)
    heard: list[int] = []
    before = signal.signal(signal.SIGURG, lambda number, _: heard.append(number))
    try:
        for _ in range(2):
            with pytest.raises(EmulationError, match="timeout"):
                endless[2, 32](ints(1))
            assert heard == []
        signal.raise_signal(signal.SIGURG)
        assert heard == [signal.SIGURG]
    finally:
        signal.signal(signal.SIGURG, before)
    with pytest.raises(EmulationError, match="timeout"):
        endless[2, 32](ints(1))


@contextlib.contextmanager
def interrupted_soon() -> Iterator[None]:
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        timer.join()


SPIN = """
__global__ void kernel(int* out) {
  __shared__ volatile int flag;
  if (threadIdx.x == 0) flag = 0;
  __syncthreads();
  while (flag == 0) AND_MEET;
  out[0] = flag;
}
"""
MATHEMATICS = """
__global__ void kernel(int* out) {
  float x = 2.0f;
  while (x != 0.0f) x = tanhf(x) * 2.0f;
  out[0] = x;
}
"""


@pytest.mark.parametrize(
    ("text", "with_checks"),
    [
        pytest.param(SPIN.replace("AND_MEET", ""), True, id="checked access"),
        pytest.param(SPIN.replace("AND_MEET", ""), False, id="access"),
        pytest.param(SPIN.replace("AND_MEET", "__syncthreads()"), False, id="barrier"),
        pytest.param(ENDLESS["nothing but a jump"].text, True, id="jump"),
        pytest.param(ENDLESS["a local array"].text, False, id="local array"),
        pytest.param(MATHEMATICS, True, id="mathematics"),
    ],
)
def test_an_interrupt_ends_a_launch_that_would_not_end(text: str, with_checks: bool) -> None:
    endless = kernel(text, checks=with_checks)
    handler = signal.getsignal(signal.SIGINT)
    for _ in range(2):
        with interrupted_soon():
            endless[3, 32](ints(1))
    assert signal.getsignal(signal.SIGINT) is handler
    assert_launches_work(with_checks)


def test_an_interrupt_does_not_reach_a_launch_on_another_thread() -> None:
    text = """
    __global__ void kernel(int* done, int* go) {
      while (atomicAdd(go, 0) == 0) __syncthreads();
      done[0] = 1;
    }
    """
    done, go = ints(1), torch.zeros(1, dtype=torch.int32)
    launch = kernel(text)[1, 32]
    launcher = threading.Thread(target=launch, args=(done, go))
    launcher.start()
    with interrupted_soon():
        time.sleep(60)
    go.fill_(1)
    launcher.join()
    assert done.item() == 1
