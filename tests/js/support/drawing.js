// A board as a page of HTML and SVG: as much of Grafana's look as is needed to judge it.

const CELL = { width: 80, height: 38 };
const HEAD = 48;
const COLORS = {
  green: '#3a9d4f', yellow: '#d8a013', red: '#c9353b', blue: '#3d71d9', orange: '#e0752d', text: '#ccccdc',
};
const LINES = ['#73bf69', '#f2cc0c', '#5794f2', '#ff780a', '#f2495c', '#b877d9', '#8ab8ff', '#ffa6b0', '#96d98d', '#fade2a', '#a352cc', '#ffcb7d'];

const STYLE = `
body { margin: 0; background: #111217; color: #ccccdc; font: 13px "DejaVu Sans", sans-serif; }
h1 { font-size: 18px; font-weight: normal; margin: 0; padding: 12px 16px; height: 24px; }
h1 small { color: #8e8e99; }
section { position: absolute; box-sizing: border-box; padding: 4px; }
section > div { background: #181b1f; border: 1px solid #25262b; height: 100%; box-sizing: border-box; overflow: hidden; position: relative; }
h2 { font-size: 13px; font-weight: normal; margin: 0; padding: 5px 8px; white-space: nowrap; }
.stat { display: flex; position: absolute; inset: 26px 0 0; font-size: 30px; text-align: center; }
.stat span { flex: 1; display: flex; flex-direction: column; justify-content: center; }
.stat small { font-size: 14px; }
.legend { position: absolute; bottom: 4px; left: 8px; right: 8px; font-size: 11px; line-height: 15px; max-height: 46px; overflow: hidden; }
.legend i { display: inline-block; width: 12px; height: 3px; margin: 0 4px 3px 10px; }
.none { position: absolute; inset: 0; display: flex; align-items: center; justify-content: center; color: #8e8e99; }
table { border-collapse: collapse; width: 100%; font-size: 12px; } td, th { padding: 3px 8px; text-align: left; border-bottom: 1px solid #25262b; }
th { color: #6e9fff; font-weight: normal; }
svg text { fill: #8e8e99; font-size: 11px; }`;

/** The page of a board: `{ html, height }`. */
export function page(board, panels, marks, start, end) {
  const bottom = Math.max(...board.panels.map(({ gridPos: { y, h } }) => y + h));
  const drawn = panels.map(({ panel, answers }) => {
    const { x, y, w, h } = panel.gridPos;
    const size = { width: w * CELL.width - 10, height: h * CELL.height - 10 };
    const draw = { stat, timeseries, table }[panel.type];
    const place = `left:${x * CELL.width}px;top:${HEAD + y * CELL.height}px;width:${w * CELL.width}px;height:${h * CELL.height}px`;
    const body = draw(panel, answers, size, { marks, start, end });
    return `<section style="${place}"><div><h2>${text(panel.title)}</h2>${body}</div></section>`;
  });
  const html = `<!doctype html><meta charset="utf-8"><style>${STYLE}</style>
<h1>${text(board.title)} <small>${text(board.description)}</small></h1>${drawn.join('\n')}`;
  return { html, height: HEAD + bottom * CELL.height };
}

function stat(panel, answers) {
  const { defaults } = panel.fieldConfig;
  const shown = answers.flatMap(({ target, series }) => {
    if (series.length > 1) throw new Error(`${panel.title}: ${series.length} values`);
    const number = series.length ? Number(series[0].value[1]) : NaN;
    if (Number.isNaN(number)) return [];
    const mapped = defaults.mappings?.[0].options[number];
    if (mapped) return [{ text: mapped.text, color: COLORS[mapped.color] }];
    const label = answers.length > 1 ? `<small>${text(target.legendFormat)}</small>` : '';
    const settings = overridden(panel, target.legendFormat);
    return [{ text: format(number, settings), color: threshold(number, settings), label }];
  });
  if (shown.length === 0) shown.push({ text: defaults.noValue ?? 'No data' });
  const fill = panel.options.colorMode === 'background';
  const body = shown.map(({ text, color, label = '' }) =>
    `<span style="${fill ? `background:${color ?? 'none'}` : `color:${color}`}">${label}${text}</span>`);
  return `<div class="stat">${body.join('')}</div>`;
}

/** The settings of a field of a panel. */
function overridden({ fieldConfig: { defaults, overrides } }, name) {
  const settings = { ...defaults };
  for (const { matcher, properties } of overrides) {
    const matches = matcher.id === 'byName' ? matcher.options === name : new RegExp(matcher.options).test(name);
    if (matches) for (const { id, value } of properties) settings[id] = value;
  }
  return settings;
}

