'use strict';
// Line charts: what to draw for a chart of the page's data, under the settings of the controls.

const FEW = 30; // the most points of a line that are drawn as dots too
const MANY = 8; // the most lines that get a colour of their own
const LISTED = 10; // the most lines in a tooltip

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function palette() {
  return Array.from({length: MANY}, (_, i) => css(`--c${i}`));
}

// Returns the colour of line i of n: its own, or for many lines one on a scale from the first to the last.
function colourOf(i, n, colours) {
  return n <= MANY ? colours[i % MANY] : scaleColour(i / Math.max(1, n - 1), colours);
}

// Returns a colour between blue, for the best, and red: 0 to 1.
function scaleColour(share, colours) {
  const scale = [colours[0], '#21918c', '#5aa83c', colours[1], colours[4]];
  const at = Math.min(0.9999, Math.max(0, share)) * (scale.length - 1), k = Math.floor(at);
  const channel = (colour, c) => parseInt(colour.slice(1 + 2 * c, 3 + 2 * c), 16);
  const mixed = [0, 1, 2].map(c => Math.round(channel(scale[k], c) * (k + 1 - at) + channel(scale[k + 1], c) * (at - k)));
  return `rgb(${mixed.join(',')})`;
}

// Returns what the x axis of a chart shows: 'step', 'seconds' or the name of a setting.
function axisOf(chart) {
  return chart.x === 'step' ? settings.x : chart.x;
}

// Returns points (x, y) of (step, y) or (step, y, seconds).
function placed(points, axis, clock) {
  if (axis !== 'seconds') return points.map(p => [p[0], p[1]]);
  return points.map(p => [p.length > 2 ? p[2] : secondsAt(clock, p[0]), p[1]]).filter(p => p[0] !== null);
}

// Returns the lines of a chart, those of other runs included: {name, colour, dashed, dots, points, means}.
function linesOf(chart) {
  const axis = axisOf(chart), colours = palette(), dots = new Set(chart.dots || []);
  const lines = chart.lines.map((line, i) => ({
    name: line.name, colour: colourOf(i, chart.lines.length, colours), dashed: false, dots: dots.has(line.name),
    points: placed(line.points, axis, page.clock), means: placed(line.means || line.points, axis, page.clock),
  }));
  overlays.forEach((run, number) => chart.lines.forEach((line, i) => {
    const values = line.key ? run.series[line.key] : null;
    if (!values) return;
    const points = placed(values.map(([step, y]) => [step, y * (chart.scale || 1)]), axis, run.clock);
    const place = chart.lines.length + number * chart.lines.length + i;
    lines.push({name: `${run.name}: ${line.name}`, colour: colours[place % MANY], dashed: true, dots: false, points, means: points});
  }));
  return lines.filter(line => line.points.length > 0);
}

function isLog(values) {
  const low = Math.min(...values), high = Math.max(...values);
  if (settings.y === 'linear' || high <= 0) return false;
  return settings.y === 'log' || (low > 0 && high / low > 20);
}

// Returns the series of a line. While lines are smoothed, the raw line stays behind it, faint and under the same name.
function seriesOf(line, many) {
  const smooth = settings.smooth > 0 && line.means.length > 2 && !line.dots;
  const drawn = smooth ? smoothed(line.means, settings.smooth) : line.points;
  const width = many ? 1.3 : drawn.length <= 2 ? 1 : 1.9;
  const one = {
    type: line.dots ? 'scatter' : 'line', name: line.name, data: drawn, symbol: 'circle', symbolSize: line.dots ? 7 : 6,
    showSymbol: drawn.length <= FEW, itemStyle: {color: line.colour},
    lineStyle: {color: line.colour, width, type: line.dashed ? [5, 4] : 'solid'}, emphasis: {disabled: !many, focus: 'series'},
    blur: {lineStyle: {opacity: 0.15}, itemStyle: {opacity: 0.15}}, z: 3,
  };
  if (!smooth) return [one];
  const raw = {
    ...one, data: line.points, showSymbol: false, silent: true, z: 2, lineStyle: {...one.lineStyle, width: 1, opacity: 0.3},
  };
  return [one, raw];
}

