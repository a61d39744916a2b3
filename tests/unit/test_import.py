"""`esrl log import`: the join of the live path over files, once whatever happens, with every refused row explained."""

from __future__ import annotations

import gc
import itertools
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from pydantic import SecretStr

from esrl_ray.cli.importing import import_files
from esrl_ray.cli.log import log_group
from esrl_ray.cli.logged import read_log
from esrl_ray.config import Config
from esrl_ray.errors import ConfigError, InputDataError, LogError, StreamError
from esrl_ray.reward import RewardConfig
from esrl_ray.secret import PSEUDONYM_DIGITS, pseudonym
from streaming import files
from streaming.files import Rejects
from streaming.recompute import recompute_rewards
from streaming.records import Record
from streaming.sessions import SessionJoiner
from streaming.steplog import StepLog, WorkerState, commit_history, read_steps
from streaming.steptable import merge_steps, rows_to_table
from streaming.wire import JSON, DecodedDecision, Feedback
from tests.unit.test_sessions import CONFIG, SPEC, T0, decision, feedback

Events = list[DecodedDecision | Feedback]
Row = dict[str, object]
LATER = CONFIG.model_copy(update={"ingest": CONFIG.ingest.model_copy(update={"max_poll_records": 6, "commit_interval_s": 1e-6})})
"""Three rows of each file a poll, and a commit after each poll."""


def visits(num_sessions: int = 8) -> tuple[list[DecodedDecision], list[Feedback]]:
    """Sessions that begin 3 s after each other, with three lists each; every third one leaves, the others end by the gap or the end."""
    decisions, events = [], []
    for s, t in itertools.product(range(num_sessions), range(3)):
        name, at, session = f"d{s}-{t}", 3.0 * s + 6.0 * t, f"s{s}"
        decisions.append(decision(name, at, session=session))
        events += [feedback(name, "shown", at + 0.2, session=session), feedback(name, "click", at + 1, item="i0", session=session)]
        events.append(feedback(name, "watch", at + 2, item="i1", value=1.5 * t, session=session))
        if t == 2 and s % 3 == 0:
            events.append(feedback(name, "leave", at + 3, session=session))
    return sorted(decisions, key=lambda d: d.event.event_time_ms), sorted(events, key=lambda e: e.event_time_ms)


def wire(event: DecodedDecision | Feedback) -> Row:
    """The event's fields as anyone would write them: lists of numbers."""
    if isinstance(event, Feedback):
        return dict(msgspec.to_builtins(event))
    arrays = {
        name: getattr(event, name).tolist()
        for name in ("states", "categorical", "scores", "actions", "anchor_actions", "fused_scores", "candidate_means")
    }
    return {**{f: getattr(event.event, f) for f in event.event.__struct_fields__}, **arrays}


