"""`verify` on Python implementations: what it lets pass, and what it says of what it refuses."""

from __future__ import annotations

import pytest
import torch

from nbengine.kernels.implementation import UnknownOp
from nbengine.kernels.lab import Mismatch, verify
from nbengine.kernels.op import Case
from nbengine.kernels.ops import OPS
from nbengine.kernels.source import Source
from nbengine.progress import progress_to

RMS_NORM = OPS["rms_norm"]


def right(**arguments):
    RMS_NORM.reference(**arguments)


def strided_case():
    """Two rows of 8, `x` and `out` slices of rows of 12."""

    def make(generator):
        wide = torch.randn(2, 12, generator=generator)
        out = torch.full((2, 12), torch.nan)
        return {"out": out[:, :8], "x": wide[:, :8], "weight": torch.ones(8), "eps": 1e-5}

    return Case("strided", make)


def test_the_reference_agrees_with_itself_on_every_case():
    result = verify("rms_norm", right, device="cpu")
    assert set(result.errors) == {case.name for case in RMS_NORM.cases()}
    assert result.worst == 0
    assert "agrees with the reference" in str(result) and "right" in str(result)
    assert "<table" in result._repr_html_()


def test_it_tells_which_call_it_is_at_and_what_it_compiles():
    told = []
    cases = list(RMS_NORM.cases())[:2]
    with progress_to(told.append):
        verify("rms_norm", None, cases, device="cpu")
    assert told == [
        "verifying rms_norm on its grid: 1 of 2 calls",
        "verifying rms_norm on its grid: 1 of 2 calls; compiling rms_norm<float, 64, 16, 8, false>",
        "verifying rms_norm on its grid: 1 of 2 calls",
        "verifying rms_norm on its grid: 2 of 2 calls",
        "verifying rms_norm on its grid: 2 of 2 calls; compiling rms_norm<float, 64, 16, 8, true>",
        "verifying rms_norm on its grid: 2 of 2 calls",
    ]
    verify("rms_norm", None, cases, device="cpu")
    assert len(told) == 6, "nobody listens any more"


def test_a_wrong_element_is_named_with_its_index_and_both_values():
    def wrong(*, out, **arguments):
        right(out=out, **arguments)
        out[1, 3] = 5.0

    with pytest.raises(Mismatch, match=r"rms_norm strided: out\[1, 3\] is 5, the reference") as e:
        verify("rms_norm", wrong, [strided_case()], device="cpu")
    assert e.value.argument == "out" and e.value.index == (1, 3)
    assert e.value.found == 5 and abs(e.value.wanted) < 4
    assert "1 of 16 elements" in str(e.value)


def test_an_element_that_was_not_written_is_wrong():
    def partial(*, out, **arguments):
        kept = out[0, 0].clone()
        right(out=out, **arguments)
        out[0, 0] = kept

    with pytest.raises(Mismatch, match=r"out\[0, 0\] is nan"):
        verify("rms_norm", partial, [strided_case()], device="cpu")


def test_an_input_may_not_change():
    def scribbling(*, x, **arguments):
        right(x=x, **arguments)
        x[0, 0] += 1

    with pytest.raises(Mismatch, match="x is an input, and was changed"):
        verify("rms_norm", scribbling, [strided_case()], device="cpu")


def test_memory_between_the_rows_of_an_output_may_not_change():
    def overflowing(*, out, **arguments):
        right(out=out, **arguments)
        out.as_strided((9,), (1,))[8] = 1

    with pytest.raises(Mismatch, match="memory between its rows was changed"):
        verify("rms_norm", overflowing, [strided_case()], device="cpu")


def test_one_tensor_as_two_arguments_stays_one():
    def make(generator):
        x = torch.randn(2, 8, generator=generator)
        return {"out": x, "x": x, "weight": torch.ones(8), "eps": 1e-5}

    def in_place(*, out, x, **arguments):
        assert out is x
        right(out=out, x=x, **arguments)

    assert verify("rms_norm", in_place, [Case("in place", make)], device="cpu").worst == 0


def test_large_outputs_are_compared_in_pieces(monkeypatch):
    monkeypatch.setattr("nbengine.kernels.verification._CHUNK", 8)

    def wrong(*, out, **arguments):
        right(out=out, **arguments)
        out[1, 7] = 5.0

    with pytest.raises(Mismatch, match=r"out\[1, 7\] is 5.* 1 of 16 elements"):
        verify("rms_norm", wrong, [strided_case()], device="cpu")


def test_no_cases_verify_nothing():
    with pytest.raises(ValueError, match="no cases were given"):
        verify("rms_norm", right, [], device="cpu")


def test_what_can_be_no_implementation_is_refused():
    for what in (5, [right]):
        with pytest.raises(TypeError, match=r"rms_norm can't be implemented by .*: give"):
            verify("rms_norm", what, device="cpu")


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(UnknownOp, match=r"there is no op 'rms'; the ops are .*rms_norm"):
        verify("rms", right, device="cpu")
    with pytest.raises(ValueError, match=r"no implementation 'fast': .* reference"):
        verify("rms_norm", "fast", device="cpu")


SCALED = """
template <typename T, int kSize, int kLanes, int kRows, bool kResidual>
__global__ void rms_norm(T* out, const T* x, T* residual, const float* weight, int num_rows,
                         int num_sets, long long x_stride, long long out_stride, float eps) {
  if (threadIdx.x == 0 && blockIdx.x == 0) out[0] = x[0];
}
"""


def test_cuda_c_is_given_as_text_path_or_source_and_emulated_without_a_gpu(tmp_path):
    (tmp_path / "mine.cu").write_text(SCALED)
    given = (
        SCALED,
        " ".join(SCALED.split()),  # one line
        tmp_path / "mine.cu",
        str(tmp_path / "mine.cu"),
        Source(SCALED, "a cell"),
    )
    for what in given:
        with pytest.raises(Mismatch, match=r"rms_norm strided: out\[0, 0\]"):
            verify("rms_norm", what, [strided_case()], device="cpu")


def test_the_ops_own_source_is_what_runs_when_nothing_else_is_given():
    result = verify("rms_norm", None, list(RMS_NORM.cases())[:1], device="cpu")
    assert "cuda/rms_norm.cu (CUDA C, emulated)" in str(result)
    with pytest.raises(FileNotFoundError):
        verify("rms_norm", "no_such.cu", device="cpu")
