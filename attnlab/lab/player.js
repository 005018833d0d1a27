// The player: step through a clip; point at a cell and see where its features come from.
// Frames, rows and columns count from 0, as in tensors.

const [rows, cols] = data.grid;
const [imageHeight, imageWidth] = data.size;
const last = data.keys.length - 1;
const side = 2 * data.radius + 1;
const weights = unpack(data.weights, side * side);
const fed = data.keys.flatMap((key, frame) => (key === frame ? [] : [frame]));
const names = Object.keys(data.scores);
const state = {
  frame: fed.length ? fed[fed.length - 1] : last,
  cell: Math.floor(rows / 2) * cols + Math.floor(cols / 2),
  result: 0,
  arrows: true,
  playing: false,
};
const [THERE, FOUND] = ["#3fd8ff", "#e69f00"];

// ---- What is where ------------------------------------------------------------------------------

const place = (cell) => [Math.floor(cell / cols), cell % cols];
const within = (value, high) => Math.max(0, Math.min(high, value));
const isKey = (frame) => data.keys[frame] === frame;

function flowAt(frame, cell) { // [dx, dy] in px of the image
  return [data.flow[frame][cell], data.flow[frame][rows * cols + cell]];
}

function windowOf(frame, cell) { // [row, column, weight] of every cell of the key frame in reach
  if (isKey(frame)) return [];
  const start = (fed.indexOf(frame) * rows * cols + cell) * side * side;
  const [row, col] = place(cell);
  const seen = [];
  for (let i = 0; i < side * side; i++) {
    const [y, x] = [row + Math.floor(i / side) - data.radius, col + (i % side) - data.radius];
    if (y >= 0 && y < rows && x >= 0 && x < cols) seen.push([y, x, weights[start + i]]);
  }
  return seen;
}

function mask(name, frame) { // from the lengths of its runs
  const flat = new Uint8Array(imageHeight * imageWidth);
  let [start, inside] = [0, 0];
  for (const length of data.masks[name][frame]) {
    flat.fill(inside, start, start + length);
    [start, inside] = [start + length, 1 - inside];
  }
  return flat;
}

// ---- The page -----------------------------------------------------------------------------------

app.innerHTML = `
  <h1></h1>
  <div class="controls">
    <button id="play" type="button"></button>
    <label>Frame <input id="frame" type="range" min="0" max="${last}" step="1"></label>
    <label>Result <select id="result"></select></label>
    <label><input id="arrows" type="checkbox"> flow</label>
  </div>
  <div class="panes">
    <div><p id="here"></p>
      <canvas id="now" tabindex="0" role="application" aria-describedby="help"></canvas></div>
    <div><p id="there"></p><canvas id="source" aria-hidden="true"></canvas></div>
    <div><p id="found"></p><canvas id="outcome" aria-hidden="true"></canvas></div>
  </div>
  <div class="words" style="min-height: 3em">
    <p id="readout" aria-live="polite"></p><p id="value"></p>
  </div>
  <canvas id="time" aria-hidden="true"></canvas>
  <p id="help">Point at a cell, or focus the left picture and use the arrow keys; space plays, the
    keys , and . step. Middle: the key frame; bright cells are what attention takes for the chosen
    cell, the blue cross is where the flow fetches. Right: blue is the truth, orange the result.
    Below: mIoU of every result frame by frame; squares are key frames, click to go there.</p>`;

const [now, source, outcome, time] = [$("now"), $("source"), $("outcome"), $("time")];
const strip = new Image();
const { colour } = colourMap(false);
app.querySelector("h1").textContent = data.title;
now.setAttribute("aria-label", data.alt);
names.forEach((name, i) => $("result").add(new Option(name, i)));

function blank(canvas, frame) { // the frame alone; [pen, cell's width, cell's height]
  const room = app.querySelector(".panes").clientWidth;
  const width = Math.min(data.width, room > 3 * 140 ? (room - 36) / 3 : room);
  const height = Math.round((width * imageHeight) / imageWidth);
  const pen = resize(canvas, width, height);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(strip, frame * imageWidth, 0, imageWidth, imageHeight, 0, 0, width, height);
  return [pen, width / cols, height / rows];
}

