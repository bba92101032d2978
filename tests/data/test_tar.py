"""The fast tar reader agrees with the standard library's, or leaves the tar to it."""

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tar import plain_members

names = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_characters="/"), min_size=1, max_size=60)
paths = st.lists(names, min_size=1, max_size=4).map("/".join)


def tar_of(members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def fast(raw: bytes) -> list[tuple[str, int, int]] | None:
    return plain_members(np.frombuffer(raw, np.uint8))


def slow(raw: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar]


@given(
    st.lists(st.tuples(paths, st.binary(max_size=1100)), max_size=8),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_it_agrees_with_the_standard_library(members: list[tuple[str, bytes]], form: int) -> None:
    try:
        raw = tar_of(members, form)
    except ValueError:  # a name too long for the format
        return
    found = fast(raw)
    assert found is None or found == slow(raw)
    assert found is not None or any(len(name.encode()) > 99 or not name.isascii() for name, _ in members)


@given(st.data())
def test_a_changed_tar_is_read_alike_or_left_to_the_standard_library(data: st.DataObject) -> None:
    raw = bytearray(tar_of([("a.png", b"x" * 700), ("a.cls", b"1"), ("b.png", b"y" * 3), ("b.cls", b"2")]))
    for place in data.draw(st.lists(st.integers(0, 3600), min_size=1, max_size=3)):
        raw[place] = data.draw(st.integers(0, 255))
    found = fast(bytes(raw))
    assert found is None or found == slow(bytes(raw))


@pytest.mark.parametrize("cut", [200, 512, 900, 1024, 1300, 2048])
def test_a_cut_tar_is_not_plain(cut: int) -> None:
    assert fast(tar_of([("a", b"x" * 700), ("b", b"y" * 700)])[:cut]) is None


def test_links_and_extensions_are_not_plain() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert fast(buffer.getvalue()) is None
    assert fast(tar_of([("n" * 200, b"")], tarfile.GNU_FORMAT)) is None


def test_folders_are_passed_over() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        folder = tarfile.TarInfo("x")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo("x/a.cls"))
    assert fast(buffer.getvalue()) == [("x/a.cls", 1024, 0)]
