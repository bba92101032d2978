"""Random numbers: the published answers, their distribution, and their dependence on the given integers alone."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bcm import rng
from bcm.rng import Dropout, Stream, shared_dropout
from bcm.types import BCMError

IDS = torch.arange(64)


def slow_philox(key: tuple[int, int], counter: list[int]) -> list[int]:
    """Philox4x32-10 in Python integers, written from the paper."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("key", "counter", "answer"),
    [  # Random123's kat_vectors.
        ("00000000 00000000", "00000000 " * 4, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff", "ffffffff " * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("a4093822 299f31d0", "243f6a88 85a308d3 13198a2e 03707344", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers(key: str, counter: str, answer: str) -> None:
    k0, k1 = (int(word, 16) for word in key.split())
    words = [int(word, 16) for word in counter.split()]
    known = [int(word, 16) for word in answer.split()]
    assert rng.philox((k0, k1), torch.tensor(words)).tolist() == known
    assert slow_philox((k0, k1), words) == known


def test_random_words_follow_the_documented_layout() -> None:
    seed, stream, step, count = 2**64 - 12345, 2**16 - 3, 2**32 - 7, 10
    ids = [0, 1, 2**32 - 1, 2**32, 2**48 - 1]
    expected = [
        [
            word
            for block in range(3)
            for word in slow_philox((seed % 2**32, seed >> 32), [block, step, i % 2**32, (stream << 16) + (i >> 32)])
        ][:count]
        for i in ids
    ]
    assert rng.random_words(seed, stream, step, torch.tensor(ids), count).tolist() == expected


def test_a_longer_row_begins_with_the_shorter() -> None:
    long = rng.random_words(3, 0, 0, IDS, 23)
    assert torch.equal(rng.random_words(3, 0, 0, IDS, 6), long[:, :6])
    assert rng.random_words(3, 0, 0, IDS, 0).shape == (64, 0)
    assert rng.random_words(3, 0, 0, IDS[:0], 5).shape == (0, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, r"seed is -1; it must lie in \[0, 2\^64\)"),
        ({"seed": 2**64}, "seed is"),
        ({"stream": 2**16}, "stream is 65536"),
        ({"step": 2**32}, "step is"),
        ({"step": -1}, "step is"),
        ({"count": 2**34 + 1}, "at most"),
        ({"count": -1}, "random words are asked"),
        ({"ids": torch.tensor([5, -1])}, "ids span -1 to 5"),
        ({"ids": torch.tensor([2**48])}, "ids span"),
        ({"ids": torch.tensor([1], dtype=torch.int32)}, "int64"),
        ({"ids": torch.tensor(1)}, "shape"),
    ],
)
def test_arguments_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"seed": 0, "stream": 0, "step": 0, "ids": IDS, "count": 4}
    with pytest.raises(BCMError, match=message):
        rng.random_words(**{**arguments, **change})  # pyright: ignore[reportArgumentType]


def kolmogorov_smirnov(sample: Tensor, cdf: Tensor) -> float:
    """sqrt(n) times the largest distance between the empirical and the given distribution function."""
    n = sample.numel()
    cdf = cdf[sample.argsort()]
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum(steps[1:] - cdf, cdf - steps[:-1]).max())


def test_uniform_is_uniform() -> None:
    sample = rng.uniform(11, Stream.TIMES, 5, torch.arange(1000), 400)
    assert sample.dtype == torch.float64
    assert ((sample >= 0) & (sample < 1)).all()
    assert kolmogorov_smirnov(sample.flatten(), sample.flatten()) < 1.95  # exceeded with probability 0.001
    integers = sample * 2**53
    assert torch.equal(integers, integers.round())
    # All 53 bits are used, each half of the time.
    bits = (integers.long().flatten() >> torch.arange(53)[:, None]) & 1
    assert ((bits.double().mean(1) - 0.5).abs() < 4 * 0.5 / math.sqrt(sample.numel())).all()


def test_normal_is_standard_normal() -> None:
    sample = rng.normal(7, Stream.NOISE, 3, torch.arange(1000), (3, 20, 20)).double().flatten()
    n = sample.numel()
    for power, (moment, variance) in enumerate(((0, 1), (1, 2), (0, 15), (3, 96), (0, 945), (15, 10170)), start=1):
        assert abs(float((sample**power).mean()) - moment) < 4 * math.sqrt(variance / n), power
    assert kolmogorov_smirnov(sample, torch.special.ndtr(sample)) < 1.95
    assert kolmogorov_smirnov(sample.abs(), 2 * torch.special.ndtr(sample.abs()) - 1) < 1.95


