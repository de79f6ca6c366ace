"""The decoder's small operations, compiled and in torch, against their definitions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

import nbengine.cpu
from nbengine.models.ops import RmsNorm, rotate, silu_and_mul


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "torch":
        monkeypatch.setattr("nbengine.models.ops.kernels", lambda: None)
    elif nbengine.cpu.kernels() is None:
        pytest.skip("needs a C++ compiler")
    yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("size", [1, 7, 64, 576])
def test_rms_norm_divides_by_the_root_mean_square(rows: int, size: int) -> None:
    x, weight = normal(rows, size).double(), normal(size, seed=1).double()
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(RmsNorm(weight, 1e-5)(x.float()), expected.float())


def test_rms_norm_of_heads_has_a_weight_for_each_and_takes_slices_of_wider_rows() -> None:
    wide, weight = normal(6, 5, 16), normal(3, 16, seed=1)
    x = wide[:, :3]
    expected = torch.stack([RmsNorm(weight[h], 1e-6)(x[:, h].contiguous()) for h in range(3)], 1)
    torch.testing.assert_close(RmsNorm(weight, 1e-6)(x), expected)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("head_dim", [2, 6, 64, 80])
def test_rotate_turns_each_pair_by_its_angle(rows: int, head_dim: int) -> None:
    """As a product of complex numbers."""
    x, angle = normal(rows, 7, head_dim)[:, :4], normal(rows, head_dim // 2, seed=1)
    cos, sin = angle.cos(), angle.sin()
    table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1)
    pairs = (
        torch.complex(*x.contiguous().chunk(2, -1))
        * torch.polar(torch.ones_like(angle), angle)[:, None]
    )
    expected = torch.cat((pairs.real, pairs.imag), -1)
    torch.testing.assert_close(rotate(x, table), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("size", [1, 7, 1536])
def test_silu_and_mul_gates(rows: int, size: int) -> None:
    x = 5 * normal(rows, 2 * size)
    expected = silu(x[:, :size]) * x[:, size:]
    torch.testing.assert_close(silu_and_mul(x), expected, rtol=1e-5, atol=1e-6)


def test_silu_and_mul_of_extreme_gates() -> None:
    gate = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, float("nan")]])
    found = silu_and_mul(torch.cat((gate, torch.ones_like(gate)), -1))
    torch.testing.assert_close(found[0, 3:7], gate[0, 3:7])
    assert (found[0, :3].abs() < 1e-6).all()
    assert found[0, 7].isnan()
