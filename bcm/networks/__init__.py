"""The networks F_theta with one time (iCT) or two (BCM)."""

from typing import Annotated

from pydantic import Discriminator

from bcm.networks.adm import ADM, ADMConfig
from bcm.networks.ncsnpp import NCSNpp, NCSNppConfig

NetworkConfig = Annotated[NCSNppConfig | ADMConfig, Discriminator("kind")]
"""The shape of any network of this package."""

__all__ = ["ADM", "ADMConfig", "NCSNpp", "NCSNppConfig", "NetworkConfig", "build_network"]


def build_network(config: NetworkConfig) -> NCSNpp | ADM:
    """The network of this shape, freshly initialised from torch's global generator."""
    return NCSNpp(config) if isinstance(config, NCSNppConfig) else ADM(config)