@pytest.mark.parametrize("lag", [1, 25, 100, 200, 300])
def test_the_values_of_an_image_are_uncorrelated(lag: int) -> None:
    # A block of four words gives two Box-Muller pairs: lags of a quarter of the image join values of one block.
    image = rng.normal(9, Stream.NOISE, 0, torch.arange(2000), (400,)).double()
    for first, second in ((image, image), (image**2 - 1, image**2 - 1), (image.abs() - math.sqrt(2 / math.pi), image)):
        product = first[:, lag:] * second[:, :-lag]
        assert abs(float(product.mean())) < 4.5 * float(product.std()) / math.sqrt(product.numel())


def test_normal_is_the_box_muller_transform_of_the_words() -> None:
    words = rng.random_words(5, 0, 0, IDS, 400).double().unflatten(1, (100, 2, 2))
    radius = (-2 * ((words[..., 0] + 0.5) / 2**32).log()).sqrt()
    angle = (words[..., 1] % 2**30) / 2**30 * math.pi / 2
    sign0 = 1 - 2 * (words[..., 1] >= 2**31).double()
    sign1 = 1 - 2 * (words[..., 1] % 2**31 >= 2**30).double()
    exact = torch.stack((sign0 * radius * angle.cos(), sign1 * radius * angle.sin()), dim=-1)
    noise = rng.normal(5, 0, 0, IDS, (400,)).double().unflatten(1, (2, 2, 100)).permute(0, 3, 2, 1)
    # Rounding the word to float32 moves radii near zero most, by about 3e-8 / radius.
    torch.testing.assert_close(noise, exact, rtol=0, atol=2e-5)


def test_normal_reaches_far_tails_and_never_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = torch.tensor([0, 1, 2**29, 2**30 - 1, 2**31, 2**32 - 1])
    words = torch.cartesian_prod(extremes, extremes).T.repeat(2, 1)[:, None]
    monkeypatch.setattr(rng, "_philox_rows", lambda *_: words)
    noise = rng.normal(0, 0, 0, torch.tensor([0]), (4 * words.shape[-1],))
    assert noise.isfinite().all()
    assert 6.7 < float(noise.max()) < 6.8
    assert -6.8 < float(noise.min()) < -6.7


def test_roots_are_rounded_correctly() -> None:
    """The bit-for-bit promise of `normal` rests on this property of torch's float64 root."""
    x = rng.uniform(0, 0, 0, torch.arange(1000), 1000).float() * 24
    assert np.array_equal(x.double().sqrt().float().numpy(), np.sqrt(x.numpy()))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (1,), ()])
def test_a_row_depends_on_its_id_alone(shape: tuple[int, ...]) -> None:
    ids = torch.randperm(101, generator=torch.Generator().manual_seed(0)) * 2**33 + 17
    noise = rng.normal(1, 2, 3, ids, shape)
    times = rng.uniform(1, 2, 3, ids, 3)
    assert noise.shape == (101, *shape)
    for rows in (slice(0, 1), slice(3, 10), slice(50, 101), slice(None, None, 7)):
        assert torch.equal(rng.normal(1, 2, 3, ids[rows], shape), noise[rows])
        assert torch.equal(rng.uniform(1, 2, 3, ids[rows], 3), times[rows])
    for row in range(101):
        assert torch.equal(rng.normal(1, 2, 3, ids[row : row + 1], shape)[0], noise[row])


