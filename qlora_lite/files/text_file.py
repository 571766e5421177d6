"""Text files from other programs: bytes in any usual encoding -> UTF-8 without a byte order mark.

In: an open file. Out: `OpenedText`, a stream of UTF-8 bytes and a note on the decoding. A file may be larger than memory.

| begins with                           | treatment                                                       |
|---------------------------------------|-----------------------------------------------------------------|
| a byte order mark                     | UTF-8, UTF-16 or UTF-32, decoded; the mark is removed           |
| the magic of gzip                     | unpacked while it is read, under any file name                  |
| the magic of another known format     | refused, with its name and the way to text                      |
| zeros in a UTF-16 or UTF-32 pattern   | refused with the encoding's name: without a mark it is a guess  |
| anything else                         | UTF-8                                                           |

Surprising: bytes that are not UTF-8 pass through, because a line reader drops only the line that has them. Decode them with
`decode_utf8`, whose error gives the line, the byte and the likely encoding.
"""

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from qlora_lite.limits import DATA_FILE_BYTES
from qlora_lite.units import format_bytes

_HEAD_BYTES = 4096
_BLOCK_BYTES = 2**16
_MARKS = (  # UTF-32 before UTF-16: a UTF-32 mark begins with a UTF-16 mark
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32-LE"),
    (codecs.BOM_UTF32_BE, "UTF-32-BE"),
    (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    (codecs.BOM_UTF16_BE, "UTF-16-BE"),
)
_GZIP = b"\x1f\x8b"
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip file (an Excel workbook is one too); unpack it, or save the sheet as CSV UTF-8",
    b"BZh91AY": "a bzip2 file; unpack it first (bunzip2), or use gzip",
    b"\xfd7zXZ\x00": "an xz file; unpack it first (unxz), or use gzip",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it first (unzstd), or use gzip",
    b"\x04\x22\x4d\x18": "an lz4 file; unpack it first (unlz4), or use gzip",
    b"7z\xbc\xaf\x27\x1c": "a 7z file; unpack it first",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file; save it as CSV UTF-8",
    b"ARROW1": "an Arrow file; save it as Parquet, or give a folder saved by `datasets`",
    b"PAR1": "a Parquet file inside gzip; unpack it first (gunzip)",
    b"SQLite format 3": "an SQLite database; export the table as csv or Parquet",
    b"%PDF-": "a PDF file; convert it to rows of text first",
    b"version https://git-lfs": "a Git LFS pointer, not the file; get the file with: git lfs pull",
}
_TAR_AT, _TAR = 257, b"ustar"


class NotText(ValueError):
    """Bytes that are not text in a known encoding. `line` counts from 1; the message includes the advice."""

    def __init__(self, reason: str, *, line: int = 1) -> None:
        self.line = line
        super().__init__(reason)


class TooLarge(NotText):
    """A file above the size limit of its kind."""


@dataclass(frozen=True)
class OpenedText:
    """A stream of UTF-8 bytes without a byte order mark, and a note on the decoding ("" for plain UTF-8)."""

    stream: BinaryIO
    note: str


def open_utf8(file: BinaryIO, *, by_line: bool = False, longest: int = DATA_FILE_BYTES) -> OpenedText:
    """Open text in any encoding that its first bytes identify. `by_line` waits for one line only, for terminals.

    `longest` limits the unpacked bytes of a gzip file. Raises NotText, here or while the stream is read.
    """
    head = _head(file, by_line)
    is_packed = head.startswith(_GZIP)
    if is_packed:
        file = io.BufferedReader(_Unpacked(_Joined(head, file), longest))
        head = _head(file, by_line)
    _refuse_other_formats(head, is_packed)
    mark, encoding = next(((mark, name) for mark, name in _MARKS if head.startswith(mark)), (b"", "UTF-8"))
    if not mark:
        _refuse_zeros(head)
    raw: io.RawIOBase = _Joined(head[len(mark) :], file)
    if encoding != "UTF-8":
        raw = _Decoded(raw, encoding)
    notes = ["gzip, unpacked while it is read"] if is_packed else []
    notes += [f"{encoding[:6]}, from its byte order mark"] if encoding != "UTF-8" else []
    return OpenedText(io.BufferedReader(raw, _BLOCK_BYTES), "; ".join(notes))


def decode_file(data: bytes, *, longest: int) -> tuple[str, str]:
    """Decode the bytes of a small file -> (text, a note on the decoding). Raises NotText, also above `longest` bytes of UTF-8."""
    opened = open_utf8(io.BytesIO(data), longest=longest)
    plain = opened.stream.read(longest + 1)
    if len(plain) > longest:
        raise TooLarge(f"larger than {longest:,} bytes")
    return decode_utf8(plain), opened.note


def text_lines(file: BinaryIO) -> Iterator[str]:
    """Yield the lines of text that arrives line by line, as from a terminal. Raises NotText with the line number."""
    stream = open_utf8(file, by_line=True).stream
    for number, line in enumerate(stream, start=1):
        yield decode_utf8(line, line=number)


