// An embedding as the server answers it: a safetensors file, its header and its rows as numbers.

export class EncodeFailure extends Error {}

// Encode one file. Returns {rows (Float32Array, row-major), tokens, dim, dtype, item, model, stages, seconds}.
export async function encode(file, modality, headers) {
  const form = new FormData();
  form.append("modality", modality);
  form.append("file", file, "media");
  const began = performance.now();
  let answer, body;
  try {
    answer = await fetch("/encode", { method: "POST", body: form, headers: { ...headers(), Accept: "application/octet-stream" } });
    body = await answer.arrayBuffer();
  } catch {
    throw new EncodeFailure("The server did not answer.");
  }
  const seconds = (performance.now() - began) / 1000;
  if (!answer.ok) throw new EncodeFailure(messageOf(answer, body));
  const length = Number(new DataView(body).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(body, 8, length)));
  const { dtype, shape, data_offsets: [begin, end] } = header.embedding;
  const bytes = body.slice(8 + length + begin, 8 + length + end);
  return {
    rows: numbers(bytes, dtype), tokens: shape[0], dim: shape[1], dtype: header.__metadata__.dtype,
    item: JSON.parse(header.__metadata__.items)[0], model: header.__metadata__.model,
    stages: timing(answer.headers.get("Server-Timing") ?? ""), seconds, bytes: body.byteLength,
    id: answer.headers.get("X-Request-ID") ?? "",
  };
}

function messageOf(answer, body) {
  try {
    return JSON.parse(new TextDecoder().decode(body)).message;
  } catch {
    return `The server answered ${answer.status}.`;
  }
}

function timing(header) {
  const found = {};
  for (const part of header.split(",")) {
    const [, name, value] = /^\s*([\w-]+);dur=([\d.]+)/.exec(part) ?? [];
    if (name) found[name] = Number(value);
  }
  return found;
}

function numbers(buffer, dtype) {
  if (dtype === "F32") return new Float32Array(buffer);
  const halves = new Uint16Array(buffer);
  const rows = new Float32Array(halves.length);
  if (dtype === "BF16") {
    const words = new Uint32Array(rows.buffer);
    for (let i = 0; i < halves.length; i += 1) words[i] = halves[i] << 16;
    return rows;
  }
  for (let i = 0; i < halves.length; i += 1) {
    const half = halves[i], exponent = (half >> 10) & 31, fraction = half & 1023;
    const size = exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024);
    rows[i] = (half >> 15 ? -1 : 1) * (exponent === 31 ? NaN : size);
  }
  return rows;
}

// How the rows lie over an image or a clip: {frames, height, width, skip}, `skip` rows (class tokens) come first.
export function layout(tokens, grid, modality) {
  if (modality === "audio") return { frames: 1, height: 1, width: tokens, skip: 0 };
  if (grid) {
    const [frames, height, width] = grid;
    const merge = Math.sqrt((frames * height * width) / tokens);
    if (Number.isInteger(merge) && height % merge === 0 && width % merge === 0)
      return { frames, height: height / merge, width: width / merge, skip: 0 };
  }
  for (const skip of [0, 1, 5, 2, 3]) {
    const side = Math.sqrt(tokens - skip);
    if (Number.isInteger(side)) return { frames: 1, height: side, width: side, skip };
  }
  return { frames: 1, height: 1, width: tokens, skip: 0 };
}
