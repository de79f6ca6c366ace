"""How fast are SmolLM2-135M's output tokens on this CPU, beside transformers and llama.cpp?

Every engine runs in its own process, loaded once, and they take turns: in each round each of them
continues the same prompts by the same number of tokens, greedily and past any end-of-sequence, at
batch 1 and at batch 8, while the others wait. A sample is the decode phase alone: tokens after the
first of each sequence, over the time from the moment every sequence has its first token to the
last token. For nbengine that includes all of the engine: scheduling, sampling, detokenising.
transformers runs the file dequantised to float32, prompts padded on the left; llama.cpp runs the
file itself, at batch 1, in another interpreter if llama-cpp-python is not installed in this one.

    python benchmarks/cpu_decode.py [--llama-python /path/to/python] [--rounds 7]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
BATCHES = (1, 8)
RESULTS = Path(__file__).parent / "results" / "cpu_decode.json"

# What has to hold, as (engine, batch, times, other engine). "best" is the better of int8 and int4.
TARGETS = [
    ("nbengine float32", 8, 1.6, "transformers"),
    ("best", 8, 6.0, "transformers"),
    ("best", 1, 6.0, "transformers"),
    ("best", 1, 1.0, "llama.cpp"),
]

PROMPTS = [
    "Explain in a few sentences why the sky is blue.",
    "Write a short letter to a friend who has just moved to a city by the sea.",
    "List five things that a careful cook does before lighting the stove, and say why.",
    "What is a prime number? Give three examples.",
    "Tell a story about a lighthouse keeper who collects clocks, in the manner of a fairy tale, "
    "with a beginning, a turn in the middle, and an ending that nobody expects.",
    "How does a bicycle stay upright?",
    "Describe the water cycle to a child of ten, without using the word evaporation.",
    "Compare trains and aeroplanes for a journey of five hundred kilometres: time, cost, comfort.",
]

Generate = Callable[[list[list[int]], int], float]
"""(prompts, tokens each) -> seconds of the decode phase."""


def load_nbengine(quantization: str | None) -> tuple[Generate, str]:
    from nbengine import LLM, SamplingParams, __version__

    llm = LLM(MODEL, quantization=quantization, max_model_len=1024, max_num_seqs=max(BATCHES))

    def generate(prompts: list[list[int]], num_tokens: int) -> float:
        llm.engine.reset_prefix_cache()
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            sampling_params=SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True),
            use_tqdm=False,
        )
        assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)
        metrics = [output.metrics for output in outputs]
        last = max(m.last_token_time for m in metrics)
        return last - max(m.first_token_time for m in metrics)

    return generate, f"nbengine {__version__}"


def load_transformers() -> tuple[Generate, str]:
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteriaList

    from nbengine.models.registry import open_checkpoint, resolve_model

    checkpoint = open_checkpoint(resolve_model(MODEL))
    config = checkpoint.config
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    ).eval()
    tensors = {name: checkpoint.tensor(name).float() for name in checkpoint.shapes}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    model.tie_weights()
    times: list[float] = []

    def note_time(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)

    @torch.inference_mode()
    def generate(prompts: list[list[int]], num_tokens: int) -> float:
        times.clear()
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([note_time]),
        )
        assert out.shape[1] == width + num_tokens
        return times[-1] - times[0]

    return generate, f"transformers {transformers.__version__}"


def load_llama_cpp(threads: int, model_file: str) -> tuple[Generate, str]:
    import llama_cpp

    model = llama_cpp.Llama(
        model_file, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def generate(prompts: list[list[int]], num_tokens: int) -> float:
        (prompt,) = prompts
        model.reset()
        model.eval(prompt)
        token = model.sample(temp=0.0)
        began = time.perf_counter()
        for _ in range(num_tokens - 1):
            model.eval([token])
            token = model.sample(temp=0.0)
        return time.perf_counter() - began

    return generate, f"llama-cpp-python {llama_cpp.__version__}"


def serve(engine: str, threads: int, model_file: str) -> None:
    """The other side of `Worker`: one line of JSON in, one out."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    if engine == "llama.cpp":
        generate, version = load_llama_cpp(threads, model_file)
    else:
        import torch

        torch.set_num_threads(threads)
        if engine == "transformers":
            generate, version = load_transformers()
        else:
            kind = engine.removeprefix("nbengine ")
            generate, version = load_nbengine(None if kind == "float32" else kind)
    print(json.dumps(version), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(generate(**json.loads(line))), file=replies, flush=True)


