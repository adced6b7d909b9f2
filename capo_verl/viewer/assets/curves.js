// SPDX-License-Identifier: Apache-2.0
// The section of curves: its controls and one figure for each panel.

function dashKey(index) {
  return make("svg", { viewBox: "0 0 26 8", "aria-hidden": "true" },
    make("line", { x1: 0, x2: 26, y1: 4, y2: 4, "stroke-width": 2, "stroke-dasharray": DASHES[index], style: { stroke: "var(--dim)" } }));
}

function buildCurves() {
  const plots = document.getElementById("plots"), redraws = [];
  for (const panel of DATA.panels) {
    const svg = make("svg", {
      class: "plot", viewBox: `0 0 ${W} ${H}`, tabindex: 0, role: "img",
      "aria-label": `${panel.title}, ${panel.unit}. Arrow keys read values.`,
    });
    const keys = panel.curves.length > 1 ? panel.curves.map((name, i) => make("span", { class: "key" }, dashKey(i), name)) : [];
    plots.append(make("figure", { id: `panel-${panel.key}` },
      make("figcaption", {}, `${panel.title} `, make("small", {}, make("span", { class: "key" }, panel.unit), ...keys)), svg));
    redraws.push(() => drawPanel(panel, svg));
  }
  const redraw = () => { hideTip(); redraws.forEach((draw) => draw()); };

  const boxes = document.getElementById("runs");
  DATA.runs.forEach((run) => {
    const box = make("input", {
      type: "checkbox", checked: true,
      onchange: () => { box.checked ? state.hidden.delete(run.index) : state.hidden.add(run.index); redraw(); },
    });
    boxes.append(make("label", { title: run.source }, box, runSwatch(run), run.name));
  });
  const average = document.getElementById("average");
  average.closest("label").hidden = DATA.groups.every((group) => group.runs.length === 1);
  average.checked = state.average = !average.closest("label").hidden;
  average.onchange = () => { state.average = average.checked; repaintRuns(); redraw(); };
  repaintRuns();

  const axis = document.getElementById("axis");
  for (const [key, label] of Object.entries(DATA.axes)) {
    const known = key === "steps" || DATA.runs.some((run) => run.axes[key]);
    axis.append(make("option", { value: key, disabled: !known }, known ? label : `${label} (not known)`));
  }
  axis.value = state.axis = DATA.axis;
  axis.onchange = () => { state.axis = axis.value; redraw(); };

  const smoothing = document.getElementById("smoothing"), says = document.getElementById("smoothing-value");
  smoothing.oninput = () => { state.smoothing = Number(smoothing.value); says.textContent = smoothing.value; redraw(); };
  redraw();
}
