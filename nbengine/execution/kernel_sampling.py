"""A step's tokens by kernels: the logits stay where they are, and the step waits once.

`Sampler` calls `sample_by_kernels` where it has kernels. Parameters go up in one copy, and ids,
health and log-probabilities come back in one, which is where the step waits for the device. A batch
that is greedy and asks for nothing else sends nothing up. Penalties are written into the logits and
taken out again, so that no copy of the logits is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nbengine.core.logprobs import Logprob
from nbengine.execution.sample_row import LogitChanges, SamplerOutput, SampleRow, flat_places
from nbengine.kernels.ops.penalties import BANNED, ONE_IN_OUTPUT, SEEN
from nbengine.kernels.table import Kernels

_Arrays = dict[str, npt.NDArray[np.int64 | np.float64]]

MAX_LOGPROBS = 64
"""More than this many log-probabilities a token are left to torch."""


def sample_by_kernels(
    kernels: Kernels, logits: Tensor, rows: Sequence[SampleRow]
) -> tuple[SamplerOutput, list[int]]:
    """Sample every row of the logits `[R, V]`, whose width is the vocabulary's. They are changed in
    between and left as they were.

    Returns the output, and the rows that still lack the log-probabilities they ask for: those of
    more than `MAX_LOGPROBS` tokens.
    """
    changes = LogitChanges.of(rows)
    is_greedy = not changes.allowed and all(
        row.params.temperature == 0.0 and len(row.sample_indices) == 1 for row in rows
    )
    starts = list(accumulate((len(row.sample_indices) for row in rows), initial=0))
    scored, left = _scored(rows, logits.shape[1])

    entries = _entries(changes, rows, logits.shape[1]) if changes.of_single_logits else {}
    parameters = {} if is_greedy else _parameters(changes, rows, starts)
    asked = [(i, at) for i in scored for at in range(starts[i], starts[i + 1])]
    questions = {"questions": np.array(asked, np.int64).T} if asked else {}
    sent = _sent(entries | parameters | questions, logits.device)

    shapes: _Shapes = {
        "ids": (torch.int64, (starts[-1],)),
        "largest": (torch.float32, (len(rows),)),
    }
    if asked:
        top = max(scored.values())
        shapes |= {
            "chosen": (torch.float32, (len(asked),)),
            "rank": (torch.int64, (len(asked),)),
            "top_ids": (torch.int64, (len(asked), top)),
            "top_logprobs": (torch.float32, (len(asked), top)),
        }
    results = torch.empty(_num_words(shapes), dtype=torch.int64, device=logits.device)
    found = _views(results, shapes)
    ids, largest = found.pop("ids"), found.pop("largest")

    if entries:
        saved = logits.new_empty(len(sent["place"]))
        kernels.penalties(logits=logits, saved=saved, **{name: sent[name] for name in entries})
    if is_greedy:
        kernels.greedy(out_ids=ids, largest=largest, logits=logits)
    else:
        given = {name: sent[name] for name in parameters}
        kernels.sample(out_ids=ids, largest=largest, logits=logits, **given)
    if entries:
        kernels.restore_logits(logits=logits, saved=saved, place=sent["place"])
    if asked:
        row_of, sample_of = sent["questions"]
        kernels.logprobs(logits=logits, rows=row_of, token_ids=ids[sample_of], **found)

    back = {name: tensor.tolist() for name, tensor in _views(results.cpu(), shapes).items()}
    return _output(rows, starts, scored, back), left


def _scored(rows: Sequence[SampleRow], vocab_size: int) -> tuple[dict[int, int], list[int]]:
    """Of the rows that ask for log-probabilities, of how many tokens; and those left to torch."""
    scored, left = {}, []
    for index, row in enumerate(rows):
        asked = row.params.logprobs
        if asked is None:
            continue
        k = vocab_size if asked == -1 else min(asked, vocab_size)
        if k > MAX_LOGPROBS:
            left.append(index)
        else:
            scored[index] = k
    return scored, left


def _output(
    rows: Sequence[SampleRow], starts: list[int], scored: dict[int, int], back: dict[str, Any]
) -> SamplerOutput:
    """What came back, row by row."""
    output = SamplerOutput(
        [back["ids"][start:end] for start, end in pairwise(starts)], [None] * len(rows)
    )
    for index, value in enumerate(back["largest"]):
        if not math.isfinite(value):
            output.fail(index, rows[index], value)
    start = 0
    for index, k in scored.items():
        of_row = range(start, start := start + starts[index + 1] - starts[index])
        if index in output.errors:
            continue
        if any(math.isnan(back["chosen"][q]) for q in of_row):
            output.fail(index, rows[index], math.nan)
            continue
        output.logprobs[index] = [
            _entry(
                token_id,
                Logprob(back["chosen"][q], back["rank"][q]),
                back["top_ids"][q][:k],
                back["top_logprobs"][q][:k],
            )
            for q, token_id in zip(of_row, output.token_ids[index], strict=True)
        ]
    return output


def _entry(
    token_id: int, chosen: Logprob, top_ids: list[int], top_logprobs: list[float]
) -> dict[int, Logprob]:
    """The sampled token, then the most likely ones; equally likely tokens share a rank."""
    entry = {token_id: chosen}
    rank, previous = 0, math.inf
    for place, (other, logprob) in enumerate(zip(top_ids, top_logprobs, strict=True), start=1):
        if logprob < previous:
            rank, previous = place, logprob
        entry.setdefault(other, Logprob(logprob, rank))
    return entry


def _entries(changes: LogitChanges, rows: Sequence[SampleRow], vocab_size: int) -> _Arrays:
    """Arguments of `penalties`: each changed place once, with all that is asked of it."""
    banned, _ = flat_places(changes.banned, vocab_size)
    biases = [(index, rows[index].params.logit_bias or {}) for index in changes.biased]
    biased, inside = flat_places(biases, vocab_size)
    values = np.fromiter(chain.from_iterable(b.values() for _, b in biases), np.float64)[inside]
    seen, _ = flat_places(((i, rows[i].tokens) for i in changes.repeated), vocab_size)
    output, _ = flat_places(
        ((i, rows[i].tokens[rows[i].num_prompt_tokens :]) for i in changes.counted), vocab_size
    )
    # One sort of (place, kind), which NumPy does 10 times faster than `unique` with its inverse.
    parts = (banned, biased, seen, output)
    keys = np.concatenate([part << 2 | kind for kind, part in enumerate(parts)])
    keys, counts = np.unique(keys, return_counts=True)
    counts[keys & 3 != 3] = 1  # banned or seen twice is once
    firsts = np.flatnonzero(np.diff(keys >> 2, prepend=-1))
    place = keys[firsts] >> 2
    of_kind = np.array([BANNED, 0, SEEN, ONE_IN_OUTPUT])
    marks = np.add.reduceat(of_kind[keys & 3] * counts, firsts) if len(firsts) else firsts
    bias = np.zeros(len(place))
    bias[np.searchsorted(place, biased)] = values
    return {
        "place": place,
        "bias": bias,
        "marks": marks,
        "repetition": np.array([row.params.repetition_penalty for row in rows]),
        "frequency": np.array([row.params.frequency_penalty for row in rows]),
        "presence": np.array([row.params.presence_penalty for row in rows]),
    }


def _parameters(changes: LogitChanges, rows: Sequence[SampleRow], starts: list[int]) -> _Arrays:
    """Arguments of `sample`, but for the logits and the outputs."""
    allowed: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)] * len(rows)
    for index, ids in changes.allowed:
        allowed[index] = np.unique(np.fromiter(ids, np.int64))
    seeds = np.array([row.seed & 0xFFFFFFFFFFFFFFFF for row in rows], np.uint64)
    return {
        "temperature": np.array([row.params.temperature for row in rows]),
        "min_p": np.array([row.params.min_p for row in rows]),
        "top_p": np.array([row.params.top_p for row in rows]),
        "top_k": np.array([row.params.top_k for row in rows], np.int64),
        "seed": seeds.view(np.int64),
        "position": np.array([len(row.tokens) for row in rows], np.int64),
        "allowed_offsets": np.cumsum([0, *map(len, allowed)]),
        "allowed_ids": np.concatenate(allowed),
        "sample_offsets": np.array(starts, np.int64),
        "sample_indices": np.fromiter(
            chain.from_iterable(row.sample_indices for row in rows), np.int64
        ),
    }


# Arrays of 8-byte numbers, and of float32, side by side in one buffer of 8-byte words.

_Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def _num_words(shapes: _Shapes) -> int:
    return sum(-(-math.prod(shape) * dtype.itemsize // 8) for dtype, shape in shapes.values())


def _views(buffer: Tensor, shapes: _Shapes) -> dict[str, Tensor]:
    views, start = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = math.prod(shape)
        words = -(-size * dtype.itemsize // 8)
        views[name] = buffer[start : start + words].view(dtype)[:size].view(shape)
        start += words
    return views


def _sent(arrays: _Arrays, device: torch.device) -> dict[str, Tensor]:
    """The arrays on the device, by one copy that the host does not wait for."""
    if not arrays:
        return {}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    shapes: _Shapes = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    buffer = torch.empty(_num_words(shapes), dtype=torch.int64, pin_memory=device.type == "cuda")
    for view, tensor in zip(_views(buffer, shapes).values(), tensors.values(), strict=True):
        view.copy_(tensor)
    return _views(buffer.to(device, non_blocking=True), shapes)
