"""The registered model as MLflow serves it: generate, invert or reconstruct images sent and returned as base64 PNG.

MLflow copies this file into the model, beside a copy of `bcm`, and runs it where the project may not be installed.
"""

import base64
import binascii
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image, UnidentifiedImageError

from bcm import inference
from bcm.types import BCMError, from_uint8, to_uint8

ROWS_AT_ONCE = 256
TASKS = ("generate", "invert", "reconstruct")
_MODES = {1: "L", 3: "RGB"}


class ServedBCM(PythonModel):
    """A bidirectional consistency model behind MLflow's `predict`.

    Input columns: `seed`; `image` (base64 PNG) to invert or reconstruct; `label` where the model knows labels.
    Parameters: `task` (generate, invert, reconstruct) and `nfe` (0: the most it has time steps for).
    Output columns: `image` (base64 PNG); to invert, `noise` (base64 of little-endian float32) and `shape` (JSON).
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Read weights and schedules from the model's artifacts."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.toolkit = inference.load_toolkit(Path(context.artifacts["model"]), device)

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any]
    ) -> pd.DataFrame:
        """Answer a table of rows; a wrong row or parameter raises `MlflowException`, which REST clients see as 400."""
        starts = range(0, len(model_input), ROWS_AT_ONCE)
        parts = [model_input.iloc[start : start + ROWS_AT_ONCE] for start in starts]
        try:
            answers = [self._answer(params["task"], int(params["nfe"]), part) for part in parts]
        except BCMError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return pd.concat(answers, ignore_index=True) if answers else pd.DataFrame({"image": []})

    def _answer(self, task: str, nfe: int, rows: pd.DataFrame) -> pd.DataFrame:
        if task not in TASKS:
            raise BCMError(f"task {task!r} is unknown; known are {', '.join(TASKS)}.")
        seeds = [int(seed) for seed in rows["seed"]]
        labels = [int(label) for label in rows["label"]] if "label" in rows else None
        if task == "generate":
            return _image_table(inference.generate(self.toolkit, seeds, nfe, labels))
        inference.check_task(self.toolkit, "invert")
        x = from_uint8(self._images(rows)).to(next(self.toolkit.model.parameters()).device)
        if task == "reconstruct":
            return _image_table(inference.reconstruct(self.toolkit, x, seeds, nfe, labels))
        noise = inference.invert(self.toolkit, x, seeds, nfe, labels).cpu().numpy().astype("<f4")
        encoded = [base64.b64encode(row.tobytes()).decode() for row in noise]
        return pd.DataFrame({"noise": encoded, "shape": [json.dumps(noise.shape[1:])] * len(rows)})

    def _images(self, rows: pd.DataFrame) -> torch.Tensor:
        """The `image` column as (B, C, H, W) uint8."""
        if "image" not in rows:
            raise BCMError("this task needs the column `image`, base64 text of a PNG for each row.")
        network = self.toolkit.network
        images = [_decode(row, text, network.image_channels, network.resolution) for row, text in rows["image"].items()]
        return torch.from_numpy(np.stack(images)).movedim(-1, 1)


def _decode(row: object, text: object, channels: int, resolution: int) -> np.ndarray:
    """(H, W, C) uint8; the size is checked before any pixel is decoded."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode(str(text), validate=True)), formats=("PNG",))
        if image.size != (resolution, resolution) or image.mode != _MODES[channels]:
            raise BCMError(
                f"row {row}: the image is {image.width}x{image.height} of mode {image.mode}; "
                f"this model takes {resolution}x{resolution} of mode {_MODES[channels]}."
            )
        return np.asarray(image).reshape(resolution, resolution, channels)
    except (binascii.Error, UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BCMError(f"row {row}: the image is not base64 text of a whole PNG ({error}).") from error


def _image_table(x: torch.Tensor) -> pd.DataFrame:
    texts: list[str] = []
    for image in to_uint8(x).movedim(1, -1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, format="PNG")
        texts.append(base64.b64encode(buffer.getvalue()).decode())
    return pd.DataFrame({"image": texts})


set_model(ServedBCM())
