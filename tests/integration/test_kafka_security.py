"""SASL, TLS and client certificates against the real broker: who comes in, what the others are told, and that no secret is written down."""

from __future__ import annotations

import functools
import io
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ResourcePattern,
    ResourceType,
    ScramMechanism,
    UserScramCredentialDeletion,
    UserScramCredentialUpsertion,
)

from esrl_ray.config import KafkaConfig
from esrl_ray.errors import BrokerError, BrokerRefused, StreamError, WireError
from esrl_ray.ports import free_ports
from esrl_ray.vocabulary import Refusal
from streaming.broker import EmbeddedBroker, end_offsets, ensure_topics
from streaming.client import connect
from streaming.deadletter import DeadLetters
from streaming.producer import EventProducer
from streaming.records import Record
from streaming.redrive import Redriver, read_letters
from streaming.source import Source
from streaming.wire import JSON, Feedback
from tests.certificates import Certificate
from tests.unit.test_sessions import decision, feedback

ROOT = Path(__file__).parents[2]
MARKER, WRONG = "hush-hush-right", "hush-hush-wrong"
PROTOCOLS = {"LOGIN": "SASL_PLAINTEXT", "BOTH": "SASL_SSL", "MUTUAL": "SSL"}
PLAIN, SCRAM = ("org.apache.kafka.common.security." + name for name in ("plain.PlainLoginModule", "scram.ScramLoginModule"))
PARTS = {
    "serving": "serving",
    "the app": "application",
    "`esrl ingest`": "ingest",
    "`esrl status`": "status",
    "`esrl dlq list`": "letters",
    "`esrl dlq redrive`": "redrive",
}
"""As docs/security.md names them -> user."""
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")


@dataclass(frozen=True)
class Secure:
    """A broker with a listener of each protocol, and a folder with ca.pem, other-ca.pem, client.pem (locked) and stranger.pem."""

    folder: Path
    ports: dict[str, int]
    inside: KafkaConfig  # of the listener without a login, whose user may do anything

    def config(self, listener: str, **settings: Any) -> KafkaConfig:
        """Settings of a client of one listener; it trusts the right authority."""
        trust = {"ssl_cafile": str(self.folder / "ca.pem")} if "SSL" in PROTOCOLS[listener] else {}
        known = {"bootstrap_servers": f"127.0.0.1:{self.ports[listener]}", "security_protocol": PROTOCOLS[listener]}
        return KafkaConfig.model_validate(known | trust | settings)

    def login(self, listener: str, mechanism: str, *, user: str = "app", password: str = MARKER) -> KafkaConfig:
        """As the user who may, or another one."""
        return self.config(listener, sasl_mechanism=mechanism, sasl_username=user, sasl_password=password)


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    """One broker for all these tests."""
    folder = tmp_path_factory.mktemp("secure")
    ours, other = Certificate.make("ours"), Certificate.make("other")
    for name, authority in (("ca", ours), ("other-ca", other)):
        authority.write(folder / f"{name}.pem", with_key=False)
    Certificate.make("broker", issuer=ours).write(folder / "broker.pem")
    Certificate.make("client", issuer=ours).write(folder / "client.pem", password=MARKER.encode())
    Certificate.make("stranger", issuer=other).write(folder / "stranger.pem")
    ports = dict(zip(PROTOCOLS, free_ports(3), strict=True))
    more = ",".join(f"{name}://{{host}}:{port}" for name, port in ports.items())
    lines = [
        f"listeners=PLAINTEXT://{{host}}:{{port}},CONTROLLER://{{host}}:{{controller_port}},{more}",
        f"advertised.listeners=PLAINTEXT://{{host}}:{{port}},{more}",
        "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT," + ",".join(":".join(pair) for pair in PROTOCOLS.items()),
        f"sasl.enabled.mechanisms={','.join(MECHANISMS)}",
        *(f"ssl.{store}.type=PEM" for store in ("keystore", "truststore")),
        f"ssl.keystore.location={folder / 'broker.pem'}",
        f"ssl.truststore.location={folder / 'ca.pem'}",
        "listener.name.mutual.ssl.client.auth=required",
    ]
    parts = " ".join(f'user_{part}="{MARKER}"' for part in PARTS.values())
    for name in ("login", "both"):
        lines.append(f'listener.name.{name}.plain.sasl.jaas.config={PLAIN} required user_app="{MARKER}" user_guest="{MARKER}" {parts};')
        lines += [f"listener.name.{name}.{m.lower()}.sasl.jaas.config={SCRAM} required;" for m in MECHANISMS[1:]]
    lines += [
        "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users=User:ANONYMOUS;User:app;User:leaver",
        "listener.name.login.scram-sha-512.connections.max.reauth.ms=2000",
    ]
    with EmbeddedBroker.start(folder / "broker", say=print, properties="\n".join(lines) + "\n") as broker:
        inside = KafkaConfig(bootstrap_servers=broker.bootstrap_servers)
        admin = connect(KafkaAdminClient, inside)
        for mechanism in (ScramMechanism.SCRAM_SHA_256, ScramMechanism.SCRAM_SHA_512):
            assert admin.alter_user_scram_credentials([UserScramCredentialUpsertion("app", mechanism, MARKER)]) == {"app": None}
        admin.close()
        yield Secure(folder, ports, inside)


