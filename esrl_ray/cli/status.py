"""`esrl status`: how ingestion and join stand, from the running workers or else from the log's last commits."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from esrl_ray.cli.clock import clock_ms
from esrl_ray.config import Config, load_config
from esrl_ray.errors import BrokerError, ConfigError
from esrl_ray.vocabulary import Bucket
from streaming.broker import end_offsets
from streaming.health import DELAY_CLASSES, label_delays
from streaming.partitions import live_workers
from streaming.session_state import DECISIONS, FEEDBACK
from streaming.sessions import SessionJoiner
from streaming.steplog import last_state, read_newest

if TYPE_CHECKING:
    from ray.actor import ActorHandle

NEWEST_STEPS = 2_000
OLD_S = 30.0
"""Numbers that a worker took longer ago say so."""
LIVE, LOGGED, SILENT = "live", "from the log", "does not answer"

Status = dict[str, Any]
"""Of a worker, as `IngestWorker.status` gives it, with `source`."""


@click.command()
@click.option("--config", "path", default="configs/online.yaml", show_default=True, help="YAML of the deployment.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value, e.g. run.dir=runs/demo.")
@click.option("--address", default="auto", show_default=True, help="Ray cluster of the deployment; `none` reads the log alone.")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Between two looks, for rates.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
def status(*, path: str, overrides: tuple[str, ...], address: str, seconds: float, as_json: bool) -> None:
    """Lag, watermark, open sessions, rates, refusals and last commits; and whether the join is healthy.

    From the running workers where the deployment's Ray cluster is found; else from the state of each worker's last commit, with lag as the
    broker tells it. What to do about what is seen: docs/operations.md.
    """
    config = load_config(path, overrides, environment=os.environ)
    found = live(config, address, seconds)
    if not found["workers"]:
        found = logged(config)
    if not found["workers"]:
        raise ConfigError(
            "no worker runs and none has a step log", config.log_root, "name the deployment with --config or --set run.dir=..."
        )
    found["join"] = join_health(found["workers"].values())
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        show(found, Console(), now_ms=clock_ms())


def live(config: Config, address: str, seconds: float) -> dict[str, Any]:
    """Statuses of the running workers and replay shards."""
    workers: dict[str, Status] = {}
    shards: dict[str, Any] = {}
    if address != "none":
        from esrl_ray import actors  # Ray takes seconds
        from esrl_ray.cli.parts import worker_names

        if actors.connect(address):
            first = {name: _look(handle) for name, handle in actors.present(worker_names(config)).items()}
            time.sleep(seconds if first else 0.0)
            for name, handle in actors.present(first).items():
                (before, then_s), (now, now_s) = first[name], _look(handle)
                per_s = None if now is None or before is None else (now["steps_closed"] - before["steps_closed"]) / (now_s - then_s)
                workers[name] = {**(now or {}), "source": SILENT if now is None else LIVE, "steps_per_s": per_s}
            names = [f"replay-{i}" for i in range(config.replay.num_shards)]
            for name, handle in actors.present(names).items():
                stats = actors.ask(handle.stats.remote) or {}
                shards[name] = {key: stats.get(key) for key in ("size", "num_samplable", "lineage")}
    return {"workers": workers, "shards": shards}


def _look(worker: ActorHandle) -> tuple[Status | None, float]:
    """A worker's status and when it came: one that is slow, or silent until the time is out, holds up the looks at the others."""
    from esrl_ray import actors

    return actors.ask(worker.status.remote), time.monotonic()


def logged(config: Config) -> dict[str, Any]:
    """The same, as of the last commit of each worker in the log (an import is none: it reads files); lag is {} when no broker answers."""
    root = config.log_root
    workers: dict[str, Status] = {}
    names = {DECISIONS: config.kafka.decisions_topic, FEEDBACK: config.kafka.feedback_topic}
    states = {worker: state for worker in live_workers(root) if (state := last_state(root, worker)) is not None and state.held}
    try:
        ends = end_offsets(config.kafka) if states and config.kafka.bootstrap_servers else {}
    except BrokerError:
        ends = {}
    for worker, state in states.items():
        joiners = {p: SessionJoiner(p, config, state=chain) for p, chain in state.held.items()}
        ledger: Counter[tuple[str, Bucket]] = Counter()
        for joiner in joiners.values():
            ledger.update(joiner.ledger)
        mine = {(name, p): f"{name}/{p}" for name in names.values() for p in joiners}
        workers[worker] = {
            "source": LOGGED,
            "ledger": {topic: {bucket.value: n for (of, bucket), n in ledger.items() if of == topic} for topic in names},
            "positions": state.positions,
            "lag": {text: max(0, ends[where] - state.positions.get(text, 0)) for where, text in mine.items() if where in ends},
            "watermarks_ms": {p: joiner.watermark_ms for p, joiner in joiners.items()},
            "open_sessions": {p: joiner.num_open_sessions for p, joiner in joiners.items()},
            "steps_closed": sum(joiner.num_closed for joiner in joiners.values()),
            "steps_per_s": None,
            "refusals": {},
            "label_delays": {},
            "commit": state.commit,
            "committed_ms": state.committed_ms,
        }
    if workers:  # of the newest steps of all workers; the first one stands for them
        newest = read_newest(root, NEWEST_STEPS, lambda rows: rows["item_ids"].is_valid().to_numpy(), workers=live_workers(root))
        next(iter(workers.values()))["label_delays"] = label_delays(newest)
    return {"workers": workers, "shards": {}}


