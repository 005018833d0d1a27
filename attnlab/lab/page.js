// What every explorable figure shares: its data, colours, sharp canvases, theme and height.
// `page()` in widgets.py puts this before the figure's own script; both need nothing else.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const app = $("app");

// ---- Maps: one byte a weight ------------------------------------------------------------------

const bytes = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

// The inverse of `pack()` in widgets.py, for a matrix of `width` columns:
// weight = ± (code / highest)⁴ · largest of its row. The power keeps the size of small weights.
function unpack({ peaks, codes, signed }, width) {
  const peak = new Float32Array(bytes(peaks).buffer);
  const code = signed ? new Int8Array(bytes(codes).buffer) : bytes(codes);
  const highest = signed ? 127 : 255;
  const weight = (c, i) => Math.sign(c) * (c / highest) ** 4 * peak[Math.floor(i / width)];
  return Float32Array.from(code, weight);
}

const number = (value) => String(Number(value.toPrecision(2)));

// ---- Colours: matplotlib's inferno, and RdBu_r with white zero for signed weights --------------

const INFERNO =
  "#000004 #160b39 #420a68 #6a176e #932667 #bc3754 #dd513a #f37819 #fca50a #f6d746 #fcffa4";
const RDBU_R =
  "#053061 #2065ab #4393c3 #90c4dd #d1e5f0 #ffffff #fddbc7 #f3a481 #d6604d #b1182b #67001f";

function colourMap(signed) { // { colour(weight, [low, high]), gradient }
  const stops = (signed ? RDBU_R : INFERNO).split(" ");
  const channels = stops.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  function colour(weight, [low, high]) {
    const share = Math.max(0, Math.min(1, (weight - low) / (high - low || 1)));
    const position = share * (stops.length - 1);
    const below = Math.min(Math.floor(position), stops.length - 2);
    const mix = (from, i) => from + (position - below) * (channels[below + 1][i] - from);
    return `rgb(${channels[below].map(mix).map(Math.round)})`;
  }
  return { colour, gradient: `linear-gradient(to right, ${stops})` };
}

// ---- Canvases -----------------------------------------------------------------------------------

function resize(canvas, width, height) { // in CSS pixels; sharp on every screen
  const scale = window.devicePixelRatio;
  [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
  [canvas.style.width, canvas.style.height] = [`${width}px`, `${height}px`];
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.textBaseline = "middle";
  return pen;
}

function outline(pen, path, width, ink) { // on black, so that it shows on any colour
  for (const [line, style] of [[width + 2, "#000"], [width, ink]]) {
    [pen.lineWidth, pen.strokeStyle] = [line, style];
    pen.stroke(path);
  }
}

// ---- Theme and height: follow the notebook when this page is a frame in one ---------------------

function notebook() { // the frame that shows this page, and the body around it, where allowed
  try {
    return { frame: window.frameElement, body: window.parent.document.body };
  } catch {
    return { frame: null, body: document.body };
  }
}

// Calls `draw` at the start and whenever the width or the theme changes.
function show(draw) {
  const { frame, body } = notebook();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const redraw = () => {
    const light = body.dataset.jpThemeLight ?? String(!dark.matches);
    document.documentElement.dataset.theme = light === "false" ? "dark" : "light";
    draw();
    if (!frame) return;
    document.documentElement.style.overflowY = "hidden";
    frame.style.height = `${Math.ceil(app.getBoundingClientRect().height)}px`;
  };
  new ResizeObserver(() => requestAnimationFrame(redraw)).observe(app);
  new MutationObserver(redraw).observe(body, { attributeFilter: ["data-jp-theme-light"] });
  dark.addEventListener("change", redraw);
}
