"use strict";
// Draws the results in #data. All text becomes text nodes, so no token is ever parsed as HTML.
const views = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const ink = share => `rgb(${share > 0 ? "205 50 45" : "60 105 225"} / ${(0.75 * Math.min(1, Math.abs(share))).toFixed(3)})`;

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}

function button(label, act) {
  const element = make("button", "", label);
  element.type = "button";
  element.onclick = act;
  return element;
}

// The tab key stops once per group. Left and right follow the reading order; up and down go to the nearest item.
function arrows(group, items, choose) {
  items.forEach((item, index) => { item.tabIndex = index ? -1 : 0; });
  group.addEventListener("focusin", event => {
    if (!items.includes(event.target)) return;
    items.forEach(item => { if (item.tabIndex === 0) item.tabIndex = -1; });
    event.target.tabIndex = 0;
  });
  group.addEventListener("keydown", event => {
    const at = items.indexOf(event.target);
    if (at < 0) return;
    const onward = getComputedStyle(group).direction === "rtl" ? -1 : 1;
    const next = {
      ArrowLeft: () => items[at - onward], ArrowRight: () => items[at + onward], Home: () => items[0], End: () => items.at(-1),
      ArrowUp: () => beyond(items, at, -1), ArrowDown: () => beyond(items, at, 1),
    }[event.key]?.();
    if (!next) return;
    event.preventDefault();
    next.focus();
    choose?.(items.indexOf(next));
  });
}

function beyond(items, at, down) {
  const centre = item => {
    const box = item.getClientRects()[0];
    return [box.left + box.width / 2, box.top + box.height / 2];
  };
  const [x, y] = centre(items[at]);
  let nearest, least = Infinity;
  for (const item of items) {
    const [left, top] = centre(item), lines = (top - y) * down;
    const far = 1000 * lines + Math.abs(left - x);  // the nearest line first, then the nearest item in it
    if (lines > 4 && far < least) [nearest, least] = [item, far];
  }
  return nearest;
}

function radios(group, items, choose) {
  group.setAttribute("role", "radiogroup");
  const check = chosen => items.forEach((item, index) => item.setAttribute("aria-checked", index === chosen));
  const pick = index => { check(index); choose(index); };
  items.forEach((item, index) => {
    item.setAttribute("role", "radio");
    item.addEventListener("click", () => pick(index));
  });
  group.addEventListener("keydown", event => {
    const index = items.indexOf(event.target);
    if (index >= 0 && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); pick(index); }
  });
  arrows(group, items, pick);
  check(0);
}

// Layers down, components across; ``mark`` makes a cell, ``begin`` is the first one's index. One of a pair has less room.
function heatMap({columns, layers, across, numbered, every, upright}, begin, pair, mark) {
  const own = columns.filter(({beside}) => !beside).length, side = ({beside}) => beside ? "beside" : "";
  const table = make("table", "map " + (numbered ? "numbered" : "dense")), over = make("th", "across", across);
  const width = cell => `${3.5 + own * cell + (pair ? 4 : 5.5) * (columns.length - own)}rem`;
  const [least, most] = numbered ? [2.9, 7] : [upright ? (every > 1 ? 0.42 : 0.62) : every > 4 ? 0.38 : 0.7, pair ? 2.4 : 1.6];
  const panel = make("div", "", make("div", "wide", table));
  table.style.width = `clamp(${width(least)}, 100%, ${width(most)})`;
  if (pair) panel.style.flex = `${own} 1 ${width(least)}`;  // beside the other map, or below it where both do not fit
  if (pair) panel.style.maxWidth = `calc(${width(most)} + 4px)`;
  over.colSpan = own;
  const heading = (column, index) => {
    const name = column.beside || index % every === 0 ? column.name : "";
    return make("th", side(column), upright && !column.beside ? make("span", "upright", name) : name);
  };
  table.append(
    make("colgroup", "", make("col", "layer"), ...columns.map(column => make("col", side(column)))),
    make("tr", "", make("th", ""), over),
    make("tr", "", make("th", "", "layer"), ...columns.map(heading)));
  layers.forEach((layer, row) => {
    const cells = columns.map((column, index) =>
      mark("td", side(column), begin + row * columns.length + index, "", numbered || column.beside));
    table.append(make("tr", "", make("th", "", String(layer)), ...cells));
  });
  return panel;
}

