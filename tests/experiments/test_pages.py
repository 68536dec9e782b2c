"""Charts by their numbers, and pages in a real browser."""

import json
import math
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.configs import digits_classifier
from kronmesh.train.errors import ConfigError, RunError
from kronmesh.train.loop import train
from kronmesh.train.reporting import facts, glossary, report, sections
from kronmesh.train.reporting.charts import by_layer, embedded, heatmap, lines, render, short
from kronmesh.train.reporting.clock import clock, spent
from kronmesh.train.reporting.report import write_report
from kronmesh.train.sweeps.comparison import Member, write_comparison
from tests import commands
from tests.experiments.small import built, rows, small

ROOT = Path(__file__).parents[2]
HOSTILE = '</script><script>document.title="x"</script><i id=x>&"\'\u2028'
finite = st.floats(-1e9, 1e9).filter(lambda x: x == 0 or abs(x) > 1e-9)
numbers = finite | st.sampled_from([math.nan, math.inf, -math.inf, 1e308])


def data_of(page):
  """The data that a page's scripts draw."""
  return json.loads(re.search('id="page-data">(.*?)</script>', page, re.S)[1])


# Numbers of charts


@given(st.lists(st.tuples(finite, numbers), max_size=900))
def test_lines_keep_their_extremes_and_leave_out_what_is_not_finite(points):
  good = [(x, y) for x, y in points if math.isfinite(y) and abs(y) < 1e300]
  chart = lines('t', {'a': points})
  if not good:
    assert chart is None
    return
  (line,) = chart['lines']
  shown = [y for _, y in line['points']]
  rounded = lambda v: float(f'{v:.6g}')  # noqa: E731
  assert max(shown) == pytest.approx(rounded(max(y for _, y in good)), rel=1e-5)
  assert min(shown) == pytest.approx(rounded(min(y for _, y in good)), rel=1e-5)
  assert len(shown) <= 302 and ('means' in line) == (len(good) > 300)
  assert all(map(math.isfinite, shown)) and data_of(f'id="page-data">{embedded(chart)}</script>') == chart


def test_smoothing_has_the_means_of_what_was_thinned():
  points = [(x, float(x % 10 == 0)) for x in range(3000)]
  (line,) = lines('t', {'a': points})['lines']
  assert {y for _, y in line['points']} == {0, 1} and len(line['means']) == 150
  assert np.mean([y for _, y in line['means']]) == pytest.approx(0.1)


def test_many_layers_are_a_heatmap_of_bounded_size():
  few = {f'l{k}': {10: 1.0, 20: 2.0} for k in range(8)}
  assert by_layer('t', few)['kind'] == 'lines'
  many = {f'l{k}': {s: float(k + s) for s in range(0, 5000, 10)} for k in range(300)}
  chart = by_layer('t', many)
  assert chart['kind'] == 'heatmap' and len(chart['names']) == 120 and chart['left_out'] == 180
  assert chart['names'][-1] == 'l299' and chart['steps'][-1] == 4990
  assert sum(map(len, chart['values'])) < 2000
  assert heatmap('t', {'a': {1: math.nan}}) is None
  assert heatmap('t', {'a': {1: math.nan, 2: 3.0}, 'b': {1: 4.0}})['values'] == [[None, 3], [4, None]]


@pytest.mark.parametrize(
  'value, text', [(0, '0'), (1234567, '1.235M'), (0.0000123, '1.2e-05'), (0.25, '0.25'), (-45000, '-45k'), (3, '3')]
)
def test_short_numbers(value, text):
  assert short(value) == text


def test_text_stays_text():
  chart = lines(HOSTILE, {HOSTILE: [(0, 1), (1, 2)]})
  text = embedded({'charts': [chart]})
  assert not set('<>&\u2028') & set(text) and json.loads(text)['charts'][0]['title'] == HOSTILE
  page = render(
    'sweep.html', title='<x>', subtitle='', cards=[{'name': HOSTILE, 'value': '<v>'}], charts=[{**chart, 'id': 0}],
    note='', parallel=None, head=['<h>'], rows=[[{'text': HOSTILE}]], data={'charts': [chart]},
  )  # fmt: skip
  assert '&lt;x&gt;' in page and '<h>' not in page and '<i id=x>' not in page and '<v>' not in page


