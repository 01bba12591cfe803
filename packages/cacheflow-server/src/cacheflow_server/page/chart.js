// A small line of the last values, the newest at the right.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 100, HEIGHT = 34;
export const NUM_POINTS = 120;

export class Chart {
  constructor(svg) {
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    svg.setAttribute("preserveAspectRatio", "none");
    this.area = svg.appendChild(document.createElementNS(SVG, "path"));
    this.line = svg.appendChild(document.createElementNS(SVG, "path"));
    this.area.setAttribute("class", "area");
    this.line.setAttribute("class", "line");
    this.values = [];
  }

  /** Adds a value; null is a gap. `top`: what reaches the upper edge at least. */
  add(value, top = 0) {
    this.values.push(value);
    if (this.values.length > NUM_POINTS) this.values.shift();
    const known = this.values.filter((v) => v !== null);
    const scale = Math.max(top, ...known) || 1;
    const first = NUM_POINTS - this.values.length;
    let line = "", area = "", start = null, end = null;
    const close = () => {
      if (start !== null) area += `L${end},${HEIGHT}L${start},${HEIGHT}Z`;
      start = null;
    };
    this.values.forEach((value, index) => {
      if (value === null) return close();
      const x = (((first + index) * WIDTH) / (NUM_POINTS - 1)).toFixed(2);
      const y = (HEIGHT - 1 - (value / scale) * (HEIGHT - 3)).toFixed(2);
      const step = `${start === null ? "M" : "L"}${x},${y}`;
      start ??= x;
      end = x;
      line += step;
      area += step;
    });
    close();
    this.line.setAttribute("d", line);
    this.area.setAttribute("d", area);
  }
}
