"""`GET /metrics` with the names that vLLM gives its numbers."""

from collections.abc import Sequence

from kvrouter_grpc.mock_worker.config import MockWorkerConfig
from kvrouter_grpc.mock_worker.engine import Engine


def render_metrics(config: MockWorkerConfig, engines: Sequence[Engine], started: float, rejected: int) -> str:
    """The whole page in the Prometheus text format.

    Args:
        config: Names and sizes.
        engines: One per rank; the label `engine` is the rank.
        started: Process start, seconds since the epoch.
        rejected: Requests refused because too many were queued.
    """
    lines: list[str] = []
    model = _escape(config.model)
    labels = [f'engine="{rank}",model_name="{model}"' for rank in range(len(engines))]

    def family(name: str, kind: str, values: Sequence[float], more: str = "", *, head: bool = True) -> None:
        if head:
            lines.append(f"# TYPE {name} {kind}")
        lines.extend(f"{name}{{{label}{more}}} {float(value)}" for label, value in zip(labels, values, strict=True))

    schedulers = [engine.scheduler for engine in engines]
    counters = [scheduler.counters for scheduler in schedulers]
    family("vllm:num_requests_running", "gauge", [scheduler.num_running for scheduler in schedulers])
    family("vllm:num_requests_waiting", "gauge", [scheduler.num_waiting for scheduler in schedulers])
    family("vllm:kv_cache_usage_perc", "gauge", [engine.blocks.usage for engine in engines])
    family("vllm:prefix_cache_queries_total", "counter", [counter.prefix_queries for counter in counters])
    family("vllm:prefix_cache_hits_total", "counter", [counter.prefix_hits for counter in counters])
    family("vllm:num_preemptions_total", "counter", [counter.preemptions for counter in counters])
    family("vllm:prompt_tokens_total", "counter", [counter.prompt for counter in counters])
    by_source = {
        "local_compute": [counter.prompt - counter.prefix_hits - counter.prompt_remote for counter in counters],
        "local_cache_hit": [counter.prefix_hits for counter in counters],
        "external_kv_transfer": [counter.prompt_remote for counter in counters],
    }
    for source, values in by_source.items():
        name = "vllm:prompt_tokens_by_source_total"
        family(name, "counter", values, f',source="{source}"', head=source == "local_compute")
    family("vllm:prompt_tokens_cached_total", "counter", [counter.prefix_hits for counter in counters])
    family("vllm:generation_tokens_total", "counter", [counter.generation for counter in counters])
    for reason in ("stop", "length", "abort", "error"):
        values = [counter.finished[reason] for counter in counters]
        more = f',finished_reason="{reason}"'
        family("vllm:request_success_total", "counter", values, more, head=reason == "stop")
    lines.append("# TYPE vllm:admission_rejections_total counter")
    lines.append(
        f'vllm:admission_rejections_total{{model_name="{model}",reason="max_num_queued_reqs"}} {float(rejected)}'
    )
    lines.append("# TYPE vllm:time_to_first_token_seconds histogram")
    for label, engine in zip(labels, engines, strict=True):
        lines.extend(engine.ttft.render("vllm:time_to_first_token_seconds", label))
    lines.append("# TYPE vllm:cache_config_info gauge")
    lines.extend(
        f'vllm:cache_config_info{{block_size="{config.block_size}",enable_prefix_caching="{config.prefix_caching}",engine="{rank}",'
        f'kv_cache_size_tokens="{config.num_blocks * config.block_size}",num_gpu_blocks="{config.num_blocks}",'
        f'prefix_caching_hash_algo="sha256"}} 1.0'
        for rank in range(len(engines))
    )
    lines.append("# TYPE process_start_time_seconds gauge")
    lines.append(f"process_start_time_seconds {started!r}")
    return "\n".join(lines) + "\n"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
