// The list of what methods lost and gained, and the answers of the samples that are asked for: their texts are in files beside
// the page, as a page that was opened from a file may load scripts and nothing else.
"use strict";

(() => {
  const PART = 20, SAMPLES = 10;
  const get = (id) => document.getElementById(id);
  const body = document.querySelector("#groups tbody");
  const panel = get("samples");
  const status = panel.querySelector("[role=status]");
  const names = tm.data.map((group) => `${group.task} ${group.label} ${group.title}`.toLowerCase());
  const chunks = new Map();
  let found = [], start = 0, shown = null;

  // A file of texts says which it is and what it holds.
  tm.chunk = (name, content) => chunks.get(name).arrived(content);

  function load(name) {
    if (!chunks.has(name)) {
      const chunk = {};
      chunk.content = new Promise((resolve, reject) => {
        chunk.arrived = resolve;
        const script = tm.element("script", { src: `data/samples-${name}.js` });
        script.addEventListener("error", () => { chunks.delete(name); reject(new Error("missing")); });
        chunks.set(name, chunk);
        document.head.append(script);
      });
    }
    return chunks.get(name).content;
  }

  function list() {
    body.replaceChildren(...found.slice(start, start + PART).map((place) => {
      const group = tm.data[place];
      const buttons = ["lost", "gained"].map((way) => {
        const button = tm.element("button", { type: "button", "aria-label": `${group[way].length} samples of ${group.task} ${way} by ${group.label}` }, String(group[way].length));
        button.disabled = group[way].length === 0;
        button.addEventListener("click", () => open(group, way));
        return tm.element("td", {}, button);
      });
      return tm.element("tr", {}, tm.element("td", { class: "text" }, group.task), ...buttons, tm.element("td", {}, String(group.pairs)), tm.element("th", { scope: "row", class: "text" }, group.label), tm.element("td", { class: "text long" }, group.title));
    }));
    get("before").disabled = start === 0;
    get("after").disabled = start + PART >= found.length;
    tm.shown.textContent = found.length ? `${start + 1} to ${Math.min(start + PART, found.length)} of ${found.length}` : "nothing has all of that";
  }

  function answer(name, [score, text]) {
    return tm.element("div", {}, tm.element("h4", {}, `${name}: ${Number((100 * score).toFixed(1))}`), tm.element("pre", { tabindex: "0" }, text || "(no answer)"));
  }

  function sample(group, content, index) {
    const { wanted, dense, places } = content.samples[index];
    const head = `sample-${index}`;
    const made = tm.element("article", { class: "sample", "aria-labelledby": head }, tm.element("h3", { id: head }, `Sample ${index}`), tm.element("p", {}, `Wanted: ${wanted.join("; ")}`));
    for (const [wished, depth, near] of places) {
      made.append(tm.element("p", { class: "device" }, `${wished} lay at ${Math.round(100 * depth)} % of the prompt${near ? ":" : "."}`));
      if (near) made.append(tm.element("pre", { tabindex: "0" }, near));
    }
    made.append(tm.element("div", { class: "answers" }, answer("dense", dense), answer(group.label, content.answers[group.label][index])));
    return made;
  }

  async function open(group, way, from = 0) {
    shown = { group, way, from };
    panel.hidden = false;
    const title = get("samples-title");
    title.textContent = `${group.task}: ${way} by ${group.label}`;
    title.focus();
    panel.scrollIntoView({ block: "start" });
    status.textContent = "Loading the answers.";
    get("answers").replaceChildren();
    let content;
    try {
      content = await load(group.chunk);
    } catch {
      status.textContent = "The file of these answers is not beside the page: make the report again.";
      return;
    }
    if (shown.group !== group || shown.way !== way || shown.from !== from) return;
    const all = group[way];
    const last = Math.min(from + SAMPLES, all.length);
    get("answers").replaceChildren(...all.slice(from, last).map((index) => sample(group, content, index)));
    status.textContent = `Samples ${from + 1} to ${last} of ${all.length}. ${group.title}`;
    get("samples-before").disabled = from === 0;
    get("samples-after").disabled = last === all.length;
  }

  get("before").addEventListener("click", () => { start -= PART; list(); });
  get("after").addEventListener("click", () => { start += PART; list(); });
  get("samples-before").addEventListener("click", () => open(shown.group, shown.way, shown.from - SAMPLES));
  get("samples-after").addEventListener("click", () => open(shown.group, shown.way, shown.from + SAMPLES));
  tm.onFilter((by) => {
    const text = by.text.toLowerCase();
    found = tm.data.map((_, place) => place).filter((place) =>
      ["device", "model", "length", "task"].every((name) => !by[name] || tm.data[place].by[name] === by[name]) && names[place].includes(text));
    start = 0;
    list();
  });
})();
