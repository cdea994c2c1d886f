"""Names as people write them: of classes, of splits, and not always in UTF-8."""

import codecs
import io
import logging
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

logger = logging.getLogger(__name__)

# What people call the three usual splits.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "trn": "train",
    "test": "test",
    "testing": "test",
    "tst": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
}

# Words beside them that say nothing, as in seg_train and "Training images".
_FILLERS = frozenset(
    (
        *("set", "data", "dataset", "split", "splits", "seg", "cls", "classification"),
        *("image", "images", "img", "imgs", "photo", "photos", "picture", "pictures"),
        *("pic", "pics", "file", "files", "folder", "dir", "jpg", "jpeg", "png"),
        *("raw", "final", "small", "full", "resized", "cropped"),
    )
)

# All blanks, the one without width, and the byte order mark.
_BLANKS = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\ufeff"

# Longer names are not names. Unicode's forms of such texts can take minutes.
_LONGEST = 1000

# Lone surrogates, which a JSON text may have. Those between stand for bytes in names of
# files that are not in UTF-8.
SURROGATES = r"[\ud800-\udc7f\udd00-\udfff]"


def printable(text: object) -> str:
    r"""Returns a path or name that can be printed: bytes that are not UTF-8 as \xe9."""
    text = re.sub(SURROGATES, lambda x: f"\\u{ord(x[0]):x}", str(text))
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Encodes what is left of `printable`, and letters that a console lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = printable(error.object[error.start : error.end])
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


# For streams and files: as in open(path, "w", errors=PRINTABLE).
PRINTABLE = "mixer_jax.printable"
codecs.register_error(PRINTABLE, _escape)


def print_any_name() -> None:
    """Lets the console show any name, whatever letters it has: as `printable` does."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # and not that of a notebook
            stream.reconfigure(errors=PRINTABLE)


def listing(names: Sequence[str], count: int = 5) -> str:
    """Returns the first names, with an ellipsis if there are more or one is long."""
    shown = (x[:300] + "…" * (len(x) > 300) for x in names[:count])
    return ", ".join(shown) + (", …" if len(names) > count else "")


def clean_name(name: str) -> str:
    """Returns a name in Unicode's composed form (NFC), without blanks around it."""
    name = printable(name).strip(_BLANKS)
    if len(name) > _LONGEST:
        return name
    return unicodedata.normalize("NFC", name).strip(_BLANKS)


def clean_classes(where: str, found: Iterable[str]) -> dict[str, str]:
    """Maps the names of classes as found to clean ones; warns of those that are alike.

    Names that differ only in blanks around them or in the form of Unicode are one
    class. Names that differ only in case, separators or the spelling of a number stay
    different classes.

    Args:
      where: the dataset, for the warnings.
      found: the names as they are written.
    """
    clean = {name: clean_name(name) or printable(name) for name in found}
    for name, spellings in _groups(clean, clean.__getitem__).items():
        logger.warning(
            "%s: %s are one class, %r", where, " and ".join(map(ascii, spellings)), name
        )
    alike = _groups(dict.fromkeys(clean.values()), _without_spelling).values()
    if alike:
        logger.warning(
            "%s: these differ only in their spelling, and are different classes: %s. "
            "Rename them if they mean the same.",
            where,
            listing([" and ".join(map(repr, group)) for group in alike]),
        )
    return clean


def split_kinds(names: Iterable[str]) -> dict[str, str]:
    """Returns, for names that say so, which split they mean.

    These are names such as Train, "test set" and seg_train. Other words may stand
    beside if another name has the same: pets_train and pets_val, but not train_station.

    Returns:
      "train", "test" or "validation" by name.
    """
    kinds: dict[str, tuple[str, frozenset[str]]] = {}
    others: dict[frozenset[str], set[str]] = defaultdict(set)
    for name in names:
        spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
        words = re.findall(r"[^\W\d_]+", spaced.lower())
        words = [re.sub(r"(?<=.)(set|data)$", "", word) or word for word in words]
        found = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
        if len(found) == 1:
            rest = frozenset(words) - set(SPLIT_WORDS) - _FILLERS
            kinds[name] = (found.pop(), rest)
            others[rest].add(kinds[name][0])
    return {
        name: kind
        for name, (kind, rest) in kinds.items()
        if not rest or len(others[rest]) > 1
    }


def find_split(wanted: str, names: Sequence[str]) -> str | None:
    """Returns the split that is meant by `wanted`, or None if that is not certain.

    That is the split of this name; or else the only one whose name differs in case
    alone; or else, if `wanted` is a usual name such as "train" or "val", the only one
    whose name means the same.
    """
    if wanted in names:
        return wanted
    same = [name for name in names if name.casefold() == wanted.casefold()]
    if not same and (kind := SPLIT_WORDS.get(wanted.casefold())):
        same = [name for name, other in split_kinds(names).items() if other == kind]
    return same[0] if len(same) == 1 else None


def _without_spelling(name: str) -> str:
    """Returns what names that differ in case, separators or zeros have in common."""
    name = re.sub(r"^(\d+)\.0+$", r"\1", name)  # of a table that took 1 for 1.0
    name = re.sub(r"0*(\d+)", r"\1", name.casefold())
    return re.sub(r"[\s_-]+", " ", name)


def _groups(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    """Returns the names that share a key, by key."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[key(name)].append(name)
    return {key: group for key, group in groups.items() if len(group) > 1}
