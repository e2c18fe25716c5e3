// The page of image search. Its address holds the query, in the parameters of /api/search.

const PAGE = 60; // images per request
const MOST = 2000; // images shown of a query
const LARGEST_UPLOAD = 20 * 2 ** 20;
const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat();
const counted = (n, word) => `${number.format(n)} ${word}${n === 1 ? "" : "s"}`;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("class", "icon");
  svg.append(use);
  return svg;
}

function button(action, label, shown, className = "") {
  const made = element("button", { type: "button", title: label, className }, shown);
  made.dataset.do = action;
  made.setAttribute("aria-label", label);
  return made;
}

// ---- the query and its address ----

const FILTERS = ["folder", "after", "before"];
let query; // { text, images: [{ weight, id or upload }], folder, after, before }
let stats = { images: null, folders: [], indexing: null };

function readAddress() {
  const parameters = new URLSearchParams(location.search);
  const images = [];
  for (const [key, value] of parameters) {
    const match = /^(-?)(?:([\d.]+):)?(\w+)$/.exec(value);
    if (!match || !["like", "image"].includes(key)) continue;
    const weight = (match[1] ? -1 : 1) * Number(match[2] ?? 1);
    images.push(key === "like" ? { weight, id: Number(match[3]) } : { weight, upload: match[3] });
  }
  const filters = FILTERS.map((name) => [name, parameters.get(name) ?? ""]);
  return { text: parameters.get("q") ?? "", images, ...Object.fromEntries(filters) };
}

function parametersOf({ text, images, ...filters }) {
  const parameters = new URLSearchParams();
  if (text.trim()) parameters.set("q", text.trim());
  for (const { weight, id, upload } of images) {
    const size = Math.abs(weight) === 1 ? "" : `${Math.abs(weight)}:`;
    parameters.append(upload ? "image" : "like", `${weight < 0 ? "-" : ""}${size}${upload ?? id}`);
  }
  for (const name of FILTERS) if (filters[name]) parameters.set(name, filters[name]);
  return parameters;
}

/** Changes the query. While somebody types, the entry of the history that typing began is replaced. */
function change(changes, typing = false) {
  query = { ...query, ...changes };
  const address = `/?${parametersOf(query)}`.replace(/\?$/, "");
  if (typing && history.state?.typing) history.replaceState({ typing }, "", address);
  else if (address !== location.pathname + location.search) {
    keepPlace();
    history.pushState({ typing }, "", address);
  }
  viewer.close();
  search(0, typing);
}

function keepPlace() {
  clearTimeout(scrolling);
  history.replaceState({ ...history.state, scroll: scrollY }, "");
}

// ---- asking the server ----

let found = null; // what is shown: { hits, total, strong, terms, parameters, path }
let request = new AbortController();
let pending = null; // the request for more
const kept = new Map(); // answers by parameters, for the way back

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server does not answer. Is it still running?");
  }
  const content = await answer.json().catch(() => ({ error: answer.statusText }));
  if (!answer.ok) throw new Error(content.error);
  return content;
}

const path = () => (isQuery() ? "/api/search" : "/api/images"); // those are the latest

async function search(scroll = 0, typing = false) {
  request.abort();
  request = new AbortController();
  pending = null;
  clearTimeout(waiting);
  showControls(typing);
  const parameters = String(parametersOf(query));
  const { signal } = request;
  try {
    $("progress").classList.add("on");
    const answer = kept.get(parameters) ?? (await ask(`${path()}?${parameters}&limit=${PAGE}`, { signal }));
    if (signal.aborted) return;
    kept.delete(parameters);
    kept.set(parameters, answer);
    if (kept.size > 30) kept.delete(kept.keys().next().value);
    found = { ...answer, parameters, path: path() };
    showFound(scroll);
  } catch (error) {
    if (error.name !== "AbortError") showNotice(error.message, "Try again", () => search());
  } finally {
    if (!signal.aborted) $("progress").classList.remove("on");
  }
}

