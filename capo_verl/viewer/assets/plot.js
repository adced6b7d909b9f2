// SPDX-License-Identifier: Apache-2.0
// One panel as SVG, with a crosshair for mouse, touch and arrow keys.
const W = 460, H = 250, LEFT = 58, RIGHT = 12, TOP = 10, BOTTOM = 36;

// Ticks with their labels: [{at, label}], with as many digits as tell them apart.
function linearTicks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough) ?? 10 * power;
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step);
  const magnitude = (v) => Math.floor(Math.log10(v) + 1e-9);
  const largest = Math.max(...ticks.map(Math.abs)), last = magnitude(step);
  const label = (v) => {
    if (v === 0) return "0";
    if (largest >= 1e-3 && largest < 1e9) return v.toLocaleString("en", { maximumFractionDigits: Math.max(0, -last) });
    return v.toExponential(Math.max(0, magnitude(Math.abs(v)) - last)).replace("+", "");
  };
  return ticks.map((at) => ({ at, label: label(at) }));
}

function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const every = Math.max(1, Math.ceil((last - first) / 6)), ticks = [];
  const within = last - first <= 2 ? [1, 2, 5] : [1];
  for (let e = first; e <= last; e += every) for (const m of within) ticks.push(m * 10 ** e);
  const inside = ticks.filter((t) => t >= low * 0.999 && t <= high * 1.001);
  const label = (v) => (v < 1e-2 || v >= 1e4 ? v.toExponential(0).replace("+", "") : v.toLocaleString("en"));
  return inside.length > 2 ? inside.map((at) => ({ at, label: label(at) })) : linearTicks(low, high, 6);
}

function scaleOf(panel, lines) {
  const xs = lines.flatMap((line) => line.points.map((p) => p.x));
  const ys = lines.flatMap((line) => line.points.flatMap((p) => (p.low === undefined ? [p.y] : [p.y, p.low, p.high])))
    .filter((v) => v !== null);
  const extent = (list) => list.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  let [x0, x1] = extent(xs), [y0, y1] = extent(ys);
  // A difference that is rounding counts as none: ticks in it would have no numbers of their own.
  const same = (a, b) => b - a <= 1e-10 * Math.max(Math.abs(a), Math.abs(b));
  if (same(x0, x1)) [x0, x1] = [x0 - Math.max(1, x0 / 100), x1 + Math.max(1, x1 / 100)];
  const digits = same(y0, y1) ? 4 : Math.max(4, Math.min(15, 3 + Math.ceil(Math.log10(Math.max(Math.abs(y0), Math.abs(y1)) / (y1 - y0)))));
  if (panel.log) {
    if (same(y0, y1)) [y0, y1] = [y0 / 3, y1 * 3];
    const space = 10 ** (Math.log10(y1 / y0) * 0.05);
    [y0, y1] = [y0 / space, y1 * space];
  } else {
    const space = (same(y0, y1) ? Math.abs(y1) || 1 : y1 - y0) * 0.06;
    y0 = panel.limits[0] ?? y0 - space;
    y1 = panel.limits[1] ?? y1 + space;
    if (y0 >= y1) [y0, y1] = [Math.min(...extent(ys)) - space, Math.max(...extent(ys)) + space];  // all beyond the limits
  }
  const yTicks = panel.log ? logTicks(y0, y1) : linearTicks(y0, y1, 7);
  const left = Math.max(LEFT, 12 + 6.4 * Math.max(0, ...yTicks.map((t) => t.label.length)));
  const f = panel.log ? Math.log10 : (v) => v;
  const x = (v) => left + ((v - x0) / (x1 - x0)) * (W - left - RIGHT);
  const y = (v) => H - BOTTOM - ((f(v) - f(y0)) / (f(y1) - f(y0))) * (H - TOP - BOTTOM);
  const invert = (px) => x0 + ((px - left) / (W - left - RIGHT)) * (x1 - x0);
  return { x, y, invert, left, digits, xTicks: linearTicks(x0, x1, 5), yTicks };
}

const path = (points, scale, key = "y") =>
  points.map((p, i) => `${i ? "L" : "M"}${scale.x(p.x).toFixed(1)} ${scale.y(p[key]).toFixed(1)}`).join("");

// The points between gaps, a list for each stretch.
function stretches(points) {
  const found = [[]];
  for (const p of points) {
    if (p.y !== null) found[found.length - 1].push(p);
    else if (found[found.length - 1].length) found.push([]);
  }
  return found.filter((stretch) => stretch.length);
}

