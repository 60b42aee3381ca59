// Stands in for the kernel in a report: answers the explorer's requests from values that were stored in the page.
function decoded(text) {
  const raw = atob(text), data = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) data[i] = raw.charCodeAt(i);
  return data;
}
const unzipped = (data) => new Response(new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
const likelihood = (u) => Math.exp(-u / 2048);

class Stored {
  constructor({ about, first, alignment, states, tiles }, arrays) {
    this.states = states, this.arrays = arrays, this.heard = {}, this.unpacked = {}, this.drawn = {};
    this.tiles = { size: tiles.size, rgb: this.array(tiles.rgb) };
    about.colours = this.array(about.colours);
    if (about.patches) about.patches.rgb = this.array(about.patches.rgb);
    this.values = { about, alignment, request: first };
    this.values.view = this.answer(first);
  }

  array([first, size], Kind = Uint8Array) { return new Kind(this.arrays.slice(first, first + size)); }

  get(name) { return this.values[name]; }
  set(name, value) { this.values[name] = value; }
  on(event, heard) { (this.heard[event] ||= []).push(heard); }
  off(event, heard) { this.heard[event] = (this.heard[event] || []).filter((one) => one !== heard); }
  send() {}

  save_changes() {
    this.values.view = this.answer(this.values.request);
    for (const heard of this.heard["change:view"] || []) heard();
  }

  show(changes) { // as if it had been chosen in the page
    const request = structuredClone(this.values.request);
    Object.assign(request.panes.at(-1), changes);
    request.id = this.values.view.id + 1;
    this.values.request = request;
    this.values.view = { ...this.answer(request), request };
    for (const heard of this.heard["change:view"] || []) heard();
  }

  state(pane) {
    const key = [pane.model, pane.prompt, pane.seed, pane.t, pane.guidance_scale].join("|");
    return this.unpacked[key] ||= this.unpack(this.states[key]);
  }

  unpack(state) {
    const Codes = this.values.about.codebook_size > 65536 ? Uint32Array : Uint16Array, made = { ...state, maps: {}, top: [], pictures: {} };
    for (const [name, { low, high, data }] of Object.entries(state.maps)) {
      made.maps[name] = Float32Array.from(this.array(data, Uint16Array), (u) => low + u * (high - low) / 65535);
    }
    for (const top of state.top) {
      const entropy = this.array(top.entropy, Float32Array), rank = this.array(top.rank, Uint32Array);
      made.maps[`entropy|${top.of}`] = entropy, made.maps[`rank|${top.of}`] = Float32Array.from(rank);
      made.top.push({ of: top.of, codes: this.array(top.codes, Codes), p: this.array(top.p, Uint16Array),
        p_x_hat: this.array(top.p_x_hat, Uint16Array), entropy, rank });
    }
    for (const name of ["x_hat", "x_t"]) made[name] = this.array(state[name], Codes);
    for (const [name, picture] of Object.entries(state.pictures)) made.pictures[name] = this.picture(picture);
    return made;
  }

  picture({ size, tiles }) { // its frames below each other, put together from tiles; most states share one
    return this.drawn[tiles] ||= (() => {
      const [frames, height, width] = size, [high, wide] = this.tiles.size, across = width / wide, rgb = new Uint8Array(3 * frames * height * width);
      this.array(tiles, Uint32Array).forEach((tile, i) => {
        const top = Math.floor(i / across) * high, left = (i % across) * wide;
        for (let y = 0; y < high; y++) {
          const from = 3 * wide * (tile * high + y);
          rgb.set(this.tiles.rgb.subarray(from, from + 3 * wide), 3 * ((top + y) * width + left));
        }
      });
      return { size, rgb };
    })();
  }

  answer(request) {
    const { about } = this.values, [, rows, columns] = about.grid, [f, y, x] = request.token, i = (f * rows + y) * columns + x;
    const panes = request.panes.map((pane) => {
      const state = this.state(pane);
      const top = state.top.map((one) => {
        const k = one.codes.length / one.rank.length, here = (data) => Array.from(data.subarray(i * k, (i + 1) * k));
        return { of: one.of, codes: here(one.codes), p: here(one.p).map(likelihood), entropy: one.entropy[i], rank: one.rank[i], p_x_hat: likelihood(one.p_x_hat[i]) };
      });
      return { asked: pane, values: state.maps[`${request.statistic}|${pane.of}`], top, x_hat: state.x_hat[i], x_t: state.x_t[i],
        notes: state.notes, picture: state.pictures[request.picture] };
    });
    return { id: request.id, statistic: request.statistic, token: request.token, panes, patches: about.patches || null };
  }
}

const shown = document.getElementById("explorer");
const data = shown && JSON.parse(document.getElementById("stored").textContent);
const kept = data && new Stored(data, await unzipped(decoded(data.arrays)));
if (kept) render({ model: kept, el: shown });
