// Heat maps: the words of their cells for the chosen margin, and the arrow keys from cell to cell.
"use strict";

for (const table of document.querySelectorAll(".heat")) {
  const said = tm.data[table.dataset.block];
  const rows = [...table.tBodies[0].rows].map((row) => [...row.cells].slice(1));
  const cells = rows.flat();
  cells[0].setAttribute("tabindex", "0");

  tm.onFilter((by) => {
    cells.forEach((cell, number) => {
      if (said[number]) cell.setAttribute("aria-label", `${cell.dataset.words}; ${said[number][tm.margin()]}`);
    });
    for (const cell of table.querySelectorAll("[data-task]")) cell.hidden = Boolean(by.task) && cell.dataset.task !== by.task;
    const reached = cells.find((cell) => cell.getAttribute("tabindex") === "0" && !cell.hidden);
    if (!reached) cells.find((cell) => !cell.hidden)?.setAttribute("tabindex", "0");
  });

  table.addEventListener("keydown", (event) => {
    const way = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const line = rows.findIndex((row) => row.includes(document.activeElement));
    if (!way || line < 0) return;
    event.preventDefault();
    const shown = rows.map((row) => row.filter((cell) => !cell.hidden));
    const place = shown[line].indexOf(document.activeElement);
    const target = shown[line + way[0]]?.[place + way[1]];
    if (!target) return;
    for (const cell of cells) cell.removeAttribute("tabindex");
    target.setAttribute("tabindex", "0");
    target.focus();
  });
}
