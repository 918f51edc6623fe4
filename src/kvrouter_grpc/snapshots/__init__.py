"""Warm starts: snapshots of the index on disk, and taken from another router."""