def test_terms_are_explained():
  assert 'title="The factor by which K-FAC' in glossary.explained('clip')
  assert 'MFU' in glossary.explained('of the peak flops (MFU)') and 'abbr' not in glossary.explained('eclipse')
  assert glossary.TERMS['condition'] in glossary.explained('condition A')
  assert glossary.explained('<loss>') == '&lt;loss&gt;'


# Seconds of training


def time_row(step, compute, compilation, **more):
  return {'step': step, 'input_seconds': 0.5, 'compute_seconds': compute, 'compilation_seconds': compilation, **more}


def test_the_clock_leaves_out_compilation_and_goes_on_after_a_resumption():
  first = [time_row(10, 11.5, 10.0), time_row(20, 13.5, 10.0)]
  found = clock([*first, time_row(30, 9.5, 7.0)])  # started anew at step 20
  assert (found.steps, found.seconds, found.whole) == ([0, 10, 20, 30], [0, 2, 4, 7], False)
  assert found.at(5) == 1 and found.at(25) == 5.5 and found.at(99) == 7 and found.at(-1) == 0
  again = clock([*first, time_row(15, 9.0, 7.0)])  # from a checkpoint before its last rows
  assert again.steps == [0, 10, 15] and again.seconds[-1] >= again.seconds[-2]
  old = clock([{'step': 10, 'compute_seconds': 11.0}, {'step': 20, 'compute_seconds': 12.0}])
  assert old.whole and old.seconds == [0, 11, 12] and clock([]).steps == []


def test_times_add_up_over_starts_and_say_what_they_include():
  times = [time_row(10, 12.0, 10.0, evaluation_seconds=1.0), time_row(20, 9.0, 7.0, evaluation_seconds=2.0)]
  assert spent(times) == {'input': 1.0, 'compute': 4.0, 'compilation': 17.0, 'evaluation': 3.0}
  assert [p['name'] for p in sections.times_of_parts(times, False)] == ['input', 'compute', 'compilation', 'evaluation']
  (part,) = sections.times_of_parts([{'step': 1, 'compute_seconds': 5.0}], True)
  assert part == {'name': 'compute, with compilation', 'seconds': '5.0 s', 'share': '100.0'}


# Runs


def classifier(mesh='data=4,model=2', steps=3):
  config = digits_classifier.get_config()
  config.model.hidden, config.data.batch_size, config.data.eval_batch_size = (16,), 64, 64
  config.optimizer, config.mesh, config.steps, config.eval_every = 'sgd', mesh, steps, 3
  return config


@pytest.fixture(scope='module')
def classified(tmp_path_factory):
  """A run that classifies, on a mesh of eight devices."""
  workdir = tmp_path_factory.mktemp('classified')
  train(classifier(), workdir, quiet=True)
  return workdir


def test_the_settings_that_matter_come_first(tmp_path):
  config = small('kfac')
  config.kfac.momentum = 0.5
  shown = dict(facts.settings(json.loads(config.to_json())))
  for words in ('kfac: learning_rate ', ', damping 0.01', ', momentum 0.5', 'inverses_every 2'):
    assert words in shown['optimizer'], words
  assert 'widths (16, 8)' in shown['model'] and 'eval_every 3' in shown['other settings'] and shown['batch'] == '64'
  commit = '0123456789abcdef' * 2 + '01234567'
  assert facts.origin({'git_commit': f'{commit} + changes'}) == [('git commit', '0123456789ab + changes')]


def test_a_run_that_failed_says_so(tmp_path):
  from tests.experiments.test_faults import build, config_of, poisoned

  config = config_of(not_finite='stop')
  with pytest.raises(RunError):
    train(config, tmp_path, quiet=True, run=poisoned(build(config), [4], np.nan))
  page = (tmp_path / 'report.html').read_text()
  assert 'Diverged: step 5: the batch holds values that are not finite' in page and 'class="bad"' in page


# Sweeps