function box(pen, cell, [width, height], ink) {
  const [row, col] = place(cell);
  const path = new Path2D();
  path.rect(col * width + 1, row * height + 1, width - 2, height - 2);
  outline(pen, path, 2, ink);
}

function drawNow() {
  const [pen, ...size] = blank(now, state.frame);
  if (state.arrows && !isKey(state.frame)) {
    for (let cell = 0; cell < rows * cols; cell++) {
      const [row, col] = place(cell);
      if (row % 2 === 0 || col % 2 === 0) continue;
      const [dx, dy] = flowAt(state.frame, cell);
      const [x, y] = [(col + 0.5) * size[0], (row + 0.5) * size[1]];
      const path = new Path2D();
      path.moveTo(x, y);
      path.lineTo(x + (dx * size[0] * cols) / imageWidth, y + (dy * size[1] * rows) / imageHeight);
      path.rect(x - 1, y - 1, 2, 2);
      outline(pen, path, 1, "#fff");
    }
  }
  box(pen, state.cell, size, THERE);
}

function drawSource(seen) {
  const [pen, width, height] = blank(source, data.keys[state.frame]);
  const most = Math.max(...seen.map(([, , weight]) => weight));
  if (seen.length) {
    pen.globalAlpha = 0.45;
    pen.fillRect(0, 0, width * cols, height * rows);
    pen.globalAlpha = 0.75;
    for (const [row, col, weight] of seen) {
      pen.fillStyle = colour(weight, [0, most]);
      pen.fillRect(col * width, row * height, width + 0.5, height + 0.5);
    }
    pen.globalAlpha = 1;
  }
  box(pen, state.cell, [width, height], "#fff");
  if (isKey(state.frame)) return;
  const [row, col] = place(state.cell);
  const [dx, dy] = flowAt(state.frame, state.cell);
  const x = (col + 0.5 + (dx * cols) / imageWidth) * width;
  const y = (row + 0.5 + (dy * rows) / imageHeight) * height;
  const cross = new Path2D();
  for (const [a, b] of [[1, 1], [1, -1]]) {
    cross.moveTo(x - 6 * a, y - 6 * b);
    cross.lineTo(x + 6 * a, y + 6 * b);
  }
  outline(pen, cross, 3, THERE);
}

function drawOutcome() {
  const [pen, width, height] = blank(outcome, state.frame);
  const [px, py] = [(width * cols) / imageWidth, (height * rows) / imageHeight];
  for (const [name, ink] of [["truth", THERE], [names[state.result], FOUND]]) {
    const flat = mask(name, state.frame);
    const path = new Path2D();
    const at = (row, col) => flat[row * imageWidth + col];
    for (let row = 0; row < imageHeight; row++) {
      for (let col = 0; col < imageWidth; col++) {
        if (col && at(row, col) !== at(row, col - 1)) {
          path.moveTo(col * px, row * py);
          path.lineTo(col * px, (row + 1) * py);
        }
        if (row && at(row, col) !== at(row - 1, col)) {
          path.moveTo(col * px, row * py);
          path.lineTo((col + 1) * px, row * py);
        }
      }
    }
    outline(pen, path, 2, ink);
  }
}

function clock() { // the time line: its width, height, and where a frame stands
  const width = Math.max(200, Math.min(760, time.parentElement.clientWidth - 28));
  return { width, height: 92, x: (frame) => 40 + ((width - 60) * frame) / Math.max(1, last) };
}

