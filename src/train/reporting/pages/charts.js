'use strict';
// Draws the charts of a page from the data in #page-data, and zooms them together.

const page = JSON.parse(document.getElementById('page-data').textContent);
const settings = {smooth: 0, y: 'auto', x: 'step', zoom: null};
const overlays = []; // other runs: {name, clock, series}
const pointer = {y: 0}; // the last height of the pointer within a chart
const OPTIONS = {lines: linesOption, heatmap: heatmapOption, confusion: confusionOption, parallel: parallelOption};

for (const chart of page.charts) {
  if (chart.like !== undefined) chart.lines = page.charts[chart.like].lines;
}

const charts = [...document.querySelectorAll('figure[data-chart]')].map(figure => {
  const chart = page.charts.find(c => String(c.id) === figure.dataset.chart);
  const plot = figure.querySelector('.plot');
  return {chart, figure, plot, view: null};
}).filter(c => c.chart);

function draw(one) {
  const {chart, figure, plot} = one, narrow = plot.clientWidth < 420;
  const room = plot.clientWidth;
  one.view = one.view || echarts.init(plot, null, {renderer: 'svg'});
  const {option, words, height} = OPTIONS[chart.kind](chart, one.view, narrow, room);
  if (height) plot.style.height = `${height}px`;
  one.view.resize();
  one.view.setOption(option, {notMerge: true});
  figure.querySelector('small').textContent = words;
  plot.setAttribute('role', 'img');
  plot.setAttribute('aria-label', `${chart.title} ${words}`);
}

function drawAll() {
  charts.forEach(draw);
}

function drawLines() {
  charts.filter(one => one.chart.kind === 'lines').forEach(draw);
}

// Shows the same stretch of the x axis in all charts over steps or seconds. Its ends are round.
function zoomTo(axis, from, to) {
  const digit = 10 ** (Math.floor(Math.log10(to - from)) - 1), unit = axis === 'step' ? Math.max(1, digit) : digit;
  const round = value => Math.max(0, Math.round(value / unit) * unit);
  settings.zoom = {axis, from: round(from), to: Math.max(round(to), round(from) + unit)};
  drawLines();
}

function showAll() {
  settings.zoom = null;
  drawLines();
}

// Lets a mouse drag over a chart choose the stretch to zoom to. A finger scrolls the page instead.
function chooseByDragging(one) {
  const {plot, view} = one, mark = document.createElement('div');
  mark.className = 'chosen';
  let start = null;
  const x = event => event.clientX - plot.getBoundingClientRect().left;
  plot.addEventListener('pointerdown', event => {
    const place = [x(event), event.clientY - plot.getBoundingClientRect().top];
    if (event.pointerType !== 'mouse' || event.button !== 0 || !view.containPixel('grid', place)) return;
    start = place[0];
  });
  window.addEventListener('pointermove', event => {
    if (event.target instanceof Node && plot.contains(event.target)) pointer.y = event.clientY - plot.getBoundingClientRect().top;
    if (start === null) return;
    const end = Math.max(0, Math.min(plot.clientWidth, x(event)));
    mark.style.left = `${Math.min(start, end)}px`;
    mark.style.width = `${Math.abs(end - start)}px`;
    plot.append(mark);
  });
  window.addEventListener('pointerup', event => {
    if (start === null) return;
    const [from, to] = [start, x(event)].sort((a, b) => a - b).map(pixel => view.convertFromPixel({xAxisIndex: 0}, pixel));
    const far = Math.abs(x(event) - start) > 8;
    start = null;
    mark.remove();
    if (far) zoomTo(axisOf(one.chart), from, to);
  });
}

// Zooms the other charts soon after a wheel or two fingers have zoomed one.
function zoomTogether(one) {
  let waiting = 0;
  one.view.on('datazoom', event => {
    const {startValue, endValue, start, end} = one.view.getOption().dataZoom[0];
    clearTimeout(waiting);
    if (event.batch) waiting = setTimeout(() => (start === 0 && end === 100 ? showAll() : zoomTo(axisOf(one.chart), startValue, endValue)), 250);
  });
}

drawAll();
for (const one of charts.filter(c => c.chart.kind === 'lines')) {
  chooseByDragging(one);
  zoomTogether(one);
}

let width = window.innerWidth;
window.addEventListener('resize', () => {
  if (window.innerWidth === width) return; // a phone changes only its height while it scrolls
  width = window.innerWidth;
  drawAll();
});
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', drawAll);
