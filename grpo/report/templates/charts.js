"use strict";
// Draws one chart of the report as SVG: lines with bands, stacked areas, or points with error bars. Hovering and the
// arrow keys read values. Text goes into text nodes only.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 190, WIDE_HEIGHT = 260, TOP = 20, BOTTOM = 34, RIGHT = 12;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Numbers

function shown(value, format) {
  if (value === null || value === undefined) return "none";
  if (format === "percent") return `${plainNumber(100 * value, 3)} %`;
  if (format === "integer") return plainNumber(value, Math.abs(value) < 100 ? 3 : 0);
  return plainNumber(value, 4);
}

// So many significant digits (0: whole), thousands apart, very small ones as powers of ten.
function plainNumber(value, digits) {
  if (value === 0) return "0";
  if (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e9) return value.toExponential(2).replace("e", " e");
  const options = digits ? { maximumSignificantDigits: digits } : { maximumFractionDigits: 0 };
  return value.toLocaleString("en", options);
}

function niceStep(span, count) {
  const rough = span / count, power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
}

function multiples(low, high, step) {
  const found = [];
  for (let place = Math.ceil(low / step - 1e-9); place * step <= high + step * 1e-9; place++) found.push(place * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) found.push(10 ** power);
  const inside = found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
  return inside.length > 1 ? inside : [low, high];
}

// Scales

function valuesOf(chart, visible) {
  if (chart.kind === "stack") return stacked(chart, visible).flatMap((layer) => layer.top);
  return visible.flatMap((one) => [...one.y, ...(one.low || []), ...(one.high || [])]).filter((v) => v !== null);
}

function verticalScale(chart, visible, height) {
  const values = valuesOf(chart, visible);
  const own = visible.flatMap((one) => one.y).filter((v) => v !== null);
  const log = chart.log && own.every((v) => v > 0) && Math.max(...own) > 30 * Math.min(...own);
  let low = Math.min(...(log ? own : values)), high = Math.max(...(log ? own : values));
  // A limit is drawn where it does not squeeze the curve into a line.
  for (const mark of chart.marks) if (mark.value < high + 2 * (high - Math.min(low, 0))) high = Math.max(high, mark.value);
  if (chart.from_zero && !log) low = Math.min(low, 0);
  if (chart.kind === "points") high = Math.max(high, 0.05);
  if (low === high) {
    const around = Math.abs(low) * 0.1 || (chart.format === "percent" ? 0.01 : 1);
    low -= chart.from_zero ? 0 : around;
    high += around;
  }
  const room = TOP, bottom = height - BOTTOM;
  if (log) {
    const [from, to] = [Math.log10(low), Math.log10(high)];
    const at = (v) => bottom - ((Math.log10(Math.max(v, low)) - from) / (to - from)) * (bottom - room);
    return { at, ticks: logTicks(low, high), low, high, log };
  }
  const step = niceStep(high - low, height > HEIGHT ? 5 : 4);
  low = Math.floor(low / step + 1e-9) * step;
  high = Math.ceil(high / step - 1e-9) * step;
  const at = (v) => bottom - ((v - low) / (high - low)) * (bottom - room);
  return { at, ticks: multiples(low, high, step), low, high, log };
}

function stacked(chart, visible) {
  const sums = visible.length ? visible[0].x.map(() => 0) : [];
  return visible.map((one) => {
    const base = [...sums];
    one.y.forEach((value, place) => { sums[place] += value || 0; });
    return { one, base, top: [...sums] };
  });
}

// Paths; a null is a gap

function linePath(xs, ys, x, y) {
  let path = "", pen = "M";
  xs.forEach((step, place) => {
    if (ys[place] === null) { pen = "M"; return; }
    path += `${pen}${x(step).toFixed(1)} ${y(ys[place]).toFixed(1)}`;
    pen = "L";
  });
  return path;
}

function bandPath(xs, lows, highs, x, y) {
  let path = "", run = [];
  const close = () => {
    if (run.length > 1) {
      const there = run.map((place) => `${x(xs[place]).toFixed(1)} ${y(highs[place]).toFixed(1)}`);
      const back = run.map((place) => `${x(xs[place]).toFixed(1)} ${y(lows[place]).toFixed(1)}`).reverse();
      path += `M${there.join("L")}L${back.join("L")}Z`;
    }
    run = [];
  };
  xs.forEach((_, place) => (lows[place] === null || highs[place] === null ? close() : run.push(place)));
  close();
  return path;
}

// A chart

function drawChart(chart, commonEnd) {
  const figure = element("figure", { class: chart.wide ? "chart wide" : "chart" });
  figure.append(element("h3", {}, chart.title));
  if (chart.about) figure.append(element("p", { class: "about" }, chart.about));
  const svg = shape("svg", { tabindex: 0, role: "img", "aria-label": description(chart) });
  const readout = element("div", { class: "readout", role: "status" });
  readout.hidden = true;
  figure.append(svg, readout);
  const hidden = new Set();
  const state = { chart, svg, readout, hidden, place: null, commonEnd };
  if (chart.series.length > 1) figure.append(legend(state));
  listen(state);
  new ResizeObserver(() => redraw(state)).observe(figure);
  return figure;
}

