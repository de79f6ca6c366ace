"""What both backends refuse before a launch: grids and arguments that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nbengine.kernels import Kernel, LaunchError, Program, Source

SOURCE = Source(
    """
    template <typename T> __global__ void copy(T* out, const T* x, int n) {}
    __global__ void numbers(bool a, unsigned char b, int c, unsigned long long d, float e) {}
    __global__ void any(void* x, unsigned int* y, float** rows) {}
    """,
    "t.cu",
)


class RecordingProgram(Program):
    def __init__(self) -> None:
        super().__init__(SOURCE, torch.device("cpu"))
        self.launched: list[tuple[Any, ...]] = []
        self.made: list[str] = []

    def _make(self, expression: str) -> Kernel:
        self.made.append(expression)
        return RecordingKernel(self, expression)


class RecordingKernel(Kernel):
    def __init__(self, program: RecordingProgram, expression: str) -> None:
        super().__init__(program.source, expression, program.device)
        self.launched = program.launched

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        arguments: tuple[Any, ...],
    ) -> None:
        self.launched.append((grid, block, shared_bytes, arguments))


@pytest.fixture
def program() -> RecordingProgram:
    return RecordingProgram()


def test_a_kernel_is_made_once_for_each_set_of_template_arguments(
    program: RecordingProgram,
) -> None:
    assert program.kernel("copy", torch.float32) is program.kernel("copy", torch.float32)
    assert program.kernel("copy", torch.float32) is not program.kernel("copy", torch.float16)
    assert program.made == ["copy<float>", "copy<__half>"]


@pytest.mark.parametrize(
    ("config", "grid", "block", "shared_bytes"),
    [
        ((3, 64), (3, 1, 1), (64, 1, 1), 0),
        (((3, 2), (8, 8, 2), 512), (3, 2, 1), (8, 8, 2), 512),
        (((2**31 - 1, 65_535, 65_535), (1, 1, 64)), (2**31 - 1, 65_535, 65_535), (1, 1, 64), 0),
    ],
)
def test_grid_and_block_are_ints_or_up_to_three(
    program: RecordingProgram, config: Any, grid: Any, block: Any, shared_bytes: int
) -> None:
    program.kernel("copy<float>")[config](None, None, 0)
    assert program.launched == [(grid, block, shared_bytes, (None, None, 0))]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ((2**31, 1), "the grid (2147483648,) is 2,147,483,648 along x"),
        (((1, 65_536), 1), "65,536 along y, where 0 to 65,535"),
        (((1, 1, 70_000), 1), "70,000 along z"),
        ((-1, 1), "-1 along x"),
        ((1, 0), "the block (0,) is 0 along x, where 1 to 1,024"),
        ((1, (1, 1, 65)), "65 along z, where 1 to 64"),
        ((1, (64, 32)), "2,048 threads"),
        ((1, 1025), "1,025 along x"),
        ((1, 32, -1), "-1 bytes"),
        ((1, 32, 10**9), "0 to 232,448"),
        ((1.0, 32), "an int or a tuple of up to three, not 1.0"),
        (((1, 2, 3, 4), 32), "up to three"),
        (([1], 32), "up to three, not [1]"),
        (5, "write kernel[grid, block]"),
        ((1, 2, 3, 4), "write kernel[grid, block]"),
    ],
)
def test_an_impossible_grid_is_refused_with_the_numbers(
    program: RecordingProgram, config: Any, told: str
) -> None:
    with pytest.raises(LaunchError) as refused:
        program.kernel("copy<float>")[config]
    assert told in str(refused.value)


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    "x",
    [
        tensor(4, 6),
        tensor(4, 8)[:, :6],
        tensor(4, 8)[::2, 1:7],
        tensor(4, 3, 8).transpose(0, 1),
        tensor(0, 6),
        tensor(1, 1).expand(1, 1),
        tensor(6, 1).t(),
        torch.nn.Parameter(tensor(4, 6)),
        torch.tensor(1.0),
        None,
    ],
)
def test_tensors_dense_in_their_last_dimension_fit_a_pointer(
    program: RecordingProgram, x: Tensor | None
) -> None:
    program.kernel("copy<float>")[1, 32](x, None, 0)
    assert len(program.launched) == 1


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (tensor(4, dtype=torch.float16), "x points to float, and the tensor holds torch.float16"),
        (tensor(4, 6).t(), "x has elements 6 apart along its last dimension"),
        (tensor(8)[::2], "x has elements 2 apart"),
        (tensor(1, 6).expand(4, 6), "x has elements that share an address"),
        (tensor(8).as_strided((3, 4), (2, 1)), "x has elements that share an address"),
        (tensor(4, 1).expand(4, 6), "x has elements 0 apart"),
        (torch.zeros(4, device="meta"), "x must be on cpu, and the tensor is on meta"),
        ([1.0], "x is of type float*: give a tensor or None, not a list ([1.0])"),
        (7, "x is of type float*: give a tensor or None, not a int (7)"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(program: RecordingProgram, x: Any, told: str) -> None:
    with pytest.raises(LaunchError) as refused:
        program.kernel("copy<float>")[1, 32](None, x, 0)
    assert f"copy<float>: {told}" in str(refused.value)
    assert not program.launched


@pytest.mark.parametrize(
    "numbers",
    [
        (True, 255, -(2**31), 2**64 - 1, 3.4e38),
        (False, 0, 2**31 - 1, 0, -1),
        (False, True, 0, 0, float("nan")),
        (False, 0, 0, 0, float("-inf")),
    ],
)
def test_numbers_in_range_fit(program: RecordingProgram, numbers: tuple[Any, ...]) -> None:
    program.kernel("numbers")[1, 1](*numbers)
    assert program.launched[0][3] == numbers


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ((1, 0, 0, 0, 0.0), "a is of type bool, not a int (1)"),
        ((True, 256, 0, 0, 0.0), "b is of type unsigned char, which holds 0 to 255, not 256"),
        (
            (True, 0, 2**31, 0, 0.0),
            "c is of type int, which holds -2,147,483,648 to 2,147,483,647, not 2,",
        ),
        ((True, 0, 1.0, 0, 0.0), "c is of type int, not a float (1.0)"),
        ((True, 0, 0, -1, 0.0), "d is of type unsigned long long"),
        ((True, 0, 0, 0, 1e39), "e is of type float, which holds up to 3.4e+38, not 1e+39"),
        ((True, 0, 0, 0, 10**400), "e is of type float"),
        ((True, 0, 0, 0, None), "e is of type float, not a NoneType"),
        ((True, 0, 0, 0, torch.tensor(1.0)), "e is of type float, not a Tensor"),
        (
            (True, 0),
            "takes 5 arguments (bool a, unsigned char b, int c, unsigned long long d, float",
        ),
    ],
)
def test_a_number_out_of_range_is_named(
    program: RecordingProgram, numbers: tuple[Any, ...], told: str
) -> None:
    with pytest.raises(LaunchError) as refused:
        program.kernel("numbers")[1, 1](*numbers)
    assert told in str(refused.value)


def test_untyped_pointers_take_any_tensor_and_pointers_to_pointers_addresses(
    program: RecordingProgram,
) -> None:
    kernel = program.kernel("any")
    rows = tensor(2, dtype=torch.int64)
    kernel[1, 1](tensor(3, dtype=torch.int8), tensor(3, dtype=torch.int32), rows)
    with pytest.raises(LaunchError, match=r"rows points to float\*, and the tensor holds"):
        kernel[1, 1](None, None, tensor(2))


def test_a_grid_of_no_blocks_is_checked_and_launches_nothing(program: RecordingProgram) -> None:
    launch = program.kernel("copy<float>")[(4, 0), 32]
    launch(None, None, 0)
    assert not program.launched
    with pytest.raises(LaunchError, match="n is of type int"):
        launch(None, None, None)


def test_grids_that_change_with_every_launch_are_not_kept_for_ever(
    program: RecordingProgram,
) -> None:
    kernel = program.kernel("copy<float>")
    for n in range(1, 3000):
        kernel[n, 32]
    assert len(kernel._launches) <= 1024
