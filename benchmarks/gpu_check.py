"""Is every kernel right on this machine's GPU, and how near is each to the device's roofline?

Runs the tests that need a GPU and verifies every op on its grid, all of it in parallel and each op
in a process of its own (an illegal access ends one op's process, and the rest goes on). Then, with
the device to itself, it measures the roofline and times every op at the shapes of a model of 7
billion parameters: CUDA events around replays of a captured graph, rotating arguments larger than
the L2. Prints one table, and keeps everything as JSON, a run of some parts alone under their names.
Exit status 1 says that something is wrong, 2 that only figures are missed.

    python benchmarks/gpu_check.py [--only OP ...] [--skip-tests] [--skip-verify] [--skip-bench]
                                   [--sanitizer] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout is measured, installed or not

Record = dict[str, Any]
TIMEOUT_S = 300
COUNTED = re.compile(r"\d+ (passed|failed|error).* in \d")
POISONED = 3
"""Exit status of a worker in which a kernel failed: nothing more can be trusted in its process, and
another one goes on."""
SANITIZED_TESTS = "tests/test_engine_kernels.py", "-k", "TestWhateverTheScheduleDoes"
"""Of the engine, whose graphs, copies and swaps no op's grid has."""
SHOWN_FAILURES = 20
ALONE = "gpu_alone"
TESTS = (
    ("gpu and not gpu_alone",),
    (  # whose engines choose the GPU by themselves, where there is one
        "not gpu",
        "tests/test_engine.py",
        "tests/test_engine_hostile.py",
        "tests/test_bad_input.py",
        "tests/execution/test_runner.py",
    ),
)
"""Marks, and where: all that runs on the GPU, but for what wants it alone."""


@dataclass(frozen=True)
class Bar:
    """What a figure has to reach. `case` is a pattern for the whole name."""

    op: str
    case: str
    key: str
    least: float
    unit: str


BARS = (
    Bar("paged_attention_decode", ".*-128seqs-2048", "of_read_bandwidth", 0.85, "of read"),
    Bar("paged_attention_decode", ".*-32seqs-2048", "of_read_bandwidth", 0.70, "of read"),
    Bar("paged_attention_decode", ".*-64seqs-8192", "of_read_bandwidth", 0.78, "of read"),
    Bar("paged_attention_decode", ".*-1seqs-32768", "of_read_bandwidth", 0.55, "of read"),
    Bar("paged_attention_prefill", "8k-.*", "tflops", 300, "TFLOP/s"),
)


# ------------------------------------------------------------------ in a process of its own


def work(task: str, names: list[str]) -> None:
    """Print lines of JSON for each op, and one that says that it is done."""

    def tell(record: Record) -> None:
        print("\n@" + json.dumps(record), flush=True)

    for name in names:
        message = ""
        try:
            for record in TASKS[task](name):
                tell(record)
        except Exception as error:  # whatever a kernel may raise is a finding
            message = f"{type(error).__name__}: {error}"
            tell({"op": name, "error": message})
        tell({"op": name, "done": True})
        if "cuda error" in message.lower() or message.startswith("KernelError"):
            sys.exit(POISONED)


def implementations(name: str) -> list[str | None]:
    """The op's own, and the alternatives whose packages are installed."""
    import torch

    from nbengine.kernels.implementation import implement
    from nbengine.kernels.ops import OPS

    found: list[str | None] = [None]
    for alternative in OPS[name].alternatives:
        try:
            implement(OPS[name], alternative, torch.device("cuda"))
        except ImportError:
            continue
        found.append(alternative)
    return found


def verify_op(name: str) -> Iterator[Record]:
    from nbengine.kernels.lab import verify

    for which in implementations(name):
        start = time.perf_counter()
        verified = verify(name, which)
        yield {
            "op": name,
            "implementation": verified.implementation,
            "num_cases": len(verified.errors),
            "worst_of_allowed": round(verified.worst, 3),
            "seconds": round(time.perf_counter() - start, 1),
        }


