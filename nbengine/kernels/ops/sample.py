"""sample: tokens drawn from rows of logits by temperature, min_p, top_k and top_p."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nbengine.kernels.cases import normal, poison, sliced, title
from nbengine.kernels.op import Arguments, Case, Cost, Op, Tolerance
from nbengine.kernels.ops.greedy import FEW_ROWS, ROW_THREADS
from nbengine.kernels.program import Program
from nbengine.kernels.shapes import check_dense, check_logits, check_shape


def launch(
    program: Program,
    *,
    out_ids: Tensor,
    largest: Tensor,
    logits: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    seed: Tensor,
    position: Tensor,
    allowed_offsets: Tensor,
    allowed_ids: Tensor,
    sample_offsets: Tensor,
    sample_indices: Tensor,
) -> None:
    """out_ids[m] is the token that row r of the logits `[R, V]` draws for the request's sample
    sample_indices[m], for every m in sample_offsets[r] : sample_offsets[r + 1].

    largest, float32 `[R]`, is the row's largest logit, NaN where any is NaN; where it is not finite
    nothing can be sampled, and the ids are those of the largest number, below V in any case.
    temperature, min_p and top_p are float64 `[R]`; a temperature of 0 takes the largest. top_k (0
    for all), seed and position, int64 `[R]`, key the random numbers: Philox(seed; sample, position).
    Row r may draw only allowed_ids[allowed_offsets[r] : allowed_offsets[r + 1]], rising and without
    repetition, and anything where that is empty; offsets are int64 `[R + 1]`. Rows of the logits may
    be slices of wider ones.

    A number closer than some 1e-6 to a boundary between two tokens may draw either: weights are
    float32.

    Raises:
        ValueError: shapes do not fit, or V is above 524,288.
    """
    num_rows, vocab_size = logits.shape
    check_logits(logits)
    check_dense("out_ids", out_ids, *sample_indices.shape, alignment=8)
    check_dense("largest", largest, num_rows, alignment=4)
    for name, tensor in (
        ("temperature", temperature),
        ("min_p", min_p),
        ("top_p", top_p),
        ("top_k", top_k),
        ("seed", seed),
        ("position", position),
    ):
        check_shape(name, tensor, num_rows)
    check_shape("allowed_offsets", allowed_offsets, num_rows + 1)
    check_shape("sample_offsets", sample_offsets, num_rows + 1)
    program.kernel("sample", logits.dtype)[num_rows, ROW_THREADS](
        out_ids,
        largest,
        logits,
        temperature,
        min_p,
        top_p,
        top_k,
        seed,
        position,
        allowed_offsets,
        allowed_ids,
        sample_offsets,
        sample_indices,
        vocab_size,
        logits.stride(0),
    )


def reference(
    *,
    out_ids: Tensor,
    largest: Tensor,
    logits: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    seed: Tensor,
    position: Tensor,
    allowed_offsets: Tensor,
    allowed_ids: Tensor,
    sample_offsets: Tensor,
    sample_indices: Tensor,
) -> None:
    """Row by row in float64, sorting."""
    vocab_size = logits.shape[1]
    for r, row in enumerate(logits.double()):
        ids = allowed_ids[allowed_offsets[r] : allowed_offsets[r + 1]]
        if len(ids) == 0:
            ids = torch.arange(vocab_size, device=row.device)
        inside = (ids >= 0) & (ids < vocab_size)
        ids = ids * inside
        x = torch.where(inside, row[ids], -torch.inf)
        largest[r] = x.amax()
        samples = slice(int(sample_offsets[r]), int(sample_offsets[r + 1]))
        if temperature[r] == 0 or not x.amax().isfinite():
            out_ids[samples] = ids[x.nan_to_num(-torch.inf, torch.inf, -torch.inf).argmax()]
            continue
        sums = kept_weights(
            x, float(temperature[r]), float(min_p[r]), float(top_p[r]), int(top_k[r])
        ).cumsum(0)
        numbers = sums.new_tensor(
            [uniform(int(seed[r]), int(i), int(position[r])) for i in sample_indices[samples]]
        )
        out_ids[samples] = ids[torch.searchsorted(sums, numbers * sums[-1], right=True)]


def kept_weights(x: Tensor, temperature: float, min_p: float, top_p: float, top_k: int) -> Tensor:
    """exp((x - max) / temperature) of the logits `[n]`, with 0 for what is not kept. The
    largest always is."""
    weights = ((x - x.amax()) / temperature).exp()
    least = torch.tensor(-torch.finfo(torch.float32).max, dtype=torch.float64, device=x.device)
    if min_p > 0:
        bound = x.amax() + temperature * torch.tensor(min_p, dtype=torch.float64).log().item()
        least = torch.maximum(least, bound.float().double().minimum(x.amax()))
    if 0 < top_k < len(x):
        least = torch.maximum(least, x.sort(descending=True).values[top_k - 1])
    weights = torch.where(x >= least, weights, 0.0)
    if top_p < 1:
        ordered = weights.sort(descending=True).values
        sums = ordered.cumsum(0)
        # The first is always kept; another if those before it do not add up to p.
        last = int((sums[:-1] < top_p * sums[-1]).sum())
        weights = torch.where(weights >= ordered[last], weights, 0.0)
    return weights


def uniform(seed: int, sample: int, position: int) -> float:
    """Philox4x32-10 of the key `seed` and the counter (position, sample): 53 bits in [0, 1)."""
    mask = 0xFFFFFFFF
    key = [seed & mask, seed >> 32 & mask]
    words = [position & mask, position >> 32 & mask, sample & mask, sample >> 32 & mask]
    for _ in range(10):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            second >> 32 ^ words[1] ^ key[0],
            second & mask,
            first >> 32 ^ words[3] ^ key[1],
            first & mask,
        ]
        key = [key[0] + 0x9E3779B9 & mask, key[1] + 0xBB67AE85 & mask]
    return ((words[0] >> 5) * 2**26 + (words[1] >> 6)) / 2**53


@dataclass(frozen=True, slots=True)
class _Row:
    temperature: float = 1.0
    min_p: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    allowed: tuple[int, ...] = ()
    samples: int = 1
    spread: float = 3.0
    """Of the logits: 0 makes all of them equal."""
    fill: float | None = None
    """In place of the first logits, up to the last."""


_ROWS = (
    _Row(),
    _Row(temperature=0.0, samples=2),
    _Row(samples=5, spread=0.0),
    _Row(temperature=0.7, top_k=20),
    _Row(top_p=0.9, spread=5.0),
    _Row(top_p=0.9, spread=1.0),
    _Row(min_p=0.05, temperature=1.5),
    _Row(top_k=50, top_p=0.8, min_p=0.01, samples=3),
    _Row(top_p=0.95, min_p=0.001, spread=1.0),
    _Row(top_k=7, spread=0.0),
    _Row(top_k=1, temperature=0.01),
    _Row(temperature=50.0, top_k=90),
    _Row(allowed=(3, 5, 77, 98, 10**12), samples=3),
    _Row(allowed=(-4, 99), top_k=1),
    _Row(allowed=tuple(range(0, 100, 3)), top_p=0.5),
    _Row(fill=-torch.inf, top_k=5),
    _Row(fill=-torch.inf, top_p=0.5),
    _Row(samples=0),
)
_WIDE = (
    _Row(top_k=256, temperature=0.8),
    _Row(top_k=257, temperature=0.8),
    _Row(top_k=9000, top_p=0.7, spread=1.0),
    _Row(top_k=3, spread=0.0, top_p=0.25),
    _Row(allowed=tuple(range(5, 8000, 2)), top_p=0.99, spread=1.0),
    _Row(fill=torch.nan),
    _Row(fill=torch.inf, top_k=2),
)
_NAN = _Row(spread=torch.nan, samples=2)
"""All of it."""


def cases() -> Iterator[Case]:
    yield _case(torch.float32, 100, _ROWS)
    yield _case(torch.bfloat16, 100, _ROWS[:9])
    yield _case(torch.float32, 100, (_NAN, _Row(temperature=1e-40, spread=0.0), _Row(min_p=2.0)))
    yield _case(torch.float16, 8193, (_ROWS[3], _ROWS[7], _NAN))
    yield _case(torch.float32, 8193, _ROWS[3:6], padding=5)
    yield _case(torch.float32, 10_000, _ROWS[:1] + _ROWS[6:9] + _WIDE + (_NAN,))
    yield _case(torch.float32, 151_936, (_Row(top_k=50, top_p=0.9, spread=2.0), _NAN))


def bench_cases() -> Iterator[Case]:
    for rows in (512, 64, 1):
        for name, row in (
            ("temperature", _Row()),
            ("top_k 20", _Row(temperature=0.7, top_k=20)),
            ("top_p 0.9 peaked", _Row(top_p=0.9, spread=5.0)),
            ("top_p 0.9 flat", _Row(top_p=0.9, spread=1.0)),
        ):
            yield _case(torch.float32, 151_936, (row,) * rows, name=name)


def _case(
    dtype: torch.dtype, vocab_size: int, rows: tuple[_Row, ...], padding: int = 0, name: str = ""
) -> Case:
    def make(generator: torch.Generator) -> Arguments:
        def column(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
            values = [getattr(row, name) for row in rows]
            return torch.tensor(values, dtype=dtype, device=device)

        def offsets(counts: list[int]) -> Tensor:
            return torch.tensor([0, *counts], device=device).cumsum(0)

        device = generator.device
        logits = normal(generator, torch.float32, len(rows), vocab_size)
        logits *= column("spread", torch.float32)[:, None]
        for r, row in enumerate(rows):
            if row.fill is not None:
                logits[r, :-1] = row.fill
        logits = logits.to(dtype)
        samples = [i for row in rows for i in range(row.samples)]
        allowed = [i for row in rows for i in row.allowed]
        arguments = {
            "out_ids": torch.full((len(samples),), -1, device=device),
            "largest": poison(generator, torch.float32, len(rows)),
            "logits": sliced(logits, padding, padding) if padding else logits,
            "temperature": column("temperature"),
            "min_p": column("min_p"),
            "top_p": column("top_p"),
            "top_k": column("top_k", torch.int64),
            "seed": torch.randint(
                -(2**63), 2**63 - 1, (len(rows),), generator=generator, device=device
            ),
            "position": torch.arange(1, len(rows) + 1, device=device),
            "allowed_offsets": offsets([len(row.allowed) for row in rows]),
            "allowed_ids": torch.tensor(allowed, dtype=torch.int64, device=device),
            "sample_offsets": offsets([row.samples for row in rows]),
            "sample_indices": torch.tensor(samples, dtype=torch.int64, device=device),
        }
        if len(rows) < 64:  # to be compared, and not only measured
            _keep_off_boundaries(arguments)
        return arguments

    return Case(title(dtype, f"{len(rows)}x{vocab_size}", name), make)


_CLOSE = 3e-6
"""What float32 weights may move a boundary between two tokens, as a share of all."""


def _keep_off_boundaries(arguments: Arguments) -> None:
    """Move top_p to the middle between two tokens, and positions until no number of the row is
    close to a boundary: so that ids can be compared exactly."""
    vocab_size = arguments["logits"].shape[1]
    for r, row in enumerate(arguments["logits"].double()):
        start, end = arguments["allowed_offsets"][r : r + 2].tolist()
        ids = arguments["allowed_ids"][start:end]
        x = row[ids[(ids >= 0) & (ids < vocab_size)]] if end > start else row
        temperature, min_p, top_p = (
            float(arguments[name][r]) for name in ("temperature", "min_p", "top_p")
        )
        top_k = int(arguments["top_k"][r])
        if temperature == 0 or not x.amax().isfinite():
            continue
        if top_p < 1:
            ordered = kept_weights(x, temperature, min_p, 1.0, top_k).sort(descending=True).values
            sums = torch.nn.functional.pad(ordered.cumsum(0), (1, 0))
            last = int((sums[1:-1] < top_p * sums[-1]).sum())
            top_p = float((sums[last] + sums[last + 1]) / 2 / sums[-1])
            arguments["top_p"][r] = top_p
        weights = kept_weights(x, temperature, min_p, top_p, top_k)
        boundaries = weights.cumsum(0) / weights.sum()
        samples = arguments["sample_indices"][slice(*arguments["sample_offsets"][r : r + 2])]

        def is_close(
            position: int, r: int = r, samples: Tensor = samples, boundaries: Tensor = boundaries
        ) -> bool:
            seed = int(arguments["seed"][r])
            numbers = boundaries.new_tensor([uniform(seed, int(i), position) for i in samples])
            return bool(((numbers[:, None] - boundaries).abs() < _CLOSE).any())

        position = int(arguments["position"][r])
        while is_close(position):
            position += len(arguments["logits"])
        arguments["position"][r] = position


def tolerance(arguments: Arguments) -> Tolerance:
    return Tolerance(0.0, 0.0)


def cost(arguments: Arguments) -> Cost:
    logits = arguments["logits"]
    return Cost(logits.numel() * logits.element_size(), 5 * logits.numel())


def compact(arguments: Arguments) -> Arguments:
    """The first rows."""
    offsets = {
        name: arguments[name][: FEW_ROWS + 1] for name in ("allowed_offsets", "sample_offsets")
    }
    samples, allowed = (int(offsets[f"{of}_offsets"][-1]) for of in ("sample", "allowed"))
    lengths = {"out_ids": samples, "sample_indices": samples, "allowed_ids": allowed}
    rest = {name: x[: lengths.get(name, FEW_ROWS)] for name, x in arguments.items()}
    return rest | offsets


OP = Op(
    name="sample",
    source="sampling.cu",
    outputs=("out_ids", "largest"),
    launch=launch,
    reference=reference,
    cases=cases,
    tolerance=tolerance,
    cost=cost,
    bench_cases=bench_cases,
    compact=compact,
)
