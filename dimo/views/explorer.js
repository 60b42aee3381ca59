// The explorer's page: a widget's front end, and over stored data the report. All numbers come from the model.
const COLOUR = {
  conditional: "#0072B2", unconditional: "#56B4E9", guided: "#0072B2",
  auxiliary: "#E69F00", student: "#009E73", one_pass: "#CC79A7",
};
const bytes = (data) => data instanceof Uint8Array ? data : new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
const floats = (data) => data instanceof Float32Array ? data : new Float32Array(bytes(data).slice().buffer);
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const short = (x) => (x === 0 ? "0" : Math.abs(x) < 0.0005 || Math.abs(x) >= 1e5 ? x.toExponential(1) : x.toPrecision(3));
const likely = (p) => (p < 1e-9 ? "<1e-9" : p < 0.001 ? p.toExponential(1) : short(p)); // 0.000612 would be wider than its column

function make(tag, properties = {}, children = []) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function picker(options, value, changed) {
  const node = make("select", { onchange: () => changed(node.value) });
  node.dataset.lmSuppressShortcuts = "true";
  node.fill = (named, chosen) => {
    node.replaceChildren(...Object.entries(named).map(([key, text]) => make("option", { value: key, textContent: text })));
    node.value = chosen;
  };
  node.fill(options, value);
  return node;
}

// A slider over a range, or over the values that were stored.
function slider(name, [low, high, step], choices, changed) {
  const node = make("input", { type: "range", min: 0, max: choices ? choices.length - 1 : Math.round((high - low) / step), step: 1 });
  const shown = make("output");
  const of = (i) => (choices ? choices[i] : +(low + i * step).toFixed(4));
  node.dataset.lmSuppressShortcuts = "true";
  node.setAttribute("aria-label", name);
  node.oninput = () => { shown.value = of(+node.value); changed(of(+node.value)); };
  node.disabled = Boolean(choices) && choices.length < 2;
  const label = make("label", {}, [name, node, shown]);
  label.put = (value) => {
    const at = choices ? choices.indexOf(value) : Math.round((value - low) / step);
    node.value = Math.max(0, at);
    shown.value = value;
  };
  label.move = (by) => { node.value = +node.value + by; node.oninput(); };
  return label;
}

function opaque(rgb, rgba) { // in single numbers: an array for each pixel takes ten times as long
  for (let i = 0, j = 0; i < rgb.length; i += 3, j += 4) {
    rgba[j] = rgb[i], rgba[j + 1] = rgb[i + 1], rgba[j + 2] = rgb[i + 2], rgba[j + 3] = 255;
  }
}

// All latent frames beside each other on one canvas; `paint(frame)` gives a frame's pixels.
class Mosaic {
  constructor(grid, name, chosen) {
    [this.frames, this.rows, this.columns] = grid;
    this.canvas = make("canvas", { tabIndex: 0, className: "map" });
    this.canvas.dataset.lmSuppressShortcuts = "true";
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-label", name);
    this.canvas.onclick = (event) => { const at = this.token(event); if (at) chosen(at); };
  }

  place(width) { // the widest cells: as many frames in a row as that takes
    const ratio = window.devicePixelRatio || 1, most = Math.max(60, Math.floor(width * ratio));
    this.gap = Math.round(8 * ratio), this.head = Math.round(15 * ratio);
    const fits = []; // the widest cells with 1, 2, ... frames beside each other
    for (let across = 1; across <= this.frames; across++) {
      const lines = Math.ceil(this.frames / across), tall = (420 * ratio) / lines - this.head - this.gap;
      fits.push(Math.max(1, Math.floor(Math.min((most / across - this.gap) / this.columns, tall / this.rows, 40 * ratio))));
    }
    const widest = Math.max(...fits);
    this.across = fits.findLastIndex((cell, i) => cell >= 0.7 * widest && (i + 1) * (this.columns * cell + this.gap) <= most) + 1 || 1;
    const best = fits[this.across - 1];
    this.cell = best;
    const lines = Math.ceil(this.frames / this.across);
    this.canvas.width = this.across * (this.columns * best + this.gap);
    this.canvas.height = lines * (this.rows * best + this.head + this.gap);
    this.canvas.style.width = `${this.canvas.width / ratio}px`;
    Object.assign(this.canvas.dataset, { across: this.across, cell: best, gap: this.gap, head: this.head }); // device pixels
  }

