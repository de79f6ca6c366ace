"""From a step's logits to its tokens, for all rows at once.

The runner calls `Sampler.sample` once a step with one row of logits for each sequence whose last
known token was computed. The moves, in vLLM's order, each skipped when no row asks for it:

1. log-probabilities, of the logits as the model gave them;
2. masks: `allowed_token_ids`, `bad_words`, `min_tokens`; then `logit_bias`;
3. `repetition_penalty` (prompt and output), `frequency_penalty`, `presence_penalty` (output);
4. the most likely token, which is the answer of greedy rows and the health check of all;
5. `temperature`, `min_p`, `top_k`, `top_p`, and one uniform number a sample through the inverse of
   the cumulative distribution of what is kept, in vocabulary order.

Two invariants. A row's result depends on that row alone: every reduction runs along one row, ties
are decided by value (tokens as likely as the last one kept are kept too), and randomness is
Philox(seed; sample index, position). And a row that can't be sampled fails alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from nbengine.core.logprobs import Logprob
from nbengine.errors import SamplingError
from nbengine.execution.kernel_sampling import sample_by_kernels
from nbengine.execution.philox import uniforms
from nbengine.execution.sample_row import LogitChanges, SamplerOutput, SampleRow, flat_places
from nbengine.kernels.table import Kernels

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_LOGPROB_ROWS = 64
"""Rows whose log-probabilities are computed at a time, so that a long prompt's don't double the
memory of its logits."""


class Sampler:
    """Samples tokens with ids below `vocab_size` from logits on `device`: by `kernels` where they
    are given, else by torch. With `batch_invariant` a row's probabilities do not depend on the number
    of rows even in their last bit: torch on a GPU then gets one row at a time."""

    def __init__(
        self,
        vocab_size: int,
        device: torch.device | str,
        kernels: Kernels | None = None,
        *,
        batch_invariant: bool = False,
    ) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.kernels = kernels
        self._one_by_one = batch_invariant and kernels is None and self.device.type == "cuda"

    def sample(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> SamplerOutput:
        """Sample every row. `logits` is float32 [R, V] (for kernels, float16 or bfloat16 too) with V
        at least `vocab_size` (the rest is padding), and holds the same afterwards."""
        if logits.ndim != 2 or logits.shape[0] != len(rows) or logits.shape[1] < self.vocab_size:
            raise ValueError(
                f"logits have shape {list(logits.shape)}, but {len(rows)} rows over a vocabulary "
                f"of {self.vocab_size} are to be sampled"
            )
        if not rows:
            return SamplerOutput([], [])
        if self.kernels is not None:
            logits = logits[:, : self.vocab_size]
            output, left = sample_by_kernels(self.kernels, logits, rows)
            if left:
                _add_logprobs(output, _take_rows(logits, left), left, rows)
            return output
        if self._one_by_one and len(rows) > 1:
            return self._sample_one_by_one(logits, rows)
        raw = logits[:, : self.vocab_size].float()
        scores = self._masked_and_penalised(raw, rows)
        best_values, best_ids = _largest(scores)
        output = SamplerOutput(
            [
                [token_id] * len(row.sample_indices)
                for token_id, row in zip(best_ids, rows, strict=True)
            ],
            [None] * len(rows),
        )
        for index, value in enumerate(best_values):
            if not math.isfinite(value):
                output.fail(index, rows[index], value)

        random = [
            index
            for index, row in enumerate(rows)
            if row.params.temperature > 0 and index not in output.errors
        ]
        if random:
            largest = np.array([best_values[index] for index in random], dtype=np.float64)
            drawn = _draw(_take_rows(scores, random), largest, [rows[index] for index in random])
            for index, ids in zip(random, drawn, strict=True):
                output.token_ids[index] = ids

        wanted = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
        if wanted:
            _add_logprobs(output, _take_rows(raw, wanted), wanted, rows)
        return output

    def _sample_one_by_one(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> SamplerOutput:
        together = SamplerOutput([], [])
        for index, row in enumerate(rows):
            alone = self.sample(logits[index : index + 1].clone(), [row])
            together.token_ids += alone.token_ids
            together.logprobs += alone.logprobs
            if alone.errors:
                together.errors[index] = alone.errors[0]
        return together

    def _masked_and_penalised(self, raw: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
        """Moves 2 and 3. Returns `raw` itself where no row asks for any of them."""
        changes = LogitChanges.of(rows)
        if not (changes.allowed or changes.of_single_logits):
            return raw

        scores = raw.clone(memory_format=torch.contiguous_format)
        flat = scores.view(-1)  # a token of a row has the index row * vocab_size + id
        if changes.allowed:
            places, _ = self._places(changes.allowed)
            kept = flat[places]
            scores.index_fill_(
                0, torch.tensor([i for i, _ in changes.allowed], device=scores.device), -math.inf
            )
            flat[places] = kept
        if changes.banned:
            places, _ = self._places(changes.banned)
            flat[places] = -math.inf
        if changes.biased:
            biases = [(index, rows[index].params.logit_bias or {}) for index in changes.biased]
            places, inside = self._places(biases)
            values = np.fromiter(chain.from_iterable(b.values() for _, b in biases), np.float32)
            flat[places] += torch.from_numpy(values[inside]).to(flat.device)
        if changes.repeated:
            # A token that was seen twice is read and written twice, with the same result.
            places, _ = self._places((index, rows[index].tokens) for index in changes.repeated)
            penalty = self._of_row(places, rows, changes.repeated, "repetition_penalty")
            values_seen = flat[places]
            flat[places] = torch.where(
                values_seen > 0, values_seen / penalty, values_seen * penalty
            )
        if changes.counted:
            places, _ = self._places(
                (index, rows[index].tokens[rows[index].num_prompt_tokens :])
                for index in changes.counted
            )
            places, counts = places.unique(return_counts=True)
            flat[places] -= counts * self._of_row(
                places, rows, changes.counted, "frequency_penalty"
            )
            flat[places] -= self._of_row(places, rows, changes.counted, "presence_penalty")
        return scores

    def _places(
        self, ids_of_rows: Iterable[tuple[int, Iterable[int]]]
    ) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
        places, inside = flat_places(ids_of_rows, self.vocab_size)
        return torch.from_numpy(places).to(self.device), inside

    def _of_row(
        self, places: torch.Tensor, rows: Sequence[SampleRow], indices: list[int], name: str
    ) -> torch.Tensor:
        """For each flat index, the parameter `name` of the row it lies in."""
        values = torch.zeros(len(rows))
        values[indices] = torch.tensor([getattr(rows[index].params, name) for index in indices])
        return values.to(self.device)[places // self.vocab_size]


def top_logprobs(logits: torch.Tensor, k: int) -> list[list[tuple[int, float]]]:
    """The k most likely tokens of each row [R, V] and their log-probabilities, best first; of
    equally likely ones, the smaller id first. k may be -1 for the whole vocabulary."""
    width = logits.shape[1]
    k = width if k == -1 else min(k, width)
    result: list[list[tuple[int, float]]] = []
    for part in logits.split(_LOGPROB_ROWS):
        logprobs = _log_softmax(part)
        result += [
            list(zip(ids.tolist(), values.tolist(), strict=True))
            for ids, values in _best(logprobs, [k] * len(logprobs))
        ]
    return result


def beam_candidates(
    logits: torch.Tensor, k: int, temperature: float = 0.0
) -> list[list[tuple[int, float]]]:
    """The k best continuations of each beam [R, V] as (token id, log-probability), best first.
    `temperature` is that of `BeamSearchParams`: 0 leaves the model's probabilities as they are.

    Raises `SamplingError` when fewer than k tokens have a finite log-probability."""
    candidates = top_logprobs(logits / temperature if temperature > 0 else logits, k)
    for index, found in enumerate(candidates):
        if len(found) < k or not all(math.isfinite(logprob) for _, logprob in found):
            raise SamplingError(
                f"beam {index} has fewer than {k} continuations with a finite log-probability"
            )
    return candidates


def prompt_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], k: int
) -> list[dict[int, Logprob]]:
    """For each row [P, V] and the prompt token that followed it: that token's log-probability and
    those of the k most likely ones (-1 for all).

    Raises `SamplingError` when one is not a number."""
    result: list[dict[int, Logprob]] = []
    for start in range(0, len(token_ids), _LOGPROB_ROWS):
        logprobs = _log_softmax(logits[start : start + _LOGPROB_ROWS])
        chosen = token_ids[start : start + _LOGPROB_ROWS]
        result += _logprob_dicts(logprobs, range(len(chosen)), chosen, [k] * len(chosen))
    for index, (entry, token_id) in enumerate(zip(result, token_ids, strict=True)):
        if math.isnan(entry[token_id].logprob):
            raise SamplingError(f"the logits after prompt token {index} hold NaN or infinity")
    return result


# Move 5.


def _draw(scores: torch.Tensor, largest: Floats, rows: Sequence[SampleRow]) -> list[list[int]]:
    """Sampled ids for rows [R, V] whose largest scores are known and finite."""
    numbers = _uniforms(rows)
    chosen: Ints = np.zeros(numbers.shape, np.int64)
    width = scores.shape[1]
    filtered = [
        index
        for index, row in enumerate(rows)
        if row.params.top_p < 1.0 or row.params.min_p > 0.0 or 0 < row.params.top_k < width
    ]
    plain = sorted(set(range(len(rows))).difference(filtered))
    if filtered:
        ids, weights = _nucleus(
            _take_rows(scores, filtered), largest[filtered], [rows[index] for index in filtered]
        )
        places = _invert(torch.from_numpy(weights), numbers[filtered])
        chosen[filtered] = np.take_along_axis(ids, places, axis=1)
    if plain:
        probabilities = _softmax(
            _take_rows(scores, plain), largest[plain], _temperatures(rows)[plain]
        )
        chosen[plain] = _invert(probabilities, numbers[plain])
    drawn: list[list[int]] = chosen.tolist()
    return [ids[: len(row.sample_indices)] for ids, row in zip(drawn, rows, strict=True)]


def _uniforms(rows: Sequence[SampleRow]) -> Floats:
    """[R, M] with the row's i-th sample's number at column i; M is the most samples of a row."""
    samples = [(row.seed, index, len(row.tokens)) for row in rows for index in row.sample_indices]
    counts = np.array([len(row.sample_indices) for row in rows])
    numbers = np.zeros((len(rows), counts.max()))
    numbers[np.arange(counts.max()) < counts[:, None]] = uniforms(*zip(*samples, strict=True))
    return numbers


def _temperatures(rows: Sequence[SampleRow]) -> Floats:
    return np.array([row.params.temperature for row in rows])


def _nucleus(
    scores: torch.Tensor, largest: Floats, rows: Sequence[SampleRow]
) -> tuple[Ints, Floats]:
    """Ids [R, K] that min_p, top_k and top_p keep, in vocabulary order, and their unnormalised
    probabilities [R, K]; 0 for padding and for what top_p drops.

    Everything is decided by one threshold a row on its scores, so that the pass over the whole
    vocabulary is a comparison, and exponentials and sorting are for the few that pass it.
    """
    width = scores.shape[1]
    temperatures = _temperatures(rows)
    min_p = np.array([row.params.min_p for row in rows])
    top_p = np.array([row.params.top_p for row in rows])
    top_k = np.array([row.params.top_k or width for row in rows]).clip(max=width)

    with np.errstate(divide="ignore"):
        threshold = largest + temperatures * np.log(min_p)
    limited = np.flatnonzero(top_k < width)
    if limited.size:
        kth = _kth_largest(_take_rows(scores, limited.tolist()), top_k[limited])
        threshold[limited] = np.maximum(threshold[limited], kth)

    # Where top_p is the only filter, sorting the whole vocabulary is avoided: the tokens of
    # probability below (1 - p) / V weigh less than 1 - p together, so none is in the nucleus. (Half
    # of that leaves room for rounding.) The sum of all weights is one over the largest probability.
    alone = np.flatnonzero((top_p < 1.0) & (min_p == 0.0) & (top_k == width))
    total = np.zeros(len(rows))
    if alone.size:
        probabilities = _softmax(
            _take_rows(scores, alone.tolist()), largest[alone], temperatures[alone]
        )
        total[alone] = 1.0 / np.array(_largest(probabilities)[0], dtype=np.float64)
        least = 0.5 * (1.0 - top_p[alone]) / width * total[alone]
        threshold[alone] = largest[alone] + temperatures[alone] * np.log(least)

    # Masked tokens are left out even where fewer than top_k are unmasked.
    threshold = np.maximum(threshold, np.finfo(np.float32).min)
    row_of, id_of, value = _at_least(scores, threshold)
    counts = np.bincount(row_of, minlength=len(rows))
    column = np.arange(len(row_of)) - np.repeat(counts.cumsum() - counts, counts)
    ids = np.zeros((len(rows), counts.max()), np.int64)
    weights = np.zeros(ids.shape)
    ids[row_of, column] = id_of
    weights[row_of, column] = np.exp((value - largest[row_of]) / temperatures[row_of])

    cut = np.flatnonzero(top_p < 1.0)
    if cut.size:
        descending = -np.sort(-weights[cut], axis=1)
        sums = descending.cumsum(axis=1)
        target = top_p[cut] * np.where(total[cut] > 0.0, total[cut], sums[:, -1])
        # The first is always kept; another if those before it do not add up to p.
        kept = (sums[:, :-1] < target[:, None]).sum(axis=1)
        last = descending[np.arange(len(cut)), kept]
        weights[cut] = np.where(weights[cut] >= last[:, None], weights[cut], 0.0)
    return ids, weights


def _invert(weights: torch.Tensor, numbers: Floats) -> Ints:
    """For each number u of a row [R, M], the first place of that row's weights [R, K] at which the
    running sum passes u times the whole: never a place of weight 0."""
    # In float32 the tail of 100,000 small weights would be lost.
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    # u is at most 1 - 2**-53, and so the product at most the float before the whole.
    target = torch.from_numpy(numbers).to(sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, target, right=True).cpu().numpy()


# Passes over whole rows. On a CPU these are NumPy's where it is several times faster than torch
# (argmax of one row of 49,152: 3 us against 95; a comparison and its non-zeros: 20 against 120),
# through views of the same memory.


def _in_host_memory(values: torch.Tensor) -> bool:
    return values.device.type == "cpu"


def _take_rows(values: torch.Tensor, indices: list[int]) -> torch.Tensor:
    if len(indices) == len(values):
        return values
    return values[torch.tensor(indices, device=values.device)]


def _largest(values: torch.Tensor) -> tuple[list[float], list[int]]:
    """Each row's largest value and its place; NaN counts as the largest of all."""
    if _in_host_memory(values):
        array = values.numpy()
        places = array.argmax(axis=1)
        return array[np.arange(len(array)), places].tolist(), places.tolist()
    best = values.max(dim=1)
    return best.values.tolist(), best.indices.tolist()


