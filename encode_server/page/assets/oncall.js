// What a person on call looks at first.

import { TimelineCards } from "./charts.js";
import { bytes, clock, count, el, ms, show, sized, span, swatch } from "./dom.js";

const WORDS = { well: "Well", full: "Full", impaired: "Impaired", starting: "Starting", leaving: "Leaving", down: "Down" };
const CLASS = { well: "", full: "bad-level", impaired: "warn", starting: "warn", leaving: "warn", down: "bad-level" };
const STAGES = ["fetch", "preprocess", "copy", "queue", "forward", "deliver"];
const CLIENT = "requests of one client";
let parts = null;

function build(root) {
  parts = {
    verdict: el("div", { class: "card verdict", role: "status", "aria-live": "polite" }),
    timeline: new TimelineCards(),
    levels: el("div", { class: "levels" }), rows: new Map(),
    stages: el("div"), processes: el("div"), failures: el("div"), slowest: el("div"), destinations: el("div"),
    destinationsCard: null,
  };
  const card = (width, title, soft, body) => el("section", { class: `card ${width}` },
    el("div", { class: "head" }, el("h2", {}, title, soft ? el("span", { class: "soft" }, soft) : null)), body);
  parts.destinationsCard = card("span-12", "Destinations that fail", "", parts.destinations);
  root.replaceChildren(parts.verdict, el("div", { class: "grid" },
    ...parts.timeline.nodes,
    card("span-7", "Bounds", "what is used of each", parts.levels),
    card("span-5", "Where the time goes", "15 minutes, from half to 99 %", parts.stages),
    card("span-12", "Processes", "", parts.processes),
    parts.destinationsCard,
    card("span-6", "Slowest requests", "15 minutes", el("div", {}, parts.slowest)),
    card("span-6", "Last failures", "", parts.failures)));
}

export function showOnCall(root, status) {
  if (!parts) build(root);
  showVerdict(status);
  parts.timeline.show(status.timeline);
  showLevels(status.levels);
  showStages(status.stages);
  showProcesses(status);
  showFailures(status.failures);
  showSlowest(status.slowest);
  parts.destinationsCard.hidden = !status.destinations.length;
  showDestinations(status.destinations);
}

// The server does not answer: what is shown is old.
export function showSilence(root, status, failures) {
  if (!parts) return;
  parts.verdict.shown = null;
  parts.verdict.className = "card verdict bad-level";
  parts.verdict.replaceChildren(el("div", {}, el("div", { class: "word" }, "No answer"),
    el("p", { class: "why" }, `The server has not answered for ${span(Date.now() / 1000 - status.received)}. Below is what it said last.`)));
}

function showVerdict(status) {
  const { verdict, timeline, waiting } = status;
  const recent = timeline.ok.slice(-7, -1);
  const rate = recent.length ? recent.reduce((a, b) => a + b, 0) / (recent.length * timeline.step_s) : 0;
  const total = status.stages.find((stage) => stage.stage === "total");
  const figure = (value, unit, label) => el("div", { class: "figure" },
    el("div", { class: "value" }, value, unit ? el("small", {}, unit) : null), el("div", { class: "label" }, label));
  const split = (text) => { const at = text.lastIndexOf(" "); return at < 0 ? [text, ""] : [text.slice(0, at), text.slice(at + 1)]; };
  const p50 = total.count ? split(ms(total.p50)) : ["–", ""];
  const p99 = total.count ? split(ms(total.p99)) : ["–", ""];
  parts.verdict.className = `card verdict ${CLASS[verdict.level] ?? ""}`;
  const since = span(status.now - verdict.since);
  show(parts.verdict, [verdict, since, rate, p50, p99, waiting], () => [
    el("div", {},
      el("div", { class: "word" }, WORDS[verdict.level] ?? verdict.level, el("small", {}, `for ${since}`)),
      el("p", { class: "why" }, verdict.reason ? sentence(verdict.reason) : "")),
    el("div", { class: "figures" },
      figure(rate >= 10 ? rate.toFixed(0) : rate.toFixed(1), "/s", "answered, last minute"),
      figure(...p50, "half within"), figure(...p99, "99 % within"),
      figure(...split(`${waiting.backlog_s.toFixed(waiting.backlog_s >= 10 ? 0 : 1)} s`), "backlog"),
      figure(count(waiting.at_door + waiting.preparations + waiting.items), "", "waiting"))]);
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?…]$/.test(text) ? "" : ".");