// Returns a dotted line at the target.
function targetSeries(chart, low, high) {
  const colour = css('--ink');
  return {
    type: 'line', name: `target ${short(chart.target)}`, data: [[low, chart.target], [high, chart.target]], symbol: 'none', silent: true,
    z: 1, itemStyle: {color: colour}, lineStyle: {color: colour, width: 1.2, type: [2, 5]},
  };
}

// Returns the tooltip of a chart: x, and the value of each line near it; of many lines, those nearest to the pointer.
function tipOf(chart, lines, view) {
  const axis = axisOf(chart);
  return params => {
    const x = params.length ? params[0].axisValue : null;
    if (x === null) return '';
    const shown = (view.getOption().legend[0] || {}).selected || {};
    const span = lines.spanOfX || 1;
    const rows = lines.filter(line => shown[line.name] !== false)
      .map(line => [line, nearest(line.points, x)]).filter(([, p]) => Math.abs(p[0] - x) <= 0.02 * span);
    const height = p => view.convertToPixel({yAxisIndex: 0}, p[1]);
    if (rows.length > LISTED) rows.sort((a, b) => Math.abs(height(a[1]) - pointer.y) - Math.abs(height(b[1]) - pointer.y));
    const head = `${axis} ${short(Number(x.toPrecision(6)))}`;
    return tip(head, rows.slice(0, LISTED).map(([line, p]) => [line.colour, line.name, short(p[1])]), rows.length - LISTED);
  };
}

// Returns the element of a tooltip. All text is set as text.
function tip(head, rows, more = 0) {
  const box = document.createElement('div');
  box.className = 'tip';
  const add = (parent, kind, text) => {
    const element = parent.appendChild(document.createElement(kind));
    element.textContent = text;
    return element;
  };
  add(box, 'strong', head);
  for (const [colour, name, value] of rows) {
    const row = add(box, 'div', '');
    if (colour) add(row, 'i', '').style.background = colour;
    add(row, 'span', name);
    add(row, 'b', value);
  }
  if (more > 0) add(box, 'div', `and ${more} more`);
  return box;
}

function tooltipLook() {
  return {
    confine: true, backgroundColor: css('--card'), borderColor: css('--line'), padding: [6, 9],
    textStyle: {color: css('--ink'), fontSize: 12}, extraCssText: 'z-index: 5;',
  };
}

// Returns text that fits into a number of pixels, with dots for what is cut.
function cut(text, pixels, pixelsOfLetter = 7) {
  const most = Math.max(4, Math.floor(pixels / pixelsOfLetter));
  return text.length <= most ? text : `${text.slice(0, most - 1)}\u2026`;
}

// Returns the legend of these names; it scrolls if they do not fit, and long names are cut.
function legendOf(names, room) {
  return {
    type: 'scroll', show: names.length > 1, data: names, left: 0, right: 0, top: 0, itemWidth: 16, itemHeight: 9,
    formatter: name => cut(name, Math.min(260, room / 2)), textStyle: {color: css('--soft'), fontSize: 12, lineHeight: 16},
    pageTextStyle: {color: css('--soft')}, pageIconColor: css('--soft'), pageIconInactiveColor: css('--line'),
    inactiveColor: css('--line'), tooltip: {show: true, ...tooltipLook(), formatter: p => tip(p.name, [])},
  };
}

// Returns what the options of all charts share.
function look() {
  return {animation: false, aria: {enabled: true}, textStyle: {fontFamily: getComputedStyle(document.body).fontFamily}};
}

function axisLook() {
  return {
    axisLine: {show: false}, axisTick: {show: false}, splitLine: {lineStyle: {color: css('--line')}},
    axisLabel: {color: css('--soft'), fontSize: 11, formatter: short, hideOverlap: true},
  };
}

