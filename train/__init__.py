"""Training: data, recipes, the loop, its files, and the command `python -m train.run`."""
