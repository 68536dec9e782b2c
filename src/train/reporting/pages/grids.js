'use strict';
// Heatmaps, the confusion matrix, and parallel coordinates.

const VIRIDIS = ['#440154', '#3b528b', '#21918c', '#5ec962', '#fde725'];

function labelLook(width) {
  return {color: css('--soft'), fontSize: 11, width, overflow: 'truncate', ellipsis: '...'};
}

// Returns a name that fits into a number of pixels, with dots in its middle, as names of layers differ at both ends.
function cutInside(name, pixels) {
  const most = Math.max(4, Math.floor(pixels / 6.6)), half = Math.floor((most - 1) / 2);
  return name.length <= most ? name : `${name.slice(0, half)}\u2026${name.slice(name.length - half)}`;
}

// Returns a scale of colours under or over a grid; `format` turns its numbers into words.
function colourScale(low, high, colours, format, place) {
  return {
    type: 'continuous', min: low, max: high, dimension: 2, calculable: false, orient: 'horizontal', itemWidth: 10, itemHeight: 130,
    text: [format(high), format(low)], textStyle: {color: css('--soft'), fontSize: 11}, inRange: {color: colours}, ...place,
  };
}

// Returns the option of a heatmap over layers and steps.
function heatmapOption(chart, view, narrow) {
  const cells = chart.values.flatMap((row, y) => row.map((v, x) => [x, y, v])).filter(c => c[2] !== null);
  const values = cells.map(c => c[2]), log = isLog(values);
  const shown = (log ? cells.filter(c => c[2] > 0) : cells).map(([x, y, v]) => [x, y, log ? Math.log10(v) : v, v]);
  const numbers = shown.map(c => c[2]), back = v => short(log ? 10 ** v : v);
  const seconds = settings.x === 'seconds' && page.clock.length > 0;
  const steps = chart.steps.map(step => short(Number((seconds ? secondsAt(page.clock, step) : step).toPrecision(4))));
  const width = Math.min(narrow ? 120 : 190, 7 * Math.max(...chart.names.map(n => n.length)));
  const tall = Math.max(5, Math.min(15, 640 / chart.names.length));
  const option = {
    ...look(), grid: {left: width + 12, right: 12, top: 30, bottom: 22},
    tooltip: {
      ...tooltipLook(), formatter: p => tip(chart.names[p.data[1]], [
        [null, seconds ? 'seconds' : 'step', steps[p.data[0]]], [null, chart.title, short(p.data[3])],
      ]),
    },
    xAxis: {type: 'category', data: steps, axisLine: {show: false}, axisTick: {show: false}, axisLabel: {...labelLook(), hideOverlap: true}},
    yAxis: {
      type: 'category', data: chart.names, inverse: true, axisLine: {show: false}, axisTick: {show: false},
      axisLabel: {...labelLook(), interval: Math.ceil(13 / tall) - 1, formatter: name => cutInside(name, width)},
    },
    visualMap: colourScale(Math.min(...numbers), Math.max(...numbers), VIRIDIS, back, {right: 4, top: 0}),
    series: [{type: 'heatmap', data: shown, emphasis: {itemStyle: {borderColor: css('--ink'), borderWidth: 1}}}],
  };
  const left = chart.left_out ? `; ${chart.left_out} layers with smaller values are in the table only` : '';
  const words = `over layers and ${seconds ? 'seconds' : 'steps'}${log ? ', logarithmic' : ''}${left}`;
  return {option, words, height: 66 + tall * chart.names.length};
}

