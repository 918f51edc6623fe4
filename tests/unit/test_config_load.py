"""Precedence, faults and origins of `load`."""

import string
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kvrouter_grpc.config import Config, RouterConfig, ServerConfig, effective, load
from kvrouter_grpc.config.settings import SECTIONS, SETTINGS, Setting
from kvrouter_grpc.config.source import MAX_FILE_BYTES
from kvrouter_grpc.errors import ConfigError

ENDPOINT = {"--endpoint": ["a.b.c"]}
NOT_ANY_TEXT = {"tokenizer", "prefill_endpoint", "conditional_disagg_config"}
SCALARS = [s for s in SETTINGS.values() if s.section and not s.retired and s.name not in NOT_ANY_TEXT]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "router.yaml"
    path.write_text(text)
    return path


def faults(flags: dict[str, Any], env: dict[str, str] | None = None, file: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(flags, env or {}, file)
    return caught.value.faults


def values_of(setting: Setting) -> st.SearchStrategy[Any]:
    """Values that the setting's declared type and bounds allow."""
    kind, metadata, optional = setting._inner
    low = next((m.ge for m in metadata if isinstance(m, Ge)), None)
    above = next((m.gt for m in metadata if isinstance(m, Gt)), None)
    high = next((m.le for m in metadata if isinstance(m, Le)), None)
    below = next((m.lt for m in metadata if isinstance(m, Lt)), None)
    if kind is bool:
        strategy: st.SearchStrategy[Any] = st.booleans()
    elif get_origin(kind) is Literal:
        strategy = st.sampled_from(get_args(kind))
    elif kind is int:
        top = high if high is not None else (below - 1 if below is not None else 2**40)
        strategy = st.integers(low if low is not None else 1, top)
    elif kind is float:
        strategy = st.floats(
            low if low is not None else above,
            high if high is not None else 1e9,
            exclude_min=above is not None,
            allow_subnormal=False,
        )
    elif setting.name.endswith("listen"):
        strategy = st.integers(1, 65535).map(lambda port: f"127.0.0.1:{port}")
    else:
        strategy = st.text(string.ascii_lowercase + "/.-", min_size=5, max_size=20)
        if kind is Path:
            strategy = strategy.map(lambda text: str(Path(text)))
    return st.none() | strategy if optional else strategy


def as_text(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def outcome(*sources: Any) -> Any:
    try:
        return load(*sources).model_dump()
    except ConfigError:
        return "refused"


@st.composite
def choices(draw: st.DrawFn) -> dict[Setting, Any]:
    chosen = draw(st.lists(st.sampled_from(SCALARS), unique_by=lambda s: s.path, max_size=8))
    return {setting: draw(values_of(setting)) for setting in chosen}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choices())
def test_flag_variable_and_yaml_mean_the_same(tmp_path: Path, chosen: dict[Setting, Any]) -> None:
    flags = {s.flag: v if s.switch else as_text(v) for s, v in chosen.items()}
    document: dict[str, Any] = {"endpoints": ["a.b.c"]}
    for setting, value in chosen.items():
        document.setdefault(setting.section, {})[setting.name.replace("_", "-")] = value
    file = write(tmp_path, yaml.safe_dump(document))
    by_flag = outcome({**ENDPOINT, **flags}, {}, None)
    assert by_flag == outcome({}, {}, file)
    for position in (0, -1):  # the contract's name and our own
        env = {s.env[position]: as_text(v) for s, v in chosen.items()}
        assert by_flag == outcome(ENDPOINT, env, None)
    if by_flag != "refused":
        for setting, value in chosen.items():
            read = by_flag[setting.section][setting.name]
            assert read == value or str(read) == value or by_flag["router"]["load_aware"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choices())
def test_effective_configuration_reads_back(tmp_path: Path, chosen: dict[Setting, Any]) -> None:
    flags = {s.flag: v if s.switch else as_text(v) for s, v in chosen.items()}
    workers = ["url=http://h:1,model=a|b,taints=x|y,role=prefill", "name=w,url=http://h:2,kv-events=off,dp=2"]
    try:
        config = load({**ENDPOINT, **flags, "--worker": workers}, {})
    except ConfigError:
        return
    assert load({}, {}, write(tmp_path, effective(config))).model_dump() == config.model_dump()


@pytest.mark.parametrize(
    ("flag", "variable", "yaml_key"), [(True, True, True), (False, True, True), (False, False, True)]
)
def test_first_source_wins(tmp_path: Path, flag: bool, variable: bool, yaml_key: bool) -> None:
    file = write(tmp_path, "router: {temperature: 3}") if yaml_key else None
    env = {"DYN_ROUTER_TEMPERATURE": "2"} if variable else {}
    config = load({**ENDPOINT, **({"--router-temperature": "1"} if flag else {})}, env, file)
    assert config.router.temperature == (1 if flag else 2 if variable else 3)
    assert config.origins["router.temperature"] == (
        "flag --router-temperature"
        if flag
        else "environment DYN_ROUTER_TEMPERATURE"
        if variable
        else f"{file}: router.temperature"
    )


def test_negated_switch_beats_yaml(tmp_path: Path) -> None:
    config = load({**ENDPOINT, "--router-kv-events": False}, {}, write(tmp_path, "router: {kv-events: true}"))
    assert not config.router.kv_events
    assert config.origins["router.kv_events"] == "flag --no-router-kv-events"


def test_none_clears_what_yaml_sets(tmp_path: Path) -> None:
    file = write(tmp_path, "router: {block_size: 16}")
    assert load(ENDPOINT, {}, file).router.block_size == 16
    assert load({**ENDPOINT, "--router-block-size": "none"}, {}, file).router.block_size is None


def test_empty_variable_counts_as_unset() -> None:
    assert (
        load(ENDPOINT, {"DYN_ROUTER_TEMPERATURE": "", "KVROUTER_LOG_LEVEL": " "}).model_dump()
        == load(ENDPOINT, {}).model_dump()
    )


def test_all_faults_at_once(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "server: {listn: x, max-prompt-tokens: lots}\nrouter: 3\nevent: {}\nworkers: [{url: 'http://h', dp: 0}, 3]\n",
    )
    found = faults(
        {
            "--endpoint": ["a.b"],
            "--router-temprature": "1",
            "--router-temperature": "hot",
            "--worker": ["nonsense"],
            "--admin-listen": "0.0.0.0:50051",
        },
        {"DYN_ROUTER_MOD": "kv", "DYN_ROUTER_MODE": "fastest", "KVROUTER_UPSTREAM_RETRIES": "11"},
        file,
    )
    assert found == [
        "flag --router-temprature is unknown; did you mean --router-temperature?",
        (
            "flag --endpoint: 'a.b' is not usable; write namespace.component.endpoint "
            "(exactly three parts, each of letters, digits, '_' and '-')"
        ),
        "flag --router-temperature: 'hot' is not usable; write a number from 0 to 1000",
        "flag --worker 'nonsense': 'nonsense' is not key=value; write url=http://host:port,name=...",
        "environment DYN_ROUTER_MOD is not a setting; did you mean DYN_ROUTER_MODE?",
        (
            "environment DYN_ROUTER_MODE: 'fastest' is not usable; write kv, round-robin, random, power-of-two, "
            "least-loaded, device-aware-weighted, session, prefix, kv-aware or direct"
        ),
        "environment KVROUTER_UPSTREAM_RETRIES: '11' is not usable; write an integer from 0 to 10",
        f"{file}: router is not a mapping of settings",
        f"{file}: server.listn is not a setting; did you mean server.listen?",
        f"{file}: event is not a setting; did you mean events?",
        f"{file}: server.max-prompt-tokens: 'lots' is not usable; write an integer from 1 to 16777216",
        f"{file}: workers[0]: dp 0 is not usable; write an integer from 1 to 1024, or none",
        f"{file}: workers[1]: not a mapping with url: and name:",
        (
            "flag --admin-listen: listen and admin-listen are both 0.0.0.0:50051: give admin-listen its own port, "
            "or leave it out to serve both on one."
        ),
    ]


def test_endpoint_is_required() -> None:
    assert faults({}) == ["no endpoint is given; write --endpoint namespace.component.endpoint"]


@pytest.mark.parametrize("endpoint", ["", "a", "a.b", "a.b.c.d", "a..c", "a b.c.d", "é.b.c", "a.b.", f"{'x' * 64}.b.c"])
def test_endpoint_has_exactly_three_parts(endpoint: str) -> None:
    (fault,) = faults({"--endpoint": [endpoint]})
    assert fault.startswith(f"flag --endpoint: {endpoint!r} is not usable; write namespace.component.endpoint")


def test_endpoint_given_twice() -> None:
    assert faults({"--endpoint": ["a.b.c", "a.b.c"]}) == [
        "flag --endpoint: endpoint a.b.c is given 2 times: give it once."
    ]


def test_two_names_of_one_setting_must_agree() -> None:
    same = {"DYN_ROUTER_TEMPERATURE": "0.5", "KVROUTER_ROUTER_TEMPERATURE": "0.50"}
    assert load(ENDPOINT, same).router.temperature == 0.5
    assert faults(ENDPOINT, same | {"KVROUTER_ROUTER_TEMPERATURE": "1"}) == [
        "environment DYN_ROUTER_TEMPERATURE and environment KVROUTER_ROUTER_TEMPERATURE differ: keep one"
    ]
    assert faults({**ENDPOINT, "--block-size": "16", "--router-block-size": "32"}) == [
        "flag --block-size and flag --router-block-size differ: keep one"
    ]


def test_variables_of_kubernetes_and_of_others_are_passed_over() -> None:
    env = {
        "KVROUTER_SERVER_SERVICE_HOST": "10.0.0.1",
        "KVROUTER_SERVER_SERVICE_PORT": "50051",
        "KVROUTER_SERVER_SERVICE_PORT_GRPC": "50051",
        "KVROUTER_SERVER_PORT": "tcp://10.0.0.1:50051",
        "KVROUTER_SERVER_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "KVROUTER_SERVER_PORT_50051_TCP_ADDR": "10.0.0.1",
        "KVROUTER_SERVER_PORT_50051_TCP_PROTO": "tcp",
        "DYN_ROUTER_SERVICE_HOST": "10.0.0.2",
        "DYN_NAMESPACE": "x",
        "PATH": "/bin",
    }
    config = load(ENDPOINT, env)
    assert config.model_dump() == load(ENDPOINT, {}).model_dump()
    assert config.warnings == ()


@pytest.mark.parametrize("name", ["KVROUTER_SERVER_PORT", "DYN_ROUTER_NO_SUCH_THING", "KVROUTER_LOG_COLOUR"])
def test_unknown_variable_is_a_fault(name: str) -> None:
    (fault,) = faults(ENDPOINT, {name: "50051"})
    assert fault.startswith(f"environment {name} is not a setting")


def test_unknown_variable_far_from_any_setting_warns() -> None:
    assert load(ENDPOINT, {"KVROUTER_TORCH_INDEX": "x"}).warnings == (
        "environment KVROUTER_TORCH_INDEX is not a setting: ignored.",
    )


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"--drain-timeout-s": "1"}, "drain-timeout-s (1) includes drain-propagation-s (5): make it at least as long."),
        (
            {"--max-prompt-tokens": "16777216"},
            (
                "max-prompt-tokens (16777216) does not fit into max-receive-message-bytes (67108864): raise the latter "
                "to 67174400 or lower the former."
            ),
        ),
        (
            {"--events-replay-backoff-s": "6"},
            "replay-backoff-max-s (2) is below replay-backoff-s (6): make it at least as long.",
        ),
        (
            {"--events-reconnect-max-ms": "50"},
            "reconnect-max-ms (50) is below reconnect-ms (100): make it at least as long.",
        ),
        (
            {"--serve-indexer": True, "--use-remote-indexer": True},
            "serve-indexer and use-remote-indexer exclude each other: keep one.",
        ),
    ],
)
def test_contradictions_name_their_origin(flags: dict[str, Any], text: str) -> None:
    origins = " and ".join(f"flag {flag}" for flag in flags)
    assert faults({**ENDPOINT, **flags}) == [f"{origins}: {text}"]


