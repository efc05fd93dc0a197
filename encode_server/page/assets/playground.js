// Drop media, and see what the encoder sees.

import { ofComponents, ramp } from "./colors.js";
import { bytes, count, el, ms, show, swatch } from "./dom.js";
import { encode, EncodeFailure, layout } from "./embedding.js";
import { exampleAudio, exampleImage, framesOf, imageOf, spectrogramOf } from "./media.js";

const STAGES = ["fetch", "preprocess", "copy", "queue", "forward", "deliver"];
const WHISPER = { tokens: 1500, seconds: 30 }; // a tower that always sees half a minute
let ground = null;

export function startPlayground(root, status, headers) {
  ground ??= new Playground(root, headers);
  ground.take(status.modalities);
}

class Playground {
  constructor(root, headers) {
    this.headers = headers;
    this.slots = new Map(); // by name, A and B
    this.mode = "components";
    this.strength = 0.75;
    this.chosen = null; // {slot, index}
    this.asked = 0;
    this.worker = new Worker("/page/worker.js");
    this.worker.onmessage = ({ data }) => this.received(data);
    this.views = el("div", { class: "views" });
    this.drops = { A: this.drop("A"), B: this.drop("B") };
    this.drops.B.hidden = true;
    this.controls = this.makeControls();
    this.modalities = el("span", {}, "image");
    this.examples = el("span", { class: "bar" });
    root.replaceChildren(
      el("div", { class: "card" }, el("h2", {}, "What the encoder sees", el("span", { class: "soft" }, this.modalities)),
        el("div", { class: "drops" }, this.drops.A, this.drops.B),
        el("div", { class: "bar" }, this.examples)),
      this.controls, this.views);
    addEventListener("dragover", (event) => event.preventDefault());
    addEventListener("drop", (event) => event.preventDefault());
  }

  take(modalities) {
    this.accepts = modalities;
    show(this.modalities, modalities, () => modalities.length ? `this model takes ${modalities.join(", ")}` : "the encoder is loading");
    for (const drop of Object.values(this.drops)) drop.input.accept = modalities.map((one) => `${one}/*`).join(",");
    show(this.examples, modalities, () => [
      modalities.includes("image") ? el("button", { class: "quiet", onclick: async () => this.load("A", await exampleImage()) }, "Example image") : null,
      modalities.includes("audio") ? el("button", { class: "quiet", onclick: () => this.load("A", exampleAudio()) }, "Example audio") : null,
    ].filter(Boolean));
  }

  drop(name) {
    const input = el("input", { type: "file", tabindex: "-1", "aria-hidden": "true" });
    input.hidden = true;
    const caption = el("b", {}, name === "A" ? "Drop an image, a clip or audio" : "Drop an image to compare with");
    const node = el("button", { class: "drop", onclick: () => input.click() }, caption,
      el("span", { class: "soft" }, "or choose a file. It goes to this server only."), input);
    input.addEventListener("click", (event) => event.stopPropagation());
    input.addEventListener("change", () => { if (input.files[0]) this.load(name, input.files[0]); input.value = ""; });
    node.addEventListener("dragover", (event) => { event.preventDefault(); node.classList.add("over"); });
    node.addEventListener("dragleave", () => node.classList.remove("over"));
    node.addEventListener("drop", (event) => {
      event.preventDefault();
      node.classList.remove("over");
      if (event.dataTransfer.files[0]) this.load(name, event.dataTransfer.files[0]);
    });
    return Object.assign(node, { input, caption });
  }