def decode_utf8(data: bytes, *, line: int = 1) -> str:
    """Decode UTF-8 bytes that begin at `line` of their file. Raises NotText with the line and the likely encoding."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad_line = line + data.count(b"\n", 0, error.start)
        raise NotText(_not_utf8(data, error.start), line=bad_line) from error


def _not_utf8(data: bytes, at: int) -> str:
    """Return the reason and the advice, judged from the bytes of the same line."""
    start, end = data.rfind(b"\n", 0, at) + 1, data.find(b"\n", at)
    whole_line = data[start : end if end >= 0 else len(data)]
    problem = f"byte 0x{data[at]:02x} is not UTF-8 text"
    if not data[:at].isascii():  # UTF-8 so far
        return f"{problem}, but the text before it is: the file is damaged here. Rewrite this place, or remove it"
    try:
        char = data[at : at + 1].decode("cp1252")
        whole_line.decode("cp1252")
    except UnicodeDecodeError:
        return f"{problem}. Save the file as UTF-8 (is this a binary file?)"
    advice = 'Save the file as UTF-8: "CSV UTF-8" in Excel, or iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW'
    return f'{problem}; probably Windows-1252 or Latin-1, where it is "{char}". {advice}'


def _head(file: BinaryIO, by_line: bool) -> bytes:
    return file.readline(_HEAD_BYTES) if by_line else file.read(_HEAD_BYTES)


def _refuse_other_formats(head: bytes, is_packed: bool) -> None:
    description = next((text for magic, text in _OTHER_FORMATS.items() if head.startswith(magic)), "")
    if head[_TAR_AT : _TAR_AT + len(_TAR)] == _TAR:
        description = "a tar archive; unpack it first (tar -xf)"
    if is_packed and head.startswith(_GZIP):
        description = "a gzip file inside a gzip file; unpack it first (gunzip)"
    if description:
        raise NotText(f"looks like {description}")


def _refuse_zeros(head: bytes) -> None:
    """Raise NotText for UTF-16 and UTF-32 without a byte order mark, where ASCII characters put zeros at regular places."""
    if b"\0" not in head:
        return
    zeros = [head[start::4].count(0) / max(1, len(head[start::4])) for start in range(4)]
    patterns = {
        "UTF-32-LE": (False, True, True, True),
        "UTF-32-BE": (True, True, True, False),
        "UTF-16-LE": (False, True, False, True),
        "UTF-16-BE": (True, False, True, False),
    }
    encoding = next((name for name, wanted in patterns.items() if tuple(share > 0.4 for share in zeros) == wanted), "")
    if encoding and len(head) >= 4:
        raise NotText(
            f"looks like {encoding} without a byte order mark, which is only a guess. Save the file as UTF-8, "
            f"or: iconv -f {encoding.replace('-LE', 'LE').replace('-BE', 'BE')} -t UTF-8 OLD > NEW"
        )
    line = head.count(b"\n", 0, head.index(b"\0")) + 1
    raise NotText("contains zero bytes: looks like a binary file", line=line)


class _Raw(io.RawIOBase):
    """A stream whose `_more` gives the next bytes, b"" at the end."""

    def __init__(self) -> None:
        self._rest = b""
        self._is_at_end = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        while not self._rest and not self._is_at_end:
            self._rest = self._more()
            self._is_at_end = not self._rest
        num_bytes = min(len(buffer), len(self._rest))
        buffer[:num_bytes], self._rest = self._rest[:num_bytes], self._rest[num_bytes:]
        return num_bytes

    def _more(self) -> bytes:
        raise NotImplementedError


class _Joined(_Raw):
    """A file with its already read bytes put back in front. Reads a terminal one line at a time."""

    def __init__(self, head: bytes, file: BinaryIO) -> None:
        super().__init__()
        self._rest = head
        self._read = getattr(file, "read1", file.read)

    def _more(self) -> bytes:
        block: bytes = self._read(_BLOCK_BYTES)
        return block


class _Unpacked(_Raw):
    """The content of a gzip file, at most `longest` bytes."""

    def __init__(self, packed: io.RawIOBase, longest: int) -> None:
        super().__init__()
        self._file = gzip.GzipFile(fileobj=io.BufferedReader(packed))
        self._longest, self._num_bytes = longest, 0

    def _more(self) -> bytes:
        try:
            block = self._file.read1(_BLOCK_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            raise NotText(f"damaged gzip file: {error}. Copy or download it again") from error
        self._num_bytes += len(block)
        if self._num_bytes > self._longest:
            allowed = format_bytes(self._longest)
            raise TooLarge(f"gzip file with more than {allowed} unpacked. Split it into smaller files")
        return block


class _Decoded(_Raw):
    """A stream in another encoding, converted to UTF-8."""

    def __init__(self, raw: io.RawIOBase, encoding: str) -> None:
        super().__init__()
        self._raw, self._encoding = raw, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._line = 1

    def _more(self) -> bytes:
        text = ""
        while not text:
            block = self._raw.read(_BLOCK_BYTES) or b""
            try:
                text = self._decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                good = error.object[: error.start].decode(self._encoding, "replace")
                line = self._line + good.count("\n")
                name = self._encoding[:6]
                raise NotText(f"begins as {name}, but is not {name} here. Save the file as UTF-8", line=line) from error
            if not block:
                break
        self._line += text.count("\n")
        return text.encode("utf-8")
