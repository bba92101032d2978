"""JSON that is read: what is wrong in it is refused, and the message names the key."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest

from bcm import strict
from bcm.checkpoint import Index, read_index
from bcm.inference import dump_schedules, read_schedules
from bcm.networks import ADMConfig, NCSNppConfig, NetworkConfig
from bcm.timesteps import PUBLISHED
from bcm.types import BCMError

ABSENT = object()
SHA256 = "0" * 64
INDEX = strict.dump(
    Index(
        k=5,
        network=NCSNppConfig(),
        sigma_data=0.5,
        objective="bct",
        skipped=2,
        skipped_in_a_row=1,
        ema_rates=(0.9, 0.99),
        files={"ema.safetensors": SHA256},
    )
)
SCHEDULES = dump_schedules({**PUBLISHED["cifar10"], "multistep": PUBLISHED["ct-cifar10"]["sample-2"]})
NETWORKS = {name: strict.dump(network) for name, network in (("ncsnpp", NCSNppConfig()), ("adm", ADMConfig()))}


def read_networks(text: str, where: str) -> Any:
    shapes: Any = dict[str, NetworkConfig]
    return strict.read(shapes, text, where, complete=True)


class Wrong(NamedTuple):
    key: str
    """Where, with dots."""
    value: object
    """What is put there; ABSENT takes the key away."""
    message: str
    """What the message must hold, past the name of the text."""


def changed(whole: dict[str, Any], wrong: Wrong) -> str:
    """JSON of `whole` with one value put in the place of another."""
    copy = json.loads(json.dumps(whole))
    *way, last = wrong.key.split(".")
    inner = copy
    for part in way:
        inner = inner[int(part) if isinstance(inner, list) else part]
    if wrong.value is ABSENT:
        del inner[last]
    else:
        inner[int(last) if isinstance(inner, list) else last] = wrong.value
    return json.dumps(copy)


def check(read: Callable[[str, str], Any], whole: dict[str, Any], wrong: Wrong) -> None:
    assert read(json.dumps(whole), "here")
    with pytest.raises(BCMError) as refusal:
        read(changed(whole, wrong), "here")
    assert str(refusal.value).startswith(f"here: {wrong.message}")


def names(rows: list[Wrong]) -> list[str]:
    return [f"{row.key}-{'absent' if row.value is ABSENT else json.dumps(row.value)[:20]}" for row in rows]


def kinds(key: str, expected: str, *values: object) -> list[Wrong]:
    """Values that are no `expected`."""
    return [Wrong(key, value, f"{key}: input should be {expected}, not {value!r}") for value in values]


OF_INDEX = [
    *kinds("k", "a valid integer", "5", 5.5, True, None, [5]),
    *kinds("sigma_data", "a valid number", "0.5", None, True),
    *kinds("objective", "a valid string", 3, None, ["bct"]),
    *kinds("skipped", "a valid integer", "2", 2.5),
    *kinds("ema_rates", "a valid array", 0.9, "0.9", {}),
    *kinds("ema_rates.1", "a valid number", "0.99", None),
    *kinds("files", "an object", [], "ema"),
    *kinds("network", "an object", None, "ncsnpp", [1]),
    *kinds("network.width", "a valid integer", "128", 128.5, True),
    *kinds("version", "2", 1, "2"),
    *kinds("format", "'bcm-checkpoint'", "other", None),
    Wrong("files", {"ema.safetensors": 3}, "files.ema.safetensors: input should be a valid string, not 3"),
    Wrong("files", {"ema.safetensors": "abc"}, "files: 'ema.safetensors' with SHA-256 'abc' is no file beside"),
    Wrong("files", {"../ema.safetensors": SHA256}, "files: '../ema.safetensors' with SHA-256"),
    Wrong("files", {"/tmp/ema.safetensors": SHA256}, "files: '/tmp/ema.safetensors' with SHA-256"),
    Wrong("files", {"a/../../ema.safetensors": SHA256}, "files: 'a/../../ema.safetensors' with SHA-256"),
    Wrong("files", {"..": SHA256}, "files: '..' with SHA-256"),
    Wrong("files", {"": SHA256}, "files: '' with SHA-256"),
    Wrong("k", -1, "k=-1, skipped=2"),
    Wrong("skipped", 0, "k=5, skipped=0, skipped_in_a_row=1: each must be 0 or more"),
    Wrong("skipped_in_a_row", -1, "k=5, skipped=2, skipped_in_a_row=-1"),
    Wrong("sigma_data", 0, "sigma_data=0.0 must be positive"),
    Wrong("sigma_data", float("nan"), "sigma_data=nan must be positive and finite"),
    Wrong("objective", "EDM", "objective 'EDM' is unknown; known are ct, bct"),
    Wrong("ema_rates", [1.0], "ema_rates=(1.0,) must lie in [0, 1)"),
    Wrong("sigma", 0.5, "unknown key 'sigma'; did you mean 'sigma_data'?"),
    Wrong("network.withd", 8, "unknown key 'network.withd'; did you mean 'width'?"),
    Wrong("zzz", 1, "unknown key 'zzz'; known are attention, "),
    *(Wrong(key, ABSENT, f"missing key '{key}'") for key in (*INDEX, "network.kind", "network.dropout")),
]

OF_NETWORKS = [
    *kinds("ncsnpp.channel_mult", "a valid array", 2, "2,2,2"),
    *kinds("ncsnpp.channel_mult.1", "a valid integer", "2", 2.5, None),
    *kinds("ncsnpp.fourier_scale", "a valid number", "0.02", None),
    *kinds("adm.head_channels", "a valid integer", "64", True),
    *kinds("adm.attention_norm", "a valid string", None, 1),
    *kinds("adm", "an object", 3, None, []),
    Wrong("adm.kind", "dit", "adm.kind: input tag 'dit' found using 'kind' does not match any of the expected tags"),
    Wrong("adm.kind", 3, "adm.kind: input tag '3' found"),
    Wrong("adm.kind", "ncsnpp", "unknown key 'adm.head_channels'"),
    Wrong("adm.kind", ABSENT, "missing key 'adm.kind'"),
    Wrong("adm.dropout", 2, "adm: dropout is 2.0; it must lie in [0, 1)"),
    Wrong("ncsnpp.width", 6, "ncsnpp: width is 6; group normalisation needs"),
    Wrong("ncsnpp.times", 3, "ncsnpp: times is 3; it must be 1"),
    Wrong("ncsnpp.head_channels", 8, "unknown key 'ncsnpp.head_channels'; "),
    *(Wrong(f"adm.{key}", ABSENT, f"missing key 'adm.{key}'") for key in ("width", "classes", "attention")),
]

OF_TIME_STEPS = [
    *kinds("sample-1", "an object", 3, None, [0.002, 80]),
    *kinds("sample-2.times", "a valid array", 1.2, "0.002, 80", None),
    *kinds("sample-2.times.1", "a valid number", "1.2", None, True, [1.2]),
    *kinds("sample-3.noise_scales", "a valid array", 0.2),
    *kinds("sample-3.t_min", "a valid number", None, "0.002"),
    Wrong("sample-2.kind", "euler", "sample-2.kind: input tag 'euler' found"),
    Wrong("sample-2.kind", ABSENT, "missing key 'sample-2.kind'"),
    Wrong("sample-2.kind", "zigzag", "missing key 'sample-2.noise_scales'"),
    Wrong("sample-2.times", [80, 1], "sample-2: ancestral: time 1.0 after 80.0 is out of order"),
    Wrong("invert-1.times", [0.07, 90], "invert-1: inversion: times 0.07 ... 90.0 leave the range"),
    Wrong("invert-1.times", ABSENT, "missing key 'invert-1.times'"),
    Wrong("sample-4.zigzag_times", ABSENT, "missing key 'sample-4.zigzag_times'"),
    Wrong("sample-3.tmin", 0.002, "unknown key 'sample-3.tmin'; did you mean 't_min'?"),
    Wrong("multistep.noise_scale", [0.1], "unknown key 'multistep.noise_scale'; did you mean 'noise_scales'?"),
]


@pytest.mark.parametrize("wrong", OF_INDEX, ids=names(OF_INDEX))
def test_a_wrong_index_is_refused_by_the_name_of_its_key(wrong: Wrong):
    check(read_index, INDEX, wrong)


@pytest.mark.parametrize("wrong", OF_NETWORKS, ids=names(OF_NETWORKS))
def test_a_wrong_network_is_refused_by_the_name_of_its_key(wrong: Wrong):
    check(read_networks, NETWORKS, wrong)


@pytest.mark.parametrize("wrong", OF_TIME_STEPS, ids=names(OF_TIME_STEPS))
def test_wrong_time_steps_are_refused_by_the_name_of_their_key(wrong: Wrong):
    check(read_schedules, SCHEDULES, wrong)


@pytest.mark.parametrize("text", ["", "{", "{'k': 1}", b"\xff", '{"k": 1,}'])
@pytest.mark.parametrize("read", [read_index, read_networks, read_schedules])
def test_what_is_no_json_is_called_damaged(read: Callable[[Any, str], Any], text: str | bytes):
    with pytest.raises(BCMError, match=r"^here: not valid JSON .*: it is damaged"):
        read(text, "here")


@pytest.mark.parametrize("text", ["[]", "null", "3", '"k"'])
@pytest.mark.parametrize("read", [read_index, read_networks, read_schedules])
def test_json_of_another_form_is_refused(read: Callable[[Any, str], Any], text: str):
    with pytest.raises(BCMError, match=r"^here: input should be an object, not "):
        read(text, "here")


def test_an_index_of_the_format_before_is_refused_by_its_version():
    with pytest.raises(BCMError, match=r"^here: version: input should be 2, not 1\. Choose another checkpoint"):
        read_index(
            json.dumps(
                {
                    "format": "bcm-checkpoint",
                    "version": 1,
                    "network": INDEX["network"],
                    "sigma_data": 0.5,
                    "k": 5,
                    "skipped": 0,
                    "skipped_in_a_row": 0,
                    "ema_rates": [0.9],
                    "extra": {"config": {}},
                    "files": {"model": SHA256, "ema": SHA256, "optimizer": SHA256},
                }
            ),
            "here",
        )


@dataclass(frozen=True, kw_only=True)
class Inner:
    number: float = 1
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: tuple[Inner, ...]
    flag: bool = False


def test_a_list_stands_for_a_tuple_and_a_whole_number_for_a_float():
    value = strict.read(Outer, '{"inner": [{"number": 3, "names": ["a"]}]}', "here")
    assert value == Outer(inner=(Inner(number=3.0, names=("a",)),))
    assert isinstance(value.inner[0].number, float)
    assert strict.read(Outer, json.dumps(strict.dump(value)), "here", complete=True) == value


def test_only_a_complete_text_need_name_what_has_a_default():
    text = '{"flag": true, "inner": [{"number": 3, "names": []}, {"number": 3}]}'
    assert strict.read(Outer, text, "here").inner[1] == Inner(number=3)
    with pytest.raises(BCMError, match=r"^here: missing key 'inner\.1\.names'"):
        strict.read(Outer, text, "here", complete=True)


def test_the_reader_chooses_the_error():
    with pytest.raises(KeyError, match="here: flag: input should be a valid boolean, not 'no'"):
        strict.read(Outer, '{"inner": [], "flag": "no"}', "here", KeyError)
    with pytest.raises(KeyError, match="here: missing key 'flag'"):
        strict.read(Outer, '{"inner": []}', "here", KeyError, complete=True)
