"""The error that `kron` raises: its message says in one line what is wrong, where, and what to change."""


class CurvatureError(ValueError):
  """Reports a loss, a parameter or a setting that `kron` cannot treat as requested.

  Its message is one line that says what is wrong, where, and what to change.
  """
