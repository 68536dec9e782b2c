"""The site builds without a warning, has every public name, and can be read at both widths."""

import functools
import http.server
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from scripts.site_hooks import PACKAGES, defined_in, public_names

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.long


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """The folder of the built site. mkdocs.yml makes every warning an error."""
  folder = tmp_path_factory.mktemp('site')
  command = [sys.executable, '-m', 'mkdocs', 'build', '--quiet', '--site-dir', str(folder)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  return folder


@pytest.fixture(scope='module')
def address(site):
  """The address of the site, which search needs."""
  handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
  handler.log_message = lambda *a: None
  server = http.server.ThreadingHTTPServer(('localhost', 0), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f'http://localhost:{server.server_port}'
  server.shutdown()


def test_every_public_name_is_on_an_api_page(site):
  for package in PACKAGES:
    page = (site / 'api' / package.removeprefix('kronmesh.') / 'index.html').read_text()
    for name in public_names(package):
      assert f'id="{defined_in(package, name)}"' in page, f'{package}.{name}'


def test_formulas_are_set_as_formulas(site):
  page = (site / 'explain/factors/index.html').read_text()
  assert page.count('<math') >= 10 and '$$' not in page and '\\(' not in page


def test_pages_ask_no_other_host(site):
  for path in site.rglob('*.html'):
    for kind, url in re.findall(r'<(script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', path.read_text()):
      assert kind == 'link' or 'colab' in url or 'shields' in url, (path, url)


def test_links_of_the_site_lead_somewhere(site):
  """Those of notebooks too, which mkdocs does not check."""
  for path in site.rglob('*.html'):
    for link in re.findall(r'<a [^>]*?href="([^"#?]+)', path.read_text()):
      if path.name != '404.html' and not re.match(r'[a-z]+:', link):
        target = (path.parent / link).resolve()
        assert target.exists(), f'{path.relative_to(site)} links to {link}'


@pytest.mark.parametrize('width', [1280, 390])
@pytest.mark.parametrize(
  'page', ['', 'api/kron/', 'explain/factors/', 'guides/own_loop/', 'convergence/', 'notebooks/own_loop/']
)
def test_a_page_in_a_browser(browser, address, page, width):
  size = {'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': width < 600}
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
  browser.get(f'{address}/{page}')
  run = browser.execute_script
  assert run('return document.documentElement.scrollWidth') <= width
  broken = run('return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)')
  assert not [url for url in broken if url.startswith(address)]
  severe = [entry for entry in browser.get_log('browser') if entry['level'] == 'SEVERE' and address in entry['message']]
  assert not severe
  # Dark mode changes the paper.
  paper = 'return getComputedStyle(document.body).backgroundColor'
  light = run(paper)
  run('document.body.setAttribute("data-md-color-scheme", "slate")')
  assert run(paper) != light


def test_search_finds_a_function(browser, address):
  from selenium.webdriver.common.by import By
  from selenium.webdriver.support.ui import WebDriverWait

  size = {'width': 1280, 'height': 900, 'deviceScaleFactor': 1, 'mobile': False}
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
  browser.get(f'{address}/')
  browser.find_element(By.CSS_SELECTOR, 'label[for=__search]')
  browser.find_element(By.CSS_SELECTOR, 'input.md-search__input').send_keys('inverse_schedule')
  results = WebDriverWait(browser, 20).until(lambda b: b.find_elements(By.CSS_SELECTOR, '.md-search-result__item a'))
  assert any('inverse_schedule' in result.get_attribute('href') for result in results)
