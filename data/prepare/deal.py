"""In which order images go into shards, and which are held out for the test split."""

from collections import Counter
from collections.abc import Mapping, Sequence

from data.errors import DataError
from data.order import permutation
from data.prepare.files import Item

DEAL_SEED = 20240402
"""Seed of the order in which images of several classes are dealt to shards, so that each shard holds all of them."""

_MOST_HELD_OUT = 1000


def dealt(
    groups: Mapping[str, Sequence[Item]], classes: int, *, held_out: int | None, kept: bool
) -> dict[str, tuple[Item, ...]]:
    """The splits in the order of their shards, with one called test wherever there are images for it.

    Args:
        groups: Images of each split.
        classes: Number of classes.
        held_out: Size of the test split where none is marked; None for a tenth, at most 1,000.
        kept: Whether all images stay where they are, so that none can be held out.
    """
    if kept:
        renamed = {"val": "test"} if "test" not in groups else {}
        return {renamed.get(split, split): tuple(items) for split, items in groups.items()}
    if "train" not in groups:
        raise DataError(
            f"the images are all of the split {', '.join(groups)}: give the folder that holds train too, or if that "
            "word marks no split, name the folder otherwise"
        )
    splits: dict[str, tuple[Item, ...]] = {}
    for split, items in sorted(groups.items(), key=lambda group: group[0] != "train"):
        # Those of several classes in a fixed shuffled order.
        order = range(len(items)) if classes == 1 else permutation(DEAL_SEED, 0, len(items))
        splits[split] = tuple(items[place] for place in order)
    if "val" in splits and "test" not in splits:
        splits["test"] = splits.pop("val")
    if "test" in splits:
        check_unmarked(held_out)
        return splits
    return _with_test(splits, held_out)


def _with_test(splits: Mapping[str, tuple[Item, ...]], held_out: int | None) -> dict[str, tuple[Item, ...]]:
    """The splits, with the last images of train as test: of each class train keeps one."""
    train = splits["train"]
    wanted, left = held_out_of(len(train), held_out), Counter(item.label for item in train)
    chosen: set[int] = set()
    for place in range(len(train) - 1, -1, -1):
        if len(chosen) < wanted and left[train[place].label] > 1:
            left[train[place].label] -= 1
            chosen.add(place)
    if len(chosen) < wanted and held_out is not None:
        raise DataError(
            f"{wanted} images cannot be held out, as no class may lose its last: give at most {len(chosen)}"
        )
    parts = {
        "train": tuple(item for place, item in enumerate(train) if place not in chosen),
        "test": tuple(item for place, item in enumerate(train) if place in chosen),
    }
    return {split: items for split, items in ({**splits, **parts}).items() if items}


def check_unmarked(held_out: int | None) -> None:
    """Called where the source marks a test split: holding out images of the training split too is a DataError."""
    if held_out is not None:
        raise DataError("--held-out has no effect on a source that marks its test split: leave it out")


def held_out_of(count: int, wanted: int | None) -> int:
    """Images of `count` that make up the test split where none is marked: by default a tenth, at most 1,000."""
    if wanted is None:
        return min(_MOST_HELD_OUT, count // 10)
    if not 0 <= wanted < count:
        raise DataError(f"{wanted} images cannot be held out of {count}: give a number from 0 to {count - 1}")
    return wanted
