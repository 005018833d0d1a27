// The attention explorer: point at a patch of the photograph and see where it looks.
// A token is a class token or a patch. Rows, columns and heads count from 0, as in tensors.

const [rows, cols] = data.grid;
const prefix = data.prefix.length; // the class tokens come before the patches, as in the model
const tokens = prefix + rows * cols;
const { layers, columns } = data; // a column is a head, the mean of heads or the rollout
const state = {
  layer: layers.length - 1,
  column: data.column,
  token: prefix + Math.floor(rows / 2) * cols + Math.floor(cols / 2),
  received: false, // false: where the token looks (its row); true: who looks at it (its column)
  pinned: false, // pinned: the pointer reads weights instead of choosing another token
  hovered: null,
  opacity: 0.65,
  stretch: false, // colours from the smallest weight up, not from zero
};

// ---- Tokens -------------------------------------------------------------------------------------

const place = (token) => // [row, column]; the class tokens are row -1
  token < prefix ? [-1, token] : [Math.floor((token - prefix) / cols), (token - prefix) % cols];

function name(token) {
  const [row, col] = place(token);
  return row < 0 ? data.prefix[col] : `row ${row}, column ${col}`;
}

function step(token, [down, right]) { // the token beside this one, or itself at the edge
  const within = (value, low, high) => Math.max(low, Math.min(high, value));
  const row = within(place(token)[0] + down, prefix ? -1 : 0, rows - 1);
  const col = within(place(token)[1] + right, 0, (row < 0 ? prefix : cols) - 1);
  return row < 0 ? col : prefix + row * cols + col;
}

// ---- Maps ---------------------------------------------------------------------------------------

const unpacked = layers.map(() => []);
function matrix(layer, column) {
  unpacked[layer][column] ??= (() => {
    const maps = columns[column].stored.map((i) => unpack(data.maps[layer][i], tokens));
    return maps[0].map((_, i) => maps.reduce((sum, map) => sum + map[i], 0) / maps.length);
  })();
  return unpacked[layer][column];
}

