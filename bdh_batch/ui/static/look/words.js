// How tokens, probabilities and neurons are written.

const BYTES = /^bytes:((?:\\x[0-9a-f]{2})+)$/;
const SIGNS = { "\n": "⏎", "\r": "␍", "\t": "⇥", " ": "␣" };
/** From the likeliest on: the least probability, and what it is called. */
export const LIKELIHOODS = [
  [0.5, "50 % or more"],
  [0.1, "10 to 50 %"],
  [0.01, "1 to 10 %"],
  [0, "less than 1 %"],
];

/** The bytes of a token that is a part of a character, by its name; null of any other. */
export function bytesOf(name) {
  const digits = BYTES.exec(name)?.[1];
  return digits ? digits.split("\\x").slice(1).map((each) => parseInt(each, 16)) : null;
}

/** A token's name in a sentence, in which what cannot be seen has a sign. */
export function quoted(name) {
  const bytes = bytesOf(name);
  if (bytes) return `byte ${bytes.map((each) => each.toString(16).padStart(2, "0")).join(" ")}`;
  return `“${[...name].map((each) => SIGNS[each] ?? (each < " " ? "�" : each)).join("")}”`;
}

/** Which of LIKELIHOODS a log-probability is of; null where it is not known. */
export function likelihood(logprob) {
  if (Number.isNaN(logprob)) return null;
  const probability = Math.exp(logprob);
  return LIKELIHOODS.findIndex(([least]) => probability >= least);
}

export function percent(share) {
  const shown = share * 100;
  if (shown > 0 && shown < 0.01) return "< 0.01\u00a0%";
  return `${shown.toFixed(shown >= 10 || shown === 0 ? 0 : shown >= 0.1 ? 1 : 2)}\u00a0%`;
}

export function probability(logprob) {
  return Number.isNaN(logprob) ? "probability not known" : `probability ${percent(Math.exp(logprob))}`;
}

/** Numbers are the API's, from 0. */
export function neuronName({ layer, head, neuron }) {
  return `layer ${layer}, head ${head}, neuron ${neuron}`;
}