def _kth_largest(values: torch.Tensor, ks: Ints) -> Floats:
    """The ks[i]-th largest value of row i, counted from 1."""
    every = np.arange(len(ks))
    if _in_host_memory(values):
        places = values.shape[1] - ks
        array = np.partition(values.numpy(), np.unique(places), axis=1)
        return array[every, places].astype(np.float64)
    best = values.topk(int(ks.max()), dim=1).values.cpu().numpy()
    return best[every, ks - 1].astype(np.float64)


def _at_least(values: torch.Tensor, threshold: Floats) -> tuple[Ints, Ints, Floats]:
    """Row, place and value of all that reach their row's threshold, row by row, places rising."""
    bound = threshold.astype(np.float32)[:, None]
    if _in_host_memory(values):
        array = values.numpy()
        flat = np.flatnonzero(array >= bound)
        found = np.ascontiguousarray(array).reshape(-1)[flat]
    else:
        mask = values >= torch.from_numpy(bound).to(values.device)
        found = values[mask].cpu().numpy()
        flat = mask.flatten().nonzero().flatten().cpu().numpy()
    rows, places = np.divmod(flat, values.shape[1])
    return rows, places, found.astype(np.float64)


def _num_above(values: torch.Tensor, bounds: torch.Tensor) -> list[int]:
    """How many values of each row are larger than the row's bound."""
    if _in_host_memory(values):
        return np.count_nonzero(values.numpy() > bounds.numpy()[:, None], axis=1).tolist()
    return (values > bounds[:, None]).sum(dim=1).tolist()


