"""Training runs: what is checked before, the launch, the worker, the record."""