function more() {
  if (!found || pending || found.hits.length >= Math.min(found.total, MOST)) return pending;
  const { signal } = request;
  const asked = found;
  pending = ask(`${asked.path}?${asked.parameters}&limit=${PAGE}&offset=${asked.hits.length}`, { signal })
    .then((answer) => {
      if (asked !== found) return;
      asked.hits.push(...answer.hits);
      if (!answer.hits.length) asked.total = asked.hits.length;
      pending = null;
      addTiles();
    })
    .catch((error) => {
      if (error.name !== "AbortError") showNotice(error.message, "Try again", () => ((pending = null), more()));
    });
  return pending;
}

async function refreshStats() {
  clearTimeout(refreshStats.timer);
  try {
    const before = stats.images;
    stats = await ask("/api/stats");
    if (before !== null && before !== stats.images) {
      kept.clear();
      if (!isQuery()) search();
    }
  } catch (error) {
    return showNotice(error.message, "Try again", refreshStats);
  }
  $("folders").replaceChildren(...stats.folders.map((folder) => new Option(folder)));
  $("welcome").querySelector("h1").textContent = `Search ${counted(stats.images, "image")}`;
  $("indexing").hidden = !stats.indexing;
  if (stats.indexing) {
    const [done, total] = stats.indexing;
    Object.assign($("indexing").firstElementChild, { value: done, max: total });
    $("indexing").lastElementChild.textContent = `Indexing ${number.format(done)} of ${counted(total, "image")}`;
    refreshStats.timer = setTimeout(refreshStats, 2000);
  }
}

async function searchByFile(file) {
  if (!file?.type.startsWith("image/")) return say("This is no image. Drop or paste an image file.");
  if (file.size > LARGEST_UPLOAD) return say("The image is larger than 20 MB. Make it smaller first.");
  try {
    $("progress").classList.add("on");
    const { image } = await ask("/api/images", { method: "POST", body: file });
    change({ text: "", images: [{ weight: 1, upload: image }] });
  } catch (error) {
    $("progress").classList.remove("on");
    showNotice(error.message, "Close", hideNotice);
  }
}

// ---- controls ----

const isQuery = () => query.text.trim() !== "" || query.images.length > 0;

function showControls(typing) {
  if (!typing) $("query").value = query.text; // else it may be ahead
  $("clear").hidden = !isQuery();
  for (const name of FILTERS) $(name).value = query[name];
  const set = FILTERS.filter((name) => query[name]).length;
  Object.assign(document.querySelector("#filters b"), { textContent: set, hidden: !set });
  document.title = query.text ? `${query.text} – image search` : "Image search";
}

/** A chip per term, where there are several or images: what the text means, and handles to change it by. */
function showTerms() {
  const texts = (found?.terms ?? []).filter((term) => "text" in term);
  const rewrite = (index, term) => {
    const changed = texts.flatMap((other, place) => (place === index ? (term ? [term] : []) : [other]));
    found = { ...found, terms: changed }; // until the reply is there: the next click may come before
    change({ text: changed.map(spelled).join(" ") });
    showTerms();
  };
  const replace = (index, image) => {
    change({ images: query.images.flatMap((other, place) => (place === index ? (image ? [image] : []) : [other])) });
    showTerms();
  };
  const chips = texts.length + query.images.length > 1 ? texts.map((term, index) => chip(term, (to) => rewrite(index, to))) : [];
  $("terms").hidden = !query.images.length && !chips.length;
  $("terms").replaceChildren(...query.images.map((term, index) => chip(term, (to) => replace(index, to))), ...chips);
}

/** A term as it is typed. */
function spelled({ weight, text }, index) {
  const sign = weight < 0 ? "- " : index ? "+ " : "";
  return sign + (Math.abs(weight) === 1 ? "" : `${Math.abs(weight)}:`) + text;
}

