"""Off-policy estimates against the real value of held-out policies in the simulator: bias, coverage of 95 % intervals, rank correlation.

OMP_NUM_THREADS=1 python -m benchmarks.estimators [--worlds 5 6] [--logs 2] [--steps 20000]

Policies are learnt on traffic that no estimate sees. Each world is logged in two ways, each with several seeds: `control` explores around
the control policy only, `rounds` around control and then three learnt stages. Every finished line is kept in `--work` with its commit
and not made again, nor are the policies: the report names the commits of all that it is made from.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.rows import RESULTS, ROOT, commit, read_rows
from esrl_ray.config import Config, load_config
from esrl_ray.evaluation.estimators import Draws
from esrl_ray.evaluation.frozen import play
from esrl_ray.evaluation.offline import Estimate, OffPolicy, Settings
from esrl_ray.evaluation.support import SupportLimits
from esrl_ray.methods.catalogue import create_method
from esrl_ray.methods.method import Exploration
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import Steps
from esrl_ray.simulation.rounds import SimulatedTraffic, learn_online

STAGES = (5_000, 10_000, 20_000)
TRUTH_SEED, LEARN_SEED, LOG_SEED = 4_000, 100, 200
NAMES = ("fqe", "dr", "conservative", "ncis")


def make_policies(config: Config, folder: Path) -> dict[str, Policy]:
    """Control, stages of EnhancedRL, three random vectors, and one that only looks at clicks; from the folder when they are there."""
    spec = config.spec.build()
    clicks = np.zeros(spec.num_actions, np.float32)
    clicks[: spec.num_scores] = (1, -0.5, -0.5, -0.25, -0.2)
    rng = np.random.default_rng(5)
    policies = {"control": Policy.static(spec), "clicks": Policy.static(spec, clicks)}
    policies |= {f"random {i}": Policy.static(spec, rng.uniform(-0.6, 0.6, spec.num_actions).astype(np.float32)) for i in range(3)}
    missing = [stage for stage in STAGES if not (folder / f"stage-{stage}").exists()]
    if missing:
        for steps, policy in learn_online(create_method("enhancedrl", config, seed=0), config, seed=LEARN_SEED, num_steps=max(STAGES)):
            _, stage = min((abs(stage - steps), stage) for stage in STAGES)
            if abs(stage - steps) < 300 and stage in missing:
                policy.save(folder / f"stage-{stage}")
                missing.remove(stage)
    return policies | {f"learnt {stage}": Policy.load(folder / f"stage-{stage}") for stage in STAGES}


def make_log(config: Config, anchors: Sequence[Policy], *, seed: int, num_steps: int) -> Steps:
    """Traffic in rounds of equal length, one anchor each; the arm `exploit` serves the anchor."""
    bounds, width = config.exploration, config.spec.build().num_actions
    low, high = (np.full(width, bound, np.float32) for bound in (bounds.low, bounds.high))
    traffic = SimulatedTraffic(config, seed=seed, capacity=num_steps)
    for number, anchor in enumerate(anchors):
        until = num_steps * (number + 1) // len(anchors)
        for _ in traffic.serve(Exploration(anchor, low, high, scope=bounds.scope), anchor, until=until, number=number):
            pass
    return traffic.steps


def too_wide(log: OffPolicy, draws: Draws) -> bool:
    """Whether the default limit on intervals refuses an estimate."""
    return Estimate.of(draws).fault(earned=log.earned, limits=SupportLimits()) is not None


class Lines:
    """Finished lines of a file, one JSON object each, by their key; each has the commit of the code that made it."""

    def __init__(self, path: Path, *, code: str) -> None:
        self._path, self._code = path, code
        self.found: dict[str, dict[str, Any]] = {entry["key"]: entry for entry in read_rows(path, dict[str, Any])}

    def commits(self, *keys: str) -> list[str]:
        """Of these lines; those of before commits were kept have none."""
        return [self.found.get(key, {}).get("commit", "not recorded") for key in keys]

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Keep one more."""
        self.found[key] = entry | {"key": key, "commit": self._code}
        with self._path.open("a") as file:
            file.write(json.dumps(self.found[key]) + "\n")