def sweep_of(folder, count, steps, every=20):
  """Members with rows as a run writes them: two settings, and a better result for less damping."""
  members = []
  for k in range(count):
    damping, schedule = 10.0 ** -(k % 4), ('cosine', 'constant')[k % 2]
    path = folder / 'members' / f'm{k}'
    path.mkdir(parents=True)
    written = []
    for step in range(1, steps + 1):
      written.append({'step': step, 'loss': 1 / step, 'accuracy': 0.5, 'clip': 1.0})
      if step % every == 0:
        score = 0.9 - 0.1 * damping - k / 1e4 - 0.5 / step
        written.append({**time_row(step, 20 - k % 10 + step / 100, 20 - k % 10), 'examples_per_second': 100.0 + k})
        written.append({'step': step, 'seconds': step / 100 + 20, 'eval_accuracy': score, 'eval_loss': 1 - score})
    (path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in written))
    (path / 'report.html').touch()
    settings = {'kfac.damping': damping, 'kfac.schedule': schedule, 'seed': k}
    members.append(Member(f'm{k}{HOSTILE if k == 1 else ""}', settings, str(path), 'done'))
  return members


def test_a_sweep_has_curves_settings_and_a_table(tmp_path):
  write_comparison(tmp_path, digits_classifier.get_config(), sweep_of(tmp_path, 12, 100))
  page = (tmp_path / 'sweep.html').read_text()
  found = data_of(page)
  steps, seconds, damping, parallel = found['charts']
  assert (steps['x'], seconds['x'], seconds['like'], parallel['kind']) == ('step', 'seconds', 0, 'parallel')
  # The seconds of training at step 20 are 0.2 and half a second of input, without 20 of compilation.
  assert steps['lines'][0]['name'] == 'm3' and steps['lines'][0]['points'][0][::2] == [20, 0.7]
  assert damping['x'] == 'kfac.damping' and damping['log_x'] and damping['dots'] == ['members']
  assert [axis['name'] for axis in parallel['axes']] == ['kfac.damping', 'kfac.schedule', 'best accuracy']
  assert parallel['axes'][0]['log'] and parallel['axes'][1]['names'] == ['constant', 'cosine'] and not parallel['lower']
  assert 'without compilation' in page and '<i id=x>' not in page


@pytest.mark.long
def test_a_large_sweep_is_compared_within_three_seconds(tmp_path):
  members = sweep_of(tmp_path, 300, 2186)  # 2,402 rows each
  start = time.process_time()
  write_comparison(tmp_path, digits_classifier.get_config(), members)
  assert time.process_time() - start < 3 and (tmp_path / 'sweep.html').stat().st_size < 1_500_000


# In a browser


def opened(browser, path, width):
  """The page at this width: rendered, and silent."""
  size = {'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': width < 600}
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
  browser.get(f'file://{path}')
  assert browser.get_log('browser') == []
  run = browser.execute_script
  assert run('return document.documentElement.scrollWidth') <= width  # nothing to scroll sideways for
  charts = run(
    'return [...document.querySelectorAll("figure .plot")].map(p => [p.querySelector("svg").getBoundingClientRect().width, '
    'p.getBoundingClientRect().height, p.querySelectorAll("path").length])'
  )
  assert charts and all(w > 0.6 * min(width, 440) and h > 80 and lines for w, h, lines in charts)
  # Nothing reaches out of its card, and no tick out of its chart.
  assert run(
    'return [...document.querySelectorAll(".card, figure, h1, .facts div")].every(e => e.scrollWidth <= e.clientWidth + 1)'
  )
  cut = run(
    'return [...document.querySelectorAll(".plot")].flatMap(p => [...p.querySelectorAll("svg > g > text")].filter(t => {'
    'const a = t.getBoundingClientRect(), b = p.getBoundingClientRect();'
    'return a.left < b.left - 2 || a.right > b.right + 2;'
    '}).map(t => t.textContent))'
  )
  assert cut == []
  return run


def choose(run, name, value):
  """Sets a control as a user would."""
  run(
    'const e = document.getElementById(arguments[0]); e.value = arguments[1];'
    'e.dispatchEvent(new Event("input")); e.dispatchEvent(new Event("change"));', name, value
  )  # fmt: skip


