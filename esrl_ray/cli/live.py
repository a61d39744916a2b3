"""What a running demo shows: a live view on a terminal, one plain line every 10 s without one. Both go to stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from esrl_ray.evaluation.report import Interval, interval_text

PLAIN_EVERY_S = 10.0
ARM_STYLES = {"explore": "yellow", "exploit": "bright_blue", "control": "bright_black"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveStatus:
    """One reading of the loop; None = not known yet."""

    seconds: float  # since the first served decision
    seconds_left: float
    requests: int = 0
    requests_failed: int = 0
    requests_per_s: float = 0.0
    latency_p99_ms: float | None = None
    events_per_s: float = 0.0
    lag_events: int = 0  # end offsets minus positions, all partitions
    sessions: int = 0  # running ones
    steps_closed: int = 0
    replay_size: int = 0
    replay_capacity: int = 0
    gradient_steps: int = 0
    gradient_steps_per_s: float = 0.0
    critic_loss: float | None = None
    round: int = 0
    published_version: int = 0
    served_version: int = 0
    label_delay_s: float | None = None
    loop_delay_s: float | None = None
    arms: Mapping[str, Interval] = field(default_factory=dict)  # reward per session


class View(Protocol):
    """Shows the newest status."""

    def update(self, status: LiveStatus) -> None:
        """Show this instead of what was shown before."""


class LiveView:
    """Redraws in place, on a terminal."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def update(self, status: LiveStatus) -> None:
        """Redraw."""
        self._live.update(render(status), refresh=True)


class PlainView:
    """Prints one line every `every_s` seconds of the given clock."""

    def __init__(self, console: Console, clock: Callable[[], float], every_s: float = PLAIN_EVERY_S) -> None:
        self._console, self._clock, self._every_s = console, clock, every_s
        self._next = clock()

    def update(self, status: LiveStatus) -> None:
        """Print the line if it is time."""
        if (now := self._clock()) >= self._next:
            self._console.print(plain_line(status), markup=False, highlight=False, soft_wrap=True)
            self._next = now + self._every_s


@contextmanager
def open_view(console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> Iterator[View]:
    """The view that fits this console, while the block runs.

    Args:
        console: Where to show it; default stderr, because stdout belongs to the result.
        clock: Seconds, for the plain line.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield PlainView(console, clock)
        return
    # Only updates redraw: rich's own refresh thread would redraw between them for nothing.
    with Live(console=console, auto_refresh=False, redirect_stdout=False) as live:
        yield LiveView(live)


def plain_line(status: LiveStatus) -> str:
    """One line with every number of the view."""
    arms = " ".join(f"{arm} {interval_text(reward, form='.2f')} ({reward.sessions})" for arm, reward in status.arms.items())
    latency = _number(status.latency_p99_ms, ".0f", " ms")
    parts = [
        f"{status.seconds:.0f} s",
        f"requests {status.requests:,} ({status.requests_per_s:.0f}/s, p99 {latency}, {status.requests_failed} failed)",
        f"events {status.events_per_s:.0f}/s (lag {status.lag_events:,})",
        f"steps {status.steps_closed:,}",
        f"replay {status.replay_size:,}",
        f"learner {status.gradient_steps:,} ({status.gradient_steps_per_s:.1f}/s)",
        f"round {status.round}",
        f"version {status.served_version} of {status.published_version}",
        f"label delay {_number(status.label_delay_s, '.1f', ' s')}",
        f"loop delay {_number(status.loop_delay_s, '.1f', ' s')}",
    ]
    return " | ".join([*parts, f"reward/session {arms}"] if arms else parts)


def render(status: LiveStatus) -> RenderableType:
    """The panel of the live view."""
    fill = f"{status.replay_size / status.replay_capacity:.0%}" if status.replay_capacity else "0%"
    serving: list[tuple[str, str | Text]] = [
        ("requests/s", f"{status.requests_per_s:.0f}"),
        ("requests", f"{status.requests:,}"),
        ("failed", Text(f"{status.requests_failed:,}", style="bold red" if status.requests_failed else "green")),
        ("p99 latency", _number(status.latency_p99_ms, ".0f", " ms")),
        ("version served", Text(f"{status.served_version}", style="bold")),
        ("version published", f"{status.published_version}"),
    ]
    streaming: list[tuple[str, str | Text]] = [
        ("events/s", f"{status.events_per_s:.0f}"),
        ("lag", f"{status.lag_events:,}"),
        ("sessions", f"{status.sessions:,}"),
        ("steps closed", f"{status.steps_closed:,}"),
        ("label delay", _number(status.label_delay_s, ".1f", " s")),
        ("loop delay", _number(status.loop_delay_s, ".1f", " s")),
    ]
    learning: list[tuple[str, str | Text]] = [
        ("learner steps/s", f"{status.gradient_steps_per_s:.1f}"),
        ("learner steps", f"{status.gradient_steps:,}"),
        ("replay", f"{status.replay_size:,}"),
        ("replay fill", fill),
        ("critic loss", _number(status.critic_loss, ".3f")),
        ("round", f"{status.round}"),
    ]
    grid = Table.grid(padding=(0, 1), expand=True)
    for column in range(3):
        grid.add_column(style="bright_black", no_wrap=True)
        grid.add_column(justify="right", no_wrap=True, ratio=1)
        if column < 2:
            grid.add_column(width=2)
    for one, two, three in zip(serving, streaming, learning, strict=True):
        grid.add_row(*one, "", *two, "", *three)
    total = status.seconds + status.seconds_left
    progress = ProgressBar(total=max(total, 1e-9), completed=status.seconds)
    return Panel(
        Group(grid, Text(), _arms(status.arms), Text(), progress),
        title="esrl demo",
        title_align="left",
        subtitle=f"{status.seconds:.0f} of {total:.0f} s",
        subtitle_align="right",
        border_style="bright_black",
        padding=(1, 2),
    )


def _arms(arms: Mapping[str, Interval]) -> Table:
    """Reward per session of each arm, with its interval drawn on one common scale."""
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(style="bright_black", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(ratio=1)
    table.add_row("reward/session", "", "")
    bounds = [b for r in arms.values() for b in (r.ci_low, r.ci_high) if b is not None]
    low, high = min(bounds, default=0.0), max(bounds, default=0.0)
    for arm, reward in arms.items():
        style = ARM_STYLES.get(arm, "")
        text = f"{interval_text(reward, form='.2f')}  n={reward.sessions:,}"
        table.add_row(Text(arm, style=style), text, Text(interval_bar(reward, low, high), style=style))
    return table


def interval_bar(reward: Interval, low: float, high: float, width: int = 24) -> str:
    """`   ├──●──┤    `: an interval on the scale low..high; empty where there is none."""
    if reward.mean is None or reward.ci_low is None or reward.ci_high is None or high <= low:
        return ""
    left, middle, right = (round((v - low) / (high - low) * (width - 1)) for v in (reward.ci_low, reward.mean, reward.ci_high))
    cells = [" "] * width
    cells[left : right + 1] = "─" * (right + 1 - left)
    cells[left], cells[right], cells[middle] = "├", "┤", "●"
    return "".join(cells)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
