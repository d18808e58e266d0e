"""Names of files as people read them: the same to an eye may be other characters to a disk."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

HYPHENS = dict.fromkeys(map(ord, "\u2010\u2011"), "-")                          # the second does not break


def looks(name: str) -> str:
    """What an eye reads, the same for names that look the same: a letter with its accent in one character, as a Mac
    writes none; a plain space for any other of a space's width, as in a Mac's names of screenshots; no mark that
    nobody sees."""
    if name.isascii():
        return name
    kinds = {character: unicodedata.category(character) for character in set(name)}
    seen = "".join(" " if kinds[character] == "Zs" else "" if kinds[character] == "Cf" else character
                   for character in name)
    return unicodedata.normalize("NFC", seen.translate(HYPHENS))


class Named:
    """What has names, several maybe the same one, found by a name as people write it."""

    def __init__(self, named: Iterable[tuple[str, str]]):
        self.exact, self.alike = defaultdict(list), defaultdict(list)
        for name, what in named:
            self.exact[name].append(what)
            self.alike[looks(name)].append(what)

    def find(self, name: str) -> list[str]:
        """What has this very name; where nothing has, what has one that looks the same."""
        return self.exact.get(name) or self.alike.get(looks(name), [])


def spelled_out(names: Iterable[str]) -> str:
    """Names that look the same, each with what else it is made of: 'caf\\xe9.jpg', 'cafe\\u0301.jpg'."""
    return ", ".join(map(ascii, names))


def on_disk(path: Path) -> Path:
    """The file of this very name; where there is none, the only one of its folder that looks the same."""
    if os.path.lexists(path) or not path.parent.is_dir():
        return path
    named = Named((name, name) for name in os.listdir(path.parent)).find(path.name)
    return path.parent / named[0] if len(named) == 1 else path
