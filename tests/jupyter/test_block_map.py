"""The still block map, and the text and HTML forms of what users see."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from xml.dom import minidom

from nbengine import SamplingParams
from nbengine.jupyter.block_map import (
    PALETTE,
    BlockKind,
    BlockMap,
    block_map_html,
    block_map_svg,
    block_map_text,
    block_states,
    colour_index,
)
from nbengine.jupyter.views import Steps, budget_bar, tail
from tests.jupyter.scripted import ScriptedEngine

MakeEngine = Callable[..., ScriptedEngine]


def one_of_each(make_engine: MakeEngine) -> ScriptedEngine:
    """8 blocks of 16: one held by req-1 alone, two held by both samples of req-2, three cached
    blocks left by req-0, and two free ones."""
    engine = make_engine(num_gpu_blocks_override=8)
    engine.add_request(list(range(100, 148)), SamplingParams(max_tokens=1))  # 3 full blocks
    engine.step()
    engine.add_request([7] * 10, SamplingParams(max_tokens=20))
    engine.add_request([9] * 32, SamplingParams(max_tokens=20, n=2))
    engine.step()
    return engine


def test_a_block_is_free_cached_held_or_shared(make_engine: MakeEngine) -> None:
    snapshot = one_of_each(make_engine).snapshot()
    states = block_states(snapshot)
    kinds = [state.kind for state in states]
    assert kinds.count(BlockKind.CACHED) == 3
    assert kinds.count(BlockKind.HELD) == 1
    assert kinds.count(BlockKind.SHARED) == 2
    assert kinds.count(BlockKind.FREE) == 2
    assert {(s.owner, s.num_holders) for s in states if s.owner} == {("req-1", 1), ("req-2", 2)}


def test_text_has_one_character_a_block(make_engine: MakeEngine) -> None:
    text = block_map_text(one_of_each(make_engine).snapshot())
    assert "3 held (2 shared), 3 cached, 2 free of 8 blocks of 16 tokens" in text
    row = text.splitlines()[1].split()[1]
    assert sorted(row) == sorted("===++a..")
    assert "a req-1" in text


def test_svg_is_well_formed_and_says_its_counts_to_a_screen_reader(
    make_engine: MakeEngine,
) -> None:
    svg = block_map_svg(one_of_each(make_engine).snapshot())
    root = minidom.parseString(svg).documentElement
    assert root is not None
    assert root.getAttribute("role") == "img"
    assert "3 held (2 shared)" in root.getAttribute("aria-label")
    for seq_id in ("req-1", "req-2"):
        assert PALETTE[colour_index(seq_id)] in svg


def test_a_large_pool_is_drawn_with_fewer_cells_and_says_so(make_engine: MakeEngine) -> None:
    engine = make_engine(num_gpu_blocks_override=16_000)
    engine.add_request([5] * 40, SamplingParams(max_tokens=20))
    engine.step()
    html = block_map_html(engine.snapshot())
    assert "One cell stands for 8 blocks" in html
    assert PALETTE[colour_index("req-0")] in html, "a held block shows among free ones"
    assert len(html) < 100_000
    assert "stands for 8 blocks" in block_map_text(engine.snapshot())


def test_consecutive_requests_and_samples_differ_in_colour() -> None:
    ids = [f"req-{i}" for i in range(len(PALETTE))]
    assert len({colour_index(name) for name in ids}) == len(PALETTE)
    assert colour_index("req-3") != colour_index("req-3#1") != colour_index("req-3#2")
    assert colour_index("any name") == colour_index("any name")


def test_names_are_escaped_wherever_they_are_shown(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request("a prompt", SamplingParams(max_tokens=4), request_id="<script>alert(1)")
    record = engine.step()
    output = engine.output("<script>alert(1)")
    shown = [engine.snapshot(), record, engine.history, output, Steps((record,)), engine]
    shown.append(BlockMap(engine.snapshot()))
    for thing in shown:
        html = thing._repr_html_()  # type: ignore[attr-defined]
        assert "<script" not in html
    assert "<script" not in budget_bar(record)


def test_objects_show_themselves_in_text(make_engine: MakeEngine) -> None:
    engine = one_of_each(make_engine)
    text = repr(engine.snapshot())
    assert "step 2, policy Fcfs: 3 running, 0 waiting" in text
    assert re.search(r"req-2#1 +running +32/33 +32\+1 +2 ", text)
    assert "finished req-0 (length)" in repr(Steps(tuple(engine.history)))


def test_tail_is_one_line_with_the_newest_text() -> None:
    assert tail("short") == "short"
    assert tail("a\nb\tc") == "a b c"
    assert tail("one two three four", 12) == "…three four"
    assert tail("x" * 500, 8) == "…xxxxxxx"


def test_the_views_need_no_notebook_package() -> None:
    code = (
        "import sys, nbengine.jupyter.views, nbengine.jupyter.block_map\n"
        "found = {'IPython', 'ipywidgets', 'anywidget', 'torch'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
