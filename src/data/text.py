"""Text files that people bring: UTF-8, with or without a byte order mark."""

from __future__ import annotations

import csv
from pathlib import Path

from .errors import DataError
from .folders import shown
from .limits import read_file


def read_lines(path: str | Path) -> list[tuple[int, str]]:
  """Returns the number, from 1, and the text of every line of the file `path` that is not blank.

  Only a line feed ends a line, with or without a carriage return before it: other characters that Unicode calls line
  ends (U+2028, U+0085) may stand in a name. A byte order mark is dropped at the start of any line, because files that
  are joined keep theirs.

  Raises:
    DataError: the file cannot be read, or a line is not UTF-8.
  """
  lines = []
  for number, line in enumerate(_bytes(path).split(b'\n'), 1):
    try:
      text = line.removesuffix(b'\r').decode()
    except UnicodeDecodeError as error:
      byte = line[error.start]
      raise DataError(
        f'{shown(path)}, line {number}: byte {byte:#04x} is not UTF-8; save the file as UTF-8 (by iconv, or in an editor)'
      ) from error
    text = text.removeprefix('\ufeff')
    if text.strip():
      lines.append((number, text))
  return lines


def read_table(path: str | Path) -> list[dict[str, str]]:
  """Returns the rows of the CSV file `path`, which has a header, each as text by column.

  Raises:
    DataError: the file cannot be read, is empty, is not UTF-8, is not a CSV file, has a column twice, or has a row with
      more or fewer fields than the header.
  """
  try:
    head, *rows = csv.reader([f'{text}\n' for _, text in read_lines(path)], strict=True, skipinitialspace=True)
  except csv.Error as error:
    raise DataError(f'{shown(path)}: is not a CSV file: {error}') from error
  except ValueError as error:
    raise DataError(f'{shown(path)}: is empty') from error
  names = [name.strip() for name in head]
  if len(set(names)) < len(names):
    raise DataError(f'{shown(path)}: its first line has a column twice: {", ".join(names)}')
  for number, row in enumerate(rows, 1):
    if len(row) != len(names):
      what = 'more' if len(row) > len(names) else 'fewer'
      raise DataError(
        f'{shown(path)}: row {number} has {what} fields than the header; put quotes around names with commas'
      )
  return [dict(zip(names, (field.strip() for field in row), strict=True)) for row in rows]


def _bytes(path: str | Path) -> bytes:
  raw = read_file(path)
  if raw.startswith(b'\x1f\x8b'):
    raise DataError(f'{shown(path)}: is packed by gzip; unpack it')
  if raw.startswith((b'\xff\xfe', b'\xfe\xff')):
    raise DataError(f'{shown(path)}, line 1: is UTF-16, not UTF-8; save the file as UTF-8 (by iconv, or in an editor)')
  if b'\0' in raw[:1000]:
    raise DataError(f'{shown(path)}: has zero bytes, as UTF-16 has; save the file as UTF-8 (by iconv, or in an editor)')
  return raw
