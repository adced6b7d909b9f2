// SPDX-License-Identifier: Apache-2.0
// From the data to what is drawn: which runs, averaged or not, smoothed, over which x.

// Exponential moving average, corrected for its start; in logarithms on logarithmic axes. A gap (null) stays one.
function smooth(values, log) {
  const weight = state.smoothing;
  if (!weight) return values;
  let mean = 0, total = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * (log ? Math.log(value) : value);
    total = weight * total + (1 - weight);
    return log ? Math.exp(mean / total) : mean / total;
  });
}

// Points [{step, x, y}] of one run's curve; y is null in a gap.
function pointsOf(run, panel, index) {
  const [steps, values] = run.panels[panel.key]?.[index] ?? [[], []];
  const at = state.axis === "steps" ? null : run.axes[state.axis];
  if (state.axis !== "steps" && !at) return [];
  const found = [];
  steps.forEach((step, i) => {
    const x = at ? at[step] : step;
    if (x !== undefined) found.push({ step, x, y: values[i] });
  });
  return found;
}

function averaged(runs, panel, index) {
  const at = new Map();
  for (const run of runs)
    for (const point of pointsOf(run, panel, index)) {
      if (!at.has(point.step)) at.set(point.step, []);
      at.get(point.step).push(point);
    }
  const mean = (list) => list.reduce((a, b) => a + b, 0) / list.length;
  return [...at].sort((a, b) => a[0] - b[0]).map(([step, points]) => {
    const ys = points.map((point) => point.y), x = mean(points.map((point) => point.x));
    if (ys.includes(null)) return { step, x, y: null, low: null, high: null };  // the mean of the others is of other runs
    return { step, x, y: mean(ys), low: Math.min(...ys), high: Math.max(...ys) };
  });
}

// All lines of a panel: {label, colour, dash, points, raw}.
function linesOf(panel) {
  const lines = [];
  const add = (label, number, index, points) => {
    if (points.every((point) => point.y === null)) return;
    const ys = smooth(points.map((point) => point.y), panel.log);
    const drawn = points.map((point, i) => ({ ...point, raw: point.y, y: ys[i] }));
    if (points[0].low !== undefined)
      for (const edge of ["low", "high"]) smooth(points.map((p) => p[edge]), panel.log).forEach((v, i) => (drawn[i][edge] = v));
    const curve = panel.curves[index];
    lines.push({ label: curve ? `${label}, ${curve}` : label, colour: number, dash: DASHES[index], points: drawn });
  };
  DATA.groups.forEach((group) => {
    const runs = group.runs.map((i) => DATA.runs[i]).filter((run) => !state.hidden.has(run.index));
    panel.curves.forEach((_, index) => {
      if (state.average && group.runs.length > 1) add(group.label, group.colour, index, averaged(runs, panel, index));
      else for (const run of runs) add(run.name, runColour(run), index, pointsOf(run, panel, index));
    });
  });
  return lines;
}