function amount(value, unit) {
  if (unit === "bytes") return bytes(value);
  return unit === "s" ? `${value >= 10 ? Math.round(value) : +value.toFixed(1)} s` : count(value);
}

function showLevels(levels) {
  for (const level of levels) {
    let row = parts.rows.get(level.name);
    if (!row) {
      row = { fill: el("div", { class: "fill" }), amount: el("div", { class: "amount" }), note: el("div", { class: "note" }) };
      row.track = el("div", { class: "track", role: "meter", "aria-label": level.name, "aria-valuemin": "0" }, row.fill);
      row.node = el("div", { class: "level" }, el("div", { class: "what", title: level.option }, sentence(level.name).slice(0, -1)), row.track, row.amount, row.note);
      parts.rows.set(level.name, row);
      parts.levels.append(row.node);
    }
    const share = level.limit ? level.used / level.limit : 0;
    sized(row.fill, "width", share);
    row.fill.className = `fill ${share >= 0.85 && !["cache", CLIENT].includes(level.name) ? "high" : ""}`;
    row.node.className = `level ${level.refusing ? "refusing" : ""}`;
    row.track.setAttribute("aria-valuemax", String(level.limit));
    row.track.setAttribute("aria-valuenow", String(Math.min(level.used, level.limit)));
    show(row.amount, [level.used, level.limit], () => level.limit
      ? [el("b", {}, amount(level.used, level.unit)), ` of ${amount(level.limit, level.unit)}`] : ["none"]);
    const spare = level.name === CLIENT && level.used > level.limit;
    row.note.className = `note ${level.refusals || level.refusing || spare ? "shown" : ""}`;
    row.note.textContent = `${level.refusing ? "Refuses now. " : ""}${spare ? "A client may have more while it is alone. " : ""}${level.refusals || !spare ? `${count(level.refusals)} refused since the start, ${level.option}` : ""}`;
  }
}

function showStages(stages) {
  const shown = stages.filter((stage) => stage.count);
  show(parts.stages, shown, () => {
    if (!shown.length) return el("p", { class: "empty" }, "No request has ended in the last 15 minutes.");
    const low = Math.min(...shown.map((stage) => Math.max(0.05, stage.p50)));
    const high = Math.max(...shown.map((stage) => stage.p99), low * 10);
    const place = (value) => Math.log(Math.max(value, low) / low) / Math.log(high / low);
    return el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "Stage"), el("th", {}, ""),
      el("th", { class: "num" }, "half"), el("th", { class: "num" }, "99 %"))),
    el("tbody", {}, shown.map((stage) => {
      const bar = el("i", { class: `s-${stage.stage}` });
      const from = Math.min(0.97, place(stage.p50));
      sized(bar, "left", from);
      sized(bar, "width", place(stage.p99) - from);
      return el("tr", {}, el("td", { class: "nowrap" }, stage.stage), el("td", { class: "grow" }, el("div", { class: "range" }, bar)),
        el("td", { class: "num" }, ms(stage.p50)), el("td", { class: "num" }, ms(stage.p99)));
    })));
  });
}

function showProcesses(status) {
  const minute = Math.floor(status.now / 30);
  show(parts.processes, [status.ranks, status.preparers, minute], () => {
    const rows = [...status.ranks.map((rank) => ["rank", rank]), ...status.preparers.map((one) => ["preparer", one])];
    const devices = status.ranks.some((rank) => rank.memory); // ranks on a CPU have none
    const heads = ["Process", "State", "PID", ...(devices ? ["Device memory"] : []), "Restarts", "Last loss"];
    return el("table", { class: "cards" }, el("thead", {}, el("tr", {}, heads.map((name) => el("th", name === "Last loss" ? { class: "grow" } : {}, name)))),
      el("tbody", {}, rows.map(([kind, one]) => {
        const good = ["ready", "idle", "preparing"].includes(one.state);
        const kindOfPill = good ? "good" : ["dead", "waiting"].includes(one.state) ? "bad" : "warn";
        const losses = one.losses;
        return el("tr", {}, el("td", { class: "nowrap" }, `${kind} ${one.name}`),
          el("td", {}, el("span", { class: `pill ${kindOfPill}` }, one.state)),
          el("td", { class: "soft mono" }, one.pid === null ? "–" : String(one.pid)),
          devices ? el("td", { class: "nowrap", title: one.memory ? `torch holds ${bytes(one.memory.reserved)}, its tensors ${bytes(one.memory.peak)} at most` : "" },
            one.memory ? [bytes(one.memory.used), el("span", { class: "faint" }, ` of ${bytes(one.memory.total)}`)] : el("span", { class: "faint" }, "–")) : null,
          el("td", {}, losses.count ? `${losses.count} ${losses.count === 1 ? "restart" : "restarts"}` : el("span", { class: "faint" }, "no restarts")),
          el("td", { class: "wrap whole" }, losses.count ? [`${losses.reason} `, el("span", { class: "faint" }, `${losses.cause}, ${span(status.now - losses.at)} ago`)] : el("span", { class: "faint" }, "–")));
      })));
  });
}

