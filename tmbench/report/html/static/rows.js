// The list of rows, a part of it at a time, and the command of the one that is asked for.
"use strict";

(() => {
  const PART = 50;
  const body = document.querySelector("#rows tbody");
  const [before, after] = ["before", "after"].map((id) => document.getElementById(id));
  const panel = document.getElementById("command");
  const texts = tm.data.map((row) => row.cells.join(" ").toLowerCase());
  let found = [];
  let start = 0;

  function show() {
    body.replaceChildren(...found.slice(start, start + PART).map((place) => {
      const row = tm.data[place];
      const button = tm.element("button", { type: "button", "aria-label": `The command of ${row.cells.join(", ")}` }, "Command");
      button.addEventListener("click", () => command(row));
      const cells = row.cells.map((text) => tm.element("td", { class: text.length > 30 ? "text long" : "text" }, text));
      return tm.element("tr", {}, tm.element("td", {}, button), ...cells);
    }));
    before.disabled = start === 0;
    after.disabled = start + PART >= found.length;
    const last = Math.min(start + PART, found.length);
    tm.shown.textContent = found.length ? `rows ${start + 1} to ${last} of ${found.length}` : "no row has all of that";
  }

  function command(row) {
    panel.hidden = false;
    document.getElementById("command-of").textContent = `${row.cells.join(", ")}; ${row.more}`;
    panel.querySelector("code").textContent = row.command;
    panel.querySelector("[role=status]").textContent = "";
    panel.querySelector("ul").replaceChildren(...row.needs.map((need) => tm.element("li", {}, need)));
    panel.querySelector("h2").focus();
    panel.scrollIntoView({ block: "nearest" });
  }

  panel.querySelector(".copy").addEventListener("click", () => tm.copy(panel.querySelector("code"), panel.querySelector("[role=status]")));
  before.addEventListener("click", () => { start -= PART; show(); });
  after.addEventListener("click", () => { start += PART; show(); });
  tm.onFilter((by) => {
    const text = by.text.toLowerCase();
    const has = (row, name) => !by[name] || row.by[name] === by[name];
    found = tm.data.map((_, place) => place).filter((place) =>
      ["device", "model", "length", "task"].every((name) => has(tm.data[place], name)) && texts[place].includes(text));
    start = 0;
    show();
  });
})();
