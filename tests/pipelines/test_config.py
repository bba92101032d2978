"""Configs survive storage whole, and what is wrong with one is said with the nearest right name."""

import json
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from bcm import strict
from bcm.types import BCMError
from cluster.errors import ClusterError
from data.errors import DataError
from pipelines.cli import parse, run_command
from pipelines.config import Config, flatten
from pipelines.errors import ConfigError, TrackingError, nearest
from pipelines.recipes import RECIPES, recipe
from pipelines.train import TrainOptions


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Puts the handler of SIGTERM back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def stored(config: Config) -> dict[str, Any]:
    return json.loads(json.dumps(strict.dump(config)))


def from_dict(entry: object) -> Config:
    return strict.read(Config, json.dumps(entry), "config", ConfigError, complete=True)


def options(name: str, *arguments: str) -> TrainOptions:
    return parse(TrainOptions, arguments, "train", TrainOptions(config=recipe(name)))


@pytest.mark.parametrize("name", RECIPES)
def test_a_config_survives_json(name: str):
    assert from_dict(stored(recipe(name))) == recipe(name)


@pytest.mark.parametrize(
    ("path", "wrong", "where", "meant"),
    [
        ((), "checkpoint_evry", "", "checkpoint_every"),
        (("train",), "batchsize", "train.", "batch_size"),
        (("network",), "chanel_mult", "network.", "channel_mult"),
        (("schedule",), "p_men", "schedule.", "p_mean"),
        (("network",), "head_chanels", "network.", "head_channels"),
    ],
)
def test_an_unknown_key_names_its_place_and_the_nearest(path: tuple[str, ...], wrong: str, where: str, meant: str):
    entry = stored(recipe("imagenet64-ict" if meant == "head_channels" else "digits"))
    inner = entry
    for key in path:
        inner = inner[key]
    inner[wrong] = 1
    with pytest.raises(ConfigError, match=f"^config: unknown key '{where}{wrong}'; did you mean '{meant}'[?]"):
        from_dict(entry)


def test_a_missing_key_is_named():
    entry = stored(recipe("digits"))
    del entry["train"]["seed"]
    with pytest.raises(ConfigError, match=r"^config: missing key 'train.seed'"):
        from_dict(entry)


@pytest.mark.parametrize("part", ["train", "network", "schedule", "scaling"])
def test_a_part_that_is_no_object_is_refused(part: str):
    with pytest.raises(ConfigError, match=f"^config: {part}: input should be .*object"):
        from_dict(stored(recipe("digits")) | {part: 3})


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("train", "seed", "zero"), ("train", "batch_size", None), ("network", "width", "wide"), ("schedule", "s0", [])],
)
def test_a_value_of_another_kind_is_refused(part: str, key: str, value: object):
    entry = stored(recipe("digits"))
    entry[part][key] = value
    with pytest.raises(ConfigError, match=f"^config: {part}.{key}: input should be"):
        from_dict(entry)


@pytest.mark.parametrize(
    ("kind", "hint"), [("ADM", "expected tags: 'ncsnpp', 'adm'"), (None, "missing key 'network.kind'")]
)
def test_a_network_of_unknown_kind_is_refused(kind: str | None, hint: str):
    entry = stored(recipe("digits"))
    entry["network"] = {"kind": kind} if kind else {}
    with pytest.raises(ConfigError, match=r"^config: ") as raised:
        from_dict(entry)
    assert hint in str(raised.value)


def test_the_objective_must_fit_the_network():
    config = recipe("digits")
    with pytest.raises(BCMError, match=r"objective 'ct' trains a network of 1 time, but network.times is 2"):
        replace(config, train=replace(config.train, objective="ct"))
    with pytest.raises(BCMError, match=r"objective 'bct' trains a network of 2 times, but network.times is 1"):
        replace(config, network=replace(config.network, times=1))


def test_micro_batches_must_divide_a_workers_share():
    config = recipe("digits")
    with pytest.raises(ConfigError, match=r"the 64 images of a worker do not divide into train.accumulate 128"):
        replace(config, train=replace(config.train, accumulate=128))


