// SPDX-License-Identifier: Apache-2.0
// Sampled sequences in their text: colour by m_F, underline by the sign of the advantage, rejected tokens struck.

// Unbroken spans of the response mask, in order: [of the policy, first, end). What is not the policy's is a tool's or the user's.
function spansOf(mask) {
  const spans = [];
  mask.forEach((own, i) => {
    const last = spans[spans.length - 1];
    if (last && last[0] === Boolean(own)) last[2] = i + 1; else spans.push([Boolean(own), i, i + 1]);
  });
  return spans;
}

const visible = (text) => (text === "" ? "▯" : text.replace(/\n/g, "↵\n").replace(/\t/g, "⇥"));

function buildTokens() {
  const section = document.getElementById("tokens");
  const runs = DATA.runs.filter((run) => run.samples.length);
  if (!runs.length) {
    section.querySelector(".found").hidden = true;
    section.append(make("p", { class: "note" }, "No samples of tokens. A run writes them with ",
      make("code", {}, "actor_rollout_ref.actor.policy_loss.capo.sample_tokens_every=20"), "."));
    return;
  }
  const [runBox, stepBox, sequenceBox, only] = ["token-run", "token-step", "token-sequence", "rejected-only"]
    .map((id) => document.getElementById(id));
  const text = document.getElementById("token-text"), about = document.getElementById("token-about");
  runs.forEach((run) => runBox.append(make("option", { value: run.index }, run.name)));
  const samples = () => DATA.runs[Number(runBox.value)].samples;
  const rejected = (s) => s.response.ids.filter((_, i) => s.response.mask[i] && !s.response.in_trust_region[i]).length;
  const fits = (s) => !only.checked || rejected(s) > 0;

  // Refill a select, and keep its choice where that is still there.
  const refill = (box, options) => {
    const before = box.value;
    box.replaceChildren(...options.map(([value, label]) => make("option", { value }, label)));
    if (options.some(([value]) => String(value) === before)) box.value = before;
  };
  const fillSteps = () => {
    refill(stepBox, [...new Set(samples().filter(fits).map((s) => s.step))].map((step) => [step, `step ${step}`]));
    fillSequences();
  };
  const fillSequences = () => {
    const options = [];
    samples().forEach((s, i) => {
      if (String(s.step) !== stepBox.value || !fits(s)) return;
      const why = s.chosen === "most_rejected" ? ", chosen for them" : "";
      options.push([i, `sequence ${s.sample}: ${rejected(s)} of ${s.response.mask.filter(Boolean).length} rejected${why}`]);
    });
    refill(sequenceBox, options);
    draw();
  };

  // One colour scale for the run: m_F from the 5th percentile of the values above 0 to the largest.
  const range = () => {
    const values = samples().flatMap((s) => s.response.policy_shift).filter((v) => v > 0).sort((a, b) => a - b);
    return values.length ? [values[Math.floor(values.length / 20)], values[values.length - 1]] : [1e-8, 1e-2];
  };
  const draw = () => {
    const sample = samples()[Number(sequenceBox.value)];
    text.replaceChildren();
    about.textContent = "";
    if (!sequenceBox.value || !sample) {
      text.append(make("span", { class: "note" }, "No sequence of this run has a rejected token."));
      return;
    }
    const [low, high] = range();
    document.getElementById("heat-low").textContent = show(low);
    document.getElementById("heat-high").textContent = show(high);
    const r = sample.response;
    const own = r.mask.filter(Boolean).length, spans = spansOf(r.mask), turns = spans.filter(([policys]) => policys).length;
    about.textContent = `Step ${sample.step}, sequence ${sample.sample} of the first mini-batch of one rank: ${own} tokens, ` +
      `${rejected(sample)} outside the trust region, ${own - rejected(sample)} inside. ` +
      (own < r.ids.length ? `${turns === 1 ? "1 turn" : `${turns} turns`}; ${r.ids.length - own} tokens between or beside them are not the policy's. ` : "") +
      (sample.mode === "track" ? "The run only measures (mode=track): all of them are trained on." : "");
    const promptText = sample.prompt.text ? sample.prompt.text.join("") : sample.prompt.ids.join(" ");
    const tokens = [], parts = [];
    let turn = 0;
    spans.forEach(([policys, start, end]) => {
      const inside = [];
      let skipped = 0;
      const gap = () => { if (skipped) inside.push(make("span", { class: "gap" }, `⋯ ${skipped} `)); skipped = 0; };
      for (let i = start; i < end; i++) {
        const out = policys && !r.in_trust_region[i];
        if (only.checked && !out) { skipped++; continue; }
        gap();
        inside.push(token(r, i, out, low, high));
      }
      gap();
      if (policys) turn++;
      const label = policys ? `turn ${turn}` : "not the policy's";
      if (spans.length > 1) inside.unshift(make("span", { class: "voice" }, label));
      parts.push(make("span", policys ? {} : { class: "foreign" }, ...inside));
      tokens.push(...inside.filter((e) => e.classList.contains("token")));
    });
    if (tokens.length) tokens[0].tabIndex = 0;
    text.append(make("div", { class: "prompt" }, promptText), make("div", { class: "response" }, ...parts));
  };

  only.onchange = runBox.onchange = fillSteps;
  stepBox.onchange = fillSequences;
  sequenceBox.onchange = draw;
  const last = runs.map((run) => run.samples[run.samples.length - 1].step);
  fillSteps();
  stepBox.value = String(last[0]);
  fillSequences();

  text.onkeydown = (event) => {
    const all = [...text.querySelectorAll(".token")], at = all.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || to === undefined || !all[to]) return;
    event.preventDefault();
    all[at].tabIndex = -1;
    all[to].tabIndex = 0;
    all[to].focus();
  };
}

function token(r, i, out, low, high) {
  const shift = r.policy_shift[i], piece = r.text ? r.text[i] : `${r.ids[i]} `;
  const share = shift > 0 ? Math.max(0, Math.min(1, Math.log(shift / low) / (Math.log(high / low) || 1))) : 0;
  const sign = !r.mask[i] ? "unmasked" : r.advantage[i] > 0 ? "positive" : r.advantage[i] < 0 ? "negative" : "";
  const rows = [
    ["id", String(r.ids[i])], ["m_F", `${show(shift)} nats`], ["m_H", show(r.objective_shift[i])], ["advantage", show(r.advantage[i])],
    ["probability", show(r.probability[i])], ["weight", show(r.weight[i])],
  ];
  const verdict = !r.mask[i] ? "not the policy's: outside the response mask" : !out ? "accepted" :
    r.weight[i] > 0 ? "outside the trust region, trained on" : "rejected";  // tracked, soft weights, or a stopped filter
  const tell = (x, y, above) => showTip(x, y, [
    make("strong", {}, JSON.stringify(piece)), make("div", {}, verdict),
    ...rows.map(([name, value]) => make("div", {}, make("span", {}, name), make("b", {}, value))),
  ], above);
  return make("span", {
    class: ["token", sign, out ? "rejected" : ""].filter(Boolean).join(" "), tabindex: -1, role: "note",
    "aria-label": `${piece} ${verdict}, ${rows.map((row) => row.join(" ")).join(", ")}`, style: { "--share": `${Math.round(share * 90)}%` },
    onpointermove: (event) => pointTip(() => tell(event.clientX, event.clientY)), onpointerleave: hideTip, onblur: hideTip,
    onfocus: (event) => followTip(() => { const box = event.target.getBoundingClientRect(); tell(box.left, box.bottom, box.top); }),
  }, visible(piece));
}
