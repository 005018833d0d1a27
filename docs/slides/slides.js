// Deals the cells of a lecture out to slides of 1280×720, so that nothing runs over an edge.
//
// nbconvert gives a section for every slide and subslide of the notebook. What does not fit into
// one goes on below it. How high a formula or a line of code is depends on the fonts of the
// machine that shows it: hence here, and not where the lecture is built.

const [ABOVE, BESIDE, BELOW] = [34, 56, 30]; // the margins, as in slides.css
const [WIDTH, HEIGHT] = [1280 - 2 * BESIDE, 720 - ABOVE - BELOW];
const SMALLEST = 16 / 21; // of a wide table: 16 pixels

const matches = (element, selector) => element?.matches?.(selector) ?? false;
const isHeading = (element) => matches(element, "h1, h2, h3, h4");

function element(name, className, children) {
  const made = Object.assign(document.createElement(name), { className });
  made.append(...children);
  return made;
}

// ---- Blocks: what is not cut unless it is higher than a slide -----------------------------------

function blocks(cell) { // paragraphs, lists, tables, formulas, code, printed text, pictures, frames
  const found = [];
  const walk = (node) => {
    if (matches(node, "script, style, .jp-InputPrompt, .jp-OutputPrompt")) return;
    if (node.nodeType !== Node.ELEMENT_NODE) {
      if (node.textContent.trim()) found.push(element("p", "", [node]));
    } else if (matches(node, "img, iframe")) {
      found.push(node);
    } else if (matches(node, ".jp-OutputArea pre")) {
      node.className = "printed";
      found.push(node);
    } else if (matches(node, ".highlight")) {
      found.push(element("div", "highlight", [...node.querySelectorAll("pre")].slice(0, 1)));
    } else if (matches(node, "p, ul, ol, table, h1, h2, h3, h4, blockquote, pre, details, dl")) {
      found.push(node);
    } else if (matches(node, "mjx-container, [style]") || node.children.length === 0) {
      if (node.textContent.trim() || node.children.length) found.push(node);
    } else {
      [...node.childNodes].forEach(walk);
    }
  };
  walk(cell);
  return found;
}

function sized(block) { // pictures larger than in a notebook, wide tables smaller
  if (matches(block, "img")) {
    const scale = Math.min(1.6, WIDTH / block.naturalWidth, (HEIGHT - 80) / block.naturalHeight);
    block.style.width = `${Math.floor(block.naturalWidth * scale)}px`;
  } else if (matches(block, "iframe")) {
    const frame = element("div", "frame", [block]);
    frame.style.height = `${HEIGHT - 40}px`; // a slide of its own
    return frame;
  }
  return block;
}

function shrink(block) { // what is wider than the slide: down to 16 pixels
  const scale = Math.max(SMALLEST, WIDTH / block.scrollWidth);
  if (block.scrollWidth <= WIDTH) return;
  if (matches(block, "mjx-container, p")) block.style.fontSize = `${WIDTH / block.scrollWidth}em`;
  else if (matches(block, "table")) block.style.fontSize = `${Math.floor(21 * scale)}px`;
}

// A frame runs while its slide is shown: a figure that nobody sees has no size to draw in.
function runFrames() {
  for (const frame of document.querySelectorAll("iframe[data-page]")) {
    if (frame.closest("section.present > section.present")) frame.srcdoc ||= frame.dataset.page;
    else frame.removeAttribute("srcdoc");
  }
}

// It sets its own height once its page has run; it is then scaled to the slide.
function fitFrame(frame) {
  const box = frame.parentElement;
  const fit = () => {
    const [width, height] = [780, frame.offsetHeight];
    if (!height) return;
    const scale = Math.min(1.5, WIDTH / width, (HEIGHT - 40) / height);
    Object.assign(frame.style, { width: `${width}px`, transform: `scale(${scale})` });
    box.style.width = `${width * scale}px`;
  };
  new ResizeObserver(fit).observe(frame);
  fit();
}

