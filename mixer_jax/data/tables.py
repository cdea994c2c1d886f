"""Datasets of image files that a .csv or .tsv file lists."""

import csv
import logging
import os
import pathlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from mixer_jax.data.dataset import DatasetError
from mixer_jax.data.listed import (
    Labels,
    ListedDataset,
    Rows,
    list_files,
    read_classes,
)
from mixer_jax.data.names import (
    clean_classes,
    clean_name,
    find_split,
    listing,
    printable,
)

logger = logging.getLogger(__name__)

SEPARATOR = "|"  # between the labels of an image that has several


def open_table(path: pathlib.Path) -> ListedDataset:
    """Opens a CSV or TSV file with the columns path, label and, if wanted, split.

    Several labels of an image are separated by "|". If a cell has several, all labels
    of the dataset are tuples, and an empty cell is an image of no class.

    Raises:
      DatasetError: it is not such a table, or has no images to train on.
    """
    where = printable(path)
    classes = read_classes(path.parent)
    cells = list(_read(path))
    if not cells:
        raise DatasetError(f"{where}: no lines below the header.")
    known = set(classes or ())
    several = [
        label
        for _, _, label, _ in cells
        if SEPARATOR in label and clean_name(label) not in known
    ]
    if several:
        logger.warning(
            "%s: %r separates labels; images have several, such as %r. If that is one "
            "class, list it in a classes.txt beside the table.",
            where,
            SEPARATOR,
            several[0],
        )
    pieces = {x[2]: x[2].split(SEPARATOR) if several else [x[2]] for x in cells}
    found = {piece for split in pieces.values() for piece in split if clean_name(piece)}
    clean = clean_classes(where, sorted(found))
    splits = _clean_splits(where, Counter(split for *_, split in cells))
    rows: dict[str, Rows] = defaultdict(list)
    outside = []
    for line, file, cell, split in cells:
        labels = tuple(dict.fromkeys(clean[x] for x in pieces[cell] if x in clean))
        if not labels and not several:
            raise DatasetError(
                f"{where}, line {line}: found no label for {listing([printable(file)])}"
                ". Expected a path and a label."
            )
        if os.path.isabs(file) or os.path.normpath(file).startswith(f"..{os.sep}"):
            outside.append(printable(file))
        image = os.path.join(path.parent, file)
        # To look for every file may take long. The first of each split shows whether
        # the paths are right; one that is missing later is reported as an unreadable
        # image.
        if splits[split] not in rows and not os.path.isfile(image):
            slashes = os.path.isfile(image.replace("\\", "/"))
            raise DatasetError(
                f"{where}, line {line}: there is no file {listing([printable(image)])}"
                ". Paths are relative to the table's folder"
                f"{', and written with / for the backslash' if slashes else ''}."
            )
        rows[splits[split]].append((image, labels if several else labels[0]))
    if outside:
        logger.warning(
            "%s: %d paths are absolute or lead out of the table's folder: %s",
            where,
            len(outside),
            listing(outside, 3),
        )
    _warn_of_repeated(where, rows)
    return list_files(where, str(path.parent), rows, classes)


