"""What does quantisation cost SmolLM2-135M in perplexity, against the file as float32?

exp of the mean negative log-likelihood that the model gives each token of a fixed text (from
Lewis Carroll, Alice's Adventures in Wonderland, 1865), read in windows of 512 tokens of which each
token after the window's first is scored. Computed through the engine, as `prompt_logprobs`.

    python benchmarks/perplexity.py
"""

from __future__ import annotations

import json
import math
import platform
import sys
from pathlib import Path

from nbengine import LLM, SamplingParams

MODEL = "smollm2-135m"
TEXT = Path(__file__).with_name("perplexity.txt")
RESULTS = Path(__file__).parent / "results" / "perplexity.json"
WINDOW = 512
LIMIT_PERCENT = 2.0
"""Perplexity may rise by this much at most."""


def perplexity(quantization: str | None) -> tuple[float, int]:
    """(perplexity, tokens scored)."""
    with LLM(MODEL, quantization=quantization, max_model_len=2 * WINDOW) as llm:
        tokens = llm.get_tokenizer().encode(TEXT.read_text())
        windows = [tokens[at : at + WINDOW] for at in range(0, len(tokens), WINDOW)]
        outputs = llm.generate(
            [{"prompt_token_ids": window} for window in windows],
            sampling_params=SamplingParams(max_tokens=1, prompt_logprobs=0),
            use_tqdm=False,
        )
    scores = [
        entry[token].logprob
        for output in outputs
        for token, entry in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        if entry is not None
    ]
    return math.exp(-math.fsum(scores) / len(scores)), len(scores)


def main() -> None:
    report: dict[str, object] = {
        "command": " ".join(["python", *sys.argv]),
        "model": MODEL,
        "python": platform.python_version(),
        "text": TEXT.name,
        "window": WINDOW,
    }
    reference, report["tokens_scored"] = perplexity(None)
    report["float32"] = round(reference, 4)
    print(f"\n{'float32':8} {reference:8.4f}")
    for quantization in ("int8", "int4"):
        found, _ = perplexity(quantization)
        change = 100 * (found / reference - 1)
        met = change <= LIMIT_PERCENT
        report[quantization] = {
            "perplexity": round(found, 4),
            "change_percent": round(change, 3),
            "limit_percent": LIMIT_PERCENT,
            "met": met,
        }
        print(f"{quantization:8} {found:8.4f}  {change:+.3f}%{'' if met else '  MISSED'}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
