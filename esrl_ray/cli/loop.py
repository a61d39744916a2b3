"""The whole loop on one machine, on real parts; then the report."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle

from esrl_ray import actors
from esrl_ray.cli import learning, parts
from esrl_ray.cli.clock import clock_ms
from esrl_ray.cli.collect import Glance, Readings, glance_at, make_report
from esrl_ray.cli.live import open_view
from esrl_ray.cli.local import LocalRun, RayWatch, local_run, own_folder, pss_bytes, say, start_ray
from esrl_ray.cli.traffic import TrafficPart
from esrl_ray.config import Config
from esrl_ray.errors import BrokerError, LoopError
from esrl_ray.evaluation.report import Report, interval_text, promises, write_report
from serve.app import check_free, deploy_local, serve_environment, stop_local
from serve.deployment import policy_store
from streaming.broker import EmbeddedBroker, end_offsets, ensure_topics

POLL_S = 1.0
MEMORY_EVERY_S = 10.0
GLANCE_EVERY_S = 20.0
DRAIN_S = 30.0
FIRST_DECISION_S = 120.0


@dataclass
class Loop:
    """Handles of the running parts."""

    config: Config
    run: LocalRun
    broker: EmbeddedBroker | None
    ray_watch: RayWatch
    store: ActorHandle
    shards: list[ActorHandle]
    workers: dict[str, ActorHandle]
    learner: ActorHandle
    traffic: ActorHandle
    readings: Readings
    told: set[str] = field(default_factory=set)

    def check(self) -> None:
        """Raise when something that cannot come back has ended."""
        if self.broker is not None and not self.broker.alive:
            raise BrokerError("the embedded broker ended", str(self.run.folder / "broker"), "read its log there")
        self.ray_watch.check()

    def poll(self) -> dict[str, Any]:
        """One reading of every part's status; a part that is being restarted is left out."""
        calls: dict[str, ActorHandle] = {**self.workers, "learner": self.learner, "traffic": self.traffic}
        calls |= {f"replay-{i}": shard for i, shard in enumerate(self.shards)}
        refs = {name: handle.status.remote() for name, handle in calls.items()}
        ready, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=POLL_S)
        statuses: dict[str, Any] = {}
        for name, ref in refs.items():
            if ref in ready:
                try:
                    statuses[name] = ray.get(ref)
                except ray.exceptions.RayActorError as error:
                    if name not in self.told:
                        say(f"{name} is being restarted: {str(error).splitlines()[0]}")
                        self.told.add(name)
                    continue
                self.told.discard(name)
                if fatal := statuses[name].get("error"):
                    raise LoopError(f"{name} cannot go on: {fatal}")
        self.readings.add(statuses)
        return statuses


def run_demo(config: Config, data: Path | None) -> Report:
    """Run the loop and write its report.

    Args:
        config: Deployment; `run.dir` is cleared of an older run.
        data: Folder of a real log, or None for simulated input.

    Raises:
        EsrlError: a part that cannot come back ended, or something cannot be started.
    """
    began = time.monotonic()
    if config.serve.port:
        check_free(config.serve.host, config.serve.port)  # again when it is bound, but a port in use should not cost a minute
    if data is not None:
        from esrl_ray.simulation.kuairand import prepare

        prepare(config, data, say=say)
    with own_folder(config.run.path) as lock:
        try:
            with local_run(config.run.path, lock) as run:
                readings = run_loop(config, run, data, began=began)
        except ray.exceptions.RayError as error:
            raise LoopError(f"Ray ended: {str(error).strip().splitlines()[0]}", "this machine") from error
        report = make_report(config, readings, data=data, say=say)
        json_file, html_file = write_report(report, config.run.path)
    for promise in promises(report):
        say(f"{'kept  ' if promise.kept else 'BROKEN' if not promise.timed else 'slow  '}  {promise.text}: {promise.value}")
    if (frozen := report.frozen) is not None:
        say(f"frozen evaluation: control {frozen.control:.2f}, final {frozen.final:.2f}, difference {interval_text(frozen.difference)}")
    say(f"report: {html_file} and {json_file}")
    return report