def test_contradictions_hold_without_load_too() -> None:
    with pytest.raises(ValidationError, match="drain-timeout-s"):
        ServerConfig(drain_timeout_s=1)


def test_a_bad_value_makes_no_second_fault_of_its_default() -> None:
    assert len(faults({**ENDPOINT, "--drain-propagation-s": "x", "--drain-timeout-s": "1"})) == 1


def test_overlap_weight_against_its_successor() -> None:
    assert faults({**ENDPOINT, "--router-kv-overlap-score-weight": "2", "--router-prefill-load-scale": "3"}) == [
        (
            "flag --router-kv-overlap-score-weight sets router.prefill-load-scale to 2, but flag "
            "--router-prefill-load-scale says 3: remove the former"
        )
    ]


def test_load_aware_against_an_explicit_setting() -> None:
    assert faults({**ENDPOINT, "--load-aware": True}, {"DYN_ROUTER_USE_KV_EVENTS": "1"}) == [
        (
            "flag --load-aware sets router.kv-events to false, but environment DYN_ROUTER_USE_KV_EVENTS says true: "
            "remove one of them"
        )
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("router: {mode: kv, mode: random}", ", line 1, column 20: mode is given twice"),
        ("router: {mode: kv}\nrouter: {seed: 1}", ", line 2, column 1: router is given twice"),
        ("router: &a {}\nserver: *a", ", line 2, column 9: aliases are not supported"),
        ("router: [", ", line 1, column 10: expected the node content, but found '<stream end>'"),
        ("- router", ": not a mapping of sections such as server: and router:"),
        ("a: \x01", ": not a YAML document"),
        ("[" * 100_000, ": not a YAML document"),
        (f"log: {'{'}level: {'9' * 5000}{'}'}", ": not a YAML document"),
        (
            "log: {level: 2026-01-01}",
            ": log.level: datetime.date(2026, 1, 1) is not usable; write debug, info, warning or error",
        ),
        ("server: {listen: 5}", ": server.listen: 5 is not usable; write host:port"),
        ("upstream: {retries: true}", ": upstream.retries: True is not usable; write an integer from 0 to 10"),
        ("upstream: {retries: '1'}", ": upstream.retries: '1' is not usable; write an integer from 0 to 10"),
        ("router: {temperature: .nan}", ": router.temperature: nan is not usable; write a number from 0 to 1000"),
        ("router: {temperature: .inf}", ": router.temperature: inf is not usable; write a number from 0 to 1000"),
        ("router: {reset-states: 1}", ": router.reset-states: 1 is not usable; write true or false"),
        ("1: 2", ": 1 is not a setting"),
        ("workers: 3", ": workers: not a list of workers"),
        (
            "x: !!python/object/apply:os.system [echo]",
            ", line 1, column 4: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
        ),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, fault: str) -> None:
    file = write(tmp_path, text)
    assert faults(ENDPOINT, {}, file) == [f"{file}{fault}"]


