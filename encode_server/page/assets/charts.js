// Two lines over a quarter of an hour.

import { color } from "./dom.js";

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
