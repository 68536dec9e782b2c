"""Second-order optimisation as functions: curvature of a loss, and optax transformations that use it."""

from . import observe
from .curvature import Curvature, curvature
from .errors import CurvatureError
from .kfac import clip_by_kl, kfac
from .precondition import ScaleByKfacState, factors, find_state, scale_by_kfac
from .statistics import Statistics, accumulate

__all__ = [
  'Curvature',
  'CurvatureError',
  'ScaleByKfacState',
  'Statistics',
  'accumulate',
  'clip_by_kl',
  'curvature',
  'factors',
  'find_state',
  'kfac',
  'observe',
  'scale_by_kfac',
]