function chip(term, set) {
  const { weight, text, id, upload } = term;
  const size = Math.abs(weight);
  const name = text ?? "this image";
  const shown = text ?? element("img", { src: upload ? `/thumb/upload/${upload}` : `/thumb/${id}`, alt: name, width: 26, height: 26 });
  const sign = button("sign", weight < 0 ? `Add ${name}` : `Leave out ${name}`, icon(weight < 0 ? "minus" : "plus"));
  const times = button("weight", `Weight of ${name}: ${size}. Change it`, `×${size}`);
  const remove = button("remove", `Remove ${name}`, icon("close"));
  sign.onclick = () => set({ ...term, weight: -weight });
  times.onclick = () => set({ ...term, weight: Math.sign(weight) * ({ 0.5: 1, 1: 2, 2: 3 }[size] ?? 0.5) });
  remove.onclick = () => set(null);
  return element("li", { className: weight < 0 ? "chip minus" : "chip" }, sign, element("span", {}, shown), times, remove);
}

let toast;
function say(message) {
  clearTimeout(toast);
  $("toast").textContent = message;
  toast = setTimeout(() => ($("toast").textContent = ""), 4000);
}

function showNotice(message, label, action) {
  const [text, act] = $("notice").children;
  text.textContent = message;
  act.textContent = label;
  act.onclick = () => (hideNotice(), action());
  $("notice").hidden = false;
}
const hideNotice = () => ($("notice").hidden = true);

// ---- the grid ----

let tiles = [];
let cursor = 0; // the tile that Tab comes to

function showFound(scroll) {
  hideNotice();
  const { hits, total, strong } = found;
  const filtered = FILTERS.some((name) => query[name]);
  const hadFocus = $("grid").contains(document.activeElement);
  nearEnd.disconnect();
  $("found").replaceWith($("found").cloneNode(true)); // what is new has not moved, whatever comes above it
  showTerms();
  $("welcome").hidden = isQuery() || filtered;
  $("head").hidden = !hits.length;
  const words = !isQuery()
    ? [filtered ? counted(total, "image") : "Latest images", ""]
    : strong
      ? [strong === 1 ? "1 strong match" : `${number.format(strong)} strong matches`, `of ${counted(total, "image")}`]
      : ["No strong match", `the nearest of ${counted(total, "image")}`];
  $("head").firstElementChild.replaceChildren(words[0], element("small", {}, ` ${words[1]}`));
  $("status").textContent = hits.length ? words.join(" ") : "";
  tiles = [];
  cursor = 0;
  $("grid").replaceChildren();
  if (!total && filtered) showNotice("No image in this folder and time.", "Clear filters", unfilter);
  else if (!total) showNotice("No image is indexed yet. Run: hfclip index FOLDER", "Look again", refreshStats);
  addTiles();
  scrollTo(0, scroll);
  if (hadFocus) tiles[0]?.firstElementChild.focus({ preventScroll: true });
  showViewer();
}

function addTiles() {
  const { hits, strong, total } = found;
  for (let index = tiles.length; index < hits.length; index++) {
    if (index === strong && index && isQuery()) $("grid").append(element("li", { className: "divider" }, "Weaker matches"));
    tiles.push(tile(hits[index], index));
    $("grid").append(tiles[index]);
  }
  arrange();
  const all = hits.length >= Math.min(total, MOST);
  nearEnd.disconnect(); // and told anew whether the end is near
  if (!all) nearEnd.observe($("end"));
  $("end").textContent = all && total > MOST ? `The first ${number.format(MOST)} of ${counted(total, "image")}` : "";
}

function tile(hit, index) {
  const picture = element("img", { alt: describe(hit), loading: "lazy", decoding: "async", draggable: false });
  picture.src = `/thumb/${hit.id}?v=${Math.round(hit.modified)}`;
  const caption = element("span", { className: "caption" }, element("b", {}, hit.name), element("i", {}, isQuery() ? hit.score.toFixed(3) : ""));
  const link = element("a", { href: `/?like=${hit.id}`, tabIndex: index ? -1 : 0 }, picture, caption);
  const made = element("li", { className: "tile" }, link);
  caption.ariaHidden = true;
  picture.onerror = () => made.classList.add("missing");
  made.dataset.index = index;
  if (isQuery()) {
    const bar = element("div", { className: index < found.strong ? "score strong" : "score" }, element("i"));
    bar.firstElementChild.style.width = `${Math.max(4, Math.min(100, (100 * hit.z) / Math.max(found.hits[0].z, 1)))}%`;
    made.append(bar);
  }
  if (matchMedia("(hover: none)").matches) addTools(made, false);
  return made;
}

