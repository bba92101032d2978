"""Registered models: safetensors, schedules and the code that serves them; the alias `champion` marks the best.

Only this module, `tracking`, `metriclog` and `serving` know MLflow.
"""

import math
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING

import bcm
from bcm.checkpoint import verify_files
from bcm.inference import Toolkit, check_task, load_toolkit
from pipelines.errors import TrackingError
from pipelines.tracking import client as tracking
from pipelines.tracking.client import redacted, reported

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import Model, ModelSignature

CHAMPION = "champion"
CHAMPION_SCORES = ("frechet_ratio_nfe1", "mse_nfe4")
"""The scores that decide the champion, lower is better."""

_SCORE_TAG = "score."
_REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "safetensors", "torch")


@dataclass(frozen=True)
class Registered:
    """A new model version."""

    name: str
    """Of the registered model."""
    version: str
    is_champion: bool
    reason: str
    """Why it became the champion or did not, with the scores that decided."""


def register(
    uri: str,
    *,
    name: str,
    folder: Path,
    scores: Mapping[str, float],
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> Registered:
    """Register a model as a new version of the model `name`.

    Args:
        uri: from `client.resolve_uri`.
        name: name of the registered model; made when needed.
        folder: the model as `bcm.inference.save_toolkit` writes it.
        scores: results of the evaluation; `CHAMPION_SCORES` decide whether it becomes the champion.
        run_id: the run it was trained and evaluated in; without one, a run is made and the scores are logged there.
        tags: of the version.

    Raises:
        TrackingError: MLflow does not answer or refuses.
        BCMError: the model or a schedule is wrong, or it makes no samples; nothing was registered then.
    """
    verify_files(folder)
    toolkit = load_toolkit(folder)
    check_task(toolkit, "sample")
    client = tracking.connect(uri)
    run = run_id or tracking.start_run(uri, experiment=name, name="register", params={}, tags={})
    if run_id is None:
        tracking.log_scores(uri, run, scores, toolkit.k)
    all_tags = {**(tags or {}), **{f"{_SCORE_TAG}{key}": repr(float(score)) for key, score in scores.items()}}
    with reported(uri, f"the model {name!r} cannot be registered"):
        version = _create_version(client, name, folder, run, all_tags)
        is_champion, reason = _judge(client, name, scores)
        if is_champion:
            client.set_registered_model_alias(name, CHAMPION, version)
    if run_id is None:
        tracking.finish_run(uri, run, "FINISHED")
    return Registered(name, version, is_champion, reason)


def toolkit_of(uri: str, reference: str, device: str = "cpu") -> Toolkit:
    """Weights and schedules of the model that `reference` names, as `models:/bcm-digits@champion`; no code is run."""
    client = tracking.connect(uri)
    version = _find(client, uri, reference)
    with tempfile.TemporaryDirectory() as folder:
        with reported(uri, f"{reference} cannot be fetched"):
            from mlflow.artifacts import download_artifacts

            # A models:/ URI would be resolved with MLflow's global tracking URI.
            files = f"{client.get_model_version_download_uri(version.name, version.version)}/artifacts"
            fetched = download_artifacts(files, dst_path=folder, tracking_uri=uri, registry_uri=uri)
        (model,) = Path(fetched).iterdir()
        return load_toolkit(model, device)


def _save_pyfunc(path: Path, checkpoint: Path, mlflow_model: "Model") -> None:
    """Write a model in MLflow's format that serves where the project is not installed."""
    import mlflow.pyfunc

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*input example", UserWarning)
        mlflow.pyfunc.save_model(
            path,
            python_model=str(Path(__file__).with_name("serving.py")),
            artifacts={"model": str(checkpoint)},
            code_paths=[str(Path(bcm.__file__).parent)],
            # Without the local part of a version: 2.13.0+cpu is known to one index alone.
            pip_requirements=[f"{package}=={installed_version(package).split('+')[0]}" for package in _REQUIREMENTS],
            signature=_signature(),
            mlflow_model=mlflow_model,
        )


def _signature() -> "ModelSignature":
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema(
            [
                ColSpec("long", "seed"),
                ColSpec("string", "image", required=False),
                ColSpec("long", "label", required=False),
            ]
        ),
        outputs=Schema([ColSpec("string", column, required=False) for column in ("image", "noise", "shape")]),
        params=ParamSchema([ParamSpec("task", "string", "generate"), ParamSpec("nfe", "long", 0)]),
    )


def _create_version(client: "MlflowClient", name: str, checkpoint: Path, run_id: str, tags: dict[str, str]) -> str:
    """Store a model whole, then give it the next version number of `name`."""
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    stored = client.create_logged_model(client.get_run(run_id).info.experiment_id, name, run_id)
    with tempfile.TemporaryDirectory(prefix="bcm-pyfunc-") as folder:
        path = Path(folder) / "model"
        _save_pyfunc(path, checkpoint, Model(stored.artifact_location, run_id, model_id=stored.model_id))
        client.log_model_artifacts(stored.model_id, str(path))
    client.finalize_logged_model(stored.model_id, "READY")
    version = client.create_model_version(name, stored.artifact_location, run_id, tags, model_id=stored.model_id)
    return str(version.version)


def _judge(client: "MlflowClient", name: str, scores: Mapping[str, float]) -> tuple[bool, str]:
    """Whether a version with these scores is to be the champion, and why."""
    aliases = client.get_registered_model(name).aliases
    if CHAMPION not in aliases:
        return True, f"{name} had no champion"
    champion = client.get_model_version(name, str(aliases[CHAMPION]))
    rival = f"the champion, version {champion.version}"
    pairs = [
        (key, _worst_if_nan(scores[key]), _worst_if_nan(float(champion.tags[_SCORE_TAG + key])))
        for key in CHAMPION_SCORES
        if key in scores and _SCORE_TAG + key in champion.tags
    ]
    scored = [key for key in CHAMPION_SCORES if _SCORE_TAG + key in champion.tags]
    if not scored and any(key in scores for key in CHAMPION_SCORES):
        return True, f"{rival}, was never scored"
    if not pairs:
        return False, f"none of {', '.join(CHAMPION_SCORES)} is known of both it and {rival}"
    compared = ", ".join(f"{key} {new:.4g} against {old:.4g}" for key, new, old in pairs)
    if any(new > old for _, new, old in pairs):
        return False, f"worse than {rival}: {compared}"
    if all(new == old for _, new, old in pairs):
        return False, f"no better than {rival}: {compared}"
    return True, f"better than {rival}: {compared}"


def _worst_if_nan(score: float) -> float:
    return math.inf if math.isnan(score) else score


def _find(client: "MlflowClient", uri: str, reference: str) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", reference)
    if match is None:
        raise TrackingError(f"{reference!r} names no model; write models:/<name>@<alias> or models:/<name>/<version>.")
    name, alias, number = match.groups()
    with reported(uri, f"{reference} cannot be looked up"):
        try:
            return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
        raise TrackingError(
            f"MLflow at {redacted(uri)} has no {reference}; it has {_known(client)}. "
            f"Choose one of these, register the model, or set {tracking.URI_VARIABLE} to the store that has it."
        )


def _known(client: "MlflowClient") -> str:
    """The references that exist, for a message."""
    references: list[str] = []
    for model in client.search_registered_models(max_results=20):
        versions = client.search_model_versions(f"name='{model.name}'", max_results=20)
        references += [f"models:/{model.name}@{alias}" for alias in model.aliases]
        references += [f"models:/{model.name}/{version.version}" for version in versions]
    return ", ".join(references) or "no registered model"
