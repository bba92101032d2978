"""Bidirectional models that start from consistency models (Section 3.2, Appendix C.1)."""

from dataclasses import replace

import torch

from bcm.networks import NCSNppConfig, NetworkConfig, build_network
from bcm.precond import BCM
from bcm.types import BCMError

_EMBEDDING = "F_theta.embedding"


def bidirectional(ict: BCM, network: NetworkConfig) -> tuple[BCM, NetworkConfig]:
    """Give a model of one time a second one (Section 3.2), which its network ignores at first.

    The layers that embed t are copied for u, untied; [I, 0] projects both embeddings to one, so u is ignored until it
    is learned. So f(., t, t_min) stays what it was. A model that was trained with the boundary scalings of Song et al.
    (2023) goes on with those of `bcm.precond` at u = t_min; c_skip then changes by t_min / (2 sigma_data) at most.

    Args:
        ict: a model of one time, such as the average of a finished iCT training.
        network: the shape of its network.

    Returns:
        The model, on the CPU, with weights of its own, and the shape of its network.

    Raises:
        BCMError: the network has two times already.
    """
    if network.times != 1:
        raise BCMError("this network reads two times already; fine-tuning starts from one that reads t alone (iCT).")
    wider = replace(network, times=2)
    if isinstance(wider, NCSNppConfig):
        wider = replace(wider, embedding="projected")
    weights = dict(ict.state_dict())
    for part in ("weight", "bias"):
        for of_t, of_u in (("dense0", "end0"), ("dense1", "end1")):
            weights[f"{_EMBEDDING}.{of_u}.{part}"] = weights[f"{_EMBEDDING}.{of_t}.{part}"]
    size = len(weights[f"{_EMBEDDING}.dense1.weight"])
    weights[f"{_EMBEDDING}.project.weight"] = torch.eye(size, 2 * size)
    model = BCM(build_network(wider), ict.sigma_data)
    model.load_state_dict(weights)
    return model, wider
