"""`report.html`: one file, one column, no scripts, nothing fetched."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

from matplotlib.figure import Figure

from esrl_ray.evaluation import plots
from esrl_ray.evaluation.report import Delay, Details, Interval, Percentiles, Report, interval_text, promises
from esrl_ray.vocabulary import Bucket

STYLE = """
:root { color-scheme: light; --ink: #1f2933; --muted: #66727f; --line: #e4e8ec; --soft: #f6f8fa; --good: #0b7a5c; --bad: #b42318;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 47rem; background: #fff; color: var(--ink);
  font: 16px/1.55 var(--sans) }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .35rem } p { margin: .35rem 0 .8rem }
.muted, figcaption, th { color: var(--muted) }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1.5rem 0 }
.tile { flex: 1 1 7.2rem; background: var(--soft); border-radius: .6rem; padding: .7rem .85rem }
.tile b { display: block; font-size: 1.4rem; line-height: 1.25 }
.tile span { display: block; font-size: .82rem; line-height: 1.35; color: var(--muted) }
figure { margin: .8rem 0 } figure svg { width: 100%; height: auto; display: block } figcaption { font-size: .88rem; margin-top: .2rem }
svg text { font-family: var(--sans) !important }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .9rem; margin: .6rem 0 }
th, td { text-align: right; padding: .32rem .5rem; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums;
  white-space: nowrap }
