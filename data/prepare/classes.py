"""Names of the classes, from the labels there are."""

from collections.abc import Mapping, Sequence

from data.errors import DataError
from data.prepare.files import Item, named
from data.prepare.labels import FOLDERS

_MOST_CLASSES = 1_000_000


def class_names_of(
    values: set[str], source: str, root: str, *, known: tuple[str, ...], stated: int | None
) -> tuple[str, ...]:
    """Name of each label; labels that are neither all names nor all numbers without gaps are a DataError.

    Args:
        values: The labels there are.
        source: Where they come from.
        root: Where the images are, for messages.
        known: Names of the classes, if the set is a known one.
        stated: Number of classes, if the user states it.
    """
    numbers = {int(value) for value in values if value.isdecimal() and source != FOLDERS}
    if not values:
        if stated:
            raise DataError(f"--classes has no effect where there are no labels, as in {root}: leave it out")
        return known if len(known) == 1 else ("all",)
    if numbers and len(numbers) < len(values):
        name = min(value for value in values if not value.isdecimal())
        raise DataError(f"{root}: of the labels in {source} some are numbers ({min(numbers)}), some names ({name!r})")
    count = max(numbers) + 1 if numbers else len(values)
    if stated and not numbers:
        raise DataError(f"--classes has no effect on labels that are names, as in {source}: leave it out")
    most = len(known) or stated or _MOST_CLASSES
    if count > most:
        there = f"there is the label {max(numbers)}" if numbers else f"there are {count:,} classes"
        raise DataError(
            f"{root}: {there} in {source}, but the set has {most:,} classes, from 0: correct it, or choose a name "
            "of your own for the set, or other labels with --labels"
        )
    if not numbers:
        if any(not value.isprintable() for value in values):
            raise DataError(
                f"{root}: {named([ascii(v) for v in sorted(values) if not v.isprintable()])} cannot be the "
                "name of a class, as it is no readable text in UTF-8: rename it"
            )
        return tuple(sorted(values))
    if known:
        return known
    if not stated and (gaps := sorted(set(range(min(count, len(values) + 1))) - numbers)):
        raise DataError(
            f"{root}: the labels in {source} go up to {count - 1:,}, but there are none of "
            f"{named([str(n) for n in gaps], 3)}: number the classes from 0 without gaps, or add "
            f"--classes {count} if these just have no images here"
        )
    return tuple(map(str, range(stated or count)))


def check_classes(groups: Mapping[str, Sequence[Item]], class_names: Sequence[str], root: str) -> None:
    """Whether training sees every class of the other splits."""
    trained = {item.label for item in groups.get("train", ())}
    for split, items in groups.items():
        unseen = sorted({item.label for item in items} - trained)
        if unseen and trained:
            names = named([repr(class_names[label]) for label in unseen], 3)
            raise DataError(
                f"{root}: the classes of {split} include {names}, of which train has no image: name classes alike in "
                "all splits, choose other labels with --labels, or give the train folder alone"
            )
