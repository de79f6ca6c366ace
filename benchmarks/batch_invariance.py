"""What does `batch_invariant=True` cost?

Two engines of one model, with the mode and without, take turns in one process: in each round both
continue the same prompts (decode: output tokens a second after every sequence has its first) and
compute the same new ones (prefill: prompt tokens a second until the last has its first token), each
going first in every other round. The ratio is of medians, with the mode over without.

On a CPU the model is SmolLM2-135M, in float32 and in 4 bits. On a GPU it is one of random weights in
the shape of Qwen2.5-7B (Qwen2.5-1.5B where two of the former don't fit), in bfloat16 and in 4 bits.

    python benchmarks/batch_invariance.py [--device cpu|cuda] [--rounds 5] [--output FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout is measured, installed or not

import torch  # noqa: E402

from nbengine import Engine, SamplingParams  # noqa: E402
from nbengine.execution import runner  # noqa: E402
from nbengine.models.config import ModelConfig  # noqa: E402

RESULTS = Path(__file__).parent / "results"
MODES = {"normal": False, "batch_invariant": True}


@dataclass(frozen=True, slots=True)
class Work:
    """A decode of `num_tokens` tokens after each prompt, or (of 1) a prefill."""

    num_prompts: int
    prompt_tokens: int
    num_tokens: int = 1

    def __str__(self) -> str:
        kind = "prefill" if self.num_tokens == 1 else "decode"
        return f"{kind} {self.num_prompts} x {self.prompt_tokens:,}"


ON_CPU = (Work(1, 32, 48), Work(8, 32, 48), Work(1, 128), Work(1, 512), Work(1, 1500), Work(8, 128))
ON_GPU = (
    *(Work(n, 512, 48) for n in (1, 8, 64, 256)),
    Work(1, 16_000, 48),
    *(Work(1, n) for n in (128, 2048, 16_000)),
    Work(16, 128),
)

QWEN2_5 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
SMALLER = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
LARGE_MODEL_BYTES = 60 << 30
"""Free on a device that takes the larger model twice."""


class RandomWeights:
    """A checkpoint of normally distributed weights, drawn where they are needed."""

    def __init__(self, config: ModelConfig, device: str) -> None:
        self.config, self.device = config, device
        self.shapes: Mapping[str, tuple[int, ...]] = config.tensor_shapes()

    def tensor(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        generator = torch.Generator(self.device).manual_seed(sum(name.encode()))
        values = torch.randn(shape, generator=generator, device=self.device, dtype=torch.bfloat16)
        return 1 + 0.1 * values if "norm" in name else values / shape[-1] ** 0.5

    def blocks(self, name: str) -> None:
        return None


def random_engine(raw: dict[str, Any], **settings: Any) -> Engine:
    """On a GPU, in bfloat16, of a model in Hugging Face's terms."""
    checkpoint = RandomWeights(ModelConfig.from_hf(raw, None), "cuda")
    opened = runner.open_checkpoint
    runner.open_checkpoint = lambda path: checkpoint  # type: ignore[assignment,return-value]
    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(raw))
            return Engine(
                model=folder,
                device="cuda",
                dtype="bfloat16",
                kernels="cuda",
                skip_tokenizer_init=True,
                **settings,
            )
    finally:
        runner.open_checkpoint = opened


def engines_on_cpu(quantization: str | None) -> dict[str, Engine]:
    settings: dict[str, Any] = {"max_model_len": 2048, "num_gpu_blocks_override": 256}
    return {
        name: Engine(
            model="smollm2-135m",
            device="cpu",
            quantization=quantization,
            batch_invariant=mode,
            **settings,
        )
        for name, mode in MODES.items()
    }


def engines_on_gpu(quantization: str | None) -> tuple[dict[str, Engine], str]:
    large = torch.cuda.mem_get_info()[0] > LARGE_MODEL_BYTES
    raw = QWEN2_5 if large else QWEN2_5 | SMALLER
    engines = {
        name: random_engine(
            raw,
            quantization=quantization,
            batch_invariant=mode,
            max_model_len=16_384,
            num_gpu_blocks_override=12_000,
            gpu_memory_utilization=0.45,
        )
        for name, mode in MODES.items()
    }
    return engines, f"random weights, {raw['hidden_size']} x {raw['num_hidden_layers']} layers"


def tokens_per_second(engine: Engine, work: Work, prompts: list[list[int]]) -> float:
    params = SamplingParams(temperature=0, max_tokens=work.num_tokens, ignore_eos=True)
    names = [engine.add_request(prompt, params) for prompt in prompts]
    engine.run()
    metrics = [engine.output(name).metrics for name in names]
    first = max(m.first_token_time for m in metrics if m.first_token_time is not None)
    if work.num_tokens == 1:
        return len(prompts) * work.prompt_tokens / (first - min(m.arrival_time for m in metrics))
    last = max(m.last_token_time for m in metrics if m.last_token_time is not None)
    return len(prompts) * (work.num_tokens - 1) / (last - first)


def prompts_of(work: Work, seed: int) -> list[list[int]]:
    """Those of a decode are the same in every round, and found in the prefix cache."""
    draw = random.Random(seed if work.num_tokens == 1 else 0)
    return [draw.choices(range(100, 40_000), k=work.prompt_tokens) for _ in range(work.num_prompts)]


def measure(
    engines: dict[str, Engine], works: tuple[Work, ...], rounds: int
) -> Iterator[dict[str, Any]]:
    for work in works:
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for round_index in range(rounds + 1):  # the first only warms up
            order = list(engines) if round_index % 2 else list(reversed(engines))
            for name in order:
                rate = tokens_per_second(engines[name], work, prompts_of(work, round_index))
                if round_index:
                    rates[name].append(rate)
        medians = {name: statistics.median(samples) for name, samples in rates.items()}
        ratio = medians["batch_invariant"] / medians["normal"]
        print(f"  {work!s:24}" + "".join(f"{x:12,.1f}" for x in medians.values()) + f"{ratio:8.2f}")
        yield {
            "work": str(work),
            "tokens_per_second": {
                name: {"median": round(medians[name], 1), "samples": [round(x, 1) for x in samples]}
                for name, samples in rates.items()
            },
            "ratio": round(ratio, 3),
        }


def machine(device: str) -> dict[str, Any]:
    about = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return {"device": properties.name, "memory_gib": properties.total_memory >> 30} | about
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    return {
        "device": cpu or platform.processor(),
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg(),
    } | about


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        torch.set_num_threads(min(2, os.cpu_count() or 1))
    report: dict[str, Any] = {
        "question": (__doc__ or "").splitlines()[0],
        "command": " ".join(["python benchmarks/batch_invariance.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(device),
        "rounds": args.rounds,
        "results": {},
    }
    for quantization in (None, "int4"):
        if device == "cpu":
            engines, model = engines_on_cpu(quantization), "smollm2-135m"
        else:
            engines, model = engines_on_gpu(quantization)
        title = f"{model}, {quantization or ('float32' if device == 'cpu' else 'bfloat16')}"
        print(f"{title}\n  {'tokens a second':24}{'normal':>12}{'invariant':>12}{'ratio':>8}")
        works = ON_CPU if device == "cpu" else ON_GPU
        report["results"][title] = list(measure(engines, works, args.rounds))
        for engine in engines.values():
            engine.close()
    name = re.sub(r"[^a-z0-9]+", "_", report["machine"]["device"].lower()).strip("_")
    path = args.output or RESULTS / f"batch_invariance_{'cpu' if device == 'cpu' else name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