def test_yaml_that_is_not_there_or_too_large(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert faults(ENDPOINT, {}, missing) == [f"{missing}: cannot be read: No such file or directory"]
    large = write(tmp_path, "#" * (MAX_FILE_BYTES + 1))
    assert faults(ENDPOINT, {}, large) == [f"{large}: larger than {MAX_FILE_BYTES} bytes"]


@pytest.mark.parametrize("text", ["", "# nothing\n", "router:\nserver: {}\n"])
def test_empty_yaml_changes_nothing(tmp_path: Path, text: str) -> None:
    assert load(ENDPOINT, {}, write(tmp_path, text)).model_dump() == load(ENDPOINT, {}).model_dump()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.text(alphabet="{}[]:-, \n\"'&*!|>routeservrwk123.", max_size=200).map(str.encode))
def test_any_bytes_in_a_file_end_in_faults_at_worst(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "any.yaml"
    file.write_bytes(data)
    try:
        assert isinstance(load(ENDPOINT, {}, file), Config)
    except ConfigError as refused:
        faults_found = refused.faults
        assert faults_found


def test_tokenizer_must_exist(tmp_path: Path) -> None:
    assert faults({**ENDPOINT, "--tokenizer": "no/such/path"}) == [
        "flag --tokenizer: 'no/such/path' is not usable; write a path, or none (nothing is there)"
    ]
    assert load({**ENDPOINT, "--tokenizer": str(tmp_path)}, {}).server.tokenizer == tmp_path


def test_sections_are_frozen_and_complete() -> None:
    config = load(ENDPOINT, {})
    with pytest.raises(ValidationError):
        config.router.temperature = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError):
        RouterConfig(no_such_setting=1)  # type: ignore[call-arg]
    for name, model in SECTIONS.items():
        assert getattr(config, name) == model()


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda setting: setting.path)
def test_every_setting_teaches_and_has_a_valid_default(setting: Setting) -> None:
    assert setting.info.description
    assert setting.info.description.endswith(".")
    if setting.section and setting.default is not None:
        assert setting.parse_text(as_text(setting.default)) == setting.default
