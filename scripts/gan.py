"""Scores a generator's images: agreement, distance, and a classifier trained on them alone.

python scripts/gan.py --run=runs/gan --judge=runs/judge --out=docs/gan

- agreement: the share of images to which the judge, a classifier trained on real images, gives the requested class. -
Frechet distance in the judge's features, between equal numbers of generated and real test images. It is not FID, whose
  network is another. The training images' distance is shown beside it as a lower limit to hope for.
- CAS (Ravuri and Vinyals 2019, arXiv:1905.10887): the accuracy on real test images of a classifier trained on generated
  images, beside that of the same classifier trained on real images.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kronmesh.train.runtime import launch  # isort: skip  (sets the environment before JAX loads)

import jax
from absl import flags
from PIL import Image

from kronmesh import data, files
from kronmesh.tasks.gan import generated
from kronmesh.tasks.gan.judge import frechet, in_batches, read_judge
from kronmesh.train import jsonfile
from kronmesh.train.reporting.tables import columns
from scripts import few_labels

RUN = flags.DEFINE_string('run', None, 'Work folder of a finished run of two players.', required=True)
JUDGE = flags.DEFINE_string('judge', None, 'Work folder of a finished classifier.', required=True)
OUT = flags.DEFINE_string('out', 'runs/gan_scores', 'Folder for scores.json, scores.txt and samples.png.')
COUNT = flags.DEFINE_integer('count', 10000, 'How many images are made.', lower_bound=100)
STEPS = flags.DEFINE_integer('steps', 600, 'Of the classifiers of CAS.', lower_bound=1)

_WIDTH = 800  # pixels at least of the picture of samples


def measure() -> None:
  generator, judge = generated.read_generator(RUN.value), read_judge(JUDGE.value)
  settings = generator.config.data
  real = {
    s: data.load_arrays(settings.name, s, folder=settings.folder, source=settings.source) for s in ('train', 'test')
  }
  made = generated.images(generator, COUNT.value, seed=0)
  agreement = float((in_batches(judge.logits, made.inputs).argmax(-1) == made.label).mean())
  on_test = float((in_batches(judge.logits, real['test'].inputs).argmax(-1) == real['test'].label).mean())
  features = {k: in_batches(judge.features, x.inputs[: COUNT.value]) for k, x in {**real, 'made': made}.items()}
  away = {k: frechet(features[k], features['test']) for k in ('made', 'train')}
  with tempfile.TemporaryDirectory() as folder:
    scores = {
      name: few_labels.classified(arrays, real['test'], Path(folder) / name, STEPS.value)
      for name, arrays in (('made', made), ('real', data.Arrays(*(x[: COUNT.value] for x in real['train']))))
    }
  rows = [
    [f'agreement with {judge.name}', f'{agreement:.3f}', f'real test images: {on_test:.3f}'],
    [f'Frechet distance, features of {judge.name}', f'{away["made"]:.2f}', f'training images: {away["train"]:.2f}'],
    ['CAS: trained on generated alone', f'{scores["made"]:.3f}', f'on as many real ones: {scores["real"]:.3f}'],
  ]
  table = columns(['', 'generated', 'beside'], rows)
  print(table)
  out = Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  results = {'agreement': agreement, 'judge on test': on_test, 'frechet': away, 'cas': scores, 'step': generator.step}
  files.write(out / 'scores.json', jsonfile.dumps({**results, 'device': jax.devices()[0].device_kind}, indent=1) + '\n')
  files.write(out / 'scores.txt', f'{COUNT.value} images after {generator.step} steps\n\n{table}\n')
  with files.replacing(out / 'samples.png') as file:
    sheet = Image.fromarray(generated.sheet(generator))
    scale = -(-_WIDTH // sheet.width)
    sheet.resize((scale * sheet.width, scale * sheet.height), Image.Resampling.NEAREST).save(file, 'PNG')


if __name__ == '__main__':
  launch.command(measure, '--run=...')
