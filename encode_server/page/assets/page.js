// The page: asks for the status every two seconds, and shows it in the view that is chosen.

import { el, span } from "./dom.js";
import { showFleet } from "./fleet.js";
import { showOnCall, showSilence } from "./oncall.js";
import { startPlayground } from "./playground.js";

const PERIOD_MS = 2000;
const KEY = "encode-server-key";
const get = (id) => document.getElementById(id);

let last = null; // the last status, and when it came
let failures = 0;
let playing = false;

export function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask() {
  let answer;
  try {
    answer = await fetch("/status", { headers: headers(), cache: "no-store", signal: AbortSignal.timeout(8000) });
  } catch {
    failures += 1;
    if (failures >= 2 && last) showSilence(get("oncall"), last, failures);
    else if (failures >= 2) get("model").textContent = "the server does not answer";
    return;
  }
  failures = 0;
  if (answer.status === 401) return askForKey();
  if (!answer.ok) return;
  get("key-form").hidden = true;
  const status = await answer.json();
  status.received = Date.now() / 1000;
  last = status;
  render(status);
}

function render(status) {
  get("version").textContent = `${status.version}, up for ${span(status.now - status.started_at)}`;
  if (status.encoders) {
    get("product").textContent = "encode-server route";
    get("model").textContent = status.engine_url ? `before ${status.engine_url}` : "between prefill servers and encoders";
    get("docs").hidden = true;
    get("oncall").hidden = false;
    showFleet(get("oncall"), status);
  } else {
    const parts = [status.model, status.dtype, status.device].filter(Boolean);
    get("model").textContent = parts.join(" · ");
    get("model").title = get("model").textContent;
    get("tabs").hidden = false;
    choose();
    showOnCall(get("oncall"), status);
    if (playing) startPlayground(get("playground"), status, headers);
  }
  document.title = `${status.verdict.level === "well" ? "" : status.verdict.level + " – "}${get("product").textContent}`;
}

function choose() {
  const name = location.hash === "#playground" ? "playground" : "oncall";
  playing = name === "playground";
  for (const view of ["oncall", "playground"]) {
    get(view).hidden = view !== name;
    const tab = get(`tab-${view}`);
    tab.setAttribute("aria-selected", String(view === name));
    tab.tabIndex = view === name ? 0 : -1;
  }
}

function askForKey() {
  const form = get("key-form");
  get("key-wrong").hidden = !sessionStorage.getItem(KEY);
  sessionStorage.removeItem(KEY);
  if (!form.hidden) return;
  form.hidden = false;
  for (const id of ["oncall", "playground", "tabs"]) get(id).hidden = true;
  get("key").focus();
}

get("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, get("key").value.trim());
  get("key").value = "";
  ask();
});
// A link would go without the key.
get("raw").addEventListener("click", async (event) => {
  if (!sessionStorage.getItem(KEY)) return;
  event.preventDefault();
  const text = JSON.stringify(last, null, 1);
  const link = el("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: "status.json" });
  link.click();
  URL.revokeObjectURL(link.href);
});
const tabs = ["oncall", "playground"];
for (const view of tabs) {
  get(`tab-${view}`).addEventListener("click", () => { location.hash = view; });
  get(`tab-${view}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tabs[1 - tabs.indexOf(view)];
    location.hash = other;
    get(`tab-${other}`).focus();
  });
}
addEventListener("hashchange", () => { if (last) render(last); });
document.addEventListener("visibilitychange", () => { if (!document.hidden) ask(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (last) render(last); });

async function run() {
  for (;;) {
    // A hidden page asks nothing. A page that has a form open for a key waits for it.
    if (!document.hidden && get("key-form").hidden) await ask().catch((error) => console.error(error));
    await new Promise((done) => setTimeout(done, PERIOD_MS));
  }
}
run();