def write_lines(path: Path, rows: Sequence[Row | bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join((row if isinstance(row, bytes) else msgspec.json.encode(row)) + b"\n" for row in rows))
    return path


def write_parquet(path: Path, rows: Sequence[Row | bytes]) -> Path:
    """A folder of two files with row groups of five."""
    path.mkdir(exist_ok=True)
    half = len(rows) // 2
    for i, part in enumerate((rows[:half], rows[half:])):
        pq.write_table(pa.Table.from_pylist(list(part)), path / f"{i}.parquet", row_group_size=5)
    return path


def steps_of(table: pa.Table) -> list[Row]:
    """What must not depend on how the events came: all but offsets of files, commits and clocks."""
    return [{k: v for k, v in row.items() if k not in ("commit", "closed_ms", "revision")} for row in table.to_pylist()]


def imported(root: Path, decisions: Path, events: Path, config: Config = LATER, worker: str = "import-0", **how: bool) -> list[str]:
    said: list[str] = []
    import_files(config, str(root / "log"), decisions, events, worker=worker, rejects=root / "rejects.jsonl", say=said.append, **how)
    return said


def expected(decisions: list[DecodedDecision], events: list[Feedback], *, without: int = -1, config: Config = CONFIG) -> list[Row]:
    """The join of everything at once."""
    joiner = SessionJoiner(0, config)
    joiner.push([(i, d) for i, d in enumerate(decisions) if i != without], list(enumerate(events)))
    return steps_of(merge_steps(rows_to_table(joiner.close(clock_ms=T0))))


@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_an_import_gives_the_steps_of_the_live_join(tmp_path: Path, write: Callable[[Path, Sequence[Row]], Path]) -> None:
    decisions, events = visits()
    paths = write(tmp_path / "decisions.jsonl", [wire(d) for d in decisions]), write(tmp_path / "feedback.jsonl", [wire(e) for e in events])
    said = imported(tmp_path, *paths)
    assert steps_of(read_steps(tmp_path / "log")) == expected(decisions, events)
    assert said[:2] == [f"decisions{24:>17} rows: 24 joined", f"feedback{75:>18} rows: 75 joined"]
    commits = commit_history(tmp_path / "log", "import-0")
    assert len(commits) > 5 and commits[-1].positions == {"decisions/0": 24, "feedback/0": 75}
    assert commits[-1].reward == CONFIG.reward.digest
    assert imported(tmp_path, *paths) == said and commit_history(tmp_path / "log", "import-0") == commits, "twice adds nothing"


@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_with_a_user_key_users_are_imported_under_their_pseudonyms(tmp_path: Path, write: Callable[[Path, Sequence[Row]], Path]) -> None:
    key = SecretStr("a key of sixteen or more")
    config = LATER.model_copy(update={"serve": LATER.serve.model_copy(update={"user_key": key})})
    decisions, events = visits()
    rows: list[Row] = [{**wire(d), "a_field_of": "the future"} for d in decisions]
    paths = write(tmp_path / "decisions.jsonl", rows), write(tmp_path / "feedback.jsonl", [wire(e) for e in events])
    imported(tmp_path, *paths, config)
    wanted = expected(decisions, events)
    assert steps_of(read_steps(tmp_path / "log")) == [{**step, "user_id": pseudonym(str(step["user_id"]), key)} for step in wanted]
    imported(tmp_path / "hashed", *paths, config, hashed_users=True)
    assert steps_of(read_steps(tmp_path / "hashed" / "log")) == wanted


def test_a_user_id_that_is_none_is_refused_with_a_user_key_too(tmp_path: Path) -> None:
    config = LATER.model_copy(update={"serve": LATER.serve.model_copy(update={"user_key": SecretStr("a key of sixteen or more")})})
    decisions, events = visits()
    good = [wire(d) for d in decisions]
    bad: list[Row | bytes] = [{**good[0], "decision_id": f"b{i}", "user_id": user} for i, user in enumerate((7, "", "u" * 129))]
    number = msgspec.json.encode({**good[0], "decision_id": "n"})[:-1] + b',"number":1e999}'  # no number that could be copied
    d = write_lines(tmp_path / "d.jsonl", [*bad, b"[]", b"{", *good, number])
    said = imported(tmp_path, d, write_lines(tmp_path / "f.jsonl", [wire(e) for e in events]), config)
    assert "5 dead_letter" in said[0] and "24 joined" in said[0]
    users = set(read_steps(tmp_path / "log")["user_id"].to_pylist())
    assert users and all(len(user) == PSEUDONYM_DIGITS for user in users)


def test_the_files_are_known_by_what_they_were_at_the_beginning_not_opened_at_each_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decisions, events = visits()
    looked, id_of = list[Sequence[Path]](), files._id_of
    monkeypatch.setattr(files, "_id_of", lambda paths: looked.append(paths) or id_of(paths))  # type: ignore[func-returns-value]
    paths = write_lines(tmp_path / "d.jsonl", [wire(d) for d in decisions]), write_lines(tmp_path / "f.jsonl", [wire(e) for e in events])
    imported(tmp_path, *paths)
    assert len(looked) == 4 < len(commit_history(tmp_path / "log", "import-0")), "two topics, for the check and for the reader"


def test_what_the_end_of_the_files_cuts_off_is_truncated_not_left(tmp_path: Path) -> None:
    decisions, events = visits()
    paths = write_lines(tmp_path / "d.jsonl", [wire(d) for d in decisions]), write_lines(tmp_path / "f.jsonl", [wire(e) for e in events])
    imported(tmp_path, *paths)
    ended = {row["session_id"]: row["ended"] for row in read_steps(tmp_path / "log").to_pylist() if row["ended"] != "has_next"}
    left = {"s0": "terminated", "s3": "terminated", "s6": "terminated", "s1": "terminated", "s2": "terminated"}  # the last two by the gap
    assert ended == {f"s{i}": "truncated" for i in range(8)} | left


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_a_crash_at_any_commit_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, write: Callable[[Path, Sequence[Row | bytes]], Path]
) -> None:
    decisions, events = visits()
    rows = [wire(d) for d in decisions]
    rows[7] = {**rows[7], "arm": "nobody"}
    paths = write(tmp_path / "decisions.jsonl", rows), write(tmp_path / "feedback.jsonl", [wire(e) for e in events])
    commit, alive = StepLog.commit, 0

    def dying(log: StepLog, state: object, table: pa.Table) -> None:
        nonlocal alive
        if moment == "before" and alive == 1:
            raise KeyboardInterrupt
        commit(log, state, table)  # type: ignore[arg-type]
        if moment == "after" and alive == 1:
            raise KeyboardInterrupt
        alive -= 1

    monkeypatch.setattr(StepLog, "commit", dying)
    crashes = 0
    for number in (1, 2, 3, 1, 2, 5):
        alive = number
        try:
            imported(tmp_path, *paths)
        except KeyboardInterrupt:
            crashes += 1
    assert crashes >= 4
    alive = 0
    said = imported(tmp_path, *paths)
    assert steps_of(read_steps(tmp_path / "log")) == expected(decisions, events, without=7)
    assert "1 dead_letter" in said[0] and len((tmp_path / "rejects.jsonl").read_bytes().splitlines()) == 1


