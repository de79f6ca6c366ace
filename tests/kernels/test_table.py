"""`Kernels`: calls reach what was bound, a swap is verified first, and graphs hear of it."""

from __future__ import annotations

import pytest
import torch

from nbengine.kernels import table
from nbengine.kernels.emulator import EmulationError
from nbengine.kernels.implementation import UnknownOp
from nbengine.kernels.lab import Mismatch
from nbengine.kernels.ops import OPS
from nbengine.kernels.source import Source
from nbengine.kernels.table import Kernels


def call(kernels, x):
    out = torch.full_like(x, torch.nan)
    kernels.rms_norm(out=out, x=x, weight=torch.ones(x.shape[-1]), eps=1e-5)
    return out


def arguments(kernels):
    """Of a call that `record` saw."""
    recording = kernels.record("rms_norm")
    call(kernels, torch.randn(2, 64))
    return recording.calls


@pytest.fixture
def kernels():
    return Kernels("cpu")


def double(**arguments):
    OPS["rms_norm"].reference(**arguments)
    arguments["out"].mul_(2)


def same(**arguments):
    same.calls += 1
    OPS["rms_norm"].reference(**arguments)


same.calls = 0


def test_without_a_gpu_the_reference_runs(kernels):
    x = torch.tensor([[3.0, 4.0]])
    assert torch.allclose(call(kernels, x), x / 12.5**0.5)
    assert kernels.implementation("rms_norm").language == "torch"


def test_an_op_is_bound_once(kernels):
    assert kernels.rms_norm is kernels.rms_norm
    assert "rms_norm" in vars(kernels)


def test_an_unknown_op_is_an_attribute_error_that_lists_the_ops(kernels):
    assert not hasattr(kernels, "rms_nrom")
    with pytest.raises(UnknownOp, match=r"'rms_nrom' \(did you mean 'rms_norm'\?\); the ops are"):
        kernels.rms_nrom()
    with pytest.raises(UnknownOp, match=r"no op 'softmax'; the ops are .*rms_norm"):
        kernels.softmax()


def test_a_backend_and_a_device_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="kernels='cuda' does not go with device cpu"):
        Kernels("cpu", "cuda")
    with pytest.raises(ValueError, match="does not go with device cuda"):
        Kernels("cuda", "emulated")
    with pytest.raises(ValueError, match="kernels='gpu'"):
        Kernels("cpu", "gpu")


def test_a_swap_is_verified_and_then_runs_and_restore_takes_it_back(kernels):
    swapped = kernels.swap("rms_norm", same)
    assert kernels.version == 1
    assert str(swapped.before) == "reference (torch)" and "same (Python)" in str(swapped)
    assert set(swapped.verified.errors) == {case.name for case in OPS["rms_norm"].cases()}
    before = same.calls
    call(kernels, torch.randn(2, 64))
    assert same.calls == before + 1
    assert repr(kernels) == "Kernels('cpu', 'reference', 1 swapped)"

    kernels.restore("rms_norm")
    assert kernels.version == 2
    call(kernels, torch.randn(2, 64))
    assert same.calls == before + 1
    kernels.restore("rms_norm")
    assert kernels.version == 2


def test_a_wrong_implementation_is_refused_and_nothing_changes(kernels):
    bound = kernels.rms_norm
    with pytest.raises(Mismatch, match=r"out\[0, 0\] is .* the reference says"):
        kernels.swap("rms_norm", double)
    assert kernels.rms_norm is bound and kernels.version == 0


def test_an_implementation_that_fails_on_a_live_call_alone_is_refused(kernels):
    def only_the_grid(**arguments):
        OPS["rms_norm"].reference(**arguments)
        if arguments["x"].shape == (2, 64):
            arguments["out"][1, 5] = 9.0

    grid = {tuple(c.make(torch.Generator())["x"].shape) for c in OPS["rms_norm"].cases()}
    assert (2, 64) not in grid
    live = arguments(kernels)
    with pytest.raises(Mismatch, match=r"rms_norm live call 0: out\[1, 5\] is 9"):
        kernels.swap("rms_norm", only_the_grid, live_arguments=live)
    assert kernels.version == 0


