"use strict";

const byId = (id) => document.getElementById(id);
const page = {
  text: byId("text"), file: byId("file"), dim: byId("dim"), group: byId("group"), compare: byId("compare"),
  columns: byId("columns"), message: byId("message"),
};
const RESULTS = 24;
const TYPING_DELAY_MS = 200;
const UNREACHABLE = "The server cannot be reached. Is mmrl serve still running?";

let info = null; // the answer of /api/index
let queryImage = null; // {file, url} or {row, url}; null for a text query
let controller = null; // AbortController of the latest request
let apiKey = sessionStorage.getItem("mmrl-api-key"); // null until the user has given it
const thumbnails = new Map(); // path -> blob URL, only with an API key: an <img> cannot send it

// Requests --------------------------------------------------------------------------------------------------

const selectedDim = () => info.dims[page.dim.value];

async function request(path, init = {}) {
  const headers = { ...init.headers, ...(apiKey && { Authorization: `Bearer ${apiKey}` }) };
  const response = await fetch(path, { ...init, headers });
  if (response.status === 401) {
    [byId("key").hidden, byId("search").hidden] = [false, true];
    byId("key").querySelector("input").focus();
    throw new Error(apiKey ? "The server does not accept this API key." : "This server needs its API key.");
  }
  return response;
}

async function showThumbnail(img, result) {
  const path = result.thumbnail.slice(1);
  if (apiKey && !thumbnails.has(path)) {
    const response = await request(path);
    thumbnails.set(path, URL.createObjectURL(await response.blob()));
  }
  img.src = thumbnails.get(path) ?? path;
}

async function fetchResults(dim, signal) {
  const options = { dim, k: RESULTS, ...(page.group.value && { group: page.group.value }) };
  let path, init;
  if (queryImage?.file) {
    const form = new FormData();
    form.append("picture", queryImage.file);
    for (const [name, value] of Object.entries(options)) form.append(name, value);
    [path, init] = ["image", { body: form }];
  } else {
    const query = queryImage ? { row: queryImage.row } : { text: page.text.value.trim() };
    path = queryImage ? "item" : "text";
    init = { headers: { "Content-Type": "application/json" }, body: JSON.stringify({ ...query, ...options }) };
  }
  const response = await request(`api/search/${path}`, { method: "POST", ...init, signal });
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.detail ?? `The server returned status ${response.status}.`);
  return body;
}

async function search() {
  controller?.abort();
  showDim();
  if (!queryImage && !page.text.value.trim()) return showStart();
  byId("examples").hidden = true;
  const current = (controller = new AbortController());
  page.columns.classList.add("busy");
  try {
    const truncated = await fetchResults(selectedDim(), current.signal);
    const compare = page.compare.checked && selectedDim() < info.dim;
    const full = compare ? await fetchResults(info.dim, current.signal) : null;
    showResults(truncated, full);
    showMessage("");
    if (!truncated.results.length) showMessage("No image was found.");
  } catch (error) {
    if (error.name === "AbortError") return;
    page.columns.replaceChildren();
    showMessage(error instanceof TypeError ? UNREACHABLE : error.message, true);
  }
  if (current === controller) page.columns.classList.remove("busy");
}

// Rendering -------------------------------------------------------------------------------------------------

function showResults(truncated, full) {
  byId("search-time").textContent = `${truncated.milliseconds.search.toFixed(1)} ms`;
  byId("encode-time").textContent = `${truncated.milliseconds.encode.toFixed(0)} ms`;
  page.columns.classList.toggle("two", full !== null);
  if (full === null) return page.columns.replaceChildren(grid(truncated.results));
  const rows = (response) => new Set(response.results.map((result) => result.row));
  const [fullRows, truncatedRows] = [rows(full), rows(truncated)];
  const shared = truncated.results.filter((result) => fullRows.has(result.row)).length;
  page.columns.replaceChildren(
    column(full, `${full.dim} dims (full)`, "", truncatedRows),
    column(truncated, `${truncated.dim} dims`, `${shared} of ${truncated.results.length} results in common`, fullRows),
  );
}

function column(response, title, note, otherRows) {
  const section = document.createElement("section");
  const heading = document.createElement("h2");
  const small = document.createElement("small");
  const time = `${response.milliseconds.search.toFixed(1)} ms`;
  small.textContent = [bytes(response.bytes_per_vector), time, note].filter(Boolean).join(" · ");
  heading.append(title, small);
  section.append(heading, grid(response.results, otherRows));
  return section;
}

function grid(results, otherRows) {
  const box = document.createElement("div");
  box.className = "grid";
  box.append(...results.map((result) => card(result, otherRows)));
  return box;
}

function card(result, otherRows) {
  const figure = byId("card").content.cloneNode(true).firstElementChild;
  const find = (selector) => figure.querySelector(selector);
  const caption = result.captions[0] ?? result.key;
  figure.dataset.row = result.row;
  figure.classList.toggle("unshared", otherRows !== undefined && !otherRows.has(result.row));
  find("button").hidden = !result.thumbnail; // a text has none
  if (result.thumbnail) showThumbnail(find("img"), result);
  find("img").alt = caption;
  find(".line").hidden = result.rank === undefined;
  if (result.rank !== undefined) {
    find(".rank").textContent = result.rank;
    find(".score").textContent = result.score.toFixed(3);
    find(".bar i").style.width = `${Math.max(0, Math.min(1, result.score)) * 100}%`;
  }
  find(".caption").textContent = caption;
  find(".caption").title = [...result.captions, result.key, result.group_name].filter(Boolean).join("\n");
  find("button").addEventListener("click", () => setQueryImage({ row: result.row, url: find("img").src }));
  return figure;
}

