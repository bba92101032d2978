"""The networks F_theta with one time (iCT) or two (BCM)."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from bcm.networks.ncsnpp import NCSNpp, NCSNppConfig
from bcm.types import BCMError, tuples

NetworkConfig = NCSNppConfig
"""The shape of any network of this package."""

__all__ = ["NCSNpp", "NCSNppConfig", "NetworkConfig", "build_network", "network_from_dict", "network_to_dict"]


def build_network(config: NetworkConfig) -> NCSNpp:
    """The network of this shape, freshly initialised from torch's global generator."""
    return NCSNpp(config)


def network_to_dict(config: NetworkConfig) -> dict[str, Any]:
    """A JSON-ready form: the fields and the `kind` of network."""
    return {"kind": "ncsnpp", **asdict(config)}


def network_from_dict(entry: Mapping[str, Any]) -> NetworkConfig:
    """The inverse of `network_to_dict`; an unknown kind or key, or a wrong value, raises `BCMError`."""
    if entry.get("kind") != "ncsnpp":
        raise BCMError(f"network: kind {entry.get('kind')!r} is unknown; known is ncsnpp.")
    values = {name: tuples(value) for name, value in entry.items() if name != "kind"}
    known = {field.name for field in fields(NCSNppConfig)}
    if set(values) != known:
        raise BCMError(f"network: keys {sorted(set(values) ^ known)} are missing or unknown.")
    return NCSNppConfig(**values)
