// The tree explorer: point at a patch and see its path to the root, its subtree and its messages.
// Rows and columns count from 0, as in tensors; layers from 1, as in the text.

const [rows, cols] = data.grid;
const tokens = rows * cols;
const layers = data.messages.length;
const state = {
  tree: 0,
  token: Math.floor(rows / 2) * cols + Math.floor(cols / 2),
  pinned: false, // pinned: the pointer does not choose another patch
  layer: -1, // whose messages darken the image; -1: none
};
const [PATH, BELOW] = ["#3fd8ff", "#e69f00"];

// ---- Trees --------------------------------------------------------------------------------------

const place = (token) => [Math.floor(token / cols), token % cols];
const name = (token) => `row ${place(token)[0]}, column ${place(token)[1]}`;

function step(token, [down, right]) { // the patch beside this one, or itself at the edge
  const within = (value, high) => Math.max(0, Math.min(high, value));
  const [row, col] = place(token);
  return within(row + down, rows - 1) * cols + within(col + right, cols - 1);
}

function path(token) { // from the token up to its root, both included
  const { parents } = data.trees[state.tree];
  const walk = [token];
  while (parents[walk[walk.length - 1]] >= 0) walk.push(parents[walk[walk.length - 1]]);
  return walk;
}

function subtree(token) { // the token and all below it
  const below = [];
  for (let other = 0; other < tokens; other++) if (path(other).includes(token)) below.push(other);
  return below;
}

// ---- The page -----------------------------------------------------------------------------------

app.innerHTML = `
  <h1></h1>
  <div class="panes">
    <div>
      <canvas id="picture" tabindex="0" role="application" aria-describedby="help"></canvas>
      <div class="words">
        <p id="readout" aria-live="polite"></p>
        <p id="value"></p>
      </div>
    </div>
    <section>
      <div class="controls">
        <label>Tree <select id="tree" style="max-width: 240px"></select></label>
        <label>Shade by messages <select id="layer"></select></label>
      </div>
      <canvas id="gates" aria-hidden="true"></canvas>
      <p id="range"></p>
      <canvas id="sheet" aria-hidden="true"></canvas>
    </section>
  </div>
  <p id="help">Point at a patch, or focus the image and use the arrow keys; click or press Enter to
    pin it. Blue: its path to the root (square). Orange: its subtree. The bars are what this patch
    still sends in each layer, the line the mean of all patches. The small maps are the messages of
    all patches, bright is 1: click one to shade the image by it.</p>`;

const [picture, sheet, photograph] = [$("picture"), $("sheet"), new Image()];
const { colour } = colourMap(false);
app.querySelector("h1").textContent = data.title;
picture.setAttribute("aria-label", data.alt);
data.trees.forEach((tree, i) => $("tree").add(new Option(tree.name, i)));
$("layer").add(new Option("no layer", -1));
data.messages.forEach((_, i) => $("layer").add(new Option(`layer ${i + 1}`, i)));

function center(token, width, height) {
  const [row, col] = place(token);
  return [((col + 0.5) * width) / cols, ((row + 0.5) * height) / rows];
}

function drawPicture(up, below) {
  const width = Math.min(data.width, app.querySelector(".panes").clientWidth);
  const height = Math.round(width * data.aspect);
  const pen = resize(picture, width, height);
  pen.imageSmoothingEnabled = !data.pixelated;
  pen.drawImage(photograph, 0, 0, width, height);
  const cell = [width / cols, height / rows];
  const corner = (token) => [place(token)[1] * cell[0], place(token)[0] * cell[1]];
  for (let token = 0; token < tokens; token++) {
    if (state.layer >= 0) {
      pen.globalAlpha = 0.85 * (1 - data.messages[state.layer][token]);
      pen.fillStyle = "#000";
      pen.fillRect(...corner(token), ...cell);
    }
    if (below.has(token)) {
      [pen.globalAlpha, pen.fillStyle] = [0.4, BELOW];
      pen.fillRect(...corner(token), ...cell);
    }
  }
  pen.globalAlpha = 1;
  const { parents } = data.trees[state.tree];
  const drawn = (token) => (up.has(token) ? 2 : below.has(token) ? 1 : 0);
  for (const kind of [0, 1, 2]) {
    parents.forEach((parent, token) => {
      if (drawn(token) !== kind) return;
      const dot = new Path2D();
      const [x, y] = center(token, width, height);
      if (parent < 0) dot.rect(x - 5, y - 5, 10, 10);
      else {
        const line = new Path2D();
        line.moveTo(x, y);
        line.lineTo(...center(parent, width, height));
        outline(pen, line, [0.8, 1.6, 3][kind], ["#fff", BELOW, PATH][kind]);
        dot.arc(x, y, 2, 0, 2 * Math.PI);
      }
      outline(pen, dot, 2, ["#fff", BELOW, PATH][kind]);
    });
  }
  const box = new Path2D();
  const [x, y] = corner(state.token);
  box.rect(x + 2, y + 2, cell[0] - 4, cell[1] - 4);
  outline(pen, box, 3, PATH);
}

