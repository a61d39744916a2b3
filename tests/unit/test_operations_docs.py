"""What README and docs/operations.md name exists: commands with their options, metrics, settings, messages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from esrl_ray.cli.main import cli
from esrl_ray.config import Config
from esrl_ray.section import Section
from esrl_ray.telemetry import COUNTERS, GAUGES, HISTOGRAMS
from esrl_ray.vocabulary import Bucket

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/operations.md")
COMMAND = re.compile(r"(?:`|^|-- )esrl((?: [a-z][a-z|-]*)+)([^`\n#]*)", re.MULTILINE)
SECTIONS = {name: field.annotation for name, field in Config.model_fields.items()}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def named_commands() -> Iterator[tuple[str, list[str], list[str]]]:
    """(page, words, options) of each `esrl ...`; `list|show` are two commands."""
    for page in PAGES:
        for match in COMMAND.finditer(text_of(page)):
            first, *rest = match.group(1).split()
            for second in rest[0].split("|") if rest else [""]:
                yield page, [first, *([second] if second else []), *rest[1:]], re.findall(r"--[a-z][a-z-]+", match.group(2))


def find(words: list[str]) -> click.Command:
    command: click.Command = cli
    context = click.Context(cli, info_name="esrl")
    for word in words:
        if not isinstance(command, click.Group):
            break  # an argument
        found = command.get_command(context, word)
        assert found is not None, f"there is no esrl {' '.join(words)}"
        command, context = found, click.Context(found, info_name=word, parent=context)
    assert command.get_help(context)
    return command


@pytest.mark.parametrize("page", PAGES)
def test_every_command_exists_with_its_options(page: str) -> None:
    found = [(words, options) for where, words, options in named_commands() if where == page]
    assert len(found) > 5
    for words, options in found:
        known = {option for parameter in find(words).params for option in parameter.opts} | {"--help"}
        assert set(options) <= known, f"esrl {' '.join(words)} has no {sorted(set(options) - known)}"


@pytest.mark.parametrize("page", PAGES)
def test_every_metric_is_declared(page: str) -> None:
    named = set(re.findall(r"`(esrl_[a-z_]+(?:_total|_seconds|_events|_count|_steps|_version|_loss|_share))`", text_of(page)))
    assert named <= COUNTERS.keys() | GAUGES.keys() | HISTOGRAMS.keys()
    assert named or page == "README.md"


def test_every_alarm_has_its_page_and_every_setting_exists() -> None:
    text = text_of("docs/operations.md")
    anchors = {re.sub(r"[^a-z -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^##+ (.+)$", text, re.MULTILINE)}
    links = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert len(links) >= 9 and links <= anchors
    for section, key in re.findall(r"`(?:--set )?([a-z]+)\.([a-z_]+)[=`]", text):
        model = SECTIONS.get(section)
        if (section, key) != ("run", "dir") and section in SECTIONS:
            assert isinstance(model, type) and issubclass(model, Section) and key in model.model_fields, f"{section}.{key}"
    assert {"unmatched", "never_shown", "late", "skipped", "dead_letter"} <= {bucket.value for bucket in Bucket}


@pytest.mark.parametrize(
    "message",
    [
        "part crashed; its process ends and Ray starts it again",
        "another worker of this name is running: stop one",
        "was made by another incarnation",
        "step log not tidied commit=",
        "commits are void, their events are read again first=",
        "the step log is not partitioned by date: an older version wrote it",
        "cannot open the step log: ",
        "retention deleted records that were not read",
        "the topic was made anew or cut",
        "are needed again for lists without a row",
        "kafka down for reading reason=",
        "kafka down client=",
        "Kafka does not answer: ",
        "Kafka refuses us: ",
        "the topics cannot be read: ",
        "records were refused, more than kafka.max_dead_letter_share",
        "were dropped by log.retention_days",
    ],
)
def test_every_message_is_one_that_is_printed(message: str) -> None:
    assert message.strip() in text_of("docs/operations.md")
    sources = [path for package in ("streaming", "esrl_ray", "serve") for path in (ROOT / package).rglob("*.py")]
    assert any(message in re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8")) for path in sources)
