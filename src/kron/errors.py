"""The error a user of `kron` can meet: one line that says what is wrong, where, and what to change."""


class CurvatureError(ValueError):
  """A loss, a parameter or a setting that `kron` cannot treat as asked."""