function threshold(number, { thresholds, color }) {
  if (!thresholds) return COLORS[color?.fixedColor ?? 'text'];
  const reached = thresholds.steps.filter(({ value }) => value === null || number >= value);
  return COLORS[reached.at(-1).color];
}

function timeseries(panel, answers, { width, height }, { marks, start, end }) {
  const { defaults, overrides } = panel.fieldConfig;
  const lines = answers.flatMap(({ target, series }) =>
    series.map(({ metric, values }) => ({
      name: (target.legendFormat ?? '').replace(/{{(\w+)}}/g, (_, label) => metric[label] ?? ''),
      points: values.map(([time, value]) => [time, Number(value)]).filter(([, value]) => Number.isFinite(value)),
    })),
  ).filter(({ points }) => points.length > 0);
  if (lines.length === 0) return '<div class="none">No data</div>';
  const onRight = new Set(overrides.filter(({ properties }) => properties.some(({ value }) => value === 'right')).map(({ matcher }) => matcher.options));
  const log = defaults.custom.scaleDistribution?.type === 'log';
  const values = lines.filter(({ name }) => !onRight.has(name)).flatMap(({ points }) => points.map(([, value]) => value));
  const axis = log ? logarithmic(values) : linear(values, defaults);
  const rows = Math.min(3, Math.ceil(lines.reduce((sum, { name }) => sum + name.length * 7 + 28, 0) / (width - 16)));
  const box = { left: 58, top: 30, right: width - 8, bottom: height - 26 - rows * 15 };
  const x = (time) => box.left + ((time - start) / (end - start)) * (box.right - box.left);
  const y = (value, { from, to } = axis) => {
    const [a, b, c] = log ? [from, to, Math.max(value, from)].map(Math.log10) : [from, to, value];
    return box.bottom - ((c - a) / (b - a || 1)) * (box.bottom - box.top);
  };
  const grid = axis.ticks.map((tick) => `<line x1="${box.left}" x2="${box.right}" y1="${y(tick)}" y2="${y(tick)}" stroke="#25262b"/>
    <text x="${box.left - 6}" y="${y(tick) + 4}" text-anchor="end">${format(tick, defaults)}</text>`);
  const times = [0, 0.25, 0.5, 0.75, 1].map((part) => start + part * (end - start)).map((time) => `<text x="${x(time)}" y="${box.bottom + 15}"
    text-anchor="${time === end ? 'end' : time === start ? 'start' : 'middle'}">${new Date(time * 1000).toISOString().slice(11, 19)}</text>`);
  const shown = marks.filter(({ time }) => time >= start).map(({ time, color }) => `<line x1="${x(time)}" x2="${x(time)}" y1="${box.top}" y2="${box.bottom}" stroke="${COLORS[color]}" stroke-dasharray="3"/>`);
  const drawn = lines.map(({ name, points }, index) => {
    const scale = onRight.has(name) ? linear(points.map(([, value]) => value), {}) : axis;
    const path = points.map(([time, value], at) => {
      const isBroken = at === 0 || time - points[at - 1][0] > 3;
      return `${isBroken ? 'M' : 'L'}${x(time).toFixed(1)} ${y(value, scale).toFixed(1)}`;
    });
    return `<path d="${path.join('')}" fill="none" stroke="${LINES[index % LINES.length]}" stroke-width="1.5"/>`;
  });
  const legend = lines.map(({ name }, index) => `<i style="background:${LINES[index % LINES.length]}"></i>${text(name)}`);
  return `<svg width="${width}" height="${height}" style="position:absolute;left:0;top:0">${[...grid, ...times, ...shown, ...drawn].join('')}</svg>
    <div class="legend">${legend.join('')}</div>`;
}

function linear(values, { min, max }) {
  const from = Math.min(min ?? Infinity, ...values);
  const to = Math.max(max ?? -Infinity, ...values, from + 1e-6);
  const rough = (to - from) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((it) => it * power).find((it) => it >= rough);
  const first = Math.floor(from / step) * step;
  const ticks = Array.from({ length: Math.ceil((to - first) / step) + 1 }, (_, index) => first + index * step);
  return { from: first, to: ticks.at(-1), ticks };
}