def test_threads_do_not_change_the_numbers() -> None:
    threads = torch.get_num_threads()
    ids = torch.arange(200)
    try:
        torch.set_num_threads(1)
        alone = rng.normal(1, 0, 0, ids, (3, 33, 31))
        torch.set_num_threads(3)
        assert torch.equal(rng.normal(1, 0, 0, ids, (3, 33, 31)), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cpu_and_gpu_give_the_same_bits() -> None:
    ids = torch.arange(300)
    assert torch.equal(rng.normal(1, 0, 0, ids.cuda(), (3, 32, 32)).cpu(), rng.normal(1, 0, 0, ids, (3, 32, 32)))
    assert torch.equal(rng.uniform(1, 0, 0, ids.cuda(), 5).cpu(), rng.uniform(1, 0, 0, ids, 5))


def test_seeds_streams_steps_and_ids_share_no_row() -> None:
    ids = torch.tensor([0, 1, 2, 2**16, 2**32, 2**33, 2**47])
    rows = [
        rng.random_words(seed, stream, step, ids, 4)
        for seed in (0, 1, 2**32, 2**63)
        for stream in Stream
        for step in (0, 1, 2, 2**16, 2**31)
    ]
    together = torch.cat(rows)
    assert len(together.unique(dim=0)) == len(together)
    # Nor do neighbours correlate: (seed, step, id) are often consecutive integers.
    base = rng.normal(0, 0, 0, IDS, (1000,))
    for other in (
        rng.normal(1, 0, 0, IDS, (1000,)),
        rng.normal(0, 1, 0, IDS, (1000,)),
        rng.normal(0, 0, 1, IDS, (1000,)),
        rng.normal(0, 0, 0, IDS + 1, (1000,)),
    ):
        assert abs(float((base * other).mean())) < 4.5 / math.sqrt(base.numel())


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Dropout(0.25)
        self.second = Dropout(0.25)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


X = torch.ones(8, 5, 30, 30)


def test_dropout_drops_and_scales() -> None:
    y = Dropout(0.25)(X)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs(float(y.mean()) - 1) < 4 * math.sqrt(1 / 3 / y.numel())
    assert not torch.equal(Dropout(0.25)(X), Dropout(0.25)(X))
    assert Dropout(0.25).eval()(X) is X
    assert Dropout(0)(X) is X
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(BCMError, match="dropout is"):
            Dropout(p)


def test_calls_inside_the_context_share_masks() -> None:
    net = TwoLayers()
    with shared_dropout(net, seed=5, rows=8):
        first, second = net(X)
        again, _ = net(X)
        merged, _ = net(torch.cat((X, 2 * X)))
    assert torch.equal(first, again)
    assert torch.equal(merged, torch.cat((first, 2 * first)))
    assert not torch.equal(first, second)
    assert abs(float(first.mean()) - 1) < 4 * math.sqrt(1 / 3 / first.numel())
    assert not torch.equal(first[0], first[1])


def test_masks_depend_on_the_seed_and_not_on_what_happened_before() -> None:
    def masks(net: nn.Module, seed: int) -> Tensor:
        with shared_dropout(net, seed, rows=8):
            return torch.stack(net(X))

    five = masks(TwoLayers(), 5)
    torch.rand(3)
    assert torch.equal(masks(TwoLayers(), 5), five)
    assert torch.equal(masks(nn.Sequential(TwoLayers()), 5), five)  # a wrapper, as DDP is
    six = masks(TwoLayers(), 6)
    assert not torch.equal(six, five)
    assert not torch.equal(six[0], five[1])


def test_outside_the_context_dropout_is_ordinary() -> None:
    net = TwoLayers()
    with pytest.raises(RuntimeError, match="stop"), shared_dropout(net, seed=4, rows=8):
        raise RuntimeError("stop")
    assert not torch.equal(net(X)[0], net(X)[0])
    with shared_dropout(net, seed=5, rows=8):
        first, _ = net(X)
        with shared_dropout(net, seed=6, rows=8):
            inner, _ = net(X)
        outer, _ = net(X)
    assert torch.equal(outer, first)
    assert not torch.equal(inner, first)
    with shared_dropout(net.eval(), seed=5, rows=8):
        assert net(X)[0] is X


def test_the_gradient_passes_where_the_mask_keeps() -> None:
    net = TwoLayers()
    x = X.repeat(2, 1, 1, 1).requires_grad_()
    with shared_dropout(net, seed=5, rows=8):
        y = net(x)[0]
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())  # x is one


def test_a_batch_that_is_no_multiple_of_the_rows_is_refused() -> None:
    net = TwoLayers()
    refused = pytest.raises(BCMError, match="a batch of 8 images cannot share dropout masks of 3 rows")
    with refused, shared_dropout(net, seed=5, rows=3):
        net(X)
    with pytest.raises(BCMError, match="at least one row"), shared_dropout(net, seed=5, rows=0):
        pass
