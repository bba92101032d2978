"""From a list of files to images with their splits and labels: one rule for folders and archives alike.

Every file is an image that is used, states labels that are used, or is left out with a note that counts and names it.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image

from data.errors import DataError
from data.prepare import labels
from data.prepare.classes import check_classes, class_names_of
from data.prepare.deal import dealt
from data.prepare.files import File, Item, archive_kind, archive_stem, named
from data.prepare.labels import FOLDERS, NONE
from data.prepare.pixels import FORMATS, IMAGE_SUFFIXES
from data.prepare.splits import sorted_out, split_of

_ORIGINS = {FOLDERS: "the folders the images lie in", "": "none; all images are of one class"}
_NUMBER = re.compile(r"\d{5,}")
"""Names of folders that may number their images rather than be classes."""
_UNREAD_PICTURES = frozenset({".heic", ".heif", ".jxl", ".svg", ".dng", ".cr2", ".nef", ".arw"})
_UNREAD_ARCHIVES = frozenset({".rar", ".7z", ".gz", ".bz2", ".xz", ".zst"})


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What decides how files are assigned, beside their names.

    Attributes:
        labels: The user's choice of labels: "folder", "none", a table's name, "csv:FILE", or a suffix such as ".txt".
        class_names: Names of the classes, if the set is a known one.
        classes: Number of classes, if the user states it.
        held_out: Size of the test split where none is marked; None for a tenth, at most 1,000.
        kept: Whether all images stay where they are, so that none can be held out.
    """

    labels: str | None = None
    class_names: tuple[str, ...] = ()
    classes: int | None = None
    held_out: int | None = None
    kept: bool = False


@dataclass(frozen=True, kw_only=True)
class Assigned:
    """The images of a source.

    Attributes:
        splits: Images of each split, in the order in which they go into shards.
        class_names: Name of each label.
        labels_from: Where the labels came from, as a phrase.
        notes: What the user should know of the source.
    """

    splits: Mapping[str, tuple[Item, ...]]
    class_names: tuple[str, ...]
    labels_from: str
    notes: tuple[str, ...]

    @property
    def labels(self) -> dict[str, tuple[int, ...]]:
        """Images of each class, for each split."""
        return {
            split: tuple(np.bincount([item.label for item in items], minlength=len(self.class_names)).tolist())
            for split, items in self.splits.items()
        }


def assign(files: Sequence[File], root: str, rules: Rules, read: labels.Read) -> Assigned:
    """The images among the files of a source, in their order, with splits and labels.

    Args:
        files: All files.
        root: Where they are, for messages.
        rules: What else decides.
        read: Reads the small files that hold labels.
    """
    images = _images(files, root)
    splits, folders = sorted_out(images, root)
    found, notes = _sources(files, images, splits, folders, rules, root, read)
    source = _choice(found, rules, root)
    stated = found[source].labels if source else dict.fromkeys(range(len(images)), "")
    used = set(found[source].files) if source else set()
    notes += _left_out([file for file in files if file not in used], set(images))
    if source and (missing := found[source].missing):
        notes.append(f"{source} speaks of {len(missing):,} images that are not there, for example {missing[0]}")
    archives = {image.archive for image in images if split_of(image.archive) is None}
    if not source and not rules.labels and not rules.class_names and len(names := set(map(_stem, archives))) > 1:
        notes.append(f"the names of the archives ({named(sorted(names), 3)}) are taken for no classes")
    if lacking := [place for place in range(len(images)) if place not in stated]:
        notes.append(_unlabelled(lacking, splits, images, source, found, root))
    class_names = class_names_of(
        set(stated.values()) - {""}, source, root, known=rules.class_names, stated=rules.classes
    )
    numbered = bool(source) and source != FOLDERS and next(iter(stated.values())).isdecimal()
    numbers = {name: number for number, name in enumerate(class_names)}
    groups: dict[str, list[Item]] = {}
    for place, (image, split) in enumerate(zip(images, splits, strict=True)):
        if place in stated:
            label = int(stated[place]) if numbered else numbers.get(stated[place], 0)
            group = groups.setdefault(split, [])
            group.append(Item(file=image, label=label, number=len(group)))
    check_classes(groups, class_names, root)
    return Assigned(
        splits=dealt(groups, len(class_names), held_out=rules.held_out, kept=rules.kept),
        class_names=class_names,
        labels_from=_ORIGINS.get(source, source),
        notes=tuple(notes),
    )


def _stem(archive: str) -> str:
    """The path of an archive without its numbers and what says that it is one."""
    return re.sub(r"\d+", "", archive.rpartition("/")[0] + "/" + archive_stem(archive)).strip("/")


def is_image(file: File) -> bool:
    """Whether a file is an image that is used, by its name."""
    return file.suffix in IMAGE_SUFFIXES and not file.hidden


def _images(files: Sequence[File], root: str) -> list[File]:
    images = [file for file in files if is_image(file)]
    if not images:
        kinds = Counter("hidden files" if file.hidden else file.suffix or "files without suffix" for file in files)
        there = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5)) or "nothing"
        packed = any(archive_kind(file.path[-1]) for file in files)
        raise DataError(
            f"there are no images ({', '.join(FORMATS)}) at {root}, but {there}: "
            + ("unpack it first" if packed else "check the path")
        )
    return images


