"""What launches ask of their tensors."""

from __future__ import annotations

import pytest
import torch

from nbengine.kernels.shapes import check_dense, check_rows, pack_size


@pytest.mark.parametrize(
    ("size", "itemsize", "elements"), [(64, 2, 8), (64, 4, 4), (20, 2, 4), (6, 4, 2), (7, 2, 1)]
)
def test_a_pack_is_the_widest_that_divides_a_row(size: int, itemsize: int, elements: int) -> None:
    assert pack_size(size, itemsize) == elements


def test_dense_tensors_pass_and_gaps_shapes_and_odd_addresses_do_not() -> None:
    check_dense("x", torch.zeros(3, 8), 3, 8)
    check_dense("x", torch.zeros(9)[1:], 8, alignment=4)
    with pytest.raises(ValueError, match=r"x has the shape \[3, 8\], and needs \[3, 9\]"):
        check_dense("x", torch.zeros(3, 8), 3, 9)
    with pytest.raises(ValueError, match=r"x \[3, 4\] has the strides \[8, 1\], and must be"):
        check_dense("x", torch.zeros(3, 8)[:, :4], 3, 4)
    with pytest.raises(ValueError, match="x starts 4 bytes after a multiple of 16"):
        check_dense("x", torch.zeros(9)[1:], 8)


def test_rows_may_be_slices_that_start_at_multiples_of_their_pack() -> None:
    check_rows("x", torch.zeros(3, 12)[:, 4:], 3, 8)
    check_rows("x", torch.zeros(3, 5, 8)[:, 1:3], 3, 2, 8)
    check_rows("x", torch.zeros(3, 8)[:, 2:], 3, 6)  # packs of two: 6 floats are no whole 16 bytes
    with pytest.raises(ValueError, match=r"x \[3, 8\]: its rows, 11 elements apart"):
        check_rows("x", torch.zeros(3, 11)[:, :8], 3, 8)
    with pytest.raises(ValueError, match="must start at multiples of 16 bytes"):
        check_rows("x", torch.zeros(3, 12)[:, 1:9], 3, 8)
    with pytest.raises(ValueError, match=r"strides \[40, 16, 1\]: each row must be dense"):
        check_rows("x", torch.zeros(3, 40).as_strided((3, 2, 8), (40, 16, 1)), 3, 2, 8)
    check_rows("x", torch.zeros(12)[:11].view(1, 11)[:, :8], 1, 8)  # one row needs no stride