def test_an_output_that_was_right_before_the_call_must_be_written_all_the_same(kernels):
    def lazy(**arguments):
        if arguments["x"].shape != (2, 64):
            OPS["rms_norm"].reference(**arguments)

    x, residual = torch.randn(2, 64), torch.randn(2, 64)
    given = {"x": x, "weight": torch.ones(64), "eps": 1e-5}
    out = call(kernels, x)
    recording = kernels.record("rms_norm")
    kernels.rms_norm(out=out, **given)
    assert torch.equal(recording.calls[0]["out"], out)
    with pytest.raises(Mismatch, match=r"live call 0: out\[0, 0\] is nan"):
        kernels.swap("rms_norm", lazy, live_arguments=recording.calls)

    # What a call reads before it writes is left as it was.
    recording = kernels.record("rms_norm")
    kernels.rms_norm(out=out, **given, residual=residual)
    with pytest.raises(Mismatch, match=r"live call 0: out\[0, 0\] is nan"):
        kernels.swap("rms_norm", lazy, live_arguments=recording.calls)
    kernels.swap("rms_norm", same, live_arguments=recording.calls)


def test_the_result_says_on_how_many_live_calls_it_agrees(kernels):
    live = arguments(kernels)
    num = len(list(OPS["rms_norm"].cases()))
    told = f"on {num} calls; the largest"
    assert told in str(kernels.swap("rms_norm", same))
    told = f"on {num} calls of its grid and 1 live; the largest"
    assert told in str(kernels.swap("rms_norm", same, live_arguments=live))
    told = f"on {num} calls of its grid, and on no live one: the engine makes none now; the largest"
    assert told in str(kernels.swap("rms_norm", same, live_arguments=[]))


@pytest.mark.parametrize("what", [5, ["rms_norm.cu"], torch.zeros(1)])
def test_what_can_implement_nothing_is_refused(kernels, what):
    with pytest.raises(TypeError, match=r"rms_norm can't be implemented by .*: give the path of"):
        kernels.swap("rms_norm", what)


def test_what_runs_another_op_is_refused(kernels):
    other = kernels.implementation("gated_mlp")
    with pytest.raises(ValueError, match="is an implementation of gated_mlp, not of rms_norm"):
        kernels.swap("rms_norm", other)


def test_an_op_that_is_asked_for_while_it_is_swapped_stays_swapped(kernels, monkeypatch):
    """As by a cell that lists the ops, while the engine's thread swaps one."""

    implement = table.implement

    def slowly(*given, **options):
        monkeypatch.undo()
        kernels.swap("rms_norm", same)
        return implement(*given, **options)

    monkeypatch.setattr(table, "implement", slowly)
    assert kernels.implementation("rms_norm").call is same
    assert kernels.rms_norm is same
    assert kernels.restore("rms_norm").origin == "reference"


def test_the_ops_own_cuda_c_beside_the_reference_is_a_swap_that_can_be_taken_back():
    kernels = Kernels("cpu")
    kernels.swap("copy_blocks", None)
    assert str(kernels.implementation("copy_blocks")) == "cuda/copy_blocks.cu (CUDA C, emulated)"
    assert repr(kernels) == "Kernels('cpu', 'reference', 1 swapped)"
    assert str(kernels.restore("copy_blocks")) == "reference (torch)"


def test_what_was_verified_is_what_is_compiled_later(tmp_path):
    """A header that is edited after the swap is not in a specialisation that was not yet needed."""
    path, header = tmp_path / "mine.cu", tmp_path / "factor.cuh"
    own = Source.of_op("gated_mlp.cu").text
    path.write_text('#include "factor.cuh"\n' + own.replace("ups[j] *= ", "ups[j] *= FACTOR * "))
    assert path.read_text().count("FACTOR") == 1
    header.write_text("#define FACTOR 1.0f\n")
    kernels = Kernels("cpu", "emulated")
    kernels.swap("gated_mlp", path)
    header.write_text("#define FACTOR 2.0f\n")
    size = 24  # of no case
    gate_up, out = torch.randn(2, 2 * size), torch.full((2, size), torch.nan)
    kernels.gated_mlp(out=out, gate_up=gate_up)
    wanted = torch.empty_like(out)
    OPS["gated_mlp"].reference(out=wanted, gate_up=gate_up)
    torch.testing.assert_close(out, wanted)


