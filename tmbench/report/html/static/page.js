// What all pages share: the data, the filters, the words that appear beside what is pointed at, and copying.
"use strict";

const tm = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("filters");
  const shown = document.getElementById("shown");
  const tip = document.getElementById("tip");
  const listeners = [];

  // An element with attributes and texts: no text is ever read as markup.
  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  // The chosen values by the filters' names; "" where all are shown.
  function chosen() {
    const found = { device: "", model: "", length: "", task: "", text: "" };
    for (const field of form.elements) if (field.name) found[field.name] = field.value;
    return found;
  }

  // Which of the margins is chosen, by its number.
  const slider = form.elements.margin;
  const margins = slider ? slider.dataset.margins.trim().split(" ") : [];
  const margin = () => Number(slider.value);

  // What is chosen stands in the page's address, and goes along to the other pages.
  function remember(by) {
    const told = new URLSearchParams(Object.entries(by).filter(([name, value]) => value && name !== "margin"));
    const hash = String(told) && `#${told}`;
    history.replaceState(null, "", hash || location.pathname);
    for (const link of document.querySelectorAll("nav a")) link.hash = hash;
  }

  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    const field = form.elements.namedItem(name);
    if (field && (field.type !== "select-one" || [...field.options].some((one) => one.value === value))) field.value = value;
  }

  // Sections that do not have a chosen value are hidden; the pages' own scripts are then told.
  function filter() {
    const by = chosen();
    const blocks = [...document.querySelectorAll(".block")];
    for (const block of blocks) {
      const has = (name) => !by[name] || block.dataset[name].split(name === "length" || name === "task" ? " " : "\0").includes(by[name]);
      block.hidden = !["device", "model", "length", "task"].every((name) => (name === "task" && !block.dataset.task) || has(name));
    }
    if (blocks.length) {
      const left = blocks.filter((block) => !block.hidden).length;
      shown.textContent = `${left} of ${blocks.length} shown`;
    }
    if (slider) {
      document.getElementById("chosen-margin").textContent = margins[margin()];
      slider.setAttribute("aria-valuetext", `${margins[margin()]} points`);
    }
    for (const listener of listeners) listener(by);
  }

  // Have a function called with what is chosen, when the page is there and whenever that changes.
  const onFilter = (listener) => listeners.push(listener);

  function showTip(target) {
    tip.textContent = target.dataset.tip || target.getAttribute("aria-label");
    tip.hidden = false;
    const at = target.getBoundingClientRect();
    const own = tip.getBoundingClientRect();
    const below = at.bottom + own.height + 8 < innerHeight;
    tip.style.left = `${Math.max(4, Math.min(at.left, innerWidth - own.width - 4))}px`;
    tip.style.top = `${below ? at.bottom + 6 : Math.max(4, at.top - own.height - 6)}px`;
  }

  for (const [begin, end] of [["focusin", "focusout"], ["mouseover", "mouseout"]]) {
    document.addEventListener(begin, (event) => {
      const target = event.target.closest && event.target.closest("[data-tip]");
      if (target) showTip(target);
    });
    document.addEventListener(end, () => { tip.hidden = true; });
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
  form.addEventListener("input", () => { filter(); remember(chosen()); });
  form.addEventListener("submit", (event) => event.preventDefault());

  // Copy a text, and say so; where the browser does not let a page do it, select it for the reader to copy.
  async function copy(source, status) {
    try {
      await navigator.clipboard.writeText(source.textContent);
      status.textContent = "Copied.";
    } catch {
      getSelection().selectAllChildren(source);
      status.textContent = "Selected: copy it with the keyboard.";
    }
  }

  addEventListener("DOMContentLoaded", () => { filter(); remember(chosen()); });
  return { data, form, shown, element, chosen, filter, onFilter, copy, margin };
})();
