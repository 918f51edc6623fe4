"""Replays public request traces against the project's own decisions over simulated engines."""
