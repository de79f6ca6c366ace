"""benchmarks/gpu_check.py without a GPU: what it makes of its workers' records."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]


def timed(op, case, **figures):
    return {
        "op": op,
        "case": case,
        "implementation": f"cuda/{op}.cu (CUDA C)",
        "us": 100.0,
        "spread": 0.01,
        "gb_per_s": 4000.0,
        "tflops": 1.0,
        "of_roofline": 0.9,
        "of_read_bandwidth": 0.9,
        "bound": "memory",
        **figures,
    }


def test_a_bar_is_met_missed_or_without_a_figure(gpu_check):
    decode = "paged_attention_decode"
    records = [
        timed(decode, "bfloat16-7x4x128-block16-128seqs-2048", of_read_bandwidth=0.85),
        timed(decode, "bfloat16-7x4x128-block16-32seqs-2048", of_read_bandwidth=0.69),
        timed("paged_attention_prefill", "8k-bfloat16", tflops=412.0),
    ]
    verdicts = gpu_check.judged(records)
    assert [v["met"] for v in verdicts] == [True, False, False, False, True]
    assert [v["figure"] for v in verdicts] == [0.85, 0.69, None, None, 412.0]


def test_every_bar_has_a_bench_case(gpu_check):
    for bar in gpu_check.BARS:
        op = importlib.import_module(f"nbengine.kernels.ops.{bar.op}").OP
        names = [case.name for case in op.bench_cases()]
        assert sum(bool(re.fullmatch(bar.case, name)) for name in names) == 1, (bar, names)


def test_another_implementation_meets_no_bar(gpu_check):
    cute = timed("paged_attention_prefill", "8k-bfloat16", tflops=500.0)
    cute["implementation"] = "cute: a.module (Python)"
    assert not any(v["met"] for v in gpu_check.judged([cute]))


def test_an_op_that_ends_its_process_costs_itself_alone(gpu_check, tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, sys\n"
        "for name in sys.argv[3:]:\n"
        "    if name == 'crash':\n"
        "        print('illegal access', file=sys.stderr)\n"
        "        os._exit(6)\n"
        "    if name == 'poison':\n"
        "        print('@' + json.dumps({'op': name, 'error': 'CUDA error'}))\n"
        "        print('@' + json.dumps({'op': name, 'done': True}), flush=True)\n"
        "        sys.exit(1)\n"
        "    print('@' + json.dumps({'op': name, 'us': 1}))\n"
        "    print('@' + json.dumps({'op': name, 'done': True}), flush=True)\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(worker))
    records = gpu_check.run_worker("bench", ["a", "crash", "b", "poison", "c"])
    assert [record["op"] for record in records] == ["a", "crash", "b", "poison", "c"]
    assert "status 6" in records[1]["error"] and "illegal access" in records[1]["error"]
    assert records[3]["error"] == "CUDA error"


def test_a_report_shows_figures_errors_and_bars(gpu_check):
    result = {
        "machine": {"device": "A GPU", "driver": "580", "torch": "2.11", "nvrtc": "13.0"},
        "roofline": {
            "read_bytes_per_s": 4e12,
            "copy_bytes_per_s": 4e12,
            "matrix_flops_per_s": 8e14,
            "read_by": "torch.sum",
        },
        "verify": [
            {
                "op": "rope",
                "implementation": "cuda/rope.cu (CUDA C)",
                "num_cases": 3,
                "worst_of_allowed": 0.5,
                "seconds": 1.0,
            },
            {"op": "gemv", "error": "Mismatch: out[3] is 1"},
        ],
        "bench": [timed("rope", "bfloat16-1"), {"op": "gemv", "error": "status 6"}],
        "tests": [{"summary": "3 passed", "failures": [], "passed": True}],
        "sanitizer": [
            {
                "tool": "memcheck",
                "passed": True,
                "num_cases": {"rope": 7},
                "engine": "5 passed",
                "errors": [],
                "seconds": 9,
            }
        ],
    }
    result["bars"] = gpu_check.judged(result["bench"][:1])
    text = gpu_check.report(result)
    assert "reading 4,000 GB/s (torch.sum)" in text and "bfloat16-1" in text
    assert "WRONG: verify gemv: Mismatch: out[3] is 1" in text
    assert "memcheck: passed, 7 cases of 1 ops; an engine: 5 passed; 9 s" in text
    assert text.count("NOT MET") == 5 and "missing" in text
    assert not gpu_check.is_right(result)
    result["verify"].pop(), result["bench"].pop()
    assert gpu_check.is_right(result)


@pytest.fixture
def found():
    """What the workers of a run find."""
    good = timed("paged_attention_prefill", "8k-bfloat16", tflops=301.0)
    roofline = {"op": "roofline", "read_bytes_per_s": 4e12, "read_by": "torch.sum"}
    return {
        "roofline": [roofline | {"copy_bytes_per_s": 4e12, "matrix_flops_per_s": 8e14}],
        "verify": [],
        "bench": [good],
        "launch": [{"op": "launch", "us": {"rms_norm": 5.5}}],
        "compile": [{"op": "compile", "compiled_ms": 900.0, "from_cache_ms": 1.5}],
    }


MACHINE = {"device": "NVIDIA H200", "driver": "580", "torch": "2.11", "nvrtc": "13.0"}


@pytest.fixture
def run(gpu_check, found, tmp_path, monkeypatch):
    """run(*options) is the exit status; results are in `tmp_path`."""
    monkeypatch.setattr(gpu_check, "run_worker", lambda task, names: found[task])
    passed = {"summary": "1 passed", "failures": [], "passed": True}
    monkeypatch.setattr(gpu_check, "run_tests", lambda *which: passed | {"which": which})
    ended = {"passed": True, "num_cases": {}, "engine": "", "errors": [], "seconds": 1}
    monkeypatch.setattr(gpu_check, "run_sanitizer", lambda tool, *_: ended | {"tool": tool})
    monkeypatch.setattr(gpu_check, "machine", lambda: MACHINE)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output", str(tmp_path), *options])
        return gpu_check.main()

    return run


def test_a_run_keeps_its_result_and_its_exit_status_says_what_is_missed(
    run, found, tmp_path, capsys
):
    (good,) = found["bench"]
    assert run("--only", "paged_attention_prefill") == 0
    kept = tmp_path / "gpu_check_nvidia_h200_verify_bench_paged_attention_prefill.json"
    result = json.loads(kept.read_text())
    assert result["bench"] == [good] and result["machine"] == MACHINE and result["date"]
    assert [bar["met"] for bar in result["bars"]] == [True]
    printed = capsys.readouterr().out
    assert "met" in printed and "µs: rms_norm 5.5" in printed
    assert "compiled: 900 ms; from the disk's cache: 1.5 ms" in printed

    good["tflops"] = 299.0
    assert run("--only", "paged_attention_prefill") == 2
    found["verify"] = [{"op": "paged_attention_prefill", "error": "Mismatch"}]
    assert run("--only", "paged_attention_prefill") == 1
    with pytest.raises(SystemExit):
        run("--only", "nothing")
    assert "no op nothing" in capsys.readouterr().err


def test_a_run_of_some_parts_leaves_the_file_of_a_whole_one_alone(run, tmp_path):
    without = ("--skip-tests", "--skip-verify", "--skip-bench")
    run("--sanitizer")
    run(*without, "--sanitizer")
    run("--skip-bench")
    run("--only", "rope", "gemv", "--skip-verify")
    assert {path.stem.removeprefix("gpu_check_nvidia_h200"): list(json.loads(path.read_text()))[4:]
            for path in tmp_path.iterdir()} == {
        "": ["verify", "tests", "roofline", "launch", "compile", "bench", "bars", "sanitizer"],
        "_sanitizer": ["sanitizer"],
        "_tests_verify": ["verify", "tests"],
        "_bench_rope_gemv": ["roofline", "launch", "compile", "bench", "bars"],
    }  # fmt: skip


def test_the_tests_that_run_are_marked_and_those_whose_engines_choose_the_gpu_exist(
    gpu_check, run, tmp_path
):
    run("--skip-verify", "--skip-bench")
    result = json.loads((tmp_path / "gpu_check_nvidia_h200_tests.json").read_text())
    marks, engines, alone = (tests["which"] for tests in result["tests"])
    assert (marks, alone) == (["gpu and not gpu_alone"], ["gpu_alone"])
    assert all((gpu_check.ROOT / path).is_file() for path in engines[1:])
