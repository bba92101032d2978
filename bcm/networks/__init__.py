"""The networks F_theta with one time (iCT) or two (BCM)."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from bcm.networks.adm import ADM, ADMConfig
from bcm.networks.ncsnpp import NCSNpp, NCSNppConfig
from bcm.types import BCMError, tuples

NetworkConfig = NCSNppConfig | ADMConfig
"""The shape of any network of this package."""
KINDS: dict[str, type[NetworkConfig]] = {"ncsnpp": NCSNppConfig, "adm": ADMConfig}
"""The name of each kind of network."""

__all__ = [
    "ADM",
    "KINDS",
    "ADMConfig",
    "NCSNpp",
    "NCSNppConfig",
    "NetworkConfig",
    "build_network",
    "network_from_dict",
    "network_to_dict",
]


def build_network(config: NetworkConfig) -> NCSNpp | ADM:
    """The network of this shape, freshly initialised from torch's global generator."""
    return NCSNpp(config) if isinstance(config, NCSNppConfig) else ADM(config)


def network_to_dict(config: NetworkConfig) -> dict[str, Any]:
    """A JSON-ready form: the fields and the `kind` of network."""
    kind = next(kind for kind, known in KINDS.items() if isinstance(config, known))
    return {"kind": kind, **asdict(config)}


def network_from_dict(entry: Mapping[str, Any]) -> NetworkConfig:
    """The inverse of `network_to_dict`; an unknown kind or key, or a wrong value, raises `BCMError`."""
    if (kind := entry.get("kind")) not in KINDS:
        raise BCMError(f"network: kind {kind!r} is unknown; known are {', '.join(KINDS)}.")
    values = {name: tuples(value) for name, value in entry.items() if name != "kind"}
    known = {field.name for field in fields(KINDS[kind])}
    if set(values) != known:
        raise BCMError(f"network: keys {sorted(set(values) ^ known)} are missing or unknown.")
    return KINDS[kind](**values)
