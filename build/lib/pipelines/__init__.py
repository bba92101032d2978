"""The jobs: each module is one command, `python -m pipelines.NAME --help`."""