  corner(frame) {
    return [(frame % this.across) * (this.columns * this.cell + this.gap) + 2,
      Math.floor(frame / this.across) * (this.rows * this.cell + this.head + this.gap) + this.head];
  }

  draw(paint, [f, y, x]) {
    const pen = this.canvas.getContext("2d"), ratio = window.devicePixelRatio || 1;
    pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    pen.imageSmoothingEnabled = false;
    pen.font = `${11 * ratio}px "DejaVu Sans", sans-serif`;
    for (let frame = 0; frame < this.frames; frame++) {
      const [left, top] = this.corner(frame), { width, height, rgb } = paint(frame);
      const tile = make("canvas", { width, height }), image = tile.getContext("2d").createImageData(width, height);
      opaque(rgb, image.data);
      tile.getContext("2d").putImageData(image, 0, 0);
      pen.fillStyle = "#555";
      pen.fillText(this.columns * this.cell > 60 * ratio ? `frame ${frame}` : frame, left, top - 4 * ratio);
      pen.drawImage(tile, left, top, this.columns * this.cell, this.rows * this.cell);
    }
    const [left, top] = this.corner(f), wide = Math.max(1.5, Math.min(2, this.cell / 6)) * ratio;
    for (const [colour, grown] of [["#fff", wide], ["#d55e00", 0]]) {
      pen.strokeStyle = colour, pen.lineWidth = wide;
      const out = wide / 2 - 0.5 + grown;
      pen.strokeRect(left + x * this.cell - out, top + y * this.cell - out, this.cell + 2 * out, this.cell + 2 * out);
    }
  }

  token(event) {
    const box = this.canvas.getBoundingClientRect(), grow = this.canvas.width / box.width;
    const [px, py] = [(event.clientX - box.left) * grow, (event.clientY - box.top) * grow];
    for (let frame = 0; frame < this.frames; frame++) {
      const [left, top] = this.corner(frame), x = Math.floor((px - left) / this.cell), y = Math.floor((py - top) / this.cell);
      if (x >= 0 && x < this.columns && y >= 0 && y < this.rows) return [frame, y, x];
    }
    return null;
  }
}

// Where the bars of p end: the power of ten, 1 at most, to which the longest is a tenth or more.
function endOfBars(p) {
  const most = Math.max(...p);
  return most > 0 ? Math.min(1, Number(`1e${Math.ceil(Math.log10(most))}`)) : 1;
}

function panel(about, top, pane, patches, other) {
  const end = endOfBars([...top.p, ...(other ? other.p : [])]);
  const rows = top.codes.map((code, i) => {
    const track = make("div", { className: "track" }, [make("i")]);
    track.firstChild.style.cssText = `width:${100 * top.p[i] / end}%;background:${COLOUR[top.of]}`;
    const before = other ? other.codes.indexOf(code) : -1;
    if (before >= 0) {
      const mark = make("b", { title: `A: ${short(other.p[before])}` });
      mark.style.left = `calc(${100 * other.p[before] / end}% - 1px)`;
      track.append(mark);
    }
    const picture = make("canvas", { width: 1, height: 1, hidden: !patches });
    const at = patches ? patches.codes.indexOf(code) : -1;
    if (at >= 0) {
      const size = patches.size, rgb = bytes(patches.rgb).subarray(3 * size * size * at, 3 * size * size * (at + 1));
      picture.width = picture.height = size;
      const image = picture.getContext("2d").createImageData(size, size);
      opaque(rgb, image.data);
      picture.getContext("2d").putImageData(image, 0, 0);
    }
    const own = code === pane.x_hat;
    const row = make("div", { className: own ? "row x_hat" : "row", title: own ? "x_hat" : "" }, [patches ? picture : make("span"),
      make("span", { textContent: (own ? "▸" : "") + code }), track, make("span", { textContent: likely(top.p[i]) })]);
    Object.assign(row.dataset, { code, p: top.p[i] });
    return row;
  });
  const node = make("div", { className: "panel", title: `entropy ${short(top.entropy)} nats; x_hat has rank ${top.rank}` }, [
    make("h4", { textContent: about.titles[top.of] }),
    make("div", { className: "about", textContent: `H ${short(top.entropy < 1e-6 ? 0 : top.entropy)}, x_hat #${top.rank}, p ${likely(top.p_x_hat)}` }), ...rows,
    make("div", { className: "about", textContent: `bars end at p ${end}` })]);
  node.style.borderTopColor = COLOUR[top.of];
  if (top.of === "unconditional" || top.of === "guided") node.style.borderTopStyle = top.of === "guided" ? "double" : "dashed";
  node.dataset.of = top.of;
  return node;
}

