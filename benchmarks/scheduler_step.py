"""How long do the scheduler's decisions take for 256 running sequences, and does it stay flat?

Schedules, commits and seals steps of 256 decoding sequences (prompts of 512 tokens, blocks of 16,
prefix caching on, a history with keyframes within its usual bounds) and no model at all: a run's first 1,000
steps and those after 3,000. Then the old run alternates with a young one, so that what else the
machine does meets both alike, for the ratio. Wall time on one thread, in this process.

    python benchmarks/scheduler_step.py
"""

from __future__ import annotations

import json
import os
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
from nbengine.core.state import Keyframe

NUM_SEQS, PROMPT, BLOCK_SIZE = 256, 512, 16
AGE, MEASURED = 3000, 1000
TARGET_US, GOAL_US = 500, 300


class Decoding:
    """A scheduler with NUM_SEQS sequences whose prompts are computed, and its history."""

    def __init__(self) -> None:
        output = AGE + 2 * MEASURED + 1
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=NUM_SEQS * ((PROMPT + output) // BLOCK_SIZE + 1),
                block_size=BLOCK_SIZE,
                max_num_batched_tokens=NUM_SEQS * PROMPT,
                max_num_seqs=NUM_SEQS,
            )
        )
        self.history = History()
        self.next_token = 0
        self.times: list[tuple[float, float, float]] = []
        """Microseconds that schedule, commit and seal took, step by step."""
        for k in range(NUM_SEQS):
            # Of different lengths: every step fills the last block of one sequence in BLOCK_SIZE.
            prompt = tuple(range(k * 1000, k * 1000 + PROMPT - k % BLOCK_SIZE))
            params = SamplingParams(max_tokens=output)
            self.scheduler.add(
                Request(f"req-{k}", prompt, params, k, max_total_tokens=PROMPT + output)
            )
        self.step()

    def step(self) -> None:
        clock = time.perf_counter
        start = clock()
        plan = self.scheduler.schedule()
        scheduled = clock()
        output = StepOutput()
        for seq, _ in plan.scheduled:
            self.next_token += 1
            output.samples[seq.seq_id] = [self.next_token % 50_000]
        executed = clock()
        self.scheduler.commit(output)
        committed = clock()
        self.history.append(self.scheduler.seal(Phases()))
        if self.history.wants_keyframe:
            self.history.keep(Keyframe(self.scheduler))
        sealed = clock()
        self.times.append(
            (1e6 * (scheduled - start), 1e6 * (committed - executed), 1e6 * (sealed - committed))
        )

    def microseconds(self) -> dict[str, float]:
        """Of the last MEASURED steps: the median by phase and in all, and the quietest of 20."""
        times = self.times[-MEASURED:]
        phases = dict(zip(("schedule", "commit", "seal"), zip(*times, strict=True), strict=True))
        whole = [sum(step) for step in times]
        medians = {name: statistics.median(values) for name, values in phases.items()}
        medians["step"] = statistics.median(whole)
        medians["step_quietest_20th"] = statistics.quantiles(whole, n=20)[0]
        return {name: round(value, 1) for name, value in medians.items()}


def main() -> int:
    run = Decoding()
    for _ in range(MEASURED):
        run.step()
    first = run.microseconds()
    for _ in range(AGE):
        run.step()
    aged = run.microseconds()
    young = Decoding()
    for _ in range(MEASURED):
        run.step()
        young.step()
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "command": "python benchmarks/scheduler_step.py",
        "num_running_sequences": NUM_SEQS,
        "median_us_of_a_step": first,
        f"median_us_after_{AGE}_steps": aged,
        "old_to_young": round(run.microseconds()["step"] / young.microseconds()["step"], 2),
        "us_per_sequence": round(aged["step"] / NUM_SEQS, 2),
        "target_us": TARGET_US,
        "goal_us": GOAL_US,
        "python": platform.python_version(),
        "machine": cpu_name(),
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(result, indent=2))
    path = Path(__file__).parent / "results" / "scheduler_step.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if aged["step"] <= TARGET_US else 1


def cpu_name() -> str:
    try:
        lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
        return next(x.partition(":")[2].strip() for x in lines.splitlines() if "Model name" in x)
    except (OSError, subprocess.CalledProcessError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
