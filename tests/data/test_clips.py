"""Sets of videos in their authors' layouts, prepared, and the clips cut from them."""

import json

import numpy as np
import pytest
from PIL import Image

from kronmesh import data
from kronmesh.data.bands import Crop, strip, to_bands
from kronmesh.data.clips import SKIPPED, coloured, middle_crop, places, random_crop
from kronmesh.data.layouts import LayoutError, find
from kronmesh.data.video import from_jpeg
from tests.data.films import film, number_of, sound


def written(root, *names):
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()


def found(name, root):
  return [(str(e.path.relative_to(root)), e.split, e.label, e.spans) for e in find(name, root)]


def test_ucf101(tmp_path):
  a, b, c = 'v_Archery_g01_c01.avi', 'v_YoYo_g08_c02.avi', 'v_YoYo_g09_c01.avi'
  written(tmp_path, f'UCF-101/Archery/{a}', f'UCF-101/YoYo/{b}', f'UCF-101/YoYo/{c}')
  lists = tmp_path / 'ucfTrainTestlist'
  lists.mkdir()
  (lists / 'trainlist01.txt').write_text(f'Archery/{a} 3\nYoYo/{c} 101\n')
  (lists / 'testlist01.txt').write_text(f'YoYo/{b}\r\n\n')
  expected = [(f'UCF-101/Archery/{a}', 'train', 'Archery', ()), (f'UCF-101/YoYo/{c}', 'train', 'YoYo', ())]
  expected.append((f'UCF-101/YoYo/{b}', 'test', 'YoYo', ()))
  assert found('ucf101', tmp_path) == expected
  (lists / 'testlist01.txt').unlink()
  with pytest.raises(LayoutError, match=r'testlist01\.txt is missing'):
    find('ucf101', tmp_path)


def test_kinetics(tmp_path):
  """By folders of classes, and by tables."""
  one, two, gone = '-3B32lodo2M_000059_000069.mp4', 'abcdefghijk_000001_000011.mp4', 'zzzzzzzzzzz'
  written(tmp_path, f'train/playing_chess/{one}', f'train/making_a_cake,_slowly/{two}', f'val/{two}')
  header = 'label,youtube_id,time_start,time_end,split\n'
  (tmp_path / 'val.csv').write_text(f'{header}"making a cake, slowly",abcdefghijk,1,11,val\nyoga,{gone},0,10,val\n')
  expected = [
    (f'train/making_a_cake,_slowly/{two}', 'train', 'making a cake, slowly', ()),
    (f'train/playing_chess/{one}', 'train', 'playing chess', ()),
    (f'val/{two}', 'test', 'making a cake, slowly', ()),
  ]
  assert found('kinetics', tmp_path) == expected


def test_ucf_crime(tmp_path):
  written(tmp_path, 'Anomaly-Videos-Part-1/Abuse/Abuse001_x264.mp4', *(f'Abuse/Abuse0{n}_x264.mp4' for n in (28, 30)))
  (tmp_path / 'Anomaly_Train.txt').write_text(
    'Abuse/Abuse001_x264.mp4\nTraining_Normal_Videos_Anomaly/Normal_Videos001_x264.mp4\n'
  )
  (tmp_path / 'Anomaly_Test.txt').write_text('Abuse/Abuse028_x264.mp4\nAbuse/Abuse030_x264.mp4\n')
  (tmp_path / 'Temporal_Anomaly_Annotation_for_Testing_Videos.txt').write_text(
    'Abuse028_x264.mp4  Abuse  165  240  -1  -1\nAbuse030_x264.mp4  Abuse  165  240  300  310\n'
    'Normal_Videos_003_x264.mp4  Normal  -1  -1  -1  -1\n'
  )
  expected = [
    ('Anomaly-Videos-Part-1/Abuse/Abuse001_x264.mp4', 'train', 'Abuse', ()),
    ('Training_Normal_Videos_Anomaly/Normal_Videos001_x264.mp4', 'train', 'Normal', ()),
    ('Abuse/Abuse028_x264.mp4', 'test', 'Abuse', ((165, 240),)),
    ('Abuse/Abuse030_x264.mp4', 'test', 'Abuse', ((165, 240), (300, 310))),
  ]
  assert found('ucf_crime', tmp_path) == expected


def test_dad(tmp_path):
  for split in ('training', 'testing'):
    written(tmp_path, f'videos/{split}/positive/000001.mp4', f'videos/{split}/negative/000001.mp4')
  entries = found('dad', tmp_path)
  assert [e[1:] for e in entries] == [
    (s, *rest) for s in ('train', 'test') for rest in (('normal', ()), ('accident', ((90, 100),)))
  ]