// Cross-entropy of the same logits against moved targets: a bar each, the right reading first.
function strip(canvas, alignment, width) {
  const ratio = window.devicePixelRatio || 1, readings = alignment.readings;
  canvas.hidden = !readings.length;
  if (!readings.length) return;
  const across = Math.max(40, Math.floor(width / readings.length)), tall = 56, size = across < 58 ? 10 : 11;
  canvas.width = width * ratio, canvas.height = (tall + 50) * ratio;
  canvas.style.width = `${width}px`;
  const pen = canvas.getContext("2d"), most = Math.max(...readings.map((r) => r.nats));
  pen.scale(ratio, ratio);
  pen.clearRect(0, 0, width, tall + 50);
  pen.textAlign = "center";
  readings.forEach((reading, i) => {
    const high = Math.max(1, (tall - 14) * reading.nats / most), left = i * across, middle = left + across / 2;
    pen.fillStyle = reading.name === alignment.found ? (alignment.found === "right" ? "#009E73" : "#D55E00") : "#9bb7c9";
    pen.fillRect(left + 4, tall - high, across - 8, high);
    pen.fillStyle = "#1b1b1b";
    pen.font = `${size}px "DejaVu Sans", sans-serif`;
    pen.fillText(short(reading.nats), middle, tall - high - 3);
    const words = reading.name.replace("exchanged", "swapped").split(" "), lines = [];
    for (const word of words) {
      if (lines.length && (`${lines.at(-1)} ${word}`).length <= across / (0.62 * size)) lines[lines.length - 1] += ` ${word}`;
      else lines.push(word);
    }
    lines.slice(0, 4).forEach((line, k) => pen.fillText(line, middle, tall + 11 + 12 * k));
  });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Cross-entropy in nats per token: ${readings.map((r) => `${r.name} ${short(r.nats)}`).join(", ")}`);
}

function render({ model, el }) {
  const about = model.get("about"), grid = about.grid, colours = bytes(about.colours), choices = about.choices || {};
  let view = model.get("view"), wanted = structuredClone(model.get("request")), busy = 0, again = false, log = false, late = 0;
  const now = () => wanted.panes.at(-1);

  function send() { // the latest wins: while one is being answered, only the last of the others is kept
    if (busy) { again = true; return; }
    busy = wanted.id = Math.max(wanted.id, model.get("view").id) + 1;
    late = setTimeout(() => { wrong.textContent = "No answer yet: the kernel is busy, or gone."; }, 4000);
    model.set("request", structuredClone(wanted));
    model.save_changes();
  }
  const change = (values) => { Object.assign(now(), values); send(); };

  const fillOf = () => { // a statistic that a pane's network does not have is shown of one that has it
    for (const pane of wanted.panes) {
      const there = about.offered[pane.model];
      if (!there[wanted.statistic]) wanted.statistic = Object.keys(there)[0];
      if (!there[wanted.statistic].includes(pane.of)) pane.of = there[wanted.statistic].at(-1);
    }
    const of = about.offered[now().model][wanted.statistic];
    network.fill(Object.fromEntries(of.map((name) => [name, about.titles[name]])), now().of);
  };
  const known = () => Object.fromEntries(Object.keys(about.offered[now().model]).map((name) => [name, about.statistics[name].title]));

  const named = (items) => Object.fromEntries(items.map((item) => [item, item]));
  let prompt;
  if (about.any_prompt && !choices.prompt) {
    const list = make("datalist", { id: `dimo-${Math.random().toString(36).slice(2)}` }, about.prompts.map((p) => make("option", { value: p })));
    prompt = make("input", { className: "prompt", value: now().prompt, onchange: () => change({ prompt: prompt.value }) });
    prompt.dataset.lmSuppressShortcuts = "true";
    prompt.setAttribute("list", list.id);
    el.append(list);
  } else {
    prompt = picker(named(choices.prompt || about.prompts), now().prompt, (value) => change({ prompt: value }));
    prompt.className = "prompt";
  }
  const seed = slider("noise seed", [0, 99, 1], choices.seed, (value) => change({ seed: value }));
  const t = slider("t", [0, 0.99, 0.01], choices.t, (value) => change({ t: value }));
  const guidance = slider("guidance", [0, 12, 0.25], choices.guidance_scale, (value) => change({ guidance_scale: value }));
  const temperature = slider("temperature", [0.1, 3, 0.05], choices.temperature, (value) => change({ temperature: value }));
  const statistic = picker(known(), wanted.statistic, (value) => { wanted.statistic = value; fillOf(); send(); });
  const network = picker({}, "", (value) => change({ of: value }));
  const picture = picker(about.pictures, wanted.picture, (value) => { wanted.picture = value; send(); });
  const models = picker({ ...about.models }, now().model, (value) => { now().model = +value; refill(); send(); });
  const logged = make("input", { type: "checkbox", onchange: () => { log = logged.checked; draw(); } });
  const pin = make("button", { textContent: "pin A", title: "keep this state as A and go on as B (key a)", onclick: pinned });
  const swap = make("button", { textContent: "swap", onclick: () => { wanted.panes.reverse(); refill(); send(); } });
  const refill = () => { fillOf(); statistic.fill(known(), wanted.statistic); put(); };
  function pinned() {
    wanted.panes = wanted.panes.length > 1 ? [now()] : [structuredClone(now()), now()];
    send();
  }

  const wrong = make("div", { className: "wrong" }), said = make("div", { className: "said" });
  said.setAttribute("aria-live", "polite");
  const left = make("div"), right = make("div"), title = make("h4"), panels = make("div", { className: "panels" });
  const heading = make("h4"), pictured = make("h4"), scale = make("canvas"), notes = make("div", { className: "quiet" });
  const saidMap = make("div", { className: "said" });
  const pick = (at) => { wanted.token = at; send(); draw(); };
  const film = new Mosaic(grid, "Decoded frames. Click a patch to choose its token.", pick);
  const maps = [0, 1].map((i) => new Mosaic(grid, `Token map ${"AB"[i]}. Arrow keys move the token, page keys change the frame.`, pick));
  const titles = maps.map(() => make("h4"));
  left.append(pictured, film.canvas, titles[0], maps[0].canvas, titles[1], maps[1].canvas, scale, saidMap);
  right.append(title, said, panels, notes);
  const bars = make("canvas"), verdict = make("div"), output = make("textarea", { rows: 9, readOnly: true, hidden: true });
  const save = make("button", { textContent: "save slice", onclick: () => model.send({ kind: "save" }) });
  const copy = make("button", { textContent: "copy as test", onclick: () => model.send({ kind: "test" }) });
  const check = make("button", { textContent: "check the slice", onclick: () => model.send({ kind: "check" }) });
  const doing = make("div", { className: "do", hidden: !about.live }, [check, save, copy]);
  const foot = make("div", { className: "foot" }, [verdict, doing, output, bars]);
  bars.style.gridColumn = "1 / -1";
  const label = (text, node) => make("label", {}, [text, node]);
  el.classList.add("dimo");
  el.append(
    make("div", { className: "bar" }, [
      ...(about.models.length > 1 ? [label("checkpoint", models)] : []), label("prompt", prompt), seed, t, guidance, temperature]),
    make("div", { className: "bar" }, [
      label("map of", statistic), label("by", network), ...(Object.keys(about.pictures).length ? [label("picture", picture)] : []),
      label("log scale", logged), pin, swap]),
    wrong, make("div", { className: "body" }, [left, right]), foot);

  const put = () => {
    if (prompt.value !== now().prompt) prompt.value = now().prompt;
    seed.put(now().seed); t.put(now().t); guidance.put(now().guidance_scale); temperature.put(now().temperature);
    statistic.value = wanted.statistic; network.value = now().of; models.value = now().model;
    pin.textContent = wanted.panes.length > 1 ? "unpin A" : "pin A";
    swap.disabled = wanted.panes.length < 2;
  };

  const at = ([f, y, x]) => (f * grid[1] + y) * grid[2] + x;
  const says = (asked) => `${about.titles[asked.of]}, ` + (about.statistics[view.statistic].over_noises
    ? `one pass over ${about.noises} noises` : `t ${asked.t}, seed ${asked.seed}`);
  let values = [], range = [0, 1];
  const shade = (value) => {
    let [low, high] = range;
    if (log) { low = Math.log(Math.max(low, high / 1e4)); value = Math.max(low, Math.log(Math.max(value, 1e-30))); high = Math.log(high); }
    return clamp(Math.floor((value - low) / (high - low) * 256), 0, 255);
  };

  function draw() {
    if (!view || !view.panes) return;
    const about_map = about.statistics[view.statistic], count = view.panes.length;
    values = view.panes.map((pane) => floats(pane.values));
    const high = Math.max(...values.map((v) => v.reduce((a, b) => Math.max(a, b), -Infinity)));
    range = [about_map.least, Math.max(high, about_map.least + about.narrowest)];
    const width = Math.max(240, left.clientWidth || 520), token = wanted.token, last = view.panes.at(-1);
    const shown = Boolean(last.picture);
    film.canvas.hidden = pictured.hidden = !shown;
    if (shown) {
      const [, height, wide] = last.picture.size, rgb = bytes(last.picture.rgb), one = 3 * height * wide;
      film.place(width);
      film.draw((frame) => ({ width: wide, height, rgb: rgb.subarray(frame * one, (frame + 1) * one) }), token);
      pictured.textContent = about.pictures[wanted.picture];
    }
    maps.forEach((map, i) => {
      map.canvas.hidden = titles[i].hidden = i >= count;
      if (i >= count) return;
      map.place(width);
      map.draw((frame) => {
        const n = grid[1] * grid[2], rgb = new Uint8Array(3 * n);
        for (let k = 0; k < n; k++) {
          const at = 3 * shade(values[i][frame * n + k]);
          for (let c = 0; c < 3; c++) rgb[3 * k + c] = colours[at + c];
        }
        return { width: grid[2], height: grid[1], rgb };
      }, token);
      const mean = values[i].reduce((a, b) => a + b, 0) / values[i].length;
      titles[i].textContent = `${count > 1 ? `${"AB"[i]}: ` : ""}${about_map.title}, ${says(view.panes[i].asked)}: mean ${short(mean)}`;
    });
    drawScale(about_map, Math.min(width, 330));
    saidMap.textContent = `frame ${token[0]}, row ${token[1]}, column ${token[2]}: ` +
      values.map((v, i) => (count > 1 ? `${"AB"[i]} ` : "") + short(v[at(token)])).join(", ");
    if (String(view.token) === String(token)) drawPanels(last, count > 1 ? view.panes[0] : null);
    notes.replaceChildren(...last.notes.map((note) => make("div", { textContent: note })));
    put();
  }

  function drawScale(about_map, width) {
    const ratio = window.devicePixelRatio || 1;
    scale.width = width * ratio, scale.height = 30 * ratio, scale.style.width = `${width}px`;
    const pen = scale.getContext("2d");
    pen.scale(ratio, ratio);
    for (let i = 0; i < width - 4; i++) {
      const k = 3 * Math.floor(i / (width - 4) * 256);
      pen.fillStyle = `rgb(${colours[k]},${colours[k + 1]},${colours[k + 2]})`;
      pen.fillRect(2 + i, 4, 1.2, 10);
    }
    pen.fillStyle = "#333";
    pen.font = '11px "DejaVu Sans", sans-serif';
    pen.fillText(short(log ? Math.max(range[0], range[1] / 1e4) : range[0]), 2, 26);
    pen.textAlign = "center";
    pen.fillText(about_map.unit + (log ? ", log scale" : ""), width / 2, 26);
    pen.textAlign = "right";
    pen.fillText(short(range[1]), width - 2, 26);
  }

  function drawPanels(pane, before) {
    title.textContent = `What each network says at frame ${view.token[0]}, row ${view.token[1]}, column ${view.token[2]}`;
    said.textContent = `x_hat is code ${pane.x_hat}, x_t is code ${pane.x_t}` + (before ? "; black marks are A's" : "");
    panels.replaceChildren(...pane.top.map((top) =>
      panel(about, top, pane, view.patches, before && before.top.find((one) => one.of === top.of))));
  }

  function keyed(event) {
    const [f, y, x] = wanted.token, key = event.key;
    const moves = { ArrowLeft: [f, y, x - 1], ArrowRight: [f, y, x + 1], ArrowUp: [f, y - 1, x], ArrowDown: [f, y + 1, x], PageUp: [f - 1, y, x], PageDown: [f + 1, y, x] };
    const acts = { ",": () => t.move(-1), ".": () => t.move(1), a: pinned, l: () => { logged.checked = log = !log; draw(); },
      s: () => { statistic.selectedIndex = (statistic.selectedIndex + 1) % statistic.length; statistic.onchange(); },
      n: () => { network.selectedIndex = (network.selectedIndex + 1) % network.length; network.onchange(); } };
    if (event.ctrlKey || event.metaKey || event.altKey || !(key in moves || key in acts)) return;
    event.preventDefault();
    event.stopPropagation();
    if (key in acts) acts[key]();
    else if (moves[key].every((p, i) => p >= 0 && p < grid[i])) pick(moves[key]);
  }
  for (const { canvas } of [film, ...maps]) canvas.onkeydown = keyed;
  maps.forEach((map, i) => {
    map.canvas.onmousemove = (event) => {
      const over = map.token(event);
      if (over && values[i]) saidMap.textContent = `frame ${over[0]}, row ${over[1]}, column ${over[2]}: ${short(values[i][at(over)])} ${about.statistics[view.statistic].unit}`;
    };
  });

  function answered() {
    view = model.get("view");
    clearTimeout(late);
    wrong.textContent = view.error || "";
    if (view.id >= busy) busy = 0;
    if (!again && !busy && view.request) { wanted = structuredClone(view.request); refill(); }
    draw();
    if (again && !busy) { again = false; send(); }
  }
  const aligned = () => {
    const found = model.get("alignment");
    if (!found || !found.sentence) { verdict.textContent = "The logits slice has not been checked yet."; bars.hidden = true; return; }
    verdict.textContent = found.sentence;
    check.hidden = found.readings.length > 0;
    strip(bars, found, Math.max(320, el.clientWidth - 24));
  };
  const told = (message) => {
    if (message.kind !== "text") return;
    output.hidden = false;
    output.value = message.text;
    if (message.copy && navigator.clipboard) navigator.clipboard.writeText(message.text).catch(() => {});
  };
  model.on("change:view", answered);
  model.on("change:alignment", aligned);
  model.on("msg:custom", told);
  const sized = new ResizeObserver(() => { draw(); aligned(); });
  sized.observe(el);
  refill();
  answered();
  aligned();
  return () => { sized.disconnect(); model.off("change:view", answered); model.off("change:alignment", aligned); model.off("msg:custom", told); };
}

export default { render };