function addTools(made, all) {
  if (made.querySelector(".tools")) return;
  const name = describe(found.hits[made.dataset.index]);
  const tools = all ? [button("less", `Less like ${name}`, icon("minus")), button("more", `More like ${name}`, icon("plus"))] : [];
  tools.push(button("open", `Open ${name}`, icon("expand")));
  for (const tool of tools) tool.tabIndex = -1;
  made.append(element("div", { className: "tools" }, ...tools));
}

/** Rows of one height each that fill the width. The last row waits for the images that are still to come. */
function arrange() {
  if (!tiles.length) return;
  const { hits, strong, total } = found;
  const width = Math.floor($("grid").getBoundingClientRect().width);
  const gap = parseFloat(getComputedStyle($("grid")).columnGap);
  const heights = hits.slice(0, PAGE).map((hit) => hit.height || 256).sort((one, other) => one - other);
  const natural = 1.5 * heights[heights.length >> 1];
  const target = Math.min(width < 600 ? 112 : 184, Math.max(88, natural)); // small images are not blown up
  const ratios = hits.map((hit) => Math.min(3, Math.max(0.5, hit.width / hit.height || 1)));
  let row = [];
  let sum = 0;
  const close = (height, fills) => {
    let left = width - gap * (row.length - 1);
    row.forEach((index, place) => {
      const wide = fills && place === row.length - 1 ? left : Math.floor(ratios[index] * height);
      left -= wide;
      const [picture] = tiles[index].getElementsByTagName("img");
      Object.assign(picture, { width: wide, height: Math.round(height) });
      Object.assign(tiles[index].style, { width: `${wide}px` });
      tiles[index].hidden = false;
    });
    [row, sum] = [[], 0];
  };
  hits.forEach((_, index) => {
    if (index === strong && row.length && isQuery()) close(target, false);
    row.push(index);
    sum += ratios[index];
    const height = (width - gap * (row.length - 1)) / sum;
    if (height <= target) close(height, true);
  });
  if (hits.length >= Math.min(total, MOST)) close(target, false);
  else for (const index of row) tiles[index].hidden = true;
}

const describe = ({ name }) => name.replace(/\.\w+$/, "").replace(/[_-]+/g, " ").trim() || name;

function act(action, hit) {
  const others = query.images.filter(({ id }) => id !== hit.id);
  if (action === "similar") change({ text: "", images: [{ weight: 1, id: hit.id }] });
  else if (action === "more") change({ images: [...others, { weight: 1, id: hit.id }] });
  else if (action === "less") change({ images: [...others, { weight: -0.5, id: hit.id }] });
  else if (action === "open") openViewer(found.hits.indexOf(hit));
  else if (action === "copy") copy(hit.path);
}

function copy(path) {
  if (!navigator.clipboard) return say("This browser copies nothing from here: select the path and copy it.");
  navigator.clipboard.writeText(path).then(() => say("Path copied"), () => say("The browser did not allow it: select the path and copy it."));
}

