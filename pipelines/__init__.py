"""The commands, `python -m pipelines.NAME --help`, and the rooms behind them, from training to figures."""
