"""What an open dashboard costs the engine, and how soon its buttons answer.

    python benchmarks/dashboard.py [--rounds 10] [--seconds 3] [--out benchmarks/results/dashboard.json]

A real kernel runs an engine of 16,000 KV blocks in the background. With a GPU: a model of random
weights in the shape of Qwen2.5-7B, in bfloat16, 256 running sequences.
Without: a stand-in for one (a step waits 8 ms, as for a device, and everything else is real), then
SmolLM2-135M on this CPU, on one core and on all. This process is the page: it takes every frame from
the kernel's socket and acknowledges it, as a browser that draws at once. In each round the same
sequences decode anew, and steps a second are counted with the dashboard open and closed, each going
first in every other round. A step takes longer as contexts grow, so the cost is the ratio of the
medians of those that went first, and of those that went second: the geometric mean of the two. A button's delay is from sending its message to the frame that shows what it did. The
browser's drawing is not in it: it is another process, on most machines on another core, and beside a
server another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from jupyter_client.manager import KernelManager

REPOSITORY = Path(__file__).resolve().parents[1]

COMMON = f"""
import sys; sys.path.insert(0, {str(REPOSITORY)!r})
import random, time
from nbengine import Engine, SamplingParams
%load_ext nbengine
"""
STAND_IN = """
from nbengine.core.plan import StepOutput
from tests.jupyter.scripted import ScriptedEngine
def compute(plan):
    time.sleep(0.008)
    done = [s for s, n in plan.scheduled if s.num_computed_tokens + n == len(s.tokens)]
    return StepOutput(samples={s.seq_id: [r.randrange(30)] for s in done})
r = random.Random(1)
engine = ScriptedEngine(
    model="scripted", num_gpu_blocks_override=16_000, max_num_seqs=256, max_model_len=1_000_000
)
engine.runner.compute = compute
"""
SMOLLM2 = """
engine = Engine(
    model="smollm2-135m", quantization="int4", num_gpu_blocks_override=16_000, max_num_seqs=256
)
"""
GPU = """
from benchmarks.batch_invariance import QWEN2_5, random_engine
engine = random_engine(
    QWEN2_5, num_gpu_blocks_override=16_000, max_num_seqs=256, max_model_len=4_096
)
"""
LOAD = """
engine.pause()
for name in [*engine.scheduler.live]:
    engine.abort(name)
r = random.Random(0)
for _ in range({num_seqs}):
    prompt = [r.randrange(1000) for _ in range(r.randint(64, 512))]
    engine.add_request(prompt, SamplingParams(max_tokens=3_000, ignore_eos=True))