function description(chart) {
  const ends = chart.series.map((one) => {
    const known = one.y.filter((value) => value !== null);
    return `${one.label}: ${shown(known[0], chart.format)} at first, ${shown(known[known.length - 1], chart.format)} at last`;
  });
  return `${chart.title}${chart.unit ? ` in ${chart.unit}` : ""} over steps. ${ends.join("; ")}. Arrow keys read the values.`;
}

function legend(state) {
  const list = element("ul", { class: "legend" });
  state.chart.series.forEach((one, place) => {
    const button = element("button", { type: "button", "aria-pressed": "true" });
    button.append(element("span", { class: `key s${one.colour % 8}` }), one.label);
    button.addEventListener("click", () => {
      if (!state.hidden.delete(place)) state.hidden.add(place);
      button.setAttribute("aria-pressed", String(!state.hidden.has(place)));
      redraw(state);
    });
    list.append(element("li", {}, button));
  });
  return list;
}

function visibleSeries(state) {
  return state.chart.series.filter((_, place) => !state.hidden.has(place));
}

function redraw(state) {
  const { chart, svg } = state, width = svg.clientWidth;
  if (!width) return;
  const height = chart.wide ? WIDE_HEIGHT : HEIGHT, visible = visibleSeries(state);
  svg.replaceChildren();
  svg.setAttribute("height", height);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  state.readout.hidden = true;
  state.steps = [...new Set(visible.flatMap((one) => one.x))].sort((a, b) => a - b);
  if (!state.steps.length) return;
  const y = verticalScale(chart, visible, height);
  const labels = y.ticks.map((value) => tickLabel(value, y, chart.format));
  const left = 12 + 7 * Math.max(...labels.map((label) => label.length));
  const first = state.steps[0], end = Math.max(state.steps[state.steps.length - 1], state.commonEnd || 0);
  const x = (step) => (first === end ? (left + width - RIGHT) / 2 : left + ((step - first) / (end - first)) * (width - RIGHT - left));
  Object.assign(state, { x, y, left, width, height });
  axes(state, labels, first, end);
  if (chart.kind === "stack") drawStack(state, visible);
  else visible.forEach((one) => drawSeries(state, one));
  for (const mark of chart.marks) drawMark(state, mark);
  state.cross = shape("g", {});
  svg.append(state.cross);
}

function tickLabel(value, y, format) {
  if (y.log) return value < 1e-4 || value >= 1e4 ? value.toExponential(0) : plainNumber(value, 2);
  if (format === "percent") return `${plainNumber(100 * value, 4)} %`;
  if (Math.max(Math.abs(y.low), Math.abs(y.high)) < 1e-3) return value === 0 ? "0" : value.toExponential(1);
  return plainNumber(Math.abs(value) < 1e-12 ? 0 : value, 4);
}

function axes(state, labels, first, end) {
  const { svg, x, y, left, width, height, chart } = state, bottom = height - BOTTOM;
  y.ticks.forEach((value, place) => {
    svg.append(shape("line", { class: "grid", x1: left, x2: width - RIGHT, y1: y.at(value), y2: y.at(value) }));
    svg.append(shape("text", { x: left - 6, y: y.at(value) + 4, "text-anchor": "end" }, labels[place]));
  });
  svg.append(shape("line", { class: "axis", x1: left, x2: width - RIGHT, y1: bottom, y2: bottom }));
  const count = Math.max(Math.floor((width - left) / 80), 2);
  const marks = first === end ? [first] : multiples(first, end, Math.max(niceStep(end - first, count), 1));
  if (marks[0] !== first && x(marks[0]) - x(first) > 40) marks.unshift(first);
  for (const step of marks) {
    svg.append(shape("text", { x: x(step), y: bottom + 15, "text-anchor": "middle" }, plainNumber(step, 0)));
  }
  svg.append(shape("text", { x: width - RIGHT, y: height - 4, "text-anchor": "end" }, "step"));
  if (chart.unit) svg.append(shape("text", { x: 2, y: 10 }, chart.unit + (y.log ? ", logarithmic" : "")));
}

function drawSeries(state, one) {
  const { svg, x, y, chart } = state, paint = `s${one.colour % 8}${one.colour >= 8 ? " dash" : ""}`;
  if (chart.kind === "points") { drawPoints(state, one, paint); return; }
  if (one.low) svg.append(shape("path", { class: `band ${paint}`, d: bandPath(one.x, one.low, one.high, x, clampedTo(y)) }));
  const known = one.y.filter((value) => value !== null).length;
  svg.append(shape("path", { class: `curve ${one.trend ? "thin " : ""}${paint}`, d: linePath(one.x, one.y, x, y.at) }));
  if (one.trend) svg.append(shape("path", { class: `curve trend ${paint}`, d: linePath(one.x, one.trend, x, y.at) }));
  if (known <= 2) dots(svg, one, x, y.at, paint, 3.5);
}

