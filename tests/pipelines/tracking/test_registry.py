"""Registered models: the best is champion, and it serves where the project is not installed."""

import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from servers import mlflow_server, served_model

from bcm import inference
from bcm.inference import SCHEDULES, Toolkit, dump_schedules, load_toolkit, save_toolkit
from bcm.networks import NCSNppConfig, build_network
from bcm.precond import BCM
from bcm.timesteps import PAPER_CIFAR10, Ancestral
from bcm.types import BCMError, from_uint8, to_uint8
from pipelines.errors import TrackingError
from pipelines.tracking import client as tracking
from pipelines.tracking import registry
from pipelines.tracking.registry import Registered

NAME = "bcm-digits"
CHAMPION = f"models:/{NAME}@champion"
NETWORK = NCSNppConfig(
    image_channels=1, resolution=8, width=8, channel_mult=(1, 2), blocks=1, attention=(4,), dropout=0.0
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights."""
    torch.manual_seed(0)
    model = BCM(build_network(NETWORK))
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp("checkpoints") / "checkpoint"
    save_toolkit(directory, Toolkit(model=model.eval(), network=NETWORK, k=7, schedules=PAPER_CIFAR10, objective="bct"))
    return directory


@pytest.fixture(scope="module")
def toolkit(store: str, checkpoint: Path) -> Toolkit:
    """The model as it was registered, with at least one champion in the store."""
    register(store, checkpoint, {"mse_nfe4": 0.5}, name="served")
    return registry.toolkit_of(store, "models:/served@champion")


@pytest.fixture(scope="module")
def served(store: str, toolkit: Toolkit) -> Any:
    """The same as MLflow loads it."""
    return served_model(store, "served")


def register(uri: str, checkpoint: Path, scores: Mapping[str, float], name: str = NAME) -> Registered:
    return registry.register(uri, name=name, folder=checkpoint, scores=scores, tags={"data": "digits"})


def png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def pixels(table: pd.DataFrame) -> np.ndarray:
    """The images of an answer, (B, H, W) uint8."""
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in table["image"]])


DIGITS = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
ROWS = pd.DataFrame({"seed": [5, 0, 2**40], "image": [png(digit) for digit in DIGITS]})


@pytest.mark.parametrize(
    ("scores", "moves", "reason"),
    [
        (
            {"frechet_ratio_nfe1": 1.1, "mse_nfe4": 0.004},
            True,
            "better than .* 1.1 against 1.2, .* 0.004 against 0.005",
        ),
        ({"frechet_ratio_nfe1": 1.2, "mse_nfe4": 0.004}, True, "better than .* mse_nfe4 0.004 against 0.005"),
        ({"mse_nfe4": 0.004}, True, "better than the champion, version 1: mse_nfe4 0.004 against 0.005"),
        ({"frechet_ratio_nfe1": 1.1, "mse_nfe4": 0.006}, False, "worse than .* mse_nfe4 0.006 against 0.005"),
        ({"frechet_ratio_nfe1": 1.2, "mse_nfe4": 0.005}, False, "no better than the champion, version 1"),
        ({"frechet_ratio_nfe1": math.nan, "mse_nfe4": 0.004}, False, "worse than"),
        ({"precision": 1.0}, False, "none of frechet_ratio_nfe1, mse_nfe4 is known of both"),
    ],
)
def test_the_champion_moves_to_a_better_version_alone(
    store: str, checkpoint: Path, request: pytest.FixtureRequest, scores: dict[str, float], moves: bool, reason: str
):
    name = f"model-{abs(hash(request.node.name))}"
    first = register(store, checkpoint, {"frechet_ratio_nfe1": 1.2, "mse_nfe4": 0.005}, name)
    assert (first.version, first.is_champion, first.reason) == ("1", True, f"{name} had no champion")
    second = register(store, checkpoint, scores, name)
    assert (second.version, second.is_champion) == ("2", moves)
    assert re.search(reason, second.reason)
    champion = tracking.connect(store).get_model_version_by_alias(name, "champion")
    assert str(champion.version) == ("2" if moves else "1")


def test_a_champion_that_was_never_scored_gives_way_to_a_scored_version(store: str, checkpoint: Path):
    assert register(store, checkpoint, {}, "unscored").is_champion
    second = register(store, checkpoint, {}, "unscored")
    assert not second.is_champion and "is known of both" in second.reason
    third = register(store, checkpoint, {"mse_nfe4": 0.5}, "unscored")
    assert (third.is_champion, third.reason) == (True, "the champion, version 1, was never scored")


def test_scores_and_tags_go_with_the_version_and_its_run(store: str, checkpoint: Path):
    run_id = tracking.start_run(store, experiment="digits", name="trained", params={}, tags={})
    registered = registry.register(store, name=NAME, folder=checkpoint, scores={"fid": 0.1 + 0.2}, run_id=run_id)
    client = tracking.connect(store)
    version = client.get_model_version(NAME, registered.version)
    assert (version.run_id, float(version.tags["score.fid"])) == (run_id, 0.1 + 0.2)
    run = client.get_run(run_id)
    assert (run.data.metrics, run.info.status) == ({}, "RUNNING"), "its evaluation has logged the scores there"
    without_run = client.get_model_version(NAME, register(store, checkpoint, {"fid": 1.0}).version)
    assert without_run.tags["data"] == "digits"
    made = client.get_run(str(without_run.run_id))
    assert (made.data.metrics["fid"], made.info.status) == (1.0, "FINISHED")


def test_a_model_holds_weights_schedules_and_code_but_no_pickle(store: str, toolkit: Toolkit, checkpoint: Path):
    version = tracking.connect(store).get_model_version_by_alias("served", "champion")
    root = Path(unquote(urlsplit(str(version.source)).path))
    suffixes = {path.suffix for path in root.rglob("*") if path.is_file()}
    assert suffixes == {"", ".json", ".py", ".safetensors", ".txt", ".typed", ".yaml"}
    assert (root / "code" / "bcm" / "inference.py").is_file()
    assert "torch==" in (root / "requirements.txt").read_text()
    assert "+" not in (root / "requirements.txt").read_text()
    assert toolkit.schedules == PAPER_CIFAR10
    expected = load_toolkit(root / "artifacts" / "checkpoint")
    assert torch.equal(inference.generate(toolkit, [1, 2], 4), inference.generate(expected, [1, 2], 4))


FRESH = """
import json, sys
import mlflow.pyfunc
import pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
answer = model.predict(pd.DataFrame(json.loads(sys.argv[2])), params={"task": "reconstruct", "nfe": 2})
ours = [m for m in sys.modules if m.split(".")[0] in ("bcm", "pipelines", "data", "cluster")]
print(json.dumps({"image": list(answer["image"]), "modules": ours, "bcm": sys.modules["bcm"].__file__}))
"""


def serve_in_a_fresh_process(uri: str, reference: str, cwd: Path) -> dict[str, Any]:
    """Reconstruct `ROWS` with the registered model where neither the checkout nor pickle may be used."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {tracking.URI_VARIABLE: uri, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH, reference, ROWS.to_json(orient="records")]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_champion_serves_in_a_fresh_process_with_its_own_code(store: str, toolkit: Toolkit, tmp_path: Path):
    answer = serve_in_a_fresh_process(store, "models:/served@champion", tmp_path)
    assert {module.split(".")[0] for module in answer["modules"]} == {"bcm"}
    assert Path(answer["bcm"]).parts[-3:] == ("code", "bcm", "__init__.py")
    x = from_uint8(torch.from_numpy(DIGITS)[:, None])
    expected = to_uint8(inference.reconstruct(toolkit, x, list(ROWS["seed"]), 2))[:, 0].numpy()
    assert np.abs(pixels(pd.DataFrame({"image": answer["image"]})).astype(int) - expected).max() <= 1


@pytest.mark.slow
def test_a_model_registered_at_a_server_serves_from_there(checkpoint: Path, tmp_path: Path):
    with mlflow_server(tmp_path, str(tmp_path / "artifacts"), {}) as uri:
        with pytest.raises(TrackingError, match="it has no registered model"):
            registry.toolkit_of(uri, CHAMPION)
        assert register(uri, checkpoint, {"mse_nfe4": 0.5}).is_champion
        assert not register(uri, checkpoint, {"mse_nfe4": 0.6}).is_champion
        assert registry.toolkit_of(uri, f"models:/{NAME}/2").schedules == PAPER_CIFAR10
        with pytest.raises(TrackingError, match=rf"it has models:/{NAME}@champion, models:/{NAME}/2"):
            registry.toolkit_of(uri, "models:/other@champion")
        assert len(serve_in_a_fresh_process(uri, CHAMPION, tmp_path)["image"]) == len(ROWS)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("models:/served@best", r"has no models:/served@best; it has .*models:/served@champion.*models:/served/1"),
        ("models:/served/99", r"has no models:/served/99; it has "),
        ("models:/nothing@champion", r"has no models:/nothing@champion; it has "),
        ("served", r"'served' names no model; write models:/"),
        ("models:/served/1/artifacts", r"names no model; write models:/"),
    ],
)
def test_an_unknown_model_is_an_error_that_lists_what_exists(
    store: str, toolkit: Toolkit, reference: str, message: str
):
    with pytest.raises(TrackingError, match=message):
        registry.toolkit_of(store, reference)


