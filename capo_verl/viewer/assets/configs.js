// SPDX-License-Identifier: Apache-2.0
// The configurations of the runs side by side; what differs is marked.

function buildConfigs() {
  const section = document.getElementById("configurations");
  const known = DATA.runs.filter((run) => run.config);
  if (!known.length) {
    section.querySelector(".found").hidden = true;
    section.append(make("p", { class: "note" }, "No configuration was found beside these logs."));
    return;
  }
  const keys = [...new Set(known.flatMap((run) => Object.keys(run.config)))].sort();
  const text = (run, key) => (Object.hasOwn(run.config, key) ? JSON.stringify(run.config[key]).replace(/^"(.*)"$/s, "$1") : null);
  const differs = new Map(keys.map((key) => [key, new Set(known.map((run) => text(run, key))).size > 1]));
  const only = document.getElementById("only-differences"), search = document.getElementById("config-search");
  only.checked = known.length > 1 && [...differs.values()].some(Boolean);
  const head = make("tr", {}, make("th", { scope: "col" }, "key"),
    ...known.map((run) => make("th", { scope: "col" }, runSwatch(run), " ", run.name)));
  const body = make("tbody");
  document.getElementById("config-table").append(make("thead", {}, head), body);
  const count = document.getElementById("config-count");
  const fill = () => {
    const wanted = search.value.toLowerCase();
    const shown = keys.filter((key) => (!only.checked || differs.get(key)) && key.toLowerCase().includes(wanted));
    body.replaceChildren(...shown.map((key) => make("tr", { class: differs.get(key) ? "differs" : null },
      make("th", { scope: "row" }, key),
      ...known.map((run) => {
        const value = text(run, key);
        return make("td", { class: value === null ? "missing" : null }, value === null ? "not set" : value);
      }))));
    count.textContent = `${shown.length} of ${keys.length} keys`;
  };
  only.onchange = search.oninput = fill;
  fill();
}
