"""Comparisons: every figure, from runs small enough to count by hand, and how they look."""

from __future__ import annotations

import base64
import re

import pytest

from nbengine.core.compare import Spread, compare, figures_of
from nbengine.core.sampling_params import BeamSearchParams, SamplingParams
from nbengine.core.simulate import fork, simulate
from nbengine.core.trace import Trace
from nbengine.errors import InvalidField


@pytest.fixture
def two_runs():
    trace = Trace.synthetic(40, rate=0.5, prompt_tokens=60, output_tokens=30, seed=2)
    return [simulate(trace, None, policy, num_blocks=40) for policy in ("fcfs", "sjf")]


class TestFigures:
    def test_waiting_is_counted_in_steps_from_the_arrival(self, bench):
        """One seat: the second is computed when the first, of 4 tokens, is done."""
        b = bench(num_blocks=100, max_num_seqs=1)
        b.add(20, max_tokens=4)
        b.add(20, max_tokens=2)
        records = [b.step(), b.step()]
        b.add(20, max_tokens=1)
        figures = figures_of([*records, *b.run()])
        assert figures.waiting == Spread(mean=8 / 3, p50=4, p90=4, max=4)  # 0, 4, 4
        assert figures.first_token == Spread(mean=11 / 3, p50=5, p90=5, max=5)  # 1, 5, 5
        assert (figures.num_steps, figures.num_arrived, figures.num_finished) == (7, 3, 3)
        assert (figures.num_tokens, figures.num_output_tokens) == (60 + 3 + 1, 7)
        assert figures.output_tokens_per_step == 1

    def test_who_never_began_is_counted_and_waits_no_time(self, bench):
        b = bench(num_blocks=100, max_num_seqs=1)
        b.add(20, max_tokens=9)
        b.add(20, max_tokens=9)
        figures = figures_of([b.step(), b.step()])
        assert (figures.num_unstarted, figures.num_finished, figures.waiting.max) == (1, 0, 0)

    def test_preemptions_lost_tokens_and_blocks(self, bench):
        """Two prompts of 80 in 10 blocks: the second loses its 80 tokens in step 2."""
        b = bench(num_blocks=10)
        b.add(80, max_tokens=10)
        b.add(80, max_tokens=10)
        figures = figures_of([b.step(), b.step()])
        assert (figures.num_preemptions, figures.num_lost_tokens) == (1, 80)
        assert (figures.mean_held, figures.peak_held, figures.num_blocks) == (8, 10, 10)
        whole = figures_of(b.run())
        assert whole.num_hit_tokens == 64, "of its 5 blocks, one was taken by the first"

    def test_those_who_were_there_from_the_beginning_count_from_there(self, bench):
        b = bench(num_blocks=100, max_num_seqs=1)
        b.add(20, max_tokens=4)
        b.add(20, max_tokens=2)
        b.step()
        figures = figures_of(b.run())  # steps 2 to 6
        assert (figures.num_arrived, figures.waiting.max, figures.first_token.max) == (1, 3, 4)
        assert figures.num_finished == 2

    def test_a_request_of_several_samples_finishes_once(self, bench):
        b = bench(num_blocks=100)
        b.add(20, params=SamplingParams(n=3, max_tokens=4))
        b.add(20, params=BeamSearchParams(beam_width=3, max_tokens=5))
        assert figures_of(b.run()).num_finished == 2

    def test_an_aborted_request_does_not_finish_and_its_name_begins_anew(self, bench):
        b = bench(num_blocks=100, max_num_seqs=1)
        b.add(20, max_tokens=9)
        b.add(20, max_tokens=9, request_id="again")
        records = [b.step()]
        b.scheduler.abort("again")
        b.scheduler.abort("req-0")
        b.add(20, max_tokens=2, request_id="again")
        figures = figures_of([*records, *b.run()])
        assert (figures.num_arrived, figures.num_finished) == (3, 1)
        assert (figures.num_unstarted, figures.waiting.max) == (0, 0)

    def test_who_was_aborted_before_it_began_is_not_waiting_any_more(self, bench):
        b = bench(num_blocks=100, max_num_seqs=1)
        b.add(20, max_tokens=9)
        b.add(20, max_tokens=9)
        records = [b.step()]
        b.scheduler.abort("req-1")
        assert figures_of([*records, *b.run()]).num_unstarted == 0

    def test_a_step_that_failed_has_begun_nothing(self, bench):
        b = bench(num_blocks=100)
        b.add(20, max_tokens=2)
        b.scheduler.schedule()
        failed = b.scheduler.take_back(RuntimeError("lost"))
        figures = figures_of([failed, *b.run()])
        assert (figures.waiting.max, figures.first_token.max) == (1, 2)

    def test_percentiles_are_values_that_occur(self):
        assert Spread.of([4, 1, 3, 2]) == (2.5, 2, 4, 4)
        assert Spread.of(range(1, 101)) == (50.5, 50, 90, 100)
        assert Spread.of([7]) == (7, 7, 7, 7)
        assert Spread.of([]) == (0, 0, 0, 0)