@pytest.mark.parametrize("commits", [1, 6])
@pytest.mark.parametrize("new", [False, True], ids=["the same behaviours", "a new behaviour"])
def test_a_reward_recomputed_in_the_middle_is_that_of_all_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commits: int, new: bool
) -> None:
    decisions, events = visits()
    paths = write_lines(tmp_path / "d.jsonl", [wire(d) for d in decisions]), write_lines(tmp_path / "f.jsonl", [wire(e) for e in events])
    with monkeypatch.context() as patch:
        commit = StepLog.commit

        def dying(log: StepLog, state: WorkerState, table: pa.Table) -> None:
            if state.commit == commits:
                raise KeyboardInterrupt
            commit(log, state, table)

        patch.setattr(StepLog, "commit", dying)
        with pytest.raises(KeyboardInterrupt):
            imported(tmp_path, *paths)
    gc.collect()  # the locks of what died
    behaviours = [*([{"name": "share"}] if new else []), *(b.model_dump() for b in CONFIG.reward.behaviours)]
    reward = RewardConfig.model_validate({"behaviours": behaviours, "groups": [{"name": "all", "expression": "click * watch - 1"}]})
    config = LATER.model_copy(update={"reward": reward})
    with pytest.raises(LogError, match="recompute-rewards"):
        imported(tmp_path, *paths, config=config)
    gc.collect()
    recompute_rewards(StepLog(tmp_path / "log", "import-0", "between", SPEC), reward, committed_ms=T0)
    said = imported(tmp_path, *paths, config=config)
    assert "24 joined" in said[0] and "75 joined" in said[1]
    assert steps_of(read_steps(tmp_path / "log")) == expected(decisions, events, config=config)