// The first part of a block, as large as `fits` allows, is left in place; the rest is returned.
function cut(block, fits) {
  const list = matches(block, "ul, ol") ? block : block.querySelector("tbody");
  const text = matches(block, "pre") ? block : block.querySelector("pre");
  if (!list && !text) return null;
  const parts = list ? [...list.children] : text.innerHTML.replace(/\n$/, "").split("\n");
  if (parts.length < 2) return null;
  const put = (target, some) => list ? target.replaceChildren(...some)
    : (target.innerHTML = some.join("\n"));
  const rest = block.cloneNode(true);
  const restList = matches(rest, "ul, ol, pre") ? rest : rest.querySelector(list ? "tbody" : "pre");
  let count = parts.length;
  do put(list ?? text, parts.slice(0, --count)); while (count > 1 && !fits());
  if (list) { // as many on each slide, rather than one row left over
    count = Math.ceil(parts.length / Math.ceil(parts.length / count));
    put(list, parts.slice(0, count));
  }
  if (matches(block, "ol")) rest.start = block.start + count;
  put(restList, parts.slice(count));
  return rest;
}

// ---- Pages --------------------------------------------------------------------------------------

function paginate(section) {
  const parts = [...section.children].flatMap(
    (part) => matches(part, ".fragment") ? [...part.children] : [part]);
  const cells = parts.map((part) => ({
    notes: matches(part, "aside.notes") ? part : null,
    fragment: part.parentElement !== section,
    blocks: matches(part, "aside.notes") ? [] : blocks(part).map(sized),
  }));
  const stack = section.parentElement;
  const heading = section.querySelector("h1, h2")?.textContent.replace("¶", "") ?? lastHeading;
  lastHeading = heading;
  section.replaceChildren();
  if (!isHeading(cells.flatMap((cell) => cell.blocks)[0])) {
    section.append(element("p", "continued", [heading]));
  }
  let page = section;
  const full = () => page.scrollHeight > HEIGHT + ABOVE + BELOW;
  const empty = () => !page.querySelector(":scope > :not(.continued)");
  const turn = () => {
    const orphan = page.lastElementChild;
    const next = element("section", "", [element("p", "continued", [`${heading} (continued)`])]);
    if (isHeading(orphan) && orphan !== page.firstElementChild) next.replaceChildren(orphan);
    page.after(next);
    page = next;
  };
  for (const cell of cells) {
    if (cell.notes) page.append(cell.notes);
    page.append(...cell.blocks);
    cell.blocks.forEach(shrink);
    const together = !full();
    cell.blocks.forEach((block) => block.remove());
    if (!together && !empty()) {
      const here = page;
      turn();
      page.append(...cell.blocks);
      const fitsAlone = !full();
      cell.blocks.forEach((block) => block.remove());
      if (!fitsAlone && empty()) { // too long for one slide: it may as well begin here
        page.remove();
        page = here;
      }
    }
    let shown = cell.fragment && !empty(); // the first thing on a slide needs no step of its own
    for (let block of cell.blocks) {
      while (block) {
        page.append(block);
        shrink(block);
        if (!full()) break;
        const light = ".continued, .notes, h1, h2, h3, h4";
        if ([...page.children].some((other) => other !== block && !matches(other, light))) {
          block.remove();
          turn();
          shown = false;
          continue;
        }
        const rest = cut(block, () => !full());
        block.classList.toggle("fragment", shown);
        if (!rest) break;
        turn();
        block = rest;
      }
      block?.classList.toggle("fragment", shown);
      if (shown) block.dataset.fragmentIndex = cells.indexOf(cell);
    }
  }
  stack.querySelectorAll(".continued:only-child").forEach((alone) => alone.parentElement.remove());
}

let lastHeading = "";

async function start() {
  const deck = document.querySelector(".reveal");
  await MathJax.startup.promise;
  await MathJax.typesetPromise([deck]);
  await Promise.all([...deck.querySelectorAll("img")].map((image) => image.decode()));
  await document.fonts.ready;
  deck.classList.add("measuring");
  deck.querySelectorAll(".slides > section > section").forEach(paginate);
  deck.querySelectorAll("iframe").forEach(fitFrame);
  deck.classList.remove("measuring");
  Reveal.on("ready", runFrames);
  Reveal.on("slidechanged", runFrames);
  await Reveal.initialize({
    width: 1280, height: 720, margin: 0, center: false, hash: true, transition: "none",
    slideNumber: "c/t", plugins: [RevealNotes], pdfSeparateFragments: false,
  });
  document.body.dataset.ready = "true";
}

start();
