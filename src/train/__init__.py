"""The trainer: a config becomes a run, which trains, is checkpointed, watched and compared."""

from ..extras import need

need('train', 'flax', 'absl', 'ml_collections', 'orbax', 'tensorflow_datasets', 'grain', 'einops')
need('train', 'tqdm', 'jinja2', 'sklearn', 'tensorboardX')
