"""Drawings in a notebook that is not trusted: images, and an ink for a light page and a dark one."""

from __future__ import annotations

import re
from base64 import b64decode

import pytest

from nbengine.jupyter.picture import GREY, image
from tests.jupyter.contrast import DARK_PAGE, LIGHT_PAGE, contrast


def test_an_image_holds_the_drawing_and_its_words() -> None:
    html = image("<svg xmlns='http://www.w3.org/2000/svg'/>", 'one\'s "own" & <bold>')
    found = re.fullmatch("<img alt='(.*?)' style='.*?' src='data:image/svg.xml;base64,(.*)'>", html)
    assert found
    assert found[1] == "one&#x27;s &quot;own&quot; &amp; &lt;bold&gt;"
    assert b64decode(found[2]) == b"<svg xmlns='http://www.w3.org/2000/svg'/>"


@pytest.mark.parametrize("page", [LIGHT_PAGE, DARK_PAGE])
def test_the_ink_can_be_read_on_both_pages(page: str) -> None:
    assert contrast(GREY, page) > 4.3
