"""Second-order optimisation as functions: curvature of a loss, and optax transformations that use it."""

from . import observe
from .blocks import param_names
from .curvature import Curvature, curvature
from .errors import CurvatureError
from .kfac import ClipByKlState, clip_by_kl, kfac
from .logical import from_logical, to_logical
from .operators import SHARING
from .precondition import ScaleByKfacState, factors, find_state, scale_by_kfac
from .statistics import Statistics, accumulate

__all__ = [
  'SHARING',
  'ClipByKlState',
  'Curvature',
  'CurvatureError',
  'ScaleByKfacState',
  'Statistics',
  'accumulate',
  'clip_by_kl',
  'curvature',
  'factors',
  'find_state',
  'from_logical',
  'kfac',
  'observe',
  'param_names',
  'scale_by_kfac',
  'to_logical',
]
