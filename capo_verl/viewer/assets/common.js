// SPDX-License-Identifier: Apache-2.0
// Elements, numbers, the tooltip. Text enters the page as text nodes only.
const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const COLOURS = 7;

const DATA = JSON.parse(document.getElementById("data").textContent);
const state = { axis: "steps", smoothing: 0, average: false, hidden: new Set() };

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "g", "rect"].includes(tag);
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "style") for (const [name, v] of Object.entries(value)) element.style.setProperty(name, v);
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const colour = (number) => `var(--c${number % COLOURS})`;

function show(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(digits - 2);
  return value.toLocaleString("en", { maximumSignificantDigits: digits });
}

const tip = make("div", { class: "tip", hidden: true, role: "tooltip", id: "tip" });
document.body.append(tip);

// Below y, or where there is no room, above `above`.
function showTip(x, y, children, above = y) {
  tip.replaceChildren(...children);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 16 + width > innerWidth ? x - 16 - width : x + 16;
  const top = y + 14 + height > innerHeight ? above - 14 - height : y + 14;
  tip.style.left = `${Math.max(4, Math.min(left, innerWidth - width - 4))}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}

// Opened by keyboard, it follows its element when the page scrolls (as it does to show that element); by mouse, it closes.
let follow = null;
function followTip(tell) {
  tell();
  follow = tell;
}
function pointTip(tell) {
  follow = null;
  tell();
}
function hideTip() {
  follow = null;
  tip.hidden = true;
}
addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
addEventListener("scroll", () => (follow ? follow() : hideTip()), { passive: true, capture: true });

// The second seven runs have rings on their curves, the third and further squares.
const again = (number) => ["", "again", "again third"][Math.min(2, Math.floor(number / COLOURS))];
function paint(mark, number) {
  mark.className = `swatch ${again(number)}`;
  mark.style.setProperty("background-color", colour(number));
  mark.style.setProperty("border-color", colour(number));
  return mark;
}
const swatch = (number) => paint(make("span"), number);

// The mark of a run follows its colour: its own, or with averaging its group's.
const runColour = (run) => (state.average ? DATA.groups.find((group) => group.runs.includes(run.index)).colour : run.index);
const runMarks = [];
function runSwatch(run) {
  const mark = swatch(runColour(run));
  runMarks.push([run, mark]);
  return mark;
}
function repaintRuns() {
  for (const [run, mark] of runMarks) paint(mark, runColour(run));
}