def option(run, title, what):
  """A part of what ECharts draws in the chart with this title."""
  return run(f'return charts.find(c => c.chart.title === arguments[0]).view.getOption(){what}', title)


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
  for words in (
    'learning_rate',
    'damping 0.01',
    'git commit',
    'peak memory',
    'compilation',
    '1 process\n',
    'reconstruction',
  ):
    assert words in text, words
  assert run('return document.querySelectorAll("details").length') == 3
  assert run('return document.querySelectorAll(".sample.pair img").length') == 24
  assert run('return document.querySelectorAll(".charts:empty, .plot:empty").length') == 0
  # Terms are explained by their title, and below them when they have the focus, as after a tap.
  term = run('return document.querySelector("figcaption .term").title')
  assert term == glossary.TERMS['loss'] and term in text
  assert term in run(
    'const t = document.querySelector("figcaption .term"); t.focus(); return getComputedStyle(t, "::after").content'
  )
  # What a pointer shows: the step, and the value of each line there.
  run('charts[0].view.dispatchAction({type: "showTip", seriesIndex: 0, dataIndex: 11})')
  shown = run('return document.querySelector(".tip").innerText').split()
  assert shown[:3] == ['step', '12', 'training'] and 'evaluation' in shown


@pytest.mark.long
@pytest.mark.parametrize('width', [1280, 390])
def test_the_controls_of_a_report(browser, run_of_two_parts, classified, width):
  from selenium.webdriver.common.by import By

  run = opened(browser, run_of_two_parts / 'report.html', width)
  assert option(run, 'loss', '.yAxis[0].type') == 'value' and option(run, 'loss', '.series.length') == 2
  choose(run, 'y', 'log')
  assert option(run, 'loss', '.yAxis[0].type') == 'log'
  choose(run, 'smooth', 0.9)
  assert option(run, 'loss', '.series.length') == 4 and 'logarithmic' in run('return document.body.innerText')
  choose(run, 'x', 'seconds')
  ends = data_of((run_of_two_parts / 'report.html').read_text())['clock'][-1]
  assert option(run, 'loss', '.xAxis[0].max') == pytest.approx(ends[1], rel=1e-4)
  choose(run, 'x', 'step')
  choose(run, 'smooth', 0)
  run('zoomTo("step", 3, 9)')
  assert [option(run, t, '.dataZoom[0].startValue') for t in ('loss', 'error', 'clip')] == [3, 3, 3]
  run('document.getElementById("reset").click()')
  assert option(run, 'loss', '.dataZoom[0].endValue') == 12
  # Another run's rows, then its page, then a file that is no run.
  for file in (classified / 'metrics.jsonl', classified / 'report.html', classified / 'config.json'):
    browser.find_element(By.ID, 'overlay').send_keys(str(file))
    time.sleep(0.3)
  names = option(run, 'loss', '.series.map(s => s.name)')
  assert names == ['training', 'evaluation', 'metrics: training', 'metrics: evaluation',
                   f'{classified.name}: training', f'{classified.name}: evaluation']  # fmt: skip
  assert option(run, 'loss', '.series[2].lineStyle.type') == [5, 4]
  expected = [row['loss'] for row in rows(classified) if 'loss' in row]
  assert [y for _, y in option(run, 'loss', '.series[2].data')] == expected
  assert 'config.json holds no run' in run('return document.getElementById("said").textContent')
  run('document.querySelectorAll("#runs button").forEach(b => b.click())')
  assert option(run, 'loss', '.series.length') == 2 and browser.get_log('browser') == []


@pytest.mark.long
def test_dragging_zooms(browser, run_of_two_parts):
  from selenium.webdriver import ActionChains
  from selenium.webdriver.common.by import By

  run = opened(browser, run_of_two_parts / 'report.html', 1280)
  plot = browser.find_element(By.CSS_SELECTOR, '.plot')
  run('arguments[0].scrollIntoView({block: "center"})', plot)
  ActionChains(browser).move_to_element(plot).click_and_hold().move_by_offset(120, 0).release().perform()
  start, end = (option(run, 'error', f'.dataZoom[0].{name}Value') for name in ('start', 'end'))
  assert 4 <= start < end <= 11