function legend(low, high) {
  const scale = make("span", "scale");
  for (let step = -10; step <= 10; step++) scale.append(make("span", ""));
  [...scale.children].forEach((swatch, step) => { swatch.style.backgroundColor = ink((step - 10) / 10); });
  return make("div", "legend", low, scale, high);
}

function draw(view) {
  let row = 0;
  const section = make("section", "");
  const digits = () => Math.min(9, Math.max(2, 1 - Math.floor(Math.log10(view.largest[row]))));
  const signed = x => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits());
  const marks = [];  // the coloured elements, each with the index of its score
  const full = new Map();  // for each, a function that gives the score drawn in full colour
  const legends = [];  // functions that write the bounds of a legend

  function mark(tag, className, index, text, number, largest = () => view.largest[row]) {
    const element = make(tag, "mark " + className, ...text.split(/(?=\n+$)/));
    element.dataset.index = index;
    full.set(element, largest);
    if (number) addNumber(element);
    marks.push(element);
    return element;
  }
  const addNumber = element => element.firstChild.after(make("span", "number"));  // before a line break at the end
  const tokenNumbers = place => place && `${place.includes("–") ? "tokens" : "token"} ${place}`;
  let said = ({dataset: {index}}) =>
    [tokenNumbers(view.places[index]), view.names[index], signed(view.scores[row][index])].filter(Boolean).join("  ");

  function text(pieces, largest) {
    const shown = make("p", "text");
    shown.dir = "auto";
    for (const [piece, index] of pieces)
      shown.append(index === null ? make("span", "", piece) : mark("span", "", index, piece, false, largest));
    return shown;
  }

  function newLegend(largest = () => view.largest[row], {low: lowest, high: highest} = view) {
    const low = make("span", ""), high = make("span", "");
    legends.push(() => {
      low.textContent = `${signed(-largest())} ${lowest}`.trim();
      high.textContent = `${highest} ${signed(largest())}`.trim();
    });
    return legend(low, high);
  }

  const caption = make("figcaption", ""), figure = make("figure", "", caption);
  const most = make("figcaption", ""), lines = make("tbody", ""), listed = [];  // the list of largest contributions
  section.append(make("h1", "", view.question), make("p", "hint", view.facts));
  if (view.targets.length > 1 && !view.generated && !view.answer) {
    const choices = make("div", "targets", ...view.targets.map(target => button(target.label, () => {})));
    [...choices.children].forEach((choice, index) => choice.append(make("span", "", view.targets[index].logit)));
    choices.setAttribute("aria-label", "targets");
    radios(choices, [...choices.children], select);
    section.append(make("h2", "", "Target"), choices);
  }
  if (view.asked) section.append(make("p", "asked", make("b", "", "Question"), view.asked));
  if (view.use) section.append(make("p", "hint", view.use));
  if (view.generated)
    section.append(make("p", "hint", "Choose a part of the answer with a click or the arrow keys to see what contributed to it."));
  if (view.answer)
    section.append(make("p", "hint", "Point at a sentence of the answer to colour the documents by its scores; a click or the " +
      "arrow keys keep it. Point at a sentence of a document to see which sentences of the answer it contributed to."));
  section.append(figure);

  let tokens = [];  // without a number until one is asked for
  if (view.strips) {
    tokens = survey();
  } else if (view.answer) {
    tokens = sides();
  } else {
    const prompt = text(view.prompt);
    tokens = [...marks];
    if (view.maps) {
      figure.append(...view.maps.map(map => heatMap(map, 0, false, mark)));
      section.insertBefore(prompt, figure);
      section.insertBefore(make("h2", "", "Prompt"), prompt);
    } else {
      figure.append(prompt);
    }
  }
  if (view.chips.length) {
    const chips = make("p", "chips", ...view.chips.map(index =>
      mark("span", view.ranked.includes(index) ? "" : "beside", index, view.names[index], true)));
    (figure.querySelector(".sides > :first-child") ?? figure).append(chips);
    if (view.answer) arrows(chips, [...chips.children]);
  }
  if (!view.strips && !view.answer) arrows(figure, [...marks]);
  let generated = [];
  if (view.generated) {
    const after = text(view.generated);
    after.setAttribute("aria-label", "parts of the answer");
    generated = [...after.children];
    generated.forEach(token => token.classList.add("choice"));
    tokens.push(...generated.filter(token => token.dataset.index));
    figure.append(make("h2", "", "Answer"), after);
    radios(after, generated, select);
  }

  if (!view.strips) figure.append(newLegend());
  const tools = make("div", "tools", button("Save as SVG", () => save(figure, view.name)));
  if (tokens.length) {
    const box = make("input", "numbers");
    box.type = "checkbox";
    box.onchange = () => {
      for (const token of tokens)
        if (box.checked) addNumber(token); else token.querySelector(".number").remove();
      paint();
    };
    tools.append(make("label", "", box, "Show scores"));
  }
  const largest = make("figure", view.answer ? "cited" : "", most, make("table", "top", lines));
  section.append(tools, largest, make("div", "tools", button("Save as SVG", () => save(largest, view.name + "-largest"))));
  section.append(make("p", "hint", view.hint));

  // A survey's prompt and maps. A chosen cell's strip, its row of scores by position, colours the prompt. A chosen token
  // gives the map of heads its scores at that token.
  function survey() {
    let cell = 0, column = null;
    const largestOf = elements => Math.max(...elements.map(({dataset: {index}}) => Math.abs(view.scores[row][index] ?? 0))) || 1;
    const strip = () => view.strips[view.strip_of[cell]], inStrip = () => largestOf(tokens);
    const prompt = text(view.prompt, inStrip), tokens = [...marks], about = make("span", "");
    const [tokenMap, headMap] = view.maps, ofTokens = () => tokenMap.largest[row];
    const ofHeads = () => column === null ? headMap.largest[row] : largestOf(heads.filter(head => !head.matches(".beside")));
    const panel = (map, begin, largest) => {
      const made = heatMap(map, begin, true, (...details) => mark(...details, largest));
      made.append(newLegend(largest, {low: "", high: ""}));
      return made;
    };
    const left = panel(tokenMap, 0, ofTokens), right = panel(headMap, tokenMap.layers.length * tokenMap.columns.length, ofHeads);
    const cells = marks.slice(tokens.length), heads = [...right.querySelectorAll(".mark")], across = right.querySelector(".across");
    right.querySelector("table").append(make("tr", "", make("th", "", "\u00a0")));  // beside the other map's last row
    marks.forEach(element => { element.dataset.cell = element.dataset.index; });
    figure.append(make("p", "about", make("b", "", "Prompt"), about), prompt, newLegend(inStrip), make("div", "maps", left, right));
    for (const [group, items] of [[prompt, tokens], [left, [...left.querySelectorAll(".mark")]], [right, heads]]) arrows(group, items);

    function show() {
      const [name, begin] = strip();
      about.textContent = `coloured by ${name}`;
      tokens.forEach((token, place) => {
        token.dataset.index = begin + place;
        token.classList.toggle("chosen", place === column);
      });
      for (const other of cells) other.classList.toggle("chosen", view.strip_of[other.dataset.cell] === view.strip_of[cell]);
      for (const head of heads) {
        const own = view.strips[view.strip_of[head.dataset.cell]];
        head.dataset.index = column === null ? head.dataset.cell : own ? own[1] + column : -1;
      }
      across.textContent = headMap.across + (column === null ? "" : `, at ${tokenNumbers(view.places[column])}`);
    }
    function choose({target}) {
      const element = target.closest(".mark");
      if (!element) return;
      if (tokens.includes(element)) column = column === tokens.indexOf(element) ? null : tokens.indexOf(element);
      else if (view.strip_of[element.dataset.cell] !== null) cell = element.dataset.cell;
      show();
      paint();
    }
    figure.addEventListener("click", choose);
    figure.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(event); }
    });
    said = element => {
      const {cell: own, index} = element.dataset, score = view.scores[row][index], isToken = tokens.includes(element);
      const place = heads.includes(element) ? column ?? own : own;
      return [tokenNumbers(view.places[place]), view.names[index] ?? view.names[isToken ? cell : own],
        score === undefined ? "not on this page" : signed(score)].filter(Boolean).join("  ");
    };
    show();
    return tokens;
  }

  // Citations: the answer beside the documents. A sentence of the answer colours the documents, and a sentence of a document
  // the answer.
  function sides() {
    let chosen = 0;
    const answer = make("p", "text"), documents = make("div", "documents"), claims = [];
    answer.dir = "auto";
    for (const [piece, index] of view.answer) {
      const shown = make("span", index === null ? "" : "choice", piece);
      if (index !== null) claims[index] = shown;
      answer.append(shown);
    }
    for (const {title, sum, pieces} of view.documents)
      documents.append(make("h3", "", title, mark("span", "beside", sum, "", true)), text(pieces));
    const sentences = [...documents.querySelectorAll(".text .mark")];
    const left = make("div", "", make("h2", "", "Answer"), answer), right = make("div", "", make("h2", "", "Documents"), documents);
    figure.append(make("div", "sides", left, right));

    const place = index => view.places[index] || "";
    said = ({dataset: {index}}) => [place(index) || view.names[index], signed(view.scores[row][index]),
      place(index) && `share ${percent(index)}`].filter(Boolean).join("  ");
    const reveal = () => {  // the largest sentence, where the documents are scrolled elsewhere
      const box = sentences[best()[0]]?.getBoundingClientRect(), frame = documents.getBoundingClientRect();
      if (box && (box.top < frame.top || box.bottom > frame.bottom)) documents.scrollTop += box.top - frame.top - frame.height / 4;
    };
    answer.setAttribute("aria-label", "sentences of the answer");
    documents.setAttribute("role", "group");
    documents.setAttribute("aria-label", "sentences of the documents");
    radios(answer, claims, index => { chosen = index; select(index); reveal(); });
    const preview = index => { claims.forEach((claim, at) => claim.classList.toggle("shown", at === index)); select(index); };
    claims.forEach((claim, index) => {
      claim.onpointerenter = () => preview(index);
      claim.onpointerleave = () => { preview(chosen); claims[chosen].classList.remove("shown"); };
    });
    const largest = Math.max(...view.largest);
    const colour = index => claims.forEach((claim, at) => {
      claim.style.backgroundColor = index === undefined ? "" : ink(view.scores[at][index] / largest);
    });
    for (const [begin, end] of [["pointerover", "pointerout"], ["focusin", "focusout"]]) {
      documents.addEventListener(begin, event => colour(event.target.closest(".text .mark")?.dataset.index));
      documents.addEventListener(end, () => colour());
    }
    arrows(documents, sentences);
    arrows(lines, listed);
    lines.addEventListener("click", go);
    lines.addEventListener("keydown", event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); go(event); } });
    function go({target}) {
      sentences[target.closest("tr")?.dataset.index]?.focus();
    }
    requestAnimationFrame(reveal);
    return sentences;
  }

  function percent(index) {
    const total = view.ranked.reduce((sum, each) => sum + size(each), 0) || 1;
    const whole = Math.round(100 * size(index) / total);
    return (whole && view.scores[row][index] < 0 ? "−" : "") + whole + "%";
  }

  function size(index) {
    return Math.abs(view.scores[row][index]);
  }

  function best() {
    return view.ranked.filter(size).sort((a, b) => size(b) - size(a)).slice(0, view.listed);
  }

  function paint() {
    const scores = view.scores[row];
    legends.forEach(write => write());
    const sizes = new Map();  // by function, because many elements share one
    for (const element of marks) {
      const score = scores[element.dataset.index] ?? 0, number = element.querySelector(".number"), largest = full.get(element);
      if (!sizes.has(largest)) sizes.set(largest, largest());
      if (!element.classList.contains("beside")) element.style.backgroundColor = ink(score / sizes.get(largest));
      if (number) number.textContent = signed(score);
    }
    generated.forEach((token, index) => token.classList.toggle("later", index > row));
  }

  function line(index, most) {
    const score = view.scores[row][index], bar = make("div", "bar");
    bar.style.width = 100 * Math.min(1, Math.abs(score) / most) + "%";
    bar.style.backgroundColor = ink(Math.sign(score));
    const line = make("tr", "", make("td", "name", view.names[index]), make("td", "score", signed(score)));
    if (view.answer) line.append(make("td", "share", percent(index)));
    line.append(make("td", "", bar));
    line.dataset.index = index;
    if (view.ranked.some(index => view.places[index])) line.prepend(make("td", "place", view.places[index]));
    const outline = on => () => marks.forEach(mark => mark.classList.toggle("shown", on && mark.dataset.index === String(index)));
    line.onpointerenter = outline(true);
    line.onpointerleave = outline(false);
    return line;
  }

  function select(chosen) {
    row = chosen;
    const {label, about} = view.targets[row];
    caption.replaceChildren(make("b", "", label), make("span", "", about));
    most.replaceChildren(view.list ?? "Largest contributions to ", make("b", "", label));
    paint();
    const ranked = best();
    listed.splice(0, listed.length, ...ranked.map(index => line(index, size(ranked[0]))));
    if (view.answer) listed.forEach((line, index) => { line.tabIndex = index ? -1 : 0; });
    lines.replaceChildren(...listed);
  }

  for (const [begin, end] of [["pointerover", "pointerout"], ["focusin", "focusout"]]) {
    section.addEventListener(begin, event => {
      const element = event.target.closest(".mark");
      if (element && !generated.slice(row).includes(element)) explain(element, said(element));
    });
    section.addEventListener(end, () => { tip.hidden = true; });
  }
  select(0);
  return section;
}