function drawTime() {
  const { width, height, x } = clock();
  const pen = resize(time, width, height);
  const all = Object.values(data.scores).flat();
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const y = (score) => 10 + (height - 34) * (1 - (score - low) / (high - low || 1));
  const ink = getComputedStyle(app).color;
  pen.fillStyle = ink;
  pen.font = "11px system-ui, sans-serif";
  for (const score of [low, high]) pen.fillText(score.toFixed(2), 4, y(score));
  names.forEach((name, i) => {
    const chosen = i === state.result;
    [pen.strokeStyle, pen.lineWidth, pen.globalAlpha] = [chosen ? FOUND : ink, chosen ? 3 : 1, 1];
    if (!chosen) pen.globalAlpha = 0.45;
    pen.beginPath();
    data.scores[name].forEach((score, frame) => pen[frame ? "lineTo" : "moveTo"](x(frame), y(score)));
    pen.stroke();
  });
  pen.globalAlpha = 1;
  data.keys.forEach((_, frame) => {
    const size = isKey(frame) ? 5 : 2;
    pen.fillRect(x(frame) - size, height - 9 - size, 2 * size, 2 * size);
  });
  [pen.lineWidth, pen.strokeStyle] = [2, THERE];
  pen.strokeRect(x(state.frame) - 8, 3, 16, height - 6);
}

function say(seen) {
  const { frame, cell } = state;
  const [row, col] = place(cell);
  const name = names[state.result];
  $("here").textContent = `frame ${frame}` + (isKey(frame) ? ", a key frame" : "");
  $("there").textContent = isKey(frame) ? "its own features" : `key frame ${data.keys[frame]}`;
  $("found").textContent = `${name}: mIoU ${data.scores[name][frame].toFixed(2)}`;
  $("readout").textContent = `row ${row}, column ${col}`;
  if (isKey(frame)) {
    $("value").textContent = "the backbone runs on this frame: nothing is fetched";
    return;
  }
  const best = seen.reduce((a, b) => (b[2] > a[2] ? b : a));
  const [dx, dy] = flowAt(frame, cell);
  $("value").textContent = `the flow fetches ${number(dx)} px to the right and ${number(dy)} px ` +
    `down; attention takes most, ${number(best[2])}, from row ${best[0]}, column ${best[1]}`;
}

// ---- Acting -------------------------------------------------------------------------------------

let timer = null;

function draw() {
  const seen = windowOf(state.frame, state.cell);
  drawNow();
  drawSource(seen);
  drawOutcome();
  drawTime();
  say(seen);
  [$("frame").value, $("result").value, $("arrows").checked] =
    [state.frame, state.result, state.arrows];
  $("play").textContent = state.playing ? "Pause" : "Play";
  const best = seen.reduce((a, b) => (b[2] > a[2] ? b : a), [-1, -1, 0]);
  Object.assign(app.dataset, state, { strongest: best[0] * cols + best[1] }); // for tests
}

const change = (next) => draw(Object.assign(state, next));

function play(playing) {
  clearInterval(timer);
  if (playing) timer = setInterval(() => change({ frame: (state.frame + 1) % (last + 1) }), 600);
  change({ playing });
}

function go(frame) {
  clearInterval(timer);
  change({ frame: within(frame, last), playing: false });
}

function cellAt({ offsetX, offsetY }, canvas) {
  const row = within(Math.floor((offsetY / canvas.clientHeight) * rows), rows - 1);
  const col = within(Math.floor((offsetX / canvas.clientWidth) * cols), cols - 1);
  return row * cols + col;
}

now.addEventListener("pointermove", (event) => {
  const cell = cellAt(event, now);
  if (cell !== state.cell) change({ cell });
});
now.addEventListener("keydown", (event) => {
  const ways = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const steps = { ",": -1, ".": 1 };
  if (event.key in ways) {
    const [[row, col], [down, right]] = [place(state.cell), ways[event.key]];
    change({ cell: within(row + down, rows - 1) * cols + within(col + right, cols - 1) });
  } else if (event.key in steps) go(state.frame + steps[event.key]);
  else if (event.key === " ") play(!state.playing);
  else return;
  event.preventDefault();
});
time.addEventListener("click", ({ offsetX }) => {
  const { x } = clock();
  const distance = data.keys.map((_, frame) => Math.abs(x(frame) - offsetX));
  go(distance.indexOf(Math.min(...distance)));
});
$("play").addEventListener("click", () => play(!state.playing));
$("frame").addEventListener("input", ({ target }) => go(Number(target.value)));
$("result").addEventListener("change", ({ target }) => change({ result: Number(target.value) }));
$("arrows").addEventListener("change", ({ target }) => change({ arrows: target.checked }));
strip.addEventListener("load", () => show(draw));
strip.src = data.strip;
