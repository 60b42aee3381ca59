// Stands in for the kernel in a report: answers the explorer's requests from values that were stored in the page.
function decoded(text, Kind) {
  const raw = atob(text), data = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) data[i] = raw.charCodeAt(i);
  return Kind ? new Kind(data.buffer) : data;
}
const likelihood = (u) => Math.exp(-u / 2048);

class Stored {
  constructor({ about, first, alignment, states, pool }) {
    this.states = states, this.pool = pool, this.heard = {}, this.unpacked = {};
    about.colours = decoded(about.colours);
    if (about.patches) about.patches.rgb = decoded(about.patches.rgb);
    this.values = { about, alignment, request: first };
    this.values.view = this.answer(first);
  }

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
    const Codes = this.values.about.codebook_size > 65536 ? Uint32Array : Uint16Array, made = { ...state, maps: {}, top: [] };
    for (const [name, { low, high, data }] of Object.entries(state.maps)) {
      made.maps[name] = Float32Array.from(decoded(data, Uint16Array), (u) => low + u * (high - low) / 65535);
    }
    for (const top of state.top) {
      made.top.push({ of: top.of, codes: decoded(top.codes, Codes), p: decoded(top.p, Uint16Array), p_x_hat: decoded(top.p_x_hat, Uint16Array),
        entropy: decoded(top.entropy, Float32Array), rank: decoded(top.rank, Uint32Array) });
    }
    for (const name of ["x_hat", "x_t"]) made[name] = decoded(state[name], Codes);
    made.pictures = Object.fromEntries(Object.entries(state.pictures).map(([name, key]) => {
      const picture = this.pool[key];
      if (typeof picture.rgb === "string") picture.rgb = decoded(picture.rgb);
      return [name, picture];
    }));
    return made;
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
const kept = shown && new Stored(JSON.parse(document.getElementById("stored").textContent));
if (kept) render({ model: kept, el: shown });
