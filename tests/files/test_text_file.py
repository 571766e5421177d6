"""One way to open a text file: every encoding with a mark is decoded whole, every other one is refused by name with its line."""

import bz2
import gzip
import io
import lzma

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lite.files.text_file import NotText, TooLarge, decode_file, open_utf8, text_lines

ENCODINGS = {
    "utf-8": "",
    "utf-8-sig": "",
    "utf-16": "UTF-16",
    "utf-32": "UTF-32",
    "be16": "UTF-16",
    "be32": "UTF-32",
}


def encoded(text, encoding):
    if encoding == "be16":
        return b"\xfe\xff" + text.encode("utf-16-be")
    return b"\x00\x00\xfe\xff" + text.encode("utf-32-be") if encoding == "be32" else text.encode(encoding)


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=300),
    encoding=st.sampled_from(sorted(ENCODINGS)),
    is_packed=st.booleans(),
    size=st.integers(1, 70),
)
def test_a_text_comes_back_equal_from_every_encoding_with_a_mark(text, encoding, is_packed, size):
    data = encoded(
        f'"{text}', encoding
    )  # a quote first, since a text of any characters may begin as another format does
    opened = open_utf8(io.BytesIO(gzip.compress(data) if is_packed else data))
    read = b""
    while block := opened.stream.read(size):
        read += block
    assert read.decode("utf-8") == f'"{text}'
    assert ENCODINGS[encoding] in opened.note
    assert ("gzip" in opened.note) == is_packed


@pytest.mark.parametrize(
    ("data", "line", "said"),
    [
        ("a\n".encode("utf-16-le"), 1, "UTF-16-LE without a byte order mark"),
        ("question,answer\n".encode("utf-16-be"), 1, "UTF-16-BE without a byte order mark"),
        ("question,answer\n".encode("utf-32-le"), 1, "UTF-32-LE without a byte order mark"),
        ("question,answer\n".encode("utf-32-be"), 1, "UTF-32-BE without a byte order mark"),
        (
            "a\nb\ncafé\n".encode("cp1252"),
            3,
            'byte 0xe9 is not UTF-8 text; probably Windows-1252 or Latin-1, where it is "é"',
        ),
        ("a\n10 €\n".encode("cp1252"), 2, 'probably Windows-1252 or Latin-1, where it is "€"'),
        (b"a\n\x81\n", 2, "is this a binary file?"),
        ("é\n".encode() + b"\xff", 2, "but the text before it is: the file is damaged here"),
        ("a€\n".encode("utf-16")[:-1], 1, "begins as UTF-16, but is not UTF-16 here"),
        ("a\nb\n".encode("utf-16") + b"\x00\xd8", 3, "begins as UTF-16, but is not UTF-16 here"),
        (b"a\nb\0c", 2, "zero bytes"),
        (gzip.compress(b"a" * 100, mtime=0)[:-9], 1, "damaged gzip file"),
        (b"\x1f\x8b\x08\x00abc", 1, "damaged gzip file"),
        (gzip.compress(gzip.compress(b"a", mtime=0), mtime=0), 1, "a gzip file inside a gzip file"),
        (gzip.compress(b"PAR1", mtime=0), 1, "a Parquet file inside gzip"),
        (gzip.compress(b"x" * 257 + b"ustar", mtime=0), 1, "a tar archive"),
        (bz2.compress(b"a"), 1, "a bzip2 file"),
        (lzma.compress(b"a"), 1, "an xz file"),
        (b"PK\x03\x04", 1, "a zip file (an Excel workbook is one too)"),
        (b"version https://git-lfs.github.com/spec/v1\n", 1, "a Git LFS pointer"),
    ],
)
def test_bytes_of_no_known_encoding_are_refused_by_name_with_their_line(data, line, said):
    with pytest.raises(NotText) as caught:
        decode_file(data, longest=1000)
    assert said in str(caught.value)
    assert caught.value.line == line


def test_a_small_gzip_file_does_not_unpack_beyond_the_limit():
    bomb = gzip.compress(b"\n" * 10_000_000)
    assert len(bomb) < 20_000
    with pytest.raises(TooLarge, match="gzip file with more than 977 KiB unpacked"):
        open_utf8(io.BytesIO(bomb), longest=10**6).stream.read()
    with pytest.raises(TooLarge, match="with more than 100 B unpacked"):
        decode_file(bomb, longest=100)


class Terminal(io.RawIOBase):
    """Gives a line when it is asked for one, and counts them."""

    def __init__(self, *lines):
        self.lines, self.num_given = list(lines), 0

    def readable(self):
        return True

    def readinto(self, buffer):
        if not self.lines:
            return 0
        line = self.lines.pop(0)
        buffer[: len(line)] = line
        self.num_given += 1
        return len(line)


def test_lines_of_a_terminal_come_one_at_a_time():
    raw = Terminal(b"a?\n", "é?\n".encode(), b"c?\n")
    lines = text_lines(io.BufferedReader(raw))
    for number, line in enumerate(("a?\n", "é?\n", "c?\n"), start=1):
        assert next(lines) == line
        assert raw.num_given == number


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_of_stdin_are_decoded_like_a_file(encoding):
    assert list(text_lines(io.BufferedReader(io.BytesIO("a €\nb\n".encode(encoding))))) == ["a €\n", "b\n"]
    with pytest.raises(NotText) as caught:
        list(text_lines(io.BufferedReader(io.BytesIO(b"a\nb\n\xe9\n"))))
    assert caught.value.line == 3
