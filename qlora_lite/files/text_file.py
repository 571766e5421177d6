"""The one way to open a text file that somebody else wrote: bytes of any of the usual encodings -> UTF-8 without its mark.

In: an open file. Out: `OpenedText`, a stream of UTF-8 bytes, and a note on how it was read. So a file may be larger than memory.

| begins with                          | is                                                              |
|--------------------------------------|-----------------------------------------------------------------|
| a byte order mark                    | UTF-8, or UTF-16 or UTF-32, decoded whole; the mark is removed  |
| the magic of gzip                    | unpacked while it is read, whatever its name is                 |
| the magic of another known format    | refused, with its name and the way to text                      |
| zeros where UTF-16 or UTF-32 has them| refused with the encoding's name: without a mark it is a guess  |
| anything else                        | UTF-8                                                           |

Surprising: bytes that are not UTF-8 pass through here, because a reader of lines drops only the line that has them. Whoever decodes them
uses `decode_utf8`, whose message has the line, the byte, and the encoding that it probably is.
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
_MARKS = (  # those of UTF-32 first: one of them begins with one of UTF-16
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32-LE"),
    (codecs.BOM_UTF32_BE, "UTF-32-BE"),
    (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    (codecs.BOM_UTF16_BE, "UTF-16-BE"),
)
_GZIP = b"\x1f\x8b"
_OTHERS = {
    b"PK\x03\x04": "a zip file (an Excel workbook is one too); unpack it, or save the sheet as CSV UTF-8",
    b"BZh91AY": "a bzip2 file; unpack it first (bunzip2), or use gzip",
    b"\xfd7zXZ\x00": "an xz file; unpack it first (unxz), or use gzip",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it first (unzstd), or use gzip",
    b"\x04\x22\x4d\x18": "an lz4 file; unpack it first (unlz4), or use gzip",
    b"7z\xbc\xaf\x27\x1c": "a 7z file; unpack it first",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file; save it as CSV UTF-8",
    b"ARROW1": "an Arrow file; save it as Parquet, or give the folder that `datasets` saved",
    b"PAR1": "a Parquet file inside gzip; unpack it first (gunzip)",
    b"SQLite format 3": "an SQLite database; export the table as csv or Parquet",
    b"%PDF-": "a PDF file; make it rows of text first",
    b"version https://git-lfs": "a pointer of Git LFS, not the file; get the file with: git lfs pull",
}
_TAR_AT, _TAR = 257, b"ustar"


class NotText(ValueError):
    """The bytes are not text of a known encoding. `line` counts from 1; the message holds what to do."""

    def __init__(self, reason: str, *, line: int = 1) -> None:
        self.line = line
        super().__init__(reason)


class TooLarge(NotText):
    """More bytes than are read of such a file."""


@dataclass(frozen=True)
class OpenedText:
    """A stream of UTF-8 bytes without a byte order mark, and a sentence about how it was read ("" for plain UTF-8)."""

    stream: BinaryIO
    note: str


def open_utf8(file: BinaryIO, *, by_line: bool = False, longest: int = DATA_FILE_BYTES) -> OpenedText:
    """Open a text of any encoding that its first bytes tell. With `by_line` only one line is waited for, as for a terminal.

    `longest` is the most bytes that a gzip file may hold. Raises NotText, here or while the stream is read.
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
    said = ["gzip, unpacked while it is read"] if is_packed else []
    said += [f"{encoding[:6]} (it has that byte order mark), decoded whole"] if encoding != "UTF-8" else []
    return OpenedText(io.BufferedReader(raw, _BLOCK_BYTES), "; ".join(said))


def decode_file(data: bytes, *, longest: int) -> tuple[str, str]:
    """A small file's bytes -> (its text, a note on how it was read). Raises NotText, also for more than `longest` bytes of UTF-8."""
    opened = open_utf8(io.BytesIO(data), longest=longest)
    plain = opened.stream.read(longest + 1)
    if len(plain) > longest:
        raise TooLarge(f"larger than {longest:,} bytes")
    return decode_utf8(plain), opened.note