  makeControls() {
    const choice = (value, text) => {
      const radio = el("input", { type: "radio", name: "mode", value, onchange: () => this.choose(value) });
      radio.checked = value === this.mode;
      return el("label", {}, radio, text);
    };
    this.seg = el("div", { class: "seg", role: "radiogroup", "aria-label": "Colours" }, choice("components", "Components"), choice("similar", "Similarity"), choice("plain", "None"));
    const slider = el("input", { type: "range", min: "0.2", max: "1", step: "0.05", value: String(this.strength), "aria-label": "Strength of the colours",
      oninput: (event) => { this.strength = Number(event.target.value); this.draw(); } });
    this.hint = el("span", { class: "soft", "aria-live": "polite" });
    const scale = el("canvas", { class: "scale", width: "120", height: "1", "aria-hidden": "true" });
    const pen = scale.getContext("2d");
    for (let x = 0; x < 120; x += 1) { pen.fillStyle = `rgb(${ramp(x / 119).map(Math.round)})`; pen.fillRect(x, 0, 1, 1); }
    this.scale = el("span", { class: "bar soft" }, "unlike", scale, "alike");
    const node = el("div", { class: "card controls" }, el("div", { class: "bar" }, this.seg, el("label", { class: "bar soft" }, "Strength", slider), this.scale), this.hint);
    node.hidden = true;
    return node;
  }

  choose(mode) {
    this.mode = mode;
    for (const radio of this.seg.querySelectorAll("input")) radio.checked = radio.value === mode;
    if (mode === "similar" && !this.chosen) {
      const [name, slot] = [...this.slots].find(([, one]) => one.found) ?? [];
      const place = slot?.place;
      if (name) return this.pick(name, place.skip + Math.floor(place.height / 2) * place.width + Math.floor(place.width / 2));
    }
    this.draw();
  }

  async load(name, file) {
    const kind = file.type.split("/")[0];
    const slot = { name, file, kind, busy: true, card: el("section", { class: "card busy" }, el("h2", {}, file.name), el("p", { class: "soft" }, "Encoding…")) };
    if (kind !== "image" || name === "A" && this.slots.get("A")?.kind !== "image") this.remove("B");
    this.remove(name);
    this.slots.set(name, slot);
    this.chosen = null;
    this.place();
    this.drops[name].caption.textContent = file.name;
    this.drops.B.hidden = this.slots.get("A")?.kind !== "image";
    try {
      if (!this.accepts.includes(kind)) throw new EncodeFailure(`This model takes ${this.accepts.join(", ")}; the file is ${file.type || "of an unknown type"}.`);
      const media = kind === "image" ? imageOf(file) : kind === "audio" ? spectrogramOf(file) : null;
      media?.catch(() => null);
      const found = await encode(file, kind, this.headers);
      slot.place = layout(found.tokens, found.item.grid_thw, kind);
      slot.media = kind === "video" ? await framesOf(file, slot.place.frames) : await media?.catch(() => null);
      slot.found = found;
    } catch (error) {
      slot.error = error instanceof EncodeFailure ? error.message : `The page failed: ${error.message}`;
    }
    if (this.slots.get(name) !== slot) return; // another file has taken its place
    slot.busy = false;
    this.drops[name].classList.add("small");
    this.fill(slot);
    if (!slot.found) return;
    const { rows, tokens, dim } = slot.found;
    this.worker.postMessage({ kind: "load", slot: name, rows, tokens, dim });
    this.worker.postMessage({ kind: "components" });
    this.controls.hidden = false;
    if (this.mode === "similar") this.choose("components");
  }

  remove(name) {
    this.slots.delete(name);
    this.worker.postMessage({ kind: "drop", slot: name });
    this.drops[name].classList.remove("small");
    if (name === "B") this.drops.B.caption.textContent = "Drop an image to compare with";
    this.place();
  }

  place() { this.views.replaceChildren(...[...this.slots.keys()].sort().map((name) => this.slots.get(name).card)); }

  received(data) {
    if (data.kind === "similar" && data.ask !== this.asked) return;
    for (const [name, values] of data.kind === "similar" ? data.values : data.colors) {
      const slot = this.slots.get(name);
      if (slot) slot[data.kind] = values;
    }
    this.draw();
  }

  pick(name, index) {
    this.chosen = { slot: name, index };
    this.asked += 1;
    this.worker.postMessage({ kind: "similar", slot: name, index, ask: this.asked });
    if (this.mode !== "similar") this.choose("similar");
  }