def test_refused_rows_are_counted_by_reason_with_samples_and_the_ledger_adds_up(tmp_path: Path) -> None:
    decisions, events = visits()
    first: list[Row | bytes] = [wire(d) for d in decisions]
    second: list[Row | bytes] = [wire(e) for e in events]
    first.insert(3, b"{not json")
    first.insert(9, {**wire(decisions[0]), "decision_id": "other", "states": [[1.0, 2.0]] * 3})
    second.insert(0, b"")
    second.insert(5, {**wire(events[1]), "event_id": "x", "behaviour": "purchase", "item_id": "i0"})
    second.append(wire(events[-1]))  # once more
    said = imported(tmp_path, write_lines(tmp_path / "d.jsonl", first), write_lines(tmp_path / "f.jsonl", second))
    assert said[0].split(maxsplit=1)[1].startswith("26 rows: ") and "24 joined" in said[0] and "2 dead_letter" in said[0]
    assert said[1].split(maxsplit=1)[1].startswith("78 rows: ")
    assert all(text in said[1] for text in ("75 joined", "1 duplicate", "2 dead_letter"))
    refused = [msgspec.json.decode(line) for line in (tmp_path / "rejects.jsonl").read_bytes().splitlines()]
    found = {(entry["topic"], entry["row"]): (entry["reason"], entry["sample"]) for entry in refused}
    assert found.keys() == {("decisions", 3), ("decisions", 9), ("feedback", 0), ("feedback", 5)}
    assert found["decisions", 3][1] == "{not json" and "states" in found["decisions", 9][0]
    assert "'purchase' is not declared" in found["feedback", 5][0]
    assert sum(line.startswith("rejects") for line in said) == len({(e["topic"], e["code"]) for e in refused})


def test_a_table_of_another_schema_stops_the_import_with_the_reason(tmp_path: Path) -> None:
    decisions, events = visits()
    rows: list[Row | bytes] = [{k: v for k, v in wire(e).items() if k != "event_id"} for e in events]
    with pytest.raises(StreamError, match="event_id"):
        imported(tmp_path, write_lines(tmp_path / "d.jsonl", [wire(d) for d in decisions]), write_parquet(tmp_path / "f", rows))


def test_an_import_that_refused_every_row_of_a_topic_fails_however_few_they_are(tmp_path: Path) -> None:
    decisions, _ = visits()
    first = write_lines(tmp_path / "d.jsonl", [wire(d) for d in decisions])
    second = write_lines(tmp_path / "f.jsonl", [b"junk"] * 3)
    for _ in range(2):
        with pytest.raises(StreamError, match=r"all 3 rows of feedback were refused.*rejects\.jsonl"):
            imported(tmp_path, first, second)
    assert imported(tmp_path, first, write_lines(tmp_path / "none.jsonl", []), worker="import-1")[1].endswith("0 rows: none")


def test_other_files_and_names_are_refused(tmp_path: Path) -> None:
    decisions, events = visits()
    first = write_lines(tmp_path / "d.jsonl", [wire(d) for d in decisions])
    second = write_lines(tmp_path / "f.jsonl", [wire(e) for e in events])
    imported(tmp_path, first, second)
    write_lines(first, [wire(d) for d in decisions[1:]])
    with pytest.raises(StreamError, match="--worker import-1"):
        imported(tmp_path, first, second)
    imported(tmp_path, first, second, worker="import-1")
    assert len(read_steps(tmp_path / "log")) == 24, "a step that comes again is the same step"
    with pytest.raises(ConfigError, match="live worker"):
        imported(tmp_path, first, second, worker="ingest-0")
    before = sorted(tmp_path.rglob("*"))
    for name in ("../../escaped", "a/b", "", ".", "..", "-x", "_state", "a b", "a\n", str(tmp_path / "elsewhere")):
        with pytest.raises(ConfigError, match=r"is no name of a table.*--worker"):
            imported(tmp_path, first, second, worker=name)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(InputDataError, match="no files"):
        imported(tmp_path, tmp_path / "none", second, worker="import-2")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputDataError, match=r"broken\.parquet"):
        imported(tmp_path, tmp_path / "broken.parquet", second, worker="import-2")


@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_late_rows_stand_in_the_rejects_once_whatever_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, Sequence[Row]], Path]
) -> None:
    decisions, events = visits()
    late = [feedback("d0-0", "click", 1.5, item="i1", session="s0", event_id=f"late-{i}") for i in range(2)]
    rows = [wire(e) for e in [*events[:60], *late, *events[60:], late[0]]]
    paths = write(tmp_path / "decisions.jsonl", [wire(d) for d in decisions]), write(tmp_path / "feedback.jsonl", rows)
    crashes, commit = list[int](), StepLog.commit

    def dying(log: StepLog, state: WorkerState, table: pa.Table) -> None:
        """Each commit fails once, after its rejects were written."""
        if state.commit not in crashes:
            crashes.append(state.commit)
            raise KeyboardInterrupt
        commit(log, state, table)

    monkeypatch.setattr(StepLog, "commit", dying)
    said: list[str] = []
    while not said:
        with suppress(KeyboardInterrupt):
            said = imported(tmp_path, *paths)
        gc.collect()  # the lock of what died
    assert len(crashes) > 5 and "2 late" in said[1]
    found = [msgspec.json.decode(line) for line in (tmp_path / "rejects.jsonl").read_bytes().splitlines()]
    assert sorted((entry["event_id"], entry["row"], entry["code"]) for entry in found) == [("late-0", 60, "late"), ("late-1", 61, "late")]


