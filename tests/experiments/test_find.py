"""Search by example: cuts where they are, the like first, files kept and left out, and what the commands say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments.configs import moving_fashion_mnist
from kronmesh import data
from kronmesh.data.shots import shots
from kronmesh.tasks.video import retrieval, trec
from kronmesh.train.build import build
from kronmesh.train.errors import ConfigError
from kronmesh.train.loop import train
from tests import commands
from tests.data.films import sound
from tests.data.idx import write_idx

ROOT = Path(__file__).parents[2]
COLOURS = {'red': (200, 30, 30), 'green': (30, 180, 40), 'blue': (20, 40, 220), 'white': (230, 230, 230)}


def patch(name, frames, size=64, seed=0):
  """A shot: a square of a colour on another place in every shot, which moves, on grey with texture."""
  rng = np.random.default_rng(seed)
  ground = rng.integers(60, 120, (size, size, 1)).repeat(3, 2)
  left, made = int(rng.integers(8, size - 44)), []
  for k in range(frames):
    frame = ground.copy()
    at = left + round(6 * np.sin(k / 4))
    frame[10:54, at : at + 36] = COLOURS[name]
    made.append(frame.astype(np.uint8))
  return made


@pytest.fixture(scope='module')
def films(tmp_path_factory):
  """Three films of four shots each, of ten frames and more, one file that is none, and one of sound."""
  folder = tmp_path_factory.mktemp('films')
  (folder / 'deep').mkdir()
  for number, name in enumerate(('a.mp4', 'b.mp4', 'deep/c.mp4')):
    order = np.roll(list(COLOURS), number)
    frames = [f for i, colour in enumerate(order) for f in patch(colour, 10 + number, seed=(number, i))]
    data.write_video(folder / name, frames, rate=5.0)
  (folder / 'notes.txt').write_text('no film')
  sound(folder / 'talk.wav')
  data.write_video(folder / '.hidden.mp4', patch('red', 4), rate=5.0)
  return folder


@pytest.mark.parametrize('lengths', [(12, 9, 20), (30,), (5, 5, 5, 5)])
def test_shots_are_cut_where_they_are(lengths):
  frames = [f for i, n in enumerate(lengths) for f in patch(list(COLOURS)[i % 4], n, seed=i)]
  found = list(shots(iter(frames), 5.0))
  assert [s.first for s in found] == [0, *np.cumsum(lengths)[:-1]]
  assert [len(s.frames) for s in found] == list(lengths)
  np.testing.assert_array_equal(np.concatenate([s.frames for s in found]), frames)


def test_long_shots_are_ended_and_nothing_is_lost():
  frames = patch('red', 47) + patch('blue', 30, seed=1)
  found = list(shots(iter(frames), 5.0, longest=4.0))
  assert [s.first for s in found] == [0, 20, 40, 47, 67]
  np.testing.assert_array_equal(np.concatenate([s.frames for s in found]), frames)


def test_a_library_is_made_once(films, tmp_path):
  said = []
  embedding = retrieval.layout()
  entries, skipped = retrieval.library(films, embedding, tmp_path, 2.0, said.append)
  assert [e.film for e in entries] == ['a.mp4'] * 4 + ['b.mp4'] * 4 + ['deep/c.mp4'] * 4
  assert [round(e.begins, 3) for e in entries[:4]] == [0, 2, 4, 6] and entries[3].ends == 8.0
  assert len(skipped) == 2 and any('notes.txt' in s for s in skipped) and any('talk.wav' in s for s in skipped)
  assert len(said) == 3 and all(abs(np.linalg.norm(e.vector) - 1) < 1e-6 and len(e.thumbs) == 3 for e in entries)

  said.clear()
  again, _ = retrieval.library(films, embedding, tmp_path, 2.0, said.append)
  assert said == []
  for one, other in zip(entries, again, strict=True):
    np.testing.assert_array_equal(one.vector, other.vector)
  for other in ((embedding._replace(mark='another network'), 2.0), (embedding, 3.0)):
    said.clear()
    retrieval.library(films, other[0], tmp_path, other[1], said.append)
    assert len(said) == 3  # all films anew
  record = next(p for p in tmp_path.iterdir() if json.loads(p.read_text())[0]['begins'] == 0)
  record.write_text(record.read_text()[:100])  # half written
  repaired, _ = retrieval.library(films, embedding, tmp_path, 2.0, said.append)
  assert [e[:3] for e in repaired] == [e[:3] for e in entries]


def test_the_nearest_are_the_nearest():
  rng = np.random.default_rng(0)
  vectors, query = (retrieval.unit(rng.normal(0, 1, (n, 16)).astype(np.float32)) for n in (200, 7))
  cosines, rows = retrieval.nearest(vectors, query, 10)
  expected = np.argsort(-(query @ vectors.T), 1)[:, :10]
  np.testing.assert_array_equal(rows, expected)
  np.testing.assert_allclose(cosines, np.take_along_axis(query @ vectors.T, expected, 1), rtol=1e-5)
  assert retrieval.nearest(vectors[:3], query, 10)[1].shape == (7, 3)


def test_an_index_of_many_is_nearly_exact(monkeypatch):
  monkeypatch.setattr(retrieval, '_MANY', 100)
  rng = np.random.default_rng(0)
  vectors = retrieval.unit(rng.normal(0, 1, (3000, 16)).astype(np.float32))
  _, rows = retrieval.nearest(vectors, vectors[:200], 1)
  assert (rows[:, 0] == np.arange(200)).mean() > 0.95


def command(*args):
  return commands.run(*args)


@pytest.mark.long
def test_the_command_finds_the_same_colour_and_leaves_a_page(films, tmp_path):
  found = command('scripts/find.py', f'--videos={films}', f'--example={films}/b.mp4', '--at=3', f'--workdir={tmp_path}')
  assert found.returncode == 0, found.stderr
  lines = found.stdout.splitlines()
  hits = [line.split() for line in lines if re.match(r' +\d+ ', line)]
  # b's second shot is red, as a's first and c's third. The example itself is not shown.
  assert {h[2] for h in hits[:2]} == {'a.mp4', 'deep/c.mp4'} and all(0 < float(h[1]) <= 1 for h in hits)
  assert {h[3] for h in hits[:2]} == {'0:00.0', '0:04.8'} and ('b.mp4', '0:02.2') not in {(h[2], h[3]) for h in hits}
  assert '12 shots of 3 files, 2 files left out' in found.stdout
  page = (tmp_path / 'found.html').read_text()
  assert page.count('data:image/jpeg') == 3 + 3 * len(hits) and 'notes.txt' in page
  assert 'by the colours of the middle frame alone' in page
  assert trec.read_run(tmp_path / 'run.txt')['example'][0] == 'b.mp4#2.2'


@pytest.mark.parametrize(
  ('args', 'words'),
  [
    (('--videos=/nowhere', '--example=x.mp4'), '--videos=/nowhere: no such folder'),
    (('--videos={films}', '--example=/nowhere.mp4'), '--example=/nowhere.mp4: no such file'),
    (('--videos={films}', '--example={films}/a.mp4', '--at=99'), 'a.mp4 ends at 8.0 s'),
    (('--videos={films}', '--example={films}/notes.txt'), 'notes.txt: cannot be decoded'),
    (('--videos={films}', '--example={films}/a.mp4', '--run=/nowhere'), 'no export in /nowhere/export'),
    (('--videos={films}', '--example={films}/a.mp4', 'more'), "'more' is not a flag"),
  ],
)
@pytest.mark.long
def test_what_is_wrong_is_one_line(films, tmp_path, args, words):
  found = command('scripts/find.py', *(a.format(films=films) for a in args), f'--workdir={tmp_path}')
  assert found.returncode == 2 and words in found.stderr and found.stderr.count('\n') == 1


@pytest.mark.long
def test_a_network_finds_motions_and_its_runs_are_scored(moving_folder, films, tmp_path):
  """What the network has before its logits, in the form of TREC; a few steps are no good network."""
  config = moving_fashion_mnist.get_config()
  config.update({'steps': 3, 'eval_every': 3})
  config.data.update({'folder': moving_folder, 'batch_size': 64, 'eval_examples': 64, 'eval_batch_size': 64})
  train(config, tmp_path / 'run', quiet=True, run=build(config))
  embedding = retrieval.network(tmp_path / 'run')
  clip = np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3)).astype(np.uint8)
  vectors = embedding.of([clip, clip[::-1]])
  assert embedding.frames == 8 and vectors.shape == (2, 32) and np.abs(vectors[0] - vectors[1]).max() > 1e-4
  write_idx(tmp_path / 'idx', packed=True, train=20, test=20, plain=True)
  options = [f'--run={tmp_path}/run', f'--source={tmp_path}/idx', '--films=4', f'--workdir={tmp_path}/found']
  done = command('scripts/retrieval.py', *options)
  assert done.returncode == 0, done.stderr
  told = json.loads((tmp_path / 'found/retrieval.json').read_text())
  assert set(told) == {'network', 'colours', 'chance', 'cuts', 'judged'} and told['cuts'][0] > 0.8
  for judged, column in (('judgements', 1), ('sampled', 2)):
    files = [f'--run_file={tmp_path}/found/network.run', f'--judgements={tmp_path}/found/{judged}.txt']
    done = command('scripts/score_run.py', *files)
    assert done.returncode == 0, done.stderr
    mean = float(done.stdout.splitlines()[-1].split()[column])
    assert mean == pytest.approx(list(told['network'].values())[column - 1], abs=1e-4)
  done = command('scripts/score_run.py', f'--run_file={tmp_path}/found/nothing.run', files[1])
  assert done.returncode == 2 and done.stderr.startswith('error: ') and done.stderr.count('\n') == 1


def test_a_network_of_images_is_refused(tmp_path, monkeypatch):
  about = {'config': json.loads(moving_fashion_mnist.get_config().to_json()), 'step': 1, 'example': [28, 28, 1]}
  monkeypatch.setattr(retrieval, 'load_export', lambda folder: ({}, about))
  with pytest.raises(ConfigError, match=r'sees examples of \(28, 28, 1\), not clips'):
    retrieval.network(tmp_path)
