from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrouter_grpc.types import EngineReport
from kvrouter_grpc.upstream.chunk import MalformedAnswerError
from kvrouter_grpc.upstream.facts import (
    CacheConfig,
    EngineSettings,
    EventSources,
    ServedModels,
    cache_config,
    engine_reports,
    engine_settings,
    event_sources,
    served_models,
    server_version,
)
from kvrouter_grpc.upstream.metrics_text import Sample, samples

WIRE = Path(__file__).parent / "vllm_wire"  # recorded from vLLM 0.32.0


def test_recorded_answers() -> None:
    assert served_models((WIRE / "models.json").read_bytes()) == ServedModels(("tiny",), (), 1024)
    assert cache_config((WIRE / "metrics.txt").read_bytes()) == CacheConfig(
        32, 64, 1, 1.79516260877e9, prefix_caching=True
    )
    assert engine_reports((WIRE / "metrics.txt").read_bytes()) == [EngineReport(0, 0, 0.0, 2094, 992, 1.79516260877e9)]
    assert server_version((WIRE / "version.json").read_bytes()) == "0.32.0"
    assert event_sources((WIRE / "kv_event_sources.json").read_bytes(), "10.0.0.7") == EventSources(
        enabled=True, events="tcp://10.0.0.7:5557", replay="tcp://10.0.0.7:5562", topic="kv-events", ranks=1
    )


def test_models_with_a_parent_are_adapters() -> None:
    body = b'{"data":[{"id":"base","max_model_len":8},{"id":"alias","parent":null},{"id":"lora","parent":"base"}]}'
    assert served_models(body) == ServedModels(("base", "alias"), ("lora",), 8)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"data":[]}',
        b'{"data":[{"id":1}]}',
        b'{"data":[{"id":"l","parent":"b"}]}',
        b"\xff",
    ],
)
def test_what_is_no_model_list_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedAnswerError):
        served_models(body)


def test_engines_are_counted_and_the_smallest_counts() -> None:
    page = b"""
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="90"} 1.0
"""
    assert cache_config(page) == CacheConfig(16, 90, 2, None)


@pytest.mark.parametrize("page", [b"", b'vllm:cache_config_info{block_size="None",num_gpu_blocks="-1"} 1', b"\xff\n{"])
def test_what_a_metrics_page_does_not_tell_is_none(page: bytes) -> None:
    assert cache_config(page) == CacheConfig(None, None, 1, None)


@pytest.mark.parametrize(
    ("bound", "host", "reachable"),
    [
        ("tcp://*:5557", "worker-0", "tcp://worker-0:5557"),
        ("tcp://0.0.0.0:5557", "10.1.2.3", "tcp://10.1.2.3:5557"),
        ("tcp://[::]:5557", "fd00::1", "tcp://[fd00::1]:5557"),
        ("tcp://:::5557", "fd00::1", "tcp://[fd00::1]:5557"),
        ("tcp://10.9.9.9:41000", "10.1.2.3", "tcp://10.9.9.9:41000"),
        ("tcp://[fd00::9]:41000", "10.1.2.3", "tcp://[fd00::9]:41000"),
        ("tcp://*:0", "10.1.2.3", None),
        ("tcp://*:65536", "10.1.2.3", None),
        ("tcp://*", "10.1.2.3", None),
        ("ipc:///tmp/events", "10.1.2.3", None),
        ("inproc://events", "10.1.2.3", None),
        ("tcp://a b:1", "10.1.2.3", None),
    ],
)
def test_bound_addresses_become_reachable_ones(bound: str, host: str, reachable: str | None) -> None:
    body = f'{{"0":{{"enable_kv_cache_events":true,"endpoint":"{bound}"}}}}'.encode()
    assert event_sources(body, host).events == reachable


def test_ranks_are_counted_and_the_lowest_is_the_base() -> None:
    body = b"""{"10":{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://*:5567"},
                "2":{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://*:5559","replay_endpoint":null}}"""
    assert event_sources(body, "h") == EventSources(enabled=True, events="tcp://h:5559", ranks=2)


@pytest.mark.parametrize(
    ("body", "ranks"),
    [
        (b"{}", 0),
        (b'{"0":{"enable_kv_cache_events":false,"publisher":"null","endpoint":"tcp://*:5557"}}', 1),
        (b'{"0":{"enable_kv_cache_events":true,"publisher":"null","endpoint":"tcp://*:5557"}}', 1),
        (b'{"0":{}}', 1),
    ],
)
def test_servers_without_events_say_so(body: bytes, ranks: int) -> None:
    assert event_sources(body, "h") == EventSources(enabled=False, ranks=ranks)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"0":1}', b'{"0":{"endpoint":5}}'])
def test_other_shapes_of_event_sources_are_refused(body: bytes) -> None:
    with pytest.raises(MalformedAnswerError):
        event_sources(body, "h")


