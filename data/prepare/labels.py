"""Labels that lie beside images: tables of many, such as metadata.csv or dataset.json, and a small file for each."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from webdataset.tariterators import base_plus_ext

from data.decode import JSON_EXTENSION, LABEL_EXTENSION, LABEL_KEYS, label_text, plain_label, stated_label
from data.errors import DataError
from data.prepare.files import File, named
from data.record import read_record

FOLDERS, NONE = "folder", "none"
"""What the user calls the folders that images lie in, as a source of labels, and having none."""

LONGEST_TABLE = 256 * 2**20
"""Bytes of the longest table of labels that is read."""

ANNOTATIONS = "val_annotations.txt"
"""Tiny ImageNet's table: which folder of the training split each image of another split belongs to."""
_TABLES = ("dataset.json", "metadata.csv", "metadata.jsonl", "labels.csv", ANNOTATIONS)
_SIDECARS = (f".{LABEL_EXTENSION}", f".{JSON_EXTENSION}")
_NAMES = ("file_name", "filename", "file", "image", "image_name", "image_id", "path", "name", "id")
_SEPARATORS = ",;\t"


@dataclass(frozen=True, kw_only=True)
class _DatasetJson:
    """The dataset.json of StyleGAN and EDM: the label of each file by its path; null without labels."""

    labels: list[tuple[str, Any]] | None


@dataclass(frozen=True, kw_only=True)
class Found:
    """The labels of one source of labels.

    Attributes:
        labels: The label of each image, by its place among the images.
        missing: Names of images that are spoken of and are not there.
        files: The files that state them.
    """

    labels: Mapping[int, str]
    missing: tuple[str, ...] = ()
    files: tuple[File, ...] = ()


Read = Callable[[Sequence[File]], Iterator[bytes]]
"""Gives the bytes of some files."""


def in_tables(
    files: Sequence[File], images: Sequence[File], chosen: str | None, root: str, read: Read
) -> dict[str, Found]:
    """The labels in tables, by the name of the table, which may lie in several folders."""
    tables: dict[str, list[File]] = {}
    for file in files:
        if is_table(file, chosen):
            name = chosen if chosen and "/".join(file.path) == chosen_table(chosen) else file.path[-1]
            if chosen in (None, name) or name == ANNOTATIONS:
                tables.setdefault(name, []).append(file)
    found: dict[str, Found] = {}
    for name, those in tables.items():
        payloads = [file.text if file.text is not None else next(read([file])) for file in those]
        stated = of_tables(images, zip(those, payloads, strict=True), root, name == chosen)
        found |= {name: replace(stated, files=tuple(those))} if stated.labels else {}
    return found


def beside(
    files: Sequence[File], images: Sequence[File], chosen: str | None, root: str, read: Read
) -> dict[str, Found]:
    """The labels in small files beside the images, by their suffix."""
    shared = {key for image in images for key in keys(image)}
    groups: dict[str, list[File]] = {}
    for file in files:
        wanted = is_sidecar(file, chosen) and chosen in (None, file.suffix)
        # Beside images of a folder there may be JSON of any kind.
        meant = file.suffix != f".{JSON_EXTENSION}" or not shared.isdisjoint(keys(file))
        if wanted and (file.label is not None or (file.offset < 0 and meant)):
            groups.setdefault(file.suffix, []).append(file)
    found: dict[str, Found] = {}
    for suffix, those in groups.items():
        unread = [file for file in those if file.label is None]
        texts = {
            file: label_text(suffix.removeprefix("."), payload, file.place(root))
            for file, payload in zip(unread, read(unread), strict=True)
        }
        pairs = [(file, label) for file in those if (label := file.label or texts[file]) is not None]
        labels = of_sidecars(images, pairs, root)
        found |= {suffix: Found(labels=labels, files=tuple(file for file, _ in pairs))} if labels else {}
    return found


def chosen_table(chosen: str | None) -> str:
    """Name of the table that the user's choice of labels names; "" if it names none."""
    return chosen.removeprefix("csv:") if chosen and chosen.startswith("csv:") else ""


def is_table(file: File, chosen: str | None) -> bool:
    """Whether a file is a table of labels: it has a known name, or the user names it."""
    return file.path[-1] in _TABLES or "/".join(file.path) == chosen_table(chosen)


def is_sidecar(file: File, chosen: str | None) -> bool:
    """Whether a file may state the label of the image that has its name but for the end."""
    return (file.suffix in _SIDECARS or file.suffix == chosen) and not is_table(file, chosen)


def keys(file: File) -> tuple[str, str]:
    """What an image and its label have in common: the name up to its last dot, or to its first as in WebDatasets."""
    name = "/".join(file.path)
    return (
        f"{file.archive}|{name.removesuffix(name[len(name) - len(file.suffix) :])}",
        f"{file.archive}|{base_plus_ext(name)[0]}",
    )


