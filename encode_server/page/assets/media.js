// Media as the browser decodes them, to draw beside what the encoder made of them; and examples made on the spot.

const WIDEST = 960; // pixels of a drawn image
const RATE = 16000;
const WINDOW = 512;

export async function imageOf(file) {
  const url = URL.createObjectURL(file);
  try {
    const image = new Image();
    image.src = url;
    await image.decode();
    const scale = Math.min(1, WIDEST / Math.max(image.naturalWidth, image.naturalHeight));
    return canvasOf(image, Math.max(1, Math.round(image.naturalWidth * scale)), Math.max(1, Math.round(image.naturalHeight * scale)));
  } finally {
    URL.revokeObjectURL(url);
  }
}

function canvasOf(source, width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").drawImage(source, 0, 0, width, height);
  return canvas;
}

// `count` frames of a clip, from the middle of as many equal parts; fewer when the browser cannot decode the clip.
export async function framesOf(file, count) {
  const url = URL.createObjectURL(file);
  const video = document.createElement("video");
  video.muted = true;
  video.preload = "auto";
  const until = (event) => new Promise((done, failed) => {
    video.addEventListener(event, done, { once: true });
    video.addEventListener("error", () => failed(new Error("not decodable here")), { once: true });
    setTimeout(() => failed(new Error("too slow")), 10000);
  });
  const frames = [];
  try {
    const ready = until("loadeddata");
    video.src = url;
    await ready;
    const scale = Math.min(1, 480 / Math.max(video.videoWidth, video.videoHeight));
    for (let index = 0; index < count; index += 1) {
      const at = ((index + 0.5) / count) * video.duration;
      const moved = until("seeked");
      video.currentTime = at;
      await moved;
      frames.push({ at, canvas: canvasOf(video, Math.round(video.videoWidth * scale), Math.round(video.videoHeight * scale)) });
    }
  } catch (error) {
    console.info(`frames: ${error.message}`);
  } finally {
    video.removeAttribute("src");
    URL.revokeObjectURL(url);
  }
  return frames;
}

// A spectrogram: {seconds, columns, rows, values (0 to 1, row 0 is the highest)}; null where the browser cannot decode.
export async function spectrogramOf(file, columns = 800, rows = 96) {
  let samples;
  try {
    const context = new OfflineAudioContext(1, 1, RATE);
    samples = (await context.decodeAudioData(await file.arrayBuffer())).getChannelData(0);
  } catch {
    return null;
  }
  const seconds = samples.length / RATE;
  columns = Math.max(1, Math.min(columns, Math.floor(samples.length / 80)));
  const values = new Float32Array(columns * rows);
  const mel = (hertz) => 2595 * Math.log10(1 + hertz / 700);
  const top = mel(RATE / 2);
  const bin = Array.from({ length: rows + 1 }, (_, row) => ((700 * (10 ** (((rows - row) / rows) * top / 2595) - 1)) / (RATE / 2)) * (WINDOW / 2));
  for (let column = 0; column < columns; column += 1) {
    const start = Math.floor(((column + 0.5) / columns) * samples.length - WINDOW / 2);
    const power = spectrum(samples, start);
    for (let row = 0; row < rows; row += 1) {
      const from = Math.min(WINDOW / 2 - 1, Math.floor(bin[row + 1]));
      const to = Math.min(WINDOW / 2, Math.max(from + 1, Math.ceil(bin[row])));
      let sum = 0;
      for (let i = from; i < to; i += 1) sum += power[i];
      values[row * columns + column] = Math.log10(1e-9 + sum / (to - from));
    }
  }
  let high = -9;
  for (const value of values) high = Math.max(high, value);
  for (let i = 0; i < values.length; i += 1) values[i] = Math.max(0, 1 + (values[i] - high) / 6);
  return { seconds, columns, rows, values };
}

function spectrum(samples, start) {
  const real = new Float64Array(WINDOW), imaginary = new Float64Array(WINDOW);
  for (let i = 0; i < WINDOW; i += 1)
    real[i] = (samples[start + i] ?? 0) * (0.5 - 0.5 * Math.cos((2 * Math.PI * i) / WINDOW));
  for (let i = 1, j = 0; i < WINDOW; i += 1) {
    let bit = WINDOW >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) [real[i], real[j]] = [real[j], real[i]];
  }
  for (let size = 2; size <= WINDOW; size *= 2)
    for (let begin = 0; begin < WINDOW; begin += size)
      for (let k = 0; k < size / 2; k += 1) {
        const angle = (-2 * Math.PI * k) / size, cos = Math.cos(angle), sin = Math.sin(angle);
        const i = begin + k, j = i + size / 2;
        const re = real[j] * cos - imaginary[j] * sin, im = real[j] * sin + imaginary[j] * cos;
        real[j] = real[i] - re; imaginary[j] = imaginary[i] - im;
        real[i] += re; imaginary[i] += im;
      }
  return Float64Array.from({ length: WINDOW / 2 }, (_, i) => real[i] ** 2 + imaginary[i] ** 2);
}

export async function exampleImage() {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [672, 448];
  const draw = canvas.getContext("2d");
  const sky = draw.createLinearGradient(0, 0, 0, 300);
  sky.addColorStop(0, "#6fa8dc"); sky.addColorStop(1, "#f6dcb4");
  draw.fillStyle = sky; draw.fillRect(0, 0, 672, 448);
  draw.fillStyle = "#fff3c4"; draw.beginPath(); draw.arc(520, 110, 46, 0, 7); draw.fill();
  for (const [base, height, shade] of [[300, 90, "#7d92a8"], [330, 60, "#5c7a68"], [360, 30, "#4b6b45"]]) {
    draw.fillStyle = shade; draw.beginPath(); draw.moveTo(0, 448);
    for (let x = 0; x <= 672; x += 4) draw.lineTo(x, base - height * (0.5 + 0.5 * Math.sin(x / 97 + base) * Math.cos(x / 41)));
    draw.lineTo(672, 448); draw.fill();
  }
  draw.fillStyle = "#b5533c"; draw.fillRect(150, 280, 110, 80);
  draw.fillStyle = "#6d2e22"; draw.beginPath(); draw.moveTo(135, 284); draw.lineTo(205, 224); draw.lineTo(275, 284); draw.fill();
  draw.fillStyle = "#f3e3a1"; draw.fillRect(168, 300, 26, 26); draw.fillRect(214, 300, 26, 26);
  return new File([await new Promise((done) => canvas.toBlob(done, "image/png"))], "example.png", { type: "image/png" });
}

export function exampleAudio() {
  const length = RATE * 4, view = new DataView(new ArrayBuffer(44 + 2 * length));
  const text = (at, word) => [...word].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * length, true); text(8, "WAVEfmt "); view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); view.setUint16(22, 1, true); view.setUint32(24, RATE, true); view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true); view.setUint16(34, 16, true); text(36, "data"); view.setUint32(40, 2 * length, true);
  const notes = [262, 330, 392, 523, 392, 330, 262, 196];
  for (let i = 0, phase = 0; i < length; i += 1) {
    const part = Math.floor((8 * i) / length), within = ((8 * i) / length) % 1;
    phase += (2 * Math.PI * notes[part]) / RATE;
    const loud = Math.min(1, within * 20) * Math.exp(-2.5 * within);
    view.setInt16(44 + 2 * i, 9000 * loud * (Math.sin(phase) + 0.4 * Math.sin(2 * phase) + 0.2 * Math.sin(3 * phase)), true);
  }
  return new File([view.buffer], "example.wav", { type: "audio/wav" });
}