def test_ccd(tmp_path):
  written(tmp_path, *(f'videos/Normal/{i:06}.mp4' for i in range(1, 6)), 'videos/Crash-1500/000001.mp4')
  marks = [0] * 30 + [1] * 20
  (tmp_path / 'Crash-1500.txt').write_text(f'000001,{marks},285,-6Fd5bs2w5Y,Day,Normal,Yes\n')
  entries = found('ccd', tmp_path)
  assert [e[1] for e in entries] == ['train'] * 4 + ['test', 'train']
  assert entries[-1][2:] == ('accident', ((30, 50),)) and entries[0][2:] == ('normal', ())
  (tmp_path / 'Crash-1500.txt').write_text('000001;0;1\n')
  with pytest.raises(LayoutError, match='is not like'):
    find('ccd', tmp_path)


def test_what_is_no_layout(tmp_path):
  for name, root, words in [
    ('hmdb', tmp_path, "'hmdb' is not a layout"),
    ('video_folder', tmp_path / 'nowhere', 'name your copy by --config.data.source'),
    ('video_folder', tmp_path, 'no videos in'),
    ('dad', tmp_path, 'no videos/training/negative nor'),
  ]:
    with pytest.raises(LayoutError, match=words):
      find(name, root)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """A folder with videos of two classes, two of them damaged, and the set made of it."""
  root = tmp_path_factory.mktemp('films')
  for split, count in (('train', 6), ('test', 3)):
    for label in ('bar', 'other bar'):
      (root / 'own' / split / label).mkdir(parents=True)
      for i in range(count):
        film(root / 'own' / split / label / f'{i}.mp4', count=20 + i)
  (root / 'own/train/bar/0.mp4').write_bytes(b'nothing')
  sound(root / 'sound.wav').rename(root / 'own/train/bar/9.mp4')
  return root, data.prepared('video_folder', str(root / 'own'), root / 'data', rate=10, short_side=32)


@pytest.mark.long
def test_prepared_once_and_what_cannot_be_decoded_is_counted(prepared):
  root, builder = prepared
  train, test = builder.as_data_source('train'), builder.as_data_source('test')
  assert (len(train), len(test)) == (11, 6) and builder.info.features['label'].num_classes == 2
  skipped = json.loads((builder.data_path / SKIPPED).read_text())
  assert len(skipped) == 2 and 'bar/0.mp4' in skipped[0] and 'only audio' in skipped[1]
  assert builder.files == 19
  for example in train:
    shapes = {from_jpeg(f).shape for f in example['frames']}
    count = 20 + int(example['name'][-5:-4])
    assert shapes == {(32, 43, 3)} and [number_of(from_jpeg(f)) for f in example['frames']] == list(range(count))
  again = data.prepared('video_folder', '', root / 'data', rate=10, short_side=32)  # from the records alone
  assert len(again.as_data_source('train')) == 11


def test_a_split_of_which_nothing_can_be_decoded(tmp_path):
  for split in ('train', 'test'):
    (tmp_path / split / 'a').mkdir(parents=True)
  film(tmp_path / 'train/a/0.mp4')
  (tmp_path / 'test/a/0.mp4').write_bytes(b'')
  with pytest.raises(data.VideoError, match=r'no video of a split can be decoded; the first: .*0\.mp4'):
    data.prepared('video_folder', str(tmp_path), tmp_path / 'data', rate=10, short_side=32)


def test_spans_become_seconds(tmp_path):
  written(tmp_path, *(f'videos/{s}/{k}/.keep' for s in ('training', 'testing') for k in ('positive', 'negative')))
  for split in ('training', 'testing'):
    for kind in ('positive', 'negative'):
      film(tmp_path / f'videos/{split}/{kind}/000001.mp4', count=100, rate=20)
  builder = data.prepared('dad', str(tmp_path), tmp_path / 'data', rate=5, short_side=32)
  spans = {int(e['label']): np.asarray(e['spans']).tolist() for e in builder.as_data_source('train')}
  names = builder.info.features['label'].names
  assert {names[k]: v for k, v in spans.items()} == {'accident': [[4.5, 5.0]], 'normal': []}


def batches(prepared, train=True, **options):
  settings = {'frames': 4, 'every': 2, 'size': 24, 'seed': 3, 'colour': 0.2, 'train': train} | options
  return data.clip_batches(prepared[1].as_data_source('train' if train else 'test'), 4, **settings)


@pytest.mark.parametrize('train', [True, False])
def test_batches_depend_on_the_seed_alone(prepared, train):
  """Whatever the number of hosts, and wherever a run goes on."""
  whole, halves = batches(prepared, train), [batches(prepared, train, shard=(i, 2)) for i in range(2)]
  for i in range(2):
    expected = whole[i]
    assert expected['inputs'].shape == (4, 4, 24, 24, 3) and expected['inputs'].dtype == np.float32
    for key in expected:
      np.testing.assert_array_equal(expected[key][0::2], halves[0][i][key])
      np.testing.assert_array_equal(expected[key][1::2], halves[1][i][key])
  stream = data.stream(whole, 1)
  np.testing.assert_array_equal(next(stream)['inputs'], whole[1]['inputs'])
  assert train == bool((batches(prepared, train, seed=4)[0]['inputs'] != whole[0]['inputs']).any())


