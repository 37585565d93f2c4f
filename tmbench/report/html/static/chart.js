// Charts: lines, points and intervals on two axes, drawn as SVG that takes the page's colours, prints, and can be read by
// keyboard and screen reader. Figures and words come from the page's data; nothing here computes either.
"use strict";

(() => {
  const LEFT = 58, RIGHT = 14, TOP = 10, BOTTOM = 42, SIZE = 5;
  const DASHES = ["", "7 4", "2 4", "8 3 2 3"];
  // Markers as matplotlib names them: circle, square, diamond, triangles up and down, plus, cross.
  const MARKERS = {
    o: "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z", s: "M-4.5-4.5h9v9h-9z", D: "M0-6L5 0L0 6L-5 0z", "^": "M0-5.5L5.5 4.5h-11z",
    v: "M0 5.5L5.5-4.5h-11z", P: "M-2-5h4v3h3v4h-3v3h-4v-3h-3v-4h3z", X: "M-5-3L-3-5L0-2L3-5L5-3L2 0L5 3L3 5L0 2L-3 5L-5 3L-2 0z",
    p: "M0-5.5L5.2-1.7L3.2 4.5h-6.4L-5.2-1.7z",
  };
  // The parser knows the name of SVG's elements.
  const holder = document.createElement("template");
  holder.innerHTML = "<svg></svg>";
  const space = holder.content.firstChild.namespaceURI;

  function svg(name, attributes = {}, ...children) {
    const made = document.createElementNS(space, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function scale(axis, values, from, to) {
    let low = Math.min(...values, ...(axis.ends || []));
    let high = Math.max(...values, ...(axis.ends || []));
    const log = axis.scale === "log";
    if (log) {
      [low, high] = low === high ? [low / 2, high * 2] : [low / (high / low) ** 0.04, high * (high / low) ** 0.04];
    } else {
      const room = (high - low || Math.abs(high) || 1) * 0.05;
      [low, high] = axis.ends ? [low, high] : [low - room, high + room];
    }
    const turn = log ? Math.log : (value) => value;
    const place = (value) => from + (to - from) * (turn(value) - turn(low)) / (turn(high) - turn(low));
    return { place, low, high, log };
  }

  // Round values within an axis: 1, 2 and 5 of each power of ten.
  function ticks(axis, { low, high, log }, most) {
    if (axis.ticks) return axis.ticks;
    const found = [];
    if (log) {
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
        for (const digit of high / low < 1000 ? [1, 2, 5] : [1]) found.push(Number(`${digit}e${power}`));
      }
    } else {
      const rough = (high - low) / most;
      const power = 10 ** Math.floor(Math.log10(rough));
      const step = [1, 2, 5, 10].map((digit) => digit * power).find((one) => one >= rough);
      for (let number = Math.ceil(low / step); number * step <= high; number += 1) found.push(number * step);
    }
    return found.filter((value) => value >= low && value <= high)
      .map((value) => [value, Number(value.toPrecision(6))])
      .map(([value, round]) => [value, round && Math.abs(round) < 1e-3 ? round.toExponential() : String(round)])
      .map(([value, name]) => [value, name.replace("-", "\u2212")]);
  }

  function words(point) {
    return point.words + (point.says ? `; ${point.says.words[tm.margin()]}` : "");
  }

  function mark(series, point, at, tagged) {
    const [x, y] = at(point.x, point.y);
    const made = svg("g", { class: "point", tabindex: "-1", role: "img", "aria-label": words(point), "data-tip": words(point) });
    const line = { stroke: series.colour, "stroke-width": 1.3, opacity: 0.7 };
    for (const [ends, place] of [[point.y_ends, (end) => [x, at(point.x, end)[1]]], [point.x_ends, (end) => [at(end, point.y)[0], y]]]) {
      if (ends) {
        const [[x1, y1], [x2, y2]] = ends.map(place);
        made.append(svg("line", { x1, y1, x2, y2, ...line }));
      }
    }
    made.append(svg("circle", { cx: x, cy: y, r: 11, fill: "transparent" }));
    const shape = { class: point.filled ? "mark" : "mark hollow", d: MARKERS[series.marker] || MARKERS.o, stroke: series.colour };
    if (point.filled) shape.fill = series.colour;
    made.append(svg("path", { ...shape, "stroke-width": 1.5, transform: `translate(${x} ${y})` }));
    if (tagged && point.tag) made.append(svg("text", { x: x + 8, y: y - 6, "aria-hidden": "true" }, point.tag));
    return made;
  }

  function legend(chart, off, redraw) {
    const list = tm.element("ul", { class: "legend", "aria-label": "Shown lines" });
    for (const series of chart.series.filter((one) => !one.of)) {
      const box = tm.element("input", { type: "checkbox" });
      box.checked = true;
      box.addEventListener("change", () => {
        if (box.checked) off.delete(series.name); else off.add(series.name);
        redraw();
      });
      const swatch = svg("svg", { width: 30, height: 14, "aria-hidden": "true" });
      if (series.dash >= 0) {
        swatch.append(svg("line", { x1: 0, x2: 30, y1: 7, y2: 7, stroke: series.colour, "stroke-width": 2, "stroke-dasharray": DASHES[series.dash] }));
      }
      swatch.append(svg("path", { d: MARKERS[series.marker] || MARKERS.o, fill: series.colour, transform: "translate(15 7)" }));
      list.append(tm.element("li", {}, tm.element("label", {}, box, swatch, series.name)));
    }
    return list;
  }

  // The arrow keys go from point to point: along a line, and from line to line.
  function keys(event, lines) {
    const way = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const line = lines.findIndex((marks) => marks.includes(document.activeElement));
    if (!way || line < 0) return;
    event.preventDefault();
    const next = lines[(line + way[0] + lines.length) % lines.length];
    const place = lines[line].indexOf(document.activeElement);
    const target = next[way[0] ? Math.min(place, next.length - 1) : (place + way[1] + next.length) % next.length];
    document.activeElement.setAttribute("tabindex", "-1");
    target.setAttribute("tabindex", "0");
    target.focus();
  }

  function draw(figure, given, chart, off, by) {
    const width = Math.max(given, 260);
    const height = Math.max(260, Math.min(420, width * 0.55));
    const plot = svg("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": `${chart.name}. The arrow keys go from point to point.` });
    const series = chart.series.filter((one) => !off.has(one.of || one.name))
      .map((one) => ({ ...one, points: one.points.filter((point) => !by.length || String(point.length) === by.length) }))
      .filter((one) => one.points.length);
    figure.querySelector("svg.plot, .nothing")?.remove();
    if (!series.length) {
      figure.append(tm.element("p", { class: "nothing" }, "Nothing of this chart is chosen."));
      figure.append(figure.querySelector(".legend"));
      return;
    }
    const points = series.flatMap((one) => one.points);
    const fronts = chart.fronts.filter((one) => !by.length || String(one.length) === by.length);
    const corners = fronts.flatMap((one) => one.corners);
    const tagged = new Set(points.map((point) => point.length)).size > 1;
    const margin = chart.margins.length ? -chart.margins[tm.margin()] : null;
    const across = scale(chart.x, points.flatMap((point) => [point.x, ...(point.x_ends || [])]).concat(corners.map((one) => one[0])), LEFT, width - RIGHT);
    const up = scale(chart.y, points.flatMap((point) => [point.y, ...(point.y_ends || [])]).concat(corners.map((one) => one[1]), margin ?? []), height - BOTTOM, TOP);
    const at = (x, y) => [across.place(x), up.place(y)];
    for (const [from, to] of chart.bands) {
      const [left, right] = [from, to].map((end) => Math.max(LEFT, Math.min(width - RIGHT, across.place(end))));
      plot.append(svg("rect", { class: "band", x: left, y: TOP, width: right - left, height: height - BOTTOM - TOP }));
    }
    let free = -Infinity;
    for (const [value, name] of ticks(chart.x, across, width / 90)) {
      const x = across.place(value);
      plot.append(svg("line", { class: "grid", x1: x, x2: x, y1: TOP, y2: height - BOTTOM }));
      if (name && x - free > 7 * name.length + 6) {
        plot.append(svg("text", { x, y: height - BOTTOM + 16, "text-anchor": "middle" }, name));
        free = x;
      }
    }
    for (const [value, name] of ticks(chart.y, up, height / 50)) {
      const y = up.place(value);
      plot.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }));
      plot.append(svg("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, name));
    }
    plot.append(svg("text", { x: (LEFT + width - RIGHT) / 2, y: height - 6, "text-anchor": "middle" }, chart.x.name));
    plot.append(svg("text", { transform: `translate(12 ${(TOP + height - BOTTOM) / 2}) rotate(-90)`, "text-anchor": "middle" }, chart.y.name));
    if (margin !== null) plot.append(svg("line", { class: "margin", x1: LEFT, x2: width - RIGHT, y1: up.place(margin), y2: up.place(margin) }));
    for (const front of fronts) {
      const steps = front.corners.map(([x, y]) => at(x, y));
      plot.append(svg("path", { class: "front", d: steps.map(([x, y], n) => (n ? `V${y}H${x}` : `M${x} ${y}`)).join("") }));
    }
    for (const one of series.filter((each) => each.dash >= 0)) {
      plot.append(svg("polyline", { points: one.points.map((point) => at(point.x, point.y).join()).join(" "), fill: "none", stroke: one.colour, "stroke-width": one.of ? 1.2 : 2, "stroke-dasharray": DASHES[one.dash] }));
    }
    const lines = series.map((one) => one.points.map((point) => mark(one, point, at, tagged)));
    for (const marks of lines) plot.append(...marks);
    lines[0][0].setAttribute("tabindex", "0");
    plot.addEventListener("keydown", (event) => keys(event, lines));
    figure.querySelector("figcaption").after(plot);
  }

  // One figure: draws when its width, the filters, the margin or its switches are others than when it was last drawn.
  function drawing(figure) {
    const found = tm.data[figure.dataset.block][figure.dataset.chart];
    const off = new Set();
    let chart, last;
    const update = (width) => {
      const by = tm.chosen();
      const now = JSON.stringify([width, by, [...off]]);
      if (now === last) return;
      last = now;
      const picked = found.views ? found.views[by.task] : found;
      if (picked !== chart) {
        chart = picked;
        figure.querySelector(".legend")?.remove();
        if (chart) figure.append(legend(chart, off, () => update(figure.clientWidth)));
      }
      if (chart) draw(figure, width, chart, off, by);
    };
    return { figure, block: figure.closest(".block"), update };
  }

  const drawings = [...document.querySelectorAll(".chart")].map(drawing);

  // All widths are read before anything is drawn: each that is read in between would have the page laid out anew.
  function drawAll() {
    const wide = drawings.filter(({ block }) => !block.hidden).map((one) => [one, one.figure.clientWidth]);
    for (const [one, width] of wide) if (width) one.update(width);
  }

  tm.onFilter(drawAll);
  const sizes = new ResizeObserver(drawAll);
  for (const { figure } of drawings) sizes.observe(figure);
})();
