// The class explorer: choose a class and see where its query looks; or all classes, a color each.
// Rows and columns count from 0, as in tensors.

const [rows, cols] = data.grid;
const places = rows * cols;
const { classes } = data;
const weights = unpack(data.maps, places);
const map = (index) => weights.subarray(index * places, (index + 1) * places);
const peak = (index) => Math.max(...map(index)) || 1;
const ALL = classes.length; // the choice after the last class
const best = classes.reduce((top, { score }, i) => (score > classes[top].score ? i : top), 0);
const state = { shown: best, place: null, opacity: 0.65, least: 0.3 };

// A class claims a place by its score times its map, whose largest weight counts 1.
function claim(place) { // [class, claim], the strongest; classes below `least` claim nothing
  let strongest = [best, 0];
  classes.forEach(({ score }, i) => {
    const value = score < state.least ? 0 : (score * map(i)[place]) / peak(i);
    if (value > strongest[1]) strongest = [i, value];
  });
  return strongest;
}

// ---- The page -----------------------------------------------------------------------------------

app.innerHTML = `
  <h1></h1>
  <div class="panes">
    <div>
      <canvas id="picture"></canvas>
      <div class="words">
        <p id="readout" aria-live="polite"></p>
        <p id="value"></p>
      </div>
    </div>
    <section>
      <div id="choices" class="choices" role="radiogroup" aria-label="Class"></div>
      <div class="controls">
        <label>Overlay <input id="opacity" type="range" min="0" max="1" step="0.05"></label>
        <label id="floor">Least score
          <input id="least" type="range" min="0" max="1" step="0.05"></label>
      </div>
      <div id="ramp"></div>
      <div class="ends"><span>0</span><span id="high"></span></div>
    </section>
  </div>
  <p id="help">Choose a class, with the mouse or the arrow keys; bars are scores. Each map has its own
    color scale and sums to 1 or a little less, whether its class is there or not. Point at a place to
    read its weight. "All" paints each place in the color of the class whose score times its map,
    over that map's largest weight, is highest.</p>`;

const [picture, photograph] = [$("picture"), new Image()];
const { colour, gradient } = colourMap(false);
app.querySelector("h1").textContent = data.title;
picture.setAttribute("aria-label", data.alt);
picture.setAttribute("role", "img");
$("ramp").style.background = gradient;
[$("opacity").value, $("least").value] = [state.opacity, state.least];
[...classes, { name: "all, in colors", score: null, color: null }].forEach((entry, i) => {
  const row = document.createElement("label");
  const [radio, name, bar] = ["input", "span", "i"].map((tag) => document.createElement(tag));
  [radio.type, radio.name, radio.value] = ["radio", "class", i];
  radio.checked = i === state.shown;
  radio.addEventListener("change", () => change({ shown: i }));
  name.textContent = entry.name + (entry.score === null ? "" : ` ${number(entry.score)}`);
  row.style.cssText = "display:flex;align-items:center;gap:6px;margin:2px 0";
  name.style.cssText = "flex:0 0 130px";
  bar.style.cssText = `height:10px;border:1px solid var(--line);border-radius:2px;` +
    `width:${Math.round(110 * (entry.score ?? 0))}px;background:${entry.color ?? "none"};` +
    (entry.score === null ? "display:none" : "");
  row.append(radio, name, bar);
  $("choices").append(row);
});

function drawPicture() {
  const width = Math.min(data.width, app.querySelector(".panes").clientWidth);
  const height = Math.round(width * data.aspect);
  const pen = resize(picture, width, height);
  const all = state.shown === ALL;
  pen.imageSmoothingEnabled = !data.pixelated;
  pen.filter = all ? "grayscale(1)" : "none";
  pen.drawImage(photograph, 0, 0, width, height);
  pen.filter = "none";
  const ends = all ? null : [0, peak(state.shown)];
  for (let place = 0; place < places; place++) {
    const [left, top] = [(place % cols) * width / cols, Math.floor(place / cols) * height / rows];
    if (all) {
      const [owner, strength] = claim(place);
      [pen.fillStyle, pen.globalAlpha] = [classes[owner].color, state.opacity * strength];
    } else {
      [pen.fillStyle, pen.globalAlpha] = [colour(map(state.shown)[place], ends), state.opacity];
    }
    pen.fillRect(left, top, width / cols, height / rows);
  }
  pen.globalAlpha = 1;
  if (state.place === null) return;
  const box = new Path2D();
  const [row, col] = [Math.floor(state.place / cols), state.place % cols];
  box.rect((col * width) / cols + 2, (row * height) / rows + 2, width / cols - 4, height / rows - 4);
  outline(pen, box, 2, "#3fd8ff");
}

function say() {
  const all = state.shown === ALL;
  const { place } = state;
  const where = place === null ? "" : `row ${Math.floor(place / cols)}, column ${place % cols}: `;
  const percent = (share) => `${Math.round(100 * share)} %`;
  if (all) {
    const shown = classes.filter(({ score }) => score >= state.least).map(({ name }) => name);
    $("readout").textContent = `all classes with a score of at least ${number(state.least)}`;
    const [owner, strength] = place === null ? [best, 0] : claim(place);
    const claimed = strength ? `${classes[owner].name} ${number(strength)}` : "nobody's";
    $("value").textContent = place === null ? shown.join(", ") || "none" : where + claimed;
  } else {
    const { name, score, shares } = classes[state.shown];
    const on = shares && (shares[0] ? `${percent(shares[0])} of the map on its object` :
      "not in the image") + `, ${percent(shares[1])} on other objects`;
    $("readout").textContent = `${name}, score ${number(score)}${on ? `: ${on}` : ""}`;
    $("value").textContent = place === null ? `an even share is ${number(1 / places)}` :
      `${where}weight ${number(map(state.shown)[place])}, ` +
      `${number(map(state.shown)[place] * places)} times an even share`;
    $("high").textContent = number(peak(state.shown));
  }
  [$("ramp").hidden, $("high").parentElement.hidden, $("floor").hidden] = [all, all, !all];
}

// ---- Acting -------------------------------------------------------------------------------------

function draw() {
  drawPicture();
  say();
  Object.assign(app.dataset, state, { owner: state.place === null ? -1 : claim(state.place)[0] });
}

const change = (next) => draw(Object.assign(state, next));

picture.addEventListener("pointermove", ({ offsetX, offsetY }) => {
  const row = Math.min(rows - 1, Math.floor((offsetY / picture.clientHeight) * rows));
  const col = Math.min(cols - 1, Math.floor((offsetX / picture.clientWidth) * cols));
  const place = Math.max(0, row) * cols + Math.max(0, col);
  if (place !== state.place) change({ place });
});
picture.addEventListener("pointerleave", () => change({ place: null }));
$("opacity").addEventListener("input", ({ target }) => change({ opacity: Number(target.value) }));
$("least").addEventListener("input", ({ target }) => change({ least: Number(target.value) }));
photograph.addEventListener("load", () => show(draw));
photograph.src = data.image;
