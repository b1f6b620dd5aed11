"""python -m bench.memory MODEL: what a training step takes, by whom, when, and why."""
