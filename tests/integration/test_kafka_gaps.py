"""The source on the real broker: gaps, topics made anew, partitions added, transactions. What goes on does so to the record."""

from __future__ import annotations

import uuid
from contextlib import closing

import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from kafka.errors import KafkaTimeoutError

from esrl_ray.config import KafkaConfig
from esrl_ray.errors import StreamError
from streaming.broker import ensure_topics
from streaming.client import connect
from streaming.records import Record
from streaming.source import Source
from tests.integration.test_kafka import ALL, _read, _source, _until


def test_aborted_transactions_are_not_read_and_do_not_keep_a_partition_from_its_end(kafka_config: KafkaConfig) -> None:
    producer = connect(KafkaProducer, kafka_config, transactional_id=uuid.uuid4().hex)
    producer.init_transactions()
    for commit in (True, False):
        producer.begin_transaction()
        producer.send(kafka_config.feedback_topic, value=b"yes" if commit else b"no", partition=1)
        producer.flush()
        (producer.commit_transaction if commit else producer.abort_transaction)()
    producer.close()
    source = _source(kafka_config)
    assert [r.value for r in _read(source, 1)] == [b"yes"]
    _until(lambda: source.poll(50) == [] and source.at_end(kafka_config.feedback_topic, 1))
    assert source.positions()[f"{kafka_config.feedback_topic}/1"] == 4
    source.close()


def test_a_position_before_the_first_kept_record_is_an_error_that_names_the_gap(kafka_config: KafkaConfig) -> None:
    producer = connect(KafkaProducer, kafka_config)
    for _ in range(10):
        producer.send(kafka_config.feedback_topic, value=b"x", partition=2)
    producer.close()
    admin = connect(KafkaAdminClient, kafka_config)
    admin.delete_records({TopicPartition(kafka_config.feedback_topic, 2): 6})
    admin.close()
    late = _source(kafka_config, {f"{kafka_config.feedback_topic}/2": 3})
    with pytest.raises(StreamError, match=rf"position 3 .* 6 to 10: retention.*{kafka_config.feedback_topic}\[2\]@3"):
        late.poll(100)
    early = _source(kafka_config, {f"{kafka_config.feedback_topic}/2": 11})
    with pytest.raises(StreamError, match="made anew"):
        early.poll(100)
    fresh = _source(kafka_config)
    assert [r.offset for r in _read(fresh, 4)] == [6, 7, 8, 9]
    for source in (late, early, fresh):
        source.close()


def test_records_below_the_positions_are_read_again_first_and_then_it_goes_on(kafka_config: KafkaConfig) -> None:
    producer, topic = connect(KafkaProducer, kafka_config), kafka_config.decisions_topic
    for number in range(12):
        for partition in (0, 1, 2):
            producer.send(topic, value=b"%d" % number, partition=partition)
    producer.send(kafka_config.feedback_topic, value=b"f", partition=0)
    producer.flush()
    positions = {f"{topic}/{p}": 8 for p in ALL if p < 3}
    source = Source(kafka_config, ALL, positions, max_poll_records=5)
    source.read_again({f"{topic}/0": 3, f"{topic}/1": 6})
    again: list[Record] = []
    for _ in range(300):
        again += source.poll(100) if source.reads_again else []
    offsets = {p: [r.offset for r in again if r.partition == p] for p in ALL}
    assert offsets == {0: [3, 4, 5, 6, 7], 1: [6, 7], 2: [], 3: []} and {r.topic for r in again} == {topic}
    assert positions.items() <= source.positions().items() and not source.at_end(topic, 0)
    rest = _read(source, 13)
    assert sorted((r.topic, r.partition, r.offset) for r in rest) == sorted(
        [(topic, p, offset) for p in range(3) for offset in range(8, 12)] + [(kafka_config.feedback_topic, 0, 0)]
    )
    at_the_end = Source(kafka_config, ALL, {f"{topic}/0": 12}, max_poll_records=500)
    at_the_end.read_again({f"{topic}/0": 9})
    _until(lambda: at_the_end.poll(50) == [] and not at_the_end.reads_again and all(at_the_end.at_end(topic, p) for p in (0, 3)))
    admin = connect(KafkaAdminClient, kafka_config)
    admin.delete_records({TopicPartition(topic, 0): 5})
    admin.close()
    late = Source(kafka_config, ALL, positions, max_poll_records=5)
    late.read_again({f"{topic}/0": 3})
    with pytest.raises(StreamError, match=rf"from offset 3 on .* has is 5: .*{topic}\[0\]@3.*join.label_age_s"):
        late.poll(100)
    for closed in (producer, source, at_the_end, late):
        closed.close()