def run_loop(config: Config, run: LocalRun, data: Path | None, *, began: float) -> Readings:
    """Start every part, let the traffic run, close in order, and return what was seen.

    Raises:
        LoopError, BrokerError: a part that cannot come back ended.
    """
    with ExitStack() as stack:
        broker = None
        if config.kafka.bootstrap_servers is None:
            broker = stack.enter_context(EmbeddedBroker.start(run.folder / "broker", say=say))
            changes: dict[str, Any] = {"bootstrap_servers": broker.bootstrap_servers}
        else:  # topics of this run only: an older run's events would not be ours to count
            changes = {
                "decisions_topic": f"{config.kafka.decisions_topic}.{run.id}",
                "feedback_topic": f"{config.kafka.feedback_topic}.{run.id}",
            }
            say(f"topics on {config.kafka.bootstrap_servers}: {', '.join(changes.values())}")
        config = config.model_copy(update={"kafka": config.kafka.model_copy(update=changes)})
        ensure_topics(config.kafka)
        say(f"Kafka is up ({time.monotonic() - began:.0f} s)")
        start_ray(run, serve_environment(run.temporary / "ha"))
        say(f"Ray is up ({time.monotonic() - began:.0f} s)")
        watch = RayWatch(run)
        store = policy_store(config)
        traffic = actors.spawn("traffic", TrafficPart, config, data, max_concurrency=16)
        url = deploy_local(config)  # first: everything else may come up while the first decisions are served
        say(f"serving at {url} ({time.monotonic() - began:.0f} s)")
        running = traffic.run.remote(url)
        shards = learning.replay_shards(config)
        workers = parts.spawn_ingest(config, shards)
        learner = learning.spawn_learner(config, store, shards)
        loop = Loop(config, run, broker, watch, store, shards, workers, learner, traffic, Readings(config=config, started_ms=clock_ms()))
        drive(loop, running)
        return loop.readings


def check_running(running: ray.ObjectRef) -> None:
    """Raise LoopError when the traffic ended with an error, or never began."""
    if ray.wait([running], timeout=0)[0]:
        try:
            ray.get(running)
        except ray.exceptions.RayError as error:
            raise LoopError(f"the traffic ended: {str(error).strip().splitlines()[-1]}", "traffic") from error


def drive(loop: Loop, running: ray.ObjectRef) -> None:
    """Let the traffic run for its time, or to the end of its input, and watch."""
    config, readings = loop.config, loop.readings
    deadline = time.monotonic() + FIRST_DECISION_S
    while not (first_ms := actors.ask(loop.traffic.first_decision_ms.remote)):
        loop.check()
        check_running(running)
        if time.monotonic() > deadline:
            raise LoopError(f"no decision was served within {FIRST_DECISION_S:.0f} s", "traffic", f"status: {loop.poll()}")
        time.sleep(0.1)
    readings.first_decision_ms = first_ms
    readings.seconds_to_first_decision = first_ms / 1e3 - psutil.Process().create_time()
    end = time.monotonic() + config.demo.seconds
    next_memory, next_glance = 0.0, time.monotonic() + GLANCE_EVERY_S
    glance = Glance()
    glancing: Future[Glance] | None = None
    with open_view() as view, ThreadPoolExecutor(1) as background:
        while (now := time.monotonic()) < end:
            loop.check()
            check_running(running)
            statuses = loop.poll()
            if now >= next_memory:
                readings.peak_rss_bytes = max(readings.peak_rss_bytes, pss_bytes(loop.run))
                next_memory = now + MEMORY_EVERY_S
            if now >= next_glance and (glancing is None or glancing.done()):
                if glancing is not None and (problem := glancing.exception()) is not None:
                    say(f"the live view keeps older numbers: {problem}")
                elif glancing is not None:
                    glance = glancing.result()
                manifests, published = (actors.ask(call.remote, otherwise={}) for call in (loop.store.manifests, loop.store.published_ms))
                glancing = background.submit(
                    glance_at, readings.frozen(manifests=list(manifests), published_ms=published, stop_ms=clock_ms())
                )
                next_glance = now + GLANCE_EVERY_S
            view.update(readings.live(glance, seconds_left=end - now))
            if statuses.get("traffic", {}).get("finished"):
                say("the input is at its end")
                break
            time.sleep(POLL_S)
    readings.stop_ms = clock_ms()
    close(loop, running)


def close(loop: Loop, running: ray.ObjectRef) -> None:
    """Stop the traffic, flush, read to the end offsets, commit, and take the last readings."""
    config, readings = loop.config, loop.readings
    say("closing: stopping the traffic")
    actors.insist(loop.traffic.stop.remote)
    ray.get(running, timeout=60.0)
    readings.add({"traffic": actors.insist(loop.traffic.status.remote, True)})
    readings.replicas = stop_local(config)
    say("closing: reading to the end offsets")
    readings.end_offsets = {f"{topic}/{partition}": offset for (topic, partition), offset in end_offsets(config.kafka).items()}
    for name, worker in loop.workers.items():
        readings.add({name: actors.insist(worker.drain.remote, readings.end_offsets, DRAIN_S)})
    actors.insist(loop.learner.halt.remote)
    for i, shard in enumerate(loop.shards):
        actors.insist(shard.catch_up.remote)
        readings.add({f"replay-{i}": actors.insist(shard.status.remote)})
    readings.add({"learner": actors.insist(loop.learner.status.remote)})
    readings.manifests = actors.insist(loop.store.manifests.remote)
    readings.published_ms = actors.insist(loop.store.published_ms.remote)
