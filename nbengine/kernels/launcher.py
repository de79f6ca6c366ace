"""Compiled kernels on a GPU: loaded into torch's context, launched on torch's current stream.

`CudaProgram` is the GPU's kind of `Program`. A launch packs its arguments into a buffer that this
kernel keeps for each thread, and calls the driver; it allocates nothing and waits for nothing, so
that it may be captured into a CUDA graph. The driver copies the arguments before it returns.

Loaded code stays loaded: a captured graph may hold a function longer than Python does.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from typing import Any

import torch

from nbengine.errors import NbengineError
from nbengine.kernels import compiler
from nbengine.kernels.program import Kernel, Launch, Program
from nbengine.kernels.report import KernelReport, Limits
from nbengine.kernels.source import SCALARS, Source

_WITHOUT_ASKING = 48 * 1024
"""Bytes of shared memory that a kernel may have unless an attribute of it allows more."""


class KernelError(NbengineError, RuntimeError):
    """The driver refused a launch, or (with `debug`) a kernel failed while it ran."""


class Driver:
    """The few calls of the CUDA driver that are made here. Each raises `KernelError`."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        torch.cuda.init()
        self._api = driver
        self.launch = driver.cuLaunchKernel
        """launch(function, *grid, *block, shared_bytes, stream, address of pointers, 0): (status,)"""
        self.stream = torch._C._cuda_getCurrentRawStream
        """stream(device index): torch's current one."""
        self.current_device = torch.cuda.current_device

    def enter(self, index: int) -> None:
        """Give the calling thread torch's context, if it has none yet."""
        (current,) = self._answer(self._api.cuCtxGetCurrent())
        if int(current) == 0:
            (context,) = self._answer(self._api.cuDevicePrimaryCtxRetain(self._device(index)))
            self._answer(self._api.cuCtxSetCurrent(context))

    def load(self, code: bytes, symbol: str, index: int) -> Any:
        with torch.cuda.device(index):
            self.enter(index)
            (module,) = self._answer(self._api.cuModuleLoadData(code))
            (function,) = self._answer(self._api.cuModuleGetFunction(module, symbol.encode()))
        return function

    def max_threads(self, function: Any) -> int:
        which = self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK
        (value,) = self._answer(self._api.cuFuncGetAttribute(which, function))
        return int(value)

    def limits(self, index: int) -> Limits:
        device = self._device(index)

        def attribute(name: str) -> int:
            which = getattr(self._api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            (value,) = self._answer(self._api.cuDeviceGetAttribute(which, device))
            return int(value)

        return Limits(
            shared_bytes=attribute("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR"),
            block_shared_bytes=attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
            warps=attribute("MAX_THREADS_PER_MULTIPROCESSOR") // 32,
            blocks=attribute("MAX_BLOCKS_PER_MULTIPROCESSOR"),
            reserved_bytes=attribute("RESERVED_SHARED_MEMORY_PER_BLOCK"),
        )

    def allow_shared_bytes(self, function: Any, dynamic_bytes: int) -> None:
        which = self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._answer(self._api.cuFuncSetAttribute(function, which, dynamic_bytes))

    def blocks_per_multiprocessor(self, function: Any, threads: int, dynamic_bytes: int) -> int:
        ask = self._api.cuOccupancyMaxActiveBlocksPerMultiprocessor
        (value,) = self._answer(ask(function, threads, dynamic_bytes))
        return int(value)

    def finish(self, stream: int) -> Any:
        """Wait for the stream; the status. Nothing where the stream is being captured."""
        success = self._api.CUresult.CUDA_SUCCESS
        if torch.cuda.is_current_stream_capturing():
            return success
        return self._api.cuStreamSynchronize(stream)[0]

    def described(self, status: Any) -> str:
        _, text = self._api.cuGetErrorString(status)
        return f"{status.name} ({int(status)}): {text.decode() if text else 'no description'}"

    def _device(self, index: int) -> Any:
        return self._answer(self._api.cuDeviceGet(index))[0]

    def _answer(self, returned: tuple[Any, ...]) -> tuple[Any, ...]:
        status, *values = returned
        if int(status) != 0:
            raise KernelError(f"the CUDA driver says {self.described(status)}")
        return tuple(values)


class CudaProgram(Program):
    """A source compiled by NVRTC for one GPU.

    With `debug` every launch waits for its kernel, so that an error surfaces at the launch that
    caused it, as a `KernelError` with the kernel's name and grid. It can be switched at any time.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device | str = "cuda",
        *,
        debug: bool = False,
        options: tuple[str, ...] = (),
        driver: Driver | None = None,
        architecture: str | None = None,
    ) -> None:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        super().__init__(source, device)
        self.debug, self.options = debug, options
        self.driver = driver or Driver()
        self.limits = self.driver.limits(device.index or 0)
        self.architecture = architecture or compiler.architecture_for(
            torch.cuda.get_device_capability(device)
        )

    def _make(self, expression: str) -> CudaKernel:
        return CudaKernel(self, expression)


class CudaKernel(Kernel):
    """A kernel that is loaded on a GPU."""

    def __init__(self, program: CudaProgram, expression: str) -> None:
        super().__init__(program.source, expression, program.device)
        self.program = program
        self.cubin = compiler.compile(
            program.source, expression, program.architecture, program.options
        )
        driver, self._index = program.driver, program.device.index or 0
        self._function = driver.load(self.cubin.code, self.cubin.symbol, self._index)
        self.max_threads = driver.max_threads(self._function)
        static_bytes = self.cubin.resources.shared_bytes
        self.max_shared_bytes = program.limits.block_shared_bytes - static_bytes
        self._allowed_bytes = _WITHOUT_ASKING - static_bytes
        self._driver_launch, self._stream = driver.launch, driver.stream
        formats = ["P" if p.is_pointer else SCALARS[p.c_type] for p in self.parameters]
        self._pointers_at = [at for at, p in enumerate(self.parameters) if p.is_pointer]
        self._pack_into = struct.Struct("@" + "".join(formats)).pack_into  # aligned as in C
        self._packed = _Packed(formats, driver, self._index)

    @property
    def ptx(self) -> str:
        return self.cubin.ptx

    def report(self, block: int, shared_bytes: int = 0) -> KernelReport:
        """What it uses, and its occupancy in blocks of so many threads and so much dynamic shared
        memory: by the driver's own account."""
        blocks = self.program.driver.blocks_per_multiprocessor(self._function, block, shared_bytes)
        return self.cubin.report(block, shared_bytes, self.program.limits, blocks)

    def _launch(self, config: Any) -> Launch:
        launch = super()._launch(config)
        if launch.shared_bytes > self._allowed_bytes:
            self.program.driver.allow_shared_bytes(self._function, launch.shared_bytes)
            self._allowed_bytes = launch.shared_bytes
        return launch

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        arguments: tuple[Any, ...],
    ) -> None:
        """Raises `KernelError` for what the driver refuses."""
        if self.program.driver.current_device() != self._index:
            with torch.cuda.device(self._index):
                return self.launch(grid, block, shared_bytes, arguments)
        values = list(arguments)
        for at in self._pointers_at:
            tensor = values[at]
            values[at] = 0 if tensor is None else tensor.data_ptr()
        packed, address = self._packed.here
        self._pack_into(packed, 0, *values)
        stream = self._stream(self._index)
        (status,) = self._driver_launch(
            self._function, *grid, *block, shared_bytes, stream, address, 0
        )
        if status == 0 and self.program.debug:
            status = self.program.driver.finish(stream)
        if status != 0:
            raise KernelError(
                f"{self.name} in {self.program.source.name}, grid {grid}, block {block}, "
                f"{shared_bytes:,} bytes of dynamic shared memory: "
                f"{self.program.driver.described(status)}"
            )


class _Packed(threading.local):
    """The arguments of one launch as the driver reads them: values, and pointers to these. Each
    thread has its own, and is given the device's context with it."""

    def __init__(self, formats: list[str], driver: Driver, index: int) -> None:
        driver.enter(index)
        ends = [struct.calcsize("@" + "".join(formats[: n + 1])) for n in range(len(formats))]
        values = ctypes.create_string_buffer(max([1, *ends]))
        start = ctypes.addressof(values)
        self._pointers = (ctypes.c_void_p * len(formats))(
            *(start + end - struct.calcsize(f) for end, f in zip(ends, formats, strict=True))
        )
        self.here = values, ctypes.addressof(self._pointers)
