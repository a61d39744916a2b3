"""One schema for one deployment: unknown keys, impossible combinations, overrides, secrets, and the files in configs/."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from pydantic import ValidationError

from esrl_ray.cli.config import config_group
from esrl_ray.config import Config, load_config
from esrl_ray.errors import ConfigError
from esrl_ray.secret import ENVIRONMENT

CONFIGS = Path(__file__).parents[2] / "configs"
DEPLOYMENTS = sorted(p for p in CONFIGS.glob("*.yaml") if p.name != "serve.yaml")
SECRETS = {"ESRL_KAFKA_PASSWORD": "hunter2", "ESRL_BEARER_TOKEN": "s3cret"}


def written(folder: Path, text: str) -> Path:
    """A configuration file."""
    path = folder / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda p: p.name)
def test_every_deployment_in_configs_loads(path: Path) -> None:
    config = load_config(path)
    assert config.spec.build().num_actions == 2 * len(config.spec.scores)


def test_the_demo_is_among_the_deployments() -> None:
    assert "demo.yaml" in {p.name for p in DEPLOYMENTS}


def test_the_defaults_alone_are_a_possible_deployment() -> None:
    assert load_config(None) == Config()


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("learner: {gama: 0.9}", "learner.gama", "learner.gamma"),
        ("larner: {gamma: 0.9}", "larner", "learner"),
        ("exploration: {rounds_steps: 5}", "exploration.rounds_steps", "exploration.round_steps"),
        ("kafka: {bootstrap_server: 'a:1'}", "kafka.bootstrap_server", "kafka.bootstrap_servers"),
        ("gamma: 0.9", "gamma", "gamma"),
    ],
)
def test_an_unknown_key_names_its_path_the_file_and_the_nearest_legal_key(tmp_path: Path, text: str, key: str, nearest: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert f"unknown key {key!r}" in str(caught.value)
    assert str(path) in str(caught.value)
    assert nearest in str(caught.value).split("nearest legal key: ")[1]


def test_an_unknown_key_within_a_list_names_its_place_and_the_nearest_legal_key(tmp_path: Path) -> None:
    path = written(tmp_path, "reward: {groups: [{name: all, expresion: click}]}")
    with pytest.raises(ConfigError, match=r"reward\.groups\.0\.expresion.*nearest legal key: \S*expression"):
        load_config(path)


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, "learner: {gamma: 1.5, gama: 1}\nserve: {port: -1}"))
    assert all(key in str(caught.value) for key in ("learner.gamma", "learner.gama", "serve.port"))


IMPOSSIBLE = {
    "a power for each score": ({"spec": {"scores": ["a", "b", "c"]}}, ["2 values", "3 scores"]),
    "a bias that can be negative": ({"spec": {"bias_base": 0.2, "bias_span": 0.5}}, ["0.2", "0.5", "< 0"]),
    "a feature name twice": ({"spec": {"user_features": ["age"], "item_features": ["age"]}}, ["'age'"]),
    "an undeclared behaviour": (
        {"reward": {"groups": [{"name": "g", "expression": "click"}, {"name": "h", "expression": "2 * clik"}]}},
        ["groups.1.expression (h)", "'clik' at column 5", "nearest: click"],
    ),
    "a behaviour that no expression can name": (
        {"reward": {"behaviours": [{"name": "click"}, {"name": "long-view"}]}},
        ["behaviours.1.name", "'long-view'"],
    ),
    "a behaviour declared twice": ({"reward": {"behaviours": [{"name": "click"}, {"name": "click"}]}}, ["['click']", "twice"]),
    "a reward without bound": (
        {"reward": {"behaviours": [{"name": "v", "cap": 1e5}], "groups": [{"name": "g", "expression": "v * v"}]}},
        ["groups.0.expression (g)", "1e+10", "1e+09"],
    ),
    "a built-in behaviour declared": ({"reward": {"behaviours": [{"name": "click"}, {"name": "leave"}]}}, ["'leave'", "built in"]),
    "sessions that end before their steps close": ({"join": {"gap_s": 3.0, "label_age_s": 4.0}}, ["gap_s 3.0", "label_age_s 4.0"]),
    "a memory of event ids shorter than lateness": ({"join": {"dedup_s": 8.0}}, ["dedup_s 8.0", "lateness_s 5.0", "label_age_s 4.0"]),
    "a buffer that never fills": (
        {"replay": {"min_size": 50_000, "capacity": 10_000}},
        ["min_size 50000", "capacity 10000", "never start"],
    ),
    "a learner call larger than the whole budget": (
        {"replay": {"capacity": 10, "min_size": 10, "samples_per_insert": 1.0}},
        ["128 x 8 x 1 = 1024", "capacity 10", "allows 10"],
    ),
    "truncated steps with a bootstrap": ({"replay": {"sample_without_next": True}}, ["gamma 0", "0.9"]),
    "more workers than partitions": ({"ingest": {"num_workers": 5}}, ["num_workers 5", "num_partitions 4"]),
    "more shards than partitions": ({"replay": {"num_shards": 5}}, ["num_shards 5", "num_partitions 4"]),
    "a weight for each reward group": ({"learner": {"group_weights": [1.0, 2.0]}}, ["2 values", "1 reward groups"]),
    "a list longer than the candidates": ({"serve": {"list_size": 600}}, ["list_size 600", "max_candidates 500"]),
    "a listwise loss over one pair": ({"serve": {"list_size": 1, "num_unshown": 0}}, ["1 + num_unshown 0 = 1", "actor_loss listwise"]),
    "a round shorter than its warm-up": ({"exploration": {"round_steps": 1_000}}, ["warmup_steps 2000", "round_steps 1000"]),
    "arms of more than all users": ({"exploration": {"explore_share": 0.8, "exploit_share": 0.3}}, ["0.8", "0.3", "1.100"]),
}


@pytest.mark.parametrize(("values", "numbers"), IMPOSSIBLE.values(), ids=[name.replace(" ", "_") for name in IMPOSSIBLE])
def test_an_impossible_combination_is_refused_with_its_arithmetic(tmp_path: Path, values: dict[str, object], numbers: list[str]) -> None:
    path = written(tmp_path, yaml.safe_dump(values))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert all(number in str(caught.value) for number in [*numbers, str(path)])


def test_values_outside_their_bounds_are_refused_by_key(tmp_path: Path) -> None:
    for key, value in {
        "learner.gamma": 1.0,
        "exploration.low": 0.1,
        "replay.capacity": 0,
        "serve.port": 70_000,
        "demo.late_share": 1.5,
    }.items():
        with pytest.raises(ConfigError, match=key):
            load_config(None, [f"{key}={value}"])


def test_overrides_apply_in_order_and_parse_yaml() -> None:
    config = load_config(None, ["learner.gamma=0.5", "learner.gamma=0.95", "learner.hidden_sizes=[8, 8]", "join.gap_s=null", "run.dir=a=b"])
    assert config.learner.gamma == 0.95
    assert config.learner.hidden_sizes == (8, 8)
    assert config.join.gap_s is None
    assert config.run.dir == "a=b"


def test_an_override_wins_over_the_file_and_is_named_in_errors(tmp_path: Path) -> None:
    path = written(tmp_path, "learner: {gamma: 0.5}")
    assert load_config(path, ["learner.gamma=0.7"]).learner.gamma == 0.7
    with pytest.raises(ConfigError, match=r"a\.yaml \+ --set learner\.gamma"):
        load_config(path, ["learner.gamma=7"])


@pytest.mark.parametrize("text", ["learner.gamma", "learner.gamma.x=1", "learner.gamma=[1", "=1"])
def test_a_malformed_override_is_an_error_of_the_configuration(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_config(written(tmp_path, "learner: {gamma: 0.5}"), [text])


def test_a_file_that_is_missing_or_not_a_mapping_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    for text in ("- a", "a: [", "just text"):
        path = written(tmp_path, text)
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert str(path) in str(caught.value)
    assert load_config(written(tmp_path, "")) == Config()


def test_sections_are_immutable() -> None:
    with pytest.raises(ValidationError):
        Config().learner.gamma = 0.1  # type: ignore[misc]


def test_secrets_come_from_the_environment_and_are_never_shown() -> None:
    config = load_config(None, environment=SECRETS)
    assert config.kafka.sasl_password is not None and config.kafka.sasl_password.get_secret_value() == "hunter2"
    assert config.serve.bearer_token is not None and config.serve.bearer_token.get_secret_value() == "s3cret"
    for text in (repr(config), str(config), json.dumps(config.shown()), config.model_dump_json()):
        assert "hunter2" not in text and "s3cret" not in text


def test_secrets_come_from_files_too_and_several_keys_from_one(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("the-new-signing-key\nthe-old-signing-key\n")
    config = load_config(None, environment={"ESRL_DECISION_KEYS_FILE": str(tmp_path / "keys")})
    assert [key.get_secret_value() for key in config.serve.decision_keys] == ["the-new-signing-key", "the-old-signing-key"]
    assert config.without_secrets() == Config() == load_config(None, environment=SECRETS).without_secrets()
    with pytest.raises(ConfigError, match=r"ESRL_USER_KEY_FILE names /nowhere, which cannot be read.*serve\.user_key"):
        load_config(None, environment={"ESRL_USER_KEY_FILE": "/nowhere"})
    with pytest.raises(ConfigError, match="ESRL_USER_KEY and ESRL_USER_KEY_FILE are both set"):
        load_config(None, environment={"ESRL_USER_KEY_FILE": "/nowhere", "ESRL_USER_KEY": "k" * 16})


@pytest.mark.parametrize("name", ENVIRONMENT)
@pytest.mark.parametrize("content", ["", "\n", " , \n"])
def test_a_source_that_holds_no_secret_does_not_turn_it_off(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "secret").write_text(content)
    with pytest.raises(ConfigError, match=rf"{name}_FILE names .*secret, which holds no secret .*{ENVIRONMENT[name]}.*unset"):
        load_config(None, environment={f"{name}_FILE": str(tmp_path / "secret")})
    if content:
        with pytest.raises(ConfigError, match=f"{name} holds no secret"):
            load_config(None, environment={name: content})
    assert load_config(None, environment={name: "", f"{name}_FILE": ""}) == Config(), "an empty variable is one that is not set"


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_a_secret_in_a_file_an_argument_or_an_error_is_refused_and_not_shown(tmp_path: Path, name: str) -> None:
    key = ENVIRONMENT[name]
    section, field = key.split(".")
    file = written(tmp_path, f"{section}: {{{field}: marker-marker-marker}}")
    for path, overrides in ((file, []), (None, [f"{key}=marker-marker-marker"]), (None, [f"{key}=[marker-marker-marker"])):
        with pytest.raises(ConfigError, match=key) as caught:
            load_config(path, overrides)
        assert "marker" not in str(caught.value)
    for value in ("12345", "0", "[1, 2]", "{a: b}", "1e3"):
        with pytest.raises(ConfigError, match=f"must not be written.*{key}"):
            load_config(None, [f"{key}={value}"])
    result = CliRunner().invoke(config_group, ["show"], env={name: "marker-marker-marker"})
    assert result.exit_code == 0 and "marker" not in result.output


def test_short_keys_are_refused_and_not_shown() -> None:
    for name in ("ESRL_DECISION_KEYS", "ESRL_USER_KEY"):
        with pytest.raises(ConfigError, match="at least 16") as caught:
            load_config(None, environment={name: "marker"})
        assert "marker" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["security_protocol=SASL_SSL"], "SASL_SSL needs sasl_mechanism and sasl_username"),
        (["security_protocol=SASL_SSL", "sasl_mechanism=PLAIN"], "SASL_SSL needs sasl_username"),
        (["security_protocol=SASL_SSL", "sasl_mechanism=PLAYN"], "sasl_mechanism.*PLAIN"),
        (["sasl_mechanism=PLAIN"], "sasl_mechanism is set, but security_protocol PLAINTEXT logs nobody in"),
        (["security_protocol=SASL_PLAINTEXT", "sasl_mechanism=PLAIN", "sasl_username=u", "ssl_cafile=x"], "ssl_cafile.*does not encrypt"),
        (["security_protocol=SSL", "ssl_keyfile=x"], "ssl_keyfile is set without ssl_certfile"),
    ],
)
def test_settings_of_kafka_that_do_not_go_together_are_refused(settings: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(None, [f"kafka.{setting}" for setting in settings])


def test_an_error_does_not_show_a_secret() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["learner.gamma=7"], environment=SECRETS)
    assert "hunter2" not in str(caught.value) and "s3cret" not in str(caught.value)


def test_every_key_has_a_sentence_and_a_default() -> None:
    schema = Config.model_json_schema()
    for section in (s for name, s in schema["$defs"].items() if name.endswith("Config")):
        for key, field in section["properties"].items():
            assert field.get("description", "").endswith("."), (section["title"], key)
    assert not schema.get("required")


def test_config_schema_prints_the_json_schema() -> None:
    result = CliRunner().invoke(config_group, ["schema"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["properties"].keys() == Config.model_fields.keys()


def test_config_show_prints_effective_values_that_load_again_with_the_secrets(tmp_path: Path) -> None:
    arguments = ["show", "--config", str(CONFIGS / "demo.yaml"), "--set", "learner.gamma=0.95"]
    result = CliRunner().invoke(config_group, arguments, env=SECRETS)
    assert result.exit_code == 0
    assert "hunter2" not in result.stdout and "s3cret" not in result.stdout
    shown = yaml.safe_load(result.stdout)
    assert shown["learner"]["gamma"] == 0.95
    assert shown["kafka"]["sasl_password"] == "**********"
    loaded = load_config(written(tmp_path, result.stdout), environment=SECRETS)
    assert loaded.serve == load_config(None, environment=SECRETS).serve
    for key, secret in SECRETS.items():  # each alone: without the other one the endpoint, or the login, would be open
        with pytest.raises(ConfigError, match="the secret is masked, without it this would be off"):
            load_config(written(tmp_path, result.stdout), environment={key: secret})
    assert loaded.learner == load_config(CONFIGS / "demo.yaml", ["learner.gamma=0.95"]).learner
    as_json = CliRunner().invoke(config_group, [*arguments, "--json"], env=SECRETS)
    assert json.loads(as_json.stdout) == shown
    assert f"reward {loaded.reward.digest}" in result.stdout and "in group watch: -1.846 to 0.9231" in result.stdout


def test_a_wrong_configuration_leaves_the_command_as_its_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(config_group, ["show", "--config", str(written(tmp_path, "learner: {gama: 1}"))])
    assert isinstance(result.exception, ConfigError)