def test_evaluation_sees_every_clip_once(prepared):
  masks = [b['mask'] for b in batches(prepared, train=False)]
  assert [m.tolist() for m in masks] == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_a_host_decodes_its_own_clips_alone(prepared, monkeypatch):
  decoded = []
  monkeypatch.setattr('kronmesh.data.bands.from_jpeg', lambda b: decoded.append(b) or from_jpeg(b))
  _ = batches(prepared, shard=(1, 4))[0]
  assert len(decoded) == 4  # one clip's frames


def test_frames_of_a_clip():
  taken = lambda *args: places(10, *args).tolist()  # noqa: E731
  assert taken(4, 2) == [1, 3, 5, 7] and taken(10, 1) == list(range(10))
  assert taken(4, 4) == [0, 4, 8, 9] and taken(12, 1)[-3:] == [9, 9, 9]  # the last stands still
  starts = {taken(4, 2, np.random.default_rng(i))[0] for i in range(60)}
  assert starts == {0, 1, 2, 3}


def test_crops():
  crops = [random_crop((48, 64), 1.0, np.random.default_rng(i)) for i in range(40)]
  assert all(0 <= c.top <= 48 - c.height and 0 <= c.left <= 64 - c.width for c in crops)
  assert 10 < sum(c.mirrored for c in crops) < 30 and all(c.width * c.height >= 0.2 * 48 * 64 for c in crops)
  assert not any(random_crop((48, 64), 1.0, np.random.default_rng(i), flip=False).mirrored for i in range(20))
  wide = [random_crop((480, 640), 4.0, np.random.default_rng(i)) for i in range(40)]
  assert all(2.9 < c.width / c.height < 5.5 or 640 in (c.width, c.height) for c in wide)
  assert middle_crop((48, 64)) == Crop(0, 8, 48, 48) and middle_crop((48, 64), 2.0) == Crop(8, 0, 32, 64)


@pytest.mark.parametrize('bands', [1, 3, 4])
@pytest.mark.parametrize('size', [(24, 24), (50, 31), (96, 128)])
def test_rows_of_a_strip_are_those_of_the_whole(bands, size):
  """Whichever rows are asked for, and near what the frame in one piece would give."""
  picture = np.random.default_rng(0).integers(0, 256, (45, 64, 3), np.uint8)
  encoded = to_bands(np.kron(picture[::4, ::4], np.ones((4, 4, 1), np.uint8))[:45], bands)
  for crop in (Crop(0, 0, 45, 64), Crop(5, 3, 33, 40, True)):
    whole = strip(encoded, crop, size, (0, size[0]))
    assert whole.shape == (*size, 3)
    for rows in ((0, 1), (0, size[0] // 2), (size[0] // 3, size[0] // 2), (size[0] - 1, size[0])):
      np.testing.assert_array_equal(strip(encoded, crop, size, rows), whole[rows[0] : rows[1]])
    frame = np.concatenate([from_jpeg(b) for b in encoded])
    one = frame[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    one = np.asarray(Image.fromarray(one).resize(size[::-1], Image.Resampling.BILINEAR))
    one = one[:, ::-1] if crop.mirrored else one
    assert abs(whole.astype(int) - one).max() <= 1 and (bands > 1 or (whole == one).all())


def test_a_host_decodes_the_bands_of_its_own_rows_alone(prepared, monkeypatch, tmp_path):
  """And what two hosts have, each with its rows, is what one would."""
  root, _ = prepared
  banded = data.prepared('video_folder', str(root / 'own'), root / 'data', rate=10, short_side=32, bands=4)
  settings = {'bands': 4, 'colour': 0.0, 'size': (24, 40)}
  whole = batches((root, banded), **settings)[0]['inputs']
  assert whole.shape == (4, 4, 24, 40, 3)
  halves = [batches((root, banded), rows=rows, **settings)[0]['inputs'] for rows in ((0, 12), (12, 24))]
  np.testing.assert_array_equal(np.concatenate(halves, 2), whole)
  decoded = []
  monkeypatch.setattr('kronmesh.data.bands.from_jpeg', lambda b: decoded.append(b) or from_jpeg(b))
  _ = batches((root, banded), train=False, rows=(0, 6), **settings)[0]
  assert 4 * 4 * 1 <= len(decoded) <= 4 * 4 * 2  # of four bands one or two
  with pytest.raises(ValueError, match='a change of colour is of whole clips'):
    batches((root, banded), rows=(0, 6), bands=4, size=24)


def test_colours():
  random = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
  np.testing.assert_array_equal(coloured(random, 1, 1, 1), random)
  grey = coloured(random, 1, 1, 0)
  assert np.ptp(grey, axis=-1).max() <= 1 and np.ptp(coloured(random, 1, 0, 1).mean((0, 1, 2))) < 60
  assert abs(coloured(random, 0.5, 1, 1).mean() - random.mean() / 2) < 1
