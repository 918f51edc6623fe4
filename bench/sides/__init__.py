"""The processes that are measured, and those that make them work. Each answers calls, see `bench.side`."""
