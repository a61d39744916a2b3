"""The composition root's clock."""

import time


def clock_ms() -> int:
    """Wall clock in epoch milliseconds."""
    return time.time_ns() // 1_000_000