def test_a_wrong_checkpoint_or_schedule_registers_nothing(store: str, checkpoint: Path, tmp_path: Path):
    with pytest.raises(BCMError, match="no finished checkpoint"):
        register(store, tmp_path, {}, name="wrong")
    misnamed = tmp_path / "misnamed"
    shutil.copytree(checkpoint, misnamed)
    (misnamed / SCHEDULES).write_text(json.dumps(dump_schedules({"sample-9": Ancestral()})))
    with pytest.raises(BCMError, match="whose name is 'sample-1'"):
        register(store, misnamed, {}, name="wrong")
    with pytest.raises(TrackingError, match="has no models:/wrong/1"):
        registry.toolkit_of(store, "models:/wrong/1")


@pytest.mark.parametrize("nfe", [0, 3])
def test_generated_images_are_those_of_the_seeds(served: Any, toolkit: Toolkit, nfe: int):
    answer = served.predict(ROWS[["seed"]], params={"task": "generate", "nfe": nfe})
    expected = to_uint8(inference.generate(toolkit, list(ROWS["seed"]), nfe))[:, 0].numpy()
    assert np.array_equal(pixels(answer), expected)


def test_many_rows_are_answered_like_few(served: Any):
    seeds = pd.DataFrame({"seed": range(300)})
    many = pixels(served.predict(seeds, params={"nfe": 1}))
    few = pixels(served.predict(seeds.iloc[[0, 255, 256, 299]], params={"nfe": 1}))
    assert np.abs(many[[0, 255, 256, 299]].astype(int) - few).max() <= 1