function explain(element, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = element.getClientRects()[0], {width, height} = tip.getBoundingClientRect();
  const left = Math.min(box.left + box.width / 2 - width / 2, document.documentElement.clientWidth - width - 8);
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = (box.top > height + 6 ? box.top - height - 5 : box.bottom + 5) + "px";
}

// The figure as SVG. It uses only rectangles and texts, which every program that reads SVG can show.
function picture(figure) {
  const space = "http://www.w3.org/2000/svg", svg = document.createElementNS(space, "svg"), origin = figure.getBoundingClientRect();
  let wide = 0, high = 0;  // size of the drawing so far
  const round = x => Math.round(100 * x) / 100;
  function put(tag, box, attributes, content = "") {
    const element = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(attributes))
      element.setAttribute(name, typeof value === "number" ? round(value) : value);
    element.textContent = content;
    svg.append(element);
    [wide, high] = [Math.max(wide, box.right - origin.left), Math.max(high, box.bottom - origin.top)];
  }
  const clear = colour => colour === "rgba(0, 0, 0, 0)" || colour === "transparent";
  const pen = document.createElement("canvas").getContext("2d");
  const at = box => [box.left - origin.left, box.top - origin.top];

  for (const element of figure.querySelectorAll("*")) {
    const style = getComputedStyle(element), chosen = style.outlineStyle !== "none";
    const bordered = element.matches(".chips .mark, .scale, .text");
    if (clear(style.backgroundColor) && !bordered && !chosen) continue;
    for (const box of element.getClientRects()) {
      const [x, y] = at(box);
      put("rect", box, {
        x, y, width: box.width, height: box.height, rx: parseFloat(style.borderTopLeftRadius) || 0,
        fill: clear(style.backgroundColor) ? "none" : style.backgroundColor, opacity: style.opacity,
        stroke: chosen ? style.outlineColor : bordered ? style.borderTopColor : "none",
      });
    }
  }
  const range = document.createRange(), nodes = document.createTreeWalker(figure, NodeFilter.SHOW_TEXT);
  while (nodes.nextNode()) {
    const node = nodes.currentNode, parent = node.parentElement, style = getComputedStyle(parent);
    pen.font = style.font;
    const {fontBoundingBoxAscent: ascent} = pen.measureText("x");
    const look = {
      lengthAdjust: "spacingAndGlyphs", "font-family": style.fontFamily, "font-size": style.fontSize,
      "font-weight": style.fontWeight, fill: style.color, opacity: parent.closest(".later") ? 0.5 : 1, style: "white-space: pre",
    };
    if (parent.matches(".upright")) {  // from the bottom to the top
      const box = parent.getBoundingClientRect(), x = box.left - origin.left + ascent, y = box.bottom - origin.top;
      put("text", box, {x, y, textLength: box.height, transform: `rotate(-90 ${round(x)} ${round(y)})`, ...look}, node.data.trim());
      continue;
    }
    for (const {text, left, right, top} of broken(node, range)) put("text", {right, bottom: top}, {
      x: left - origin.left, y: top - origin.top + ascent, textLength: right - left, ...look,
    }, text);
  }
  const size = {width: round(wide + 16), height: round(high + 16)}, paper = document.createElementNS(space, "rect");
  const fill = getComputedStyle(document.body).backgroundColor;
  for (const [name, value] of Object.entries({x: -8, y: -8, ...size, fill})) paper.setAttribute(name, value);
  for (const [name, value] of Object.entries({viewBox: `-8 -8 ${size.width} ${size.height}`, ...size})) svg.setAttribute(name, value);
  svg.prepend(paper);
  return new XMLSerializer().serializeToString(svg);
}

