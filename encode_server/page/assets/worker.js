// The arithmetic of the playground, beside the page's own thread.
//
// Rows are scaled to length one before anything is computed: a few tokens of a tower often are a hundred times longer
// than all others, and would be all that is seen.

const SAMPLE = 1500; // rows from which the components are computed
const STEPS = 12;
const slots = new Map();

onmessage = ({ data }) => {
  if (data.kind === "load") slots.set(data.slot, normalised(data.rows, data.tokens, data.dim));
  if (data.kind === "drop") slots.delete(data.slot);
  if (data.kind === "components") postMessage({ kind: "components", colors: components() });
  if (data.kind === "similar") postMessage({ kind: "similar", ask: data.ask, values: similar(data.slot, data.index) });
};

function normalised(rows, tokens, dim) {
  const found = new Float32Array(rows.length);
  for (let row = 0; row < tokens; row += 1) {
    let square = 0;
    for (let i = row * dim; i < (row + 1) * dim; i += 1) square += rows[i] * rows[i];
    const scale = square > 0 ? 1 / Math.sqrt(square) : 0;
    for (let i = row * dim; i < (row + 1) * dim; i += 1) found[i] = Number.isFinite(rows[i]) ? rows[i] * scale : 0;
  }
  return { rows: found, tokens, dim };
}

// Per slot the first three principal components of all slots' rows together, each row's between 0 and 1.
function components() {
  const all = [...slots.values()];
  if (!all.length) return new Map();
  const dim = all[0].dim;
  const same = [...slots].filter(([, slot]) => slot.dim === dim);
  const sample = sampled(same.map(([, slot]) => slot), dim);
  const mean = new Float64Array(dim);
  for (const row of sample) for (let i = 0; i < dim; i += 1) mean[i] += row[i] / sample.length;
  const basis = principal(sample, mean, dim);
  const scores = same.map(([name, slot]) => [name, project(slot, mean, basis)]);
  const ranges = [0, 1, 2].map((axis) => {
    const values = scores.flatMap(([, found]) => Array.from({ length: found.length / 3 }, (_, row) => found[3 * row + axis])).sort((a, b) => a - b);
    const low = values[Math.floor(values.length * 0.02)], high = values[Math.ceil(values.length * 0.98) - 1];
    return [low, high > low ? high - low : 1];
  });
  for (const [, found] of scores)
    for (let i = 0; i < found.length; i += 1) found[i] = Math.min(1, Math.max(0, (found[i] - ranges[i % 3][0]) / ranges[i % 3][1]));
  return new Map(scores);
}

function sampled(found, dim) {
  const total = found.reduce((sum, slot) => sum + slot.tokens, 0);
  const step = Math.max(1, total / SAMPLE);
  const sample = [];
  for (const slot of found)
    for (let row = 0; row < slot.tokens; row += step) {
      const at = Math.floor(row) * dim;
      sample.push(slot.rows.subarray(at, at + dim));
    }
  return sample;
}

// Subspace iteration: three directions, multiplied by the covariance and made orthogonal again and again.
function principal(sample, mean, dim) {
  let seed = 1;
  const random = () => { seed = (seed * 16807) % 2147483647; return seed / 2147483647 - 0.5; };
  let basis = [0, 1, 2].map(() => Float64Array.from({ length: dim }, random));
  orthogonal(basis);
  for (let step = 0; step < STEPS; step += 1) {
    const next = basis.map(() => new Float64Array(dim));
    const shift = basis.map((direction) => dot(direction, mean));
    for (const row of sample)
      for (let axis = 0; axis < 3; axis += 1) {
        const score = dot(basis[axis], row) - shift[axis];
        const into = next[axis];
        for (let i = 0; i < dim; i += 1) into[i] += score * (row[i] - mean[i]);
      }
    orthogonal(next);
    basis = next;
  }
  return basis;
}

function orthogonal(basis) {
  basis.forEach((direction, index) => {
    for (const other of basis.slice(0, index)) {
      const part = dot(direction, other);
      for (let i = 0; i < direction.length; i += 1) direction[i] -= part * other[i];
    }
    const length = Math.sqrt(dot(direction, direction)) || 1;
    for (let i = 0; i < direction.length; i += 1) direction[i] /= length;
  });
}

function project(slot, mean, basis) {
  const found = new Float32Array(slot.tokens * 3);
  const shift = basis.map((direction) => dot(direction, mean));
  for (let row = 0; row < slot.tokens; row += 1) {
    const values = slot.rows.subarray(row * slot.dim, (row + 1) * slot.dim);
    for (let axis = 0; axis < 3; axis += 1) found[3 * row + axis] = dot(basis[axis], values) - shift[axis];
  }
  return found;
}

// Cosines of every row with one row.
function similar(name, index) {
  const from = slots.get(name);
  if (!from) return new Map();
  const chosen = from.rows.subarray(index * from.dim, (index + 1) * from.dim);
  return new Map([...slots].filter(([, slot]) => slot.dim === from.dim).map(([other, slot]) => [
    other, Float32Array.from({ length: slot.tokens }, (_, row) => dot(chosen, slot.rows.subarray(row * slot.dim, (row + 1) * slot.dim)))]));
}

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < b.length; i += 1) sum += a[i] * b[i];
  return sum;
}