def sanitized_op(name: str) -> Iterator[Record]:
    """Launches alone: what they compute is verified elsewhere, and faster."""
    import torch

    from nbengine.kernels.implementation import implement
    from nbengine.kernels.ops import OPS

    device = torch.device("cuda", 0)
    own, cases = implement(OPS[name], None, device), list(OPS[name].cases())
    for case in cases:
        own.call(**case.make(torch.Generator(device).manual_seed(0)))
        torch.cuda.synchronize()
    yield {"op": name, "num_cases": len(cases)}


def bench_op(name: str) -> Iterator[Record]:
    import torch

    from nbengine.kernels.bench import measure
    from nbengine.kernels.implementation import implement, op_named
    from nbengine.kernels.lab import roofline

    device = torch.device("cuda", 0)
    ceiling, op = roofline(device), op_named(name)
    own = implement(op, None, device)
    for case, which in itertools.product(op.bench_cases(), implementations(name)):
        new = implement(op, which, device)
        row = measure(new, None if which is None else own, case, ceiling, device)
        record: Record = {
            "op": name,
            "implementation": str(new),
            "case": case.name,
            "us": round(row.timing.median_s * 1e6, 2),
            "spread": round((row.timing.high_s - row.timing.low_s) / row.timing.median_s, 3),
            "samples": row.timing.num_samples,
            "argument_sets": row.num_sets,
            "gb_per_s": round(row.bytes_per_s / 1e9, 1),
            "tflops": round(row.flops_per_s / 1e12, 2),
            "of_roofline": round(row.of_roofline, 3),
            "of_read_bandwidth": round(row.bytes_per_s / ceiling.read_bytes_per_s, 3),
            "bound": row.bound,
        }
        if row.speedup is not None:
            record["times_as_fast_as_own"] = round(row.speedup, 2)
        yield record


def measure_roofline(name: str) -> Iterator[Record]:
    from nbengine.kernels.lab import roofline

    yield {"op": name, **dataclasses.asdict(roofline(refresh=True))}


def time_launches(name: str) -> Iterator[Record]:
    """Microseconds of the host for one launch: a kernel with four parameters, how much of that is
    the driver's call alone, and each op's smallest call. The quietest of ten hundreds, none of
    which waits for the device."""
    import torch

    from nbengine.kernels import load
    from nbengine.kernels.implementation import implement
    from nbengine.kernels.ops import OPS

    def microseconds(call: Callable[[], object]) -> float:
        call()
        samples = []
        for _ in range(10):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                call()
            samples.append((time.perf_counter() - start) * 1e4)
        return round(min(samples), 2)

    device = torch.device("cuda", 0)
    x = torch.ones(1024, device=device)
    source = "__global__ void touch(float* x, float* y, float a, int n) {}\n"
    launch = load(source, "touch", device=device)[4, 256]
    result = {"kernel[grid, block](...)": microseconds(lambda: launch(x, x, 1.0, 1024))}
    last_call: tuple[Any, ...] = ()

    def keep(*call: Any) -> tuple[int]:
        nonlocal last_call
        last_call = call
        return (0,)

    kernel: Any = launch.kernel
    driver_launch, kernel._driver_launch = kernel._driver_launch, keep
    launch(x, x, 1.0, 1024)
    result["of which the driver's call"] = microseconds(lambda: driver_launch(*last_call))
    for op in OPS.values():
        own, case = implement(op, None, device), next(iter(op.cases()))
        arguments = case.make(torch.Generator(device).manual_seed(0))
        with contextlib.suppress(Exception):  # what is wrong with it, `verify` tells
            result[op.name] = microseconds(functools.partial(own.call, **arguments))
    yield {"op": name, "us": result}


def time_compilation(name: str) -> Iterator[Record]:
    """Milliseconds to compile the decode kernel, and to take it from the disk's cache."""
    import torch

    from nbengine.kernels import compiler
    from nbengine.kernels.source import Source, instantiation

    expression = instantiation("paged_attention_decode", (torch.bfloat16, 128, 1, 4, 3))
    architecture = compiler.architecture_for(torch.cuda.get_device_capability())
    never_seen = f"-DAT={time.time_ns()}"

    def milliseconds() -> float:
        start = time.perf_counter()
        source = Source.of_op("paged_attention_decode.cu")
        compiler.compile(source, expression, architecture, [never_seen])
        return round((time.perf_counter() - start) * 1e3, 2)

    first = milliseconds()
    hits = [milliseconds() for _ in range(21)]
    yield {"op": name, "compiled_ms": first, "from_cache_ms": statistics.median(hits)}