def test_inverted_images_are_little_endian_floats(served: Any, toolkit: Toolkit):
    answer = served.predict(ROWS, params={"task": "invert", "nfe": 1})
    noise = [
        np.frombuffer(base64.b64decode(row["noise"]), "<f4").reshape(json.loads(row["shape"]))
        for _, row in answer.iterrows()
    ]
    x = from_uint8(torch.from_numpy(DIGITS)[:, None])
    assert np.array_equal(np.stack(noise), inference.invert(toolkit, x, list(ROWS["seed"]), 1).numpy())


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (png(DIGITS[0, :, :4]), "row 0: the image is 4x8 of mode L; this model takes 8x8 of mode L"),
        (png(np.zeros((8, 8, 3), np.uint8)), "row 0: the image is 8x8 of mode RGB"),
        ("no base64!", "row 0: the image is not base64 text of a whole PNG"),
        (base64.b64encode(b"GIF89a" + bytes(40)).decode(), "row 0: the image is not base64 text of a whole PNG"),
        (png(DIGITS[0])[:72], "row 0: the image is not base64 text of a whole PNG"),
    ],
)
def test_wrong_images_are_named(served: Any, image: str, message: str):
    with pytest.raises(MlflowException, match=message):
        served.predict(pd.DataFrame({"seed": [1], "image": [image]}), params={"task": "reconstruct"})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"task": "paint"}, "task 'paint' is unknown; known are generate, invert, reconstruct"),
        ({"task": "invert"}, "needs the column `image`"),
        ({"nfe": 9}, "no time steps 'sample-9'; it has sample-1, sample-2, sample-3, sample-4"),
    ],
)
def test_wrong_parameters_are_named(served: Any, params: dict[str, Any], message: str):
    with pytest.raises(MlflowException, match=message):
        served.predict(ROWS[["seed"]], params=params)