def text_lines(file: BinaryIO) -> Iterator[str]:
    """The lines of a text that comes in line by line, as from a terminal. Raises NotText, with the number of the line."""
    stream = open_utf8(file, by_line=True).stream
    for number, line in enumerate(stream, start=1):
        yield decode_utf8(line, line=number)


def decode_utf8(data: bytes, *, line: int = 1) -> str:
    """Text of UTF-8 bytes that begin at `line` of their file. Raises NotText with the line and the encoding they probably have."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad_line = line + data.count(b"\n", 0, error.start)
        raise NotText(_not_utf8(data, error.start), line=bad_line) from error


def _not_utf8(data: bytes, at: int) -> str:
    """The reason, with the bytes of the same line as the evidence."""
    start, end = data.rfind(b"\n", 0, at) + 1, data.find(b"\n", at)
    whole_line = data[start : end if end >= 0 else len(data)]
    said = f"byte 0x{data[at]:02x} is not UTF-8 text"
    if not data[:at].isascii():  # UTF-8 so far
        return f"{said}, though what stands before it is: this place is damaged. Write it again, or remove it"
    try:
        char = data[at : at + 1].decode("cp1252")
        whole_line.decode("cp1252")
    except UnicodeDecodeError:
        return f"{said}. Save the file as UTF-8 (is it a binary file?)"
    advice = 'Save the file as UTF-8: "CSV UTF-8" in Excel, or iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW'
    return f'{said}; in Windows-1252 (and Latin-1) it is "{char}", so it is probably that. {advice}'


def _head(file: BinaryIO, by_line: bool) -> bytes:
    return file.readline(_HEAD_BYTES) if by_line else file.read(_HEAD_BYTES)


def _refuse_other_formats(head: bytes, is_packed: bool) -> None:
    what = next((what for magic, what in _OTHERS.items() if head.startswith(magic)), "")
    if head[_TAR_AT : _TAR_AT + len(_TAR)] == _TAR:
        what = "a tar archive; unpack it first (tar -xf)"
    if is_packed and head.startswith(_GZIP):
        what = "a gzip file inside a gzip file; unpack it first (gunzip)"
    if what:
        raise NotText(f"it looks like {what}")


def _refuse_zeros(head: bytes) -> None:
    """UTF-16 and UTF-32 without a byte order mark: the ASCII characters that every data file has bring zeros at fixed places."""
    if b"\0" not in head:
        return
    zeros = [head[start::4].count(0) / max(1, len(head[start::4])) for start in range(4)]
    patterns = {
        "UTF-32-LE": (False, True, True, True),
        "UTF-32-BE": (True, True, True, False),
        "UTF-16-LE": (False, True, False, True),
        "UTF-16-BE": (True, False, True, False),
    }
    found = next((name for name, wanted in patterns.items() if tuple(share > 0.4 for share in zeros) == wanted), "")
    if found and len(head) >= 4:
        raise NotText(
            f"it looks like {found} without a byte order mark, so it is a guess. Save the file as UTF-8, "
            f"or: iconv -f {found.replace('-LE', 'LE').replace('-BE', 'BE')} -t UTF-8 OLD > NEW"
        )
    line = head.count(b"\n", 0, head.index(b"\0")) + 1
    raise NotText("it holds zero bytes, so it looks like a binary file", line=line)


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
    """A file with the bytes that were already read in front. Of a terminal one line at a time."""

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
            raise NotText(f"a damaged gzip file: {error}. Copy or download it again") from error
        self._num_bytes += len(block)
        if self._num_bytes > self._longest:
            allowed = format_bytes(self._longest)
            raise TooLarge(f"a gzip file that holds more than {allowed}. Split it into smaller files")
        return block


class _Decoded(_Raw):
    """A stream in another encoding, as UTF-8."""

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
