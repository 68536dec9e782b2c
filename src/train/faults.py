"""Faults: steps whose loss, gradient or batch is not finite, or whose loss is a spike.

The device has kept the state from before the step (`guard.py`), so that the step can be examined exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import kron, parallel
from .beginning import new_state
from .checkpoints import restore, set_aside
from .errors import Diverged
from .run import Run
from .steps import TrainState
from .watchers import Watchers


class Fault(NamedTuple):
  """A step that was not taken.

  step: its number, counted from 1. kind: 'not_finite' or 'spike'. why: the reason in words, with the layer.
  """

  step: int
  kind: str
  why: str


def find(run: Run, state: TrainState, batch: Any, row: dict[str, Any], before: Sequence[dict[str, Any]]) -> Fault:
  """Finds out what was wrong with a step.

  Args:
    state: the state that the device holds.
    batch: the step's batch.
    row: the step's metrics.
    before: the metrics of sound steps before it.
  """
  step, loss = int(state.step) + 1, float(row['loss'])
  kind = 'not_finite'
  if not row['finite_input']:
    why = 'the batch holds values that are not finite; mend the data set'
  elif np.isfinite(loss) and np.isfinite(row['gradient_norms']).all():
    kind, why = (
      'spike',
      f'the loss is {loss:.4g}, far above its mean {float(state.guard.mean):.4g}; {_grown(run, row, before)}',
    )
  else:
    what = f'the loss is {loss}' if not np.isfinite(loss) else 'the gradient is not finite'
    why = f'{what}; {_first_not_finite(run, state, batch, row)}; lower the learning rate or raise the damping'
  return Fault(step, kind, why)


def _names(run: Run) -> list[str]:
  return kron.param_names(run.shardings.params)


def _grown(run: Run, row: dict[str, Any], before: Sequence[dict[str, Any]]) -> str:
  """Names the layer whose gradient has grown most."""
  now = np.asarray(row['gradient_norms'])
  usual = np.median([r['gradient_norms'] for r in before], 0) if before else np.full_like(now, np.median(now))
  growth = now / np.maximum(usual, 1e-30)
  worst = int(growth.argmax())
  return f'the gradient of {_names(run)[worst]!r} is {growth[worst]:.3g} times its usual'


def _first_not_finite(run: Run, state: TrainState, batch: Any, row: dict[str, Any]) -> str:
  """Names the first part of the computation that is not finite: a parameter, a layer's output, or its gradient."""
  names = _names(run)
  each = lambda tree: jnp.stack([~jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])  # noqa: E731
  bad = jax.jit(each, out_shardings=parallel.replicated(run.mesh))(state.params)
  if np.asarray(bad).any():
    return f'the parameter {names[int(np.asarray(bad).argmax())]!r} is not finite'
  order, outputs = _outputs(run, state, batch)
  for path in order:
    if not outputs.get(path, True):  # only the first process knows this, and reports it
      return f'the output of {path!r} is the first that is not finite'
  # The forward pass is sound. The backward pass starts at the end, so search from there.
  bad = {n for n, norm in zip(names, row['gradient_norms'], strict=True) if not np.isfinite(norm)}
  for path in reversed(order):
    below = [n for n in names if n in bad and n.startswith(f'{path}/')]
    if below:
      return f'the gradient of {below[0]!r} is the first that is not finite'
  return f'the gradient of {min(bad)!r} is not finite' if bad else 'no layer has an output that is not finite'