def of_sidecars(images: Sequence[File], sidecars: Iterable[tuple[File, str]], root: str) -> dict[int, str]:
    """The labels that small files state; one without its image is a DataError."""
    by_key: dict[str, tuple[File, str]] = {}
    for file, label in sidecars:
        other, known = by_key.setdefault(keys(file)[0], (file, label))
        if known != label:
            raise DataError(
                f"{other.place(root)} and {file.place(root)} state the labels {known!r} and {label!r}: leave one"
            )
    labels: dict[int, str] = {}
    used: set[str] = set()
    for place, image in enumerate(images):
        key = next((key for key in keys(image) if key in by_key), None)
        if key is not None:
            labels[place] = by_key[key][1]
            used.add(key)
    shared = {key for image in images for key in keys(image)}
    alone = [file.place(root) for key, (file, _) in by_key.items() if key not in used and keys(file)[1] not in shared]
    if alone:
        raise DataError(f"{named(alone, 3)} has a label but no image: copy the source again, or remove the label")
    return labels


def of_tables(images: Sequence[File], tables: Iterable[tuple[File, bytes]], root: str, chosen: bool) -> Found:
    """The labels in all tables of one name; what two rows say of one image must be the same."""
    by_path = {(image.archive, *image.path): place for place, image in enumerate(images)}
    by_end: dict[str, list[int]] = {}
    for place, image in enumerate(images):
        for end in {image.path[-1], image.path[-1].removesuffix(image.suffix), keys(image)[1].rpartition("/")[2]}:
            by_end.setdefault(end, []).append(place)
    labels: dict[int, str] = {}
    missing: list[str] = []
    for table, payload in tables:
        where = table.place(root)
        for name, label in _rows(table, payload, where, chosen):
            spoken = File(name=name, size=0, archive=table.archive)
            if not spoken.path[-1]:
                raise DataError(f"{where} has a row that names no image: repair it")
            place = by_path.get((table.archive, *table.path[:-1], *spoken.path))
            if place is None:
                place = _ending(images, by_end.get(spoken.path[-1], ()), table, spoken, where)
            if place is None:
                missing.append(name)
            elif label is not None and labels.setdefault(place, label) != label:
                raise DataError(f"{where} gives {name} the labels {labels[place]!r} and {label!r}: leave one")
    return Found(labels=labels, missing=tuple(missing))


def _ending(images: Sequence[File], places: Sequence[int], table: File, spoken: File, where: str) -> int | None:
    """The one image below a table's folder whose path ends as a row says, with or without its suffix."""
    folder, found = table.path[:-1], []
    for place in places:
        image = images[place]
        inside = not table.archive or image.archive == table.archive
        below = (image.path[: len(folder)] == folder or bool(image.archive and not table.archive)) and inside
        if below and image.path[-len(spoken.path) : -1] == spoken.path[:-1]:
            found.append(place)
    if len(found) > 1:
        raise DataError(f"{where}: {spoken.name} may be any of {len(found)} images: write their folders too")
    return found[0] if found else None


def _rows(table: File, payload: bytes, where: str, chosen: bool) -> Iterator[tuple[str, str | None]]:
    """Name and label of each row of a table."""
    try:
        text = payload.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text ({error}): save it as UTF-8") from error
    if table.suffix == ".json":
        try:
            entries = read_record(_DatasetJson, text).labels or []
        except (DataError, RecursionError) as error:
            raise DataError(
                f'{where} is not of the form {{"labels": [["path", number], ...]}} ({error}): repair it, '
                "or choose other labels with --labels"
            ) from None
        yield from ((name, plain_label(label, f"{where}: {name}")) for name, label in entries)
    elif table.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield _entry(_object(line, f"{where}, line {number}"), f"{where}, line {number}")
    elif table.path[-1] == ANNOTATIONS:
        yield from ((row[0], row[1]) for row in csv.reader(io.StringIO(text), delimiter="\t") if len(row) > 1)
    else:
        yield from _csv(text, where, chosen)


def _object(line: str, where: str) -> Mapping[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}): repair it") from error
    if not isinstance(entry, dict):
        raise DataError(f"{where} is not a JSON object: repair it")
    return entry


def _entry(entry: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    name = next((entry[key] for key in _NAMES if isinstance(entry.get(key), str)), None)
    if name is None:
        raise DataError(f"{where} names no image: it needs one of {', '.join(_NAMES)}")
    return name, stated_label(entry, where)


def _csv(text: str, where: str, chosen: bool) -> Iterator[tuple[str, str | None]]:
    """The rows of a table with a line of titles; one of two columns that is chosen by name may lack it."""
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text), delimiter=max(_SEPARATORS, key=first.count))
    try:
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{where} is not a table ({error}): save it as CSV") from error
    titles = [title.strip().lower() for title in rows[0]] if rows else []
    known = {"name": set(titles) & set(_NAMES), "label": set(titles) & set(LABEL_KEYS)}
    if not all(known.values()):
        if not chosen:
            return  # a table of something else, such as captions
        if len(titles) != 2 or any(known.values()):
            raise DataError(
                f"{where} has the columns {', '.join(titles)}: it needs one of {', '.join(_NAMES)} and one of "
                f"{', '.join(LABEL_KEYS)}"
            )
        titles, rows = ["name", "label"], [["name", "label"], *rows]
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(titles):
            raise DataError(f"{where}, row {number} has {len(row)} columns, not {len(titles)}: repair it")
        yield _entry({key: cell or None for key, cell in zip(titles, row, strict=True)}, f"{where}, row {number}")