engine.run(until=lambda record: record.num_running == {num_seqs} and len(record.sampled) == {num_seqs})
engine.start()
"""


class Kernel:
    """A kernel, and the page of its dashboard."""

    def __init__(self, num_threads: int | None) -> None:
        self.manager = KernelManager()
        threads = {} if num_threads is None else {"OMP_NUM_THREADS": str(num_threads)}
        self.manager.start_kernel(cwd=str(REPOSITORY / "benchmarks"), env=os.environ | threads)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)
        self.comm: str | None = None
        self.num_frames = self.num_bytes = 0
        self.state: dict[str, Any] = {}

    def run(self, source: str) -> str:
        """What a cell prints."""
        request = self.client.execute(source)
        said: list[str] = []
        while True:
            message = self.client.get_iopub_msg(timeout=600)
            self._hear(message)
            if message["parent_header"].get("msg_id") != request:
                continue
            content = message["content"]
            if message["msg_type"] == "stream":
                said.append(content["text"])
            if message["msg_type"] == "error":
                raise RuntimeError("\n".join(content["traceback"]))
            if message["msg_type"] == "status" and content["execution_state"] == "idle":
                return "".join(said)

    def listen(self, seconds: float, until: Any = lambda state: False) -> None:
        """Be the page for a while."""
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0 and not until(self.state):
            try:
                self._hear(self.client.get_iopub_msg(timeout=left))
            except queue.Empty:
                return

    def send(self, kind: str, **fields: Any) -> None:
        """A message from the page."""
        content = {
            "comm_id": self.comm,
            "data": {"method": "custom", "content": {"type": kind, **fields}},
        }
        self.client.shell_channel.send(self.client.session.msg("comm_msg", content))

    def _hear(self, message: Any) -> None:
        content = message["content"]
        if message["msg_type"] == "comm_open" and "DashboardWidget" in str(content["data"]):
            self.comm = content["comm_id"]
            self.send("ready")
        data = content.get("data", {})
        if message["msg_type"] != "comm_msg" or data.get("method") != "custom":
            return
        frame = data["content"]
        self.num_frames += 1
        self.num_bytes += sum(len(buffer) for buffer in message["buffers"])
        self.state = json.loads(bytes(message["buffers"][0]))["live"]
        self.send("drawn", seq=frame["seq"])

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def steps_per_second(kernel: Kernel, seconds: float) -> float:
    read = "print(engine.scheduler.step_count, time.perf_counter(), len(engine.scheduler.running))"
    first, began, _ = kernel.run(read).split()
    kernel.listen(seconds)
    last, ended, running = kernel.run(read).split()
    assert int(running) > 0, "the work has ended: a longer load is needed"
    return (int(last) - int(first)) / (float(ended) - float(began))


def button_delays(kernel: Kernel, count: int) -> list[float]:
    """Seconds from a click on Pause or Run to the frame that shows it, while the engine runs."""
    delays = []
    for i in range(count):
        wanted = i % 2 == 1
        began = time.perf_counter()
        kernel.send("run" if wanted else "pause")
        kernel.listen(5, until=lambda state, wanted=wanted: state.get("is_running") is wanted)
        delays.append(time.perf_counter() - began)
        kernel.listen(0.1)
    return delays


def measure(
    setup: str, num_seqs: int, rounds: int, seconds: float, num_threads: int | None = None
) -> dict[str, Any]:
    kernel = Kernel(num_threads)
    try:
        kernel.run(COMMON + setup)
        rates: dict[str, list[float]] = {
            f"{state}, {order}": [] for state in ("closed", "open") for order in ("first", "second")
        }
        delays: list[float] = []
        frames = num_bytes = 0
        for round_index in range(rounds):
            kernel.run(LOAD.format(num_seqs=num_seqs))
            order = ("closed", "open") if round_index % 2 else ("open", "closed")
            for state, place in zip(order, ("first", "second"), strict=True):
                if state == "closed":
                    rates[f"closed, {place}"].append(steps_per_second(kernel, seconds))
                    continue
                kernel.run("dashboard = engine.dashboard(); display(dashboard)")
                kernel.listen(0.5)
                before = kernel.num_frames, kernel.num_bytes
                rates[f"open, {place}"].append(steps_per_second(kernel, seconds))
                frames += kernel.num_frames - before[0]
                num_bytes += kernel.num_bytes - before[1]
                delays += button_delays(kernel, 4)
                kernel.run("dashboard.close(); engine.start()")
        medians = {name: statistics.median(samples) for name, samples in rates.items()}
        ratios = {
            place: medians[f"open, {place}"] / medians[f"closed, {place}"]
            for place in ("first", "second")
        }
        return {
            "steps_per_second": rates,
            "steps_per_second_medians": medians,
            "lost": 1 - statistics.geometric_mean(ratios.values()),
            "lost_first_and_second": [1 - ratio for ratio in ratios.values()],
            "frames_per_second": frames / (rounds * seconds),
            "bytes_per_frame": num_bytes / max(1, frames),
            "button_seconds_median": statistics.median(delays),
            "button_seconds_most": max(delays),
        }
    finally:
        kernel.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--out", type=Path, help="default: in benchmarks/results")
    arguments = parser.parse_args()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    how_long = arguments.rounds, arguments.seconds
    results = (
        {
            "random weights in Qwen2.5-7B's shape, bfloat16, 256 sequences": measure(
                GPU, 256, *how_long
            )
        }
        if gpu
        else {
            "stand-in for a GPU, 8 ms a step, 256 sequences": measure(STAND_IN, 256, *how_long),
            "SmolLM2-135M int4 on one core of this CPU, 16 sequences": measure(
                SMOLLM2, 16, *how_long, num_threads=1
            ),
            "SmolLM2-135M int4 on all cores, which the page needs too, 16 sequences": measure(
                SMOLLM2, 16, *how_long
            ),
        }
    )
    for name, result in results.items():
        print(
            f"{name}: {result['lost']:.1%} of {result['steps_per_second_medians']['closed, first']:.1f}"
            f" steps/s lost, {result['frames_per_second']:.0f} frames/s of "
            f"{result['bytes_per_frame'] / 1024:.1f} KiB, a button answers in "
            f"{1e3 * result['button_seconds_median']:.0f} ms (at most "
            f"{1e3 * result['button_seconds_most']:.0f})"
        )
    machine: dict[str, Any] = {"gpu": gpu} if gpu else {}
    machine |= {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "time": time.strftime("%Y-%m-%d"),
    }
    name = "dashboard" + (f"_{re.sub('[^a-z0-9]+', '_', gpu.lower())}" if gpu else "")
    out = arguments.out or REPOSITORY / "benchmarks" / "results" / f"{name}.json"
    out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