  // The card of a slot: its canvases, and what there is to say.
  fill(slot) {
    slot.card.classList.remove("busy");
    const title = el("h2", { class: "wrap" }, slot.file.name, el("span", { class: "soft" }, bytes(slot.file.size)));
    if (slot.error) {
      slot.card.replaceChildren(title, el("p", { class: "bad wrap", role: "alert" }, slot.error));
      return;
    }
    const { found, place } = slot;
    const canvas = (frame) => {
      const node = el("canvas", { tabindex: "0", role: "img", "aria-label": `${slot.file.name}: ${place.width} by ${place.height} tokens. Arrow keys move the chosen one.` });
      node.addEventListener("click", (event) => {
        const box = node.getBoundingClientRect();
        const x = Math.min(place.width - 1, Math.floor(((event.clientX - box.left) / box.width) * this.across(slot)));
        const y = Math.min(place.height - 1, Math.floor(((event.clientY - box.top) / box.height) * place.height));
        this.pick(slot.name, place.skip + (frame * place.height + y) * place.width + x);
      });
      node.addEventListener("keydown", (event) => this.move(event, slot, frame));
      return node;
    };
    slot.canvases = Array.from({ length: place.frames }, (_, frame) => canvas(frame));
    let media;
    if (slot.kind === "video") {
      media = el("div", { class: "strip" }, slot.canvases.map((node, frame) => el("figure", {}, node,
        el("figcaption", {}, slot.media[frame] ? `${slot.media[frame].at.toFixed(1)} s` : `frame ${frame + 1}`))));
    } else if (slot.kind === "audio") {
      slot.sound = el("canvas", { "aria-label": "Spectrogram" });
      if (slot.media) drawSpectrogram(slot.sound, slot.media);
      slot.sound.hidden = !slot.media;
      const seconds = slot.media?.seconds;
      media = [slot.sound, seconds ? el("div", { class: "axis" }, el("span", {}, "0 s"), el("span", {}, `${(seconds / 2).toFixed(1)} s`), el("span", {}, `${seconds.toFixed(1)} s`)) : null,
        slot.canvases[0]];
    } else media = slot.canvases;
    slot.card.className = `card seen ${slot.kind}`;
    slot.card.replaceChildren(title, el("div", {}, [media].flat().filter(Boolean)), this.facts(slot));
  }

  // Tokens from the left to the right edge: fewer than there are where the tower pads the audio.
  across(slot) {
    const { place, kind, media } = slot;
    if (kind !== "audio" || place.width !== WHISPER.tokens || !media) return place.width;
    return Math.max(1, Math.min(place.width, Math.round((media.seconds / WHISPER.seconds) * place.width)));
  }

