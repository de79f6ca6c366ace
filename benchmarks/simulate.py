"""How many steps a second does `simulate` take over a trace of 1,000 requests?

No model and nothing else running in this process: a synthetic trace (Poisson arrivals, log-normal
lengths, eight shared beginnings of 128 tokens), once so tight that sequences are preempted all the
time and once so wide that a step computes 64 sequences; then the rest of the wide run again, as a
fork from its middle. The best of three runs each, wall time on one thread.

    python benchmarks/simulate.py
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

from scheduler_step import cpu_name

from nbengine.core.simulate import Simulated, fork, simulate
from nbengine.core.trace import Trace

TRACE = Trace.synthetic(1000, rate=0.5, num_prefixes=8, output_tokens=80, seed=1)
TARGET_STEPS_PER_SECOND = 1000


def measured(run: Callable[[], Simulated]) -> dict[str, float]:
    """The best of three."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        simulated = run()
        seconds.append(time.perf_counter() - began)
    records = simulated.records
    return {
        "steps": len(records),
        "steps_per_second": round(len(records) / min(seconds)),
        "sequences_computed_a_step": round(
            sum(len(r.scheduled) for r in records) / len(records), 1
        ),
        "preemptions": sum(len(r.preempted) for r in records),
        "sequences_computed_a_second": round(sum(len(r.scheduled) for r in records) / min(seconds)),
        "seconds": round(min(seconds), 2),
    }


def main() -> int:
    wide = simulate(TRACE, num_blocks=4000)
    middle = len(wide) // 2
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "command": "python benchmarks/simulate.py",
        "trace": repr(TRACE),
        "tight_400_blocks": measured(lambda: simulate(TRACE, num_blocks=400)),
        "wide_4000_blocks": measured(lambda: simulate(TRACE, num_blocks=4000)),
        "fork_from_the_middle": measured(lambda: fork(wide.history, middle, wide.config, "sjf")),
        "target_steps_per_second": TARGET_STEPS_PER_SECOND,
        "python": platform.python_version(),
        "machine": cpu_name(),
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(result, indent=2))
    path = Path(__file__).parent / "results" / "simulate.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["wide_4000_blocks"]["steps_per_second"] >= TARGET_STEPS_PER_SECOND else 1


if __name__ == "__main__":
    sys.exit(main())