def _softmax(scores: torch.Tensor, largest: Floats, temperatures: Floats) -> torch.Tensor:
    """Probabilities [R, V] in float32. Shifting before dividing keeps small temperatures finite."""
    shift = torch.from_numpy(largest.astype(np.float32)[:, None]).to(scores.device)
    scale = torch.from_numpy(temperatures.astype(np.float32)[:, None]).to(scores.device)
    return scores.sub(shift).div_(scale).softmax(dim=-1)


# Move 1.


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    width = logits.shape[1]
    if width % 4 and not _in_host_memory(logits):
        # A GPU's order of additions depends on where among 16 bytes a row begins. Padded, all begin at
        # the first, and what is added to them counts nothing.
        return pad(logits.float(), (0, -width % 4), value=-math.inf).log_softmax(dim=-1)[:, :width]
    return logits.float().log_softmax(dim=-1)


def _add_logprobs(
    output: SamplerOutput, raw: torch.Tensor, wanted: list[int], rows: Sequence[SampleRow]
) -> None:
    """Fill `output.logprobs` of the rows `wanted`, whose logits are `raw` [len(wanted), V]."""
    for start in range(0, len(wanted), _LOGPROB_ROWS):
        indices = wanted[start : start + _LOGPROB_ROWS]
        logprobs = _log_softmax(raw[start : start + _LOGPROB_ROWS])
        samples = [(at, i) for at, index in enumerate(indices) for i in output.token_ids[index]]
        dicts = iter(
            _logprob_dicts(
                logprobs,
                [at for at, _ in samples],
                [token_id for _, token_id in samples],
                [rows[index].params.logprobs or 0 for index in indices],
            )
        )
        for index in indices:
            ids = output.token_ids[index]
            entries = [next(dicts) for _ in ids]
            if any(math.isnan(entry[i].logprob) for entry, i in zip(entries, ids, strict=True)):
                output.fail(index, rows[index], math.nan)
            elif ids:
                output.logprobs[index] = entries


