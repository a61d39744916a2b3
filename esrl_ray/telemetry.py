"""Every metric of the project, declared once: `esrl_<noun>_<what>_<unit>`. Exported by Ray's own metrics agent."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

COUNTERS = {
    "esrl_request_handled_total": ("Requests answered, by arm and status.", ("arm", "status")),
    "esrl_decision_spooled_total": ("Decisions written to disk because Kafka was down.", ()),
    "esrl_event_settled_total": ("Events settled, by topic and ledger bucket.", ("topic", "bucket")),
    "esrl_event_refused_total": ("Records refused, by topic and code of the reason.", ("topic", "code")),
    "esrl_step_closed_total": ("Steps closed by the join.", ("worker",)),
    "esrl_step_label_delay_total": ("Steps closed, by seconds from decision to close (a class such as <=10).", ("seconds",)),
    "esrl_log_commits_total": ("Commits to the step log.", ("worker",)),
    "esrl_learner_gradient_steps_total": ("Gradient steps.", ()),
    "esrl_learner_samples_total": ("Transitions sampled.", ()),
    "esrl_policy_published_total": ("Policies that passed the gate.", ()),
    "esrl_policy_judged_total": ("Verdicts of the second tier, by outcome.", ("outcome",)),
    "esrl_policy_rejected_total": ("Policies that the gate or the store refused.", ()),
}
GAUGES = {
    "esrl_log_commit_seconds": ("Time of the last commit.", ("worker",)),
    "esrl_log_last_commit_seconds": ("Clock minus time of the last commit; a worker without events does not commit.", ("worker",)),
    "esrl_log_tidy_seconds": ("Time of the last care of the table: merging, checkpoint, clean-up.", ("worker",)),
    "esrl_kafka_lag_events": ("Records that no commit has.", ("topic", "partition")),
    "esrl_kafka_lag_age_seconds": ("Since a worker looked at its lag, every commit interval: it grows while a commit hangs.", ("worker",)),
    "esrl_watermark_behind_seconds": ("Clock minus watermark.", ("partition",)),
    "esrl_session_open_count": ("Open sessions.", ("partition",)),
    "esrl_replay_size_steps": ("Steps in the buffer.", ("shard",)),
    "esrl_policy_served_version": ("Version that a replica serves.", ("replica",)),
    "esrl_learner_critic_loss": ("Mean critic loss of the last call.", ()),
    "esrl_learner_actor_loss": ("Mean actor loss of the last call.", ()),
    "esrl_learner_outside_share": ("Share of actions outside the bounds.", ()),
}
HISTOGRAMS = {
    "esrl_request_latency_seconds": ("Time in the replica.", (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0), ()),
    "esrl_policy_swap_seconds": ("Published to served, per replica.", (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0), ()),
}


class Telemetry:
    """The metrics of one process. Construct it in a process that is connected to Ray."""

    def __init__(self) -> None:
        self._counters = {n: Counter(n, description=d, tag_keys=t) for n, (d, t) in COUNTERS.items()}
        self._gauges = {n: Gauge(n, description=d, tag_keys=t) for n, (d, t) in GAUGES.items()}
        self._histograms = {n: Histogram(n, description=d, boundaries=list(b), tag_keys=t) for n, (d, b, t) in HISTOGRAMS.items()}

    def count(self, name: str, amount: float = 1.0, **tags: str) -> None:
        """Add to a counter; adding 0 is allowed and does nothing."""
        if amount > 0:
            self._counters[name].inc(amount, tags)

    def gauge(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge."""
        self._gauges[name].set(value, tags)

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Add one observation to a histogram."""
        self._histograms[name].observe(value, tags)


def log_change(logger: logging.Logger, what: str, facts: Mapping[str, object]) -> None:
    """One line per change of state: `what key=value ...`."""
    logger.info("%s %s", what, " ".join(f"{k}={v}" for k, v in facts.items()))
