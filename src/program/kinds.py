"""Names of operations, grouped by their effect on entries."""

CASTS = ('convert_element_type', 'reduce_precision', 'copy', 'copy_p', 'optimization_barrier', 'sharding_constraint',
          'pvary', 'pcast', 'mesh_cast', 'reshard', 'kron_used')  # fmt: skip
# fmt: off
ENTRYWISE = frozenset((
  'abs', 'add', 'add_any', 'asin', 'asinh', 'atan', 'atan2', 'atanh', 'acos', 'acosh', 'cbrt', 'ceil', 'clamp', 'copy',
  'cos', 'cosh', 'convert_element_type', 'digamma', 'div', 'eq', 'erf', 'erf_inv', 'erfc', 'exp', 'exp2', 'expm1', 'floor',
  'ge', 'gt', 'imag', 'integer_pow', 'is_finite', 'le', 'lgamma', 'log', 'log1p', 'logistic', 'lt', 'max', 'min', 'mul',
  'ne', 'neg', 'nextafter', 'not', 'and', 'or', 'xor', 'pow', 'real', 'rem', 'round', 'rsqrt', 'select_n', 'sign', 'sin',
  'sinh', 'sqrt', 'square', 'sub', 'tan', 'tanh',
))
# fmt: on