def _outputs(run: Run, state: TrainState, batch: Any) -> tuple[list[str], dict[str, bool]]:
  """Returns the model's layers in the order in which they finish, and whether their outputs are finite."""
  order: list[str] = []
  finite: dict[str, bool] = {}

  def note(path: str, sound: Any) -> None:
    finite[path] = finite.get(path, True) and bool(np.all(sound))

  def intercept(call, args, kwargs, context):
    out = call(*args, **kwargs)
    path = _path(context.module)
    if path and context.method_name == '__call__':
      if path not in order:
        order.append(path)
      floats = [x for x in jax.tree.leaves(out) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
      # Uses a callback, as a layer may be inside a scan, a remat or a vmap, whose values may not be kept.
      jax.debug.callback(functools.partial(note, path), jnp.stack([jnp.isfinite(x).all() for x in floats]).all())
    return out

  def forward(params: Any, model_state: Any, batch: Any) -> Any:
    with nn.intercept_methods(intercept):
      return run.task.loss(params, model_state, batch, train=True)[0]

  jax.block_until_ready(jax.jit(forward)(state.params, state.model_state, batch))
  jax.effects_barrier()
  return order, finite


def _path(module: nn.Module) -> str:
  """Returns the path of a module, as its parameters are named.

  The path of one of several networks begins with its name. A network itself has the path '', and so has a module that a
  transformation has taken out of it, since the module around it is seen too.
  """
  root = module
  while isinstance(root.parent, nn.Module):
    root = root.parent
  return '' if root.path else '/'.join(([root.name] if root.name and module.path else []) + list(module.path))


class Policy:
  """The policies of a config for faults, with a count that shows when there are too many."""

  def __init__(self, config: Any):
    self.own, self.last, self.row = config.faults, None, 0

  def count(self, fault: Fault, checkpoint: int) -> str:
    """Counts a fault and returns its policy; a rollback would lead to the step `checkpoint`.

    Raises:
      Diverged: the policy is to stop, or there were too many faults in a row. Faults are in a row if no good step lies
        between them, or if they lead back to the same checkpoint.
    """
    policy = self.own[fault.kind]
    if policy == 'stop':
      raise Diverged(f'step {fault.step}: {fault.why}')
    back = policy == 'rollback'
    self.row = self.row + 1 if self.last == (('back', checkpoint) if back else ('on', fault.step - 1)) else 1
    self.last = ('back', checkpoint) if back else ('on', fault.step)
    if self.row > self.own.limit:
      many = f'{self.row} times from the checkpoint of step {checkpoint}' if back else f'{self.row} steps in a row'
      raise Diverged(f'step {fault.step}: {fault.why} ({many}; config.faults.limit={self.own.limit})')
    return policy


def handle(
  run: Run,
  state: TrainState,
  position: int,
  good: Sequence[dict[str, Any]],
  bad: dict[str, Any],
  policy: Policy,
  watchers: Watchers,
) -> tuple[TrainState, bool]:
  """Does what the policy says about a fault.

  Args:
    state: the state that the device has held since the fault.
    position: the number of the fault's batch.
    good, bad: the metrics of the steps before the fault, and of the faulty step.

  Returns:
    The state from which to continue with the batch after the fault's. Also whether this state is one step ahead;
    otherwise it is back at a checkpoint.

  Raises:
    Diverged: the policy is to stop, or there were too many faults.
  """
  saver, events, log = watchers.saver, watchers.events, watchers.writers.log
  fault = find(run, state, next(run.train_batches(run.config.seed, position)), bad, good)
  saver.finish()
  checkpoint = saver.checkpoints.latest_step() or 0
  what = policy.count(fault, checkpoint)
  done = {
    'skip': f'step {fault.step} is left out',
    'damp': f'step {fault.step} is left out and the damping multiplied by {run.config.faults.damping_factor:g}',
    'rollback': f'back to step {checkpoint}, and on with the batches after that of step {fault.step}',
  }[what]
  events.add(
    'fault', fault.step, f'step {fault.step}: {fault.why}; {done}', fault=fault.kind, policy=what, batch=position
  )
  if what == 'rollback':
    restored = restore(run, saver.checkpoints, new_state)
    if restored.unreadable:
      set_aside(saver.checkpoints, restored.unreadable)
      events.add('warning', checkpoint, f'the checkpoints of steps {sorted(restored.unreadable)} cannot be read')
    log.drop_after(int(restored.state.step))
    return restored.state, False
  log.add([{'step': fault.step, 'fault': fault.kind}])
  factor = run.config.faults.damping_factor if what == 'damp' else 1.0
  state = jax.jit(_go_on, donate_argnums=0, out_shardings=run.shardings)(state, factor)
  if what == 'damp':
    opt_state = run.inverse_schedule.refresh(state.opt_state, fault.step, caution=state.guard.caution, everything=True)
    state = state._replace(opt_state=opt_state)
  return state, True


def _go_on(state: TrainState, factor: Any) -> TrainState:
  """Returns the state after a skipped step, with the damping multiplied by `factor` from now on."""
  guard_state = state.guard
  guard_state = guard_state._replace(held=jnp.zeros_like(guard_state.held), caution=guard_state.caution * factor)
  return state._replace(step=state.step + 1, guard=guard_state)