function drawGates() { // bars: this patch's messages; line: the mean of all
  const [width, height] = [Math.max(160, Math.min(300, $("gates").parentElement.clientWidth)), 90];
  const pen = resize($("gates"), width, height);
  const [low, bar] = [height - 16, width / layers];
  const top = (message) => 6 + (low - 6) * (1 - message);
  pen.fillStyle = PATH;
  data.messages.forEach((layer, i) => {
    const message = layer[state.token];
    pen.fillRect(i * bar + 4, top(message), bar - 8, low - top(message));
  });
  pen.fillStyle = pen.strokeStyle = getComputedStyle(app).color;
  pen.font = "11px system-ui, sans-serif";
  pen.beginPath();
  data.messages.forEach((layer, i) => {
    const mean = layer.reduce((sum, message) => sum + message) / tokens;
    pen[i ? "lineTo" : "moveTo"]((i + 0.5) * bar, top(mean));
    pen.fillText(i + 1, (i + 0.5) * bar - 3, height - 7);
  });
  pen.stroke();
  pen.fillRect(0, low, width, 1);
}

function small() { // the small maps: their size, and where each starts
  const room = sheet.parentElement.clientWidth / layers - 6;
  const width = Math.max(16, Math.floor(Math.min(room, 80)));
  return { width, height: Math.round((width * rows) / cols), left: (layer) => layer * (width + 6) };
}

function drawSheet() {
  const { width, height, left } = small();
  const pen = resize(sheet, left(layers), height + 6);
  data.messages.forEach((messages, layer) => {
    messages.forEach((message, token) => {
      const [row, col] = place(token);
      const [x, y] = [Math.round((col * width) / cols), Math.round((row * height) / rows)];
      pen.fillStyle = colour(message, [0, 1]);
      pen.fillRect(left(layer) + x, 3 + y, Math.ceil(width / cols), Math.ceil(height / rows));
    });
  });
  if (state.layer < 0) return;
  [pen.lineWidth, pen.strokeStyle] = [3, PATH];
  pen.strokeRect(left(state.layer) + 1, 2, width, height + 2);
}

function say(up, below) {
  const { parents, scores } = data.trees[state.tree];
  const parent = parents[state.token];
  const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
  $("readout").textContent = (state.pinned ? "pinned: " : "") + name(state.token) +
    (parent < 0 ? " is a root" : `, child of ${name(parent)}`);
  $("value").textContent = `${count(up.size - 1, "step")} to the root; subtree of ` +
    count(below.size, "patch").replace("patchs", "patches") +
    (parent < 0 ? "" : `; its parent gets ${number(scores[state.token])} of what it sends`);
  $("range").textContent = `messages: ${data.messages.map((m) => number(m[state.token])).join(", ")}`;
}

// ---- Acting -------------------------------------------------------------------------------------

function draw() {
  const [up, below] = [new Set(path(state.token)), new Set(subtree(state.token))];
  drawPicture(up, below);
  drawGates();
  drawSheet();
  say(up, below);
  [$("tree").value, $("layer").value] = [state.tree, state.layer];
  Object.assign(app.dataset, state, { depth: up.size - 1, below: below.size }); // for tests
}

const change = (next) => draw(Object.assign(state, next));
const pin = (token) => change({ token, pinned: !(state.pinned && token === state.token) });

function tokenAt({ offsetX, offsetY }) {
  const row = Math.floor((offsetY / picture.clientHeight) * rows);
  const col = Math.floor((offsetX / picture.clientWidth) * cols);
  return step(0, [row, col]);
}

picture.addEventListener("pointermove", (event) => {
  if (!state.pinned && tokenAt(event) !== state.token) change({ token: tokenAt(event) });
});
picture.addEventListener("click", (event) => pin(tokenAt(event)));
picture.addEventListener("keydown", (event) => {
  const ways = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (event.key in ways) change({ token: step(state.token, ways[event.key]) });
  else if (event.key === "Enter" || event.key === " ") pin(state.token);
  else if (event.key === "Escape") change({ pinned: false });
  else return;
  event.preventDefault();
});
sheet.addEventListener("click", ({ offsetX }) => {
  const { width, left } = small();
  const layer = data.messages.findIndex((_, i) => offsetX >= left(i) && offsetX < left(i) + width);
  if (layer >= 0) change({ layer: layer === state.layer ? -1 : layer });
});
$("tree").addEventListener("change", ({ target }) => change({ tree: Number(target.value) }));
$("layer").addEventListener("change", ({ target }) => change({ layer: Number(target.value) }));
photograph.addEventListener("load", () => show(draw));
photograph.src = data.image;