// Returns the y axis for values between two numbers.
function yAxis(log, low, high) {
  const axis = axisLook();
  if (!log) return {type: 'value', ...roundEnds(low, high), ...axis};
  const ticks = logTicks(low, high);
  axis.axisLabel.customValues = ticks;
  axis.axisTick.customValues = ticks;
  return {type: 'log', min: low, max: high, ...axis};
}

// Returns the ends of an axis with a little room beside the outermost points.
function widened(low, high, log) {
  if (log) return [low / (high / low) ** 0.04, high * (high / low) ** 0.04];
  const room = 0.04 * (high - low) || 1;
  return [low - room, high + room];
}

// Returns the values of a setting as ticks if they are few, else null.
function valuesOf(values) {
  const different = [...new Set(values)].sort((a, b) => a - b);
  return different.length <= MANY ? different : null;
}

// Returns the points that are seen while the x axis ends at these numbers, and their neighbours outside.
function seen(points, from, to) {
  let first = points.findIndex(p => p[0] >= from), last = points.length - 1;
  if (first < 0) first = points.length;
  while (last >= 0 && points[last][0] > to) last--;
  return points.slice(Math.max(0, first - 1), last + 2);
}

// Returns the option of a chart of lines for ECharts, and the words for its caption.
function linesOption(chart, view, narrow, room) {
  const lines = linesOf(chart), axis = axisOf(chart), onRun = axis === 'step' || axis === 'seconds';
  const zoom = settings.zoom && settings.zoom.axis === axis ? settings.zoom : null;
  const xs = lines.flatMap(line => [line.points[0][0], line.points[line.points.length - 1][0]]);
  const [low, high] = onRun ? [0, Math.max(...xs)] : widened(Math.min(...xs), Math.max(...xs), chart.log_x);
  const [from, to] = zoom ? [zoom.from, zoom.to] : [low, high];
  const values = lines.flatMap(line => seen(line.points, from, to).map(p => p[1])).concat('target' in chart ? [chart.target] : []);
  const log = isLog(values);
  if (log) {
    for (const line of lines) for (const kind of ['points', 'means']) line[kind] = line[kind].filter(p => p[1] > 0);
  }
  const drawn = lines.filter(line => line.points.length > 0), many = drawn.length > MANY;
  drawn.spanOfX = to - from;
  const series = drawn.flatMap(line => seriesOf(line, many));
  if ('target' in chart && (!log || chart.target > 0)) series.push(targetSeries(chart, low, high));
  const names = [...new Set(series.map(s => s.name))], shown = log ? values.filter(v => v > 0) : values;
  const x = {
    ...axisLook(), type: chart.log_x ? 'log' : 'value', min: low, max: high, splitLine: {show: false}, splitNumber: narrow ? 4 : 6,
  };
  x.axisLabel.showMaxLabel = axis === 'seconds' && !zoom ? false : null;
  if (!onRun) {
    const few = valuesOf(lines.flatMap(line => line.points.map(p => p[0])));
    x.axisLabel.customValues = few || (chart.log_x ? logTicks(low, high) : undefined);
  }
  const option = {
    ...look(), grid: {left: 6, right: 18, top: names.length > 1 ? 34 : 12, bottom: 4, containLabel: true},
    tooltip: {trigger: 'axis', ...tooltipLook(), axisPointer: {lineStyle: {color: css('--soft')}}, formatter: tipOf(chart, drawn, view)},
    legend: legendOf(names, room), xAxis: x, yAxis: yAxis(log, Math.min(...shown), Math.max(...shown)), series,
    dataZoom: [{
      type: 'inside', xAxisIndex: 0, filterMode: 'none', zoomOnMouseWheel: 'ctrl', moveOnMouseMove: false, moveOnMouseWheel: false,
      preventDefaultMouseMove: false, minSpan: 3, startValue: from, endValue: to,
    }],
  };
  const seconds = `over seconds of training${page.compiles ? ' with compilation' : ''}`;
  const over = axis === 'step' ? 'over steps' : axis === 'seconds' ? seconds : '';
  return {option, words: [over, log ? 'logarithmic' : ''].filter(Boolean).join(', ')};
}