// Splits a text node into runs of adjacent letters, at line ends and where the direction of writing changes.
function broken(node, range) {
  const runs = [];
  for (const {segment: letter, index} of new Intl.Segmenter().segment(node.data)) {
    range.setStart(node, index);
    range.setEnd(node, index + letter.length);
    const box = range.getBoundingClientRect(), run = runs.at(-1), near = (a, b) => Math.abs(a - b) < 1;
    if (letter === "\n" || letter === "\t") continue;
    if (run && !box.width) {
      run.text += letter;
    } else if (run && near(run.top, box.top) && (near(run.right, box.left) || near(run.left, box.right))) {
      [run.text, run.left, run.right] = [run.text + letter, Math.min(run.left, box.left), Math.max(run.right, box.right)];
    } else if (box.width) {
      runs.push({text: letter, left: box.left, right: box.right, top: box.top});
    }
  }
  return runs;
}

function save(figure, name) {
  const link = document.createElement("a");
  figure.classList.add("whole");  // includes the part that is scrolled out of view
  link.href = URL.createObjectURL(new Blob([picture(figure)], {type: "image/svg+xml"}));
  figure.classList.remove("whole");
  link.download = name.replace(/[^\w.-]+/g, "-") + ".svg";
  link.click();
  URL.revokeObjectURL(link.href);
}

const drawn = [], results = document.getElementById("results");
function open(index) {
  drawn[index] ??= draw(views[index]);
  document.getElementById("result").replaceChildren(drawn[index]);
}
if (views.length > 1) {
  results.append(...views.map(view => button(view.name, () => {})));
  radios(results, [...results.children], open);
}
document.getElementById("theme").onclick = () => {
  const root = document.documentElement.style, preferred = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  root.colorScheme = (root.colorScheme || preferred) === "dark" ? "light" : "dark";
};
open(0);
if (parent !== window) {  // a notebook's frame, which takes the height of its content
  const tellHeight = () => parent.postMessage(document.body.offsetHeight, "*");
  addEventListener("message", tellHeight);
  new ResizeObserver(tellHeight).observe(document.body);
}