@pytest.mark.long
@pytest.mark.parametrize('width', [1280, 390])
def test_the_page_of_a_classifier(browser, classified, width):
  run = opened(browser, classified / 'report.html', width)
  cells = option(run, 'confusion matrix', '.series[0].data')
  assert sum(count for _, _, _, count in cells) == 299
  assert run('return document.querySelectorAll(".sample img").length') == 12
  assert 'of 299 examples of the evaluation set are classified correctly' in run('return document.body.innerText')
  run('document.querySelectorAll("details").forEach(d => { d.open = true; })')
  first = lambda: run('return document.querySelector("table.sortable tbody tr td:nth-child(2)").textContent')  # noqa: E731
  found = []
  for _ in range(2):
    run('document.querySelectorAll("table.sortable th button")[1].click()')
    found.append(float(first()))
  shown = run('return [...document.querySelectorAll("table.sortable td:nth-child(2)")].map(c => Number(c.textContent))')
  assert found == [min(shown), max(shown)]


@pytest.mark.long
def test_a_running_page_reloads_and_a_finished_one_does_not(browser, run_of_two_parts, tmp_path, monkeypatch):
  workdir = shutil.copytree(run_of_two_parts, tmp_path / 'run')
  monkeypatch.setattr(report, 'RELOAD', 1)
  loads = 'return performance.getEntriesByType("navigation")[0].type'
  run = opened(browser, write_report(workdir, running=True), 1280)
  assert 'Running: 12 of 12 steps' in run('return document.body.innerText')
  choose(run, 'y', 'log')
  run('window.scrollTo(0, 400); window.mark = 1')
  end = time.monotonic() + 20
  while run('return window.mark') == 1:
    assert time.monotonic() < end
    time.sleep(0.2)
  time.sleep(0.3)
  assert run(loads) == 'reload' and run('return settings.y') == 'log' and run('return scrollY') == 400
  run('document.getElementById("live").click(); window.mark = 1')
  time.sleep(1.5)
  assert run('return window.mark') == 1
  run = opened(browser, write_report(workdir), 1280)
  run('window.mark = 1')
  time.sleep(1.5)
  assert run('return window.mark') == 1 and run('return document.getElementById("live")') is None


@pytest.mark.long
@pytest.mark.parametrize('width', [1280, 390])
def test_the_page_of_a_sweep(browser, tmp_path, width):
  write_comparison(tmp_path, digits_classifier.get_config(), sweep_of(tmp_path, 12, 100))
  run = opened(browser, tmp_path / 'sweep.html', width)
  assert (
    run('return document.title') == 'kfac on digits: 12 settings' and run('return document.getElementById("x")') is None
  )
  column = lambda k: run(f'return [...document.querySelectorAll("tbody td:nth-child({k})")].map(c => c.textContent)')  # noqa: E731
  assert column(1)[0] == 'm3'
  run('document.querySelectorAll("th button")[3].click()')
  assert column(4) == [str(k) for k in range(12)]  # as numbers: 9 before 10
  run('document.querySelectorAll("th button")[3].click()')
  assert column(4)[0] == '11' and column(1)[-2] == f'm1{HOSTILE}'
  run('charts[0].view.dispatchAction({type: "legendUnSelect", name: "m3"})')
  assert option(run, 'accuracy', '.legend[0].selected.m3') is False
  assert run('return charts[1].view.getOption().series[0].data[0][0]') == 0.7
  assert len(option(run, 'parallel coordinates', '.parallelAxis')) == 3 and browser.get_log('browser') == []


@pytest.mark.long
def test_the_report_needs_nothing_else(run_of_two_parts):
  page = (run_of_two_parts / 'report.html').read_text()
  own = page.replace((ROOT / 'src/train/reporting/pages/echarts.js').read_text(), '')
  assert len(own) < len(page) - 100_000
  assert not re.search(r'(src|href)="(?!data:,|data:image/)[^"#]*"|@import|url\(|fetch\(|https?://', own)
  assert len(page) < 900_000


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