def run(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """One line per world, log, seed and policy, with the commits of all behind it."""
    lines, wanted = Lines(work / "lines.jsonl", code=commit()), []  # of what runs, not of what is there when it ends
    settings = Settings(limits=SupportLimits(0, 0, 0.0, 0.0, 0.0, max_width=1e9), min_effective_sessions=0.0)
    for world in arguments.worlds:
        config = load_config(ROOT / "configs" / "demo.yaml", [f"simulation.world_seed={world}"])
        folder, learnt = work / f"world-{world}", f"policies {world}"
        folder.mkdir(parents=True, exist_ok=True)
        missing = any(not (folder / f"stage-{stage}").exists() for stage in STAGES)
        policies = make_policies(config, folder)
        if missing:
            lines.add(learnt, {})
        truths = {name: f"truth {world} {arguments.sessions} {name}" for name in policies}
        for name, policy in policies.items():
            if (key := truths[name]) not in lines.found:
                reward = play(policy, config, seed=TRUTH_SEED, sessions=arguments.sessions)[0]
                lines.add(key, {"mean": reward.mean(), "se": reward.std() / np.sqrt(len(reward))})
                print(f"{key}: {reward.mean():.2f}", flush=True)
        for kind, anchors in (("control", ["control"]), ("rounds", ["control", *(f"learnt {s}" for s in STAGES)])):
            for seed in range(LOG_SEED, LOG_SEED + arguments.logs):
                keys = {name: f"{world} {kind} {seed} {arguments.steps} {name}" for name in policies}
                wanted += [(key, truths[name], truths["control"], learnt) for name, key in keys.items()]
                if all(key in lines.found for key in keys.values()):
                    continue
                steps = make_log(config, [policies[a] for a in anchors], seed=seed, num_steps=arguments.steps)
                log = OffPolicy(steps, config, num_candidates=config.simulation.num_candidates, seed=seed, settings=settings)
                control = log.value(policies["control"])
                for name, key in keys.items():
                    if key in lines.found:
                        continue
                    start = time.perf_counter()
                    value = control if name == "control" else log.value(policies[name])
                    estimates, differences = value.estimates, {n: d.minus(control.estimates[n]) for n, d in value.estimates.items()}
                    fields = {
                        "world": world,
                        "log": kind,
                        "seed": seed,
                        "policy": name,
                        "support": msgspec.to_builtins(value.support),
                        "effective_sessions": value.effective_sessions,
                        "estimates": {n: msgspec.to_builtins(Estimate.of(d)) for n, d in estimates.items()},
                        "differences": {
                            n: [d.mean, d.bound(0.025), d.bound(0.975), d.bound(0.05), d.bound(0.95)] for n, d in differences.items()
                        },
                        "faults": value.support.faults(SupportLimits()),
                        "wide": [n for n in ("fqe", "dr", "conservative") if too_wide(log, estimates[n])],
                        "seconds": time.perf_counter() - start,
                    }
                    lines.add(key, fields)
                    print(f"{key}: {fields['estimates']['dr']['mean']:.2f} in {fields['seconds']:.0f} s", flush=True)
    return [
        lines.found[key] | {"truth": lines.found[t]["mean"], "control": lines.found[c]["mean"], "commits": lines.commits(key, t, c, learnt)}
        for key, t, c, learnt in wanted
    ]


def table(lines: Sequence[dict[str, Any]], *, supported: bool) -> list[str]:
    """Bias, error, coverage and rank correlation of each estimator, over all lines or over those with support."""
    chosen = [entry for entry in lines if not supported or not entry["faults"]]
    text = ["| estimate | n | bias | RMSE | coverage of 95 % | difference: bias | coverage | Spearman by log: mean (least) |"]
    text.append("|---|---|---|---|---|---|---|---|")
    for name in NAMES:
        of = [entry for entry in chosen if name in entry["estimates"] and not (supported and name in entry["wide"])]
        ranks = _ranks(of, name)
        if not ranks:
            text.append(f"| {name} | {len(of)} |" + " - |" * 6)
            continue
        error = np.array([entry["estimates"][name]["mean"] - entry["truth"] for entry in of])
        covered = [entry["estimates"][name]["ci_low"] <= entry["truth"] <= entry["estimates"][name]["ci_high"] for entry in of]
        others = [entry for entry in of if entry["policy"] != "control"]
        gains = [entry["truth"] - entry["control"] for entry in others]
        found = [entry["differences"][name] for entry in others]
        off = np.array([d[0] - gain for d, gain in zip(found, gains, strict=True)])
        within = [d[1] <= gain <= d[2] for d, gain in zip(found, gains, strict=True)]
        text.append(
            f"| {name} | {len(of)} | {error.mean():+.2f} | {np.sqrt((error**2).mean()):.2f} | {np.mean(covered):.0%} | {off.mean():+.2f} | "
            f"{np.mean(within):.0%} | {np.mean(ranks):.2f} ({np.min(ranks):.2f}) |"
        )
    return text


def _ranks(lines: Sequence[dict[str, Any]], name: str) -> list[float]:
    logs = defaultdict(list)
    for entry in lines:
        logs[entry["world"], entry["log"], entry["seed"]].append((entry["truth"], entry["estimates"][name]["mean"]))
    return [float(spearmanr(*np.array(points).T)[0]) for points in logs.values() if len(points) > 2]


def gate(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What the second tier's rule would say of each policy against control, and what is true."""
    counts: dict[str, dict[str, int]] = {truth: {"pass": 0, "abstain": 0, "block": 0} for truth in ("better", "worse")}
    for entry in lines:
        if entry["policy"] == "control":
            continue
        _, _, _, low, high = entry["differences"]["dr"]
        said = "abstain" if entry["faults"] or "dr" in entry["wide"] else "pass" if low > 0 else "block" if high < 0 else "abstain"
        counts["better" if entry["truth"] > entry["control"] else "worse"][said] += 1
    heading = ["| truly | pass | abstain | block |", "|---|---|---|---|"]
    return heading + [f"| {truth} than control | {c['pass']} | {c['abstain']} | {c['block']} |" for truth, c in counts.items()]


def each(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Every line."""
    text = ["| world | log | seed | policy | truth | fqe | dr | ncis | ESS share | overlap | inside bounds | refused |", "|" + "---|" * 12]
    for entry in lines:
        e, s = entry["estimates"], entry["support"]
        shown = [f"{e[n]['mean']:.1f} [{e[n]['ci_low']:.1f}, {e[n]['ci_high']:.1f}]" for n in ("fqe", "dr", "ncis")]
        text.append(
            f"| {entry['world']} | {entry['log']} | {entry['seed']} | {entry['policy']} | {entry['truth']:.1f} | {' | '.join(shown)} | "
            f"{s['ess_share']:.2f} | {s['overlap']:.2f} | {s['inside_bounds']:.2f} | {'yes' if entry['faults'] else ''} |"
        )
    return text


def main() -> None:
    """Write benchmarks/results/estimators.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, nargs="+", default=[5, 6], help="world seeds; settings were chosen on 0 and 3")
    parser.add_argument("--logs", type=int, default=2, help="seeds per world and kind of log")
    parser.add_argument("--steps", type=int, default=20_000, help="list requests per log")
    parser.add_argument("--sessions", type=int, default=4_000, help="sessions behind each real value")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "estimators", help="finished lines and learnt policies")
    parser.add_argument("--out", type=Path, default=RESULTS / "estimators.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    lines = run(arguments, arguments.work)
    bounds = load_config(ROOT / "configs" / "demo.yaml").exploration
    commits = sorted({found for entry in lines for found in entry["commits"]})
    seconds = np.mean([entry["seconds"] for entry in lines if entry["policy"] != "control"])
    text = [
        "# Off-policy estimates against the truth",
        "",
        f"Commits {', '.join(commits)}; 2 shared CPU cores; worlds {arguments.worlds}, {arguments.logs} logs of each kind "
        f"(seeds from {LOG_SEED}) of {arguments.steps:,} lists; arms explore {bounds.explore_share:.0%}, "
        f"exploit {bounds.exploit_share:.0%}; bounds {bounds.low} to {bounds.high}; real values from {arguments.sessions:,} sessions "
        f"(seed {TRUTH_SEED}, standard error about .4); policies learnt on traffic of seed {LEARN_SEED}; {seconds:.0f} s for a policy. "
        "Reward per session. Made by `python -m benchmarks.estimators`.",
        "",
        "## Where the log supports the policy (none of the default limits is broken)",
        *table(lines, supported=True),
        "",
        "## Everywhere, with the refusals switched off",
        *table(lines, supported=False),
        "",
        "## Second tier: doubly robust, one-sided 95 %, against control",
        *gate(lines),
        "",
        "## Each log and policy",
        *each(lines),
        "",
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(text))
    print("\n".join(text[:-2]))


if __name__ == "__main__":
    main()
