"""`ModelRunner`: the executor with a real model behind it.

Once a step, on the engine's thread: blocks are swapped and copied, the plan becomes a `Batch`, the
decoder runs, and the rows whose sequences have no more known tokens are sampled. It reads the
sequences and changes none of their fields. A row that can't be sampled (NaN, everything masked)
becomes an error of its sequence alone; whatever else goes wrong escapes, and the scheduler takes
the step back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nbengine.config import EngineConfig
from nbengine.core.plan import StepOutput, StepPlan
from nbengine.core.request import Request, Sequence
from nbengine.core.sampling_params import BeamSearchParams, SamplingParams
from nbengine.errors import NbengineError, NotEnoughMemory, SamplingError
from nbengine.execution.batch import Batch, BatchBuffer
from nbengine.execution.cuda_graphs import DecodeGraphs
from nbengine.execution.kv_cache import KVCache
from nbengine.execution.memory import (
    Measured,
    MemoryBudget,
    measure_activations,
    plan_memory,
)
from nbengine.execution.probe import look_inside
from nbengine.execution.sample_row import SampleRow
from nbengine.execution.sampler import Sampler, beam_candidates, prompt_logprobs
from nbengine.kernels.capture import give_back_memory
from nbengine.kernels.op import Arguments
from nbengine.kernels.table import Kernels
from nbengine.models.decoder import Decoder
from nbengine.models.kernel_layers import KernelLayers, choose_kernels
from nbengine.models.registry import open_checkpoint, resolve_device, resolve_dtype
from nbengine.models.weights import build_decoder
from nbengine.startup import StartupTimes

_PROMPT_ROWS = 128
"""Prompt tokens scored at a time: the logits of a long prompt are larger than many a model."""


class ModelRunner:
    """Implements `nbengine.core.plan.Executor`."""

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        sampler: Sampler,
        *,
        buffer: BatchBuffer | None = None,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.decoder, self.kv_cache, self.sampler = decoder, kv_cache, sampler
        self._buffer, self._graphs = buffer, graphs
        self._is_set_up = False

    @classmethod
    def load(
        cls, path: Path, settings: EngineConfig, startup: StartupTimes | None = None
    ) -> tuple[ModelRunner, MemoryBudget]:
        """A runner of the model at `path`, ready to execute, and the memory it was given.

        The budget comes first, from the config alone, so that a model that can't fit is refused
        before it is read; on a GPU it is made again from what the loaded model was seen to need.
        Raises `ModelNotFound`, `UnsupportedModel`, `WeightsError`, `NotEnoughMemory`, and
        `InvalidField` for an unknown dtype or quantization, or kernels that don't serve the model.
        """
        _flush_denormals()  # first: what loads the weights starts the threads that will compute
        startup = startup or StartupTimes()
        with startup.phase("find the model"):
            checkpoint = open_checkpoint(path)
        config = checkpoint.config
        on_cpu = settings.kernels == "emulated" and settings.device == "auto"
        device = resolve_device("cpu" if on_cpu else settings.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread, which will take the steps
        dtype = resolve_dtype(settings.dtype, config, settings.quantization, device)
        with startup.phase("compiler"):
            kernels = choose_kernels(settings, config, dtype, device)
        budget = plan_memory(config, settings, dtype=dtype, device=device)
        try:
            with startup.phase("weights"):
                decoder = build_decoder(
                    checkpoint,
                    dtype=dtype,
                    quantization=settings.quantization,  # type: ignore[arg-type]  # checked by it
                    device=device,
                    max_positions=budget.max_model_len,
                    for_kernels=kernels is not None,
                )
                decoder.batch_invariant = settings.batch_invariant
                if kernels is not None:
                    decoder.kernel_layers = KernelLayers(decoder, kernels)
            if device.type == "cuda":
                uses_graphs = kernels is not None and not settings.enforce_eager
                with startup.phase("kernels and a first step, for the memory budget"):
                    activations = measure_activations(
                        decoder, settings, budget.max_model_len, uses_graphs
                    )
                measured = Measured(
                    budget.available, decoder.nbytes, activations, decoder.max_positions
                )
                budget = plan_memory(
                    config, settings, dtype=dtype, device=device, measured=measured
                )
            with startup.phase("KV cache"):
                kv_cache = KVCache.allocate(
                    config,
                    budget.num_blocks,
                    settings.block_size,
                    dtype,
                    device,
                    num_host_blocks=budget.num_host_blocks,
                )
            kv_cache.kernels = kernels
            buffer = graphs = None
            if device.type == "cuda":
                buffer = BatchBuffer.for_settings(settings, budget.max_model_len, device)
                if uses_graphs:
                    with startup.phase("CUDA graphs"):
                        graphs = DecodeGraphs.for_settings(
                            decoder, kv_cache, settings, budget.max_model_len
                        )
                        graphs.reserve(buffer)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, NbengineError) or not _is_out_of_memory(error):
                raise
            raise NotEnoughMemory(
                f"{device} ran out of memory while loading, although the budget had room: another "
                f"program has taken it meanwhile. Lower gpu_memory_utilization or close the other "
                f"program. The budget was:\n{budget}"
            ) from error
        sampler = Sampler(
            config.vocab_size, device, kernels, batch_invariant=settings.batch_invariant
        )
        budget = dataclasses.replace(budget, weights=decoder.nbytes)
        return cls(decoder, kv_cache, sampler, buffer=buffer, graphs=graphs), budget

    @property
    def kernels(self) -> Kernels | None:
        """The ops that run the model; None where torch's operations or the CPU's kernels do."""
        layers = self.decoder.kernel_layers
        return None if layers is None else layers.kernels

    def prepare(self, plan: StepPlan) -> Prepared:
        """The plan as the model's input: decodes first, prefill chunks after them."""
        plan = _decodes_first(plan)
        wanted = _Wanted.of(plan)
        batch, padded_to = None, None
        if plan.scheduled:
            is_decode = wanted.num_last == len(wanted.rows) == plan.num_tokens
            if is_decode and self._graphs is not None and self._graphs.is_usable:
                most = max(len(seq.block_table) for seq, _ in plan.scheduled)
                padded_to = self._graphs.graph_size(len(plan.scheduled), most)
            batch = Batch.from_plan(
                plan,
                self.kv_cache.block_size,
                logits_rows=wanted.rows,
                device=self.decoder.device,
                buffer=self._buffer,
                padded_to=padded_to,
            )
        return Prepared(plan, batch, wanted, is_graph=padded_to is not None)

    def live_calls(
        self, ops: Iterable[str], sequences: Collection[Sequence]
    ) -> dict[str, list[Arguments]]:
        """Arguments of calls of each op on what the engine holds now, as `calls_of` returns them: of
        a step that computes the last computed token of each sequence again (the last 64 of some, for
        prefill attention); where nothing runs, one token in the first block."""
        of_prompts = {"paged_attention_prefill"} & set(ops)
        of_tokens = set(ops) - of_prompts
        calls = self.calls_of(of_tokens, _again(sequences, 1)) if of_tokens else {}
        if of_prompts:
            calls |= self.calls_of(of_prompts, _again(itertools.islice(sequences, 4), 64))
        return calls

    def calls_of(
        self, ops: Iterable[str], scheduled: list[tuple[Sequence, int]]
    ) -> dict[str, list[Arguments]]:
        """Arguments of calls of each op in a step that computes these tokens of these sequences: two
        of each at most, as copies; none of an op that such a step does not call. The step is run, and
        the cache left as it was."""
        assert self.kernels is not None
        recordings = {op: self.kernels.record(op, num_calls=2) for op in ops}
        try:
            if scheduled:
                self._run_and_undo(_decodes_first(StepPlan(scheduled=scheduled)))
        finally:
            for recording in recordings.values():
                recording.stop()
        return {op: recording.calls for op, recording in recordings.items()}

    def _run_and_undo(self, plan: StepPlan) -> None:
        wanted, size = _Wanted.of(plan), self.kv_cache.block_size
        batch = Batch.from_plan(plan, size, logits_rows=wanted.rows, device=self.decoder.device)
        written = self.kv_cache.slots(batch.slot_mapping)
        kept = self.kv_cache.data[written]
        try:
            with torch.inference_mode():
                self._compute(Prepared(plan, batch, wanted, is_graph=False), batch, StepOutput())
        finally:
            self.kv_cache.data[written] = kept

    def probe(self, token_ids: Seq[int], chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, hidden states and attention weights of the last of these tokens, computed alone and
        at most `chunk` at a time; see `Probe`."""
        return look_inside(self.decoder, self.kernels, token_ids, self.kv_cache.block_size, chunk)

    def execute(self, plan: StepPlan) -> StepOutput:
        """Do all the plan says."""
        return self.compute(self.prepare(plan))

    def compute(self, prepared: Prepared) -> StepOutput:
        """The second half of `execute`. If it raises, what the plan's blocks hold is unknown."""
        plan = prepared.plan
        if not self._is_set_up:
            _flush_denormals()
            self._is_set_up = True
        self.kv_cache.swap_out(plan.swap_out)
        self.kv_cache.swap_in(plan.swap_in)
        self.kv_cache.copy_blocks(plan.copies)
        output = StepOutput()
        if prepared.batch is not None:
            with torch.inference_mode():
                self._compute(prepared, prepared.batch, output)
        return output

    @property
    def has_lost_device(self) -> bool:
        """Whether the GPU's context is gone: after a kernel's error every call fails."""
        device = self.decoder.device
        if device.type == "cuda":
            try:
                torch.cuda.current_stream(device).synchronize()
            except RuntimeError:
                return True
        return False

    def close(self) -> None:
        """Give the memory of weights, cache and graphs back; the runner is of no use after this."""
        is_cuda = self.decoder.device.type == "cuda"
        self._graphs = self._buffer = None
        del self.decoder, self.kv_cache, self.sampler
        if is_cuda:
            gc.collect()  # graphs, layers and decoder refer to each other
            with contextlib.suppress(RuntimeError):  # of a device that is lost
                give_back_memory()

    def _compute(self, prepared: Prepared, batch: Batch, output: StepOutput) -> None:
        wanted = prepared.wanted
        if prepared.is_graph:
            assert self._graphs is not None
            logits = self._graphs.logits(batch)
            if wanted.rows != list(range(len(wanted.rows))):
                logits = logits[batch.logits_rows]
            self._sample_and_score(wanted, logits, output)
            return
        hidden = self.decoder.forward(batch, self.kv_cache)
        if not wanted.rows:
            return
        hidden = hidden[batch.logits_rows]
        last, of_prompts = hidden.tensor_split([wanted.num_last])
        if wanted.num_last:
            self._sample_and_score(wanted, self.decoder.compute_logits(last), output)
        self._score_prompts(wanted, of_prompts, output)

    def _sample_and_score(self, wanted: _Wanted, logits: Tensor, output: StepOutput) -> None:
        """`logits` are of the last rows: those to sample, then those of beams."""
        sampled, of_beams = logits.tensor_split([len(wanted.samples)])
        self._sample(wanted, sampled, output)
        if wanted.keeps_logits:
            rows = sampled.float().clone()  # what a graph writes is overwritten by the next step
            output.logits = {s.seq_id: row for s, row in zip(wanted.samples, rows, strict=True)}
        self._score_beams(wanted, of_beams, output)

    def _sample(self, wanted: _Wanted, logits: Tensor, output: StepOutput) -> None:
        rows = [_sample_row(seq) for seq in wanted.samples]
        samples = self.sampler.sample(logits, rows)
        for index, seq in enumerate(wanted.samples):
            if index in samples.errors:
                output.errors[seq.seq_id] = samples.errors[index]
                continue
            output.samples[seq.seq_id] = samples.token_ids[index]
            logprobs = samples.logprobs[index]
            if logprobs is not None:
                output.logprobs[seq.seq_id] = logprobs

    def _score_beams(self, wanted: _Wanted, logits: Tensor, output: StepOutput) -> None:
        start = 0
        for beams in wanted.beams.values():
            params = beams[0].request.params
            assert isinstance(params, BeamSearchParams)
            part = logits[start : start + len(beams)]
            start += len(beams)
            try:
                found = beam_candidates(part, 2 * params.beam_width, params.temperature)
            except SamplingError as error:
                output.errors |= {seq.seq_id: error for seq in beams}
                continue
            output.candidates |= {
                seq.seq_id: candidates for seq, candidates in zip(beams, found, strict=True)
            }

    def _score_prompts(self, wanted: _Wanted, hidden: Tensor, output: StepOutput) -> None:
        start = 0
        for seq, targets, num_logprobs in wanted.prompts:
            rows = hidden[start : start + len(targets)]
            start += len(targets)
            try:
                output.prompt_logprobs[seq.seq_id] = [
                    entry
                    for at in range(0, len(targets), _PROMPT_ROWS)
                    for entry in prompt_logprobs(
                        self.decoder.compute_logits(rows[at : at + _PROMPT_ROWS]),
                        targets[at : at + _PROMPT_ROWS],
                        num_logprobs,
                    )
                ]
            except SamplingError as error:
                output.errors[seq.seq_id] = error


def _flush_denormals() -> None:
    """With denormal numbers a matrix product can take twenty times as long, and a result would depend
    on the thread that computes it: this is a setting of the calling thread, and of OpenMP's workers
    that it starts from now on."""
    torch.set_flush_denormal(True)


def _is_out_of_memory(error: Exception) -> bool:
    """torch has a type of its own on GPUs; on a CPU it is a RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "DefaultCPUAllocator" in str(error)
    )


@dataclass(slots=True)
class Prepared:
    """A plan, laid out for the model."""

    plan: StepPlan
    batch: Batch | None
    """None where nothing is scheduled."""
    wanted: _Wanted
    is_graph: bool
    """Whether the batch is padded for a captured graph."""


@dataclass(slots=True)
class _Wanted:
    """What of a plan needs logits. The rows are in this order: samples, beams, prompts."""

    samples: list[Sequence] = field(default_factory=list)
    beams: dict[str, list[Sequence]] = field(default_factory=dict)
    """By request, because the beams of one fail together."""
    prompts: list[tuple[Sequence, list[int], int]] = field(default_factory=list)
    """(sequence, the prompt tokens to score, how many logprobs each)."""
    rows: list[int] = field(default_factory=list)
    """Flat rows of the batch."""
    num_last: int = 0
    """How many of `rows` are the last known token of a sample or beam."""
    keeps_logits: bool = False

    @classmethod
    def of(cls, plan: StepPlan) -> _Wanted:
        wanted = cls(keeps_logits=plan.keeps_logits)
        beam_rows: dict[str, list[int]] = {}
        prompt_rows: list[int] = []
        end = 0
        for seq, n in plan.scheduled:
            start, end = end, end + n
            params = seq.request.params
            if seq.num_computed_tokens + n == len(seq.tokens):
                if isinstance(params, SamplingParams):
                    wanted.samples.append(seq)
                    wanted.rows.append(end - 1)
                else:
                    name = seq.request.request_id
                    wanted.beams.setdefault(name, []).append(seq)
                    beam_rows.setdefault(name, []).append(end - 1)
            if isinstance(params, SamplingParams) and params.prompt_logprobs is not None:
                targets = _prompt_tokens_to_score(seq, n)
                if targets:
                    wanted.prompts.append((seq, targets, params.prompt_logprobs))
                    prompt_rows += range(start, start + len(targets))
        for rows in beam_rows.values():
            wanted.rows += rows
        wanted.num_last = len(wanted.rows)
        wanted.rows += prompt_rows
        return wanted


def _decodes_first(plan: StepPlan) -> StepPlan:
    return dataclasses.replace(plan, scheduled=sorted(plan.scheduled, key=lambda item: item[1] > 1))


def _again(sequences: Iterable[Sequence], length: int) -> list[tuple[Sequence, int]]:
    """The last computed tokens, at most `length` of each, to compute once more, as if none had come
    after them; of nothing, one token in the first block."""
    scheduled = []
    for seq in sequences:
        n = min(length, seq.num_computed_tokens)
        if n:
            again = seq.clone(seq.tokens[: seq.num_computed_tokens])
            again.num_computed_tokens -= n
            scheduled.append((again, n))
    if not scheduled:
        params = SamplingParams(temperature=0, max_tokens=1)
        probe = Sequence("probe", Request("probe", (0,), params), 0, [0])
        probe.block_table = [0]
        scheduled.append((probe, 1))
    return scheduled


def _prompt_tokens_to_score(seq: Sequence, n: int) -> list[int]:
    """The prompt tokens that the next n rows predict: one less at the end, where the next token is
    sampled. None for a sequence whose prompt was scored before (a fork, a recompute)."""
    if seq.index or len(seq.tokens) > seq.num_prompt_tokens:
        return []
    first = seq.num_computed_tokens + 1
    return seq.tokens[first : first + n]


def _sample_row(seq: Sequence) -> SampleRow:
    request = seq.request
    assert isinstance(request.params, SamplingParams)
    return SampleRow(
        seq_id=seq.seq_id,
        params=request.params,
        seed=request.seed,
        sample_indices=range(seq.index, seq.index + 1 + seq.pending_forks),
        tokens=seq.tokens,
        num_prompt_tokens=request.num_prompt_tokens,
        eos_token_ids=request.eos_token_ids,
        bad_words_token_ids=request.bad_words_token_ids,
    )