def _read(path: pathlib.Path) -> Iterator[tuple[int, str, str, str]]:
    """Gives the line number, path, label and split of each row; "" for no split."""
    where = printable(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, newline="", encoding="utf-8-sig") as file:
        # Strict: a quote that is not closed would swallow the lines below it. But it
        # would refuse blanks behind a quote too.
        blanks = re.compile(rf'" +(?=[{delimiter}\r\n]|$)')
        lines = (blanks.sub('"', line) for line in file)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        start = 1  # the line in which a row begins
        try:
            header = next(reader, [])
            columns = [clean_name(x).casefold() for x in header]
            twice = [x for x in ("path", "label", "split") if columns.count(x) > 1]
            if not {"path", "label"} <= set(columns) or twice:
                raise DatasetError(
                    f"{where}: the first line is {_shown(header)}. Expected a header "
                    "with the columns path and label, and optionally split, each once "
                    f"and separated by {delimiter!r}."
                )
            start = reader.line_num + 1
            for row in reader:
                start = reader.line_num + 1
                if not any(row):
                    continue
                line = f"{where}, line {reader.line_num}"
                if len(row) > len(columns):
                    raise DatasetError(
                        f"{line}: found {len(row)} cells in {_shown(row)}. Expected "
                        f"{len(columns)}, as in the header; put a cell with a "
                        f"{delimiter!r} in it into double quotes."
                    )
                cells = dict(zip(columns, row, strict=False))
                file_name = cells.get("path", "").strip()
                if not file_name or "\0" in file_name or "label" not in cells:
                    raise DatasetError(
                        f"{line}: found {_shown(row)}. Expected a path and a label."
                    )
                split = clean_name(cells.get("split", ""))
                yield reader.line_num, file_name, cells["label"], split
        except UnicodeDecodeError as error:
            raise DatasetError(
                f"{where} is not a UTF-8 table: {error}. Save it as CSV UTF-8."
            ) from error
        except csv.Error as error:
            raise DatasetError(
                f"{where}, line {start}: {error}. A cell that begins with a quote goes "
                "on to the next one, also over the lines below. Close the quotes in "
                f'line {start}, and write a " between them as "".'
            ) from error


def _shown(row: list[str]) -> str:
    """Returns the first cells of a row, cut off where they are long."""
    return str([x[:40] + "…" * (len(x) > 40) for x in row[:5]] + ["…"] * (len(row) > 5))


def _clean_splits(where: str, counts: Counter[str]) -> dict[str, str]:
    """Maps the values of the split column to names of splits; says what is unusual."""
    groups: dict[str, list[str]] = defaultdict(list)
    for value, _ in counts.most_common():
        groups[value.casefold()].append(value)
    names = {value: group[0] for group in groups.values() for value in group}
    for group in groups.values():
        if len(group) > 1:
            logger.warning(
                "%s: the splits %s are taken for one, %r",
                where,
                " and ".join(map(repr, group)),
                group[0],
            )
    if counts[""]:
        names[""] = next((x for x in counts if x.casefold() == "train"), "train")
        if len(counts) > 1:
            logger.warning(
                "%s: %d rows without a split are taken for %r",
                where,
                counts[""],
                names[""],
            )
    splits = list(dict.fromkeys(names.values()))
    usual = {find_split(x, splits) for x in ("train", "test", "validation")}
    if find_split("train", splits) is None:
        raise DatasetError(
            f"{where}: found the splits {listing(list(map(repr, splits)))}. Expected "
            "one that is called train, for the images to train on."
        )
    if others := [x for x in splits if x not in usual]:
        sizes = {x: sum(counts[y] for y in names if names[y] == x) for x in others}
        logger.warning(
            "%s: splits for which nobody looks unless you name them (pp.train, "
            "pp.test, --split): %s",
            where,
            listing([f"{x!r} ({n} rows)" for x, n in sizes.items()]),
        )
    return names


def _warn_of_repeated(where: str, rows: dict[str, Rows]) -> None:
    """Warns of files that several rows name; all these rows are kept."""
    seen: dict[str, tuple[str, Labels]] = {}
    repeated = []
    for split, files in rows.items():
        for file, label in files:
            path = os.path.normpath(file)
            if path in seen:
                first_split, first_label = seen[path]
                repeated.append((path, label != first_label, split != first_split))
            else:
                seen[path] = split, label
    if repeated:
        logger.warning(
            "%s: %d rows name an image that an earlier row has: %d with another label, "
            "%d in another split, such as %s; all of them count",
            where,
            len(repeated),
            sum(other for _, other, _ in repeated),
            sum(other for _, _, other in repeated),
            printable(repeated[0][0]),
        )
