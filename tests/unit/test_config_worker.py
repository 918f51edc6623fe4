"""Workers as people write them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrouter_grpc.config import WorkerEntry, load, read_workers
from kvrouter_grpc.config.worker_list import MAX_WORKERS
from kvrouter_grpc.errors import ConfigError
from kvrouter_grpc.types import Role, WorkerSpec

ENDPOINT = {"--endpoint": ["a.b.c"]}

INLINE = (
    "name=vllm-0,url=http://10.0.0.1:8000/,events=tcp://10.0.0.1:5557,replay=tcp://10.0.0.1:5558,model=m|adapter,"
    "endpoint=a.b.c,dp=2,role=prefill,block-size=16,taints=spot|a100,kv-events=off,topic=kv,total-kv-blocks=1024,"
    "max-num-batched-tokens=8192"
)
SPEC = WorkerSpec(
    name="vllm-0",
    url="http://10.0.0.1:8000",
    endpoint="a.b.c",
    models=("m", "adapter"),
    events="tcp://10.0.0.1:5557",
    replay="tcp://10.0.0.1:5558",
    kv_events=False,
    topic="kv",
    dp_size=2,
    block_size=16,
    role=Role.PREFILL,
    taints=frozenset({"spot", "a100"}),
    total_kv_blocks=1024,
    max_num_batched_tokens=8192,
)
MAPPING = {
    "name": "vllm-0",
    "url": "http://10.0.0.1:8000",
    "events": "tcp://10.0.0.1:5557",
    "replay": "tcp://10.0.0.1:5558",
    "model": ["m", "adapter"],
    "endpoint": "a.b.c",
    "dp": 2,
    "role": "prefill",
    "block-size": 16,
    "taints": ["spot", "a100"],
    "kv_events": False,
    "topic": "kv",
    "total-kv-blocks": 1024,
    "max_num_batched_tokens": 8192,
}


def faults(*workers: str, **more: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load({**ENDPOINT, "--worker": list(workers), **more}, {})
    return caught.value.faults


def test_inline_yaml_file_and_variable_give_the_same(tmp_path: Path) -> None:
    listed = tmp_path / "workers.yaml"
    listed.write_text(yaml.safe_dump([MAPPING]))
    under_key = tmp_path / "under-key.yaml"
    under_key.write_text(yaml.safe_dump({"workers": [MAPPING]}))
    config_file = tmp_path / "router.yaml"
    config_file.write_text(yaml.safe_dump({"workers": [MAPPING], "endpoints": "a.b.c"}))
    inline_in_yaml = tmp_path / "inline.yaml"
    inline_in_yaml.write_text(yaml.safe_dump([INLINE]))

    assert load({**ENDPOINT, "--worker": [INLINE]}, {}).workers == (SPEC,)
    assert load(ENDPOINT, {"KVROUTER_WORKERS": f" {INLINE} ; "}).workers == (SPEC,)
    assert load({}, {}, config_file).workers == (SPEC,)
    for file in (listed, under_key, inline_in_yaml):
        assert load({**ENDPOINT, "--workers-file": str(file)}, {}).workers == (SPEC,)
        assert read_workers(file, ["a.b.c"]) == (SPEC,)


def test_a_url_is_enough() -> None:
    (spec,) = load({**ENDPOINT, "--worker": ["url=http://h:8000"]}, {}).workers
    assert spec == WorkerSpec(name="h:8000", url="http://h:8000", endpoint="a.b.c")


@pytest.mark.parametrize(
    ("url", "kept", "name"),
    [
        ("http://h", "http://h", "h:80"),
        ("https://h/", "https://h", "h:443"),
        ("http://[::1]:8000", "http://[::1]:8000", "[::1]:8000"),
    ],
)
def test_name_follows_from_the_url(url: str, kept: str, name: str) -> None:
    (spec,) = load({**ENDPOINT, "--worker": [f"url={url}"]}, {}).workers
    assert (spec.url, spec.name) == (kept, name)


@pytest.mark.parametrize(
    "url",
    [
        "h:8000",
        "ftp://h:1",
        "http://",
        "http://h:x",
        "http://h:0",
        "http://h:65536",
        "http://h/v1",
        "http://h?x",
        "http://u:p@h:1",
        "http://[::1",
        "",
    ],
)
def test_url_without_host_or_with_more_than_it(url: str) -> None:
    (fault,) = faults(f"url={url}")
    assert f"url {url!r} is not usable; write http://host:port" in fault


@pytest.mark.parametrize("key", ["events", "replay"])
@pytest.mark.parametrize(
    "address", ["h:5557", "tcp://*:5557", "tcp://h", "tcp://h:0", "ipc://x", "tcp://h:70000", "tcp://:5557"]
)
def test_socket_address_that_nobody_can_connect_to(key: str, address: str) -> None:
    (fault,) = faults(f"url=http://h:1,{key}={address}")
    assert f"{key} {address!r} is not usable; write tcp://host:port, or none" in fault


@pytest.mark.parametrize(
    ("worker", "fault"),
    [
        ("url=http://h:1,nmae=x", "nmae is not a key of a worker; did you mean name?"),
        ("url=http://h:1,url=http://h:2", "url is given twice"),
        ("name=x", "url is missing; write http://host:port"),
        ("http://h:1", "'http://h:1' is not key=value; write url=http://host:port,name=..."),
        ("url=http://h:1,dp=0", "dp '0' is not usable; write an integer from 1 to 1024, or none"),
        ("url=http://h:1,role=router", "role 'router' is not usable; write both, prefill or decode"),
        ("url=http://h:1,kv-events=maybe", "kv-events 'maybe' is not usable; write true or false"),
        ("url=http://h:1,model=a||b", "model '' is not usable; write a printable text, or none"),
        ("url=http://h:1,endpoint=a.b", "endpoint 'a.b' is not usable; write namespace.component.endpoint, or none"),
        ("url=http://h:1,name=a b", "name 'a b' is not usable; write a text, or none"),
        ("url=http://h:1,name=", "name '' is not usable; write a text, or none"),
    ],
)
def test_bad_worker(worker: str, fault: str) -> None:
    (found,) = faults(worker)
    assert found.startswith(f"flag --worker {worker!r}: {fault}")


def test_every_fault_of_every_worker() -> None:
    assert len(faults("url=x,dp=0", "nonsense", "name=y")) == 4


def test_names_are_unique_over_flags_and_file(tmp_path: Path) -> None:
    file = tmp_path / "workers.yaml"
    file.write_text("- {name: a, url: 'http://h:1'}\n")
    assert faults("name=a,url=http://h:2", **{"--workers-file": str(file)}) == [
        "flag --worker and flag --workers-file: 2 workers are called a: give each its own name=."
    ]


def test_workers_of_flags_replace_those_of_yaml_but_join_the_file(tmp_path: Path) -> None:
    config_file = tmp_path / "router.yaml"
    config_file.write_text("workers: [{name: from-config, url: 'http://h:1'}]\n")
    file = tmp_path / "workers.yaml"
    file.write_text("- {name: from-file, url: 'http://h:2'}\n")
    flags = {**ENDPOINT, "--worker": ["name=from-flag,url=http://h:3"], "--workers-file": str(file)}
    assert [spec.name for spec in load(flags, {}, config_file).workers] == ["from-flag", "from-file"]


def test_a_worker_belongs_to_one_of_several_endpoints() -> None:
    endpoints = {"--endpoint": ["a.b.c", "a.d.c"]}
    assert faults("name=w,url=http://h:1", **endpoints) == [
        "worker w: the router serves several endpoints: say which with endpoint="
    ]
    (fault,) = faults("name=w,url=http://h:1,endpoint=a.x.c", **endpoints)
    assert "worker w is for endpoint a.x.c, which this router does not serve" in fault
    config = load({**endpoints, "--worker": ["name=w,url=http://h:1,endpoint=a.d.c"]}, {})
    assert config.workers[0].endpoint == "a.d.c"


@pytest.mark.parametrize("text", ["3", "a: 1", "workers: 1\nmore: 2", "workers: {}"])
def test_workers_file_of_another_shape(tmp_path: Path, text: str) -> None:
    file = tmp_path / "workers.yaml"
    file.write_text(text)
    assert faults(**{"--workers-file": str(file)}) == [f"{file}: not a list of workers"]


def test_empty_workers_file_has_no_workers(tmp_path: Path) -> None:
    file = tmp_path / "workers.yaml"
    file.write_text("")
    assert read_workers(file, ["a.b.c"]) == ()


def test_too_many_workers(tmp_path: Path) -> None:
    file = tmp_path / "workers.yaml"
    file.write_text("[" + "0," * (MAX_WORKERS + 1) + "]")
    assert faults(**{"--workers-file": str(file)}) == [f"{file}: {MAX_WORKERS + 1} workers are more than {MAX_WORKERS}"]


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert all("\x1b" not in fault for fault in faults("\x1b[31m", "url=\x1b[31m,\x1b=1"))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.text("urlnamedp=,|:/.http0123 ", max_size=60))
def test_any_inline_text_ends_in_faults_at_worst(text: str) -> None:
    try:
        assert len(load({**ENDPOINT, "--worker": [text]}, {}).workers) == 1
    except ConfigError as refused:
        faults_found = refused.faults
        assert faults_found


def test_entry_of_a_spec_gives_it_back() -> None:
    assert WorkerEntry.of(SPEC).spec(None) == SPEC
