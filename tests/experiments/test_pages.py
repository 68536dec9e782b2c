"""Charts by their numbers, and pages in a real browser."""

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronmesh.train.errors import ConfigError, RunError
from kronmesh.train.loop import train
from kronmesh.train.reporting.charts import HEIGHT, WIDTH, chart, render, short, ticks
from kronmesh.train.reporting.report import write_report
from tests import commands
from tests.experiments.small import built, small

ROOT = Path(__file__).parents[2]
finite = st.floats(-1e9, 1e9).filter(lambda x: x == 0 or abs(x) > 1e-9)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=400))
def test_lines_stay_inside_of_the_chart_and_keep_their_extremes(points):
  figure = str(chart('t', {'a': points}))
  places = [tuple(map(float, p.split(','))) for p in ' '.join(re.findall(' points="([^"]+)"', figure)).split()]
  places += [(float(a), float(b)) for a, b in re.findall('cx="([^"]+)" cy="([^"]+)"', figure)]
  assert all(0 <= a <= WIDTH and 0 <= b <= HEIGHT for a, b in places)
  data = json.loads(html.unescape(re.search('data-points="([^"]+)"', figure)[1]))
  shown = [float(y) for _, y, _ in data['series'][0]['points']]
  assert max(shown) == float(f'{max(y for _, y in points):.4g}') and min(shown) == float(
    f'{min(y for _, y in points):.4g}'
  )


@given(finite, st.floats(1e-6, 1e9))
def test_ticks_are_few_and_between_the_ends(low, span):
  found = ticks(low, low + span, log=False)
  tolerance = 1e-6 * max(abs(low), span)
  assert len(found) <= 8 and all(low - tolerance <= t <= low + span + tolerance for t in found)


def test_ticks_of_a_logarithmic_axis():
  assert ticks(0.5, 2000, log=True) == [1, 10, 100, 1000]
  assert ticks(0.3, 4, log=True) == pytest.approx([0.5, 1, 2])


def test_what_is_not_finite_is_left_out():
  assert chart('t', {'a': [(1, np.nan), (2, np.inf)]}) == ''
  assert 'circle' in chart('t', {'a': [(1, np.nan), (2, 5.0)]})


def test_text_is_escaped():
  assert '<script>' not in chart('<script>', {'<b>': [(0, 1), (1, 2)], 'c': [(0, 1)]})
  page = render('sweep.html', title='<x>', subtitle='', cards=[], charts=[], head=['<h>'], rows=[])
  assert '&lt;x&gt;' in page and '<h>' not in page


@pytest.mark.parametrize(
  'value, text', [(0, '0'), (1234567, '1.235M'), (0.0000123, '1.2e-05'), (0.25, '0.25'), (-45000, '-45k'), (3, '3')]
)
def test_short_numbers(value, text):
  assert short(value) == text


@pytest.fixture(scope='module')
def browser():
  """Chromium without a window; pages must say nothing to its console."""
  driver = shutil.which('chromedriver')
  if driver is None:
    pytest.skip('no chromedriver here: apt-get install chromium chromium-driver')
  from selenium import webdriver
  from selenium.webdriver.chrome.service import Service

  options = webdriver.ChromeOptions()
  quiet = ('quic', 'background-networking', 'component-update', 'sync', 'gpu')
  for flag in ('headless=new', 'no-sandbox', 'no-first-run', *(f'disable-{name}' for name in quiet)):
    options.add_argument(f'--{flag}')
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
  found = webdriver.Chrome(options=options, service=Service(driver))
  yield found
  found.quit()


def opened(browser, path, width):
  """The page at this width: rendered, and silent."""
  size = {'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': width < 600}
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
  browser.get(f'file://{path}')
  assert browser.get_log('browser') == []
  run = browser.execute_script
  assert run('return document.documentElement.scrollWidth') <= width  # nothing to scroll sideways for
  charts = run(
    'return [...document.querySelectorAll("figure svg")].map(s => [s.getBoundingClientRect().width, '
    's.getBoundingClientRect().height, s.querySelectorAll("polyline, circle").length])'
  )
  assert charts and all(w > 0.6 * min(width, 440) and h > 80 and lines for w, h, lines in charts)
  # Nothing reaches out of its card.
  assert run(
    'return [...document.querySelectorAll(".card, figure, h1")].every(e => e.scrollWidth <= e.clientWidth + 1)'
  )
  return run


@pytest.fixture(scope='module')
def run_of_two_parts(tmp_path_factory):
  """A run with evaluations, layers, a fault and a resumption."""
  workdir = tmp_path_factory.mktemp('run')
  for steps in (6, 12):
    config = small(mesh='data=1', steps=steps)
    config.health_every = 3
    train(config, workdir, quiet=True, run=built(config))
  return workdir


@pytest.mark.long
@pytest.mark.parametrize('width', [1280, 390])
def test_the_report_in_a_browser(browser, run_of_two_parts, width):
  run = opened(browser, run_of_two_parts / 'report.html', width)
  text = run('return document.body.innerText')
  for words in (
    'kfac on digits',
    'Finished: 12 steps',
    'error at the end',
    'examples a second',
    'condition A',
    'from the',
  ):
    assert words in text, words
  assert run('return document.querySelectorAll("details").length') == 3
  # What a pointer shows: the step, and the value of each line there.
  shown = run(
    'const f = document.querySelector("figure"), s = f.querySelector("svg"), b = s.getBoundingClientRect();'
    's.dispatchEvent(new PointerEvent("pointermove", {clientX: b.left + b.width - 12, clientY: b.top + 20}));'
    'return f.querySelector(".tip").innerText'
  )
  assert shown.splitlines()[0] == 'step 12' and shown.splitlines()[1].startswith('training  ')
  assert run(
    'const t = document.querySelector(".tip").getBoundingClientRect(); return t.left >= 0 && t.right <= innerWidth'
  )


@pytest.mark.long
def test_the_report_needs_nothing_else(run_of_two_parts):
  page = (run_of_two_parts / 'report.html').read_text()
  assert not re.search(r'(src|href)="(?!data:,)[^"#]*"|@import|url\(', page)
  assert len(page) < 300_000


def test_a_run_that_failed_says_so(tmp_path):
  from tests.experiments.test_faults import build, config_of, poisoned

  config = config_of(not_finite='stop')
  with pytest.raises(RunError):
    train(config, tmp_path, quiet=True, run=poisoned(build(config), [4], np.nan))
  page = (tmp_path / 'report.html').read_text()
  assert 'Diverged: step 5: the batch holds values that are not finite' in page and 'class="bad"' in page


@pytest.mark.long
def test_a_report_by_its_command(run_of_two_parts, tmp_path):
  path = run_of_two_parts / 'report.html'
  before = path.read_text()
  path.unlink()
  done = commands.run('experiments/report.py', f'--workdir={run_of_two_parts}')
  assert done.stdout.strip() == str(path) and path.read_text() == before
  with pytest.raises(ConfigError, match='holds no run'):
    write_report(tmp_path)
  done = commands.run('experiments/report.py', f'--workdir={tmp_path}')
  assert done.returncode == 2 and done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