def test_what_is_read_again_is_not_lost_when_the_ends_cannot_be_asked_after_an_outage(
    kafka_config: KafkaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic, asked = kafka_config.decisions_topic, list[str]()
    with closing(connect(KafkaProducer, kafka_config)) as producer:
        for _ in range(8):
            producer.send(topic, value=b"x", partition=0)
    with closing(Source(kafka_config, ALL, {f"{topic}/0": 8}, max_poll_records=2)) as source:
        source.read_again({f"{topic}/0": 2})
        again = source.poll(0)
        source._go_down("the broker was gone", timeout_ms=0)
        end_offsets = source._consumer.end_offsets

        def fail_once(*args: object, **options: object) -> object:
            asked.append("ends")
            if len(asked) == 1:
                raise KafkaTimeoutError("ListOffsets")
            return end_offsets(*args, **options)

        monkeypatch.setattr(source._consumer, "end_offsets", fail_once)
        while source.reads_again:
            again += source.poll(100)
        assert len(asked) > 1 and [record.offset for record in again] == [2, 3, 4, 5, 6, 7]


def test_records_deleted_in_front_of_a_running_reader_are_an_error_too(kafka_config: KafkaConfig) -> None:
    producer = connect(KafkaProducer, kafka_config)
    producer.send(kafka_config.feedback_topic, value=b"x" * 100, partition=0)
    producer.flush()
    source = Source(kafka_config, ALL, {}, max_poll_records=1)
    assert len(_read(source, 1)) == 1
    for _ in range(5):
        source._consumer.pause(TopicPartition(kafka_config.feedback_topic, 0))
        producer.send(kafka_config.feedback_topic, value=b"x", partition=0)
        producer.flush()
    producer.close()
    admin = connect(KafkaAdminClient, kafka_config)
    admin.delete_records({TopicPartition(kafka_config.feedback_topic, 0): 4})
    admin.close()
    source._consumer.resume(TopicPartition(kafka_config.feedback_topic, 0))
    with pytest.raises(StreamError, match=r"position 1 .* 4 to 6"):
        for _ in range(100):
            source.poll(50)
    source.close()


def test_topics_with_another_number_of_partitions_are_refused(kafka_config: KafkaConfig) -> None:
    wrong = kafka_config.model_copy(update={"num_partitions": 3})
    with pytest.raises(StreamError, match=r"has 4 partitions, kafka\.num_partitions is 3"):
        ensure_topics(wrong)
    with pytest.raises(StreamError, match="has 4 partitions"):
        Source(wrong, range(3), {}, max_poll_records=10).poll(100)


def test_partitions_added_while_reading_stop_the_reader(kafka_config: KafkaConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming.source.METADATA_MAX_AGE_MS", 500)
    source = _source(kafka_config)
    source.poll(50)
    admin = connect(KafkaAdminClient, kafka_config)
    admin.create_partitions({kafka_config.feedback_topic: 6})
    admin.close()
    with pytest.raises(StreamError, match=r"has 6 partitions, kafka\.num_partitions is 4"):
        for _ in range(100):
            source.poll(50)
    source.close()


def test_with_on_gap_skip_what_retention_deleted_is_counted_and_reading_goes_on(
    kafka_config: KafkaConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config, topic = kafka_config.model_copy(update={"on_gap": "skip"}), kafka_config.decisions_topic
    producer, admin = connect(KafkaProducer, config), connect(KafkaAdminClient, config)

    def send(num: int, partition: int) -> None:
        for _ in range(num):
            producer.send(topic, value=b"x", partition=partition)
        producer.flush()

    for partition in (0, 1):
        send(10, partition)
    admin.delete_records({TopicPartition(topic, 0): 6, TopicPartition(topic, 1): 4})
    source = Source(config, ALL, {f"{topic}/0": 3, f"{topic}/1": 8}, max_poll_records=1)
    source.read_again({f"{topic}/0": 1, f"{topic}/1": 2})
    again = []
    while source.reads_again:
        again += source.poll(100)
    assert [(r.partition, r.offset) for r in again] == [(1, 4), (1, 5), (1, 6), (1, 7)]
    assert source.take_skipped() == {(topic, 0): 3} and source.take_skipped() == {}
    assert "skipped what retention deleted" in caplog.text and f"{topic}/0@3 to=6" in caplog.text
    rest = _read(source, 6)
    assert sorted((r.partition, r.offset) for r in rest) == [(0, 6), (0, 7), (0, 8), (0, 9), (1, 8), (1, 9)]
    source.hold([(topic, 2)])  # while it reads on: all of another partition is deleted before it comes
    source.poll(100)
    send(5, 2)
    admin.delete_records({TopicPartition(topic, 2): 4})
    source.hold([])
    assert [r.offset for r in _read(source, 1)] == [4]
    assert source.take_skipped() == {(topic, 2): 4}
    _until(lambda: source.poll(50) == [] and all(source.at_end(topic, p) for p in ALL))
    made_anew = Source(config, ALL, {f"{topic}/0": 11}, max_poll_records=1)
    with pytest.raises(StreamError, match=rf"position 11 .* 6 to 10: the topic was made anew.*{topic}\[0\]@11.*new run.dir"):
        made_anew.poll(100)
    for closed in (producer, admin, source, made_anew):
        closed.close()


def test_a_topic_made_anew_has_another_id(kafka_config: KafkaConfig) -> None:
    with closing(_source(kafka_config)) as source:
        _until(lambda: source.poll(50) == [] and source.topic_ids)
        before = source.topic_ids
    assert set(before) == {kafka_config.decisions_topic, kafka_config.feedback_topic}
    admin = connect(KafkaAdminClient, kafka_config)
    admin.delete_topics([kafka_config.feedback_topic])
    _until(lambda: kafka_config.feedback_topic not in admin.list_topics(), timeout_s=60.0)
    admin.close()
    ensure_topics(kafka_config)
    with closing(_source(kafka_config)) as source:
        _until(lambda: source.poll(50) == [] and source.topic_ids, timeout_s=60.0)
        after = source.topic_ids
    assert after[kafka_config.decisions_topic] == before[kafka_config.decisions_topic]
    assert after[kafka_config.feedback_topic] != before[kafka_config.feedback_topic]


def test_an_open_transaction_holds_the_partition_before_its_end(kafka_config: KafkaConfig) -> None:
    """Else its watermark would follow the clock past events that stand behind the transaction."""
    topic = kafka_config.feedback_topic
    slow = connect(KafkaProducer, kafka_config, transactional_id=uuid.uuid4().hex)
    slow.init_transactions()
    slow.begin_transaction()
    slow.send(topic, value=b"open", partition=1)
    slow.flush()
    plain = connect(KafkaProducer, kafka_config)
    plain.send(topic, value=b"behind", partition=1)
    plain.flush()
    with closing(slow), closing(plain), closing(_source(kafka_config)) as source:
        _until(lambda: source.poll(50) == [] and all(source.at_end(name, 0) for name in (topic, kafka_config.decisions_topic)))
        for _ in range(20):
            assert source.poll(100) == [] and not source.at_end(topic, 1)
        slow.commit_transaction()
        assert [r.value for r in _read(source, 2)] == [b"open", b"behind"]
        _until(lambda: source.poll(50) == [] and source.at_end(topic, 1))