function clampedTo(y) {
  return (value) => y.at(Math.min(Math.max(value, y.low), y.high));
}

function drawPoints(state, one, paint) {
  const { svg, x, y } = state;
  svg.append(shape("path", { class: `curve thin ${paint}`, d: linePath(one.x, one.y, x, y.at) }));
  const aside = (state.chart.series.indexOf(one) - (state.chart.series.length - 1) / 2) * 5;
  one.x.forEach((step, place) => {
    if (one.low[place] === null || one.high[place] === null) return;
    const across = x(step) + aside;
    svg.append(shape("line", { class: `error ${paint}`, x1: across, x2: across, y1: y.at(one.low[place]), y2: y.at(one.high[place]) }));
  });
  dots(svg, one, (step) => x(step) + aside, y.at, paint, 4);
}

function dots(svg, one, x, at, paint, radius) {
  one.x.forEach((step, place) => {
    if (one.y[place] !== null) svg.append(shape("circle", { class: `dot ${paint}`, cx: x(step), cy: at(one.y[place]), r: radius }));
  });
}

function drawStack(state, visible) {
  const { svg, x, y, chart } = state;
  for (const { one, base, top } of stacked(chart, visible)) {
    svg.append(shape("path", { class: `area s${one.colour % 8}`, d: bandPath(one.x, base, top, x, y.at) }));
  }
}

function drawMark(state, mark) {
  const { svg, y, left, width, chart } = state;
  if (mark.value > y.high || mark.value < y.low) return;
  const at = y.at(mark.value);
  svg.append(shape("line", { class: "limit", x1: left, x2: width - RIGHT, y1: at, y2: at }));
  const above = at > TOP + 12 ? -5 : 13;
  svg.append(shape("text", { class: "limit-text", x: width - RIGHT - 2, y: at + above, "text-anchor": "end" }, `${mark.label} ${shown(mark.value, chart.format)}`));
}

// Reading values

function listen(state) {
  const { svg, readout } = state;
  svg.addEventListener("pointermove", (event) => {
    const across = event.clientX - svg.getBoundingClientRect().left;
    point(state, nearest(state, across));
  });
  svg.addEventListener("pointerdown", (event) => point(state, nearest(state, event.clientX - svg.getBoundingClientRect().left)));
  svg.addEventListener("pointerleave", () => forget(state));
  svg.addEventListener("blur", () => forget(state));
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) point(state, state.steps.length - 1); });
  svg.addEventListener("keydown", (event) => {
    const end = state.steps.length - 1, place = state.place === null ? end : state.place;
    const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: end };
    if (event.key === "Escape") forget(state);
    if (!(event.key in moves)) return;
    event.preventDefault();
    point(state, Math.min(Math.max(moves[event.key], 0), end));
  });
  readout.addEventListener("pointerenter", () => forget(state));
}

function nearest(state, across) {
  let best = 0;
  (state.steps || []).forEach((step, place) => {
    if (Math.abs(state.x(step) - across) < Math.abs(state.x(state.steps[best]) - across)) best = place;
  });
  return best;
}

function forget(state) {
  state.place = null;
  state.readout.hidden = true;
  if (state.cross) state.cross.replaceChildren();
}

function point(state, place) {
  const { steps, x, y, cross, readout, svg, height, chart } = state;
  if (!steps || !steps.length) return;
  state.place = place;
  const step = steps[place], across = x(step), visible = visibleSeries(state);
  cross.replaceChildren(shape("line", { class: "cross", x1: across, x2: across, y1: TOP, y2: height - BOTTOM }));
  const span = Math.max(...visible.map((one) => one.span || 1));
  const before = place ? steps[place - 1] + 1 : Math.max(step - span + 1, 1);
  readout.replaceChildren(element("div", {}, span > 1 ? `steps ${before} to ${step}, mean` : `step ${plainNumber(step, 0)}`));
  for (const one of visible) {
    const at = one.x.indexOf(step);
    if (at < 0 || one.y[at] === null) continue;
    if (chart.kind === "line") cross.append(shape("circle", { class: `dot s${one.colour % 8}`, cx: across, cy: y.at(one.y[at]), r: 3.5 }));
    readout.append(line(one, at, chart));
  }
  readout.hidden = false;
  const room = svg.clientWidth - readout.offsetWidth - 8, aside = across + 14 > room ? across - readout.offsetWidth - 14 : across + 14;
  readout.style.left = `${svg.offsetLeft || 12}px`;
  readout.style.left = `${Math.max(Math.min(aside, room), 8)}px`;
  readout.style.top = `${svg.getBoundingClientRect().top - svg.parentElement.getBoundingClientRect().top + TOP}px`;
}

function line(one, at, chart) {
  const row = element("div", {}, element("span", { class: `key s${one.colour % 8}` }), `${one.label} `);
  row.append(element("b", {}, shown(one.y[at], chart.format)));
  if (one.low && one.low[at] !== null) row.append(` (${shown(one.low[at], chart.format)} to ${shown(one.high[at], chart.format)}, ${one.band})`);
  return row;
}
