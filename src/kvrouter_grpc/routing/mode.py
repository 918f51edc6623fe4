"""The knobs of the modes of choosing. The compiled core (`core/mode.pxd`) has the modes themselves."""

from dataclasses import dataclass

SESSION_MODES = frozenset({"session", "kv-aware"})
"""Modes that ask which session a request belongs to."""

CPU_TAINT = "cpu"
"""The taint of workers that mode device-aware-weighted counts as the slower kind."""


@dataclass(frozen=True, slots=True)
class Knobs:
    """Names and defaults as the `--router-*` flags."""

    session_load_bound: float = 1.25
    prefix_threshold: float = 0.0
    kv_aware_threshold: float = 2000.0
    accelerator_to_cpu_ratio: float = 8.0
