// SPDX-License-Identifier: Apache-2.0
// One panel as SVG, with a crosshair for mouse, touch and arrow keys.
const W = 460, H = 250, LEFT = 58, RIGHT = 12, TOP = 10, BOTTOM = 36;

function linearTicks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step);
  return ticks;
}

function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const every = Math.max(1, Math.ceil((last - first) / 6)), ticks = [];
  const within = last - first <= 2 ? [1, 2, 5] : [1];
  for (let e = first; e <= last; e += every) for (const m of within) ticks.push(m * 10 ** e);
  const inside = ticks.filter((t) => t >= low * 0.999 && t <= high * 1.001);
  return inside.length > 2 ? inside : linearTicks(low, high, 6);
}

function scaleOf(panel, lines) {
  const xs = lines.flatMap((line) => line.points.map((p) => p.x));
  const ys = lines.flatMap((line) => line.points.flatMap((p) => (p.low === undefined ? [p.y] : [p.y, p.low, p.high])));
  let [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
  if (panel.log) {
    if (y0 === y1) [y0, y1] = [y0 / 3, y1 * 3];
    [y0, y1] = [y0 / (y1 / y0) ** 0.05, y1 * (y1 / y0) ** 0.05];
  } else {
    const space = (y1 - y0 || Math.abs(y1) || 1) * 0.06;
    y0 = panel.limits[0] ?? y0 - space;
    y1 = panel.limits[1] ?? y1 + space;
  }
  const f = panel.log ? Math.log10 : (v) => v;
  const x = (v) => LEFT + ((v - x0) / (x1 - x0)) * (W - LEFT - RIGHT);
  const y = (v) => H - BOTTOM - ((f(v) - f(y0)) / (f(y1) - f(y0))) * (H - TOP - BOTTOM);
  const invert = (px) => x0 + ((px - LEFT) / (W - LEFT - RIGHT)) * (x1 - x0);
  return { x, y, invert, xTicks: linearTicks(x0, x1, 5), yTicks: panel.log ? logTicks(y0, y1) : linearTicks(y0, y1, 7) };
}

function tickLabel(value, log) {
  if (log && Number.isInteger(Math.round(Math.log10(value) * 1e6) / 1e6) && (value < 1e-2 || value >= 1e4)) return value.toExponential(0).replace("+", "");
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(1);
  return Number(value.toPrecision(6)).toLocaleString("en");
}

const path = (points, scale, key = "y") =>
  points.map((p, i) => `${i ? "L" : "M"}${scale.x(p.x).toFixed(1)} ${scale.y(p[key]).toFixed(1)}`).join("");

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
      make("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: scale.y(t), y2: scale.y(t) }),
      make("text", { x: LEFT - 6, y: scale.y(t) + 4, "text-anchor": "end" }, tickLabel(t, panel.log)),
    );
  for (const t of scale.xTicks)
    svg.append(
      make("line", { class: "grid", x1: scale.x(t), x2: scale.x(t), y1: TOP, y2: H - BOTTOM }),
      make("text", { x: scale.x(t), y: H - BOTTOM + 14, "text-anchor": "middle" }, tickLabel(t, false)),
    );
  svg.append(make("text", { x: (LEFT + W - RIGHT) / 2, y: H - 5, "text-anchor": "middle" }, DATA.axes[state.axis]));
  for (const line of lines) {
    const paint = colour(line.colour), repeat = again(line.colour);
    if (line.points[0].low !== undefined) {
      const edge = path(line.points, scale, "high") + path([...line.points].reverse(), scale, "low").replace("M", "L") + "Z";
      svg.append(make("path", { class: "band", d: edge, style: { fill: paint, opacity: 0.16 } }));
    }
    svg.append(make("path", {
      class: "curve", d: path(line.points, scale), "stroke-dasharray": line.dash, "data-label": line.label, style: { stroke: paint },
    }));
    const every = Math.max(1, Math.round(line.points.length / 10));
    if (repeat)
      for (const p of line.points.filter((_, i) => i % every === 0)) {
        const [x, y] = [scale.x(p.x), scale.y(p.y)];
        svg.append(repeat === "again"
          ? make("circle", { class: "again", cx: x, cy: y, r: 3, style: { stroke: paint } })
          : make("rect", { class: "again", x: x - 3, y: y - 3, width: 6, height: 6, style: { stroke: paint } }));
      }
    else if (line.points.length <= 12)
      for (const p of line.points) svg.append(make("circle", { cx: scale.x(p.x), cy: scale.y(p.y), r: 2.4, style: { fill: paint } }));
  }
  addCrosshair(svg, lines, scale);
}

function addCrosshair(svg, lines, scale) {
  const xs = [...new Set(lines.flatMap((line) => line.points.map((p) => p.x)))].sort((a, b) => a - b);
  const cross = make("line", { class: "cross", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
  svg.append(cross);
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
        make("b", {}, state.smoothing ? `${show(p.y)} (${show(p.raw)})` : show(p.y))));
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
