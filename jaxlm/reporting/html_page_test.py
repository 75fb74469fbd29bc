"""Pages: that text is text."""

import numpy as np

from jaxlm.reporting import html_page, line_chart
from jaxlm.reporting.line_chart import Curve


def test_text_is_text() -> None:
    x = np.arange(2)
    bad = "<script>&"
    parts = [
        line_chart.chart(bad, [Curve(bad, x, x), Curve(bad, x, x)], x_label=bad, levels=[Curve(bad, x[:1], x[:1])]),
        html_page.table([bad], [[bad]], bad),
        html_page.totals([(bad, bad)]),
        html_page.folded(bad, html_page.text(bad)),
    ]
    assert "<script" not in html_page.page(bad, parts)