def _logprob_dicts(
    logprobs: torch.Tensor, row_of: Sequence[int], token_ids: Sequence[int], ks: Sequence[int]
) -> list[dict[int, Logprob]]:
    """For each (row, token): that token's entry, then its row's ks[row] best, best first."""
    width = logprobs.shape[1]
    best = _best(logprobs, [width if k == -1 else min(k, width) for k in ks])
    where = torch.tensor(list(row_of), dtype=torch.int64, device=logprobs.device)
    chosen = torch.tensor(list(token_ids), dtype=torch.int64, device=logprobs.device)
    values = logprobs[where, chosen]
    num_above = _num_above(logprobs[where], values)
    result = []
    for row, token_id, value, above in zip(
        row_of, token_ids, values.tolist(), num_above, strict=True
    ):
        entry = {token_id: Logprob(value, above + 1)}
        ids, of_best = best[row]
        rank, previous = 0, math.inf
        for place, (other, logprob) in enumerate(
            zip(ids.tolist(), of_best.tolist(), strict=True), start=1
        ):
            if logprob < previous:
                rank, previous = place, logprob
            entry.setdefault(other, Logprob(logprob, rank))
        result.append(entry)
    return result


def _best(values: torch.Tensor, ks: Sequence[int]) -> list[tuple[Ints, Floats]]:
    """Each row's ks[i] largest: places and values, largest first, of equals the smaller place
    first (topk leaves the order and choice of equals to chance)."""
    result: list[tuple[Ints, Floats]] = [(np.zeros(0, np.int64), np.zeros(0))] * len(ks)
    asked = [index for index, k in enumerate(ks) if k > 0]
    if asked:
        part = _take_rows(values, asked)
        rows, places, found = _at_least(part, _kth_largest(part, np.array([ks[i] for i in asked])))
        order = np.lexsort((places, -found, rows))
        ends = np.bincount(rows, minlength=len(asked)).cumsum()
        for at, index in enumerate(asked):
            start = ends[at - 1] if at else 0
            of_row = order[start : min(ends[at], start + ks[index])]
            result[index] = (places[of_row], found[of_row])
    return result
