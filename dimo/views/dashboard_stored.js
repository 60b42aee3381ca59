// The dashboard of a report: a click or an arrow key chooses a step, of which the lines' values are told. The samples are
// those of that time, and the explorer goes to the nearest checkpoint.
function dashboard(el, { panels, sheets, checkpoints }, explorer) {
  const logged = [...new Set(panels.flatMap((panel) => panel.lines.flatMap((line) => line.steps)))].sort((a, b) => a - b);
  const nearest = (steps, step) => steps.reduce((best, one, i) => (Math.abs(one - step) < Math.abs(steps[best] - step) ? i : best), 0);
  const image = el.querySelector("img"), said = make("div", { className: "told" }), samples = document.getElementById("samples");
  const marks = panels.map(({ box: [, top, , height] }) => {
    const mark = make("i");
    Object.assign(mark.style, { top: `${100 * top}%`, height: `${100 * height}%` });
    return mark;
  });
  const frame = make("div", { className: "curves", tabIndex: 0 }, [image, ...marks]);
  frame.setAttribute("role", "slider");
  frame.setAttribute("aria-label", `${image.alt}. Arrow keys choose a step, home and end the first and the last.`);
  frame.setAttribute("aria-valuemin", logged[0]);
  frame.setAttribute("aria-valuemax", logged.at(-1));
  said.setAttribute("aria-live", "polite");
  el.replaceChildren(frame, make("div", {}, samples ? [said, samples] : [said]));
  let chosen = logged.length - 1;

  function choose(step, moved = true) {
    chosen = nearest(logged, step);
    const here = logged[chosen];
    const told = panels.map((panel, i) => {
      const [low, high] = panel.x, [left, , width] = panel.box;
      marks[i].style.left = `${100 * (left + width * (here - low) / (high - low || 1))}%`;
      const values = panel.lines.flatMap((line, k) => [(k ? ", " : "") + (panel.lines.length > 1 ? `${line.label}\u00a0` : ""),
        make("b", { textContent: short(line.values[nearest(line.steps, here)]) })]);
      return make("div", {}, [`${panel.title}: `, ...values]);
    });
    said.replaceChildren(make("h3", { textContent: `Step ${here}` }), ...told);
    frame.setAttribute("aria-valuenow", here);
    frame.setAttribute("aria-valuetext", `step ${here}`);
    const until = sheets.filter(([at]) => at <= here), [at, png] = until.at(-1) || sheets[0] || [];
    if (samples && png) {
      samples.querySelector("img").src = `data:image/png;base64,${png}`;
      samples.querySelector("img").alt = samples.querySelector("figcaption").textContent = `samples at step ${at}`;
    }
    if (!explorer || !checkpoints.length) return;
    const [, model, name] = checkpoints[nearest(checkpoints.map(([of]) => of), here)];
    if (moved) explorer.show({ model });
    said.append(make("p", { textContent: `The explorer above is at ${name}${checkpoints.length > 1 ? ", the checkpoint nearest to it" : ""}.` }));
  }

  image.onclick = (event) => {
    const box = image.getBoundingClientRect(), x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    const panel = panels.find(({ box: [left, top, width, height] }) => x >= left && x <= left + width && y >= top && y <= top + height);
    if (panel) choose(panel.x[0] + (x - panel.box[0]) / panel.box[2] * (panel.x[1] - panel.x[0]));
  };
  frame.onkeydown = (event) => {
    const to = { ArrowLeft: chosen - 1, ArrowRight: chosen + 1, Home: 0, End: logged.length - 1 }[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    choose(logged[clamp(to, 0, logged.length - 1)]);
  };
  if (logged.length) choose(logged.at(-1), false);
}

const board = document.getElementById("board");
if (board) dashboard(board, JSON.parse(document.getElementById("logged").textContent), kept);