const bytes = (count) => `${count.toLocaleString("en")} B`;

function showMessage(text, isError = false) {
  page.message.textContent = text;
  page.message.classList.toggle("bad", isError);
  page.message.hidden = !text;
}

function showDim() {
  const untrained = info.nested_dims.includes(selectedDim()) ? "" : " (not trained)";
  const text = `${selectedDim()} of ${info.dim}${untrained}`;
  byId("dim-shown").textContent = text;
  page.dim.setAttribute("aria-valuetext", text);
  byId("bytes").textContent = bytes(4 * selectedDim());
}

async function showStart() {
  page.columns.classList.remove("busy", "two");
  page.columns.replaceChildren();
  for (const id of ["search-time", "encode-time"]) byId(id).textContent = "–";
  byId("examples").hidden = !info.examples.length;
  showMessage("");
  const current = (controller = new AbortController());
  const group = page.group.value ? `&group=${encodeURIComponent(page.group.value)}` : "";
  const url = `api/sample?k=${RESULTS}${group}`;
  const sample = await request(url, { signal: current.signal }).then((response) => response.json(), () => []);
  if (current !== controller || !sample.length) return;
  const own = info.queries.includes("image") ? ", or drop your own image here" : "";
  const textContent = `A sample of the index. Click one to find similar ones${own}.`;
  const hint = Object.assign(document.createElement("p"), { className: "hint", textContent });
  const section = document.createElement("section");
  section.append(hint, grid(sample));
  page.columns.replaceChildren(section);
}

// Events ----------------------------------------------------------------------------------------------------

function setQueryImage(next) {
  if (queryImage?.file) URL.revokeObjectURL(queryImage.url);
  queryImage = next;
  byId("query-image").hidden = !next;
  if (next) {
    page.text.value = "";
    byId("query-image").querySelector("img").src = next.url;
    scrollTo({ top: 0, behavior: "smooth" });
  }
  page.text.placeholder = next ? "or describe an image" : "Describe an image";
  search();
}

function useFile(file) {
  if (!file || !info.queries.includes("image")) return;
  if (file.size > info.most_upload) {
    const [size, limit] = [(file.size / 2 ** 20).toFixed(1), info.most_upload / 2 ** 20];
    return showMessage(`${file.name} has ${size} MB; the limit is ${limit} MB.`, true);
  }
  setQueryImage({ file, url: URL.createObjectURL(file) });
}

let typingTimer;
page.text.addEventListener("input", () => {
  if (queryImage) {
    const typed = page.text.value;
    setQueryImage(null);
    page.text.value = typed;
  }
  clearTimeout(typingTimer);
  typingTimer = setTimeout(search, TYPING_DELAY_MS);
});
byId("search").addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(typingTimer);
  search();
});
byId("choose").addEventListener("click", () => page.file.click());
page.file.addEventListener("change", () => {
  useFile(page.file.files[0]);
  page.file.value = "";
});
byId("query-image").querySelector("button").addEventListener("click", () => setQueryImage(null));
for (const control of [page.dim, page.group, page.compare]) control.addEventListener("input", search);

byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("mmrl-api-key", byId("key").querySelector("input").value);
  location.reload();
});

const drop = byId("drop");
addEventListener("dragenter", (event) => {
  if (event.dataTransfer?.types.includes("Files") && info?.queries.includes("image")) drop.hidden = false;
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) drop.hidden = true;
});
addEventListener("drop", (event) => {
  event.preventDefault();
  drop.hidden = true;
  useFile(event.dataTransfer?.files[0]);
});
addEventListener("paste", (event) => {
  useFile([...(event.clipboardData?.files ?? [])].find((file) => file.type.startsWith("image/")));
});

// Startup ---------------------------------------------------------------------------------------------------

async function start() {
  try {
    info = await (await request("api/index")).json();
  } catch (error) {
    return showMessage(error instanceof TypeError ? UNREACHABLE : error.message, apiKey !== null);
  }
  const codes = info.codes ? ` · ${info.codes} codes` : "";
  byId("about").textContent = `${info.count.toLocaleString("en")} ${info.items} · ${info.dim}-d${codes}`;
  byId("full-dim").textContent = info.dim;
  byId("choose").hidden = !info.queries.includes("image");
  page.text.hidden = !info.queries.includes("text");
  page.dim.max = info.dims.length - 1;
  page.dim.value = info.dims.length - 1;
  const element = (tag, properties) => Object.assign(document.createElement(tag), properties);
  byId("ticks").replaceChildren(...info.dims.map((dim) => element("span", { textContent: dim })));
  const label = (group) => `${group.name} (${group.count.toLocaleString("en")})`;
  page.group.append(...info.groups.map((group) => element("option", { value: group.name, textContent: label(group) })));
  // If every group has a single image, there is nothing to choose.
  byId("group-control").hidden = info.groups.length < 2 || info.groups[0].count < 2;
  byId("examples").replaceChildren(...info.examples.map((text) => {
    const button = element("button", { type: "button", textContent: text });
    button.addEventListener("click", () => {
      page.text.value = text;
      search();
    });
    return button;
  }));
  showDim();
  search();
}

start();
