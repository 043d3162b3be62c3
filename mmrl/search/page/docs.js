"use strict";
// Renders openapi.json. FastAPI's own docs page loads its scripts from a CDN; this one works offline.

const make = (tag, text, ...children) => {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  element.append(...children);
  return element;
};

let spec;
const resolve = (schema) => (schema?.$ref ? schema.$ref.split("/").slice(1).reduce((node, name) => node[name], spec) : schema ?? {});

function typeName(schema) {
  if (schema?.$ref) return schema.$ref.split("/").pop();
  if (schema?.anyOf) return schema.anyOf.map(typeName).filter((name) => name !== "null").join(" or ");
  if (schema?.type === "array") return `array of ${typeName(schema.items)}`;
  return schema?.contentMediaType || schema?.format === "binary" ? "file" : schema?.type ?? "any";
}

function constraints(schema) {
  const schemas = [schema, ...(schema.anyOf ?? [])];
  const find = (name) => schemas.map((one) => one[name]).find((value) => value !== undefined);
  const all = [
    [find("minimum"), (n) => `min ${n}`],
    [find("maximum"), (n) => `max ${n}`],
    [find("minLength"), (n) => `min ${n.toLocaleString("en")} characters`],
    [find("maxLength"), (n) => `max ${n.toLocaleString("en")} characters`],
    [find("default"), (value) => (value === null ? "" : `default ${JSON.stringify(value)}`)],
  ];
  return all.filter(([value]) => value !== undefined).map(([value, format]) => format(value)).filter(Boolean).join(", ");
}

function table(schema) {
  const rows = Object.entries(schema.properties ?? {}).map(([name, field]) => {
    const description = [resolve(field).description ?? field.description, constraints(field)].filter(Boolean).join("; ");
    const optional = schema.required && !schema.required.includes(name) ? ", optional" : "";
    return make("tr", "", make("td", "", make("code", name)), make("td", typeName(field) + optional), make("td", description));
  });
  return make("table", "", ...rows);
}

function example(path, method, content) {
  const url = location.origin + path.replace(/\{.*?\}/, "0");
  if (method === "get") return `curl ${url}`;
  const [type, body] = Object.entries(content)[0];
  if (type.startsWith("multipart")) return `curl ${url} -F picture=@photo.jpg -F dim=64 -F k=5`;
  const fields = resolve(body.schema).properties;
  const text = "red running shoes";
  const query = fields.input ? { input: text, dimensions: 64 } : fields.text ? { text, dim: 64, k: 5 } : { row: 0, k: 5 };
  return `curl ${url} -H 'Content-Type: application/json' \\\n     -d '${JSON.stringify(query)}'`;
}

function article(path, method, operation) {
  const box = make("article", "", make("h2", "", make("span", method.toUpperCase()), make("code", path)));
  box.querySelector("span").className = "method";
  box.append(make("p", operation.description ?? operation.summary));
  const content = operation.requestBody?.content ?? {};
  const body = resolve(Object.values(content)[0]?.schema);
  const parameters = Object.fromEntries((operation.parameters ?? []).map((one) => [one.name, one.schema]));
  if (body.properties) box.append(make("h3", `Request body: ${Object.keys(content)[0]}`), table(body));
  if (Object.keys(parameters).length) box.append(make("h3", "Parameters"), table({ properties: parameters }));
  const response = operation.responses["200"]?.content?.["application/json"]?.schema;
  const item = resolve(response?.type === "array" ? response.items : response);
  if (item.properties) box.append(make("h3", `Response: ${typeName(response)}`), table(item));
  box.append(make("h3", "Example"), make("pre", example(path, method, content)));
  return box;
}

async function start() {
  spec = await (await fetch("openapi.json")).json();
  const docs = document.getElementById("docs");
  const errors = 'Errors have a 4xx or 5xx status and the body {"detail": "one sentence"}, on /v1 {"error": {"message": …}}.';
  docs.append(make("h1", spec.info.title), make("p", `${spec.info.description} ${errors}`));
  for (const [path, operations] of Object.entries(spec.paths)) {
    for (const [method, operation] of Object.entries(operations)) docs.append(article(path, method, operation));
  }
  const names = ["SearchResponse", "Result", "Embedding", "Milliseconds", "GroupCount"];
  for (const name of names.filter((name) => spec.components.schemas[name])) {
    docs.append(make("article", "", make("h2", "", make("code", name)), table(spec.components.schemas[name])));
  }
}

start();
