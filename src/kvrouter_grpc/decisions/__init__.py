"""Decisions on disk: written as they are taken, and taken once more under other settings."""
