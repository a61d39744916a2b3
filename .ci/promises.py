"""Reads the last line of a demo's output and fails when a promise is broken.

Untimed promises are exact. Timed ones are printed, and fail only when they are off by 4x: machines are shared.
"""

import json
import sys
from pathlib import Path

report = json.loads(Path(sys.argv[1]).read_text().strip().splitlines()[-1])
simulated = "--simulated" in sys.argv
steps, ledger = report["steps"], report["ledger"]
exact = {
    "0 failed requests": report["requests_failed"] == 0,
    "requests were made": report["requests"] > 0,
    "no producer gave up an event": report["events_failed"] == 0,
    "the ledger closes": ledger["closes"],
    "nothing is left unread": ledger["not_yet_read"] == 0,
    "every closed step is logged once": steps["closed"] == steps["logged"] == steps["inserted"],
    "versions never go down at a replica": report["version_regressions"] == 0,
    "policies were published and served": report["policies_published"] >= 3 and report["versions_served"] >= (4 if simulated else 2),
    "gradient steps were made": report["learner"]["gradient_steps"] > 0,
    "no event was refused": ledger["dead_letter"] == 0,
}
if simulated:
    exact["the frozen evaluation ran"] = report["frozen"] is not None and report["frozen"]["difference"]["sessions"] > 0
timed = {  # name: (value, target); larger is worse
    "loop delay p99 (s)": (report["loop_delay_s"]["p99"], 15.0),
    "swap p99 (ms)": (report["swap_ms"]["p99"], 500.0),
    "first served decision (s)": (report["seconds_to_first_decision"], 60.0 if simulated else 240.0),
    "peak memory (GB)": (report["peak_rss_bytes"] / 1e9, 4.0),
}
failed = [name for name, holds in exact.items() if not holds]
for name, holds in exact.items():
    print(f"{'ok    ' if holds else 'BROKEN'} {name}")
for name, (value, target) in timed.items():
    broken = value is None or value > 4 * target
    failed += [name] if broken else []
    print(f"{'BROKEN' if broken else 'ok    ' if value <= target else 'slow  '} {name}: {value} (target {target})")
if simulated:
    rate = report["requests"] / report["seconds"]
    failed += ["requests per second"] if rate < 25 else []
    print(f"{'ok    ' if rate >= 100 else 'slow  '} requests per second: {rate:.0f} (target 100)")
sys.exit(f"broken promises: {failed}" if failed else 0)
