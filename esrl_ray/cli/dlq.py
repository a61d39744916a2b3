"""`esrl dlq`: which records were refused and why, and sending them again once the cause is gone."""

from __future__ import annotations

import functools
import json
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from esrl_ray.config import Config, load_config
from esrl_ray.vocabulary import Refusal
from streaming.redrive import Letter, Redriver, read_letters

TOPICS = ("decisions", "feedback")
EXCERPT_BYTES = 120


@click.group("dlq")
def dlq_group() -> None:
    """Look at dead letters, the records that were refused, and send them again."""


def _selection(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say which letters; the command gets the configuration, the topics by name, and a test for a letter."""

    @click.option("--config", "path", default="configs/online.yaml", show_default=True, help="YAML of the deployment.")
    @click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value, e.g. kafka.bootstrap_servers=...")
    @click.option("--topic", type=click.Choice(TOPICS), multiple=True, help="Only letters of this topic.")
    @click.option("--code", type=click.Choice([code.value for code in Refusal]), multiple=True, help="Only letters with this reason.")
    @click.option("--partition", type=click.IntRange(min=0), help="Only records that stood in this partition.")
    @click.option("--from-offset", type=click.IntRange(min=0), default=0, help="Only records from this offset on.")
    @click.option("--to-offset", type=click.IntRange(min=0), help="Only records below this offset.")
    @click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
    @functools.wraps(command)
    def with_selection(
        *,
        path: str,
        overrides: tuple[str, ...],
        topic: tuple[str, ...],
        code: tuple[str, ...],
        partition: int | None,
        from_offset: int,
        to_offset: int | None,
        **options: Any,
    ) -> None:
        config = load_config(path, overrides, environment=os.environ)
        names = {"decisions": config.kafka.decisions_topic, "feedback": config.kafka.feedback_topic}

        def selected(letter: Letter) -> bool:
            return (
                (not code or letter.code in code)
                and partition in (None, letter.partition)
                and from_offset <= letter.offset
                and (to_offset is None or letter.offset < to_offset)
            )

        command(config, [names[t] for t in topic or TOPICS], selected, **options)

    return with_selection


@dlq_group.command("list")
@click.option("--samples", type=click.IntRange(min=0), default=1, show_default=True, help="Newest letters to show of each reason.")
@_selection
def list_letters(config: Config, topics: list[str], selected: Callable[[Letter], bool], *, samples: int, as_json: bool) -> None:
    """Count letters by topic, reason and partition, and show some. A letter that came twice (its worker died) counts once."""
    found = summarise((letter for topic in topics for letter in read_letters(config.kafka, topic)), selected, samples=samples)
    if as_json:
        click.echo(json.dumps(found))
        return
    console = Console()
    counts, shown = _table("topic", "code"), _table("topic[partition]@offset", "reason", "value")
    for name in ("letters", "sent again", "refused before", "cannot be sent"):
        counts.add_column(name, justify="right")
    counts.add_column("partitions", overflow="fold")
    for row in found:
        partitions = " ".join(f"{p}:{n}" for p, n in row["partitions"].items())
        counts.add_row(row["topic"], row["code"], *(f"{row[k]:,}" for k in ("letters", "redriven", "attempted", "unfit")), partitions)
        for sample in row["samples"]:
            shown.add_row(f"{row['topic']}[{sample['partition']}]@{sample['offset']}", sample["error"], sample["value"])
    console.print(counts)
    if shown.row_count:
        console.print(shown)
    click.echo(f"{sum(row['letters'] for row in found):,} letters, {sum(row['redriven'] for row in found):,} of them sent again")


@dlq_group.command("redrive")
@click.option("--limit", type=click.IntRange(min=1), help="At most this many records in all.")
@click.option("--max-attempts", type=click.IntRange(min=1), default=3, show_default=True, help="Leave out what was sent this often.")
@click.option("--dry-run", is_flag=True, help="Count what would be sent.")
@_selection
def redrive(
    config: Config,
    topics: list[str],
    selected: Callable[[Letter], bool],
    *,
    limit: int | None,
    max_attempts: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Send refused records back to their topic, with their key and bytes, each letter once, however often this runs.

    Do it when the cause is gone: what is refused again becomes a new letter, and above kafka.max_dead_letter_share the worker stops.
    Letters that were truncated, are larger than any event, or have neither key nor value stay: `esrl dlq list` counts them.
    """
    sent: dict[str, int] = {}
    for topic in topics:
        left = None if limit is None else limit - sum(sent.values())

        def wanted(letter: Letter) -> bool:
            return selected(letter) and letter.attempts < max_attempts

        if dry_run:
            found = summarise(read_letters(config.kafka, topic), wanted, samples=0)
            waiting = sum(row["letters"] - row["redriven"] - row["unfit"] for row in found)
            sent[topic] = waiting if left is None else min(waiting, left)
        elif left != 0:
            with closing(Redriver(config.kafka, topic)) as redriver:
                sent[topic] = redriver.run(wanted, limit=left)
    if as_json:
        click.echo(json.dumps({"dry_run": dry_run, "sent": sent}))
    else:
        click.echo("\n".join(f"{topic}: {n:,} records {'would be' if dry_run else 'were'} sent again" for topic, n in sent.items()))


def summarise(letters: Iterable[Letter], selected: Callable[[Letter], bool], *, samples: int) -> list[dict[str, Any]]:
    """Rows by (topic, code), in that order: distinct letters, how many were redriven, had been before, cannot be; by partition, the newest.

    Args:
        letters: With repetitions and marks.
        selected: Which to count.
        samples: How many of the newest to keep of each row.
    """
    codes: dict[tuple[str, int, int, int], tuple[str, str]] = {}  # of the letters counted
    marked: set[tuple[str, int, int, int]] = set()
    attempted, unfit = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    partitions: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)
    newest: dict[tuple[str, str], deque[Letter]] = defaultdict(lambda: deque(maxlen=samples))
    for letter in letters:
        if letter.is_mark:
            marked.add(letter.place)
        elif letter.place not in codes and selected(letter):
            row = codes[letter.place] = letter.topic, letter.code
            attempted[row] += letter.attempts > 0
            unfit[row] += not letter.can_be_sent
            partitions[row][letter.partition] += 1
            newest[row].append(letter)
    redriven = Counter(row for place, row in codes.items() if place in marked)
    return [
        {
            "topic": row[0],
            "code": row[1],
            "letters": partitions[row].total(),
            "redriven": redriven[row],
            "attempted": attempted[row],
            "unfit": unfit[row],
            "partitions": {str(p): n for p, n in sorted(partitions[row].items())},
            "samples": [_sample(letter) for letter in newest[row]],
        }
        for row in sorted(partitions)
    ]


def _sample(letter: Letter) -> dict[str, Any]:
    return {
        "partition": letter.partition,
        "offset": letter.offset,
        "error": letter.error,
        "key": None if letter.key is None else letter.key.decode(errors="replace"),
        "value": (letter.value or b"")[:EXCERPT_BYTES].decode(errors="backslashreplace"),
    }


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