TASKS = {
    "verify": verify_op,
    "compile": time_compilation,
    "sanitize": sanitized_op,
    "bench": bench_op,
    "roofline": measure_roofline,
    "launch": time_launches,
}


# ------------------------------------------------------------------ what starts them


def run_worker(
    task: str, names: list[str], prefix: tuple[str, ...] = (), **environment: str
) -> list[Record]:
    """The records of these ops. A process that ends early costs the op it was at; another one goes
    on with the next."""
    records: list[Record] = []
    left = list(names)
    while left:
        command = [*prefix, sys.executable, __file__, "--worker", task, *left]
        try:
            run = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
            output, log, how = run.stdout, run.stdout + run.stderr, f"status {run.returncode}"
            status, failed = run.returncode, run.returncode != 0
        except subprocess.TimeoutExpired as expired:
            output, log, how = _text(expired.stdout), "", f"{TIMEOUT_S} s without an end"
            status, failed = -1, True
        told = [json.loads(line[1:]) for line in output.splitlines() if line.startswith("@")]
        records += [record for record in told if "done" not in record]
        done = {record["op"] for record in told if "done" in record}
        undone = [name for name in left if name not in done]
        lines = [line for line in log.splitlines() if not line.startswith("@")]
        told_by_sanitizer = [line for line in lines if line.startswith("=========")]
        tail = "\n".join(told_by_sanitizer[:40] or lines[-40:])
        if undone and status == POISONED:
            left = undone
            continue
        if undone:
            records.append({"op": undone[0], "error": f"{how}:\n{tail}"})
        elif failed and not any("error" in record for record in told):
            records.append({"op": ", ".join(left), "error": f"{how}:\n{tail}"})
        left = undone[1:]
    return records


def _text(output: str | bytes | None) -> str:
    return output.decode() if isinstance(output, bytes) else output or ""


def run_tests(which: str, *paths: str, prefix: tuple[str, ...] = ()) -> Record:
    """The tests with these marks: those that want the device to themselves, or that another
    program runs, one by one, others in parallel."""
    start = time.perf_counter()
    command = [*prefix, sys.executable, "-m", "pytest", "-m", which, "-rfE", "--tb=short", *paths]
    is_alone = which == ALONE or bool(prefix)
    command += ["-n0"] if is_alone else ["-n", "logical", "--maxprocesses", "10"]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
        status, log = run.returncode, run.stdout + run.stderr
    except subprocess.TimeoutExpired as expired:
        status, log = -1, _text(expired.stdout) + f"\nnot finished within {TIMEOUT_S} s"
    lines = log.strip().splitlines()
    return {
        "command": shlex.join(command).replace(sys.executable, "python"),
        "passed": status == 0,
        "summary": next((line for line in reversed(lines) if COUNTED.search(line)), "no tests ran"),
        "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        "log": "" if status == 0 else "\n".join(lines[-150:]),
        "seconds": round(time.perf_counter() - start, 1),
    }


def run_sanitizer(tool: str, names: list[str], jobs: int) -> Record:
    """`tool` of compute-sanitizer over each op's grid, allocations not pooled (in a pool an access
    beyond a tensor's end would hit its neighbour), and over an engine's tests."""
    path = shutil.which("compute-sanitizer", path=os.environ["PATH"] + ":/usr/local/cuda/bin")
    if path is None:
        error = {
            "op": "all",
            "error": "compute-sanitizer is not installed: it is in CUDA's toolkit",
        }
        return {
            "tool": tool,
            "passed": False,
            "num_cases": {},
            "engine": "not run",
            "errors": [error],
            "seconds": 0,
        }
    prefix: tuple[str, ...] = (path, "--tool", tool, "--error-exitcode", "86")
    if tool == "memcheck":  # the bindings ask the driver for functions that it may not have
        prefix += ("--report-api-errors", "no")
    start = time.perf_counter()

    def of_op(name: str) -> list[Record]:
        return run_worker("sanitize", [name], prefix, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    with ThreadPoolExecutor(jobs) as pool:
        of_engine = pool.submit(run_tests, "gpu", *SANITIZED_TESTS, prefix=prefix)
        records = [record for found in pool.map(of_op, names) for record in found]
    engine = of_engine.result()
    errors = [record for record in records if "error" in record]
    if not engine["passed"]:
        errors.append({"op": "an engine", "error": engine["log"]})
    return {
        "tool": tool,
        "passed": not errors,
        "num_cases": {r["op"]: r["num_cases"] for r in records if "num_cases" in r},
        "engine": engine["summary"],
        "errors": errors,
        "seconds": round(time.perf_counter() - start, 1),
    }


def machine() -> Record:
    import torch

    from nbengine.kernels.roofline import driver_version

    def nvrtc() -> str:
        try:
            from cuda.bindings import nvrtc as library

            return ".".join(map(str, library.nvrtcVersion()[1:]))
        except (ImportError, RuntimeError) as error:
            return f"not found ({error})"

    properties: Any = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": properties.L2_cache_size >> 20,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": driver_version(),
        "torch": torch.__version__,
        "nvrtc": nvrtc(),
        "python": sys.version.split()[0],
    }