async function downloadList() {
  while (found.hits.length < Math.min(found.strong, MOST) && found.hits.length < found.total) await more();
  const quoted = (text) => `"${text.replaceAll('"', '""')}"`;
  const lines = found.hits.map((hit) => [quoted(hit.path), hit.score.toFixed(5), hit.z.toFixed(3)].join(","));
  const file = new Blob([["path,score,z", ...lines].join("\n"), "\n"], { type: "text/csv" });
  const name = query.text.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "images";
  const link = element("a", { href: URL.createObjectURL(file), download: `${name}.csv` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// ---- one image, large ----

const viewer = $("viewer");
const viewed = () => found?.hits.findIndex((hit) => `#${hit.id}` === location.hash) ?? -1;

function openViewer(index) {
  const hit = found.hits[index];
  if (!hit) return;
  if (viewer.open) history.replaceState(history.state, "", `#${hit.id}`);
  else {
    keepPlace();
    history.pushState({ scroll: scrollY, viewing: true }, "", `#${hit.id}`);
  }
  showViewer();
}

function showViewer() {
  const hit = found?.hits[viewed()];
  if (!hit) return viewer.close();
  const picture = viewer.querySelector("img");
  Object.assign(picture, { src: `/image/${hit.id}`, alt: describe(hit), width: hit.width || 256, height: hit.height || 256 });
  viewer.querySelector("h2").textContent = hit.name;
  const facts = { Path: hit.path, Size: hit.width ? `${hit.width} × ${hit.height}` : "", Changed: new Date(hit.modified * 1000).toLocaleDateString(undefined, { dateStyle: "long" }) };
  if (isQuery()) facts.Match = `${viewed() < found.strong ? "strong" : "weak"}, cosine ${hit.score.toFixed(3)}, z ${hit.z.toFixed(1)}`;
  const shown = Object.entries(facts).filter(([, value]) => value);
  viewer.querySelector("dl").replaceChildren(...shown.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
  viewer.querySelector("[data-do=download]").href = `/image/${hit.id}?download=1`;
  viewer.querySelector("[data-do=previous]").disabled = viewed() === 0;
  viewer.querySelector("[data-do=next]").disabled = viewed() === found.hits.length - 1;
  if (!viewer.open) viewer.showModal();
  if (viewed() > found.hits.length - 10) more();
}

function closeViewer() {
  const index = viewed();
  viewer.close();
  if (history.state?.viewing) history.back();
  else history.replaceState(null, "", location.pathname + location.search);
  focusTile(index);
}

// ---- keys, and other events ----

function focusTile(index) {
  const next = tiles[Math.max(0, Math.min(tiles.length - 1, index))];
  if (!next || next.hidden) return;
  if (tiles[cursor]) tiles[cursor].firstElementChild.tabIndex = -1;
  cursor = Number(next.dataset.index);
  next.firstElementChild.tabIndex = 0;
  next.firstElementChild.focus();
}

/** The tile of the next or last row that lies below or above a tile. */
function vertical(index, step) {
  const middle = (tile) => tile.offsetLeft + tile.offsetWidth / 2;
  const from = tiles[index];
  let row = null;
  let best = index;
  for (let other = index + step; tiles[other] && !tiles[other].hidden; other += step) {
    const top = tiles[other].offsetTop;
    if (top === from.offsetTop) continue;
    if (row !== null && top !== row) break;
    const nearer = row === null || Math.abs(middle(tiles[other]) - middle(from)) < Math.abs(middle(tiles[best]) - middle(from));
    if (nearer) best = other;
    row = top;
  }
  return best;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || viewer.open) return;
  const typing = event.target.matches("input, select, textarea");
  const inGrid = event.target.closest(".tile");
  const index = Number(inGrid?.dataset.index);
  const hit = found?.hits[index];
  const keys = {
    ArrowLeft: () => focusTile(index - 1),
    ArrowRight: () => focusTile(index + 1),
    ArrowUp: () => (vertical(index, -1) === index ? $("query").focus() : focusTile(vertical(index, -1))),
    ArrowDown: () => focusTile(vertical(index, 1)),
    Home: () => focusTile(0),
    End: () => focusTile(tiles.filter((tile) => !tile.hidden).length - 1),
    " ": () => act("open", hit),
    "+": () => act("more", hit),
    "-": () => act("less", hit),
    Escape: () => $("query").focus(),
  };
  if (inGrid && event.target.matches("a") && keys[event.key]) keys[event.key]();
  else if (event.key === "/" && !typing) $("query").select();
  else if (event.key === "Escape" && $("filters").open) $("filters").open = false;
  else if (event.key === "Escape" && event.target === $("query") && $("query").value) change({ text: ($("query").value = "") });
  else if (event.key === "Escape") document.activeElement.blur();
  else if (event.key === "ArrowDown" && event.target === $("query")) focusTile(cursor);
  else return;
  event.preventDefault();
}

let waiting;
$("query").oninput = () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => change({ text: $("query").value }, true), 180);
};
$("box").onsubmit = (event) => {
  event.preventDefault();
  if ($("query").value !== query.text) change({ text: $("query").value }, true);
  history.replaceState({ ...history.state, typing: false }, ""); // what is typed next is another query
};
$("clear").onclick = () => (change({ text: "", images: [] }), $("query").focus());
$("home").onclick = (event) => (event.preventDefault(), change(Object.fromEntries([["text", ""], ["images", []], ...FILTERS.map((name) => [name, ""])])));
$("upload").onchange = ({ target }) => (searchByFile(target.files[0]), (target.value = ""));
const unfilter = () => change({ folder: "", after: "", before: "" });
$("unfilter").onclick = unfilter;
for (const name of FILTERS) $(name).onchange = () => change({ [name]: $(name).value });
document.querySelector("main").onclick = (event) => {
  if (event.target.closest("#list")) return downloadList();
  const action = event.target.closest(".tile button")?.dataset.do ?? (event.target.closest(".tile a") && "similar");
  if (!action || event.ctrlKey || event.metaKey || event.shiftKey) return; // which open another tab
  event.preventDefault();
  act(action, found.hits[event.target.closest(".tile").dataset.index]);
};
document.querySelector("main").onpointerover = ({ target, pointerType }) => {
  if (pointerType === "mouse" && target.closest(".tile")) addTools(target.closest(".tile"), true);
};
viewer.oncancel = (event) => (event.preventDefault(), closeViewer());
viewer.onclick = (event) => {
  const action = event.target === viewer ? "close" : event.target.closest("[data-do]")?.dataset.do;
  if (action === "close") closeViewer();
  else if (action === "previous" || action === "next") openViewer(viewed() + (action === "next" ? 1 : -1));
  else if (action && action !== "download") act(action, found.hits[viewed()]);
};
viewer.onkeydown = ({ key }) => {
  if (key === "ArrowLeft" || key === "ArrowRight") openViewer(viewed() + (key === "ArrowRight" ? 1 : -1));
};
document.onkeydown = onKey;
document.onclick = ({ target }) => {
  if (!$("filters").contains(target)) $("filters").open = false;
};
document.onpaste = (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  searchByFile(event.clipboardData.files[0]);
};

let inside = 0; // elements that a dragged file has entered and not left
const isFile = (event) => event.dataTransfer.types.includes("Files");
document.ondragenter = (event) => ($("drop").hidden = !isFile(event) || ++inside < 1);
document.ondragleave = (event) => isFile(event) && --inside < 1 && ($("drop").hidden = true);
document.ondragover = (event) => event.preventDefault();
document.ondrop = (event) => {
  event.preventDefault();
  inside = 0;
  $("drop").hidden = true;
  if (event.dataTransfer.files.length) searchByFile(event.dataTransfer.files[0]);
  else say("Nothing is fetched from other places: save the image, and drop the file.");
};

history.scrollRestoration = "manual";
let scrolling;
onscroll = () => {
  clearTimeout(scrolling);
  scrolling = setTimeout(keepPlace, 150);
};
onpopstate = () => {
  clearTimeout(waiting);
  clearTimeout(scrolling);
  query = readAddress();
  if (found?.parameters === String(parametersOf(query))) showViewer();
  else search(history.state?.scroll);
};
onfocus = refreshStats;
let lastWidth = 0;
new ResizeObserver(([{ contentRect }]) => {
  if (contentRect.width !== lastWidth) arrange();
  lastWidth = contentRect.width;
}).observe(document.querySelector("main"));
const nearEnd = new IntersectionObserver(([{ isIntersecting }]) => isIntersecting && more(), { rootMargin: "1200px" });

query = readAddress();
refreshStats();
search(history.state?.scroll);
