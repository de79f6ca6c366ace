"""How long do the scheduler's decisions take for 256 running sequences, and does it stay flat?

Schedules, commits and seals steps of 256 decoding sequences (prompts of 512 tokens, blocks of 16,
prefix caching on, a history that keeps every record) and no model at all; the medians of the first
and of the last 500 steps are compared. Wall time on one thread, in this process.

    python benchmarks/scheduler_step.py
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from nbengine.core.history import History
from nbengine.core.plan import StepOutput
from nbengine.core.records import Phases
from nbengine.core.request import Request
from nbengine.core.sampling_params import SamplingParams
from nbengine.core.scheduler import Scheduler, SchedulerConfig

NUM_SEQS, PROMPT, BLOCK_SIZE = 256, 512, 16
NUM_STEPS, WINDOW = 3000, 500
TARGET_US, GOAL_US = 500, 300


def run() -> dict[str, list[float]]:
    """Microseconds of each decoding step, by phase."""
    total = PROMPT + NUM_STEPS + WINDOW
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=NUM_SEQS * (total // BLOCK_SIZE + 1),
            block_size=BLOCK_SIZE,
            max_num_batched_tokens=NUM_SEQS * PROMPT,
            max_num_seqs=NUM_SEQS,
        )
    )
    params = SamplingParams(max_tokens=total - PROMPT)
    for k in range(NUM_SEQS):
        # Lengths differ, so that every step fills the last block of NUM_SEQS / BLOCK_SIZE of them.
        prompt = tuple(range(k * 1000, k * 1000 + PROMPT - k % BLOCK_SIZE))
        scheduler.add(Request(f"req-{k}", prompt, params, arrival=k, max_total_tokens=total))
    history = History(max_records=NUM_STEPS)
    times: dict[str, list[float]] = {"schedule": [], "commit": [], "seal": []}
    clock = time.perf_counter
    token = 0
    for step in range(NUM_STEPS + 1):
        start = clock()
        plan = scheduler.schedule()
        scheduled = clock()
        output = StepOutput()
        for seq, _ in plan.scheduled:
            token += 1
            output.samples[seq.seq_id] = [token % 50_000]
        executed = clock()
        scheduler.commit(output)
        committed = clock()
        history.append(scheduler.seal(Phases()))
        sealed = clock()
        if step:  # the first computes the prompts
            times["schedule"].append(1e6 * (scheduled - start))
            times["commit"].append(1e6 * (committed - executed))
            times["seal"].append(1e6 * (sealed - committed))
    return times


def medians(times: dict[str, list[float]], window: slice) -> dict[str, float]:
    result = {phase: statistics.median(values[window]) for phase, values in times.items()}
    whole = [sum(step) for step in zip(*(values[window] for values in times.values()), strict=True)]
    return {k: round(v, 1) for k, v in (result | {"step": statistics.median(whole)}).items()}


def main() -> int:
    times = run()
    first, last = medians(times, slice(WINDOW)), medians(times, slice(-WINDOW, None))
    result = {
        "question": __doc__.splitlines()[0] if __doc__ else "",
        "command": "python benchmarks/scheduler_step.py",
        "num_running_sequences": NUM_SEQS,
        "num_steps": NUM_STEPS,
        f"median_us_first_{WINDOW}_steps": first,
        f"median_us_last_{WINDOW}_steps": last,
        "us_per_sequence": round(last["step"] / NUM_SEQS, 2),
        "target_us": TARGET_US,
        "goal_us": GOAL_US,
        "python": platform.python_version(),
        "machine": cpu_name(),
    }
    print(json.dumps(result, indent=2))
    path = Path(__file__).parent / "results" / "scheduler_step.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if last["step"] <= TARGET_US else 1


def cpu_name() -> str:
    try:
        lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
        return next(x.partition(":")[2].strip() for x in lines.splitlines() if "Model name" in x)
    except (OSError, subprocess.CalledProcessError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
