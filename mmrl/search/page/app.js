"use strict";

const at = (id) => document.getElementById(id);
const page = {
  text: at("text"), file: at("file"), dim: at("dim"), group: at("group"), compare: at("compare"),
  columns: at("columns"), message: at("message"),
};
const SHOWN = 24;
const WAIT_WHILE_TYPING = 200; // milliseconds

let facts = null; // what /api/index tells
let picture = null; // the query where it is no text: {file, shown} or {row, shown}
let newest = null; // AbortController of the search under way

// What is asked ---------------------------------------------------------------------------------------------

const dimNow = () => facts.dims[page.dim.value];

async function ask(dim, signal) {
  const common = { dim, k: SHOWN, ...(page.group.value && { group: page.group.value }) };
  let request;
  if (picture?.file) {
    const form = new FormData();
    form.append("picture", picture.file);
    for (const [name, value] of Object.entries(common)) form.append(name, value);
    request = ["api/search/image", { method: "POST", body: form }];
  } else {
    const [path, query] = picture ? ["item", { row: picture.row }] : ["text", { text: page.text.value.trim() }];
    request = [`api/search/${path}`, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ ...query, ...common }),
    }];
  }
  const answer = await fetch(request[0], { ...request[1], signal });
  const said = await answer.json().catch(() => ({ detail: `The server answered ${answer.status}.` }));
  if (!answer.ok) throw new Error(said.detail ?? `The server answered ${answer.status}.`);
  return said;
}

async function search() {
  newest?.abort();
  showControls();
  if (!picture && !page.text.value.trim()) return showStart();
  at("examples").hidden = true;
  const mine = (newest = new AbortController());
  page.columns.classList.add("busy");
  try {
    const answer = await ask(dimNow(), mine.signal);
    const whole = page.compare.checked && dimNow() < facts.dim ? await ask(facts.dim, mine.signal) : null;
    show(answer, whole);
    say("");
  } catch (error) {
    if (error.name === "AbortError") return;
    page.columns.replaceChildren();
    say(error instanceof TypeError ? "The server cannot be reached; is mmrl serve still running?" : error.message, true);
  }
  if (mine === newest) page.columns.classList.remove("busy");
}

// What is shown ---------------------------------------------------------------------------------------------

function show(answer, whole) {
  at("search-time").textContent = `${answer.milliseconds.search.toFixed(1)} ms`;
  at("encode-time").textContent = `${answer.milliseconds.encode.toFixed(0)} ms`;
  page.columns.classList.toggle("two", whole !== null);
  if (whole === null) {
    page.columns.replaceChildren(grid(answer.results));
    if (!answer.results.length) say("No picture was found.");
    return;
  }
  const rows = (one) => new Set(one.results.map((result) => result.row));
  const [inWhole, inPrefix] = [rows(whole), rows(answer)];
  const same = answer.results.filter((result) => inWhole.has(result.row)).length;
  page.columns.replaceChildren(
    column(whole, `all ${whole.dim} numbers`, "", inPrefix),
    column(answer, `the first ${answer.dim}`, `${same} of ${answer.results.length} are the same`, inWhole),
  );
}

function column(answer, title, note, other) {
  const section = document.createElement("section");
  const head = document.createElement("h2");
  const small = document.createElement("small");
  small.textContent = [bytes(answer.bytes_per_vector), `${answer.milliseconds.search.toFixed(1)} ms`, note].filter(Boolean).join(" · ");
  head.append(title, small);
  section.append(head, grid(answer.results, other));
  return section;
}

function grid(results, other) {
  const box = document.createElement("div");
  box.className = "grid";
  box.append(...results.map((result) => card(result, other)));
  return box;
}

function card(result, other) {
  const figure = at("card").content.cloneNode(true).firstElementChild;
  const find = (selector) => figure.querySelector(selector);
  const caption = result.captions[0] ?? result.key;
  figure.dataset.row = result.row;
  figure.classList.toggle("alone", other !== undefined && !other.has(result.row));
  find("img").src = result.thumbnail.slice(1);
  find("img").alt = caption;
  find(".line").hidden = result.rank === undefined;
  if (result.rank !== undefined) {
    find(".rank").textContent = result.rank;
    find(".score").textContent = result.score.toFixed(3);
    find(".bar i").style.width = `${Math.max(0, Math.min(1, result.score)) * 100}%`;
  }
  find(".caption").textContent = caption;
  find(".caption").title = [...result.captions, result.key, result.group_name].filter(Boolean).join("\n");
  find("button").addEventListener("click", () => setPicture({ row: result.row, shown: find("img").src }));
  return figure;
}

