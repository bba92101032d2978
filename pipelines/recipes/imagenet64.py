"""Recipes for class-conditional ImageNet-64 (Table 1, right; Appendix C.1): iCT, then BCM fine-tuned from it.

The paper trains in mixed precision, which was fp16. These recipes are fp32, that is TF32 in the convolutions of a GPU,
which rounds like fp16; bf16 rounds away the differences that large N asks for (docs/log.md).
"""

from dataclasses import replace

from bcm.networks import ADMConfig
from bcm.schedule import ScheduleConfig
from bcm.training import TrainConfig
from cluster.options import ScalingOptions
from pipelines.config import Config

DEEP = 6
"""Residual blocks a level of the deep networks, twice those of the plain ones."""


def imagenet64_ict() -> Config:
    """The consistency model iCT on ImageNet-64: what imagenet64-bcm starts from (Table 1, right; Appendix C.1).

    Expected: FID 4.60 and 3.40 at NFE 1 and 2 (README of the paper's code).
    Hardware: 64 H100; about 114 hours for 3,276.8M images.
    Command: python -m pipelines.train imagenet64-ict --storage s3://BUCKET/runs --data s3://BUCKET/imagenet64
    """
    return Config(
        recipe="imagenet64-ict",
        dataset="imagenet64",
        network=ADMConfig(times=1),
        schedule=ScheduleConfig(),
        time_steps="ct-imagenet64",
        train=TrainConfig(iterations=800_000, batch_size=4096, ema_rates=(0.99997,), objective="ct"),
        scaling=ScalingOptions(workers=64, gpu=True),
        checkpoint_every=2000,
    )


def imagenet64_ict_deep() -> Config:
    """The same with twice the residual blocks: what imagenet64-bcm-deep starts from (Table 1, right; Appendix C.1).

    Expected: FID 3.94 and 3.14 at NFE 1 and 2 (README of the paper's code).
    Hardware: 64 H100; about 186 hours for 3,276.8M images.
    Command: python -m pipelines.train imagenet64-ict-deep --storage s3://BUCKET/runs --data s3://BUCKET/imagenet64
    """
    config = imagenet64_ict()
    return replace(config, recipe="imagenet64-ict-deep", network=replace(config.network, blocks=DEEP))


def imagenet64_bcm() -> Config:
    r"""BCM on ImageNet-64, fine-tuned from imagenet64-ict (Table 1, right; Section 3.2, Appendix C.1).

    Expected: FID 4.18, 2.88, 2.78, 2.68 at NFE 1, 2, 3, 4 (README of the paper's code).
    Hardware: 64 H100; about 75 hours for 958.5M images.
    Command: python -m pipelines.train imagenet64-bcm --init URL \
        --storage s3://BUCKET/runs --data s3://BUCKET/imagenet64
    """
    return _finetuned(imagenet64_ict(), "imagenet64-bcm", (210_000, 16_000, 8_000), accumulate=2)


def imagenet64_bcm_deep() -> Config:
    r"""BCM-deep on ImageNet-64, fine-tuned from imagenet64-ict-deep (Table 1, right; Section 3.2, Appendix C.1).

    Expected: FID 3.14, 2.45, 2.61, 2.35 at NFE 1, 2, 3, 4 (README of the paper's code, and Fig. 27).
    Hardware: 64 H100; about 246 hours for 1,925.1M images.
    Command: python -m pipelines.train imagenet64-bcm-deep --init URL \
        --storage s3://BUCKET/runs --data s3://BUCKET/imagenet64
    """
    return _finetuned(imagenet64_ict_deep(), "imagenet64-bcm-deep", (360_000, 100_000, 10_000), accumulate=4)


def _finetuned(ict: Config, name: str, steps: tuple[int, int, int], accumulate: int) -> Config:
    return replace(
        ict,
        recipe=name,
        network=replace(ict.network, times=2),
        time_steps="imagenet64",
        schedule=replace(ict.schedule, curriculum_N=(320, 480, 640), curriculum_steps=steps),
        train=replace(ict.train, iterations=sum(steps), objective="bct", accumulate=accumulate),
        finetunes=True,
    )
