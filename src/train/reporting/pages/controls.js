'use strict';
// The bar over the charts, other runs laid over this one, and the reload of a page whose run goes on.

const field = name => document.getElementById(name);
const STORE = `kronmesh ${location.pathname}`;

function set(name, value) {
  settings[name] = value;
  if (name === 'x') settings.zoom = null;
  drawAll();
}

function say(words) {
  field('said').textContent = words;
}

if (field('controls')) {
  field('smooth').addEventListener('input', event => {
    field('smooth-value').textContent = event.target.value;
    set('smooth', Number(event.target.value));
  });
  field('y').addEventListener('change', event => set('y', event.target.value));
  field('reset').addEventListener('click', showAll);
}
if (field('x')) {
  field('x').addEventListener('change', event => set('x', event.target.value));
  if (!page.clock.length) field('x').closest('label').remove();
}

// Returns the rows of a file of JSON lines that are objects with a step.
function rowsOf(text) {
  const rows = [];
  for (const line of text.split('\n')) {
    try {
      const row = JSON.parse(line);
      if (row && typeof row.step === 'number') rows.push(row);
    } catch { /* a damaged line */ }
  }
  return rows;
}

// Returns the clock of a run from its rows: seconds of training without compilation, over all its starts.
function clockOf(rows) {
  const times = rows.filter(row => typeof row.compute_seconds === 'number');
  const clock = [[0, 0]];
  let base = 0, before = 0;
  for (const row of times) {
    if (row.compute_seconds < before) base = clock[clock.length - 1][1];
    before = row.compute_seconds;
    while (clock.length > 1 && clock[clock.length - 1][0] >= row.step) clock.pop();
    const spent = row.compute_seconds + (row.input_seconds || 0) - (page.compiles ? 0 : row.compilation_seconds || 0);
    clock.push([row.step, Math.max(base + Math.max(0, spent), clock[clock.length - 1][1])]);
  }
  return clock.length > 1 ? clock : [];
}

// Returns the run of a metrics.jsonl: its clock, and the points (step, value) of every key.
function runOfRows(name, rows) {
  const series = Object.create(null);
  for (const row of rows) {
    for (const [key, value] of Object.entries(row)) {
      if (key !== 'step' && typeof value === 'number') (series[key] = series[key] || []).push([row.step, value]);
    }
  }
  for (const key of Object.keys(series)) series[key] = thinned(series[key].sort((a, b) => a[0] - b[0]));
  return {name, clock: thinned(clockOf(rows)), series};
}

// Returns the run of another report.html.
function runOfPage(text) {
  const data = new DOMParser().parseFromString(text, 'text/html').getElementById('page-data');
  const other = JSON.parse(data.textContent), series = Object.create(null);
  for (const chart of other.charts) {
    for (const line of chart.lines || []) {
      if (line.key) series[line.key] = line.points.map(([step, y]) => [step, y / (chart.scale || 1)]);
    }
  }
  return {name: String(other.name), clock: other.clock, series};
}

function lay(run) {
  if (!Object.keys(run.series).length) throw new Error('no rows');
  const taken = new Set(overlays.map(one => one.name)), plainName = run.name;
  for (let k = 2; taken.has(run.name); k++) run.name = `${plainName} ${k}`;
  overlays.push(run);
}

function showRuns() {
  field('runs').replaceChildren(...overlays.map(run => {
    const row = document.createElement('span'), name = document.createElement('input'), remove = document.createElement('button');
    row.className = 'run';
    name.value = run.name;
    name.setAttribute('aria-label', 'name of the other run');
    name.addEventListener('change', () => { run.name = name.value || run.name; drawAll(); });
    remove.type = 'button';
    remove.textContent = 'remove';
    remove.addEventListener('click', () => { overlays.splice(overlays.indexOf(run), 1); showRuns(); drawAll(); });
    row.append(document.createElement('i'), name, remove);
    return row;
  }));
}

if (field('overlay')) {
  field('overlay').addEventListener('change', async event => {
    say('');
    for (const file of event.target.files) {
      const text = await file.text();
      try {
        lay(file.name.endsWith('.html') ? runOfPage(text) : runOfRows(file.name.replace(/\.jsonl$/, ''), rowsOf(text)));
      } catch {
        say(`${file.name} holds no run: choose the metrics.jsonl or the report.html of one`);
      }
    }
    event.target.value = '';
    showRuns();
    drawAll();
  });
}

// Keeps the settings, the runs laid over this one and the place on the page, and reloads.
function reload() {
  if (!field('live').checked) return;
  try {
    sessionStorage.setItem(STORE, JSON.stringify({settings, overlays, top: window.scrollY}));
  } catch { /* without a store, the page starts anew */ }
  location.reload();
}

function restore() {
  let kept = null;
  try {
    kept = JSON.parse(sessionStorage.getItem(STORE));
    sessionStorage.removeItem(STORE);
  } catch { /* nothing was kept */ }
  if (!kept) return;
  Object.assign(settings, kept.settings);
  overlays.push(...kept.overlays);
  field('smooth').value = field('smooth-value').textContent = settings.smooth;
  field('y').value = settings.y;
  if (field('x')) field('x').value = settings.x;
  showRuns();
  drawAll();
  window.scrollTo(0, kept.top);
}

if (field('controls') && field('overlay')) restore();
if (page.running && field('live')) {
  const minutes = Math.floor((Date.now() / 1000 - page.written) / 60);
  if (minutes >= 10) field('old').textContent = ` That was ${minutes} minutes ago: the run may have ended.`;
  setInterval(reload, 1000 * page.reload);
}
