'use strict';
// Numbers of a page: short forms, the clock of a run, smoothing and thinning.

// Formats a number in a few characters: 1.2M, 40k, 0.015, 3e-7.
function short(value) {
  const size = Math.abs(value);
  for (const [limit, unit, letter] of [[1e9, 1e9, 'G'], [1e6, 1e6, 'M'], [1e4, 1e3, 'k']]) {
    if (size >= limit) return plain(value / unit) + letter;
  }
  return plain(value);
}

// Formats a number with four digits, without zeros at its end.
function plain(value) {
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e6) return String(Number(value.toPrecision(4)));
  return value.toExponential(2).replace(/\.?0*e/, 'e').replace('e+', 'e');
}

// Returns the seconds at a step, from a table of (step, seconds); null without a table.
function secondsAt(clock, step) {
  if (!clock || clock.length === 0) return null;
  let low = 0, high = clock.length - 1;
  if (step <= clock[0][0]) return clock[0][1];
  if (step >= clock[high][0]) return clock[high][1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (clock[middle][0] <= step) low = middle; else high = middle;
  }
  const [a, s] = clock[low], [b, t] = clock[high];
  return s + (t - s) * (step - a) / (b - a || 1);
}

// Returns the exponential moving average of points (x, y), without the pull of its start towards 0.
function smoothed(points, weight) {
  let sum = 0, total = 0;
  return points.map(([x, y]) => {
    sum = weight * sum + (1 - weight) * y;
    total = weight * total + (1 - weight);
    return [x, sum / total];
  });
}

// Returns the lowest and highest point of each stretch, and both ends.
function thinned(points, most = 300) {
  if (points.length <= most) return points;
  const kept = [points[0]], stretches = most / 2;
  for (let i = 0; i < stretches; i++) {
    const part = points.slice(Math.floor(i * points.length / stretches), Math.floor((i + 1) * points.length / stretches));
    let low = 0, high = 0;
    part.forEach((p, k) => {
      if (p[1] < part[low][1]) low = k;
      if (p[1] > part[high][1]) high = k;
    });
    for (const k of new Set([Math.min(low, high), Math.max(low, high)])) kept.push(part[k]);
  }
  return [...kept, points[points.length - 1]];
}

// Returns the point of a line whose x is nearest.
function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= x) low = middle; else high = middle;
  }
  return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
}

// Returns the round numbers 1, 2, 5 times powers of ten between two positive numbers; only powers if there are many.
function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const factors = last - first > 4 ? [1] : last - first > 2 ? [1, 3] : [1, 2, 5];
  const every = Math.max(1, Math.ceil((last - first) / 6));
  const ticks = [];
  for (let power = first; power <= last; power += every) {
    for (const factor of factors) {
      const tick = Number(`${factor}e${power}`);
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  return ticks;
}

// Returns the ends and the interval of a linear axis: round numbers around two numbers.
function roundEnds(low, high) {
  if (low === high) {
    const room = Math.abs(low) / 10 || 1;
    [low, high] = [low - room, high + room];
  }
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const interval = power * [1, 2, 5, 10].find(factor => factor * power >= rough * 0.999);
  return {min: Math.floor(low / interval + 1e-6) * interval, max: Math.ceil(high / interval - 1e-6) * interval, interval};
}