# ------------------------------------------------------------------ what it says


def judged(records: list[Record], bars: tuple[Bar, ...] = BARS) -> list[Record]:
    """Each bar with the figure that it is for, or without one."""
    verdicts = []
    for bar in bars:
        rows = [
            record
            for record in records
            if record["op"] == bar.op
            and re.fullmatch(bar.case, record.get("case", ""))
            and record["implementation"].startswith("cuda/")
        ]
        value = rows[0][bar.key] if rows else None
        verdicts.append(
            {
                "op": bar.op,
                "case": rows[0]["case"] if rows else bar.case,
                "bar": f"{bar.least:g} {bar.unit}",
                "figure": value,
                "met": value is not None and value >= bar.least,
            }
        )
    return verdicts


def report(result: Record) -> str:
    from nbengine.kernels.display import table_text

    ceiling = result.get("roofline", {})
    parts = ["{device}, driver {driver}, torch {torch}, NVRTC {nvrtc}".format(**result["machine"])]
    if "read_bytes_per_s" in ceiling:
        parts.append(
            f"roofline: reading {ceiling['read_bytes_per_s'] / 1e9:,.0f} GB/s "
            f"({ceiling['read_by']}), copying {ceiling['copy_bytes_per_s'] / 1e9:,.0f} GB/s, "
            f"bfloat16 products {ceiling['matrix_flops_per_s'] / 1e12:,.0f} TFLOP/s"
        )
    rows = [
        (
            record["op"],
            record["case"],
            record["implementation"].partition(" ")[0],
            f"{record['us']:,.1f}",
            f"{record['spread']:.1%}",
            f"{record['gb_per_s']:,.0f}",
            f"{record['tflops']:,.1f}",
            f"{record['of_roofline']:.1%}",
            record["bound"],
            f"{record.get('times_as_fast_as_own', '')}",
        )
        for record in result.get("bench", ())
        if "error" not in record
    ]
    headers = ("op", "case", "by", "µs", "spread", "GB/s", "TFLOP/s", "of roofline", "bound")
    parts.append(table_text((*headers, "x own"), rows))
    right = [record for record in result.get("verify", ()) if "error" not in record]
    parts.append(
        table_text(
            ("verified", "by", "cases", "worst, of allowed", "s"),
            [
                (
                    record["op"],
                    record["implementation"],
                    str(record["num_cases"]),
                    f"{record['worst_of_allowed']:.0%}",
                    str(record["seconds"]),
                )
                for record in right
            ],
        )
    )
    if "us" in result.get("launch", {}):
        launches = ", ".join(f"{name} {us}" for name, us in result["launch"]["us"].items())
        parts.append(f"The host's part of a launch, µs: {launches}")
    if "compiled_ms" in result.get("compile", {}):
        parts.append(
            "The decode kernel, compiled: {compiled_ms:,.0f} ms; from the disk's cache: "
            "{from_cache_ms} ms".format(**result["compile"])
        )
    for part in ("verify", "bench"):
        parts += [
            f"WRONG: {part} {record['op']}: {record['error'][-1500:]}"
            for record in result.get(part, ())
            if "error" in record
        ]
    for run in result.get("sanitizer", ()):
        parts.append(
            f"{run['tool']}: {'passed' if run['passed'] else 'ERRORS'}, "
            f"{sum(run['num_cases'].values())} cases of {len(run['num_cases'])} ops; an engine: "
            f"{run['engine']}; {run['seconds']} s"
        )
        parts += [f"WRONG: {run['tool']} {e['op']}: {e['error'][-1500:]}" for e in run["errors"]]
    if "tests" in result:
        for tests in result["tests"]:
            parts += [f"tests: {tests['summary']}", *tests["failures"][:SHOWN_FAILURES]]
    if result.get("bars"):
        parts.append(
            table_text(
                ("bar", "case", "figure", "needed", ""),
                [
                    (
                        bar["op"],
                        bar["case"],
                        "missing" if bar["figure"] is None else f"{bar['figure']:g}",
                        bar["bar"],
                        "met" if bar["met"] else "NOT MET",
                    )
                    for bar in result["bars"]
                ],
            )
        )
    return "\n\n".join(parts)


