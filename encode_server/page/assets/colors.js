// Colours that are equally far apart to the eye: OKLab for components, a dark-to-bright ramp for similarity.

const RAMP = [[13, 8, 66], [71, 17, 122], [140, 41, 129], [205, 70, 106], [244, 123, 73], [252, 190, 96], [252, 253, 191]];

export function ramp(value) {
  const at = Math.min(0.9999, Math.max(0, value)) * (RAMP.length - 1);
  const index = Math.floor(at), rest = at - index;
  return RAMP[index].map((one, channel) => one + (RAMP[index + 1][channel] - one) * rest);
}

// Three numbers between 0 and 1: lightness, green to red, blue to yellow.
export function ofComponents(first, second, third) {
  const L = 0.38 + 0.5 * first, a = (second - 0.5) * 0.36, b = (third - 0.5) * 0.36;
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ].map((linear) => {
    const value = Math.min(1, Math.max(0, linear));
    return 255 * (value <= 0.0031308 ? 12.92 * value : 1.055 * value ** (1 / 2.4) - 0.055);
  });
}
