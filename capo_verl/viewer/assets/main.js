// SPDX-License-Identifier: Apache-2.0
// Light or dark, then the three sections.

function buildTheme() {
  const button = document.getElementById("theme"), dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const apply = () => {
    const theme = chosen ?? (dark.matches ? "dark" : "light");
    document.documentElement.dataset.theme = theme;
    button.textContent = theme === "dark" ? "Light" : "Dark";
  };
  button.onclick = () => { chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark"; apply(); };
  dark.addEventListener("change", apply);
  apply();
}

function buildNotes() {
  const notes = document.getElementById("notes");
  notes.hidden = !DATA.notes.length;
  notes.querySelector("summary").textContent = `Not all could be read or drawn: ${DATA.notes.length} note${DATA.notes.length > 1 ? "s" : ""}`;
  notes.querySelector("ul").append(...DATA.notes.map((note) => make("li", {}, note)));
}

buildTheme();
buildNotes();
buildCurves();
buildConfigs();
buildTokens();
document.documentElement.dataset.ready = "yes";