@pytest.mark.parametrize("workers", [3, 256])
def test_a_batch_that_does_not_divide_is_refused(workers: int):
    config = recipe("digits")
    with pytest.raises(ConfigError, match=f"batch-size 128 does not divide among scaling.workers {workers}"):
        replace(config, scaling=replace(config.scaling, workers=workers))


@pytest.mark.parametrize("field", ["checkpoint_every", "log_every"])
def test_intervals_are_positive(field: str):
    with pytest.raises(ConfigError, match="at least 1"):
        from_dict(stored(recipe("digits")) | {field: 0})


def test_flatten_joins_keys_with_dots():
    assert flatten({"a": {"b": {"c": 1}, "d": (2, 3)}, "e": None}) == {"a.b.c": 1, "a.d": (2, 3), "e": None}


def test_nearest_lists_all_and_guesses_only_what_is_near():
    assert nearest("digitz", ["digits", "cifar10"]) == "did you mean 'digits'? Known: digits, cifar10."
    assert nearest("zebra", ["digits", "cifar10"]) == "Known: digits, cifar10."


def test_options_of_the_command_line_replace_those_of_the_recipe():
    given = options(
        "digits",
        *("--train.batch-size", "128", "--network.channel-mult", "1", "2", "2", "--scaling.workers", "4"),
        *("--schedule.pairs", "wide", "--log-every", "7", "--storage", "s3://bucket/runs", "--dry-run"),
    )
    before = recipe("digits")
    assert given.config == replace(
        before,
        train=replace(before.train, batch_size=128),
        network=replace(before.network, channel_mult=(1, 2, 2)),
        schedule=replace(before.schedule, pairs="wide"),
        scaling=replace(before.scaling, workers=4),
        log_every=7,
    )
    assert (given.storage, given.data, given.resume, given.dry_run) == ("s3://bucket/runs", None, None, True)


@pytest.mark.parametrize("name", ["cifar10-bcm", "imagenet64-bcm", "lsun-bedroom256-bcm"])
def test_without_options_a_recipe_is_itself(name: str):
    assert options(name).config == recipe(name)


def test_options_of_the_other_kind_of_network_are_refused(capsys: pytest.CaptureFixture[str]):
    given = options("imagenet64-ict", "--network.head-channels", "32", "--network.attention-norm", "none")
    before = recipe("imagenet64-ict")
    assert given.config.network == replace(before.network, head_channels=32, attention_norm="none")
    with pytest.raises(SystemExit) as left:
        options("digits", "--network.head-channels", "32")
    assert left.value.code == 2 and "--network.head-channels" in capsys.readouterr().err


def test_help_shows_every_option_with_the_recipes_default(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        options("digits", "--help")
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for key in flatten(strict.dump(recipe("digits"))).keys() - set():
        assert re.search(f"--{re.escape(key.replace('_', '-'))}[ ,]", shown), key
    assert "(default: 0.003)" in shown


@pytest.mark.parametrize("kind", [BCMError, ClusterError, ConfigError, DataError, TrackingError])
def test_a_user_error_is_one_message_and_exit_code_2(
    kind: type[Exception], capsys: pytest.CaptureFixture[str], own_signals: None
):
    def main(argv: object) -> None:
        raise kind("the thing is wrong; mend it")

    with pytest.raises(SystemExit) as left:
        run_command(main)
    assert left.value.code == 2
    assert capsys.readouterr() == ("", "error: the thing is wrong; mend it\n")


def test_a_bug_keeps_its_traceback(own_signals: None):
    def main(argv: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(main)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_signals_unwind_and_end_with_130(sign: signal.Signals, capsys: pytest.CaptureFixture[str], own_signals: None):
    def main(argv: object) -> None:
        try:
            signal.raise_signal(sign)
        finally:
            print("cleaned up")

    with pytest.raises(SystemExit) as left:
        run_command(main)
    assert left.value.code == 130
    assert capsys.readouterr() == ("cleaned up\n", "stopped.\n")
