"""Whether bytes are still those that were written: a checksum of any content, and zip files that carry their own.

xxHash's XXH3 with 128 bits: as fast as memory, and no accident passes it (one in 10^38). It is no signature: who can
write a file can write its checksum too.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import xxhash

AT_ONCE = 2**20                         # bytes read at once
END = b"PK\5\6"                         # of a zip: a record of 22 bytes, whose last two are the comment's length
END_LENGTH = 22
MARK = b"xxh3-128 "                     # what the comment of a sealed zip begins with; 32 hexadecimal digits follow
SEAL_LENGTH = len(MARK) + 32


class Damaged(ValueError):
    """Bytes that are not those that were written."""


def digest(chunks: Iterable) -> str:
    """32 hexadecimal digits of all bytes of the chunks (bytes, memoryviews, contiguous arrays), one after the other;
    how they are divided makes no difference."""
    state = xxhash.xxh3_128()
    for chunk in chunks:
        state.update(chunk)
    return state.hexdigest()


def chunks_of(file: BinaryIO, length: int | None = None) -> Iterator[memoryview]:
    """The next `length` bytes of a file, or all that are left, a megabyte at a time, each gone at the next."""
    buffer = memoryview(bytearray(AT_ONCE))
    while count := file.readinto(buffer if length is None else buffer[:length]):
        yield buffer[:count]
        length = None if length is None else length - count


def file_digest(path: str | Path) -> str:
    with open(path, "rb", buffering=0) as file:
        return digest(chunks_of(file))


def seal_zip(content: io.BytesIO) -> None:
    """Give a zip, just written and without a comment, one with the checksum of all bytes before it."""
    whole = content.getbuffer()
    if whole[-END_LENGTH:-END_LENGTH + 4] != END or bytes(whole[-2:]) != b"\0\0":
        raise ValueError("no zip file that ends without a comment")
    whole[-2:] = SEAL_LENGTH.to_bytes(2, "little")
    seal = MARK + digest([whole]).encode()
    del whole                                                                   # else it cannot grow
    content.seek(0, io.SEEK_END)
    content.write(seal)


def zip_is_sealed(path: str | Path) -> bool:
    """Whether a zip file has a seal, and so is whole; False for one without, of which nothing can be told.

    Raises Damaged where the seal is broken, or the file's end is gone.
    """
    with open(path, "rb", buffering=0) as file:
        length = file.seek(0, io.SEEK_END)
        file.seek(max(0, length - END_LENGTH - SEAL_LENGTH))
        tail = file.read()
        if tail[END_LENGTH:].startswith(MARK):
            file.seek(0)
            if tail[END_LENGTH + len(MARK):] != digest(chunks_of(file, length - SEAL_LENGTH)).encode():
                raise Damaged("its content is not what its checksum says")
            return True
    end = tail.rfind(END)
    comment = int.from_bytes(tail[end + END_LENGTH - 2:end + END_LENGTH], "little")
    if end >= 0 and comment == SEAL_LENGTH:                                     # no seal of ours, where one was
        raise Damaged("its checksum is damaged, or cut off")
    return False