function weights(layer, column) {
  const map = matrix(layer, column);
  const { token, received } = state;
  const values = Float32Array.from({ length: tokens }, (_, other) =>
    received ? map[other * tokens + token] : map[token * tokens + other]);
  // The patches set the scale: a class token that takes most of the weight would darken them all.
  const own = values.subarray(prefix);
  const [least, most] = [Math.min(...own), Math.max(...own.map(Math.abs)) || 1];
  const ends = [data.signed ? -most : state.stretch ? least : 0, most];
  return { values, ends };
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
        <label>Layer <select id="layer"></select></label>
        <label>Head <select id="head"></select></label>
        <div class="switch" role="radiogroup" aria-label="Direction">
          <label><input type="radio" name="way" value="out" checked><span>looks at</span></label>
          <label><input type="radio" name="way" value="in"><span>is looked at by</span></label>
        </div>
        <label>Overlay <input id="opacity" type="range" min="0" max="1" step="0.05"></label>
        <label><input id="stretch" type="checkbox"> stretch colours</label>
      </div>
      <div id="ramp"><i id="even"></i></div>
      <div class="ends"><span id="low"></span><span id="high"></span></div>
      <p id="range"></p>
      <canvas id="sheet" aria-hidden="true"></canvas>
    </section>
  </div>
  <p id="help">Point at a patch, or focus the photograph and use the arrow keys. Click or press
    Enter to pin it; then point at other patches to read their weights. The small maps are this
    patch in every layer (down) and head (across): click one to enlarge it.</p>`;

const [picture, sheet, photograph] = [$("picture"), $("sheet"), new Image()];
const { colour, gradient } = colourMap(data.signed);
const strip = prefix ? 32 : 0; // the height of the class tokens above the photograph
app.querySelector("h1").textContent = data.title;
picture.setAttribute("aria-label", data.alt);
layers.forEach(({ name }, i) => $("layer").add(new Option(name, i)));
columns.forEach(({ name }, i) => $("head").add(new Option(name, i)));
$("opacity").value = state.opacity;
$("ramp").style.background = gradient;
$("stretch").parentElement.hidden = data.signed;
sheet.hidden = layers.length * columns.length === 1;

function cell(token) { // [x, y, width, height] in the picture, in CSS pixels
  const [row, col] = place(token);
  if (row < 0) return [col * 100, 0, 94, strip - 6];
  const [width, height] = [picture.clientWidth / cols, (picture.clientHeight - strip) / rows];
  return [col * width, strip + row * height, width, height];
}

function tokenAt({ offsetX, offsetY }) {
  return [...Array(tokens).keys()].find((token) => {
    const [x, y, w, h] = cell(token);
    return offsetX >= x && offsetX < x + w && offsetY >= y && offsetY < y + h;
  });
}

function drawPicture({ values, ends }, strongest) {
  const width = Math.min(data.width, app.querySelector(".panes").clientWidth);
  const pen = resize(picture, width, Math.round(width * data.aspect) + strip);
  pen.imageSmoothingEnabled = !data.pixelated;
  pen.drawImage(photograph, 0, strip, width, picture.clientHeight - strip);
  pen.font = "600 12px system-ui, sans-serif";
  values.forEach((value, token) => {
    const [x, y, w, h] = cell(token);
    pen.globalAlpha = token < prefix ? 1 : state.opacity;
    pen.fillStyle = colour(value, ends);
    pen.fillRect(x, y, w, h);
    [pen.globalAlpha, pen.lineWidth, pen.strokeStyle] = [0.25, 1, "#fff"];
    pen.strokeRect(x, y, w, h);
    if (token >= prefix) return;
    [pen.globalAlpha, pen.lineWidth, pen.strokeStyle, pen.fillStyle] = [1, 3, "#000", "#fff"];
    pen.strokeText(`${name(token)} ${number(value)}`, x + 8, y + h / 2 + 1);
    pen.fillText(`${name(token)} ${number(value)}`, x + 8, y + h / 2 + 1);
  });
  pen.globalAlpha = 1;
  const [x, y, w, h] = cell(strongest);
  const ring = new Path2D();
  ring.arc(x + w / 2, y + h / 2, Math.min(w, h) / 5, 0, 2 * Math.PI);
  outline(pen, ring, 2, "#fff");
  for (const [token, width, ink] of [[state.hovered, 1, "#fff"], [state.token, 3, "#3fd8ff"]]) {
    if (token === null) continue;
    const [x, y, w, h] = cell(token);
    const box = new Path2D();
    box.rect(x + 2, y + 2, w - 4, h - 4);
    outline(pen, box, width, ink);
  }
}

function small() { // the small maps: their size, and where a column and a layer of them start
  const room = sheet.parentElement.clientWidth / (columns.length + 0.5) - 4;
  const width = Math.max(8, Math.floor(Math.min(room, 90, Math.max(24, 290 / layers.length))));
  const height = Math.max(8, Math.round((width * rows) / cols));
  const [left, top] = [(column) => 22 + column * (width + 4), (layer) => 16 + layer * (height + 4)];
  return { width, height, left, top };
}

function drawSheet() {
  const { width, height, left, top } = small();
  const pen = resize(sheet, left(columns.length), top(layers.length));
  const text = getComputedStyle(app).color;
  pen.font = "11px system-ui, sans-serif";
  pen.fillStyle = text;
  columns.forEach(({ short }, column) => pen.fillText(short, left(column), 7, width));
  layers.forEach(({ short }, layer) => {
    pen.fillStyle = text;
    pen.fillText(short, 3, top(layer) + height / 2);
    columns.forEach((_, column) => {
      const { values, ends } = weights(layer, column);
      const [across, down] = [(col) => Math.round((col * width) / cols),
                              (row) => Math.round((row * height) / rows)];
      for (let token = prefix; token < tokens; token++) {
        const [row, col] = place(token);
        pen.fillStyle = colour(values[token], ends);
        pen.fillRect(left(column) + across(col), top(layer) + down(row),
                     across(col + 1) - across(col), down(row + 1) - down(row));
      }
    });
  });
  [pen.lineWidth, pen.strokeStyle] = [3, "#3fd8ff"];
  pen.strokeRect(left(state.column) - 1, top(state.layer) - 1, width + 2, height + 2);
}

function say({ values, ends: [low, high] }, strongest) {
  const verb = state.received ? "is looked at most by" : "looks most at";
  const most = strongest === state.token ? "itself" : name(strongest);
  const other = state.hovered ?? strongest;
  const [own, even] = [values.subarray(prefix), 1 / tokens];
  const total = values.reduce((sum, value) => sum + value);
  const compared = state.received ? `; in all it receives ${number(total)} (an even share is 1)`
    : `, ${number(values[other] / even)} times an even share`;
  const marked = data.stochastic && !state.received && even >= low && even <= high;
  $("readout").textContent = (state.pinned ? "pinned: " : "") +
    `${name(state.token)} ${verb} ${most}${data.signed ? " (by size)" : ""}`;
  $("value").textContent =
    `weight of ${name(other)}: ${number(values[other])}${data.stochastic ? compared : ""}`;
  [$("low").textContent, $("high").textContent] = [number(low), number(high)];
  $("range").textContent = `smallest on a patch: ${number(Math.min(...own))}` +
    (marked ? `; mark: even share, ${number(even)}` : "");
  $("even").hidden = !marked;
  $("even").style.left = `${(100 * (even - low)) / (high - low)}%`;
}

// ---- Acting -------------------------------------------------------------------------------------

function draw() {
  const map = weights(state.layer, state.column);
  const size = map.values.map(Math.abs);
  const strongest = size.indexOf(Math.max(...size));
  drawPicture(map, strongest);
  drawSheet();
  say(map, strongest);
  [$("layer").value, $("head").value] = [state.layer, state.column];
  Object.assign(app.dataset, state, { strongest }); // for tests and for the curious
}

const change = (next) => draw(Object.assign(state, next));
const pin = (token) => {
  const again = state.pinned && token === state.token;
  change({ token, pinned: !again, hovered: null });
};

picture.addEventListener("pointermove", (event) => {
  const token = tokenAt(event);
  if (token === undefined || token === (state.pinned ? state.hovered : state.token)) return;
  change(state.pinned ? { hovered: token } : { token });
});
picture.addEventListener("click", (event) => tokenAt(event) !== undefined && pin(tokenAt(event)));
picture.addEventListener("keydown", (event) => {
  const ways = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (event.key in ways) change({ token: step(state.token, ways[event.key]), hovered: null });
  else if (event.key === "Enter" || event.key === " ") pin(state.token);
  else if (event.key === "Escape") change({ pinned: false, hovered: null });
  else return;
  event.preventDefault();
});
sheet.addEventListener("click", ({ offsetX, offsetY }) => {
  const { width, height, left, top } = small();
  const column = columns.findIndex((_, i) => offsetX >= left(i) && offsetX < left(i) + width);
  const layer = layers.findIndex((_, i) => offsetY >= top(i) && offsetY < top(i) + height);
  if (column >= 0 && layer >= 0) change({ layer, column });
});
$("layer").addEventListener("change", ({ target }) => change({ layer: Number(target.value) }));
$("head").addEventListener("change", ({ target }) => change({ column: Number(target.value) }));
$("opacity").addEventListener("input", ({ target }) => change({ opacity: Number(target.value) }));
$("stretch").addEventListener("change", ({ target }) => change({ stretch: target.checked }));
app.querySelectorAll("[name=way]").forEach((radio) =>
  radio.addEventListener("change", () => change({ received: radio.value === "in" })));
photograph.addEventListener("load", () => show(draw));
photograph.src = data.image;