// Returns the option of a confusion matrix: a row for each label, its colour the share of the label's examples.
function confusionOption(chart, view, narrow, room) {
  const cells = [];
  chart.matrix.forEach((row, y) => {
    const total = row.reduce((a, b) => a + b, 0);
    row.forEach((count, x) => {
      if (count > 0) cells.push([x, y, count / total, count]);
    });
  });
  const longest = Math.max(...chart.names.map(n => n.length)), width = Math.min(narrow ? 80 : 130, 8 + 7 * longest);
  const turned = longest > 3, dark = matchMedia('(prefers-color-scheme: dark)').matches;
  const percent = share => `${Math.round(100 * share)} %`;
  const category = {
    type: 'category', data: chart.names, axisLine: {show: false}, axisTick: {show: false},
    nameTextStyle: {color: css('--soft'), fontSize: 12}, nameLocation: 'middle',
  };
  const option = {
    ...look(),
    grid: {left: width + 26, right: 10, top: 28, bottom: (turned ? width : 18) + 26},
    tooltip: {
      ...tooltipLook(), formatter: p => tip(`label ${chart.names[p.data[1]]}`, [
        [null, `predicted ${chart.names[p.data[0]]}`, short(p.data[3])], [null, 'share of the label', percent(p.data[2])],
      ]),
    },
    xAxis: {
      ...category, name: 'prediction', nameGap: (turned ? width : 18) + 6,
      axisLabel: {...labelLook(turned ? width : undefined), rotate: turned ? 90 : 0, hideOverlap: true},
    },
    yAxis: {...category, name: 'label', inverse: true, nameGap: width + 8, axisLabel: {...labelLook(width), hideOverlap: true}},
    visualMap: colourScale(0, 1, dark ? ['#23303b', '#2a78b5', '#a5d8f7'] : ['#eef5fa', '#56a7d8', '#004f7d'], percent, {right: 4, top: 0}),
    series: [{
      type: 'heatmap', data: cells, itemStyle: {borderColor: css('--card'), borderWidth: chart.names.length > 40 ? 0 : 1},
      label: {
        show: chart.numbered, fontSize: narrow ? 9 : 11, formatter: p => (p.data[2] > 0.5 !== dark ? '{light|' : '{dark|') + `${p.data[3]}}`,
        rich: {light: {color: '#ffffff'}, dark: {color: dark ? '#10161b' : '#1c2024'}},
      },
    }],
  };
  return {option, words: 'examples by label and prediction', height: Math.min(room, 620)};
}

// Returns the option of parallel coordinates: an axis for each setting and for the result, a line for each member.
function parallelOption(chart, view, narrow) {
  const last = chart.axes.length - 1, results = chart.members.map(m => m.values[last]).filter(v => typeof v === 'number');
  const low = Math.min(...results), high = Math.max(...results);
  const log = chart.axes[last].log, to = v => (log ? Math.log10(v) : v);
  const colours = palette(), better = v => (to(v) - to(low)) / (to(high) - to(low) || 1);
  const colour = v => typeof v !== 'number' ? css('--soft') : scaleColour(chart.lower ? better(v) : 1 - better(v), colours);
  const axes = chart.axes.map((axis, dim) => parallelAxis(axis, dim, chart.members.map(m => m.values[dim]), narrow));
  const option = {
    ...look(), tooltip: tooltipLook(),
    parallel: {
      layout: narrow ? 'vertical' : 'horizontal', left: narrow ? 24 : 60, right: narrow ? 30 : 90, top: narrow ? 40 : 42, bottom: narrow ? 30 : 22,
      axisExpandable: false,
    },
    parallelAxis: axes,
    series: [{
      type: 'parallel', smooth: false, inactiveOpacity: 0.04, activeOpacity: 0.9,
      data: chart.members.map(m => ({
        name: m.name, value: m.values.map(v => (v === null ? '-' : v)), lineStyle: {color: colour(m.values[last]), width: 1.6, opacity: 0.75},
      })),
      tooltip: {
        formatter: p => tip(p.name, chart.axes.map((axis, k) => {
          const v = chart.members[p.dataIndex].values[k];
          return [null, axis.name, v === null ? '-' : axis.names ? axis.names[v] : short(v)];
        })),
      },
    }],
  };
  return {option, words: 'the best members are blue', height: narrow ? 90 + 74 * axes.length : 340};
}

// Returns an axis of parallel coordinates. Few values are its ticks.
function parallelAxis(axis, dim, values, narrow) {
  const numbers = values.filter(v => typeof v === 'number');
  const ends = axis.log ? {min: Math.min(...numbers), max: Math.max(...numbers)} : {};
  const ticks = axis.names ? undefined : valuesOf(numbers) || (axis.log ? logTicks(ends.min, ends.max) : undefined);
  return {
    dim, name: axis.name, type: axis.names ? 'category' : axis.log ? 'log' : 'value', data: axis.names || undefined,
    scale: true, ...ends,
    nameLocation: narrow ? 'middle' : 'end',
    nameTextStyle: {color: css('--ink'), fontSize: 12, backgroundColor: css('--card'), padding: [1, 4], borderRadius: 3},
    nameGap: narrow ? -26 : 12,
    nameTruncate: {maxWidth: narrow ? 300 : 170, ellipsis: '...'}, axisLine: {lineStyle: {color: css('--soft')}},
    axisTick: {customValues: ticks}, axisLabel: {
      color: css('--ink'), fontSize: 11, formatter: value => (axis.names ? cut(value, 100) : short(value)), customValues: ticks,
      backgroundColor: css('--card'), padding: [1, 3], borderRadius: 3, hideOverlap: true,
    },
  };
}