th { font-weight: 500 } th:first-child, td:first-child { text-align: left; white-space: normal; padding-left: 0 }
.kept { color: var(--good) } .broken { color: var(--bad); font-weight: 600 }
pre { background: var(--soft); border-radius: .6rem; padding: .8rem 1rem; overflow-x: auto; font-size: .8rem; line-height: 1.4 }
summary { cursor: pointer }
"""


def render_page(report: Report) -> str:
    """The report as one HTML document.

    Args:
        report: With or without `details`; a plot without data is left out.
    """
    details = report.details or Details()
    parts = [
        _head(report, details),
        _tiles(report),
        _promises(report),
        _learning(report, details),
        _weights(details),
        _delays(report, details),
        _events(report),
        _run(report, details),
    ]
    head = f"<title>{escape(details.title)}</title>\n<style>{STYLE}</style>"
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{meta}\n{head}</head>\n<body>\n{body}\n</body></html>\n'


def _head(report: Report, details: Details) -> str:
    facts = [f"{report.seconds:.0f} s", details.started, f"configuration {details.config_digest[:12]}" if details.config_digest else ""]
    notes = "".join(f"<p>{escape(note)}</p>" for note in details.notes)
    return f'<h1>{escape(details.title)}</h1>\n<p class="muted">{escape(" · ".join(f for f in facts if f))}</p>{notes}'


def _tiles(report: Report) -> str:
    tiles = [(f"{report.requests:,}", f"requests, {report.requests_failed:,} failed")]
    if report.frozen is not None:
        gain = report.frozen.final / report.frozen.control - 1 if report.frozen.control else 0.0
        tiles.append((f"{gain:+.0%}", "reward per session, final policy against control"))
    tiles += [
        (_milliseconds(report.latency_ms.p99), "request latency, 99th percentile"),
        (_seconds(report.loop_delay_s.p99), "loop delay, 99th percentile"),
        (f"{report.versions_served:,}", "policy versions served"),
    ]
    return (
        '<div class="tiles">' + "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in tiles) + "</div>"
    )


def _promises(report: Report) -> str:
    rows = []
    for promise in promises(report):
        verdict = "kept" if promise.kept else "broken"
        mark = f'<span class="{verdict}">{"✓ kept" if promise.kept else "✗ broken"}</span>'
        rows.append((escape(promise.text), escape(promise.value), mark))
    return "<h2>What the loop promises</h2>\n" + _table(("", "this run", ""), rows)


def _learning(report: Report, details: Details) -> str:
    out = ["<h2>Did it learn?</h2>"]
    if report.frozen is not None:
        difference = report.frozen.difference
        out.append(
            f"<p>On {difference.sessions:,} simulated sessions that it had never seen, the final policy earns {report.frozen.final:.2f} "
            f"per session and control {report.frozen.control:.2f}: a difference of <b>{interval_text(difference)}</b>. "
            "Both meet the same users and the same luck, and neither explores.</p>"
        )
    if details.frozen and report.frozen is not None:
        caption = "Frozen policies on the same sessions, by when they were published. The band is the 95 % interval of the mean."
        out.append(_figure(plots.frozen_plot(details.frozen, report.frozen.control), "frozen", caption))
    if report.kuairand is not None:
        out.append(
            "<p>Ranking quality on real sessions that no policy was trained on: it checks the plumbing and is no claim about learning.</p>"
        )
        for grouping, gaucs in report.kuairand.items():
            rows = [
                (escape(g.policy), interval_text(Interval(g.gauc, g.ci_low, g.ci_high, g.units), form=".4f"), f"{g.units:,}") for g in gaucs
            ]
            out.append(_table((f"GAUC by {escape(grouping.replace('_', ' '))}", "mean, 95 % interval", "units"), rows))
    if details.arms:
        caption = (
            "What live users brought, by arm. Explore is the anchor with noise, exploit the newest policy, control the hand-made one. "
            "Bands are 95 % intervals, clustered by user."
        )
        out.append(_figure(plots.arms_plot(details.arms), "arms", caption))
    if report.reward_per_session:
        rows = [(escape(arm), interval_text(r, form=".2f"), f"{r.sessions:,}") for arm, r in report.reward_per_session.items()]
        out.append(_table(("arm", "reward per session, 95 % interval", "sessions"), rows))
    if details.losses:
        caption = (
            "Losses during the run: each learner call (pale) and its moving mean. A rising share outside the bounds means that the "
            "actor leaves the region that was explored."
        )
        out.append(_figure(plots.losses_plot(details.losses), "losses", caption))
    return "\n".join(out) if len(out) > 1 else ""


def _weights(details: Details) -> str:
    if not details.weights and not details.segments:
        return ""
    out = [
        "<h2>Fusion weights</h2>",
        "<p>Each pair of user and item gets its own power and bias for each upstream score. These were served to the exploit arm.</p>",
    ]
    if details.weights:
        caption = "Means over the pairs that each policy version served. A high power means that the score decides more."
        out.append(_figure(plots.weights_plot(details.weights, details.score_names), "weights", caption))
    if details.segments:
        caption = (
            "Mean powers for the low, middle and high third of the users and items along a feature. A flat line means that the feature "
            "does not matter to that weight."
        )
        out.append(_figure(plots.segments_plot(details.segments, details.score_names), "segments", caption))
    return "\n".join(out)


def _delays(report: Report, details: Details) -> str:
    delay = report.loop_delay_s
    out = [
        "<h2>How fast is the loop?</h2>",
        f"<p>A step is closed {_seconds(report.label_delay_s.p50)} (median) after its list was asked for, when its labels are old enough. "
        "From then until all replicas serve a policy that could learn from it: "
        f"median <b>{_seconds(delay.p50)}</b>, 99th percentile <b>{_seconds(delay.p99)}</b>. "
        f"Of {delay.steps:,} steps, {delay.never_served:,} never came round.</p>",
    ]
    if details.waterfall:
        out.append(
            _figure(
                plots.waterfall_plot(details.waterfall),
                "waterfall",
                (
                    "Median time in each stage (bar) and its 99th percentile (line). A step is drawable when what follows it is known: its "
                    "next list has been closed and inserted too, or the user has left."
                ),
            )
        )
        rows = [(escape(s.name), _seconds(s.seconds.p50), _seconds(s.seconds.p99), *_since(s.since_closed_s)) for s in details.waterfall]
        out.append(_table(("stage", "median", "99th", "since closed: median", "99th", "never"), rows))
    out.append(
        f"<p>Requests take {_pair(report.latency_ms, 'ms')}; a published policy is served by all replicas after "
        f"{_pair(report.swap_ms, 'ms')} (median, 99th percentile).</p>"
    )
    if details.request_latency_ms is not None:
        out.append(
            _figure(
                plots.latency_plot(details.request_latency_ms),
                "latency",
                "Latency of list requests as the client saw it; the scale is logarithmic.",
            )
        )
    return "\n".join(out)


def _events(report: Report) -> str:
    topics = report.ledger.topics
    names = ["produced", *(b.value for b in Bucket)]
    totals = {name: sum(row.get(name, 0) for row in topics.values()) for name in names}
    rows = [(name.replace("_", " "), *(f"{row.get(name, 0):,}" for row in topics.values()), f"{totals[name]:,}") for name in names]
    verdict = (
        "The buckets sum to what was produced."
        if report.ledger.closes
        else '<span class="broken">The buckets do not sum to what was produced.</span>'
    )
    text = f"<p>Every event that the broker acknowledged, in exactly one bucket. {verdict}</p>"
    return "<h2>Ledger of events</h2>\n" + text + _table(("", *(escape(t) for t in topics), "all"), rows)


def _run(report: Report, details: Details) -> str:
    rows = [
        ("steps closed, logged, inserted", f"{report.steps.closed:,}, {report.steps.logged:,}, {report.steps.inserted:,}"),
        ("steps in the replay buffer", f"{report.replay_size:,}"),
        ("gradient steps", f"{report.learner.gradient_steps:,} ({report.learner.steps_per_s:.1f} per second)"),
        ("transitions sampled", f"{report.learner.samples:,}"),
        ("policies published, versions served", f"{report.policies_published:,}, {report.versions_served:,}"),
        ("decisions, feedback", f"{report.decisions:,}, {report.feedback:,}"),
        ("largest memory", f"{report.peak_rss_bytes / 1e9:.2f} GB"),
        ("command to first served decision", f"{report.seconds_to_first_decision:.1f} s"),
        *((escape(name), escape(version)) for name, version in details.packages.items()),
    ]
    out = ["<h2>The run in numbers</h2>", _table(("", ""), rows)]
    if details.settings:
        pretty = escape(json.dumps(details.settings, indent=1))
        out.append(
            f'<details><summary class="muted">Configuration, sha256 {escape(details.config_digest)}</summary><pre>{pretty}</pre></details>'
        )
    return "\n".join(out)


def _figure(figure: Figure, name: str, caption: str) -> str:
    label = escape(caption, quote=True)
    return f'<figure role="img" aria-label="{label}">{plots.svg(figure, name)}<figcaption>{escape(caption)}</figcaption></figure>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "<tr>" + "".join(f"<th>{cell}</th>" for cell in header) + "</tr>" if any(header) else ""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>{head}{body}</table></div>'


def _since(delay: Delay) -> tuple[str, str, str]:
    return _seconds(delay.p50), _seconds(delay.p99), f"{delay.never_served:,}"


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f} s"


def _milliseconds(value: float | None) -> str:
    return "none" if value is None else f"{value:.0f} ms"


def _pair(both: Percentiles, unit: str) -> str:
    return ", ".join("none" if v is None else f"{v:.1f} {unit}" for v in (both.p50, both.p99))