def test_every_rank_reports_in_the_order_of_the_ranks() -> None:
    page = b"""
process_start_time_seconds 7.5
vllm:num_requests_running{engine="10",model_name="m"} 10
vllm:num_requests_running{engine="2",model_name="m"} 2
vllm:num_requests_running{engine="3",model_name="m"} 3
vllm:num_requests_waiting_by_reason{engine="3",reason="capacity"} 9
vllm:num_requests_waiting{engine="2",model_name="m"} 1
vllm:num_requests_waiting{engine="10",model_name="m"} 4
vllm:kv_cache_usage_perc{engine="2"} 0.25
vllm:prefix_cache_queries_total{engine="10"} 100
"""
    assert engine_reports(page) == [
        EngineReport(running=2, waiting=1, kv_usage=0.25, process_start_time=7.5),
        EngineReport(running=10, waiting=4, prefix_queries=100, process_start_time=7.5),
    ]


@pytest.mark.parametrize("value", [b"NaN", b"+Inf", b"-1", b"1e300", b"x", b""])
def test_a_number_that_counts_nothing_is_not_told(value: bytes) -> None:
    page = b"""
vllm:num_requests_running 1
vllm:num_requests_waiting 2
vllm:prefix_cache_hits_total %(v)s
vllm:kv_cache_usage_perc %(v)s
process_start_time_seconds %(v)s
""" % {b"v": value}
    assert engine_reports(page) == [EngineReport(1, 2)]
    assert engine_reports(page.replace(b"ing 1", b"ing " + value)) == []


class TestSamples:
    def test_reads_the_text_format(self) -> None:
        page = rb"""# HELP a help
# TYPE a gauge
a 1
a{} 2
a{x="1",y="}",} 3 1700000000000
a{ x = "q\"b\\n\n" } +Inf
ab 9
a_total 9
 a 9
b{x="1"} -4.5e-1
a{x="unfinished} 9
a
a nine
a 7"""
        assert list(samples(page, ("a", "b"))) == [
            Sample("a", {}, 1.0),
            Sample("a", {}, 2.0),
            Sample("a", {"x": "1", "y": "}"}, 3.0),
            Sample("a", {"x": 'q"b\\n\n'}, float("inf")),
            Sample("a", {}, 7.0),
            Sample("b", {"x": "1"}, -0.45),
        ]

    @given(st.dictionaries(st.from_regex(r"\A[a-z_][a-z0-9_]*\Z"), st.text()), st.floats(allow_nan=False))
    def test_labels_come_back_as_they_were_written(self, labels: dict[str, str], value: float) -> None:
        def escaped(text: str) -> str:
            return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")

        written = ",".join(f'{name}="{escaped(text)}"' for name, text in labels.items())
        page = f"m{{{written}}} {value!r}\n".encode("utf-8", "surrogatepass")
        assert list(samples(page, {"m"})) == [Sample("m", labels, value)]

    @given(st.binary(max_size=300))
    def test_garbage_is_passed_over(self, garbage: bytes) -> None:
        for _ in samples(b'm{x="' + garbage + b"\nm" + garbage, {"m"}):
            pass

    def test_a_metric_without_end_is_read_in_part(self) -> None:
        assert len(list(samples(b"m 1\n" * 1_000_000, {"m"}))) == 4096

    def test_a_hostile_line_takes_no_time(self) -> None:
        page = b"m{" + b'"\\\\"' * 16_000 + b"\n" + b'm{a="' + b'\\"' * 30_000 + b"\n" + b"m" * 10_000_000
        assert list(samples(page, {"m"})) == []


def test_server_info_tells_settings() -> None:
    body = (
        b'{"vllm_config": {"cache_config": {"block_size": 32, "x": 1}, "parallel_config": {"data_parallel_size": 2}, '
        b'"kv_events_config": {"enable_kv_cache_events": true, "publisher": "zmq"}}}'
    )
    assert engine_settings(body) == EngineSettings(32, 2, kv_events=True)
    assert engine_settings(b'{"vllm_config": {"kv_events_config": null}}') == EngineSettings(kv_events=False)
    assert engine_settings(b'{"vllm_config": {}}') == EngineSettings()


@pytest.mark.parametrize("body", [b"", b"{}", b'{"vllm_config": "model=x"}', b"[" * 100_000, b"\xff"])
def test_other_shapes_of_server_info_are_refused(body: bytes) -> None:
    with pytest.raises(MalformedAnswerError):
        engine_settings(body)


def test_prefix_caching_counts_as_off_when_one_engine_has_none() -> None:
    def page(*values: str) -> bytes:
        lines = [
            f'vllm:cache_config_info{{engine="{n}",enable_prefix_caching="{value}"}} 1.0'
            for n, value in enumerate(values)
        ]
        return "\n".join(lines).encode()

    assert cache_config(page("True", "True")).prefix_caching is True
    assert cache_config(page("True", "False")).prefix_caching is False
    assert cache_config(page("None")).prefix_caching is None