def _refusal(config: KafkaConfig) -> str:
    """What a client is told that does not come in; asked again when a busy machine took too long to tell it."""
    for seconds in (1, 5, 20):
        with pytest.raises(BrokerError) as caught:
            connect(KafkaProducer, config, bootstrap_timeout_ms=1_000 * seconds)
        if not any(vague in str(caught.value) for vague in ("timed out", "Unable to bootstrap")):
            break
    assert isinstance(caught.value, BrokerRefused)
    return str(caught.value)


def _use_every_client(config: KafkaConfig) -> None:
    """Admin, end offsets, producer, dead letters and source: one event there and back."""
    ensure_topics(config)
    producer = EventProducer(config, client_id="secure", spool=None)
    producer.send(
        Feedback(schema_version=1, event_id="e", decision_id="d", session_id="s", behaviour="click", event_time_ms=1, item_id="i")
    )
    assert producer.flush(60)
    producer.close()
    letters = DeadLetters(config)
    letters.send(Record(config.feedback_topic, 0, 0, 1, b"k", b"?", JSON), WireError("bad", Refusal.MALFORMED))
    letters.flush()
    letters.close()
    source, records = Source(config, range(4), {}, max_poll_records=10), []
    while sum(source.positions().values()) < sum(end_offsets(config).values()):
        records += source.poll(100)
    source.close()
    assert [record.key for record in records] == [b"s"]


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("listener", ["LOGIN", "BOTH"])
def test_the_right_password_comes_in_and_a_wrong_one_is_told_the_brokers_reason(secure: Secure, listener: str, mechanism: str) -> None:
    connect(KafkaProducer, secure.login(listener, mechanism)).close()
    text = _refusal(secure.login(listener, mechanism, password=WRONG))
    assert (
        "Invalid username or password" in text if mechanism == "PLAIN" else f"invalid credentials with SASL mechanism {mechanism}" in text
    )
    assert WRONG not in text


def _read_until_refused(config: KafkaConfig, *, meanwhile: Callable[[], object] = lambda: None) -> str:
    source, deadline = Source(config, range(4), {}, max_poll_records=10), time.monotonic() + 60
    try:
        with pytest.raises(StreamError) as caught:
            while time.monotonic() < deadline:
                source.poll(100)
                if source.positions():
                    meanwhile()
    finally:
        source.close()
    return str(caught.value)


def test_a_user_who_may_not_is_told_so_at_once_and_one_who_is_shut_out_ends_the_reading(secure: Secure) -> None:
    ensure_topics(secure.inside)
    with pytest.raises(BrokerError, match="TopicAuthorizationFailedError"):
        ensure_topics(secure.login("LOGIN", "PLAIN", user="guest").model_copy(update={"decisions_topic": "others"}))
    admin = connect(KafkaAdminClient, secure.inside)
    every = ResourcePattern(ResourceType.TOPIC, "*")
    admin.create_acls([ACL("User:guest", "*", ACLOperation.DESCRIBE, ACLPermissionType.ALLOW, every)])
    assert "TopicAuthorizationFailedError" in _read_until_refused(secure.login("LOGIN", "PLAIN", user="guest"))

    mechanism = ScramMechanism.SCRAM_SHA_512  # every 2 s it wants the password again
    admin.alter_user_scram_credentials([UserScramCredentialUpsertion("leaver", mechanism, MARKER)])
    leaver = secure.login("LOGIN", "SCRAM-SHA-512", user="leaver")
    leaves = functools.cache(lambda: admin.alter_user_scram_credentials([UserScramCredentialDeletion("leaver", mechanism)]))
    assert "invalid credentials with SASL mechanism SCRAM-SHA-512" in _read_until_refused(leaver, meanwhile=leaves)
    admin.close()


def test_a_client_certificate_comes_in_and_others_are_told_why_not(secure: Secure) -> None:
    certificate = {"ssl_certfile": str(secure.folder / "client.pem"), "ssl_key_password": MARKER}
    connect(KafkaProducer, secure.config("MUTUAL", **certificate)).close()
    assert "certificate required" in _refusal(secure.config("MUTUAL"))
    assert "certificate unknown" in _refusal(secure.config("MUTUAL", ssl_certfile=str(secure.folder / "stranger.pem")))


def test_a_broker_of_another_authority_or_name_is_not_trusted(secure: Secure) -> None:
    text = _refusal(secure.config("MUTUAL", ssl_cafile=str(secure.folder / "other-ca.pem")))
    assert "CERTIFICATE_VERIFY_FAILED" in text and "unable to get local issuer certificate" in text
    elsewhere = {"bootstrap_servers": f"localhost:{secure.ports['BOTH']}"}
    wrong_name = secure.login("BOTH", "PLAIN").model_copy(update=elsewhere)
    assert "Hostname mismatch, certificate is not valid for 'localhost'" in _refusal(wrong_name)
    connect(KafkaProducer, wrong_name.model_copy(update={"ssl_check_hostname": False})).close()