def join_health(workers: Iterable[Status]) -> dict[str, Any]:
    """Shares since the first event ever, and how long labels took."""
    total: dict[str, Counter[str]] = {DECISIONS: Counter(), FEEDBACK: Counter()}
    delays: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    for worker in workers:
        for topic, buckets in worker.get("ledger", {}).items():
            total[topic].update(buckets)
        delays.update(worker.get("label_delays", {}))
        for topic, codes in worker.get("refusals", {}).items():
            refusals.update({f"{topic} {code}": n for code, n in codes.items()})

    def share(topic: str, bucket: Bucket) -> float | None:
        settled = total[topic].total() - total[topic][Bucket.IN_OPEN_SESSION]
        return total[topic][bucket] / settled if settled else None

    return {
        "unmatched_feedback_share": share(FEEDBACK, Bucket.UNMATCHED),
        "never_shown_share": share(DECISIONS, Bucket.NEVER_SHOWN),
        "late_feedback_share": share(FEEDBACK, Bucket.LATE),
        "ledger": {topic: dict(buckets) for topic, buckets in total.items()},
        "label_delay_s": {delay: delays[delay] for delay in DELAY_CLASSES},
        "refusals": dict(refusals),
    }


def show(found: Mapping[str, Any], console: Console, *, now_ms: int) -> None:
    """Print tables."""
    console.print(_workers(found["workers"], now_ms))
    console.print(_partitions(found["workers"], now_ms))
    for name, shard in found["shards"].items():
        console.print(f"{name}: {shard['size']} steps, {shard['num_samplable']} samplable", highlight=False)
    join = found["join"]
    for topic, buckets in join["ledger"].items():
        counts = ", ".join(f"{n:,} {bucket}" for bucket, n in sorted(buckets.items(), key=lambda item: -item[1]) if n)
        console.print(f"{topic}: {counts or 'none'}", highlight=False)
    shares = {"unmatched feedback": "unmatched_feedback_share", "never shown": "never_shown_share", "late feedback": "late_feedback_share"}
    console.print("; ".join(f"{name} {_percent(join[key])}" for name, key in shares.items()), highlight=False)
    of = sum(join["label_delay_s"].values())
    delays = ", ".join(f"{name} s {_percent(n / of)}" for name, n in join["label_delay_s"].items() if n) or "no step yet"
    console.print(f"label delay: {delays}", highlight=False)
    refused = ", ".join(f"{n:,} {what}" for what, n in sorted(join["refusals"].items(), key=lambda item: -item[1]) if n)
    console.print(f"refused by these processes: {refused or 'none'}; of all times: esrl dlq list", highlight=False)


def _workers(workers: Mapping[str, Status], now_ms: int) -> Table:
    table = Table("worker", "", "commit", "committed (UTC)", "ago", "commit took", "care took", "steps", "steps/s", box=box.SIMPLE_HEAD)
    for name, worker in workers.items():
        if "commit" not in worker:
            table.add_row(name, worker["source"])
            continue
        at = worker["committed_ms"]
        when = datetime.fromtimestamp(at / 1e3, UTC).strftime("%Y-%m-%d %H:%M:%S") if at else "never"
        took = [f"{worker[key]:.2f} s" if key in worker else "-" for key in ("commit_s", "tidy_s")]
        rate = "-" if worker["steps_per_s"] is None else f"{worker['steps_per_s']:,.1f}"
        ago = f"{(now_ms - at) / 1e3:,.0f} s" if at else "-"
        age_s = (now_ms - worker.get("looked_ms", now_ms)) / 1e3
        state = worker.get("error") or worker["source"] + (f", {age_s:,.0f} s ago" if age_s > OLD_S else "")
        table.add_row(name, state, str(worker["commit"]), when, ago, *took, f"{worker['steps_closed']:,}", rate)
    return table


def _partitions(workers: Mapping[str, Status], now_ms: int) -> Table:
    table = Table("partition", "worker", "lag by topic", "watermark behind", "open sessions", box=box.SIMPLE_HEAD)
    rows = []
    for name, worker in workers.items():
        for partition, watermark_ms in worker.get("watermarks_ms", {}).items():
            lags = {where.rpartition("/")[0]: n for where, n in worker["lag"].items() if where.rpartition("/")[2] == str(partition)}
            lag = ", ".join(f"{topic} {n:,}" for topic, n in sorted(lags.items())) or "unknown"
            behind = f"{(now_ms - watermark_ms) / 1e3:,.1f} s" if watermark_ms > 0 else "no event yet"
            rows.append((int(partition), name, lag, behind, f"{worker['open_sessions'][partition]:,}"))
    for partition, *cells in sorted(rows):
        table.add_row(str(partition), *map(str, cells))
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