class TestComparison:
    def test_side_by_side_with_the_difference_to_the_first(self, bench):
        def run(n):
            b = bench(num_blocks=100, max_num_seqs=n)
            for _ in range(2):
                b.add(20, max_tokens=10)
            return b.run()

        rows = {row[0]: row[1:] for row in compare(one=run(1), two=run(2)).rows()}
        assert rows["steps"] == ("20", "10 (-50%)")
        assert rows["output tokens a step"] == ("1.0", "2.0 (+100%)")
        assert rows["steps waited: longest"] == ("10", "0 (-100%)")
        assert rows["requests finished"] == ("2", "2")
        assert rows["preemptions"] == ("0", "0")

    def test_names_are_given_or_the_policies(self, two_runs):
        fcfs, sjf = two_runs
        comparison = compare(fcfs, sjf, fcfs, mine=list(sjf), old=sjf.history)
        assert [run.name for run in comparison.runs] == ["fcfs", "sjf", "fcfs (2)", "mine", "old"]
        assert comparison["mine"] == comparison["sjf"] == comparison["old"]
        assert [run.name for run in compare(fcfs.history).runs] == ["Fcfs"]
        with pytest.raises(KeyError, match="no run 'lifo': there are fcfs"):
            comparison["lifo"]

    def test_what_a_simulation_refused_is_in_the_table(self):
        trace = Trace.synthetic(3, prompt_tokens=200, spread=0)
        comparison = compare(
            small=simulate(trace, num_blocks=5), large=simulate(trace, num_blocks=50)
        )
        rows = {row[0]: row[1:] for row in comparison.rows()}
        assert rows["requests refused"] == ("3", "0 (-100%)")

    def test_a_fork_beside_what_happened(self, recorded):
        b = recorded(num_blocks=10)
        b.add(80, max_tokens=10)
        b.add(80, max_tokens=10)
        b.run()
        larger = fork(b.history, 1, b.scheduler.config, "fcfs", num_blocks=12)
        comparison = compare(real=[r for r in b.history if r.step > 1], fork=larger)
        assert comparison["real"].num_preemptions == 1
        assert comparison["fork"].num_preemptions == 0
        assert comparison["fork"].num_steps < comparison["real"].num_steps

    def test_it_says_all_that_in_text(self, two_runs):
        text = repr(compare(*two_runs))
        lines = text.splitlines()
        assert re.search(r"^ +fcfs +sjf$", lines[0])
        assert re.search(r"^steps to first token: mean +[\d.]+ +[\d.]+ \([-+]\d+%\)$", text, re.M)
        assert len(lines) == 21

    @pytest.mark.parametrize("runs", [(), (5,), ([1, 2],), ("fcfs",)], ids=str)
    def test_what_is_no_run_is_refused(self, runs):
        with pytest.raises(InvalidField):
            compare(*runs)

    def test_an_empty_run_is_all_zeros(self):
        comparison = compare([])
        assert comparison["empty"].num_steps == 0
        assert "<img" in comparison._repr_html_()


class TestPicture:
    def pictures(self, html):
        return [
            base64.b64decode(data).decode()
            for data in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", html)
        ]

    def test_lines_differ_in_colour_and_in_dashes(self, two_runs):
        html = compare(*two_runs)._repr_html_()
        *legend, blocks, waiting = self.pictures(html)
        for chart in (blocks, waiting):
            lines = re.findall(
                r'stroke="(#\w+)" stroke-width="2" stroke-dasharray="([^"]*)"', chart
            )
            assert len(set(lines)) == len({colour for colour, _ in lines}) == 2
            assert len({dashes for _, dashes in lines}) == 2
        assert len(legend) == 2

    def test_a_line_goes_through_the_runs_numbers(self, bench):
        """4 steps of 3, 3, 3 and no blocks held: three quarters of the width on top."""
        b = bench(num_blocks=10)
        b.add(40, max_tokens=4)
        (_, blocks, _) = self.pictures(compare(b.run())._repr_html_())
        assert 'd="M0 2L160 2L320 2L480 118H640"' in blocks

    def test_a_long_run_is_drawn_in_few_points_and_keeps_its_peaks(self, bench):
        b = bench(num_blocks=700)
        b.add(8, max_tokens=5000)
        b.step()
        b.add(3200, max_tokens=2)
        records = b.run()
        (_, blocks, _) = self.pictures(compare(records)._repr_html_())
        (line,) = re.findall(r'd="(M[^"]*)" stroke="#0072B2"', blocks)
        assert line.count("L") < 640
        assert min(float(y) for y in re.findall(r"[ML]\S+ ([\d.]+)", line)) == 2

    def test_names_cannot_break_out_of_the_page(self, two_runs):
        html = compare(**{"<script>'": two_runs[0]})._repr_html_()
        assert "<script>" not in html and "&lt;script&gt;" in html
        assert "alt='KV blocks held. &lt;script&gt;&#x27;:" in html

    def test_words_take_the_pages_ink(self, two_runs):
        html = compare(*two_runs)._repr_html_()
        assert "var(--jp-content-font-color1,var(--vscode-editor-foreground,currentColor))" in html
        assert "color:black" not in html and "background:" not in html
