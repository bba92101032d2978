"""The training losses: consistency (Eq. 6), bidirectional consistency (Eq. 8-10) and diffusion.

Each takes a student flow `f` and the same flow with frozen parameters, `f_bar`: a target carries no gradient, the outer
pass of a soft-trajectory term carries gradient to its input only. Student passes share one batch, and so do targets.
Each returns weighted losses per image, (B,), by the name of their term; the objective is their sum.
"""

import torch
from torch import Tensor

from bcm.distance import official_huber, pseudo_huber
from bcm.schedule import T_MIN, NoiseLevels, TrainingTimes
from bcm.types import Flow, Images, Labels, Times, like_images

Terms = dict[str, Tensor]
"""Weighted losses per image, each (B,), by the name of the term: ct, st or edm."""


def ct_loss(f: Flow, f_bar: Flow, x: Images, z: Images, times: TrainingTimes, label: Labels | None = None) -> Terms:
    """Consistency training (Eq. 6): one student pass, one target."""
    zero = torch.full_like(times.t_n, T_MIN)
    x_0 = f(_noisy(x, times.t_next, z), times.t_next, zero, label)
    with torch.no_grad():
        target = f_bar(_noisy(x, times.t_n, z), times.t_n, zero, label)
    return {"ct": times.weight_ct * pseudo_huber(x_0, target)}


def bct_loss(f: Flow, f_bar: Flow, x: Images, z: Images, times: TrainingTimes, label: Labels | None = None) -> Terms:
    """Bidirectional consistency training: Eq. 6 plus Eq. 9 is Eq. 10, the loss of Algorithm 1.

    Args:
        f: the student flow, called once on 2B images.
        f_bar: the flow with frozen parameters, called twice on B images.
        x: images (B, C, H, W) in [-1, 1].
        z: standard normal noise like `x`.
        times: t_n, t_{n+1}, t_n' and the weights lambda and lambda', each (B,).
        label: class labels (B,) or None.
    """
    t_n, t_next, t_prime = times.t_n, times.t_next, times.t_prime
    zero = torch.full_like(t_n, T_MIN)
    x_n, x_next = _noisy(x, t_n, z), _noisy(x, t_next, z)
    x_0, x_prime = _two(f, (x_next, t_next, zero), (x_n, t_n, t_prime), label)
    with torch.no_grad():
        target = f_bar(x_n, t_n, zero, label)
    ct = times.weight_ct * pseudo_huber(x_0, target)
    st = times.weight_st * pseudo_huber(f_bar(x_prime, t_prime, zero, label), target)
    return {"ct": ct, "st": st}


def bct_eq8_loss(
    f: Flow, f_bar: Flow, x: Images, z: Images, times: TrainingTimes, label: Labels | None = None
) -> Terms:
    """The ablation of Appendix B.2.1: Eq. 6 plus Eq. 8, whose soft target starts at x + t_n' z instead of x + t_n z."""
    t_n, t_next, t_prime = times.t_n, times.t_next, times.t_prime
    zero = torch.full_like(t_n, T_MIN)
    x_n, x_next = _noisy(x, t_n, z), _noisy(x, t_next, z)
    x_0, x_prime = _two(f, (x_next, t_next, zero), (x_n, t_n, t_prime), label)
    with torch.no_grad():
        target, target_prime = _two(f_bar, (x_n, t_n, zero), (_noisy(x, t_prime, z), t_prime, zero), label)
    ct = times.weight_ct * pseudo_huber(x_0, target)
    st = times.weight_st * pseudo_huber(f_bar(x_prime, t_prime, zero, label), target_prime)
    return {"ct": ct, "st": st}


def st_loss(f: Flow, f_bar: Flow, x: Images, z: Images, times: TrainingTimes, label: Labels | None = None) -> Terms:
    """The ablation of Appendix B.2.2: the soft-trajectory term (Eq. 9) without the consistency term."""
    t_n, t_prime = times.t_n, times.t_prime
    zero = torch.full_like(t_n, T_MIN)
    x_n = _noisy(x, t_n, z)
    x_prime = f(x_n, t_n, t_prime, label)
    with torch.no_grad():
        target = f_bar(x_n, t_n, zero, label)
    return {"st": times.weight_st * pseudo_huber(f_bar(x_prime, t_prime, zero, label), target)}


def bct_official_loss(
    f: Flow, f_bar: Flow, x: Images, z: Images, times: TrainingTimes, label: Labels | None = None
) -> Terms:
    """The official code's form of Eq. 10: the soft trajectory starts at x_{t_{n+1}}, and its own distance.

    `times` are drawn with `start_next`.
    """
    t_n, t_next, t_prime = times.t_n, times.t_next, times.t_prime
    zero = torch.full_like(t_n, T_MIN)
    x_n, x_next = _noisy(x, t_n, z), _noisy(x, t_next, z)
    x_0, x_prime = _two(f, (x_next, t_next, zero), (x_next, t_next, t_prime), label)
    with torch.no_grad():
        target = f_bar(x_n, t_n, zero, label)
    ct = times.weight_ct * official_huber(x_0, target)
    st = times.weight_st * official_huber(f_bar(x_prime, t_prime, zero, label), target)
    return {"ct": ct, "st": st}


def edm_loss(f: Flow, f_bar: Flow, x: Images, z: Images, levels: NoiseLevels, label: Labels | None = None) -> Terms:
    """The diffusion baseline (Karras et al., 2022): f(x + sigma z, sigma, 0) denoises; squared error; no teacher."""
    denoised = f(_noisy(x, levels.sigma, z), levels.sigma, torch.zeros_like(levels.sigma), label)
    return {"edm": levels.weight * (denoised - x).flatten(1).square().sum(1)}


def _noisy(x: Images, t: Times, z: Images) -> Images:
    return x + like_images(t, x) * z


_Call = tuple[Images, Times, Times]


def _two(f: Flow, a: _Call, b: _Call, label: Labels | None) -> tuple[Images, Images]:
    """Two calls f(x_t, t, u, label) as one of twice the batch."""
    x_t, t, u = (torch.cat(pair) for pair in zip(a, b, strict=True))
    first, second = f(x_t, t, u, None if label is None else label.repeat(2)).chunk(2)
    return first, second
