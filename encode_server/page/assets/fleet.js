// The proxy's table of encoders.

import { TimelineCards } from "./charts.js";
import { clock, count, el, show, span } from "./dom.js";

let parts = null;

export function showFleet(root, status) {
  if (!parts) {
    parts = { verdict: el("div", { class: "card verdict", role: "status", "aria-live": "polite" }), timeline: new TimelineCards(), encoders: el("div"), failures: el("div") };
    root.replaceChildren(parts.verdict, el("div", { class: "grid" }, ...parts.timeline.nodes,
      el("section", { class: "card span-12" }, el("h2", {}, "Encoders"), parts.encoders),
      el("section", { class: "card span-12" }, el("h2", {}, "Last failures"), parts.failures)));
  }
  const { verdict, encoders } = status;
  const well = encoders.filter((one) => one.healthy).length;
  parts.verdict.className = `card verdict ${verdict.level === "well" ? "" : verdict.level === "impaired" ? "warn" : "bad-level"}`;
  const figure = (value, label) => el("div", { class: "figure" }, el("div", { class: "value" }, value), el("div", { class: "label" }, label));
  const since = span(status.now - verdict.since);
  const inFlight = encoders.reduce((sum, one) => sum + one.in_flight, 0);
  show(parts.verdict, [verdict, since, well, inFlight, status.requests_in_progress], () => [
    el("div", {}, el("div", { class: "word" }, verdict.level.charAt(0).toUpperCase() + verdict.level.slice(1), el("small", {}, `for ${since}`)),
      el("p", { class: "why" }, verdict.reason)),
    el("div", { class: "figures" }, figure(`${well} of ${encoders.length}`, "encoders well"), figure(count(inFlight), "items in flight"),
      figure(count(status.requests_in_progress), "requests in progress"))]);
  parts.timeline.show(status.timeline);
  show(parts.encoders, [encoders, Math.floor(status.now / 10)], () => {
    if (!encoders.length) return el("p", { class: "empty" }, "No encoder is known. Encoders are listed, found by DNS, or register themselves.");
    const longest = Math.max(1, ...encoders.map((one) => one.backlog_s));
    return el("table", { class: "cards" }, el("thead", {}, el("tr", {}, ["Encoder", "State", "Known by", "In flight", "Backlog", "Failures"].map((name) => el("th", {}, name)))),
      el("tbody", {}, encoders.map((one) => el("tr", {}, el("td", { class: "mono wrap" }, one.url),
        el("td", {}, el("span", { class: `pill ${one.healthy ? (one.busy_s > 0 ? "warn" : "good") : "bad"}` }, one.healthy ? (one.busy_s > 0 ? `busy for ${span(one.busy_s)}` : "well") : "sick")),
        el("td", { class: "soft" }, one.source), el("td", {}, `${count(one.in_flight)} items`),
        el("td", {}, `${one.backlog_s.toFixed(2)} s`), el("td", {}, one.failures ? `${count(one.failures)} failed` : el("span", { class: "faint" }, "no failures"))))));
  });
  show(parts.failures, status.failures, () => status.failures.length ? el("table", { class: "cards" },
    el("thead", {}, el("tr", {}, ["At", "Status", "Request"].map((name) => el("th", {}, name)))),
    el("tbody", {}, status.failures.map((one) => el("tr", {}, el("td", { class: "nowrap soft" }, clock(one.at)),
      el("td", {}, el("span", { class: "pill bad" }, one.status ? String(one.status) : "gone")),
      el("td", { class: "wrap whole" }, `${one.method} ${one.path}`, el("div", { class: "faint mono" }, `${one.ms.toFixed(0)} ms · ${one.request_id}`)))))) : el("p", { class: "empty" }, "None."));
}
