"""Runs of tests in MLflow."""

from pipelines.tracking import client


def new_run(uri: str) -> str:
    """Id of a run that knows nothing yet."""
    return client.start_run(uri, experiment="digits", name="a run", params={}, tags={})


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric as the store has it, in the order of logging."""
    metrics = client.connect(uri).get_metric_history(run_id, name)
    return [(metric.step, metric.value) for metric in metrics]