  facts(slot) {
    const { found, place } = slot;
    const spent = STAGES.filter((stage) => found.stages[stage] > 0);
    const whole = Math.max(found.seconds * 1000, spent.reduce((sum, stage) => sum + found.stages[stage], 0));
    const bars = spent.map((stage) => { const bar = el("i", { class: `s-${stage}` }); bar.style.width = `${(100 * found.stages[stage]) / whole}%`; return bar; });
    const grid = slot.kind === "audio" ? null : `${place.frames > 1 ? `${place.frames} × ` : ""}${place.height} × ${place.width} tokens${place.skip ? `, ${place.skip} more before them` : ""}`;
    const rows = [["Tokens", `${count(found.tokens)} × ${found.dim}, ${found.dtype}`], grid && ["Grid", grid],
      slot.kind !== "audio" && found.item.grid_thw && ["Patches", found.item.grid_thw.join(" × ")],
      slot.kind === "audio" && slot.media && ["Length", `${slot.media.seconds.toFixed(2)} s`],
      ["Round trip", `${ms(found.seconds * 1000)}${found.item.cached ? ", from the cache" : ""}`], ["Answer", bytes(found.bytes)]];
    return el("div", {}, !spent.length ? null : el("div", { class: "timing" }, el("div", { class: "stack", role: "img", "aria-label": spent.map((stage) => `${stage} ${ms(found.stages[stage])}`).join(", ") }, bars),
      el("div", { class: "keys" }, spent.map((stage) => el("span", {}, swatch(stage), `${stage} ${ms(found.stages[stage])}`)))),
    el("dl", { class: "facts" }, rows.filter(Boolean).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]),
      el("dt", {}, "Request"), el("dd", { class: "mono soft" }, found.id)));
  }

  move(event, slot, frame) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const { width, height, skip } = slot.place;
    const here = this.chosen?.slot === slot.name ? this.chosen.index - skip - frame * width * height : -1;
    const inside = here >= 0 && here < width * height;
    const [x, y] = inside ? [here % width, Math.floor(here / width)] : [Math.floor(this.across(slot) / 2), Math.floor(height / 2)];
    const [dx, dy] = inside ? steps[event.key] : [0, 0];
    const at = [Math.min(this.across(slot) - 1, Math.max(0, x + dx)), Math.min(height - 1, Math.max(0, y + dy))];
    this.pick(slot.name, skip + frame * width * height + at[1] * width + at[0]);
  }

  draw() {
    this.scale.hidden = this.mode !== "similar";
    const two = [...this.slots.values()].filter((slot) => slot.found).length > 1;
    this.hint.textContent = { components: `The first three principal components of the tokens${two ? ", of both images together," : ""} as lightness, green to red, and blue to yellow. Choose a token to see what is like it.`,
      similar: "Brighter is more like the chosen token: the cosine between their embeddings. Arrow keys move it.", plain: "The media alone." }[this.mode];
    // One scale for all that is compared; the chosen token itself is 1.
    let low = Infinity;
    let high = -Infinity;
    for (const [name, slot] of this.slots)
      slot.similar?.forEach((value, index) => {
        low = Math.min(low, value);
        if (!(this.chosen?.slot === name && this.chosen.index === index)) high = Math.max(high, value);
      });
    for (const slot of this.slots.values())
      slot.canvases?.forEach((canvas, frame) => this.drawFrame(slot, canvas, frame, low, high > low ? high - low : 1));
  }

  drawFrame(slot, canvas, frame, low, range) {
    const { place } = slot;
    const across = this.across(slot);
    const source = slot.kind === "video" ? slot.media[frame]?.canvas : slot.kind === "image" ? slot.media : null;
    canvas.width = source?.width ?? (slot.kind === "audio" ? 960 : place.width * 28);
    canvas.height = source?.height ?? (slot.kind === "audio" ? 56 : place.height * 28);
    const pen = canvas.getContext("2d");
    if (source) pen.drawImage(source, 0, 0);
    const values = this.mode === "plain" ? null : this.mode === "similar" ? slot.similar : slot.components;
    if (!values) return;
    const tile = document.createElement("canvas");
    [tile.width, tile.height] = [across, place.height];
    const pixels = new ImageData(across, place.height);
    for (let y = 0; y < place.height; y += 1)
      for (let x = 0; x < across; x += 1) {
        const row = place.skip + (frame * place.height + y) * place.width + x;
        const rgb = this.mode === "similar" ? ramp((values[row] - low) / range) : ofComponents(values[3 * row], values[3 * row + 1], values[3 * row + 2]);
        pixels.data.set([...rgb, 255], 4 * (y * across + x));
      }
    tile.getContext("2d").putImageData(pixels, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.globalAlpha = source ? this.strength : 1;
    pen.drawImage(tile, 0, 0, canvas.width, canvas.height);
    pen.globalAlpha = 1;
    const here = this.chosen?.slot === slot.name ? this.chosen.index - place.skip - frame * place.height * place.width : -1;
    if (this.mode !== "similar" || here < 0 || here >= place.height * place.width) return;
    const [w, h] = [canvas.width / across, canvas.height / place.height];
    const box = [(here % place.width) * w, Math.floor(here / place.width) * h, w, h];
    pen.lineWidth = 4; pen.strokeStyle = "#000"; pen.strokeRect(...box);
    pen.lineWidth = 2; pen.strokeStyle = "#fff"; pen.strokeRect(...box);
  }
}

function drawSpectrogram(canvas, { columns, rows, values }) {
  [canvas.width, canvas.height] = [columns, rows];
  const pixels = new ImageData(columns, rows);
  values.forEach((value, at) => pixels.data.set([...ramp(value), 255], 4 * at));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}
