"""What a judgement of the second tier costs and what it can tell, by the number of lists, in the simulator.

OMP_NUM_THREADS=1 python -m benchmarks.second_tier [--lists 5000 20000 60000] [--updates 0 600] [--logs 3]

Candidates against control: a policy learnt on 5,000 steps of other traffic, and a planted vector that favours clicks.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from benchmarks.estimators import LEARN_SEED, LOG_SEED, TRUTH_SEED, make_log
from benchmarks.rows import RESULTS, ROOT, commit
from esrl_ray.config import Config, load_config
from esrl_ray.evaluation.frozen import play
from esrl_ray.evaluation.offline import Settings
from esrl_ray.evaluation.second_tier import Rule, judge_second_tier
from esrl_ray.methods.catalogue import create_method
from esrl_ray.policy.policy import Policy
from esrl_ray.simulation.rounds import learn_online

LEARN_STEPS = 5_000
SESSIONS = 4_000


def candidates(config: Config) -> dict[str, Policy]:
    """One that is better than control, and one that is worse."""
    spec = config.spec.build()
    clicks = np.zeros(spec.num_actions, np.float32)
    clicks[: spec.num_scores] = (0.5, -0.25, -0.25, -0.125, -0.1)
    learning = learn_online(create_method("enhancedrl", config, seed=0), config, seed=LEARN_SEED, num_steps=LEARN_STEPS)
    *_, (_, learnt) = learning
    return {"learnt": learnt, "clicks": Policy.static(spec, clicks)}


def main() -> None:
    """Write benchmarks/results/second_tier.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lists", type=int, nargs="+", default=[5_000, 20_000, 60_000])
    parser.add_argument("--updates", type=int, nargs="+", default=[0, 600])
    parser.add_argument("--logs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "second_tier.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    code = commit()  # of what runs, not of what is there when it ends
    demo = ROOT / "configs" / "demo.yaml"
    config = load_config(demo, ["exploration.explore_share=1", "exploration.exploit_share=0"])
    control, judged = Policy.static(config.spec.build()), candidates(load_config(demo))
    base = play(control, config, seed=TRUTH_SEED, sessions=SESSIONS)[0]
    gains = {name: float((play(p, config, seed=TRUTH_SEED, sessions=SESSIONS)[0] - base).mean()) for name, p in judged.items()}
    text = [
        "# The second tier: cost and verdicts by the number of lists",
        "",
        f"Commit {code}; 2 shared CPU cores, one thread; the demo's world; {arguments.logs} logs (seeds from {LOG_SEED}) of explore "
        f"traffic around control; control earns {base.mean():.1f} per session. Made by `python -m benchmarks.second_tier`.",
        "",
        "| lists | gradient steps of the features | candidate | its real gain | pass | abstain | block | estimated gains | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for lists in arguments.lists:
        logs = [make_log(config, [control], seed=LOG_SEED + i, num_steps=lists) for i in range(arguments.logs)]
        for updates in arguments.updates:
            for name, candidate in judged.items():
                started, verdicts = time.process_time(), []
                for seed, steps in enumerate(logs):
                    rule, settings = Rule(held_out_share=1.0), Settings(num_updates=updates)
                    n = config.simulation.num_candidates
                    verdicts.append(
                        judge_second_tier(candidate, control, steps, config, num_candidates=n, seed=seed, rule=rule, settings=settings)
                    )
                seconds = (time.process_time() - started) / len(logs)
                counts = Counter(verdict.outcome for verdict in verdicts)
                told = ", ".join("-" if v.difference is None else f"{v.difference:+.1f} [{v.low:+.1f}, {v.high:+.1f}]" for v in verdicts)
                row = f"| {lists:,} | {updates} | {name} | {gains[name]:+.1f} | {counts['pass']} | {counts['abstain']} | {counts['block']} "
                text.append(f"{row}| {told} | {seconds:.1f} |")
                print(text[-1], flush=True)
    arguments.out.write_text("\n".join([*text, ""]))


if __name__ == "__main__":
    main()
