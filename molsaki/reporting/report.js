// Draws the curves, layer weights, maps and predictions of a report from the JSON in the page.
// Texts are only ever set as text, never as markup; nothing is loaded.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tooltip = document.getElementById("tooltip");
  const spoken = document.getElementById("spoken");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const NOT_FINITE = 255;
  const LIGHT = ["#f7fbff", "#d6e6f4", "#abd0e6", "#6aaed6", "#3787c0", "#105ba4", "#08306b"];
  const DARK = ["#161d27", "#17324f", "#1d4e7c", "#2a72ab", "#4f9cd3", "#92c7ec", "#eaf5ff"];
  // Okabe and Ito's colours, which differ for colour-blind readers; the dashes differ too.
  const SERIES = [["#0072b2", "#56b4e9"], ["#d55e00", "#e69f00"], ["#009e73", "#4cc79c"], ["#a8558a", "#e29ac5"], ["#806000", "#f0e442"]];
  const DASHES = ["", "6 3", "2 3", "9 3 2 3", "1 4"];
  let printing = false;
  const redraws = [];

  const isDark = () => dark.matches && !printing;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
  const percent = (x) => `${(100 * x).toFixed(x >= 0.0995 || x === 0 ? 0 : x >= 0.00995 ? 1 : 2)} %`;
  const shorten = (text, most) => { const t = text.trim().replace(/\s+/g, " "); return t.length > most ? t.slice(0, most - 1) + "…" : t; };

  function number(x) {
    if (x === null || x === undefined) return "not finite";
    if (x === 0) return "0";
    const size = Math.abs(x);
    return size >= 1e5 || size < 1e-4 ? x.toExponential(2) : String(Number(x.toPrecision(4)));
  }

  function make(name, properties = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (key === "class") node.className = value;
      else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (key in node && key !== "list") node[key] = value;
      else node.setAttribute(key, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  function svg(name, attributes = {}, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  function showTooltip(text, x, y) {
    tooltip.textContent = text;
    tooltip.hidden = false;
    const box = tooltip.getBoundingClientRect();
    const left = x + 14 + box.width > innerWidth - 6 ? x - 14 - box.width : x + 14;
    const top = y + 16 + box.height > innerHeight - 6 ? y - 12 - box.height : y + 16;
    tooltip.style.left = `${clamp(left, 6, Math.max(innerWidth - box.width - 6, 6))}px`;
    tooltip.style.top = `${clamp(top, 6, Math.max(innerHeight - box.height - 6, 6))}px`;
  }
  const hideTooltip = () => { tooltip.hidden = true; };
  addEventListener("scroll", hideTooltip, { passive: true });
  addEventListener("keydown", (event) => { if (event.key === "Escape") hideTooltip(); });

  // Calls `leave` when a mouse leaves the node, or when something else is touched: a finger that is lifted stays.
  const leaving = [];
  function onLeave(node, leave) {
    node.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") leave(); });
    leaving.push([node, leave]);
  }
  addEventListener("pointerdown", (event) => {
    if (event.pointerType === "touch") for (const [node, leave] of leaving) if (!node.contains(event.target)) leave();
  }, { capture: true });

  function bytes(text) {
    const raw = atob(text), found = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
    return found;
  }

  function palette() {
    const stops = (isDark() ? DARK : LIGHT).map((text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16)));
    return (share) => {
      const at = clamp(share, 0, 1) * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2);
      return stops[low].map((v, i) => Math.round(v + (stops[low + 1][i] - v) * (at - low)));
    };
  }
  const rgb = (c) => `rgb(${c.join(" ")})`;

  function prepared(canvas, width, height) {
    const ratio = Math.min(window.devicePixelRatio || 1, 2, 8000 / Math.max(width, height, 1));
    canvas.width = Math.max(Math.round(width * ratio), 1);
    canvas.height = Math.max(Math.round(height * ratio), 1);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    return context;
  }

  // An image with one pixel per cell, to be scaled without smoothing.
  function pixels(columns, rows, colourOf) {
    const canvas = make("canvas");
    canvas.width = columns;
    canvas.height = rows;
    const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
    for (let r = 0; r < rows; r++) {
      for (let c = 0; c < columns; c++) image.data.set([...colourOf(r, c), 255], 4 * (r * columns + c));
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  function control(label, ...nodes) {
    return make("label", { class: `control${nodes[0].type === "range" ? " wide" : ""}` }, label, make("span", { class: "row" }, ...nodes));
  }

  // A list of choices with a button to either side. `change` gets the index.
  function chooser(label, names, chosen, change) {
    const select = make("select", { onchange: () => { step(0); } });
    names.forEach((name, i) => select.append(make("option", { value: String(i), textContent: name, selected: i === chosen })));
    const step = (by) => {
      select.selectedIndex = clamp(select.selectedIndex + by, 0, names.length - 1);
      before.disabled = select.selectedIndex === 0;
      after.disabled = select.selectedIndex === names.length - 1;
      change(select.selectedIndex);
    };
    const before = make("button", { type: "button", textContent: "‹", onclick: () => step(-1) });
    const after = make("button", { type: "button", textContent: "›", onclick: () => step(1) });
    before.setAttribute("aria-label", `${label}: the one before`);
    after.setAttribute("aria-label", `${label}: the next one`);
    before.disabled = chosen === 0;
    after.disabled = chosen === names.length - 1;
    return make("div", { class: "control" }, make("label", {}, label, make("span", { class: "row" }, before, select, after)));
  }

  // ---------------------------------------------------------------- curves

  function ticks(low, high, count) {
    const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
    const size = [1, 2, 2.5, 5, 10].map((m) => m * power).find((m) => m >= raw * 0.999);
    const found = [];
    for (let i = Math.ceil(low / size - 1e-9); i * size <= high + size * 1e-9; i++) found.push(Number((i * size).toPrecision(12)));
    return found;
  }

  function chart(panel) {
    const width = 360, height = 200, left = 50, right = 10, top = 10, bottom = 32;
    const all = panel.series.flatMap((one) => one.x.map((x, i) => [x, one.y[i]]));
    const good = all.filter(([, y]) => y !== null).map(([, y]) => y);
    let [x0, x1] = [Math.min(...all.map((p) => p[0])), Math.max(...all.map((p) => p[0]))];
    let [y0, y1] = good.length ? [Math.min(...good), Math.max(...good)] : [0, 1];
    if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
    if (y0 > 0 && y0 < 0.4 * y1) y0 = 0;
    if (y0 === y1) [y0, y1] = y0 === 0 ? [0, 1] : [y0 - Math.abs(y0) / 2, y0 + Math.abs(y0) / 2];
    const room = (y1 - y0) * 0.06;
    [y0, y1] = [y0 === 0 ? 0 : y0 - room, y1 + room];
    const X = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
    const Y = (y) => height - bottom - ((y - y0) / (y1 - y0)) * (height - top - bottom);

    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0" });
    const last = panel.series.map((one) => `${one.name} ends at ${number(one.y[one.y.length - 1])}`).join(", ");
    picture.setAttribute("aria-label", `${panel.title}: ${last}. Arrow keys read the values.`);
    for (const y of ticks(y0, y1, 4)) {
      picture.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: Y(y), y2: Y(y) }));
      const label = svg("text", { x: left - 5, y: Y(y) + 4, "text-anchor": "end" });
      label.textContent = number(y);
      picture.append(label);
    }
    for (const x of ticks(x0, x1, 5).filter(Number.isInteger)) {
      const label = svg("text", { x: X(x), y: height - bottom + 14, "text-anchor": "middle" });
      label.textContent = x.toLocaleString("en");
      picture.append(label);
    }
    const under = svg("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" });
    under.textContent = "training step";
    picture.append(under);

    const legend = make("ul", { class: "legend" });
    panel.series.forEach((one, i) => {
      const lines = [], stroke = () => SERIES[i % SERIES.length][isDark() ? 1 : 0], dash = DASHES[i % DASHES.length];
      let path = "";
      one.x.forEach((x, k) => {
        if (one.y[k] === null) return;
        const isStart = k === 0 || one.y[k - 1] === null;
        path += `${isStart ? "M" : "L"}${X(x).toFixed(1)} ${Y(one.y[k]).toFixed(1)}`;
        if (one.x.length <= 40) {
          const dot = svg("circle", { cx: X(x), cy: Y(one.y[k]), r: one.x.length <= 12 ? 3 : 2 });
          lines.push([dot, "fill"]);
        }
      });
      const line = svg("path", { d: path, fill: "none", "stroke-width": 1.8, "stroke-dasharray": dash, "stroke-linejoin": "round" });
      const sample = svg("line", { x1: 0, x2: 26, y1: 5, y2: 5, "stroke-width": 2.5, "stroke-dasharray": dash });
      lines.push([line, "stroke"], [sample, "stroke"]);
      picture.append(line, ...lines.filter(([node]) => node.tagName === "circle").map(([node]) => node));
      const note = one.bad ? ` (${one.bad} of ${one.of} values are not finite)` : "";
      legend.append(make("li", { title: one.meaning }, svg("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, sample), one.name + note));
      const paint = () => lines.forEach(([node, key]) => node.setAttribute(key, stroke()));
      paint();
      redraws.push(paint);
    });

    const cursor = svg("line", { class: "grid", y1: top, y2: height - bottom, visibility: "hidden" });
    picture.append(cursor);
    const steps = [...new Set(all.map((p) => p[0]))].sort((a, b) => a - b);
    let at = steps.length - 1;
    const show = (index, x, y, isKey) => {
      at = clamp(index, 0, steps.length - 1);
      const step = steps[at];
      cursor.setAttribute("x1", X(step));
      cursor.setAttribute("x2", X(step));
      cursor.setAttribute("visibility", "visible");
      const found = panel.series.map((one) => {
        const values = one.x.flatMap((v, k) => (v === step ? [number(one.y[k])] : []));
        return values.length ? `${one.name}: ${[...new Set(values)].join(" to ")}` : null;
      });
      const text = [`step ${step.toLocaleString("en")}`, ...found.filter(Boolean)].join("\n");
      if (isKey) spoken.textContent = text;
      const box = picture.getBoundingClientRect();
      showTooltip(text, x ?? box.left + (X(step) / width) * box.width, y ?? box.top + box.height / 3);
    };
    const point = (event) => {
      const box = picture.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * width;
      let best = 0;
      steps.forEach((step, i) => { if (Math.abs(X(step) - x) < Math.abs(X(steps[best]) - x)) best = i; });
      show(best, event.clientX, event.clientY, false);
    };
    const leave = () => { cursor.setAttribute("visibility", "hidden"); hideTooltip(); };
    picture.addEventListener("pointermove", point);
    picture.addEventListener("pointerdown", point);
    onLeave(picture, leave);
    picture.addEventListener("blur", leave);
    picture.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      show(Number.isFinite(by) ? at + by : by < 0 ? 0 : steps.length - 1, undefined, undefined, true);
    });
    const shown = Math.max(...panel.series.map((one) => one.x.length)), of = Math.max(...panel.series.map((one) => one.of));
    const thinned = shown < of ? make("small", { textContent: ` the smallest and largest of neighbouring values, of ${of}` }) : "";
    return make("figure", { class: "chart" }, make("figcaption", {}, panel.title, thinned), legend, picture);
  }

  // ---------------------------------------------------------------- layer weights

  function layerWeights(view, weights) {
    const values = weights.sides.map((side) => bytes(side.data)), T = weights.steps.length;
    const weight = (byte) => (byte === NOT_FINITE ? null : (byte / 254) ** 2);
    const slider = make("input", { type: "range", min: "0", max: String(T - 1), value: String(T - 1), step: "1" });
    slider.setAttribute("aria-label", "training step");
    const label = make("output");
    const figures = make("div", { class: "heats" });
    figures.style.setProperty("--columns", String(weights.sides.length));
    const drawn = weights.sides.map((side, i) => {
      const over = make("canvas"), bars = make("canvas");
      over.setAttribute("role", "img");
      bars.setAttribute("role", "img");
      const caption = `${side.name}: weight of each ${side.layers === 1 ? "layer" : `of ${side.layers} layers`} over the training`;
      over.setAttribute("aria-label", caption);
      const box = make("figure", { class: "heat" }, make("figcaption", {}, caption), over, bars);
      figures.append(box);
      return { side, box, over, bars, values: values[i] };
    });
    view.append(make("div", { class: "controls" }, control("training step", slider), label), figures);
    const scale = make("div", { class: "scale" });
    view.append(scale);

    const draw = () => {
      const t = Number(slider.value), of = palette();
      label.textContent = `step ${weights.steps[t].toLocaleString("en")}`;
      slider.setAttribute("aria-valuetext", label.textContent);
      let top = 0;
      for (const v of values) for (const byte of v) if (byte !== NOT_FINITE) top = Math.max(top, byte);
      top = weight(top) || 1;
      const tall = clamp(12 * Math.max(...weights.sides.map((side) => side.layers)), 90, 300);
      for (const one of drawn) {
        const L = one.side.layers, width = Math.max(one.box.clientWidth, 120), left = 34, plot = width - left - 6;
        const context = prepared(one.over, width, tall + 24);
        const image = pixels(T, L, (r, c) => { // layer 0 below
          const w = weight(one.values[c * L + L - 1 - r]);
          return w === null ? [127, 127, 127] : of(w / top);
        });
        context.clearRect(0, 0, width, tall + 24);
        context.imageSmoothingEnabled = false;
        context.drawImage(image, left, 0, plot, tall);
        context.font = "11px system-ui, sans-serif";
        context.fillStyle = colour("--soft");
        context.textAlign = "right";
        context.textBaseline = "middle";
        for (const l of ticks(0, Math.max(L - 1, 1), Math.min(L, 6)).filter((l) => Number.isInteger(l) && l < L)) {
          context.fillText(String(l), left - 5, tall - ((l + 0.5) * tall) / L);
        }
        context.textBaseline = "top";
        context.textAlign = "left";
        context.fillText(String(weights.steps[0]), left, tall + 5);
        context.textAlign = "center";
        context.fillText("training step", left + plot / 2, tall + 5);
        context.textAlign = "right";
        context.fillText(weights.steps[T - 1].toLocaleString("en"), left + plot, tall + 5);
        context.strokeStyle = colour("--focus");
        context.lineWidth = 2;
        context.strokeRect(left + (t * plot) / T, 1, Math.max(plot / T, 2), tall - 2);

        const high = 120, below = prepared(one.bars, width, high + 34);
        const now = Array.from({ length: L }, (_, l) => weight(one.values[t * L + l]));
        const most = Math.max(top, 1.5 / L);
        below.clearRect(0, 0, width, high + 34);
        below.font = "11px system-ui, sans-serif";
        below.fillStyle = colour("--soft");
        below.textAlign = "right";
        below.textBaseline = "middle";
        for (const y of ticks(0, most, 3)) {
          const at = high - (y / most) * (high - 8) + 4;
          below.fillText(number(y), left - 5, at);
          below.fillRect(left, at, plot, 0.5);
        }
        const bar = plot / L;
        now.forEach((w, l) => {
          below.fillStyle = w === null ? "#7f7f7f" : SERIES[one.side.name === "teacher" ? 0 : 1][isDark() ? 1 : 0];
          const size = ((w ?? 1) / most) * (high - 8);
          below.fillRect(left + l * bar + Math.min(1, bar / 8), high - size + 4, Math.max(bar - 2, bar * 0.75), size);
        });
        below.fillStyle = colour("--soft");
        below.textAlign = "center";
        below.textBaseline = "top";
        for (const l of ticks(0, Math.max(L - 1, 1), 8).filter((l) => Number.isInteger(l) && l < L)) {
          below.fillText(String(l), left + (l + 0.5) * bar, high + 8);
        }
        below.fillText(`layer, at step ${weights.steps[t]}`, left + plot / 2, high + 21);
        const largest = now.reduce((best, w, l) => ((w ?? -1) > (now[best] ?? -1) ? l : best), 0);
        one.bars.setAttribute("aria-label", `${one.side.name} at step ${weights.steps[t]}: layer ${largest} has the largest weight, ${number(now[largest])}`);
        one.left = left; one.plot = plot; one.tall = tall; one.bar = bar; one.now = now;
      }
      drawScale(scale, top, "weight");
    };
    const explain = (one, isBars) => (event) => {
      const canvas = isBars ? one.bars : one.over, box = canvas.getBoundingClientRect();
      const x = event.clientX - box.left - one.left, L = one.side.layers;
      if (x < 0 || x >= one.plot || (!isBars && event.clientY - box.top > one.tall)) return hideTooltip();
      const t = isBars ? Number(slider.value) : clamp(Math.floor((x / one.plot) * T), 0, T - 1);
      const l = isBars ? clamp(Math.floor(x / one.bar), 0, L - 1) : clamp(L - 1 - Math.floor(((event.clientY - box.top) / one.tall) * L), 0, L - 1);
      showTooltip(`${one.side.name}, layer ${l}, step ${weights.steps[t]}\nweight ${number(weight(one.values[t * L + l]))}`, event.clientX, event.clientY);
      if (event.type === "pointerdown" && !isBars) { slider.value = String(t); draw(); }
    };
    for (const one of drawn) {
      for (const type of ["pointermove", "pointerdown"]) {
        one.over.addEventListener(type, explain(one, false));
        one.bars.addEventListener(type, explain(one, true));
      }
      onLeave(one.over, hideTooltip);
      onLeave(one.bars, hideTooltip);
    }
    slider.addEventListener("input", draw);
    redraws.push(draw);
    draw();
  }

  function drawScale(node, top, label) {
    const canvas = make("canvas"), of = palette(), context = prepared(canvas, 140, 12);
    for (let x = 0; x < 140; x++) { context.fillStyle = rgb(of(x / 139)); context.fillRect(x, 0, 1.5, 12); }
    node.replaceChildren("0", canvas, `${number(top)}  ${label}`);
  }

  // ---------------------------------------------------------------- maps

  // One packed map: the value of every step and word, from cells that several may share.
  class PackedMap {
    constructor(packed, S, W) {
      Object.assign(this, packed, { S, W, bytes: bytes(packed.data) });
      this.rows = Math.ceil(S / this.rb);
      this.columns = Math.ceil(W / this.cb);
      this.sums = Array.from({ length: this.rows }, (_, r) => {
        let sum = 0;
        for (let c = 0; c < this.columns; c++) sum += this.cell(r, c) ?? 0;
        return sum;
      });
      this.topShare = 0;
      for (let r = 0; r < this.rows; r++) for (let c = 0; c < this.columns; c++) this.topShare = Math.max(this.topShare, this.share(r, c) ?? 0);
    }
    cell(r, c) {
      const byte = this.bytes[r * this.columns + c];
      return byte === NOT_FINITE ? null : (byte / 254) ** 2 * this.top;
    }
    share(r, c) { // of the row's mass
      const value = this.cell(r, c);
      return value === null ? null : this.sums[r] > 0 ? value / this.sums[r] : 0;
    }
    at(s, w, isShare) {
      const [r, c] = [Math.floor(s / this.rb), Math.floor(w / this.cb)];
      return isShare ? this.share(r, c) : this.cell(r, c);
    }
    mostOf(isShare) { return isShare ? this.topShare : this.top; }
  }

  // The text of a view with its steps and words, its maps, and the switches for both. Returns the function that draws.
  function mapView(parent, view, state) {
    const S = view.steps.length, W = view.words.length, texts = view.steps.map((pieces) => pieces.map((p) => p[0]).join(""));
    const decoded = new Map();
    const decode = (packed) => {
      if (!decoded.has(packed)) decoded.set(packed, new PackedMap(packed, S, W));
      return decoded.get(packed);
    };
    const textNode = make("div", { class: "text" });
    textNode.setAttribute("tabindex", "0");
    textNode.setAttribute("role", "group");
    textNode.setAttribute("aria-label", "The text; each numbered sentence is a row of the maps, each key word a column");
    const stepNodes = [], wordNodes = Array.from({ length: W }, () => []);
    view.steps.forEach((pieces, s) => {
      if (s === 0 && view.rationale > 0) textNode.append(make("span", { class: "part", textContent: "question" }));
      if (s === view.rationale) textNode.append(make("span", { class: "part", textContent: state.rationaleName }));
      const node = make("span", { class: "step" }, make("sup", { textContent: String(s + 1) }));
      for (const [text, w] of pieces) {
        if (w < 0) { node.append(text); continue; }
        const word = make("mark", { class: "word", textContent: text });
        word.dataset.word = String(w);
        wordNodes[w].push(word);
        node.append(word);
      }
      node.addEventListener("pointerenter", () => select(0, s, null));
      onLeave(node, clear);
      stepNodes.push(node);
      textNode.append(node);
    });

    const figures = make("div", { class: "heats" }), scale = make("div", { class: "scale" });
    parent.append(textNode, figures, scale);
    const boards = view.sides.map((side, i) => {
      const corner = make("canvas", { class: "corner" }), top = make("canvas", { class: "top" });
      const left = make("canvas", { class: "left" }), cells = make("canvas", { class: "cells" });
      cells.setAttribute("tabindex", "0");
      cells.setAttribute("role", "application");
      cells.setAttribute("aria-roledescription", "map");
      const caption = make("figcaption"), board = make("div", { class: "board" });
      if (S && W) board.append(make("div", { class: "plane" }, corner, top, left, cells));
      else board.append(make("p", { class: "empty", textContent: W ? "no steps" : "no key words" }));
      const box = make("figure", { class: "heat" }, caption, board);
      figures.append(box);
      const one = { side, i, corner, top, left, cells, caption, board, box };
      const locate = (event) => {
        const area = cells.getBoundingClientRect();
        return [clamp(Math.floor((event.clientY - area.top) / one.ch), 0, S - 1), clamp(Math.floor((event.clientX - area.left) / one.cw), 0, W - 1)];
      };
      cells.addEventListener("pointermove", (event) => { const [s, w] = locate(event); select(i, s, w, event.clientX, event.clientY); });
      cells.addEventListener("pointerdown", (event) => { const [s, w] = locate(event); select(i, s, w, event.clientX, event.clientY); });
      onLeave(cells, clear);
      cells.addEventListener("blur", clear);
      cells.addEventListener("focus", () => { if (cells.matches(":focus-visible")) key(one, 0, 0); });
      cells.addEventListener("keydown", (event) => {
        const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
        if (!by) return;
        event.preventDefault();
        key(one, ...by);
      });
      return one;
    });
    let focus = [0, 0], current = null;
    const key = (one, down, across) => {
      focus = [clamp(focus[0] + down, 0, S - 1), clamp(focus[1] + across, 0, W - 1)];
      const [s, w] = focus, pad = 4;
      const x = w * one.cw, y = s * one.ch, room = one.board;
      room.scrollLeft = clamp(room.scrollLeft, x + one.cw + pad - (room.clientWidth - one.lw), Math.max(x - pad, 0));
      room.scrollTop = clamp(room.scrollTop, y + one.ch + pad - (room.clientHeight - one.th), Math.max(y - pad, 0));
      const area = one.cells.getBoundingClientRect();
      select(one.i, s, w, area.left + (w + 1) * one.cw, area.top + (s + 1) * one.ch);
      spoken.textContent = tooltip.textContent;
    };

    const chosen = (one) => decode(one.side.maps[clamp(state.layers[one.side.name] ?? 0, 0, one.side.maps.length - 1)]);

    function select(i, s, w, x, y) {
      current = [i, s, w];
      if (w !== null) focus = [s, w];
      const map = boards.length ? chosen(boards[i]) : null;
      stepNodes.forEach((node, k) => node.classList.toggle("now", k === s));
      const of = palette();
      let most = 0;
      for (let k = 0; map && k < W; k++) most = Math.max(most, map.at(s, k, false) ?? 0);
      wordNodes.forEach((nodes, k) => {
        const share = map && most > 0 ? (map.at(s, k, false) ?? 0) / most : 0;
        for (const node of nodes) {
          node.style.background = share > 0.02 ? rgb(of(share)) : "";
          node.style.color = share > 0.02 ? inkOn(of(share)) : "";
          node.classList.toggle("now", k === w);
        }
      });
      if (w !== null) { // keep the step in view within the text, not on the page
        const node = stepNodes[s];
        textNode.scrollTop = clamp(textNode.scrollTop, node.offsetTop + node.offsetHeight - textNode.clientHeight + 6, Math.max(node.offsetTop - 6, 0));
        showTooltip(describe(s, w), x, y);
      }
      boards.forEach(paint);
    }
    function clear() {
      if (!current) return;
      current = null;
      hideTooltip();
      stepNodes.forEach((node) => node.classList.remove("now"));
      wordNodes.flat().forEach((node) => { node.classList.remove("now"); node.style.background = node.style.color = ""; });
      boards.forEach(paint);
    }
    function describe(s, w) {
      const lines = [`step ${s + 1}: ${shorten(texts[s], 140)}`, `key word ${w + 1}: ${shorten(view.words[w], 60)}`];
      for (const one of boards) {
        const map = chosen(one), value = map.at(s, w, false);
        const where = map.rb > 1 || map.cb > 1 ? `, the largest of ${map.rb} steps x ${map.cb} words` : "";
        const part = value === null || map.cb > 1 || map.rb > 1 ? "" : ` (${percent(map.at(s, w, true))} of the row)`;
        lines.push(`${one.side.name}, ${map.name}: ${number(value)}${part}${where}`);
      }
      return lines.join("\n");
    }

    const labelOf = (s) => `${s + 1}  ${shorten(texts[s], 200)}`;
    function layout(one) {
      const room = Math.max(figures.clientWidth / (innerWidth <= 760 ? 1 : Number(state.columns(view))) - 24, 200);
      const size = state.size, tall = 520 / Math.max(S, 1);
      const sentence = 6 * Math.max(0, ...texts.map((_, s) => labelOf(s).length)) + 12;
      const least = clamp(room * 0.3, 76, 190), isFixed = size !== "auto" && size !== "fit";
      // Few words leave room for whole sentences: cells of 36 pixels are large enough.
      one.lw = Math.round(Math.max(least, Math.min(sentence, room - 2 - W * (isFixed ? Number(size) : 36))));
      const fitted = (room - one.lw - 2) / Math.max(W, 1);
      if (size === "auto") [one.cw, one.ch] = [clamp(fitted, 7, 46), clamp(tall, 9, 26)];
      else if (size === "fit") [one.cw, one.ch] = [clamp(fitted, 0.5, 46), clamp(tall, 0.5, 26)];
      else [one.cw, one.ch] = [Number(size), Number(size)];
      const longest = Math.max(0, ...view.words.map((word) => shorten(word, 14).length));
      one.th = one.cw >= 7.2 * longest + 6 ? 20 : Math.round(clamp(longest * 6.2 + 10, 24, 88));
    }

    function drawBoard(one) {
      const map = chosen(one), label = [`${one.side.name}: `, make("small", { textContent: nameOf(map) })];
      one.caption.replaceChildren(...label);
      if (!S || !W) return;
      layout(one);
      const width = W * one.cw, height = S * one.ch, soft = colour("--soft"), ink = colour("--text");
      prepared(one.corner, one.lw, one.th);
      const top = prepared(one.top, width, one.th), left = prepared(one.left, one.lw, height);
      top.font = left.font = "11px system-ui, sans-serif";
      top.fillStyle = soft;
      const every = Math.ceil(13 / one.cw), isFlat = one.th === 20;
      for (let w = 0; w < W; w += every) {
        top.save();
        top.translate(isFlat ? (w + 0.5) * one.cw : Math.max((w + 0.5) * one.cw, 5), one.th - 5);
        if (isFlat) { top.textAlign = "center"; } else { top.rotate(-Math.PI / 3); top.textBaseline = "middle"; }
        top.fillText(shorten(view.words[w], 14), 0, 0);
        top.restore();
      }
      left.textBaseline = "middle";
      const skip = Math.ceil(12 / one.ch);
      for (let s = 0; s < S; s += skip) {
        left.fillStyle = s >= view.rationale ? ink : soft;
        const name = labelOf(s), y = clamp((s + 0.5) * one.ch, 6, Math.max(height - 6, 6));
        let most = name.length;
        while (most > 3 && left.measureText(name.slice(0, most) + "…").width > one.lw - 8) most--;
        left.fillText(most < name.length ? name.slice(0, most) + "…" : name, 4, y);
      }
      const of = palette(), most = scaleTop();
      one.image = pixels(map.columns, map.rows, (r, c) => {
        const value = state.isShare ? map.share(r, c) : map.cell(r, c);
        return value === null ? [127, 127, 127] : of(most ? value / most : 0);
      });
      one.of = of;
      one.cells.setAttribute("aria-label", `${one.side.name}, ${map.name}: ${S} steps by ${W} key words. Arrow keys read the values.`);
      paint(one);
    }
    function paint(one) {
      if (!S || !W || !one.image) return;
      const map = chosen(one), width = W * one.cw, height = S * one.ch, context = prepared(one.cells, width, height);
      context.imageSmoothingEnabled = false;
      context.drawImage(one.image, 0, 0, map.columns * map.cb * one.cw, map.rows * map.rb * one.ch);
      context.fillStyle = colour("--back");
      if (one.cw >= 9 && one.ch >= 9 && map.rb === 1 && map.cb === 1) { // gaps between the cells
        for (let w = 1; w < W; w++) context.fillRect(w * one.cw - 0.5, 0, 1, height);
        for (let s = 1; s < S; s++) context.fillRect(0, s * one.ch - 0.5, width, 1);
      }
      if (one.cw >= 27 && one.ch >= 16 && S * W <= 1200) {
        context.font = "10px system-ui, sans-serif";
        context.textAlign = "center";
        context.textBaseline = "middle";
        const most = scaleTop();
        for (let s = 0; s < S; s++) {
          for (let w = 0; w < W; w++) {
            const value = map.at(s, w, state.isShare);
            if (value === null || value < 0.01 * most) continue;
            context.fillStyle = inkOn(one.of(value / most));
            context.fillText(state.isShare ? String(Math.round(100 * value)) : value >= 10 ? value.toFixed(0) : value.toFixed(2).replace(/^0/, ""), (w + 0.5) * one.cw, (s + 0.5) * one.ch);
          }
        }
      }
      if (view.rationale > 0 && view.rationale < S) {
        context.fillStyle = colour("--soft");
        context.fillRect(0, view.rationale * one.ch - 0.75, width, 1.5);
      }
      if (current) {
        context.strokeStyle = colour("--focus");
        context.lineWidth = 2;
        const [, s, w] = current;
        context.strokeRect(1, s * one.ch, width - 2, Math.max(one.ch, 2));
        if (w !== null) context.strokeRect(w * one.cw, s * one.ch, Math.max(one.cw, 2), Math.max(one.ch, 2));
      }
    }
    const scaleTop = () => Math.max(0, ...boards.map((one) => chosen(one).mostOf(state.isShare)));
    return () => {
      figures.style.setProperty("--columns", String(state.columns(view)));
      boards.forEach(drawBoard);
      const shared = boards.length > 1 ? ", one scale for both maps" : "";
      let overlap = "";
      if (boards.length === 2) {
        const found = commonPart(chosen(boards[0]), chosen(boards[1]));
        if (found !== null) overlap = `; overlap of these two maps ${percent(found)}`;
      }
      drawScale(scale, scaleTop(), (state.isShare ? "share of the row's attention to key words" : "attention, summed over the step's tokens") + shared + overlap);
    };
  }
  const inkOn = (c) => (0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2] > 140 ? "#10151b" : "#ffffff");
  const nameOf = (map) => map.name + (map.weight === undefined ? "" : `, weight ${percent(map.weight)}`) + (map.rb > 1 || map.cb > 1 ? `, a cell is the largest of ${map.rb} x ${map.cb}` : "");

  // The part of each step's shares that two maps have in common, a mean over steps; null where it is not defined.
  function commonPart(one, other) {
    if (one.rb + one.cb + other.rb + other.cb > 4) return null;
    let sum = 0, count = 0;
    for (let s = 0; s < one.S; s++) {
      if (!(one.sums[s] > 0)) continue;
      let common = 0;
      for (let w = 0; w < one.W; w++) common += Math.min(one.share(s, w) ?? 0, other.share(s, w) ?? 0);
      sum += common;
      count += 1;
    }
    return count ? sum / count : null;
  }

  const sizes = [["auto", "automatic"], ["fit", "whole map"], ["8", "8 px"], ["16", "16 px"], ["30", "30 px"]];
  function newState(rationaleName) {
    return {
      layers: {}, isShare: false, size: "auto", rationaleName,
      columns: (view) => (view.sides.length < 2 || view.words.length > 40 ? 1 : 2),
    };
  }

  // The switches for colour and size, and one per side for its layer.
  function mapControls(view, state, redraw) {
    const found = make("div", { class: "controls" });
    for (const side of view.sides) {
      const names = side.maps.map((map) => map.name + (map.weight === undefined ? "" : ` (${percent(map.weight)})`));
      const chosen = clamp(state.layers[side.name] ?? 0, 0, names.length - 1);
      found.append(chooser(`${side.name}: map of`, names, chosen, (i) => { state.layers[side.name] = i; redraw(); }));
    }
    const colours = make("select", { onchange: () => { state.isShare = colours.value === "share"; redraw(); } },
      make("option", { value: "mass", textContent: "attention" }), make("option", { value: "share", textContent: "share of the row" }));
    colours.value = state.isShare ? "share" : "mass";
    const cells = make("select", { onchange: () => { state.size = cells.value; redraw(); } });
    for (const [value, name] of sizes) cells.append(make("option", { value, textContent: name }));
    cells.value = state.size;
    found.append(control("colours", colours), control("cells", cells));
    return found;
  }

  function maps(parent, views) {
    const state = newState("rationale"), switches = make("div"), body = make("div");
    let draw = () => {};
    const show = (index) => {
      hideTooltip();
      const view = views[index];
      const size = make("p", { class: "small", textContent: `${view.steps.length} steps, ${view.words.length} key words, answer ${view.answer}. Point at a row or a sentence to see the words it looks at.` });
      body.replaceChildren(size);
      if (view.note) body.append(make("p", { class: "note", textContent: view.note }));
      draw = mapView(body, view, state);
      switches.replaceChildren(mapControls(view, state, () => draw()));
      draw();
    };
    const names = views.map((view) => view.id);
    const choose = make("div", { class: "controls" }, chooser(`example (${views.length})`, names, 0, show));
    parent.append(choose, switches, body);
    redraws.push(() => draw());
    show(0);
  }

  // ---------------------------------------------------------------- predictions

  function mark(entry) {
    if (entry.left_out) return make("span", { class: "mark none", textContent: "– left out" });
    return make("span", { class: `mark ${entry.right ? "right" : "wrong"}`, textContent: entry.right ? "✓ right" : "✗ wrong" });
  }

  function replies(parent, entries, [own, ...others]) {
    const groups = [["all", () => true], ["right", (e) => e.right], ["wrong", (e) => !e.right && !e.left_out]];
    if (entries.some((e) => e.left_out)) groups.push(["left out", (e) => Boolean(e.left_out)]);
    others.forEach((name, i) => {
      groups.push([`right by ${own}, wrong by ${name}`, (e) => e.right && e.others[i] && !e.others[i].right]);
      groups.push([`wrong by ${own}, right by ${name}`, (e) => !e.right && !e.left_out && e.others[i] && e.others[i].right]);
    });
    if (entries.some((e) => e.view)) groups.push(["with a map", (e) => Boolean(e.view)]);
    const list = make("div"), buttons = make("div", { class: "controls" });
    buttons.setAttribute("role", "group");
    buttons.setAttribute("aria-label", "Which predictions are shown");
    const nodes = entries.map((entry) => reply(entry, others));
    const none = make("p", { class: "empty", textContent: "There are none." });
    const filter = (chosen) => {
      const shows = groups[chosen][1];
      let count = 0;
      nodes.forEach((node, i) => { node.hidden = !shows(entries[i]); count += !node.hidden; });
      none.hidden = count > 0;
      [...buttons.children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === chosen)));
    };
    groups.forEach(([name, shows], i) => {
      buttons.append(make("button", { type: "button", textContent: `${name} (${entries.filter(shows).length})`, onclick: () => filter(i) }));
    });
    list.append(...nodes, none);
    parent.append(buttons, list);
    filter(0);
  }

  function reply(entry, others) {
    const given = entry.left_out ? "" : entry.prediction === null ? "no answer" : shorten(String(entry.prediction), 40);
    const gold = shorten(String(entry.gold), 40);
    const title = make("summary", {}, mark(entry), make("span", { class: "asked", textContent: `${entry.id}: ${shorten(entry.question, 200)}` }),
      make("span", { class: "answers", textContent: entry.left_out ? `gold ${gold}` : `${given} · gold ${gold}` }));
    const inside = make("div", { class: "inside" });
    let draw = null;
    const fill = () => {
      if (draw) { draw(); return; }
      const columns = make("div", { class: "both" });
      const body = (label, text, sign) => make("div", {}, make("h3", {}, label, " ", sign), make("div", { class: "body", textContent: text === "" ? "(empty)" : text }));
      if (entry.view) {
        const state = newState("the student's reply");
        inside.append(make("h3", { textContent: "Where the student looked while it wrote this" }));
        const part = make("div");
        const view = mapView(part, entry.view, state);
        inside.append(mapControls(entry.view, state, () => view()), part);
        draw = () => { if (node.open) view(); };
      } else {
        columns.append(body("Question", entry.question, ""), body("Student", entry.left_out ? `left out: ${entry.left_out}` : entry.reply ?? "", mark(entry)));
        draw = () => {};
      }
      entry.others.forEach((other, i) => {
        columns.append(other ? body(others[i], other.reply ?? "", mark(other)) : body(others[i], "has no prediction for this question", ""));
      });
      const right = `predicted ${entry.prediction === null ? "no answer" : entry.prediction}, gold answer ${entry.gold}`;
      inside.prepend(make("p", { class: "small", textContent: entry.left_out ? `gold answer ${entry.gold}` : right }));
      if (entry.note) inside.append(make("p", { class: "note", textContent: entry.note }));
      if (columns.children.length) inside.append(columns);
      redraws.push(draw);
      draw();
    };
    const node = make("details", { class: "reply" }, title, inside);
    node.addEventListener("toggle", () => { if (node.open) fill(); });
    return node;
  }

  // ---------------------------------------------------------------- the page

  const part = (id, has, fill) => {
    const node = document.getElementById(`${id}-view`);
    if (node && has) fill(node);
  };
  part("curves", data.curves.length, (node) => node.append(make("div", { class: "charts" }, ...data.curves.map(chart))));
  part("weights", data.weights, (node) => layerWeights(node, data.weights));
  part("maps", data.maps.length, (node) => maps(node, data.maps));
  part("predictions", data.replies.length, (node) => replies(node, data.replies, data.models));

  const redraw = () => redraws.forEach((one) => one());
  let waiting = 0, known = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === known) return; // a phone's bars change the height only
    known = innerWidth;
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(redraw);
  });
  dark.addEventListener("change", redraw);
  let opened = [];
  addEventListener("beforeprint", () => {
    printing = true;
    opened = [...document.querySelectorAll("details:not(.reply):not([open])")];
    opened.forEach((node) => { node.open = true; });
    redraw();
  });
  addEventListener("afterprint", () => {
    printing = false;
    opened.forEach((node) => { node.open = false; });
    redraw();
  });
})();