function logarithmic(values) {
  const positive = values.filter((value) => value > 0);
  const from = 10 ** Math.floor(Math.log10(Math.min(...positive, 1e9)));
  const to = 10 ** Math.ceil(Math.log10(Math.max(...positive, from * 10)));
  const ticks = [];
  for (let tick = from; tick <= to * 1.01; tick *= 10) ticks.push(tick);
  return { from, to, ticks };
}

/** Rows of the answers, as the panel's transformations leave them. */
function table(panel, answers) {
  const frames = answers.map(({ target, series }) =>
    series.map(({ metric, value: [, value] }) => ({ ...metric, [answers.length > 1 ? `Value #${target.refId}` : 'Value']: Number(value) })));
  let rows = frames.flat();
  for (const { id, options } of panel.transformations) rows = { joinByField, organize, groupingToMatrix, sortBy }[id](rows, options, frames);
  if (rows.length === 0) return `<div class="none">${panel.fieldConfig.defaults.noValue ?? 'No data'}</div>`;
  const columns = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  const cell = (row, column) => {
    const settings = overridden(panel, column);
    const value = row[column];
    const mapped = settings.mappings?.[0].options[value];
    if (mapped) return `<td style="background:${COLORS[mapped.color]}">${mapped.text}</td>`;
    return `<td>${typeof value === 'number' ? format(value, settings) : text(value ?? '')}</td>`;
  };
  const head = columns.map((column) => `<th>${text(column)}</th>`).join('');
  const body = rows.map((row) => `<tr>${columns.map((column) => cell(row, column)).join('')}</tr>`).join('');
  return `<table><tr>${head}</tr>${body}</table>`;
}

function joinByField(_, { byField }, frames) {
  const joined = new Map();
  for (const row of frames.flat()) joined.set(row[byField], { ...joined.get(row[byField]), ...row });
  return [...joined.values()];
}

function organize(rows, { excludeByName = {}, indexByName = {}, renameByName = {} }) {
  const place = (name) => indexByName[name] ?? 99;
  return rows.map((row) => {
    const kept = Object.entries(row).filter(([name]) => !excludeByName[name] && !excludeByName[`${name} 1`]);
    return Object.fromEntries(kept.sort(([a], [b]) => place(a) - place(b)).map(([name, value]) => [renameByName[name] ?? name, value]));
  });
}

function groupingToMatrix(rows, { columnField, rowField, valueField }) {
  const matrix = new Map();
  for (const row of rows) {
    const name = row[rowField];
    if (!matrix.has(name)) matrix.set(name, { [`${rowField}\\${columnField}`]: name });
    matrix.get(name)[row[columnField]] = row[valueField];
  }
  return [...matrix.values()];
}

function sortBy(rows, { sort: [{ field, desc }] }) {
  return rows.toSorted((a, b) => (desc ? b[field] - a[field] : a[field] - b[field]));
}

/** A number as Grafana writes it in this unit, or nearly. */
function format(number, { unit, decimals }) {
  const short = (value, digits = decimals ?? (Math.abs(value) < 10 && !Number.isInteger(value) ? 2 : Math.abs(value) < 100 ? 1 : 0)) => String(Number(value.toFixed(digits)));
  const scaled = (value, base, units) => {
    let index = 0;
    for (; Math.abs(value) >= base && index < units.length - 1; index++) value /= base;
    return `${short(value)} ${units[index]}`.trim();
  };
  switch (unit) {
    case 's':
      if (number !== 0 && Math.abs(number) < 0.001) return `${short(number * 1e6)} µs`;
      if (number !== 0 && Math.abs(number) < 1) return `${short(number * 1e3)} ms`;
      if (Math.abs(number) < 60) return `${short(number)} s`;
      return Math.abs(number) < 3600 ? `${short(number / 60)} min` : `${short(number / 3600)} h`;
    case 'percentunit': return `${short(number * 100)}%`;
    case 'bytes': return scaled(number, 1024, ['B', 'KiB', 'MiB', 'GiB']);
    case 'Bps': return scaled(number, 1000, ['B/s', 'kB/s', 'MB/s']);
    case 'cps': return `${scaled(number, 1000, ['', 'K', 'Mil'])} c/s`;
    case 'reqps': return `${short(number)} req/s`;
    case 'short': return scaled(number, 1000, ['', 'K', 'Mil', 'Bil']);
    case 'none': return short(number);
    default: throw new Error(`unit ${unit}`);
  }
}

function text(value) {
  return String(value).replaceAll('&', '&amp;').replaceAll('<', '&lt;');
}