const bytes = (count) => `${count.toLocaleString("en")} B`;

function say(text, bad = false) {
  page.message.textContent = text;
  page.message.classList.toggle("bad", bad);
  page.message.hidden = !text;
}

function showControls() {
  at("dim-shown").textContent = `${dimNow()} of ${facts.dim}`;
  page.dim.setAttribute("aria-valuetext", `${dimNow()} of ${facts.dim}`);
  at("bytes").textContent = bytes(4 * dimNow());
}

async function showStart() {
  page.columns.classList.remove("busy", "two");
  page.columns.replaceChildren();
  for (const id of ["search-time", "encode-time"]) at(id).textContent = "–";
  at("examples").hidden = !facts.examples.length;
  say("");
  const mine = (newest = new AbortController());
  const group = page.group.value ? `&group=${encodeURIComponent(page.group.value)}` : "";
  const some = await fetch(`api/sample?k=${SHOWN}${group}`, { signal: mine.signal }).then((answer) => answer.json(), () => []);
  if (mine !== newest || !some.length) return;
  const hint = Object.assign(document.createElement("p"), { className: "hint", textContent: "Some of the pictures. Choose one to find its like, or drop one of your own here." });
  const section = document.createElement("section");
  section.append(hint, grid(some));
  page.columns.replaceChildren(section);
}

// What is touched -------------------------------------------------------------------------------------------

function setPicture(next) {
  if (picture?.file) URL.revokeObjectURL(picture.shown);
  picture = next;
  at("query-picture").hidden = !next;
  if (next) {
    page.text.value = "";
    at("query-picture").querySelector("img").src = next.shown;
    scrollTo({ top: 0, behavior: "smooth" });
  }
  page.text.placeholder = next ? "or describe one" : "Describe a picture";
  search();
}

function take(file) {
  if (!file) return;
  if (file.size > facts.most_upload) {
    return say(`${file.name} has ${(file.size / 2 ** 20).toFixed(1)} MB; at most ${facts.most_upload / 2 ** 20} are taken.`, true);
  }
  setPicture({ file, shown: URL.createObjectURL(file) });
}

let typing;
page.text.addEventListener("input", () => {
  if (picture) {
    const typed = page.text.value;
    setPicture(null);
    page.text.value = typed;
  }
  clearTimeout(typing);
  typing = setTimeout(search, WAIT_WHILE_TYPING);
});
at("search").addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(typing);
  search();
});
at("choose").addEventListener("click", () => page.file.click());
page.file.addEventListener("change", () => {
  take(page.file.files[0]);
  page.file.value = "";
});
at("query-picture").querySelector("button").addEventListener("click", () => setPicture(null));
for (const control of [page.dim, page.group, page.compare]) control.addEventListener("input", search);

const drop = at("drop");
addEventListener("dragenter", (event) => {
  if (event.dataTransfer?.types.includes("Files")) drop.hidden = false;
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) drop.hidden = true;
});
addEventListener("drop", (event) => {
  event.preventDefault();
  drop.hidden = true;
  take(event.dataTransfer?.files[0]);
});
addEventListener("paste", (event) => take([...(event.clipboardData?.files ?? [])].find((file) => file.type.startsWith("image/"))));

// The start -------------------------------------------------------------------------------------------------

async function start() {
  try {
    facts = await (await fetch("api/index")).json();
  } catch {
    return say("The server cannot be reached; is mmrl serve still running?", true);
  }
  const codes = facts.codes ? ` · ${facts.codes} codes` : "";
  at("about").textContent = `${facts.count.toLocaleString("en")} pictures · ${facts.dim}-d${codes}`;
  at("widest").textContent = facts.dim;
  page.dim.max = facts.dims.length - 1;
  page.dim.value = facts.dims.length - 1;
  at("ticks").replaceChildren(...facts.dims.map((dim) => Object.assign(document.createElement("span"), { textContent: dim })));
  const named = (group) => Object.assign(document.createElement("option"), { value: group.name, textContent: `${group.name} (${group.count.toLocaleString("en")})` });
  page.group.append(...facts.groups.map(named));
  // Where each picture is a group of its own, nobody wants to choose one.
  at("group-control").hidden = facts.groups.length < 2 || facts.groups[0].count < 2;
  at("examples").replaceChildren(...facts.examples.map((text) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    button.addEventListener("click", () => {
      page.text.value = text;
      search();
    });
    return button;
  }));
  showControls();
  search();
}

start();