def test_recording_keeps_the_arguments_as_they_were_before_the_call(kernels):
    recording = kernels.record("rms_norm", num_calls=2)
    x = torch.randn(2, 64)
    residual = torch.zeros(2, 64)
    given = {"out": torch.empty(2, 64), "x": x, "weight": torch.ones(64), "eps": 1e-5}
    for _ in range(3):
        kernels.rms_norm(**given, residual=residual)
    assert recording.is_complete and len(recording.calls) == 2
    assert torch.equal(recording.calls[0]["residual"], torch.zeros(2, 64))
    assert torch.equal(recording.calls[1]["residual"], x)
    assert torch.equal(residual, 3 * x)
    assert kernels.rms_norm is kernels.implementation("rms_norm").call


def test_recording_ends_when_told_and_with_a_swap(kernels):
    recording = kernels.record("rms_norm")
    recording.stop()
    call(kernels, torch.randn(2, 64))
    assert recording.calls == []

    recording = kernels.record("rms_norm")
    kernels.swap("rms_norm", same)
    recording.stop()
    assert kernels.rms_norm is same


def test_the_list_of_implementations_says_what_runs(kernels):
    kernels.swap("rms_norm", same)
    rows = {row.op.name: row for row in kernels.implementations}
    assert set(rows) == set(OPS)
    assert not rows["rms_norm"].is_own
    assert "swapped" in str(kernels.implementations)
    assert repr(kernels.restore("rms_norm")) == "rms_norm: reference (torch)"
    assert "swapped" not in str(kernels.implementations)
    assert "<td" in kernels.implementations._repr_html_()


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.compact is not None])
def test_a_compacted_call_writes_what_the_whole_one_does(name):
    """Block by block: what the caller wrote is among the blocks of the compacted call."""
    op = OPS[name]
    for case in op.cases():
        whole = case.make(torch.Generator().manual_seed(0))
        small = op.compact(whole)
        op.reference(**whole)
        op.reference(**small)
        for output in op.outputs:
            found, wanted = small[output], whole[output]
            assert found.numel() <= wanted.numel()
            if found.shape == wanted.shape:
                continue
            # A cache: every block of the small one stands in the large one.
            axis = next(i for i in range(found.dim()) if found.shape[i] != wanted.shape[i])
            rows = {row.numpy(force=True).tobytes() for row in wanted.double().unbind(axis)}
            assert all(row.numpy().tobytes() in rows for row in found.double().unbind(axis))
        results = [o for o in op.outputs if small[o].shape == whole[o].shape]
        assert all(torch.equal(small[o].nan_to_num(7), whole[o].nan_to_num(7)) for o in results)


def test_every_op_has_shapes_to_be_measured_at():
    assert [name for name, op in OPS.items() if not list(op.bench_cases())] == []


def test_cuda_c_text_is_swapped_in_and_runs_emulated():
    kernels = Kernels("cpu", "emulated")
    text = Source.of_op("copy_blocks.cu").text
    wrong = text.replace("pairs[", "pairs[0 * ", 1)
    assert wrong != text
    with pytest.raises((Mismatch, EmulationError)):
        kernels.swap("copy_blocks", wrong)
    assert kernels.version == 0

    kernels.swap("copy_blocks", text)
    assert kernels.implementation("copy_blocks").origin == "copy_blocks.cu (a string)"
    cache = torch.randn(1, 2, 3, 1, 8, 64)
    kernels.copy_blocks(cache=cache, pairs=torch.tensor([[2, 0]]))
    assert torch.equal(cache[:, :, 0], cache[:, :, 2])
