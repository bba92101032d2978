"""What a set is made of and how: kept in its manifest, and compared when the same command is run again."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from data import store
from data.catalog import DATASETS, facts
from data.errors import DataError
from data.manifest import MANIFEST_NAME, Making, Manifest, load_manifest, shard_problems
from data.prepare import cifar10
from data.prepare.inspect import Choices
from data.prepare.pack import EXACT_FORMS, default_encoding
from data.prepare.source import Source, digest

_NOT_OF_THE_SET = {"again", "anonymous"}
"""Options that decide nothing of what is in a set."""

LARGEST_SHARD = {"digits": max(facts("digits").splits.values()), "cifar10": cifar10.IMAGES_IN_BATCH}
"""The sets of which every copy is the same, so that a whole one is known without its source: most images in a shard."""

_NAMES_OF_KINDS = {
    "digits": "digits",
    "cifar10": "CIFAR-10's archive",
    "npz": "npz batches",
    "idx": "Fashion-MNIST's files",
    "lmdb": "an lmdb",
    "tars": "tars that stay where they are",
    "rewritten": "tars that are written anew",
    "archives": "archives",
    "zip": "a zip file",
    "folder": "a folder of images",
}
_FILES_OF_IMAGES = {"folder", "zip", "archives", "lmdb", "rewritten"}
_EFFECTIVE = {
    "encoding": set(_NAMES_OF_KINDS) - {"tars"},
    "held_out": _FILES_OF_IMAGES,
    "samples_per_shard": set(_NAMES_OF_KINDS) - {"tars"},
    "rewrite": {"rewritten", "archives"},
    **dict.fromkeys(("labels", "classes"), _FILES_OF_IMAGES - {"lmdb"} | {"tars"}),
    **dict.fromkeys(("fit", "filter", "background", "small", "skip_bad"), _FILES_OF_IMAGES),
}
"""The kinds of source on which an option has an effect; one that is not here has it on all."""


def check_effect(kind: str, choices: Choices) -> None:
    """An option that would change nothing is a DataError, so that nobody believes it did."""
    kind = "rewritten" if kind == "tars" and choices.rewrite else kind
    for each in fields(Choices):
        idle = kind not in _EFFECTIVE.get(each.name, {kind}) and getattr(choices, each.name) != each.default
        if idle:
            more = ", or add --rewrite to write new shards" if kind == "tars" and each.name != "held_out" else ""
            raise DataError(f"{_flag(each.name)} has no effect on {_NAMES_OF_KINDS[kind]}: leave it out{more}")
    if choices.fit in EXACT_FORMS and choices.filter != "area":
        raise DataError(f"--filter has no effect with --fit {choices.fit}, which states its own: leave it out")
    if choices.fit == "none" and (choices.filter != "area" or choices.small != "refuse"):
        raise DataError("--filter and --small have no effect with --fit none, which changes no size: leave them out")


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def making(name: str, source: Source | None, choices: Choices) -> Making:
    """What a set would be made of; a set of which every copy is the same is not asked for its source."""
    files = source.files if source else {}
    return Making(
        files=len(files),
        bytes=sum(files.values()),
        names=digest(f"{path} {size}" for path, size in sorted(files.items())) if source else "",
        versions=source.version(sorted(files)) if source else "",
        options=_options(name, choices, kept=source is not None and source.kind == "tars" and not choices.rewrite),
    )


def _options(name: str, choices: Choices, kept: bool) -> dict[str, str | int | float | bool | None]:
    """Every option by its name, what is usual in place of None; of tars that stay as they are only what they heed."""
    known = DATASETS.get(name)
    options = {key: value for key, value in asdict(choices).items() if key not in _NOT_OF_THE_SET}
    if known:
        options |= {"resolution": known.resolution, "channels": known.channels, "flip": known.flip}
    if name in LARGEST_SHARD:
        options["samples_per_shard"] = min(choices.samples_per_shard, LARGEST_SHARD[name])
    if kept:
        return {key: options[key] for key in options if key not in ("resolution", "channels", "encoding")}
    resolution = options["resolution"] or 0
    return options | {
        "channels": options["channels"] or 3,
        "encoding": options["encoding"] or default_encoding(resolution),
    }


def finished(wanted: Mapping[str, Any], made: Making, to: str, again: bool) -> Manifest | None:
    """The manifest at `to` if it states what is wanted, was made so, and every shard is there.

    Another set is a DataError; so is the same set made otherwise, unless it is to be made again.
    """
    if not store.exists(store.join(to, MANIFEST_NAME)):
        return None
    found = load_manifest(to)
    if again and found.name == wanted["name"]:
        return None
    actual = {
        "name": found.name,
        "resolution": found.resolution,
        "channels": found.channels,
        "class_names": found.class_names,
        "flip": found.flip,
        "images": {split: part.count for split, part in found.splits.items()},
        "samples per shard": max(shard.count for part in found.splits.values() for shard in part.shards),
    }
    # What a set was made of and how decides these two.
    known = {"images", "samples per shard"} if found.made else set[str]()
    for fact, value in wanted.items():
        if fact not in known and actual[fact] != value:
            texts = repr(actual[fact]), repr(value)
            is_now, asked = (text if len(text) <= 100 else f"{text[:100]}..." for text in texts)
            raise DataError(
                f"{to} holds a different data set: its {fact} is {is_now}, not {asked}. "
                "Choose another URL, or remove that set first."
            )
    if (problem := _difference(found, made)) is not None:
        raise DataError(
            f"{to} holds a finished set, but {problem}. Choose another URL, or add --again to make the set anew."
        )
    return None if shard_problems(to, found) else found


def own_shards(to: str) -> set[str]:
    """The shards at `to` that this program wrote, by the manifest there; tars that were only described are not."""
    if not store.exists(store.join(to, MANIFEST_NAME)):
        return set()
    found = load_manifest(to)
    ours = not found.root and found.made is not None and "encoding" in found.made.options
    return {shard.path for part in found.splits.values() for shard in part.shards} if ours else set()


def _difference(found: Manifest, wanted: Making) -> str | None:
    """What of a finished set is not as the command at hand would make it; None if there is nothing, or it is not known.

    An option that the set does not know came later, so the set was made with its default.
    """
    made = found.made
    if made is None:
        return None
    defaults = {each.name: each.default for each in fields(Choices)}
    for option, value in wanted.options.items():
        before = made.options.get(option, defaults.get(option))
        if before != value:
            return f"it was made with {_flag(option)} {_said(before)}, not {_said(value)}"
    if not made.names or not wanted.names:
        return None
    if (made.files, made.bytes) != (wanted.files, wanted.bytes):
        return (
            f"its source had {made.files:,} files of {made.bytes:,} bytes, and now has {wanted.files:,} of "
            f"{wanted.bytes:,} bytes"
        )
    if made.names != wanted.names:
        return f"the {made.files:,} files of its source have other names or sizes now"
    changed = "files of its source were replaced or changed since, or are copies with other times"
    return changed if made.versions != wanted.versions else None


def _said(value: object) -> str:
    return "left out" if value is None or value is False else "given" if value is True else str(value)
