"""What the figures of every report show."""

from bem.report.plots import figures as plots


def test_an_interval_that_leaves_the_picture_ends_in_an_arrow():
    rows = [plots.ForestRow("em", f"v{i}", 0.1 * i, -1, 1, i) for i in range(4)]
    wide = plots.ForestRow("em", "wide", 0.0, -90, 1, 4)
    assert plots.forest([*rows, wide]).count("<use") == plots.forest(rows).count("<use") + 2


def test_smoothing_keeps_length_and_constants():
    assert plots.smooth([2.0] * 7, share=0.3) == [2.0] * 7
    assert plots.smooth([0.0, 3.0, 0.0], share=0.34) == [1.5, 1.0, 1.5]
