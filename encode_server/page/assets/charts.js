// Two lines over a quarter of an hour.

import { color, el } from "./dom.js";

const HEIGHT = 170;

// `series`: [{label, color (a CSS variable), fill}]. Draws again when the theme or the width changes.
export class Chart {
  constructor(node, series, format, least = 1) {
    this.least = least; // of the vertical scale
    this.node = node;
    this.series = series;
    this.format = format;
    this.plot = null;
    new ResizeObserver(() => {
      if (this.plot && node.clientWidth) this.plot.setSize({ width: node.clientWidth, height: HEIGHT });
    }).observe(node);
  }

  // `range`: from and to, Unix time.
  show(xs, columns, range) {
    this.range = range;
    const theme = color("--ground");
    if (!this.node.clientWidth) return;
    if (this.plot && this.theme === theme) return this.plot.setData([xs, ...columns]);
    this.plot?.destroy();
    this.theme = theme;
    const axis = { stroke: color("--faint"), font: "11px system-ui, sans-serif", ticks: { show: false } };
    const grid = { stroke: color("--line"), width: 1 };
    this.plot = new uPlot({
      width: this.node.clientWidth, height: HEIGHT,
      padding: [8, 8, 0, 0],
      legend: { show: false },
      cursor: { y: false, points: { size: 6 }, drag: { x: false, y: false } },
      scales: { x: { range: () => this.range }, y: { range: (_, low, high) => [0, Math.max(this.least, (high ?? 0) * 1.15)] } },
      axes: [
        { ...axis, grid: { show: false }, size: 28, space: 70, values: (_, ticks) => ticks.map((at) =>
          new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false })) },
        { ...axis, grid, size: 58, space: 36, values: (_, ticks) => ticks.map((value) => this.format(value)) },
      ],
      series: [{}, ...this.series.map((one) => ({
        label: one.label, stroke: color(one.color), width: 1.75, points: { show: false },
        fill: one.fill ? color(one.color) + "22" : undefined, spanGaps: false,
      }))],
    }, [xs, ...columns], this.node);
  }
}

const duration = (value) => (value >= 1000 ? `${+(value / 1000).toFixed(2)} s` : `${Math.round(value)} ms`);

// The two cards that show a timeline: requests and latency.
export class TimelineCards {
  constructor() {
    const requests = el("div", { class: "chart" });
    const latency = el("div", { class: "chart" });
    const legend = (...entries) => el("span", { class: "legend" }, entries.map(([name, css]) =>
      el("span", {}, el("span", { class: `swatch ${css}` }), name)));
    const card = (title, soft, body, keys) => el("section", { class: "card span-6" },
      el("div", { class: "head" }, el("h2", {}, title, el("span", { class: "soft" }, soft)), keys), body);
    this.nodes = [
      card("Requests", "a second, 15 minutes", requests, legend(["answered", "s-preprocess"], ["failed", "s-failed"])),
      card("Latency", "of a whole request", latency, legend(["half within", "s-preprocess"], ["99 % within", "s-deliver"]))];
    this.requests = new Chart(requests, [{ label: "answered", color: "--preprocess", fill: true }, { label: "failed", color: "--bad" }], (v) => `${+v.toFixed(2)}`);
    this.latency = new Chart(latency, [{ label: "p50", color: "--preprocess" }, { label: "p99", color: "--deliver" }], duration, 10);
  }

  show(timeline) {
    const length = timeline.ok.length;
    const xs = timeline.ok.map((_, index) => timeline.end - (length - index - 0.5) * timeline.step_s);
    const range = [timeline.end - 900, timeline.end];
    const full = Math.max(1, length - 1); // the last slot still fills
    const cut = (values) => values.slice(0, full);
    this.requests.show(cut(xs), [cut(timeline.ok).map((n) => n / timeline.step_s), cut(timeline.failed).map((n) => n / timeline.step_s)], range);
    this.latency.show(cut(xs), [cut(timeline.p50), cut(timeline.p99)], range);
  }
}