def is_right(result: Record) -> bool:
    records = [*result.get("verify", ()), *result.get("bench", ())]
    runs = [*result.get("sanitizer", ()), *result.get("tests", ())]
    return not any("error" in record for record in records) and all(r["passed"] for r in runs)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="OP", help="these ops, and no tests")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--skip-verify", action="store_true")
    parser.add_argument("--skip-bench", action="store_true")
    parser.add_argument("--sanitizer", action="store_true", help="memcheck and racecheck as well")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker[0], given.worker[1:])
        return 0

    import torch

    from nbengine.kernels.ops import OPS

    if not torch.cuda.is_available():
        print("gpu_check measures a GPU, and torch sees none here", file=sys.stderr)
        return 1
    names = given.only or list(OPS)
    unknown = [name for name in names if name not in OPS]
    if unknown:
        parser.error(f"no op {', '.join(unknown)}: there are {', '.join(OPS)}")
    wanted = {
        "tests": not (given.skip_tests or given.only),
        "verify": not given.skip_verify,
        "bench": not given.skip_bench,
        "sanitizer": given.sanitizer,
    }
    parts = [part for part, is_wanted in wanted.items() if is_wanted]
    options = sys.argv[1:]
    if "--output" in options:
        at = options.index("--output")
        del options[at : at + 2]
    result: Record = {
        "question": (__doc__ or "").splitlines()[0],
        "command": "python benchmarks/gpu_check.py " + " ".join(options),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    with ThreadPoolExecutor(given.jobs + len(TESTS)) as pool:
        tests = [pool.submit(run_tests, *each) for each in TESTS if "tests" in parts]
        if "verify" in parts:
            verified = [pool.submit(run_worker, "verify", [name]) for name in names]
            result["verify"] = [record for future in verified for record in future.result()]
        if tests:
            result["tests"] = [future.result() for future in tests]
    if tests:
        result["tests"].append(run_tests(ALONE))
    if "bench" in parts:
        result["roofline"] = run_worker("roofline", ["roofline"])[-1]
        result["launch"] = run_worker("launch", ["launch"])[-1]
        result["compile"] = run_worker("compile", ["compile"])[-1]
        result["bench"] = run_worker("bench", names)
        timed = [record for record in result["bench"] if "error" not in record]
        result["bars"] = judged(timed, tuple(bar for bar in BARS if bar.op in names))
    given.output.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "_", result["machine"]["device"].lower()).strip("_")
    is_whole = {"tests", "verify", "bench"} <= set(parts)
    title = "_".join(["gpu_check", device, *([] if is_whole else [*parts, *(given.only or ())])])
    path = given.output / f"{title}.json"
    if "sanitizer" in parts:
        path.write_text(json.dumps(result, indent=2) + "\n")  # what follows takes long
        print(report(result), flush=True)
        result["sanitizer"] = [
            run_sanitizer(tool, names, given.jobs) for tool in ("memcheck", "racecheck")
        ]
    print(report(result))
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nkept in {path}")
    if not is_right(result):
        return 1
    return 0 if all(bar["met"] for bar in result.get("bars", ())) else 2


if __name__ == "__main__":
    sys.exit(main())
