"""The terms on the pages, explained."""

from __future__ import annotations

from markupsafe import Markup, escape

TERMS = {
  'loss': 'What training makes smaller, as a mean over the examples of a batch or of the evaluation set.',
  'error': 'The squared error of the output, which is lower if the output is better. Each task defines its own.',
  'accuracy': 'The share of examples whose most probable class is the right one.',
  'clip': "The factor by which K-FAC's step was shortened, so that it stays within kl_clip. 1 means not shortened.",
  'damping': 'A number added to the diagonal of the curvature before it is inverted. More damping makes smaller steps.',
  'damping A': 'The damping of factor A of a layer. A is the covariance of the inputs of the layer.',
  'damping G': 'The damping of factor G of a layer. G is the covariance of the gradients at the outputs of the layer.',
  'condition': 'The largest eigenvalue of a damped factor over its smallest. Above about 1e6 an inverse in float32 has few '
  'correct digits: raise the damping.',
  'learning rate': 'The factor by which the optimiser multiplies each step.',
  'examples a second': 'The examples that were trained on in a second, without compilation, evaluation and checkpoints.',
  'gradient norm': 'The length of the gradient of a parameter.',
  'update norm': 'The length of the change of a parameter in one step. A layer far above the others will diverge first.',
  'refresh interval': 'The number of steps after which the inverses of a layer are computed anew.',
  'loss scale': 'The factor by which the loss is multiplied, so that small gradients do not vanish in float16.',
  'MFU': 'Model flops utilisation: the flops of a plain gradient as XLA counts them, over the peak of the devices.',
  'coverage': 'Which parameters K-FAC has curvature for, and how exact it is. Gradient descent updates the others.',
  'compilation': 'What a run does once: JAX traces programs, XLA compiles them, and the flops of a step are counted.',
  'peak memory': 'The most memory that was in use so far: of the process on the host, and of the fullest device if JAX '
  'reports it.',
}
_OTHERS = {
  'condition A': 'condition',
  'condition G': 'condition',
  'peak memory (GB)': 'peak memory',
  'best damping': 'damping',
}


def explained(words: str) -> Markup:
  """Returns words with the explanation of the first term that they contain, which a pointer or a tap shows."""
  name = _OTHERS.get(words, words)
  if name not in TERMS:
    name = next((term for term in sorted(TERMS, key=len, reverse=True) if _has(words, term)), '')
  if name not in TERMS:
    return escape(words)
  return Markup('<abbr class="term" tabindex="0" title="{}">{}</abbr>').format(TERMS[name], words)


def _has(words: str, term: str) -> bool:
  return f' {term} ' in f' {words.replace(",", " ").replace("(", " ").replace(")", " ")} '
