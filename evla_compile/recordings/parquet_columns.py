"""Columns of parquet files as untrusted input: their types are checked and their rows limited; no torch.

Shape legend: N rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evla_compile.errors import CalibrationError
from evla_compile.recordings.recording import import_extra, some_of

MOST_ROWS = 10_000_000
"""Rows of the largest file that is read."""

_BATCH = 16  # encoded images that are in memory at a time


def whole_numbers(file: Path, *names: str) -> list[NDArray[np.int64]]:
    """Return columns of whole numbers, int64 [N] each.

    Raises:
        CalibrationError: the file cannot be read, or a column is missing, empty in places or of another type.
    """
    pyarrow = _pyarrow()
    with _table(file) as table:
        columns = _columns(file, table, names, pyarrow.types.is_integer, "whole numbers")
        return [column.to_numpy().astype(np.int64) for column in columns]


def real_numbers(file: Path, *names: str) -> list[NDArray[np.float64]]:
    """Return columns of finite numbers, float64 [N] each.

    Raises:
        CalibrationError: see `whole_numbers`, or a number is not finite.
    """
    pyarrow = _pyarrow()
    with _table(file) as table:
        columns = _columns(file, table, names, pyarrow.types.is_floating, "numbers")
        found = [column.to_numpy().astype(np.float64) for column in columns]
    for name, numbers in zip(names, found, strict=True):
        if not np.isfinite(numbers).all():
            raise CalibrationError(f"{file}: column {name!r} has numbers that are not finite")
    return found


def texts(file: Path, names: Sequence[str]) -> list[str]:
    """Return the column of texts of the first name that the file has, or its only column of texts, N of them.

    Raises:
        CalibrationError: the file cannot be read, or it has no such column.
    """
    pyarrow = _pyarrow()

    def is_text(kind: Any) -> bool:
        return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))

    with _table(file) as table:
        found = [field.name for field in table.schema_arrow if is_text(field.type)]
        name = next((name for name in names if name in found), found[0] if len(found) == 1 else None)
        if name is None:
            raise CalibrationError(
                f"{file} has the columns {some_of(table.schema_arrow.names)}: expected texts in {some_of(list(names))}"
            )
        (column,) = _columns(file, table, (name,), is_text, "texts")
        return [str(value) for value in column.to_pylist()]


def cells(file: Path, name: str, rows: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    """Yield the values of a column of structs in some rows; other row groups are not read.

    Args:
        file: the file.
        name: the column.
        rows: ascending row numbers, int64 [n].

    Raises:
        CalibrationError: the file cannot be read, or the column is missing, empty in places or of another type.
    """
    pyarrow = _pyarrow()
    with _table(file) as table:
        _check_column(file, table, name, pyarrow.types.is_struct, "encoded images (struct of bytes and path)")
        first = found = 0
        for group in range(table.metadata.num_row_groups):
            last = first + table.metadata.row_group(group).num_rows
            if ((rows >= first) & (rows < last)).any():
                for batch in table.iter_batches(batch_size=_BATCH, row_groups=[group], columns=[name]):
                    column = batch.column(name)
                    for row in rows[(rows >= first) & (rows < first + len(column))] - first:
                        yield column[int(row)].as_py() or {}
                        found += 1
                    first += len(column)
            first = last
        if found != len(rows):
            raise CalibrationError(f"{file}: column {name!r} has values missing: download the dataset again")


def _pyarrow() -> Any:
    import_extra("pyarrow.parquet", "datasets", "a LeRobotDataset")
    return import_extra("pyarrow", "datasets", "a LeRobotDataset")


@contextmanager
def _table(file: Path) -> Iterator[Any]:
    pyarrow = _pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if table.metadata.num_rows > MOST_ROWS:
                raise CalibrationError(f"{file} has {table.metadata.num_rows:,} rows: expected {MOST_ROWS:,} at most")
            yield table
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise CalibrationError(
            f"{file} cannot be read ({error!s:.200}): expected a parquet file; download the whole dataset"
        ) from error


def _columns(file: Path, table: Any, names: Sequence[str], is_right: Any, expected: str) -> list[Any]:
    for name in names:
        _check_column(file, table, name, is_right, expected)
    found = table.read(columns=list(names))
    columns = [found.column(name) for name in names]
    for name, column in zip(names, columns, strict=True):
        if len(column) != table.metadata.num_rows:
            raise CalibrationError(
                f"{file}: column {name!r} has {len(column)} values, expected {table.metadata.num_rows}; download the"
                " dataset again"
            )
        if column.null_count:
            raise CalibrationError(f"{file}: column {name!r} is empty in {column.null_count} rows: expected {expected}")
    return columns


def _check_column(file: Path, table: Any, name: str, is_right: Any, expected: str) -> None:
    present = table.schema_arrow.names
    if present.count(name) != 1:
        raise CalibrationError(f"{file} has the columns {some_of(present)}: expected {name!r} once, with {expected}")
    kind = table.schema_arrow.field(name).type
    if not is_right(kind):
        raise CalibrationError(f"{file}: column {name!r} has type {str(kind)[:80]}: expected {expected}")
