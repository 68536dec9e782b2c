"""Text that people bring: byte order marks, line ends, bytes that are no UTF-8."""

import pytest

from kronmesh import data
from kronmesh.tasks.video import trec
from kronmesh.train.errors import ConfigError

MARK = b'\xef\xbb\xbf'


@pytest.mark.parametrize('mark', [b'', MARK])
@pytest.mark.parametrize('end', [b'\n', b'\r\n'])
def test_lines(tmp_path, mark, end):
  path = tmp_path / 'a.txt'
  path.write_bytes(mark + end.join(['a\u2028b'.encode(), b'', 'c\u0085d'.encode(), b'e\x0bf']) + end)
  assert data.read_lines(path) == [(1, 'a\u2028b'), (3, 'c\u0085d'), (4, 'e\x0bf')]


def test_bytes_that_are_no_utf8_name_their_line(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_bytes(b'one\ncaf\xe9\n')
  with pytest.raises(data.DataError, match=r'a\.txt, line 2: byte 0xe9 is not UTF-8; save the file as UTF-8'):
    data.read_lines(path)
  path.write_bytes('one'.encode('utf-16'))
  with pytest.raises(data.DataError, match=r'a\.txt, line 1: is UTF-16'):
    data.read_lines(path)
  with pytest.raises(data.DataError, match='gone cannot be read: No such file'):
    data.read_lines(tmp_path / 'gone')


def test_a_table(tmp_path):
  path = tmp_path / 'a.csv'
  path.write_bytes(MARK + b'label,id\r\n"a, b",1\r\n')
  assert data.read_table(path) == [{'label': 'a, b', 'id': '1'}]
  path.write_bytes(b'label,id\na, b,1\n')
  with pytest.raises(data.DataError, match='row 1 has more fields than the header'):
    data.read_table(path)


@pytest.mark.parametrize('ending', ['txt', 'nt'])
def test_a_mark_makes_no_further_entity(tmp_path, ending):
  triple = {'txt': 'a\tr\t{}\n', 'nt': '<http://x/a> <http://x/r> <http://x/{}> .\n'}[ending]
  text = ''.join(triple.format(x) for x in 'abc').encode()
  (tmp_path / f'train.{ending}').write_bytes(MARK + text)
  (tmp_path / f'plain.{ending}').write_bytes(text)
  own = data.read_triples(tmp_path / f'train.{ending}')
  assert own == data.read_triples(tmp_path / f'plain.{ending}') and len({t[0] for t in own}) == 1


def test_names_of_entities_may_hold_what_unicode_calls_line_ends(tmp_path):
  (tmp_path / 'train.txt').write_text('a\u2028b\tr\tc\u0085\n', encoding='utf-8')
  assert data.read_triples(tmp_path / 'train.txt') == [('a\u2028b', 'r', 'c\u0085')]


@pytest.mark.parametrize('mark', [b'', MARK])
def test_runs_and_judgements_with_a_mark_have_the_same_score(tmp_path, mark):
  (tmp_path / 'run').write_bytes(mark + b'1 Q0 a 1 2.0 x\n2 Q0 b 1 1.0 x\n')
  (tmp_path / 'judged').write_bytes(mark + b'1 0 a 1\n2 0 b 1\n')
  found = trec.score(trec.read_run(tmp_path / 'run'), trec.read_judgements(tmp_path / 'judged'))
  assert found == {t: {'AP': 1.0, 'xinfAP': 1.0} for t in '12'}


def test_a_run_that_is_no_utf8_is_one_line(tmp_path):
  (tmp_path / 'run').write_bytes(b'1 Q0 a 1 2.0 x\n1 Q0 \xff 1 2.0 x\n')
  with pytest.raises(ConfigError, match='run, line 2: byte 0xff is not UTF-8'):
    trec.read_run(tmp_path / 'run')


NAMES = [
  'x y.mkv',
  'x_y.mkv',
  'x%20y.mkv',
  'Snímek\u00a0v.mp4',
  'new\nline',
  'tab\t',
  '\u2028',
  'caf\udce9.mkv',
  'a/b c',
]


def test_a_run_is_read_as_it_was_written(tmp_path):
  """Whatever its documents are called; names that differ stay different."""
  assert len({trec.token(name) for name in NAMES}) == len(NAMES) and trec.token('a/é#1.0') == 'a/é#1.0'
  scores = {name: float(len(NAMES) - i) for i, name in enumerate(NAMES)}
  trec.write_run(tmp_path / 'run', {'some topic': scores}, 'kronmesh')
  assert trec.read_run(tmp_path / 'run') == {trec.token('some topic'): [trec.token(name) for name in NAMES]}
