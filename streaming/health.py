"""How long labels take: decision to closed step, in classes of seconds."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

DELAYS_S = (1, 2, 5, 10, 30, 60, 300, 1800)
DELAY_CLASSES = (*(f"<={s}" for s in DELAYS_S), f">{DELAYS_S[-1]}")


def label_delays(rows: pa.Table) -> dict[str, int]:
    """{class: steps}, of first rows: seconds from the decision's event time to the clock that closed its step.

    Args:
        rows: Of the step log's schema.
    """
    delays_ms = pc.subtract(rows["closed_ms"], rows["event_time_ms"]).filter(rows["item_ids"].is_valid()).to_numpy()
    counts = np.bincount(np.searchsorted(np.asarray(DELAYS_S) * 1000, delays_ms), minlength=len(DELAY_CLASSES))
    return dict(zip(DELAY_CLASSES, counts.tolist(), strict=True))
