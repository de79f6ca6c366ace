"""The weight-matrix seam: what each format computes, with the compiled kernels and without."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

import nbengine.cpu
from nbengine.errors import InvalidField
from nbengine.models import linear
from nbengine.models.linear import QuantizedLinear, make_linear, make_linear_from_gguf

SHAPES = [(48, 64), (50, 96), (1, 32), (33, 40), (7, 5), (576, 576), (130, 1536)]  # (out, in)
ROWS = [1, 2, 3, 7, 8, 9, 16, 17, 40]

# "native" is whatever this machine has; the others are other machines' code paths.
X86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
BUILDS = {"native": (), "avx2": ("-march=haswell",), "baseline": ("-march=x86-64",)}


@pytest.fixture(params=["native", "avx2", "baseline", "torch"])
def backend(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """Each way to compute a linear on a CPU."""
    name = request.param
    if name == "torch":
        library = None
    elif shutil.which("g++") is None or (name != "native" and not X86):
        pytest.skip("needs g++ and, but for the native build, an x86 with AVX2")
    else:
        flags = (*nbengine.cpu.FLAGS, *BUILDS[name])
        library = nbengine.cpu.load(nbengine.cpu.build(flags))
    monkeypatch.setattr("nbengine.models.linear.kernels", lambda: library)
    yield name


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_float32_is_the_plain_product(backend: str, shape: tuple[int, int]) -> None:
    weight, bias = normal(*shape), normal(shape[0], seed=1)
    for rows in ROWS:
        x = normal(rows, shape[1], seed=2)
        found = make_linear(weight, bias)(x)
        assert found.shape == (rows, shape[0])
        torch.testing.assert_close(found, x @ weight.T + bias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_quantised_weight_is_multiplied_as_what_its_codes_stand_for(
    backend: str, shape: tuple[int, int], quantization: str
) -> None:
    """The product with unit rows shows the weight that is held; other rows must agree with it."""
    bias = normal(shape[0], seed=1)
    plain = make_linear(normal(*shape), None, quantization)
    held = plain(torch.eye(shape[1])).T
    assert relative_error(held, normal(*shape)) < {"int8": 0.015, "int4": 0.15}[quantization]
    tolerance = 1e-2 if backend == "torch" else 1e-4  # bfloat16 against 16-bit integers
    for rows in ROWS:
        x = normal(rows, shape[1], seed=2)
        found = make_linear(normal(*shape), bias, quantization)(x)
        assert found.shape == (rows, shape[0])
        assert relative_error(found - bias, x @ held.T) < tolerance


@pytest.mark.parametrize("quant_type", ["Q4_0", "Q4_1"])
def test_gguf_blocks_are_kept_as_they_are(backend: str, quant_type: str) -> None:
    kind = gguf.GGMLQuantizationType[quant_type]
    blocks = gguf.quants.quantize(normal(80, 192).numpy(), kind)
    weight = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    bias, x = normal(80, seed=1), normal(9, 192, seed=2)
    held = make_linear_from_gguf(torch.from_numpy(blocks), quant_type, bias, torch.float32)
    expected = x @ weight.T + bias
    tolerance = 1e-2 if backend == "torch" else 1e-4
    assert relative_error(held(x), expected) < tolerance
    assert held.nbytes < 1.4 * np.asarray(blocks).nbytes + bias.nbytes


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_a_row_does_not_depend_on_the_rows_beside_it(
    backend: str, quantization: str | None
) -> None:
    held = make_linear(normal(96, 320), None, quantization)
    x = normal(12, 320, seed=2)
    x[3] *= 1e4  # a neighbour that would take a shared scale for itself
    together = held(x)
    for row in range(12):
        alone = held(x[row : row + 1])[0]
        if quantization is None or backend == "torch":
            torch.testing.assert_close(together[row], alone, rtol=1e-2, atol=1e-2 * alone.std())
        else:
            assert torch.equal(together[row], alone)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_or_infinity_spoils_its_own_row_and_no_other(
    backend: str, quantization: str, bad: float
) -> None:
    held = make_linear(normal(48, 64), None, quantization)
    x = normal(4, 64, seed=2)
    expected = held(x)
    x[2, 40] = bad
    found = held(x)
    assert not found[2].isfinite().any()
    for row in (0, 1, 3):
        assert torch.equal(found[row], expected[row])


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_rows_of_zeros_in_weight_and_input_give_zeros(backend: str, quantization: str) -> None:
    weight = normal(48, 64)
    weight[5] = 0
    held = make_linear(weight, None, quantization)
    x = normal(3, 64, seed=2)
    x[1] = 0
    found = held(x)
    assert (found[:, 5] == 0).all() and (found[1] == 0).all()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_small_value_beside_a_huge_one_of_another_group_counts(
    backend: str, quantization: str
) -> None:
    """Activations of language models have single features thousands of times the others."""
    held = make_linear(normal(48, 64), None, quantization)
    small, huge = torch.zeros(1, 64), torch.zeros(1, 64)
    small[0, 3], huge[0, 40] = 1e-4, 1e3
    difference = held(small + huge).double() - held(huge).double()
    torch.testing.assert_close(
        difference.float(), held(small), rtol=0, atol=2 * held(huge).abs().max().item() * 2**-8
    )


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_result_has_the_dtype_of_x(
    backend: str, quantization: str | None, dtype: torch.dtype
) -> None:
    held = make_linear(normal(48, 64), normal(48), quantization, dtype)
    found = held(normal(3, 64, seed=2).to(dtype))
    assert found.dtype == dtype
    expected = normal(3, 64, seed=2) @ normal(48, 64).T + normal(48)
    assert relative_error(found.float(), expected) < 0.15


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_x_may_be_a_slice_of_wider_rows(backend: str, quantization: str | None) -> None:
    held = make_linear(normal(48, 64), None, quantization)
    wide = normal(3, 200, seed=2)
    # torch's own product may add up in another order where rows lie elsewhere
    torch.testing.assert_close(held(wide[:, 70:134]), held(wide[:, 70:134].contiguous()))


def test_a_dense_weight_of_the_right_dtype_is_not_copied() -> None:
    weight = normal(48, 64)
    held = make_linear(weight)
    assert held.shares(weight) and not held.shares(weight.clone())
    assert held.nbytes == 48 * 64 * 4


def test_bytes_held_are_about_those_of_the_codes(backend: str) -> None:
    weights = 576 * 1536
    assert make_linear(normal(576, 1536), None, "int8").nbytes < 1.01 * weights
    assert make_linear(normal(576, 1536), None, "int4").nbytes < 0.63 * weights


class TestForKernels:
    """Codes and scales as the ops read them, on a CPU too: the same weights."""

    @pytest.mark.parametrize("quantization", ["int8", "int4"])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_they_stand_for_the_weights_of_the_other_layouts(
        self, shape: tuple[int, int], quantization: str
    ) -> None:
        weight, bias, eye = normal(*shape), normal(shape[0], seed=1), torch.eye(shape[1])
        mine = make_linear(weight, bias, quantization, for_kernels=True)
        assert isinstance(mine, QuantizedLinear)
        held = make_linear(weight, bias, quantization)(eye)
        tolerance = 0.05 if nbengine.cpu.kernels() is None else 1e-5
        torch.testing.assert_close(mine(eye), held, rtol=0, atol=tolerance)
        x = normal(40, shape[1], seed=2)
        torch.testing.assert_close(mine(x), x @ (mine(eye) - bias) + bias, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("quant_type", ["Q4_0", "Q4_1"])
    def test_gguf_blocks_are_kept_as_they_are(self, quant_type: str) -> None:
        kind = gguf.GGMLQuantizationType[quant_type]
        blocks = gguf.quants.quantize(normal(80, 192).numpy(), kind)
        weight = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
        raw = torch.from_numpy(blocks)
        held = make_linear_from_gguf(raw, quant_type, None, torch.float32, for_kernels=True)
        torch.testing.assert_close(held(torch.eye(192)).T, weight, rtol=0, atol=1e-6)
        assert held.nbytes == 80 * 192 * (1 / 2 + 4 / 32)

    @pytest.mark.parametrize("quantization", ["int8", "int4"])
    def test_weights_come_out_of_their_codes_a_slice_at_a_time(
        self, quantization: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held = make_linear(normal(50, 96), normal(50), quantization, for_kernels=True)
        x = normal(7, 96, seed=2)
        whole = held(x)
        sizes: list[int] = []

        def counted(*, out: Tensor, **given: Tensor) -> None:
            sizes.append(len(out))
            linear.dequantize.reference(out=out, **given)

        monkeypatch.setattr(linear, "SLICE_WEIGHTS", 2000)
        torch.testing.assert_close(held.multiply(x, counted), whole)
        assert sizes == [20, 20, 10]


def test_an_unknown_quantization_is_refused() -> None:
    with pytest.raises(InvalidField, match="int3"):
        make_linear(normal(48, 64), None, "int3")


def test_without_a_compiler_there_are_no_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("NBENGINE_CPU_KERNELS", raising=False)
    nbengine.cpu.kernels.cache_clear()
    try:
        assert nbengine.cpu.kernels() is None
    finally:
        nbengine.cpu.kernels.cache_clear()
    assert "no C++ compiler" in caplog.text


def test_a_failing_compilation_says_why(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    with pytest.raises(nbengine.cpu.BuildError, match="no-such-flag"):
        nbengine.cpu.build((*nbengine.cpu.FLAGS, "-no-such-flag"), tmp_path)
    assert not list(tmp_path.glob("*.so"))
