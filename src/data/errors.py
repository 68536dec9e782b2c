"""The error of data that cannot be used."""


class DataError(ValueError):
  """Data that are missing or cannot be used as they are; one line that says what, where, and what to change."""