function showFailures(failures) {
  show(parts.failures, failures, () => failures.length ? el("table", { class: "cards" },
    el("thead", {}, el("tr", {}, ["Last", "Outcome", "Why"].map((name) => el("th", {}, name)))),
    el("tbody", {}, failures.map(({ last: one, count: times, first_at: first }) => el("tr", {},
      el("td", { class: "nowrap soft" }, clock(one.at)),
      el("td", {}, el("span", { class: `pill ${["gone", "bad_request", "bad_media", "unauthorized"].includes(one.outcome) ? "" : "bad"}` }, one.outcome.replaceAll("_", " "))),
      el("td", { class: "wrap whole" }, one.message || "The caller left before the answer.",
        times > 1 ? el("div", { class: "soft" }, `${count(times)} times since ${clock(first)}, last:`) : null, el("div", { class: "faint mono" }, ids(one))))))) : el("p", { class: "empty" }, "None."));
}

function ids(one) {
  const names = [one.req_id, one.request_id === one.req_id ? "" : one.request_id].filter(Boolean);
  return [one.modality === "unknown" ? "" : one.modality, ms(one.ms.total), ...names].filter(Boolean).join(" · ");
}

function showSlowest(slowest) {
  const top = slowest.slice(0, 8);
  show(parts.slowest, top, () => {
    if (!top.length) return el("p", { class: "empty" }, "No request has ended in the last 15 minutes.");
    const longest = top[0].ms.total;
    return [el("table", { class: "cards" }, el("thead", {}, el("tr", {}, el("th", {}, "Took"), el("th", { class: "part" }, "Stages"), el("th", {}, "Request"))),
      el("tbody", {}, top.map((one) => {
        // Stages overlap between the items of a request: their shares are of what they add up to.
        const spent = STAGES.filter((stage) => one.ms[stage] > 0);
        const sum = spent.reduce((total, stage) => total + one.ms[stage], 0) || 1;
        const scale = (one.ms.total / longest) / Math.max(sum, one.ms.total);
        const bars = spent.map((stage) => sized(el("i", { class: `s-${stage}`, title: `${stage} ${ms(one.ms[stage])}` }), "width", one.ms[stage] * scale));
        const said = spent.map((stage) => `${stage} ${ms(one.ms[stage])}`).join(", ");
        return el("tr", {}, el("td", { class: "nowrap" }, ms(one.ms.total)),
          el("td", { class: "part" }, el("div", { class: "stack", role: "img", "aria-label": said, title: said }, bars)),
          el("td", { class: "wrap whole" }, `${one.items} ${one.modality}`, el("span", { class: "soft" }, `, ${count(one.tokens)} tokens, ${clock(one.at)}`),
            el("div", { class: "faint mono" }, [one.req_id, one.request_id === one.req_id ? "" : one.request_id].filter(Boolean).join(" · "))));
      }))), el("div", { class: "timing" }, el("div", { class: "keys" }, STAGES.map((stage) => el("span", {}, swatch(stage), stage))))];
  });
}

function showDestinations(destinations) {
  show(parts.destinations, destinations, () => el("table", { class: "cards" },
    el("thead", {}, el("tr", {}, ["Destination", "Failed", "Delivered", "Last failure"].map((name) => el("th", {}, name)))),
    el("tbody", {}, destinations.map((one) => el("tr", {}, el("td", { class: "mono wrap" }, one.name),
      el("td", {}, el("span", { class: "pill bad" }, `${count(one.failed)} failed`)), el("td", { class: "soft" }, `${count(one.delivered)} delivered`),
      el("td", { class: "wrap whole" }, one.last_failure, el("span", { class: "faint" }, ` at ${clock(one.failed_at)}`)))))));
}
