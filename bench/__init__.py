"""Measurements: `pytest bench/ --benchmark-only` for time, `python -m bench.memory` for memory."""