def test_files_that_cannot_be_used_are_named(secure: Secure) -> None:
    client, missing = str(secure.folder / "client.pem"), str(secure.folder / "missing.pem")
    for settings, reason in (
        ({"ssl_cafile": missing}, rf"kafka\.ssl_cafile cannot be used: No such file.*{missing}"),
        ({"ssl_cafile": __file__}, rf"kafka\.ssl_cafile cannot be used: NO_CERTIFICATE.*{__file__}"),
        ({"ssl_certfile": client, "ssl_key_password": WRONG}, rf"ssl_keyfile cannot be used.*{client}.*ESRL_KAFKA_KEY_PASSWORD"),
        ({"ssl_certfile": client}, "ssl_keyfile cannot be used.*ESRL_KAFKA_KEY_PASSWORD"),  # and the terminal is not asked
        ({"ssl_certfile": client, "ssl_keyfile": missing}, "ssl_keyfile cannot be used: No such file"),
    ):
        with pytest.raises(BrokerError, match=reason) as caught:
            connect(KafkaProducer, secure.config("MUTUAL", **settings))
        assert WRONG not in str(caught.value)


def test_every_client_logs_in_and_nothing_of_the_secret_is_logged_at_any_level(secure: Secure) -> None:
    everything, root, kafka = io.StringIO(), logging.getLogger(), logging.getLogger("kafka")
    handler, levels = logging.StreamHandler(everything), (root.level, kafka.level)
    for logger in (root, kafka):
        logger.setLevel(logging.DEBUG)
        logger.addHandler(handler)
    try:
        _use_every_client(secure.login("BOTH", "PLAIN"))
        _refusal(secure.login("LOGIN", "PLAIN", password=WRONG))
    finally:
        for logger, level in zip((root, kafka), levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
    written = everything.getvalue() + (secure.folder / "broker" / "broker.log").read_text()
    assert "Attempting bootstrap" in written and "Added sensor" in written  # levels DEBUG and INFO were on
    assert MARKER not in written and WRONG not in written


def _documented_acls(prefix: str) -> list[ACL]:
    """The table of docs/security.md, for topics whose names begin with a prefix."""
    kinds = {"topic": ResourceType.TOPIC, "transactional id": ResourceType.TRANSACTIONAL_ID}
    rows = re.findall(r"^\| (.+) \| (.*`.*) \| (\w+) \|$", (ROOT / "docs" / "security.md").read_text(), re.MULTILINE)
    granted = [
        (PARTS[part], ACLOperation[word.upper()], re.findall(r"(topic|transactional id) `([a-z.-]+)`", on))
        for part, on, word in rows
        if part in PARTS
    ]
    assert {user for user, _, _ in granted} == set(PARTS.values())
    return [
        ACL(
            f"User:{user}",
            "*",
            operation,
            ACLPermissionType.ALLOW,
            ResourcePattern(kinds[kind], re.sub("(decisions|feedback)", prefix + r"\1", name)),
        )
        for user, operation, places in granted
        for kind, name in places
    ]


def test_what_the_page_on_security_grants_is_enough_for_each_part(secure: Secure) -> None:
    admin = connect(KafkaAdminClient, secure.inside)
    admin.create_acls(_documented_acls("acl."))
    admin.close()
    names = {"decisions_topic": "acl.decisions", "feedback_topic": "acl.feedback", "late_topics": True}
    as_part = {user: secure.login("LOGIN", "PLAIN", user=user).model_copy(update=names) for user in PARTS.values()}
    ensure_topics(as_part["ingest"])
    events = (
        ("serving", decision("d", 0.0).event),
        ("application", feedback("d", "click", 1.0, item="i0")),
    )
    for part, event in events:
        producer = EventProducer(as_part[part], client_id=part, spool=None)
        producer.send(event)
        assert producer.flush(60)
        producer.close()
    assert sum(end_offsets(as_part["status"]).values()) == 2
    source, records = Source(as_part["ingest"], range(4), {}, max_poll_records=10), list[Record]()
    while len(records) < 2:
        records += source.poll(100)
    source.close()
    letters = DeadLetters(as_part["ingest"])
    for record in records:
        letters.send(record, WireError("bad", Refusal.MALFORMED))
        letters.late(record.topic, record)
    letters.flush()
    letters.close()
    for topic in ("acl.decisions", "acl.feedback"):
        assert len(list(read_letters(as_part["letters"], topic))) == 1
        with closing(Redriver(as_part["redrive"], topic)) as redriver:
            assert redriver.run(lambda _: True) == 1
    assert sum(end_offsets(as_part["status"]).values()) > 2
