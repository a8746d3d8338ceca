"""Which images are to be looked at: those of a folder, a table or a list, one after another."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cdc_models.data.listing import DatasetError, inside, look
from cdc_models.data.tables import COLUMNS, PICTURES, TABLES, csv_rows, parquet_rows
from cdc_models.data.tar_shards import expand_braces

__all__ = ["image_paths"]


def image_paths(source: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Iterator[str]:
    """Paths of unlabelled images, always in the same order, without ever holding all of them.

    - a folder: every file below it, folders and files by name; a dot in front hides a name. What is no image is
      found out when it is read, as is a folder that may not be looked into.
    - a .txt file: a path a line; relative ones start at `root`, by default where the program was started.
    - a .csv, .tsv or .parquet file: its column "path" (or "file", "image", ...); relative paths start at `root`, by
      default the file's folder, and none may leave it.
    - a .tar file, or a pattern of them such as "shards-{000..099}.tar": these files themselves.

    A .tar file, given so or met among the others, stands for the images within, see `TarImages`.

    Raises:
        DatasetError: for a source that is not there, cannot be read, or has no column of paths; for a table's path
            outside its root. ImportError: for Parquet without pyarrow.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("b.png", "a.png", ".hidden"):
        ...     (folder / name).touch()
        >>> [Path(path).name for path in image_paths(folder)]
        ['a.png', 'b.png']
    """
    source = Path(source)
    if source.suffix.lower() == ".tar" and not source.is_dir():
        return _of_pattern(os.fspath(source))
    if source.is_dir():
        return _below(source)
    if not source.is_file():
        raise DatasetError(f"images: {source}: there is no such folder, table or list")
    if source.suffix.lower() == ".txt":
        return _of_list(source, None if root is None else Path(root))
    if source.suffix.lower() not in TABLES:
        raise DatasetError(
            f"images: {source}: expected a folder, a .txt list, .tar files, or a table that ends in {TABLES}"
        )
    root = Path(source.parent if root is None else root)
    for _ in _of_table(source, root):  # a fault in its last row is found now, and not after hours
        pass
    return _of_table(source, root)


def _below(folder: Path) -> Iterator[str]:
    entered: set[tuple[int, int]] = set()  # a link may lead back above itself
    waiting = [str(folder)]
    while waiting:
        here = waiting.pop()
        try:
            status = os.stat(here)
        except OSError:
            yield here
            continue
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        try:
            folders, files = look(Path(here))
        except DatasetError:
            if here == str(folder):
                raise
            yield here  # which is skipped, and reported, as what it is
            continue
        yield from (os.path.join(here, name) for name in files)
        waiting += [os.path.join(here, name) for name in reversed(folders)]


def _of_pattern(pattern: str) -> Iterator[str]:
    files = [pattern] if os.path.exists(pattern) else expand_braces(pattern)
    if missing := [file for file in files if not os.path.exists(file)]:
        told = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise DatasetError(f"images: {pattern}: {len(missing)} of {len(files)} files are not there: {told}")
    return iter(files)


def _of_list(file: Path, root: Path | None) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for line in lines:
                if path := line.rstrip("\r\n"):
                    yield path if root is None else os.path.join(root, path)
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}: cannot be read as a list of paths ({error})") from error


def _of_table(file: Path, root: Path) -> Iterator[str]:
    for path in _parquet_cells(file) if file.suffix.lower() in (".parquet", ".pq") else _csv_cells(file):
        if os.path.isabs(path):
            path = os.path.relpath(path, root.absolute())
        yield os.path.join(root, inside(path, file))


def _column(headings: Sequence[str], file: Path) -> int:
    plain = [heading.strip().lower() for heading in headings]
    for name in COLUMNS["path"]:
        if plain.count(name) == 1:
            return plain.index(name)
    raise DatasetError(f'{file}: expected a column "path", got {", ".join(headings)[:300]!r}')


def _csv_cells(file: Path) -> Iterator[str]:
    place: int | None = None
    for number, row in csv_rows(file):
        if place is None:
            headless = row[0].lower().endswith(PICTURES)
            place = 0 if headless else _column(row, file)
            if not headless:
                continue
        if len(row) <= place:
            raise DatasetError(f"{file}, row {number}: expected a path in column {place + 1}")
        yield row[place]


def _parquet_cells(file: Path) -> Iterator[str]:
    for (path,) in parquet_rows(file, lambda headings: [_column(headings, file)]):
        yield path