function drawPanel(panel, svg) {
  const lines = linesOf(panel);
  svg.replaceChildren();
  svg.onpointermove = svg.onpointerleave = svg.onkeydown = svg.onblur = null;
  if (!lines.length) {
    svg.append(make("text", { x: W / 2, y: H / 2, "text-anchor": "middle" }, "no values of the chosen runs"));
    return;
  }
  const scale = scaleOf(panel, lines);
  for (const t of scale.yTicks)
    svg.append(
      make("line", { class: "grid", x1: scale.left, x2: W - RIGHT, y1: scale.y(t.at), y2: scale.y(t.at) }),
      make("text", { class: "tick-y", x: scale.left - 6, y: scale.y(t.at) + 4, "text-anchor": "end" }, t.label),
    );
  for (const t of scale.xTicks)
    svg.append(
      make("line", { class: "grid", x1: scale.x(t.at), x2: scale.x(t.at), y1: TOP, y2: H - BOTTOM }),
      make("text", { class: "tick-x", x: scale.x(t.at), y: H - BOTTOM + 14, "text-anchor": "middle" }, t.label),
    );
  svg.append(make("text", { x: (scale.left + W - RIGHT) / 2, y: H - 5, "text-anchor": "middle" }, DATA.axes[state.axis]));
  for (const line of lines) {
    const paint = colour(line.colour), repeat = again(line.colour);
    const parts = stretches(line.points), there = parts.flat();
    if (line.points[0].low !== undefined) {
      const edge = parts.map((part) => path(part, scale, "high") + path([...part].reverse(), scale, "low").replace("M", "L") + "Z").join("");
      svg.append(make("path", { class: "band", d: edge, style: { fill: paint, opacity: 0.16 } }));
    }
    svg.append(make("path", {
      class: "curve", d: parts.map((part) => path(part, scale)).join(""), "stroke-dasharray": line.dash, "data-label": line.label,
      style: { stroke: paint },
    }));
    const every = Math.max(1, Math.round(there.length / 10));
    const dot = (p) => svg.append(make("circle", { cx: scale.x(p.x), cy: scale.y(p.y), r: 2.4, style: { fill: paint } }));
    if (repeat)
      for (const p of there.filter((_, i) => i % every === 0)) {
        const [x, y] = [scale.x(p.x), scale.y(p.y)];
        svg.append(repeat === "again"
          ? make("circle", { class: "again", cx: x, cy: y, r: 3, style: { stroke: paint } })
          : make("rect", { class: "again", x: x - 3, y: y - 3, width: 6, height: 6, style: { stroke: paint } }));
      }
    else if (line.points.length <= 12) there.forEach(dot);
    if (line.points.length > 12) parts.filter((part) => part.length === 1).forEach(([p]) => dot(p));  // no line to a neighbour
  }
  addCrosshair(svg, lines, scale);
}

function addCrosshair(svg, lines, scale) {
  const xs = [...new Set(lines.flatMap((line) => line.points.map((p) => p.x)))].sort((a, b) => a - b);
  const cross = make("line", { class: "cross", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
  svg.append(cross);
  const number = (value) => show(value, scale.digits);
  let at = -1;
  const nearest = (points, x) => points.reduce((a, b) => (Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a));
  const look = (index, clientX, clientY) => {
    at = index;
    const x = xs[at];
    cross.setAttribute("x1", scale.x(x));
    cross.setAttribute("x2", scale.x(x));
    cross.setAttribute("visibility", "visible");
    const reach = (xs[xs.length - 1] - xs[0]) / 20;
    const rows = lines.map((line) => [line, nearest(line.points, x)]).filter(([, p]) => Math.abs(p.x - x) <= reach);
    const steps = [...new Set(rows.map(([, p]) => p.step))];
    const shown = rows.slice(0, 14).map(([line, p]) =>
      make("div", {}, swatch(line.colour), make("span", {}, line.label),
        make("b", {}, p.y === null ? "no number" : state.smoothing ? `${number(p.y)} (${number(p.raw)})` : number(p.y))));
    const more = rows.length > 14 ? [make("div", {}, `and ${rows.length - 14} more`)] : [];
    const where = state.axis === "steps" ? "" : `${show(x)} ${DATA.axes[state.axis]}, `;
    const title = `${where}step ${steps.length > 1 ? `${Math.min(...steps)} to ${Math.max(...steps)}` : steps[0]}`;
    showTip(clientX, clientY, [make("strong", {}, title), ...shown, ...more]);
  };
  const hide = () => { cross.setAttribute("visibility", "hidden"); hideTip(); };
  const closest = (x) => xs.reduce((best, v, i) => (Math.abs(v - x) < Math.abs(xs[best] - x) ? i : best), 0);
  svg.onpointermove = (event) => {
    const box = svg.getBoundingClientRect();
    const index = closest(scale.invert(((event.clientX - box.left) / box.width) * W));
    pointTip(() => look(index, event.clientX, event.clientY));
  };
  svg.onpointerleave = svg.onblur = hide;
  svg.onkeydown = (event) => {
    const to = { ArrowRight: at + 1, ArrowLeft: at < 0 ? xs.length - 1 : at - 1, Home: 0, End: xs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const index = Math.max(0, Math.min(xs.length - 1, to));
    followTip(() => {
      const box = svg.getBoundingClientRect();
      look(index, box.left + (scale.x(xs[index]) / W) * box.width, box.top + box.height / 2);
    });
  };
}
