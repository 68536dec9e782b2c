"""Writes golden.json's tables for the installed JAX: python -m tests.parallel.make_golden"""

import json

from tests import conftest  # isort: skip  # noqa: F401  (eight devices, the tests' compiler flags)

import jax

from tests.parallel.test_audit import GOLDEN, GOLDEN_CASES, golden

if __name__ == '__main__':
  tables = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
  version = '.'.join(jax.__version__.split('.')[:2])
  tables[version] = {f'{model} {spec}': golden(model, spec) for model, spec in GOLDEN_CASES}
  GOLDEN.write_text(json.dumps(tables, indent=1, sort_keys=True) + '\n')