def test_a_late_event_whose_record_a_crash_took_stands_in_the_rejects_once(tmp_path: Path) -> None:
    event = feedback("d", "click", 1, item="i")
    record = Record("feedback", 0, 7, -1, b"s", msgspec.json.encode(event), JSON)
    cases: list[tuple[str, list[Record | Feedback], int]] = [
        ("a", [record, event], 1),
        ("b", [event, event], 1),
        ("c", [record, record._replace(offset=9)], 2),
    ]
    for name, calls, num in cases:
        for late in calls:
            rejects = Rejects(tmp_path / name, "t", max_share=0.2)
            rejects.late("feedback", late)
            rejects.flush()
        assert rejects.counts == {("feedback", "late"): num}


def test_a_line_of_the_rejects_that_a_crash_cut_off_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    line = b'{"table":"t","topic":"feedback","row":3,"code":"malformed"}\n'
    for cut in range(1, len(line)):
        path.write_bytes(line + line[:cut])
        assert Rejects(path, "t", max_share=0.2).counts == {("feedback", "malformed"): 1} and path.read_bytes() == line


@pytest.mark.parametrize("content", ["a note without an end", '{"decision_id": "d"}\n', "[1]\n", "a line\n", '{"table": "t"}\n'])
def test_a_file_that_holds_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(InputDataError, match=r"no refused row.*mine\.jsonl.*--rejects"):
        Rejects(path, "t", max_share=0.2)
    assert path.read_text() == content


def test_what_another_import_refused_does_not_hide_what_this_one_refuses(tmp_path: Path) -> None:
    decisions, events = visits()
    first = write_lines(tmp_path / "d.jsonl", [wire(d) for d in decisions])

    def with_junk(name: str, row: int) -> Path:
        rows: list[Row | bytes] = [*(wire(e) for e in events[:row]), b"junk", *(wire(e) for e in events[row:])]
        return write_lines(tmp_path / name, rows)

    late, early = with_junk("late.jsonl", 60), with_junk("early.jsonl", 5)
    for worker, second in (("import-1", late), ("import-2", early)):
        assert any(line.startswith("rejects") and " 1 of feedback" in line for line in imported(tmp_path, first, second, worker=worker))
    shutil.rmtree(tmp_path / "log" / "import-1")  # as after another spec, whose log is another
    imported(tmp_path, first, late, worker="import-1")
    refused = [msgspec.json.decode(line) for line in (tmp_path / "rejects.jsonl").read_bytes().splitlines()]
    assert [entry["row"] for entry in refused] == [60, 5, 60] and len({entry["table"] for entry in refused}) == 3


def test_the_command_imports_and_training_reads_it(tmp_path: Path) -> None:
    decisions, events = visits()
    config = CONFIG.model_copy(update={"run": CONFIG.run.model_copy(update={"dir": str(tmp_path)})})
    yaml = tmp_path / "deployment.yaml"
    yaml.write_text(msgspec.yaml.encode({**config.shown(), "kafka": {}, "serve": {}}).decode())
    paths = [
        *("--decisions", str(write_lines(tmp_path / "d.jsonl", [wire(d) for d in decisions]))),
        *("--feedback", str(write_lines(tmp_path / "f.jsonl", [wire(e) for e in events]))),
    ]
    result = CliRunner().invoke(log_group, ["import", *paths, "--config", str(yaml)], standalone_mode=False, catch_exceptions=False)
    assert "24 joined" in result.output and SPEC.digest in result.output
    newest = commit_history(tmp_path / "log" / SPEC.digest, "import-0")[-1].commit
    log = read_log(str(tmp_path), config)
    assert len(log.steps) == 24 and log.lineage == {"import-0": newest}
