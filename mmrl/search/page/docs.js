"use strict";
// /openapi.json as a page. FastAPI's own would be fetched from elsewhere, and this works without a network.

const make = (tag, text, ...children) => {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  element.append(...children);
  return element;
};

let spec;
const resolve = (schema) => (schema?.$ref ? schema.$ref.split("/").slice(1).reduce((part, name) => part[name], spec) : schema ?? {});

function kind(schema) {
  if (schema?.$ref) return schema.$ref.split("/").pop();
  if (schema?.anyOf) return schema.anyOf.map(kind).filter((one) => one !== "null").join(" or ");
  if (schema?.type === "array") return `list of ${kind(schema.items)}`;
  return schema?.contentMediaType || schema?.format === "binary" ? "file" : schema?.type ?? "any";
}

function limits(schema) {
  const inner = [schema, ...(schema.anyOf ?? [])];
  const found = (name) => inner.map((one) => one[name]).find((value) => value !== undefined);
  const parts = [
    [found("minimum"), (n) => `at least ${n}`], [found("maximum"), (n) => `at most ${n}`],
    [found("maxLength"), (n) => `at most ${n.toLocaleString("en")} letters`],
    [found("default"), (value) => (value === null ? "" : `${JSON.stringify(value)} by default`)],
  ];
  return parts.filter(([value]) => value !== undefined).map(([value, words]) => words(value)).filter(Boolean).join(", ");
}

function table(schema) {
  const rows = Object.entries(schema.properties ?? {}).map(([name, field]) => {
    const told = [resolve(field).description ?? field.description, limits(field)].filter(Boolean).join("; ");
    const optional = schema.required && !schema.required.includes(name) ? ", optional" : "";
    return make("tr", "", make("td", "", make("code", name)), make("td", kind(field) + optional), make("td", told));
  });
  return make("table", "", ...rows);
}

function example(path, method, content) {
  const address = location.origin + path.replace(/\{.*?\}/, "0");
  if (method === "get") return `curl ${address}`;
  const [type, body] = Object.entries(content)[0];
  if (type.startsWith("multipart")) return `curl ${address} -F picture=@photo.jpg -F dim=64 -F k=5`;
  const fields = resolve(body.schema).properties;
  const query = fields.text ? { text: "red running shoes", dim: 64, k: 5 } : { row: 0, k: 5 };
  return `curl ${address} -H 'Content-Type: application/json' \\\n     -d '${JSON.stringify(query)}'`;
}

function article(path, method, operation) {
  const box = make("article", "", make("h2", "", make("span", method.toUpperCase()), make("code", path)));
  box.querySelector("span").className = "method";
  box.append(make("p", operation.description ?? operation.summary));
  const content = operation.requestBody?.content ?? {};
  const asked = resolve(Object.values(content)[0]?.schema);
  const parameters = Object.fromEntries((operation.parameters ?? []).map((one) => [one.name, one.schema]));
  if (asked.properties) box.append(make("h3", `Body, ${Object.keys(content)[0]}`), table(asked));
  if (Object.keys(parameters).length) box.append(make("h3", "Parameters"), table({ properties: parameters }));
  const answer = operation.responses["200"]?.content?.["application/json"]?.schema;
  const answered = resolve(answer?.type === "array" ? answer.items : answer);
  if (answered.properties) box.append(make("h3", `Answer, ${kind(answer)}`), table(answered));
  box.append(make("h3", "Such as"), make("pre", example(path, method, content)));
  return box;
}

async function start() {
  spec = await (await fetch("openapi.json")).json();
  const docs = document.getElementById("docs");
  docs.append(make("h1", spec.info.title), make("p", `${spec.info.description} A mistake is answered with a 4xx and {"detail": one sentence}.`));
  for (const [path, operations] of Object.entries(spec.paths)) {
    for (const [method, operation] of Object.entries(operations)) docs.append(article(path, method, operation));
  }
  const named = ["Answer", "Result", "Milliseconds", "GroupCount"].filter((name) => spec.components.schemas[name]);
  for (const name of named) docs.append(make("article", "", make("h2", "", make("code", name)), table(spec.components.schemas[name])));
}

start();