class Worker:
    """One engine in a process of its own."""

    def __init__(self, engine: str, python: str, threads: int, model_file: str) -> None:
        command = [python, __file__, "--worker", engine, "--threads", str(threads), model_file]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        self.version = self._reply()

    def decode_seconds(self, prompts: list[list[int]], num_tokens: int) -> float:
        assert self.process.stdin is not None
        request = json.dumps({"prompts": prompts, "num_tokens": num_tokens})
        print(request, file=self.process.stdin, flush=True)
        return float(self._reply())

    def _reply(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended: {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def machine(threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    flags = next((x.split(":")[1].split() for x in lines if x.startswith("flags")), [])
    useful = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    return {
        "cpu": model or platform.processor(),
        "instructions": [flag for flag in useful if flag in flags],
        "cpus": os.cpu_count(),
        "threads": threads,
        "platform": platform.platform(),
        "load_average_before": os.getloadavg(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-python", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("model_file", nargs="?", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(args.worker, args.threads, args.model_file)
        return

    from nbengine.models.registry import resolve_model
    from nbengine.tokenizer import load_tokenizer

    model_file = resolve_model(MODEL)
    tokenizer = load_tokenizer(model_file)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]).replace(str(args.llama_python), "PYTHON"),
        "machine": machine(args.threads),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "model": model_file.name,
        "prompt_lengths": [len(prompt) for prompt in prompts],
        "num_tokens": args.num_tokens,
    }
    engines = ["transformers", "nbengine float32", "nbengine int8", "nbengine int4"]
    pythons = dict.fromkeys(engines, sys.executable)
    if args.llama_python or _has_llama_cpp():
        pythons["llama.cpp"] = args.llama_python or sys.executable
    workers = {
        engine: Worker(engine, python, args.threads, str(model_file))
        for engine, python in pythons.items()
    }
    report["versions"] |= {engine: worker.version for engine, worker in workers.items()}

    rates: dict[str, dict[int, list[float]]] = {e: {b: [] for b in BATCHES} for e in workers}
    for round_index in range(args.rounds + 1):  # the first only warms up
        for batch in BATCHES:
            for engine, worker in workers.items():
                if engine == "llama.cpp" and batch > 1:
                    continue
                seconds = worker.decode_seconds(prompts[:batch], args.num_tokens)
                if round_index > 0:
                    rates[engine][batch].append(batch * (args.num_tokens - 1) / seconds)
        print(f"round {round_index} of {args.rounds}", file=sys.stderr)
    for worker in workers.values():
        worker.close()

    medians = {e: {b: statistics.median(x) for b, x in r.items() if x} for e, r in rates.items()}
    best = max(("nbengine int8", "nbengine int4"), key=lambda e: min(medians[e].values()))
    report["tokens_per_second"] = {
        engine: {
            f"batch {batch}": {"median": round(medians[engine][batch], 1),
                               "samples": [round(x, 1) for x in samples]}
            for batch, samples in by_batch.items()
            if samples
        }
        for engine, by_batch in rates.items()
    }  # fmt: skip
    report["targets"] = []
    for engine, batch, wanted, other in TARGETS:
        engine = best if engine == "best" else engine
        if other not in medians:
            continue
        ratio = medians[engine][batch] / medians[other][batch]
        verdict = {"engine": engine, "over": other, "batch": batch, "wanted": wanted}
        report["targets"].append(verdict | {"measured": round(ratio, 2), "met": ratio >= wanted})

    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{'output tokens/s (medians)':28}" + "".join(f"{f'batch {b}':>10}" for b in BATCHES))
    for engine, by_batch in medians.items():
        cells = (f"{by_batch[b]:10.1f}" if b in by_batch else f"{'':>10}" for b in BATCHES)
        print(f"{engine:28}" + "".join(cells))
    for t in report["targets"]:
        print(
            f"batch {t['batch']}: {t['engine']} is {t['measured']}x {t['over']} "
            f"(wanted {t['wanted']}x){'' if t['met'] else '  MISSED'}"
        )


def _has_llama_cpp() -> bool:
    try:
        importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