def _sources(
    files: Sequence[File],
    images: Sequence[File],
    splits: Sequence[str],
    folders: Sequence[str],
    rules: Rules,
    root: str,
    read: labels.Read,
) -> tuple[dict[str, labels.Found], list[str]]:
    """Every source of labels there is, or the one that is chosen; notes for the user."""
    if rules.labels == NONE:
        return {}, []
    rest = [file for file in files if not file.hidden and file.suffix not in IMAGE_SUFFIXES]
    found = labels.in_tables(rest, images, rules.labels, root, read)
    found |= labels.beside(rest, images, rules.labels, root, read)
    extra = found.pop(labels.ANNOTATIONS, labels.Found(labels={}))
    by_folder = {**dict(enumerate(folders)), **extra.labels}
    names = set(by_folder.values()) - {""}
    # A known set of one class may lie in any folders.
    if not names or rules.labels not in (None, FOLDERS) or (rules.labels is None and len(rules.class_names) == 1):
        return found, []
    if rules.labels is None and (found and (len(names) == 1 or "" in by_folder.values())):
        return found, []
    if rules.labels is None and all(_NUMBER.fullmatch(name) for name in names):
        if found or _rise(images, splits, folders):
            shown = named(sorted(names), 3)
            note = f"the folders {shown} number the images, so they are no classes, unless --labels folder says so"
            return found, [note]
        raise DataError(
            f"{root}: are the folders {named(sorted(names), 3)} classes, or do they number the images? Add "
            "--labels folder or --labels none"
        )
    if "" in by_folder.values():
        loose = next(images[place] for place, folder in by_folder.items() if not folder)
        raise DataError(
            f"{loose.place(root)} lies in no class folder, but others do, for example in {min(names)!r}: give each "
            "image a folder named after its class, or none; or add --labels none"
        )
    if extra.labels:
        # A split of which no image has a label or a folder of the training split is one without labels.
        trained = {by_folder[place] for place, split in enumerate(splits) if split == "train"}
        known = {splits[place] for place, name in by_folder.items() if name in trained}
        by_folder = {place: name for place, name in by_folder.items() if splits[place] in known}
    found[FOLDERS] = labels.Found(labels=by_folder, missing=extra.missing, files=extra.files)
    return found, []


def _rise(images: Sequence[File], splits: Sequence[str], folders: Sequence[str]) -> bool:
    """Whether the numbers in the names of images rise from folder to folder, as in FFHQ's 00000, 01000, 02000."""
    ends: dict[tuple[str, str], list[int]] = {}
    for image, split, folder in zip(images, splits, folders, strict=True):
        numbers = re.findall(r"\d+", image.path[-1].removesuffix(image.suffix))
        if not numbers:
            return False
        first_last = ends.setdefault((split, folder), [int(numbers[-1])] * 2)
        first_last[:] = min(first_last[0], int(numbers[-1])), max(first_last[1], int(numbers[-1]))
    ordered = sorted(ends)
    return all(ends[one][1] < ends[next_one][0] for one, next_one in pairwise(ordered) if one[0] == next_one[0])


def _choice(found: Mapping[str, labels.Found], rules: Rules, root: str) -> str:
    """The one source of labels; "" for none. Several that differ are a DataError."""
    if rules.labels in (None, NONE):
        first = next(iter(found), "")
        if all(source.labels == found[first].labels for source in found.values()):
            return first
        options = " or ".join(f"--labels {source}" for source in (*found, NONE))
        raise DataError(f"{root} states different labels in {' and '.join(found)}: choose with {options}")
    if rules.labels not in found:
        raise DataError(
            f"{root} states no labels for --labels {rules.labels}: it may be {FOLDERS}, {NONE}, a table in the "
            "source such as dataset.json or csv:FILE, or the suffix of small files beside the images: .cls, .txt"
        )
    return rules.labels


def _unlabelled(
    lacking: Sequence[int],
    splits: Sequence[str],
    images: Sequence[File],
    source: str,
    found: Mapping[str, labels.Found],
    root: str,
) -> str:
    """The note on whole splits without labels that are left out; any other image without a label is a DataError."""
    lost = {splits[place] for place in lacking}
    if source == FOLDERS and "train" not in lost:
        return f"left out {len(lacking):,} images of {', '.join(sorted(lost))}, which have no label"
    raise DataError(
        f"{named([images[place].place(root) for place in lacking], 3)} has no label in {source}, but others have: "
        f"label all or none, or add --labels {NONE}"
    )


def _left_out(files: Sequence[File], images: set[File]) -> list[str]:
    """A note for each kind of file that is not used."""
    kinds: dict[str, list[str]] = {}
    for file in files:
        if file not in images:
            kinds.setdefault(_why(file), []).append("/".join(file.path))
    notes = []
    for why, names in sorted(kinds.items(), key=lambda kind: (-len(kind[1]), kind[0])):
        notes.append(f"left out {len(names):,} {why.format(s='' if len(names) == 1 else 's')}, for example {names[0]}")
    return notes


def _why(file: File) -> str:
    """The kind of a file that is no image, with the reason."""
    if file.hidden:
        return "hidden file{s}"
    if archive_kind(file.path[-1]) or file.suffix in _UNREAD_ARCHIVES:
        return f"{file.suffix} file{{s}} (to be unpacked first)"
    if file.suffix in Image.registered_extensions() or file.suffix in _UNREAD_PICTURES:
        return f"{file.suffix} file{{s}} (a kind of picture that is not read: convert to PNG)"
    return f"{file.suffix or 'nameless kind of'} file{{s}} (no images)"
