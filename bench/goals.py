"""What we want to reach, by key of the figure: `{suite}.{case}.goal.{measure}`."""

GOALS: dict[str, float] = {
    "hash.8192.goal.us": 3.0,
    "hash.131072.goal.us": 45.0,
    **{f"match.{shape}_512_x_{workers}.goal.p50_us": 1.0 for shape in ("full", "part") for workers in (8, 64, 256)},
    **{f"match.{shape}_8192_x_{workers}.goal.p50_us": 2.0 for shape in ("full", "part") for workers in (8, 64, 256)},
    "decide.64_workers_512_tokens.goal.us": 3.0,
    "decide.64_workers_8192_tokens.goal.us": 6.0,
    "decide.64_workers_32768_tokens.goal.us": 15.0,
    "decide.1024_workers_8192_tokens.goal.us": 20.0,
    "events.store_1_per_event.goal.us_per_block": 0.8,
    "events.store_32_per_event.goal.us_per_block": 0.22,
    "events.store_256_per_event.goal.us_per_block": 0.18,
    "events.remove_1_per_event.goal.us_per_block": 0.6,
    "events.remove_32_per_event.goal.us_per_block": 0.10,
    "events.remove_256_per_event.goal.us_per_block": 0.07,
    "stream.store_1x1.goal.us_per_block": 4.0,
    "stream.store_1x32.goal.us_per_block": 0.5,
    "stream.store_32x1.goal.us_per_block": 0.28,
    "stream.store_256x1.goal.us_per_block": 0.22,
    "stream.storm.goal.p99_ms": 2.0,
    "memory.per_block.goal.bytes": 40.0,
}
