"""Which split each file is of, and which folder below that it lies in: told by the names of folders and archives."""

import re
from collections.abc import Sequence

from data.errors import DataError
from data.prepare.files import File, archive_stem, named

_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_WORDS = re.compile(r"[a-z]+")


def split_of(name: str) -> str | None:
    """The split that a word in a name such as "bedroom_val" marks: train, val, test or none."""
    return next((_SPLITS[word] for word in _WORDS.findall(name.lower()) if word in _SPLITS), None)


def _rest(name: str) -> str:
    """What a name says beside its split: the same for all splits of a set, as in bedroom_train and bedroom_val."""
    return re.sub(r"\d+", "", _WORDS.sub(lambda word: "" if word[0] in _SPLITS else word[0], name.lower()))


def marks(names: set[str], root: str) -> dict[str, str]:
    """The split that each name marks, if together they mark splits; else nothing, as "crash test" may be a class."""
    found = {name: split for name in names if (split := split_of(name)) is not None}
    plain = {name for name in found if name.lower() in _SPLITS}
    if names == plain:
        return found
    if len({found[name] for name in plain}) > 1 and names != found.keys():
        odd = sorted(names - found.keys())
        loose = "images outside of them" if "" in odd else named([repr(name) for name in odd], 3)
        raise DataError(
            f"{root} holds {named(sorted(plain), 3)}, which mark splits, but also {loose}: move that elsewhere, or "
            "give the folders other names if they are classes"
        )
    if names != found.keys():
        return {}
    if len({_rest(name) for name in names}) == 1:
        # A single one may be a class, but if its words are joined it is rather the name of a file or folder.
        return found if len(set(found.values())) > 1 or not any(" " in name for name in names) else {}
    if len(set(found.values())) > 1 and not any(" " in name for name in names):
        raise DataError(
            f"{root} holds {named(sorted(names), 4)}: are these splits or classes? Call splits train, val and test "
            "alone, and classes by names without these words"
        )
    return {}


def _without_shared(paths: list[tuple[str, ...]], root: str) -> list[tuple[str, ...]]:
    """Paths of folders without those at the top that all share, up to one that marks a split."""
    while (tops := {path[:1] for path in paths}) and len(tops) == 1:
        (top,) = tops
        if not top or marks({top[0]}, root):
            break
        paths = [path[1:] for path in paths]
    return paths


def _by_folders(paths: list[tuple[str, ...]], root: str) -> tuple[list[str | None], list[tuple[str, ...]]]:
    """For each path of folders its split, if all mark one, and what is left of it: SPLIT/CLASS or CLASS/SPLIT."""
    paths = _without_shared(paths, root)
    if found := marks({path[0] if path else "" for path in paths}, root):
        below = [path[1:] for path in paths]
        return [found[path[0]] for path in paths], _without_shared_above(below)
    seconds = {path[1].lower() if path[1:] else "" for path in paths}
    if len({_SPLITS.get(name) for name in seconds}) > 1 and seconds <= _SPLITS.keys():
        return [_SPLITS[path[1].lower()] for path in paths], [(path[0], *path[2:]) for path in paths]
    return [None] * len(paths), paths


def _without_shared_above(paths: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Paths without the folders that all share, as long as another folder is below for each."""
    while all(path[1:] for path in paths) and len({path[0] for path in paths}) == 1:
        paths = [path[1:] for path in paths]
    return paths


def sorted_out(files: Sequence[File], root: str) -> tuple[list[str], list[str]]:
    """For each file its split ("train" where none is marked), and the folder it lies in there; "" for none."""
    splits, below = _by_folders([file.path[:-1] for file in files], root)
    archives = sorted({file.archive for file in files})
    if archives != [""]:
        stems = {archive: re.sub(r"\d+", "", archive_stem(archive)) for archive in archives}
        found = marks(set(stems.values()), root)
        of_archive: dict[str, str | None] = {archive: found.get(stem) for archive, stem in stems.items()}
        if not found:
            folders, _ = _by_folders([tuple(archive.split("/")[:-1]) for archive in archives], root)
            of_archive = dict(zip(archives, folders, strict=True))
        for place, file in enumerate(files):
            split = of_archive[file.archive]
            if split and splits[place] not in (None, split):
                raise DataError(f"{file.place(root)} lies in a folder for {splits[place]}, in an archive for {split}")
            splits[place] = splits[place] or split
    return [split or "train" for split in splits], [path[0] if path else "" for path in below]
