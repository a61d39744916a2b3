"""The live view: what it shows, and when the plain line comes."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from esrl_ray.cli.live import LiveStatus, LiveView, PlainView, interval_bar, open_view, plain_line, render
from esrl_ray.evaluation.report import Interval

ARMS = {"explore": Interval(18.2, 17.1, 19.3, 500), "control": Interval(17.2, 15.9, 18.6, 1_200), "exploit": Interval(None, None, None, 0)}
STATUS = LiveStatus(
    seconds=123.4,
    seconds_left=176.6,
    requests=14_001,
    requests_failed=3,
    requests_per_s=118.0,
    latency_p99_ms=31.4,
    events_per_s=951.0,
    lag_events=1_234,
    sessions=310,
    steps_closed=13_050,
    replay_size=12_000,
    replay_capacity=200_000,
    gradient_steps=1_207,
    gradient_steps_per_s=12.3,
    critic_loss=0.615,
    round=2,
    published_version=34,
    served_version=33,
    label_delay_s=9.4,
    loop_delay_s=5.2,
    arms=ARMS,
)
NUMBERS = ("118", "951", "13,050", "12,000", "12.3", "33", "34", "9.4 s", "5.2 s", "1,234", "18.20 [17.10, 19.30]", "31 ms")


def drawn(status: LiveStatus, width: int = 100) -> str:
    """The panel as text."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render(status))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


@pytest.mark.parametrize("number", NUMBERS)
def test_the_panel_and_the_plain_line_show_the_same_numbers(number: str) -> None:
    assert number in drawn(STATUS)
    assert number in plain_line(STATUS)


def test_the_panel_fits_80_columns() -> None:
    lines = drawn(STATUS, width=80).splitlines()
    assert {len(line) for line in lines} == {80}
    assert "…" not in "".join(lines)


def test_the_panel_says_how_far_the_run_and_the_buffer_are() -> None:
    text = drawn(STATUS)
    assert "123 of 300 s" in text and "6%" in text


def test_what_is_not_known_yet_is_a_dash() -> None:
    status = LiveStatus(seconds=0.0, seconds_left=300.0)
    assert "loop delay -" in plain_line(status) and "reward/session" not in plain_line(status)
    assert "loop delay" in drawn(status) and "0 of 300 s" in drawn(status)


def test_the_plain_line_is_one_line() -> None:
    assert "\n" not in plain_line(STATUS)


def test_the_plain_line_comes_every_ten_seconds_of_the_clock() -> None:
    now = [100.0]
    out = io.StringIO()
    view = PlainView(Console(file=out, width=80), lambda: now[0])
    for now[0] in (100.0, 101.0, 109.9, 110.0, 119.9, 125.0, 134.9, 135.0):
        view.update(STATUS)
    assert out.getvalue().splitlines() == [plain_line(STATUS)] * 4  # 100, 110, 125, 135; long lines are not wrapped


def test_without_a_terminal_the_view_is_plain() -> None:
    with open_view(Console(file=io.StringIO())) as view:
        assert isinstance(view, PlainView)


def test_on_a_terminal_the_view_redraws_in_place() -> None:
    out = io.StringIO()
    with open_view(Console(file=out, force_terminal=True, width=100)) as view:
        assert isinstance(view, LiveView)
        view.update(LiveStatus(seconds=1.0, seconds_left=299.0))
        view.update(STATUS)
    assert "123 of 300 s" in out.getvalue()
    assert "\x1b[1A" in out.getvalue()  # the cursor went up


def test_an_interval_is_drawn_on_the_common_scale() -> None:
    assert interval_bar(Interval(5.0, 0.0, 10.0, 9), 0.0, 10.0, width=11) == "├────●────┤"
    assert interval_bar(Interval(2.0, 1.0, 3.0, 9), 0.0, 10.0, width=11) == " ├●┤       "
    assert interval_bar(Interval(10.0, 10.0, 10.0, 9), 0.0, 10.0, width=11) == "          ●"
    assert interval_bar(Interval(None, None, None, 0), 0.0, 10.0) == ""
    assert interval_bar(Interval(1.0, 1.0, 1.0, 2), 1.0, 1.0) == ""
